"""How fast, how small and how complete a preparation is, beside other tools on the same file in the same run.

python benchmarks/prepare.py [--peers PYTHON] [--wikitext FILE] [--pairs FILE] [--json benchmarks/results/prepare.json]

Prompt–response pairs become rows of 1,024 GPT-2 tokens on disk, under the Alpaca template. Every tool starts cold: a new
process, empty caches. CPU seconds, memory (proportional set size, sampled every 50 ms) and tokens include all children.
Runs of the tools alternate; told are the median of the seconds and the highest memory.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from corpus import Corpus, existing, write
from pack import machine
from peers import BEFORE, BETWEEN, SEQ_LEN
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TOKENIZER = ROOT / "examples/tokenizers/gpt2"
PEERS = {
    "group_texts": (
        "datasets.map + group_texts",
        "answers cut anywhere; the end of each batch of 1,000 documents is lost",
    ),
    "bfd": ("TRL bfd", "documents cut at the row, the rest is lost"),
    "bfd_split": ("TRL bfd_split", "documents cut into pieces, later ones without what stood before"),
}
OURS_NOTE = "cleaned, repeats removed, responses marked; later pieces of a long answer keep context"


# ---- measuring ----


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process and all its children took."""

    cpu_seconds: float
    wall_seconds: float
    peak_mib: float  # most of the sum of proportional set sizes
    largest_mib: float  # most resident memory of one process, as Linux counted it
    output: str


