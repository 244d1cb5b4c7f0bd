"""What thousands of micro-batches do to the gradient: DeepSpeed's default accumulation beside this trainer's in fp32.

python benchmarks/accumulation.py [--json benchmarks/results/accumulation.json] [--figure docs/figures/accumulation.svg]

A GPT-2 of 2 layers and width 64 in bf16, ZeRO 2 on one rank, rows of 32 tokens of WikiText, one a micro-batch. Told are

* the relative error of the gradient that Adam is given after 8 to 7,680 micro-batches, against the same bf16 micro-batch
  gradients added up in fp64 by plain PyTorch; and how far those are from the gradient in fp32, which is bf16's own doing;
* the training loss of `--steps` steps at a batch of `--batch` rows, with both, and in plain fp32 PyTorch: same first weights, rows,
  learning rate, clipping. Adam divides each gradient by its own size, so an error there does not show here as such.

The default is this trainer without the two keys that it gives DeepSpeed; nothing else differs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pack import machine
from rich.console import Console
from rich.table import Table

from sft_dist.attention import packed_logits
from sft_dist.batch import derive_batch
from sft_dist.comms import Comms
from sft_dist.config import load
from sft_dist.data.build import prepare
from sft_dist.data.loader import Loader, Step
from sft_dist.data.shards import Shards
from sft_dist.engine import Engine
from sft_dist.loss import target_log_probs
from sft_dist.model import build, model_config
from sft_dist.optimizer import decay_groups
from sft_dist.schema import ModelConfig, TrainConfig
from sft_dist.topology import Topology
from sft_dist.zero import zero_config
from tests.dist import gradients
from tests.workers import run_workers

ROOT = Path(__file__).resolve().parent.parent
MODEL = {"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 2}
WAYS = {"default": "DeepSpeed's default", "ours": "fp32 accumulation"}
COUNTS = [8, 16, 32, 64, 128, 256, 512, 1024, 1920, 3840, 7680]
TRAIN = {"learning_rate": 2e-3, "max_grad_norm": 1.0, "weight_decay": 0.0}
FP32_ROWS = 128  # of a forward pass in plain fp32, where the micro-batch does not matter
DEADLINE_SECONDS = 3600.0


# ---- the rows and the model ----


def rows_on_disk(folder: Path) -> Path:
    """The training rows: WikiText of the examples, 32 tokens of a vocabulary of 1,000 pieces each."""
    overrides = [
        f"prepare.out={folder}/shards",
        f"prepare.sources=[{{path: {ROOT}/examples/wikitext/data/train.txt, schema: text}}]",
        "prepare.validation_sources=[]",
        "prepare.seq_len=32",
        "prepare.tokenizer={sentencepiece: {vocab_size: 1000}}",
    ]
    prepare(load(ROOT / "examples/wikitext/run.yaml", overrides).prepare)
    return folder / "shards/train"


def steps(shards: Shards, count: int, batch: int, micro_batch_rows: int = 1) -> Iterator[Step]:
    """`count` steps of `batch` rows from the beginning of the stream, all on one rank."""
    loader = Loader(shards, Topology(), micro_batch_rows=micro_batch_rows)
    return loader.steps(start=0, end=count * batch, global_batch_rows=batch)


def fresh_model(shards: Shards) -> torch.nn.Module:
    """The same first weights each time."""
    config, about = ModelConfig(config=MODEL), shards.manifest
    made = model_config(config, vocab_size=about.vocab_size, seq_len=about.seq_len, eos_id=about.eos_id)
    return build(config, made, seed=0, gradient_checkpointing=False)


def engine(topology: Topology, shards: Shards, way: str, batch: int, **train: Any) -> Engine:
    """A bf16 engine at ZeRO 2 that accumulates in one of the `WAYS`."""
    comms = Comms(topology, torch.device("cpu"))
    config = TrainConfig(global_batch_rows=batch, max_steps=1, precision="bf16", **train)
    with gradients.as_deepspeed_does(way == "default"):
        return Engine(
            fresh_model(shards),
            zero_config("ds_configs/zero2.json"),
            config,
            derive_batch(config, 1, 1.0),
            topology,
            comms.device,
        )


# ---- measured, each in a process of its own ----


def accumulated(topology: Topology, folder: Path, way: str, counts: list[int]) -> dict[int, gradients.Parts]:
    """The gradient that Adam was given after each of `counts` micro-batches; the weights stay the first ones."""
    shards = Shards.open(folder)
    made = engine(topology, shards, way, max(counts), beta1=0.0, max_grad_norm=None)
    (whole,) = steps(shards, 1, max(counts))
    parts = {}
    for count in counts:
        (step,) = steps(shards, 1, count)
        made.learn(step.micro_batches, denominator=whole.num_targets, learning_rate=0.0)
        parts[count] = gradients.applied(made)
    return parts


def witness(topology: Topology, folder: Path, dtype: torch.dtype, counts: list[int]) -> dict[int, dict[str, Any]]:
    """The same from plain PyTorch, with the gradient of each micro-batch in `dtype`."""
    shards = Shards.open(folder)
    (whole,) = steps(shards, 1, max(counts))
    plain = fresh_model(shards).to(dtype).train()
    return gradients.summed(plain, whole.micro_batches, whole.num_targets, counts)


def curve(topology: Topology, folder: Path, way: str, count: int, batch: int) -> dict[str, Any]:
    """Training loss and gradient norm of each of `count` steps of `batch` micro-batches."""
    shards = Shards.open(folder)
    made = engine(topology, shards, way, batch, **TRAIN)
    losses, norms = [], []
    for step in steps(shards, count, batch):
        applied = made.learn(step.micro_batches, denominator=step.num_targets, learning_rate=TRAIN["learning_rate"])
        losses.append(applied.loss_sum / step.num_targets)
        norms.append(applied.grad_norm)
    return {"losses": losses, "norms": norms}


def plain_curve(topology: Topology, folder: Path, count: int, batch: int) -> dict[str, Any]:
    """The same of plain PyTorch in fp32, many rows at a time."""
    shards = Shards.open(folder)
    plain = fresh_model(shards).train()
    adam = torch.optim.AdamW(decay_groups(plain, TRAIN["weight_decay"]), lr=TRAIN["learning_rate"])
    losses, norms = [], []
    for step in steps(shards, count, batch, FP32_ROWS):
        total = 0.0
        for rows in step.micro_batches:
            tokens, targets = rows.tokens.long(), rows.targets
            loss = (
                -target_log_probs(packed_logits(plain, tokens, rows.positions), tokens, targets).sum()
                / step.num_targets
            )
            loss.backward()
            total += loss.item()
        losses.append(total)
        norms.append(torch.nn.utils.clip_grad_norm_(plain.parameters(), TRAIN["max_grad_norm"]).item())
        adam.step()
        adam.zero_grad()
    return {"losses": losses, "norms": norms}


def together(*calls: tuple[Any, ...]) -> list[Any]:
    """What each `(function, *arguments)` gives on a rank of its own, as many at a time as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda call: run_workers(call[0], 1, *call[1:], deadline=DEADLINE_SECONDS)[0], calls))


