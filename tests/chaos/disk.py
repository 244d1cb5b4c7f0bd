"""A disk that forgets what was not synced: records what a process asks of the file system, and replays it up to any point.

Killing a process never tests fsync, since the kernel still writes what the process wrote. Here every write, fsync, rename,
mkdir, link and removal below a folder is recorded, and a crash after any of them is played: what was synced is there, the
rest is there or not, as `luck` says.
"""

from __future__ import annotations

import contextlib
import os
import random
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_PATCHED = ("open", "close", "write", "fsync", "mkdir", "rename", "replace", "unlink", "remove", "rmdir", "symlink")


@contextlib.contextmanager
def recorded(root: Path, *, forget: str | None = None) -> Iterator[list[tuple]]:
    """The operations below `root`, in order; `forget` names one that is done but not noted: a planted fault."""
    log: list[tuple] = []
    paths: dict[int, str] = {}
    originals = {name: getattr(os, name) for name in _PATCHED}

    def full(path: Any, dir_fd: int | None = None) -> str:
        base = paths.get(dir_fd, "") if dir_fd is not None else ""
        return os.path.normpath(os.path.join(base, os.fspath(path)))

    def note(name: str, *what: Any) -> None:
        if name != forget and any(
            part == str(root) or part.startswith(f"{root}/") for part in what if isinstance(part, str)
        ):
            log.append((name, *what))

    def open_(path, flags, mode=0o777, *, dir_fd=None):
        descriptor = originals["open"](path, flags, mode, dir_fd=dir_fd)
        paths[descriptor] = full(path, dir_fd)
        if flags & os.O_CREAT:
            note("create", paths[descriptor])
        return descriptor

    def close(descriptor):
        paths.pop(descriptor, None)
        originals["close"](descriptor)

    def write(descriptor, data):
        done = originals["write"](descriptor, data)
        if descriptor in paths:
            note("write", paths[descriptor], bytes(data[:done]))
        return done

    def fsync(descriptor):
        originals["fsync"](descriptor)
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        note("sync_folder" if is_folder else "sync_file", paths.get(descriptor, ""))

    def two(name):
        def act(source, target, *, src_dir_fd=None, dst_dir_fd=None):
            originals[name](source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
            note("rename", full(source, src_dir_fd), full(target, dst_dir_fd))

        return act

    def one(name, noted):
        def act(path, *arguments, dir_fd=None, **more):
            originals[name](path, *arguments, dir_fd=dir_fd, **more)
            note(noted, full(path, dir_fd))

        return act

    def symlink(target, path, target_is_directory=False, *, dir_fd=None):
        originals["symlink"](target, path, dir_fd=dir_fd)
        note("symlink", full(path, dir_fd), ("to", os.fspath(target)))

    made: dict[str, Callable] = {"open": open_, "close": close, "write": write, "fsync": fsync, "symlink": symlink}
    made |= {name: two(name) for name in ("rename", "replace")}
    made |= {"mkdir": one("mkdir", "mkdir"), "rmdir": one("rmdir", "unlink")}
    made |= {name: one(name, "unlink") for name in ("unlink", "remove")}
    for name, function in made.items():
        setattr(os, name, function)
    try:
        yield log
    finally:
        for name, function in originals.items():
            setattr(os, name, function)


@dataclass
class Node:
    """A file, a link or a folder: as the process sees it, and as the disk has it."""

    data: bytes = b""
    synced: bytes = b""
    link: str | None = None
    entries: dict[str, Node] | None = None
    history: list[dict[str, Node]] = field(default_factory=list)  # of a folder: since its last sync, oldest first


def folder() -> Node:
    return Node(entries={}, history=[{}])


class Disk:
    """The file system below `root` after these operations."""

    def __init__(self, root: Path, log: list[tuple]) -> None:
        self.root, self.top = str(root), folder()
        for operation in log:
            self._apply(*operation)

    def _find(self, path: str) -> Node:
        node = self.top
        for part in Path(path).relative_to(self.root).parts:
            assert node.entries is not None
            node = node.entries[part]
        return node

    def _set(self, path: str, node: Node | None) -> None:
        parent, name = self._find(os.path.dirname(path)), os.path.basename(path)
        assert parent.entries is not None
        if node is None:
            del parent.entries[name]
        else:
            parent.entries[name] = node
        parent.history.append(dict(parent.entries))

    def _apply(self, name: str, path: str, *more: Any) -> None:
        if name == "create":
            self._set(path, Node())
        elif name == "write":
            self._find(path).data += more[0]
        elif name == "sync_file":
            node = self._find(path)
            node.synced = node.data
        elif name == "sync_folder":
            node = self._find(path)
            node.history = [dict(node.entries or {})]
        elif name == "mkdir":
            self._set(path, folder())
        elif name == "symlink":
            self._set(path, Node(link=more[0][1]))
        elif name == "unlink":
            self._set(path, None)
        elif name == "rename":  # within one folder, it is one change of that folder
            node, parent = self._find(path), self._find(os.path.dirname(path))
            assert os.path.dirname(path) == os.path.dirname(more[0])
            assert parent.entries is not None
            del parent.entries[os.path.basename(path)]
            parent.entries[os.path.basename(more[0])] = node
            parent.history.append(dict(parent.entries))

    def crash(self, into: Path, luck: random.Random | str) -> None:
        """Write what a machine finds after it lost its power now.

        `luck`: "none": only what was synced; "names": every name is there, but of the bytes only the synced ones; "all":
        as if nothing had happened; a generator: any state in between.
        """
        _write(self.top, into, luck)


def _write(node: Node, path: Path, luck: random.Random | str) -> None:
    if node.link is not None:
        path.symlink_to(node.link)
    elif node.entries is None:
        data = (
            {"none": node.synced, "names": node.synced, "all": node.data}.get(luck) if isinstance(luck, str) else None
        )
        if data is None:
            lost = len(node.data) - len(node.synced)
            data = node.data[: len(node.synced) + luck.randint(0, lost)]
        path.write_bytes(data)
    else:
        path.mkdir(exist_ok=True)
        if isinstance(luck, str):
            entries = node.history[0] if luck == "none" else node.history[-1]
        else:
            entries = luck.choice(node.history)
        for name, inner in entries.items():
            _write(inner, path / name, luck)
