import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_dist.data.order import Blocks, row_numbers


@given(st.integers(1, 3000), st.integers(0, 2**32), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_every_epoch_is_a_permutation(num_rows, seed, epoch):
    rows = row_numbers(np.arange(num_rows) + epoch * num_rows, num_rows, seed)
    assert sorted(rows.tolist()) == list(range(num_rows))


@given(st.integers(2, 500), st.integers(0, 99), st.data())
@settings(max_examples=40, deadline=None)
def test_a_row_is_a_function_of_its_ordinal_alone(num_rows, seed, data):
    ordinals = np.array(data.draw(st.lists(st.integers(0, 4 * num_rows), min_size=1, max_size=20)))
    together = row_numbers(ordinals, num_rows, seed)
    assert together.tolist() == [int(row_numbers(np.array([g]), num_rows, seed)[0]) for g in ordinals]


def test_epochs_and_seeds_differ():
    first, second = row_numbers(np.arange(2000), 1000, 0).reshape(2, 1000)
    assert (first != second).mean() > 0.9
    assert (first != row_numbers(np.arange(1000), 1000, 1)).mean() > 0.9


def test_memory_and_time_do_not_grow_with_the_set():
    rows = row_numbers(np.arange(10), 10**12, seed=3)
    assert len(set(rows.tolist())) == 10
    assert rows.max() < 10**12


def test_tiny_sets_are_not_biased():
    counts: dict[tuple, int] = {}
    for seed in range(3000):
        order = tuple(row_numbers(np.arange(4), 4, seed).tolist())
        counts[order] = counts.get(order, 0) + 1
    expected = 3000 / 24
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert len(counts) == 24
    assert chi_square < 50  # 23 degrees of freedom: 49.7 is p = 0.001


def test_the_order_of_a_seed_never_changes():
    assert row_numbers(np.arange(10), 1000, 7).tolist() == [345, 132, 961, 910, 39, 600, 227, 370, 56, 69]
    assert row_numbers(np.arange(10), 1000, 7, blocks=Blocks(8, 4)).tolist() == [
        295,
        696,
        702,
        293,
        619,
        348,
        350,
        345,
        700,
        291,
    ]


@given(st.integers(1, 1500), st.integers(1, 70), st.integers(1, 20), st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_by_blocks_every_epoch_is_a_permutation(num_rows, block_rows, window_blocks, epoch):
    blocks = Blocks(block_rows, window_blocks)
    ordinals = np.arange(num_rows) + epoch * num_rows
    rows = row_numbers(ordinals, num_rows, 5, blocks=blocks)
    assert sorted(rows.tolist()) == list(range(num_rows))
    some = ordinals[::7]
    assert row_numbers(some, num_rows, 5, blocks=blocks).tolist() == rows[::7].tolist()


def test_a_window_reads_from_few_blocks_and_mixes_them():
    rows = row_numbers(np.arange(64 * 16 * 10), 64 * 16 * 10, 0, blocks=Blocks(64, 16)).reshape(10, -1)
    for window in rows // 64:
        assert len(set(window.tolist())) == 16
        assert len(set(window[:64].tolist())) > 12
    assert (np.diff(np.sort(rows[0]) // 64) > 1).any(), "the blocks of a window are not neighbours"
    assert (rows[0] % 64 != rows[1] % 64).mean() > 0.9, "each window has a key of its own"
