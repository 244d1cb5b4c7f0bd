"""One YAML file describes a run: its schema, its checks and the numbers derived from it.

Everything is checked before any process starts. An error names the file, the key, the value, the rule and the remedy.
"""

from __future__ import annotations

import datetime
import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from sft_dist.errors import ConfigError


def _float_from_text(value: Any) -> Any:
    """YAML 1.1 reads `1e-5` (no dot) as text; people mean the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


Float = Annotated[float, BeforeValidator(_float_from_text)]
Column = str | int


class Section(BaseModel):
    """A part of the run file: frozen, typed, and closed to unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


Schema = Literal["label", "prompt_response", "messages", "sharegpt", "alpaca", "self_instruct", "text", "tokens"]
Format = Literal["jsonl", "json", "csv", "tsv", "txt", "parquet", "megatron", "nanogpt"]


class SourceConfig(Section):
    """One file (or glob, or folder, or dataset of the Hugging Face hub) of raw records, and how to read it."""

    path: str
    """A file, a glob or a folder, relative to the current directory; or `hf:` and the id of a dataset on the hub."""
    schema_: Schema | None = Field(default=None, alias="schema")
    """How a record becomes a conversation; default: found from the first records, and said aloud."""
    format: Format | None = None
    """Default: from the file's suffix; each also as .gz or .zst. `megatron` and `nanogpt` hold token ids."""
    delimiter: str | None = Field(default=None, min_length=1, max_length=1)
    """Column separator; a tab means that quotes are ordinary characters. Implies csv or tsv."""
    text: Column = "text"
    """Column of the text (label and text schemas): a name, or a 0-based number in a file without a header."""
    label: Column = "label"
    """Column of the class name."""
    prompt: Column = "prompt"
    response: Column = "response"
    messages: Column = "messages"
    subset: str | None = None
    """Configuration of an `hf:` dataset."""
    split: str = "train"
    """Split of an `hf:` dataset."""


class SentencePieceTraining(Section):
    """How `prepare` trains a sentencepiece tokenizer on the training split."""

    vocab_size: int = Field(default=8000, ge=300)
    """Pieces, control tokens and the 256 byte pieces included."""
    byte_fallback: bool = True
    """Spell unknown characters as bytes, so that no text is lost."""


class TrainedTokenizer(Section):
    """A tokenizer to be trained, instead of one to be loaded."""

    sentencepiece: SentencePieceTraining


class SelectConfig(Section):
    """LIMA-style selection: of what survives everything else, the best and most different examples."""

    count: int = Field(ge=1)
    """Training examples to keep."""
    quality: Float = Field(default=0.5, ge=0.0, le=1.0)
    """0 spreads the choice as widely as possible, 1 takes the highest quality only."""


class CurateConfig(Section):
    """What is mended, and what is dropped: each change and each drop is counted, each drop told in `rejects.jsonl`."""

    normalise: Literal["NFC", "NFKC"] | None = "NFC"
    """Unicode form of all text; null: as it comes."""
    control_characters: bool = True
    """Remove control characters; carriage returns and page ends become line ends (tabs stay)."""
    mojibake: bool = True
    """Repair text that was decoded wrongly (`schÃ¶n` → `schön`), with ftfy."""
    outer_white_space: bool = True
    """Remove white space around each text; false keeps it, as an indented code completion may need."""
    html_entities: bool = False
    """Turn `&amp;` into `&`; off, because an example may be about HTML."""
    strip_end_of_text: bool = False
    """Remove the tokenizer's end token where it is spelled out at the end of a response."""
    min_prompt_characters: int = Field(default=1, ge=1)
    max_prompt_characters: int | None = Field(default=None, ge=1)
    min_response_characters: int = Field(default=1, ge=1)
    max_response_characters: int | None = Field(default=None, ge=1)
    max_repetition: Float | None = Field(default=None, gt=0.0, le=1.0)
    """Drop a response when more than this share of its words lies in repeated 5-word sequences; 0.3 is usual."""
    max_symbols: Float | None = Field(default=None, gt=0.0, le=1.0)
    """Drop a response when more than this share of its characters is neither letter, digit nor space."""
    languages: list[str] | None = None
    """Keep only these languages (ISO 639-1, as `[en, de]`); needs the extra `sft-dist[language]`."""
    duplicates: bool = True
    """Drop exact repeats of prompt and response (before the split, or the score is a lie)."""
    same_prompt: Literal["keep", "first", "last", "longest"] = "keep"
    """Which answers stay when one prompt has several."""
    near_duplicates: Float | None = Field(default=None, gt=0.0, lt=1.0)
    """Drop training examples whose words are this similar (Jaccard, by MinHash) to an earlier one; 0.8 is usual."""
    near_validation: Float | None = Field(default=0.8, gt=0.0, lt=1.0)
    """Drop training examples whose prompt is this similar to a validation one; null: allow them."""
    decontaminate: list[SourceConfig] = []
    """Evaluation files: training examples that contain what they hold are dropped."""
    decontaminate_validation: bool = False
    """The same against the validation split; off, because prompts often share a long instruction by design."""
    decontaminate_words: int = Field(default=13, ge=3)
    """An evaluation text and a training example overlap when they share so many words in a row."""
    select: SelectConfig | None = None
    """Keep only the best-spread, highest-quality examples (Zhou et al. 2023, "LIMA"); needs `sft-dist[select]`."""


