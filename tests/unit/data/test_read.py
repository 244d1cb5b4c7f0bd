import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.data.read import UNREADABLE, detect, read, slices
from sft_dist.data.records import Conversation, Drop, Turn
from sft_dist.errors import DataError
from sft_dist.schema import SourceConfig

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


def source(path, schema, **more):
    return SourceConfig(path=str(path), schema=schema, **more)


def items(path, schema, slice_bytes=1 << 20, *, eos_id=None, **more):
    """Everything that is read from all the slices of a source."""
    asked = source(path, schema, **more)
    return [item for piece in slices(asked, slice_bytes) for item in read(piece, asked, eos_id)]


def one(tmp_path, record, schema, **more):
    """What becomes of a single JSON record."""
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps(record) + "\n")
    (item,) = items(path, schema, **more)
    return item


def pairs(found):
    return [(item.turns[0].content, item.turns[-1].content) for item in found if isinstance(item, Conversation)]


def test_labelled_lines_between_tabs_keep_their_quotes(tmp_path):
    path = tmp_path / "SMSSpamCollection"
    path.write_bytes('ham\tsay "hi\r\nspam\tWIN "£1"\r\n'.encode())
    found = items(path, "label", delimiter="\t", text=1, label=0)
    assert pairs(found) == [('say "hi', "ham"), ('WIN "£1"', "spam")]
    assert [item.label for item in found] == ["ham", "spam"]
    assert found[1].where == f"{path}:2"
    assert found[1].turns[1].is_target


def test_tables_and_json_lists(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbfprompt,response\n"a, ""b""\nc",d\n\ne,f\n')
    assert pairs(items(tmp_path / "a.csv", "prompt_response")) == [('a, "b"\nc', "d"), ("e", "f")]
    (tmp_path / "a.tsv").write_text("q\ta\nwhat\tthis\n")
    assert pairs(items(tmp_path / "a.tsv", "prompt_response", prompt="q", response="a")) == [("what", "this")]
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": "Add", "input": "1 1", "output": "2"}]))
    assert pairs(items(tmp_path / "a.json", "alpaca")) == [("Add\n\n1 1", "2")]
    (tmp_path / "b.csv").write_text("instruction,input,output\nAdd,1 1,2\nHi,,Ho\n")
    assert pairs(items(tmp_path / "b.csv", "alpaca")) == [("Add\n\n1 1", "2"), ("Hi", "Ho")]


def test_parquet_chats_keep_their_tools_and_skip_what_is_null(tmp_path):
    messages = [{"role": "user", "content": "1 + 1?", "name": None}, {"role": "assistant", "content": "2", "name": "x"}]
    table = {"id": [7], "messages": [messages], "tools": [json.dumps([TOOL])], "system": ["unused"]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    (item,) = items(tmp_path / "a.parquet", "messages")
    assert item.turns == (Turn("user", "1 + 1?"), Turn("assistant", "2", True, {"name": "x"}))
    assert item.tools == [TOOL]


@pytest.mark.parametrize("keys", [("prompt", "completion"), ("question", "answer"), ("input", "output")])
def test_usual_pairs_stand_in_for_columns_that_are_not_named(tmp_path, keys):
    record = dict(zip(keys, ("a", "b"), strict=True))
    assert pairs([one(tmp_path, record, "prompt_response")]) == [("a", "b")]
    (tmp_path / "a.csv").write_text(f"id,{keys[0]},{keys[1]}\n1,a,b\n")
    assert pairs(items(tmp_path / "a.csv", "prompt_response")) == [("a", "b")]
    assert one(tmp_path, record, "prompt_response", prompt="p").reason == "missing_key"


def test_self_instruct_has_an_instance_a_record_and_drops_one_alone(tmp_path):
    path = tmp_path / "a.jsonl"
    instances = [{"input": "", "output": "x"}, {"input": "b"}, {"input": "b", "output": "y"}]
    path.write_text(json.dumps({"instruction": "Do", "instances": instances}))
    found = items(path, "self_instruct")
    assert pairs(found) == [("Do", "x"), ("Do\n\nb", "y")]
    assert found[1].reason == "missing_key"


def test_messages_with_parts_weights_and_other_names_of_roles(tmp_path):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "value": "hi"}, {"type": "text", "text": "!"}]},
        {"role": "assistant", "content": "no", "loss_weight": 0.0},
        {"role": "assistant", "content": "no", "weight": 0, "loss": None},
        {"role": "assistant", "content": "no", "loss": False, "weight": 1},
        {"role": "assistant", "content": "yes", "loss_weight": 1.0, "reasoning_content": "hm"},
    ]
    item = one(tmp_path, {"messages": messages}, "messages")
    assert item.turns == (
        Turn("system", "Be brief."),
        Turn("user", "hi!"),
        *[Turn("assistant", "no")] * 3,
        Turn("assistant", "yes", True, {"reasoning_content": "hm"}),
    )
    assert item.tools is None


