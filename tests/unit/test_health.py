from dataclasses import replace

import pytest
import torch

from sft_dist import health
from sft_dist.errors import HealthError
from sft_dist.health import Facts, judge

GOOD = [Facts(node, "H100, 79 GiB", "torch 2.13", "a1", clock=100.0) for node in ("n1", "n1", "n2", "n2", "n3", "n3")]


def test_machines_that_are_alike_pass():
    assert judge(GOOD) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"device": "no GPU"}, "GPUs differ: n3 has no GPU, n1 (and 1 more) has H100, 79 GiB"),
        ({"versions": "torch 2.11"}, "software differs: n3 has torch 2.11, n1 (and 1 more) has torch 2.13"),
        ({"data": "b2"}, "shards differ: n3 has b2, n1 (and 1 more) has a1"),
    ],
)
def test_the_node_that_differs_is_named_and_to_be_left_out(change, said):
    with pytest.raises(HealthError) as caught:
        judge([*GOOD[:4], *(replace(facts, **change) for facts in GOOD[4:])])
    assert str(caught.value).startswith(said)
    assert caught.value.nodes == ("n3",)


def test_of_two_halves_none_is_said_to_be_the_bad_one():
    with pytest.raises(HealthError) as caught:
        judge([*GOOD[:2], *(replace(facts, data="b2") for facts in GOOD[2:4])])
    assert caught.value.nodes == ()


def test_a_clock_that_is_off_is_told():
    told = judge([*GOOD[:4], *(replace(facts, clock=70.0) for facts in GOOD[4:])])
    assert told == [
        "warning: the clock of n3 is -30 s off the others': a life may leave its end of time too late, or too early"
    ]


def test_one_rank_is_examined_without_a_network(comms):
    assert health.examine(comms, health.facts(torch.device("cpu"), "a1")) == []
