import copy

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from sft_dist import head as module
from sft_dist.attention import packed_logits
from sft_dist.head import Head, Logits, Scores, scores_at, scores_of, targets_at
from sft_dist.layers import recompute
from sft_dist.loss import target_log_probs

VOCAB = 300
WIDE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip
FAMILIES = {
    "gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 2, "resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0},
    "gpt_neox": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
    "llama": WIDE,
    "qwen2": WIDE | {"tie_word_embeddings": True},
    "mistral": WIDE | {"sliding_window": 4},
    "phi": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},  # a bias
    "gemma2": WIDE | {"final_logit_softcapping": 0.7},
    "cohere": WIDE | {"logit_scale": 0.3, "pad_token_id": 0},
    "granite": WIDE | {"logits_scaling": 7.0},
}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setitem(module._PART_BYTES, "cpu", 4 * VOCAB * 64)
    monkeypatch.setattr(module, "_SLICE", 128)


def made(family, dtype=torch.float32):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=VOCAB, **FAMILIES[family])
    attention = "eager" if family == "gemma2" else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    for parameter in model.parameters():  # biases and norms too: none may be forgotten
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB, (3, 80), generator=generator)
    targets = torch.rand(3, 80, generator=generator) < 0.6
    targets[1], targets[:, 0] = False, False
    return tokens, torch.arange(40).repeat(3, 2), targets


def whole(model, batch):
    tokens, positions, targets = batch
    return target_log_probs(packed_logits(model, tokens, positions), tokens, targets)


