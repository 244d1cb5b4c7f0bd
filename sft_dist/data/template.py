"""How a conversation becomes text, and which of that text is learned: flags are born here and carried to the loss.

One table per template gives both the spans that training uses and the Jinja chat template that inference uses, so the
two cannot drift apart.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from sft_dist.data.records import Conversation, Drop, Span, Turn
from sft_dist.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Template:
    """What stands before and after the contents of each role.

    The answer begins with `lead` (a space where the header does not end in white space: it belongs to the first word) and
    ends with the tokenizer's end token; both are learned. `is_multi_turn` says whether more than one question is allowed.

    >>> template_from("Spam?\\n{text}\\nAnswer:").render_prompt((Turn("user", "WIN!!"),), eos="</s>")
    [Span(text='Spam?\\nWIN!!\\nAnswer:', is_target=False, is_control=False)]
    """

    name: str
    before_user: str
    header: str  # between the question and the answer: where inference begins
    is_multi_turn: bool = False
    before_system: str | None = None  # None: the template has no place for a system message
    after_system: str = ""
    between: str = ""  # after an answer's end token, when a question follows

    @property
    def lead(self) -> str:
        """What the answer's text begins with."""
        return "" if self.header[-1:].isspace() else " "

    def render(self, conversation: Conversation, eos: str) -> list[Span] | Drop:
        """Spans whose texts concatenate to the rendered conversation; `eos` is the tokenizer's end token.

        Plain text is one target span and the end token. A conversation without a place in the template is a Drop.
        """
        turns = conversation.turns
        if turns[0].role == "text":
            return [Span(turns[0].content, is_target=True), Span(eos, is_target=True, is_control=True)]
        misfit = self._misfit(turns)
        if misfit:
            return Drop("template_mismatch", conversation.where, f"template {self.name!r}: {misfit}")
        return _joined(self._spans(turns, eos))

    def render_prompt(self, turns: Sequence[Turn], eos: str) -> list[Span]:
        """What inference sees before the answer to the last of `turns`, which is a question."""
        return _joined(self._spans(turns, eos))

    def _spans(self, turns: Sequence[Turn], eos: str) -> Iterator[Span]:
        for place, turn in enumerate(turns):
            if turn.role == "assistant":
                yield Span(self.lead + turn.content, turn.is_target)
                yield Span(eos, turn.is_target, is_control=True)
            else:
                between = self.between if place and turns[place - 1].role == "assistant" else ""
                yield Span(between + self._context(turn), is_target=False)

    def _context(self, turn: Turn) -> str:
        if turn.role == "system":
            return f"{self.before_system}{turn.content}{self.after_system}"
        return f"{self.before_user}{turn.content}{self.header}"

    def _misfit(self, turns: Sequence[Turn]) -> str | None:
        roles = [turn.role for turn in turns]
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
        blocks = [
            "{{- bos_token -}}" if has_bos else "",
            "{%- for message in messages -%}",
            "{%- if message['role'] == 'user' -%}",
            "{%- if not loop.first and messages[loop.index0 - 1]['role'] == 'assistant' -%}",
            _say(self.between),
            "{%- endif -%}",
            _say(self.before_user),
            "{{- message['content'] -}}",
            "{%- if not loop.last or add_generation_prompt -%}",
            _say(self.header),
            "{%- endif -%}",
            "{%- elif message['role'] == 'assistant' -%}",
            _say(self.lead),
            "{{- message['content'] + eos_token -}}",
            "{%- else -%}",
            f"{_say(self.before_system)}{{{{- message['content'] -}}}}{_say(self.after_system)}"
            if self.before_system is not None
            else "{{- raise_exception('this model was trained without system messages') -}}",
            "{%- endif -%}",
            "{%- endfor -%}",
        ]
        return "".join(blocks)


def _say(text: str) -> str:
    """Literal text inside Jinja: quoted, so that braces in it mean nothing, and white space around it stays."""
    return f"{{{{- {json.dumps(text, ensure_ascii=False)} -}}}}" if text else ""


def _joined(spans: Iterable[Span]) -> list[Span]:
    """Neighbouring pieces of context as one: only where the loss begins or ends is there a boundary."""
    joined: list[Span] = []
    for span in spans:
        last = joined[-1] if joined else None
        if last and not (last.is_control or span.is_control) and last.is_target == span.is_target:
            joined[-1] = Span(last.text + span.text, span.is_target)
        else:
            joined.append(span)
    return joined


_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n"
)
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
}


def template_from(text: str) -> Template:
    """A preset by name, or a literal text with one `{text}` that the question is set into.

    Raises ConfigError for an unknown name, or another field in braces.

    >>> template_from("Q: {text}\\nA:").header
    '\\nA:'
    """
    if text in _PRESETS:
        return _PRESETS[text]
    fields = re.findall(r"\{[\w.-]*\}", text)
    if fields != ["{text}"]:
        found = f"found {', '.join(fields)}" if fields else "found none"
        raise ConfigError(
            f"prepare.template: {text!r}: a literal template has {{text}} exactly once ({found}); correct it, or use "
            f"{', '.join(_PRESETS)}"
        )
    before, after = text.split("{text}")
    if not after:
        raise ConfigError(
            f'prepare.template: {text!r}: nothing follows {{text}}, so no answer could begin; add for example "\\nAnswer:"'
        )
    return Template(text, before_user=before, header=after)
