"""What a step brings: its learning rate, a pure function of the step, and what happens every so many steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


def learning_rate(
    step: int, total_steps: int, *, peak: float, schedule: Literal["linear", "cosine", "constant"], warmup_ratio: float
) -> float:
    """Learning rate of the 0-based `step` out of `total_steps`.

    It rises linearly over the first `ceil(warmup_ratio * total_steps)` steps (no step has rate 0: the first one counts),
    then stays, or falls to 0 just after the last step.

    >>> [learning_rate(s, 10, peak=1.0, schedule="linear", warmup_ratio=0.2) for s in (0, 1, 2, 9)]
    [0.5, 1.0, 1.0, 0.125]
    >>> round(learning_rate(6, 10, peak=1.0, schedule="cosine", warmup_ratio=0.2), 6)
    0.5
    """
    warmup_steps = math.ceil(warmup_ratio * total_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if schedule == "linear":
        return peak * (1.0 - progress)
    if schedule == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak


@dataclass(frozen=True, slots=True)
class Cadence:
    """Every how many steps something happens; None: only at the start and the end, at `last_step`."""

    last_step: int
    log_steps: int = 1
    evaluate_steps: int | None = None
    checkpoint_steps: int | None = None
    samples_steps: int | None = None

    @staticmethod
    def is_due(step: int, every: int | None) -> bool:
        """Whether it happens at this step.

        >>> Cadence.is_due(20, 10), Cadence.is_due(20, None)
        (True, False)
        """
        return every is not None and step % every == 0
