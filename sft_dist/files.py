"""How files that others read come to be: whole or not at all; and how nothing a person made is ever deleted."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import mmap
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import xxhash

from sft_dist.errors import ConfigError

BLOCK_BYTES = 1 << 20  # a digest each: fits a processor's cache, so that checking costs little beside reading


_BEAT_SECONDS = 4.0  # a holder touches its lock file so often
_UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}


class Hold:
    """A held lock file: a context manager, let go by `close`, by the end of the process, or by a kill."""

    def __init__(self, file: TextIO, *, beats: bool) -> None:
        self._file, self._over = file, threading.Event()
        self._beats = beats
        if beats:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            threading.Thread(target=self._beat, name="lock", daemon=True).start()

    def _beat(self) -> None:
        while not self._over.wait(_BEAT_SECONDS):
            with contextlib.suppress(OSError, ValueError):  # a server that is away for a while; or just closed
                os.utime(self._file.fileno())

    def close(self) -> None:
        """Let go."""
        self._over.set()
        if self._beats and not self._file.closed:
            self._file.truncate(0)  # no trace of a holder: the next one need not ask whether it is alive
        self._file.close()

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def hold(path: Path, *, is_shared: bool = False) -> Hold:
    """Hold a lock file until the returned object is closed: a kill releases it too.

    Any number may hold it `is_shared`, or one alone. Raises BlockingIOError whose text says who holds it. The kernel's lock is
    known to every process of a machine, and on most shared file systems to every machine. Where it may not be, the holder's
    file tells: it is touched every 4 seconds, so one that another machine wrote and nobody touches any more is stale.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            is_sure = True
        except BlockingIOError:
            raise _held_by(file) from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            is_sure = False
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # the one before removed it while this one waited at its door
    if not is_shared and _is_touched(path, file, is_sure=is_sure):
        raise _held_by(file)
    return Hold(file, beats=not is_shared)


def _held_by(file: TextIO) -> BlockingIOError:
    file.seek(0)
    holder = file.read().strip() or "another process"
    file.close()
    return BlockingIOError(holder)


def _is_touched(path: Path, file: TextIO, *, is_sure: bool) -> bool:
    """Whether a holder on another machine, which the kernel's lock may not know of, is alive."""
    file.seek(0)
    holder = file.read()
    if not holder or (is_sure and holder.endswith(f" on {socket.gethostname()}")):
        return False
    before, end = path.stat().st_mtime_ns, time.monotonic() + 2.5 * _BEAT_SECONDS
    while time.monotonic() < end:
        time.sleep(_BEAT_SECONDS / 8)
        if path.stat().st_mtime_ns != before:
            return True
    return False


def sync(path: Path) -> None:
    """Wait until a file, or a folder with everything below it, is on the disk and not only on its way."""
    for inner in sorted(path.iterdir()) if path.is_dir() else ():
        sync(inner)
    sync_folder(path)


def digest_of_block(block: bytes | memoryview) -> str:
    """32 hexadecimal digits against damage (not against malice: who can write the file can write its manifest).

    >>> digest_of_block(b"abc")
    '06b05ab6733a618578af5f94892f3950'
    """
    return xxhash.xxh3_128_hexdigest(block)


def write_blocks(path: Path, *parts: bytes | memoryview) -> dict[str, Any]:
    """Write a new file, digest its blocks on the way, and wait until it is on the disk.

    Returns its entry in a manifest: `bytes`, and a digest for each `BLOCK_BYTES`. Raises OSError.

    >>> write_blocks(Path("state.json"), b"{}")  # doctest: +SKIP
    {'bytes': 2, 'blocks': ['dc7048f8f8747f561349cde127705c16']}
    """
    blocks, size = [], 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for block in _blocks(parts):
            _write(descriptor, memoryview(block))
            blocks.append(digest_of_block(block))
            size += len(block)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"bytes": size, "blocks": blocks}


