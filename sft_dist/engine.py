"""One optimizer step under DeepSpeed ZeRO: what the run file says goes in, exactly, and nothing else decides.

DeepSpeed owns sharding and communication. Precision, batch, optimizer, schedule and clipping come from the run file
and are injected here, once.
"""

from __future__ import annotations

import functools
import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sft_dist import adapter, kernels, layout, ledger
from sft_dist.attention import packed_logits
from sft_dist.batch import Batch, with_last
from sft_dist.head import Head, Scores, scores_at, targets_at
from sft_dist.layers import compile_layers
from sft_dist.long_rows import Shared
from sft_dist.loss import sums_by_set
from sft_dist.optimizer import GatedAdamW, decay_groups
from sft_dist.schema import TrainConfig
from sft_dist.stragglers import Stopwatch
from sft_dist.topology import Topology
from sft_dist.zero import deepspeed_config, zero_stage


@dataclass(frozen=True, slots=True)
class Applied:
    """What one optimizer step did: the loss, summed over all ranks in fp64, and the global gradient norm before clipping.

    `is_applied`: whether it reached the weights. `is_overflow`: it did not because fp16's loss scale was too high, which mends
    itself; else one of its numbers is bad, and `suspects` are this rank's rows that may be to blame.

    `fed`: int64 [3] on the device, this rank's part of the ledger: its rows, and the two sums of their hashes. `set_sums`: fp64 [2, sets] on the device, this rank's summed loss and number of targets of each set of a mixture. `own_seconds`: in its forward passes, where ranks wait for one another at stage 3 only.
    """

    loss_sum: float
    grad_norm: float
    fed: torch.Tensor
    is_applied: bool = True
    is_overflow: bool = False
    suspects: tuple[int, ...] = ()
    set_sums: torch.Tensor | None = None
    own_seconds: float = 0.0


_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # what DynamicLossScaler remembers


