"""What a model has learned, measured the same way at every world size: token-weighted loss, label accuracy, answers.

A model is here a function (tokens [rows, length], positions [rows, length]) -> logits; under ZeRO 3 every rank must call it
equally often, so ranks without rows of their own take part with padding.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sft_dist.comms import Comms
from sft_dist.data.loader import Loader, MicroBatch
from sft_dist.data.records import Conversation
from sft_dist.data.shards import Shards
from sft_dist.data.template import Template
from sft_dist.data.tokenise import Tokenizer, prompt_ids
from sft_dist.errors import DataError
from sft_dist.loss import target_log_probs
from sft_dist.metrics import Metrics
from sft_dist.topology import Topology

Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def validation_loss(forward: Forward, loader: Loader, comms: Comms) -> dict[str, float]:
    """Mean loss over all target tokens of the set, and its exponential; the same number for any world size.

    Every row is read once; the sum is exact to fp64 whatever rank a row fell to.
    """
    totals = torch.zeros(2, dtype=torch.float64)
    for batch in loader.sweep().micro_batches:
        log_probs = _log_probs(forward, batch)
        totals += torch.tensor([-log_probs.double().sum().item(), len(log_probs)], dtype=torch.float64)
    total, count = comms.sum_tensor(totals).tolist()
    if count == 0:
        return {}
    return {"validation_loss": total / count, "validation_perplexity": math.exp(min(total / count, 700.0))}


def _log_probs(forward: Forward, batch: MicroBatch) -> torch.Tensor:
    """Log-probabilities of a micro-batch's targets on the host; the logits never leave their device."""
    logits = forward(batch.tokens, batch.positions)
    return target_log_probs(logits, batch.tokens.to(logits.device), batch.targets.to(logits.device)).cpu()


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