class PrepareConfig(Section):
    """Raw records → shards."""

    sources: list[SourceConfig] = Field(min_length=1)
    validation_sources: list[SourceConfig] = []
    """Files that are validation as a whole; with them `validation_fraction` is usually 0."""
    curate: CurateConfig = CurateConfig()
    template: str = "plain"
    """`plain`, `alpaca`, `chat`, `chatml`, `llama2`, `llama3`; `tokenizer` (its own chat template); a `.jinja` file; or a text
    with `{text}` that the prompt is set into (label tasks)."""
    tokenizer: str | TrainedTokenizer | None = None
    """A Hugging Face id or folder, a sentencepiece `.model`, or `{sentencepiece: {…}}` to train one; default: the model's own."""
    seq_len: int = Field(default=1024, ge=16)
    """Tokens of a row."""
    long_documents: Literal["split", "truncate_turns", "drop", "error"] = "split"
    """What becomes of more than `seq_len` tokens. `split` loses no target: further rows go on, with context before them;
    `truncate_turns` leaves out the last turns; each is counted."""
    packing: Literal["best_fit", "concat", "none"] = "best_fit"
    """How documents share rows: whole ones fitted together, one stream cut into rows (plain text), or one a row."""
    validation_fraction: Float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the records held out, chosen by a hash of the prompt."""
    max_reject_fraction: Float = Field(default=0.01, ge=0.0, le=1.0)
    """Above this share of unreadable records `prepare` stops."""
    rows_per_shard: int = Field(default=65_536, ge=1)
    """Rows of one shard file."""
    seed: int = Field(default=0, ge=0)
    out: str
    """Folder of the shards."""


class ModelConfig(Section):
    """The model: pre-trained, or from scratch."""

    name_or_path: str | None = None
    """A Hugging Face id or folder with safetensors weights."""
    config: dict[str, Any] | None = None
    """A transformers configuration (with `model_type`) to build from scratch."""
    init: Literal["scratch", "pretrained"] | None = None
    """Default: `pretrained` with `name_or_path`, `scratch` with `config`."""
    dropout: Float | None = Field(default=None, ge=0.0, lt=1.0)
    """Sets every dropout of the model; default: 0 from scratch, what its config says when pre-trained."""

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        if (self.name_or_path is None) == (self.config is None):
            raise ValueError("exactly one of name_or_path and config is needed; remove one, or add one")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError('config needs a model_type; add for example "model_type: gpt2"')
        if self.init == "pretrained" and self.name_or_path is None:
            raise ValueError("init: pretrained needs name_or_path; name a model, or say init: scratch")
        return self

    @property
    def is_scratch(self) -> bool:
        """Whether the weights start random."""
        return self.init == "scratch" or (self.init is None and self.name_or_path is None)


class BlockOrder(Section):
    """An order of the rows for parallel file systems, which are slow at small random reads."""

    block_rows: int = Field(default=1024, ge=1)
    """Consecutive rows that stay near each other; the blocks are shuffled."""
    window_blocks: int = Field(default=64, ge=1)
    """Blocks whose rows are shuffled together: the more, the better mixed and the more files open at a time."""


class TrainConfig(Section):
    """Shards → optimizer steps."""

    global_batch_rows: int | None = Field(default=None, ge=1)
    """Rows of one optimizer step over all ranks (this, or `global_batch_samples`)."""
    global_batch_samples: int | None = Field(default=None, ge=1)
    """Documents of one optimizer step, on average; turned into rows by the shards' documents per row."""
    micro_batch_rows: int = Field(default=1, ge=1)
    """Rows of one forward pass on one rank."""
    epochs: Float | None = Field(default=None, gt=0)
    """Passes over the rows (this, or `max_steps`); fractions are allowed."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; with `epochs` too, whichever ends first."""
    learning_rate: Float = Field(default=2e-5, gt=0)
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """What the learning rate does after the warm-up; linear and cosine end at 0."""
    warmup_ratio: Float = Field(default=0.03, ge=0.0, lt=1.0)
    """Share of the steps over which the learning rate rises from 0."""
    weight_decay: Float = Field(default=0.0, ge=0.0)
    """AdamW's decay, for matrices only (not biases, norms)."""
    beta1: Float = Field(default=0.9, ge=0.0, lt=1.0)
    beta2: Float = Field(default=0.999, ge=0.0, lt=1.0)
    epsilon: Float = Field(default=1e-8, gt=0)
    max_grad_norm: Float | None = Field(default=1.0, gt=0)
    """Clip the global gradient norm to this; null: no clipping."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Compute precision; masters, accumulation and reduction are fp32 always. fp16 (GPU only) scales the loss by itself."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    seed: int = Field(default=0, ge=0)
    order: Literal["rows"] | BlockOrder = "rows"
    """How the rows of an epoch are shuffled: `rows`, all of them; or `{block_rows: 1024, window_blocks: 64}`."""
    hang_seconds: Float | None = Field(default=600.0, ge=1.0)
    """A rank without progress for so long is named, and the run ended with exit code 75; null: waited for."""
    log_every_steps: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _one_of_each(self) -> TrainConfig:
        if (self.global_batch_rows is None) == (self.global_batch_samples is None):
            raise ValueError("exactly one of global_batch_rows and global_batch_samples is needed; add or remove one")
        if self.epochs is None and self.max_steps is None:
            raise ValueError("one of epochs and max_steps is needed; add for example epochs: 3")
        return self


class EarlyStoppingConfig(Section):
    """When a run ends before its last step: a metric of the validation set no longer improves."""

    metric: Literal["validation_loss", "validation_accuracy", "validation_f1"] = "validation_loss"
    """Of a label task, accuracy and F1 are then measured at every evaluation."""
    patience: int = Field(default=3, ge=1)
    """The run ends after so many evaluations in a row that did not improve on the best one."""
    min_improvement: Float = Field(default=0.0, ge=0.0)
    """What counts as an improvement on the best: more than this, in the metric's own unit."""
    warmup_steps: int = Field(default=0, ge=0)
    """Evaluations before this step are not judged."""


