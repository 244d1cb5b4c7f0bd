"""The sections and keys of a run file: what each may hold, its default, and what it means."""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator


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

    path: str = Field(examples=["data/train.jsonl", "data/*.parquet", "hf:tatsu-lab/alpaca"])
    """A file, a glob or a folder, relative to the current directory; or `hf:` and the id of a dataset on the hub."""
    schema_: Schema | None = Field(default=None, alias="schema", examples=["text"])
    """How a record becomes a conversation; default: found from the first records, and said aloud."""
    format: Format | None = Field(default=None, examples=["jsonl"])
    """Default: from the file's suffix; each also as .gz or .zst. `megatron` and `nanogpt` hold token ids."""
    delimiter: str | None = Field(default=None, min_length=1, max_length=1, examples=[";"])
    """Column separator; a tab means that quotes are ordinary characters. Implies csv or tsv."""
    text: Column = "text"
    """Column of the text (label and text schemas): a name, or a 0-based number in a file without a header."""
    label: Column = "label"
    """Column of the class name."""
    prompt: Column = "prompt"
    """Column of the question (prompt_response schema); unnamed, the usual pairs are tried, such as question and answer."""
    response: Column = "response"
    """Column of the answer."""
    messages: Column = "messages"
    """Column of the list of messages (messages and sharegpt schemas)."""
    subset: str | None = Field(default=None, examples=["main"])
    """Configuration of an `hf:` dataset."""
    split: str = "train"
    """Split of an `hf:` dataset."""
    license: str | None = Field(default=None, examples=["cc-by-4.0"])
    """Licence of the records, as `cc-by-4.0`: told on the model card of an export; the rows do not depend on it."""


class SentencePieceTraining(Section):
    """How `prepare` trains a sentencepiece tokenizer on the training split."""

    vocab_size: int = Field(default=8000, ge=300)
    """Pieces at most, control tokens and the 256 byte pieces included; a few short texts give fewer, which `prepare` says."""
    byte_fallback: bool = True
    """Spell unknown characters as bytes, so that no text is lost."""


class TrainedTokenizer(Section):
    """A tokenizer to be trained, instead of one to be loaded."""

    sentencepiece: SentencePieceTraining
    """By byte-pair encoding, on the training split."""


class SelectConfig(Section):
    """LIMA-style selection: of what survives everything else, the best and most different examples."""

    count: int = Field(ge=1, examples=[1000])
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
    """Drop records with a shorter prompt."""
    max_prompt_characters: int | None = Field(default=None, ge=1, examples=[20_000])
    """Drop records with a longer prompt; null: none is too long."""
    min_response_characters: int = Field(default=1, ge=1)
    """Drop records with a shorter response."""
    max_response_characters: int | None = Field(default=None, ge=1, examples=[20_000])
    """Drop records with a longer response; null: none is too long."""
    max_repetition: Float | None = Field(default=None, gt=0.0, le=1.0, examples=[0.3])
    """Drop a response when more than this share of its words lies in repeated 5-word sequences; 0.3 is usual."""
    max_symbols: Float | None = Field(default=None, gt=0.0, le=1.0, examples=[0.3])
    """Drop a response when more than this share of its characters is neither letter, digit nor space."""
    languages: list[str] | None = Field(default=None, examples=[["en", "de"]])
    """Keep only these languages (ISO 639-1, as `[en, de]`); needs the extra `sft-dist[language]`."""
    duplicates: bool = True
    """Drop exact repeats of prompt and response (before the split, or the score is a lie)."""
    same_prompt: Literal["keep", "first", "last", "longest"] = "keep"
    """Which answers stay when one prompt has several."""
    near_duplicates: Float | None = Field(default=None, gt=0.0, lt=1.0, examples=[0.8])
    """Drop training examples whose words are this similar (Jaccard, by MinHash) to an earlier one; 0.8 is usual."""
    near_validation: Float | None = Field(default=0.8, gt=0.0, lt=1.0)
    """Drop training examples whose prompt is this similar to a validation one; null: allow them."""
    decontaminate: list[SourceConfig] = Field(default=[], examples=[[{"path": "data/benchmark.jsonl"}]])
    """Evaluation files: training examples that contain what they hold are dropped."""
    decontaminate_validation: bool = False
    """The same against the validation split; off, because prompts often share a long instruction by design."""
    decontaminate_words: int = Field(default=13, ge=3)
    """An evaluation text and a training example overlap when they share so many words in a row."""
    select: SelectConfig | None = Field(default=None, examples=[{"count": 1000}])
    """Keep only the best-spread, highest-quality examples (Zhou et al. 2023, "LIMA"); needs `sft-dist[select]`."""


