"""The metrics of a run: what each is called, its unit, what it is taken over, how it comes about, what is healthy."""

from __future__ import annotations

from typing import NamedTuple


class Metric(NamedTuple):
    """One metric: its TensorBoard tag (`group/name`), unit, the window it is taken over, and two sentences for a person."""

    tag: str
    unit: str
    window: str
    meaning: str
    healthy: str


_SCALE = "compare with the same run before training"

# Name in metrics.jsonl -> what it is. SET is a set of a mixture, SOURCE a set or a file of the validation records.
GLOSSARY = {
    "loss": Metric(
        "train/loss", "nats per target token", "the step",
        "Summed loss over the target tokens of the global batch, divided by their number; with dropout, where there is any.",
        "Falls, fast at first; the noise from step to step shrinks with the batch.",
    ),
    "loss/SET": Metric(
        "train/loss/SET", "nats per target token", "the step",
        "The same over the target tokens of one set of a mixture; left out of a step that has none of them.",
        "Falls for every set; one that rises is being forgotten, or its weight is too small.",
    ),
    "epochs/SET": Metric(
        "train/epochs/SET", "passes", "the run so far",
        "How often the rows of a set of a mixture were gone through.",
        "Below about 4 for text, 10 for instructions; beyond that a set is learned by heart.",
    ),
    "learning_rate": Metric(
        "train/learning_rate", "1", "the step", "What the schedule gives for the step.",
        "Rises over the warm-up, then falls as `train.schedule` says.",
    ),
    "grad_norm": Metric(
        "train/grad_norm", "1", "the step",
        "Euclidean norm of the gradient over all parameters and ranks, before clipping; left out of a step that was not applied.",
        "Settles after the warm-up. Always above `train.max_grad_norm`: the learning rate means little; sudden peaks: bad rows.",
    ),
    "loss_scale": Metric(
        "train/loss_scale", "1", "the step", "By what fp16 multiplies the loss so that small gradients survive; fp16 only.",
        "Doubles now and then, halves seldom; a fall to 1 means that the run diverges.",
    ),
    "steps_not_applied": Metric(
        "train/steps_not_applied", "steps", "the run so far",
        "Steps whose loss or gradient was no number, or a spike: fed, and kept from the weights. There once it is above 0.",
        "Missing. Their rows are in `bad_rows.jsonl`.",
    ),
    "target_tokens_per_second": Metric(
        "speed/target_tokens_per_second", "target tokens/s", "the step", "Target tokens of all ranks by `step_seconds`.",
        "Steady; it wanders with the share of targets in the rows.",
    ),
    "tokens_per_second": Metric(
        "speed/tokens_per_second", "tokens/s", "the step", "Tokens of all ranks, padding left out, by `step_seconds`.",
        "Steady, and near what `sft-dist plan` foretold; the first step of a life is slower.",
    ),
    "step_seconds": Metric(
        "speed/step_seconds", "s", "the step",
        "Wall time of the step on the main rank: reading, forward, backward, update; without evaluation and saving.",
        "Steady.",
    ),
    "slowest_rank_ratio": Metric(
        "speed/slowest_rank_ratio", "1", "the step",
        "Seconds that the slowest rank computed by the median of all ranks; on several nodes.",
        "Below 1.1; one rank that stays above is named in a warning.",
    ),
    "memory_bytes": Metric(
        "memory/peak_bytes", "bytes", "the life so far",
        "Peak memory of the main rank: allocated on its GPU, or resident where there is none.",
        "Flat after the first evaluation; on a GPU some GB below what it has.",
    ),
    "target_tokens": Metric(
        "budget/target_tokens", "target tokens", "the run so far", "Target tokens that were fed, over all lives; an x-axis too.",
        "Rises evenly.",
    ),
    "gpu_hours": Metric(
        "budget/gpu_hours", "GPU-hours", "the run so far",
        "Wall time of all lives times their GPUs: start-up, evaluation, saving and lives that were killed count; an x-axis too.",
        "Rises evenly; a jump is a life that was lost, or a slow start.",
    ),
    "cost": Metric(
        "budget/cost", "the currency of budget.price_per_gpu_hour", "the run so far", "GPU-hours times their price.",
        "Rises evenly.",
    ),
    "checkpoint_stall_seconds": Metric(
        "checkpoint/stall_seconds", "s", "the save", "How long the steps waited for the save.",
        "A small part of `checkpoint_write_seconds`: the writing happens behind the steps.",
    ),
    "checkpoint_write_seconds": Metric(
        "checkpoint/write_seconds", "s", "the save", "From the first byte to the published manifest.",
        "Steady, and well below the time between saves.",
    ),
    "checkpoint_bytes": Metric(
        "checkpoint/bytes", "bytes", "the save", "Size of the checkpoint, all ranks' files.",
        "The same at every save: about 12 bytes a parameter.",
    ),
    "checkpoint_gb_per_second": Metric(
        "checkpoint/gb_per_second", "GB/s", "the save", "Its size by `checkpoint_write_seconds`.",
        "What the file system can do; a fall means that others use it.",
    ),
    "validation_loss": Metric(
        "validation/loss", "nats per target token", "the validation set",
        "Summed loss over all target tokens of the validation set by their number, without dropout; the same on any number of ranks.",
        "Falls with the training loss. It rises while that falls: overfitting; stop there (`evaluate.early_stopping`).",
    ),
    "validation_loss/SOURCE": Metric(
        "validation/loss/SOURCE", "nats per target token", "the validation set",
        "The same over the target tokens of one set of a mixture, or one of up to 32 files.",
        f"Falls for every source; levels of different sources say little, {_SCALE}.",
    ),
    "validation_perplexity": Metric(
        "validation/perplexity", "1", "the validation set", "exp(`validation_loss`).", f"Falls; {_SCALE}.",
    ),
    "validation_perplexity/SOURCE": Metric(
        "validation/perplexity/SOURCE", "1", "the validation set", "exp(`validation_loss/SOURCE`).", f"Falls; {_SCALE}.",
    ),
    "validation_accuracy": Metric(
        "validation/accuracy", "share", "the validation set",
        "Of a label task: records whose most likely label is the right one.",
        "Rises above the share of the commonest label.",
    ),
    "validation_f1": Metric(
        "validation/f1", "share", "the validation set",
        "Of a label task: F1 of the rarer of two labels, or the mean F1 of more.",
        "Rises; far below the accuracy: a rare label is not learned.",
    ),
    "validation_exact_match": Metric(
        "validation/exact_match", "share", "the validation set",
        "Of a label task: records where the label, and the end after it, is at every place the likeliest next token.",
        "Close to the accuracy; far below it: the model has not yet learned the form of an answer.",
    ),
    "general_loss": Metric(
        "general/loss", "nats per token", "the general text",
        "Mean loss over the tokens of `prepare.general`, which is not trained on.",
        "Flat; a rise is what the model forgets.",
    ),
    "general_perplexity": Metric(
        "general/perplexity", "1", "the general text", "exp(`general_loss`).",
        "At most `evaluate.max_forgetting` above that of step 0, else the run warns.",
    ),
    "start_up_seconds": Metric(
        "time/start_up_seconds", "s", "since the last log line",
        "Imports, the process group, the model, the proofs and the restored checkpoint; on the main rank, as all of `time/`.",
        "Once a life, and small beside the rest of it.",
    ),
    "data_seconds": Metric(
        "time/data_seconds", "s", "since the last log line", "Waiting for rows to be read, before a step and before each of its micro-batches.",
        "Next to nothing.",
    ),
    "compute_seconds": Metric(
        "time/compute_seconds", "s", "since the last log line", "Forward and backward passes, gradients between ranks, updates.",
        "Almost all of the time.",
    ),
    "wait_seconds": Metric(
        "time/wait_seconds", "s", "since the last log line", "Votes and sums in which the ranks wait for one another.",
        "Small; large where one rank is slower than the others.",
    ),
    "evaluate_seconds": Metric(
        "time/evaluate_seconds", "s", "since the last log line", "Evaluation and sample answers.",
        "As much as `evaluate.every_steps` is worth to you.",
    ),
    "save_seconds": Metric(
        "time/save_seconds", "s", "since the last log line", "The steps waited for a save.",
        "A small part: the writing happens behind the steps.",
    ),
    "log_seconds": Metric(
        "time/log_seconds", "s", "since the last log line", "Writing metrics.", "Next to nothing.",
    ),
}  # fmt: skip

