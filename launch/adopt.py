"""Takes over a run that DeepSpeed or the Hugging Face Trainer began: its checkpoint becomes one of ours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from launch import parts
from launch.settle import Plan
from launch.train import lock
from sft_dist.checkpoint import Checkpoints
from sft_dist.comms import Comms
from sft_dist.errors import CheckpointError, ConfigError
from sft_dist.foreign import Foreign, find, read
from sft_dist.layout import Fragment
from sft_dist.retention import list_folders
from sft_dist.schema import RunConfig
from sft_dist.state import TrainState
from sft_dist.topology import Life, Topology


def adopt(config: RunConfig, source: Path) -> str:
    """Write the foreign checkpoint as the first one of the run; returns what to tell the person.

    Raises CheckpointError when it is of another model, when its steps exceed the run's, or when the run has checkpoints.
    """
    plan = Plan.of(config, Topology(), Life("import"))
    with lock(plan.run_dir):
        return _adopt(plan, source)


def _adopt(plan: Plan, source: Path) -> str:
    folder = plan.run_dir / "checkpoints"
    if there := list_folders(folder):
        raise CheckpointError(
            f"{folder}: there is {there[-1].name} already; name another run_dir, or move that run away: nothing is replaced"
        )
    if plan.config.model.lora is not None:
        raise ConfigError(
            "import: takes checkpoints of whole models, and model.lora trains adapters; leave that section out"
        )
    path = find(source)
    foreign = read(path)
    model, made = parts.model(plan)
    require_same_model(path, foreign, model)
    rows = foreign.step * plan.batch.global_batch_rows
    if rows > plan.rows:
        raise CheckpointError(
            f"{path}: {foreign.step} steps were done, the run has {plan.steps()}; raise train.epochs or train.max_steps"
        )
    note = f"step {foreign.step}: imported from {path}; the rows of these steps were fed there, and are skipped here"
    state = TrainState(
        step=foreign.step,
        rows_consumed=rows,
        adam_step=foreign.adam_step,
        skipped=((0, rows),) if rows else (),
        notes=(note,),
    )
    differs = _batch_note(foreign.samples, foreign.step, plan.batch.global_batch_rows)
    parts.write_run_files(plan, made)
    checkpoints = parts.checkpoints(plan, parts.identity(plan, made))
    save(checkpoints, foreign, state)
    return (
        f"imported step {foreign.step} of {path} (ZeRO stage {foreign.zero_stage} on {foreign.world_size} ranks, "
        f"{len(foreign.values)} parameters, Adam's step {foreign.adam_step}) into {folder}\n"
        f"the run goes on at row {rows:,} of its stream: `sft-dist train` with the same run file{differs}"
    )


def save(checkpoints: Checkpoints, foreign: Foreign, state: TrainState) -> None:
    """As a world of one."""
    comms = Comms(Topology(), torch.device("cpu"))
    try:
        checkpoints.join(comms)
        checkpoints.save(lambda: fragments(foreign), state)
    finally:
        comms.close()


def fragments(foreign: Foreign) -> Iterator[Fragment]:
    """Whole parameters, as one rank holds them."""
    for name, values in foreign.values.items():
        yield Fragment(name, values["master"].numel(), 0, values)


def require_same_model(path: Path, foreign: Foreign, model: Any) -> None:
    """Refuse a checkpoint whose parameters are not those of the run's model; the first difference is named."""
    mine = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name in sorted(mine.keys() | foreign.shapes.keys()):
        if mine.get(name) != foreign.shapes.get(name):
            raise CheckpointError(
                f"{path}: {name} has shape {foreign.shapes.get(name)} there and {mine.get(name)} in the run's model; "
                "name the model that was trained in model.name_or_path or model.config"
            )
    untrained = [name for name, values in foreign.values.items() if len(values) == 1]
    if untrained:
        raise CheckpointError(
            f"{path}: {untrained[0]} was frozen there ({len(untrained)} parameters in all), and this trainer trains every "
            "parameter: its Adam moments are missing"
        )


def _batch_note(samples: int | None, num_steps: int, here: int) -> str:
    """Says that a step took other rows there than `here`; nothing where that is not known.

    >>> _batch_note(72, 9, 4)
    '\\nnote: a step took 8 rows there and takes 4 here'
    >>> _batch_note(36, 9, 4), _batch_note(None, 9, 4)
    ('', '')
    """
    of_step = here if not samples else samples / max(1, num_steps)
    return "" if of_step == here else f"\nnote: a step took {of_step:,.0f} rows there and takes {here:,} here"
