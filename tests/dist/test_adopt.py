"""A run that DeepSpeed began goes on here: same losses as if it had gone on there."""

from __future__ import annotations

import json
import shutil

import pytest

from sft_dist.config import load
from sft_dist.data.build import prepare
from sft_dist.errors import CheckpointError
from sft_dist.files import hold
from tests.e2e.commands import clone, enter
from tests.invariants import runs
from tests.workers import RankError, run_workers

STEPS, HALF = 8, 4
COMMON = (f"train.max_steps={STEPS}", "evaluate.samples=0", "train.micro_batch_rows=2", "train.order=rows")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    path = runs.run_file(folder)
    prepare(load(path).prepare)
    return path


def saved_by_deepspeed(topology, path, overrides, out):
    """The same run, stopped half way, saved by DeepSpeed's own hand, as the Trainer lays it out."""
    from sft_dist import engine
    from sft_dist.comms import Comms

    initialize = engine._initialize

    def kept(*arguments):
        made = initialize(*arguments)
        kept.engine = made
        return made

    engine._initialize, close = kept, Comms.close

    def save_and_close(comms):
        kept.engine.save_checkpoint(str(out / f"checkpoint-{HALF}"), tag=f"global_step{HALF}")
        close(comms)

    Comms.close = save_and_close
    code = runs.run(topology, path, overrides, stop_at=HALF)
    if topology.is_main:
        (out / f"checkpoint-{HALF}" / "trainer_state.json").write_text(json.dumps({"global_step": HALF}))
    return code


def imported(topology, path, overrides, source):
    from launch.adopt import adopt

    return adopt(load(path, overrides), source)


@pytest.fixture(scope="module")
def foreign(task, tmp_path_factory):
    """Of stage 2 and 3: where the Trainer would have put its checkpoint."""
    made = {}
    for stage in (2, 3):
        folder = tmp_path_factory.mktemp(f"foreign{stage}")
        overrides = (f"run_dir={folder / 'run'}", *COMMON, f"zero=ds_configs/zero{stage}.json")
        run_workers(saved_by_deepspeed, 2, task, overrides, folder / "output")
        made[stage] = folder / "output"
    return made


@pytest.fixture(scope="module")
def straight(task, tmp_path_factory):
    """The run that no other trainer began."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    run_workers(runs.run, 2, task, (f"run_dir={run_dir}", *COMMON))
    return run_dir


@pytest.mark.parametrize("stage", [2, 3])
def test_the_run_goes_on_where_the_other_trainer_was(task, foreign, straight, stage, tmp_path):
    overrides = (f"run_dir={tmp_path / 'run'}", *COMMON)
    said = enter(f"sft-dist import {foreign[stage]} {task} {' '.join(overrides)}", clone(tmp_path))
    done = int(json.loads((tmp_path / "run" / "checkpoints" / "latest" / "state.json").read_text())["step"])
    assert done >= HALF
    assert f"imported step {done} of " in said
    run_workers(runs.run, 4, task, overrides)
    mine, theirs = runs.numbers(tmp_path / "run"), runs.numbers(straight)
    for (loss, norm), (wanted, wanted_norm) in zip(mine, theirs[done:], strict=True):
        assert loss == pytest.approx(wanted, rel=2e-6)
        assert norm == pytest.approx(wanted_norm, rel=2e-6)
    state = json.loads((tmp_path / "run" / "checkpoints" / "latest" / "state.json").read_text())
    assert state["skipped"] == [[0, 8 * done]]
    assert "imported from" in state["notes"][0]


def refused(task, source, *overrides):
    with pytest.raises((RankError, CheckpointError)) as raised:
        run_workers(imported, 1, task, (*COMMON, *overrides), source)
    return str(raised.value)


def test_what_does_not_fit_is_refused(task, foreign, tmp_path):
    run_dir = f"run_dir={tmp_path / 'run'}"
    assert "transformer.h.2.attn.c_attn.bias has shape None there" in refused(
        task, foreign[2], run_dir, "model.config.n_layer=3"
    )
    assert "steps were done, the run has 1; raise train.epochs" in refused(
        task, foreign[2], run_dir, "train.max_steps=1"
    )
    (tmp_path / "run" / "checkpoints" / "step-00000007").mkdir(parents=True)
    assert "there is step-00000007 already; name another run_dir" in refused(task, foreign[2], run_dir)
    shutil.rmtree(tmp_path / "run")
    assert "not a DeepSpeed checkpoint" in refused(task, tmp_path, run_dir)
    adapted = ("model.config=null", "model.name_or_path=gpt2", "model.lora.rank=4")
    told = refused(task, foreign[2], run_dir, *adapted)
    assert "takes checkpoints of whole models, and model.lora trains adapters; leave that section out" in told
    with hold(tmp_path / "run" / ".lock"):
        assert "is in use by" in refused(task, foreign[2], run_dir)


def test_another_batch_than_there_is_told(task, foreign, tmp_path):
    overrides = (f"run_dir={tmp_path / 'run'}", *COMMON, "train.global_batch_rows=4")
    (said,) = run_workers(imported, 1, task, overrides, foreign[2])
    assert said.endswith("note: a step took 8 rows there and takes 4 here")


def frozen(topology, task, tmp_path):
    import torch

    from launch import adopt
    from sft_dist.foreign import Foreign

    ones = torch.ones(2)
    foreign = Foreign(4, 4, 2, 2, None, {"a": {"master": ones}}, {"a": (2,)})
    model = torch.nn.Module()
    model.a = torch.nn.Parameter(ones)
    adopt.require_same_model(tmp_path, foreign, model)


def test_weights_that_were_frozen_there_are_refused(task, tmp_path):
    with pytest.raises(RankError, match=r"a was frozen there \(1 parameters in all\), and this trainer trains every"):
        run_workers(frozen, 1, task, tmp_path)
