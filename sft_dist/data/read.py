"""Rows of raw files as conversations: every record comes out, or is dropped with its place and the reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from sft_dist.data.records import Conversation, Document, Drop, Turn
from sft_dist.data.sources import HUB, Slice, columns_missing, digest, files, first_rows, kind_of, rows, slices
from sft_dist.errors import DataError
from sft_dist.schema import Column, SourceConfig

__all__ = ["ROLES", "UNREADABLE", "Slice", "detect", "digest", "files", "read", "slices"]

ROLES = ("system", "user", "assistant", "tool")
UNREADABLE = frozenset({
    "invalid_utf8", "invalid_json", "duplicate_key", "invalid_csv", "line_too_long", "missing_key", "wrong_type",
    "unknown_role", "no_answer", "no_messages", "no_instances", "not_text", "empty_label", "invalid_unicode",
    "unknown_weight", "invalid_tools", "invalid_token", "no_tokens",
})  # fmt: skip
"""Reasons of records that could not be read, as opposed to those that were read and left out."""
_ROLES = {role: role for role in ROLES} | {"developer": "system", "function": "tool"}
_SPEAKERS = _ROLES | {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"} | {
    "function_call": "assistant", "function_response": "tool"
}  # fmt: skip
_PAIRS = (("prompt", "response"), ("prompt", "completion"), ("question", "answer"), ("input", "output"))
_SAMPLE_ROWS = 20
_TOKEN_KINDS = ("megatron", "nanogpt")


class _BadRecordError(Exception):
    """This record does not fit; (reason, detail)."""


def read(piece: Slice, source: SourceConfig, eos_id: int | None = None) -> Iterator[Conversation | Document | Drop]:
    """Every record of a slice, in order, as a conversation, as a document of token ids, or as a counted drop.

    `source.schema_` must be set. `eos_id` is where the texts of a nanoGPT file end (included). Of a document of token ids
    all are targets but the first. Raises DataError for what concerns a whole file: damaged, of another kind than the
    schema, or without a named column.
    """
    schema = source.schema_
    is_tokens = piece.kind in _TOKEN_KINDS
    if schema is None or is_tokens != (schema == "tokens"):
        raise DataError(
            f"{piece.path}: schema {schema} does not go with format {piece.kind}; tokens goes with megatron and nanogpt "
            "and with nothing else: name schema and format that fit, or leave the schema out"
        )
    if piece.kind == "txt" and schema != "text":
        raise DataError(f"{piece.path}: a txt file is plain text, not {schema}; give a delimiter, or name its format")
    convert = _from_tokens if is_tokens else _from_article if piece.kind == "txt" else _CONVERTERS[schema]
    found = rows(
        piece, source, is_headed=_is_headed(source), check=partial(_columns, source, piece.path), eos_id=eos_id
    )
    for where, row in found:
        if isinstance(row, Drop):
            yield row
            continue
        try:
            item = convert(row, source, where)
        except _BadRecordError as bad:
            yield Drop(bad.args[0], where, bad.args[1])
            continue
        if isinstance(item, list):
            yield from item
        else:
            yield item


def detect(source: SourceConfig) -> tuple[str, str]:
    """(schema, a sentence that says so) of a source, from its first records.

    Raises DataError with the keys found when no schema fits, or more than one.
    """
    kinds = () if source.path.startswith(HUB) else [kind_of(path, source) for path in files(source)]
    if kinds and all(kind in _TOKEN_KINDS for kind in kinds):
        return "tokens", f"{source.path}: schema tokens (format {kinds[0]})"
    if kinds and all(kind == "txt" for kind in kinds):
        return "text", f"{source.path}: schema text (a txt file)"
    found = first_rows(source, _SAMPLE_ROWS, is_headed=_is_headed(source))
    records = [row for _, row in found if isinstance(row, dict)]
    if not records:
        raise DataError(f"{source.path}: no schema can be found: {_why_none(found)}; mend the file, or name the schema")
    schemas = sorted(set().union(*(_fitting(record, source) for record in records)))
    keys = ", ".join(map(str, records[0]))
    if len(schemas) != 1:
        columns = ("text", "label", "prompt", "response", "messages")
        named = [getattr(source, name) for name in columns if name in source.model_fields_set]
        columns_missing(source.path, list(records[0]), named)
        what = f"schemas {' and '.join(schemas)} fit" if schemas else "no schema fits"
        raise DataError(f"{source.path}: {what} the keys {keys}; name the schema and its columns in the source")
    used, ignored = "", [str(key) for key in records[0] if key not in _used(schemas[0], source, records[0])]
    if schemas[0] == "prompt_response":
        prompt, response = _pair_columns(source, next(r for r in records if _fitting(r, source)))
        used = f"; prompt is {prompt!r}, response is {response!r}"
    used += f"; not used: {', '.join(ignored)}" if ignored else ""
    return schemas[0], f"{source.path}: schema {schemas[0]} (keys {keys}{used})"


def _used(schema: str, source: SourceConfig, row: Mapping[Any, Any]) -> set[Column]:
    """The keys of a record that its schema reads."""
    named = source.model_copy(update={"schema_": schema})
    wanted = _pair_columns(named, row) if schema == "prompt_response" else _wanted(named)
    return {*wanted, *_OPTIONAL.get(schema, ())}


def _why_none(found: Sequence[tuple[str, Any]]) -> str:
    """Why none of the first rows is a record."""
    if not found:
        return "there is no record"
    where, row = found[0]
    if isinstance(row, Drop):
        return f"{where} is {row.reason} ({row.detail})"
    return f"{where} is {type(row).__name__}, not an object"


def _fitting(row: Mapping[Any, Any], source: SourceConfig) -> set[str]:
    """The schemas that a record fits; the columns that the source names decide, then the more special schema.

    >>> sorted(_fitting({"instruction": "Add", "input": "1 1", "output": "2"}, SourceConfig(path="a")))
    ['alpaca']
    """
    named, fits = source.model_fields_set, set()
    if {"prompt", "response"} & named:
        return {"prompt_response"} if source.prompt in row and source.response in row else set()
    if "label" in named:
        return {"label"} if source.text in row and source.label in row else set()
    if "messages" in named:
        return _spoken(row.get(source.messages))
    if "text" in named and isinstance(source.text, int):
        return {"text"}
    for column in ("messages", "conversations"):
        fits |= _spoken(row.get(column))
    pairs = [] if fits else [pair for pair in _PAIRS if row.keys() >= set(pair)]  # a chat may repeat its first prompt
    if "instruction" in row and {"output", "instances"} & row.keys():
        fits.add("alpaca" if "output" in row else "self_instruct")
        pairs = [pair for pair in pairs if pair != ("input", "output")]
    is_one = len(pairs) == 1
    fits |= {"prompt_response" if is_one else f"prompt_response with {' and '.join(pair)}" for pair in pairs}
    if "label" in row and source.text in row:
        fits.add("label")
    return fits or ({"text"} if source.text in row else set())


def _spoken(turns: Any) -> set[str]:
    """Which of the two chat schemas a list of messages is."""
    if not (isinstance(turns, list) and turns and isinstance(turns[0], dict)):
        return set()
    if "role" in turns[0]:
        return {"messages"}
    return {"sharegpt"} if turns[0].keys() >= {"from", "value"} else set()


def _is_headed(source: SourceConfig) -> bool:
    """Whether a delimited file has a header: it has none when its columns are numbers."""
    if source.schema_ is not None:
        return not all(isinstance(column, int) for column in _wanted(source))
    named = [
        getattr(source, name) for name in ("text", "label", "prompt", "response") if name in source.model_fields_set
    ]
    return not named or not all(isinstance(column, int) for column in named)


def _wanted(source: SourceConfig) -> list[Column]:
    """The columns without which no record fits the schema."""
    match source.schema_:
        case "label":
            return [source.text, source.label]
        case "prompt_response":
            return [source.prompt, source.response]
        case "text":
            return [source.text]
        case "messages" | "sharegpt":
            return [_turns_column(source)]
        case "alpaca":
            return ["instruction", "output"]
    return ["instruction", "instances"]


_OPTIONAL = {"alpaca": ("input", "system", "history"), "messages": ("tools",), "sharegpt": ("tools", "system")}


def _columns(source: SourceConfig, path: str, names: Sequence[str]) -> list[Column]:
    """The columns of a table to be read. Raises DataError when one is missing."""
    wanted: list[Column] = list(_wanted(source))
    if source.schema_ == "prompt_response":
        wanted = list(_pair_columns(source, dict.fromkeys(names)))
    columns_missing(path, names, wanted)
    twice = next((column for column in wanted if sum(name == column for name in names) > 1), None)
    if twice is not None:
        raise DataError(
            f"{path}: the column {twice!r} is there twice, and which one is meant cannot be told; rename one"
        )
    return wanted + [name for name in _OPTIONAL.get(source.schema_ or "", ()) if name in names]


def _turns_column(source: SourceConfig) -> Column:
    is_named = source.schema_ == "messages" or "messages" in source.model_fields_set
    return source.messages if is_named else "conversations"


def _pair_columns(source: SourceConfig, row: Mapping[Any, Any]) -> tuple[Column, Column]:
    """The columns of prompt and response: the source's, or, where it names none, the usual pair that is there."""
    if not {"prompt", "response"} & source.model_fields_set:
        for prompt, response in _PAIRS:
            if prompt in row and response in row:
                return prompt, response
    return source.prompt, source.response


