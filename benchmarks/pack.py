"""How fast, how full and how small packing is, beside other packers on the same lengths in the same run.

python benchmarks/pack.py [--documents 1000000] [--huge 100000000] [--peers PYTHON] [--json benchmarks/results/pack.json]

Seconds are CPU seconds of one process. Extra memory is the peak resident memory of a forked process less what it began
with. Every packer gets the same lengths, none above `--seq-len`: longer documents were cut into pieces beforehand.
TRL's extra memory is a lower bound: Arrow's pool takes up again what it freed before.
"""

from __future__ import annotations

import argparse
import heapq
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from memory import begin_peak, peak_mib
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the checkout's package, installed or not

from sft_dist.data.pack import pack  # noqa: E402

EXAMPLES = HERE.parent / "examples"
OPEN_ROWS = 64  # of first fit: how many rows an online packer keeps open


# ---- packers: the number of rows they make of the lengths ----


def this_packer(lengths: np.ndarray, seq_len: int) -> int:
    return sum(len(packing.ends) for packing in pack(lengths, seq_len))


def one_window(lengths: np.ndarray, seq_len: int) -> int:
    return sum(len(packing.ends) for packing in pack(lengths, seq_len, window_tokens=1 << 62))


def best_fit_decreasing(lengths: np.ndarray, seq_len: int) -> int:
    """Ding et al. 2024, a document at a time; the rows by room are found through a bitset."""
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(seq_len + 1)]
    rooms = 0
    sizes = lengths.tolist()
    for document in np.argsort(-lengths.astype(np.int64), kind="stable").tolist():
        length = sizes[document]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = seq_len, len(rows)
            rows.append([])
        rows[row].append(document)
        left = room - length
        if left:
            with_room[left].append(row)
            rooms |= 1 << left
    return len(rows)


def first_fit(lengths: np.ndarray, seq_len: int) -> int:
    """Online: each document, as it comes, to the first of the open rows with room; the oldest row makes way."""
    rooms: list[int] = []
    rows: list[list[int]] = []
    finished: list[list[int]] = []
    for document, length in enumerate(lengths.tolist()):
        place = next((place for place, room in enumerate(rooms) if room >= length), len(rooms))
        if place == len(rooms):
            if place == OPEN_ROWS:
                del rooms[0]
                finished.append(rows.pop(0))
                place -= 1
            rooms.append(seq_len)
            rows.append([])
        rows[place].append(document)
        rooms[place] -= length
        if not rooms[place]:
            del rooms[place]
            finished.append(rows.pop(place))
    return len(finished) + len(rows)


def shortest_pack_first(lengths: np.ndarray, seq_len: int) -> int:
    """SPFHP (Krell et al. 2021): over the histogram, longest first, always to the emptiest pack; depth unlimited.

    As published, when no pack has room, all that wait of a length open a pack each. Gives how many packs of which
    lengths there are, and stops there: which document goes where is not yet decided.
    """
    packs: dict[int, list[tuple[int, tuple[int, ...]]]] = {}  # by room: how many packs of these lengths
    emptiest: list[int] = []  # a heap of the rooms, negated
    histogram = np.bincount(lengths, minlength=seq_len + 1).tolist()
    full = 0
    for length in range(seq_len, 0, -1):
        waiting = histogram[length]
        while waiting:
            if emptiest and -emptiest[0] >= length:
                room = -emptiest[0]
                number, content = packs[room].pop()
                if not packs[room]:
                    heapq.heappop(emptiest)
                    del packs[room]
                if number > waiting:
                    _keep(packs, emptiest, room, (number - waiting, content))
            else:
                room, number, content = seq_len, waiting, ()
            taken = min(number, waiting)
            waiting -= taken
            if room > length:
                _keep(packs, emptiest, room - length, (taken, (*content, length)))
            else:
                full += taken
    return full + sum(number for group in packs.values() for number, _ in group)


def _keep(packs: dict[int, list], emptiest: list[int], room: int, group: tuple[int, tuple[int, ...]]) -> None:
    if room not in packs:
        packs[room] = []
        heapq.heappush(emptiest, -room)
    packs[room].append(group)


