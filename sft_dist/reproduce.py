"""What it takes to have the same run again, as a run file; and whether another run is that one."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from sft_dist.errors import ConfigError, DataError
from sft_dist.files import digest_of, digest_of_block
from sft_dist.identity import changes
from sft_dist.manifest import read_manifest
from sft_dist.schema import ReproducesConfig, RunConfig
from sft_dist.state import TrainState
from sft_dist.topology import processes, start_command
from sft_dist.usage import USAGE, num_nodes, read_usage
from sft_dist.zero import zero_config

RECIPE = "reproduce.yaml"  # in an export
ENVIRONMENT = "environment.json"  # of a run and of its checkpoints: versions and hardware
_AGAIN = "reproduced"  # the run folder of the run that is made again: nothing that is there is touched


def weights_digest(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """32 hexadecimal digits that stand for the fp32 weights of these names, in whatever order they come.

    >>> weights_digest([("a", torch.zeros(2)), ("b", torch.ones(1))]) == weights_digest([("b", torch.ones(1)), ("a", torch.zeros(2))])
    True
    """
    return digest_of({name: digest_of_block(_bytes(values).data) for name, values in weights})


def _bytes(values: torch.Tensor) -> np.ndarray:
    return values.detach().reshape(-1).numpy().view(np.uint8)


def environment_of(folder: Path) -> dict[str, str]:
    """Versions and hardware of the life that wrote a run folder or a checkpoint; {} of those that are older than this file."""
    try:
        return {str(key): str(value) for key, value in json.loads((folder / ENVIRONMENT).read_text()).items()}
    except (FileNotFoundError, ValueError, AttributeError):
        return {}


def sources_of(folders: Iterable[Path]) -> dict[str, str]:
    """The digests of the files that the shards in these folders were made of; {} of folders that are not here."""
    found: dict[str, str] = {}
    for folder in folders:
        try:
            found |= json.loads((folder / "prepare.json").read_text())["sources"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def recipe(
    run_dir: Path, checkpoint: Path, config: RunConfig, state: TrainState, weights: str, caveats: list[str]
) -> str:
    """The run file that gives the run of this checkpoint again, until its step; `weights`: their digest."""
    manifest = read_manifest(checkpoint)
    wanted = ReproducesConfig(
        step=state.step,
        world_size=manifest["world_size"],
        zero=zero_config(config.zero),
        environment=environment_of(checkpoint),
        identity=dict(manifest["identity"]),
        sources=sources_of(map(Path, config.shards_dirs)),
        ledger=state.ledger.text,
        weights=weights,
        caveats=caveats,
    )
    values = config.model_dump(by_alias=True, mode="json") | {"run_dir": _AGAIN}
    if config.prepare is not None:
        values["prepare"] |= {"out": f"{_AGAIN}/shards"}
    # clocks and prices do not make the same weights: what ends it is the step that was exported
    values["budget"] = {"max_tokens": config.budget.max_tokens if _is_over(run_dir, state.step) else state.tokens}
    # who has the run again need not have its accounts, and must not write into its charts
    values["logging"] = {"wandb": None, "mlflow": None}
    values["reproduces"] = wanted.model_dump()
    return _head(run_dir, config, wanted) + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _is_over(run_dir: Path, step: int) -> bool:
    for file in (run_dir / "verdicts").glob("*.json"):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a damaged one says nothing
            verdict = json.loads(file.read_text())
            if (verdict["reason"], verdict["step"]) == ("completed", step):
                return True
    return False


def caveats_of(run_dir: Path, state: TrainState) -> Iterator[str]:
    """Why a run file alone may not give the weights of this run again."""
    yield from state.notes
    worlds = sorted({line["gpus"] for line in read_usage(run_dir / USAGE)})
    if len(worlds) > 1:
        yield f"the lives of the run had {', '.join(map(str, worlds))} processes, so that their sums were rounded otherwise"


def commands(run_dir: Path, config: RunConfig, world_size: int) -> list[str]:
    """What is typed for it, in a folder where the files are that the run file names."""
    nodes = num_nodes(read_usage(run_dir / USAGE), world_size)
    lines = [f"sft-dist prepare {RECIPE}"] * (config.prepare is not None)
    return [*lines, start_command(RECIPE, world_size, nodes), f"sft-dist verify {_AGAIN}"]


def _head(run_dir: Path, config: RunConfig, wanted: ReproducesConfig) -> str:
    told = "; ".join(wanted.environment.values()) or "versions that were not recorded"
    sets = (
        ""
        if config.prepare is not None
        else "\n# Its sets are prepared ones: each is prepared by the run file of its own."
    )
    lines = commands(run_dir, config, wanted.world_size)
    caveats = "".join(f"\n# But: {line}" for line in wanted.caveats)
    return (
        "# The run that made this model, every key resolved. In any folder where the files are that it names:\n"
        + "\n".join(f"#   {line}" for line in lines)
        + f"\n# The weights are the same to the bit on {processes(wanted.world_size)} with the same versions and hardware:\n"
        f"#   {told}{sets}{caveats}\n"
    )


def require_same(wanted: ReproducesConfig | None, identity: Mapping[str, Any], config: RunConfig) -> None:
    """Refuse to begin a run that cannot be the one it is to be again. Raises DataError or ConfigError, naming what differs."""
    if wanted is None:
        return
    sources = sources_of(map(Path, config.shards_dirs))
    for name, digest in wanted.sources.items():
        if name in sources and sources[name] != digest:
            raise DataError(f"reproduces.sources: {name} is not the file that it was; take the one of digest {digest}")
    for key, (then, now) in changes(wanted.identity, json.loads(json.dumps(dict(identity)))).items():
        raise DataError(
            f"reproduces.identity: {key} was {then!r} and is {now!r} here: this cannot be the same run. Prepare with the file "
            "as it is, or remove the section reproduces"
        )
    if zero_config(config.zero) != wanted.zero:
        raise ConfigError(
            f"zero: {config.zero} does not say what it said then; write {json.dumps(wanted.zero)} into it, or remove the section "
            "reproduces"
        )


def differences(wanted: ReproducesConfig, checkpoint: Path) -> list[str]:
    """Why the weights of a checkpoint may differ in their last bits from those that it is to have."""
    world_size, found = read_manifest(checkpoint)["world_size"], environment_of(checkpoint)
    made = [f"{processes(world_size)} in place of {wanted.world_size}"] if world_size != wanted.world_size else []
    for name, then in wanted.environment.items():
        if found.get(name) != then:
            made.append(f"{found.get(name, 'an unknown ' + name)} in place of {then}")
    return made + wanted.caveats
