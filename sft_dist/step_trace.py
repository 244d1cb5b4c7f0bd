"""Where the time of a step goes: a trace of torch's profiler, split instant by instant into parts that sum to the whole.

Each instant of a step belongs to exactly one part. Without a GPU it is what the step's own thread does; with one it is what the
GPU does, and where that waits, what it waits for. A part is told by the innermost range around what runs (`RANGE` and its name),
and for the backward pass by the operator of the forward pass that it belongs to, as the profiler links them.
"""

from __future__ import annotations

import bisect
import functools
import heapq
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

RANGE = "sft_dist::"  # before the names of our ranges: parts, and phases of a step
ATTENTION, MATMULS, HEAD, OPTIMIZER = "attention", "matmuls", "head+loss", "optimizer"
COMMUNICATION, DATA, GAPS, OTHER = "communication", "data", "host gaps", "other"
PARTS = (ATTENTION, MATMULS, HEAD, OPTIMIZER, COMMUNICATION, DATA, GAPS, OTHER)
STEP, FORWARD, BACKWARD, LAYER = "step", "forward", "backward", "layer"
PHASES = (FORWARD, BACKWARD, OPTIMIZER)

# What is known by an operator's or a kernel's name, where no range says it.
_COMMUNICATES = ("c10d::", "gloo:", "nccl:", "ncclDevKernel", "ncclKernel")
_ATTENDS = (
    "scaled_dot_product",
    "varlen_attn",
    "flash_attn",
    "flex_attention",
    "_efficient_attention",
    "flash_fwd",
    "flash_bwd",
    "fmha",
)
_MULTIPLIES = frozenset(
    f"aten::{name}" for name in ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "addmv", "_scaled_mm", "mkldnn_linear")
)  # fmt: skip
_HOST = ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver")
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_WAITS = ("StreamSynchronize", "DeviceSynchronize", "EventSynchronize", "cudaMemcpy", "hipMemcpy")


@dataclass(frozen=True, slots=True)
class Split:
    """The steps of a trace. All seconds are of all `num_steps` together.

    `parts` sum to `seconds`. `hidden_communication`: behind what the GPU computed, so in no part; `recomputed`: in forward
    passes of layers during the backward pass, which are in their parts too. `others`: the operators of "other", largest first.
    `syncs`: how often the host waited for the GPU, by call. `memory`: (second of the trace's last step, allocated bytes);
    `peaks`: most bytes by phase of a step.
    """

    num_steps: int
    seconds: float
    parts: dict[str, float]
    hidden_communication: float
    recomputed: float
    others: dict[str, float]
    syncs: dict[str, int]
    memory: list[tuple[float, int]]
    peaks: dict[str, int]


@dataclass(slots=True)
class _Open:
    """An event of a host thread that has begun: what it and those around it say of an instant."""

    end: float
    part: str | None  # of the innermost range, or of what counts as one
    multiplies: bool
    is_working: bool  # an operator runs, and not Python
    is_again: bool  # recomputed
    operator: str  # the outermost

    @property
    def name(self) -> str:
        """The part of an instant in which nothing deeper runs."""
        if self.part in (DATA, COMMUNICATION):
            return self.part
        if not self.is_working:
            return GAPS
        return self.part or (MATMULS if self.multiplies else OTHER)


@dataclass(frozen=True, slots=True)
class _Piece:
    """What happens from `begin` to `end`, in microseconds."""

    begin: float
    end: float
    part: str
    operator: str = ""
    is_again: bool = False


@dataclass(slots=True)
class _Host:
    """One thread of the host: its pieces in order, and what launched each piece of work of the GPU."""

    pieces: list[_Piece] = field(default_factory=list)
    launches: dict[int, _Open] = field(default_factory=dict)
    at: dict[float, str | None] = field(default_factory=dict)  # begin of an operator -> the part of its range


