"""Machines examined by real ranks; each fault is planted on one of them."""

from __future__ import annotations

import re
import time
from dataclasses import replace

import pytest
import torch

from sft_dist import health, preflight
from sft_dist.checkpoint import Checkpoints
from sft_dist.comms import Comms
from sft_dist.errors import CheckpointError, HealthError
from sft_dist.layout import Fragment
from sft_dist.preflight import rehearse
from sft_dist.retention import Retention
from tests.workers import run_workers


def examined(topology, change=None, *, spoils_sums=False, is_everywhere=False):
    """What the ranks say, the last of them with a fact changed or a link that spoils what it receives."""
    comms = Comms(topology, torch.device("cpu"))
    mine = replace(health.facts(comms.device, "a1"), node=f"n{topology.rank}")
    if topology.rank == topology.world_size - 1:
        mine = replace(mine, **(change or {}))
    if spoils_sums and (is_everywhere or topology.rank == topology.world_size - 1):
        right = comms.sum_on_device
        comms.sum_on_device = lambda tensor: right(tensor).add_(1)
    try:
        return health.examine(comms, mine)
    except HealthError as error:
        return str(error), error.nodes
    finally:
        comms.close()


def test_alike_machines_are_told_the_speed_of_their_network():
    (told,), again = run_workers(examined, 2)
    assert re.fullmatch(r"network: the sum over the ranks is right, \d+\.\d\d GB/s a rank", told)
    assert len(again) == 1


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"change": {"versions": "torch 1.0"}}, "software differs: n2 has torch 1.0, n0 (and 1 more) has Python"),
        ({"change": {"data": "b2"}}, "shards differ: n2 has b2, n0 (and 1 more) has a1"),
        ({"spoils_sums": True}, "network: a sum over all ranks came back wrong on n2"),
    ],
)
def test_every_rank_names_the_bad_node(fault, said):
    for text, nodes in run_workers(examined, 3, **fault):
        assert text.startswith(said)
        assert nodes == ("n2",)


def waited_for(topology):
    comms = Comms(topology, torch.device("cpu"))
    health.DEADLINE_SECONDS = 1.0
    if topology.rank == 2:
        comms.sum_on_device = lambda tensor: time.sleep(30)
    began = time.monotonic()
    try:
        return health.examine(comms, health.facts(comms.device, "a1"))
    except HealthError as error:
        return str(error), error.nodes, time.monotonic() - began


def test_a_sum_that_does_not_come_back_ends_the_preflight_on_every_rank():
    for text, nodes, seconds in run_workers(waited_for, 3):
        assert text.startswith("network: the ranks did not get through a sum within 1 s, seen from ")
        assert nodes == ()
        assert seconds < 5


def rehearsed(topology, folder, bad_ranks):
    comms = Comms(topology, torch.device("cpu"))
    checkpoints = Checkpoints(folder, identity={}, attachments={}, retention=Retention(1), stage=0, comms=comms)
    preflight.node_name = lambda: f"n{topology.rank}"
    if topology.rank in bad_ranks:

        def full(*_):
            raise OSError(28, "No space left on device")

        checkpoints.snapshot.write_sample = full
    try:
        return rehearse(checkpoints, lambda: [Fragment("weight", 1000, 0, {"master": torch.ones(1000)})])
    except (HealthError, CheckpointError) as error:
        return type(error), str(error), getattr(error, "nodes", None)
    finally:
        comms.close()


def test_a_node_that_alone_cannot_write_where_checkpoints_go_is_named(tmp_path):
    for kind, text, nodes in run_workers(rehearsed, 3, tmp_path, (1,)):
        assert (kind, nodes) == (HealthError, ("n1",))
        assert text.startswith("node n1: ")
    for kind, text, _ in run_workers(rehearsed, 2, tmp_path, (0, 1)):
        assert kind is CheckpointError
        assert "No space left on device" in text


def test_a_sum_that_is_wrong_everywhere_blames_nobody():
    for text, nodes in run_workers(examined, 2, spoils_sums=True, is_everywhere=True):
        assert text.startswith("network: a sum over all ranks came back wrong everywhere")
        assert nodes == ()
