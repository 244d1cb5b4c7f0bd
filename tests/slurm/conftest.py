import os
import tempfile
from pathlib import Path

import pytest

from tests.e2e.commands import clone, run
from tests.invariants import runs
from tests.slurm.cluster import Cluster, missing

STEPS = 30


@pytest.fixture(scope="session")
def cluster():
    """One cluster for all tests; where there is no SLURM, they are skipped visibly, but in CI that is a failure."""
    if why := missing():
        if os.environ.get("SFT_DIST_NEEDS_SLURM"):
            pytest.fail(why)
        pytest.skip(why)
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, Cluster(Path(folder)) as cluster:
        yield cluster  # in a folder that munge's clients may enter: pytest's own are closed


@pytest.fixture(scope="session")
def task(tmp_path_factory):
    """A folder that looks like a clone, with shards, and what two ranks make of them when nobody disturbs them."""
    folder = clone(tmp_path_factory.mktemp("task"))
    runs.run_file(folder, micro_batch_rows=1, global_batch_rows=16, max_steps=STEPS)
    run("sft-dist prepare run.yaml", folder)
    run("sft-dist train run.yaml --nproc 2 run_dir=undisturbed " + " ".join(OVERRIDES), folder)
    return folder


OVERRIDES = (
    "evaluate.samples=0",
    "evaluate.every_steps=12",
    "checkpoint.every_steps=6",
    "model.dropout=0.1",
    "zero=ds_configs/zero2.json",
)
