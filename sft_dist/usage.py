"""What a run has cost over all its lives, and whether it may go on."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft_dist.phases import PHASES, PhaseClock, lost_work

_log = logging.getLogger("sft_dist")

USAGE = "usage.jsonl"  # of a run folder
BEAT_SECONDS = 30.0  # what a life that is killed loses of its account at most
_TELL_SECONDS = 600.0


class Journal:
    """`usage.jsonl`: appended to and never changed, so that a life that was killed is on it up to its last beat.

    A life counts from `began`, the start of its allocation in seconds of the clock, with all its GPUs: start-up, evaluation
    and saving too. `phases` sums up where that time goes. `told_gpu_seconds`: what the metrics have told; what was used is never
    less, though a life that was killed wrote its last line before.

    >>> with Journal(Path("usage.jsonl"), "4711-0", gpus=8, began=1.7e9) as journal:  # doctest: +SKIP
    ...     journal.gpu_seconds()
    28800.0
    """

    def __init__(
        self, path: Path, life: str, gpus: int, began: float, *, nodes: int = 1, told_gpu_seconds: float = 0.0
    ) -> None:
        self.path, self.life, self.gpus, self.began, self.nodes = path, life, gpus, began, nodes
        lines = read_usage(path)
        self.before = gpu_seconds([line for line in lines if (line["life"], line["began"]) != (life, began)])
        self.before += max(0.0, told_gpu_seconds - self.gpu_seconds())
        self.measure_seconds, self.step_seconds = (  # the longest of all lives
            max((line.get(name, 0.0) for line in lines), default=0.0) for name in ("measure_seconds", "step_seconds")
        )
        self.phases = PhaseClock(already=max(0.0, time.time() - began))
        self._work: dict[str, Any] = {"from_steps": []}
        self._may_be_cut = True
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._beats, name="usage", daemon=True)

    def gpu_seconds(self) -> float:
        """Of all lives, until now."""
        return self.before + max(0.0, time.time() - self.began) * self.gpus

    def goes_on(self, step: int, lines: list[dict]) -> None:
        """This life goes on from `step`; of what the run's metrics tell until now, the rest was computed in vain."""
        self._complete(lines)
        steps, seconds = lost_work(lines, step)
        before = self._work.get("lost_seconds", {})
        self._work = {
            "from_steps": [*self._work["from_steps"], step],
            "lost_steps": self._work.get("lost_steps", 0) + steps,
            "lost_seconds": {phase: before.get(phase, 0.0) + seconds.get(phase, 0.0) for phase in before | seconds},
        }

    def _complete(self, lines: list[dict]) -> None:
        """A life before that was killed lived at least until its last line of metrics: later than its last beat, perhaps."""
        others = [line for line in read_usage(self.path) if (line["life"], line["began"]) != (self.life, self.began)]
        if not others or not (last := max(others, key=lambda line: (line["began"], line["at"]))).get("from_steps"):
            return
        phases = dict.fromkeys(PHASES, 0.0)
        for line in lines:
            if line["step"] > last["from_steps"][-1]:
                phases = {phase: seconds + line.get(f"{phase}_seconds", 0.0) for phase, seconds in phases.items()}
        lived = math.fsum(phases.values())
        if lived > last["at"] - last["began"]:
            self._write({**last, "at": last["began"] + lived, "phase_seconds": phases})
            self.before = max(self.before, gpu_seconds([*others, {**last, "at": last["began"] + lived}]))

    def start(self) -> Journal:
        """Begin to write."""
        self._append()
        self._thread.start()
        return self

    def close(self, *_: object) -> None:
        """Write the last line."""
        self._closing.set()
        self._thread.join()
        self._append()

    __enter__, __exit__ = start, close

    def _beats(self) -> None:
        while not self._closing.wait(BEAT_SECONDS):
            self._append()

    def _append(self) -> None:
        """Add a line of this life until now."""
        line = {"life": self.life, "began": self.began, "at": time.time(), "gpus": self.gpus, "nodes": self.nodes}
        line |= {"measure_seconds": self.measure_seconds} if self.measure_seconds else {}
        line |= {"step_seconds": self.step_seconds} if self.step_seconds else {}
        line |= {"phase_seconds": self.phases.totals(), **self._work}
        self._write(line)

    def _write(self, line: dict[str, Any]) -> None:
        """A full disk costs no run, and the next line that can be written tells all of a life."""
        try:
            with self.path.open("a") as file:  # a line that a crash or a full disk has cut is ended first
                file.write("\n" * self._may_be_cut + json.dumps(line) + "\n")
            self._may_be_cut = False
        except OSError as error:
            if not self._may_be_cut:
                _log.warning("%s: %s: what this life uses is written when it can be", self.path, error.strerror)
            self._may_be_cut = True


def read_usage(path: Path) -> list[dict]:
    """The lines of a journal; what a crash has cut is left out; no file is no line."""
    lines = []
    with contextlib.suppress(FileNotFoundError):
        for text in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                line = json.loads(text)
                if isinstance(line, dict) and {"life", "began", "at", "gpus"} <= line.keys():
                    lines.append(line)
    return lines


def num_nodes(lines: list[dict], gpus: int) -> int:
    """Machines of the last life in these lines that had so many GPUs; 1 where that is not known.

    >>> num_nodes([{"gpus": 16, "nodes": 2}, {"gpus": 8, "nodes": 1}], 16)
    2
    """
    return next(
        (line["nodes"] for line in reversed(lines) if line["gpus"] == gpus and type(line.get("nodes")) is int), 1
    )