class PrepareConfig(Section):
    """Raw records → shards."""

    sources: list[SourceConfig] = Field(min_length=1, examples=[[{"path": "data/train.jsonl"}]])
    """Files of raw records; what is not held out of them is trained on."""
    validation_sources: list[SourceConfig] = Field(default=[], examples=[[{"path": "data/validation.jsonl"}]])
    """Files that are validation as a whole; with them `validation_fraction` is usually 0."""
    general: list[SourceConfig] = Field(default=[], examples=[[{"path": "data/general.txt"}]])
    """Plain text that the model should not forget: its perplexity is measured before and after. Nothing of it is trained on:
    training examples that overlap with it are dropped as `curate.decontaminate` does."""
    curate: CurateConfig = CurateConfig()
    """What is mended, and what is dropped."""
    template: str = "plain"
    """`plain`, `alpaca`, `chat`, `chatml`, `llama2`, `llama3`; `tokenizer` (its own chat template); a `.jinja` file; or a text
    with `{text}` that the prompt is set into (label tasks)."""
    tokenizer: str | TrainedTokenizer | None = Field(
        default=None, examples=["gpt2", {"sentencepiece": {"vocab_size": 8000}}]
    )
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
    """What decides which records are held out, and where packing and selection have a choice."""
    out: str = Field(examples=["runs/mine/shards"])
    """Folder of the shards."""

    @model_validator(mode="after")
    def _plain_general_text(self) -> PrepareConfig:
        for source in self.general:
            if source.schema_ not in (None, "text"):
                raise ValueError(
                    f"general: {source.path} has schema {source.schema_}, and general text is plain text; leave the schema out, and "
                    "name the column with text"
                )
        return self


