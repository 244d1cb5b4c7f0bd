"""The witness of the memory plan: the real engine under DeepSpeed, on fake tensors, measured by torch's own MemTracker.

Nothing is allocated, so that it runs for any size on any machine; the ranks are one real one and the word of a fake process
group for the others. A process can do this once: the group and DeepSpeed's state are global.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from sft_dist import head
from sft_dist.batch import derive_batch
from sft_dist.engine import Engine
from sft_dist.memory import DTYPES, Parts, give_storage
from sft_dist.model import build, model_config
from sft_dist.plan import Model
from sft_dist.schema import LoraConfig, ModelConfig, TrainConfig
from sft_dist.topology import Topology
from sft_dist.zero import zero_config


class Values(TorchDispatchMode):
    """A fake tensor has no value; DeepSpeed asks for norms and whether there was an overflow."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return {torch.bool: False, torch.uint8: 0, torch.int64: 1}.get(args[0].dtype, 1.0)
        return func(*args, **(kwargs or {}))


class MicroBatch:
    """Full rows, without values."""

    first_ordinal = 0

    def __init__(self, rows: int, seq_len: int) -> None:
        self.tokens = torch.zeros(rows, seq_len, dtype=torch.int64)
        self.targets = torch.ones(rows, seq_len, dtype=torch.bool)
        self.positions = torch.arange(seq_len).repeat(rows, 1)
        self.rows = range(rows)
        self.num_targets, self.num_documents = rows * (seq_len - 1), rows


@dataclass(frozen=True)
class Case:
    """A run whose memory is counted: a model from scratch, and what else its memory depends on; `rows` of a micro-batch."""

    model: dict[str, Any]
    vocab_size: int
    seq_len: int
    stage: str
    precision: str
    world_size: int
    rows: int
    checkpointing: bool
    lora: dict[str, Any] | None = None

    @property
    def config(self) -> ModelConfig:
        """As a run file has it; adapters may stand on random weights here."""
        adapted = LoraConfig(**self.lora) if self.lora is not None else None
        return ModelConfig(config=self.model).model_copy(update={"lora": adapted})

    @property
    def train(self) -> TrainConfig:
        """A step of two micro-batches."""
        batch = 2 * self.rows * self.world_size
        return TrainConfig(global_batch_rows=batch, micro_batch_rows=self.rows, max_steps=1, precision=self.precision)

    @property
    def zero(self) -> dict[str, Any]:
        """The DeepSpeed file."""
        return zero_config(f"ds_configs/zero{self.stage}.json")

    def made(self) -> Any:
        """The model's configuration."""
        return model_config(self.config, vocab_size=self.vocab_size, seq_len=self.seq_len, eos_id=0)

    def engine(self, built: torch.nn.Module, topology: Topology, device: torch.device) -> Engine:
        """The real one."""
        return Engine(built, self.zero, self.train, derive_batch(self.train, self.world_size, 1.0), topology, device)

    def foretold(self) -> Parts:
        """What the plan says of it."""
        made = self.made()
        with torch.device("meta"):
            meta = build(self.config, made, seed=0, gradient_checkpointing=False)
        planned = Model(self.config, made, meta, self.seq_len, self.precision)
        more = {"world_size": self.world_size, "rows": self.rows, "checkpointing": self.checkpointing}
        return planned.parts(self.zero, **more)


def measure(case: Case) -> dict[str, int]:
    """Peak bytes of one rank over two steps of two micro-batches, and of them those that offload keeps in host memory."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(case.world_size), DS_ACCELERATOR="cpu")
    dist.init_process_group("fake", rank=0, world_size=case.world_size, store=FakeStore())
    _let_ranks_agree()
    head._PART_BYTES["cpu"] = head._PART_BYTES["cuda"]
    tracker, made, dtype = MemTracker(), case.made(), DTYPES[case.precision]
    with torch.device("meta"):
        built = build(case.config, made, seed=0, gradient_checkpointing=case.checkpointing, dtype=dtype)
    with FakeTensorMode(), Values(), tracker:
        give_storage(built, dtype)
        torch.nn.Module._apply = lambda self, fn, recurse=True: self  # it is where it is to be, and as it is to be
        for parameter in built.parameters():
            if not parameter.requires_grad:  # the tracker would hang hooks on it, which torch refuses
                hooks = SimpleNamespace(remove=lambda: None)
                tracker._param_to_grad_hook_handles[parameter] = (hooks, hooks)
        engine = case.engine(built, Topology(world_size=case.world_size), torch.device("cpu"))

        def each_anew() -> bool:
            return bool(tracker.reset_mod_stats())  # by module, which it keeps of one forward pass only

        for _ in range(2):
            batches = [MicroBatch(case.rows, case.seq_len) for _ in range(2)]
            engine.learn(batches, denominator=1, learning_rate=1e-3, total=lambda loss: 1.0, should_abandon=each_anew)
        host = _host_bytes(engine, case.stage)
        peak = tracker.get_tracker_snapshot("peak")
    bytes_ = next(value["Total"] for device, value in peak.items() if device.type == "cpu")
    return {"peak": bytes_, "host": host}


def _let_ranks_agree() -> None:
    """What only a group of real ranks could do: agree."""
    import deepspeed.runtime.zero.partitioned_param_coordinator as coordinator
    from deepspeed.accelerator import get_accelerator

    coordinator.assert_ints_same_as_other_ranks = lambda *arguments, **more: None
    type(get_accelerator()).is_fp16_supported = lambda self: True

    Engine._clip_unwrapped = lambda self: 1.0


def _host_bytes(engine: Engine, stage: str) -> int:
    """What DeepSpeed has put into host memory, which on a CPU looks like the rest."""
    if "offload" not in stage:
        return 0
    optimizer, kept, gone = engine.deepspeed.optimizer, [], 0
    if stage.startswith("2"):
        kept += [*optimizer.single_partition_of_fp32_groups, optimizer.temp_grad_buffer_for_cpu_offload]
        kept += [tensor.grad for tensor in optimizer.single_partition_of_fp32_groups]
        kept += _tensors(optimizer.param_buffer_of_bit16_for_cpu_offload_groups)
        gone = sum(
            4 * tensor.numel() for tensor in optimizer.single_partition_of_fp32_groups
        )  # gradients until the step
    else:
        kept += [*optimizer.fp32_partitioned_groups_flat, optimizer.grad_partitions_flat_buffer]
        kept += [tensor.grad for tensor in optimizer.fp32_partitioned_groups_flat]
        kept += _tensors(optimizer.param_groups_fp16_flat_cpu_memory)
    kept += _tensors(dict(engine.adam.state))
    storages = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in kept if tensor is not None
    }
    return sum(storages.values()) + gone


def _tensors(values: Any) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return [values]
    inner = values.values() if isinstance(values, dict) else values if isinstance(values, (list, tuple)) else []
    return [tensor for value in inner for tensor in _tensors(value)]


if __name__ == "__main__":
    print(json.dumps(measure(Case(**json.loads(sys.argv[1])))))
