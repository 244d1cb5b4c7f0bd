"""The answers of a model to a fixed set of prompts, decoded greedily and together."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.nn.utils.rnn import pad_sequence

from sft_dist.comms import Comms
from sft_dist.data.build import is_text_in, template_in
from sft_dist.data.records import Conversation, Turn
from sft_dist.data.template import Template
from sft_dist.data.tokenise import Tokenizer, prompt_ids
from sft_dist.data.work import template_for
from sft_dist.errors import DataError
from sft_dist.head import Forward
from sft_dist.schema import RunConfig


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question to be answered: its text, its token ids, and the expected answer; "" where none is known."""

    text: str
    ids: list[int]
    expected: str


def prompts(records: Iterable[Conversation], template: Template, tokenizer: Tokenizer, count: int) -> list[Prompt]:
    """The first `count` records as questions; of plain text the first 24 tokens are the question."""
    made = []
    for record in itertools.islice(records, count):
        if record.prompt:
            spans = template.render_prompt(record.prompt, tokenizer.eos_token, record.tools)
            ids = prompt_ids(spans, tokenizer, adds_bos=template.adds_bos)
            made.append(Prompt(record.prompt[-1].content, ids, record.turns[-1].content))
        else:
            ids = tokenizer.encode(record.turns[0].content)
            made.append(
                Prompt(tokenizer.decode(ids[:24]), [*tokenizer.bos_ids, *ids[:24]], tokenizer.decode(ids[24:64]))
            )
    return made


def own_prompts(texts: Sequence[str], template: Template, tokenizer: Tokenizer, *, is_text: bool) -> list[Prompt]:
    """Prompts of the run file as the model is asked them; `is_text`: it learned plain text, which is gone on with."""
    made = []
    for text in texts:
        ids = [*tokenizer.bos_ids, *tokenizer.encode(text)]
        if not is_text:
            spans = template.render_prompt((Turn("user", text),), tokenizer.eos_token)
            ids = prompt_ids(spans, tokenizer, adds_bos=template.adds_bos)
        made.append(Prompt(text, ids, ""))
    return made


Way = Literal["text", "alone", "turns"]


def way_of(config: RunConfig, tokenizer: Tokenizer) -> Way:
    """How a model that was trained so is asked: by `text` that it goes on with, by questions each `alone`, or in `turns`."""
    folder = Path(config.shards_dirs[0])
    has_shards = (folder / "prepare.json").is_file()
    if has_shards and is_text_in(folder):
        return "text"
    name = config.prepare.template if config.prepare else template_in(folder) if has_shards else "tokenizer"
    template = template_for("tokenizer" if name.endswith(".jinja") else name, tokenizer)
    if isinstance(template, Template):
        return "turns" if template.is_multi_turn else "alone"
    try:
        template.render_prompt((Turn("user", "1"), Turn("assistant", "2"), Turn("user", "3")), tokenizer.eos_token)
    except DataError:
        return "alone"
    return "turns"


@dataclass(frozen=True, slots=True)
class Sampling:
    """The prompts to be answered, and what decoding needs.

    `context`: the longest sequence, in tokens; `batch_tokens`: of one forward pass, as many as a micro-batch has, so that
    answering needs no more memory than training.
    """

    prompts: list[Prompt]
    decode: Callable[[list[int]], str]
    end_ids: list[int]
    context: int
    max_new_tokens: int
    batch_tokens: int

    def answers(self, forward: Forward, comms: Comms) -> list[Mapping[str, str]]:
        """The model's answers to the prompts, with the expected ones; every rank takes part."""
        longest = max((len(prompt.ids) for prompt in self.prompts), default=0) + self.max_new_tokens
        count = max(1, self.batch_tokens // min(longest, self.context)) if self.prompts else 1
        made: list[Mapping[str, str]] = []
        for at in range(0, len(self.prompts), count):
            together = self.prompts[at : at + count]
            found = answers(
                forward,
                [prompt.ids for prompt in together],
                comms,
                end_ids=self.end_ids,
                max_new_tokens=self.max_new_tokens,
                context=self.context,
            )
            made += [
                {"prompt": prompt.text, "answer": self.decode(ids), "expected": prompt.expected}
                for prompt, ids in zip(together, found, strict=True)
            ]
        return made


def answers(
    forward: Forward,
    asked: Sequence[Sequence[int]],
    comms: Comms,
    *,
    end_ids: Sequence[int],
    max_new_tokens: int,
    context: int,
) -> list[list[int]]:
    """The greedy continuations of several sequences of ids, each up to one of `end_ids`, its limit or the end of the context.

    They are one batch with the padding on the right, which nothing before it attends to; what is finished leaves it. All
    ranks decode together and take the main rank's word for each token, so that they also stop together.
    """
    rows = [list(ids) for ids in asked]
    limits = [min(len(ids) + max_new_tokens, context) for ids in asked]
    going = [number for number, row in enumerate(rows) if len(row) < limits[number]]
    while going:
        tokens = pad_sequence([torch.tensor(rows[number]) for number in going], batch_first=True)
        lasts = [at * tokens.shape[1] + len(rows[number]) - 1 for at, number in enumerate(going)]
        places = torch.tensor(lasts)
        scores = forward(tokens, torch.arange(tokens.shape[1]).repeat(len(going), 1), places, torch.zeros_like(places))
        chosen = comms.broadcast(scores.best.tolist())
        left = []
        for number, token in zip(going, chosen, strict=True):
            if token not in end_ids:
                rows[number].append(token)
                left += [number] * (len(rows[number]) < limits[number])
        going = left
    return [row[len(ids) :] for row, ids in zip(rows, asked, strict=True)]
