"""Writes a run file: from the data it is shown, the task, and a preset of the model."""

from __future__ import annotations

import difflib
import json
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import jinja2
import yaml

from sft_dist.data.read import detect
from sft_dist.data.sources import HUB, files, first_rows
from sft_dist.errors import ConfigError, DataError
from sft_dist.files import publish_text
from sft_dist.reference import written
from sft_dist.schema import RunConfig, SourceConfig

SCHEMAS = {
    "classification": ("label",),
    "instructions": ("prompt_response", "alpaca", "self_instruct"),
    "chat": ("messages", "sharegpt"),
    "text": ("text", "tokens"),
}
"""Task -> the schemas of its records, the first one where columns are named by hand."""
_TEMPLATES = {"instructions": "alpaca", "chat": "chat", "text": "plain"}
_COLUMNS = {
    "classification": ("text", "label"),
    "instructions": ("prompt", "response"),
    "chat": ("messages",),
    "text": ("text",),
}
_LABEL_NAMES = ("label", "labels", "class", "category", "target", "sentiment", "intent")
_SAMPLE_ROWS = 200
_LABEL_ROWS = 20_000  # a file that is sorted by class shows the others late
_MOST_LABELS = 20  # that are spelled out in the prompt


# ---- presets ----


def _folders() -> list[Path]:
    root = Path(__file__).parent.parent
    return [root / "sft_dist" / "presets", root / "examples" / "presets"]


def presets() -> list[str]:
    """The models that there are run files for.

    >>> presets()[0]
    'tiny'
    """
    found = {path.stem: path for folder in _folders() for path in folder.glob("*.yaml")}
    return sorted(found, key=lambda name: (name != "tiny", name))


def preset(name: str) -> str:
    """The text of one. Raises ConfigError for one that there is not."""
    for folder in _folders():
        if (path := folder / f"{name}.yaml").is_file():
            return path.read_text()
    near = difflib.get_close_matches(name, presets(), n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(presets())}."
    raise ConfigError(
        f"--preset {name!r}: no such preset; {hint} For any other model say --model, with its hub id or folder"
    )


def tail(text: str) -> str:
    """What a preset says of the model and the training: from the line `model:` on."""
    return text[text.index("\nmodel:") + 1 :]


def with_model(text: str, model: str) -> str:
    """The same for another pre-trained model: its micro-batch is not known, so it is found where it runs."""
    lines = [line for line in tail(text).splitlines() if not line.startswith("#")]
    lines[0] = f"model: {written({'name_or_path': model})}"
    auto = "  micro_batch_rows: auto                # as many as divide the batch and fit the GPU"
    return "\n".join(auto if line.startswith("  micro_batch_rows:") else line for line in lines) + "\n"


def with_lora(text: str) -> str:
    """The same with adapters beside the model, which learn at a higher rate than all of it would.

    Raises ConfigError for a model from scratch.
    """
    model = yaml.safe_load(text)["model"]
    if "name_or_path" not in model:
        raise ConfigError(
            "--lora adapts a pre-trained model, and this one is from scratch; name one by --model or --preset"
        )
    made = f"model: {written(model | {'lora': {'rank': 16, 'alpha': 32}})}   # adapters; of all weights: leave lora out"
    lines = [made if line.startswith("model:") else line for line in text.splitlines()]
    return re.sub(r"(?m)^(  learning_rate:) *\S+", r"\1 2.0e-4", "\n".join(lines)) + "\n"


# ---- the data ----


@dataclass(frozen=True, slots=True)
class Look:
    """What is seen in a file of records: the task that it suits, its source in a run file, and a remark that says why.

    `names`: the columns there are; `labels`: of a classification, as far as the first records show them.
    """

    task: str
    source: dict[str, Any]
    said: str
    names: tuple[Any, ...] = ()
    labels: tuple[str, ...] = ()


