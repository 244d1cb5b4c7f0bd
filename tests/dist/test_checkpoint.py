"""Saved by any layout, continued by any other, on another number of ranks: the same curve."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sft_dist.checkpoint import Checkpoints, Retention, TrainState
from sft_dist.errors import CheckpointError
from sft_dist.ledger import Ledger
from tests.dist import tiny
from tests.workers import RankError, run_workers

HALF, WHOLE = 5, 12
LAYOUTS = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 1), ("bf16", 2), ("bf16", 3)]


def life(topology, folder, precision, stage, start, end, dropout, save_at=()):
    """Train from `start` (restored, unless it is 0) to `end`, saving there and at `save_at`; returns the curve."""
    made, comms = tiny.engine(topology, stage, precision=precision, dropout=dropout, micro_batch_rows=2)
    checkpoints = Checkpoints(folder, identity={"run": "tiny"}, attachments={}, retention=Retention(9), stage=stage, comms=comms)
    state = TrainState()
    if start:
        _, state = checkpoints.restore(made.fragments)
        made.restored(state.adam_step)
        assert (state.step, made.adam_step) == (start, start)
    curve = []
    for step in range(start, end):
        curve += tiny.learn(made, comms, range(step, step + 1))
        state = state.after(rows=8, tokens=128, target_tokens=9, fed=Ledger(8, 1, 1), adam_step=made.adam_step, gpu_seconds=0.5)
        if state.step in (*save_at, end):
            checkpoints.save(made.fragments, state)
    return curve


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Of each layout on two ranks, dropout on: (folder with a checkpoint at HALF, the uninterrupted curve)."""
    folder = tmp_path_factory.mktemp("straight")
    made = {}
    for precision, stage in LAYOUTS:
        path = folder / f"{precision}{stage}"
        made[precision, stage] = (path, run_workers(life, 2, path, precision, stage, 0, WHOLE, 0.1, (HALF,))[0])
    return made


def at_half(path: Path, tmp_path: Path) -> Path:
    """A folder of checkpoints that ends at HALF."""
    name = f"step-{HALF:08d}"
    shutil.copytree(path / name, tmp_path / "checkpoints" / name)
    return tmp_path / "checkpoints"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_world_and_stage_go_on_bit_for_bit(straight, layout, tmp_path):
    path, curve = straight[layout]
    assert run_workers(life, 2, at_half(path, tmp_path), *layout, HALF, WHOLE, 0.1)[0] == curve[HALF:]


@pytest.mark.parametrize(
    ("saver", "loader", "world_size"),
    [
        (("fp32", 0), ("fp32", 3), 1),
        (("fp32", 1), ("fp32", 0), 4),
        (("fp32", 2), ("fp32", 1), 1),
        (("fp32", 3), ("fp32", 2), 4),
        (("fp32", 2), ("fp32", 2), 1),
        (("bf16", 1), ("bf16", 3), 1),
        (("bf16", 2), ("bf16", 1), 4),
        (("bf16", 3), ("bf16", 2), 1),
    ],
)
def test_another_stage_and_world_continue_the_same_curve(straight, saver, loader, world_size, tmp_path):
    path, curve = straight[saver]
    rest = run_workers(life, world_size, at_half(path, tmp_path), *loader, HALF, WHOLE, 0.1)[0]
    # relative to losses of about 4: 1e-6 in fp32, rounding in bf16
    tiny.assert_same_curve(rest, curve[HALF:], tolerance=4e-6 if saver[0] == "fp32" else 5e-4)


def test_one_two_one_processes(straight, tmp_path):
    """2 -> 1 -> 2 processes at stage 2, with an odd shape that pads partitions."""
    folder, curve = tmp_path / "checkpoints", []
    for world_size, start, end in ((2, 0, 4), (1, 4, 8), (2, 8, WHOLE)):
        curve += run_workers(life, world_size, folder, "fp32", 2, start, end, 0.1)[0]
    tiny.assert_same_curve(curve, straight["fp32", 2][1], tolerance=4e-6)
    assert [path.name for path in sorted(folder.glob("step-*"))] == ["step-00000004", "step-00000008", "step-00000012"]
    assert (folder / "latest").readlink().name == "step-00000012"
    assert not list(folder.glob(".*partial"))


