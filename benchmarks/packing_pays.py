"""What packing saves: the same training with one example a row, padded, and with examples packed into rows.

python benchmarks/packing_pays.py [--processes 1] [--json benchmarks/results/packing_pays.json]

Two tasks of the examples, each prepared and trained twice; the run files differ in `prepare.packing` alone (none, best_fit)
and in the rows of a forward pass. Equal are the examples, the tokenizer (2,000 pieces), the model and its first weights, the samples of a step, hence
the number of steps and the learning rates, and the loss, which is on the responses only. A row is as
short as the task allows: it holds the longest message (320 tokens), all but one of the instructions (512; that one is
split, in both). Nothing is truncated. Rows padded to a model's full context, or loss on the prompts, would make the
padded runs look worse; padding to the longest of each forward pass, which this trainer does not do, lies between the two.

Told is the time in optimizer steps (evaluation, start and saving left out) until the validation loss is first at or below
the lowest that both runs reach.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pack import machine
from prepare import Usage, end_on_sigterm, measured, versions
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Task:
    """An example's run file and what is changed of it; `micro_batch_rows` of the padded and of the packed run."""

    run_file: str
    seq_len: int
    samples: int
    epochs: int
    evaluate_every: int
    micro_batch_rows: tuple[int, int]
    learning_rate: float
    validation_fraction: float


TASKS = {
    "instructions": Task("examples/instructions/run.yaml", 512, 8, 3, 10, (4, 1), 2e-3, 0.1),
    "SMS classification": Task("examples/sms-spam/run.yaml", 320, 64, 1, 15, (8, 4), 1.5e-3, 0.03),
}
CONFIGURATIONS = {"padded": "none", "packed": "best_fit"}


def train(task: Task, packing: str, processes: int, folder: Path) -> dict[str, Any]:
    """Prepare and train as a person does; returns the curve and what was fed."""
    rows = task.micro_batch_rows[packing != "none"]
    overrides = [
        f"run_dir={folder}/run",
        f"prepare.out={folder}/shards",
        f"prepare.packing={packing}",
        f"prepare.seq_len={task.seq_len}",
        f"prepare.validation_fraction={task.validation_fraction}",
        "train.global_batch_rows=null",
        f"train.global_batch_samples={task.samples}",
        f"train.micro_batch_rows={rows}",
        f"train.epochs={task.epochs}",
        f"train.learning_rate={task.learning_rate}",
        f"evaluate.every_steps={task.evaluate_every}",
        "prepare.tokenizer={sentencepiece: {vocab_size: 2000}}",  # GPT-2's vocabulary would be most of so small a model
        "evaluate.samples=0",
        "checkpoint.every_steps=null",
    ]
    program = [sys.executable, "-m", "launch.cli"]
    cpu_only = {"CUDA_VISIBLE_DEVICES": ""}
    measured([*program, "prepare", task.run_file, *overrides, "--workers", "1"], folder, cpu_only)
    usage = measured([*program, "train", task.run_file, *overrides, "--nproc", str(processes)], folder, cpu_only)
    about = json.loads((folder / "shards/prepare.json").read_text())["splits"]["train"]
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return {**_told(usage, lines), **{name: about[name] for name in ("rows", "documents", "tokens", "targets", "fill")}}


def _told(usage: Usage, lines: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = [line["step_seconds"] for line in lines if "step_seconds" in line]
    return {
        "steps": len(seconds),
        "step_seconds": sum(seconds),
        "process_seconds": usage.wall_seconds,
        "cpu_seconds": usage.cpu_seconds,
        "curve": curve(lines),
    }


def curve(lines: list[dict[str, Any]]) -> list[tuple[int, float, float]]:
    """(step, seconds in steps up to there, validation loss) of every evaluation.

    >>> curve([{"step": 0, "validation_loss": 7.0}, {"step": 1, "step_seconds": 0.5}, {"step": 1, "validation_loss": 6.0}])
    [(0, 0, 7.0), (1, 0.5, 6.0)]
    """
    steps = {line["step"]: line["step_seconds"] for line in lines if "step_seconds" in line}
    losses = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    passed = {0: 0, **dict(zip(steps, itertools.accumulate(steps.values()), strict=True))}
    return [(step, passed[step], loss) for step, loss in losses.items()]


def compared(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Both runs, the loss that both reach, and when.

    >>> runs = {"padded": {"curve": [(0, 0, 7.0), (9, 8.0, 2.0)]}, "packed": {"curve": [(0, 0, 7.0), (9, 2.0, 1.5)]}}
    >>> made = compared(runs)
    >>> made["loss_reached"], made["saved"]
    (2.0, 0.75)
    """
    reached = max(min(loss for *_, loss in run["curve"]) for run in runs.values())
    for run in runs.values():
        run["best_loss"] = min(loss for *_, loss in run["curve"])
        run["steps_to_loss"], run["seconds_to_loss"] = next(
            (step, seconds) for step, seconds, loss in run["curve"] if loss <= reached
        )
    saved = 1 - runs["packed"]["seconds_to_loss"] / runs["padded"]["seconds_to_loss"]
    return {"loss_reached": reached, "saved": saved, "runs": runs}


def show(console: Console, name: str, result: dict[str, Any]) -> None:
    title = f"{name}: validation loss {result['loss_reached']:.4f} {result['saved']:+.0%} time saved when packed"
    table = Table(title=title, title_justify="left")
    columns = ("", "rows", "fill %", "steps", "s in all", "s a step", "best loss", "steps to loss", "s to loss")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for configuration, run in result["runs"].items():
        table.add_row(
            configuration,
            f"{run['rows']:,}",
            f"{100 * run['fill']:.1f}",
            f"{run['steps']:,}",
            f"{run['step_seconds']:.1f}",
            f"{run['step_seconds'] / run['steps']:.3f}",
            f"{run['best_loss']:.4f}",
            f"{run['steps_to_loss']:,}",
            f"{run['seconds_to_loss']:.1f}",
        )
    console.print(table)
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    end_on_sigterm()
    console = Console(width=None if sys.stdout.isatty() else 140)
    results: dict[str, Any] = {}
    for name, task in TASKS.items():
        runs = {}
        for configuration, packing in CONFIGURATIONS.items():
            with tempfile.TemporaryDirectory() as folder:
                runs[configuration] = train(task, packing, given.processes, Path(folder))
        results[name] = compared(runs)
        show(console, name, results[name])
        if given.json:
            report = {"machine": machine(), "versions": versions(), "processes": given.processes, "results": results}
            given.json.parent.mkdir(parents=True, exist_ok=True)
            given.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
