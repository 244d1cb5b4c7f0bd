"""The train loop on plain lists: it needs no data module, agrees before it acts, and counts what it did."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace

import pytest
import torch

from sft_dist.checkpoint import Checkpoints
from sft_dist.evaluate import Evaluator
from sft_dist.limits import StopRequest
from sft_dist.metrics import Metrics
from sft_dist.retention import Retention
from sft_dist.state import TrainState
from sft_dist.stragglers import Stragglers
from sft_dist.trainer import Cadence, train
from tests.dist import tiny
from tests.workers import RankError, run_workers


@dataclass
class Step:
    """What the trainer asks of a step."""

    num_rows: int
    num_tokens: int
    num_targets: int
    micro_batches: list


class Kept:
    """A sink that remembers."""

    def __init__(self):
        self.lines = []

    def scalars(self, step, values):
        self.lines.append((step, dict(values)))

    def samples(self, step, answers):
        raise AssertionError("nothing was to be sampled")

    def close(self):
        pass


class WantsToStop(StopRequest):
    """Wishes to stop when it has been asked so many times."""

    def __init__(self, times):
        super().__init__()
        self.times = times

    def is_wanted(self):
        self.times -= 1
        return self.times < 0


def steps(topology, count):
    """Steps of the tiny rows as this rank sees them, as a list."""
    made = []
    for number in range(count):
        mine = tiny.micro_batches(number, 1)[topology.rank :: topology.world_size]
        made.append(Step(8, 128, sum(int(batch.targets.sum()) for batch in mine), mine))
    return made


def loop(topology, folder, count=6, asked_times=None, poison=False, cadence=None, slow_rank=None):
    made, comms = tiny.engine(topology, 2, micro_batch_rows=1)
    if topology.rank == slow_rank:
        forward = made._loss_sum
        made._loss_sum = lambda *batch: time.sleep(0.06) or forward(*batch)
    if poison:
        with torch.no_grad():
            next(made.deepspeed.module.parameters()).fill_(float("nan"))
    kept = Kept()
    stop = WantsToStop(asked_times) if asked_times is not None and topology.rank == 1 else StopRequest()
    checkpoints = Checkpoints(folder, identity={}, attachments={}, retention=Retention(3), stage=2, comms=comms)
    reason, state = train(
        steps=steps(topology, count),
        engine=made,
        comms=comms,
        state=TrainState(),
        learning_rate=lambda step: 1e-3,
        evaluator=Evaluator(comms, None, None),
        checkpoints=checkpoints,
        metrics=Metrics((kept,)),
        stop=stop,
        cadence=cadence or Cadence(last_step=count),
        stragglers=Stragglers(["n1", "n2"]) if slow_rank is not None else None,
    )
    return reason, state, kept.lines, sorted(path.name for path in folder.glob("step-*"))


def test_the_rank_that_all_wait_for_is_named(tmp_path):
    ranks = run_workers(_slow_loop, 2, tmp_path)
    for lines, told in ranks:
        assert all(1 < values["slowest_rank_ratio"] <= 2 for _, values in lines if "loss" in values)
        assert len(told) == 1
        assert told[0].startswith("warning: slow for 5 steps now, so that all wait: rank 1 on n2. The slowest")


def _slow_loop(topology, folder):
    told = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("sft_dist").addHandler(handler)
    return loop(topology, folder, slow_rank=1)[2], told


@pytest.fixture(scope="module")
def reference():
    return run_workers(_reference, 1)[0]


def _reference(topology):
    return tiny.reference(6)


def test_a_list_is_trained_to_its_end(reference, tmp_path):
    ranks = run_workers(loop, 2, tmp_path)
    reason, state, lines, saved = ranks[0]
    assert reason == "completed"
    assert replace(ranks[1][1], gpu_seconds=0.0) == replace(state, gpu_seconds=0.0)
    assert (state.step, state.rows_consumed, state.adam_step) == (6, 48, 6)
    assert state.tokens == 6 * 2 * 128
    assert state.target_tokens == sum(int(tiny.rows(step).targets.sum()) for step in range(6))
    assert [step for step, _ in lines] == [1, 2, 3, 4, 5, 6, 6]
    cost = lines.pop()[1]
    assert cost["checkpoint_bytes"] == 12 * sum(p.numel() for p in tiny.model().parameters())
    assert all(value > 0 for value in cost.values())
    tiny.assert_same_curve([(v["loss"], v["grad_norm"]) for _, v in lines], reference, tolerance=2e-6)
    assert saved == ["step-00000006"]
    assert state.gpu_seconds > 0


def test_every_so_many_steps_it_logs_and_saves(tmp_path):
    _, _, lines, saved = run_workers(loop, 2, tmp_path, cadence=Cadence(6, log_steps=3, checkpoint_steps=2))[0]
    assert [step for step, values in lines if "loss" in values] == [3, 6]
    assert [step for step, values in lines if "checkpoint_bytes" in values] == [2, 4, 6]
    assert saved == ["step-00000002", "step-00000004", "step-00000006"]


@pytest.mark.parametrize(
    ("asked_times", "done"),
    [
        (0, 0),  # at once: nothing was done, nothing is saved
        (1 + 1 + 4, 1),  # before the second step: one agreement at the start, and one and four micro-batches a step
        (1 + 1 + 4 + 1 + 2, 1),  # in the middle of the second step, which is abandoned
    ],
)
def test_the_wish_of_one_rank_stops_all_after_a_completed_step(tmp_path, asked_times, done):
    for reason, state, _, saved in run_workers(loop, 2, tmp_path, asked_times=asked_times):
        assert (reason, state.step, state.rows_consumed) == ("stopped", done, 8 * done)
        assert saved == ([f"step-{done:08d}"] if done else [])


class AtTheEnd:
    """Measures with three forward passes, in the second of which this rank is asked to stop: by the flag it is given."""

    def __init__(self, stop=None):
        self.stop, self.count = stop, 0

    def metrics(self, forward):
        batch = tiny.rows(0)
        for _ in range(3):
            forward(batch.tokens, batch.positions)
            self.count += 1
            if self.stop is not None and self.count > 3:  # the first three are those before the first step
                self.stop.cause = "SIGTERM"
        return {"validation_loss": 1.0}

    def samples(self, forward):
        return []


def _left_while_measured(topology, folder):
    made, comms = tiny.engine(topology, 2, micro_batch_rows=1)
    told = []
    state = TrainState()
    for is_asked in (True, False):
        kept, stop = Kept(), StopRequest()
        checkpoints = Checkpoints(folder, identity={}, attachments={}, retention=Retention(3), stage=2, comms=comms)
        reason, state = train(
            steps=steps(topology, 2) if is_asked else [],
            engine=made,
            comms=comms,
            state=state,
            learning_rate=lambda step: 1e-3,
            evaluator=AtTheEnd(stop if is_asked and topology.rank == 1 else None),
            checkpoints=checkpoints,
            metrics=Metrics((kept,)),
            stop=stop,
            cadence=Cadence(last_step=2),
            is_measured=False,
        )
        told.append((reason, state.step, [step for step, values in kept.lines if "validation_loss" in values]))
    return told


def test_asked_to_stop_while_the_end_is_measured_it_stops_and_measures_in_its_next_life(tmp_path):
    for told in run_workers(_left_while_measured, 2, tmp_path):
        assert told == [("stopped", 2, [0]), ("completed", 2, [2])]


def test_a_loss_that_is_no_number_ends_the_run_and_saves_nothing(tmp_path):
    with pytest.raises(
        RankError, match=r"DivergedError: step 1: loss nan, .*rows 0 to 7 of the stream.*lower train\.learning_rate"
    ):
        run_workers(loop, 2, tmp_path, poison=True)
    assert not list(tmp_path.glob("step-*"))


def hang(topology):
    if topology.rank == 1:
        import time

        time.sleep(60)


def die(topology):
    import os

    if topology.rank == 1:
        os._exit(7)
    import time

    time.sleep(60)


def test_the_harness_names_the_rank_that_hangs_or_dies():
    with pytest.raises(RankError, match=r"ranks \[1\] hung: no result within 3 s"):
        run_workers(hang, 2, deadline=3)
    with pytest.raises(RankError, match="rank 1 died without a word"):
        run_workers(die, 2, deadline=20)
