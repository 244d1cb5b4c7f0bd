"""Label tasks by constrained likelihood: which of the labels is the likeliest answer, the same at every world size."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sft_dist.comms import Comms
from sft_dist.data.loader import Loader
from sft_dist.data.shards import Shards
from sft_dist.head import Forward, targets_at


@dataclass(frozen=True, slots=True)
class LabelTask:
    """A classification set: each record's prompt followed by each label, packed like anything else.

    `candidates`: int64 [documents, 2], the (record, label) of each document of the shards in order; `truth`: int64
    [records], the right label; `positive`: the label F1 is about in a two-label task (the rarer one in training).
    """

    shards: Shards
    labels: list[str]
    candidates: np.ndarray
    truth: np.ndarray
    positive: int

    @classmethod
    def open(cls, folder: Path) -> LabelTask | None:
        """The label task that `prepare` left in `folder`, None when the data is not one."""
        if not folder.is_dir():
            return None
        about = json.loads((folder / "labels.json").read_text())
        return cls(
            Shards.open(folder),
            about["labels"],
            np.array(about["candidates"], np.int64).reshape(-1, 2),
            np.array(about["truth"], np.int64),
            about["labels"].index(about["positive"]),
        )


@dataclass(frozen=True, slots=True)
class LabelScores:
    """What a model makes of each record of a label task.

    `log_likelihoods`: fp64 [records, labels], of each label after the record's prompt; `is_exact`: bool [records], the
    model would say the right label and its end token by itself: each of their tokens is the likeliest of all.
    """

    log_likelihoods: np.ndarray
    is_exact: np.ndarray

    @property
    def predicted(self) -> np.ndarray:
        """The likeliest label of each record, int64 [records]."""
        return self.log_likelihoods.argmax(axis=1)


def label_scores(forward: Forward, task: LabelTask, comms: Comms, *, micro_batch_rows: int) -> LabelScores:
    """Score every record, each rank its share of the rows; the same on every rank, also where some have none."""
    loader = Loader(task.shards, comms.topology, seed=0, micro_batch_rows=micro_batch_rows, shuffle=False)
    first_document = np.concatenate([[0], np.cumsum(task.shards.documents_per_row())])
    likelihoods = torch.zeros(len(task.truth), len(task.labels), dtype=torch.float64)
    misses, truth = torch.zeros(len(task.truth), dtype=torch.float64), torch.from_numpy(task.truth)
    for batch in loader.sweep().micro_batches:
        places, right = targets_at(batch.tokens, batch.targets, batch.num_targets)
        scores = forward(batch.tokens, batch.positions, places, right)
        if len(batch.rows) == 0:  # this rank only kept the others company
            continue
        log_probs, is_greedy = scores.log_probs.cpu(), scores.best.cpu() == right
        log_probs, is_greedy = log_probs[: batch.num_targets], is_greedy[: batch.num_targets]
        documents = batch.documents.numpy() + first_document[batch.rows][:, None]
        found = task.candidates[documents[:, 1:][batch.targets[:, 1:].numpy()]]
        records, labels = torch.from_numpy(found[:, 0]), torch.from_numpy(found[:, 1])
        likelihoods.index_put_((records, labels), log_probs.double(), accumulate=True)
        is_miss = (labels == truth[records]) & ~is_greedy
        misses.index_put_((records,), is_miss.double(), accumulate=True)
    return LabelScores(comms.sum_tensor(likelihoods).numpy(), comms.sum_tensor(misses).numpy() == 0)


def label_metrics(truth: np.ndarray, predicted: np.ndarray, *, num_labels: int, positive: int) -> dict[str, float]:
    """Accuracy, and F1 of the positive label (of two) or the unweighted mean F1 (of more).

    >>> label_metrics(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1]), num_labels=2, positive=1)
    {'validation_accuracy': 0.75, 'validation_f1': 0.8}
    """
    scores = []
    for label in [positive] if num_labels == 2 else range(num_labels):
        hits = int(((predicted == label) & (truth == label)).sum())
        total = int((predicted == label).sum() + (truth == label).sum())
        scores.append(2 * hits / total if total else 0.0)
    return {
        "validation_accuracy": float((predicted == truth).mean()),
        "validation_f1": float(np.mean(scores)),
    }


def confusion(labels: list[str], truth: np.ndarray, predicted: np.ndarray) -> dict[str, Any]:
    """How many records of each label were taken for which: `counts[t][p]` of truth t and prediction p.

    >>> confusion(["ham", "spam"], np.array([0, 0, 1]), np.array([0, 1, 1]))
    {'labels': ['ham', 'spam'], 'counts': [[1, 1], [0, 1]]}
    """
    counts = np.zeros((len(labels), len(labels)), np.int64)
    np.add.at(counts, (truth, predicted), 1)
    return {"labels": labels, "counts": counts.tolist()}
