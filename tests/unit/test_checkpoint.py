import errno
import json
import logging
import shutil

import pytest
import torch
from safetensors import safe_open

from sft_dist import checkpoint, store
from sft_dist.errors import CheckpointError, OtherCheckpointError, UnsavedError
from sft_dist.layout import MOMENTS, Fragment, whole
from sft_dist.manifest import masters, read_state, verify
from tests.unit.saved_runs import (
    IDENTITY,
    SHAPES,
    checkpoints,
    damage,
    equal,
    files_of,
    fill,
    folder_of,
    forge,
    fragments,
    newest,
    resealed,
    state,
)


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
    assert made.restore(lambda: live) == (folder_of(saved, 3), state(3), IDENTITY)
    assert made.saved_step == 3
    assert equal(live, fragments(3))


def test_fragments_cut_elsewhere_are_filled_from_the_same_checkpoint(saved, comms):
    live = [
        Fragment(f.name, f.length, cut, {kind: torch.zeros(f.length - cut) for kind in f.values})
        for f, cut in zip(fragments(0), (5, 2), strict=True)
    ]
    fill(folder_of(saved, 3), live)
    for mine, other in zip(live, fragments(3), strict=True):
        assert all(torch.equal(mine.values[kind], other.values[kind][mine.offset :]) for kind in mine.values)


def test_restoring_writes_into_the_live_buffers(saved, comms):
    """Fragments are views of DeepSpeed's flat buffers: what is loaded must arrive there, not in a copy."""
    flat = {kind: torch.zeros(20) for kind in ("master", *MOMENTS)}
    live = [
        Fragment("weight", 12, 0, {kind: buffer.narrow(0, 2, 12) for kind, buffer in flat.items()}),
        Fragment("bias", 3, 0, {kind: buffer.narrow(0, 14, 3) for kind, buffer in flat.items()}),
    ]
    fill(folder_of(saved, 1), live)
    weight, bias = fragments(1)
    for kind, buffer in flat.items():
        wanted = torch.cat([torch.zeros(2), weight.values[kind], bias.values[kind], torch.zeros(3)])
        assert torch.equal(buffer, wanted)


def test_a_parameter_that_is_not_there_or_of_another_size_is_told(saved):
    module = torch.nn.Linear(4, 3)
    module.more = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(
        CheckpointError, match=r"step-00000002: more: the model wants 2 elements of master, the checkpoint has nothing"
    ):
        fill(folder_of(saved, 2), whole(module))
    with pytest.raises(
        CheckpointError, match=r"weight: the model wants 15 elements of master, the checkpoint has 12 elements of"
    ):
        fill(folder_of(saved, 2), whole(torch.nn.Linear(5, 3)))


def test_no_checkpoints_are_no_error(tmp_path, comms):
    assert newest(tmp_path) is None
    made = checkpoints(tmp_path, comms)
    assert made.restore(lambda: fragments(0)) is None
    assert made.check() is None


def test_what_is_no_finished_checkpoint_is_not_looked_at(run):
    for name in (".step-00000004.partial", "step-00000004.old-1", "step-tmp", "notes"):
        (run / "checkpoints" / name).mkdir()
    (run / "checkpoints" / "step-00000009").write_text("a file")
    assert newest(run) == folder_of(run, 3)


def test_a_damaged_checkpoint_is_named_and_set_aside_once_an_older_one_was_used(run, comms, caplog):
    broken = damage(run, 3)
    size = broken.stat().st_size
    message = f"checkpoint passed over: {broken}: bytes 0 to {size} are not the ones that were written"
    with caplog.at_level(logging.WARNING, logger="sft_dist"):
        assert newest(run) == folder_of(run, 2)
        assert folder_of(run, 3).is_dir()  # who only reads moves nothing
        live = fragments(0)
        assert checkpoints(run, comms).restore(lambda: live) == (folder_of(run, 2), state(2), IDENTITY)
    assert equal(live, fragments(2))
    assert [record.getMessage() for record in caplog.records] == [message] * 2
    assert not folder_of(run, 3).exists()
    assert (run / "checkpoints" / "step-00000003.damaged-1").is_dir()


def test_falling_past_the_last_checkpoint_is_no_fresh_start(run, comms, caplog):
    for step in (1, 2, 3):
        (folder_of(run, step) / "state.json").unlink()
    message = (
        rf"checkpoints: none of 3 checkpoints is whole \({folder_of(run, 3)}/state\.json: No such file or directory\)\. "
        r"Restore one from a backup, or start over with --fresh"
    )
    with pytest.raises(CheckpointError, match=message) as raised:
        newest(run)
    assert raised.value.exit_code == 3
    with pytest.raises(CheckpointError, match=message):
        checkpoints(run, comms).restore(lambda: fragments(0))
    assert len(caplog.records) == 6
    assert all(folder_of(run, step).is_dir() for step in (1, 2, 3))  # the next start must not find an empty folder


