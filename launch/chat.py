"""A conversation with a model: one answer, a line of input at a time, or a person at a terminal."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import jinja2
import torch
from transformers import AutoTokenizer

from launch.models import device, is_run, opened
from sft_dist.answers import Way, way_of
from sft_dist.config import read
from sft_dist.data.tokenise import Tokenizer
from sft_dist.data.view import visible
from sft_dist.errors import ConfigError
from sft_dist.export import ABOUT

Messages = list[dict[str, str]]
_WAYS = {
    "turns": "it remembers what was said",
    "alone": "it was trained on single questions, so each is asked alone",
    "text": "it was trained on plain text, so it goes on with what is typed",
}
HELP = """\
/reset         forget what was said
/undo          forget the last question and its answer
/system TEXT   what the model is told before everything; without TEXT: nothing
/help          this
/quit          end, as Ctrl-D does
Ctrl-C stops an answer, and empties a line; Alt-Enter begins a new line; pasted lines stay together.
A question that begins with a slash is typed with two."""
_COMMANDS = ("/reset", "/undo", "/system", "/help", "/quit")


@dataclass(frozen=True, slots=True)
class Decoding:
    """How an answer is made: at temperature 0 of the likeliest tokens, above of tokens drawn from the likeliest `top_p`."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature and (self.top_p < 1 or self.seed is not None):
            raise ConfigError(
                "--top-p and --seed are about drawing, and at temperature 0 nothing is drawn; add --temperature 1"
            )

    def options(self) -> dict[str, Any]:
        """As `generate` takes them.

        >>> Decoding(temperature=0.5).options()
        {'do_sample': True, 'temperature': 0.5, 'top_p': 1.0, 'top_k': 0}
        """
        if not self.temperature:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


@dataclass
class Detokeniser:
    """Ids one by one → text as soon as it is certain: never half a character, and joined what `decode` makes of all ids.

    >>> made = Detokeniser(lambda ids: bytes(ids).decode(errors="replace"))
    >>> [made.add(byte) for byte in "né".encode()]
    ['n', '', 'é']
    """

    decode: Callable[[Sequence[int]], str]
    ids: list[int] = field(default_factory=list)
    _begin: int = 0  # decoded from here, since what a token spells may depend on those before it
    _told: int = 0

    def add(self, token: int) -> str:
        """The text that is certain now and was not before."""
        self.ids.append(token)
        before, now = self.decode(self.ids[self._begin : self._told]), self.decode(self.ids[self._begin :])
        if len(now) <= len(before) or now.endswith("\ufffd"):  # the last character is not whole yet
            return ""
        self._begin, self._told = self._told, len(self.ids)
        return now[len(before) :]

    def rest(self) -> str:
        """What is left at the end, of a character that was never finished."""
        before, now = self.decode(self.ids[self._begin : self._told]), self.decode(self.ids[self._begin :])
        return now[len(before) :]


class Stream:
    """What `generate` gives its tokens to: `say` gets the text without the white space around it, control characters as signs."""

    def __init__(self, decode: Callable[[Sequence[int]], str], say: Callable[[str], None]) -> None:
        self.made, self.say = Detokeniser(decode), say
        self._is_prompt, self._held, self._has_begun = True, "", False

    def put(self, tokens: torch.Tensor) -> None:
        """First the prompt, then each token."""
        if self._is_prompt:
            self._is_prompt = False
            return
        for token in tokens.flatten().tolist():
            self._tell(self.made.add(token))

    def end(self) -> None:
        """Say what was held back."""
        self._tell(self.made.rest())

    def _tell(self, text: str) -> None:
        text = self._held + text
        if not self._has_begun:
            text = text.lstrip()
        certain = text.rstrip()
        self._held = text[len(certain) :]
        if certain:
            self._has_begun = True
            self.say(visible(certain))


