import errno
import json

import pytest

from sft_dist.errors import DataError
from sft_dist.metrics import JsonLines, Metrics, numbers, peak_memory_bytes, read_lines, tables

ANSWERS = [
    {"prompt": "Is this\nspam?", "answer": " ham ", "expected": "ham"},
    {"prompt": "long " * 40 + "end", "answer": "spam", "expected": "x" * 80},
]


def filled(path, steps, resume_step=0):
    sink = JsonLines(path, resume_step)
    for step in steps:
        sink.write({"step": step, "loss": 10.0 - step})
    return sink


def steps_of(path):
    return [line["step"] for line in read_lines(path)]


def test_a_line_is_a_step_and_can_be_read_while_the_run_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = filled(path, [1, 2])
    sink.write({"step": 2, "samples": ANSWERS})
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


@pytest.mark.parametrize("line", ["[1, 2]", "{}", '{"step": "3"}', "7", "null"])
def test_a_line_that_is_no_record_is_named_wherever_it_stands(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl: line 2 has no step; mend or remove that line"):
        read_lines(path)


def test_a_crash_that_cut_a_character_in_two_is_a_cut_like_any_other(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes('{"step": 1}\n{"step": 2, "samples": [{"answer": "é'.encode()[:-1])
    assert read_lines(path) == [{"step": 1}]


def test_fields_that_are_not_known_are_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 1, "loss": 2.5, "of_tomorrow": {"a": [1]}, "remark": "x"}', '{"step": 2, "loss": 2.25}']
    path.write_text("\n".join(lines) + "\n")
    JsonLines(path, resume_step=1).close()
    assert [json.dumps(line) for line in read_lines(path)] == lines[:1]


def test_no_file_is_no_records(tmp_path):
    assert read_lines(tmp_path / "metrics.jsonl") == []
    filled(tmp_path / "metrics.jsonl", [6], resume_step=5).close()
    assert steps_of(tmp_path / "metrics.jsonl") == [6]


def test_samples_of_any_text_survive_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path, 0)
    answers = [{"prompt": "a\nb\u2028c\x85d\x1ee", "answer": "😀", "expected": '"quoted"'}]
    sink.write({"step": 1, "samples": answers})
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
    sink.write({"step": 1, "loss": 1.0})
    sink._file = FullFor(sink._file, times)
    for step in range(2, 2 + times):
        sink.write({"step": step, "loss": 1.0})
        assert steps_of(path) == [1]  # and no half line
    sink.write({"step": 9, "loss": 1.0})
    assert steps_of(path) == [1, *range(2, 2 + times), 9]
    sink.close()
    assert len(caplog.records) == 1
    assert "metrics.jsonl: No space left on device: its lines are held in memory" in caplog.text


def test_peak_memory_is_of_the_gpu_where_there_is_one():
    assert peak_memory_bytes(123) == 123
    assert 1 << 20 < peak_memory_bytes() < 1 << 40


class Recorder:
    def __init__(self):
        self.told = []

    def write(self, record):
        self.told.append({name: value for name, value in record.items() if name != "at"})

    def close(self):
        self.told.append("closed")


def test_metrics_go_to_every_sink_and_nothing_goes_to_none():
    sinks = (Recorder(), Recorder())
    metrics = Metrics(sinks)
    metrics.scalars(1, {"loss": 1.0})
    metrics.scalars(1, {})
    metrics.samples(1, ANSWERS)
    metrics.confusion(1, {"labels": [], "counts": []})
    metrics.document_losses(1, {"count": 3})
    metrics.config(1, {"run_dir": "x"})
    metrics.close()
    for sink in sinks:
        assert sink.told == [
            {"step": 1, "loss": 1.0},
            {"step": 1, "samples": ANSWERS},
            {"step": 1, "confusion": {"labels": [], "counts": []}},
            {"step": 1, "document_losses": {"count": 3}},
            {"step": 1, "config": {"run_dir": "x"}},
            "closed",
        ]


def test_a_record_says_where_the_run_stands_and_one_that_comes_late_does_not():
    sink, hours = Recorder(), iter([0.25, 0.5])
    metrics = Metrics((sink,), lambda: {"gpu_hours": next(hours)}, step=4, target_tokens=90)
    metrics.scalars(4, {"validation_loss": 1.0})
    metrics.stepped(5, 120)
    metrics.scalars(5, {"loss": 1.0})
    metrics.scalars(4, {"checkpoint_bytes": 7})  # the save that began at step 4 is done
    assert sink.told == [
        {"step": 4, "validation_loss": 1.0, "target_tokens": 90, "gpu_hours": 0.25},
        {"step": 5, "loss": 1.0, "target_tokens": 120, "gpu_hours": 0.5},
        {"step": 4, "checkpoint_bytes": 7},
    ]


def test_a_rank_without_sinks_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    metrics = Metrics()
    metrics.scalars(1, {"loss": 1.0})
    metrics.samples(1, ANSWERS)
    metrics.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


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
    assert [numbers(line) for line in read_lines(path)] == [{"loss": 1.5}]
    assert "warning: step 3: validation_loss is nan, and is left out" in caplog.text


@pytest.mark.parametrize(
    ("kind", "odd"),
    [
        ("samples", "none"),
        ("samples", ["a"]),
        ("samples", [{"prompt": "a", "answer": "b"}]),
        ("confusion", []),
        ("confusion", {"labels": ["a"]}),
        ("confusion", {"labels": ["a", "b"], "counts": [[1, 2]]}),
        ("confusion", {"labels": ["a"], "counts": [["x"]]}),
        ("document_losses", 3),
        ("document_losses", {"counts": [], "edges": [0.0]}),
        ("document_losses", {"counts": [1], "edges": [0.0]}),
        ("config", "y"),
        ("config", {"train": None}),
    ],
)
def test_what_another_version_wrote_in_its_own_shape_is_left_out(kind, odd):
    known = {
        "samples": [{"prompt": "a", "answer": "b", "expected": ""}],
        "confusion": {"labels": ["a"], "counts": [[1]]},
    }
    known |= {"document_losses": {"counts": [1], "edges": [0.0, 0.5], "mean": 0.2}, "config": {"train": {}}}
    assert tables({"step": 1, "loss": 2.5, **known}) == known
    assert tables({"step": 1, **known, kind: odd}) == {name: what for name, what in known.items() if name != kind}
