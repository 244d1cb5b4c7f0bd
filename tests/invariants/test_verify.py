"""What a run consumed is proved, over interruptions and other world sizes; a row fed twice is seen."""

from __future__ import annotations

import json
import shutil

import pytest

from sft_dist.config import load
from tests.invariants import runs
from tests.workers import run_workers

COMMON = ("evaluate.samples=0", "train.micro_batch_rows=2", "train.max_steps=null", "train.epochs=1.6")


@pytest.fixture(scope="module")
def interrupted(task, tmp_path_factory):
    """A run of three lives on 2, 1 and 4 ranks."""
    run_dir = tmp_path_factory.mktemp("interrupted") / "run"
    overrides = (f"run_dir={run_dir}", *COMMON, "checkpoint.every_steps=2", "evaluate.every_steps=2")
    for world_size, stop_at in ((2, 3), (1, 6), (4, None)):
        run_workers(runs.run, world_size, task, overrides, stop_at=stop_at)
    return run_dir


def certified(topology, run_dir):
    from launch.certify import verify_run

    certificate = verify_run(run_dir)
    return certificate.is_right, certificate.text


def test_an_interrupted_run_is_certified(interrupted):
    is_right, text = run_workers(certified, 1, interrupted)[0]
    assert is_right, text
    assert text.count("each as it was written") == 2
    assert "what the model was given is what the shards and the order say" in text
    assert "1.60 epochs: each fed 1 to 2 times" in text
    assert "1 completed (one that was killed leaves none)" in text  # all lives of these tests have one name


def feed_twice(topology, path, overrides):
    """A run whose loader gives one row of the third step in the place of another."""
    from sft_dist.data import loader

    plan = loader.Loader._plan

    def planted(self, batches):
        steps = plan(self, batches)
        for step in steps:
            for block in step.blocks:
                if 17 in block.ordinals:
                    rows = block.rows.copy()
                    rows[block.ordinals == 17] = rows[block.ordinals == 16]
                    object.__setattr__(block, "rows", rows)
        return steps

    loader.Loader._plan = planted
    return runs.run(topology, path, overrides)


def test_a_row_that_is_fed_twice_is_seen(task, tmp_path):
    run_workers(feed_twice, 2, task, (f"run_dir={tmp_path / 'run'}", *COMMON))
    is_right, text = run_workers(certified, 1, tmp_path / "run")[0]
    assert not is_right
    assert "NOT VERIFIED: 1 wrong" in text
    assert "WRONG        fed " in text
    assert "a row was fed twice, left out, or changed on the way" in text


def test_a_shard_that_changed_since_is_seen(interrupted, task, tmp_path):
    folder = shutil.copytree(load(task).prepare.out, tmp_path / "shards")
    (file,) = (folder / "train").glob("*.rows")
    content = bytearray(file.read_bytes())
    content[200] ^= 4
    file.write_bytes(content)
    run = shutil.copytree(interrupted, tmp_path / "run", symlinks=True)
    is_right, text = run_workers(certified_on, 1, run, folder)[0]
    assert not is_right, text


def certified_on(topology, run_dir, shards):
    """The certificate of a run as if its shards lay elsewhere."""
    from launch import certify

    rows_of = certify.rows_of
    certify.rows_of = lambda config: rows_of(
        config.model_copy(update={"prepare": config.prepare.model_copy(update={"out": str(shards)})})
    )
    return certified(topology, run_dir)


def going_on(topology, path, overrides, resume):
    """One more life, with what `sft-dist train` takes to go on otherwise."""
    import torch

    from launch import train
    from sft_dist.limits import StopRequest
    from sft_dist.topology import Life

    torch.set_num_threads(1)
    plan = train.Plan.of(load(path, overrides), topology, Life("test"), train.Resume(**resume))
    return train.run_plan(plan, StopRequest())


def state_of(run_dir):
    return json.loads((run_dir / "checkpoints" / "latest" / "state.json").read_text())


def test_rows_skipped_on_purpose_are_recorded_and_certified(task, tmp_path):
    overrides = (f"run_dir={tmp_path / 'run'}", *COMMON)
    run_workers(runs.run, 1, task, overrides, stop_at=2)
    consumed = state_of(tmp_path / "run")["rows_consumed"]
    run_workers(going_on, 1, task, overrides, {"skip_rows": 5})
    state = state_of(tmp_path / "run")
    assert state["skipped"] == [[consumed, consumed + 5]]
    assert state["notes"] == [
        f"step {consumed // 8}: skipped: rows {consumed} to {consumed + 4} of the stream are left out"
    ]
    assert state["ledger"]["rows"] == state["rows_consumed"] - 5
    is_right, text = run_workers(certified, 1, tmp_path / "run")[0]
    assert is_right, text
    assert f"on purpose, and recorded: ordinals {consumed} to {consumed + 4}" in text


def test_a_stream_begun_again_keeps_the_old_ones_ledger(task, tmp_path):
    overrides = (f"run_dir={tmp_path / 'run'}", *COMMON)
    run_workers(runs.run, 1, task, overrides, stop_at=2)
    before = state_of(tmp_path / "run")
    run_workers(going_on, 1, task, (*overrides, "train.seed=5"), {"resets_data": True})
    state = state_of(tmp_path / "run")
    (past,) = state["past"]
    assert (past["begin"], past["end"], past["ledger"]) == (0, before["rows_consumed"], before["ledger"])
    assert past["identity"]["seed"] == 0
    assert state["begin"] == 0
    assert any("seed was 0 and is 5 now" in note for note in state["notes"])
    is_right, text = run_workers(certified, 1, tmp_path / "run")[0]
    assert is_right, text
    assert "not checked  past" in text


def test_from_an_older_step_and_with_another_batch(task, tmp_path):
    overrides = (f"run_dir={tmp_path / 'run'}", *COMMON, "checkpoint.every_steps=2", "checkpoint.keep_last=9")
    run_workers(runs.run, 1, task, overrides)
    there = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    kept = (tmp_path / "run" / "checkpoints" / there[-1] / "state.json").read_text()
    run_workers(
        going_on, 2, task, (*overrides, "train.global_batch_rows=16"), {"from_step": 4, "allow": ("batch-change",)}
    )
    aside = tmp_path / "run" / "checkpoints" / f"{there[-1]}.old-1"
    assert (aside / "state.json").read_text() == kept  # what was newer is set aside, not deleted
    state = state_of(tmp_path / "run")
    assert state["notes"] == ["step 4: allowed: global_batch_rows was 8 and is 16 now"]
    assert -(-(state["rows_consumed"] - 4 * 8) // 16) == state["step"] - 4  # the last step is short
    kept_lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl.old-1").read_text().splitlines()]
    assert max(line["step"] for line in kept_lines) == int(there[-1][5:])  # and so are the numbers of its steps
    assert run_workers(certified, 1, tmp_path / "run")[0][0]
