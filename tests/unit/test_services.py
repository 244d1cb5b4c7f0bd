import itertools
import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sft_dist import services
from sft_dist.metrics import JsonLines, Metrics
from sft_dist.mlflow_sink import MLflow
from sft_dist.services import Follower, Told
from sft_dist.wandb_sink import WeightsAndBiases
from tests.unit.test_metrics import ANSWERS
from tests.unit.test_tensorboard_sink import CONFIG, DOCUMENTS, MATRIX


class Ours:
    """A service that remembers, and fails as often as it is told to."""

    name, first_id, settle_seconds = "Ours", "", 0.0

    def __init__(self, known=None, *, failures=0, seconds=0.0):
        self.known = [] if known is None else known
        self.failures, self.seconds, self.opened, self.is_finished = failures, seconds, [], False

    def open(self, id):
        self.opened.append(id)
        self._stumble()
        return id or "run-1"

    def send(self, number, step, at, what):
        time.sleep(self.seconds)
        self._stumble()
        self.known.append((number, step, what))

    def finish(self):
        self.is_finished = True

    def _stumble(self):
        self.failures -= 1
        if self.failures >= 0:
            raise ConnectionError("no route to host\nand more")


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(services, "_RETRY_SECONDS", (0.01,))


def life(run_dir, service, resume_step, end, *, name="ours", patience=30.0, is_another_run=False):
    """A life from its checkpoint to a step; returns it before it is closed."""
    path = run_dir / "metrics.jsonl"
    truth = JsonLines(path, resume_step)
    about = run_dir / f"services/{name}.json"
    follower = Follower(service, path, about, is_another_run=is_another_run, patience=patience)
    metrics = Metrics((truth, follower), lambda: {"gpu_hours": 0.5}, resume_step, 100 * resume_step)
    if resume_step == 0:
        metrics.config(0, CONFIG)
    for step in range(resume_step + 1, end + 1):
        metrics.stepped(step, 100 * step)
        metrics.scalars(step, {"loss": 10.0 - step, "unheard_of": 1.0})
        if step % 3 == 0:
            metrics.scalars(step, {"validation_loss": 11.0 - step})
            metrics.samples(step, ANSWERS)
            metrics.confusion(step, MATRIX)
            metrics.document_losses(step, DOCUMENTS)
    return metrics


def curve(known, tag="train/loss"):
    return [(step, what[tag]) for _, step, what in known if tag in what]


def test_the_lives_of_a_run_are_one_run_there_without_overlap_or_gap(tmp_path):
    first = Ours()
    life(tmp_path, first, 0, 7).close()
    assert first.is_finished
    second = Ours(first.known)
    life(tmp_path, second, 4, 10).close()
    assert (first.opened, second.opened) == ([""], ["run-1"])
    assert curve(first.known) == [(step, 10.0 - step) for step in range(1, 11)]
    assert curve(first.known, "validation/loss") == [(3, 8.0), (6, 5.0), (9, 2.0)]
    assert [step for _, step, what in first.known if "samples" in what] == [3, 6, 9]
    assert [number for number, _, _ in first.known] == list(range(len(first.known)))
    assert first.known[1][2] == {"train/loss": 9.0, "budget/target_tokens": 100, "budget/gpu_hours": 0.5}
    assert first.known[0] == (0, 0, {"config": CONFIG})


@pytest.mark.parametrize("failures", [1, 5])
def test_a_service_that_is_down_is_said_once_and_gets_all_when_it_is_back(tmp_path, caplog, failures):
    ours = Ours(failures=failures)
    metrics, end = life(tmp_path, ours, 0, 6), time.monotonic() + 30
    while not ours.known and time.monotonic() < end:
        time.sleep(0.01)
    metrics.close()
    assert curve(ours.known) == [(step, 10.0 - step) for step in range(1, 7)]
    assert [record.getMessage() for record in caplog.records] == [
        "warning: Ours: no route to host. The run goes on, and what is not told now is sent later, from metrics.jsonl"
    ]


