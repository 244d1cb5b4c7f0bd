"""A preparation from its run file to a folder of shards: planned, cut into slices, done by any number of workers, merged.

The folder appears whole: it is staged beside its place and renamed. It holds `train/`, `validation/`, `general/` (text that is
only measured), `labels/` (every validation prompt followed by every label, for classification), `tokenizer/`, `validation.jsonl`, `rejects.jsonl`, and
`prepare.json`, the funnel and the settings. What is finished of a killed preparation is used by the next one.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sft_dist import __version__
from sft_dist.data.merge import Progress, merge
from sft_dist.data.read import detect, read
from sft_dist.data.records import Conversation, Drop
from sft_dist.data.scratch import from_json
from sft_dist.data.sources import HUB, Slice, digest, files, slices
from sft_dist.data.template import template_from
from sft_dist.data.tokenise import Tokenizer, check_inference, train_sentencepiece
from sft_dist.data.work import Job, Piece, template_for, training_texts, work, write_about
from sft_dist.errors import ConfigError, DataError
from sft_dist.files import digest_of, hold, publish
from sft_dist.schema import PrepareConfig, SourceConfig, TrainedTokenizer

SLICE_BYTES = 4 << 20
MOST_SLICES = 4096
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Task:
    """One of several tasks of a job array: it does the slices `index`, `index + count`, …; `index` from 0."""

    index: int
    count: int


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
        funnel = self.funnel
        drops = _listed(funnel["drops"]) or "none"
        lines = [
            f"{self.out}: {state}",
            f"  records: {funnel['read']:,} read → {funnel['train']:,} train, {funnel['validation']:,} validation; "
            f"dropped: {drops}" + (f" (see {self.out / 'rejects.jsonl'})" if funnel["drops"] else ""),
        ]
        if funnel["mended"]:
            lines.append(f"  mended: {_listed(funnel['mended'])} (texts)")
        if funnel["long"]:
            lines.append(f"  long: {', '.join(_LONG[name].format(count) for name, count in funnel['long'].items())}")
        for name, about in self.splits.items():
            lines.append(
                f"  {name}: {about['rows']:,} rows of {about['seq_len']:,} hold {about['documents']:,} samples, "
                f"{about['tokens']:,} tokens (fill {about['fill']:.1%}), {about['targets']:,} of them targets"
            )
        return "\n".join(lines)


_LONG = {
    "parts_of_split_documents": "into {:,} parts",
    "shortened_contexts": "{:,} questions without their beginning",
    "split_documents": "{:,} documents are split",
    "truncated_documents": "{:,} documents have lost their last turns",
    "truncated_target_tokens": "{:,} target tokens with them",
    "unrolled": "{:,} conversations are a document an answer",
    "unscored_labels": "{:,} validation records are not scored by label: with one of the labels they fill more than a row",
}


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items()))


def prepare(
    config: PrepareConfig,
    *,
    default_tokenizer: str | None = None,
    progress: Progress = lambda stage, done, total, tokens: None,
    say: Say = lambda text: None,
    fresh: bool = False,
    workers: int = 1,
    task: Task | None = None,
    only_merge: bool = False,
) -> Report | None:
    """Make `config.out`, or find that it is there already, made from the same sources with the same settings.

    `task`: do that part of the slices and return None; `only_merge`: all slices must be done. The bytes made do not depend
    on `workers` or tasks. Raises DataError or ConfigError, naming what to do; an `out` made otherwise is refused, or set
    aside with `fresh`; so is a second preparation into one folder.
    """
    check(config, default_tokenizer)
    out = Path(config.out)
    staged = out.with_name(f".{out.name}.partial")
    with _told_when_full(out), _held(out.with_name(f".{out.name}.lock"), config, is_shared=task is not None):
        if out.exists() and not fresh:
            report = _already(out, config, default_tokenizer)
            if not (staged / "out").is_dir() and (staged / "scratch").is_dir():
                shutil.rmtree(staged)  # what a kill between the last two steps left
            return report
        with _planning(staged):
            job, about = _planned(staged, config, default_tokenizer, say, may_discard=task is None and not only_merge)
        if task is not None:
            with _held(staged / f"task-{task.index}-of-{task.count}.lock", config):
                _do(range(task.index, len(job.pieces), task.count), job, workers, progress, say)
            return None
        if only_merge:
            _check_done(job, config)
        with _pool(job, workers) as executor:
            _do(range(len(job.pieces)), job, workers, progress, say, executor)
            return _merge(job, about, staged, out, executor, progress)


def check(config: PrepareConfig, default_tokenizer: str | None) -> None:
    """What is wrong with the settings by themselves; nothing is read."""
    template_from(config.template)
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


@contextlib.contextmanager
def _told_when_full(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(
            f"{out}: {error.strerror}; make room; what is done is kept, and the next run goes on from there"
        ) from None


@contextlib.contextmanager
def _held(path: Path, config: PrepareConfig, *, is_shared: bool = False) -> Iterator[None]:
    """Hold a lock, or say who does; the last one out takes the file along."""
    try:
        file = hold(path, is_shared=is_shared)
    except BlockingIOError as error:
        raise DataError(
            f"prepare.out: {config.out} is being prepared by {error}; wait for it, stop it, or choose another prepare.out"
        ) from None
    with file:
        yield
        if not is_shared:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _planning(staged: Path) -> Iterator[None]:
    """Tasks that start together make one plan: the others wait for it."""
    staged.mkdir(parents=True, exist_ok=True)
    with (staged / "plan.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _planned(
    staged: Path, config: PrepareConfig, default_tokenizer: str | None, say: Say, *, may_discard: bool
) -> tuple[Job, dict[str, Any]]:
    """The slices of the sources and the tokenizer: as an interrupted preparation left them, or anew."""
    sources = [(_with_schema(source, say), True) for source in config.validation_sources]
    sources += [(_with_schema(source, say), False) for source in config.sources]
    if config.packing == "concat" and any(source.schema_ not in ("text", "tokens") for source, _ in sources):
        raise ConfigError(
            "prepare.packing: concat cuts documents anywhere, which is for plain text only; use best_fit for conversations"
        )
    given = None
    if not isinstance(config.tokenizer, TrainedTokenizer):
        given = Tokenizer.load(config.tokenizer or default_tokenizer or "")
    before = _plan(staged)
    read_files = [source for source, _ in sources] + config.curate.decontaminate + config.general
    about: dict[str, Any] = {
        "version": __version__,
        "settings": _settings(config, given),
        "sources": _all_states(read_files, before.get("sources", {})),
        "schemas": [source.schema_ for source, _ in sources],
    }
    size = sum(_size(source, about["sources"]) for source, _ in sources)
    if not size and not any(source.path.startswith(HUB) for source, _ in sources):
        raise DataError(f"prepare.sources: {', '.join(about['sources'])}: empty; name files with records in them")
    if about == {key: before.get(key) for key in about}:  # another task has cut the sources, byte for byte these
        cut = [(Slice(**values), number) for values, number in before["slices"]]
    else:
        slice_bytes = max(SLICE_BYTES, -(-size // MOST_SLICES))
        cut = [(piece, number) for number, (source, _) in enumerate(sources) for piece in slices(source, slice_bytes)]
    about["slices"] = [[asdict(piece), number] for piece, number in cut]
    pieces = tuple(Piece(piece, *sources[number]) for piece, number in cut)
    _reuse(staged, before, about, config, say, may_discard=may_discard)
    tokenizer = given or _trained(staged / "tokenizer", config, pieces, say)
    template = template_for(config.template, tokenizer)
    about = {key: value for key, value in about.items() if key != "slices"}
    about["sources"] = {path: state["blake2b"] for path, state in about["sources"].items()}
    samples = _samples(pieces)
    tokenizer, engine = tokenizer.accelerated(turn.content for record in samples for turn in record.turns)
    for record in samples:
        rendered = template.render(record, tokenizer.eos_token)
        for spans in rendered if isinstance(rendered, list) else ():
            check_inference(spans, tokenizer)
    end = template.end_token(tokenizer.eos_token)
    tokenizer = replace(tokenizer, eot_token=end if end != tokenizer.eos_token else None)
    say(f"tokenizer: {engine}")
    return Job(staged / "slices", config, tokenizer, template, pieces, _keeps_texts(config)), about


def _with_schema(source: SourceConfig, say: Say) -> SourceConfig:
    if source.schema_:
        return source
    schema, sentence = detect(source)
    say(sentence)
    return source.model_copy(update={"schema_": schema})


def _settings(config: PrepareConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What must be the same for the rows to be; of template and tokenizer what they make of text, whatever their names."""
    values: dict[str, Any] = {
        "prepare": config.model_dump(by_alias=True, exclude={"out"}),
        "tokenizer": None,
        "template": None,
    }
    if tokenizer is not None:
        texts = [tokenizer.bos_token, tokenizer.eot_token]
        values |= {"tokenizer": digest_of({"ids": tokenizer.fingerprint, "texts": texts})}
        values |= {"template": template_for(config.template, tokenizer).fingerprint}
    return without_licences(values)


