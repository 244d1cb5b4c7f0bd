"""What a run folder tells of its run: numbers, lives, data, answers; and what of them is missing or damaged."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sft_dist.chart import MOST_LINES
from sft_dist.errors import ConfigError
from sft_dist.glossary import metric
from sft_dist.goodput import Span, goodput, spans, time_by_part
from sft_dist.limits import Verdict
from sft_dist.metrics import tables
from sft_dist.retention import list_folders
from sft_dist.schema import money
from sft_dist.spikes import BAD_ROWS
from sft_dist.usage import USAGE, gpu_seconds, read_usage

_NOT_SCALARS = {"step", "at", "samples", "confusion", "document_losses", "config"}


@dataclass(frozen=True, slots=True)
class Data:
    """What a run was trained on, as far as that can still be seen: fingerprints, and what `prepare` counted of each set."""

    train: str | None = None
    validation: str | None = None
    tokenizer: str | None = None
    sets: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> prepare.json


@dataclass(frozen=True, slots=True)
class Run:
    """What a run folder holds: `series[name]` are (step, value) by step, of every number in `metrics.jsonl`.

    `documents`: by step how the losses of the validation documents are distributed (see `sft_dist.document_losses`).
    `notes` are what a reader has to know about the numbers.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    series: dict[str, list[tuple[int, float]]]
    samples: dict[int, list[dict[str, str]]]
    confusion: tuple[int, dict[str, Any]] | None
    lives: list[Span]
    ends: dict[str, str]
    data: Data
    notes: list[str]
    history: list[str]
    is_running: bool = False
    documents: dict[int, dict[str, Any]] = field(default_factory=dict)

    def last(self, name: str) -> float | None:
        """The last value of a metric."""
        return self.series[name][-1][1] if self.series.get(name) else None

    @property
    def step(self) -> int:
        """The last step of which anything is known."""
        return max((points[-1][0] for points in self.series.values() if points), default=0)

    @property
    def time(self) -> dict[str, float]:
        """Seconds of all lives, and between them, by part."""
        return time_by_part(self.lives)

    @property
    def goodput(self) -> float | None:
        """The share of that time in which steps that count were computed."""
        return goodput(self.time)

    @property
    def lost_steps(self) -> int:
        """Steps computed in vain."""
        return sum(life.lost_steps for life in self.lives)

    @property
    def gpu_hours(self) -> float | None:
        """Of all lives."""
        lines = [{"life": life.life, "began": life.began, "at": life.at, "gpus": life.gpus} for life in self.lives]
        return gpu_seconds(lines) / 3600 if lines else self.last("gpu_hours")

    @property
    def cost(self) -> tuple[float, str] | None:
        """(amount, currency), where the run file knows a price."""
        price = section(self.config, "budget").get("price_per_gpu_hour")
        hours = self.gpu_hours
        if price is None or hours is None:
            return None
        with contextlib.suppress(ValueError):
            amount, currency = money(str(price))
            return hours * amount, currency
        return None


def read_run(folder: Path, *, name: str | None = None, is_running: bool = False) -> Run:
    """Everything that is known of the run in a folder. Raises ConfigError where there is none, or nothing of it yet."""
    path = folder / "metrics.jsonl"
    if not (folder / "run.yaml").is_file() and not path.is_file():
        raise ConfigError(f"{folder}: no run there; name the run_dir of a run file")
    if not path.is_file():
        raise ConfigError(f"{folder}: the run has not begun to write metrics.jsonl; wait for its first step")
    notes: list[str] = []
    config = _config(folder / "run.yaml", notes)
    series, samples, confusion, documents = _metrics(path, notes)
    if not series:
        raise ConfigError(f"{path}: holds no number yet; wait for the run's first step")
    lives = spans(read_usage(folder / USAGE))
    run = Run(
        folder, name or folder.resolve().name, config, series, samples, confusion, lives, _ends(folder, lives),
        _data(folder, config, notes), notes, _history(folder), is_running, documents,
    )  # fmt: skip
    notes.extend(_gaps(run))
    return run


