"""Files of token ids that other trainers left: Megatron's .bin + .idx, and nanoGPT's or llm.c's .bin.

They are mapped, never unpickled, and every size in a header is checked against the file before anything is read by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sft_dist.data.records import Drop
from sft_dist.errors import DataError

MAX_TOKENS = 1 << 20  # a nanoGPT text without an end is read in pieces of this many tokens
_SEARCH_TOKENS = 1 << 10
_MAGIC = b"MMIDIDX\x00\x00"
_MEGATRON_HEADER_BYTES = 34  # magic 9, version 8, dtype 1, number of sequences 8, length of the document index 8
_MEGATRON_DTYPES = {1: "|u1", 2: "|i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_LLM_C_HEADER_BYTES = 1024
_LLM_C_MAGIC, _LLM_C_VERSION = 20240520, 1


@dataclass(frozen=True, slots=True)
class Megatron:
    """A pair of .bin and .idx: `documents[n]` is the first of the sequences of document n, a sequence is a run of ids.

    sizes: tokens of each sequence; pointers: its first byte in `data`.
    """

    path: Path
    dtype: np.dtype
    sizes: np.ndarray
    pointers: np.ndarray
    documents: np.ndarray
    data: np.ndarray

    @property
    def num_documents(self) -> int:
        """Documents of the file; their boundaries are one more."""
        return max(0, len(self.documents) - 1)

    def ids(self, document: int) -> np.ndarray:
        """The ids of one document, in the file's own type. Raises DataError when its place is outside the file."""
        first, stop = (int(place) for place in self.documents[document : document + 2])
        if not 0 <= first <= stop <= len(self.sizes):
            raise _damaged(self.path, f"document {document + 1} is said to be sequences {first} to {stop}")
        return np.concatenate([self._sequence(number) for number in range(first, stop)] or [np.empty(0, self.dtype)])

    def _sequence(self, number: int) -> np.ndarray:
        begin, size = int(self.pointers[number]), int(self.sizes[number])
        end = begin + size * self.dtype.itemsize
        if begin < 0 or size < 0 or end > len(self.data):
            raise _damaged(self.path, f"sequence {number + 1} is said to be bytes {begin} to {end}")
        return self.data[begin:end].view(self.dtype)


def _damaged(path: Path, what: str) -> DataError:
    return DataError(
        f"{path}: {what}, and {path.name} has {path.stat().st_size:,} bytes; the .bin and its .idx do not belong together "
        "or are cut short: copy both again"
    )


def megatron(path: Path) -> Megatron:
    """Open a Megatron pair by its .bin. Raises DataError when the .idx is missing, not one, or does not fit the sizes."""
    index = path.with_suffix(".idx")
    if not index.is_file():
        raise DataError(f"{path}: format megatron needs {index.name} beside it; copy it there, or name another format")
    raw = _mapped(index)
    if len(raw) < _MEGATRON_HEADER_BYTES or raw[:9].tobytes() != _MAGIC:
        raise DataError(f"{index}: not a Megatron index (it must begin with MMIDIDX); name another format")
    version, count, boundaries = (int.from_bytes(raw[at : at + 8].tobytes(), "little") for at in (9, 18, 26))
    code = int(raw[17])
    if version != 1 or code not in _MEGATRON_DTYPES:
        known = ", ".join(map(str, _MEGATRON_DTYPES))
        raise DataError(
            f"{index}: version {version} with dtype code {code}; version 1 with integers (codes {known}) is read: "
            "convert it with Megatron's own tools"
        )
    needed = _MEGATRON_HEADER_BYTES + 12 * count + 8 * boundaries
    if len(raw) not in (needed, needed + count):  # a byte a sequence more: the modes of multimodal sets
        raise DataError(
            f"{index}: {count:,} sequences and {boundaries:,} document boundaries need {needed:,} bytes, "
            f"the file has {len(raw):,}; copy it again"
        )
    pointers_at, documents_at = _MEGATRON_HEADER_BYTES + 4 * count, _MEGATRON_HEADER_BYTES + 12 * count
    opened = Megatron(
        path,
        np.dtype(_MEGATRON_DTYPES[code]),
        raw[_MEGATRON_HEADER_BYTES:pointers_at].view("<i4"),
        raw[pointers_at:documents_at].view("<i8"),
        raw[documents_at:needed].view("<i8"),
        _mapped(path),
    )
    if count:
        opened._sequence(count - 1)  # a .bin that is cut short is found before any work is done
    return opened


