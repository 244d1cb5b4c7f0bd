"""How much memory of a GPU a run will take, by part: traced on a model without storage, and counted for ZeRO.

The activations are those of torch's own accounting: one forward and backward pass under fake tensors, every storage counted
from its allocation to its end. What ZeRO keeps is counted from what DeepSpeed 0.19 allocates (Rajbhandari et al. 2020, "ZeRO:
Memory Optimizations Toward Training Trillion Parameter Models", arXiv:1910.02054).
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel

from sft_dist.adapter import frozen_matrices
from sft_dist.head import Head, num_places, part_places, scores_at
from sft_dist.layers import Recompute, layers_of, recompute, tile_mlp
from sft_dist.model import build
from sft_dist.schema import LoraConfig, ModelConfig

NF4_BYTES = 1 / 2 + 4 / 64  # of a weight: 4 bits, and of 64 a scale in fp32
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Alive(NamedTuple):
    """Bytes at a moment, and what of them has the vocabulary as its last dimension."""

    bytes: int
    logits: int = 0


class Gradient(NamedTuple):
    """When a parameter's gradient came: its number of elements, the most that was alive since the last one, and what is then.

    `layer`: which of the model's layers the parameter is of; -1: of none.
    """

    numel: int
    peak: Alive
    after: Alive
    layer: int = -1


@dataclass(frozen=True, slots=True)
class Traced:
    """One micro-batch's activations and temporary values, weights and gradients not counted.

    `forward`: the most before the first gradient is there; `gradients`: how it goes on; `host`: bytes put aside there.
    """

    forward: Alive
    gradients: tuple[Gradient, ...] = ()
    host: int = 0

    def grown(self, two: Traced, rows: int) -> Traced:
        """Of `rows` rows, where this is of one and `two` of two: part grows with the rows, and part, such as a gradient, does not.

        >>> Traced(Alive(10, 4)).grown(Traced(Alive(16, 8)), rows=5)
        Traced(forward=Alive(bytes=34, logits=20), gradients=(), host=0)
        """

        def more(of_one: Alive, of_two: Alive) -> Alive:
            return Alive(*(first + (second - first) * (rows - 1) for first, second in zip(of_one, of_two, strict=True)))

        pairs = zip(self.gradients, two.gradients, strict=True)
        gradients = (
            one._replace(peak=more(one.peak, other.peak), after=more(one.after, other.after)) for one, other in pairs
        )
        host = self.host + (two.host - self.host) * (rows - 1)
        return Traced(more(self.forward, two.forward), tuple(gradients), host)

    def backward(self, bucket: int, bytes_of_bucket: float, bytes_to_reduce: float) -> tuple[Alive, float]:
        """(activations, bytes of buffers) when most is needed while gradients fill buckets of so many elements.

        `bytes_of_bucket`: what a bucket takes while it is filled; `bytes_to_reduce`: more of them, an element that is reduced.

        >>> traced = Traced(Alive(500), (Gradient(60, Alive(500), Alive(400)), Gradient(50, Alive(450), Alive(100))))
        >>> traced.backward(100, 200.0, 6.0)
        (Alive(bytes=400, logits=0), 560.0)
        """
        moments, filled, before = [(Alive(0), 0.0)], 0, Alive(0)
        for place, (numel, peak, after, _) in enumerate(self.gradients):
            if place:  # the first one's peak is that of all before it, when there is no bucket yet
                moments.append((peak, bytes_of_bucket))
            if filled and filled + numel > bucket:
                moments.append((before, bytes_of_bucket + bytes_to_reduce * filled))
                filled = 0
            filled, before = filled + numel, after
        moments.append((before, bytes_of_bucket + bytes_to_reduce * min(filled, bucket)))
        return max(moments, key=lambda moment: moment[0].bytes + moment[1])


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, each from the operator that made it to its end."""

    def __init__(self, vocab_size: int = 0) -> None:
        super().__init__()
        self.bytes = self.logits = self.host = 0
        self.peak = Alive(0)
        self._vocab_size = vocab_size
        self._seen: dict[int, tuple[int, bool]] = {}
        self._is_aside = False

    def aside(self) -> AbstractContextManager[Any]:
        """Within it what autograd saves is counted as the host's."""

        def put(saved: torch.Tensor) -> torch.Tensor:
            self._is_aside = True
            copy = saved.clone()
            self._is_aside = False
            self.host += copy.untyped_storage().nbytes()
            return copy

        return torch.autograd.graph.saved_tensors_hooks(put, torch.clone)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if isinstance(made, torch.Tensor):
                self._count(made)
        return out

    def _count(self, made: torch.Tensor) -> None:
        storage = made.untyped_storage()
        if self._is_aside or storage._cdata in self._seen or made.device.type == "meta":
            return
        is_logits = made.ndim > 1 and made.shape[-1] == self._vocab_size
        self._seen[storage._cdata] = storage.nbytes(), is_logits
        weakref.finalize(storage, self._end, storage._cdata)
        self.bytes += storage.nbytes()
        self.logits += storage.nbytes() * is_logits
        if self.bytes > self.peak.bytes:
            self.restart()

    def _end(self, key: int) -> None:
        num_bytes, is_logits = self._seen.pop(key)
        self.bytes -= num_bytes
        self.logits -= num_bytes * is_logits

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak = Alive(self.bytes, self.logits)


