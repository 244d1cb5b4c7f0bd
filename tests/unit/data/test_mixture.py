import dataclasses

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_dist.config import read
from sft_dist.data.loader import Loader
from sft_dist.data.mixture import BLOCK, Joined, Mixture
from sft_dist.data.order import Blocks, row_numbers
from sft_dist.data.shards import Shards, write
from sft_dist.errors import ConfigError, DataError
from sft_dist.topology import Topology
from tests.unit.data.test_shards import ABOUT, documents

SIZES = (23, 7, 40)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Three sets whose rows differ in number and in mean length."""
    made = []
    for number, size in enumerate(SIZES):
        folder = tmp_path_factory.mktemp("mixture") / "train"
        rows = [documents([number * 4 + 1 + at % 4], seed=100 * number + at) for at in range(size)]
        write(folder, rows, seq_len=16, rows_per_shard=10, vocab_size=50, **ABOUT)
        made.append(Shards.open(folder))
    return made


def mixture(sets, weights=(3.0, 1.0, 2.0), seed=0, **more):
    return Mixture(Joined(sets), tuple("abc"[: len(sets)]), weights[: len(sets)], seed, **more)


@given(st.lists(st.floats(0.01, 100), min_size=3, max_size=3), st.integers(0, 99))
@settings(max_examples=5, deadline=None)
def test_every_block_holds_each_set_in_proportion_to_its_tokens(sets, weights, seed):
    mixed = mixture(sets, tuple(weights), seed)
    of_rows = mixed.joined.set_of(mixed.rows(np.arange(5 * BLOCK))).reshape(5, BLOCK)
    tokens_a_row = np.array([one.manifest.tokens / one.num_rows for one in sets])
    expected = np.array(weights) / tokens_a_row
    expected *= BLOCK / expected.sum()
    for block in of_rows:
        off = np.abs(np.bincount(block, minlength=3) - expected)
        assert np.sort(off)[:2].max() <= 1
        assert off.max() <= 2, "the set with the largest share takes the rest of two others"
    drawn = np.bincount(of_rows.ravel(), minlength=3) * tokens_a_row
    assert drawn / drawn.sum() == pytest.approx(np.array(weights) / sum(weights), abs=1e-3)


def test_the_sets_are_mixed_within_a_block(sets):
    of_rows = mixture(sets).joined.set_of(mixture(sets).rows(np.arange(BLOCK)))
    shares = np.stack([np.bincount(part, minlength=3) for part in of_rows.reshape(8, -1)]) / (BLOCK / 8)
    assert np.abs(shares - shares.mean(axis=0)).max() < 0.1


@pytest.mark.parametrize("blocks", [None, Blocks(4, 2)])
def test_each_epoch_of_a_set_is_every_row_of_it_once(sets, blocks):
    mixed = mixture(sets, blocks=blocks)
    rows = mixed.rows(np.arange(2 * BLOCK))
    for number, size in enumerate(SIZES):
        mine = rows[mixed.joined.set_of(rows) == number] - mixed.joined.starts[number]
        _, draws = mixed.draws(np.arange(2 * BLOCK))
        mine = mine[np.argsort(draws[mixed.joined.set_of(rows) == number])]
        for epoch in range(len(mine) // size):
            assert sorted(mine[epoch * size : (epoch + 1) * size].tolist()) == list(range(size))


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=20))
@settings(max_examples=30, deadline=None)
def test_a_draw_is_a_function_of_its_ordinal_alone(sets, ordinals):
    mixed = mixture(sets)
    together = mixed.rows(np.array(ordinals))
    assert together.tolist() == [int(mixed.rows(np.array([g]))[0]) for g in ordinals]


@pytest.mark.parametrize("consumed", [0, 1, 1000, BLOCK, 2 * BLOCK + 17])
def test_the_epochs_of_a_set_are_its_draws_by_its_rows(sets, consumed):
    mixed = mixture(sets)
    drawn = np.bincount(mixed.joined.set_of(mixed.rows(np.arange(consumed))), minlength=3)
    assert mixed.epochs(consumed) == {name: n / size for name, n, size in zip("abc", drawn, SIZES, strict=True)}


def test_a_mixture_of_one_set_is_that_set(sets):
    mixed = mixture(sets[:1], seed=5)
    ordinals = np.arange(100)
    assert mixed.rows(ordinals).tolist() == row_numbers(ordinals, SIZES[0], 5).tolist()
    assert mixed.epochs(46) == {"a": 2.0}
    assert mixed.joined.manifest == sets[0].manifest


@pytest.mark.parametrize("world", [2, 3])
def test_the_stream_is_the_same_for_every_world_and_a_resume_within_a_block(sets, world):
    mixed = mixture(sets)

    def fed(world, start, end):
        ranks = [
            [list(step.micro_batches) for step in Loader(
                mixed.joined, Topology(rank, world, rank), micro_batch_rows=2, order=mixed.rows
            ).steps(start=start, end=end, global_batch_rows=12)]
            for rank in range(world)
        ]  # fmt: skip
        turns = [turn for step in zip(*ranks, strict=True) for turn in zip(*step, strict=True)]
        return [
            (mb.rows.tolist(), mb.sets.tolist(), mb.tokens.tolist()) for turn in turns for mb in turn if len(mb.rows)
        ]

    whole = fed(1, BLOCK - 36, BLOCK + 36)
    assert fed(world, BLOCK - 36, BLOCK) + fed(1, BLOCK, BLOCK + 36) == whole
    for rows, of_rows, tokens in whole:
        assert of_rows == mixed.joined.set_of(np.array(rows)).tolist()
        for row, number, ids in zip(rows, of_rows, tokens, strict=True):
            alone = sets[number].rows(np.array([row - mixed.joined.starts[number]]))
            assert ids == alone.tokens[0].tolist()


def test_a_rank_without_rows_of_a_mixture_keeps_company(sets):
    (batch,) = Loader(Joined(sets), Topology(1, 2, 1), micro_batch_rows=100, shuffle=False).sweep().micro_batches
    assert (len(batch.rows), batch.sets.tolist(), int(batch.targets.sum())) == (0, [0], 0)


def test_joined_sets_are_one_after_another(sets):
    joined = Joined(sets)
    numbers = np.array([69, 0, 23, 30, 22, 29])
    assert joined.set_of(numbers).tolist() == [2, 0, 1, 2, 0, 1]
    expected = [sets[2].stored(np.array([39])), sets[0].stored(np.array([0]))]
    assert joined.stored(numbers).tokens[:2].tolist() == [one.tokens[0].tolist() for one in expected]
    for rows in (numbers, np.sort(numbers), numbers[:0]):
        lengths, targets = joined.counts(rows)
        stored = joined.stored(rows)
        assert lengths.tolist() == stored.lengths.tolist()
        assert targets.tolist() == np.bitwise_count(stored.targets).sum(axis=1).tolist()
    manifest = joined.manifest
    assert (manifest.rows, manifest.tokens) == (70, sum(one.manifest.tokens for one in sets))
    assert len({manifest.data, *(one.manifest.data for one in sets)}) == 4
    assert mixture(sets).documents_per_row == pytest.approx(1.0)


def test_the_records_of_joined_rows_are_those_of_their_sets(sets):
    joined = Joined(sets)
    rows = [int(joined.starts[2]), 0, int(joined.starts[1]) + 1]
    assert joined.origins(rows) == {
        rows[0]: sets[2].origins([0])[0],
        0: sets[0].origins([0])[0],
        rows[2]: sets[1].origins([1])[1],
    }


def test_the_identity_names_the_data_and_the_weight_of_every_set(sets):
    mine = mixture(sets).identity()
    assert mine == [[one.manifest.data, weight] for one, weight in zip(sets, (3.0, 1.0, 2.0), strict=True)]


@pytest.mark.parametrize(
    ("name", "value"), [("seq_len", 32), ("tokenizer", "u"), ("vocab_size", 60), ("eos_id", 3), ("pad_id", 4)]
)
def test_sets_that_were_not_prepared_alike_are_refused(sets, name, value):
    other = Shards(sets[1].folder, dataclasses.replace(sets[1].manifest, **{name: value}))
    message = rf"mixture: .* was not prepared like .*: {name} {value!r}, not .*\. Prepare both with the same"
    with pytest.raises(DataError, match=message):
        Joined([sets[0], other])


@pytest.mark.parametrize(
    ("sets", "more", "message"),
    [
        ([], {}, "run file: exactly one of prepare and mixture is needed; add or remove one"),
        (["a"], {"prepare": {"sources": [{"path": "x"}], "out": "o"}}, "exactly one of prepare and mixture is needed"),
        (["a", "b/../a"], {}, "mixture: a is there twice; name it once, with the sum of the weights"),
        (["x/chat", "y/chat/shards"], {}, "mixture: two sets are called 'chat'; give each another name"),
        (["a"], {"mixture": [{"shards": "a", "weight": 0}]}, r"mixture\.0\.weight: 0 is not allowed: .*greater than 0"),
        (["a"], {"train": {"order": "row"}}, r"train\.order: 'row' is not allowed"),
        (["a"], {"train": {"order": {"block_row": 2}}}, r"train\.order\.block_row: unknown key .*did you mean"),
    ],
)
def test_a_mistake_in_the_run_file_is_named_with_a_remedy(tmp_path, sets, more, message):
    values = {
        "run_dir": "r",
        "mixture": [{"shards": folder, "weight": 1} for folder in sets],
        "model": {"config": {"model_type": "gpt2"}},
        **more,
        "train": {"global_batch_rows": 8, "epochs": 1, **more.get("train", {})},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=message):
        read(tmp_path / "run.yaml")
