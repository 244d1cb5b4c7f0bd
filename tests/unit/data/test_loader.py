import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_dist.batch import with_last
from sft_dist.data import loader as loader_module
from sft_dist.data.loader import Loader, widen
from sft_dist.data.shards import Manifest, Shards, row_dtype, write
from sft_dist.topology import Topology
from tests.unit.data.test_shards import ABOUT, documents


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader") / "train"
    rows = [documents([5, 3], seed=seed) for seed in range(23)]
    write(folder, rows, seq_len=9, rows_per_shard=10, vocab_size=50, **ABOUT)
    return Shards.open(folder)


def fed(shards, world, micro, start, end, batch):
    """Row numbers of each step, over all ranks, in the order of the stream."""
    ranks = [
        list(Loader(shards, Topology(rank, world, rank), seed=3, micro_batch_rows=micro).steps(
            start=start, end=end, global_batch_rows=batch))
        for rank in range(world)
    ]  # fmt: skip
    for steps in zip(*ranks, strict=True):
        assert len({len(step.blocks) for step in steps}) == 1, "every rank takes part equally often"
        micros = [list(step.micro_batches) for step in steps]
        rows = [mb.rows for turn in zip(*micros, strict=True) for mb in turn]
        for step, mine in zip(steps, micros, strict=True):
            assert step.num_targets == sum(int(mb.targets.sum()) for mb in mine)
            assert step.num_tokens == sum(int((mb.documents >= 0).sum()) for mb in mine)
        yield np.concatenate(rows).tolist()


@given(
    st.sampled_from([1, 2, 3, 4]), st.sampled_from([1, 2, 5]), st.integers(0, 30), st.integers(1, 60), st.integers(1, 9)
)
@settings(max_examples=40, deadline=None)
def test_the_stream_is_the_same_for_every_world_and_start(shards, world, micro, start, length, batch):
    alone = list(fed(shards, 1, 1, start, start + length, batch))
    assert list(fed(shards, world, micro, start, start + length, batch)) == alone
    assert sum(map(len, alone)) == length


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_an_epoch_is_every_row_once(shards, world):
    for epoch in (0, 1, 2):
        rows = [row for step in fed(shards, world, 2, 23 * epoch, 23 * (epoch + 1), 8) for row in step]
        assert sorted(rows) == list(range(23))


def test_a_rank_without_rows_gets_padding_without_targets(shards):
    step = Loader(shards, Topology(1, 2, 1), seed=0, micro_batch_rows=4).sweep()
    mine = list(step.micro_batches)
    assert len(mine) == 3
    idle = Loader(shards, Topology(3, 4, 3), seed=0, micro_batch_rows=8).sweep()
    (batch,) = idle.micro_batches
    assert (idle.num_tokens, idle.num_targets, len(batch.rows)) == (0, 0, 0)
    assert batch.tokens.shape == (1, 9)
    assert not batch.targets.any()
    assert (batch.documents == -1).all()


def test_a_micro_batch_says_which_row_of_the_stream_it_begins_with(shards):
    steps = list(
        Loader(shards, Topology(1, 2, 1), seed=0, micro_batch_rows=2).steps(start=8, end=24, global_batch_rows=8)
    )
    assert [mb.first_ordinal for step in steps for mb in step.micro_batches] == [10, 14, 18, 22]
    assert all(mb.tokens.dtype == torch.int64 for step in steps for mb in step.micro_batches)


@given(
    st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), min_size=1, max_size=5),
    st.integers(18, 33),
    st.sampled_from([50, 1 << 16, 70_000]),
)
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def test_widened_by_torch_is_widened_by_numpy(tmp_path_factory, device, lengths, seq_len, vocab_size):
    folder = tmp_path_factory.mktemp("widen") / "train"
    rows = [documents(row, vocab_size, seed) for seed, row in enumerate(lengths)]
    write(folder, rows, seq_len=seq_len, rows_per_shard=2, vocab_size=vocab_size, **ABOUT)
    shards, numbers = Shards.open(folder), np.arange(len(rows))[::-1]
    theirs = shards.rows(numbers)
    ours = widen(shards.stored(numbers), seq_len, torch.device(device))
    for part, name in zip(ours, ("tokens", "targets", "positions", "documents"), strict=True):
        expected = torch.from_numpy(getattr(theirs, name))
        assert part.dtype == expected.dtype
        assert torch.equal(part.cpu(), expected), name


@pytest.mark.parametrize(("read_rows", "plan_rows"), [(1, 1), (3, 10), (1024, 16_384)])
def test_how_much_is_read_and_planned_at_a_time_changes_nothing(shards, monkeypatch, read_rows, plan_rows):
    def micro_batches():
        loader = Loader(shards, Topology(1, 2, 1), seed=3, micro_batch_rows=2)
        return [mb for step in loader.steps(start=5, end=70, global_batch_rows=9) for mb in step.micro_batches]

    expected = micro_batches()
    monkeypatch.setattr(loader_module, "_READ_ROWS", read_rows)
    monkeypatch.setattr(loader_module, "_PLAN_ROWS", plan_rows)
    for ours, theirs in zip(micro_batches(), expected, strict=True):
        assert (ours.first_ordinal, ours.rows.tolist()) == (theirs.first_ordinal, theirs.rows.tolist())
        for name in ("tokens", "targets", "positions", "documents"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))


def test_a_billion_rows_cost_no_memory_and_no_time_to_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(Shards, "_check_rows", lambda *_: None)  # a sparse file holds no digests
    rows, seq_len = 10**9, 8
    with (tmp_path / "00000.rows").open("wb") as file:
        file.truncate(rows * row_dtype(seq_len, "<u2").itemsize)  # sparse
    counts = {"documents": rows, "tokens": rows, "targets": rows}
    about = {"dtype": "<u2", "vocab_size": 50, "eos_id": 0, "pad_id": 1, "tokenizer": "t", "template": "p"}
    shards = Shards(tmp_path, Manifest(seq_len=seq_len, rows=rows, rows_per_shard=rows, **counts, **about))
    loader = Loader(shards, Topology(), seed=0, micro_batch_rows=8)
    before = resident_bytes()
    seconds = []
    for start in 2 * (0, 10**9 - 4, 123 * 10**9 + 7):  # the second time from the page cache
        began = time.perf_counter()
        step = next(loader.steps(start=start, end=start + 64, global_batch_rows=8))
        seconds.append(time.perf_counter() - began)
        (batch,) = step.micro_batches
        assert len(set(batch.rows.tolist())) == 8
        assert 0 <= batch.rows.min() <= batch.rows.max() < rows
    assert resident_bytes() - before < 50 * 2**20
    assert min(seconds[3:]) < 0.05  # generous: the machine may be busy; benchmarks/loader.py measures it


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_rows_are_on_their_way_to_the_device_before_they_are_asked_for(shards, monkeypatch):
    """From pinned memory, without a wait; a micro-batch is copied before the one in front of it is learned."""
    done = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: done.append("pinned") or self)
    own = torch.Tensor.to

    def to(self, kind, non_blocking=False):
        if isinstance(kind, torch.device):
            done.append("copied" if non_blocking else "waited")
        return own(self, kind)

    monkeypatch.setattr(torch.Tensor, "to", to)
    loader = Loader(shards, Topology(), seed=0, micro_batch_rows=2, device=torch.device("meta"))
    step = next(loader.steps(start=0, end=6, global_batch_rows=6))
    for _ in with_last(step.micro_batches):
        done.append("learned")
    copy = ["pinned", "copied"]
    assert done == [*copy, *copy, "learned", *copy, "learned", "learned"]
