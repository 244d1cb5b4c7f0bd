"""Rows that give no number: whole runs that leave them out, and go back where the weights are to blame."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from launch.certify import verify_run
from sft_dist.config import load
from sft_dist.data.shards import Shards
from sft_dist.limits import StopRequest
from tests.invariants import runs
from tests.workers import RankError, run_workers

PLAIN = ("train.schedule=constant", "train.warmup_ratio=0", "evaluate.samples=0", "checkpoint.every_steps=4")
POISONED = range(48, 72)  # the ordinals of steps 7, 8 and 9; the checkpoint before is that of step 4


class OnceBack(StopRequest):
    """Wanted once the run has rolled back and done one step again."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__()
        self.run_dir = run_dir

    def is_wanted(self) -> bool:
        listed = self.run_dir / "bad_rows.jsonl"
        is_back = listed.exists() and len(listed.read_text().splitlines()) == 3
        if is_back and [line["step"] for line in runs.curve(self.run_dir) if "loss" in line][-1:] == [5]:
            self.cause = "the test"
        return self.cause is not None


def run(topology, path, overrides, poisoned=(), skip_rows=0, stops_once_back=False, resume=None):
    import os

    import torch

    from launch import train
    from sft_dist.engine import Engine
    from sft_dist.topology import Life

    torch.set_num_threads(1)
    os.environ["WORLD_SIZE"] = str(topology.world_size)
    config = load(path, overrides)
    plan = train.Plan.of(config, topology, Life("test"), train.Resume(**(resume or {"skip_rows": skip_rows})))
    forward = Engine._scores

    def poison(engine, micro_batch, *rest):
        scores, first = forward(engine, micro_batch, *rest), micro_batch.first_ordinal
        is_bad = bool(set(poisoned) & set(range(first, first + len(micro_batch.rows))))
        bad = {"loss": scores.loss * float("nan"), "log_probs": scores.log_probs * float("nan")}
        return scores._replace(**bad) if is_bad else scores

    Engine._scores = poison
    return train.run_plan(plan, OnceBack(Path(config.run_dir)) if stops_once_back else StopRequest())


@pytest.fixture(scope="module")
def expected(task, tmp_path_factory):
    """What a person would have done by hand: stop after step 6, and go on 24 rows later."""
    run_dir = tmp_path_factory.mktemp("expected") / "run"
    where = (f"run_dir={run_dir}", *PLAIN)
    run_workers(run, 2, task, (*where, "train.max_steps=6"))
    run_workers(run, 2, task, where, skip_rows=len(POISONED))
    return run_dir


def test_the_run_goes_back_and_past_the_rows(task, expected, tmp_path):
    run_dir = tmp_path / "run"
    run_workers(run, 2, task, (f"run_dir={run_dir}", *PLAIN), poisoned=POISONED)
    assert runs.numbers(run_dir) == runs.numbers(expected), "to the bit"
    state = json.loads((run_dir / "checkpoints/latest/state.json").read_text())
    by_hand = json.loads((expected / "checkpoints/latest/state.json").read_text())
    assert state["ledger"] == by_hand["ledger"]
    assert state["skipped"] == by_hand["skipped"] == [[48, 72]]
    assert (state["step"], state["roll_backs"], state["rolled_to"], state["ahead"]) == (9, 1, 4, [])
    assert state["notes"] == [
        "step 9: rolled back to step 4; the ordinals 48 to 71 of the 3 steps that could not be applied are skipped"
    ]
    assert verify_run(run_dir).is_right
    assert [line["step"] for line in runs.curve(run_dir) if "loss" in line] == list(range(1, 10))
    assert any(run_dir.glob("metrics.jsonl.*")), "what was cut off is kept"
    runs.check_charts(run_dir)
    assert [line["step"] for line in runs.curve(run_dir) if "config" in line] == [0], "once, as it did not change"
    listed = [json.loads(line) for line in (run_dir / "bad_rows.jsonl").read_text().splitlines()]
    assert [(line["step"], line["begin"], line["loss"]) for line in listed] == [
        (7, 48, "nan"),
        (8, 56, "nan"),
        (9, 64, "nan"),
    ]
    shards = Shards.open(task.parent / "shards/train")
    for line in listed:
        assert len(line["rows"]) == 8
        assert {row["row"]: row["records"] for row in line["rows"]} == shards.origins(
            [row["row"] for row in line["rows"]]
        )
        assert all(row["records"] for row in line["rows"])
    name, _, number = listed[0]["rows"][0]["records"][0].rpartition(":")
    assert name.endswith("messages")
    assert 1 <= int(number) <= 260


def test_the_decision_survives_the_end_of_a_life(task, expected, tmp_path):
    where = (f"run_dir={tmp_path / 'run'}", *PLAIN)
    run_workers(run, 2, task, where, poisoned=POISONED, stops_once_back=True)
    state = json.loads((tmp_path / "run/checkpoints/latest/state.json").read_text())
    assert (state["step"], state["ahead"]) == (5, [[48, 72]])
    run_workers(run, 1, task, where, poisoned=POISONED)  # on another number of ranks
    ours = json.loads((tmp_path / "run/checkpoints/latest/state.json").read_text())
    by_hand = json.loads((expected / "checkpoints/latest/state.json").read_text())
    for name in ("step", "rows_consumed", "ledger", "skipped", "adam_step", "target_tokens"):
        assert ours[name] == by_hand[name]
    assert verify_run(tmp_path / "run").is_right


