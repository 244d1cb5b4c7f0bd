"""Line charts, once as numbers: drawn as a part of a page that needs no script, or as a PNG by matplotlib."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from sft_dist.errors import ConfigError

# Told apart with every kind of colour vision, and on either ground: (light, dark), after Okabe and Ito.
COLOURS = (
    ("#0069b4", "#5db2f5"),
    ("#c44e00", "#ff9152"),
    ("#007f5f", "#33c997"),
    ("#a8447c", "#ec94c2"),
    ("#8a6a00", "#e3bf3d"),
    ("#52596b", "#a9b4c8"),
)
DASHES = ((), (7.0, 4.0), (2.0, 3.0))  # then the colours begin again, dashed
MOST_LINES = len(COLOURS) * len(DASHES)
_MOST_POINTS = 600  # of a line that is drawn
_MOST_COLUMNS = 90  # where numbers are told under the pointer
_LOG_RATIO = 12.0

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Line:
    """Points by x; `slot` chooses colour and dash. `faint`: what a smoother line is drawn over; `dots`: each point is one.

    `buckets`: a histogram; each point is where a bucket begins and its height, the last one where they end, at 0.
    """

    label: str
    points: tuple[Point, ...]
    slot: int
    style: Literal["line", "faint", "dots", "buckets"] = "line"

    @property
    def largest_gap(self) -> float:
        """The longest way between two of its points that is no gap."""
        return math.inf if self.style == "buckets" else largest_gap(self.points)


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened at an x."""

    x: float
    text: str


@dataclass(frozen=True, slots=True)
class Chart:
    """What is drawn; `name` is that of its file. `unit` says what y is in. `note` is told below."""

    name: str
    title: str
    unit: str
    lines: tuple[Line, ...]
    x_label: str = "step"
    note: str = ""
    marks: tuple[Mark, ...] = ()
    from_zero: bool = False
    is_log_x: bool = False

    @property
    def is_log(self) -> bool:
        """Whether y has to be logarithmic for its lower values to be seen."""
        values = [y for line in self.lines for _, y in line.points]
        return not self.from_zero and min(values) > 0 and max(values) / min(values) > _LOG_RATIO

    def x_range(self) -> tuple[float, float]:
        """From the first to the last x."""
        xs = [x for line in self.lines for x, _ in line.points]
        return (min(xs), max(xs)) if min(xs) < max(xs) else (min(xs) - 0.5, max(xs) + 0.5)

    def x_ticks(self) -> list[float]:
        """Round numbers within that range; there is no step between two steps."""
        if self.is_log_x:
            return log_ticks(*self.x_range())
        return [x for x in ticks(*self.x_range(), 6) if self.x_label != "step" or x == int(x)]

    def y_range(self) -> tuple[float, float]:
        """With a little room, to whole ticks where it begins at zero."""
        values = [y for line in self.lines for _, y in line.points]
        low, high = (0.0 if self.from_zero else min(values)), max(values)
        if self.is_log:
            room = (high / low) ** 0.05
            return low / room, high * room
        room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        return (0.0, high + room) if self.from_zero else (low - room, high + room)


