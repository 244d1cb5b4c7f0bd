"""The console script `sft-dist`: one short function a sub-command; nothing heavy is imported before it is needed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from sft_dist import __version__
from sft_dist.errors import SftDistError
from sft_dist.identity import ALLOWANCES

OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
PRINT_CONFIG = click.option(
    "--print-config", is_flag=True, help="Show every resolved value and the derived numbers, and stop."
)


class Told(click.Group):
    """Errors written for people end the program with one line and their own exit code, never a traceback."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except SftDistError as error:
            click.echo(f"sft-dist: {error}", err=True)
            context.exit(error.exit_code)


@click.group(cls=Told, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Exact, elastic, distributed supervised fine-tuning: prepare, train, eval, export, chat.

    RUN.yaml describes a run; KEY=VALUE changes one of its keys, as in train.learning_rate=1e-5. `sft-dist init` writes one,
    `sft-dist keys` tells what can stand in it, `sft-dist doctor` whether this machine has what it takes.
    """


class TaskOption(click.ParamType):
    """`I/N`: the I-th (from 1) of N tasks of a job array."""

    name = "I/N"

    def convert(self, value: Any, parameter: Any, context: Any) -> tuple[int, int]:
        index, slash, count = str(value).partition("/")
        if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
            self.fail(f"{value!r}: not of the form I/N with 1 <= I <= N; write for example 3/64", parameter, context)
        return int(index), int(count)


@main.command()
@click.argument("out", metavar="[RUN.yaml]", default="run.yaml", type=click.Path(path_type=Path))
@click.option("--data", metavar="PATH", help="A file, glob or folder of records, or hf:ID.")
@click.option(
    "--task",
    type=click.Choice(["classification", "instructions", "chat", "text"]),
    help="Default: what the data look like.",
)
@click.option(
    "--preset",
    metavar="NAME",
    help="The model: tiny, gpt2, gpt2-medium, gpt2-large, gpt2-xl, llama-1b, llama-8b, llama-8b-one-gpu, llama-8b-long, llama-70b.",
)
@click.option("--model", metavar="ID", help="Any other model: its id on the hub, or its folder.")
@click.option("--lora", is_flag=True, help="Train adapters beside the model; default: all of its weights.")
@click.option("--validation", metavar="PATH", help="Records to be held out; default: a share of the data.")
@click.option("--run-dir", metavar="FOLDER", help="Default: runs/ and the name of the data.")
@click.option("--format", help="Of data whose suffix does not say it: jsonl, csv, megatron and so on.")
@click.option("--text-column", metavar="NAME", help="Of a table: a name, or a number from 0 where there is no header.")
@click.option("--label-column", metavar="NAME")
@click.option("--prompt-column", metavar="NAME")
@click.option("--response-column", metavar="NAME")
@click.option("--messages-column", metavar="NAME")
@click.option("--yes", is_flag=True, help="Ask nothing; also so where there is no terminal.")
def init(out: Path, yes: bool, **options: Any) -> None:
    """Write a commented run file for your data; asks for what the options do not say. Nothing is overwritten."""
    from launch import init as writing

    columns = {name.removesuffix("_column"): options.pop(name) for name in list(options) if name.endswith("_column")}
    columns = {role: name for role, name in columns.items() if name is not None}
    writing.require_free(out)
    try:
        wish = writing.wished(writing.Options(**options, columns=columns), asks=not yes and sys.stdin.isatty())
    except click.Abort:
        click.echo("\ninterrupted: nothing was written", err=True)
        sys.exit(130)
    click.echo(writing.write(out, wish))


@main.command()
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path),
    default="runs",
    show_default=True,
    help="Where runs are to be written.",
)
@click.option("--json", "is_json", is_flag=True, help="For programs.")
def doctor(run_dir: Path, is_json: bool) -> None:
    """Is this machine fit? Versions, GPUs, NCCL, compiler, disk, SLURM, hub: what works, and what to do. Exit code 0: fit, 2: not."""
    from launch.doctor import run

    sys.exit(run(run_dir, click.echo, is_json=is_json))


@main.command()
@click.argument("key", required=False)
@click.option("--markdown", is_flag=True, help="All of them as the page that is docs/reference/configuration.md.")
def keys(key: str | None, markdown: bool) -> None:
    """What can stand in a run file: all sections, one section's keys, or one key, as train.learning_rate."""
    from sft_dist.reference import config_reference, explain

    if markdown and key is not None:
        raise click.UsageError("--markdown writes all keys; leave KEY out")
    click.echo(config_reference() if markdown else explain(key), nl=not markdown)


@main.command()
def schema() -> None:
    """The JSON Schema of run files: completion and checks in an editor (docs/configuration.md)."""
    import json

    from sft_dist.reference import json_schema

    click.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))


