"""From all the slices to shards: what only the whole corpus can decide. The same bytes whatever did the slices.

Every record has a fate: kept for training, kept for validation, or dropped for a reason and because of another record.
Fates and places are files, so that memory does not grow with the corpus.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sft_dist.data import shards
from sft_dist.data.curate import words
from sft_dist.data.pack import pack
from sft_dist.data.read import UNREADABLE, detect, read
from sft_dist.data.records import Conversation, Document, Drop, Turn
from sft_dist.data.repeats import NearIndex, OverlapIndex, groups, shingles
from sft_dist.data.scratch import TRAIN, VALIDATION, DocumentReader, Slices, from_json
from sft_dist.data.select import quality, select
from sft_dist.data.sources import slices as cut
from sft_dist.data.work import Job, documents_of
from sft_dist.errors import DataError
from sft_dist.schema import PrepareConfig, SourceConfig

Progress = Callable[[str, int, int, int], None]  # stage, done, total, tokens since the last call
SPLITS = {"train": TRAIN, "validation": VALIDATION}
# What a merge may drop a record for; the place in this list is the code on disk, after the two splits.
REASONS = [
    "duplicate", "in_validation", "same_prompt", "near_validation", "near_duplicate", "contaminated", "not_selected",
]  # fmt: skip
_DETAILS = {
    "duplicate": "the same as",
    "in_validation": "its prompt is the one of the validation record",
    "same_prompt": "another answer to this prompt is kept:",
    "near_validation": "its prompt is nearly that of the validation record",
    "near_duplicate": "nearly the same as",
    "contaminated": "shares a run of words with",
    "not_selected": "the selection took others",
}


_LONG = (
    "split_documents", "parts_of_split_documents", "shortened_contexts", "truncated_documents", "truncated_target_tokens",
    "unrolled", "unscored_labels",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Funnel:
    """What became of every record: `read` is the sum of everything else but `mended` and `long`."""

    read: int = 0
    train: int = 0
    validation: int = 0
    drops: dict[str, int] = field(default_factory=dict)
    mended: dict[str, int] = field(default_factory=dict)
    long: dict[str, int] = field(default_factory=dict)

    @property
    def is_exact(self) -> bool:
        """Whether every record is accounted for."""
        return self.read == self.train + self.validation + sum(self.drops.values())

    def counts(self) -> str:
        """The drops, for a person."""
        return ", ".join(f"{count:,} {reason}" for reason, count in self.drops.items()) or "none dropped"


class Fates:
    """The fate of every record, on disk: its split, or why it goes and because of which other one."""

    def __init__(self, scratch: Path, slices: Slices) -> None:
        size = max(1, len(slices))
        self.codes = np.memmap(scratch / "fates", np.uint8, "w+", shape=(size,))[: len(slices)]
        self.others = np.memmap(scratch / "others", np.int64, "w+", shape=(size,))[: len(slices)]
        # `where` of an evaluation text -> its number, which `others` of a contaminated record holds
        self.contaminants: dict[str, int] = {}
        for _, base, records in slices.each():
            self.codes[base : base + len(records)] = records["split"]

    def add_contaminant(self, index: OverlapIndex, record: Conversation) -> None:
        """Remember an evaluation text, and where it stands."""
        self.contaminants.setdefault(record.where, len(self.contaminants))
        index.add(record.where, words(_asked_and_answered(record)))

    def drop(self, numbers: np.ndarray | int, reason: str, others: np.ndarray | int = -1) -> None:
        """Records that go."""
        self.codes[numbers] = 2 + REASONS.index(reason)
        self.others[numbers] = others

    def count(self) -> tuple[int, int, Counter[str]]:
        """(train, validation, drops by reason)."""
        counts = np.bincount(self.codes, minlength=2 + len(REASONS)).tolist()
        return counts[0], counts[1], Counter({name: n for name, n in zip(REASONS, counts[2:], strict=True) if n})


def settle(job: Job, slices: Slices, scratch: Path, progress: Progress) -> Fates:
    """Decide every record's fate. Of records that say the same the first stays, validation files before all others."""
    fates, curate = Fates(scratch, slices), job.config.curate
    if curate.duplicates:
        for numbers, firsts in groups(_keys(slices, fates, "content"), len(slices), scratch):
            repeats = numbers != firsts
            fates.drop(numbers[repeats], "duplicate", firsts[repeats])
    if any(piece.is_validation for piece in job.pieces):
        for numbers, firsts in groups(_keys(slices, fates, "opening"), len(slices), scratch):
            for group in _grouped(numbers, firsts):
                held_out = group[fates.codes[group] == VALIDATION]
                if len(held_out):
                    fates.drop(group[fates.codes[group] == TRAIN], "in_validation", held_out[0])
    if curate.same_prompt != "keep":
        for numbers, firsts in groups(_keys(slices, fates, "prompt"), len(slices), scratch):
            for group in _grouped(numbers, firsts):
                _keep_one(fates, slices, group[fates.codes[group] == TRAIN], curate.same_prompt)
    if job.keeps_texts:
        _compare(job, slices, fates, progress)
    return fates


