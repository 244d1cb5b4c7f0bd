import errno
import io
import json
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sft_dist.errors import DataError
from sft_dist.metrics import (
    TAGS,
    Console,
    JsonLines,
    Metrics,
    TensorBoard,
    confusion_table,
    loss_curve,
    peak_memory_bytes,
    read_lines,
)

ANSWERS = [
    {"prompt": "Is this\nspam?", "answer": " ham ", "expected": "ham"},
    {"prompt": "long " * 40 + "end", "answer": "spam", "expected": "x" * 80},
]


def filled(path, steps, resume_step=0):
    sink = JsonLines(path, resume_step)
    for step in steps:
        sink.scalars(step, {"loss": 10.0 - step})
    return sink


def steps_of(path):
    return [line["step"] for line in read_lines(path)]


def test_a_line_is_a_step_and_can_be_read_while_the_run_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = filled(path, [1, 2])
    sink.samples(2, ANSWERS)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 9.0}, {"step": 2, "loss": 8.0}, {"step": 2, "samples": ANSWERS}]
    assert read_lines(path) == lines
    sink.close()


def test_a_resumed_run_cuts_off_what_it_will_write_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    filled(path, range(0, 8)).close()
    filled(path, [6, 7, 8], resume_step=5).close()
    assert steps_of(path) == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_that_starts_over_starts_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    filled(path, range(0, 8)).close()
    filled(path, [0]).close()
    assert steps_of(path) == [0]


@pytest.mark.parametrize("cut", [1, 5, 14])
def test_a_last_line_cut_by_a_crash_is_left_out_and_written_again(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    filled(path, [1, 2, 3]).close()
    path.write_text(path.read_text()[:-cut])
    assert steps_of(path) == ([1, 2, 3] if cut == 1 else [1, 2])
    filled(path, [3, 4], resume_step=2).close()
    assert steps_of(path) == [1, 2, 3, 4]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_damaged_line_in_the_middle_is_no_crash_and_raises(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl: line 2 is not JSON; mend or remove that line"):
        read_lines(path)
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"metrics\.jsonl: line 2 is not JSON; mend or remove that line"):
        JsonLines(path, resume_step=3)
    assert path.read_bytes() == before


def test_no_file_is_no_records(tmp_path):
    assert read_lines(tmp_path / "metrics.jsonl") == []
    filled(tmp_path / "metrics.jsonl", [6], resume_step=5).close()
    assert steps_of(tmp_path / "metrics.jsonl") == [6]


def test_samples_of_any_text_survive_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path, 0)
    answers = [{"prompt": "a\nb\u2028c\x85d\x1ee", "answer": "😀", "expected": '"quoted"'}]
    sink.samples(1, answers)
    sink.close()
    assert read_lines(path) == [{"step": 1, "samples": answers}]


class FullFor:
    """A file on a disk that is full for so many writes; the first of them writes a part."""

    def __init__(self, file, times):
        self.file, self.times = file, times

    def write(self, content):
        self.times -= 1
        if self.times < 0:
            return self.file.write(content)
        if self.times % 2:
            return self.file.write(content[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("times", [1, 2, 3])
def test_lines_wait_in_memory_while_the_disk_is_full(tmp_path, times, caplog):
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path, 0)
    sink.scalars(1, {"loss": 1.0})
    sink._file = FullFor(sink._file, times)
    for step in range(2, 2 + times):
        sink.scalars(step, {"loss": 1.0})
        assert steps_of(path) == [1]  # and no half line
    sink.scalars(9, {"loss": 1.0})
    assert steps_of(path) == [1, *range(2, 2 + times), 9]
    sink.close()
    assert len(caplog.records) == 1
    assert "metrics.jsonl: No space left on device: its lines are held in memory" in caplog.text


def test_tensorboard_misses_what_cannot_be_written_and_goes_on(tmp_path, monkeypatch, caplog):
    sink = TensorBoard(tmp_path, 0)
    sink.scalars(1, {"loss": 1.0})
    sink._writer.flush()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sink._writer, "add_scalar", full)
    sink.scalars(2, {"loss": 2.0})
    assert "TensorBoard misses what comes now" in caplog.text
    time.sleep(1.1)  # event files are named by the second
    sink.scalars(3, {"loss": 3.0})
    sink.close()
    assert [event.step for event in accumulated(tmp_path).Scalars("train/loss")] == [1, 3]


def board(folder, steps, resume_step=0, texts=()):
    sink = TensorBoard(folder, resume_step)
    for step in steps:
        sink.scalars(step, {"loss": float(step), "unheard_of": 1.0})
    for step in texts:
        sink.samples(step, ANSWERS)
    sink.close()