@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}'])
@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_tool_calls_and_tools_are_objects_however_they_are_spelled(tmp_path, arguments, tools):
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": arguments}}
    messages = [
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "add"},
        {"role": "assistant", "content": "2", "tool_calls": []},
    ]
    item = one(tmp_path, {"messages": messages, "tools": tools}, "messages")
    assert item.turns == (
        Turn("user", "1?"),
        Turn("assistant", "", True, {"tool_calls": [{"id": "c1", **CALL}]}),
        Turn("tool", "2", False, {"name": "add", "tool_call_id": "c1"}),
        Turn("assistant", "2", True),
    )
    assert item.tools == [TOOL]


def test_sharegpt_names_and_calls(tmp_path):
    said = [
        ("human", "1?"),
        ("function_call", '{"name": "add", "arguments": "{\\"a\\": 1}"}'),
        ("observation", "2"),
        ("function_call", f"[{json.dumps(CALL)}]"),
        ("tool", "2"),
        ("function_call", "add(1)"),
        ("function_call", '{"no": "name"}'),
        ("gpt", "2"),
    ]
    record = {"conversations": [{"from": who, "value": text} for who, text in said], "system": "Add.", "tools": "[]"}
    calls = {"tool_calls": [CALL]}
    item = one(tmp_path, record, "sharegpt")
    assert item.turns == (
        Turn("system", "Add."),
        Turn("user", "1?"),
        Turn("assistant", "", True, calls),
        Turn("tool", "2"),
        Turn("assistant", "", True, calls),
        Turn("tool", "2"),
        Turn("assistant", "add(1)", True),
        Turn("assistant", '{"no": "name"}', True),
        Turn("assistant", "2", True),
    )
    assert item.tools is None
    record = {
        "talk": [{"from": "system", "value": "S"}, {"from": "assistant", "value": "a", "weight": 0}],
        "system": "T",
    }
    turns = one(tmp_path, record, "sharegpt", messages="talk").turns
    assert turns == (Turn("system", "S"), Turn("assistant", "a"))


def test_wikitext_becomes_articles_without_blank_lines(tmp_path):
    path = tmp_path / "wiki.txt"
    path.write_text(" \n = One = \n \n text a \n = Played , W = \n = = Part = = \n more \n \n = Two = \n \n b \n")
    found = items(path, "text")
    assert [item.turns for item in found] == [
        (Turn("text", "= One =\ntext a\n= Played , W =\n= = Part = =\nmore", True),),
        (Turn("text", "= Two =\nb", True),),
    ]
    assert [item.where for item in found] == [f"{path}:2", f"{path}:9"]


def test_the_ids_of_token_files_are_targets_but_the_first(tmp_path):
    path = tmp_path / "train.bin"
    path.write_bytes(np.array([5, 6, 0, 7], "<u2").tobytes())
    first, second = items(path, "tokens", format="nanogpt", eos_id=0)
    assert (first.ids.tolist(), first.targets.tolist(), first.where) == ([5, 6, 0], [False, True, True], f"{path}:#1")
    assert (second.ids.tolist(), second.num_targets, second.where) == ([7], 0, f"{path}:#4")


