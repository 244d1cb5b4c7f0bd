"""The report: its numbers are those of the files, it loads and runs nothing, and it says what is missing."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from launch import report as reporting
from sft_dist import chart
from sft_dist.chart import Chart, Line, Mark, largest_gap, lay_out, stretches, write_png
from sft_dist.errors import ConfigError
from sft_dist.goodput import PARTS
from sft_dist.report import (
    answers,
    charts,
    comparability,
    config_diff,
    facts,
    flattened,
    page,
    reproduce,
    tables,
)
from sft_dist.run_record import read_run, read_runs
from tests.unit.prepared_runs import sft_dist

VOID = {"meta", "br", "hr", "img", "input", "link"}
NASTY = "<script>alert('&\"\x1b[31m')</script>"


class Page(HTMLParser):
    """A page taken apart: whether its tags close in order, what it names, its tables of numbers, its text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.references, self.text = [], set(), [], []
        self.tables, self._row = [], None
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.add(tag)
        self.references += [value for name, value in attributes.items() if name in ("src", "href", "srcset", "action")]
        self.references += re.findall(r"url\([^)]*\)", attributes.get("style") or "")
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr" and self.tables:
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "data" and self.open[-2] == "td":
            self.tables[-1][-1][-1] = float(attributes["value"])

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        self.text.append(data)
        if self.tables and self.tables[-1] and self.open and set(self.open) & {"td", "th"}:
            cell = self.tables[-1][-1][-1]
            self.tables[-1][-1][-1] = cell + data if isinstance(cell, str) else cell

    @property
    def whole_text(self):
        return " ".join("".join(self.text).split())

    def numbers(self):
        """{(step, metric): value} of all tables by step."""
        found = {}
        for head, *rows in (table for table in self.tables if table and table[0] and table[0][0] == "step"):
            for step, *values in rows:
                found |= {(int(step), name): v for name, v in zip(head[1:], values, strict=True) if v != ""}
        return found


def line(step, loss, **more):
    of_step = {
        "at": 1e9 + step,
        "target_tokens": 10 * step,
        "learning_rate": 1e-3,
        "tokens_per_second": 1000.0 + step,
        "step_seconds": 0.5,
        "gpu_hours": step / 100,
    }
    phases = {"data_seconds": 0.1, "compute_seconds": 0.5, "wait_seconds": 0.1}
    return {"step": step, "loss": loss, "memory_bytes": 2**30, "grad_norm": 1 / step, **of_step, **phases, **more}


def lines_of(steps, every=10):
    made = [{"step": 0, "validation_loss": 6.123456789, "validation_perplexity": 456.0, "validation_accuracy": 0.5}]
    made.append({"step": 0, "samples": [{"prompt": "Spam?\nyes", "answer": NASTY, "expected": "spam"}]})
    for step in range(1, steps + 1):
        made.append(line(step, 6.0 / step**0.5))
        if step % every == 0:
            loss = 6.1 / step**0.5
            made.append(
                {"step": step, "validation_loss": loss, "validation_loss/a": loss + 0.1, "validation_loss/b": loss}
            )
    made.append({"step": steps, "samples": [{"prompt": "Spam?\nyes", "answer": " spam", "expected": "spam"}]})
    made.append({"step": steps, "document_losses": {"edges": [0, 1], "counts": [3]}})
    made.append({"step": 0, "config": {"run_dir": "x"}})
    made.append(
        {"step": steps, "gpu_hours": steps / 100, "checkpoint_bytes": 123456}
    )  # every record of numbers tells it
    made.append({"step": steps, "confusion": {"labels": ["ham", NASTY], "counts": [[812, 3], [5, 120]]}})
    return made