@main.command()
@click.argument("run_file", metavar="RUN.yaml")
@OVERRIDES
@click.option(
    "--workers", type=click.IntRange(min=1), help="Processes; default: one a core. The bytes do not depend on it."
)
@click.option("--task", type=TaskOption(), help="Do only the I-th of N parts, as one task of a job array.")
@click.option("--merge", "only_merge", is_flag=True, help="After all tasks: what only the whole can decide.")
@click.option("--fresh", is_flag=True, help="Prepare anew; shards that are there are set aside, not deleted.")
@PRINT_CONFIG
def prepare(
    run_file: str,
    overrides: tuple[str, ...],
    workers: int | None,
    task: tuple[int, int] | None,
    only_merge: bool,
    fresh: bool,
    print_config: bool,
) -> None:
    """Raw records → shards (train and validation); an interrupted one goes on where it was."""
    from launch import prepare as preparation
    from sft_dist.config import load
    from sft_dist.data.build import Task

    config = load(run_file, overrides)
    if print_config:
        click.echo(_as_yaml(config))
        return
    if task and only_merge:
        raise click.UsageError("--task does a part and --merge what comes after all parts; give one of them")
    part = Task(task[0] - 1, task[1]) if task else None
    preparation.run(config, fresh=fresh, workers=workers, task=part, only_merge=only_merge)


@main.command()
@click.argument("shards", metavar="SHARDS")
@click.option(
    "--row", type=int, help="Decode this row (0-based): target, context, padding and document boundaries in colour."
)
@click.option(
    "--html", type=click.Path(path_type=Path), metavar="FILE", help="Write it all as one page that needs nothing else."
)
def inspect(shards: str, row: int | None, html: Path | None) -> None:
    """What prepared shards hold: the funnel, lengths, examples, rejects; or one row decoded."""
    from launch.prepare import show

    show(Path(shards), row, html)


@main.command()
@click.argument("run_file", metavar="RUN.yaml")
@OVERRIDES
@click.option("--nproc", type=click.IntRange(min=1), help="Processes; default: one a GPU, or one.")
@click.option("--fresh", is_flag=True, help="Start over; what the old run left is set aside, not deleted.")
@click.option(
    "--from", "from_step", type=int, metavar="STEP", help="Go on from this checkpoint; newer ones are set aside."
)
@click.option(
    "--reset-data", is_flag=True, help="Go on with the model, but with the stream of rows from its beginning."
)
@click.option("--skip-rows", type=click.IntRange(min=1), help="Leave out so many rows of the stream, and record it.")
@click.option(
    "--allow",
    multiple=True,
    type=click.Choice(list(ALLOWANCES)),
    help="Go on although this changed since the checkpoint; the log and the state tell.",
)
@PRINT_CONFIG
def train(
    run_file: str,
    overrides: tuple[str, ...],
    nproc: int | None,
    fresh: bool,
    from_step: int | None,
    reset_data: bool,
    skip_rows: int | None,
    allow: tuple[str, ...],
    print_config: bool,
) -> None:
    """Shards → a fine-tuned model, on this machine; goes on from the last checkpoint by itself.

    All keys of RUN.yaml, each with type, default and example: `sft-dist keys`, `sft-dist keys train`.
    """
    from launch import local
    from launch.settle import Resume
    from sft_dist.config import load

    resume = Resume(fresh, from_step, reset_data, skip_rows or 0, allow)
    config = load(run_file, overrides)
    processes = nproc or local.default_processes()
    if print_config:
        click.echo(_as_yaml(config))
        click.echo(local.describe(config, processes, resume))
        return
    sys.exit(local.run(config, run_file, overrides, processes, resume))