def test_an_attachment_may_hold_a_file_of_a_name_that_is_taken(tmp_path, comms):
    made = checkpoints(tmp_path, comms)
    (tmp_path / "attachments" / "tokenizer").mkdir()
    for name in ("run.yaml", "state.json"):
        (tmp_path / "attachments" / "tokenizer" / name).write_text("another")
    made.attachments["tokenizer"] = tmp_path / "attachments" / "tokenizer"
    path = made.save(lambda: fragments(1), state(1)).path
    names = {file.relative_to(path).as_posix() for file in files_of(path)}
    assert set(json.loads((path / "manifest.json").read_text())["files"]) == names - {"manifest.json"}


@pytest.mark.parametrize("name", ["run.yaml", "state.json", "model/config.json"])
def test_a_small_file_that_is_damaged_is_found_before_the_run_goes_on(run, comms, name):
    """Resuming reads them too: the run file tells what changed since."""
    file = folder_of(run, 3) / name
    file.write_bytes(b"#" + file.read_bytes()[1:])
    assert checkpoints(run, comms).restore(lambda: fragments(0))[0] == folder_of(run, 2)
    assert (run / "checkpoints" / "step-00000003.damaged-1").is_dir()


@pytest.mark.parametrize("how", ["a later version", "another model"])
def test_what_is_whole_but_not_for_this_run_is_neither_passed_over_nor_set_aside(run, comms, how):
    live = fragments(0)
    if how == "a later version":
        resealed(folder_of(run, 3), forge("format_version", 3))
        message = "step-00000003: format version 3, this program reads 2; continue with the version"
    else:
        live.append(Fragment("another", 4, 0, {"master": torch.zeros(4)}))
        message = "step-00000003: another: the model wants 4 elements of master, the checkpoint has nothing"
    made = checkpoints(run, comms)
    with pytest.raises(OtherCheckpointError, match=message):
        made.restore(lambda: live)
    with pytest.raises(OtherCheckpointError, match=message):
        masters(run / "checkpoints", lambda path: live)
    if how == "a later version":
        with pytest.raises(OtherCheckpointError, match=message):
            made.check()
    assert folder_of(run, 3).is_dir()


def test_a_layout_that_leaves_elements_out_is_not_published(tmp_path, comms):
    made = checkpoints(tmp_path, comms)
    with pytest.raises(ValueError, match="weight: 7 of 12 elements"):
        made.save(lambda: [Fragment("weight", 12, 0, {"master": torch.zeros(7)})], state(1))
    assert newest(tmp_path) is None


def test_a_last_save_that_fails_twice_is_no_fault_of_the_run(tmp_path, comms, monkeypatch):
    """So its verdict is not `refused`: a job may be started again."""

    def full(path, *parts):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    made = checkpoints(tmp_path, comms)
    monkeypatch.setattr(store, "write_large", full)
    with pytest.raises(
        UnsavedError, match=r"No space left on device: the checkpoint cannot be written\. Make room"
    ) as raised:
        made.save(lambda: fragments(1), state(1))
    assert (raised.value.verdict, raised.value.exit_code) == ("unsaved", 3)


def test_a_hint_that_cannot_be_written_spoils_no_save_and_is_told(tmp_path, comms, caplog):
    made = checkpoints(tmp_path, comms)
    (made.folder / "latest").mkdir(parents=True)  # a folder of that name is in the way
    assert made.save(lambda: fragments(1), state(1)).failure is None
    assert "`latest` still names an older checkpoint" in caplog.text
    assert newest(tmp_path) == folder_of(tmp_path, 1)


def test_only_the_last_ones_are_kept(tmp_path, comms):
    made = checkpoints(tmp_path, comms, keep_last=2)
    for step in range(1, 5):
        made.save(lambda step=step: fragments(step), state(step))
    assert sorted(p.name for p in made.folder.iterdir()) == ["latest", "step-00000003", "step-00000004"]
    assert (made.folder / "latest").resolve() == newest(tmp_path) == made.folder / "step-00000004"


def test_what_an_interrupted_save_left_is_swept(tmp_path, comms):
    made = checkpoints(tmp_path, comms)
    partial = made.folder / ".step-00000001.partial"
    partial.mkdir(parents=True)
    (partial / "shard-00009-model-00001-of-00001.safetensors").write_bytes(b"of a life that was killed")
    path = made.save(lambda: fragments(1), state(1)).path
    assert verify(path) is None
    assert not partial.exists()
    assert not list(path.glob("shard-00009-*"))


