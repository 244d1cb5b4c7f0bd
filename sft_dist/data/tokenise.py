"""Text as token ids, with a flag for each token that carries loss; and where tokenizers come from.

The reference is `tokenizers.Tokenizer`: what is trained or given as sentencepiece is converted once and checked against
sentencepiece itself, so that what is exported is what was trained with. Where gigatoken makes the same ids, it does the work.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sft_dist.data.records import Document, Drop, Span
from sft_dist.errors import DataError
from sft_dist.schema import SentencePieceTraining

if TYPE_CHECKING:
    import tokenizers

_REPLACEMENT = "▁"  # sentencepiece's visible space


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer with the tokens that a trainer needs by name; text that spells one of them stays text.

    `bos_ids` is what the tokenizer itself puts before every text ([] for GPT-2, [1] for Llama).
    """

    inner: tokenizers.Tokenizer
    eos_token: str
    pad_token: str
    bos_token: str | None = None
    unk_token: str | None = None
    chat_template: str | None = None
    eot_token: str | None = None  # where the template ends an answer, when that is another token than eos
    fast: Callable[[str], np.ndarray] | None = None  # text -> the same ids, many times faster; see `accelerated`
    fast_rest: Callable[[str], np.ndarray] | None = None  # the same for text that follows a control token

    def __post_init__(self) -> None:
        self.inner.encode_special_tokens = True  # "</s>" in somebody's message is four characters, not an end

    @cached_property
    def eos_id(self) -> int:
        """Id of the token that ends a document."""
        return self._id(self.eos_token)

    @cached_property
    def pad_id(self) -> int:
        """Id of the filler at the end of rows."""
        return self._id(self.pad_token)

    def _id(self, token: str) -> int:
        found = self.inner.token_to_id(token)
        assert found is not None, token  # `load` looked
        return found

    @cached_property
    def bos_ids(self) -> list[int]:
        """What stands before every document."""
        return self.inner.encode("", add_special_tokens=True).ids if self.bos_token else []

    @cached_property
    def vocab_size(self) -> int:
        """Ids that exist, added tokens included: the highest id and one."""
        return max(self.inner.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def fingerprint(self) -> str:
        """A digest of what decides the ids: 32 hexadecimal digits."""
        return hashlib.blake2b(
            "\n".join((self._json, self.eos_token, self.pad_token)).encode(), digest_size=16
        ).hexdigest()

    @cached_property
    def _json(self) -> str:
        """What `tokenizer.json` holds."""
        return self.inner.to_str()

    @cached_property
    def _control_ids(self) -> dict[str, np.ndarray]:
        return {}

    @cached_property
    def control_tokens(self) -> frozenset[str]:
        """The texts of the tokens that no text spells."""
        return frozenset(token.content for token in self.inner.get_added_tokens_decoder().values() if token.special)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with nothing put around it."""
        return self.inner.encode(text, add_special_tokens=False).ids

    @cached_property
    def end_ids(self) -> list[int]:
        """Ids of the tokens after which an answer is over."""
        return [self.eos_id, *([self._id(self.eot_token)] if self.eot_token else [])]

    @cached_property
    def _rest(self) -> tokenizers.Tokenizer | None:
        """For text that follows a control token, where the tokenizer marks only the beginning of a whole text with `▁`."""
        if '"prepend_scheme":"first"' not in self._json:
            return None
        about = json.loads(self._json)
        steps = about["pre_tokenizer"] or {}
        marks = [step for step in steps.get("pretokenizers", [steps]) if step.get("prepend_scheme") == "first"]
        if not marks:
            return None
        for step in marks:
            step["prepend_scheme"] = "never"
        made = type(self.inner).from_str(json.dumps(about))
        made.encode_special_tokens = True
        return made

    @cached_property
    def _trimming(self) -> dict[str, tuple[bool, bool]]:
        """Control tokens that swallow white space (before, after) them."""
        added = self.inner.get_added_tokens_decoder().values()
        return {token.content: (token.lstrip, token.rstrip) for token in added if token.lstrip or token.rstrip}

    def ids(self, text: str, *, is_rest: bool = False) -> np.ndarray:
        """The same as uint32 [tokens], the fast way where there is one; `is_rest`: the text follows a control token."""
        if is_rest and self._rest is not None:
            if self.fast_rest is not None:
                return self.fast_rest(text)
            return np.array(self._rest.encode(text, add_special_tokens=False).ids, np.uint32)
        return np.array(self.encode(text), np.uint32) if self.fast is None else self.fast(text)

    def trimmed(self, spans: list[Span]) -> list[Span]:
        """The spans without the white space that control tokens swallow."""
        if not self._trimming:
            return spans
        spans = list(spans)
        for place, span in enumerate(spans):
            before, after = self._trimming.get(span.text, (False, False)) if span.is_control else (False, False)
            if before and place and not spans[place - 1].is_control:
                spans[place - 1] = replace(spans[place - 1], text=spans[place - 1].text.rstrip())
            if after and place + 1 < len(spans) and not spans[place + 1].is_control:
                spans[place + 1] = replace(spans[place + 1], text=spans[place + 1].text.lstrip())
        return [span for span in spans if span.text]

    def whole_ids(self, text: str) -> list[int]:
        """Ids of a rendered text as inference makes them: what spells a control token is one."""
        self.inner.encode_special_tokens = False
        try:
            return self.inner.encode(text, add_special_tokens=False).ids
        finally:
            self.inner.encode_special_tokens = True

    def control_ids(self, token: str) -> np.ndarray:
        """The one id of a control token, uint32 [1]."""
        return self._control_ids.setdefault(token, np.array([self.inner.token_to_id(token)], np.uint32))

    def accelerated(self, samples: Iterable[str]) -> tuple[Tokenizer, str]:
        """This tokenizer with gigatoken behind it where that gives the same ids on `samples`, and what was found."""
        added = [token.content for token in self.inner.get_added_tokens_decoder().values()]
        texts = (*_SAMPLES, *(f"a {token} b{token}c" for token in added), *samples)
        made = []
        for slow in (self.inner, self._rest):
            if slow is None:
                continue
            fast: Any
            fast, reason = _gigatoken(self._json if slow is self.inner else slow.to_str())
            if fast is None:
                return self, f"tokenizers (gigatoken does not know this tokenizer: {reason})"
            for text in texts:
                found, _ = _attempt(partial(lambda fast, text: fast(text).tolist(), fast, text))
                if found != slow.encode(text, add_special_tokens=False).ids:
                    return self, f"tokenizers (gigatoken differs on {text[:60]!r})"
            made.append(fast)
        return replace(
            self, fast=made[0], fast_rest=made[-1]
        ), f"gigatoken (equal to tokenizers on {len(texts):,} texts)"

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, control tokens left out."""
        return self.inner.decode(list(ids), skip_special_tokens=True)

    def save(self, folder: Path, *, chat_template: str | None, model_max_length: int) -> None:
        """Write what transformers' `AutoTokenizer.from_pretrained(folder)` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        self.inner.save(str(folder / "tokenizer.json"))
        names = {"eos_token": self.eos_token, "pad_token": self.pad_token}
        names |= {"bos_token": self.bos_token} if self.bos_token else {}
        names |= {"unk_token": self.unk_token} if self.unk_token else {}
        names |= {"eot_token": self.eot_token} if self.eot_token else {}
        about = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": model_max_length,
            "clean_up_tokenization_spaces": False,
            **names,
            **({"chat_template": chat_template} if chat_template else {}),
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2, ensure_ascii=False))

    @classmethod
    def load(cls, name: str) -> Tokenizer:
        """A Hugging Face folder or id, or a sentencepiece `.model` file.

        Raises DataError when nothing is there, or there is no end token.
        """
        path = Path(name)
        if path.suffix == ".model" and path.is_file():
            return from_sentencepiece(path.read_bytes(), samples=_SAMPLES)
        inner = _fast(path, name)
        about = _json_file(path, name, "tokenizer_config.json")
        named = {
            key: _content(about.get(key)) for key in ("eos_token", "pad_token", "bos_token", "unk_token", "eot_token")
        }
        if named["eos_token"] is None:  # GPT-2 on the hub names it only in the model's configuration, by its id
            eos_id = _json_file(path, name, "config.json").get("eos_token_id")
            named["eos_token"] = inner.id_to_token(eos_id) if isinstance(eos_id, int) else None
        eos = named["eos_token"]
        if eos is None or inner.token_to_id(eos) is None:
            raise DataError(f"prepare.tokenizer: {name}: no end token (eos_token) in tokenizer_config.json; add one")
        inner.no_padding()
        inner.no_truncation()
        known = {key: token for key, token in named.items() if token and inner.token_to_id(token) is not None}
        pad, bos, unk = known.get("pad_token", eos), known.get("bos_token"), known.get("unk_token")
        return cls(inner, eos, pad, bos, unk, _chat_template(path, name, about), known.get("eot_token"))


def _content(token: Any) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _chat_template(path: Path, name: str, about: dict[str, Any]) -> str | None:
    """The tokenizer's own: in its configuration (of several the one called "default"), or a file beside it."""
    own = about.get("chat_template")
    if isinstance(own, list):
        own = {entry["name"]: entry["template"] for entry in own}.get("default")
    if own is None and path.is_dir():
        file = _file(path, name, "chat_template.jinja")
        own = file.read_text() if file else None
    return own


def _gigatoken(tokenizer_json: str) -> tuple[Callable[[str], np.ndarray] | None, str]:
    """gigatoken's encoder of this tokenizer, or None and why; control tokens are taken out, so that no text spells one."""
    import gigatoken

    begin = tokenizer_json.index('"added_tokens":') + len(
        '"added_tokens":'
    )  # the rest, megabytes of it, stays as it is
    added, end = json.JSONDecoder().raw_decode(tokenizer_json, begin)
    kept = json.dumps([token for token in added if not token["special"]])
    without_specials = tokenizer_json[:begin] + kept + tokenizer_json[end:]
    return _attempt(lambda: gigatoken.Tokenizer.from_json(without_specials).backend.encode)


def _attempt(call: Callable[[], Any]) -> tuple[Any, str]:
    """What a call into gigatoken gives, or None and why it failed."""
    try:
        return call(), ""
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in its Rust is not an Exception
        return None, (str(error).splitlines() or [type(error).__name__])[0]


def _fast(path: Path, name: str) -> tokenizers.Tokenizer:
    """`tokenizer.json`, or GPT-2's pair of vocab.json and merges.txt."""
    from tokenizers import AddedToken, ByteLevelBPETokenizer
    from tokenizers import Tokenizer as Fast

    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file() and not (path / "tokenizer.json").is_file():
        pair = ByteLevelBPETokenizer(str(path / "vocab.json"), str(path / "merges.txt"))
        fast = pair._tokenizer
        ends = [token for token in ("<|endoftext|>", "</s>") if fast.token_to_id(token) is not None]
        fast.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in ends])
        return fast
    file = _file(path, name, "tokenizer.json")
    if file is None:
        raise DataError(f"prepare.tokenizer: {name}: has no tokenizer.json; save it with a fast tokenizer first")
    return Fast.from_file(str(file))


