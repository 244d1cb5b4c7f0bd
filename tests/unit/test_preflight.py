import errno
import shutil
from collections import namedtuple

import pytest
import torch

from sft_dist import store
from sft_dist.checkpoint import Checkpoints
from sft_dist.errors import CheckpointError
from sft_dist.layout import Fragment
from sft_dist.preflight import rehearse, require_room
from sft_dist.retention import Retention

Usage = namedtuple("Usage", "total used free")
GB = 10**9


@pytest.mark.parametrize(
    ("free", "message"),
    [
        (50 * GB, None),
        (40 * GB, None),
        (
            39 * GB,
            "warning: 4 checkpoints of 10.00 GB (kept, one in the making, one to be removed) take more than the 39.00 GB",
        ),
    ],
)
def test_what_is_kept_and_two_more_must_fit(tmp_path, monkeypatch, free, message):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, free))
    said = require_room(tmp_path / "run" / "checkpoints", Retention(2), 10 * GB)
    assert said == message if message is None else said.startswith(message)


def test_room_that_checkpoints_of_the_run_take_is_theirs(tmp_path, monkeypatch):
    (tmp_path / "step-00000001").mkdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 2000))
    assert require_room(tmp_path, Retention(1), 1000) is None
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 1999))
    assert require_room(tmp_path, Retention(1), 1000).startswith("warning: 3 checkpoints")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 2000))
    assert require_room(tmp_path, Retention(1), 1000, is_fresh=True).startswith("warning: 3 checkpoints")


def test_what_a_killed_life_left_half_written_does_not_count(tmp_path, monkeypatch):
    partial = tmp_path / ".step-00000001.partial"
    partial.mkdir()
    (partial / "shard").write_bytes(b"0" * 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 2000))
    assert require_room(tmp_path, Retention(1), 1000) is None
    assert require_room(tmp_path, Retention(1), 1000, is_fresh=True).startswith("warning: 3 checkpoints")


def test_no_room_for_a_single_one_is_refused_with_the_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, GB))
    with pytest.raises(
        CheckpointError, match=r"1\.00 GB are free, and one checkpoint takes 2\.00 GB; make room, or choose"
    ):
        require_room(tmp_path, Retention(1), 2 * GB)


def made(tmp_path, comms):
    about = {"identity": {}, "attachments": {}, "retention": Retention(1), "stage": 2}
    return Checkpoints(tmp_path / "checkpoints", **about, comms=comms)


def fragments():
    return [Fragment("weight", 1000, 0, {"master": torch.ones(1000)})]


def test_a_sample_is_written_at_start_and_leaves_nothing(tmp_path, comms):
    checkpoints = made(tmp_path, comms)
    assert rehearse(checkpoints, fragments) > 0
    assert list(checkpoints.folder.iterdir()) == []
    assert checkpoints.snapshot.num_bytes == 4000  # the buffer that saves will reuse is there
    pointer = checkpoints.snapshot.buffer.data_ptr()
    checkpoints.snapshot.take(fragments())
    assert checkpoints.snapshot.buffer.data_ptr() == pointer


def test_a_folder_that_cannot_be_written_ends_the_run_before_its_first_step(tmp_path, comms, monkeypatch):
    def full(path, *parts):
        path.write_bytes(b"begun")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(store, "write_large", full)
    with pytest.raises(
        CheckpointError, match=r"sample-00000\.partial: No space left on device: the checkpoint cannot be written"
    ):
        rehearse(made(tmp_path, comms), fragments)
    assert list((tmp_path / "checkpoints").iterdir()) == []
