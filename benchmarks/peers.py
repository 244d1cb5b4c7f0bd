"""One other tool's preparation of prompt–response pairs, run by a Python that has it (see prepare.py).

python benchmarks/peers.py RECIPE PAIRS.jsonl TOKENIZER OUT    RECIPE: group_texts, bfd, bfd_split
python benchmarks/peers.py count OUT

Each does what its documentation shows, in one process, with default batches: a batched tokenising map over the template's
text and the end token, packing, `save_to_disk`. None cleans, removes repeats, or marks which tokens are the response.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import chain
from typing import Any

BEFORE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n"
)
BETWEEN = "\n\n### Response:\n"
SEQ_LEN = 1024

Batch = dict[str, list[Any]]


def tokenised(pairs: str, tokenizer_folder: str, keep: list[str]) -> Any:
    """The documents as token ids: a dataset with the columns `keep` of the tokenizer's."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    assert tokenizer.is_fast

    def tokenise(batch: Batch) -> Batch:
        both = zip(batch["prompt"], batch["response"], strict=True)
        texts = [BEFORE + prompt + BETWEEN + response + tokenizer.eos_token for prompt, response in both]
        made = tokenizer(texts)
        return {name: made[name] for name in keep}

    dataset = load_dataset("json", data_files=pairs, split="train")
    return dataset.map(tokenise, batched=True, remove_columns=dataset.column_names)


def group_texts(batch: Batch) -> Batch:
    """The recipe of transformers' `run_clm.py`, word for word: one stream a batch, cut; the last piece is dropped."""
    concatenated = {name: list(chain(*batch[name])) for name in batch}
    total_length = len(concatenated[next(iter(batch))])
    total_length = (total_length // SEQ_LEN) * SEQ_LEN
    result = {
        name: [tokens[i : i + SEQ_LEN] for i in range(0, total_length, SEQ_LEN)]
        for name, tokens in concatenated.items()
    }
    result["labels"] = result["input_ids"].copy()
    return result


def prepare(recipe: str, pairs: str, tokenizer_folder: str, out: str) -> None:
    """Pairs -> packed rows on disk; prints the CPU seconds that imports took."""
    import datasets
    import transformers

    if recipe == "group_texts":
        imported = time.process_time()
        documents = tokenised(pairs, tokenizer_folder, ["input_ids", "attention_mask"])
        rows = documents.map(group_texts, batched=True)
    else:
        from trl.data_utils import pack_dataset

        imported = time.process_time()
        rows = pack_dataset(tokenised(pairs, tokenizer_folder, ["input_ids"]), SEQ_LEN, strategy=recipe)
    rows.save_to_disk(out)
    assert datasets
    assert transformers
    print(json.dumps({"import_cpu_seconds": imported}))


def count(out: str) -> None:
    """Rows and tokens of what `prepare` made, and the versions of what made it."""
    from importlib.metadata import version

    import numpy as np
    from datasets import load_from_disk

    rows = load_from_disk(out).with_format("arrow")
    lengths = [np.diff(np.asarray(column.offsets)) for column in rows[:]["input_ids"].chunks]
    names = ("numpy", "tokenizers", "datasets", "trl", "transformers", "torch")
    versions = {"python": sys.version.split()[0], **{name: version(name) for name in names}}
    print(json.dumps({"rows": len(rows), "tokens": int(sum(map(np.sum, lengths))), "versions": versions}))


if __name__ == "__main__":
    if sys.argv[1] == "count":
        count(sys.argv[2])
    else:
        prepare(*sys.argv[1:])
