"""A run handed over: its export, where it goes, and a word about what can be done with it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
import transformers

from sft_dist.errors import ConfigError
from sft_dist.export import export
from sft_dist.hub import Hub
from sft_dist.retention import list_folders

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

_SIZE = re.compile(r"\d+(\.\d+)?[KMGT]B")


def export_run(
    run_dir: Path,
    out: Path,
    dtype: str | None,
    *,
    max_shard_size: str | None = None,
    license: str | None = None,
    push_to: str | None = None,
    is_private: bool = False,
    is_adapter: bool = False,
) -> None:
    """Export, push where that is wanted, and say what can be done with the result. Raises ConfigError for a wrong wish."""
    if max_shard_size is not None and not (_SIZE.fullmatch(max_shard_size) and float(max_shard_size[:-2])):
        raise ConfigError(f"--max-shard-size: {max_shard_size!r} is no size; write for example 5GB or 500MB")
    if is_private and push_to is None:
        raise ConfigError("--private is about the repository of --push-to ORG/NAME; add that, or leave it out")
    if is_adapter and max_shard_size is not None:
        raise ConfigError(
            "--max-shard-size is about files of whole models, and adapters are one small file; leave it out"
        )
    if not torch.cuda.is_available():  # transformers asks DeepSpeed where accelerate is there, and that warns of no GPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    hub = Hub(push_to, is_private) if push_to else None
    if hub is not None and not out.exists() and list_folders(run_dir / "checkpoints"):  # else there is nothing to push
        hub.require_access()
    step = export(
        run_dir,
        out,
        getattr(torch, dtype) if dtype else None,
        max_shard_size=max_shard_size,
        license=license,
        where=push_to,
        is_merged=not is_adapter,
    )
    kind, by, wants = (
        ("the adapters of ", "peft", "") if is_adapter else ("", "plain transformers", f"   ·   vllm serve {out}")
    )
    print(
        f"exported {kind}step {step} to {out}: loaded again with {by}, weights and logits equal\n"
        f'  AutoModelForCausalLM.from_pretrained("{out}")   ·   sft-dist eval {out}   ·   sft-dist chat {out}{wants}\n'
        f"  README.md is its model card, reproduce.yaml the run file that gives the same run again"
    )
    if hub is not None:
        print(f"pushed to {hub.push(out, step)}")
