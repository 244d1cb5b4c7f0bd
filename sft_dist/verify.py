"""Proof of what a run consumed and kept: recomputed from the shards, the order and the files, beside what it recorded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.constants import SAFETENSORS_INDEX_FILE
from safetensors import SafetensorError, safe_open

from sft_dist.data.mixture import Joined
from sft_dist.data.shards import RowBatch, Shards
from sft_dist.errors import CheckpointError, DataError, ModelError
from sft_dist.layout import Fragment
from sft_dist.ledger import Ledger, keys, recomputed
from sft_dist.manifest import read_manifest, read_state, verify
from sft_dist.reproduce import differences, weights_digest
from sft_dist.retention import list_folders
from sft_dist.schema import ReproducesConfig
from sft_dist.state import TrainState
from sft_dist.store import Reader, opened

Order = Callable[[np.ndarray], np.ndarray]
Expected = Callable[[Path], dict[str, torch.Tensor]]  # folder of a checkpoint -> flat fp32 weights by name
_ORDINALS, _ROWS = 1 << 20, 1 << 10  # in one go


@dataclass(frozen=True, slots=True)
class Check:
    """One line of a certificate; `is_right` None: it could not be checked, and the text says why."""

    name: str
    is_right: bool | None
    text: str


@dataclass(frozen=True, slots=True)
class Certificate:
    """What was checked of a run.

    >>> print(Certificate("runs/x", (Check("fed", True, "8 rows"), Check("export", None, "there is none"))).text)
    certificate of runs/x
      right        fed           8 rows
      not checked  export        there is none
    VERIFIED: all that could be checked is right
    """

    subject: str
    checks: tuple[Check, ...]

    @property
    def is_right(self) -> bool:
        """Whether nothing is wrong."""
        return all(check.is_right is not False for check in self.checks)

    @property
    def text(self) -> str:
        """For a person."""
        words = {True: "right", False: "WRONG", None: "not checked"}
        lines = [f"  {words[check.is_right]:13}{check.name:14}{check.text}" for check in self.checks]
        wrong = sum(check.is_right is False for check in self.checks)
        verdict = f"NOT VERIFIED: {wrong} wrong" if wrong else "VERIFIED: all that could be checked is right"
        return "\n".join([f"certificate of {self.subject}", *lines, verdict])


def checkpoints(folder: Path) -> Iterator[Check]:
    """Each checkpoint, every byte of it read."""
    for path in list_folders(folder):
        damage = verify(path)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        yield Check("checkpoint", damage is None, damage or f"{path.name}: {size:,} bytes, each as it was written")


def usage(order: Order, num_rows: int, begin: int, end: int, skipped: Sequence[tuple[int, int]] = ()) -> np.ndarray:
    """How often each row is fed by the ordinals [begin, end) of a stream without the skipped ranges: int64 [num_rows].

    >>> usage(lambda ordinals: ordinals % 3, 3, 0, 7, skipped=[(1, 2)]).tolist()
    [3, 1, 2]
    """
    counts = np.zeros(num_rows, np.int64)
    for sign, first, last in [(1, begin, end), *((-1, a, b) for a, b in skipped)]:
        for at in range(first, last, _ORDINALS):
            rows = order(np.arange(at, min(at + _ORDINALS, last)))
            counts += sign * np.bincount(rows, minlength=num_rows)
    return counts


def fed(
    state: TrainState,
    shards: Shards | Joined,
    order: Order,
    seed: int,
    names: Sequence[str] = ("rows",),
    period: int | None = None,
) -> Iterator[Check]:
    """What the ledger says was fed, and what the order says is to be fed, as the shards hold it.

    `period`: ordinals after which each set has been drawn evenly; default: an epoch of the shards.
    """
    counts = usage(order, shards.num_rows, state.begin, state.rows_consumed, state.skipped)
    try:
        wanted = recomputed(_counted(shards, counts), keys(seed, shards.seq_len))
    except DataError as error:
        yield Check("shards", False, str(error))
        return
    yield _same_ledger(state.ledger, wanted)
    whole = -(-state.rows_consumed // (period or shards.num_rows)) * (period or shards.num_rows)
    yield from _epochs(shards, counts, usage(order, shards.num_rows, 0, whole), names)
    ranges = ", ".join(f"{begin:,} to {end - 1:,}" for begin, end in state.skipped)
    yield Check("skipped", True, f"on purpose, and recorded: ordinals {ranges}" if ranges else "no row of the stream")


def _same_ledger(recorded: Ledger, wanted: Ledger) -> Check:
    if recorded == wanted:
        return Check("fed", True, f"{recorded.text}: what the model was given is what the shards and the order say")
    return Check(
        "fed", False, f"the model was given {recorded.text}; the shards and the order say {wanted.text}: a row was fed twice, "
        "left out, or changed on the way",
    )  # fmt: skip


def _epochs(shards: Shards | Joined, counts: np.ndarray, whole: np.ndarray, names: Sequence[str]) -> Iterator[Check]:
    """Each row of a set as often as the epochs say: in `whole`, the stream from its begin to the end of an epoch, each comes
    as often as any other, or once more in a set's own epoch that is not over. `counts` is what of that stream was fed."""
    begin = 0
    for name, one in zip(names, _sets(shards), strict=True):
        mine, all_of_it = counts[begin : begin + one.num_rows], whole[begin : begin + one.num_rows]
        begin += one.num_rows
        times = f"{mine.min()}" if mine.min() == mine.max() else f"{mine.min()} to {mine.max()}"
        is_even = all_of_it.max() - all_of_it.min() <= 1
        told = (
            "" if is_even else f"; over whole epochs {all_of_it.min()} to {all_of_it.max()} times: the order is uneven"
        )
        epochs = mine.sum() / one.num_rows
        yield Check(
            "epochs", bool(is_even), f"{one.num_rows:,} {name}, {epochs:.2f} epochs: each fed {times} times{told}"
        )


