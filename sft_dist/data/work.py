"""One slice of the sources, done by one worker that knows nothing of the others: read, mend, render, tokenise."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sft_dist.data.curate import Curator, digests, is_validation
from sft_dist.data.read import Slice, read
from sft_dist.data.records import Conversation, Document, Drop
from sft_dist.data.scratch import TRAIN, VALIDATION, SliceWriter, as_json
from sft_dist.data.shards import token_dtype
from sft_dist.data.template import TokenizerTexts, template_from
from sft_dist.data.tokenise import Tokenizer, fit, tokenise
from sft_dist.errors import DataError
from sft_dist.schema import PrepareConfig, SourceConfig


@dataclass(frozen=True, slots=True)
class Piece:
    """A slice of a source; `is_validation`: the source is validation as a whole."""

    slice: Slice
    source: SourceConfig
    is_validation: bool


@dataclass(frozen=True, slots=True)
class Job:
    """What every worker of a preparation knows. `keeps_texts`: a later stage compares the training records' texts."""

    folder: Path
    config: PrepareConfig
    tokenizer: Tokenizer
    template: Any
    pieces: tuple[Piece, ...]
    keeps_texts: bool

    def place(self, number: int) -> Path:
        """Where the result of a slice goes."""
        return self.folder / f"{number:05d}"

    def is_done(self, number: int) -> bool:
        """Whether a slice needs no more work."""
        return self.place(number).is_dir()


def template_for(name: str, tokenizer: Tokenizer) -> Any:
    """The template of that name, checked against the tokens that exist."""
    texts = TokenizerTexts(tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token, tokenizer.control_tokens)
    return template_from(name, texts)


def work(job: Job, number: int) -> int:
    """Do one slice, and return its tokens; its folder appears whole or not at all."""
    gc.disable()  # a seventh of the time, spent on looking for cycles that the stages do not make
    try:
        return _worked(job, number)
    finally:
        gc.enable()


def _worked(job: Job, number: int) -> int:
    piece = job.pieces[number]
    writer = SliceWriter(job.place(number), token_dtype(job.tokenizer.vocab_size))
    curator = Curator(job.config.curate, job.tokenizer.eos_token)
    for item in read(piece.slice, piece.source, job.tokenizer.eos_id):
        writer.counts["read"] += 1
        if isinstance(item, Conversation):
            item = curator(item)
        if isinstance(item, Drop):
            writer.drop(item)
        elif isinstance(item, Document):
            _keep_ids(job, piece, writer, item)
        else:
            _keep(job, piece, writer, item)
    writer.publish(mended=curator.mended)
    return writer.num_tokens


def _keep(job: Job, piece: Piece, writer: SliceWriter, record: Conversation) -> None:
    config = job.config
    is_held_out = piece.is_validation or is_validation(record, config.validation_fraction, config.seed)
    documents = documents_of(record, job.template, job.tokenizer, config, writer.counts)
    if isinstance(documents, Drop):
        writer.drop(documents)
        return
    writer.keep(
        documents,
        digests(record),
        split=VALIDATION if is_held_out else TRAIN,
        where=record.where,
        label=record.label,
        text=as_json(record) if is_held_out or job.keeps_texts else None,
    )


def _keep_ids(job: Job, piece: Piece, writer: SliceWriter, document: Document) -> None:
    """A record that came as token ids: all that can be done is to fit it, and to know it again."""
    if len(document.ids) and int(document.ids.max()) >= job.tokenizer.vocab_size:
        raise DataError(
            f"{document.where}: token {document.ids.max()} is outside the vocabulary of {job.tokenizer.vocab_size}; these "
            "tokens were made with another tokenizer: name that one in prepare.tokenizer"
        )
    if len(document.ids) < 2:
        writer.drop(Drop("no_targets", document.where, "no token is to be learned"))
        return
    parts = _fitted(document, job.config, 1, writer.counts)
    if isinstance(parts, Drop):
        writer.drop(parts)
        return
    digest = hashlib.blake2b(document.ids.astype(np.uint32).tobytes(), digest_size=16).digest()
    share = int.from_bytes(hashlib.blake2b(digest, key=str(job.config.seed).encode()).digest()[:8], "big")
    is_held_out = piece.is_validation or share < job.config.validation_fraction * 2**64
    writer.keep(
        parts, (digest, digest, digest), split=VALIDATION if is_held_out else TRAIN, where=document.where
    )  # fmt: skip


def documents_of(
    record: Conversation, template: Any, tokenizer: Tokenizer, config: PrepareConfig, counts: Any
) -> list[Document] | Drop:
    """A record rendered, tokenised and fitted to rows; `counts` counts long and unrolled records."""
    rendered = template.render(record, tokenizer.eos_token)
    if isinstance(rendered, Drop):
        return rendered
    counts["unrolled"] += len(rendered) > 1
    made: list[Document] = []
    for spans in rendered:
        is_text = record.turns[0].role == "text"
        document = tokenise(spans, tokenizer, record.where, adds_bos=is_text or template.adds_bos)
        if isinstance(document, Drop):
            return document
        context = 1 if is_text else config.seq_len // 8
        parts = _fitted(document, config, context, counts)
        if isinstance(parts, Drop):
            return parts
        made += parts
    return made


def _fitted(document: Document, config: PrepareConfig, context: int, counts: Any) -> list[Document] | Drop:
    if len(document.ids) <= config.seq_len or config.packing == "concat":
        return [document]
    parts = fit(document, config.seq_len, config.long_documents, context=context)
    if isinstance(parts, Drop):
        if config.long_documents == "error":
            raise DataError(f"{parts.where}: {parts.detail}; raise prepare.seq_len, or choose another long_documents")
        return parts
    if config.long_documents == "split":
        counts["split_documents"] += len(parts) > 1
        counts["parts_of_split_documents"] += len(parts) if len(parts) > 1 else 0
        # A question so long that its answer would not fit has lost its beginning; its answer is whole.
        counts["shortened_contexts"] += parts[0].ids.ctypes.data != document.ids.ctypes.data
    else:
        counts["truncated_documents"] += 1
        counts["truncated_target_tokens"] += document.num_targets - parts[0].num_targets
    return parts


def training_texts(
    config: PrepareConfig, pieces: tuple[Piece, ...], limit_characters: int = 200_000_000
) -> Iterator[Conversation]:
    """The training records in order, mended and without exact repeats, up to so much text: what a tokenizer learns from."""
    curator, seen, characters = Curator(config.curate), set(), 0
    for piece in pieces:
        for item in read(piece.slice, piece.source, None):
            made = curator(item) if isinstance(item, Conversation) else None
            if not isinstance(made, Conversation) or piece.is_validation:
                continue
            digest = digests(made)[0]
            if is_validation(made, config.validation_fraction, config.seed) or digest in seen:
                continue
            seen.add(digest)
            yield made
            characters += sum(len(turn.content) for turn in made.turns)
            if characters > limit_characters:
                return


def write_about(path: Path, values: dict[str, Any]) -> None:
    """JSON that appears whole."""
    staged = path.with_suffix(".partial")
    staged.write_text(json.dumps(values, indent=1, ensure_ascii=False))
    staged.replace(path)