def look(
    path: str, task: str | None = None, columns: Mapping[str, str] | None = None, format: str | None = None
) -> Look:
    """Look into the first records of a file, for a task or to see which one it suits; `columns` are those that are named.

    Raises DataError where nothing can be made of it, ConfigError where it is not for the task.
    """
    source = _source(path, format)
    rows = _rows(source)
    names = tuple(rows[0]) if rows else ()
    chosen: dict[str, Any] = dict(columns or {})
    is_headless = bool(names) and all(isinstance(name, int) for name in names)
    if is_headless:
        chosen = {role: int(name) if name.isdecimal() else name for role, name in chosen.items()}
    why = ""
    if not chosen and not is_headless:
        try:
            schema, said = detect(SourceConfig(**source))
        except DataError as error:
            why = str(error).removeprefix(f"{path}: ")
        else:
            suited = next(name for name, schemas in SCHEMAS.items() if schema in schemas)
            if task in (None, suited):
                found = Look(suited, source | {"schema": schema}, said.removeprefix(f"{path}: "), names)
                return _with_labels(found, rows) if suited == "classification" else found
            why = f"{said.removeprefix(f'{path}: ')}: that is {suited}"
    if not chosen and task == "text" and "text" in names:
        chosen = {"text": "text"}
    elif not chosen and task in (None, "classification"):
        chosen = _guessed(rows)
    return _named(path, source, rows, task, chosen, why)


def _named(
    path: str, source: dict[str, Any], rows: list[Any], task: str | None, chosen: dict[str, Any], why: str
) -> Look:
    """By columns that were named or guessed."""
    names = tuple(rows[0]) if rows else ()
    task = task or next((one for one, roles in _COLUMNS.items() if chosen and chosen.keys() <= set(roles)), None)
    if task is None or not chosen or not chosen.keys() <= set(_COLUMNS[task]):
        options = " and ".join(f"--{role}-column" for role in _COLUMNS[task or "classification"])
        raise ConfigError(
            f"{path}: {why or 'nothing tells its columns apart'}; for {task or 'classification'} name {options}"
        )
    if missing := [name for name in chosen.values() if name not in names]:
        near = difflib.get_close_matches(str(missing[0]), map(str, names), n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(map(str, names)) or 'none'}"
        raise ConfigError(f"{path}: no column {missing[0]!r}; {hint}")
    said = ", ".join(f"{role} is column {name!r}" for role, name in chosen.items())
    found = Look(task, source | {"schema": SCHEMAS[task][0]} | chosen, said, names)
    return _with_labels(found, rows) if task == "classification" else found


def _source(path: str, format: str | None) -> dict[str, Any]:
    """The source by itself; of a file whose suffix says nothing, its first line tells tabs and JSON. Raises DataError."""
    source: dict[str, Any] = {"path": path} | ({"format": format} if format else {})
    if path.startswith(HUB) or format:
        return source
    first = files(SourceConfig(**source))[0]
    if first.suffix in ("", ".data", ".dat", ".csv", ".txt"):
        with first.open(errors="replace") as file:
            line = file.readline(1 << 16)
        if first.suffix != ".txt" and line.count("\t") and (first.suffix != ".csv" or "," not in line):
            source["delimiter"] = "\t"
        elif first.suffix == ".csv" and line.count(";") > line.count(","):
            source["delimiter"] = ";"
        elif first.suffix in ("", ".data", ".dat") and line.startswith("{"):
            source["format"] = "jsonl"
    return source


def _rows(source: dict[str, Any], most: int = _SAMPLE_ROWS) -> list[dict[Any, Any]]:
    """The first records that have columns; of a table without a header the columns are numbers."""
    if source.get("format") in ("megatron", "nanogpt"):
        return []
    found = first_rows(SourceConfig(**source), most, is_headed=False)
    rows = [row for _, row in found if isinstance(row, dict)]
    if not rows or not all(isinstance(name, int) for name in rows[0]):
        return rows
    first, more = rows[0], rows[1:]
    if any(value in {row.get(name) for row in more} for name, value in first.items()):
        return rows  # a column's name does not come again below it
    return [{name: row.get(number, "") for number, name in first.items()} for row in more] or rows


