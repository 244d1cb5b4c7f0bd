"""The model of `plan --scale` beside real steps on CPU ranks, at ZeRO stages 1, 2 and 3.

python benchmarks/scaling.py [--ranks 2 4] [--json benchmarks/results/scaling.json]

What a row, the optimizer and the network take is measured in the same run and given to the model: of as many worlds of one rank, all at
once, because ranks here share cores and memory, steps of two and of eight micro-batches (their difference is the products, what is left
the optimizer and what Python takes), and of each number of ranks an all-reduce by gloo. What is foretold is the step of the ranks together;
nothing is fitted to it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from pack import machine

from sft_dist.scaling import ATTAINED, Job, Network, step
from sft_dist.topology import Topology
from sft_dist.zero import zero_config
from tests.dist import tiny
from tests.workers import run_workers

ROWS = 2  # of a micro-batch
OPTIMIZER_BYTES = 36  # of a parameter in fp32, as the model counts


def timed(
    topology: Topology, stage: int, micro_batches: int, steps: int, width: int, start: float = 0.0
) -> dict[str, Any]:
    """Median seconds of a step of so many micro-batches a rank, from the time `start` on, the parameters, and which of them stage 3 keeps."""
    tiny.MODELS["gpt2"] = {"model_type": "gpt2", "n_layer": 4, "n_embd": width, "n_head": 4}
    count = micro_batches * ROWS * topology.world_size
    rows = {"micro_batch_rows": ROWS, "global_batch_rows": count}
    made, comms = tiny.engine(topology, stage, **rows)
    tiny.learn(made, comms, range(2))
    time.sleep(max(0.0, start - time.time()))
    seconds = []
    for number in range(steps):
        comms.sum([0])  # together
        started = time.perf_counter()
        tiny.learn(made, comms, range(2 + number, 3 + number))
        seconds.append(time.perf_counter() - started)
    sizes = [getattr(one, "ds_numel", one.numel()) for one in made.deepspeed.module.parameters()]
    small = _section(stage).get("stage3_param_persistence_threshold", 0)
    persistent = sum(size for size in sizes if size <= small)
    return {"seconds": statistics.median(seconds), "parameters": sum(sizes), "persistent": persistent}


def _section(stage: int) -> dict[str, Any]:
    return zero_config(f"ds_configs/zero{stage}.json")["zero_optimization"]


def apart(worlds: int, *about: int) -> dict[str, Any]:
    """The same of so many ranks that know nothing of one another, at the same time: the slowest."""
    with ThreadPoolExecutor(worlds) as pool:
        start = time.time() + 4.0 + worlds  # all are built by then
        made = list(pool.map(lambda _: run_workers(timed, 1, *about, start)[0], range(worlds)))
    return max(made, key=lambda one: one["seconds"])


def rate(topology: Topology, parameters: int, repeats: int) -> float:
    """Bytes a second each way that an all-reduce of so many fp32 numbers reaches, by the model's own formula."""
    from sft_dist.comms import Comms

    torch.set_num_threads(1)
    comms, values, seconds = Comms(topology, torch.device("cpu")), torch.zeros(parameters), []
    for _ in range(repeats):
        comms.sum([0])
        started = time.perf_counter()
        comms.sum_tensor(values)
        seconds.append(time.perf_counter() - started)
    ranks = topology.world_size
    return 2 * (ranks - 1) / ranks * 4 * parameters / statistics.median(seconds)


def measure(stages: list[int], all_ranks: list[int], steps: int, width: int) -> list[dict[str, Any]]:
    """A line a stage and number of ranks: foretold and measured seconds, and the error."""
    lines = []
    for stage in stages:
        for ranks in all_ranks:
            few, many = (apart(ranks, stage, count, steps, width) for count in (2, 8))
            of_row = (many["seconds"] - few["seconds"]) / (6 * ROWS)
            rest = few["seconds"] - 2 * ROWS * of_row
            if min(of_row, rest) <= 0:
                sys.exit(
                    f"stage {stage}: a rank took {few['seconds']:.3f} s for two micro-batches and {many['seconds']:.3f} s for eight: the machine "
                    "is too busy to tell products from the rest; repeat it on an idle one, or with more --steps"
                )
            per_second = run_workers(rate, ranks, few["parameters"], 5)[0]
            job = Job(
                few["parameters"], few["parameters"], few["persistent"], of_row, ROWS, "fp32", 1.0,
                OPTIMIZER_BYTES * few["parameters"] / rest,
            )  # fmt: skip
            network = Network(per_second / ATTAINED, per_second / ATTAINED, ranks)
            foretold = step(job, _section(stage), network, ranks, 2)
            seen = max(result["seconds"] for result in run_workers(timed, ranks, stage, 2, steps, width))
            lines.append(
                {
                    "stage": stage,
                    "ranks": ranks,
                    "foretold": foretold.seconds,
                    "measured": seen,
                    "error": foretold.seconds / seen - 1,
                    "gigabytes_per_second": per_second / 1e9,
                    "row_seconds": of_row,
                }
            )
    return lines


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--stages", type=int, nargs="+", choices=[1, 2, 3], default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--width", type=int, default=512, help="of the model")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    if min(chosen.ranks) < 2:
        sys.exit(f"--ranks {chosen.ranks}: one rank is the model's own measure; name 2 or more")
    lines = measure(chosen.stages, chosen.ranks, chosen.steps, chosen.width)
    print(f"{'stage':>6}{'ranks':>6}{'foretold s':>12}{'measured s':>12}{'error':>8}")
    for line in lines:
        print(
            f"{line['stage']:>6}{line['ranks']:>6}{line['foretold']:>12.3f}{line['measured']:>12.3f}{line['error']:>8.0%}"
        )
    if chosen.json:
        chosen.json.write_text(
            json.dumps({"machine": machine(), "load_average": os.getloadavg(), "cases": lines}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
