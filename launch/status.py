"""What a run is doing, for somebody who looks from outside."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch import slurm
from launch.settle import Plan
from sft_dist.config import read
from sft_dist.errors import ConfigError, DataError
from sft_dist.limits import Verdict
from sft_dist.retention import list_folders, step_of
from sft_dist.state import TrainState
from sft_dist.topology import Life, Topology
from sft_dist.usage import USAGE, gpu_seconds, read_usage

_TAIL_BYTES = 64_000  # of metrics.jsonl: enough for the speed of the last steps
_RECENT = 20  # steps


def runs_below(folder: Path) -> list[Path]:
    """The run folders in a folder, the one that was written to last at the end. Raises ConfigError where there is none."""
    seen = {path.parent for depth in ("", "*/", "*/*/") for name in _MARKS for path in folder.glob(f"{depth}{name}")}
    found = [path for path in seen if not path.name.startswith("previous-")]
    if not found:
        raise ConfigError(f"{folder}: no run there; name the run_dir of a run file")
    return sorted(
        found, key=lambda path: max(mark.stat().st_mtime for name in _MARKS if (mark := path / name).exists())
    )


_MARKS = ("metrics.jsonl", slurm.JOBS)  # of a run folder


def describe(run_dir: Path) -> tuple[str, bool]:
    """(queue, lives, step, speed, what is left, what was used, the last checkpoint; whether all of it is over).

    Raises ConfigError where no run is.
    """
    if not (run_dir / "run.yaml").is_file() and not slurm.jobs_of(run_dir):
        raise ConfigError(f"{run_dir}: no run there; name the run_dir of a run file")
    jobs, pid = slurm.live_jobs(run_dir), slurm.holder(run_dir)
    is_over = not jobs and pid is None
    lines = [
        *_queue(jobs, pid),
        *_lives(run_dir),
        *_steps(run_dir, is_over=is_over),
        *_checkpoint(run_dir),
        *_used(run_dir),
    ]
    return "\n".join([str(run_dir), *(f"  {name:12}{text}" for name, text in lines)]), is_over


def _queue(jobs: list[tuple[int, dict[str, str]]], pid: int | None) -> Iterator[tuple[str, str]]:
    for job, about in jobs:
        state, reason = about["JobState"], about.get("Reason", "None")
        where = f" on {about['NodeList']}" if state == "RUNNING" else f" ({reason})" if reason != "None" else ""
        begins = (
            f", not before {about['StartTime']}"
            if state == "PENDING" and about.get("StartTime", "")[:1].isdigit()
            else ""
        )
        yield "queue", f"job {job} {state}{where}{begins}, requeued {about['Restarts']} times"
    if not jobs and pid is None:
        yield "queue", "nothing of it waits or runs that can be seen from here"
    elif not jobs:
        yield "queue", f"process {pid} of this machine"


def _lives(run_dir: Path) -> Iterator[tuple[str, str]]:
    """Those that left a verdict, and those of the batch script's list that were killed before they could."""
    folder = run_dir / "verdicts"
    begun = [line.split()[0] for path in folder.glob("lives-*") for line in path.read_text().splitlines() if line]
    left = {path.stem: path.stat().st_mtime for path in folder.glob("*.json")}
    for life in sorted(left, key=left.__getitem__):
        verdict = Verdict.read(folder, life)
        if verdict is not None:
            yield "life", f"{life}: {verdict.reason}, {verdict.detail}"
    for life in begun:
        if life not in left:
            yield "life", f"{life}: no verdict: it runs, was killed, or its machine failed"


def _steps(run_dir: Path, *, is_over: bool) -> Iterator[tuple[str, str]]:
    lines = _tail(run_dir / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    if not steps:
        yield "step", "none yet"
        return
    last, total = steps[-1], _total(run_dir)
    measured = [line for line in lines if "validation_loss" in line]
    of = f" of {total:,}" if total else ""
    held_out = (
        f", validation loss {measured[-1]['validation_loss']:.4f} at step {measured[-1]['step']:,}" if measured else ""
    )
    yield "step", f"{last['step']:,}{of}, loss {last['loss']:.4f}{held_out}"
    seconds = statistics.median(line["step_seconds"] for line in steps[-_RECENT:])
    yield "speed", f"{last['tokens_per_second']:,.0f} tokens/s, {seconds:.2f} s a step"
    if total and total > last["step"] and not is_over:
        yield "left", f"{_duration((total - last['step']) * seconds)} at that speed"


def _checkpoint(run_dir: Path) -> Iterator[tuple[str, str]]:
    folders = list_folders(run_dir / "checkpoints")
    if not folders:
        yield "checkpoint", "none yet"
        return
    newest = folders[-1]
    try:
        age = _duration(time.time() - (newest / "manifest.json").stat().st_mtime)
        yield "checkpoint", f"step {step_of(newest):,}, {age} old"
        state = TrainState.from_json((newest / "state.json").read_bytes())
    except (OSError, ValueError, TypeError):
        return
    yield "learned", f"from {state.target_tokens:,} target tokens"


def _used(run_dir: Path) -> Iterator[tuple[str, str]]:
    lines = read_usage(run_dir / USAGE)
    if lines:
        lives = len({(line["life"], line["began"]) for line in lines})
        yield "used", f"{gpu_seconds(lines) / 3600:,.2f} GPU-hours in {lives} {'life' if lives == 1 else 'lives'}"


def _total(run_dir: Path) -> int | None:
    """Steps of the whole run; None where its shards cannot be seen from here."""
    try:
        return Plan.of(read(run_dir / "run.yaml"), Topology(), Life("status")).steps()
    except (ConfigError, DataError, OSError):
        return None


def _tail(path: Path) -> list[dict[str, Any]]:
    """The last records of a metrics file, which somebody may be writing to."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().split(b"\n")[1 if file.tell() > _TAIL_BYTES else 0 : -1]
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line]


def _duration(seconds: float) -> str:
    """For a person.

    >>> _duration(42), _duration(4000), _duration(200_000)
    ('42 s', '67 min', '55.6 h')
    """
    if seconds < 120:
        return f"{max(0.0, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3 * 3600 else f"{seconds / 3600:.1f} h"
