"""docs/lora.md, executed on a tiny model in the place of a large one; and its numbers, foretold again."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sft_dist.config import load
from sft_dist.data.build import prepare
from tests.e2e.commands import ROOT, clone, forked, run, shown
from tests.fake_engine import Case
from tests.invariants import runs

PAGE = (ROOT / "docs" / "lora.md").read_text()
LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8,
}  # fmt: skip


def small_model(folder):
    """A Llama of random weights, with a tokenizer of its own, as the hub would give one."""
    made = load(runs.run_file(folder)).prepare
    prepare(made)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=340, max_position_embeddings=512, **shape)).save_pretrained(
        folder / "model"
    )
    for file in (folder / "shards" / "tokenizer").iterdir():
        (folder / "model" / file.name).write_bytes(file.read_bytes())
    return folder / "model"


def test_the_commands_of_the_page(tmp_path):
    (tmp_path / "small").mkdir()
    folder, model = clone(tmp_path), small_model(tmp_path / "small")
    init, cut, plan, train, merged, alone, evaluate, verify = shown("docs/lora.md")
    forked(init.replace("gpt2", str(model)), folder)
    run(cut, folder)
    told = forked(plan, folder)
    assert re.search(r"of which [\d,]+ are trained", told)
    assert "best: zero=" in told
    told = run(
        f"{train} --nproc 2 train.max_steps=2 evaluate.samples=0 evaluate.every_steps=null train.precision=fp32", folder
    )
    assert "completed: 2 of 2 steps" in told
    assert "exported step 2 to runs/lora/merged" in forked(merged, folder)
    assert "exported the adapters of step 2 to runs/lora/adapter" in forked(alone, folder)
    losses = re.findall(r": loss (\S+)", forked(evaluate, folder))
    assert len(losses) == 3
    assert len(set(losses)) == 1
    assert "VERIFIED" in forked(verify, folder)


@pytest.mark.parametrize(
    ("row", "lora"),
    [
        ("all weights", None),
        ("`lora: {rank: 16}`", {"rank": 16}),
        ("`lora: {rank: 16, quantize: nf4}`", {"rank": 16, "quantize": "nf4"}),
    ],
)
def test_the_numbers_of_the_page_are_what_is_foretold(row, lora):
    found = Case(LLAMA_8B, 128_256, 4096, "2", "bf16", 1, 1, True, lora).foretold()
    others = found.activations + found.logits + found.buffers
    parts = (found.weights, found.gradients, found.optimizer, others, found.total)
    assert f"| {row} | " + " | ".join(f"{part / 2**30:.1f}" for part in parts) + " |" in PAGE
