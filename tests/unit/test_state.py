import json
from dataclasses import asdict, replace

import pytest

from sft_dist import account
from sft_dist.ledger import Ledger
from sft_dist.limits import Best, EarlyStopping
from sft_dist.state import Past, TrainState


def test_a_state_one_step_later_adds_up():
    start = TrainState()
    assert start == TrainState(0, 0, 0, 0, 0, 0.0)
    first = start.after(rows=8, tokens=100, target_tokens=10, fed=Ledger(8, 1, 2), adam_step=1, gpu_seconds=0.5)
    second = first.after(rows=3, tokens=50, target_tokens=5, fed=Ledger(3, 1, -4), adam_step=1, gpu_seconds=0.25)
    assert second == TrainState(
        step=2, rows_consumed=11, tokens=150, target_tokens=15, adam_step=1, gpu_seconds=0.75, ledger=Ledger(11, 2, -2)
    )
    assert TrainState.from_json(json.dumps(asdict(second))) == second
    evaluated = replace(second, evaluated=(2, 1.5))
    assert TrainState.from_json(json.dumps(asdict(evaluated))) == evaluated
    assert start == TrainState()


def test_what_was_left_on_purpose_is_kept(tmp_path):
    past = Past({"data": "d", "seed": 1}, 0, 40, ((8, 16),), Ledger(32, 5, -6))
    state = TrainState(
        step=5, begin=0, skipped=((40, 48),), past=(past,), notes=("step 5: reset",), loss_scale={"cur_scale": 2.0}
    )
    assert TrainState.from_json(json.dumps(asdict(state))) == state


@pytest.mark.parametrize(
    "text", ['{"steps": 1}', "[]", "7", '{"skipped": 3}', '{"ledger": {"rows": 1, "more": 2}}', "{"]
)
def test_a_state_that_is_none_is_an_error(text):
    with pytest.raises((ValueError, TypeError, AttributeError)):
        TrainState.from_json(text)


def test_what_is_not_judged_is_no_score():
    """Else retention and export would take an evaluation of the warm-up for the best."""
    early = EarlyStopping("validation_loss", patience=2, warmup_steps=7)
    state = account.judged(TrainState(step=6), {"validation_loss": 1.0}, early)
    assert (state.score_here, state.best) == (None, None)
    state = account.judged(replace(state, step=8), {"validation_loss": 2.0}, early)
    assert (state.score_here, state.best) == (2.0, Best(2.0, 8))
    state = account.judged(replace(state, step=9), {"validation_loss": float("nan")}, early)
    assert (state.score_here, state.best) == (None, Best(2.0, 8, since=1))
    assert account.judged(TrainState(step=9), {}, None).score_here is None
