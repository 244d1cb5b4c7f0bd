"""Checkpoints that any number of GPUs can pick up, and what it means for one to be complete.

Each rank copies its runs of the fp32 masters and Adam moments to host memory, and the step loop goes on; a thread writes
them, and the main rank's publishes. Files are safetensors and JSON: nothing is ever unpickled. A checkpoint is staged,
fsynced and renamed; its manifest is written last. Complete means: the manifest verifies, and so does each byte when read.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sft_dist.comms import Comms
from sft_dist.errors import CheckpointError
from sft_dist.files import BLOCK_BYTES, digest_of, make_folder, publish, set_aside, sync, write_blocks
from sft_dist.identity import require_same
from sft_dist.layout import Fragment
from sft_dist.retention import Retention, list_folders, loss_at, step_of
from sft_dist.state import TrainState
from sft_dist.store import Reader, Snapshot, blocks_of, check_index, index, read_whole

FORMAT_VERSION = 2
Fragments = Callable[[], Iterable[Fragment]]  # this rank's live values, as often as they are asked for
Waiting = Callable[[], None]  # called once a second while a save is waited for
_log = logging.getLogger("sft_dist")


@dataclass(frozen=True, slots=True)
class Saved:
    """How a save went: where to, what it cost, or why it failed (then it is to be tried again)."""

    step: int
    path: Path
    num_bytes: int = 0
    stall_seconds: float = 0.0  # the step loop was held
    write_seconds: float = 0.0  # behind it: writing, digesting, fsync, publishing
    failure: str | None = None

    @property
    def numbers(self) -> dict[str, float]:
        """As the metrics name them."""
        speed = self.num_bytes / max(self.write_seconds, 1e-9) / 1e9
        return {
            "checkpoint_stall_seconds": self.stall_seconds,
            "checkpoint_write_seconds": self.write_seconds,
            "checkpoint_bytes": self.num_bytes,
            "checkpoint_gb_per_second": speed,
        }


class Checkpoints:
    """The checkpoints of one run.

    `identity` is what must not change between lives (model, data, tokenizer, batch); `attachments` are files and
    folders copied into each checkpoint so that it can be exported with nothing else at hand.
    """

    def __init__(
        self,
        folder: Path,
        *,
        identity: Mapping[str, Any],
        attachments: Mapping[str, Path],
        retention: Retention,
        stage: int,
        comms: Comms | None = None,  # joined once the group exists: `check` comes before
    ) -> None:
        self.folder, self.retention, self.stage = folder, retention, stage
        self.identity, self.attachments = dict(identity), dict(attachments)
        self.allowed: frozenset[str] = frozenset()  # keys of the identity that may have changed on purpose
        self._writer: threading.Thread | None = None
        self._saved: Saved | BaseException | None = None
        # the last step that a save was begun for, and the last that is safe: the same on every rank once none is in flight
        self.begun_step = self.saved_step = 0
        self._failures = 0  # in a row
        if comms is not None:
            self.join(comms)

    def join(self, comms: Comms) -> None:
        """Meet the other ranks; the writers get a group of their own, since they talk while the steps do."""
        self.comms, self._aside = comms, comms.aside()
        self.snapshot = Snapshot(comms.topology.rank, comms.topology.world_size)

    def begin(self, fragments: Fragments, state: TrainState, waiting: Waiting = lambda: None) -> Saved | None:
        """Copy the live values, and leave the rest to a thread. At most one save is in flight: one before is waited for.

        Every rank must call it. Returns what became of the one that was waited for.
        """
        started = time.perf_counter()
        before = self.finish(waiting)
        self.snapshot.take(fragments())
        self.begun_step = state.step
        stall = time.perf_counter() - started
        self._writer = threading.Thread(target=self._behind, args=(state, stall), name="checkpoint", daemon=True)
        self._writer.start()
        return before

    def finished(self) -> Saved | None:
        """What became of a save that ended since the last call, without waiting; None when there is none."""
        return self.finish() if self._writer is not None and not self._writer.is_alive() else None

    def finish(self, waiting: Waiting = lambda: None) -> Saved | None:
        """Wait for the save in flight; returns what became of it, None when there was none.

        Raises what ended the thread otherwise than by a file that could not be written: a rank that is gone, or a bug.
        """
        if self._writer is None:
            return None
        while self._writer.is_alive():
            waiting()
            self._writer.join(1.0)
        saved, self._writer, self._saved = self._saved, None, None
        if isinstance(saved, BaseException):
            raise saved
        if saved.failure is None:
            self.saved_step, self._failures = saved.step, 0
        else:
            self._failures += 1
            when = "after the next step" if self._failures == 1 else "when the next save is due"
            told = "step %d could NOT be saved: %s. The run goes on, and tries again %s; the ones before are untouched"
            _log.error(told, saved.step, saved.failure, when)
        return saved

    @property
    def wants_retry(self) -> bool:
        """Whether this rank knows of a save that failed and was not tried again yet; the ranks must agree to do so."""
        return self._failures == 1 and self._writer is None

    def save(self, fragments: Fragments, state: TrainState, waiting: Waiting = lambda: None) -> Saved:
        """Save and wait, as at the end; tried twice. Raises CheckpointError when it cannot be written, on every rank."""
        for _ in range(2):
            self.begin(fragments, state)
            saved = self.finish(waiting)
            assert saved is not None
            if saved.failure is None:
                break
        else:
            raise cannot_be_written(saved.failure)
        return saved

    def _behind(self, state: TrainState, stall: float) -> None:
        """The thread."""
        try:
            self._saved = self._write(state, stall)
        except BaseException as error:  # `finish` raises it where somebody hears
            self._saved = error

    def _write(self, state: TrainState, stall: float) -> Saved:
        """Every rank writes its file, the main one then publishes; a failure is everybody's, in one line."""
        started = time.perf_counter()
        final = self.folder / f"step-{state.step:08d}"
        partial = self.folder / f".{final.name}.partial"
        shard = partial / f"shard-{self.comms.topology.rank + 1:05d}.safetensors"
        failure = self.attempt(self._make, partial)[1] if self._is_main else None
        failure = self._aside.broadcast(failure)
        if failure is None:
            told = self._aside.gather_to_main(self.attempt(self.snapshot.write, shard))
            if self._is_main:
                failure = next((why for _, why in told if why), None)
                failure = failure or self.attempt(self._publish, partial, final, [piece for piece, _ in told], state)[1]
                if failure:
                    shutil.rmtree(partial, ignore_errors=True)
            failure = self._aside.broadcast(failure)
        seconds, num_bytes = time.perf_counter() - started, self._aside.sum([self.snapshot.num_bytes])[0]
        if self._is_main and failure is None and (stuck := self.attempt(self._prune, final)[1]):
            _log.warning("%s: an old checkpoint could not be removed; the new one is whole", stuck)
        return Saved(state.step, final, num_bytes, stall, seconds, failure)

    @property
    def _is_main(self) -> bool:
        return self.comms.topology.is_main

    def attempt(self, act: Callable[..., Any], *arguments: Any) -> tuple[Any, str | None]:
        """(what it returned, None) or (None, what went wrong in one line)."""
        try:
            return act(*arguments), None
        except OSError as error:
            return None, f"{error.filename or self.folder}: {error.strerror}"

    @staticmethod
    def _make(partial: Path) -> None:
        if partial.exists():
            shutil.rmtree(partial)
        make_folder(partial)

    def _publish(self, partial: Path, final: Path, pieces: list[Any], state: TrainState) -> None:
        files = {piece["name"]: piece["entry"] for piece in pieces}
        files["state.json"] = write_blocks(partial / "state.json", json.dumps(asdict(state), indent=2).encode())
        for name, source in self.attachments.items():
            inside = [path for path in sorted(source.rglob("*")) if path.is_file()] if source.is_dir() else [source]
            for path in inside:
                inner = name if path == source else f"{name}/{path.relative_to(source).as_posix()}"
                (partial / inner).parent.mkdir(parents=True, exist_ok=True)
                files[inner] = write_blocks(partial / inner, path.read_bytes())
        manifest = {
            "format_version": FORMAT_VERSION,
            "step": state.step,
            "world_size": self.comms.topology.world_size,
            "zero_stage": self.stage,
            "saved_at": time.time(),
            "identity": self.identity,
            "block_bytes": BLOCK_BYTES,
            "files": files,
            "tensors": index(pieces),
        }
        sync(partial)  # before the manifest exists: it vouches for what is on the disk
        write_blocks(partial / "manifest.json", _dump({**manifest, "digest": digest_of(manifest)}))
        publish(partial, final)  # a folder of that name is the same step, saved by an earlier life and damaged since
        _point(self.folder / "latest", final.name)

    def _prune(self, newest: Path) -> None:
        """Remove what the retention does not keep; what has a higher step is damaged, or resume had used it."""
        there = {step_of(path): path for path in list_folders(self.folder) if step_of(path) <= step_of(newest)}
        kept = self.retention.kept({step: loss_at(path, step) for step, path in there.items()})
        for step in sorted(there.keys() - kept):
            _remove(there[step])

    def sweep(self) -> None:
        """Remove what a life that was killed left half written or half removed."""
        for pattern in (".step-*.partial", ".step-*.removed", ".latest.partial", ".sample-*.partial"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def check(self) -> None:
        """Refuse, before anything is started, to continue a run that is another one.

        Raises CheckpointError naming both values.
        """
        for path in reversed(list_folders(self.folder)):
            try:
                saved = read_manifest(path)["identity"]
            except CheckpointError:
                continue  # damaged: `restore` says so
            return require_same(path, saved, self.identity, self.allowed)

    def restore(self, fragments: Fragments, step: int | None = None) -> tuple[Path, TrainState] | None:
        """Fill the live masters and moments from the newest whole checkpoint, whatever layout wrote it; None: there is none.

        `step` asks for that one alone: newer ones are then set aside, and damage is an error. A damaged one is named in a
        warning and passed over; once an older one has been used it is set aside. Raises CheckpointError, on every rank, when
        all are damaged (falling past the last is never a fresh start), or when the checkpoint belongs to another run.
        """
        paths = self.comms.broadcast(list(reversed(list_folders(self.folder))) if self._is_main else None)
        newer: list[Path] = []
        if step is not None:
            newer, paths = [p for p in paths if step_of(p) > step], [p for p in paths if step_of(p) == step]
        damage: list[tuple[Path, str]] = []
        for path in paths:
            state, reason = self._fill(path, fragments)
            if reason is None:
                if self._is_main:
                    for other, _ in damage:
                        set_aside(other, "damaged")
                    for other in newer:
                        set_aside(other)
                    if damage or newer:
                        _point(self.folder / "latest", path.name)
                self.begun_step = self.saved_step = state.step
                return path, state
            _log.warning("checkpoint passed over: %s", reason)
            damage.append((path, reason))
        if damage:
            raise _none_is_whole(self.folder, damage)
        return None

    def _fill(self, path: Path, fragments: Fragments) -> tuple[TrainState | None, str | None]:
        """One attempt: the main rank reads the manifest for all, each rank its runs. (state, None) or (None, damage)."""
        manifest, state, reason = None, None, None
        if self._is_main:
            try:
                manifest = read_manifest(path)
                state = read_state(path, manifest)
            except CheckpointError as error:
                reason = str(error)
        manifest, state, reason = self.comms.broadcast((manifest, state, reason))
        if reason is None:
            require_same(path, manifest["identity"], self.identity, self.allowed)
            try:
                Reader(path, manifest).fill(fragments())
            except CheckpointError as error:
                reason = str(error)
            reason = next((why for why in self.comms.gather(reason) if why), None)
        return (state, None) if reason is None else (None, reason)


def cannot_be_written(failure: str) -> CheckpointError:
    """The error of a save that must succeed and does not."""
    return CheckpointError(
        f"{failure}: the checkpoint cannot be written. Make room or mend the path; the ones before are untouched"
    )


def _remove(path: Path) -> None:
    """Gone in one rename, so that a crash on the way leaves nothing that looks like a checkpoint."""
    gone = path.with_name(f".{path.name}.removed")
    path.rename(gone)
    shutil.rmtree(gone)


def _none_is_whole(folder: Path, damage: list[tuple[Path, str]]) -> CheckpointError:
    return CheckpointError(
        f"{folder}: none of {len(damage)} checkpoints is whole ({damage[0][1]}). "
        "Restore one from a backup, or start over with --fresh (the damaged ones are kept)"
    )


def _dump(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps(manifest, separators=(",", ":")).encode()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder, after everything that it says of itself, its files and its runs has been checked.

    Raises CheckpointError naming the file and what is wrong.
    """
    file = path / "manifest.json"
    try:
        with file.open("rb") as opened_file:
            text = opened_file.read(_MANIFEST_LIMIT)
        manifest = json.loads(text)
        version = manifest["format_version"]
        if version != FORMAT_VERSION:
            raise CheckpointError(f"{path}: format version {version}, this program reads {FORMAT_VERSION}")
        if _dump(manifest) != text:
            raise ValueError("its bytes are not the ones that were written")
        digest = manifest.pop("digest")
        if digest != digest_of(manifest):
            raise ValueError("its bytes are not the ones that were written")
        _check_files(manifest["files"], manifest["block_bytes"])
        check_index(manifest["tensors"], manifest["files"])
        dict(manifest["identity"])
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(f"{file}: {type(error).__name__}: {error}") from None
    return manifest


_MANIFEST_LIMIT = 1 << 31  # bytes


def _check_files(files: Mapping[str, Any], block_bytes: int) -> None:
    """Names stay in the folder, sizes agree with the number of digests."""
    if block_bytes != BLOCK_BYTES:
        raise ValueError(f"blocks of {block_bytes!r} bytes; this program reads {BLOCK_BYTES}")
    for name, entry in files.items():
        parts = PurePosixPath(name).parts
        if not parts or name != "/".join(parts) or ".." in parts or PurePosixPath(name).is_absolute():
            raise ValueError(f"{name!r} is not a file of this folder")
        size, blocks = entry["bytes"], entry["blocks"]
        if type(size) is not int or size < 0 or len(blocks) != -(-size // BLOCK_BYTES):
            raise ValueError(f"{name}: {size!r} bytes in {len(blocks)} blocks")


def verify(path: Path) -> str | None:
    """None when every file is there with its digests, else what is wrong, naming the file."""
    try:
        for name, entry in read_manifest(path)["files"].items():
            for _ in blocks_of(path / name, entry):
                pass
    except CheckpointError as error:
        return str(error)
    return None


def read_state(path: Path, manifest: Mapping[str, Any] | None = None) -> TrainState:
    """The training state of a checkpoint folder, checked. Raises CheckpointError."""
    manifest = manifest or read_manifest(path)
    try:
        return TrainState.from_json(read_whole(path / "state.json", manifest["files"]["state.json"]))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path / 'state.json'}: {type(error).__name__}: {error}") from None


def newest_masters(folder: Path, fragments_of: Callable[[Path], Iterable[Fragment]]) -> tuple[Path, TrainState] | None:
    """Fill what `fragments_of(checkpoint folder)` gives from the newest whole checkpoint, alone; None: there is none.

    Damaged ones are named in a warning, passed over, and left where they are. Raises CheckpointError when all are damaged.
    """
    damage = []
    for path in reversed(list_folders(folder)):
        try:
            manifest = read_manifest(path)
            for name, entry in manifest["files"].items():
                if name not in manifest["tensors"]["shards"]:
                    read_whole(path / name, entry)
            Reader(path, manifest).fill(fragments_of(path))
            return path, read_state(path, manifest)
        except CheckpointError as error:
            _log.warning("checkpoint passed over: %s", error)
            damage.append((path, str(error)))
    if damage:
        raise _none_is_whole(folder, damage)
    return None


def _point(link: Path, target: str) -> None:
    """A hint for people; the truth is the newest folder that verifies."""
    staged = link.with_name(".latest.partial")
    staged.unlink(missing_ok=True)
    staged.symlink_to(target)
    os.replace(staged, link)
