"""Adapters under ZeRO against a plain loop of PyTorch and peft, and their checkpoints over ranks and stages."""

from __future__ import annotations

import pytest
import torch

from sft_dist import adapter
from sft_dist.attention import packed_logits
from sft_dist.checkpoint import Checkpoints
from sft_dist.loss import target_log_probs
from sft_dist.retention import Retention
from sft_dist.schema import LoraConfig
from sft_dist.state import TrainState
from tests.dist import tiny
from tests.workers import run_workers

LORA = LoraConfig(rank=4, alpha=8)
NF4 = LoraConfig(rank=4, alpha=8, quantize="nf4")


def plain_peft(kind, quantize):
    """The witness: what peft's own `get_peft_model` makes of the same model, its loss from all logits, torch's AdamW."""
    import peft

    made = tiny.model(kind=kind)
    if quantize:
        adapter.quantise(made)
    is_gpt2 = kind == "gpt2"
    names = ["c_attn", "c_proj", "c_fc"] if is_gpt2 else "all-linear"
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=names, fan_in_fan_out=is_gpt2, task_type=peft.TaskType.CAUSAL_LM
    )
    torch.manual_seed(0)
    return peft.get_peft_model(made, config).train()


def reference(steps, kind="gpt2", quantize=None):
    model = plain_peft(kind, quantize)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.1)
    curve = []
    for step in range(steps):
        batch = tiny.rows(step)
        logits = packed_logits(model, batch.tokens, batch.positions)
        loss = -target_log_probs(logits, batch.tokens, batch.targets).sum() / batch.targets.sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        curve.append((loss.item(), norm.item()))
    return curve


# else stage 3 keeps all weights of so small a model gathered
LET_GO = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}


def learned(topology, stage, lora, steps, **more):
    section = LET_GO if stage == 3 else {}
    made, comms = tiny.engine(topology, stage, lora=lora, micro_batch_rows=2, section=section, **more)
    if lora.quantize and stage == 3:
        cut = [p for p in made.deepspeed.module.parameters() if hasattr(p, "quant_state")]
        assert cut
        assert all(p.numel() == 0 and p.ds_tensor.dtype == torch.uint8 for p in cut), "let go"
        assert all(p.ds_tensor.numel() * 2 * topology.world_size == p.quant_state.shape.numel() for p in cut), "4 bits"
    curve = tiny.learn(made, comms, range(steps))
    return curve, sorted(fragment.name for fragment in made.fragments())


@pytest.mark.parametrize(
    ("stage", "kind", "checkpointing", "lora"),
    [
        (0, "gpt2", False, LORA), (1, "llama", True, LORA), (2, "gpt2", True, NF4), (3, "llama", True, LORA),
        (3, "llama", True, NF4), ("3_offload", "gpt2", True, NF4),
    ],  # fmt: skip
)
def test_it_learns_what_a_plain_loop_of_peft_learns(stage, kind, checkpointing, lora):
    """Six steps with decay, and clipping that bites; the product is no longer zero then."""
    ranks = run_workers(learned, 2, stage, lora, 6, kind=kind, gradient_checkpointing=checkpointing)
    tiny.assert_same_curve(ranks[0][0], reference(6, kind, lora.quantize), tolerance=2e-6)
    names = {name for _, held in ranks for name in held}
    assert names
    assert all(".lora_A." in name or ".lora_B." in name for name in names), "a checkpoint holds nothing of the base"


def continued(topology, folder, stage, lora, precision, first, last):
    """Go on at step `first` from what is in the folder, and save after `last`."""
    about = {"precision": precision, "global_batch_rows": 8, "gradient_checkpointing": stage == 3}
    made, comms = tiny.engine(topology, stage, lora=lora, micro_batch_rows=2, **about)
    checkpoints = Checkpoints(
        folder, identity={}, attachments={}, retention=Retention(9), stage=0, comms=comms
    )
    if first:
        for fragment in made.fragments():
            for values in fragment.values.values():
                values.fill_(9.0)
        _, state, _ = checkpoints.restore(made.fragments)
        made.restored(state.adam_step)
    curve = tiny.learn(made, comms, range(first, last))
    checkpoints.save(made.fragments, TrainState(step=last, adam_step=made.adam_step))
    return curve


@pytest.mark.parametrize(
    ("saved", "loaded", "lora", "precision"),
    [
        ((3, 2), (3, 2), LORA, "fp32"),
        ((3, 4), (1, 2), LORA, "bf16"),
        ((2, 2), (1, 1), NF4, "bf16"),
        ((3, 2), (3, 2), NF4, "bf16"),
        ((3, 4), (2, 2), NF4, "fp32"),
    ],
)
def test_a_checkpoint_of_adapters_goes_on_anywhere(tmp_path, saved, loaded, lora, precision):
    whole = run_workers(continued, saved[1], tmp_path / "whole", saved[0], lora, precision, 0, 6)[0]
    run_workers(continued, saved[1], tmp_path / "cut", saved[0], lora, precision, 0, 3)
    rest = run_workers(continued, loaded[1], tmp_path / "cut", loaded[0], lora, precision, 3, 6)[0]
    if saved == loaded:
        assert rest == whole[3:], "to the bit"
    tiny.assert_same_curve(rest, whole[3:], tolerance=5e-6 if precision == "fp32" else 2e-3)