def run_folder(folder, lines=None, *, data="d1", tokenizer="t1", usage=(), notes=(), lr=1e-3, version=True):
    """What a run leaves, by hand."""
    shards = folder.parent / f"shards-{data}-{tokenizer}"
    for split in ("train", "validation"):
        (shards / split).mkdir(parents=True, exist_ok=True)
        about = {"data": f"{split}-{data}", "tokenizer": tokenizer}
        (shards / split / "manifest.json").write_text(json.dumps(about))
    split = {"documents": 8, "rows": 4, "seq_len": 64, "tokens": 200, "targets": 50, "fill": 0.8}
    counted = {"read": 1234, "drops": {"duplicate": 20, "empty": 3}, "train": 1111, "validation": 100}
    (shards / "prepare.json").write_text(json.dumps({"funnel": counted, "splits": {"train": split}}))
    folder.mkdir(parents=True)
    config = {
        "run_dir": str(folder),
        "prepare": {"out": str(shards)},
        "train": {"learning_rate": lr, "log_every_steps": 1},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config | {"budget": {"price_per_gpu_hour": "2.10 EUR"}}))
    made = lines_of(120) if lines is None else lines
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in made))
    if usage is not None:
        phases = {"phase_seconds": {"start_up": 10.0, "compute": 40.0, "data": 10.0}} if version else {}
        default = [{"life": "7-0", "began": 1e9, "at": 1e9 + 60, "gpus": 2, "from_steps": [0], **phases}]
        (folder / "usage.jsonl").write_text("".join(json.dumps(each) + "\n" for each in usage or default))
    (folder / "verdicts").mkdir()
    (folder / "verdicts" / "7-0.json").write_text(
        json.dumps({"life": "7-0", "reason": "completed", "step": 120, "detail": "120 of 120 steps"})
    )
    saved = folder / "checkpoints" / "step-00000120"
    saved.mkdir(parents=True)
    (saved / "manifest.json").write_text(json.dumps({"identity": {"data": f"train-{data}", "tokenizer": tokenizer}}))
    (saved / "state.json").write_text(json.dumps({"notes": list(notes)}))
    return folder


def made_page(*folders):
    runs = read_runs(folders)
    return Page(page(runs, charts(runs)))


def test_the_page_tells_the_numbers_of_the_files_and_needs_nothing_else(tmp_path):
    folder = run_folder(tmp_path / NASTY.replace("/", ""), notes=["step 3: allowed: <b>seed</b>"])
    result = sft_dist("report", folder)
    assert result.exit_code == 0, result.output
    text = (folder / "report.html").read_text()
    assert len(text) < 1_000_000
    seen = Page(text)
    assert not seen.tags & {"script", "link", "img", "iframe", "object", "base", "form"}
    assert seen.references == []
    assert not re.search("https?:", text)
    assert "@import" not in text
    assert "url(" not in text
    assert '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src' in text
    assert "prefers-color-scheme: dark" in text
    written = {}
    for each in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        written |= {(each["step"], name): value for name, value in each.items() if isinstance(value, float | int)}
    written = {key: value for key, value in written.items() if key[1] not in ("step", "at")}
    assert seen.numbers() == written
    for words in (
        "1,234", "− duplicate", "completed: 120 of 120 steps", "␛[31m", "66.7 % goodput", "0.07 EUR", "--nproc 2",
        "step 3: allowed: <b>seed</b>", "Data train-d1, tokenizer t1",
    ):  # fmt: skip
        assert words in seen.whole_text, words


def test_the_losses_of_the_documents_are_drawn_as_they_were_counted(tmp_path):
    first = {"edges": [0.0, 2.0, 4.0, 8.0], "counts": [1, 0, 3], "quantiles": {"0.5": 5.5}, "mean": 5.0}
    last = {"edges": [1.0, 2.0, 4.0], "counts": [3, 1], "quantiles": {"0.5": 1.5}, "mean": 1.8}
    odd = {"edges": [0.0, 0.0, 4.0], "counts": [3, 1]}
    lines = [{"step": step, "document_losses": each} for step, each in ((0, first), (5, first), (9, last))]
    run = read_run(run_folder(tmp_path / "run", [line(1, 5.0), *lines]))
    (made,) = (each for each in charts([run]) if each.name == "document-losses")
    assert [each.label for each in made.lines] == ["step 0", "step 9"]
    assert made.lines[0].points == ((1.0, 25.0), (2.0, 0.0), (4.0, 75.0), (8.0, 0.0))
    assert "step 0 5.5, step 9 1.5" in made.note
    drawing = lay_out(made)
    assert [each.path for each in drawing.lines] == [
        "M0 1000H0V685.5H333.3V1000H666.7V56.6H1000V1000", "M0 1000H0V56.6H333.3V685.5H666.7V1000",
    ]  # fmt: skip
    told = [(each.x, each.until, [value for _, value in each.values]) for each in drawing.columns]
    assert told == [(1.0, 2.0, [25.0, 75.0]), (2.0, 4.0, [0.0, 25.0]), (4.0, 8.0, [75.0, 0.0])]
    assert drawing.x_ticks == [(0.0, "1"), (pytest.approx(100 / 3), "2"), (pytest.approx(77.39, abs=0.01), "5")]
    write_png(made, tmp_path / "made.png")
    other = read_run(run_folder(tmp_path / "other", [line(1, 5.0), {"step": 9, "document_losses": odd}]))
    both = made_page(run.folder, other.folder)
    assert "Losses of the validation documents" in both.whole_text
    assert not [each for each in charts([other]) if each.name == "document-losses"]