def errors(folder: Path, counts: list[int]) -> dict[str, list[float]]:
    """Relative error at each of `counts`: of both ways against the bf16 gradients, and of those against fp32."""
    default, ours, bf16, fp32 = together(
        (accumulated, folder, "default", counts),
        (accumulated, folder, "ours", counts),
        (witness, folder, torch.bfloat16, counts),
        (witness, folder, torch.float32, counts),
    )
    as_parts = {count: {name: (0, value) for name, value in bf16[count].items()} for count in counts}
    return {
        "default": [gradients.relative_error([default[count]], bf16[count]) for count in counts],
        "ours": [gradients.relative_error([ours[count]], bf16[count]) for count in counts],
        "bf16": [gradients.relative_error([as_parts[count]], fp32[count]) for count in counts],
    }


# ---- told ----


def show(console: Console, results: dict[str, Any]) -> None:
    table = Table(title="relative error of the accumulated gradient", title_justify="left")
    for column in ("micro-batches", *WAYS.values(), "bf16 itself, against fp32"):
        table.add_column(column, justify="right")
    for count, *values in zip(results["counts"], *results["errors"].values(), strict=True):
        table.add_row(f"{count:,}", *(f"{value:.2g}" for value in values))
    console.print(table)
    table = Table(title=f"training loss, {results['batch']:,} micro-batches a step", title_justify="left")
    for column in ("step", "plain fp32", *(f"{name} {what}" for name in WAYS.values() for what in ("loss", "- fp32"))):
        table.add_column(column, justify="right")
    curves = results["curves"]
    for step, loss in enumerate(curves["fp32"]["losses"]):
        others = [curves[way]["losses"][step] for way in WAYS]
        cells = [text for other in others for text in (f"{other:.4f}", f"{other - loss:+.5f}")]
        table.add_row(str(step + 1), f"{loss:.4f}", *cells)
    console.print(table)


