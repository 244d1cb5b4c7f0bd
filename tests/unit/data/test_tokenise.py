import json
from pathlib import Path
from types import SimpleNamespace

import gigatoken
import numpy as np
import pytest
import sentencepiece
from huggingface_hub.errors import EntryNotFoundError
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as Fast
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from sft_dist.data.records import Document, Drop, Span
from sft_dist.data.tokenise import (
    Tokenizer,
    check_inference,
    fit,
    from_sentencepiece,
    prompt_ids,
    tokenise,
    train_sentencepiece,
)
from sft_dist.errors import DataError
from sft_dist.schema import SentencePieceTraining

TEXTS = [f"message {n} says hello to the {word} world, isn't it" for n in range(300) for word in ("big", "wide")]
TRAINING = SentencePieceTraining(vocab_size=400)
GPT2 = Path(__file__).parents[3] / "examples" / "tokenizers" / "gpt2"


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
    assert (document.ids.dtype, document.targets.dtype, document.where) == (np.uint32, bool, "f:1")
    assert document.ids.tolist() == [*tokenizer.encode("hello world message"), tokenizer.eos_id]
    assert prompt_ids(spans[:1], tokenizer) == tokenizer.encode("hello world")


def test_the_prompt_of_a_second_turn_is_what_inference_sees(tokenizer):
    spans = [
        Span("hello", False), Span(" world", True), Span("</s>", True, is_control=True),
        Span("message", False), Span(" says", True), Span("</s>", True, is_control=True),
    ]  # fmt: skip
    ids = tokenise(spans, tokenizer, "f:1").ids.tolist()
    prompt = prompt_ids(spans[:4], tokenizer)
    assert ids[: len(prompt)] == prompt
    assert prompt_ids(spans[2:4], tokenizer) == [tokenizer.eos_id, *tokenizer.encode("message")]


def test_a_token_across_a_boundary_is_a_drop(tokenizer):
    drop = tokenise([Span("mess", False), Span("age", True)], tokenizer, "f:9")
    assert isinstance(drop, Drop)
    assert (drop.reason, drop.where) == ("boundary_merge", "f:9")


def test_nothing_to_learn_is_a_drop(tokenizer):
    end = Span("</s>", True, is_control=True)
    for spans in ([Span("hello", False)], [end], [Span("", True), end], [Span("hello", False), Span("", True)], []):
        assert tokenise(spans, tokenizer, "f:1").reason == "no_targets"


@pytest.fixture(scope="module")
def with_bos(tokenizer):
    """A tokenizer that puts a token before every text, as Llama's does."""
    inner = Fast.from_str(tokenizer.inner.to_str())
    inner.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 2)])
    return Tokenizer(inner, "</s>", "</s>", bos_token="<pad>")


@pytest.mark.parametrize("first", [[], [Span("<pad>", False, is_control=True)]], ids=["plain", "in the template"])
def test_the_tokenizers_first_token_stands_before_a_document_once(with_bos, first):
    spans = [*first, Span("hello", False), Span(" world", True)]
    ids = tokenise(spans, with_bos, "f:1").ids.tolist()
    assert ids == [2, *with_bos.encode("hello world")] == prompt_ids(spans, with_bos)


@pytest.fixture(scope="module")
def both(tokenizer):
    """Of each kind: (as it is, accelerated)."""
    inner = Fast.from_str(tokenizer.inner.to_str())
    inner.normalizer, inner.pre_tokenizer = None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    plain = {"gpt2": Tokenizer.load(str(GPT2)), "sentencepiece": tokenizer, "llama": Tokenizer(inner, "</s>", "</s>")}
    made = {name: (each, each.accelerated(TEXTS[:5])) for name, each in plain.items()}
    assert all(said.startswith("gigatoken (equal to tokenizers on ") for _, (_, said) in made.values())
    return {name: (each, fast) for name, (each, (fast, _)) in made.items()}


CONTROLS = ["<|endoftext|>", "</s>", "<pad>", "<unk>", "<0x41>"]
ODD = [
    "\r\n",
    "\x00",
    " " * 40,
    "\n\n\t",
    "😀",
    "👩‍👩‍👧",
    "日本語",
    "العربية",
    "▁",
    "Ġ",
    "'s",
    "\u2028",
    "\x85",
    "ﬁ",
    "e\u0301",
    "1234567",
]
NASTY = st.lists(st.sampled_from(CONTROLS + ODD) | st.text(max_size=6), max_size=7).map("".join)


@pytest.mark.parametrize("kind", ["gpt2", "sentencepiece", "llama"])
@given(NASTY)
@example("".join(CONTROLS + ODD))
@settings(deadline=None, max_examples=150)
def test_gigatoken_makes_the_same_ids(both, kind, text):
    plain, fast = both[kind]
    for is_rest in (False, True):
        ids, slow = fast.ids(text, is_rest=is_rest), plain.ids(text, is_rest=is_rest)
        assert (ids.dtype, ids.tolist()) == (slow.dtype, slow.tolist()) == (np.uint32, slow.tolist())
        assert plain.eos_id not in ids
    assert fast.ids(text).tolist() == plain.encode(text)