@pytest.mark.parametrize(
    ("record", "schema", "reason", "detail"),
    [
        ({"prompt": "a"}, "prompt_response", "missing_key", "no 'response'; found 'prompt'"),
        ({}, "prompt_response", "missing_key", "found nothing"),
        ({"prompt": 1, "response": "b"}, "prompt_response", "wrong_type", "'prompt' is int, not str"),
        ([1], "prompt_response", "wrong_type", "an object is expected, this is list"),
        ("a", "messages", "wrong_type", "an object is expected, this is str"),
        ({"text": "a", "label": " "}, "label", "empty_label", "empty"),
        ({"messages": []}, "messages", "no_messages", "empty"),
        ({"messages": ["a"]}, "messages", "wrong_type", "an object is expected, this is str"),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages", "no_answer", "by 'user'"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages", "unknown_role", "'robot' is not one of"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages", "wrong_type", "'content' is int"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages", "wrong_type", "'content' is NoneType"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages", "not_text", "image"),
        ({"messages": [{"role": "user", "content": [{"text": None}]}]}, "messages", "wrong_type", "'text' is NoneType"),
        ({"messages": [{"role": "user", "content": "", "name": 3}]}, "messages", "wrong_type", "'name' is int"),
        ({"messages": [{"role": "user", "tool_calls": "a"}]}, "messages", "invalid_tools", "is str, not a list"),
        ({"messages": [{"role": "user", "tool_calls": ["a"]}]}, "messages", "invalid_tools", "no function name: a"),
        (
            {"messages": [{"role": "user", "tool_calls": [{"name": "a", "arguments": "{"}]}]},
            "messages",
            "invalid_tools",
            "'arguments' is not JSON",
        ),
        (
            {"messages": [{"role": "user", "tool_calls": [{"name": "a", "arguments": [1]}]}]},
            "messages",
            "invalid_tools",
            "'arguments' is list, not dict",
        ),
        (
            {"messages": [{"role": "user", "tool_calls": [{"name": "a", "arguments": {"b": "\ud83d"}}]}]},
            "messages",
            "invalid_unicode",
            "surrogates",
        ),
        ({"conversations": [{"from": "gpt", "value": "a"}], "tools": "x"}, "sharegpt", "invalid_tools", "is not JSON"),
        (
            {"conversations": [{"from": "gpt", "value": "a"}], "tools": [1]},
            "sharegpt",
            "invalid_tools",
            "list of objects",
        ),
        ({"conversations": [{"from": "bot", "value": "a"}]}, "sharegpt", "unknown_role", "'bot' is not one of"),
        ({"conversations": [{"from": "gpt"}]}, "sharegpt", "missing_key", "no 'value'; found 'from'"),
        ({"instruction": "a", "instances": []}, "self_instruct", "no_instances", "empty"),
        ({"instruction": "a", "input": 3, "output": "b"}, "alpaca", "wrong_type", "'input' is int"),
        ({"prompt": "\ud83d", "response": "b"}, "prompt_response", "invalid_unicode", "character 0"),
        (
            {"messages": [{"role": "assistant", "content": "a", "loss_weight": 0.5}]},
            "messages",
            "unknown_weight",
            "loss_weight 0.5 is neither 0 nor 1",
        ),
    ],
)
def test_a_record_that_does_not_fit_is_dropped_with_its_reason(tmp_path, record, schema, reason, detail):
    item = one(tmp_path, record, schema)
    assert isinstance(item, Drop)
    assert (item.reason, item.where) == (reason, f"{tmp_path / 'one.jsonl'}:1")
    assert detail in item.detail
    assert reason in UNREADABLE


def test_numbers_are_labels_and_columns_are_texts(tmp_path):
    assert one(tmp_path, {"text": "a", "label": 1}, "label").label == "1"
    assert one(tmp_path, {"text": "d"}, "text").turns == (Turn("text", "d", True),)


@given(
    lines=st.lists(
        st.sampled_from(
            [
                b'{"prompt": "a", "response": "b\\n"}',
                b'{"prompt": "\xc3\xa9"}',
                b"",
                b"\r",
                b"\xff",
                b"{",
                b"[1]",
                b"{}{}",
            ]
        )
        | st.binary(max_size=6)
    ),
    slice_bytes=st.integers(1, 99),
)
def test_slices_read_one_by_one_are_the_file(tmp_path_factory, lines, slice_bytes):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    assert items(path, "prompt_response", slice_bytes) == items(path, "prompt_response")


