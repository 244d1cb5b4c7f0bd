"""Which bytes are in a shard: packed rows that `np.memmap` reads with no parsing.

A folder is one split. `00000.rows` and its successors are flat arrays of records, one a row, so that a row is one read:

    digest        uint64: XXH3 of the bytes after it, compared whenever the row is read
    length        uint32: tokens before the padding
    num_targets   uint32: tokens that carry loss
    tokens        uint16 or uint32 [seq_len]
    targets       bits [ceil(seq_len / 8)], big end first: the token carries loss
    starts        bits, the same shape: a document starts here

`manifest.json` is written last and says what they hold, with every file's size and digest. `row_dtype` is the record.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from sft_dist.data import origins
from sft_dist.data.origins import OriginsWriter
from sft_dist.data.records import Document
from sft_dist.errors import DataError
from sft_dist.files import describe, digest_of, sync

FORMAT_VERSION = 3
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


def row_dtype(seq_len: int, token_dtype: np.dtype | str) -> np.dtype:
    """The record of a row; its size is a multiple of 8 bytes, so that every field of every row is aligned.

    >>> row_dtype(1024, "<u2").itemsize / 1024
    2.265625
    """
    bits = -(-seq_len // 8)
    size = 16 + seq_len * np.dtype(token_dtype).itemsize + 2 * bits
    fields = [("digest", "<u8"), ("length", "<u4"), ("num_targets", "<u4"), ("tokens", token_dtype, (seq_len,))]
    return np.dtype([*fields, ("targets", "u1", (bits,)), ("starts", "u1", (bits,)), ("padding", f"V{-size % 8}")])


def digests(records: np.ndarray) -> np.ndarray:
    """What the field `digest` of each of these records must hold: uint64 [rows]."""
    size = records.dtype.itemsize
    content = np.ascontiguousarray(records).view(np.uint8).data
    begins = range(0, len(records) * size, size)
    made = (xxhash.xxh3_64_intdigest(content[begin + 8 : begin + size]) for begin in begins)
    return np.fromiter(made, np.uint64, len(records))


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Rows as they lie in the files: `records` [rows] of `row_dtype`; the others are views of its fields."""

    records: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Tokens before the padding, uint32 [rows]."""
        return self.records["length"]

    @property
    def tokens(self) -> np.ndarray:
        """uint16 or uint32 [rows, seq_len]."""
        return self.records["tokens"]

    @property
    def targets(self) -> np.ndarray:
        """Bits, big end first: uint8 [rows, ceil(seq_len / 8)]."""
        return self.records["targets"]

    @property
    def starts(self) -> np.ndarray:
        """Bits, big end first: uint8 [rows, ceil(seq_len / 8)]."""
        return self.records["starts"]

    def take(self, places: np.ndarray | slice) -> StoredRows:
        """The rows at these places: views of a slice, copies of an int64 array."""
        if isinstance(places, slice):
            return StoredRows(self.records[places])
        # mode="clip" because "raise" goes through a buffer; the places are ours
        return StoredRows(self.records.take(places, mode="clip"))


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
    rows_of, documents, tokens, targets = 0, 0, 0, 0
    path, digest = folder / f"{number:05d}.rows", hashlib.blake2b(digest_size=16)
    iterator, places = iter(rows), OriginsWriter(folder, number)
    with path.open("wb") as file:
        while block := list(itertools.islice(iterator, _BLOCK_ROWS)):
            records = _records(block, seq_len, vocab_size, pad_id)
            rows_of += len(block)
            documents += sum(len(row) for row in block)
            tokens += int(records["length"].sum())
            targets += int(records["num_targets"].sum())
            places.add(document.where for row in block for document in row)
            content = records.tobytes()
            file.write(content)
            digest.update(content)
    sync(path)
    entry = {"bytes": path.stat().st_size, "blake2b": digest.hexdigest()}
    return ShardAbout(rows_of, documents, tokens, targets, {path.name: entry, **places.close()})


def write_manifest(
    folder: Path, parts: Sequence[ShardAbout], *, seq_len: int, rows_per_shard: int, **about: Any
) -> Manifest:
    """Write `manifest.json` for shards that are all there."""
    files = {name: entry for part in parts for name, entry in part.files.items()}
    rows = [name for name in sorted(files) if name.endswith(".rows")]  # the same data wherever it came from
    data = hashlib.blake2b("".join(f"{n}{files[n]['blake2b']}" for n in rows).encode(), digest_size=16)
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


def _records(rows: Sequence[Sequence[Document]], seq_len: int, vocab_size: int, pad_id: int) -> np.ndarray:
    tokens = np.full((len(rows), seq_len), pad_id, np.uint32)
    flags = np.zeros((2, len(rows), seq_len), bool)  # targets, starts
    records = np.zeros(len(rows), row_dtype(seq_len, token_dtype(vocab_size)))
    for number, row in enumerate(rows):
        at = 0
        for document in row:
            end = at + len(document.ids)
            tokens[number, at:end] = document.ids
            flags[0, number, at:end] = document.targets
            flags[1, number, at] = True
            at = end
        records["length"][number] = at
    if int(tokens.max()) >= vocab_size:
        _refuse_ids(rows, vocab_size)
    records["num_targets"] = flags[0].sum(axis=1)
    records["tokens"] = tokens
    records["targets"], records["starts"] = np.packbits(flags[0], axis=1), np.packbits(flags[1], axis=1)
    records["digest"] = digests(records)
    return records


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
        self.dtype = row_dtype(manifest.seq_len, manifest.dtype)
        self._maps: dict[int, np.ndarray] = {}

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
        try:
            manifest = _sound(Manifest(**values))
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: {error}; {_REMEDY}") from None
        for name, entry in manifest.files.items():
            _check(folder / name, entry, is_whole=verify)
        return cls(folder, manifest)

    def stored(self, numbers: np.ndarray) -> StoredRows:
        """The rows of these numbers, int64 [n], in their order, as they lie in the files; fastest for ascending numbers.

        Raises IndexError for a row that does not exist, DataError for one whose bytes are not the ones that were written.
        """
        numbers, order, parts = self._parts(numbers)
        out = np.empty(len(numbers), self.dtype)
        for begin, end, source, places in parts:
            source.take(places, out=out[begin:end], mode="clip")  # "raise" would use a buffer
        self._check_rows(numbers, out)
        return StoredRows(out if order is None else out.take(_inverse(order), mode="clip"))

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
        """(tokens without padding, target tokens) of each of these rows, int64 [n]."""
        numbers, order, parts = self._parts(numbers)
        counts = np.empty((2, len(numbers)), np.int64)
        for begin, end, source, places in parts:
            counts[0, begin:end], counts[1, begin:end] = source["length"][places], source["num_targets"][places]
        counts = counts if order is None else counts[:, _inverse(order)]
        return counts[0], counts[1]

    def count(self, numbers: np.ndarray) -> tuple[int, int]:
        """(tokens without padding, target tokens) of these rows together."""
        lengths, targets = self.counts(numbers)
        return int(lengths.sum()), int(targets.sum())

    def documents_per_row(self) -> np.ndarray:
        """Documents of each row, int64 [rows]."""
        shards = range(-(-self.num_rows // self.manifest.rows_per_shard))
        return np.concatenate([np.bitwise_count(self._map(n)["starts"]).sum(axis=1, dtype=np.int64) for n in shards])

    def origins(self, rows: Iterable[int]) -> dict[int, list[str]]:
        """`file:record` of each document of these rows; nothing where the shards were written without.

        Raises DataError, or OSError, where they cannot be read.
        """
        made: dict[int, list[str]] = {}
        of_shard: dict[int, list[int]] = {}
        for row in rows:
            of_shard.setdefault(row // self.manifest.rows_per_shard, []).append(row)
        for shard, mine in of_shard.items():
            if (found := origins.read(self.folder, shard, self.manifest.files)) is None:
                continue
            names, documents = found
            ends = np.bitwise_count(self._map(shard)["starts"]).sum(axis=1, dtype=np.int64).cumsum()
            for row in mine:
                place = row % self.manifest.rows_per_shard
                first, last = (ends[place - 1] if place else 0), ends[place]
                made[row] = [f"{names[source]}{number}" for source, number in documents[first:last].tolist()]
        return made

    def sources(self) -> tuple[list[str], np.ndarray]:
        """The files that the documents came from, and which one each is of: int64 [documents]; none where it is not known."""
        names: dict[str, int] = {}
        parts = []
        for shard in range(-(-self.num_rows // self.manifest.rows_per_shard)):
            found = origins.read(self.folder, shard, self.manifest.files)
            if found is None:
                return [], np.empty(0, np.int64)
            places = [names.setdefault(prefix.rstrip("#").rstrip(":"), len(names)) for prefix in found[0]]
            parts.append(np.array(places, np.int64)[found[1]["source"]])
        return list(names), np.concatenate(parts)

    def _check_rows(self, numbers: np.ndarray, records: np.ndarray) -> None:
        damaged = np.flatnonzero(digests(records) != records["digest"])
        if damaged.size:
            shard, place = divmod(int(numbers[damaged[0]]), self.manifest.rows_per_shard)
            raise DataError(
                f"{self.folder / f'{shard:05d}.rows'}: row {place}: its bytes are not the ones that were written; {_REMEDY}"
            )

    def _unpacked(self, bits: np.ndarray) -> np.ndarray:
        return np.unpackbits(bits, axis=1, count=self.seq_len).view(bool)

    def _parts(
        self, numbers: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None, list[tuple[int, int, np.ndarray, np.ndarray]]]:
        """The numbers ascending, how they were ordered (None: as they are), and (begin, end, records, places) of each shard.

        Read in ascending order whatever was asked for: the memory of a shard is walked once.
        """
        numbers = np.asarray(numbers, dtype=np.int64)
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < self.num_rows:
            raise IndexError(f"rows {numbers.min()} to {numbers.max()} of {self.num_rows} in {self.folder}")
        order = None if (numbers[1:] >= numbers[:-1]).all() else np.argsort(numbers)
        numbers = numbers if order is None else numbers[order]
        shards, places = np.divmod(numbers, self.manifest.rows_per_shard)
        cuts = [0, *(np.flatnonzero(np.diff(shards)) + 1).tolist(), len(shards)] if len(numbers) else []
        pairs = itertools.pairwise(cuts)
        return numbers, order, [(a, b, self._map(int(shards[a])), places[a:b]) for a, b in pairs]

    def _map(self, number: int) -> np.ndarray:
        if number not in self._maps:
            while len(self._maps) >= _MAX_MAPS:
                del self._maps[next(iter(self._maps))]
            records = np.memmap(self.folder / f"{number:05d}.rows", dtype=self.dtype, mode="r")
            self._maps[number] = np.asarray(records)  # not a memmap: its slices are slow to make
        return self._maps[number]


def _sound(manifest: Manifest) -> Manifest:
    """The manifest, if its numbers agree with one another; raises ValueError. Nothing is opened or allocated before."""
    counts = [
        getattr(manifest, name) for name in ("seq_len", "rows", "rows_per_shard", "documents", "tokens", "targets")
    ]
    if not all(type(count) is int and count >= 0 for count in counts) or 0 in counts[:3]:
        raise ValueError(
            f"rows of {counts[0]!r} tokens, {counts[1]!r} rows, {counts[2]!r} a shard: not numbers of a shard"
        )
    if manifest.dtype not in ("<u2", "<u4"):
        raise ValueError(f"tokens of dtype {manifest.dtype!r}; there are <u2 and <u4")
    row_bytes, left = row_dtype(manifest.seq_len, manifest.dtype).itemsize, manifest.rows
    for number in range(-(-manifest.rows // manifest.rows_per_shard)):
        name, rows = f"{number:05d}.rows", min(left, manifest.rows_per_shard)
        left -= rows
        if manifest.files.get(name, {}).get("bytes") != rows * row_bytes:
            raise ValueError(f"{name} does not hold {rows} rows of {row_bytes} bytes")
    known = {name for at in range(number + 1) for name in (f"{at:05d}.rows", origins.file_name(at))}
    if more := sorted(manifest.files.keys() - known):
        raise ValueError(f"{more[0]}: not a file of {manifest.rows} rows")
    return manifest


_MAX_MAPS = 16_384  # Linux allows a process 65,530 maps


def _inverse(order: np.ndarray) -> np.ndarray:
    """Where each one went."""
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return back


_REMEDY = "prepare again with `sft-dist prepare RUN.yaml --fresh`"


def _check(path: Path, entry: dict[str, Any], *, is_whole: bool) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise DataError(f"{path}: missing; {_REMEDY}") from None
    if size != entry["bytes"]:
        raise DataError(f"{path}: {size} bytes, the manifest says {entry['bytes']}; {_REMEDY}")
    if is_whole and describe(path) != {name: entry[name] for name in ("bytes", "blake2b")}:
        raise DataError(f"{path}: its bytes are not the ones that were written; {_REMEDY}")