def test_many_steps_are_drawn_and_told_in_part(tmp_path):
    folder = run_folder(tmp_path / "run", [line(step, 6.0 / step**0.5) for step in range(1, 4_001)])
    run = read_run(folder)
    table = tables(run)["Logged steps"]
    assert (len(table.rows), table.left_out) == (120, 3_880)
    assert (table.rows[0][0], table.rows[-1][0]) == (1, 4_000)
    text = page([run], charts([run]))
    assert len(text) < 1_000_000
    told = Page(text)
    assert "3,880 rows between are left out" in told.whole_text
    assert all(dict(run.series[name])[step] == value for (step, name), value in told.numbers().items())
    assert "The run was never evaluated" in told.whole_text
    assert not [each for each in charts([run]) if "validation" in each.name]


def test_a_run_that_was_killed_and_went_on_has_continuous_curves(tmp_path):
    phases = {"start_up": 10.0, "compute": 40.0}
    usage = [
        {"life": "7-9", "began": 100.0, "at": 150.0, "gpus": 2, "phase_seconds": phases, "from_steps": [0]},
        {"life": "7-0", "began": 170.0, "at": 220.0, "gpus": 4, "phase_seconds": phases, "from_steps": [50],
         "lost_steps": 19, "lost_seconds": {"compute": 8.0}},
    ]  # fmt: skip
    run = read_run(run_folder(tmp_path / "run", usage=usage))
    assert [step for step, _ in run.series["loss"]] == list(range(1, 121))
    drawn = {each.name: each for each in charts([run])}
    assert drawn["loss"].marks == (Mark(50, "7-0 goes on from step 50"),)
    assert all(line.path.count("M") == 1 for line in lay_out(drawn["loss"]).lines)
    told = Page(page([run], list(drawn.values()))).whole_text
    assert "19 steps were computed in vain" in told
    assert "no verdict: it was killed, or its machine failed" in told
    assert run.time == {"compute": 72.0, "start_up": 10.0, "restart": 10.0, "lost": 8.0, "between": 20.0}
    assert {fact.label: fact.text for fact in facts(run)}["GPU-hours"] == f"{(50 * 2 + 50 * 4) / 3600:.3g}"


def test_what_is_damaged_or_unknown_is_left_out_and_said(tmp_path):
    folder = run_folder(tmp_path / "run")
    path = folder / "metrics.jsonl"
    whole = path.read_text()
    more = [
        '{"step": 121, "loss": "much", "loss2": 3, "validation_loss": NaN}',
        "[1]",
        '{"loss": 1.0}',
        '{"step": 5, "loss": 9.5}',
    ]
    more += ['{"step": 122, "samples": [3], "confusion": {"labels": ["a"], "counts": [["x"]]}}']
    path.write_text(whole + "\n".join(more) + '\n{"step": 123, "lo')
    run = read_run(folder)
    assert run.notes == [
        "The last line of metrics.jsonl was cut by a crash, or is being written; it is left out.",
        "2 damaged lines of metrics.jsonl left out.",
        "Fields that this version does not know are left out: loss2.",
        "1 steps are told twice in metrics.jsonl; the later line counts.",
    ]
    assert run.step == 120
    assert dict(run.series["loss"])[5] == 9.5
    assert run.confusion[0] == 120
    made_page(folder)


