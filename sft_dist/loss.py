"""The loss of a micro-batch: a sum over target tokens, to be divided by the step's global count and nothing else."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def target_log_probs(logits: torch.Tensor, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probability of each target token given what stands before it, in fp32, in reading order.

    `logits`: [rows, seq_len, vocab]; `tokens`: int64 [rows, seq_len]; `targets`: bool [rows, seq_len].
    Returns fp32 [number of targets]; a row's first token is never one. It defines what is learned: `sft_dist.head` must be equal.

    >>> logits = torch.zeros(1, 3, 4)
    >>> target_log_probs(logits, torch.tensor([[1, 2, 3]]), torch.tensor([[False, False, True]])).exp()
    tensor([0.2500])
    """
    is_next = targets[:, 1:]  # the shift by one
    return -F.cross_entropy(logits[:, :-1][is_next].float(), tokens[:, 1:][is_next], reduction="none")


def sums_by_set(log_probs: torch.Tensor, labels: torch.Tensor, sets: torch.Tensor, num_sets: int) -> torch.Tensor:
    """(summed loss, number of targets) of each set of a mixture: fp64 [2, num_sets], made without waiting for the device.

    `log_probs`: fp32 [places]; `labels`: int64 [places], -1 where nothing is learned; `sets`: int64 [places], that of its row.

    >>> sums_by_set(torch.tensor([-1.0, -2.0, -4.0, 0.0]), torch.tensor([8, 9, 8, -1]), torch.tensor([1, 1, 0, 0]), num_sets=2).tolist()
    [[4.0, 3.0], [1.0, 2.0]]
    """
    is_of_set = (sets == torch.arange(num_sets, device=sets.device)[:, None]) & (labels >= 0)
    losses = torch.where(is_of_set, -log_probs.double(), 0.0)  # sums in a fixed order, unlike index_add
    return torch.stack([losses.sum(dim=1), is_of_set.sum(dim=1).double()])
