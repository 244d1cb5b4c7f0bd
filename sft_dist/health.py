"""Before a run starts: are its machines fit, and alike? A bad one is named."""

from __future__ import annotations

import platform
import statistics
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from queue import Empty, SimpleQueue

import torch

from sft_dist import __version__
from sft_dist.comms import Comms
from sft_dist.errors import HealthError
from sft_dist.topology import node_name

DEADLINE_SECONDS = 30.0
CLOCK_SECONDS = 5.0  # clocks further apart are told: the end of the job's time is read from them
_PROBE_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}  # of the all-reduce: enough to be limited by the network
_SAME_EVERYWHERE = {"device": "GPUs differ", "versions": "software differs", "data": "shards differ"}


@dataclass(frozen=True, slots=True)
class Facts:
    """What a rank knows of its machine; `clock` is read when all ranks have met."""

    node: str
    device: str
    versions: str
    data: str
    clock: float = 0.0


def facts(device: torch.device, data: str) -> Facts:
    """Of this rank: its GPU, the versions of what computes, and the fingerprint `data` of the shards that it sees.

    >>> facts(torch.device("cpu"), data="a1b2").device
    'no GPU'
    """
    about = "no GPU"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about = f"{properties.name}, {properties.total_memory / (1 << 30):.0f} GiB"
    versions = [f"Python {platform.python_version()}", f"sft-dist {__version__}", f"CUDA {torch.version.cuda}"]
    versions += [f"{name} {metadata.version(name)}" for name in ("torch", "deepspeed", "transformers")]
    return Facts(node_name(), about, ", ".join(versions), data)


def examine(comms: Comms, mine: Facts) -> list[str]:
    """Compare the machines of all ranks, then try the network between them; returns lines to say, warnings among them.

    Raises HealthError, on every rank, where machines that have to be alike are not, a sum comes back wrong, or nothing comes
    back in `DEADLINE_SECONDS` and a little more for many ranks: NCCL itself would wait for long.
    """
    answers: SimpleQueue[list[str] | Exception] = SimpleQueue()

    def answer() -> None:
        try:
            answers.put(_examine(comms, mine))
        except Exception as error:
            answers.put(error)

    seconds = DEADLINE_SECONDS + comms.topology.world_size / 20
    threading.Thread(target=answer, name="preflight", daemon=True).start()
    try:
        told = answers.get(timeout=seconds)
    except Empty:
        raise HealthError(
            f"network: the ranks did not get through a sum within {seconds:.0f} s, seen from {mine.node}; have the links between the "
            "nodes looked at (NCCL_DEBUG=INFO tells more)"
        ) from None
    if isinstance(told, Exception):
        raise told
    return told


def _examine(comms: Comms, mine: Facts) -> list[str]:
    comms.barrier()
    told = judge([Facts(**each) for each in comms.gather(asdict(replace(mine, clock=time.time())))])
    return told + (_try_network(comms, mine.node) if comms.topology.world_size > 1 else [])


def judge(every: Sequence[Facts]) -> list[str]:
    """Warnings about the machines of the ranks; raises HealthError with the names of those that cannot be used.

    >>> good, other = Facts("n1", "A100", "torch 2.13", "a1"), Facts("n3", "A100", "torch 2.11", "a1")
    >>> judge([good, good, other])
    Traceback (most recent call last):
    ...
    sft_dist.errors.HealthError: software differs: n3 has torch 2.11, n1 has torch 2.13; make the nodes alike, or leave them out
    """
    for field, name in _SAME_EVERYWHERE.items():
        nodes = defaultdict(list)
        for each in every:
            nodes[getattr(each, field)].append(each.node)
        if len(nodes) > 1:
            raise _differ(name, nodes)
    middle = statistics.median(each.clock for each in every)
    late = {each.node: each.clock - middle for each in every if abs(each.clock - middle) > CLOCK_SECONDS}
    return [
        f"warning: the clock of {node} is {seconds:+.0f} s off the others': a life may leave its end of time too late, or too early"
        for node, seconds in sorted(late.items())
    ]


def _differ(name: str, nodes: dict[str, list[str]]) -> HealthError:
    """The nodes of the fewer ranks are the bad ones; of equals none."""
    ordered = sorted(nodes.items(), key=lambda item: len(item[1]))
    said = ", ".join(f"{_some(found)} has {value}" for value, found in ordered)
    is_clear = len(ordered[-1][1]) > len(ordered[-2][1])
    bad = {node for _, found in ordered[:-1] for node in found} - set(ordered[-1][1]) if is_clear else set()
    return HealthError(f"{name}: {said}; make the nodes alike, or leave them out", tuple(sorted(bad)))


def _some(nodes: Sequence[str]) -> str:
    """A few names of many.

    >>> _some(["n1", "n1", "n2", "n3", "n4", "n5"])
    'n1 (and 4 more)'
    """
    names = list(Counter(nodes))
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"


def _try_network(comms: Comms, node: str) -> list[str]:
    """A sum whose result is known, over the way that gradients take: a line with its speed, or HealthError."""
    world, size = comms.topology.world_size, _PROBE_BYTES[comms.device.type] // 4
    ramp = torch.arange(size, device=comms.device, dtype=torch.float32) % 251  # whole numbers: exact in fp32
    seconds, is_right = 0.0, True
    for _ in range(2):  # the first one makes the connections
        made = ramp + comms.topology.rank
        comms.barrier()
        started = time.perf_counter()
        comms.sum_on_device(made)
        is_right &= bool(torch.equal(made, ramp * world + world * (world - 1) / 2))
        seconds = time.perf_counter() - started
    every = comms.gather((node, is_right))
    if wrong := {node for node, is_right in every if not is_right}:
        some = tuple(sorted(wrong)) if wrong != {node for node, _ in every} else ()
        raise HealthError(
            f"network: a sum over all ranks came back wrong {'on ' + ', '.join(some) if some else 'everywhere'}; have the links "
            "of these nodes looked at",
            some,
        )
    moved = 2 * (world - 1) / world * 4 * size  # a rank's part of a ring
    return [f"network: the sum over the ranks is right, {moved / seconds / 1e9:.2f} GB/s a rank"]
