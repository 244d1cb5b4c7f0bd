"""Products in 8 bits: what is rounded and by how much, what is not, and that a document's numbers are its own."""

from __future__ import annotations

import copy
import dataclasses
import functools

import pytest
import torch
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from transformers import AutoConfig, AutoModelForCausalLM

from launch import parts
from launch.settle import Plan
from sft_dist import fp8
from sft_dist.attention import leak, packed_logits
from sft_dist.config import load
from sft_dist.errors import ModelError
from sft_dist.topology import Life, Topology
from tests.unit.prepared_runs import run_file

CPU = torch.device("cpu")


def made(**values):
    torch.manual_seed(0)
    values = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, **values}
    config = AutoConfig.for_model("llama", vocab_size=300, num_key_value_heads=2, **values)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")


def learned(model):
    tokens = torch.randint(300, (2, 48), generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return loss.item(), {name: parameter.grad.float() for name, parameter in model.named_parameters()}


def test_the_layers_products_are_rounded_and_nothing_else():
    plain = made()
    model = copy.deepcopy(plain)
    fp8.use(model, CPU)
    assert fp8.told(model) == "fp8: 14 linear layers, emulated on the CPU: right, and slow"
    assert list(plain.state_dict()) == list(model.state_dict())
    assert not isinstance(model.lm_head, type(model.model.layers[0].mlp.up_proj))
    (loss, gradients), (near, rounded) = learned(plain), learned(model)
    assert near == pytest.approx(loss, rel=2e-3)
    for name, of_plain in gradients.items():
        off = (rounded[name] - of_plain).norm() / of_plain.norm()
        assert 0.01 < off < 0.15, f"{name}: e4m3 has 3 bits behind the point, which is 6 % at most of each number"


def test_within_16_bits_nothing_is_rounded():
    plain, model = made(), made()
    fp8.use(model, CPU)
    with fp8.in_16_bits(model):
        assert learned(model)[0] == learned(plain)[0]
    assert learned(model)[0] != learned(plain)[0]


def test_a_scale_of_a_row_keeps_documents_apart_and_one_of_a_tensor_does_not():
    of_rows, of_tensors = made().eval(), made().eval()
    fp8.use(of_rows, CPU)
    recipe = dataclasses.replace(Float8LinearConfig.from_recipe_name("tensorwise"), emulate=True)
    convert_to_float8_training(of_tensors.model.layers, config=recipe)
    moved = []
    for model in (of_rows, of_tensors):
        model.model.embed_tokens.weight.data[::2] *= 30  # tokens of large numbers
        with torch.no_grad():
            moved.append(leak(functools.partial(packed_logits, model), 300)[0])
    assert moved[0] == 0.0 < moved[1]


def test_sides_that_do_not_fit_stay_in_16_bits():
    model = made(intermediate_size=100)
    fp8.use(model, CPU)
    assert fp8.told(model).startswith("fp8: 8 linear layers")
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_who_has_no_such_layer_is_told():
    config = AutoConfig.for_model("gpt2", vocab_size=300, n_layer=1, n_embd=32, n_head=2)
    with pytest.raises(ModelError, match=r"train\.fp8: GPT2LMHeadModel has no torch\.nn\.Linear in its layers"):
        fp8.use(AutoModelForCausalLM.from_config(config), CPU)


def test_that_is_told_before_any_process_group_and_planned_without_it(shards, tmp_path):
    run = run_file(tmp_path, shards / "out", shards / "sms", train__precision="bf16", train__fp8=True)
    made = Plan.of(load(run), Topology(), Life("test"))
    with pytest.raises(ModelError, match="GPT-2's are not of that kind"):
        parts.model(made)
    assert parts.model(made, with_weights=False)[0] is not None


def test_a_gpu_that_cannot_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(
        ModelError, match=r"train\.fp8: NVIDIA A100 has no products in 8 bits with a scale for each row"
    ):
        fp8.use(made(), torch.device("cuda"))


def kept_bytes(model):
    """What a forward pass keeps for the backward pass beside the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # it stays, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        packed_logits(model.train(), torch.zeros(1, 32, dtype=torch.long), torch.arange(32)[None]).sum()
    return sum(size for place, (size, _) in kept.items() if place not in weights)


def test_what_is_kept_is_what_plan_counts_for_16_bits():
    plain, model = made(), made()
    fp8.use(model, torch.device("cpu"))
    assert kept_bytes(model) == kept_bytes(plain) > 0
