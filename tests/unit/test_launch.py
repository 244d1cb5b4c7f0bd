import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from launch import local, train
from sft_dist.config import load
from sft_dist.errors import CheckpointError, ConfigError, DataError, HealthError
from sft_dist.limits import SIGNALS, Verdict
from sft_dist.schema import RunConfig
from sft_dist.topology import Life, Topology
from tests.unit.prepared_runs import records, run_file, sft_dist

ROOT = Path(__file__).parents[2]
LIFE = Life("test")


@pytest.fixture
def run(shards, tmp_path):
    return run_file(tmp_path, shards / "out", shards / "sms")


@pytest.fixture(autouse=True)
def signals_of_the_tests_own():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def one_line(result, code, message):
    """The command ended as an error for people does."""
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("sft-dist: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)


HELP = """
import sys, launch.cli
try:
    launch.cli.main(sys.argv[1:])
except SystemExit as end:
    assert end.code == 0, end.code
heavy = {"torch", "transformers", "deepspeed", "pydantic", "numpy", "rich"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize("arguments", [["--help"], ["train", "-h"]])
def test_help_imports_nothing_heavy(arguments):
    done = subprocess.run([sys.executable, "-c", HELP, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout


def test_help_names_every_command():
    for name in ("prepare", "inspect", "train", "eval", "export", "chat"):
        assert f"\n  {name} " in sft_dist("--help").stdout
        assert sft_dist(name, "--help").exit_code == 0


def test_a_launcher_and_the_plan_need_no_torch():
    code = "import sys, launch.local, launch.train; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("command", ["prepare", "train"])
def test_a_wrong_run_file_is_one_line_and_code_2(run, command):
    one_line(sft_dist(command, "nowhere.yaml"), 2, "nowhere.yaml: no such run file; name an existing one")
    one_line(sft_dist(command, run, "train.lerning_rate=1"), 2, "did you mean train.learning_rate?")
    one_line(sft_dist(command, run, "train.epochs"), 2, "override 'train.epochs': not of the form key=value")


def test_an_unknown_command_or_option_is_code_2():
    assert sft_dist("trian").exit_code == 2
    assert sft_dist("train", "--nproc", "0", "run.yaml").exit_code == 2
    assert sft_dist("eval").exit_code == 2
    both = sft_dist("eval", "run", "--tasks", "hellaswag", "--shards", "shards")
    assert both.exit_code == 2
    assert "--tasks have data of their own and --shards is that of the run" in both.stderr


def test_print_config_shows_every_value_and_the_derived_numbers(run, tmp_path):
    result = sft_dist("train", run, "train.learning_rate=1e-3", "--nproc", "2", "--print-config")
    assert result.exit_code == 0, result.output
    text, _, numbers = result.stdout.partition("\nrows: ")
    values = yaml.safe_load(text)
    assert RunConfig.model_validate(values) == load(run, ["train.learning_rate=1e-3"])
    assert values["train"]["beta2"] == 0.999  # a default, resolved
    assert values["prepare"]["sources"][0]["schema"] == "label"
    for part in (
        "of 64 tokens",
        "step: 4 rows = ",
        " = 1 a micro-batch x 2 accumulated x 2 processes",
        "ZeRO stage 2, fp32, learning rate 0.001",
    ):
        assert part in numbers
    assert not (tmp_path / "run").exists()


def test_print_config_of_prepare_prepares_nothing(tmp_path):
    path = run_file(tmp_path, tmp_path / "out", tmp_path / "nowhere")
    result = sft_dist("prepare", path, "--print-config", "prepare.seed=7")
    assert result.exit_code == 0
    assert yaml.safe_load(result.stdout)["prepare"]["seed"] == 7
    assert [p.name for p in tmp_path.iterdir()] == ["run.yaml"]


def test_preparing_again_says_so_and_fresh_prepares_anew(tmp_path):
    path = run_file(tmp_path, tmp_path / "out", records(tmp_path / "sms"))
    assert ": prepared\n" in sft_dist("prepare", path).stdout
    assert ": already prepared, nothing changed\n" in sft_dist("prepare", path).stdout
    one_line(sft_dist("prepare", path, "prepare.seed=1"), 2, "prepare anew with --fresh")
    assert ": prepared\n" in sft_dist("prepare", path, "--fresh", "prepare.seed=1").stdout
    assert (tmp_path / "out.old-1").is_dir()


def test_inspect_shows_numbers_and_rows(shards):
    whole = sft_dist("inspect", shards / "out")
    assert whole.exit_code == 0
    for word in ("train", "validation", "labels", "target share", "sample tokens, median"):
        assert word in whole.stdout
    one = sft_dist("inspect", shards / "out" / "validation")
    assert "samples a row" in one.stdout
    assert "train" not in one.stdout.partition("samples")[2]
    for folder in ("out", "out/train"):
        row = sft_dist("inspect", shards / folder, "--row", "0")
        assert row.exit_code == 0
        assert "⟦sample 0⟧ Spam?" in row.stdout
        assert "</s>⟫" in row.stdout


def test_inspect_refuses_what_is_not_there(shards, tmp_path):
    one_line(
        sft_dist("inspect", tmp_path), 2, "no shards there; run `sft-dist prepare RUN.yaml`, or name its prepare.out"
    )
    one_line(sft_dist("inspect", shards / "out", "--row", "99999"), 2, "--row 99999: there are rows 0 to ")


def test_training_without_shards_is_code_2_before_anything_starts(tmp_path):
    path = run_file(tmp_path, tmp_path / "nowhere", tmp_path / "sms")
    message = "no prepared shards there; run `sft-dist prepare RUN.yaml` first"
    one_line(sft_dist("train", path), 2, message)
    result = sft_dist("train", path, "--print-config")
    assert result.exit_code == 2
    assert message in result.stderr
    with pytest.raises(DataError, match=message) as raised:
        train.Plan.of(load(path), Topology(), LIFE)
    assert raised.value.exit_code == 2
    assert not (tmp_path / "run").exists()


def test_a_batch_that_does_not_divide_is_code_2_before_anything_starts(run):
    one_line(
        sft_dist("train", run, "--nproc", "3"),
        2,
        "4 is not a multiple of micro_batch_rows 1 x 3 processes = 3. Use 3 or 6",
    )


def plan(run, *overrides, world_size=1, fresh=False):
    return train.Plan.of(load(run, overrides), Topology(world_size=world_size), LIFE, train.Resume(is_fresh=fresh))


def test_steps_behind_a_state_are_counted_as_they_were_taken(run):
    """A run whose last step was short and that is extended has one step more than the arithmetic from zero says."""
    from sft_dist.state import TrainState

    made = plan(run, "train.global_batch_rows=8", "train.epochs=2")
    assert made.steps() == -(-made.rows // 8)
    assert made.steps(TrainState(step=1, rows_consumed=5)) == 1 + -(-(made.rows - 5) // 8)
    assert made.steps(TrainState(step=9, rows_consumed=made.rows)) == 9


def test_more_processes_than_gpus_are_refused(run, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    one_line(sft_dist("train", run, "--nproc", "2"), 2, "--nproc 2: this machine has 1 usable GPUs")


def test_a_rank_killed_by_the_kernel_is_named(capsys):
    said = "E1123 api.py failed (exitcode: -9) local_rank: 1 (pid: 7) of binary\n"
    local.relay(SimpleNamespace(stderr=io.StringIO(said)))
    assert capsys.readouterr().err == "sft-dist: rank 1 of this machine was killed by SIGKILL: out of memory?\n"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_a_rank_says_comes_above_the_bar_that_it_draws(capsys, monkeypatch, is_terminal):
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: is_terminal)
    local.relay(SimpleNamespace(stderr=io.StringIO("warning: slow\n")))
    assert capsys.readouterr().err == "\r\x1b[2K" * is_terminal + "warning: slow\n"


def test_few_steps_an_epoch_get_a_warning(run):
    rows = plan(run).shards.num_rows
    assert rows >= 40
    fine = plan(run, "train.global_batch_rows=2").describe()
    assert "warning" not in fine
    large = plan(run, f"train.global_batch_rows={rows // 2 + 1}")
    assert large.steps() == 4
    assert large.describe().splitlines()[-1] == (
        f"warning: a step of {rows // 2 + 1} rows leaves only {rows / (rows // 2 + 1):.1f} steps an epoch (4 in all): few for the optimizer to move. "
        "A smaller train.global_batch_rows gives more"
    )


def test_a_resumed_run_keeps_its_rows_where_the_batch_is_in_samples(run, tmp_path):
    overrides = ["train.global_batch_rows=null", "train.global_batch_samples=20"]
    derived = plan(run, *overrides).batch.global_batch_rows
    for step, rows in ((1, derived + 3), (2, derived + 4)):
        folder = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({"identity": {"global_batch_rows": rows}}))
    assert plan(run, *overrides).batch.global_batch_rows == derived + 4
    assert plan(run, *overrides, fresh=True).batch.global_batch_rows == derived
    (tmp_path / "run" / "checkpoints" / "step-00000002" / "manifest.json").write_text("{cut")
    assert plan(run, *overrides).batch.global_batch_rows == derived + 3
    assert plan(run).batch.global_batch_rows == 4


@pytest.mark.parametrize("text", ["[]", "7", '{"identity": null}'])
def test_an_odd_manifest_does_not_stop_the_plan(run, tmp_path, text):
    folder = tmp_path / "run" / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(text)
    assert plan(run).batch.global_batch_rows == 4


def test_set_aside_moves_what_a_run_left_and_keeps_the_rest(tmp_path):
    run_dir = tmp_path / "run"
    assert train.set_aside(run_dir) is None
    for number in (1, 2):
        for name in ("checkpoints/step-00000001", "services", "tensorboard", "shards/train"):
            (run_dir / name).mkdir(parents=True, exist_ok=True)
        (run_dir / "run.yaml").write_text(f"run {number}")
        (run_dir / "checkpoints" / "step-00000001" / "state.json").write_text(f"state {number}")
        (run_dir / "notes.txt").write_text("mine")
        assert train.set_aside(run_dir) == run_dir / f"previous-{number}"
        assert sorted(p.name for p in (run_dir / f"previous-{number}").iterdir()) == [
            "checkpoints",
            "run.yaml",
            "services",
            "tensorboard",
        ]
    for number in (1, 2):
        aside = run_dir / f"previous-{number}"
        assert (aside / "run.yaml").read_text() == f"run {number}"
        assert (aside / "checkpoints" / "step-00000001" / "state.json").read_text() == f"state {number}"
    assert sorted(p.name for p in run_dir.iterdir()) == ["notes.txt", "previous-1", "previous-2", "shards"]
    assert train.set_aside(run_dir) is None


def test_a_run_folder_has_one_run_at_a_time(run, tmp_path):
    held = train.lock(tmp_path / "run")
    message = r"run_dir: .*run is in use by process \d+ on \S+; wait for it, stop it, or choose another run_dir"
    with pytest.raises(ConfigError, match=message):
        train.lock(tmp_path / "run")
    one_line(sft_dist("train", run), 2, "run is in use by process")
    train.lock(tmp_path / "another").close()
    held.close()
    train.lock(tmp_path / "run").close()


def test_the_last_word_says_how_to_go_on(run):
    made = plan(run)
    steps = made.steps()
    assert (
        train._last_word(made, "completed", steps, steps, "")
        == f"completed: {steps} of {steps} steps, in {made.run_dir}"
    )
    stopped = train._last_word(made, "stopped", 3, steps, "asked to stop by SIGTERM")
    assert stopped == (
        f"stopped after step 3 of {steps} (asked to stop by SIGTERM); step 3 is saved. The same command goes on from there"
    )
    assert "no step was done" in train._last_word(made, "stopped", 0, steps, "x")
    once = dataclasses.replace(made, resume=train.Resume(from_step=100, skip_rows=4, allow=("seed-change",)))
    assert train._last_word(once, "stopped", 3, steps, "x").endswith(
        "The same command without --from=100 --skip-rows=4 goes on from there"
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ("--fresh", "--from=3"),
            "--fresh starts over: there is nothing for --from, --reset-data, --skip-rows or --allow",
        ),
        (("--fresh", "--allow=seed-change"), "--fresh starts over"),
        (("--skip-rows=-5",), "--skip-rows -5: rows of the stream are left out, so it is 1 or more"),
    ],
)
def test_ways_to_go_on_that_contradict_themselves_are_refused_by_a_rank_too(run, environment, capsys, more, message):
    assert train.main([str(run), *more]) == 2
    assert message in capsys.readouterr().err


def test_fp16_without_a_gpu_is_refused_before_any_group_starts(run, monkeypatch):
    from launch import parts

    monkeypatch.setattr(parts.torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"train\.precision: 'fp16' is not allowed without a GPU"):
        parts.comms(plan(run, "train.precision=fp16"))


def test_early_stopping_needs_something_to_judge_by(run, tmp_path, shards):
    early = "evaluate={every_steps: 1, early_stopping: {metric: validation_f1}}"
    assert plan(run, early).config.evaluate.early_stopping.patience == 3
    bare = tmp_path / "bare"
    shutil.copytree(shards / "out", bare)
    shutil.rmtree(bare / "labels")
    with pytest.raises(ConfigError, match="'validation_f1' is only measured of a label task; use validation_loss"):
        plan(run, early, f"prepare.out={bare}")
    shutil.rmtree(bare / "validation")
    with pytest.raises(ConfigError, match=r"no validation set to judge by; set prepare\.validation_fraction"):
        plan(run, early, f"prepare.out={bare}")


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused_before_any_group_starts(run):
    long = plan(run, f"evaluate.prompts=[hello, {'spam ' * 80}]")
    with pytest.raises(ConfigError, match=r"evaluate\.prompts: 'spam spam .* has \d+ tokens, which leave no room"):
        train.run_plan(long, None)


@pytest.mark.parametrize(("rows", "seq_len"), [(4, 1024), (31, 21), (3, 3), (2, 2)])
def test_a_full_micro_batch_tells_of_all_its_documents(rows, seq_len):
    import torch

    from launch import parts

    of = SimpleNamespace(batch=SimpleNamespace(micro_batch_rows=rows), shards=SimpleNamespace(seq_len=seq_len))
    made = parts.full_micro_batch(of, torch.device("cpu"))
    assert int((made.positions == 0).sum()) <= made.num_documents  # of too few a kernel would leave the last out
    assert int(made.targets.sum()) == made.num_targets == rows * (seq_len - 1)


def test_prompts_are_those_of_validation_and_then_ones_own(run):
    from launch import parts

    made = parts.sampling(plan(run, "evaluate.prompts=[hello, win a prize]", "evaluate.samples=2"))
    assert [prompt.text for prompt in made.prompts[2:]] == ["hello", "win a prize"]
    assert [bool(prompt.expected) for prompt in made.prompts] == [True, True, False, False]
    assert made.batch_tokens == 64


def test_a_deadline_that_is_over_is_refused_before_any_group_starts(run):
    with pytest.raises(ConfigError, match=r"budget\.deadline: 2001-01-01T.* is over; set a later one"):
        train.run_plan(plan(run, "budget.deadline=2001-01-01"), None)


def state_and_notes(state, **resume):
    from launch.going_on import with_changes

    return with_changes(state, {"seed": 0}, {"seed": 0}, train.Resume(**resume))


def test_rows_are_skipped_and_recorded_without_a_checkpoint_too():
    from sft_dist.state import TrainState

    state, notes = state_and_notes(TrainState(), skip_rows=5)
    assert (state.rows_consumed, state.skipped) == (5, ((0, 5),))
    assert notes == ["skipped: rows 0 to 4 of the stream are left out"]
    with pytest.raises(CheckpointError, match="--reset-data: there is no checkpoint to go on from"):
        state_and_notes(TrainState(), resets_data=True)


def test_with_leave_to_change_the_batch_the_new_one_is_derived(run):
    """One in samples otherwise keeps the rows of a step that the run began with."""
    folder = Path(load(run).run_dir) / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"identity": {"global_batch_rows": 7}}')
    (folder.parent / "step-00000002.old-1").mkdir()
    (folder.parent / "step-00000002.old-1" / "manifest.json").write_text('{"identity": {"global_batch_rows": 9}}')
    overrides = ("train.global_batch_rows=null", "train.global_batch_samples=40")

    def rows(**resume):
        made = train.Plan.of(load(run, overrides), Topology(), LIFE, train.Resume(**resume))
        return made.batch.global_batch_rows

    assert rows() == rows(from_step=1) == 7
    assert rows(allow=("batch-change",)) == rows(is_fresh=True) not in (7, 9)


@pytest.fixture
def environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SFT_DIST_STOP_FILE", "SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SFT_DIST_LIFE", "life")
    return monkeypatch


def test_a_rank_that_cannot_start_says_why_and_leaves_a_verdict(tmp_path, environment, capsys):
    assert train.main([str(tmp_path / "nowhere.yaml")]) == 2
    assert capsys.readouterr().err == (
        f"sft-dist: {tmp_path / 'nowhere.yaml'}: no such run file; name an existing one, such as examples/sms-spam/run.yaml, or write one: sft-dist init\n"
    )
    path = run_file(tmp_path, tmp_path / "nowhere", tmp_path / "sms")
    assert train.main([str(path), "--fresh", "--local_rank=0", "train.epochs=3"]) == 2
    assert "no prepared shards there" in capsys.readouterr().err
    left = Verdict.read(tmp_path / "run" / "verdicts", "life-0")
    assert (left.reason, left.step, left.exit_code) == ("refused", -1, 2)
    assert "no prepared shards there" in left.detail


def test_what_a_rank_alone_finds_wrong_is_its_nodes_fault(tmp_path, environment, capsys):
    """The batch script has found the run right before it started the ranks."""
    environment.setenv("SFT_DIST_CHECKED", "1")
    environment.setenv("SLURMD_NODENAME", "n7")
    path = run_file(tmp_path, tmp_path / "not-mounted-here", tmp_path / "sms")
    assert train.main([str(path)]) == 75
    assert "node n7: " in capsys.readouterr().err
    left = Verdict.read(tmp_path / "run" / "verdicts", "life-0")
    assert (left.reason, left.exit_code, left.bad_nodes) == ("unhealthy", 75, "n7")


def test_a_node_without_the_gpus_that_slurm_gave_it_is_named(run, monkeypatch):
    from launch import parts

    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    monkeypatch.setattr(parts.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(parts.torch.version, "cuda", "13.0")
    with pytest.raises(HealthError, match="node n7: SLURM gave it 8 GPUs, and none can be used") as caught:
        parts.comms(plan(run))
    assert caught.value.nodes == ("n7",)
    monkeypatch.setattr(parts.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(parts.torch.cuda, "device_count", lambda: 0)
    with pytest.raises(HealthError, match="node n7: 0 GPUs can be used, and rank 0 wants one more"):
        parts.comms(plan(run))


def test_only_the_main_rank_speaks(tmp_path, environment, capsys):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        environment.setenv(name, value)
    assert train.main([str(tmp_path / "nowhere.yaml")]) == 2
    assert capsys.readouterr() == ("", "")


def test_half_an_announcement_of_a_world_is_refused(run, environment, capsys):
    environment.setenv("RANK", "0")
    assert train.main([str(run)]) == 2
    assert "sft-dist: environment: WORLD_SIZE, LOCAL_RANK not set although RANK is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("devices", "processes"), [("0", 1), ("0,1,2", 3), ("", 1), ("-1", 1), ("GPU-ab,GPU-cd", 2), ("0, 1,", 2)]
)
def test_one_process_for_each_visible_gpu(monkeypatch, devices, processes):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    assert local.default_processes() == processes


def test_without_gpus_there_is_one_process(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpus = list(Path("/proc/driver/nvidia/gpus").glob("*"))
    assert local.default_processes() == max(1, len(gpus))


BEFORE = """\
W1123 05:46:48.123000 4711 torch/distributed/run.py:852]
W1123 05:46:48.123000 4711 torch/distributed/run.py:852] *****************************************
W1123 05:46:48.123000 4711 torch/distributed/run.py:852] Setting OMP_NUM_THREADS environment variable for each process to be 1
W1123 05:46:48.123000 4711 torch/distributed/run.py:852] *****************************************
"""
TORCHRUN = """\
E1123 05:46:50.123000 4711 torch/distributed/elastic/multiprocessing/api.py:988] failed (exitcode: 1) local_rank: 0 (pid: 1)
Traceback (most recent call last):
  File "<frozen runpy>", line 198, in _run_module_as_main
  File "/venv/torch/distributed/run.py", line 999, in <module>
    main()
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
launch/train.py FAILED
------------------------------------------------------------
"""
RANK = """\
Traceback (most recent call last):
  File "/somewhere/launch/train.py", line 213, in <module>
    code = main()
