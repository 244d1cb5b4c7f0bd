"""The other witness of the memory plan: the same steps for real on one GPU, and what its allocator counted."""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace

import torch

from sft_dist import adapter
from sft_dist.comms import Comms
from sft_dist.model import build
from sft_dist.topology import Topology
from tests.fake_engine import Case


def measure(case: Case) -> dict[str, int]:
    """Peak bytes of torch's CUDA allocator over two steps of two micro-batches of full rows; of the host nothing is counted."""
    assert case.world_size == 1, "on one GPU"
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    device, topology = torch.device("cuda", 0), Topology()
    comms = Comms(topology, device)
    alone = case.config.model_copy(update={"lora": None})
    built = build(alone, case.made(), seed=0, gradient_checkpointing=case.checkpointing)
    if (lora := case.config.lora) is not None:
        if lora.quantize is not None:
            adapter.quantise(built)
        adapter.add(built, lora, seed=0)
    engine = case.engine(built, topology, device)
    rows, seq_len = case.rows, case.seq_len
    targets = torch.ones(rows, seq_len, dtype=torch.bool)
    targets[:, 0] = False
    positions = torch.arange(seq_len).repeat(rows, 1) % (seq_len // 2)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        tokens = torch.randint(case.vocab_size, (rows, seq_len))
        batch = SimpleNamespace(
            tokens=tokens, targets=targets, positions=positions, rows=range(rows), first_ordinal=0,
            num_targets=rows * (seq_len - 1), num_documents=2 * rows,
        )  # fmt: skip
        engine.learn([batch, batch], denominator=2 * rows * seq_len, learning_rate=1e-5)
    peak = torch.cuda.max_memory_allocated()
    comms.close()
    return {"peak": peak, "host": 0}


if __name__ == "__main__":
    print(json.dumps(measure(Case(**json.loads(sys.argv[1])))))