class LoraConfig(Section):
    """LoRA: the model stays as it is, and small matrices beside its linear layers are trained; needs the extra `sft-dist[lora]`."""

    rank: int = Field(default=16, ge=1)
    """Width of the trained matrices: the larger, the more can be learned, and the more memory is needed."""
    alpha: Float = Field(default=32.0, gt=0.0)
    """What is learned is scaled by alpha / rank."""
    dropout: Float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout of what goes into the trained matrices."""
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = Field(
        default="all-linear", examples=[["q_proj", "v_proj"]]
    )
    """Which layers get them: `all-linear`, which leaves the head alone, or names such as `[q_proj, v_proj]`."""
    quantize: Literal["nf4"] | None = Field(default=None, examples=["nf4"])
    """QLoRA: the linear layers are kept in 4 bits a weight. For ZeRO stages 0 to 2; needs the extra `sft-dist[qlora]`."""


class ModelConfig(Section):
    """The model: pre-trained, or from scratch."""

    name_or_path: str | None = Field(default=None, examples=["gpt2"])
    """A Hugging Face id or folder with safetensors weights."""
    config: dict[str, Any] | None = Field(
        default=None, examples=[{"model_type": "gpt2", "n_layer": 3, "n_embd": 128, "n_head": 4}]
    )
    """A transformers configuration (with `model_type`) to build from scratch."""
    init: Literal["scratch", "pretrained"] | None = Field(default=None, examples=["scratch"])
    """Default: `pretrained` with `name_or_path`, `scratch` with `config`."""
    dropout: Float | None = Field(default=None, ge=0.0, lt=1.0, examples=[0.1])
    """Sets every dropout of the model; default: 0 from scratch, what its config says when pre-trained."""
    lora: LoraConfig | None = Field(default=None, examples=[{"rank": 16, "alpha": 32}])
    """Train adapters beside the frozen model instead of the model itself; null: every weight is trained."""
    license: str | None = Field(default=None, examples=["apache-2.0"])
    """Licence that the trained model is given away under, as `apache-2.0`: told on the model card of an export."""

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        if (self.name_or_path is None) == (self.config is None):
            raise ValueError("exactly one of name_or_path and config is needed; remove one, or add one")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError('config needs a model_type; add for example "model_type: gpt2"')
        if self.init == "pretrained" and self.name_or_path is None:
            raise ValueError("init: pretrained needs name_or_path; name a model, or say init: scratch")
        if self.lora is not None and self.is_scratch:
            raise ValueError(
                "lora adapts a pre-trained model, and this one is from scratch; name one, or leave lora out"
            )
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


class BadStepsConfig(Section):
    """What is done about steps whose loss or gradient is no number: they never reach the weights, and their rows are listed."""

    roll_back_after: int | None = Field(default=3, ge=1)
    """So many in a row, and the run goes back to the last checkpoint before them and on past their rows; null: never."""
    max_roll_backs: int = Field(default=2, ge=0)
    """Over the whole run; after these it ends as `diverged`."""
    spike_z: Float | None = Field(default=None, gt=0, examples=[10])
    """Steps whose gradient norm has a larger robust z-score than this are bad too; 10 is far out. null: none is."""
    spike_window: int = Field(default=64, ge=16)
    """Steps that a gradient norm is compared with."""


def _no_number(value: Any) -> Any:
    """To Python 0 and False are equal; a run file may have one of them only."""
    return str(value) if type(value) in (int, float) else value


class TrainConfig(Section):
    """Shards → optimizer steps."""

    global_batch_rows: int | None = Field(default=None, ge=1, examples=[64])
    """Rows of one optimizer step over all ranks (this, or `global_batch_samples`)."""
    global_batch_samples: int | None = Field(default=None, ge=1, examples=[3840])
    """Documents of one optimizer step, on average; turned into rows by the shards' documents per row."""
    micro_batch_rows: Annotated[int, Field(ge=1)] | Literal["auto"] = 1
    """Rows of one forward pass on one rank; `auto`: as many as divide the batch and fit the GPU, the batch stays as it is."""
    epochs: Float | None = Field(default=None, gt=0, examples=[3])
    """Passes over the rows (this, or `max_steps`); fractions are allowed."""
    max_steps: int | None = Field(default=None, ge=1, examples=[1000])
    """Optimizer steps; with `epochs` too, whichever ends first."""
    learning_rate: Float = Field(default=2e-5, gt=0)
    """The highest one, after the warm-up; 2e-5 suits a pre-trained model, 1e-3 a small one from scratch."""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """What the learning rate does after the warm-up; linear and cosine end at 0."""
    warmup_ratio: Float = Field(default=0.03, ge=0.0, lt=1.0)
    """Share of the steps over which the learning rate rises from 0."""
    weight_decay: Float = Field(default=0.0, ge=0.0)
    """AdamW's decay, for matrices only (not biases, norms)."""
    beta1: Float = Field(default=0.9, ge=0.0, lt=1.0)
    """AdamW's memory of gradients."""
    beta2: Float = Field(default=0.999, ge=0.0, lt=1.0)
    """AdamW's memory of their squares; a run of a hundred steps may want 0.95."""
    epsilon: Float = Field(default=1e-8, gt=0)
    """AdamW's smallest denominator."""
    max_grad_norm: Float | None = Field(default=1.0, gt=0)
    """Clip the global gradient norm to this; null: no clipping."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Compute precision; masters, accumulation and reduction are fp32 always. fp16 (GPU only) scales the loss by itself."""
    attention: Literal[
        "auto", "sdpa", "varlen", "by_document", "flash_attention_2", "flash_attention_3", "flex_attention", "eager"
    ] = "auto"
    """Kernel for packed rows; `auto`: the fastest one here that is proven at the start. All but sdpa and eager, a model's own way, do no
    work between documents."""
    gradient_checkpointing: Annotated[Literal[False, True, "selective", "offload"], BeforeValidator(_no_number)] = False
    """Recompute activations in the backward pass. `true`: the least memory, a third more compute; `selective`: matrix products that are
    dear and attention are kept, half of that; `offload`: as `true`, and what is kept waits in the memory of the host."""
    compile: bool = False
    """Compile the layers with `torch.compile` (a C++ compiler is needed): the first step takes a minute longer, the others less."""
    fp8: bool = False
    """Matrix products of the layers in 8 bits, by torchao, with a scale for each row (H100 or newer; compile it to be faster); needs the
    extra `sft-dist[fp8]`."""
    sequence_parallel: int = Field(default=1, ge=1)
    """So many neighbouring ranks compute the same rows, each a part of their tokens: for rows too long for one (DeepSpeed Ulysses)."""
    mlp_tile_tokens: int | None = Field(default=None, ge=1, examples=[4096])
    """Feed-forward layers see so many tokens at a time, and are computed again in the backward pass; null: all at once."""
    seed: int = Field(default=0, ge=0)
    """What the order of rows, dropout and the weights of a model from scratch are drawn from."""
    order: Literal["rows"] | BlockOrder = "rows"
    """How the rows of an epoch are shuffled: `rows`, all of them; or `{block_rows: 1024, window_blocks: 64}`."""
    hang_seconds: Float | None = Field(default=600.0, ge=1.0)
    """A rank without progress for so long is named, and the run ended with exit code 75; null: waited for."""
    bad_steps: BadStepsConfig = BadStepsConfig()
    """What is done about steps whose loss or gradient is no number."""
    log_every_steps: int = Field(default=1, ge=1)
    """How often the metrics are written and shown."""

    @model_validator(mode="after")
    def _one_of_each(self) -> TrainConfig:
        if (self.global_batch_rows is None) == (self.global_batch_samples is None):
            raise ValueError("exactly one of global_batch_rows and global_batch_samples is needed; add or remove one")
        if self.epochs is None and self.max_steps is None:
            raise ValueError("one of epochs and max_steps is needed; add for example epochs: 3")
        if self.sequence_parallel > 1 and (self.compile or self.attention in ("sdpa", "flex_attention", "eager")):
            what = "compile" if self.compile else f"attention: {self.attention}"
            raise ValueError(f"sequence_parallel does not go with {what}; leave one out")
        if self.compile and self.gradient_checkpointing == "offload":
            raise ValueError("compile and gradient_checkpointing: offload exclude each other; leave one out")
        if self.fp8 and self.precision != "bf16":
            raise ValueError(f"fp8 goes with precision: bf16, not {self.precision}; change one of them")
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

    every_steps: int | None = Field(default=None, ge=1, examples=[100])
    """Validation loss every so many steps; null: only at step 0 and at the end."""
    samples: int = Field(default=4, ge=0)
    """Validation prompts answered before and after."""
    prompts: list[Annotated[str, Field(min_length=1)]] = Field(default=[], examples=[["Hello"]])
    """Prompts of one's own, answered beside them."""
    samples_every_steps: int | None = Field(default=None, ge=1, examples=[1000])
    """All prompts every so many steps too; null: only before and after."""
    max_new_tokens: int = Field(default=48, ge=1)
    """Length limit of a sample answer."""
    max_forgetting: Float = Field(default=0.1, gt=0)
    """The run warns at its end when the perplexity of `prepare.general` has risen by more than this share."""
    early_stopping: EarlyStoppingConfig | None = Field(default=None, examples=[{"patience": 3}])
    """End when a metric no longer improves; its best checkpoint is kept, and is what `export` takes."""

    @model_validator(mode="after")
    def _judged_when(self) -> EvaluateConfig:
        if self.early_stopping is not None and self.every_steps is None:
            raise ValueError("early_stopping judges evaluations, and there are none; add for example every_steps: 100")
        if self.samples_every_steps is not None and not (self.samples or self.prompts):
            raise ValueError("samples_every_steps answers prompts, and there are none; add prompts, or samples: 4")
        return self


