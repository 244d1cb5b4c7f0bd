"""Checkpoints of others that are broken, forged, or hostile: nothing of them runs, nothing large is allocated, each error says why."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from sft_dist.errors import CheckpointError
from sft_dist.foreign import find, read

SHAPES = [OrderedDict(a=torch.Size([3, 2])), OrderedDict({"module.b": torch.Size([5])})]
ADAM = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False}


def model_state(**more) -> dict:
    """What a model file of ZeRO 2 holds, on two ranks: trained a [3, 2] and b [5], frozen c [2], a buffer, another name of a."""
    module = {
        "a": torch.zeros(3, 2),
        "module.b": torch.zeros(5),
        "tied": torch.zeros(3, 2),
        "c": torch.tensor([7.0, 8.0]).bfloat16(),
    }
    return {
        "module": {**module, "mask": torch.ones(4)}, "buffer_names": ["mask"], "shared_params": {"tied": "a"},
        "param_shapes": SHAPES, "frozen_param_shapes": None, "frozen_param_fragments": None, "global_steps": 9,
        "global_samples": 72, "dp_world_size": 2, "mp_world_size": 1, **more,
    }  # fmt: skip


def optimizer_state(rank: int, **more) -> dict:
    """What rank `rank`'s optimizer file holds: its half of a, and of b, where one element of padding is left out."""
    starts, sizes = ((0, 100), (3, 103))[rank], ((3, 3), (3, 2))[rank]
    masters = [
        torch.arange(start, start + size, dtype=torch.float32) for start, size in zip(starts, sizes, strict=True)
    ]
    moments = [torch.arange(start, start + 3, dtype=torch.float32) for start in starts]
    state = {
        number: {"step": torch.tensor(8.0), "exp_avg": moment * 2, "exp_avg_sq": moment * 3}
        for number, moment in enumerate(moments)
    }
    inner = {
        "base_optimizer_state": {"state": state, "param_groups": [{**ADAM, "params": [0]}, {**ADAM, "params": [1]}]},
        "single_partition_of_fp32_groups": masters, "zero_stage": 2, "partition_count": [2, 2],
    }  # fmt: skip
    return {"optimizer_state_dict": {**inner, **more}}


def stage_3(rank: int) -> tuple[dict, dict]:
    """The same model at ZeRO 3: (model file, optimizer file)."""
    sizes = (3, 3)
    parts = [torch.ones(size) for size in sizes]
    state = {number: {"step": 8, "exp_avg": part, "exp_avg_sq": part} for number, part in enumerate(parts)}
    inner = {"state": state, "param_groups": [ADAM, ADAM]}
    frozen = {
        "frozen_param_shapes": {"c": torch.Size([3])},
        "frozen_param_fragments": {"c": torch.full((2,), float(rank))},
    }
    optimizer = {"optimizer_state_dict": inner, "fp32_flat_groups": parts, "zero_stage": 3, "partition_count": 2}
    return model_state(**frozen), {"optimizer_state_dict": optimizer}


MODEL, FIRST, SECOND = (
    "mp_rank_00_model_states.pt",
    *(f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)),
)


@pytest.fixture
def folder(tmp_path):
    """A whole checkpoint."""
    path = tmp_path / "global_step9"
    path.mkdir()
    torch.save(model_state(), path / MODEL)
    for rank, name in enumerate((FIRST, SECOND)):
        torch.save(optimizer_state(rank), path / name)
    return path


