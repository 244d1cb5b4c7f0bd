import errno
import fcntl
import mmap
import os
import random
import threading

import pytest

from sft_dist import files
from sft_dist.errors import ConfigError
from sft_dist.files import hold, publish_page


def test_one_holds_it_alone_and_is_named(tmp_path):
    path = tmp_path / "deep" / "a.lock"
    with hold(path):
        for is_shared in (False, True):
            with pytest.raises(BlockingIOError, match=rf"process {os.getpid()} on "):
                hold(path, is_shared=is_shared)
    hold(path).close()


def test_many_share_it_and_nobody_holds_it_alone_meanwhile(tmp_path):
    path = tmp_path / "a.lock"
    with (
        hold(path, is_shared=True),
        hold(path, is_shared=True),
        pytest.raises(BlockingIOError, match="another process"),
    ):
        hold(path)


def test_who_waited_at_a_door_that_was_removed_takes_the_new_one(tmp_path, monkeypatch):
    """Opened, then removed by the one before, then locked: the lock would be on a file that has no name."""
    path, opened = tmp_path / "a.lock", []
    real = type(path).open

    def opens(self, *args, **kwargs):
        file = real(self, *args, **kwargs)
        if not opened:
            path.unlink()
        opened.append(file)
        return file

    monkeypatch.setattr(type(path), "open", opens)
    with hold(path):
        assert len(opened) == 2
        assert path.exists()


def test_a_holder_on_another_machine_is_alive_while_it_touches_the_file(tmp_path, monkeypatch):
    """Where the kernel's lock is not known across machines, or not at all."""
    monkeypatch.setattr(files, "_BEAT_SECONDS", 0.1)
    path = tmp_path / "lock"
    path.write_text("process 7 on elsewhere")
    hold(path).close()  # nobody touches it: stale
    assert path.read_text() == ""
    path.write_text("process 7 on elsewhere")
    over = threading.Event()

    def touch():
        while not over.wait(0.05):
            os.utime(path)

    toucher = threading.Thread(target=touch)
    toucher.start()
    try:
        with pytest.raises(BlockingIOError, match="process 7 on elsewhere"):
            hold(path)
    finally:
        over.set()
        toucher.join()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS])
def test_without_kernel_locks_the_touched_file_alone_decides(tmp_path, monkeypatch, code):
    def unsupported(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    monkeypatch.setattr(files, "_BEAT_SECONDS", 0.1)
    with hold(tmp_path / "lock"), pytest.raises(BlockingIOError, match=f"process {os.getpid()} on "):
        hold(tmp_path / "lock")
    hold(tmp_path / "lock").close()


def test_another_error_of_the_lock_is_not_swallowed(tmp_path, monkeypatch):
    def failing(*_):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(files.fcntl, "flock", failing)
    with pytest.raises(OSError, match="broken"):
        hold(tmp_path / "lock")


@pytest.mark.parametrize("size", [0, 1, 4096, 5000, 1 << 20, (1 << 20) - 4096, 9_000_000, 9_437_184])
@pytest.mark.parametrize("pages", [1, 300])
@pytest.mark.parametrize("refuses", ["nothing", "open", "write"])
def test_a_large_file_is_written_past_the_cache_or_through_it(tmp_path, monkeypatch, size, pages, refuses):
    """On file systems that take O_DIRECT, that refuse it, and that take it but not its alignment."""
    memory = mmap.mmap(-1, size + 1)
    memory.write(random.Random(size).randbytes(size))
    header, values = b"h" * 4096 * pages, memoryview(memory)[:size]
    open_, write, is_direct = os.open, os.write, []

    def opened(path, flags, *more):
        if refuses == "open" and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return open_(path, flags, *more)

    def written(descriptor, data):
        is_direct.append(bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT))
        if refuses == "write" and is_direct[-1]:
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(descriptor, data[: 1 << 20])  # and a little at a time

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "write", written)
    entry = files.write_large(tmp_path / "large", header, values)
    content = header + bytes(values)
    assert (tmp_path / "large").read_bytes() == content
    blocks = [files.digest_of_block(content[at : at + (1 << 20)]) for at in range(0, len(content), 1 << 20)]
    assert entry == {"bytes": len(content), "blocks": blocks}
    if refuses == "open":
        assert not any(is_direct)


def test_an_error_of_a_large_write_is_not_taken_for_another_alignment(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left on device"):
        files.write_large(tmp_path / "large", b"h" * 4096, memoryview(b""))
    (tmp_path / "large").unlink()
    monkeypatch.setattr(os, "open", full)
    with pytest.raises(OSError, match="No space left on device"):
        files.write_large(tmp_path / "large", b"h" * 4096, memoryview(b""))


@pytest.mark.parametrize("parts", [[], [b""], [b"ab", b"c"], [b"x" * (1 << 20)], [b"x" * 7, b"y" * (3 << 20), b"z"]])
def test_the_blocks_of_parts_are_those_of_the_whole(tmp_path, parts):
    entry = files.write_blocks(tmp_path / "file", *parts)
    content = b"".join(parts)
    assert (tmp_path / "file").read_bytes() == content
    blocks = [files.digest_of_block(content[at : at + (1 << 20)]) for at in range(0, len(content), 1 << 20)]
    assert entry == {"bytes": len(content), "blocks": blocks}
    with pytest.raises(FileExistsError):
        files.write_blocks(tmp_path / "file", b"again")


def test_folders_are_made_with_those_above(tmp_path):
    files.make_folder(tmp_path / "a" / "b" / "c")
    files.make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b" / "c").is_dir()


def test_a_page_is_written_over_another_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "page.html"
    for text in ("old, and longer", "new é"):
        publish_page(path, text, "--html")
    assert path.read_text("utf-8") == "new é"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "why"), [("", "it is a folder"), ("no/p.html", "No such file"), ("file/p", "Not a directory")]
)
def test_a_page_that_cannot_be_written_is_one_line(tmp_path, name, why):
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match=rf"--html .*: .*{why}.*; name a file in a folder that exists and that you may write"
    ):
        publish_page(tmp_path / name, "text", "--html")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_page_that_fails_on_its_way_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    publish_page(path, "old", "--html")

    def full(staged, final):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sft_dist.files.publish", full)
    with pytest.raises(ConfigError, match=r"cannot be written \(No space left on device\)"):
        publish_page(path, "new", "--html")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
