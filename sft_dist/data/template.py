"""How a conversation becomes text, and which of that text is learned: flags are born here and carried to the loss.

A preset is one table that gives both the spans training uses and the Jinja chat template inference uses, so the two
cannot drift apart. A Jinja template, the tokenizer's own or a file, is rendered as inference renders it, and what is
learned is what it adds to the prompt that inference would have seen.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sft_dist.data.records import Conversation, Drop, Span, Turn
from sft_dist.errors import ConfigError, DataError
from sft_dist.files import digest_of


@dataclass(frozen=True, slots=True)
class TokenizerTexts:
    """What templates need to know of a tokenizer; `control_tokens` are the special tokens of its vocabulary, by text.

    >>> TokenizerTexts(None, None, "</s>", frozenset({"</s>"})).eos_token
    '</s>'
    """

    chat_template: str | None
    bos_token: str | None
    eos_token: str
    control_tokens: frozenset[str]


# What stands between two contents: text, then spans that begin and end with a control token (or none), then text.
_Piece = tuple[str, tuple[Span, ...], str]
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Template:
    """What stands before and after the contents of each role; control tokens in it are those named in `controls`.

    Learned is the answer, with `lead` and `trail` around it, and the end token: `end`, or the tokenizer's own.

    >>> template_from("Spam?\\n{text}\\nAnswer:").render_prompt((Turn("user", "WIN!!"),), eos="</s>")
    [Span(text='Spam?\\nWIN!!\\nAnswer:', is_target=False, is_control=False)]
    """

    name: str
    before_user: str
    header: str  # before an answer: where inference begins
    after_user: str = ""
    lead: str = ""  # a space where the header ends without white space: it belongs to the first word
    trail: str = ""
    end: str | None = None
    after_end: str = ""
    between: str = ""  # after an answer, when a question follows
    begin: str = ""  # before everything
    before_system: str | None = None  # None: the template has no place for a system message
    after_system: str = ""
    user_after_system: str | None = None  # in place of before_user
    controls: tuple[str, ...] = ()
    writes_bos: bool = False  # itself, so that nobody else need put it before the text
    is_multi_turn: bool = False
    is_any_order: bool = False
    is_trimmed: bool = False
    _pieces: dict[tuple[str, str], _Piece] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        pairs = itertools.product(("", *_ROLES), (*_ROLES, "answer", ""))
        pieces = {pair: _piece(self._after(pair[0]) + self._before(*pair), self.controls) for pair in pairs}
        object.__setattr__(self, "_pieces", pieces)

    @property
    def fingerprint(self) -> str:
        """A digest of what decides the rendering: 32 hexadecimal digits."""
        return digest_of({key: value for key, value in asdict(self).items() if key not in ("name", "_pieces")})

    def end_token(self, eos: str) -> str:
        """The control token that ends an answer, where generation stops; `eos` is the tokenizer's end token."""
        return self.end or eos

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer's own bos goes before what is rendered, unless that begins with it."""
        return True

    def words(self) -> str:
        """The text it puts around a question, without control tokens: what a tokenizer should know.

        >>> template_from("Q: {text}\\nA:").words()
        'Q: \\nA:'
        """
        text = self.before_user + self.after_user + self.header
        return "".join(_cut(text, _pattern(frozenset(self.controls)))[::2])

    def render(self, conversation: Conversation, eos: str) -> list[list[Span]] | Drop:
        """One document: spans whose texts concatenate to the rendered conversation; `eos` is the tokenizer's end token.

        Plain text is one target span and the end token. A conversation without a place in the template is a Drop.
        """
        turns = conversation.turns
        if turns[0].role == "text":
            return [_plain_text(turns[0], eos)]
        misfit = self._misfit(conversation)
        if misfit:
            return Drop("template_mismatch", conversation.where, f"template {self.name!r}: {misfit}")
        return [self._spans(turns, eos, "")]

    def render_prompt(self, turns: Sequence[Turn], eos: str, tools: list[dict[str, Any]] | None = None) -> list[Span]:
        """What inference sees before the answer to the last of `turns`, which is a question; there is no place for `tools`."""
        return self._spans(turns, eos, "answer")

    def _spans(self, turns: Sequence[Turn], eos: str, follows: str) -> list[Span]:
        """Spans of the turns, and of what stands before what `follows`: an "answer", or nothing."""
        spans: list[Span] = []
        text, before = "", ""
        for turn in turns:
            text = _put(spans, text, self._pieces[before, turn.role])
            content = turn.content.strip() if self.is_trimmed else turn.content
            before = turn.role
            if before != "assistant":
                text += content
                continue
            if turn.is_target and text:
                spans.append(Span(text, False))
                text = ""
            spans.append(Span(f"{text}{self.lead}{content}{self.trail}", turn.is_target))
            spans.append(_control(self.end or eos, turn.is_target))
            text = ""
        text = _put(spans, text, self._pieces[before, follows])
        if text:
            spans.append(Span(text, False))
        return spans

    def _after(self, role: str) -> str:
        after = {"": self.begin, "system": self.after_system, "user": self.after_user, "assistant": self.after_end}
        return after[role]

    def _before(self, previous: str, role: str) -> str:
        if role == "user":
            inside = self.user_after_system if previous == "system" else None
            before = self.before_user if inside is None else inside
            return (self.between if previous == "assistant" else "") + before
        return {"system": self.before_system or "", "assistant": self.header, "answer": self.header, "": ""}[role]

    def _misfit(self, conversation: Conversation) -> str | None:
        """Why the conversation has no place in the template; None: it has one."""
        roles = []
        for turn in conversation.turns:
            roles.append(turn.role)
            if turn.extra and (turn.extra.get("tool_calls") or turn.extra.get("reasoning_content")):
                return "it has no place for tool calls or reasoning; use template: tokenizer"
        if conversation.tools or "tool" in roles:
            return "it has no place for tools; use template: tokenizer"
        if self.is_any_order:
            return None
        if roles[0] == "system":
            if self.before_system is None:
                return "it has no place for a system message"
            roles = roles[1:]
        if roles != ["user", "assistant"] * (len(roles) // 2) or not roles:
            return f"it needs user and assistant in turn, found {', '.join(roles)}"
        if len(roles) > 2 and not self.is_multi_turn:
            return f"it is for one question, found {len(roles) // 2}"
        return None

    def chat_template(self, *, has_bos: bool) -> str:
        """The same rendering as a Jinja chat template, for the exported tokenizer; `has_bos`: it starts with `bos_token`."""
        content = f"{{{{- message['content']{' | trim' if self.is_trimmed else ''} -}}}}"
        before_user = _say(self.before_user)
        if self.user_after_system is not None:
            inside = _say(self.user_after_system)
            before_user = f"{{%- if before == 'system' -%}}{inside}{{%- else -%}}{before_user}{{%- endif -%}}"
        blocks = [
            "{{- bos_token -}}" if has_bos and not self.writes_bos else "",
            _say(self.begin),
            "{%- for message in messages -%}",
            "{%- set before = '' if loop.first else messages[loop.index0 - 1]['role'] -%}",
            "{%- if message['role'] == 'user' -%}",
            f"{{%- if before == 'assistant' -%}}{_say(self.between)}{{%- endif -%}}" if self.between else "",
            before_user + content + _say(self.after_user),
            "{%- elif message['role'] == 'assistant' -%}",
            _say(self.header + self.lead) + content + _say(self.trail),
            _say(self.end) if self.end else "{{- eos_token -}}",
            _say(self.after_end),
            *self._system_blocks(content),
            "{%- else -%}",
            "{{- raise_exception('this model was trained without ' + message['role'] + ' messages') -}}",
            "{%- endif -%}",
            "{%- endfor -%}",
            f"{{%- if add_generation_prompt -%}}{_say(self.header)}{{%- endif -%}}",
        ]
        return "".join(blocks)

    def _system_blocks(self, content: str) -> list[str]:
        if self.before_system is None:
            return []
        return [
            "{%- elif message['role'] == 'system' -%}",
            _say(self.before_system) + content + _say(self.after_system),
        ]


def _say(text: str) -> str:
    """Literal text inside Jinja: quoted, so that braces in it mean nothing, and white space around it stays."""
    return f"{{{{- {json.dumps(text, ensure_ascii=False)} -}}}}" if text else ""


def _plain_text(turn: Turn, eos: str) -> list[Span]:
    return [Span(turn.content, is_target=True), _control(eos, True)]


@lru_cache(maxsize=64)
def _control(token: str, is_target: bool) -> Span:
    return Span(token, is_target, is_control=True)


@lru_cache(maxsize=64)
def _pattern(controls: frozenset[str]) -> re.Pattern[str]:
    """Matches each of the control tokens, the longest of those that fit; one group."""
    longest_first = sorted(filter(None, controls), key=lambda token: (-len(token), token))
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})" if longest_first else "((?!))")


