"""Attention of packed rows without work between documents: the kernels there are, by transformers' interface for them.

Documents lie one behind another in rows; `cu_seq_lens_q`, int32 [documents + 1], is where each begins over all rows of the
micro-batch, as flash attention takes them (Dao 2023, arXiv:2307.08691). transformers hands it down to every layer.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PretrainedConfig
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface, PreTrainedModel

from sft_dist.long_rows import Shared, enough_heads

ATTENTION_DROPOUTS = ("attn_pdrop", "attention_dropout")  # what transformers' families call that of attention weights
TRUTH = None
"""What to ask transformers for: sdpa with a mask, or `eager`, a model's own way, where that cannot compute it (Gemma 2, gpt-oss)."""
_BUCKET = 64  # the number of documents is rounded up to a multiple of it, by empty ones: few shapes
_WINDOWS = ("sliding_window", "attention_chunk_size")  # what transformers' masks and layers read
_OWN = "sft_dist_"  # before the names of ours, which transformers must not take for its own


def documents_of(positions: torch.Tensor, num_documents: int | None = None) -> dict[str, Any]:
    """What a kernel wants to know of packed rows, as transformers calls it.

    `positions`: int64 [rows, length], 0 at the beginning of each document, padding being one; `num_documents`: how many there
    are, else the device is waited for. No document is longer than a row.

    >>> documents_of(torch.tensor([[0, 1, 2, 0], [0, 1, 0, 0]]))["cu_seq_lens_q"][:7].tolist()
    [0, 3, 4, 6, 7, 8, 8]
    """
    begins = positions.flatten() == 0
    count = int(begins.sum()) if num_documents is None else num_documents
    size = -(-(count + 1) // _BUCKET) * _BUCKET
    bounds = begins.nonzero_static(size=size, fill_value=positions.numel()).flatten().int()
    length = positions.shape[1]
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": length, "max_length_k": length}


def masks_of(config: PretrainedConfig, positions: torch.Tensor, dtype: torch.dtype) -> Any:
    """Masks of packed rows as a model takes them: one, or one for each kind of layer.

    Families make theirs themselves, and some (gpt-oss, OPT) forget `positions`, int64 [rows, length], on the way.
    """
    shape_alone = torch.empty((*positions.shape, 0), dtype=dtype, device=positions.device)
    return create_masks_for_generate(config, shape_alone, None, None, position_ids=positions)


def _varlen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, **more: Any) -> Any:
    from torch.nn.attention.varlen import varlen_attn

    length, window = more["length"], more["window"]
    grouped: dict[str, Any] = (
        {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    )  # not every torch from 2.11 on knows it
    return varlen_attn(
        query, key, value, bounds, bounds, length, length,
        scale=more["scale"], window_size=(window - 1 if window else -1, 0), **grouped,
    )  # fmt: skip


def _by_document(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, **more: Any) -> Any:
    """One document after another: what a CPU does best with long ones."""
    ends, window, made = bounds.tolist(), more["window"], []
    for begin, end in itertools.pairwise(ends):
        if begin == end:
            break
        q, k, v = (part[begin:end].transpose(0, 1) for part in (query, key, value))
        mask = _in_window(end - begin, window, query.device) if window and end - begin > window else None
        made.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=more["dropout"], scale=more["scale"],
                enable_gqa=query.shape[1] != key.shape[1],
            ).transpose(0, 1)
        )  # fmt: skip
    return torch.cat(made)


