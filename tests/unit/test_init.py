"""`sft-dist init`: run files for what people have, prepared and checked; nothing overwritten, nothing half written."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from launch import init, local
from sft_dist import files
from sft_dist.config import load
from sft_dist.errors import ConfigError, DataError
from tests.unit.prepared_runs import sft_dist

ROOT = Path(__file__).parents[2]
SMS = ROOT / "examples/sms-spam/data/SMSSpamCollection"
SEEDS = ROOT / "examples/instructions/data/seed_tasks.jsonl"
WIKI = ROOT / "examples/wikitext/data/validation.txt"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def chats(path):
    tasks = [json.loads(line) for line in SEEDS.read_text().splitlines()]
    turns = (
        [
            {"role": "user", "content": task["instruction"]},
            {"role": "assistant", "content": task["instances"][0]["output"]},
        ]
        for task in tasks
    )
    return jsonl(path, ({"messages": turn} for turn in turns))


def refused(*arguments, code=2):
    result = sft_dist("init", *arguments)
    assert result.exit_code == code, result.output
    return result.stderr


@pytest.mark.parametrize(
    ("task", "schema", "words"),
    [
        ("classification", "label", ["Labels: ham, spam", "text: 1, label: 0"]),
        ("instructions", "self_instruct", ["template: alpaca", "held out by a hash of the prompt"]),
        ("chat", "messages", ["template: chat "]),
        ("text", "text", ["packing: concat", "held out by a hash of the text"]),
    ],
)
def test_what_it_writes_is_prepared_and_can_be_trained(here, task, schema, words):
    data = {"classification": SMS, "instructions": SEEDS, "chat": chats(here / "chats.jsonl"), "text": WIKI}[task]
    made = sft_dist("init", "--data", data, "--preset", "tiny")
    assert made.exit_code == 0, made.output
    folder = (
        "runs/"
        + {"classification": "smsspamcollection", "instructions": "seed_tasks", "chat": "chats", "text": "validation"}[
            task
        ]
    )
    assert made.stdout.splitlines()[-3:] == [
        "  sft-dist prepare run.yaml",
        f"  sft-dist inspect {folder}/shards",
        "  sft-dist train run.yaml",
    ]
    text = (here / "run.yaml").read_text()
    for word in words:
        assert word in text
    assert text.count("#") >= 12, "commented"
    assert load("run.yaml").prepare.sources[0].schema_ == schema
    prepared = sft_dist("prepare", "run.yaml", "--workers", 1)
    assert prepared.exit_code == 0, prepared.output
    assert re.search(
        r"[1-9][\d,]* train, \d" if task == "text" else r"[1-9][\d,]* train, [1-9][\d,]* validation", prepared.output
    )
    checked = sft_dist("train", "run.yaml", "--print-config", "--nproc", 1, "train.micro_batch_rows=1")
    assert checked.exit_code == 0, checked.output
    assert "a micro-batch x 8 accumulated x 1 process" in checked.output


def test_a_few_records_are_enough_to_begin_with(here):
    jsonl(here / "few.jsonl", ({"prompt": f"What is {n} plus {n}?", "response": f"It is {2 * n}."} for n in range(30)))
    assert sft_dist("init", "--data", "few.jsonl", "--preset", "tiny").exit_code == 0
    prepared = sft_dist("prepare", "run.yaml", "--workers", 1)
    assert prepared.exit_code == 0, prepared.output
    assert re.search(
        r"trained, [4-7]\d\d pieces; the training texts give no more, 1,000 were asked for", prepared.stderr
    )
    checked = sft_dist("train", "run.yaml", "--print-config", "--nproc", 1, "train.micro_batch_rows=1")
    assert checked.exit_code == 0, checked.output


@pytest.mark.parametrize("name", init.presets())
def test_every_preset_makes_a_run_file(here, name):
    chats(here / "chats.jsonl")
    assert sft_dist("init", "--data", "chats.jsonl", "--preset", name).exit_code == 0
    config, shipped = load("run.yaml"), load(ROOT / f"examples/presets/{name}.yaml")
    assert (config.model, config.train, config.zero) == (shipped.model, shipped.train, shipped.zero)
    assert config.prepare.seq_len == shipped.prepare.seq_len
    assert config.prepare.template == ("llama3" if "llama" in name else "chat")
    assert name in sft_dist("init", "--help").output, "the help names it"
    text = (here / "run.yaml").read_text()
    assert ("sft-dist plan RUN.yaml" in text, "yaml-language-server" in text) == (True, False)


def test_any_other_model_takes_what_fits_and_what_it_can_see(here):
    (here / "mine").mkdir()
    (here / "mine" / "config.json").write_text('{"n_positions": 512}')
    assert sft_dist("init", "--data", SEEDS, "--model", "mine", "--run-dir", "runs/a b/").exit_code == 0
    config = load("run.yaml")
    assert (config.model.name_or_path, config.train.micro_batch_rows, config.prepare.seq_len) == ("mine", "auto", 512)
    assert (config.run_dir, config.prepare.out, config.prepare.tokenizer) == ("runs/a b", "runs/a b/shards", None)
    of_hub = sft_dist("init", "b.yaml", "--data", SEEDS, "--model", "org/hub", "--validation", SEEDS)
    assert "org/hub: no folder here, and not in this machine's cache: it will be downloaded" in of_hub.stdout
    config = load("b.yaml")
    assert (config.prepare.seq_len, config.prepare.validation_fraction) == (1024, 0.0)
    assert config.prepare.validation_sources[0].schema_ == "self_instruct"


@pytest.mark.parametrize(
    ("content", "more", "source"),
    [
        ("body,kind\nhello there,a\nbye then,b\nhello again,a\nwell well,b\n", [], {"text": "body", "label": "kind"}),
        ("body;label\nhello, there;a\nbye;b\n", [], {"delimiter": ";", "text": "body", "label": "label"}),
        ("q,reply\nhello,hi\nbye,bye\n", ["--prompt-column", "q", "--response-column", "reply"], {"schema": "prompt_response"}),
        ("text,label,more\nhello,a,1\nbye,b,1\n", ["--task", "text"], {"schema": "text", "text": "text"}),
        ("a one,x\nb two,y\nc two,x\n", ["--text-column", "0", "--label-column", "1"], {"text": 0, "label": 1}),
        ("one: {x},a\ntwo,b\nthree,a\nfour,b\n", ["--task", "classification"], {"text": 0, "label": 1}),
    ],
)  # fmt: skip
def test_tables_of_all_kinds_are_looked_into(here, content, more, source):
    (here / "data.csv").write_text(content)
    result = sft_dist("init", "--data", "data.csv", "--preset", "tiny", *more)
    assert result.exit_code == 0, result.output
    written = load("run.yaml").prepare.sources[0].model_dump(by_alias=True)
    assert {name: written[name] for name in source} == source


def test_other_suffixes(here):
    jsonl(here / "records", [{"instruction": "a", "output": "b"}])
    assert init.look("records").source == {"path": "records", "format": "jsonl", "schema": "alpaca"}
    (here / "ids.bin").write_bytes(bytes(8))
    assert init.look("ids.bin", format="nanogpt").task == "text"
    with pytest.raises(DataError, match=r"unknown format '\.bin'"):
        init.look("ids.bin")


def test_labels_that_would_break_a_template_do_not(here):
    jsonl(here / "data.jsonl", [{"text": "hello", "label": "{a}"}, {"text": "bye", "label": 'say "b"'}])
    assert sft_dist("init", "--data", "data.jsonl", "--preset", "tiny").exit_code == 0
    assert load("run.yaml").prepare.template == 'Classify this text. Labels: say "b", (a).\n{text}\nLabel:'
    jsonl(here / "many.jsonl", [{"text": "hello", "label": str(number)} for number in range(30)])
    assert sft_dist("init", "many.yaml", "--data", "many.jsonl", "--preset", "tiny").exit_code == 0
    assert load("many.yaml").prepare.template == "Classify this text.\n{text}\nLabel:"


def test_mistakes_are_one_line_and_nothing_is_written(here):
    (here / "run.yaml").write_text("mine")
    assert "run.yaml: is there already, and nothing is overwritten; name another file" in refused("--data", SMS)
    assert (here / "run.yaml").read_text() == "mine"
    assert "a/b.yaml: there is no folder a; make it" in refused("a/b.yaml", "--data", SMS)
    assert "--data is missing: the file, glob, folder or hf:ID" in refused("b.yaml")
    assert "did you mean gpt2-xl?" in refused("b.yaml", "--data", SMS, "--preset", "gpt2xl")
    assert "gpt2-xl, llama-1b, llama-70b, llama-8b, llama-8b-long, llama-8b-one-gpu. For any" in refused(
        "b.yaml", "--data", SMS, "--preset", "zzz"
    )
    assert "give one of them" in refused("b.yaml", "--data", SMS, "--preset", "tiny", "--model", "x")
    assert "no such file" in refused("b.yaml", "--data", "nowhere.jsonl")
    assert "no such file" in refused("b.yaml", "--data", SMS, "--preset", "tiny", "--validation", "nowhere.jsonl")
    assert "that is instructions; for chat name --messages-column" in refused(
        "b.yaml", "--data", SEEDS, "--task", "chat"
    )
    assert "no column 'instructon'; did you mean instruction?" in refused(
        "b.yaml", "--data", SEEDS, "--text-column", "instructon"
    )
    assert "no column 7; there are 0, 1" in refused(
        "b.yaml", "--data", SMS, "--text-column", "7", "--label-column", "0"
    )
    jsonl(here / "odd.jsonl", [{"a": "x"}, {"a": "y"}])
    assert "no schema fits the keys a" in refused("b.yaml", "--data", "odd.jsonl")
    assert "name --text-column" in refused("b.yaml", "--data", "odd.jsonl", "--messages-column", "a", "--task", "text")
    (here / "empty.jsonl").write_text("")
    assert "there is no record" in refused("b.yaml", "--data", "empty.jsonl")
    assert sorted(path.name for path in here.iterdir()) == ["empty.jsonl", "odd.jsonl", "run.yaml"]


def test_a_model_that_cannot_be_is_told_at_once_and_one_that_is_here_needs_no_word(here, monkeypatch):
    for path in ("/nowhere/model", "./model", "../model", "models/of/mine"):
        assert f"--model {path!r}: there is no such folder, and a hub id is" in refused(
            "--data", SEEDS, "--model", path
        )
    told = refused("--data", SEEDS, "--model", "~/model")
    assert f"name a folder that is there: {Path.home()}/model" in told
    (here / "empty").mkdir()
    assert "there is no config.json in it" in refused("--data", SEEDS, "--model", "empty")
    assert not (here / "run.yaml").exists()
    cached = here / "hub/models--org--here"
    (cached / "snapshots/abc").mkdir(parents=True)
    (cached / "snapshots/abc/config.json").write_text("{}")
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here / "hub"))
    assert init.where_from("org/here") == ""
    assert "will be downloaded" in init.where_from("org/there")


def test_a_disk_that_is_full_is_told_and_nothing_is_left(here, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "sync", full)
    told = refused("b.yaml", "--data", SMS, "--preset", "tiny")
    assert "b.yaml: cannot be written (No space left on device); name another place" in told
    assert not list(here.iterdir())


def test_the_usual_model_is_what_the_machine_can_train(monkeypatch):
    for gpus, name in ((0, "tiny"), (8, "gpt2")):
        monkeypatch.setattr(local, "num_gpus", lambda gpus=gpus: gpus)
        assert init._usual() == name


# ---- at a terminal ----


class Terminal:
    """init on a terminal of its own."""

    def __init__(self, folder, *arguments):
        self.master, slave = pty.openpty()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "launch.cli", "init", *map(str, arguments)]
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
        )
        os.close(slave)
        self.said = ""

    def wait_for(self, words, deadline=60.0):
        end = time.monotonic() + deadline
        while words not in self.said:
            assert time.monotonic() < end, f"no {words!r} in {self.said!r}"
            if select.select([self.master], [], [], 1.0)[0]:
                try:
                    self.said += os.read(self.master, 4096).decode()
                except OSError:  # the other end is closed
                    assert words in self.said, self.said
        self.said = self.said.partition(words)[2]

    def type(self, text):
        os.write(self.master, text.encode())

    def end(self):
        code = self.process.wait(timeout=60)
        os.close(self.master)
        return code


def test_it_asks_what_it_is_not_told(here):
    terminal = Terminal(here)
    for words, answer in (
        ("hf:ID: ", "nowhere.csv\n"),
        ("no such file", ""),
        ("hf:ID: ", f"{SMS}\n"),
        ("found: text is column 1, label is column 0", ""),
        ("Task (classification, instructions, chat, text) [classification]: ", "\n"),
        ("Column of the text (0, 1) [1]: ", "\n"),
        ("Column of the label (0, 1) [0]: ", "\n"),
        ("[tiny]: ", "\n"),
        ("(empty: a share is held out): ", "\n"),
        ("Folder of the run [runs/smsspamcollection]: ", "runs/mine\n"),
        ("run.yaml: written.", ""),
    ):
        terminal.wait_for(words)
        terminal.type(answer)
    assert terminal.end() == 0
    config = load(here / "run.yaml")
    assert (config.run_dir, config.prepare.sources[0].label) == ("runs/mine", 0)


@pytest.mark.parametrize("how", ["interrupt", "end of input"])
def test_who_leaves_in_the_middle_leaves_nothing_behind(here, how):
    terminal = Terminal(here, "--data", SEEDS)
    terminal.wait_for("[instructions]: ")
    if how == "interrupt":
        time.sleep(0.5)  # a signal between Python's prompt and its waiting for keys is heeded at the next key only
        terminal.process.send_signal(signal.SIGINT)
    else:
        terminal.type("\x04")
    terminal.wait_for("interrupted: nothing was written")
    assert terminal.end() == 130
    assert not list(here.iterdir())


def test_answers_of_another_kind(here, monkeypatch):
    """Another task than the data seem to be, with its columns; a model of one's own; --data that cannot be is an error."""
    jsonl(here / "data.jsonl", [{"text": f"{n}", "label": "ab"[n % 2], "why": f"because {n}"} for n in range(8)])
    answers = iter(["instructions", "text", "why", "./nowhere", "org/model", "nowhere.jsonl", ""])
    monkeypatch.setattr(init.click, "prompt", lambda *_, **__: next(answers))
    wish = init.wished(init.Options(data="data.jsonl", run_dir="runs/x"), asks=True)
    assert wish.found.source == {"path": "data.jsonl", "schema": "prompt_response", "prompt": "text", "response": "why"}
    assert (wish.model, wish.preset, wish.validation) == ("org/model", "gpt2", None)
    with pytest.raises(DataError, match="no such file"):
        init.wished(init.Options(data="nowhere.jsonl"), asks=True)
    answers = iter(["chat"])
    with pytest.raises(ConfigError, match="that is text; for chat name --messages-column"):
        init.wished(init.Options(data=str(WIKI)), asks=True)