class CheckpointConfig(Section):
    """When the state of the run is saved, and how much of it is kept."""

    every_steps: int | None = Field(default=None, ge=1, examples=[500])
    """So often; null: only at the end, and when the run is asked to stop."""
    keep_last: int = Field(default=2, ge=1)
    """The newest complete ones stay; older ones are removed."""
    keep_best: int = Field(default=0, ge=0)
    """And so many of the lowest validation loss, of those saved at a step that was evaluated."""
    keep_every_steps: int | None = Field(default=None, ge=1, examples=[5000])
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


MOMENT = {"type": "string", "pattern": r"^\d{4}-\d{2}-\d{2}"}
MONEY = r"^(\d+(?:\.\d+)?) ?([A-Z]{3})$"


class Money(NamedTuple):
    """An amount and its currency."""

    amount: float
    currency: str


def money(text: str) -> Money:
    """What `cost` and `price_per_gpu_hour` hold; raises ValueError.

    >>> money("2.50 EUR")
    Money(amount=2.5, currency='EUR')
    """
    found = re.fullmatch(MONEY, text.strip())
    if found is None:
        raise ValueError(f"{text!r} is no money; write an amount and a currency, as in 2.50 EUR")
    return Money(float(found[1]), found[2])


def _money(value: Any) -> Any:
    """Checked where it stands, so that a bare number is told what it lacks."""
    if value is not None:
        money(str(value))
    return value


