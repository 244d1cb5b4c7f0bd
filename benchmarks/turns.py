"""Ways to do one thing, each in processes of its own and in turns; who fails is left out, and why is told."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table


def in_turns(
    program: str, names: list[str], words: list[Any], repeats: int
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """What each way measured in each repeat, and why the others did not.

    `program --one NAME *words` measures one and prints JSON in its last line; the last line of what fails says why.
    """
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    for repeat in range(1, repeats + 1):
        for name in list(runs):
            print(f"run {repeat} of {repeats}: {name}", file=sys.stderr, flush=True)
            command = [sys.executable, program, "--one", name, *map(str, words)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                runs[name].append(json.loads(done.stdout.splitlines()[-1]))
                continue
            print(done.stderr, file=sys.stderr)
            failed[name] = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
            del runs[name]
    return runs, failed


def timed(once: Callable[[], None], count: int, device: str, between: Callable[[], None]) -> dict[str, list[float]]:
    """Seconds that each call takes, until the device is done too; `between` calls something else happens, which is not timed."""
    clocks: dict[str, Callable[[], float]] = {"wall_seconds": time.perf_counter, "cpu_seconds": time.process_time}
    seconds: dict[str, list[float]] = {name: [] for name in clocks}
    for _ in range(count):
        between()
        wait_for(device)
        began = {name: clock() for name, clock in clocks.items()}
        once()
        wait_for(device)
        for name, clock in clocks.items():
            seconds[name].append(clock() - began[name])
    return seconds


def wait_for(device: str) -> None:
    """Until a GPU has done what it was given; a CPU has."""
    if device == "cuda":
        torch.cuda.synchronize()


def summary(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Median and minimum of the seconds over all calls of all repeats.

    >>> summary([{"wall_seconds": [1.0, 3.0], "cpu_seconds": [2.0, 2.0]}, {"wall_seconds": [5.0, 3.0], "cpu_seconds": [2.0, 4.0]}])
    {'wall_seconds': 3.0, 'min_wall_seconds': 1.0, 'cpu_seconds': 2.0, 'min_cpu_seconds': 2.0}
    """
    result: dict[str, float] = {}
    for clock in ("wall_seconds", "cpu_seconds"):
        seconds = np.concatenate([run[clock] for run in runs])
        result |= {clock: float(np.median(seconds)), f"min_{clock}": float(seconds.min())}
    return result


def versions(*names: str) -> dict[str, str]:
    """Of those distributions that are installed."""
    found: dict[str, str] = {}
    for name in names:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def show(title: str, columns: list[str], rows: dict[str, list[str]], failed: dict[str, str]) -> None:
    """A table with a row a way, and below it who has none."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    table = Table(title=title, title_justify="left")
    for column in ("", *columns):
        table.add_column(column, justify="right" if column else "left")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    console.print(table)
    for name, why in failed.items():
        console.print(f"{name} has no numbers: {why}", markup=False, soft_wrap=True)
