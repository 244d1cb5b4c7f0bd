"""The time of a step on many GPUs: the simulation beside closed formulas, its bounds, and what `plan --scale` says."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config

from sft_dist.layers import SPEED
from sft_dist.scaling import Job, Network, Unit, simulate, step, stops_at, traffic
from tests.unit.prepared_runs import run_file, sft_dist

pytestmark = pytest.mark.usefixtures("traced_once")
JOB = Job(
    8_000_000_000,
    8_000_000_000,
    1_000_000,
    row_seconds=0.1,
    micro_batch_rows=4,
    precision="bf16",
    speed=0.75,
    memory_rate=3e12,
)
SECONDS = st.floats(0.001, 10)
SECTIONS = st.fixed_dictionaries(
    {"stage": st.integers(0, 3), "overlap_comm": st.booleans(), "reduce_bucket_size": st.sampled_from([10**7, 10**9])}
)
RATES = st.floats(1e9, 1e12)
RANKS = st.sampled_from([1, 2, 8, 64, 4096])


@given(st.integers(1, 9), SECONDS, SECONDS)
def test_gathers_of_equal_stretches(count, gather, compute):
    """The first is waited for, then the slower of the two sets the pace."""
    units = [Unit(gather, compute)] * count
    assert simulate(units, overlaps=False) == pytest.approx(gather + (count - 1) * max(gather, compute) + compute)


@given(st.integers(1, 9), SECONDS, SECONDS)
def test_reductions_of_equal_stretches(count, compute, reduce):
    units = [Unit(0.0, compute, reduce)] * count
    assert simulate(units, overlaps=False) == pytest.approx(count * (compute + reduce))
    assert simulate(units, overlaps=True) == pytest.approx(compute + (count - 1) * max(compute, reduce) + reduce)


@given(st.lists(st.builds(Unit, st.floats(0, 9), st.floats(0, 9), st.floats(0, 9)), min_size=1), st.booleans())
def test_never_less_than_one_stream_nor_more_than_both(units, overlaps):
    made = simulate(units, overlaps=overlaps)
    compute, sent = sum(unit.compute for unit in units), sum(unit.gather + unit.reduce for unit in units)
    assert max(compute, sent) - 1e-6 <= made <= compute + sent + 1e-6
    assert simulate(units, overlaps=True) <= simulate(units, overlaps=False) + 1e-6


@given(SECTIONS, RATES, RATES, st.floats(1, 10), RANKS, st.integers(1, 8))
def test_a_step_is_bounded_and_faster_links_do_no_harm(section, within, between, more, ranks, accumulation):
    made = step(JOB, section, Network(within, between, 8), ranks, accumulation)
    alone = made.compute + made.optimizer
    assert alone * (1 - 1e-9) <= made.seconds <= (alone + made.sent) * (1 + 1e-9)
    faster = step(JOB, section, Network(within * more, between * more, 8), ranks, accumulation)
    assert faster.seconds <= made.seconds * (1 + 1e-9)
    assert made.compute == pytest.approx(JOB.row_seconds * 4 * accumulation * 4 / 3), (
        "all products, a third more of them again"
    )


def test_one_gpu_sends_nothing():
    made = step(JOB, {"stage": 3}, Network(1e9, 1e9, 8), 1, 2)
    assert (made.sent, made.exposed) == (0.0, pytest.approx(0.0, abs=1e-6))


def test_a_ring_by_hand():
    """16 GPUs on two nodes: 15/16 of 16 GB at 80 % of 100 GB/s, 14 hops within and 2 between; an all-reduce twice that, by a tree's hops."""
    network = Network(450e9, 100e9, 8)
    assert network.seconds(16e9, 16) == pytest.approx(8.4e-6 + 14 * 3.4e-6 + 2 * 14e-6 + 15e9 / 80e9)
    assert network.seconds(16e9, 16, is_reduced_to_all=True) == pytest.approx(
        8.4e-6 + 2 * (7 * 4e-6 + 14e-6) + 30e9 / 80e9
    )
    assert network.seconds(16e9, 8) == pytest.approx(8.4e-6 + 7 * 3.4e-6 + 14e9 / 360e9), (
        "within a node its links alone"
    )


def test_what_the_stages_send():
    """Rajbhandari et al. 2020, section 7: an all-reduce is two volumes, stage 3 three; here gradients are fp32, at stages 2 and 3 in each micro-batch."""
    sent = {
        stage: traffic({"stage": stage, "stage3_max_reuse_distance": 0}, 1000, "bf16").num_bytes(4)
        for stage in range(4)
    }
    assert [made["reduced"] for made in sent.values()] == [4000, 4000, 16000, 16000]
    assert [made["gathered"] for made in sent.values()] == [0, 0, 0, 4 * 2 * 2000]
    assert [made["updated"] for made in sent.values()] == [0, 2000, 2000, 0]
    kept = traffic({"stage": 3, "stage3_max_reuse_distance": 600}, 1000, "bf16", checkpointing=True)
    assert kept.gathered == (1000, 800)


