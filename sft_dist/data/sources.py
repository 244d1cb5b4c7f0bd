"""Rows out of files of any kind, whole or a slice at a time, in bounded memory: each with its place, or dropped with it."""

from __future__ import annotations

import csv
import difflib
import functools
import glob
import gzip
import hashlib
import io
import itertools
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from sft_dist.data import token_files
from sft_dist.data.records import Drop
from sft_dist.errors import DataError
from sft_dist.schema import Column, SourceConfig

HUB = "hf:"
MAX_LINE_BYTES = 64 << 20
_MAX_FIELD_CHARACTERS = 16 << 20  # the csv reader holds four bytes a character
_PIECE_BYTES = 1 << 20
_SCAN_BYTES = 8 << 20
_ZSTD_INPUT_BYTES = 4 << 10  # a hostile file holds 128 KiB in 4 bytes: so little input makes 128 MiB at the most
_BATCH_ROWS = 256
_BOM = b"\xef\xbb\xbf"
_SUFFIXES = {
    ".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".txt": "txt", ".parquet": "parquet"
}  # fmt: skip
_COMPRESSED = (".gz", ".zst")
_TOKEN_KINDS = ("megatron", "nanogpt")
_HEADING = re.compile(r"^ ?= [^=](.*[^=])? = ?$")  # WikiText's ` = Title = `, not ` = = Section = = `
_SPACE = re.compile(r"[ \t\n\r]*")

Row = tuple[str, Any]  # (where, the row's value or its Drop)
Check = Callable[[Sequence[Any]], list[Any]]  # the columns of a table → those to be read; raises for a missing one


@dataclass(frozen=True, slots=True)
class Slice:
    """A piece of one source file that can be read alone.

    `begin` and `end` count bytes of lines, row groups of parquet, documents of megatron, tokens of nanogpt, rows of a set
    on the hub. `first_line` is the 1-based number of its first line or record, `is_whole` says that it is all of the file.

    >>> Slice("chats.jsonl", "jsonl", begin=0, end=4096, first_line=1, is_whole=False).kind
    'jsonl'
    """

    path: str
    kind: str
    begin: int
    end: int
    first_line: int
    is_whole: bool


