"""A tiny model, a few rows, and the plain PyTorch loop that everything distributed must equal."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sft_dist.attention import packed_logits
from sft_dist.comms import Comms
from sft_dist import adapter, fp8
from sft_dist.schema import LoraConfig, ModelConfig, TrainConfig
from sft_dist.batch import derive_batch
from sft_dist.zero import zero_config
from sft_dist.engine import Engine
from sft_dist.head import targets_at
from sft_dist.layers import tile_mlp
from sft_dist.long_rows import Shared
from sft_dist.optimizer import decay_groups
from sft_dist.loss import target_log_probs
from sft_dist.model import build, model_config

ROWS, SEQ_LEN, VOCAB = 8, 16, 64
_WIDE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "mini": {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 1},
    "slim": {"model_type": "gpt2", "n_layer": 1, "n_embd": 2, "n_head": 1},
    "gpt2": {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2},
    "llama": {"model_type": "llama", "num_key_value_heads": 1, **_WIDE},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 1, "sliding_window": 4, **_WIDE},
    "gpt_neox": {"model_type": "gpt_neox", **_WIDE},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 1, "head_dim": 16, **_WIDE},
}


@dataclass
class MicroBatch:
    """What the engine reads of a micro-batch."""

    tokens: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    first_ordinal: int

    @property
    def rows(self) -> range:
        """Row numbers, as a loader would give them."""
        return range(self.first_ordinal, self.first_ordinal + len(self.tokens))

    @property
    def asked(self) -> tuple[torch.Tensor, ...]:
        """What a model is given that is asked how likely the targets are."""
        return (self.tokens, self.positions, *targets_at(self.tokens, self.targets, self.num_targets))

    @property
    def num_documents(self) -> int:
        """The same."""
        return int((self.positions == 0).sum())

    @property
    def num_targets(self) -> int:
        """The same."""
        return int(self.targets[:, 1:].sum())


def rows(step: int, count: int = ROWS) -> MicroBatch:
    """The rows of a step: two documents each, and between 0 and 14 targets, so that a mean of means would be wrong."""
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(VOCAB, (count, SEQ_LEN), generator=generator)
    share = torch.rand((count, 1), generator=generator)
    targets = torch.rand((count, SEQ_LEN), generator=generator) < share
    targets[:, 0] = targets[:, 8] = False
    targets[1] = False
    positions = torch.arange(8).repeat(count, 2)
    return MicroBatch(tokens, targets, positions, step * count)


def micro_batches(step: int, size: int, count: int = ROWS) -> list[MicroBatch]:
    """The same rows, `size` at a time."""
    whole = rows(step, count)
    return [
        MicroBatch(
            *(getattr(whole, name)[at : at + size] for name in ("tokens", "targets", "positions")), step * count + at
        )
        for at in range(0, count, size)
    ]


def model(
    *,
    kind: str = "gpt2",
    dropout: float = 0.0,
    gradient_checkpointing: bool = False,
    lora: LoraConfig | None = None,
) -> torch.nn.Module:
    """A model of some 30,000 parameters, the same wherever it is built; with adapters, if wanted, of its random weights."""
    config = ModelConfig(config=MODELS[kind], dropout=dropout)
    made = model_config(config, vocab_size=VOCAB, seq_len=SEQ_LEN, eos_id=0)
    built = build(config, made, seed=0, gradient_checkpointing=gradient_checkpointing)
    if lora is not None:
        if lora.quantize:
            adapter.quantise(built)
        adapter.add(built, lora, seed=0)
    return built


def train_config(**more) -> TrainConfig:
    """Clipping that bites, decay, a learning rate that moves: whatever could differ between stages does something."""
    values = {
        "global_batch_rows": ROWS,
        "max_steps": 10,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "precision": "fp32",
    }
    return TrainConfig(**{**values, **more})


def engine(topology, stage: int | str, **more) -> tuple[Engine, Comms]:
    """An engine over the tiny model on this rank."""
    torch.set_num_threads(1)
    comms = Comms(topology, torch.device("cpu"))
    of_model = {name: more.pop(name) for name in ("kind", "dropout", "gradient_checkpointing", "lora") if name in more}
    frozen, section = more.pop("frozen", ()), more.pop("section", {})
    config = train_config(**more)
    zero = zero_config(f"ds_configs/zero{stage}.json")
    zero["zero_optimization"] |= section
    if config.precision == "fp16":  # DeepSpeed has it on GPUs only; the arithmetic is there on a CPU too
        from deepspeed.accelerator import get_accelerator

        type(get_accelerator()).is_fp16_supported = lambda self: True
    sharers = config.sequence_parallel
    batch = derive_batch(config, topology.of_sharers(sharers).world_size, 1.0)
    made = model(**of_model)
    if config.mlp_tile_tokens:
        tile_mlp(made, config.mlp_tile_tokens)
    if config.fp8:
        fp8.use(made, comms.device)
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name not in frozen)
    shared = Shared(topology.rank % sharers, sharers, comms.sharers(sharers)) if sharers > 1 else None
    built = Engine(made, zero, config, batch, topology, comms.device, shared=shared)
    if shared:
        built.use_kernel("by_document")
    return built, comms


def learn(made: Engine, comms: Comms, steps: range) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    curve = []
    for step in steps:
        count = made.config.global_batch_rows
        batches = micro_batches(step, made.config.micro_batch_rows, count)
        denominator = int(rows(step, count).targets.sum())
        of_data = comms.topology.of_sharers(made.config.sequence_parallel)
        mine = batches[of_data.rank :: of_data.world_size]
        applied = made.learn(
            mine, denominator=denominator, learning_rate=1e-3, total=lambda one: comms.sum_tensor(one).item()
        )
        curve.append((applied.loss_sum / denominator, applied.grad_norm))
    return curve


def reference(steps: int, *, kind: str = "gpt2") -> list[tuple[float, float]]:
    """The independent witness: one process, plain PyTorch, no accumulation, no DeepSpeed."""
    plain = model(kind=kind).train()
    optimizer = torch.optim.AdamW(decay_groups(plain, 0.1), lr=1e-3)
    curve = []
    for step in range(steps):
        batch = rows(step)
        logits = packed_logits(plain, batch.tokens, batch.positions)
        loss = -target_log_probs(logits, batch.tokens, batch.targets).sum() / batch.targets.sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        curve.append((loss.item(), norm.item()))
    return curve


def assert_same_curve(ours, theirs, *, tolerance: float, drift: float | None = None) -> None:
    """Each step within `tolerance`, and the mean signed residual within `drift` (a tenth of it), which one-sided error fails."""
    ours, theirs = torch.tensor(ours, dtype=torch.float64), torch.tensor(theirs, dtype=torch.float64)
    residual = ours - theirs
    assert residual.abs().max() <= tolerance, residual
    assert residual.mean(dim=0).abs().max() <= (drift if drift is not None else tolerance / 2), residual
