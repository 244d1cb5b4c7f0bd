"""The train loop on plain lists: it needs no data module, agrees before it acts, and counts what it did."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace

import pytest
import torch

from sft_dist.checkpoint import Checkpoints
from sft_dist.evaluate import Evaluator, Measured
from sft_dist.limits import StopRequest
from sft_dist.metrics import Metrics, numbers
from sft_dist.retention import Retention
from sft_dist.spikes import BadSteps, Streak
from sft_dist.state import TrainState
from sft_dist.stragglers import Stragglers
from sft_dist.schedule import Cadence
from sft_dist.trainer import train
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

    def write(self, record):
        assert "samples" not in record, "nothing was to be sampled"
        self.lines.append((record["step"], numbers(record)))

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


def loop(topology, folder, count=6, asked_times=None, poison=(), cadence=None, slow_rank=None, bad_steps=None, stage=2, precision="fp32", scale=None, keep=3):
    made, comms = tiny.engine(topology, stage, micro_batch_rows=1, precision=precision)
    if topology.rank == slow_rank:
        forward = made._scores
        made._scores = lambda *batch: time.sleep(0.06) or forward(*batch)
    if poison and topology.rank == 1:
        plant(made, poison)
    if scale is not None:
        made.deepspeed.optimizer.loss_scaler.cur_scale = scale
    bad = []
    kept = Kept()
    stop = WantsToStop(asked_times) if asked_times is not None and topology.rank == 1 else StopRequest()
    checkpoints = Checkpoints(folder, identity={}, attachments={}, retention=Retention(keep), stage=2, comms=comms)
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
        bad_steps=bad_steps or BadSteps(),
        on_bad_step=bad.append,
    )
    if bad_steps or poison:
        masters = [(f.name, f.offset, f.values["master"].tolist()) for f in made.fragments()]
        return reason, state, kept.lines, sorted(path.name for path in folder.glob("step-*")), bad, masters
    return reason, state, kept.lines, sorted(path.name for path in folder.glob("step-*"))


def plant(made, poison):
    """Faults of this rank: {the n-th micro-batch that is trained on: what its loss, or only its gradient, is multiplied by}."""
    forward, count = made._scores, iter(range(10_000))

    def poisoned(*batch):
        scores, at = forward(*batch), next(count)
        factor, is_gradient = poison.get(at, (1.0, False))
        if is_gradient:
            scores.loss.register_hook(lambda gradient: gradient * factor)
            return scores
        return scores._replace(loss=scores.loss * factor, log_probs=scores.log_probs * factor)

    made._scores = poisoned


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


class AtTheEnd(Evaluator):
    """Measures with three forward passes, in the second of which this rank is asked to stop: by the flag it is given."""

    def __init__(self, comms, stop=None):
        super().__init__(comms, None, None)
        self.stop, self.count = stop, 0

    def metrics(self, forward):
        batch = tiny.rows(0)
        for _ in range(3):
            forward(*batch.asked)
            self.count += 1
            if self.stop is not None and self.count > 3:  # the first three are those before the first step
                self.stop.cause = "SIGTERM"
        return Measured({"validation_loss": 1.0})

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
            evaluator=AtTheEnd(comms, stop if is_asked and topology.rank == 1 else None),
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


class OnTheWay(Evaluator):
    """Answers with three forward passes; in the middle of the second answering one rank is asked to stop."""

    def __init__(self, comms, stop):
        super().__init__(comms, None, None)
        self.stop, self.told, self.count = stop, [], 0

    def answer(self, step, forward, metrics):
        batch = tiny.rows(0)
        for _ in range(3):
            forward(*batch.asked)
            self.count += 1
            if self.stop is not None and self.count == 3 + 3 + 1:  # the first three are those before the first step
                self.stop.cause = "SIGTERM"
        self.told.append(step)


def _left_while_answering(topology, folder):
    made, comms = tiny.engine(topology, 3, micro_batch_rows=1)
    stop = StopRequest()
    checkpoints = Checkpoints(folder, identity={}, attachments={}, retention=Retention(3), stage=3, comms=comms)
    evaluator = OnTheWay(comms, stop if topology.rank == 1 else None)
    reason, state = train(
        steps=steps(topology, 9),
        engine=made,
        comms=comms,
        state=TrainState(),
        learning_rate=lambda step: 1e-3,
        evaluator=evaluator,
        checkpoints=checkpoints,
        metrics=Metrics((Kept(),)),
        stop=stop,
        cadence=Cadence(last_step=9, samples_steps=2),
    )
    return reason, state.step, evaluator.told, evaluator.count


def test_prompts_are_answered_on_the_way_and_left_when_one_rank_is_asked_to_stop(tmp_path):
    assert run_workers(_left_while_answering, 2, tmp_path) == [("stopped", 4, [0, 2], 7)] * 2


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("stage", [0, 1, 2, 3, "2_offload", "3_offload"])
@pytest.mark.parametrize(("factor", "is_gradient"), [(NAN, False), (INF, True)])
def test_a_bad_number_never_reaches_the_weights(tmp_path, stage, factor, is_gradient):
    """Step 2 of 3, the third of this rank's four micro-batches: the weights are those of the other two steps alone."""
    poison = {4 + 2: (factor, is_gradient)}
    ranks = run_workers(loop, 2, tmp_path / "run", 3, poison=poison, stage=stage)
    without = run_workers(_without_second, 2, stage)
    for (reason, state, lines, saved, bad, masters), expected in zip(ranks, without, strict=True):
        assert (reason, state.step, state.not_applied, state.adam_step) == ("completed", 3, 1, 2)
        assert (state.rows_consumed, state.streak, saved) == (24, None, ["step-00000003"])
        assert len(masters) == len(expected)
        for (name, begin, ours), (other, at, theirs) in zip(masters, expected, strict=True):
            assert (name, begin) == (other, at)
            assert ours == theirs, name
        told = {step: values for step, values in lines if "learning_rate" in values}
        assert "grad_norm" not in told[2]
        assert told[2]["steps_not_applied"] == told[3]["steps_not_applied"] == 1
        assert all(number == number and abs(number) < INF for values in told.values() for number in values.values())
    [one] = ranks[0][4]
    assert (one.step, one.begin, one.end) == (2, 8, 16)
    # the micro-batch is named where its loss tells; else all rows of the step
    assert len(one.rows) == (8 if is_gradient else 1)
    assert ranks[1][4] == []


