"""How the ranks talk and agree; the only place that knows `torch.distributed`."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_to_all_single

from sft_dist.topology import Topology


class Comms:
    """The process group of a run, and a second one on the CPU for the small control messages.

    A world of one is a proper world: DeepSpeed then needs no special case.

    >>> comms = Comms(Topology(), device=torch.device("cpu"))  # doctest: +SKIP
    >>> comms.sum([3, 0])  # doctest: +SKIP
    [3, 0]
    """

    def __init__(self, topology: Topology, device: torch.device, *, timeout: timedelta = timedelta(minutes=30)) -> None:
        self.topology, self.device, self.timeout = topology, device, timeout
        rendezvous: dict[str, Any] = {"init_method": topology.rendezvous}
        if topology.world_size == 1:  # nobody to meet
            rendezvous = {"store": dist.HashStore()}  # type: ignore[attr-defined]
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, rank=topology.rank, world_size=topology.world_size, timeout=timeout, **rendezvous
        )
        self.control = dist.new_group(backend="gloo", timeout=timeout)

    def sum(self, numbers: Sequence[int]) -> list[int]:
        """Sum over the ranks of each whole number, exact, through host memory (no GPU is synchronised)."""
        tensor = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(tensor, group=self.control)
        return tensor.tolist()

    def sum_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks of a host tensor, in place."""
        dist.all_reduce(tensor, group=self.control)
        return tensor

    def sum_on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks of a tensor of their device, in place, over the way that gradients take."""
        dist.all_reduce(tensor)
        return tensor

    def agree(self, is_wanted: bool) -> bool:
        """Whether any rank wants it: a wish becomes an act only after all ranks know of it."""
        return self.sum([int(is_wanted)])[0] > 0

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        values: list[Any] = [None] * self.topology.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def gather_to_main(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on the main rank; nothing on the others."""
        values: list[Any] = [None] * self.topology.world_size if self.topology.is_main else []
        dist.gather_object(value, values if self.topology.is_main else None, dst=0, group=self.control)
        return values

    def aside(self) -> Comms:
        """The same ranks with a control group of their own, for a thread that talks while the steps do. Every rank calls it."""
        other = copy.copy(self)
        other.control = dist.new_group(backend="gloo", timeout=self.timeout)
        return other

    def sharers(self, count: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """The exchange among `count` neighbouring ranks: the n-th part of a tensor [count, ...] goes to the n-th, with a gradient."""
        world = range(self.topology.world_size)
        groups = [dist.new_group(list(world[at : at + count]), timeout=self.timeout) for at in world[::count]]
        group = groups[self.topology.rank // count]
        return lambda parts: all_to_all_single(torch.empty_like(parts), parts, group=group)

    def broadcast(self, value: Any) -> Any:
        """The main rank's value, on every rank."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        dist.barrier(group=self.control)

    @staticmethod
    @contextlib.contextmanager
    def watched(around: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
        """Within it every wait for a collective, whoever began that, is inside an `around()`: gloo's are seen by no profiler."""
        wait = dist.Work.wait

        def waits(*arguments: Any, **more: Any) -> Any:
            with around():
                return wait(*arguments, **more)

        dist.Work.wait = waits  # type: ignore[method-assign]
        try:
            yield
        finally:
            dist.Work.wait = wait  # type: ignore[method-assign]

    def close(self) -> None:
        """Take the process groups down."""
        dist.destroy_process_group()
