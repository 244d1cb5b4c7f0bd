"""What is measured is the same number on any number of ranks, also on more ranks than there are rows, and what a plain loop gives."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from sft_dist.answers import answers
from sft_dist.comms import Comms
from sft_dist.data.build import prepare, read_conversations
from sft_dist.data.loader import Loader
from sft_dist.data.mixture import Joined
from sft_dist.data.tokenise import Tokenizer
from sft_dist.evaluate import Evaluator, Sources, held_out_loss, open_shards
from sft_dist.head import scores_of
from sft_dist.labels import LabelTask
from sft_dist.schema import PrepareConfig, SentencePieceTraining, SourceConfig, TrainedTokenizer
from tests.workers import run_workers

QUESTION = "Colour of {text}?\nAnswer:"
COLOURS = ("blue", "green", "red")


def source(path: Path, first: int, count: int) -> SourceConfig:
    lines = (
        f"{COLOURS[n % 3]}\tthe {('sky', 'sea', 'moss', 'rose')[n % 4]} of place {n * n}, seen {n} times"
        for n in range(first, first + count)
    )
    path.write_text("\n".join(lines) + "\n")
    return SourceConfig(path=str(path), schema="label", delimiter="\t", text=1, label=0)


def prepared(folder: Path, seq_len: int, validation: int) -> Path:
    """A label task whose validation records are of two files, twice as many of the one as of the other."""
    held_out = [source(folder / "near.tsv", 200, validation), source(folder / "far.tsv", 400, 2 * validation)]
    config = PrepareConfig(
        sources=[source(folder / "train.tsv", 0, 60)],
        validation_sources=held_out,
        curate={"near_validation": None},
        template=QUESTION,
        tokenizer=TrainedTokenizer(sentencepiece=SentencePieceTraining(vocab_size=330)),
        seq_len=seq_len,
        out=str(folder / "out"),
    )
    prepare(config)
    return folder / "out"


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("many"), 96, 9)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """One row of validation, and one of candidates."""
    return prepared(tmp_path_factory.mktemp("few"), 512, 1)


def oracle(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """A model that often knows the next token: its logits depend on the token, its position and the next one alone."""
    ids = torch.arange(330)
    logits = torch.sin(tokens[..., None] * 0.7 + positions[..., None] * 1.3 + ids * 2.1)
    following = torch.cat([tokens[:, 1:], tokens[:, :1]], dim=1)
    knows = (tokens + 3 * positions + following) % 9 > 0
    return logits.scatter_add(2, following[..., None], 2.5 * knows[..., None].float())


def witness(folder: Path) -> dict[str, float]:
    """The same by a plain loop over single documents, told by the file that each says it is from."""
    shards, sums = open_shards(folder, "validation"), {}
    for row in range(shards.num_rows):
        batch = shards.rows(np.array([row]))
        for number, where in enumerate(shards.origins([row])[row]):
            chosen = batch.documents[0] == number
            ids, targets = torch.tensor(batch.tokens[0, chosen]), batch.targets[0, chosen]
            log_probs = oracle(ids[None], torch.arange(len(ids))[None])[0].double().log_softmax(-1)
            for name in ("", f"/{Path(where.rsplit(':', 1)[0]).stem}"):
                sums.setdefault(name, []).extend(
                    -log_probs[place - 1, ids[place]].item() for place in np.flatnonzero(targets)
                )
    values = {}
    for name, losses in sums.items():
        mean = math.fsum(losses) / len(losses)
        values |= {f"validation_loss{name}": mean, f"validation_perplexity{name}": math.exp(mean)}
    return values


def losses_of_documents(folder: Path) -> list[float]:
    """The mean loss of each document that has targets, by the same plain loop."""
    shards, losses = open_shards(folder, "validation"), []
    for row in range(shards.num_rows):
        batch = shards.rows(np.array([row]))
        for number in range(batch.documents.max() + 1):
            chosen = batch.documents[0] == number
            ids, targets = torch.tensor(batch.tokens[0, chosen]), np.flatnonzero(batch.targets[0, chosen])
            log_probs = oracle(ids[None], torch.arange(len(ids))[None])[0].double().log_softmax(-1)
            if len(targets):
                losses.append(-float(np.mean([log_probs[place - 1, ids[place]].item() for place in targets])))
    return losses


def label_witness(folder: Path) -> tuple[list[int], list[bool]]:
    """(likeliest label, whether the right one would be said) of each held-out record, one conversation at a time."""
    tokenizer = Tokenizer.load(str(folder / "tokenizer"))
    predicted, is_exact = [], []
    for record in read_conversations(folder / "validation.jsonl"):
        prompt = QUESTION.format(text=record.turns[0].content)
        begin, scores = len(tokenizer.encode(prompt)), []
        for label in COLOURS:
            ids = torch.tensor([*tokenizer.encode(f"{prompt} {label}"), tokenizer.eos_id])
            logits = oracle(ids[None], torch.arange(len(ids))[None])[0]
            places = range(begin, len(ids))
            scores.append(sum(logits[place - 1].double().log_softmax(-1)[ids[place]].item() for place in places))
            if label == record.label:
                is_exact.append(all(int(logits[place - 1].argmax()) == int(ids[place]) for place in places))
        predicted.append(int(np.argmax(scores)))
    return predicted, is_exact


def measured(topology, folder):
    comms = Comms(topology, torch.device("cpu"))
    shards, calls = open_shards(folder, "validation"), []

    def forward(tokens, positions, *at):
        calls.append(len(tokens))
        return scores_of(oracle(tokens, positions), *at)

    loader = Loader(Joined([shards]), topology, micro_batch_rows=2, shuffle=False)
    task, sources = LabelTask.open(folder / "labels"), Sources.of([shards], [""])
    made = Evaluator(comms, loader, task, sources=sources).metrics(forward)
    plain = held_out_loss(forward, loader, comms)
    asked = [[3, 4, 5], [6, 7], [8]]
    said = answers(forward, asked, comms, end_ids=[], max_new_tokens=4, context=6)
    return made.values, made.confusion, plain.values, said, len(calls), (shards.num_rows, task.shards.num_rows), made.documents


@pytest.mark.parametrize("name", ["many", "few"])
def test_the_same_numbers_on_one_two_and_three_ranks_and_by_a_plain_loop(name, request):
    folder = request.getfixturevalue(name)
    expected = witness(folder)
    assert set(expected) == {
        f"validation_{kind}{of}" for kind in ("loss", "perplexity") for of in ("", "/near", "/far")
    }
    predicted, is_exact = label_witness(folder)
    records = list(read_conversations(folder / "validation.jsonl"))
    counts = [[0] * 3 for _ in COLOURS]
    for record, label in zip(records, predicted, strict=True):
        counts[COLOURS.index(record.label)][label] += 1
    expected["validation_accuracy"] = sum(counts[place][place] for place in range(3)) / len(records)
    expected["validation_exact_match"] = sum(is_exact) / len(records)
    if name == "many":
        assert all(0 < expected[f"validation_{of}"] < 1 for of in ("exact_match", "accuracy"))
    first, losses = None, losses_of_documents(folder)
    for world_size in (1, 2, 3):
        ranks = run_workers(measured, world_size, folder)
        assert len({rank[4] for rank in ranks}) == 1, "every rank calls the model equally often"
        assert ranks[0][5] == (1, 1) if name == "few" else min(ranks[0][5]) > 6
        for values, matrix, plain, said, *_, documents in ranks:
            assert (documents["count"], documents["mean"]) == (len(losses), pytest.approx(np.mean(losses), rel=1e-5))
            assert documents["counts"] == np.histogram(losses, documents["edges"])[0].tolist()
            assert documents["quantiles"]["0.5"] == pytest.approx(np.quantile(losses, 0.5), rel=0.2)
            assert {key: values[key] for key in expected} == pytest.approx(expected, rel=1e-6)
            assert matrix == {"labels": list(COLOURS), "counts": counts}
            assert plain == {key: values[key] for key in plain}, "what is told by source moves nothing, to the bit"
            assert all(len(ids) <= 4 for ids in said)
            first = first or (values, said, documents)
            assert values == pytest.approx(first[0], rel=1e-12)
            assert (said, documents) == first[1:], "to the bit"


def test_the_sources_of_a_mixture_are_its_sets_and_one_file_alone_is_none(many, few):
    sets = [open_shards(many, "validation"), open_shards(many, "train")]
    found = Sources.of(sets, ["chat", "code"])
    assert found.names == ("chat", "code")
    numbers = [
        set(found.of_documents[a:b].tolist())
        for a, b in zip(found.first_document, found.first_document[1:], strict=False)
    ]
    assert numbers == [{0}] * sets[0].num_rows + [{1}] * sets[1].num_rows
    assert Sources.of([open_shards(few, "train")], [""]) is None


def test_of_very_many_files_none_is_told_apart_and_that_is_said(many, caplog, monkeypatch):
    shards = open_shards(many, "validation")
    monkeypatch.setattr(type(shards), "sources", lambda self: ([f"{n}.txt" for n in range(33)], np.empty(0)))
    assert Sources.of([shards], [""]) is None
    assert [record.getMessage() for record in caplog.records] == [
        f"{shards.folder}: its loss is not told by file: it is of 33 files, and at most 32 are told apart"
    ]
