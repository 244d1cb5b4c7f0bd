"""Commands as a person types them, in a folder that looks like a clone but whose runs go elsewhere."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.workers import run_workers

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


def clone(folder: Path) -> Path:
    """A folder with the project's own folders in it."""
    for name in ("launch", "examples", "ds_configs", "slurm"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def start(command: str, folder: Path, environment: dict[str, str] = ENVIRONMENT, **more) -> subprocess.Popen:
    """Start a command there, its output joined and readable line by line."""
    return subprocess.Popen(
        shlex.split(command),
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **more,
    )


def run(
    command: str,
    folder: Path,
    *,
    code: int = 0,
    deadline: float = 180.0,
    environment: dict[str, str] = ENVIRONMENT,
) -> str:
    """Run a command there to its end and return what it printed; fails when it ends with another code."""
    process = start(command, folder, environment)
    try:
        output, _ = process.communicate(timeout=deadline)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"{command}: no end within {deadline:.0f} s") from None
    assert process.returncode == code, f"{command} ended with {process.returncode}:\n{output}"
    return output


def forked(
    command: str, folder: Path, *, code: int = 0, typed: str | None = None, before: Callable[[], None] | None = None
) -> str:
    """The same for a command of `sft-dist` that starts no processes, in a forked one that has imported everything.

    `typed` is its standard input, which is no terminal; `before` is called there first.
    """
    [(found, output)] = run_workers(_invoked, 1, command, folder, typed, before)
    assert found == code, f"{command} ended with {found}:\n{output}"
    return output


def _invoked(topology, command, folder, typed, before):
    from click.testing import CliRunner

    from launch.cli import main

    os.chdir(folder)
    if before is not None:
        before()
    name, *arguments = shlex.split(command)
    assert name == "sft-dist", command
    result = CliRunner().invoke(main, arguments, input=typed)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output
