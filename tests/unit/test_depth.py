"""A deep model's activations told by shallow ones, beside the trace of all of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sft_dist import depth
from sft_dist.depth import are_equal, deepened, traced
from sft_dist.memory import Alive, Gradient, Traced, trace
from sft_dist.model import build, model_config
from sft_dist.schema import ModelConfig

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_head": 4}


def made_of(values, layers=8):
    config = ModelConfig(
        config={**values, "n_layer" if values["model_type"] == "gpt2" else "num_hidden_layers": layers}
    )
    made = model_config(config, vocab_size=1000, seq_len=64, eos_id=0)
    with torch.device("meta"):
        return config, made, build(config, made, seed=0, gradient_checkpointing=False)


@pytest.mark.parametrize(
    ("values", "precision", "checkpointing"),
    [
        (GPT2, "bf16", False),
        (GPT2, "bf16", "offload"),
        ({**LLAMA, "model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True}, "fp32", True),
    ],
)
def test_a_deep_model_is_what_the_trace_of_all_its_layers_is(values, precision, checkpointing, monkeypatch):
    config, made, meta = made_of(values)
    names = {"rows": 2, "seq_len": 64, "precision": precision, "checkpointing": checkpointing}
    whole = trace(config, made, **names)
    counts = []
    monkeypatch.setattr(
        depth,
        "trace",
        lambda config, made, **more: counts.append(made.num_hidden_layers) or trace(config, made, **more),
    )
    assert traced(config, made, meta, **names) == whole
    assert counts == [3, 4], "not all its layers were traced"
    assert {one.layer for one in whole.gradients} == {-1, *range(8)}


def test_layers_that_differ_are_traced_all(monkeypatch):
    """Gemma 3 mixes windows and full attention, SmolLM 3 layers with and without rotary positions: their parts are the same."""
    for name, more in (("gemma3_text", {"head_dim": 16}), ("smollm3", {"pad_token_id": 0})):
        config, made, meta = made_of({**LLAMA, "model_type": name, **more})
        assert not are_equal(meta, made), name
    assert are_equal(*reversed(made_of(LLAMA)[1:]))
    counts = []
    monkeypatch.setattr(depth, "trace", lambda config, made, **more: counts.append(made.num_hidden_layers))
    traced(config, made, meta, rows=1)
    assert counts == [8]


def test_a_layer_of_another_size_is_seen():
    _, made, meta = made_of(LLAMA)
    meta.model.layers[5].mlp.up_proj = torch.nn.Linear(64, 128, device="meta")
    assert not are_equal(meta, made)


def stacked(count, layer=((5, 14, 0), (7, 12, 3))):
    """A model whose layers keep 10 bytes each."""
    inner = (
        Gradient(numel, Alive(10 * n + peak), Alive(10 * n + after), n)
        for n in reversed(range(count))
        for numel, peak, after in layer
    )
    top = Gradient(9, Alive(10 * count + 30, 4), Alive(10 * count))
    return Traced(Alive(10 * count + 40, 8), (top, *inner, Gradient(3, Alive(6), Alive(1))))


def test_shallow_models_that_do_not_agree_tell_nothing():
    three, four = stacked(3), stacked(4)
    assert deepened(three, four, 80) == stacked(80)
    for place, one in enumerate(four.gradients):
        for more in (
            {"peak": Alive(one.peak.bytes + 1, one.peak.logits)},
            {"after": Alive(one.after.bytes, 1)},
            {"numel": 4},
        ):
            wrong = (*four.gradients[:place], one._replace(**more), *four.gradients[place + 1 :])
            assert deepened(three, replace(four, gradients=wrong), 80) is None, (place, more)
    assert deepened(replace(three, forward=Alive(0)), four, 80) is None
    assert deepened(three, three, 80) is None
    outside = tuple(one._replace(layer=-1) for one in three.gradients)
    assert deepened(replace(three, gradients=outside), four, 80) is None
    mixed = (*four.gradients[:3], four.gradients[4], four.gradients[3], *four.gradients[5:])
    assert deepened(three, replace(four, gradients=mixed), 80) is None, "not layer by layer"