class _DuplicateKeyError(ValueError):
    """A JSON object has a key twice, so that one of the values would be lost."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _DuplicateKeyError(f"the key {twice[:60]!r} is there twice")
    return made


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_number)
_LENIENT = json.JSONDecoder()


def files(source: SourceConfig) -> list[Path]:
    """The files of a source, sorted: one file, a glob's matches, or a folder's files of a known suffix; none for `hf:`.

    Raises DataError when there are none.
    """
    if source.path.startswith(HUB):
        return []
    path = Path(source.path)
    if source.format == "megatron" and not path.is_dir() and path.with_name(path.name + ".bin").is_file():
        return [path.with_name(path.name + ".bin")]  # Megatron's users name a pair by what its names share
    if path.is_file():
        is_index = source.format == "megatron" and path.suffix == ".idx"
        return [path.with_suffix(".bin") if is_index else path]
    is_tokens = source.format in _TOKEN_KINDS
    if path.is_dir():
        found = [p for p in path.iterdir() if (p.suffix == ".bin" if is_tokens else _plain_suffix(p) in _SUFFIXES)]
    else:
        found = [p for p in map(Path, glob.glob(source.path, recursive=True)) if p.is_file()]
        found = [p for p in found if p.suffix == ".bin"] if is_tokens else found
    if found:
        return sorted(found)
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")], n=1)
    hint = f"did you mean {path.parent / near[0]}?" if near else "paths are relative to the current directory"
    raise DataError(f"prepare.sources: {source.path!r}: no such file; {hint}")


def _plain_suffix(path: Path) -> str:
    """The suffix without that of a compression.

    >>> _plain_suffix(Path("chats.jsonl.gz"))
    '.jsonl'
    """
    return Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix


def kind_of(path: Path, source: SourceConfig) -> str:
    """The format of a file: what the source says, or its suffix. Raises DataError for one that is not known.

    >>> kind_of(Path("a.csv.gz"), SourceConfig(path="a.csv.gz")), kind_of(Path("a"), SourceConfig(path="a", delimiter=";"))
    ('csv', 'csv')
    """
    kind = source.format or ("csv" if source.delimiter else _SUFFIXES.get(_plain_suffix(path)))
    if kind is None:
        raise DataError(
            f"{path}: unknown format {path.suffix!r} (a file of pickled objects is never opened); name it with format: "
            "jsonl, json, csv, tsv, txt, parquet, megatron or nanogpt, or convert it to jsonl"
        )
    if kind in ("csv", "tsv"):
        kind = "tsv" if (source.delimiter or {"csv": ",", "tsv": "\t"}[kind]) == "\t" else "csv"
    if path.suffix in _COMPRESSED and kind in ("parquet", *_TOKEN_KINDS):
        raise DataError(f"{path}: {kind} is read in place, not out of {path.suffix}; decompress the file")
    return kind


def digest(path: Path | str, source: SourceConfig | None = None) -> str:
    """What tells whether a file's content is still the same: 32 hexadecimal digits; for `hf:ID` the set's fingerprint.

    The .idx beside a Megatron .bin counts as a part of it. `source` gives the subset and split of a set on the hub.
    """
    if str(path).startswith(HUB):
        return str(_hub(str(path), source.subset if source else None, source.split if source else "train")._fingerprint)
    path = Path(path)
    index = path.with_suffix(".idx")
    sums = [_blake2b(part) for part in ([path, index] if path.suffix == ".bin" and index.is_file() else [path])]
    return sums[0] if len(sums) == 1 else hashlib.blake2b("".join(sums).encode(), digest_size=16).hexdigest()


def _blake2b(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def slices(source: SourceConfig, slice_bytes: int) -> list[Slice]:
    """All the pieces of a source in order, each about `slice_bytes`, the same whoever asks; none for an empty file.

    Lines are cut at the first line start at or after each multiple; what cannot be cut (quoted csv, json, txt, anything
    compressed) is one piece. Raises DataError as `files` and `kind_of` do, and for a table or token file that is damaged.
    """
    if source.path.startswith(HUB):
        data = _hub(source.path, source.subset, source.split)
        step = max(1, slice_bytes * len(data) // max(1, data.data.nbytes))
        return _ranges(source.path, "hf", len(data), step)
    return [piece for path in files(source) for piece in _file_slices(path, kind_of(path, source), slice_bytes)]


def _file_slices(path: Path, kind: str, slice_bytes: int) -> list[Slice]:
    if kind in ("jsonl", "tsv") and path.suffix not in _COMPRESSED:
        return _line_slices(path, kind, slice_bytes)
    if kind == "parquet":
        return _group_slices(path, slice_bytes)
    size = path.stat().st_size
    if kind == "megatron":
        count = token_files.megatron(path).num_documents
        return _ranges(str(path), kind, count, max(1, slice_bytes * count // max(1, size)))
    if kind == "nanogpt":
        return _ranges(str(path), kind, len(token_files.nanogpt(path)), max(1, slice_bytes // 2))
    return [whole(path, kind)] if size else []


def whole(path: Path, kind: str) -> Slice:
    """A file of bytes as one slice."""
    return Slice(str(path), kind, 0, path.stat().st_size, first_line=1, is_whole=True)


def _ranges(path: str, kind: str, count: int, step: int) -> list[Slice]:
    """
    >>> [(piece.begin, piece.end, piece.first_line) for piece in _ranges("a.bin", "nanogpt", count=5, step=2)]
    [(0, 2, 1), (2, 4, 3), (4, 5, 5)]
    """
    return [
        Slice(path, kind, begin, min(begin + step, count), begin + 1, step >= count) for begin in range(0, count, step)
    ]


def _line_slices(path: Path, kind: str, slice_bytes: int) -> list[Slice]:
    """One pass that only counts line ends, so that a slice knows the number of its first line."""
    cuts, line, position, target = [(0, 1)], 1, 0, slice_bytes
    with path.open("rb") as file:
        while chunk := file.read(_SCAN_BYTES):
            counted = 0
            while target - 1 < position + len(chunk):
                found = chunk.find(b"\n", max(0, target - 1 - position))
                if found < 0:
                    break
                line += chunk.count(b"\n", counted, found + 1)
                counted = found + 1
                cuts.append((position + counted, line))
                target = ((position + counted) // slice_bytes + 1) * slice_bytes
            line += chunk.count(b"\n", counted)
            position += len(chunk)
    cuts = [cut for cut in cuts if cut[0] < position]  # a cut behind the last line would begin nothing
    ends = [begin for begin, _ in cuts[1:]] + [position]
    return [
        Slice(str(path), kind, begin, end, first_line, is_whole=len(cuts) == 1)
        for (begin, first_line), end in zip(cuts, ends, strict=False)  # of an empty file there are no cuts
    ]


def _group_slices(path: Path, slice_bytes: int) -> list[Slice]:
    """Runs of row groups of at least `slice_bytes` (uncompressed)."""
    about = _parquet(path).metadata
    made, begin, held, row = [], 0, 0, 1
    next_row = 1
    for group in range(about.num_row_groups):
        held += about.row_group(group).total_byte_size
        next_row += about.row_group(group).num_rows
        if held >= slice_bytes or group + 1 == about.num_row_groups:
            is_whole = begin == 0 and group + 1 == about.num_row_groups
            made.append(Slice(str(path), "parquet", begin, group + 1, row, is_whole))
            begin, held, row = group + 1, 0, next_row
    return made


def rows(
    piece: Slice, source: SourceConfig, *, is_headed: bool = True, check: Check = list, eos_id: int | None = None
) -> Iterator[Row]:
    """(where, value) of every row of a slice, in order: a JSON value, {column: value}, text, ids uint32, or a Drop.

    Raises DataError for what concerns the whole file: damaged, not of its format, or refused by `check`.
    """
    count = 0
    try:
        for row in _reader(piece, source, is_headed, check, eos_id):
            yield row
            count += 1
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{piece.path}: the compressed stream is damaged or cut short ({error}) after {count:,} records were read; "
            "download or compress the file again"
        ) from None


def _reader(piece: Slice, source: SourceConfig, is_headed: bool, check: Check, eos_id: int | None) -> Iterable[Row]:
    match piece.kind:
        case "jsonl":
            return _json_lines(piece)
        case "json":
            return _json_list(piece)
        case "tsv":
            return _tab_lines(piece, is_headed, check)
        case "csv":
            return _quoted_lines(piece, source.delimiter or ",", is_headed, check)
        case "txt":
            return _articles(piece)
        case "parquet":
            return _parquet_rows(piece, check)
        case "megatron":
            return token_files.megatron_documents(Path(piece.path), piece.begin, piece.end)
        case "nanogpt":
            return token_files.nanogpt_texts(Path(piece.path), piece.begin, piece.end, eos_id)
    return _hub_rows(piece, source, check)


def _open(path: str) -> BinaryIO:
    """The bytes of a file, decompressed."""
    if path.endswith(".gz"):
        return io.BufferedReader(gzip.open(path), _PIECE_BYTES)
    if path.endswith(".zst"):
        return io.BufferedReader(_ZstdStream(_zstandard(path), path), _PIECE_BYTES)
    return open(path, "rb")


def _zstandard(path: str) -> Any:
    try:
        import zstandard
    except ImportError:
        raise DataError(f"{path}: reading .zst needs the package zstandard; pip install 'sft-dist[zstd]'") from None
    return zstandard


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes of a .zst of one or more frames; unlike the package's own reader it sees one that is cut short."""

    def __init__(self, zstandard: Any, path: str) -> None:
        self._zstandard = zstandard
        self._file = io.FileIO(path)
        self._frame: Any = None
        self._input: bytes = b""
        self._ready: bytes | memoryview = b""

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._ready and self._has_more():
            pass
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _has_more(self) -> bool:
        chunk = self._input or self._file.read(_ZSTD_INPUT_BYTES)
        if not chunk:
            if self._frame is not None:
                raise EOFError("a zstd frame has no end")
            return False
        self._frame = self._frame or self._zstandard.ZstdDecompressor().decompressobj()
        try:
            self._ready = memoryview(self._frame.decompress(chunk))
        except self._zstandard.ZstdError as error:
            raise EOFError(str(error)) from None
        self._input = b""
        if self._frame.eof:
            self._input, self._frame = self._frame.unused_data, None
        return True


