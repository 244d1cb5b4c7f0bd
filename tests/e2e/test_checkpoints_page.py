"""docs/checkpoints.md, executed: its ways to go on in their order, the tools, and what they say of damage."""

from __future__ import annotations

import re

import pytest
import yaml

from sft_dist.retention import list_folders
from tests.e2e.commands import ROOT, blocks_of, clone, enter, run
from tests.invariants import runs

PAGE = (ROOT / "docs" / "checkpoints.md").read_text()
# What a line of the page is run with, so that there is something left to do, and what it then says.
MORE = {
    "--from": ("train.max_steps=6", "resuming from step 4 of 6"),
    "--skip-rows": ("train.max_steps=20", "skipped: rows 48 to 111 of the stream are left out"),
    "--reset-data": ("train.max_steps=3", "reset: the stream of rows begins again, 160 rows after its beginning"),
    "--allow": ("train.max_steps=4 train.global_batch_rows=16", "allowed: global_batch_rows was 8 and is 16 now"),
}


def lines(heading: str) -> list[str]:
    """The commands of a section's bash block, without their comments."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    (block,) = [block for block in blocks_of(section) if block.language == "bash"]
    return block.commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = clone(tmp_path_factory.mktemp("checkpoints"))
    runs.run_file(folder)
    return folder


def test_every_way_to_go_on_does_what_the_page_says_and_is_certified(folder):
    (kept,) = re.findall(r"`(checkpoint: \{.*?\})`", PAGE)
    values = yaml.safe_load((folder / "run.yaml").read_text()) | yaml.safe_load(kept)
    values["checkpoint"] |= {"every_steps": 2, "keep_every_steps": 4}
    values["evaluate"] |= {"every_steps": 2}
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    run("sft-dist prepare run.yaml", folder)
    run("sft-dist train run.yaml --nproc 2 train.max_steps=6", folder)
    for line in lines("On purpose"):
        option = line.split()[3]
        more, words = MORE[option]
        command = line.replace("RUN.yaml", f"run.yaml {more}").replace("--from 800", "--from 4")
        assert words in run(command, folder), option
    certificate = enter("sft-dist verify run", folder)
    assert "VERIFIED" in certificate
    for words in ("skipped: rows", "reset: the stream", "allowed: global_batch_rows"):
        assert words in certificate, certificate


def test_the_list_tells_best_layout_and_damage_and_ends_with_3_then(folder):
    said = enter("sft-dist checkpoints run --verify", folder)
    assert "yes, every byte read" in said
    assert "* best validation" in said
    assert "ZeRO 1 x 1" in said or "ZeRO 2 x 1" in said or "ZeRO 3 x 1" in said, said
    newest = list_folders(folder / "run" / "checkpoints")[-1]
    (shard,) = newest.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    said = enter("sft-dist checkpoints run --verify", folder, code=3)
    assert f"NO: {shard.relative_to(folder)}: bytes" in said
    assert "WRONG" in enter("sft-dist verify run", folder, code=3)


@pytest.mark.parametrize("command", ["verify", "checkpoints"])
def test_a_folder_without_checkpoints_is_told(folder, command):
    said = enter(f"sft-dist {command} elsewhere", folder, code=3)
    assert "elsewhere: no checkpoint there" in said


def test_what_is_no_checkpoint_of_another_trainer_is_refused(folder):
    line = lines("Moving in from DeepSpeed or the Hugging Face Trainer")[0]
    assert line.split()[:2] == ["sft-dist", "import"]
    said = enter(f"sft-dist import elsewhere {folder / 'run.yaml'} run_dir=moved", folder, code=3)
    assert "elsewhere" in said
