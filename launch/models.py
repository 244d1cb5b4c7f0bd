"""Which model is meant: a run, an export or an id of the Hugging Face hub, opened as a plain model."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from sft_dist import evaluate as measure
from sft_dist.errors import ConfigError
from sft_dist.export import ABOUT, read_run
from sft_dist.kernels import TRUTH

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def device() -> torch.device:
    """Where a model is asked: on the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def is_run(model: str) -> bool:
    """Whether that is the folder of a run."""
    return (Path(model) / "run.yaml").is_file()


def opened(model: str) -> tuple[Any, str, dict[str, str]]:
    """(plain model, tokenizer folder or id, the run's folders of shards by the names of its sets) of a run, an export or a hub id."""
    if is_run(model):
        trained = read_run(Path(model))
        sets = dict(zip(trained.config.set_names, trained.config.shards_dirs, strict=True))
        return trained.model, str(trained.tokenizer), sets
    _require_no_slip(Path(model))
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            model, use_safetensors=True, trust_remote_code=False, attn_implementation=TRUTH
        ).eval()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{model}: neither a run folder nor a model ({str(error).splitlines()[0]}). Name a run_dir, an export, or a "
            "Hugging Face id"
        ) from None
    about = Path(model) / ABOUT
    known = json.loads(about.read_text()) if about.is_file() else {"shards": []}
    folders = [known["shards"]] if isinstance(known["shards"], str) else known["shards"]
    names = known.get("sets") or (measure.file_names(folders) if folders else [])
    return loaded, model, dict(zip(names, folders, strict=True))


def _require_no_slip(model: Path) -> None:
    """A run's name that is misspelt looks like an id of the hub, which need not hear of it. Raises ConfigError."""
    if model.exists() or model.parent == Path("."):
        return
    runs = [path.parent.name for path in sorted(model.parent.glob("*/run.yaml"))]
    if runs:
        near = difflib.get_close_matches(model.name, runs, n=1)
        hint = (
            f"did you mean {model.parent / near[0]}?" if near else f"of {model.parent} there are {', '.join(runs[:10])}"
        )
        raise ConfigError(
            f"{model}: neither a run folder nor a model ({hint}). Name a run_dir, an export, or a Hugging Face id"
        )
