"""docs/profile.md, executed: its commands in their order, with fewer steps; and its table names the parts that there are."""

from __future__ import annotations

import gzip
import json
import re

import pytest

from sft_dist.step_trace import PARTS, split
from tests.e2e.commands import ROOT, clone, forked, run, shown

PAGE = "docs/profile.md"


def test_the_page_does_what_it_shows(tmp_path):
    folder = clone(tmp_path)
    prepare, profile = shown(PAGE)
    run(prepare, folder)
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*")}
    said = forked(f"{profile} --steps 1 train.attention=by_document", folder)
    assert {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*")} == before, "the run is left alone"
    assert "1 step of 8 rows = 4 a micro-batch x 2 accumulated x 1 process;" in said
    told = {
        name: float(share) for name, share in re.findall(r"^  (\S.*?) +[\d,.]+ +(\d+\.\d)%$", said, flags=re.MULTILINE)
    }
    assert tuple(told) == (*PARTS, "a step")
    assert sum(told[name] for name in PARTS) == pytest.approx(100, abs=0.5)
    assert re.search(r"^MFU: \d+\.\d% of the .* that matrix products reach here \(measured\)", said, flags=re.MULTILINE)
    # the table is what the trace says
    made = split(json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))["traceEvents"])
    assert {name: round(100 * made.parts[name] / made.seconds, 1) for name in PARTS} == {
        name: told[name] for name in PARTS
    }


def test_the_page_explains_every_part():
    rows = re.findall(r"^\| ([a-z+ ]+?) \| .+ \| .+ \|$", (ROOT / PAGE).read_text(), flags=re.MULTILINE)
    assert tuple(rows) == ("part", *PARTS)
