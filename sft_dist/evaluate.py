"""What a model has learned, measured the same way at every world size: token-weighted loss, labels, answers, forgetting.

Under ZeRO 3 every rank must call the model equally often, so ranks without rows of their own take part with padding.
"""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from sft_dist import document_losses
from sft_dist.answers import Sampling
from sft_dist.attention import packed_logits, prove_isolation
from sft_dist.comms import Comms
from sft_dist.data.loader import Loader, MicroBatch
from sft_dist.data.mixture import Joined
from sft_dist.data.shards import Shards
from sft_dist.errors import DataError
from sft_dist.head import Forward, Head, Scores, scores_at, targets_at
from sft_dist.labels import LabelTask, confusion, label_metrics, label_scores
from sft_dist.metrics import Metrics
from sft_dist.topology import Topology

_log = logging.getLogger("sft_dist")

MOST_FILES = 32


@dataclass(frozen=True, slots=True)
class Sources:
    """Which source each document of a set is from.

    `names` [sources]; `of_documents`: int64 [documents] in the order of the rows; `first_document`: int64 [rows + 1].
    """

    names: tuple[str, ...]
    of_documents: np.ndarray
    first_document: np.ndarray

    @classmethod
    def of(cls, sets: Sequence[Shards], names: Sequence[str]) -> Sources | None:
        """The sets of a mixture under their names; of a single one its files. None where there is only one, or too many."""
        counts = [one.documents_per_row() for one in sets]
        first_document = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
        if len(sets) > 1:
            return cls(tuple(names), np.repeat(np.arange(len(sets)), [int(of.sum()) for of in counts]), first_document)
        paths, of_documents = sets[0].sources()
        if len(paths) > MOST_FILES:
            _log.warning(
                "%s: its loss is not told by file: it is of %d files, and at most %d are told apart",
                sets[0].folder, len(paths), MOST_FILES,
            )  # fmt: skip
        if not 1 < len(paths) <= MOST_FILES:
            return None
        return cls(file_names(paths), of_documents, first_document)

    def sums(self, batch: MicroBatch, log_probs: torch.Tensor) -> torch.Tensor:
        """(summed loss, target tokens) of each source in a micro-batch: fp64 [2, sources]."""
        if len(batch.rows) == 0:
            return torch.zeros(2, len(self.names), dtype=torch.float64)
        documents = batch.documents.cpu().numpy() + self.first_document[batch.rows][:, None]
        of_targets = self.of_documents[documents[:, 1:][batch.targets[:, 1:].cpu().numpy()]]
        losses = np.bincount(of_targets, -log_probs.double().numpy(), len(self.names))
        counts = np.bincount(of_targets, minlength=len(self.names))
        return torch.from_numpy(np.stack([losses, counts.astype(np.float64)]))


