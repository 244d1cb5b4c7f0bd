"""An optimizer step of this trainer beside those of others: speed, memory, start-up, on the same weights, rows and machine.

python benchmarks/train_step.py [--model small] [--peers PYTHON] [--json benchmarks/results/train_step.json]

Each trainer of contestants.py starts in a process of its own, `--repeats` times in turns, from the same weights and on the
same packed paragraphs of WikiText (GPT-2's tokens). Two shapes of data: `text`, where every token is learned, and `answers`,
where the last half or sixth of each document is, a third in all. No speed is told unless the losses of the first three
steps agree with the plain loop's.

Of each step the minimum and the median over the repeats are taken, and their mean over the steps is told; what is judged is
the median. A trainer that fails, by a lack of memory say, is left out from there on, and the others go on. MFU counts what the model needs (6 FLOPs a matrix parameter and token, the head at targets only, attention within documents)
against a matrix product measured in the same run. Memory is resident on a CPU, allocated by torch on a GPU, from the first
step on. Start-up ends with the first step: imports, weights, proofs, building. What it weighs in a short run is told as the
seconds of ten steps, start-up included, computed from those of the first step and of the later ones.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from contestants import Task
from pack import machine
from prepare import end_on_sigterm
from rich.console import Console
from rich.table import Table

from sft_dist.config import load
from sft_dist.data.build import prepare
from sft_dist.data.loader import Loader
from sft_dist.data.shards import Shards
from sft_dist.flops import matmul_parameters
from sft_dist.model import build, model_config
from sft_dist.schema import ModelConfig
from sft_dist.topology import Topology

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TOKENIZER = ROOT / "examples/tokenizers/gpt2"
WARM_UP_STEPS = 2
COMPARED_STEPS = 3
SHORT_RUN_STEPS = 10
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3}  # relative; in bf16 the ways of keeping fp32 weights round differently
MODELS: dict[str, dict[str, Any]] = {
    # narrow ones begin with larger weights: with 0.02 their losses would hardly depend on what a token sees, and agree anyway
    "toy": {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "initializer_range": 0.1},
    "small": {"model_type": "gpt2", "n_layer": 4, "n_embd": 256, "n_head": 4, "initializer_range": 0.05},
    "gpt2": {"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12},
    "gpt2-xl": {"model_type": "gpt2", "n_layer": 48, "n_embd": 1600, "n_head": 25},
    "llama-1b": {
        "model_type": "llama", "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    },
}  # fmt: skip
NAMES = {
    "zero0": "sft-dist, ZeRO 0",
    "zero1": "sft-dist, ZeRO 1",
    "zero2": "sft-dist, ZeRO 2",
    "compiled": "sft-dist, ZeRO 1, compiled",
    "bare": "its head and kernel, no DeepSpeed",
    "plain": "plain PyTorch loop",
    "fsdp2": "the same under FSDP2",
    "trainer": "HF Trainer",
    "trl": "TRL SFTTrainer",
}
# by device and model: a number, of whom it is a share, the goal, and whether it is to be reached at least
GOALS: dict[tuple[str, str], list[tuple[str, str | None, float, bool]]] = {
    ("cpu", "small"): [
        ("cpu_seconds", "plain", 1.03, False),
        ("peak_mib", "plain", 0.75, False),
        ("tokens_per_second", "trl", 1.8, True),
    ],
    **{
        ("cuda", model): [
            ("mfu", None, mfu, True),
            ("wall_seconds", "bare", 1.03, False),
            ("tokens_per_second", "trl", 2.0, True),
            ("peak_mib", "trl", 0.6, False),
        ]
        for model, mfu in {"gpt2": 0.45, "gpt2-xl": 0.60, "llama-1b": 0.60}.items()
    },
}
PEERS = {"trainer": ["accelerate", "transformers"], "trl": ["trl", "datasets", "accelerate"]}


# ---- what all are given ----


def write_rows(folder: Path, seq_len: int, count: int) -> dict[str, Path]:
    """`count` rows of packed paragraphs of WikiText from the beginning of an epoch, as .npz, for each shape of data."""
    lines = (ROOT / "examples/wikitext/data/train.txt").read_text().splitlines()
    paragraphs = [line.strip() for line in lines if line.strip() and not line.startswith(" = ")]
    (folder / "paragraphs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in paragraphs))
    overrides = [
        f"prepare.out={folder}/shards",
        f"prepare.sources=[{{path: {folder}/paragraphs.jsonl, schema: text}}]",
        "prepare.validation_sources=[]",
        f"prepare.seq_len={seq_len}",
        f"prepare.tokenizer={TOKENIZER}",
    ]
    prepare(load(ROOT / "examples/wikitext/run.yaml", overrides).prepare)
    loader = Loader(Shards.open(folder / "shards/train"), Topology(), micro_batch_rows=count)
    (step,) = loader.steps(start=0, end=count, global_batch_rows=count)
    (rows,) = step.micro_batches
    tokens, targets, positions = rows.tokens.numpy(), rows.targets.numpy(), rows.positions.numpy()
    is_padding = rows.documents.numpy() < 0
    documents = np.cumsum(positions == 0).reshape(positions.shape)
    is_answer = positions >= lengths_of(positions) * np.where(documents % 2, 1 / 2, 5 / 6)
    shapes = {"text": targets, "answers": targets & is_answer}
    for name, learned in shapes.items():
        parts = {"tokens": tokens, "targets": learned, "positions": positions, "is_padding": is_padding}
        np.savez(folder / f"{name}.npz", **parts)
    return {name: folder / f"{name}.npz" for name in shapes}


def lengths_of(positions: np.ndarray) -> np.ndarray:
    """Length of the document that each token is in, [rows, length].

    >>> lengths_of(np.array([[0, 1, 2, 0, 1]])).tolist()
    [[3, 3, 3, 2, 2]]
    """
    begins = np.flatnonzero(positions == 0)
    lengths = np.diff(np.append(begins, positions.size))
    return np.repeat(lengths, lengths).reshape(positions.shape)


def write_model(folder: Path, name: str, seq_len: int) -> tuple[Any, int]:
    """The same first weights for all, on disk; returns the configuration and the number of matrix parameters but the head."""
    transformers.logging.disable_progress_bar()
    wanted = ModelConfig(config=MODELS[name])
    made = model_config(wanted, vocab_size=50_257, seq_len=seq_len, eos_id=50_256)
    model = build(wanted, made, seed=0, gradient_checkpointing=False)
    model.save_pretrained(folder)
    return made, matmul_parameters(model) - model.get_output_embeddings().weight.numel()


def needed(rows: Path, made: Any, inner: int) -> dict[str, int]:
    """Tokens, targets and FLOPs of all rows; padding counts for nothing, though it is computed."""
    with np.load(rows) as file:
        positions, is_padding, targets = file["positions"], file["is_padding"], file["targets"]
    tokens, num_targets = int((~is_padding).sum()), int(targets[:, 1:].sum())
    pairs = int((positions[~is_padding].astype(np.int64) + 1).sum())  # each token sees itself and those before it
    width = (getattr(made, "head_dim", None) or made.hidden_size // made.num_attention_heads) * made.num_attention_heads
    head = 6 * made.hidden_size * made.vocab_size * num_targets
    flops = 6 * inner * tokens + head + 12 * made.num_hidden_layers * width * pairs
    return {"tokens": tokens, "targets": num_targets, "flops": flops}


# ---- measured ----


def run(name: str, task: Path, python: str) -> dict[str, Any]:
    """One contestant in a process of its own. Raises CalledProcessError, having shown what it said."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    one_gpu = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
    alone = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment = {**alone, **offline, **one_gpu, "PYTHONPATH": path}
    command = [python, str(HERE / "contestants.py"), name, str(task), str(time.monotonic())]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
        done.check_returncode()
    return json.loads(done.stdout.splitlines()[-1])