def split(events: Iterable[Mapping[str, Any]]) -> Split:
    """Split what `torch.profiler` exported (its `traceEvents`); times are in microseconds there. Raises ValueError without a step.

    >>> of = {"ph": "X", "tid": 1}
    >>> made = split([
    ...     {**of, "cat": "user_annotation", "name": "sft_dist::step", "ts": 0.0, "dur": 10e6},
    ...     {**of, "cat": "user_annotation", "name": "sft_dist::data", "ts": 1e6, "dur": 2e6},
    ...     {**of, "cat": "cpu_op", "name": "aten::mm", "ts": 4e6, "dur": 5e6}])
    >>> {part: seconds for part, seconds in made.parts.items() if seconds}
    {'matmuls': 5.0, 'data': 2.0, 'host gaps': 3.0}
    """
    threads, device, memory, links = _sorted(events)
    found = [(tid, _spans(thread, STEP)) for tid, thread in threads.items()]
    main, steps = next(((tid, spans) for tid, spans in found if spans), (None, []))
    if main is None:
        raise ValueError("no step in this trace")
    backward = _spans(threads[main], BACKWARD)
    hosts: dict[Any, _Host] = {tid: _Host() for tid in threads}

    def linked(tid: Any, begin: float) -> str | None:
        forward = links.get((tid, begin))
        return hosts[forward[0]].at.get(forward[1]) if forward is not None else None

    for tid in sorted(threads, key=lambda tid: tid != main):  # the forward pass first: backward passes are linked to it
        _follow(hosts[tid], threads[tid], backward, functools.partial(linked, tid))
    pieces, hidden = hosts[main].pieces, 0.0
    if device:
        launches = {number: opened for host in hosts.values() for number, opened in host.launches.items()}
        pieces, hidden = _of_device(device, launches, pieces, steps)
    pieces = [piece for piece in pieces if _is_within(piece.begin, steps)]
    sums = {part: sum(p.end - p.begin for p in pieces if p.part == part) / 1e6 for part in PARTS}
    of_other: dict[str, float] = defaultdict(float)
    for piece in pieces:
        if piece.part == OTHER:
            of_other[piece.operator] += (piece.end - piece.begin) / 1e6
    return Split(
        len(steps),
        sum(end - begin for begin, end in steps) / 1e6,
        sums,
        hidden / 1e6,
        sum(p.end - p.begin for p in pieces if p.is_again) / 1e6,
        dict(sorted(of_other.items(), key=lambda item: -item[1])),
        _syncs(threads, steps),
        [((at - steps[-1][0]) / 1e6, size) for at, size in memory if steps[-1][0] <= at <= steps[-1][1]],
        _peaks(memory, {phase: _spans(threads[main], phase) for phase in PHASES}),
    )


def _sorted(events: Iterable[Mapping[str, Any]]) -> tuple[dict[Any, list], list, list[tuple[float, int]], dict]:
    """(events of each host thread, outer before inner; work of the GPU; allocated bytes; what begins -> its forward operator)."""
    threads: dict[Any, list] = defaultdict(list)
    device, forward, links = [], {}, {}
    memory: dict[int, list[tuple[float, int]]] = {0: [], 1: []}
    flows = []
    for event in events:
        kind = event.get("cat")
        if event.get("ph") == "X" and kind in _HOST:
            threads[event["tid"]].append(event)
        elif event.get("ph") == "X" and kind in _DEVICE:
            device.append(event)
        elif kind == "fwdbwd" and event["ph"] == "s":
            forward[event["id"]] = (event["tid"], event["ts"])
        elif kind == "fwdbwd":
            flows.append(event)
        elif event.get("name") == "[memory]" and event["args"]["Device Type"] in memory:
            memory[event["args"]["Device Type"]].append((event["ts"], event["args"]["Total Allocated"]))
    for flow in flows:
        links[flow["tid"], flow["ts"]] = forward.get(flow["id"])
    for thread in threads.values():
        thread.sort(key=lambda event: (event["ts"], -event["dur"]))
    device.sort(key=lambda event: event["ts"])
    return threads, device, sorted(memory[1] or memory[0]), links


