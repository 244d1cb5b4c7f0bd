"""Where this process stands among all of them, and which life of a job it is: values, read once at the edge."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sft_dist.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Topology:
    """Rank and size of the world this process belongs to, and of its part on this machine, and where its processes meet.

    >>> Topology(rank=1, world_size=2, local_rank=1).is_main
    False
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    rendezvous: str = "env://"
    local_world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    @property
    def num_nodes(self) -> int:
        """Machines that the world is on, each with as many processes as this one."""
        return -(-self.world_size // self.local_world_size)

    def of_sharers(self, count: int) -> Topology:
        """The world as its data see it, where `count` neighbouring ranks compute the same rows.

        >>> Topology(rank=5, world_size=8).of_sharers(2)
        Topology(rank=2, world_size=4, local_rank=0, rendezvous='env://', local_world_size=1)
        """
        return replace(self, rank=self.rank // count, world_size=self.world_size // count)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Topology:
        """The world torchrun, deepspeed or srun announced; a single process is a world of one.

        Raises ConfigError where the announcement is incomplete.

        >>> Topology.from_environment({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3"})
        Topology(rank=3, world_size=8, local_rank=3, rendezvous='env://', local_world_size=8)
        >>> Topology.from_environment({}).world_size
        1
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        missing = [name for name in names if name not in environment]
        if len(missing) == len(names):
            return cls()
        if missing:
            raise ConfigError(
                f"environment: {', '.join(missing)} not set although {', '.join(set(names) - set(missing))} is; "
                "start ranks with torchrun, deepspeed or `sft-dist train`"
            )
        rank, world_size, local_rank = (int(environment[name]) for name in names)
        of_node = int(environment.get("LOCAL_WORLD_SIZE", world_size))
        return cls(rank, world_size, local_rank, local_world_size=of_node)


def processes(count: int, sharers: int = 1) -> str:
    """So many, in words; or so many times `sharers`, of which each computes a part of every row.

    >>> processes(1), processes(8), processes(4, sharers=2)
    ('1 process', '8 processes', '4 times 2 processes that share rows')
    """
    if sharers > 1:
        return f"{count} times {sharers} processes that share rows"
    return f"{count} process{'' if count == 1 else 'es'}"


def start_command(run_file: str, processes: int, nodes: int = 1) -> str:
    """What is typed to start a run on so many processes.

    >>> start_command("run.yaml", 8), start_command("run.yaml", 64, nodes=8)
    ('sft-dist train run.yaml --nproc 8', 'sft-dist submit run.yaml --nodes 8 --gpus-per-node 8')
    """
    if nodes == 1:
        return f"sft-dist train {run_file} --nproc {processes}"
    return f"sft-dist submit {run_file} --nodes {nodes} --gpus-per-node {-(-processes // nodes)}"


def node_name(environment: Mapping[str, str] = os.environ) -> str:
    """This machine, as SLURM calls it, or else as it calls itself.

    >>> node_name({"SLURMD_NODENAME": "n7"})
    'n7'
    """
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


@dataclass(frozen=True, slots=True)
class Life:
    """One start of a job: a requeued job is the same job in its next life.

    `stop_file` is a path whose appearance asks the ranks to stop (a launcher makes it instead of sending signals,
    which torchrun would turn into a failure). `end_time` is when the allocation ends, in seconds of the clock, and
    `grace_seconds` how long it stays after it was preempted. `began` is when it was given.

    >>> Life("4711", restart_count=2).name
    '4711-2'
    """

    job_id: str
    restart_count: int = 0
    stop_file: Path | None = None
    end_time: float | None = None
    grace_seconds: float | None = None
    began: float | None = None

    @property
    def name(self) -> str:
        """Job and restart, as the verdict file is called."""
        return f"{self.job_id}-{self.restart_count}"

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Life:
        """SLURM's job, restart count and end, or a time stamp made by the launcher. Raises ConfigError.

        >>> Life.from_environment({"SLURM_JOB_ID": "4711", "SLURM_RESTART_COUNT": "1"}).name
        '4711-1'
        """
        job_id = environment.get("SFT_DIST_LIFE") or environment.get("SLURM_JOB_ID") or time.strftime("%Y%m%d-%H%M%S")
        stop_file = environment.get("SFT_DIST_STOP_FILE")
        restart = environment.get("SLURM_RESTART_COUNT") or environment.get("TORCHELASTIC_RESTART_COUNT") or "0"
        seconds = {
            "SFT_DIST_END_TIME": environment.get("SFT_DIST_END_TIME") or environment.get("SLURM_JOB_END_TIME") or None,
            "SFT_DIST_GRACE_SECONDS": environment.get("SFT_DIST_GRACE_SECONDS") or None,
            "SFT_DIST_BEGAN": environment.get("SFT_DIST_BEGAN") or environment.get("SLURM_JOB_START_TIME") or None,
        }
        for name, value in seconds.items():
            if value is not None and not value.isdecimal():
                raise ConfigError(f"environment: {name}={value!r} is no time; give whole seconds (an end since 1970)")
        end, grace, began = (None if value is None else float(value) for value in seconds.values())
        return cls(job_id, int(restart), Path(stop_file) if stop_file else None, end, grace, began)
