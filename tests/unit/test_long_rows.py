"""Parts of tokens against parts of heads and back; what cannot be shared is said before anything starts."""

from __future__ import annotations

import pytest
import torch

from sft_dist.batch import check_shares
from sft_dist.errors import ConfigError, ModelError
from sft_dist.head import targets_at
from sft_dist.long_rows import Shared, enough_heads

ROWS, HEADS, LENGTH, WIDTH, COUNT = 2, 4, 6, 3, 2


def exchanged(of_ranks):
    """What each rank gets of tensors [count, ...]: the parts for it, in the order of the ranks they are from."""
    return [torch.stack([sent[rank] for sent in of_ranks]) for rank in range(len(of_ranks))]


def at_once(called):
    """`called(shared)` on two ranks in turn: first to learn what each sends, then with what it gets."""
    sent, got = [], []
    for rank in range(COUNT):
        called(rank, Shared(rank, COUNT, lambda parts: sent.append(parts) or parts))
    there = exchanged(sent)
    for rank in range(COUNT):
        got.append(called(rank, Shared(rank, COUNT, lambda parts, rank=rank: there[rank])))
    return got


def test_tokens_for_heads_and_back():
    whole = torch.arange(ROWS * HEADS * LENGTH * WIDTH).reshape(ROWS, HEADS, LENGTH, WIDTH)
    parts = whole.chunk(COUNT, dim=2)
    of_heads = at_once(lambda rank, shared: shared.whole_rows(parts[rank]))
    assert torch.equal(torch.cat(of_heads, dim=1), whole)
    back = at_once(lambda rank, shared: shared.own_tokens(of_heads[rank].transpose(1, 2)))
    assert torch.equal(torch.cat(back, dim=1), whole.transpose(1, 2))


@pytest.mark.parametrize(
    ("have", "heads", "count", "then"), [(2, 8, 2, 2), (1, 4, 2, 2), (2, 8, 4, 4), (3, 12, 2, 6), (2, 6, 4, 6)]
)
def test_keys_are_repeated_until_they_can_be_divided(have, heads, count, then):
    keys = torch.arange(have)[None, :, None, None]
    made = enough_heads(keys, heads, count)
    assert made.shape[1] == then
    group = heads // then
    of_queries = made.repeat_interleave(group, dim=1).flatten().tolist()
    assert of_queries == keys.repeat_interleave(heads // have, dim=1).flatten().tolist(), "each query keeps its key"


def test_heads_that_cannot_be_divided_are_refused():
    with pytest.raises(
        ModelError, match=r"train\.sequence_parallel: 3 attention heads cannot be divided among 2 ranks"
    ):
        Shared(0, 2, lambda parts: parts).whole_rows(torch.zeros(1, 3, 4, 5))


def test_the_targets_of_the_parts_are_those_of_the_rows():
    """One is predicted by the last token of the first part, and one of a row's first tokens by nothing."""
    tokens = torch.arange(16).reshape(2, 8)
    targets = torch.tensor([[1, 0, 1, 0, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0, 0]]).bool()
    places, labels = targets_at(tokens, targets, 3)
    assert [place // 8 * 8 + place % 8 for place in places[:3].tolist()] == [1, 3, 6]
    found = []
    for rank in range(2):
        of_part, told = targets_at(tokens, targets, 3, Shared(rank, 2, lambda parts: parts))
        assert len(told) == 64
        found += [
            (4 * rank + place % 4, label)
            for place, label in zip(of_part.tolist(), told.tolist(), strict=True)
            if label >= 0
        ]
    assert found == [(1, 2), (3, 4), (6, 7)]
    assert labels[:3].tolist() == [2, 4, 7]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"world_size": 6}, "4 ranks cannot share 6 processes equally; 6 can be divided by 1, 2, 3"),
        ({"seq_len": 1023}, "4 ranks cannot share 1,023 tokens of a row equally; 1,023 can be divided by 1, 3"),
        ({"heads": 6}, "4 ranks cannot share 6 attention heads equally; 6 can be divided by 1, 2, 3"),
        ({"has_dropout": True}, "the model has dropout, and what a token draws must not depend on who computes it"),
    ],
)
def test_what_cannot_be_shared(more, message):
    with pytest.raises(ConfigError, match=f"train.sequence_parallel: {message}"):
        check_shares(4, **{"seq_len": 1024, "world_size": 8, "heads": 12, **more})
