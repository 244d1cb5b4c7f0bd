import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_dist.data.loader import Loader
from sft_dist.data.shards import Shards, write
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
