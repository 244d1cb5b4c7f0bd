"""A checkpoint as an ordinary Hugging Face folder, compared with what it was made from before it is called done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from sft_dist.answers import way_of
from sft_dist.card import CARD, model_card
from sft_dist.config import read
from sft_dist.data.build import without_licences
from sft_dist.data.records import Turn
from sft_dist.data.tokenise import Tokenizer, prompt_ids
from sft_dist.data.work import template_for
from sft_dist.errors import CheckpointError, ConfigError
from sft_dist.files import publish
from sft_dist.layout import Fragment, whole
from sft_dist.manifest import masters
from sft_dist.reproduce import RECIPE, caveats_of, recipe, weights_digest
from sft_dist.schema import RunConfig
from sft_dist.state import TrainState

ABOUT = "sft_dist.json"  # in an export: which run, step and shards it is from, and how it is asked
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Trained:
    """What the whole checkpoint at `path` holds, as a plain model; `weights` is the digest of its fp32 weights."""

    model: PreTrainedModel
    config: RunConfig
    path: Path
    state: TrainState
    weights: str

    @property
    def tokenizer(self) -> Path:
        """The folder of its tokenizer."""
        return self.path / "tokenizer"


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
    config, weights = read(path / "run.yaml"), weights_digest(model.named_parameters())
    for parameter in model.parameters():  # not model.to(): rotary tables stay fp32, as they do in training
        parameter.data = parameter.data.to(dtype or _DTYPES[config.train.precision])
    return Trained(model.eval(), config, path, state, weights)


def _stops_early(run_dir: Path) -> bool:
    path = run_dir / "run.yaml"
    return path.is_file() and read(path).evaluate.early_stopping is not None


def export(
    run_dir: Path,
    out: Path,
    dtype: torch.dtype | None = None,
    *,
    max_shard_size: str | None = None,
    license: str | None = None,
    where: str | None = None,
) -> int:
    """Write `out` whole or not at all: safetensors, config, tokenizer with chat template, generation config, card, recipe.

    The staged folder is loaded again with plain transformers and must give the same weights, logits and token ids.
    `max_shard_size`: of a file of weights, as `5GB`; default: transformers' own. `where`: what the card calls the model.
    Returns the step. Raises ConfigError when `out` exists, or cannot hold the weights in `dtype`, CheckpointError when it
    cannot be written or the comparison fails: then nothing is left of it.
    """
    if out.exists():
        raise ConfigError(f"{out}: already exists and is kept; choose another folder, or move it away")
    staged = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)  # of one that was killed
    trained = read_run(run_dir, dtype)
    _require_finite(trained.model)
    try:
        staged.mkdir(parents=True)
        tokenizer = _write_model(staged, trained, max_shard_size)
        _write_about(staged, run_dir, trained, license, where or f"./{out.name}")
        _compare(staged, trained, tokenizer)
        publish(staged, out)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{out}: cannot be written ({str(error).splitlines()[0]}); nothing is left of it. Make room, or choose another folder"
        ) from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return trained.state.step


def _require_finite(model: PreTrainedModel) -> None:
    """A weight beyond the range of fp16 would become infinite. Raises ConfigError."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ConfigError(
                f"--dtype: {name} has weights that {str(parameter.dtype)[6:]} cannot hold; take bfloat16 or float32"
            )


def _write_model(staged: Path, trained: Trained, max_shard_size: str | None) -> Any:
    """All that plain transformers reads; returns the tokenizer as it reads it."""
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
    trained.model.save_pretrained(staged, **({"max_shard_size": max_shard_size} if max_shard_size else {}))
    for file in staged.glob("*.safetensors"):  # which are written for their owner alone, whatever the umask
        file.chmod((staged / "config.json").stat().st_mode)
    return tokenizer


def _write_about(staged: Path, run_dir: Path, trained: Trained, license: str | None, where: str) -> None:
    """All that tells where it is from: for this program, for people, and to have it again."""
    config, state = _as_licensed(trained.config, run_dir, license), trained.state
    way = way_of(config, Tokenizer.load(str(trained.tokenizer)))
    about = {"run_dir": str(run_dir), "step": state.step, "shards": config.shards_dirs, "sets": config.set_names}
    (staged / ABOUT).write_text(json.dumps(about | {"asked": way}, indent=2))
    caveats = list(caveats_of(run_dir, state))
    (staged / RECIPE).write_text(recipe(run_dir, trained.path, config, state, trained.weights, caveats))
    card = model_card(run_dir, trained.path, config, state, trained.model, way=way, where=where, caveats=caveats)
    (staged / CARD).write_text(card)


def _as_licensed(config: RunConfig, run_dir: Path, license: str | None) -> RunConfig:
    """With the licences that the run file has got since the checkpoint, where nothing else of it has changed."""
    path = run_dir / "run.yaml"
    now = read(path) if path.is_file() else config
    if without_licences(now.model_dump(mode="json")) == without_licences(config.model_dump(mode="json")):
        config = now
    return (
        config.model_copy(update={"model": config.model.model_copy(update={"license": license})}) if license else config
    )


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
