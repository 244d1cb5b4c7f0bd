"""The train loop. Its unit is the optimizer step: it agrees, learns, accounts, keeps; and it stops between steps."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from sft_dist.checkpoint import Checkpoints, Saved
from sft_dist.comms import Comms
from sft_dist.engine import Applied, Engine
from sft_dist.errors import SftDistError
from sft_dist.evaluate import Evaluator, Forward
from sft_dist.ledger import Ledger
from sft_dist.limits import EarlyStopping, Reason, StopRequest
from sft_dist.metrics import Metrics, peak_memory_bytes
from sft_dist.state import TrainState
from sft_dist.stragglers import Stragglers
from sft_dist.usage import Budget
from sft_dist.watchdog import Watchdog

_log = logging.getLogger("sft_dist")


class DivergedError(SftDistError):
    """The loss or the gradient is no longer a number; nothing of that step is saved."""

    verdict = "diverged"


class _AbandonedError(Exception):
    """An evaluation that all ranks agreed to leave, because one was asked to stop."""


@dataclass(frozen=True, slots=True)
class Cadence:
    """Every how many steps something happens; None: only at the start and the end, at `last_step`."""

    last_step: int
    log_steps: int = 1
    evaluate_steps: int | None = None
    checkpoint_steps: int | None = None


def train(
    *,
    steps: Iterable[Any],
    engine: Engine,
    comms: Comms,
    state: TrainState,
    learning_rate: Callable[[int], float],
    evaluator: Evaluator,
    checkpoints: Checkpoints,
    metrics: Metrics,
    stop: StopRequest,
    cadence: Cadence,
    watchdog: Watchdog | None = None,
    stragglers: Stragglers | None = None,
    epochs_of_sets: Callable[[int], Mapping[str, float]] | None = None,
    is_measured: bool = True,
    early_stopping: EarlyStopping | None = None,
    budget: Budget | None = None,
) -> tuple[Reason, TrainState]:
    """Feed `steps` to the engine from `state` on, until they end or any rank is asked to stop.

    `watchdog` is told of every phase, in which all ranks beat equally often; `stragglers` of the seconds that each rank computed. `epochs_of_sets`, of a mixture: rows consumed -> how often each set was gone through, by name, in the engine's order.
    `is_measured`: False where `state` is that of the last step, and a life before was asked to stop while it measured that one.
    Returns why it ended and the state that is saved by then. Raises DivergedError on a loss or gradient that is not finite.
    """
    start_step, budget = state.step, budget or Budget()
    reason: Reason = "completed"

    def beat(phase: str) -> None:
        if watchdog is not None:
            watchdog.beat(state.step, phase)

    def waiting() -> None:
        if watchdog is not None:
            watchdog.wait(state.step, "waits for a save")

    def is_to_stop(phase: str) -> bool:
        beat("vote")
        is_wanted = comms.agree(stop.is_wanted())
        beat(phase)
        return is_wanted

    def logits_unless_stopped(*batch: torch.Tensor) -> torch.Tensor:
        if is_to_stop("evaluate"):
            raise _AbandonedError
        return engine.logits(*batch)

    def report(saved: Saved | None) -> None:
        """What a save cost; a failure has been said where it was found."""
        if saved is not None and saved.failure is None:
            metrics.scalars(saved.step, saved.numbers)
            stop.save_seconds = max(stop.save_seconds, saved.write_seconds)
            if told := stop.grace_warning():
                _log.warning(told)

    if state.step == 0:
        with contextlib.suppress(_AbandonedError):  # the first step's vote will stop the run
            began = time.perf_counter()
            _measure(0, logits_unless_stopped, evaluator, metrics)
            budget.measured(time.perf_counter() - began)

    for step in steps:
        if early_stopping is not None and early_stopping.is_over(state.best):
            reason = "plateaued"
            break
        started = time.perf_counter()

        # agree: one exchange carries the loss denominator, every rank's wish to stop, whether a save failed, and the budget
        beat("agree")
        mine = [step.num_targets, step.num_tokens, stop.is_wanted(), checkpoints.wants_retry]
        is_spent = budget.is_spent(state.tokens, stop.save_seconds)
        targets, tokens, wishes, retries, spent = comms.sum([*mine, is_spent])
        if wishes or spent:
            reason = "stopped" if wishes else "spent"
            break

        # learn: a step of thousands of rows can outlast a grace period, so the ranks also vote between micro-batches
        rate = learning_rate(state.step)
        applied = engine.learn(
            step.micro_batches,
            denominator=max(1, targets),
            learning_rate=rate,
            should_abandon=lambda: is_to_stop("forward and backward"),
        )
        beat("account")
        if applied is None:
            reason = "stopped"
            break
        loss = comms.sum_tensor(applied.loss_sum.cpu()).item() / max(1, targets)
        if not _is_number(loss, applied):
            checkpoints.finish(waiting)
            raise _diverged(state, step.num_rows, loss, applied)

        # account
        fed, own_seconds = _exchange(applied, comms)
        assert fed.rows == step.num_rows, (fed, step)
        seconds = time.perf_counter() - started
        state = state.after(
            rows=step.num_rows,
            tokens=tokens,
            target_tokens=targets,
            fed=fed,
            adam_step=engine.adam_step,
            loss_scale=engine.loss_scale,
            gpu_seconds=seconds * comms.topology.world_size,
        )
        slowest, told = stragglers.judge(own_seconds) if stragglers is not None else (None, None)
        budget.stepped(state.step, seconds, state.tokens)
        for line in filter(None, (told, budget.told(cadence.last_step))):
            _log.warning(line)
        if _is_due(state.step, cadence.log_steps):
            speed = {"target_tokens_per_second": targets / seconds, "tokens_per_second": tokens / seconds}
            speed |= {"slowest_rank_ratio": slowest} if slowest is not None else {}
            of_sets = _by_set(applied, comms, epochs_of_sets(state.rows_consumed)) if epochs_of_sets is not None else {}
            values = {"loss": loss, "learning_rate": rate, **_of_engine(engine, applied), **speed}
            metrics.scalars(state.step, {**values, "step_seconds": seconds, **of_sets})

        # keep
        is_last = state.step >= cadence.last_step and early_stopping is None  # else it is measured as it is saved
        if _is_due(state.step, cadence.evaluate_steps) and not is_last:
            with contextlib.suppress(_AbandonedError):  # the next step's vote will stop the run
                measured = evaluator.interim(logits_unless_stopped)
                metrics.scalars(state.step, measured)
                state = _judged(state, measured, early_stopping)
        report(checkpoints.finished())
        is_best = state.best is not None and state.best.step == state.step
        if _is_due(state.step, cadence.checkpoint_steps) or retries or is_best:
            beat("save")
            report(checkpoints.begin(engine.fragments, state, waiting))

    # finish: the last step is on its way to the disk while it is measured
    if state.step > checkpoints.begun_step:
        beat("save")
        report(checkpoints.begin(engine.fragments, state, waiting))
    if reason in ("completed", "plateaued", "spent") and (state.step > start_step or not is_measured):
        try:
            was_evaluated = early_stopping is not None and state.score_here is not None  # with all scores
            _measure(state.step, logits_unless_stopped, evaluator, metrics, only_samples=was_evaluated)
        except _AbandonedError:
            reason = "stopped"
    beat("save")
    report(checkpoints.finish(waiting))
    if state.step > checkpoints.saved_step:
        report(checkpoints.save(engine.fragments, state, waiting))
    return reason, state


def _is_number(loss: float, applied: Applied) -> bool:
    """Whether the step can be kept; the norm of an fp16 step that was skipped need not be one."""
    return math.isfinite(loss) and (math.isfinite(applied.grad_norm) or not applied.is_applied)


def _diverged(state: TrainState, num_rows: int, loss: float, applied: Applied) -> DivergedError:
    return DivergedError(
        f"step {state.step + 1}: loss {loss}, gradient norm {applied.grad_norm} (rows "
        f"{state.rows_consumed} to {state.rows_consumed + num_rows - 1} of the stream). "
        "The last checkpoint is untouched; lower train.learning_rate or look at those rows"
    )


def _of_engine(engine: Engine, applied: Applied) -> dict[str, float]:
    """What the engine knows of the step that it applied, or skipped."""
    values: dict[str, float] = {"memory_bytes": peak_memory_bytes(engine.peak_device_bytes)}
    values |= {"grad_norm": applied.grad_norm} if applied.is_applied else {}
    return values | ({"loss_scale": engine.loss_scale["cur_scale"]} if engine.loss_scale else {})


def _judged(state: TrainState, measured: Mapping[str, float], early_stopping: EarlyStopping | None) -> TrainState:
    """The state with what an evaluation gave: the loss is its score, or what early stopping looks at."""
    if early_stopping is None:
        return replace(state, evaluated=(state.step, measured["validation_loss"])) if measured else state
    value = measured[early_stopping.metric]
    best = early_stopping.judge(state.best, state.step, value)
    return replace(state, evaluated=(state.step, early_stopping.score(value)), best=best)


def _exchange(applied: Applied, comms: Comms) -> tuple[Ledger, list[float]]:
    """What all ranks fed, and the seconds that each of them computed: in one exchange, each rank fills its own place."""
    own = [0] * comms.topology.world_size
    own[comms.topology.rank] = round(applied.own_seconds * 1e6)
    rows, *hashes = comms.sum([*applied.fed.tolist(), *own])
    return Ledger(rows, *hashes[:2]), [microseconds / 1e6 for microseconds in hashes[2:]]


def _by_set(applied: Applied, comms: Comms, epochs: Mapping[str, float]) -> dict[str, float]:
    """Loss of each set that had targets in the step, and how often each set was gone through."""
    values = {f"epochs/{name}": epoch for name, epoch in epochs.items()}
    if applied.set_sums is not None:
        sums, counts = comms.sum_tensor(applied.set_sums.cpu()).tolist()
        values |= {f"loss/{name}": s / n for name, s, n in zip(epochs, sums, counts, strict=True) if n}
    return values


def _measure(
    step: int, forward: Forward, evaluator: Evaluator, metrics: Metrics, *, only_samples: bool = False
) -> None:
    """Every metric and the sample answers: what is compared before and after."""
    if not only_samples:
        metrics.scalars(step, evaluator.metrics(forward))
    if answers := evaluator.samples(forward):
        metrics.samples(step, answers)


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