class EvaluateConfig(Section):
    """What is measured during the run; always at step 0 and at the end as well."""

    every_steps: int | None = Field(default=None, ge=1)
    """Validation loss every so many steps; null: only at step 0 and at the end."""
    samples: int = Field(default=4, ge=0)
    """Validation prompts answered before and after."""
    max_new_tokens: int = Field(default=48, ge=1)
    """Length limit of a sample answer."""
    early_stopping: EarlyStoppingConfig | None = None
    """End when a metric no longer improves; its best checkpoint is kept, and is what `export` takes."""

    @model_validator(mode="after")
    def _judged_when(self) -> EvaluateConfig:
        if self.early_stopping is not None and self.every_steps is None:
            raise ValueError("early_stopping judges evaluations, and there are none; add for example every_steps: 100")
        return self


class CheckpointConfig(Section):
    """When the state of the run is saved, and how much of it is kept."""

    every_steps: int | None = Field(default=None, ge=1)
    """null: only at the end, and when the run is asked to stop."""
    keep_last: int = Field(default=2, ge=1)
    """The newest complete ones stay; older ones are removed."""
    keep_best: int = Field(default=0, ge=0)
    """And so many of the lowest validation loss, of those saved at a step that was evaluated."""
    keep_every_steps: int | None = Field(default=None, ge=1)
    """And those at a multiple of so many steps, for good."""


