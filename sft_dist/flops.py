"""What a row costs to learn: the model's floating-point operations, recomputation not counted."""

from __future__ import annotations

from typing import cast

import torch
from transformers import PretrainedConfig, PreTrainedModel


def matmul_parameters(model: torch.nn.Module) -> int:
    """Parameters that each token is multiplied with: all matrices but the embeddings, and the head though it may be one of those."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    head = cast(PreTrainedModel, model).get_output_embeddings().weight
    inner = sum(p.numel() for p in model.parameters() if p.ndim >= 2 and id(p) not in embeddings and p is not head)
    return inner + head.numel()


def flops_per_row(made: PretrainedConfig, matrices: int, *, seq_len: int, documents_per_row: float) -> float:
    """FLOPs of a row's forward and backward pass: 6 a matrix parameter and token, and causal attention within documents.

    Chowdhery et al. 2022, "PaLM", appendix B, with documents of the mean length in place of rows.

    >>> from transformers import GPT2Config
    >>> f"{flops_per_row(GPT2Config(), 123_532_032, seq_len=1024, documents_per_row=1.0):.3e}"
    '8.170e+11'
    """
    width = getattr(made, "head_dim", None) or made.hidden_size // made.num_attention_heads
    width *= made.num_attention_heads
    seen = (seq_len / documents_per_row + 1) / 2  # tokens that a token attends to, on average
    return 6.0 * matrices * seq_len + 12.0 * made.num_hidden_layers * width * seq_len * seen
