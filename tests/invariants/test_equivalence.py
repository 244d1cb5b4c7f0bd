"""Equivalence classes of whole runs: what must not change the result does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from sft_dist.config import load
from sft_dist.data.build import prepare
from sft_dist.data.records import Document
from sft_dist.data.shards import Shards, write
from tests.dist.tiny import assert_same_curve
from tests.invariants import runs
from tests.workers import run_workers

# about 1e-6 relative: losses fall from 5.9 to 4.4 here, and the norms, near 3, keep to it as well
TOLERANCE = 5e-6


@pytest.fixture
def go(task, tmp_path):
    """Run the task on so many ranks with overrides, in a run folder of its own; returns that folder."""

    def start(name, world_size, *overrides, **more):
        run_dir = tmp_path / name
        codes = run_workers(runs.run, world_size, task, (f"run_dir={run_dir}", *overrides), **more)
        assert set(codes) == {0}
        return run_dir

    return start


@pytest.fixture(scope="module")
def reference(task, tmp_path_factory):
    """One rank, one micro-batch a step, ZeRO 2."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    run_workers(runs.run, 1, task, (f"run_dir={run_dir}", "train.micro_batch_rows=8"))
    assert len(runs.numbers(run_dir)) == 12
    return run_dir


def test_the_task_is_learned(reference):
    before, after = runs.measured(reference, 0), runs.measured(reference, 12)
    assert after["validation_loss"] < 0.8 * before["validation_loss"]
    assert {"validation_accuracy", "validation_f1", "validation_exact_match", "validation_perplexity"} <= set(after)


@pytest.mark.parametrize(("world_size", "micro"), [(1, 2), (2, 4), (2, 1), (4, 2)])
def test_splits_of_a_global_batch(go, reference, world_size, micro):
    run_dir = go("run", world_size, f"train.micro_batch_rows={micro}")
    assert_same_curve(runs.numbers(run_dir), runs.numbers(reference), tolerance=TOLERANCE)
    for step in (0, 12):
        ours, theirs = runs.measured(run_dir, step), runs.measured(reference, step)
        assert ours["validation_loss"] == pytest.approx(theirs["validation_loss"], rel=2e-6)
        assert ours["validation_accuracy"] == theirs["validation_accuracy"]


def test_a_short_last_step_and_an_epoch_that_ends_inside_one(go):
    """Four ranks share a last step of fewer rows than ranks, and the stream runs on over the end of an epoch."""
    common = ("train.max_steps=null", "train.epochs=1.1", "train.global_batch_rows=36", "evaluate.samples=0")
    alone = go("alone", 1, "train.micro_batch_rows=36", *common)
    four = go("four", 4, "train.micro_batch_rows=9", *common)
    assert len(runs.numbers(alone)) == 3
    assert_same_curve(runs.numbers(four), runs.numbers(alone), tolerance=TOLERANCE)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_zero_stages(go, reference, stage):
    run_dir = go("run", 2, f"zero=ds_configs/zero{stage}.json")
    assert_same_curve(runs.numbers(run_dir), runs.numbers(reference), tolerance=TOLERANCE)


def test_rows_that_ranks_share(go, reference):
    """Two of four ranks compute each row; what was fed is counted once, and the run goes on where nobody shares."""
    sharing = ("train.sequence_parallel=2", "train.micro_batch_rows=2", "zero=ds_configs/zero3.json")
    run_dir = go("run", 4, *sharing, stop_at=8, stopping_rank=3)
    go("run", 2, "train.micro_batch_rows=4")
    assert_same_curve(runs.numbers(run_dir), runs.numbers(reference), tolerance=TOLERANCE)
    ours, theirs = (
        json.loads((folder / "checkpoints/latest/state.json").read_text()) for folder in (run_dir, reference)
    )
    for name in ("ledger", "rows_consumed", "tokens", "target_tokens"):
        assert ours[name] == theirs[name]


