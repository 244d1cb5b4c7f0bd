"""Garbage is collected before every so many steps, and everything is as before once they end, however they do."""

from __future__ import annotations

import gc
import weakref

import pytest

from sft_dist.garbage import collected


class Cycle:
    """Only the collector finds it."""

    def __init__(self):
        self.itself = self


def test_only_between_every_so_many_steps():
    alive = []
    for _ in collected(range(5), every=3):
        assert not gc.isenabled()
        alive.append(weakref.ref(Cycle()))
        alive_then = [one() is not None for one in alive]
        if len(alive) == 3:
            assert alive_then == [True] * 3
        if len(alive) == 4:
            assert alive_then == [False] * 3 + [True]
    assert gc.isenabled()


@pytest.mark.parametrize("end", ["break", "error"])
def test_it_is_on_again_after_steps_that_were_cut_short(end):
    steps = collected(range(5))
    try:
        for _ in steps:
            if end == "error":
                raise ValueError
            break
    except ValueError:
        pass
    steps.close()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
