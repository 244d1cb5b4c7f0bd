"""docs/tutorial.md and then README.md, executed in one folder: every command they show, once, with the training cut short."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.e2e.commands import clone, follow, shown

SHORT = "train.max_steps={} evaluate.samples=1 train.global_batch_rows=8 train.micro_batch_rows=1"
# eight ranks go on where the two before them ended, and two of DeepSpeed's where the eight did
STEPS = {"torchrun": 6, "deepspeed": 7}


def shortened(command: str) -> str:
    """A training of a few steps for one of minutes."""
    is_training = command.split()[0] in STEPS or command.startswith("sft-dist train ")
    if not is_training or "--print-config" in command:
        return command
    return f"{command} {SHORT.format(STEPS.get(command.split()[0], 4))}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return clone(tmp_path_factory.mktemp("readme"))


@pytest.fixture(scope="module")
def tutorial(folder):
    return follow("docs/tutorial.md", folder, shortened)


def test_the_page_on_the_report_does_what_it_says(folder, tutorial):
    shutil.copytree(folder / "runs/sms-spam", folder / "runs/other")
    follow("docs/report.md", folder, done=shown("docs/tutorial.md"))
    assert (folder / "both.html").is_file()
    assert list((folder / "runs/sms-spam/figures").glob("*.png"))


def metrics(folder):
    return [json.loads(line) for line in (folder / "runs" / "sms-spam" / "metrics.jsonl").read_text().splitlines()]


def test_the_tutorial_does_what_it_says(folder, tutorial):
    for words in (
        "5,574 read → 4,073 train, 1,058 validation; dropped: 415 duplicate, 28 near_validation",
        "⟦sample 0⟧", "best: zero=ds_configs/", "40.9 an epoch", "completed: 4 of 4 steps", "held-out accuracy", "accuracy 0.",
        "exported step 4", "yes, every byte read", "VERIFIED: all that could be checked is right", "Running a bit late' → ",
    ):  # fmt: skip
        assert words in tutorial, words
    assert (folder / "runs/sms-spam/data.html").is_file()
    measured = [line["validation_loss"] for line in metrics(folder) if "validation_accuracy" in line]
    assert measured[-1] < measured[0]


def test_every_command_of_the_readme_runs(folder, tutorial):
    said = follow("README.md", folder, shortened, done=shown("docs/tutorial.md"))
    for words in (
        "1 accumulated x 8 processes", "resuming from step 4 of 6", "completed: 6 of 6 steps", "resuming from step 6 of 7",
        "completed: 7 of 7 steps", "nothing of it waits or runs that can be seen from here", "kB; open it in a browser",
    ):  # fmt: skip
        assert words in said, words
    assert len([line for line in metrics(folder) if "validation_accuracy" in line]) == 4
    assert {"run.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "verdicts", "export"} <= {
        path.name for path in (folder / "runs" / "sms-spam").iterdir()
    }