def _moment(value: Any) -> Any:
    """YAML reads most moments by itself, and some as text; a day means its beginning. Without an offset: this machine's."""
    if isinstance(value, str):
        try:
            value = datetime.datetime.fromisoformat(value)
        except ValueError:
            raise ValueError(f"{value!r} is no moment; write it as in 2027-01-31T18:00:00+01:00") from None
    if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
        value = datetime.datetime(value.year, value.month, value.day)
    return value.astimezone() if isinstance(value, datetime.datetime) else value


class Money(NamedTuple):
    """An amount and its currency."""

    amount: float
    currency: str


def money(text: str) -> Money:
    """What `cost` and `price_per_gpu_hour` hold; raises ValueError.

    >>> money("2.50 EUR")
    Money(amount=2.5, currency='EUR')
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Z]{3})", text.strip())
    if found is None:
        raise ValueError(f"{text!r} is no money; write an amount and a currency, as in 2.50 EUR")
    return Money(float(found[1]), found[2])


class BudgetConfig(Section):
    """What the run may cost over all its lives: before the first limit is reached it ends, saved and measured."""

    gpu_hours: Float | None = Field(default=None, gt=0)
    """Wall time of all lives times their GPUs: start-up, evaluation, saving and lives that were killed count."""
    cost: str | None = None
    """As in `250 EUR`; needs price_per_gpu_hour."""
    price_per_gpu_hour: str | None = None
    """As in `2.10 EUR`; alone it only shows what was spent."""
    deadline: Annotated[datetime.datetime, BeforeValidator(_moment)] | None = None
    """As in 2027-01-31T18:00:00+01:00."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Tokens of the rows that were trained on, without padding."""

    @model_validator(mode="after")
    def _one_currency(self) -> BudgetConfig:
        cost, price = (None if text is None else money(text) for text in (self.cost, self.price_per_gpu_hour))
        if cost is not None and price is None:
            raise ValueError("cost needs a price_per_gpu_hour; add for example price_per_gpu_hour: 2.10 EUR")
        if price is not None and not price.amount:
            raise ValueError("price_per_gpu_hour is 0, so that any cost would do; leave both out")
        if cost is not None and cost.currency != price.currency:
            raise ValueError(f"cost is in {cost.currency} and price_per_gpu_hour in {price.currency}; use one currency")
        return self

    @property
    def gpu_seconds(self) -> float | None:
        """The tighter one of `gpu_hours` and `cost`.

        >>> BudgetConfig(gpu_hours=100, cost="21 EUR", price_per_gpu_hour="2.10 EUR").gpu_seconds / 3600
        10.0
        """
        limits = [] if self.gpu_hours is None else [self.gpu_hours * 3600]
        if self.cost is not None and self.price_per_gpu_hour is not None:
            limits.append(money(self.cost).amount / money(self.price_per_gpu_hour).amount * 3600)
        return min(limits, default=None)


class MixtureConfig(Section):
    """One prepared set of a mixture, and how much of it."""

    shards: str
    """Folder of the set: the `prepare.out` of its own run file."""
    weight: Float = Field(gt=0)
    """Share of the tokens, in any unit: 3.0 beside 1.0 is three quarters."""
    name: str | None = Field(default=None, pattern=r"^[\w.-]+$")
    """What its metrics are called (`loss/NAME`); default: the folder's name, or of `x/shards` the name `x`."""

    @property
    def label(self) -> str:
        """The name, given or derived.

        >>> MixtureConfig(shards="runs/chat/shards", weight=1.0).label
        'chat'
        """
        folder = Path(self.shards)
        return self.name or (folder.parent.name if folder.name == "shards" else "") or folder.name