def megatron_documents(path: Path, begin: int, end: int) -> Iterator[tuple[str, np.ndarray | Drop]]:
    """(path:#n, ids uint32 [tokens]) of the documents begin to end; one that is no list of ids is a Drop."""
    opened = megatron(path)
    for number in range(begin, end):
        where = f"{path}:#{number + 1}"
        yield where, _checked(opened.ids(number), where)


def nanogpt(path: Path) -> np.ndarray:
    """The ids of a flat uint16 file, with or without llm.c's header of 256 int32: uint16 [tokens], mapped.

    Raises DataError when its size is not what the header says, or is odd.
    """
    raw = _mapped(path)
    if len(raw) >= 12 and int.from_bytes(raw[:4].tobytes(), "little") == _LLM_C_MAGIC:
        version, count = (int.from_bytes(raw[at : at + 4].tobytes(), "little") for at in (4, 8))
        if version != _LLM_C_VERSION or len(raw) != _LLM_C_HEADER_BYTES + 2 * count:
            raise DataError(
                f"{path}: the header says version {version} and {count:,} tokens; version {_LLM_C_VERSION} and a file of "
                f"{_LLM_C_HEADER_BYTES + 2 * count:,} bytes go with that, this has {len(raw):,}: copy it again"
            )
        raw = raw[_LLM_C_HEADER_BYTES:]
    if len(raw) % 2:
        raise DataError(f"{path}: {len(raw):,} bytes are no list of uint16; copy it again, or name another format")
    return raw.view("<u2")


def nanogpt_texts(path: Path, begin: int, end: int, eos_id: int | None) -> Iterator[tuple[str, np.ndarray | Drop]]:
    """(path:#n, ids uint32 [tokens]) of the texts whose first token n (1-based) is one of begin+1 … end.

    A text ends with `eos_id`, included; one longer than MAX_TOKENS comes in pieces of that.
    """
    tokens = nanogpt(path)
    start = _first_start(tokens, begin, end, eos_id)
    while start < end:
        is_end = False
        while start < len(tokens) and not is_end:
            size, is_end = _piece(tokens, start, eos_id)
            yield f"{path}:#{start + 1}", tokens[start : start + size].astype(np.uint32)
            start += size


def _piece(tokens: np.ndarray, start: int, eos_id: int | None) -> tuple[int, bool]:
    """(size, whether it ends with `eos_id`) of what comes next, searched in widening steps: most texts are short.

    >>> _piece(np.array([5, 0, 7, 0]), start=0, eos_id=0)
    (2, True)
    """
    limit = min(start + MAX_TOKENS, len(tokens))
    at, width = start, _SEARCH_TOKENS
    while at < limit and eos_id is not None:
        ends = np.flatnonzero(tokens[at : min(at + width, limit)] == eos_id)
        if len(ends):
            return at + int(ends[0]) + 1 - start, True
        at, width = at + width, 4 * width
    return limit - start, False


def _first_start(tokens: np.ndarray, begin: int, end: int, eos_id: int | None) -> int:
    """Where the first text starts that starts in begin … end; `end` when none does."""
    if begin == 0:
        return 0
    if eos_id is None:
        return end
    for at in range(begin - 1, end - 1, MAX_TOKENS):
        ends = np.flatnonzero(tokens[at : min(at + MAX_TOKENS, end - 1)] == eos_id)
        if len(ends):
            return at + int(ends[0]) + 1
    return end


def _checked(ids: np.ndarray, where: str) -> np.ndarray | Drop:
    if not len(ids):
        return Drop("no_tokens", where, "the document is empty")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high > 0xFFFFFFFF:
        return Drop("invalid_token", where, f"ids from {low} to {high} do not fit 0 … {0xFFFFFFFF}")
    return ids.astype(np.uint32)


def _mapped(path: Path) -> np.ndarray:
    """The bytes of a file, mapped; an empty file cannot be."""
    return np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
