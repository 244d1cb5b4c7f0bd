"""All the stages in their order: raw records in, a folder of shards out, and an account of everything in between.

The folder appears whole: it is staged beside its place and renamed. It holds `train/`, `validation/`, `labels/` (every
validation prompt followed by every label, for classification), `tokenizer/`, `validation.jsonl`, `rejects.jsonl`, and
`prepare.json`, the funnel and the settings.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sft_dist.config import PrepareConfig, SourceConfig, TrainedTokenizer
from sft_dist.data import shards
from sft_dist.data.curate import curate, is_validation, prompt_digest
from sft_dist.data.pack import pack
from sft_dist.data.read import files, read
from sft_dist.data.records import Conversation, Document, Drop, Turn
from sft_dist.data.template import Template, template_from
from sft_dist.data.tokenise import Tokenizer, split, tokenise, train_sentencepiece
from sft_dist.errors import ConfigError, DataError
from sft_dist.files import publish

# Reasons of records that could not be read, as opposed to those that were read and left out.
_UNREADABLE = {
    "invalid_utf8", "invalid_json", "invalid_csv", "missing_key", "wrong_type", "unknown_role", "no_answer",
    "no_messages", "no_instances", "not_text", "empty_label", "invalid_unicode", "unknown_weight",
}  # fmt: skip
Progress = Callable[[str, int], None]


@dataclass(frozen=True, slots=True)
class Funnel:
    """What became of every record: `read` is the sum of everything else."""

    read: int = 0
    train: int = 0
    validation: int = 0
    drops: dict[str, int] = field(default_factory=dict)

    @property
    def is_exact(self) -> bool:
        """Whether every record is accounted for."""
        return self.read == self.train + self.validation + sum(self.drops.values())


@dataclass(frozen=True, slots=True)
class Report:
    """What a preparation made."""

    out: Path
    funnel: dict[str, Any]
    splits: dict[str, dict[str, Any]]
    was_already_prepared: bool

    def describe(self) -> str:
        """The funnel and the splits, for a person."""
        state = "already prepared, nothing changed" if self.was_already_prepared else "prepared"
        drops = ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.funnel["drops"].items())) or "none"
        lines = [
            f"{self.out}: {state}",
            f"  records: {self.funnel['read']:,} read → {self.funnel['train']:,} train, "
            f"{self.funnel['validation']:,} validation; dropped: {drops}"
            + (f" (see {self.out / 'rejects.jsonl'})" if self.funnel["drops"] else ""),
        ]
        for name, about in self.splits.items():
            lines.append(
                f"  {name}: {about['rows']:,} rows of {about['seq_len']:,} hold {about['documents']:,} samples, "
                f"{about['tokens']:,} tokens (fill {about['fill']:.1%}), {about['targets']:,} of them targets"
            )
        return "\n".join(lines)


def prepare(
    config: PrepareConfig,
    *,
    default_tokenizer: str | None = None,
    progress: Progress = lambda stage, done: None,
    fresh: bool = False,
) -> Report:
    """Make `config.out`, or find that it is there already, made from the same sources with the same settings.

    Raises DataError or ConfigError, naming what to do; an `out` made otherwise is refused, or set aside with `fresh`.
    """
    template = template_from(config.template)
    if config.tokenizer is None and default_tokenizer is None:
        raise ConfigError(
            "prepare.tokenizer: missing, and the model has none of its own; name one, or train one with "
            "{sentencepiece: {vocab_size: 8000}}"
        )
    if isinstance(config.tokenizer, TrainedTokenizer) and default_tokenizer is not None:
        raise ConfigError(
            f"prepare.tokenizer: a new tokenizer does not fit the pre-trained {default_tokenizer}; remove prepare.tokenizer "
            "(prepare.tokenizer=null) to use the model's own"
        )
    given = None
    if not isinstance(config.tokenizer, TrainedTokenizer):
        given = Tokenizer.load(config.tokenizer or default_tokenizer)
    settings = {
        "prepare": config.model_dump(by_alias=True, exclude={"out"}),
        "tokenizer": given.fingerprint if given else None,
    }
    sources = _digests([*config.sources, *config.validation_sources])
    out = Path(config.out)
    if out.exists() and not fresh:
        return _already(out, settings, sources)
    staged = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)  # what an interrupted preparation left
    staged.mkdir(parents=True)
    funnel, splits = _fill(staged, config, template, given, progress)
    about = {"funnel": asdict(funnel), "splits": splits, "settings": settings, "sources": sources}
    (staged / "prepare.json").write_text(json.dumps(about, indent=1, ensure_ascii=False))
    publish(staged, out)
    return Report(out, about["funnel"], splits, was_already_prepared=False)


def _fill(
    staged: Path, config: PrepareConfig, template: Template, given: Tokenizer | None, progress: Progress
) -> tuple[Funnel, dict[str, dict[str, Any]]]:
    """Run the stages; everything but `prepare.json` is in `staged` afterwards."""
    train, validation, drops, funnel = _records(config, progress)
    _check_share(config, funnel, drops, staged)
    if not train:
        raise DataError(
            f"prepare.sources: no record is left to train on ({_counts(funnel)}); see {staged}/rejects.jsonl"
        )
    tokenizer = given or _trained(config.tokenizer, template, train)
    shared = {
        "seq_len": config.seq_len,
        "rows_per_shard": config.rows_per_shard,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id,
        "tokenizer": tokenizer.fingerprint,
        "template": hashlib.blake2b(repr(template).encode(), digest_size=16).hexdigest(),
    }
    splits, kept = {}, {}
    for name, records in (("train", train), ("validation", validation)):
        documents, kept[name] = _documents(records, template, tokenizer, config, drops, progress, name)
        if documents:
            splits[name] = _write(staged / name, documents, shared)
    funnel = replace(funnel, train=len(kept["train"]), validation=len(kept["validation"]), drops=_by_reason(drops))
    assert funnel.is_exact, funnel
    _write_lines(staged / "rejects.jsonl", (asdict(drop) for drop in drops))
    if "train" not in splits:
        raise DataError(f"prepare: no document is left to train on ({_counts(funnel)}); see {staged}/rejects.jsonl")
    _write_labels(staged / "labels", kept, template, tokenizer, shared)
    _write_lines(staged / "validation.jsonl", (asdict(record) for record in kept["validation"]))
    chat_template = template.chat_template(has_bos=bool(tokenizer.bos_ids))
    tokenizer.save(staged / "tokenizer", chat_template=chat_template, model_max_length=config.seq_len)
    return funnel, splits


def _by_reason(drops: Iterable[Drop]) -> dict[str, int]:
    return dict(Counter(drop.reason for drop in drops).most_common())


def read_conversations(path: Path) -> Iterator[Conversation]:
    """The curated conversations of a `validation.jsonl`."""
    for line in path.read_text().split("\n")[:-1]:  # not splitlines(): text may hold U+2028
        values = json.loads(line)
        yield Conversation(tuple(Turn(**turn) for turn in values["turns"]), values["where"], values["label"])


def _records(
    config: PrepareConfig, progress: Progress
) -> tuple[list[Conversation], list[Conversation], list[Drop], Funnel]:
    """(train, validation, drops, funnel) of what is read and curated.

    Named validation files are read first, so that a repeat is dropped from training and not from them.
    """
    train: list[Conversation] = []
    validation: list[Conversation] = []
    drops: list[Drop] = []
    num_read = 0

    def items() -> Iterator[Conversation | Drop]:
        nonlocal num_read
        for source in [*config.validation_sources, *config.sources]:
            for item in read(source):
                num_read += 1
                if num_read % 1000 == 0:
                    progress("read", num_read)
                yield item

    held_out: set[bytes] = set()
    named = {str(path) for source in config.validation_sources for path in files(source)}
    for item in curate(items(), deduplicate=config.deduplicate):
        if isinstance(item, Drop):
            drops.append(item)
        elif item.where.rpartition(":")[0] in named:
            validation.append(item)
            held_out.add(prompt_digest(item))
        elif prompt_digest(item) in held_out:
            drops.append(Drop("in_validation", item.where, "its prompt is in a validation file"))
        elif is_validation(item, config.validation_fraction, config.seed):
            validation.append(item)
        else:
            train.append(item)
    return train, validation, drops, Funnel(num_read, len(train), len(validation), _by_reason(drops))


def _check_share(config: PrepareConfig, funnel: Funnel, drops: list[Drop], staged: Path) -> None:
    _write_lines(staged / "rejects.jsonl", (asdict(drop) for drop in drops))
    unreadable = [drop for drop in drops if drop.reason in _UNREADABLE]
    if funnel.read and len(unreadable) > config.max_reject_fraction * funnel.read:
        examples = "; ".join(f"{drop.where}: {drop.reason}: {drop.detail}" for drop in unreadable[:3])
        raise DataError(
            f"prepare.sources: {len(unreadable):,} of {funnel.read:,} records cannot be read, more than "
            f"max_reject_fraction {config.max_reject_fraction:g} allows. First: {examples}. All are in "
            f"{staged}/rejects.jsonl; mend them, name another schema, or raise the limit"
        )


def _counts(funnel: Funnel) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in funnel.drops.items()) or "none dropped"


def _trained(config: TrainedTokenizer, template: Template, train: Sequence[Conversation]) -> Tokenizer:
    """A tokenizer trained on the training split, and on the template's words now and then: they are read as often."""
    texts = [turn.content for record in train for turn in record.turns]
    texts += [template.before_user + template.header] * (len(train) // 20 + 1)
    return train_sentencepiece(texts, config.sentencepiece)


def _documents(
    records: Iterable[Conversation],
    template: Template,
    tokenizer: Tokenizer,
    config: PrepareConfig,
    drops: list[Drop],
    progress: Progress,
    name: str,
) -> tuple[list[Document], list[Conversation]]:
    """Rendered and tokenised records of a split, and those that became documents; the others go to `drops`."""
    documents, kept = [], []
    for number, record in enumerate(records, 1):
        made = _document(record, template, tokenizer)
        if number % 1000 == 0:
            progress(f"tokenise {name}", number)
        is_long = isinstance(made, Document) and len(made.ids) > config.seq_len
        if is_long and record.turns[0].role != "text":
            detail = f"{len(made.ids)} tokens, a row has {config.seq_len}"
            if config.long_documents == "error":
                raise DataError(f"{record.where}: {detail}; raise prepare.seq_len, or set long_documents: drop")
            made = Drop("too_long", record.where, detail)
        if isinstance(made, Drop):
            drops.append(made)
            continue
        documents += split(made, config.seq_len) if is_long else [made]
        kept.append(record)
    return documents, kept


def _document(record: Conversation, template: Template, tokenizer: Tokenizer) -> Document | Drop:
    spans = template.render(record, tokenizer.eos_token)
    return spans if isinstance(spans, Drop) else tokenise(spans, tokenizer, record.where)


def _write(folder: Path, documents: list[Document], shared: dict[str, Any]) -> dict[str, Any]:
    rows = pack([len(document.ids) for document in documents], shared["seq_len"])
    manifest = shards.write(folder, ([documents[index] for index in row] for row in rows), **shared)
    names = ("rows", "seq_len", "documents", "tokens", "targets", "fill")
    return {name: getattr(manifest, name) for name in names}


def _write_labels(
    folder: Path, kept: dict[str, list[Conversation]], template: Template, tokenizer: Tokenizer, shared: dict[str, Any]
) -> None:
    """Every validation prompt with every label as its answer: what accuracy is measured on."""
    counts = Counter(record.label for record in kept["train"])
    records = [record for record in kept["validation"] if record.label is not None]
    labels = sorted(label for label in counts if label is not None)
    unseen = {record.label for record in records} - set(labels)
    if unseen:
        raise DataError(
            f"prepare.sources: label {min(unseen)!r} is in the validation records only; correct it, or add training records of it"
        )
    if not records or len(labels) < 2:
        return
    documents, candidates = [], []
    for number, record in enumerate(records):
        for place, label in enumerate(labels):
            answered = replace(record, turns=(*record.prompt, Turn("assistant", label, is_target=True)))
            made = _document(answered, template, tokenizer)
            if isinstance(made, Drop) or len(made.ids) > shared["seq_len"]:
                raise DataError(f"{record.where}: does not fit a row with the answer {label!r}; raise prepare.seq_len")
            documents.append(made)
            candidates.append((number, place))
    rows = pack([len(document.ids) for document in documents], shared["seq_len"])
    shards.write(folder, ([documents[index] for index in row] for row in rows), **shared)
    about = {
        "labels": labels,
        "positive": min(labels, key=lambda label: (counts[label], label)),
        "truth": [labels.index(record.label) for record in records],
        "candidates": [candidates[index] for row in rows for index in row],
    }
    (folder / "labels.json").write_text(json.dumps(about))


def _write_lines(path: Path, values: Iterable[dict[str, Any]]) -> None:
    with path.open("w") as file:
        for value in values:
            file.write(json.dumps(value, ensure_ascii=False) + "\n")


def _digests(sources: Sequence[SourceConfig]) -> dict[str, str]:
    """A digest of every source file, by path."""
    digests = {}
    for source in sources:
        for path in files(source):
            with path.open("rb") as file:
                digests[str(path)] = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    return digests


def _already(out: Path, settings: dict[str, Any], sources: dict[str, str]) -> Report:
    try:
        about = json.loads((out / "prepare.json").read_text())
        before, tokenizer = about["settings"]["prepare"], about["settings"]["tokenizer"]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(
            f"{out}: exists and is not a finished preparation; move it away, or choose another prepare.out"
        ) from None
    settings = json.loads(json.dumps(settings))
    now = settings["prepare"]
    changed = [f"prepare.{key}: {before.get(key)!r} → {now[key]!r}" for key in now if before.get(key) != now[key]]
    if tokenizer != settings["tokenizer"] and before["tokenizer"] == now["tokenizer"]:
        changed.append("what the tokenizer makes of text")
    files_of = about["sources"].keys() | sources.keys()
    changed += [f"the bytes of {path}" for path in sorted(files_of) if about["sources"].get(path) != sources.get(path)]
    if changed:
        raise DataError(
            f"{out}: was prepared otherwise ({'; '.join(changed)}). Choose another prepare.out, or prepare anew with --fresh "
            "(the old folder is kept)"
        )
    return Report(out, about["funnel"], about["splits"], was_already_prepared=True)
