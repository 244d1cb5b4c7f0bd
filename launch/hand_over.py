"""A run handed over: its export, and a word about what can be done with it."""

from __future__ import annotations

from pathlib import Path

import torch

from sft_dist.export import export


def export_run(run_dir: Path, out: Path, dtype: str | None) -> None:
    """Export, and say what can be done with the result."""
    step = export(run_dir, out, getattr(torch, dtype) if dtype else None)
    print(
        f"exported step {step} to {out}: loaded again with plain transformers, weights and logits equal\n"
        f'  AutoModelForCausalLM.from_pretrained("{out}")   ·   sft-dist eval {out}   ·   sft-dist chat {out} --prompt "…"'
    )
