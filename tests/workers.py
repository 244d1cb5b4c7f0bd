"""Run a function on gloo ranks: a file rendezvous (no port to clash on), a deadline, a name for what fails."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.preload"])


class RankError(AssertionError):
    """A rank raised, or did not answer before the deadline; the text names it and shows its traceback."""


def run_workers(
    function: Callable[..., Any], world_size: int, *arguments: Any, deadline: float = 120.0, **more: Any
) -> list[Any]:
    """`function(topology, *arguments, **more)` on each rank; their results in rank order.

    Raises RankError with the first failing rank's traceback, or the names of the ranks that hung.
    """
    with tempfile.TemporaryDirectory() as folder:
        init_method = f"file://{folder}/rendezvous"
        ends, processes = [], []
        for rank in range(world_size):
            mine, theirs = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(
                target=_rank, args=(theirs, function, rank, world_size, init_method, arguments, more), daemon=True
            )
            process.start()
            theirs.close()
            ends.append(mine)
            processes.append(process)
        try:
            return _collect(ends, time.monotonic() + deadline, deadline)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(ends: list[Connection], end: float, deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(ends):
        pending = {pipe: rank for rank, pipe in enumerate(ends) if rank not in results}
        ready = wait(list(pending), timeout=max(0.0, end - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {sorted(pending.values())} hung: no result within {deadline:.0f} s")
        for pipe in ready:
            rank = pending[pipe]
            try:
                is_ok, value = pipe.recv()
            except EOFError:
                raise RankError(f"rank {rank} died without a word") from None
            if not is_ok:
                raise RankError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(ends))]


def _rank(
    pipe: Connection,
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    init_method: str,
    arguments: tuple,
    more: dict,
) -> None:
    import torch

    from sft_dist.topology import Topology

    torch.set_num_threads(1)
    # DeepSpeed reads its rank from the environment, and would try MPI without it.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    log = Path(init_method.removeprefix("file://")).with_name(f"rank-{rank}.log")
    try:
        with log.open("w") as sink:  # DeepSpeed is talkative; a failing rank's traceback comes back through the pipe
            os.dup2(sink.fileno(), 1)
            os.dup2(sink.fileno(), 2)
        pipe.send((True, function(Topology(rank, world_size, rank, init_method, world_size), *arguments, **more)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        pipe.close()
        os._exit(0)  # no destructors of process groups: a peer may be gone already
