"""What can be written in a run file, from its schema: for an editor, as a page, and at the terminal."""

from __future__ import annotations

import difflib
import functools
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from sft_dist.errors import ConfigError
from sft_dist.schema import RunConfig

# pydantic leaves its own names where a bound stands beside a validator
_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
_SIGNS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_TYPES = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "true or false",
    "object": "mapping",
}
_UNITS = {
    "seq_len": "tokens", "gpu_hours": "GPU-hours", "epochs": "epochs", "vocab_size": "pieces", "patience": "evaluations",
    "max_forgetting": "share", "spike_window": "steps", "roll_back_after": "steps", "rows_per_shard": "rows",
    "keep_last": "checkpoints", "keep_best": "checkpoints", "samples": "prompts", "cost": "money",
    "price_per_gpu_hour": "money", "count": "examples", "max_repetition": "share", "max_symbols": "share",
    "near_duplicates": "similarity", "near_validation": "similarity", "weight": "share, in any unit",
}  # fmt: skip
_SUFFIXES = {"ratio": "share", "fraction": "share"} | {
    name: name for name in ("tokens", "rows", "steps", "seconds", "samples", "characters", "words", "blocks")
}

ELSEWHERE = {
    "lr": "train.learning_rate", "batch_size": "train.global_batch_rows", "deepspeed": "zero", "report_to": "logging",
    "per_device_train_batch_size": "train.micro_batch_rows", "gradient_accumulation_steps": "train.global_batch_rows",
    "num_train_epochs": "train.epochs", "lr_scheduler_type": "train.schedule",
    "bf16": "train.precision", "fp16": "train.precision", "output_dir": "run_dir", "logging_steps": "train.log_every_steps",
    "max_length": "prepare.seq_len", "max_seq_length": "prepare.seq_len", "block_size": "prepare.seq_len",
    "eval_steps": "evaluate.every_steps", "save_steps": "checkpoint.every_steps", "save_total_limit": "checkpoint.keep_last",
}  # fmt: skip
"""What other trainers call a thing -> the key that it is here, or that decides it."""


def _given(name: str) -> dict[str, Any]:
    return {"required": [name], "properties": {name: {"not": {"enum": [None, []]}}}}


def _one_of(*names: str) -> dict[str, Any]:
    return {"oneOf": [_given(name) for name in names]}


# What holds between keys, as the validators of schema.py have it.
_BETWEEN: dict[str, list[dict[str, Any]]] = {
    "RunConfig": [_one_of("prepare", "mixture")],
    "ModelConfig": [
        _one_of("name_or_path", "config"),
        {
            "if": {"required": ["init"], "properties": {"init": {"const": "pretrained"}}},
            "then": _given("name_or_path"),
        },
    ],
    "TrainConfig": [
        _one_of("global_batch_rows", "global_batch_samples"),
        {"anyOf": [_given("epochs"), _given("max_steps")]},
    ],
    "EvaluateConfig": [{"if": _given("early_stopping"), "then": _given("every_steps")}],
    "BudgetConfig": [{"if": _given("cost"), "then": _given("price_per_gpu_hour")}],
}


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a run file (draft 2020-12), for editors and other programs.

    >>> json_schema()["$defs"]["TrainConfig"]["properties"]["epochs"]["anyOf"][0]
    {'exclusiveMinimum': 0, 'type': 'number'}
    """
    made = _plain(RunConfig.model_json_schema(by_alias=True))
    for name, rules in _BETWEEN.items():
        (made if name == "RunConfig" else made["$defs"][name])["allOf"] = rules
    shape = next(one for one in made["$defs"]["ModelConfig"]["properties"]["config"]["anyOf"] if "type" in one)
    shape["required"] = ["model_type"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A run file of sft-dist", **made}


def _plain(value: Any, is_names: bool = False) -> Any:
    """Without generated titles, without the defaults of whole sections, with the standard's names of bounds."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if not isinstance(value, dict):
        return value
    left = value if is_names else {key: one for key, one in value.items() if key != "title"}
    if "$ref" in left and not is_names:
        left.pop("default", None)
    return {
        key if is_names else _BOUNDS.get(key, key): one
        if key in ("examples", "default") and not is_names
        else _plain(one, key in ("properties", "$defs") and not is_names)
        for key, one in left.items()
    }


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a run file; `path` as in `prepare.sources[].path`, `section` the name of the schema's part it holds."""

    path: str
    type: str
    default: str
    unit: str
    meaning: str
    example: str
    section: str | None = None

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition(".")[2].removesuffix("[]")


