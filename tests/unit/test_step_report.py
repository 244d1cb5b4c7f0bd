"""What a profile says: numbers that are those measured, and advice where a part stands out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from launch.settle import Plan
from launch.step_report import Fed, Found, Setting, advice, timeline, told
from sft_dist.batch import Batch
from sft_dist.config import load
from sft_dist.data.loader import Loader
from sft_dist.step_profile import Profile
from sft_dist.step_trace import PARTS, Split
from sft_dist.topology import Life, Topology
from tests.unit.prepared_runs import run_file

BATCH = Batch(8, 4, 2, 1)


def found(*, lengths=(128,) * 4, recomputed=0.0, peak_bytes=None, not_applied=0, hidden=0.0, syncs=None, **parts):
    """Two steps of half a second; of each part its share, the rest is other."""
    sums = {part: float(parts.get(part.replace("+", "_").replace(" ", "_"), 0.0)) for part in PARTS}
    sums["other"] = 1.0 - sum(sums.values())
    split = Split(
        2, 1.0, sums, hidden, recomputed, {"aten::gelu": 0.25}, syncs or {}, [(0.0, 0), (0.5, 2 << 30)], {"forward": 2 << 30}
    )  # fmt: skip
    profile = Profile([0.4, 0.4], [0.5, 0.5], split, not_applied, peak_bytes)
    fed = Fed(np.array(lengths), num_targets=100, num_rows=2, seq_len=512)
    return Found(profile, fed, 8e9, 40e9, None, fed.dense_ratio)


def setting(**more):
    values = {
        "attention": "auto", "has_varlen": False, "is_compiled": False, "can_compile": False, "zero_stage": 2, "checkpointing": False, "batch": BATCH, "whole": BATCH,
        "largest": lambda checkpointing: None,
    }  # fmt: skip
    return Setting(**{**values, **more})


def text(*ranks, whole=BATCH):
    return "\n".join(told(BATCH, whole, ranks, Path("t.json")))


def test_the_table_and_what_stands_below_it():
    said = text(found(matmuls=0.5, communication=0.125, host_gaps=0.125))
    assert (
        "2 steps of 8 rows = 4 a micro-batch x 2 accumulated x 1 process; 2.0 documents a row, 50% of it filled" in said
    )
    for line in ("matmuls", "250.0    50.0%"), ("communication", "62.5    12.5%"), ("a step", "500.0   100.0%"):
        assert any(
            row.split()[0] == line[0].split()[0] and row.endswith(line[1]) for row in said.splitlines() if row
        ), line
    assert "other: gelu 25.0%" in said
    assert "speed: 0.400 s a step, 640 tokens/s, without the profiler; 1.25 times that with it" in said
    # 8 GFLOP in 0.8 s are 10 GFLOP/s
    assert (
        "MFU: 25.0% of the 40.0 GFLOP/s that matrix products reach here (measured). The model computes 10.0 GFLOP/s"
        in said
    )
    assert "its head at 50 targets a step," in said, "of the 100 of both"
    assert "memory, GiB more than before the steps, without a GPU: forward 2.000 at most" in said
    assert "computed again" not in said
    assert "waits for the GPU" not in said


def test_of_a_gpu_its_data_sheet_and_how_often_it_is_waited_for():
    of_gpu = found(peak_bytes=1, syncs={"cudaStreamSynchronize": 6}, hidden=0.2, recomputed=0.1, not_applied=1)
    said = text(replace(of_gpu, sheet=("h100-80gb", 100e9)))
    assert "MFU: 10.0% of h100-80gb's 100.0 GFLOP/s (data sheet), 25.0% of the 40.0 GFLOP/s" in said
    assert "the host waits for the GPU 3.0 times a step: cudaStreamSynchronize 3.0" in said
    assert "communication behind other work: 100.0 ms a step, in no part above" in said
    assert "computed again in the backward pass: 10.0% of the step" in said
    assert "warning: 1 of 2 steps did not reach the optimizer" in said
    assert "MFU: not told of a mixture of experts" in text(replace(of_gpu, flops=None))


def test_of_several_ranks_the_least_and_the_most():
    said = text(found(communication=0.5), found(communication=0.25))
    assert "communication         250.0    50.0%      125.0 to 250.0" in said
    assert "1,280 tokens/s on 2 ranks" in said
    assert said.endswith("(of rank 0)")


def test_ranks_that_share_rows_are_told_as_one_reader_of_them():
    said = text(*(replace(found(), sharers=2) for _ in range(2)))
    assert "x 1 times 2 processes that share rows" in said
    assert " 640 tokens/s on 2 ranks" in said


def test_steps_that_were_cut_say_so():
    assert (
        "note: the run's own steps have 240 micro-batches: what a step does once (optimizer) is 120 times less"
        in text(found(), whole=Batch(960, 4, 240, 1))
    )


FITS = {"largest": lambda checkpointing: 16}
HALF_FITS = {"largest": {False: None, "selective": 2}.get, "checkpointing": True}  # nothing fits without recomputation


@pytest.mark.parametrize(
    ("seen", "about", "said"),
    [
        ({"attention": 0.41}, {}, "attention is 41% of the step: rows hold 2.0 documents on average, and sdpa computes 15.9 times the pairs that are seen: train.attention=by_document"),
        ({"attention": 0.41, "lengths": (16,) * 8}, {}, "Documents of 16 tokens are too short for by_document, but the longest has 16, and rows of half the length have half of it: prepare.seq_len=256"),
        ({"attention": 0.41, "lengths": (16,) * 20 + (300,)}, {}, "; documents of 30 tokens are too short for train.attention=by_document"),
        ({"attention": 0.41}, {"has_varlen": True, "attention": "sdpa"}, "the pairs that are seen: train.attention=auto"),
        ({"attention": 0.41}, {"has_varlen": True}, "15.9 times the pairs that are seen"),
        ({"recomputed": 0.24}, {**FITS, "checkpointing": True}, "24% of the step is recomputation, and 4 rows a micro-batch (up to 16) fit without it: train.gradient_checkpointing=false train.micro_batch_rows=4"),
        ({"recomputed": 0.24}, {"largest": lambda way: 4, "checkpointing": True}, "and 4 rows a micro-batch fit without it: train.gradient_checkpointing=false train.micro_batch_rows=4"),
        ({"recomputed": 0.24}, {"largest": lambda way: 1, "checkpointing": "selective"}, "and 1 row a micro-batch fits without it: train.gradient_checkpointing=false train.micro_batch_rows=1"),
        ({"recomputed": 0.24, "matmuls": 0.8}, {**HALF_FITS, "can_compile": True}, "and 2 rows a micro-batch fit with half of it: train.gradient_checkpointing=selective train.compile=true train.micro_batch_rows=2"),
        ({"recomputed": 0.24, "matmuls": 0.8}, {**HALF_FITS, "can_compile": True, "checkpointing": "offload"}, "train.gradient_checkpointing=selective train.compile=true train.micro_batch_rows=2"),
        ({"recomputed": 0.24}, {**HALF_FITS, "is_compiled": True}, "and 2 rows a micro-batch fit with half of it: train.gradient_checkpointing=selective train.micro_batch_rows=2"),
        ({"matmuls": 0.7, "host_gaps": 0.15}, {"can_compile": True}, "other and host gaps are 30% of the step: train.compile=true fuses the operators between products"),
        ({"communication": 0.3}, {"zero_stage": 3}, "communication is 30% of the step: ZeRO 3 gathers the weights twice a micro-batch, of 2 a step: zero=ds_configs/zero2.json gathers them once a step"),
        ({"communication": 0.3}, {}, "ZeRO 2 reduces gradients in each of 2 micro-batches: zero=ds_configs/zero1.json does it once a step"),
        ({"communication": 0.3}, {"zero_stage": 1}, "communication is 30% of the step: it is the same for any number of rows: a larger train.global_batch_rows has less of it"),
        ({"data": 0.06}, {}, "data are 6% of the step: read them from a disk of the node"),
        ({"optimizer": 0.5}, {}, "the optimizer is 50% of the run's own step, whatever its rows: with 4 times train.global_batch_rows it would be 20%"),
        ({"host_gaps": 0.35}, FITS, "host gaps are 35% of the step: micro-batches of 4 rows are soon done, and up to 16 fit: a larger train.micro_batch_rows"),
    ],
)  # fmt: skip
def test_what_stands_out_is_told_with_what_to_change(seen, about, said):
    [line] = advice([found(**seen)], setting(**about))
    assert said in line


@pytest.mark.parametrize(
    ("seen", "about"),
    [
        ({}, {}),
        ({"attention": 0.41, "lengths": (512, 512)}, {}),  # the mask is as dense as what is seen
        ({"recomputed": 0.24}, {"checkpointing": True}),  # nothing fits without it
        ({"recomputed": 0.24}, HALF_FITS),  # part of it is the slower way in layers that are not compiled
        (
            {"recomputed": 0.24, "matmuls": 0.8},
            {**HALF_FITS, "checkpointing": "selective", "can_compile": True},
        ),  # has it
        ({}, {"is_compiled": True}),  # it is told of all else as it was profiled, uncompiled
        ({}, {"can_compile": True, "checkpointing": "offload"}),
        ({"matmuls": 0.7, "head_loss": 0.1}, {"can_compile": True}),  # too little to be fused
        ({"host_gaps": 0.35}, {}),
        ({"optimizer": 0.5}, {"whole": Batch(960, 4, 240, 1)}),  # of a step that was cut
    ],
)
def test_where_nothing_could_be_changed_nothing_is_said(seen, about):
    assert list(advice([found(**seen)], setting(**about))) == []


def test_ranks_that_wait_unevenly_name_the_one_that_is_waited_for():
    lines = list(advice([found(communication=0.5), found(communication=0.1)], setting()))
    assert lines[1] == "ranks wait unevenly, 50.0 to 250.0 ms a step: the others wait for rank 1, which waits least"


def test_the_picture_of_the_memory_shows_the_peak_where_it_was():
    memory = [(0.0, 0), (3.0, 80), (3.01, 10), (6.0, 10)]
    bars = timeline(memory)
    assert len(bars) == 60
    assert [place for place, bar in enumerate(bars) if bar == "█"] == [29, 30]
    assert set(bars[31:]) == {"▂"}


def test_what_is_fed_is_counted_from_the_very_rows(tmp_path, shards):
    """The witness: positions as the model gets them."""
    plan = Plan.of(load(run_file(tmp_path, shards / "out", shards / "sms")), Topology(), Life("x"))
    loader = Loader(plan.shards, plan.topology, micro_batch_rows=2, order=plan.order)
    steps = list(loader.steps(start=0, end=10, global_batch_rows=4))
    fed = Fed.of(steps, 64)
    lengths, targets = [], 0
    for step in steps:
        for batch in step.micro_batches:
            targets += int(batch.targets[:, 1:].sum())
            for row in batch.documents:
                lengths += np.bincount(row[row >= 0]).tolist()
    assert fed.lengths.tolist() == lengths
    assert (fed.num_targets, fed.num_rows, fed.num_tokens) == (targets, 10, sum(lengths))