class Engine:
    """A model under ZeRO that learns from whole steps.

    >>> engine = Engine(model, zero, config.train, batch, topology, device)  # doctest: +SKIP
    >>> engine.learn(step.micro_batches, denominator=1_234, learning_rate=1e-3)  # doctest: +SKIP
    Applied(loss_sum=851.2, grad_norm=0.93, fed=tensor([4, 5727095992301866834, -2371436142478386021]))
    """

    def __init__(
        self,
        model: torch.nn.Module,
        zero: dict[str, Any],
        config: TrainConfig,
        batch: Batch,
        topology: Topology,
        device: torch.device,
        num_sets: int = 1,
        shared: Shared | None = None,
    ) -> None:
        self.shared = shared
        self.config, self.topology, self.device, self.num_sets = config, topology, device, num_sets
        self.stage = zero_stage(zero)
        self.adam = GatedAdamW(
            decay_groups(model, config.weight_decay),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            fused=True,  # one pass over memory, on GPUs and CPUs: a ninth of the time there, equal to 5e-8
        )
        self._ledger_keys: torch.Tensor | None = None
        self._forward = Stopwatch(device)
        self.head = Head(model)
        leaves = compile_layers(model) if config.compile else ()
        adapter.scales_to(model, device)
        self.deepspeed = _initialize(model, self.adam, deepspeed_config(zero, config, batch, leaves))
        if config.precision == "fp16":  # else a gradient that stays bad ends in an exception of DeepSpeed's own
            self.deepspeed.optimizer.loss_scaler.raise_error_at_min_scale = False

    def learn(
        self,
        micro_batches: Iterable[Any],
        *,
        denominator: int,
        learning_rate: float,
        should_abandon: Callable[[], bool] = lambda: False,
        total: Callable[[torch.Tensor], float] = float,
        norm_limit: float = math.inf,
    ) -> Applied | None:
        """Forward and backward over the step's micro-batches on this rank, then one optimizer step.

        The gradient is that of (sum of target losses over all ranks) / `denominator`; `total` sums this rank's loss over the
        ranks. The step is applied if loss and gradient norm are finite and the norm is not above `norm_limit`.
        `should_abandon` is asked before each micro-batch; when it says yes nothing is applied and None is returned (masters
        and moments have not moved).
        """
        self.deepspeed.train()
        losses, rows = torch.zeros(64, dtype=torch.float64, device=self.device), list[Any]()
        fed = torch.zeros(3, dtype=torch.int64, device=self.device)
        set_sums = torch.zeros(2, self.num_sets, dtype=torch.float64, device=self.device) if self.num_sets > 1 else None
        for is_last, micro_batch in with_last(micro_batches):
            if should_abandon():
                return None
            self._seed(micro_batch.first_ordinal)
            self.deepspeed.set_gradient_accumulation_boundary(is_last)
            # DeepSpeed averages over the ranks; a global sum over a global count wants the sum: times the world.
            factor = self.topology.world_size / denominator
            with self._forward:
                scores = self._scores(micro_batch, factor, fed, set_sums)
            self.deepspeed.backward(scores.loss * factor, scale_wrt_gas=False)
            if len(rows) == len(losses):
                losses = torch.cat([losses, torch.zeros_like(losses)])
            losses[len(rows)] = -scores.log_probs.sum(dtype=torch.float64)
            rows.append(micro_batch.rows)
        loss_sum = total(losses.sum().cpu())
        scale = self.loss_scale["cur_scale"] if self.loss_scale else 0.0
        norm = self._step(learning_rate, norm_limit if math.isfinite(loss_sum) else -1.0)
        is_overflow = scale > 1.0 and math.isfinite(loss_sum) and not math.isfinite(norm)  # a lower scale may mend it
        is_applied = math.isfinite(loss_sum) and norm <= norm_limit and math.isfinite(norm)
        suspects = () if is_applied or is_overflow else _suspects(losses, rows, is_loss=not math.isfinite(loss_sum))
        return Applied(loss_sum, norm, fed, is_applied, is_overflow, suspects, set_sums, self._forward.take())

    def _step(self, learning_rate: float, norm_limit: float) -> float:
        """One optimizer step, if the gradient norm allows it; returns the norm before clipping, infinite on an overflow."""
        for group in self.adam.param_groups:
            group["lr"] = learning_rate
        norm = self._clip_unwrapped() if self.stage == 0 else None

        @functools.cache  # the device is waited for once
        def global_norm() -> float:
            return float(self.deepspeed.optimizer._global_grad_norm) if norm is None else norm

        self.adam.is_open = lambda: math.isfinite(global_norm()) and global_norm() <= norm_limit
        self.deepspeed.step()
        return global_norm()

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits [rows, length, vocab] in evaluation mode; under ZeRO 3 every rank must call it equally often."""
        self.deepspeed.eval()
        return packed_logits(self.deepspeed, tokens.to(self.device), positions.to(self.device))

    @torch.no_grad()
    def scores(self, *batch: torch.Tensor, shared: Shared | None = None) -> Scores:
        """The same, of tokens, positions, places and labels, without logits that would be kept; see `sft_dist.head.Forward`."""
        self.deepspeed.eval()
        return scores_at(self.deepspeed, *(part.to(self.device) for part in batch), shared=shared)

    def use_kernel(self, name: str) -> None:
        """Attention by a kernel of `sft_dist.kernels`."""
        kernels.use(self.deepspeed.module, name)
        self.head.wants_documents = kernels.knows_documents(name)

    def fragments(self) -> Iterator[layout.Fragment]:
        """This rank's live views of the fp32 masters and moments."""
        return layout.fragments(self.deepspeed.module, self.deepspeed.optimizer, self.adam, self.topology.rank)

    @property
    def adam_step(self) -> int:
        """Adam's own count of applied steps."""
        return layout.adam_step(self.adam)

    @property
    def peak_device_bytes(self) -> int | None:
        """Peak memory allocated on this rank's GPU, None on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None

    @property
    def loss_scale(self) -> dict[str, float] | None:
        """The state of fp16's loss scaler, None for the other precisions."""
        if self.config.precision != "fp16":
            return None
        return {name: getattr(self.deepspeed.optimizer.loss_scaler, name) for name in _SCALER}

    def restored(self, adam_step: int, loss_scale: Mapping[str, float] | None = None) -> None:
        """To be called after the fragments were filled from a checkpoint, with its counts; fp16 scales anew without them."""
        for name, value in (loss_scale or {}).items() if self.config.precision == "fp16" else ():
            setattr(self.deepspeed.optimizer.loss_scaler, name, value)
        layout.set_adam_step(self.adam, adam_step)
        layout.refresh_weights(self.deepspeed.optimizer, self.adam)

    def _scores(self, micro_batch: Any, factor: float, fed: torch.Tensor, set_sums: torch.Tensor | None) -> Scores:
        tokens, targets, positions = (
            getattr(micro_batch, name).to(self.device, non_blocking=True) for name in ("tokens", "targets", "positions")
        )
        is_fed_here = self.shared is None or self.shared.index == 0
        if len(micro_batch.rows) and is_fed_here:  # else it is one row of padding, to keep the other ranks company
            fed += self._fed(tokens, targets, positions)
        places, labels = targets_at(tokens, targets, micro_batch.num_targets, self.shared)
        scale = factor * (self.loss_scale or {"cur_scale": 1.0})["cur_scale"]
        about = {"grad_scale": scale, "num_documents": micro_batch.num_documents, "shared": self.shared}
        scores = scores_at(self.deepspeed, tokens, positions, places, labels, **about)
        if set_sums is not None:  # a by-product: the loss that is optimised does not depend on it
            rows = places // (tokens.shape[1] // (self.shared.count if self.shared else 1))
            sets = micro_batch.sets.to(self.device, non_blocking=True)[rows]
            set_sums += sums_by_set(scores.log_probs, labels, sets, self.num_sets)
        return scores

    def _fed(self, tokens: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """What the ledger holds of the very tensors that the model is given."""
        if self._ledger_keys is None:
            self._ledger_keys = torch.from_numpy(ledger.keys(self.config.seed, tokens.shape[1])).to(self.device)
        sums = [ledger.row_hashes(tokens, targets, positions, of_function).sum() for of_function in self._ledger_keys]
        return torch.stack([torch.full_like(sums[0], len(tokens)), *sums])

    def _seed(self, ordinal: int) -> None:
        """Randomness belongs to the data: the draws of a micro-batch depend on its first row, never on the rank."""
        state = np.random.SeedSequence([self.config.seed, ordinal]).generate_state(1, np.uint64)[0]
        torch.manual_seed(int(state >> np.uint64(1)))

    def _clip_unwrapped(self) -> float:
        limit = self.config.max_grad_norm or math.inf
        return float(torch.nn.utils.clip_grad_norm_(self.deepspeed.module.parameters(), limit))


def _suspects(losses: torch.Tensor, rows: list[Any], *, is_loss: bool) -> tuple[int, ...]:
    """The rows of the micro-batches whose own loss is no number; all rows where only the gradient is bad."""
    is_bad = (~losses.isfinite()).tolist() if is_loss else [True] * len(rows)
    return tuple(int(row) for of_batch, bad in zip(rows, is_bad, strict=False) if bad for row in of_batch)


def _initialize(model: torch.nn.Module, adam: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    sys.modules.setdefault("mlflow", None)  # type: ignore[arg-type]  # DeepSpeed's autotuner would load it, for a second a rank
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # which its import sets
    if sys.modules["mlflow"] is None:
        del sys.modules["mlflow"]
    # On a CPU, DeepSpeed would compile this shared-memory op for minutes, and needs a compiler; gloo does the work.
    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    return deepspeed.initialize(model=model, optimizer=adam, config=config, dist_init_required=False)[0]