def _cut(text: str, pattern: re.Pattern[str]) -> list[str]:
    """Text, control token, text, …, text."""
    return pattern.split(text)


def _piece(text: str, controls: Sequence[str]) -> _Piece:
    head, *rest = _cut(text, _pattern(frozenset(controls)))
    if not rest:
        return head, (), ""
    *middle, tail = rest
    return head, tuple(Span(part, False, place % 2 == 0) for place, part in enumerate(middle) if part), tail


def _put(spans: list[Span], text: str, piece: _Piece) -> str:
    """Add a piece of context after `text`, which is not in `spans` yet; returns the text that is not after it."""
    head, middle, tail = piece
    text += head
    if not middle:
        return text
    if text:
        spans.append(Span(text, False))
    spans.extend(middle)
    return tail


class _MisfitError(Exception):
    """What keeps a conversation from being rendered by a Jinja template; becomes a Drop, or an error of the user's."""


@dataclass(frozen=True, slots=True)
class _Masked:
    """Messages as a template sees them; where they spell a control token, one private character stands for it.

    `spelled` has the token of each such character, by code point.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    spelled: dict[int, str]


@dataclass(frozen=True, slots=True)
class _Answer:
    """A conversation rendered up to an answer, which is `text[start:stop]`, its end token included."""

    text: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class JinjaTemplate:
    """A Jinja chat template, bound to the tokenizer whose control tokens it writes (None: it was only checked).

    >>> source = "{% for m in messages %}{{ '<s>' + m.content + '</s>' }}{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
    >>> tokens = TokenizerTexts(source, "<s>", "</s>", frozenset({"<s>", "</s>"}))
    >>> template_from("tokenizer", tokens).render_prompt((Turn("user", "Hi </s>"),), "</s>")[1]
    Span(text='Hi </s>', is_target=False, is_control=False)
    """

    name: str
    source: str
    tokenizer: TokenizerTexts | None = None
    _end: str = field(init=False, repr=False, compare=False, default="")

    def __post_init__(self) -> None:
        if self.tokenizer is not None:
            object.__setattr__(self, "_end", self._probe())

    @property
    def fingerprint(self) -> str:
        """A digest of what decides the rendering, the tokenizer's control tokens included: 32 hexadecimal digits."""
        known = self.tokenizer
        texts = [known.bos_token, known.eos_token, sorted(known.control_tokens)] if known else None
        return digest_of({"jinja": self.source, "tokenizer": texts})

    def end_token(self, eos: str) -> str:
        """The control token that ends an answer, where generation stops."""
        return self._end or eos

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer's own bos goes before what is rendered: a chat template writes it, or there is none."""
        return False

    def words(self) -> str:
        """Nothing: what it puts around contents depends on them."""
        return ""

    def chat_template(self, *, has_bos: bool) -> str:
        """The source itself, whatever `has_bos`."""
        return self.source

    def render(self, conversation: Conversation, eos: str) -> list[list[Span]] | Drop:
        """One list of spans per document, whose texts concatenate to what inference renders.

        A conversation is one document, unless the template renders an answer otherwise once others follow it: then
        each target answer is learned in a document of its own, as inference would have shown it. Plain text is one
        target span and the end token. A conversation that the template refuses or changes is a Drop.
        """
        if conversation.turns[0].role == "text":
            return [_plain_text(conversation.turns[0], eos)]
        try:
            return self._documents(conversation)
        except _MisfitError as misfit:
            return Drop("template_mismatch", conversation.where, f"template {self.name!r}: {misfit}")

    def render_prompt(self, turns: Sequence[Turn], eos: str, tools: list[dict[str, Any]] | None = None) -> list[Span]:
        """What inference sees before the answer to `turns`. Raises DataError when the template refuses them."""
        try:
            masked = self._masked(turns, tools)
            return self._spans(masked, self._text(masked, len(turns), asks=True), [])
        except _MisfitError as misfit:
            raise DataError(
                f"prepare.template: {self.name!r} cannot render this prompt ({misfit}); leave it out, or use another template"
            ) from None

    def _documents(self, conversation: Conversation) -> list[list[Span]]:
        turns = conversation.turns
        masked = self._masked(turns, conversation.tools)
        whole = self._text(masked, len(turns))
        targets = [place for place, turn in enumerate(turns) if turn.role == "assistant" and turn.is_target]
        answers = [self._answer(masked, place, whole if place == len(turns) - 1 else None) for place in targets]
        if all(whole.startswith(answer.text[: answer.stop]) for answer in answers):
            documents = [(whole, len(turns), [(answer.start, answer.stop) for answer in answers])]
        else:
            documents = [
                (answer.text, place + 1, [(answer.start, answer.stop)])
                for place, answer in zip(targets, answers, strict=True)
            ]
        if masked.spelled:
            self._check_spelled(conversation, masked, [(text, count) for text, count, _ in documents])
        return [self._spans(masked, text, ranges) for text, _, ranges in documents]

    def _answer(self, masked: _Masked, place: int, answered: str | None) -> _Answer:
        """The answer at `place`: what the template adds to the prompt before it, up to the end token."""
        asked = self._text(masked, place, asks=True)
        answered = self._text(masked, place + 1) if answered is None else answered
        if not answered.startswith(asked):
            raise _MisfitError(
                f"the prompt before answer {place + 1} ({asked[-30:]!r}) is not what that answer follows"
            )
        found = list(self._controls.finditer(answered, len(asked)))
        stops = [match.end() for match in found if match[0] == self._end] or [match.end() for match in found]
        if not stops:
            raise _MisfitError(f"no control token ends answer {place + 1}")
        answer = _Answer(answered, len(asked), stops[-1])
        _check_said(masked.messages[place], answered[answer.start : answer.stop])
        return answer

    def _check_spelled(self, conversation: Conversation, masked: _Masked, documents: list[tuple[str, int]]) -> None:
        """Masking must change nothing but what is a control token: a template may look for one inside contents."""
        plain = _Masked([_message(turn) for turn in conversation.turns], conversation.tools, {})
        for text, count in documents:
            if text.translate(masked.spelled) != self._text(plain, count):
                tokens = ", ".join(map(repr, masked.spelled.values()))
                raise _MisfitError(f"the record spells {tokens}, which the template takes for its own")

    def _spans(self, masked: _Masked, text: str, ranges: Sequence[tuple[int, int]]) -> list[Span]:
        """The text cut at the template's control tokens and at the ends of the target ranges."""
        spans: list[Span] = []
        edges = [0, *itertools.chain.from_iterable(ranges), len(text)]
        for number, (start, stop) in enumerate(itertools.pairwise(edges)):
            for place, part in enumerate(_cut(text[start:stop], self._controls)):
                if part:
                    words = part.translate(masked.spelled) if masked.spelled else part
                    spans.append(Span(words, is_target=number % 2 == 1, is_control=place % 2 == 1))
        return spans

    @property
    def _controls(self) -> re.Pattern[str]:
        assert self.tokenizer is not None, "a template that renders is bound to a tokenizer"
        return _pattern(self.tokenizer.control_tokens)

    def _masked(self, turns: Sequence[Turn], tools: list[dict[str, Any]] | None) -> _Masked:
        messages = [_message(turn) for turn in turns]
        texts = [*_strings(messages), *_strings(tools)]
        found = {token for text in texts for token in self._controls.findall(text)}
        if not found:
            return _Masked(messages, tools, {})
        taken = {*self.source, *itertools.chain.from_iterable(texts)}
        free = (chr(code) for code in itertools.chain(range(0xE000, 0xF900), range(0xF0000, 0xFFFFE)))
        masks = dict(zip(sorted(found), (mask for mask in free if mask not in taken), strict=False))

        def hide(text: str) -> str:
            return self._controls.sub(lambda match: masks[match[0]], text)

        spelled = {ord(mask): token for token, mask in masks.items()}
        return _Masked(_changed(messages, hide), _changed(tools, hide), spelled)

    def _text(self, masked: _Masked, count: int, *, asks: bool = False) -> str:
        """The first `count` messages rendered; `asks`: with what stands before an answer."""
        assert self.tokenizer is not None, "a template that renders is bound to a tokenizer"
        tokens = {"bos_token": self.tokenizer.bos_token, "eos_token": self.tokenizer.eos_token}
        try:
            return _compiled(self.source).render(
                messages=masked.messages[:count],
                tools=masked.tools,
                documents=None,
                add_generation_prompt=asks,
                **{name: token for name, token in tokens.items() if token is not None},
            )
        except Exception as error:  # a template is somebody's program: it may fail in any way
            raise _MisfitError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error

    def _probe(self) -> str:
        """The control token that ends an answer, found in a small conversation.

        Raises ConfigError when what is learned cannot be told from what is given.
        """
        turns = [Turn("user", "Is 2 < 3 & 4?"), Turn("assistant", "Yes, 2 < 3 & 4.", True)] * 2
        masked = _Masked([_message(turn) for turn in turns], None, {})
        try:
            asked, answered = self._text(masked, 1, asks=True), self._text(masked, 2)
            unasked = self._text(masked, 1)
        except _MisfitError as misfit:
            raise self._refusal(f"cannot render a question and its answer ({misfit})", "correct it") from None
        try:
            whole = self._text(masked, 4)
        except _MisfitError:  # a template for one question
            whole = answered
        answer = answered[len(asked) :]
        place = answer.find(turns[1].content)
        if not answered.startswith(asked):
            raise self._refusal(
                f"its generation prompt ends with {asked[-30:]!r}, and its answers do not begin there",
                "make answers begin as add_generation_prompt does",
            )
        if place < 0:
            raise self._refusal(
                "it changes the text of answers, so they cannot be found in it", "write them as they are"
            )
        if asked == unasked and answer[:place].strip():
            raise self._refusal(
                f"it has no generation prompt, though {answer[:place]!r} stands before its answers",
                "add {% if add_generation_prompt %}",
            )
        return self._end_of(answer, place + len(turns[1].content), whole[len(asked) :])

    def _end_of(self, answer: str, place: int, whole: str) -> str:
        """The last of the control tokens that follow the content, ending at `place`, without text in between.

        Those count that stand in `whole`, too, where a question follows: the end of a turn, not of the conversation.
        """
        found = list(self._controls.finditer(answer, place))
        if not found:
            raise self._refusal(
                f"no control token of the tokenizer follows an answer ({answer[place:]!r} does), so no answer would end",
                "use template: chat, or a tokenizer that has the template's tokens",
            )
        end = found[0]
        for token in found[1:]:
            if token.start() != end.end() or not whole.startswith(answer[: token.end()]):
                break
            end = token
        return end[0]

    def _refusal(self, reason: str, remedy: str) -> ConfigError:
        return ConfigError(f"prepare.template: {self.name!r}: {reason}; {remedy}, or name another template")


