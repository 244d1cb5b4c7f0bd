"""Ctrl-C, SIGTERM, SIGUSR1, kill -9: nothing is lost, and the run goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess

import pytest

from tests.e2e.commands import clone, forked, run, start
from tests.invariants import runs

STEPS = 30
TRAIN = f"sft-dist train run.yaml --nproc 2 train.max_steps={STEPS} evaluate.samples=0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = clone(tmp_path_factory.mktemp("stopping"))
    runs.run_file(folder, micro_batch_rows=1, global_batch_rows=16)
    run("sft-dist prepare run.yaml", folder)
    run(f"{TRAIN} run_dir=straight checkpoint.every_steps=4", folder)
    return folder


def wait_for(process, words):
    """Read what a process says until the words come."""
    for line in process.stdout:
        if words in line:
            return
    raise AssertionError(f"it ended without saying {words!r}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_the_last_completed_step(folder, number):
    run_dir = f"stopped-{number.name}"
    process = start(f"{TRAIN} run_dir={run_dir}", folder)
    wait_for(process, "step 5/")
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert f"asked to stop by {number.name}" in output
    assert "The same command goes on from there" in output
    assert "Traceback" not in output
    (verdict,) = (json.loads(path.read_text()) for path in (folder / run_dir / "verdicts").iterdir())
    assert verdict["reason"] == "stopped"
    assert 5 <= verdict["step"] < STEPS
    assert [path.name for path in (folder / run_dir / "checkpoints").glob("step-*")] == [f"step-{verdict['step']:08d}"]
    if number == signal.SIGINT:
        output = run(f"{TRAIN} run_dir={run_dir}", folder)
        assert f"resuming from step {verdict['step']} of {STEPS}" in output
        assert runs.numbers(folder / run_dir) == runs.numbers(folder / "straight")


def test_killed_and_started_again_is_uninterrupted(folder):
    process = start(f"{TRAIN} run_dir=killed checkpoint.every_steps=4", folder)
    wait_for(process, "step 10/")
    kill_all(process.pid)
    process.wait()
    output = run(f"{TRAIN} run_dir=killed checkpoint.every_steps=4", folder)
    assert f"resuming from step 8 of {STEPS}" in output or f"resuming from step 12 of {STEPS}" in output
    assert runs.numbers(folder / "killed") == runs.numbers(folder / "straight")
    assert not list((folder / "killed" / "checkpoints").glob(".*partial"))


def kill_all(pid):
    """kill -9 a process and everything below it."""
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
    os.kill(pid, signal.SIGKILL)
    for child in children:
        kill_all(int(child))


def test_two_runs_in_one_folder_are_refused(folder):
    process = start(f"{TRAIN} run_dir=shared train.max_steps=3000", folder)
    wait_for(process, "step 2/")
    output = run(f"{TRAIN} run_dir=shared", folder, code=2)
    assert re.search(
        r"run_dir: shared is in use by process \d+ on \S+; wait for it, stop it, or choose another run_dir", output
    )
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143


def test_fresh_starts_over_and_keeps_the_old_run(folder):
    before = runs.numbers(folder / "straight")
    output = run(f"{TRAIN} run_dir=straight --fresh train.learning_rate=1e-4 train.max_steps=2", folder)
    assert "starting at step 0" in output
    assert runs.numbers(folder / "straight" / "previous-1") == before
    assert len(runs.numbers(folder / "straight")) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train.learning_rte=1", "run.yaml: train.learning_rte: unknown key (value 1); did you mean train.learning_rate?"),
        ("train.micro_batch_rows=3", "train.global_batch_rows: 16 is not a multiple of micro_batch_rows 3 x 2 processes = 6. Use 12 or 18"),
        ("prepare.out=nowhere", "nowhere/train: no prepared shards there; run `sft-dist prepare RUN.yaml` first"),
        ("model={name_or_path: nowhere}", "model: cannot load nowhere"),
        ("model.config.n_positions=16", "a context of 16 tokens is shorter than prepare.seq_len 128"),
        ("run_dir=straight train.seed=1", "was made with seed = 0, this run has 1"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_any_process_group(folder, arguments, message):
    given = [arguments] if "{" in arguments else arguments.split()
    output = forked(shlex.join([*TRAIN.split(), *given]), folder, code=3 if "seed" in arguments else 2)
    assert message in output
    assert "Traceback" not in output
    assert output.count("sft-dist:") == 1, output
