"""What happened in one run or several, as a page and as pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from launch import slurm
from sft_dist.chart import write_png
from sft_dist.errors import ConfigError
from sft_dist.files import publish_page
from sft_dist.report import charts, comparability, page
from sft_dist.run_record import read_runs


def run(folders: Sequence[Path], out: Path | None, pictures: Path | None, say: Callable[[str], None]) -> None:
    """Write the page, and with `pictures` each chart as PNG for light and for dark ground, and say where they are.

    Raises ConfigError for folders that hold no run, and for what cannot be written.
    """
    runs = read_runs(folders, [is_running(folder) for folder in folders])
    drawn = charts(runs)
    if pictures is not None:
        try:
            pictures.mkdir(parents=True, exist_ok=True)
            for chart in drawn:
                write_png(chart, pictures / f"{chart.name}.png")
                write_png(chart, pictures / f"{chart.name}-dark.png", is_dark=True)
        except OSError as error:
            raise ConfigError(
                f"--png {pictures}: cannot be written ({error.strerror}); name a folder of yours"
            ) from None
    target = out or (folders[0] / "report.html" if len(folders) == 1 else Path("report.html"))
    publish_page(target, page(runs, drawn), "--out")
    for warning in comparability(runs):
        say(f"warning: {warning}")
    for each in runs:
        for note in each.notes:
            say(f"{each.name}: {note}")
    say(f"{target}: {target.stat().st_size / 1000:,.0f} kB; open it in a browser")
    if pictures is not None:
        say(f"{pictures}: {len(drawn)} charts, each for light and for dark ground")


def is_running(folder: Path) -> bool:
    """Whether a process of this machine or a job of its cluster trains the run, as far as that can be seen from here."""
    try:
        jobs = slurm.live_jobs(folder)
    except ConfigError:  # SLURM does not answer: a report does not need it
        jobs = []
    return slurm.holder(folder) is not None or any(about.get("JobState") == "RUNNING" for _, about in jobs)
