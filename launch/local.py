"""Starts torchrun on this machine, keeps signals away from it, and tells the person how it went.

torchrun turns every signal into a failure and a traceback. So it runs in a session of its own, out of reach of the
terminal, and a wish to stop reaches the ranks through a file they look at between micro-batches.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from launch.settle import AS_IT_IS, Plan, Resume
from launch.train import lock
from sft_dist.console import loss_curve
from sft_dist.errors import ConfigError
from sft_dist.limits import SIGNALS, Verdict
from sft_dist.metrics import read_lines
from sft_dist.schema import RunConfig
from sft_dist.topology import Life, Topology

_TRAIN = Path(__file__).with_name("train.py")


def num_gpus() -> int:
    """GPUs of this machine that may be used; asked of the driver, so that torch need not be imported."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return len([d for d in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if d.strip() not in ("", "-1")])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def default_processes() -> int:
    """One process a GPU, or one."""
    return max(1, num_gpus())


def describe(config: RunConfig, processes: int, resume: Resume = AS_IT_IS) -> str:
    """The derived numbers of a run on so many processes of this machine."""
    return Plan.of(config, Topology(world_size=processes, local_world_size=processes), Life("print"), resume).describe()


def run(config: RunConfig, run_file: str, overrides: Sequence[str], processes: int, resume: Resume) -> int:
    """Check everything that can be checked, start the ranks, wait; returns the exit code.

    0: completed; 128 + signal number: stopped on request, all saved; else what the ranks ended with.
    """
    topology = Topology(world_size=processes, local_world_size=processes)
    plan = Plan.of(config, topology, Life("check"), resume)  # raises what is wrong before anything starts
    if config.train.micro_batch_rows == "auto":
        overrides = [*overrides, f"train.micro_batch_rows={plan.config.train.micro_batch_rows}"]
    if not resume.is_fresh:
        read_lines(Path(config.run_dir) / "metrics.jsonl")
    require_gpus(processes)
    lock(Path(config.run_dir)).close()  # the ranks would wait for one another before they said it
    with tempfile.TemporaryDirectory(prefix="sft-dist-") as folder:
        stop_file = Path(folder) / "stop"
        life = time.strftime("local-%Y%m%d-%H%M%S") + f"-{os.getpid()}"
        environment = {**os.environ, "SFT_DIST_LIFE": life, "SFT_DIST_STOP_FILE": str(stop_file)}
        environment.setdefault("SFT_DIST_BEGAN", str(int(time.time())))
        asked: list[int] = []
        _forward_signals(asked, stop_file)
        with subprocess.Popen(
            torchrun(_TRAIN, [run_file, *overrides, *resume.arguments()], processes),
            env=environment,
            start_new_session=True,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        ) as process:
            relay(process)
        code = process.returncode
        if sys.stdout.isatty():
            sys.stdout.write(
                "\x1b[?25h"
            )  # the cursor, which a rank that was killed at its progress bar has left hidden
    verdict = Verdict.read(Path(config.run_dir) / "verdicts", Life.from_environment(environment).name)
    if verdict is None:
        print(f"sft-dist: the ranks ended with code {code} and left no verdict: see above", file=sys.stderr)
        return 128 - code if code < 0 else code or 1
    if verdict.reason == "stopped":
        return 128 + (asked[0] if asked else signal.SIGTERM)
    if verdict.reason in ("completed", "plateaued", "spent"):
        if verdict.step:  # a budget can be too small for any
            print(summary(config), flush=True)
        return 0
    return verdict.exit_code


def require_gpus(processes: int) -> None:
    """Raises ConfigError where there are GPUs, but not one for each process."""
    if 0 < num_gpus() < processes:
        raise ConfigError(
            f"--nproc {processes}: this machine has {num_gpus()} usable GPUs, and each process needs its own. "
            f"Use --nproc {num_gpus()}, or CUDA_VISIBLE_DEVICES= to train on the CPU"
        )


def torchrun(program: Path, arguments: Sequence[str], processes: int) -> list[str]:
    """The command that starts so many ranks of a program on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command.append("--shutdown-timeout=5")  # what a rank that waits for a dead one gets before it is killed
    return [*command, str(program), *arguments]


def _forward_signals(asked: list[int], stop_file: Path) -> None:
    """The first signal asks the ranks to stop after saving; `relay` ends them on a second one."""

    def handle(number: int, _frame: object) -> None:
        asked.append(number)
        if len(asked) == 1:
            staged = stop_file.with_suffix(".partial")
            staged.write_text(signal.Signals(number).name)
            staged.replace(stop_file)
            os.write(2, b"\nstopping: the last completed step is being saved (once more to end at once)\n")
        else:
            raise KeyboardInterrupt

    for number in (*SIGNALS, signal.SIGHUP):
        signal.signal(number, handle)


def relay(process: subprocess.Popen) -> bool:
    """Pass on what the ranks say on stderr, but not torchrun's own account of a failure that the ranks explained.

    A second signal ends torchrun, which kills its ranks; returns whether that was so.
    """
    try:
        _pass_on(process)
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGTERM)
        _pass_on(process)
        return True
    return False


def _pass_on(process: subprocess.Popen) -> None:
    assert process.stderr is not None
    held = ""
    for line in process.stderr:
        if held and "<frozen runpy>" in line:
            held = ""
            break  # torchrun's traceback; a rank's begins in train.py
        if killed := re.search(r"exitcode: -(\d+)\) local_rank: (\d+)", line):
            name = signal.Signals(int(killed[1])).name
            hint = ": out of memory?" if name == "SIGKILL" else ""
            sys.stderr.write(f"{_no_bar()}sft-dist: rank {killed[2]} of this machine was killed by {name}{hint}\n")
        elif line.startswith("Traceback"):
            held = line
        elif not any(part in line for part in _NOISE):
            sys.stderr.write(_no_bar() + held + line)
            sys.stderr.flush()
            held = ""
    sys.stderr.write(held)
    for _ in process.stderr:  # the rest of torchrun's table
        pass


def _no_bar() -> str:
    """What wipes the progress bar that a rank draws on the same terminal, so that it comes again below a line; else nothing."""
    return "\r\x1b[2K" if sys.stdout.isatty() and sys.stderr.isatty() else ""


_NOISE = ("torch/distributed/run.py", "torch/distributed/elastic", "Setting OMP_NUM_THREADS", "*****")


def summary(config: RunConfig) -> str:
    """Before and after, the loss curve, and where to look next."""
    run_dir = Path(config.run_dir)
    records = read_lines(run_dir / "metrics.jsonl")
    measured = [line for line in records if "validation_loss" in line]
    lines = [loss_curve(records), ""]
    if len(measured) > 1:
        lines.append(f"{'':24}{'before':>12}{'after':>12}")
        for kind in ("loss", "perplexity", "accuracy", "f1", "exact_match"):
            name, shown = f"validation_{kind}", kind.replace("f1", "F1").replace("_", " ")
            if name in measured[0] and name in measured[-1]:
                lines.append(f"held-out {shown:15}{measured[0][name]:>12.4f}{measured[-1][name]:>12.4f}")
    lines += [
        "",
        f"TensorBoard:  tensorboard --logdir {run_dir / 'tensorboard'}",
        "next:",
        f"  sft-dist export {run_dir} {run_dir / 'export'}",
        f"  sft-dist eval {run_dir}",
        f'  sft-dist chat {run_dir} --prompt "…"',
    ]
    return "\n".join(lines)