def test_fewer_validation_rows_than_ranks(go, task, tmp_path):
    """One row, and three ranks under ZeRO 3, which hangs where one of them calls the model less often than another."""
    few = ("prepare.validation_fraction=0.01", f"prepare.out={tmp_path / 'few'}", "train.max_steps=2")
    prepare(load(task, few).prepare)
    assert Shards.open(tmp_path / "few" / "validation").num_rows == 1
    common = (*few, "train.global_batch_rows=6", "evaluate.every_steps=1")
    alone = go("alone", 1, "train.micro_batch_rows=2", *common)
    three = go("three", 3, "train.micro_batch_rows=2", "zero=ds_configs/zero3.json", *common)
    for step in (0, 1):
        ours, theirs = runs.measured(three, step), runs.measured(alone, step)
        assert ours["validation_loss"] == pytest.approx(theirs["validation_loss"], rel=2e-6)
    assert runs.measured(three, 2)["validation_accuracy"] == runs.measured(alone, 2)["validation_accuracy"]


def distance(ours, theirs, kind):
    """Relative, in the Euclidean norm over all parameters, of the tensors of one kind of two checkpoints."""
    names = [name for name in theirs if name.startswith(f"{kind}/")]
    one, other = (torch.cat([tensors[name] for name in names]).double() for tensors in (ours, theirs))
    return ((one - other).norm() / other.norm()).item()


def test_a_step_of_3840_samples_is_the_same_however_it_is_split(go, task):
    """By accumulation of single rows on one rank, in larger micro-batches, on more ranks: loss, gradient and weights."""
    samples = ("train.global_batch_samples=3840", "train.global_batch_rows=null")
    common = ("train.max_steps=1", "train.learning_rate=2e-5", "evaluate.samples=0")
    large = go("large", 1, "train.micro_batch_rows=16", *samples, *common)
    (folder,) = (large / "checkpoints").glob("step-*")
    rows = json.loads((folder / "state.json").read_text())["rows_consumed"]
    manifest = Shards.open(Path(load(task).prepare.out) / "train").manifest
    assert rows * manifest.documents_per_row == pytest.approx(3840, rel=0.01)
    expected = runs.tensors(folder)
    for name, world_size, micro, batch in (
        ("accumulated", 1, 1, (f"train.global_batch_rows={rows}",)),
        ("four", 4, 4, samples),
    ):
        run_dir = go(name, world_size, f"train.micro_batch_rows={micro}", *batch, *common)
        assert np.allclose(runs.numbers(run_dir), runs.numbers(large), rtol=1e-6, atol=0), name
        ours = runs.tensors(run_dir / "checkpoints" / folder.name)
        assert distance(ours, expected, "master") <= 1e-6, name
        # Adam's first moment is then a tenth of the clipped gradient; 1,536 roundings of fp32 alone come to 1.2e-6
        assert distance(ours, expected, "exp_avg") <= (2e-6 if name == "accumulated" else 1e-6), name


def test_an_evaluation_that_a_stop_left_is_made_up_for(go):
    """Asked to stop while step 6 is evaluated, by the metrics of that step: its next life begins with it."""
    more = ("evaluate.every_steps=3", "evaluate.samples=0", "train.micro_batch_rows=2")
    whole = go("whole", 2, *more)
    run_dir = go("left", 2, *more, stop_at=6)
    measured = [line["step"] for line in runs.curve(run_dir) if "validation_loss" in line]
    assert measured == [0, 3], "it was left"
    go("left", 2, *more)

    def held_out(folder: Path) -> list[tuple[int, float]]:
        return [(line["step"], line["validation_loss"]) for line in runs.curve(folder) if "validation_loss" in line]

    assert held_out(run_dir) == held_out(whole)
    go("left", 2, *more)
    assert held_out(run_dir) == held_out(whole), "and only then"