def _lines(piece: Slice) -> Iterator[tuple[int, bytes | None]]:
    """(number, bytes) of each line of a slice; None for one of more than MAX_LINE_BYTES, which is never held."""
    number, position = piece.first_line, piece.begin
    end = sys.maxsize if piece.path.endswith(_COMPRESSED) else piece.end
    with _open(piece.path) as file:
        if position:
            file.seek(position)
        while position < end and (read := file.readline(_PIECE_BYTES)):
            position += len(read)
            line: bytes | None = read
            if len(read) == _PIECE_BYTES and read[-1] != 10:
                line, more = _long_line(file, read)
                position += more
            if number == 1 and line is not None:
                line = line.removeprefix(_BOM)
            yield number, line
            number += 1


def _long_line(file: BinaryIO, start: bytes) -> tuple[bytes | None, int]:
    """(the whole line, or None when it is too long; bytes read) of a line that has only begun."""
    parts, size = [start], len(start)
    while part := file.readline(_PIECE_BYTES):
        size += len(part)
        if size <= MAX_LINE_BYTES:
            parts.append(part)
        else:
            parts.clear()
        if part[-1] == 10:
            break
    return (b"".join(parts) if size <= MAX_LINE_BYTES else None), size - len(start)


def _too_long(where: str) -> Drop:
    return Drop("line_too_long", where, f"a line of more than {MAX_LINE_BYTES:,} bytes; split it, or is it no text?")


