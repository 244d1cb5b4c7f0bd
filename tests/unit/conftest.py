import pytest
import torch

from sft_dist.comms import Comms
from sft_dist.topology import Topology

torch.set_num_threads(1)  # the models are tiny: threads would only wait for one another


@pytest.fixture(scope="session")
def comms():
    """A world of one in this process: a process has one default group, so the tests share it."""
    made = Comms(Topology(), torch.device("cpu"))
    yield made
    made.close()