PACKERS: dict[str, tuple[Callable[[np.ndarray, int], int], str]] = {
    "sft-dist": (this_packer, "windows of 2^28 tokens"),
    "sft-dist, one window": (one_window, "the whole corpus at once"),
    "best-fit decreasing": (best_fit_decreasing, "Ding et al. 2024, per document"),
    "first fit": (first_fit, f"online, {OPEN_ROWS} open rows"),
    "SPFHP": (shortest_pack_first, "Krell et al. 2021; packs of lengths, documents not assigned"),
}
TRL = {
    "TRL bfd": ("bfd", 1000, "its default batches of 1,000 documents; moves the tokens too"),
    "TRL bfd, one batch": ("bfd", 0, "the whole corpus at once; moves the tokens too"),
    "TRL bfd_split": ("bfd_split", 1000, "its default batches; moves the tokens too"),
}


# ---- lengths ----


def cut(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """Lengths of the pieces, none above `seq_len`, in the order of the documents."""
    pieces = -(-lengths // seq_len)
    cuts = np.full(int(pieces.sum()), seq_len)
    cuts[np.cumsum(pieces) - 1] = lengths - (pieces - 1) * seq_len
    return cuts.astype(np.uint16 if seq_len < 1 << 16 else np.int64)


def heavy_tailed(documents: int, seq_len: int, seed: int = 0) -> np.ndarray:
    """Lognormal lengths, median 180, sigma 1.1."""
    lengths = np.random.default_rng(seed).lognormal(np.log(180), 1.1, documents).astype(np.int64)
    return cut(np.maximum(lengths, 1), seq_len)[:documents]


def resampled(measured: np.ndarray, documents: int, seq_len: int) -> np.ndarray:
    """Measured lengths drawn with replacement: real lengths have ties and humps that formulas lack."""
    return cut(np.random.default_rng(0).choice(measured.astype(np.int64), documents), seq_len)[:documents]


def example_lengths() -> np.ndarray:
    """GPT-2 tokens of the example corpora: as many draws from the instruction tasks as from WikiText paragraphs."""
    from tokenizers import ByteLevelBPETokenizer

    gpt2 = EXAMPLES / "tokenizers" / "gpt2"
    tokenizer = ByteLevelBPETokenizer.from_file(str(gpt2 / "vocab.json"), str(gpt2 / "merges.txt"))
    tasks = [json.loads(line) for line in (EXAMPLES / "instructions/data/seed_tasks.jsonl").read_text().splitlines()]
    talks = [
        "\n".join([task["instruction"], one["input"], one["output"]]) for task in tasks for one in task["instances"]
    ]
    paragraphs = [text for text in (EXAMPLES / "wikitext/data/train.txt").read_text().splitlines() if text.strip()]
    sizes = [np.array([len(e.ids) for e in tokenizer.encode_batch(texts)]) for texts in (talks, paragraphs)]
    most = max(map(len, sizes))
    return np.concatenate([np.resize(size, most) for size in sizes])


def read_lengths(path: Path) -> np.ndarray:
    return np.load(path) if path.suffix == ".npy" else np.loadtxt(path, dtype=np.int64, ndmin=1)


# ---- measuring ----


def measure(packer: Callable[[Any, int], int], lengths: np.ndarray, seq_len: int) -> dict[str, float]:
    """Rows, CPU seconds and memory of one packer, in a forked process of its own."""

    def work(pipe: Any) -> None:
        before, began = begin_peak(), time.process_time()
        rows = packer(lengths, seq_len)
        seconds, peak = time.process_time() - began, peak_mib()
        pipe.send({"rows": rows, "cpu_seconds": seconds, "extra_mib": peak - before, "peak_mib": peak})

    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=work, args=(theirs,))
    process.start()
    theirs.close()
    result = ours.recv()
    process.join()
    return result


def measure_trl(python: str, lengths: np.ndarray, seq_len: int, strategy: str, batch_size: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lengths.npy"
        np.save(path, lengths)
        command = [python, str(HERE / "pack_trl.py"), str(path), str(seq_len), strategy, str(batch_size)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def judged(name: str, note: str, lengths: np.ndarray, seq_len: int, result: dict[str, Any]) -> dict[str, Any]:
    tokens = int(lengths.sum(dtype=np.int64))
    return {
        "packer": name,
        "documents": len(lengths),
        "documents_per_cpu_second": len(lengths) / result["cpu_seconds"],
        "fill": tokens / (result["rows"] * seq_len),
        **result,
        "note": note,
    }


def compare(lengths: np.ndarray, seq_len: int, peers: str | None) -> list[dict[str, Any]]:
    results = [
        judged(name, note, lengths, seq_len, measure(packer, lengths, seq_len))
        for name, (packer, note) in PACKERS.items()
    ]
    for name, (strategy, batch_size, note) in TRL.items() if peers else ():
        result = measure_trl(peers, lengths, seq_len, strategy, batch_size)
        if result["tokens"] != lengths.sum(dtype=np.int64):
            note = f"{note}; LOST TOKENS"
        results.append(judged(name, note, lengths, seq_len, result))
    return results


def huge(documents: int, seq_len: int) -> dict[str, Any]:
    """Heavy-tailed lengths in a memory-mapped file, far more than one window."""
    with tempfile.TemporaryDirectory() as folder:
        path, block, total = Path(folder) / "lengths.u16", 1 << 20, 0
        with path.open("wb") as file:
            for seed, first in enumerate(range(0, documents, block)):
                lengths = heavy_tailed(min(block, documents - first), seq_len, seed)
                total += int(lengths.sum(dtype=np.int64))
                file.write(lengths.astype(np.uint16).tobytes())
        result = measure(this_packer, np.memmap(path, np.uint16, "r"), seq_len)
    return {
        "packer": "sft-dist, memory-mapped",
        "documents": documents,
        "documents_per_cpu_second": documents / result["cpu_seconds"],
        "fill": total / (result["rows"] * seq_len),
        **result,
        "note": f"{result['peak_mib']:.0f} MiB resident in all, the mapped file included",
    }


# ---- showing ----


def machine() -> dict[str, Any]:
    names = [
        line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def show(console: Console, title: str, results: list[dict[str, Any]], caption: str | None) -> None:
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for column in ("packer", "documents", "documents / CPU s", "fill %", "rows", "extra MiB", "what"):
        table.add_column(column, justify="left" if column in ("packer", "what") else "right")
    for result in results:
        table.add_row(
            result["packer"],
            f"{result['documents']:,}",
            f"{result['documents_per_cpu_second']:,.0f}",
            f"{100 * result['fill']:.3f}",
            f"{result['rows']:,}",
            f"{result['extra_mib']:,.0f}",
            result["note"],
        )
    console.print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--lengths", type=Path, help="a .npy or .txt file of measured document lengths")
    parser.add_argument("--peers", metavar="PYTHON", help="a Python with TRL installed; without it TRL is left out")
    parser.add_argument("--huge", type=int, nargs="?", const=100_000_000, metavar="DOCUMENTS")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "pack.json")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    console = Console(width=None if sys.stdout.isatty() else 150)
    left_out = None if given.peers else "TRL was left out: --peers names no Python that has it."
    report: dict[str, Any] = {"machine": machine(), "seq_len": given.seq_len, "results": {}}
    if given.huge:  # first: what this process holds by then counts as resident in its forks
        title = f"lognormal, median 180, sigma 1.1, cut at {given.seq_len}: {given.huge:,} documents in a file"
        report["results"][title] = [huge(given.huge, given.seq_len)]
        show(console, title, report["results"][title], None)
    measured = read_lengths(given.lengths) if given.lengths else example_lengths()
    origin = given.lengths.name if given.lengths else "GPT-2 tokens of the example instructions and WikiText, half each"
    corpora = {
        "lognormal, median 180, sigma 1.1": heavy_tailed(given.documents, given.seq_len),
        f"drawn with replacement from {len(measured):,} lengths: {origin}": resampled(
            measured, given.documents, given.seq_len
        ),
    }
    for name, lengths in corpora.items():
        title = f"{name}, cut at {given.seq_len}"
        report["results"][title] = compare(lengths, given.seq_len, given.peers)
        show(console, title, report["results"][title], left_out)
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