def _value(row: Any, column: Column, kind: type = str) -> Any:
    """One field of a row, of the type it must have."""
    if not isinstance(row, dict):
        raise _BadRecordError("wrong_type", f"an object is expected, this is {type(row).__name__}")
    if column not in row:
        raise _BadRecordError("missing_key", f"no {column!r}; found {', '.join(map(repr, row)) or 'nothing'}")
    value = row[column]
    if not isinstance(value, kind):
        raise _BadRecordError("wrong_type", f"{column!r} is {type(value).__name__}, not {kind.__name__}")
    return _sound(value) if isinstance(value, str) else value


def _sound(text: str) -> str:
    """JSON can spell half a character (a lone surrogate), which is no text."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _BadRecordError("invalid_unicode", f"character {error.start}: {error.reason}") from None
    return text


def _pair(prompt: str, response: str, where: str, label: str | None = None) -> Conversation:
    return Conversation((Turn("user", prompt), Turn("assistant", response, True)), where, label)


def _from_label(row: Any, source: SourceConfig, where: str) -> Conversation:
    if isinstance(row, dict) and type(row.get(source.label)) is int:
        row = {**row, source.label: str(row[source.label])}
    label = _value(row, source.label).strip()
    if not label:
        raise _BadRecordError("empty_label", "the label is empty")
    return _pair(_value(row, source.text), label, where, label)


def _from_pair(row: Any, source: SourceConfig, where: str) -> Conversation:
    prompt, response = source.prompt, source.response
    if isinstance(row, dict) and (prompt not in row or response not in row):
        prompt, response = _pair_columns(source, row)
    return _pair(_value(row, prompt), _value(row, response), where)


def _from_text(row: Any, source: SourceConfig, where: str) -> Conversation:
    return _from_article(_value(row, source.text), source, where)


def _from_article(text: str, _: SourceConfig, where: str) -> Conversation:
    return Conversation((Turn("text", text, True),), where)


def _from_tokens(ids: np.ndarray, _: SourceConfig, where: str) -> Document:
    targets = np.ones(len(ids), np.bool_)
    targets[0] = False
    return Document(ids, targets, where)


def _from_alpaca(row: Any, _: SourceConfig, where: str) -> Conversation:
    instruction = _value(row, "instruction")
    given = "" if row.get("input") is None else _value(row, "input")
    made = _pair(_asked(instruction, given), _value(row, "output"), where)
    turns = [Turn("system", _value(row, "system"))] if row.get("system") else []
    for exchange in _json(row.get("history") or [], list, "history"):
        if not (isinstance(exchange, list) and len(exchange) == 2 and all(isinstance(text, str) for text in exchange)):
            raise _BadRecordError("wrong_type", "'history' is not a list of [question, answer]")
        turns += [Turn("user", _sound(exchange[0])), Turn("assistant", _sound(exchange[1]), is_target=True)]
    return Conversation((*turns, *made.turns), where) if turns else made


def _from_self_instruct(row: Any, _: SourceConfig, where: str) -> list[Conversation | Drop]:
    instruction = _value(row, "instruction")
    instances = _value(row, "instances", list)
    if not instances:
        raise _BadRecordError("no_instances", "instances is empty")
    made: list[Conversation | Drop] = []
    for instance in instances:
        try:
            made.append(_pair(_asked(instruction, _value(instance, "input")), _value(instance, "output"), where))
        except _BadRecordError as bad:
            made.append(Drop(bad.args[0], where, bad.args[1]))
    return made


def _asked(instruction: str, given: str) -> str:
    return f"{instruction}\n\n{given}" if given and not given.isspace() else instruction


def _from_messages(row: Any, source: SourceConfig, where: str) -> Conversation:
    turns = [_turn(message) for message in _value(row, source.messages, list)]
    return _conversation(turns, row, where)


def _from_sharegpt(row: Any, source: SourceConfig, where: str) -> Conversation:
    turns = [_spoken_turn(message) for message in _value(row, _turns_column(source), list)]
    if row.get("system") and (not turns or turns[0].role != "system"):
        turns.insert(0, Turn("system", _value(row, "system")))
    return _conversation(turns, row, where)


def _conversation(turns: list[Turn], row: Mapping[str, Any], where: str) -> Conversation:
    if not turns:
        raise _BadRecordError("no_messages", "the conversation is empty")
    if turns[-1].role != "assistant":
        raise _BadRecordError("no_answer", f"the last message is by {turns[-1].role!r}, not the assistant")
    tools = _json(row.get("tools") or None, list, "tools")
    if tools and not all(isinstance(tool, dict) for tool in tools):
        raise _BadRecordError("invalid_tools", "'tools' is not a list of objects")
    return Conversation(tuple(turns), where, None, tools or None)


def _turn(message: Any) -> Turn:
    role = _role(message, "role", _ROLES)
    extra = _extra(message)
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part) for part in content)
    if content is None and extra and "tool_calls" in extra:
        content = ""
    if not isinstance(content, str):
        raise _BadRecordError("wrong_type", f"'content' is {type(content).__name__}, not text or a list of text parts")
    return Turn(role, _sound(content), role == "assistant" and _has_loss(message), extra)


def _spoken_turn(message: Any) -> Turn:
    role = _role(message, "from", _SPEAKERS)
    content, extra = _value(message, "value"), None
    if message["from"] == "function_call" and (calls := _calls_in(content)):
        content, extra = "", {"tool_calls": calls}
    return Turn(role, content, role == "assistant" and _has_loss(message), extra)


def _role(message: Any, key: str, roles: Mapping[str, str]) -> str:
    name = _value(message, key)
    if name not in roles:
        raise _BadRecordError("unknown_role", f"role {name[:60]!r} is not one of {', '.join(roles)}")
    return roles[name]


def _has_loss(message: Mapping[str, Any]) -> bool:
    """Whether a message is to be learned: it is, unless a flag or a weight of 0 says otherwise."""
    for key in ("loss", "loss_weight", "weight"):
        weight = message.get(key)
        if weight is not None and weight not in (0, 1):
            raise _BadRecordError("unknown_weight", f"{key} {weight!r} is neither 0 nor 1")
        if weight is not None and not weight:
            return False
    return True


def _part(part: Any) -> str:
    if not isinstance(part, dict) or part.get("type", "text") != "text":
        raise _BadRecordError("not_text", f"a content part is not text: {str(part)[:60]}")
    return _value(part, "text" if part.get("text") is not None else "value" if "value" in part else "text")


def _extra(message: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a message has besides role and content; tables hold None for what is not there."""
    extra = {
        key: _value(message, key)
        for key in ("name", "tool_call_id", "reasoning_content")
        if message.get(key) is not None
    }
    if calls := message.get("tool_calls"):
        if not isinstance(calls, list):
            raise _BadRecordError("invalid_tools", f"'tool_calls' is {type(calls).__name__}, not a list")
        extra["tool_calls"] = [_call(call) for call in calls]
    elif (call := message.get("function_call")) is not None:  # OpenAI's older form
        extra["tool_calls"] = [_call(call)]
    return extra or None