def _sets(shards: Shards | Joined) -> Sequence[Shards]:
    return shards.sets if isinstance(shards, Joined) else (shards,)


def _counted(shards: Shards | Joined, counts: np.ndarray) -> Iterator[tuple[RowBatch, np.ndarray]]:
    begin = 0
    for one in _sets(shards):
        for at in range(0, one.num_rows, _ROWS):
            numbers = np.arange(at, min(at + _ROWS, one.num_rows))
            yield one.rows(numbers), counts[begin + numbers]
        begin += one.num_rows


def export(
    out: Path, step: int, dtype: torch.dtype | None, folder: Path, expected: Expected | None = None, more: str = ""
) -> Check:
    """Whether the weights of an export are the fp32 masters of the checkpoint of its step, rounded to its dtype, or to their own.

    `expected`: what to make of a checkpoint, where that is something else, and `more`, how that is said.
    """
    path = folder / f"step-{step:08d}"
    if not path.is_dir():
        return Check("export", None, f"{out}: is of step {step}, whose checkpoint is no longer kept")
    seen, different, found = set(), [], dtype
    try:
        masters = (expected or masters_of)(path)
        for name, values in _weights(out):
            seen.add(name)
            found = dtype or values.dtype
            if name not in masters or not torch.equal(values.view(-1), masters[name].to(found)):
                different.append(name)
    except CheckpointError as error:
        return Check("export", False, str(error))
    except ModelError as error:
        return Check("export", None, str(error))
    different += sorted(masters.keys() - seen)
    if different:
        return Check(
            "export", False, f"{out}: {len(different)} weights are not the masters of step {step}: {different[:3]}"
        )
    return Check(
        "export", True, f"{out}: {len(seen)} weights are the fp32 masters of step {step}{more}, in {str(found)[6:]}"
    )


def masters_of(path: Path) -> dict[str, torch.Tensor]:
    """The fp32 weights of a checkpoint, each flat, by name. Raises CheckpointError."""
    manifest = read_manifest(path)
    for name, entry in manifest["files"].items():
        with opened(path / name, entry):  # as large as it says, before memory is asked for
            pass
    masters = {name: torch.empty(length) for name, length, _ in manifest["tensors"]["parameters"]}
    Reader(path, manifest).fill(Fragment(n, len(m), 0, {"master": m}) for n, m in masters.items())
    return masters


def _weights(out: Path) -> Iterator[tuple[str, Any]]:
    """Every tensor of an export, of one file or of shards with their index. Raises CheckpointError."""
    try:
        for file, names in _files(out).items():
            with safe_open(out / file, "pt") as tensors:
                held = set(tensors.keys())
                for name in sorted(held if names is None else names | held):
                    if name not in held or (names is not None and name not in names):
                        raise CheckpointError(f"{out / file}: {name} is not where the index says")
                    yield name, tensors.get_tensor(name)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{out}: its weights cannot be read ({str(error).splitlines()[0]})") from None


def _files(out: Path) -> dict[str, set[str] | None]:
    """The files of the weights, and the names that the index of shards has for each; None: there is no index."""
    index = out / SAFETENSORS_INDEX_FILE
    if not index.is_file():
        return dict.fromkeys((file.name for file in sorted(out.glob("*.safetensors"))), None)
    files: dict[str, set[str]] = {}
    for name, file in json.loads(index.read_text())["weight_map"].items():
        files.setdefault(Path(file).name, set()).add(name)
    return dict(files)


def reproduced(wanted: ReproducesConfig, folder: Path) -> Iterator[Check]:
    """Whether the run is the one that it is to be again: the rows that it was fed, and its weights to the bit."""
    path = folder / f"step-{wanted.step:08d}"
    if not path.is_dir():
        yield Check("reproduced", None, f"step {wanted.step} was exported then, and is not reached or not kept here")
        return
    try:
        state, masters = read_state(path), masters_of(path)
    except CheckpointError as error:
        yield Check("reproduced", False, str(error))
        return
    is_fed = state.ledger.text == wanted.ledger
    text = f"{wanted.ledger}, as then" if is_fed else f"fed {state.ledger.text}, and then {wanted.ledger}"
    yield Check("reproduced", is_fed or (None if wanted.caveats else False), text)
    if weights_digest(masters.items()) == wanted.weights:
        yield Check(
            "reproduced", True, f"{len(masters)} weights of step {wanted.step} are the same as then, to the bit"
        )
        return
    why = differences(wanted, path)
    told = f"trained with {'; '.join(why)}" if why else "though all that should matter is the same"
    yield Check("reproduced", None if why else False, f"the weights of step {wanted.step} are others, {told}")