@main.command()
@click.argument("run_file", metavar="[RUN.yaml]", required=False)
@OVERRIDES
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True, help="Machines.")
@click.option("--gpus-per-node", type=click.IntRange(min=1), default=8, show_default=True, help="GPUs of a machine.")
@click.option("--gpu", metavar="NAME", help="As h100-80gb, or its memory, as 48gb.")
@click.option(
    "--mfu",
    type=click.FloatRange(min=0.0, max=1.0, min_open=True),
    default=0.4,
    show_default=True,
    help="Share of the GPU's peak that the model's own arithmetic will use (without recomputation).",
)
@click.option("--like", metavar="RUN_DIR", help="Take the speed that this run had instead.")
@click.option(
    "--compare", metavar="RUN_DIR", help="Predicted beside measured, of a run that has begun; without RUN.yaml."
)
@click.option(
    "--scale", is_flag=True, help="The time of a step on --nodes x --gpus-per-node to 4,096 GPUs, of each ZeRO stage."
)
@click.option(
    "--gbps-within-node",
    "within",
    type=click.FloatRange(min=0.0, min_open=True),
    help="Gbit/s of a GPU, one way, for --scale.",
)
@click.option(
    "--gbps-between-nodes",
    "between",
    type=click.FloatRange(min=0.0, min_open=True),
    help="Gbit/s of a node, one way, for --scale.",
)
def plan(
    run_file: str | None, overrides: tuple[str, ...], compare: str | None, scale: bool, within: float | None, between: float | None,
    **options: Any,
) -> None:  # fmt: skip
    """What a run will take: memory of a GPU by part, what fits, steps, time, money, disk. Needs no GPU."""
    from launch import plan as planning
    from sft_dist.config import load

    chosen = planning.Options(**options)
    if scale and compare is not None:
        raise click.UsageError("--scale looks ahead and --compare back: leave one of them out")
    if not scale and (within, between) != (None, None):
        raise click.UsageError("--gbps-within-node and --gbps-between-nodes are for --scale: add it, or leave them out")
    if compare is not None:
        if run_file is not None:
            raise click.UsageError("--compare reads the run's own run.yaml: leave RUN.yaml out")
        planning.compare(Path(compare), chosen, click.echo)
    elif run_file is None:
        raise click.UsageError("which RUN.yaml? Or --compare RUN_DIR, of a run that has begun")
    elif scale:
        from launch import scale as scaling

        scaling.run(load(run_file, overrides), chosen, scaling.Links(within, between), click.echo)
    else:
        planning.run(load(run_file, overrides), chosen, click.echo)


@main.command()
@click.argument("run_file", metavar="RUN.yaml")
@OVERRIDES
@click.option("--nproc", type=click.IntRange(min=1), help="Processes; default: one a GPU, or one.")
@click.option("--steps", type=click.IntRange(min=1), default=3, show_default=True, help="Steps that are looked at.")
@click.option(
    "--micro-batches",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Of a step that has more, so many: a trace of thousands is too large to look at.",
)
@click.option(
    "--trace",
    type=click.Path(path_type=Path),
    default="trace.json.gz",
    show_default=True,
    help="Where the trace goes, for ui.perfetto.dev; one that is there is set aside.",
)
def profile(run_file: str, overrides: tuple[str, ...], nproc: int | None, **options: Any) -> None:
    """Where the time of a step goes: a table, MFU, memory, advice, and a trace. The run itself is left alone."""
    from launch import local, profiling
    from sft_dist.config import load

    config = load(run_file, overrides)
    chosen = profiling.Options(**options)
    sys.exit(profiling.run(config, run_file, overrides, nproc or local.default_processes(), chosen))