class BudgetConfig(Section):
    """What the run may cost over all its lives: before the first limit is reached it ends, saved and measured."""

    gpu_hours: Float | None = Field(default=None, gt=0, examples=[100])
    """Wall time of all lives times their GPUs: start-up, evaluation, saving and lives that were killed count."""
    cost: Annotated[str | None, BeforeValidator(_money)] = Field(
        default=None, examples=["250 EUR"], json_schema_extra={"pattern": MONEY}
    )
    """The most it may cost; needs price_per_gpu_hour."""
    price_per_gpu_hour: Annotated[str | None, BeforeValidator(_money)] = Field(
        default=None, examples=["2.10 EUR"], json_schema_extra={"pattern": MONEY}
    )
    """What an hour of one GPU costs; alone it only shows what was spent."""
    deadline: Annotated[datetime.datetime, BeforeValidator(_moment), WithJsonSchema(MOMENT)] | None = Field(
        default=None, examples=["2027-01-31T18:00:00+01:00"]
    )
    """A day means its beginning; without an offset it is this machine's time."""
    max_tokens: int | None = Field(default=None, ge=1, examples=[1_000_000_000])
    """Tokens of the rows that were trained on, without padding."""

    @model_validator(mode="after")
    def _one_currency(self) -> BudgetConfig:
        cost, price = (None if text is None else money(text) for text in (self.cost, self.price_per_gpu_hour))
        if cost is not None and price is None:
            raise ValueError("cost needs a price_per_gpu_hour; add for example price_per_gpu_hour: 2.10 EUR")
        if price is not None and not price.amount:
            raise ValueError("price_per_gpu_hour is 0, so that any cost would do; leave both out")
        if cost is not None and price is not None and cost.currency != price.currency:
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


class WandbConfig(Section):
    """Weights & Biases; needs the extra `sft-dist[wandb]`, and `wandb login` or WANDB_API_KEY."""

    project: str = Field(examples=["sms"])
    """Made where there is none of that name."""
    entity: str | None = Field(default=None, examples=["my-team"])
    """Team or user; null: the one that is logged in."""
    run_name: str | None = Field(default=None, examples=["first"])
    """What the run is called there."""
    group: str | None = Field(default=None, examples=["learning-rates"])
    """Runs of a group are shown together."""
    tags: list[str] = Field(default=[], examples=[["gpt2", "spam"]])
    """Words that the run is found by."""
    mode: Literal["online", "offline"] = "online"
    """`offline` writes to `RUN_DIR/services/wandb`, for `wandb sync` from where there is a network."""


class MlflowConfig(Section):
    """MLflow; needs the extra `sft-dist[mlflow]`."""

    experiment: str = Field(examples=["sms"])
    """Made where there is none of that name."""
    tracking_uri: str | None = Field(default=None, examples=["http://mlflow.example:5000"])
    """As in `http://mlflow.example:5000` or `sqlite:///mlflow.db`; null: what MLFLOW_TRACKING_URI says."""
    run_name: str | None = Field(default=None, examples=["first"])
    """What the run is called there."""


