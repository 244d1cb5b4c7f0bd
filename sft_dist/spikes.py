"""Which steps must not reach the weights, and what becomes of their rows."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

BAD_ROWS = "bad_rows.jsonl"  # of a run folder
_FEWEST = 16  # norms, before one can be called unusual


@dataclass(frozen=True, slots=True)
class Streak:
    """Steps in a row that were not applied: the first of them, its first row of the stream, and how many."""

    first_step: int
    first_row: int
    steps: int = 1


@dataclass(frozen=True, slots=True)
class BadSteps:
    """What is done about steps that cannot be applied: those whose loss or gradient is no number, and, with `spike_z`, those
    whose gradient norm is unusual by the modified z-score of its logarithm (Iglewicz and Hoaglin, How to Detect and Handle
    Outliers, 1993) among the last `window` that were applied.

    >>> usual = (1.0, 1.1, 0.9, 1.2) * 5
    >>> round(BadSteps(spike_z=10).norm_limit(usual), 2), BadSteps().norm_limit(usual)
    (4.05, inf)
    """

    roll_back_after: int | None = 3
    max_roll_backs: int = 2
    spike_z: float | None = None
    window: int = 64

    def norm_limit(self, norms: Sequence[float]) -> float:
        """The largest gradient norm that is applied after `norms`, oldest first; infinite before there are 16 of them."""
        if self.spike_z is None or len(norms) < _FEWEST:
            return math.inf
        logs = [math.log(norm) for norm in norms]
        middle = statistics.median(logs)
        spread = statistics.median(abs(log - middle) for log in logs)
        return math.exp(middle + self.spike_z * max(spread, 0.01) / 0.6745)  # 0.01: norms that hardly move are no trap

    def remember(self, norms: tuple[float, ...], norm: float) -> tuple[float, ...]:
        """The norms to judge the next step by, once one of norm `norm` was applied; none are kept where none are judged."""
        return (*norms, norm)[-self.window :] if self.spike_z is not None and 0 < norm < math.inf else norms

    def is_over(self, streak: Streak | None) -> bool:
        """Whether so many steps in a row were not applied that the weights are to blame."""
        return streak is not None and self.roll_back_after is not None and streak.steps >= self.roll_back_after


@dataclass(frozen=True, slots=True)
class BadStep:
    """One step that was not applied: its ordinals of the stream [begin, end), and the rows that are to blame.

    `rows`: of the micro-batches whose own loss is no number; all of the step's where only its gradient is bad.
    """

    step: int
    begin: int
    end: int
    loss: float
    grad_norm: float
    rows: tuple[int, ...]

    def describe(self) -> str:
        """For the log.

        >>> BadStep(12, 88, 96, math.nan, math.nan, (7, 3)).describe()
        'warning: step 12 is not applied, the weights are as before it: loss nan, gradient norm nan (ordinals 88 to 95 of the stream)'
        """
        return (
            f"warning: step {self.step} is not applied, the weights are as before it: loss {self.loss:.4g}, gradient norm "
            f"{self.grad_norm:.4g} (ordinals {self.begin} to {self.end - 1} of the stream)"
        )

    def append(self, path: Path, records: Mapping[int, Sequence[str]]) -> None:
        """Add it to the list at `path` as a line of JSON, with the records (file:line) that each of its rows holds."""
        numbers = {"loss": str(self.loss), "grad_norm": str(self.grad_norm)}  # JSON has no nan
        rows = [{"row": row, "records": list(records.get(row, ()))} for row in self.rows]
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**asdict(self), **numbers, "rows": rows}, ensure_ascii=False) + "\n")
