"""How fast rows come from disk: this loader beside raw `np.memmap` indexing and Megatron's indexed data set.

python benchmarks/loader.py [--rows 200000] [--folder FOLDER] [--json benchmarks/results/loader.json]

Everything is in the page cache and on one thread: what is measured is the way from the cache to the batch. Megatron's reader
is a minimal one of its .bin/.idx format (`megatron/core/datasets/indexed_dataset.py`: MMapIndexedDataset with mmap), written
for this benchmark: one `get(i)` a document, a view through `np.frombuffer`, and the copy into a batch.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import struct
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from sft_dist.data.loader import Loader, widen
from sft_dist.data.shards import Manifest, Shards, digests, row_dtype
from sft_dist.topology import Topology

SEQ_LEN, MICRO_ROWS, GLOBAL_ROWS, ROWS_PER_SHARD = 1024, 64, 1024, 65_536
ABOUT = {"dtype": "<u2", "vocab_size": 50_257, "eos_id": 0, "pad_id": 0, "tokenizer": "t", "template": "p"}


def main() -> None:
    """Measure, print a table, leave it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        shards = make(Path(folder), options.rows)
        speeds = compare(Path(folder), shards, options.repeats)
        result = {
            "rows_per_second": speeds,
            "of_raw": of_raw(speeds),
            "prefetch": prefetch(shards, options.repeats),
            "billion_rows": billion(Path(folder)),
        }
    result |= {"setting": setting(options.rows, options.repeats), "machine": machine()}
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    show(result)