def accumulated(folder):
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0})
    return events.Reload()


def test_tensorboard_reads_back_what_was_written(tmp_path):
    board(tmp_path, [1, 2, 3], texts=[0, 3])
    events = accumulated(tmp_path)
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert events.Tags()["scalars"] == ["train/loss"]  # a name without a tag is not written
    shown = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("samples/0/text_summary")]
    assert len(shown) == 2
    assert "Is this\nspam?" in shown[0]
    assert "**expected**\n\n```\nham\n```" in shown[0]


def test_tensorboard_hides_the_steps_that_a_resumed_run_writes_again(tmp_path):
    board(tmp_path, range(0, 8))
    for path in tmp_path.iterdir():
        path.rename(
            path.with_name("events.out.tfevents.1000000000.host.1.0")
        )  # an earlier life, whatever the clock says
    board(tmp_path, [6, 7, 8], resume_step=5)
    assert len(list(tmp_path.iterdir())) == 2
    assert [event.step for event in accumulated(tmp_path).Scalars("train/loss")] == [0, 1, 2, 3, 4, 5, 6, 7, 8]


def test_every_metric_has_one_tag():
    assert len(set(TAGS.values())) == len(TAGS)
    assert all(tag.count("/") == 1 for tag in TAGS.values())


def test_off_a_terminal_the_console_is_one_line_a_step():
    stream = io.StringIO()
    console = Console(10, 0, stream)
    numbers = {
        "loss": 2.5,
        "learning_rate": 1e-3,
        "grad_norm": 0.5,
        "target_tokens_per_second": 1234.4,
        "tokens_per_second": 56789.0,
    }
    console.scalars(3, {**numbers, "step_seconds": 1.0, "memory_bytes": 5})
    console.scalars(
        3, {"validation_loss": 0.5, "validation_perplexity": 1.65, "validation_accuracy": 0.99, "validation_f1": 0.9}
    )
    console.say("resuming [from] step 3")
    console.close()
    assert stream.getvalue().splitlines() == [
        "step 3/10  loss 2.5000  lr 1.00e-03  norm 0.50  1,234 target tokens/s  56,789 tokens/s",
        "step 3/10  validation loss 0.5000  perplexity 1.65  accuracy 0.9900  F1 0.9000",
        "resuming [from] step 3",
    ]


def test_the_console_shows_samples_on_a_line_each():
    stream = io.StringIO()
    Console(10, 0, stream).samples(0, ANSWERS)
    first, second = stream.getvalue().splitlines()
    assert first == "  sample at step 0: 'Is this spam?' → 'ham' (expected 'ham')"
    assert second.startswith("  sample at step 0: '…")
    assert "long end' → 'spam'" in second  # the end of a long prompt is what the answer follows
    assert second.endswith(f"(expected '{'x' * 60}')")
    assert len(second.partition(" → ")[0]) < 100


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_the_console_is_a_progress_bar_on_the_stream_it_was_given(capsys):
    stream = Terminal()
    console = Console(10, 4, stream)
    console.scalars(5, {"loss": 2.5})
    console.scalars(5, {"validation_loss": 0.5})
    console.say("a word [bold]as it is[/bold]")
    console.samples(5, ANSWERS[:1])
    console.close()
    shown = stream.getvalue() + capsys.readouterr().out
    for text in (
        "5/10",
        "loss 2.5000",
        "step 5/10  validation loss 0.5000",
        "[bold]as it is[/bold]",
        "sample at step 5",
    ):
        assert text in shown
    assert "5/10" in stream.getvalue()


def test_peak_memory_is_of_the_gpu_where_there_is_one():
    assert peak_memory_bytes(123) == 123
    assert 1 << 20 < peak_memory_bytes() < 1 << 40


MATRIX = {"labels": ["ham", "a|b"], "counts": [[812, 3], [5, 120]]}


def test_a_confusion_matrix_is_a_record_of_its_own_and_a_table_in_tensorboard(tmp_path):
    lines, board = JsonLines(tmp_path / "metrics.jsonl", 0), TensorBoard(tmp_path / "board", 0)
    stream = io.StringIO()
    metrics = Metrics((lines, board, Console(10, 0, stream)))
    metrics.confusion(7, MATRIX)
    metrics.close()
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 7, "confusion": MATRIX}]
    (event,) = accumulated(tmp_path / "board").Tensors("validation/confusion/text_summary")
    assert event.tensor_proto.string_val[0].decode().splitlines() == [
        "| truth ↓ taken for → | ham | a\\|b |",
        "|---|---|---|",
        "| ham | 812 | 3 |",
        "| a\\|b | 5 | 120 |",
    ]
    assert stream.getvalue() == ""


