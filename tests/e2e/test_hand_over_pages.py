"""docs/export.md and docs/chat.md, executed; the conversation at a real terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from sft_dist.config import load
from sft_dist.data.build import prepare
from sft_dist.errors import ConfigError
from tests.e2e.commands import ENVIRONMENT, ROOT, forked
from tests.invariants import runs
from tests.workers import run_workers


def commands(page: str) -> list[str]:
    """The commands of a page's bash blocks, without their comments."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / page).read_text(), flags=re.DOTALL)
    return [line.partition("  #")[0].rstrip() for block in blocks for line in block.splitlines()]


def trained(topology, folder, run_file, overrides=()):
    os.chdir(folder)
    return runs.run(topology, run_file, overrides)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run `runs/letters` that learns conversations, of a context that long answers fit into."""
    folder = tmp_path_factory.mktemp("pages")
    values = yaml.safe_load(runs.run_file(folder).read_text())
    values["run_dir"], values["prepare"]["out"] = "runs/letters", "runs/letters/shards"
    values["prepare"] |= {"template": "chat", "seq_len": 1024}
    values["prepare"]["sources"][0]["path"] = "messages"
    values["train"] |= {"global_batch_rows": 2, "micro_batch_rows": 2, "max_steps": 2}
    values["evaluate"] = {"samples": 0}
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    here = Path.cwd()
    os.chdir(folder)
    prepare(load("run.yaml").prepare)
    os.chdir(here)
    run_workers(trained, 1, folder, "run.yaml")
    return folder


def test_the_hand_over_is_as_the_page_says(folder):
    shown = commands("export.md")
    assert [line.split()[1] for line in shown] == ["export", "eval", "chat", "verify", "prepare", "train", "verify"]
    export, evaluate, chat, verify, *again = shown
    assert "exported step 2 to runs/letters/export" in forked(export, folder)
    assert "accuracy 0." in forked(evaluate, folder)
    forked(chat, folder)
    assert "weights are the fp32 masters of step 2" in forked(verify, folder)
    (folder / "reproduce.yaml").write_text((folder / "runs/letters/export/reproduce.yaml").read_text())
    here = Path.cwd()
    os.chdir(folder)
    prepare(load("reproduce.yaml").prepare)
    os.chdir(here)
    assert again[1].endswith("reproduce.yaml --nproc 1")
    run_workers(trained, 1, folder, "reproduce.yaml")
    said = forked(again[2], folder)
    assert "of step 2 are the same as then, to the bit" in said
    told = re.findall(r"^    (right        reproduced.*)$", (ROOT / "docs/export.md").read_text(), flags=re.MULTILINE)
    digits = re.compile(r"[0-9a-f]{32}|\d+")
    assert [digits.sub("N", line) for line in told] == [
        digits.sub("N", line.strip()) for line in said.splitlines() if re.match(r" *\w+ +reproduced ", line)
    ]


def test_lines_that_are_piped_are_answered_one_by_one(folder):
    line = commands("chat.md")[-1].replace("< questions.txt", "")
    said = forked(line, folder, typed="win a prize\nlunch at home\n")
    assert len(said.splitlines()) == 2
    assert forked(f"{line} --prompt 'lunch at home'", folder).strip().replace("\n", "\\n") == said.splitlines()[1]
    assert "line 2: " in forked(line, folder, typed="win\n" + "win " * 2000, code=2)
    drawn = commands("chat.md")[2] + " --max-new-tokens 8"
    assert forked(f"{drawn} --prompt win", folder) == forked(f"{drawn} --prompt win", folder)


def remembered(topology, folder):
    """A conversation in a context of 90 tokens: after each question what is left out, the history's length, and the ids asked."""
    from launch.chat import Chat, Decoding

    os.chdir(folder)
    chat = Chat("runs/letters", Decoding(12), "Be brief.")
    chat.context = 90
    told = []
    for question in ("win a prize now", "lunch at home", "later"):
        before = list(chat.history)
        answer, left_out = chat.ask(question)
        shown = chat.tokenizer.decode(chat._fitting([*before, {"role": "user", "content": question}])[0])
        told.append((left_out, len(chat.history), shown))

    def stop(text):
        raise KeyboardInterrupt

    chat.history, chat.decoding, chat.context = [], Decoding(200, temperature=2.0), 1024
    try:
        chat.ask("win", stop)
    except KeyboardInterrupt:
        told.append(chat.history)
    return told, answer


