"""The power goes, at any point of a save: a whole checkpoint is found, and nothing that looks like one and is none."""

from __future__ import annotations

import filecmp
import random
import shutil

import pytest
import torch

from sft_dist.checkpoint import Checkpoints
from sft_dist.comms import Comms
from sft_dist.errors import CheckpointError
from sft_dist.layout import MOMENTS, Fragment
from sft_dist.manifest import masters, verify
from sft_dist.retention import Retention, list_folders
from sft_dist.state import TrainState
from tests.chaos.disk import Disk, recorded
from tests.workers import run_workers

LENGTH = 300_000  # values: several blocks a file


def fragments(step):
    values = {kind: torch.full((LENGTH,), step + part / 4) for part, kind in enumerate(("master", *MOMENTS))}
    return [Fragment("weight", LENGTH, 0, values)]


def saves(topology, folder, forget=None):
    """Three saves, of which the last two remove the one before; returns (operations, how many each save had done)."""
    comms = Comms(topology, torch.device("cpu"))
    attached = folder.parent / "attached"
    (attached / "deep").mkdir(parents=True)
    (attached / "deep" / "file").write_text("attached")
    folder.mkdir()
    with recorded(folder, forget=forget) as log:
        made = Checkpoints(
            folder / "checkpoints",
            identity={},
            attachments={"model": attached},
            retention=Retention(1),
            stage=2,
            comms=comms,
        )
        ends = []
        for step in (1, 2, 3):
            made.save(lambda step=step: fragments(step), TrainState(step=step))
            ends.append(len(log))
    return log, ends


def found(folder):
    """The step of the newest whole checkpoint, its values compared; None: there is none."""
    for path in list_folders(folder / "checkpoints"):
        assert verify(path) is None  # nothing looks like a checkpoint and is none
    live = fragments(0)
    newest = masters(folder / "checkpoints", lambda path: live)
    if newest is None:
        return None
    _, state = newest
    for kind, values in fragments(state.step)[0].values.items():
        assert torch.equal(live[0].values[kind], values)
    return state.step


def crashes(tmp_path, log, ends, root):
    """(operations done, steps that may be found, the step that is) of each crash."""
    draw, lucks = random.Random(0), ("none", "names", "all", *[random.Random(seed) for seed in range(4)])
    for count in range(len(log) + 1):
        done = sum(end <= count for end in ends)
        for luck in lucks if draw.random() < 0.7 or count in ends else lucks[:2]:
            into = tmp_path / "after"
            Disk(root, log[:count]).crash(into, luck)
            yield count, {done or None, min(done + 1, 3)}, found(into)
            shutil.rmtree(into)


def same(one, other):
    compared = filecmp.dircmp(one, other)
    assert not compared.left_only + compared.right_only + compared.diff_files + compared.funny_files
    for inner in compared.subdirs.values():
        same(inner.left, inner.right)


def test_a_whole_checkpoint_is_found_after_a_crash_at_any_point(tmp_path):
    folder = tmp_path / "run"
    log, ends = run_workers(saves, 1, folder)[0]
    assert len(log) > 100
    Disk(folder, log).crash(tmp_path / "replayed", "all")
    same(folder, tmp_path / "replayed")  # the record is complete: nothing was written past it
    seen = set()
    for count, allowed, step in crashes(tmp_path, log, ends, folder):
        assert step in allowed, (count, log[count - 1], step)
        seen.add(step)
    assert seen == {None, 1, 2, 3}
    Disk(folder, log).crash(tmp_path / "end", "none")
    assert found(tmp_path / "end") == 3  # what was reported as saved is on the disk


@pytest.mark.parametrize("forgotten", ["sync_file", "sync_folder"])
def test_a_sync_that_is_left_out_would_be_seen(tmp_path, forgotten):
    folder = tmp_path / "run"
    log, ends = run_workers(saves, 1, folder, forget=forgotten)[0]
    assert not all(is_as_promised(tmp_path, log, ends, folder))


def is_as_promised(tmp_path, log, ends, folder):
    """Of each crash until one finds no whole checkpoint."""
    try:
        for _, allowed, step in crashes(tmp_path, log, ends, folder):
            yield step in allowed
    except (CheckpointError, AssertionError):
        yield False
