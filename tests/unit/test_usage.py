import json
import time
from pathlib import Path

import pytest

from sft_dist import usage
from sft_dist.usage import Budget, Journal, gpu_seconds, read_usage


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(usage.time, "time", lambda: now[0])
    return now


def test_lives_add_up_over_kills_other_sizes_and_cut_lines(tmp_path, clock):
    path = tmp_path / "usage.jsonl"
    killed = Journal(path, "7-0", gpus=8, began=990.0)
    killed._append()
    clock[0] = 1100.0
    killed._append()  # its last beat: it never closes
    with path.open("a") as file:
        file.write('{"life": "7-0", "beg')  # cut by a crash
    clock[0] = 2000.0
    with Journal(path, "7-1", gpus=4, began=1950.0) as second:
        assert second.before == 110 * 8
        clock[0] = 2050.0
        assert second.gpu_seconds() == 110 * 8 + 100 * 4
    lines = read_usage(path)
    assert gpu_seconds(lines) == 110 * 8 + 100 * 4
    assert [line["life"] for line in lines] == ["7-0", "7-0", "7-1", "7-1"]
    assert Journal(path, "7-2", gpus=1, began=2050.0).before == 110 * 8 + 100 * 4


def test_the_metrics_are_of_all_lives_and_the_main_ranks(tmp_path, clock):
    path = tmp_path / "usage.jsonl"
    Journal(path, "7-0", gpus=2, began=-6200.0)._append()  # 7,200 s, and killed
    with Journal(path, "7-1", gpus=1, began=-2600.0) as journal:
        assert Budget(price=2.5, currency="EUR", journal=journal).numbers == {"gpu_hours": 5.0, "cost": 12.5}
        assert Budget(journal=journal).numbers == {"gpu_hours": 5.0}
    assert Budget(price=2.5, currency="EUR").numbers == {}


def test_what_was_used_is_never_less_than_the_metrics_told_before_a_kill(tmp_path, clock):
    """Its last line was of 10 s ago, and what is an x-axis must not go back."""
    path = tmp_path / "usage.jsonl"
    Journal(path, "7-0", gpus=2, began=900.0)._append()  # 200 GPU-seconds, and killed 10 s later
    clock[0] = 1011.0
    with Journal(path, "7-1", gpus=2, began=1010.0, told_gpu_seconds=220.0) as journal:
        assert journal.gpu_seconds() == 220.0
        clock[0] = 1013.0
        assert journal.gpu_seconds() == 224.0
    assert Journal(path, "7-2", gpus=2, began=1013.0, told_gpu_seconds=100.0).gpu_seconds() == 206.0


def test_a_beat_is_written_while_nobody_asks(tmp_path, monkeypatch):
    monkeypatch.setattr(usage, "BEAT_SECONDS", 0.01)
    path = tmp_path / "usage.jsonl"
    with Journal(path, "7-0", gpus=1, began=0.0):
        while len(read_usage(path)) < 3:
            pass


def test_what_it_took_to_measure_is_known_to_the_next_life(tmp_path):
    path = tmp_path / "usage.jsonl"
    with Journal(path, "7-0", gpus=1, began=0.0) as journal:
        with Budget(journal=journal).measuring():
            time.sleep(0.02)
        took = journal.measure_seconds
    assert took >= 0.02
    assert Journal(path, "7-1", gpus=1, began=0.0).measure_seconds == took


def test_a_full_disk_costs_no_run_and_the_account_is_told_later(tmp_path, clock, caplog, monkeypatch):
    path = tmp_path / "usage.jsonl"
    journal = Journal(path, "7-0", gpus=1, began=1000.0)
    journal._append()
    journal.path = Path("/dev/full")
    for _ in range(2):
        journal._append()
    assert [record.getMessage() for record in caplog.records] == [
        "/dev/full: No space left on device: what this life uses is written when it can be"
    ]
    path.write_text(path.read_text() + '{"life": "7-')  # as far as it came
    journal.path, clock[0] = path, 1060.0
    journal._append()
    assert gpu_seconds(read_usage(path)) == 60.0


def test_no_file_and_odd_lines_are_no_usage(tmp_path):
    assert read_usage(tmp_path / "nowhere") == []
    (tmp_path / "odd").write_text("7\n[]\n{}\n" + json.dumps({"life": "a"}) + "\n")
    assert read_usage(tmp_path / "odd") == []


@pytest.fixture
def journal(tmp_path, clock):
    return Journal(tmp_path / "usage.jsonl", "7-0", gpus=2, began=1000.0)


def test_gpu_hours_keep_room_for_a_step_two_saves_and_the_last_evaluation(journal, clock):
    journal.measure_seconds = 20.0
    budget = Budget(gpu_seconds=2 * 100.0, price=3.6, currency="EUR", journal=journal, clock=lambda: clock[0])
    budget.stepped(1, 10.0, 500)
    clock[0] = 1000.0 + 100 - 10 - 2 * 5 - 20
    assert not budget.is_spent(save_seconds=5.0)
    clock[0] += 1.0
    assert budget.is_spent(save_seconds=5.0)
    assert budget.cause == (
        "0.03 GPU-hours (0.12 EUR) of 0.06 GPU-hours (0.20 EUR) used, and a step and the end take 40 s"
    )


def test_a_deadline_and_a_number_of_tokens_end_it_too(journal, clock):
    budget = Budget(deadline=1100.0, journal=journal, clock=lambda: clock[0])
    budget.stepped(1, 10.0, 500)
    assert not budget.is_spent(0.0)
    clock[0] = 1091.0
    assert budget.is_spent(0.0)
    assert budget.cause == "the deadline is in 9 s, and a step and the end take 10 s"
    tokens = Budget(max_tokens=1000)
    assert not tokens.exceeds(1000)
    assert tokens.exceeds(1001)


def test_without_limits_nothing_ends_and_nothing_is_told(journal, clock):
    budget = Budget(journal=journal, clock=lambda: clock[0])
    for step in range(30):
        budget.stepped(step, 1.0, 0)
        clock[0] += 100.0
    assert not budget.is_spent(1e9)
    assert budget.told(100) is None


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        (
            {"gpu_seconds": 2 * 10 * 50.0},
            "budget: 0.06 GPU-hours of 0.28 GPU-hours used; at this rate it ends at step 50 of 100",
        ),
        ({"deadline": 1000.0 + 10 * 31.0}, "budget: 0.06 GPU-hours used; at this rate it ends at step 31 of 100"),
        ({"max_tokens": 4000}, "budget: 0.06 GPU-hours used; at this rate it ends at step 40 of 100"),
        ({"max_tokens": 10**9}, "budget: 0.06 GPU-hours used; it lasts to the end"),
    ],
)
def test_at_which_step_it_will_end_is_told_after_ten_steps_and_then_every_ten_minutes(journal, clock, limits, told):
    budget = Budget(**limits, journal=journal, clock=lambda: clock[0])
    lines = []
    for step in range(12):
        budget.stepped(step, 10.0, 100 * step)
        lines.append(budget.told(100))
        clock[0] += 10.0
    assert [line for line in lines if line] == [told]
    assert lines[10] == told
