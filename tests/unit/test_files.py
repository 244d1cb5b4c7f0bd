import os

import pytest

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
