"""What a run will take: memory by part, steps, time, money, disk; and after it, how well that was foretold."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from launch import parts
from launch.fit import all_choices, model_of, needed
from launch.settle import Plan
from sft_dist import layers
from sft_dist.batch import num_steps
from sft_dist.config import read
from sft_dist.errors import ConfigError
from sft_dist.gpus import GIB, Gpu, gpu, names
from sft_dist.layers import Recompute
from sft_dist.metrics import read_lines
from sft_dist.plan import ERROR, Choice, Model, advice
from sft_dist.retention import list_folders
from sft_dist.schema import Money, RunConfig, money
from sft_dist.topology import Life, Topology
from sft_dist.usage import USAGE, gpu_seconds, read_usage
from sft_dist.zero import shipped

Say = Callable[[str], None]
_RECOMPUTE: dict[Recompute, str] = {False: "no", True: "yes", "selective": "part", "offload": "offload"}
_SHORT = {
    "weights": "weights", "grads": "gradients", "optim.": "optimizer", "activ.": "activations", "logits": "logits",
    "buffers": "buffers", "total": "total", "host": "host",
}  # fmt: skip
_RECENT = 50  # steps that a speed is the median of


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says of the machines."""

    nodes: int = 1
    gpus_per_node: int = 8
    gpu: str | None = None
    mfu: float = 0.4
    like: str | None = None

    @property
    def world_size(self) -> int:
        """Ranks of the run.

        >>> Options(nodes=4, gpus_per_node=8).world_size
        32
        """
        return self.nodes * self.gpus_per_node


def run(config: RunConfig, options: Options, say: Say) -> None:
    """Say what the run will take. Raises ConfigError, DataError, ModelError for what is wrong with it."""
    card = gpu(options.gpu) if options.gpu else None
    topology = Topology(world_size=options.world_size, local_world_size=options.gpus_per_node)
    plan = Plan.of(config, topology, Life("plan"), card=card, is_elsewhere=True)
    model = model_of(plan)
    say(f"model: {parts.describe(model.meta)}, the largest tensor {model.size.largest:,}")
    say(plan.describe())
    manifest = plan.shards.manifest
    targets = manifest.targets / manifest.rows * plan.batch.global_batch_rows
    say(f"targets: {targets:,.0f} target tokens a step, {manifest.fill:.1%} of the rows are filled")
    found = all_choices(plan, model, card)
    for line in memory_table(plan, found, card):
        say(line)
    for line in forecast(plan, model, card, options):
        say(line)


def memory_table(plan: Plan, found: list[Choice], card: Gpu | None) -> Iterator[str]:
    """A line a configuration, the run's own marked, and which one is best."""
    train = plan.config.train
    of = f" of {card.memory_bytes / GIB:,.1f} GiB ({card.name})" if card else ""
    yield (
        f"\nmemory of a GPU in GiB{of}, on {plan.topology.world_size} GPUs with {plan.batch.micro_batch_rows} rows a micro-batch "
        f"(± {ERROR:.0%}):\n"
    )
    head = "".join(f"{name:>8}" for name in _SHORT)
    yield f"  {'':15}{'recompute':>9}{head}{'':>4}{'largest micro-batch' if card else ''}"
    for choice in found:
        is_own = (choice.zero, choice.checkpointing) == (plan.config.zero, train.gradient_checkpointing)
        name = Path(choice.zero).stem if choice.zero in shipped() else choice.zero
        numbers = "".join(f"{getattr(choice.parts, part) / GIB:>8,.2f}" for part in _SHORT.values())
        fits = (
            ""
            if card is None
            else f"{'fits' if choice.parts.total <= card.usable_bytes else 'NO':>6}{choice.largest or 'none':>6}"
        )
        yield f"{'→ ' if is_own else '  '}{name:15}{_RECOMPUTE[choice.checkpointing]:>9}{numbers}{fits}"
    if card is None:
        yield f"\nwith --gpu it is told what fits: {', '.join(names())}, or its memory, as in 48gb"
        return
    fitting = [choice for choice in found if choice.largest]
    if not fitting:
        yield f"\n{advice(found, plan.config.zero, train.gradient_checkpointing)}"
        return
    best = min(fitting, key=lambda choice: choice.rank)
    yield (
        f"\nbest: zero={best.zero} train.gradient_checkpointing={str(best.checkpointing).lower()} "
        f"train.micro_batch_rows={best.largest}: the first that fits of what waits and recomputes least"
    )