def missing(python: str, modules: list[str]) -> list[str]:
    """Those of the modules that a Python does not have."""
    code = f"import importlib.util; print(*(m for m in {modules!r} if importlib.util.find_spec(m) is None))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def disagreement(runs: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """How far the first losses of each contestant are from the plain loop's, relative, in the worst of its runs.

    >>> disagreement({"plain": [{"losses": [8.0, 4.0, 2.0]}], "zero2": [{"losses": [8.0, 4.0, 2.5]}]})
    {'plain': 0.0, 'zero2': 0.25}
    """
    truth = np.array(runs["plain"][0]["losses"][:COMPARED_STEPS])
    losses = {name: np.array([run["losses"][:COMPARED_STEPS] for run in made]) for name, made in runs.items()}
    return {name: float(np.nan_to_num(np.abs(of / truth - 1), nan=np.inf).max()) for name, of in losses.items()}


def agreed(runs: dict[str, list[dict[str, Any]]], precision: str) -> dict[str, float]:
    """`disagreement`, which ends the program where it is more than rounding: speeds of different things say nothing."""
    off, tolerance = disagreement(runs), TOLERANCE[precision]
    losses = {name: made[-1]["losses"][:COMPARED_STEPS] for name, made in runs.items()}
    if wrong := {name: losses[name] for name, far in off.items() if far > tolerance}:
        truth = f"the plain loop's {losses['plain']}"
        sys.exit(f"losses differ by more than {tolerance:.0e} from {truth}, so no speed is told: {wrong}")
    return off


def summary(runs: list[dict[str, Any]], about: dict[str, int], steps: int, peak: float) -> dict[str, Any]:
    """One line of the table. Of each step: minimum and median over the runs; then the mean over steps."""
    result: dict[str, Any] = {}
    for clock in ("wall_seconds", "cpu_seconds"):
        seconds = np.array([run[clock][-steps:] for run in runs])
        result[clock] = float(np.median(seconds, axis=0).mean())
        result[f"min_{clock}"] = float(seconds.min(axis=0).mean())
    step_share = 1 / about["steps"] / result["wall_seconds"]
    result |= {"tokens_per_second": about["tokens"] * step_share, "mfu": about["flops"] * step_share / peak}
    result |= {name: float(np.median([run[name] for run in runs])) for name in ("first_step_seconds", "resident_mib")}
    result["peak_mib"] = max(run["peak_mib"] for run in runs)
    return {**result, "attention": runs[0]["attention"], "versions": runs[0]["versions"], "runs": runs}


def with_short_runs(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each result with the seconds of a run of ten steps, its start-up included, and how much that is of the plain loop's.

    They are computed: the first step's seconds, and nine times those of the steps that were timed.

    >>> plain = {"first_step_seconds": 11.0, "wall_seconds": 1.0}
    >>> with_short_runs({"plain": plain, "zero2": {"first_step_seconds": 21.0, "wall_seconds": 1.0}})["zero2"]
    {'first_step_seconds': 21.0, 'wall_seconds': 1.0, 'ten_steps_seconds': 30.0, 'ten_steps_of_plain': 1.5}
    """
    seconds = {
        name: of["first_step_seconds"] + (SHORT_RUN_STEPS - 1) * of["wall_seconds"] for name, of in results.items()
    }
    return {
        name: {**of, "ten_steps_seconds": seconds[name], "ten_steps_of_plain": seconds[name] / seconds["plain"]}
        for name, of in results.items()
    }