@pytest.mark.parametrize(
    ("name", "content", "schema", "more", "message"),
    [
        ("a.csv", "txt,b\n", "text", {}, r"no column 'text'; the columns are 'txt', 'b'; did you mean 'txt'\?"),
        ("a.txt", "x", "label", {}, "a txt file is plain text, not label; give a delimiter"),
        ("a.jsonl", "{}", "tokens", {}, "schema tokens does not go with format jsonl; tokens goes with megatron"),
        ("a.bin", "ab", "text", {"format": "nanogpt"}, "schema text does not go with format nanogpt"),
        ("a.jsonl", "{}", None, {}, "schema None does not go with format jsonl"),
    ],
)
def test_a_file_that_does_not_go_with_the_schema_is_an_error(tmp_path, name, content, schema, more, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        items(tmp_path / name, schema, **more)


CHAT = {"messages": [{"role": "user", "content": "a"}], "prompt": "a", "response": "b"}


@pytest.mark.parametrize(
    ("name", "content", "more", "schema", "said"),
    [
        ("a.txt.gz", "", {}, "text", "schema text (a txt file)"),
        ("a.bin", "", {"format": "megatron"}, "tokens", "schema tokens (format megatron)"),
        (
            "a.jsonl",
            json.dumps(CHAT),
            {},
            "messages",
            "schema messages (keys messages, prompt, response; not used: prompt, response)",
        ),
        ("a.json", '[{"conversations": [{"from": "human", "value": ""}]}]', {}, "sharegpt", "(keys conversations)"),
        ("a.jsonl", '{"talk": [{"role": "user"}]}', {"messages": "talk"}, "messages", "(keys talk)"),
        (
            "a.csv",
            "instruction,input,output,text\na,b,c,d\n",
            {},
            "alpaca",
            "(keys instruction, input, output, text; not used: text)",
        ),
        ("a.jsonl", '{"instruction": "", "instances": []}', {}, "self_instruct", "(keys instruction, instances)"),
        (
            "a.jsonl",
            "{\n{}\n" + '{"prompt": "", "response": ""}',
            {},
            "prompt_response",
            "prompt is 'prompt', response",
        ),
        ("a.tsv", "id\tquestion\tanswer\n1\t2\t3\n", {}, "prompt_response", "is 'question', response is 'answer'"),
        ("a.jsonl", '{"input": "", "output": ""}', {}, "prompt_response", "prompt is 'input', response is 'output'"),
        ("a.jsonl", '{"q": "", "a": "", "text": ""}', {"prompt": "q", "response": "a"}, "prompt_response", "is 'q'"),
        ("a.jsonl", '{"text": "", "label": 1}', {}, "label", "(keys text, label)"),
        ("a.csv", "ham,hi\n", {"text": 1, "label": 0}, "label", "(keys 0, 1)"),
        ("a.csv", "ham,hi\n", {"text": 1}, "text", "(keys 0, 1; not used: 0)"),
        ("a.jsonl", '{"text": "", "id": 1}', {}, "text", "schema text (keys text, id; not used: id)"),
    ],
)
def test_the_schema_is_found_from_the_first_records(tmp_path, name, content, more, schema, said):
    (tmp_path / name).write_text(content)
    found, sentence = detect(SourceConfig(path=str(tmp_path / name), **more))
    assert found == schema
    assert sentence.startswith(f"{tmp_path / name}: schema {schema} (")
    assert said in sentence


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        ('{"a": 1, "b": 2}', {}, "no schema fits the keys a, b; name the schema and its columns"),
        ('{"messages": [], "conversations": "a"}', {}, "no schema fits the keys messages, conversations"),
        (
            '{"text": "a", "labl": "b"}',
            {"label": "lbl"},
            "no column 'lbl'; the columns are 'text', 'labl'; did you mean 'labl'",
        ),
        (
            '{"prompt": "a", "answer": "b"}',
            {"response": "x"},
            "no column 'x'; the columns are 'prompt', 'answer'; name the right ones",
        ),
        (
            '{"text": "a", "label": "b", "input": "", "output": ""}',
            {},
            "schemas label and prompt_response fit the keys",
        ),
        (
            '{"prompt": "a", "response": "b", "completion": "c"}',
            {},
            "schemas prompt_response with prompt and completion and prompt_response with prompt and response fit",
        ),
        ('{"text": "a"}\n{"prompt": "a", "response": "b"}', {}, "schemas prompt_response and text fit the keys text"),
        ("[1]", {}, "no schema can be found: .*:1 is list, not an object; mend the file"),
        ("{", {}, r"no schema can be found: .*:1 is invalid_json \(.*\); mend the file"),
        ("", {}, "no schema can be found: there is no record; mend the file"),
    ],
)
def test_a_schema_that_is_not_clear_is_an_error(tmp_path, content, more, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        detect(SourceConfig(path=str(tmp_path / "a.jsonl"), **more))


def test_alpaca_with_a_system_message_and_a_history(tmp_path):
    row = {"instruction": "c", "input": "", "output": "d", "system": "s", "history": [["a", "b"]]}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps({**row, "history": ["a"]}) + "\n")
    source = SourceConfig(path=str(path), schema="alpaca")
    made, bad = (item for piece in slices(source, 1 << 20) for item in read(piece, source))
    roles = [(turn.role, turn.content, turn.is_target) for turn in made.turns]
    answers = [("assistant", "b", True), ("assistant", "d", True)]
    assert roles == [("system", "s", False), ("user", "a", False), answers[0], ("user", "c", False), answers[1]]
    assert (bad.reason, bad.detail) == ("wrong_type", "'history' is not a list of [question, answer]")


def test_the_older_function_call_is_a_tool_call(tmp_path):
    call = {"name": "f", "arguments": '{"a": 1}'}
    messages = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "so", "function_call": call}]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n")
    source = SourceConfig(path=str(path), schema="messages")
    [made] = [item for piece in slices(source, 1 << 20) for item in read(piece, source)]
    function = {"name": "f", "arguments": {"a": 1}}
    assert made.turns[1].extra == {"tool_calls": [{"type": "function", "function": function}]}


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,response,response\na,b,c\n")
    source = SourceConfig(path=str(path), schema="prompt_response")
    with pytest.raises(DataError, match="the column 'response' is there twice, and which one is meant cannot be told"):
        [item for piece in slices(source, 1 << 20) for item in read(piece, source)]
