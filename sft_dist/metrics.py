"""Where numbers go: `metrics.jsonl` is the truth, everything else is a view of it."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sft_dist.errors import DataError

_log = logging.getLogger("sft_dist")


def peak_memory_bytes(cuda_peak: int | None = None) -> int:
    """Peak memory of this process: of the GPU where there is one, else resident memory."""
    if cuda_peak is not None:
        return cuda_peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Sink(Protocol):
    """Somewhere records go.

    A record is a line of `metrics.jsonl`: `step`, `at` (Unix seconds), and either numbers by the names of the glossary or one of
    `samples`: a list of prompts with the model's answers and the expected ones; `confusion`: of a label task, how many records of
    each label were taken for which, `labels` and `counts[truth][prediction]`; `document_losses`: their distribution; `config`:
    the run file as resolved.
    """

    def write(self, record: Mapping[str, Any]) -> None:
        """Take a record."""

    def close(self) -> None:
        """Flush and release."""


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a record; what is none is left out.

    >>> numbers({"step": 3, "at": 1.8e9, "loss": 2.5, "remark": "by another version", "samples": []})
    {'loss': 2.5}
    """
    return {k: v for k, v in record.items() if k not in ("step", "at") and type(v) in (int, float)}


class JsonLines:
    """`metrics.jsonl`: one object a line, appended; what a resumed run will write again is cut off first.

    >>> sink = JsonLines(Path("metrics.jsonl"), resume_step=0)  # doctest: +SKIP
    >>> sink.write({"step": 1, "loss": 2.5})  # doctest: +SKIP
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        kept = [line for line in read_lines(path) if line["step"] <= resume_step] if resume_step else []
        staged = path.with_suffix(".partial")
        staged.write_text("".join(json.dumps(line) + "\n" for line in kept))
        staged.replace(path)
        self._path, self._file = path, path.open("ab", buffering=0)
        self._good = path.stat().st_size  # bytes of whole lines
        self._held: list[bytes] = []  # lines that wait for room

    def write(self, record: Mapping[str, Any]) -> None:
        """Append it."""
        self._held.append(json.dumps(record).encode() + b"\n")
        self._flush()

    def close(self) -> None:
        self._flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def _flush(self) -> None:
        """Append what is held; on a full disk it stays held, and no line is left half written."""
        content = b"".join(self._held)
        try:
            written = self._file.write(content) if content else 0
            if written < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._file.truncate(self._good)
            if len(self._held) == 1:
                _log.warning(
                    "%s: %s: its lines are held in memory until they can be written", self._path, error.strerror
                )
            return
        self._good, self._held = self._good + written, []


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a last line cut by a crash is left out; no file is no records.

    Fields that are not known are kept as they are. Raises DataError for any other line that is no record.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    lines = lines[:-1] if not lines[-1] else lines
    records = []
    for number, line in enumerate(lines):
        try:
            records.append(_record(line))
        except ValueError as error:
            if number != len(lines) - 1 or str(error) == _NO_STEP:
                what = _NO_STEP if str(error) == _NO_STEP else "is not JSON"
                raise DataError(
                    f"{path}: line {number + 1} {what}; mend or remove that line, or move the file away (the run goes on without)"
                ) from None
            _log.warning("%s: its last line was cut by a crash, and is left out", path)
    return records


def tables(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a record holds beside numbers, by its kind; what another version wrote in a shape of its own is left out.

    >>> tables({"step": 3, "loss": 2.5, "confusion": {"labels": ["a"], "counts": [[4]]}, "samples": "none"})
    {'confusion': {'labels': ['a'], 'counts': [[4]]}}
    """
    return {
        kind: record[kind] for kind, has_its_shape in _SHAPES.items() if kind in record and has_its_shape(record[kind])
    }


def _are_samples(made: Any) -> bool:
    parts = ("prompt", "answer", "expected")
    return isinstance(made, list) and all(
        isinstance(answer, dict) and all(isinstance(answer.get(part), str) for part in parts) for answer in made
    )


def _is_confusion(made: Any) -> bool:
    labels, counts = (made.get(part) if isinstance(made, dict) else None for part in ("labels", "counts"))
    return (
        isinstance(labels, list)
        and all(isinstance(label, str) for label in labels)
        and _are_numbers(counts, len(labels), len(labels))
    )


def _is_distribution(made: Any) -> bool:
    counts, edges = (made.get(part) if isinstance(made, dict) else None for part in ("counts", "edges"))
    return (
        isinstance(counts, list)
        and len(counts) > 0
        and _are_numbers([counts], 1, len(counts))
        and _are_numbers([edges], 1, len(counts) + 1)
    )


def _are_numbers(rows: Any, count: int, length: int) -> bool:
    """Whether these are so many lists of so many numbers each."""
    return (
        isinstance(rows, list)
        and len(rows) == count
        and all(
            isinstance(row, list) and len(row) == length and all(type(value) in (int, float) for value in row)
            for row in rows
        )
    )


def _is_config(made: Any) -> bool:
    return isinstance(made, dict) and isinstance(made.get("train"), dict)


_SHAPES: dict[str, Callable[[Any], bool]] = {
    "samples": _are_samples,
    "confusion": _is_confusion,
    "document_losses": _is_distribution,
    "config": _is_config,
}

_NO_STEP = "has no step"


def _record(line: bytes) -> dict[str, Any]:
    """Raises ValueError where the line is none."""
    record = json.loads(line)
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        raise ValueError(_NO_STEP)
    return record


@dataclass(slots=True)
class Metrics:
    """Every sink of this rank; on ranks that write nothing there are none.

    `used`: what the run has used until now, by the names of metrics. `step` and `target_tokens`: how far the run is.
    """

    sinks: tuple[Sink, ...] = ()
    used: Callable[[], Mapping[str, float]] = dict
    step: int = -1
    target_tokens: int = 0

    def stepped(self, step: int, target_tokens: int) -> None:
        """The run is so far: records of numbers of this step tell it, and what was used until then."""
        self.step, self.target_tokens = step, target_tokens

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one step, to every sink; nothing for none (a run without validation data). What is no number is told."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        for name in values.keys() - finite.keys() if self.sinks else ():
            _log.warning("warning: step %d: %s is %s, and is left out", step, name, values[name])
        if finite and step == self.step and self.sinks:
            finite |= {"target_tokens": self.target_tokens, **self.used()}
        if finite:
            self._write(step, **finite)

    def samples(self, step: int, answers: list[Mapping[str, str]]) -> None:
        """Sample answers, to every sink."""
        self._write(step, samples=[dict(answer) for answer in answers])

    def confusion(self, step: int, confusion: Mapping[str, Any]) -> None:
        """A confusion matrix, to every sink."""
        self._write(step, confusion=dict(confusion))

    def document_losses(self, step: int, distribution: Mapping[str, Any]) -> None:
        """How the mean losses of the validation documents are distributed, to every sink."""
        self._write(step, document_losses=dict(distribution))

    def config(self, step: int, config: Mapping[str, Any]) -> None:
        """The run file as resolved, to every sink."""
        self._write(step, config=dict(config))

    def close(self) -> None:
        """Flush every sink."""
        for sink in self.sinks:
            sink.close()

    def _write(self, step: int, **what: Any) -> None:
        record = {"step": step, "at": round(time.time(), 3), **what}
        for sink in self.sinks:
            sink.write(record)
