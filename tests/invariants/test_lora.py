"""Whole runs of adapters: what must not change the result does not, and what they are handed over as is what was trained."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from sft_dist.config import load
from sft_dist.data.build import prepare
from sft_dist.schema import LoraConfig
from tests.dist.tiny import assert_same_curve
from tests.invariants import runs
from tests.invariants.test_hand_over import typed
from tests.workers import RankError, run_workers

STEPS = 6


def base(topology, folder, seed):
    """A model of random weights in a folder, as if it were a pre-trained one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=340, max_position_embeddings=128, **shape)).save_pretrained(folder)


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A run file, prepared, and the folder that it is in."""
    folder = tmp_path_factory.mktemp("lora")
    run_workers(base, 1, folder / "base", 0)
    path = runs.run_file(folder, max_steps=STEPS, learning_rate=1e-2, micro_batch_rows=2)
    values = yaml.safe_load(path.read_text())
    values["model"] = {"name_or_path": str(folder / "base"), "lora": {"rank": 4, "alpha": 8, "dropout": 0.1}}
    path.write_text(yaml.safe_dump(values))
    prepare(load(path).prepare)
    return path


@pytest.fixture(scope="module")
def uninterrupted(lora):
    run_workers(runs.run, 2, lora, ())
    return lora.parent / "run"


@pytest.fixture
def go(lora, tmp_path):
    def start(world_size, *overrides, **more):
        assert set(run_workers(runs.run, world_size, lora, (f"run_dir={tmp_path / 'run'}", *overrides), **more)) == {0}
        return tmp_path / "run"

    return start


def test_stopped_and_resumed_is_uninterrupted_bit_for_bit(go, uninterrupted):
    assert len(runs.numbers(go(2, stop_at=3))) < STEPS
    run_dir = go(2)
    assert runs.numbers(run_dir) == runs.numbers(uninterrupted)
    assert runs.measured(run_dir, STEPS) == runs.measured(uninterrupted, STEPS)
    ours, theirs = (runs.tensors(folder / "checkpoints" / "latest") for folder in (run_dir, uninterrupted))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ".lora_" in name for name in ours)


def test_begun_at_stage_3_and_resumed_elsewhere(go, uninterrupted):
    go(4, "zero=ds_configs/zero3.json", "train.micro_batch_rows=2", stop_at=3)
    run_dir = go(1, "zero=ds_configs/zero0.json")
    assert_same_curve(runs.numbers(run_dir), runs.numbers(uninterrupted), tolerance=5e-6)


def test_what_it_learns_is_handed_over_whole_and_as_adapters(uninterrupted):
    """The shares of labels, loss and certificate of both exports are those of the run."""
    ours = runs.measured(uninterrupted, STEPS)
    out, beside = uninterrupted / "export", uninterrupted.parent / "adapters"
    assert f"exported step {STEPS}" in typed("export", uninterrupted, out)
    assert f"exported the adapters of step {STEPS}" in typed("export", uninterrupted, beside, "--adapter")
    for folder in (out, beside):
        theirs = json.loads(typed("eval", folder, "--json"))
        assert theirs["validation_loss"] == pytest.approx(ours["validation_loss"], rel=1e-6)
        assert theirs["validation_accuracy"] == ours["validation_accuracy"]
    assert "weights are the fp32 masters of step 6, merged into their base" in typed("verify", uninterrupted)
    shutil.move(out, uninterrupted / "whole")
    shutil.copytree(beside, out)
    assert "28 weights are the fp32 masters of step 6, in float32" in typed("verify", uninterrupted)
    shutil.rmtree(out)
    cards = [ModelCard.load(folder / "README.md") for folder in (uninterrupted / "whole", beside)]
    assert [card.data.library_name for card in cards] == ["transformers", "peft"]
    assert all(
        "| trained | LoRA of rank 4, alpha 8, dropout 0.1, beside all linear layers |" in card.text for card in cards
    )
    assert "merged into it" in cards[0].text
    assert "Adapters of 3,968 parameters for" in cards[1].text
    recipe = yaml.safe_load((beside / "reproduce.yaml").read_text())
    assert LoraConfig(**recipe["model"]["lora"]) == LoraConfig(rank=4, alpha=8, dropout=0.1)
    assert recipe["reproduces"]["identity"]["base"]


def test_another_base_and_other_adapters_are_refused(lora, go, tmp_path):
    go(1, "train.max_steps=1")
    run_workers(base, 1, tmp_path / "other", 1)
    for override, told in (
        (f"model.name_or_path={tmp_path / 'other'}", "was made with base = "),
        ("model.lora.rank=8", "was made with lora = "),
        ("model.lora=null", "was made with lora = .* this run has None"),
    ):
        with pytest.raises(RankError, match=rf"{told}.*Continue with the old value, take another run_dir"):
            go(1, override)


def test_what_the_base_has_become_is_not_merged_into(lora, tmp_path):
    """Somebody trains on in the folder of the base, after the run."""
    shutil.copytree(lora.parent / "base", tmp_path / "base")
    common = (f"run_dir={tmp_path / 'run'}", f"model.name_or_path={tmp_path / 'base'}", "train.max_steps=1")
    run_workers(runs.run, 1, lora, common)
    assert "exported" in typed("export", tmp_path / "run", tmp_path / "run" / "export")
    run_workers(base, 1, tmp_path / "base", 1)
    told = typed("export", tmp_path / "run", tmp_path / "out", code=3)
    assert "its adapters were trained beside other weights than" in told
    assert "NOT VERIFIED" in typed("verify", tmp_path / "run", code=3)
    shutil.rmtree(tmp_path / "base")
    assert "cannot load" in typed("export", tmp_path / "run", tmp_path / "out", code=2)
    assert "not checked  export" in typed("verify", tmp_path / "run")
    assert not (tmp_path / "out").exists()


def test_in_nf4_what_is_merged_is_what_was_trained_beside(lora, tmp_path):
    run_workers(runs.run, 2, lora, (f"run_dir={tmp_path / 'run'}", "model.lora.quantize=nf4", "train.max_steps=3"))
    ours = runs.measured(tmp_path / "run", 3)["validation_loss"]
    for name, options in (("whole", ()), ("adapters", ("--adapter",))):
        assert "weights and logits equal" in typed("export", tmp_path / "run", tmp_path / name, *options)
    theirs = json.loads(typed("eval", tmp_path / "whole", "--json"))["validation_loss"]
    assert theirs == pytest.approx(ours, rel=1e-6)
    beside_all_bits = json.loads(typed("eval", tmp_path / "adapters", "--json"))["validation_loss"]
    assert 1e-6 < abs(beside_all_bits - ours) / ours < 1e-2, "peft loads it beside the base as it is"


def test_what_a_run_of_the_whole_model_does_not_have(tmp_path, task):
    run_workers(runs.run, 1, task, (f"run_dir={tmp_path / 'run'}", "train.max_steps=1", "evaluate.samples=0"))
    told = typed("export", tmp_path / "run", tmp_path / "out", "--adapter", code=2)
    assert "it has no adapters (model.lora); leave it out" in told
    told = typed("export", tmp_path / "run", tmp_path / "out", "--adapter", "--max-shard-size", "1GB", code=2)
    assert "--max-shard-size is about files of whole models" in told
