"""Text as token ids, with a flag for each token that carries loss; and where tokenizers come from.

Everything runs on one kind of tokenizer, `tokenizers.Tokenizer`: what is trained or given as sentencepiece is converted
once and checked against sentencepiece itself, so that what is exported is what was trained with.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_dist.config import SentencePieceTraining
from sft_dist.data.records import Document, Drop, Span
from sft_dist.errors import DataError

if TYPE_CHECKING:
    import tokenizers

_REPLACEMENT = "▁"  # sentencepiece's visible space


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A tokenizer with the tokens that a trainer needs by name; text that spells one of them stays text.

    `bos_ids` is what the tokenizer itself puts before every text ([] for GPT-2, [1] for Llama).
    """

    inner: tokenizers.Tokenizer
    eos_token: str
    pad_token: str
    bos_token: str | None = None
    unk_token: str | None = None

    def __post_init__(self) -> None:
        self.inner.encode_special_tokens = True  # "</s>" in somebody's message is four characters, not an end

    @property
    def eos_id(self) -> int:
        """Id of the token that ends a document."""
        return self.inner.token_to_id(self.eos_token)

    @property
    def pad_id(self) -> int:
        """Id of the filler at the end of rows."""
        return self.inner.token_to_id(self.pad_token)

    @property
    def bos_ids(self) -> list[int]:
        """What stands before every document."""
        return self.inner.encode("", add_special_tokens=True).ids if self.bos_token else []

    @property
    def vocab_size(self) -> int:
        """Ids that exist, added tokens included: the highest id and one."""
        return max(self.inner.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def fingerprint(self) -> str:
        """A digest of what decides the ids: 32 hexadecimal digits."""
        canonical = json.dumps([json.loads(self.inner.to_str()), self.eos_token, self.pad_token], sort_keys=True)
        return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with nothing put around it."""
        return self.inner.encode(text, add_special_tokens=False).ids

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
        named = {key: _content(about.get(key)) for key in ("eos_token", "pad_token", "bos_token", "unk_token")}
        if named["eos_token"] is None:  # GPT-2 on the hub names it only in the model's configuration, by its id
            eos_id = _json_file(path, name, "config.json").get("eos_token_id")
            named["eos_token"] = inner.id_to_token(eos_id) if isinstance(eos_id, int) else None
        eos = named["eos_token"]
        if eos is None or inner.token_to_id(eos) is None:
            raise DataError(f"prepare.tokenizer: {name}: no end token (eos_token) in tokenizer_config.json; add one")
        inner.no_padding()
        inner.no_truncation()
        known = {key: token for key, token in named.items() if token and inner.token_to_id(token) is not None}
        return cls(inner, eos, known.get("pad_token", eos), known.get("bos_token"), known.get("unk_token"))


def _content(token: Any) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _fast(path: Path, name: str) -> tokenizers.Tokenizer:
    """`tokenizer.json`, or GPT-2's pair of vocab.json and merges.txt."""
    from tokenizers import AddedToken, ByteLevelBPETokenizer
    from tokenizers import Tokenizer as Fast

    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file() and not (path / "tokenizer.json").is_file():
        pair = ByteLevelBPETokenizer(str(path / "vocab.json"), str(path / "merges.txt"))
        fast = Fast.from_str(pair.to_str())
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


def tokenise(spans: Iterable[Span], tokenizer: Tokenizer, where: str) -> Document | Drop:
    """Ids and target flags of rendered spans; the first token of a document is never a target.

    The ids are those inference will see: between control tokens the text is tokenised as a whole, and up to each span
    boundary it must give the same ids alone. Where a token would reach across a boundary the record is a Drop.
    """
    ids, targets = list(tokenizer.bos_ids), [False] * len(tokenizer.bos_ids)
    text, base = "", len(ids)
    for span in spans:
        if span.is_control:
            ids.append(tokenizer.inner.token_to_id(span.text))
            targets.append(span.is_target)
            text, base = "", len(ids)
            continue
        text += span.text
        whole = tokenizer.encode(text)
        if whole[: len(ids) - base] != ids[base:]:
            return Drop("boundary_merge", where, f"a token reaches across the boundary before {span.text[:20]!r}")
        new = whole[len(ids) - base :]
        ids += new
        targets += [span.is_target] * len(new)
    if targets:
        targets[0] = False
    if not any(targets):
        return Drop("no_targets", where, "no token is to be learned")
    return Document(ids, targets, where)


def prompt_ids(spans: Iterable[Span], tokenizer: Tokenizer) -> list[int]:
    """Ids of a rendered prompt, as inference sees them."""
    ids, text = list(tokenizer.bos_ids), ""
    for span in spans:
        if span.is_control:
            ids += [*(tokenizer.encode(text) if text else []), tokenizer.inner.token_to_id(span.text)]
            text = ""
        else:
            text += span.text
    return ids + (tokenizer.encode(text) if text else [])


def split(document: Document, seq_len: int) -> list[Document]:
    """Plain text cut into documents of at most `seq_len` tokens; no target is lost.

    Each begins with the last token of the one before, as context, so that every token but the first is predicted once.

    >>> [d.ids for d in split(Document([1, 2, 3, 4, 5], [False] + [True] * 4, "a:1"), seq_len=3)]
    [[1, 2, 3], [3, 4, 5]]
    """
    ids, targets = document.ids, document.targets
    parts = []
    for start in range(0, max(1, len(ids) - 1), seq_len - 1):
        part = targets[start : start + seq_len]
        parts.append(Document(ids[start : start + seq_len], [False, *part[1:]], document.where))
    return parts


def train_sentencepiece(texts: Iterable[str], config: SentencePieceTraining) -> Tokenizer:
    """A sentencepiece tokenizer trained on `texts`, the same for the same texts; it loses no character.

    Raises DataError when the texts cannot fill the vocabulary, naming the largest size that works.
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
            f"{str(error).rsplit(']', 1)[-1].strip()} Use another vocab_size, or more text"
        ) from None
    return from_sentencepiece(model.getvalue(), samples=[*_SAMPLES, *texts[:200]])


# What conversions get wrong: runs of spaces, line ends, accents, emoji, control tokens spelled out, other scripts.
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