class LoggingConfig(Section):
    """Where the metrics go besides metrics.jsonl, TensorBoard and the console. Keys and passwords never stand here."""

    wandb: WandbConfig | None = Field(default=None, examples=[{"project": "sms"}])
    """Weights & Biases."""
    mlflow: MlflowConfig | None = Field(default=None, examples=[{"experiment": "sms"}])
    """MLflow."""


class MixtureConfig(Section):
    """One prepared set of a mixture, and how much of it."""

    shards: str = Field(examples=["runs/chat/shards"])
    """Folder of the set: the `prepare.out` of its own run file."""
    weight: Float = Field(gt=0, examples=[3.0])
    """Share of the tokens, in any unit: 3.0 beside 1.0 is three quarters."""
    name: str | None = Field(default=None, pattern=r"^[\w.-]+$", examples=["chat"])
    """What its metrics are called (`loss/NAME`); default: the folder's name, or of `x/shards` the name `x`."""
    license: str | None = Field(default=None, examples=["cc-by-4.0"])
    """Licence of its records: told on the model card of an export."""

    @property
    def label(self) -> str:
        """The name, given or derived.

        >>> MixtureConfig(shards="runs/chat/shards", weight=1.0).label
        'chat'
        """
        folder = Path(self.shards)
        return self.name or (folder.parent.name if folder.name == "shards" else "") or folder.name


class ReproducesConfig(Section):
    """What a run of this file must reach: `export` writes it into `reproduce.yaml`, `train` and `verify` compare with it."""

    step: int = Field(ge=0, examples=[1200])
    """The step that was exported."""
    world_size: int = Field(ge=1, examples=[8])
    """Processes that trained it: with as many, and the same versions and hardware, the weights are the same to the bit."""
    zero: dict[str, Any] = Field(examples=[{"zero_optimization": {"stage": 2}}])
    """What the DeepSpeed file said."""
    environment: dict[str, str] = Field(default={}, examples=[{"device": "no GPU"}])
    """Versions and hardware that trained it."""
    identity: dict[str, Any] = Field(examples=[{"seed": 0}])
    """Fingerprints of the model, the rows, the tokenizer and the template."""
    sources: dict[str, str] = Field(default={}, examples=[{"data/train.jsonl": "85dc6c248a00ff0f6235c64ffaffd16a"}])
    """Digests of the files that the rows were made of."""
    ledger: str = Field(examples=["9f0c"])
    """The keyed hash of all rows that were fed until then."""
    weights: str = Field(examples=["41d2"])
    """A digest of the fp32 weights at that step."""
    caveats: list[str] = Field(
        default=[], examples=[["step 500: train.learning_rate was 2e-05 until here and is 1e-05 now"]]
    )
    """Why the file alone may not give the same weights again: what was done by hand, or on other numbers of processes."""


class RunConfig(Section):
    """A run file."""

    run_dir: str = Field(examples=["runs/mine"])
    """Everything of the run: run.yaml, metrics.jsonl, tensorboard/, checkpoints/, verdicts/, services/."""
    prepare: PrepareConfig | None = Field(
        default=None, examples=[{"sources": [{"path": "data/train.jsonl"}], "out": "runs/mine/shards"}]
    )
    """Raw records of the run (this, or `mixture`)."""
    mixture: list[MixtureConfig] = Field(
        default=[], max_length=64, examples=[[{"shards": "runs/chat/shards", "weight": 3.0}]]
    )
    """Prepared sets to train on; `train.epochs` then counts the rows of all sets together."""
    model: ModelConfig
    """What is fine-tuned, or trained from scratch."""
    train: TrainConfig
    """Batch, steps, learning rate, precision."""
    zero: str = "ds_configs/zero2.json"
    """A DeepSpeed file with only what DeepSpeed owns: stage, offload, buckets, overlap."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """What is measured on the way, and when that ends the run."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the run is saved, and what of it stays."""
    budget: BudgetConfig = BudgetConfig()
    """What the run may cost."""
    reproduces: ReproducesConfig | None = None
    """Only in a `reproduce.yaml`: the run that this one is to be again."""
    logging: LoggingConfig = LoggingConfig()
    """Services that are told the metrics too."""

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

    @property
    def set_names(self) -> list[str]:
        """What each of these folders is called; a single one has no need of a name."""
        return [entry.label for entry in self.mixture] if self.prepare is None else [""]
