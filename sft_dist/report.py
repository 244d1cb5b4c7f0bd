"""A run, or several beside each other, as one page: what happened, what it cost, what came out, how to do it again."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import shlex
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sft_dist import __version__
from sft_dist.chart import COLOURS, DASHES, MOST_LINES, Chart, Line, Mark, Point, exact, lay_out, smoothed
from sft_dist.data.view import Bar, funnel, visible
from sft_dist.goodput import PARTS
from sft_dist.phases import OF_A_STEP
from sft_dist.run_record import Run
from sft_dist.topology import start_command
from sft_dist.usage import USAGE, num_nodes, read_usage

_SMOOTHED_FROM = 80  # points of a training loss
_MOST_LABELS = 40  # of a confusion matrix that is shown whole
_TABLE_ROWS = 120  # of training steps


def comparability(runs: Sequence[Run]) -> list[str]:
    """What keeps the losses of these runs from being compared; nothing where nothing does."""
    if len(runs) < 2:
        return []

    def values(name: str) -> set[str | None]:
        return {getattr(run.data, name) for run in runs}

    def differ(name: str) -> bool:
        return len(values(name) - {None}) > 1

    if differ("tokenizer"):
        return ["The runs use different tokenizers: their losses and perplexities are per token, and not comparable."]
    if differ("validation"):
        return [
            "The runs are of different data, and were measured on different validation sets: their losses are not comparable."
        ]
    unknown = [run.name for run in runs if None in (run.data.train, run.data.validation, run.data.tokenizer)]
    if differ("train") and not unknown:
        return [
            "The runs were trained on different data and measured on the same validation set: compare their validation losses, "
            "not their training losses."
        ]
    if differ("train"):
        return ["The runs are of different data: their losses are not comparable."]
    if unknown:
        return [
            f"Of {', '.join(unknown)} the data cannot be seen from here: whether the losses are comparable is not known."
        ]
    return []


def config_diff(runs: Sequence[Run]) -> tuple[list[tuple[str, list[str | None]]], int]:
    """(keys whose values differ with the value of each run, None: not there; how many keys there are in all)."""
    flat = [dict(flattened(run.config)) for run in runs]
    keys = list(dict.fromkeys(key for config in flat for key in config))
    rows = [(key, [config.get(key) for config in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1 and key != "run_dir"], len(keys)


def flattened(values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and their values as text.

    >>> list(flattened({"train": {"epochs": 2}, "mixture": [{"weight": 1.5}], "zero": "z.json"}))
    [('train.epochs', '2'), ('mixture.0.weight', '1.5'), ('zero', 'z.json')]
    """
    inner = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in inner:
        name = f"{prefix}{key}"
        if isinstance(value, dict | list) and value:
            yield from flattened(value, f"{name}.")
        else:
            is_plain = isinstance(value, str) and value and value.isprintable()
            yield name, value if is_plain else json.dumps(value, ensure_ascii=False, default=str)


# What is drawn


def charts(runs: Sequence[Run]) -> list[Chart]:
    """The charts of one run, or of several over each other; none of what was not measured."""
    marks = _marks(runs[0]) if len(runs) == 1 else ()
    made = [*_loss_charts(runs, marks)]
    for run in runs:
        made += _parts(run, "validation_loss", "Validation loss by source", runs, marks)
        made += _parts(run, "loss", "Training loss by set", runs, marks)
    made += _documents(runs)
    for name, title, unit, factor, from_zero in _SINGLE:
        made += _overlay(runs, name, title, unit, factor=factor, from_zero=from_zero, marks=marks)
    if len(runs) == 1:
        made += _time_chart(runs[0], marks)
    return made


# metric, title, unit, factor, whether the axis begins at zero; a curve takes three points
_SINGLE = (
    ("validation_accuracy", "Accuracy on the validation set", "share of records", 1.0, False),
    ("validation_f1", "F1 on the validation set", "F1", 1.0, False),
    ("general_perplexity", "General text: what is forgotten", "perplexity", 1.0, False),
    ("learning_rate", "Learning rate", "at each step", 1.0, True),
    ("grad_norm", "Gradient norm before clipping", "L2 norm", 1.0, False),
    ("tokens_per_second", "Throughput", "tokens per second, all GPUs", 1.0, True),
    ("step_seconds", "Time of a step", "seconds", 1.0, True),
    ("memory_bytes", "Peak memory of the main rank", "GiB", 2.0**-30, True),
    ("gpu_hours", "GPU-hours, all lives", "GPU-hours", 1.0, True),
)

