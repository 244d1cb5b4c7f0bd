"""When a run stops, and why; and what it leaves behind to say so."""

from __future__ import annotations

import json
import math
import signal
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from sft_dist.files import publish_text

Reason = Literal[
    "completed", "stopped", "refused", "busy", "plateaued", "spent", "diverged", "hung", "unhealthy", "unsaved"
]
MARGIN_SECONDS = 15.0  # processes end, and clocks of machines differ a little
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """The wish of this process to stop: raised by a signal, by a file that appears, or by the time; acted on by nobody alone.

    The time: where the job ends at `end_time` (seconds of the clock), it leaves room for two saves of `save_seconds`, for
    what can pass until the wish is asked for again, by the longest that has passed so far, and for `MARGIN_SECONDS`.
    After a preemption it has `grace_seconds`, and no say in it: `grace_warning` tells when they are too few.

    >>> stop = StopRequest()
    >>> stop.is_wanted()
    False
    >>> stop.ask(signal.SIGTERM)
    >>> stop.is_wanted(), stop.cause
    (True, 'SIGTERM')
    """

    def __init__(
        self, stop_file: Path | None = None, end_time: float | None = None, grace_seconds: float | None = None
    ) -> None:
        self.cause: str | None = None
        self.save_seconds = 0.0  # the longest that a save has taken
        self._stop_file, self._end_time, self._grace_seconds = stop_file, end_time, grace_seconds
        self._asked_at: float | None = None
        self._longest = 0.0

    def install(self) -> None:
        """Let SIGTERM, SIGINT and SIGUSR1 set the flag, and nothing else, ever."""
        for number in SIGNALS:
            signal.signal(number, self.ask)

    def ask(self, number: int, _frame: object = None) -> None:
        """The signal handler."""
        self.cause = signal.Signals(number).name

    def is_wanted(self) -> bool:
        """Whether this process was asked to stop, or its time is over."""
        asked_at, self._asked_at = self._asked_at, time.monotonic()
        self._longest = max(self._longest, self._asked_at - (asked_at or self._asked_at))
        if self.cause is None and self._end_time is not None and time.time() + self.needed_seconds > self._end_time:
            self.cause = f"the end of its time in {self._end_time - time.time():.0f} s"
        if self.cause is None and self._stop_file is not None and self._stop_file.exists():
            self.cause = self._stop_file.read_text().strip() or "stop file"
        return self.cause is not None

    @property
    def leaving_seconds(self) -> float:
        """What may pass between the wish and the last byte that is saved; a save may be on its way already."""
        return self._longest + 2 * self.save_seconds

    @property
    def needed_seconds(self) -> float:
        """What has to be left of the time to stop with everything saved."""
        return MARGIN_SECONDS + self.leaving_seconds

    def grace_warning(self) -> str | None:
        """What to tell, once, when a preemption may leave less time than it takes to leave."""
        grace = self._grace_seconds
        if grace is None or self.leaving_seconds <= grace:
            return None
        self._grace_seconds = None
        return (
            f"warning: {grace:.0f} s lie between a preemption and the end, and to leave with all saved may take "
            f"{self.leaving_seconds:.0f} s: then the checkpoint before counts. Lower checkpoint.every_steps, or use a partition "
            "with a longer GraceTime"
        )


@dataclass(frozen=True, slots=True)
class Best:
    """The best value of a metric so far, and how many evaluations in a row have not improved on it since."""

    value: float
    step: int
    since: int = 0


@dataclass(frozen=True, slots=True)
class EarlyStopping:
    """Ends a run whose metric has not improved for `patience` evaluations (Prechelt, Early Stopping – But When?, 1998).

    An improvement is one of more than `min_improvement` on the best value, not on the last one: a slow one adds up.

    >>> early, best = EarlyStopping("validation_loss", patience=2, min_improvement=0.1), None
    >>> for step, loss in enumerate([3.0, 2.95, 2.88, 2.87, 2.86], start=1):
    ...     best = early.judge(best, step, loss)
    >>> best, early.is_over(best)
    (Best(value=2.88, step=3, since=2), True)
    """

    metric: str
    patience: int
    min_improvement: float = 0.0
    warmup_steps: int = 0

    def score(self, value: float) -> float:
        """The value, so that less is better: as it is of a loss, negated of accuracy and F1."""
        return value if self.metric == "validation_loss" else -value

    def judge(self, best: Best | None, step: int, value: float) -> Best | None:
        """What is the best after an evaluation at `step` gave `value`; None before the warm-up is over. No number is no improvement."""
        if step < self.warmup_steps or (best is None and not math.isfinite(value)):
            return best
        if best is None or self.score(value) < self.score(best.value) - self.min_improvement:
            return Best(value, step)
        return replace(best, since=best.since + 1)

    def is_over(self, best: Best | None) -> bool:
        """Whether the run has had its patience."""
        return best is not None and best.since >= self.patience

    def describe(self, best: Best) -> str:
        """For a verdict.

        >>> EarlyStopping("validation_f1", patience=3).describe(Best(0.91, 400, since=3))
        'validation_f1 has not improved on 0.9100 of step 400 in 3 evaluations'
        """
        return f"{self.metric} has not improved on {best.value:.4f} of step {best.step} in {best.since} evaluations"


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a life ended, for whoever decides what comes next: exit codes alone cannot carry it through torchrun.

    `completed`: nothing is left to do; `plateaued`: early stopping ended it; `spent`: its budget did; `stopped`: asked to, go on later; `refused`: the configuration, the data or the
    checkpoint is wrong, and starting again will not help; `busy`: another process is in the run folder; `diverged`: the loss is no longer a number; `hung`: a rank made no
    progress; `unhealthy`: a machine is not fit; `unsaved`: the last steps could not be written, the checkpoints before are
    whole. No verdict at all means that the life was killed.
    """

    life: str
    reason: Reason
    step: int
    detail: str
    exit_code: int = 0  # what a launcher should end with; torchrun turns every failure into 1
    bad_nodes: str = ""  # what the next life should avoid, as SLURM's ExcNodeList has it: n1,n2

    def write(self, folder: Path) -> Path:
        """Publish as `folder/<life>.json`, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.life}.json"
        publish_text(path, json.dumps(asdict(self), indent=2))
        return path

    @staticmethod
    def sweep(folder: Path) -> None:
        """Remove what a life left that was killed while it wrote its verdict."""
        for path in folder.glob(".*.partial"):
            path.unlink()

    @classmethod
    def read(cls, folder: Path, life: str) -> Verdict | None:
        """The verdict of a life, None when it left none."""
        try:
            return cls(**json.loads((folder / f"{life}.json").read_text()))
        except FileNotFoundError:
            return None