def test_of_adapters_the_gradients_and_what_the_optimizer_updates_are_sent():
    sent = {
        stage: traffic({"stage": stage, "stage3_max_reuse_distance": 0}, 1000, "bf16", trained=10).num_bytes(4)
        for stage in (1, 2, 3)
    }
    assert [made["reduced"] for made in sent.values()] == [40, 160, 160]
    assert [made["updated"] for made in sent.values()] == [20, 20, 0]
    assert [made["gathered"] for made in sent.values()] == [0, 0, 4 * 2 * 2000]


@pytest.mark.parametrize("way", [False, "selective", True, "offload"])
def test_what_is_computed_again_takes_what_plan_says(way):
    forward, backward = replace(JOB, speed=SPEED[way]).passes()
    assert forward == pytest.approx(JOB.row_seconds * JOB.micro_batch_rows / 3)
    assert forward + backward == pytest.approx(JOB.row_seconds * JOB.micro_batch_rows / SPEED[way])


def test_overlap_is_not_told_of_stages_that_have_none():
    """In bf16 stage 1 reduces after the last backward pass, whatever `overlap_comm` says."""
    network = Network(450e9, 50e9, 8)
    for stage, differs in ((1, False), (2, True), (3, True)):
        plain, overlapped = (
            step(JOB, {"stage": stage, "overlap_comm": overlap}, network, 64, 2) for overlap in (False, True)
        )
        assert (overlapped.seconds < plain.seconds) == differs


def test_the_number_from_which_on_it_stops():
    assert stops_at({8: 1.0, 16: 1.6, 32: 2.5}) == 16
    assert stops_at({8: 1.0}) is None


# ---- at the command line ----

LARGE = {"model_type": "gpt2", "n_layer": 2, "n_embd": 768, "n_head": 12}


@pytest.fixture
def run(shards, tmp_path):
    return run_file(tmp_path, shards / "out", shards / "sms", train__global_batch_rows=64)


def scaled(run, *more):
    return sft_dist("plan", run, "--scale", "train.precision=bf16", f"model.config={json.dumps(LARGE)}", *more)


def test_the_tables(run):
    result = scaled(run, "--gpu=h100-80gb", "--gbps-between-nodes=100")
    assert result.exit_code == 0, result.output
    kept, grown = result.stdout.split("\na batch ")[1:]
    numbers = re.findall(r"^  (zero\d) +([\d,]+) +(\d+) +([\d.]+) +([\d,]+) +(\d+)%", grown, flags=re.MULTILINE)
    assert [gpus for name, gpus, *_ in numbers if name == "zero2"] == [f"{8 << n:,}" for n in range(10)]
    assert {name for name, *_ in numbers} == {"zero1", "zero2", "zero3"}, "no offload, and no 16 bit at stage 0"
    assert "micro-batches cannot be handed out evenly to 128 GPUs; raise train.global_batch_rows" in kept
    assert "100 from a node to others" in result.stdout
    assert re.search(r"^use zero=ds_configs/zero1.json on [\d,]+ ", grown, flags=re.MULTILINE)
    assert re.search(
        r"^zero3 stops scaling at [\d,]+ GPUs: on [\d,]+, .* wait for messages, most of them for .*, beside ",
        grown,
        flags=re.MULTILINE,
    )
    assert (
        "zero1 scales to 4,096 GPUs"
        in scaled(run, "--gpu=h100-80gb", "--gbps-between-nodes=1e9", "train.global_batch_rows=65536").stdout
    )


def test_numbers_of_any_size_stand_apart_and_show_what_they_are(run):
    """A model of a thousand parameters: over 1e9 tokens/s, steps and messages of microseconds."""
    text = sft_dist(
        "plan", run, "--scale", "--gpu=h100-80gb", "train.precision=bf16", "train.global_batch_rows=65536"
    ).stdout
    tables = [part.splitlines() for part in re.findall(r"^  .*\n(?:  .*\n)+", text, flags=re.MULTILINE)]
    assert len(tables) == 2
    for head, *rows in tables:
        assert re.split(" {2,}", head)[1:] == [
            "GPUs", "micro-batches", "s a step", "tokens/s", "efficiency", "messages s", "hidden"
        ]  # fmt: skip
        cells = [row.split() for row in rows]
        assert {len(row) for row in cells} == {8}
        assert {len(row) for row in rows} == {len(head)}
        assert max(float(row[4].replace(",", "")) for row in cells) > 1e9
        assert all(float(row[6]) > 0 for row in cells), "messages, of microseconds"
    waits = re.findall(r"on [\d,]+, ([\d.]+) s of a step wait .* beside ([\d.]+) s of products", text)
    assert waits
    assert all(float(number) > 0 for pair in waits for number in pair)