_NOISY = {"grad_norm", "tokens_per_second", "step_seconds"}


def _marks(run: Run) -> tuple[Mark, ...]:
    found = [
        Mark(step, f"{life.life} goes on from step {step:,}" if number else f"begins at step {step:,}")
        for number, life in enumerate(run.lives)
        for at, step in enumerate(life.from_steps)
        if number or at
    ]
    return tuple(found)


def _loss_charts(runs: Sequence[Run], marks: tuple[Mark, ...]) -> Iterator[Chart]:
    if len(runs) == 1:
        lines = [*_curve(runs[0].series.get("loss", []), 0, "training")]
        if validation := runs[0].series.get("validation_loss"):
            lines.append(Line("validation", tuple(validation), 1, "dots"))
        if lines:
            yield Chart("loss", "Loss", "nats per target token", tuple(lines), note=_smoothing(runs), marks=marks)
        return
    lines = [line for slot, run in enumerate(runs) for line in _curve(run.series.get("loss", []), slot, run.name)]
    yield from _overlay(runs, "validation_loss", "Validation loss", "nats per target token", style="dots")
    if lines:
        yield Chart("training-loss", "Training loss", "nats per target token", tuple(lines), note=_smoothing(runs))
    costs = tuple(line for slot, run in enumerate(runs) for line in _loss_by_cost(run, slot))
    if len(costs) > 1:
        title = "Validation loss by what it cost"
        yield Chart("validation-loss-by-gpu-hours", title, "nats per target token", costs, x_label="GPU-hours")


