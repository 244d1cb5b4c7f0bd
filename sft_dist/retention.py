"""Which checkpoints there are, and which of them stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sft_dist.state import TrainState


@dataclass(frozen=True, slots=True)
class Retention:
    """Which complete checkpoints stay: the last ones, those of the best score, every n-th for good."""

    keep_last: int = 2
    keep_best: int = 0
    keep_every_steps: int | None = None

    def kept(self, scores: Mapping[int, float | None]) -> set[int]:
        """The steps that stay, of all that there are, each with the score measured at it, if any was: less is better.

        >>> sorted(Retention(keep_last=1, keep_best=1, keep_every_steps=100).kept({100: 3.0, 150: 2.0, 180: 2.5, 220: None}))
        [100, 150, 220]
        """
        steps = sorted(scores)
        best = sorted((score, -step) for step, score in scores.items() if score is not None)[: self.keep_best]
        every = {step for step in steps if self.keep_every_steps and step % self.keep_every_steps == 0}
        return set(steps[-self.keep_last :]) | {-step for _, step in best} | every


def list_folders(folder: Path) -> list[Path]:
    """The published checkpoints, oldest first; whole, or damaged since."""
    return sorted((path for path in folder.glob("step-*") if path.is_dir() and path.name[5:].isdecimal()), key=step_of)


def step_of(path: Path) -> int:
    """The step that a checkpoint folder is named by."""
    return int(path.name[5:])


def score_at(path: Path) -> float | None:
    """The score measured at a checkpoint's own step, less is better; a state that cannot be read has none."""
    try:
        return TrainState.from_json((path / "state.json").read_bytes()).score_here
    except (OSError, ValueError, TypeError, AttributeError):
        return None
