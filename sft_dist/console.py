"""What a person watches in a terminal: progress, samples, a confusion matrix, a curve."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

from sft_dist.metrics import numbers


class Console:
    """What a person watches: a progress bar on a terminal, one calm line a log step elsewhere.

    A terminal that is gone does not end a run.
    """

    def __init__(self, total_steps: int, resume_step: int, stream: TextIO = sys.stdout) -> None:
        self._total, self._stream, self._bar = total_steps, stream, None
        self._latest: dict[str, float] = {}
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a model says characters that not every terminal has
        if stream.isatty():
            self._bar, self._task = _progress_bar(total_steps, resume_step, stream)

    def write(self, record: Mapping[str, Any]) -> None:
        """Show a record; confusion is told at the end, the distribution of losses is for charts, the config is in run.yaml."""
        if values := numbers(record):
            self._numbers(record["step"], values)
        for answer in record.get("samples", ()):
            prompt = " ".join(answer["prompt"].split())
            short = prompt if len(prompt) <= 70 else f"…{prompt[-69:]}"
            expected = f" (expected {answer['expected'].strip()[:60]!r})" if answer["expected"] else ""
            self.say(f"  sample at step {record['step']}: {short!r} → {answer['answer'].strip()!r}{expected}")

    def say(self, text: str) -> None:
        """One line to the person."""
        with contextlib.suppress(OSError):
            if self._bar is None:
                print(text, file=self._stream, flush=True)
            else:
                self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.stop()

    def _numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._latest.update(values)
        if self._bar is not None and "loss" in values:
            self._bar.update(self._task, completed=step, numbers=_brief(self._latest))
        else:
            self.say(f"step {step}/{self._total}  {_shown(values)}")


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
    before = sys.stderr
    bar.start()
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is before and before is not sys.stderr:
            handler.setStream(sys.stderr)  # rich's: a warning comes above the bar, and does not tear it
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


def _shown(values: Mapping[str, float]) -> str:
    """What is worth a line.

    >>> _shown({"loss": 2.5, "learning_rate": 1e-3, "step_seconds": 0.5})
    'loss 2.5000  lr 1.00e-03'
    """
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
    counts = zip(confusion["labels"], confusion["counts"], strict=True)
    rows = [["truth ↓ taken for →", *confusion["labels"]], *([label, *map(str, row)] for label, row in counts)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([f"{first:<{widths[0]}}", *cells]))
    return "\n".join(lines)


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
