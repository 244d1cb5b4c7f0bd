"""Checkpoints that any number of GPUs can pick up, and what it means for one to be complete.

Each rank hands its runs of the fp32 masters and Adam moments to PyTorch's distributed checkpoint (DCP) as (global length,
offset, local tensor); DCP re-slices them at load time. Files are safetensors and JSON: nothing is ever unpickled.
A checkpoint is staged, fsynced and renamed; its manifest is written last. Complete means: the manifest verifies.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from sft_dist.comms import Comms
from sft_dist.errors import CheckpointError
from sft_dist.files import describe, digest_of, publish, sync
from sft_dist.layout import Fragment

FORMAT_VERSION = 1
_log = logging.getLogger("sft_dist")


@dataclass(frozen=True, slots=True)
class TrainState:
    """All that a run has to know about its past besides weights and moments; kept in `state.json`.

    `rows_consumed` is the whole state of the data: the stream of rows is a pure function of the seed.
    """

    step: int = 0
    rows_consumed: int = 0
    tokens: int = 0
    target_tokens: int = 0
    adam_step: int = 0
    gpu_seconds: float = 0.0

    def after(self, *, rows: int, tokens: int, target_tokens: int, adam_step: int, gpu_seconds: float) -> TrainState:
        """The state one step later.

        >>> TrainState(step=4, rows_consumed=32).after(
        ...     rows=8, tokens=4096, target_tokens=80, adam_step=5, gpu_seconds=1.5).rows_consumed
        40
        """
        return replace(
            self,
            step=self.step + 1,
            rows_consumed=self.rows_consumed + rows,
            tokens=self.tokens + tokens,
            target_tokens=self.target_tokens + target_tokens,
            adam_step=adam_step,
            gpu_seconds=self.gpu_seconds + gpu_seconds,
        )


class Run(torch.Tensor):
    """A contiguous run of a flattened tensor, in the shape DCP asks for: global length, offset, local values."""

    @staticmethod
    def __new__(cls, values: torch.Tensor, length: int, offset: int) -> Run:
        made = torch.Tensor._make_wrapper_subclass(cls, (length,), dtype=values.dtype, device=values.device)
        made.values_, made.offset_ = values, offset
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise TypeError(f"a Run only carries values to a checkpoint; {function} is not for it")

    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size([self.offset_]), torch.Size([self.values_.numel()]))

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.values_.dtype)
        data = TensorWriteData(chunk=self._chunk(), properties=properties, size=self.size())
        return [WriteItem(MetadataIndex(name, self._chunk().offsets), WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        return self.values_


def _state_dict(fragments: Iterable[Fragment]) -> dict[str, Run]:
    return {
        f"{kind}/{fragment.name}": Run(values, fragment.length, fragment.offset)
        for fragment in fragments
        for kind, values in fragment.values.items()
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
        keep_last: int,
        stage: int,
        comms: Comms | None = None,  # joined once the group exists: `check` comes before
    ) -> None:
        self.comms = comms
        self.folder, self.keep_last, self.stage = folder, keep_last, stage
        self.identity, self.attachments = dict(identity), dict(attachments)

    def save(self, fragments: Iterable[Fragment], state: TrainState) -> Path:
        """Write a complete checkpoint, publish it by one rename, remove what is older than the last `keep_last`."""
        final = self.folder / f"step-{state.step:08d}"
        partial = self.folder / f".{final.name}.partial"
        self._on_main(self._make, partial)
        writer = dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True)
        dcp.save(_state_dict(fragments), storage_writer=writer, process_group=self.comms.control)
        mine = {path.name: describe(path) for path in partial.glob(f"shard-{self.comms.topology.rank + 1:05d}-*")}
        files = {name: entry for part in self.comms.gather(mine) for name, entry in part.items()}
        self._on_main(self._publish, partial, final, files, state)
        self._on_main(self._prune, final)
        return final

    def _on_main(self, act: Callable[..., None], *arguments: Any) -> None:
        """Let the main rank act while the others wait; its failure is everybody's, in one line."""
        failure = None
        if self.comms.topology.is_main:
            try:
                act(*arguments)
            except OSError as error:
                failure = f"{error.filename or self.folder}: {error.strerror}"
        if failure := self.comms.broadcast(failure):
            raise CheckpointError(
                f"{failure}: the checkpoint cannot be written. Make room or mend the path; the ones before are untouched"
            )

    @staticmethod
    def _make(partial: Path) -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def _publish(self, partial: Path, final: Path, files: dict[str, Any], state: TrainState) -> None:
        (partial / "state.json").write_text(json.dumps(asdict(state), indent=2))
        for name, source in self.attachments.items():
            if source.is_dir():
                shutil.copytree(source, partial / name)
            else:
                shutil.copyfile(source, partial / name)
        for path in sorted(partial.rglob("*")):
            name = path.relative_to(partial).as_posix()
            if path.is_file() and name not in files:
                files[name] = describe(path)
        manifest = {
            "format_version": FORMAT_VERSION,
            "step": state.step,
            "world_size": self.comms.topology.world_size,
            "zero_stage": self.stage,
            "identity": self.identity,
            "files": files,
        }
        sync(partial)  # before the manifest exists: it vouches for what is on the disk
        (partial / "manifest.json").write_text(json.dumps({**manifest, "digest": digest_of(manifest)}, indent=2))
        publish(partial, final)  # a folder of that name is the same step, saved by an earlier life and damaged since
        _point(self.folder / "latest", final.name)

    def _prune(self, newest: Path) -> None:
        """Remove what is older than the last `keep_last`; what has a higher step is damaged, or resume had used it."""
        older = [path for path in _folders(self.folder) if path.name < newest.name]
        for old in older[: max(0, len(older) - self.keep_last + 1)]:
            (old / "manifest.json").unlink(missing_ok=True)
            shutil.rmtree(old)

    def check(self) -> None:
        """Refuse, before anything is started, to continue a run that is another one.

        Raises CheckpointError naming both values.
        """
        for path in reversed(_folders(self.folder)):
            try:
                saved = dict(json.loads((path / "manifest.json").read_text())["identity"])
            except (OSError, ValueError, KeyError, TypeError):
                continue  # damaged: `newest` says so
            return _same_run(path, saved, self.identity)

    def newest(self) -> Path | None:
        """The newest checkpoint whose manifest verifies, the same on every rank; None when there is none at all.

        A damaged one is named in a warning and passed over. Raises CheckpointError when all are damaged: falling past
        the last one is never a fresh start.
        """
        chosen, error = None, None
        if self.comms.topology.is_main:
            try:
                chosen = newest_complete(self.folder)
            except CheckpointError as failure:
                error = str(failure)
        chosen, error = self.comms.broadcast((chosen, error))
        if error:
            raise CheckpointError(error)
        return chosen

    def restore(self, path: Path, fragments: Iterable[Fragment]) -> TrainState:
        """Fill the live masters and moments from `path`, whatever world size and stage wrote it.

        Raises CheckpointError when the checkpoint belongs to another model, data set, tokenizer or batch.
        """
        manifest = json.loads((path / "manifest.json").read_text())
        _same_run(path, manifest["identity"], self.identity)
        reader = dcp.HuggingFaceStorageReader(str(path))
        dcp.load(_state_dict(fragments), storage_reader=reader, process_group=self.comms.control)
        return read_state(path)


