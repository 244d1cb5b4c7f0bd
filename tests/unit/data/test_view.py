import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sft_dist.data.records import Document, Span
from sft_dist.data.shards import Shards, write
from sft_dist.data.tokenise import tokenise, train_sentencepiece
from sft_dist.data.view import (
    Bar,
    Piece,
    bins,
    histogram,
    overview,
    page,
    quantile,
    render_overview,
    render_row,
    samples,
    shortened,
    statistics,
    survey,
    visible,
)
from sft_dist.errors import DataError
from sft_dist.schema import SentencePieceTraining
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
    shards = written(tmp_path, rows, 10)
    assert statistics(shards, survey(shards)) == {
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


@pytest.mark.parametrize("block_tokens", [1, 70, 1 << 20])
def test_a_survey_is_the_same_however_many_rows_are_read_at_once(tmp_path, monkeypatch, block_tokens):
    monkeypatch.setattr("sft_dist.data.view._BLOCK_TOKENS", block_tokens)
    rows = np.random.default_rng(0).integers(1, 6, (60, 2)).tolist()
    rows[17], rows[31], rows[40] = [3, 7], [9], [2, 8]
    found = survey(written(tmp_path, [documents(row) for row in rows], 10, rows_per_shard=7))
    assert found.lengths.tolist() == np.bincount(np.concatenate(rows), minlength=11).tolist()
    assert found.longest == ((31, 0), (40, 2), (17, 3))
    ones = [(number, sum(row[:place])) for number, row in enumerate(rows) for place, n in enumerate(row) if n == 1]
    assert found.shortest == tuple(ones[:3])


@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.floats(0, 1))
def test_quantiles_of_counts_are_those_of_the_values(lengths, at):
    assert quantile(np.bincount(lengths), at) == pytest.approx(np.quantile(lengths, at))


@given(st.integers(1, 70), st.data())
def test_every_document_is_in_the_bin_that_names_its_length(seq_len, data):
    lengths = data.draw(st.lists(st.integers(1, seq_len), min_size=1))
    found = bins(np.bincount(lengths, minlength=seq_len + 1))
    assert found[0].count
    assert found[-1].count
    for entry in found:
        low, _, high = entry.label.partition("–")
        assert int(low) == entry.low
        assert entry.count == sum(int(low) <= length <= int(high or low) for length in lengths)
    assert sum(entry.count for entry in found) == len(lengths)


def test_a_split_without_documents_has_no_bins():
    assert bins(np.zeros(9, np.int64)) == []


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=30).filter(any))
def test_bars_stand_inside_the_drawing_and_are_as_tall_as_their_counts(counts):
    chart = histogram([Bar(str(n), count, n) for n, count in enumerate(counts)])
    tallest = max(height for *_, height, _ in chart.bars)
    assert 3 <= len(chart.ticks) <= 5 or max(counts) == 1
    assert chart.ticks[-1][1] >= max(counts)
    right = chart.left
    for x, y, width, height, entry in chart.bars:
        assert right <= x
        assert 0 < y == pytest.approx(chart.bottom - height, abs=0.02)
        assert (right := x + width) <= chart.width
        assert (height == 0) == (entry.count == 0)
        assert height == pytest.approx(tallest * entry.count / max(counts), abs=1.6)


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


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text, 日本 é 😀", "plain text, 日本 é 😀"),
        ("\x1b]0;title\x07\x7f\x85", "␛]0;title␇␡⟨U+0085⟩"),
        ("a\u202eb\u200b\ufeff\u2028\ue000", "a⟨U+202E⟩b⟨U+200B⟩⟨U+FEFF⟩⟨U+2028⟩⟨U+E000⟩"),
        ("line\n\ttab\u00a0\u3000👩\u200d👧", "line\n\ttab\u00a0\u3000👩\u200d👧"),
        ("\ud800", "⟨U+D800⟩"),
    ],
)
def test_what_a_terminal_would_obey_or_hide_is_shown_as_a_sign(text, shown):
    assert visible(text) == shown


