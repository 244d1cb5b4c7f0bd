"""All that a run has to know about its past besides weights and moments."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

from sft_dist.ledger import Ledger
from sft_dist.limits import Best


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
    ) -> TrainState:
        """The state one step later.

        >>> TrainState(step=4, rows_consumed=32).after(
        ...     rows=8, tokens=4096, target_tokens=80, fed=Ledger(8, 1, 2), adam_step=5, gpu_seconds=1.5).rows_consumed
        40
        """
        return replace(
            self,
            step=self.step + 1,
            rows_consumed=self.rows_consumed + rows,
            tokens=self.tokens + tokens,
            target_tokens=self.target_tokens + target_tokens,
            ledger=self.ledger + fed,
            adam_step=adam_step,
            loss_scale=loss_scale,
            gpu_seconds=self.gpu_seconds + gpu_seconds,
        )

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
        past = tuple(Past(**_tupled(left)) for left in values.pop("past", ()))
        return cls(**_tupled(values), past=past)


def _tupled(values: dict[str, Any]) -> dict[str, Any]:
    """JSON knows neither tuples nor ledgers."""
    made = {**values, "skipped": tuple((begin, end) for begin, end in values.get("skipped", ()))}
    if "ledger" in values:
        made["ledger"] = Ledger(**values["ledger"])
    return made | ({"notes": tuple(values["notes"])} if "notes" in values else {})
