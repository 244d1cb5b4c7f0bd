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

from sft_dist import adapter
from sft_dist.answers import way_of
from sft_dist.card import CARD, model_card
from sft_dist.config import read
from sft_dist.data.build import without_licences
from sft_dist.data.records import Turn
from sft_dist.data.tokenise import Tokenizer, prompt_ids
from sft_dist.data.work import template_for
from sft_dist.errors import CheckpointError, ConfigError, OtherCheckpointError
from sft_dist.files import publish
from sft_dist.kernels import TRUTH
from sft_dist.layout import Fragment, kept, whole
from sft_dist.manifest import masters, read_manifest
from sft_dist.model import build
from sft_dist.reproduce import RECIPE, caveats_of, recipe, weights_digest
from sft_dist.schema import RunConfig
from sft_dist.state import TrainState
from sft_dist.store import Reader

ABOUT = "sft_dist.json"  # in an export: which run, step and shards it is from, and how it is asked
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Trained:
    """What the whole checkpoint at `path` holds, as a plain model; `weights` is the digest of the fp32 weights that it holds."""

    model: PreTrainedModel
    config: RunConfig
    path: Path
    state: TrainState
    weights: str

    @property
    def tokenizer(self) -> Path:
        """The folder of its tokenizer."""
        return self.path / "tokenizer"


def read_run(run_dir: Path, dtype: torch.dtype | None = None, *, is_merged: bool = True) -> Trained:
    """The plain, unsharded model of a run's newest whole checkpoint, or with early stopping of its best one.

    Adapters are merged into their base, or left beside it where that `is_merged` not. Default dtype: what the run computed in.
    Raises CheckpointError when the run has no whole checkpoint, or its base is not there any more.
    """
    built: list[PreTrainedModel] = []

    def plain(path: Path) -> Iterable[Fragment]:
        built[:] = [unfilled(path)]
        return whole(built[0])

    found = masters(run_dir / "checkpoints", plain, is_best=_stops_early(run_dir))
    if found is None:
        raise CheckpointError(f"{run_dir}: no checkpoint there yet; train first, or name another run folder")
    (path, state), (model,) = found, built
    config, weights = read(path / "run.yaml"), weights_digest(kept(model))
    if config.model.lora is not None and is_merged:
        adapter.merge(model)
    for parameter in model.parameters():  # not model.to(): rotary tables stay fp32, as they do in training
        if parameter.is_floating_point():  # in nf4 it is bytes
            parameter.data = parameter.data.to(dtype or _DTYPES[config.train.precision])
    return Trained(model.eval(), config, path, state, weights)


def unfilled(path: Path) -> PreTrainedModel:
    """The model of the checkpoint at `path`, to be filled with what that holds; what adapters stand on is read where it was.

    Raises CheckpointError where the base is not the one that was trained beside.
    """
    made = AutoConfig.from_pretrained(path / "model", trust_remote_code=False)
    wanted = read(path / "run.yaml").model
    if wanted.lora is None:
        return AutoModelForCausalLM.from_config(
            made, dtype=torch.float32, attn_implementation=TRUTH, trust_remote_code=False
        )
    model = build(wanted, made, seed=0, gradient_checkpointing=False)
    if adapter.base_digest(model) != read_manifest(path)["identity"]["base"]:
        raise OtherCheckpointError(
            f"{path}: its adapters were trained beside other weights than {wanted.name_or_path} holds now; put those back there "
            "that the run began with"
        )
    return model


def merged_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights that adapters give with their base, fp32 and flat, by name; of the checkpoint at `path`.

    Raises CheckpointError or ModelError where the base is not there.
    """
    model = unfilled(path)
    Reader(path, read_manifest(path)).fill(whole(model))
    adapter.merge(model)
    return {name: parameter.detach().reshape(-1) for name, parameter in model.named_parameters()}


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
    is_merged: bool = True,
) -> int:
    """Write `out` whole or not at all: safetensors, config, tokenizer with chat template, generation config, card, recipe.

    The staged folder is loaded again with plain transformers and must give the same weights, logits and token ids.
    Of a run with adapters it is the model that they are merged into, or where that `is_merged` not a folder of adapters alone,
    in fp32 by default, which is loaded again by peft.
    `max_shard_size`: of a file of weights, as `5GB`; default: transformers' own. `where`: what the card calls the model.
    Returns the step. Raises ConfigError when `out` exists, or cannot hold the weights in `dtype`, CheckpointError when it
    cannot be written or the comparison fails: then nothing is left of it.
    """
    if out.exists():
        raise ConfigError(f"{out}: already exists and is kept; choose another folder, or move it away")
    staged = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)  # of one that was killed
    trained = read_run(run_dir, dtype or (None if is_merged else torch.float32), is_merged=is_merged)
    if not is_merged and trained.config.model.lora is None:
        raise ConfigError(
            f"--adapter: {run_dir} trained the whole model, it has no adapters (model.lora); leave it out"
        )
    _require_finite(trained.model)
    try:
        staged.mkdir(parents=True)
        tokenizer = _write_tokenizer(staged, trained)
        if is_merged:
            _write_model(staged, trained, tokenizer, max_shard_size)
        else:
            adapter.save(trained.model, staged, str(trained.config.model.name_or_path))
        _write_about(staged, run_dir, trained, license, where or f"./{out.name}")
        _compare(_opened(staged, trained, is_merged), staged, trained, tokenizer)
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


def _write_tokenizer(staged: Path, trained: Trained) -> Any:
    """Returns it as plain transformers reads it."""
    shutil.copytree(trained.tokenizer, staged, dirs_exist_ok=True)
    return AutoTokenizer.from_pretrained(staged, trust_remote_code=False)


def _write_model(staged: Path, trained: Trained, tokenizer: Any, max_shard_size: str | None) -> None:
    """All else that plain transformers reads."""
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


def _opened(folder: Path, trained: Trained, is_merged: bool) -> Any:
    """The `folder` loaded as any other tool would."""
    if not is_merged:
        return adapter.loaded(_base(trained), folder)
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=trained.model.dtype,
        use_safetensors=True,
        trust_remote_code=False,
        attn_implementation=TRUTH,
    ).eval()


def _base(trained: Trained) -> PreTrainedModel:
    """What the adapters of a run stand on, without them, in the dtype that they are exported in."""
    wanted, lora = trained.config.model, trained.config.model.lora
    alone = wanted.model_copy(update={"lora": None})
    dtype = next(p.dtype for _, p in kept(trained.model))
    model = build(alone, trained.model.config, seed=0, gradient_checkpointing=False, dtype=dtype)
    if lora is not None and lora.quantize is not None:
        adapter.quantise(model)
    return model


def _compare(again: Any, folder: Path, trained: Trained, tokenizer: Any) -> None:
    """Refuse the `folder`, which was loaded `again`, unless it equals what was trained."""
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
