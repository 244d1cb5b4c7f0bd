"""The memory plan beside two witnesses: torch's own count of what DeepSpeed allocates, and a step that must leave no trace."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from launch import fit
from sft_dist.errors import ConfigError
from tests import fake_engine
from tests.dist import tiny
from tests.fake_engine import Case
from tests.workers import run_workers

GPT2 = {"model_type": "gpt2", "n_layer": 3, "n_embd": 768, "n_head": 4}
LLAMA = {
    "model_type": "llama", "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 2,
}  # fmt: skip
# of more parameters than a bucket holds (5e7): of smaller models buckets, not yet full ones, are most, and overestimated
CASES = [
    (GPT2, "0", "fp32", 4, False),
    (GPT2, "1", "fp32", 4, True),
    (LLAMA, "1", "bf16", 8, False),
    (GPT2, "2", "bf16", 16, True),
    (LLAMA, "2", "fp32", 4, False),
    (LLAMA, "3", "bf16", 8, True),
    (GPT2, "3", "fp16", 4, False),
    (LLAMA, "2_offload", "bf16", 2, True),
    (GPT2, "3_offload", "bf16", 2, False),
]
ADAPTERS = [("1", "bf16", 4, True), ("2", "bf16", 8, False), ("3", "bf16", 8, True)]


def counted(topology, case):
    return fake_engine.measure(Case(**case))


@pytest.mark.parametrize(("model", "stage", "precision", "world_size", "checkpointing"), CASES)
def test_within_a_tenth_of_what_torch_counts(model, stage, precision, world_size, checkpointing):
    case = {
        "model": model, "stage": stage, "world_size": world_size, "rows": 3, "checkpointing": checkpointing,
        "vocab_size": 50_000, "seq_len": 256, "precision": precision,
    }  # fmt: skip
    [seen], foretold = run_workers(counted, 1, case), Case(**case).foretold()
    assert foretold.total == pytest.approx(seen["peak"] - seen["host"], rel=0.1)
    assert foretold.host == pytest.approx(seen["host"], rel=0.1)


@pytest.mark.parametrize(("stage", "precision", "world_size", "checkpointing"), ADAPTERS)
def test_the_same_of_adapters_beside_a_frozen_model(stage, precision, world_size, checkpointing):
    case = {
        "model": LLAMA, "stage": stage, "world_size": world_size, "rows": 3, "checkpointing": checkpointing,
        "vocab_size": 50_000, "seq_len": 256, "precision": precision, "lora": {"rank": 64},
    }  # fmt: skip
    [seen], foretold = run_workers(counted, 1, case), Case(**case).foretold()
    assert foretold.total == pytest.approx(seen["peak"] - seen["host"], rel=0.1)


def dry(topology, stage, precision, is_dry):
    made, comms = tiny.engine(topology, stage, precision=precision, micro_batch_rows=2)
    if is_dry:
        scale, step = made.loss_scale, made.adam_step
        stepped = []
        adam_step = type(made.adam).step
        type(made.adam).step = lambda adam, closure=None: stepped.append(adam.is_open()) or adam_step(adam, closure)
        fit.dry_step(None, made, tiny.rows(9, 2))
        type(made.adam).step = adam_step
        assert (made.loss_scale, made.adam_step) == (scale, step)
        assert stepped, "AdamW ran"
        assert all(stepped)
    curve = tiny.learn(made, comms, range(3))
    return curve, [fragment.values["master"].tolist() for fragment in made.fragments()]


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16"), (3, "bf16"), ("3_offload", "fp32")]
)
def test_a_dry_step_moves_nothing(stage, precision):
    assert run_workers(dry, 2, stage, precision, True) == run_workers(dry, 2, stage, precision, False), "to the bit"


def out_of_memory(topology):
    made, _ = tiny.engine(topology, 2, micro_batch_rows=2)

    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    made._scores = fails
    fit.of_this_machine = lambda topology: fit.Gpu("NVIDIA X", 8.0 * fit.GIB)
    fit.model_of = lambda plan: None
    fit.needed = lambda plan, model: SimpleNamespace(total=7.0 * fit.GIB)
    fit.all_choices = lambda plan, model, card: []
    config = SimpleNamespace(zero="ds_configs/zero2.json", train=SimpleNamespace(gradient_checkpointing=False))
    plan = SimpleNamespace(topology=topology, config=config, batch=SimpleNamespace(micro_batch_rows=2))
    try:
        fit.dry_step(plan, made, tiny.rows(0, 2))
    except ConfigError as error:
        return str(error)
    return None


def test_memory_that_runs_out_is_told_in_numbers():
    [told] = run_workers(out_of_memory, 1)
    assert told == (
        "train.micro_batch_rows: 2: the memory of NVIDIA X (8.0 GiB) ran out in a dry step; 7.0 GiB were predicted (CUDA out of memory. "
        "Tried to allocate 2.00 GiB.). Nothing that is shipped fits: use more GPUs, larger ones, or a smaller model or seq_len"
    )


def test_the_witness_counts_what_is_planted():
    """A tensor that lives as long as the engine does shows in its count, to the byte."""
    case = {"model": GPT2, "stage": "2", "world_size": 4, "rows": 1, "checkpointing": True, "vocab_size": 500, "seq_len": 64, "precision": "fp32"}
    [plain], [more] = run_workers(counted, 1, case), run_workers(planted, 1, case)
    assert more["peak"] - plain["peak"] == 64 << 20


def planted(topology, case):
    initialize = fake_engine.Engine.__init__

    def with_more(self, *arguments, **more):
        initialize(self, *arguments, **more)
        self.planted = torch.zeros(16 << 20)

    fake_engine.Engine.__init__ = with_more
    return fake_engine.measure(Case(**case))


