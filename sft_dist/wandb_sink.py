"""A run in Weights & Biases: one of theirs for all lives of one of ours, online or offline."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class WeightsAndBiases:
    """Charts over `step`, or any other metric; samples, confusion and the distribution of document losses beside them.

    Who may write there is known from `wandb login` or WANDB_API_KEY. `folder`: where its own files go.
    """

    folder: Path
    project: str
    entity: str | None = None
    run_name: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    mode: str = "online"
    name: str = "W&B"
    first_id: str = field(default_factory=lambda: secrets.token_hex(4))
    settle_seconds: float = 5.0

    def open(self, id: str) -> str:
        """See `services.Service`."""
        import wandb

        self._wandb = wandb
        if sys.stdin is not None and sys.stdin.isatty():
            sys.stdin = open(os.devnull)  # noqa: SIM115 - it would ask for a key there
        # its own process writes what it was told every so many seconds, and loses it when this one is killed before
        hasty = {name: 1.0 for name in ("x_transaction_log_flush_interval",) if name in wandb.Settings.model_fields}
        self._run = wandb.init(
            project=self.project,
            entity=self.entity,
            name=self.run_name,
            group=self.group,
            tags=self.tags or None,
            mode=self.mode,
            id=id,
            resume="allow",
            dir=str(self.folder),
            settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True, **hasty),
        )
        self._run.define_metric("*", step_metric="step")
        return id

    def send(self, number: int, step: int, at: float, what: Mapping[str, Any]) -> None:
        """See `services.Service`. Their own step is the number of the record, which rises over all lives; ours is a metric."""
        made = {name: value for name, value in what.items() if isinstance(value, int | float)}
        if "samples" in what:
            rows = [[answer["prompt"], answer["answer"], answer["expected"]] for answer in what["samples"]]
            made["samples"] = self._wandb.Table(["prompt", "answer", "expected"], rows)
        if "confusion" in what:
            labels, counts = what["confusion"]["labels"], what["confusion"]["counts"]
            rows = [[label, *row] for label, row in zip(labels, counts, strict=True)]
            made["validation/confusion"] = self._wandb.Table(["truth ↓ taken for →", *labels], rows)
        if "document_losses" in what:
            histogram = (what["document_losses"]["counts"], what["document_losses"]["edges"])
            made["validation/document_losses"] = self._wandb.Histogram(np_histogram=histogram)
        if "config" in what:
            self._run.config.update(what["config"], allow_val_change=True)
        if made:
            self._run.log({"step": step, **made}, step=number, commit=True)

    def finish(self) -> None:
        """See `services.Service`."""
        self._run.finish()
