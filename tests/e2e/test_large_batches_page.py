"""docs/large-batches.md, executed: its commands in their order, and what it says that they print."""

from __future__ import annotations

import json
import re

from tests.e2e.commands import ROOT, clone, run, shown

PAGE = (ROOT / "docs" / "large-batches.md").read_text()
MEASURED = json.loads((ROOT / "benchmarks" / "results" / "accumulation.json").read_text())


def test_the_recipe_runs_warns_and_refuses_in_the_words_of_the_page(tmp_path):
    folder = clone(tmp_path)
    prepare, show, train, refused = shown("docs/large-batches.md")
    run(prepare, folder)
    quoted = re.findall(r"^    ((?:rows|step|run|warning): .*)$", PAGE, flags=re.MULTILINE)
    assert len(quoted) == 4
    assert run(show, folder).splitlines()[-4:] == quoted
    assert "completed: 1 of 1 steps" in run(train, folder)
    (message,) = re.findall(r"^    (sft-dist: .*)$", PAGE, flags=re.MULTILINE)
    assert message in run(refused, folder, code=2).splitlines()


def test_the_numbers_of_the_page_are_those_measured():
    rows = re.findall(r"^\| ([\d,]+) \| ([\d.]+) % \| (\S+) \| ([\d.]+) % \|$", PAGE, flags=re.MULTILINE)
    errors = MEASURED["errors"]
    expected = [
        (
            f"{count:,}",
            f"{100 * errors['default'][n]:.2g}",
            f"{errors['ours'][n]:.0e}",
            f"{100 * errors['bf16'][n]:.2g}",
        )
        for n, count in enumerate(MEASURED["counts"])
    ]
    assert rows == expected
