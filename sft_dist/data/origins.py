"""Which record of which file each document of a shard came from: 12 bytes a document, beside the rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sft_dist.data.records import parted
from sft_dist.errors import DataError
from sft_dist.files import describe, sync

_ORIGIN = np.dtype([("source", "<u4"), ("number", "<u8")])


def file_name(shard: int) -> str:
    """The file of a shard.

    >>> file_name(3)
    '00003.origins'
    """
    return f"{shard:05d}.origins"


class OriginsWriter:
    """Takes the `where` of each document in the order of the rows; its entry of the manifest names the sources."""

    def __init__(self, folder: Path, shard: int) -> None:
        self._path = folder / file_name(shard)
        self._file = self._path.open("wb")
        self._sources: dict[str, int] = {}

    def add(self, places: Iterable[str]) -> None:
        """The next documents, as `file:line`."""
        pairs = [parted(where) for where in places]
        found = [(self._sources.setdefault(prefix, len(self._sources)), number) for prefix, number in pairs]
        np.array(found, _ORIGIN).tofile(self._file)

    def close(self) -> dict[str, dict[str, Any]]:
        """What the manifest says of the file, by its name."""
        self._file.close()
        sync(self._path)
        return {self._path.name: {**describe(self._path), "sources": list(self._sources)}}


def read(folder: Path, shard: int, files: Mapping[str, Any]) -> tuple[list[str], np.ndarray] | None:
    """(sources, (source, number) of each document [documents]) of a shard; None for shards that were written without.

    Raises DataError when its bytes are not the ones that were written.
    """
    path = folder / file_name(shard)
    entry = files.get(path.name)
    if entry is None:
        return None
    if describe(path)["blake2b"] != entry["blake2b"]:
        raise DataError(f"{path}: its bytes are not the ones that were written; prepare again with --fresh")
    return entry["sources"], np.fromfile(path, _ORIGIN)
