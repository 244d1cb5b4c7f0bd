"""The other witness of the memory plan: the same steps for real on one GPU, and what its allocator counted."""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace
from typing import Any

import torch

from sft_dist.batch import derive_batch
from sft_dist.comms import Comms
from sft_dist.engine import Engine
from sft_dist.model import build, model_config
from sft_dist.schema import ModelConfig, TrainConfig
from sft_dist.topology import Topology
from sft_dist.zero import zero_config


def measure(
    *,
    model: dict[str, Any],
    vocab_size: int,
    seq_len: int,
    stage: str,
    precision: str,
    world_size: int,
    rows: int,
    checkpointing: bool,
) -> dict[str, int]:
    """Peak bytes of torch's CUDA allocator over two steps of two micro-batches of full rows; of the host nothing is counted."""
    assert world_size == 1, "on one GPU"
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    device, topology = torch.device("cuda", 0), Topology()
    comms = Comms(topology, device)
    train = TrainConfig(global_batch_rows=2 * rows, micro_batch_rows=rows, max_steps=1, precision=precision)
    config = ModelConfig(config=model)
    made = model_config(config, vocab_size=vocab_size, seq_len=seq_len, eos_id=0)
    built = build(config, made, seed=0, gradient_checkpointing=checkpointing)
    zero = zero_config(f"ds_configs/zero{stage}.json")
    engine = Engine(built, zero, train, derive_batch(train, 1, 1.0), topology, device)
    targets = torch.ones(rows, seq_len, dtype=torch.bool)
    targets[:, 0] = False
    positions = torch.arange(seq_len).repeat(rows, 1) % (seq_len // 2)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        tokens = torch.randint(vocab_size, (rows, seq_len))
        batch = SimpleNamespace(tokens=tokens, targets=targets, positions=positions, rows=range(rows), first_ordinal=0)
        engine.learn([batch, batch], denominator=2 * rows * seq_len, learning_rate=1e-5)
    peak = torch.cuda.max_memory_allocated()
    comms.close()
    return {"peak": peak, "host": 0}


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