ZeroDivisionError: division by zero
"""


@pytest.mark.parametrize(
    ("said", "relayed"),
    [
        (BEFORE + "sft-dist: train.epochs: wrong\n" + TORCHRUN, "sft-dist: train.epochs: wrong\n"),
        (BEFORE + RANK + TORCHRUN, RANK),
        (RANK + "\nDuring handling of the above exception, another exception occurred:\n\n" + RANK + TORCHRUN,
         RANK + "\nDuring handling of the above exception, another exception occurred:\n\n" + RANK),
        (BEFORE + "warning: something\n", "warning: something\n"),
        ("Traceback (most recent call last):\n" + BEFORE + RANK.partition("\n")[2], RANK),
        ("", ""),
    ],
    ids=["an error for people", "a rank's traceback", "a chain of tracebacks", "success", "noise in between", "silence"],
)  # fmt: skip
def test_what_the_ranks_say_is_passed_on_but_not_torchruns_own_account(capsys, said, relayed):
    local.relay(SimpleNamespace(stderr=io.StringIO(said)))
    assert capsys.readouterr().err == relayed


def test_a_traceback_that_was_cut_short_still_shows(capsys):
    local.relay(SimpleNamespace(stderr=io.StringIO("Traceback (most recent call last):\n")))
    assert capsys.readouterr().err == "Traceback (most recent call last):\n"


def metrics_of(run_dir, *, has_labels=True):
    run_dir.mkdir(parents=True, exist_ok=True)
    before = {"validation_loss": 5.0, "validation_perplexity": 148.4}
    after = {"validation_loss": 0.25, "validation_perplexity": 1.28}
    if has_labels:
        before |= {"validation_accuracy": 0.125, "validation_f1": 0.0, "validation_exact_match": 0.0}
        after |= {"validation_accuracy": 0.9875, "validation_f1": 0.9531, "validation_exact_match": 0.975}
    lines = [{"step": 0, **before}, *({"step": n, "loss": 5.0 / n} for n in range(1, 20)), {"step": 19, **after}]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_summary_shows_before_and_after_and_what_to_try_next(run, tmp_path):
    metrics_of(tmp_path / "run")
    lines = local.summary(load(run)).splitlines()
    assert "\x1b" not in "".join(lines)
    told = [line.split() for line in lines if line.startswith("held-out")]
    assert told == [
        ["held-out", "loss", "5.0000", "0.2500"],
        ["held-out", "perplexity", "148.4000", "1.2800"],
        ["held-out", "accuracy", "0.1250", "0.9875"],
        ["held-out", "F1", "0.0000", "0.9531"],
        ["held-out", "exact", "match", "0.0000", "0.9750"],
    ]
    folder = tmp_path / "run"
    assert f"TensorBoard:  tensorboard --logdir {folder / 'tensorboard'}" in lines
    for command in (f"export {folder} {folder / 'export'}", f"eval {folder}", f'chat {folder} --prompt "…"'):
        assert f"  sft-dist {command}" in lines


def test_the_summary_of_a_run_without_validation_or_metrics(run, tmp_path):
    assert "held-out" not in local.summary(load(run))
    metrics_of(tmp_path / "run", has_labels=False)
    assert "accuracy" not in local.summary(load(run))


def launcher(folder, monkeypatch, body):
    """Stands where Python with torchrun would: a shell script that sees the same environment and arguments."""
    script = folder / "python"
    script.write_text(f"#!/bin/bash\n{body}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


def verdict(folder, reason, exit_code=0):
    text = json.dumps({"life": "x", "reason": reason, "step": 3, "detail": "", "exit_code": exit_code})
    return f"mkdir -p {folder}/run/verdicts; echo '{text}' > {folder}/run/verdicts/$SFT_DIST_LIFE-0.json"


@pytest.mark.parametrize(
    ("reason", "told", "ends_with", "code"),
    [("completed", 0, 0, 0), ("stopped", 0, 0, 128 + signal.SIGTERM), ("refused", 3, 1, 3), ("refused", 2, 1, 2), ("diverged", 1, 1, 1)],
)  # fmt: skip
def test_the_exit_code_is_the_verdicts(run, tmp_path, monkeypatch, capsys, reason, told, ends_with, code):
    metrics_of(tmp_path / "run")
    left = verdict(tmp_path, reason, told)
    launcher(tmp_path, monkeypatch, f'{left}; echo "$@" > {tmp_path}/arguments; exit {ends_with}')
    overrides = ["train.epochs=1"]
    assert local.run(load(run, overrides), str(run), overrides, 2, train.Resume(is_fresh=True)) == code
    assert ("next:" in capsys.readouterr().out) == (reason == "completed")
    arguments = (tmp_path / "arguments").read_text().split()
    assert arguments == [
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--shutdown-timeout=5", str(ROOT / "launch" / "train.py"), str(run),
        "train.epochs=1", "--fresh",
    ]  # fmt: skip


@pytest.mark.parametrize(("body", "code"), [("exit 7", 7), ("exit 0", 1), ("kill -9 $$", 137)])
def test_ranks_that_leave_no_verdict_are_a_failure(run, tmp_path, monkeypatch, capsys, body, code):
    launcher(tmp_path, monkeypatch, f"echo 'a rank said so' >&2; {body}")
    assert local.run(load(run), str(run), [], 1, train.Resume()) == code
    error = capsys.readouterr().err
    assert error.startswith("a rank said so\n")
    assert "and left no verdict: see above" in error


def test_the_first_signal_asks_and_the_ranks_end_by_themselves(run, tmp_path, monkeypatch, capfd):
    wait = "while [ ! -e $SFT_DIST_STOP_FILE ]; do echo waiting > $SFT_DIST_STOP_FILE.not; sleep 0.05; done"
    launcher(
        tmp_path, monkeypatch, f"{wait}; cat $SFT_DIST_STOP_FILE > {tmp_path}/cause; {verdict(tmp_path, 'stopped')}"
    )
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    assert local.run(load(run), str(run), [], 1, train.Resume()) == 128 + signal.SIGINT
    assert (tmp_path / "cause").read_text() == "SIGINT"
    assert "stopping: the last completed step is being saved" in capfd.readouterr().err


def test_a_second_signal_ends_the_ranks_now(run, tmp_path, monkeypatch, capfd):
    launcher(tmp_path, monkeypatch, "sleep 30 & wait")
    timers = [threading.Timer(after, os.kill, (os.getpid(), signal.SIGTERM)) for after in (0.4, 0.7)]
    for timer in timers:
        timer.start()
    assert local.run(load(run), str(run), [], 1, train.Resume()) == 128 + signal.SIGTERM
    assert "left no verdict" in capfd.readouterr().err


def test_the_command_ends_with_the_code_of_the_ranks(run, tmp_path, monkeypatch):
    launcher(tmp_path, monkeypatch, f"{verdict(tmp_path, 'stopped')}")
    assert sft_dist("train", run).exit_code == 128 + signal.SIGTERM
    with pytest.raises(ConfigError, match="not a multiple"):
        local.run(load(run), str(run), [], 3, train.Resume())


@pytest.fixture(scope="module")
def model(shards, tmp_path_factory):
    """A little model with the tokenizer of the shards, as another tool would leave it."""
    import shutil

    from sft_dist.data.tokenise import Tokenizer
    from sft_dist.model import build, model_config
    from sft_dist.schema import ModelConfig

    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer.load(str(shards / "out" / "tokenizer"))
    config = ModelConfig(config={"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 1})
    made = model_config(config, vocab_size=tokenizer.vocab_size, seq_len=64, eos_id=tokenizer.eos_id)
    build(config, made, seed=0, gradient_checkpointing=False).save_pretrained(folder)
    shutil.copytree(shards / "out" / "tokenizer", folder, dirs_exist_ok=True)
    return folder


def test_what_cannot_be_evaluated_is_one_line(model, shards, tmp_path):
    one_line(sft_dist("eval", tmp_path / "nowhere"), 2, "nowhere: neither a run folder nor a model (")
    (tmp_path / "sms").mkdir()
    (tmp_path / "sms" / "run.yaml").touch()
    one_line(
        sft_dist("eval", tmp_path / "smss"), 2, f"neither a run folder nor a model (did you mean {tmp_path / 'sms'}?)"
    )
    one_line(
        sft_dist("eval", tmp_path / "q"), 2, f"neither a run folder nor a model (of {tmp_path} there are sms). Name"
    )
    one_line(sft_dist("eval", model), 2, "no shards are known for it; name prepared ones with --shards FOLDER")
    one_line(
        sft_dist("eval", model, "--shards", tmp_path), 2, "has no validation split; set prepare.validation_fraction"
    )
    other = tmp_path / "other"
    path = run_file(tmp_path, other, shards / "sms", prepare__tokenizer={"sentencepiece": {"vocab_size": 310}})
    assert sft_dist("prepare", path).exit_code == 0
    one_line(sft_dist("eval", model, "--shards", other), 2, "is not the one the shards were cut with")


def test_a_run_without_a_checkpoint_is_one_line_and_code_3(run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text(run.read_text())
    message = "run: no checkpoint there yet; train first, or name another run folder"
    for arguments in (("export", tmp_path / "run", tmp_path / "out"), ("eval", tmp_path / "run")):
        one_line(sft_dist(*arguments), 3, message)
    one_line(sft_dist("chat", tmp_path / "run", "--prompt", "x"), 3, message)
    assert not (tmp_path / "out").exists()


def test_an_export_never_overwrites(run, tmp_path):
    one_line(sft_dist("export", tmp_path / "run", tmp_path), 2, "already exists and is kept; choose another folder")


def test_chat_answers_within_the_context_or_says_why_not(model, tmp_path):
    import shutil

    answered = sft_dist("chat", model, "--prompt", "hello", "--max-new-tokens", "3")
    assert answered.exit_code == 0, answered.output
    one_line(
        sft_dist("chat", model, "--prompt", "hello " * 100),
        2,
        "tokens do not leave room in a context of 64; shorten it",
    )
    plain = shutil.copytree(model, tmp_path / "plain")
    about = json.loads((plain / "tokenizer_config.json").read_text())
    del about["chat_template"]
    (plain / "tokenizer_config.json").write_text(json.dumps(about))
    one_line(
        sft_dist("chat", plain, "--prompt", "x"),
        2,
        "its tokenizer has no chat template; export it from a run, or add one",
    )
    (plain / "tokenizer.json").unlink()
    (plain / "tokenizer_config.json").unlink()
    result = sft_dist("chat", plain, "--prompt", "x")
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)
