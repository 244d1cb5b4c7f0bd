import shutil

import pytest
import torch

from sft_dist import plan
from sft_dist.comms import Comms
from sft_dist.depth import traced
from sft_dist.topology import Topology
from tests.unit.prepared_runs import prepare
from tests.unit.saved_runs import checkpoints, fragments, state

torch.set_num_threads(1)  # the models are tiny: threads would only wait for one another


@pytest.fixture(scope="session")
def comms():
    """A world of one in this process: a process has one default group, so the tests share it."""
    made = Comms(Topology(), torch.device("cpu"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def traces():
    """What has been traced, by what it was traced of."""
    return {}


@pytest.fixture
def traced_once(traces, monkeypatch):
    """A model that several tests plan with is traced by the first of them; that a trace is right is for tests/unit/test_depth.py."""

    def once(config, made, meta, **about):
        key = (made.to_json_string(), str(config.lora), *sorted(about.items()))
        if key not in traces:
            traces[key] = traced(config, made, meta, **about)
        return traces[key]

    monkeypatch.setattr(plan, "traced", once)


@pytest.fixture(scope="session")
def saved(tmp_path_factory, comms):
    """Three checkpoints of one run; copied by the tests that damage them."""
    folder = tmp_path_factory.mktemp("run")
    made = checkpoints(folder, comms)
    for step in (1, 2, 3):
        made.save(lambda step=step: fragments(step), state(step))
    return folder


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run", symlinks=True)


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Prepared through the command line, as a user would: `sms`, and the shards in `out`."""
    return prepare(tmp_path_factory.mktemp("shards"))
