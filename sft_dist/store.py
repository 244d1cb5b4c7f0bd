"""Tensors of a checkpoint on disk: each rank's runs in one safetensors file, and runs cut anyhow read back from all of them.

A file is a safetensors header and the fp32 values of the rank's runs, one after another: of each run the master, then its
moments. Which run lies where is in the manifest, as are the digests of each file's blocks, so that a reader of any layout
opens only the files that hold what it wants and checks each block as it is read.
"""

from __future__ import annotations

import bisect
import contextlib
import json
import mmap
import os
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sft_dist.errors import CheckpointError, OtherCheckpointError
from sft_dist.files import BLOCK_BYTES, digest_of_block, make_folder, write_large
from sft_dist.layout import Fragment

_ALIGN = 4096  # where the values begin: a page, for who maps the file
_WIDTH = 4  # bytes of an fp32 value
_SAMPLE_BYTES = 1 << 26
_AHEAD_BYTES = 1 << 25


@dataclass(frozen=True, slots=True)
class Run:
    """Elements [offset, offset + numel) of the flattened parameter `name`, of `length` elements; one value each of `kinds`."""

    name: str
    length: int
    kinds: tuple[str, ...]
    offset: int
    numel: int


class Snapshot:
    """A copy of this rank's runs in host memory, in the order of its file: all that the step loop waits for.

    The buffer, pinned where there is a GPU, is reused from save to save; a save reads it while the next steps run.
    """

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank, self.world_size = rank, world_size
        self.runs: list[Run] = []
        self.buffer = torch.empty(0)

    @property
    def num_bytes(self) -> int:
        """Bytes of the values."""
        return self.buffer.numel() * _WIDTH

    def reserve(self, fragments: Iterable[Fragment]) -> None:
        """Make the buffer, and touch its pages, before the first save needs them."""
        self._lay_out([self._mine(fragment) for fragment in fragments])
        self.buffer.zero_()

    def take(self, fragments: Iterable[Fragment]) -> None:
        """Copy the live values; when this returns they may change."""
        mine = [self._mine(fragment) for fragment in fragments]
        self._lay_out(mine)
        live = [values for fragment in mine for values in fragment.values.values()]
        if not live:
            return
        # in one call: one by one, a thousand small copies in Python cost a twentieth of the time
        torch._foreach_copy_(list(self.buffer.split([values.numel() for values in live])), live, non_blocking=True)
        if any(values.is_cuda for values in live):
            torch.cuda.synchronize()

    def write_sample(self, path: Path) -> int:
        """Write the first part of the buffer, to learn how fast that is; returns its bytes."""
        make_folder(path.parent)
        path.unlink(missing_ok=True)
        return write_large(path, b"\0" * _ALIGN, _bytes_of(self.buffer)[:_SAMPLE_BYTES])["bytes"]

    def _lay_out(self, mine: list[Fragment]) -> None:
        self.runs = [Run(f.name, f.length, tuple(f.values), f.offset, f.numel) for f in mine]
        count = sum(run.numel * len(run.kinds) for run in self.runs)
        if self.buffer.numel() != count:
            self.buffer = torch.empty(0)  # the old one goes before the new one comes
            self.buffer = _host_memory(count)

    def _mine(self, fragment: Fragment) -> Fragment:
        """Of what every rank holds, each writes its part."""
        if not fragment.is_replicated:
            return fragment
        begin, end = (fragment.numel * rank // self.world_size for rank in (self.rank, self.rank + 1))
        values = {kind: value[begin:end] for kind, value in fragment.values.items()}
        return Fragment(fragment.name, fragment.length, fragment.offset + begin, values)

    def write(self, path: Path) -> dict[str, Any]:
        """Write the file and wait until it is on the disk; returns its part of the manifest."""
        header = _header(self.runs)
        values = _bytes_of(self.buffer) if self.buffer.numel() else memoryview(b"")
        return {"name": path.name, "entry": write_large(path, header, values), "begin": len(header), "runs": self.runs}


def _host_memory(count: int) -> torch.Tensor:
    """fp32 [count] that begins at a page: pinned where there is a GPU, else in huge pages where the kernel has them."""
    if torch.cuda.is_available() or not count:
        return torch.empty(count, pin_memory=torch.cuda.is_available())
    memory = mmap.mmap(-1, count * _WIDTH)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32)


