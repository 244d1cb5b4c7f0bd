"""What a record is, once it has been read: the values every stage of `prepare` passes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation; `is_target` says that its text is to be learned.

    `extra` holds what a message has besides: `tool_calls` [{"type": "function", "function": {"name", "arguments": {…}}}],
    `name`, `tool_call_id`, `reasoning_content`; None for most.

    >>> Turn("assistant", "ham", is_target=True).content
    'ham'
    """

    role: str  # "system" | "user" | "assistant" | "tool" | "text"
    content: str
    is_target: bool = False
    extra: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """A record in its one common form; plain text is a single target turn of role "text".

    `where` is `file:line` (1-based) of the record, so that anything said about it can be looked up.
    `label` is the class name of a label task's record, None elsewhere.

    >>> spam = Conversation((Turn("user", "WIN!!"), Turn("assistant", "spam", True)), "sms.tsv:3", label="spam")
    >>> spam.prompt[0].content
    'WIN!!'
    """

    turns: tuple[Turn, ...]
    where: str
    label: str | None = None
    tools: list[dict[str, Any]] | None = None  # JSON schemas of the functions the assistant may call

    @property
    def prompt(self) -> tuple[Turn, ...]:
        """The turns before the last one: what a model is shown at inference (empty for plain text)."""
        return self.turns[:-1]


@dataclass(frozen=True, slots=True)
class Drop:
    """A record that is not trained on: why (a short fixed word), which, and the detail a person needs.

    >>> Drop("empty_response", "sms.tsv:3", "the response is empty").reason
    'empty_response'
    """

    reason: str
    where: str
    detail: str


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of rendered text; a control span is one token of the tokenizer, named by its text.

    >>> Span("<|endoftext|>", is_target=True, is_control=True).is_control
    True
    """

    text: str
    is_target: bool
    is_control: bool = False


@dataclass(frozen=True, slots=True)
class Document:
    """A tokenised record: `ids[i]` carries loss when `targets[i]`; the first token never does.

    `ids`: uint32 [tokens], `targets`: bool [tokens].

    >>> Document(np.array([5, 6, 7], np.uint32), np.array([False, False, True]), "sms.tsv:3").num_targets
    1
    """

    ids: np.ndarray
    targets: np.ndarray
    where: str

    @property
    def num_targets(self) -> int:
        """Tokens that carry loss."""
        return int(np.count_nonzero(self.targets))


def parted(where: str) -> tuple[str, int]:
    """The file of a record, with what stands before its number, and the number.

    >>> parted("sms.tsv:3"), parted("chats.parquet:#12")
    (('sms.tsv:', 3), ('chats.parquet:#', 12))
    """
    prefix, _, number = where.rpartition(":")
    return (f"{prefix}:#", int(number[1:])) if number.startswith("#") else (f"{prefix}:", int(number))
