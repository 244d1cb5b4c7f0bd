import copy
import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sft_dist.batch import Batch, derive_batch, num_steps, total_rows
from sft_dist.config import load, read
from sft_dist.errors import ConfigError
from sft_dist.schema import ModelConfig, RunConfig, TrainConfig
from sft_dist.zero import zero_config, zero_stage

ROOT = Path(__file__).parents[2]
RUN = {
    "run_dir": "runs/x",
    "prepare": {"sources": [{"path": "a.jsonl", "schema": "messages"}], "out": "runs/x/shards"},
    "model": {"name_or_path": "gpt2"},
    "train": {"global_batch_rows": 8, "epochs": 1},
}


def written(tmp_path, **more):
    """RUN with dotted keys changed, as a file."""
    values = copy.deepcopy(RUN)
    for key, value in more.items():
        *parents, last = key.split("__")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def refusal(path, *overrides):
    """The text of the ConfigError."""
    with pytest.raises(ConfigError) as raised:
        load(path, overrides)
    assert raised.value.exit_code == 2
    return str(raised.value)


def test_a_minimal_run_file_has_sensible_defaults(tmp_path):
    config = load(written(tmp_path))
    assert (config.train.learning_rate, config.train.precision, config.zero) == (2e-5, "bf16", "ds_configs/zero2.json")
    assert (config.prepare.seq_len, config.prepare.curate.duplicates, config.prepare.template) == (1024, True, "plain")
    assert (config.evaluate.every_steps, config.checkpoint.keep_last) == (None, 2)
    assert not config.model.is_scratch
    with pytest.raises(ValidationError, match="frozen"):
        config.train.epochs = 2


def test_what_is_written_is_read_back(tmp_path):
    config = load(written(tmp_path, prepare__tokenizer={"sentencepiece": {"vocab_size": 300}}, evaluate={"samples": 0}))
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(config.model_dump(by_alias=True), sort_keys=False))
    assert load(again) == config


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*/run.yaml")), ids=lambda path: path.parent.name)
def test_every_shipped_example_is_a_run_file(path):
    assert load(path).run_dir


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("1.0e-5", 1e-5), ("5E-4", 5e-4), ("1e+0", 1.0), ("0.001", 1e-3), ("1", 1.0), ("'2e-5'", 2e-5)],
)
def test_a_number_may_be_spelled_as_people_do(tmp_path, text, value):
    path = written(tmp_path)
    path.write_text(path.read_text().replace("epochs: 1", f"epochs: 1\n  learning_rate: {text}"))
    assert load(path).train.learning_rate == value
    assert load(written(tmp_path), [f"train.learning_rate={text}"]).train.learning_rate == value


def test_overrides_reach_every_depth_and_later_ones_win(tmp_path):
    overrides = [
        "run_dir=elsewhere",
        "train.epochs=2.5",
        "train.epochs=3.5",
        "checkpoint.every_steps=10",  # a section that the file does not have
        "prepare.tokenizer.sentencepiece.vocab_size=300",
        'prepare.template="Q: {text}\\nA:"',
        "model={config: {model_type: gpt2}}",
        "train.max_grad_norm=null",
        "prepare.sources=[{path: b=c.csv, schema: alpaca}]",  # only the first = parts key and value
    ]
    config = load(written(tmp_path), overrides)
    assert (config.run_dir, config.train.epochs, config.checkpoint.every_steps) == ("elsewhere", 3.5, 10)
    assert config.prepare.tokenizer.sentencepiece.vocab_size == 300
    assert config.prepare.template == "Q: {text}\nA:"
    assert config.model.is_scratch
    assert config.train.max_grad_norm is None
    assert config.prepare.sources[0].path == "b=c.csv"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs", "override 'train.epochs': not of the form key=value; write for example train.epochs=3"),
        ("=3", "override '=3': not of the form key=value; write for example train.epochs=3"),
        ("run_dir.x=3", "override 'run_dir.x=3': run_dir is not a section with keys; check the dots"),
        ("train.epochs.x.y=3", "override 'train.epochs.x.y=3': epochs is not a section with keys; check the dots"),
        ("run_dir=[1", "override 'run_dir=[1': the value is not YAML; quote it, as in 'run_dir=\"…\"'"),
    ],
)
def test_a_malformed_override_is_quoted_with_a_remedy(tmp_path, override, message):
    assert refusal(written(tmp_path), override) == message


