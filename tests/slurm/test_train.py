"""slurm/train.sbatch on a real cluster: whoever ends a job, it ends where the undisturbed run ends, or stays away."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml

from sft_dist.retention import list_folders
from sft_dist.usage import gpu_seconds, read_usage
from tests.chaos.driver import command_of
from tests.e2e.commands import run, start
from tests.invariants import runs
from tests.slurm.cluster import GRACE_SECONDS, Cluster
from tests.slurm.conftest import OVERRIDES, STEPS

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


class Job:
    """A training job that `sft-dist submit` queued, and what it did so far."""

    def __init__(
        self,
        cluster: Cluster,
        task: Path,
        name: str,
        options: str = "--nodes 2",
        *overrides: str,
        more: str = "",
        file: str = "run.yaml",
    ) -> None:
        self.cluster, self.task, self.run_dir = cluster, task, task / name
        words = " ".join([f"run_dir={name}", *OVERRIDES, *overrides])
        said = self.sft_dist(f"submit {file} {words} {options} --gpus-per-node 1 -- --mem=1 {more}")
        self.numbers = [int(number) for number in re.search(r"submitted job (.*)", said)[1].split(", ")]
        self.number = self.numbers[0]

    def sft_dist(self, words: str, code: int = 0) -> str:
        """A command on the login node."""
        return run(f"sft-dist {words}", self.task, code=code, environment=self.cluster.environment)

    @property
    def log(self) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted(self.run_dir.glob("slurm-*.log")))

    def step(self) -> int:
        """The last step that its metrics know."""
        return max((line["step"] for line in runs.curve(self.run_dir)), default=0)

    def until(self, is_so, what: str, seconds: float = 120.0) -> None:
        end = time.monotonic() + seconds
        while not is_so():
            if time.monotonic() > end or self.cluster.state(self.number) in ENDED:
                raise AssertionError(f"no {what}:\n{self.log}\n{self.cluster.describe(self.number)}")
            time.sleep(0.05)

    def until_step(self, step: int) -> None:
        self.until(lambda: self.step() >= step, f"step {step}")

    def until_save(self) -> None:
        """Wait until a checkpoint is being written, which takes a moment only."""
        end = time.monotonic() + 60
        while not any((self.run_dir / "checkpoints").glob(".step-*.partial")):
            assert time.monotonic() < end, f"no save:\n{self.log}"
            time.sleep(0.001)

    def until_life(self, number: int) -> None:
        """Wait until it was requeued so often, and runs."""
        self.until(
            lambda: self.cluster.restarts(self.number) == number and self.cluster.state(self.number) == "RUNNING",
            f"life {number}",
        )

    def ranks(self) -> list[int]:
        """The processes of its ranks."""
        return self._processes("launch.train", "torch.distributed")

    def agents(self) -> list[int]:
        """The processes of torchrun."""
        return self._processes("torch.distributed.run ", "srun")

    def _processes(self, word: str, but: str) -> list[int]:
        """Those of this run that have this word in their command, and neither that one nor a shell's."""
        of_run = f"run_dir={self.run_dir.name} "
        found = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
        said = {pid: command_of(pid) for pid in found}
        return [
            pid
            for pid, command in said.items()
            if word in command and of_run in command and not any(other in command for other in (but, "srun", "bash"))
        ]

    def verdicts(self) -> list[str]:
        """How its lives ended, in their order; those that were killed left none."""
        paths = sorted((self.run_dir / "verdicts").glob("*.json"), key=lambda path: path.stat().st_mtime)
        return [json.loads(path.read_text())["reason"] for path in paths]

    def ends(self, *states: str, seconds: float = 120.0) -> None:
        state = self.cluster.wait(self.number, *ENDED, seconds=seconds)
        assert state in states, f"{state}\n{self.log}"

    def is_undisturbed(self, *, bit_for_bit: bool = True) -> None:
        if bit_for_bit:
            mine, theirs = (
                runs.tensors(list_folders(folder / "checkpoints")[-1])
                for folder in (self.run_dir, self.task / "undisturbed")
            )
            assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
        else:
            self.is_like("undisturbed")
        assert [line["step"] for line in runs.curve(self.run_dir) if "loss" in line] == list(range(1, STEPS + 1))

    def is_like(self, name: str) -> None:
        """Its weights are those of that run, but for the order in which sums were rounded."""
        mine, theirs = (
            runs.tensors(list_folders(folder / "checkpoints")[-1]) for folder in (self.run_dir, self.task / name)
        )
        weights = [key for key in theirs if key.startswith("master/")]
        assert max((mine[key] - theirs[key]).abs().max().item() for key in weights) < 1e-3


