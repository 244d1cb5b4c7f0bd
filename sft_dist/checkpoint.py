"""Checkpoints that any number of GPUs can pick up: how they come to be, which stay, which one a run goes on from.

Each rank copies its runs of the fp32 masters and Adam moments to host memory, and the step loop goes on; a thread writes
them, and the main rank's publishes. Files are safetensors and JSON: nothing is ever unpickled. A checkpoint is staged,
fsynced and renamed; its manifest is written last.
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
from pathlib import Path
from typing import Any

from sft_dist.comms import Comms
from sft_dist.errors import CheckpointError, OtherCheckpointError, UnsavedError
from sft_dist.files import make_folder, publish, set_aside, sync, sync_folder, write_blocks
from sft_dist.identity import require_same
from sft_dist.layout import Fragment
from sft_dist.manifest import none_is_whole, read_manifest, read_small, write_manifest
from sft_dist.retention import Retention, list_folders, score_at, step_of
from sft_dist.state import TrainState
from sft_dist.store import Reader, Snapshot, check_index, index

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
        return {
            "checkpoint_stall_seconds": self.stall_seconds,
            "checkpoint_write_seconds": self.write_seconds,
            "checkpoint_bytes": self.num_bytes,
            "checkpoint_gb_per_second": self.num_bytes / max(self.write_seconds, 1e-9) / 1e9,
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
        assert saved is not None
        if saved.failure is None:
            self.saved_step, self._failures = saved.step, 0
        else:
            self._failures += 1
            when = "soon" if self._failures == 1 else "when the next save is due"
            told = "step %d could NOT be saved: %s. It is tried again %s; the checkpoints before are untouched"
            _log.error(told, saved.step, saved.failure, when)
        return saved

    @property
    def wants_retry(self) -> bool:
        """Whether this rank knows of a save that failed and was not tried again yet; the ranks must agree to do so."""
        return self._failures == 1 and self._writer is None

    def save(self, fragments: Fragments, state: TrainState, waiting: Waiting = lambda: None) -> Saved:
        """Save and wait, as at the end; tried twice. Raises UnsavedError when it cannot be written, on every rank."""
        for _ in range(2):
            self.begin(fragments, state)
            saved = self.finish(waiting)
            assert saved is not None
            if (why := saved.failure) is None:
                return saved
        raise UnsavedError(cannot_be_written(str(why)))

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
        if self._is_main and failure is None and (stuck := self.attempt(self._prune, final, state)[1]):
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
        manifest: dict[str, Any] = {
            "step": state.step,
            "world_size": self.comms.topology.world_size,
            "zero_stage": self.stage,
            "saved_at": time.time(),
            "identity": self.identity,
            "files": files,
            "tensors": index(pieces),
        }
        check_index(manifest["tensors"], files)  # a layout that leaves elements out must not come to be trusted
        sync(partial)  # before the manifest exists: it vouches for what is on the disk
        write_manifest(partial, manifest)
        publish(partial, final)  # a folder of that name is the same step, saved by an earlier life and damaged since
        if why := self.attempt(_point, self.folder / "latest", final.name)[1]:
            _log.warning("%s: `latest` still names an older checkpoint; the new one is whole and found without it", why)

    def _prune(self, newest: Path, state: TrainState) -> None:
        """Remove what the retention does not keep; what has a higher step is damaged, or resume had used it."""
        there = {step_of(path): path for path in list_folders(self.folder) if step_of(path) <= step_of(newest)}
        kept = self.retention.kept({step: score_at(path) for step, path in there.items()})
        if state.streak is not None:  # the one that a roll-back would go to
            kept |= {max((step for step in there if step < state.streak.first_step), default=state.step)}
        for step in sorted(there.keys() - kept):
            _remove(there[step])

    def sweep(self) -> None:
        """Remove what a life that was killed left half written or half removed."""
        for path in leftovers(self.folder):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def check(self, step: int | None = None) -> None:
        """Refuse, before anything is started, to continue a run that is another one, from `step` if one is asked for.

        Raises CheckpointError naming both values, or the steps that there are.
        """
        for path in _candidates(list_folders(self.folder), step):
            try:
                saved = read_manifest(path)["identity"]
            except OtherCheckpointError:
                raise
            except CheckpointError:
                continue  # damaged: `restore` says so
            return require_same(path, saved, self.identity, self.allowed)

    def restore(self, fragments: Fragments, step: int | None = None) -> tuple[Path, TrainState, dict[str, Any]] | None:
        """Fill the live masters and moments from the newest whole checkpoint, whatever layout wrote it; None: there is none.

        Returns its folder, its state and the identity that it was saved with. `step` asks for that one alone: newer ones are
        then set aside, and damage is an error. A damaged one is named in a warning and passed over; once an older one has been
        used it is set aside. Raises CheckpointError, on every rank, when all are damaged (falling past the last is never a
        fresh start), or when the checkpoint belongs to another run or there is none of that step.
        """
        there = self.comms.broadcast(list_folders(self.folder) if self._is_main else None)
        newer = [path for path in there if step is not None and step_of(path) > step]
        damage: list[tuple[Path, str]] = []
        for path in _candidates(there, step):
            filled, reason = self._fill(path, fragments)
            if filled is not None:
                state, identity = filled
                if self._is_main:
                    for other, _ in damage:
                        set_aside(other, "damaged")
                    for other in newer:
                        set_aside(other)
                    if damage or newer:
                        _point(self.folder / "latest", path.name)
                self.begun_step = self.saved_step = state.step
                return path, state, identity
            _log.warning("checkpoint passed over: %s", reason)
            damage.append((path, reason))
        if damage:
            raise none_is_whole(self.folder, damage, is_one_of_many=step is not None and len(there) > 1)
        return None

    def _fill(self, path: Path, fragments: Fragments) -> tuple[tuple[TrainState, dict[str, Any]] | None, str]:
        """One attempt: the main rank reads the small files for all, each rank its runs. ((state, identity), "") or damage."""
        manifest, state, error = None, None, None
        if self._is_main:
            try:
                manifest = read_manifest(path)
                state = read_small(path, manifest)
            except CheckpointError as found:
                error = found
        manifest, state, error = self.comms.broadcast((manifest, state, error))
        if error is None:
            require_same(path, manifest["identity"], self.identity, self.allowed)
            try:
                Reader(path, manifest).fill(fragments())
            except CheckpointError as found:
                error = found
            error = next((each for each in self.comms.gather(error) if each), None)
        if isinstance(error, OtherCheckpointError):
            raise error
        return ((state, manifest["identity"]), "") if error is None else (None, str(error))


def cannot_be_written(failure: str) -> str:
    """What is said of a save that must succeed and does not."""
    return f"{failure}: the checkpoint cannot be written. Make room or mend the path; the ones before are untouched"


def leftovers(folder: Path) -> list[Path]:
    """What a life that was killed left half written or half removed."""
    patterns = (".step-*.partial", ".step-*.removed", ".latest.partial", ".sample-*.partial")
    return [path for pattern in patterns for path in folder.glob(pattern)]


def _remove(path: Path) -> None:
    """Gone in one rename that is on the disk first, so that a crash on the way leaves nothing that looks like a checkpoint."""
    gone = path.with_name(f".{path.name}.removed")
    path.rename(gone)
    sync_folder(path.parent)
    shutil.rmtree(gone)


def _candidates(there: list[Path], step: int | None) -> list[Path]:
    """The checkpoints to try, the newest first; of `step` alone when it is asked for. Raises CheckpointError."""
    chosen = [path for path in reversed(there) if step in (None, step_of(path))]
    if step is not None and not chosen:
        steps = ", ".join(str(step_of(path)) for path in there) or "none"
        raise CheckpointError(f"--from {step}: no such checkpoint; there are steps {steps}")
    return chosen


def _point(link: Path, target: str) -> None:
    """A hint for people; the truth is the newest folder that verifies."""
    staged = link.with_name(".latest.partial")
    staged.unlink(missing_ok=True)
    staged.symlink_to(target)
    os.replace(staged, link)