UNKNOWN = [
    ("train__lerning_rate", 1e-5, "train.lerning_rate: unknown key (value 1e-05); did you mean train.learning_rate?"),
    ("train__lr", 1e-5, "train.lr: unknown key (value 1e-05); did you mean train.learning_rate?"),
    ("run_dri", "x", "run_dri: unknown key (value 'x'); did you mean run_dir?"),
    ("checkpoint__keep_lats", 1, "checkpoint.keep_lats: unknown key (value 1); did you mean checkpoint.keep_last?"),
    (
        "evaluate__zzz",
        1,
        "evaluate.zzz: unknown key (value 1); keys here: early_stopping, every_steps, max_forgetting, "
        "max_new_tokens, prompts, samples, samples_every_steps",
    ),
    (
        "prepare__tokenizer",
        {"sentencepiece": {"vocab_sise": 400}},
        "prepare.tokenizer.sentencepiece.vocab_sise: unknown key (value 400); "
        "did you mean prepare.tokenizer.sentencepiece.vocab_size?",
    ),
    (
        "prepare__sources",
        [{"path": "a", "schema": "text", "delimeter": ","}],
        "prepare.sources.0.delimeter: unknown key (value ','); did you mean prepare.sources.0.delimiter?",
    ),
    (
        "prepare__sources",
        [{"path": "a", "schema": "text", "schema_": "text"}],
        "prepare.sources.0.schema_: unknown key (value 'text'); did you mean prepare.sources.0.schema?",
    ),
]


@pytest.mark.parametrize(("key", "value", "message"), UNKNOWN)
def test_an_unknown_key_gets_the_nearest_one(tmp_path, key, value, message):
    path = written(tmp_path, **{key: value})
    assert refusal(path) == f"{path}: {message}"


@pytest.mark.parametrize("key", ["int", "str", "train.int", "function-x"])  # what pydantic calls branches of a union
def test_no_key_is_too_odd_to_be_named(tmp_path, key):
    path = written(tmp_path)
    assert refusal(path, f"{key}=3").startswith(f"{path}: {key}: unknown key (value 3); ")


@pytest.mark.parametrize("override", ["train..epochs=3", ".x=3", "train.=3"])
def test_empty_parts_of_a_key_are_unknown_keys(tmp_path, override):
    assert "unknown key" in refusal(written(tmp_path), override)


@pytest.mark.parametrize("text", ["1: x", "true: x", "~: x", "[1, 2]: x", "train: {1: x}"])
def test_a_key_that_is_no_word_is_told(tmp_path, text):
    path = written(tmp_path)
    path.write_text(path.read_text() + text + "\n")
    assert refusal(path).startswith(f"{path}: ")


def test_a_day_that_does_not_exist_is_told_like_any_bad_yaml(tmp_path):
    assert "run_dir" in refusal(written(tmp_path), "run_dir=2026-02-30")
    path = written(tmp_path)
    path.write_text(path.read_text().replace("run_dir: runs/x\n", "run_dir: 2026-02-30\n"))
    assert refusal(path).startswith(f"{path}: ")


def test_every_mistake_is_told_on_its_own_line(tmp_path):
    path = written(tmp_path, train__epocs=1, checkpoint__keep_last=0)
    lines = refusal(path).splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"{path}: ") for line in lines)


WRONG = [
    ("train__epochs", "three", "train.epochs: 'three' is not allowed: ", "valid number; correct the value"),
    ("train__epochs", True, "train.epochs: True is not allowed: ", "valid number; correct the value"),
    ("train__global_batch_rows", 2.5, "train.global_batch_rows: 2.5 is not allowed: ", "valid integer; correct the value"),
    ("train__global_batch_rows", "8", "train.global_batch_rows: '8' is not allowed: ", "valid integer; correct the value"),
    ("train__micro_batch_rows", 0, "train.micro_batch_rows: 0 is not allowed: ", "greater than or equal to 1; correct the value"),
    ("train__micro_batch_rows", "atuo", "train.micro_batch_rows: 'atuo' is not allowed: ", "did you mean auto?"),
    ("train__learning_rate", -1e-5, "train.learning_rate: -1e-05 is not allowed: ", "greater than 0; correct the value"),
    ("train__warmup_ratio", 1, "train.warmup_ratio: 1 is not allowed: ", "less than 1; correct the value"),
    ("train__gradient_checkpointing", "yes please", "train.gradient_checkpointing: 'yes please' is not allowed: ", "false, true, 'selective' or 'offload'; use one of these"),
    ("train__gradient_checkpointing", "selectiv", "train.gradient_checkpointing: 'selectiv' is not allowed: ", "did you mean selective?"),
    ("prepare__seq_len", 4, "prepare.seq_len: 4 is not allowed: ", "greater than or equal to 16; correct the value"),
    ("prepare__sources", [], "prepare.sources: [] is not allowed: ", "correct the value"),
    ("prepare__tokenizer", {"sentencepiece": {"vocab_size": 100}}, "prepare.tokenizer.sentencepiece.vocab_size: 100 is not allowed: ", "greater than or equal to 300; correct the value"),
    ("train", "fast", "train: 'fast' is not allowed: ", "a section with keys of its own; `sft-dist keys train` tells them"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "begin", "end"), WRONG, ids=[f"{key}={value}" for key, value, *_ in WRONG])
