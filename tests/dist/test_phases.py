"""Where the time goes, by an independent clock: what is slow shows under its own name, and the phases are the whole time."""

from __future__ import annotations

import math
import time

from sft_dist.checkpoint import Checkpoints
from sft_dist.evaluate import Evaluator, Measured
from sft_dist.limits import StopRequest
from sft_dist.metrics import Metrics
from sft_dist.phases import PHASES
from sft_dist.retention import Retention
from sft_dist.schedule import Cadence
from sft_dist.state import TrainState
from sft_dist.trainer import train
from sft_dist.usage import Budget, Journal, read_usage
from tests.dist import tiny
from tests.dist.test_trainer import Kept, Step
from tests.workers import run_workers

COUNT, NAP = 3, 0.25


def slow_steps():
    for number in range(COUNT):
        time.sleep(NAP)
        yield Step(8, 128, int(tiny.rows(number).targets.sum()), slow_micro_batches(number))


def slow_micro_batches(number):
    for batch in tiny.micro_batches(number, 4):
        time.sleep(NAP)
        yield batch


class SlowEvaluator(Evaluator):
    def metrics(self, forward):
        time.sleep(NAP)
        batch = tiny.rows(0)
        forward(*batch.asked)
        return Measured({"validation_loss": 1.0})

    def loss(self, forward):
        return self.metrics(forward)


class SlowSink(Kept):
    def write(self, record):
        time.sleep(NAP * ("loss" in record))
        super().write(record)


def _slow_loop(topology, folder):
    made, comms = tiny.engine(topology, 2, micro_batch_rows=4)
    sink, forward = SlowSink(), made._scores
    made._scores = lambda *batch: (time.sleep(NAP), forward(*batch))[1]
    before = time.perf_counter()
    journal = Journal(folder / "usage.jsonl", "7-0", 1, time.time())
    after = time.perf_counter()
    train(
        steps=slow_steps(),
        engine=made,
        comms=comms,
        state=TrainState(),
        learning_rate=lambda step: 1e-3,
        evaluator=SlowEvaluator(comms, None, None),
        checkpoints=Checkpoints(
            folder / "checkpoints", identity={}, attachments={}, retention=Retention(2), stage=2, comms=comms
        ),
        metrics=Metrics((sink,)),
        stop=StopRequest(),
        cadence=Cadence(COUNT, evaluate_steps=1, checkpoint_steps=2),
        budget=Budget(journal=journal),
    )
    least = time.perf_counter() - after
    journal._append()
    most = time.perf_counter() - before
    (line,) = read_usage(journal.path)
    return line["phase_seconds"], least, most, sink.lines


def test_what_is_slow_shows_under_its_own_name_and_all_phases_are_the_whole_time(tmp_path):
    [(phases, least, most, lines)] = run_workers(_slow_loop, 1, tmp_path)
    naps = {"data": 3 * COUNT, "compute": 2 * COUNT, "evaluate": COUNT + 1, "log": COUNT}
    assert all(phases[phase] >= count * NAP for phase, count in naps.items())
    assert least - 0.001 <= math.fsum(phases.values()) <= most + 0.001
    told = {name: sum(values.get(f"{name}_seconds", 0.0) for _, values in lines) for name in PHASES}
    assert all(told[name] <= phases.get(name, 0.0) + 1e-5 for name in PHASES)
    # all that came before the last line was written is told by the lines
    assert told["data"] >= naps["data"] * NAP
    assert told["compute"] >= naps["compute"] * NAP
    assert told["evaluate"] >= COUNT * NAP
