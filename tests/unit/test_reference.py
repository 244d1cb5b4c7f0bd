"""The reference page, the JSON Schema and `sft-dist keys` say what the checks do."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from pydantic import ValidationError

from sft_dist import reference
from sft_dist.errors import ConfigError
from sft_dist.reference import config_reference, explain, json_schema, keys
from sft_dist.schema import RunConfig
from tests.unit.prepared_runs import sft_dist

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "docs" / "reference" / "run.schema.json"
VALIDATOR = jsonschema.Draft202012Validator(json_schema())
SHIPPED = sorted(ROOT.glob("examples/*/*.yaml"))
RUN = {
    "run_dir": "runs/x",
    "prepare": {"sources": [{"path": "a.jsonl"}], "out": "runs/x/shards"},
    "model": {"name_or_path": "gpt2"},
    "train": {"global_batch_rows": 8, "epochs": 1},
}
# What has to be there, or to go, so that a key can be: keys are not free of one another.
WITH = {
    "mixture": {"prepare": None}, "model.config": {"model.name_or_path": None},
    "train.global_batch_samples": {"train.global_batch_rows": None}, "train.max_steps": {"train.epochs": None},
    "reproduces": {f"reproduces.{key}": value for key, value in {
        "step": 1, "world_size": 1, "zero": {}, "identity": {}, "ledger": "", "weights": "",
    }.items()},
    "evaluate.early_stopping": {"evaluate.every_steps": 10}, "budget.cost": {"budget.price_per_gpu_hour": "2 EUR"},
}  # fmt: skip
INSIDE = {
    "prepare.sources[]": {"path": "a"}, "prepare.validation_sources[]": {"path": "a"}, "prepare.general[]": {"path": "a"},
    "prepare.curate.decontaminate[]": {"path": "a"}, "mixture[]": {"shards": "a", "weight": 1}, "prepare.curate.select": {"count": 1},
    "logging.wandb": {"project": "a"}, "logging.mlflow": {"experiment": "a"},
    "reproduces": {"step": 1, "world_size": 1, "zero": {}, "identity": {}, "ledger": "", "weights": ""},
}  # fmt: skip


def put(values, path, value):
    """Set the key of a path as `keys()` writes it; None takes nothing away but is the value null."""
    place, above = values, ""
    *parents, last = path.split(".")
    for parent in parents:
        above += parent
        name = parent.removesuffix("[]")
        if parent.endswith("[]"):
            place = place.setdefault(name, [dict(INSIDE[above])])[0]
        else:
            place = place.setdefault(name, dict(INSIDE.get(above, {})))
        above += "."
    place[last.removesuffix("[]")] = value


def run_with(path, value):
    values = copy.deepcopy(RUN)
    for known, more in WITH.items():
        if path == known or path.startswith((f"{known}.", f"{known}[]")):
            for other, it in more.items():
                put(values, other, it)
    put(values, path, value)
    return values


def is_accepted(values):
    try:
        RunConfig.model_validate(values)
    except ValidationError:
        return False
    return True


def test_the_page_is_what_the_schema_gives():
    again = "; write it anew: sft-dist keys --markdown > docs/reference/configuration.md"
    assert (ROOT / "docs" / "reference" / "configuration.md").read_text() == config_reference(), again
    again = "; write it anew: sft-dist schema > docs/reference/run.schema.json"
    assert json.loads(COMMITTED.read_text()) == json_schema(), again
    assert sft_dist("keys", "--markdown").stdout == config_reference()
    assert sft_dist("schema").stdout == COMMITTED.read_text()


def test_every_key_is_on_the_page_with_a_meaning_and_an_example():
    rows = re.findall(r"^\| `(\w+)` \|", config_reference(), flags=re.MULTILINE)
    assert len(rows) == sum(len(part["properties"]) for part in (json_schema(), *json_schema()["$defs"].values()))
    for key in keys().values():
        assert key.meaning, key.path
        assert key.type, key.path
        assert key.example or key.section, key.path
    anchors = {
        re.sub(r"[^\w-]", "", heading.lower())
        for heading in re.findall(r"^## (.*)$", config_reference(), flags=re.MULTILINE)
    }
    assert set(re.findall(r"\(#([\w-]+)\)", config_reference())) <= anchors


@pytest.mark.parametrize("path", [key.path for key in keys().values() if key.example])
def test_an_example_can_be_written(path):
    [value] = yaml.safe_load(keys()[path].example).values()
    values = run_with(path, value)
    RunConfig.model_validate(values)
    values = json.loads(json.dumps(values, default=str))  # an editor sees a moment as text
    assert VALIDATOR.is_valid(values), list(VALIDATOR.iter_errors(values))


def test_units_are_those_of_the_names():
    units = {key.path: key.unit for key in keys().values()}
    assert (units["train.warmup_ratio"], units["evaluate.max_new_tokens"], units["train.max_steps"]) == (
        "share",
        "tokens",
        "steps",
    )
    assert (units["train.hang_seconds"], units["budget.gpu_hours"], units["evaluate.prompts"]) == (
        "seconds",
        "GPU-hours",
        "",
    )


WRONG = (None, True, -1, 0, 1.5, "zzz", "", [], [1], {"zzz": 1})


@pytest.mark.parametrize("path", list(keys()))
def test_the_json_schema_refuses_what_the_program_refuses_and_nothing_else(path):
    for value in WRONG:
        values = run_with(path.removesuffix("[]"), value)
        assert VALIDATOR.is_valid(values) == is_accepted(values), (path, value)


@pytest.mark.parametrize(
    "change",
    [
        {"run_dri": "x"}, {"run_dir": None}, {"prepare": None}, {"mixture": [{"shards": "a", "weight": 1}]}, {"model": {}},
        {"model": {"name_or_path": "a", "config": {"model_type": "gpt2"}}}, {"model": {"config": {"n_layer": 2}}},
        {"model": {"config": {"model_type": "gpt2"}, "init": "pretrained"}}, {"train": {"epochs": 1}},
        {"train": {"global_batch_rows": 8}}, {"train": {"global_batch_rows": 8, "global_batch_samples": 8, "epochs": 1}},
        {"evaluate": {"early_stopping": {}}}, {"budget": {"cost": "2 EUR"}}, {"budget": {"deadline": "tomorrow"}},
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_by_both(change):
    values = {**copy.deepcopy(RUN), **change}
    assert (is_accepted(values), VALIDATOR.is_valid(values)) == (False, False)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_is_shipped_is_valid_and_leads_an_editor_to_the_schema(path):
    text = path.read_text()
    assert VALIDATOR.is_valid(yaml.safe_load(text)), list(VALIDATOR.iter_errors(yaml.safe_load(text)))
    [where] = re.findall(r"^# yaml-language-server: \$schema=(\S+)$", text.splitlines()[0])
    assert (path.parent / where).resolve() == COMMITTED


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(json_schema())
    assert not re.search(r"'(gt|ge|lt|le)':", str(json_schema())), "names that no editor knows"


# ---- at the terminal ----


def told(*arguments):
    result = sft_dist("keys", *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_keys_at_the_terminal():
    assert re.search(r"^  train +… +Batch, steps, learning rate, precision$", told(), flags=re.MULTILINE)
    assert re.search(
        r"^  learning_rate +2\.0e-05 +The highest one, after the warm-up$", told("train"), flags=re.MULTILINE
    )
    one = told("train.learning_rate")
    for line in (
        "  type     number > 0",
        "  default  2.0e-05",
        "  or       train.learning_rate=2.0e-05   (behind the run file's name)",
    ):
        assert line in one.splitlines()
    assert (
        told("prepare.sources.0.delimiter") == told("prepare.sources[].delimiter") == told("prepare.sources.delimiter")
    )
    assert told("train.learning_rate=1e-5") == one
    assert "'prepare.tokenizer=gpt2'" not in told("prepare.tokenizer")
    assert "'train.bad_steps.spike_z=" not in told("train.bad_steps.spike_z")
    assert "or       'evaluate.prompts=[Hello]'" in told("evaluate.prompts")


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("train.lerning_rate", "did you mean train.learning_rate"),
        ("learning_rate", "did you mean train.learning_rate?"),
        ("lerning_rate", "did you mean train.learning_rate"),
        ("trian.lr", "did you mean train.learning_rate?"),
        ("num_train_epochs", "did you mean train.epochs?"),
        ("qqqq", "all there are: sft-dist keys"),
    ],
)
def test_a_key_that_there_is_not_leads_to_the_nearest(path, hint):
    result = sft_dist("keys", path)
    assert result.exit_code == 2
    assert f"{path}: no such key of a run file; {hint}" in result.stderr
    with pytest.raises(ConfigError, match=re.escape(hint)):
        explain(path)


def test_names_of_other_trainers_lead_to_keys_and_are_none():
    names = {path.rpartition(".")[2] for path in keys()}
    assert set(reference.ELSEWHERE.values()) <= keys().keys()
    assert not names & reference.ELSEWHERE.keys()


def test_the_page_is_all_keys():
    assert "leave KEY out" in sft_dist("keys", "train", "--markdown").stderr


def test_a_key_without_a_meaning_would_be_seen(monkeypatch):
    """The check of the page can fail."""
    made = json_schema()
    made["$defs"]["TrainConfig"]["properties"]["seed"].pop("description")
    monkeypatch.setattr(reference, "json_schema", lambda: made)
    keys.cache_clear()
    try:
        assert config_reference() != (ROOT / "docs" / "reference" / "configuration.md").read_text()
        assert not keys()["train.seed"].meaning
    finally:
        keys.cache_clear()


def test_help_leads_to_it():
    assert "sft-dist keys train" in sft_dist("train", "--help").output