@functools.cache
def keys() -> Mapping[str, Key]:
    """Every key by its path, in the order of the schema.

    >>> keys()["train.learning_rate"].example
    'learning_rate: 2.0e-05'
    """
    made = json_schema()
    return {key.path: key for key in _keys(made, made["$defs"], "")}


def _keys(of: Mapping[str, Any], parts: Mapping[str, Any], above: str) -> Iterator[Key]:
    for name, prop in of["properties"].items():
        reference = re.search(r"'\$ref': '#/\$defs/(\w+)'", str(prop))
        section = reference[1] if reference else None
        is_list = prop.get("type") == "array"
        path = f"{above}{name}{'[]' if section and is_list else ''}"
        values = [*prop.get("examples", []), *([prop["default"]] if prop.get("default") is not None else [])]
        example = f"{name}: {written(values[0])}" if values else ""
        default = (
            "needed" if name in of.get("required", ()) else "" if "default" not in prop else written(prop["default"])
        )
        meaning = " ".join((prop.get("description") or "").split())
        yield Key(path, _type(prop), default, _unit(name, prop), meaning, example, section)
        if section:
            yield from _keys(parts[section], parts, f"{path}.")


def written(value: Any) -> str:
    """A value as it stands in a run file, on one line.

    >>> written({"path": "a: b.csv", "text": 1})
    "{path: 'a: b.csv', text: 1}"
    """
    flow = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000, sort_keys=False)
    return flow.removesuffix("\n").removesuffix("\n...")


def _type(prop: Mapping[str, Any]) -> str:
    """In words, with what bounds it."""
    if "anyOf" in prop:
        return " or ".join(dict.fromkeys(_type(one) for one in prop["anyOf"]))
    if "$ref" in prop:
        return "section"
    if "enum" in prop or "const" in prop:
        values = prop.get("enum", [prop.get("const")])
        return ("one of " if len(values) > 1 else "") + ", ".join(f"`{written(value)}`" for value in values)
    if prop.get("type") == "array":
        return f"list of {_type(prop['items'])}s".replace("texts", "text")
    if prop.get("maxLength") == 1:
        return "one character"
    bounds = ", ".join(f"{sign} {prop[name]:g}" for name, sign in _SIGNS.items() if name in prop)
    return f"{_TYPES.get(prop['type'], prop['type'])} {bounds}".rstrip()


def _unit(name: str, prop: Mapping[str, Any]) -> str:
    is_number = "'number'" in str(prop) or "'integer'" in str(prop)
    unit = _UNITS.get(name) or _SUFFIXES.get(name.rpartition("_")[2], "")
    return unit if is_number or unit == "money" else ""


# ---- at the terminal ----


def explain(path: str | None = None) -> str:
    """All sections, one section's keys, or one key. Raises ConfigError for a key that there is not, naming the nearest."""
    if path is None:
        return _listed("", "A run file has these keys; those with … have keys of their own (`sft-dist keys train`).")
    found = _found(path)
    if found.section:
        where = found.path.removesuffix("[]") + (", each:" if found.path.endswith("[]") else ":")
        return _listed(f"{found.path}.", f"{where} {found.meaning}")
    lines = [found.path, f"  {found.meaning}", ""]
    lines += [
        f"  {name:8} {value}"
        for name, value in (("type", found.type.replace("`", "")), ("unit", found.unit), ("default", found.default))
        if value
    ]
    lines += [f"  {'example':8} {found.example}"] if found.example else []
    if "[]" not in found.path and found.example:
        value = found.example.partition(": ")[2]
        lines.append(f"  {'or':8} {shlex.quote(f'{found.path}={value}')}   (behind the run file's name)")
    return "\n".join(lines)


