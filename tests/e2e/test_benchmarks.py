"""The benchmark programs run, at a toy size; `packing_pays.py` trains for minutes and is left to who asks for its numbers."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest

from tests.e2e.commands import ROOT, run


@pytest.mark.parametrize(
    ("program", "more", "key"),
    [
        ("pack.py", "--documents 3000", "machine"),
        ("loader.py", "--rows 2000 --repeats 1", "of_raw"),
        (
            "checkpoint.py",
            "--layers 1 --width 64 --stages 3 --repeats 1 --train-seconds 3 --every-seconds 1 --plan-ranks 8",
            "planning",
        ),
        ("train_step.py", "--model toy --seq-len 64 --micro-batch 2 --steps 1 --repeats 1 --shapes answers", "shapes"),
        ("layer_policies.py", "--model toy --seq-len 64 --only 0 4", "ways"),
        ("scaling.py", "--ranks 2 --stages 2 --steps 3 --width 64", "cases"),
        ("fp8.py", "--steps 2 --width 64", "runs"),
        ("accumulation.py", "--counts 8 16 --steps 2 --batch 16", "errors"),
        ("prepare.py", "--pairs {pairs} --no-scale --repeats 1", "machine"),
    ],
)
def test_a_benchmark_runs(tmp_path, program, more, key):
    pairs = tmp_path / "pairs.jsonl"
    records = ({"prompt": f"What is {n} times {n}?", "response": f"It is {n * n}. " * 20} for n in range(200))
    pairs.write_text("".join(json.dumps(record) + "\n" for record in records))
    out = tmp_path / "out.json"
    run(f"python {ROOT}/benchmarks/{program} {more.format(pairs=pairs)} --json {out}", tmp_path)
    assert key in json.loads(out.read_text())


def test_who_fails_is_left_out_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import train_step

    def run(name, path, python):
        if name == python:
            raise subprocess.CalledProcessError(1, name, stderr="a line\nOutOfMemoryError: 80 GB are not enough\n")
        measured = {"wall_seconds": [1.0], "cpu_seconds": [1.0], "losses": [3.0], "peak_mib": 1.0, "resident_mib": 1.0}
        return {"flops_per_second": 1e9, "first_step_seconds": 1.0, "attention": "sdpa", "versions": {}, **measured}

    monkeypatch.setattr(train_step, "run", run)
    (tmp_path / "text.json").write_text('{"precision": "fp32"}')
    about = {**dict.fromkeys(("tokens", "targets", "flops"), 1000), "steps": 3}
    found = train_step.compare(tmp_path / "text.json", {"plain": "", "trl": "trl", "zero2": ""}, 2, about)
    assert found["failed"] == {"trl": "OutOfMemoryError: 80 GB are not enough"}
    assert [len(one["runs"]) for one in found["results"].values()] == [2, 2]
    with pytest.raises(
        SystemExit, match="the plain loop, beside whose losses all are held, failed, so no speed is told"
    ):
        train_step.compare(tmp_path / "text.json", {"plain": "plain"}, 1, about)


def test_a_busy_machine_and_one_rank_say_nothing_of_scaling(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import scaling

    monkeypatch.setattr(scaling, "run_workers", lambda *given: [{"seconds": 1.0, "parameters": 9}])
    with pytest.raises(SystemExit, match=r"stage 2: a rank took 1\.000 s for two micro-batches and 1\.000 s for eight"):
        scaling.measure([2], [2], 1, 64)
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--ranks", "1", "2"])
    with pytest.raises(SystemExit, match=r"--ranks \[1, 2\]: one rank is the model's own measure; name 2 or more"):
        scaling.main()


def test_no_speed_is_told_of_steps_that_are_not_the_same(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import contestants
    import train_step

    train_step.write_model(tmp_path / "model", "toy", 64)
    rows = train_step.write_rows(tmp_path, 64, 12)["text"]
    with np.load(rows) as file:
        assert (file["positions"][:, 1:] == 0).any()  # documents that could see each other
        np.savez(tmp_path / "leaking.npz", **dict(file) | {"positions": np.arange(64) + 0 * file["positions"]})
    task = contestants.Task(str(rows), str(tmp_path / "model"), "", "cpu", "fp32", 4, 1, 1e-3)
    (tmp_path / "text.json").write_text(json.dumps(asdict(task)))
    leaking = replace(task, rows=str(tmp_path / "leaking.npz"))

    @functools.cache
    def plain(given):
        marks = contestants.Marks(task, 0.0)
        told = contestants.plain(task if given == "task" else leaking, marks)
        return {**marks.report(), **told, "versions": {}}

    def run(name, path, python):
        return {"flops_per_second": 1e9} if name == "peak" else plain("leaking" if python == "leaking" else "task")

    monkeypatch.setattr(train_step, "run", run)
    about = {**dict.fromkeys(("tokens", "targets", "flops"), 1000), "steps": 3}
    agreed = train_step.compare(tmp_path / "text.json", {"plain": "", "trl": ""}, 1, about)["results"]
    assert agreed["trl"]["losses_off"] == 0.0
    goals = train_step.judged({"zero2": agreed["trl"], "plain": agreed["plain"]}, "small", "cpu")
    assert [goal["what"].split()[0] for goal in goals] == ["cpu_seconds", "peak_mib"]  # TRL was not measured
    assert [goal["is_met"] for goal in goals] == [True, False]  # 1.0 of each
    monkeypatch.setitem(train_step.NAMES, "leaking", "")
    with pytest.raises(SystemExit, match=r"losses differ by more than 1e-05 from the plain loop's .*'leaking': \[1"):
        train_step.compare(tmp_path / "text.json", {"plain": "", "leaking": "leaking"}, 1, about)
