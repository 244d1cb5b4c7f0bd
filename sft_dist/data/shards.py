"""Which bytes are in a shard: packed rows that `np.memmap` reads with no parsing.

A folder is one split. Shard i is four flat files, rows first:

    00000.tokens    uint16 or uint32 [rows, seq_len]
    00000.targets   bits [rows, ceil(seq_len / 8)], big end first: the token carries loss
    00000.starts    bits, the same shape: a document starts here
    00000.lengths   uint32 [rows]: tokens before the padding

`manifest.json` is written last and says what they hold, with every file's size and digest.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sft_dist.data.records import Document
from sft_dist.errors import DataError
from sft_dist.files import describe, digest_of, sync

FORMAT_VERSION = 1
KINDS = ("tokens", "targets", "starts", "lengths")
_BLOCK_ROWS = 512


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a folder of shards holds. `tokenizer` and `template` are fingerprints, `data` is one of all the bytes."""

    seq_len: int
    rows: int
    rows_per_shard: int
    documents: int
    tokens: int
    targets: int
    dtype: str
    vocab_size: int
    eos_id: int
    pad_id: int
    tokenizer: str
    template: str
    data: str = ""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def documents_per_row(self) -> float:
        """Samples of a row, on average."""
        return self.documents / self.rows

    @property
    def fill(self) -> float:
        """Share of the row space that is not padding."""
        return self.tokens / (self.rows * self.seq_len)


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Rows as they lie in the files; the bits are big end first.

    >>> stored = StoredRows(*(np.array([[1], [2]], "u1") for _ in range(3)), lengths=np.array([1, 1], "u4"))
    >>> stored.take(np.array([1, 0])).tokens.tolist()
    [[2], [1]]
    """

    tokens: np.ndarray  # uint16 or uint32 [rows, seq_len]
    targets: np.ndarray  # uint8 [rows, ceil(seq_len / 8)]
    starts: np.ndarray  # uint8 [rows, ceil(seq_len / 8)]
    lengths: np.ndarray  # uint32 [rows]

    def take(self, places: np.ndarray | slice) -> StoredRows:
        """The rows at these places: views of a slice, copies of an int64 array."""
        if isinstance(places, slice):
            return StoredRows(self.tokens[places], self.targets[places], self.starts[places], self.lengths[places])
        # mode="clip" because "raise" goes through a buffer; the places are ours
        return StoredRows(*(getattr(self, kind).take(places, axis=0, mode="clip") for kind in KINDS))


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Rows as a model wants them, all [rows, seq_len] but `lengths` [rows].

    `positions` restart at each document; `documents` number the documents of a row from 0, padding is -1 (and has
    positions of its own, so that it is isolated too).
    """

    tokens: np.ndarray  # int64
    targets: np.ndarray  # bool
    positions: np.ndarray  # int64
    documents: np.ndarray  # int32
    lengths: np.ndarray  # int64


@dataclass(frozen=True, slots=True)
class ShardAbout:
    """What one written shard adds to the manifest."""

    rows: int
    documents: int
    tokens: int
    targets: int
    files: dict[str, dict[str, Any]]


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every id fits."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def write(
    folder: Path, rows: Iterable[Sequence[Document]], *, seq_len: int, rows_per_shard: int, **about: Any
) -> Manifest:
    """Write packed rows as shards; `about`: vocab_size, eos_id, pad_id, tokenizer, template of the manifest.

    >>> ids, targets = np.array([5, 6, 7], np.uint32), np.array([False, False, True])
    >>> about = dict(vocab_size=10, eos_id=0, pad_id=0, tokenizer="t", template="p")
    >>> rows = [[Document(ids, targets, "a:1")]]
    >>> write(Path("train"), rows, seq_len=8, rows_per_shard=4, **about).targets  # doctest: +SKIP
    1
    """
    folder.mkdir(parents=True)
    iterator, parts = iter(rows), []
    sizes = {"seq_len": seq_len, "vocab_size": about["vocab_size"], "pad_id": about["pad_id"]}
    for number in itertools.count():
        part = write_shard(folder, number, itertools.islice(iterator, rows_per_shard), **sizes)
        if not part.rows:
            for name in part.files:
                (folder / name).unlink()
            break
        parts.append(part)
    return write_manifest(folder, parts, seq_len=seq_len, rows_per_shard=rows_per_shard, **about)


