"""docs/plan.md, executed: its commands in their order, and its table beside what was measured."""

from __future__ import annotations

import json
import re
import shlex

from tests.e2e.commands import ROOT, clone, enter, run, shown

PAGE = (ROOT / "docs" / "plan.md").read_text()
CASES = json.loads((ROOT / "benchmarks" / "results" / "memory_plan.json").read_text())["cases"]


def test_the_commands_of_the_page(tmp_path):
    folder = clone(tmp_path)
    prepare, plain, auto = shown("docs/plan.md")
    run(prepare, folder)
    told = enter(plain, folder)
    assert "→ zero2" in told
    assert re.search(r"^best: zero=ds_configs/zero1\.json .*micro_batch_rows=\d+", told, flags=re.MULTILINE)
    assert "warning: a step of 308 rows leaves only 1.3 steps an epoch" in told
    assert re.search(r"GPU-hours = [\d.]+ EUR; evaluation", enter(auto, folder))
    assert shlex.split(auto)[-1] == "budget.price_per_gpu_hour=2.10 EUR"


def test_the_table_is_what_was_measured():
    rows = re.findall(
        r"^\| \S.*? \| .*? \| (\d+) × ([\d,]+) \| ([\d.]+) \| ([\d.]+) \| (−?[\d.]+) % \|$", PAGE, flags=re.MULTILINE
    )
    assert len(rows) == len(CASES) >= 6
    for (count, tokens, predicted, counted, error), case in zip(rows, CASES.values(), strict=True):
        assert (int(count), int(tokens.replace(",", ""))) == (case["rows"], case["seq_len"])
        assert predicted == f"{case['predicted']['device'] / 2**30:.2f}"
        assert counted == f"{case['measured']['device'] / 2**30:.2f}"
        assert float(error.replace("−", "-")) == round(100 * case["error"]["device"], 1) + 0.0
        assert all(abs(each) <= 0.1 for each in case["error"].values())


def test_the_predictions_were_there_before():
    before = json.loads((ROOT / "benchmarks" / "results" / "memory_plan_predicted.json").read_text())
    assert before == {name: case["predicted"] for name, case in CASES.items()}
