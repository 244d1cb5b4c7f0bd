"""Layers keep less, or are compiled, and learn the same: every gradient is that of layers left alone."""

from __future__ import annotations

import itertools
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from launch.settle import check_compiler
from sft_dist import kernels
from sft_dist.attention import packed_logits
from sft_dist.errors import ConfigError, ModelError
from sft_dist.head import Head
from sft_dist.layers import _policy, compile_layers, layers_of, recompute, tile_mlp
from tests.unit.test_kernels import varlen_by_hand

VOCAB, LENGTH = 64, 16
WIDE = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "pad_token_id": 0}  # fmt: skip
FAMILIES = {
    "gpt2": {"vocab_size": VOCAB, "n_layer": 2, "n_embd": 32, "n_head": 4},
    "gpt_neox": {key: value for key, value in WIDE.items() if key != "num_key_value_heads"},
    "llama": WIDE,
    "qwen3": {**WIDE, "head_dim": 8},
    "mistral": {**WIDE, "sliding_window": 4},
}
DROPOUTS = {"attn_pdrop": 0.3, "resid_pdrop": 0.3, "embd_pdrop": 0.3}


def made(family, **more):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **more})
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()


def rows(*lengths):
    """(tokens, positions) of one row of documents of these lengths."""
    tokens = torch.randint(VOCAB, (1, sum(lengths)), generator=torch.Generator().manual_seed(sum(lengths)))
    return tokens, torch.cat([torch.arange(length) for length in lengths])[None]


def gradients(model, *batch):
    torch.manual_seed(1)
    model.zero_grad()
    packed_logits(model, *(batch or rows(7, 9))).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def off(found, expected):
    """The largest difference, as a share of the largest gradient of the same parameter."""
    assert found.keys() == expected.keys()
    return max(
        ((found[name] - one).abs().max() / one.abs().max().clamp_min(1e-9)).item() for name, one in expected.items()
    )


class Counted(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func] = self.counts.get(func, 0) + 1
        return func(*args, **(kwargs or {}))


# ---- recomputation ----


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", [True, "selective", "offload"])
def test_what_is_computed_again_changes_no_gradient(family, how):
    model = made(family)
    expected = gradients(model)
    recompute(model, how)
    assert all(module.gradient_checkpointing for module in layers_of(model, 2))
    assert off(gradients(model), expected) < 1e-5


@pytest.mark.parametrize("how", [True, "selective", "offload"])
def test_dropout_is_drawn_as_it_was(how):
    model = made("gpt2", **DROPOUTS)
    expected = gradients(model)
    torch.manual_seed(2)
    assert off(gradients(made("gpt2")), expected) > 1e-2, "dropout did nothing"
    recompute(model, how)
    assert off(gradients(model), expected) < 1e-5


def test_attention_that_draws_is_not_kept():
    """On a GPU an operator that is kept does not draw a second time, and everything behind it would draw other numbers."""
    kernel = "aten._scaled_dot_product_flash_attention.default"
    kept = {
        draws: _policy(made("gpt2", **(DROPOUTS if draws else {"attn_pdrop": 0.0})))(None, kernel)
        for draws in (True, False)
    }
    assert [kept[draws].name for draws in (True, False)] == ["PREFER_RECOMPUTE", "MUST_SAVE"]


def test_selective_computes_the_wide_products_again_and_nothing_that_is_dear():
    """GPT-2's layer has four products: to 3 and 4 times the width, which are made again, and two back to it, which are kept."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    counts = {}
    for how in (False, "selective", True):
        model = made("gpt2", n_layer=1, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
        recompute(model, how)
        with Counted() as counted:
            packed_logits(model, torch.zeros(1, 8, dtype=torch.int64), torch.arange(8)[None]).sum().backward()
        counts[how] = (counted.counts[torch.ops.aten.addmm.default], counted.counts[attention])
    assert counts == {False: (4, 1), "selective": (6, 1), True: (7, 2)}, "nobody asks for the last one again"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", [False, True])
def test_tiles_of_the_feed_forward_layers_change_no_gradient(family, how):
    model = made(family)
    expected = gradients(model)
    recompute(model, how)
    tile_mlp(model, 5)
    assert off(gradients(model), expected) < 1e-5
    with torch.no_grad():
        torch.testing.assert_close(
            packed_logits(model.eval(), *rows(7, 9)), packed_logits(made(family).eval(), *rows(7, 9))
        )


def test_feed_forward_layers_that_cannot_be_told_are_not_tiled():
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "opt",
        vocab_size=VOCAB,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
    )
    with pytest.raises(
        ModelError, match=r"train\.mlp_tile_tokens: the feed-forward layers of OPTForCausalLM cannot be told"
    ):
        tile_mlp(AutoModelForCausalLM.from_config(config), 5)


# ---- compilation ----


@pytest.fixture
def graphs():
    """Graphs that were compiled within the test."""
    torch.compiler.reset()
    counters.clear()
    return lambda: counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("how", [False, True, "selective"])
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_layers_learn_the_same_by_one_graph(family, how, graphs):
    model = made(family)
    expected = gradients(model)
    recompute(model, how)
    compile_layers(model, backend="aot_eager")
    assert off(gradients(model), expected) < 1e-5
    assert graphs() == 1, "a graph for all layers"


@torch.library.custom_op("sft_dist_tests::varlen", mutates_args=())
def _varlen_op(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, scale: float, window: int
) -> torch.Tensor:
    """What torch's kernel computes, as opaque to a compiler as that is."""
    length, more = int(bounds.max()), {"enable_gqa": query.shape[1] != key.shape[1]}
    return varlen_by_hand(
        query, key, value, bounds, bounds, length, length, scale=scale, window_size=(window, 0), **more
    )


