"""The arithmetic of a run: micro-batch x accumulation x ranks = global batch, and how many steps its rows make."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from sft_dist.errors import ConfigError
from sft_dist.schema import TrainConfig


@dataclass(frozen=True, slots=True)
class Batch:
    """The arithmetic of one optimizer step, derived once from the run file and the world size."""

    global_batch_rows: int
    micro_batch_rows: int
    accumulation_steps: int
    world_size: int

    def samples(self, documents_per_row: float) -> float:
        """Documents of a step, on average."""
        return self.global_batch_rows * documents_per_row


def derive_batch(
    config: TrainConfig, world_size: int, documents_per_row: float, resumed_rows: int | None = None
) -> Batch:
    """micro-batch x accumulation x ranks = global batch, or a ConfigError that names the nearest batch that divides.

    A batch in samples becomes the nearest dividing number of rows; a resumed run keeps the number it started with.

    >>> train = TrainConfig(global_batch_rows=8, micro_batch_rows=2, epochs=1)
    >>> derive_batch(train, world_size=2, documents_per_row=5.0).accumulation_steps
    2
    >>> train = TrainConfig(global_batch_samples=3840, micro_batch_rows=4, epochs=1)
    >>> derive_batch(train, world_size=8, documents_per_row=10.0).global_batch_rows
    384
    """
    micro_batch_rows = config.micro_batch_rows
    assert micro_batch_rows != "auto"  # settled before
    unit = micro_batch_rows * world_size
    if config.global_batch_samples is not None and resumed_rows is not None:
        rows = resumed_rows
    elif config.global_batch_samples is not None:
        rows = max(1, round(config.global_batch_samples / documents_per_row / unit)) * unit
    else:
        rows = config.global_batch_rows or 0
    if rows % unit:
        nearest = sorted({max(unit, rows // unit * unit), (rows // unit + 1) * unit})
        raise ConfigError(
            f"train.global_batch_rows: {rows} is not a multiple of micro_batch_rows {micro_batch_rows} x "
            f"{world_size} processes = {unit}. Use {' or '.join(map(str, nearest))}, or another micro_batch_rows"
        )
    return Batch(rows, micro_batch_rows, rows // unit, world_size)


def even_batch(
    config: TrainConfig, world_size: int, documents_per_row: float, resumed_rows: int | None = None
) -> Batch:
    """The same for a micro-batch that is still to be chosen, one row so far: a batch in samples gets rows that divide well.

    It moves by a sixteenth at most, as it would for a micro-batch of that size.

    >>> train = TrainConfig(global_batch_samples=760, micro_batch_rows=1, epochs=1)
    >>> derive_batch(train, 1, documents_per_row=10.0).global_batch_rows, even_batch(train, 1, 10.0).global_batch_rows
    (76, 80)
    """
    batch = derive_batch(config, world_size, documents_per_row, resumed_rows)
    if config.global_batch_samples is None or resumed_rows is not None:
        return batch
    unit = 1 << max(0, (batch.accumulation_steps // 8).bit_length() - 1)
    rounded = derive_batch(config.model_copy(update={"micro_batch_rows": unit}), world_size, documents_per_row)
    return Batch(rounded.global_batch_rows, 1, rounded.global_batch_rows // world_size, world_size)


def total_rows(config: TrainConfig, batch: Batch, num_rows: int) -> int:
    """Rows that the whole run feeds: one continuous stream over the epochs, cut by `max_steps`.

    >>> train = TrainConfig(global_batch_rows=8, epochs=2.5)
    >>> total_rows(train, derive_batch(train, 1, 1.0), num_rows=100)
    250
    """
    limits = []
    if config.epochs is not None:
        limits.append(max(1, round(config.epochs * num_rows)))
    if config.max_steps is not None:
        limits.append(config.max_steps * batch.global_batch_rows)
    return min(limits)


def num_steps(rows: int, batch: Batch) -> int:
    """Optimizer steps that `rows` rows take; only the last one can be short.

    >>> num_steps(250, Batch(8, 8, 1, 1))
    32
    """
    return math.ceil(rows / batch.global_batch_rows)


def with_last(items: Iterable[Any]) -> Iterator[tuple[bool, Any]]:
    """Each item with whether it is the last one.

    >>> list(with_last("ab"))
    [(False, 'a'), (True, 'b')]
    """
    iterator = iter(items)
    held = next(iterator)
    for item in iterator:
        yield False, held
        held = item
    yield True, held


def check_shares(
    count: int, *, seq_len: int, world_size: int, heads: int | None = None, has_dropout: bool = False
) -> None:
    """Raises ConfigError where rows cannot be shared by so many ranks.

    >>> check_shares(4, seq_len=1024, world_size=8, heads=12)
    """
    for what, number in (("processes", world_size), ("tokens of a row", seq_len), ("attention heads", heads)):
        if number is not None and number % count:
            fitting = ", ".join(str(one) for one in range(1, count + 1) if number % one == 0)
            raise ConfigError(
                f"train.sequence_parallel: {count} ranks cannot share {number:,} {what} equally; {number:,} can be divided by {fitting}"
            )
    if has_dropout:
        raise ConfigError(
            "train.sequence_parallel: the model has dropout, and what a token draws must not depend on who computes it; set model.dropout: 0"
        )
