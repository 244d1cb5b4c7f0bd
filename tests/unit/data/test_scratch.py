import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_dist.data.records import Conversation, Document, Drop, Turn
from sft_dist.data.scratch import (
    NO_TEXT,
    TRAIN,
    VALIDATION,
    DocumentReader,
    SliceFolder,
    Slices,
    SliceWriter,
    as_json,
    from_json,
)


def document_of(ids, targets=None):
    flags = [False] + [True] * (len(ids) - 1) if targets is None else targets
    return Document(np.array(ids, np.uint32), np.array(flags, bool), "f:1")


def digests_of(number):
    return tuple((number + n).to_bytes(16, "little") for n in range(3))


def written(folder, records=(), dtype=np.uint16, prefix="f:", **about):
    """A slice of records, each (line, documents, further arguments)."""
    writer = SliceWriter(folder, dtype)
    for line, documents, more in records:
        writer.keep(documents, digests_of(line), where=f"{prefix}{line}", **{"split": TRAIN, **more})
    writer.publish(**about)
    return SliceFolder(folder, np.dtype(dtype))


EXTRA = {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": [1, None, "é"]}}}]}
TURNS = st.builds(
    Turn, st.sampled_from(["user", "assistant", "system"]), st.text(), st.booleans(), st.sampled_from([None, EXTRA])
)
CONVERSATIONS = st.builds(
    Conversation,
    st.lists(TURNS, min_size=1, max_size=3).map(tuple),
    st.text(),
    st.none() | st.text(),
    st.sampled_from([None, [{"type": "function", "function": {"name": "f"}}]]),
)


@given(CONVERSATIONS)
def test_a_conversation_is_read_back_from_one_line(conversation):
    line = as_json(conversation)
    assert "\n" not in line
    assert from_json(line) == from_json(line.encode() + b"\n") == conversation


FLAGS = st.lists(st.booleans(), min_size=1, max_size=20)


@given(
    st.lists(st.tuples(st.lists(FLAGS, max_size=3), st.none() | st.text(max_size=5))),
    st.sampled_from([np.uint16, np.uint32]),
)
@settings(deadline=None, max_examples=40)
def test_records_documents_and_texts_are_read_back(tmp_path_factory, records, dtype):
    folder = tmp_path_factory.mktemp("slices") / "00000"
    top = np.iinfo(dtype).max
    made = [
        [document_of([top - at for at in range(len(flags))], flags) for flags in documents] for documents, _ in records
    ]
    texts = [text and text.replace("\n", " ") for _, text in records]
    part = written(
        folder,
        [(n, documents, {"text": text, "split": n % 2, "label": text}) for n, (documents, text) in enumerate(zip(made, texts, strict=True))],
        dtype,
    )  # fmt: skip
    found = part.records
    assert found["line"].tolist() == list(range(len(made)))
    assert found["split"].tolist() == [n % 2 for n in range(len(made))]
    assert [row.tobytes() for row in found["content"]] == [digests_of(n)[0] for n in range(len(made))]
    assert [row.tobytes() for row in found["prompt"]] == [digests_of(n)[1] for n in range(len(made))]
    assert found["documents"].tolist() == [len(documents) for documents in made]
    assert found["targets"].tolist() == [sum(document.num_targets for document in documents) for documents in made]
    names = [part.about["labels"][place] if place >= 0 else None for place in found["label"]]
    assert names == texts
    has_text = found["text_at"] != NO_TEXT
    assert has_text.tolist() == [text is not None for text in texts]
    lines = [text.encode() + b"\n" for text in texts if text is not None]
    assert list(part.texts(found["text_at"][has_text])) == lines
    reader = DocumentReader(Slices([folder], dtype))
    for document, (at, tokens) in zip([d for group in made for d in group], part.documents.tolist(), strict=True):
        again = reader.read(0, at, tokens, 1, 0, tokens)
        assert (again.ids.tolist(), again.targets.tolist()) == (document.ids.tolist(), document.targets.tolist())
    reader.close()


@given(FLAGS, st.data())
@settings(deadline=None, max_examples=30)
def test_a_piece_of_a_document_begins_with_context(tmp_path_factory, flags, data):
    folder = tmp_path_factory.mktemp("slices") / "00000"
    part = written(folder, [(1, [document_of([7, 8]), document_of(range(len(flags)), flags)], {})])
    ((_, _), (at, tokens)) = part.documents.tolist()
    count = data.draw(st.integers(1, tokens))
    start = data.draw(st.integers(0, tokens - count))
    reader = DocumentReader(Slices([folder], np.uint16))
    piece = reader.read(0, at, tokens, 1, start, count)
    reader.close()
    wanted = flags[start : start + count]
    assert piece.ids.tolist() == list(range(start, start + count))
    assert piece.targets.tolist() == (wanted if count == tokens else [False, *wanted[1:]])


def test_nothing_is_there_until_it_is_published_and_a_killed_try_is_written_over(tmp_path):
    writer = SliceWriter(tmp_path / "00007", np.uint16)
    writer.keep([document_of([1, 2])], digests_of(1), split=TRAIN, where="f:1")
    assert [path for path in tmp_path.iterdir() if not path.name.startswith(".")] == []
    part = written(tmp_path / "00007", [(2, [document_of([3, 4, 5])], {})])
    assert [path.name for path in tmp_path.iterdir()] == ["00007"]
    assert part.records["line"].tolist() == [2]
    assert (part.folder / "documents.bin").stat().st_size == 3 * 2 + 1


def test_drops_are_counted_and_told_in_order(tmp_path):
    writer = SliceWriter(tmp_path / "0", np.uint16)
    writer.counts["read"] += 3
    for line in (1, 2):
        writer.drop(Drop("empty", f"f:{line}", "“nothing”"))
    writer.publish(mended={"unicode": 2})
    part = SliceFolder(tmp_path / "0", np.dtype(np.uint16))
    assert part.about == {
        "counts": {"read": 3}, "drops": {"empty": 2}, "labels": [], "prefix": "", "mended": {"unicode": 2},
    }  # fmt: skip
    assert (tmp_path / "0" / "rejects.jsonl").read_text().splitlines() == [
        f'{{"reason": "empty", "where": "f:{line}", "detail": "“nothing”"}}' for line in (1, 2)
    ]


@pytest.mark.parametrize("prefix", ["a/b.jsonl:", "c:d.parquet:", "hf:owner/name/train:#", "list.json:#"])
def test_where_a_record_stands_is_put_together_again(tmp_path, prefix):
    assert written(tmp_path / "0", [(12, [document_of([1, 2])], {})], prefix=prefix).where(12) == f"{prefix}12"


def test_records_are_numbered_through_the_slices_and_empty_ones_have_none(tmp_path):
    sizes = [0, 2, 0, 3, 0]
    for number, size in enumerate(sizes):
        more = [
            {"text": f"{number}.{line}", "split": VALIDATION if line == 2 else TRAIN} for line in range(1, size + 1)
        ]
        records = [(line, [document_of([1, 2])], each) for line, each in enumerate(more, 1)]
        written(tmp_path / str(number), records, prefix=f"{number}.txt:")
    slices = Slices([tmp_path / str(number) for number in range(5)], np.uint16)
    assert len(slices) == 5
    wheres = ["1.txt:1", "1.txt:2", "3.txt:1", "3.txt:2", "3.txt:3"]
    assert [slices.where(number) for number in range(5)] == wheres
    assert [int(slices.record(number)["line"]) for number in range(5)] == [1, 2, 1, 2, 3]
    assert [base for _, base, _ in slices.each()] == [0, 0, 2, 2, 5]
    chosen = np.array([False, True, True, False, True])
    assert list(slices.conversations(chosen)) == [(1, b"1.2\n"), (2, b"3.1\n"), (4, b"3.3\n")]
    assert len(Slices([], np.uint16)) == 0


def test_records_whose_text_was_not_kept_are_passed_over(tmp_path):
    written(tmp_path / "0", [(1, [document_of([1, 2])], {}), (2, [document_of([1, 2])], {"text": "two"})])
    assert list(Slices([tmp_path / "0"], np.uint16).conversations(np.ones(2, bool))) == [(1, b"two\n")]


def test_documents_of_more_slices_than_files_are_open(tmp_path):
    count = 70
    for number in range(count):
        written(tmp_path / str(number), [(1, [document_of([number, number + 1])], {})])
    reader = DocumentReader(Slices([tmp_path / str(number) for number in range(count)], np.uint16))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        for number in range(count):
            assert reader.read(number, 0, 2, 1, 0, 2).ids.tolist() == [number, number + 1]
    assert len(os.listdir("/proc/self/fd")) - before <= 64
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before
