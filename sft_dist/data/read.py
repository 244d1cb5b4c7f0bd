"""Raw files as conversations: every record comes out, or is dropped with its place and the reason."""

from __future__ import annotations

import csv
import difflib
import glob
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sft_dist.config import Column, SourceConfig
from sft_dist.data.records import Conversation, Drop, Turn
from sft_dist.errors import DataError

ROLES = ("system", "user", "assistant")
_SUFFIXES = {".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".txt": "txt"}
_HEADING = re.compile(r"^ ?= [^=].*[^=] = ?$")  # WikiText's ` = Title = `, not ` = = Section = = `


class _BadRecordError(Exception):
    """This record does not fit; (reason, detail)."""


def files(source: SourceConfig) -> list[Path]:
    """The files of a source, sorted: one file, a glob's matches, or a folder's files of a known suffix.

    Raises DataError when there are none.
    """
    path = Path(source.path)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix in _SUFFIXES)
    else:
        found = sorted(p for p in map(Path, glob.glob(source.path, recursive=True)) if p.is_file())
    if found:
        return found
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")], n=1)
    hint = f"did you mean {path.parent / near[0]}?" if near else "paths are relative to the current directory"
    raise DataError(f"prepare.sources: {source.path!r}: no such file; {hint}")


def read(source: SourceConfig) -> Iterator[Conversation | Drop]:
    """Every record of a source, in file order, as a conversation or a counted drop.

    Raises DataError for what concerns a whole file: missing, of unknown format, without the named column.
    """
    for path in files(source):
        kind = _format(path, source)
        if kind == "txt" and source.schema_ != "text":
            raise DataError(
                f"{path}: a txt file is plain text, not {source.schema_}; give a delimiter, or name its format"
            )
        if kind == "txt":
            yield from _articles(path)
            continue
        rows = {"jsonl": _json_lines, "json": _json_list}.get(kind, _delimited)(path, source)
        convert = _CONVERTERS[source.schema_]
        for where, row in rows:
            if isinstance(row, Drop):
                yield row
                continue
            try:
                yield from convert(row, source, where)
            except _BadRecordError as bad:
                yield Drop(bad.args[0], where, bad.args[1])


def _format(path: Path, source: SourceConfig) -> str:
    if source.format:
        return source.format
    if source.delimiter:
        return "tsv" if source.delimiter == "\t" else "csv"
    if path.suffix in _SUFFIXES:
        return _SUFFIXES[path.suffix]
    raise DataError(f"{path}: unknown format {path.suffix!r}; name it with format: jsonl, json, csv, tsv or txt")


def _lines(path: Path) -> Iterator[tuple[str, str | Drop]]:
    """(file:line, text without its line end) of each line; a byte order mark is passed over."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            try:
                yield where, line.decode().rstrip("\r\n")
            except UnicodeDecodeError as error:
                yield where, Drop("invalid_utf8", where, f"byte {error.start} of the line: {error.reason}")


def _json_lines(path: Path, _: SourceConfig) -> Iterator[tuple[str, Any]]:
    for where, line in _lines(path):
        if isinstance(line, Drop) or line.strip():
            yield where, line if isinstance(line, Drop) else _parsed(line, where)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return Drop("invalid_json", where, str(error))


def _json_list(path: Path, _: SourceConfig) -> Iterator[tuple[str, Any]]:
    try:
        values = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}; mend the file, or name another format") from None
    if not isinstance(values, list):
        raise DataError(
            f"{path}: a list of records is expected, this is {type(values).__name__}; use jsonl for one a line"
        )
    for number, value in enumerate(values, 1):
        yield f"{path}:#{number}", value


def _delimited(path: Path, source: SourceConfig) -> Iterator[tuple[str, Any]]:
    """Rows as {column: text}. Numbered columns mean no header; between tabs a quote is an ordinary character."""
    delimiter = source.delimiter or ("\t" if _format(path, source) == "tsv" else ",")
    wanted = [getattr(source, name, name) for name in _COLUMNS[source.schema_]]
    has_header = not all(isinstance(column, int) for column in wanted)
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    bad_lines: list[tuple[str, Drop]] = []
    last = 0  # number of the last line handed to the csv reader, whose own count knows nothing of dropped lines

    def texts() -> Iterator[str]:
        nonlocal last
        for number, (where, line) in enumerate(_lines(path), 1):
            if isinstance(line, Drop):
                bad_lines.append((where, line))
            else:
                last = number
                yield line + "\n"

    reader = csv.reader(texts(), delimiter=delimiter, quoting=quoting, strict=quoting != csv.QUOTE_NONE)
    header: list[str] | None = None
    while True:
        begin = last + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            if "unexpected end" in str(error):  # a quote that never closes has swallowed the rest of the file
                raise DataError(f"{path}: a quote opened after line {begin - 1} never closes; mend it") from None
            yield f"{path}:{last}", Drop("invalid_csv", f"{path}:{last}", str(error))
            continue
        yield from bad_lines
        begin += len(bad_lines)
        bad_lines.clear()
        if row is None:
            return
        if has_header and header is None:
            header = _checked_header(path, row, wanted)
        elif row:
            yield f"{path}:{begin}", dict(zip(header, row, strict=False)) if header else dict(enumerate(row))


def _checked_header(path: Path, header: list[str], wanted: list[Column]) -> list[str]:
    for column in wanted:
        if isinstance(column, str) and column not in header:
            near = difflib.get_close_matches(column, header, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "name the right ones in the source"
            raise DataError(f"{path}: no column {column!r}; the columns are {', '.join(map(repr, header))}; {hint}")
    return header


def _articles(path: Path) -> Iterator[Conversation | Drop]:
    """Plain text: blank lines go; a new document starts at a WikiText title, or, without titles, after a blank line."""
    start, held = 1, []
    has_titles = any(is_title for _, _, is_title in _marked(path))
    for number, line, is_title in _marked(path):
        if isinstance(line, Drop):
            yield line
            continue
        if held and (is_title if has_titles else not line.strip()):
            yield _text("\n".join(held), f"{path}:{start}")
            held = []
        if line.strip():
            start = start if held else number
            held.append(line.strip())
    if held:
        yield _text("\n".join(held), f"{path}:{start}")


def _marked(path: Path) -> Iterator[tuple[int, str | Drop, bool]]:
    """(number, line, whether it is a title) of each line: a title has a blank line on both sides (tables do not)."""
    before, held = "", None
    for number, (_, line) in enumerate(itertools.chain(_lines(path), [("", "")]), 1):
        is_blank = isinstance(line, str) and not line.strip()
        if held is not None:
            yield (*held, is_blank and not before.strip() and bool(_HEADING.match(str(held[1]))))
            before = str(held[1])
        held = (number, line)


def _text(text: str, where: str) -> Conversation:
    return Conversation((Turn("text", text, is_target=True),), where)


def _value(row: Any, column: Column, kind: type = str) -> Any:
    """One field of a row, of the type it must have."""
    if not isinstance(row, dict):
        raise _BadRecordError("wrong_type", f"an object is expected, this is {type(row).__name__}")
    if column not in row:
        raise _BadRecordError("missing_key", f"no {column!r}; found {', '.join(map(repr, row)) or 'nothing'}")
    value = row[column]
    if not isinstance(value, kind):
        raise _BadRecordError("wrong_type", f"{column!r} is {type(value).__name__}, not {kind.__name__}")
    return _sound(value) if kind is str else value


def _sound(text: str) -> str:
    """JSON can spell half a character (a lone surrogate), which is no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _BadRecordError("invalid_unicode", f"character {error.start}: {error.reason}") from None
    return text


