"""How the ranks leave what they do when one of them is asked to stop, and who is told where they are meanwhile."""

from __future__ import annotations

import torch

from sft_dist.comms import Comms
from sft_dist.head import Forward, Scores
from sft_dist.limits import StopRequest
from sft_dist.watchdog import Watchdog


class AbandonedError(Exception):
    """An evaluation that all ranks agreed to leave, because one was asked to stop."""


class Votes:
    """Asks all ranks between two pieces of work whether one wants to stop, and beats for the watchdog, if there is one.

    `step` is where the run is; every rank votes equally often.
    """

    def __init__(self, comms: Comms, stop: StopRequest, watchdog: Watchdog | None, step: int) -> None:
        self.step = step
        self._comms, self._stop, self._watchdog = comms, stop, watchdog

    def beat(self, phase: str) -> None:
        """This rank has come so far."""
        if self._watchdog is not None:
            self._watchdog.beat(self.step, phase)

    def waiting(self) -> None:
        """This rank waits for its own save, which may take as long as it does."""
        if self._watchdog is not None:
            self._watchdog.wait(self.step, "waits for a save")

    def is_to_stop(self, phase: str) -> bool:
        """Whether any rank was asked to stop; `phase` goes on if not."""
        self.beat("vote")
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
