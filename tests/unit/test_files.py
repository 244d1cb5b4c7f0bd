import errno
import os
import threading

import pytest

from sft_dist import files
from sft_dist.files import hold


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
