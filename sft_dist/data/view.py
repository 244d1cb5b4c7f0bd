"""What prepared shards look like to a person: in a terminal, or as one page to send to a colleague."""

from __future__ import annotations

import contextlib
import itertools
import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sft_dist import __version__
from sft_dist.data.shards import Shards
from sft_dist.data.tokenise import Tokenizer
from sft_dist.errors import DataError

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

_STYLES = {"target": "bold green", "context": "default", "padding": "dim", "boundary": "bold magenta"}
_SPLITS = ("train", "validation", "general", "labels")
_SHARES = ("fill", "target share")
_BLOCK_TOKENS = 1 << 20
_NUM_EXAMPLES = 3
_NUM_REJECTS = 3
_MOST_SAMPLES = 12  # of a row on the page: a row may hold thousands


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of tokens as text: learned (a target), or only read."""

    text: str
    is_target: bool


@dataclass(frozen=True, slots=True)
class Sample:
    """One document of a row, decoded; `start`, `tokens` and `targets` are in tokens, `number` counts from 0 in its row."""

    row: int
    number: int
    start: int
    tokens: int
    targets: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Survey:
    """Every document of a split, counted: `lengths[n]` have n tokens, int64 [seq_len + 1].

    `longest` and `shortest` are the places (row, start in tokens) of a few, the most extreme first.
    """

    lengths: np.ndarray
    longest: tuple[tuple[int, int], ...]
    shortest: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Bar:
    """A count with the words that go before it; `low` is where the bin of a histogram begins, in tokens."""

    label: str
    count: int
    low: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """A row decoded; `padding` is in tokens, `omitted` counts samples that are not in `samples`."""

    number: int
    samples: tuple[Sample, ...]
    padding: int
    omitted: int


@dataclass(frozen=True, slots=True)
class Split:
    """What is shown of a split; without a tokenizer nothing is decoded."""

    name: str
    numbers: dict[str, Any]
    bins: list[Bar]
    longest: tuple[Sample, ...] = ()
    shortest: tuple[Sample, ...] = ()
    rows: tuple[Row, ...] = ()


@dataclass(frozen=True, slots=True)
class Overview:
    """What is shown of a folder: `about` is its `prepare.json` ({} of a lone split), `rejects` the first of each reason."""

    folder: Path
    about: dict[str, Any]
    rejects: dict[str, list[dict[str, str]]]
    splits: list[Split]

    @property
    def funnel(self) -> list[Bar]:
        """Records read, dropped (a reason each, the most frequent first) and kept."""
        return funnel(self.about) if self.about else []


def funnel(about: Mapping[str, Any]) -> list[Bar]:
    """What a `prepare.json` counts: records read, dropped (a reason each, the most frequent first) and kept.

    >>> counted = {"read": 9, "drops": {"empty": 1, "duplicate": 3}, "train": 4, "validation": 1}
    >>> [(bar.label, bar.count) for bar in funnel({"funnel": counted})]
    [('read', 9), ('− duplicate', 3), ('− empty', 1), ('train', 4), ('validation', 1)]
    """
    counted = about["funnel"]
    drops = sorted(counted["drops"].items(), key=lambda item: -item[1])
    kept = [Bar(name, counted[name]) for name in ("train", "validation")]
    return [Bar("read", counted["read"]), *(Bar(f"− {reason}", count) for reason, count in drops), *kept]


def split_folders(folder: Path) -> list[Path]:
    """The splits in `folder`, training first, or `folder` itself where it is one.

    Raises DataError when there is none.
    """
    if (folder / "manifest.json").is_file():
        return [folder]
    found = sorted(path.parent for path in folder.glob("*/manifest.json"))
    if not found:
        raise DataError(f"{folder}: no shards there; run `sft-dist prepare RUN.yaml`, or name its prepare.out")
    return sorted(found, key=lambda path: _SPLITS.index(path.name) if path.name in _SPLITS else len(_SPLITS))


def overview(folder: Path, *, row: int | None = None, seed: int = 0) -> Overview:
    """Look through every split in `folder`; `row` of the first one is among the rows shown, the others are drawn by `seed`.

    Memory is that of a block of rows. Raises DataError for what is missing or damaged, and for a row that does not exist.
    """
    folders = split_folders(folder)
    is_whole = folders != [folder]
    tokens = folders[0].parent / "tokenizer"
    tokenizer = Tokenizer.load(str(tokens)) if tokens.is_dir() else None
    splits = [_split(path, tokenizer, row if path == folders[0] else None, seed) for path in folders]
    about = prepared(folder) if is_whole else {}
    return Overview(folder, about, _first_rejects(folder / "rejects.jsonl") if is_whole else {}, splits)


def _split(folder: Path, tokenizer: Tokenizer | None, row: int | None, seed: int) -> Split:
    shards = Shards.open(folder)
    found = survey(shards)
    split = Split(folder.name, statistics(shards, found), bins(found.lengths))
    if tokenizer is None:
        return split
    count = min(_NUM_EXAMPLES, shards.num_rows)
    drawn = sorted(np.random.default_rng(seed).choice(shards.num_rows, count, replace=False).tolist())
    numbers = drawn if row is None else [row, *(number for number in drawn if number != row)]
    return replace(
        split,
        longest=tuple(_sample_at(shards, tokenizer, *place) for place in found.longest),
        shortest=tuple(_sample_at(shards, tokenizer, *place) for place in found.shortest),
        rows=tuple(_row(shards, tokenizer, number) for number in numbers),
    )


def _sample_at(shards: Shards, tokenizer: Tokenizer, row: int, start: int) -> Sample:
    return next(sample for sample in samples(shards, tokenizer, row) if sample.start == start)


def _row(shards: Shards, tokenizer: Tokenizer, number: int) -> Row:
    found = samples(shards, tokenizer, number)
    padding = shards.seq_len - sum(sample.tokens for sample in found)
    return Row(number, tuple(found[:_MOST_SAMPLES]), padding, max(0, len(found) - _MOST_SAMPLES))


def prepared(folder: Path) -> dict[str, Any]:
    """What the `prepare.json` of a folder of shards says, {} where there is none. Raises DataError for a damaged one."""
    path = folder / "prepare.json"
    try:
        about = json.loads(path.read_bytes())
        funnel, _ = about["funnel"], (about["settings"]["prepare"], about["sources"])
        _ = funnel["read"], funnel["drops"], funnel["train"], funnel["validation"]
        return about
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: damaged; prepare again with `sft-dist prepare RUN.yaml --fresh`") from None


def _first_rejects(path: Path) -> dict[str, list[dict[str, str]]]:
    """The first drops of each reason, in the order of the file."""
    found: dict[str, list[dict[str, str]]] = {}
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                drop = json.loads(line)
                of_reason = found.setdefault(drop["reason"], [])
                if len(of_reason) < _NUM_REJECTS:
                    of_reason.append({"where": drop["where"], "detail": drop["detail"]})
            except (ValueError, KeyError, TypeError):
                raise DataError(
                    f"{path}:{number}: not a reject (reason, where, detail); prepare again with "
                    "`sft-dist prepare RUN.yaml --fresh`"
                ) from None
    return found


# What the rows hold


def survey(shards: Shards) -> Survey:
    """Count the documents of a split by length, and find the longest and the shortest (of equals, the first)."""
    lengths = np.zeros(shards.seq_len + 1, np.int64)
    extremes: dict[int, list[tuple[int, int, int]]] = {-1: [], 1: []}
    for rows, starts, tokens in _places(shards):
        lengths += np.bincount(tokens, minlength=len(lengths))
        for sign, kept in extremes.items():
            for place in np.argsort(sign * tokens, kind="stable")[:_NUM_EXAMPLES].tolist():
                kept.append((sign * int(tokens[place]), int(rows[place]), int(starts[place])))
            kept[:] = sorted(kept)[:_NUM_EXAMPLES]
    longest, shortest = (tuple((row, start) for _, row, start in extremes[sign]) for sign in (-1, 1))
    return Survey(lengths, longest, shortest)


def _places(shards: Shards) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(row, start in it, tokens) of every document, int64 [documents of a block] each: all that is asked of the layout."""
    step = max(1, _BLOCK_TOKENS // shards.seq_len)
    for first in range(0, shards.num_rows, step):
        stored = shards.stored(np.arange(first, min(first + step, shards.num_rows)))
        rows, starts = np.nonzero(np.unpackbits(stored.starts, axis=1, count=shards.seq_len))
        is_last = np.append(rows[1:] != rows[:-1], True)
        ends = np.where(is_last, stored.lengths.astype(np.int64)[rows], np.append(starts[1:], 0))
        yield rows + first, starts, ends - starts


def statistics(shards: Shards, found: Survey) -> dict[str, Any]:
    """Counts of a split, and how long its documents are in tokens."""
    manifest = shards.manifest
    return {
        "rows": manifest.rows,
        "tokens a row": manifest.seq_len,
        "samples": manifest.documents,
        "samples a row": manifest.documents_per_row,
        "tokens": manifest.tokens,
        "fill": manifest.fill,
        "target tokens": manifest.targets,
        "target share": manifest.targets / manifest.tokens,
        **{f"sample tokens, {name}": int(quantile(found.lengths, at)) for name, at in
           (("shortest", 0), ("median", 0.5), ("95 %", 0.95), ("longest", 1))},
    }  # fmt: skip


def quantile(lengths: np.ndarray, at: float) -> float:
    """What `np.quantile` says of the values n that `lengths[n]` counts.

    >>> quantile(np.array([0, 2, 0, 1]), 0.75)  # of 1, 1, 3
    2.0
    """
    place = at * (int(lengths.sum()) - 1)
    low, high = np.searchsorted(np.cumsum(lengths), [np.floor(place), np.ceil(place)], side="right").tolist()
    return low + (high - low) * (place % 1)


def bins(lengths: np.ndarray) -> list[Bar]:
    """A histogram of document lengths: two bins a doubling, and one of its own for documents that fill a row.

    `lengths[n]` documents have n tokens. From the first bin that is not empty to the last.

    >>> [(bar.label, bar.count) for bar in bins(np.array([0, 0, 5, 0, 0, 1, 0, 2, 4]))]
    [('2', 5), ('3', 0), ('4–5', 1), ('6–7', 2), ('8', 4)]
    """
    seq_len = len(lengths) - 1
    ladder = [1, *itertools.chain.from_iterable((1 << n, 3 << (n - 1)) for n in range(1, 63))]
    edges = [edge for edge in ladder if edge < seq_len] + [seq_len, seq_len + 1]
    counts = np.add.reduceat(lengths, edges[:-1]).tolist()
    found = [
        Bar(f"{low:,}" if high == low + 1 else f"{low:,}–{high - 1:,}", count, low)
        for (low, high), count in zip(itertools.pairwise(edges), counts, strict=True)
    ]
    filled = np.flatnonzero(counts)
    return found[filled[0] : filled[-1] + 1] if len(filled) else []


def samples(shards: Shards, tokenizer: Tokenizer, number: int) -> list[Sample]:
    """The documents of a row, decoded whole, in their order.

    Raises DataError for a row that does not exist.
    """
    if not 0 <= number < shards.num_rows:
        raise DataError(
            f"--row {number}: there are rows 0 to {shards.num_rows - 1} in {shards.folder}; choose one of these"
        )
    batch = shards.rows(np.array([number]))
    length = int(batch.lengths[0])
    tokens, targets, documents = (array[0, :length] for array in (batch.tokens, batch.targets, batch.documents))
    bounds = [0, *(np.flatnonzero(np.diff(documents)) + 1).tolist(), length]
    return [
        Sample(number, place, start, stop - start, int(targets[start:stop].sum()),
               _pieces(tokenizer, tokens[start:stop], targets[start:stop]))
        for place, (start, stop) in enumerate(itertools.pairwise(bounds))
    ]  # fmt: skip


def _pieces(tokenizer: Tokenizer, tokens: np.ndarray, targets: np.ndarray) -> tuple[Piece, ...]:
    runs = np.split(np.arange(len(tokens)), np.flatnonzero(np.diff(targets.astype(int))) + 1)
    return tuple(Piece(_spelled(tokenizer, tokens[run]), bool(targets[run[0]])) for run in runs)


def _spelled(tokenizer: Tokenizer, tokens: np.ndarray) -> str:
    """Text of a run with the end token visible; decoded together, since a character may span tokens."""
    return visible(tokenizer.inner.decode(tokens.tolist(), skip_special_tokens=False))


# How it is shown


def visible(text: str) -> str:
    r"""The text with what a terminal or a browser would obey, or hide, in its place as a sign; lines and tabs stay.

    >>> visible("a\x1b[31m\r\n\u202eb")
    'a␛[31m␍\n⟨U+202E⟩b'
    """
    return "".join(map(_sign, text)) if not text.isprintable() else text


def _sign(character: str) -> str:
    if character.isprintable() or character in "\n\t\u200c\u200d":  # the joiners are part of emoji and of scripts
        return character
    code = ord(character)
    if code < 0x20 or code == 0x7F:
        return chr(0x2421 if code == 0x7F else 0x2400 + code)
    return character if unicodedata.category(character) == "Zs" else f"⟨U+{code:04X}⟩"


def shortened(pieces: Sequence[Piece], head: int, tail: int) -> list[Piece]:
    """The first `head` and the last `tail` characters of a sample; what is left out between them is counted.

    >>> [piece.text for piece in shortened([Piece("abcdefgh" * 9, False), Piece("ij", True)], 3, 4)]
    ['abc', ' […67 characters…] ', 'gh', 'ij']
    """
    total = sum(len(piece.text) for piece in pieces)
    omitted = total - head - tail
    if omitted < 40:  # the words that say so are as long
        return list(pieces)
    note = Piece(f" […{omitted:,} characters…] ", False)
    return [*_cut(pieces, 0, head), note, *_cut(pieces, total - tail, total)]


def _cut(pieces: Sequence[Piece], begin: int, end: int) -> Iterator[Piece]:
    """Characters `begin` to `end` of the pieces together."""
    at = 0
    for piece in pieces:
        text = piece.text[max(0, begin - at) : max(0, end - at)]
        if text:
            yield Piece(text, piece.is_target)
        at += len(piece.text)


def shown(name: str, value: Any) -> str:
    """A number of `statistics` as people write it.

    >>> shown("fill", 0.9667), shown("tokens", 1234567), shown("samples a row", 3.5111)
    ('96.7 %', '1,234,567', '3.511')
    """
    if name in _SHARES:
        return f"{value * 100:.1f} %"
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"


def compact(count: int) -> str:
    """A count as short as the axis of a drawing wants it.

    >>> compact(500), compact(1_500), compact(2_000_000), compact(5_000_000_000)
    ('500', '1.5k', '2M', '5G')
    """
    size, letter = next(
        ((size, letter) for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")) if count >= size), (1, "")
    )
    return f"{count / size:g}{letter}"


def bar(count: int, most: int, width: int) -> str:
    """A bar of block characters, `width` long for `most`; never empty for a count that is not.

    >>> bar(3, 8, 4), bar(1, 10_000, 4), bar(0, 8, 4)
    ('█▌', '▏', '')
    """
    eighths = max(round(8 * width * count / most), 1) if count else 0
    return "█" * (eighths // 8) + "".join("▏▎▍▌▋▊▉"[eighths % 8 - 1 : eighths % 8])


def render_row(shards: Shards, tokenizer: Tokenizer, number: int) -> Text:
    """One row decoded: what is learned, what is only read, where documents begin, what is padding.

    Raises DataError for a row that does not exist.
    """
    from rich.text import Text

    found = samples(shards, tokenizer, number)
    text = Text("row ").append(str(number)).append(": ")
    for name, style in _STYLES.items():
        text.append(name, style).append("  ")
    for sample in found:
        text.append(f"\n⟦sample {sample.number}⟧ ", _STYLES["boundary"]).append_text(_coloured(sample.pieces))
    padding = shards.seq_len - sum(sample.tokens for sample in found)
    return text.append(f"\n⟦padding: {padding} tokens⟧", _STYLES["padding"]) if padding else text


def _coloured(pieces: Sequence[Piece]) -> Text:
    from rich.text import Text

    text = Text()
    for piece in pieces:
        if piece.is_target:
            text.append(f"⟪{piece.text}⟫", _STYLES["target"])
        else:
            text.append(piece.text, _STYLES["context"])
    return text


def render_overview(found: Overview) -> Group:
    """Everything for a terminal: the funnel, the splits, and of the first split its lengths and examples; the rejects."""
    from rich.console import Group
    from rich.text import Text

    first = found.splits[0]
    parts = [_bars("Records", found.funnel), _notes(found.about)] if found.about else []
    parts += [_table(found), _bars(f"Samples of {first.name} by length in tokens", first.bins)]
    for name, examples in (("Longest", first.longest), ("Shortest", first.shortest)):
        parts += [_examples(f"{name} samples of {first.name}", examples)] if examples else []
    parts += [_rejects(found)] if found.rejects else []
    parts.append(Text("--row N shows a row, --html FILE makes a page", "dim"))
    return Group(*(part for part in parts if part is not None))


def _bars(title: str, bars: Sequence[Bar]) -> Text:
    from rich.text import Text

    text, most = Text(f"{visible(title)}\n", "bold"), max(entry.count for entry in bars)
    label_width = max(len(entry.label) for entry in bars)
    for entry in bars:
        line = f"  {visible(entry.label):<{label_width}}  {entry.count:>13,}  {bar(entry.count, most, 36)}"
        text.append(line.rstrip() + "\n", "not bold")
    return text


def _notes(about: Mapping[str, Any]) -> Text | None:
    from rich.text import Text

    lines = [f"  {name}: {counted}\n" for name in ("mended", "long") if (counted := _listed(about["funnel"].get(name)))]
    return Text("".join(lines), "dim") if lines else None


def _listed(counts: Mapping[str, int] | None) -> str:
    return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in (counts or {}).items())


def _table(found: Overview) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(visible(str(found.folder))), title_justify="left")
    table.add_column("")
    for split in found.splits:
        table.add_column(Text(visible(split.name)), justify="right")
    for key in found.splits[0].numbers:
        table.add_row(key, *(shown(key, split.numbers[key]) for split in found.splits))
    return table


def _examples(title: str, examples: Sequence[Sample]) -> Text:
    from rich.text import Text

    text = Text("\n").append(f"{visible(title)}\n", "bold")
    for sample in examples:
        about = f"row {sample.row:,}, sample {sample.number:,}: {sample.tokens:,} tokens, {sample.targets:,} of them targets"
        text.append(f"  {about}\n", _STYLES["boundary"])
        text.append_text(_coloured(shortened(sample.pieces, 240, 120))).append("\n")
    return text


def _rejects(found: Overview) -> Text:
    from rich.text import Text

    text = Text("First rejects of each reason", "bold")
    for reason, drops in found.rejects.items():
        text.append(f"\n  {visible(reason)}\n", _STYLES["boundary"])
        text.append("\n".join(f"    {visible(drop['where'])}: {visible(drop['detail'])}" for drop in drops), "not bold")
    return text.append(f"\n  all: {visible(str(found.folder / 'rejects.jsonl'))}\n", "not bold dim")


# The page


def page(found: Overview) -> str:
    """The overview as one HTML file that loads nothing, runs nothing, and follows the reader's light or dark."""
    import jinja2

    # `finalize` sees every value that is put in: control characters become signs, then autoescape does the rest
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    environment.filters |= {"commas": "{:,}".format, "listed": _listed, "compact": compact}
    template = environment.from_string(Path(__file__).with_name("inspect.html.jinja").read_text("utf-8"))
    prepare = found.about["settings"]["prepare"] if found.about else {}
    return template.render(
        found=found,
        version=__version__,
        shown=shown,
        shortened=shortened,
        histogram=histogram,
        settings=dict(_flat(prepare)),
        template=prepare.get("template"),
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Settings by their dotted key, as in the run file; the template and the sources have places of their own."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{name}.")
        elif name not in ("template", "sources", "validation_sources", "general"):
            yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Chart:
    """A histogram in the units of its drawing: `bars` are (x, y, width, height, Bar), `ticks` (y, count) of the grid."""

    width: int
    height: int
    left: int
    bottom: int
    bars: list[tuple[float, float, float, float, Bar]]
    ticks: list[tuple[float, int]]


def histogram(entries: Sequence[Bar]) -> Chart:
    """Where the bars and the grid lines of a histogram stand, y downwards.

    >>> chart = histogram([Bar("1", 5, 1), Bar("2", 10, 2)])
    >>> [(x, y, width, height) for x, y, width, height, _ in chart.bars]
    [(58.0, 109.0, 207.0, 85.0), (267.0, 24.0, 207.0, 170.0)]
    >>> [count for _, count in chart.ticks]
    [0, 5, 10]
    """
    width, height, left, top, bottom = 480, 240, 57, 24, 194
    most = max(entry.count for entry in entries)
    step = _round_step(most)
    top_count = -(-most // step) * step
    scale, slot = (bottom - top) / top_count, (width - left - 5) / len(entries)
    bars = []
    for number, entry in enumerate(entries):
        tall = max(entry.count * scale, 1.5) if entry.count else 0.0  # one document among millions is still seen
        x, y, width_of_bar = (round(place, 2) for place in (left + number * slot + 1, bottom - tall, slot - 2))
        bars.append((x, y, width_of_bar, round(tall, 2), entry))
    ticks = [(round(bottom - count * scale, 2), count) for count in range(0, top_count + 1, step)]
    return Chart(width, height, left, bottom, bars, ticks)


def _round_step(most: int) -> int:
    """The distance of two to five grid lines: 1, 2 or 5 and zeros."""
    steps = (digit * 10**power for power in range(20) for digit in (1, 2, 5))
    return next(step for step in steps if most <= 4 * step)