def thinned(points: Sequence[Point], most: int = _MOST_POINTS) -> list[Point]:
    """At most about so many points, the lowest and the highest of each stretch, so that no spike is lost.

    >>> thinned([(x, float(x == 57)) for x in range(100)], 4)
    [(0, 0.0), (50, 0.0), (57, 1.0), (99, 0.0)]
    """
    if len(points) <= most:
        return list(points)
    ys = np.array([y for _, y in points])
    kept = {0, len(points) - 1}
    for part in np.array_split(np.arange(len(points)), max(1, most // 2)):
        kept |= {int(part[ys[part].argmin()]), int(part[ys[part].argmax()])}
    return [points[place] for place in sorted(kept)]


def smoothed(points: Sequence[Point], window: int) -> list[Point]:
    """Each y as the mean of up to `window` points around it; fewer at both ends.

    >>> smoothed([(1, 1.0), (2, 4.0), (3, 1.0), (4, 6.0)], 3)
    [(1, 2.5), (2, 2.0), (3, 3.6666666666666665), (4, 3.5)]
    """
    half = window // 2
    sums = np.concatenate([[0.0], np.cumsum([y for _, y in points])])
    places = np.arange(len(points))
    low, high = np.maximum(0, places - half), np.minimum(len(points), places + half + 1)
    means = (sums[high] - sums[low]) / (high - low)
    return [(x, float(mean)) for (x, _), mean in zip(points, means, strict=True)]


def stretches(points: Sequence[Point], largest_gap: float = math.inf) -> list[list[Point]]:
    """The points in runs without a gap in x: nothing is drawn where nothing is known.

    >>> stretches([(1, 0.0), (2, 0.0), (9, 0.0)], 3)
    [[(1, 0.0), (2, 0.0)], [(9, 0.0)]]
    """
    made: list[list[Point]] = []
    for point in points:
        if made and point[0] - made[-1][-1][0] <= largest_gap:
            made[-1].append(point)
        else:
            made.append([point])
    return made


def largest_gap(points: Sequence[Point]) -> float:
    """The longest way between two points that is no gap: three times the usual one."""
    ways = sorted(later[0] - earlier[0] for earlier, later in itertools.pairwise(points))
    return 3 * ways[len(ways) // 2] if ways else math.inf


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Up to `count` or so round numbers within a range.

    >>> ticks(0.7, 3.2), ticks(0, 729, 6)
    ([1.0, 1.5, 2.0, 2.5, 3.0], [0.0, 200.0, 400.0, 600.0])
    """
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= raw * 0.999)
    return [
        round(number * step, 12) for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers on a logarithmic axis.

    >>> log_ticks(0.03, 12.0)
    [0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    digits = (1, 2, 5) if len(powers) <= 5 else (1,)
    found = [digit * 10.0**power for power in powers for digit in digits]
    return [round(tick, 12) for tick in found if low <= tick <= high]


def short(value: float) -> str:
    """A number as an axis wants it.

    >>> short(0.0003), short(2.5), short(12_000), short(3.2e9), short(0.0)
    ('3e-4', '2.5', '12k', '3.2G', '0')
    """
    if value and abs(value) < 0.01:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.4g}"


def exact(value: float) -> str:
    """A number as a person reads it: five significant digits, thousands apart.

    >>> exact(2.3456789), exact(1234567.0), exact(0.0000312), exact(12)
    ('2.3457', '1,234,567', '3.12e-05', '12')
    """
    if float(value).is_integer() or abs(value) >= 1e5:
        return f"{value:,.0f}"
    return f"{value:,.5g}" if abs(value) < 10_000 else f"{value:,.1f}"


@dataclass(frozen=True, slots=True)
class Drawn:
    """A line in the units of its drawing, 1000 wide and 1000 high, y downwards: a path, or the places of dots."""

    line: Line
    path: str
    dots: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Column:
    """What is told under the pointer: from `left` so wide, in per cent; `at` where the values lie.

    `until`: where a bucket ends that begins at `x`.
    """

    left: float
    width: float
    at: float
    x: float
    values: tuple[tuple[Line, float], ...]
    until: float | None = None


@dataclass(frozen=True, slots=True)
class Drawing:
    """A chart laid out for a page: ticks are (per cent from left or top, text)."""

    chart: Chart
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    marks: list[tuple[float, Mark]]
    lines: list[Drawn]
    columns: list[Column]


def lay_out(chart: Chart) -> Drawing:
    """Where everything of a chart stands."""
    (left, right), (low, high), is_log = chart.x_range(), chart.y_range(), chart.is_log

    def across(x: float) -> float:
        return math.log(x / left) / math.log(right / left) if chart.is_log_x else (x - left) / (right - left)

    def down(y: float) -> float:
        return 1 - (math.log(y / low) / math.log(high / low) if is_log else (y - low) / (high - low))

    drawn = []
    for line in chart.lines:
        places = [
            [(round(1000 * across(x), 1), round(1000 * down(y), 1)) for x, y in thinned(part)]
            for part in stretches(line.points, line.largest_gap)
        ]
        if line.style == "buckets":
            drawn.append(Drawn(line, f"M{places[0][0][0]:g} 1000" + "".join(f"H{x:g}V{y:g}" for x, y in places[0]), ()))
            continue
        path = "".join("M" + "L".join(f"{x:g} {y:g}" for x, y in part) for part in places if len(part) > 1)
        alone = [part[0] for part in places if len(part) == 1]
        is_dotted = line.style == "dots" and len(line.points) <= 60
        drawn.append(Drawn(line, path, tuple(itertools.chain(*places) if is_dotted else alone)))
    return Drawing(
        chart,
        [(100 * across(x), short(x)) for x in chart.x_ticks()],
        [(100 * down(y), short(y)) for y in (log_ticks if is_log else ticks)(low, high)],
        [(100 * across(mark.x), mark) for mark in chart.marks if left <= mark.x <= right],
        drawn,
        list(_columns(chart, across)),
    )


def _columns(chart: Chart, across: Callable[[float], float]) -> Iterator[Column]:
    """Strips side by side, each for an x of a point and the values of all lines at or next before it."""
    told = [(line, [x for x, _ in line.points], line.largest_gap) for line in chart.lines if line.style != "faint"]
    are_buckets = all(line.style == "buckets" for line, _, _ in told)
    xs = sorted({x for _, of_line, _ in told for x in of_line})
    if len(xs) > _MOST_COLUMNS and not are_buckets:
        xs = [xs[round(place)] for place in np.linspace(0, len(xs) - 1, _MOST_COLUMNS)]
    left, right = chart.x_range()
    edges = xs if are_buckets else [left, *((one + other) / 2 for one, other in itertools.pairwise(xs)), right]
    for x, (begin, end) in zip(xs, itertools.pairwise(edges), strict=not are_buckets):
        values = []
        for line, of_line, gap in told:
            place = bisect.bisect_right(of_line, x) - 1
            if place >= 0 and x - of_line[place] <= max(gap, end - begin):
                values.append((line, line.points[place][1]))
        at, width, until = 100 * across(x), 100 * (across(end) - across(begin)), end if are_buckets else None
        at += width / 2 if are_buckets else 0
        yield Column(100 * across(begin), width, at, x, tuple(values), until)


def write_png(chart: Chart, path: Path, *, is_dark: bool = False) -> None:
    """Draw a chart as a PNG of 1600 × 800 pixels.

    Raises ConfigError without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
    except ImportError:
        raise ConfigError("--png: matplotlib is not installed; pip install 'sft-dist[report]'") from None

    ground, ink, soft, grid = _GROUNDS[is_dark]
    figure = Figure(figsize=(8, 4), dpi=200, facecolor=ground, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor=ground)
    for line in chart.lines:
        colour, dash = COLOURS[line.slot % len(COLOURS)][is_dark], DASHES[line.slot // len(COLOURS) % len(DASHES)]
        label = line.label
        if line.style == "buckets":
            axes.fill_between(*zip(*line.points, strict=True), step="post", color=colour, alpha=0.14, linewidth=0)
        for part in stretches(line.points, line.largest_gap):
            is_faint, has_dots = (
                line.style == "faint",
                len(part) == 1 or (line.style == "dots" and len(line.points) <= 60),
            )
            (made,) = axes.plot(
                *zip(*part, strict=True),
                color=colour,
                label="_" if is_faint else label,
                linewidth=0.8 if is_faint else 1.8,
                alpha=0.3 if is_faint else 1.0,
                marker="o" if has_dots else None,
                markersize=3.5,
                clip_on=not has_dots,
                solid_joinstyle="round",
                drawstyle="steps-post" if line.style == "buckets" else "default",
            )
            if dash and not is_faint:
                made.set_dashes(dash)
            label = "_"
    for mark in chart.marks:
        axes.axvline(mark.x, color=soft, linewidth=0.8, linestyle=(0, (1, 3)))
    axes.set_xlim(*chart.x_range())
    axes.set_ylim(*chart.y_range())
    if chart.is_log:
        axes.set_yscale("log")
    if chart.is_log_x:
        axes.set_xscale("log")
    low, high = chart.y_range()
    axes.yaxis.set_major_locator(FixedLocator((log_ticks if chart.is_log else ticks)(low, high)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(FixedLocator(chart.x_ticks()))
    axes.xaxis.set_minor_locator(NullLocator())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.grid(axis="y", color=grid, linewidth=0.8)
    axes.tick_params(colors=soft, length=0, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(grid)
    axes.set_xlabel(f"{chart.x_label}, logarithmic" if chart.is_log_x else chart.x_label, color=soft, fontsize=9)
    unit = f"{chart.unit}, logarithmic" if chart.is_log else chart.unit
    axes.set_ylabel(unit, color=soft, fontsize=9)
    axes.set_title(chart.title, color=ink, fontsize=12, fontweight="bold", loc="left", pad=10, parse_math=False)
    if sum(line.style != "faint" for line in chart.lines) > 1:
        legend = axes.legend(frameon=False, fontsize=9, labelcolor=ink)
        for text in legend.get_texts():
            text.set_parse_math(False)
    figure.savefig(path, metadata={"Software": "sft-dist"})


# (ground, ink, soft, grid) of the page's light and of its dark
_GROUNDS = (("#ffffff", "#1a1d21", "#59616b", "#e3e6ea"), ("#1b1f24", "#e8ebee", "#9ba5b0", "#343b43"))