def newest_complete(folder: Path) -> Path | None:
    """The newest folder whose manifest verifies, None when there are no checkpoints; see `Checkpoints.newest`."""
    candidates = _folders(folder)
    damage = []
    for path in reversed(candidates):
        reason = verify(path)
        if reason is None:
            return path
        damage.append(reason)
        _log.warning("checkpoint passed over: %s", reason)
    if damage:
        raise CheckpointError(
            f"{folder}: none of {len(candidates)} checkpoints is whole ({damage[0]}). "
            "Restore one from a backup, or start over with --fresh (the damaged ones are kept)"
        )
    return None


def verify(path: Path) -> str | None:
    """None when every file is there with its digest, else what is wrong, naming the file."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        files, digest = manifest["files"], manifest.pop("digest", None)
        if manifest["format_version"] != FORMAT_VERSION:
            return f"{path}: format version {manifest['format_version']}, this program reads {FORMAT_VERSION}"
        if digest != digest_of(manifest):
            return f"{path / 'manifest.json'}: its bytes are not the ones that were written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path / 'manifest.json'}: {type(error).__name__}: {error}"
    for name, entry in files.items():
        try:
            if describe(path / name) != entry:
                return f"{path / name}: its bytes are not the ones that were written"
        except OSError as error:
            return f"{path / name}: {error.strerror}"
    return None


def read_state(path: Path) -> TrainState:
    """The training state of a checkpoint folder."""
    return TrainState(**json.loads((path / "state.json").read_text()))


def read_masters(path: Path, module: torch.nn.Module) -> None:
    """Fill a whole, unsharded module with the fp32 masters of a checkpoint (one process, no group)."""
    masters = {
        f"master/{name}": parameter.detach().view(-1)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it is meant to be
        dcp.load(masters, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=True)


def _same_run(path: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for key in now | saved:
        if saved.get(key) != now.get(key):
            raise CheckpointError(
                f"{path}: was made with {key} = {saved.get(key)!r}, this run has {now.get(key)!r}. Continue with the old "
                "value, take another run_dir, or start over with --fresh (nothing is deleted)"
            )


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir() and path.name[5:].isdigit())


def _point(link: Path, target: str) -> None:
    """A hint for people; the truth is the newest folder that verifies."""
    staged = link.with_name(".latest.partial")
    staged.unlink(missing_ok=True)
    staged.symlink_to(target)
    staged.replace(link)
