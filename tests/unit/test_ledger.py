import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_dist.ledger import Ledger, keys, recomputed, row_hashes


class Rows:
    """Random rows as shards give them."""

    def __init__(self, seed, count, seq_len=16):
        draw = np.random.default_rng(seed)
        self.tokens = draw.integers(0, 1 << 17, (count, seq_len))
        self.targets = draw.random((count, seq_len)) < 0.5
        self.positions = draw.integers(0, seq_len, (count, seq_len))


def whole(rows, counts, seed=0):
    return recomputed([(rows, np.array(counts))], keys(seed, rows.tokens.shape[1]))


def test_numpy_and_torch_give_the_same_numbers():
    rows, of_run = Rows(0, 50, 300), keys(7, 300)
    for of_function in of_run:
        ours = row_hashes(rows.tokens, rows.targets, rows.positions, of_function)
        tensors = (torch.from_numpy(part) for part in (rows.tokens, rows.targets, rows.positions, of_function))
        assert ours.tolist() == row_hashes(*tensors).tolist()
        assert len(set(ours.tolist())) == 50


def test_order_and_rank_do_not_matter_and_how_often_does():
    rows = Rows(1, 6)
    apart = [recomputed([(_one(rows, n), np.array([1]))], keys(0, 16)) for n in (4, 2, 0, 5, 1, 3)]
    assert sum(apart, Ledger()) == whole(rows, [1] * 6)
    for counts in ([2, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1], [2, 0, 1, 1, 1, 1]):
        assert whole(rows, counts) != whole(rows, [1] * 6)
    assert whole(rows, [2, 0, 1, 1, 1, 1]).rows == 6


def _one(rows, number):
    one = Rows(0, 1)
    for name in ("tokens", "targets", "positions"):
        setattr(one, name, getattr(rows, name)[number : number + 1])
    return one


@pytest.mark.parametrize("name", ["tokens", "targets", "positions"])
def test_any_change_of_what_was_fed_shows(name):
    rows = Rows(2, 1)
    before = whole(rows, [1])
    for place, bit in itertools.product(range(16), range(17 if name == "tokens" else 1)):
        field = getattr(rows, name)
        kept = field[0, place]
        field[0, place] = kept ^ (1 << bit) if name != "targets" else not kept
        after = whole(rows, [1])
        assert after.first != before.first
        assert after.second != before.second
        field[0, place] = kept


def test_another_seed_has_other_keys():
    rows = Rows(3, 2)
    assert whole(rows, [1, 1], seed=1) != whole(rows, [1, 1], seed=2)


@given(st.lists(st.integers(-(1 << 63), (1 << 63) - 1), min_size=2, max_size=8))
@settings(deadline=None)
def test_sums_wrap_as_tensors_do(numbers):
    total = sum((Ledger(1, n, n) for n in numbers), Ledger())
    assert total.first == torch.tensor(numbers).sum().item() == total.second
    assert total.rows == len(numbers)
