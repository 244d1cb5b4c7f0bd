"""What one conversation looks like when it has been mended, why it may be dropped by itself, and what stands for it.

What needs more than one record to decide (repeats, overlap with evaluation data, selection) is in `repeats` and `select`.
"""

from __future__ import annotations

import hashlib
import html
import itertools
import json
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from sft_dist.data.records import Conversation, Drop, Turn
from sft_dist.errors import ConfigError
from sft_dist.schema import CurateConfig

# What no text means: C0 without tab and line end, DEL; C1, and the byte order mark inside a text.
_C0 = bytes(code for code in range(32) if code not in (9, 10)) + b"\x7f"
_LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x85]")
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]")
_EMPTY = {"assistant": "empty_response", "text": "empty_text"}


_MISREAD_AS = (
    "latin-1", "cp1252", "cp1251", "cp1250", "cp1253", "cp1254", "cp1257", "iso8859-2", "mac-roman", "cp437",
)  # fmt: skip


def _mojibake_pairs() -> re.Pattern:
    """A necessary sign of mojibake: what a UTF-8 lead byte and a continuation byte look like in another encoding."""
    leads, rests = set(), set()
    for codec in _MISREAD_AS:
        leads |= set(bytes(range(0xC2, 0xF5)).decode(codec, "ignore"))
        rests |= set(bytes(range(0x80, 0xC0)).decode(codec, "ignore"))
    one, two = ("".join(map(re.escape, sorted(chars))) for chars in (leads, rests))
    return re.compile(f"[{one}][{two}]")


_MOJIBAKE = _mojibake_pairs()
_C1 = re.compile("[\x80-\x9f]")  # what cp1252's quotes and dashes look like when read as latin-1


def _without_controls(text: str) -> str:
    """Old line and page ends become line ends; other control characters go."""
    return _CONTROLS.sub("", _LINE_ENDS.sub("\n", text))


def _is_sound(values: Any) -> bool:
    """JSON can spell half a character, which is no text."""
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


class Curator:
    """Mends and judges conversations one at a time; `mended` counts what was changed, by the name of the rule.

    `end_of_text` is the end token's text, for `strip_end_of_text`.

    >>> curator = Curator(CurateConfig(html_entities=True))
    >>> turns = (Turn("user", " a &amp; b\\r\\n"), Turn("assistant", "yes", True))
    >>> curator(Conversation(turns, "a:1")).turns[0].content, dict(curator.mended)
    ('a & b', {'html_entities': 1, 'control_characters': 1, 'outer_white_space': 1})
    """

    def __init__(self, config: CurateConfig, end_of_text: str = "") -> None:
        self.config, self.end_of_text = config, end_of_text
        self.mended: Counter[str] = Counter()
        self.language = _language(config.languages)
        response = ("response", config.min_response_characters, config.max_response_characters or sys.maxsize)
        prompt = ("prompt", config.min_prompt_characters, config.max_prompt_characters or sys.maxsize)
        self._bounds = {"assistant": response, "text": response, "user": prompt}
        self._has_quality = bool(config.max_repetition or config.max_symbols)

    def __call__(self, conversation: Conversation) -> Conversation | Drop:
        """The mended conversation, or why it is dropped."""
        turns, is_same = [], True
        for turn in conversation.turns:
            text = self._mend(turn.content)
            if self.config.strip_end_of_text and turn.role == "assistant":
                text = self._without_end(text)
            if turn.extra and not _is_sound(turn.extra):
                return Drop(
                    "invalid_unicode", conversation.where, f"half a character in what the {turn.role} turn carries"
                )
            if not text and turn.role != "tool" and not (turn.extra and "tool_calls" in turn.extra):
                is_same = False
                if turn.role == "system":
                    continue  # an empty system message says nothing
                return Drop(_EMPTY.get(turn.role, "empty_prompt"), conversation.where, f"the {turn.role} turn is empty")
            if text is not turn.content:
                turn, is_same = Turn(turn.role, text, turn.is_target, turn.extra), False
            turns.append(turn)
        made = conversation if is_same else replace(conversation, turns=tuple(turns))
        fault = self._fault(made)
        return Drop(*fault[:1], made.where, fault[1]) if fault else made

    def _mend(self, text: str) -> str:
        config = self.config
        if config.html_entities and "&" in text:
            text = self._counted("html_entities", text, html.unescape(text))
        if text.isascii():
            if config.control_characters and len(text.encode().translate(None, _C0)) != len(text):
                text = self._counted("control_characters", text, _without_controls(text))
            return self._stripped(text)
        if config.mojibake and (_MOJIBAKE.search(text) or (config.control_characters and _C1.search(text))):
            import ftfy

            text = self._counted("mojibake", text, ftfy.fix_encoding(text))
        if config.control_characters:
            text = self._counted("control_characters", text, _without_controls(text))
        if config.normalise and not unicodedata.is_normalized(config.normalise, text):
            text = self._counted("unicode", text, unicodedata.normalize(config.normalise, text))
        return self._stripped(text)

    def _stripped(self, text: str) -> str:
        """Without white space around it; where that is kept, a text of nothing else is still an empty one."""
        stripped = text.strip()
        if not self.config.outer_white_space and stripped:
            return text
        return stripped if len(stripped) == len(text) else self._counted("outer_white_space", text, stripped)

    def _counted(self, rule: str, before: str, after: str) -> str:
        if after == before:
            return before
        self.mended[rule] += 1
        return after

    def _without_end(self, text: str) -> str:
        if not self.end_of_text or not text.endswith(self.end_of_text):
            return text
        return self._counted("end_of_text", text, text.removesuffix(self.end_of_text).rstrip())

    def _fault(self, made: Conversation) -> tuple[str, str] | None:
        """(reason, detail) of a conversation that breaks a rule."""
        for turn in made.turns:
            if turn.role not in self._bounds:
                continue
            kind, low, high = self._bounds[turn.role]
            count = len(turn.content)
            if count < low and turn.content:
                return f"short_{kind}", f"{count} characters, at least {low} are asked for"
            if count > high:
                return f"long_{kind}", f"{count} characters, at most {high} are asked for"
            if self._has_quality and kind == "response" and (fault := self._quality(turn.content)):
                return fault
        languages = self.config.languages or []
        if self.language and (spoken := self.language(made)) not in languages:
            return "language", f"is {spoken}, asked for {', '.join(languages)}"
        return None

    def _quality(self, text: str) -> tuple[str, str] | None:
        config = self.config
        if config.max_repetition and (share := repetition(text)) > config.max_repetition:
            return "repetition", f"{share:.0%} of its words repeat, at most {config.max_repetition:.0%} may"
        if config.max_symbols and (share := symbols(text)) > config.max_symbols:
            return "symbols", f"{share:.0%} of its characters are symbols, at most {config.max_symbols:.0%} may be"
        return None


