"""What a checkpoint costs: the stall of the step loop, the write, the way back, memory; beside DeepSpeed's own and `dd`.

python benchmarks/checkpoint.py [--layers 24] [--width 1024] [--stages 2 3] [--json benchmarks/results/checkpoint.json]

Two ranks of a GPT-2 on this machine, fp32 masters and Adam moments. Every figure of a stage is taken in the same run: a plain
copy of the same bytes into warm memory, an asynchronous save, DeepSpeed's `save_checkpoint`, `dd conv=fsync` of the same bytes
(one a rank, at once), reading the checkpoint's bytes and restoring from them. On a GPU, start it with `--ranks` GPUs visible.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from memory import begin_peak, peak_mib

from sft_dist.batch import derive_batch
from sft_dist.checkpoint import Checkpoints
from sft_dist.comms import Comms
from sft_dist.engine import Engine
from sft_dist.files import BLOCK_BYTES
from sft_dist.model import build, model_config
from sft_dist.preflight import rehearse
from sft_dist.retention import Retention
from sft_dist.schema import ModelConfig, TrainConfig
from sft_dist.state import TrainState
from sft_dist.store import Run, check_index, index
from sft_dist.topology import Topology
from sft_dist.zero import zero_config

VOCAB, SEQ_LEN = 50_257, 64


def main() -> None:
    """Measure, print a table, leave it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--every-seconds", type=float, default=30.0, help="cadence for the overhead on steps a second")
    parser.add_argument("--train-seconds", type=float, default=90.0, help="0: do not measure that overhead")
    parser.add_argument("--plan-ranks", type=int, default=1024, help="simulated ranks of the 70 B planning")
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {"stages": {}, "machine": machine()}
    for stage in options.stages:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            result["stages"][stage] = on_ranks(options.ranks, measure, stage, Path(folder), options)
            show_stage(stage, result["stages"][stage])
    result["planning"] = planning(options.plan_ranks)
    print("planning: " + ", ".join(f"{name} {value:,.2f}" for name, value in result["planning"].items()))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def on_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """What rank 0 returns; the others take part."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        queue = context.SimpleQueue()
        topologies = [Topology(rank, ranks, rank, f"file://{folder}/rendezvous") for rank in range(ranks)]
        processes = [context.Process(target=_rank, args=(queue, function, t, *arguments)) for t in topologies]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit(f"a rank failed: exit codes {[process.exitcode for process in processes]}")
        return queue.get()


def _rank(queue: Any, function: Callable[..., Any], topology: Topology, *arguments: Any) -> None:
    os.environ.update(RANK=str(topology.rank), WORLD_SIZE=str(topology.world_size), LOCAL_RANK=str(topology.local_rank))
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)  # DeepSpeed calls what torch renames
    value = function(topology, *arguments)
    if topology.is_main:
        queue.put(value)
    os._exit(0)


def measure(topology: Topology, stage: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Every figure of one stage on this rank; seconds are those of the slowest rank, memory the largest."""
    device = torch.device("cuda", topology.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    comms = Comms(topology, device)
    engine = make_engine(topology, stage, options, comms)
    learn(engine, 0)
    checkpoints = Checkpoints(
        folder / "ours", identity={}, attachments={}, retention=Retention(1), stage=stage, comms=comms
    )
    before = begin_peak()
    rehearse(checkpoints, engine.fragments)
    fragments = list(engine.fragments())
    num_bytes = sum(value.nbytes for fragment in fragments for value in fragment.values.values())
    stalls, writes = [], []
    for number in range(options.repeats):
        comms.barrier()
        stalls.append(timed(lambda step=number + 1: checkpoints.begin(engine.fragments, TrainState(step=step))))
        writes.append(checkpoints.finish().write_seconds)
    extra = peak_mib() - before
    out = {
        "bytes_per_rank": num_bytes,
        "plain_copy_seconds": worst(comms, plain_copy(comms, num_bytes, options.repeats)),
        "stall_seconds": worst(comms, statistics.median(stalls)),
        "write_seconds": worst(comms, statistics.median(writes)),
        "extra_memory_of_shard": worst(comms, extra * 2**20 / num_bytes),
        "dd_seconds": worst(comms, statistics.median([dd(comms, folder, num_bytes) for _ in range(options.repeats)])),
    }
    out |= reading(comms, folder / "ours", checkpoints, engine, options.repeats)
    own = [timed(lambda: engine.deepspeed.save_checkpoint(str(folder / "deepspeed"))) for _ in range(options.repeats)]
    out["deepspeed_stall_seconds"] = worst(comms, statistics.median(own))
    if options.train_seconds:
        out |= overhead(comms, engine, checkpoints, options)
    return {**out, **ratios(out), "parameters": sum(comms.sum([sum(f.numel for f in fragments)]))}


def make_engine(topology: Topology, stage: int, options: argparse.Namespace, comms: Comms) -> Engine:
    """A GPT-2 under ZeRO."""
    sizes = {"n_layer": options.layers, "n_embd": options.width, "n_head": max(1, options.width // 64)}
    config = ModelConfig(config={"model_type": "gpt2", **sizes})
    made = model_config(config, vocab_size=VOCAB, seq_len=SEQ_LEN, eos_id=0)
    train = TrainConfig(global_batch_rows=topology.world_size, max_steps=1, precision="fp32")
    model = build(config, made, seed=0, gradient_checkpointing=False)
    batch = derive_batch(train, topology.world_size, 1.0)
    return Engine(model, zero_config(f"ds_configs/zero{stage}.json"), train, batch, topology, comms.device)


class Batch:
    """One row of random tokens."""

    def __init__(self, ordinal: int) -> None:
        self.tokens = torch.randint(VOCAB, (1, SEQ_LEN), generator=torch.Generator().manual_seed(ordinal))
        self.targets = torch.arange(SEQ_LEN)[None] > 0
        self.positions = torch.arange(SEQ_LEN)[None]
        self.first_ordinal, self.rows, self.sets = ordinal, [ordinal], None
        self.num_targets, self.num_documents = SEQ_LEN - 1, 1


def learn(engine: Engine, step: int) -> None:
    """One step."""
    engine.learn([Batch(step)], denominator=engine.topology.world_size * (SEQ_LEN - 1), learning_rate=1e-5)


def timed(act: Callable[[], Any]) -> float:
    """Seconds that it takes."""
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def plain_copy(comms: Comms, num_bytes: int, repeats: int) -> float:
    """Seconds of a plain copy of as many bytes, in one piece, into warm (and where there is a GPU pinned) memory."""
    target = torch.zeros(num_bytes // 4, pin_memory=comms.device.type == "cuda")
    source = torch.ones(num_bytes // 4, device=comms.device)

    def copy() -> None:
        target.copy_(source, non_blocking=True)
        if source.is_cuda:
            torch.cuda.synchronize()

    seconds = []
    for _ in range(repeats):
        comms.barrier()
        seconds.append(timed(copy))
    return statistics.median(seconds)


def worst(comms: Comms, value: float) -> float:
    """The largest of the ranks' values."""
    return max(comms.gather(value))


def dd(comms: Comms, folder: Path, num_bytes: int) -> float:
    """Seconds that `dd conv=fsync` takes for as many bytes a rank, all ranks at once."""
    path = folder / f"dd-{comms.topology.rank}"
    count = -(-num_bytes // BLOCK_BYTES)
    comms.barrier()
    command = ["dd", "if=/dev/zero", f"of={path}", f"bs={BLOCK_BYTES}", f"count={count}", "conv=fsync"]
    seconds = timed(lambda: subprocess.run(command, check=True, capture_output=True))
    path.unlink()
    return seconds


def reading(comms: Comms, folder: Path, checkpoints: Checkpoints, engine: Engine, repeats: int) -> dict[str, float]:
    """Restoring beside reading the same bytes, both from the page cache and, where one may empty it, from the disk."""
    path = next(folder.glob("step-*")) / f"shard-{comms.topology.rank + 1:05d}.safetensors"
    out, memory = {}, torch.zeros(path.stat().st_size, dtype=torch.uint8)
    for kind in ("cached", "cold"):
        reads, restores, gathers = [], [], []
        for _ in range(repeats):
            if not forget(comms, kind):
                break
            reads.append(timed(lambda: read(path, memory)))
            forget(comms, kind)
            restores.append(timed(lambda: checkpoints.restore(engine.fragments)))
            comms.barrier()
            gathers.append(timed(lambda: engine.restored(1)))
        if reads:
            out[f"read_seconds_{kind}"] = worst(comms, statistics.median(reads))
            out[f"restore_seconds_{kind}"] = worst(comms, statistics.median(restores))
            # masters to weights, on every rank
            out[f"weights_seconds_{kind}"] = worst(comms, statistics.median(gathers))
    return out


def forget(comms: Comms, kind: str) -> bool:
    """Empty the page cache for `cold`; whether that was possible."""
    done = True
    if kind == "cold" and comms.topology.is_main:
        try:
            os.sync()
            Path("/proc/sys/vm/drop_caches").write_text("1")
        except OSError:
            done = False
    done = comms.broadcast(done)
    comms.barrier()
    return done


def read(path: Path, memory: torch.Tensor) -> None:
    """Every byte, into warm memory that is as large: what a restore cannot do without."""
    raw = memoryview(memory.numpy())
    with path.open("rb", buffering=0) as file:
        at = 0
        while count := file.readinto(raw[at : at + BLOCK_BYTES]):
            at += count


def overhead(comms: Comms, engine: Engine, checkpoints: Checkpoints, options: argparse.Namespace) -> dict[str, float]:
    """Steps a second without saves and with one every so many seconds."""
    rates, step = [], options.repeats
    for every in (None, options.every_seconds):
        began = saved = time.perf_counter()
        before = step
        while comms.broadcast(time.perf_counter() - began) < options.train_seconds:
            learn(engine, step)
            step += 1
            if every is not None and comms.broadcast(time.perf_counter() - saved) >= every:
                saved = time.perf_counter()
                checkpoints.begin(engine.fragments, TrainState(step=step))
        rates.append((step - before) / (time.perf_counter() - began))
        checkpoints.finish()
    return {"steps_per_second": rates[0], "steps_per_second_saving": rates[1], "overhead": 1 - rates[1] / rates[0]}


def ratios(out: dict[str, float]) -> dict[str, float]:
    """What the issue of a checkpoint's cost is judged by."""
    made = {
        "stall_of_plain_copy": out["stall_seconds"] / out["plain_copy_seconds"],
        "stall_of_deepspeed": out["stall_seconds"] / out["deepspeed_stall_seconds"],
        "write_speed_of_dd": out["dd_seconds"] / out["write_seconds"],
    }
    for kind in ("cached", "cold"):
        if f"read_seconds_{kind}" in out:
            whole = out[f"restore_seconds_{kind}"] + out[f"weights_seconds_{kind}"]
            made[f"restore_of_read_{kind}"] = out[f"restore_seconds_{kind}"] / out[f"read_seconds_{kind}"]
            made[f"restore_with_weights_of_read_{kind}"] = whole / out[f"read_seconds_{kind}"]
    return made


def planning(ranks: int) -> dict[str, float]:
    """Metadata alone of a 70 B Llama at stage 3: what the coordinator spends to describe a save, and to plan a restore."""
    pieces = [llama_piece(rank, ranks) for rank in range(ranks)]
    begin_peak()
    began = time.perf_counter()
    files = {piece["name"]: piece["entry"] for piece in pieces}
    tensors = index(pieces)
    text = json.dumps({"files": files, "tensors": tensors}, separators=(",", ":"))
    described = time.perf_counter()
    peak_save = peak_mib()
    again = json.loads(text)
    check_index(again["tensors"], again["files"])
    return {
        "ranks": ranks,
        "describe_seconds": described - began,
        "plan_seconds": time.perf_counter() - described,
        "manifest_mb": len(text) / 1e6,
        "of_it_digests_mb": sum(len(entry["blocks"]) for entry in files.values()) * 35 / 1e6,
        "runs": sum(len(shard["runs"]) for shard in tensors["shards"].values()),
        "coordinator_peak_mib": max(peak_save, peak_mib()),
    }


def llama_piece(rank: int, ranks: int) -> dict[str, Any]:
    """What rank `rank` would report of Llama 70 B's parameters: 80 layers of 8,192, grouped queries, 28,672 in the middle."""
    width, middle, keys, vocabulary = 8192, 28_672, 1024, 128_256
    layer = {
        "self_attn.q_proj": width * width, "self_attn.k_proj": width * keys, "self_attn.v_proj": width * keys,
        "self_attn.o_proj": width * width, "mlp.gate_proj": width * middle, "mlp.up_proj": width * middle,
        "mlp.down_proj": width * middle, "input_layernorm": width, "post_attention_layernorm": width,
    }  # fmt: skip
    shapes = {f"model.layers.{n}.{name}.weight": size for n in range(80) for name, size in layer.items()}
    shapes |= {
        "model.embed_tokens.weight": vocabulary * width,
        "lm_head.weight": vocabulary * width,
        "model.norm.weight": width,
    }
    runs, kinds = [], ("master", "exp_avg", "exp_avg_sq")
    for name, length in shapes.items():
        part = -(-length // ranks)
        numel = max(0, min(part, length - rank * part))
        if numel:
            runs.append(Run(name, length, kinds, rank * part, numel))
    size = 12 * sum(run.numel for run in runs)
    entry = {"bytes": 4096 + size, "blocks": ["0" * 32] * -(-(4096 + size) // BLOCK_BYTES)}
    return {"name": f"shard-{rank + 1:05d}.safetensors", "entry": entry, "begin": 4096, "runs": runs}


def machine() -> dict[str, Any]:
    """Where it was measured."""
    import deepspeed

    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = {"python": platform.python_version(), "torch": torch.__version__, "deepspeed": deepspeed.__version__}
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "device": device,
        **versions,
    }


def show_stage(stage: int, out: dict[str, float]) -> None:
    """The table of one stage."""
    print(f"ZeRO {stage}: {out['parameters'] / 1e6:,.0f} M parameters, {out['bytes_per_rank'] / 1e9:.2f} GB a rank")
    for name, value in out.items():
        if name not in ("parameters", "bytes_per_rank"):
            print(f"  {name.replace('_', ' '):32}{value:>10.3f}")


if __name__ == "__main__":
    main()
