"""All that a run has to know about its past besides weights and moments."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

from sft_dist.ledger import Ledger
from sft_dist.limits import Best
from sft_dist.spikes import Streak


@dataclass(frozen=True, slots=True)
class Past:
    """A stretch of a stream of rows that the run has left on purpose: its data, seed and order, its ordinals, its ledger."""

    identity: dict[str, Any]
    begin: int
    end: int
    skipped: tuple[tuple[int, int], ...]
    ledger: Ledger


@dataclass(frozen=True, slots=True)
class TrainState:
    """All that a run has to know about its past besides weights and moments; kept in `state.json`.

    `rows_consumed` is the whole state of the data: the stream of rows is a pure function of the seed. `loss_scale` is fp16's.
    `evaluated` is the last (step, score), less is better: the validation loss, or what early stopping judges; `best` is its memory. The ordinals fed are [begin, rows_consumed) without those `skipped` on purpose, and
    `ledger` is the proof; streams that were left before are `past`. `notes` tell what was allowed against the rules.

    `not_applied` steps were fed and did not reach the weights, `streak` is the one that the run is in, `norms` what the next
    one is judged by. After a roll-back to the checkpoint of step `rolled_to`, the ordinals `ahead` are to be skipped.
    """

    step: int = 0
    rows_consumed: int = 0
    tokens: int = 0
    target_tokens: int = 0
    adam_step: int = 0
    gpu_seconds: float = 0.0
    loss_scale: dict[str, float] | None = None
    evaluated: tuple[int, float] | None = None
    best: Best | None = None
    begin: int = 0
    skipped: tuple[tuple[int, int], ...] = ()
    ledger: Ledger = field(default_factory=Ledger)
    past: tuple[Past, ...] = ()
    notes: tuple[str, ...] = ()
    not_applied: int = 0
    streak: Streak | None = None
    norms: tuple[float, ...] = ()
    ahead: tuple[tuple[int, int], ...] = ()
    rolled_to: int | None = None
    roll_backs: int = 0

    def after(
        self,
        *,
        rows: int,
        tokens: int,
        target_tokens: int,
        fed: Ledger,
        adam_step: int,
        gpu_seconds: float,
        loss_scale: dict[str, float] | None = None,
        is_bad: bool = False,
    ) -> TrainState:
        """The state one step later; `is_bad`: it was not applied, and should have been.

        >>> TrainState(step=4, rows_consumed=32).after(
        ...     rows=8, tokens=4096, target_tokens=80, fed=Ledger(8, 1, 2), adam_step=5, gpu_seconds=1.5).rows_consumed
        40
        """
        streak = Streak(self.step + 1, self.rows_consumed)
        if self.streak is not None:
            streak = replace(self.streak, steps=self.streak.steps + 1)
        return replace(
            self,
            step=self.step + 1,
            rows_consumed=self.rows_consumed + rows,
            not_applied=self.not_applied + is_bad,
            streak=streak if is_bad else None,
            tokens=self.tokens + tokens,
            target_tokens=self.target_tokens + target_tokens,
            ledger=self.ledger + fed,
            adam_step=adam_step,
            loss_scale=loss_scale,
            gpu_seconds=self.gpu_seconds + gpu_seconds,
        ).past_skipped()

    def past_skipped(self) -> TrainState:
        """Behind the ordinals that are to be skipped, where the stream has come to them.

        >>> TrainState(rows_consumed=40, ahead=((40, 64),)).past_skipped().rows_consumed
        64
        """
        if not self.ahead or self.ahead[0][0] > self.rows_consumed:
            return self
        (begin, end), *ahead = self.ahead
        skipped = (*self.skipped, (begin, end))
        return replace(self, rows_consumed=end, skipped=skipped, ahead=tuple(ahead)).past_skipped()

    def stretches(self, end: int) -> list[tuple[int, int]]:
        """The ordinals up to `end` that are still to be fed: what lies between those to be skipped.

        >>> TrainState(rows_consumed=8, ahead=((40, 64),)).stretches(100)
        [(8, 40), (64, 100)]
        """
        begins = [self.rows_consumed, *(last for _, last in self.ahead)]
        ends = [*(first for first, _ in self.ahead), end]
        return [(begin, min(until, end)) for begin, until in zip(begins, ends, strict=True) if begin < min(until, end)]

    @property
    def score_here(self) -> float | None:
        """The score that was measured at this very step, if one was: less is better.

        >>> TrainState(step=20, evaluated=(20, 2.5)).score_here, TrainState(step=30, evaluated=(20, 2.5)).score_here
        (2.5, None)
        """
        return self.evaluated[1] if self.evaluated is not None and self.evaluated[0] == self.step else None

    @classmethod
    def from_json(cls, text: str | bytes) -> TrainState:
        """Read what `asdict` and JSON made of one; unknown keys are an error. Raises ValueError or TypeError."""
        values = json.loads(text)
        if values.get("evaluated") is not None:
            values["evaluated"] = tuple(values["evaluated"])
        if values.get("best") is not None:
            values["best"] = Best(**values["best"])
        if values.get("streak") is not None:
            values["streak"] = Streak(**values["streak"])
        past = tuple(Past(**_tupled(left)) for left in values.pop("past", ()))
        return cls(**_tupled(values), past=past)


def _tupled(values: dict[str, Any]) -> dict[str, Any]:
    """JSON knows neither tuples nor ledgers."""
    made = dict(values)
    for name in {"skipped", "ahead"} & values.keys():
        made[name] = tuple((begin, end) for begin, end in values[name])
    if "ledger" in values:
        made["ledger"] = Ledger(**values["ledger"])
    return made | {name: tuple(values[name]) for name in ("notes", "norms") if name in values}
