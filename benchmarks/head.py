"""The head and the loss, forward and backward: this trainer's beside all logits at once, recomputed ones, torch's and Liger's.

python benchmarks/head.py [--width 4096 --vocab 128256 --tokens 16384] [--json benchmarks/results/head.json]

The same hidden states, weights and labels for each way, every token a target; fp32 on a CPU, bf16 on a GPU. A way is a process of its
own, `--repeats` times in turns, and takes `--passes` passes that are timed, after some to warm up.

Told are the median and the minimum of the seconds; the most memory that a pass takes beside what is there before it, the gradients
that it leaves included; and how far these are from fp64's of the same numbers, as the norm of the difference, relative. In bf16
some of that is the rounding of the gradients themselves. Memory is what torch allocates on a GPU; on a CPU it is what is resident, in
one more process that gives freed tensors back at once: what malloc keeps of them depends on their sizes, and is not in it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from memory import begin_peak, peak_mib
from pack import machine
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from turns import in_turns, show, summary, timed, versions, wait_for

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""The mean loss of hidden states [tokens, width] and labels [tokens]."""
NAMES = {
    "full": "all logits, fp32",
    "recomputed": "a part at a time, recomputed",
    "torch": "torch linear_cross_entropy",
    "torch_parts": "the same, in our parts",
    "liger": "Liger",
    "liger_fp32": "Liger, sums in fp32",
    "ours": "sft-dist",
}
WARM_UP_PASSES = 2
REFERENCE_TOKENS = 256  # at a time
M_MMAP_THRESHOLD = -3  # as malloc.h has it


# ---- ways to make the loss ----


def part_tokens(weight: torch.Tensor) -> int:
    """Tokens whose logits this trainer makes at a time."""
    from sft_dist.head import part_places

    return part_places(len(weight), weight.device.type)


def full(weight: torch.nn.Parameter) -> Loss:
    """As everybody writes it."""
    return lambda hidden, labels: F.cross_entropy(F.linear(hidden, weight).float(), labels)


