"""What recomputation, compilation and tiles give: seconds a step and peak memory of each, on the same weights and rows.

python benchmarks/layer_policies.py [--model llama-1b] [--seq-len 4096] [--micro-batch 2] [--json benchmarks/results/layer_policies.json]

Each way is a process of its own: this trainer's engine at ZeRO 1 in bf16, micro-batches of random full rows of two documents each.
Losses must agree to 2e-3. Memory is what torch allocated on a GPU, resident on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pack import machine
from rich.console import Console
from rich.table import Table
from train_step import MODELS

WAYS: list[dict[str, Any]] = [
    {},
    {"compile": True},
    {"gradient_checkpointing": "selective"},
    {"gradient_checkpointing": "selective", "compile": True},
    {"gradient_checkpointing": True},
    {"gradient_checkpointing": "offload"},
    {"gradient_checkpointing": True, "mlp_tile_tokens": 1024},
]
MICRO_BATCHES, STEPS = 2, 4


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="small")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument(
        "--only", type=int, nargs="+", choices=range(len(WAYS)), help="these of the ways, counted from 0"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a way, as JSON: this process measures it
    return parser.parse_args()


def measure(given: argparse.Namespace, way: dict[str, Any]) -> dict[str, Any]:
    """One way, in this process."""
    from types import SimpleNamespace

    from sft_dist.attention import choose
    from sft_dist.batch import Batch
    from sft_dist.comms import Comms
    from sft_dist.engine import Engine
    from sft_dist.kernels import candidates
    from sft_dist.layers import tile_mlp
    from sft_dist.model import build, model_config
    from sft_dist.schema import ModelConfig, TrainConfig
    from sft_dist.topology import Topology
    from sft_dist.zero import zero_config

    is_gpu = torch.cuda.is_available()
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", **({} if is_gpu else {"DS_ACCELERATOR": "cpu"})}
    device = torch.device("cuda", 0) if is_gpu else torch.device("cpu")
    comms = Comms(Topology(), device)
    train = TrainConfig(global_batch_rows=given.micro_batch * MICRO_BATCHES, max_steps=10, precision="bf16", **way)
    wanted = ModelConfig(config=MODELS[given.model], dropout=0.0)
    made = model_config(wanted, vocab_size=50_257, seq_len=given.seq_len, eos_id=0)
    model = build(wanted, made, seed=0, gradient_checkpointing=train.gradient_checkpointing)
    if train.mlp_tile_tokens:
        tile_mlp(model, train.mlp_tile_tokens)
    batch = Batch(train.global_batch_rows or 0, given.micro_batch, MICRO_BATCHES, 1)
    engine = Engine(model, zero_config("ds_configs/zero1.json"), train, batch, Topology(), device)
    kernels = candidates("cuda" if is_gpu else "cpu", is_16_bit=True)
    choose(kernels, engine.use_kernel, engine.logits, made.vocab_size, is_16_bit=True)
    tokens = torch.randint(50_257, (given.micro_batch, given.seq_len), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(given.seq_len // 2).repeat(given.micro_batch, 2)
    targets, rows = positions > 0, range(given.micro_batch)
    one = SimpleNamespace(
        tokens=tokens, targets=targets, positions=positions, first_ordinal=0, rows=rows,
        num_targets=int(targets[:, 1:].sum()), num_documents=2 * given.micro_batch,
    )  # fmt: skip
    seconds, losses, began = [], [], time.perf_counter()
    for step in range(STEPS + 1):
        started = time.perf_counter()
        applied = engine.learn([one] * MICRO_BATCHES, denominator=one.num_targets * MICRO_BATCHES, learning_rate=1e-4)
        if applied is not None:
            losses.append(applied.loss_sum / one.num_targets / MICRO_BATCHES)
        if is_gpu:
            torch.cuda.synchronize()
            if step == 0:
                torch.cuda.reset_peak_memory_stats()
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() if is_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    kernel = engine.deepspeed.module.config._attn_implementation
    comms.close()
    return {
        "way": way, "attention": kernel, "first_step_seconds": seconds[0], "step_seconds": min(seconds[1:]),
        "peak_mib": peak / 2**20, "losses": losses, "all_seconds": time.perf_counter() - began,
    }  # fmt: skip


def main() -> None:
    """Measure all ways, print a table, leave it as JSON."""
    given = arguments()
    if given.one is not None:
        print(json.dumps(measure(given, json.loads(given.one))))
        return
    found = []
    for way in WAYS if given.only is None else [WAYS[number] for number in given.only]:
        words = ["--model", given.model, "--seq-len", given.seq_len, "--micro-batch", given.micro_batch]
        command = [sys.executable, __file__, *map(str, words), "--one", json.dumps(way)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        lines = done.stdout.strip().splitlines()
        found.append(json.loads(lines[-1]) if done.returncode == 0 else {"way": way, "failed": done.returncode})
    losses = next((one["losses"] for one in found if "losses" in one), [])
    table = Table(title=f"{given.model}, bf16, {given.micro_batch} x {given.seq_len:,} tokens a micro-batch")
    for name in ("way", "s / step", "peak MiB", "s of the first step", "losses off"):
        table.add_column(name, justify="left" if name == "way" else "right")
    for one in found:
        way = " ".join(f"{key}={str(value).lower()}" for key, value in one["way"].items()) or "all kept"
        if "failed" in one:
            table.add_row(way, "failed", "", "", "")
            continue
        off = max(abs(a - b) / b for a, b in zip(one["losses"], losses, strict=True))
        told = "DIFFER" if off > 2e-3 else f"{off:.0e}"
        table.add_row(
            way, f"{one['step_seconds']:.3f}", f"{one['peak_mib']:,.0f}", f"{one['first_step_seconds']:.1f}", told
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    if given.json:
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        settings = {"model": given.model, "seq_len": given.seq_len, "micro_batch": given.micro_batch}
        versions = {name: version(name) for name in ("torch", "deepspeed", "transformers")}
        report = {"machine": {**machine(), "gpu": gpu}, "versions": versions, "settings": settings, "ways": found}
        given.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
