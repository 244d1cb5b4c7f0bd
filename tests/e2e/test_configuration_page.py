"""docs/configuration.md, executed: its commands in their order, and what it says that they print."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest
import yaml

from launch import init
from tests.e2e.commands import ROOT, clone, enter

PAGE = (ROOT / "docs" / "configuration.md").read_text()


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """Command -> what it printed, all in one folder."""
    folder = clone(tmp_path_factory.mktemp("configuration"))
    said = {"folder": folder}
    for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL):
        for line in block.splitlines():
            command, _, file = line.partition("  #")[0].rstrip().partition(" > ")
            said[command] = enter(command, folder)
            if file:
                (folder / file).write_text(said[command])
    return said


def printed(said, beginning):
    [command] = [command for command in said if command.startswith(beginning)]
    return said[command]


def test_the_commands_of_the_page(said):
    assert "fit: all that is necessary works" in printed(said, "sft-dist doctor")
    assert "completed: 3 of 3 steps" in printed(said, "sft-dist train sms.yaml --nproc 1")
    own = next(line for line in printed(said, "sft-dist plan 70b.yaml").splitlines() if line.startswith("→"))
    assert re.match(r"→ zero3 +yes .* fits +2$", own), own
    assert "model: 70,553,706,496 parameters" in printed(said, "sft-dist plan 70b.yaml")
    config = yaml.safe_load(printed(said, "sft-dist train sms.yaml --print-config").split("\nrows:")[0])
    assert config["evaluate"]["prompts"] == ["hello", "WINNER"]
    jsonschema.validate(config, json.loads((said["folder"] / "run.schema.json").read_text()))


def test_what_the_page_says_that_is_printed(said):
    shown = [
        re.sub(r"^    ", "", block, flags=re.MULTILINE).rstrip()
        for block in re.findall(r"(?:^    .*\n|^\n(?=    ))+", PAGE, flags=re.MULTILINE)
    ]
    everything = "\n".join(text for command, text in said.items() if command != "folder")
    assert len(shown) == 3
    for block in shown[:2]:
        assert block.strip() in everything, block
    assert shown[2].strip() == "# yaml-language-server: $schema=run.schema.json"


def test_the_table_of_presets_is_whole():
    [rows] = re.findall(r"\| preset \|.*?\n\n", PAGE, flags=re.DOTALL)
    assert sorted(re.findall(r"`([\w-]+)`", rows)) == sorted(init.presets())