def test_a_batch_that_ends_is_not_told_as_where_scaling_does(run):
    text = scaled(run, "--gpu=h100-80gb", "--mfu=0.001").stdout  # products take long: nobody waits for messages
    kept, grown = text.split("\na batch ")[1:]
    assert "zero1 scales to 4,096 GPUs: each doubling" in grown
    assert "the batch ends" not in grown
    ended = "zero1 still scales on 64 GPUs, where the batch ends (no more micro-batches to hand out): each doubling"
    assert ended in kept
    assert "scales to" not in kept


def test_what_efficiency_is_of_and_an_offload_of_the_run_that_is_left_out_are_told(run):
    plain = scaled(run, "--gpu=h100-80gb").stdout
    assert "efficiency: tokens/s of a GPU, 100% on the fewest GPUs that fit that very stage" in plain
    assert "left out" not in plain
    for name in ("ds_configs/zero2_offload.json", "ds_configs/zero3_offload.json"):
        text = scaled(run, "--gpu=h100-80gb", f"zero={name}").stdout
        assert f"\n{name} left out: offload is not reckoned\n" in text
        assert "offload  " not in text


def test_what_does_not_fit_is_marked(run):
    wide = json.dumps({**LARGE, "n_layer": 16, "n_embd": 8192, "n_head": 64})
    text = scaled(run, "--gpu=a100-80gb", f"model.config={wide}").stdout
    assert re.search(r"zero1 +8 +8 +does not fit", text)
    assert re.search(r"zero3 +8 +8 +\d", text), "what does not fit at stage 1 does at stage 3"


def test_adapters_send_little_and_are_not_planned_where_they_are_refused(run, tmp_path):
    GPT2Config(**{**LARGE, "vocab_size": 50_257}).save_pretrained(tmp_path / "large")
    named = (
        "model.config=null",
        f"model.name_or_path={tmp_path / 'large'}",
        "--gpu=h100-80gb",
        "--nodes=8",
        "--gbps-between-nodes=1",
    )
    sent = {}
    for more in ("train.max_steps=9", "model.lora.rank=16", "model.lora={rank: 16, quantize: nf4}"):
        text = scaled(run, *named, more).stdout
        lines = re.findall(r"^  (zero\d) +64 .* ([\d.]+) +\d+%$", text, flags=re.MULTILINE)
        sent[more] = {name: float(seconds) for name, seconds in lines}
    whole, lora, packed = sent.values()
    assert whole["zero1"] > 4 * lora["zero1"] > 0
    assert set(lora) == {"zero1", "zero2", "zero3"}
    assert set(packed) == {"zero1", "zero2"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--gpu=h100-80gb", "train.sequence_parallel=2"], "train.sequence_parallel: 2: --scale does not reckon with"),
        ([], "--scale: which GPU? Name it with --gpu: a10-24gb, "),
        (["--gpu=48gb"], "--gpu '48gb': its speed is not known, only its memory; --scale needs one of a10-24gb"),
        (["--gpu=h100-8gb"], "did you mean h100-80gb?"),
        (["--gpu=h100-80gb", "--nodes=3"], "--nodes 3: --scale doubles it, up to 4,096 GPUs; use a power of two, 2 or 4"),
        (["--gpu=h100-80gb", "--nodes=1024"], "--nodes 1024: 8,192 GPUs to begin with, and --scale ends at 4,096; use fewer"),
        (["--gpu=h100-80gb", "--like=runs/a"], "--scale takes the share of products alone, --mfu"),
        (["--gpu=h100-80gb", "--compare=runs/a"], "--scale looks ahead and --compare back"),
        (["--gpu=l4-24gb", "train.micro_batch_rows=64", f"model.config={json.dumps({**LARGE, 'n_embd': 65536, 'n_head': 64})}", "--gpus-per-node=1"],
         "no shipped ZeRO stage fits l4-24gb on 1 to 4,096 GPUs with train.micro_batch_rows 64"),
    ],
)  # fmt: skip
def test_mistakes_have_a_remedy(run, more, message):
    result = scaled(run, *more)
    assert result.exit_code == 2
    assert message in result.stderr


def test_scale_needs_a_run_file_and_links_need_scale(run):
    assert "which RUN.yaml?" in sft_dist("plan", "--scale", "--gpu=h100-80gb").stderr
    assert "are for --scale: add it" in sft_dist("plan", run, "--gbps-between-nodes=100").stderr


def test_a_batch_that_more_gpus_cannot_share_evenly_ends_there(run):
    told = scaled(run, "--gpu=h100-80gb", "train.global_batch_rows=24").stdout
    kept = told.split("\na batch ")[1]
    assert re.findall(r"^  zero2 +([\d,]+) ", kept, flags=re.MULTILINE) == ["8"]
    assert "micro-batches cannot be handed out evenly to 16 GPUs" in kept