def test_whatever_ends_its_lives_it_ends_where_the_undisturbed_run_does(cluster, task):
    """In start-up; preempted in an evaluation, and again while that is handled; in a save; by the death of torchrun."""
    job = Job(cluster, task, "disturbed")
    job.until(job.ranks, "rank")
    cluster.out("scontrol", "requeue", str(job.number))  # in start-up
    job.until_life(1)

    job.until_step(12)  # an evaluation follows
    urgent = cluster.sbatch("--partition=urgent", "--nodes=2", "--exclusive", "--wrap", "sleep 2", folder=task)
    began = time.monotonic()
    job.until(lambda: len(job.verdicts()) == 2, "verdict")
    assert time.monotonic() - began < GRACE_SECONDS  # saved and left within the grace period
    cluster.out("scontrol", "requeue", str(job.number), check=False)  # while the script still handles the first
    cluster.wait(urgent, "COMPLETED")
    job.until_life(2)

    job.until_save()
    cluster.out("scontrol", "requeue", str(job.number))
    job.until_life(3)

    job.until_step(max(20, job.step() + 1))
    os.kill(job.agents()[0], signal.SIGKILL)
    job.until_life(4)
    job.ends("COMPLETED")
    assert job.verdicts() == ["stopped"] * 3 + ["completed"]
    assert job.log.count("no verdict: killed, or its machine failed") == 1
    job.is_undisturbed()
    lines = read_usage(job.run_dir / "usage.jsonl")
    assert len({line["life"] for line in lines}) == 5, "the life that was killed is on the account"
    of_lives = [[line for line in lines if line["life"] == life] for life in {line["life"] for line in lines}]
    assert gpu_seconds(lines) == pytest.approx(sum(gpu_seconds(of_one) for of_one in of_lives))
    assert all(gpu_seconds(of_one) > 0 for of_one in of_lives)
    said = job.sft_dist(f"status {job.run_dir.name}")
    assert f"{STEPS} of {STEPS}, loss " in said
    assert "nothing of it waits or runs" in said


