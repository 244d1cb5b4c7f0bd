"""One step of AdamW: torch's ways and DeepSpeed's on the same weights and gradients, beside fp64.

python benchmarks/optimizer.py [--parameters 50000000] [--flat] [--json benchmarks/results/optimizer.json]

fp32 weights, gradients and moments: half of the parameters in one tensor, the other half in eight, but a hundredth in 64; with `--flat`
in one, as ZeRO 1 to 3 hand them over. A way is a process of its own, `--repeats` times in turns: a step to warm up, which makes the
moments, and `--steps` that are timed. Between steps the gradients change their sign and are halved.

Told are the median and the minimum of the seconds, and the largest difference of a weight from an AdamW in fp64 after all
steps. DeepSpeed compiles its kernels when they are first asked for, which takes minutes and is not in the seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pack import machine
from turns import in_turns, show, summary, timed, versions

ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
NAMES = {
    "loop": "torch, a tensor at a time",
    "foreach": "torch, foreach",
    "fused": "torch, fused: sft-dist",
    "fused_adam": "DeepSpeed FusedAdam",
    "cpu_adam": "DeepSpeedCPUAdam",
}
WARM_UP_STEPS = 1


# ---- ways to step ----


def fused(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    """As the engine makes it."""
    from sft_dist.optimizer import GatedAdamW

    return GatedAdamW(parameters, fused=True, **ADAMW)


def deepspeed_adam(parameters: list[torch.Tensor], name: str, device: str) -> torch.optim.Optimizer:
    """One of DeepSpeed's, which decay the weights apart from the gradient by default too."""
    if parameters[0].device.type != device:
        sys.exit(f"its kernels are for weights on {device}")
    os.environ["DS_ACCELERATOR"] = device
    from deepspeed.ops import adam

    return getattr(adam, name)(parameters, **ADAMW)


WAYS: dict[str, Callable[[list[torch.Tensor]], torch.optim.Optimizer]] = {
    "loop": partial(torch.optim.AdamW, foreach=False, fused=False, **ADAMW),
    "foreach": partial(torch.optim.AdamW, foreach=True, **ADAMW),
    "fused": fused,
    "fused_adam": partial(deepspeed_adam, name="FusedAdam", device="cuda"),
    "cpu_adam": partial(deepspeed_adam, name="DeepSpeedCPUAdam", device="cpu"),
}


# ---- what they are given, and measured ----


def sizes(parameters: int, *, is_flat: bool) -> list[int]:
    """Parameters of each tensor.

    >>> sizes(6400, is_flat=True), sizes(6400, is_flat=False)[:2], len(sizes(6400, is_flat=False))
    ([6400], [3200, 392], 73)
    """
    if is_flat:
        return [parameters]
    small, medium = parameters // 6400, parameters * 49 // 800
    return [parameters - 8 * medium - 64 * small, *[medium] * 8, *[small] * 64]


def inputs(number: int, size: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and the gradient of the first step of a tensor, both about 0.02."""
    generator = torch.Generator().manual_seed(number)
    weights, gradients = (torch.randn(size, generator=generator).mul_(0.02).to(device) for _ in range(2))
    return weights, gradients


def next_gradients(parameters: list[torch.Tensor]) -> None:
    """Exact in any precision."""
    for parameter in parameters:
        parameter.grad.mul_(-0.5)


def reference(number: int, size: int, steps: int, device: str) -> torch.Tensor:
    """Weights of a tensor after all steps in fp64."""
    weights, gradients = (of.double() for of in inputs(number, size, device))
    weights.grad = gradients
    adam = torch.optim.AdamW([weights], foreach=False, fused=False, **ADAMW)
    for _ in range(steps):
        next_gradients([weights])
        adam.step()
    return weights.cpu()


def measure(name: str, given: argparse.Namespace, device: str) -> dict[str, Any]:
    """One way, in this process."""
    parameters = []
    for number, size in enumerate(sizes(given.parameters, is_flat=given.flat)):
        weights, gradients = inputs(number, size, device)
        parameters.append(torch.nn.Parameter(weights))
        parameters[-1].grad = gradients
    adam = WAYS[name](parameters)
    change = partial(next_gradients, parameters)
    timed(adam.step, WARM_UP_STEPS, device, between=change)
    seconds = timed(adam.step, given.steps, device, between=change)
    truths = torch.load(given.reference, mmap=True)
    both = zip(parameters, truths, strict=True)
    off = max(float((of.detach() - truth.to(device)).abs().max()) for of, truth in both)
    return {**seconds, "weights_off": off, "threads": torch.get_num_threads()}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=lambda word: int(float(word)), default=50_000_000)
    parser.add_argument("--flat", action="store_true", help="in one tensor")
    parser.add_argument("--steps", type=int, default=5, help="that are timed, of each process")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each way")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)  # this process measures it
    parser.add_argument("--reference", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    for name, least in {"parameters": 6400, "steps": 1, "repeats": 1}.items():
        if getattr(given, name) < least:
            parser.error(f"--{name} {getattr(given, name)}: there is nothing to measure; use {least:,} or more")
    return given


def main() -> None:
    """Measure all ways, print a table, leave it as JSON."""
    given = arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if given.one:
        print(json.dumps(measure(given.one, given, device)))
        return
    steps = WARM_UP_STEPS + given.steps
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "reference.pt")
        tensors = enumerate(sizes(given.parameters, is_flat=given.flat))
        torch.save([reference(number, size, steps, device) for number, size in tensors], path)
        words = ["--parameters", given.parameters, "--steps", given.steps, "--reference", path]
        runs, failed = in_turns(__file__, list(WAYS), [*words, *(["--flat"] if given.flat else [])], given.repeats)
    results = {
        name: {**summary(made), "weights_off": max(run["weights_off"] for run in made), "runs": made}
        for name, made in runs.items()
    }
    show(
        f"AdamW, fp32, {given.parameters:,} parameters in {'one tensor' if given.flat else '73 tensors'}; {given.repeats} run(s) of each",
        ["CPU s", "min", "s", "min", "weights off"],
        {NAMES[name]: cells(of) for name, of in results.items()},
        {NAMES[name]: why for name, why in failed.items()},
    )
    if given.json:
        about = {
            "machine": {**machine(), "gpu": torch.cuda.get_device_name() if device == "cuda" else None},
            "versions": versions("torch", "deepspeed"),
            "settings": {name: getattr(given, name) for name in ("parameters", "flat", "steps", "repeats")},
        }
        given.json.write_text(json.dumps({**about, "results": results, "failed": failed}, indent=2) + "\n")


def cells(of: dict[str, Any]) -> list[str]:
    """A row of the table."""
    seconds = [of[key] for key in ("cpu_seconds", "min_cpu_seconds", "wall_seconds", "min_wall_seconds")]
    return [*(f"{value:.4f}" for value in seconds), f"{of['weights_off']:.0e}"]


if __name__ == "__main__":
    main()