def _curve(points: Sequence[Point], slot: int, label: str) -> Iterator[Line]:
    """A line; where there are many points, their means over all of them, faint."""
    if len(points) >= _SMOOTHED_FROM:
        yield Line(label, tuple(points), slot, "faint")
        yield Line(label, tuple(smoothed(points, len(points) // 40)), slot)
    elif points:
        yield Line(label, tuple(points), slot)


def _smoothing(runs: Sequence[Run]) -> str:
    counts = [len(run.series.get("loss", [])) for run in runs]
    if max(counts) < _SMOOTHED_FROM:
        return ""
    return f"Faint: as logged; bold: the mean of the {max(counts) // 40} logged steps around each."


def _loss_by_cost(run: Run, slot: int) -> Iterator[Line]:
    hours = dict(run.series.get("gpu_hours", []))
    points = tuple((hours[step], loss) for step, loss in run.series.get("validation_loss", []) if step in hours)
    if len(points) > 1:
        yield Line(run.name, points, slot, "dots")


def _parts(run: Run, whole: str, title: str, runs: Sequence[Run], marks: tuple[Mark, ...]) -> Iterator[Chart]:
    """A metric of each source or set: as many in a chart as can be told apart."""
    found = {name.partition("/")[2]: points for name, points in run.series.items() if name.startswith(f"{whole}/")}
    lines = tuple(
        Line(name, tuple(points if whole != "loss" or len(points) < _SMOOTHED_FROM else smoothed(points, len(points) // 40)),
             slot, "dots" if whole != "loss" else "line")
        for slot, (name, points) in enumerate(sorted(found.items())[:MOST_LINES])
    )  # fmt: skip
    if lines:
        number = runs.index(run) + 1
        name = f"{whole.replace('_', '-')}-by-{'source' if whole != 'loss' else 'set'}"
        left = len(found) - len(lines)
        note = f"{left:,} more are not drawn; the table of all evaluations has them." if left else ""
        of = f": {run.name}" if len(runs) > 1 else ""
        name += f"-{number}" if len(runs) > 1 else ""
        yield Chart(name, title + of, "nats per target token", lines, note=note, marks=marks)


def _documents(runs: Sequence[Run]) -> Iterator[Chart]:
    """How the losses of the validation documents are distributed: of a run its first and its last, of several the last of each."""
    found: list[tuple[str, dict[str, Any] | None]]
    if len(runs) == 1:
        steps = sorted(runs[0].documents)
        found = [(f"step {step:,}", runs[0].documents[step]) for step in dict.fromkeys([*steps[:1], *steps[-1:]])]
    else:
        found = [(run.name, run.documents[max(run.documents)] if run.documents else None) for run in runs]
    lines = tuple(Line(name, made, slot, "buckets") for slot, (name, of) in enumerate(found) if (made := buckets(of)))
    if lines:
        medians = [f"{name} {exact(half)}" for name, of in found if (half := _median(of)) is not None]
        note = "The mean over the targets of each document; logarithmic, a bucket is 9 % wide and the first one holds all below."
        note += f" Half of the documents are below: {', '.join(medians)}." if medians else ""
        title, x_label = "Losses of the validation documents", "nats per target token"
        yield Chart("document-losses", title, "% of the documents", lines, x_label, note, from_zero=True, is_log_x=True)


def _median(distribution: dict[str, Any] | None) -> float | None:
    with contextlib.suppress(KeyError, TypeError):
        return float((distribution or {})["quantiles"]["0.5"])
    return None


def buckets(distribution: dict[str, Any] | None) -> tuple[Point, ...]:
    """Where each bucket begins, with the per cent of the documents in it; a first one from 0 is as wide as the next.

    Nothing of what no logarithmic axis can show.

    >>> buckets({"edges": [0.0, 1.0, 2.0, 4.0], "counts": [1, 0, 3]})
    ((0.5, 25.0), (1.0, 0.0), (2.0, 75.0), (4.0, 0.0))
    """
    edges, counts = (list(distribution["edges"]), distribution["counts"]) if distribution else ([], [])
    if (
        len(edges) < 2
        or edges[1] <= 0
        or any(one >= other for one, other in itertools.pairwise(edges))
        or not any(counts)
    ):
        return ()
    if edges[0] <= 0:
        edges[0] = edges[1] ** 2 / edges[2] if len(edges) > 2 else edges[1] / 2
    shares = [100 * count / sum(counts) for count in counts]
    return tuple(zip(edges, [*shares, 0.0], strict=True))


def _overlay(
    runs: Sequence[Run],
    name: str,
    title: str,
    unit: str,
    *,
    factor: float = 1.0,
    from_zero: bool = False,
    style: Any = "line",
    marks: tuple[Mark, ...] = (),
) -> Iterator[Chart]:
    lines: list[Line] = []
    for slot, run in enumerate(runs):
        points = [(step, value * factor) for step, value in run.series.get(name, ())]
        if style == "dots" and points:
            lines.append(Line(run.name, tuple(points), slot, style))
        elif len(points) > 2 and name in _NOISY:
            lines += _curve(points, slot, run.name)
        elif len(points) > 2:
            lines.append(Line(run.name, tuple(points), slot))
    if lines:
        yield Chart(name.replace("_", "-"), title, unit, tuple(lines), marks=marks, from_zero=from_zero)


def _time_chart(run: Run, marks: tuple[Mark, ...]) -> Iterator[Chart]:
    """Seconds by phase, a step, of each stretch between two log lines."""
    steps = [step for step, _ in run.series.get("compute_seconds", [])]
    lines: list[Line] = []
    for slot, phase in enumerate(OF_A_STEP):
        found = dict(run.series.get(f"{phase}_seconds", []))
        pairs = zip([0, *steps], steps, strict=False)
        points = [(step, found.get(step, 0.0) / max(1, step - before)) for before, step in pairs]
        if found and len(points) > 2:
            lines += [line for line in _curve(points, slot, PARTS[phase][0]) if line.style != "faint"]
    if lines:
        note = "Of the main rank; evaluations and checkpoints, which come between steps, are left out."
        note += " The mean around each step." if len(steps) >= _SMOOTHED_FROM else ""
        yield Chart(
            "time-by-phase",
            "A step's time by phase",
            "seconds a step",
            tuple(lines),
            note=note,
            marks=marks,
            from_zero=True,
        )


# What is told


def reproduce(run: Run) -> str:
    """The commands that do the run again, from its resolved `run.yaml`."""
    path = shlex.quote(str(run.folder / "run.yaml"))
    gpus = run.lives[-1].gpus if run.lives else 1
    nodes = num_nodes(read_usage(run.folder / USAGE), gpus)
    lines = [f"sft-dist prepare {path}"] if run.config.get("prepare") else []
    again = shlex.quote(f"run_dir={run.folder}-again")
    return "\n".join([*lines, start_command(f"{path} {again}", gpus, nodes)])


def funnels(run: Run) -> dict[str, list[Bar]]:
    """Of each set: records read, dropped and kept; then documents, rows and tokens of its splits."""
    made = {}
    for name, about in run.data.sets.items():
        with contextlib.suppress(KeyError, TypeError, AttributeError, ValueError):
            made[name] = funnel(about)
    return made


@dataclass(frozen=True, slots=True)
class Fact:
    """A number that a person asks for first: `text` as it is read, `value` as it is in the files, `more` beside it."""

    label: str
    text: str
    value: float
    more: str = ""


def facts(run: Run) -> list[Fact]:
    """What is told at the top, of all that is known."""
    return [*_outcome(run), *_speed(run), *_spent(run)]


def _outcome(run: Run) -> Iterator[Fact]:
    for name, label, is_loss in (
        ("validation_loss", "Validation loss", True),
        ("validation_perplexity", "Perplexity", True),
        ("validation_accuracy", "Accuracy", False),
        ("validation_f1", "F1", False),
        ("general_perplexity", "General perplexity", True),
    ):
        points = run.series.get(name, [])
        if points:
            best = (min if is_loss else max)(points, key=lambda point: point[1])
            more = f"{exact(points[0][1])} at step {points[0][0]:,}" if len(points) > 1 else f"at step {points[0][0]:,}"
            if best[0] not in (points[0][0], points[-1][0]):
                more += f"; best {exact(best[1])} at {best[0]:,}"
            yield Fact(label, exact(points[-1][1]), points[-1][1], more)
    if points := run.series.get("loss", []):
        yield Fact(
            "Training loss", exact(points[-1][1]), points[-1][1], f"{exact(points[0][1])} at step {points[0][0]:,}"
        )
    yield Fact("Steps", f"{run.step:,}", run.step, f"and {run.lost_steps:,} computed in vain" if run.lost_steps else "")


def _speed(run: Run) -> Iterator[Fact]:
    if points := run.series.get("tokens_per_second", []):
        median = statistics.median(value for _, value in points)
        yield Fact("Tokens per second", exact(round(median)), median, "median of the logged steps, all GPUs")
    if points := run.series.get("memory_bytes", []):
        peak = max(value for _, value in points)
        yield Fact("Peak memory", f"{peak / 2**30:,.2f} GiB", peak, "of the main rank")


def _spent(run: Run) -> Iterator[Fact]:
    seconds = math.fsum(run.time.values())
    if seconds:
        lives = f"{len(run.lives):,} {'life' if len(run.lives) == 1 else 'lives'}"
        yield Fact("Wall-clock", duration(seconds), seconds, lives)
    hours, cost = run.gpu_hours, run.cost
    if hours is not None:
        yield Fact("GPU-hours", f"{hours:,.2f}" if hours >= 1 else f"{hours:.3g}", hours, "processes × time, all lives")
    if cost is not None:
        yield Fact("Cost", f"{cost[0]:,.2f} {cost[1]}", cost[0])
    if run.goodput is not None:
        yield Fact("Goodput", f"{100 * run.goodput:.1f} %", run.goodput, "of the time computed steps that count")


def duration(seconds: float) -> str:
    """For a person.

    >>> duration(0.25), duration(42), duration(4020), duration(200_000)
    ('0.25 s', '42 s', '1 h 07 min', '55 h 33 min')
    """
    if seconds < 60:
        return f"{seconds:.3g} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"
    return f"{seconds // 3600:,.0f} h {seconds % 3600 // 60:02.0f} min"


def answers(runs: Sequence[Run]) -> list[tuple[str, str, list[tuple[int, int, str]]]]:
    """(prompt, expected answer, [(which run, step, answer)]): of each prompt the first and the last answer of each run."""
    found: dict[str, tuple[str, list[tuple[int, int, str]]]] = {}
    for number, run in enumerate(runs):
        steps = sorted(run.samples)
        for step in dict.fromkeys([*steps[:1], *steps[-1:]]):
            for sample in run.samples[step]:
                _, given = found.setdefault(sample["prompt"], (sample["expected"], []))
                given.append((number, step, sample["answer"]))
    return [(prompt, expected, given) for prompt, (expected, given) in found.items()]


def confusions(confusion: dict[str, Any], most: int = 20) -> list[tuple[str, str, int]]:
    """(truth, taken for, how often) of what is confused most.

    >>> confusions({"labels": ["ham", "spam"], "counts": [[812, 3], [5, 120]]})
    [('spam', 'ham', 5), ('ham', 'spam', 3)]
    """
    labels = confusion["labels"]
    wrong = [
        (truth, taken, count)
        for truth, row in zip(labels, confusion["counts"], strict=True)
        for taken, count in zip(labels, row, strict=True)
        if count and truth != taken
    ]
    return sorted(wrong, key=lambda entry: -entry[2])[:most]


@dataclass(frozen=True, slots=True)
class Table:
    """Metrics by step: `rows` are (step, value of each of `names` or None); `left_out` rows are not shown."""

    names: list[str]
    rows: list[tuple[int, list[float | None]]]
    left_out: int = 0


def tables(run: Run, most: int = _TABLE_ROWS) -> dict[str, Table]:
    """All evaluations; and the logged steps, the first, the last and some between where there are many."""
    held_out = [name for name in run.series if name.startswith(("validation_", "general_"))]
    others = [name for name in run.series if name not in held_out and not name.startswith("checkpoint_")]
    saves = [name for name in run.series if name.startswith("checkpoint_")]
    made = {
        title: _table(run, names, most)
        for title, names in (("Evaluations", held_out), ("Logged steps", others), ("Checkpoints", saves))
    }
    return {title: table for title, table in made.items() if table.rows}


def _table(run: Run, names: list[str], most: int) -> Table:
    values = {name: dict(run.series[name]) for name in names}
    steps = sorted({step for of_name in values.values() for step in of_name})
    shown = steps
    if len(steps) > most:
        shown = [steps[round(place * (len(steps) - 1) / (most - 1))] for place in range(most)]
    rows = [(step, [values[name].get(step) for name in names]) for step in shown]
    return Table(names, rows, len(steps) - len(shown))


# The page


def page(runs: Sequence[Run], drawn: Sequence[Chart]) -> str:
    """The report as one HTML file that loads nothing, runs nothing, and follows the reader's light or dark."""
    import jinja2

    # `finalize` sees every value that is put in: control characters become signs, then autoescape does the rest
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    environment.filters |= {"commas": "{:,}".format, "exact": exact, "duration": duration, "percent": "{:.2f}".format}
    template = environment.get_template("report.html.jinja")
    differing, num_keys = config_diff(runs)
    return template.render(
        runs=runs,
        drawings=[lay_out(chart) for chart in drawn],
        colours=COLOURS,
        num_colours=len(COLOURS),
        dashes=DASHES,
        parts=PARTS,
        facts=[{fact.label: fact for fact in facts(run)} for run in runs],
        comparability=comparability(runs),
        differing=differing,
        num_keys=num_keys,
        answers=answers(runs),
        confusions=confusions,
        most_labels=_MOST_LABELS,
        funnels=_funnels_told_once(runs),
        tables=[tables(run, max(20, _TABLE_ROWS // len(runs))) for run in runs],
        reproduce=[reproduce(run) for run in runs],
        configs=[yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True) for run in runs],
        version=__version__,
        created=time.strftime("%F %H:%M %Z"),
        moment=lambda seconds: time.strftime("%F %T", time.localtime(seconds)),
    )


def _funnels_told_once(runs: Sequence[Run]) -> list[tuple[str, list[Bar], dict[str, Any], list[str]]]:
    """(folder, bars, splits, the runs trained on it) of each prepared set."""
    told: dict[str, tuple[list[Bar], dict[str, Any], list[str]]] = {}
    for run in runs:
        for folder, bars in funnels(run).items():
            told.setdefault(folder, (bars, _splits(run.data.sets[folder]), []))[2].append(run.name)
    return [(folder, *of_folder) for folder, of_folder in told.items()]


def _splits(about: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What a `prepare.json` counts of each split, as far as it is there."""
    keys = ("documents", "rows", "seq_len", "tokens", "targets", "fill")
    found = about.get("splits")
    return {
        name: split
        for name, split in (found.items() if isinstance(found, dict) else ())
        if isinstance(split, dict) and all(isinstance(split.get(key), int | float) for key in keys)
    }