SPANS = st.lists(st.builds(Span, st.sampled_from(["hello", " world", "é", "\n"]) | NASTY, st.booleans()), max_size=5)


@pytest.mark.parametrize("kind", ["gpt2", "sentencepiece", "llama"])
@given(st.lists(SPANS, min_size=1, max_size=3))
@settings(deadline=None, max_examples=60)
def test_what_is_learned_is_the_text_of_the_target_spans(both, kind, turns):
    plain, fast = both[kind]
    end = Span(plain.eos_token, True, is_control=True)
    spans = [end, *(span for turn in turns for span in [*turn, end])]
    document = tokenise(spans, fast, "f:1")
    again = tokenise(spans, plain, "f:1")
    if isinstance(document, Drop):
        assert document == again
        return
    assert (document.ids.tolist(), document.targets.tolist()) == (again.ids.tolist(), again.targets.tolist())
    learned = plain.inner.decode(document.ids[document.targets].tolist(), skip_special_tokens=False)
    wanted = "".join(span.text for span in spans[1:] if span.is_target)
    assert learned.replace("▁", " ") == wanted.replace("▁", " ")
    assert document.ids.tolist() == prompt_ids(spans, plain)


def broken(encode=None, error=None):
    """A gigatoken whose encoder is this, or that fails to load."""

    def from_json(text):
        if error is not None:
            raise error
        return SimpleNamespace(backend=SimpleNamespace(encode=encode))

    return SimpleNamespace(from_json=from_json)


class PanicError(BaseException):
    """What a panic in Rust looks like."""


def panics(text):
    raise PanicError


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (broken(lambda text: np.array([1], np.uint32)), r"gigatoken differs on 'Hello world'"),
        (broken(panics), r"gigatoken differs on 'Hello world'"),
        (broken(error=ValueError("unknown\nmodel")), r"does not know this tokenizer: unknown"),
        (broken(error=PanicError()), r"does not know this tokenizer: PanicError"),
    ],
)
def test_where_gigatoken_differs_or_fails_tokenizers_does_the_work(tokenizer, monkeypatch, made, said):
    monkeypatch.setattr(gigatoken, "Tokenizer", made)
    same, told = tokenizer.accelerated(TEXTS[:3])
    assert same is tokenizer
    assert said in told


def test_a_difference_on_one_sample_of_the_data_is_enough(tokenizer, monkeypatch):
    def encode(text):
        return np.array(tokenizer.encode(text)[text == TEXTS[2] :], np.uint32)

    monkeypatch.setattr(gigatoken, "Tokenizer", broken(encode))
    assert tokenizer.accelerated(TEXTS[:2])[1].startswith("gigatoken (equal")
    assert 'differs on "message 1 says' in tokenizer.accelerated(TEXTS[:3])[1]


