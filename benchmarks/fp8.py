"""The loss of a run whose products are in 8 bits beside the same run's in 16, and beside what another seed changes.

python benchmarks/fp8.py [--steps 150] [--width 128] [--json benchmarks/results/fp8.json]

A small Llama from scratch on the slice of WikiText-2 that is shipped, trained by `sft-dist train` on one process: in bf16, with
`train.fp8` (on a CPU the rounding is emulated, on an H100 it is the real thing), and in bf16 with another seed (first weights and order), whose
distance is what such a difference is to be held against. Told is the validation loss; seconds are told on a GPU only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pack import machine

ROOT = Path(__file__).resolve().parent.parent
RUNS = {"bf16": [], "fp8": ["train.fp8=true"], "bf16, another seed": ["train.seed=1"]}


def overrides(given: argparse.Namespace, folder: Path) -> list[str]:
    """What is changed of the example's run file, for all runs."""
    width = given.width
    model = {
        "model_type": "llama", "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    return [
        f"prepare.out={folder}/shards",
        "prepare.seq_len=128",
        f"model.config={json.dumps(model)}",
        "train.global_batch_rows=64",
        "train.micro_batch_rows=32",
        f"train.max_steps={given.steps}",
        "train.epochs=null",
        "train.learning_rate=3e-3",
        "train.gradient_checkpointing=false",
        "evaluate.early_stopping=null",
        f"evaluate.every_steps={max(1, given.steps // 10)}",
        "evaluate.samples=0",
        "checkpoint.every_steps=null",
    ]


def sft_dist(*words: str) -> None:
    """A command, its output left out. Raises CalledProcessError, having shown it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
        done.check_returncode()


def curves(given: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """Of each run the validation loss by step, the loss of each step, and seconds a step."""
    common, run_file, found = overrides(given, folder), "examples/wikitext/run.yaml", {}
    sft_dist("prepare", run_file, *common)
    for number, (name, more) in enumerate(RUNS.items()):
        print(name, file=sys.stderr, flush=True)
        sft_dist("train", run_file, "--nproc", "1", f"run_dir={folder}/run-{number}", *common, *more)
        lines = [json.loads(line) for line in (folder / f"run-{number}" / "metrics.jsonl").read_text().splitlines()]
        found[name] = {
            "validation_loss": {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line},
            "loss": [line["loss"] for line in lines if "loss" in line],
            "step_seconds": sorted(line["step_seconds"] for line in lines if "step_seconds" in line)[given.steps // 2],
        }
    return found


def main() -> None:
    """Train, print the curves, write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--width", type=int, default=128, help="of the model, a multiple of 64")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.width % 64 or given.steps < 2:
        parser.error(f"--width {given.width} --steps {given.steps}: use a multiple of 64, and two steps or more")
    with tempfile.TemporaryDirectory() as folder:
        found = curves(given, Path(folder))
    print("validation loss\n" + "".join(f"{name:>22}" for name in ("step", *found)))
    for step in found["bf16"]["validation_loss"]:
        print(f"{step:>22}" + "".join(f"{of['validation_loss'][step]:>22.4f}" for of in found.values()))
    last = {name: list(of["validation_loss"].values())[-1] for name, of in found.items()}
    off = {name: last[name] / last["bf16"] - 1 for name in last}
    print(f"at the end fp8 is {off['fp8']:+.2%} from bf16, another seed {off['bf16, another seed']:+.2%}")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if gpu:
        print(f"{gpu}: " + ", ".join(f"{name} {of['step_seconds']:.3f} s a step" for name, of in found.items()))
    if given.json:
        versions = {name: version(name) for name in ("torch", "torchao", "transformers", "deepspeed")}
        settings = {"steps": given.steps, "width": given.width, "is_emulated": gpu is None}
        report = {"machine": {**machine(), "gpu": gpu}, "versions": versions, "settings": settings, "runs": found}
        given.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
