"""AdamW as a run wants it: which parameters decay, and a gate that keeps bad steps from the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups: matrices decay, vectors (biases, norms) do not; made before ZeRO flattens the shapes."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class GatedAdamW(torch.optim.AdamW):
    """AdamW behind a gate: DeepSpeed calls `step` once it knows the gradient norm, and what is closed then moves nothing."""

    is_open: Callable[[], bool] = staticmethod(lambda: True)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, or none."""
        return super().step(closure) if self.is_open() else None
