"""The model card of an export: what it is, from what data, how it was trained, what was measured, and how to have it again."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from sft_dist import __version__
from sft_dist.adapter import num_elements
from sft_dist.answers import Way
from sft_dist.data.shards import Shards
from sft_dist.data.sources import HUB
from sft_dist.data.view import Bar, Overview, prepared
from sft_dist.errors import DataError
from sft_dist.manifest import read_manifest
from sft_dist.metrics import numbers, read_lines
from sft_dist.reproduce import commands, environment_of
from sft_dist.schema import LoraConfig, RunConfig
from sft_dist.state import TrainState
from sft_dist.topology import processes
from sft_dist.usage import USAGE, gpu_seconds, read_usage

CARD = "README.md"
# Identifiers that the hub knows (huggingface.co/docs/hub/repositories-licenses); any other is `other`, with its name.
_LICENSES = {
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "bigscience-bloom-rail-1.0",
    "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause",
    "bsd-3-clause-clear", "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0",
    "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0",
    "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cdla-sharing-1.0",
    "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0",
    "eupl-1.1", "eupl-1.2", "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "isc",
    "lppl-1.3c", "ms-pl", "apple-ascl", "mpl-2.0", "odc-by", "odbl", "openrail++", "osl-3.0", "postgresql",
    "ofl-1.1", "ncsa", "unlicense", "zlib", "pddl", "gemma", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3",
    "llama4",
}  # fmt: skip
_ON_HUB = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


@dataclass(frozen=True, slots=True)
class Source:
    """Where records are from; `license` and `digest` are None where they are not known."""

    path: str
    license: str | None
    digest: str | None


@dataclass(frozen=True, slots=True)
class PreparedSet:
    """What went into the training rows of a set: nothing but sources where its shards are not there."""

    name: str
    sources: list[Source]
    funnel: list[Bar]
    rows: dict[str, str]


def model_card(
    run_dir: Path,
    checkpoint: Path,
    config: RunConfig,
    state: TrainState,
    model: Any,
    *,
    way: Way,
    where: str,
    caveats: list[str],
) -> str:
    """The text of the card; `where`: what the model is called by who loads it, a folder or ORG/NAME of the hub.

    A `model` that has adapters beside it is told as adapters alone.
    """
    name = where.rpartition("/")[2] if "/" in where and _ON_HUB.fullmatch(where) else run_dir.resolve().name
    manifest, environment = read_manifest(checkpoint), environment_of(checkpoint)
    sets, metrics, is_adapter = list(_sets(config)), _measured(run_dir, state.step), hasattr(model, "peft_config")
    card = ModelCard.from_template(
        _metadata(name, config, metrics, is_adapter),
        template_str=(Path(__file__).parent / "card.md.jinja").read_text(),
        name=name,
        version=__version__,
        where=where,
        step=f"{state.step:,}",
        dtype=str(model.dtype).removeprefix("torch."),
        context=getattr(model.config, "max_position_embeddings", None),
        base=config.model.name_or_path if is_adapter else None,
        origin=_origin(config, model),
        way=way,
        training=_training(run_dir, config, state, manifest, environment),
        sets=sets,
        metrics=metrics,
        license=config.model.license,
        commands=commands(run_dir, config, manifest["world_size"]),
        digests={key: value for key, value in manifest["identity"].items() if key != "lora"}
        | {"rows that were fed": state.ledger.text},
        environment=environment,
        caveats=caveats,
    )
    return str(card)


def _metadata(name: str, config: RunConfig, metrics: Mapping[str, float], is_adapter: bool) -> ModelCardData:
    """What the hub reads: only what is known, in the identifiers that it knows."""
    given = config.prepare.sources if config.prepare else []
    datasets = [source.path.removeprefix(HUB) for source in given if source.path.startswith(HUB)]
    base, stated = config.model.name_or_path, config.model.license
    is_known = stated is not None and stated.lower() in _LICENSES
    more: dict[str, Any] = {}
    if stated is not None:
        more = {"license": stated.lower()} if is_known else {"license": "other", "license_name": stated}
    if base is not None and _ON_HUB.fullmatch(base) and not Path(base).exists():
        more["base_model"] = base
    results = [
        EvalResult("text-generation", datasets[0] if datasets else name, f"validation split of {name}", kind, value)
        for kind, value in metrics.items()
        if kind in ("loss", "perplexity", "accuracy", "f1", "exact_match")
    ]
    return ModelCardData(
        language=config.prepare.curate.languages if config.prepare else None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["sft", "sft-dist", *(["lora"] if config.model.lora is not None else [])],
        datasets=datasets or None,
        metrics=[result.metric_type for result in results] or None,
        model_name=name if results else None,
        eval_results=results or None,
        **more,
    )


def _measured(run_dir: Path, step: int) -> dict[str, float]:
    """What the run measured of held-out records at this step; numbers that are none are left out."""
    try:
        lines = read_lines(run_dir / "metrics.jsonl")
    except DataError:
        return {}
    found: dict[str, float] = {}
    for line in lines:
        if line.get("step") == step:
            measured = ((k, v) for k, v in numbers(line).items() if k.startswith(("validation_", "general_")))
            found |= {k: v for k, v in measured if math.isfinite(v)}
    return {name.removeprefix("validation_"): value for name, value in found.items()}


def _origin(config: RunConfig, model: Any) -> str:
    count = sum(num_elements(parameter) for parameter in model.parameters())
    kind = f"{count:,} parameters (`{type(model).__name__}`)"
    if config.model.is_scratch:
        return f"A language model of {kind}, trained from scratch."
    if hasattr(model, "peft_config"):
        learned = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        return f"Adapters of {learned:,} parameters for `{config.model.name_or_path}`, with them {kind}."
    how = "fine-tuned" if config.model.lora is None else "fine-tuned by adapters, which are merged into it"
    return f"`{config.model.name_or_path}`, a language model of {kind}, {how}."


def _adapters(lora: LoraConfig) -> str:
    """What was trained beside the frozen model.

    >>> _adapters(LoraConfig(rank=8, alpha=16, target_modules=["q_proj", "v_proj"], quantize="nf4"))
    'LoRA of rank 8, alpha 16, dropout 0, beside q_proj, v_proj, which were kept in nf4'
    """
    beside = "all linear layers" if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    kept = f", which were kept in {lora.quantize}" if lora.quantize is not None else ""
    return f"LoRA of rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g}, beside {beside}{kept}"


def _training(
    run_dir: Path, config: RunConfig, state: TrainState, manifest: Mapping[str, Any], environment: Mapping[str, str]
) -> dict[str, str]:
    """How it was trained, a line a fact."""
    train, rows = config.train, manifest["identity"]["global_batch_rows"]
    hours = gpu_seconds(read_usage(run_dir / USAGE)) / 3600
    is_on_cpu = environment.get("device") == "no GPU"
    clipped = f", gradients clipped at {train.max_grad_norm:g}" if train.max_grad_norm else ""
    return {
        "steps": f"{state.step:,}",
        "rows": f"{state.ledger.rows:,}, {rows:,} a step",
        "tokens": f"{state.tokens:,}, of which {state.target_tokens:,} targets (only they carry loss)",
        "learning rate": f"{train.learning_rate:g}, {train.schedule}, the first {100 * train.warmup_ratio:g} % warm-up",
        "optimizer": f"AdamW (β {train.beta1:g}, {train.beta2:g}, ε {train.epsilon:g}, weight decay {train.weight_decay:g}){clipped}",
        **({"trained": _adapters(config.model.lora)} if config.model.lora is not None else {}),
        "precision": f"{train.precision}, gradients accumulated in fp32",
        "distribution": f"DeepSpeed ZeRO stage {manifest['zero_stage']}, {processes(manifest['world_size'])}",
        "hardware": environment.get("device", "not recorded"),
        f"{'process' if is_on_cpu else 'GPU'}-hours": f"{hours:.3g}",
        "seed": f"{train.seed}",
    }


def _sets(config: RunConfig) -> Iterator[PreparedSet]:
    """The prepared sets of the run, as far as their shards are there and can be read."""
    licenses = {source.path: source.license for source in config.prepare.sources} if config.prepare else {}
    of_set = {entry.shards: entry.license for entry in config.mixture}
    for name, folder in zip(config.set_names, config.shards_dirs, strict=True):
        try:
            about = prepared(Path(folder))
            manifest = Shards.open(Path(folder) / "train").manifest if about else None
        except DataError:
            about, manifest = {}, None
        settings = about.get("settings", {}).get("prepare", {})
        given = [entry["path"] for entry in settings.get("sources", [])] or list(licenses) or [folder]
        digests = about.get("sources", {})
        sources = [Source(path, licenses.get(path) or of_set.get(folder), _digest(path, digests)) for path in given]
        rows = {}
        if manifest is not None:
            rows = {
                "training rows": f"{manifest.rows:,} of {manifest.seq_len:,} tokens, {100 * manifest.fill:.1f} % full",
                "samples in them": f"{manifest.documents:,}",
                "tokens in them": f"{manifest.tokens:,}, of which {manifest.targets:,} targets",
            }
        yield PreparedSet(name, sources, Overview(Path(folder), about, {}, []).funnel, rows)


def _digest(path: str, digests: Mapping[str, str]) -> str | None:
    """Of a file; of a folder or a glob there are several, which `reproduce.yaml` lists."""
    found = [digest for name, digest in digests.items() if name == path or name.startswith(f"{path}/")]
    return found[0] if len(found) == 1 else None
