"""Hands the records of `metrics.jsonl` to services of others, which may be slow, down or full of what they were told before.

The file is the queue: a thread reads it as it grows and sends what the service lacks, so that nothing waits in memory, and a
service that was away gets all of it later, in this life or the next. Services cannot take back: what one was told of a metric at
a step it is not told again, so that steps which a resumed run does once more leave no overlap.
"""

from __future__ import annotations

import collections
import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sft_dist.files import first_free
from sft_dist.glossary import POSITION, metric
from sft_dist.metrics import numbers, tables

_log = logging.getLogger("sft_dist")

_RETRY_SECONDS = (1.0, 5.0, 15.0, 60.0)
_PATIENCE_SECONDS = 10.0  # at the end of a life, which may be one that was asked to go


@dataclass
class Told:
    """What a service knows of a run: under which id, how many records, and the last step of each metric."""

    id: str = ""
    records: int = 0
    steps: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Told:
        """As it was written; nothing was told where there is no file, or none that can be read."""
        try:
            return cls(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError):
            return cls()

    def news(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """What of a record the service has not been told, numbers by their tags; empty where it knows all.

        >>> told = Told(steps={"loss": 8, "validation_loss": 4})
        >>> told.news({"step": 8, "loss": 2.5, "validation_loss": 2.25, "target_tokens": 640})
        {'validation/loss': 2.25, 'budget/target_tokens': 640}
        """
        step, values = record["step"], numbers(record)
        new = [name for name in self._names(record) if step > self.steps.get(name, -1)]
        made = {known.tag: values[name] for name in new if name in values and (known := metric(name))}
        made |= {name: what for name, what in tables(record).items() if name in new}
        return made | (
            {known.tag: values[name] for name in POSITION if name in values and (known := metric(name))} if made else {}
        )

    def tell(self, record: Mapping[str, Any]) -> None:
        """The service has been told all of a record."""
        self.records += 1
        for name in self._names(record):
            self.steps[name] = max(record["step"], self.steps.get(name, -1))

    def _names(self, record: Mapping[str, Any]) -> list[str]:
        of_numbers = [name for name in numbers(record) if name not in POSITION and metric(name)]
        return [*of_numbers, *tables(record)]


class Service(Protocol):
    """A service of others. What it raises is told once, and tried again."""

    name: str
    first_id: str  # of a run that is not there yet; none where the service names it
    settle_seconds: float  # until what was sent outlives a kill of this process

    def open(self, id: str) -> str:
        """Go on with the run of that id, or begin it; returns its id."""

    def send(self, number: int, step: int, at: float, what: Mapping[str, Any]) -> None:
        """Record `number` of all lives: numbers by their tags, and what `tables` has of it; `at`: Unix seconds."""

    def finish(self) -> None:
        """This life is over."""


class Follower:
    """A sink that follows `metrics.jsonl` for a service; never slows or ends a run.

    `about`: the file of what the service has been told; set aside where this is to be `is_another_run` there.
    """

    def __init__(
        self,
        service: Service,
        metrics: Path,
        about: Path,
        *,
        is_another_run: bool = False,
        patience: float = _PATIENCE_SECONDS,
    ) -> None:
        if is_another_run and about.exists():
            about.rename(first_free(about))
        self._service, self._metrics, self._about, self._patience = service, metrics, about, patience
        self._more, self._closing = threading.Event(), threading.Event()
        self._is_open = self._has_warned = False
        self._offset, self._told = 0, Told.read(about)
        self._unsettled: collections.deque[tuple[float, str]] = collections.deque()
        self._thread = threading.Thread(target=self._follow, name=service.name, daemon=True)
        self._thread.start()

    def write(self, record: Mapping[str, Any]) -> None:
        """It is in the file by now."""
        self._more.set()

    def close(self) -> None:
        """Give the service a while for the rest."""
        self._closing.set()
        self._more.set()
        self._thread.join(self._patience)
        if self._thread.is_alive() or self._is_behind():
            _log.warning(
                "warning: %s has not been told all of the run; the next `sft-dist train` of the same run file sends the rest, also "
                "when there is nothing left to train",
                self._service.name,
            )

    def _is_behind(self) -> bool:
        return self._offset < self._metrics.stat().st_size

    def _follow(self) -> None:
        failures = 0
        while True:
            self._more.clear()
            is_last = self._closing.is_set()
            try:
                self._deliver()
                failures = 0
                if is_last:
                    self._service.finish()
                    self._remember()
                    return
            except Exception as error:  # of a library of others, over a network: anything
                self._warn(error)
                if is_last:
                    return
                failures += 1
            if failures:
                self._closing.wait(_RETRY_SECONDS[min(failures, len(_RETRY_SECONDS)) - 1])
            else:
                self._more.wait(self._service.settle_seconds + 0.1 if self._unsettled else None)
                self._remember_what_is_settled()

    def _deliver(self) -> None:
        if not self._is_open:
            self._about.parent.mkdir(parents=True, exist_ok=True)
            self._told.id = self._told.id or self._service.first_id
            self._remember()  # a life that is killed while it opens leaves no second run
            self._told.id = self._service.open(self._told.id)
            self._remember()
            self._is_open = True
        for record, end in self._records():
            if news := self._told.news(record):
                self._service.send(self._told.records, record["step"], record.get("at", 0.0), news)
                self._told.tell(record)
                self._unsettled.append(
                    (time.monotonic() + self._service.settle_seconds, json.dumps(asdict(self._told)))
                )
            self._offset = end
            self._remember_what_is_settled()

    def _records(self) -> Iterator[tuple[dict[str, Any], int]]:
        """(record, where its line ends) of what is whole in the file and not yet read."""
        with self._metrics.open("rb") as file:
            file.seek(self._offset)
            end = self._offset
            for line in file:
                end += len(line)
                if line.endswith(b"\n"):
                    yield json.loads(line), end

    def _remember_what_is_settled(self) -> None:
        """A life that is killed sends the last seconds again under the same numbers: rather a point twice than none."""
        text = None
        while self._unsettled and self._unsettled[0][0] <= time.monotonic():
            text = self._unsettled.popleft()[1]
        if text is not None:
            self._remember(text)

    def _remember(self, text: str | None = None) -> None:
        staged = self._about.with_suffix(".partial")
        staged.write_text(text or json.dumps(asdict(self._told)))
        staged.replace(self._about)

    def _warn(self, error: Exception) -> None:
        if not self._has_warned:
            what = (str(error).splitlines() or [""])[0][:300] or type(error).__name__
            _log.warning(
                "warning: %s: %s. The run goes on, and what is not told now is sent later, from metrics.jsonl",
                self._service.name, what.rstrip("."),
            )  # fmt: skip
        self._has_warned = True
