"""A trace is split so that each instant of a step is in one part: hand-made traces, as the profiler writes them."""

from __future__ import annotations

import random

import pytest

from sft_dist.step_trace import PARTS, split

MAIN, AUTOGRAD = 1, 2


class Trace:
    """Events in milliseconds, as `traceEvents` of the profiler."""

    def __init__(self) -> None:
        self.events: list[dict] = []

    def put(self, kind, name, begin, end, tid=MAIN, **args):
        event = {"ph": "X", "cat": kind, "name": name, "tid": tid, "ts": begin * 1e3, "dur": (end - begin) * 1e3}
        self.events.append({**event, "args": args})

    def range(self, name, begin, end, **more):
        self.put("user_annotation", f"sft_dist::{name}", begin, end, **more)

    def op(self, name, begin, end, **more):
        self.put("cpu_op", name, begin, end, **more)

    def kernel(self, name, begin, end, number, **more):
        self.put("kernel", name, begin, end, tid=7, correlation=number, **more)

    def launch(self, begin, number, **more):
        self.put("cuda_runtime", "cudaLaunchKernel", begin, begin + 0.1, correlation=number, **more)

    def link(self, number, forward, backward, *, tid=MAIN):
        for phase, at, thread in (("s", forward, MAIN), ("f", backward, tid)):
            self.events.append(
                {"ph": phase, "cat": "fwdbwd", "name": "fwdbwd", "id": number, "ts": at * 1e3, "tid": thread}
            )

    def memory(self, at, size, device=0):
        args = {"Total Allocated": size, "Device Type": device}
        self.events.append({"ph": "i", "name": "[memory]", "cat": "cpu_instant_event", "ts": at * 1e3, "args": args})

    def parts(self):
        made = split(self.events)
        assert sum(made.parts.values()) == pytest.approx(made.seconds)
        assert set(made.parts) == set(PARTS)
        return {name: round(1e3 * seconds, 6) for name, seconds in made.parts.items() if seconds > 1e-9}


def test_a_part_is_that_of_the_innermost_range_and_python_is_a_gap():
    trace = Trace()
    trace.range("step", 0, 100)
    trace.range("data", 0, 10)
    trace.op("aten::to", 2, 4)  # part of making the data
    trace.op("aten::linear", 12, 20)
    trace.op("aten::addmm", 13, 19)
    trace.range("attention", 20, 40)  # 5 ms of Python before its operator
    trace.op("aten::scaled_dot_product_attention", 25, 40)
    trace.op("aten::bmm", 26, 39)
    trace.range("optimizer", 50, 90)
    trace.range("communication", 60, 70)  # waiting runs no operator
    trace.op("c10d::allreduce_", 58, 60)
    trace.op("aten::_fused_adamw_", 70, 85)
    trace.op("aten::gelu", 90, 93)
    assert trace.parts() == {
        "attention": 15.0, "matmuls": 8.0, "optimizer": 15.0, "communication": 12.0, "data": 10.0, "other": 3.0,
        "host gaps": 37.0,
    }  # fmt: skip
    assert split(trace.events).others == {"aten::gelu": pytest.approx(3e-3)}


def test_the_backward_pass_is_told_by_what_it_is_linked_to():
    trace = Trace()
    trace.range("step", 0, 100)
    trace.range("head+loss", 0, 10)
    trace.op("_LossAt", 1, 9)
    trace.op("aten::mm", 2, 8)
    trace.op("aten::addmm", 10, 20)
    trace.range("backward", 20, 100)
    for begin, end, name in ((30, 40, "_LossAtBackward"), (50, 60, "AddmmBackward0")):
        trace.op(f"autograd::engine::evaluate_function: {name}", begin, end)
        trace.op(name, begin + 1, end - 1)
        trace.op("aten::mm", begin + 3, end - 3)
    trace.link(1, 1, 31)
    trace.link(2, 10, 51)
    # of the head: 8 of its forward pass (2 are Python), and 4 of its product; what Python does between is a gap
    assert trace.parts() == {"head+loss": 12.0, "matmuls": 14.0, "other": 4.0, "host gaps": 70.0}


def test_what_is_computed_again_stands_by_itself():
    trace = Trace()
    trace.range("step", 0, 100)
    trace.range("layer", 0, 10)
    trace.op("aten::mm", 0, 10)
    trace.op("aten::scaled_dot_product_attention", 10, 20)
    trace.range("backward", 20, 100)
    trace.op("ScaledDotProductBackward0", 30, 60)  # asks for its layer's activations
    trace.link(1, 10, 30)
    trace.range("layer", 35, 55)
    trace.op("aten::mm", 40, 50)
    made = split(trace.events)
    assert made.recomputed == pytest.approx(20e-3)
    assert trace.parts() == {"attention": 20.0, "matmuls": 20.0, "host gaps": 60.0}


