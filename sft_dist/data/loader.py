"""What a rank sees in a step: index arithmetic on (order, topology, rows consumed), rows mapped from disk.

The state is one integer, the rows consumed so far. A micro-batch is a block of consecutive ordinals of the stream, and
block k of a step goes to rank k mod world size: which rows share a forward pass does not depend on how many ranks there are.
Rows travel as they are stored (2.27 bytes a token) and are widened on the device of the model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sft_dist.data.mixture import Joined
from sft_dist.data.order import row_numbers
from sft_dist.data.shards import Shards, StoredRows, row_dtype
from sft_dist.topology import Topology

# Read in one go: enough that a shard's rows are gathered together, few enough for a processor's cache.
_READ_ROWS, _READ_TOKENS = 1024, 1 << 22
_PLAN_ROWS = 16_384  # of which the order is computed in one go
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows of one forward pass on one rank, on the loader's device.

    `tokens`, `positions`: int64 [rows, seq_len]; `targets`: bool [rows, seq_len]; `documents`: int32 [rows, seq_len],
    the number of each token's document in its row, -1 for padding. `first_ordinal` seeds the dropout; `rows`: int64
    [rows], row numbers in the shards, empty when the rank only keeps the others company; `sets`: int64 [rows, or 1], the
    set of the mixture that each row is from, None where there is only one. `num_targets`, and `num_documents` with padding
    as one of each row that has some: known here, so that nobody has to ask the device.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    documents: torch.Tensor
    rows: np.ndarray
    first_ordinal: int
    num_targets: int
    num_documents: int
    sets: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """One micro-batch before it is read: its ordinals in the stream and its row numbers, int64 [rows] each."""

    ordinals: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step: counts of the whole global batch, and this rank's micro-batches, read as they are asked for."""

    num_rows: int
    num_tokens: int  # of this rank's rows, padding left out
    num_targets: int  # of this rank's rows
    blocks: list[Block] = field(repr=False)  # of this rank
    loader: Loader = field(repr=False)

    @property
    def micro_batches(self) -> Iterator[MicroBatch]:
        """The rank's micro-batches in order; every rank has equally many."""
        return (self.loader.micro_batch(block, stored) for block, stored in self.stored)

    @property
    def stored(self) -> Iterator[tuple[Block, StoredRows]]:
        """The same as they lie in the files; for no ordinals one row of padding without targets."""
        return self.loader.read(self.blocks)