def write_shard(
    folder: Path, number: int, rows: Iterable[Sequence[Document]], *, seq_len: int, vocab_size: int, pad_id: int
) -> ShardAbout:
    """Write the files of one shard, a block of rows at a time; memory is that of a block.

    Raises DataError for an id outside the vocabulary.
    """
    totals = {"rows": 0, "documents": 0, "tokens": 0, "targets": 0}
    paths = [folder / f"{number:05d}.{kind}" for kind in KINDS]
    digests = [hashlib.blake2b(digest_size=16) for _ in KINDS]
    iterator = iter(rows)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in paths]
        while block := list(itertools.islice(iterator, _BLOCK_ROWS)):
            arrays = _arrays(block, seq_len, token_dtype(vocab_size), pad_id)
            if int(arrays["tokens"].max()) >= vocab_size:
                _refuse_ids(block, vocab_size)
            totals["rows"] += len(block)
            totals["documents"] += sum(len(row) for row in block)
            totals["tokens"] += int(arrays["lengths"].sum())
            totals["targets"] += int(np.bitwise_count(arrays["targets"]).sum())
            for file, digest, kind in zip(files, digests, KINDS, strict=True):
                content = arrays[kind].tobytes()
                file.write(content)
                digest.update(content)
    entries = {}
    for path, digest in zip(paths, digests, strict=True):
        sync(path)
        entries[path.name] = {"bytes": path.stat().st_size, "blake2b": digest.hexdigest()}
    return ShardAbout(files=entries, **totals)


def write_manifest(
    folder: Path, parts: Sequence[ShardAbout], *, seq_len: int, rows_per_shard: int, **about: Any
) -> Manifest:
    """Write `manifest.json` for shards that are all there."""
    files = {name: entry for part in parts for name, entry in part.files.items()}
    data = hashlib.blake2b("".join(f"{n}{files[n]['blake2b']}" for n in sorted(files)).encode(), digest_size=16)
    totals = {name: sum(getattr(part, name) for part in parts) for name in ("rows", "documents", "tokens", "targets")}
    manifest = Manifest(
        seq_len=seq_len,
        rows_per_shard=rows_per_shard,
        dtype=token_dtype(about["vocab_size"]).str,
        data=data.hexdigest(),
        files=files,
        **totals,
        **about,
    )
    staged = folder / "manifest.partial"
    values = asdict(manifest)
    staged.write_text(json.dumps({**values, "digest": digest_of(values)}, indent=1))
    sync(staged)
    staged.rename(folder / "manifest.json")
    return manifest


def _arrays(rows: Sequence[Sequence[Document]], seq_len: int, dtype: np.dtype, pad_id: int) -> dict[str, np.ndarray]:
    tokens = np.full((len(rows), seq_len), pad_id, np.uint32)
    flags = np.zeros((2, len(rows), seq_len), bool)  # targets, starts
    lengths = np.zeros(len(rows), "<u4")
    for number, row in enumerate(rows):
        at = 0
        for document in row:
            end = at + len(document.ids)
            tokens[number, at:end] = document.ids
            flags[0, number, at:end] = document.targets
            flags[1, number, at] = True
            at = end
        lengths[number] = at
    return {
        "tokens": tokens if dtype.itemsize == 4 or tokens.max() > 0xFFFF else tokens.astype(dtype),
        "targets": np.packbits(flags[0], axis=1),
        "starts": np.packbits(flags[1], axis=1),
        "lengths": lengths,
    }


def _refuse_ids(rows: Sequence[Sequence[Document]], vocab_size: int) -> None:
    for document in (document for row in rows for document in row):
        if document.ids.max() >= vocab_size:
            raise DataError(
                f"{document.where}: token {document.ids.max()} is outside the vocabulary of {vocab_size}; the tokens were made "
                "with another tokenizer: name that one in prepare.tokenizer"
            )