def _invalid_utf8(where: str, error: UnicodeDecodeError) -> Drop:
    return Drop("invalid_utf8", where, f"byte {error.start} of the line: {error.reason}")


def _json_lines(piece: Slice) -> Iterator[Row]:
    path, decode = piece.path, _DECODER.decode
    for number, line in _lines(piece):
        where = f"{path}:{number}"
        if line is None:
            yield where, _too_long(where)
            continue
        try:
            value = decode(line.decode())
        except UnicodeDecodeError as error:
            value = _invalid_utf8(where, error)
        except (ValueError, RecursionError) as error:
            if not line.strip():
                continue
            value = _bad_json(where, error)
        yield where, value


def _bad_json(where: str, error: Exception) -> Drop:
    return Drop("duplicate_key" if isinstance(error, _DuplicateKeyError) else "invalid_json", where, str(error))


def _json_list(piece: Slice) -> Iterator[Row]:
    with _open(piece.path) as file:
        content = file.read()
    try:
        text = content.decode("utf-8-sig")
        del content
        place = _after_space(text, 0)
        if place < len(text) and text[place] != "[":
            name = type(json.loads(text)).__name__
            raise DataError(f"{piece.path}: a list of records is expected, this is {name}; use jsonl for one a line")
        if place < len(text):
            yield from _elements(text, place + 1, piece.path)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{piece.path}: not JSON: {error}; mend the file, or name another format") from None


def _elements(text: str, place: int, path: str) -> Iterator[Row]:
    """The elements of a JSON list one by one, `place` being behind its bracket. Raises ValueError for a wrong character."""
    place = _after_space(text, place)
    for number in itertools.count(1) if not text.startswith("]", place) else ():
        where = f"{path}:#{number}"
        try:
            value, place = _DECODER.raw_decode(text, place)
        except ValueError as error:
            _, place = _LENIENT.raw_decode(text, place)  # raises when it isn't JSON at all: where it ends is unknown
            value = _bad_json(where, error)
        yield where, value
        place = _after_space(text, place)
        if not text.startswith(",", place):
            break
        place = _after_space(text, place + 1)
    if not text.startswith("]", place):
        raise json.JSONDecodeError("Expecting ',' or ']'", text, place)
    if _after_space(text, place + 1) < len(text):
        raise json.JSONDecodeError("Extra data", text, place + 1)


def _after_space(text: str, place: int) -> int:
    return _SPACE.match(text, place).end()  # type: ignore[union-attr]


