import os

import pytest
import torch

from sft_dist.errors import CheckpointError
from sft_dist.files import digest_of_block
from sft_dist.layout import whole
from sft_dist.manifest import read_state, verify
from tests.unit.saved_runs import files_of, fill, folder_of, forge, fragments, newest, resealed


def test_masters_fill_a_plain_module(saved):
    module = torch.nn.Linear(4, 3)
    fill(folder_of(saved, 2), whole(module))
    weight, bias = fragments(2)
    assert torch.equal(module.weight, weight.values["master"].view(3, 4))
    assert torch.equal(module.bias, bias.values["master"])


def test_the_newest_whole_checkpoint_is_found(saved):
    assert newest(saved) == folder_of(saved, 3)


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
        ("{}", "manifest.json: KeyError: 'digest'"),
        ("[]", "manifest.json: TypeError: "),
        ("\0", "manifest.json: JSONDecodeError: "),
        ('{"files":[],"format_version":2}', "manifest.json: KeyError: 'digest'"),
        (
            '{"files": {}, "digest": "0"}',
            "manifest.json: ValueError: its bytes are not the ones that were written",
        ),
        ("[" * 100_000, "manifest.json: RecursionError"),
    ],
)
def test_a_manifest_that_is_none_is_told(run, text, message):
    path = folder_of(run, 2)
    (path / "manifest.json").write_text(text)
    assert verify(path).startswith(str(path))
    assert message in verify(path)


SHARD = "shard-00001.safetensors"
ENTRY = {"bytes": 2, "blocks": ["0" * 32]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (forge("files", "../outside", ENTRY), "'../outside' is not a file of this folder"),
        (forge("files", "/etc/passwd", ENTRY), "'/etc/passwd' is not a file of this folder"),
        (forge("files", "", ENTRY), "'' is not a file of this folder"),
        (forge("files", "a//b", ENTRY), "'a//b' is not a file of this folder"),
        (forge("files", SHARD, "bytes", 1 << 60), "bytes in 1 blocks"),
        (forge("files", SHARD, "bytes", -1), "-1 bytes in 1 blocks"),
        (forge("files", SHARD, "bytes", "9"), "'9' bytes in 1 blocks"),
        (forge("block_bytes", 1 << 50), "blocks of 1125899906842624 bytes; this program reads 1048576"),
        (forge("tensors", "shards", SHARD, "begin", 2), "values begin at 2"),
        (forge("tensors", "shards", SHARD, "begin", 0), "its runs end at byte"),
        (forge("tensors", "parameters", 0, ["weight", 1 << 60, ["master"]]), "its runs end at byte"),
        (forge("tensors", "parameters", 0, ["weight", -1, ["master"]]), "parameter 'weight': -1 elements"),
        (forge("tensors", "parameters", 0, ["weight", 12, ["other"]]), "parameter 'weight': 12 elements of"),
        (forge("tensors", "shards", SHARD, "runs", 0, [7, 0, 12]), "run 7, 0, 12"),
        (forge("tensors", "shards", SHARD, "runs", 0, [0, -1, 12]), "run 0, -1, 12"),
        (forge("tensors", "shards", SHARD, "runs", 0, [0, 1, 12]), "weight: element 0 is missing or there twice"),
        (
            forge("tensors", "parameters", 0, ["weight", 13, ["master", "exp_avg", "exp_avg_sq"]]),
            "weight: 12 of 13 elements",
        ),
        (forge("tensors", "shards", "shard-9", {"begin": 0, "runs": []}), "shard-9: its runs end at byte 0"),
        (forge("identity", None), "manifest.json: TypeError"),
    ],
)
def test_a_forged_manifest_is_refused_before_its_sizes_are_used(run, change, message):
    path = folder_of(run, 2)
    resealed(path, lambda manifest: None)
    assert verify(path) is None
    resealed(path, change)
    assert message in verify(path)


def test_a_file_that_is_a_link_out_of_the_folder_is_not_followed(run):
    state_file = folder_of(run, 2) / "state.json"
    state_file.rename(run / "elsewhere")
    state_file.symlink_to(run / "elsewhere")
    assert verify(folder_of(run, 2)) == f"{state_file}: Too many levels of symbolic links"


def test_a_folder_that_is_a_link_is_not_followed(run):
    inner = folder_of(run, 2) / "model"
    inner.rename(run / "elsewhere")
    inner.symlink_to(run / "elsewhere")
    assert verify(folder_of(run, 2)).endswith("manifest.json: ValueError: model is a link, which no save makes")


def test_a_pipe_or_a_folder_in_the_place_of_a_file_is_not_waited_for(run):
    for number, make in ((2, os.mkfifo), (3, os.mkdir)):
        (file,) = folder_of(run, number).glob("*.safetensors")
        file.unlink()
        make(file)
        assert verify(folder_of(run, number)) == f"{file}: not a regular file"


def test_a_manifest_larger_than_any_is_not_read(run):
    file = folder_of(run, 2) / "manifest.json"
    os.truncate(file, (1 << 31) + 1)  # sparse: it takes no room
    assert verify(folder_of(run, 2)).endswith("ValueError: 2,147,483,649 bytes, more than any manifest has")


def test_a_state_of_other_keys_is_told(run):
    path = folder_of(run, 2)
    (path / "state.json").write_text('{"steps": 2}')

    def change(manifest):
        manifest["files"]["state.json"] = {"bytes": 12, "blocks": [digest_of_block(b'{"steps": 2}')]}

    resealed(path, change)
    with pytest.raises(
        CheckpointError, match=r"state\.json: holds 'steps', which this version of sft-dist does not know"
    ):
        read_state(path)