def _listed(above: str, title: str) -> str:
    inner = [key for key in keys().values() if key.path.startswith(above) and "." not in key.path[len(above) :]]
    width = max(len(key.name) for key in inner) + 2
    lines = [title, ""]
    for key in inner:
        default = {"needed": "needed", "": "…"}.get(key.default, key.default) if not key.section else "…"
        lines.append(f"  {key.name:{width}}{default:22} {_first(key.meaning)}")
    return "\n".join(lines)


def _first(meaning: str) -> str:
    """Its first sentence, or the first part of it."""
    return re.split(r"(?<=[^.][.;:])\s", meaning, maxsplit=1)[0].rstrip(".;:")


def _found(path: str) -> Key:
    """The key of a path as a person writes it: with or without `[]`, with numbers of list entries."""
    plain = {key.path.replace("[]", ""): key for key in keys().values()}
    asked = re.sub(r"\.\d+(?=\.|$)|\[\d*\]", "", path.partition("=")[0].strip("."))
    if asked in plain:
        return plain[asked]
    last = asked.rpartition(".")[2]
    same = [known for known in plain if known.rpartition(".")[2] == last]
    known_elsewhere = [ELSEWHERE[last]] if last in ELSEWHERE else []
    near = same or known_elsewhere or difflib.get_close_matches(asked, plain, n=3)
    if not near:
        names = difflib.get_close_matches(last, {known.rpartition(".")[2] for known in plain}, n=1)
        near = [known for known in plain if known.rpartition(".")[2] in names]
    hint = f"did you mean {' or '.join(near[:3])}?" if near else "all there are: sft-dist keys"
    raise ConfigError(f"{path}: no such key of a run file; {hint}")


# ---- as a page ----

_HEAD = """# Configuration reference

Every key of a run file. This page is written by the program from its schema; `sft-dist keys` tells the same at the terminal, and
`sft-dist schema` as a JSON Schema for editors ([configuration.md](../configuration.md)). *needed*: has no default. A share is a
number from 0 to 1. Any key can be changed behind the run file's name, as in `sft-dist train run.yaml train.learning_rate=1e-5`.
"""


def config_reference() -> str:
    """The page: a table for each section of a run file, generated from the schema."""
    made = json_schema()
    places: dict[str, list[str]] = {}
    for key in keys().values():
        if key.section:
            places.setdefault(key.section, []).append(key.path)
    lines = [_HEAD, "## The whole file", "", *_table("")]
    for section, paths in places.items():
        about = " ".join(made["$defs"][section]["description"].split())
        lines += ["", f"## `{paths[0]}`", "", about]
        if len(paths) > 1:
            lines += ["", f"The same keys in {', '.join(f'`{path}`' for path in paths[1:])}."]
        lines += ["", *_table(f"{paths[0]}.")]
    return "\n".join(lines) + "\n"


def _table(above: str) -> Iterator[str]:
    yield "| key | what it is | unit | default | meaning | example |"
    yield "|---|---|---|---|---|---|"
    for key in keys().values():
        if key.path.startswith(above) and "." not in key.path[len(above) :]:
            default = f"*{key.default}*" if key.default == "needed" else _code(key.default)
            type_ = re.sub("sections?", rf"[\g<0>](#{_anchor(key)})", key.type) if key.section else key.type
            cells = (_code(key.name), type_, key.unit, default, key.meaning, _code(key.example))
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _anchor(key: Key) -> str:
    """Of its section's heading, as forges and site generators make it."""
    first = next(one.path for one in keys().values() if one.section == key.section)
    return re.sub(r"[^\w-]", "", first.lower())