def label_scores(forward: Forward, task: LabelTask, comms: Comms, *, micro_batch_rows: int) -> np.ndarray:
    """Log-likelihood of each label after each record's prompt, fp64 [records, labels], the same on every rank."""
    topology = comms.topology
    loader = Loader(task.shards, topology, seed=0, micro_batch_rows=micro_batch_rows, shuffle=False)
    first_document = np.concatenate([[0], np.cumsum(task.shards.documents_per_row())])
    scores = torch.zeros(len(task.truth), len(task.labels), dtype=torch.float64)
    for batch in loader.sweep().micro_batches:
        log_probs = _log_probs(forward, batch)
        if len(batch.rows) == 0:  # this rank only kept the others company
            continue
        documents = batch.documents.numpy() + first_document[batch.rows][:, None]
        records, labels = task.candidates[documents[batch.targets.numpy()]].T
        scores.index_put_((torch.from_numpy(records), torch.from_numpy(labels)), log_probs.double(), accumulate=True)
    return comms.sum_tensor(scores).numpy()


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


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question to be answered before and after: its text, its token ids, and the expected answer."""

    text: str
    ids: list[int]
    expected: str


def prompts(records: Iterable[Conversation], template: Template, tokenizer: Tokenizer, count: int) -> list[Prompt]:
    """The first `count` records as questions; of plain text the first 24 tokens are the question."""
    made = []
    for record in itertools.islice(records, count):
        if record.prompt:
            spans = template.render_prompt(record.prompt, tokenizer.eos_token, record.tools)
            ids = prompt_ids(spans, tokenizer, adds_bos=template.adds_bos)
            made.append(Prompt(record.prompt[-1].content, ids, record.turns[-1].content))
        else:
            ids = tokenizer.encode(record.turns[0].content)
            made.append(
                Prompt(tokenizer.decode(ids[:24]), [*tokenizer.bos_ids, *ids[:24]], tokenizer.decode(ids[24:64]))
            )
    return made


def answer(
    forward: Forward, ids: Sequence[int], comms: Comms, *, end_ids: Sequence[int], max_new_tokens: int, context: int
) -> list[int]:
    """The greedy continuation of `ids`, up to one of `end_ids`, of at most `max_new_tokens` and within `context` tokens.

    All ranks decode together and take the main rank's word for each token, so that they also stop together.
    """
    tokens = list(ids)
    for _ in range(min(max_new_tokens, context - len(tokens))):
        sequence = torch.tensor([tokens])
        logits = forward(sequence, torch.arange(len(tokens))[None])
        chosen = int(comms.broadcast(int(logits[0, -1].argmax())))
        if chosen in end_ids:
            break
        tokens.append(chosen)
    return tokens[len(ids) :]


@dataclass(frozen=True, slots=True)
class Sampling:
    """The prompts to be answered, and what decoding needs; `context` is the longest sequence in tokens."""

    prompts: list[Prompt]
    decode: Callable[[list[int]], str]
    end_ids: list[int]
    context: int
    max_new_tokens: int


class Evaluator:
    """Everything that is measured about a model on held-out data.

    >>> Evaluator(comms, validation, task, sampling).metrics(forward)  # doctest: +SKIP
    {'validation_loss': 0.04, 'validation_perplexity': 1.04, 'validation_accuracy': 0.99, 'validation_f1': 0.95}
    """

    def __init__(
        self,
        comms: Comms,
        validation: Loader | None,
        task: LabelTask | None,
        sampling: Sampling | None = None,
        *,
        scores_always: bool = False,
    ) -> None:
        self.comms, self.validation, self.task, self.sampling = comms, validation, task, sampling
        self.scores_always = scores_always

    def interim(self, forward: Forward) -> dict[str, float]:
        """What is measured during the run: the loss, and the scores of a label task where they are always wanted."""
        return self.metrics(forward) if self.scores_always else self.loss(forward)

    def loss(self, forward: Forward) -> dict[str, float]:
        """Validation loss and perplexity; empty without a validation set."""
        return validation_loss(forward, self.validation, self.comms) if self.validation is not None else {}

    def metrics(self, forward: Forward) -> dict[str, float]:
        """The loss, and the scores of a label task."""
        values = self.loss(forward)
        if self.task is not None:
            rows = self.validation.micro_batch_rows if self.validation is not None else 1
            scores = label_scores(forward, self.task, self.comms, micro_batch_rows=rows)
            values |= label_metrics(
                self.task.truth,
                scores.argmax(axis=1),
                num_labels=len(self.task.labels),
                positive=self.task.positive,
            )
        return values

    def measure(self, step: int, forward: Forward, metrics: Metrics, *, only_samples: bool = False) -> None:
        """Every metric and the sample answers: what is compared before and after."""
        if not only_samples:
            metrics.scalars(step, self.metrics(forward))
        if answers := self.samples(forward):
            metrics.samples(step, answers)

    def samples(self, forward: Forward) -> list[Mapping[str, str]]:
        """The model's answers to the prompts, with the expected ones."""
        if self.sampling is None:
            return []
        sampling, answers = self.sampling, []
        for prompt in sampling.prompts:
            ids = answer(
                forward,
                prompt.ids,
                self.comms,
                end_ids=sampling.end_ids,
                max_new_tokens=sampling.max_new_tokens,
                context=sampling.context,
            )
            answers.append({"prompt": prompt.text, "answer": sampling.decode(ids), "expected": prompt.expected})
        return answers


def open_shards(folder: Path, name: str) -> Shards | None:
    """The shards of a split, None when `prepare` found no records for it."""
    return Shards.open(folder / name) if (folder / name).is_dir() else None


def same_tokenizer(shards: Shards, fingerprint: str, model: str) -> None:
    """Refuse to measure a model on rows that another tokenizer cut.

    Raises DataError naming both fingerprints.
    """
    if shards.manifest.tokenizer != fingerprint:
        raise DataError(
            f"{model}: its tokenizer {fingerprint[:12]} is not the one the shards were cut with "
            f"({shards.manifest.tokenizer[:12]}). Prepare the data with this model's tokenizer first"
        )


def alone(model: Any, device: torch.device) -> tuple[Forward, Comms]:
    """A plain model as a function of (tokens, positions), and the world of one that it lives in."""
    from sft_dist.attention import packed_logits

    model = model.to(device).eval()

    @torch.no_grad()
    def forward(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return packed_logits(model, tokens.to(device), positions.to(device))

    return forward, Comms(Topology(), device)