def _text_lines(piece: Slice) -> Iterator[tuple[int, str | Drop]]:
    """(number, text without its line end) of each line; a carriage return elsewhere stays."""
    for number, line in _lines(piece):
        where = f"{piece.path}:{number}"
        if line is None:
            yield number, _too_long(where)
            continue
        try:
            yield number, line.decode().removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            yield number, _invalid_utf8(where, error)


def _tab_lines(piece: Slice, is_headed: bool, check: Check) -> Iterator[Row]:
    """Rows between tabs, where a quote is an ordinary character; any slice finds the header at the file's start."""
    header, header_line = None, 0
    if is_headed:
        header_line, header = _header(piece.path)
        check(header)
    for number, line in _text_lines(piece):
        where = f"{piece.path}:{number}"
        if isinstance(line, Drop):
            yield where, line
        elif line and number > header_line:
            yield where, _cells(line.split("\t"), header, where)


def _header(path: str) -> tuple[int, list[str]]:
    """(its line, the columns) of a file between tabs."""
    for number, line in _text_lines(Slice(path, "tsv", 0, sys.maxsize, 1, True)):
        if isinstance(line, Drop):
            raise DataError(f"{path}: the header cannot be read ({line.reason}: {line.detail}); mend line {number}")
        if line:
            return number, line.split("\t")
    return 0, []


def _cells(cells: list[str], header: list[str] | None, where: str) -> Any:
    if header is None:
        return dict(enumerate(cells))
    if any(cells[len(header) :]):
        return Drop("invalid_csv", where, f"{len(cells)} fields, the header has {len(header)}")
    return dict(zip(header, cells, strict=False))


def _quoted_lines(piece: Slice, delimiter: str, is_headed: bool, check: Check) -> Iterator[Row]:
    """Rows of which a field in quotes may hold delimiters and line ends."""
    path, bad_lines = piece.path, []
    last = 0  # number of the last line handed to the csv reader, whose own count knows nothing of dropped lines

    def texts() -> Iterator[str]:
        nonlocal last
        for number, line in _text_lines(piece):
            if isinstance(line, Drop):
                bad_lines.append((line.where, line))
            else:
                last = number
                yield line + "\n"

    csv.field_size_limit(_MAX_FIELD_CHARACTERS)  # the module's default, 128 KiB, is less than a long document
    reader = csv.reader(texts(), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        begin = last + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            if "unexpected end" in str(error) or "field limit" in str(error):  # it has swallowed the rest of the file
                raise DataError(f"{path}: a quote opened after line {begin - 1} never closes; mend it") from None
            yield f"{path}:{last}", Drop("invalid_csv", f"{path}:{last}", str(error))
            continue
        yield from bad_lines
        begin += len(bad_lines)
        bad_lines.clear()
        if row is None:
            return
        if is_headed and header is None and row:
            header = row
            check(header)
        elif row:
            yield f"{path}:{begin}", _cells(row, header, f"{path}:{begin}")


def _articles(piece: Slice) -> Iterator[Row]:
    """Plain text: blank lines go; a new document starts at a WikiText title, or, without titles, after a blank line.

    One of more than MAX_LINE_BYTES characters comes in pieces.
    """
    start, size = 1, 0
    held: list[str] = []
    has_titles = any(is_title for _, _, is_title in _marked(piece))
    for number, line, is_title in _marked(piece):
        if isinstance(line, Drop):
            yield line.where, line
            continue
        is_end = size > MAX_LINE_BYTES or (is_title if has_titles else not line.strip())
        if held and is_end:
            yield f"{piece.path}:{start}", "\n".join(held)
            held, size = [], 0
        if line.strip():
            start = start if held else number
            held.append(line.strip())
            size += len(line)
    if held:
        yield f"{piece.path}:{start}", "\n".join(held)


def _marked(piece: Slice) -> Iterator[tuple[int, str | Drop, bool]]:
    """(number, line, whether it is a title) of each line: a title has a blank line on both sides (tables do not)."""
    before, held = "", None
    for number, line in itertools.chain(_text_lines(piece), [(0, "")]):
        is_blank = isinstance(line, str) and not line.strip()
        if held is not None:
            yield (*held, is_blank and not before.strip() and bool(_HEADING.match(str(held[1]))))
            before = str(held[1])
        held = (number, line)


def _parquet(path: Path) -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{path}: reading parquet needs the package pyarrow; pip install 'sft-dist[parquet]'") from None
    try:
        return parquet.ParquetFile(path, pre_buffer=False, buffer_size=_PIECE_BYTES)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not parquet ({_one_line(error)}); copy it again, or name another format") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _parquet_rows(piece: Slice, check: Check) -> Iterator[Row]:
    import pyarrow

    file = _parquet(Path(piece.path))
    columns = check(file.schema_arrow.names)
    number = piece.first_line
    try:
        for batch in file.iter_batches(_BATCH_ROWS, range(piece.begin, piece.end), columns, use_threads=False):
            yield from _arrow_rows(batch, piece.path, number)
            number += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{piece.path}: damaged after {number - 1:,} rows ({_one_line(error)}); copy the file again"
        ) from None