def judged(results: dict[str, dict[str, Any]], model: str, device: str) -> list[dict[str, Any]]:
    """What this trainer is to reach beside those of the others that were measured, and what it does."""
    made = []
    for ours in (name for name in results if name.startswith("zero") or name == "compiled"):
        for number, other, goal, is_least in GOALS.get((device, model), []):
            if other is None or other in results:
                value = results[ours][number] / (results[other][number] if other else 1.0)
                is_met = value >= goal if is_least else value <= goal
                of = f"{number} of the {NAMES[other]}" if other else number
                made.append(
                    {"who": ours, "what": of, "value": value, "goal": goal, "is_least": is_least, "is_met": is_met}
                )  # fmt: skip
    return made


def show(console: Console, title: str, found: dict[str, Any], goals: list[dict[str, Any]]) -> None:
    table, results = Table(title=title, title_justify="left"), found["results"]
    numbers = (
        "tokens / s",
        "CPU s / step",
        "min",
        "s / step",
        "min",
        "MFU %",
        "peak MiB",
        "s to 1st step",
        "s of 10 steps",
        "of plain",
        "losses off",
    )
    columns = ("", *numbers, "attention")
    for column in columns:
        table.add_column(column, justify="right" if column not in ("", "attention") else "left")
    for name, result in results.items():
        seconds = [result[key] for key in ("cpu_seconds", "min_cpu_seconds", "wall_seconds", "min_wall_seconds")]
        table.add_row(
            NAMES[name],
            f"{result['tokens_per_second']:,.0f}",
            *(f"{value:.3f}" for value in seconds),
            f"{100 * result['mfu']:.1f}",
            f"{result['peak_mib']:,.0f}",
            f"{result['first_step_seconds']:.1f}",
            f"{result['ten_steps_seconds']:.1f}",
            f"{result['ten_steps_of_plain']:.2f}",
            f"{result['losses_off']:.0e}",
            result["attention"],
        )
    console.print(table)
    for name, why in found["failed"].items():
        console.print(f"{NAMES[name]} failed, and has no numbers: {why}", markup=False)
    for one in goals:
        sign, word = "≥" if one["is_least"] else "≤", "met" if one["is_met"] else "MISSED"
        console.print(f"{NAMES[one['who']]}: {one['value']:.3f} {one['what']}, goal {sign} {one['goal']}: {word}")
    if "trl" in results and results["trl"]["attention"] == "sdpa" and torch.cuda.is_available():
        console.print(
            "TRL had no flash attention here, and is faster with it: install its wheel, or say --trl-attention"
        )