class RunConfig(Section):
    """A run file."""

    run_dir: str
    """Everything of the run: run.yaml, metrics.jsonl, tensorboard/, checkpoints/, verdicts/."""
    prepare: PrepareConfig | None = None
    """Raw records of the run (this, or `mixture`)."""
    mixture: list[MixtureConfig] = Field(default=[], max_length=64)
    """Prepared sets to train on; `train.epochs` then counts the rows of all sets together."""
    model: ModelConfig
    train: TrainConfig
    zero: str = "ds_configs/zero2.json"
    """A DeepSpeed file with only what DeepSpeed owns: stage, offload, buckets, overlap."""
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    budget: BudgetConfig = BudgetConfig()

    @model_validator(mode="after")
    def _one_origin_of_rows(self) -> RunConfig:
        if (self.prepare is None) == (not self.mixture):
            raise ValueError("exactly one of prepare and mixture is needed; add or remove one")
        folders = [str(Path(entry.shards).resolve()) for entry in self.mixture]
        labels = [entry.label for entry in self.mixture]
        for entry, folder, label in zip(self.mixture, folders, labels, strict=True):
            if folders.count(folder) > 1:
                raise ValueError(f"mixture: {entry.shards} is there twice; name it once, with the sum of the weights")
            if labels.count(label) > 1:
                raise ValueError(f"mixture: two sets are called {label!r}; give each another name")
        return self

    @property
    def shards_dirs(self) -> list[str]:
        """The folders that the run's rows come from; tokenizer and sample prompts are the first one's."""
        return [entry.shards for entry in self.mixture] if self.prepare is None else [self.prepare.out]


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and check a run file with dotted overrides (`train.learning_rate=1e-5`), and the DeepSpeed file that it names.

    Raises ConfigError with one line a mistake: file, key, value, rule and remedy.
    """
    config = read(path, overrides)
    if zero_stage(zero_config(config.zero)) == 0 and config.train.precision != "fp32":
        raise ConfigError(
            f"{path}: train.precision: {config.train.precision!r} is not allowed at ZeRO stage 0 ({config.zero}): DeepSpeed's optimizer takes a "
            "wrong first step there. Use ds_configs/zero1.json, or train.precision=fp32"
        )
    return config


def read(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and check a run file alone: all that is needed once a run has been trained. Raises as `load` does."""
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such run file; name an existing one, such as {_EXAMPLE}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); name a YAML run file such as {_EXAMPLE}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: 2026-02-30
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}. Mend that line") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a run file is a mapping of keys, this is {type(values).__name__}; see {_EXAMPLE}")
    for override in overrides:
        _apply(values, override)
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        lines = [f"{path}: {_explain(problem)}" for problem in _told_once(error.errors())]
        raise ConfigError("\n".join(lines)) from None
    return config


_EXAMPLE = "examples/sms-spam/run.yaml"


def _apply(values: dict[str, Any], override: str) -> None:
    """Set one dotted key in place; the value is read as YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: not of the form key=value; write for example train.epochs=3")
    *parents, last = key.split(".")
    place: Any = values
    for parent in parents:
        place = place.setdefault(parent, {}) if isinstance(place, dict) else place
        if not isinstance(place, dict):
            raise ConfigError(f"override {override!r}: {parent} is not a section with keys; check the dots")
    try:
        place[last] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # ValueError: 2026-02-30
        raise ConfigError(f"override {override!r}: the value is not YAML; quote it, as in '{key}=\"…\"'") from None


def _explain(problem: Any) -> str:
    """One pydantic problem as key, value, rule and remedy."""
    where = [str(part) for part in _written(problem)]
    key, kind, value = ".".join(where) or "run file", problem["type"], problem["input"]
    known = _keys_at(RunConfig, problem["loc"][:-1])
    if kind == "extra_forbidden":
        close = difflib.get_close_matches(where[-1], known, n=1)
        remedy = f"did you mean {'.'.join([*where[:-1], close[0]])}?" if close else f"keys here: {', '.join(known)}"
        return f"{key}: unknown key (value {value!r}); {remedy}"
    if kind == "missing":
        return f"{key}: missing, and it has no default; add it"
    rule = problem["msg"].removeprefix("Value error, ")
    rule = rule[:1].lower() + rule[1:]
    if kind == "value_error":
        return f"{key}: {rule}"
    if kind == "literal_error":
        close = difflib.get_close_matches(str(value), re.findall(r"'([^']+)'", rule), n=1)
        return f"{key}: {value!r} is not allowed: {rule}" + (
            f"; did you mean {close[0]}?" if close else "; use one of these"
        )
    return f"{key}: {value!r} is not allowed: {rule}; correct the value"


def _told_once(problems: Sequence[Any]) -> list[Any]:
    """Of a union that fails, only the branch that came furthest: the one the person meant."""
    furthest: dict[tuple, Any] = {}
    for problem in problems:
        last = len(problem["loc"]) - (problem["type"] == "extra_forbidden")
        branches = [place for place, part in enumerate(problem["loc"][:last]) if _is_branch(part)]
        key = problem["loc"][: branches[0]] if branches else problem["loc"]
        if key not in furthest or _told(problem) > _told(furthest[key]):
            furthest[key] = problem
    return list(furthest.values())


def _told(problem: Any) -> tuple[int, bool]:
    """How much a problem says: what came further, and of a misspelt key and the missing one the former."""
    return len(problem["loc"]), problem["type"] == "extra_forbidden"


def _written(problem: Any) -> list[Any]:
    """The location without the branches of unions; an unknown key is a person's word even where it is called like one."""
    if not problem["loc"]:  # a rule of the whole file
        return []
    *parents, last = problem["loc"]
    is_own = problem["type"] == "extra_forbidden" or not _is_branch(last)
    return [part for part in parents if not _is_branch(part)] + [last] * is_own


