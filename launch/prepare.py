"""One worker of a preparation, and the view of what it made."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sft_dist.data.build import Task, available_workers, prepare
from sft_dist.data.shards import Shards
from sft_dist.data.tokenise import Tokenizer
from sft_dist.errors import ConfigError
from sft_dist.schema import RunConfig


def run(config: RunConfig, *, fresh: bool, workers: int | None, task: Task | None, only_merge: bool) -> None:
    """Prepare the shards of a run, or a task's part of them, and print the funnel."""
    if config.prepare is None:
        raise ConfigError(
            "prepare: this run file has none (it trains on a mixture); prepare each of its sets by its own file"
        )
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(), TimeRemainingColumn(),
        console=console, transient=True,
    )  # fmt: skip
    tasks: dict[str, TaskID] = {}
    tokens_of: Counter[str] = Counter()

    def progress(stage: str, done: int, total: int, tokens: int) -> None:
        if not console.is_terminal:
            return
        if stage not in tasks:
            bar.start()  # not before the workers are forked: it has a thread
            tasks[stage] = bar.add_task(stage, total=total, rate="")
        tokens_of[stage] += tokens
        seconds = bar.tasks[tasks[stage]].elapsed or 0.0
        rate = f"{tokens_of[stage] / seconds:,.0f} tokens/s" if tokens and seconds else ""
        bar.update(tasks[stage], completed=done, total=total, rate=rate)

    try:
        report = prepare(
            config.prepare, default_tokenizer=config.model.name_or_path, progress=progress, say=lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True), fresh=fresh,
            workers=workers or available_workers(), task=task, only_merge=only_merge,
        )  # fmt: skip
    except KeyboardInterrupt:
        console.print("interrupted: what is done is kept; run it again and it goes on from there")
        sys.exit(130)
    finally:
        if tasks:
            bar.stop()
    if report is None:
        assert task is not None  # only a task reports nothing
        more = " --fresh" if fresh else ""
        print(f"task {task.index + 1}/{task.count}: done. When all are: sft-dist prepare RUN.yaml --merge{more}")
    else:
        print(report.describe())


def show(folder: Path, row: int | None, html: Path | None) -> None:
    """Print what is in the shards of `folder` (or in the one split it is), or one decoded row; or write it all as a page."""
    from sft_dist.data.view import overview, page, render_overview, render_row, split_folders
    from sft_dist.files import publish_page

    console = Console()
    if html is not None:
        publish_page(html, page(overview(folder, row=row)), "--html")
        print(f"{html}: written; open it in a browser")
    elif row is not None:
        found = split_folders(folder)
        split = folder / "train" if folder not in found else folder
        console.print(render_row(Shards.open(split), Tokenizer.load(str(split.parent / "tokenizer")), row))
    else:
        console.print(render_overview(overview(folder)))
