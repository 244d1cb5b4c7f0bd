import errno
import io
import json
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sft_dist.metrics import JsonLines, Metrics, read_lines
from sft_dist.tensorboard_sink import TensorBoard
from tests.invariants.runs import charts
from tests.unit.test_metrics import ANSWERS

ALL = {"scalars": 0, "tensors": 0, "histograms": 0}
MATRIX = {"labels": ["ham", "a|b"], "counts": [[812, 3], [5, 120]]}
DOCUMENTS = {"count": 4, "mean": 1.5, "quantiles": {"0.5": 1.5}, "edges": [1.0, 2.0, 4.0], "counts": [3, 1]}
CONFIG = {"train": {"learning_rate": 1e-3, "epochs": None}, "model": {"name_or_path": "gpt2"}, "zero": "zero2.json"}


def accumulated(folder):
    return EventAccumulator(str(folder), size_guidance=ALL).Reload()


def life(run_dir, resume_step, end, *, lost_seconds=0, is_going_back=0):
    """A life from its checkpoint to a step, or to its death there: nothing is closed."""
    path = run_dir / "metrics.jsonl"
    truth = JsonLines(path, resume_step)
    board = TensorBoard(run_dir / "tensorboard", read_lines(path))
    clock = [lost_seconds + resume_step]
    metrics = Metrics((truth, board), lambda: {"gpu_hours": clock[0] / 3600}, resume_step, 100 * resume_step)
    if resume_step == 0:
        metrics.scalars(0, {"validation_loss": 9.0})
    for step in range(resume_step + 1, end + 1):
        clock[0] = lost_seconds + step
        metrics.stepped(step, 100 * step)
        metrics.scalars(step, {"loss": 1.0 * step + is_going_back, "step_seconds": 1.0, "unheard_of": 1.0})
        if step % 3 == 0:
            metrics.scalars(step, {"validation_loss": 0.5 * step + is_going_back, "validation_loss/chat": 1.0})
            metrics.samples(step, ANSWERS)
            metrics.document_losses(step, DOCUMENTS)
    return metrics


def expected(lives):
    """The curves of a run whose lives stood at (first step, last step that counts, seconds lost before)."""
    steps = [(step, lost) for first, last, lost in lives for step in range(first, last + 1)]
    hours = {step: round((lost + step) / 3600 * 1e6) for step, lost in steps}
    return {
        (".", "train/loss"): [(step, step) for step, _ in steps],
        ("by_target_tokens", "by_target_tokens/train_loss"): [(100 * step, step) for step, _ in steps],
        ("by_gpu_hours", "by_gpu_hours/train_loss"): [(hours[step], step) for step, _ in steps],
        (".", "validation/loss"): [(0, 9.0), *((step, 0.5 * step) for step, _ in steps if step % 3 == 0)],
        ("by_target_tokens", "by_target_tokens/validation_loss"): [
            (0, 9.0),
            *((100 * step, 0.5 * step) for step, _ in steps if step % 3 == 0),
        ],
        (".", "budget/gpu_hours"): [(step, pytest.approx((lost + step) / 3600)) for step, lost in steps],
    }


def test_over_lives_that_were_killed_no_chart_overlaps_or_has_a_gap(tmp_path):
    life(tmp_path, 0, 10)  # saved at 8, evaluated at 9, and killed after 10
    life(tmp_path, 8, 11, lost_seconds=5)
    life(tmp_path, 8, 14, lost_seconds=9).close()
    found = charts(tmp_path)
    for curve, wanted in expected([(1, 8, 0), (9, 14, 9)]).items():
        assert found[curve] == wanted, curve
    assert len(list((tmp_path / "tensorboard").rglob("events*"))) == 3, "one for each x-axis"
    (run, tag) = (".", "validation/loss/chat")
    assert [x for x, _ in found[run, tag]] == [3, 6, 9, 12]
    assert not [tag for _, tag in found if "unheard_of" in tag]


def test_a_roll_back_in_the_process_leaves_nothing_of_what_was_left(tmp_path):
    left = life(tmp_path, 0, 9, is_going_back=100)
    left.close()
    life(tmp_path, 0, 4).close()
    life(tmp_path, 4, 5, lost_seconds=5).close()  # shorter than what was left: an evaluation at 9 must not stay
    found = charts(tmp_path)
    for curve, wanted in expected([(1, 4, 0), (5, 5, 5)]).items():
        assert found[curve] == wanted, curve
    events = accumulated(tmp_path / "tensorboard")
    assert [event.step for event in events.Tensors("samples/0")] == [3]
    assert [event.step for event in events.Histograms("validation/document_losses")] == [3]


