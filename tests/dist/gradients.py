"""The gradient that many micro-batches leave: as Adam was given it, and as plain PyTorch adds it up."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator

import numpy as np
import torch

from sft_dist import engine
from sft_dist.head import Head, scores_at, targets_at

Parts = dict[str, tuple[int, np.ndarray]]


@contextlib.contextmanager
def as_deepspeed_does(is_default: bool = True) -> Iterator[None]:
    """Engines built meanwhile accumulate and reduce in the model's dtype, DeepSpeed's default."""
    ours, left_out = engine.deepspeed_config, ("data_types", "communication_data_type")
    if is_default:
        engine.deepspeed_config = lambda *given: {k: v for k, v in ours(*given).items() if k not in left_out}
    try:
        yield
    finally:
        engine.deepspeed_config = ours


def applied(made: engine.Engine) -> Parts:
    """This rank's part of the gradient of the last step, each with its offset in the flat parameter.

    The engine must have `beta1=0` and `max_grad_norm=None`: Adam's first moment is then the gradient itself.
    """
    return {f.name: (f.offset, f.values["exp_avg"].numpy().copy()) for f in made.fragments()}


def summed(
    plain: torch.nn.Module, micro_batches: Iterable, denominator: int, counts: Collection[int]
) -> dict[int, dict[str, np.ndarray]]:
    """The witness: gradients of single micro-batches, each in the dtype of `plain`, added up in fp64.

    Returns the sums over the first n micro-batches, for each n of `counts`.
    """
    Head(plain)
    total = {name: torch.zeros(p.numel(), dtype=torch.float64) for name, p in plain.named_parameters()}
    sums = {}
    for number, batch in enumerate(micro_batches, start=1):
        plain.zero_grad()
        places, labels = targets_at(batch.tokens, batch.targets, batch.num_targets)
        scores = scores_at(plain, batch.tokens, batch.positions, places, labels, grad_scale=1 / denominator)
        (scores.loss / denominator).backward()
        for name, parameter in plain.named_parameters():
            total[name] += parameter.grad.flatten()
        if number in counts:
            sums[number] = {name: value.numpy().copy() for name, value in total.items()}
    return sums


def relative_error(parts: Collection[Parts], expected: dict[str, np.ndarray]) -> float:
    """Of the gradient whose parts all ranks hold, in the Euclidean norm over all parameters."""
    whole = {name: np.full_like(value, np.nan) for name, value in expected.items()}
    for part in parts:
        for name, (offset, values) in part.items():
            whole[name][offset : offset + len(values)] = values
    ours, theirs = (np.concatenate([grads[name] for name in expected]) for grads in (whole, expected))
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
