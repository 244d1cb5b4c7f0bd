"""docs/curation.md: its experiment runs, its figure is drawn from its numbers, and the page tells those."""

from __future__ import annotations

import json

import numpy as np

from tests.e2e.commands import ROOT, clone, run

PAGE = (ROOT / "docs" / "curation.md").read_text()
MEASURED = json.loads((ROOT / "docs" / "figures" / "curation.json").read_text())
ROWS = [line for line in PAGE.splitlines() if line.startswith("|") and "±" in line]
PROGRAM = "python examples/curation/experiment.py"


def test_an_arm_of_the_experiment_runs_and_no_sample_repeats_a_held_out_message(tmp_path):
    folder = clone(tmp_path)
    run(f"{PROGRAM} --sizes 40 --seeds 1 --arms selected --json out.json train.max_steps=1", folder)
    made = json.loads((folder / "out.json").read_text())
    assert made["messages"] == MEASURED["messages"]
    assert [(one["arm"], one["size"]) for one in made["runs"]] == [("selected", 40)]
    held_out = [json.loads(line) for line in (folder / "runs/curation/held_out.jsonl").read_text().splitlines()]
    sample = [
        json.loads(line) for line in (folder / "runs/curation/selected-40-0/sample.jsonl").read_text().splitlines()
    ]
    assert len(sample) == made["messages"]["curated"] * 3 // 4
    assert not {one["text"].casefold() for one in sample} & {one["text"].casefold() for one in held_out}
    assert "40 train" in (folder / "runs/curation/selected-40-0/log.txt").read_text()


def test_the_figure_is_drawn_from_the_numbers(tmp_path):
    folder = clone(tmp_path)
    numbers = ROOT / "docs" / "figures" / "curation.json"
    said = run(f"python examples/curation/figure.py {numbers} figure.svg", folder)
    assert (folder / "figure.svg").read_text().count("<path") > 20
    assert said.splitlines() == ROWS


def test_the_numbers_of_the_page_are_those_measured():
    """The table is the program's, by the test above; here by a second reckoning, and what else the page tells."""
    for row in [row.strip("| ").split(" | ") for row in ROWS]:
        size, arm, seeds = int(row[0].replace(",", "")), row[1], int(row[2])
        runs = [one for one in MEASURED["runs"] if (one["size"], one["arm"]) == (size, arm)]
        assert len({one["seed"] for one in runs}) == len(runs) == seeds >= 5
        for cell, metric in zip(row[3:], ("validation_f1", "validation_accuracy", "validation_loss"), strict=True):
            values = np.array([one[metric] for one in runs])
            assert cell == f"{values.mean():.3f} ± {values.std(ddof=1) / seeds**0.5:.3f}"
    for name, count in MEASURED["messages"].items():
        assert f"| `{name}` | {count:,} |" in PAGE
    left = MEASURED["left_of_repeats"]
    assert f"curation leaves {left['messages']:,} of them, {left['the same']:,} of which" in " ".join(PAGE.split())