def _message(turn: Turn) -> dict[str, Any]:
    """A turn as transformers hands it to a template, reasoning under both of its names."""
    message = {"role": turn.role, "content": turn.content}
    if not turn.extra:
        return message
    message |= turn.extra
    reasoning = message.get("reasoning_content")
    return message if reasoning is None else {"thinking": reasoning, **message}


def _strings(value: Any) -> Iterator[str]:
    """All text inside a JSON value, names of fields too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with all text inside it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _changed(item, change) for key, item in value.items()}
    return [_changed(item, change) for item in value] if isinstance(value, list) else value


def _check_said(message: dict[str, Any], learned: str) -> None:
    """An answer is learned as it is written, or not at all: reasoning and the names of called functions are part of it."""
    parts = re.split("</?think>", message["content"])  # templates set white space of their own around reasoning
    parts.append(message.get("reasoning_content") or "")
    parts += [call.get("function", call).get("name", "") for call in message.get("tool_calls") or ()]
    missing = next((part.strip() for part in parts if part.strip() not in learned), None)
    if missing is not None:
        raise _MisfitError(f"{missing[:30]!r} of an answer is left out, or written otherwise")


class _Generation(Extension):
    """`{% generation %}`, with which templates mark answers: accepted, and as in transformers a scope of its own."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja has it

    def parse(self, parser: Parser) -> nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body, lineno=line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(jinja2.utils.Namespace):
    """A namespace without names that begin with an underscore: those lead out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no `self`: a template may use that name
        self, *given = args
        values = dict(*given, **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}: rename it")


class _Dict:
    """`dict` inside a template, without the class that leads out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    """A chat template in the environment transformers renders it in."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    # One date for ever, the one Llama 3.1's template falls back to: what is trained on must not depend on the day.
    now = datetime(2024, 7, 26)
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = now.strftime
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment.from_string(source)


_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n"
)


def _llama2(bos: str) -> Template:
    """Touvron et al. 2023, "Llama 2"; https://github.com/meta-llama/llama (generation.py)."""
    return Template(
        "llama2",
        before_user=f"{bos}[INST] ",
        after_user=" [/INST]",
        header="",
        lead=" ",
        trail=" ",
        before_system=f"{bos}[INST] <<SYS>>\n",
        after_system="\n<</SYS>>\n\n",
        user_after_system="",
        controls=(bos,),
        writes_bos=True,
        is_multi_turn=True,
    )


