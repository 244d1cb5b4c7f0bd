"""A seeded slice of `make chaos`, and single bytes flipped all over a checkpoint and a folder of shards."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import torch

from sft_dist.checkpoint import Checkpoints
from sft_dist.comms import Comms
from sft_dist.data.records import Document
from sft_dist.data.shards import Shards, write
from sft_dist.errors import CheckpointError, DataError
from sft_dist.layout import MOMENTS, Fragment
from sft_dist.manifest import masters
from sft_dist.retention import Retention
from sft_dist.state import TrainState
from tests.chaos.driver import campaigns
from tests.workers import run_workers

PLANNED = {2: "a rank hangs", 5: "a flipped byte in the newest", 9: "cut shards"}  # or soon after; the others are drawn
LENGTHS = {"matrix": 120_000, "bias": 37}


def test_a_slice_of_lives_ends_as_if_nothing_had_happened():
    """At least 12 lives in a steady and an elastic campaign; what each must satisfy is asserted in the driver."""
    said = []
    summary = campaigns(12, seed=2, say=said.append, per_campaign=6, planned=PLANNED)
    assert summary["lives"] == 12, said
    assert set(PLANNED.values()) <= summary["violence"].keys(), said
    assert [campaign["elastic"] for campaign in summary["campaigns"]][:2] == [False, True]
    assert summary["campaigns"][0]["is_bit_identical"]
    assert summary["layout_changes"] >= 3


def fragments(seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        Fragment(name, length, 0, {kind: torch.randn(length, generator=generator) for kind in ("master", *MOMENTS)})
        for name, length in LENGTHS.items()
    ]


def save_two(topology, folder):
    """Two checkpoints of one run, attachments and all."""
    attached = folder / "attached"
    attached.mkdir(parents=True)
    (attached / "config.json").write_text('{"model_type": "gpt2"}' * 20)
    checkpoints = Checkpoints(
        folder / "checkpoints", identity={"data": "d"}, attachments={"model": attached}, retention=Retention(2), stage=2,
        comms=Comms(topology, torch.device("cpu")),
    )  # fmt: skip
    for step in (1, 2):
        checkpoints.save(lambda step=step: fragments(step), TrainState(step=step))


def flips(folder: Path, count: int, seed: int):
    """Damage so many single bytes, one at a time, spread over every file: by size, but at least 20 a file."""
    draw = random.Random(seed)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    total = sum(path.stat().st_size for path in files)
    for path in files:
        size = path.stat().st_size
        with path.open("r+b", buffering=0) as file:
            for _ in range(max(20, count * size // total)):
                place, mask = draw.randrange(size), draw.randint(1, 255)
                file.seek(place)
                before = file.read(1)
                file.seek(place)
                file.write(bytes([before[0] ^ mask]))
                yield path, place
                file.seek(place)
                file.write(before)


def outcome(folder):
    """The step of the checkpoint that is used, its tensors compared; None: refused."""
    live = fragments(0)
    try:
        path, state = masters(folder / "checkpoints", lambda path: live)
    except CheckpointError:
        return None
    assert path.name == f"step-{state.step:08d}"
    for mine, saved in zip(live, fragments(state.step), strict=True):
        assert all(torch.equal(mine.values[kind], saved.values[kind]) for kind in mine.values)
    return state.step


def test_every_flipped_byte_of_a_checkpoint_is_found_before_it_is_used(tmp_path, caplog):
    """The newest is passed over for each of a thousand flips; without another one the run refuses to start."""
    run_workers(save_two, 1, tmp_path)
    caplog.set_level("CRITICAL")
    assert outcome(tmp_path) == 2
    seen = 0
    for path, place in flips(tmp_path / "checkpoints" / "step-00000002", 800, seed=1):
        seen += 1
        assert outcome(tmp_path) == 1, (path, place)
    assert seen >= 800
    assert outcome(tmp_path) == 2  # every byte was put back
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000001")
    for path, place in flips(tmp_path / "checkpoints" / "step-00000002", 100, seed=2):
        assert outcome(tmp_path) is None, (path, place)


def resume_from_flipped(topology, folder, count, seed):
    """The step that a run goes on from, of each flip in the newest of two checkpoints."""
    checkpoints = Checkpoints(
        folder / "checkpoints", identity={"data": "d"}, attachments={}, retention=Retention(2), stage=2,
        comms=Comms(topology, torch.device("cpu")),
    )  # fmt: skip
    newest, seen = folder / "checkpoints" / "step-00000002", []
    for path, place in flips(newest, count, seed):
        seen.append((path.name, place, checkpoints.restore(lambda: fragments(0))[1].step))
        newest.with_name(f"{newest.name}.damaged-1").rename(newest)
    return seen


def test_every_flipped_byte_is_found_by_a_run_that_goes_on(tmp_path):
    run_workers(save_two, 1, tmp_path)
    (seen,) = run_workers(resume_from_flipped, 1, tmp_path, 200, 5)
    assert len(seen) >= 200
    assert [each for each in seen if each[2] != 1] == []


def test_every_flipped_byte_of_shards_is_found_before_a_row_is_used(tmp_path):
    draw = np.random.default_rng(0)
    rows = [[Document(draw.integers(0, 50, n).tolist(), [False] * n, "f:1")] for n in draw.integers(2, 64, 60)]
    about = {"vocab_size": 50, "eos_id": 0, "pad_id": 1, "tokenizer": "t", "template": "p"}
    write(tmp_path / "train", rows, seq_len=64, rows_per_shard=32, **about)
    whole = read(tmp_path / "train")
    seen = 0
    for path, place in flips(tmp_path / "train", 400, seed=3):
        seen += 1
        assert path.name in read(tmp_path / "train"), place
    assert seen >= 390
    assert read(tmp_path / "train") == whole


def read(folder):
    """Every row, and where its documents are from; or what is said instead."""
    try:
        shards = Shards.open(folder)
        shards.origins(range(60))
        return shards.stored(np.arange(60)).records.tobytes()
    except DataError as error:
        return str(error)