def file_names(paths: Sequence[str]) -> tuple[str, ...]:
    """Short names for files that can be part of a metric's, as many folders as it takes to tell them apart.

    >>> file_names(["data/a.jsonl.gz", "data/b c.tsv"])
    ('a', 'b_c')
    >>> file_names(["x/train.csv", "y/train.csv", "y/train.tsv"])
    ('x_train', 'y_train', 'y_train_2')
    """
    parts = [[re.sub(r"[^\w.-]+", "_", part) for part in PurePosixPath(path).parts] for path in paths]
    for of_file in parts:
        of_file[-1] = re.sub(r"(?<=.)\.[A-Za-z]\w*$", "", re.sub(r"\.(gz|zst)$", "", of_file[-1]))
    depths = [1] * len(paths)
    for _ in range(max(map(len, parts))):
        names = ["_".join(of_file[-depth:]) for of_file, depth in zip(parts, depths, strict=True)]
        depths = [depth + (names.count(name) > 1) for depth, name in zip(depths, names, strict=True)]
    made: list[str] = []
    for name in names:
        numbered = (f"{name}_{number}" for number in itertools.count(2))
        made.append(name if name not in made else next(one for one in numbered if one not in (*made, *names)))
    return tuple(made)


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured of a model: `values` by the names of their metrics; the distribution of the documents' losses; of a label
    task the confusion matrix.
    """

    values: dict[str, float] = field(default_factory=dict)
    documents: Mapping[str, Any] | None = None
    confusion: Mapping[str, Any] | None = None

    def write(self, step: int, metrics: Metrics) -> None:
        """To every sink."""
        metrics.scalars(step, self.values)
        if self.documents is not None:
            metrics.document_losses(step, self.documents)
        if self.confusion is not None:
            metrics.confusion(step, self.confusion)


def held_out_loss(
    forward: Forward, loader: Loader, comms: Comms, *, name: str = "validation", sources: Sources | None = None
) -> Measured:
    """Mean loss over all target tokens of the set, and its exponential; the same number for any world size.

    Every row is read once; the sum is exact to fp64 whatever rank a row fell to. With `sources` the same of each that has
    target tokens; and how the losses of the documents are distributed: from the same forward passes, they move nothing of the
    whole.
    """
    totals = torch.zeros(2, dtype=torch.float64)
    by_document = torch.zeros(document_losses.NUM_BUCKETS + 1, dtype=torch.float64)
    by_source = torch.zeros(2, len(sources.names) if sources else 0, dtype=torch.float64)
    for batch in loader.sweep().micro_batches:
        log_probs = _log_probs(forward, batch)
        totals += torch.tensor([-log_probs.double().sum().item(), len(log_probs)], dtype=torch.float64)
        by_document += document_losses.sums(batch, log_probs)
        if sources is not None:
            by_source += sources.sums(batch, log_probs)
    total, count = comms.sum_tensor(totals).tolist()
    if count == 0:
        return Measured()
    values = {f"{name}_loss": total / count, f"{name}_perplexity": _perplexity(total / count)}
    if sources is not None:
        for source, loss, tokens in zip(sources.names, *comms.sum_tensor(by_source).tolist(), strict=True):
            if tokens:
                values |= {
                    f"{name}_loss/{source}": loss / tokens,
                    f"{name}_perplexity/{source}": _perplexity(loss / tokens),
                }
    return Measured(values, document_losses.distribution(comms.sum_tensor(by_document)))


def _perplexity(loss: float) -> float:
    """A number also of a hopeless model."""
    return math.exp(min(loss, 700.0))


def _log_probs(forward: Forward, batch: MicroBatch) -> torch.Tensor:
    """Log-probabilities of a micro-batch's targets on the host; no logits are kept."""
    places, labels = targets_at(batch.tokens, batch.targets, batch.num_targets)
    return forward(batch.tokens, batch.positions, places, labels).log_probs[: batch.num_targets].cpu()


class Evaluator:
    """Everything that is measured about a model on held-out data.

    >>> Evaluator(comms, validation, task, sampling).metrics(forward).values  # doctest: +SKIP
    {'validation_loss': 0.04, 'validation_perplexity': 1.04, 'validation_accuracy': 0.99, 'validation_f1': 0.95}
    """

    def __init__(
        self,
        comms: Comms,
        validation: Loader | None,
        task: LabelTask | None,
        sampling: Sampling | None = None,
        *,
        general: Loader | None = None,
        sources: Sources | None = None,
        scores_always: bool = False,
    ) -> None:
        self.comms, self.validation, self.task, self.sampling = comms, validation, task, sampling
        self.general, self.sources, self.scores_always = general, sources, scores_always
        self._answered_step: int | None = None

    def interim(self, step: int, forward: Forward, metrics: Metrics) -> dict[str, float]:
        """Measure and write what is wanted during the run: the loss, and the scores of a label task where they always are."""
        measured = self.metrics(forward) if self.scores_always else self.loss(forward)
        measured.write(step, metrics)
        return measured.values

    def loss(self, forward: Forward) -> Measured:
        """Validation loss and perplexity, whole, by source and by document; nothing without a validation set."""
        if self.validation is None:
            return Measured()
        return held_out_loss(forward, self.validation, self.comms, sources=self.sources)

    def metrics(self, forward: Forward) -> Measured:
        """The loss, and the scores of a label task."""
        measured = self.loss(forward)
        if self.task is None:
            return measured
        task, rows = self.task, self.validation.micro_batch_rows if self.validation is not None else 1
        scores = label_scores(forward, task, self.comms, micro_batch_rows=rows)
        values = measured.values | label_metrics(
            task.truth, scores.predicted, num_labels=len(task.labels), positive=task.positive
        )
        values["validation_exact_match"] = float(scores.is_exact.mean())
        return replace(measured, values=values, confusion=confusion(task.labels, task.truth, scores.predicted))

    def general_loss(self, forward: Forward) -> dict[str, float]:
        """Loss and perplexity of the general text; empty without one."""
        return (
            held_out_loss(forward, self.general, self.comms, name="general").values if self.general is not None else {}
        )

    def measure(self, step: int, forward: Forward, metrics: Metrics, *, is_scored: bool = False) -> None:
        """Measure and write what is compared before and after; `is_scored`: the validation set was, at this very step."""
        measured = Measured() if is_scored else self.metrics(forward)
        replace(measured, values=measured.values | self.general_loss(forward)).write(step, metrics)
        if self._answered_step != step:
            self.answer(step, forward, metrics)

    def answer(self, step: int, forward: Forward, metrics: Metrics) -> None:
        """Answer the prompts, and write the answers."""
        if answers := self.samples(forward):
            metrics.samples(step, answers)
        self._answered_step = step

    def samples(self, forward: Forward) -> list[Mapping[str, str]]:
        """The model's answers to the prompts, with the expected ones."""
        return self.sampling.answers(forward, self.comms) if self.sampling is not None else []


