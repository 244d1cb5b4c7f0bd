"""Whole runs that their budget ends: saved, measured, and gone on with when there is more."""

from __future__ import annotations

import json

from sft_dist.config import load
from sft_dist.data.build import prepare
from sft_dist.limits import Verdict
from sft_dist.usage import gpu_seconds, read_usage
from tests.invariants import runs
from tests.workers import run_workers


def verdict(folder):
    return Verdict.read(folder / "run" / "verdicts", "test-0")


def test_tokens_end_a_run_measured_and_saved_and_more_of_them_continue_it(tmp_path):
    path = runs.run_file(tmp_path)
    prepare(load(path).prepare)
    run_workers(runs.run, 2, path)
    whole = runs.numbers(tmp_path / "run")
    seen = json.loads((tmp_path / "run" / "checkpoints" / "step-00000012" / "state.json").read_text())["tokens"]
    run_workers(runs.run, 1, path, (f"run_dir={tmp_path / 'run'}",))  # again: nothing is left
    assert len(runs.numbers(tmp_path / "run")) == 12

    (tmp_path / "run").rename(tmp_path / "undisturbed")
    half = f"budget.max_tokens={seen // 2}"
    run_workers(runs.run, 2, path, (half,))
    done = len(runs.numbers(tmp_path / "run"))
    assert 5 <= done <= 7
    assert (verdict(tmp_path).reason, verdict(tmp_path).step) == ("spent", done)
    assert verdict(tmp_path).detail.endswith(f"tokens of budget.max_tokens {seen // 2:,}")
    assert "validation_loss" in runs.measured(tmp_path / "run", done)
    run_workers(runs.run, 2, path, (half,))  # the same budget is spent still
    assert len(runs.numbers(tmp_path / "run")) == done
    run_workers(runs.run, 2, path)
    assert runs.numbers(tmp_path / "run") == whole
    assert verdict(tmp_path).reason == "completed"


def test_gpu_time_of_all_lives_counts(tmp_path):
    path = runs.run_file(tmp_path)
    prepare(load(path).prepare)
    run_workers(runs.run, 2, path, ("budget.gpu_hours=1e-9", "budget.price_per_gpu_hour=2 EUR"))
    assert verdict(tmp_path).reason == "spent"
    assert verdict(tmp_path).step == 0
    assert " EUR) used, and a step and the end take " in verdict(tmp_path).detail
    first = gpu_seconds(read_usage(tmp_path / "run" / "usage.jsonl"))
    assert first > 0
    run_workers(runs.run, 1, path, ("train.max_steps=1",))
    assert gpu_seconds(read_usage(tmp_path / "run" / "usage.jsonl")) > first
