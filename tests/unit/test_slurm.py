"""The batch script of a preparation, run with a stand-in for the program that it starts."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "slurm" / "prepare.sbatch"


@pytest.mark.parametrize(
    ("array", "more", "started"),
    [
        ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "64"}, [], "prepare run.yaml --task 3/64 --workers 8"),
        ({}, ["--merge", "prepare.seed=1"], "prepare run.yaml --workers 8 --merge prepare.seed=1"),
    ],
)
def test_a_task_does_its_part_and_the_last_step_merges(tmp_path, array, more, started):
    program = tmp_path / "sft-dist"
    program.write_text('#!/bin/sh\necho "$@"\n')
    program.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_CPUS_PER_TASK": "8", **array}
    command = ["bash", str(SCRIPT), "run.yaml", *more]
    made = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert made.stdout.strip() == started


def test_a_run_file_must_be_named():
    made = subprocess.run(["bash", str(SCRIPT)], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert made.returncode != 0
    assert "usage: sbatch" in made.stderr