def test_what_is_written_is_yaml_however_things_are_called(here):
    jsonl(here / "odd.jsonl", [{"prompt": "a", "response": "b", "more\n]: x": 1}])
    assert sft_dist("init", "odd.yaml", "--data", "odd.jsonl", "--preset", "tiny").exit_code == 0
    assert load("odd.yaml").prepare.sources[0].schema_ == "prompt_response"
    chats(here / "a #b: {c}.jsonl")
    assert sft_dist("init", "--data", "a #b: {c}.jsonl", "--preset", "tiny", "--run-dir", "runs/# 1: x").exit_code == 0
    config = load("run.yaml")
    assert (config.prepare.sources[0].path, config.run_dir) == ("a #b: {c}.jsonl", "runs/# 1: x")
    assert yaml.safe_load((here / "run.yaml").read_text())["prepare"]["out"] == "runs/# 1: x/shards"


def test_labels_that_come_late_are_named_and_a_single_one_is_not(tmp_path):
    path = tmp_path / "sorted.csv"
    path.write_text(
        "text,label\n" + "".join(f"text {number},{'ham' if number < 900 else 'spam'}\n" for number in range(999))
    )
    assert init.look(str(path)).labels == ("ham", "spam")
    assert "Labels" not in init._classify(("ham",))


def test_adapters_beside_a_model_that_is_named(here):
    chats(here / "chats.jsonl")
    assert sft_dist("init", "--data", "chats.jsonl", "--preset", "llama-8b", "--lora").exit_code == 0
    config = load("run.yaml")
    assert (config.model.lora.rank, config.model.lora.alpha) == (16, 32)
    assert (config.model.name_or_path, config.train.learning_rate) == ("meta-llama/Llama-3.1-8B", 2e-4)
    assert sft_dist("init", "own.yaml", "--data", "chats.jsonl", "--model", "org/model", "--lora").exit_code == 0
    assert load("own.yaml").model.lora is not None
    told = refused("tiny.yaml", "--data", "chats.jsonl", "--preset", "tiny", "--lora")
    assert "--lora adapts a pre-trained model, and this one is from scratch; name one by --model or --preset" in told
    assert not Path("tiny.yaml").exists()
