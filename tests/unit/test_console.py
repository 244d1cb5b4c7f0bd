import contextlib
import fcntl
import io
import logging
import os
import pty
import re
import struct
import termios

import pytest

from sft_dist.console import Console, confusion_table, loss_curve
from tests.unit.test_metrics import ANSWERS


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
    console.write({"step": 3, **numbers, "step_seconds": 1.0, "memory_bytes": 5})
    scores = {
        "validation_accuracy": 0.99,
        "validation_f1": 0.9,
        "validation_loss/chat": 1.5,
        "validation_loss/code": 2.5,
    }
    console.write({"step": 3, "validation_loss": 0.5, "validation_perplexity": 1.65, **scores})
    console.write({"step": 3, "document_losses": {}, "confusion": {}, "config": {}})
    console.say("resuming [from] step 3")
    console.close()
    assert stream.getvalue().splitlines() == [
        "step 3/10  loss 2.5000  lr 1.00e-03  norm 0.50  1,234 target tokens/s  56,789 tokens/s",
        "step 3/10  validation loss 0.5000  perplexity 1.65  accuracy 0.9900  F1 0.9000  by source: chat 1.5000, code 2.5000",
        "resuming [from] step 3",
    ]


def test_the_console_shows_samples_on_a_line_each():
    stream = io.StringIO()
    Console(10, 0, stream).write({"step": 0, "samples": ANSWERS})
    first, second = stream.getvalue().splitlines()
    assert first == "  sample at step 0: 'Is this spam?' → 'ham' (expected 'ham')"
    assert second.startswith("  sample at step 0: '…")
    assert "long end' → 'spam'" in second  # the end of a long prompt is what the answer follows
    assert second.endswith(f"(expected '{'x' * 60}')")
    assert len(second.partition(" → ")[0]) < 100


def test_of_a_prompt_of_ones_own_no_answer_is_expected():
    stream = io.StringIO()
    Console(10, 0, stream).write({"step": 2, "samples": [{"prompt": "hello", "answer": "hi", "expected": ""}]})
    assert stream.getvalue() == "  sample at step 2: 'hello' → 'hi'\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_of_few_characters_ends_no_run(encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(10, 0, stream)
    console.write({"step": 1, "samples": [{"prompt": "é", "answer": "😀", "expected": ""}]})
    console.say("…")
    shown = stream.buffer.getvalue().decode(encoding)
    assert shown == "  sample at step 1: 'é' → '😀'\n…\n".encode(encoding, "replace").decode(encoding)


class Gone(io.StringIO):
    """`| head` that has seen enough, or a terminal whose window was closed."""

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


def test_a_reader_that_is_gone_ends_no_run():
    console = Console(10, 0, Gone())
    console.write({"step": 1, "loss": 2.5, "samples": ANSWERS})
    console.say("on")
    console.close()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_the_console_is_a_progress_bar_on_the_stream_it_was_given(capsys):
    stream = Terminal()
    console = Console(10, 4, stream)
    console.write({"step": 5, "loss": 2.5})
    console.write({"step": 5, "validation_loss": 0.5})
    console.say("a word [bold]as it is[/bold]")
    console.write({"step": 5, "samples": ANSWERS[:1]})
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


def test_of_very_many_labels_there_is_no_table_for_a_terminal():
    many = {"labels": [str(n) for n in range(17)], "counts": [[0] * 17] * 17}
    assert confusion_table(many) == "confusion matrix: of 17 labels, in metrics.jsonl and TensorBoard"
    assert len(confusion_table({"labels": list("abcd"), "counts": [[0] * 4] * 4}).splitlines()) == 5


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


def test_on_a_real_terminal_of_80_columns_no_line_is_torn_and_the_cursor_comes_back(monkeypatch):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    monkeypatch.setenv("TERM", "xterm")
    with open(theirs, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        handler = logging.StreamHandler(terminal)
        logging.getLogger().addHandler(handler)
        try:
            console = Console(12345, 4000, terminal)
            console.write({"step": 4001, "loss": 2.5, "validation_loss": 2.25, "tokens_per_second": 1234567.0})
            logging.getLogger("sft_dist").warning("warning: of a rank")
            console.write({"step": 4002, "loss": 2.25})
            console.close()
        finally:
            logging.getLogger().removeHandler(handler)
    content = b""
    with contextlib.suppress(OSError):  # how a terminal says that there is no more
        while part := os.read(ours, 1 << 16):
            content += part
    os.close(ours)
    shown = content.decode()
    assert (shown.count("\x1b[?25l"), shown.count("\x1b[?25h")) == (1, 1), "hidden, and shown again"
    lines = [re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", part) for part in shown.replace("\n", "\r").split("\r")]
    assert "warning: of a rank" in lines, "a line of its own"
    bars = [line for line in lines if "12345" in line]
    assert all(len(line) <= 80 for line in bars)
    assert bars[-1].startswith(" 4002/12345 ")
    assert bars[-1].endswith(" loss 2.2500 validation 2.2500 1,234,567 tokens/s")
