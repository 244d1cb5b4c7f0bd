"""How the ranks leave what they do when one of them is asked to stop, and who is told where they are meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from sft_dist.comms import Comms
from sft_dist.head import Forward, Scores
from sft_dist.limits import StopRequest
from sft_dist.watchdog import Watchdog


class AbandonedError(Exception):
    """An evaluation that all ranks agreed to leave, because one was asked to stop."""


class Votes:
    """Asks all ranks between two pieces of work whether one wants to stop, and beats for the watchdog, if there is one.

    `step` is where the run is; every rank votes equally often. `enter` is told of each phase too, to sum up its time.
    """

    def __init__(
        self,
        comms: Comms,
        stop: StopRequest,
        watchdog: Watchdog | None,
        step: int,
        enter: Callable[[str], None] = lambda phase: None,
    ) -> None:
        self.step = step
        self._comms, self._stop, self._watchdog, self._enter = comms, stop, watchdog, enter

    def beat(self, phase: str) -> None:
        """This rank has come so far."""
        self._enter(phase)
        if self._watchdog is not None:
            self._watchdog.beat(self.step, phase)

    def waiting(self) -> None:
        """This rank waits for its own save, which may take as long as it does."""
        if self._watchdog is not None:
            self._watchdog.wait(self.step, "waits for a save")

    def each(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items, where this rank waits for data until each has come; every rank has equally many."""
        iterator, end = iter(items), object()
        while True:
            self.beat("data")
            if (item := next(iterator, end)) is end:
                return
            yield item

    def is_to_stop(self, phase: str) -> bool:
        """Whether any rank was asked to stop; `phase` goes on if not."""
        self.beat("vote" if phase != "evaluate" else "vote in an evaluation")
        is_wanted = self._comms.agree(self._stop.is_wanted())
        self.beat(phase)
        return is_wanted

    def unless_stopped(self, forward: Forward) -> Forward:
        """`forward`, with a vote before each call, in which it raises AbandonedError where the ranks are to stop."""

        def scores(*batch: torch.Tensor) -> Scores:
            if self.is_to_stop("evaluate"):
                raise AbandonedError
            return forward(*batch)

        return scores