def test_steps_that_are_absent_are_a_gap_and_said(tmp_path):
    run = read_run(
        run_folder(tmp_path / "run", [line(step, 1.0) for step in range(1, 60) if not 20 <= step < 40 and step != 50])
    )
    assert "Steps that are not in metrics.jsonl: 20–39, 50. Curves have a gap there where it is wide." in run.notes
    (loss,) = [each for each in charts([run]) if each.name == "loss"]
    assert [len(part) for part in stretches(loss.lines[0].points, largest_gap(loss.lines[0].points))] == [19, 19]
    assert lay_out(loss).lines[0].path.count("M") == 2
    made_page(run.folder)


def test_there_is_no_step_between_two_steps():
    points = ((1, 2.0), (2, 1.0), (4, 0.5))
    of_steps, of_hours = (Chart("a", "A", "u", (Line("a", points, 0),), x_label) for x_label in ("step", "GPU-hours"))
    assert of_steps.x_ticks() == [1, 2, 3, 4]
    assert 1.5 in of_hours.x_ticks()
    assert [text for _, text in lay_out(of_steps).x_ticks] == ["1", "2", "3", "4"]


def test_older_and_poorer_run_folders_say_what_they_lack(tmp_path):
    old = read_run(run_folder(tmp_path / "old", version=False))
    assert old.notes == ["The run is of a version that did not record where its time went: there is no goodput."]
    assert old.goodput is None
    bare = run_folder(tmp_path / "bare", [line(1, 5.0)], usage=None)
    (bare / "run.yaml").write_text("a: b: c")
    (bare / "checkpoints" / "step-00000120" / "manifest.json").unlink()
    assert read_run(bare).notes == [
        "run.yaml is missing or cannot be read: nothing is told of the configuration.",
        "The run was never evaluated: there is no validation loss.",
        "There is no usage.jsonl: nothing is told of time and GPU-hours.",
    ]
    assert reproduce(read_run(bare)).startswith("sft-dist train")
    used = {"life": "7-0", "began": 0.0, "at": 60.0, "gpus": 16, "nodes": 2}
    (bare / "usage.jsonl").write_text(json.dumps(used) + "\n")
    assert "sft-dist submit" in reproduce(read_run(bare))
    assert reproduce(read_run(bare)).endswith(" --nodes 2 --gpus-per-node 8")
    lost = run_folder(tmp_path / "lost", data="d3")
    (tmp_path / "shards-d3-t1" / "train" / "manifest.json").write_text('{"data": "train-d9"}')
    assert read_run(lost).notes[0].endswith("shards-d3-t1 were prepared anew since: what is told of data is left out.")
    (tmp_path / "shards-d3-t1" / "train" / "manifest.json").unlink()
    assert "cannot be seen from here: nothing is told of how they were prepared." in read_run(lost).notes[0]
    mixed = [
        {"life": "7-0", "began": 0.0, "at": 60.0, "gpus": 1},
        {"life": "7-1", "began": 60.0, "at": 90.0, "gpus": 1, "phase_seconds": {"compute": 30.0}},
    ]
    both = read_run(run_folder(tmp_path / "both", usage=mixed))
    assert both.notes == [
        "Some lives are of a version that did not record where their time went: it counts as not recorded."
    ]
    for folder in (tmp_path / "old", bare, lost, both.folder):
        made_page(folder)


def test_a_run_that_is_still_running_says_so(tmp_path, monkeypatch):
    folder = run_folder(tmp_path / "run")
    (folder / "verdicts" / "7-0.json").unlink()
    monkeypatch.setattr(reporting.slurm, "holder", lambda folder: 4711)
    assert sft_dist("report", folder).exit_code == 0
    told = Page((folder / "report.html").read_text()).whole_text
    assert "running, step 120 so far" in told
    assert "was killed" not in told


