"""The README, executed: every command it shows, in its order, with the training cut short."""

from __future__ import annotations

import json
import re

import pytest

from tests.e2e.commands import ROOT, clone, run

SHORT = "train.max_steps=4 evaluate.samples=1 train.global_batch_rows=8 train.micro_batch_rows=1"
# Shown, and why they are not run here.
ELSEWHERE = {
    "source": "changes a shell; the tests run in that environment already",
    "make quickstart": "by .ci/run",
    "make test": "this is it",
    "sft-dist submit": "by tests/slurm, on a cluster",
    "sft-dist stop": "by tests/slurm, on a cluster",
    "tensorboard": "a server that does not end",
}


def commands() -> list[str]:
    """The lines of the README's bash blocks without their comments."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    lines = [line.partition("   #")[0].rstrip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return clone(tmp_path_factory.mktemp("readme"))


def test_every_command_of_the_readme_runs(folder):
    shown = commands()
    outputs = {}
    for command in shown:
        if command.startswith(tuple(ELSEWHERE)):
            continue
        is_training = (
            "train" in command.split("runs/")[0] and "--print-config" not in command and "prepare" not in command
        )
        # eight ranks go on where the two before them ended, and two of DeepSpeed's where the eight did
        steps = {"torchrun": 6, "deepspeed": 7}.get(command.split()[0], 4)
        more = f"{SHORT} train.max_steps={steps}"
        outputs[command] = run(f"{command} {more}" if is_training else command, folder)
    said = "\n".join(outputs.values())
    for words in (
        "5,574 read → 4,073 train, 1,058 validation; dropped: 415 duplicate, 28 near_validation",
        "tokens a row", "⟦sample 0⟧", "best: zero=ds_configs/", "40.9 an epoch", "held-out accuracy", "kB; open it in a browser", "accuracy 0.", "exported step 4", "yes, every byte read", "VERIFIED: all that could be checked is right",
        "completed: 4 of 4 steps", "nothing of it waits or runs that can be seen from here", "1 accumulated x 8 processes", "resuming from step 4 of 6", "completed: 6 of 6 steps", "resuming from step 6 of 7", "completed: 7 of 7 steps",
    ):  # fmt: skip
        assert words in said, words
    assert len(outputs) == 17
    measured = [json.loads(line)["validation_loss"] for line in metrics(folder) if "validation_accuracy" in line]
    assert measured[-1] < measured[0]
    assert len(measured) == 4
    assert {"run.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "verdicts", "export"} <= {
        path.name for path in (folder / "runs" / "sms-spam").iterdir()
    }


def metrics(folder):
    return (folder / "runs" / "sms-spam" / "metrics.jsonl").read_text().splitlines()
