"""One YAML file describes a run: it is read, checked and explained here.

Everything is checked before any process starts. An error names the file, the key, the value, the rule and the remedy.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ValidationError

from sft_dist.errors import ConfigError
from sft_dist.reference import ELSEWHERE
from sft_dist.schema import LoraConfig, RunConfig
from sft_dist.zero import zero_config, zero_stage


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and check a run file with dotted overrides (`train.learning_rate=1e-5`), and the DeepSpeed file that it names.

    Raises ConfigError with one line a mistake: file, key, value, rule and remedy.
    """
    config = read(path, overrides)
    if zero_stage(zero_config(config.zero)) == 0 and config.train.precision != "fp32":
        raise ConfigError(
            f"{path}: train.precision: {config.train.precision!r} is not allowed at ZeRO stage 0 ({config.zero}): DeepSpeed's optimizer takes a "
            "wrong first step there. Use ds_configs/zero1.json, or train.precision=fp32"
        )
    if config.model.lora is not None:
        _check_lora(path, config, config.model.lora)
    if config.train.fp8:
        _check_fp8(path, config)
    _check_logging(path, config)
    return config


def _check_lora(path: str | Path, config: RunConfig, lora: LoraConfig) -> None:
    """Its packages are there, and at ZeRO 3 what is kept in 4 bits is let go again."""
    for package, extra, is_needed in (("peft", "lora", True), ("bitsandbytes", "qlora", lora.quantize is not None)):
        if is_needed and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"{path}: model.lora: needs the package {package}, which is not installed; pip install 'sft-dist[{extra}]'"
            )
    if lora.quantize is not None:
        _check_recomputed(path, config, "model.lora.quantize", "bitsandbytes'")


def _check_fp8(path: str | Path, config: RunConfig) -> None:
    """Its package is there, and nothing that it was not made for is wanted beside it."""
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(
            f"{path}: train.fp8: needs the package torchao, which is not installed; pip install 'sft-dist[fp8]'"
        )
    if config.model.lora is not None:
        raise ConfigError(
            f"{path}: train.fp8: adapters are trained beside layers of 16 bits or nf4; leave fp8 or model.lora out"
        )
    _check_recomputed(path, config, "train.fp8", "torchao's")


def _check_recomputed(path: str | Path, config: RunConfig, key: str, whose: str) -> None:
    if zero_stage(zero_config(config.zero)) == 3 and config.train.gradient_checkpointing is not True:
        raise ConfigError(
            f"{path}: {key}: at ZeRO stage 3 ({config.zero}) {whose} products keep the gathered weights of all layers for the backward "
            "pass, unless layers are computed again there; set train.gradient_checkpointing: true, or use ds_configs/zero2.json"
        )


def _check_logging(path: str | Path, config: RunConfig) -> None:
    """The packages of the services are there, and no password is where it would be written down."""
    for service in ("wandb", "mlflow"):
        if getattr(config.logging, service) is not None and importlib.util.find_spec(service) is None:
            raise ConfigError(
                f"{path}: logging.{service}: needs the package {service}, which is not installed; pip install 'sft-dist[{service}]', "
                "or leave the section out"
            )
    uri = config.logging.mlflow and config.logging.mlflow.tracking_uri
    if uri and urlsplit(uri).password:
        raise ConfigError(
            f"{path}: logging.mlflow.tracking_uri: holds a password, which the run would write down; leave the key out and set "
            "MLFLOW_TRACKING_URI, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )


def read(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and check a run file alone: all that is needed once a run has been trained. Raises as `load` does."""
    path = Path(path)
    try:
        values = yaml.load(path.read_text(), _Loader)
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such run file; name an existing one, such as {_EXAMPLE}, or write one: sft-dist init"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); name a YAML run file such as {_EXAMPLE}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: 2026-02-30
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}. Mend that line") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a run file is a mapping of keys, this is {type(values).__name__}; see {_EXAMPLE}")
    for override in overrides:
        _apply(values, override)
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        lines = [f"{path}: {_explain(problem)}" for problem in _told_once(error.errors())]
        raise ConfigError("\n".join(lines)) from None
    return config


class _Loader(yaml.SafeLoader):
    """YAML as its standard has it: PyYAML takes a key that stands twice, and loses the first one in silence."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Raises ComposerError, a YAMLError, for such a key."""
        node = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], yaml.ScalarNode] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            before = first.setdefault((key.tag, key.value), key)
            if before is not key:
                what = f"the key {key.value!r} is there twice, first in line {before.start_mark.line + 1}, and again"
                raise yaml.composer.ComposerError(None, None, what, key.start_mark)
        return node