def draw(results: dict[str, Any], path: Path) -> None:
    """Both tables as one SVG of two panels, the same bytes each time."""
    import matplotlib
    from matplotlib import pyplot

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "accumulation", "font.size": 9})
    colours, counts, curves = {"default": "#c0392b", "ours": "#1f6fb2"}, results["counts"], results["curves"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), facecolor="white", layout="constrained")
    for way, name in WAYS.items():
        left.plot(counts, results["errors"][way], "o-", color=colours[way], markersize=3, label=name)
    left.plot(counts, results["errors"]["bf16"], ":", color="#666666", label="bf16 itself, against fp32")
    left.set(xscale="log", yscale="log", xlabel="micro-batches accumulated", ylabel="relative error of the gradient")
    left.set_xticks(counts[::2], [f"{count:,}" for count in counts[::2]])
    left.set_xticks([], minor=True)
    plain = curves["fp32"]["losses"]
    numbers = range(1, len(plain) + 1)
    right.plot(numbers, plain, color="#666666", linewidth=5, alpha=0.35, label="plain fp32 PyTorch")
    inset = right.inset_axes((0.47, 0.55, 0.5, 0.38))
    for way, name in WAYS.items():
        losses = curves[way]["losses"]
        right.plot(numbers, losses, color=colours[way], linewidth=1.2, label=name)
        inset.plot(numbers, [loss - other for loss, other in zip(losses, plain, strict=True)], color=colours[way])
    inset.set_title("minus plain fp32", fontsize=8)
    inset.tick_params(labelsize=7)
    right.set(xlabel=f"step of {results['batch']:,} micro-batches", ylabel="training loss")
    left.legend(frameon=False)
    right.legend(frameon=False, loc="lower left")
    for panel in (left, right, inset):
        panel.grid(color="#dddddd", linewidth=0.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    """Measure, print two tables, leave them as JSON and as a figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="micro-batches to accumulate")
    parser.add_argument("--steps", type=int, default=16, help="of the loss curve")
    parser.add_argument("--batch", type=int, default=3840, help="micro-batches of a step of the loss curve")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path, metavar="SVG", help="needs matplotlib")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = rows_on_disk(Path(folder))
        of_counts = errors(rows, given.counts)
        default, ours, fp32 = together(
            (curve, rows, "default", given.steps, given.batch),
            (curve, rows, "ours", given.steps, given.batch),
            (plain_curve, rows, given.steps, given.batch),
        )
    results = {
        "machine": machine(),
        "versions": {name: version(name) for name in ("torch", "deepspeed", "transformers")},
        "model": MODEL,
        "train": TRAIN,
        "batch": given.batch,
        "counts": given.counts,
        "errors": of_counts,
        "curves": {"default": default, "ours": ours, "fp32": fp32},
    }
    show(Console(width=None if sys.stdout.isatty() else 140), results)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(results, indent=2) + "\n")
    if given.figure:
        draw(results, given.figure)


if __name__ == "__main__":
    main()
