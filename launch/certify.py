"""What is kept of a run, and what can be proved of it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from launch.settle import order_of, rows_of
from sft_dist import adapter
from sft_dist import verify as proof
from sft_dist.config import read
from sft_dist.data.mixture import BLOCK
from sft_dist.errors import CheckpointError
from sft_dist.export import ABOUT, merged_weights
from sft_dist.manifest import masters, read_manifest, read_state, verify
from sft_dist.retention import list_folders
from sft_dist.state import TrainState

transformers.logging.disable_progress_bar()


def verify_run(run_dir: Path) -> proof.Certificate:
    """What can be proved of a run; see `sft_dist.verify`. Raises CheckpointError when no checkpoint is whole."""
    folder = run_dir / "checkpoints"
    found = masters(folder, lambda path: ())
    if found is None:
        raise CheckpointError(f"{run_dir}: no checkpoint there yet; train first, or name another run folder")
    path, state = found
    config = read(path / "run.yaml")
    shards, mixture = rows_of(config)
    order = order_of(config, shards, mixture)
    checks = [
        *proof.checkpoints(folder),
        *proof.fed(
            state,
            shards,
            order,
            config.train.seed,
            mixture.names if mixture else ("rows",),
            BLOCK if mixture and len(mixture.names) > 1 else None,
        ),
    ]
    checks += [
        proof.Check("past", None, f"rows {left.begin:,} to {left.end - 1:,} of another stream: {left.ledger.text}")
        for left in state.past
    ]
    out = run_dir / "export"
    if (out / ABOUT).is_file():
        step = json.loads((out / ABOUT).read_text())["step"]
        if (out / adapter.FILE).is_file():
            checks.append(proof.export(out, step, None, folder, _as_saved))
        else:
            dtype = getattr(torch, json.loads((out / "config.json").read_text())["dtype"])
            merged = (merged_weights, ", merged into their base") if config.model.lora else ()
            checks.append(proof.export(out, step, dtype, folder, *merged))
    if config.reproduces is not None:
        checks += proof.reproduced(config.reproduces, folder)
    checks += [proof.Check("by hand", True, note) for note in state.notes]
    verdicts = [json.loads(file.read_text())["reason"] for file in sorted((run_dir / "verdicts").glob("*.json"))]
    told = ", ".join(f"{verdicts.count(reason)} {reason}" for reason in sorted(set(verdicts)))
    checks.append(proof.Check("lives", True, f"{told or 'no verdict'} (one that was killed leaves none)"))
    return proof.Certificate(f"{run_dir} at step {state.step}", tuple(checks))


def _as_saved(path: Path) -> dict[str, torch.Tensor]:
    return {adapter.saved_name(name): values for name, values in proof.masters_of(path).items()}


def list_checkpoints(run_dir: Path, *, is_read: bool) -> tuple[str, bool]:
    """A table for a person, oldest first; and whether all of them are whole."""
    rows: list[tuple[Path, dict[str, Any] | None, TrainState | None, str | None]] = []
    for path in list_folders(run_dir / "checkpoints"):
        try:
            about = read_manifest(path)
            found, damage = read_state(path, about), verify(path) if is_read else None
        except CheckpointError as error:
            rows.append((path, None, None, str(error)))
        else:
            rows.append((path, about, found, damage))
    if not rows:
        raise CheckpointError(f"{run_dir}: no checkpoint there; train first, or name another run folder")
    scores = [state.score_here for _, _, state, _ in rows if state and state.score_here is not None]
    lines = [f"{'step':>10}{'size':>12}  {'written at':22}{'validation':>11}  {'age':>8}  whole?"]
    for path, manifest, state, damage in rows:
        if manifest is None or state is None:
            lines.append(f"{int(path.name[5:]):>10}{'':51}  NO: {damage}")
            continue
        size = sum(entry["bytes"] for entry in manifest["files"].values())
        layout = f"ZeRO {manifest['zero_stage']} x {manifest['world_size']}"
        score = state.score_here
        told = "" if score is None else f"{abs(score):.4f}" + "*" * (score == min(scores))
        whole = f"NO: {damage}" if damage else "yes, every byte read" if is_read else "yes, by its manifest"
        lines.append(
            f"{state.step:>10}{_size(size):>12}  {layout:22}{told:>11}  {_age(manifest['saved_at']):>8}  {whole}"
        )
    is_whole = not any(damage for *_, damage in rows)
    return "\n".join([*lines, "* best validation" if scores else ""]).rstrip(), is_whole


def _size(num_bytes: int) -> str:
    """Bytes for a person.

    >>> _size(12_345_678)
    '12.3 MB'
    """
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _age(saved_at: float) -> str:
    """Seconds, minutes, hours or days since then."""
    seconds = max(0.0, time.time() - saved_at)
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