POSITION = ("target_tokens", "gpu_hours", "cost")  # where a record stands, beside its step


def metric(name: str) -> Metric | None:
    """What a metric is; of one of a set or source with its own tag. None: there is no such metric.

    >>> metric("loss").tag, metric("loss/chat").tag, metric("validation_loss/chat").tag, metric("grad_norm/chat")
    ('train/loss', 'train/loss/chat', 'validation/loss/chat', None)
    """
    if name in GLOSSARY:
        return GLOSSARY[name]
    whole, _, part = name.partition("/")
    of_parts = next((GLOSSARY[key] for end in ("SET", "SOURCE") if (key := f"{whole}/{end}") in GLOSSARY), None)
    return of_parts and of_parts._replace(tag=of_parts.tag.rpartition("/")[0] + f"/{part}")


def as_markdown() -> str:
    """The glossary as a page shows it, a section for each group of tags."""
    lines: list[str] = []
    group = None
    for name, one in sorted(GLOSSARY.items(), key=lambda item: _GROUPS.index(item[1].tag.partition("/")[0])):
        if group != (group := one.tag.partition("/")[0]):
            lines += ["", f"### {group}", ""]
        lines += [
            f"**`{name}`** — {one.unit}, over {one.window}; TensorBoard: `{one.tag}`  ",
            one.meaning + "  ",
            f"*Healthy:* {one.healthy}",
            "",
        ]
    return "\n".join(lines).strip() + "\n"


_GROUPS = list(dict.fromkeys(one.tag.partition("/")[0] for one in GLOSSARY.values()))
