"""What a row costs, beside masks that are counted and torch's own counter of FLOPs."""

from __future__ import annotations

import numpy as np
import pytest
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPTNeoConfig, LlamaConfig, MistralConfig, Qwen2Config

from sft_dist.attention import packed_logits
from sft_dist.flops import Cost, flops_per_row, matmul_parameters, seen_pairs, windows
from sft_dist.gpus import names, of_driver
from tests.dist import tiny


@pytest.mark.parametrize("window", [None, 1, 3, 8])
def test_pairs_are_those_of_the_mask(window):
    lengths = np.array([1, 5, 8, 12])
    counted = 0
    for length in lengths:
        behind = np.arange(length)[:, None] - np.arange(length)
        counted += int(((behind >= 0) & (behind < (window or length))).sum())
    assert seen_pairs(lengths, window) == counted


def test_each_layer_has_its_window():
    assert windows(LlamaConfig(num_hidden_layers=2)) == [None, None]
    assert windows(MistralConfig(num_hidden_layers=2, sliding_window=8)) == [8, 8]
    assert windows(MistralConfig(num_hidden_layers=2, sliding_window=None)) == [None, None]
    mixed = Qwen2Config(num_hidden_layers=3, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    assert windows(mixed) == [None, 8, 8]
    neo = GPTNeoConfig(num_layers=2, attention_types=[[["global", "local"], 1]], window_size=16)
    assert windows(neo) == [None, 16]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_matrices_cost_what_torch_counts(kind):
    model = tiny.model(kind=kind).train()
    model.set_attn_implementation("eager")  # whose products are all counted, over all pairs
    batch = tiny.rows(0, 2)
    with FlopCounterMode(display=False) as counter:
        packed_logits(model, batch.tokens, batch.positions).sum().backward()
    cost, count = Cost(model, model.config), batch.tokens.numel()
    all_pairs = cost.of_pair * len(cost.windows) * 2 * tiny.SEQ_LEN**2
    assert counter.get_total_flops() == (cost.of_token + cost.of_target) * count + all_pairs
    assert cost.of_token + cost.of_target == 6 * matmul_parameters(model)


def test_the_exact_cost_is_that_of_equal_documents_in_full_rows():
    model = tiny.model()
    cost = Cost(model, model.config).flops(np.full(4, 16), 64)
    row = flops_per_row(model.config, matmul_parameters(model), seq_len=64, documents_per_row=4.0)
    assert cost == pytest.approx(row)
    assert Cost(model, model.config).flops(np.array([64]), 64) > cost, "one long document sees more"


def test_what_is_not_learned_has_no_gradient_of_its_own():
    model = tiny.model()
    whole = Cost(model, model.config)
    for parameter in model.parameters():
        parameter.requires_grad_(requires_grad=False)
    frozen = Cost(model, model.config)
    assert (frozen.of_token, frozen.of_target) == (whole.of_token * 4 / 6, whole.of_target * 4 / 6)


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA A10", "a10-24gb"),
        ("NVIDIA A10G", None),
        ("NVIDIA L4", "l4-24gb"),
        ("NVIDIA L40", None),
        ("NVIDIA H200", "h200-141gb"),
        ("NVIDIA H100 NVL", None),
        ("AMD Instinct MI300X OAM", "mi300x-192gb"),
    ],
)
def test_a_data_sheet_is_only_taken_for_the_very_card(driver, name):
    found = of_driver(driver)
    assert (found and found.name) == name
    assert name is None or name in names()
