"""What a row costs to learn: the model's floating-point operations, recomputation not counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel

from sft_dist.adapter import num_elements


def matmul_parameters(model: torch.nn.Module) -> int:
    """Parameters that each token is multiplied with: all matrices but the embeddings, and the head though it may be one of those.

    Of what is frozen two thirds: it has no gradient of its own.
    """
    cost = Cost(model, cast(PreTrainedModel, model).config)
    return round((cost.of_token + cost.of_target) / 6)


def _inner(model: torch.nn.Module, head: torch.Tensor) -> Iterator[torch.nn.Parameter]:
    """The matrices of the layers."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    return (p for p in model.parameters() if p.ndim >= 2 and id(p) not in embeddings and p is not head)


def flops_per_row(made: PretrainedConfig, matrices: int, *, seq_len: int, documents_per_row: float) -> float:
    """FLOPs of a row's forward and backward pass: 6 a matrix parameter and token, and causal attention within documents.

    Chowdhery et al. 2022, "PaLM", appendix B, with documents of the mean length in place of rows.

    >>> from transformers import GPT2Config
    >>> f"{flops_per_row(GPT2Config(), 123_532_032, seq_len=1024, documents_per_row=1.0):.3e}"
    '8.170e+11'
    """
    width = _width(made)
    seen = (seq_len / documents_per_row + 1) / 2  # tokens that a token attends to, on average
    return 6.0 * matrices * seq_len + 12.0 * made.num_hidden_layers * width * seq_len * seen


def _width(made: PretrainedConfig) -> int:
    """Of the queries of all heads of a layer."""
    return (getattr(made, "head_dim", None) or made.hidden_size // made.num_attention_heads) * made.num_attention_heads


def seen_pairs(lengths: np.ndarray, window: int | None = None) -> int:
    """Pairs (token, token that it sees) within documents of these lengths, int64 [documents]; itself is one of them.

    `window`: how many tokens it sees at most.

    >>> seen_pairs(np.array([1, 4])), seen_pairs(np.array([1, 4]), window=2)
    (11, 8)
    """
    lengths = lengths.astype(np.int64)
    within = lengths if window is None else np.minimum(lengths, window)
    return int((within * (within + 1) // 2 + (lengths - within) * within).sum())


def windows(made: PretrainedConfig) -> list[int | None]:
    """Of each layer the tokens that one sees at most; None: all before it.

    >>> from transformers import MistralConfig
    >>> windows(MistralConfig(num_hidden_layers=2, sliding_window=512))
    [512, 512]
    """
    count, window = made.num_hidden_layers, getattr(made, "sliding_window", None)
    if kinds := getattr(made, "attention_layers", None):  # GPT-Neo
        return [made.window_size if kind == "local" else None for kind in kinds]
    kinds = getattr(made, "layer_types", None) or ["sliding_attention"] * count
    return [window if kind == "sliding_attention" else None for kind in kinds]


class Cost:
    """What a model's learning takes, exactly: of these documents, and of the targets among their tokens.

    A matrix costs 2 FLOPs a parameter and token forward, 2 for the gradient of what comes in, and 2 for its own if it is learned;
    the head is multiplied where a target is predicted, and nowhere else; attention is of the pairs that are seen. Nothing is
    counted for padding, for what is computed again, nor for what is not a matrix product. To be made before ZeRO shards the model.
    """

    def __init__(self, model: torch.nn.Module, made: PretrainedConfig) -> None:
        head = cast(PreTrainedModel, model).get_output_embeddings().weight
        self.of_token = sum(num_elements(p) * (6.0 if p.requires_grad else 4.0) for p in _inner(model, head))
        self.of_target = head.numel() * (6.0 if head.requires_grad else 4.0)
        self.of_pair = 12.0 * _width(made)
        self.windows = windows(made)

    def flops(self, lengths: np.ndarray, num_targets: int) -> float:
        """Of documents of these lengths, int64 [documents], with so many targets in all."""
        pairs = sum(seen_pairs(lengths, window) for window in self.windows)
        return self.of_token * int(lengths.sum()) + self.of_target * num_targets + self.of_pair * pairs