def repetition(text: str, length: int = 5) -> float:
    """Share of the words that stand in a sequence of `length` words seen before in the text (Rae et al. 2021, "Gopher").

    >>> repetition("a b c d e " * 4), repetition("all of these words differ here")
    (0.75, 0.0)
    """
    words = text.split()
    seen, repeated = set(), [False] * len(words)
    for at in range(len(words) - length + 1):
        gram = tuple(words[at : at + length])
        if gram in seen:
            repeated[at : at + length] = [True] * length
        seen.add(gram)
    return sum(repeated) / len(words) if words else 0.0


def symbols(text: str) -> float:
    """Share of the characters that are neither letter, digit nor white space.

    >>> symbols("ab #!")
    0.4
    """
    return sum(not (c.isalnum() or c.isspace()) for c in text) / len(text) if text else 0.0


def _language(wanted: list[str] | None) -> Callable[[Conversation], str] | None:
    if not wanted:
        return None
    try:
        from py3langid import langid
    except ImportError:
        raise ConfigError(
            f"prepare.curate.languages: {wanted} needs py3langid; install it with pip install 'sft-dist[language]'"
        ) from None
    langid.classify("")  # loads the model
    unknown = sorted(set(wanted) - set(langid.IDENTIFIER.labels))
    if unknown:
        raise ConfigError(f"prepare.curate.languages: {unknown[0]!r} is not known; use ISO 639-1 codes such as en, de")
    return lambda made: langid.classify(" ".join(turn.content for turn in made.turns))[0]


def is_validation(conversation: Conversation, fraction: float, seed: int) -> bool:
    """Whether a record is held out: a function of its opening (what is asked first) and the seed alone.

    So records with one prompt stay on one side, and with them the conversations that go on from there; data added later
    moves nothing.

    >>> is_validation(Conversation((Turn("text", "Once upon a time", True),), "a:1"), fraction=0.0, seed=0)
    False
    """
    if fraction == 0.0:
        return False
    digest = _digest(str(seed), _said(_opening(conversation)))
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _opening(conversation: Conversation) -> Sequence[Turn]:
    """The turns before the first answer, system messages aside; of plain text the text."""
    asked = itertools.takewhile(lambda turn: turn.role != "assistant", conversation.turns)
    return [turn for turn in asked if turn.role != "system"] or conversation.turns


def digests(conversation: Conversation) -> tuple[bytes, bytes, bytes]:
    """16 bytes each that stand for everything said, for the prompt and for the opening.

    Blind to how much white space is between words; not to the tools, nor (everything) to which answers are learned.
    """
    said = _said(conversation.turns)
    tools = [json.dumps(conversation.tools, sort_keys=True)] if conversation.tools else []
    unlearned = [str(n) for n, turn in enumerate(conversation.turns) if turn.role == "assistant" and not turn.is_target]
    prompt = said[:-1] or said
    opening = prompt if len(said) == 2 else _said(_opening(conversation))
    return _digest("", said + tools + unlearned), _digest("", prompt + tools), _digest("", opening)


def _digest(salt: str, said: list[str]) -> bytes:
    return hashlib.blake2b("\x1d".join((salt, "\x1e".join(said))).encode(), digest_size=16).digest()


def _said(turns: Iterable[Turn]) -> list[str]:
    """Who says what."""
    return [f"{turn.role}\x1f{_one_spaced(turn.content)}{_besides(turn) if turn.extra else ''}" for turn in turns]


def _one_spaced(text: str) -> str:
    """`" ".join(text.split())`, which costs nothing where it changes nothing."""
    if text.isascii() and "  " not in text and "\n" not in text and "\t" not in text:
        return text.strip()
    return " ".join(text.split())


def _besides(turn: Turn) -> str:
    return f"\x1f{sorted((turn.extra or {}).items())!r}"


_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+")


def words(text: str) -> list[str]:
    """The words of a text as comparisons see them: no case, no punctuation, one Unicode form.

    A character of a script without spaces (Chinese, Japanese, Thai, …) counts as a word.

    >>> words("It's GREAT!")
    ['it', 's', 'great']
    """
    return _WORD.findall((text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold())
