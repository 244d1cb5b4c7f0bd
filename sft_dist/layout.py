"""Where this rank's part of every parameter lies in DeepSpeed's buffers: five layouts, one canonical form.

ZeRO keeps, on each rank, a contiguous run of each flattened parameter. A `Fragment` is such a run with live views of its
fp32 master and its Adam moments, so that saving reads it and loading writes it in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class Fragment:
    """Elements [offset, offset + numel) of the flattened parameter `name`, of `length` elements in all.

    `values` maps "master", "exp_avg" and "exp_avg_sq" to fp32 views [numel] of the live state; of a frozen parameter it is
    the weight alone, called "master", in the dtype of the model. `is_replicated`: every rank holds the same.
    """

    name: str
    length: int
    offset: int
    values: dict[str, torch.Tensor]
    is_replicated: bool = False

    @property
    def numel(self) -> int:
        """Elements of the run."""
        return next(iter(self.values.values())).numel()


def fragments(module: torch.nn.Module, optimizer: Any, adam: torch.optim.Optimizer, rank: int) -> Iterator[Fragment]:
    """The runs that `rank`, this one, holds of every parameter; what it holds nothing of is left out.

    `optimizer` is DeepSpeed's (the same object as `adam` where DeepSpeed does not wrap it), `adam` the client's.
    Creates the Adam state where it does not exist yet, without a step.
    """
    for name, parameter in kept(module):
        if not parameter.requires_grad:
            yield from _frozen(name, parameter, rank)
            continue
        owner, start, offset, numel = _place(parameter, optimizer, adam, rank)
        if numel == 0:
            continue
        whole = {"master": owner.detach(), **_moments(adam, owner)}
        length = getattr(parameter, "ds_numel", parameter.numel())
        values = {key: value.view(-1).narrow(0, start, numel) for key, value in whole.items()}
        yield Fragment(name, length, offset, values, is_replicated=optimizer is adam)


def whole(module: torch.nn.Module) -> Iterator[Fragment]:
    """The weights of a plain, unsharded module, as fragments to be filled with a checkpoint's masters."""
    for name, parameter in kept(module):
        yield Fragment(name, parameter.numel(), 0, {"master": parameter.detach().view(-1)})


def kept(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """What a checkpoint holds: every parameter, or with adapters those that are trained; the base is where it was."""
    is_adapted = hasattr(module, "peft_config")
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad or not is_adapted)


def _frozen(name: str, parameter: Any, rank: int) -> Iterator[Fragment]:
    """A weight that is not trained: partitioned at stage 3, whole on every rank elsewhere."""
    if not hasattr(parameter, "ds_tensor"):
        yield Fragment(name, parameter.numel(), 0, {"master": parameter.detach().view(-1)}, is_replicated=True)
        return
    part = parameter.ds_tensor
    offset = rank * part.ds_numel
    numel = max(0, min(part.ds_numel, parameter.ds_numel - offset))
    if numel:
        yield Fragment(name, parameter.ds_numel, offset, {"master": part.detach().view(-1)[:numel]})


def _place(parameter: Any, optimizer: Any, adam: Any, rank: int) -> tuple[torch.Tensor, int, int, int]:
    """(Adam's tensor, where the run starts in it, where it starts in the parameter, its elements)."""
    if hasattr(parameter, "ds_tensor"):  # stage 3: equal partitions, the last ones padded
        group, start, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        per_rank = parameter.ds_tensor.ds_numel
        offset = rank * per_rank
        numel = max(0, min(per_rank, parameter.ds_numel - offset))
        return optimizer.fp32_partitioned_groups_flat[group], start, offset, numel
    if optimizer is adam:  # stage 0 in fp32: whole parameters, unwrapped
        return parameter, 0, 0, parameter.numel()
    mapping = parameter._hp_mapping  # stages 1 and 2, and BF16_Optimizer
    if mapping is None:
        return parameter, 0, 0, 0
    owner = adam.param_groups[mapping.param_group_index]["params"][0]
    address = mapping.get_hp_fragment_address()
    return owner, address.start, mapping.lp_fragment_address.start, address.numel


def _moments(adam: torch.optim.Optimizer, owner: torch.Tensor) -> dict[str, torch.Tensor]:
    state = adam.state[owner]
    if not state:
        state["step"] = torch.tensor(0.0, device=owner.device)
        state.update({key: torch.zeros_like(owner, requires_grad=False) for key in MOMENTS})
    return {key: state[key] for key in MOMENTS}


def adam_step(adam: torch.optim.Optimizer) -> int:
    """Adam's own count of applied steps (0 before the first)."""
    counts = [state["step"] for state in adam.state.values() if state]
    return int(torch.stack(counts).max()) if counts else 0  # on the GPU, since AdamW is fused: waited for once


def set_adam_step(adam: torch.optim.Optimizer, step: int) -> None:
    """Give every state a count of its own: shared ones would be incremented several times a step."""
    for state in filter(None, adam.state.values()):  # an empty one is made by the first step, with moments
        state["step"] = torch.tensor(float(step), device=state["exp_avg"].device)


def refresh_weights(optimizer: Any, adam: torch.optim.Optimizer) -> None:
    """Copy the masters into the weights that the forward pass uses, on every rank."""
    if optimizer is adam:
        return  # the master is the weight
    if hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
        return
    for group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    persistent = optimizer.persistent_parameters  # gathered once and kept: else the first forward uses old weights
    if persistent:
        persistent[0].partition(persistent)
        persistent[0].all_gather(persistent)
