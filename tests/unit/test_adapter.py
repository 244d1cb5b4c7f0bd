"""Adapters of a model: which layers get them, what they stand on, and what is left when they are merged."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM

from launch import parts
from sft_dist import adapter
from sft_dist.errors import ModelError
from sft_dist.flops import Cost, matmul_parameters
from sft_dist.layout import kept
from sft_dist.memory import NF4_BYTES, Alive, Size, Traced
from sft_dist.memory import parts as parts_of
from sft_dist.schema import LoraConfig
from tests.dist import tiny

TOKENS = torch.arange(16)[None] % 7
KINDS = pytest.mark.parametrize("kind", ["gpt2", "llama"])


def adapted(kind="llama", **values):
    """A tiny model with adapters of rank 4."""
    return tiny.model(kind=kind, lora=LoraConfig(**{"rank": 4, **values})).eval()


def moved(model):
    """As after some steps."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in kept(model):
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


@KINDS
def test_at_first_nothing_is_added_and_the_base_is_frozen(kind):
    model = adapted(kind)
    assert torch.equal(logits(model), logits(tiny.model(kind=kind).eval()))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [name for name, _ in kept(model)]
    assert len(trained) == 2 * len(list(adapter.linear_layers(tiny.model(kind=kind))))
    assert all(".lora_" in name for name in trained)


def test_they_are_a_function_of_the_seed():
    one, same, other = (tiny.model(kind="llama") for _ in range(3))
    for model, seed in ((one, 3), (same, 3), (other, 4)):
        torch.rand(seed)  # whatever was drawn before
        adapter.add(model, LoraConfig(), seed)
    pairs = [(dict(kept(one)), dict(kept(model))) for model in (same, other)]
    is_equal = [all(torch.equal(mine[name], theirs[name]) for name in mine) for mine, theirs in pairs]
    assert is_equal == [True, False]


@pytest.mark.parametrize("wanted", [["q_proj", "v_proj"], ["self_attn.q_proj", "model.layers.1.self_attn.v_proj"]])
def test_layers_are_named_by_their_ends_or_in_full(wanted):
    names = {name.partition(".lora_")[0] for name, _ in kept(adapted(target_modules=wanted))}
    assert {f"model.layers.{number}.self_attn.q_proj" for number in (0, 1)} <= names
    assert len(names) == (4 if "q_proj" in wanted else 3)


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        (
            "q_prj",
            "is no linear layer of LlamaForCausalLM; did you mean q_proj? There are q_proj, k_proj, v_proj, o_proj, ",
        ),
        ("lm_head", "the head is not adapted, leave it out. There are q_proj"),
        ("embed_tokens", "is no linear layer of LlamaForCausalLM; There are q_proj, "),
    ],
)
def test_a_name_that_is_none_is_told_with_those_there_are(wanted, told):
    with pytest.raises(ModelError) as raised:
        adapted(target_modules=["v_proj", wanted])
    assert str(raised.value).startswith(f"model.lora.target_modules: {wanted!r}")
    assert told in str(raised.value)


def test_what_peft_cannot_adapt_is_told():
    model = MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=8, state_size=2, num_hidden_layers=1))
    with pytest.raises(
        ModelError, match=r"^model.lora: peft cannot adapt MambaForCausalLM: .*Name other target_modules$"
    ):
        adapter.add(model, LoraConfig(), 0)


@KINDS
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_merged_it_answers_as_before(kind, quantize):
    model = moved(adapted(kind, quantize=quantize))
    before, plain = logits(model), tiny.model(kind=kind).eval()
    adapter.merge(model)
    names = [name for name, _ in model.named_parameters()]
    assert names == [name for name, _ in plain.named_parameters()]
    assert all(parameter.shape == plain.get_parameter(name).shape for name, parameter in model.named_parameters())
    assert (logits(model) - before).abs().max() < 2e-6 < 1e-2 < (before - logits(plain)).abs().max()


@KINDS
def test_in_nf4_it_is_near_the_weights_and_the_same_on_any_number_of_threads(kind):
    digests, threads = [], torch.get_num_threads()
    for number in (1, 2):
        torch.set_num_threads(number)
        model = tiny.model(kind=kind).eval()
        adapter.quantise(model)
        digests.append(adapter.base_digest(model))
    torch.set_num_threads(threads)
    assert digests[0] == digests[1]
    plain = tiny.model(kind=kind).eval()
    error = (logits(model) - logits(plain)).norm() / logits(plain).norm()
    assert 1e-3 < error < 0.2


