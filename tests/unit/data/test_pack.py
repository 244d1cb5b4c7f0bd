import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.data import pack as module
from sft_dist.data.pack import pack
from sft_dist.errors import DataError

CASES = st.integers(2, 80).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(1, n), max_size=150)))
STREAMS = st.tuples(st.integers(2, 20), st.lists(st.integers(1, 70), max_size=40))
WINDOWS = st.integers(1, 1000)


def rows_of(packings):
    """Rows of (document, start, tokens), all windows."""
    rows = []
    for packing in packings:
        columns = (packing.documents, packing.starts, packing.counts)
        assert all(array.dtype == np.int64 for array in (*columns, packing.ends))
        pieces = list(zip(*(column.tolist() for column in columns), strict=True))
        assert packing.ends[-1] == len(pieces)
        begins = [0, *packing.ends[:-1].tolist()]
        rows += [pieces[begin:end] for begin, end in zip(begins, packing.ends.tolist(), strict=True)]
    return rows


def num_rows_one_by_one(lengths, seq_len):
    """Best-fit decreasing, a document at a time, by its definition: what others do."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row, room in enumerate(rooms) if room >= length]
        if not fitting:
            fitting = [len(rooms)]
            rooms.append(seq_len)
        rooms[min(fitting, key=rooms.__getitem__)] -= length
    return len(rooms)


@given(CASES, st.sampled_from(["best_fit", "none"]), WINDOWS)
def test_each_document_is_whole_in_one_row_and_no_row_overflows(case, how, window_tokens):
    seq_len, lengths = case
    rows = rows_of(pack(lengths, seq_len, how=how, window_tokens=window_tokens))
    assert sorted(piece for row in rows for piece in row) == [(n, 0, length) for n, length in enumerate(lengths)]
    assert all(0 < sum(count for _, _, count in row) <= seq_len for row in rows)
    assert all(row == sorted(row) for row in rows)


@given(CASES, st.integers(0, 5))
def test_rows_are_in_the_order_of_their_first_documents_and_few(case, seed):
    seq_len, lengths = case
    rows = rows_of(pack(lengths, seq_len, seed=seed))
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    fills = [sum(count for _, _, count in row) for row in rows]
    assert all(a + b > seq_len for n, a in enumerate(fills) for b in fills[:n]), "two rows would fit into one"


SMALL = st.integers(4, 12).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(1, n), min_size=1, max_size=9)))


@given(SMALL)
def test_a_row_is_filled_as_well_as_what_is_left_allows(case):
    """Against all subsets: the row of the longest document is the fullest there is."""
    seq_len, lengths = case
    rows = rows_of(pack(lengths, seq_len))
    longest = max(lengths)
    others = sorted(lengths)[:-1]
    sums = {0}
    for length in others:
        sums |= {total + length for total in sums}
    best = longest + max(total for total in sums if total <= seq_len - longest)
    assert best in [sum(count for _, _, count in row) for row in rows if any(count == longest for _, _, count in row)]


@pytest.mark.parametrize("shortest", [1, 60, 110])
def test_fewer_rows_than_best_fit_decreasing(shortest):
    lengths = np.random.default_rng(0).lognormal(5.3, 0.6, 3000).astype(int).clip(shortest, 1024)
    ours, theirs = len(rows_of(pack(lengths, 1024))), num_rows_one_by_one(lengths.tolist(), 1024)
    assert ours <= theirs
    assert ours <= 1.005 * lengths.sum() / 1024 + 1


@given(CASES, st.sampled_from(["best_fit", "concat", "none"]), WINDOWS)
def test_windows_are_packed_by_themselves(case, how, window_tokens):
    seq_len, lengths = case
    packings = list(pack(lengths, seq_len, how=how, window_tokens=window_tokens))
    documents = [np.unique(packing.documents) for packing in packings]
    assert [n for window in documents for n in window.tolist()] == list(range(len(lengths)))
    for window, following in zip(documents, [*documents[1:], None], strict=False):
        tokens = sum(lengths[n] for n in window.tolist())
        assert len(window) == 1 or tokens <= window_tokens
        assert following is None or tokens + lengths[following[0]] > window_tokens


@given(STREAMS)
def test_concat_predicts_each_token_but_a_documents_first_once(case):
    seq_len, lengths = case
    rows = rows_of(pack(lengths, seq_len, how="concat"))
    pieces = [piece for row in rows for piece in row]
    predicted = [(n, token) for n, start, count in pieces for token in range(start + 1, start + count)]
    assert predicted == [(n, token) for n, length in enumerate(lengths) for token in range(1, length)]
    assert [n for n, start, _ in pieces if start == 0] == list(range(len(lengths)))
    assert all(count >= 2 or lengths[n] == 1 for n, _, count in pieces)


@given(STREAMS)
def test_concat_fills_every_row_but_the_last(case):
    seq_len, lengths = case
    rows = rows_of(pack(lengths, seq_len, how="concat"))
    fills = [sum(count for _, _, count in row) for row in rows]
    assert all(fill <= seq_len for fill in fills)
    for fill, following in zip(fills, rows[1:], strict=False):
        document, start, _ = following[0]
        assert fill == seq_len or (fill == seq_len - 1 and start == 0 and lengths[document] > 1)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint32, np.uint64])
def test_neither_the_type_nor_the_place_of_the_lengths_matters(dtype, tmp_path):
    lengths = np.random.default_rng(0).integers(1, 60, 500)
    on_disk = np.memmap(tmp_path / "lengths", dtype, "w+", shape=lengths.shape)
    on_disk[:] = lengths
    for how in ("best_fit", "concat", "none"):
        expected = rows_of(pack(lengths.tolist(), 64, how=how, window_tokens=2000))
        assert rows_of(pack(on_disk, 64, how=how, window_tokens=2000)) == expected


def test_the_seed_decides_which_of_equal_documents_share_a_row():
    lengths = [8, 24] * 100
    one, again, other = (rows_of(pack(lengths, 32, seed=seed)) for seed in (1, 1, 2))
    assert one == again
    assert one != other
    assert len(one) == len(other) == 100


def test_windows_of_very_short_documents_are_bounded_in_documents(monkeypatch):
    monkeypatch.setattr(module, "WINDOW_DOCUMENTS", 10)
    monkeypatch.setattr(module, "READ_DOCUMENTS", 3)
    windows = [packing.documents.tolist() for packing in pack([1] * 25, 16)]
    assert windows == [list(range(10)), list(range(10, 20)), list(range(20, 25))]


def test_rows_longer_than_sixteen_bits():
    lengths = np.random.default_rng(0).integers(1, 200_000, 400)
    rows = rows_of(pack(lengths, 200_000, window_tokens=1 << 30))
    assert len(rows) <= num_rows_one_by_one(lengths.tolist(), 200_000)


def test_more_rows_than_sixteen_bits():
    rows = rows_of(pack(np.full(70_000, 2), 2))
    assert rows == [[(n, 0, 2)] for n in range(70_000)]


@pytest.mark.parametrize("lengths", [[], np.empty(0, dtype=np.uint16)])
@pytest.mark.parametrize("how", ["best_fit", "concat", "none"])
def test_nothing_packs_to_nothing(lengths, how):
    assert list(pack(lengths, 16, how=how)) == []


@pytest.mark.parametrize(
    ("lengths", "how", "text"),
    [
        ([3, 17], "best_fit", "document 1: 17 tokens do not fit a row of 16; .*seq_len"),
        ([3, 17], "none", "document 1: 17 tokens do not fit a row of 16; .*seq_len"),
        ([3, 0], "best_fit", "document 1: 0 tokens, .* drop it"),
        ([3, 30, -1], "concat", "document 2: -1 tokens, .* drop it"),
        ([3, 0], "none", "document 1: 0 tokens, .* drop it"),
    ],
)
@pytest.mark.parametrize("window_tokens", [3, 100])
def test_a_document_that_fits_no_row_is_named(lengths, how, text, window_tokens):
    with pytest.raises(DataError, match=text):
        list(pack(lengths, 16, how=how, window_tokens=window_tokens))


def test_a_row_without_room_for_a_target_is_refused():
    with pytest.raises(DataError, match=r"rows of 1 tokens .* raise prepare\.seq_len"):
        list(pack([1], 1))


def test_real_lengths_fill_almost_everything():
    lengths = np.random.default_rng(0).lognormal(4.5, 0.8, 20_000).astype(int).clip(1, 1024)
    assert lengths.sum() / (len(rows_of(pack(lengths, 1024))) * 1024) > 0.998