def test_what_was_said_is_remembered_as_far_as_the_context_goes(folder):
    [(told, _)] = run_workers(remembered, 1, folder)
    first, *_, last, stopped = told
    assert first[:2] == (0, 2)
    assert first[2] == "### System:\nBe brief.\n\n### User:\nwin a prize now\n\n### Assistant:\n"
    assert last[0] >= 2
    assert "### System:\nBe brief." in last[2], "the system message stays"
    assert "win a prize now" not in last[2], "the oldest turns are gone"
    assert [turn["role"] for turn in stopped] == ["user", "assistant"], "a stopped answer is kept as far as it came"


def asked_as(topology, folder):
    """How models are asked that are no run, or learned plain text; and what is refused of the latter."""
    from launch.chat import Chat, Decoding

    os.chdir(folder)
    found = [Chat("stranger", Decoding()).way]
    about = json.loads(Path("stranger/tokenizer_config.json").read_text())
    single = "{% if messages | length > 1 %}{{ raise_exception('one') }}{% endif %}{{ messages[0].content }}"
    Path("stranger/tokenizer_config.json").write_text(json.dumps(about | {"chat_template": single}))
    found.append(Chat("stranger", Decoding()).way)
    path = Path("runs/letters/shards/prepare.json")
    kept = path.read_text()
    path.write_text(json.dumps(json.loads(kept) | {"schemas": ["text"]}))
    try:
        chat = Chat("runs/letters", Decoding(2))
        found.append(chat.way)
        chat.ask("once upon")
        found.append(chat.tokenizer.decode(chat._ids(chat.history[:1])))
        chat.instruct("Be brief.")
    except ConfigError as error:
        found.append(str(error))
    finally:
        path.write_text(kept)
    return found


def test_a_model_is_asked_as_it_learned(folder):
    forked("sft-dist export runs/letters stranger", folder)
    (folder / "stranger" / "sft_dist.json").unlink()
    [found] = run_workers(asked_as, 1, folder)
    assert found == [
        "turns", "alone", "text", "once upon",
        "--system: the model was trained on plain text, which has no place for it; leave it out",
    ]  # fmt: skip


class Terminal:
    """A command at a terminal of its own."""

    def __init__(self, *command, cwd):
        mine, theirs = pty.openpty()
        environment = ENVIRONMENT | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "COLUMNS": "200"}
        self.process = subprocess.Popen(
            command, cwd=cwd, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(theirs)
        self.end, self.seen = mine, ""

    def type(self, text):
        os.write(self.end, text.encode())

    def until(self, pattern, deadline=90.0):
        """Read until what was said since the last call matches; returns it without the terminal's own sequences."""
        end = time.monotonic() + deadline
        while not (found := re.search(pattern, plain := re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.seen), re.DOTALL)):
            assert time.monotonic() < end, f"{pattern} did not come:\n{plain}"
            if select.select([self.end], [], [], 1.0)[0]:
                self.seen += os.read(self.end, 65_536).decode(errors="replace")
        self.seen = ""
        return plain[: found.end()]


def test_a_conversation_at_a_terminal(folder):
    forked("sft-dist export runs/letters endless", folder)
    generation = json.loads((folder / "endless" / "generation_config.json").read_text())
    (folder / "endless" / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": 100_000}))
    options = [
        "--max-new-tokens",
        "900",
        "--temperature",
        "2",
        "--seed",
        "1",
    ]  # answers that end only when they are stopped
    terminal = Terminal("sft-dist", "chat", "endless", *options, cwd=folder)
    try:
        terminal.until(r"it remembers what was said.*\n>")
        terminal.type("x\x7fwin a prize\r")  # edited: a letter, taken back
        said = terminal.until(r"win a prize\s+\S.{60}")
        terminal.type("\x03")
        assert "Traceback" not in said + terminal.until(r"\(stopped\)\s.*>")
        terminal.type("/undo\r")
        terminal.until(r"\(0 questions are left\).*>")
        terminal.type("\x1b[200~lunch\nat home\x1b[201~")
        terminal.until(r"at home")
        terminal.type("\r")
        terminal.until(r"at home\s+\S.{60}")
        terminal.type("\x03")
        terminal.until(r"\(stopped\)\s.*>")
        terminal.type("half\x03")
        terminal.until(r">.*>")
        terminal.type("/undo\r")
        terminal.until(r"\(0 questions are left\).*>")  # the two lines were one question
        terminal.type("\x04")
        assert terminal.process.wait(timeout=60) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.end)
