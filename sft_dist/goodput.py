"""How much of a run's time moved the model: every second of all its lives, and between them, told once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Span:
    """A life on the clock, in seconds since 1970. `phase_seconds` is None where a version wrote it that did not count them.

    `from_steps`: where it began to train, and where it went back to; `lost_*`: what was computed in vain before that.
    """

    life: str
    began: float
    at: float
    gpus: int
    phase_seconds: dict[str, float] | None = None
    from_steps: tuple[int, ...] = ()
    lost_steps: int = 0
    lost_seconds: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """From its beginning to the last that is known of it."""
        return self.at - self.began


def spans(lines: Iterable[Mapping[str, Any]]) -> list[Span]:
    """The lives in the lines of a `usage.jsonl`, in the order of their beginnings; the last line of each counts."""
    last: dict[tuple[str, float], Mapping[str, Any]] = {}
    for line in lines:
        key = (line["life"], line["began"])
        if key not in last or line["at"] >= last[key]["at"]:
            last[key] = line
    return [
        Span(
            line["life"], line["began"], max(line["began"], line["at"]), line["gpus"], _seconds(line, "phase_seconds") or None,
            tuple(line.get("from_steps", ())), line.get("lost_steps", 0), _seconds(line, "lost_seconds"),
        )
        for line in sorted(last.values(), key=lambda line: line["began"])
    ]  # fmt: skip


def _seconds(line: Mapping[str, Any], name: str) -> dict[str, float]:
    """Numbers by phase, where a line has them."""
    value = line.get(name)
    return {k: v for k, v in value.items() if isinstance(v, int | float)} if isinstance(value, dict) else {}


# in the order in which they are shown: key -> (what it is called, what it means)
PARTS = {
    "compute": ("compute", "forward, backward, gradients between GPUs, optimizer: of steps that count"),
    "data": ("data", "waiting for rows to be read"),
    "wait": ("agreement", "waiting for the other ranks, before each step and each micro-batch"),
    "evaluate": ("evaluation", "held-out loss, scores and sample answers"),
    "save": ("checkpoints", "what the loop waited for saves; writing goes on behind it"),
    "log": ("logging", "writing metrics"),
    "start_up": ("start-up", "of the first life: from its allocation to the first row asked for"),
    "restart": ("restarts", "start-up and restoring of all later lives, and of roll-backs"),
    "lost": ("lost work", "steps computed in vain: a later life or a roll-back went on from before them"),
    "between": ("between lives", "nothing ran: waiting in a queue, or for somebody to start it again"),
    "unknown": ("not recorded", "by an older version, or between the last sign of a life and the next"),
}


def time_by_part(lives: Sequence[Span]) -> dict[str, float]:
    """Seconds of each of PARTS, without those of which there are none; together: from the first beginning to the last sign.

    >>> first = Span("7-0", 0.0, 60.0, 8, {"start_up": 10.0, "compute": 45.0, "save": 5.0}, (0,))
    >>> second = Span("7-1", 90.0, 130.0, 8, {"start_up": 15.0, "compute": 25.0}, (30,), 4, {"compute": 6.0})
    >>> time_by_part([first, second])
    {'compute': 64.0, 'save': 5.0, 'start_up': 10.0, 'restart': 15.0, 'lost': 6.0, 'between': 30.0}
    """
    made = dict.fromkeys(PARTS, 0.0)
    end = lives[0].began if lives else 0.0
    for number, life in enumerate(lives):
        made["between"] += max(0.0, life.began - end)
        end = max(end, life.at)
        known = life.phase_seconds or {}
        for phase, seconds in known.items():
            made["restart" if phase == "start_up" and number else phase if phase in made else "unknown"] += seconds
        made["unknown"] += max(0.0, life.seconds - math.fsum(known.values()))
        for phase, seconds in life.lost_seconds.items():  # another life's, or this one's before a roll-back
            taken = min(seconds, made.get(phase, 0.0))
            made["lost"] += taken
            made[phase] = made.get(phase, 0.0) - taken
    return {part: seconds for part, seconds in made.items() if seconds >= 0.001}


def goodput(parts: Mapping[str, float]) -> float | None:
    """The share of the time in which steps that count were computed; None where that was not recorded.

    >>> goodput({"compute": 30.0, "save": 10.0}), goodput({"unknown": 10.0})
    (0.75, None)
    """
    return parts["compute"] / math.fsum(parts.values()) if "compute" in parts else None