def trace(
    config: ModelConfig,
    made: PretrainedConfig,
    *,
    rows: int,
    seq_len: int,
    precision: str,
    checkpointing: Recompute,
    mlp_tile: int | None = None,
) -> Traced:
    """The activations of a micro-batch of `rows` rows of `seq_len` tokens, every token a target, as they are on a GPU."""
    scratch = config.model_copy(update={"init": "scratch"})
    with torch.device("meta"):
        model = build(scratch, made, seed=0, gradient_checkpointing=False, dtype=DTYPES[precision]).train()
    with FakeTensorMode(), Live(made.vocab_size) as live:
        give_storage(model, DTYPES[precision])
        recompute(model, checkpointing, live.aside)
        if mlp_tile is not None:
            tile_mlp(model, mlp_tile)
        tokens = torch.zeros(rows, seq_len, dtype=torch.int64)
        positions = torch.arange(seq_len).expand(rows, seq_len)
        places = torch.zeros(num_places(rows * (seq_len - 1)), dtype=torch.int64)
        Head(model, part_places(made.vocab_size, "cuda"))
        before = live.bytes
        live.restart()
        gradients: list[Gradient] = []
        layers = enumerate(layers_of(model, made.num_hidden_layers))
        layer_of = {id(parameter): number for number, layer in layers for parameter in layer.parameters()}

        def take(parameter: torch.Tensor) -> None:
            peak, parameter.grad = Alive(live.peak.bytes - before, live.peak.logits), None
            after, layer = Alive(live.bytes - before, live.logits), layer_of.get(id(parameter), -1)
            gradients.append(Gradient(parameter.numel(), peak, after, layer))
            live.restart()

        for parameter in filter(attrgetter("requires_grad"), model.parameters()):
            parameter.register_post_accumulate_grad_hook(take)
        scores_at(model, tokens, positions, places, places).loss.backward()
    return Traced(gradients[0].peak, tuple(gradients), live.host)