def test_a_value_of_the_wrong_kind_is_told_with_its_rule(tmp_path, key, value, begin, end):
    path = written(tmp_path, **{key: value})
    message = refusal(path)
    assert message.startswith(f"{path}: {begin}")
    assert message.endswith(end)
    assert "\n" not in message


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("key", ["train.learning_rate", "train.epochs"])
def test_what_is_no_finite_number_is_refused(tmp_path, key, value):
    assert key in refusal(written(tmp_path), f"{key}={value}")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train__schedule", "cosin", "train.schedule: 'cosin' is not allowed: input should be 'linear', 'cosine' or 'constant'; did you mean cosine?"),
        ("train__schedule", "zzz", "train.schedule: 'zzz' is not allowed: input should be 'linear', 'cosine' or 'constant'; use one of these"),
        ("train__precision", 16, "train.precision: 16 is not allowed: input should be 'fp32', 'bf16' or 'fp16'; did you mean fp16?"),
    ],
)  # fmt: skip
def test_a_word_that_is_not_on_the_list_gets_the_list(tmp_path, key, value, message):
    path = written(tmp_path, **{key: value})
    assert refusal(path) == f"{path}: {message}"


def test_another_word_gets_the_nearest_on_the_list(tmp_path):
    assert "; did you mean bf16?" in refusal(written(tmp_path), "train.precision=bfloat16")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bits_are_refused_at_stage_0(tmp_path, precision):
    message = f"train.precision: '{precision}' is not allowed at ZeRO stage 0 (ds_configs/zero0.json)"
    assert message in refusal(written(tmp_path), f"train.precision={precision}", "zero=ds_configs/zero0.json")


@pytest.mark.parametrize("key", ["run_dir", "prepare.out", "model", "prepare.sources.0.path"])
def test_a_key_without_a_default_must_be_there(tmp_path, key):
    path = written(tmp_path)
    values = yaml.safe_load(path.read_text())
    *parents, last = key.split(".")
    place = values
    for parent in parents:
        place = place[int(parent)] if parent.isdigit() else place[parent]
    del place[last]
    path.write_text(yaml.safe_dump(values))
    assert refusal(path) == f"{path}: {key}: missing, and it has no default; add it"


@pytest.mark.parametrize(
    ("key", "value"),
    [("prepare__tokenizer", 7), ("prepare__tokenizer", {}), ("prepare__tokenizer", {"sentencepiece": {"vocab_size": "big"}}),
     ("prepare__tokenizer", {"sentencepeice": {}}), ("prepare__sources", [{"path": "a", "schema": "text", "text": 1.5}])],
)  # fmt: skip
def test_a_union_is_told_once_without_the_names_of_its_branches(tmp_path, key, value):
    message = refusal(written(tmp_path, **{key: value}))
    assert "\n" not in message
    assert key.replace("__", ".") in message
    for name in ("TrainedTokenizer", ".str", ".int", "function-"):
        assert name not in message.replace("valid string", "").replace("valid integer", "")


def test_a_misspelt_branch_of_a_union_gets_the_nearest_key(tmp_path):
    message = refusal(written(tmp_path, prepare__tokenizer={"sentencepeice": {"vocab_size": 300}}))
    assert "did you mean prepare.tokenizer.sentencepiece?" in message


def test_a_missing_file_is_named_with_an_example(tmp_path):
    path = tmp_path / "nowhere.yaml"
    assert (
        refusal(path)
        == f"{path}: no such run file; name an existing one, such as examples/sms-spam/run.yaml, or write one: sft-dist init"
    )
    assert (ROOT / "examples/sms-spam/run.yaml").is_file()


