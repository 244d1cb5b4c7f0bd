"""Where the time of a step goes: some steps of a run under the profiler, as a table, with advice; the run is left alone.

torchrun --nproc_per_node=8 launch/profiling.py RUN.yaml [KEY=VALUE...]
"""

from __future__ import annotations

import argparse
import gzip
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # started by path from a clone
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch import local
from launch.settle import Plan, find_compiler
from launch.step_report import Fed, Found, Setting, advice, told
from sft_dist.config import load
from sft_dist.errors import ConfigError, SftDistError
from sft_dist.files import publish, set_aside
from sft_dist.schema import RunConfig
from sft_dist.topology import Life, Topology
from sft_dist.zero import zero_stage

if TYPE_CHECKING:
    import torch

    from sft_dist.comms import Comms
    from sft_dist.engine import Engine
    from sft_dist.flops import Cost
    from sft_dist.layers import Recompute
    from sft_dist.plan import Model


@dataclass(frozen=True, slots=True)
class Options:
    """How many steps are looked at, of how many micro-batches at most, and where the trace is written."""

    steps: int = 3
    micro_batches: int = 16
    trace: Path = Path("trace.json.gz")

    def arguments(self) -> list[str]:
        """As `launch/profiling.py` takes them.

        >>> Options(trace=Path("t.json")).arguments()
        ['--steps=3', '--micro-batches=16', '--trace=t.json']
        """
        return [f"--steps={self.steps}", f"--micro-batches={self.micro_batches}", f"--trace={self.trace}"]


