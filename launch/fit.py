"""What this machine can hold: `micro_batch_rows: auto` is settled by it, and what cannot fit is refused."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from launch import parts
from launch.settle import Plan
from sft_dist.comms import Comms
from sft_dist.engine import Engine
from sft_dist.errors import ConfigError
from sft_dist.gpus import GIB, Gpu
from sft_dist.layout import MOMENTS
from sft_dist.memory import Parts
from sft_dist.plan import Choice, Model, advice, choices, divisors, require_fit
from sft_dist.retention import list_folders, step_of
from sft_dist.topology import Topology
from sft_dist.zero import shipped, zero_config


def model_of(plan: Plan) -> Model:
    """The run's model, to be planned with; nothing of it is loaded but its configuration."""
    with torch.device("meta"):
        meta, made = parts.model(plan, with_weights=False)
    train = plan.config.train
    sharers, tile = train.sequence_parallel, train.mlp_tile_tokens
    return Model(plan.config.model, made, meta, plan.shards.seq_len, train.precision, sharers, tile)


def of_this_machine(topology: Topology) -> Gpu:
    """The smallest GPU that may be used, or where there is none a rank's part of the machine's memory."""
    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        smallest = min(found, key=lambda device: device.total_memory)
        return Gpu(smallest.name, float(smallest.total_memory))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Gpu("this machine's memory", memory / topology.local_world_size)


def settled(plan: Plan, card: Gpu) -> Plan:
    """The plan, whose micro-batch is one row so far, with the largest that divides a rank's rows of a step and fits.

    A run that goes on keeps the micro-batch of its checkpoint, or the next smaller one that divides: with dropout on, the
    draws depend on it. Raises ConfigError where not even one row fits.
    """
    of_step = plan.batch.accumulation_steps
    before = None if plan.resume.is_fresh else _of_checkpoint(plan.run_dir / "checkpoints", plan.resume.from_step)
    if before is not None:
        rows = max(number for number in divisors(of_step) if number <= before)
    else:
        model = model_of(plan)
        world_size, checkpointing = plan.topology.world_size, plan.config.train.gradient_checkpointing
        fitting = model.largest(
            plan.zero, card, world_size=world_size, rows_per_rank=of_step, checkpointing=checkpointing
        )
        if fitting is None:
            refuse_what_cannot_fit(plan, model, card)
        rows = fitting or 1
    return with_rows(plan, rows)


def with_rows(plan: Plan, rows: int) -> Plan:
    """The plan with micro-batches of so many rows; the batch stays as it is."""
    batch = replace(
        plan.batch,
        micro_batch_rows=rows,
        accumulation_steps=plan.batch.global_batch_rows // plan.batch.world_size // rows,
    )
    train = plan.config.train.model_copy(update={"micro_batch_rows": rows})
    return replace(plan, config=plan.config.model_copy(update={"train": train}), batch=batch)


def alike(plan: Plan, comms: Comms) -> Plan:
    """The plan with the smallest micro-batch that a rank has settled for: machines may differ, ranks must not."""
    return with_rows(plan, min(comms.gather(plan.batch.micro_batch_rows)))


def _of_checkpoint(folder: Path, step: int | None) -> int | None:
    """The micro-batch of the newest checkpoint, or of that of `step`, if there is one."""
    for path in reversed(list_folders(folder)):
        if step in (None, step_of(path)) and (path / "run.yaml").is_file():
            return yaml.safe_load((path / "run.yaml").read_text())["train"]["micro_batch_rows"]
    return None


def all_choices(plan: Plan, model: Model, card: Gpu | None) -> list[Choice]:
    """Of the run's own DeepSpeed file and the shipped ones, with its own micro-batch."""
    zeros = {plan.config.zero: plan.zero} | {name: zero_config(name) for name in shipped()}
    world_size = plan.topology.world_size
    of_step = plan.batch.global_batch_rows // plan.batch.world_size
    rows = plan.batch.micro_batch_rows
    train = plan.config.train
    of_run: dict[str, Any] = {"own": train.gradient_checkpointing, "is_compiled": train.compile}
    return list(choices(model, zeros, card, world_size=world_size, rows_per_rank=of_step, rows=rows, **of_run))


def needed(plan: Plan, model: Model) -> Parts:
    """The memory of a rank."""
    checkpointing, batch = plan.config.train.gradient_checkpointing, plan.batch
    return model.parts(
        plan.zero, world_size=plan.topology.world_size, rows=batch.micro_batch_rows, checkpointing=checkpointing
    )


def refuse_what_cannot_fit(plan: Plan, model: Model, card: Gpu) -> str | None:
    """None where the run fits, a warning where it may not; raises ConfigError, with what would fit, where it cannot."""
    if model.has_experts:
        return None
    made, batch, checkpointing = needed(plan, model), plan.batch, plan.config.train.gradient_checkpointing
    if made.total <= card.usable_bytes:
        return None
    what = (
        f"train.micro_batch_rows: {batch.micro_batch_rows} with {plan.config.zero} on {plan.topology.world_size} ranks"
    )
    return require_fit(made, card, what, advice(all_choices(plan, model, card), plan.config.zero, checkpointing))


def dry_step(plan: Plan, engine: Engine, batch: Any) -> None:
    """Two micro-batches and an optimizer step of rate 0, before anything counts: moments are made, and no weight moves.

    Raises ConfigError with numbers where memory runs out.
    """
    scale = engine.loss_scale
    try:
        engine.learn([batch, batch], denominator=2 * batch.tokens.numel(), learning_rate=0.0)
        for fragment in engine.fragments():
            for name in MOMENTS:
                if name in fragment.values:
                    fragment.values[name].zero_()
        engine.restored(0, scale)
    except torch.OutOfMemoryError as error:
        card, model = of_this_machine(plan.topology), model_of(plan)
        foretold = needed(plan, model).total
        tighter = replace(card, memory_bytes=min(card.memory_bytes, foretold) * 0.9)  # it took more than was predicted
        raise ConfigError(
            f"train.micro_batch_rows: {plan.batch.micro_batch_rows}: the memory of {card.name} ({card.memory_bytes / GIB:,.1f} GiB) ran out in a "
            f"dry step; {foretold / GIB:,.1f} GiB were predicted ({str(error).splitlines()[0]}). "
            f"{advice(all_choices(plan, model, tighter), plan.config.zero, plan.config.train.gradient_checkpointing)}"
        ) from None