def test_what_a_life_could_not_send_the_next_one_sends(tmp_path, caplog):
    down = Ours(failures=10_000)
    life(tmp_path, down, 0, 6).close()
    assert down.known == []
    assert "Ours has not been told all of the run; the next `sft-dist train`" in caplog.text
    ours = Ours()
    life(tmp_path, ours, 6, 6).close()
    assert curve(ours.known) == [(step, 10.0 - step) for step in range(1, 7)]


def test_a_service_that_hangs_slows_nothing_and_ends_after_a_while(tmp_path, caplog):
    slow, began = Ours(seconds=60.0), time.monotonic()
    metrics = life(tmp_path, slow, 0, 9, patience=0.2)
    metrics.close()
    assert time.monotonic() - began < 30.0
    assert "has not been told all" in caplog.text


def test_what_was_told_in_the_last_seconds_before_a_kill_is_told_again_under_its_numbers(tmp_path):
    first, end = Ours(), time.monotonic() + 30
    first.settle_seconds = 1000.0
    life(tmp_path, first, 0, 7)  # and killed
    while len(first.known) < 15 and time.monotonic() < end:
        time.sleep(0.01)
    second = Ours()
    life(tmp_path, second, 7, 7).close()
    assert second.opened == ["run-1"]
    assert second.known == first.known
    life(tmp_path, third := Ours(), 7, 7).close()
    assert third.known == []


def test_who_goes_back_by_hand_gets_another_run_there_with_all_that_counts(tmp_path):
    life(tmp_path, first := Ours(), 0, 7).close()
    life(tmp_path, second := Ours(), 4, 6, is_another_run=True).close()
    assert (first.opened, second.opened) == ([""], [""])
    assert curve(first.known) == [(step, 10.0 - step) for step in range(1, 8)]
    assert curve(second.known) == [(step, 10.0 - step) for step in range(1, 7)]
    assert len(list((tmp_path / "services").iterdir())) == 2, "what the first was told is kept"


def test_what_another_version_wrote_holds_nothing_back(tmp_path):
    metrics = life(tmp_path, service := Ours(), 0, 1)
    metrics.sinks[0].write({"step": 1, "samples": ["a"], "confusion": {"labels": []}})
    metrics.stepped(2, 200)
    metrics.scalars(2, {"loss": 8.0})
    metrics.close()
    assert curve(service.known) == [(1, 9.0), (2, 8.0)]
    assert service.is_finished


def test_a_damaged_memory_of_what_was_told_is_none(tmp_path):
    path = tmp_path / "ours.json"
    for content in ("", "{", "[]", '{"other": 1}'):
        path.write_text(content)
        assert Told.read(path) == Told()


def test_what_a_service_was_told_of_another_metric_does_not_hold_a_new_one_back():
    told = Told(steps={"loss": 8})
    record = {"step": 8, "loss": 2.5, "validation_loss": 2.0, "gpu_hours": 1.0}
    assert told.news(record) == {"validation/loss": 2.0, "budget/gpu_hours": 1.0}
    told.tell(record)
    assert told.news(record) == {}
    assert told.news({"step": 9, "remark": "x", "samples": "of another version"}) == {}


# The real libraries.


def needs(package):
    """Skipped where it is missing, saying what to install."""
    return pytest.importorskip(package, reason=f"pip install 'sft-dist[{package}]'")


def offline_records(folder):
    """What their own files of offline runs hold, in order: (their step, our step, values), configs, run ids."""
    needs("wandb")
    from wandb.proto import wandb_internal_pb2

    history, configs, ids = [], [], set()
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for data in _records_of_leveldb_log(path.read_bytes()[7:]):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "history":
                values = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                history.append((record.history.step.num, values.pop("step"), values))
            elif kind == "config":
                configs.append(
                    {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.config.update}
                )
            elif kind == "run":
                ids.add(record.run.run_id)
    return history, configs, ids


def _records_of_leveldb_log(content):
    """The format of their files, by its specification: blocks of 32 KiB of (crc32, length, type, data); the header is 7 bytes."""
    at, whole = 7, b""
    while at + 7 <= len(content) + 7:
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        header = content[at - 7 : at]
        length, type_ = int.from_bytes(header[4:6], "little"), header[6]
        whole += content[at : at + length]
        at += 7 + length
        if type_ in (1, 4):
            yield whole
            whole = b""