def test_a_job_of_the_cluster_runs_too_and_a_silent_cluster_is_no_obstacle(tmp_path, monkeypatch):
    for jobs, is_running in (
        ([(7, {"JobState": "RUNNING"})], True),
        ([(7, {"JobState": "PENDING"})], False),
        ([], False),
    ):
        monkeypatch.setattr(reporting.slurm, "live_jobs", lambda folder, jobs=jobs: jobs)
        assert reporting.is_running(tmp_path) is is_running

    def silent(folder):
        raise ConfigError("squeue: no answer")

    monkeypatch.setattr(reporting.slurm, "live_jobs", silent)
    assert not reporting.is_running(tmp_path)


def test_several_runs_lie_over_each_other_with_what_differs(tmp_path):
    one, other = (run_folder(tmp_path / name, lr=lr) for name, lr in (("one", 1e-3), ("other", 3e-3)))
    runs = read_runs([one, other])
    assert comparability(runs) == []
    assert config_diff(runs) == ([("train.learning_rate", ["0.001", "0.003"])], 5)
    names = [each.name for each in charts(runs)]
    assert names[:3] == ["validation-loss", "training-loss", "validation-loss-by-gpu-hours"]
    assert {"validation-loss-by-source-1", "validation-loss-by-source-2", "learning-rate", "memory-bytes"} <= set(names)
    assert all(len({line.slot for line in each.lines}) == 2 for each in charts(runs))
    told = made_page(one, other)
    assert "2 runs compared" in told.whole_text
    assert [row[:3] for row in told.tables if row[0][:1] == ["key"]] == [
        [["key", "one", "other"], ["train.learning_rate", "0.001", "0.003"]]
    ]
    assert answers(runs) == [
        ("Spam?\nyes", "spam", [(n, step, answer) for n in (0, 1) for step, answer in ((0, NASTY), (120, " spam"))])
    ]
    assert "all 5 keys are equal" in made_page(one, run_folder(tmp_path / "same")).whole_text


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"tokenizer": "t2"}, "The runs use different tokenizers: their losses"),
        ({"data": "d2"}, "measured on different validation sets: their losses are not comparable."),
    ],
)
def test_runs_of_different_data_are_said_not_to_be_comparable(tmp_path, other, told):
    one, two = run_folder(tmp_path / "one"), run_folder(tmp_path / "two", **other)
    result = sft_dist("report", one, two, "--out", tmp_path / "both.html")
    assert result.exit_code == 0, result.output
    assert "warning: " in result.output
    assert told in result.output
    assert told in Page((tmp_path / "both.html").read_text()).whole_text


def test_what_cannot_be_known_of_the_data_is_said(tmp_path):
    one, two = run_folder(tmp_path / "one"), run_folder(tmp_path / "two", data="d2")
    same = tmp_path / "shards-d2-t1" / "validation" / "manifest.json"
    same.write_text('{"data": "validation-d1", "tokenizer": "t1"}')
    assert "compare their validation losses, not their training losses" in comparability(read_runs([one, two]))[0]
    same.unlink()
    assert comparability(read_runs([one, two])) == ["The runs are of different data: their losses are not comparable."]
    (two / "checkpoints" / "step-00000120" / "manifest.json").unlink()
    (tmp_path / "shards-d2-t1" / "train" / "manifest.json").unlink()
    assert comparability(read_runs([one, two])) == [
        "Of two the data cannot be seen from here: whether the losses are comparable is not known."
    ]


