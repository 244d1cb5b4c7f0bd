"""Whole runs that end before their last step because their validation no longer improves, and one that improves slowly."""

from __future__ import annotations

import itertools
import json

import pytest

from sft_dist.config import load
from sft_dist.data.build import prepare
from sft_dist.limits import Verdict
from tests.invariants import runs
from tests.workers import run_workers

EARLY = ("evaluate.every_steps=1", "evaluate.samples=0", "checkpoint.keep_last=1")


@pytest.fixture
def path(tmp_path):
    path = runs.run_file(tmp_path)
    prepare(load(path).prepare)
    return path


def early(patience, min_improvement, metric="validation_loss"):
    return f"evaluate.early_stopping={{metric: {metric}, patience: {patience}, min_improvement: {min_improvement}}}"


def steps(folder):
    return [line["step"] for line in runs.curve(folder / "run") if "loss" in line]


def saved(folder):
    return sorted(path.name for path in (folder / "run" / "checkpoints").glob("step-????????"))


def call_export(topology, *arguments):
    from launch import after

    return after.export_run(*arguments)


def test_a_plateau_ends_the_run_and_its_best_checkpoint_is_kept_and_exported(tmp_path, path):
    still = (*EARLY, "train.learning_rate=1e-12", early(2, 0.01))
    run_workers(runs.run, 2, path, still)
    assert steps(tmp_path) == [1, 2, 3]  # the first is the best, two more have not improved on it
    verdict = Verdict.read(tmp_path / "run" / "verdicts", "test-0")
    assert (verdict.reason, verdict.step) == ("plateaued", 3)
    assert verdict.detail.startswith("validation_loss has not improved on 5.")
    assert saved(tmp_path) == ["step-00000001", "step-00000003"]
    assert runs.measured(tmp_path / "run", 3)  # once
    run_workers(call_export, 1, tmp_path / "run", tmp_path / "out", None)
    assert json.loads((tmp_path / "out" / "sft_dist.json").read_text())["step"] == 1

    run_workers(runs.run, 1, path, still)  # again: it is over, and stays so
    assert steps(tmp_path) == [1, 2, 3]
    run_workers(runs.run, 1, path, (*still, early(4, 0.01)))  # with more patience it goes on, and remembers
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    assert "step-00000001" in saved(tmp_path)


def test_a_slow_improvement_does_not(tmp_path, path):
    run_workers(runs.run, 2, path, (*EARLY, early(3, 0.3)))
    losses = [line["validation_loss"] for line in runs.curve(tmp_path / "run") if "validation_loss" in line]
    gains = [before - after for before, after in itertools.pairwise(losses)]
    assert sum(gain > 0.3 for gain in gains) < len(gains) / 2  # most single steps gain less
    assert Verdict.read(tmp_path / "run" / "verdicts", "test-0").reason == "completed"


def test_of_a_label_task_more_is_better(tmp_path, path):
    run_workers(runs.run, 2, path, (*EARLY, "train.max_steps=3", early(9, 0, "validation_accuracy")))
    state = json.loads((tmp_path / "run" / "checkpoints" / saved(tmp_path)[-1] / "state.json").read_text())
    accuracies = {
        line["step"]: line["validation_accuracy"]
        for line in runs.curve(tmp_path / "run")
        if "validation_accuracy" in line
    }
    assert state["best"]["value"] == max(value for step, value in accuracies.items() if step)
    assert -state["evaluated"][1] == accuracies[state["evaluated"][0]]
