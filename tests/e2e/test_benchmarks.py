"""The benchmark programs run, at a toy size; `packing_pays.py` trains for minutes and is left to who asks for its numbers."""

from __future__ import annotations

import json
import sys

import pytest

from tests.e2e.commands import ENVIRONMENT, ROOT, run


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
        ("scaling.py", "--ranks 2 --stages 2 --steps 3 --width 64", "cases"),
        ("fp8.py", "--steps 2 --width 64", "runs"),
        ("accumulation.py", "--counts 8 16 --steps 2 --batch 16", "errors"),
        ("prepare.py", "--pairs {pairs} --no-scale --repeats 1", "machine"),
    ],
)
def test_a_benchmark_runs(tmp_path, program, more, key):
    pairs = tmp_path / "pairs.jsonl"
    records = ({"prompt": f"What is {n} times {n}?", "response": f"It is {n * n}. " * 20} for n in range(200))
    pairs.write_text("".join(json.dumps(record) + "\n" for record in records))
    found, _ = measured(f"{program} {more.format(pairs=pairs)}", tmp_path)
    assert key in found


def measured(command, folder, **environment):
    """The JSON that a program wrote, on the CPU, and what it printed."""
    out = folder / "out.json"
    on_cpu = ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": ""} | environment
    printed = run(f"python {ROOT}/benchmarks/{command} --json {out}", folder, environment=on_cpu)
    return json.loads(out.read_text()), printed


def test_a_busy_machine_and_one_rank_say_nothing_of_scaling(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import scaling

    monkeypatch.setattr(scaling, "run_workers", lambda *given: [{"seconds": 1.0, "parameters": 9}])
    with pytest.raises(SystemExit, match=r"stage 2: a rank took 1\.000 s for two micro-batches and 1\.000 s for eight"):
        scaling.measure([2], [2], 1, 64)
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--ranks", "1", "2"])
    with pytest.raises(SystemExit, match=r"--ranks \[1, 2\]: one rank is the model's own measure; name 2 or more"):
        scaling.main()
