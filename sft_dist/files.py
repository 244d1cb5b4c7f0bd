"""How files that others read come to be: whole or not at all; and how nothing a person made is ever deleted."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO


def hold(path: Path, *, is_shared: bool = False) -> TextIO:
    """Hold a lock file for as long as the returned file stays open: a kill releases it too.

    Any number may hold it `is_shared`, or one alone. Raises BlockingIOError whose text says who holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise BlockingIOError(holder) from None
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # the one before removed it while this one waited at its door
    if not is_shared:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    return file


def sync(path: Path) -> None:
    """Wait until a file, or a folder with everything below it, is on the disk and not only on its way."""
    for inner in sorted(path.iterdir()) if path.is_dir() else ():
        sync(inner)
    _flush(path)


def publish(staged: Path, final: Path) -> None:
    """Give a staged file or folder its name, in one rename; a folder of that name is set aside first."""
    sync(staged)
    if final.is_dir():
        set_aside(final)
    staged.replace(final)
    _flush(final.parent)  # makes the rename itself durable


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def set_aside(path: Path) -> Path:
    """Move to `NAME.old-1`, or the first free number; returns the new place."""
    number = 1
    while (aside := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    path.rename(aside)
    return aside


def digest_of(values: Mapping[str, Any]) -> str:
    """32 hexadecimal digits that stand for a JSON object, whatever the order of its keys.

    >>> digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})
    True
    """
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16).hexdigest()


def describe(path: Path) -> dict[str, Any]:
    """Size and digest of a file, as manifests hold them."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    return {"bytes": path.stat().st_size, "blake2b": digest}
