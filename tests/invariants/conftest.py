"""What the tests of whole runs share."""

from __future__ import annotations

import pytest

from sft_dist.config import load
from sft_dist.data.build import prepare
from tests.invariants import runs


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A run file on a small, learnable task, prepared."""
    path = runs.run_file(tmp_path_factory.mktemp("task"))
    prepare(load(path).prepare)
    return path