def write_large(path: Path, header: bytes, values: memoryview) -> dict[str, Any]:
    """The same for a small header and values of any size, past the page cache where the file system allows it.

    Then the disk fetches the bytes itself: no processor copies them while the training needs it, and the cache keeps what
    it held. For that `values` begin at a page of memory and `header` fills whole pages.
    """
    held = -(-len(header) // BLOCK_BYTES) * BLOCK_BYTES - len(header)  # values that fill the header's last block
    staged = mmap.mmap(-1, len(header) + held)  # at a page of memory, as the values are
    staged.write(header)
    staged.write(values[:held])
    first = memoryview(staged)[: len(header) + min(held, len(values))]
    chunks = [first, *(values[at : at + _CHUNK_BYTES] for at in range(held, len(values), _CHUNK_BYTES))]
    blocks, descriptor = [], _open_direct(path)
    try:
        for chunk in chunks:
            blocks += [digest_of_block(chunk[at : at + BLOCK_BYTES]) for at in range(0, len(chunk), BLOCK_BYTES)]
            whole = len(chunk) // mmap.PAGESIZE * mmap.PAGESIZE
            _write(descriptor, chunk[:whole])
            if whole < len(chunk):  # the end of the file
                _through_the_cache(descriptor)
                _write(descriptor, chunk[whole:])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"bytes": len(header) + len(values), "blocks": blocks}


_CHUNK_BYTES = 8 * BLOCK_BYTES


def _open_direct(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        path.unlink(missing_ok=True)  # some file systems make the file before they refuse the flag
        return os.open(path, flags, 0o666)


def _through_the_cache(descriptor: int) -> None:
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~getattr(os, "O_DIRECT", 0))


def _write(descriptor: int, left: memoryview) -> None:
    while left:
        try:
            left = left[os.write(descriptor, left) :]
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            _through_the_cache(descriptor)  # this file system wants another alignment
            left = left[os.write(descriptor, left) :]


def _blocks(parts: tuple[bytes | memoryview, ...]) -> Iterator[bytes | memoryview]:
    """The parts one after another, cut every `BLOCK_BYTES`; what lies within one part is not copied."""
    begun = b""
    for part in parts:
        at = 0
        if begun:
            at = min(len(part), BLOCK_BYTES - len(begun))
            begun += bytes(part[:at])
            if len(begun) < BLOCK_BYTES:
                continue
            yield begun
            begun = b""
        while len(part) - at >= BLOCK_BYTES:
            yield part[at : at + BLOCK_BYTES]
            at += BLOCK_BYTES
        begun = bytes(part[at:])
    if begun:
        yield begun


def make_folder(path: Path) -> None:
    """Make a folder with those above it; each new name is on the disk before the one below it is made."""
    if not path.parent.is_dir():
        make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync_folder(path.parent)


def publish(staged: Path, final: Path) -> None:
    """Give a staged file or folder its name, in one rename; a folder of that name is set aside first."""
    sync(staged)
    if final.is_dir():
        set_aside(final)
    staged.replace(final)
    sync_folder(final.parent)  # makes the rename itself durable


def publish_text(path: Path, text: str) -> None:
    """Write a small file that others read, whole or not at all; more than one process may have the last word."""
    staged = path.with_name(f".{path.name}-{os.getpid()}.partial")
    try:
        staged.write_text(text, "utf-8")
        publish(staged, path)
    except BaseException:  # no room, or Ctrl-C
        with contextlib.suppress(OSError):
            staged.unlink()
        raise


def publish_page(path: Path, text: str, option: str) -> None:
    """Write what a person asked for by `option`, whole, over one that is there. Raises ConfigError when it cannot be written."""
    remedy = "name a file in a folder that exists and that you may write to"
    if path.is_dir():
        raise ConfigError(f"{option} {path}: it is a folder; {remedy}")
    try:
        publish_text(path, text)
    except OSError as error:
        raise ConfigError(f"{option} {path}: cannot be written ({error.strerror}); {remedy}") from None


def sync_folder(path: Path) -> None:
    """Wait until a file, or a folder's own list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def set_aside(path: Path, why: str = "old") -> Path:
    """Move to `NAME.old-1`, or the first free number; returns the new place."""
    return path.rename(first_free(path, why))


def first_free(path: Path, why: str = "old") -> Path:
    """`NAME.old-1`, or the first number that is not taken."""
    names = (path.with_name(f"{path.name}.{why}-{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


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
