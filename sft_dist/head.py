"""The head and the loss, at the tokens that are learned and nowhere else: logits are made a part at a time, and never kept.

A model gets one more way to be called: with `places`, its head sees the hidden states of those places only, and what comes
back is the log-probability of a label at each. The gradient of a part of the logits is taken while the part is there, in the
forward pass (as in Hsu et al. 2024, "Liger Kernel", arXiv:2410.10989): nothing of the vocabulary's size waits for the
backward pass but the gradient of the head, which is summed in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from sft_dist.errors import ModelError
from sft_dist.kernels import documents_of, masks_of
from sft_dist.long_rows import Shared
from sft_dist.loss import target_log_probs

_T = TypeVar("_T")
_NONE = torch.empty(0, dtype=torch.int64)
_SLICE = 8192  # rows of the head's gradient that 16-bit products are added to at a time
_BUCKET = 64  # the number of places is rounded up to a multiple of it: few shapes
# 16-bit products whose sides are no multiples of 8, such as 50,257, miss a GPU's fast kernels: the vocabulary is padded
_ALIGNED = {"cuda": 64, "cpu": 1}
_IN_ONE_PASS = {"cuda": True, "cpu": False}  # whether softmax makes the exponentials: a GPU waits for memory
_PART_BYTES = {"cuda": 1 << 29, "cpu": 1 << 25}  # of fp32 logits at a time: a GPU wants large products, a CPU its cache


class Scores(NamedTuple):
    """Of each place the log-probability of its label, fp32 [places], and where a model is only asked the likeliest token.

    `loss`: minus their sum, fp32, to take the gradient of; `best`: int64 [places], empty where a model learns.
    """

    loss: torch.Tensor
    log_probs: torch.Tensor
    best: torch.Tensor


Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Scores]
"""A model as a function of (tokens, positions), int64 [rows, length], and (places, labels), int64 [places], in evaluation mode."""


def targets_at(
    tokens: torch.Tensor, targets: torch.Tensor, num_targets: int, shared: Shared | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(places, labels) of a micro-batch, int64 each: where its targets are predicted, counted over all rows, and what they are.

    `tokens`: int64 [rows, length]; `targets`: bool [rows, length], of which `num_targets` are True behind a row's first place.
    It is told because the device would have to be waited for. There are some more places, up to a multiple of 64; their label
    is -1, and they count for nothing. Of `shared` rows they are those of this rank's part, whose last token may predict the next part's first.

    >>> places, labels = targets_at(torch.tensor([[7, 8, 9], [4, 5, 6]]), torch.tensor([[False, False, True]] * 2), 2)
    >>> places[:3].tolist(), labels[:3].tolist(), len(labels)
    ([1, 4, 0], [9, 6, -1], 64)
    """
    is_next, following = (F.pad(of_rows[:, 1:], (0, 1)) for of_rows in (targets, tokens))  # the shift by one
    if shared is not None:
        is_next, following = shared.part(is_next), shared.part(following)
    size = num_places(min(num_targets, is_next.numel()))
    places = is_next.flatten().nonzero_static(size=size, fill_value=0).flatten()
    is_spare = torch.arange(size, device=places.device) >= is_next.sum()
    return places, following.flatten()[places].masked_fill_(is_spare, -1)


def scores_at(
    model: torch.nn.Module,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    places: torch.Tensor,
    labels: torch.Tensor,
    **more: Any,
) -> Scores:
    """Scores of packed rows (see `packed_logits`) from a model whose `Head` was made."""
    return model(input_ids=tokens, position_ids=positions, use_cache=False, places=places, labels=labels, **more)


def scores_of(logits: torch.Tensor, places: torch.Tensor, labels: torch.Tensor) -> Scores:
    """The same from all logits of a micro-batch, [rows, length, vocab]: what everything here must be equal to.

    >>> scores_of(torch.zeros(1, 3, 4), torch.tensor([1]), torch.tensor([3])).log_probs.exp()
    tensor([0.2500])
    """
    there = logits.flatten(0, 1).index_select(0, places).float()
    losses = F.cross_entropy(there, labels, reduction="none", ignore_index=-1)
    return Scores(losses.sum(), -losses.detach(), there.argmax(dim=1))