def test_the_same_step_saved_again_sets_the_first_aside(tmp_path, comms):
    made = checkpoints(tmp_path, comms)
    for seed in (1, 2, 3):
        made.save(lambda seed=seed: fragments(seed), state(4))
    names = ["step-00000004", "step-00000004.old-1", "step-00000004.old-2"]
    assert sorted(p.name for p in made.folder.iterdir() if p.name != "latest") == names
    for seed, name in zip((3, 1, 2), names, strict=True):
        assert verify(made.folder / name) is None
        live = fragments(0)
        fill(made.folder / name, live)
        assert equal(live, fragments(seed))


def test_an_old_one_that_cannot_be_removed_does_not_spoil_the_new_one(tmp_path, comms, monkeypatch, caplog):
    def stuck(path):
        raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    made = checkpoints(tmp_path, comms, keep_last=1)
    made.save(lambda: fragments(1), state(1))
    monkeypatch.setattr(checkpoint, "_remove", stuck)
    assert made.save(lambda: fragments(2), state(2)).failure is None
    assert "step-00000001: Device or resource busy: an old checkpoint could not be removed" in caplog.text
    assert newest(tmp_path) == folder_of(tmp_path, 2)


def test_what_ends_the_writer_otherwise_is_raised_where_somebody_hears(tmp_path, comms, monkeypatch):
    def broken(*_):
        raise RuntimeError("a peer is gone")

    made = checkpoints(tmp_path, comms)
    monkeypatch.setattr(made, "_publish", broken)
    made.begin(lambda: fragments(1), state(1))
    with pytest.raises(RuntimeError, match="a peer is gone"):
        made.finish()
    assert made.finish() is None


def test_going_back_to_a_step_sets_the_newer_ones_aside(run, comms):
    live = fragments(0)
    made = checkpoints(run, comms)
    assert made.restore(lambda: live, step=2) == (folder_of(run, 2), state(2), IDENTITY)
    assert equal(live, fragments(2))
    assert not folder_of(run, 3).exists()
    assert verify(run / "checkpoints" / "step-00000003.old-1") is None
    assert (run / "checkpoints" / "latest").resolve() == folder_of(run, 2)
    for look in (made.check, lambda step: made.restore(lambda: live, step)):
        with pytest.raises(CheckpointError, match=r"--from 3: no such checkpoint; there are steps 1, 2$"):
            look(3)


def test_only_the_step_that_is_asked_for_has_to_be_of_this_run(run, comms):
    other = checkpoints(run, comms, seed=1)
    other.save(lambda: fragments(4), state(4))
    made = checkpoints(run, comms)
    with pytest.raises(CheckpointError, match="step-00000004: was made with seed = 1"):
        made.check()
    assert made.check(3) is None


def test_a_damaged_step_that_is_asked_for_is_an_error(run, comms):
    damage(run, 2)
    with pytest.raises(CheckpointError, match=r"step-00000002/shard-00001.*; name another step, or none"):
        checkpoints(run, comms).restore(lambda: fragments(0), step=2)
    assert folder_of(run, 3).is_dir()


def test_what_may_change_on_purpose_is_let_through(run, comms):
    made = checkpoints(run, comms, data="d2")
    with pytest.raises(CheckpointError, match="or, if it is meant, say --allow data-change"):
        made.check()
    made.allowed = frozenset(["data"])
    assert made.check() is None
    assert made.restore(lambda: fragments(0)) == (folder_of(run, 3), state(3), IDENTITY)


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
        made.restore(lambda: live)
    assert equal(live, fragments(9))


def test_the_same_run_passes_the_check_and_damage_is_left_to_newest(run, comms):
    made = checkpoints(run, comms)
    assert made.check() is None
    (folder_of(run, 3) / "manifest.json").write_text("{cut")
    assert made.check() is None
    (folder_of(run, 2) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="step-00000001: was made with model = 'm1', this run has 'm3'"):
        checkpoints(run, comms, model="m3").check()
    (folder_of(run, 1) / "manifest.json").write_text('{"step":1}')
    assert checkpoints(run, comms, model="m3").check() is None


@pytest.mark.parametrize("text", ["[]", "7", '{"identity": null}', '{"identity": 3}', '"text"'])
def test_a_check_leaves_odd_manifests_to_newest(run, comms, text):
    for step in (1, 2, 3):
        (folder_of(run, step) / "manifest.json").write_text(text)
    made = checkpoints(run, comms)
    made.check()
    with pytest.raises(CheckpointError, match="none of 3 checkpoints is whole"):
        made.restore(lambda: fragments(0))
