"""What `sft-dist submit`, `status` and `stop` refuse, check and show, with stand-ins for SLURM's programs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from launch import slurm, status, submit
from launch.submit import Options, render
from sft_dist.config import load
from sft_dist.errors import CheckpointError, ConfigError, DataError
from sft_dist.limits import Verdict
from tests.unit.prepared_runs import run_file, sft_dist

SCONTROL = """JobId=7 JobName=x Requeue=1 Restarts=2
   JobState=%s Reason=%s StartTime=2026-01-01T00:00:00 NodeList=n[1-2]
"""


@pytest.fixture
def run(shards, tmp_path):
    return run_file(tmp_path, shards / "out", shards / "sms")


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Stand-ins that note how they were called, and the way to change what one prints."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def program(name, prints="", code=0):
        (folder / name).write_text(
            f"#!/bin/sh\necho {name} \"$@\" >> {folder}/calls\ncat <<'E'\n{prints}\nE\n[ {code} = 0 ] || echo no >&2; exit {code}\n"
        )
        (folder / name).chmod(0o755)

    program("sbatch", "7")
    program("scontrol", "")
    program("scancel", "")
    program("squeue", "")
    program.calls = lambda: (folder / "calls").read_text().splitlines()
    return program


def queued(cluster, run_dir):
    """The jobs that were recorded are in the queue."""
    cluster("squeue", "\n".join(f"{each['job']} {each['name']}" for each in slurm.jobs_of(run_dir)))


def refused(*arguments):
    result = sft_dist(*arguments)
    assert result.exit_code == 2, result.output
    return result.stderr.strip().removeprefix("sft-dist: ")


@pytest.mark.parametrize("nodes", ["0", "4-2", "two", "2-", "-3"])
def test_a_number_of_nodes_that_is_none(run, nodes):
    assert refused("submit", run, f"--nodes={nodes}") == (
        f"--nodes {nodes}: a number of nodes, or the least and the most, as in 4 or 2-8"
    )


def test_what_cannot_be_meant_is_refused_before_the_queue(run, cluster):
    assert "--tasks 4: a training has none; meant is `submit prepare`" in refused("submit", run, "--tasks", "4")
    assert "submit prepare: which run file?" in refused("submit", "prepare")
    assert "--job-name=x: the jobs of a run are known by the name run-" in refused(
        "submit", run, "--gpus-per-node=0", "--", "--job-name=x"
    )
    assert "--stage-environment: copied to where?" in refused("submit", run, "--gpus-per-node=0", "--stage-environment")
    with pytest.raises(FileNotFoundError):
        cluster.calls()


def test_a_batch_that_no_number_of_nodes_divides(run):
    assert "global_batch_rows" in refused("submit", run, "--nodes=3", "--gpus-per-node=1")
    said = refused("submit", run, "--nodes=2-4", "--gpus-per-node=1")
    assert "--nodes 2-4: with 3 of them the run could not go on" in said
    assert said.endswith("; it could with 2, 4")


def test_no_room_for_a_checkpoint_is_found_on_the_login_node(run, cluster, monkeypatch):
    from sft_dist import preflight

    def full(*_, **__):
        raise CheckpointError("no room")

    monkeypatch.setattr(preflight, "require_room", full)
    result = sft_dist("submit", run, "--gpus-per-node=0")
    assert (result.exit_code, result.stderr) == (3, "sft-dist: no room\n")


def test_it_is_submitted_recorded_and_told(run, cluster, tmp_path):
    result = sft_dist(
        "submit", run, "train.seed=3", "--gpus-per-node=2", "--launcher=srun", "--stage=/local", "--", "-x", "n9"
    )
    assert result.exit_code == 0, result.output
    assert "of a GPU, on 2 ranks with 1 rows a micro-batch (with --gpu NAME" in result.stdout
    assert "submitted job 7\n  sft-dist status" in result.stdout
    script = (tmp_path / "run" / "submitted.sbatch").read_text()
    for line in (
        "#SBATCH --gpus-per-node=2",
        "#SBATCH -x n9",
        "export SFT_DIST_LAUNCHER=srun",
        "export SFT_DIST_STAGE=/local",
    ):
        assert f"\n{line}\n" in script
    assert slurm.jobs_of(tmp_path / "run")[-1]["job"] == 7
    (call,) = cluster.calls()  # on the command line too, where a site's SBATCH_ variables do not reach
    assert call.startswith("sbatch --parsable --job-name=run-")
    assert call.endswith(f" -x n9 {tmp_path}/run/submitted.sbatch {run} train.seed=3")


def test_a_chain_is_recorded_job_by_job(run, cluster, tmp_path):
    result = sft_dist("submit", run, "--gpus-per-node=0", "--chain=3")
    assert "submitted job 7, 7, 7\n" in result.stdout
    script = (tmp_path / "run" / "submitted.sbatch").read_text()
    assert "#SBATCH --no-requeue\n#SBATCH --dependency=singleton\n" in script
    assert "#SBATCH --requeue" not in script
    assert all(" --no-requeue --dependency=singleton " in call for call in cluster.calls())


def test_what_sbatch_refuses_is_passed_on(run, cluster):
    cluster("sbatch", code=1)
    assert (
        refused("submit", run, "--gpus-per-node=0") == "sbatch: no; mend the option, or see `sinfo` for what there is"
    )


def test_a_run_that_waits_already_is_not_queued_twice(run, cluster, tmp_path):
    sft_dist("submit", run, "--gpus-per-node=0")
    queued(cluster, tmp_path / "run")
    cluster("scontrol", SCONTROL % ("PENDING", "Priority"))
    assert "run: job 7 is PENDING for it; `sft-dist stop" in refused("submit", run, "--gpus-per-node=0")
    said = sft_dist("status", tmp_path / "run").stdout
    assert "job 7 PENDING (Priority), not before 2026-01-01T00:00:00, requeued 2 times" in said


def test_a_preparation_is_an_array_and_what_waits_for_it(run, cluster, shards):
    result = sft_dist("submit", "prepare", run, "--tasks=5", "--account=lab", "--dry-run")
    assert "#SBATCH --array=1-5\n#SBATCH --account=lab\n" in result.stdout
    result = sft_dist("submit", "prepare", run, "--tasks=5")
    assert "submitted job 7 (5 tasks), and job 7, which merges" in result.stdout
    assert "--dependency=afterok:7" in cluster.calls()[-1]
    assert cluster.calls()[-1].endswith(f"{run} --merge")


def test_a_mixture_has_no_preparation_to_submit(run, shards, tmp_path):
    values = yaml.safe_load(run.read_text())
    del values["prepare"]
    run.write_text(yaml.safe_dump(values | {"mixture": [{"shards": str(shards / "out"), "weight": 1}]}))
    assert "it has no `prepare`; submit the preparation of each set" in refused("submit", "prepare", run)


def test_options_take_the_place_of_the_scripts_own():
    script = render("train.sbatch", ["--job-name=mine", "--no-requeue", "-x n9"], {"A": "b c"})
    assert script.count("--job-name") == 1
    assert "#SBATCH --requeue" not in script
    assert "export A='b c'\n" in script
    assert script.startswith("#!/bin/bash\n")
    assert f'export PATH={Path(sys.executable).parent}:"$PATH"' in script


def test_a_script_that_is_nowhere_is_told():
    with pytest.raises(ConfigError, match="nope: neither in a clone nor in the installed package"):
        submit.render("nope", [], {})


def test_without_slurm_it_says_so(run, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refused("submit", run, "--gpus-per-node=0").startswith("sbatch: no SLURM on this machine; log in")


def test_a_damaged_record_of_jobs_is_named(tmp_path):
    (tmp_path / slurm.JOBS).write_text('[{"jobs": 1}]')  # of another program
    with pytest.raises(DataError, match=r"jobs\.json: 'job'; remove it"):
        slurm.jobs_of(tmp_path)


@pytest.mark.parametrize(
    ("state", "options", "said", "called"),
    [
        ("RUNNING", [], "job 7 saves and ends; it is not requeued", ["scontrol update JobId=7 Requeue=0", "scancel --batch --signal=USR1 7"]),
        ("RUNNING", ["--now"], "job 7 (RUNNING) is cancelled", ["scancel 7"]),
        ("PENDING", [], "job 7 (PENDING) is cancelled", ["scancel 7"]),
    ],
)  # fmt: skip
def test_stop_ends_what_slurm_has_of_a_run(cluster, tmp_path, state, options, said, called):
    slurm.record(tmp_path, 7, "mine")
    queued(cluster, tmp_path)
    cluster("scontrol", SCONTROL % (state, "None"))
    assert said in sft_dist("stop", tmp_path, *options).stdout
    assert cluster.calls()[2:] == called


def test_stop_ends_a_process_of_this_machine_and_says_when_there_is_none(tmp_path):
    assert "nothing waits or runs for it here" in refused("stop", tmp_path)
    holds = f"import time; held = open({str(tmp_path / '.lock')!r}, 'a'); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", holds]) as process:
        while not (tmp_path / ".lock").exists():
            time.sleep(0.01)
        (tmp_path / ".lock").write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        assert slurm.holder(tmp_path) is None  # a number that is another's now
        (tmp_path / ".lock").write_text(f"process {process.pid} on {socket.gethostname()}\n")
        assert slurm.holder(tmp_path) == process.pid
        assert f"process {process.pid} saves and ends" in sft_dist("stop", tmp_path).stdout
        assert process.wait(10) == -signal.SIGTERM
    (tmp_path / ".lock").write_text("process 1 on another\n")
    assert slurm.holder(tmp_path) is None


def test_status_tells_lives_steps_and_what_is_left(run, tmp_path):
    folder = tmp_path / "run"
    assert "no run there" in refused("status", folder)
    (folder / "verdicts").mkdir(parents=True)
    values = load(run).model_dump(by_alias=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    said = sft_dist("status", folder).stdout
    assert "step        none yet" in said
    assert "checkpoint  none yet" in said
    Verdict("7-0", "stopped", 3, "asked to stop by SIGTERM").write(folder / "verdicts")
    line = {"step": 3, "loss": 0.5, "tokens_per_second": 1000.0, "step_seconds": 2.0}
    measured = {"step": 3, "validation_loss": 0.75}
    (folder / "metrics.jsonl").write_text(f'{json.dumps(line)}\n{json.dumps(measured)}\n{{"step": 4, "lo')
    said = sft_dist("status", folder).stdout
    assert "life        7-0: stopped, asked to stop by SIGTERM" in said
    assert ", loss 0.5000, validation loss 0.7500 at step 3" in said
    assert "speed       1,000 tokens/s, 2.00 s a step" in said
    assert "left" not in said  # nothing of it runs
    (folder / "verdicts" / "lives-7").write_text("7-0 none\n7-1 step-00000003\n")
    said = sft_dist("status", folder).stdout
    assert "life        7-1: no verdict: it runs, was killed, or its machine failed" in said
    assert "7-0: no verdict" not in said


def test_status_without_a_folder_tells_of_all_below(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no run there" in refused("status")
    for name in ("a", "runs/b", "runs/b/previous-1"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "run.yaml").write_text("{}")
        (tmp_path / name / "metrics.jsonl").write_text("")
    os.utime(tmp_path / "a" / "metrics.jsonl", (1, 1))
    assert [str(path) for path in status.runs_below(Path())] == ["a", "runs/b"]
    assert sft_dist("status", "--follow").stdout.count("nothing of it waits or runs") == 2


def test_a_job_whose_number_is_anothers_now_is_left_alone(cluster, tmp_path):
    slurm.record(tmp_path, 7, "mine")
    cluster("squeue", "7 theirs")
    assert slurm.live_jobs(tmp_path) == []


def test_a_slurm_that_does_not_answer_is_told_and_nothing_is_taken_for_over(cluster, tmp_path):
    slurm.record(tmp_path, 7, "mine")
    cluster("squeue", code=1)
    assert refused("stop", tmp_path) == "squeue: no; try again when SLURM answers"


def test_what_slurm_does_not_allow_is_told(cluster, tmp_path):
    slurm.record(tmp_path, 7, "mine")
    queued(cluster, tmp_path)
    cluster("scontrol", SCONTROL % ("PENDING", "None"))
    cluster("scancel", code=1)
    assert refused("stop", tmp_path) == "scancel 7: no; ask whose job it is, or your administrator"


def test_a_preparation_refuses_what_only_a_training_has(run, cluster):
    assert refused("submit", "prepare", run, "--nodes=2").startswith(
        "--nodes: a preparation has none; it takes --tasks"
    )


def test_a_pre_trained_model_is_counted_without_its_weights(run, cluster, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=8, n_layer=1, n_head=1, n_positions=64)).save_pretrained(
        tmp_path / "gpt2"
    )
    values = yaml.safe_load(run.read_text()) | {"model": {"name_or_path": str(tmp_path / "gpt2")}}
    run.write_text(yaml.safe_dump(values))
    result = sft_dist("submit", run, "--gpus-per-node=0")
    assert result.exit_code == 0, result.output
    assert "model: 3,9" in result.stdout


def test_a_job_submitted_by_hand_is_recorded_when_it_begins(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_JOB_NAME", "sft-dist")
    for _ in range(2):  # and in its next life not again
        assert slurm.main(["1", str(run)]) == 0
    assert slurm.jobs_of(tmp_path / "run") == [{"job": 12, "name": "sft-dist"}]


@pytest.mark.parametrize(("ranks", "code"), [("1", 0), ("3", 2)])
def test_the_batch_script_asks_whether_the_run_is_right(run, tmp_path, capsys, ranks, code):
    assert slurm.main([ranks, str(run)]) == code
    captured = capsys.readouterr()
    assert captured.out == ("" if code else f"{tmp_path}/run\n")
    assert ("global_batch_rows" in captured.err) == bool(code)


def test_zero_gpus_mean_a_rank_on_the_cpus():
    assert Options(gpus_per_node=0).counts == range(1, 2)
