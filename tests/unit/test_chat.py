"""Text that appears token by token: whole characters, nothing lost, nothing twice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from launch import chat
from launch.chat import Decoding, Detokeniser, Stream
from sft_dist.data.tokenise import Tokenizer
from sft_dist.errors import ConfigError
from tests.e2e.commands import ROOT
from tests.unit.prepared_runs import sft_dist

GPT2 = Tokenizer.load(str(ROOT / "examples" / "tokenizers" / "gpt2"))


@given(st.lists(st.integers(0, GPT2.vocab_size - 1), max_size=30))
def test_pieces_join_to_the_whole_whatever_the_ids(ids):
    made = Detokeniser(GPT2.decode)
    assert "".join(map(made.add, ids)) + made.rest() == GPT2.decode(ids)


@settings(max_examples=30)
@given(st.text(max_size=40))
def test_no_piece_holds_half_a_character(text):
    made = Detokeniser(GPT2.decode)
    pieces = [made.add(token) for token in GPT2.encode(text)]
    assert "".join(pieces) + made.rest() == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


def test_a_character_of_many_tokens_comes_when_it_is_whole():
    ids, said = GPT2.encode("é😀 \x1b[31m! "), []
    stream = Stream(GPT2.decode, said.append)
    stream.put(torch.tensor([[0, 1, 2]]))  # the prompt
    for token in ids:
        stream.put(torch.tensor([token]))
    stream.end()
    assert len(ids) > len(said)
    assert "".join(said) == "é😀 ␛[31m!", "no control characters, no white space at the end"
    assert said[0] == "é"


def test_white_space_before_an_answer_is_left_out():
    said = []
    stream = Stream(GPT2.decode, said.append)
    stream.put(torch.tensor([0]))
    for token in GPT2.encode("\n \n a\n\nb"):
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(said) == "a\n\nb"


def test_one_answer_shows_control_characters_as_signs(monkeypatch):
    monkeypatch.setattr(chat, "answer_prompt", lambda *_: "a\x1b[31m\nb")
    assert sft_dist("chat", "x", "--prompt", "hi").stdout == "a␛[31m\nb\n"


@pytest.mark.parametrize("more", [{"top_p": 0.9}, {"seed": 1}])
def test_drawing_without_a_temperature_is_told(more):
    with pytest.raises(
        ConfigError, match="--top-p and --seed are about drawing, and at temperature 0 nothing is drawn"
    ):
        Decoding(**more)
