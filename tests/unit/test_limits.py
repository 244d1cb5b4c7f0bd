import os
import signal

import pytest

from sft_dist import limits
from sft_dist.limits import MARGIN_SECONDS, Best, EarlyStopping, StopRequest, Verdict


def test_a_signal_sets_a_flag_and_nothing_else():
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        for number in previous:
            stop = StopRequest()
            stop.install()
            os.kill(os.getpid(), number)
            assert stop.is_wanted()
            assert stop.cause == signal.Signals(number).name
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def test_a_stop_file_is_a_wish(tmp_path):
    stop = StopRequest(tmp_path / "stop")
    assert not stop.is_wanted()
    (tmp_path / "stop").write_text("SIGINT\n")
    assert stop.is_wanted()
    assert stop.cause == "SIGINT"


def test_a_verdict_comes_back_as_it_was_written(tmp_path):
    verdict = Verdict("42-1", "stopped", 17, "asked to stop by SIGTERM")
    verdict.write(tmp_path / "verdicts")
    assert Verdict.read(tmp_path / "verdicts", "42-1") == verdict
    assert Verdict.read(tmp_path / "verdicts", "42-2") is None
    assert [path.name for path in (tmp_path / "verdicts").iterdir()] == ["42-1.json"]


@pytest.fixture
def clock(monkeypatch):
    """Both clocks, moved by the test."""
    now = [1000.0]
    monkeypatch.setattr(limits.time, "time", lambda: now[0])
    monkeypatch.setattr(limits.time, "monotonic", lambda: now[0])
    return now


def test_it_leaves_while_two_saves_and_a_vote_still_fit(clock):
    stop = StopRequest(end_time=2000.0)
    stop.save_seconds = 100.0
    for moment in (1000.0, 1030.0, 1040.0, 2000.0 - MARGIN_SECONDS - 200 - 31):  # a vote took 30 s at most so far
        clock[0] = moment
        if moment < 1100:
            assert not stop.is_wanted()
    longest = 2000.0 - MARGIN_SECONDS - 200 - 31 - 1040
    assert stop.is_wanted()  # the last interval was the longest: another one of it would be too much
    assert stop.needed_seconds == MARGIN_SECONDS + longest + 200
    assert stop.cause == f"the end of its time in {MARGIN_SECONDS + 231:.0f} s"


def test_a_life_without_an_end_never_wants_to_leave_by_itself(clock):
    stop = StopRequest()
    clock[0] = 1e12
    assert not stop.is_wanted()


def test_a_life_that_is_asked_often_uses_its_time(clock):
    stop = StopRequest(end_time=2000.0)
    stop.save_seconds = 10.0
    while not stop.is_wanted():
        clock[0] += 1.0
    assert 2000 - clock[0] == pytest.approx(MARGIN_SECONDS + 1 + 20, abs=1.0)


def test_a_grace_period_that_is_too_short_is_told_once(clock):
    stop = StopRequest(grace_seconds=30.0)
    stop.save_seconds = 10.0
    assert stop.grace_warning() is None
    stop.is_wanted()
    clock[0] += 12.0  # a micro-batch
    stop.is_wanted()
    assert stop.grace_warning().startswith("warning: 30 s lie between a preemption and the end, and to leave")
    assert stop.grace_warning() is None


def test_a_verdict_names_nodes_on_one_line_for_a_shell(tmp_path):
    path = Verdict("1-0", "unhealthy", -1, "n3 differs", 75, "n3,n4").write(tmp_path)
    assert '"bad_nodes": "n3,n4"' in path.read_text()


def test_no_number_is_no_improvement_and_never_the_best():
    early = EarlyStopping("validation_loss", patience=2)
    assert early.judge(None, 1, float("nan")) is None
    best = early.judge(None, 2, 1.0)
    assert early.judge(best, 3, float("nan")) == Best(1.0, 2, since=1)