def _headed(name: str, before: str, after_role: str, end: str, after_end: str, bos: str = "") -> Template:
    """Every message alike: its role between `before` and `after_role`, its content, the end token."""
    return Template(
        name,
        begin=bos,
        before_system=f"{before}system{after_role}",
        after_system=end + after_end,
        before_user=f"{before}user{after_role}",
        after_user=end + after_end,
        header=f"{before}assistant{after_role}",
        end=end,
        after_end=after_end,
        controls=tuple(token for token in (bos, before, after_role.rstrip("\n"), end) if token),
        writes_bos=bool(bos),
        is_multi_turn=True,
        is_any_order=True,
    )


def _llama3(bos: str) -> Template:
    """https://www.llama.com/docs/model-cards-and-prompt-formats/meta-llama-3/ ."""
    table = _headed("llama3", "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>", "", bos)
    return replace(table, is_trimmed=True)


_WITH_BOS = {"llama2": (_llama2, "<s>"), "llama3": (_llama3, "<|begin_of_text|>")}
_PRESETS = {
    # question, new line, answer
    "plain": Template("plain", before_user="", header="\n"),
    # Taori et al. 2023, https://github.com/tatsu-lab/stanford_alpaca (an input follows its instruction after a blank line)
    "alpaca": Template("alpaca", before_user=_ALPACA, header="\n\n### Response:\n"),
    # several turns with plain-text headers, for tokenizers without chat tokens
    "chat": Template(
        "chat",
        before_user="### User:\n",
        header="\n\n### Assistant:\n",
        is_multi_turn=True,
        before_system="### System:\n",
        after_system="\n\n",
        between="\n\n",
    ),
    # https://github.com/openai/openai-python/blob/v0.27.0/chatml.md
    "chatml": _headed("chatml", "<|im_start|>", "\n", "<|im_end|>", "\n"),
    **{name: make(bos) for name, (make, bos) in _WITH_BOS.items()},
}
_OWN = "tokenizer"


