"""Proof, on the model in use, that packed documents cannot see each other.

The obvious ways fail silently (an all-ones mask, the default cache: logits off by 3 to 5), so isolation is measured on
the kernel at hand before the first step of every run, never assumed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sft_dist.errors import ModelError

Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""A model as a function: (tokens, positions), int64 [rows, length] each, to logits [rows, length, vocab]."""
_LENGTHS = (7, 9, 5)  # three documents in the first of two rows, the other way round in the second; uneven, to show


def packed_logits(model: torch.nn.Module, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits [rows, seq_len, vocab] of packed rows: positions restart at each document, and there is no mask and no cache.

    That combination is what makes transformers build the block-diagonal mask itself.
    """
    return model(input_ids=tokens, position_ids=positions, use_cache=False).logits


def leak(forward: Forward, vocab_size: int) -> tuple[float, float]:
    """How far the logits of a document move when its neighbours change, and when it is alone: (perturbed, separate).

    `forward` maps (tokens, positions) to logits, in evaluation mode. Both numbers are relative to the largest logit and
    are rounding (about 1e-6 in fp32) for a model that isolates documents.
    """
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(vocab_size, (2, sum(_LENGTHS)), generator=generator)
    positions = torch.stack(
        [torch.cat([torch.arange(length) for length in lengths]) for lengths in (_LENGTHS, _LENGTHS[::-1])]
    )
    middle = slice(_LENGTHS[0], _LENGTHS[0] + _LENGTHS[1])
    changed = torch.randint(vocab_size, row.shape, generator=generator)
    changed[0, middle] = row[0, middle]  # everything else is other text, the second row as well

    whole = forward(row, positions)[:1, middle].float()
    perturbed = forward(changed, positions)[:1, middle].float()
    alone = forward(row[:1, middle], positions[:1, middle]).float()
    scale = whole.abs().max().clamp_min(1e-6)
    return ((whole - perturbed).abs().max() / scale).item(), ((whole - alone).abs().max() / scale).item()


def prove_isolation(forward: Forward, vocab_size: int, *, is_16_bit: bool, kernel: str) -> float:
    """Measure `leak` and refuse a model whose packed documents see each other; returns the largest movement.

    Raises ModelError when the logits move by more than 1e-3 of the largest (3e-2 in 16-bit), or are not finite.
    """
    tolerance = 3e-2 if is_16_bit else 1e-3
    moved = max(leak(forward, vocab_size))
    if not moved <= tolerance:  # also true for NaN
        raise ModelError(
            f"model: packed documents see each other with attention {kernel!r}: logits move by {moved:.1e} of the "
            f"largest (allowed {tolerance:.0e}). Use a model or an attention kernel that honours position_ids restarts"
        )
    return moved
