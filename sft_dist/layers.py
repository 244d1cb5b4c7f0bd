"""How the layers that a model stacks are computed: what each keeps for the backward pass, and whether torch compiles it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from sft_dist.errors import ModelError
from sft_dist.kernels import ATTENTION_DROPOUTS

Recompute = Literal[False, True, "selective", "offload"]
"""Of a layer is kept: False, all that its backward pass wants; True, what goes into it; `selective`, also what is dear to
compute and small to keep; `offload`, what goes into it, in the memory of the host."""
SPEED: dict[Recompute, float] = {False: 1.0, "selective": 0.85, True: 0.75, "offload": 0.75}
"""What is left of it: a forward pass is a third of a step, and a little more than half of its products are the wide ones."""
_SELECTIVE_BY_HAND = (
    0.7  # GPT-2's step on an H100: 0.254 s, beside 0.240 of True (benchmarks/results/layer_policies_h100.json)
)
_PRODUCTS = {
    torch.ops.aten.mm.default: (0, 1),
    torch.ops.aten.addmm.default: (1, 2),
}  # and which arguments are the factors


def speed(how: Recompute, *, is_compiled: bool) -> float:
    """`SPEED`; in layers that are not compiled the host asks of each operator whether to keep what it makes, and is waited for.

    >>> speed("selective", is_compiled=True), speed("selective", is_compiled=False), speed(True, is_compiled=False)
    (0.85, 0.7, 0.75)
    """
    return _SELECTIVE_BY_HAND if how == "selective" and not is_compiled else SPEED[how]


def layers_of(model: torch.nn.Module, count: int) -> list[torch.nn.Module]:
    """The `count` layers that the model stacks; none where they cannot be told from its other parts."""
    stacks = (module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    return next((list(stack) for stack in stacks if len(stack) == count), [])


def recompute(
    model: PreTrainedModel, how: Recompute, on_host: Callable[[], AbstractContextManager[Any]] | None = None
) -> None:
    """Let the layers keep less, and compute the rest once more in the backward pass (Chen et al. 2016, arXiv:1604.06174).

    `on_host`: within it, what is saved is put aside and brought back; default: torch's, through pinned memory on a GPU.
    """
    if not how:
        return
    arguments: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        arguments["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy(model))
    # transformers 5 renames it on the way to 6; both take this as their first argument
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(arguments)
    if how == "offload":
        for module in model.modules():
            if "_gradient_checkpointing_func" in vars(module):  # as transformers sets it
                module._gradient_checkpointing_func = functools.partial(
                    _put_aside, module._gradient_checkpointing_func, on_host or _on_host
                )


def _put_aside(checkpointed: Any, on_host: Callable[[], AbstractContextManager[Any]], *args: Any, **more: Any) -> Any:
    with on_host():
        return checkpointed(*args, **more)


def _on_host() -> AbstractContextManager[Any]:
    return torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())


def _policy(model: PreTrainedModel) -> Callable[..., CheckpointPolicy]:
    """Keep what attention gives, and matrix products that sum over at least as many numbers as they make of a token.

    Of the products of a layer the widest, half of the work, are computed again, and everything between products (as Korthikanti et
    al. 2022, arXiv:2205.05198, but for attention, whose kernels keep nothing of the length squared any more).
    """
    # an operator that is not run a second time does not draw a second time: what is drawn behind it would be other numbers
    draws = any(getattr(model.config, name, 0) for name in ATTENTION_DROPOUTS)

    def policy(ctx: Any, op: Any, *args: Any, **more: Any) -> CheckpointPolicy:
        if op in _PRODUCTS:
            left, right = (args[place] for place in _PRODUCTS[op])
            is_kept = left.shape[-1] >= right.shape[-1]
        else:
            is_kept = not draws and ("attention" in str(op) or "attn" in str(op))
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def tile_mlp(model: PreTrainedModel, tokens: int) -> None:
    """Let feed-forward layers see `tokens` tokens of a row at a time: what is between their products is there for so many only.

    They are computed once more in the backward pass. Raises ModelError where a layer has none that is called `mlp`.
    """
    layers = layers_of(model, model.config.num_hidden_layers)
    if not layers or not all(isinstance(getattr(layer, "mlp", None), torch.nn.Module) for layer in layers):
        raise ModelError(
            f"train.mlp_tile_tokens: the feed-forward layers of {type(model).__name__} cannot be told from its other parts; leave it out"
        )
    for layer in layers:
        layer.mlp.forward = functools.partial(_tiled, layer.mlp.forward, tokens)  # type: ignore[union-attr]


def _tiled(plain: Callable[[torch.Tensor], torch.Tensor], tokens: int, hidden: torch.Tensor) -> torch.Tensor:
    tiles = hidden.split(tokens, dim=1)
    if not torch.is_grad_enabled():
        return torch.cat([plain(tile.contiguous()) for tile in tiles], dim=1)
    return torch.cat([checkpoint(plain, tile.contiguous(), use_reentrant=False) for tile in tiles], dim=1)


def compile_layers(model: PreTrainedModel, backend: str = "inductor") -> list[str]:
    """Let torch compile the layers for learning, for the most rows that come; fewer, and evaluation, are as before.

    Returns their classes' names.

    A layer is one graph, the same for all: under ZeRO 3 its weights must be gathered as a whole, outside of it.
    Raises ModelError where the model's layers cannot be told from its other parts.
    """
    layers = layers_of(model, model.config.num_hidden_layers)
    if not layers:
        raise ModelError(
            f"train.compile: the layers of {type(model).__name__} cannot be told from its other parts; set train.compile: false"
        )
    for layer in layers:
        layer.forward = _either(
            layer, layer.forward, torch.compile(layer.forward, backend=backend, fullgraph=True, dynamic=False)
        )
    return sorted({f"{type(layer).__module__}.{type(layer).__qualname__}" for layer in layers})


def _either(layer: torch.nn.Module, plain: Callable[..., Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
    most_rows = 0

    def forward(*args: Any, **more: Any) -> Any:
        nonlocal most_rows
        rows = len(args[0] if args else more["hidden_states"])
        # a run's last micro-batch may have fewer rows, and a rank without any is fed one: a graph of their own is not worth its minute
        if not layer.training or rows < most_rows:
            return plain(*args, **more)
        most_rows = rows
        if "cu_seq_lens_q" in more:  # of documents there are as many as there are: no new graph for them
            torch._dynamo.maybe_mark_dynamic(more["cu_seq_lens_q"], 0)
        try:
            return compiled(*args, **more)
        except torch._dynamo.exc.TorchDynamoException as error:
            why = " ".join(str(error).split("\n\n")[0].split())
            raise ModelError(
                f"train.compile: a layer cannot be compiled: {why}. Set train.compile: false, or choose "
                "another train.attention"
            ) from error

    return forward
