import time

import pytest
import torch

from sft_dist.stragglers import IN_A_ROW, Stopwatch, Stragglers


def test_a_stopwatch_counts_what_it_is_around_and_starts_anew_when_taken():
    stopwatch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with stopwatch:
            time.sleep(0.02)
        time.sleep(0.05)
    assert 0.04 <= stopwatch.take() < 0.09
    assert stopwatch.take() == 0.0


def test_on_a_gpu_its_own_clock_is_read_and_only_when_the_seconds_are_taken(monkeypatch):
    """The events stand in for CUDA's: each knows when it was recorded, in milliseconds."""
    now, read = [0.0], []

    class Event:
        def __init__(self, *, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def elapsed_time(self, end):
            read.append(end)
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    stopwatch = Stopwatch(torch.device("cuda"))
    for milliseconds in (30.0, 12.0):
        with stopwatch:
            now[0] += milliseconds
        now[0] += 500.0
    assert read == []
    assert stopwatch.take() == pytest.approx(0.042)
    assert (len(read), stopwatch.take()) == (2, 0.0)


# no test may need a GPU: without one the events are stood in for, above
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_stopwatch_reads_the_clock_of_a_gpu():
    device = torch.device("cuda")
    stopwatch, matrix = Stopwatch(device), torch.ones(2048, 2048, device=device)
    with stopwatch:
        matrix @ matrix
    torch.cuda.synchronize()
    assert 0 < stopwatch.take() < 10


def test_a_slow_rank_is_named_once_and_again_after_it_has_recovered():
    stragglers = Stragglers(["n1", "n1", "n2", "n2"])
    slow, even = [1.0, 1.1, 1.0, 1.4], [1.0, 1.1, 1.0, 1.1]
    told = [stragglers.judge(seconds)[1] for seconds in [slow] * (2 * IN_A_ROW) + [even] + [slow] * IN_A_ROW]
    assert [number for number, line in enumerate(told, 1) if line] == [IN_A_ROW, 3 * IN_A_ROW + 1]
    assert told[IN_A_ROW - 1].startswith(
        "warning: slow for 5 steps now, so that all wait: rank 3 on n2. The slowest computes 1.33"
    )


def test_a_few_milliseconds_are_not_worth_a_word():
    stragglers = Stragglers(["n1", "n2"])
    assert [stragglers.judge([0.01, 0.05])[1] for _ in range(IN_A_ROW)] == [None] * IN_A_ROW


def test_a_single_slow_step_is_noise():
    stragglers = Stragglers(["n1", "n2"])
    for seconds in ([1.0, 9.0], [9.0, 1.0]) * 10:
        ratio, told = stragglers.judge(seconds)
        assert told is None
        assert ratio == pytest.approx(1.8)
