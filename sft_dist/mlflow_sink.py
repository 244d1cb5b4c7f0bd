"""A run in MLflow: one of theirs for all lives of one of ours."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

_MOST_PARAMS, _LONGEST_PARAM = 100, 500  # of a request; characters, which every version of a server takes


@dataclass
class MLflow:
    """Metrics by step; the run file as parameters; samples, confusion and the distribution of document losses as artifacts.

    Who may write there is known from MLflow's own environment variables, and so is where, unless `tracking_uri` says.
    """

    experiment: str
    tracking_uri: str | None = None
    run_name: str | None = None
    name: str = "MLflow"
    first_id: str = ""
    settle_seconds: float = 0.0

    def open(self, id: str) -> str:
        """See `services.Service`."""
        for noisy in ("mlflow", "alembic"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=self.tracking_uri)
        if not id:
            found = self._client.get_experiment_by_name(self.experiment)
            experiment = found.experiment_id if found else self._client.create_experiment(self.experiment)
            id = self._client.create_run(experiment, run_name=self.run_name).info.run_id
        else:
            self._client.update_run(id, status="RUNNING")
        self._id = id
        self._params = set(self._client.get_run(id).data.params)
        return id

    def send(self, number: int, step: int, at: float, what: Mapping[str, Any]) -> None:
        """See `services.Service`. A metric that is sent again, as after a crash in between, is the same point to MLflow."""
        from mlflow.entities import Metric, Param

        milliseconds = round(at * 1000)
        metrics = [Metric(k, float(v), milliseconds, step) for k, v in what.items() if isinstance(v, int | float)]
        if metrics:
            self._client.log_batch(self._id, metrics=metrics)
        for kind in ("samples", "confusion", "document_losses"):
            if kind in what:
                self._client.log_dict(self._id, what[kind], f"{kind}/step-{step:08d}.json")
        if "config" in what:
            text = yaml.safe_dump(what["config"], sort_keys=False, allow_unicode=True)
            self._client.log_text(self._id, text, f"config/step-{step:08d}.yaml")
            flat = {k: str(v)[:_LONGEST_PARAM] for k, v in _flat(what["config"]) if k not in self._params}
            for first in range(0, len(flat), _MOST_PARAMS):  # those of the first life: they cannot be changed
                made = [Param(key, value) for key, value in list(flat.items())[first : first + _MOST_PARAMS]]
                self._client.log_batch(self._id, params=made)
            self._params |= flat.keys()

    def finish(self) -> None:
        """See `services.Service`."""
        self._client.set_terminated(self._id)


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys.

    >>> dict(_flat({"train": {"seed": 0, "bad_steps": {"spike_z": None}}, "tags": [1, 2]}))
    {'train.seed': 0, 'train.bad_steps.spike_z': None, 'tags': [1, 2]}
    """
    for name, value in section.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