def served(folder, *options):
    """What a person sees: (run, tag) -> (x, value), asked of the real server."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", str(port), *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            base, end = f"http://localhost:{port}/data/plugin/scalars", time.monotonic() + 300
            while time.monotonic() < end:
                try:
                    with urllib.request.urlopen(f"{base}/tags") as answer:
                        tags = json.load(answer)
                    if len(tags) == 3:
                        break
                except OSError:
                    pass
                time.sleep(0.2)
            found = {}
            for run, tag in [
                (".", "train/loss"),
                ("by_gpu_hours", "by_gpu_hours/train_loss"),
                (".", "validation/loss"),
            ]:
                with urllib.request.urlopen(f"{base}/scalars?run={run}&tag={tag}") as answer:
                    found[run, tag] = [(x, value) for _, x, value in json.load(answer)]
            return found
        finally:
            server.terminate()


def test_the_server_that_people_start_shows_the_same(tmp_path):
    """It does not heed purge markers: a life that only went on in a file of its own left the evaluation at 9 there, and over
    GPU-hours all of 5 to 9 twice."""
    life(tmp_path, 0, 9)
    life(tmp_path, 4, 8, lost_seconds=5).close()
    wanted = expected([(1, 4, 0), (5, 8, 5)])
    found = served(tmp_path / "tensorboard")
    for curve, seen in found.items():
        assert seen == wanted[curve], curve
    assert len(found) == 3


def test_what_is_drawn_besides_numbers(tmp_path):
    board = TensorBoard(tmp_path)
    board.write({"step": 0, "at": 1.8e9, "config": CONFIG})
    board.write({"step": 7, "at": 1.8e9, "confusion": MATRIX})
    board.write({"step": 7, "at": 1.8e9, "samples": [*ANSWERS, {"prompt": "hello", "answer": "hi", "expected": ""}]})
    board.write({"step": 7, "at": 1.8e9, "document_losses": DOCUMENTS})
    board.close()
    events = accumulated(tmp_path)
    tags = set(events.Tags()["tensors"]) - {"custom_scalars__config__"}
    text = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in tags}
    assert text["validation/confusion"].splitlines() == [
        "| truth ↓ taken for → | ham | a\\|b |",
        "| --- | --- | --- |",
        "| ham | 812 | 3 |",
        "| a\\|b | 5 | 120 |",
    ]
    assert "Is this\nspam?" in text["samples/0"]
    assert "**expected**\n\n```\nham\n```" in text["samples/0"]
    assert text["samples/2"] == "**prompt**\n\n```\nhello\n```\n\n**answer**\n\n```\nhi\n```"
    assert "  learning_rate: 0.001\n" in text["config"]
    assert "**`grad_norm`**" in text["glossary"]
    (histogram,) = events.Histograms("validation/document_losses")
    value = histogram.histogram_value
    assert (histogram.step, histogram.wall_time) == (7, 1.8e9)
    assert (value.num, value.sum, value.min, value.max) == (4, 6.0, 1.0, 4.0)
    assert (list(value.bucket_limit), list(value.bucket)) == ([2.0, 4.0], [3.0, 1.0])
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_records_of_another_version_are_drawn_as_far_as_they_are_known(tmp_path):
    kept = [
        {
            "step": 1,
            "loss": 2.5,
            "remark": "x",
            "samples": "none",
            "document_losses": 3,
            "confusion": [],
            "config": "y",
        },
        {"step": 2, "loss": 2.25},
    ]
    TensorBoard(tmp_path / "tensorboard", kept).close()
    assert charts(tmp_path) == {(".", "train/loss"): [(1, 2.5), (2, 2.25)]}


@pytest.mark.parametrize(
    "odd",
    [
        {"samples": [{"prompt": "a", "answer": "b"}]},
        {"samples": ["a"]},
        {"confusion": {"labels": ["a"]}},
        {"document_losses": {"edges": []}},
        {"config": {"train": None}},
    ],
)
def test_what_another_version_wrote_in_its_own_shape_ends_no_run(tmp_path, odd):
    TensorBoard(tmp_path, [{"step": 1, **odd}, {"step": 2, "loss": 2.5}]).close()
    assert [event.value for event in accumulated(tmp_path).Scalars("train/loss")] == [2.5]


def test_event_files_of_others_are_left_alone(tmp_path):
    theirs = tmp_path / "tensorboard/events.out.tfevents.1.host.1.0"
    theirs.parent.mkdir()
    theirs.write_bytes(b"")
    life(tmp_path, 0, 2).close()
    life(tmp_path, 1, 2).close()
    assert theirs.exists()


def test_a_folder_that_cannot_be_written_is_said_once_and_drawn_by_the_next_life(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    life(tmp_path, 0, 5).close()
    assert len(caplog.records) == 1
    assert "tensorboard: Not a directory: TensorBoard misses what comes" in caplog.text.replace(
        "File exists", "Not a directory"
    )
    (tmp_path / "tensorboard").unlink()
    life(tmp_path, 4, 6).close()
    assert [x for x, _ in charts(tmp_path)[".", "train/loss"]] == [1, 2, 3, 4, 5, 6]


class Full(io.BytesIO):
    """A file on a disk that has room for so many bytes."""

    raw = property(lambda self: self)

    def write(self, content):
        if self.tell() + len(content) > 200:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(content)


def test_on_a_full_disk_it_misses_some_and_goes_on_in_a_file_of_its_own(tmp_path, caplog):
    board = TensorBoard(tmp_path / "tensorboard")
    board.write({"step": 1, "loss": 1.0})
    board._files[""]._file.close()
    board._files[""]._records._writer = board._files[""]._file = Full()
    for step in (2, 3, 4, 5, 6, 7):
        board.write({"step": step, "loss": 1.0})
    board.close()
    assert len(caplog.records) == 1
    assert "No space left on device: TensorBoard misses what comes" in caplog.text
    steps = [x for x, _ in charts(tmp_path)[".", "train/loss"]]
    assert (steps[0], steps[-1]) == (1, 7)
    assert len(steps) < 7
