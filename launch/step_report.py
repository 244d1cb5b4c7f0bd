"""What a profile says to a person: the table, speed, MFU, memory, and what to change, with numbers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sft_dist.gpus import GIB
from sft_dist.step_trace import ATTENTION, COMMUNICATION, DATA, GAPS, OPTIMIZER, OTHER, PARTS, PHASES
from sft_dist.topology import processes

if TYPE_CHECKING:
    from sft_dist.batch import Batch
    from sft_dist.layers import Recompute
    from sft_dist.step_profile import Profile

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 60  # of the picture of the memory
_LONG = 64  # tokens of a document: 0.6 of the time of the dense mask on a CPU, in rows of 512; of 32 tokens 0.8 and more Python


@dataclass(frozen=True, slots=True)
class Fed:
    """What a rank's profiled steps are fed: the lengths of the documents, int64 [documents], and counts."""

    lengths: np.ndarray
    num_targets: int
    num_rows: int
    seq_len: int

    @classmethod
    def of(cls, steps: Iterable[Any], seq_len: int) -> Fed:
        """Counted from the rows as they lie in the files."""
        lengths, targets, rows = [np.zeros(0, np.int64)], 0, 0
        for step in steps:
            targets += step.num_targets
            for block, stored in step.stored:
                if len(block.rows):  # else it is one row of padding
                    rows += len(block.rows)
                    lengths += list(_document_lengths(stored.starts, stored.lengths))
        return cls(np.concatenate(lengths), targets, rows, seq_len)

    @property
    def num_tokens(self) -> int:
        """Without padding."""
        return int(self.lengths.sum())

    @property
    def dense_ratio(self) -> float:
        """All pairs of tokens of the rows to those that are seen."""
        seen = int((self.lengths * (self.lengths + 1) // 2).sum())
        return self.num_rows * self.seq_len**2 / max(1, seen)


def _document_lengths(starts: np.ndarray, lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Of each row, from the bits of its documents' first tokens (big end first) and its tokens before the padding.

    >>> [one.tolist() for one in _document_lengths(np.array([[0b1010_0000]], np.uint8), np.array([3], np.uint32))]
    [[2, 1]]
    """
    for bits, length in zip(starts, lengths, strict=True):
        yield np.diff(np.append(np.flatnonzero(np.unpackbits(bits)[:length]), length))


@dataclass(frozen=True, slots=True)
class Found:
    """All that is told of a rank: its steps, what they were fed, and the most that its device computes.

    `flops`: the rank's part of the model's, for all profiled steps; None of a mixture of experts. `sheet`: (name, FLOP/s) of the
    GPU's data sheet. `sharers`: ranks that are fed the same rows, and compute a part of each.
    """

    profile: Profile
    fed: Fed
    flops: float | None
    measured_flops: float
    sheet: tuple[str, float] | None
    dense_ratio: float | None = None
    """All pairs of tokens of the rows to those that are seen, where the kernel computes them all."""
    sharers: int = 1

    @property
    def seconds(self) -> float:
        """Of a step without the profiler, the median."""
        return statistics.median(self.profile.plain_seconds)

    @property
    def shares(self) -> dict[str, float]:
        """Of the parts of a step."""
        return {part: seconds / self.profile.split.seconds for part, seconds in self.profile.split.parts.items()}


def told(batch: Batch, whole: Batch, found: Sequence[Found], trace: Path) -> Iterator[str]:
    """What was measured; `found`: of each rank; `batch`: of the profiled steps, `whole`: of the run's own."""
    main, count = found[0], found[0].profile.split.num_steps
    per_row = len(main.fed.lengths) / max(1, main.fed.num_rows)
    fill = main.fed.num_tokens / max(1, main.fed.num_rows * main.fed.seq_len)
    yield (
        f"{count} step{'s' * (count > 1)} of {batch.global_batch_rows:,} rows = {batch.micro_batch_rows} a micro-batch x {batch.accumulation_steps} "
        f"accumulated x {processes(batch.world_size, main.sharers)}; {per_row:.1f} documents a row, {fill:.0%} of it filled"
    )
    if whole.accumulation_steps > batch.accumulation_steps:
        yield (
            f"note: the run's own steps have {whole.accumulation_steps:,} micro-batches: what a step does once (optimizer) is "
            f"{whole.accumulation_steps / batch.accumulation_steps:.0f} times less of those. --micro-batches takes more"
        )
    yield from _table(found)
    yield from _others(main)
    yield from _speed(found)
    yield from _mfu(main)
    yield from _memory(main)
    if main.profile.peak_bytes is not None:
        syncs = main.profile.split.syncs
        calls = ", ".join(f"{name} {number / count:,.1f}" for name, number in syncs.items())
        yield f"the host waits for the GPU {sum(syncs.values()) / count:,.1f} times a step" + (
            f": {calls}" if calls else ""
        )
    if main.profile.not_applied:
        yield f"warning: {main.profile.not_applied} of {count} steps did not reach the optimizer (fp16's loss scale): its time is missing"
    yield f"trace: {trace}, for https://ui.perfetto.dev" + (" (of rank 0)" if len(found) > 1 else "")


def _table(found: Sequence[Found]) -> Iterator[str]:
    """A line a part; of several ranks with the least and the most of all of them."""
    main = found[0]
    of_ranks = f"{'over ranks':>19}" if len(found) > 1 else ""
    yield f"\n  {'':15}{'ms a step':>12}{'share':>9}{of_ranks}"
    for part in (*PARTS, "a step"):
        milliseconds = [_milliseconds(one, part) for one in found]
        share = 1.0 if part == "a step" else main.shares[part]
        span = f"{min(milliseconds):>11,.1f} to {max(milliseconds):,.1f}" if len(found) > 1 else ""
        yield f"  {part:15}{milliseconds[0]:>12,.1f}{share:>9.1%}{span}"
    yield ""


def _milliseconds(found: Found, part: str) -> float:
    """Of a part, or of "a step"."""
    split = found.profile.split
    return 1e3 * split.parts.get(part, split.seconds) / split.num_steps


def _others(found: Found) -> Iterator[str]:
    split = found.profile.split
    most = [(name, seconds / split.seconds) for name, seconds in list(split.others.items())[:5]]
    if most:
        yield f"{OTHER}: " + ", ".join(f"{name.removeprefix('aten::')} {share:.1%}" for name, share in most)
    if split.recomputed:
        yield f"computed again in the backward pass: {split.recomputed / split.seconds:.1%} of the step, in the parts above"
    if split.hidden_communication:
        yield f"communication behind other work: {1e3 * split.hidden_communication / split.num_steps:,.1f} ms a step, in no part above"


def _speed(found: Sequence[Found]) -> Iterator[str]:
    """Steps and tokens of all ranks."""
    main = found[0]
    seen = statistics.median(main.profile.seconds)
    tokens = sum(one.fed.num_tokens for one in found) / main.sharers / sum(main.profile.plain_seconds)
    yield (
        f"speed: {main.seconds:,.3f} s a step, {tokens:,.0f} tokens/s{_on(found)}, without the profiler; "
        f"{seen / main.seconds:.2f} times that with it"
    )


def _on(found: Sequence[Found]) -> str:
    return f" on {len(found)} ranks" if len(found) > 1 else ""


def _mfu(found: Found) -> Iterator[str]:
    """The share of the peak that the model's own arithmetic takes."""
    if found.flops is None:
        yield "MFU: not told of a mixture of experts, of which each token sees a part only"
        return
    speed = found.flops / sum(found.profile.plain_seconds)
    measured = (
        f"{speed / found.measured_flops:.1%} of the {_flops(found.measured_flops)} that matrix products reach here"
    )
    sheet = (
        f"{speed / found.sheet[1]:.1%} of {found.sheet[0]}'s {_flops(found.sheet[1])} (data sheet), "
        if found.sheet
        else ""
    )
    yield (
        f"MFU: {sheet}{measured} (measured). The model computes {_flops(speed)} a rank: within documents, its head at "
        f"{found.fed.num_targets / found.profile.split.num_steps:,.0f} targets a step, nothing for padding or recomputation"
    )


def _flops(number: float) -> str:
    """As a person reads it.

    >>> _flops(989e12), _flops(2.5e10)
    ('989.0 TFLOP/s', '25.0 GFLOP/s')
    """
    return f"{number / 1e12:,.1f} TFLOP/s" if number >= 1e12 else f"{number / 1e9:,.1f} GFLOP/s"


def _memory(found: Found) -> Iterator[str]:
    """The peak of each phase, and the last step as a picture."""
    split = found.profile.split
    if not split.memory:
        return
    base = "of the GPU" if found.profile.peak_bytes is not None else "more than before the steps, without a GPU"
    peaks = ", ".join(f"{phase} {split.peaks[phase] / GIB:,.3f}" for phase in PHASES if phase in split.peaks)
    yield f"memory, GiB {base}: {peaks} at most"
    yield f"  {timeline(split.memory)}  over the last step"


def timeline(memory: Sequence[tuple[float, int]]) -> str:
    """The most that was allocated in each of 60 equal parts of the time, as bars; its highest is the peak.

    >>> timeline([(0.0, 0), (0.5, 100), (1.0, 50)])[::30]
    '▁█'
    """
    begin, last = memory[0][0], memory[-1][0]
    slot = (last - begin) / _WIDTH or 1.0
    highest, now = [0] * _WIDTH, 0
    at = 0
    for place in range(_WIDTH):
        highest[place] = now
        while at < len(memory) and memory[at][0] <= begin + slot * (place + 1):
            now = max(0, memory[at][1])
            highest[place] = max(highest[place], now)
            at += 1
    peak = max(highest) or 1
    return "".join(_BARS[round(size / peak * (len(_BARS) - 1))] for size in highest)


@dataclass(frozen=True, slots=True)
class Setting:
    """What of a run could be changed. `largest`: what is recomputed -> rows of the largest micro-batch that fits, None: none."""

    attention: str
    has_varlen: bool  # a GPU, and 16 bit
    is_compiled: bool
    can_compile: bool  # it is not, and there are a GPU, a compiler, and rows that are not shared
    zero_stage: int
    checkpointing: Recompute
    batch: Batch
    whole: Batch
    largest: Callable[[Recompute], int | None]


def advice(found: Sequence[Found], setting: Setting) -> Iterator[str]:
    """What stands out, and what to change: a sentence each."""
    main, batch = found[0], setting.batch
    shares, split = main.shares, main.profile.split
    documents = len(main.fed.lengths) / max(1, main.fed.num_rows)
    if shares[ATTENTION] >= 0.1 and main.dense_ratio is not None and main.dense_ratio >= 2:
        yield (
            f"attention is {shares[ATTENTION]:.0%} of the step: rows hold {documents:.1f} documents on average, and sdpa computes "
            f"{main.dense_ratio:.1f} times the pairs that are seen{_see_less(main.fed, setting)}"
        )
    again = split.recomputed / split.seconds
    if again >= 0.05:
        yield from _keep_more(again, setting)
    between = shares[OTHER] + shares[GAPS]
    if between >= 0.25 and setting.can_compile and setting.checkpointing != "offload":  # which exclude each other
        yield (
            f"{OTHER} and {GAPS} are {between:.0%} of the step: train.compile=true fuses the operators between products, which leaves fewer to "
            "start and less to keep (GPT-2 on an H100: a fifth less time, a third less memory)"
        )
    if shares[COMMUNICATION] >= 0.1:
        yield f"communication is {shares[COMMUNICATION]:.0%} of the step: {_talk_less(setting)}"
        yield from _uneven(found)
    if shares[DATA] >= 0.05:
        yield (
            f"data are {shares[DATA]:.0%} of the step: read them from a disk of the node (`sft-dist submit --stage`), or near to one "
            "another (train.order={block_rows: 1024, window_blocks: 64})"
        )
    times = setting.whole.accumulation_steps / batch.accumulation_steps
    optimizer = shares[OPTIMIZER] / (shares[OPTIMIZER] + (1 - shares[OPTIMIZER]) * times)
    if optimizer >= 0.2:
        yield (
            f"the optimizer is {optimizer:.0%} of the run's own step, whatever its rows: with 4 times train.global_batch_rows it "
            f"would be {optimizer / (optimizer + (1 - optimizer) * 4):.0%}"
        )
    if shares[GAPS] >= 0.2:
        rows = setting.largest(setting.checkpointing) or 0
        if rows > batch.micro_batch_rows:
            yield (
                f"host gaps are {shares[GAPS]:.0%} of the step: micro-batches of {batch.micro_batch_rows} rows are soon done, and up "
                f"to {rows} fit: a larger train.micro_batch_rows"
            )


def _keep_more(again: float, setting: Setting) -> Iterator[str]:
    """Nothing is computed again, or half of it, which is faster than all of it in compiled layers only."""
    ways: list[tuple[Recompute, str, str]] = [(False, "without it", "")]
    if setting.checkpointing != "selective" and (setting.is_compiled or setting.can_compile):
        ways.append(("selective", "with half of it", "" if setting.is_compiled else " train.compile=true"))
    for way, told, more in ways:
        if most := setting.largest(way):
            rows = min(most, setting.batch.micro_batch_rows)
            up_to = f" (up to {most})" if most > rows else ""
            yield (
                f"{again:.0%} of the step is recomputation, and {rows} row{'s' * (rows > 1)} a micro-batch{up_to} fit{'s' * (rows == 1)} {told}: "
                f"train.gradient_checkpointing={str(way).lower()}{more} train.micro_batch_rows={rows}"
            )
            return


def _see_less(fed: Fed, setting: Setting) -> str:
    """Which kernel does no work between documents and can be had, or else which rows have less of it."""
    if setting.has_varlen:
        return ": train.attention=auto" if setting.attention == "sdpa" else ""
    length = fed.lengths.mean()
    if length >= _LONG:
        return ": train.attention=by_document"
    if fed.lengths.max() <= fed.seq_len // 2:
        return (
            f". Documents of {length:,.0f} tokens are too short for by_document, but the longest has {fed.lengths.max()}, and rows of "
            f"half the length have half of it: prepare.seq_len={fed.seq_len // 2}"
        )
    return f"; documents of {length:,.0f} tokens are too short for train.attention=by_document"


def _talk_less(setting: Setting) -> str:
    times = setting.whole.accumulation_steps
    if setting.zero_stage == 3:
        return (
            f"ZeRO 3 gathers the weights twice a micro-batch, of {times:,} a step: zero=ds_configs/zero2.json gathers them once a "
            "step, if `sft-dist plan` says that it fits"
        )
    if setting.zero_stage == 2 and times > 1:
        return (
            f"ZeRO 2 reduces gradients in each of {times:,} micro-batches: zero=ds_configs/zero1.json does it once a step, if "
            "`sft-dist plan` says that it fits"
        )
    return "it is the same for any number of rows: a larger train.global_batch_rows has less of it"


def _uneven(found: Sequence[Found]) -> Iterator[str]:
    """Who waits least is who the others wait for."""
    waits = [_milliseconds(one, COMMUNICATION) for one in found]
    if max(waits) - min(waits) >= 0.1 * _milliseconds(found[0], "a step"):
        yield (
            f"ranks wait unevenly, {min(waits):,.1f} to {max(waits):,.1f} ms a step: the others wait for rank {waits.index(min(waits))}, "
            "which waits least"
        )