def make(folder: Path, rows: int) -> Shards:
    """Rows of random tokens as shards, as one raw file, and as Megatron's pair of files."""
    draw = np.random.default_rng(0)
    for number, first in enumerate(range(0, rows, ROWS_PER_SHARD)):
        count = min(ROWS_PER_SHARD, rows - first)
        tokens = draw.integers(0, 50_257, (count, SEQ_LEN), dtype=np.uint16)
        with (folder / "raw").open("ab") as raw:
            tokens.tofile(raw)
        records = np.zeros(count, row_dtype(SEQ_LEN, "<u2"))
        records["tokens"], records["length"], records["num_targets"] = tokens, SEQ_LEN, 1
        for kind in ("targets", "starts"):
            records[kind] = draw.integers(0, 256, (count, SEQ_LEN // 8), dtype=np.uint8)
        records["digest"] = digests(records)
        records.tofile(folder / f"{number:05d}.rows")
    os.link(folder / "raw", folder / "megatron.bin")
    write_index(folder / "megatron.idx", np.full(rows, SEQ_LEN, np.int32))
    counts = {"documents": rows, "tokens": rows * SEQ_LEN, "targets": rows}
    manifest = Manifest(seq_len=SEQ_LEN, rows=rows, rows_per_shard=ROWS_PER_SHARD, **counts, **ABOUT)
    return Shards(folder, manifest)


def write_index(path: Path, lengths: np.ndarray) -> None:
    """Megatron's index: magic, version 1, dtype code 8 (uint16), counts; lengths, byte offsets, document bounds."""
    offsets = np.concatenate([[0], np.cumsum(lengths[:-1].astype(np.int64) * 2)])
    with path.open("wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, len(lengths), len(lengths) + 1))
        for array in (lengths, offsets, np.arange(len(lengths) + 1, dtype=np.int64)):
            array.tofile(file)


class IndexedDataset:
    """The reading half of Megatron's MMapIndexedDataset, mmap on."""

    def __init__(self, prefix: Path) -> None:
        index = np.memmap(prefix.with_suffix(".idx"), mode="r")
        header = 9 + 8 + 1
        count = int(np.frombuffer(index, np.int64, 1, header)[0])
        at = header + 16
        self.lengths = np.frombuffer(index, np.int32, count, at)
        self.pointers = np.frombuffer(index, np.int64, count, at + self.lengths.nbytes)
        self.buffer = memoryview(np.memmap(prefix.with_suffix(".bin"), mode="r"))

    def get(self, number: int) -> np.ndarray:
        """The tokens of one document: a view."""
        return np.frombuffer(self.buffer, np.uint16, count=self.lengths[number], offset=self.pointers[number])


def compare(folder: Path, shards: Shards, repeats: int) -> dict[str, dict[str, float]]:
    """Rows a second of each reader, random and sequential; readers take turns, the median of the repeats counts."""
    raw = np.memmap(folder / "raw", dtype="<u2", mode="r").reshape(-1, SEQ_LEN)
    megatron = IndexedDataset(folder / "megatron")
    readers: dict[str, Callable[[np.ndarray, bool], Iterable]] = {
        f"np.memmap, tokens only, {MICRO_ROWS} rows": lambda order, _: (raw[part] for part in parts(order)),
        "Megatron IndexedDataset, tokens only": lambda order, _: (
            np.stack([megatron.get(i) for i in part]) for part in parts(order)
        ),
        "this loader's reading, stored dtypes": lambda order, _: in_reads(shards, order),
        "this loader, stored dtypes, order included": lambda order, is_random: stream(shards, is_random, is_wide=False),
        "this loader, widened on the CPU, order included": lambda order, is_random: stream(
            shards, is_random, is_wide=True
        ),
    }
    orders = {"random": np.random.default_rng(1).permutation(shards.num_rows), "sequential": np.arange(shards.num_rows)}
    for reader in readers.values():  # into the page cache
        exhaust(reader(orders["sequential"], False))
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(repeats):
        for name, reader in readers.items():
            for kind, order in orders.items():
                began = time.perf_counter()
                exhaust(reader(order, kind == "random"))
                seconds.setdefault((name, kind), []).append(time.perf_counter() - began)
    return {
        name: {kind: shards.num_rows / statistics.median(seconds[name, kind]) for kind in orders} for name in readers
    }


def parts(order: np.ndarray) -> Iterator[np.ndarray]:
    """The order in batches."""
    return (order[at : at + MICRO_ROWS] for at in range(0, len(order), MICRO_ROWS))


def in_reads(shards: Shards, order: np.ndarray) -> Iterator:
    """The loader's way of reading when the row numbers are given, as they are to raw indexing."""
    from sft_dist.data.loader import Block

    loader = Loader(shards, Topology(), micro_batch_rows=MICRO_ROWS)
    return loader.read([Block(part, part) for part in parts(order)])


def stream(shards: Shards, is_random: bool, *, is_wide: bool) -> Iterator:
    """An epoch as a run reads it: order, counts of every step, batches."""
    loader = Loader(shards, Topology(), seed=0, micro_batch_rows=MICRO_ROWS, shuffle=is_random)
    for step in loader.steps(start=0, end=shards.num_rows, global_batch_rows=GLOBAL_ROWS):
        yield from step.micro_batches if is_wide else step.stored


def exhaust(batches: Iterable) -> None:
    for _ in batches:
        pass


def prefetch(shards: Shards, repeats: int) -> dict[str, float]:
    """Would a thread that reads ahead help? Seconds of 64 steps of a small computation, alone, with rows, with a thread."""
    from concurrent.futures import ThreadPoolExecutor

    weights = torch.randn(SEQ_LEN, SEQ_LEN)

    def learn(batch: tuple) -> None:
        (batch[0].float() @ weights @ weights).sum()

    def batches() -> Iterator[tuple]:
        loader = Loader(shards, Topology(), seed=0, micro_batch_rows=MICRO_ROWS)
        for step in loader.steps(start=0, end=256 * MICRO_ROWS, global_batch_rows=GLOBAL_ROWS):
            for _, stored in step.stored:
                yield widen(stored, SEQ_LEN)

    def ahead(items: Iterator) -> Iterator:
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(next, items, None)
            while (item := waiting.result()) is not None:
                waiting = pool.submit(next, items, None)
                yield item

    def timed(source: Callable[[], Iterable]) -> float:
        began = time.perf_counter()
        for batch in source():
            learn(batch)
        return time.perf_counter() - began

    same = next(batches())
    sources = {"computation_alone": lambda: [same] * 256, "with_rows": batches, "with_thread": lambda: ahead(batches())}
    seconds: dict[str, list[float]] = {name: [] for name in sources}
    for _ in range(repeats):
        for name, source in sources.items():
            seconds[name].append(timed(source))
    return {name: statistics.median(values) for name, values in seconds.items()}


class Sparse(Shards):
    """Rows that nobody wrote have no digests."""

    def _check_rows(self, numbers: np.ndarray, records: np.ndarray) -> None:
        pass


def billion(folder: Path) -> dict[str, float]:
    """Resident memory, and the time to the first micro-batch of a resumed run, over a billion rows in sparse files."""
    rows, seq_len, where = 10**9, 16, folder / "billion"
    where.mkdir()
    with (where / "00000.rows").open("wb") as file:
        file.truncate(rows * row_dtype(seq_len, "<u2").itemsize)
    counts = {"documents": rows, "tokens": rows, "targets": rows}
    shards = Sparse(where, Manifest(seq_len=seq_len, rows=rows, rows_per_shard=rows, **counts, **ABOUT))
    before, anonymous = resident(), []
    loader = Loader(shards, Topology(), seed=0, micro_batch_rows=MICRO_ROWS)
    plans, firsts = [], []
    starts = np.random.default_rng(0).integers(0, 10 * rows, 20).tolist()
    for start in 2 * starts:  # the second time from the page cache: without the disk
        began = time.perf_counter()
        step = next(loader.steps(start=start, end=start + 2 * MICRO_ROWS, global_batch_rows=MICRO_ROWS))
        plans.append(time.perf_counter() - began)
        next(step.stored)
        firsts.append(time.perf_counter() - began)
        anonymous.append(resident())
    cold, warm = slice(0, len(starts)), slice(len(starts), None)
    return {
        "resume_ms_to_the_first_step": 1e3 * statistics.median(plans[warm]),
        "resume_ms_to_the_first_batch": 1e3 * statistics.median(firsts[warm]),
        "resume_ms_worst": 1e3 * max(firsts[warm]),
        "resume_ms_to_the_first_batch_cold": 1e3 * statistics.median(firsts[cold]),
        "growth_mib": (max(anonymous) - before) / 2**20,
        "resident_mib": max(anonymous) / 2**20,
    }


def resident() -> int:
    """Anonymous memory of this process in bytes (pages of mapped files belong to the page cache)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def of_raw(speeds: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Each speed as a share of the first reader's."""
    raw = next(iter(speeds.values()))
    return {name: {kind: speed / raw[kind] for kind, speed in each.items()} for name, each in speeds.items()}


def setting(rows: int, repeats: int) -> dict[str, int]:
    """What was read."""
    batch = {"seq_len": SEQ_LEN, "micro_batch_rows": MICRO_ROWS, "global_batch_rows": GLOBAL_ROWS}
    return {"rows": rows, "rows_per_shard": ROWS_PER_SHARD, "repeats": repeats, **batch}


def machine() -> dict[str, str | int]:
    """Where it was measured."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    versions = {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__}
    return {"processor": names[0] if names else platform.machine(), "cores": os.cpu_count() or 0, **versions}


def show(result: dict) -> None:
    """The table."""
    print(f"{'rows a second':52}{'random':>12}{'':6}{'sequential':>12}")
    for name, speeds in result["rows_per_second"].items():
        share = result["of_raw"][name]
        told = "".join(f"{speeds[kind]:>12,.0f}{share[kind]:>6.0%}" for kind in ("random", "sequential"))
        print(f"{name:52}{told}")
    for part in ("prefetch", "billion_rows"):
        print(f"{part}: " + ", ".join(f"{name} {value:.3f}" for name, value in result[part].items()))


if __name__ == "__main__":
    main()
