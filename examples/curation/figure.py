"""What experiment.py measured, as a table and as a figure.

python examples/curation/figure.py docs/figures/curation.json [docs/figures/curation.svg]     # the figure needs matplotlib
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = {"raw": "#7f7f7f", "repeats": "#d62728", "curated": "#1f77b4", "selected": "#2ca02c"}
METRICS = {"validation_f1": "F1 of spam", "validation_accuracy": "accuracy", "validation_loss": "loss"}


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and its standard error: the sample deviation over the root of how many there are.

    >>> spread([1.0, 2.0, 3.0])
    (2.0, 0.5773502691896258)
    """
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def draw(results: dict[str, Any], path: Path) -> None:
    """F1 and loss against the size, a line an arm, as an SVG that is read on light and on dark pages."""
    import matplotlib
    from matplotlib import pyplot

    matplotlib.use("svg")
    grey = {f"{part}.color": "#808080" for part in ("xtick", "ytick", "text")}
    matplotlib.rcParams.update({"svg.hashsalt": "curation", "font.size": 9, "axes.labelcolor": "#808080", **grey})
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for panel, metric in zip(panels, ("validation_f1", "validation_loss"), strict=True):
        for number, (arm, colour) in enumerate(COLOURS.items()):
            runs = [run for run in results["runs"] if run["arm"] == arm]
            sizes = sorted({run["size"] for run in runs})
            of = [[run[metric] for run in runs if run["size"] == size] for size in sizes]
            means, errors = zip(*map(spread, of), strict=True)
            at = [size * 1.02 ** (number - 1.5) for size in sizes]  # beside each other
            panel.errorbar(at, means, errors, fmt="o-", color=colour, markersize=3, capsize=3, label=arm)
            panel.plot(
                [x for x, ys in zip(at, of, strict=True) for _ in ys],
                list(itertools.chain(*of)),
                ".",
                color=colour,
                alpha=0.35,
            )
        panel.set(xscale="log", xlabel="training examples", ylabel=f"held-out {METRICS[metric]}")
        panel.set_xticks(sizes, [f"{size:,}" for size in sizes])
        panel.set_xticks([], minor=True)
        panel.grid(color="#808080", alpha=0.25, linewidth=0.5)
        panel.spines[:].set_color("#808080")
    panels[0].legend(frameon=False)
    figure.savefig(path, format="svg", metadata={"Date": None}, transparent=True)
    pyplot.close(figure)


def main() -> None:
    """Print the table; draw the figure where its name is given."""
    results = json.loads(Path(sys.argv[1]).read_text())
    sizes = sorted({run["size"] for run in results["runs"]})
    for size, arm in itertools.product(sizes, COLOURS):
        if runs := [run for run in results["runs"] if (run["arm"], run["size"]) == (arm, size)]:
            cells = ["{:.3f} ± {:.3f}".format(*spread([run[metric] for run in runs])) for metric in METRICS]
            print(f"| {size:,} | {arm} | {len(runs)} | {' | '.join(cells)} |")
    if len(sys.argv) > 2:
        draw(results, Path(sys.argv[2]))


if __name__ == "__main__":
    main()
