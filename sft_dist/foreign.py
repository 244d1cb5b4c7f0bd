"""Checkpoints of others: a DeepSpeed `global_step*` folder (ZeRO 1-3), alone or in a Hugging Face Trainer's checkpoint.

Their files are pickles, and a pickle is a program. None is run: what a file would import is listed first, anything that
tensors and plain values do not need is refused by name, and the rest goes through torch's restricted unpickler, with
inert stand-ins where DeepSpeed's classes would be. Only then are sizes compared, and only then is memory taken.
"""

from __future__ import annotations

import math
import pickletools
import re
import zipfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from sft_dist.errors import CheckpointError
from sft_dist.layout import MOMENTS


class _Inert:
    """Stands where a pickle names a class of DeepSpeed: takes any state, keeps nothing, runs nothing."""

    def __setstate__(self, state: object) -> None: ...


_STAND_INS = {
    "deepspeed.runtime.zero.config.ZeroStageEnum": int,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": _Inert,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": _Inert,
    "deepspeed.utils.tensor_fragment.fragment_address": _Inert,
}
# Far fewer than torch allows by default: these files need no bytearray, whose argument is a size.
_PLAIN = {
    *("collections.OrderedDict", "torch.Size", "torch.Tensor", "torch.device", "torch.nn.parameter.Parameter"),
    *("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "torch._tensor._rebuild_from_type_v2"),
    *(f"torch.{name}Storage" for name in ("Float", "BFloat16", "Half", "Double", "Long", "Int", "Bool", "Byte")),
    *(f"torch.{name}" for name in ("float32", "bfloat16", "float16", "float64", "int64", "int32", "bool", "uint8")),
}
_MODEL = re.compile(r"(?:zero_pp_rank_(0|[1-9]\d*)_)?mp_rank_00_model_states\.pt")
_SAVE = re.compile(r"(checkpoint-|global_step)([0-9]{1,18})")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(0|[1-9]\d*)_mp_rank_00_optim_states\.pt")
_ANOTHER = "Take another checkpoint, or load it with the DeepSpeed that wrote it and save again"
_ADAM_ONLY = "Only runs of Adam or AdamW can be taken over; start from the exported weights instead"
_Views = tuple[str, tuple[int, ...], dict[str, list[torch.Tensor]]]  # a parameter's name, its shape, its parts by kind


class _IncompleteError(CheckpointError):
    """Files are missing: an older checkpoint may be whole."""


@dataclass(frozen=True, slots=True)
class Foreign:
    """The state after `step` optimizer steps of DeepSpeed's count, of which Adam took `adam_step` (fp16 skips some).

    `values` maps a parameter's name to its "master", "exp_avg" and "exp_avg_sq", each fp32 [numel], and a frozen one's to
    its "master" alone; tied weights are there once. `samples`: rows consumed by all ranks, None where DeepSpeed did not say.
    """

    step: int
    adam_step: int
    zero_stage: int
    world_size: int
    samples: int | None
    values: dict[str, dict[str, torch.Tensor]]
    shapes: dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class _Rank:
    """One rank's optimizer file: `parts[kind][group]`, flat partitions; `gaps[group]`, elements left free after each parameter."""

    path: Path
    stage: int
    step: int
    partitions: int
    parts: dict[str, list[torch.Tensor]]
    gaps: list[list[Any]]


def find(folder: Path) -> Path:
    """The folder of rank files that `folder` means: itself, the one its `latest` names, or its newest whole save.

    Those are a Trainer's checkpoint-N and DeepSpeed's global_stepN, the highest number first.

    Raises CheckpointError if there is none, or if `latest` leads out of its folder.

    >>> find(Path("outputs"))  # doctest: +SKIP
    PosixPath('outputs/checkpoint-500/global_step500')
    """
    if (folder / "zero").is_dir() or any(folder.glob("*_states.pt")):
        return folder
    if (folder / "latest").is_file():
        return _latest(folder)
    saves = [match for path in folder.glob("*") if (match := _SAVE.fullmatch(path.name))]
    for match in sorted(saves, key=lambda match: int(match[2]), reverse=True):
        path = folder / match[0]
        is_trainers = match[1] == "checkpoint-"  # which writes trainer_state.json last
        if is_trainers and not ((path / "latest").is_file() and (path / "trainer_state.json").is_file()):
            continue
        try:
            path = _latest(path) if is_trainers else path
            _complete(path)
        except _IncompleteError:
            continue  # stopped while it saved
        return path
    looked_for = "no rank files (*_states.pt), no file `latest`, no checkpoint-N or global_stepN that is whole"
    raise _error(folder, f"not a DeepSpeed checkpoint: {looked_for}", "Name a global_step* folder or its parent")


def read(folder: Path) -> Foreign:
    """The state that all ranks' files in a `global_step*` folder hold together, whole and unpadded, on the CPU.

    Takes 12 bytes of memory a trained parameter, once all sizes agree; reads each file twice, to verify its checksums.
    Raises CheckpointError for what is missing, damaged, unsafe, or of a kind that cannot be taken over.

    >>> made = read(Path("outputs/checkpoint-500/global_step500"))  # doctest: +SKIP
    >>> made.shapes["transformer.wte.weight"], made.values["transformer.wte.weight"]["master"].shape  # doctest: +SKIP
    ((50257, 768), torch.Size([38597376]))
    """
    try:
        return _read(folder)
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # a well-formed file may still hold anything in any place
        raise _error(folder, f"not the content that DeepSpeed saves ({type(error).__name__}: {error})") from error


def _read(folder: Path) -> Foreign:
    model, models, optimizers = _complete(folder)
    ranks = [_rank(path) for path in optimizers]
    first = ranks[0]
    _check_alike(ranks, is_partitioned=models[0].name.startswith("zero_"))
    groups = model["param_shapes"]
    if not len(groups) == len(first.parts["master"]) == len(first.gaps):
        raise _error(models[0], f"shapes of {len(groups)} parameter groups, state of {len(first.parts['master'])}")
    if len({id(group) for group in groups}) != len(groups):  # a few bytes could repeat a long group any number of times
        raise _error(models[0], "a parameter group is there twice")
    groups = [_shapes(group, models[0]) for group in groups]
    views = [view for number, shapes in enumerate(groups) for view in _trained(number, shapes, ranks)]
    of_frozen = _frozen_partitioned if first.stage == 3 else _frozen_whole
    views += of_frozen(model, models, {name for name, *_ in views})
    names = [name.removeprefix("module.") for name, *_ in views]
    if len(set(names)) != len(names):
        raise _error(models[0], "two parameters have the same name")
    samples = model.get("global_samples")
    return Foreign(
        step=_count(model["global_steps"], models[0], "global_steps"),
        adam_step=first.step,
        zero_stage=first.stage,
        world_size=len(ranks),
        samples=None if samples is None else _count(samples, models[0], "global_samples"),
        values={
            name: {kind: torch.cat([part.float() for part in parts]) for kind, parts in of_kinds.items()}
            for name, (_, _, of_kinds) in zip(names, views, strict=True)
        },
        shapes={name: shape for name, (_, shape, _) in zip(names, views, strict=True)},
    )


def _latest(folder: Path) -> Path:
    with (folder / "latest").open(encoding="utf-8", errors="replace") as file:
        tag = file.read(256).strip()
    if not re.fullmatch(r"[A-Za-z0-9_.+-]{1,200}", tag) or (folder / tag).resolve().parent != folder.resolve():
        raise _error(folder / "latest", f"{tag!r} does not name a folder beside it", "Name the global_step* folder")
    if not (folder / tag).is_dir():
        raise _IncompleteError(f"{folder / tag}: `latest` names it, but it is not there. {_ANOTHER}")
    return folder / tag


def _complete(folder: Path) -> tuple[dict[str, Any], list[Path], list[Path]]:
    """(content of the first model file, model files, optimizer files), of as many ranks as the first says there were."""
    if (folder / "zero").is_dir():
        raise _error(folder, "a universal checkpoint", "Take the global_step* folder that it was converted from")
    models: dict[int, Path] = {}
    optimizers: dict[int, Path] = {}
    for path in sorted(folder.glob("*_states.pt")):
        match = _MODEL.fullmatch(path.name) or _OPTIMIZER.fullmatch(path.name)
        if not match:
            raise _error(path, "of a model-parallel, pipeline or mixture-of-experts run, which cannot be taken over")
        of_kind = models if match.re is _MODEL else optimizers
        if of_kind.setdefault(int(match[1] or 0), path) != path:
            raise _error(path, f"of the same rank as {of_kind[int(match[1] or 0)].name}: two saves, one over the other")
    if 0 not in models:
        raise _IncompleteError(
            f"{folder}: mp_rank_00_model_states.pt, the model file of rank 0, is missing. {_ANOTHER}"
        )
    model = _load(models[0])
    if _count(model.get("mp_world_size", 1), models[0], "mp_world_size") != 1:
        raise _error(models[0], "of a model-parallel run, which cannot be taken over")
    if model.get("param_shapes") is None:
        raise _error(models[0], "of a run at ZeRO stage 0, whose layout cannot be taken over")
    world = _count(model.get("dp_world_size"), models[0], "dp_world_size")
    for kind, found in {"optimizer": optimizers, "model": models}.items():
        wanted = world if kind == "optimizer" or models[0].name.startswith("zero_") else 1
        absent = next((rank for rank in range(wanted) if rank not in found), None)
        if absent is not None:
            raise _IncompleteError(f"{folder}: the {kind} file of rank {absent} (of {wanted}) is missing. {_ANOTHER}")
        if len(found) != wanted:
            raise _error(
                folder, f"{kind} files of {len(found)} ranks, of a run on {wanted}: two saves, one over the other"
            )
    return model, [models[rank] for rank in sorted(models)], [optimizers[rank] for rank in range(world)]


def _load(path: Path) -> dict[str, Any]:
    """The content of one file, its tensors mapped into memory and not read."""
    try:
        refused = _imports(path) - _PLAIN - _STAND_INS.keys()
        if refused:
            wanted = ", ".join(sorted(refused))
            raise _error(path, f"wants {wanted}, which no checkpoint needs; it was not run", "Do not use this file")
        with torch.serialization.safe_globals([(stand_in, name) for name, stand_in in _STAND_INS.items()]):
            return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except CheckpointError:
        raise
    except Exception as error:  # whatever a damaged or hostile file can provoke
        about = str(error).partition("\n")[0] or type(error).__name__
        raise _error(path, f"cannot be read as a file of torch.save since 1.6 without running it: {about}") from error


def _imports(path: Path) -> set[str]:
    """What the file's pickle would import, found without running it; every record is verified against its checksum."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        # torch looks records up whatever their case: of data.pkl and DATA.PKL it may load the one not looked at here
        pickles = [record for record in records if PurePosixPath(record.filename).name.lower() == "data.pkl"]
        is_stored = all(record.compress_type == zipfile.ZIP_STORED for record in records)
        if len(pickles) != 1 or not is_stored or sum(record.file_size for record in records) > path.stat().st_size:
            raise _error(path, "not laid out as torch.save lays out an archive")
        damaged = archive.testzip()
        if damaged is not None:
            raise _error(path, f"{damaged} fails its checksum: damaged since it was written")
        codes = pickletools.genops(archive.read(pickles[0]))
        return {str(argument).replace(" ", ".") for code, argument, _ in codes if code.name in ("GLOBAL", "INST")}


def _rank(path: Path) -> _Rank:
    state = _load(path)["optimizer_state_dict"]
    stage = _count(state.get("zero_stage", 1), path, "zero_stage")  # DeepSpeed's BF16_Optimizer, at stage 1, is silent
    adam = state["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]
    masters = state["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"]
    if not isinstance(adam, dict):
        raise _error(path, "an elastic checkpoint", 'Save it again with "elastic_checkpoint": false')
    settings, states = adam["param_groups"], list(adam["state"].values())
    if not all(map(_is_adam, settings)) or not all({*MOMENTS} <= one.keys() <= {"step", *MOMENTS} for one in states):
        raise _error(path, "its optimizer is not Adam(W)", _ADAM_ONLY)
    if len(states) != len(masters):
        raise _error(path, f"Adam's state of {len(states)} of {len(masters)} partitions: saved before the first step?")
    steps = {_count(one.get("step", settings[0].get("step")), path, "step") for one in states}
    if len(steps) != 1:
        raise _error(path, f"Adam counts {sorted(steps)} steps where one number is due")
    parts = {"master": masters, **{kind: [one[kind] for one in states] for kind in MOMENTS}}
    parts = {kind: [_flat(part, path, kind) for part in of_kind] for kind, of_kind in parts.items()}
    _check_bytes([part for of_kind in parts.values() for part in of_kind], path)
    counts = state["partition_count"]
    partitions = max(_count(one, path, "partition_count") for one in (counts if isinstance(counts, list) else [counts]))
    gaps = state.get("param_alignment_paddings") or [[]] * len(masters)
    return _Rank(path, stage, steps.pop(), partitions, parts, gaps)


def _is_adam(settings: dict[str, Any]) -> bool:
    """LAMB and RAdam keep the same moments, but other settings; AMSGrad and uncorrected Adam go on differently."""
    is_known = settings.keys() >= {"betas", "eps"} and not settings.keys().isdisjoint({"amsgrad", "bias_correction"})
    is_other = settings.get("amsgrad") or not settings.get("bias_correction", True) or "max_coeff" in settings
    return is_known and not is_other


def _check_alike(ranks: list[_Rank], is_partitioned: bool) -> None:
    wanted = (ranks[0].stage, ranks[0].step, len(ranks), len(ranks[0].parts["master"]))
    for rank in ranks:
        about = (rank.stage, rank.step, rank.partitions, len(rank.parts["master"]))
        if about != wanted or rank.stage not in (1, 2, 3) or (rank.stage == 3) != is_partitioned:
            raise _error(rank.path, f"(ZeRO stage, Adam's step, ranks, groups) {about} do not fit {wanted} elsewhere")


def _trained(number: int, shapes: dict[str, tuple[int, ...]], ranks: list[_Rank]) -> Iterator[_Views]:
    """The parameters of a group, each as views which, joined, are the whole.

    ZeRO 1 and 2 join a group's parameters and cut that into a partition a rank; ZeRO 3 cuts each parameter, and joins a
    rank's partitions. Both pad at the end, and neither needs the padding to be read.
    """
    world, path, is_stage_3 = len(ranks), ranks[0].path, ranks[0].stage == 3
    gaps = ranks[0].gaps[number] or [0] * len(shapes)
    numels = [math.prod(shape) for shape in shapes.values()]
    padded = [n + _count(gap, path, "padding") for n, gap in zip(numels, gaps, strict=True)]
    lengths = [-(-n // world) for n in numels] if is_stage_3 else padded
    pieces = {kind: [rank.parts[kind][number] for rank in ranks] for kind in ranks[0].parts}
    for kind, of_kind in pieces.items():
        sizes, wanted = [len(piece) for piece in of_kind], sum(lengths)
        is_right = wanted <= sum(sizes) < wanted + 2 * world  # padded to two elements a rank
        is_right &= len(set(sizes)) == 1 or kind == "master"  # whose padding some versions leave out
        if not (set(sizes) == {wanted} if is_stage_3 else is_right):
            raise _error(path, f"partitions of {sizes[:8]} elements do not make up {wanted} of {kind}, group {number}")
    start = 0
    for (name, shape), numel, length in zip(shapes.items(), numels, lengths, strict=True):
        if is_stage_3:
            mine = {kind: [piece[start : start + length] for piece in of_kind] for kind, of_kind in pieces.items()}
            yield name, shape, {kind: _cut(of_kind, 0, numel) for kind, of_kind in mine.items()}
        else:
            yield name, shape, {kind: _cut(of_kind, start, numel) for kind, of_kind in pieces.items()}
        start += length


def _frozen_whole(model: dict[str, Any], models: list[Path], trained: set[str]) -> list[_Views]:
    """ZeRO 1 and 2: what the model file holds beside trained weights, their other names, and buffers."""
    known = trained.union(model["buffer_names"], model["shared_params"])
    weights = {name: weight for name, weight in model["module"].items() if name not in known}
    flat = {name: _flat(weight, models[0], name) for name, weight in weights.items()}
    _check_bytes(flat.values(), models[0])
    return [(name, tuple(weights[name].shape), {"master": [one]}) for name, one in flat.items()]


def _frozen_partitioned(model: dict[str, Any], models: list[Path], trained: set[str]) -> list[_Views]:
    """ZeRO 3: every rank's model file holds its partition of each frozen weight."""
    shapes = _shapes(model["frozen_param_shapes"] or {}, models[0])
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in shapes}
    for path in models if shapes else ():
        fragments = _load(path)["frozen_param_fragments"]
        for name, shape in shapes.items():
            part = _flat(fragments[name], path, name)
            if len(part) != -(-math.prod(shape) // len(models)):
                raise _error(
                    path, f"{len(part)} elements of {name} {shape} are not the part of one of {len(models)} ranks"
                )
            parts[name].append(part)
        _check_bytes([of_ranks[-1] for of_ranks in parts.values()], path)
    return [(name, shape, {"master": _cut(parts[name], 0, math.prod(shape))}) for name, shape in shapes.items()]


def _cut(pieces: list[torch.Tensor], start: int, numel: int) -> list[torch.Tensor]:
    """Views of the elements [start, start + numel) of the concatenation of `pieces`, at least one.

    >>> _cut([torch.arange(3), torch.arange(3, 6)], 2, 3)
    [tensor([2]), tensor([3, 4])]
    """
    views, at = [], 0
    for piece in pieces:
        low, high = max(0, start - at), max(0, start + numel - at)
        if low < len(piece) and high > 0:
            views.append(piece[low:high])
        at += len(piece)
    return views or [pieces[0][:0]]


def _flat(value: Any, path: Path, name: str) -> torch.Tensor:
    """As a plain one-dimensional tensor, without the attributes that a pickle may have hung on it."""
    one = torch.Tensor.detach(value)
    if not (one.is_floating_point() and one.device.type == "cpu" and one.is_contiguous()):
        raise _error(path, f"{name} is {one.dtype} with strides {one.stride()}: contiguous floating point is due")
    return one.view(-1)


def _check_bytes(tensors: Collection[torch.Tensor], path: Path) -> None:
    """A few stored bytes, viewed often, could claim to be any number."""
    claimed, held = sum(one.nbytes for one in tensors), path.stat().st_size
    if claimed > held:
        raise _error(path, f"claims {claimed:,} bytes of tensors, and has {held:,}")


def _shapes(shapes: dict[str, Any], path: Path) -> dict[str, tuple[int, ...]]:
    for name, shape in shapes.items():
        if len(shape) > 32 or not all(isinstance(length, int) and 0 <= length < 2**48 for length in shape):
            raise _error(path, f"{name}: ({', '.join(map(_shown, shape[:32]))}) is not a shape")
    return {name: tuple(shape) for name, shape in shapes.items()}


def _count(value: Any, path: Path, name: str) -> int:
    if isinstance(value, torch.Tensor) and torch.Tensor.numel(value) == 1:
        value = torch.Tensor.item(value)
    if not isinstance(value, int | float) or not 0 <= value < 2**53 or value != int(value):
        raise _error(path, f"{name} = {_shown(value)} is not a count")
    return int(value)


def _shown(value: Any) -> str:
    """A plain value as text, of others the type: written out, lists that hold another list twice double at each level.

    >>> _shown(-1), _shown([[], []])
    ('-1', 'a list')
    """
    return f"{value!r:.80}" if isinstance(value, int | float | str | None) else f"a {type(value).__name__}"


def _error(path: Path, text: str, remedy: str = _ANOTHER) -> CheckpointError:
    """Of what a file says, a terminal is shown only what it can print, and not more than 2,000 characters."""
    shown = "".join(char if char.isprintable() else "?" for char in text[:2000])
    return CheckpointError(f"{path}: {shown}. {remedy}")
