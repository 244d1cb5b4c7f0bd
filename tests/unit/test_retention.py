import json
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.retention import Retention, list_folders, score_at
from sft_dist.state import TrainState


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(1), {500}),
        (Retention(2), {400, 500}),
        (Retention(1, keep_best=1), {200, 500}),
        (Retention(1, keep_best=2), {200, 300, 500}),
        (Retention(1, keep_best=9), {100, 200, 300, 500}),
        (Retention(1, keep_every_steps=200), {200, 400, 500}),
        (Retention(9), {100, 200, 300, 400, 500}),
    ],
)
def test_the_last_the_best_and_every_nth_stay(retention, kept):
    assert retention.kept({100: 3.0, 200: 1.0, 300: 2.0, 400: None, 500: None}) == kept


def test_of_equal_losses_the_later_one_is_the_best():
    assert Retention(1, keep_best=1).kept({1: 2.0, 2: 2.0, 3: None}) == {2, 3}


@given(
    st.dictionaries(st.integers(0, 99), st.none() | st.floats(0, 9)),
    st.integers(1, 4),
    st.integers(0, 4),
    st.none() | st.integers(1, 9),
)
def test_the_newest_always_stays_and_nothing_is_kept_that_is_not_there(losses, last, best, every):
    kept = Retention(last, best, every).kept(losses)
    assert kept <= losses.keys()
    assert len(kept) >= min(last, len(losses))
    assert not losses or max(losses) in kept


def test_the_loss_of_a_step_is_the_one_measured_at_it(tmp_path):
    for evaluated, loss in (((7, 2.5), 2.5), ((5, 2.5), None), (None, None)):
        (tmp_path / "state.json").write_text(json.dumps(asdict(TrainState(step=7, evaluated=evaluated))))
        assert score_at(tmp_path) == loss
    (tmp_path / "state.json").write_text("{cut")
    assert score_at(tmp_path) is None
    assert score_at(tmp_path / "nowhere") is None


def test_only_published_folders_are_checkpoints(tmp_path):
    for name in (
        "step-00000010",
        "step-100000000",
        "step-00000009",
        ".step-00000011.partial",
        "step-00000008.damaged-1",
        "latest",
    ):
        (tmp_path / name).mkdir()
    assert [path.name for path in list_folders(tmp_path)] == ["step-00000009", "step-00000010", "step-100000000"]
    assert list_folders(tmp_path / "nowhere") == []
