"""`sft-dist profile` before it profiles: what is refused, and how several ranks are started."""

from __future__ import annotations

import gzip
import signal
import sys
from pathlib import Path

import pytest

from launch import local, profiling
from launch.settle import Plan
from sft_dist.batch import Batch
from sft_dist.config import load
from sft_dist.topology import Life, Topology
from tests.unit.prepared_runs import run_file, sft_dist


@pytest.fixture
def run(tmp_path, shards):
    return run_file(tmp_path, shards / "out", shards / "sms")


@pytest.mark.parametrize(
    ("trace", "said"),
    [("no/t.json", "there is no folder no; make it, or choose another place"), (".", "no file can be written there; choose another place")],
)  # fmt: skip
def test_a_trace_that_cannot_be_written_is_refused_before_anything_starts(run, trace, said):
    result = sft_dist("profile", run, "--trace", trace)
    assert (result.exit_code, result.stderr) == (2, f"sft-dist: --trace {trace}: {said}\n")


def test_a_wrong_run_file_is_refused_on_a_rank_too(run, capsys):
    arguments = [*profiling.Options().arguments(), str(run), "train.epochs=x"]
    assert profiling.main(arguments) == 2
    assert capsys.readouterr().err.startswith("sft-dist: ")
    assert sft_dist("profile", run, "train.epochs=x").exit_code == 2
    assert sft_dist("profile", run, "--nproc", "3").exit_code == 2  # 4 rows are not a multiple


def test_more_ranks_than_gpus_are_refused(run, monkeypatch):
    monkeypatch.setattr(local, "num_gpus", lambda: 1)
    result = sft_dist("profile", run, "--nproc", "2")
    assert result.exit_code == 2
    assert "--nproc 2: this machine has 1 usable GPUs" in result.stderr


@pytest.mark.parametrize(("ends", "code"), [("exit 1", 1), ("kill -TERM $$", 128 + signal.SIGTERM)])
def test_several_ranks_are_started_by_torchrun_and_end_with_its_code(run, tmp_path, monkeypatch, ends, code):
    script = tmp_path / "python"
    script.write_text(f'#!/bin/bash\necho "$@" > {tmp_path}/arguments\n{ends}\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    options = profiling.Options(steps=5, micro_batches=2, trace=tmp_path / "t.json")
    overrides = ["train.micro_batch_rows=auto"]
    assert profiling.run(load(run, overrides), str(run), overrides, 2, options) == code
    given = (tmp_path / "arguments").read_text().split()
    assert given[:3] == ["-m", "torch.distributed.run", "--standalone"]
    assert Path(given[5]) == Path(profiling.__file__)
    assert given[6:] == [
        str(run), "train.micro_batch_rows=auto", "train.micro_batch_rows=2", "--steps=5", "--micro-batches=2", f"--trace={tmp_path}/t.json"
    ]  # fmt: skip


def test_an_interrupted_profile_says_so_and_nothing_else(run, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(profiling, "profile", interrupted)
    assert profiling.run(load(run), str(run), [], 1, profiling.Options(trace=tmp_path / "t.json")) == 130
    script = tmp_path / "python"
    script.write_text("#!/bin/bash\nsleep 0.5\nkill -INT $PPID\nsleep 30 & wait\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    assert profiling.run(load(run), str(run), [], 2, profiling.Options(trace=tmp_path / "t.json")) == 130
    assert capsys.readouterr().err == 2 * "sft-dist: interrupted\n"


def test_long_steps_are_cut_and_short_ones_are_not(run):
    plan = Plan.of(load(run, ["train.global_batch_rows=64"]), Topology(), Life("x"))
    assert profiling.cut(plan, 16).batch == Batch(16, 1, 16, 1)
    assert profiling.cut(plan, 100).batch == plan.batch == Batch(64, 1, 64, 1)


@pytest.mark.parametrize(
    ("has_gpu", "compiler", "overrides", "can_compile"),
    [
        (True, "/bin/g++", [], True),
        (True, None, [], False),
        (False, "/bin/g++", [], False),
        (True, "/bin/g++", ["train.compile=true"], False),  # it does
        (True, "/bin/g++", ["train.sequence_parallel=2"], False),
    ],
)
def test_what_could_be_compiled_is_told_by_the_run_and_the_machine(
    run, monkeypatch, has_gpu, compiler, overrides, can_compile
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
    monkeypatch.setattr(profiling, "find_compiler", lambda: compiler)
    plan = Plan.of(load(run, overrides), Topology(world_size=2, local_world_size=2), Life("x"))
    is_compiled = plan.config.train.compile
    setting = profiling._setting(plan, plan, None, is_compiled=is_compiled)  # no model: memory is not asked for
    assert (setting.is_compiled, setting.can_compile) == (is_compiled, can_compile)


def test_a_trace_is_published_whole_and_what_was_there_is_kept(tmp_path):
    made = tmp_path / "made.json"
    made.write_text('{"traceEvents": []}')
    trace = tmp_path / "t.json.gz"
    for _ in range(2):
        profiling._publish(made, trace)
    assert gzip.decompress(trace.read_bytes()) == made.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made.json", "t.json.gz", "t.json.gz.old-1"]