def test_a_step_longer_than_its_time_is_left_in_its_middle_and_a_dead_node_costs_a_life(cluster, task):
    """240 micro-batches a step; SLURM's limit is a minute, which the run knows; it is preempted; then a slurmd dies."""
    cluster.out("scontrol", "update", "PartitionName=preempt", "GraceTime=3")
    long = (
        "model.config.n_layer=8",
        "model.dropout=0",
        "evaluate.every_steps=null",
        "train.global_batch_rows=480",
        "checkpoint.every_steps=1",
        "train.max_steps=12",
    )
    words = " ".join(["run_dir=quick", *OVERRIDES, *long, "train.micro_batch_rows=24"])
    job = Job(cluster, task, "long", "--nodes 2 --time 1", *long)
    job.until_step(1)
    assert f"job {job.number} RUNNING on n[1-2], requeued 0 times" in job.sft_dist("status long")
    # the same steps in a few micro-batches, meanwhile: not before, because a life of a minute wants both cores for its first step
    quick = start(f"sft-dist train run.yaml --nproc 2 {words}", task)
    said = job.sft_dist(f"submit run.yaml run_dir=long {' '.join(OVERRIDES)}", code=2)
    assert f"long: job {job.number} is RUNNING for it; `sft-dist stop long` first" in said
    job.until_life(1)
    assert "asked to stop by the end of its time in " in job.log
    done = job.step()
    assert 1 <= done < 12
    assert (job.run_dir / "checkpoints" / f"step-{done:08}").is_dir()

    job.until(lambda: job.log.count(f"resuming from step {done} of 12") == 1, "second life")
    time.sleep(2)  # into the step
    urgent = cluster.sbatch("--partition=urgent", "--nodes=2", "--exclusive", "--wrap", "sleep 1", folder=task)
    began = time.monotonic()
    job.until(lambda: job.verdicts() == ["stopped"] * 2, "verdict")
    left_within = time.monotonic() - began
    assert job.step() == done  # the step that was begun is lost, and nothing else
    cluster.wait(urgent, "COMPLETED")
    cluster.out("scontrol", "update", f"JobId={job.number}", "TimeLimit=10")

    job.until_step(done + 1)
    cluster.kill_node("n1")  # kill -9 of its daemon; SLURM takes a while to see, and the batch script there lives on
    job.until(lambda: cluster.restarts(job.number) == 3, "requeue")
    cluster.start_node("n1")
    job.ends("COMPLETED", seconds=240)
    assert job.verdicts() in (
        [*["stopped"] * 2, "completed"],
        [*["stopped"] * 3, "completed"],
    )  # the orphans may save too
    seconds = [line["step_seconds"] for line in runs.curve(job.run_dir) if "loss" in line]
    assert min(seconds) > max(3, left_within)
    assert quick.wait() == 0
    job.is_like("quick")
    cluster.out("scontrol", "update", "PartitionName=preempt", f"GraceTime={GRACE_SECONDS}")


