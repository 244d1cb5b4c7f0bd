"""A mixture on real ranks: its losses by set are a by-product that adds up, and a run on it goes on from anywhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from sft_dist.config import load
from sft_dist.data.records import Document
from sft_dist.data.shards import write
from sft_dist.loss import sums_by_set, target_log_probs
from tests.dist import tiny
from tests.invariants.runs import curve
from tests.workers import run_workers

SEQ_LEN = tiny.SEQ_LEN


class OfSets(tiny.MicroBatch):
    """A micro-batch of the tiny rows that says which set each row is from."""

    def __init__(self, micro_batch):
        super().__init__(**vars(micro_batch))
        self.sets = (self.first_ordinal + torch.arange(len(self.tokens))) % 3 % 2


def applied(topology, num_sets):
    made, comms = tiny.engine(topology, 2, micro_batch_rows=2)
    made.num_sets = num_sets
    done = []
    for step in range(3):
        mine = [OfSets(batch) for batch in tiny.micro_batches(step, 2)][topology.rank :: topology.world_size]
        did = made.learn(mine, denominator=int(tiny.rows(step).targets.sum()), learning_rate=1e-3)
        sums = comms.sum_tensor(did.set_sums.clone()).tolist() if num_sets > 1 else None
        done.append((did.loss_sum, did.grad_norm, comms.sum_tensor(torch.tensor(did.loss_sum, dtype=torch.float64)).item(), sums))
    return done


def test_the_losses_by_set_add_up_and_move_nothing():
    plain, mixed = run_workers(applied, 2, 1), run_workers(applied, 2, 2)
    assert [[one[:3] for one in rank] for rank in plain] == [[one[:3] for one in rank] for rank in mixed], "to the bit"
    model = tiny.model().train()
    for step, (_, _, total, (losses, counts)) in enumerate(mixed[0]):
        assert sum(losses) == pytest.approx(total, rel=1e-6)
        assert sum(counts) == int(tiny.rows(step).targets[:, 1:].sum())
    rows = OfSets(tiny.rows(0))
    with torch.no_grad():
        logits = model(input_ids=rows.tokens, position_ids=rows.positions, use_cache=False).logits
    for number in range(2):
        mine = rows.sets == number
        alone = -target_log_probs(logits[mine], rows.tokens[mine], rows.targets[mine]).sum().item()
        assert mixed[0][0][3][0][number] == pytest.approx(alone, rel=1e-5)


def test_sums_by_set_of_rows_without_targets_are_zero():
    places = torch.full((64,), -1)
    assert sums_by_set(torch.zeros(64), places, torch.zeros(64), 2).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def prepared(folder: Path, number: int, rows: int) -> Path:
    """A set as `prepare` leaves it, as far as training reads it: shards of two splits, a tokenizer, prompts, settings."""
    import json

    from transformers import PreTrainedTokenizerFast

    from sft_dist.data.tokenise import Tokenizer

    folder.mkdir()
    tokenizer = folder / "tokenizer"
    PreTrainedTokenizerFast(tokenizer_object=_words(), eos_token="<e>", pad_token="<e>").save_pretrained(tokenizer)
    loaded = Tokenizer.load(str(tokenizer))
    draw = np.random.default_rng(number)
    about = {"vocab_size": tiny.VOCAB, "eos_id": loaded.eos_id, "pad_id": loaded.eos_id, "template": "p"}
    for split, count in (("train", rows), ("validation", 3)):
        made = []
        for at in range(count):
            ids = draw.integers(1 + 30 * number, 31 + 30 * number, 8 + at % 5).astype(np.uint32)
            made.append([Document(ids, np.arange(len(ids)) > 2, f"{number}:{at}")])
        write(folder / split, made, seq_len=SEQ_LEN, rows_per_shard=4, tokenizer=loaded.fingerprint, **about)
    (folder / "validation.jsonl").write_text("")
    (folder / "prepare.json").write_text(json.dumps({"settings": {"prepare": {"template": "plain"}}}))
    return folder


def _words():
    import tokenizers

    vocabulary = {"<e>": 0, **{f"w{number}": number for number in range(1, tiny.VOCAB)}}
    return tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w1"))


def run_file(folder: Path, **train) -> Path:
    sets = [prepared(folder / name, number, rows) for number, (name, rows) in enumerate((("chat", 11), ("code", 30)))]
    config = {
        "run_dir": str(folder / "run"),
        "mixture": [{"shards": str(path), "weight": weight} for path, weight in zip(sets, (3.0, 1.0), strict=True)],
        "model": {"config": tiny.MODELS["mini"]},
        "train": {"global_batch_rows": 8, "micro_batch_rows": 2, "max_steps": 6, "precision": "fp32", **train},
        "evaluate": {"samples": 0},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_a_run_on_two_sets_tells_the_loss_and_the_epochs_of_each(tmp_path):
    from tests.invariants.runs import run

    path = run_file(tmp_path)
    run_workers(run, 2, path)
    lines = [line for line in curve(tmp_path / "run") if "loss" in line]
    assert len(lines) == 6
    for line in lines:
        low, high = sorted((line["loss/chat"], line["loss/code"]))
        assert low <= line["loss"] <= high
    last = lines[-1]
    assert last["epochs/chat"] * 11 + last["epochs/code"] * 30 == pytest.approx(48)
    assert last["epochs/chat"] > 2 * last["epochs/code"]
    (measured,) = [line for line in curve(tmp_path / "run") if line["step"] == 6 and "validation_loss" in line]
    low, high = sorted((measured["validation_loss/chat"], measured["validation_loss/code"]))
    assert low < measured["validation_loss"] < high
    assert measured["validation_perplexity/chat"] == pytest.approx(np.exp(measured["validation_loss/chat"]))

    # stopped after three steps, and gone on with at another world size: the same losses
    other = [f"run_dir={tmp_path / 'other'}", "train.schedule=constant"]
    run_workers(run, 2, path, [f"run_dir={tmp_path / 'whole'}", "train.schedule=constant"])
    run_workers(run, 2, path, [*other, "train.max_steps=3"])
    run_workers(run, 1, path, [*other, "train.warmup_ratio=0.03"])
    for name in ("loss", "loss/chat", "loss/code", "epochs/chat"):
        ours, theirs = ([line[name] for line in curve(tmp_path / n) if "loss" in line] for n in ("other", "whole"))
        assert ours == pytest.approx(theirs, abs=1e-5), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "train.order={block_rows: 4}",
            "was made with order = None, this run has {'block_rows': 4, 'window_blocks': 64}",
        ),
        ("mixture.0.weight", "was made with mixture"),
    ],
)
def test_another_order_or_weight_is_another_run(tmp_path, change, message):
    from launch.parts import identity
    from launch.settle import Plan
    from sft_dist.errors import CheckpointError
    from sft_dist.identity import require_same
    from sft_dist.model import model_config
    from sft_dist.topology import Life, Topology

    path = run_file(tmp_path)

    def of(overrides=()):
        config = load(path, overrides)
        made = model_config(config.model, vocab_size=tiny.VOCAB, seq_len=SEQ_LEN, eos_id=0)
        return identity(Plan.of(config, Topology(), Life("test")), made)

    before = of()
    if change.startswith("mixture"):
        path.write_text(path.read_text().replace("weight: 3.0", "weight: 2.0"))
    after = of([change] if "=" in change else [])
    with pytest.raises(CheckpointError, match=message):
        require_same(path, before, after, ())