def _pair(prompt: str, response: str, where: str, label: str | None = None) -> Conversation:
    return Conversation((Turn("user", prompt), Turn("assistant", response, is_target=True)), where, label)


def _from_label(row: Any, source: SourceConfig, where: str) -> Iterator[Conversation]:
    if isinstance(row, dict) and type(row.get(source.label)) is int:
        row = {**row, source.label: str(row[source.label])}
    label = _value(row, source.label).strip()
    if not label:
        raise _BadRecordError("empty_label", "the label is empty")
    yield _pair(_value(row, source.text), label, where, label)


def _from_pair(row: Any, source: SourceConfig, where: str) -> Iterator[Conversation]:
    yield _pair(_value(row, source.prompt), _value(row, source.response), where)


def _from_text(row: Any, source: SourceConfig, where: str) -> Iterator[Conversation]:
    yield _text(_value(row, source.text), where)


def _from_alpaca(row: Any, _: SourceConfig, where: str) -> Iterator[Conversation]:
    instruction = _value(row, "instruction")
    given = "" if row.get("input") is None else _value(row, "input")
    yield _pair(_asked(instruction, given), _value(row, "output"), where)


def _from_self_instruct(row: Any, _: SourceConfig, where: str) -> Iterator[Conversation]:
    instruction = _value(row, "instruction")
    instances = _value(row, "instances", list)
    if not instances:
        raise _BadRecordError("no_instances", "instances is empty")
    for instance in instances:
        yield _pair(_asked(instruction, _value(instance, "input")), _value(instance, "output"), where)


def _asked(instruction: str, given: str) -> str:
    return f"{instruction}\n\n{given}" if given.strip() else instruction


def _from_messages(row: Any, source: SourceConfig, where: str) -> Iterator[Conversation]:
    turns = tuple(_turn(message) for message in _value(row, source.messages, list))
    if not turns:
        raise _BadRecordError("no_messages", "the conversation is empty")
    if turns[-1].role != "assistant":
        raise _BadRecordError("no_answer", f"the last message is by {turns[-1].role!r}, not the assistant")
    yield Conversation(turns, where)


def _turn(message: Any) -> Turn:
    role = _value(message, "role")
    if role not in ROLES:
        raise _BadRecordError("unknown_role", f"role {role!r} is not one of {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part) for part in content)
    if not isinstance(content, str):
        raise _BadRecordError("wrong_type", f"'content' is {type(content).__name__}, not text or a list of text parts")
    weight = message.get("loss_weight", 1) if message.get("loss", True) else 0
    if weight not in (0, 1):
        raise _BadRecordError("unknown_weight", f"loss_weight {weight!r} is neither 0 nor 1")
    return Turn(role, _sound(content), is_target=role == "assistant" and bool(weight))


def _part(part: Any) -> str:
    if not isinstance(part, dict) or part.get("type", "text") != "text":
        raise _BadRecordError("not_text", f"a content part is not text: {str(part)[:60]}")
    return _value(part, "text" if "text" in part else "value")


_CONVERTERS: dict[str, Callable[[Any, SourceConfig, str], Iterator[Conversation]]] = {
    "label": _from_label,
    "prompt_response": _from_pair,
    "messages": _from_messages,
    "alpaca": _from_alpaca,
    "self_instruct": _from_self_instruct,
    "text": _from_text,
}
# What names the columns of each schema: a field of the source, or the column itself.
_COLUMNS = {"label": ("text", "label"), "prompt_response": ("prompt", "response"), "text": ("text",), "messages": ("messages",),
            "alpaca": ("instruction", "output"), "self_instruct": ("instruction", "instances")}  # fmt: skip