def one_document_a_row(source: Path, target: Path) -> int:
    """The same documents, unpacked; returns the number of rows."""
    shutil.copytree(source, target)
    shards = Shards.open(source / "train")
    batch = shards.rows(np.arange(shards.num_rows))
    rows = []
    for tokens, targets, documents in zip(batch.tokens, batch.targets, batch.documents, strict=True):
        for number in range(documents.max() + 1):
            chosen = documents == number
            rows.append([Document(tokens[chosen].tolist(), targets[chosen].tolist(), "x:1")])
    shutil.rmtree(target / "train")
    names = ("seq_len", "rows_per_shard", "vocab_size", "eos_id", "pad_id", "tokenizer", "template")
    write(target / "train", rows, **{name: getattr(shards.manifest, name) for name in names})
    return len(rows)


def test_packed_equals_one_document_a_row(go, task, tmp_path):
    """A step is the whole set in both, so that it holds the same documents; packing must then not show."""
    source = Path(load(task).prepare.out)
    unpacked_rows = one_document_a_row(source, tmp_path / "unpacked")
    packed_rows = Shards.open(source / "train").num_rows
    assert unpacked_rows > 2 * packed_rows
    common = ("train.micro_batch_rows=1", "train.max_steps=3", "evaluate.samples=0")
    packed = (
        go("packed", 2, f"train.global_batch_rows={packed_rows // 2 * 2}", *common) if packed_rows % 2 == 0 else None
    )
    packed = packed or go("packed", 1, f"train.global_batch_rows={packed_rows}", *common)
    unpacked = go(
        "unpacked", 1, f"train.global_batch_rows={unpacked_rows}", f"prepare.out={tmp_path / 'unpacked'}", *common
    )
    assert_same_curve(runs.numbers(unpacked), runs.numbers(packed), tolerance=TOLERANCE)


DROPOUT = ("model.dropout=0.1", "train.micro_batch_rows=2")


@pytest.fixture(scope="module")
def uninterrupted(task, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    run_workers(runs.run, 2, task, (f"run_dir={run_dir}", *DROPOUT))
    return run_dir


@pytest.mark.parametrize("stopping_rank", [0, 1])
def test_stopped_and_resumed_is_uninterrupted_bit_for_bit(go, uninterrupted, stopping_rank):
    """One rank alone wishes to stop, twice; dropout is on."""
    for stop_at in (3, 7):
        stopped = go_stopping(go, stop_at, stopping_rank)
        assert len(runs.numbers(stopped)) < 12
    run_dir = go("run", 2, *DROPOUT)
    assert runs.numbers(run_dir) == runs.numbers(uninterrupted)
    assert runs.measured(run_dir, 12) == runs.measured(uninterrupted, 12)


def go_stopping(go, stop_at, stopping_rank, world_size=2):
    """A run that is asked to stop at a step, by one rank."""
    return go("run", world_size, *DROPOUT, stop_at=stop_at, stopping_rank=stopping_rank)


def test_resumed_at_other_world_sizes(go, uninterrupted):
    for world_size, stop_at in ((2, 3), (1, 7)):
        go_stopping(go, stop_at, 0, world_size)
    run_dir = go("run", 4, *DROPOUT, "zero=ds_configs/zero3.json")
    assert_same_curve(runs.numbers(run_dir), runs.numbers(uninterrupted), tolerance=TOLERANCE)


def test_the_export_measures_what_the_trainer_measured(go, reference, tmp_path):
    ours = runs.measured(reference, 12)
    theirs = run_workers(exported, 1, reference, tmp_path / "export")[0]
    assert theirs["validation_loss"] == pytest.approx(ours["validation_loss"], rel=1e-6)
    assert theirs["validation_accuracy"] == ours["validation_accuracy"]
    assert theirs["validation_f1"] == ours["validation_f1"]


def exported(topology, run_dir, out):
    from launch.measure import measure_model
    from sft_dist.export import export

    assert export(run_dir, out) == 12
    return measure_model(str(out), None, micro_batch_rows=8).values