def test_what_cannot_be_read_is_refused(tmp_path):
    assert refusal(tmp_path).startswith(f"{tmp_path}: cannot be read (")
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"run_dir: caf\xe9\n")
    message = refusal(path)
    assert message.startswith(f"{path}: cannot be read (")
    assert message.endswith("; name a YAML run file such as examples/sms-spam/run.yaml")


@pytest.mark.parametrize(("text", "line"), [("run_dir: [1, 2\n", 2), ("run_dir: x\n\tprepare: y\n", 2)])
def test_bad_yaml_is_told_with_its_line_on_one_line(tmp_path, text, line):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    message = refusal(path)
    assert message.startswith(f"{path}: not YAML: ")
    assert f"line {line}" in message
    assert message.endswith(". Mend that line")
    assert "\n" not in message


def test_a_key_that_stands_twice_is_told_and_not_lost(tmp_path):
    path = written(tmp_path)
    path.write_text(path.read_text() + "train:\n  epochs: 2\n")
    message = refusal(path)
    first = 1 + path.read_text().splitlines().index("train:")
    assert f"not YAML: the key 'train' is there twice, first in line {first}, and again in " in message
    path.write_text("train: {epochs: 1, epochs: 2}\n")
    assert "the key 'epochs' is there twice, first in line 1, and again" in refusal(path)
    path.write_text("a: &a {b: 1}\nc: {<<: *a, b: 2}\n")
    assert "is there twice" not in refusal(path), "what is taken from elsewhere may be said anew"


@pytest.mark.parametrize(("text", "kind"), [("", "NoneType"), ("- a\n", "list"), ("hello\n", "str")])
def test_a_run_file_is_a_mapping(tmp_path, text, kind):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert refusal(path, "train.epochs=3") == (
        f"{path}: a run file is a mapping of keys, this is {kind}; see examples/sms-spam/run.yaml"
    )


CROSS_FIELD = [
    ({"model": {}}, "model: exactly one of name_or_path and config is needed; remove one, or add one"),
    (
        {"model": {"name_or_path": "gpt2", "config": {"model_type": "gpt2"}}},
        "model: exactly one of name_or_path and config is needed; remove one, or add one",
    ),
    ({"model": {"config": {"n_layer": 2}}}, 'model: config needs a model_type; add for example "model_type: gpt2"'),
    (
        {"model": {"config": {"model_type": "gpt2"}, "init": "pretrained"}},
        "model: init: pretrained needs name_or_path; name a model, or say init: scratch",
    ),
    (
        {"train": {"epochs": 1}},
        "train: exactly one of global_batch_rows and global_batch_samples is needed; add or remove one",
    ),
    (
        {"train": {"epochs": 1, "global_batch_rows": 8, "global_batch_samples": 8}},
        "train: exactly one of global_batch_rows and global_batch_samples is needed; add or remove one",
    ),
    ({"train": {"global_batch_rows": 8}}, "train: one of epochs and max_steps is needed; add for example epochs: 3"),
    (
        {"train": {"global_batch_rows": 8, "epochs": 1, "compile": True, "gradient_checkpointing": "offload"}},
        "train: compile and gradient_checkpointing: offload exclude each other; leave one out",
    ),
    (
        {"train": {"global_batch_rows": 8, "epochs": 1, "sequence_parallel": 2, "attention": "flex_attention"}},
        "train: sequence_parallel does not go with attention: flex_attention; leave one out",
    ),
    (
        {"train": {"global_batch_rows": 8, "epochs": 1, "sequence_parallel": 2, "compile": True}},
        "train: sequence_parallel does not go with compile; leave one out",
    ),
    (
        {"train": {"global_batch_rows": 8, "epochs": 1, "fp8": True, "precision": "fp32"}},
        "train: fp8 goes with precision: bf16, not fp32; change one of them",
    ),
]


@pytest.mark.parametrize(("values", "message"), CROSS_FIELD)
def test_keys_that_exclude_or_need_each_other(tmp_path, values, message):
    path = written(tmp_path, **values)
    assert refusal(path) == f"{path}: {message}"


