"""Which bytes are in a shard: packed rows that `np.memmap` reads with no parsing.

A folder is one split. Shard i is four flat files, rows first:

    00000.tokens    uint16 or uint32 [rows, seq_len]
    00000.targets   bits [rows, ceil(seq_len / 8)], big end first: the token carries loss
    00000.starts    bits, the same shape: a document starts here
    00000.lengths   uint32 [rows]: tokens before the padding

`manifest.json` is written last and says what they hold, with every file's size and digest.
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

from sft_dist.data.records import Document
from sft_dist.errors import DataError
from sft_dist.files import describe, digest_of, sync

FORMAT_VERSION = 1
KINDS = ("tokens", "targets", "starts", "lengths")


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


def write(
    folder: Path, rows: Iterable[Sequence[Document]], *, seq_len: int, rows_per_shard: int, **about: Any
) -> Manifest:
    """Write packed rows as shards; `about`: vocab_size, eos_id, pad_id, tokenizer, template of the manifest.

    >>> rows = [[Document([5, 6, 7], [False, False, True], "a:1"), Document([8, 9], [False, True], "a:2")]]
    >>> about = dict(vocab_size=10, eos_id=0, pad_id=0, tokenizer="t", template="p")
    >>> write(Path("train"), rows, seq_len=8, rows_per_shard=4, **about).targets  # doctest: +SKIP
    2
    """
    dtype = np.dtype("<u2" if about["vocab_size"] <= 1 << 16 else "<u4")
    folder.mkdir(parents=True)
    totals = {"rows": 0, "documents": 0, "tokens": 0, "targets": 0}
    files: dict[str, dict[str, Any]] = {}
    iterator = iter(rows)
    for number in itertools.count():
        part = list(itertools.islice(iterator, rows_per_shard))
        if not part:
            break
        _check_ids(part, about["vocab_size"])
        arrays = _arrays(part, seq_len, dtype, about["pad_id"])
        totals["rows"] += len(part)
        totals["documents"] += sum(len(row) for row in part)
        totals["tokens"] += int(arrays["lengths"].sum())
        totals["targets"] += int(np.bitwise_count(arrays["targets"]).sum())
        for kind, array in arrays.items():
            name = f"{number:05d}.{kind}"
            files[name] = _write_whole(folder / name, array.tobytes())
    data = hashlib.blake2b("".join(f"{n}{files[n]['blake2b']}" for n in sorted(files)).encode(), digest_size=16)
    manifest = Manifest(
        seq_len=seq_len,
        rows_per_shard=rows_per_shard,
        dtype=dtype.str,
        data=data.hexdigest(),
        files=files,
        **totals,
        **about,
    )
    staged = folder / "manifest.partial"
    values = asdict(manifest)
    _write_whole(staged, json.dumps({**values, "digest": digest_of(values)}, indent=1).encode())
    staged.rename(folder / "manifest.json")
    return manifest


def _arrays(rows: Sequence[Sequence[Document]], seq_len: int, dtype: np.dtype, pad_id: int) -> dict[str, np.ndarray]:
    tokens = np.full((len(rows), seq_len), pad_id, dtype)
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
        "tokens": tokens,
        "targets": np.packbits(flags[0], axis=1),
        "starts": np.packbits(flags[1], axis=1),
        "lengths": lengths,
    }


def _check_ids(rows: Sequence[Sequence[Document]], vocab_size: int) -> None:
    for document in (document for row in rows for document in row):
        if not 0 <= min(document.ids) <= max(document.ids) < vocab_size:
            raise DataError(
                f"{document.where}: token {max(document.ids)} is outside the vocabulary of {vocab_size}; the tokenizer is at fault"
            )


def _write_whole(path: Path, content: bytes) -> dict[str, Any]:
    path.write_bytes(content)
    sync(path)
    return describe(path)


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

    def rows(self, numbers: np.ndarray) -> RowBatch:
        """The rows of these numbers, int64 [n], in their order; copies, widened for the model."""
        lengths = self._read("lengths", numbers).astype(np.int64)
        starts = self._bits("starts", numbers)
        places = np.arange(self.seq_len)
        is_padding = places >= lengths[:, None]
        begins = starts | (places == lengths[:, None])  # the padding counts as a document of its own
        positions = places - np.maximum.accumulate(np.where(begins, places, 0), axis=1)
        documents = np.cumsum(starts, axis=1, dtype=np.int32) - 1
        return RowBatch(
            tokens=self._read("tokens", numbers).astype(np.int64),
            targets=self._bits("targets", numbers),
            positions=positions,
            documents=np.where(is_padding, np.int32(-1), documents),
            lengths=lengths,
        )

    def count(self, numbers: np.ndarray) -> tuple[int, int]:
        """(tokens without padding, target tokens) of these rows, from their bits alone."""
        targets = int(np.bitwise_count(self._read("targets", numbers)).sum())
        return int(self._read("lengths", numbers).sum()), targets

    def documents_per_row(self) -> np.ndarray:
        """Documents of each row, int64 [rows]."""
        starts = self._read("starts", np.arange(self.num_rows))
        return np.bitwise_count(starts).sum(axis=1, dtype=np.int64)

    def _bits(self, kind: str, numbers: np.ndarray) -> np.ndarray:
        return np.unpackbits(self._read(kind, numbers), axis=1, count=self.seq_len).view(bool)

    def _read(self, kind: str, numbers: np.ndarray) -> np.ndarray:
        numbers = np.asarray(numbers, dtype=np.int64)
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < self.num_rows:
            raise IndexError(f"rows {numbers.min()} to {numbers.max()} of {self.num_rows} in {self.folder}")
        shard, place = np.divmod(numbers, self.manifest.rows_per_shard)
        first = self._map(0, kind)
        out = np.empty((len(shard), *first.shape[1:]), first.dtype)
        for number in np.unique(shard):
            chosen = shard == number
            out[chosen] = self._map(int(number), kind)[place[chosen]]
        return out

    def _map(self, number: int, kind: str) -> np.ndarray:
        if (number, kind) not in self._maps:
            width = {"tokens": self.seq_len, "targets": -(-self.seq_len // 8), "starts": -(-self.seq_len // 8)}.get(
                kind
            )
            dtype = {"tokens": self.manifest.dtype, "lengths": "<u4"}.get(kind, "u1")
            flat = np.memmap(self.folder / f"{number:05d}.{kind}", dtype=dtype, mode="r")
            self._maps[number, kind] = flat.reshape(-1, width) if width else flat
        return self._maps[number, kind]


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
