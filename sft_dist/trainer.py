"""The train loop. Its unit is the optimizer step: it agrees, learns, accounts, keeps; and it stops between steps."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from sft_dist import account
from sft_dist.checkpoint import Checkpoints, Saved
from sft_dist.comms import Comms
from sft_dist.engine import Engine
from sft_dist.evaluate import Evaluator
from sft_dist.limits import EarlyStopping, Reason, StopRequest
from sft_dist.metrics import Metrics
from sft_dist.schedule import Cadence
from sft_dist.spikes import BadStep, BadSteps
from sft_dist.state import TrainState
from sft_dist.stragglers import Stragglers
from sft_dist.usage import Budget
from sft_dist.votes import AbandonedError, Votes
from sft_dist.watchdog import Watchdog

_log = logging.getLogger("sft_dist")


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
    owes_evaluation: bool = False,
    early_stopping: EarlyStopping | None = None,
    budget: Budget | None = None,
    bad_steps: BadSteps | None = None,
    on_bad_step: Callable[[BadStep], None] = lambda bad: None,
) -> tuple[Reason, TrainState]:
    """Feed `steps` to the engine from `state` on, until they end or any rank is asked to stop.

    `watchdog` is told of every phase, in which all ranks beat equally often; `stragglers` of the seconds that each rank computed. `epochs_of_sets`, of a mixture: rows consumed -> how often each set was gone through, by name, in the engine's order.
    `is_measured`: False where `state` is that of the last step, and a life before was asked to stop while it measured that one;
    `owes_evaluation`: the same of one on the way.
    `bad_steps`: what is done about steps whose loss or gradient is no number; the main rank hears of each by `on_bad_step`.
    Returns why it ended and the state that is saved by then; that of "diverged" is not: its weights are to blame.
    """
    start_step, budget, bad_steps = state.step, budget or Budget(), bad_steps or BadSteps(roll_back_after=None)
    reason: Reason = "completed"

    votes = Votes(comms, stop, watchdog, state.step, budget.enter)
    beat, waiting, scores = votes.beat, votes.waiting, votes.unless_stopped(engine.scores)

    def report(saved: Saved | None) -> None:
        """What a save cost; a failure has been said where it was found."""
        if saved is not None and saved.failure is None:
            metrics.scalars(saved.step, saved.numbers)
            stop.save_seconds = max(stop.save_seconds, saved.write_seconds)
            if told := stop.grace_warning():
                _log.warning(told)

    def evaluated(state: TrainState) -> TrainState:
        with contextlib.suppress(AbandonedError), budget.measuring():  # the next step's vote will stop the run
            return account.judged(state, evaluator.interim(state.step, scores, metrics), early_stopping)
        return state

    if owes_evaluation:
        state = evaluated(state)
    if state.step == 0 and not comms.agree(budget.is_spent(stop.save_seconds)):
        with contextlib.suppress(AbandonedError), budget.measuring():  # the first step's vote will stop the run
            evaluator.measure(0, scores, metrics)

    for step in votes.each(steps):
        if early_stopping is not None and early_stopping.is_over(state.best):
            reason = "plateaued"
            break
        started = time.perf_counter()

        # agree: one exchange carries the loss denominator, every rank's wish to stop, whether a save failed, and the budget
        beat("agree")
        mine = [step.num_targets, step.num_tokens, stop.is_wanted(), checkpoints.wants_retry]
        targets, tokens, wishes, retries, spent = comms.sum([*mine, budget.is_spent(stop.save_seconds)])
        if wishes or spent or budget.exceeds(state.tokens + tokens):
            reason = "stopped" if wishes else "spent"
            break

        # learn: a step of thousands of rows can outlast a grace period, so the ranks also vote between micro-batches
        rate = learning_rate(state.step)
        applied = engine.learn(
            votes.each(step.micro_batches),
            denominator=max(1, targets),
            learning_rate=rate,
            should_abandon=lambda: votes.is_to_stop("forward and backward"),
            total=lambda loss_sum: comms.sum_tensor(loss_sum).item(),
            norm_limit=bad_steps.norm_limit(state.norms),
        )
        beat("account")
        if applied is None:
            reason = "stopped"
            break

        # account
        loss, fed_from = applied.loss_sum / max(1, targets), state.rows_consumed
        fed, own_seconds = account.exchange(applied, comms)
        assert fed.rows == step.num_rows, (fed, step)
        seconds = time.perf_counter() - started
        is_bad = not applied.is_applied and not applied.is_overflow
        state = state.after(
            rows=step.num_rows,
            tokens=tokens,
            target_tokens=targets,
            fed=fed,
            adam_step=engine.adam_step,
            loss_scale=engine.loss_scale,
            gpu_seconds=seconds * comms.topology.world_size,
            is_bad=is_bad,
        )
        votes.step = state.step
        metrics.stepped(state.step, state.target_tokens)
        if applied.is_applied:
            state = replace(state, norms=bad_steps.remember(state.norms, applied.grad_norm))
        if is_bad and (bad := account.bad_step(state.step, fed_from, step.num_rows, loss, applied, comms)):
            on_bad_step(bad)
        slowest, told = stragglers.judge(own_seconds) if stragglers is not None else (None, None)
        budget.stepped(state.step, seconds, state.tokens)
        for line in filter(None, (told, budget.told(cadence.last_step))):
            _log.warning(line)
        if cadence.is_due(state.step, cadence.log_steps) or is_bad:
            beat("log")
            epochs = epochs_of_sets(state.rows_consumed) if epochs_of_sets is not None else None
            values = account.numbers(
                engine, applied, comms, loss=loss, seconds=seconds, targets=targets, tokens=tokens, epochs=epochs
            )
            values |= {"slowest_rank_ratio": slowest} if slowest is not None else {}
            values |= {"steps_not_applied": state.not_applied} if state.not_applied else {}
            metrics.scalars(state.step, {"learning_rate": rate, **values, **budget.lap()})
        if bad_steps.is_over(state.streak):
            report(checkpoints.finish(waiting))
            return "diverged", state

        # keep
        is_last = state.step >= cadence.last_step and early_stopping is None  # else it is measured as it is saved
        if cadence.is_due(state.step, cadence.evaluate_steps) and not is_last:
            state = evaluated(state)
        if cadence.is_due(state.step, cadence.samples_steps) and state.step < cadence.last_step:
            with contextlib.suppress(AbandonedError), budget.measuring():
                evaluator.answer(state.step, scores, metrics)
        report(checkpoints.finished())
        is_best = state.best is not None and state.best.step == state.step
        if cadence.is_due(state.step, cadence.checkpoint_steps) or retries or is_best:
            beat("save")
            report(checkpoints.begin(engine.fragments, state, waiting))

    # finish: the last step is on its way to the disk while it is measured
    if state.step > checkpoints.begun_step:
        beat("save")
        report(checkpoints.begin(engine.fragments, state, waiting))
    if reason in ("completed", "plateaued", "spent") and (state.step > start_step or not is_measured):
        try:
            was_evaluated = early_stopping is not None and state.score_here is not None  # with all scores
            with budget.measuring():
                evaluator.measure(state.step, scores, metrics, is_scored=was_evaluated)
        except AbandonedError:
            reason = "stopped"
    beat("save")
    report(checkpoints.finish(waiting))
    if state.step > checkpoints.saved_step:
        report(checkpoints.save(engine.fragments, state, waiting))
    return reason, state