@pytest.mark.parametrize(
    ("values", "is_scratch"),
    [
        ({"name_or_path": "gpt2"}, False),
        ({"name_or_path": "gpt2", "init": "scratch"}, True),
        ({"name_or_path": "gpt2", "init": "pretrained"}, False),
        ({"config": {"model_type": "gpt2"}}, True),
        ({"config": {"model_type": "gpt2"}, "init": "scratch"}, True),
    ],
)
def test_a_model_is_pre_trained_or_from_scratch(values, is_scratch):
    assert ModelConfig(**values).is_scratch == is_scratch


def test_bf16_needs_a_zero_stage(tmp_path):
    path = written(tmp_path, zero="ds_configs/zero0.json")
    message = refusal(path)
    assert message.startswith(
        f"{path}: train.precision: 'bf16' is not allowed at ZeRO stage 0 (ds_configs/zero0.json): "
    )
    assert message.endswith("Use ds_configs/zero1.json, or train.precision=fp32")
    assert load(path, ["train.precision=fp32"]).train.precision == "fp32"
    assert load(path, ["zero=ds_configs/zero1.json"]).train.precision == "bf16"


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_every_shipped_deepspeed_file_loads_from_anywhere(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = zero_config(f"ds_configs/{path.name}")
    assert values == zero_config(str(path)) == json.loads(path.read_text())
    assert zero_stage(values) == int(path.stem.removeprefix("zero")[0])


def test_a_file_of_ones_own_comes_before_the_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs" / "zero2.json").write_text('{"zero_optimization": {"stage": 1}}')
    assert zero_stage(zero_config("ds_configs/zero2.json")) == 1


def test_no_stage_is_stage_0():
    assert zero_stage({}) == zero_stage({"zero_optimization": {}}) == 0


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("ds_configs/zero22.json", "did you mean ds_configs/zero2.json?"),
        ("qqq", "shipped: zero0.json, zero1.json, zero2.json"),
    ],
)
def test_a_missing_deepspeed_file_gets_a_hint(name, hint):
    with pytest.raises(ConfigError) as raised:
        zero_config(name)
    assert str(raised.value).startswith(f"zero: {name!r}: no such DeepSpeed file; {hint}")


BAD_ZERO = [
    ('{"zero_optimization": {"stage": 2,}}', r"z\.json: not JSON: .*line 1 column \d+.*; mend that line"),
    ("[]", r"z\.json: zero_optimization must be a mapping, as in ds_configs/zero2\.json"),
    ('{"zero_optimization": 2}', r"z\.json: zero_optimization must be a mapping, as in ds_configs/zero2\.json"),
    ('{"bf16": {"enabled": true}}', r"z\.json: bf16 is owned by the run file; remove it and set train\.precision"),
    ('{"train_batch_size": "auto"}', r"train_batch_size is owned by the run file; .* set train\.global_batch_rows"),
    ('{"gradient_clipping": 1.0}', r"gradient_clipping is owned by the run file; remove it and set train\.max_grad_norm"),
    ('{"optimizer": {}}', r"optimizer is owned by the run file; remove it and set train\.learning_rate"),
    ('{"zero_optimisation": {}}', r"unknown key zero_optimisation; DeepSpeed would ignore it .*mean zero_optimization\?"),
    ('{"qqq": 1}', r"unknown key qqq; DeepSpeed would ignore it silently; keys here: comms_logger, memory_breakdown,"),
    ('{"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}', r'zero_optimization\.reduce_bucket_size: "auto" means nothing here; write a number'),
    ('{"zero_optimization": {"stage": 4}}', r"zero_optimization\.stage: 4 is not one of 0, 1, 2, 3; use one of these"),
    ('{"zero_optimization": {"stage": "2"}}', r"zero_optimization\.stage: '2' is not one of 0, 1, 2, 3; use one of these"),
    ('{"zero_optimization": {"stage": true}}', r"zero_optimization\.stage: True is not one of 0, 1, 2, 3; use one of these"),
    ('{"zero_optimization": {"stage": 2, "reduce_buket_size": 5}}', r"reduce_buket_size"),
    ('{"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "buffer_count": "auto"}}}', r"zero_optimization\.offload_param: .* is not allowed at stage 3: write"),
    ('{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}', r"offload_param: \{'device': 'nvme'\} is not allowed at stage 3"),
    ('{"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}', "offload_param: .* is not allowed at stage 2"),
    ('{"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}', "offload_optimizer: .* is not allowed at stage 0"),
    ('{"zero_optimization": {"stage": 2, "offload_optimizer": true}}', "offload_optimizer: True is not allowed at stage 2"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BAD_ZERO, ids=[text[:40] for text, _ in BAD_ZERO])
def test_a_deepspeed_file_says_only_what_deepspeed_owns(tmp_path, text, message):
    path = tmp_path / "z.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        zero_config(str(path))
    assert "z.json" in refusal(written(tmp_path), f"zero={path}")


def rows_of(**more):
    return TrainConfig(**{"global_batch_rows": 8, "epochs": 1, **more})


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 16))
def test_micro_batch_times_accumulation_times_ranks_is_the_global_batch(accumulation, micro, world):
    rows = accumulation * micro * world
    batch = derive_batch(rows_of(global_batch_rows=rows, micro_batch_rows=micro), world, 3.0)
    assert batch == Batch(rows, micro, accumulation, world)
    assert batch.samples(2.5) == rows * 2.5