# ---- the benchmark ----


def compare(task: Path, pythons: dict[str, str], repeats: int, about: dict[str, int]) -> dict[str, Any]:
    """Every contestant on the same rows, in turns; who fails is left out. Ends the program where their losses disagree."""
    steps = about["steps"] - WARM_UP_STEPS
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in pythons}
    peaks, failed = [], {}
    for repeat in range(1, repeats + 1):
        peaks.append(run("peak", task, sys.executable)["flops_per_second"])
        for name in list(runs):
            print(f"{task.stem}, run {repeat} of {repeats}: {NAMES[name]}", file=sys.stderr, flush=True)
            try:
                runs[name].append(run(name, task, pythons[name]))
            except subprocess.CalledProcessError as error:
                failed[name] = (error.stderr.strip().splitlines() or [str(error)])[-1]
                del runs[name]
        if "plain" not in runs:
            sys.exit(
                f"the plain loop, beside whose losses all are held, failed, so no speed is told: {failed['plain']}"
            )
        off = agreed(runs, json.loads(task.read_text())["precision"])
    results = {
        name: {**summary(made, about, steps, max(peaks)), "losses_off": off[name]} for name, made in runs.items()
    }
    return {"peak_flops_per_second": max(peaks), "results": with_short_runs(results), "failed": failed}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--model", choices=MODELS, default="gpt2" if on_gpu else "small")
    parser.add_argument("--precision", choices=TOLERANCE, default="bf16" if on_gpu else "fp32")
    parser.add_argument("--seq-len", type=int, default=1024 if on_gpu else 512, help="tokens of a row")
    parser.add_argument("--micro-batch", type=int, default=16 if on_gpu else 4, help="rows of a forward pass")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches of a step")
    parser.add_argument("--steps", type=int, default=6, help="that are timed, after two to warm up")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", choices=("text", "answers"), default=["text", "answers"])
    parser.add_argument("--trainers", nargs="+", choices=sorted(NAMES), help="default: all")
    parser.add_argument(
        "--peers", metavar="PYTHON", default=sys.executable, help="one with accelerate, TRL and datasets"
    )
    parser.add_argument(
        "--trl-attention", metavar="NAME", help="default: flash attention where its wheel is, else sdpa"
    )
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if shutil.which(given.peers) is None:
        parser.error(f"--peers {given.peers}: no such program; name a Python, or leave it out")
    for name in ("seq_len", "micro_batch", "accumulation", "steps", "repeats"):
        if getattr(given, name) < (2 if name == "seq_len" else 1):
            parser.error(
                f"--{name.replace('_', '-')} {getattr(given, name)}: there is nothing to measure; use a larger number"
            )
    return given


