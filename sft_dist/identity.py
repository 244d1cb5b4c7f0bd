"""What makes a run the same run from life to life, and what may be changed on purpose."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sft_dist.errors import CheckpointError

# What `--allow` may name, and the keys of a run's identity that may then differ from the checkpoint's.
ALLOWANCES = {
    "model-change": ("model",),
    "data-change": ("data", "template", "mixture"),
    "tokenizer-change": ("tokenizer",),
    "batch-change": ("global_batch_rows",),
    "seed-change": ("seed",),
    "order-change": ("order",),
}
STREAM = ("data", "template", "mixture", "seed", "order")  # what makes the stream of rows another one


def changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs between two identities: key -> (then, now).

    >>> changes({"seed": 0, "data": "d"}, {"seed": 1, "data": "d"})
    {'seed': (0, 1)}
    """
    return {key: (saved.get(key), now.get(key)) for key in {**now, **saved} if saved.get(key) != now.get(key)}


def require_same(path: Path, saved: Mapping[str, Any], now: Mapping[str, Any], allowed: Collection[str]) -> None:
    """Refuse to continue the checkpoint `path` of another run, but for the `allowed` keys.

    Raises CheckpointError naming both values, and what allows the change on purpose.
    """
    for key, (then, value) in changes(saved, now).items():
        if key not in allowed:
            names = [name for name, keys in ALLOWANCES.items() if key in keys]
            on_purpose = f", or, if it is meant, say --allow {names[0]}" if names else ""
            raise CheckpointError(
                f"{path}: was made with {key} = {then!r}, this run has {value!r}. Continue with the old value, take another "
                f"run_dir, start over with --fresh (nothing is deleted){on_purpose}"
            )
