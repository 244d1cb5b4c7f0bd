"""The model of a run, as plain transformers builds it, identical on every rank before ZeRO shards it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from sft_dist import adapter, kernels
from sft_dist.errors import ModelError
from sft_dist.layers import Recompute, recompute
from sft_dist.schema import LoraConfig, ModelConfig

_log = logging.getLogger("sft_dist")

# The names transformers' families give their dropouts.
_DROPOUTS = (
    "attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout", "hidden_dropout", "embedding_dropout", "dropout",
    "activation_dropout", "layerdrop",
)  # fmt: skip


def model_config(config: ModelConfig, *, vocab_size: int, seq_len: int, eos_id: int) -> PretrainedConfig:
    """The transformers configuration, completed from the shards (from scratch) or checked against them (pre-trained).

    Raises ModelError when the model's vocabulary or context is too small for the shards, or nothing loads.
    """
    if config.config is None:
        made = _load(
            lambda: AutoConfig.from_pretrained(config.name_or_path, trust_remote_code=False), str(config.name_or_path)
        )
    else:
        values = {"vocab_size": vocab_size, "bos_token_id": eos_id, "eos_token_id": eos_id}
        contexts = {"gpt2": "n_positions"}
        values[contexts.get(config.config["model_type"], "max_position_embeddings")] = seq_len
        values = {**values, **config.config}
        made = _load(lambda: AutoConfig.for_model(**values), f"model_type {values['model_type']!r}")
    dropout = config.dropout if config.dropout is not None else (0.0 if config.config is not None else None)
    if dropout is not None:
        given = config.config if config.dropout is None and config.config is not None else {}
        for name in _DROPOUTS:
            if hasattr(made, name) and name not in given:
                setattr(made, name, dropout)
    if made.vocab_size < vocab_size:
        raise ModelError(
            f"model.config: vocab_size {made.vocab_size} is smaller than the shards' vocabulary of {vocab_size}; "
            "prepare with the model's own tokenizer (leave prepare.tokenizer out), or enlarge the model"
        )
    context = getattr(made, "max_position_embeddings", None) or seq_len
    if context < seq_len:
        raise ModelError(
            f"model.config: a context of {context} tokens is shorter than prepare.seq_len {seq_len}; "
            "lower seq_len and prepare again, or take a model with a longer context"
        )
    made.use_cache, made.pad_token_id = False, None  # rows hold no padding that a mask would have to hide
    return made


def build(
    config: ModelConfig,
    made: PretrainedConfig,
    *,
    seed: int,
    gradient_checkpointing: Recompute,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """The model on the CPU: pre-trained from safetensors, or random as a function of `seed` alone; with its adapters, if it has some.

    Raises ModelError when the folder or id has no safetensors weights or cannot be loaded, or has nothing to adapt.
    """
    if config.is_scratch:
        torch.manual_seed(seed)
        model = _load(
            lambda: AutoModelForCausalLM.from_config(
                made, dtype=dtype, attn_implementation=kernels.TRUTH, trust_remote_code=False
            ),
            f"model_type {made.model_type!r}",
        )
    else:
        model = _load(
            lambda: AutoModelForCausalLM.from_pretrained(
                config.name_or_path,
                config=made,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                attn_implementation=kernels.TRUTH,
            ),
            str(config.name_or_path),
        )
    if config.lora is not None:
        if config.lora.quantize is not None and not config.is_scratch:  # else it is only looked at, without weights
            adapter.quantise(model)
        adapter.add(model, config.lora, seed)
    recompute(model, gradient_checkpointing)
    return model


def without_attention_dropout(made: PretrainedConfig) -> None:
    """For kernels that draw none: attention weights are not dropped, the other dropouts stay."""
    for name in kernels.ATTENTION_DROPOUTS:
        if getattr(made, name, 0):
            _log.warning(
                "note: model.%s %g becomes 0: the attention kernel draws none; set model.dropout to keep it",
                name,
                getattr(made, name),
            )
            setattr(made, name, 0.0)


def has_dropout(made: PretrainedConfig, lora: LoraConfig | None = None) -> bool:
    """Whether any dropout of the configuration, or of the adapters, is above 0."""
    return any(getattr(made, name, 0) for name in _DROPOUTS) or (lora is not None and lora.dropout > 0)


def _load(load: Callable[[], Any], what: str) -> Any:
    try:
        return load()
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError, SafetensorError) as error:
        raise ModelError(
            f"model: cannot load {what}: {str(error).splitlines()[0]}. Check the name; only safetensors weights are read, "
            "and without a network the model must be a local folder"
        ) from error