PIECES = st.lists(st.builds(Piece, st.text("abc", max_size=60), st.booleans()), max_size=6)


@given(PIECES, st.integers(0, 50), st.integers(1, 50))
def test_a_shortened_sample_keeps_both_ends_their_flags_and_the_count_between(pieces, head, tail):
    def characters(found):
        return [(character, piece.is_target) for piece in found for character in piece.text]

    whole, found = characters(pieces), shortened(pieces, head, tail)
    if len(whole) - head - tail < 40:
        assert found == pieces
        return
    middle = next(place for place, piece in enumerate(found) if "…" in piece.text)
    assert found[middle].text == f" […{len(whole) - head - tail} characters…] "
    assert characters(found[:middle]) == whole[:head]
    assert characters(found[middle + 1 :]) == whole[-tail:]


EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)> \"'&amp;{{ 7*7 }} \x1b[31m \u202e"


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A preparation in small, with a text, a source, a reject and a setting that try to be markup."""
    out = tmp_path / "out"
    for split in ("validation", "train"):
        rows = [
            [asked(tokenizer, f"hello {EVIL}", f" world {n} of {split}"), asked(tokenizer, "message", " wide")]
            for n in range(8)
        ]
        for row in rows[:2]:
            row += [asked(tokenizer, "isn't", " it")] * 20
        seq_len = max(sum(len(document.ids) for document in row) for row in rows) + 1
        about = ABOUT | {"eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
        write(out / split, rows, seq_len=seq_len, rows_per_shard=3, vocab_size=tokenizer.vocab_size, **about)
    tokenizer.save(out / "tokenizer", chat_template=None, model_max_length=64)
    drops = [("empty_response", n) for n in range(5)] + [("duplicate", n) for n in range(5, 7)]
    rejects = [{"reason": reason, "where": f"f:{n}", "detail": f"{EVIL} number {n}"} for reason, n in drops]
    (out / "rejects.jsonl").write_text("".join(json.dumps(reject) + "\n" for reject in rejects))
    about = {
        "funnel": {
            "read": 1234, "train": 1019, "validation": 208, "drops": {"duplicate": 2, "empty_response": 5},
            "mended": {"control_characters": 3}, "long": {},
        },
        "settings": {"prepare": {"template": f"Q: {EVIL}", "seq_len": 64, "curate": {"languages": ["<b>"], "select": {}}}},
        "sources": {f"data/{EVIL}": "0123abcd"},
    }  # fmt: skip
    (out / "prepare.json").write_text(json.dumps(about))
    return out


class Reader(HTMLParser):
    """The tags, the attributes, and the text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words, self.marked, self.open = [], [], [], [], []
        self.feed(text)
        self.close()
        self.text = "".join(self.words)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attributes]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_data(self, text):
        if self.open and self.open[-1] == "mark":
            self.marked.append(text)
        if "style" not in self.open:
            self.words.append(text)


def test_the_page_is_well_formed_and_shows_everything_as_text(folder, tokenizer):
    text = page(overview(folder))
    reader = Reader(text)
    assert reader.open == []  # every tag that opens closes, in order
    assert not {"script", "img", "b", "link", "iframe"} & set(reader.tags)
    assert not [name for name in reader.attributes if name.startswith("on") or name in ("src", "href")]
    assert not re.search(r"https?://|@import|url\(", text)
    assert "default-src 'none'" in text
    for part in ("hello {}", "Q: {}", "data/{}", "{} number 5"):
        assert part.format(visible(EVIL)) in reader.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", text)
    for part in (
        "− duplicate2",
        "read1,234",
        "mended: 3 control characters",
        "0123abcd",
        "prepare.seq_len64",
        "sft-dist 0.",
    ):
        assert part in reader.text
    assert 'prepare.curate.languages["<b>"]' in reader.text
    assert " world 7 of train</s>" in reader.marked or " world 6 of train</s>" in reader.marked
    assert not [marked for marked in reader.marked if "hello" in marked]
    assert reader.tags.count("svg") == 2
    assert "Samples of train by length" in reader.text


