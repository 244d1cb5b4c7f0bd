"""Training and validation loss of runs of any batch, against steps and against epochs, as a figure and its numbers.

python examples/wikitext/figure.py runs/wikitext runs/wikitext-7680 --json docs/figures/wikitext.json --figure docs/figures/wikitext.svg
python examples/wikitext/figure.py --json docs/figures/wikitext.json --figure docs/figures/wikitext.svg   # from the numbers
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

COLOURS = ("#1f77b4", "#d62728", "#2ca02c")


def read(run_dir: Path) -> dict[str, Any]:
    """What the figure shows of a run: its settings, and (step, loss) of training and validation."""
    config = yaml.safe_load((run_dir / "run.yaml").read_text())
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    shards = json.loads((Path(config["prepare"]["out"]) / "prepare.json").read_text())
    last = max((run_dir / "verdicts").glob("*.json"), key=lambda path: path.stat().st_mtime)
    return {
        "model": config["model"].get("config") or config["model"]["name_or_path"],
        "train": config["train"],
        "sets": {name: shards["splits"][name] for name in ("train", "validation")},
        "verdict": json.loads(last.read_text())["reason"],
        "loss": [(line["step"], round(line["loss"], 4)) for line in lines if "loss" in line],
        "validation_loss": [
            (line["step"], round(line["validation_loss"], 4)) for line in lines if "validation_loss" in line
        ],
    }


def draw(results: dict[str, Any], path: Path) -> None:
    """Two panels, as an SVG that is read on light and on dark pages; the same bytes each time."""
    import matplotlib
    from matplotlib import pyplot

    matplotlib.use("svg")
    grey = {f"{part}.color": "#808080" for part in ("xtick", "ytick", "text")}
    matplotlib.rcParams.update({"svg.hashsalt": "wikitext", "font.size": 9, "axes.labelcolor": "#808080", **grey})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for run, colour in zip(results["runs"], COLOURS, strict=False):
        rows = run["train"]["global_batch_rows"]
        for panel, unit in ((left, 1), (right, rows / run["sets"]["train"]["rows"])):
            for name, line, what in (("loss", "-", "training"), ("validation_loss", "o--", "validation")):
                steps, losses = zip(*run[name], strict=True)
                at = [step * unit for step in steps]
                panel.plot(
                    at, losses, line, color=colour, markersize=2.5, linewidth=1.2, label=f"{what}, {rows:,} rows"
                )
    left.set(xlabel="step", ylabel="loss")
    right.set(xlabel="epoch")
    left.legend(frameon=False)
    for panel in (left, right):
        panel.grid(color="#808080", alpha=0.25, linewidth=0.5)
        panel.spines[:].set_color("#808080")
    figure.savefig(path, format="svg", metadata={"Date": None}, transparent=True)
    pyplot.close(figure)


def main() -> None:
    """Read runs and leave their numbers, or read the numbers; draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN_DIR", help="without any the numbers are read")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--figure", type=Path, required=True, metavar="SVG")
    given = parser.parse_args()
    if given.runs:
        versions = {name: version(name) for name in ("sft-dist", "torch", "deepspeed", "transformers")}
        given.json.write_text(json.dumps({"versions": versions, "runs": [read(run) for run in given.runs]}) + "\n")
    draw(json.loads(given.json.read_text()), given.figure)


if __name__ == "__main__":
    main()
