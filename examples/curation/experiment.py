"""Curated examples against the same number of random ones: spam or ham, several sizes, several seeds.

python examples/curation/experiment.py [--sizes 250 1000] [--seeds 5] [--json curation.json] [--out runs/curation]
python examples/curation/figure.py curation.json [curation.svg]

Each sample is a file that `sft-dist prepare` and `sft-dist train` are run on, with the settings of run.yaml. What differs is where
its records come from, and what is done to them:

* `raw`: at random from the collection as it is published, without any curation;
* `repeats`: the same of a collection that repeats itself as crawled text does: for each message three more, drawn by Zipf's law,
  every second one of them in capitals. This one is made, not found;
* `curated`: at random from what the curation of run.yaml leaves of the first (and of the second: told is how far that is the same);
* `selected`: LIMA-style, the best spread of a random three quarters of the curated.

All are measured on the same held-out messages, which are curated, and which no sample has a repeat of. Done runs are not done again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from launch import cli, train
from sft_dist.data.shards import Shards

RUN_FILE = Path(__file__).parent / "run.yaml"
ARMS = ("raw", "repeats", "curated", "selected")
AS_IT_IS = (
    "{normalise: null, control_characters: false, mojibake: false, outer_white_space: false, duplicates: false, "
    "near_validation: null}"
)
METRICS = ("validation_f1", "validation_accuracy", "validation_loss")
STARTED = multiprocessing.get_context("forkserver")
STARTED.set_forkserver_preload(["deepspeed", "transformers", "launch.parts", "sft_dist.trainer"])
Message = dict[str, str]


def sft_dist(command: str, *arguments: str, log: Path) -> None:
    """`sft-dist prepare` or `sft-dist train`, in a process whose imports are already there; what it says is in `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    log.touch()
    process = STARTED.Process(target=_command, args=(command, arguments, log))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{command} {' '.join(arguments)}\n{log.read_text()}")


def _command(command: str, arguments: Sequence[str], log: Path) -> None:
    with log.open("a") as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
    if command == "train":
        sys.exit(train.main([str(RUN_FILE), *arguments]))  # what torchrun starts; alone it is a world of one
    cli.main([command, str(RUN_FILE), *arguments])


def write(messages: Sequence[Message], path: Path) -> None:
    """A file of messages; one that is there already and the same stays as it is, for the runs that read it."""
    text = "".join(json.dumps(message) + "\n" for message in messages)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


# ---- the collections ----


def line_number(where: str) -> int:
    return int(where.rsplit(":", 1)[1])


def kept_lines(shards: Path) -> set[int]:
    """The lines of the only source that are trained on."""
    train = Shards.open(shards / "train")
    return {line_number(where) for places in train.origins(range(train.num_rows)).values() for where in places}


def left_of_repeats(found: dict[str, list[Message]], out: Path) -> dict[str, int]:
    """How many messages curation leaves of `repeats`, and how many of them it leaves of the collection as it is too."""
    write(found["repeats"], out / "repeats.jsonl")
    files = {"sources": "repeats", "validation_sources": "held_out"}
    sources = [f"prepare.{key}=[{{path: {out}/{name}.jsonl, schema: label}}]" for key, name in files.items()]
    settings = ["prepare.validation_fraction=0", f"prepare.tokenizer={out}/shards/tokenizer", f"prepare.out={out}/left"]
    sft_dist("prepare", *sources, *settings, log=out / "log.txt")
    left = [found["repeats"][line - 1]["text"] for line in kept_lines(out / "left")]
    return {"messages": len(left), "the same": len(set(left) & {one["text"] for one in found["curated"]})}


def collections(out: Path) -> dict[str, list[Message]]:
    """The messages that each arm draws from, and `held_out`, which are written for the runs."""
    sft_dist("prepare", f"prepare.out={out}/shards", log=out / "log.txt")
    path = yaml.safe_load(RUN_FILE.read_text())["prepare"]["sources"][0]["path"]
    lines = [line.split("\t", 1) for line in Path(path).read_text().split("\n") if line]
    published = {number: {"label": label, "text": text} for number, (label, text) in enumerate(lines, 1)}
    kept = kept_lines(out / "shards")
    raw = set(kept)
    for reject in map(json.loads, (out / "shards/rejects.jsonl").read_text().splitlines()):
        repeats = reject["reason"] in ("duplicate", "near_duplicate") and line_number(reject["detail"]) in kept
        if repeats or reject["reason"] == "short_prompt":  # what repeats a held-out message is in no sample
            raw.add(line_number(reject["where"]))
    held_out = [json.loads(line) for line in (out / "shards/validation.jsonl").read_text().splitlines()]
    messages = [{"label": one["label"], "text": one["turns"][0]["content"]} for one in held_out]
    write(messages, out / "held_out.jsonl")
    curated, of_raw = ([published[number] for number in sorted(some)] for some in (kept, raw))
    return {"raw": of_raw, "repeats": repeating(of_raw), "curated": curated, "selected": curated, "held_out": messages}


def repeating(messages: list[Message]) -> list[Message]:
    """Each message, and for each three more: the n-th of a random order is drawn as often as 1/n tells."""
    random_order = random.Random(0)
    ranked = random_order.sample(messages, len(messages))
    weights = [1 / rank for rank in range(1, len(ranked) + 1)]
    more = random_order.choices(ranked, weights, k=3 * len(ranked))
    return messages + [one if number % 2 else one | {"text": one["text"].upper()} for number, one in enumerate(more)]


# ---- one run ----


def ended(folder: Path) -> dict[str, float] | None:
    """What was measured at the end of a run, None where it did not get there."""
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return next((line for line in lines if line["step"] > 0 and METRICS[0] in line), None)


def measure(
    arm: str, size: int, seed: int, found: dict[str, list[Message]], out: Path, more: list[str]
) -> dict[str, Any]:
    """Draw a sample, prepare it, train on it, and read what was measured at the end."""
    folder, pool, count = out / f"{arm}-{size}-{seed}", found[arm], size
    curate = [f"prepare.curate={AS_IT_IS}"] if arm in ("raw", "repeats") else []
    if arm == "selected":
        count, curate = len(pool) * 3 // 4, [f"prepare.curate.select={{count: {size}, quality: 0}}"]
    settings = [
        *curate, "prepare.validation_fraction=0", f"prepare.tokenizer={out}/shards/tokenizer", f"prepare.out={folder}/shards",
        f"prepare.sources=[{{path: {folder}/sample.jsonl, schema: label}}]", f"run_dir={folder}", f"train.seed={seed}",
        f"prepare.validation_sources=[{{path: {out}/held_out.jsonl, schema: label}}]",
    ]  # fmt: skip
    if ended(folder) is None:
        write(random.Random(seed).sample(pool, count), folder / "sample.jsonl")
        sft_dist("prepare", *settings, "--workers", "1", log=folder / "log.txt")
        sft_dist("train", *settings, *more, log=folder / "log.txt")
    funnel = json.loads((folder / "shards/prepare.json").read_text())["funnel"]
    if funnel["train"] != size:
        raise SystemExit(f"{folder}: {funnel['train']} examples, and {size} are compared")
    return {"arm": arm, "size": size, "seed": seed} | {name: ended(folder)[name] for name in METRICS}


def main() -> None:
    """Run what is not done yet: all arms of a seed before the next seed, so that what is there can be compared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[250, 1000])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--out", type=Path, default=Path("runs/curation"), help="where the runs are kept")
    parser.add_argument("--json", type=Path, required=True, help="where the numbers go")
    parser.add_argument("more", nargs="*", metavar="KEY=VALUE", help="for sft-dist train, as train.max_steps=2")
    given = parser.parse_args()
    found = collections(given.out)
    results = {
        "versions": {
            name: version(name) for name in ("sft-dist", "torch", "deepspeed", "transformers", "scikit-learn")
        },
        "messages": {name: len(messages) for name, messages in found.items()},
        "left_of_repeats": left_of_repeats(found, given.out),
        "runs": [
            measure(arm, size, seed, found, given.out, given.more)
            for seed, size, arm in itertools.product(range(given.seeds), given.sizes, given.arms)
        ],
    }
    given.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
