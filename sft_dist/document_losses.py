"""How the mean losses of the validation documents are distributed: in fixed buckets, so that ranks only add counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sft_dist.data.loader import MicroBatch

_PER_DOUBLING = 8  # buckets: each is 9 % wide
_LOWEST = 2.0**-14  # nats; what is below is in the first bucket, which begins at 0
_EDGES = np.concatenate([[0.0], _LOWEST * 2.0 ** (np.arange(20 * _PER_DOUBLING + 1) / _PER_DOUBLING)])  # up to 64 nats
NUM_BUCKETS = len(_EDGES)  # the last one has no end
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def sums(batch: MicroBatch, log_probs: torch.Tensor) -> torch.Tensor:
    """Documents of each bucket in a micro-batch, and the sum of their losses: fp64 [NUM_BUCKETS + 1].

    The loss of a document is the mean over its target tokens; one without any has none. `log_probs`: fp32 [number of targets].
    """
    made = np.zeros(NUM_BUCKETS + 1)
    if len(batch.rows) == 0:
        return torch.from_numpy(made)
    targets = batch.targets[:, 1:].cpu().numpy()
    seq_len = batch.tokens.shape[1]
    documents = (batch.documents[:, 1:].cpu().numpy() + np.arange(len(targets))[:, None] * seq_len)[targets]
    counts = np.bincount(documents)
    losses = np.bincount(documents, -log_probs.double().numpy())[counts > 0] / counts[counts > 0]
    made[:-1] = np.bincount(np.searchsorted(_EDGES, losses, side="right").clip(1) - 1, minlength=NUM_BUCKETS)
    made[-1] = losses.sum()
    return torch.from_numpy(made)


def distribution(summed: torch.Tensor) -> dict[str, Any] | None:
    """What `sums` gave, added up over all micro-batches and ranks, as a record: None for no documents, or a loss that
    is no number.

    `count` documents of `mean` loss; `counts[i]` of them lie between `edges[i]` and `edges[i + 1]`; `quantiles`, read off the
    buckets, are right to 9 %.

    >>> summed = torch.zeros(NUM_BUCKETS + 1, dtype=torch.float64)
    >>> summed[0], summed[1], summed[-1] = 3, 1, 7e-5
    >>> made = distribution(summed)
    >>> made["count"], made["edges"], made["counts"], made["quantiles"]["0.5"]
    (4, [0.0, 6.10352e-05, 6.65593e-05], [3, 1], 4.06901e-05)
    """
    counts = summed[:-1].round().long().numpy()
    count = int(counts.sum())
    if count == 0 or not summed[-1].isfinite():
        return None
    first, last = np.flatnonzero(counts)[[0, -1]]
    edges = np.append(_EDGES, _EDGES[-1] * 2)[first : last + 2]
    counts = counts[first : last + 1]
    below = np.concatenate([[0], np.cumsum(counts)])
    at = np.interp([quantile * count for quantile in _QUANTILES], below, edges)
    return {
        "count": count,
        "mean": _short(float(summed[-1]) / count),
        "quantiles": {str(quantile): _short(value) for quantile, value in zip(_QUANTILES, at, strict=True)},
        "edges": [_short(edge) for edge in edges],
        "counts": counts.tolist(),
    }


def _short(value: float) -> float:
    return float(f"{value:.6g}")
