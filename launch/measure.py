"""Held-out numbers and public benchmarks of finished models."""

from __future__ import annotations

import difflib
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from launch.models import device, is_run, opened
from sft_dist import evaluate as measure
from sft_dist.console import confusion_table
from sft_dist.data.loader import Loader
from sft_dist.data.mixture import Joined
from sft_dist.data.tokenise import Tokenizer
from sft_dist.errors import ConfigError, DataError
from sft_dist.export import export
from sft_dist.labels import LabelTask
from sft_dist.topology import Topology


def evaluate_models(models: tuple[str, ...], shards: str | None, *, micro_batch_rows: int, as_json: bool) -> None:
    """Print the held-out numbers of each model."""
    for model in models:
        measured = measure_model(model, shards, micro_batch_rows=micro_batch_rows)
        matrix = {} if measured.confusion is None else {"confusion": measured.confusion}
        if as_json:
            print(json.dumps({"model": model, **measured.values, **matrix}))
            continue
        shown = "  ".join(f"{name.removeprefix('validation_')} {value:.4f}" for name, value in measured.values.items())
        print("\n".join([f"{model}: {shown}", *map(confusion_table, matrix.values())]))


def measure_model(model: str, shards: str | None, *, micro_batch_rows: int) -> measure.Measured:
    """The held-out numbers of a run, an export or a hub model, on its own shards or named ones."""
    loaded, tokenizer, own_sets = opened(model)
    folders = {"": shards} if shards else own_sets
    if not folders:
        raise ConfigError(f"{model}: no shards are known for it; name prepared ones with --shards FOLDER")
    return _measure(
        loaded, tokenizer, {name: Path(folder) for name, folder in folders.items()}, model, micro_batch_rows
    )


def _measure(
    model: Any, tokenizer: str, folders: dict[str, Path], name: str, micro_batch_rows: int
) -> measure.Measured:
    for folder in (folder for folder in folders.values() if not folder.is_dir()):
        raise ConfigError(
            f"{name}: its shards are not in {folder.absolute()}; start from the folder that the run was started from, or "
            "name them with --shards FOLDER"
        )
    names, places = list(folders), list(folders.values())
    validation, general = (measure.held_out(names, places, split) for split in ("validation", "general"))
    if not validation:
        where = ", ".join(map(str, places))
        raise ConfigError(f"{where}: has no validation split; set prepare.validation_fraction and prepare again")
    loaders = {}
    for split, sets in (("validation", validation), ("general", general)):
        if sets:
            joined = Joined(list(sets.values()))
            measure.same_tokenizer(joined, Tokenizer.load(tokenizer).fingerprint, name)
            loaders[split] = Loader(joined, Topology(), micro_batch_rows=micro_batch_rows, shuffle=False)
    forward, comms = measure.alone(model, device())
    evaluator = measure.Evaluator(
        comms,
        loaders["validation"],
        LabelTask.open(places[0] / "labels") if len(places) == 1 else None,
        general=loaders.get("general"),
        sources=measure.Sources.of(list(validation.values()), list(validation)),
    )
    try:
        measured = evaluator.metrics(forward)
        return replace(measured, values=measured.values | evaluator.general_loss(forward))
    finally:
        comms.close()


def run_tasks(models: tuple[str, ...], tasks: list[str], *, micro_batch_rows: int, as_json: bool) -> None:
    """Print what lm-eval measures of each model: public benchmarks by name, or tasks of one's own by their YAML file."""
    for model in models:
        results = measure_tasks(model, tasks, micro_batch_rows=micro_batch_rows)
        print(json.dumps({"model": model, "tasks": results}) if as_json else f"{model}:\n{_table(results)}")


def measure_tasks(model: str, tasks: list[str], *, micro_batch_rows: int) -> dict[str, dict[str, float]]:
    """By task and metric what lm-eval measures of a run (as it would be exported), an export or a hub model.

    Raises ConfigError where lm-eval is missing or does not know a task, DataError where the data of one is out of reach.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--tasks: needs {error.name}, which is not installed; pip install 'sft-dist[lm-eval]'"
        ) from None
    manager = TaskManager()
    for task in tasks:
        if task not in manager.all_tasks and not Path(task).is_file():
            close = difflib.get_close_matches(task, manager.all_tasks, n=1)
            remedy = f"did you mean {close[0]}?" if close else "`lm-eval ls tasks` lists them"
            raise ConfigError(f"--tasks: {task!r} is neither a task that lm-eval knows nor a YAML file; {remedy}")
    with tempfile.TemporaryDirectory() as folder:
        if is_run(model):
            export(Path(model), Path(folder) / "export")
            model = str(Path(folder) / "export")
        loaded, tokenizer, _ = opened(model)
        made = HFLM(
            pretrained=loaded.to(device()),
            tokenizer=AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False),
            batch_size=micro_batch_rows,
        )
        try:
            found = lm_eval.simple_evaluate(model=made, tasks=tasks, task_manager=manager, log_samples=False)
        except OSError as error:
            raise DataError(
                f"--tasks: {str(error).splitlines()[0]}; most tasks read their data from the Hugging Face hub: make it reachable, or "
                "name a task of files that are here"
            ) from None
    return {task: _numbers(values) for task, values in found["results"].items()}


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """What lm-eval says of a task, without what is no number.

    >>> _numbers({"alias": "x", "acc,none": 0.5, "acc_stderr,none": 0.1, "exact_match,strict": 0.25, "f1_stderr,none": "N/A"})
    {'acc': 0.5, 'acc_stderr': 0.1, 'exact_match,strict': 0.25}
    """
    numbers = {name: value for name, value in values.items() if "," in name and isinstance(value, int | float)}
    return {name.removesuffix(",none"): float(value) for name, value in numbers.items()}


def _table(results: dict[str, dict[str, float]]) -> str:
    """A line for each metric of each task.

    >>> print(_table({"arc": {"acc": 0.5, "acc_stderr": 0.125}, "squad": {"f1,strict": 0.25}}))
      arc    acc        0.5000 ± 0.1250
      squad  f1,strict  0.2500
    """
    rows = []
    for task, numbers in results.items():
        for name, value in numbers.items():
            kind, comma, variant = name.partition(",")
            if kind.endswith("_stderr"):
                continue
            error = numbers.get(f"{kind}_stderr{comma}{variant}")
            rows.append((task, name, f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")))
    widths = [max((len(row[place]) for row in rows), default=0) for place in (0, 1)]
    return "\n".join(f"  {task:{widths[0]}}  {name:{widths[1]}}  {value}" for task, name, value in rows)