SERVE = """
import os, signal, sys, time
from pathlib import Path
from sft_dist.services import Told
from tests.unit.test_services import WeightsAndBiases, life
import wandb  # before the fork: it takes seconds

def begun(begin, end):
    return life(folder, WeightsAndBiases(folder / "services", "sms", mode="offline"), begin, end, name="wandb")

folder = Path(sys.argv[1])
if (child := os.fork()) == 0:
    begun(0, 7)
    while Told.read(folder / "services/wandb.json").steps.get("loss") != 7:
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGKILL)
assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
begun(4, 10).close()
"""


def test_wandb_offline_over_a_kill_is_one_run_without_overlap_or_gap(tmp_path):
    needs("wandb")
    (tmp_path / "services").mkdir()
    command, root = [sys.executable, "-c", SERVE, tmp_path], Path(__file__).parents[2]
    made = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=400, check=False)
    assert (made.returncode, made.stdout, made.stderr) == (0, "", "")
    history, configs, ids = offline_records(tmp_path / "services")
    assert len(list((tmp_path / "services/wandb").glob("offline-run-*"))) == 2
    assert ids == {json.loads((tmp_path / "services/wandb.json").read_text())["id"]}
    assert curve(history) == [(step, 10.0 - step) for step in range(1, 11)]
    assert curve(history, "validation/loss") == [(3, 8.0), (6, 5.0), (9, 2.0)]
    numbers = [number for number, _, _ in history]
    assert all(a < b for a, b in itertools.pairwise(numbers)), numbers
    kinds = {name.partition(".")[0] for _, step, values in history if step == 6 for name in values}
    assert {"samples", "validation/confusion", "validation/document_losses", "budget/gpu_hours"} <= kinds
    assert "learning_rate" in json.dumps(configs)


def test_wandb_without_a_key_is_said_and_ends_nothing(tmp_path, monkeypatch, caplog):
    needs("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    (tmp_path / "services").mkdir()
    life(tmp_path, WeightsAndBiases(tmp_path / "services", "sms"), 0, 2, name="wandb").close()
    assert "warning: W&B: No API key configured. Use `wandb login` to log in. The run goes on" in caplog.text


def test_mlflow_over_two_lives_is_one_run_without_overlap_or_gap(tmp_path, monkeypatch):
    needs("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(tmp_path)  # its artifacts go to ./mlruns, where a server does not say otherwise
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    life(tmp_path, MLflow("sms", uri, "first"), 0, 7, name="mlflow", patience=400).close()
    client = MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("sms").experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "first")
    life(tmp_path, MLflow("sms", uri, "first"), 4, 10, name="mlflow", patience=400).close()
    assert len(client.search_runs([run.info.experiment_id])) == 1

    def history(tag):
        return sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, tag))

    assert history("train/loss") == [(step, 10.0 - step) for step in range(1, 11)]
    assert history("validation/loss") == [(3, 8.0), (6, 5.0), (9, 2.0)]
    assert client.get_run(run.info.run_id).data.params["train.learning_rate"] == "0.001"
    held = {path.path for kind in ("samples", "config") for path in client.list_artifacts(run.info.run_id, kind)}
    assert held == {f"samples/step-{step:08d}.json" for step in (3, 6, 9)} | {"config/step-00000000.yaml"}
    again = MLflow("sms", uri)
    assert again.open(run.info.run_id) == run.info.run_id
    point = client.get_metric_history(run.info.run_id, "train/loss")[0]
    again.send(0, point.step, point.timestamp / 1000, {"train/loss": point.value})  # killed before it was noted
    again.send(0, 10, 0.0, {"config": {"train": {"learning_rate": 7.0, "seed": 1}}})
    assert len(history("train/loss")) == 10
    params = client.get_run(run.info.run_id).data.params
    assert (params["train.learning_rate"], params["train.seed"]) == ("0.001", "1")


def test_mlflow_that_nobody_serves_is_said_and_ends_nothing(tmp_path, monkeypatch, caplog):
    needs("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    life(tmp_path, MLflow("sms", "http://localhost:9"), 0, 2, name="mlflow", patience=400).close()
    assert "warning: MLflow: " in caplog.text
    assert threading.current_thread() is threading.main_thread()
    assert logging.getLogger("mlflow").level == logging.ERROR
