"""When a run stops, and why; and what it leaves behind to say so."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from sft_dist.files import publish

Reason = Literal["completed", "stopped", "refused", "diverged", "hung", "unsaved"]
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """The wish of this process to stop: raised by a signal or by the appearance of a file, acted on by nobody alone.

    >>> stop = StopRequest()
    >>> stop.is_wanted()
    False
    >>> stop.ask(signal.SIGTERM)
    >>> stop.is_wanted(), stop.cause
    (True, 'SIGTERM')
    """

    def __init__(self, stop_file: Path | None = None) -> None:
        self.cause: str | None = None
        self._stop_file = stop_file

    def install(self) -> None:
        """Let SIGTERM, SIGINT and SIGUSR1 set the flag, and nothing else, ever."""
        for number in SIGNALS:
            signal.signal(number, self.ask)

    def ask(self, number: int, _frame: object = None) -> None:
        """The signal handler."""
        self.cause = signal.Signals(number).name

    def is_wanted(self) -> bool:
        """Whether this process was asked to stop."""
        if self.cause is None and self._stop_file is not None and self._stop_file.exists():
            self.cause = self._stop_file.read_text().strip() or "stop file"
        return self.cause is not None


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a life ended, for whoever decides what comes next: exit codes alone cannot carry it through torchrun.

    `completed`: nothing is left to do; `stopped`: asked to, go on later; `refused`: the configuration, the data or the
    checkpoint is wrong, and starting again will not help; `diverged`: the loss is no longer a number; `hung`: a rank made no
    progress; `unsaved`: the last steps could not be written, the checkpoints before are whole. No verdict at all means that
    the life was killed.
    """

    life: str
    reason: Reason
    step: int
    detail: str
    exit_code: int = 0  # what a launcher should end with; torchrun turns every failure into 1

    def write(self, folder: Path) -> Path:
        """Publish as `folder/<life>.json`, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.life}.json"
        staged = folder / f".{self.life}-{os.getpid()}.partial"  # more than one rank may have the last word
        staged.write_text(json.dumps(asdict(self), indent=2))
        publish(staged, path)
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