def without_licences(values: dict[str, Any]) -> dict[str, Any]:
    """A JSON object without what it says of licences: rows are what they are, whatever that is.

    >>> without_licences({"sources": [{"path": "a", "license": "mit"}]})
    {'sources': [{'path': 'a'}]}
    """

    def without(section: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in section.items() if key != "license"}

    return json.loads(json.dumps(values), object_hook=without)


def _all_states(sources: Sequence[SourceConfig], known: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the files of the sources are now, by path; the digest of one that is as it is `known` is not made again."""
    return {path: state for source in sources for path, state in _states(source, known).items()}


def _states(source: SourceConfig, known: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    if source.path.startswith(HUB):
        name = "/".join([source.path, *([source.subset] if source.subset else []), source.split])
        return {name: {"bytes": 0, "modified_ns": 0, "blake2b": digest(source.path, source)}}
    states = {}
    for path in files(source):
        stat = path.stat()
        state = {"bytes": stat.st_size, "modified_ns": stat.st_mtime_ns}
        same = {key: known.get(str(path), {}).get(key) for key in state} == state
        states[str(path)] = {**state, "blake2b": known[str(path)]["blake2b"] if same else digest(path)}
    return states


def _size(source: SourceConfig, states: dict[str, dict[str, Any]]) -> int:
    return 0 if source.path.startswith(HUB) else sum(states[str(path)]["bytes"] for path in files(source))


def _plan(staged: Path) -> dict[str, Any]:
    """What an earlier start or another task planned; empty when there is nothing to read."""
    try:
        return dict(json.loads((staged / "plan.json").read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _keeps_texts(config: PrepareConfig) -> bool:
    """Whether the merge compares the words of training records."""
    curate = config.curate
    has_validation = bool(config.validation_fraction or config.validation_sources)
    near_validation = curate.near_validation is not None and has_validation
    overlap = curate.decontaminate or config.general or (curate.decontaminate_validation and has_validation)
    return bool(near_validation or curate.near_duplicates or overlap or curate.select)


def _reuse(
    staged: Path, before: dict[str, Any], about: dict[str, Any], config: PrepareConfig, say: Say, *, may_discard: bool
) -> None:
    """Keep what an interrupted preparation of the same data and settings finished; otherwise begin anew, and say so."""
    if before == about:
        done = len(list((staged / "slices").glob("[0-9]*")))
        say(f"going on with an interrupted preparation: {done:,} slices are done")
        return
    if before and not may_discard:
        raise DataError(
            f"prepare.out: {staged} was begun with other settings or sources; finish that one, or run `sft-dist prepare` without "
            "--task and --merge, which begins anew"
        )
    if before:
        changed = [key for key in about if before.get(key) != about[key]]
        say(f"an interrupted preparation of other {' and '.join(changed)} is begun anew")
    for name in ("slices", "tokenizer", "out", "scratch"):
        shutil.rmtree(staged / name, ignore_errors=True)
    write_about(staged / "plan.json", about)


def _samples(pieces: tuple[Piece, ...], count: int = 24, most: int = 1000) -> list[Conversation]:
    """The first records, to check tokenizer and template on. Raises DataError when not one of the first `most` can be read."""
    items = (item for piece in pieces for item in read(piece.slice, piece.source, None))
    found, drops = [], []
    for item in itertools.islice(items, most):
        if isinstance(item, Conversation):
            found.append(item)
        elif isinstance(item, Drop):
            drops.append(item)
        if len(found) == count:
            break
    if len(drops) == most:
        told = "; ".join(f"{drop.where}: {drop.reason}: {drop.detail}" for drop in drops[:3])
        raise DataError(
            f"prepare.sources: none of the first {most:,} records can be read ({told}); mend them, or name another schema"
        )
    return found


def _trained(folder: Path, config: PrepareConfig, pieces: tuple[Piece, ...], say: Say) -> Tokenizer:
    """A tokenizer trained on the training split, and on the template's words now and then: they are read as often."""
    if not folder.is_dir():
        assert isinstance(config.tokenizer, TrainedTokenizer)
        texts = [turn.content for record in training_texts(config, pieces) for turn in record.turns]
        if not texts:
            raise DataError("prepare.sources: no record is left to train a tokenizer on; look at the sources")
        words = template_from(config.template).words()
        tokenizer = train_sentencepiece(texts + [words] * (len(texts) // 40 + 1), config.tokenizer.sentencepiece)
        staged = folder.with_suffix(".partial")
        shutil.rmtree(staged, ignore_errors=True)
        tokenizer.save(staged, chat_template=None, model_max_length=config.seq_len)
        publish(staged, folder)
        wanted, found = config.tokenizer.sentencepiece.vocab_size, tokenizer.vocab_size
        less = f"; the training texts give no more, {wanted:,} were asked for" if found < wanted else ""
        say(f"tokenizer: trained, {found:,} pieces{less}")
    return Tokenizer.load(str(folder))


_JOB: Job | None = None  # what a forked worker was born with: nothing of it is pickled


def _adopt(job: Job) -> None:
    global _JOB
    _JOB = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    if sys.platform == "linux":  # PR_SET_PDEATHSIG: a worker must not outlive a killed parent, nor its lock
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _work(number: int) -> int:
    assert _JOB is not None
    return work(_JOB, number)


@contextlib.contextmanager
def _pool(job: Job, workers: int) -> Iterator[Executor | None]:
    """Worker processes, None for one: then this process does the work."""
    if workers == 1:
        yield None
        return
    context = multiprocessing.get_context("fork")
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_adopt, initargs=(job,))
    try:
        yield executor
    except BaseException:
        for process in (executor._processes or {}).values():
            process.kill()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def _do(numbers: Any, job: Job, workers: int, progress: Progress, say: Say, executor: Executor | None = None) -> None:
    """Do those of the slices that are not done."""
    missing = [number for number in numbers if not job.is_done(number)]
    total, done = len(missing), 0
    if executor is None and workers > 1:
        with _pool(job, workers) as executor:
            return _do(numbers, job, workers, progress, say, executor)
    if executor is None:
        for number in missing:
            tokens = work(job, number)
            done += 1
            progress("slices", done, total, tokens)
        return None
    try:
        for future in as_completed([executor.submit(_work, number) for number in missing]):
            tokens = future.result()
            done += 1
            progress("slices", done, total, tokens)
    except BrokenProcessPool:
        raise DataError(
            "prepare: a worker process was killed (out of memory?); run it again, it goes on where it was; --workers takes fewer"
        ) from None
    return None


def _check_done(job: Job, config: PrepareConfig) -> None:
    missing = [number for number in range(len(job.pieces)) if not job.is_done(number)]
    if missing:
        raise DataError(
            f"prepare.out: {config.out}: {len(missing):,} of {len(job.pieces):,} slices are not done (the first is number "
            f"{missing[0]}); run the missing tasks again, or `sft-dist prepare` without --merge, which does them"
        )


def _merge(
    job: Job, about: dict[str, Any], staged: Path, out: Path, executor: Executor | None, progress: Progress
) -> Report:
    made, scratch = staged / "out", staged / "scratch"
    for folder in (made, scratch):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    result = merge(job, made, scratch, executor, progress)
    plan = json.loads((staged / "plan.json").read_text())
    for path, before in plan["sources"].items():
        if path.startswith(HUB):
            continue
        found = Path(path).stat()
        if (found.st_size, found.st_mtime_ns) != (before["bytes"], before["modified_ns"]):
            raise DataError(f"{path}: changed while it was read; run it again when nothing writes to it")
    chat_template = job.template.chat_template(has_bos=bool(job.tokenizer.bos_ids))
    job.tokenizer.save(made / "tokenizer", chat_template=chat_template, model_max_length=job.config.seq_len)
    (made / "prepare.json").write_text(json.dumps(result | about, indent=1, ensure_ascii=False))
    publish(made, out)
    shutil.rmtree(staged)
    return Report(out, result["funnel"], result["splits"], was_already_prepared=False)


def read_conversations(path: Path) -> Iterator[Conversation]:
    """The curated conversations of a `validation.jsonl`."""
    with path.open("rb") as file:
        yield from map(from_json, file)


def template_in(out: Path) -> str:
    """The name of the template that the shards in `out` were prepared with."""
    return json.loads((out / "prepare.json").read_text())["settings"]["prepare"]["template"]


def is_text_in(out: Path) -> bool:
    """Whether the shards in `out` are plain text, which has no questions."""
    schemas = json.loads((out / "prepare.json").read_text()).get("schemas", [])
    return bool(schemas) and set(schemas) <= {"text", "tokens"}


def _already(out: Path, config: PrepareConfig, default_tokenizer: str | None) -> Report:
    try:
        about = json.loads((out / "prepare.json").read_text())
        before, tokenizer = {"general": [], **about["settings"]["prepare"]}, about["settings"]["tokenizer"]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(
            f"{out}: exists and is not a finished preparation; move it away, or choose another prepare.out"
        ) from None
    given = None
    if not isinstance(config.tokenizer, TrainedTokenizer):
        given = Tokenizer.load(config.tokenizer or default_tokenizer or "")
    settings = _settings(config, given)
    now = settings["prepare"]
    changed = _changed("prepare", before, now)
    if tokenizer != settings["tokenizer"] and before["tokenizer"] == now["tokenizer"]:
        changed.append("what the tokenizer makes of text")
    if (now_as := settings["template"]) != (was := about["settings"].get("template")) and before["template"] == now[
        "template"
    ]:
        changed.append(f"what the template makes of a conversation ({was} → {now_as})")
    named = [*config.sources, *config.validation_sources, *config.curate.decontaminate, *config.general]
    sources = {path: state["blake2b"] for path, state in _all_states(named, {}).items()}
    files_of = about["sources"].keys() | sources.keys()
    changed += [f"the bytes of {path}" for path in sorted(files_of) if about["sources"].get(path) != sources.get(path)]
    if changed:
        raise DataError(
            f"{out}: was prepared otherwise ({'; '.join(changed)}). Choose another prepare.out, or prepare anew with --fresh "
            "(the old folder is kept)"
        )
    return Report(out, about["funnel"], about["splits"], was_already_prepared=True)


def _changed(name: str, before: Any, now: Any) -> list[str]:
    """The settings that differ, section by section."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [line for key in now for line in _changed(f"{name}.{key}", before.get(key), now[key])]
    return [] if before == now else [f"{name}: {before!r} → {now!r}"]


def available_workers() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