def test_the_page_shows_the_row_asked_for_first_and_counts_what_it_leaves_out(folder, tokenizer):
    found = overview(folder, row=1)
    train, validation = found.splits
    assert [split.name for split in found.splits] == ["train", "validation"]
    assert train.rows[0].number == 1
    assert [row.number for row in validation.rows] == [row.number for row in overview(folder).splits[1].rows]
    assert (len(train.rows[0].samples), train.rows[0].omitted) == (12, 10)
    assert "… and 10 more samples" in Reader(page(found)).text
    whole = [(split, row) for split in found.splits for row in split.rows if not row.omitted]
    assert whole
    for split, row in whole:
        assert sum(sample.tokens for sample in row.samples) + row.padding == split.numbers["tokens a row"]


def test_rows_are_drawn_by_the_seed(folder):
    drawn = {tuple(row.number for row in overview(folder, seed=seed).splits[0].rows) for seed in range(6)}
    assert len(drawn) > 1
    assert all(len(set(numbers)) == 3 for numbers in drawn)


def test_samples_know_their_place_and_their_counts(tmp_path, tokenizer):
    made = [asked(tokenizer, "hello world", " big"), asked(tokenizer, "message", " wide")]
    found = samples(written(tmp_path, [made], 64, tokenizer), tokenizer, 0)
    assert [(sample.number, sample.start, sample.tokens, sample.targets) for sample in found] == [
        (0, 0, len(made[0].ids), made[0].num_targets),
        (1, len(made[0].ids), len(made[1].ids), made[1].num_targets),
    ]
    assert found[1].pieces == (Piece("message", False), Piece(" wide</s>", True))


def printed(found, width=200):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(render_overview(found))
    return console.export_text()


def test_a_terminal_shows_the_funnel_the_lengths_examples_and_rejects(folder):
    text = printed(overview(folder))
    for pattern in (
        r"read +1,234  █{36}\n", r"− empty_response +5  ▏\n *− duplicate +2  ▏\n", r"train +1,019  █+", r"mended: 3 control",
        r"Samples of train by length in tokens\n +\d", r"Longest samples of train\n  row [01], sample 0: \d+ tokens, \d+ of",
        r"Shortest samples of train\n  row 0, sample", r"message⟪ wide</s>⟫", r"f:2: .* number 2\n", r"all: .*rejects.jsonl",
    ):  # fmt: skip
        assert re.search(pattern, text), (pattern, text)
    assert "number 3\n" not in text  # three of a reason
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", text)


def test_a_lone_split_has_no_funnel_and_without_a_tokenizer_nothing_is_decoded(tmp_path):
    written(tmp_path, [documents([3, 4])], 8)
    found = overview(tmp_path / "train")
    assert (found.about, found.funnel, found.rejects, found.splits[0].rows) == ({}, [], {}, ())
    text = Reader(page(found)).text
    assert "nothing is decoded" in text
    assert "Records" not in text
    assert "Longest" not in printed(found)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"funnel": {}}', '{"settings": {"prepare": {}}, "sources": {}, "funnel": 3}']
)
def test_a_damaged_prepare_json_is_named(folder, content):
    (folder / "prepare.json").write_text(content)
    with pytest.raises(
        DataError, match=r"prepare.json: damaged; prepare again with `sft-dist prepare RUN.yaml --fresh`"
    ):
        overview(folder)


@pytest.mark.parametrize(
    "line", ["{", "3", '{"reason": "x", "where": "f:1"}', '{"reason": [], "where": "", "detail": ""}']
)
def test_a_damaged_reject_is_named(folder, line):
    with (folder / "rejects.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=r"rejects.jsonl:8: not a reject .*; prepare again with"):
        overview(folder)


def test_a_folder_without_shards_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no shards there; run `sft-dist prepare RUN.yaml`, or name its prepare.out"):
        overview(tmp_path)
