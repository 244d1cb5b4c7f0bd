"""What DeepSpeed saved, read back without DeepSpeed: every master and moment, bit for bit, of every layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from sft_dist.errors import CheckpointError
from sft_dist.foreign import find, read
from tests.dist import tiny
from tests.workers import run_workers

STEPS = 5
FROZEN = ("transformer.ln_f.bias", "transformer.h.0.attn.c_proj.weight")
ODD = {"model_type": "gpt2", "n_layer": 1, "n_embd": 9, "n_head": 1}  # whose sizes three ranks must pad
# (precision, ZeRO stage, ranks, frozen, what else the ZeRO section says): two ranks train "gpt2", three "odd"
LAYOUTS = {
    **{f"{precision}-{stage}": (precision, stage, 2, (), {}) for precision in ("fp32", "bf16") for stage in "123"},
    **{f"bf16-{stage}-frozen-on-3": ("bf16", stage, 3, FROZEN, {}) for stage in "123"},
    "fp16-2": ("fp16", "2", 2, (), {}),
    **{
        f"{precision}-1-aligned": (precision, "1", 3, (), {"parameter_alignment": True})
        for precision in ("fp32", "fp16")
    },
    "fp32-3-sub-groups": ("fp32", "3", 3, (), {"sub_group_size": 200}),
    "fp32-1-on-3": ("fp32", "1", 3, (), {}),
}


def model_for(ranks: int) -> str:
    """The model that `ranks` ranks train."""
    return "odd" if ranks == 3 else "gpt2"


def save(topology, folder, precision, stage, frozen, more, steps=STEPS):
    """Train, save as DeepSpeed does, and return this rank's fragments: the witness that reads no file."""
    tiny.MODELS["odd"] = ODD
    plain = tiny.zero_config(f"ds_configs/zero{stage}.json")
    tiny.zero_config = lambda path: {**plain, "zero_optimization": {**plain["zero_optimization"], **more}}
    made, comms = tiny.engine(
        topology, stage, precision=precision, kind=model_for(topology.world_size), frozen=frozen, global_batch_rows=12
    )
    tiny.learn(made, comms, range(steps))
    made.deepspeed.save_checkpoint(str(folder))
    return [
        (one.name, one.length, one.offset, {of: value.float().numpy().copy() for of, value in one.values.items()})
        for one in made.fragments()
    ]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Of each layout: (the folder DeepSpeed saved to, {name: {kind: the whole tensor}} put together from live state)."""
    folder, made = tmp_path_factory.mktemp("foreign"), {}

    def of(layout):
        if layout not in made:
            precision, stage, ranks, frozen, more = LAYOUTS[layout]
            path = folder / layout
            whole = {}
            for fragments in run_workers(save, ranks, path, precision, stage, frozen, more):
                for name, length, offset, values in fragments:
                    for kind, value in values.items():
                        full = whole.setdefault(name, {}).setdefault(kind, torch.full((length,), torch.nan))
                        full[offset : offset + len(value)] = torch.from_numpy(value)
            made[layout] = (path, whole)
        return made[layout]

    return of


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_master_and_moment_is_taken_over_bit_for_bit(saved, layout, monkeypatch):
    path, whole = saved(layout)
    made = read(find(path))
    _, stage, ranks, frozen, _ = LAYOUTS[layout]
    assert (made.step, made.adam_step, made.zero_stage, made.world_size) == (STEPS, STEPS, int(stage), ranks)
    assert made.samples == STEPS * 12
    monkeypatch.setitem(tiny.MODELS, "odd", ODD)
    shapes = {name: tuple(parameter.shape) for name, parameter in tiny.model(kind=model_for(ranks)).named_parameters()}
    assert made.shapes == shapes  # the tied lm_head.weight among neither
    assert made.values.keys() == shapes.keys() == whole.keys()
    for name, values in made.values.items():
        assert (
            values.keys()
            == whole[name].keys()
            == ({"master"} if name in frozen else {"master", "exp_avg", "exp_avg_sq"})
        )
        for kind, value in values.items():
            assert value.dtype == torch.float32
            assert torch.equal(value, whole[name][kind]), (name, kind)
        assert name in frozen or values["exp_avg"].count_nonzero()


def test_round_robin_order_is_followed(saved, tmp_path):
    """ZeRO 2 can deal the parameters out in another order, which moves what lies where and changes no value."""
    run_workers(save, 2, tmp_path, "fp32", "2", (), {"round_robin_gradients": True})
    made, plain = read(find(tmp_path)), read(find(saved("fp32-2")[0]))
    assert list(made.values) != list(plain.values)
    assert made.shapes == plain.shapes
    weights = torch.load(tmp_path / "global_step5" / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    for name, values in made.values.items():
        assert torch.equal(values["master"], weights[name].view(-1)), name
        for kind in ("exp_avg", "exp_avg_sq"):  # which rounding alone may move
            expected = plain.values[name][kind]
            assert (values[kind] - expected).norm() <= 1e-4 * expected.norm(), (name, kind)


def as_the_trainer_saves(folder: Path, output: Path, step: int) -> Path:
    """The save, where the Trainer puts it: checkpoint-N with global_stepN, `latest` and trainer_state.json."""
    path = output / f"checkpoint-{step}"
    shutil.copytree(folder / f"global_step{STEPS}", path / f"global_step{step}")
    (path / "latest").write_text(f"global_step{step}")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step, "epoch": 1.0, "log_history": []}))
    return path


@pytest.mark.parametrize("layout", ["bf16-2", "fp32-3"])
def test_a_trainers_checkpoint_is_found(saved, layout, tmp_path):
    path, whole = saved(layout)
    for step in (90, 100, 1000):
        as_the_trainer_saves(path, tmp_path, step)
    (tmp_path / "checkpoint-2000").mkdir()
    assert find(tmp_path) == tmp_path / "checkpoint-1000" / "global_step1000"
    assert find(tmp_path / "checkpoint-90") == tmp_path / "checkpoint-90" / "global_step90"
    next((tmp_path / "checkpoint-1000" / "global_step1000").glob("*rank_1*optim_states.pt")).unlink()
    assert find(tmp_path) == tmp_path / "checkpoint-100" / "global_step100"
    name = "transformer.wte.weight"
    assert torch.equal(read(find(tmp_path)).values[name]["exp_avg_sq"], whole[name]["exp_avg_sq"])


@pytest.mark.parametrize(
    ("layout", "lost"),
    [
        ("bf16-2", "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"),
        ("fp32-3", "zero_pp_rank_1_mp_rank_00_model_states.pt"),
    ],
)
def test_a_missing_rank_is_named(saved, layout, lost, tmp_path):
    shutil.copytree(saved(layout)[0], tmp_path / "copy")
    (tmp_path / "copy" / "global_step5" / lost).unlink()
    with pytest.raises(
        CheckpointError, match=r"the (optimizer|model) file of rank 1 \(of 2\) is missing\. Take another"
    ):
        read(find(tmp_path / "copy"))


def test_files_of_two_saves_are_refused(saved, tmp_path):
    """The same ranks and sizes, one step later: only Adam's count tells."""
    run_workers(save, 2, tmp_path, "fp32", "2", (), {}, STEPS + 1)
    name = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shutil.copy(saved("fp32-2")[0] / "global_step5" / name, tmp_path / "global_step6" / name)
    with pytest.raises(CheckpointError, match=r"\(2, 5, 2, 2\) do not fit \(2, 6, 2, 2\) elsewhere"):
        read(find(tmp_path))


@pytest.mark.parametrize("name", ["zero_pp_rank_1_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"])
def test_one_flipped_byte_is_seen(saved, name, tmp_path):
    shutil.copytree(saved("fp32-1")[0], tmp_path / "copy")
    path = tmp_path / "copy" / "global_step5" / name
    held = bytearray(path.read_bytes())
    held[len(held) // 2] ^= 1
    path.write_bytes(held)
    with pytest.raises(CheckpointError, match="fails its checksum: damaged since it was written"):
        read(path.parent)


def test_a_run_at_stage_0_is_refused(tmp_path):
    run_workers(save, 2, tmp_path, "fp32", "0", (), {})
    with pytest.raises(CheckpointError, match="of a run at ZeRO stage 0, whose layout cannot be taken over"):
        read(find(tmp_path))
