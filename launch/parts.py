"""The parts of a training run, each built from its plan; imported only once the plan has been checked."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
import yaml

from launch import prove
from sft_dist import fp8, health
from sft_dist.adapter import base_digest, num_elements
from sft_dist.answers import Sampling, own_prompts, prompts
from sft_dist.batch import check_shares
from sft_dist.checkpoint import Checkpoints
from sft_dist.comms import Comms
from sft_dist.console import Console, confusion_table
from sft_dist.data.build import read_conversations
from sft_dist.data.loader import Loader, MicroBatch, Step
from sft_dist.data.mixture import Joined
from sft_dist.data.shards import Shards
from sft_dist.data.tokenise import Tokenizer
from sft_dist.data.work import template_for
from sft_dist.engine import Engine
from sft_dist.errors import ConfigError, DataError, HealthError
from sft_dist.evaluate import Evaluator, Sources, forgetting, held_out, open_shards
from sft_dist.files import first_free
from sft_dist.identity import ALLOWANCES, STREAM
from sft_dist.kernels import draws_dropout
from sft_dist.labels import LabelTask
from sft_dist.layers import tile_mlp
from sft_dist.layout import kept
from sft_dist.limits import EarlyStopping, Verdict
from sft_dist.long_rows import Shared
from sft_dist.metrics import JsonLines, Metrics, read_lines
from sft_dist.mlflow_sink import MLflow
from sft_dist.model import build, has_dropout, model_config, without_attention_dropout
from sft_dist.reproduce import ENVIRONMENT
from sft_dist.retention import Retention
from sft_dist.schedule import Cadence, learning_rate
from sft_dist.schema import Money, money
from sft_dist.services import Follower, Service
from sft_dist.spikes import BAD_ROWS, BadStep, BadSteps
from sft_dist.state import TrainState
from sft_dist.tensorboard_sink import TensorBoard
from sft_dist.topology import node_name
from sft_dist.usage import USAGE, Budget, Journal
from sft_dist.wandb_sink import WeightsAndBiases
from sft_dist.watchdog import HUNG_EXIT_CODE, Watchdog
from sft_dist.zero import zero_stage

if TYPE_CHECKING:
    from launch.settle import Plan

warnings.filterwarnings("ignore", category=FutureWarning, module="torch")  # DeepSpeed calls what torch renames
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


_log = logging.getLogger("sft_dist")

SERVICES = "services"  # of a run folder: what W&B and MLflow have been told
WATCH = ".watch"  # of a run folder: heartbeats while it runs, and the stacks of a hang


def model(plan: Plan, *, with_weights: bool = True) -> tuple[Any, Any]:
    """The model on the CPU and its configuration; the same on every rank. Without weights it is as from scratch."""
    manifest, config = plan.shards.manifest, plan.config
    made = model_config(
        config.model, vocab_size=manifest.vocab_size, seq_len=plan.shards.seq_len, eos_id=manifest.eos_id
    )
    wanted = config.model if with_weights else config.model.model_copy(update={"init": "scratch"})
    if config.model.dropout is None and not draws_dropout(prove.kernel_names(plan)[0]):
        without_attention_dropout(made)
    sharers = config.train.sequence_parallel
    if sharers > 1:
        about = {"heads": made.num_attention_heads, "has_dropout": has_dropout(made, config.model.lora)}
        check_shares(sharers, seq_len=plan.shards.seq_len, world_size=plan.topology.world_size, **about)
    built = build(wanted, made, seed=config.train.seed, gradient_checkpointing=config.train.gradient_checkpointing)
    if config.train.mlp_tile_tokens is not None:
        tile_mlp(built, config.train.mlp_tile_tokens)
    if config.train.fp8 and with_weights:
        fp8.use(built, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return built, made


def identity(plan: Plan, made: Any, model: Any = None) -> dict[str, Any]:
    """What must stay the same for a run to be the same run; with the `model`, also what its adapters stand on."""
    about = {k: v for k, v in made.to_dict().items() if k not in ("transformers_version", "_name_or_path", "dtype")}
    digest = hashlib.blake2b(json.dumps(about, sort_keys=True, default=str).encode(), digest_size=16)
    manifest = plan.shards.manifest
    # what a run may do without is not named without it: older checkpoints go on
    more: dict[str, Any] = {"mixture": plan.mixture.identity()} if plan.mixture else {}
    if plan.config.train.order != "rows":
        more["order"] = plan.config.train.order.model_dump()
    if general := [one.manifest.data for folder in plan.shards_dirs if (one := open_shards(folder, "general"))]:
        more["general"] = " ".join(general)  # what the model is not to forget is compared with itself
    if (lora := plan.config.model.lora) is not None:
        more["lora"] = lora.model_dump()
        if model is not None:
            more["base"] = base_digest(model)
    early = plan.config.evaluate.early_stopping
    if early is not None and early.metric != "validation_loss":
        more["judged_by"] = early.metric  # the scores of checkpoints are compared
    return {
        "model": digest.hexdigest(),
        "data": manifest.data,
        "tokenizer": manifest.tokenizer,
        "template": manifest.template,
        "global_batch_rows": plan.batch.global_batch_rows,
        "seed": plan.config.train.seed,
        **more,
    }


def comms(plan: Plan) -> tuple[Comms, torch.device]:
    """The process group, on this rank's GPU where there are GPUs."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if plan.topology.local_rank >= torch.cuda.device_count():  # before the others wait for it in vain
            raise HealthError(
                f"node {node_name()}: {torch.cuda.device_count()} GPUs can be used, and rank {plan.topology.rank} wants one "
                f"more; have it looked at, or start fewer ranks a node",
                (node_name(),),
            )
        device = torch.device("cuda", plan.topology.local_rank)
        torch.cuda.set_device(device)
    elif torch.version.cuda and os.environ.get("SLURM_GPUS_ON_NODE") and not os.environ.get("SFT_DIST_ON_CPU"):
        raise HealthError(
            f"node {node_name()}: SLURM gave it {os.environ['SLURM_GPUS_ON_NODE']} GPUs, and none can be used; have its driver "
            "looked at, or set SFT_DIST_ON_CPU=1 to train on CPUs",
            (node_name(),),
        )
    elif plan.config.train.precision == "fp16":
        raise ConfigError(
            "train.precision: 'fp16' is not allowed without a GPU: DeepSpeed has it on GPUs only. Use bf16 or fp32"
        )
    # DeepSpeed reads the world from the environment, and would look for MPI where there is none.
    for name in ("RANK", "LOCAL_RANK"):
        os.environ.setdefault(name, "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns that it found no GPU
    return Comms(plan.topology, device), device


def checkpoints(plan: Plan, identity: dict[str, Any]) -> Checkpoints:
    """The checkpoints of the run; each carries what an export needs."""
    attachments = {
        "run.yaml": plan.run_dir / "run.yaml",
        ENVIRONMENT: plan.run_dir / ENVIRONMENT,
        "model": plan.run_dir / "model",
        "tokenizer": plan.shards_dir / "tokenizer",
    }
    made = Checkpoints(
        plan.run_dir / "checkpoints",
        identity=identity,
        attachments=attachments,
        retention=retention(plan),
        stage=zero_stage(plan.zero),
    )
    made.allowed = frozenset(key for name in plan.resume.allow for key in ALLOWANCES[name])
    if plan.resume.resets_data:
        made.allowed |= frozenset(STREAM)
    return made


def retention(plan: Plan) -> Retention:
    """Which checkpoints stay; with early stopping the best one does."""
    kept, stops_early = plan.config.checkpoint, plan.config.evaluate.early_stopping is not None
    return Retention(kept.keep_last, max(kept.keep_best, int(stops_early)), kept.keep_every_steps)


def examine(plan: Plan, comms: Comms) -> tuple[list[str], list[str]]:
    """(the node of each rank, lines to say): are the machines fit, and alike? Raises HealthError."""
    fingerprint = plan.shards.manifest.data
    try:
        plan.shards.stored(np.array([0, plan.shards.num_rows - 1]))
    except DataError as error:
        fingerprint = f"unreadable ones ({error})"
    mine = health.facts(comms.device, fingerprint)
    return comms.gather(mine.node), health.examine(comms, mine)


def write_run_files(plan: Plan, made: Any) -> None:
    """`run.yaml` as resolved, what it is run with, and the model's configuration."""
    plan.run_dir.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(plan.config.model_dump(by_alias=True), sort_keys=False, allow_unicode=True)
    (plan.run_dir / "run.yaml").write_text(text)
    of = health.facts(torch.device("cuda" if torch.cuda.is_available() else "cpu"), "")
    (plan.run_dir / ENVIRONMENT).write_text(json.dumps({"device": of.device, "versions": of.versions}, indent=2))
    shutil.rmtree(plan.run_dir / "model", ignore_errors=True)
    made.save_pretrained(plan.run_dir / "model")


def engine(plan: Plan, model: Any, comms: Comms) -> Engine:
    """The model under ZeRO."""
    train, sharers = plan.config.train, plan.config.train.sequence_parallel
    shared = Shared(plan.topology.rank % sharers, sharers, comms.sharers(sharers)) if sharers > 1 else None
    return Engine(model, plan.zero, train, plan.batch, plan.topology, comms.device, len(plan.shards_dirs), shared)


def full_micro_batch(plan: Plan, device: torch.device) -> MicroBatch:
    """The most that a micro-batch of the run can be: full rows, every token but the first a target."""
    shape = (plan.batch.micro_batch_rows, plan.shards.seq_len)
    tokens = torch.zeros(shape, dtype=torch.int64, device=device)
    targets = torch.ones(shape, dtype=torch.bool, device=device)
    targets[:, 0] = False
    half = max(2, -(-shape[1] // 2))
    positions = torch.arange(shape[1], device=device).expand(shape) % half  # two documents: a mask is made
    sets = torch.zeros(shape[0], dtype=torch.int64, device=device)
    num_targets = shape[0] * (shape[1] - 1)
    return MicroBatch(
        tokens, targets, positions, torch.zeros_like(tokens), np.arange(shape[0]), 0, num_targets, 2 * shape[0], sets
    )


def steps(plan: Plan, state: TrainState, device: torch.device) -> Iterator[Step]:
    """What is left of the stream of training rows, as this rank sees it, made on `device`."""
    loader = Loader(
        plan.shards, plan.data_topology, micro_batch_rows=plan.batch.micro_batch_rows, order=plan.order, device=device
    )
    is_counted = (
        plan.topology.rank % plan.config.train.sequence_parallel == 0
    )  # of those that share rows one counts them
    for begin, end in state.stretches(plan.rows):
        for step in loader.steps(start=begin, end=end, global_batch_rows=plan.batch.global_batch_rows):
            yield step if is_counted else replace(step, num_tokens=0, num_targets=0)


def schedule(plan: Plan, total_steps: int) -> Callable[[int], float]:
    """Step -> learning rate."""
    train = plan.config.train
    return functools.partial(
        learning_rate,
        total_steps=total_steps,
        peak=train.learning_rate,
        schedule=train.schedule,
        warmup_ratio=train.warmup_ratio,
    )


def evaluator(plan: Plan, comms: Comms) -> Evaluator:
    """What is measured on the held-out data."""
    micro, device = plan.batch.micro_batch_rows, comms.device

    def loader(sets: Sequence[Shards]) -> Loader:
        return Loader(Joined(sets), plan.topology, micro_batch_rows=micro, shuffle=False, device=device)

    names = plan.config.set_names
    validation, general = (held_out(names, plan.shards_dirs, split) for split in ("validation", "general"))
    return Evaluator(
        comms,
        loader(list(validation.values())) if validation else None,
        None if plan.mixture else LabelTask.open(plan.shards_dir / "labels"),
        sampling(plan),
        general=loader(list(general.values())) if general else None,
        sources=Sources.of(list(validation.values()), list(validation)) if validation else None,
        scores_always=plan.config.evaluate.early_stopping is not None,
    )


def sampling(plan: Plan) -> Sampling:
    """The prompts that are answered before and after. Raises ConfigError for one that leaves no room for an answer."""
    tokenizer, evaluate = Tokenizer.load(str(plan.shards_dir / "tokenizer")), plan.config.evaluate
    is_file = plan.template.endswith(".jinja")  # it has become the tokenizer's own
    template = template_for("tokenizer" if is_file else plan.template, tokenizer)
    own = own_prompts(evaluate.prompts, template, tokenizer, is_text=plan.is_text) if evaluate.prompts else []
    for prompt in own:
        if len(prompt.ids) >= plan.shards.seq_len:
            raise ConfigError(
                f"evaluate.prompts: {prompt.text[:40]!r} has {len(prompt.ids):,} tokens, which leave no room for an answer in "
                f"prepare.seq_len {plan.shards.seq_len:,}; shorten it"
            )
    records = read_conversations(plan.shards_dir / "validation.jsonl")
    return Sampling(
        [*prompts(records, template, tokenizer, evaluate.samples), *own],
        decode=tokenizer.decode,
        end_ids=tokenizer.end_ids,
        context=plan.shards.seq_len,
        max_new_tokens=evaluate.max_new_tokens,
        batch_tokens=plan.batch.micro_batch_rows * plan.shards.seq_len,
    )


def metrics(
    plan: Plan, state: TrainState, total_steps: int, budget: Budget, *, is_going_back: bool = False
) -> tuple[Metrics, Callable[[str], None]]:
    """Where numbers go on this rank, and a way to say a line; silent on all ranks but the main one.

    What lies beyond the step of `state` is cut off; where the run goes back on purpose a copy is kept.
    """
    if not plan.topology.is_main:
        logging.getLogger("sft_dist").setLevel(logging.CRITICAL)
        return Metrics(), lambda text: None
    path = plan.run_dir / "metrics.jsonl"
    if (is_going_back or plan.resume.from_step is not None) and path.exists():
        shutil.copyfile(path, first_free(path))
    if budget.journal is not None:
        budget.journal.goes_on(state.step, read_lines(path))
    console = Console(total_steps, state.step, sys.stdout)
    truth = JsonLines(path, state.step)
    kept = read_lines(path)
    sinks: tuple[Any, ...] = (
        truth,
        TensorBoard(plan.run_dir / "tensorboard", kept),
        console,
        *_services(plan, path, is_going_back=is_going_back),
    )
    made = Metrics(sinks, lambda: budget.numbers, state.step, state.target_tokens)
    config = plan.config.model_dump(mode="json", by_alias=True)
    if config != next((line["config"] for line in reversed(kept) if "config" in line), None):
        made.config(state.step, config)
    return made, console.say


def _services(plan: Plan, metrics: Path, *, is_going_back: bool) -> Iterator[Follower]:
    """Those of the run file. Who went back by hand gets another run there: what a service was told it cannot take back."""
    config, folder = plan.config.logging, plan.run_dir / SERVICES
    made: list[tuple[str, Service]] = []
    if config.wandb is not None:
        made.append(("wandb", WeightsAndBiases(folder, **config.wandb.model_dump())))
    if config.mlflow is not None:
        made.append(("mlflow", MLflow(**config.mlflow.model_dump())))
    is_another_run = plan.resume.from_step is not None and not is_going_back
    for name, service in made:
        yield Follower(service, metrics, folder / f"{name}.json", is_another_run=is_another_run)


def has_measured(plan: Plan, state: TrainState, evaluator: Evaluator) -> bool:
    """Whether the metrics hold what is measured at the end, for the step of `state`; every rank calls it."""
    last = "validation_loss" if evaluator.general is None else "general_loss"
    if evaluator.sampling is not None and evaluator.sampling.prompts:
        last = "samples"
    lines = read_lines(plan.run_dir / "metrics.jsonl") if plan.topology.is_main else []
    return evaluator.comms.broadcast(any(line["step"] == state.step and last in line for line in lines))


def told_at_the_end(plan: Plan, step: int) -> list[str]:
    """What a person should see of the last measurements: the confusion matrix, and what became of the general text."""
    lines = read_lines(plan.run_dir / "metrics.jsonl")
    matrices = [line["confusion"] for line in lines if line["step"] == step and "confusion" in line]
    told = [confusion_table(matrices[-1])] if matrices else []
    of_general = {line["step"]: line["general_perplexity"] for line in lines if "general_perplexity" in line}
    if step in of_general:
        told += forgetting(of_general.get(0), of_general[step], plan.config.evaluate.max_forgetting)
    return told


def owes_evaluation(plan: Plan, state: TrainState, comms: Comms) -> bool:
    """Whether an evaluation on the way was left when a life before was asked to stop; every rank calls it."""
    is_due = state.step > 0 and Cadence.is_due(state.step, plan.config.evaluate.every_steps)
    lines = read_lines(plan.run_dir / "metrics.jsonl") if plan.topology.is_main and is_due else []
    is_there = any(line["step"] == state.step and "validation_loss" in line for line in lines)
    return comms.broadcast(is_due and not is_there)


def early_stopping(plan: Plan) -> EarlyStopping | None:
    """What ends the run before its last step."""
    config = plan.config.evaluate.early_stopping
    return None if config is None else EarlyStopping(**config.model_dump())


def journal(plan: Plan) -> Journal | None:
    """The account of what the run uses, begun by the main rank."""
    if not plan.topology.is_main:
        return None
    began = plan.life.began or time.time()
    told = max((line.get("gpu_hours", 0.0) for line in read_lines(plan.run_dir / "metrics.jsonl")), default=0.0)
    path = plan.run_dir / USAGE
    world, nodes = plan.topology.world_size, plan.topology.num_nodes
    return Journal(path, plan.life.name, world, began, nodes=nodes, told_gpu_seconds=told * 3600).start()


def bad_steps(plan: Plan) -> BadSteps:
    """What is done about steps that cannot be applied."""
    config = plan.config.train.bad_steps
    return BadSteps(config.roll_back_after, config.max_roll_backs, config.spike_z, config.spike_window)


def tell_bad_step(plan: Plan, bad: BadStep) -> None:
    """Say that a step was not applied, and list its rows with the records that they hold."""
    path, records = plan.run_dir / BAD_ROWS, {}
    try:
        records = plan.shards.origins(bad.rows)
    except (DataError, OSError) as error:
        _log.warning("the records of bad rows are not known: %s", error)
    named = [record for of_row in records.values() for record in of_row]
    more = f" and {len(named) - 3:,} more" if len(named) > 3 else ""
    of = f"; of {', '.join(named[:3])}{more}" if named else ""
    try:
        bad.append(path, records)
    except OSError as error:
        _log.warning("%s: %s: the rows of step %d are not listed", path, error.strerror, bad.step)
    _log.warning("%s; %d rows are listed in %s%s", bad.describe(), len(bad.rows), path, of)


def budget(plan: Plan, journal: Journal | None) -> Budget:
    """What the run may cost."""
    config = plan.config.budget
    price = money(config.price_per_gpu_hour) if config.price_per_gpu_hour else Money(0.0, "")
    deadline = None if config.deadline is None else config.deadline.timestamp()
    return Budget(config.gpu_seconds, deadline, config.max_tokens, price.amount, price.currency, journal)


def cadence(plan: Plan, total_steps: int) -> Cadence:
    """Every how many steps something happens."""
    config = plan.config
    return Cadence(
        total_steps,
        config.train.log_every_steps,
        config.evaluate.every_steps,
        config.checkpoint.every_steps,
        config.evaluate.samples_every_steps,
    )


def watchdog(plan: Plan) -> Watchdog | None:
    """What ends the run when a rank hangs; it leaves a verdict, since the ranks can no longer agree on one."""
    if plan.config.train.hang_seconds is None:
        return None

    def on_hang(account: str) -> None:
        host = re.match(r"rank \d+ on host (\S+) hangs:", account)  # not one of several that are as far behind
        node = host[1] if host else ""
        Verdict(plan.life.name, "hung", made.step, account, HUNG_EXIT_CODE, node).write(plan.run_dir / "verdicts")

    folder, seconds = plan.run_dir / WATCH, plan.config.train.hang_seconds
    made = Watchdog(folder, plan.topology, seconds, on_hang, life=plan.life.name).start()
    made.beat(0, "build the engine")
    return made


def checkpoint_bytes(model: Any) -> int:
    """Of a checkpoint of this model, before ZeRO shards it: fp32 masters, and two moments of what is trained."""
    return sum(4 * parameter.numel() * (3 if parameter.requires_grad else 1) for _, parameter in kept(model))


def describe(model: Any) -> str:
    """A model's parameters, before ZeRO shards it.

    >>> describe(torch.nn.Linear(3, 2))
    '8 parameters'
    """
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    whole = sum(map(num_elements, model.parameters()))
    return f"{whole:,} parameters" + (f", of which {trained:,} are trained" if trained < whole else "")