def test_gradients_of_the_base_in_nf4_are_those_of_what_its_bits_stand_for():
    """By torch alone: a plain model that holds the values, with the same adapters beside it."""
    model = moved(adapted(quantize="nf4")).train()
    plain = copy.deepcopy(model)
    for name, module in [pair for pair in plain.named_modules() if hasattr(pair[1], "was_turned")]:
        plain.set_submodule(name, adapter._unpacked(module))
    for one in (model, plain):
        one(TOKENS).logits.square().mean().backward()
    mine, theirs = dict(kept(model)), dict(kept(plain))
    assert mine.keys() <= theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name].grad, theirs[name].grad, rtol=1e-5, atol=1e-8)


def test_the_digest_stands_for_the_base_alone():
    model = adapted()
    digest = adapter.base_digest(model)
    assert adapter.base_digest(moved(model)) == digest
    assert adapter.base_digest(adapted(rank=8, target_modules=["v_proj"])) == digest
    assert adapter.base_digest(adapted(quantize="nf4")) != digest
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[3] += 1e-6
    assert adapter.base_digest(model) != digest


@KINDS
def test_a_folder_of_them_is_loaded_by_peft_and_by_transformers(kind, tmp_path):
    model = moved(adapted(kind, alpha=24))
    tiny.model(kind=kind).save_pretrained(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    adapter.save(model, tmp_path / "adapter", str(tmp_path / "base"))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 24, str(tmp_path / "base"))
    assert ("c_attn" if kind == "gpt2" else "q_proj") in config["target_modules"]
    tensors = load_file(tmp_path / "adapter" / adapter.FILE)
    assert len(tensors) == len(list(kept(model)))
    again = adapter.loaded(tiny.model(kind=kind), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()), logits(model))


def test_scales_of_nf4_go_where_the_weights_will_be():
    packed = adapted(quantize="nf4")
    adapter.scales_to(packed, torch.device("meta"))
    states = [state for p in packed.parameters() if (state := getattr(p, "quant_state", None)) is not None]
    assert states
    assert {str(each.device) for state in states for each in (state.absmax, state.code)} == {"meta"}


def test_at_stage_3_weights_in_nf4_are_shared_out_and_their_scales_are_not():
    size = Size(trained=100, largest=50, frozen=10_000, packed=8_000, unpacked=4_000)
    zero = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 10}}
    made = parts_of(size, Traced(Alive(0)), zero, world_size=8, precision="bf16")
    assert made.weights == 2 * 100 / 8 + (2 * 2_000 + 8_000 / 2) / 8 + 8_000 * 4 / 64
    assert size.gathered_bytes(2, 10**9) == 2 * 2_100 + 8_000 / 2, "two share a byte"
    assert size.gathered_bytes(2, 3_050) == (2 * 2_100 + 8_000 / 2) / 2, "so many elements at a time"
    assert Size(100, 50, 10_000).gathered_bytes(2, 5_000) == 2 * 5_000


def test_what_is_counted_of_them():
    plain, model, packed = tiny.model(kind="llama"), adapted(), adapted(quantize="nf4")
    of_base, learned = sum(p.numel() for p in plain.parameters()), sum(p.numel() for _, p in kept(model))
    told = f"{of_base + learned:,} parameters, of which {learned:,} are trained"
    assert parts.describe(model) == parts.describe(packed) == told
    assert parts.checkpoint_bytes(model) == parts.checkpoint_bytes(packed) == 12 * learned
    size = Size.of(model, LoraConfig(quantize="nf4"))
    assert (size.trained, size.frozen, size.parameters) == (learned, of_base, of_base + learned)
    assert size.packed == 2 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 48)
    assert size.frozen_bytes(2) == 2 * (of_base - size.packed) + NF4_BYTES * size.packed
    held = [(p, p.quant_state) for p in packed.parameters() if hasattr(p, "quant_state")]
    stored = sum(p.numel() + 4 * state.absmax.numel() for p, state in held)
    assert stored == NF4_BYTES * size.packed
    cost, whole = Cost(model, model.config), Cost(plain, plain.config)
    of_adapters = sum(p.numel() for _, p in kept(model))
    assert cost.of_token == pytest.approx(whole.of_token * 4 / 6 + 6 * of_adapters)
    assert Cost(packed, packed.config).of_token == cost.of_token
    assert matmul_parameters(model) == round((cost.of_token + cost.of_target) / 6)