def test_a_single_one_is_passed_over(task, tmp_path):
    where = (f"run_dir={tmp_path / 'run'}", *PLAIN)
    run_workers(run, 2, task, where, poisoned=range(50, 51))
    state = json.loads((tmp_path / "run/checkpoints/latest/state.json").read_text())
    assert (state["step"], state["adam_step"], state["not_applied"], state["streak"]) == (12, 11, 1, None)
    [line] = [json.loads(line) for line in (tmp_path / "run/bad_rows.jsonl").read_text().splitlines()]
    assert len(line["rows"]) == 4, "those of its micro-batch"
    assert verify_run(tmp_path / "run").is_right


@pytest.mark.parametrize(
    ("poisoned", "overrides", "why"),
    [
        (range(96), (), "with no other checkpoint before them to go back to"),
        (range(48, 96), ("train.bad_steps.max_roll_backs=0",), "after 0 roll-backs"),
    ],
)
def test_without_a_way_back_it_ends_and_says_so(task, tmp_path, poisoned, overrides, why):
    where = (f"run_dir={tmp_path / 'run'}", *PLAIN, *overrides)
    with pytest.raises(
        RankError, match=rf"DivergedError: steps \d to \d could not be applied, {why}.*Lower train.learning_rate"
    ):
        run_workers(run, 2, task, where, poisoned=poisoned)


def resumed(topology, path, overrides, poisoned, **resume):
    """One rank that goes on in another way than before."""
    return run(topology, path, overrides, poisoned, resume=resume)


def test_a_second_roll_back_remembers_the_first(task, tmp_path):
    """Six bad steps in a row: back to step 6, past three; then to step 4, past all six."""
    where = (
        f"run_dir={tmp_path / 'run'}",
        *PLAIN,
        "checkpoint.every_steps=2",
        "checkpoint.keep_last=4",
        "train.max_steps=14",
    )
    run_workers(run, 2, task, where, poisoned=range(48, 96))
    state = json.loads((tmp_path / "run/checkpoints/latest/state.json").read_text())
    assert (state["roll_backs"], state["rolled_to"]) == (2, 4)
    assert state["skipped"] == [[48, 72], [72, 96]]
    assert [note.split(";")[0] for note in state["notes"]] == [
        "step 9: rolled back to step 6",
        "step 9: rolled back to step 4",
    ]
    assert (state["step"], state["rows_consumed"], state["adam_step"]) == (8, 112, 8)
    assert verify_run(tmp_path / "run").is_right


@pytest.fixture(scope="module")
def six(task, tmp_path_factory):
    """A run of six steps."""
    run_dir = tmp_path_factory.mktemp("six") / "run"
    run_workers(run, 2, task, (f"run_dir={run_dir}", *PLAIN, "train.max_steps=6"))
    return run_dir


@pytest.mark.parametrize("change", [{"skip_rows": 8}, {"resets_data": True}, {"allow": ("seed-change",)}])
def test_a_roll_back_keeps_what_was_changed_on_purpose(task, six, tmp_path, change):
    """Changed at step 6, and bad at once: the checkpoint of step 6 stands for what this life began with."""
    shutil.copytree(six, tmp_path / "run", symlinks=True)
    where = (f"run_dir={tmp_path / 'run'}", *PLAIN)
    begin = {"skip_rows": 56, "resets_data": 0}.get(next(iter(change)), 48)
    seed = ("train.seed=1",) if "allow" in change else ()
    run_workers(resumed, 2, task, (*where, *seed), range(begin, begin + 24), **change)
    state = json.loads((tmp_path / "run/checkpoints/latest/state.json").read_text())
    assert (state["roll_backs"], state["rolled_to"]) == (1, 6)
    by_hand = [[48, 56]] if "skip_rows" in change else []
    assert [list(each) for each in state["skipped"]] == [*by_hand, [begin, begin + 24]]
    assert len([note for note in state["notes"] if ": train.max_steps was 6" not in note]) == 2
    assert verify_run(tmp_path / "run").is_right


def test_a_stop_within_a_streak_keeps_the_way_back(task, expected, tmp_path):
    where = (f"run_dir={tmp_path / 'run'}", *PLAIN, "checkpoint.keep_last=1")
    run_workers(run, 2, task, (*where, "train.max_steps=8"), poisoned=POISONED)  # ends after two of three
    state = json.loads((tmp_path / "run/checkpoints/latest/state.json").read_text())
    assert (state["step"], state["streak"]["steps"]) == (8, 2)
    run_workers(run, 2, task, where, poisoned=POISONED)
    state = json.loads((tmp_path / "run/checkpoints/latest/state.json").read_text())
    by_hand = json.loads((expected / "checkpoints/latest/state.json").read_text())
    assert state["ledger"] == by_hand["ledger"]
    assert state["rolled_to"] == 4


def test_rows_whose_records_cannot_be_read_end_no_run(task, tmp_path):
    shutil.copytree(task.parent / "shards", tmp_path / "shards")
    where = (f"run_dir={tmp_path / 'run'}", f"prepare.out={tmp_path / 'shards'}", *PLAIN)
    run_workers(unnamed, 2, task, where)
    [line] = [json.loads(line) for line in (tmp_path / "run/bad_rows.jsonl").read_text().splitlines()]
    assert [row["records"] for row in line["rows"]] == [[]] * 4


def unnamed(topology, path, overrides):
    from sft_dist.data.shards import Shards

    def fails(self, rows):
        raise FileNotFoundError(2, "No such file or directory", "00000.origins")

    Shards.origins = fails
    return run(topology, path, overrides, range(50, 51))
