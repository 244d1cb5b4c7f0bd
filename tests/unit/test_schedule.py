import pytest

from sft_dist.schedule import learning_rate


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_no_step_is_wasted_and_the_peak_is_reached(schedule):
    rates = [learning_rate(s, 100, peak=2.0, schedule=schedule, warmup_ratio=0.1) for s in range(100)]
    assert min(rates) > 0
    assert max(rates) == pytest.approx(2.0)
    assert rates[:10] == pytest.approx([0.2 * n for n in range(1, 11)])
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_without_warmup_the_first_step_is_the_peak():
    assert learning_rate(0, 10, peak=1.0, schedule="constant", warmup_ratio=0.0) == 1.0