def recomputed(weight: torch.nn.Parameter) -> Loss:
    """As many logits at a time as this trainer makes, and once more in the backward pass."""
    size = part_tokens(weight)

    def of_part(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")

    def loss(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        parts = zip(hidden.split(size), labels.split(size), strict=True)
        losses = [checkpoint(of_part, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        return torch.stack(losses).sum() / len(labels)

    return loss


def torch_own(weight: torch.nn.Parameter, *, has_our_parts: bool = False) -> Loss:
    """torch's, in parts as large as it chooses or as this trainer makes; without options it would make all logits."""
    if not hasattr(F, "linear_cross_entropy") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        sys.exit(f"torch {torch.__version__} has no linear_cross_entropy in parts")
    size = {"batch_chunk_size": part_tokens(weight)} if has_our_parts else {}
    options = torch.nn.LinearCrossEntropyOptions(**size)
    return lambda hidden, labels: F.linear_cross_entropy(hidden, weight, labels, options=options)


def liger(weight: torch.nn.Parameter, **more: Any) -> Loss:
    """Liger's fused linear cross entropy; by default it adds up the gradient of a bf16 weight in bf16."""
    if weight.device.type != "cuda":
        sys.exit("its kernels are for GPUs")
    if find_spec("liger_kernel") is None:
        sys.exit("liger_kernel is not installed")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss(**more)
    return lambda hidden, labels: fused(weight, hidden, labels)


def ours(weight: torch.nn.Parameter) -> Loss:
    """As a model calls it whose `Head` was made."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from sft_dist.head import Head

    vocab, width = weight.shape
    with torch.device("meta"):  # nothing but its output is called
        model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab, n_embd=width, n_layer=0, n_head=1))
    Head(model)
    output = model.get_output_embeddings()
    output.weight = weight
    return lambda hidden, labels: output(hidden, labels, 1 / len(labels)).loss / len(labels)


WAYS: dict[str, Callable[[torch.nn.Parameter], Loss]] = {
    "full": full,
    "recomputed": recomputed,
    "torch": torch_own,
    "torch_parts": partial(torch_own, has_our_parts=True),
    "liger": liger,
    "liger_fp32": partial(liger, accum_dtype=torch.float32),
    "ours": ours,
}


# ---- what they are given, and measured ----


def inputs(tokens: int, width: int, vocab: int, device: str) -> dict[str, torch.Tensor]:
    """Hidden states, weight and labels; logits have a standard deviation of 2."""
    generator, dtype = torch.Generator().manual_seed(0), torch.bfloat16 if device == "cuda" else torch.float32
    hidden = torch.randn(tokens, width, generator=generator).to(device, dtype)
    weight = (torch.randn(vocab, width, generator=generator) * (2 / width**0.5)).to(device, dtype)
    labels = torch.randint(vocab, (tokens,), generator=generator).to(device)
    return {"hidden": hidden, "weight": weight, "labels": labels}


def reference(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The gradients in fp64, by autograd."""
    hidden, weight = (given[name].double().requires_grad_() for name in ("hidden", "weight"))
    for at in range(0, len(hidden), REFERENCE_TOKENS):
        part = slice(at, at + REFERENCE_TOKENS)
        losses = F.cross_entropy(F.linear(hidden[part], weight), given["labels"][part], reduction="sum")
        (losses / len(hidden)).backward()
    return {"hidden": hidden.grad, "weight": weight.grad}


def measure(name: str, folder: Path, passes: int, *, is_of_memory: bool) -> dict[str, Any]:
    """One way, in this process: how much memory it takes, or how long and how exactly it computes."""
    if is_of_memory:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)  # what malloc keeps of freed tensors is no way's own
    given = torch.load(folder / "inputs.pt")
    device = given["hidden"].device.type
    hidden, weight = (torch.nn.Parameter(given[of]) for of in ("hidden", "weight"))
    loss_of = WAYS[name](weight)

    def once() -> None:
        loss_of(hidden, given["labels"]).backward()

    def forget() -> None:
        hidden.grad = weight.grad = None

    timed(once, WARM_UP_PASSES, device, between=forget)
    if is_of_memory:
        forget()
        return {"extra_mib": extra_memory(once, device)}
    seconds = timed(once, passes, device, between=forget)
    truth = torch.load(folder / "reference.pt")
    off = {f"{of}_off": error(one.grad, truth[of]) for of, one in (("hidden", hidden), ("weight", weight))}
    return {**seconds, **off, "threads": torch.get_num_threads()}


def extra_memory(once: Callable[[], None], device: str) -> float:
    """MiB that a call takes at its peak beside what is there before it, what it leaves behind included."""
    if device == "cpu":
        before = begin_peak()
        once()
        return peak_mib() - before
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    once()
    wait_for(device)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def error(made: torch.Tensor, truth: torch.Tensor) -> float:
    """Norm of the difference, of the norm of the truth.

    >>> error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0], dtype=torch.float64).mul(0.8)) < 0.3
    True
    """
    return float((made.double() - truth).norm() / truth.norm())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="of a micro-batch, all of them targets")
    parser.add_argument("--width", type=int, default=256, help="of the hidden states")
    parser.add_argument("--vocab", type=int, default=50_257)
    parser.add_argument("--passes", type=int, default=5, help="that are timed, of each process")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each way")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)  # this process measures it
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    for name in ("tokens", "width", "vocab", "passes", "repeats"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} {getattr(given, name)}: there is nothing to measure; use 1 or more")
    return given


def main() -> None:
    """Measure all ways, print a table, leave it as JSON."""
    given = arguments()
    if given.one:
        print(json.dumps(measure(given.one, given.folder, given.passes, is_of_memory=given.memory)))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        made = inputs(given.tokens, given.width, given.vocab, device)
        torch.save(made, Path(folder, "inputs.pt"))
        torch.save(reference(made), Path(folder, "reference.pt"))
        del made
        words = ["--folder", folder, "--passes", given.passes]
        runs, failed = in_turns(__file__, list(WAYS), words, given.repeats)
        memory, more_failed = in_turns(__file__, list(runs), [*words, "--memory"], 1)
    failed |= more_failed
    results = {
        name: {**summary(runs[name]), **memory[name][0], **worst(runs[name]), "runs": runs[name]} for name in memory
    }
    precision = "bf16" if device == "cuda" else "fp32"
    show(
        f"{precision}, {given.tokens:,} tokens, width {given.width:,}, {given.vocab:,} words; {given.repeats} run(s) of each",
        ["CPU s", "min", "s", "min", "extra MiB", "hidden off", "weight off"],
        {NAMES[name]: cells(of) for name, of in results.items()},
        {NAMES[name]: why for name, why in failed.items()},
    )
    if given.json:
        settings = {name: getattr(given, name) for name in ("tokens", "width", "vocab", "passes", "repeats")}
        about = {
            "machine": {**machine(), "gpu": torch.cuda.get_device_name() if device == "cuda" else None},
            "versions": versions("torch", "transformers", "liger-kernel", "triton"),
            "settings": {**settings, "precision": precision},
        }
        given.json.write_text(json.dumps({**about, "results": results, "failed": failed}, indent=2) + "\n")


def worst(runs: list[dict[str, Any]]) -> dict[str, float]:
    """The errors of the gradients, of the worst run."""
    return {name: max(run[name] for run in runs) for name in ("hidden_off", "weight_off")}


def cells(of: dict[str, Any]) -> list[str]:
    """A row of the table."""
    seconds = [of[key] for key in ("cpu_seconds", "min_cpu_seconds", "wall_seconds", "min_wall_seconds")]
    off = [f"{of[key]:.0e}" for key in ("hidden_off", "weight_off")]
    return [*(f"{value:.4f}" for value in seconds), f"{of['extra_mib']:,.0f}", *off]


if __name__ == "__main__":
    main()