def forgetting(before: float | None, after: float, most: float) -> list[str]:
    """What fine-tuning did to general text, by its perplexities, for a person; with a warning above the share `most`.

    >>> forgetting(31.2, 33.0, 0.1)
    ['general text: perplexity 31.2 before, 33.0 after (+5.8 %)']
    """
    if before is None:
        return [f"general text: perplexity {after:.1f} after; it was not measured before"]
    rise = after / before - 1
    told = [f"general text: perplexity {before:.1f} before, {after:.1f} after ({rise:+.1%})".replace("%", " %")]
    if rise > most:
        told.append(
            f"warning: the perplexity of general text rose by more than evaluate.max_forgetting {most:g}: the model forgets. Lower "
            "train.learning_rate, train for fewer epochs, or mix general text in"
        )
    return told


def held_out(names: Sequence[str], folders: Sequence[Path], split: str) -> dict[str, Shards]:
    """The shards of a split of each of these prepared folders that has it, by the folder's name."""
    found = {name: open_shards(folder, split) for name, folder in zip(names, folders, strict=True)}
    return {name: shards for name, shards in found.items() if shards is not None}


def open_shards(folder: Path, name: str) -> Shards | None:
    """The shards of a split, None when `prepare` found no records for it."""
    return Shards.open(folder / name) if (folder / name).is_dir() else None


def same_tokenizer(shards: Shards | Joined, fingerprint: str, model: str) -> None:
    """Refuse to measure a model on rows that another tokenizer cut.

    Raises DataError naming both fingerprints.
    """
    if shards.manifest.tokenizer != fingerprint:
        raise DataError(
            f"{model}: its tokenizer {fingerprint[:12]} is not the one the shards were cut with "
            f"({shards.manifest.tokenizer[:12]}). Prepare the data with this model's tokenizer first"
        )


def alone(model: Any, device: torch.device) -> tuple[Forward, Comms]:
    """A plain model as a function, and the world of one that it lives in; ModelError where packed documents see each other."""
    model = model.to(device).eval()
    head = Head(model)

    @torch.no_grad()
    def forward(*batch: torch.Tensor) -> Scores:
        return scores_at(model, *(part.to(device) for part in batch))

    @torch.no_grad()
    def logits(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return packed_logits(model, tokens.to(device), positions.to(device))

    about = {"vocab_size": model.config.vocab_size, "is_16_bit": model.dtype != torch.float32}
    head.kept_apart(lambda: prove_isolation(logits, kernel=model.config._attn_implementation, **about))
    head.check(forward, logits, **about)
    return forward, Comms(Topology(), device)