def test_of_very_many_labels_there_is_no_table_for_a_terminal():
    many = {"labels": [str(n) for n in range(17)], "counts": [[0] * 17] * 17}
    assert confusion_table(many) == "confusion matrix: of 17 labels, in metrics.jsonl and TensorBoard"
    assert len(confusion_table({"labels": list("abcd"), "counts": [[0] * 4] * 4}).splitlines()) == 5


def test_the_parts_of_a_loss_have_tags_and_a_place_on_the_console(tmp_path):
    stream = io.StringIO()
    values = {
        "validation_loss": 2.0,
        "validation_loss/chat": 1.5,
        "validation_perplexity/chat": 4.5,
        "validation_loss/code": 2.5,
    }
    sink, console = TensorBoard(tmp_path, 0), Console(10, 0, stream)
    for one in (sink, console):
        one.scalars(3, values | {"general_loss": 3.0, "general_perplexity": 20.1, "grad_norm/chat": 1.0})
    sink.close()
    assert stream.getvalue() == (
        "step 3/10  validation loss 2.0000  general perplexity 20.10  by source: chat 1.5000, code 2.5000\n"
    )
    assert set(accumulated(tmp_path).Tags()["scalars"]) == {
        "validation/loss", "validation/loss/chat", "validation/loss/code", "validation/perplexity/chat", "general/loss",
        "general/perplexity",
    }  # fmt: skip


def test_of_a_prompt_of_ones_own_no_answer_is_expected(tmp_path):
    answers, stream = [{"prompt": "hello", "answer": "hi", "expected": ""}], io.StringIO()
    sink, console = TensorBoard(tmp_path, 0), Console(10, 0, stream)
    for one in (sink, console):
        one.samples(2, answers)
    sink.close()
    assert stream.getvalue() == "  sample at step 2: 'hello' → 'hi'\n"
    (event,) = accumulated(tmp_path).Tensors("samples/0/text_summary")
    assert event.tensor_proto.string_val[0].decode() == "**prompt**\n\n```\nhello\n```\n\n**answer**\n\n```\nhi\n```"


class Recorder:
    def __init__(self):
        self.told = []

    def scalars(self, step, values):
        self.told.append((step, values))

    def samples(self, step, answers):
        self.told.append((step, answers))

    def close(self):
        self.told.append("closed")


def test_metrics_go_to_every_sink_and_nothing_goes_to_none():
    sinks = (Recorder(), Recorder())
    metrics = Metrics(sinks)
    metrics.scalars(1, {"loss": 1.0})
    metrics.scalars(1, {})
    metrics.samples(1, ANSWERS)
    metrics.close()
    for sink in sinks:
        assert sink.told == [(1, {"loss": 1.0}), (1, ANSWERS), "closed"]


def test_a_rank_without_sinks_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    metrics = Metrics()
    metrics.scalars(1, {"loss": 1.0})
    metrics.samples(1, ANSWERS)
    metrics.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_the_loss_curve_is_drawn_with_plain_characters():
    records = [{"step": step, "loss": 5.0 / step} for step in range(1, 50)]
    records += [{"step": 0, "validation_loss": 5.0}, {"step": 49, "validation_loss": 0.5}, {"step": 49, "samples": []}]
    curve = loss_curve(records, width=60, height=12)
    assert "\x1b" not in curve
    assert "validation loss" in curve
    assert len(curve.splitlines()) <= 12
    assert max(map(len, curve.splitlines())) <= 60
    assert "o" in curve
    assert loss_curve(records, width=60, height=12) == curve  # nothing is left over from the last drawing


@pytest.mark.parametrize(
    "records",
    [
        [],
        [{"step": 1, "loss": 2.0}],
        [{"step": 0, "validation_loss": 2.0}],
        [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 2.0}],
    ],
    ids=["nothing", "one point", "no training", "a flat line"],
)
def test_a_curve_of_little_is_drawn_too(records):
    assert "\x1b" not in loss_curve(records)


def test_a_last_line_that_a_crash_has_cut_is_said_and_left_out(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_lines(path) == [{"step": 1}]
    assert "its last line was cut by a crash, and is left out" in caplog.text


def test_what_is_no_number_is_said_and_left_out(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics((JsonLines(path, resume_step=0),))
    metrics.scalars(3, {"loss": 1.5, "validation_loss": float("nan")})
    metrics.scalars(4, {"validation_loss": float("inf")})
    metrics.close()
    assert read_lines(path) == [{"step": 3, "loss": 1.5}]
    assert "warning: step 3: validation_loss is nan, and is left out" in caplog.text