@pytest.fixture(params=[False, True], ids=["in place", "as on a GPU"])
def way(request, monkeypatch):
    """How the exponentials are made."""
    monkeypatch.setitem(module._IN_ONE_PASS, "cpu", request.param)
    monkeypatch.setitem(module._ALIGNED, "cpu", 64 if request.param else 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_every_gradient_are_those_of_all_logits(family, batch, way):
    tokens, positions, targets = batch
    plain = made(family)
    model, count = copy.deepcopy(plain), int(targets.sum())
    Head(model)
    expected = whole(plain, batch)
    (-expected.sum() * 0.01).backward()
    places, labels = targets_at(tokens, targets, count)
    assert len(places) > 64, "several parts"
    scores = scores_at(model, tokens, positions, places, labels, grad_scale=0.5)
    (scores.loss * 0.01).backward()
    torch.testing.assert_close(scores.log_probs[:count], expected)
    torch.testing.assert_close(scores.loss, -expected.sum())
    assert not scores.log_probs[count:].any()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_in_16_bits_it_is_nearer_to_the_truth_than_all_logits_are(family, batch, way):
    """The truth: the same weights in fp64; the head's gradient is summed in fp32, not rounded a part at a time."""
    tokens, positions, targets = batch
    plain = made(family, torch.bfloat16)
    model, truth = copy.deepcopy(plain), copy.deepcopy(plain).double()
    Head(model)
    for one in (plain, truth):
        (-whole(one, batch).sum() * 0.01).backward()
    scores = scores_at(model, tokens, positions, *targets_at(tokens, targets, int(targets.sum())))
    (scores.loss * 0.01).backward()
    right = truth.get_output_embeddings().weight.grad
    errors = [
        (one.get_output_embeddings().weight.grad.double() - right).norm() / right.norm() for one in (model, plain)
    ]
    assert errors[0] < max(0.02, 1.2 * errors[1])


@pytest.mark.parametrize("family", ["gpt2", "phi", "gemma2", "granite"])
def test_rows_that_pad_the_vocabulary_change_nothing(family, batch, way, monkeypatch):
    """On a GPU the products are 320 wide here, and no token that is none takes any probability."""
    tokens, positions, targets = batch
    found, widths, linear = [], set(), F.linear
    monkeypatch.setattr(F, "linear", lambda *given: (made_ := linear(*given), widths.add(made_.shape[-1]))[0])
    for multiple in (1, 64):
        monkeypatch.setitem(module._ALIGNED, "cpu", multiple)
        model = made(family, torch.bfloat16)
        Head(model)
        scores = scores_at(model, tokens, positions, *targets_at(tokens, targets, int(targets.sum())))
        scores.loss.backward()
        found.append((scores.log_probs, {name: parameter.grad for name, parameter in model.named_parameters()}))
    assert {VOCAB, 320} <= widths
    torch.testing.assert_close(*found, rtol=2e-2, atol=2e-2)


def test_no_targets_are_a_loss_of_zero_whose_gradient_reaches_every_parameter(batch):
    tokens, positions, targets = batch
    model = made("llama")
    Head(model)
    scores = scores_at(model, tokens, positions, *targets_at(tokens, torch.zeros_like(targets), 0))
    scores.loss.backward()
    assert scores.loss.item() == 0.0
    assert [
        name for name, parameter in model.named_parameters() if parameter.grad is None or parameter.grad.any()
    ] == []


def test_a_head_that_is_frozen_gets_no_gradient(batch, way):
    tokens, positions, targets = batch
    model = made("llama", torch.bfloat16)
    Head(model)
    model.get_output_embeddings().weight.requires_grad_(False)
    scores_at(model, tokens, positions, *targets_at(tokens, targets, int(targets.sum()))).loss.backward()
    assert model.get_output_embeddings().weight.grad is None
    assert model.get_input_embeddings().weight.grad.any()


@torch.no_grad()
def test_a_model_that_is_only_asked_says_the_likeliest_token_too(batch, way):
    tokens, positions, targets = batch
    model = made("gemma2").eval()
    expected = packed_logits(model, tokens, positions)
    Head(model)
    places, labels = targets_at(tokens, targets, int(targets.sum()))
    for ours, theirs in zip(
        scores_at(model, tokens, positions, places, labels), scores_of(expected, places, labels), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(packed_logits(model, tokens, positions), expected, msg="called as ever")


@torch.no_grad()
def test_a_head_that_does_more_is_noticed_and_the_models_own_logits_are_taken(batch):
    tokens, positions, targets = batch
    model = made("llama").eval()
    plain, own = model.forward, torch.linspace(0.5, 1.5, VOCAB)

    def twisted(*args, **more):
        made = plain(*args, **more)
        made.logits = made.logits * own
        return made

    model.forward = twisted
    head = Head(model)

    def forward(*batch):
        return scores_at(model, *batch)

    def logits(tokens, positions):
        return packed_logits(model, tokens, positions)

    told = head.check(forward, logits, VOCAB, is_16_bit=False)
    assert "head: the model's own" in told
    assert head.is_whole
    expected = target_log_probs(logits(tokens, positions), tokens, targets)
    scores = forward(tokens, positions, *targets_at(tokens, targets, int(targets.sum())))
    torch.testing.assert_close(scores.log_probs[: len(expected)], expected)

    other = made("llama").eval()
    head = Head(other)
    told = head.check(
        lambda *batch: scores_at(other, *batch), lambda *batch: packed_logits(other, *batch), VOCAB, is_16_bit=False
    )
    assert (head.is_whole, told.startswith("head: at target tokens only")) == (False, True)


def test_logits_are_never_whole(batch, monkeypatch):
    tokens, positions, targets = batch
    model, shapes, linear = made("llama"), [], F.linear
    Head(model)

    def seen(hidden, weight, bias=None):
        out = linear(hidden, weight, bias)
        shapes.append(out.shape)
        return out

    monkeypatch.setattr(F, "linear", seen)
    scores_at(model, tokens, positions, *targets_at(tokens, targets, int(targets.sum()))).loss.backward()
    assert {shape for shape in shapes if shape[-1] == VOCAB} == {(64, VOCAB)}


def test_what_families_do_to_their_logits():
    assert Logits.of(AutoConfig.for_model("gpt2")) == Logits(1.0, 0.0)
    assert Logits.of(AutoConfig.for_model("cohere")).scale == 0.0625
    assert Logits.of(AutoConfig.for_model("gemma2")).cap == 30.0


def test_scores_of_no_places_are_none():
    scores = scores_of(torch.zeros(1, 3, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    assert isinstance(scores, Scores)
    assert (scores.loss.item(), len(scores.log_probs)) == (0.0, 0)


class Products(TorchDispatchMode):
    """How many matrix products gave numbers of the vocabulary."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) and made.shape[-1] == VOCAB
        return made


@pytest.mark.parametrize("is_whole", [False, True])
def test_logits_are_never_made_again_where_layers_are(is_whole, batch):
    """The head is not part of what is checkpointed; nor are all logits, where they are the way of a model."""
    tokens, positions, targets = (part[:1] for part in batch)
    model = made("llama").train()
    recompute(model, True)
    Head(model).is_whole = is_whole
    count = int(targets.sum())
    with Products() as seen:
        scores_at(model, tokens, positions, *targets_at(tokens, targets, count)).loss.backward()
    assert count <= 64, "one part"
    assert seen.count == 1
