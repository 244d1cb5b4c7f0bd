"""Whole runs on a small, learnable task, as the equivalence classes need them."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import numpy as np
import torch
import yaml

from sft_dist.layout import Fragment
from sft_dist.limits import StopRequest
from sft_dist.manifest import read_manifest
from sft_dist.store import Reader

SPAM, HAM = ("win", "cash", "prize", "claim", "free"), ("home", "lunch", "sorry", "later", "love")
FILLER = ("the", "a", "you", "we", "to", "at", "now", "then", "and", "is", "very", "today")


def write_records(path: Path, count: int = 260) -> None:
    """Labelled messages whose words tell the label; lengths differ, so that rows hold different numbers of targets."""
    draw = random.Random(0)
    lines = []
    for number in range(count):
        label, words = draw.choice((("spam", SPAM), ("ham", HAM)))
        text = " ".join(draw.choice(words + FILLER) for _ in range(draw.randint(3, 30)))
        lines.append(f"{label}\t{text} {number}")
    path.write_text("\n".join(lines) + "\n")


def run_file(folder: Path, **train) -> Path:
    """A run file on those records."""
    write_records(folder / "messages")
    config = {
        "run_dir": str(folder / "run"),
        "prepare": {
            "sources": [
                {"path": str(folder / "messages"), "schema": "label", "delimiter": "\t", "text": 1, "label": 0}
            ],
            "template": "Spam or ham?\n{text}\nAnswer:",
            "tokenizer": {"sentencepiece": {"vocab_size": 340}},
            "seq_len": 128,
            "validation_fraction": 0.2,
            "out": str(folder / "shards"),
        },
        "model": {"config": {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2}},
        "train": {
            "global_batch_rows": 8, "micro_batch_rows": 4, "max_steps": 12, "learning_rate": 3e-3, "precision": "fp32",
            "weight_decay": 0.01, "warmup_ratio": 0.1, **train,
        },
        "evaluate": {"samples": 1, "max_new_tokens": 3},
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


class StopAt(StopRequest):
    """The wish of one rank alone, once the run's own metrics show that step."""

    def __init__(self, run_dir: Path, step: int) -> None:
        super().__init__()
        self.run_dir, self.step = run_dir, step

    def is_wanted(self) -> bool:
        if any(line["step"] >= self.step and "loss" in line for line in curve(self.run_dir)):
            self.cause = "the test"
        return self.cause is not None


def run(topology, path, overrides=(), stop_at=None, stopping_rank=0):
    """One rank of a whole run, through the same parts that torchrun's ranks are built from."""
    import os

    from launch import train
    from sft_dist.config import load
    from sft_dist.topology import Life

    torch.set_num_threads(1)
    os.environ["WORLD_SIZE"] = str(topology.world_size)
    config = load(path, overrides)
    stop = StopRequest()
    if stop_at is not None and topology.rank == stopping_rank:
        stop = StopAt(Path(config.run_dir), stop_at)
    plan = train.Plan.of(config, topology, Life("test"))
    return train.run_plan(plan, stop)


def curve(run_dir: Path) -> list[dict]:
    """The records of a run's metrics file."""
    try:
        return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    except (FileNotFoundError, ValueError):
        return []


def numbers(run_dir: Path) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    return [(line["loss"], line["grad_norm"]) for line in curve(run_dir) if "loss" in line]


def measured(run_dir: Path, step: int) -> dict[str, float]:
    """What was measured on held-out data at a step."""
    (line,) = [line for line in curve(run_dir) if line["step"] == step and "validation_loss" in line]
    return {name: value for name, value in line.items() if name.startswith("validation_")}


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint in full, by kind (master, exp_avg, exp_avg_sq) and name, whoever saved which part."""
    manifest = read_manifest(checkpoint)
    made = {}
    for name, length, kinds in manifest["tensors"]["parameters"]:
        values = {kind: torch.empty(length) for kind in kinds}
        Reader(checkpoint, manifest).fill([Fragment(name, length, 0, values)])
        made |= {f"{kind}/{name}": value for kind, value in values.items()}
    return made


def charts(run_dir: Path) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """By (TensorBoard's run, tag) the (x, value) of all scalars, as TensorBoard's own reader has them."""
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    events = EventMultiplexer(size_guidance={"scalars": 0}).AddRunsFromDirectory(str(run_dir / "tensorboard")).Reload()
    return {
        (run, tag): [(event.step, event.value) for event in events.Scalars(run, tag)]
        for run, tags in events.Runs().items()
        for tag in tags["scalars"]
    }


def check_charts(run_dir: Path) -> None:
    """What `metrics.jsonl` has of losses is on TensorBoard's charts, over each x-axis, without overlap or gap."""
    lines, found = curve(run_dir), charts(run_dir)
    for name, tag in (("loss", "train/loss"), ("validation_loss", "validation/loss")):
        kept = [line for line in lines if name in line]
        assert kept, name
        values = [np.float32(line[name]) for line in kept]
        flat = tag.replace("/", "_")
        xs = {
            (".", tag): [line["step"] for line in kept],
            ("by_target_tokens", f"by_target_tokens/{flat}"): [line["target_tokens"] for line in kept],
            ("by_gpu_hours", f"by_gpu_hours/{flat}"): [round(line["gpu_hours"] * 1e6) for line in kept],
        }
        for which, wanted in xs.items():
            assert found[which] == list(zip(wanted, values, strict=True)), which
            assert all(a < b for a, b in itertools.pairwise(wanted)), which