def _keys(slices: Slices, fates: Fates, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for _, base, records in slices.each():
        alive = np.flatnonzero(fates.codes[base : base + len(records)] <= VALIDATION)
        yield records[name][alive], base + alive


def _grouped(numbers: np.ndarray, firsts: np.ndarray) -> Iterator[np.ndarray]:
    """The records of each group."""
    if len(numbers):
        yield from np.split(numbers, np.flatnonzero(np.diff(firsts)) + 1)


def _keep_one(fates: Fates, slices: Slices, training: np.ndarray, policy: str) -> None:
    """Of one prompt's training records the first, the last or the one with most target tokens stays."""
    if len(training) > 1:
        place = {"first": 0, "last": len(training) - 1}.get(policy)
        if place is None:
            place = int(np.argmax([slices.record(int(number))["targets"] for number in training]))
        fates.drop(np.delete(training, place), "same_prompt", training[place])


def _compare(job: Job, slices: Slices, fates: Fates, progress: Progress) -> None:
    """What needs the words: nearness to validation and to each other, overlap with evaluation files, selection."""
    curate = job.config.curate
    usual = _usual(slices, fates) if curate.near_validation or curate.near_duplicates else frozenset()
    held_out = NearIndex(curate.near_validation, usual) if curate.near_validation else None
    if held_out:
        for number, line in slices.conversations(fates.codes == VALIDATION):
            held_out.add(number, words(_prompt(from_json(line))))
    earlier = NearIndex(curate.near_duplicates, usual) if curate.near_duplicates else None
    overlap = _evaluation_texts(job.config, slices, fates)
    chosen = fates.codes == TRAIN
    total, numbers, prompts, qualities = int(chosen.sum()), [], [], []
    for done, (number, line) in enumerate(slices.conversations(chosen), 1):
        record = from_json(line)
        prompt, whole = _prompt(record), _asked_and_answered(record)
        if held_out and (near := held_out.find(words(prompt))) is not None:
            fates.drop(number, "near_validation", near)
        elif overlap and (where := overlap.find(words(whole))) is not None:
            fates.drop(number, "contaminated", fates.contaminants[where])
        elif earlier and (near := earlier.find(words(whole))) is not None:
            fates.drop(number, "near_duplicate", near)
        else:
            if earlier:
                earlier.add(number, words(whole))
            if curate.select:
                numbers.append(number)
                prompts.append(prompt)
                qualities.append(quality(prompt, record.turns[-1].content))
        if done % 1000 == 0:
            progress("compare", done, total, 0)
    if curate.select and numbers:
        taken = select(
            prompts, np.array(qualities), curate.select.count, weight=curate.select.quality, seed=job.config.seed
        )
        fates.drop(np.delete(np.array(numbers), taken), "not_selected")


def _evaluation_texts(config: PrepareConfig, slices: Slices, fates: Fates) -> OverlapIndex | None:
    """What the training records must not contain. Raises DataError for an evaluation file that cannot be read as a whole."""
    curate = config.curate
    if not (curate.decontaminate or curate.decontaminate_validation or config.general):
        return None
    index = OverlapIndex(curate.decontaminate_words)
    for source in curate.decontaminate:
        source = source if source.schema_ else source.model_copy(update={"schema_": detect(source)[0]})
        for item in _whole(source, "prepare.curate.decontaminate"):
            fates.add_contaminant(index, item)
    for item in _general_texts(config):
        fates.add_contaminant(index, item)
    if curate.decontaminate_validation:
        for _, line in slices.conversations(fates.codes == VALIDATION):
            fates.add_contaminant(index, from_json(line))
    return index


def _whole(source: SourceConfig, key: str) -> list[Conversation]:
    """Every record of an evaluation file."""
    items = [item for piece in cut(source, 1 << 62) for item in read(piece, source, None)]
    bad = next((item for item in items if not isinstance(item, Conversation)), None)
    if bad is not None or not items:
        what = f"{bad.where} is no text ({getattr(bad, 'detail', 'token ids')})" if bad else "it holds no records"
        raise DataError(f"{key}: {source.path}: {what}; nothing could be compared with it: mend it, or name its schema")
    return [item for item in items if isinstance(item, Conversation)]


def _general_texts(config: PrepareConfig) -> Iterator[Conversation]:
    """The general text, document by document, without empty ones; it is measured as it stands, so nothing of it is mended."""
    for source in config.general:
        records = _whole(source.model_copy(update={"schema_": "text"}), "prepare.general")
        yield from (record for record in records if record.turns[0].content.strip())


def _usual(slices: Slices, fates: Fates, most: int = 5000) -> frozenset[str]:
    """What many prompts say alike, such as an instruction that all share: by that no two of them are near each other."""
    counts: Counter[str] = Counter()
    lines = itertools.islice(slices.conversations(fates.codes == TRAIN), most)
    number = 0
    for _, line in lines:
        counts.update(set(shingles(words(_prompt(from_json(line))))))
        number += 1
    return frozenset(text for text, count in counts.items() if count > max(10, number // 50))


def _asked_and_answered(record: Conversation) -> str:
    """Everything said but system messages, which many records share."""
    return " ".join(turn.content for turn in record.turns if turn.role != "system")


def _prompt(record: Conversation) -> str:
    """What the record asks (of plain text: the text)."""
    return " ".join(turn.content for turn in record.prompt or record.turns if turn.role != "system")


def merge(job: Job, out: Path, scratch: Path, executor: Executor | None, progress: Progress) -> dict[str, Any]:
    """Everything of the final folder but `prepare.json`; returns its funnel and splits."""
    slices = Slices([job.place(number) for number in range(len(job.pieces))], token_dtype_of(job))
    fates = settle(job, slices, scratch, progress)
    funnel = _funnel(slices, fates)
    assert funnel.is_exact, funnel
    _write_rejects(out / "rejects.jsonl", slices, fates)
    _check_share(job.config, slices, funnel, out / "rejects.jsonl")
    if not funnel.train:
        joins = "; boundary_merge: this tokenizer joins the template's text with the answers'; use another template"
        hint = joins if "boundary_merge" in funnel.drops else ""
        raise DataError(
            f"prepare.sources: no record is left to train on ({funnel.counts()}); see {out / 'rejects.jsonl'}{hint}"
        )
    shared = {
        "seq_len": job.config.seq_len,
        "rows_per_shard": job.config.rows_per_shard,
        "vocab_size": job.tokenizer.vocab_size,
        "eos_id": job.tokenizer.eos_id,
        "pad_id": job.tokenizer.pad_id,
        "tokenizer": job.tokenizer.fingerprint,
        "template": job.template.fingerprint,
    }
    splits = {}
    for name, code in SPLITS.items():
        manifest = _write_split(job, slices, fates.codes == code, out / name, scratch, shared, executor, progress)
        if manifest:
            splits[name] = _about(manifest)
    if job.config.general:
        splits["general"] = _about(_write_general(out / "general", job, shared))
    with (out / "validation.jsonl").open("wb") as file:
        file.writelines(line for _, line in slices.conversations(fates.codes == VALIDATION))
    unscored = _write_labels(out, _label_counts(slices, fates), job, shared)
    if unscored:
        funnel.long["unscored_labels"] = unscored
    return {"funnel": asdict(funnel), "splits": splits}


def _about(manifest: shards.Manifest) -> dict[str, Any]:
    """What is told of a split."""
    return {key: getattr(manifest, key) for key in ("rows", "seq_len", "documents", "tokens", "targets", "fill")}


def token_dtype_of(job: Job) -> np.dtype:
    """The type of the ids in the slices."""
    return shards.token_dtype(job.tokenizer.vocab_size)


def _funnel(slices: Slices, fates: Fates) -> Funnel:
    train, validation, drops = fates.count()
    counts: Counter[str] = Counter()
    mended: Counter[str] = Counter()
    for part in slices.parts:
        drops.update(part.about["drops"])
        counts.update(part.about["counts"])
        mended.update(part.about["mended"])
    num_read = counts.pop("read", 0)
    long = {name: counts[name] for name in _LONG if counts[name]}
    return Funnel(num_read, train, validation, dict(drops.most_common()), dict(sorted(mended.items())), long)


def _write_rejects(path: Path, slices: Slices, fates: Fates) -> None:
    """What the slices dropped, then what the merge did, each in the order of the sources."""
    contaminants = list(fates.contaminants)
    with path.open("w", encoding="utf-8") as file:
        for part in slices.parts:
            file.write((part.folder / "rejects.jsonl").read_text(encoding="utf-8"))
        for part, base, records in slices.each():
            codes = fates.codes[base : base + len(records)]
            for place in np.flatnonzero(codes > VALIDATION).tolist():
                reason = REASONS[codes[place] - 2]
                drop = Drop(
                    reason,
                    part.where(int(records["line"][place])),
                    _detail(reason, base + place, slices, fates, contaminants),
                )
                file.write(json.dumps(asdict(drop), ensure_ascii=False) + "\n")


def _detail(reason: str, number: int, slices: Slices, fates: Fates, places: list[str]) -> str:
    other = int(fates.others[number])
    if other < 0:
        return _DETAILS[reason]
    return f"{_DETAILS[reason]} {places[other] if reason == 'contaminated' else slices.where(other)}"


def _check_share(config: PrepareConfig, slices: Slices, funnel: Funnel, rejects: Path) -> None:
    count = sum(number for reason, number in funnel.drops.items() if reason in UNREADABLE)
    if count <= config.max_reject_fraction * funnel.read:
        return
    with rejects.open() as file:
        unreadable = (drop for drop in map(json.loads, file) if drop["reason"] in UNREADABLE)
        first = [
            f"{drop['where']}: {drop['reason']}: {drop['detail']}"
            for drop, _ in zip(unreadable, range(3), strict=False)
        ]
    raise DataError(
        f"prepare.sources: {count:,} of {funnel.read:,} records cannot be read, more than max_reject_fraction "
        f"{config.max_reject_fraction:g} allows. First: {'; '.join(first)}. All are in {rejects}; mend them, name another "
        "schema, or raise the limit"
    )


def _write_split(
    job: Job,
    slices: Slices,
    chosen: np.ndarray,
    folder: Path,
    scratch: Path,
    shared: dict[str, Any],
    executor: Executor | None,
    progress: Progress,
) -> shards.Manifest | None:
    """Pack the documents of the chosen records and write their rows; None when there are none."""
    documents = _documents(slices, chosen, scratch / f"{folder.name}.documents")
    if not len(documents):
        return None
    layout = Layout.packed(documents, job.config, scratch / folder.name)
    folder.mkdir(parents=True)
    per_shard = job.config.rows_per_shard
    tasks = [(slices, layout, folder, number, per_shard, shared) for number in range(-(-layout.num_rows // per_shard))]
    results = (
        executor.map(_write_shard, *zip(*tasks, strict=True)) if executor else (_write_shard(*task) for task in tasks)
    )
    parts = []
    for part in results:
        parts.append(part)
        progress(f"write {folder.name}", len(parts), len(tasks), part.tokens)
    return shards.write_manifest(folder, parts, **shared)


_BLOCK_ROWS = 1024
_PLACE = np.dtype([("part", "<u4"), ("tokens", "<u4"), ("at", "<u8"), ("line", "<u8")])


def _documents(slices: Slices, chosen: np.ndarray, path: Path) -> np.ndarray:
    """Where the documents of the chosen records lie: _PLACE [documents], on disk."""
    with path.open("wb") as file:
        for number, (part, base, records) in enumerate(slices.each()):
            mine = np.repeat(chosen[base : base + len(records)], records["documents"])
            lines = np.repeat(records["line"], records["documents"])
            found = part.documents[mine]
            places = np.empty(len(found), _PLACE)
            places["part"], places["tokens"], places["at"] = number, found["tokens"], found["at"]
            places["line"] = lines[mine]
            places.tofile(file)
    return np.memmap(path, _PLACE, "r") if path.stat().st_size else np.empty(0, _PLACE)


@dataclass(frozen=True, slots=True)
class Layout:
    """Which piece of which document stands where, on disk: row r holds the pieces ends[r - 1]..ends[r]."""

    documents: Path
    pieces: Path
    ends: Path
    num_rows: int

    @classmethod
    def packed(cls, documents: np.ndarray, config: PrepareConfig, path: Path) -> Layout:
        """Pack window by window; memory is that of a window."""
        made = cls(path.with_suffix(".documents"), path.with_suffix(".pieces"), path.with_suffix(".ends"), 0)
        before = rows = 0
        with made.pieces.open("wb") as pieces, made.ends.open("wb") as ends:
            for packing in pack(documents["tokens"], config.seq_len, how=config.packing, seed=config.seed):
                np.stack([packing.documents, packing.starts, packing.counts], axis=1).astype("<i8").tofile(pieces)
                (packing.ends + before).astype("<i8").tofile(ends)
                before += len(packing.documents)
                rows += len(packing.ends)
        return replace(made, num_rows=rows)

    def rows(self, first: int, stop: int, reader: DocumentReader) -> Iterator[list[Document]]:
        """The documents of rows first..stop, read as they are asked for."""
        documents, ends = np.memmap(self.documents, _PLACE, "r"), np.memmap(self.ends, "<i8", "r")
        for begin in range(first, stop, _BLOCK_ROWS):
            bounds = ends[max(0, begin - 1) : min(stop, begin + _BLOCK_ROWS)].tolist()
            bounds = bounds if begin else [0, *bounds]
            pieces = np.fromfile(self.pieces, "<i8", (bounds[-1] - bounds[0]) * 3, offset=bounds[0] * 24).reshape(-1, 3)
            found = documents[pieces[:, 0]].tolist()
            made = [
                reader.read(part, at, tokens, line, start, count)
                for (part, tokens, at, line), (_, start, count) in zip(found, pieces.tolist(), strict=True)
            ]
            for left, right in itertools.pairwise(bounds):
                yield made[left - bounds[0] : right - bounds[0]]


def _write_shard(
    slices: Slices, layout: Layout, folder: Path, number: int, per_shard: int, shared: dict[str, Any]
) -> shards.ShardAbout:
    reader = DocumentReader(slices)
    stop = min(layout.num_rows, (number + 1) * per_shard)
    sizes = {name: shared[name] for name in ("seq_len", "vocab_size", "pad_id")}
    try:
        return shards.write_shard(folder, number, layout.rows(number * per_shard, stop, reader), **sizes)
    finally:
        reader.close()


def _label_counts(slices: Slices, fates: Fates) -> dict[str, Counter[str]]:
    """Records of each label, by split."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in SPLITS}
    for part, base, records in slices.each():
        for name, code in SPLITS.items():
            alive = records["label"][fates.codes[base : base + len(records)] == code]
            for place, count in zip(*np.unique(alive[alive >= 0], return_counts=True), strict=True):
                counts[name][part.about["labels"][place]] += int(count)
    return counts


def _packed(documents: list[Document], config: PrepareConfig) -> tuple[list[list[Document]], list[int]]:
    """Whole documents as rows, and the place that each document of the rows had before."""
    lengths = np.array([len(document.ids) for document in documents])
    packings = pack(lengths, config.seq_len, seed=config.seed)
    places = [row.tolist() for packing in packings for row in np.split(packing.documents, packing.ends[:-1])]
    return [[documents[place] for place in row] for row in places], list(itertools.chain(*places))


def _write_general(folder: Path, job: Job, shared: dict[str, Any]) -> shards.Manifest:
    """The general text as rows of a split of its own, whatever becomes of long documents and of rows in training."""
    config = job.config.model_copy(update={"long_documents": "split", "packing": "best_fit"})
    documents: list[Document] = []
    for record in _general_texts(config):
        made = documents_of(record, job.template, job.tokenizer, config, Counter())
        documents += [] if isinstance(made, Drop) else made  # without a token to be predicted
    if not documents:
        raise DataError("prepare.general: there is no text in it; name files with text, or leave it out")
    rows, _ = _packed(documents, config)
    return shards.write(folder, rows, **shared)


def _write_labels(out: Path, counts: dict[str, Counter[str]], job: Job, shared: dict[str, Any]) -> int:
    """Every validation prompt with every label as its answer: what accuracy is measured on.

    Returns how many are left out because one of their labels leaves no room for the whole prompt.
    """
    labels = sorted(counts["train"])
    unseen = set(counts["validation"]) - set(labels)
    if unseen:
        raise DataError(
            f"prepare.sources: label {min(unseen)!r} is in the validation records only; correct it, or add training records of it"
        )
    if not counts["validation"] or len(labels) < 2:
        return 0
    documents: list[Document] = []
    candidates: list[tuple[int, int]] = []
    truth: list[int] = []
    whole = job.config.model_copy(update={"long_documents": "drop"})  # each label after the same prompt, or none
    with (out / "validation.jsonl").open("rb") as file:
        records = [record for record in map(from_json, file) if record.label is not None]
    for record in records:
        turns = [(*record.prompt, Turn("assistant", label, is_target=True)) for label in labels]
        made = [documents_of(replace(record, turns=t), job.template, job.tokenizer, whole, Counter()) for t in turns]
        whole_ones = [one for one in made if not isinstance(one, Drop) and len(one) == 1]
        if len(whole_ones) < len(labels) or record.label is None:
            continue
        candidates += [(len(truth), place) for place in range(len(labels))]
        truth.append(labels.index(record.label))
        documents += [document for [document] in whole_ones]
    if not documents:
        return len(records)
    rows, order = _packed(documents, job.config)
    shards.write(out / "labels", rows, **shared)
    about = {
        "labels": labels,
        "positive": min(labels, key=lambda label: (counts["train"][label], label)),
        "truth": truth,
        "candidates": [candidates[index] for index in order],
    }
    (out / "labels" / "labels.json").write_text(json.dumps(about))
    return len(records) - len(truth)
