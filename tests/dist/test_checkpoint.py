"""Saved by any layout, continued by any other, on another number of ranks: the same curve."""

from __future__ import annotations

import math
import random
import shutil
from pathlib import Path

import pytest
import torch

from sft_dist.checkpoint import Checkpoints
from sft_dist.errors import CheckpointError
from sft_dist.layout import Fragment
from sft_dist.ledger import Ledger
from sft_dist.manifest import read_manifest, read_state
from sft_dist.retention import Retention
from sft_dist.state import TrainState
from sft_dist.store import Reader
from tests.dist import tiny
from tests.invariants import runs
from tests.workers import RankError, run_workers

HALF, WHOLE = 5, 26
# (precision, ZeRO file): fp16 too, whose layouts and loss scaler are the same on a CPU
LAYOUTS = [
    *(("fp32", stage) for stage in ("0", "1", "2", "3", "2_offload", "3_offload")),
    *(("bf16", stage) for stage in ("1", "2", "3", "2_offload", "3_offload")),
    *(("fp16", stage) for stage in ("1", "2", "3")),
]
TOLERANCE = {"fp32": 1e-6, "bf16": 2e-3, "fp16": 2e-3}  # relative, loss and gradient norm, 20 steps


def life(topology, folder, precision, stage, start, end, dropout, save_at=(), scale=None):
    """Train from `start` (restored, unless it is 0) to `end`, saving there and at `save_at`; returns the curve.

    A step is 12 rows, one a micro-batch: the same on 1, 2, 3 and 4 ranks.
    """
    made, comms = tiny.engine(topology, stage, precision=precision, dropout=dropout, global_batch_rows=12)
    checkpoints = Checkpoints(
        folder, identity={"run": "tiny"}, attachments={}, retention=Retention(9), stage=made.stage, comms=comms
    )
    state = TrainState()
    if start:
        _, state, _ = checkpoints.restore(made.fragments)
        made.restored(state.adam_step, state.loss_scale)
        assert state.step == start
        assert precision != "fp16" or made.loss_scale == (state.loss_scale or made.loss_scale)
    if scale is not None:
        made.deepspeed.optimizer.loss_scaler.cur_scale = scale
    curve = []
    for step in range(start, end):
        curve += tiny.learn(made, comms, range(step, step + 1))
        state = state.after(
            rows=12, tokens=128, target_tokens=9, fed=Ledger(8, 1, 1), adam_step=made.adam_step, gpu_seconds=0.5,
            loss_scale=made.loss_scale,
        )  # fmt: skip
        if state.step in (*save_at, end):
            checkpoints.save(made.fragments, state)
    return curve


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Of each layout on two ranks, dropout on: (folder with a checkpoint at HALF, the uninterrupted curve)."""
    folder, made = tmp_path_factory.mktemp("straight"), {}

    def of(layout):
        if layout not in made:
            path = folder / "".join(layout)
            made[layout] = (path, run_workers(life, 2, path, *layout, 0, WHOLE, 0.1, (HALF,))[0])
        return made[layout]

    return of


def at_half(path: Path, tmp_path: Path) -> Path:
    """A folder of checkpoints that ends at HALF."""
    name = f"step-{HALF:08d}"
    shutil.copytree(path / name, tmp_path / "checkpoints" / name)
    return tmp_path / "checkpoints"


@pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
def test_the_same_world_and_stage_go_on_bit_for_bit(straight, layout, tmp_path):
    path, curve = straight(layout)
    folder = at_half(path, tmp_path)
    assert run_workers(life, 2, folder, *layout, HALF, WHOLE, 0.1)[0] == curve[HALF:]
    mine, theirs = (runs.tensors(at / f"step-{WHOLE:08d}") for at in (folder, path))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def pairs():
    """Each layout loads what the one before it saved, on a world size in turn, and a random sample of all pairs."""
    draw = random.Random(4)
    of = {precision: [layout for layout in LAYOUTS if layout[0] == precision] for precision in TOLERANCE}
    chosen = [
        (saver, loader, 1 + number % 4)
        for layouts in of.values()
        for number, (saver, loader) in enumerate(zip(layouts, layouts[1:] + layouts[:1], strict=True))
    ]
    every = [(s, loader, w) for layouts in of.values() for s in layouts for loader in layouts for w in (1, 2, 3, 4)]
    across = [(("fp32", "2"), ("bf16", "1"), 3), (("bf16", "3"), ("fp32", "0"), 4), (("fp16", "2"), ("bf16", "3"), 1)]
    return chosen + draw.sample([pair for pair in every if pair not in chosen], 6) + across


@pytest.mark.parametrize(
    ("saver", "loader", "world_size"), pairs(), ids=lambda it: "-".join(it) if isinstance(it, tuple) else it
)
def test_another_stage_and_world_continue_the_same_curve(straight, saver, loader, world_size, tmp_path):
    path, curve = straight(saver)
    rest = run_workers(life, world_size, at_half(path, tmp_path), *loader, HALF, WHOLE, 0.1)[0]
    off = relative(rest, curve[HALF:])
    tolerance = TOLERANCE[saver[0]] if saver[0] == loader[0] else 1e-2  # another precision rounds otherwise
    assert off[:20].max() <= tolerance, off


def relative(ours, theirs):
    """[steps, 2]: of loss and gradient norm."""
    ours, theirs = (torch.tensor(curve, dtype=torch.float64) for curve in (ours, theirs))
    return (ours - theirs).abs() / theirs.abs()


def test_a_loss_scaler_goes_on_where_it_was(tmp_path):
    """From a scale that overflows: steps are left out until it has come down, and a resumed run knows how far it was."""
    straight = run_workers(life, 2, tmp_path / "straight", "fp16", "2", 0, 12, 0.1, (3,), 2.0**24)[0]
    norms = [norm for _, norm in straight]
    assert norms[:3] == [math.inf] * 3
    assert math.isfinite(norms[-1])
    state = read_state(tmp_path / "straight" / "step-00000003")
    assert (state.adam_step, state.loss_scale["cur_iter"]) == (0, 3)
    folder = tmp_path / "again"
    shutil.copytree(tmp_path / "straight" / "step-00000003", folder / "step-00000003")
    assert run_workers(life, 2, folder, "fp16", "2", 3, 12, 0.1)[0] == straight[3:]


def test_two_one_three_four_processes(straight, tmp_path):
    """Of which some pad their partitions, and some hold nothing of the last parameters."""
    folder, curve = tmp_path / "checkpoints", []
    for world_size, start, end in ((2, 0, 4), (1, 4, 8), (3, 8, 12), (4, 12, 16)):
        curve += run_workers(life, world_size, folder, "fp32", "2", start, end, 0.1)[0]
    assert relative(curve, straight(("fp32", "2"))[1][:16]).max() <= 1e-6
    assert [path.name for path in sorted(folder.glob("step-*"))] == [f"step-{step:08d}" for step in (4, 8, 12, 16)]
    assert (folder / "latest").readlink().name == "step-00000016"
    assert not list(folder.glob(".*partial"))


def slim(topology, folder, stage, start, end):
    """A model of parameters of two elements: on three and four ranks some partitions hold nothing but padding."""
    made, comms = tiny.engine(topology, stage, kind="slim", global_batch_rows=12)
    checkpoints = Checkpoints(
        folder, identity={}, attachments={}, retention=Retention(9), stage=made.stage, comms=comms
    )
    if start:
        made.restored(checkpoints.restore(made.fragments)[1].adam_step)
    curve = tiny.learn(made, comms, range(start, end))
    checkpoints.save(made.fragments, TrainState(step=end, adam_step=end))
    return curve, {fragment.name for fragment in made.fragments()}


def test_partitions_that_are_empty_on_some_ranks(tmp_path):
    straight = run_workers(slim, 1, tmp_path / "straight", 2, 0, 16)[0][0]
    curve, held = [], []
    for number, (world_size, stage) in enumerate(((3, 3), (4, 2), (4, 3), (3, 1))):
        ranks = run_workers(slim, world_size, tmp_path / "run", stage, 4 * number, 4 * number + 4)
        curve += ranks[0][0]
        held.append([names for _, names in ranks])
    every = held[0][0]
    assert not every <= held[0][2]  # the third rank at stage 3 holds nothing of the parameters of two elements
    assert relative(curve, straight).max() <= 2e-6


def test_a_loaded_moment_that_was_lost_would_be_seen(straight, tmp_path):
    """The plant: the same resume with Adam's step count set wrong leaves the curve."""
    path, curve = straight(("fp32", "2"))
    folder = at_half(path, tmp_path)
    rest = run_workers(planted, 1, folder)[0]
    assert max(abs(a[0] - b[0]) for a, b in zip(rest, curve[HALF:], strict=True)) > 1e-4


def planted(topology, folder):
    made, comms = tiny.engine(topology, 2, dropout=0.1, global_batch_rows=12)
    checkpoints = Checkpoints(
        folder, identity={"run": "tiny"}, attachments={}, retention=Retention(9), stage=2, comms=comms
    )
    checkpoints.restore(made.fragments)
    made.restored(adam_step=1)
    return tiny.learn(made, comms, range(HALF, WHOLE))


def test_every_rank_hears_that_all_is_damaged(straight, tmp_path):
    folder = at_half(straight(("fp32", "2"))[0], tmp_path)
    shard = next(folder.glob("step-*/shard-00002*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x00")
    with pytest.raises(RankError, match=r"CheckpointError: .*none of 1 checkpoints is whole .*shard-00002.*--fresh"):
        run_workers(life, 2, folder, "fp32", "2", HALF, WHOLE, 0.1)


def test_a_checkpoint_holds_no_pickle(straight):
    for path, _ in (straight(layout) for layout in LAYOUTS[:4]):
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
    with pytest.raises(
        RankError, match=r"attached: No such file or directory: the checkpoint cannot be written\. Make room"
    ):
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
