"""Several prepared sets as one stream: which set an ordinal belongs to, and which row of it, is a pure function.

The stream is cut into blocks of 4,096 ordinals. Up to the end of block b, a set has been drawn floor(4096 * b * share)
times, and the set with the largest share takes the rest; within a block the draws are mixed by a keyed permutation. The k-th
draw of a set is the k-th row of the set's own stream, so that each of its epochs holds each of its rows once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np

from sft_dist.data.order import Blocks, row_numbers
from sft_dist.data.shards import Manifest, Shards, StoredRows
from sft_dist.errors import DataError

BLOCK = 4096  # ordinals; 2**12
_SCALE = 32  # bits of a share
_SAME = ("seq_len", "tokenizer", "vocab_size", "eos_id", "pad_id")


class Joined:
    """Sets of shards one after another: row r of set i is row `starts[i] + r` of the whole.

    Raises DataError when the sets were not prepared alike.

    >>> Joined([first, second]).num_rows == first.num_rows + second.num_rows  # doctest: +SKIP
    True
    """

    def __init__(self, sets: Sequence[Shards]) -> None:
        self.sets = tuple(sets)
        _check_alike(self.sets)
        self.starts = np.cumsum([0, *(one.num_rows for one in self.sets)])
        self.num_rows, self.seq_len = int(self.starts[-1]), self.sets[0].seq_len
        self.manifest = _whole(self.sets)

    def set_of(self, rows: np.ndarray) -> np.ndarray:
        """The number of the set that each row is from: int64 [n] to int64 [n]."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def stored(self, rows: np.ndarray) -> StoredRows:
        """The rows of these numbers, int64 [n], in their order, as they lie in the files."""
        parts = [(chosen, one.stored(rows[chosen] - start)) for chosen, one, start in self._parts(rows)]
        if len(parts) == 1:
            return parts[0][1]
        order = np.concatenate([chosen for chosen, _ in parts])
        together = StoredRows(np.concatenate([part.records for _, part in parts]))
        # ascending numbers, the fast case, need no second copy
        return together if (order[1:] > order[:-1]).all() else together.take(np.argsort(order))

    def origins(self, rows: Iterable[int]) -> dict[int, list[str]]:
        """`file:record` of each document of these rows; nothing where it is not known. Raises as `Shards.origins` does."""
        made: dict[int, list[str]] = {}
        for chosen, one, start in self._parts(numbers := np.array(list(rows), np.int64)):
            found = one.origins((numbers[chosen] - start).tolist())
            made |= {row + int(start): records for row, records in found.items()}
        return made

    def counts(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(tokens without padding, target tokens) of each of these rows, int64 [n]."""
        counts = np.empty((2, len(rows)), np.int64)
        for chosen, one, start in self._parts(rows):
            counts[:, chosen] = one.counts(rows[chosen] - start)
        return counts[0], counts[1]

    def _parts(self, rows: np.ndarray) -> list[tuple[np.ndarray, Shards, int]]:
        of_rows = self.set_of(rows)
        numbers = np.unique(of_rows) if len(rows) else [0]
        return [(np.flatnonzero(of_rows == n), self.sets[n], int(self.starts[n])) for n in numbers]


@dataclass(frozen=True, slots=True)
class Mixture:
    """How much of each set the stream holds. `weights` are shares of the tokens, in any unit.

    >>> mixture = Mixture(joined, names=("chat", "code"), weights=(3.0, 1.0), seed=0)  # doctest: +SKIP
    >>> joined.set_of(mixture.rows(np.arange(8))).tolist()  # doctest: +SKIP
    [0, 0, 1, 0, 0, 0, 0, 1]
    """

    joined: Joined
    names: tuple[str, ...]
    weights: tuple[float, ...]
    seed: int
    blocks: Blocks | None = None
    shares: tuple[int, ...] = field(init=False)  # of the rows, in units of 2**-32

    def __post_init__(self) -> None:
        manifests = [one.manifest for one in self.joined.sets]
        parts = [Fraction(w) * m.rows / m.tokens for w, m in zip(self.weights, manifests, strict=True)]
        object.__setattr__(self, "shares", tuple(int(part / sum(parts) * (1 << _SCALE)) for part in parts))

    def rows(self, ordinals: np.ndarray) -> np.ndarray:
        """Row number, in the joined sets, of each ordinal of the stream: int64 [n], not negative, to int64 [n]."""
        sets, draws = self.draws(ordinals)
        rows = np.empty_like(draws)
        for number, one in enumerate(self.joined.sets):
            chosen = np.flatnonzero(sets == number)
            if chosen.size:
                seed = self.seed if number == 0 else _seed(self.seed, number)  # a mixture of one is no mixture
                rows[chosen] = row_numbers(draws[chosen], one.num_rows, seed, blocks=self.blocks)
        return rows + self.joined.starts[sets]

    def draws(self, ordinals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(set, how many draws of that set came before): int64 [n] each, for ordinals int64 [n]."""
        ordinals = np.asarray(ordinals, dtype=np.int64)
        if len(self.shares) == 1:
            return np.zeros_like(ordinals), ordinals
        blocks = ordinals // BLOCK
        before, after = self._drawn(blocks), self._drawn(blocks + 1)
        ends = np.cumsum(after - before, axis=1)
        slots = row_numbers(ordinals, BLOCK, _seed(self.seed, 0))  # an epoch of this permutation is a block
        sets = (slots[:, None] >= ends).sum(axis=1)
        every = np.arange(len(ordinals))
        begins = ends - (after - before)
        return sets, before[every, sets] + slots - begins[every, sets]

    def _drawn(self, blocks: np.ndarray) -> np.ndarray:
        """Draws of each set before each block: int64 [n] to int64 [n, sets]; exact up to 2**43 ordinals."""
        drawn = blocks[:, None] * np.array(self.shares, np.int64) >> (_SCALE - 12)
        largest = int(np.argmax(self.shares))
        drawn[:, largest] = 0
        drawn[:, largest] = blocks * BLOCK - drawn.sum(axis=1)
        return drawn

    def epochs(self, rows_consumed: int) -> dict[str, float]:
        """How often each set has been gone through when so many rows of the stream have been fed, by name."""
        block, rest = divmod(rows_consumed, BLOCK)
        sets, _ = self.draws(np.arange(block * BLOCK, block * BLOCK + rest))
        drawn = np.bincount(sets, minlength=len(self.names))
        drawn = drawn + (self._drawn(np.array([block]))[0] if len(self.shares) > 1 else block * BLOCK)
        sizes = [one.num_rows for one in self.joined.sets]
        return {name: int(n) / size for name, n, size in zip(self.names, drawn, sizes, strict=True)}

    @property
    def documents_per_row(self) -> float:
        """Samples of a row of the stream, on average."""
        each = [
            share * one.manifest.documents_per_row for share, one in zip(self.shares, self.joined.sets, strict=True)
        ]
        return sum(each) / sum(self.shares)

    def identity(self) -> list[list[Any]]:
        """What must stay the same for the stream to be the same: each set's data and weight."""
        return [[one.manifest.data, weight] for one, weight in zip(self.joined.sets, self.weights, strict=True)]


def _seed(seed: int, stream: int) -> int:
    return int(np.random.SeedSequence([seed, stream, 0x6D6978]).generate_state(1, np.uint64)[0])


def _whole(sets: Sequence[Shards]) -> Manifest:
    """A manifest of the sets together: sums, and one fingerprint of all their data."""
    manifests = [one.manifest for one in sets]
    if len(manifests) == 1:
        return manifests[0]
    data = hashlib.blake2b("".join(m.data for m in manifests).encode(), digest_size=16).hexdigest()
    sums = {name: sum(getattr(m, name) for m in manifests) for name in ("rows", "documents", "tokens", "targets")}
    return replace(manifests[0], data=data, files={}, **sums)


def _check_alike(sets: Sequence[Shards]) -> None:
    first = sets[0]
    for other in sets[1:]:
        mine, theirs = first.manifest, other.manifest
        different = [name for name in _SAME if getattr(mine, name) != getattr(theirs, name)]
        if different:
            told = "; ".join(f"{name} {getattr(theirs, name)!r}, not {getattr(mine, name)!r}" for name in different)
            raise DataError(
                f"mixture: {other.folder} was not prepared like {first.folder}: {told}. Prepare both with the same "
                "prepare.seq_len and prepare.tokenizer, or leave one out"
            )
