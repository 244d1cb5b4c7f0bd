"""Which documents share a row, so that almost nothing is padding and nothing is cut.

Each row takes the longest document that is left, and of all the others the set that fills it best: a subset sum, over the
lengths that are left, in the bits of one integer (Pisinger 1999, "Linear Time Algorithms for Knapsack Problems with Bounded
Weights"; packing whole documents: Ding et al. 2024, "Fewer Truncations Improve Language Modeling"). What matters of a
document is its length, so the same set fills as many rows as its lengths allow: the work is a few sums a length, however
many documents there are. The corpus is packed window by window, which bounds the memory by the window. A function of the
lengths and the seed alone: the same rows on every machine.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sft_dist.errors import DataError

WINDOW_DOCUMENTS = 1 << 21  # most documents of a window: very short ones would otherwise take hundreds of bytes a row
READ_DOCUMENTS = 1 << 16  # lengths read at once while looking for the end of a window


@dataclass(frozen=True, slots=True)
class Packing:
    """The rows of one window: row r holds the pieces ends[r - 1]..ends[r], in this order.

    `documents`: number of each piece's document in the corpus; `starts`: the piece's first token within its document;
    `counts`: tokens of the piece; all int64 [pieces]. `ends`: int64 [rows], pieces up to the end of each row.
    """

    documents: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    ends: np.ndarray


def pack(
    lengths: Sequence[int] | np.ndarray,
    seq_len: int,
    *,
    how: Literal["best_fit", "concat", "none"] = "best_fit",
    seed: int = 0,
    window_tokens: int = 1 << 28,
) -> Iterator[Packing]:
    """Rows of at most `seq_len` tokens, a Packing for each window of about `window_tokens` consecutive tokens.

    `lengths`: tokens of each document, any integers [documents], read piecemeal (a `np.memmap` will do). `best_fit`
    cuts nothing and breaks ties among equal lengths by `seed`; `none` gives each document a row; `concat` cuts the
    stream of documents into full rows, and a piece after a cut repeats the token before it, as context: each token but
    a document's first is predicted once. Raises DataError for a document of no tokens or, unless `concat`, of more
    than `seq_len`, and for a row that cannot hold a token and its target.

    >>> [packing] = pack([5, 3, 8, 2, 1], seq_len=8)
    >>> packing.documents.tolist(), packing.ends.tolist()
    ([0, 1, 2, 3, 4], [2, 3, 5])
    >>> [packing] = pack([5, 6], seq_len=8, how="concat")
    >>> packing.documents.tolist(), packing.starts.tolist(), packing.counts.tolist(), packing.ends.tolist()
    ([0, 1, 1], [0, 0, 2], [5, 3, 4], [2, 3])
    """
    if seq_len < 2:
        raise DataError(f"rows of {seq_len} tokens hold no token with a target; raise prepare.seq_len to at least 2")
    for window, (first, tokens) in enumerate(_windows(np.asanyarray(lengths), window_tokens)):
        _check(tokens, first, seq_len if how != "concat" else None)
        if how == "concat":
            yield _concatenated(tokens, first, seq_len)
        elif how == "none":
            yield _whole(np.arange(len(tokens)), tokens, first, np.arange(1, len(tokens) + 1))
        else:
            yield _best_fit(tokens, first, seq_len, np.random.Generator(np.random.PCG64([seed, window])))


def _windows(lengths: np.ndarray, window_tokens: int) -> Iterator[tuple[int, np.ndarray]]:
    """First document and int64 lengths of each window: as many documents as `window_tokens` holds, and at least one."""
    first = 0
    while first < len(lengths):
        end, room = first, window_tokens
        while end < min(len(lengths), first + WINDOW_DOCUMENTS):
            block = lengths[end : min(end + READ_DOCUMENTS, first + WINDOW_DOCUMENTS)]
            tokens = np.cumsum(np.maximum(block, 0), dtype=np.int64)
            fitting = int(np.searchsorted(tokens, room, side="right"))
            end += fitting
            if fitting < len(block):
                break
            room -= int(tokens[-1])
        end = max(end, first + 1)
        yield first, np.array(lengths[first:end], dtype=np.int64)
        first = end


def _check(tokens: np.ndarray, first: int, longest: int | None) -> None:
    """Refuse a document of no tokens, or of more than a row holds."""
    if tokens.min() >= 1 and (longest is None or tokens.max() <= longest):
        return
    wrong = int(np.argmax((tokens < 1) | (tokens > (longest or tokens.max()))))
    if longest is None or tokens[wrong] < 1:
        raise DataError(f"document {first + wrong}: {tokens[wrong]} tokens, and a row takes 1 or more; drop it")
    raise DataError(
        f"document {first + wrong}: {tokens[wrong]} tokens do not fit a row of {longest}; split or drop it, or raise "
        "prepare.seq_len"
    )


def _whole(order: np.ndarray, tokens: np.ndarray, first: int, ends: np.ndarray) -> Packing:
    """Rows of uncut documents: `order` is the documents of the window, row after row."""
    return Packing(order + first, np.zeros(len(order), dtype=np.int64), tokens[order], ends)


# ---- best fit ----


def _best_fit(tokens: np.ndarray, first: int, seq_len: int, random: np.random.Generator) -> Packing:
    """One window; its rows are numbered by their first document."""
    shuffled = random.permutation(len(tokens))  # ties among equal lengths must not follow the order of the corpus
    longest_first = shuffled[_stable_order(seq_len - tokens[shuffled])]
    row = np.empty(len(tokens), dtype=np.int64)  # of each document
    row[longest_first] = _rows_of(_patterns(np.bincount(tokens, minlength=seq_len + 1), seq_len))
    opens = np.empty(int(row.max()) + 1, dtype=np.int64)  # first document of each row: the last to be written
    opens[row[::-1]] = np.arange(len(tokens))[::-1]
    is_first = np.zeros(len(tokens), dtype=bool)
    is_first[opens] = True
    row = (np.cumsum(is_first) - 1)[opens][row]
    return _whole(_stable_order(row), tokens, first, np.cumsum(np.bincount(row)))


def _patterns(num_documents: np.ndarray, seq_len: int) -> np.ndarray:
    """How rows are filled, from the number of documents of each length: [parts, 4] of (length, each, rows, first row).

    `rows` rows from `first row` on take `each` documents of `length`; the parts of one pattern have the same rows.
    """
    lengths = np.flatnonzero(num_documents).tolist()  # ascending, of which there are documents left
    left = {length: int(num_documents[length]) for length in lengths}
    parts: list[tuple[int, int, int, int]] = []
    num_rows = 0
    while lengths:
        pattern = _filling(seq_len, lengths, left)
        rows = min(left[length] // each for length, each in pattern.items())
        for length, each in pattern.items():
            parts.append((length, each, rows, num_rows))
            left[length] -= each * rows
            if not left[length]:
                lengths.remove(length)
        num_rows += rows
    return np.array(parts, dtype=np.int64)


def _filling(seq_len: int, lengths: list[int], left: dict[int, int]) -> dict[int, int]:
    """The longest document, and the others that fill a row with it best, longer ones before shorter: {length: how many}.

    >>> _filling(10, [2, 3, 4, 7], {2: 1, 3: 2, 4: 1, 7: 1})
    {7: 1, 3: 1}
    """
    longest = lengths[-1]
    room = seq_len - longest
    within = (2 << room) - 1
    sums, steps = 1, []  # bit s of `sums`: some of the documents looked at have s tokens together
    for place in range(bisect.bisect_right(lengths, room) - 1, -1, -1):
        length = lengths[place]
        for _ in range(min(left[length] - (length == longest), room // length)):
            more = (sums | sums << length) & within
            if more == sums:
                break
            steps.append((length, sums))
            sums = more
        if sums >> room:
            break
    pattern, total = {longest: 1}, sums.bit_length() - 1
    for length, before in reversed(steps):
        if not before >> total & 1:  # not without this one
            pattern[length] = pattern.get(length, 0) + 1
            total -= length
    return pattern


def _rows_of(parts: np.ndarray) -> np.ndarray:
    """Row of each document, longest first: of one length the earlier patterns take the earlier documents."""
    parts = parts[np.argsort(-parts[:, 0], kind="stable")]
    _, each, rows, first = parts.T
    part = np.repeat(np.arange(len(parts)), each * rows)  # of each document
    nth = np.arange(len(part)) - (np.cumsum(each * rows) - each * rows)[part]
    return first[part] + nth // each[part]


def _stable_order(keys: np.ndarray) -> np.ndarray:
    """Stable ascending order of integers in 0..2³²: numpy sorts 16 bits at a time by radix, anything wider by merging."""
    order = np.argsort(keys.astype(np.uint16), kind="stable")
    if keys.max() >> 16:
        order = order[np.argsort((keys >> 16).astype(np.uint16)[order], kind="stable")]
    return order


# ---- concatenation ----


def _concatenated(tokens: np.ndarray, first: int, seq_len: int) -> Packing:
    """One window's documents one after another; a loop over documents decides what one pass of numpy then cuts."""
    room = seq_len
    heads, opens = [], []  # tokens of each document's first piece; whether that piece begins a row
    for length in tokens.tolist():
        # One token of room holds no piece with a target: it stays empty, unless the document is that token.
        begins = room == 0 or (room == 1 and length > 1)
        room = seq_len if begins else room
        head = min(length, room)
        heads.append(head)
        opens.append(begins)
        room = room - head if head == length else seq_len - 2 - (length - head - 1) % (seq_len - 1)
    head = np.array(heads, dtype=np.int64)
    pieces = 1 - (head - tokens) // (seq_len - 1)  # after the first, each has a token of context and seq_len - 1 more
    last = np.cumsum(pieces)
    document = np.repeat(np.arange(len(tokens)), pieces)
    nth = np.arange(last[-1]) - (last - pieces)[document]
    starts = np.where(nth == 0, 0, head[document] - 1 + (nth - 1) * (seq_len - 1))
    counts = np.where(nth == 0, head[document], np.minimum(seq_len, tokens[document] - starts))
    begins_row = (nth > 0) | np.array(opens)[document]
    ends = np.append(np.flatnonzero(begins_row[1:]) + 1, last[-1])
    return Packing(document + first, starts, counts, ends)
