"""Proof, on the model in use, that packed documents cannot see each other.

The obvious ways fail silently (an all-ones mask, the default cache: logits off by 3 to 5), so isolation is measured on
the kernel at hand before the first step of every run, never assumed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch

from sft_dist.errors import ModelError

Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""A model as a function: (tokens, positions), int64 [rows, length] each, to logits [rows, length, vocab]."""
WINDOW = 4
"""A sliding window has to be as narrow as this for the proof to see it: each of its documents is longer."""
_SENTENCE = 200  # characters of an error that are told: torch lists all its backends
_LENGTHS = (7, 9, 5)  # three documents in the first of two rows, the other way round in the second; uneven, to show


def packed_logits(model: torch.nn.Module, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits [rows, seq_len, vocab] of packed rows: positions restart at each document, and there is no mask and no cache.

    That combination is what makes transformers build the block-diagonal mask itself.
    """
    return model(input_ids=tokens, position_ids=positions, use_cache=False).logits


def _packed_rows(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, positions) of two rows of three documents each, int64 [2, 21]."""
    row = torch.randint(vocab_size, (2, sum(_LENGTHS)), generator=torch.Generator().manual_seed(0))
    positions = torch.stack(
        [torch.cat([torch.arange(length) for length in lengths]) for lengths in (_LENGTHS, _LENGTHS[::-1])]
    )
    return row, positions


def leak(forward: Forward, vocab_size: int) -> tuple[float, float]:
    """How far the logits of a document move when its neighbours change, and when it is alone: (perturbed, separate).

    `forward` maps (tokens, positions) to logits, in evaluation mode. Both numbers are relative to the largest logit and
    are rounding (about 1e-6 in fp32) for a model that isolates documents.
    """
    row, positions = _packed_rows(vocab_size)
    middle = slice(_LENGTHS[0], _LENGTHS[0] + _LENGTHS[1])
    changed = torch.randint(vocab_size, row.shape, generator=torch.Generator().manual_seed(1))
    changed[0, middle] = row[0, middle]  # everything else is other text, the second row as well

    whole = forward(row, positions)[:1, middle].float()
    perturbed = forward(changed, positions)[:1, middle].float()
    alone = forward(row[:1, middle], positions[:1, middle]).float()
    scale = whole.abs().max().clamp_min(1e-6)
    return ((whole - perturbed).abs().max() / scale).item(), ((whole - alone).abs().max() / scale).item()


def largest(*movements: float) -> float:
    """The largest; NaN if there is one, which `max` loses behind a number."""
    return math.nan if any(map(math.isnan, movements)) else max(movements)


def prove_isolation(
    forward: Forward, vocab_size: int, *, is_16_bit: bool, kernel: str, worst: Callable[[float], float] = float
) -> float:
    """Measure `leak` and refuse a model whose packed documents see each other; returns the largest movement.

    Raises ModelError when the logits move by more than 1e-3 of the largest (3e-2 in 16-bit), or are not finite.
    """
    tolerance = 3e-2 if is_16_bit else 1e-3
    moved = worst(largest(*leak(forward, vocab_size)))
    if not moved <= tolerance:  # also true for NaN
        raise ModelError(
            f"model: packed documents see each other with attention {kernel!r}: logits move by {moved:.1e} of the "
            f"largest (allowed {tolerance:.0e}). Use a model or an attention kernel that honours position_ids restarts"
        )
    return moved


def _measured(
    forward: Forward, vocab_size: int, differentiated: Callable[[], AbstractContextManager[list[torch.Tensor]]]
) -> list[torch.Tensor]:
    """Logits of the packed rows, fp32; behind them the kernel's gradients."""
    with differentiated() as gradients:
        logits = forward(*_packed_rows(vocab_size)).float()
    return [logits, *gradients]


def _off(measured: torch.Tensor, truth: torch.Tensor) -> float:
    return ((measured - truth).abs().max() / truth.abs().max().clamp_min(1e-6)).item()


def _first_sentence(error: Exception) -> str:
    """Of what it says, without its end, in 200 characters at most.

    >>> _first_sentence(RuntimeError("no such kernel for torch 2.11. It is there for: [...]\\nat line 1"))
    'no such kernel for torch 2.11'
    """
    line = (str(error).splitlines() or [type(error).__name__])[0]
    sentence = line.split(". ")[0].rstrip(". ")
    return sentence if len(sentence) <= _SENTENCE else f"{sentence[: _SENTENCE - 1]}…"


def choose(
    names: Sequence[str],
    use: Callable[[str], None],
    forward: Forward,
    vocab_size: int,
    *,
    is_16_bit: bool,
    differentiated: Callable[[], AbstractContextManager[list[torch.Tensor]]] = lambda: contextlib.nullcontext([]),
    worst: Callable[[float], float] = float,
) -> tuple[str, float, list[str]]:
    """Put the first kernel to use that is proven; returns its name, how far logits move, and why others were passed over.

    `names`: the fastest first; the last one is the truth, by which the others are measured: logits of packed rows must be equal to
    its to rounding (a soft cap or a sliding window could be forgotten without a leak), and so must the gradients of the kernel
    that a call of the model leaves in the list of `differentiated`. `use` makes the model call a kernel.
    `worst`: the largest of such a number over all ranks, NaN being the largest, so that they choose alike.
    Raises ModelError where none of them keeps documents apart.
    """
    truth_name, tolerance = names[-1], 3e-2 if is_16_bit else 1e-3
    passed_over: list[str] = []
    use(truth_name)
    truth = _measured(forward, vocab_size, differentiated) if len(names) > 1 else []
    for name in names[:-1]:
        try:
            use(name)
            measured = _measured(forward, vocab_size, differentiated)
            off, *turned = (_off(*pair) for pair in zip(measured, truth, strict=True))
            mine, why = (largest(off, *leak(forward, vocab_size)), largest(0.0, *turned)), ""
        except (
            RuntimeError,
            ImportError,
            ValueError,
            TypeError,
            KeyError,
        ) as error:  # it is not made for this GPU or model
            mine, why = (math.inf,) * 2, f"cannot be used: {_first_sentence(error)}"
        moved, turned_by = (worst(number) for number in mine)
        if moved <= tolerance and turned_by <= tolerance:
            return name, moved, passed_over
        why = why or ("cannot be used on another rank" if moved == math.inf > mine[0] else "")
        told = f"gradients are off by {turned_by:.1e}" if moved <= tolerance else f"logits move by {moved:.1e}"
        passed_over.append(f"attention {name!r} {why or f'is wrong for this model: {told} of the largest'}")
    use(truth_name)
    moved = prove_isolation(forward, vocab_size, is_16_bit=is_16_bit, kernel=truth_name, worst=worst)
    return truth_name, moved, passed_over
