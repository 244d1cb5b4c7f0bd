"""What a rank sees in a step: index arithmetic on (order, topology, rows consumed), rows mapped from disk.

The state is one integer, the rows consumed so far. A micro-batch is a block of consecutive ordinals of the stream, and
block k of a step goes to rank k mod world size: which rows share a forward pass does not depend on how many ranks there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from sft_dist.data.order import row_numbers
from sft_dist.data.shards import RowBatch, Shards
from sft_dist.topology import Topology


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows of one forward pass on one rank.

    `tokens`, `positions`: int64 [rows, seq_len]; `targets`: bool [rows, seq_len]; `documents`: int64 [rows, seq_len],
    the number of each token's document in its row, -1 for padding. `first_ordinal` seeds the dropout; `rows`: int64
    [rows], row numbers in the shards, empty when the rank only keeps the others company.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    documents: torch.Tensor
    rows: np.ndarray
    first_ordinal: int


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step: counts of the whole global batch, and this rank's micro-batches, read as they are asked for."""

    num_rows: int
    num_tokens: int  # of this rank's rows, padding left out
    num_targets: int  # of this rank's rows
    blocks: list[np.ndarray] = field(repr=False)  # ordinals of each of this rank's micro-batches
    loader: Loader = field(repr=False)

    @property
    def micro_batches(self) -> Iterator[MicroBatch]:
        """The rank's micro-batches in order; every rank has equally many."""
        return (self.loader.micro_batch(block) for block in self.blocks)


class Loader:
    """The stream of rows of a set of shards, as one rank sees it.

    >>> loader = Loader(shards, topology, seed=0, micro_batch_rows=4)  # doctest: +SKIP
    >>> next(loader.steps(start=0, end=1_000, global_batch_rows=8)).num_rows  # doctest: +SKIP
    8
    """

    def __init__(
        self, shards: Shards, topology: Topology, *, seed: int, micro_batch_rows: int, shuffle: bool = True
    ) -> None:
        self.shards, self.topology, self.seed, self.shuffle = shards, topology, seed, shuffle
        self.micro_batch_rows = micro_batch_rows

    def steps(self, *, start: int, end: int, global_batch_rows: int) -> Iterator[Step]:
        """Steps over the ordinals [start, end) of the stream; only the last one can hold fewer rows."""
        for first in range(start, end, global_batch_rows):
            yield self._step(np.arange(first, min(first + global_batch_rows, end)))

    def sweep(self) -> Step:
        """Every row once, as a single step: for evaluation."""
        return self._step(np.arange(self.shards.num_rows))

    def _step(self, ordinals: np.ndarray) -> Step:
        size, world = self.micro_batch_rows, self.topology.world_size
        blocks = [ordinals[at : at + size] for at in range(0, len(ordinals), size)]
        blocks += [ordinals[:0]] * (-len(blocks) % world)  # ranks take part in every collective, rows or no rows
        mine = blocks[self.topology.rank :: world]
        rows = self._rows(np.concatenate(mine))
        num_tokens, num_targets = self.shards.count(rows)
        return Step(len(ordinals), num_tokens, num_targets, mine, self)

    def _rows(self, ordinals: np.ndarray) -> np.ndarray:
        return row_numbers(ordinals, self.shards.num_rows, self.seed, shuffle=self.shuffle)

    def micro_batch(self, ordinals: np.ndarray) -> MicroBatch:
        """The rows of these ordinals; for no ordinals one row of padding without targets."""
        rows = self._rows(ordinals)
        batch = self.shards.rows(rows) if len(rows) else self._nothing()
        first_ordinal = int(ordinals[0]) if len(ordinals) else 0
        arrays = (batch.tokens, batch.targets, batch.positions, batch.documents)
        return MicroBatch(*(torch.from_numpy(array) for array in arrays), rows, first_ordinal)

    def _nothing(self) -> RowBatch:
        shape = (1, self.shards.seq_len)
        return RowBatch(
            tokens=np.full(shape, self.shards.manifest.pad_id, np.int64),
            targets=np.zeros(shape, bool),
            positions=np.arange(shape[1], dtype=np.int64)[None],
            documents=np.full(shape, -1, np.int32),
            lengths=np.zeros(1, np.int64),
        )
