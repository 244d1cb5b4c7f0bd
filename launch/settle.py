"""What a run will do, settled and checked before any process group starts."""

from __future__ import annotations

import functools
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.stage import copy_of
from sft_dist.batch import Batch, check_shares, derive_batch, even_batch, num_steps, total_rows
from sft_dist.data.build import is_text_in, template_in
from sft_dist.data.mixture import Joined, Mixture
from sft_dist.data.order import Blocks, row_numbers
from sft_dist.data.shards import Shards
from sft_dist.errors import ConfigError
from sft_dist.retention import list_folders, step_of
from sft_dist.schema import RunConfig
from sft_dist.state import TrainState
from sft_dist.topology import Life, Topology, processes
from sft_dist.zero import zero_config, zero_stage

if TYPE_CHECKING:
    import numpy as np

    from sft_dist.gpus import Gpu


@dataclass(frozen=True, slots=True)
class Resume:
    """How to go on from what is there: by default from the newest whole checkpoint, with nothing changed."""

    is_fresh: bool = False
    from_step: int | None = None
    resets_data: bool = False
    skip_rows: int = 0
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.is_fresh and (self.from_step is not None or self.resets_data or self.skip_rows or self.allow):
            raise ConfigError(
                "--fresh starts over: there is nothing for --from, --reset-data, --skip-rows or --allow; leave one out"
            )
        if self.skip_rows < 0:
            raise ConfigError(f"--skip-rows {self.skip_rows}: rows of the stream are left out, so it is 1 or more")

    def arguments(self) -> list[str]:
        """As `launch/train.py` takes them.

        >>> Resume(from_step=100, allow=("batch-change",)).arguments()
        ['--from=100', '--allow=batch-change']
        """
        made = ["--fresh"] * self.is_fresh + ["--reset-data"] * self.resets_data
        made += [f"--from={self.from_step}"] * (self.from_step is not None) + [f"--skip-rows={self.skip_rows}"] * (
            self.skip_rows > 0
        )
        return made + [f"--allow={name}" for name in self.allow]


AS_IT_IS = Resume()


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will do, settled and checked before any process group starts."""

    config: RunConfig
    topology: Topology
    life: Life
    resume: Resume
    run_dir: Path
    shards_dirs: tuple[Path, ...]  # where they are read from: a node's own copies, where there are some
    shards: Shards | Joined
    mixture: Mixture | None
    zero: dict[str, Any]
    batch: Batch
    rows: int

    @classmethod
    def of(
        cls,
        config: RunConfig,
        topology: Topology,
        life: Life,
        resume: Resume = AS_IT_IS,
        stage: Path | None = None,
        *,
        card: Gpu | None = None,
        is_elsewhere: bool = False,
    ) -> Plan:
        """Open the shards, or their copies under `stage`, and do the arithmetic; raises ConfigError or DataError.

        `micro_batch_rows: auto` is settled by the GPU `card`, or by this machine's; one row where the run `is_elsewhere`, on GPUs
        that are not known.
        """
        is_auto = config.train.micro_batch_rows == "auto"
        if is_auto:
            config = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch_rows": 1})})
        run_dir, folders = Path(config.run_dir), tuple(copy_of(Path(folder), stage) for folder in config.shards_dirs)
        shards, mixture = rows_of(config, folders)
        is_same_batch = not resume.is_fresh and "batch-change" not in resume.allow
        saved = _saved_identity(run_dir / "checkpoints", resume.from_step) if is_same_batch else {}
        documents_per_row = (mixture or shards.manifest).documents_per_row
        derive = even_batch if is_auto else derive_batch
        sharers = config.train.sequence_parallel
        check_shares(sharers, seq_len=shards.seq_len, world_size=topology.world_size)
        world_size = topology.of_sharers(sharers).world_size
        batch = derive(config.train, world_size, documents_per_row, saved.get("global_batch_rows"))
        rows = total_rows(config.train, batch, shards.num_rows)
        zero = zero_config(config.zero)
        _check_early_stopping(config, folders)
        made = cls(config, topology, life, resume, run_dir, folders, shards, mixture, zero, batch, rows)
        if not is_auto or (is_elsewhere and card is None):
            return made
        from launch import fit

        return fit.settled(made, card or fit.of_this_machine(topology))

    @property
    def shards_dir(self) -> Path:
        """The first of them, whose tokenizer and template are the run's."""
        return self.shards_dirs[0]

    @property
    def data_topology(self) -> Topology:
        """The world as its training rows see it: ranks that share a row are one."""
        return self.topology.of_sharers(self.config.train.sequence_parallel)

    @property
    def order(self) -> Callable[[np.ndarray], np.ndarray]:
        """Ordinal of the stream -> row number."""
        return order_of(self.config, self.shards, self.mixture)

    @property
    def template(self) -> str:
        """What the sample prompts are set into: of a mixture the first set's."""
        if self.config.prepare is not None:
            return self.config.prepare.template
        return template_in(self.shards_dir)

    @property
    def is_text(self) -> bool:
        """Whether it learns plain text, which has no questions: of a mixture, whether the first set does."""
        return is_text_in(self.shards_dir)

    def steps(self, state: TrainState | None = None) -> int:
        """Optimizer steps of the whole run; those behind `state` are counted as they were taken."""
        state = state or TrainState()
        return state.step + sum(num_steps(end - begin, self.batch) for begin, end in state.stretches(self.rows))

    def describe(self) -> str:
        """The derived numbers, for a person; with a warning where they make little sense."""
        per_row = (self.mixture or self.shards.manifest).documents_per_row
        batch = self.batch
        an_epoch = self.shards.num_rows / batch.global_batch_rows
        lines = [
            f"rows: {self.shards.num_rows:,} of {self.shards.seq_len:,} tokens, {per_row:.1f} samples a row",
            f"step: {batch.global_batch_rows:,} rows = {batch.samples(per_row):,.0f} samples = {batch.micro_batch_rows} a "
            f"micro-batch x {batch.accumulation_steps} accumulated x {self._ranks()}",
            f"run: {self.steps():,} steps, {an_epoch:,.1f} an epoch, ZeRO stage {zero_stage(self.zero)}, "
            f"{self.config.train.precision}, learning rate {self.config.train.learning_rate:g}",
        ]
        if self.mixture:
            epochs = self.mixture.epochs(self.rows)
            lines.append("mixture: " + ", ".join(f"{name} {count:.2f} times" for name, count in epochs.items()))
        if an_epoch < 20:
            unit = "samples" if self.config.train.global_batch_rows is None else "rows"
            lines.append(
                f"warning: a step of {batch.global_batch_rows:,} rows leaves only {an_epoch:.1f} steps an epoch "
                f"({self.steps()} in all): few for the optimizer to move. A smaller train.global_batch_{unit} gives more"
            )
        return "\n".join(lines)

    def _ranks(self) -> str:
        return processes(self.batch.world_size, self.config.train.sequence_parallel)


