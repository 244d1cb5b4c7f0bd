"""A little run's checkpoints for the unit tests, and ways to damage and forge them."""

import json

import torch

from sft_dist.checkpoint import Checkpoints
from sft_dist.files import digest_of
from sft_dist.layout import MOMENTS, Fragment
from sft_dist.manifest import masters, read_manifest
from sft_dist.retention import Retention
from sft_dist.state import TrainState
from sft_dist.store import Reader

IDENTITY = {"model": "m1", "data": "d1", "tokenizer": "t1", "global_batch_rows": 8}
SHAPES = {"weight": (3, 4), "bias": (3,)}


def fragments(seed):
    """A whole little model as one rank holds it, moments included."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for name, shape in SHAPES.items():
        length = torch.Size(shape).numel()
        values = {kind: torch.randn(length, generator=generator) for kind in ("master", *MOMENTS)}
        made.append(Fragment(name, length, 0, values))
    return made


def equal(one, other):
    return all(
        torch.equal(a.values[kind], b.values[kind]) for a, b in zip(one, other, strict=True) for kind in a.values
    )


def checkpoints(tmp_path, comms, *, keep_last=5, **identity):
    attachments = tmp_path / "attachments"
    (attachments / "model" / "deep").mkdir(parents=True, exist_ok=True)
    (attachments / "run.yaml").write_text("train: {micro_batch_rows: 1}\n")
    (attachments / "model" / "config.json").write_text("{}")
    (attachments / "model" / "deep" / "more.txt").write_text("more")
    return Checkpoints(
        tmp_path / "checkpoints",
        identity={**IDENTITY, **identity},
        attachments={"run.yaml": attachments / "run.yaml", "model": attachments / "model"},
        retention=Retention(keep_last),
        stage=2,
        comms=comms,
    )


def fill(path, live):
    """Read these fragments from one checkpoint."""
    Reader(path, read_manifest(path)).fill(live)


def newest(run):
    """The checkpoint that whoever reads a run alone finds."""
    found = masters(run / "checkpoints", lambda path: fragments(0))
    return found and found[0]


def state(step):
    return TrainState(step, 8 * step, 100 * step, 10 * step, step, 1.5 * step)


def folder_of(run, step):
    return run / "checkpoints" / f"step-{step:08d}"


def files_of(path):
    return sorted(file for file in path.rglob("*") if file.is_file())


def damage(run, step):
    """Flip a bit of the last moment; returns the file."""
    (broken,) = folder_of(run, step).glob("*.safetensors")
    content = bytearray(broken.read_bytes())
    content[-1] ^= 1
    broken.write_bytes(content)
    return broken


def resealed(path, change):
    """Rewrite a manifest with a change, its own digest right: what a forger would do."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest.pop("digest")
    change(manifest)
    manifest["digest"] = digest_of(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest, separators=(",", ":")))


def forge(*keys):
    """A change that sets the value at `keys[:-1]` to the last one."""

    def change(manifest):
        place = manifest
        for key in keys[:-2]:
            place = place[key]
        place[keys[-2]] = keys[-1]

    return change
