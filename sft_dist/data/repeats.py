"""Which records say what another one says: exactly, nearly, or with an evaluation text inside.

Exact repeats are found on disk, in memory that does not grow with the corpus. Near repeats keep a MinHash signature of each
record in memory: 2 KB at a threshold of 0.8, 5 KB at 0.5, and about 0.05 ms of one core for each 100 words.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

_KEY = np.dtype([("high", "<u8"), ("low", "<u8"), ("number", "<u8")])
SHINGLE_WORDS = 3
_PERMUTATIONS = 128


def groups(
    blocks: Iterable[tuple[np.ndarray, np.ndarray]], total: int, scratch: Path, *, bucket_bytes: int = 32 << 20
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(numbers, firsts) of records whose keys are equal to another one's, a bucket at a time.

    `blocks`: (keys uint64 [n, 2], numbers [n]) in ascending order of number; `total`: an upper bound of their sum.
    `numbers`: every record of a group, ascending within the group; `firsts`: the first number of its group.

    >>> import tempfile
    >>> keys = np.array([[1, 1], [2, 2], [1, 1]], np.uint64)
    >>> [(n.tolist(), f.tolist()) for n, f in groups([(keys, np.arange(3))], 3, Path(tempfile.mkdtemp()))]
    [([0, 2], [0, 0])]
    """
    bits = min(9, (total * _KEY.itemsize // bucket_bytes).bit_length())  # a process may have 1,024 files open
    paths = [scratch / f"keys.{number}" for number in range(1 << bits)]
    files = [path.open("wb") for path in paths]
    for keys, numbers in blocks:
        entries = np.empty(len(numbers), _KEY)
        entries["high"], entries["low"], entries["number"] = keys[:, 0], keys[:, 1], numbers
        bucket = entries["high"] >> np.uint64(64 - bits) if bits else np.zeros(len(entries), np.uint64)
        for number in np.unique(bucket).tolist():
            entries[bucket == number].tofile(files[number])
    for path, file in zip(paths, files, strict=True):
        file.close()
        entries = np.fromfile(path, _KEY)
        path.unlink()
        yield _equal(entries)


def _equal(entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    entries = entries[np.lexsort((entries["number"], entries["low"], entries["high"]))]
    same = (entries["high"][1:] == entries["high"][:-1]) & (entries["low"][1:] == entries["low"][:-1])
    begins = np.concatenate([[True], ~same])[: len(entries)]
    is_grouped = np.concatenate([same, [False]]) | ~begins if len(entries) else begins
    first = np.maximum.accumulate(np.where(begins, np.arange(len(entries)), 0)) if len(entries) else begins
    numbers = entries["number"].astype(np.int64)
    return numbers[is_grouped], numbers[first[is_grouped]]


def shingles(words: list[str]) -> list[str]:
    """Runs of three words; the whole of a shorter text.

    >>> shingles(["win", "a", "big", "prize"])
    ['win a big', 'a big prize']
    """
    last = max(1, len(words) - SHINGLE_WORDS + 1)
    return [" ".join(words[at : at + SHINGLE_WORDS]) for at in range(last)]


class NearIndex:
    """Texts by MinHash and locality-sensitive hashing: finds an earlier text that shares enough shingles.

    Broder 1997, "On the resemblance and containment of documents"; rensa does the hashing.

    >>> index = NearIndex(threshold=0.5)
    >>> index.add(7, "the cat sat on the mat today".split())
    >>> index.find("the cat sat on the mat".split()), index.find("nothing like it".split())
    (7, None)
    """

    def __init__(self, threshold: float, usual: frozenset[str] = frozenset()) -> None:
        import rensa

        self.threshold, self.usual = threshold, usual  # `usual`: shingles that say nothing, since many texts have them
        self._new = lambda: rensa.RMinHash(num_perm=_PERMUTATIONS, seed=0)
        self._lsh = rensa.RMinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS, num_bands=_bands(threshold))
        self._signatures: dict[int, Any] = {}

    def add(self, number: int, words: list[str]) -> None:
        """Remember a text under its number; one without words of its own says nothing."""
        signature = self._signature(words)
        if signature is not None:
            self._lsh.insert(number, signature)
            self._signatures[number] = signature

    def find(self, words: list[str]) -> int | None:
        """The smallest number of a remembered text at least as similar as the threshold; None when there is none."""
        signature = self._signature(words)
        if signature is None:
            return None
        near = (n for n in self._lsh.query(signature) if self._signatures[n].jaccard(signature) >= self.threshold)
        return min(near, default=None)

    def _signature(self, words: list[str]) -> Any:
        own = [text for text in shingles(words) if text not in self.usual] if words else []
        if not own:
            return None
        made = self._new()
        made.update(own)
        return made


def _bands(threshold: float) -> int:
    """The fewest bands that miss at most 6 % of the pairs which are just similar enough; a false candidate only costs time.

    >>> _bands(0.8), _bands(0.7), _bands(0.5)
    (16, 32, 64)
    """
    bands = 1
    while bands < _PERMUTATIONS and (1 - threshold ** (_PERMUTATIONS // bands)) ** bands > 0.06:
        bands *= 2
    return bands


class OverlapIndex:
    """Runs of so many words of evaluation texts (Brown et al. 2020, appendix C, used 13); shorter texts count as one run.

    >>> index = OverlapIndex(4)
    >>> index.add("eval.jsonl:1", "one two three four five".split())
    >>> index.find("zero one two three four".split()), index.find("one two three".split())
    ('eval.jsonl:1', None)
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self._runs: dict[int, dict[str, str]] = {}  # words in the run -> run -> where

    def add(self, where: str, words: list[str]) -> None:
        """Remember an evaluation text; one of fewer than 3 words says nothing."""
        length = min(self._length, len(words))
        if length < 3:
            return
        runs = self._runs.setdefault(length, {})
        for at in range(len(words) - length + 1):
            runs.setdefault(" ".join(words[at : at + length]), where)

    def find(self, words: list[str]) -> str | None:
        """Where the first evaluation text stands that shares a run with this one; None when none does."""
        for length, runs in sorted(self._runs.items(), reverse=True):
            for at in range(len(words) - length + 1):
                where = runs.get(" ".join(words[at : at + length]))
                if where is not None:
                    return where
        return None
