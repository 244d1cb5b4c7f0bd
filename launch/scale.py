"""plan --scale: the time of a step on 8 to 4,096 GPUs, where each ZeRO stage stops scaling, and which to use."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.fit import model_of
from launch.plan import Options
from launch.settle import Plan
from sft_dist.errors import ConfigError
from sft_dist.gpus import Gpu, gpu, names
from sft_dist.layers import speed
from sft_dist.plan import Model
from sft_dist.scaling import ATTAINED, STOPS, Job, Network, Step, doublings, step, stops_at
from sft_dist.schema import RunConfig
from sft_dist.topology import Life, Topology
from sft_dist.zero import shipped, zero_config, zero_stage

MOST = 4096  # GPUs
_ONE_CARD = 12.5e9  # bytes a second: 100 Gbit/s, the least that is assumed of a node


@dataclass(frozen=True, slots=True)
class Links:
    """Gbit/s one way that the command line says: of a GPU to others of its node, of a node to others; None: as the maker's node has."""

    within_node: float | None = None
    between_nodes: float | None = None

    def network(self, card: Gpu, gpus_per_node: int) -> Network:
        """Of nodes of this GPU; those of fewer than eight have that many fewer cards, but one.

        >>> Links(between_nodes=800).network(gpu("h100-80gb"), 8).between
        100000000000.0
        """
        assert card.within_node is not None
        assert card.between_nodes is not None
        between = max(_ONE_CARD, card.between_nodes * gpus_per_node / 8)
        return Network(
            card.within_node if self.within_node is None else self.within_node * 1e9 / 8,
            between if self.between_nodes is None else self.between_nodes * 1e9 / 8,
            gpus_per_node,
        )


@dataclass(frozen=True, slots=True)
class Row:
    """A step on so many GPUs, of which each takes `accumulation` micro-batches; `of_step` is None where it does not fit their memory."""

    gpus: int
    accumulation: int
    of_step: Step | None
    tokens_per_second: float = 0.0


