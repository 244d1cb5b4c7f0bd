from pathlib import Path

import pytest

from sft_dist.errors import ConfigError
from sft_dist.topology import Life, Topology


def test_half_an_announcement_is_refused():
    with pytest.raises(ConfigError, match=r"LOCAL_RANK not set although .*torchrun"):
        Topology.from_environment({"RANK": "0", "WORLD_SIZE": "2"})


def test_a_life_has_a_name_in_every_environment():
    assert Life.from_environment({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}).name == "7-2"
    assert Life.from_environment({"SFT_DIST_LIFE": "mine", "SFT_DIST_STOP_FILE": "/tmp/s"}) == Life(
        "mine", 0, Path("/tmp/s")
    )
    assert Life.from_environment({}).job_id.startswith("20")
