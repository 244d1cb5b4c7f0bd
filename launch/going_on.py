"""Where a run goes on from: its newest checkpoint, with what was changed on purpose, or one before steps that could not be applied."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import yaml

from sft_dist.checkpoint import Checkpoints
from sft_dist.engine import Engine
from sft_dist.errors import CheckpointError, DivergedError
from sft_dist.identity import STREAM, changes
from sft_dist.ledger import Ledger
from sft_dist.model import has_dropout
from sft_dist.rollback import rolled_back, targets
from sft_dist.spikes import BAD_ROWS
from sft_dist.state import Past, TrainState

if TYPE_CHECKING:
    from launch.settle import Plan, Resume

_log = logging.getLogger("sft_dist")


def resume(plan: Plan, checkpoints: Checkpoints, engine: Engine) -> tuple[TrainState, str]:
    """The state to go on from, and a line that says so."""
    found = checkpoints.restore(engine.fragments, plan.resume.from_step)
    path, restored, saved = found or (None, TrainState(), checkpoints.identity)
    state, notes = with_changes(restored, saved, checkpoints.identity, plan.resume)
    if plan.resume.skip_rows and state.rows_consumed >= plan.rows:
        left = plan.rows - state.rows_consumed + plan.resume.skip_rows
        raise CheckpointError(
            f"--skip-rows {plan.resume.skip_rows}: only {left:,} rows of the run are left; skip fewer"
        )
    if path is None:
        return state, "\n".join(["starting at step 0", *notes])
    engine.restored(state.adam_step, state.loss_scale)
    lines = [f"resuming from step {state.step} of {plan.steps(state)} ({path})", *notes]
    before = yaml.safe_load((path / "run.yaml").read_text())["train"]
    now = plan.config.train.model_dump()
    changed = [
        f"train.{key} was {before[key]} until here and is {now[key]} now"
        for key in ("learning_rate", "schedule", "epochs", "max_steps", "warmup_ratio", "precision", "micro_batch_rows")
        if before[key] != now[key]
    ]
    lines += [f"note: {note}" for note in changed]
    state = replace(state, notes=(*state.notes, *(f"step {state.step}: {note}" for note in changed)))
    if before["micro_batch_rows"] != now["micro_batch_rows"] and has_dropout(
        engine.deepspeed.module.config, plan.config.model.lora
    ):
        lines.append("warning: with dropout on, another micro-batch draws otherwise than an uninterrupted run would")
    return state, "\n".join(lines)


def with_changes(
    state: TrainState, saved: Mapping[str, Any], now: Mapping[str, Any], resume: Resume
) -> tuple[TrainState, list[str]]:
    """The state with what was changed on purpose, and a line for each change; the state keeps them too."""
    notes = [f"allowed: {key} was {then!r} and is {value!r} now" for key, (then, value) in changes(saved, now).items()]
    if resume.resets_data:
        notes.append(f"reset: the stream of rows begins again, {state.rows_consumed:,} rows after its beginning")
    if resume.resets_data and not state.step:
        raise CheckpointError(
            "--reset-data: there is no checkpoint to go on from, the stream begins anyway; leave it out"
        )
    if resume.resets_data or any(key in STREAM for key in changes(saved, now)):
        left = Past(
            {key: saved[key] for key in STREAM if key in saved},
            state.begin, state.rows_consumed, state.skipped, state.ledger,
        )  # fmt: skip
        begin = 0 if resume.resets_data else state.rows_consumed
        state = replace(
            state, rows_consumed=begin, begin=begin, skipped=(), ahead=(), ledger=Ledger(), past=(*state.past, left)
        )
    if resume.skip_rows:
        first, last = state.rows_consumed, state.rows_consumed + resume.skip_rows
        notes.append(f"skipped: rows {first:,} to {last - 1:,} of the stream are left out")
        ahead = tuple((max(begin, last), end) for begin, end in state.ahead if end > last)
        state = replace(state, rows_consumed=last, skipped=(*state.skipped, (first, last)), ahead=ahead).past_skipped()
    if notes:  # what was bad was so of another stream, or is behind
        state = replace(state, streak=None)
    return replace(state, notes=(*state.notes, *(f"step {state.step}: {note}" for note in notes))), notes


def roll_back(
    plan: Plan, checkpoints: Checkpoints, engine: Engine, state: TrainState, resumed: TrainState
) -> TrainState:
    """The state of the last checkpoint before the streak of bad steps that `state` is in, with their rows to be skipped.

    Never twice to the same one, nor behind what was changed on purpose: `resumed` is the state that this life began with.
    Raises DivergedError where there is none, or after enough roll-backs.
    """
    streak = state.streak
    assert streak is not None
    is_allowed = state.roll_backs < plan.config.train.bad_steps.max_roll_backs
    found = targets(checkpoints.folder, state, resumed) if plan.topology.is_main and is_allowed else []
    for step in checkpoints.comms.broadcast(found):
        try:
            restored = checkpoints.restore(engine.fragments, step)
            assert restored is not None  # it was found a moment ago
        except CheckpointError as error:  # on every rank
            _log.warning("%s", error)
            continue
        back = resumed if step == resumed.step else restored[1]
        engine.restored(back.adam_step, back.loss_scale)
        made, note = rolled_back(back, state)
        _log.warning("warning: %s", note)
        return made
    why = "with no other checkpoint before them to go back to" if is_allowed else f"after {state.roll_backs} roll-backs"
    raise DivergedError(
        f"steps {streak.first_step} to {state.step} could not be applied, {why} (rows {streak.first_row} to "
        f"{state.rows_consumed - 1} of the stream). Lower train.learning_rate, or look at the records in {plan.run_dir / BAD_ROWS}"
    )
