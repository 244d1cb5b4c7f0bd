"""What the scaling model says is sent, beside what torch.distributed was really asked for in a step of two ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sft_dist.scaling import traffic
from sft_dist.schema import LoraConfig
from sft_dist.zero import zero_config
from tests.dist import tiny
from tests.workers import run_workers

ALWAYS = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}
KINDS = {"_allgather_base_": "gathered", "_reduce_scatter_base_": "reduced", "allreduce_": "reduced"}


class Asked(TorchDispatchMode):
    """Adds up the bytes of the whole tensors of collectives; single numbers (norms, losses, flags) are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = {"gathered": 0, "reduced": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("c10d::")
        if func.namespace == "c10d" and name in KINDS:
            largest = max((leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)), key=torch.numel)
            if largest.numel() > 1:
                self.bytes[KINDS[name]] += largest.numel() * largest.itemsize
        return func(*args, **(kwargs or {}))


def counted(topology, stage, precision, micro_batch_rows, more, is_planted=False, lora=None):
    zero = zero_config(f"ds_configs/zero{stage}.json")
    section = zero["zero_optimization"] = {**zero["zero_optimization"], **more}
    tiny.zero_config = lambda name: zero
    rows = {"precision": precision, "micro_batch_rows": micro_batch_rows}
    made, comms = tiny.engine(topology, stage, kind="llama", lora=lora, **rows)
    tiny.learn(made, comms, range(2))  # stage 3 learns the order of the modules
    with Asked() as asked:
        tiny.learn(made, comms, range(2, 3))
        if is_planted:
            comms.sum_tensor(torch.zeros(1000, dtype=torch.float64))
    sizes = [getattr(parameter, "ds_numel", parameter.numel()) for parameter in made.deepspeed.module.parameters()]
    small = section.get("stage3_param_persistence_threshold", 0)
    persistent = sum(size for size in sizes if size <= small)
    trained = sum(
        size
        for size, parameter in zip(sizes, made.deepspeed.module.parameters(), strict=True)
        if parameter.requires_grad
    )
    about = {"trained": trained, "persistent": persistent}
    foretold = traffic(section, sum(sizes), precision, **about).num_bytes(4 // micro_batch_rows)
    return asked.bytes, {"gathered": foretold["gathered"] + foretold["updated"], "reduced": foretold["reduced"]}, sum(sizes)


@pytest.mark.parametrize(
    ("stage", "precision", "micro_batch_rows", "more"),
    [
        (1, "fp32", 2, {}),
        (1, "bf16", 2, {}),
        (2, "bf16", 1, {}),
        (3, "bf16", 1, ALWAYS),
        (3, "bf16", 2, {}),  # everything is small enough to stay
    ],
)
def test_what_is_sent_is_what_was_foretold(stage, precision, micro_batch_rows, more):
    for asked, foretold, _ in run_workers(counted, 2, stage, precision, micro_batch_rows, more):
        assert asked == foretold


@pytest.mark.parametrize(("stage", "more"), [(1, {}), (2, {}), (3, ALWAYS)])
def test_of_adapters_too(stage, more):
    for asked, foretold, _ in run_workers(counted, 2, stage, "bf16", 1, more, lora=LoraConfig(rank=4)):
        at_the_ends = 4 * 2 * (2 * tiny.VOCAB * 32 + 32) if stage == 3 else 0  # nothing is learned before nor behind the layers
        assert foretold["gathered"] - asked["gathered"] == at_the_ends
        assert asked["reduced"] == foretold["reduced"]


def test_what_is_used_again_soon_is_kept_to_a_layer():
    reuse = {**ALWAYS, "stage3_max_reuse_distance": 12_000}
    [asked, foretold, parameters], _ = run_workers(counted, 2, 3, "fp32", 4, reuse)
    assert asked["gathered"] < 2 * 4 * parameters, "less than everything twice"
    assert abs(asked["gathered"] - foretold["gathered"]) <= 4 * parameters / 4


def test_the_count_sees_what_is_planted():
    [asked, foretold, _], _ = run_workers(counted, 2, 2, "fp32", 4, {}, is_planted=True)
    assert asked["reduced"] - foretold["reduced"] == 8 * 1000
