import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.data.pack import pack
from sft_dist.errors import DataError

LENGTHS = st.integers(8, 200).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(1, n), max_size=120)))


@given(LENGTHS)
def test_each_document_is_in_one_row_and_no_row_overflows(case):
    seq_len, lengths = case
    rows = pack(lengths, seq_len)
    assert sorted(document for row in rows for document in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[document] for document in row) <= seq_len for row in rows)


@given(LENGTHS)
def test_the_same_lengths_give_the_same_rows(case):
    seq_len, lengths = case
    assert pack(lengths, seq_len) == pack(np.array(lengths, dtype=np.int32), seq_len)


@given(LENGTHS)
def test_no_two_rows_could_be_one(case):
    seq_len, lengths = case
    fills = sorted(sum(lengths[document] for document in row) for row in pack(lengths, seq_len))
    assert len(fills) < 2 or fills[0] + fills[1] > seq_len


@pytest.mark.parametrize("length", [0, 17, -1])
def test_a_document_that_fits_no_row_is_named(length):
    with pytest.raises(DataError, match=rf"document 1: {length} tokens do not fit a row of 16; .*seq_len"):
        pack([3, length], 16)


def test_real_lengths_fill_almost_everything():
    lengths = np.random.default_rng(0).lognormal(4.5, 0.8, 20_000).astype(int).clip(1, 1024)
    rows = pack(lengths, 1024)
    assert lengths.sum() / (len(rows) * 1024) > 0.998