class Chat:
    """A model and what was said so far; `history` holds questions and answers in turn."""

    def __init__(self, model: str, decoding: Decoding, system: str | None = None) -> None:
        self.name, self.decoding, self.history = model, decoding, Messages()
        self.model, folder, _ = opened(model)
        self.model.to(device())
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.way = _way(model, folder, self.tokenizer)
        if self.way != "text" and self.tokenizer.chat_template is None:
            raise ConfigError(f"{model}: its tokenizer has no chat template; export it from a run, or add one")
        self.ends = Tokenizer.load(folder).end_ids if is_run(model) else self.model.generation_config.eos_token_id
        self.context = getattr(self.model.config, "max_position_embeddings", None)
        self.system: str | None = None
        self.instruct(system)
        if decoding.seed is not None:
            torch.manual_seed(decoding.seed)

    def instruct(self, system: str | None) -> None:
        """Set what the model is told before everything. Raises ConfigError where its template has no place for that."""
        if system and self.way == "text":
            raise ConfigError("--system: the model was trained on plain text, which has no place for it; leave it out")
        if system:
            try:
                self._ids([{"role": "system", "content": system}, {"role": "user", "content": "?"}])
            except jinja2.TemplateError as error:
                raise ConfigError(
                    f"--system: the model's template has no place for a system message ({error}); leave it out"
                ) from None
        self.system = system or None

    def ask(self, question: str, say: Callable[[str], None] | None = None) -> tuple[str, int]:
        """The answer, which goes into the history, and how many old turns no longer fit; `say` gets it piece by piece.

        An answer that Ctrl-C stops is kept as far as it came, and KeyboardInterrupt raised again. Raises ConfigError for a
        question that is too long.
        """
        earlier = self.history if self.way == "turns" else []
        ids, left_out = self._fitting([*earlier, {"role": "user", "content": question}])
        limit = self.decoding.max_new_tokens
        if self.context is not None:
            limit = min(limit, self.context - len(ids))
        stream = Stream(self._decode, say or (lambda text: None))
        asked = torch.tensor([ids], device=device())
        is_stopped = False
        try:
            with torch.no_grad():
                made = self.model.generate(
                    input_ids=asked,
                    attention_mask=torch.ones_like(asked),
                    max_new_tokens=limit,
                    pad_token_id=self.tokenizer.pad_token_id,
                    eos_token_id=self.ends,
                    streamer=stream,
                    **self.decoding.options(),
                )[0, len(ids) :].tolist()
        except KeyboardInterrupt:
            is_stopped, made = True, stream.made.ids
        answer = self._decode(made).strip()
        self.history = [
            *earlier[left_out:],
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        if is_stopped:
            raise KeyboardInterrupt
        return answer, left_out

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _fitting(self, messages: Messages) -> tuple[list[int], int]:
        """Ids of the conversation without as many of its oldest turns as it takes to leave room for an answer, and their number."""
        left_out = 0
        while True:
            ids = self._ids(([{"role": "system", "content": self.system}] if self.system else []) + messages[left_out:])
            room = len(ids) + self.decoding.max_new_tokens
            if self.context is None or room <= self.context or left_out + 1 == len(messages):
                break
            left_out += 2
        if self.context is not None and len(ids) >= self.context:
            raise ConfigError(
                f"--prompt: {len(ids)} tokens do not leave room in a context of {self.context}; shorten it"
            )
        return ids, left_out

    def _ids(self, messages: Messages) -> list[int]:
        if self.way == "text":
            own = Tokenizer.load(self.tokenizer.name_or_path)
            return [*own.bos_ids, *own.encode(messages[-1]["content"])]
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


def _way(model: str, folder: str, tokenizer: Any) -> Way:
    """How a run was trained to be asked, or what an export says of itself; of another model what its template can do."""
    if is_run(model):
        return way_of(read(Path(model) / "run.yaml"), Tokenizer.load(folder))
    about = Path(model) / ABOUT
    known = json.loads(about.read_text()).get("asked") if about.is_file() else None
    if known in _WAYS:
        return known
    turns = [{"role": role, "content": "?"} for role in ("user", "assistant", "user")]
    try:
        tokenizer.apply_chat_template(turns, tokenize=False)
    except jinja2.TemplateError:
        return "alone"
    except ValueError:  # it has none: the caller says so
        pass
    return "turns"


def answer_prompt(model: str, prompt: str, decoding: Decoding, system: str | None = None) -> str:
    """The model's answer to one prompt, through its own chat template."""
    return Chat(model, decoding, system).ask(prompt)[0]


def answer_lines(model: str, lines: Iterable[str], decoding: Decoding, system: str | None = None) -> None:
    """Print the answer to each line, asked alone, as one line; line ends and backslashes in it are escaped, as in JSON."""
    chat = Chat(model, decoding, system)
    for number, line in enumerate(lines, 1):
        chat.history = []
        try:
            answer, _ = chat.ask(line.rstrip("\n"))
        except ConfigError as error:
            raise ConfigError(f"line {number}: {str(error).removeprefix('--prompt: ')}") from None
        click.echo(visible(answer).replace("\\", "\\\\").replace("\n", "\\n"))


def converse(model: str, decoding: Decoding, system: str | None = None) -> None:
    """Until Ctrl-D or /quit: questions from the terminal, answers as they are made."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings

    chat, keys = Chat(model, decoding, system), KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    session: PromptSession[str] = PromptSession(key_bindings=keys)
    click.echo(f"{model}: {_WAYS[chat.way]}. /help tells what can be typed, Ctrl-D ends")
    while True:
        try:
            typed = session.prompt("> ").strip()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        if typed == "/quit":
            return
        if typed.startswith("/") and not typed.startswith("//"):
            click.echo(obey(chat, typed))
        elif typed:
            _answer(chat, typed[typed.startswith("//") :])


def obey(chat: Chat, typed: str) -> str:
    """Do what a command says; what to tell of it."""
    command, _, text = typed.partition(" ")
    if command == "/reset":
        chat.history = []
        return "(forgotten)"
    if command == "/undo":
        chat.history = chat.history[:-2]
        return f"({len(chat.history) // 2} questions are left)"
    if command == "/system":
        try:
            chat.instruct(text.strip())
        except ConfigError as error:
            return f"({str(error).removeprefix('--system: ')})"
        return "(from now on)" if chat.system else "(nothing is said before)"
    if command == "/help":
        return HELP
    close = difflib.get_close_matches(command, _COMMANDS, n=1)
    return f"({command} is no command; {f'did you mean {close[0]}?' if close else '/help lists them'})"


def _answer(chat: Chat, question: str) -> None:
    """Show the answer as it is made; Ctrl-C stops it and no more."""

    def say(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        answer, left_out = chat.ask(question, say)
        click.echo("" if answer else "(nothing: it ended at once)")
    except KeyboardInterrupt:
        click.echo(" (stopped)")
        return
    except (ConfigError, jinja2.TemplateError) as error:
        click.echo(f"({str(error).removeprefix('--prompt: ')})")
        return
    if left_out:
        click.echo(
            f"(the oldest {left_out} turns no longer fit the context of {chat.context:,} tokens, and are forgotten)"
        )
