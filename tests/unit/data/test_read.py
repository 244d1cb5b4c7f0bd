import json

import pytest

from sft_dist.config import SourceConfig
from sft_dist.data.read import files, read
from sft_dist.data.records import Conversation, Drop, Turn
from sft_dist.errors import DataError


def source(path, schema, **more):
    return SourceConfig(path=str(path), schema=schema, **more)


def one(tmp_path, record, schema, **more):
    """What becomes of a single JSON record."""
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps(record) + "\n")
    (item,) = read(source(path, schema, **more))
    return item


def pairs(items):
    return [(item.turns[0].content, item.turns[-1].content) for item in items if isinstance(item, Conversation)]


def test_labelled_lines_between_tabs_keep_their_quotes(tmp_path):
    path = tmp_path / "SMSSpamCollection"
    path.write_bytes('ham\tsay "hi\r\nspam\tWIN "£1"\r\n'.encode())
    items = list(read(source(path, "label", delimiter="\t", text=1, label=0)))
    assert pairs(items) == [('say "hi', "ham"), ('WIN "£1"', "spam")]
    assert [item.label for item in items] == ["ham", "spam"]
    assert items[1].where == f"{path}:2"
    assert items[1].turns[1].is_target


def test_csv_has_a_header_quoted_fields_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbfprompt,response\n"a, ""b""\nc",d\n\ne,f\n')
    assert pairs(read(source(path, "prompt_response"))) == [('a, "b"\nc', "d"), ("e", "f")]


def test_tsv_and_json_lists(tmp_path):
    (tmp_path / "a.tsv").write_text("q\ta\nwhat\tthis\n")
    assert pairs(read(source(tmp_path / "a.tsv", "prompt_response", prompt="q", response="a"))) == [("what", "this")]
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": "Add", "input": "1 1", "output": "2"}]))
    assert pairs(read(source(tmp_path / "a.json", "alpaca"))) == [("Add\n\n1 1", "2")]
    (tmp_path / "b.json").write_text(json.dumps([{"instruction": "Hi", "output": "Ho"}]))
    assert pairs(read(source(tmp_path / "b.json", "alpaca"))) == [("Hi", "Ho")]


def test_self_instruct_has_an_instance_a_record(tmp_path):
    path = tmp_path / "a.jsonl"
    instances = [{"input": "", "output": "x"}, {"input": "b", "output": "y"}]
    path.write_text(json.dumps({"instruction": "Do", "instances": instances}))
    assert pairs(read(source(path, "self_instruct"))) == [("Do", "x"), ("Do\n\nb", "y")]


def test_messages_with_parts_and_weights(tmp_path):
    item = one(
        tmp_path,
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "value": "hi"}, {"type": "text", "text": "!"}]},
                {"role": "assistant", "content": "no", "loss_weight": 0.0},
                {"role": "user", "content": "again"},
                {"role": "assistant", "content": "yes", "loss_weight": 1.0},
            ]
        },
        "messages",
    )
    assert item.turns == (
        Turn("system", "Be brief."),
        Turn("user", "hi!"),
        Turn("assistant", "no"),
        Turn("user", "again"),
        Turn("assistant", "yes", is_target=True),
    )


def test_wikitext_becomes_articles_without_blank_lines(tmp_path):
    path = tmp_path / "wiki.txt"
    path.write_text(" \n = One = \n \n text a \n = Played , W = \n = = Part = = \n more \n \n = Two = \n \n b \n")
    items = list(read(source(path, "text")))
    assert [item.turns[0].content for item in items] == [
        "= One =\ntext a\n= Played , W =\n= = Part = =\nmore",
        "= Two =\nb",
    ]
    assert [item.where for item in items] == [f"{path}:2", f"{path}:9"]


def test_text_without_titles_becomes_paragraphs(tmp_path):
    (tmp_path / "a.txt").write_text("a\nb\n\nc\n")
    assert [item.turns[0].content for item in read(source(tmp_path / "a.txt", "text"))] == ["a\nb", "c"]
    (tmp_path / "b.jsonl").write_text('{"text": "d"}\n')
    assert [item.turns[0].content for item in read(source(tmp_path / "b.jsonl", "text"))] == ["d"]