def template_from(name: str, tokenizer: TokenizerTexts | None = None) -> Template | JinjaTemplate:
    """A preset, `tokenizer` (its own chat template), a `.jinja` file, or a literal text with one `{text}`.

    Without a tokenizer only the name is checked, or that the file can be read and parsed; what renders Jinja has one.
    Raises ConfigError for an unknown name, another field in braces, a file that is no template, a control token that
    the tokenizer lacks, and a template in which what is learned cannot be told from what is given.

    >>> template_from("Q: {text}\\nA:").header
    '\\nA:'
    """
    if name in _PRESETS:
        return _PRESETS[name] if tokenizer is None else _fitting(name, tokenizer)
    if name == _OWN:
        if tokenizer is not None and not tokenizer.chat_template:
            raise ConfigError(
                "prepare.template: 'tokenizer': the tokenizer has no chat template of its own; use template: chat, or a .jinja file"
            )
        return _jinja(name, tokenizer.chat_template or "" if tokenizer else "", tokenizer)
    if name.endswith(".jinja"):
        return _jinja(name, _source(Path(name)), tokenizer)
    return _literal(name)


def _fitting(name: str, tokenizer: TokenizerTexts) -> Template:
    """A preset with the tokenizer's own beginning token, all of whose control tokens the tokenizer has."""
    template = _PRESETS[name]
    if name in _WITH_BOS and tokenizer.bos_token:
        template = _WITH_BOS[name][0](tokenizer.bos_token)
    missing = [token for token in template.controls if token not in tokenizer.control_tokens]
    if missing:
        raise ConfigError(
            f"prepare.template: {name!r} needs {', '.join(map(repr, missing))} among the tokenizer's special tokens; "
            "use template: chat, or a tokenizer that has them"
        )
    return template


