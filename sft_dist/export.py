"""A checkpoint as an ordinary Hugging Face folder, compared with what it was made from before it is called done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from sft_dist.config import read
from sft_dist.data.records import Turn
from sft_dist.data.tokenise import Tokenizer, prompt_ids
from sft_dist.data.work import template_for
from sft_dist.errors import CheckpointError, ConfigError
from sft_dist.files import publish
from sft_dist.layout import Fragment, whole
from sft_dist.manifest import masters
from sft_dist.schema import RunConfig

ABOUT = "sft_dist.json"  # in an export: which run, step and shards it is from
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Trained:
    """What a whole checkpoint of a run holds, as a plain model."""

    model: PreTrainedModel
    config: RunConfig
    tokenizer: Path
    step: int


def read_run(run_dir: Path, dtype: torch.dtype | None = None) -> Trained:
    """The plain, unsharded model of a run's newest whole checkpoint, or with early stopping of its best one.

    Default dtype: what the run computed in. Raises CheckpointError when the run has no whole checkpoint.
    """
    built: list[PreTrainedModel] = []

    def plain(path: Path) -> Iterable[Fragment]:
        made = AutoConfig.from_pretrained(path / "model", trust_remote_code=False)
        built[:] = [
            AutoModelForCausalLM.from_config(
                made, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
            )
        ]
        return whole(built[0])

    found = masters(run_dir / "checkpoints", plain, is_best=_stops_early(run_dir))
    if found is None:
        raise CheckpointError(f"{run_dir}: no checkpoint there yet; train first, or name another run folder")
    (path, state), (model,) = found, built
    config = read(path / "run.yaml")
    for parameter in model.parameters():  # not model.to(): rotary tables stay fp32, as they do in training
        parameter.data = parameter.data.to(dtype or _DTYPES[config.train.precision])
    return Trained(model.eval(), config, path / "tokenizer", state.step)


def _stops_early(run_dir: Path) -> bool:
    path = run_dir / "run.yaml"
    return path.is_file() and read(path).evaluate.early_stopping is not None


def export(run_dir: Path, out: Path, dtype: torch.dtype | None = None) -> int:
    """Write `out` whole or not at all: safetensors, config, tokenizer, chat template, generation config.

    The staged folder is loaded again with plain transformers and must give the same weights, logits and token ids.
    Returns the step. Raises ConfigError when `out` exists, CheckpointError when the comparison fails.
    """
    if out.exists():
        raise ConfigError(f"{out}: already exists and is kept; choose another folder, or move it away")
    trained = read_run(run_dir, dtype)
    staged = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    shutil.copytree(trained.tokenizer, staged, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(staged, trust_remote_code=False)
    trained.model.config.use_cache = True
    trained.model.config.pad_token_id = tokenizer.pad_token_id
    trained.model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=Tokenizer.load(str(trained.tokenizer)).end_ids,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    trained.model.save_pretrained(staged)
    config = trained.config
    about = {"run_dir": str(run_dir), "step": trained.step, "shards": config.shards_dirs, "sets": config.set_names}
    (staged / ABOUT).write_text(json.dumps(about, indent=2))
    _compare(staged, trained, tokenizer)
    publish(staged, out)
    return trained.step


def _compare(folder: Path, trained: Trained, tokenizer: Any) -> None:
    """Load `folder` as any other tool would, and refuse it unless it equals what was trained."""
    again = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=trained.model.dtype,
        use_safetensors=True,
        trust_remote_code=False,
        attn_implementation="sdpa",
    ).eval()
    mine, theirs = dict(trained.model.named_parameters()), dict(again.named_parameters())
    different = [name for name in mine if name not in theirs or not torch.equal(mine[name], theirs[name])]
    if different or mine.keys() != theirs.keys():
        raise CheckpointError(f"{folder}: weights read back differ ({different[:3]}); the export is not published")
    asked = [{"role": "user", "content": "Hello"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
    own = Tokenizer.load(str(trained.tokenizer))
    spans = template_for("tokenizer", own).render_prompt((Turn("user", "Hello"),), own.eos_token)
    if ids != prompt_ids(spans, own, adds_bos=False):
        raise CheckpointError(
            f"{folder}: its tokenizer gives other ids than training used; the export is not published"
        )
    tokens = torch.tensor([ids])
    with torch.no_grad():
        before, after = trained.model(tokens).logits, again(tokens).logits
    if not torch.equal(before, after):
        raise CheckpointError(
            f"{folder}: logits read back differ by {(before - after).abs().max():.1e}; the export is not published"
        )
