"""Which conversations are worth training on, and on which side of the split they fall; each drop with its reason."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import replace

from sft_dist.data.records import Conversation, Drop


def curate(items: Iterable[Conversation | Drop], *, deduplicate: bool) -> Iterator[Conversation | Drop]:
    """Strip outer white space, drop what is empty, and exact repeats (of what came before in `items`).

    >>> from sft_dist.data.records import Turn
    >>> twice = [Conversation((Turn("user", "hi "), Turn("assistant", "yo", True)), w) for w in ("a:1", "a:2")]
    >>> [type(item).__name__ for item in curate(twice, deduplicate=True)]
    ['Conversation', 'Drop']
    """
    seen: dict[bytes, str] = {}
    for item in items:
        if isinstance(item, Drop):
            yield item
            continue
        turns = (replace(turn, content=turn.content.strip()) for turn in item.turns)
        made = replace(item, turns=tuple(turn for turn in turns if turn.content or turn.role != "system"))
        empty = next((turn for turn in made.turns if not turn.content), None)
        if empty is not None:
            reason = {"assistant": "empty_response", "text": "empty_text"}.get(empty.role, "empty_prompt")
            yield Drop(reason, made.where, f"the {empty.role} turn is empty")
            continue
        key = _digest(made.turns)
        if deduplicate and key in seen:
            yield Drop("duplicate", made.where, f"the same as {seen[key]}")
            continue
        seen.setdefault(key, made.where)
        yield made


def is_validation(conversation: Conversation, fraction: float, seed: int) -> bool:
    """Whether a record is held out: a function of its prompt and the seed alone.

    So records with one prompt stay on one side, and data added later moves nothing.

    >>> from sft_dist.data.records import Turn
    >>> is_validation(Conversation((Turn("text", "Once upon a time", True),), "a:1"), fraction=0.0, seed=0)
    False
    """
    return int.from_bytes(prompt_digest(conversation, str(seed))[:8], "big") < fraction * 2**64


def prompt_digest(conversation: Conversation, salt: str = "") -> bytes:
    """16 bytes that stand for the prompt (of plain text: the text)."""
    return _digest(conversation.prompt or conversation.turns, salt)


def _digest(turns: Iterable, salt: str = "") -> bytes:
    """A digest of who says what, blind to how much white space stands between words."""
    text = "\x1e".join(f"{turn.role}\x1f{' '.join(turn.content.split())}" for turn in turns)
    return hashlib.blake2b(f"{salt}\x1d{text}".encode(), digest_size=16).digest()