def give_storage(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Make the parameters, in `dtype`, and buffers of a model that was built on "meta", with the tensors of the mode that it is called in.

    It is not built there at once: peft moves its adapters, which fake tensors do not bear.
    """
    made: dict[int, torch.Tensor] = {}  # tied ones stay tied
    for module in model.modules():
        for name, one in module._parameters.items():
            if one is not None:
                like = torch.nn.Parameter(torch.empty(one.shape, dtype=dtype), requires_grad=one.requires_grad)
                module._parameters[name] = made.setdefault(id(one), like)  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = made.setdefault(id(buffer), torch.empty(buffer.shape, dtype=buffer.dtype))


@dataclass(frozen=True, slots=True)
class Parts:
    """Bytes of a GPU by part, at the moment when most is needed; `host`: bytes of the host's memory, of this rank."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    buffers: float = 0.0
    host: float = 0.0

    @property
    def total(self) -> float:
        """Of the GPU."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.buffers


@dataclass(frozen=True, slots=True)
class Size:
    """Numbers of parameters: all that are trained, and their largest tensor; beside adapters also those that are frozen.

    `packed`: how many of the frozen ones are kept in nf4, and `unpacked`, the largest tensor of these.
    """

    trained: int
    largest: int
    frozen: int = 0
    packed: int = 0
    unpacked: int = 0

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return self.trained + self.frozen

    @classmethod
    def of(cls, model: PreTrainedModel, lora: LoraConfig | None = None) -> Size:
        """Of a model that ZeRO has not sharded, as it is before anything is put into nf4."""
        trained, frozen = (
            [p.numel() for p in model.parameters() if p.requires_grad is is_trained] for is_trained in (True, False)
        )
        is_packed = lora is not None and lora.quantize is not None
        packed = [weight.numel() for weight in frozen_matrices(model)] if is_packed else []
        return cls(sum(trained), max(trained), sum(frozen), sum(packed), max(packed, default=0))

    def frozen_bytes(self, of_weight: int) -> float:
        """What the frozen ones take, at so many bytes a weight where it is not in nf4."""
        return of_weight * (self.frozen - self.packed) + NF4_BYTES * self.packed

    @property
    def scales(self) -> float:
        """Bytes of the scales of what is in nf4, which are whole on each rank at any stage."""
        return (NF4_BYTES - 1 / 2) * self.packed

    def gathered_bytes(self, of_weight: int, most: int) -> float:
        """What stage 3 gathers, of all ranks' weights `most` elements at a time: two weights in nf4 are one."""
        elements = self.parameters - self.packed / 2
        return min(1.0, most / elements) * (of_weight * (self.parameters - self.packed) + self.packed / 2)


@dataclass(frozen=True, slots=True)
class _Kept:
    """What DeepSpeed keeps on a rank, in bytes, from a step's second micro-batch on.

    `always`: its buffers; `gathered`: weights of other ranks, while the model is at work; `bucket`: while gradients come, with
    `to_reduce` more an element; `in_step`: AdamW's temporary values, or those of a reduction after the last gradient.
    """

    weights: float
    gradients: float
    optimizer: float
    always: float = 0.0
    gathered: float = 0.0
    bucket: float = 0.0
    to_reduce: float = 0.0
    in_step: float = 0.0
    host: float = 0.0


def _kept(size: Size, section: Mapping[str, Any], world_size: int, precision: str) -> _Kept:
    all_, own, c = size.trained, size.trained / world_size, 4 if precision == "fp32" else 2
    frozen, unpacked = size.frozen_bytes(c), (4 + c) * size.unpacked  # in fp32 first, as a backward pass wants it
    bucket, stage = _bucket(section), section.get("stage", 0)
    buffers = 2 if section.get("overlap_comm") else 1  # one is reduced while the other is filled
    reduce = 4 + c if c == 2 else 4  # an element: flattened, and in fp32 whatever the gradients are in
    if stage == 0:
        return _Kept(4 * all_ + frozen, 4 * all_, 8 * all_, gathered=unpacked)
    if (
        stage == 1 and precision == "bf16"
    ):  # BF16_Optimizer: the gradients of all in fp32, and the model's own beside them
        in_step = 4 * min(all_, bucket)
        return _Kept(2 * all_ + frozen, (4 + 2) * all_, 12 * own, gathered=unpacked, in_step=in_step)
    if stage == 1:
        always = 4 * bucket * buffers
        return _Kept(c * all_ + frozen, 4 * all_, 12 * own, always=always, gathered=unpacked, to_reduce=reduce)
    if stage == 2:
        gradients = 4 * own if c == 2 else 4 * max(own, size.largest)
        weights, full = c * all_ + frozen, c * bucket * buffers
        kept = _Kept(weights, gradients, 12 * own, gathered=unpacked, bucket=full, to_reduce=reduce)
    else:
        live = size.gathered_bytes(c, section.get("stage3_max_live_parameters", 1_000_000_000)) + unpacked
        group = min(own, section.get("sub_group_size", 1_000_000_000))
        weights = c * own + (frozen - size.scales) / world_size + size.scales
        kept = _Kept(weights, 4 * own, 12 * own, always=4 * bucket * buffers, gathered=live, in_step=4 * group)
    if "offload_optimizer" in section:
        host = kept.optimizer + 2 * 4 * own + c * own  # a second copy of the gradients, and pinned weights
        kept = replace(kept, gradients=0.0, optimizer=0.0, in_step=0.0, host=host)
        if stage == 2:
            kept = replace(kept, always=c * size.largest, host=host + c * size.largest)
    if "offload_param" in section:
        kept = replace(kept, weights=size.scales, host=kept.host + (frozen - size.scales) / world_size)
    return kept


def _bucket(section: Mapping[str, Any]) -> int:
    return section.get("reduce_bucket_size", 500_000_000)


def parts(size: Size, traced: Traced, zero: Mapping[str, Any], *, world_size: int, precision: str) -> Parts:
    """The memory of a rank under a DeepSpeed configuration, with the activations of its micro-batch.

    >>> zero2 = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 50_000_000}}
    >>> made = parts(Size(1_000_000_000, 50_000_000), Traced(Alive(8 << 30, 1 << 30)), zero2, world_size=8, precision="bf16")
    >>> [round(part / 2**30, 2) for part in (made.weights, made.gradients, made.optimizer, made.activations, made.total)]
    [1.86, 0.47, 1.4, 7.0, 11.73]
    """
    section = zero.get("zero_optimization", {})
    kept = _kept(size, section, world_size, precision)
    activations, buffers = traced.backward(_bucket(section), kept.bucket, kept.to_reduce)
    moments = [(traced.forward, kept.gathered), (activations, buffers + kept.gathered), (Alive(0), kept.in_step)]
    alive, more = max(moments, key=lambda moment: moment[0].bytes + moment[1])
    return Parts(
        kept.weights,
        kept.gradients,
        kept.optimizer,
        alive.bytes - alive.logits,
        alive.logits,
        kept.always + more,
        kept.host + traced.host,
    )