_EXAMPLE = "examples/sms-spam/run.yaml"


def _apply(values: dict[str, Any], override: str) -> None:
    """Set one dotted key in place; the value is read as YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: not of the form key=value; write for example train.epochs=3")
    *parents, last = key.split(".")
    place: Any = values
    for parent in parents:
        place = place.setdefault(parent, {}) if isinstance(place, dict) else place
        if not isinstance(place, dict):
            raise ConfigError(f"override {override!r}: {parent} is not a section with keys; check the dots")
    try:
        place[last] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # ValueError: 2026-02-30
        raise ConfigError(f"override {override!r}: the value is not YAML; quote it, as in '{key}=\"…\"'") from None


def _explain(problem: Any) -> str:
    """One pydantic problem as key, value, rule and remedy."""
    where = [str(part) for part in _written(problem)]
    key, kind, value = ".".join(where) or "run file", problem["type"], problem["input"]
    known = _keys_at(RunConfig, problem["loc"][:-1])
    if kind == "extra_forbidden":
        close = difflib.get_close_matches(where[-1], known, n=1)
        meant = ELSEWHERE.get(where[-1]) or ".".join([*where[:-1], *close]) * bool(close)
        remedy = f"did you mean {meant}?" if meant else f"keys here: {', '.join(known)}"
        return f"{key}: unknown key (value {value!r}); {remedy}"
    if kind == "model_type":
        return (
            f"{key}: {value!r} is not allowed: it is a section with keys of its own; `sft-dist keys {key}` tells them"
        )
    if kind == "missing":
        return f"{key}: missing, and it has no default; add it"
    rule = problem["msg"].removeprefix("Value error, ")
    rule = (rule[:1].lower() + rule[1:]).replace("False, True,", "false, true,")  # as YAML spells them
    if kind == "value_error":
        return f"{key}: {rule}"
    if kind == "literal_error":
        close = difflib.get_close_matches(str(value), re.findall(r"'([^']+)'", rule), n=1)
        return f"{key}: {value!r} is not allowed: {rule}" + (
            f"; did you mean {close[0]}?" if close else "; use one of these"
        )
    return f"{key}: {value!r} is not allowed: {rule}; correct the value"


def _told_once(problems: Sequence[Any]) -> list[Any]:
    """Of a union that fails, only the branch that came furthest: the one the person meant."""
    furthest: dict[tuple, Any] = {}
    for problem in problems:
        last = len(problem["loc"]) - (problem["type"] == "extra_forbidden")
        branches = [place for place, part in enumerate(problem["loc"][:last]) if _is_branch(part)]
        key = problem["loc"][: branches[0]] if branches else problem["loc"]
        if key not in furthest or _told(problem) > _told(furthest[key]):
            furthest[key] = problem
    return list(furthest.values())


def _told(problem: Any) -> tuple[int, bool, bool]:
    """How much a problem says: what came further; of a misspelt key and the missing one the former; of a word which ones there are."""
    is_word = problem["type"] == "literal_error" and isinstance(problem["input"], str)
    return len(problem["loc"]), problem["type"] == "extra_forbidden", is_word


def _written(problem: Any) -> list[Any]:
    """The location without the branches of unions; an unknown key is a person's word even where it is called like one."""
    if not problem["loc"]:  # a rule of the whole file
        return []
    *parents, last = problem["loc"]
    is_own = problem["type"] == "extra_forbidden" or not _is_branch(last)
    return [part for part in parents if not _is_branch(part)] + [last] * is_own


def _is_branch(part: Any) -> bool:
    """Pydantic names the branch of a union in the location; a person never wrote it."""
    names = ("str", "TrainedTokenizer", "int", "constrained-int", "BlockOrder")
    return part in names or (isinstance(part, str) and part.startswith(("function-", "literal[", "list[")))


def _keys_at(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """The keys a section of the run file may have."""
    for part in location:
        field = model.model_fields.get(part) if isinstance(part, str) else None
        if field is not None:
            model = next((m for m in _sections(field.annotation)), model)
    return sorted(field.alias or name for name, field in model.model_fields.items())


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections(argument)