def _arrow_rows(batch: Any, path: str, number: int) -> Iterator[Row]:
    """Rows of an Arrow batch or table as objects; when one cannot be converted, each is tried alone."""
    try:
        values = batch.to_pylist()
    except (ValueError, OverflowError):
        values = [_arrow_row(batch.slice(at, 1), f"{path}:#{number + at}") for at in range(batch.num_rows)]
    for at, value in enumerate(values):
        yield f"{path}:#{number + at}", value


def _arrow_row(row: Any, where: str) -> Any:
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError as error:
        return Drop("invalid_utf8", where, f"byte {error.start} of a value: {error.reason}")
    except (ValueError, OverflowError) as error:
        return Drop("wrong_type", where, _one_line(error))


@functools.lru_cache(maxsize=4)
def _hub(name: str, subset: str | None, split: str) -> Any:
    """A dataset of the Hugging Face hub, downloaded once; it may also be a folder that the library can read."""
    try:
        import datasets
    except ImportError:
        raise DataError(f"{name}: sets on the hub need the package datasets; pip install 'sft-dist[hub]'") from None
    try:
        return datasets.load_dataset(name.removeprefix(HUB), subset, split=split, streaming=False).with_format("arrow")
    except Exception as error:  # whatever the library, its HTTP client or a builder raises, the remedy is the same
        raise DataError(
            f"{name}: subset {subset!r}, split {split!r} cannot be loaded ({type(error).__name__}: {_one_line(error)}); check "
            "the id, subset and split, the network and the login, or download it and name the files"
        ) from None


def _hub_rows(piece: Slice, source: SourceConfig, check: Check) -> Iterator[Row]:
    data = _hub(source.path, source.subset, source.split)
    data = data.select_columns(check(data.column_names))
    for begin in range(piece.begin, piece.end, _BATCH_ROWS):
        table = data[begin : min(begin + _BATCH_ROWS, piece.end)]
        yield from _arrow_rows(table, source.path, begin + 1)


def first_rows(source: SourceConfig, count: int, *, is_headed: bool = True) -> list[Row]:
    """Up to `count` rows of the first file that has any. Raises DataError as `rows` does."""
    if source.path.startswith(HUB):
        pieces = iter(slices(source, sys.maxsize))
    else:
        pieces = (
            piece
            for path in files(source)
            for kind in [kind_of(path, source)]
            for piece in (_group_slices(path, 1)[:1] if kind == "parquet" else [whole(path, kind)])
        )
    found = (list(itertools.islice(rows(piece, source, is_headed=is_headed), count)) for piece in pieces)
    return next((some for some in found if some), [])


def columns_missing(path: str, names: Sequence[Any], wanted: Sequence[Column]) -> None:
    """Raise DataError, with the nearest name there is, when a table lacks a column that is named."""
    for column in wanted:
        if isinstance(column, str) and column not in names:
            near = difflib.get_close_matches(column, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "name the right ones in the source"
            raise DataError(f"{path}: no column {column!r}; the columns are {', '.join(map(repr, names))}; {hint}")