def _source(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"prepare.template: {str(path)!r}: cannot be read ({error}); name a Jinja file in UTF-8"
        ) from None


def _jinja(name: str, source: str, tokenizer: TokenizerTexts | None) -> JinjaTemplate:
    try:
        _compiled(source)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"prepare.template: {name!r}: line {error.lineno}: {error.message}; correct it, or use {', '.join(_PRESETS)}"
        ) from None
    if tokenizer is not None:  # the end token is one, whatever the list says
        named = {token for token in (tokenizer.bos_token, tokenizer.eos_token) if token}
        tokenizer = replace(tokenizer, control_tokens=tokenizer.control_tokens | named)
    return JinjaTemplate(name, source, tokenizer)


def _literal(text: str) -> Template:
    fields = re.findall(r"\{[\w.-]*\}", text)
    if fields != ["{text}"]:
        found = f"found {', '.join(fields)}" if fields else "found none"
        raise ConfigError(
            f"prepare.template: {text!r}: a literal template has {{text}} exactly once ({found}); correct it, or use "
            f"{', '.join(_PRESETS)}, {_OWN}, or a .jinja file"
        )
    before, after = text.split("{text}")
    if not after:
        raise ConfigError(
            f'prepare.template: {text!r}: nothing follows {{text}}, so no answer could begin; add for example "\\nAnswer:"'
        )
    return Template(text, before_user=before, header=after, lead="" if after[-1].isspace() else " ")
