"""WikiText from the Hugging Face hub, as the text files that `sft-dist prepare` cuts into articles.

python examples/wikitext/fetch.py wikitext-2-raw-v1 data/wikitext-2      # or wikitext-103-raw-v1; needs sft-dist[hub]

The hub has a line of text as a record, and a model that is shown one line at a time learns nothing of what goes on between them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import load_dataset


def main() -> None:
    """Write train.txt, validation.txt and test.txt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "subset", help="wikitext-2-raw-v1, wikitext-2-v1 (rare words are <unk>), wikitext-103-raw-v1, …"
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--dataset", default="Salesforce/wikitext", help="a dataset of the hub, or a folder")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation", "test"):
        path = given.out / f"{split}.txt"
        with path.open("w") as file:
            for record in load_dataset(given.dataset, given.subset, split=split):
                file.write(record["text"] if record["text"].endswith("\n") else record["text"] + "\n")
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
