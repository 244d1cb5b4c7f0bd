"""The benchmark programs of a step and its parts run, at a toy size, with everybody who is there."""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from launch.settle import find_compiler
from tests.e2e.commands import ROOT
from tests.e2e.test_benchmarks import measured


def absent(modules):
    return [module for module in modules if importlib.util.find_spec(module) is None]


TRAIN_STEP = "train_step.py --model toy --seq-len 64 --micro-batch 2 --steps 1 --repeats 1 --shapes answers"
PEERS = {"trainer": ["accelerate", "transformers"], "trl": ["trl", "datasets", "accelerate"]}  # and what each needs
# nothing here needs a compiler to be installed; where there is none, layers that are not compiled are run all the same
needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="compiled layers need a C++ compiler")


def test_every_trainer_that_is_there_takes_its_steps(tmp_path):
    found, printed = measured(TRAIN_STEP, tmp_path)
    answers, there = found["shapes"]["answers"], [name for name, modules in PEERS.items() if not absent(modules)]
    assert answers["failed"] == {}
    assert list(answers["results"]) == ["zero0", "zero2", "bare", "plain", "fsdp2", *there]
    assert list(found["left_out"]) == [name for name in PEERS if name not in there]
    plain, zero2 = (answers["results"][name] for name in ("plain", "zero2"))
    assert zero2["ten_steps_seconds"] == zero2["first_step_seconds"] + 9 * zero2["wall_seconds"]
    assert zero2["ten_steps_of_plain"] == zero2["ten_steps_seconds"] / plain["ten_steps_seconds"]
    assert "s of 10 steps" in printed


@needs_compiler
def test_compiled_layers_take_their_steps_and_who_is_asked_for_in_vain_is_told(tmp_path):
    found, printed = measured(f"{TRAIN_STEP} --precision bf16 --trainers trl compiled", tmp_path)
    answers, missing = found["shapes"]["answers"], absent(PEERS["trl"])
    assert answers["failed"] == {}
    assert list(answers["results"]) == ["plain", "compiled", *([] if missing else ["trl"])]
    assert found["left_out"] == ({"trl": f"there is no {', '.join(missing)}"} if missing else {})
    assert ("TRL SFTTrainer is left out: there is no " in printed) == bool(missing)


def losses_off(ways):
    return [max(abs(a / b - 1) for a, b in zip(way["losses"], ways[0]["losses"], strict=True)) for way in ways]


def test_every_way_to_compute_layers_learns_the_same(tmp_path):
    compiled = {"1": {"compile": True}} if find_compiler() else {}
    again = {
        number: {"gradient_checkpointing": way} for number, way in (("2", "selective"), ("4", True), ("5", "offload"))
    }
    wanted = {"0": {}} | compiled | again
    found, _ = measured(f"layer_policies.py --model toy --seq-len 64 --only {' '.join(wanted)}", tmp_path)
    assert [way["way"] for way in found["ways"]] == list(wanted.values())
    assert max(losses_off(found["ways"])) < 2e-3


def test_every_head_that_a_cpu_has_gives_the_gradient(tmp_path):
    found, printed = measured("head.py --tokens 192 --width 32 --vocab 3000 --passes 1 --repeats 1", tmp_path)
    torchs = ["torch", "torch_parts"]  # since torch 2.13
    there = torchs if hasattr(torch.nn, "LinearCrossEntropyOptions") else []
    assert list(found["results"]) == ["full", "recomputed", *there, "ours"]
    left_out = {"torch": "torch ", "torch_parts": "torch ", "liger": "its kernels are for GPUs"}
    left_out["liger_fp32"] = left_out["liger"]
    assert list(found["failed"]) == [name for name in left_out if name not in there]
    assert all(why.startswith(left_out[name]) for name, why in found["failed"].items())
    assert "Liger has no numbers: its kernels are for GPUs" in printed
    for of in found["results"].values():
        assert max(of["hidden_off"], of["weight_off"]) < 1e-5
        assert min(of["wall_seconds"], of["cpu_seconds"], of["extra_mib"]) > 0


def test_every_adamw_that_a_cpu_has_takes_the_step(tmp_path):
    no_compiler = {"CXX": "false", "TORCH_EXTENSIONS_DIR": str(tmp_path)}  # DeepSpeed's takes minutes to compile
    found, _ = measured("optimizer.py --parameters 1e5 --steps 2 --repeats 1", tmp_path, **no_compiler)
    assert list(found["results"]) == ["loop", "foreach", "fused"]
    assert max(of["weights_off"] for of in found["results"].values()) < 1e-6  # a step moves a weight by 1e-3
    assert list(found["failed"]) == ["fused_adam", "cpu_adam"]
    assert found["failed"]["fused_adam"] == "its kernels are for weights on cuda"
    assert "failed to build" in found["failed"]["cpu_adam"]


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