@pytest.mark.parametrize(
    ("record", "schema", "reason", "detail"),
    [
        ({"prompt": "a"}, "prompt_response", "missing_key", "no 'response'; found 'prompt'"),
        ({}, "prompt_response", "missing_key", "found nothing"),
        ({"prompt": 1, "response": "b"}, "prompt_response", "wrong_type", "'prompt' is int, not str"),
        ([1], "prompt_response", "wrong_type", "an object is expected, this is list"),
        ({"text": "a", "label": " "}, "label", "empty_label", "empty"),
        ({"messages": []}, "messages", "no_messages", "empty"),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages", "no_answer", "by 'user'"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages", "unknown_role", "'robot' is not one of"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages", "wrong_type", "'content' is int"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages", "not_text", "image"),
        ({"instruction": "a", "instances": []}, "self_instruct", "no_instances", "empty"),
        ({"instruction": "a", "input": 3, "output": "b"}, "alpaca", "wrong_type", "'input' is int"),
        ({"prompt": "\ud83d", "response": "b"}, "prompt_response", "invalid_unicode", "character 0"),
        (
            {"messages": [{"role": "assistant", "content": "a", "loss_weight": 0.5}]},
            "messages",
            "unknown_weight",
            "0.5 is neither 0 nor 1",
        ),
    ],
)
def test_a_record_that_does_not_fit_is_dropped_with_its_reason(tmp_path, record, schema, reason, detail):
    item = one(tmp_path, record, schema)
    assert isinstance(item, Drop)
    assert (item.reason, item.where) == (reason, f"{tmp_path / 'one.jsonl'}:1")
    assert detail in item.detail


def test_damaged_lines_are_dropped_and_the_others_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n\xff\xfe\n{"text": \n\n{"text": "b"}\n' + b"[" * 100_000 + b"\n")
    items = list(read(source(path, "text")))
    assert [getattr(item, "reason", "ok") for item in items] == [
        "ok",
        "invalid_utf8",
        "invalid_json",
        "ok",
        "invalid_json",
    ]
    assert items[1].where == f"{path}:2"


def test_damaged_csv_rows_are_dropped(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'text\n"a"b\n\xff\nc\n')
    items = list(read(source(tmp_path / "a.csv", "text")))
    assert [getattr(item, "reason", "ok") for item in items] == ["invalid_csv", "invalid_utf8", "ok"]
    assert [item.where.rpartition(":")[2] for item in items] == ["2", "3", "4"]


def test_alpaca_columns_in_csv_and_numbers_as_labels(tmp_path):
    (tmp_path / "a.csv").write_text("instruction,input,output\nAdd,1 1,2\nHi,,Ho\n")
    assert pairs(read(source(tmp_path / "a.csv", "alpaca"))) == [("Add\n\n1 1", "2"), ("Hi", "Ho")]
    assert one(tmp_path, {"text": "a", "label": 1}, "label").label == "1"


@pytest.mark.parametrize(
    ("name", "content", "more", "message"),
    [
        ("a.xyz", "", {}, r"unknown format '\.xyz'; name it with format:"),
        ("a.csv", "txt,b\n", {}, r"no column 'text'; the columns are 'txt', 'b'; did you mean 'txt'\?"),
        ("a.csv", "q,b\n", {}, r"no column 'text'; the columns are 'q', 'b'; name the right ones"),
        ("a.json", "{", {}, "not JSON: .*; mend the file"),
        ("a.csv", 'text\nb\n"c\nd\n', {}, "a quote opened after line 2 never closes; mend it"),
        ("a.txt", "x", {"schema": "label"}, "a txt file is plain text, not label; give a delimiter"),
        ("a.json", "{}", {}, "a list of records is expected, this is dict; use jsonl"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error(tmp_path, name, content, more, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        list(read(source(tmp_path / name, **{"schema": "text", **more})))


def test_files_of_a_folder_and_a_glob_and_a_typo(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "notes.md"):
        (tmp_path / name).touch()
    assert [path.name for path in files(source(tmp_path, "text"))] == ["a.jsonl", "b.jsonl"]
    assert [path.name for path in files(source(tmp_path / "b*", "text"))] == ["b.jsonl"]
    with pytest.raises(DataError, match=r"no such file; did you mean .*a\.jsonl\?"):
        files(source(tmp_path / "a.json", "text"))
    with pytest.raises(DataError, match="no such file; paths are relative to the current directory"):
        files(source(tmp_path / "nowhere" / "x", "text"))