def _call(call: Any) -> dict[str, Any]:
    """One tool call in the one form that templates get: its arguments an object, its id kept."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _BadRecordError("invalid_tools", f"a tool call has no function name: {str(call)[:60]}")
    arguments = _json(function.get("arguments"), dict, "arguments") or {}
    made = {"type": "function", "function": {"name": _sound(function["name"]), "arguments": arguments}}
    return {"id": call["id"], **made} if isinstance(call.get("id"), str) else made


def _calls_in(text: str) -> list[dict[str, Any]] | None:
    """The calls that a ShareGPT message spells as JSON; None when it is other text."""
    try:
        values = json.loads(text)
        return [_call(call) for call in (values if isinstance(values, list) else [values])]
    except (ValueError, RecursionError, _BadRecordError):
        return None


def _json(value: Any, kind: type, name: str) -> Any:
    """A value that may be spelled as JSON text, of the type it must have (or None)."""
    try:
        if isinstance(value, str):
            value = json.loads(value or "null")
        if value is not None and not isinstance(value, kind):
            raise _BadRecordError("invalid_tools", f"{name!r} is {type(value).__name__}, not {kind.__name__}")
        if value:
            _sound(json.dumps(value, ensure_ascii=False))
    except (ValueError, RecursionError) as error:
        raise _BadRecordError("invalid_tools", f"{name!r} is not JSON: {error}") from None
    return value


_CONVERTERS: dict[str, Callable[[Any, SourceConfig, str], Conversation | list[Conversation | Drop]]] = {
    "label": _from_label,
    "prompt_response": _from_pair,
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "self_instruct": _from_self_instruct,
    "text": _from_text,
}
