import json
import logging
import shutil
from dataclasses import asdict

import pytest
import torch
from safetensors import safe_open

from sft_dist.checkpoint import Checkpoints, Run, TrainState, newest_complete, read_masters, read_state, verify
from sft_dist.errors import CheckpointError
from sft_dist.layout import MOMENTS, Fragment

IDENTITY = {"model": "m1", "data": "d1", "tokenizer": "t1", "global_batch_rows": 8}
SHAPES = {"weight": (3, 4), "bias": (3,)}


def fragments(seed):
    """A whole little model as one rank holds it, moments included."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for name, shape in SHAPES.items():
        length = torch.Size(shape).numel()
        values = {kind: torch.randn(length, generator=generator) for kind in ("master", *MOMENTS)}
        made.append(Fragment(name, length, 0, values))
    return made


def equal(one, other):
    return all(
        torch.equal(a.values[kind], b.values[kind]) for a, b in zip(one, other, strict=True) for kind in a.values
    )


def checkpoints(tmp_path, comms, *, keep_last=5, **identity):
    attachments = tmp_path / "attachments"
    (attachments / "model" / "deep").mkdir(parents=True, exist_ok=True)
    (attachments / "run.yaml").write_text("train: {micro_batch_rows: 1}\n")
    (attachments / "model" / "config.json").write_text("{}")
    (attachments / "model" / "deep" / "more.txt").write_text("more")
    return Checkpoints(
        tmp_path / "checkpoints",
        identity={**IDENTITY, **identity},
        attachments={"run.yaml": attachments / "run.yaml", "model": attachments / "model"},
        keep_last=keep_last,
        stage=2,
        comms=comms,
    )


def state(step):
    return TrainState(step, 8 * step, 100 * step, 10 * step, step, 1.5 * step)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, comms):
    """Three checkpoints of one run; copied by the tests that damage them."""
    folder = tmp_path_factory.mktemp("run")
    made = checkpoints(folder, comms)
    for step in (1, 2, 3):
        made.save(fragments(step), state(step))
    return folder


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run", symlinks=True)


def folder_of(run, step):
    return run / "checkpoints" / f"step-{step:08d}"


def files_of(path):
    return sorted(file for file in path.rglob("*") if file.is_file())


def test_a_checkpoint_is_whole_and_holds_safetensors_and_text_alone(saved):
    path = folder_of(saved, 2)
    assert verify(path) is None
    names = {file.relative_to(path).as_posix() for file in files_of(path)}
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest["files"]) == names - {"manifest.json"}
    assert {"state.json", "run.yaml", "model/config.json", "model/deep/more.txt"} < names
    assert {file.suffix for file in files_of(path)} == {".safetensors", ".json", ".yaml", ".txt"}
    assert (manifest["step"], manifest["world_size"], manifest["zero_stage"]) == (2, 1, 2)
    assert manifest["identity"] == IDENTITY
    assert read_state(path) == state(2)
    assert (saved / "checkpoints" / "latest").resolve() == folder_of(saved, 3)
    assert not list((saved / "checkpoints").glob(".*.partial"))


def test_the_files_are_plain_safetensors_of_masters_and_moments(saved):
    (file,) = folder_of(saved, 1).glob("*.safetensors")
    with safe_open(file, "pt") as tensors:
        assert set(tensors.keys()) == {f"{kind}/{name}" for kind in ("master", *MOMENTS) for name in SHAPES}
        assert torch.equal(tensors.get_tensor("exp_avg/bias"), fragments(1)[1].values["exp_avg"])


def test_what_is_restored_is_what_was_saved(saved, comms):
    made = checkpoints(saved, comms)
    live = fragments(9)
    assert made.restore(folder_of(saved, 2), live) == state(2)
    assert equal(live, fragments(2))


def test_fragments_cut_elsewhere_are_filled_from_the_same_checkpoint(saved, comms):
    live = [
        Fragment(f.name, f.length, cut, {kind: torch.zeros(f.length - cut) for kind in f.values})
        for f, cut in zip(fragments(0), (5, 2), strict=True)
    ]
    checkpoints(saved, comms).restore(folder_of(saved, 3), live)
    for mine, whole in zip(live, fragments(3), strict=True):
        assert all(torch.equal(mine.values[kind], whole.values[kind][mine.offset :]) for kind in mine.values)


def test_restoring_writes_into_the_live_buffers(saved, comms):
    """Fragments are views of DeepSpeed's flat buffers: what is loaded must arrive there, not in a copy."""
    flat = {kind: torch.zeros(20) for kind in ("master", *MOMENTS)}
    live = [
        Fragment("weight", 12, 0, {kind: buffer.narrow(0, 2, 12) for kind, buffer in flat.items()}),
        Fragment("bias", 3, 0, {kind: buffer.narrow(0, 14, 3) for kind, buffer in flat.items()}),
    ]
    checkpoints(saved, comms).restore(folder_of(saved, 1), live)
    weight, bias = fragments(1)
    for kind, buffer in flat.items():
        wanted = torch.cat([torch.zeros(2), weight.values[kind], bias.values[kind], torch.zeros(3)])
        assert torch.equal(buffer, wanted)


