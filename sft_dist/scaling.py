"""How long a step takes on so many GPUs: what ZeRO sends, what of it hides behind products, and where more GPUs stop helping.

What is sent is what DeepSpeed 0.19 asks of torch.distributed (counted on real ranks by tests/dist/test_scaling.py; Rajbhandari et al.
2020, arXiv:1910.02054, section 7, has the volumes of the method itself). Not in it: stragglers, data, checkpoints, evaluation, what
Python takes, congestion of a network that others use, and offload to the host.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

ATTAINED = 0.8  # of a link's rate, in long messages: an assumption
STOPS = 1.6  # doubling the GPUs gives less than so many times the tokens a second
# NCCL's own model of its latency (src/graph/tuning.cc): to begin with, and a hop of a ring and of a tree, within and between nodes
_START, _RING, _TREE = 8.4e-6, (3.4e-6, 14e-6), (4e-6, 14e-6)
_UNBUCKETED = 500_000_000  # elements of a message where DeepSpeed takes no bucket of ours: stage 0, and stage 1 in bf16


@dataclass(frozen=True, slots=True)
class Network:
    """Bytes a second one way, as sold: `within` a node by each GPU, `between` nodes by all the cards of one together."""

    within: float
    between: float
    gpus_per_node: int

    def seconds(self, num_bytes: float, ranks: int, *, is_reduced_to_all: bool = False) -> float:
        """Of one all-gather or reduce-scatter whose whole has so many bytes, or of an all-reduce, which is one of each.

        Rings pass every GPU's link and every node's cards with (ranks - 1) / ranks of the bytes; an all-reduce may take a tree
        where that starts sooner, as NCCL chooses.

        >>> Network(450e9, 400e9, 8).seconds(1e9, 16) > Network(450e9, 400e9, 8).seconds(1e9, 8)
        True
        """
        if ranks == 1 or not num_bytes:
            return 0.0
        nodes, times = max(1, ranks // self.gpus_per_node), 2 if is_reduced_to_all else 1
        rate = ATTAINED * (self.within if nodes == 1 else min(self.within, self.between))
        hops = times * ((ranks - nodes) * _RING[0] + (nodes - 1) * _RING[1] + (nodes > 1) * _RING[1])
        if is_reduced_to_all:
            hops = min(hops, 2 * ((ranks // nodes - 1) * _TREE[0] + math.log2(nodes) * _TREE[1]))
        return _START + hops + times * (ranks - 1) / ranks * num_bytes / rate


@dataclass(frozen=True, slots=True)
class Traffic:
    """Elements a rank's group sends: `gathered` forward and backward in each micro-batch, `reduced` as often as that or once a
    step, `updated` once a step.

    `itemsize`: bytes of a weight; gradients are always reduced in fp32.
    """

    gathered: tuple[float, float]
    reduced: int
    updated: float
    itemsize: int
    is_each: bool
    is_all_reduce: bool

    def num_bytes(self, accumulation: int) -> dict[str, float]:
        """Of the whole tensors that collectives are asked for in a step.

        >>> traffic({"stage": 2}, 1000, "bf16").num_bytes(accumulation=4)
        {'gathered': 0.0, 'reduced': 16000.0, 'updated': 2000.0}
        """
        return {
            "gathered": float(self.itemsize * sum(self.gathered) * accumulation),
            "reduced": 4.0 * self.reduced * (accumulation if self.is_each else 1),
            "updated": float(self.itemsize * self.updated),
        }


def traffic(
    section: Mapping[str, Any],
    parameters: int,
    precision: str,
    *,
    trained: int | None = None,
    persistent: int = 0,
    checkpointing: bool = False,
) -> Traffic:
    """What a `zero_optimization` section has sent for a model of so many parameters, `persistent` of them in small tensors.

    `trained`: how many of them are; None: all.

    Stage 3 gathers all but the persistent ones twice a micro-batch, forward and backward, but for the end of the model: what is
    used again within `stage3_max_reuse_distance` elements is kept, to half of that (a third with recomputation) before the turn.
    """
    stage, itemsize = section.get("stage", 0), 4 if precision == "fp32" else 2
    trained = parameters if trained is None else trained
    if stage < 3:
        return Traffic((0.0, 0.0), trained, trained if stage else 0.0, itemsize, stage == 2, True)
    sharded = parameters - persistent
    kept = section.get("stage3_max_reuse_distance", 1_000_000_000) / (3 if checkpointing else 2)
    return Traffic((sharded, max(0.0, sharded - kept)), trained, persistent, itemsize, True, False)


class Unit(NamedTuple):
    """A stretch of the model in seconds: its weights are gathered, it is computed, its gradients are reduced; 0: there is none."""

    gather: float = 0.0
    compute: float = 0.0
    reduce: float = 0.0


def simulate(units: Sequence[Unit], *, overlaps: bool) -> float:
    """Seconds of one micro-batch: two streams, of products and of messages, each in its order.

    The weights of a unit are asked for when the one before begins, and it waits for them. Its gradients are sent when it is done; the
    next one waits for that unless `overlaps` (DeepSpeed's `overlap_comm`).

    >>> simulate([Unit(1, 2, 1), Unit(1, 2, 1)], overlaps=False), simulate([Unit(1, 2, 1), Unit(1, 2, 1)], overlaps=True)
    (7.0, 6.0)
    """
    network = there = units[0].gather
    done = 0.0
    for unit, after in zip(units, [*units[1:], Unit()], strict=True):
        start, there = max(done, there), 0.0
        if after.gather:
            network = there = max(network, start) + after.gather
        done = start + unit.compute
        if unit.reduce:
            network = max(network, done) + unit.reduce
            done = done if overlaps else network
    return float(max(done, network))


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be learned by a step, and how fast a GPU is at it.

    `trained`: how many of the parameters are; `row_seconds`: of a row's products, without recomputation, and `speed`, what is left of it
    with that (`layers.SPEED`); `memory_rate`: bytes a second of a GPU's memory.
    """

    parameters: int
    trained: int
    persistent: int
    row_seconds: float
    micro_batch_rows: int
    precision: str
    speed: float
    memory_rate: float

    def passes(self) -> tuple[float, float]:
        """Seconds of a micro-batch's products forward and backward, what is computed again in the latter.

        Forward is one product in three; what is frozen has no gradient of its own, and there it is one in two.

        >>> Job(8, 8, 0, 3.0, 1, "bf16", 0.75, 3e12).passes(), Job(8, 0, 0, 2.0, 1, "bf16", 1.0, 3e12).passes()
        ((1.0, 3.0), (1.0, 1.0))
        """
        forward = self.row_seconds * self.parameters / (2 * self.parameters + self.trained)
        again = 3 * forward * (1 / self.speed - 1)
        return self.micro_batch_rows * forward, self.micro_batch_rows * (self.row_seconds - forward + again)


@dataclass(frozen=True, slots=True)
class Step:
    """Seconds of a step: all, and of them its products and the optimizer's pass over memory; `sent`: what messages take, hidden or not."""

    seconds: float
    compute: float
    optimizer: float
    gathered: float
    reduced: float
    updated: float

    @property
    def sent(self) -> float:
        """All messages."""
        return self.gathered + self.reduced + self.updated

    @property
    def exposed(self) -> float:
        """Of what is sent, the part that products wait for."""
        return self.seconds - self.compute - self.optimizer

    @property
    def largest(self) -> str:
        """What most is sent for.

        >>> Step(9.0, 1.0, 1.0, gathered=5.0, reduced=2.0, updated=0.0).largest
        'gathering weights'
        """
        sent = {"gathering weights": self.gathered, "reducing gradients": self.reduced}
        sent["gathering what the optimizer updated"] = self.updated
        return max(sent, key=lambda name: sent[name])


def step(job: Job, section: Mapping[str, Any], network: Network, ranks: int, accumulation: int) -> Step:
    """The time of a step of `accumulation` micro-batches on each of so many GPUs.

    >>> job = Job(10**9, 10**9, 0, row_seconds=0.05, micro_batch_rows=2, precision="bf16", speed=1.0, memory_rate=3e12)
    >>> one, two = (step(job, {"stage": stage}, Network(450e9, 400e9, 8), ranks=64, accumulation=8) for stage in (1, 2))
    >>> one.seconds < two.seconds
    True
    """
    more: dict[str, Any] = {"persistent": job.persistent, "checkpointing": job.speed < 1}
    sent = traffic(section, job.parameters, job.precision, trained=job.trained, **more)
    plain, last = _units(job, sent, section, network, ranks)
    stage = section.get("stage", 0)
    overlaps = bool(section.get("overlap_comm")) and not (stage == 0 or (stage == 1 and job.precision == "bf16"))
    learned = (accumulation - 1) * simulate(plain, overlaps=overlaps) + simulate(last, overlaps=overlaps)
    all_units = [(accumulation - 1, plain), (1, last)]
    gathered, compute, reduced = (
        sum(times * sum(unit[part] for unit in units) for times, units in all_units) for part in range(3)
    )
    updated = network.seconds(sent.itemsize * sent.updated, ranks)
    own = job.trained / (ranks if stage else 1)
    # read for the norm; gradient, master and moments read, the last three written, and the weight
    optimizer = (4 + 7 * 4 + sent.itemsize) * own / job.memory_rate
    return Step(learned + updated + optimizer, compute, optimizer, gathered, reduced, updated)


def _units(
    job: Job, sent: Traffic, section: Mapping[str, Any], network: Network, ranks: int
) -> tuple[list[Unit], list[Unit]]:
    """(of a micro-batch within a step, of its last one): forward, then backward, cut into equal stretches of a message each."""
    stage = section.get("stage", 0)
    is_whole = stage == 0 or (stage == 1 and job.precision == "bf16")
    largest = _UNBUCKETED if is_whole else section.get("reduce_bucket_size", _UNBUCKETED)
    if stage == 3:
        largest = min(largest, section.get("stage3_prefetch_bucket_size", 50_000_000) or largest)
    count = math.ceil(job.parameters / largest)
    reduce = network.seconds(4 * sent.reduced / count, ranks, is_reduced_to_all=sent.is_all_reduce)
    forward, backward = (seconds / count for seconds in job.passes())
    there, back = sent.gathered
    gather = network.seconds(sent.itemsize * there / count, ranks)
    skipped = 0 if there == 0 else round(count * (1 - back / there))
    passes = [Unit(gather, forward)] * count + [Unit(0.0 if n < skipped else gather, backward) for n in range(count)]
    with_reductions = passes[:count] + [unit._replace(reduce=reduce) for unit in passes[count:]]
    return (with_reductions if sent.is_each else passes), with_reductions


def doublings(least: int, most: int) -> Iterator[int]:
    """Numbers of GPUs.

    >>> list(doublings(8, 64))
    [8, 16, 32, 64]
    """
    while least <= most:
        yield least
        least *= 2


def stops_at(speeds: Mapping[int, float]) -> int | None:
    """The number of GPUs from which on doubling them gives less than `STOPS` times the speed; None: it goes on to the end.

    >>> stops_at({8: 1.0, 16: 1.9, 32: 2.5, 64: 2.6}), stops_at({8: 1.0, 16: 1.9})
    (16, None)
    """
    counts = sorted(speeds)
    return next((few for few, more in itertools.pairwise(counts) if speeds[more] < STOPS * speeds[few]), None)
