"""What DeepSpeed is told: its own file holds only what it owns, and the run file's part is injected here, once."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sft_dist.batch import Batch
from sft_dist.errors import ConfigError
from sft_dist.schema import TrainConfig

# What the run file owns: in a DeepSpeed file these would be a second, silent opinion.
_OWNED_BY_RUN_FILE = {
    "train_batch_size": "train.global_batch_rows",
    "train_micro_batch_size_per_gpu": "train.micro_batch_rows",
    "gradient_accumulation_steps": "train.global_batch_rows",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.learning_rate and its neighbours",
    "scheduler": "train.schedule",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "data_types": "train.precision",
    "communication_data_type": "train.precision",
}
_DEEPSPEED_KEYS = {
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "comms_logger",
    "wall_clock_breakdown",
    "memory_breakdown",
}


# What a ZeRO section may say. DeepSpeed knows more (NVMe, quantised communication, ZeRO++): checkpoints have not been proved
# for those, and what is not proved is refused.
_ZERO_KEYS = {
    "stage",
    "contiguous_gradients",
    "overlap_comm",
    "reduce_scatter",
    "reduce_bucket_size",
    "allgather_partitions",
    "allgather_bucket_size",
    "sub_group_size",
    "offload_optimizer",
    "offload_param",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_module_granularity_threshold",
}


def zero_config(name: str) -> dict[str, Any]:
    """Read a DeepSpeed file: a path, or `ds_configs/…` of the installed package.

    Raises ConfigError for a missing or broken file, a key that the run file owns, "auto", or an unknown key (DeepSpeed
    would ignore those).
    """
    path = _zero_path(name)
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}; mend that line") from None
    if not isinstance(values, dict) or not isinstance(values.get("zero_optimization", {}), dict):
        raise ConfigError(f"{path}: zero_optimization must be a mapping, as in ds_configs/zero2.json")
    for key in values:
        if key in _OWNED_BY_RUN_FILE:
            raise ConfigError(f"{path}: {key} is owned by the run file; remove it and set {_OWNED_BY_RUN_FILE[key]}")
        if key not in _DEEPSPEED_KEYS:
            close = difflib.get_close_matches(key, _DEEPSPEED_KEYS, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"keys here: {', '.join(sorted(_DEEPSPEED_KEYS))}"
            raise ConfigError(f"{path}: unknown key {key}; DeepSpeed would ignore it silently; {remedy}")
    section = values.get("zero_optimization", {})
    for key in section.keys() - _ZERO_KEYS:
        close = difflib.get_close_matches(key, _ZERO_KEYS, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"keys here: {', '.join(sorted(_ZERO_KEYS))}"
        raise ConfigError(f"{path}: zero_optimization.{key}: not a key this trainer has proved; {remedy}")
    for key in ("offload_optimizer", "offload_param"):
        offload = section.get(key, {"device": "cpu"})
        is_known = (
            isinstance(offload, dict) and offload.get("device") == "cpu" and offload.keys() <= {"device", "pin_memory"}
        )
        if not is_known or (key in section and section.get("stage", 0) < (3 if key == "offload_param" else 1)):
            raise ConfigError(
                f"{path}: zero_optimization.{key}: {offload!r} is not allowed at stage {section.get('stage', 0)}: write "
                '{"device": "cpu"}, with pin_memory or without; the optimizer from stage 1 on, parameters at stage 3'
            )
    autos = [key for key, value in section.items() if value == "auto"]
    if autos:
        raise ConfigError(f'{path}: zero_optimization.{autos[0]}: "auto" means nothing here; write a number')
    if type(section.get("stage", 0)) is not int or section.get("stage", 0) not in (0, 1, 2, 3):
        raise ConfigError(
            f"{path}: zero_optimization.stage: {section['stage']!r} is not one of 0, 1, 2, 3; use one of these"
        )
    return values


def zero_stage(zero: Mapping[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed configuration (0 when it names none)."""
    return zero.get("zero_optimization", {}).get("stage", 0)


def _folders() -> list[Path]:
    package = Path(__file__).parent
    return [folder / "ds_configs" for folder in (package, package.parent)]


def shipped() -> list[str]:
    """The DeepSpeed files of this package, as a run file names them.

    >>> shipped()[0]
    'ds_configs/zero0.json'
    """
    return sorted({f"ds_configs/{path.name}" for folder in _folders() for path in folder.glob("*.json")})


def _zero_path(name: str) -> Path:
    candidates = [Path(name)] + [folder / Path(name).name for folder in _folders() if name.startswith("ds_configs/")]
    for path in candidates:
        if path.is_file():
            return path
    names = [Path(name).name for name in shipped()]
    close = difflib.get_close_matches(Path(name).name, names, n=1)
    hint = f"did you mean ds_configs/{close[0]}?" if close else f"shipped: {', '.join(names)}"
    raise ConfigError(f"zero: {name!r}: no such DeepSpeed file; {hint}")


def deepspeed_config(
    zero: dict[str, Any], config: TrainConfig, batch: Batch, leaves: Sequence[str] = ()
) -> dict[str, Any]:
    """The DeepSpeed configuration of a run: the user's ZeRO file plus what the run file owns.

    Accumulation and reduction are fp32 whatever the precision: with DeepSpeed's default the gradient of 1,920
    micro-batches in bf16 was measured 31 % wrong. `leaves`: classes of modules whose weights stage 3 gathers as a whole.
    """
    if leaves and zero_stage(zero) == 3:
        zero = zero | {"zero_optimization": {**zero["zero_optimization"], "leaf_module": {"classes": list(leaves)}}}
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