@given(st.integers(1, 200), st.integers(1, 9), st.integers(1, 9))
def test_a_batch_that_does_not_divide_names_the_nearest_that_do(rows, micro, world):
    config = rows_of(global_batch_rows=rows, micro_batch_rows=micro)
    unit = micro * world
    if rows % unit == 0:
        assert derive_batch(config, world, 1.0).global_batch_rows == rows
        return
    with pytest.raises(ConfigError) as raised:
        derive_batch(config, world, 1.0)
    told = str(raised.value)
    assert told.startswith(
        f"train.global_batch_rows: {rows} is not a multiple of micro_batch_rows {micro} x {world} processes = {unit}. Use "
    )
    for offered in told.partition("Use ")[2].partition(",")[0].split(" or "):
        assert int(offered) % unit == 0
        assert 0 < abs(int(offered) - rows) < unit
        assert derive_batch(rows_of(global_batch_rows=int(offered), micro_batch_rows=micro), world, 1.0)


@pytest.mark.parametrize(
    ("rows", "micro", "world", "offer"), [(10, 2, 2, "Use 8 or 12,"), (3, 4, 1, "Use 4,"), (7, 1, 8, "Use 8,")]
)
def test_the_offer_is_never_zero_rows(rows, micro, world, offer):
    with pytest.raises(ConfigError, match=offer):
        derive_batch(rows_of(global_batch_rows=rows, micro_batch_rows=micro), world, 1.0)


def samples_of(samples, **more):
    return TrainConfig(global_batch_samples=samples, epochs=1, **more)


@pytest.mark.parametrize(
    ("samples", "per_row", "micro", "world", "rows"),
    [(3840, 10.0, 4, 8, 384), (100, 9.7, 1, 1, 10), (100, 9.7, 4, 1, 12), (1, 50.0, 2, 4, 8), (7680, 1.0, 1, 8, 7680)],
)
def test_a_batch_in_samples_becomes_the_nearest_rows_that_divide(samples, per_row, micro, world, rows):
    assert derive_batch(samples_of(samples, micro_batch_rows=micro), world, per_row).global_batch_rows == rows


def test_a_resumed_run_keeps_the_rows_it_started_with():
    config = samples_of(100, micro_batch_rows=2)
    assert derive_batch(config, 1, 10.0).global_batch_rows == 10
    assert derive_batch(config, 4, 10.0).global_batch_rows == 8
    assert derive_batch(config, 5, 10.0, resumed_rows=20).global_batch_rows == 20
    with pytest.raises(
        ConfigError, match=r"10 is not a multiple of micro_batch_rows 2 x 4 processes = 8\. Use 8 or 16"
    ):
        derive_batch(config, 4, 10.0, resumed_rows=10)
    assert derive_batch(rows_of(), 1, 10.0, resumed_rows=16).global_batch_rows == 8  # a batch in rows says itself


@pytest.mark.parametrize(
    ("limits", "num_rows", "rows", "steps"),
    [
        ({"epochs": 1}, 100, 100, 13),
        ({"epochs": 2.5}, 100, 250, 32),
        ({"epochs": 0.5}, 3, 2, 1),
        ({"epochs": 0.001}, 100, 1, 1),
        ({"epochs": None, "max_steps": 5}, 100, 40, 5),
        ({"epochs": None, "max_steps": 50}, 100, 400, 50),
        ({"epochs": 1, "max_steps": 5}, 100, 40, 5),
        ({"epochs": 1, "max_steps": 50}, 100, 100, 13),
        ({"epochs": 3}, 8, 24, 3),
    ],
)
def test_how_long_a_run_is(limits, num_rows, rows, steps):
    config = rows_of(**limits)
    batch = derive_batch(config, 1, 1.0)
    assert total_rows(config, batch, num_rows) == rows
    assert num_steps(rows, batch) == steps