def _guessed(rows: list[dict[Any, Any]]) -> dict[str, Any]:
    """{"text": column, "label": column} where one column has few values and another one long texts; else nothing."""
    texts = {name: [str(row.get(name, "")) for row in rows] for name in (rows[0] if rows else ())}
    kinds = {name: len(set(values)) for name, values in texts.items() if len(set(values)) <= max(2, len(values) // 4)}
    by_name = [name for name in texts if str(name).lower() in _LABEL_NAMES]
    label = next(iter(by_name), min(kinds, key=lambda name: kinds[name], default=None))
    long = {name: statistics.fmean(map(len, values)) for name, values in texts.items() if name != label}
    if label is None or not long:
        return {}
    return {"text": max(long, key=lambda name: long[name]), "label": label}


def _with_labels(found: Look, rows: list[dict[Any, Any]]) -> Look:
    column = found.source.get("label", "label")
    if not found.source["path"].startswith(HUB):
        rows = _rows(found.source, _LABEL_ROWS)
    seen = sorted({str(row[column]).strip() for row in rows if str(row.get(column, "")).strip()})
    return replace(found, labels=tuple(seen))


# ---- the run file ----


@dataclass(frozen=True, slots=True)
class Wish:
    """What the run file is to be of; `preset` and `model`: one of the shipped models, or any other."""

    found: Look
    preset: str
    run_dir: str
    model: str | None = None
    validation: str | None = None
    lora: bool = False


def run_file(wish: Wish) -> str:
    """The text of the run file: commented, and one that loads."""
    text = preset(wish.preset)
    values, found, folder = yaml.safe_load(text), wish.found, wish.run_dir.rstrip("/")
    prepare, about = values["prepare"], _about(text)
    seq_len, tokenizer = prepare["seq_len"], prepare.get("tokenizer")
    rest = tail(text)
    if wish.model is not None:
        rest, about, tokenizer = with_model(text, wish.model), "", None
        seq_len = min(seq_len, _context(wish.model) or seq_len)
    rest = with_lora(rest) if wish.lora else rest
    template = prepare["template"] if prepare["template"] != "plain" else _TEMPLATES.get(found.task, "plain")
    head = jinja2.Environment(keep_trailing_newline=True, undefined=jinja2.StrictUndefined).from_string(
        Path(__file__).with_name("run.yaml.jinja").read_text()
    )
    made = head.render(
        task=found.task,
        about=about,
        run_dir=written(folder),
        said=" ".join(found.said.split()),  # a key of somebody's records may hold a line end
        source=written(found.source),
        validation=None if wish.validation is None else written(found.source | {"path": wish.validation}),
        validation_fraction=prepare["validation_fraction"],
        template=_classify(found.labels) if found.task == "classification" else template,
        tokenizer=None if tokenizer is None else written(tokenizer),
        seq_len=seq_len,
        shards=written(f"{folder}/shards"),
    )
    text = made + rest
    RunConfig.model_validate(yaml.safe_load(text))
    return text


def _about(text: str) -> str:
    """The remarks above a preset, which say where it fits."""
    above = text[: text.index("run_dir:")].splitlines()
    return "".join(f"{line}\n" for line in above if "yaml-language-server" not in line)


def _classify(labels: tuple[str, ...]) -> str:
    """The prompt of a classification; the labels are spelled out where they are few."""
    which = f" Labels: {', '.join(labels)}." if 1 < len(labels) <= _MOST_LABELS else ""
    which = which.replace("{", "(").replace("}", ")")
    return json.dumps(f"Classify this text.{which}\n{{text}}\nLabel:", ensure_ascii=False)


def _context(model: str) -> int | None:
    """The tokens that a model in a folder can see."""
    try:
        about = json.loads((Path(model) / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return about.get("n_positions") or about.get("max_position_embeddings")


def where_from(model: str) -> str:
    """A remark on a model that is still to be downloaded; nothing of one that is here. Raises ConfigError where it can be neither."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    path = Path(model)
    if path.exists():
        if not (path / "config.json").is_file():
            raise ConfigError(
                f"--model {model!r}: there is no config.json in it; name the folder of a model, or a hub id"
            )
        return ""
    try:
        validate_repo_id(model)
    except HFValidationError:
        home = f": {path.expanduser()}" if model.startswith("~") else ""
        raise ConfigError(
            f"--model {model!r}: there is no such folder, and a hub id is NAME or ORG/NAME; name a folder that is there{home}"
        ) from None
    if isinstance(try_to_load_from_cache(model, "config.json"), str):
        return ""
    return (
        f"model {model}: no folder here, and not in this machine's cache: it will be downloaded from the Hugging Face hub, the "
        "tokenizer by `sft-dist prepare`, the weights by `sft-dist train`"
    )


# ---- asking ----


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says; `columns`: {"text": name, …}; what is None is asked for, or has a default."""

    data: str | None = None
    task: str | None = None
    preset: str | None = None
    model: str | None = None
    validation: str | None = None
    run_dir: str | None = None
    format: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    lora: bool = False


def wished(options: Options, *, asks: bool) -> Wish:
    """What the run file is to be of: from the options, and with `asks` from the person at the terminal.

    Raises ConfigError or DataError for what cannot be; where it `asks`, these are said and the question comes again.
    """
    if options.preset and options.model:
        raise ConfigError("--preset is a model, and --model another one; give one of them")
    if options.preset:
        preset(options.preset)
    if options.model:
        where_from(options.model)
    if options.data is None and not asks:
        raise ConfigError(
            "--data is missing: the file, glob, folder or hf:ID of your records (at a terminal init asks for it)"
        )
    found = _asked_data(options) if asks else look(options.data or "", options.task, options.columns, options.format)
    chosen, model, run_dir, validation = options.preset, options.model, options.run_dir, options.validation
    if asks and not (chosen or model):
        chosen, model = _asked_model()
    if asks and validation is None:
        validation = _asked_validation()
    elif validation is not None:
        files(SourceConfig(path=validation))
    if run_dir is None:
        run_dir = f"runs/{_stem(found.source['path'])}"
        run_dir = click.prompt("Folder of the run", default=run_dir) if asks else run_dir
    return Wish(found, chosen or ("gpt2" if model else _usual()), run_dir, model, validation, options.lora)


def _asked_data(options: Options) -> Look:
    """The data and what they are for, asked until they can be read."""
    data = options.data
    while True:
        data = data or click.prompt("Data: a file, glob or folder of records, or hf:ID")
        try:
            return _asked_task(data, options)
        except (ConfigError, DataError) as error:
            if options.data is not None:
                raise
            click.echo(str(error))
            data = None


def _asked_task(data: str, options: Options) -> Look:
    found = look(data, options.task, options.columns, options.format)
    click.echo(f"  found: {found.said}")
    task = options.task or click.prompt("Task", type=click.Choice(list(SCHEMAS)), default=found.task)
    if options.columns or (task == found.task and task != "classification"):
        return found
    if task != found.task and not found.names:
        return look(data, task, {}, options.format)  # which says why it cannot be
    known = {role: found.source.get(role, role) for role in _COLUMNS[task]}
    columns = {
        role: click.prompt(f"Column of the {role} ({', '.join(map(str, found.names))})", default=str(known[role]))
        for role in _COLUMNS[task]
    }
    return look(data, task, columns, options.format)


def _asked_model() -> tuple[str | None, str | None]:
    """(preset, None), or (None, any other model)."""
    while True:
        chosen = click.prompt(f"Model: {', '.join(presets())}, or a hub id or a folder", default=_usual())
        if chosen in presets():
            return chosen, None
        try:
            where_from(chosen)
        except ConfigError as error:
            click.echo(str(error))
        else:
            return None, chosen


def _asked_validation() -> str | None:
    while True:
        path = click.prompt("Validation file (empty: a share is held out)", default="", show_default=False)
        try:
            files(SourceConfig(path=path)) if path else None
        except DataError as error:
            click.echo(str(error))
            continue
        return path or None


def _usual() -> str:
    """The preset for this machine."""
    from launch.local import num_gpus

    return "gpt2" if num_gpus() else "tiny"


def _stem(path: str) -> str:
    """What a run on these data may be called.

    >>> _stem("data/chats.jsonl.gz"), _stem("hf:tatsu-lab/alpaca"), _stem("data/*.parquet")
    ('chats', 'alpaca', 'data')
    """
    parts = [part for part in re.split(r"[/:]", path) if part and not set(part) & set("*?[")]
    return re.sub(r"[^\w-]", "-", parts[-1].partition(".")[0]).strip("-").lower() or "run"


def write(out: Path, wish: Wish) -> str:
    """Write a new file, whole or not at all; returns what to do next. Raises ConfigError for one that is there."""
    text, remark = run_file(wish), where_from(wish.model) if wish.model else ""
    require_free(out)
    try:
        publish_text(out, text)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written ({error.strerror}); name another place") from None
    folder = yaml.safe_load(text)["run_dir"]
    return "\n".join([
        *([remark] if remark else []),
        f"{out}: written. Look it over, then:",
        f"  sft-dist prepare {out}",
        f"  sft-dist inspect {folder}/shards",
        f"  sft-dist train {out}",
    ])  # fmt: skip


def require_free(out: Path) -> None:
    """Raise ConfigError where a run file cannot be written."""
    if out.exists():
        raise ConfigError(
            f"{out}: is there already, and nothing is overwritten; name another file: sft-dist init OTHER.yaml"
        )
    if not out.parent.is_dir():
        raise ConfigError(f"{out}: there is no folder {out.parent}; make it, or name another place")
