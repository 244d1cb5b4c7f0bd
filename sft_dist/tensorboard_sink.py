"""TensorBoard's view of the metrics: by step, and the curves by target tokens and by GPU-hours too.

Each start of a run writes the files anew from what `metrics.jsonl` keeps. TensorBoard's own way to take steps back, a purge
marker, is not heeded by its data server, so that steps of a life that was lost would stay on the charts.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import BufferedWriter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sft_dist.glossary import as_markdown, metric
from sft_dist.metrics import numbers, tables

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

_log = logging.getLogger("sft_dist")

_MARK = ".sft-dist"  # of the event files that are ours to write anew
_CURVES = ("train/loss", "validation/", "general/")  # tags that have charts over the other x-axes too
# folder -> (the metric that is x, so many of a whole number make one of it): TensorBoard writes a million as 1M
_AXES = {"by_target_tokens": ("target_tokens", 1), "by_gpu_hours": ("gpu_hours", 1e6)}


class TensorBoard:
    """Event files of a run folder's `tensorboard/`, begun with the records `kept` of earlier lives.

    A view must not end a run: what cannot be written is said once and left out until the next life.
    """

    def __init__(self, folder: Path, kept: Iterable[Mapping[str, Any]] = ()) -> None:
        self._folder = folder
        self._files = {"": _EventFile(folder), **{axis: _EventFile(folder / axis) for axis in _AXES}}
        self._is_missing = False
        self._try(self._remove_old)
        self._add("", _layout(), 0, time.time())
        self._add("", _text("glossary", as_markdown()), 0, time.time())
        for record in kept:
            self.write(record, flush=False)
        self._flush()

    def write(self, record: Mapping[str, Any], *, flush: bool = True) -> None:
        """Draw a record; of what it holds that has no place here nothing."""
        step, at = record["step"], record.get("at", time.time())
        if values := numbers(record):
            self._draw(step, at, values)
        for kind, what in tables(record).items():
            for summary in _DRAWN[kind](what):
                self._add("", summary, step, at)
        if flush:
            self._flush()

    def close(self) -> None:
        for file in self._files.values():
            self._try(file.close)

    def _remove_old(self) -> None:
        for old in sorted(self._folder.rglob(f"events.out.tfevents.*{_MARK}")):
            old.unlink()

    def _draw(self, step: int, at: float, values: Mapping[str, float]) -> None:
        known = {found.tag: value for name, value in values.items() if (found := metric(name))}
        if "loss" not in values:  # else a step that is evaluated too would have two
            known = {tag: value for tag, value in known.items() if not tag.startswith("budget/")}
        self._add("", _scalars(known), step, at)
        for axis, (name, scale) in _AXES.items():
            if name in values:
                curves = {tag: value for tag, value in known.items() if tag.startswith(_CURVES)}
                moved = {f"{axis}/{tag.replace('/', '_', 1)}": value for tag, value in curves.items()}
                self._add(axis, _scalars(moved), round(values[name] * scale), at)

    def _add(self, axis: str, summary: Summary, step: int, at: float) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        if summary.value:
            self._try(self._files[axis].add, Event(wall_time=at, step=step, summary=summary))

    def _flush(self) -> None:
        for file in self._files.values():
            self._try(file.flush)

    def _try(self, act: Any, *arguments: Any) -> None:
        try:
            act(*arguments)
        except OSError as error:
            if not self._is_missing:
                _log.warning(
                    "warning: %s: %s: TensorBoard misses what comes until it can be written again; metrics.jsonl has all of it, and "
                    "the next start of the run draws it from there",
                    self._folder, error.strerror,
                )  # fmt: skip
            self._is_missing = True


class _EventFile:
    """A file of events, made when the first one comes; after a failure the next one begins another file."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._number, self._began = folder, 0, int(time.time())
        self._file: BufferedWriter | None = None

    def add(self, event: Event) -> None:
        try:
            if self._file is None:
                self._open()
            self._records.write(event.SerializeToString())
        except OSError:
            self._abandon()
            raise

    def flush(self) -> None:
        try:
            if self._file is not None:
                self._file.flush()
        except OSError:
            self._abandon()
            raise

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _open(self) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{self._began}.{socket.gethostname()}.{os.getpid()}.{self._number}{_MARK}"
        self._file = (self._folder / name).open("wb")
        self._records = RecordWriter(self._file)
        self._records.write(Event(wall_time=self._began, file_version="brain.Event:2").SerializeToString())
        if self._number == 0:  # events of other files, older than these: readers that heed it forget them
            start = SessionLog(status=SessionLog.START)
            self._records.write(Event(wall_time=self._began, step=0, session_log=start).SerializeToString())
        self._number += 1

    def _abandon(self) -> None:
        """What is left of a failed file may end in half a record, after which nothing is read."""
        file, self._file = self._file, None
        if file is not None:
            file.raw.close()


