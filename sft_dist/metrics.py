"""Metric names and where they go: the JSONL file is the truth, TensorBoard and the console are views of it."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import resource
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

from sft_dist.errors import DataError
from sft_dist.phases import PHASES

_log = logging.getLogger("sft_dist")

# JSONL key -> TensorBoard tag. The unit is in the name; a metric that is not here is not written.
TAGS = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "loss_scale": "train/loss_scale",
    "target_tokens_per_second": "speed/target_tokens_per_second",
    "tokens_per_second": "speed/tokens_per_second",
    "step_seconds": "speed/step_seconds",
    "gpu_hours": "budget/gpu_hours",
    "cost": "budget/cost",
    "steps_not_applied": "train/steps_not_applied",
    "slowest_rank_ratio": "speed/slowest_rank_ratio",
    "memory_bytes": "memory/peak_bytes",
    "checkpoint_stall_seconds": "checkpoint/stall_seconds",
    "checkpoint_write_seconds": "checkpoint/write_seconds",
    "checkpoint_bytes": "checkpoint/bytes",
    "checkpoint_gb_per_second": "checkpoint/gb_per_second",
    "validation_loss": "validation/loss",
    "validation_perplexity": "validation/perplexity",
    "validation_accuracy": "validation/accuracy",
    "validation_f1": "validation/f1",
    "validation_exact_match": "validation/exact_match",
    "general_loss": "general/loss",
    "general_perplexity": "general/perplexity",
    **{f"{phase}_seconds": f"time/{phase}_seconds" for phase in PHASES},
}
_BY_SET = {"loss": "train/loss", "epochs": "train/epochs"}
_BY_SOURCE = {name: TAGS[name] for name in ("validation_loss", "validation_perplexity")}


def tag(name: str) -> str | None:
    """TensorBoard tag of a metric; some there are of each set of a mixture or each file. None: no such metric.

    >>> tag("loss"), tag("loss/chat"), tag("epochs/chat"), tag("validation_loss/chat")
    ('train/loss', 'train/loss/chat', 'train/epochs/chat', 'validation/loss/chat')
    """
    whole, slash, part = name.partition("/")
    if not slash:
        return TAGS.get(name)
    found = (_BY_SET | _BY_SOURCE).get(whole)
    return found and f"{found}/{part}"


def peak_memory_bytes(cuda_peak: int | None = None) -> int:
    """Peak memory of this process: of the GPU where there is one, else resident memory."""
    if cuda_peak is not None:
        return cuda_peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Sink(Protocol):
    """Somewhere metrics go."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one step, by the names of TAGS."""

    def samples(self, step: int, answers: Iterable[Mapping[str, str]]) -> None:
        """Prompts with the model's answers and the expected ones."""

    def confusion(self, step: int, confusion: Mapping[str, Any]) -> None:
        """Of a label task, how many records of each label were taken for which: `labels`, and `counts[truth][prediction]`."""

    def close(self) -> None:
        """Flush and release."""


class JsonLines:
    """`metrics.jsonl`: one object a line, appended; what a resumed run will write again is cut off first.

    >>> sink = JsonLines(Path("metrics.jsonl"), resume_step=0)  # doctest: +SKIP
    >>> sink.scalars(1, {"loss": 2.5})  # doctest: +SKIP
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        kept = [line for line in read_lines(path) if line["step"] <= resume_step] if resume_step else []
        staged = path.with_suffix(".partial")
        staged.write_text("".join(json.dumps(line) + "\n" for line in kept))
        staged.replace(path)
        self._path, self._file = path, path.open("ab", buffering=0)
        self._good, self._held = path.stat().st_size, []  # bytes of whole lines; lines that wait for room

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._write({"step": step, **values})

    def samples(self, step: int, answers: Iterable[Mapping[str, str]]) -> None:
        self._write({"step": step, "samples": [dict(answer) for answer in answers]})

    def confusion(self, step: int, confusion: Mapping[str, Any]) -> None:
        self._write({"step": step, "confusion": dict(confusion)})

    def close(self) -> None:
        self._flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        self._held.append(json.dumps(line).encode() + b"\n")
        self._flush()

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

    Raises DataError for any other line that is none.
    """
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return []
    records = []
    for number, line in enumerate(lines):
        try:
            records.append(json.loads(line))
        except ValueError:
            if number != len(lines) - 1:
                raise DataError(
                    f"{path}: line {number + 1} is not JSON; mend or remove that line, or move the file away (the run goes on without)"
                ) from None
            _log.warning("%s: its last line was cut by a crash, and is left out", path)
    return records


