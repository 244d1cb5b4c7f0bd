"""Steps of a run under torch's profiler: ranges around their parts, the clock without it, and how fast the device can be."""

from __future__ import annotations

import contextlib
import gc
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sft_dist import account, head, kernels
from sft_dist import step_trace as parts
from sft_dist.comms import Comms
from sft_dist.engine import Engine
from sft_dist.step_trace import RANGE, Split, split

Range = Callable[[str], AbstractContextManager[Any]]


def _nothing(name: str) -> AbstractContextManager[Any]:
    return contextlib.nullcontext()


def _range(name: str) -> AbstractContextManager[Any]:
    return torch.profiler.record_function(RANGE + name)


@dataclass(frozen=True, slots=True)
class Profile:
    """What each of a rank's steps took, without the profiler (`plain_seconds`) and with it (`seconds`), and the latter split.

    `not_applied`: steps that fp16's loss scale, or a number that is none, kept from the optimizer. `peak_bytes`: of the GPU,
    without the profiler; None where there is no GPU.
    """

    plain_seconds: list[float]
    seconds: list[float]
    split: Split
    not_applied: int
    peak_bytes: int | None

    def without_memory(self) -> Profile:
        """The same without the memory's course, which is long."""
        return replace(self, split=replace(self.split, memory=[]))


def profile(engine: Engine, comms: Comms, steps: Callable[[], Iterable[Any]], num_steps: int, trace: Path) -> Profile:
    """Take the first `num_steps` of `steps()` three times: to warm up, by the clock, and under the profiler.

    The learning rate is 0: no weight moves. Every rank calls it; each writes its `trace`.
    """
    _take(engine, comms, steps(), 1, _nothing)
    if engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(engine.device)
    plain, _ = _take(engine, comms, steps(), num_steps, _nothing)
    peak = engine.peak_device_bytes
    activities = [torch.profiler.ProfilerActivity.CPU]
    if engine.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    gc.collect()
    with watched(engine), torch.profiler.profile(activities=activities, profile_memory=True) as seen:
        seconds, not_applied = _take(engine, comms, steps(), num_steps, _range)
    seen.export_chrome_trace(str(trace))
    made = split(json.loads(trace.read_bytes())["traceEvents"])
    return Profile(plain, seconds, made, not_applied, peak)


def _take(
    engine: Engine, comms: Comms, steps: Iterable[Any], num_steps: int, in_range: Range
) -> tuple[list[float], int]:
    """(seconds of each step, how many were not applied)."""
    seconds, not_applied, iterator = [], 0, iter(steps)
    for _ in range(num_steps):
        started = time.perf_counter()
        with in_range(parts.STEP):
            with in_range(parts.DATA):
                step = next(iterator)
            not_applied += not _learn(engine, comms, step, in_range)
        seconds.append(time.perf_counter() - started)
    return seconds, not_applied


def _learn(engine: Engine, comms: Comms, step: Any, in_range: Range) -> bool:
    """A step as the train loop takes it, with all that the ranks tell one another; returns whether it was applied."""
    [targets] = comms.sum([step.num_targets])
    applied = engine.learn(
        _in_range(step.micro_batches, in_range),
        denominator=max(1, targets),
        learning_rate=0.0,
        should_abandon=lambda: comms.agree(False),
        total=lambda loss_sum: comms.sum_tensor(loss_sum).item(),
    )
    assert applied is not None  # nobody wants to stop
    account.exchange(applied, comms)  # waits for the device, as the loop does
    return applied.is_applied


def _in_range(items: Iterable[Any], in_range: Range) -> Iterator[Any]:
    iterator, end = iter(items), object()
    while True:
        with in_range(parts.DATA):
            item = next(iterator, end)
        if item is end:
            return
        yield item


@contextlib.contextmanager
def watched(engine: Engine) -> Iterator[None]:
    """Within it there is a range around each part of a step that can be told by what is called."""
    model = engine.deepspeed.module
    with contextlib.ExitStack() as stack:
        for owner, method, name in [
            (engine.deepspeed, "forward", parts.FORWARD),
            (engine.deepspeed, "backward", parts.BACKWARD),
            (engine.deepspeed, "step", parts.OPTIMIZER),
            (model.get_output_embeddings(), "forward", parts.HEAD),
            (head, "scores_of", parts.HEAD),  # of a model whose own head is taken
        ]:
            stack.enter_context(_around(owner, method, name))
        for module in model.modules():
            if "_gradient_checkpointing_func" in vars(module):  # as transformers sets it
                stack.enter_context(_around_layer(module))
        stack.enter_context(kernels.watched(model, lambda: _range(parts.ATTENTION)))
        stack.enter_context(Comms.watched(lambda: _range(parts.COMMUNICATION)))
        yield


@contextlib.contextmanager
def _around(owner: Any, method: str, name: str) -> Iterator[None]:
    """A range around a method of one object, or a function of a module."""
    called, was_own = getattr(owner, method), method in vars(owner)

    def in_range(*arguments: Any, **more: Any) -> Any:
        with _range(name):
            return called(*arguments, **more)

    setattr(owner, method, in_range)
    try:
        yield
    finally:
        if was_own:
            setattr(owner, method, called)
        else:
            delattr(owner, method)


@contextlib.contextmanager
def _around_layer(module: Any) -> Iterator[None]:
    """A range around a layer each time that it is computed, the second time in the backward pass."""
    checkpointed = module._gradient_checkpointing_func

    def twice(layer: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        def in_range(*arguments: Any, **more: Any) -> Any:
            with _range(parts.LAYER):
                return layer(*arguments, **more)

        return checkpointed(in_range, *arguments, **more)

    module._gradient_checkpointing_func = twice
    try:
        yield
    finally:
        module._gradient_checkpointing_func = checkpointed


def matmul_flops(device: torch.device, precision: str, *, seconds: float = 0.5) -> float:
    """The most FLOP/s that a product of square matrices reaches on the device, as torch is set up; takes that many seconds.

    >>> matmul_flops(torch.device("cpu"), "fp32", seconds=0.01) > 1e6
    True
    """
    size = 8192 if device.type == "cuda" else 1024
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    left, right = torch.randn(2, size, size, device=device, dtype=torch.float32).to(dtype)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        started = time.perf_counter()
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best