def _config(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text())
        if isinstance(config, dict):
            return config
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        pass
    notes.append("run.yaml is missing or cannot be read: nothing is told of the configuration.")
    return {}


def _metrics(path: Path, notes: list[str]) -> tuple[dict, dict, tuple[int, dict[str, Any]] | None, dict]:
    """(series, samples by step, the last confusion matrix, document losses by step); what is no metric is left out and counted."""
    found: dict[str, dict[int, float]] = {}
    samples: dict[int, list[dict[str, str]]] = {}
    documents: dict[int, dict[str, Any]] = {}
    confusion, bad, unknown, repeated = None, 0, set(), set()
    lines = path.read_bytes().split(b"\n")
    for number, text in enumerate(lines):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            step = line["step"]
            if type(step) is not int:
                raise TypeError(step)
        except (ValueError, KeyError, TypeError):
            if number == len(lines) - 1:
                notes.append("The last line of metrics.jsonl was cut by a crash, or is being written; it is left out.")
            else:
                bad += 1
            continue
        told = tables(line)
        if "samples" in told:
            samples[step] = told["samples"]
        if "confusion" in told:
            confusion = (step, told["confusion"])
        if "document_losses" in told:
            documents[step] = told["document_losses"]
        for name, value in line.items():
            if name in _NOT_SCALARS:
                continue
            if metric(name) is None:
                unknown.add(name)
            elif type(value) in (int, float) and math.isfinite(value):
                points = found.setdefault(name, {})
                repeated |= {step} if name == "loss" and step in points else set()
                points[step] = value
    if bad:
        notes.append(f"{bad:,} damaged {'line' if bad == 1 else 'lines'} of metrics.jsonl left out.")
    if unknown:
        notes.append(f"Fields that this version does not know are left out: {', '.join(sorted(unknown))}.")
    if repeated:
        notes.append(f"{len(repeated):,} steps are told twice in metrics.jsonl; the later line counts.")
    return {name: sorted(points.items()) for name, points in found.items()}, samples, confusion, documents


