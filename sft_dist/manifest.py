"""What a complete checkpoint is: its manifest verifies, and each byte is the one that was written when it is read.

Nothing here is ever unpickled, and nothing that a manifest says is used before it has been checked.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path, PurePosixPath
from typing import Any

from sft_dist.errors import CheckpointError, OtherCheckpointError
from sft_dist.files import BLOCK_BYTES, digest_of, write_blocks
from sft_dist.layout import Fragment
from sft_dist.retention import list_folders, score_at
from sft_dist.state import TrainState
from sft_dist.store import Reader, blocks_of, check_index, opened, read_whole

FORMAT_VERSION = 2
_log = logging.getLogger("sft_dist")


def write_manifest(folder: Path, about: Mapping[str, Any]) -> None:
    """Write the last file of a checkpoint; it vouches for the others and for itself. Raises OSError."""
    manifest = {"format_version": FORMAT_VERSION, "block_bytes": BLOCK_BYTES, **about}
    write_blocks(folder / "manifest.json", _dump({**manifest, "digest": digest_of(manifest)}))


def none_is_whole(folder: Path, damage: list[tuple[Path, str]], *, is_one_of_many: bool = False) -> CheckpointError:
    """The error of falling past the last checkpoint; `is_one_of_many`: only one was asked for, and there are others."""
    if is_one_of_many:
        return CheckpointError(f"{damage[0][1]}; name another step, or none: then the newest whole one is used")
    return CheckpointError(
        f"{folder}: none of {len(damage)} checkpoints is whole ({damage[0][1]}). "
        "Restore one from a backup, or start over with --fresh (the damaged ones are kept)"
    )


def _dump(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps(manifest, separators=(",", ":")).encode()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder, after everything that it says of itself, its files and its runs has been checked.

    Raises CheckpointError naming the file and what is wrong.
    """
    file = path / "manifest.json"
    try:
        text = _read_manifest_text(file)
        manifest = json.loads(text)
        digest = manifest.pop("digest")
        if digest != digest_of(manifest) or _dump({**manifest, "digest": digest}) != text:
            raise ValueError("its bytes are not the ones that were written")
        version = manifest["format_version"]
        if version != FORMAT_VERSION:
            raise OtherCheckpointError(
                f"{path}: format version {version}, this program reads {FORMAT_VERSION}; continue with the version of "
                "sft-dist that wrote it, or start over with --fresh (nothing is deleted)"
            )
        _check_files(path, manifest["files"], manifest["block_bytes"])
        check_index(manifest["tensors"], manifest["files"])
        dict(manifest["identity"])
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(f"{file}: {type(error).__name__}: {error}") from None
    return manifest


_MANIFEST_LIMIT = 1 << 31  # bytes


def _read_manifest_text(file: Path) -> bytes:
    with opened(file) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > _MANIFEST_LIMIT:
            raise ValueError(f"{size:,} bytes, more than any manifest has")
        with open(descriptor, "rb", closefd=False) as whole:
            return whole.read(size)


def _check_files(folder: Path, files: Mapping[str, Any], block_bytes: int) -> None:
    """Names stay in the folder, and lead out of it by no link; sizes agree with the number of digests."""
    if block_bytes != BLOCK_BYTES:
        raise ValueError(f"blocks of {block_bytes!r} bytes; this program reads {BLOCK_BYTES}")
    for name, entry in files.items():
        parts = PurePosixPath(name).parts
        if not parts or name != "/".join(parts) or ".." in parts or PurePosixPath(name).is_absolute():
            raise ValueError(f"{name!r} is not a file of this folder")
        size, blocks = entry["bytes"], entry["blocks"]
        if type(size) is not int or size < 0 or len(blocks) != -(-size // BLOCK_BYTES):
            raise ValueError(f"{name}: {size!r} bytes in {len(blocks)} blocks")
    for inner in {above for name in files for above in PurePosixPath(name).parents}:
        if inner != PurePosixPath(".") and (folder / inner).is_symlink():
            raise ValueError(f"{inner} is a link, which no save makes")


def verify(path: Path) -> str | None:
    """None when every file is there with its digests, else what is wrong, naming the file."""
    try:
        for name, entry in read_manifest(path)["files"].items():
            for _ in blocks_of(path / name, entry):
                pass
    except CheckpointError as error:
        return str(error)
    return None


def read_state(path: Path, manifest: Mapping[str, Any] | None = None) -> TrainState:
    """The training state of a checkpoint folder, checked. Raises CheckpointError."""
    manifest = manifest or read_manifest(path)
    try:
        text = read_whole(path / "state.json", manifest["files"]["state.json"])
        if unknown := sorted(json.loads(text).keys() - {field.name for field in fields(TrainState)}):
            raise OtherCheckpointError(
                f"{path / 'state.json'}: holds {unknown[0]!r}, which this version of sft-dist does not know; continue with the "
                "version that wrote it, or start over with --fresh (nothing is deleted)"
            )
        return TrainState.from_json(text)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path / 'state.json'}: {type(error).__name__}: {error}") from None


def read_small(path: Path, manifest: Mapping[str, Any]) -> TrainState:
    """Check every file that holds no tensors; returns the state. Raises CheckpointError."""
    for name, entry in manifest["files"].items():
        if name not in manifest["tensors"]["shards"]:
            read_whole(path / name, entry)
    return read_state(path, manifest)


def masters(
    folder: Path, fragments_of: Callable[[Path], Iterable[Fragment]], *, is_best: bool = False
) -> tuple[Path, TrainState] | None:
    """Fill what `fragments_of(checkpoint folder)` gives from the newest whole checkpoint, or from that of the best score.

    The newest where none has a score. None: there is no checkpoint. Damaged ones are named in a warning, passed over, and left where they are. Raises CheckpointError when all are damaged.
    """
    damage = []
    ordered = list_folders(folder)[::-1]
    if is_best:
        scores = {path: math.inf if (score := score_at(path)) is None else score for path in ordered}
        ordered.sort(key=scores.__getitem__)
    for path in ordered:
        try:
            manifest = read_manifest(path)
            state = read_small(path, manifest)
            Reader(path, manifest).fill(fragments_of(path))
            return path, state
        except OtherCheckpointError:
            raise
        except CheckpointError as error:
            _log.warning("checkpoint passed over: %s", error)
            damage.append((path, str(error)))
    if damage:
        raise none_is_whole(folder, damage)
    return None
