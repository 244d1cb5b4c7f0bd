"""Copies on a node's own disk: of shards, and of an environment that is made up here."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from launch import stage
from sft_dist.data.records import Document
from sft_dist.data.shards import Shards, write
from sft_dist.errors import DataError

ABOUT = {"vocab_size": 10, "eos_id": 0, "pad_id": 0, "tokenizer": "t", "template": "p"}


@pytest.fixture
def prepared(tmp_path):
    document = Document(np.array([5, 6, 7], np.uint32), np.array([False, False, True]), "a:1")
    write(tmp_path / "shards" / "train", [[document]], seq_len=8, rows_per_shard=4, **ABOUT)
    (tmp_path / "shards" / "prepare.json").write_text("{}")
    return tmp_path / "shards"


def test_shards_are_copied_once_and_found(prepared, tmp_path):
    local = tmp_path / "local"
    assert stage.copy_of(prepared, local) == prepared
    copy = stage.shards(prepared, local)
    assert stage.copy_of(prepared, local) == copy
    assert (copy / "prepare.json").read_text() == "{}"
    assert Shards.open(copy / "train").num_rows == 1
    before = os.stat(copy)
    assert stage.shards(prepared, local) == copy
    assert os.stat(copy).st_mtime_ns == before.st_mtime_ns
    assert [path.name for path in local.iterdir()] == [copy.name]
    assert stage.copy_of(prepared, None) == prepared


def test_other_shards_in_the_same_folder_are_copied_anew(prepared, tmp_path):
    first = stage.shards(prepared, tmp_path / "local")
    document = Document(np.array([5, 6, 8], np.uint32), np.array([False, False, True]), "a:1")
    shutil.rmtree(prepared / "train")
    write(prepared / "train", [[document]], seq_len=8, rows_per_shard=4, **ABOUT)
    assert stage.shards(prepared, tmp_path / "local") != first


def test_damaged_shards_are_no_copy(prepared, tmp_path):
    path = next((prepared / "train").glob("*.rows"))
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="rows"):
        stage.shards(prepared, tmp_path / "local")
    assert list((tmp_path / "local").iterdir()) == []


def test_what_a_killed_one_left_is_swept(prepared, tmp_path):
    local = tmp_path / "local"
    copy = stage.shards(prepared, local)
    copy.rename(local / f".{copy.name}-999999999.partial")
    assert stage.shards(prepared, local) == copy
    assert [path.name for path in local.iterdir()] == [copy.name]


def test_no_room_is_told_with_the_numbers(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(stage.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(DataError, match=r"0.00 GB are free, and a copy of .*shards takes"):
        stage.shards(prepared, tmp_path / "local")


def test_a_folder_that_does_not_take_it_is_named(prepared, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(stage.shutil, "copytree", refuse)
    with pytest.raises(DataError, match="Permission denied; the folder it was to be copied to has to take it"):
        stage.shards(prepared, tmp_path / "local")


@pytest.fixture
def prefix(tmp_path):
    """An environment with one package, whose RECORD tells the truth."""
    made = tmp_path / "venv"
    packages = made / "lib" / "python3.12" / "site-packages"
    (packages / "a-1.dist-info").mkdir(parents=True)
    (made / "bin").mkdir()
    (made / "bin" / "python").symlink_to("/usr/bin/env")
    (made / "pyvenv.cfg").write_text("home = /usr/bin\n")
    (packages / "a.py").write_text("x = 1\n")
    digest = base64.urlsafe_b64encode(hashlib.sha256(b"x = 1\n").digest()).rstrip(b"=").decode()
    (packages / "a-1.dist-info" / "RECORD").write_text(f"a.py,sha256={digest},6\na-1.dist-info/RECORD,,\n")
    return made


def test_an_environment_is_copied_and_its_programs_are_found(prefix, tmp_path):
    made = stage.environment(tmp_path / "local", prefix)
    assert made == stage.where(tmp_path / "local", prefix)
    assert (made / "python").is_symlink()
    assert (made.parent / "lib" / "python3.12" / "site-packages" / "a.py").read_text() == "x = 1\n"


def test_a_file_that_is_not_what_was_installed_is_no_copy(prefix, tmp_path):
    (prefix / "lib" / "python3.12" / "site-packages" / "a.py").write_text("x = 2\n")
    with pytest.raises(DataError, match=r"a\.py: not what a-1\.dist-info recorded"):
        stage.environment(tmp_path / "local", prefix)


def test_the_python_of_the_system_is_not_copied(tmp_path):
    with pytest.raises(DataError, match="no environment of its own that could be copied"):
        stage.environment(tmp_path / "local", Path("/usr"))


def test_the_program_tells_what_it_could_not_copy_and_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert stage.main([str(tmp_path / "local"), "nowhere.yaml"]) == 0
    assert "warning: no copy: nowhere.yaml" in capsys.readouterr().err
    for words in (["--environment", str(tmp_path / "local")], [str(tmp_path / "local"), "--environment"]):
        assert stage.main([*words, "nowhere.yaml", "train.seed=1"]) == 0  # wherever the option stands
    capsys.readouterr()
    with pytest.raises(SystemExit):
        stage.main([str(tmp_path / "local")])
    assert "which run file?" in capsys.readouterr().err
    assert stage.main([str(tmp_path / "local"), "--where"]) == 0
    assert capsys.readouterr().out.startswith(str(tmp_path / "local"))
