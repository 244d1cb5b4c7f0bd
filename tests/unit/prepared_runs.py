"""A run file and its shards, as a user would have them; prepared through the command line."""

from __future__ import annotations

from pathlib import Path

import yaml
from click.testing import CliRunner

from launch.cli import main


def records(path, count=300):
    lines = (f"{('ham', 'spam')[n % 2]}\tmessage {n} of {n % 7} words, number {n * n}\n" for n in range(count))
    path.write_text("".join(lines))
    return path


def run_file(folder, shards, source, **more):
    """A run file with dotted keys changed."""
    values = {
        "run_dir": str(folder / "run"),
        "prepare": {
            "sources": [{"path": str(source), "schema": "label", "delimiter": "\t", "text": 1, "label": 0}],
            "template": "Spam?\n{text}\nAnswer:",
            "tokenizer": {"sentencepiece": {"vocab_size": 320}},
            "seq_len": 64,
            "validation_fraction": 0.2,
            "out": str(shards),
        },
        "model": {"config": {"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 1}},
        "train": {"global_batch_rows": 4, "epochs": 2, "precision": "fp32"},
    }
    for key, value in more.items():
        section, name = key.split("__")
        values[section][name] = value
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def sft_dist(*arguments):
    """The console script, in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def prepare(folder: Path) -> Path:
    """Shards in `folder / "out"` of the records in `folder / "sms"`."""
    result = sft_dist("prepare", run_file(folder, folder / "out", records(folder / "sms")))
    assert result.exit_code == 0, result.output
    assert f"{folder / 'out'}: prepared\n  records: 300 read → " in result.stdout
    return folder