def test_folders_without_a_run_are_refused_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "run.yaml").write_text("run_dir: x\n")
    run = run_folder(tmp_path / "run")
    for arguments, told in [
        ([tmp_path / "empty"], "empty: no run there; name the run_dir of a run file"),
        ([tmp_path / "nowhere"], "nowhere: no run there; name the run_dir of a run file"),
        ([begun], "begun: the run has not begun to write metrics.jsonl; wait for its first step"),
        ([run, run / ".." / "run"], "run: is there twice; name each run once"),
        ([run, "--out", tmp_path], "it is a folder; name a file in a folder that exists and that you may write to"),
        (
            [run, "--out", tmp_path / "no" / "page.html"],
            "cannot be written (No such file or directory); name a file in",
        ),
        ([run, "--png", run / "run.yaml"], "cannot be written (File exists); name a folder of yours"),
        ([tmp_path / str(n) for n in range(19)], "19 runs: more than 18 cannot be told apart in a chart; name fewer"),
    ]:
        result = sft_dist("report", *arguments)
        assert (result.exit_code, result.output.count("\n")) == (2, 1), result.output
        assert told in result.output
    (begun / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: holds no number yet; wait for the run's first step"):
        read_run(begun)


def test_pictures_are_drawn_for_light_and_for_dark_ground(tmp_path, monkeypatch):
    lines = (Line("a $x^$", ((0, 1.0), (1, 20.0), (9, 3.0)), 0), Line("b", ((0, 2.0), (1, 3.0)), 7, "dots"))
    made = Chart("loss", "Loss $", "nats", lines, marks=(Mark(1, "life 2"),))
    assert made.is_log
    for is_dark in (False, True):
        write_png(made, tmp_path / f"{is_dark}.png", is_dark=is_dark)
        content = (tmp_path / f"{is_dark}.png").read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        assert (int.from_bytes(content[16:20]), int.from_bytes(content[20:24])) == (1600, 800)
    assert (tmp_path / "False.png").read_bytes() != (tmp_path / "True.png").read_bytes()
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"--png: matplotlib is not installed; pip install 'sft-dist\[report\]'"):
        write_png(made, tmp_path / "none.png")


def test_a_confusion_of_many_labels_is_told_by_its_worst(tmp_path):
    labels = [f"label {n}" for n in range(60)]
    counts = [[7 if a == b else int(a == 3 and b == 4) * 9 for b in range(60)] for a in range(60)]
    folder = run_folder(
        tmp_path / "run", [line(1, 2.0), {"step": 1, "confusion": {"labels": labels, "counts": counts}}]
    )
    assert [["label 3", "label 4", 9.0]] in [table[1:] for table in made_page(folder).tables]


def test_colours_are_as_far_apart_in_grey_and_contrast_with_the_ground():
    def luminance(colour):
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for place, ground in ((0, "#ffffff"), (1, "#1b1f24")):
        for colours in chart.COLOURS:
            light, dark = sorted((luminance(colours[place]), luminance(ground)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 3.0, colours  # WCAG 1.4.11, graphical objects


def test_the_configuration_is_flat_and_what_cannot_be_seen_is_quoted():
    assert list(flattened({"a": {"b": "\t", "c": "", "d": []}, "e": None})) == [
        ("a.b", '"\\t"'), ("a.c", '""'), ("a.d", "[]"), ("e", "null"),
    ]  # fmt: skip


def test_the_default_of_several_is_beside_you(tmp_path, monkeypatch):
    few = [{"step": step, "validation_loss": 9.0 - step, "loss": 1.0} for step in range(3)]
    one, two = run_folder(tmp_path / "x" / "run", few), run_folder(tmp_path / "y" / "run", few)
    monkeypatch.chdir(tmp_path)
    result = sft_dist("report", one, two, "--png", "pictures")
    assert result.exit_code == 0, result.output
    assert "report.html: " in result.output
    assert "x/run" in Page(Path("report.html").read_text()).whole_text
    names = {path.name for path in Path("pictures").iterdir()}
    assert {"validation-loss.png", "validation-loss-dark.png", "training-loss.png"} <= names


def test_the_commands_of_the_page_about_it(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "report.md").read_text()
    monkeypatch.chdir(tmp_path)
    few = [{"step": step, "validation_loss": 9.0 - step, "loss": 1.0} for step in range(3)]
    for name in ("sms-spam", "other"):
        run_folder(Path("runs") / name, few)
    for command in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)[0].splitlines():
        words = command.partition("   #")[0].split()
        result = sft_dist(*words[1:])
        assert (words[0], result.exit_code) == ("sft-dist", 0), result.output
    assert {"report.html", "figures"} <= {path.name for path in Path("runs/sms-spam").iterdir()}
    assert Path("both.html").is_file()
    assert all(f"| {called} |" in text for called, _ in PARTS.values())