def forecast(plan: Plan, model: Model, card: Gpu | None, options: Options) -> Iterator[str]:
    """Time, money and disk."""
    per_row = (plan.mixture or plan.shards.manifest).documents_per_row
    speed, source = _flops_per_second(plan, card, options)
    size = parts.checkpoint_bytes(model.meta)
    kept = parts.retention(plan)
    copies = kept.keep_last + kept.keep_best + 2
    yield (
        f"\ndisk: {size / 1e9:,.2f} GB a checkpoint; {copies * size / 1e9:,.2f} GB for the {kept.keep_last + kept.keep_best} kept, one in the "
        "making and one to be removed"
    )
    if speed is None:
        yield "time: needs --gpu with a GPU whose speed is known, or --like RUN_DIR"
        return
    row_seconds = model.flops(per_row) / (speed * plan.topology.world_size)
    seconds = plan.rows * row_seconds
    tokens = plan.shards.seq_len * plan.shards.manifest.fill / row_seconds
    hours = seconds * plan.topology.world_size / 3600
    yield f"speed: {tokens:,.0f} tokens/s, {plan.batch.global_batch_rows * row_seconds:,.2f} s a step, {source}"
    yield f"time: {_hours(seconds)} of steps = {hours:,.1f} GPU-hours{_cost(plan, hours)}; evaluation, saving and start-up come on top"
    yield from _against_budget(plan, seconds, hours)


def _flops_per_second(plan: Plan, card: Gpu | None, options: Options) -> tuple[float | None, str]:
    """(model FLOP/s of a GPU, how that is known)."""
    if options.like is not None:
        made = measured(Path(options.like))
        return made.flops, f"as {options.like} had, {made.flops / 1e12:,.1f} TFLOP/s a GPU"
    peak = card.flops(plan.config.train.precision) if card else None
    if card is None or peak is None:
        return None, ""
    train = plan.config.train
    share = layers.speed(train.gradient_checkpointing, is_compiled=train.compile)
    mfu = options.mfu * share
    less = f", of which recomputation takes {1 - share:.0%}" if share < 1 else ""
    return peak * mfu, f"if {options.mfu:.0%} of {card.name}'s {peak / 1e12:,.0f} TFLOP/s are used (--mfu{less})"


def _cost(plan: Plan, gpu_hours: float) -> str:
    text = plan.config.budget.price_per_gpu_hour
    if text is None:
        return ""
    price = money(text)
    return f" = {Money(gpu_hours * price.amount, price.currency).amount:,.2f} {price.currency}"


def _against_budget(plan: Plan, seconds: float, gpu_hours: float) -> Iterator[str]:
    limit = plan.config.budget.gpu_seconds
    if limit is not None and gpu_hours * 3600 > limit:
        steps = int(plan.steps() * limit / (gpu_hours * 3600))
        yield f"warning: the budget of {limit / 3600:,.1f} GPU-hours ends at about step {steps:,} of {plan.steps():,}; lower epochs, or raise it"


def _hours(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.1f} seconds"
    return f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else f"{seconds / 60:,.1f} minutes"


@dataclass(frozen=True, slots=True)
class Measured:
    """What a run has shown: of its steps' median speed, tokens a second of all GPUs and model FLOP/s of each."""

    plan: Plan
    model: Model
    tokens_per_second: float
    flops: float
    steps: int
    step_seconds: float
    peak_bytes: float
    gpu_hours: float
    checkpoint_bytes: int | None


