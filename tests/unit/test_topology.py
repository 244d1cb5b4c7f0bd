from pathlib import Path

import pytest

from sft_dist.errors import ConfigError
from sft_dist.topology import Life, Topology, node_name


def test_half_an_announcement_is_refused():
    with pytest.raises(ConfigError, match=r"LOCAL_RANK not set although .*torchrun"):
        Topology.from_environment({"RANK": "0", "WORLD_SIZE": "2"})


def test_a_life_has_a_name_in_every_environment():
    assert Life.from_environment({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}).name == "7-2"
    assert Life.from_environment({"SFT_DIST_LIFE": "mine", "SFT_DIST_STOP_FILE": "/tmp/s"}) == Life(
        "mine", 0, Path("/tmp/s")
    )
    assert Life.from_environment({}).job_id.startswith("20")


def test_a_life_knows_its_end_and_its_grace():
    life = Life.from_environment({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "2000", "SFT_DIST_GRACE_SECONDS": "30"})
    assert (life.end_time, life.grace_seconds) == (2000.0, 30.0)
    assert Life.from_environment({"SFT_DIST_END_TIME": "1", "SLURM_JOB_END_TIME": "2"}).end_time == 1.0


@pytest.mark.parametrize("name", ["SFT_DIST_END_TIME", "SFT_DIST_GRACE_SECONDS"])
def test_a_time_that_is_none_is_refused(name):
    with pytest.raises(ConfigError, match=f"{name}='soon' is no time"):
        Life.from_environment({name: "soon"})


def test_outside_slurm_a_machine_calls_itself():
    assert node_name({})