class Shards:
    """The rows of one split, mapped from disk.

    >>> shards = Shards.open(Path("runs/sms-spam/shards/train"))  # doctest: +SKIP
    >>> shards.rows(np.array([0, 7])).tokens.shape  # doctest: +SKIP
    (2, 512)
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.num_rows, self.seq_len = manifest.rows, manifest.seq_len
        self._maps: dict[tuple[int, str], np.ndarray] = {}

    @classmethod
    def open(cls, folder: Path, *, verify: bool = False) -> Shards:
        """Read the manifest and check that every file has its size (`verify`: and its digest).

        Raises DataError naming the file, what is wrong with it, and what to do.
        """
        path = folder / "manifest.json"
        try:
            values = json.loads(path.read_text())
            version, digest = values["format_version"], values.pop("digest")
            is_sound = version != FORMAT_VERSION or digest == digest_of(values)
        except FileNotFoundError:
            raise DataError(
                f"{folder.absolute()}: no prepared shards there; run `sft-dist prepare RUN.yaml` first"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError):
            is_sound, version = False, FORMAT_VERSION
        if not is_sound:
            raise DataError(f"{path}: damaged; {_REMEDY}")
        if version != FORMAT_VERSION:
            raise DataError(f"{path}: format version {version}, this program reads {FORMAT_VERSION}; {_REMEDY}")
        manifest = Manifest(**values)
        for name, entry in manifest.files.items():
            _check(folder / name, entry, is_whole=verify)
        return cls(folder, manifest)

    def stored(self, numbers: np.ndarray) -> StoredRows:
        """The rows of these numbers, int64 [n], in their order, as they lie in the files; fastest for ascending numbers.

        Raises IndexError for a row that does not exist.
        """
        return StoredRows(*self._read(numbers, KINDS))

    def rows(self, numbers: np.ndarray) -> RowBatch:
        """The same rows for who has no torch: copies, widened in NumPy (the loader widens on the model's device)."""
        stored = self.stored(numbers)
        lengths, starts = stored.lengths.astype(np.int64), self._unpacked(stored.starts)
        places = np.arange(self.seq_len)
        is_padding = places >= lengths[:, None]
        begins = starts | (places == lengths[:, None])  # the padding counts as a document of its own
        positions = places - np.maximum.accumulate(np.where(begins, places, 0), axis=1)
        documents = np.cumsum(starts, axis=1, dtype=np.int32) - 1
        return RowBatch(
            tokens=stored.tokens.astype(np.int64),
            targets=self._unpacked(stored.targets),
            positions=positions,
            documents=np.where(is_padding, np.int32(-1), documents),
            lengths=lengths,
        )

    def counts(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(tokens without padding, target tokens) of each of these rows, int64 [n], from their bits alone."""
        lengths, targets = self._read(numbers, ("lengths", "targets"))
        return lengths.astype(np.int64), _num_bits(targets)

    def count(self, numbers: np.ndarray) -> tuple[int, int]:
        """(tokens without padding, target tokens) of these rows together."""
        lengths, targets = self.counts(numbers)
        return int(lengths.sum()), int(targets.sum())

    def documents_per_row(self) -> np.ndarray:
        """Documents of each row, int64 [rows]."""
        (starts,) = self._read(np.arange(self.num_rows), ("starts",))
        return _num_bits(starts)

    def _unpacked(self, bits: np.ndarray) -> np.ndarray:
        return np.unpackbits(bits, axis=1, count=self.seq_len).view(bool)

    def _read(self, numbers: np.ndarray, kinds: Sequence[str]) -> list[np.ndarray]:
        """One gather a shard, in ascending order whatever was asked for: the memory of a shard is walked once."""
        numbers = np.asarray(numbers, dtype=np.int64)
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < self.num_rows:
            raise IndexError(f"rows {numbers.min()} to {numbers.max()} of {self.num_rows} in {self.folder}")
        order = None if (numbers[1:] >= numbers[:-1]).all() else np.argsort(numbers)
        shards, places = np.divmod(numbers if order is None else numbers[order], self.manifest.rows_per_shard)
        cuts = [0, *(np.flatnonzero(np.diff(shards)) + 1).tolist(), len(shards)]
        made = []
        for kind in kinds:
            dtype, width = self._layout(kind)
            out = np.empty((len(numbers), *width), dtype)
            for begin, end in itertools.pairwise(cuts if len(numbers) else []):
                source = self._map(int(shards[begin]), kind)
                source.take(places[begin:end], axis=0, out=out[begin:end], mode="clip")  # "raise" would use a buffer
            made.append(out)
        if order is None:
            return made
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return [out.take(back, axis=0, mode="clip") for out in made]

    def _layout(self, kind: str) -> tuple[np.dtype, tuple[int, ...]]:
        bits = np.dtype("u1"), (-(-self.seq_len // 8),)
        layouts = {"tokens": (np.dtype(self.manifest.dtype), (self.seq_len,)), "lengths": (np.dtype("<u4"), ())}
        return layouts.get(kind, bits)

    def _map(self, number: int, kind: str) -> np.ndarray:
        if (number, kind) not in self._maps:
            while len(self._maps) >= _MAX_MAPS:
                del self._maps[next(iter(self._maps))]
            dtype, width = self._layout(kind)
            flat = np.memmap(self.folder / f"{number:05d}.{kind}", dtype=dtype, mode="r")
            self._maps[number, kind] = np.asarray(flat).reshape(-1, *width)  # not a memmap: its slices are slow to make
        return self._maps[number, kind]


_MAX_MAPS = 16_384  # Linux allows a process 65,530 maps


def _num_bits(packed: np.ndarray) -> np.ndarray:
    """Bits set in each row: uint8 [rows, width] to int64 [rows]."""
    is_wide = packed.shape[1] % 8 == 0
    return np.bitwise_count(packed.view(np.uint64) if is_wide else packed).sum(axis=1, dtype=np.int64)


_REMEDY = "prepare again with `sft-dist prepare RUN.yaml --fresh`"


def _check(path: Path, entry: dict[str, Any], *, is_whole: bool) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise DataError(f"{path}: missing; {_REMEDY}") from None
    if size != entry["bytes"]:
        raise DataError(f"{path}: {size} bytes, the manifest says {entry['bytes']}; {_REMEDY}")
    if is_whole and describe(path) != entry:
        raise DataError(f"{path}: its bytes are not the ones that were written; {_REMEDY}")