def _without_second(topology, stage):
    made, _ = tiny.engine(topology, stage, micro_batch_rows=1)
    for number in (0, 2):
        step = steps(topology, 3)[number]
        made.learn(step.micro_batches, denominator=int(tiny.rows(number).targets.sum()), learning_rate=1e-3)
    return [(f.name, f.offset, f.values["master"].tolist()) for f in made.fragments()]


@pytest.mark.parametrize("stage", [1, 3])
def test_nor_in_bf16(tmp_path, stage):
    for at in (0, 4):  # the very first step, when there are no moments yet, and the next one
        ranks = run_workers(
            loop, 2, tmp_path / str(at), 2, poison={at: (NAN, False)}, stage=stage, precision="bf16"
        )
        for _, state, _, _, _, masters in ranks:
            assert (state.not_applied, state.adam_step) == (1, 1)
            assert all(value - value == 0 for _, _, values in masters for value in values)


def test_an_unusual_gradient_norm_is_bad_where_that_is_asked_for(tmp_path):
    """Step 21 of 22: its gradient is 300 times as large as it should be."""
    poison = {4 * 20 + at: (300.0, True) for at in range(4)}
    for spike_z, count in ((10.0, 1), (None, 0)):
        ranks = run_workers(loop, 2, tmp_path / str(count), 22, poison=poison, bad_steps=BadSteps(spike_z=spike_z))
        for _, state, *_ in ranks:
            assert (state.not_applied, state.adam_step) == (count, 22 - count)
            assert len(state.norms) == (21 if count else 0)
        assert [bad.step for bad in ranks[0][4]] == [21] * count


def test_so_many_in_a_row_end_the_loop_and_are_not_saved(tmp_path):
    poison = {4 * step: (NAN, False) for step in (2, 3, 4)}
    cadence = Cadence(6, checkpoint_steps=1)
    for reason, state, _, saved, *_ in run_workers(loop, 2, tmp_path, 6, poison=poison, cadence=cadence, keep=2):
        assert (reason, state.step, state.streak) == ("diverged", 5, Streak(3, 16, steps=3))
        # the last two, and the one before the streak, which retention alone would have removed
        assert saved == ["step-00000002", "step-00000003", "step-00000004"]


def test_fp16_at_its_lowest_scale_is_bad_like_any_other(tmp_path):
    """Before, DeepSpeed ended in an exception of its own; above the lowest scale it is an overflow, which mends itself."""
    poison = {4 * step + at: (INF, True) for step in (0, 1, 2) for at in range(4)}
    for scale, bad_steps in ((1.0, 3), (2.0**16, 0)):
        more = {"poison": poison, "precision": "fp16", "scale": scale, "bad_steps": BadSteps(roll_back_after=None)}
        for reason, state, *_ in run_workers(loop, 2, tmp_path / str(bad_steps), 4, **more):
            assert (reason, state.step, state.not_applied) == ("completed", 4, bad_steps)


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
