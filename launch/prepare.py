"""One worker of a preparation, and the view of what it made."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from sft_dist.config import RunConfig
from sft_dist.data.build import prepare
from sft_dist.data.shards import Shards
from sft_dist.data.tokenise import Tokenizer
from sft_dist.data.view import render_row, statistics
from sft_dist.errors import DataError


def run(config: RunConfig, *, fresh: bool) -> None:
    """Prepare the shards of a run and print the funnel."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,}"), TimeElapsedColumn(),
        console=console, disable=not console.is_terminal, transient=True,
    )  # fmt: skip
    tasks: dict[str, int] = {}

    def progress(stage: str, done: int) -> None:
        if stage not in tasks:
            tasks[stage] = bar.add_task(stage, total=None)
        bar.update(tasks[stage], completed=done)

    with bar:
        report = prepare(config.prepare, default_tokenizer=config.model.name_or_path, progress=progress, fresh=fresh)
    print(report.describe(), file=sys.stdout)


def show(folder: Path, row: int | None) -> None:
    """Print the statistics of every split in `folder` (or of the one split it is), or one decoded row."""
    console = Console()
    splits = (
        [folder] if (folder / "manifest.json").is_file() else sorted(p.parent for p in folder.glob("*/manifest.json"))
    )
    if not splits:
        raise DataError(f"{folder}: no shards there; run `sft-dist prepare RUN.yaml`, or name its prepare.out")
    if row is not None:
        split = folder if folder in splits else folder / "train"
        tokenizer = Tokenizer.load(str(split.parent / "tokenizer"))
        console.print(render_row(Shards.open(split), tokenizer, row))
        return
    table = Table(title=str(folder))
    table.add_column("")
    columns = {split.name: statistics(Shards.open(split)) for split in splits}
    for name in columns:
        table.add_column(name, justify="right")
    for key in next(iter(columns.values())):
        table.add_row(key, *(_number(values[key]) for values in columns.values()))
    console.print(table)


def _number(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
