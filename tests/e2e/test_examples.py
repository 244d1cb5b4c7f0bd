"""Every example runs; and the road most people take: pre-train, export, fine-tune the export, with no network."""

from __future__ import annotations

import json

import pytest

from tests.e2e.commands import ROOT, clone, enter, run
from tests.invariants import runs

EXAMPLES = sorted(path.parent.name for path in (ROOT / "examples").glob("*/run.yaml"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return clone(tmp_path_factory.mktemp("examples"))


def test_there_are_the_examples_the_readme_names():
    assert EXAMPLES == ["curation", "instructions", "large-batch", "sms-spam", "wikitext"]


# sms-spam: by the README's own test; large-batch: by that of docs/large-batches.md; curation: by that of docs/curation.md
@pytest.mark.parametrize("name", ["instructions", "wikitext"])
def test_an_example_runs_as_it_is(folder, name):
    run(f"sft-dist prepare examples/{name}/run.yaml", folder)
    output = run(
        f"sft-dist train examples/{name}/run.yaml --nproc 2 train.max_steps=2 train.global_batch_rows=2 "
        "train.micro_batch_rows=1 evaluate.samples=1 evaluate.max_new_tokens=2",
        folder,
    )
    assert "completed: 2 of 2 steps" in output
    assert "sample at step 2" in output


def losses(folder, name):
    return [loss for loss, _ in runs.numbers(folder / name)]


def test_pre_trained_then_fine_tuned_with_no_network(folder):
    """A GPT-2 learns WikiText, is exported, and follows instructions from that folder: it starts lower than from scratch."""
    text = (
        "examples/wikitext/run.yaml run_dir=text prepare.out=text-shards prepare.seq_len=128 evaluate.samples=0 "
        "train.global_batch_rows=16 train.micro_batch_rows=8 train.max_steps=60 train.learning_rate=5e-3 train.precision=fp32 "
        "train.gradient_checkpointing=false train.beta2=0.999 train.warmup_ratio=0.03 evaluate.every_steps=25"
    )
    run(f"sft-dist prepare {text}", folder)
    run(f"sft-dist train {text} --nproc 2", folder)
    enter("sft-dist export text text/export", folder)
    pair = "prepare.out=asked-shards prepare.tokenizer=null prepare.seq_len=128 train.max_steps=30 evaluate.samples=0"
    asked = f"examples/instructions/run.yaml {pair}"
    run(f"sft-dist prepare {asked} 'model={{name_or_path: text/export}}'", folder)
    for name, model in (
        ("tuned", "{name_or_path: text/export}"),
        ("scratch", "{name_or_path: text/export, init: scratch}"),
    ):
        run(f"sft-dist train {asked} run_dir={name} 'model={model}' --nproc 2", folder)
    assert losses(folder, "tuned")[0] < losses(folder, "scratch")[0] - 0.5
    assert losses(folder, "tuned")[-1] < losses(folder, "scratch")[-1]
    enter("sft-dist export tuned tuned/export --dtype bfloat16", folder)
    assert json.loads((folder / "tuned" / "export" / "config.json").read_text())["dtype"] == "bfloat16"
    output = enter("sft-dist eval tuned/export text/export --shards asked-shards --json", folder)
    after, before = (json.loads(line)["validation_loss"] for line in output.splitlines() if line.startswith("{"))
    assert after < before