def measured(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> Usage:
    """Run a command in a session of its own; its output is kept in `folder`. Raises CalledProcessError."""
    done = threading.Event()
    peak = [0.0, 0.0]
    with (folder / "output.txt").open("w+") as file:
        began = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        sampler = threading.Thread(target=_sample, args=(process.pid, done, peak))
        sampler.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:  # Ctrl-C, or SIGTERM as `end_on_sigterm` turns it into one
            process.terminate()  # a launcher passes it on to the workers, which have sessions of their own
            process.wait(60)
            done.set()
            raise
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        done.set()
        sampler.join()
        file.seek(0)
        output = file.read()
    if process.returncode:
        print(output, file=sys.stderr)
        raise subprocess.CalledProcessError(process.returncode, command)
    return Usage(usage.ru_utime + usage.ru_stime, wall, peak[0], peak[1], output)


def end_on_sigterm() -> None:
    """Let SIGTERM unwind this program, so that what it measures ends with it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def _sample(session: int, done: threading.Event, peak: list[float]) -> None:
    while not done.wait(0.05):
        members = _members(session)
        peak[0] = max(peak[0], sum(_mib(process / "smaps_rollup", "Pss:") for process in members))
        peak[1] = max(peak[1], *(_mib(process / "status", "VmHWM:") for process in members), 0.0)


def _members(session: int) -> list[Path]:
    """The processes of a session."""
    members = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[3]) == session:
            members.append(folder)
    return members


def _mib(file: Path, field: str) -> float:
    """A field of a file of /proc; 0 when the process has ended. `ru_maxrss` would count what the parent held at the fork."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(field)), 0.0)


def disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def shards_digest(folder: Path) -> str:
    """Digest of the tokens and targets of all shards."""
    digest = blake2b(digest_size=16)
    for path in sorted([*folder.glob("*.tokens"), *folder.glob("*.targets")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


# ---- tools ----


def ours(pairs: Path, workers: int, folder: Path) -> dict[str, Any]:
    """`sft-dist prepare` as a person runs it."""
    out = folder / "out"
    run_file = folder / "run.yaml"
    run_file.write_text(
        json.dumps(
            {
                "run_dir": str(folder / "run"),
                "prepare": {
                    "sources": [{"path": str(pairs), "schema": "prompt_response"}],
                    "template": "alpaca",
                    "tokenizer": str(TOKENIZER),
                    "seq_len": SEQ_LEN,
                    "out": str(out),
                },
                "model": {"config": {"model_type": "gpt2"}},
                "train": {"global_batch_rows": 1, "epochs": 1},
            }
        )
    )
    usage = measured([sys.executable, "-m", "launch.cli", "prepare", str(run_file), "--workers", str(workers)], folder)
    about = json.loads((out / "prepare.json").read_text())
    train = about["splits"]["train"]
    counts = {name: train[name] for name in ("rows", "tokens", "targets", "documents")}
    return {
        **_taken(usage, out / "train"),
        **counts,
        "blake2b": shards_digest(out / "train"),
        "drops": about["funnel"]["drops"],
        "long": about["funnel"]["long"],
    }


def peer(recipe: str, pairs: Path, python: str, folder: Path) -> dict[str, Any]:
    """Another tool, with caches of its own that are empty."""
    out = folder / "out"
    caches = {"HF_HOME": str(folder / "home"), "HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    program = [python, "-P", str(HERE / "peers.py")]
    usage = measured([*program, recipe, str(pairs), str(TOKENIZER), str(out)], folder, caches)
    told = json.loads(usage.output.splitlines()[-1])
    counted = subprocess.run(
        [*program, "count", str(out)], stdout=subprocess.PIPE, check=True, env={**os.environ, **caches}
    )
    return {
        "recipe": recipe,
        **_taken(usage, out),
        **told,
        **json.loads(counted.stdout),
        "cache_bytes": disk_bytes(folder / "cache"),
    }


def _taken(usage: Usage, out: Path) -> dict[str, Any]:
    return {
        "cpu_seconds": usage.cpu_seconds,
        "wall_seconds": usage.wall_seconds,
        "peak_mib": usage.peak_mib,
        "largest_process_mib": usage.largest_mib,
        "disk_bytes": disk_bytes(out),
    }


# ---- what there was to keep ----


@dataclass(frozen=True, slots=True)
class Reference:
    """The documents before anything was done to them: tokens [documents], and where the answer of each begins.

    >>> Reference(np.array([1100, 10]), np.array([1000, 4])).cut_targets()
    76
    """

    lengths: np.ndarray
    starts: np.ndarray

    @property
    def long(self) -> np.ndarray:
        """Which documents are longer than a row."""
        return self.lengths > SEQ_LEN

    def about(self) -> dict[str, int]:
        """The sums, for a report."""
        tokens, targets = int(self.lengths.sum()), int((self.lengths - self.starts).sum())
        return {"tokens": tokens, "targets": targets, "long_documents": int(self.long.sum())}

    def repeated(self) -> int:
        """Tokens that this project shows more than once, as context of a later piece."""
        return sum(map(_repeated, self.starts[self.long].tolist(), self.lengths[self.long].tolist()))

    def cut_targets(self) -> int:
        """Answer tokens beyond the first row of their document."""
        return int((self.lengths - np.maximum(self.starts, SEQ_LEN))[self.long].sum())

    def left_over_targets(self, batch: int = 1000) -> int:
        """Answer tokens after the last full row of every batch of documents."""
        lost = 0
        for first in range(0, len(self.lengths), batch):
            lengths, starts = self.lengths[first : first + batch], self.starts[first : first + batch]
            ends = np.cumsum(lengths)
            kept = ends[-1] // SEQ_LEN * SEQ_LEN
            lost += int((ends - np.maximum(ends - lengths + starts, kept)).clip(0).sum())
        return lost


def reference(pairs: Path) -> Reference:
    """Every templated document tokenised as a whole, by `tokenizers`, and its end token."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer.from_file(str(TOKENIZER / "vocab.json"), str(TOKENIZER / "merges.txt"))
    records = [json.loads(line) for line in pairs.read_text().split("\n") if line]
    prompts = [BEFORE + record["prompt"] + BETWEEN for record in records]
    texts = [prompt + record["response"] for prompt, record in zip(prompts, records, strict=True)]
    starts = np.array([len(encoding.ids) for encoding in tokenizer.encode_batch(prompts)])
    return Reference(np.array([len(encoding.ids) + 1 for encoding in tokenizer.encode_batch(texts)]), starts)


def _repeated(start: int, length: int) -> int:
    """Tokens that this project shows more than once of a document whose answer begins at `start`.

    >>> _repeated(100, 1024)
    0
    """
    from sft_dist.data.tokenise import Document, fit

    places = np.arange(length, dtype=np.uint32)
    parts = fit(Document(places, places >= start, ""), SEQ_LEN, "split", context=SEQ_LEN // 8)
    shown = np.concatenate([part.ids for part in parts])
    return len(shown) - len(np.unique(shown))


def judged(tool: str, note: str, runs: list[dict[str, Any]], whole: Reference | None) -> dict[str, Any]:
    """One line of the table from the runs of a tool."""
    first = runs[0]
    result = {
        **first,
        "tool": tool,
        "runs": len(runs),
        **{name: statistics.median(run[name] for run in runs) for name in ("cpu_seconds", "wall_seconds")},
        **{name: max(run[name] for run in runs) for name in ("peak_mib", "largest_process_mib")},
        "all_cpu_seconds": [run["cpu_seconds"] for run in runs],
        "fill": first["tokens"] / (first["rows"] * SEQ_LEN),
        "note": note,
    }
    result["tokens_per_cpu_second"] = first["tokens"] / result["cpu_seconds"]
    if whole is not None:
        result |= _lost(first, whole)
        kept = whole.about()["tokens"] - result["lost_tokens"]  # what is shown twice is not work done
        result["tokens_per_cpu_second"] = kept / result["cpu_seconds"]
    return result


def _lost(run: dict[str, Any], whole: Reference) -> dict[str, int]:
    """Tokens, and tokens of answers, that no row holds; this project's include what cleaning removed."""
    sums = whole.about()
    if "targets" in run:
        repeated, targets = whole.repeated(), sums["targets"] - run["targets"]
    else:
        repeated = 0
        targets = {"group_texts": whole.left_over_targets, "bfd": whole.cut_targets, "bfd_split": int}[run["recipe"]]()
    lost = sums["tokens"] - (run["tokens"] - repeated)
    return {"lost_tokens": lost, "lost_targets": targets, "repeated_tokens": repeated}


# ---- the benchmark ----


def compare(pairs: Path, peers: str | None, repeats: int, scratch: Path) -> tuple[list[dict[str, Any]], Reference]:
    """Every tool on the same file, in turns."""
    cores = len(os.sched_getaffinity(0))
    tools = {f"sft-dist, {workers} worker{'s' * (workers > 1)}": workers for workers in sorted({1, cores})}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in [*tools, *(PEERS if peers else ())]}
    for _ in range(repeats):
        for name, made in runs.items():
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                place = Path(folder)
                made.append(ours(pairs, tools[name], place) if name in tools else peer(name, pairs, peers, place))
    whole = reference(pairs)
    texts = {**{name: (name, OURS_NOTE) for name in tools}, **PEERS}
    _check_equal([run for name in tools for run in runs[name]])
    return [judged(*texts[name], made, whole) for name, made in runs.items()], whole


def scaled(pairs: Path, scratch: Path) -> list[dict[str, Any]]:
    """This project on many more pairs: memory and tokens per CPU second should stay what they were."""
    results = []
    for workers in sorted({1, len(os.sched_getaffinity(0))}):
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            name = f"sft-dist, {workers} worker{'s' * (workers > 1)}"
            results.append(judged(name, OURS_NOTE, [ours(pairs, workers, Path(folder))], None))
    _check_equal(results)
    return results


def _check_equal(runs: list[dict[str, Any]]) -> None:
    """What is made must not depend on the run or the number of workers: no speed makes up for that."""
    made = {run["blake2b"] for run in runs}
    assert len(made) == 1, f"preparations of one file differ: {[(run['rows'], run['tokens']) for run in runs]}"


def show(console: Console, title: str, results: list[dict[str, Any]], caption: str | None) -> None:
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    columns = (
        "tool",
        "tokens",
        "twice",
        "lost",
        "of answers",
        "fill %",
        "CPU s",
        "tokens / CPU s",
        "wall s",
        "peak MiB",
        "disk MB",
        "what",
    )
    for column in columns:
        table.add_column(column, justify="left" if column in ("tool", "what") else "right")
    for result in results:
        table.add_row(
            result["tool"],
            f"{result['tokens']:,}",
            f"{result['repeated_tokens']:,}" if "repeated_tokens" in result else "",
            f"{result['lost_tokens']:,}" if "lost_tokens" in result else "",
            f"{result['lost_targets']:,}" if "lost_targets" in result else "",
            f"{100 * result['fill']:.2f}",
            f"{result['cpu_seconds']:.2f}",
            f"{result['tokens_per_cpu_second']:,.0f}",
            f"{result['wall_seconds']:.2f}",
            f"{result['peak_mib']:,.0f}",
            f"{result['disk_bytes'] / 1e6:,.1f}",
            result["note"],
        )
    console.print(table)


def versions() -> dict[str, str]:
    """Of what this project runs on."""
    return {name: version(name) for name in ("gigatoken", "tokenizers", "transformers", "torch", "numpy")}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peers", metavar="PYTHON", help="a Python with TRL and datasets; without it they are left out"
    )
    parser.add_argument("--pairs", type=Path, help="JSON lines of prompt and response; default: made by corpus.py")
    parser.add_argument("--wikitext", type=Path, help="WikiText for corpus.py; default: the slices of the examples")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scale", action=argparse.BooleanOptionalAction, default=True, help="also ten times the pairs")
    parser.add_argument("--scale-pairs", type=Path, help="the file for --scale; default: made by corpus.py")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def corpus(given: Path | None, made: Path, pairs: int, wikitext: Path | None) -> Corpus:
    """The file named, or a corpus made now."""
    return existing(given) if given else write(made, pairs, wikitext=[wikitext] if wikitext else [])


def main() -> None:
    given = arguments()
    end_on_sigterm()
    console = Console(width=None if sys.stdout.isatty() else 200)
    left_out = None if given.peers else "datasets and TRL were left out: --peers names no Python that has them."
    report: dict[str, Any] = {"machine": machine(), "versions": versions(), "seq_len": SEQ_LEN}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        small = corpus(given.pairs, scratch / "pairs.jsonl", 15_000, given.wikitext)
        results, whole = compare(small.path, given.peers, given.repeats, scratch)
        sums = whole.about()
        report["compare"] = {"corpus": {**small.about(), **sums}, "results": results}
        title = (
            f"{small.pairs:,} pairs, {sums['tokens']:,} tokens, {sums['long_documents']:,} documents longer than a row"
        )
        show(console, title, results, left_out)
        if given.scale:
            large = corpus(given.scale_pairs, scratch / "many.jsonl", 150_000, given.wikitext)
            results = scaled(large.path, scratch)
            report["scale"] = {"corpus": large.about(), "results": results}
            show(console, f"{large.pairs:,} pairs", results, "Tokens: those of the rows, repeated context included.")
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