def run(config: RunConfig, options: Options, links: Links, say: Callable[[str], None]) -> None:
    """Say it. Raises ConfigError for a GPU whose speed is not known, numbers that do not double, or a model that fits nowhere."""
    card = _card(options)
    if (sharers := config.train.sequence_parallel) > 1:
        raise ConfigError(
            f"train.sequence_parallel: {sharers}: --scale does not reckon with what ranks that share rows send one another; add "
            "train.sequence_parallel=1 for it, or measure with sft-dist profile"
        )
    topology = Topology(world_size=options.world_size, local_world_size=options.gpus_per_node)
    plan = Plan.of(config, topology, Life("plan"), card=card, is_elsewhere=True)
    model, network = model_of(plan), links.network(card, options.gpus_per_node)
    zeros = _zeros(plan)
    train, batch = plan.config.train, plan.batch
    say(
        f"model: {model.size.parameters:,} parameters; {batch.micro_batch_rows} rows of {plan.shards.seq_len:,} tokens a micro-batch"
    )
    for line in _assumptions(plan, card, network, options):
        say(line)
    micro_batches, every = batch.global_batch_rows // batch.micro_batch_rows, doublings(options.world_size, MOST)
    kept = {gpus: 0 if micro_batches % gpus else micro_batches // gpus for gpus in every}  # else `train` refuses it
    grown = dict.fromkeys(kept, batch.accumulation_steps)
    of_a_gpu = batch.accumulation_steps * batch.micro_batch_rows
    tables = [
        (f"a batch of {batch.global_batch_rows:,} rows, whatever the GPUs", kept),
        (f"a batch that grows with the GPUs, {of_a_gpu:,} rows for each", grown),
    ]
    for title, accumulations in tables:
        is_divided = {gpus: count for gpus, count in accumulations.items() if count}
        made = {name: _rows(plan, model, card, network, zero, options, is_divided) for name, zero in zeros.items()}
        if not any(row.of_step for rows in made.values() for row in rows) and accumulations is grown:
            raise ConfigError(
                f"--scale: no shipped ZeRO stage fits {card.name} on {options.world_size} to {MOST:,} GPUs with train.micro_batch_rows "
                f"{batch.micro_batch_rows} and train.gradient_checkpointing {str(train.gradient_checkpointing).lower()}: lower the first, set "
                "the second to true, or take larger GPUs; plan without --scale has the memory by part"
            )
        say(f"\n{title}:")
        for line in _table(made):
            say(line)
        ends_with_batch = max(is_divided) < max(accumulations)
        if ends_with_batch:
            say(f"no further: a step's {micro_batches:,} micro-batches cannot be handed out evenly to {2 * max(is_divided):,} GPUs; raise "
                "train.global_batch_rows, or lower train.micro_batch_rows")  # fmt: skip
        for line in _words(made, ends_with_batch=ends_with_batch):
            say(line)


def _card(options: Options) -> Gpu:
    """The GPU that is meant; raises ConfigError where one cannot reckon with it, or with the nodes."""
    if options.gpu is None:
        raise ConfigError(f"--scale: which GPU? Name it with --gpu: {', '.join(names())}")
    card = gpu(options.gpu)
    if card.memory_rate is None:
        raise ConfigError(
            f"--gpu {options.gpu!r}: its speed is not known, only its memory; --scale needs one of {', '.join(names())}"
        )
    for name, number in (("--nodes", options.nodes), ("--gpus-per-node", options.gpus_per_node)):
        if number & (number - 1):
            near = 1 << number.bit_length()
            raise ConfigError(
                f"{name} {number}: --scale doubles it, up to {MOST:,} GPUs; use a power of two, {near // 2} or {near}"
            )
    if options.world_size > MOST:
        raise ConfigError(
            f"--nodes {options.nodes}: {options.world_size:,} GPUs to begin with, and --scale ends at {MOST:,}; use fewer"
        )
    if options.like is not None:
        raise ConfigError(
            "--like: a run's speed has its own messages in it already; --scale takes the share of products alone, --mfu"
        )
    return card


def _zeros(plan: Plan) -> dict[str, Mapping[str, Any]]:
    """The run's own DeepSpeed file and the shipped ones, but what is refused, 16 bit at stage 0, or not reckoned: offload, nf4 at stage 3."""
    found = {plan.config.zero: plan.zero} | {name: zero_config(name) for name in shipped()}
    is_fp32, lora = plan.config.train.precision == "fp32", plan.config.model.lora
    is_nf4 = lora is not None and lora.quantize is not None
    return {
        name: zero
        for name, zero in found.items()
        if not _offloads(zero) and (is_fp32 or zero_stage(zero)) and not (is_nf4 and zero_stage(zero) == 3)
    }


def _offloads(zero: Mapping[str, Any]) -> bool:
    return bool(zero.get("zero_optimization", {}).keys() & {"offload_optimizer", "offload_param"})


def _assumptions(plan: Plan, card: Gpu, network: Network, options: Options) -> Iterator[str]:
    peak = card.flops(plan.config.train.precision)
    assert peak is not None
    yield (
        f"reckoned, not measured: products at {options.mfu:.0%} of {card.name}'s {peak / 1e12:,.0f} TFLOP/s (--mfu), "
        f"{8e-9 * network.within:,.0f} Gbit/s within a node (--gbps-within-node) and {8e-9 * network.between:,.0f} from a node to others "
        f"(--gbps-between-nodes), of which {ATTAINED:.0%} are attained"
    )
    yield "efficiency: tokens/s of a GPU, 100% on the fewest GPUs that fit that very stage; stages are compared by tokens/s"
    if _offloads(plan.zero):
        yield f"{plan.config.zero} left out: offload is not reckoned"


def _rows(
    plan: Plan, model: Model, card: Gpu, network: Network, zero: Mapping[str, Any], options: Options, counts: Mapping[int, int]
) -> list[Row]:  # fmt: skip
    train, section = plan.config.train, zero.get("zero_optimization", {})
    rows, checkpointing = plan.batch.micro_batch_rows, train.gradient_checkpointing
    job, tokens_per_row = _job(plan, model, card, section, options), plan.shards.seq_len * plan.shards.manifest.fill
    made = []
    for gpus, accumulation in counts.items():
        needed = model.parts(zero, world_size=gpus, rows=rows, checkpointing=checkpointing).total
        if needed > card.usable_bytes:
            made.append(Row(gpus, accumulation, None))
            continue
        of_step = step(job, section, network, gpus, accumulation)
        made.append(Row(gpus, accumulation, of_step, gpus * accumulation * rows * tokens_per_row / of_step.seconds))
    return made


def _job(plan: Plan, model: Model, card: Gpu, section: Mapping[str, Any], options: Options) -> Job:
    train, peak = plan.config.train, card.flops(plan.config.train.precision)
    assert peak is not None
    assert card.memory_rate is not None
    small = section.get("stage3_param_persistence_threshold", 100_000)
    persistent = sum(parameter.numel() for parameter in model.meta.parameters() if parameter.numel() <= small)
    documents = (plan.mixture or plan.shards.manifest).documents_per_row
    share = speed(train.gradient_checkpointing, is_compiled=train.compile)
    return Job(
        model.size.parameters, model.size.trained, persistent, model.flops(documents) / (peak * options.mfu),
        plan.batch.micro_batch_rows, train.precision, share, card.memory_rate,
    )  # fmt: skip


def _short(name: str) -> str:
    return Path(name).stem if name in shipped() else name


def _table(made: Mapping[str, list[Row]]) -> Iterator[str]:
    cells = [["", "GPUs", "micro-batches", "s a step", "tokens/s", "efficiency", "messages s", "hidden"]]
    steps = [row.of_step for rows in made.values() for row in rows if row.of_step]
    digits = _digits(one.seconds for one in steps), _digits(one.sent for one in steps)
    for name, rows in made.items():
        first = next((row for row in rows if row.of_step), None)
        for row in rows:
            cells.append([_short(name), f"{row.gpus:,}", f"{row.accumulation:,}", *_cells(row, first, *digits)])
    widths = [max(map(len, column)) for column in itertools.zip_longest(*cells, fillvalue="")]
    for name, *numbers in cells:
        yield f"  {name:{widths[0]}}" + "".join(
            f"  {text:>{width}}" for text, width in zip(numbers, widths[1:], strict=False)
        )


def _cells(row: Row, first: Row | None, of_seconds: int, of_sent: int) -> list[str]:
    """What is told of a step, its seconds with so many digits; `first`: of the fewest GPUs that fit its stage."""
    if row.of_step is None or first is None:
        return ["does not fit"]
    seconds, sent = row.of_step.seconds, row.of_step.sent
    share = row.tokens_per_second / row.gpus / (first.tokens_per_second / first.gpus)
    hidden = f"{max(0.0, 1 - row.of_step.exposed / sent) + 0.0:.0%}" if sent else "-"
    return [
        f"{seconds:,.{of_seconds}f}", f"{row.tokens_per_second:,.0f}", f"{share:.0%}", f"{sent:,.{of_sent}f}", hidden
    ]  # fmt: skip


def _digits(numbers: Iterable[float]) -> int:
    """Behind the point: three, or as many as leave the least of the numbers two that count.

    >>> _digits([79.4, 0.055]), _digits([79.4, 0.00276, 0.0]), f"{0.00276:.{_digits([0.00276])}f}"
    (3, 4, '0.0028')
    """
    least = min((number for number in numbers if number > 0), default=1.0)
    return max(3, 1 - math.floor(math.log10(least)))


def _seconds(number: float) -> str:
    return f"{number:,.{_digits([number])}f} s"


def _words(made: Mapping[str, list[Row]], *, ends_with_batch: bool) -> Iterator[str]:
    """Where each stops, why, and which is the fastest; `ends_with_batch`: on more GPUs some would have no micro-batch."""
    for name, rows in made.items():
        there = {row.gpus: row for row in rows if row.of_step}
        if not there:
            yield f"{_short(name)} fits on none of these"
            continue
        stop = stops_at({gpus: row.tokens_per_second for gpus, row in there.items()})
        if stop is None:
            if len(there) > 1:
                yield f"{_short(name)} {_goes_on(max(there), ends_with_batch)}: each doubling gives {STOPS} times the tokens/s or more"
            continue
        after = there[2 * stop].of_step
        assert after is not None
        yield (
            f"{_short(name)} stops scaling at {stop:,} GPUs: on {2 * stop:,}, {_seconds(after.exposed)} of a step wait for messages, most of "
            f"them for {after.largest}, beside {_seconds(after.compute)} of products (twice the GPUs give less than {STOPS} times the tokens/s)"
        )
    yield from _best(made)


def _goes_on(gpus: int, ends_with_batch: bool) -> str:
    if ends_with_batch:
        return f"still scales on {gpus:,} GPUs, where the batch ends (no more micro-batches to hand out)"
    return f"scales to {gpus:,} GPUs"


def _best(made: Mapping[str, list[Row]]) -> Iterator[str]:
    """The fastest for each number of GPUs, told as ranges."""
    fastest: dict[int, str] = {}
    for name, rows in made.items():
        for row in rows:
            best = fastest.get(row.gpus)
            before = next((other for other in made[best] if other.gpus == row.gpus), None) if best else None
            if row.of_step and (before is None or row.tokens_per_second > before.tokens_per_second):
                fastest[row.gpus] = name
    ranges: list[tuple[int, int, str]] = []
    for gpus, name in sorted(fastest.items()):
        if ranges and ranges[-1][2] == name:
            ranges[-1] = (ranges[-1][0], gpus, name)
        else:
            ranges.append((gpus, gpus, name))
    for least, most, name in ranges:
        yield f"use zero={name} on {least:,}{f' to {most:,}' if most > least else ''} GPUs: the fastest that fits"