@main.command()
@click.argument("arguments", metavar="[prepare] RUN.yaml [KEY=VALUE]... [-- SBATCH_OPTIONS]", nargs=-1, required=True)
@click.option(
    "--nodes", default="1", show_default=True, metavar="N|MIN-MAX", help="A range: whatever there is, life by life."
)
@click.option(
    "--gpus-per-node",
    type=click.IntRange(min=0),
    default=8,
    show_default=True,
    help="Ranks of a node; 0: one, on its CPUs.",
)
@click.option("--gpu", metavar="NAME", help="As h100-80gb, or its memory, as 48gb: refuse what cannot fit.")
@click.option("--cpus-per-gpu", type=click.IntRange(min=1), default=4, show_default=True, help="Cores of a rank.")
@click.option("--time", "limit", metavar="[D-]H:MM:SS", help="Time limit of a life; the ranks save and leave in time.")
@click.option("--partition", help="Where to queue.")
@click.option("--account", help="Who pays.")
@click.option(
    "--requeue/--no-requeue",
    default=True,
    show_default=True,
    help="Whether the job comes back after it was interrupted.",
)
@click.option(
    "--chain", type=click.IntRange(min=2), metavar="N", help="N jobs one after another, where requeueing is forbidden."
)
@click.option(
    "--launcher",
    type=click.Choice(["torchrun", "srun"]),
    default="torchrun",
    show_default=True,
    help="One task a node that starts its ranks, or one task a rank.",
)
@click.option("--stage", metavar="FOLDER", help="Copy the shards to this folder of each node's own disk first.")
@click.option("--stage-environment", is_flag=True, help="Of --stage: the Python environment too.")
@click.option("--tasks", type=click.IntRange(min=1), metavar="N", help="Of `submit prepare`: parts of the job array.")
@click.option("--dry-run", is_flag=True, help="Check everything, show the script and the command, submit nothing.")
def submit(arguments: tuple[str, ...], **options: Any) -> None:
    """Queue a training (or, as `submit prepare`, a preparation) on a SLURM cluster, after checking all that can be checked."""
    from launch import submit as submission

    submission.run(arguments, submission.Options(**options), click.echo)


@main.command()
@click.argument("run_dir", metavar="[RUN_DIR]", required=False)
@click.option("--follow", is_flag=True, help="Again every few seconds, until nothing of it waits or runs.")
def status(run_dir: str | None, follow: bool) -> None:
    """What a run is doing: queue, lives, step, speed, what is left, the last checkpoint. Without RUN_DIR: all runs below here."""
    import time

    from launch import status as looking

    runs = [Path(run_dir)] if run_dir else looking.runs_below(Path())
    while True:
        told = [looking.describe(run) for run in runs]
        click.echo("\n\n".join(text for text, _ in told))
        if not follow or all(is_over for _, is_over in told):
            break
        time.sleep(5)
        click.echo()


@main.command()
@click.argument("run_dirs", metavar="RUN_DIR...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE.html",
    help="Default: RUN_DIR/report.html; of several ./report.html.",
)
@click.option(
    "--png",
    "pictures",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Also each chart as a picture; needs the extra sft-dist[report].",
)
def report(run_dirs: tuple[Path, ...], out: Path | None, pictures: Path | None) -> None:
    """One page on what happened: curves, time and cost, answers, data, how to do it again; several runs over each other."""
    from launch import report as reporting

    reporting.run(run_dirs, out, pictures, click.echo)


@main.command()
@click.argument("run_dir", metavar="RUN_DIR")
@click.option("--now", "at_once", is_flag=True, help="Do not wait for a checkpoint: the newest one stays.")
def stop(run_dir: str, at_once: bool) -> None:
    """Save a run and end it, wherever it runs, so that it does not come back by itself."""
    from launch import slurm

    click.echo(slurm.stop(Path(run_dir), at_once=at_once))


@main.command()
@click.argument("run_dir", metavar="RUN_DIR")
def verify(run_dir: str) -> None:
    """Prove what a run consumed: ledger, epochs, checkpoints, export; prints a certificate."""
    from launch.certify import verify_run

    certificate = verify_run(Path(run_dir))
    click.echo(certificate.text)
    sys.exit(0 if certificate.is_right else 3)


@main.command()
@click.argument("run_dir", metavar="RUN_DIR")
@click.option("--verify", "is_read", is_flag=True, help="Read every byte and compare its digest.")
def checkpoints(run_dir: str, is_read: bool) -> None:
    """The checkpoints of a run: step, size, whole or not, best, layout, age."""
    from launch.certify import list_checkpoints

    table, is_whole = list_checkpoints(Path(run_dir), is_read=is_read)
    click.echo(table)
    sys.exit(0 if is_whole else 3)


