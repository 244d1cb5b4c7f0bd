"""Whole runs that measure what they forget, answer prompts on the way, and tell of both at the end, over any restarts."""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
from pathlib import Path

import pytest

from sft_dist.config import load
from sft_dist.data.build import prepare
from tests.invariants import runs
from tests.workers import RankError, run_workers

WORDS = ("river", "stone", "winter", "market", "music", "garden", "letter", "window", "silver", "road")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    draw = random.Random(1)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(5, 60))) for _ in range(40)]
    (folder / "general.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    path = runs.run_file(folder)
    general = f"prepare.general=[{{path: {folder / 'general.jsonl'}}}]"
    prepare(load(path, [general]).prepare)
    return path, (
        general,
        "evaluate.samples_every_steps=4",
        "evaluate.prompts=[win a prize now]",
        "train.learning_rate=0.03",
        "train.micro_batch_rows=1",
        "train.global_batch_rows=6",
    )


def told(topology, *arguments, **more) -> str:
    """What a run says on stdout."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert runs.run(topology, *arguments, **more) == 0
    return said.getvalue()


def general(run_dir: Path) -> dict[int, float]:
    lines = [line for line in runs.curve(run_dir) if "general_perplexity" in line]
    assert len({line["step"] for line in lines}) == len(lines), "once at each of its steps"
    return {line["step"]: line["general_perplexity"] for line in lines}


def measured(topology, run_dir: Path):
    from launch import measure

    with contextlib.redirect_stdout(io.StringIO()) as said:
        measure.evaluate_models((str(run_dir),), None, micro_batch_rows=3, as_json=True)
        after_json = said.getvalue()
        measure.evaluate_models((str(run_dir),), None, micro_batch_rows=3, as_json=False)
    return json.loads(after_json), said.getvalue()[len(after_json) :]


def test_forgetting_is_told_at_the_end_and_the_number_before_outlives_restarts(task, tmp_path):
    path, common = task
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    said, silence, _ = run_workers(told, 3, path, (f"run_dir={whole}", *common))
    assert silence == ""
    before, after = general(whole).values()
    assert list(general(whole)) == [0, 12]
    line = f"general text: perplexity {before:.1f} before, {after:.1f} after ({100 * (after / before - 1):+.1f} %)"
    matrix = [line["confusion"] for line in runs.curve(whole) if "confusion" in line][-1]
    last = said.splitlines()
    assert re.match(r"completed: 12 of 12 steps", last.pop())
    assert after > 1.1 * before
    assert last.pop().startswith(
        "warning: the perplexity of general text rose by more than evaluate.max_forgetting 0.1"
    )
    assert last.pop() == line
    assert last[-3].split() == ["truth", "↓", "taken", "for", "→", "ham", "spam"]
    assert last[-1].split() == ["spam", *map(str, matrix["counts"][1])]
    assert sum(map(sum, matrix["counts"])) > 20

    # stopped after five steps by one rank alone, and gone on with on another number of them
    options = (f"run_dir={parted}", *common)
    first = run_workers(told, 2, path, options, stop_at=5, stopping_rank=1)[0]
    assert "general text" not in first
    assert re.search(r"stopped after step \d of 12", first)
    second = run_workers(told, 1, path, options)[0]
    assert list(general(parted).values()) == pytest.approx([before, after], rel=1e-3)
    assert f"general text: perplexity {before:.1f} before, " in second

    for run_dir in (whole, parted):
        answered = [(line["step"], line["samples"]) for line in runs.curve(run_dir) if "samples" in line]
        assert [step for step, _ in answered] == [0, 4, 8, 12]
        assert all([one["prompt"] for one in answers][1:] == ["win a prize now"] for _, answers in answered)

    of_json, text = run_workers(measured, 1, whole)[0]
    assert of_json["general_perplexity"] == pytest.approx(after, rel=1e-5)
    assert of_json["confusion"] == matrix
    assert f"general_perplexity {after:.4f}" in text
    assert "truth ↓ taken for →" in text


def test_of_a_run_without_validation_the_end_is_measured_once(task, tmp_path):
    """No prompts of the validation split there are, and none of one's own: started again, it finds all measured."""
    path, (general_text, *_) = task
    shards = tmp_path / "shards"
    options = [general_text, "prepare.validation_fraction=0", f"prepare.out={shards}", "train.max_steps=2"]
    prepare(load(path, options).prepare)
    assert not (shards / "validation").exists()
    options += [f"run_dir={tmp_path / 'run'}", "evaluate.samples=4"]
    for _ in range(2):
        said = run_workers(told, 1, path, options)[0]
        assert re.search(r"general text: perplexity \d+\.\d before, \d+\.\d after", said)
    assert list(general(tmp_path / "run")) == [0, 2]


def test_a_run_does_not_go_on_with_another_general_text(task, tmp_path):
    """The perplexity after would be of another text than the one before."""
    path, (_, *common) = task
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": " ".join(WORDS * 9)}) + "\n")
    other = (f"prepare.general=[{{path: {tmp_path / 'other.jsonl'}}}]", f"prepare.out={tmp_path / 'shards'}")
    prepare(load(path, other).prepare)
    where = (f"run_dir={tmp_path / 'run'}", *common)
    run_workers(runs.run, 1, path, (*where, task[1][0], "train.max_steps=2"))
    with pytest.raises(RankError, match=r"was made with general = '[0-9a-f]+', this run has '[0-9a-f]+'"):
        run_workers(runs.run, 1, path, (*where, *other))
