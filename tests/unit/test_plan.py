"""What is foretold of a run, what is refused by it, and what is chosen; no GPU, and no weight is made."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import GPT2Config

from launch import fit, plan
from launch.settle import Plan, Resume
from launch.train import run_plan
from sft_dist import memory
from sft_dist.config import load
from sft_dist.errors import ConfigError
from sft_dist.flops import matmul_parameters
from sft_dist.gpus import GIB, Gpu, gpu
from sft_dist.limits import StopRequest
from sft_dist.memory import Alive, Gradient, Parts, Traced, trace
from sft_dist.model import build, model_config
from sft_dist.plan import advice, require_fit
from sft_dist.schema import ModelConfig
from sft_dist.topology import Life, Topology
from tests.unit.prepared_runs import run_file, sft_dist

pytestmark = pytest.mark.usefixtures("traced_once")
LARGE = {"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12}


@pytest.fixture
def run(shards, tmp_path):
    return run_file(tmp_path, shards / "out", shards / "sms", train__global_batch_rows=16)


def planned(run, *overrides, world_size=2, card=None, **more):
    return Plan.of(
        load(run, overrides), Topology(world_size=world_size), Life("test"), card=card, is_elsewhere=True, **more
    )


def told(run, *arguments, ok=True):
    result = sft_dist("plan", run, *arguments)
    assert (result.exit_code == 0) == ok, result.output
    return result.output


def test_the_plan_of_a_run(run):
    text = told(
        run,
        "--gpus-per-node=2",
        "--gpu=h100-80gb",
        "train.precision=bf16",
        "budget.price_per_gpu_hour=2 EUR",
        f"model.config={json.dumps(LARGE)}",
    )
    assert "model: 85,350,912 parameters, the largest tensor 2,359,296" in text
    assert "8 accumulated x 2 processes" in text
    rows = {
        tuple(line.lstrip("→ ").split()[:2]): line.split()
        for line in text.splitlines()
        if line.lstrip("→ ").startswith("zero")
    }
    assert len(rows) == 15, "five files, three times"
    own = next(line for line in text.splitlines() if line.startswith("→"))
    assert own.split()[1:3] == ["zero2", "no"]
    weights, gradients, optimizer = (float(number) for number in own.split()[3:6])
    assert weights == pytest.approx(2 * 85_350_912 / GIB, abs=0.005)
    assert (gradients, optimizer) == (
        pytest.approx(4 * 85_350_912 / 2 / GIB, abs=0.005),
        pytest.approx(12 * 85_350_912 / 2 / GIB, abs=0.005),
    )
    assert "best: zero=ds_configs/zero1.json train.gradient_checkpointing=false train.micro_batch_rows=8" in text
    assert "disk: 1.02 GB a checkpoint; 4.10 GB for the 2 kept" in text
    assert "if 40% of h100-80gb's 989 TFLOP/s are used" in text
    assert " EUR; evaluation, saving and start-up come on top" in text
    assert ("zero0", "no") not in rows, "16 bit at stage 0 is refused"


def test_without_a_gpu_nothing_is_said_to_fit(run):
    text = told(run)
    assert "with --gpu it is told what fits: a10-24gb, " in text
    assert "time: needs --gpu with a GPU whose speed is known, or --like RUN_DIR" in text
    assert "  zero0" in text
    assert "best:" not in text


def test_what_fits_nowhere_and_what_outlasts_its_budget(run):
    huge = f"model.config={json.dumps({**LARGE, 'n_layer': 48, 'n_embd': 24576})}"
    text = told(run, "--gpu=2.5gb", "train.precision=bf16", huge)
    assert "Nothing that is shipped fits: use more GPUs" in text
    text = told(run, "--gpu=l4-24gb", "train.precision=bf16", huge, "budget.gpu_hours=0.001")
    assert "warning: the budget of 0.0 GPU-hours ends at about step 0 of 16" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu=h100-80"], "--gpu 'h100-80': not known; did you mean h100-80gb?, or give its memory, as in 48gb"),
        (["--gpu=mine"], "known are a10-24gb, "),
        (["--like=nowhere"], "nowhere: no run.yaml there; name the run_dir of a run that has begun"),
    ],
)
def test_mistakes_are_one_line(run, arguments, message):
    result = sft_dist("plan", run, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_plan_is_of_a_run_file_or_of_a_run(run):
    assert "which RUN.yaml? Or --compare RUN_DIR" in sft_dist("plan").stderr
    assert "leave RUN.yaml out" in sft_dist("plan", run, "--compare=x").stderr


def test_a_run_that_has_not_logged_is_not_compared(run, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(run, tmp_path / "run" / "run.yaml")
    result = sft_dist("plan", "--compare", tmp_path / "run")
    assert (result.exit_code, "no step was logged there yet" in result.stderr) == (2, True)


# ---- memory ----


@pytest.mark.parametrize("checkpointing", [False, True, "selective", "offload"])
def test_a_trace_is_what_the_same_pass_allocates(checkpointing):
    """The witness: the pass for real on the CPU, each storage counted."""
    from sft_dist.head import Head, part_places, scores_at, targets_at
    from sft_dist.layers import recompute
    from sft_dist.memory import Live

    config = ModelConfig(config={"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
                                 "num_attention_heads": 4, "num_key_value_heads": 2})  # fmt: skip
    made = model_config(config, vocab_size=1000, seq_len=128, eos_id=0)
    one, two = (
        trace(config, made, rows=count, seq_len=128, precision="fp32", checkpointing=checkpointing) for count in (1, 2)
    )
    foretold = one.grown(two, rows=5)
    every = torch.ones(5, 128, dtype=torch.bool)
    with Live() as live:
        model = build(config, made, seed=0, gradient_checkpointing=False).train()
        recompute(model, checkpointing, live.aside)
        tokens, positions = torch.zeros(5, 128, dtype=torch.int64), torch.arange(128).repeat(5, 1) % 64
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda one: setattr(one, "grad", None))
        Head(model, part_places(1000, "cuda"))
        at = targets_at(tokens, every, 5 * 127)
        before = live.bytes
        live.restart()
        scores_at(model, tokens, positions, *at).loss.backward()
    most = max([foretold.forward.bytes, *(each.peak.bytes for each in foretold.gradients)])
    assert most == pytest.approx(live.peak.bytes - before, rel=1e-3)
    assert 0 < foretold.forward.logits < foretold.forward.bytes
    of_layers = 3 * 5 * 128 * 64 * 4  # what goes into each of three layers
    assert foretold.host == live.host == (of_layers if checkpointing == "offload" else 0)


@pytest.mark.parametrize("rows", [3, 12, 30])
def test_each_further_row_adds_the_same_once_logits_are_made_in_parts(rows):
    from sft_dist.plan import Model

    config = ModelConfig(config={"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 1})
    made = model_config(config, vocab_size=50_257, seq_len=512, eos_id=0)
    with torch.device("meta"):
        meta = build(config, made, seed=0, gradient_checkpointing=False)
    reckoned = Model(config, made, meta, 512, "bf16")._trace(rows, False)
    assert reckoned == trace(config, made, rows=rows, seq_len=512, precision="bf16", checkpointing=False)


def test_a_bucket_is_emptied_before_a_gradient_that_would_not_fit():
    traced = Traced(Alive(0), tuple(Gradient(40, Alive(10), Alive(10)) for _ in range(5)))
    assert traced.backward(100, 7.0, 1.0) == (Alive(10), 87.0)
    assert traced.backward(1, 7.0, 1.0) == (Alive(10), 47.0), "a gradient larger than the bucket goes alone"


def test_matrices_are_counted_without_embeddings_and_with_the_head():
    for tied in (True, False):
        config = ModelConfig(config={"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
                                     "num_attention_heads": 4, "tie_word_embeddings": tied})  # fmt: skip
        made = model_config(config, vocab_size=1000, seq_len=32, eos_id=0)
        with torch.device("meta"):
            model = build(config, made, seed=0, gradient_checkpointing=False)
        assert matmul_parameters(model) == 4 * 64 * 64 + 3 * 64 * 96 + 1000 * 64


# ---- adapters ----


def test_adapters_are_planned_beside_what_is_frozen(run, tmp_path):
    """Nothing but the configuration of the model is there; what is foretold of its parts is in tests/dist/test_memory_plan.py."""
    GPT2Config(**{**LARGE, "vocab_size": 50_257}).save_pretrained(tmp_path / "large")
    named = ("model.config=null", f"model.name_or_path={tmp_path / 'large'}", "train.precision=bf16")
    learned = 16 * 12 * (768 + 3 * 768 + 768 + 768 + 768 + 4 * 768 + 4 * 768 + 768)
    text = told(run, *named, "model.lora.rank=16", "--gpus-per-node", "2")
    assert f"of which {learned:,} are trained, the largest tensor {16 * 4 * 768:,}" in text
    assert f"disk: {12 * learned / 1e9:,.2f} GB a checkpoint" in text
    totals = []
    for more in ("train.max_steps=9", "model.lora.rank=16", "model.lora={rank: 16, quantize: nf4}"):
        made = planned(run, *named, more)
        totals.append(fit.needed(made, fit.model_of(made)))
    whole, lora, packed = totals
    assert {"ds_configs/zero2.json"} <= {one.zero for one in fit.all_choices(made, fit.model_of(made), None)}
    at_stage_3 = {one.checkpointing for one in fit.all_choices(made, fit.model_of(made), None) if one.stage == 3}
    assert at_stage_3 == {True}, "the others would be refused"
    assert whole.optimizer > 50 * lora.optimizer == 50 * packed.optimizer
    assert lora.weights - packed.weights == pytest.approx(85e6 * (2 - 0.5625), rel=0.01)
    flops = [
        fit.model_of(planned(run, *named, more)).flops(1.0) for more in ("train.max_steps=9", "model.lora.rank=16")
    ]
    assert 0.6 < flops[1] / flops[0] < 0.8


def test_dropout_of_adapters_is_dropout_for_ranks_that_share_rows(run, tmp_path):
    GPT2Config(**{**LARGE, "vocab_size": 50_257}).save_pretrained(tmp_path / "large")
    named = ("model.config=null", f"model.name_or_path={tmp_path / 'large'}", "model.dropout=0")
    shared = ("train.sequence_parallel=2", "--gpus-per-node", "2")
    result = sft_dist("plan", run, *named, "model.lora={rank: 4, dropout: 0.1}", *shared)
    assert result.exit_code == 2
    assert "train.sequence_parallel: the model has dropout" in result.stderr
    assert sft_dist("plan", run, *named, "model.lora.rank=4", *shared).exit_code == 0


# ---- refusing and choosing ----


def test_what_cannot_fit_is_refused_with_what_would(run):
    large = f"model.config={json.dumps(LARGE)}"
    made = planned(run, large, "train.micro_batch_rows=8", "train.precision=bf16", "zero=ds_configs/zero1.json")
    model = fit.model_of(made)
    total = fit.needed(made, model).total
    roomy, tight, small = (Gpu("card", total * factor) for factor in (4, 1.02, 0.8))
    assert fit.refuse_what_cannot_fit(made, model, replace(roomy, memory_bytes=roomy.memory_bytes + 4 * GIB)) is None
    warning = fit.refuse_what_cannot_fit(made, model, tight)
    assert warning.startswith("warning: train.micro_batch_rows: 8 with ds_configs/zero1.json on 2 ranks: ")
    assert "which may be too much." in warning
    with pytest.raises(
        ConfigError, match=r"train\.micro_batch_rows: 8 .* GiB are needed on a GPU of .* GiB \(weights 0\.2, .*\)\. "
    ):
        fit.refuse_what_cannot_fit(made, model, small)


def test_train_refuses_it_before_anything_starts(run, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fit, "of_this_machine", lambda topology: gpu("0.1gb"))
    made = planned(run, f"model.config={json.dumps(LARGE)}", world_size=1)
    with pytest.raises(ConfigError, match=r"GiB are needed on a GPU of 0\.1 GiB"):
        run_plan(made, StopRequest())
    assert not (tmp_path / "run").exists()


def test_advice_names_the_nearest_change_first():
    from sft_dist.plan import Choice

    parts = Parts(weights=GIB)
    found = [
        Choice("ds_configs/zero3.json", False, 8, parts, 4, 1.0),
        Choice("ds_configs/zero2.json", False, 8, parts, 2, 1.0),
        Choice("ds_configs/zero2.json", True, 8, parts, 8, 0.75),
        Choice("ds_configs/zero1.json", False, 8, parts, None, 1.0),
    ]
    assert advice(found, "ds_configs/zero2.json", False) == (
        "These fit: micro_batch_rows 2; or micro_batch_rows 4 and zero ds_configs/zero3.json"
    )
    assert advice([], "x", False).startswith("Nothing that is shipped fits")
    with pytest.raises(ConfigError, match=r"x: 10\.0 GiB are needed on a GPU of 8\.0 GiB \(weights 10\.0\)\. Do"):
        require_fit(Parts(weights=10 * GIB), gpu("8gb"), "x", "Do")


def test_part_recomputation_is_taken_for_faster_only_where_layers_are_compiled(run):
    for is_compiled, faster in ((False, True), (True, "selective")):
        made = planned(run, f"train.compile={str(is_compiled).lower()}")
        ways = [
            choice for choice in fit.all_choices(made, fit.model_of(made), gpu("80gb")) if "zero2.json" in choice.zero
        ]
        assert min((c for c in ways if c.checkpointing), key=lambda choice: choice.rank).checkpointing == faster


def test_what_a_file_says_counts_and_not_its_name(run, tmp_path):
    from pathlib import Path

    shutil.copy(Path(fit.__file__).parents[1] / "ds_configs" / "zero3_offload.json", tmp_path / "mine0.json")
    made = planned(run, f"zero={tmp_path / 'mine0.json'}")
    own = [choice for choice in fit.all_choices(made, fit.model_of(made), gpu("80gb")) if "mine0" in choice.zero]
    assert [(choice.stage, choice.is_offloaded) for choice in own] == [(3, True)] * 3


def test_a_second_bucket_is_counted_where_reductions_overlap(run, tmp_path):
    totals = []
    for overlaps in (False, True):
        section = {"stage": 2, "reduce_bucket_size": 1000, "overlap_comm": overlaps}
        (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": section}))
        made = planned(run, f"zero={tmp_path / 'zero.json'}")
        kept = fit.model_of(made)
        totals.append(memory._kept(kept.size, made.zero["zero_optimization"], 2, "fp32").bucket)
    assert totals == [4000, 8000]


def test_a_mixture_of_experts_is_not_planned_and_not_refused(run):
    experts = {"model_type": "mixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
               "num_key_value_heads": 1, "num_local_experts": 4}  # fmt: skip
    words = f"model.config={json.dumps(experts)}"
    assert "is a mixture of experts: what it takes depends" in told(run, "--gpus-per-node=2", words, ok=False)
    made = planned(run, words)
    assert fit.refuse_what_cannot_fit(made, fit.model_of(made), gpu("0.1gb")) is None
    submitted = sft_dist("submit", run, words, "--gpus-per-node=2", "--dry-run")
    assert "memory: not planned of a mixture of experts" in submitted.output


def test_ranks_that_settled_differently_take_the_smallest(run):
    made = planned(run, *AUTO, card=gpu("80gb"))
    alike = fit.alike(made, SimpleNamespace(gather=lambda rows: [rows, 2]))
    assert (alike.batch.micro_batch_rows, alike.batch.accumulation_steps) == (2, 4)
    assert alike.config.train.micro_batch_rows == 2
    assert alike.batch.global_batch_rows == made.batch.global_batch_rows


AUTO = ("train.micro_batch_rows=auto",)


def test_auto_is_the_largest_that_divides_and_fits_and_keeps_the_batch(run):
    chosen = planned(run, *AUTO, card=gpu("80gb"))
    assert (chosen.batch.global_batch_rows, chosen.batch.micro_batch_rows, chosen.batch.accumulation_steps) == (
        16,
        8,
        1,
    )
    assert chosen.config.train.micro_batch_rows == 8
    model = fit.model_of(chosen)
    of_two = model.parts(chosen.zero, world_size=2, rows=2, checkpointing=False).total
    of_four = model.parts(chosen.zero, world_size=2, rows=4, checkpointing=False).total
    card = Gpu("card", ((of_two + of_four) / 2 + 2 * GIB) / 0.95)
    assert planned(run, *AUTO, card=card).batch.micro_batch_rows == 2
    assert planned(run, *AUTO).batch.micro_batch_rows == 1, "on GPUs that are not known"
    with pytest.raises(ConfigError, match=r"micro_batch_rows: 1 with .* GiB are needed"):
        planned(run, *AUTO, f"model.config={json.dumps(LARGE)}", card=gpu("0.1gb"))


def test_auto_of_a_run_that_goes_on_is_that_of_its_checkpoint(run, tmp_path):
    folder = tmp_path / "run" / "checkpoints" / "step-00000004"
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text(yaml.safe_dump({"train": {"micro_batch_rows": 4}}))
    assert planned(run, *AUTO, card=gpu("80gb")).batch.micro_batch_rows == 4
    assert planned(run, *AUTO, card=gpu("80gb"), world_size=8).batch.micro_batch_rows == 2, "what divides"
    assert planned(run, *AUTO, card=gpu("80gb"), resume=Resume(is_fresh=True)).batch.micro_batch_rows == 8


def test_auto_is_settled_by_this_machine_where_the_run_is_here(run, monkeypatch):
    monkeypatch.setattr(fit, "of_this_machine", lambda topology: gpu("80gb"))
    made = Plan.of(load(run, AUTO), Topology(world_size=2, local_world_size=2), Life("test"))
    assert made.batch.micro_batch_rows == 8
    monkeypatch.undo()
    assert fit.of_this_machine(Topology(world_size=2, local_world_size=2)).memory_bytes > GIB


def test_a_submitted_run_that_cannot_fit_is_refused_before_the_queue(run):
    large = f"model.config={json.dumps({**LARGE, 'n_layer': 48, 'n_embd': 2304})}"
    result = sft_dist("submit", run, large, "--gpus-per-node=2", "--gpu=24gb", "--dry-run")
    assert result.exit_code == 2
    assert "GiB are needed on a GPU of 24.0 GiB" in result.stderr
    assert sft_dist("submit", run, "--gpus-per-node=2", "--gpu=24gb", "--dry-run").exit_code == 0


def test_compare_of_a_run(run, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    config = yaml.safe_load(run.read_text())
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    lines = [
        {"step": step, "loss": 1.0, "tokens_per_second": 1e6, "step_seconds": 0.5, "memory_bytes": 3 * GIB}
        for step in (1, 2, 3)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "usage.jsonl").write_text(json.dumps({"life": "x-0", "began": 0.0, "at": 3600.0, "gpus": 2}) + "\n")
    result = sft_dist("plan", "--compare", folder, "--gpu=a100-40gb", "--mfu=0.5")
    assert result.exit_code == 0, result.output
    table = {line[:24].strip(): line[24:53].split() for line in result.stdout.splitlines()[1:7]}
    assert table["tokens/s"][1] == "1,000,000"
    assert table["seconds a step"][1] == "0.5"
    assert table["GPU-hours"][1] == "2"
    assert table["memory of a GPU, GiB"][1] == "3"
    assert table["a checkpoint, GB"][1] == "-"
    made = plan.measured(folder)
    foretold = float(table["tokens/s"][0].replace(",", ""))
    assert foretold == pytest.approx(1e6 * 0.5 * 19.5e12 / made.flops, rel=1e-3)
    assert f"an MFU of {made.flops / 19.5e12:.1%} of a100-40gb" in result.stdout
    like = sft_dist("plan", run, "--like", folder, "--gpus-per-node=2").stdout
    assert "speed: 1,000,000 tokens/s" in like, "of as many GPUs it is what was measured"
