import numpy as np
import pytest

from sft_dist.config import SentencePieceTraining
from sft_dist.data.records import Document, Span
from sft_dist.data.shards import Shards, write
from sft_dist.data.tokenise import tokenise, train_sentencepiece
from sft_dist.data.view import render_row, statistics
from sft_dist.errors import DataError
from tests.unit.data.test_shards import ABOUT, documents

TEXTS = [f"message {n} says hello to the {word} world, isn't it 😀" for n in range(150) for word in ("big", "wide")]


@pytest.fixture(scope="module")
def tokenizer():
    return train_sentencepiece(TEXTS, SentencePieceTraining(vocab_size=400))


def written(folder, rows, seq_len, tokenizer=None, rows_per_shard=2):
    about = dict(ABOUT)
    if tokenizer:
        about |= {"eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    vocab_size = tokenizer.vocab_size if tokenizer else 50
    write(folder / "train", rows, seq_len=seq_len, rows_per_shard=rows_per_shard, vocab_size=vocab_size, **about)
    return Shards.open(folder / "train")


def asked(tokenizer, question, answer):
    spans = [Span(question, False), Span(answer, True), Span("</s>", True, is_control=True)]
    document = tokenise(spans, tokenizer, "f:1")
    assert isinstance(document, Document)
    return document


def test_statistics_count_what_the_rows_hold(tmp_path):
    lengths = [[5, 3], [8], [2, 2, 2]]
    rows = [documents(row, seed=seed) for seed, row in enumerate(lengths)]
    targets = sum(document.num_targets for row in rows for document in row)
    assert statistics(written(tmp_path, rows, 10)) == {
        "rows": 3,
        "tokens a row": 10,
        "samples": 6,
        "samples a row": 2.0,
        "tokens": 22,
        "fill": 22 / 30,
        "target tokens": targets,
        "target share": targets / 22,
        "sample tokens, shortest": 2,
        "sample tokens, median": 2,
        "sample tokens, 95 %": 7,
        "sample tokens, longest": 8,
    }


def test_statistics_read_rows_a_thousand_at_a_time(tmp_path):
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 5, (2100, 2))
    values = statistics(written(tmp_path, [documents(row) for row in lengths.tolist()], 10, rows_per_shard=700))
    assert values["samples"] == 4200
    assert values["sample tokens, median"] == int(np.quantile(lengths, 0.5))
    assert (values["sample tokens, shortest"], values["sample tokens, longest"]) == (1, 4)


def test_a_row_shows_samples_targets_and_padding_without_colour(tmp_path, tokenizer):
    first, second = asked(tokenizer, "hello world", " big"), asked(tokenizer, "message", " wide")
    shards = written(tmp_path, [[first, second]], len(first.ids) + len(second.ids) + 3, tokenizer)
    assert render_row(shards, tokenizer, 0).plain.splitlines() == [
        "row 0: target  context  padding  boundary  ",
        "⟦sample 0⟧ hello world⟪ big</s>⟫",
        "⟦sample 1⟧ message⟪ wide</s>⟫",
        "⟦padding: 3 tokens⟧",
    ]


def test_a_full_row_has_no_padding_and_rows_of_later_shards_are_found(tmp_path, tokenizer):
    rows = [[asked(tokenizer, "hello", f" {word}")] for word in ("world", "big", "wide")]
    shards = written(tmp_path, rows, max(len(row[0].ids) for row in rows), tokenizer)
    assert render_row(shards, tokenizer, 2).plain.startswith("row 2: ")
    assert "hello⟪ wide</s>⟫" in render_row(shards, tokenizer, 2).plain
    longest = max(range(3), key=lambda number: len(rows[number][0].ids))
    assert "padding:" not in render_row(shards, tokenizer, longest).plain


def test_several_answers_of_one_sample_are_each_marked(tmp_path, tokenizer):
    spans = [
        Span("hello", False), Span(" world", True), Span("</s>", True, is_control=True),
        Span("message", False), Span(" says", True), Span("</s>", True, is_control=True),
    ]  # fmt: skip
    document = tokenise(spans, tokenizer, "f:1")
    shards = written(tmp_path, [[document]], len(document.ids), tokenizer)
    assert render_row(shards, tokenizer, 0).plain.endswith("⟦sample 0⟧ hello⟪ world</s>⟫message⟪ says</s>⟫")


def test_a_character_of_several_tokens_is_shown_whole(tmp_path, tokenizer):
    document = asked(tokenizer, "日", " 本 é")
    assert len(document.ids) > 8
    shards = written(tmp_path, [[document]], len(document.ids), tokenizer)
    assert render_row(shards, tokenizer, 0).plain.endswith("⟦sample 0⟧ 日⟪ 本 é</s>⟫")


def test_text_that_looks_like_markup_stays_text(tmp_path, tokenizer):
    document = asked(tokenizer, "[red]hello[/red]", " world")
    shards = written(tmp_path, [[document]], len(document.ids), tokenizer)
    assert "[red]hello[/red]⟪ world</s>⟫" in render_row(shards, tokenizer, 0).plain


def test_colours_say_the_same_as_the_markers(tmp_path, tokenizer):
    document = asked(tokenizer, "hello", " world")
    text = render_row(written(tmp_path, [[document]], len(document.ids) + 1, tokenizer), tokenizer, 0)
    styled = {text.plain[span.start : span.end].strip(): span.style for span in text.spans}
    assert styled["⟪ world</s>⟫"] == styled["target"] != styled["context"]
    assert styled["hello"] == styled["context"]
    assert styled["⟦sample 0⟧"] == styled["boundary"]
    assert styled["⟦padding: 1 tokens⟧"] == styled["padding"]


@pytest.mark.parametrize("number", [-1, 2, 1000])
def test_a_row_that_does_not_exist_is_named(tmp_path, tokenizer, number):
    shards = written(tmp_path, [documents([3]), documents([4])], 8)
    with pytest.raises(DataError, match=rf"--row {number}: there are rows 0 to 1 in .*train; choose one of these"):
        render_row(shards, tokenizer, number)
