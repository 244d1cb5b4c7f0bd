"""What a run really fed: a keyed multiset hash of the rows, as the model got them.

Each row is hashed by two multilinear functions of its tokens, targets and positions, whose keys are drawn from the seed; the
hashes of all rows are added up modulo 2**64 (Clarke et al. 2003, "Incremental Multiset Hash Functions and Their Application
to Memory Integrity Checking", MSet-Add-Hash). So the order and the rank that fed a row do not matter, and a row that was fed
twice, or not at all, or otherwise than it is stored, does: by chance a sum agrees once in 2**128.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

_M1, _M2 = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)  # splitmix64's, as signed numbers


def keys(seed: int, seq_len: int) -> np.ndarray:
    """The keys of a run: int64 [2 functions, tokens and places, seq_len].

    >>> keys(0, seq_len=4).shape
    (2, 2, 4)
    """
    drawn = np.random.SeedSequence([seed, 0x1ED6E4]).generate_state(4 * seq_len, np.uint64)
    return drawn.view(np.int64).reshape(2, 2, seq_len)


def row_hashes(tokens: Any, targets: Any, positions: Any, of_function: Any) -> Any:
    """The hash of each row by one function: int64 [rows], of arrays or tensors [rows, seq_len] alike.

    `tokens`, `positions`: int64; `targets`: bool; `of_function`: int64 [2, seq_len] of `keys`. Only operators are used, and
    they wrap around, so that NumPy and a GPU give the same numbers.

    >>> row = np.array([[5, 6]]), np.array([[False, True]]), np.array([[0, 1]])
    >>> row_hashes(*row, np.array([[1, 2], [3, 4]])).tolist()
    [5727095992301866834]
    """
    places = positions * 2 + targets
    mixed = (tokens * of_function[0] + places * of_function[1]).sum(-1)
    mixed = (mixed ^ ((mixed >> 30) & 0x3FFFFFFFF)) * _M1  # `&` makes the shift of a signed number a logical one
    mixed = (mixed ^ ((mixed >> 27) & 0x1FFFFFFFFF)) * _M2
    return mixed ^ ((mixed >> 31) & 0x1FFFFFFFF)


@dataclass(frozen=True, slots=True)
class Ledger:
    """How many rows were fed, and the two sums of their hashes modulo 2**64.

    >>> (Ledger() + Ledger(2, -1, 5) + Ledger(1, 3, 4)).text
    '3 rows 00000000000000020000000000000009'
    """

    rows: int = 0
    first: int = 0
    second: int = 0

    def __add__(self, other: Ledger) -> Ledger:
        sums = (_signed(self.first + other.first), _signed(self.second + other.second))
        return Ledger(self.rows + other.rows, *sums)

    @property
    def text(self) -> str:
        """For a person: the number of rows and 32 hexadecimal digits."""
        return f"{self.rows:,} rows {self.first % (1 << 64):016x}{self.second % (1 << 64):016x}"


def _signed(number: int) -> int:
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def recomputed(batches: Iterable[tuple[Any, np.ndarray]], of_run: np.ndarray) -> Ledger:
    """The ledger that rows give when each is fed as often as counted.

    `batches`: pairs of rows with `tokens`, `targets`, `positions` (NumPy, [rows, seq_len]) and counts, int64 [rows].
    """
    total = Ledger()
    for rows, counts in batches:
        sums = [
            int((row_hashes(rows.tokens, rows.targets, rows.positions, of_function) * counts).sum())
            for of_function in of_run
        ]
        total += Ledger(int(counts.sum()), *sums)
    return total