def test_with_a_gpu_it_is_what_the_gpu_does_and_what_it_waits_for():
    trace = Trace()
    trace.range("step", 0, 100)
    trace.range("data", 0, 10)
    trace.op("aten::addmm", 10, 12)
    trace.launch(11, 1)
    trace.range("attention", 12, 14)
    trace.op("flash_attn::fwd", 12.5, 13.5)
    trace.launch(13, 2)
    trace.op("c10d::allreduce_", 14, 15)
    trace.launch(14.5, 3)
    trace.range("communication", 70, 80)  # the control messages, while the GPU idles
    trace.put("cuda_runtime", "cudaStreamSynchronize", 85, 95)
    trace.put("cuda_runtime", "cudaMemcpyAsync", 84, 85, correlation=9)
    trace.kernel("gemm", 20, 40, 1)
    trace.kernel("flash", 40, 50, 2)
    trace.kernel("ncclDevKernel_AllReduce", 30, 60, 3)  # 20 of it behind the others
    trace.put("gpu_memcpy", "Memcpy DtoH", 90, 94, tid=7, correlation=9)
    # on the thread of the backward pass, in a part by what it is linked to
    trace.op("FlashBackward0", 61, 63, tid=AUTOGRAD)
    trace.link(1, 12.5, 61, tid=AUTOGRAD)
    trace.launch(62, 4, tid=AUTOGRAD)
    trace.kernel("flash_bwd_kernel", 62, 66, 4)
    made = split(trace.events)
    assert trace.parts() == {
        "matmuls": 20.0, "attention": 14.0, "communication": 21.0, "data": 10.0, "other": 4.0, "host gaps": 31.0,
    }  # fmt: skip
    assert made.hidden_communication == pytest.approx(20e-3)
    assert made.syncs == {"cudaStreamSynchronize": 1}


def test_work_of_the_gpu_that_outlasts_its_step_is_in_the_next_one_too():
    trace = Trace()
    trace.range("step", 0, 50)
    trace.range("step", 50, 100)
    trace.launch(10, 1)
    trace.kernel("gelu", 40, 60, 1)
    trace.kernel("gelu", 120, 130, 2)  # after the last
    assert trace.parts() == {"other": 20.0, "host gaps": 80.0}
    assert split(trace.events).num_steps == 2


@pytest.mark.parametrize("seed", range(2))
def test_whatever_the_gpu_does_the_parts_are_the_whole(seed):
    draw = random.Random(seed)
    trace = Trace()
    for step in range(3):
        trace.range("step", 100 * step, 100 * step + 95)
        trace.range("data", 100 * step + 5, 100 * step + 5 + draw.random() * 20)
    for number in range(200):
        begin = draw.random() * 300
        trace.kernel(draw.choice(["gemm", "ncclDevKernel"]), begin, begin + draw.random() * 5, number)
    # the witness counts busy instants on a grid
    parts = trace.parts()
    busy = 0
    for tick in range(30_000):
        at = (tick + 0.5) / 100
        if at % 100 < 95:
            inside = [e for e in trace.events if e["cat"] == "kernel" and e["ts"] <= at * 1e3 < e["ts"] + e["dur"]]
            busy += any(e["name"] == "gemm" for e in inside)
    assert parts["other"] == pytest.approx(busy / 100, rel=0.01)


def test_memory_is_that_of_the_last_step_and_its_peaks_those_of_the_phases():
    trace = Trace()
    trace.range("step", 0, 50)
    trace.range("step", 50, 100)
    trace.range("forward", 50, 60)
    trace.range("backward", 60, 80)
    for at, size in ((10, 999), (55, 5), (65, 9), (75, 7), (90, 1)):
        trace.memory(at, size)
    made = split(trace.events)
    assert [size for _, size in made.memory] == [5, 9, 7, 1]
    assert made.peaks == {"forward": 5, "backward": 9}
    trace.memory(70, 123, device=1)  # where there is a GPU, it is the GPU's
    assert split(trace.events).peaks == {"backward": 123}


def test_a_trace_without_a_step_is_no_profile():
    with pytest.raises(ValueError, match="no step in this trace"):
        split([{"ph": "X", "cat": "cpu_op", "name": "aten::mm", "tid": 1, "ts": 0.0, "dur": 1.0}])
