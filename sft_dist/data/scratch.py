"""What a preparation leaves on disk between its two halves: one folder a slice of the sources, complete or absent.

A slice is read, mended, tokenised by one worker with no knowledge of the others; the merge, which knows them all, decides
what is a repeat and which documents share a row. So a killed preparation does only what is missing, and a task of a job
array does its part.

    records            one RECORD a kept record
    documents          one DOCUMENT a document, in the order of the records
    documents.bin      of each document its ids, then its target flags as bits
    conversations.jsonl   the records as text, where something later needs them (`text_at` points into it)
    rejects.jsonl      the drops
    about.json         counts, label names, where lines come from
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sft_dist.data.records import Conversation, Document, Drop, Turn, parted
from sft_dist.files import publish

_FLUSH_RECORDS = 65_536
NO_TEXT = np.uint64((1 << 64) - 1)
TRAIN, VALIDATION = 0, 1
RECORD = np.dtype(
    [
        ("line", "<u8"),  # of the source; with the slice's prefix it makes `where`
        ("content", "<u8", (2,)),  # digest of everything said
        ("prompt", "<u8", (2,)),
        ("opening", "<u8", (2,)),  # what is asked first
        ("text_at", "<u8"),
        ("documents", "<u4"),
        ("targets", "<u4"),  # tokens
        ("label", "<i4"),  # place in the slice's list of labels, -1: none
        ("split", "u1"),
    ]
)
DOCUMENT = np.dtype([("at", "<u8"), ("tokens", "<u4")])


def as_json(conversation: Conversation) -> str:
    """One line of JSON; `from_json` reads it back."""
    turns = []
    for turn in conversation.turns:
        values = {"role": turn.role, "content": turn.content, "is_target": turn.is_target}
        turns.append(values | ({"extra": turn.extra} if turn.extra else {}))
    values = {"turns": turns, "where": conversation.where, "label": conversation.label}
    return json.dumps(values | ({"tools": conversation.tools} if conversation.tools else {}), ensure_ascii=False)


def from_json(line: str | bytes) -> Conversation:
    """The conversation of a line that `as_json` made.

    >>> hi = Conversation((Turn("text", "hi", True),), "a:1")
    >>> from_json(as_json(hi)) == hi
    True
    """
    values = json.loads(line)
    turns = tuple(Turn(**turn) for turn in values["turns"])
    return Conversation(turns, values["where"], values["label"], values.get("tools"))


class SliceWriter:
    """Writes the folder of one slice; nothing is there until `publish`.

    >>> writer = SliceWriter(Path("slices/00003"), np.uint16)  # doctest: +SKIP
    """

    def __init__(self, folder: Path, dtype: Any) -> None:
        self.folder, self.dtype = folder, dtype
        self.staged = folder.with_name(f".{folder.name}.{os.getpid()}")
        shutil.rmtree(self.staged, ignore_errors=True)
        self.staged.mkdir(parents=True)
        self._blob = (self.staged / "documents.bin").open("wb")
        self._texts = (self.staged / "conversations.jsonl").open("wb")
        # half a character in a reject is spelled out: what is told must not fail
        self._rejects = (self.staged / "rejects.jsonl").open("w", encoding="utf-8", errors="backslashreplace")
        self._tables = [(self.staged / name).open("wb") for name in ("records", "documents")]
        self._records: list[tuple] = []
        self._digests: list[bytes] = []
        self._documents: list[tuple[int, int]] = []
        self._labels: dict[str, int] = {}
        self._prefix, self._at, self._text_at = "", 0, 0
        self.num_tokens = 0  # of the documents so far
        self.counts: Counter[str] = Counter()
        self.drops: Counter[str] = Counter()

    def keep(
        self,
        documents: Sequence[Document],
        digests: tuple[bytes, bytes, bytes],
        *,
        split: int,
        where: str,
        label: str | None = None,
        text: str | None = None,
    ) -> None:
        """A record that became documents; `digests` of (content, prompt, opening), 16 bytes each; `text`: its JSON, to be kept."""
        prefix, line = parted(where)
        assert self._prefix in ("", prefix), (self._prefix, prefix)  # a slice is of one file
        self._prefix, targets = prefix, 0
        for document in documents:
            blob = document.ids.astype(self.dtype).tobytes() + np.packbits(document.targets).tobytes()
            self._documents.append((self._at, len(document.ids)))
            self._blob.write(blob)
            self._at += len(blob)
            targets += document.num_targets
            self.num_tokens += len(document.ids)
        text_at = int(NO_TEXT)
        if text is not None:
            text_at, line_bytes = self._text_at, text.encode() + b"\n"
            self._texts.write(line_bytes)
            self._text_at += len(line_bytes)
        place = -1 if label is None else self._labels.setdefault(label, len(self._labels))
        self._digests.append(b"".join(digests))
        self._records.append((line, text_at, len(documents), targets, place, split))
        if len(self._records) >= _FLUSH_RECORDS:
            self._flush()

    def drop(self, drop: Drop) -> None:
        """A record that is left out."""
        self.drops[drop.reason] += 1
        self._rejects.write(json.dumps(asdict(drop), ensure_ascii=False) + "\n")

    def publish(self, **about: Any) -> None:
        """Flush everything and give the folder its name."""
        self._flush()
        for file in (self._blob, self._texts, self._rejects, *self._tables):
            file.close()
        values = {"counts": self.counts, "drops": self.drops, "labels": list(self._labels), "prefix": self._prefix}
        (self.staged / "about.json").write_text(json.dumps(values | about))
        publish(self.staged, self.folder)

    def _flush(self) -> None:
        """What was kept so far, to the tables on disk: the memory of a slice does not grow with it."""
        self._table().tofile(self._tables[0])
        np.array(self._documents, DOCUMENT).tofile(self._tables[1])
        self._records, self._digests, self._documents = [], [], []

    def _table(self) -> np.ndarray:
        table = np.empty(len(self._records), RECORD)
        digests = np.frombuffer(b"".join(self._digests), "<u8").reshape(-1, 3, 2)
        table["content"], table["prompt"], table["opening"] = digests[:, 0], digests[:, 1], digests[:, 2]
        columns = zip(*self._records, strict=True) if self._records else [[]] * 6
        for name, column in zip(("line", "text_at", "documents", "targets", "label", "split"), columns, strict=True):
            table[name] = column
        return table


@dataclass(frozen=True)
class SliceFolder:
    """A finished slice, read from disk as it is asked for."""

    folder: Path
    dtype: Any

    @cached_property
    def about(self) -> dict[str, Any]:
        """Counts, drops, label names, prefix of `where`."""
        return json.loads((self.folder / "about.json").read_text())

    @property
    def records(self) -> np.ndarray:
        """RECORD [records]."""
        return np.fromfile(self.folder / "records", RECORD)

    @property
    def documents(self) -> np.ndarray:
        """DOCUMENT [documents]."""
        return np.fromfile(self.folder / "documents", DOCUMENT)

    def where(self, line: int) -> str:
        """`file:line` of a record."""
        return f"{self.about['prefix']}{line}"

    def texts(self, places: np.ndarray) -> Iterator[bytes]:
        """The JSON lines at these places, ascending."""
        with (self.folder / "conversations.jsonl").open("rb") as file:
            for place in places.tolist():
                file.seek(place)
                yield file.readline()


class Slices:
    """All the slices of a preparation in order: records are numbered through from 0."""

    def __init__(self, folders: Sequence[Path], dtype: Any) -> None:
        self.dtype = np.dtype(dtype)
        self.parts = [SliceFolder(folder, self.dtype) for folder in folders]
        sizes = [(folder / "records").stat().st_size // RECORD.itemsize for folder in folders]
        self.bases = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._tables: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self.bases[-1])

    def each(self) -> Iterator[tuple[SliceFolder, int, np.ndarray]]:
        """(slice, number of its first record, its records) of every slice."""
        return ((part, int(base), part.records) for part, base in zip(self.parts, self.bases[:-1], strict=True))

    def record(self, number: int) -> np.void:
        """One record by its number."""
        place = self._part(number)
        if place not in self._tables:
            self._tables[place] = np.memmap(self.parts[place].folder / "records", RECORD, "r")
        return self._tables[place][number - self.bases[place]]

    def where(self, number: int) -> str:
        """`file:line` of a record."""
        return self.parts[self._part(number)].where(int(self.record(number)["line"]))

    def _part(self, number: int) -> int:
        return int(np.searchsorted(self.bases, number, side="right")) - 1

    def conversations(self, chosen: np.ndarray) -> Iterator[tuple[int, bytes]]:
        """(number, JSON) of each record for which the bool [records] `chosen` holds and whose text was kept."""
        for part, base, records in self.each():
            mine = np.flatnonzero(chosen[base : base + len(records)] & (records["text_at"] != NO_TEXT))
            lines = part.texts(records["text_at"][mine])
            yield from zip((base + mine).tolist(), lines, strict=True)


class DocumentReader:
    """Documents by (slice, place of the document in it), read with one `pread` each.

    Memory maps would do too, but the pages they touch count as this process's memory.
    """

    def __init__(self, slices: Slices) -> None:
        self._slices = slices
        self._files: dict[int, int] = {}

    def read(self, part: int, at: int, tokens: int, line: int, start: int, count: int) -> Document:
        """`count` tokens from `start` on of a document of the record `line`; the first token of a piece is context."""
        if part not in self._files:
            if len(self._files) >= 64:  # documents of a row window come from few slices
                os.close(self._files.pop(next(iter(self._files))))
            self._files[part] = os.open(self._slices.parts[part].folder / "documents.bin", os.O_RDONLY)
        file, size, where = self._files[part], self._slices.dtype.itemsize, self._slices.parts[part].where(line)
        if count == tokens:
            blob = os.pread(file, tokens * size + -(-tokens // 8), at)
            ids, bits, skip = np.frombuffer(blob, self._slices.dtype, tokens), blob[tokens * size :], 0
        else:  # no more than the piece: the document may be a whole book
            ids = np.frombuffer(os.pread(file, count * size, at + start * size), self._slices.dtype)
            first, last = start // 8, -(-(start + count) // 8)
            bits, skip = os.pread(file, last - first, at + tokens * size + first), start % 8
        targets = np.unpackbits(np.frombuffer(bits, np.uint8), count=skip + count).view(bool)[skip:]
        if count < tokens:
            targets[0] = False
        return Document(ids, targets, where)

    def close(self) -> None:
        """Close what was opened."""
        for file in self._files.values():
            os.close(file)
        self._files.clear()