@main.command(name="import")
@click.argument("source", metavar="CHECKPOINT", type=click.Path(path_type=Path))
@click.argument("run_file", metavar="RUN.yaml")
@OVERRIDES
def import_(source: Path, run_file: str, overrides: tuple[str, ...]) -> None:
    """A checkpoint of DeepSpeed or the Hugging Face Trainer → the first one of a run, which then goes on from it."""
    from launch.adopt import adopt
    from sft_dist.config import load

    click.echo(adopt(load(run_file, overrides), source))


@main.command(name="eval")
@click.argument("models", metavar="RUN_DIR|MODEL...", nargs=-1, required=True)
@click.option("--shards", help="Folder of prepared shards; default: the run's own.")
@click.option(
    "--tasks",
    metavar="TASK,...",
    help="Public benchmarks instead, or YAML files of tasks, by lm-eval: sft-dist[lm-eval].",
)
@click.option(
    "--micro-batch-rows", type=click.IntRange(min=1), default=8, show_default=True, help="Rows of one forward pass."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a model, for programs.")
def evaluate(
    models: tuple[str, ...], shards: str | None, tasks: str | None, micro_batch_rows: int, as_json: bool
) -> None:
    """Token-weighted validation loss and perplexity, by source; what was forgotten; accuracy, F1 and more for label tasks."""
    from launch.measure import evaluate_models, run_tasks

    if tasks and shards:
        raise click.UsageError("--tasks have data of their own and --shards is that of the run; give one of them")
    if tasks:
        run_tasks(models, tasks.split(","), micro_batch_rows=micro_batch_rows, as_json=as_json)
        return
    evaluate_models(models, shards, micro_batch_rows=micro_batch_rows, as_json=as_json)


@main.command()
@click.argument("run_dir", metavar="RUN_DIR")
@click.argument("out", metavar="OUT")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of the weights; default: the precision the run computed in.",
)
@click.option(
    "--max-shard-size", metavar="SIZE", help="Of a file of weights, as 5GB; default: that of transformers (50GB)."
)
@click.option(
    "--license", "license_", metavar="NAME", help="Licence of the model, as apache-2.0; default: model.license."
)
@click.option(
    "--push-to", metavar="ORG/NAME", help="Push it to the Hugging Face hub, with the login of `hf auth login`."
)
@click.option("--private", "is_private", is_flag=True, help="Of --push-to: make a private repository.")
@click.option(
    "--adapter",
    "is_adapter",
    is_flag=True,
    help="Of model.lora: the adapters alone, for peft; default: merged into the model.",
)
def export(run_dir: str, out: str, dtype: str | None, license_: str | None, **options: Any) -> None:
    """Checkpoint → a Hugging Face folder with model card and reproduce.yaml, reloaded and compared before it says done."""
    from launch.hand_over import export_run

    export_run(Path(run_dir), Path(out), dtype, license=license_, **options)


@main.command()
@click.argument("model", metavar="RUN_DIR|MODEL")
@click.option("--prompt", help="Ask this and end; default: a conversation.")
@click.option("--system", metavar="TEXT", help="What the model is told before the first question.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Length limit of an answer."
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0.0),
    default=0.0,
    show_default=True,
    help="0 takes the likeliest token each time; above, tokens are drawn.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(min=0.0, max=1.0, min_open=True),
    default=1.0,
    show_default=True,
    help="Draw from the likeliest tokens that have this share together.",
)
@click.option("--seed", type=int, help="Draw the same again; default: otherwise each time.")
def chat(model: str, prompt: str | None, system: str | None, max_new_tokens: int, **drawing: Any) -> None:
    """A conversation with a model: answers appear as they are made, and /help tells what else can be typed.

    Without a terminal each line of the input is a question of its own, and its answer is a line of the output, with \\n for a line end.
    """
    from launch import chat as chatting
    from sft_dist.data.view import visible

    decoding = chatting.Decoding(max_new_tokens, **drawing)
    if prompt is not None:
        click.echo(visible(chatting.answer_prompt(model, prompt, decoding, system)))
    elif sys.stdin.isatty():
        chatting.converse(model, decoding, system)
    else:
        chatting.answer_lines(model, sys.stdin, decoding, system)


def _as_yaml(config: Any) -> str:
    import yaml

    return yaml.safe_dump(config.model_dump(by_alias=True), sort_keys=False, allow_unicode=True).rstrip()


if __name__ == "__main__":
    main()