def _spans(thread: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """(begin, end) of our ranges of that name, in order."""
    of_name = (event for event in thread if event["name"] == RANGE + name and event["cat"] == "user_annotation")
    return [(event["ts"], event["ts"] + event["dur"]) for event in of_name]


def _is_within(at: float, spans: Sequence[tuple[float, float]]) -> bool:
    place = bisect.bisect_right(spans, (at, float("inf"))) - 1
    return place >= 0 and at < spans[place][1]


def _own_part(event: Mapping[str, Any]) -> str | None:
    """The part that an event names whatever is around it."""
    name = event["name"]
    if name.startswith(RANGE):
        return name.removeprefix(RANGE) if name.removeprefix(RANGE) in PARTS else None
    if name.startswith(_COMMUNICATES):
        return COMMUNICATION
    return ATTENTION if any(one in name for one in _ATTENDS) else None


def _is_python(name: str) -> bool:
    """Whether what runs between the operators inside is Python, or autograd's engine: `AddmmBackward0` is an operator."""
    return name.startswith(("autograd::engine::", "torch::autograd::")) or name.endswith("Backward")


def _follow(
    made: _Host,
    thread: Sequence[Mapping[str, Any]],
    backward: Sequence[tuple[float, float]],
    linked: Callable[[float], str | None],
) -> None:
    """Fill in what a thread does at each instant; `linked`: begin of an event -> the part of its forward operator."""
    stack, now = [_Open(float("inf"), None, False, False, False, "")], 0.0

    def until(time: float) -> None:
        nonlocal now
        while True:
            top = stack[-1]
            end = min(top.end, time)
            if end > now:
                made.pieces.append(_Piece(now, end, top.name, top.operator, top.is_again))
                now = end
            if top.end > time:
                return
            stack.pop()

    for event in thread:
        begin, name, kind = event["ts"], event["name"], event["cat"]
        until(begin)
        part = _own_part(event) or (linked(begin) if kind == "cpu_op" else None)
        around = stack[-1]
        if name == RANGE + LAYER:  # computed again, it stands by itself, whichever operator's gradient asks for it
            around = _Open(around.end, None, False, False, _is_within(begin, backward), "")
        is_operator = kind == "cpu_op" and not _is_python(name)
        opened = _Open(
            min(begin + event["dur"], around.end),  # the clock's rounding must not let what is inside outlast it
            part or around.part,
            around.multiplies or name in _MULTIPLIES,
            is_operator or (kind != "cpu_op" and around.is_working),
            around.is_again,
            around.operator or (name if is_operator else ""),
        )
        stack.append(opened)
        if kind == "cpu_op":
            made.at[begin] = opened.part
        elif kind != "user_annotation" and "correlation" in event.get("args", {}):
            made.launches[event["args"]["correlation"]] = opened
    until(max(event["ts"] + event["dur"] for event in thread))


def _of_device(
    device: Sequence[Mapping[str, Any]],
    launches: Mapping[int, _Open],
    host: Sequence[_Piece],
    steps: Sequence[tuple[float, float]],
) -> tuple[list[_Piece], float]:
    """(what the GPU does at each instant of the steps, microseconds of communication behind something else).

    Where it does several things, what was begun first counts, and communication last; where nothing, the host keeps it waiting.
    """
    work = [_work(event, launches) for event in device]
    busy, hidden = _busy(work)
    made, at = list[_Piece](), 0
    for begin, end in steps:
        now = begin
        while at < len(busy) and busy[at].begin < end:
            piece = busy[at]
            made += _waiting(host, now, min(piece.begin, end))
            if piece.end > now:
                first = max(piece.begin, now)
                now = min(piece.end, end)
                made.append(_Piece(first, now, piece.part, piece.operator, piece.is_again))
            if piece.end > end:
                break  # it goes on in the next step
            at += 1
        made += _waiting(host, now, end)
    return made, hidden


def _work(event: Mapping[str, Any], launches: Mapping[int, _Open]) -> _Piece:
    """A kernel or copy, in the part of what launched it."""
    by = launches.get(event.get("args", {}).get("correlation", -1))
    part = _own_part(event)
    if part is None and by is not None:
        part = by.part or (MATMULS if by.multiplies else OTHER)
    operator = by.operator if by is not None and by.operator else event["name"]
    return _Piece(event["ts"], event["ts"] + event["dur"], part or OTHER, operator, by is not None and by.is_again)


def _busy(work: Sequence[_Piece]) -> tuple[list[_Piece], float]:
    """(the same without overlaps, in order, communication only where it is alone; microseconds of it that are not)."""
    times = sorted({time for piece in work for time in (piece.begin, piece.end)})
    made: list[_Piece] = []
    open_, place, hidden = list[tuple[bool, float, int]](), 0, 0.0
    talking: list[tuple[float, int]] = []  # communication by its end
    for begin, end in itertools.pairwise(times):
        while place < len(work) and work[place].begin <= begin:
            piece = work[place]
            heapq.heappush(open_, (piece.part == COMMUNICATION, piece.begin, place))
            if piece.part == COMMUNICATION:
                heapq.heappush(talking, (piece.end, place))
            place += 1
        while open_ and work[open_[0][2]].end <= begin:
            heapq.heappop(open_)
        while talking and talking[0][0] <= begin:
            heapq.heappop(talking)
        if open_:
            first = work[open_[0][2]]
            made.append(_Piece(begin, end, first.part, first.operator, first.is_again))
            hidden += (end - begin) if talking and first.part != COMMUNICATION else 0.0
    return made, hidden


def _waiting(host: Sequence[_Piece], begin: float, end: float) -> Iterator[_Piece]:
    """What the GPU waits for: data, other ranks, or else the host."""
    place = max(0, bisect.bisect_right(host, begin, key=lambda piece: piece.begin) - 1)
    now = begin
    for piece in host[place:]:
        if piece.begin >= end:
            break
        if piece.end > now and piece.part in (DATA, COMMUNICATION):
            if piece.begin > now:
                yield _Piece(now, piece.begin, GAPS)
            yield _Piece(max(now, piece.begin), min(piece.end, end), piece.part)
            now = min(piece.end, end)
    if end > now:
        yield _Piece(now, end, GAPS)


def _syncs(threads: Mapping[Any, Sequence[Mapping[str, Any]]], steps: Sequence[tuple[float, float]]) -> dict[str, int]:
    """How often the host waited for the GPU within the steps, by the call that did; a copy that is asynchronous is none."""
    found: dict[str, int] = defaultdict(int)
    for event in (event for thread in threads.values() for event in thread if event["cat"] == "cuda_runtime"):
        if event["name"].endswith(_WAITS) and _is_within(event["ts"], steps):
            found[event["name"]] += 1
    return dict(found)


def _peaks(memory: Sequence[tuple[float, int]], phases: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str, int]:
    """The most bytes that were allocated in each phase of a step, where there was any."""
    most: dict[str, int] = {}
    for at, size in memory:
        for phase, spans in phases.items():
            if _is_within(at, spans):
                most[phase] = max(size, most.get(phase, 0))
    return most