def _check_early_stopping(config: RunConfig, folders: Sequence[Path]) -> None:
    early = config.evaluate.early_stopping
    if early is None:
        return
    if not any((folder / "validation").is_dir() for folder in folders):
        raise ConfigError("evaluate.early_stopping: no validation set to judge by; set prepare.validation_fraction")
    if early.metric != "validation_loss" and not (len(folders) == 1 and (folders[0] / "labels").is_dir()):
        raise ConfigError(
            f"evaluate.early_stopping.metric: {early.metric!r} is only measured of a label task; use validation_loss"
        )


def check_deadline(config: RunConfig) -> None:
    """Raises ConfigError where a run must not begin any more."""
    deadline = config.budget.deadline
    if deadline is not None and deadline.timestamp() < time.time():
        raise ConfigError(f"budget.deadline: {deadline.isoformat()} is over; set a later one, or leave it out")


def check_compiler(config: RunConfig) -> None:
    """Raises ConfigError where layers are to be compiled, and there is nothing that could."""
    if config.train.compile and find_compiler() is None:
        raise ConfigError(
            "train.compile: no C++ compiler was found here (g++, c++ or clang++, or what CXX names); install one, load your cluster's "
            "module of it, or set train.compile: false"
        )


def find_compiler() -> str | None:
    """What torch.compile would call."""
    return os.environ.get("CXX") or next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)


def order_of(config: RunConfig, shards: Shards | Joined, mixture: Mixture | None) -> Callable[[np.ndarray], np.ndarray]:
    """Ordinal of the stream -> row number, of a run's shards."""
    in_epochs = functools.partial(row_numbers, num_rows=shards.num_rows, seed=config.train.seed, blocks=_blocks(config))
    return mixture.rows if mixture else in_epochs


def rows_of(config: RunConfig, folders: Sequence[Path] | None = None) -> tuple[Shards | Joined, Mixture | None]:
    """The training rows of a run, read from its shards or from these copies, and of a mixture how they are drawn."""
    sets = [Shards.open(Path(folder) / "train") for folder in folders or config.shards_dirs]
    if config.prepare is not None:
        return sets[0], None
    joined = Joined(sets)
    names, weights = zip(*((entry.label, entry.weight) for entry in config.mixture), strict=True)
    return joined, Mixture(joined, names, weights, config.train.seed, _blocks(config))


def _blocks(config: RunConfig) -> Blocks | None:
    order = config.train.order
    return None if order == "rows" else Blocks(order.block_rows, order.window_blocks)


def _saved_identity(folder: Path, step: int | None) -> dict[str, Any]:
    """What the newest checkpoint, or that of `step`, says it belongs to; empty when there is none to read."""
    for path in (path for path in reversed(list_folders(folder)) if step in (None, step_of(path))):
        try:
            return dict(json.loads((path / "manifest.json").read_text())["identity"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return {}
