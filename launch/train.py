"""One rank of a training run: what torchrun, deepspeed or srun starts.

torchrun --nproc_per_node=8 launch/train.py RUN.yaml [KEY=VALUE...]
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # started by path from a clone
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.settle import Plan, Resume, check_compiler, check_deadline
from sft_dist import watchdog
from sft_dist.config import load
from sft_dist.errors import BusyError, ConfigError, DataError, HealthError, SftDistError
from sft_dist.files import Hold, hold
from sft_dist.identity import ALLOWANCES
from sft_dist.limits import Reason, StopRequest, Verdict
from sft_dist.metrics import Metrics, read_lines
from sft_dist.schema import RunConfig
from sft_dist.state import TrainState
from sft_dist.topology import Life, Topology, node_name

if TYPE_CHECKING:
    import torch

    from sft_dist.checkpoint import Checkpoints
    from sft_dist.engine import Engine
    from sft_dist.usage import Budget


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, build the parts, train, leave a verdict; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_file", metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--fresh", action="store_true", help="start over; the old run is set aside, not deleted")
    parser.add_argument("--from", dest="from_step", type=int, metavar="STEP", help="go on from this checkpoint")
    parser.add_argument("--reset-data", action="store_true", help="go on with the stream of rows from its beginning")
    parser.add_argument("--skip-rows", type=int, default=0, metavar="N", help="leave out the next N rows of the stream")
    parser.add_argument("--allow", action="append", default=[], choices=ALLOWANCES, help="go on although this changed")
    parser.add_argument(
        "--local_rank", help=argparse.SUPPRESS
    )  # the deepspeed launcher passes it; the environment has it too
    options = parser.parse_intermixed_args(arguments)

    topology, config, life = Topology(), None, Life("unknown")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        life = Life.from_environment()
        life = replace(life, began=life.began or time.time())
        stop = StopRequest(life.stop_file, life.end_time, life.grace_seconds)
        stop.install()  # before torch is imported: a signal during start-up must not kill
        topology = Topology.from_environment()
        config = load(options.run_file, options.overrides)
        resume = Resume(options.fresh, options.from_step, options.reset_data, options.skip_rows, tuple(options.allow))
        return run_plan(_plan_of_rank(config, topology, life, resume), stop)
    except SftDistError as error:
        _tell(error, topology, Path(config.run_dir) / "verdicts" if config is not None else None, life)
        return error.exit_code


def _plan_of_rank(config: RunConfig, topology: Topology, life: Life, resume: Resume) -> Plan:
    """As `Plan.of`; where the batch script has found the run right, what is wrong here is the node. Raises HealthError too."""
    stage = os.environ.get("SFT_DIST_STAGE")
    try:
        return Plan.of(config, topology, life, resume, Path(stage) if stage else None)
    except (ConfigError, DataError) as error:
        if "SFT_DIST_CHECKED" not in os.environ:
            raise
        raise HealthError(f"node {node_name()}: {error} (on the first node it was right)", (node_name(),)) from None


def _tell(error: SftDistError, topology: Topology, verdicts: Path | None, life: Life) -> None:
    """Say what is wrong once a machine, and leave one verdict: mostly all ranks find it, but one may be alone with it."""
    if not topology.is_main and verdicts is not None:
        time.sleep(1.0)  # the main rank's word, if it found the same
    has_verdict = verdicts is not None and Verdict.read(verdicts, life.name) is not None
    if topology.local_rank == 0 or (verdicts is not None and not has_verdict):
        print(f"sft-dist: {error}", file=sys.stderr, flush=True)
    if verdicts is not None and not has_verdict:
        bad_nodes = ",".join(error.nodes) if isinstance(error, HealthError) else ""
        Verdict(life.name, error.verdict, -1, str(error), error.exit_code, bad_nodes).write(verdicts)


def run_plan(plan: Plan, stop: StopRequest) -> int:
    """Build the parts of a run and train."""
    from torch.cuda import is_available as has_gpu

    from launch import fit, parts
    from sft_dist.preflight import require_room
    from sft_dist.reproduce import require_same

    check_deadline(plan.config)
    check_compiler(plan.config)
    tight = None
    if plan.topology.is_main and has_gpu():  # GPUs are alike, or the preflight says so
        tight = fit.refuse_what_cannot_fit(plan, fit.model_of(plan), fit.of_this_machine(plan.topology))
    held = lock(plan.run_dir) if plan.topology.is_main else None
    model, made = parts.model(plan)
    identity = parts.identity(plan, made, model)
    require_same(plan.config.reproduces, identity, plan.config)
    checkpoints = parts.checkpoints(plan, identity)
    if not plan.resume.is_fresh and plan.topology.is_main:
        read_lines(plan.run_dir / "metrics.jsonl")
    if not plan.resume.is_fresh:
        checkpoints.check(plan.resume.from_step)
    size = parts.checkpoint_bytes(model)
    if plan.config.evaluate.prompts:
        parts.sampling(plan)  # raises where one is too long
    room = require_room(checkpoints.folder, checkpoints.retention, size, is_fresh=plan.resume.is_fresh)

    warnings = [line for line in (tight, room) if line]
    comms, device = parts.comms(plan)
    checkpoints.join(comms)
    plan = replace(plan, life=comms.broadcast(plan.life))  # under a plain torchrun each rank made up its own
    plan = fit.alike(plan, comms)
    if plan.topology.is_main:
        if plan.resume.is_fresh:
            set_aside(plan.run_dir)
        checkpoints.sweep()
        Verdict.sweep(plan.run_dir / "verdicts")
        watchdog.clear(plan.run_dir / parts.WATCH)
        parts.write_run_files(plan, made)
    comms.barrier()

    watching, journal = parts.watchdog(plan), parts.journal(plan)
    budget = parts.budget(plan, journal)
    try:
        reason, state, total = _train(plan, model, made, size, warnings, checkpoints, device, stop, watching, budget)
    finally:
        if journal is not None:
            journal.close()
        if watching is not None:
            watching.close()
    causes = [cause for cause in comms.gather(stop.cause) if cause]
    if plan.topology.is_main:
        detail = f"asked to stop by {causes[0]}" if causes and reason == "stopped" else f"{state.step} of {total} steps"
        early = parts.early_stopping(plan)
        if reason == "plateaued" and early is not None and state.best is not None:
            detail = early.describe(state.best)
        if reason == "spent":
            detail = budget.cause or detail
        Verdict(plan.life.name, reason, state.step, detail).write(plan.run_dir / "verdicts")
        told = parts.told_at_the_end(plan, state.step) if reason != "stopped" else []
        print("\n".join([*told, _last_word(plan, reason, state.step, total, detail)]), flush=True)
    comms.barrier()
    comms.close()
    if held is not None:
        held.close()
    return 0


def _train(
    plan: Plan,
    model: Any,
    made: Any,
    size: int,
    warnings: Sequence[str],
    checkpoints: Checkpoints,
    device: torch.device,
    stop: StopRequest,
    watching: watchdog.Watchdog | None,
    budget: Budget,
) -> tuple[Reason, TrainState, int]:
    """From a model to its last step; returns why it ended, the state that is saved by then, and the steps of the run."""
    from launch import fit, going_on, parts, prove
    from sft_dist.preflight import rehearse

    def beat(phase: str) -> None:
        if watching is not None:
            watching.beat(0, phase)
        budget.enter(phase)

    beat("examine the machines")
    nodes, healthy = parts.examine(plan, checkpoints.comms)
    beat("build the engine")
    about = parts.describe(model)
    engine = parts.engine(plan, model, checkpoints.comms)
    beat("prove isolation and head")
    proven = prove.proven(plan, engine, checkpoints.comms)
    if device.type == "cuda":  # where there is none, memory that runs out is no error that could be caught
        beat("dry step")
        fit.dry_step(plan, engine, parts.full_micro_batch(plan, device))
    beat("restore")
    state, resumed_from = going_on.resume(plan, checkpoints, engine)
    total = plan.steps(state)
    beat("write a sample")
    speed = rehearse(checkpoints, engine.fragments)
    metrics, say = parts.metrics(plan, state, total, budget)
    for line in [
        f"{plan.describe()}\nmodel: {about}; {proven}",
        resumed_from,
        f"a checkpoint: {size / 1e6:,.1f} MB, {size / speed:,.2f} s at the {speed / 1e9:.2f} GB/s of {checkpoints.folder}",
        *healthy,
        *warnings,
        *_told_of_time(plan.life),
    ]:
        say(line)
    stop.save_seconds = size / speed
    beat("start-up")
    about_nodes = nodes if len(nodes) > 1 else []
    return _to_the_end(plan, state, metrics, engine, checkpoints, device, stop, watching, budget, about_nodes)


def _told_of_time(life: Life) -> list[str]:
    if life.end_time is None:
        return []
    end = time.strftime("%F %T", time.localtime(life.end_time))
    return [f"time: this life ends at {end}; it saves and leaves before"]


def _to_the_end(
    plan: Plan,
    resumed: TrainState,
    metrics: Metrics,
    engine: Engine,
    checkpoints: Checkpoints,
    device: torch.device,
    stop: StopRequest,
    watching: watchdog.Watchdog | None,
    budget: Budget,
    nodes: Sequence[str],
) -> tuple[Reason, TrainState, int]:
    """Train from `resumed` on, and from an earlier checkpoint where steps can no longer be applied; returns as `_train` does."""
    from launch import going_on, parts
    from sft_dist.garbage import collected
    from sft_dist.stragglers import Stragglers
    from sft_dist.trainer import train

    state, total = resumed, plan.steps(resumed)
    evaluator = parts.evaluator(plan, checkpoints.comms)
    try:
        while True:
            reason, state = train(
                steps=collected(parts.steps(plan, state, device)),
                engine=engine,
                comms=checkpoints.comms,
                state=state,
                learning_rate=parts.schedule(plan, total),
                evaluator=evaluator,
                checkpoints=checkpoints,
                metrics=metrics,
                stop=stop,
                cadence=parts.cadence(plan, total),
                watchdog=watching,
                budget=budget,
                early_stopping=parts.early_stopping(plan),
                is_measured=state.step < total or parts.has_measured(plan, state, evaluator),
                owes_evaluation=state.step < total and parts.owes_evaluation(plan, state, checkpoints.comms),
                stragglers=Stragglers(nodes) if nodes else None,
                epochs_of_sets=plan.mixture.epochs if plan.mixture and len(plan.mixture.names) > 1 else None,
                bad_steps=parts.bad_steps(plan),
                on_bad_step=functools.partial(parts.tell_bad_step, plan),
            )
            if reason != "diverged":
                return reason, state, total
            if watching is not None:
                watching.beat(state.step, "restore")
            budget.enter("restore")
            state = going_on.roll_back(plan, checkpoints, engine, state, resumed)
            total = plan.steps(state)
            metrics.close()
            metrics, _ = parts.metrics(plan, state, total, budget, is_going_back=True)
    finally:
        metrics.close()


def _last_word(plan: Plan, reason: str, step: int, total: int, detail: str) -> str:
    if reason == "completed":
        return f"completed: {step} of {total} steps, in {plan.run_dir}"
    if reason == "plateaued":
        return f"ended early after step {step} of {total}: {detail}. `sft-dist export {plan.run_dir} OUT` takes the best one"
    if reason == "spent":
        return f"ended by its budget after step {step} of {total}: {detail}. A larger budget goes on from there"
    kept = f"step {step} is saved" if step else "no step was done"
    once = " ".join(argument for argument in plan.resume.arguments() if not argument.startswith("--allow"))
    without = f" without {once}" if once else ""
    return f"stopped after step {step} of {total} ({detail}); {kept}. The same command{without} goes on from there"


def lock(run_dir: Path) -> Hold:
    """Hold the run folder until what is returned is closed. Raises BusyError when it is held."""
    try:
        return hold(run_dir / ".lock")
    except BlockingIOError as error:
        raise BusyError(
            f"run_dir: {run_dir} is in use by {error}; wait for it, stop it, or choose another run_dir"
        ) from None


# What a run writes, beside its shards.
_RUN_FILES = (
    "run.yaml",
    "environment.json",
    "metrics.jsonl",
    "tensorboard",
    "checkpoints",
    "verdicts",
    "model",
    "export",
    ".watch",
    "usage.jsonl",
    "bad_rows.jsonl",
    "services",
    "report.html",
)


def set_aside(run_dir: Path) -> Path | None:
    """Move what an earlier run left in `run_dir` to `run_dir/previous-N`; None when there was nothing."""
    found = [run_dir / name for name in _RUN_FILES if (run_dir / name).exists()]
    found += sorted(run_dir.glob("metrics.jsonl.*"))
    if not found:
        return None
    number = 1
    while (aside := run_dir / f"previous-{number}").exists():
        number += 1
    aside.mkdir()
    for path in found:
        shutil.move(path, aside / path.name)
    return aside


if __name__ == "__main__":
    from launch.rank import leave_after

    leave_after(main)
