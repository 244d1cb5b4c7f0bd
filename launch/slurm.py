"""What SLURM knows of a run's jobs, and how one is ended; and what the batch script asks of the run file."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch.settle import Plan
from sft_dist.config import load
from sft_dist.errors import ConfigError, DataError, SftDistError
from sft_dist.files import publish_text
from sft_dist.topology import Life, Topology, node_name

JOBS = "jobs.json"  # of a run folder: what was submitted for it, the last one last


def sbatch(script: Path, *arguments: str, options: Sequence[str] = ()) -> int:
    """Submit a script; returns the job's number. Raises ConfigError with what sbatch says."""
    made = _slurm("sbatch", "--parsable", *options, str(script), *arguments)
    if made.returncode:
        raise ConfigError(f"sbatch: {made.stderr.strip()}; mend the option, or see `sinfo` for what there is")
    return int(made.stdout.strip().split(";")[0])


def record(run_dir: Path, job: int, name: str) -> None:
    """Remember what was submitted for a run, for `status` and `stop`."""
    known = [*jobs_of(run_dir), {"job": job, "name": name, "submitted_at": time.time()}]
    publish_text(run_dir / JOBS, json.dumps(known, indent=1))


def jobs_of(run_dir: Path) -> list[dict]:
    """What was submitted for a run, in order; raises DataError."""
    try:
        return [
            {"job": int(each["job"]), "name": str(each["name"])} for each in json.loads((run_dir / JOBS).read_text())
        ]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{run_dir / JOBS}: {error}; remove it: it only tells `status` and `stop` which jobs there are"
        ) from None


def live_jobs(run_dir: Path) -> list[tuple[int, dict[str, str]]]:
    """The jobs of a run that wait, run, or come again, with what SLURM knows of them (JobState, Restarts, NodeList, Reason …).

    Raises ConfigError where SLURM does not answer.
    """
    known = {each["job"]: each["name"] for each in jobs_of(run_dir)}
    if not known or shutil.which("squeue") is None:
        return []
    queue = _slurm("squeue", "--noheader", "--format=%A %j", f"--jobs={','.join(map(str, known))}")
    if queue.returncode and "Invalid job id" not in queue.stderr:
        raise ConfigError(f"squeue: {queue.stderr.strip()}; try again when SLURM answers")
    # by its name too: where numbers begin anew, or several clusters share a folder, another's job may have this number
    found = [job for job, name in known.items() if f"{job} {name}" in queue.stdout.splitlines()]
    about = [(job, _slurm("scontrol", "show", "job", str(job)).stdout) for job in found]
    return [(job, dict(re.findall(r"(\w+)=(\S*)", text))) for job, text in about if "JobState=" in text]


def stop(run_dir: Path, *, at_once: bool) -> str:
    """End a run and keep it ended: after a checkpoint, or `at_once`; returns what to tell the person.

    Raises ConfigError when nothing of the run waits or runs where this can see it, or SLURM refuses.
    """
    if jobs := live_jobs(run_dir):  # the waiting ones first
        return "\n".join(_stop_job(job, about, at_once=at_once) for job, about in reversed(jobs))
    pid = holder(run_dir)
    if pid is None:
        raise ConfigError(
            f"{run_dir}: nothing waits or runs for it here; `sft-dist status {run_dir}` tells what is known"
        )
    os.kill(pid, signal.SIGKILL if at_once else signal.SIGTERM)
    return f"process {pid} " + ("is killed; the newest checkpoint stays" if at_once else "saves and ends")


def _stop_job(job: int, about: dict[str, str], *, at_once: bool) -> str:
    if not at_once and about["JobState"] == "RUNNING":
        _done("scontrol", "update", f"JobId={job}", "Requeue=0")
        if _slurm("scancel", "--batch", "--signal=USR1", str(job)).returncode == 0:
            return f"job {job} saves and ends; it is not requeued"
    _done("scancel", str(job))
    return f"job {job} ({about['JobState']}) is cancelled; the newest checkpoint stays"


def holder(run_dir: Path) -> int | None:
    """The process of this machine that has the run folder's lock open; None: none that can be seen from here."""
    path = (run_dir / ".lock").resolve()
    try:
        held = re.fullmatch(r"process (\d+) on (\S+)", path.read_text().strip())
        if held is None or held[2] != node_name({}):
            return None
        # its number may have become another's since: that one has not this file open
        is_open = any(os.readlink(each) == str(path) for each in Path(f"/proc/{held[1]}/fd").iterdir())
    except OSError:
        return None
    return int(held[1]) if is_open else None


def _done(*command: str) -> None:
    """Raises ConfigError where SLURM refuses."""
    made = _slurm(*command)
    if made.returncode:
        raise ConfigError(f"{' '.join(command)}: {made.stderr.strip()}; ask whose job it is, or your administrator")


def _slurm(*command: str) -> subprocess.CompletedProcess[str]:
    if shutil.which(command[0]) is None:
        raise ConfigError(
            f"{command[0]}: no SLURM on this machine; log in to the cluster, or use `sft-dist train` here"
        )
    return subprocess.run(command, capture_output=True, text=True, check=False)


def main(arguments: Sequence[str]) -> int:
    """What the batch script asks on the first node: is the run right on so many ranks? Prints its folder.

    A job that was submitted without `sft-dist submit` is recorded here.
    """
    ranks, run_file, *overrides = arguments
    try:
        config = load(run_file, overrides)
        Plan.of(config, Topology(world_size=int(ranks)), Life("batch"))
        run_dir, job = Path(config.run_dir), os.environ.get("SLURM_JOB_ID")
        if job and int(job) not in [each["job"] for each in jobs_of(run_dir)]:
            run_dir.mkdir(parents=True, exist_ok=True)
            record(run_dir, int(job), os.environ.get("SLURM_JOB_NAME", ""))
    except SftDistError as error:
        print(f"sft-dist: {error}", file=sys.stderr)
        return error.exit_code
    print(config.run_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