def _json_file(path: Path, name: str, file: str) -> dict[str, Any]:
    found = _file(path, name, file)
    return json.loads(found.read_text()) if found else {}


def _file(path: Path, name: str, file: str) -> Path | None:
    """A file of a local folder, or of a repository on the Hugging Face hub; None when that has no such file."""
    if path.is_dir():
        return path / file if (path / file).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, file))
    except Exception as error:  # the hub's client raises many kinds; each but one means: not to be had
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        raise DataError(
            f"prepare.tokenizer: {name!r}: neither a folder, nor a .model file, nor to be had from the Hugging Face hub "
            f"({type(error).__name__}). Check the name; without a network use a local folder"
        ) from error


def tokenise(spans: Iterable[Span], tokenizer: Tokenizer, where: str, *, adds_bos: bool = True) -> Document | Drop:
    """Ids and target flags of rendered spans; the first token of a document is never a target.

    The ids are those inference will see: between control tokens the text is tokenised as a whole, and up to each span
    boundary it must give the same ids alone. Where a token would reach across a boundary the record is a Drop.
    `adds_bos`: the tokenizer's own bos goes before, unless the first span is that token.
    """
    spans = tokenizer.trimmed(list(spans))
    bos = _bos(spans, tokenizer, adds_bos)
    pieces, runs, length = [np.array(bos, np.uint32)], [], len(bos)
    text, placed, is_rest = "", b"", False  # since the last control token: the text, and the bytes of its ids
    for span in spans:
        before = length
        if span.is_control:
            pieces.append(tokenizer.control_ids(span.text))
            length += 1
            text, placed, is_rest = "", b"", True
        else:
            text += span.text
            whole = tokenizer.ids(text, is_rest=is_rest)
            now = whole.tobytes()
            if placed and not now.startswith(placed):
                return Drop("boundary_merge", where, f"a token reaches across the boundary before {span.text[:20]!r}")
            pieces.append(whole[len(placed) // 4 :] if placed else whole)
            length += len(pieces[-1])
            placed = now
        if span.is_target and length > before:
            runs.append((before, length))
    ids, targets = np.concatenate(pieces, dtype=np.uint32), np.zeros(length, bool)
    for begin, end in runs:
        targets[begin:end] = True
    targets[:1] = False
    if not runs or runs[-1][1] == 1:
        return Drop("no_targets", where, "no token is to be learned")
    return Document(ids, targets, where)


def _bos(spans: Sequence[Span], tokenizer: Tokenizer, adds_bos: bool) -> list[int]:
    begins_with_it = bool(spans) and spans[0].is_control and spans[0].text == tokenizer.bos_token
    return list(tokenizer.bos_ids) if adds_bos and not begins_with_it else []


def prompt_ids(spans: Iterable[Span], tokenizer: Tokenizer, *, adds_bos: bool = True) -> list[int]:
    """Ids of a rendered prompt, as inference sees them."""
    spans = tokenizer.trimmed(list(spans))
    ids, text, is_rest = _bos(spans, tokenizer, adds_bos), "", False
    for span in [*spans, None]:
        if span is not None and not span.is_control:
            text += span.text
            continue
        ids += tokenizer.ids(text, is_rest=is_rest).tolist() if text else []
        ids += [] if span is None else tokenizer.control_ids(span.text).tolist()
        text, is_rest = "", True
    return ids


def check_inference(spans: Sequence[Span], tokenizer: Tokenizer) -> None:
    """Compare the ids of these spans with those of their text as a whole, which is what inference will be given.

    Raises DataError when they differ; texts that spell a control token are passed over (there they differ on purpose).
    """
    if any(token in span.text for span in spans if not span.is_control for token in tokenizer.control_tokens):
        return
    text = "".join(span.text for span in spans)
    ours, theirs = prompt_ids(spans, tokenizer, adds_bos=False), tokenizer.whole_ids(text)
    if ours != theirs:
        at = next(
            (n for n, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]),
            min(len(ours), len(theirs)),
        )
        raise DataError(
            f"prepare.tokenizer: makes other ids of a rendered text than of its pieces (token {at} of {text[:80]!r}): what is "
            "trained would not be what inference sees; use another template or tokenizer, and report this one"
        )


def fit(
    document: Document, seq_len: int, how: Literal["split", "truncate_turns", "drop", "error"], *, context: int
) -> list[Document] | Drop:
    """A document of any length as documents of at most `seq_len` tokens.

    `split` loses no target: each is learned once, after what stood before it (earlier turns as far as there is room;
    `context` tokens where one answer is cut; the end of a question that leaves no room for its answer). `truncate_turns` leaves out the last turns. `drop` and
    `error` give a Drop; so does a first answer that does not fit, when turns are left out.

    >>> long = Document(np.arange(1, 6, dtype=np.uint32), np.array([False, True, True, True, True]), "a:1")
    >>> [part.ids.tolist() for part in fit(long, 3, "split", context=1)]
    [[1, 2, 3], [3, 4, 5]]
    """
    if len(document.ids) <= seq_len:
        return [document]
    if how == "split":
        return _split(document, seq_len, context)
    edges = _run_ends(document.targets)
    fitting = edges[edges <= seq_len]
    if how == "truncate_turns" and len(fitting):
        end = int(fitting[-1])
        return [Document(document.ids[:end], document.targets[:end], document.where)]
    return Drop("too_long", document.where, f"{len(document.ids)} tokens, a row has {seq_len}")


def _run_ends(targets: np.ndarray) -> np.ndarray:
    """Where each run of targets ends (exclusive)."""
    return np.flatnonzero(targets & ~np.append(targets[1:], False)) + 1


def _split(document: Document, seq_len: int, context: int) -> list[Document]:
    ids, targets = document.ids, document.targets
    ends = _run_ends(targets)
    parts: list[Document] = []
    done, natural, is_turn = (
        0,
        0,
        False,
    )  # targets before `done` are placed; `natural`: where this turn's context begins
    while done < len(ids) and targets[first := done + int(targets[done:].argmax())]:
        run_end = int(ends[np.searchsorted(ends, first, side="right")])
        begin = max(natural, first + min(run_end - first, seq_len // 2) - seq_len)
        whole = ends[(ends > first) & (ends <= begin + seq_len)]
        end = int(whole[-1]) if len(whole) else min(begin + seq_len, len(ids))
        if is_turn and context > 1:  # what room is left holds earlier turns, which this one may be about
            begin = min(begin, max(0, end - seq_len))
        flags = targets[begin:end].copy()
        flags[: first - begin] = False
        parts.append(Document(ids[begin:end], flags, document.where))
        done, is_turn = end, end in ends
        natural = end if is_turn else end - context
    return parts


def train_sentencepiece(texts: Iterable[str], config: SentencePieceTraining) -> Tokenizer:
    """A sentencepiece tokenizer trained on `texts`, the same for the same texts; it loses no character.

    It has fewer pieces than `config` asks for where the texts give no more. Raises DataError when they have more characters than
    the vocabulary has room for, naming the size that works.
    """
    import sentencepiece

    texts = list(texts)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(line for text in texts for line in text.split("\n") if line),
            model_writer=model,
            model_type="bpe",
            vocab_size=config.vocab_size,
            hard_vocab_limit=False,
            byte_fallback=config.byte_fallback,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            user_defined_symbols=["\n", "\t"],
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=2,
            num_threads=1,
            minloglevel=2,
            max_sentence_length=1 << 20,
        )
    except RuntimeError as error:
        raise DataError(
            f"prepare.tokenizer.sentencepiece.vocab_size: {config.vocab_size} cannot be reached: "
            f"{str(error).rsplit(']', 1)[-1].strip()} Use another vocab_size"
        ) from None
    return from_sentencepiece(model.getvalue(), samples=[*_SAMPLES, *texts[:200]])


# What conversions and fast forms get wrong: runs of spaces, line ends, accents, emoji, control tokens spelled out, other scripts.
_SAMPLES = (
    "Hello world",
    " two  spaces   three ",
    "line one\nline two\n\n\ttabbed",
    "naïve café — “quotes” … ½ ﬁ",
    "emoji 😀👩‍👩‍👧 and 日本語, العربية",
    "</s> <pad> <unk> <0x41>",
    "don't WIN £1,000 now!!! http://a.b/c?d=e",
)


def from_sentencepiece(model: bytes, samples: Iterable[str]) -> Tokenizer:
    """A sentencepiece model as a fast tokenizer, with its normalisation, checked against sentencepiece on `samples`.

    Raises DataError when it is not a sentencepiece model, has no end token, or a sample gives other ids.
    """
    import sentencepiece
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(model)
        reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    except (DecodeError, RuntimeError) as error:
        raise DataError(f"prepare.tokenizer: not a sentencepiece model ({error}); name another file") from None
    if reference.eos_id() < 0:
        raise DataError("prepare.tokenizer: the sentencepiece model has no end token; train it with eos_id >= 0")
    made = Tokenizer(
        _converted(proto),
        eos_token=reference.id_to_piece(reference.eos_id()),
        pad_token=reference.id_to_piece(reference.pad_id() if reference.pad_id() >= 0 else reference.eos_id()),
        unk_token=reference.id_to_piece(reference.unk_id()),
    )
    for sample in samples:
        unknown = reference.unk_id()
        ours, theirs = (_fused(ids, unknown) for ids in (made.encode(sample), reference.encode(sample)))
        if ours != theirs:
            raise DataError(
                f"prepare.tokenizer: the fast form of this sentencepiece model differs from sentencepiece on {sample[:60]!r} "
                f"({ours[:8]} and {theirs[:8]} …), so it is refused; use a model without these features, or train one here"
            )
    return made


def _fused(ids: list[int], unknown: int) -> list[int]:
    """A run of unknown tokens says no more than one: sentencepiece fuses some that the fast form keeps."""
    return [token for at, token in enumerate(ids) if token != unknown or not at or ids[at - 1] != unknown]


def _converted(proto: Any) -> tokenizers.Tokenizer:
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Fast

    model: models.Model
    trainer = proto.trainer_spec
    normal, control, user_defined = 1, 3, 4  # the piece types of sentencepiece_model.proto
    if trainer.model_type == trainer.BPE:
        vocab = {piece.piece: number for number, piece in enumerate(proto.pieces)}
        model = models.BPE(
            vocab,
            _merges({piece: number for piece, number in vocab.items() if proto.pieces[number].type == normal}),
            unk_token=trainer.unk_piece,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    else:
        # Rounded, because tokenizer.json would not give the last digits back, and with them the fingerprint.
        pieces = [(piece.piece, round(piece.score, 6)) for piece in proto.pieces]
        model = models.Unigram(pieces, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    fast = Fast(model)
    fast.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type == control)
            for piece in proto.pieces
            if piece.type in (control, user_defined)
        ]
    )
    fast.normalizer = _normalizer(proto.normalizer_spec)
    if trainer.model_type != trainer.BPE:
        # The unigram model would take text that spells a control or byte piece for the piece: part it after one character.
        spelled = [p.piece for p in proto.pieces if p.type not in (normal, user_defined)]
        pattern = "|".join(f"(?<={re.escape(p[0])})(?={re.escape(p[1:])})" for p in spelled)
        fast.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    steps = [decoders.Replace(_REPLACEMENT, " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    fast.decoder = decoders.Sequence(steps)
    return fast


def _normalizer(spec: Any) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_REPLACEMENT))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", _REPLACEMENT)])


def _merges(vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The merges that a sentencepiece vocabulary implies: a piece of lower id (higher score) is made first."""
    merges = []
    for piece, number in vocab.items():
        pairs = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        known = [
            (vocab[left], vocab[right], (left, right)) for left, right in pairs if left in vocab and right in vocab
        ]
        merges += [(number, *pair) for pair in sorted(known)]
    return [pair for _, _, _, pair in sorted(merges)]