def num_places(num_targets: int) -> int:
    """The next multiple of 64, of which no targets have one: all ranks call the head.

    >>> num_places(0), num_places(65)
    (64, 128)
    """
    return max(1, -(-num_targets // _BUCKET)) * _BUCKET


class Logits(NamedTuple):
    """What a family does to its logits: `scale` times them (Cohere, Granite), then a soft cap (Gemma; 0: none)."""

    scale: float = 1.0
    cap: float = 0.0

    @classmethod
    def of(cls, config: PretrainedConfig) -> Logits:
        """As the model's configuration says."""
        scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
        scale /= getattr(config, "logits_scaling", None) or 1.0
        return cls(scale, getattr(config, "final_logit_softcapping", None) or 0.0)

    def made(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Logits in fp32, a new tensor: [places, vocab] of hidden states [places, width]."""
        made = F.linear(hidden, weight, bias).float()
        made = made.mul_(self.scale) if self.scale != 1.0 else made
        return made.div_(self.cap).tanh_().mul_(self.cap) if self.cap else made

    def gradient(
        self, exponentials: torch.Tensor, total: torch.Tensor, at: torch.Tensor, counts: torch.Tensor,
        kept: torch.Tensor | None, dtype: torch.dtype,
    ) -> torch.Tensor:  # fmt: skip
        """Of the loss by what came out of the matrix product, in `dtype`: rounded once, in the place of the exponentials if it can be.

        `at`: labels, `counts`: what each place counts, [places, 1]; `kept`: the logits, where there is a cap.
        """
        counts = counts * self.scale
        of_labels = (exponentials.gather(1, at) / total - 1) * counts
        is_elsewhere = kept is None and dtype != torch.float32 and _IN_ONE_PASS[exponentials.device.type]
        out = torch.empty_like(exponentials, dtype=dtype) if is_elsewhere else exponentials
        made = torch.mul(exponentials, counts / total, out=out).scatter_(1, at, of_labels.to(out.dtype))
        return (made if kept is None else made.mul_(1 - (kept / self.cap) ** 2)).to(dtype)


class _LossAt(torch.autograd.Function):
    """Loss and log-probabilities, with all gradients taken in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        kind: Logits,
        size: int,
        grad_scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        log_probs = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        of_hidden, vocab_size = torch.empty_like(hidden), len(weight)
        weight, bias = _aligned(weight, bias)
        of_weight, of_bias = (
            torch.zeros_like(one, dtype=torch.float32) if one is not None and is_wanted else None
            for one, is_wanted in zip((weight, bias), ctx.needs_input_grad[1:3], strict=True)
        )
        for part in _parts(len(hidden), size):
            logits, counts = kind.made(hidden[part], weight, bias), (labels[part] >= 0)[:, None] * grad_scale
            kept = logits.clone() if kind.cap else None
            log_probs[part], exponentials, total, at = _exponentials(logits, labels[part], vocab_size)
            gradient = kind.gradient(exponentials, total, at, counts, kept, hidden.dtype)
            torch.mm(gradient, weight, out=of_hidden[part])
            if of_weight is not None:
                _add_product(of_weight, gradient.t(), hidden[part])
            if of_bias is not None:
                of_bias += gradient.sum(dim=0, dtype=torch.float32)
            del logits, kept, exponentials, gradient  # else they are there while the next part is made
        ctx.grad_scale = grad_scale
        ctx.save_for_backward(of_hidden, *(None if one is None else one[:vocab_size] for one in (of_weight, of_bias)))
        ctx.mark_non_differentiable(log_probs)
        return -log_probs.sum(), log_probs

    @staticmethod
    def backward(ctx: Any, of_loss: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        factor = of_loss / ctx.grad_scale
        gradients = [None if made is None else made.mul_(factor) for made in ctx.saved_tensors]
        return (*gradients, None, None, None, None)


def part_places(vocab_size: int, device_type: str) -> int:
    """Places whose logits are there at the same time, a multiple of 64 of them.

    >>> part_places(50_257, "cpu"), part_places(50_257, "cuda"), part_places(128_256, "cuda")
    (128, 2624, 1024)
    """
    return max(1, _PART_BYTES[device_type] // (4 * vocab_size * _BUCKET)) * _BUCKET


def _parts(count: int, size: int) -> Iterator[slice]:
    return (slice(at, min(at + size, count)) for at in range(0, count, size))


def _aligned(weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Both with rows of zeros to a multiple that suits the device; themselves where there is none to add."""
    more = 0 if weight.dtype == torch.float32 else -len(weight) % _ALIGNED[weight.device.type]
    if not more:
        return weight, bias
    return F.pad(weight, (0, 0, 0, more)), None if bias is None else F.pad(bias, (0, more))


def _exponentials(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int) -> tuple[torch.Tensor, ...]:
    """(log-probabilities of the labels, exponentials that take the place of the logits, their sums, labels as an index).

    In one pass they are divided by their sums already. What stands for no token has none.
    """
    at = labels.clamp(min=0)[:, None]
    logits[:, vocab_size:] = -torch.inf
    of_labels = logits.gather(1, at)
    if _IN_ONE_PASS[logits.device.type]:
        most, likeliest = logits.max(dim=1, keepdim=True)
        exponentials = torch.softmax(logits, dim=1, out=logits)
        total, log_total = torch.ones_like(most), -exponentials.gather(1, likeliest).log()  # of exp(0), divided
    else:
        most = logits.amax(dim=1, keepdim=True)
        exponentials = logits.sub_(most).exp_()
        total = exponentials.sum(dim=1, keepdim=True)
        log_total = total.log()
    log_probs = (of_labels - most - log_total).flatten()
    return log_probs.masked_fill_(labels < 0, 0.0), exponentials, total, at


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add a matrix product to an fp32 total [vocab, width], without rounding it to 16 bits on the way.

    Of 16-bit factors a slice of the vocabulary at a time: what is added is there in fp32 beside the total.
    """
    if left.dtype == torch.float32:
        total.addmm_(left, right)
        return
    for at in range(0, len(total), _SLICE):
        part, of_part = total[at : at + _SLICE], left[at : at + _SLICE]
        if left.device.type == "cuda":
            part += torch.mm(of_part, right, out_dtype=torch.float32)
        else:
            part.addmm_(of_part.float(), right.float())


class Head:
    """What a model is called through, with `places` or as ever; made once a model.

    `part`: places whose logits are there at the same time; default: as suits the device.

    >>> head = Head(model)  # doctest: +SKIP
    >>> model(input_ids=tokens, position_ids=positions, use_cache=False, places=places, labels=labels).loss  # doctest: +SKIP
    """

    def __init__(self, model: PreTrainedModel, part: int | None = None) -> None:
        self._model, self._output = model, model.get_output_embeddings()
        self._forward, self._project = model.forward, self._output.forward
        self._kind, self._part = Logits.of(model.config), part
        self.wants_documents = False
        """Whether the attention kernel is told where documents begin."""
        self.makes_masks = False
        """Whether the masks of the other kernels are made here."""
        self.is_whole = model.base_model is model
        """Whether the model's own logits are taken, all of them: right for every model, and large."""
        # on the modules themselves: ZeRO 3 gathers the weight for the head's forward, and names stay what they are
        model.forward, self._output.forward = self._called, self._scores

    def check(
        self,
        forward: Forward,
        logits: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        vocab_size: int,
        *,
        is_16_bit: bool,
        worst: Callable[[float], float] = float,
    ) -> str:
        """Compare both ways of calling the model, and take its own logits where they differ; says which it will be.

        `forward` and `logits` call the model in evaluation mode, on every rank equally often; `worst`: as in `attention.choose`.
        """
        error = worst(_error(forward, logits, vocab_size))
        if error <= (3e-2 if is_16_bit else 1e-3):
            return f"head: at target tokens only (log-probabilities off by {error:.0e})"
        self.is_whole = True
        return (
            f"head: the model's own, with all logits of a micro-batch; it does more than a matrix product, a scale and a soft cap "
            f"(log-probabilities at target tokens only would be off by {error:.0e})"
        )

    def kept_apart(self, prove: Callable[[], _T]) -> _T:
        """What `prove` gives; where it raises ModelError, once more with masks that are made here."""
        try:
            return prove()
        except ModelError as error:
            self.makes_masks = True
            try:
                return prove()
            except (ModelError, RuntimeError, TypeError, ValueError, KeyError):  # a model may not take them
                self.makes_masks = False
                raise error from None

    def _called(
        self,
        *args: Any,
        places: torch.Tensor | None = None,
        labels: torch.Tensor = _NONE,
        grad_scale: float = 1.0,
        num_documents: int | None = None,
        shared: Shared | None = None,
        **more: Any,
    ) -> Any:
        if self.wants_documents:
            more |= documents_of(more["position_ids"], num_documents)
        elif self.makes_masks:
            more["attention_mask"] = masks_of(self._model.config, more["position_ids"], self._model.dtype)
        if shared is not None:  # attention wants to know of it
            more |= {name: shared.part(more[name]) for name in ("input_ids", "position_ids")} | {"shared": shared}
        if places is None:
            return self._forward(*args, **more)
        if not self.is_whole:
            hidden = self._model.base_model(*args, **more)[0]
            return self._output(hidden.flatten(0, 1).index_select(0, places), labels, grad_scale)
        return scores_of(self._forward(*args, **more).logits, places, labels)

    def _scores(self, hidden: torch.Tensor, labels: torch.Tensor | None = None, grad_scale: float = 1.0) -> Any:
        if labels is None:
            return self._project(hidden)
        weight, bias = self._output.weight, getattr(self._output, "bias", None)
        size = self._part or part_places(len(weight), hidden.device.type)
        if torch.is_grad_enabled():
            loss, of_labels = _LossAt.apply(hidden, weight, bias, labels, self._kind, size, grad_scale)
            return Scores(loss, of_labels, labels.new_empty(0))
        log_probs, best = [], []
        for part in _parts(len(hidden), size):
            logits = self._kind.made(hidden[part], weight, bias)
            best.append(logits.argmax(dim=1))
            log_probs.append(_exponentials(logits, labels[part], len(weight))[0])
        return Scores(-torch.cat(log_probs).sum(), torch.cat(log_probs), torch.cat(best))


def _error(forward: Forward, logits: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], vocab_size: int) -> float:
    """How far log-probabilities of the head at places are from those of the model's own logits, on random tokens."""
    tokens = torch.randint(vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    positions, targets = torch.arange(16).repeat(2, 1), torch.arange(16).repeat(2, 1) > 0
    places, labels = targets_at(tokens, targets, 30)
    ours = forward(tokens, positions, places, labels).log_probs[:30]
    whole = logits(tokens, positions)
    theirs = target_log_probs(whole, tokens.to(whole.device), targets.to(whole.device))
    return (ours - theirs).abs().max().item()
