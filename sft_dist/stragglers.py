"""Which rank computes slower than the others, and makes all of them wait?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch

SLOWER = 1.25  # than the median of all ranks
SECONDS = 0.1  # a step, and at least by so much: less is not worth a word
IN_A_ROW = 5  # steps: a single slow one is noise


class Stopwatch:
    """Seconds that this rank computes itself, between collectives; on a GPU by the GPU's own clock, without waiting for it.

    >>> stopwatch = Stopwatch(torch.device("cpu"))
    >>> with stopwatch:
    ...     pass
    >>> stopwatch.take() < 1.0, stopwatch.take()
    (True, 0.0)
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._seconds = 0.0
        self._started: Any = 0.0  # seconds, or on a GPU an event
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        self._started = self._now()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_cuda:
            self._spans.append((self._started, self._now()))
        else:
            self._seconds += self._now() - self._started

    def take(self) -> float:
        """The seconds since they were last taken; what was measured on a GPU must have come to its end."""
        seconds = self._seconds + sum(begin.elapsed_time(end) for begin, end in self._spans) / 1000
        self._seconds = 0.0
        self._spans.clear()
        return seconds

    def _now(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Stragglers:
    """Names a rank that is slow for some steps in a row, once, and again when it has been as fast as the others since.

    >>> stragglers = Stragglers(["n1", "n2", "n3"])
    >>> for step in range(5):
    ...     ratio, told = stragglers.judge([1.0, 1.0, 1.5])
    >>> ratio, told.split(".")[0]
    (1.5, 'warning: slow for 5 steps now, so that all wait: rank 2 on n3')
    """

    def __init__(self, nodes: Sequence[str]) -> None:
        self._nodes = nodes
        self._slow = [0] * len(nodes)  # steps in a row

    def judge(self, seconds: Sequence[float]) -> tuple[float, str | None]:
        """(the slowest rank's time over the median's, what to tell) of the seconds that each rank computed in a step."""
        middle = statistics.median(seconds) or 1e-9
        self._slow = [
            count + 1 if mine > max(SLOWER * middle, middle + SECONDS) else 0
            for count, mine in zip(self._slow, seconds, strict=True)
        ]
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        ratio = seconds[slowest] / middle
        ranks = [f"rank {rank} on {self._nodes[rank]}" for rank, count in enumerate(self._slow) if count == IN_A_ROW]
        if not ranks:
            return ratio, None
        return ratio, (
            f"warning: slow for {IN_A_ROW} steps now, so that all wait: {', '.join(ranks)}. The slowest computes {ratio:.2f} "
            "times as long as the median of the ranks"
        )