def test_masters_fill_a_plain_module(saved):
    module = torch.nn.Linear(4, 3)
    read_masters(folder_of(saved, 2), module)
    weight, bias = fragments(2)
    assert torch.equal(module.weight, weight.values["master"].view(3, 4))
    assert torch.equal(module.bias, bias.values["master"])


def test_a_frozen_parameter_is_not_looked_for(saved):
    module = torch.nn.Linear(4, 3)
    module.frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    read_masters(folder_of(saved, 2), module)
    assert module.frozen.tolist() == [1.0, 1.0]


def test_the_newest_whole_checkpoint_is_found(saved, comms):
    assert newest_complete(saved / "checkpoints") == folder_of(saved, 3)
    assert checkpoints(saved, comms).newest() == folder_of(saved, 3)


def test_no_checkpoints_are_no_error(tmp_path, comms):
    assert newest_complete(tmp_path / "nowhere") is None
    made = checkpoints(tmp_path, comms)
    assert made.newest() is None
    assert made.check() is None


def test_what_is_no_finished_checkpoint_is_not_looked_at(run):
    for name in (".step-00000004.partial", "step-00000004.old-1", "step-tmp", "notes"):
        (run / "checkpoints" / name).mkdir()
    (run / "checkpoints" / "step-00000009").write_text("a file")
    assert newest_complete(run / "checkpoints") == folder_of(run, 3)


def test_every_damaged_byte_of_every_file_is_found(run):
    path = folder_of(run, 2)
    assert len(files_of(path)) >= 6
    for file in files_of(path):
        content = file.read_bytes()
        places = range(len(content)) if file.suffix != ".safetensors" else range(0, len(content), 37)
        for place in places:
            file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            assert verify(path) is not None, (file, place)
        file.write_bytes(content)
        assert verify(path) is None


@pytest.mark.parametrize("how", ["cut", "emptied", "longer", "deleted"])
def test_every_file_that_is_cut_or_gone_is_named(run, how):
    path = folder_of(run, 2)
    for file in files_of(path):
        content = file.read_bytes()
        if how == "deleted":
            file.unlink()
        else:
            file.write_bytes({"cut": content[:-1], "emptied": b"", "longer": content + b"x"}[how])
        assert str(file) in verify(path)
        file.write_bytes(content)
    assert verify(path) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "manifest.json: KeyError: 'files'"),
        ("[]", "manifest.json: TypeError: "),
        ('{"files": {}}', "manifest.json: KeyError: 'format_version'"),
        ('{"files": {}, "format_version": 99}', "format version 99, this program reads 1"),
        ("\0", "manifest.json: JSONDecodeError: "),
        ('{"files": [], "format_version": 1}', "manifest.json"),
        ('{"files": {}, "format_version": 1, "step": 2, "identity": {}}', "manifest.json"),
    ],
)
def test_a_manifest_that_is_none_is_told(run, text, message):
    path = folder_of(run, 2)
    (path / "manifest.json").write_text(text)
    assert verify(path).startswith(str(path))
    assert message in verify(path)


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(run, comms, caplog):
    (broken,) = folder_of(run, 3).glob("*.safetensors")
    content = bytearray(broken.read_bytes())
    content[-1] ^= 1
    broken.write_bytes(content)
    with caplog.at_level(logging.WARNING, logger="sft_dist"):
        assert checkpoints(run, comms).newest() == folder_of(run, 2)
    (record,) = caplog.records
    assert record.getMessage() == f"checkpoint passed over: {broken}: its bytes are not the ones that were written"
    assert folder_of(run, 3).is_dir()


def test_falling_past_the_last_checkpoint_is_no_fresh_start(run, comms, caplog):
    for step in (1, 2, 3):
        (folder_of(run, step) / "state.json").unlink()
    message = (
        rf"checkpoints: none of 3 checkpoints is whole \({folder_of(run, 3)}/state\.json: No such file or directory\)\. "
        r"Restore one from a backup, or start over with --fresh"
    )
    with pytest.raises(CheckpointError, match=message) as raised:
        newest_complete(run / "checkpoints")
    assert raised.value.exit_code == 3
    with pytest.raises(CheckpointError, match=message):
        checkpoints(run, comms).newest()
    assert len(caplog.records) == 6


def test_an_attachment_may_hold_a_file_of_a_name_that_is_taken(tmp_path, comms):
    made = checkpoints(tmp_path, comms)
    (tmp_path / "attachments" / "tokenizer").mkdir()
    for name in ("run.yaml", "state.json"):
        (tmp_path / "attachments" / "tokenizer" / name).write_text("another")
    made.attachments["tokenizer"] = tmp_path / "attachments" / "tokenizer"
    path = made.save(fragments(1), state(1))
    names = {file.relative_to(path).as_posix() for file in files_of(path)}
    assert set(json.loads((path / "manifest.json").read_text())["files"]) == names - {"manifest.json"}


