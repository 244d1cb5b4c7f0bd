"""Every second of a life belongs to one phase, over kills and roll-backs too."""

import math

import pytest

from sft_dist import usage
from sft_dist.glossary import metric
from sft_dist.goodput import goodput, spans, time_by_part
from sft_dist.phases import PHASES, PhaseClock, lost_work
from sft_dist.usage import Budget, Journal, read_usage


class Clock:
    """A clock that is set by hand."""

    def __init__(self):
        self.now = 50.0

    def __call__(self):
        return self.now


def test_the_phases_add_up_to_the_time_whenever_they_are_asked():
    clock = Clock()
    phases, laps = PhaseClock(already=4.0, clock=clock), []
    for doing, seconds in [
        ("build the engine", 2.0), ("agree", 0.25), ("vote", 0.5), ("forward and backward", 3.0), ("account", 1.0),
        ("evaluate", 5.0), ("vote in an evaluation", 0.125), ("save", 0.75), ("restore", 1.5), ("data", 0.5), ("log", 0.0625),
    ]:  # fmt: skip
        phases.enter(doing)
        clock.now += seconds
        assert math.fsum(phases.totals().values()) == 4.0 + clock.now - 50.0
        if doing in ("account", "log"):
            laps.append(phases.lap())
    assert phases.totals() == {
        "start_up": 4.0 + 2.0 + 1.5, "wait": 0.75, "compute": 4.0, "evaluate": 5.125, "save": 0.75, "data": 0.5, "log": 0.0625,
    }  # fmt: skip
    assert laps[0] == {"start_up_seconds": 6.0, "wait_seconds": 0.75, "compute_seconds": 4.0}
    assert {name: sum(lap.get(f"{name}_seconds", 0.0) for lap in laps) for name in PHASES} == phases.totals()
    assert phases.lap() == {}
    assert all(metric(name).tag == f"time/{name}" for lap in laps for name in lap)


def line(step, compute, **more):
    return {"step": step, "loss": 1.0, "compute_seconds": compute, **more}


@pytest.mark.parametrize(
    ("resumed", "steps", "seconds"),
    [(6, 0, {}), (4, 2, {"compute": 8.0}), (3, 3, {"compute": 9.5}), (0, 6, {"compute": 12.0})],
)
def test_what_lies_behind_the_step_that_a_run_goes_on_from_is_lost(resumed, steps, seconds):
    lines = [line(2, 1.0, evaluate_seconds=7.0), line(4, 3.0), {"step": 4, "validation_loss": 2.0}, line(6, 8.0)]
    assert lost_work(lines, resumed) == (steps, seconds)


@pytest.fixture
def clock(monkeypatch):
    """The clock of the journal, and that of its phases."""
    made = Clock()
    monkeypatch.setattr(usage.time, "time", made)
    monkeypatch.setattr(usage, "PhaseClock", lambda already: PhaseClock(already, made))
    return made


def test_a_killed_life_is_known_to_its_last_metrics_and_what_is_done_twice_is_lost(tmp_path, clock):
    path = tmp_path / "usage.jsonl"
    first, lines = Journal(path, "7-0", gpus=2, began=40.0), []
    first.goes_on(0, [])
    for step in range(1, 7):
        first.phases.enter("data")
        clock.now += 0.5
        first.phases.enter("forward and backward")
        clock.now += 2.0
        lines.append({"step": step, "loss": 1.0, **first.phases.lap()})
        if step == 3:
            first._append()  # its last beat
    clock.now = 200.0
    second = Journal(path, "7-1", gpus=4, began=190.0)
    assert second.before == (17.5 * 2)  # as far as the beats go
    second.goes_on(4, lines)
    assert second.before == 25.0 * 2
    second.phases.enter("forward and backward")
    clock.now = 210.0
    second._append()
    lives = spans(read_usage(path))
    assert [(life.life, life.seconds, life.from_steps, life.lost_steps) for life in lives] == [
        ("7-0", 25.0, (0,), 0),
        ("7-1", 20.0, (4,), 2),
    ]
    parts = time_by_part(lives)
    assert parts == {
        "compute": 12.0 - 4.0 + 10.0, "data": 3.0 - 1.0, "start_up": 10.0, "restart": 10.0, "lost": 5.0, "between": 125.0,
    }  # fmt: skip
    assert math.fsum(parts.values()) == 210.0 - 40.0
    assert goodput(parts) == 18.0 / 170.0


def test_a_roll_back_loses_what_its_own_life_computed(tmp_path, clock):
    journal = Journal(tmp_path / "usage.jsonl", "7-0", gpus=1, began=50.0)
    journal.goes_on(0, [])
    journal.goes_on(2, [line(2, 4.0), line(4, 6.0)])
    journal.goes_on(1, [line(2, 4.0)])
    journal._append()
    (life,) = spans(read_usage(journal.path))
    assert (life.from_steps, life.lost_steps, life.lost_seconds) == ((0, 2, 1), 3, {"compute": 8.0})


def test_a_life_before_that_tells_more_than_the_metrics_is_left_as_it_is(tmp_path, clock):
    path = tmp_path / "usage.jsonl"
    first = Journal(path, "7-0", gpus=1, began=50.0)
    first._append()  # killed before its first step
    clock.now = 90.0
    second = Journal(path, "7-1", gpus=1, began=80.0)
    second.goes_on(0, [line(1, 500.0)])
    assert len(read_usage(path)) == 1
    second._append()
    clock.now = 100.0
    Journal(path, "7-2", gpus=1, began=95.0).goes_on(0, [line(1, 5.0)])  # the second one lived 10 s
    assert len(read_usage(path)) == 2


def test_lives_of_older_versions_count_as_not_recorded():
    old = {"life": "7-0", "began": 0.0, "at": 60.0, "gpus": 8}
    new = {"life": "7-1", "began": 60.0, "at": 100.0, "gpus": 8, "phase_seconds": {"start_up": 10.0, "compute": 30.0}}
    odd = {"life": "7-2", "began": 100.0, "at": 110.0, "gpus": 8, "phase_seconds": "much", "lost_seconds": 3}
    assert time_by_part(spans([old, new, odd])) == {"compute": 30.0, "restart": 10.0, "unknown": 70.0}
    assert goodput(time_by_part(spans([old]))) is None
    assert time_by_part([]) == {}


def test_ranks_without_a_journal_count_nothing():
    budget = Budget()
    budget.enter("data")
    assert budget.lap() == {}
