"""Which row is the n-th of an epoch: a keyed permutation computed per index, so that memory is O(1) at any size.

A balanced Feistel network over the smallest even number of bits that holds the rows, with cycle walking for what falls
outside (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains"). The same for every world size and machine.
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 12  # enough that tiny sets (4 to 64 rows) show no bias in a chi-square test; cheap at any size
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def _mix(value: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every output bit depends on every input bit."""
    value = (value ^ (value >> np.uint64(30))) * _M1
    value = (value ^ (value >> np.uint64(27))) * _M2
    return value ^ (value >> np.uint64(31))


def _permute(values: np.ndarray, half_bits: int, keys: np.ndarray) -> np.ndarray:
    """One pass of the Feistel network over the domain [0, 4**half_bits)."""
    half, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << half) | right


def row_numbers(ordinals: np.ndarray, num_rows: int, seed: int, *, shuffle: bool = True) -> np.ndarray:
    """Row number of each ordinal of the stream: ordinal g is the (g mod num_rows)-th row of epoch g div num_rows.

    `ordinals`: int64 [n], not negative. Returns int64 [n]. Each epoch is another permutation of all the rows.

    >>> row_numbers(np.arange(6), num_rows=3, seed=0, shuffle=False).tolist()
    [0, 1, 2, 0, 1, 2]
    >>> sorted(row_numbers(np.arange(5), num_rows=5, seed=7).tolist())
    [0, 1, 2, 3, 4]
    """
    ordinals = np.asarray(ordinals, dtype=np.int64)
    epochs, places = np.divmod(ordinals, num_rows)
    if not shuffle or num_rows == 1:
        return places
    rows = np.empty_like(places)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        rows[chosen] = _shuffled(places[chosen].astype(np.uint64), num_rows, seed, int(epoch))
    return rows


def _shuffled(places: np.ndarray, num_rows: int, seed: int, epoch: int) -> np.ndarray:
    half_bits = (max(1, (num_rows - 1).bit_length()) + 1) // 2
    stream = np.random.SeedSequence([seed, epoch]).generate_state(_ROUNDS, np.uint64)
    rows = _permute(places, half_bits, stream)
    while (outside := rows >= np.uint64(num_rows)).any():  # at most a factor of 4 outside: a few walks
        rows[outside] = _permute(rows[outside], half_bits, stream)
    return rows.astype(np.int64)