def contestants(given: argparse.Namespace, device: str) -> tuple[dict[str, str], dict[str, str]]:
    """By name the Python that runs each, and why peers that are not there are left out. DeepSpeed is wrong in bf16 at stage 0."""
    first = ["zero0"] if given.precision == "fp32" else ["zero1", *(["compiled"] if device == "cuda" else [])]
    own = [*first, "zero2", "bare", "plain", "fsdp2"]
    if given.trainers:
        own = ["plain", *(name for name in given.trainers if name not in (*PEERS, "plain"))]  # it judges all losses
    asked = [name for name in PEERS if name in (given.trainers or PEERS)]
    absent = {name: missing(given.peers, PEERS[name]) for name in asked}
    pythons = dict.fromkeys(own, sys.executable) | {name: given.peers for name in asked if not absent[name]}
    return pythons, {name: f"there is no {', '.join(modules)}" for name, modules in absent.items() if modules}


def main() -> None:
    """Measure, print a table and a judgement for each shape of data, leave all as JSON."""
    end_on_sigterm()
    given, console = arguments(), Console(width=None if sys.stdout.isatty() else 180)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pythons, left_out = contestants(given, device)
    for name, why in left_out.items():
        console.print(f"{NAMES[name]} is left out: {why} in {given.peers} (--peers)", soft_wrap=True)
    settings = {key: value for key, value in vars(given).items() if key not in ("json", "peers")}
    where = {**machine(), "gpu": torch.cuda.get_device_name() if device == "cuda" else None}
    report: dict[str, Any] = {"machine": where, "settings": settings, "left_out": left_out, "shapes": {}}
    num_steps = WARM_UP_STEPS + given.steps
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made, inner = write_model(folder / "model", given.model, given.seq_len)
        rows = write_rows(folder, given.seq_len, num_steps * given.micro_batch * given.accumulation)
        for shape in given.shapes:
            task = Task(
                str(rows[shape]), str(folder / "model"), str(TOKENIZER), device, given.precision,
                given.micro_batch, given.accumulation, 1e-3, given.trl_attention,
            )  # fmt: skip
            path = folder / f"{shape}.json"
            path.write_text(json.dumps(asdict(task)))
            about = {**needed(rows[shape], made, inner), "steps": num_steps}
            found = compare(path, pythons, given.repeats, about)
            goals = judged(found["results"], given.model, device)
            report["shapes"][shape] = {"rows": about, **found, "goals": goals}
            title = (
                f"{given.model}, {given.precision}, {shape}: {about['targets'] / about['tokens']:.0%} of {about['tokens']:,} tokens "
                f"are learned; peak {found['peak_flops_per_second'] / 1e9:,.0f} GFLOP/s, {given.repeats} run(s) of each"
            )
            show(console, title, found, goals)
            if given.json:  # after each shape: what was measured outlives what fails later
                given.json.parent.mkdir(parents=True, exist_ok=True)
                given.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