def _samples(answers: list[Mapping[str, str]]) -> Iterator[Summary]:
    return (_text(f"samples/{number}", _answer(answer)) for number, answer in enumerate(answers))


def _confusion(matrix: Mapping[str, Any]) -> Iterator[Summary]:
    yield _text("validation/confusion", _markdown(matrix))


def _document_losses(distribution: Mapping[str, Any]) -> Iterator[Summary]:
    yield _histogram("validation/document_losses", distribution)


def _config(config: Mapping[str, Any]) -> Iterator[Summary]:
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    yield _text("config", f"```yaml\n{text}```")
    yield from _hparams(config)


_DRAWN: dict[str, Callable[[Any], Iterator[Summary]]] = {
    "samples": _samples,
    "confusion": _confusion,
    "document_losses": _document_losses,
    "config": _config,
}


def _scalars(values: Mapping[str, float]) -> Summary:
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])


def _text(tag: str, text: str) -> Summary:
    from torch.utils.tensorboard.summary import text as made

    summary = made(tag, text)
    summary.value[0].tag = tag
    return summary


def _answer(answer: Mapping[str, str]) -> str:
    return "\n\n".join(
        f"**{part}**\n\n```\n{answer[part]}\n```"
        for part in ("prompt", "answer", "expected")
        if answer[part] or part != "expected"  # of a prompt of one's own no answer is expected
    )


def _markdown(confusion: Mapping[str, Any]) -> str:
    """A confusion matrix as a table.

    >>> _markdown({"labels": ["ham", "a|b"], "counts": [[812, 3], [5, 120]]}).splitlines()[2:]
    ['| ham | 812 | 3 |', '| a\\\\|b | 5 | 120 |']
    """
    labels = [label.replace("|", "\\|") for label in confusion["labels"]]
    rows = [["truth ↓ taken for →", *labels], ["---"] * (len(labels) + 1)]
    rows += [[label, *map(str, counts)] for label, counts in zip(labels, confusion["counts"], strict=True)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _histogram(tag: str, distribution: Mapping[str, Any]) -> Summary:
    from torch.utils.tensorboard.summary import histogram_raw

    edges, counts, count = distribution["edges"], distribution["counts"], distribution["count"]
    total = distribution["mean"] * count
    return histogram_raw(tag, edges[0], edges[-1], count, total, 0.0, edges[1:], counts)


def _layout() -> Summary:
    """The tab of custom scalars: curves that belong together in one chart."""
    from torch.utils.tensorboard.summary import custom_scalars

    charts = {
        "training and validation": ["Multiline", ["^train/loss$", "^validation/loss$"]],
        "validation by source": ["Multiline", ["^validation/loss/.*"]],
        "training by set": ["Multiline", ["^train/loss/.*"]],
        "by target tokens": ["Multiline", ["^by_target_tokens/train_loss$", "^by_target_tokens/validation_loss$"]],
        "by GPU-hours (1M is one)": ["Multiline", ["^by_gpu_hours/train_loss$", "^by_gpu_hours/validation_loss$"]],
    }
    return custom_scalars({"loss": charts})


def _hparams(config: Mapping[str, Any]) -> list[Summary]:
    """What the table of runs compares: the keys of `train`, the model, ZeRO; by the losses and scores."""
    from torch.utils.tensorboard.summary import hparams

    compared = {f"train.{name}": value for name, value in config.get("train", {}).items()}
    compared |= {"model": str(config.get("model", {}).get("name_or_path")), "zero": str(config.get("zero"))}
    plain = {name: value for name, value in compared.items() if isinstance(value, str | int | float | bool)}
    measured = dict.fromkeys(("train/loss", "validation/loss", "validation/accuracy", "validation/f1"), 0.0)
    return list(hparams(plain, measured))