class TensorBoard:
    """Event files; a resumed run hides what lies beyond the step it goes on from."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        self._folder = folder
        self._writer: Any = self._open(resume_step + 1 if resume_step else 0)

    def _open(self, purge_step: int | None = None) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self._folder), purge_step=purge_step, flush_secs=10)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        tagged = {tag(name): value for name, value in values.items() if tag(name)}
        self._act(lambda writer: [writer.add_scalar(name, value, step) for name, value in tagged.items()])

    def samples(self, step: int, answers: Iterable[Mapping[str, str]]) -> None:
        for number, answer in enumerate(answers):
            text = "\n\n".join(
                f"**{part}**\n\n```\n{answer[part]}\n```"
                for part in ("prompt", "answer", "expected")
                if answer[part] or part != "expected"  # of a prompt of one's own no answer is expected
            )
            self._act(lambda writer, number=number, text=text: writer.add_text(f"samples/{number}", text, step))

    def confusion(self, step: int, confusion: Mapping[str, Any]) -> None:
        text = _markdown(_rows(confusion))
        self._act(lambda writer: writer.add_text("validation/confusion", text, step))

    def close(self) -> None:
        self._act(lambda writer: writer.close())

    def _act(self, act: Callable[[Any], Any]) -> None:
        """A view of the metrics must not end a run: on a full disk it misses some, and goes on in a file of its own."""
        try:
            self._writer = self._writer or self._open()
            act(self._writer)
        except OSError as error:
            _log.warning(
                "%s: %s: TensorBoard misses what comes now; metrics.jsonl will have it", self._folder, error.strerror
            )
            self._writer = None


class Console:
    """What a person watches: a progress bar on a terminal, one calm line a log step elsewhere."""

    def __init__(self, total_steps: int, resume_step: int, stream: TextIO = sys.stdout) -> None:
        self._total, self._stream, self._bar = total_steps, stream, None
        self._latest: dict[str, float] = {}
        if stream.isatty():
            self._bar, self._task = _progress_bar(total_steps, resume_step, stream)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._latest.update(values)
        line = _line(step, self._total, values)
        if self._bar is None:
            print(line, file=self._stream, flush=True)
        elif "loss" in values:
            self._bar.update(self._task, completed=step, numbers=_brief(self._latest))
        else:
            self._bar.console.print(line, highlight=False)

    def samples(self, step: int, answers: Iterable[Mapping[str, str]]) -> None:
        for answer in answers:
            prompt = " ".join(answer["prompt"].split())
            short = prompt if len(prompt) <= 70 else f"…{prompt[-69:]}"
            expected = f" (expected {answer['expected'].strip()[:60]!r})" if answer["expected"] else ""
            self._say(f"  sample at step {step}: {short!r} → {answer['answer'].strip()!r}{expected}")

    def confusion(self, step: int, confusion: Mapping[str, Any]) -> None:
        """Nothing: it is told at the end."""

    def say(self, text: str) -> None:
        """One line to the person."""
        self._say(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _say(self, text: str) -> None:
        if self._bar is None:
            print(text, file=self._stream, flush=True)
        else:
            self._bar.console.print(text, highlight=False, markup=False)


def _progress_bar(total_steps: int, resume_step: int, stream: TextIO) -> tuple[Any, Any]:
    from rich.console import Console as Rich
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        MofNCompleteColumn(),
        BarColumn(bar_width=12),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"),
    )
    bar = Progress(*columns, console=Rich(file=stream))
    task = bar.add_task("train", total=total_steps, completed=resume_step, numbers="")
    bar.start()
    return bar, task


_SHOWN = {
    "loss": "loss {:.4f}",
    "learning_rate": "lr {:.2e}",
    "grad_norm": "norm {:.2f}",
    "target_tokens_per_second": "{:,.0f} target tokens/s",
    "tokens_per_second": "{:,.0f} tokens/s",
    "validation_loss": "validation loss {:.4f}",
    "validation_perplexity": "perplexity {:.2f}",
    "validation_accuracy": "accuracy {:.4f}",
    "validation_f1": "F1 {:.4f}",
    "validation_exact_match": "exact match {:.4f}",
    "general_perplexity": "general perplexity {:.2f}",
    "checkpoint_bytes": "saved {:,.0f} bytes",
    "checkpoint_write_seconds": "in {:.2f} s",
    "checkpoint_stall_seconds": "the loop waited {:.2f} s",
}


def _numbers(values: Mapping[str, float]) -> str:
    shown = [text.format(values[name]) for name, text in _SHOWN.items() if name in values]
    of_sources = [
        f"{name.partition('/')[2]} {value:.4f}" for name, value in values.items() if name.startswith("validation_loss/")
    ]
    return "  ".join([*shown, *([f"by source: {', '.join(of_sources)}"] if of_sources else [])])


def _brief(values: Mapping[str, float]) -> str:
    """What fits beside a bar on a terminal of 80 columns.

    >>> _brief({"loss": 2.5, "validation_loss": 2.25, "tokens_per_second": 12345.0, "grad_norm": 1.0})
    'loss 2.5000 validation 2.2500 12,345 tokens/s'
    """
    shown = {"loss": "loss {:.4f}", "validation_loss": "validation {:.4f}", "tokens_per_second": "{:,.0f} tokens/s"}
    return " ".join(text.format(values[name]) for name, text in shown.items() if name in values)


def _line(step: int, total: int, values: Mapping[str, float]) -> str:
    """One step as text.

    >>> _line(3, 10, {"loss": 2.5, "learning_rate": 1e-3})
    'step 3/10  loss 2.5000  lr 1.00e-03'
    """
    return f"step {step}/{total}  {_numbers(values)}"


@dataclass(frozen=True, slots=True)
class Metrics:
    """Every sink of this rank; on ranks that write nothing there are none."""

    sinks: tuple[Sink, ...] = ()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one step, to every sink; nothing for none (a run without validation data). What is no number is told."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        for name in values.keys() - finite.keys() if self.sinks else ():
            _log.warning("warning: step %d: %s is %s, and is left out", step, name, values[name])
        for sink in self.sinks if finite else ():
            sink.scalars(step, finite)

    def samples(self, step: int, answers: list[Mapping[str, str]]) -> None:
        """Sample answers, to every sink."""
        for sink in self.sinks:
            sink.samples(step, answers)

    def confusion(self, step: int, confusion: Mapping[str, Any]) -> None:
        """A confusion matrix, to every sink."""
        for sink in self.sinks:
            sink.confusion(step, confusion)

    def close(self) -> None:
        """Flush every sink."""
        for sink in self.sinks:
            sink.close()


_MOST_LABELS = 16


def confusion_table(confusion: Mapping[str, Any]) -> str:
    """A confusion matrix for a terminal; of very many labels only where to find it.

    >>> print(confusion_table({"labels": ["ham", "spam"], "counts": [[812, 3], [5, 120]]}))
    truth ↓ taken for →  ham  spam
    ham                  812     3
    spam                   5   120
    """
    if len(confusion["labels"]) > _MOST_LABELS:
        return f"confusion matrix: of {len(confusion['labels'])} labels, in metrics.jsonl and TensorBoard"
    rows = _rows(confusion)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([f"{first:<{widths[0]}}", *cells]))
    return "\n".join(lines)


def _rows(confusion: Mapping[str, Any]) -> list[list[str]]:
    """The cells of a confusion matrix, with its head."""
    labels = confusion["labels"]
    counts = [[label, *map(str, row)] for label, row in zip(labels, confusion["counts"], strict=True)]
    return [["truth ↓ taken for →", *labels], *counts]


def _markdown(rows: list[list[str]]) -> str:
    """A table.

    >>> _markdown([["a", "b|c"], ["1", "2"]])
    '| a | b\\\\|c |\\n|---|---|\\n| 1 | 2 |'
    """
    head, *others = (f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)
    return "\n".join([head, f"|{'---|' * len(rows[0])}", *others])


def loss_curve(records: Iterable[Mapping[str, Any]], *, width: int = 72, height: int = 14) -> str:
    """Training and validation loss over steps, drawn with characters for a terminal."""
    import plotext

    plotext.clear_figure()
    plotext.plot_size(width, height)
    plotext.theme("clear")
    records = list(records)
    for name, draw, marker in (("loss", plotext.plot, "braille"), ("validation_loss", plotext.scatter, "o")):
        points = [(line["step"], line[name]) for line in records if name in line]
        if points:
            draw(*zip(*points, strict=True), label=name.replace("_", " "), marker=marker)
    plotext.xlabel("step")
    return plotext.uncolorize(plotext.build()).rstrip()