def test_only_the_last_ones_are_kept(tmp_path, comms):
    made = checkpoints(tmp_path, comms, keep_last=2)
    for step in range(1, 5):
        made.save(fragments(step), state(step))
    assert sorted(p.name for p in made.folder.iterdir()) == ["latest", "step-00000003", "step-00000004"]
    assert (made.folder / "latest").resolve() == made.newest() == made.folder / "step-00000004"


def test_what_an_interrupted_save_left_is_swept(tmp_path, comms):
    made = checkpoints(tmp_path, comms)
    partial = made.folder / ".step-00000001.partial"
    partial.mkdir(parents=True)
    (partial / "shard-00009-model-00001-of-00001.safetensors").write_bytes(b"of a life that was killed")
    path = made.save(fragments(1), state(1))
    assert verify(path) is None
    assert not partial.exists()
    assert not list(path.glob("shard-00009-*"))


def test_the_same_step_saved_again_sets_the_first_aside(tmp_path, comms):
    made = checkpoints(tmp_path, comms)
    for seed in (1, 2, 3):
        made.save(fragments(seed), state(4))
    names = ["step-00000004", "step-00000004.old-1", "step-00000004.old-2"]
    assert sorted(p.name for p in made.folder.iterdir() if p.name != "latest") == names
    for seed, name in zip((3, 1, 2), names, strict=True):
        assert verify(made.folder / name) is None
        live = fragments(0)
        made.restore(made.folder / name, live)
        assert equal(live, fragments(seed))


def test_attachments_travel_with_the_checkpoint(run):
    shutil.rmtree(run / "attachments")
    path = folder_of(run, 3)
    assert verify(path) is None
    assert (path / "model" / "deep" / "more.txt").read_text() == "more"
    assert (path / "run.yaml").read_text() == "train: {micro_batch_rows: 1}\n"


@pytest.mark.parametrize(("key", "value"), [("model", "m2"), ("data", "d2"), ("global_batch_rows", 16), ("seed", 1)])
def test_another_runs_checkpoint_is_refused_with_both_values(saved, comms, key, value):
    made = checkpoints(saved, comms, **{key: value})
    old = repr(IDENTITY.get(key))
    message = rf"step-0000000\d: was made with {key} = {old}, this run has {value!r}\. Continue with the old value, take another"
    with pytest.raises(CheckpointError, match=message):
        made.check()
    live = fragments(9)
    with pytest.raises(CheckpointError, match=message):
        made.restore(folder_of(saved, 1), live)
    assert equal(live, fragments(9))


def test_the_same_run_passes_the_check_and_damage_is_left_to_newest(run, comms):
    made = checkpoints(run, comms)
    assert made.check() is None
    (folder_of(run, 3) / "manifest.json").write_text("{cut")
    assert made.check() is None
    (folder_of(run, 2) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="step-00000001: was made with model = 'm1', this run has 'm3'"):
        checkpoints(run, comms, model="m3").check()
    (folder_of(run, 1) / "manifest.json").write_text('{"step": 1}')
    assert checkpoints(run, comms, model="m3").check() is None


@pytest.mark.parametrize("text", ["[]", "7", '{"identity": null}', '{"identity": 3}', '"text"'])
def test_a_check_leaves_odd_manifests_to_newest(run, comms, text):
    for step in (1, 2, 3):
        (folder_of(run, step) / "manifest.json").write_text(text)
    made = checkpoints(run, comms)
    made.check()
    with pytest.raises(CheckpointError, match="none of 3 checkpoints is whole"):
        made.newest()


def test_a_run_of_values_refuses_arithmetic():
    run = Run(torch.ones(3), 10, 4)
    assert run.size() == torch.Size([10])
    with pytest.raises(TypeError):
        run + 1
    for act in (lambda: run.add(1), lambda: run.sum(), lambda: run[0], lambda: run.clone()):
        with pytest.raises(TypeError, match=r"a Run only carries values to a checkpoint; .* is not for it"):
            act()
    assert run.detach() is run
    with pytest.raises(TypeError, match="only carries values"):
        torch.cat([run, run])


def test_a_state_one_step_later_adds_up():
    start = TrainState()
    assert start == TrainState(0, 0, 0, 0, 0, 0.0)
    first = start.after(rows=8, tokens=100, target_tokens=10, adam_step=1, gpu_seconds=0.5)
    second = first.after(rows=3, tokens=50, target_tokens=5, adam_step=1, gpu_seconds=0.25)
    assert second == TrainState(step=2, rows_consumed=11, tokens=150, target_tokens=15, adam_step=1, gpu_seconds=0.75)
    assert TrainState(**json.loads(json.dumps(asdict(second)))) == second
    assert start == TrainState()
