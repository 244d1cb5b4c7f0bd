import itertools
import json
import shutil

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from sft_dist.config import SentencePieceTraining
from sft_dist.data.records import Document, Drop, Span
from sft_dist.data.tokenise import Tokenizer, from_sentencepiece, prompt_ids, split, tokenise, train_sentencepiece
from sft_dist.errors import DataError

TEXTS = [f"message {n} says hello to the {word} world, isn't it" for n in range(300) for word in ("big", "wide")]
TRAINING = SentencePieceTraining(vocab_size=400)


@pytest.fixture(scope="module")
def tokenizer():
    return train_sentencepiece(TEXTS, TRAINING)


@given(st.text())
@settings(deadline=None)
def test_a_trained_tokenizer_loses_no_character(tokenizer, text):
    text = text.replace("▁", "_")  # sentencepiece's own space: the one character it does not keep
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_is_repeatable_and_the_folder_is_one_for_auto_tokenizer(tokenizer, tmp_path):
    assert train_sentencepiece(TEXTS, TRAINING).fingerprint == tokenizer.fingerprint
    tokenizer.save(tmp_path, chat_template="{{ messages[0].content }}", model_max_length=64)
    again, auto = Tokenizer.load(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert (auto.eos_token, auto.pad_token, auto.model_max_length) == ("</s>", "<pad>", 64)
    assert auto.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"
    for text in [*TEXTS[:20], "tab\tand\n\nlines ", "naïve 😀"]:
        assert auto(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
        assert auto.decode(tokenizer.encode(text)) == text


def test_text_that_spells_a_control_token_stays_text(tokenizer):
    for text in ("</s>", "<pad>", "<unk>", "<0x41>"):
        ids = tokenizer.encode(text)
        assert len(ids) > 1
        assert tokenizer.decode(ids) == text
        assert not {tokenizer.eos_id, tokenizer.pad_id} & set(ids)


def test_flags_go_from_spans_to_tokens(tokenizer):
    spans = [Span("hello world", False), Span(" message", True), Span("</s>", True, is_control=True)]
    document = tokenise(spans, tokenizer, "f:1")
    learned = [token for token, is_target in zip(document.ids, document.targets, strict=True) if is_target]
    assert tokenizer.inner.decode(learned, skip_special_tokens=False) == " message</s>"
    assert document.ids == [*tokenizer.encode("hello world message"), tokenizer.eos_id]
    assert prompt_ids(spans[:1], tokenizer) == tokenizer.encode("hello world")


def test_the_prompt_of_a_second_turn_is_what_inference_sees(tokenizer):
    spans = [
        Span("hello", False), Span(" world", True), Span("</s>", True, is_control=True),
        Span("message", False), Span(" says", True), Span("</s>", True, is_control=True),
    ]  # fmt: skip
    ids = tokenise(spans, tokenizer, "f:1").ids
    prompt = prompt_ids(spans[:4], tokenizer)
    assert ids[: len(prompt)] == prompt
    assert prompt_ids(spans[2:4], tokenizer) == [tokenizer.eos_id, *tokenizer.encode("message")]


def test_a_token_across_a_boundary_is_a_drop(tokenizer):
    drop = tokenise([Span("mess", False), Span("age", True)], tokenizer, "f:9")
    assert isinstance(drop, Drop)
    assert (drop.reason, drop.where) == ("boundary_merge", "f:9")


def test_nothing_to_learn_is_a_drop(tokenizer):
    for spans in ([Span("hello", False)], [Span("</s>", True, is_control=True)], []):
        assert tokenise(spans, tokenizer, "f:1").reason == "no_targets"


@given(st.integers(1, 60), st.integers(2, 9))
def test_split_keeps_every_target_once(length, seq_len):
    document = Document(list(range(length)), [False] + [True] * (length - 1), "f:1")
    parts = split(document, seq_len)
    assert all(1 <= len(part.ids) <= seq_len and not part.targets[0] for part in parts)
    learned = [t for part in parts for t, is_target in zip(part.ids, part.targets, strict=True) if is_target]
    assert learned == list(range(1, length))
    assert all(b.ids[0] == a.ids[-1] for a, b in itertools.pairwise(parts))


def trained(tmp_path, **more):
    prefix = tmp_path / "sp"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(prefix),
        vocab_size=300,
        minloglevel=2,
        byte_fallback=True,
        **more,
    )
    return prefix.with_suffix(".model")


def test_a_given_llama_like_model_is_converted_exactly(tmp_path):
    path = trained(tmp_path, model_type="bpe", normalization_rule_name="identity", remove_extra_whitespaces=False)
    tokenizer, reference = Tokenizer.load(str(path)), sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in [*TEXTS, "two  spaces", "naïve 😀 </s>"]:
        assert tokenizer.encode(text) == reference.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_given_unigram_model_with_normalisation_is_converted(tmp_path):
    path = trained(tmp_path, model_type="unigram")
    tokenizer, reference = Tokenizer.load(str(path)), sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert tokenizer.encode("Ｈello  the ﬁ world") == reference.encode("Ｈello  the ﬁ world")


def test_a_model_that_converts_otherwise_is_refused(tmp_path):
    path = trained(tmp_path, model_type="word")
    with pytest.raises(DataError, match=r"differs from sentencepiece on .*, so it is refused"):
        Tokenizer.load(str(path))


def test_each_unusable_tokenizer_is_named_with_a_remedy(tokenizer, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"not a sentencepiece model .*; name another file"):
        from_sentencepiece(b"nonsense", [])
    with pytest.raises(DataError, match="no end token; train it with eos_id >= 0"):
        from_sentencepiece(trained(tmp_path, eos_id=-1).read_bytes(), [])
    with pytest.raises(DataError, match=r"vocab_size: 4000 cannot be reached: .*<= \d+\. Use another"):
        train_sentencepiece(TEXTS, SentencePieceTraining(vocab_size=4000))
    with pytest.raises(DataError, match=r"has no tokenizer\.json; save it with a fast tokenizer first"):
        Tokenizer.load(str(tmp_path))
    tokenizer.save(tmp_path / "t", chat_template=None, model_max_length=8)
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<nope>"}))
    with pytest.raises(DataError, match=r"no end token \(eos_token\) in tokenizer_config.json; add one"):
        Tokenizer.load(str(tmp_path / "t"))

    def unreachable(name, file):
        raise ConnectionError

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    with pytest.raises(DataError, match=r"nor to be had from the Hugging Face hub .*Check the name"):
        Tokenizer.load("no-such-owner/no-such-model")


def test_gpt2s_own_files_are_a_tokenizer(tmp_path):
    letters = [*"abcdefghijklmnopqrstuvwxyz", "Ġ", "ab"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: n for n, token in enumerate([*letters, "<|endoftext|>"])}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": len(letters)}))
    tokenizer = Tokenizer.load(str(tmp_path))
    assert tokenizer.encode("ab c") == [27, 26, 2]
    assert (tokenizer.eos_token, tokenizer.eos_id, tokenizer.vocab_size) == ("<|endoftext|>", 28, 29)
    assert tokenizer.eos_id not in tokenizer.encode("<|endoftext|>")


def test_tokens_may_be_named_as_objects(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t", chat_template=None, model_max_length=8)
    about = {"eos_token": {"content": "</s>"}, "bos_token": None}
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(about))
    assert Tokenizer.load(str(tmp_path / "t")).pad_token == "</s>"
    shutil.rmtree(tmp_path / "t")
