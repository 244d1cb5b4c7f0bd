"""What a run will take before it takes it: which configurations fit a GPU, the largest micro-batch, and the time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from sft_dist.depth import traced
from sft_dist.errors import ConfigError, ModelError
from sft_dist.flops import flops_per_row, matmul_parameters
from sft_dist.gpus import GIB, Gpu
from sft_dist.head import part_places
from sft_dist.layers import Recompute, speed
from sft_dist.memory import Parts, Size, Traced, parts
from sft_dist.schema import ModelConfig

_WAYS: tuple[Recompute, ...] = (
    False,
    "selective",
    True,
)  # putting activations on the host is for long rows: by name only
ERROR = 0.10  # of a prediction, at most: what is more than so much too large is refused


def divisors(number: int) -> list[int]:
    """Ascending.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    small = [one for one in range(1, int(number**0.5) + 1) if number % one == 0]
    return small + [number // one for one in reversed(small) if one * one != number]


@dataclass
class Model:
    """A model as it is planned with: its size and cost, and what its activations take; no weights are made.

    `sharers`: ranks that compute the same rows, each an equal part of their tokens.

    >>> Model(config, made, meta, seq_len=1024, precision="bf16").parts(zero, world_size=8, rows=4).total  # doctest: +SKIP
    11735891968.0
    """

    config: ModelConfig
    made: PretrainedConfig
    meta: PreTrainedModel
    seq_len: int
    precision: str
    sharers: int = 1
    mlp_tile: int | None = None
    _traced: dict[tuple[int, Recompute], Traced] = field(default_factory=dict)  # by rows and recomputation

    def __post_init__(self) -> None:
        self.size = Size.of(self.meta, self.config.lora)

    @property
    def has_experts(self) -> bool:
        """Whether it is a mixture of experts, of which each token sees a part only."""
        return any(getattr(self.made, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))

    def parts(self, zero: Mapping[str, Any], *, world_size: int, rows: int, checkpointing: Recompute) -> Parts:
        """The memory of a rank with micro-batches of `rows` rows. Raises ModelError for a mixture of experts."""
        if self.has_experts:
            raise ModelError(
                f"model: {self.made.model_type} is a mixture of experts: what it takes depends on where its tokens are sent, and is not "
                "planned. Give train.micro_batch_rows a number, and see"
            )
        alive = self._trace(rows, checkpointing)
        return parts(self.size, alive, zero, world_size=world_size, precision=self.precision)

    def _trace(self, rows: int, checkpointing: Recompute) -> Traced:
        """Row for row the same is added, once there are so many that the head takes their logits in parts."""
        enough = -(-part_places(self.made.vocab_size, "cuda") // (self.seq_len // self.sharers))
        if rows > enough + 1:
            few, more = (self._trace(count, checkpointing) for count in (enough, enough + 1))
            return few.grown(more, rows - enough + 1)
        if (rows, checkpointing) not in self._traced:
            names: dict[str, Any] = {
                "seq_len": self.seq_len // self.sharers,
                "precision": self.precision,
                "mlp_tile": self.mlp_tile,
                "checkpointing": checkpointing,
            }
            self._traced[rows, checkpointing] = traced(self.config, self.made, self.meta, rows=rows, **names)
        return self._traced[rows, checkpointing]

    def largest(
        self, zero: Mapping[str, Any], gpu: Gpu, *, world_size: int, rows_per_rank: int, checkpointing: Recompute
    ) -> int | None:
        """The largest micro-batch that divides a rank's rows of a step and fits the GPU; None when not even one row does."""
        for rows in reversed(divisors(rows_per_rank)):
            made = self.parts(zero, world_size=world_size, rows=rows, checkpointing=checkpointing)
            if made.total <= gpu.usable_bytes:
                return rows
        return None

    def flops(self, documents_per_row: float) -> float:
        """FLOPs that a row's learning takes."""
        matrices = matmul_parameters(self.meta)
        return flops_per_row(self.made, matrices, seq_len=self.seq_len, documents_per_row=documents_per_row)


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to run: a DeepSpeed file, recomputation or not, and the memory of a rank with micro-batches of `rows`.

    `largest`: the largest micro-batch that fits; None where none does, or where no GPU was named.
    """

    zero: str
    checkpointing: Recompute
    rows: int
    parts: Parts
    largest: int | None
    speed: float
    stage: int = 0
    is_offloaded: bool = False

    @property
    def rank(self) -> tuple[bool, bool, float, int, int]:
        """Ascending from the fastest: offload waits for the bus, short micro-batches for the weights, recomputation costs up to a
        third more, and each ZeRO stage talks as much as the one before or more."""
        return (
            self.is_offloaded,
            (self.largest or 0) < 2,
            -self.speed,
            self.stage,
            -(self.largest or 0),
        )


def choices(
    model: Model,
    zeros: Mapping[str, Mapping[str, Any]],
    gpu: Gpu | None,
    *,
    world_size: int,
    rows_per_rank: int,
    rows: int | None,
    own: Recompute = False,
    is_compiled: bool = False,
) -> Iterator[Choice]:
    """Every DeepSpeed file, each with all, part and nothing of what layers make kept; `rows` of a micro-batch, None: the largest that fits, or one;
    `own`: a further way of recomputation."""
    for name, zero in zeros.items():
        section = zero.get("zero_optimization", {})
        stage, is_offloaded = section.get("stage", 0), "offload_optimizer" in section or "offload_param" in section
        if model.precision != "fp32" and stage == 0:
            continue  # refused: DeepSpeed's optimizer takes a wrong first step there
        for checkpointing in dict.fromkeys((*_WAYS, own)):
            if model.size.packed and stage == 3 and checkpointing is not True:
                continue  # refused: else gathered weights are kept for the backward pass
            common: dict[str, Any] = {"world_size": world_size, "checkpointing": checkpointing}
            largest = model.largest(zero, gpu, rows_per_rank=rows_per_rank, **common) if gpu is not None else None
            used = rows or largest or 1
            made = model.parts(zero, rows=used, **common)
            share = speed(checkpointing, is_compiled=is_compiled)
            yield Choice(name, checkpointing, used, made, largest, share, stage, is_offloaded)


def require_fit(made: Parts, gpu: Gpu, what: str, advice: str) -> str | None:
    """None where `what` fits, a warning where it may not; raises ConfigError where it cannot, even if `ERROR` less is needed."""
    needed, there = made.total / GIB, gpu.memory_bytes / GIB
    if needed * (1 - ERROR) > there:
        raise ConfigError(f"{what}: {needed:,.1f} GiB are needed on a GPU of {there:,.1f} GiB ({_of(made)}). {advice}")
    if made.total > gpu.usable_bytes:
        return (
            f"warning: {what}: {needed:,.1f} GiB of the {there:,.1f} GiB of a GPU are needed by prediction ({_of(made)}), which may be "
            f"too much. {advice}"
        )
    return None


def _of(made: Parts) -> str:
    names = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")
    return ", ".join(f"{name} {getattr(made, name) / GIB:,.1f}" for name in names if getattr(made, name) >= 0.05 * GIB)


def advice(all_choices: Iterator[Choice] | list[Choice], own: str, checkpointing: Recompute) -> str:
    """What would fit instead, with numbers: the nearest changes first."""
    fitting = sorted((choice for choice in all_choices if choice.largest), key=lambda choice: choice.rank)
    same = [choice for choice in fitting if (choice.zero, choice.checkpointing) == (own, checkpointing)]
    told = []
    for choice in [*same, *fitting][:3]:
        changes = [f"micro_batch_rows {choice.largest}"]
        changes += [f"zero {choice.zero}"] if choice.zero != own else []
        changes += (
            [f"gradient_checkpointing {str(choice.checkpointing).lower()}"]
            if choice.checkpointing != checkpointing
            else []
        )
        told.append(" and ".join(changes))
    told = list(dict.fromkeys(told))
    return (
        f"These fit: {'; or '.join(told)}"
        if told
        else "Nothing that is shipped fits: use more GPUs, larger ones, or a smaller model or seq_len"
    )