def test_it_goes_on_with_fewer_and_more_nodes_and_stays_away_when_a_person_says_so(cluster, task, tmp_path):
    """2 nodes, of which one hangs, then 1, stopped; 2 again, cancelled; and to the end. One task a rank; staged shards."""
    options = f"--nodes 1-2 --launcher srun --stage {tmp_path / 'local'}"
    job = Job(cluster, task, "elastic", options, "train.hang_seconds=10")
    job.until_step(3)
    assert "x 2 processes" in job.log
    assert [path.name.startswith("sft-dist-shards-") for path in (tmp_path / "local").iterdir()] == [True]
    (frozen,) = [pid for pid in job.ranks() if b"SLURMD_NODENAME=n2" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(frozen, signal.SIGSTOP)
    job.until_life(1)
    assert "on host n2 hangs" in job.log, cluster.describe(job.number) + job.log
    assert "the next life avoids n2" in job.log
    job.until_step(job.step() + 2)
    assert "x 1 process" in job.log
    said = job.sft_dist("stop elastic")
    assert f"job {job.number} saves and ends; it is not requeued" in said
    job.ends("FAILED")  # 143: jobs that wait for a finished run must not start
    assert job.verdicts() == ["hung", "stopped"]
    assert "not requeued: the same submission goes on from here" in job.log

    again = Job(cluster, task, "elastic", options)
    again.until(again.ranks, "rank")
    cluster.out("scancel", str(again.number))
    again.ends("CANCELLED")
    last = Job(cluster, task, "elastic", options)
    last.ends("COMPLETED")
    assert cluster.state(again.number) == "CANCELLED"  # and did not come back
    assert cluster.restarts(again.number) == 0
    last.is_undisturbed(bit_for_bit=False)


def test_a_chain_goes_on_where_requeueing_is_forbidden_and_ends_when_all_is_done(cluster, task):
    job = Job(cluster, task, "chained", "--nodes 2 --chain 4 --launcher srun")
    assert len(job.numbers) == 4
    job.until_step(5)
    os.kill(job.ranks()[0], signal.SIGKILL)
    job.ends("FAILED")
    assert cluster.wait(job.numbers[1], *ENDED, seconds=90) == "COMPLETED"
    job.is_undisturbed()
    assert [cluster.wait(number, *ENDED) for number in job.numbers[2:]] == ["CANCELLED"] * 2


def test_a_wrong_run_file_never_loops(cluster, task):
    """Refused before the queue; and where the mistake is made behind sbatch's back, once, in the job."""
    folder = task / "wrong"
    folder.mkdir()
    values = yaml.safe_load((task / "run.yaml").read_text())
    (task / "wrong.yaml").write_text(yaml.safe_dump(values | {"run_dir": "wrong"}))
    number = cluster.sbatch(
        "--nodes=2",
        "--gpus-per-node=1",
        "--hold",
        "--output=wrong/log",
        "slurm/train.sbatch",
        "wrong.yaml",
        folder=task,
    )
    chain = Job(cluster, task, "wrong-chain", "--nodes 2 --chain 2", more="--hold", file="wrong.yaml")
    (task / "wrong.yaml").write_text(yaml.safe_dump(values | {"run_dir": "wrong", "train": {"epoch": 3}}))
    cluster.out("scontrol", "release", ",".join(map(str, [number, *chain.numbers])))
    assert cluster.wait(number, *ENDED) == "FAILED"
    assert cluster.restarts(number) == 0
    assert [cluster.wait(number, *ENDED) for number in chain.numbers] == ["FAILED", "CANCELLED"]
    assert "train.epoch" in (folder / "log").read_text()
    said = run("sft-dist submit wrong.yaml", task, code=2, environment=cluster.environment)
    assert "train.epoch" in said
    said = run("sft-dist submit run.yaml --nodes 2-3 --gpus-per-node 1", task, code=2, environment=cluster.environment)
    assert "--nodes 2-3: with 3 of them the run could not go on" in said
    assert "it could with 2" in said


def test_lives_without_a_new_checkpoint_become_rarer_and_then_end(cluster, task):
    """Every life is killed at once, so nothing new is ever kept."""
    cluster.environment["SFT_DIST_MAX_FRUITLESS"] = "3"
    try:
        job = Job(cluster, task, "fruitless", "--nodes 1 --launcher srun")
        for life in range(3):
            job.until_life(life)
            job.until(lambda: job.ranks(), "rank")
            for pid in job.ranks():
                os.kill(pid, signal.SIGKILL)
        job.ends("FAILED")
    finally:
        del cluster.environment["SFT_DIST_MAX_FRUITLESS"]
    assert "3 lives in a row without a new checkpoint; giving up" in job.log
    said = job.sft_dist("status fruitless")
    assert said.count("no verdict: it runs, was killed, or its machine failed") == 3


def test_a_preparation_as_a_job_array_makes_the_bytes_of_one_machine(cluster, task):
    said = run(
        "sft-dist submit prepare run.yaml prepare.out=by-jobs --tasks 3 -- --cpus-per-task=1",
        task,
        environment=cluster.environment,
    )
    merge = int(re.search(r"job (\d+), which merges", said)[1])
    assert cluster.wait(merge, *ENDED) == "COMPLETED"
    mine, theirs = (
        {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.suffix in (".rows", ".docs")
        }
        for folder in (task / "by-jobs", task / "shards")
    )
    assert mine == theirs


def test_a_dry_run_shows_all_and_queues_nothing(cluster, task):
    said = run(
        "sft-dist submit run.yaml run_dir=dry --nodes 1-2 --gpus-per-node 2 --time 1:00:00 --account lab --dry-run -- --qos=high -x n9",
        task,
        environment=cluster.environment,
    )
    for line in (
        "--nodes=1-2",
        "--gpus-per-node=2",
        "--cpus-per-task=8",
        "--time=1:00:00",
        "--account=lab",
        "--qos=high",
        "-x n9",
        "--requeue",
    ):
        assert f"#SBATCH {line}\n" in said
    assert "(not submitted)" in said
    assert not (task / "dry").exists()


@pytest.mark.parametrize("command", ["status", "stop"])
def test_a_folder_without_a_run_is_told(cluster, task, command):
    said = run(f"sft-dist {command} nowhere", task, code=2, environment=cluster.environment)
    assert "nowhere: no" in said
