"""Python's garbage is collected between steps, the same ones on all ranks: within a step each pause would be waited for by all."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from typing import TypeVar

Step = TypeVar("Step")


def collected(steps: Iterable[Step], every: int = 50) -> Iterator[Step]:
    """The steps; what died young is collected before every `every`-th, and no other time until they end.

    Nothing on a device waits for it: no tensor of a step is in a cycle of references (tests/dist/test_host_waits.py). What is there
    at the beginning, the libraries' hundred thousands of objects, is not looked through again.

    >>> list(collected("abc")), gc.isenabled()
    (['a', 'b', 'c'], True)
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        for number, step in enumerate(steps):
            if number and number % every == 0:
                gc.collect(1)
            yield step
    finally:
        gc.enable()
        gc.unfreeze()
