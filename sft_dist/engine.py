"""One optimizer step under DeepSpeed ZeRO: what the run file says goes in, exactly, and nothing else decides.

DeepSpeed owns sharding and communication. Precision, batch, optimizer, schedule and clipping come from the run file
and are injected here, once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sft_dist import layout, ledger
from sft_dist.attention import packed_logits
from sft_dist.config import Batch, TrainConfig, zero_stage
from sft_dist.loss import sums_by_set, target_log_probs
from sft_dist.stragglers import Stopwatch
from sft_dist.topology import Topology


@dataclass(frozen=True, slots=True)
class Applied:
    """What one optimizer step did: this rank's summed loss (fp64), and the global gradient norm before clipping.

    `is_applied`: False where fp16's loss scaler found an overflow and left the weights alone (the norm is then infinite).

    `fed`: int64 [3] on the device, this rank's part of the ledger: its rows, and the two sums of their hashes. `set_sums`: fp64 [2, sets] on the device, this rank's summed loss and number of targets of each set of a mixture. `own_seconds`: in its forward passes, where ranks wait for one another at stage 3 only.
    """

    loss_sum: torch.Tensor
    grad_norm: float
    fed: torch.Tensor
    is_applied: bool = True
    set_sums: torch.Tensor | None = None
    own_seconds: float = 0.0


_SCALER = (
    "cur_scale",
    "cur_iter",
    "last_overflow_iter",
    "cur_hysteresis",
)  # what DeepSpeed's DynamicLossScaler remembers


def deepspeed_config(zero: dict[str, Any], config: TrainConfig, batch: Batch) -> dict[str, Any]:
    """The DeepSpeed configuration of a run: the user's ZeRO file plus what the run file owns.

    Accumulation and reduction are fp32 whatever the precision: with DeepSpeed's default the gradient of 1,920
    micro-batches in bf16 was measured 31 % wrong.
    """
    return {
        **zero,
        "train_micro_batch_size_per_gpu": config.micro_batch_rows,
        "gradient_accumulation_steps": batch.accumulation_steps,
        "bf16": {"enabled": config.precision == "bf16"},
        "fp16": {"enabled": config.precision == "fp16", "loss_scale": 0, "initial_scale_power": 16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        # DeepSpeed reports no gradient norm at stage 0, so the engine measures and clips there itself.
        "gradient_clipping": 0.0 if zero_stage(zero) == 0 else config.max_grad_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups: matrices decay, vectors (biases, norms) do not; made before ZeRO flattens the shapes."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class Engine:
    """A model under ZeRO that learns from whole steps.

    >>> engine = Engine(model, zero, config.train, batch, topology, device)  # doctest: +SKIP
    >>> engine.learn(step.micro_batches, denominator=1_234, learning_rate=1e-3)  # doctest: +SKIP
    Applied(loss_sum=tensor(851.2, dtype=torch.float64), grad_norm=0.93, fed=tensor([4, 5727095992301866834, -2371436142478386021]))
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
    ) -> None:
        self.config, self.topology, self.device, self.num_sets = config, topology, device, num_sets
        self.stage = zero_stage(zero)
        self.adam = torch.optim.AdamW(
            decay_groups(model, config.weight_decay),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
        )
        self._ledger_keys: torch.Tensor | None = None
        self._forward = Stopwatch(device)
        self.deepspeed = _initialize(model, self.adam, deepspeed_config(zero, config, batch))

    def learn(
        self, micro_batches: Iterable[Any], *, denominator: int, learning_rate: float, should_abandon=lambda: False
    ) -> Applied | None:
        """Forward and backward over the step's micro-batches on this rank, then one optimizer step.

        The gradient is that of (sum of target losses over all ranks) / `denominator`. `should_abandon` is asked before
        each micro-batch; when it says yes nothing is applied and None is returned (masters and moments have not moved).
        """
        self.deepspeed.train()
        # in fp64: in fp32 the sum of thousands of micro-batches is 1e-6 off, the gradient is not
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        fed = torch.zeros(3, dtype=torch.int64, device=self.device)
        set_sums = torch.zeros(2, self.num_sets, dtype=torch.float64, device=self.device) if self.num_sets > 1 else None
        batches = _with_last(micro_batches)
        for is_last, micro_batch in batches:
            if should_abandon():
                return None
            self._seed(micro_batch.first_ordinal)
            self.deepspeed.set_gradient_accumulation_boundary(is_last)
            with self._forward:
                loss = self._loss_sum(micro_batch, fed, set_sums)
            # DeepSpeed averages over the ranks; a global sum over a global count wants the sum: times the world.
            self.deepspeed.backward(loss / denominator * self.topology.world_size, scale_wrt_gas=False)
            loss_sum += loss.detach()
        for group in self.adam.param_groups:
            group["lr"] = learning_rate
        grad_norm = self._clip_unwrapped() if self.stage == 0 else None
        self.deepspeed.step()
        is_applied = self.config.precision != "fp16" or self.deepspeed.was_step_applied()
        if grad_norm is None:
            grad_norm = float(self.deepspeed.get_global_grad_norm()) if is_applied else math.inf
        return Applied(loss_sum, grad_norm, fed, is_applied, set_sums, self._forward.take())

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits [rows, length, vocab] in evaluation mode; under ZeRO 3 every rank must call it equally often."""
        self.deepspeed.eval()
        return packed_logits(self.deepspeed, tokens.to(self.device), positions.to(self.device))

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

    def _loss_sum(self, micro_batch: Any, fed: torch.Tensor, set_sums: torch.Tensor | None) -> torch.Tensor:
        tokens, targets, positions = (
            getattr(micro_batch, name).to(self.device) for name in ("tokens", "targets", "positions")
        )
        if len(micro_batch.rows):  # else it is one row of padding, to keep the other ranks company
            fed += self._fed(tokens, targets, positions)
        log_probs = target_log_probs(packed_logits(self.deepspeed, tokens, positions), tokens, targets)
        if set_sums is not None:  # a by-product: the loss that is optimised does not depend on it
            set_sums += sums_by_set(log_probs.detach(), targets, micro_batch.sets.to(self.device), self.num_sets)
        return -log_probs.sum()

    def _fed(self, *batch: torch.Tensor) -> torch.Tensor:
        """What the ledger holds of the very tensors that the model is given."""
        if self._ledger_keys is None:
            self._ledger_keys = torch.from_numpy(ledger.keys(self.config.seed, batch[0].shape[1])).to(self.device)
        sums = [ledger.row_hashes(*batch, of_function).sum() for of_function in self._ledger_keys]
        return torch.stack([torch.full_like(sums[0], len(batch[0])), *sums])

    def _seed(self, ordinal: int) -> None:
        """Randomness belongs to the data: the draws of a micro-batch depend on its first row, never on the rank."""
        state = np.random.SeedSequence([self.config.seed, ordinal]).generate_state(1, np.uint64)[0]
        torch.manual_seed(int(state >> np.uint64(1)))

    def _clip_unwrapped(self) -> float:
        parameters = [p for p in self.deepspeed.module.parameters() if p.grad is not None]
        limit = self.config.max_grad_norm or float("inf")
        return float(torch.nn.utils.clip_grad_norm_(parameters, limit))


def _initialize(model: torch.nn.Module, adam: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    # On a CPU, DeepSpeed would compile this shared-memory op for minutes, and needs a compiler; gloo does the work.
    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    return deepspeed.initialize(model=model, optimizer=adam, config=config, dist_init_required=False)[0]


def _with_last(items: Iterable[Any]) -> Iterator[tuple[bool, Any]]:
    """Each item with whether it is the last one.

    >>> list(_with_last("ab"))
    [(False, 'a'), (True, 'b')]
    """
    iterator = iter(items)
    held = next(iterator)
    for item in iterator:
        yield False, held
        held = item
    yield True, held