def measured(run_dir: Path) -> Measured:
    """Read it from the run folder; raises ConfigError where there is none, or no step yet."""
    if not (run_dir / "run.yaml").is_file():
        raise ConfigError(f"{run_dir}: no run.yaml there; name the run_dir of a run that has begun")
    lines = [line for line in read_lines(run_dir / "metrics.jsonl") if "tokens_per_second" in line]
    usage = read_usage(run_dir / USAGE)
    if not lines or not usage:
        raise ConfigError(f"{run_dir}: no step was logged there yet; name a run that has done some")
    world_size = usage[-1]["gpus"]
    plan = Plan.of(read(run_dir / "run.yaml"), Topology(world_size=world_size), Life("plan"))
    model = model_of(plan)
    speed = statistics.median(line["tokens_per_second"] for line in lines[-_RECENT:])
    per_row = (plan.mixture or plan.shards.manifest).documents_per_row
    rows = speed / (plan.shards.seq_len * plan.shards.manifest.fill)
    folders = list_folders(run_dir / "checkpoints")
    size = None
    if folders:
        shards = json.loads((folders[-1] / "manifest.json").read_text())["files"]
        size = sum(entry["bytes"] for name, entry in shards.items() if name.startswith("shard-"))
    return Measured(
        plan,
        model,
        speed,
        rows * model.flops(per_row) / world_size,
        max(line["step"] for line in lines),
        statistics.median(line["step_seconds"] for line in lines[-_RECENT:]),
        max(line["memory_bytes"] for line in lines),
        gpu_seconds(usage) / 3600,
        size,
    )


def compare(run_dir: Path, options: Options, say: Say) -> None:
    """Say what was predicted of a run beside what it measured."""
    made = measured(run_dir)
    plan, model = made.plan, made.model
    train, card = plan.config.train, gpu(options.gpu) if options.gpu else None
    predicted = needed(plan, model)
    speed, source = _flops_per_second(plan, card, replace(options, like=None))
    factor = None if speed is None else speed / made.flops
    rows: list[tuple[str, float | None, float | None, str]] = [
        ("memory of a GPU, GiB", predicted.total / GIB, made.peak_bytes / GIB, "without a GPU: the process's resident memory"),
        ("tokens/s", None if factor is None else made.tokens_per_second * factor, made.tokens_per_second, source),
        ("seconds a step", None if factor is None else made.step_seconds / factor, made.step_seconds, ""),
        ("steps", num_steps(plan.rows, plan.batch), made.steps, "so far"),
        ("GPU-hours", None if factor is None else made.step_seconds / factor * plan.steps() * plan.topology.world_size / 3600,
         made.gpu_hours, "predicted: of steps alone"),
        ("a checkpoint, GB", parts.checkpoint_bytes(model.meta) / 1e9,
         None if made.checkpoint_bytes is None else made.checkpoint_bytes / 1e9, ""),
    ]  # fmt: skip
    say(f"{'':24}{'predicted':>14}{'measured':>14}{'':>4}")
    for name, foretold, seen, note in rows:
        cells = "".join(
            f"{'-' if value is None else f'{value:,.3f}'.rstrip('0').rstrip('.'):>14}" for value in (foretold, seen)
        )
        say(f"{name:24}{cells}    {note}".rstrip())
    say(f"\neach GPU computed {made.flops / 1e12:,.3f} TFLOP/s of the model" + _mfu(made.flops, card, train.precision))


def _mfu(flops: float, card: Gpu | None, precision: str) -> str:
    peak = card.flops(precision) if card else None
    if card is None or peak is None:
        return ""
    return f": an MFU of {flops / peak:.1%} of {card.name}'s {peak / 1e12:,.0f} TFLOP/s"