def section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A section of a run file that somebody may have written by hand; empty where there is none."""
    value = config.get(name)
    return value if isinstance(value, dict) else {}


def _ends(folder: Path, lives: Sequence[Span]) -> dict[str, str]:
    """How each life ended, of those that left a verdict."""
    ends = {}
    for life in lives:
        with contextlib.suppress(ValueError, TypeError, OSError):
            verdict = Verdict.read(folder / "verdicts", life.life)
            if verdict is not None:
                ends[life.life] = f"{verdict.reason}: {verdict.detail}"
    return ends


def _history(folder: Path) -> list[str]:
    """What was changed, rolled back or not applied on the way, as the newest checkpoint and the list of bad rows have it."""
    told: list[str] = []
    for path in reversed(list_folders(folder / "checkpoints")):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            told += [str(note) for note in json.loads((path / "state.json").read_bytes()).get("notes", [])]
            break
    with contextlib.suppress(OSError):
        count = sum(1 for line in (folder / BAD_ROWS).read_bytes().split(b"\n") if line.strip())
        told += [f"{count:,} {'step was' if count == 1 else 'steps were'} not applied: {BAD_ROWS} lists the rows"] * (
            count > 0
        )
    return told


def _data(folder: Path, config: Mapping[str, Any], notes: list[str]) -> Data:
    """The fingerprints of the newest checkpoint, and the counts of the shards where they are still the same."""
    identity: dict[str, Any] = {}
    for path in reversed(list_folders(folder / "checkpoints")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            identity = dict(json.loads((path / "manifest.json").read_bytes())["identity"])
            break
    folders = [Path(each) for each in _shards_dirs(config)]
    manifests = [
        (_json(each / "train" / "manifest.json"), _json(each / "validation" / "manifest.json")) for each in folders
    ]
    train = identity.get("data")
    sets = {}
    for each, (of_train, _) in zip(folders, manifests, strict=True):
        if not of_train:
            notes.append(f"The shards {each} cannot be seen from here: nothing is told of how they were prepared.")
        elif len(folders) == 1 and train and of_train.get("data") != train:
            notes.append(f"The shards {each} were prepared anew since: what is told of data is left out.")
        elif about := _json(each / "prepare.json"):
            sets[str(each)] = about
    seen = [(mine or {}, held_out or {}) for mine, held_out in manifests] if len(sets) == len(folders) else []
    return Data(
        train or _joined(mine.get("data") for mine, _ in seen),
        _joined(held_out.get("data") for _, held_out in seen),
        identity.get("tokenizer") or _joined(mine.get("tokenizer") for mine, _ in seen[:1]),
        sets,
    )


def _joined(parts: Iterator[Any]) -> str | None:
    return " ".join(str(part) for part in parts if part) or None


def _shards_dirs(config: Mapping[str, Any]) -> list[str]:
    prepare, mixture = section(config, "prepare"), config.get("mixture")
    entries = mixture if isinstance(mixture, list) else []
    found = [prepare.get("out")] if prepare else [entry.get("shards") for entry in entries if isinstance(entry, dict)]
    return [each for each in found if isinstance(each, str)]


def _json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
        return value if isinstance(value, dict) else None
    except (OSError, ValueError):
        return None


def _gaps(run: Run) -> Iterator[str]:
    """What the metrics lack."""
    steps = [step for step, _ in run.series.get("loss", [])]
    every = section(run.config, "train").get("log_every_steps")
    every = every if isinstance(every, int) else 1
    holes = [(a + 1, b - 1) for a, b in itertools.pairwise(steps) if b - a > every]
    if holes:
        told = ", ".join(f"{begin:,}–{end:,}" if begin < end else f"{begin:,}" for begin, end in holes[:5])
        more = f" and {len(holes) - 5:,} more stretches" if len(holes) > 5 else ""
        yield f"Steps that are not in metrics.jsonl: {told}{more}. Curves have a gap there where it is wide."
    if "validation_loss" not in run.series:
        yield "The run was never evaluated: there is no validation loss."
    if not run.lives:
        yield "There is no usage.jsonl: nothing is told of time and GPU-hours."
    elif all(life.phase_seconds is None for life in run.lives):
        yield "The run is of a version that did not record where its time went: there is no goodput."
    elif any(life.phase_seconds is None for life in run.lives):
        yield "Some lives are of a version that did not record where their time went: it counts as not recorded."


# Several runs beside each other


def read_runs(folders: Sequence[Path], running: Sequence[bool] = ()) -> list[Run]:
    """The runs of these folders under names that differ. Raises ConfigError as `read_run`, and for the same run twice."""
    resolved = [folder.resolve() for folder in folders]
    for number, folder in enumerate(resolved):
        if folder in resolved[:number]:
            raise ConfigError(f"{folders[number]}: is there twice; name each run once")
    if len(folders) > MOST_LINES:
        raise ConfigError(f"{len(folders)} runs: more than {MOST_LINES} cannot be told apart in a chart; name fewer")
    names = run_names(resolved)
    are_running = list(running) or [False] * len(folders)
    return [
        read_run(folder, name=name, is_running=is_running)
        for folder, name, is_running in zip(folders, names, are_running, strict=True)
    ]


def run_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as it takes to tell them apart.

    >>> run_names([Path("/x/a/run"), Path("/x/b/run"), Path("/x/c")])
    ['a/run', 'b/run', 'c']
    """
    depths = [1] * len(folders)
    for _ in range(max(len(folder.parts) for folder in folders)):
        names = ["/".join(folder.parts[-depth:]) for folder, depth in zip(folders, depths, strict=True)]
        depths = [depth + (names.count(name) > 1) for depth, name in zip(depths, names, strict=True)]
    return names