def _in_window(length: int, window: int, device: torch.device) -> torch.Tensor:
    """bool [length, length]: which tokens see which.

    >>> _in_window(3, 2, torch.device("cpu")).int().tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    behind = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (behind >= 0) & (behind < window)


# by name, whether it draws dropout, and the function of [tokens, heads, width] each
_OURS: dict[str, tuple[bool, Callable[..., torch.Tensor]]] = {
    "varlen": (False, _varlen),
    "by_document": (True, _by_document),
}
_FLASH = {"flash_attention_3": "flash_attn_interface", "flash_attention_2": "flash_attn"}  # the wheels they need


def _registered(name: str) -> str:
    """The name that transformers knows a kernel by."""
    if name not in _OURS:
        return name
    has_dropout, kernel = _OURS[name]

    def attend(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        cu_seq_lens_q: torch.Tensor,
        max_length_q: int,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        shared: Shared | None = None,
        **ignored: Any,
    ) -> tuple[torch.Tensor, None]:
        unknown = {
            "softcap": softcap,
            "s_aux": s_aux,
            "dropout": None if has_dropout or not module.training else dropout or None,
        }
        if wanted := [each for each, value in unknown.items() if value is not None]:
            raise ValueError(f"the layers of this model want {', '.join(wanted)}, which {name!r} does not compute")
        if shared is not None:
            key, value = (enough_heads(one, query.shape[1], shared.count) for one in (key, value))
            query, key, value = (shared.whole_rows(one) for one in (query, key, value))
        rows, length = query.shape[0], query.shape[2]
        flat = (part.transpose(1, 2).flatten(0, 1) for part in (query, key, value))
        about = {"length": max_length_q, "window": sliding_window, "scale": scaling}
        made = kernel(*flat, cu_seq_lens_q, dropout=dropout if module.training else 0.0, **about)
        made = made.unflatten(0, (rows, length))
        return made if shared is None else shared.own_tokens(made), None

    AttentionInterface.register(_OWN + name, attend)
    # no mask is registered: the bounds say it all, and to make none transformers would wait for the device all the same
    return _OWN + name


def candidates(device_type: str, *, is_16_bit: bool, truth: str = "sdpa") -> list[str]:
    """Kernels that can run on a device, the fastest first; the slow `truth` is the last.

    >>> candidates("cpu", is_16_bit=False)
    ['sdpa']
    """
    if device_type != "cuda" or not is_16_bit:
        return [truth]
    wheels = [name for name, wheel in _FLASH.items() if importlib.util.find_spec(wheel)]
    return [*wheels, "varlen", "flex_attention", truth]


def draws_dropout(name: str) -> bool:
    """Whether a kernel can drop attention weights; transformers asks flash attention 3 for none without a word."""
    return _OURS[name][0] if name in _OURS else name not in ("flash_attention_3", "flex_attention")


def knows_documents(name: str) -> bool:
    """Whether a kernel is told where documents begin; the others take a mask.

    >>> [knows_documents(name) for name in ("varlen", "flash_attention_2", "flex_attention", "sdpa")]
    [True, True, False, False]
    """
    return name in _OURS or name in _FLASH


def _own_of_family(module: torch.nn.Module, *arguments: Any, **more: Any) -> Any:
    """`eager`: the function that a family's file defines beside its layers, by a name that all have in common."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *arguments, **more)


def _called(name: str) -> Callable[..., Any]:
    return _own_of_family if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]


@contextlib.contextmanager
def watched(model: PreTrainedModel, around: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Within it the kernel that the layers of a model call runs inside an `around()`."""
    name = model.config._attn_implementation
    kernel = _called(name)

    def attend(*arguments: Any, **more: Any) -> Any:
        with around():
            return kernel(*arguments, **more)

    ALL_ATTENTION_FUNCTIONS[name] = attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]  # of the instance; the kernel stays registered with the class


@contextlib.contextmanager
def narrowed(model: torch.nn.Module, window: int) -> Iterator[None]:
    """Within it no window or chunk of a model's attention is wider than so many tokens: rows of a proof have to be longer.

    Some families (Qwen2-MoE, PhiMoE, Llama 4) have theirs in the mask alone, which kernels that know documents do not take.
    """
    configs = {id(found): found for module in model.modules() if (found := getattr(module, "config", None)) is not None}
    wide = [
        (holder, name, value)
        for holder in (*configs.values(), *model.modules())
        for name in _WINDOWS
        if type(value := getattr(holder, name, None)) is int and value > window
    ]
    try:
        for holder, name, _ in wide:
            setattr(holder, name, window)
        yield
    finally:
        for holder, name, value in wide:
            setattr(holder, name, value)


@contextlib.contextmanager
def differentiated(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Within it each layer that calls its kernel leaves the kernel's gradients at queries, keys and values: fp32, on the CPU.

    These are drawn, the same for every kernel, in the shapes that come; no parameter has part in it, and none gets a gradient.
    """
    name, found = model.config._attn_implementation, list[torch.Tensor]()
    kernel = _called(name)

    def attend(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **more: Any
    ) -> Any:
        source, states = torch.Generator().manual_seed(0), (query, key, value)
        drawn = [torch.randn(state.shape, generator=source).to(state).requires_grad_() for state in states]
        with torch.enable_grad():
            made = kernel(module, *drawn, *rest, **more)[0]
            of_made = torch.randn(made.shape, generator=source).to(made)
            gradients = torch.autograd.grad(made, drawn, of_made)
        found.extend(gradient.float().cpu() for gradient in gradients)
        return kernel(module, *states, *rest, **more)

    ALL_ATTENTION_FUNCTIONS[name] = attend
    try:
        yield found
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]  # of the instance, as above


def use(model: PreTrainedModel, name: str) -> None:
    """Let the layers of a model call that kernel from now on. Raises ValueError or ImportError where it cannot be had."""
    dropouts = {key: value for key in ATTENTION_DROPOUTS if (value := getattr(model.config, key, 0))}
    if dropouts and not draws_dropout(name):  # a proof in evaluation mode would not see it
        raise ValueError(f"it draws no dropout, and the model has {dropouts}")
    before, wanted = model.config._attn_implementation, _registered(name)
    model.set_attn_implementation(wanted)
    if model.config._attn_implementation == before != wanted:  # transformers only warns
        raise ValueError("this model's layers do not let their kernel be set")
