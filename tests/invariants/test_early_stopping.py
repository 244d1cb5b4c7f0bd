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

CONSTANT = ("train.schedule=constant", "train.warmup_ratio=0")
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
    from launch import hand_over

    return hand_over.export_run(*arguments)


def test_a_plateau_ends_the_run_and_its_best_checkpoint_is_kept_and_exported(tmp_path, path):
    """A learning rate so high that the third evaluation is better than the three after it."""
    wild = (*EARLY, *CONSTANT, "train.learning_rate=0.2")
    run_workers(runs.run, 2, path, (*wild, early(3, 0)))
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    verdict = Verdict.read(tmp_path / "run" / "verdicts", "test-0")
    assert (verdict.reason, verdict.step) == ("plateaued", 6)
    assert " of step 3 in 3 evaluations" in verdict.detail
    assert saved(tmp_path) == ["step-00000003", "step-00000006"]
    assert runs.measured(tmp_path / "run", 6)  # once
    run_workers(call_export, 1, tmp_path / "run", tmp_path / "out", None)
    assert json.loads((tmp_path / "out" / "sft_dist.json").read_text())["step"] == 3

    run_workers(runs.run, 2, path, (*wild, early(3, 0)))  # again: it is over, and stays so
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    run_workers(runs.run, 2, path, (*wild, early(4, 0)))  # with more patience it goes on, and remembers
    continued = runs.numbers(tmp_path / "run")
    run_workers(runs.run, 2, path, (*wild, early(4, 0), f"run_dir={tmp_path / 'patient'}"))
    assert continued == runs.numbers(tmp_path / "patient")
    assert len(continued) > 6


def test_a_slow_improvement_does_not(tmp_path, path):
    run_workers(runs.run, 2, path, (*EARLY, *CONSTANT, early(3, 0.3)))
    losses = [line["validation_loss"] for line in runs.curve(tmp_path / "run") if "validation_loss" in line]
    gains = [before - after for before, after in itertools.pairwise(losses)]
    assert max(gains[1:]) < 0.3  # none of them would do alone
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