def _is_branch(part: Any) -> bool:
    """Pydantic names the branch of a union in the location; a person never wrote it."""
    names = ("str", "TrainedTokenizer", "int", "BlockOrder")
    return part in names or (isinstance(part, str) and part.startswith(("function-", "literal[")))


def _keys_at(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """The keys a section of the run file may have."""
    for part in location:
        field = model.model_fields.get(part) if isinstance(part, str) else None
        if field is not None:
            model = next((m for m in _sections(field.annotation)), model)
    return sorted(field.alias or name for name, field in model.model_fields.items())


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections(argument)


# What the run file owns: in a DeepSpeed file these would be a second, silent opinion.
_OWNED_BY_RUN_FILE = {
    "train_batch_size": "train.global_batch_rows",
    "train_micro_batch_size_per_gpu": "train.micro_batch_rows",
    "gradient_accumulation_steps": "train.global_batch_rows",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.learning_rate and its neighbours",
    "scheduler": "train.schedule",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "data_types": "train.precision",
    "communication_data_type": "train.precision",
}
_DEEPSPEED_KEYS = {
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "comms_logger",
    "wall_clock_breakdown",
    "memory_breakdown",
}


# What a ZeRO section may say. DeepSpeed knows more (NVMe, quantised communication, ZeRO++): checkpoints have not been proved
# for those, and what is not proved is refused.
_ZERO_KEYS = {
    "stage",
    "contiguous_gradients",
    "overlap_comm",
    "reduce_scatter",
    "reduce_bucket_size",
    "allgather_partitions",
    "allgather_bucket_size",
    "sub_group_size",
    "offload_optimizer",
    "offload_param",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_module_granularity_threshold",
}


def zero_config(name: str) -> dict[str, Any]:
    """Read a DeepSpeed file: a path, or `ds_configs/…` of the installed package.

    Raises ConfigError for a missing or broken file, a key that the run file owns, "auto", or an unknown key (DeepSpeed
    would ignore those).
    """
    path = _zero_path(name)
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}; mend that line") from None
    if not isinstance(values, dict) or not isinstance(values.get("zero_optimization", {}), dict):
        raise ConfigError(f"{path}: zero_optimization must be a mapping, as in ds_configs/zero2.json")
    for key in values:
        if key in _OWNED_BY_RUN_FILE:
            raise ConfigError(f"{path}: {key} is owned by the run file; remove it and set {_OWNED_BY_RUN_FILE[key]}")
        if key not in _DEEPSPEED_KEYS:
            close = difflib.get_close_matches(key, _DEEPSPEED_KEYS, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"keys here: {', '.join(sorted(_DEEPSPEED_KEYS))}"
            raise ConfigError(f"{path}: unknown key {key}; DeepSpeed would ignore it silently; {remedy}")
    section = values.get("zero_optimization", {})
    for key in section.keys() - _ZERO_KEYS:
        close = difflib.get_close_matches(key, _ZERO_KEYS, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"keys here: {', '.join(sorted(_ZERO_KEYS))}"
        raise ConfigError(f"{path}: zero_optimization.{key}: not a key this trainer has proved; {remedy}")
    for key in ("offload_optimizer", "offload_param"):
        offload = section.get(key, {"device": "cpu"})
        is_known = (
            isinstance(offload, dict) and offload.get("device") == "cpu" and offload.keys() <= {"device", "pin_memory"}
        )
        if not is_known or (key in section and section.get("stage", 0) < (3 if key == "offload_param" else 1)):
            raise ConfigError(
                f"{path}: zero_optimization.{key}: {offload!r} is not allowed at stage {section.get('stage', 0)}: write "
                '{"device": "cpu"}, with pin_memory or without; the optimizer from stage 1 on, parameters at stage 3'
            )
    autos = [key for key, value in section.items() if value == "auto"]
    if autos:
        raise ConfigError(f'{path}: zero_optimization.{autos[0]}: "auto" means nothing here; write a number')
    if type(section.get("stage", 0)) is not int or section.get("stage", 0) not in (0, 1, 2, 3):
        raise ConfigError(
            f"{path}: zero_optimization.stage: {section['stage']!r} is not one of 0, 1, 2, 3; use one of these"
        )
    return values


def zero_stage(zero: Mapping[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed configuration (0 when it names none)."""
    return zero.get("zero_optimization", {}).get("stage", 0)


def _zero_path(name: str) -> Path:
    package = Path(__file__).parent
    shipped = [folder / "ds_configs" for folder in (package, package.parent)]
    candidates = [Path(name)] + [folder / Path(name).name for folder in shipped if name.startswith("ds_configs/")]
    for path in candidates:
        if path.is_file():
            return path
    names = sorted(path.name for folder in shipped for path in folder.glob("*.json"))
    close = difflib.get_close_matches(Path(name).name, names, n=1)
    hint = f"did you mean ds_configs/{close[0]}?" if close else f"shipped: {', '.join(names)}"
    raise ConfigError(f"zero: {name!r}: no such DeepSpeed file; {hint}")


@dataclass(frozen=True, slots=True)
class Batch:
    """The arithmetic of one optimizer step, derived once from the run file and the world size."""

    global_batch_rows: int
    micro_batch_rows: int
    accumulation_steps: int
    world_size: int

    def samples(self, documents_per_row: float) -> float:
        """Documents of a step, on average."""
        return self.global_batch_rows * documents_per_row


def derive_batch(
    config: TrainConfig, world_size: int, documents_per_row: float, resumed_rows: int | None = None
) -> Batch:
    """micro-batch x accumulation x ranks = global batch, or a ConfigError that names the nearest batch that divides.

    A batch in samples becomes the nearest dividing number of rows; a resumed run keeps the number it started with.

    >>> train = TrainConfig(global_batch_rows=8, micro_batch_rows=2, epochs=1)
    >>> derive_batch(train, world_size=2, documents_per_row=5.0).accumulation_steps
    2
    >>> train = TrainConfig(global_batch_samples=3840, micro_batch_rows=4, epochs=1)
    >>> derive_batch(train, world_size=8, documents_per_row=10.0).global_batch_rows
    384
    """
    unit = config.micro_batch_rows * world_size
    if config.global_batch_samples is not None and resumed_rows is not None:
        rows = resumed_rows
    elif config.global_batch_samples is not None:
        rows = max(1, round(config.global_batch_samples / documents_per_row / unit)) * unit
    else:
        rows = config.global_batch_rows or 0
    if rows % unit:
        nearest = sorted({max(unit, rows // unit * unit), (rows // unit + 1) * unit})
        raise ConfigError(
            f"train.global_batch_rows: {rows} is not a multiple of micro_batch_rows {config.micro_batch_rows} x "
            f"{world_size} processes = {unit}. Use {' or '.join(map(str, nearest))}, or another micro_batch_rows"
        )
    return Batch(rows, config.micro_batch_rows, rows // unit, world_size)


def total_rows(config: TrainConfig, batch: Batch, num_rows: int) -> int:
    """Rows that the whole run feeds: one continuous stream over the epochs, cut by `max_steps`.

    >>> train = TrainConfig(global_batch_rows=8, epochs=2.5)
    >>> total_rows(train, derive_batch(train, 1, 1.0), num_rows=100)
    250
    """
    limits = []
    if config.epochs is not None:
        limits.append(max(1, round(config.epochs * num_rows)))
    if config.max_steps is not None:
        limits.append(config.max_steps * batch.global_batch_rows)
    return min(limits)


def num_steps(rows: int, batch: Batch) -> int:
    """Optimizer steps that `rows` rows take; only the last one can be short.

    >>> num_steps(250, Batch(8, 8, 1, 1))
    32
    """
    return math.ceil(rows / batch.global_batch_rows)
