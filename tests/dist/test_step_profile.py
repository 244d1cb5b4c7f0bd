"""A profile by an independent clock: what is slow shows under its own name, the parts are the whole, and nothing is moved."""

from __future__ import annotations

import contextlib
import io
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from launch import profiling
from sft_dist.config import load
from sft_dist.kernels import ALL_ATTENTION_FUNCTIONS
from sft_dist.step_profile import profile, watched
from tests.dist import tiny
from tests.unit import prepared_runs
from tests.workers import run_workers

COUNT, NAP = 2, 0.1


def steps(is_slow):
    for number in range(COUNT):
        batches = tiny.micro_batches(number, 2)
        yield SimpleNamespace(num_targets=int(tiny.rows(number).targets.sum()), micro_batches=slow(batches, is_slow))


def slow(batches, is_slow):
    for batch in batches[:2]:
        time.sleep(NAP * is_slow)
        yield batch


def profiled(topology, stage, folder):
    """Rank 0 reads slowly, so rank 1 waits for it; both dawdle in a layer, in the forward pass and where it is computed again."""
    made, comms = tiny.engine(topology, stage, micro_batch_rows=2, gradient_checkpointing=True)
    before = [fragment.values["master"].clone() for fragment in made.fragments()]
    layer = made.deepspeed.module.transformer.h[0].mlp
    forward = layer.forward
    layer.forward = lambda *arguments: (time.sleep(NAP), forward(*arguments))[1]
    seen = profile(made, comms, lambda: steps(topology.rank == 0), COUNT, folder / f"{topology.rank}.json")
    moved = [
        int((was != fragment.values["master"]).sum()) for was, fragment in zip(before, made.fragments(), strict=True)
    ]
    wait = torch.distributed.Work.wait
    with contextlib.suppress(KeyError), watched(made):
        assert torch.distributed.Work.wait is not wait
        raise KeyError
    is_off = torch.distributed.Work.wait is wait and "forward" not in vars(made.deepspeed)
    return seen, sum(moved), is_off and "watched" not in repr(ALL_ATTENTION_FUNCTIONS["sdpa"])


@pytest.mark.parametrize("stage", [2, 3])
def test_what_is_slow_shows_under_its_own_name(tmp_path, stage):
    (reads, moved, is_off), (waits, *_) = run_workers(profiled, 2, stage, tmp_path)
    for one in (reads, waits):
        assert sum(one.split.parts.values()) == pytest.approx(sum(one.seconds), rel=0.02)
        assert one.split.num_steps == COUNT
        assert one.split.parts["host gaps"] >= COUNT * 2 * 2 * NAP, "in Python, forward and again"
        assert one.split.recomputed >= COUNT * 2 * NAP
        assert min(one.split.parts[name] for name in ("attention", "matmuls", "head+loss", "optimizer", "other")) > 0
        assert one.split.peaks.keys() == {"forward", "backward", "optimizer"}
    assert reads.split.parts["data"] >= COUNT * 2 * NAP > 2 * waits.split.parts["data"]
    assert waits.split.parts["communication"] >= 0.5 * COUNT * 2 * NAP
    assert waits.split.parts["communication"] > reads.split.parts["communication"]
    assert (moved, reads.not_applied, reads.peak_bytes) == (0, 0, None)
    assert is_off, "the ranges are gone, also where something failed"


def rank(topology, arguments, where):
    said = io.StringIO()
    os.chdir(where)
    with contextlib.redirect_stdout(said):
        plan = profiling.Plan.of(load(*arguments), topology, profiling.Life("profile"))
        code = profiling.profile(plan, profiling.Options(steps=2, micro_batches=1, trace=Path("t.json")))
    return code, said.getvalue()


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_run_is_profiled_on_two_ranks_and_left_alone(tmp_path):
    folder = prepared_runs.prepare(tmp_path)
    run = folder / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("")
    before = files(run) | files(folder / "out")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "t.json").write_text("what was there")
    (code, said), (_, nothing) = run_workers(rank, 2, (folder / "run.yaml", []), tmp_path / "here")
    assert (code, nothing) == (0, "")
    assert "2 steps of 2 rows = 1 a micro-batch x 1 accumulated x 2 processes" in said
    assert "note: the run's own steps have 2 micro-batches" in said
    shares = [float(share) for share in re.findall(r" (\d+\.\d)% ", said.split("\n  a step")[0])]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert re.search(r"MFU: \d+\.\d% of the .*LOP/s that matrix products reach here \(measured\)", said)
    assert "\nadvice:\n  " in said
    assert files(run) | files(folder / "out") == before
    assert (tmp_path / "here" / "t.json.old-1").read_text() == "what was there"
    assert (tmp_path / "here" / "t.json").stat().st_size > 10_000
