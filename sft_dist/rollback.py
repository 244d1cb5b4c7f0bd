"""Where a run goes back to when its steps can no longer be applied, and which rows it then leaves out."""

from __future__ import annotations

import contextlib
import re
from dataclasses import replace
from pathlib import Path

from sft_dist.errors import CheckpointError
from sft_dist.manifest import read_state
from sft_dist.retention import list_folders, step_of
from sft_dist.state import TrainState


def targets(folder: Path, state: TrainState, resumed: TrainState) -> list[int]:
    """The steps of the checkpoints before the streak of bad steps that `state` is in, the newest first.

    Not the one that was gone back to before, and none that does not know what was changed on purpose since: `resumed` is the
    state that this life began with, which stands for the checkpoint of its step.
    """
    assert state.streak is not None
    found = []
    for path in reversed(list_folders(folder)):
        step = step_of(path)
        if step < state.streak.first_step and step != state.rolled_to:
            with contextlib.suppress(CheckpointError):  # damaged
                if step == resumed.step or _by_hand(read_state(path)) == _by_hand(state):
                    found.append(step)
    return found


def _by_hand(state: TrainState) -> tuple[str, ...]:
    """What was changed of the stream on purpose; another learning rate or end (`step 6: train.max_steps was …`) is no reason to stay."""
    return tuple(note for note in state.notes if not re.match(r"step \d+: (rolled back to step|train\.)", note))


def rolled_back(back: TrainState, state: TrainState) -> tuple[TrainState, str]:
    """(the state to go on with from a checkpoint's state `back`, what is told), when a run leaves `state` for it.

    The rows of the streak are to be skipped, and all that earlier roll-backs skip behind `back`.

    >>> from sft_dist.spikes import Streak
    >>> state = TrainState(step=9, rows_consumed=72, streak=Streak(7, 48, steps=3))
    >>> made, note = rolled_back(TrainState(step=4, rows_consumed=32), state)
    >>> made.ahead, made.roll_backs, note
    (((48, 72),), 1, 'step 9: rolled back to step 4; the ordinals 48 to 71 of the 3 steps that could not be applied are skipped')
    """
    streak, behind = state.streak, back.rows_consumed
    assert streak is not None
    ordinals = f"{streak.first_row} to {state.rows_consumed - 1}"
    note = (
        f"step {state.step}: rolled back to step {back.step}; the ordinals {ordinals} of the {streak.steps} steps that could not be "
        "applied are skipped"
    )
    known = {(max(begin, behind), end) for begin, end in (*state.ahead, *state.skipped) if end > behind}
    ahead = tuple(sorted({*back.ahead, *known, (streak.first_row, state.rows_consumed)}))
    made = replace(back, ahead=ahead, streak=None, rolled_to=back.step, roll_backs=state.roll_backs + 1)
    return replace(made, notes=(*state.notes, note)).past_skipped(), note
