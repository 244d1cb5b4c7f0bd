"""What interrupts a step. Between micro-batches no rank waits for its device, and in a step as often as is said here: the places are counted.

What asks a device for a number is the same operator on a CPU, so no GPU is needed to count; of copies to the device and of DeepSpeed's
streams it is counted what would wait there.
"""

from __future__ import annotations

import gc
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tests.dist import tiny
from tests.unit.test_kernels import varlen_by_hand
from tests.workers import run_workers

ATEN = torch.ops.aten
ASKING = {ATEN._local_scalar_dense.default, ATEN.nonzero.default, ATEN.equal.default, ATEN.masked_select.default}


class Asked(TorchDispatchMode):
    """How often a number, or a size that depends on numbers, was asked for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func is ATEN.index.Tensor and any(one is not None and one.dtype == torch.bool for one in args[1])
        self.count += by_mask or func in ASKING
        return func(*args, **(kwargs or {}))


class Stream:
    """What DeepSpeed takes for a stream or an event of a GPU; it is counted how often the host waits for one."""

    waits = 0

    def synchronize(self, *ignored):
        Stream.waits += 1

    def wait_stream(self, other):
        """The device waits, not the host."""

    def record(self, stream=None):
        """The same."""

    def query(self):
        return True


def as_on_a_gpu():
    """DeepSpeed takes its streams' ways; what it would wait for there is done already."""
    from deepspeed.accelerator import get_accelerator

    kind = type(get_accelerator())
    kind.is_synchronized_device = kind.resolves_data_dependency = lambda self: False
    kind.synchronize = Stream.synchronize
    kind.current_stream = kind.default_stream = lambda self, index=None: Stream()
    kind.Stream = kind.Event = property(lambda self: Stream)
    torch.Tensor.record_stream = lambda self, stream: None


class Lent:
    """A tensor that has to be copied to the device, which must not be waited for."""

    def __init__(self, tensor, waits):
        self.tensor, self.waits = tensor, waits

    def to(self, device, non_blocking=False):
        self.waits.append(not non_blocking)
        return self.tensor


def asked(topology, stage, options, kernel):
    """[asked for while each micro-batch but the last was learned, ..., by the rest of the step].

    Each: numbers that were asked for, then waits for a copy or a stream.
    """
    as_on_a_gpu()
    made, comms = tiny.engine(topology, stage, micro_batch_rows=2, kind="llama", **options)
    if kernel == "varlen":

        def opaque(*args, **more):  # how the stand-in finds out where documents lie is not to be counted
            with _disable_current_modes():
                return varlen_by_hand(*args, **more)

        varlen.varlen_attn = opaque
        made.use_kernel("varlen")
    tiny.learn(made, comms, range(1))
    copies, marks = [], []
    batches = [
        SimpleNamespace(
            **{name: Lent(getattr(one, name), copies) for name in ("tokens", "targets", "positions")},
            **{name: getattr(one, name) for name in ("first_ordinal", "rows", "num_targets", "num_documents")},
        )
        for one in tiny.micro_batches(1, 2)
    ]

    def mark():
        marks.append((counted.count, sum(copies) + Stream.waits))

    def told():
        for batch in batches:
            mark()
            yield batch
        mark()  # the last one is learned after that

    with Asked() as counted:
        made.learn(told(), denominator=50, learning_rate=1e-3)
    mark()
    assert len(copies) == 3 * len(batches)
    return [tuple(b - a for a, b in zip(before, after, strict=True)) for before, after in itertools.pairwise(marks)]


@pytest.mark.parametrize(
    ("stage", "options", "of_step"),
    [
        # the loss, the norm, and DeepSpeed's own: whether the norm is a number, how much to clip, whether there is an overflow
        (0, {"precision": "fp32"}, (2, 0)),
        (1, {"precision": "fp32"}, (5, 0)),
        (1, {"precision": "bf16"}, (4, 0)),
        (2, {"precision": "bf16"}, (6, 0)),
    ],
)
def test_micro_batches_wait_for_nothing(stage, options, of_step):
    *between, last = run_workers(asked, 1, stage, options, "varlen")[0]
    assert (between, last) == ([(0, 0)] * 4, of_step)


def test_at_stage_3_deepspeed_waits_for_its_stream_behind_each_backward_pass():
    options = {"precision": "bf16", "gradient_checkpointing": True}
    *between, last = run_workers(asked, 1, 3, options, "varlen")[0]
    assert (between, last) == ([(0, 0), (0, 1), (0, 1), (0, 1)], (3, 1 + 1)), "and once for the step"


def test_at_stage_2_communication_beside_the_backward_pass_is_waited_for_behind_it():
    options = {"precision": "bf16", "section": {"overlap_comm": True}}
    *between, last = run_workers(asked, 1, 2, options, "varlen")[0]
    assert (between, last) == ([(0, 0), (0, 1), (0, 1), (0, 1)], (6, 1))


def test_sdpa_waits_once_a_micro_batch():
    """transformers looks for documents in every micro-batch; it is also what shows that the count sees something."""
    *between, last = run_workers(asked, 1, 2, {"precision": "bf16"}, "sdpa")[0]
    assert (between, last) == ([(0, 0), *[(1, 0)] * 3], (1 + 6, 0)), "a micro-batch is asked for before the one in front of it is learned"


def garbage(topology, stage, options):
    """(objects, tensors among them) that only the garbage collector would find after a step."""
    made, comms = tiny.engine(topology, stage, micro_batch_rows=2, **options)
    tiny.learn(made, comms, range(1))
    gc.collect()
    gc.disable()
    tiny.learn(made, comms, range(1, 2))
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    return len(gc.garbage), sum(isinstance(one, torch.Tensor) for one in gc.garbage)


@pytest.mark.parametrize(("stage", "options"), [(1, {}), (3, {"gradient_checkpointing": True})])
def test_no_tensor_waits_for_the_garbage_collector(stage, options):
    objects, tensors = run_workers(garbage, 1, stage, {"precision": "bf16", **options})[0]
    assert tensors == 0
    assert (objects > 0) == bool(options), "recomputation leaves cycles of functions: the count sees something"
