"""Where the time of a life goes: each second of it belongs to exactly one phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

PHASES = ("start_up", "data", "compute", "wait", "evaluate", "save", "log")
# what the step loop says it does -> its phase; anything else is part of the start-up, which a roll-back repeats
_OF = {
    "data": "data",
    "agree": "wait",
    "vote": "wait",
    "forward and backward": "compute",
    "account": "compute",
    "evaluate": "evaluate",
    "vote in an evaluation": "evaluate",
    "save": "save",
    "log": "log",
}
OF_A_STEP = ("data", "compute", "wait", "log")


class PhaseClock:
    """Sums up the seconds of each phase of this process; together they are the time since it `began`, `already` seconds ago.

    >>> now = iter([100.0, 103.0, 103.5, 107.5])
    >>> clock = PhaseClock(already=20.0, clock=lambda: next(now))
    >>> clock.enter("data"), clock.enter("forward and backward")
    (None, None)
    >>> clock.totals()
    {'start_up': 23.0, 'data': 0.5, 'compute': 4.0}
    """

    def __init__(self, already: float = 0.0, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._lapped: dict[str, float] = {}
        # replaced as a whole: another thread may ask for the totals
        self._now: tuple[str, float, dict[str, float]] = ("start_up", clock(), {"start_up": already})

    def enter(self, doing: str) -> None:
        """What was done until now is over; `doing` begins, in the words of the heartbeats."""
        now, (phase, since, sums) = self._clock(), self._now
        self._now = (_OF.get(doing, "start_up"), now, {**sums, phase: sums.get(phase, 0.0) + now - since})

    def totals(self) -> dict[str, float]:
        """Seconds of each phase that there was, until now."""
        phase, since, sums = self._now
        return {**sums, phase: sums.get(phase, 0.0) + self._clock() - since}

    def lap(self) -> dict[str, float]:
        """The metrics `<phase>_seconds`: of each phase that there was since the last time this was asked."""
        totals = self.totals()
        since = {phase: seconds - self._lapped.get(phase, 0.0) for phase, seconds in totals.items()}
        self._lapped = totals
        return {f"{phase}_seconds": round(seconds, 6) for phase, seconds in since.items() if seconds}


def lost_work(lines: Iterable[Mapping[str, Any]], step: int) -> tuple[int, dict[str, float]]:
    """(steps, seconds by phase) of a run's metrics that are thrown away when it goes on from `step`.

    Of a line that tells of several steps, as many as lie behind `step` count.

    >>> lines = [{"step": 2, "loss": 3.0, "compute_seconds": 4.0}, {"step": 4, "loss": 2.5, "compute_seconds": 5.0}]
    >>> lost_work(lines, 3), lost_work(lines, 4)
    ((1, {'compute': 2.5}), (0, {}))
    """
    steps, before = 0, 0
    seconds: dict[str, float] = {}
    for line in sorted((line for line in lines if "loss" in line), key=lambda line: line["step"]):
        lost = line["step"] - max(step, before)
        if lost > 0:
            share = lost / (line["step"] - before)
            steps += lost
            for phase in OF_A_STEP:
                if f"{phase}_seconds" in line:
                    seconds[phase] = seconds.get(phase, 0.0) + share * line[f"{phase}_seconds"]
        before = line["step"]
    return steps, seconds
