"""What a step did, over all ranks: the ledger of its rows, and its numbers for the metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from sft_dist.comms import Comms
from sft_dist.engine import Applied, Engine
from sft_dist.ledger import Ledger
from sft_dist.limits import EarlyStopping
from sft_dist.metrics import peak_memory_bytes
from sft_dist.spikes import BadStep
from sft_dist.state import TrainState


def exchange(applied: Applied, comms: Comms) -> tuple[Ledger, list[float]]:
    """What all ranks fed, and the seconds that each of them computed: in one exchange, each rank fills its own place."""
    own = [0] * comms.topology.world_size
    own[comms.topology.rank] = round(applied.own_seconds * 1e6)
    rows, *hashes = comms.sum([*applied.fed.tolist(), *own])
    return Ledger(rows, *hashes[:2]), [microseconds / 1e6 for microseconds in hashes[2:]]


def numbers(
    engine: Engine,
    applied: Applied,
    comms: Comms,
    *,
    loss: float,
    seconds: float,
    targets: int,
    tokens: int,
    epochs: Mapping[str, float] | None,
) -> dict[str, float]:
    """The metrics of a step of `seconds`; of a number that is none there is no metric. `epochs`: of the sets of a mixture."""
    values: dict[str, float] = {"loss": loss, "memory_bytes": peak_memory_bytes(engine.peak_device_bytes)}
    values |= {"grad_norm": applied.grad_norm} if applied.is_applied else {}
    values |= {"loss_scale": engine.loss_scale["cur_scale"]} if engine.loss_scale else {}
    values |= {"target_tokens_per_second": targets / seconds, "tokens_per_second": tokens / seconds}
    values |= {"step_seconds": seconds, **(_by_set(applied, comms, epochs) if epochs is not None else {})}
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _by_set(applied: Applied, comms: Comms, epochs: Mapping[str, float]) -> dict[str, float]:
    """Loss of each set that had targets in the step, and how often each set was gone through."""
    values = {f"epochs/{name}": epoch for name, epoch in epochs.items()}
    if applied.set_sums is not None:
        sums, counts = comms.sum_tensor(applied.set_sums.cpu()).tolist()
        values |= {f"loss/{name}": s / n for name, s, n in zip(epochs, sums, counts, strict=True) if n}
    return values


def bad_step(step: int, begin: int, num_rows: int, loss: float, applied: Applied, comms: Comms) -> BadStep | None:
    """What is to be told of a step that was not applied, on the main rank; every rank calls it."""
    suspects = comms.gather_to_main(applied.suspects)
    rows = tuple(dict.fromkeys(row for of_rank in suspects for row in of_rank))  # some ranks share theirs
    return BadStep(step, begin, begin + num_rows, loss, applied.grad_norm, rows) if suspects else None


def judged(state: TrainState, measured: Mapping[str, float], early_stopping: EarlyStopping | None) -> TrainState:
    """The state with what an evaluation gave: the loss is its score, or what early stopping looks at.

    What is not judged, before its warm-up is over, or is no number, is no score: the best checkpoint is one of those judged.
    """
    value = measured.get(early_stopping.metric if early_stopping else "validation_loss", math.nan)
    best = early_stopping.judge(state.best, state.step, value) if early_stopping else state.best
    if not math.isfinite(value) or (early_stopping and state.step < early_stopping.warmup_steps):
        return replace(state, best=best)
    score = early_stopping.score(value) if early_stopping else value
    return replace(state, evaluated=(state.step, score), best=best)