def test_every_key_of_the_schema_is_documented_or_plain():
    for model in (RunConfig, ModelConfig, TrainConfig):
        assert model.__doc__
    assert RunConfig.model_fields["zero"].description


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("{cost: 250 EUR}", "cost needs a price_per_gpu_hour; add for example price_per_gpu_hour: 2.10 EUR"),
        ("{price_per_gpu_hour: 2.10}", "price_per_gpu_hour"),
        ("{price_per_gpu_hour: '2.10'}", "'2.10' is no money; write an amount and a currency, as in 2.50 EUR"),
        (
            "{cost: 250 EUR, price_per_gpu_hour: 2 USD}",
            "cost is in EUR and price_per_gpu_hour in USD; use one currency",
        ),
        ("{price_per_gpu_hour: 0 EUR}", "price_per_gpu_hour is 0"),
        ("{deadline: tomorrow}", "'tomorrow' is no moment; write it as in 2027-01-31T18:00:00+01:00"),
        ("{deadline: 5}", "deadline"),
        ("{max_tokens: 0}", "max_tokens"),
        ("{gpu_hours: -1}", "gpu_hours"),
    ],
)
def test_a_budget_that_cannot_be_meant_is_refused(tmp_path, budget, message):
    said = refusal(written(tmp_path), f"budget={budget}")
    assert message in said
    assert said.count("\n") == 0


def test_a_deadline_is_a_moment_however_it_is_written_and_survives_run_yaml(tmp_path):
    path = written(tmp_path)
    moments = [
        load(path, [f"budget.deadline={text}"]).budget.deadline
        for text in ("2027-01-31T18:00:00+01:00", "2027-01-31 17:00:00+00:00", "'2027-01-31T17:00:00Z'")
    ]
    assert len({moment.timestamp() for moment in moments}) == 1
    assert load(path, ["budget.deadline=2027-01-31"]).budget.deadline.hour == 0
    config = load(path, ["budget.deadline=2027-01-31T18:00:00+01:00"])
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(config.model_dump(by_alias=True)))
    assert load(again).budget.deadline == config.budget.deadline


def test_the_tighter_one_of_hours_and_money_counts(tmp_path):
    budget = load(written(tmp_path), ["budget={gpu_hours: 5, cost: 21 EUR, price_per_gpu_hour: 2.10 EUR}"]).budget
    assert budget.gpu_seconds == 5 * 3600
    assert load(written(tmp_path)).budget.gpu_seconds is None


def test_early_stopping_without_evaluations_is_refused(tmp_path):
    said = refusal(written(tmp_path), "evaluate.early_stopping={patience: 2}")
    assert "early_stopping judges evaluations, and there are none; add for example every_steps: 100" in said


def test_general_text_of_another_schema_is_refused(tmp_path):
    said = refusal(written(tmp_path), "prepare.general=[{path: a.jsonl, schema: messages}]")
    assert said.endswith(
        ": prepare: general: a.jsonl has schema messages, and general text is plain text; leave the schema out, and name the "
        "column with text"
    )


def test_answering_no_prompts_every_so_many_steps_is_refused(tmp_path):
    every = "evaluate={samples: 0, samples_every_steps: 5"
    said = refusal(written(tmp_path), every + "}")
    assert "samples_every_steps answers prompts, and there are none; add prompts, or samples: 4" in said
    assert load(written(tmp_path), [every + ", prompts: [hello]}"]).evaluate.prompts == ["hello"]


def shown(page):
    """The YAML of a page of the docs, as sections of a run file."""
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / page).read_text(), flags=re.DOTALL)
    return {key: value for block in blocks for key, value in yaml.safe_load(block).items()}


def test_what_the_page_on_run_control_shows_can_be_written(tmp_path):
    values = shown("control.md")
    bad_steps = values.pop("train")["bad_steps"]
    config = load(written(tmp_path, **values, train__bad_steps=bad_steps))
    assert config.train.bad_steps.model_dump() == bad_steps
    assert config.budget.gpu_seconds == pytest.approx(800 / 2.10 * 3600)
    assert config.evaluate.early_stopping.warmup_steps == 200


