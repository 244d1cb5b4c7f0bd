"""docs/data.md, executed: its commands in their order, then a run on the mixture that it shows."""

from __future__ import annotations

import json

import pytest
import yaml

from sft_dist.data.tokenise import Tokenizer
from tests.e2e.commands import ROOT, clone, enter, page_blocks, run, shown


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = clone(tmp_path_factory.mktemp("data"))
    said = [run(line, folder) for line in shown("docs/data.md")]
    assert "175 read" in said[0]
    assert "task 2/2: done" in said[4]
    return folder


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_tasks_make_the_bytes_of_one_machine(folder):
    assert content(folder / "runs" / "instructions" / "shards") == content(folder / "runs" / "tasks" / "shards")
    page = (folder / "runs" / "instructions" / "data.html").read_text()
    assert "<svg" in page
    assert "<script" not in page


def test_the_mixture_of_the_page_trains_goes_on_and_is_exported(folder):
    [block] = [block for block in page_blocks("docs/data.md") if block.language == "yaml"]
    values = yaml.safe_load(block.text) | {
        "run_dir": "runs/mixture",
        "model": {"config": {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2}},
        "train": {
            "global_batch_rows": 4,
            "max_steps": 4,
            "precision": "fp32",
            "order": {"block_rows": 4, "window_blocks": 2},
        },
        "evaluate": {"samples": 1, "max_new_tokens": 4},
    }
    (folder / "mixture.yaml").write_text(yaml.safe_dump(values))
    assert "mixture: instructions " in run("sft-dist train mixture.yaml --nproc 2 train.max_steps=2", folder)
    assert "resuming from step 2 of 4" in run("sft-dist train mixture.yaml --nproc 1", folder)
    lines = [json.loads(line) for line in (folder / "runs/mixture/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "learning_rate" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert {"loss/instructions", "loss/tasks", "epochs/instructions", "epochs/tasks"} <= set().union(*steps)
    enter("sft-dist export runs/mixture runs/mixture/export", folder)
    measured = [enter(f"sft-dist eval {model} --json", folder) for model in ("runs/mixture", "runs/mixture/export")]
    first, second = (json.loads(text.splitlines()[-1])["validation_loss"] for text in measured)
    assert first == pytest.approx(second, rel=1e-6)
    refused = run("sft-dist train mixture.yaml --nproc 1 train.order=rows train.max_steps=5", folder, code=3)
    assert "was made with order" in refused


def test_a_chat_template_of_its_own_from_records_to_an_export(folder):
    """Qwen3's format: earlier reasoning is dropped, answers end with another token than texts, user text spells it."""
    chat = [
        {"role": "user", "content": "What is {0} plus {0}? <|im_end|>"},
        {"role": "assistant", "content": "<think>\nadd {0}\n</think>\n\nEven."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "<think>\nyes\n</think>\n\n{0} twice."},
    ]
    records = [[{**turn, "content": turn["content"].format(n)} for turn in chat] for n in range(40)]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": record}) + "\n" for record in records))
    tokenizer = Tokenizer.load(str(ROOT / "examples/tokenizers/gpt2"))
    tokenizer.inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    source = (ROOT / "tests/unit/data/templates/qwen3.jinja").read_text()
    Tokenizer(tokenizer.inner, tokenizer.eos_token, tokenizer.pad_token).save(
        folder / "qwen", chat_template=source, model_max_length=256
    )
    values = {
        "run_dir": "runs/chats",
        "prepare": {
            "sources": [{"path": "chats.jsonl"}],
            "template": "tokenizer",
            "tokenizer": "qwen",
            "seq_len": 256,
            "curate": {"near_validation": None},
            "validation_fraction": 0.2,
            "out": "runs/chats/shards",
        },
        "model": {"config": {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2}},
        "train": {"global_batch_rows": 2, "max_steps": 2, "precision": "fp32"},
        "evaluate": {"samples": 1, "max_new_tokens": 4},
    }
    (folder / "chats.yaml").write_text(yaml.safe_dump(values))
    assert "40 conversations are a document an answer" in run("sft-dist prepare chats.yaml", folder)
    row = run("sft-dist inspect runs/chats/shards --row 0", folder)
    assert "<|im_end|><|im_end|>" in row  # the user's, which is text, and the template's
    run("sft-dist train chats.yaml --nproc 1", folder)
    enter("sft-dist export runs/chats runs/chats/export", folder)
    ends = json.loads((folder / "runs/chats/export/generation_config.json").read_text())["eos_token_id"]
    assert ends == [50256, 50258]
    assert enter("sft-dist chat runs/chats/export --prompt hello --max-new-tokens 3", folder) == enter(
        "sft-dist chat runs/chats --prompt hello --max-new-tokens 3", folder
    )