def test_ctrl_c_while_gigatoken_loads_is_ctrl_c(tokenizer, monkeypatch):
    monkeypatch.setattr(gigatoken, "Tokenizer", broken(error=KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        tokenizer.accelerated([])


def document_of(flags):
    return Document(np.arange(len(flags), dtype=np.uint32), np.array(flags), "f:1")


RUNS = st.lists(st.tuples(st.integers(1, 25), st.integers(1, 25)), min_size=1, max_size=6)
DOCUMENTS = st.builds(
    lambda runs, tail: document_of([flag for n, m in runs for flag in [False] * n + [True] * m] + [False] * tail),
    RUNS,
    st.integers(0, 9),
)


@given(DOCUMENTS, st.integers(2, 20), st.integers(1, 20))
@settings(max_examples=300)
def test_split_learns_every_target_once_after_what_stood_before_it(document, seq_len, context):
    parts = fit(document, seq_len, "split", context=context)
    learned = [number for part in parts for number in part.ids[part.targets].tolist()]
    assert learned == document.ids[document.targets].tolist()
    for part in parts:
        assert 2 <= len(part.ids) <= max(seq_len, 2)
        assert part.targets.any()
        assert not part.targets[0]
        assert (np.diff(part.ids.astype(int)) == 1).all()  # so each target follows what it followed in the whole
        at = int(np.argmax(part.targets))
        if document.targets[int(part.ids[at]) - 1]:  # an answer that was cut goes on
            assert at >= min(context, seq_len // 2)


@given(DOCUMENTS, st.integers(2, 60))
def test_leaving_out_turns_ends_at_the_last_turn_that_fits(document, seq_len):
    made = fit(document, seq_len, "truncate_turns", context=1)
    flags = [*document.targets.tolist(), False]
    ends = [at for at in range(1, len(flags)) if flags[at - 1] and not flags[at] and at <= seq_len]
    if len(document.ids) <= seq_len:
        assert made == [document]
    elif not ends:
        assert made == Drop("too_long", "f:1", f"{len(document.ids)} tokens, a row has {seq_len}")
    else:
        (part,) = made
        assert part.ids.tolist() == list(range(ends[-1]))
        assert part.targets.tolist() == flags[: ends[-1]]


@pytest.mark.parametrize("how", ["drop", "error"])
def test_too_long_is_a_drop_that_tells_by_how_much(how):
    document = document_of([False, True, True])
    assert fit(document, 3, how, context=1) == [document]
    assert fit(document, 2, how, context=1) == Drop("too_long", "f:1", "3 tokens, a row has 2")


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


def test_few_texts_give_fewer_pieces_and_the_same_ones():
    largest = train_sentencepiece(TEXTS, SentencePieceTraining(vocab_size=4000))
    assert TRAINING.vocab_size < largest.vocab_size < 4000
    full = train_sentencepiece(TEXTS, SentencePieceTraining(vocab_size=largest.vocab_size))
    assert full.fingerprint == largest.fingerprint


def test_each_unusable_tokenizer_is_named_with_a_remedy(tokenizer, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"not a sentencepiece model .*; name another file"):
        from_sentencepiece(b"nonsense", [])
    with pytest.raises(DataError, match="no end token; train it with eos_id >= 0"):
        from_sentencepiece(trained(tmp_path, eos_id=-1).read_bytes(), [])
    with pytest.raises(DataError, match=r"vocab_size: 300 cannot be reached: .*smaller than.*Use another"):
        train_sentencepiece(["".join(map(chr, range(0x4E00, 0x5000)))], SentencePieceTraining(vocab_size=300))
    with pytest.raises(DataError, match=r"has no tokenizer\.json; save it with a fast tokenizer first"):
        Tokenizer.load(str(tmp_path))
    tokenizer.save(tmp_path / "t", chat_template=None, model_max_length=8)
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<nope>"}))
    with pytest.raises(DataError, match=r"no end token \(eos_token\) in tokenizer_config.json; add one"):
        Tokenizer.load(str(tmp_path / "t"))

    def unreachable(name, file):
        raise ConnectionError

    def nothing(name, file):
        raise EntryNotFoundError(file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", nothing)
    with pytest.raises(DataError, match=r"has no tokenizer\.json; save it with a fast tokenizer first"):
        Tokenizer.load("no-such-owner/no-such-model")
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


@pytest.mark.parametrize(
    ("own", "file", "wanted"),
    [
        ("own", "beside", "own"),
        ([{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}], "beside", "d"),
        (None, "beside", "beside"),
        (None, None, None),
    ],
)
def test_tokens_may_be_named_as_objects_and_the_template_lie_beside(tokenizer, tmp_path, own, file, wanted):
    tokenizer.save(tmp_path, chat_template=None, model_max_length=8)
    about = {"eos_token": {"content": "</s>"}, "bos_token": None, "chat_template": own}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    if file:
        (tmp_path / "chat_template.jinja").write_text(file)
    loaded = Tokenizer.load(str(tmp_path))
    assert (loaded.pad_token, loaded.bos_ids, loaded.chat_template) == ("</s>", [], wanted)
    assert {"</s>", "<pad>"} <= loaded.control_tokens


@pytest.fixture(scope="module")
def marking():
    """A tokenizer that marks the beginning of a whole text with `▁`, and not what follows a control token; as Llama 2's."""
    pieces = ["<unk>", "</s>", "<mask>", "▁", *"abc", "▁a", "ab"]
    inner = Fast(models.BPE({piece: n for n, piece in enumerate(pieces)}, [("▁", "a"), ("a", "b")], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.add_special_tokens(
        [AddedToken("</s>", normalized=False), AddedToken("<mask>", lstrip=True, rstrip=True, normalized=False)]
    )
    return Tokenizer(inner, "</s>", "</s>", eot_token="<mask>")


def test_text_after_a_control_token_is_no_beginning(marking):
    end = Span("</s>", False, is_control=True)
    spans = [Span("a", False), end, Span("a", True), Span("b c", True), end]
    ids = tokenise([spans[0], end, Span("ab c", True), end], marking, "f:1").ids.tolist()
    assert ids == marking.whole_ids("a</s>ab c</s>") == [7, 1, 8, 3, 6, 1]
    assert tokenise(spans, marking, "f:1").reason == "boundary_merge"
    check_inference(spans, marking)
    assert marking.end_ids == [1, 2]


def test_a_control_token_swallows_the_white_space_beside_it(marking):
    mask = Span("<mask>", False, is_control=True)
    spans = [Span("a ", False), mask, Span(" ", False), Span("b \n", True), mask, mask]
    assert (
        tokenise(spans[:2] + spans[3:], marking, "f:1").ids.tolist()
        == [7, 2, 5, 2, 2]
        == marking.whole_ids("a <mask>b \n<mask><mask>")
    )
    check_inference(spans[:2] + spans[3:], marking)


def test_what_inference_would_tokenise_otherwise_is_refused(marking, monkeypatch):
    spans = [Span("a", False), Span("</s>", True, is_control=True)]
    monkeypatch.setattr(Tokenizer, "whole_ids", lambda self, text: [7, 3])
    with pytest.raises(
        DataError, match=r"makes other ids of a rendered text than of its pieces \(token 1 of 'a</s>'\): what"
    ):
        check_inference(spans, marking)
    check_inference([Span("</s>", False)], marking)  # spelled out: text in training, so nothing to compare
