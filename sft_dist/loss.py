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


def sums_by_set(log_probs: torch.Tensor, targets: torch.Tensor, sets: torch.Tensor, num_sets: int) -> torch.Tensor:
    """(summed loss, number of targets) of each set of a mixture: fp64 [2, num_sets], made without waiting for the device.

    `log_probs`: what `target_log_probs` gave for `targets`, bool [rows, seq_len]; `sets`: int64 [rows].

    >>> targets = torch.tensor([[False, True, True], [False, False, True]])
    >>> sums_by_set(torch.tensor([-1.0, -2.0, -4.0]), targets, torch.tensor([1, 0]), num_sets=2).tolist()
    [[4.0, 3.0], [1.0, 2.0]]
    """
    counts = targets[:, 1:].sum(dim=1)
    of_targets = torch.repeat_interleave(sets, counts, output_size=len(log_probs))  # the size is known: no waiting
    is_of_set = of_targets == torch.arange(num_sets, device=sets.device)[:, None]
    losses = torch.where(is_of_set, -log_probs.double(), 0.0)  # sums in a fixed order, unlike index_add
    return torch.stack([losses.sum(dim=1), is_of_set.sum(dim=1).double()])
