"""Before a run starts: is there room for its checkpoints, and how fast is the disk?"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from sft_dist.checkpoint import Checkpoints, Fragments, cannot_be_written, leftovers
from sft_dist.errors import CheckpointError, HealthError
from sft_dist.retention import Retention, list_folders
from sft_dist.topology import node_name


def require_room(folder: Path, retention: Retention, num_bytes: int, *, is_fresh: bool = False) -> str | None:
    """Before anything is started: do the checkpoints that are kept, and two more, fit? Else a warning with the numbers.

    `num_bytes` is the size of one. Those that are there give way in time; what a killed life left half written does so at
    once. A fresh start keeps all of it. Raises CheckpointError when there is no room for a single one.
    """
    above = next(path for path in (folder, *folder.parents) if path.is_dir())
    free, copies = shutil.disk_usage(above).free, retention.keep_last + retention.keep_best + 2
    there = 0
    if not is_fresh:
        free += sum(file.stat().st_size for path in leftovers(folder) for file in path.rglob("*") if file.is_file())
        there = num_bytes * len(list_folders(folder))  # not looked into: many ranks ask at once
    if free < num_bytes:
        raise CheckpointError(
            f"{folder}: {free / 1e9:,.2f} GB are free, and one checkpoint takes {num_bytes / 1e9:,.2f} GB; make room, or "
            "choose another run_dir"
        )
    if free + there < copies * num_bytes:
        return (
            f"warning: {copies} checkpoints of {num_bytes / 1e9:,.2f} GB (kept, one in the making, one to be removed) take "
            f"more than the {(free + there) / 1e9:,.2f} GB there are for them: saves will fail; make room, or lower checkpoint.keep_last"
        )
    return None


def rehearse(checkpoints: Checkpoints, fragments: Fragments) -> float:
    """Make the buffer that saves reuse, and let every rank write a sample at once; returns bytes a second of them all.

    Raises CheckpointError, on every rank, when one cannot write.
    """
    comms = checkpoints.comms
    checkpoints.snapshot.reserve(fragments())
    sample = checkpoints.folder / f".sample-{comms.topology.rank:05d}.partial"
    comms.barrier()
    started = time.perf_counter()
    size, failure = checkpoints.attempt(checkpoints.snapshot.write_sample, sample)
    seconds = max(comms.gather(time.perf_counter() - started))
    sample.unlink(missing_ok=True)
    every = comms.gather((node_name(), failure))
    if failed := {node: why for node, why in every if why}:
        why = cannot_be_written(next(iter(failed.values())))
        if len(failed) < len({node for node, _ in every}):
            raise HealthError(f"node {', '.join(failed)}: {why} The others can write there", tuple(failed))
        raise CheckpointError(why)
    return sum(comms.gather(size)) / seconds
