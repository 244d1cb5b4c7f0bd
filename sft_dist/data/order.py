"""Which row is the n-th of an epoch: a keyed permutation computed per index, so that memory is O(1) at any size.

A balanced Feistel network over the smallest even number of bits that holds the rows, with cycle walking for what falls
outside (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains"). The same for every world size and machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_ROUNDS = 12  # enough that tiny sets (4 to 64 rows) show no bias in a chi-square test; cheap at any size
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's step from one stream to the next


@dataclass(frozen=True, slots=True)
class Blocks:
    """An order for file systems that are slow at small random reads: whole blocks, then rows within a window of blocks."""

    block_rows: int
    window_blocks: int


def _mix(value: np.ndarray, scratch: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64, in place: every output bit depends on every input bit."""
    for shift, factor in ((30, _M1), (27, _M2), (31, None)):
        np.right_shift(value, np.uint64(shift), out=scratch)
        value ^= scratch
        if factor is not None:
            value *= factor
    return value


def _permute(values: np.ndarray, half_bits: int, keys: np.ndarray) -> np.ndarray:
    """One pass of the Feistel network over the domain [0, 4**half_bits); `keys`: [rounds] or [rounds, n]."""
    half, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> half, values & mask
    mixed, scratch = np.empty_like(left), np.empty_like(left)
    for key in keys:
        np.add(right, key, out=mixed)
        _mix(mixed, scratch)
        mixed &= mask
        mixed ^= left
        left, right, mixed = right, mixed, left
    return (left << half) | right


def _shuffled(places: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """A permutation of [0, size), at these places: uint64 [n] to uint64 [n]."""
    half_bits = (max(1, (size - 1).bit_length()) + 1) // 2
    moved = _permute(places, half_bits, keys)
    while (outside := np.flatnonzero(moved >= np.uint64(size))).size:  # at most a factor of 4 outside: a few walks
        moved[outside] = _permute(moved[outside], half_bits, keys if keys.ndim == 1 else keys[:, outside])
    return moved


def row_numbers(
    ordinals: np.ndarray, num_rows: int, seed: int, *, shuffle: bool = True, blocks: Blocks | None = None
) -> np.ndarray:
    """Row number of each ordinal of the stream: ordinal g is the (g mod num_rows)-th row of epoch g div num_rows.

    `ordinals`: int64 [n], not negative. Returns int64 [n]. Each epoch is another permutation of all the rows; with
    `blocks`, `window_blocks * block_rows` consecutive ordinals read from `window_blocks` blocks of consecutive rows.

    >>> row_numbers(np.arange(6), num_rows=3, seed=0, shuffle=False).tolist()
    [0, 1, 2, 0, 1, 2]
    >>> sorted(row_numbers(np.arange(5), num_rows=5, seed=7).tolist())
    [0, 1, 2, 3, 4]
    >>> sorted(row_numbers(np.arange(4), num_rows=100, seed=7, blocks=Blocks(block_rows=2, window_blocks=2)).tolist())
    [72, 73, 80, 81]
    """
    ordinals = np.asarray(ordinals, dtype=np.int64)
    epochs, places = np.divmod(ordinals, num_rows)
    if not shuffle or num_rows == 1:
        return places
    rows = np.empty_like(places)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        keys = np.random.SeedSequence([seed, int(epoch)]).generate_state(2 * _ROUNDS, np.uint64)
        rows[chosen] = _of_epoch(places[chosen].astype(np.uint64), num_rows, keys, blocks).astype(np.int64)
    return rows


def _of_epoch(places: np.ndarray, num_rows: int, keys: np.ndarray, blocks: Blocks | None) -> np.ndarray:
    if blocks is None:
        return _shuffled(places, num_rows, keys[:_ROUNDS])
    rows = _by_blocks(places, num_rows, keys, blocks)
    while (outside := np.flatnonzero(rows >= np.uint64(num_rows))).size:  # the part of the last block that is not there
        rows[outside] = _by_blocks(rows[outside], num_rows, keys, blocks)
    return rows


def _by_blocks(places: np.ndarray, num_rows: int, keys: np.ndarray, blocks: Blocks) -> np.ndarray:
    """A permutation of the rows of all blocks, the last one filled up: blocks change places, then rows in their window."""
    num_blocks = -(-num_rows // blocks.block_rows)
    block_rows, window_rows = np.uint64(blocks.block_rows), np.uint64(blocks.block_rows * blocks.window_blocks)
    windows, inside = np.divmod(places, window_rows)
    last = num_blocks // blocks.window_blocks  # the window that is not full, if any
    of_windows = _mix(keys[_ROUNDS:, None] + windows * _GOLDEN, np.empty((_ROUNDS, len(places)), np.uint64))
    for chosen, size in (
        (np.flatnonzero(windows < np.uint64(last)), int(window_rows)),
        (np.flatnonzero(windows == np.uint64(last)), num_blocks % blocks.window_blocks * blocks.block_rows),
    ):
        if chosen.size:
            inside[chosen] = _shuffled(inside[chosen], size, of_windows[:, chosen])
    slots = windows * np.uint64(blocks.window_blocks) + inside // block_rows
    return _shuffled(slots, num_blocks, keys[:_ROUNDS]) * block_rows + inside % block_rows
