"""Matrix products of the layers in 8 bits, by torchao: each row of what is multiplied is rounded to float8 with a scale of its own.

Weights stay in 16 bits with fp32 masters; a product rounds both of its factors on the way (Micikevicius et al. 2022, "FP8 Formats for
Deep Learning", arXiv:2209.05433). Rows, because a scale of a whole tensor would let a document's numbers depend on what is packed
beside it. The head, embeddings and attention are as ever. Without a GPU the products are emulated: the same rounding, no speed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from sft_dist.errors import ModelError
from sft_dist.layers import layers_of

MULTIPLE = 16  # that both sides of a matrix must be of: the GPU's own rule
LEAST_CAPABILITY = (9, 0)  # an H100: products with a scale a row


def use(model: PreTrainedModel, device: torch.device) -> None:
    """Let the linear layers of a model multiply in 8 bits from now on.

    Before DeepSpeed sees the model: modules are replaced, parameters and their names stay. Raises ModelError for a GPU that cannot, and
    for a model without a layer that could.

    >>> use(model, torch.device("cuda"))  # doctest: +SKIP
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        raise ModelError(
            f"train.fp8: {torch.cuda.get_device_name(device)} has no products in 8 bits with a scale for each row, an H100 and what came "
            "after it have; leave it out"
        )
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    recipe = Float8LinearConfig.from_recipe_name("rowwise")
    recipe = dataclasses.replace(recipe, emulate=device.type != "cuda")
    layers = layers_of(model, model.config.num_hidden_layers)
    for layer in layers:
        convert_to_float8_training(layer, module_filter_fn=lambda module, _: _is_fitting(module), config=recipe)
    if next(_in_8_bits(model), None) is None:
        raise ModelError(
            f"train.fp8: {type(model).__name__} has no torch.nn.Linear in its layers whose sides are multiples of {MULTIPLE} (GPT-2's are "
            "not of that kind); leave it out"
        )


def told(model: torch.nn.Module) -> str:
    """How many of the layers it is, and whether it is emulated.

    >>> told(model)  # doctest: +SKIP
    'fp8: 112 linear layers'
    """
    layers = list(_in_8_bits(model))
    is_emulated = any(layer.config.emulate for layer in layers)
    return f"fp8: {len(layers)} linear layers" + (", emulated on the CPU: right, and slow" if is_emulated else "")


def _is_fitting(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) and not any(side % MULTIPLE for side in module.weight.shape)


def _in_8_bits(model: torch.nn.Module) -> Iterator[Any]:
    from torchao.float8.float8_linear import Float8Linear

    return (module for module in model.modules() if isinstance(module, Float8Linear))


@contextmanager
def in_16_bits(model: torch.nn.Module) -> Iterator[None]:
    """Within it the products are of 16 bits again: what is compared there differs by more than the rounding to 8 would hide."""
    modules = list(_in_8_bits(model))
    for module in modules:
        module.forward = partial(_plain, module)
    try:
        yield
    finally:
        for module in modules:
            del module.forward  # of the instance


def _plain(module: torch.nn.Linear, states: torch.Tensor) -> torch.Tensor:
    return F.linear(states, module.weight, module.bias)