def test_what_the_page_on_measuring_shows_can_be_written(tmp_path):
    values = shown("evaluation.md")
    prepare = {f"prepare__{key}": value for key, value in values["prepare"].items()}
    config = load(written(tmp_path, evaluate=values["evaluate"], **prepare))
    assert [source.text for source in config.prepare.general] == ["text", "body"]
    assert config.evaluate.samples_every_steps == 1000


@pytest.mark.parametrize(("service", "section"), [("wandb", "{project: x}"), ("mlflow", "{experiment: x}")])
def test_a_service_without_its_package_is_refused_before_anything_starts(tmp_path, monkeypatch, service, section):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == service else find(name, *rest))
    with pytest.raises(ConfigError) as error:
        load(written(tmp_path), [f"logging.{service}={section}"])
    assert str(error.value).endswith(
        f"logging.{service}: needs the package {service}, which is not installed; pip install 'sft-dist[{service}]', or leave the "
        "section out"
    )
    assert read(written(tmp_path), [f"logging.{service}={section}"]), "what is done after a run needs none"


def test_a_password_in_the_run_file_is_refused_and_not_repeated(tmp_path):
    with pytest.raises(ConfigError) as error:
        load(written(tmp_path), ["logging.mlflow={experiment: x, tracking_uri: 'https://me:hush@host'}"])
    assert "logging.mlflow.tracking_uri: holds a password, which the run would write down" in str(error.value)
    assert "hush" not in str(error.value)


def test_a_small_section_adapts_the_model(tmp_path):
    lora = load(written(tmp_path, model__lora={})).model.lora
    assert (lora.rank, lora.alpha, lora.dropout, lora.target_modules, lora.quantize) == (16, 32, 0, "all-linear", None)
    named = load(
        written(tmp_path), ["model.lora.target_modules=[q_proj, v_proj]", "model.lora.quantize=nf4"]
    ).model.lora
    assert (named.target_modules, named.quantize) == (["q_proj", "v_proj"], "nf4")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.lora.rnak=8"], "model.lora.rnak: unknown key (value 8); did you mean model.lora.rank?"),
        (
            ["model.lora.target_modules=all-liner"],
            "'all-liner' is not allowed: input should be 'all-linear'; did you mean",
        ),
        (["model.lora.target_modules=[]"], "model.lora.target_modules: [] is not allowed"),
        (
            ["model.lora.quantize=nf8"],
            "model.lora.quantize: 'nf8' is not allowed: input should be 'nf4'; did you mean nf4?",
        ),
        (["model.lora=true"], "model.lora: True is not allowed: it is a section with keys of its own"),
        (
            ["model.lora.rank=8", "model.init=scratch"],
            "model: lora adapts a pre-trained model, and this one is from scratch",
        ),
        (
            ["model.lora.quantize=nf4", "zero=ds_configs/zero3.json"],
            "model.lora.quantize: at ZeRO stage 3 (ds_configs/zero3.json) bitsandbytes' products keep the gathered weights of all layers",
        ),
    ],
)
def test_adapters_that_cannot_be_are_told(tmp_path, overrides, message):
    assert message in refusal(written(tmp_path), *overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["zero=ds_configs/zero3.json"],
            "at ZeRO stage 3 (ds_configs/zero3.json) torchao's products keep the gathered",
        ),
        (
            ["zero=ds_configs/zero3.json", "train.gradient_checkpointing=selective"],
            "set train.gradient_checkpointing: true, or use ds_configs/zero2.json",
        ),
        (["model.lora.rank=8"], "train.fp8: adapters are trained beside layers of 16 bits or nf4"),
    ],
)
def test_what_does_not_go_with_products_in_8_bits(tmp_path, overrides, message):
    assert message in refusal(written(tmp_path), "train.fp8=true", *overrides)


def test_products_in_8_bits_without_their_package_are_refused(tmp_path, monkeypatch):
    assert load(written(tmp_path), ["train.fp8=true"]).train.fp8
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "torchao" else find(name, *rest)
    )
    told = refusal(written(tmp_path), "train.fp8=true")
    assert "train.fp8: needs the package torchao, which is not installed; pip install 'sft-dist[fp8]'" in told


@pytest.mark.parametrize(("package", "extra"), [("peft", "lora"), ("bitsandbytes", "qlora")])
def test_adapters_without_their_package_are_refused(tmp_path, monkeypatch, package, extra):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    told = refusal(written(tmp_path, model__lora={"quantize": "nf4"}))
    assert f"needs the package {package}, which is not installed; pip install 'sft-dist[{extra}]'" in told
    assert load(written(tmp_path)).model.lora is None