@pytest.fixture
def partitioned(tmp_path):
    """A whole checkpoint of ZeRO 3."""
    path = tmp_path / "global_step3"
    path.mkdir()
    for rank in (0, 1):
        for kind, content in zip(("model", "optim"), stage_3(rank), strict=True):
            torch.save(content, path / f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt")
    return path


def refused(folder: Path, match: str) -> None:
    """Reading `folder` is an error that says `match` and a remedy."""
    with pytest.raises(CheckpointError, match=match) as caught:
        read(find(folder))
    assert str(caught.value).split(". ")[-1][0].isupper()


def test_the_whole_is_put_together(folder):
    made = read(folder)
    assert (made.step, made.adam_step, made.zero_stage, made.world_size, made.samples) == (9, 8, 2, 2, 72)
    assert made.shapes == {"a": (3, 2), "b": (5,), "c": (2,)}
    assert made.values["a"]["master"].tolist() == [0, 1, 2, 3, 4, 5]
    assert made.values["b"]["master"].tolist() == [100, 101, 102, 103, 104]
    assert made.values["b"]["exp_avg"].tolist() == [200, 202, 204, 206, 208]
    assert made.values["b"]["exp_avg_sq"].tolist() == [300, 303, 306, 309, 312]
    assert {kind: value.tolist() for kind, value in made.values["c"].items()} == {"master": [7.0, 8.0]}


def test_the_whole_is_put_together_at_stage_3(partitioned):
    made = read(partitioned)
    assert (made.zero_stage, made.shapes) == (3, {"a": (3, 2), "b": (5,), "c": (3,)})
    assert made.values["c"]["master"].tolist() == [0.0, 0.0, 1.0]


def test_what_was_read_does_not_change_with_the_files(folder):
    made = read(folder)
    for name in (MODEL, FIRST, SECOND):
        (folder / name).write_bytes(b"gone")
    assert made.values["a"]["master"].tolist() == [0, 1, 2, 3, 4, 5]


def test_fused_adam_counts_in_its_group(folder):
    for rank, name in enumerate((FIRST, SECOND)):
        content = optimizer_state(rank, zero_stage=1)
        base = content["optimizer_state_dict"]["base_optimizer_state"]
        for one in base["state"].values():
            del one["step"]
        base["param_groups"] = [{"betas": (0.9, 0.99), "eps": 1e-8, "bias_correction": True, "step": 8}] * 2
        torch.save(content, folder / name)
    assert read(folder).adam_step == 8


class Hostile:
    """A pickle of it is a call."""

    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("name", [MODEL, FIRST, SECOND])
@pytest.mark.parametrize(
    ("function", "named"),
    [
        (os.system, r"(posix|nt)\.system"),
        (eval, r"builtins\.eval|__builtin__\.eval"),
        (subprocess.call, r"(commands|subprocess)\.call"),
    ],
)
def test_nothing_is_run(folder, name, function, named, tmp_path):
    ran = tmp_path / "ran"
    command = f"__import__('pathlib').Path({str(ran)!r}).touch()" if function is eval else f"touch {ran}"
    content = torch.load(folder / name, weights_only=True)
    content["more"] = Hostile(function, command)
    torch.save(content, folder / name)
    refused(folder, rf"{name}: wants ({named}), which no checkpoint needs; it was not run\. Do not use this file")
    assert not ran.exists()
    pickle.loads(pickle.dumps(Hostile(os.system, f"touch {ran}")))
    assert ran.exists()  # the plant: outside the restricted unpickler it does run


@pytest.mark.parametrize(
    "forged",
    [
        Hostile(bytearray, 2**62),
        Hostile(torch._utils._rebuild_meta_tensor_no_storage, torch.float32, (2**40,), (1,), False),
        Hostile(torch.empty, 2**40),
        Hostile(torch.Tensor, 2**45),  # a name that stage 3 needs
    ],
    ids=["bytearray", "meta", "empty", "Tensor"],
)
def test_a_size_is_not_taken_from_a_call(folder, forged):
    torch.save({**model_state(), "more": forged}, folder / MODEL)
    limit = peak()
    refused(folder, "wants .*, which no checkpoint needs|can't allocate memory")
    assert peak() - limit < 2**28


def test_deepspeeds_own_code_is_not_imported(folder):
    code = (
        "import sys; from pathlib import Path; from sft_dist.foreign import read; read(Path(sys.argv[1]));"
        "print(sorted({'deepspeed', 'transformers', 'accelerate'} & sys.modules.keys()))"
    )
    made = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert made.stdout == "[]\n"


def test_a_stand_in_takes_any_state_and_keeps_none(folder):
    """The pickle names DeepSpeed's classes; here they are made up, since only their names are written."""
    for rank, name in enumerate((FIRST, SECOND)):
        content = optimizer_state(rank)
        content["optimizer_state_dict"]["loss_scaler"] = scaler()
        torch.save(content, folder / name)
    assert b"deepspeed.runtime.fp16.loss_scaler" in (folder / FIRST).read_bytes()
    assert read(folder).adam_step == 8


def scaler():
    """An object that pickles as DeepSpeed's LossScaler, with state."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler

    return LossScaler(scale=2.0)


def test_a_view_that_claims_more_than_the_file_has(folder):
    content = model_state()
    content["module"]["c"] = torch.zeros(1).expand(2**40)
    torch.save(content, folder / MODEL)
    refused(folder, r"c is torch\.float32 with strides \(0,\): contiguous floating point is due")


def test_one_stored_tensor_under_many_names(folder):
    one = torch.zeros(1000)
    content = model_state()
    content["module"] |= {f"copy-{number}": one for number in range(100)}
    torch.save(content, folder / MODEL)
    refused(folder, r"claims 400,004 bytes of tensors, and has \d")


def test_a_pickle_that_claims_a_longer_storage(folder):
    """The record holds five floats; the pickle says 2**40."""
    path = folder / MODEL
    long, longer = b"K\x05\x85", b"\x8a\x06" + (2**40).to_bytes(6, "little") + b"\x85"
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, held in records.items():
            archive.writestr(name, held.replace(long, longer) if name.endswith("data.pkl") else held)
    limit = peak()
    refused(folder, rf"{MODEL}: cannot be read as a file of torch\.save since 1\.6 without running it: .*storage")
    assert peak() - limit < 2**28


def peak() -> int:
    """Bytes resident at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("forged", [[torch.Size([2**40])], [torch.Size([3, 2]), torch.Size([2**40, 2**5])]])
def test_forged_shapes_allocate_nothing(folder, forged):
    shapes = [
        OrderedDict({"a": shape}) if at == 0 else OrderedDict({"module.b": shape}) for at, shape in enumerate(forged)
    ]
    torch.save(model_state(param_shapes=shapes + SHAPES[len(shapes) :]), folder / MODEL)
    limit = peak()
    refused(folder, r"partitions of \[3, [23]\] elements do not make up \d{13,} of master, group [01]\.")
    assert peak() - limit < 2**28


MODELS = {
    "not one rank": ({"dp_world_size": 10**15}, r"the optimizer file of rank 2 \(of 1000000000000000\) is missing"),
    "no ranks": ({"dp_world_size": None}, "dp_world_size = None is not a count"),
    "fewer ranks": ({"dp_world_size": 1}, "optimizer files of 2 ranks, of a run on 1: two saves, one over the other"),
    "tensor-parallel": ({"mp_world_size": 2}, "of a model-parallel run, which cannot be taken over"),
    "stage 0": ({"param_shapes": None}, "of a run at ZeRO stage 0"),
    "a half step": ({"global_steps": 1.5}, "global_steps = 1.5 is not a count"),
    "not a number": ({"global_samples": float("nan")}, "global_samples = nan is not a count"),
    "a negative shape": ({"param_shapes": [{"a": (-1,)}, {"b": (5,)}]}, r"a: \(-1\) is not a shape"),
    "a deep shape": ({"param_shapes": [{"a": (1,) * 99}, {"b": (5,)}]}, "is not a shape"),
    "one group": ({"param_shapes": [{"a": (11,)}]}, "shapes of 1 parameter groups, state of 2"),
    "a nested shape": ({"param_shapes": [{"a": ([1],)}, {"b": (5,)}]}, r"a: \(a list\) is not a shape"),
    "a terminal's command": ({"param_shapes": [{"a\x1b[2J": (-1,)}, {"b": (5,)}]}, r"a\?\[2J: \(-1\) is not a shape"),
    "one name": ({"param_shapes": [{"a": (6,)}, {"module.a": (5,)}]}, "two parameters have the same name"),
    "no buffers": ({"buffer_names": None}, r"not the content that DeepSpeed saves \(TypeError: "),
    "a list": ({"param_shapes": [[1], [2]]}, r"not the content that DeepSpeed saves \(AttributeError: "),
    "not floating": ({"module": {"c": torch.ones(2, dtype=torch.int64)}}, r"c is torch\.int64"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "match"), MODELS.values(), ids=MODELS)
def test_a_model_file_that_does_not_fit_is_refused(folder, change, match):
    torch.save(model_state(**change), folder / MODEL)
    refused(folder, match)


def adam(**more) -> dict:
    """Settings and state of an optimizer, changed."""
    made = optimizer_state(1)["optimizer_state_dict"]["base_optimizer_state"]
    settings, state = more.pop("settings", {}), more.pop("state", {})
    made["param_groups"] = [{**ADAM, **settings}] * 2
    made["state"] = {number: {**one, **state} for number, one in made["state"].items()}
    return {"base_optimizer_state": {**made, **more}}


OPTIMIZERS = {
    "three ranks": ({"partition_count": 3}, r"\(2, 8, 3, 2\) do not fit \(2, 8, 2, 2\) elsewhere"),
    "another step": (adam(state={"step": 7}), r"\(2, 7, 2, 2\) do not fit \(2, 8, 2, 2\)"),
    "another stage": ({"zero_stage": 1}, r"\(1, 8, 2, 2\) do not fit \(2, 8, 2, 2\)"),
    "elastic": ({"base_optimizer_state": [{}]}, "an elastic checkpoint"),
    "LAMB": (adam(settings={"max_coeff": 10.0}), "its optimizer is not Adam"),
    "AMSGrad": (adam(settings={"amsgrad": True}), "its optimizer is not Adam"),
    "uncorrected": (adam(settings={"bias_correction": False}), "its optimizer is not Adam"),
    "8 bits": (adam(state={"state1": torch.ones(3)}), "its optimizer is not Adam"),
    "SGD": (adam(param_groups=[{"lr": 0.1, "momentum": 0.9}]), "its optimizer is not Adam"),
    "no step yet": (adam(state={}) | {"single_partition_of_fp32_groups": [torch.ones(3)] * 3}, "Adam's state of 2 of 3 partitions"),
    "a long partition": ({"single_partition_of_fp32_groups": [torch.ones(9), torch.ones(2)]}, r"partitions of \[3, 9\] elements"),
    "a short one": ({"single_partition_of_fp32_groups": [torch.ones(2), torch.ones(2)]}, r"partitions of \[3, 2\] elements"),
    "uneven moments": (adam(state={"exp_avg": torch.ones(4)}), r"partitions of \[3, 4\] elements do not make up 6 of exp_avg"),
    "no tensor": (adam(state={"exp_avg": [1.0]}), "not the content that DeepSpeed saves"),
    "integers": (adam(state={"exp_avg": torch.ones(3, dtype=torch.int32)}), r"exp_avg is torch\.int32"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "match"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_optimizer_file_that_does_not_fit_is_refused(folder, change, match):
    torch.save(optimizer_state(1, **change), folder / SECOND)
    refused(folder, match)


def doubled(levels: int) -> list:
    """A list of `levels` short lists in a file, of 2 ** `levels` elements when written out."""
    made = [0]
    for _ in range(levels):
        made = [made, made]
    return made


@pytest.mark.parametrize("change", [{"global_steps": doubled(80)}, {"param_shapes": [{"a": doubled(80)}, {"b": (5,)}]}])
def test_what_doubles_when_written_out_is_not_written_out(folder, change):
    torch.save(model_state(**change), folder / MODEL)
    refused(folder, r"global_steps = a list is not a count|a: \(a list, a list\) is not a shape")


def test_one_group_many_times_is_not_walked_many_times(folder):
    """Lists of 20,000 times the same dictionary of 20,000: 4 * 10**8 shapes, states and paddings, from some 200 kB."""
    long, times = {f"p{number}": (0,) for number in range(20_000)}, 20_000
    base = {"state": dict.fromkeys(range(times), long), "param_groups": [ADAM] * 2}
    torch.save(model_state(param_shapes=[long] * times), folder / MODEL)
    for rank, name in enumerate((FIRST, SECOND)):
        torch.save(optimizer_state(rank, base_optimizer_state=base), folder / name)
    refused(folder, "its optimizer is not Adam")
    one = {"step": 8, "exp_avg": torch.zeros(0), "exp_avg_sq": torch.zeros(0)}
    flat = {
        "base_optimizer_state": {**base, "state": dict.fromkeys(range(times), one)},
        "single_partition_of_fp32_groups": [torch.zeros(0)] * times,
        "param_alignment_paddings": [[0] * times] * times,
    }
    for rank, name in enumerate((FIRST, SECOND)):
        torch.save(optimizer_state(rank, **flat), folder / name)
    refused(folder, "a parameter group is there twice")


def test_adam_counts_one_number(folder):
    content = optimizer_state(1)
    content["optimizer_state_dict"]["base_optimizer_state"]["state"][1]["step"] = 9
    torch.save(content, folder / SECOND)
    refused(folder, r"Adam counts \[8, 9\] steps where one number is due")


@pytest.mark.parametrize("gaps", [[[1], [0, 0]], [[2**40], [0]], [[-1], [0]]])
def test_forged_gaps_are_refused(folder, gaps):
    for rank, name in enumerate((FIRST, SECOND)):
        torch.save(optimizer_state(rank, param_alignment_paddings=gaps), folder / name)
    refused(folder, "not the content that DeepSpeed saves|do not make up|padding = -1 is not a count")


def test_a_frozen_part_of_another_size_is_refused(partitioned):
    path = partitioned / "zero_pp_rank_1_mp_rank_00_model_states.pt"
    torch.save(model_state(frozen_param_fragments={"c": torch.ones(3)}), path)
    refused(partitioned, r"3 elements of c \(3,\) are not the part of one of 2 ranks")


def test_stage_3_state_beside_an_unpartitioned_model_is_refused(folder):
    for rank, name in enumerate((FIRST, SECOND)):
        torch.save(stage_3(rank)[1], folder / name)
    refused(folder, r"\(3, 8, 2, 2\) do not fit")


FILES = {
    "of an expert": ("layer_0_expert_0_mp_rank_00_model_states.pt", "mixture-of-experts run, which cannot"),
    "of an expert's optimizer": ("expp_rank_0_mp_rank_00_optim_states.pt", "mixture-of-experts run, which cannot"),
    "model-parallel": ("mp_rank_01_model_states.pt", "of a model-parallel, pipeline or"),
    "of a pipeline": ("layer_00-model_00-model_states.pt", "of a model-parallel, pipeline or"),
    "of another precision": (f"bf16_{FIRST}", f"of the same rank as bf16_{FIRST}: two saves, one over the other"),
    "of another stage": (
        "zero_pp_rank_0_mp_rank_00_model_states.pt",
        "of the same rank as mp_rank_00_model_states.pt: two saves",
    ),
}


@pytest.mark.parametrize(("name", "match"), FILES.values(), ids=FILES)
def test_a_file_too_many_is_named(folder, name, match):
    (folder / name).write_bytes((folder / FIRST).read_bytes())
    refused(folder, match)


def test_a_missing_file_is_named(folder):
    (folder / SECOND).unlink()
    refused(folder, r"the optimizer file of rank 1 \(of 2\) is missing")
    (folder / MODEL).unlink()
    refused(folder, r"mp_rank_00_model_states\.pt, the model file of rank 0, is missing")


def test_a_universal_checkpoint_is_refused(folder):
    (folder / "zero").mkdir()
    refused(folder, "a universal checkpoint. Take the global_step")


BYTES = {
    "empty": b"",
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n",
    "pickle": pickle.dumps(Hostile(os.system, "touch ran")),
    "cut": None,
}


@pytest.mark.parametrize("held", BYTES.values(), ids=BYTES)
def test_what_is_no_archive_is_refused(folder, held):
    path = folder / SECOND
    path.write_bytes(path.read_bytes()[:-100] if held is None else held)
    refused(folder, r"cannot be read as a file of torch\.save since 1\.6 without running it")


def test_the_format_before_1_6_is_refused(folder):
    torch.save(optimizer_state(1), folder / SECOND, _use_new_zipfile_serialization=False)
    refused(folder, r"cannot be read as a file of torch\.save since 1\.6 without running it: File is not a zip file")


@pytest.mark.parametrize("how", ["compressed", "twice", "in capitals"])
def test_an_archive_of_another_layout_is_refused(folder, how):
    path = folder / SECOND
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if how == "compressed" else zipfile.ZIP_STORED) as archive:
        for name, held in records.items():
            archive.writestr(name, held)
        if how != "compressed":
            name = next(name for name in records if name.endswith("data.pkl"))
            archive.writestr(
                "other/data.pkl" if how == "twice" else name.replace("data.pkl", "DATA.PKL"), records[name]
            )
    refused(folder, r"not laid out as torch\.save lays out an archive")


def test_a_flipped_byte_is_seen(folder):
    path = folder / FIRST
    held, floats = path.read_bytes(), torch.arange(100, 103, dtype=torch.float32).numpy().tobytes()
    assert held.count(floats) == 1
    path.write_bytes(held.replace(floats, floats[:-1] + b"\x40"))
    refused(folder, r"data/\d+ fails its checksum: damaged since it was written")


def test_what_latest_names_is_found(folder):
    (folder.parent / "latest").write_text("global_step9\n")
    assert find(folder.parent) == find(folder) == folder


@pytest.mark.parametrize("tag", ["../elsewhere", "/etc", "..", ".", "", "a/b", "global_step9\0", "linked", "x" * 9000])
def test_latest_does_not_lead_out(folder, tag):
    here = folder.parent
    (here / "sub").mkdir()
    (here / "sub" / "linked").symlink_to(folder)
    (here / "elsewhere").mkdir()
    (here / "sub" / "latest").write_text(tag)
    refused(here / "sub", r"does not name a folder beside it\. Name the global_step")


def test_latest_that_names_nothing(tmp_path):
    (tmp_path / "latest").write_text("global_step9")
    refused(tmp_path, "`latest` names it, but it is not there")


def test_a_trainers_newest_whole_checkpoint_is_found(folder, tmp_path):
    for step in (9, 80, 700):
        path = tmp_path / "output" / f"checkpoint-{step}"
        path.mkdir(parents=True)
        (path / "latest").write_text("global_step9")
        (path / "trainer_state.json").write_text("{}")
    for step in (9, 80):
        (tmp_path / "output" / f"checkpoint-{step}" / "global_step9").mkdir()
        for name in (MODEL, FIRST, SECOND):
            copy = tmp_path / "output" / f"checkpoint-{step}" / "global_step9" / name
            copy.write_bytes((folder / name).read_bytes())
    assert find(tmp_path / "output") == tmp_path / "output" / "checkpoint-80" / "global_step9"
    (tmp_path / "output" / "checkpoint-80" / "global_step9" / SECOND).unlink()
    assert find(tmp_path / "output") == tmp_path / "output" / "checkpoint-9" / "global_step9"
    (tmp_path / "output" / "checkpoint-9" / "trainer_state.json").unlink()
    refused(tmp_path / "output", "no checkpoint-N or global_stepN that is whole. Name a global_step")


def test_deepspeeds_newest_whole_save_is_found_without_latest(folder):
    for step in (10, 200):
        shutil.copytree(folder, folder.with_name(f"global_step{step}"))
    (folder.with_name("global_step3000")).mkdir()
    (folder.with_name("global_step200") / FIRST).unlink()
    assert find(folder.parent) == folder.with_name("global_step10")


def test_what_is_no_checkpoint_is_refused(tmp_path):
    refused(tmp_path, r"not a DeepSpeed checkpoint: no rank files .* Name a global_step\* folder")
    refused(tmp_path / "not there", "not a DeepSpeed checkpoint")
