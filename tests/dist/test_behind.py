"""Saves behind the step loop: what is written is what was there when the save began, and a failure is survived."""

from __future__ import annotations

import errno
import threading
from dataclasses import replace

import pytest
import torch

from sft_dist import store
from sft_dist.checkpoint import Checkpoints
from sft_dist.manifest import verify
from sft_dist.retention import Retention
from sft_dist.state import TrainState
from sft_dist.schedule import Cadence
from tests.dist import tiny
from tests.dist.test_trainer import loop
from tests.workers import RankError, run_workers


def checkpoints_in(folder, comms, stage):
    return Checkpoints(folder, identity={}, attachments={}, retention=Retention(9), stage=stage, comms=comms)


def held_back(topology, folder, stage, precision, is_alias=False):
    """A synchronous save, then one whose writer is held until two more steps are done; was it, and are the bytes equal?"""
    made, comms = tiny.engine(topology, stage, precision=precision, micro_batch_rows=2)
    at_once, behind = checkpoints_in(folder / "at-once", comms, stage), checkpoints_in(folder / "behind", comms, stage)
    tiny.learn(made, comms, range(3))
    state, may_write = TrainState(step=3), threading.Event()
    at_once.save(made.fragments, state)
    write, take = store.Snapshot.write, store.Snapshot.take

    def late(snapshot, path):
        assert may_write.wait(60)
        if is_alias:  # the plant: what a `.cpu()` that copies nothing would write
            take(snapshot, made.fragments())
        return write(snapshot, path)

    store.Snapshot.write = late
    behind.begin(made.fragments, state)
    tiny.learn(made, comms, range(3, 5))
    was_running = behind.finished() is None
    may_write.set()
    saved = behind.finish()
    assert saved.failure is None
    paths = [folder / name / "step-00000003" for name in ("at-once", "behind")]
    name = f"shard-{topology.rank + 1:05d}.safetensors"
    return was_running, (paths[0] / name).read_bytes() == (paths[1] / name).read_bytes(), verify(paths[1])


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (3, "bf16")]
)
def test_a_writer_that_is_late_writes_what_a_synchronous_save_does(tmp_path, stage, precision):
    assert run_workers(held_back, 2, tmp_path, stage, precision) == [(True, True, None)] * 2


def test_a_snapshot_that_is_no_copy_would_be_seen(tmp_path):
    for was_running, is_same, _ in run_workers(held_back, 2, tmp_path, 0, "fp32", is_alias=True):
        assert (was_running, is_same) == (True, False)


def failing(topology, folder, failures, cadence, failing_rank=1):
    """The train loop where so many writes of one rank find the disk full."""
    left, write = [failures], store.Snapshot.write

    def full(snapshot, path):
        if topology.rank == failing_rank and left[0]:
            left[0] -= 1
            path.write_bytes(b"begun")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(snapshot, path)

    store.Snapshot.write = full
    _, state, lines, saved = loop(topology, folder, cadence=cadence)
    costs = [step for step, values in lines if "checkpoint_bytes" in values]
    return replace(state, gpu_seconds=0.0), costs, saved, sorted(path.name for path in folder.glob(".step*"))


def test_a_full_disk_is_survived_and_the_save_tried_again(tmp_path):
    cadence = Cadence(6, checkpoint_steps=2)
    wanted = run_workers(failing, 2, tmp_path / "never", 0, cadence)[0]
    assert wanted[1:] == ([2, 4, 6], ["step-00000002", "step-00000004", "step-00000006"], [])
    once = run_workers(failing, 2, tmp_path / "once", 1, cadence)[0]
    assert once[0] == wanted[0]
    assert once[2][-1] == "step-00000006"
    assert once[1][0] in (
        3,
        4,
    )  # the step after the one whose save failed, or after that: the failure is found behind the loop
    assert once[3] == []
    twice = run_workers(failing, 2, tmp_path / "twice", 2, cadence)[0]
    assert (twice[0], twice[2][-1], twice[3]) == (wanted[0], "step-00000006", [])


def test_a_disk_that_stays_full_ends_the_run_at_its_end_in_one_line(tmp_path):
    with pytest.raises(
        RankError,
        match=r"shard-00002\.safetensors: No space left on device: the checkpoint cannot be written\. Make room",
    ):
        run_workers(failing, 2, tmp_path, 99, Cadence(6, checkpoint_steps=2))
    assert list(tmp_path.iterdir()) == []


def frozen(topology, folder, stage, world_before):
    """Save with some weights frozen, or read them back into a model whose frozen weights were spoilt."""
    made, comms = tiny.engine(
        topology, stage, global_batch_rows=12, frozen=("transformer.h.0.mlp.c_fc.weight", "transformer.ln_f.bias")
    )
    checkpoints = checkpoints_in(folder, comms, stage)
    if world_before is None:
        tiny.learn(made, comms, range(2))
        checkpoints.save(made.fragments, TrainState(step=2, adam_step=2))
    else:
        for fragment in made.fragments():
            for values in fragment.values.values():
                values.fill_(9.0)
        checkpoints.restore(made.fragments)
        made.restored(2)
    with torch.no_grad():
        batch = tiny.rows(0)
        logits = made.logits(batch.tokens, batch.positions)
    return logits.double().sum(dim=(1, 2)).tolist()


@pytest.mark.parametrize(
    ("saved", "loaded"), [((0, 2), (3, 3)), ((1, 2), (2, 1)), ((2, 3), (0, 2)), ((3, 2), (1, 4)), ((3, 3), (3, 1))]
)
def test_frozen_weights_travel_with_the_others(tmp_path, saved, loaded):
    before = run_workers(frozen, saved[1], tmp_path, saved[0], None)[0]
    after = run_workers(frozen, loaded[1], tmp_path, loaded[0], saved[1])[0]
    assert after == pytest.approx(before, rel=1e-5)