def test_a_loaded_moment_that_was_lost_would_be_seen(straight, tmp_path):
    """The plant: the same resume with Adam's step count set wrong leaves the curve."""
    path, curve = straight["fp32", 2]
    folder = at_half(path, tmp_path)
    rest = run_workers(planted, 1, folder)[0]
    assert max(abs(a[0] - b[0]) for a, b in zip(rest, curve[HALF:], strict=True)) > 1e-4


def planted(topology, folder):
    made, comms = tiny.engine(topology, 2, dropout=0.1, micro_batch_rows=2)
    checkpoints = Checkpoints(folder, identity={"run": "tiny"}, attachments={}, retention=Retention(9), stage=2, comms=comms)
    checkpoints.restore(made.fragments)
    made.restored(adam_step=1)
    return tiny.learn(made, comms, range(HALF, WHOLE))


def test_every_rank_hears_that_all_is_damaged(straight, tmp_path):
    folder = at_half(straight["fp32", 2][0], tmp_path)
    shard = next(folder.glob("step-*/shard-00002*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x00")
    with pytest.raises(RankError, match=r"CheckpointError: .*none of 1 checkpoints is whole .*shard-00002.*--fresh"):
        run_workers(life, 2, folder, "fp32", 2, HALF, WHOLE, 0.1)


def test_a_checkpoint_holds_no_pickle(straight):
    for path, _ in straight.values():
        names = {file.name for file in path.rglob("*") if file.is_file()}
        assert {Path(name).suffix for name in names} == {".json", ".safetensors"}
        assert not any(file.read_bytes()[:2] in (b"\x80\x02", b"PK") for file in path.rglob("*.safetensors"))


def test_only_the_last_ones_are_kept(tmp_path):
    kept = run_workers(keep_two, 1, tmp_path)[0]
    assert kept == ["step-00000002", "step-00000003"]


def keep_two(topology, folder):
    made, comms = tiny.engine(topology, 2, micro_batch_rows=8)
    checkpoints = Checkpoints(folder, identity={}, attachments={}, retention=Retention(2), stage=2, comms=comms)
    for step in (1, 2, 3):
        checkpoints.save(made.fragments, TrainState(step=step))
    return [path.name for path in sorted(folder.glob("step-*"))]


def test_what_was_just_saved_is_kept_beside_a_damaged_later_one(tmp_path):
    assert run_workers(save_below_a_damaged_one, 1, tmp_path)[0] == ["step-00000010", "step-00000012.damaged-1"]


def save_below_a_damaged_one(topology, folder):
    made, comms = tiny.engine(topology, 2, micro_batch_rows=8)
    checkpoints = Checkpoints(folder, identity={}, attachments={}, retention=Retention(1), stage=2, comms=comms)
    checkpoints.save(made.fragments, TrainState(step=12))
    (folder / "step-00000012" / "state.json").write_text("{}")
    checkpoints.save(made.fragments, TrainState(step=8))
    checkpoints.save(made.fragments, TrainState(step=10))
    assert checkpoints.restore(made.fragments)[0].name == "step-00000010"
    return [path.name for path in sorted(folder.glob("step-*"))]


def test_what_cannot_be_written_is_everybodys_error(tmp_path):
    with pytest.raises(RankError, match=r"attached: No such file or directory: the checkpoint cannot be written\. Make room"):
        run_workers(attach_what_is_gone, 2, tmp_path)
    assert not list(tmp_path.glob("step-*"))


def attach_what_is_gone(topology, folder):
    made, comms = tiny.engine(topology, 2, micro_batch_rows=4)
    gone = {"attached": folder / "attached"}
    about = {"identity": {}, "retention": Retention(1), "stage": 2, "comms": comms}
    Checkpoints(folder, attachments=gone, **about).save(made.fragments, TrainState(step=1))


def test_another_run_is_refused_naming_both_values(tmp_path):
    with pytest.raises(RankError, match=r"made with data = 'old', this run has 'new'.*--fresh"):
        run_workers(other_data, 1, tmp_path)


def other_data(topology, folder):
    made, comms = tiny.engine(topology, 2, micro_batch_rows=8)
    about = {"attachments": {}, "retention": Retention(1), "stage": 2, "comms": comms}
    Checkpoints(folder, identity={"data": "old"}, **about).save(made.fragments, TrainState(step=1))
    other = Checkpoints(folder, identity={"data": "new"}, **about)
    other.restore(made.fragments)
    raise AssertionError(CheckpointError)