def gpu_seconds(lines: list[dict]) -> float:
    """Of all lives in these lines: from the start of its allocation to its last line, times its GPUs.

    >>> gpu_seconds([{"life": "7-0", "began": 0.0, "at": 60.0, "gpus": 8}, {"life": "7-0", "began": 0.0, "at": 90.0, "gpus": 8}])
    720.0
    """
    lives: dict[tuple[str, float], float] = {}
    for line in lines:
        key = (line["life"], line["began"])
        lives[key] = max(lives.get(key, 0.0), (line["at"] - line["began"]) * line["gpus"])
    return sum(lives.values())


@dataclass
class Budget:
    """What a run may cost: it ends, saved and measured, before the first of these is used up. Limits of None do not bind.

    `price` is that of a GPU-hour, `currency` its unit. `journal`: on the main rank only, which decides for all.
    """

    gpu_seconds: float | None = None
    deadline: float | None = None
    max_tokens: int | None = None
    price: float = 0.0
    currency: str = ""
    journal: Journal | None = None
    cause: str | None = None
    clock: Callable[[], float] = time.time
    _steps: list[tuple[int, float, int]] = field(
        default_factory=list
    )  # (step, time, tokens): the first and the last one
    _told_at: float = 0.0

    def stepped(self, step: int, seconds: float, tokens: int) -> None:
        """After a step: `tokens` are those of the whole run."""
        if self.journal is not None:
            self.journal.step_seconds = max(self.journal.step_seconds, seconds)
        self._steps = [*self._steps[:1], (step, self.clock(), tokens)]

    @property
    def numbers(self) -> dict[str, float]:
        """The metrics: GPU-hours of all lives until now, and what they cost where there is a price; on the main rank."""
        if self.journal is None:
            return {}
        hours = self.journal.gpu_seconds() / 3600
        return {"gpu_hours": hours} | ({"cost": hours * self.price} if self.price else {})

    def enter(self, phase: str) -> None:
        """What is done from now on, for the account of the time."""
        if self.journal is not None:
            self.journal.phases.enter(phase)

    def lap(self) -> dict[str, float]:
        """The metrics of where the time has gone since the last log line; on the main rank."""
        return self.journal.phases.lap() if self.journal is not None else {}

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """How long an evaluation takes, for the one at the end; one that is left half done tells nothing."""
        self.enter("evaluate")
        began = time.perf_counter()
        yield
        if self.journal is not None:
            self.journal.measure_seconds = max(self.journal.measure_seconds, time.perf_counter() - began)

    def exceeds(self, tokens: int) -> bool:
        """Whether so many tokens, with those of the coming step, are too many; the same on every rank."""
        if self.max_tokens is None or tokens <= self.max_tokens:
            return False
        self.cause = f"the next step would make {tokens:,} tokens of budget.max_tokens {self.max_tokens:,}"
        return True

    def is_spent(self, save_seconds: float) -> bool:
        """Whether one more step, two saves and the last evaluation would take too long; `cause` then tells what of."""
        if self.journal is None:
            return False
        needed = self.journal.step_seconds + 2 * save_seconds + self.journal.measure_seconds
        used = self.journal.gpu_seconds()
        if self.gpu_seconds is not None and used + needed * self.journal.gpus > self.gpu_seconds:
            self.cause = f"{self._hours(used)} of {self._hours(self.gpu_seconds)} used, and a step and the end take {needed:.0f} s"
        if self.deadline is not None and self.clock() + needed > self.deadline:
            self.cause = (
                f"the deadline is in {self.deadline - self.clock():.0f} s, and a step and the end take {needed:.0f} s"
            )
        return self.cause is not None

    def told(self, total_steps: int) -> str | None:
        """Every ten minutes, and first after ten steps of a life: at which step the first limit would end the run."""
        if self.journal is None or len(self._steps) < 2 or self._steps[-1][0] - self._steps[0][0] < 10:
            return None
        (first, began, tokens_before), (step, now, tokens) = self._steps
        if now - self._told_at < _TELL_SECONDS or (self.gpu_seconds, self.deadline, self.max_tokens) == (None,) * 3:
            return None
        self._told_at = now
        seconds, used = (now - began) / (step - first), self.journal.gpu_seconds()
        reserve = self.journal.measure_seconds
        left = [float(total_steps - step)]
        if self.gpu_seconds is not None:
            left.append(((self.gpu_seconds - used) / self.journal.gpus - reserve) / max(seconds, 1e-9))
        if self.deadline is not None:
            left.append((self.deadline - now - reserve) / max(seconds, 1e-9))
        if self.max_tokens is not None:
            left.append((self.max_tokens - tokens) * (step - first) / max(1, tokens - tokens_before))
        of = f" of {self._hours(self.gpu_seconds)}" if self.gpu_seconds is not None else ""
        end = step + max(0, int(min(left)))
        lasts = (
            "it lasts to the end" if end >= total_steps else f"at this rate it ends at step {end:,} of {total_steps:,}"
        )
        return f"budget: {self._hours(used)}{of} used; {lasts}"

    def _hours(self, seconds: float) -> str:
        """GPU-hours, and money where there is a price.

        >>> Budget(price=2.5, currency="EUR")._hours(7200)
        '2.00 GPU-hours (5.00 EUR)'
        >>> Budget()._hours(2)
        '0.000556 GPU-hours'
        """
        hours = seconds / 3600
        return (f"{hours:,.2f} GPU-hours" if hours >= 0.01 else f"{hours:.3g} GPU-hours") + (
            f" ({hours * self.price:,.2f} {self.currency})" if self.price else ""
        )