class Loader:
    """The stream of rows of a set of shards, or of several sets joined, as one rank sees it.

    `order` maps ordinals of the stream to row numbers; without it: epochs of `shards`, shuffled by `seed`.

    >>> loader = Loader(shards, topology, seed=0, micro_batch_rows=4)  # doctest: +SKIP
    >>> next(loader.steps(start=0, end=1_000, global_batch_rows=8)).num_rows  # doctest: +SKIP
    8
    """

    def __init__(
        self,
        shards: Shards | Joined,
        topology: Topology,
        *,
        micro_batch_rows: int,
        seed: int = 0,
        shuffle: bool = True,
        order: Callable[[np.ndarray], np.ndarray] | None = None,
        device: torch.device = _CPU,
    ) -> None:
        self.shards, self.topology, self.micro_batch_rows, self.device = shards, topology, micro_batch_rows, device
        in_epochs = functools.partial(row_numbers, num_rows=shards.num_rows, seed=seed, shuffle=shuffle)
        self.order = order or in_epochs
        self.has_sets = isinstance(shards, Joined) and len(shards.sets) > 1

    def steps(self, *, start: int, end: int, global_batch_rows: int) -> Iterator[Step]:
        """Steps over the ordinals [start, end) of the stream; only the last one can hold fewer rows."""
        ahead = max(1, _PLAN_ROWS * self.topology.world_size // global_batch_rows)
        first, count = start, 1  # the first step alone: a resumed run begins at once
        while first < end:
            until = min(end, first + count * global_batch_rows)
            begins = range(first, until, global_batch_rows)
            yield from self._plan([np.arange(begin, min(begin + global_batch_rows, end)) for begin in begins])
            first, count = until, ahead

    def sweep(self) -> Step:
        """Every row once, as a single step: for evaluation."""
        return self._plan([np.arange(self.shards.num_rows)])[0]

    def _plan(self, batches: list[np.ndarray]) -> list[Step]:
        """Steps of these ordinals; the order and the counts of all of them are computed together."""
        mine = [self._mine(ordinals) for ordinals in batches]
        rows = self.order(np.concatenate([block for blocks in mine for block in blocks]))
        lengths, targets = self.shards.counts(rows)
        steps, at = [], 0
        for ordinals, blocks in zip(batches, mine, strict=True):
            made, begin = [], at
            for block in blocks:
                made.append(Block(block, rows[at : at + len(block)]))
                at += len(block)
            num_tokens, num_targets = int(lengths[begin:at].sum()), int(targets[begin:at].sum())
            steps.append(Step(len(ordinals), num_tokens, num_targets, made, self))
        return steps

    def _mine(self, ordinals: np.ndarray) -> list[np.ndarray]:
        size, world = self.micro_batch_rows, self.topology.world_size
        count = -(-len(ordinals) // size)
        turns = -(-count // world)  # ranks take part in every collective, rows or no rows
        places = range(self.topology.rank, turns * world, world)
        return [ordinals[place * size : (place + 1) * size] for place in places]

    def read(self, blocks: list[Block]) -> Iterator[tuple[Block, StoredRows]]:
        """The rows of each block, read many blocks at a time in ascending order of the rows and handed out in theirs."""
        at_once = min(_READ_ROWS, _READ_TOKENS // self.shards.seq_len)
        count = max(1, at_once // self.micro_batch_rows)
        for at in range(0, len(blocks), count):
            together = blocks[at : at + count]
            rows = np.concatenate([block.rows for block in together])
            order = np.argsort(rows)
            places = np.empty_like(order)
            places[order] = np.arange(len(order))
            is_ascending = bool((order[1:] > order[:-1]).all())
            stored, begin = self.shards.stored(rows[order]), 0
            for block in together:
                end = begin + len(block.rows)
                mine = slice(begin, end) if is_ascending else places[begin:end]
                yield block, stored.take(mine) if len(block.rows) else self._nothing()
                begin = end

    def micro_batch(self, block: Block, stored: StoredRows) -> MicroBatch:
        """What the model is fed for these rows, on the loader's device."""
        first_ordinal = int(block.ordinals[0]) if len(block.ordinals) else 0
        sets = None
        if self.has_sets and isinstance(self.shards, Joined):
            of_rows = self.shards.set_of(block.rows) if len(block.rows) else np.zeros(1, np.int64)
            sets = _on_device(of_rows, self.device)
        parts = widen(stored, self.shards.seq_len, self.device)
        num_targets, of_text = (int(np.bitwise_count(bits).sum()) for bits in (stored.targets, stored.starts))
        num_targets -= int((stored.targets[:, 0] >> 7).sum())  # a row's first token is predicted by nothing
        padded = (stored.lengths < self.shards.seq_len).sum()
        return MicroBatch(*parts, block.rows, first_ordinal, num_targets, of_text + int(padded), sets)

    def _nothing(self) -> StoredRows:
        manifest = self.shards.manifest
        record = np.zeros(1, row_dtype(manifest.seq_len, manifest.dtype))
        record["tokens"] = manifest.pad_id
        return StoredRows(record)


def _on_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy there that nothing waits for: from pinned memory, behind what the device already has to do."""
    made = torch.from_numpy(values)
    return made if device.type == "cpu" else made.pin_memory().to(device, non_blocking=True)


def widen(
    stored: StoredRows, seq_len: int, device: torch.device = _CPU
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens, targets, positions, documents) of stored rows, each [rows, seq_len], made on `device`.

    Positions restart at each document; the padding has positions of its own, so that it is isolated too, and document -1.

    >>> record = np.zeros(1, row_dtype(4, "<u2"))
    >>> record["tokens"], record["length"], record["starts"] = [5, 6, 7, 1], 3, 0b1010_0000
    >>> [part.tolist() for part in widen(StoredRows(record), 4)[2:]]
    [[[0, 1, 0, 0]], [[0, 0, 1, -1]]]
    """
    dtype: Any = stored.records.dtype
    content = np.ascontiguousarray(stored.records).view(np.uint8).reshape(-1, dtype.itemsize)
    blob = _on_device(content, device)  # all fields of all rows in one copy

    def field(name: str) -> torch.Tensor:
        inner, begin = dtype.fields[name][:2]
        return blob[:, begin : begin + inner.itemsize]

    width = dtype["tokens"].base.itemsize
    signed = field("tokens").view({2: torch.int16, 4: torch.int32}[width])  # torch computes with few unsigned types
    tokens = signed.long().bitwise_and_((1 << 8 * width) - 1)
    targets, starts = (_bits(field(name), seq_len) for name in ("targets", "starts"))
    lengths = field("length").view(torch.int32)
    places = torch.arange(seq_len, device=device)
    begins = starts | (places == lengths)  # the padding counts as a document of its own
    positions = places - torch.where(begins, places, 0).cummax(dim=1).values
    documents = starts.cumsum(dim=1, dtype=torch.int32) - 1
    return tokens, targets, positions, documents.masked_fill_(places >= lengths, -1)


def _bits(packed: torch.Tensor, seq_len: int) -> torch.Tensor:
    """Unpack bits, big end first: uint8 [rows, ceil(seq_len / 8)] to bool [rows, seq_len]."""
    places = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    spread = packed[:, :, None] >> places & 1
    return spread.flatten(1)[:, :seq_len].bool()