@torch.library.custom_op("sft_dist_tests::varlen_backward", mutates_args=())
def _varlen_backward(
    of_made: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, scale: float, window: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    groups = query.shape[1] // key.shape[1]
    found = [
        torch.zeros_like(state)
        for state in (query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1))
    ]
    for begin, end in itertools.pairwise(bounds):
        q, k, v, of = (
            part[begin:end].transpose(0, 1)
            for part in (query, *(one.repeat_interleave(groups, 1) for one in (key, value)), of_made)
        )
        behind = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
        hidden = (behind < 0) | ((behind > window) if window >= 0 else False)
        weights = (q @ k.mT * scale).masked_fill(hidden, -torch.inf).softmax(-1)
        of_weights = of @ v.mT
        of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * scale
        for whole, part in zip(found, (of_scores @ k, of_scores.mT @ q, weights.mT @ of), strict=True):
            whole[begin:end] = part.transpose(0, 1)
    return found[0], *(one.unflatten(1, (-1, groups)).sum(2) for one in found[1:])


_varlen_op.register_fake(lambda query, *more: torch.empty_like(query))
_varlen_backward.register_fake(lambda of_made, *states_and_more: tuple(map(torch.empty_like, states_and_more[:3])))


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.about = inputs[4:]


_varlen_op.register_autograd(
    lambda ctx, of_made: (*_varlen_backward(of_made, *ctx.saved_tensors, *ctx.about), None, None, None),
    setup_context=_keep,
)


def _as_torch_calls_it(query, key, value, bounds, bounds_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    return _varlen_op(query, key, value, bounds, scale, window_size[0])


@pytest.mark.parametrize(
    ("family", "how"), [*((family, False) for family in FAMILIES), ("llama", True), ("mistral", "selective")]
)
def test_no_number_of_documents_makes_a_second_graph(family, how, graphs, monkeypatch):
    """One, two and 75 documents in a row, whose bounds are 64 and 128 numbers long: by the kernel of a GPU, with its gradients."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", _as_torch_calls_it)
    still = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} if family == "gpt2" else {}
    model = made(family, **still)
    head = Head(model)
    every = [rows(150), rows(75, 75), rows(*[2] * 75), rows(100, 50)]
    expected = [gradients(model, *batch) for batch in every]
    recompute(model, how)
    kernels.use(model, "varlen")
    head.wants_documents = True
    compile_layers(model, backend="aot_eager")
    for batch, right in zip(every, expected, strict=True):
        assert off(gradients(model, *batch), right) < 1e-4
    assert graphs() == 1


def test_fewer_rows_than_before_make_no_graph(graphs):
    """As at the end of a run: three rows are left, and one of padding for a rank that has none."""
    model, plain = made("llama"), made("llama")
    compile_layers(model, backend="aot_eager")
    whole = rows(7, 9)
    for count in (4, 4, 3, 1, 4):
        batch = [part.repeat(count, 1) for part in whole]
        assert off(gradients(model, *batch), gradients(plain, *batch)) < 1e-5
        assert graphs() == 1


def test_a_kernel_that_asks_the_device_is_not_compiled():
    model = made("llama")
    head = Head(model)
    kernels.use(model, "by_document")
    head.wants_documents = True
    compile_layers(model, backend="aot_eager")
    with pytest.raises(
        ModelError, match=r"train\.compile: a layer cannot be compiled: .* Set train.compile: false, or choose another"
    ):
        gradients(model)


def test_evaluation_is_not_compiled(graphs):
    model = made("llama").eval()
    compile_layers(model, backend="aot_eager")
    with torch.no_grad():
        for length in (3, 4, 5):
            packed_logits(model, *rows(length))
    assert graphs() == 0


def test_layers_that_cannot_be_told_are_not_compiled():
    odd = SimpleNamespace(config=SimpleNamespace(num_hidden_layers=3), modules=lambda: iter([torch.nn.Linear(1, 1)]))
    with pytest.raises(ModelError, match=r"cannot be told from its other parts; set train.compile: false"):
        compile_layers(odd)


def test_without_a_compiler_it_is_said_before_anything_starts(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    check_compiler(SimpleNamespace(train=SimpleNamespace(compile=False)))
    with pytest.raises(ConfigError, match=r"train\.compile: no C\+\+ compiler was found here"):
        check_compiler(SimpleNamespace(train=SimpleNamespace(compile=True)))
    monkeypatch.setenv("CXX", "/opt/bin/g++")
    check_compiler(SimpleNamespace(train=SimpleNamespace(compile=True)))