def run(config: RunConfig, run_file: str, overrides: Sequence[str], processes: int, options: Options) -> int:
    """Check everything that can be checked, then profile: in this process, or in several; returns the exit code."""
    _quiet()
    plan = Plan.of(config, Topology(world_size=processes, local_world_size=processes), Life("profile"))
    local.require_gpus(processes)
    _require_place(options.trace)
    if processes == 1:
        try:
            return profile(plan, options)
        except KeyboardInterrupt:
            return _interrupted()
    settled = [*overrides, f"train.micro_batch_rows={plan.config.train.micro_batch_rows}"]
    command = local.torchrun(Path(__file__), [run_file, *settled, *options.arguments()], processes)
    with subprocess.Popen(
        command, start_new_session=True, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as process:
        if local.relay(process):
            return _interrupted()
    return 128 - process.returncode if process.returncode < 0 else process.returncode


def _interrupted() -> int:
    print("sft-dist: interrupted", file=sys.stderr)
    return 128 + signal.SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """One rank of several; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_file", metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    usual = Options()
    parser.add_argument("--steps", type=int, default=usual.steps)
    parser.add_argument("--micro-batches", type=int, default=usual.micro_batches)
    parser.add_argument("--trace", type=Path, default=usual.trace)
    given = parser.parse_intermixed_args(arguments)
    _quiet()
    topology = Topology()
    try:
        topology = Topology.from_environment()
        plan = Plan.of(load(given.run_file, given.overrides), topology, Life("profile"))
        return profile(plan, Options(given.steps, given.micro_batches, given.trace))
    except SftDistError as error:
        if topology.local_rank == 0:
            print(f"sft-dist: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def _quiet() -> None:
    """Only what is for people; to be called before torch is imported, whose profiler talks on stderr."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _require_place(trace: Path) -> None:
    if not trace.parent.is_dir():
        raise ConfigError(f"--trace {trace}: there is no folder {trace.parent}; make it, or choose another place")
    if trace.is_dir() or not os.access(trace.parent, os.W_OK):
        raise ConfigError(f"--trace {trace}: no file can be written there; choose another place")


def cut(plan: Plan, micro_batches: int) -> Plan:
    """The plan with steps of no more micro-batches: a trace of thousands of them could not be looked at."""
    batch = plan.batch
    accumulation_steps = min(batch.accumulation_steps, micro_batches)
    rows = accumulation_steps * batch.micro_batch_rows * batch.world_size
    return replace(plan, batch=replace(batch, accumulation_steps=accumulation_steps, global_batch_rows=rows))


def _uncompiled(plan: Plan) -> Plan:
    train = plan.config.train.model_copy(update={"compile": False})
    return replace(plan, config=plan.config.model_copy(update={"train": train}))


def profile(whole: Plan, options: Options) -> int:
    """Profile the first steps of the run's stream on this rank; the main rank says what was found. Nothing of the run is touched."""
    from torch.cuda import is_available as has_gpu

    from launch import fit, parts, prove
    from sft_dist.flops import Cost

    is_compiled, whole = whole.config.train.compile, _uncompiled(whole)
    planned = fit.model_of(whole)
    if whole.topology.is_main and has_gpu():
        fit.refuse_what_cannot_fit(whole, planned, fit.of_this_machine(whole.topology))
    model, made = parts.model(whole)
    cost = None if planned.has_experts else Cost(model, made)  # before ZeRO shards the model
    comms, device = parts.comms(whole)
    whole = fit.alike(whole, comms)
    plan = cut(whole, options.micro_batches)
    num_steps = min(options.steps, -(-plan.rows // plan.batch.global_batch_rows))
    plan = replace(plan, rows=min(plan.rows, num_steps * plan.batch.global_batch_rows))
    engine = parts.engine(plan, model, comms)
    proven = prove.proven(plan, engine, comms)
    if device.type == "cuda":  # memory that runs out ends with numbers, and with what would fit
        fit.dry_step(plan, engine, parts.full_micro_batch(plan, device))
    found = comms.gather_to_main(_found(plan, engine, comms, cost, num_steps, options.trace))
    comms.close()
    if not found:
        return 0
    advised = [f"  * {line}" for line in advice(found, _setting(plan, whole, planned, is_compiled=is_compiled))]
    nothing = ["  none: no part stands out that a key of the run file would change"]
    if is_compiled:
        proven += "\nnote: profiled with train.compile=false, because the parts of a compiled layer cannot be told from one another"
    lines = [proven, *told(plan.batch, whole.batch, found, options.trace), "", "advice:", *(advised or nothing)]
    print("\n".join(lines), flush=True)
    return 0


def _found(plan: Plan, engine: Engine, comms: Comms, cost: Cost | None, num_steps: int, wanted: Path) -> Found:
    """What this rank measures; every rank calls it, and the main one leaves its trace where it is `wanted`."""
    from launch import parts
    from sft_dist.state import TrainState
    from sft_dist.step_profile import matmul_flops
    from sft_dist.step_profile import profile as profiled

    def steps() -> Iterator[Any]:
        return parts.steps(plan, TrainState(), engine.device)

    comms.barrier()
    peak = matmul_flops(engine.device, plan.config.train.precision)  # all ranks at once: on a CPU they share it
    comms.barrier()
    with tempfile.TemporaryDirectory(prefix="sft-dist-") as folder:
        trace = Path(folder) / "trace.json"
        seen = profiled(engine, comms, steps, num_steps, trace)
        if plan.topology.is_main:
            _publish(trace, wanted)
    fed, sharers = Fed.of(steps(), plan.shards.seq_len), plan.config.train.sequence_parallel
    return Found(
        seen if plan.topology.is_main else seen.without_memory(),
        fed,
        cost.flops(fed.lengths, fed.num_targets) / sharers if cost else None,
        peak,
        _sheet(engine.device, plan),
        fed.dense_ratio if engine.deepspeed.module.config._attn_implementation == "sdpa" else None,
        sharers,
    )


def _setting(plan: Plan, whole: Plan, planned: Model, *, is_compiled: bool) -> Setting:
    """What of the run could be changed, on this machine; `is_compiled`: as its file says, not as it was profiled."""
    from torch.cuda import is_available as has_gpu

    from launch import fit

    train, batch = plan.config.train, whole.batch

    def largest(checkpointing: Recompute) -> int | None:
        card, rows = fit.of_this_machine(plan.topology), batch.accumulation_steps * batch.micro_batch_rows
        if planned.has_experts:
            return None
        return planned.largest(
            plan.zero, card, world_size=plan.topology.world_size, rows_per_rank=rows, checkpointing=checkpointing
        )

    return Setting(
        attention=train.attention,
        has_varlen=has_gpu() and train.precision != "fp32",
        is_compiled=is_compiled,
        can_compile=not is_compiled and has_gpu() and find_compiler() is not None and train.sequence_parallel == 1,
        zero_stage=zero_stage(plan.zero),
        checkpointing=train.gradient_checkpointing,
        batch=plan.batch,
        whole=batch,
        largest=largest,
    )


def _publish(made: Path, trace: Path) -> None:
    """Put the trace where it is wanted, in one rename; what was there is set aside."""
    staged = trace.with_name(f".{trace.name}-{os.getpid()}.partial")
    try:
        content = made.read_bytes()
        staged.write_bytes(gzip.compress(content, 6) if trace.suffix == ".gz" else content)
        if trace.exists():
            set_aside(trace)
        publish(staged, trace)
    finally:
        staged.unlink(missing_ok=True)


def _sheet(device: torch.device, plan: Plan) -> tuple[str, float] | None:
    """(name, FLOP/s) of the GPU's data sheet, where it is known."""
    import torch

    from sft_dist.gpus import of_driver

    card = of_driver(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    flops = card.flops(plan.config.train.precision) if card else None
    return (card.name, flops) if card and flops else None


if __name__ == "__main__":
    from launch.rank import leave_after

    leave_after(main)
