"""Queues a run on a SLURM cluster, after everything that can be checked has been."""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import sft_dist
from launch import slurm
from launch.settle import Plan, check_deadline
from launch.train import lock
from sft_dist.config import load
from sft_dist.errors import ConfigError
from sft_dist.files import digest_of, publish_text
from sft_dist.schema import RunConfig
from sft_dist.topology import Life, Topology

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line may say of the job; sbatch has more, which go after `--`."""

    nodes: str = "1"
    gpus_per_node: int = 8
    gpu: str | None = None
    cpus_per_gpu: int = 4
    limit: str | None = None
    partition: str | None = None
    account: str | None = None
    requeue: bool = True
    chain: int | None = None
    tasks: int | None = None
    launcher: str = "torchrun"
    stage: str | None = None
    stage_environment: bool = False
    dry_run: bool = False

    @property
    def counts(self) -> range:
        """Every number of nodes that the job may get, as sbatch's --nodes says it; raises ConfigError.

        >>> Options(nodes="2-8").counts
        range(2, 9)
        """
        low, dash, high = self.nodes.partition("-")
        high = high if dash else low
        if not (low.isdecimal() and high.isdecimal() and 1 <= int(low) <= int(high)):
            raise ConfigError(f"--nodes {self.nodes}: a number of nodes, or the least and the most, as in 4 or 2-8")
        return range(int(low), int(high) + 1)

    def exports(self, now: str = "") -> dict[str, str]:
        """What the batch script of a training reads; a chain is known by the time `now`. Raises ConfigError.

        >>> Options(stage="/local/scratch", chain=3).exports("20260102-030405")
        {'SFT_DIST_CHAIN': '20260102-030405', 'SFT_DIST_STAGE': '/local/scratch'}
        """
        if self.stage_environment and self.stage is None:
            raise ConfigError("--stage-environment: copied to where? give --stage FOLDER too")
        said = {
            "SFT_DIST_LAUNCHER": None if self.launcher == "torchrun" else self.launcher,
            "SFT_DIST_CHAIN": now if self.chain else None,
            "SFT_DIST_STAGE": self.stage,
            "SFT_DIST_STAGE_ENVIRONMENT": "1" if self.stage_environment else None,
        }
        return {name: str(value) for name, value in said.items() if value is not None}

    def common(self) -> list[str]:
        """Of every job.

        >>> Options(limit="1:00:00", account="lab").common()
        ['--time=1:00:00', '--account=lab']
        """
        named = {"time": self.limit, "partition": self.partition, "account": self.account}
        return [f"--{name}={value}" for name, value in named.items() if value is not None]


def run(arguments: Sequence[str], options: Options, say: Say) -> None:
    """As the command line has it: `[prepare] RUN.yaml [KEY=VALUE]... [-- SBATCH_OPTIONS]`. Raises ConfigError, DataError."""
    is_preparation = arguments[0] == "prepare"
    words, more = split(arguments[1:] if is_preparation else arguments)
    if not words:
        raise ConfigError("submit prepare: which run file? sft-dist submit prepare RUN.yaml --tasks 64")
    run_file, overrides = words[0], words[1:]
    config = load(run_file, overrides)
    if is_preparation:
        _preparation(config, run_file, overrides, options, more, say)
    elif options.tasks is not None:
        raise ConfigError(f"--tasks {options.tasks}: a training has none; meant is `submit prepare`, or --nodes")
    else:
        _training(config, run_file, overrides, options, more, say)


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(run file and overrides, options of sbatch as they were written).

    >>> split(["run.yaml", "train.epochs=2", "--qos=high", "-x", "n7"])
    (['run.yaml', 'train.epochs=2'], ['--qos=high', '-x', 'n7'])
    """
    first = next((at for at, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    return list(arguments[:first]), list(arguments[first:])


def _training(
    config: RunConfig, run_file: str, overrides: Sequence[str], options: Options, more: Sequence[str], say: Say
) -> None:
    say(check(config, options))
    for line in describe_model(config, options):
        say(line)
    run_dir = Path(config.run_dir)
    if there := slurm.live_jobs(run_dir):
        raise ConfigError(
            f"{run_dir}: job {there[0][0]} is {there[0][1]['JobState']} for it; `sft-dist stop {run_dir}` first"
        )
    if run_dir.is_dir():
        lock(run_dir).close()  # somebody trains in it on this machine
    # of this folder alone: by its name the jobs of a chain wait for one another, and the last ones are cancelled
    name = re.sub(r"[^\w.-]", "-", f"{run_dir.resolve().name}-{digest_of({'run_dir': str(run_dir.resolve())})[:6]}")
    if named := [word for word in more if word.startswith(("--job-name", "-J"))]:
        raise ConfigError(f"{named[0]}: the jobs of a run are known by the name {name}; leave it out")
    gpus = [f"--gpus-per-node={options.gpus_per_node}"] * bool(options.gpus_per_node)
    ranks = max(1, options.gpus_per_node)
    given = [
        f"--job-name={name}", f"--nodes={options.nodes}", *gpus, f"--cpus-per-task={options.cpus_per_gpu * ranks}", *options.common(),
        f"--output={str(run_dir).replace('%', '%%')}/slurm-%j.log", *more,
    ]  # fmt: skip
    given += ["--no-requeue"] * (options.chain is not None or not options.requeue)
    given += ["--dependency=singleton"] * (options.chain is not None)
    script = render("train.sbatch", given, options.exports(time.strftime("%Y%m%d-%H%M%S")))
    path = run_dir / "submitted.sbatch"
    if options.dry_run:
        say(f"{script}\n# sbatch {shlex.join([str(path), run_file, *overrides])}  (not submitted)")
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    publish_text(path, script)
    jobs = []
    for _ in range(options.chain or 1):
        jobs.append(slurm.sbatch(path, run_file, *overrides, options=given))
        slurm.record(run_dir, jobs[-1], name)
    say(
        f"submitted job {', '.join(map(str, jobs))}\n"
        f"  sft-dist status {run_dir} --follow\n"
        f"  tail -F {run_dir}/slurm-{jobs[0]}.log\n"
        f"  sft-dist stop {run_dir}          # saves, ends, and does not come back"
    )


_OF_TRAINING = (
    "nodes", "gpus_per_node", "gpu", "cpus_per_gpu", "requeue", "chain", "launcher", "stage", "stage_environment",
)  # fmt: skip


def _preparation(
    config: RunConfig, run_file: str, overrides: Sequence[str], options: Options, more: Sequence[str], say: Say
) -> None:
    if config.prepare is None:
        raise ConfigError(f"{run_file}: it has no `prepare`; submit the preparation of each set of its mixture")
    if meant := [name for name in _OF_TRAINING if getattr(options, name) != getattr(Options(), name)]:
        raise ConfigError(
            f"--{meant[0].replace('_', '-')}: a preparation has none; it takes --tasks, --time, --partition, --account, and "
            "options of sbatch after --, as in -- --cpus-per-task=16"
        )
    common = [*options.common(), *more]
    array_options, merge_options = [f"--array=1-{options.tasks or 1}", *common], ["--kill-on-invalid-dep=yes", *common]
    array, merge = (render("prepare.sbatch", given, {}) for given in (array_options, merge_options))
    folder = Path(config.prepare.out)
    if options.dry_run:
        say(
            f"{array}\n# sbatch array.sbatch {shlex.join([run_file, *overrides])}, then after it, with --merge  (not submitted)"
        )
        return
    folder = folder.with_name(f"{folder.name}.jobs")
    folder.mkdir(parents=True, exist_ok=True)
    publish_text(folder / "array.sbatch", array)
    publish_text(folder / "merge.sbatch", merge)
    first = slurm.sbatch(folder / "array.sbatch", run_file, *overrides, options=array_options)
    merge_options.append(f"--dependency=afterok:{first}")
    second = slurm.sbatch(folder / "merge.sbatch", run_file, "--merge", *overrides, options=merge_options)
    say(
        f"submitted job {first} ({options.tasks or 1} tasks), and job {second}, which merges what they make\n"
        f"  squeue --jobs={first},{second}\n"
        f"  sft-dist inspect {config.prepare.out}          # when it is done"
    )


def check(config: RunConfig, options: Options) -> str:
    """Everything that can be known to be wrong before the queue; returns the derived numbers of the run.

    Raises ConfigError naming the numbers of nodes on which the batch does not divide, or what else is wrong.
    """
    check_deadline(config)
    from sft_dist.gpus import gpu

    told, wrong, card = {}, {}, gpu(options.gpu) if options.gpu else None
    ranks = max(1, options.gpus_per_node)
    for count in options.counts:
        try:
            topology = Topology(world_size=count * ranks)
            told[count] = Plan.of(config, topology, Life("submit"), card=card, is_elsewhere=True).describe()
        except ConfigError as error:
            wrong[count] = str(error)
    if wrong and told:
        raise ConfigError(
            f"--nodes {options.nodes}: with {', '.join(map(str, wrong))} of them the run could not go on "
            f"({next(iter(wrong.values()))}); it could with {', '.join(map(str, told))}"
        )
    if wrong:
        raise ConfigError(next(iter(wrong.values())))
    return told[options.counts[-1]]


def describe_model(config: RunConfig, options: Options) -> Iterator[str]:
    """Its parameters, the memory of a GPU with the fewest nodes, and a warning where its checkpoints may not fit.

    Raises ModelError, CheckpointError where there is no room for one checkpoint, and ConfigError where the run cannot fit the
    GPU that was named.
    """
    from launch import fit, parts
    from sft_dist import preflight
    from sft_dist.gpus import GIB, gpu

    ranks, card = min(options.counts) * max(1, options.gpus_per_node), gpu(options.gpu) if options.gpu else None
    plan = Plan.of(config, Topology(world_size=ranks), Life("submit"), card=card, is_elsewhere=True)
    model = fit.model_of(plan)
    checkpoints = parts.checkpoints(plan, parts.identity(plan, model.made))
    size = parts.checkpoint_bytes(model.meta)
    room = preflight.require_room(checkpoints.folder, checkpoints.retention, size)
    yield f"model: {parts.describe(model.meta)}, {size / 1e9:,.2f} GB a checkpoint"
    if room:
        yield room
    if model.has_experts:
        yield "memory: not planned of a mixture of experts"
        return
    needed = fit.needed(plan, model).total / GIB
    rows = plan.batch.micro_batch_rows
    yield f"memory: {needed:,.2f} GiB of a GPU, on {ranks} ranks with {rows} rows a micro-batch" + (
        "" if card else " (with --gpu NAME what cannot fit is refused)"
    )
    if card is not None and (tight := fit.refuse_what_cannot_fit(plan, model, card)):
        yield tight


def render(name: str, options: Sequence[str], exports: dict[str, str]) -> str:
    """The project's batch script `name` with these options of sbatch in the place of its own, in this Python's environment.

    The options are there for who reads it, or submits it by hand; `submit` gives them to sbatch too, where they win over
    the site's SBATCH_… variables.
    """
    options = _by_line(options)
    lines = _script(name).splitlines()
    given = {option.split("=")[0].split(" ")[0] for option in options} | (
        {"--requeue"} if "--no-requeue" in options else set()
    )
    kept = [line for line in lines if not line.startswith("#SBATCH") or line.split()[1].split("=")[0] not in given]
    last = max(at for at, line in enumerate(kept) if line.startswith("#SBATCH")) + 1
    here = shlex.quote(str(Path(sys.executable).parent))
    environment = [f'export PATH={here}:"$PATH"', *(f"export {k}={shlex.quote(v)}" for k, v in exports.items())]
    return "\n".join([*kept[:last], *(f"#SBATCH {option}" for option in options), "", *environment, *kept[last:], ""])


def _by_line(words: Sequence[str]) -> list[str]:
    """Options of sbatch with their values, quoted.

    >>> _by_line(["--qos=high", "-x", "n7", "--comment=for me"])
    ['--qos=high', '-x n7', "'--comment=for me'"]
    """
    made: list[list[str]] = []
    for word in words:
        if word.startswith("-") or not made:
            made.append([word])
        else:
            made[-1].append(word)
    return [shlex.join(option) for option in made]


def _script(name: str) -> str:
    """A batch script of the clone, or of the installed package."""
    for folder in (Path(__file__).parents[1] / "slurm", Path(sft_dist.__file__).parent / "slurm"):
        if (folder / name).is_file():
            return (folder / name).read_text()
    raise ConfigError(f"{name}: neither in a clone nor in the installed package; install sft-dist again")
