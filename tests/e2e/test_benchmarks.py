"""The benchmark programs run, at a toy size; `packing_pays.py` trains for minutes and is left to who asks for its numbers."""

from __future__ import annotations

import json

import pytest

from tests.e2e.commands import ROOT, run


@pytest.mark.parametrize(
    ("program", "more", "key"),
    [
        ("pack.py", "--documents 3000", "machine"),
        ("loader.py", "--rows 2000 --repeats 1", "of_raw"),
        (
            "checkpoint.py",
            "--layers 1 --width 64 --stages 3 --repeats 1 --train-seconds 3 --every-seconds 1 --plan-ranks 8",
            "planning",
        ),
        ("accumulation.py", "--counts 8 16 --steps 2 --batch 16", "errors"),
        ("prepare.py", "--pairs {pairs} --no-scale --repeats 1", "machine"),
    ],
)
def test_a_benchmark_runs(tmp_path, program, more, key):
    pairs = tmp_path / "pairs.jsonl"
    records = ({"prompt": f"What is {n} times {n}?", "response": f"It is {n * n}. " * 20} for n in range(200))
    pairs.write_text("".join(json.dumps(record) + "\n" for record in records))
    out = tmp_path / "out.json"
    run(f"python {ROOT}/benchmarks/{program} {more.format(pairs=pairs)} --json {out}", tmp_path)
    assert key in json.loads(out.read_text())
