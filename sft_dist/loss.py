"""The loss of a micro-batch: a sum over target tokens, to be divided by the step's global count and nothing else."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def target_log_probs(logits: torch.Tensor, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probability of each target token given what stands before it, in fp32, in reading order.

    `logits`: [rows, seq_len, vocab]; `tokens`: int64 [rows, seq_len]; `targets`: bool [rows, seq_len].
    Returns fp32 [number of targets]. The shift by one happens here and only here; the first token of a row is predicted
    by nothing and is never a target.

    >>> logits = torch.zeros(1, 3, 4)
    >>> target_log_probs(logits, torch.tensor([[1, 2, 3]]), torch.tensor([[False, False, True]])).exp()
    tensor([0.2500])
    """
    wanted = targets[:, 1:]
    return -F.cross_entropy(logits[:, :-1][wanted].float(), tokens[:, 1:][wanted], reduction="none")


def target_loss_sum(logits: torch.Tensor, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy over the target tokens, fp32 scalar; 0 (with a gradient of zeros) where there are none.

    Shapes as for `target_log_probs`.

    >>> logits = torch.zeros(1, 3, 4)
    >>> target_loss_sum(logits, torch.tensor([[1, 2, 3]]), torch.tensor([[False, True, True]]))
    tensor(2.7726)
    """
    return -target_log_probs(logits, tokens, targets).sum()
