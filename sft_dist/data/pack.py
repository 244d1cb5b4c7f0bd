"""Which documents share a row: best-fit decreasing, so that almost nothing is padding and nothing is cut.

Each document goes to the fullest row that still has room for it, longest documents first (Ding et al. 2024, "Fewer
Truncations Improve Language Modeling"). A function of the lengths alone: the same rows on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sft_dist.errors import DataError


def pack(lengths: Sequence[int] | np.ndarray, seq_len: int) -> list[list[int]]:
    """Rows of document indices; each document is in exactly one row, and no row holds more than `seq_len` tokens.

    Raises DataError for a document of no tokens or of more than `seq_len`.

    >>> pack([5, 3, 8, 2, 1], seq_len=8)
    [[2], [0, 1], [3, 4]]
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    wrong = np.flatnonzero((lengths < 1) | (lengths > seq_len))
    if len(wrong):
        raise DataError(
            f"document {wrong[0]}: {lengths[wrong[0]]} tokens do not fit a row of {seq_len}; split or drop it, or raise "
            "prepare.seq_len"
        )
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(seq_len + 1)]  # rows by the room they have left
    rooms = 0  # bit r is set when some row has room r: the next set bit is the best fit, found in one machine-wide step
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = seq_len, len(rows)
            rows.append([])
        rows[row].append(document)
        left = room - length
        if left:
            with_room[left].append(row)
            rooms |= 1 << left
    return rows