def _header(runs: list[Run]) -> bytes:
    """The safetensors header of these runs, filled up so that the values begin at a multiple of 4,096 bytes."""
    tensors, begin = {}, 0
    for run in runs:
        for kind in run.kinds:
            end = begin + run.numel * _WIDTH
            tensors[f"{kind}/{run.name}"] = {"dtype": "F32", "shape": [run.numel], "data_offsets": [begin, end]}
            begin = end
    offsets = {run.name: f"{run.offset}/{run.length}" for run in runs}
    text = json.dumps({"__metadata__": offsets, **tensors}).encode()
    text += b" " * (-(len(text) + 8) % _ALIGN)
    return len(text).to_bytes(8, "little") + text


def index(pieces: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What the manifest says of the tensors, from what each rank's `Snapshot.write` returned."""
    parameters: dict[str, list[Any]] = {}
    shards = {}
    for piece in pieces:
        runs = []
        for run in piece["runs"]:
            about = parameters.setdefault(run.name, [len(parameters), run.length, list(run.kinds)])
            runs.append([about[0], run.offset, run.numel])
        shards[piece["name"]] = {"begin": piece["begin"], "runs": runs}
    return {"parameters": [[name, length, kinds] for name, (_, length, kinds) in parameters.items()], "shards": shards}


def check_index(tensors: Mapping[str, Any], files: Mapping[str, Any]) -> None:
    """Refuse a table whose runs do not lie in their files, or do not make each parameter whole exactly once.

    Raises ValueError saying what is wrong; nothing is read or allocated by what it says.
    """
    parameters, covered = tensors["parameters"], defaultdict(list)
    for name, length, kinds in parameters:
        if not (
            isinstance(name, str) and _is_count(length) and kinds and set(kinds) <= {"master", "exp_avg", "exp_avg_sq"}
        ):
            raise ValueError(f"parameter {name!r}: {length!r} elements of {kinds!r}")
    for file, shard in tensors["shards"].items():
        if not _is_count(shard["begin"]) or shard["begin"] % _WIDTH:
            raise ValueError(f"{file}: values begin at {shard['begin']!r}")
        end = shard["begin"]
        for number, offset, numel in shard["runs"]:
            if not (_is_count(number) and _is_count(offset) and _is_count(numel) and number < len(parameters)):
                raise ValueError(f"{file}: run {number!r}, {offset!r}, {numel!r}")
            covered[number].append((offset, numel))
            end += numel * len(parameters[number][2]) * _WIDTH
        if file not in files or end != files[file]["bytes"]:
            raise ValueError(f"{file}: its runs end at byte {end}")
    for number, (name, length, _) in enumerate(parameters):
        at = 0
        for offset, numel in sorted(covered[number]):
            if offset != at:
                raise ValueError(f"{name}: element {min(at, offset)} is missing or there twice")
            at += numel
        if at != length:
            raise ValueError(f"{name}: {at} of {length} elements")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


class Reader:
    """Reads runs, cut anyhow, out of the files of one checkpoint. The manifest must have been checked.

    >>> Reader(Path("checkpoints/step-00000100"), manifest).fill(engine.fragments())  # doctest: +SKIP
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder, self.files = folder, manifest["files"]
        self.lengths: dict[str, int] = {}
        self._kinds: dict[str, list[str]] = {}
        self._runs: dict[str, list[tuple[int, int, str, int]]] = defaultdict(list)  # (offset, numel, file, byte)
        parameters = manifest["tensors"]["parameters"]
        for name, length, kinds in parameters:
            self.lengths[name], self._kinds[name] = length, kinds
        for file, shard in manifest["tensors"]["shards"].items():
            byte = shard["begin"]
            for number, offset, numel in shard["runs"]:
                name, _, kinds = parameters[number]
                self._runs[name].append((offset, numel, file, byte))
                byte += numel * len(kinds) * _WIDTH
        for runs in self._runs.values():
            runs.sort()

    def fill(self, fragments: Iterable[Fragment]) -> None:
        """Fill the live values of these fragments, in place, each byte checked as it is read.

        Raises CheckpointError naming the file that is damaged, OtherCheckpointError naming the parameter that is missing or of
        another size.
        """
        wanted: dict[str, list[tuple[int, torch.Tensor]]] = defaultdict(list)
        for fragment in fragments:
            for kind, values in fragment.values.items():
                for file, byte, part in self._parts(fragment, kind, values):
                    wanted[file].append((byte, part))
        for file, parts in sorted(wanted.items()):
            self._read(file, sorted(parts, key=lambda part: part[0]))

    def _parts(self, fragment: Fragment, kind: str, values: torch.Tensor) -> Iterator[tuple[str, int, torch.Tensor]]:
        """(file, first byte, where the values go) of each stored run that overlaps the fragment."""
        kinds = self._kinds.get(fragment.name, [])
        if kind not in kinds or self.lengths[fragment.name] != fragment.length:
            there = f"{self.lengths[fragment.name]} elements of {kinds}" if kinds else "nothing"
            raise OtherCheckpointError(
                f"{self.folder}: {fragment.name}: the model wants {fragment.length} elements of {kind}, the checkpoint has "
                f"{there}; it is of another model: name the one that was trained, or start over with --fresh (nothing is deleted)"
            )
        end = fragment.offset + fragment.numel
        runs = self._runs[fragment.name]
        first = max(0, bisect.bisect_right(runs, fragment.offset, key=lambda run: run[0]) - 1)
        for offset, numel, file, byte in runs[first:]:
            if offset >= end:
                break
            low, high = max(offset, fragment.offset), min(offset + numel, end)
            if low < high:
                at = byte + (kinds.index(kind) * numel + low - offset) * _WIDTH
                yield file, at, values[low - fragment.offset : high - fragment.offset]

    def _read(self, file: str, parts: list[tuple[int, torch.Tensor]]) -> None:
        """Walk the blocks of a file once, in order, and hand out what is wanted of each."""
        path, entry = self.folder / file, self.files[file]
        buffer = torch.empty(BLOCK_BYTES // _WIDTH)  # small and reused: it stays in the processor's cache
        held, first, asked = -1, 0, 0
        with opened(path, entry) as descriptor:
            while first < len(parts):
                byte, values = parts[first]
                block, inside = divmod(byte, BLOCK_BYTES)
                if byte >= asked:  # the disk reads ahead while blocks are checked
                    asked = byte + _AHEAD_BYTES
                    os.posix_fadvise(descriptor, byte, 2 * _AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
                count = min(values.numel(), (BLOCK_BYTES - inside) // _WIDTH)
                if not inside and count * _WIDTH == BLOCK_BYTES and _is_plain(values):  # no copy on the way
                    read_block(descriptor, path, entry, block, _bytes_of(values[:count]))
                else:
                    if block != held:
                        read_block(descriptor, path, entry, block, _bytes_of(buffer))
                        held = block
                    values[:count].copy_(buffer[inside // _WIDTH : inside // _WIDTH + count])
                if count < values.numel():
                    parts[first] = (byte + count * _WIDTH, values[count:])
                else:
                    first += 1


def _is_plain(values: torch.Tensor) -> bool:
    """Whether the bytes of a file are the bytes of these values in memory."""
    return values.device.type == "cpu" and values.dtype == torch.float32 and values.is_contiguous()


def _bytes_of(values: torch.Tensor) -> memoryview:
    return values.numpy().data.cast("B")


@contextlib.contextmanager
def opened(path: Path, entry: Mapping[str, Any] | None = None) -> Iterator[int]:
    """A descriptor of a checkpoint's file: a regular one, of the size that its `entry` says, or CheckpointError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe must not be waited for
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        if entry is not None and about.st_size != entry["bytes"]:
            raise CheckpointError(f"{path}: {about.st_size} bytes, {entry['bytes']} were written")
        yield descriptor
    finally:
        os.close(descriptor)


def read_block(descriptor: int, path: Path, entry: Mapping[str, Any], block: int, raw: memoryview) -> int:
    """Read one block into `raw` and check it; returns its bytes. Raises CheckpointError naming the file."""
    begin = block * BLOCK_BYTES
    size = min(BLOCK_BYTES, entry["bytes"] - begin)
    got = 0
    try:
        while got < size and (count := os.preadv(descriptor, [raw[got:size]], begin + got)):
            got += count
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    if got != size or digest_of_block(raw[:size]) != entry["blocks"][block]:
        raise CheckpointError(f"{path}: bytes {begin} to {begin + size} are not the ones that were written")
    return size


def blocks_of(path: Path, entry: Mapping[str, Any]) -> Iterator[memoryview]:
    """Every block of a file, checked, each to be used before the next. Raises CheckpointError naming the file."""
    raw = memoryview(bytearray(BLOCK_BYTES))
    with opened(path, entry) as descriptor:
        for block in range(len(entry["blocks"])):
            yield raw[: read_block(descriptor, path, entry, block, raw)]


def read_whole(path: Path, entry: Mapping[str, Any]) -> bytes:
    """A small file of a checkpoint, checked. Raises CheckpointError naming it."""
    return b"".join(bytes(block) for block in blocks_of(path, entry))
