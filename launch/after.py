"""What is done with a finished run: evaluate it, export it, ask it something."""

from __future__ import annotations

import difflib
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.settle import order_of, rows_of
from sft_dist import evaluate as measure
from sft_dist import verify as proof
from sft_dist.config import read
from sft_dist.console import confusion_table
from sft_dist.data.loader import Loader
from sft_dist.data.mixture import BLOCK, Joined
from sft_dist.data.tokenise import Tokenizer
from sft_dist.errors import CheckpointError, ConfigError, DataError
from sft_dist.export import ABOUT, export, read_run
from sft_dist.labels import LabelTask
from sft_dist.manifest import masters, read_manifest, read_state, verify
from sft_dist.retention import list_folders
from sft_dist.topology import Topology

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _is_run(model: str) -> bool:
    return (Path(model) / "run.yaml").is_file()


def _open(model: str) -> tuple[Any, str, dict[str, str]]:
    """(plain model, tokenizer folder or id, the run's folders of shards by the names of its sets) of a run, an export or a hub id."""
    if _is_run(model):
        trained = read_run(Path(model))
        sets = dict(zip(trained.config.set_names, trained.config.shards_dirs, strict=True))
        return trained.model, str(trained.tokenizer), sets
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            model, use_safetensors=True, trust_remote_code=False, attn_implementation="sdpa"
        ).eval()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{model}: neither a run folder nor a model ({str(error).splitlines()[0]}). Name a run_dir, an export, or a "
            "Hugging Face id"
        ) from None
    about = Path(model) / ABOUT
    known = json.loads(about.read_text()) if about.is_file() else {"shards": []}
    folders = [known["shards"]] if isinstance(known["shards"], str) else known["shards"]
    names = known.get("sets") or (measure.file_names(folders) if folders else [])
    return loaded, model, dict(zip(names, folders, strict=True))


def evaluate_models(models: tuple[str, ...], shards: str | None, *, micro_batch_rows: int, as_json: bool) -> None:
    """Print the held-out numbers of each model."""
    for model in models:
        measured = measure_model(model, shards, micro_batch_rows=micro_batch_rows)
        matrix = {} if measured.confusion is None else {"confusion": measured.confusion}
        if as_json:
            print(json.dumps({"model": model, **measured.values, **matrix}))
            continue
        shown = "  ".join(f"{name.removeprefix('validation_')} {value:.4f}" for name, value in measured.values.items())
        print("\n".join([f"{model}: {shown}", *map(confusion_table, matrix.values())]))


def measure_model(model: str, shards: str | None, *, micro_batch_rows: int) -> measure.Measured:
    """The held-out numbers of a run, an export or a hub model, on its own shards or named ones."""
    loaded, tokenizer, own_sets = _open(model)
    folders = {"": shards} if shards else own_sets
    if not folders:
        raise ConfigError(f"{model}: no shards are known for it; name prepared ones with --shards FOLDER")
    return _measure(
        loaded, tokenizer, {name: Path(folder) for name, folder in folders.items()}, model, micro_batch_rows
    )


def _measure(
    model: Any, tokenizer: str, folders: dict[str, Path], name: str, micro_batch_rows: int
) -> measure.Measured:
    for folder in (folder for folder in folders.values() if not folder.is_dir()):
        raise ConfigError(
            f"{name}: its shards are not in {folder.absolute()}; start from the folder that the run was started from, or "
            "name them with --shards FOLDER"
        )
    names, places = list(folders), list(folders.values())
    validation, general = (measure.held_out(names, places, split) for split in ("validation", "general"))
    if not validation:
        where = ", ".join(map(str, places))
        raise ConfigError(f"{where}: has no validation split; set prepare.validation_fraction and prepare again")
    loaders = {}
    for split, sets in (("validation", validation), ("general", general)):
        if sets:
            joined = Joined(list(sets.values()))
            measure.same_tokenizer(joined, Tokenizer.load(tokenizer).fingerprint, name)
            loaders[split] = Loader(joined, Topology(), micro_batch_rows=micro_batch_rows, shuffle=False)
    forward, comms = measure.alone(model, _device())
    evaluator = measure.Evaluator(
        comms,
        loaders["validation"],
        LabelTask.open(places[0] / "labels") if len(places) == 1 else None,
        general=loaders.get("general"),
        sources=measure.Sources.of(list(validation.values()), list(validation)),
    )
    try:
        measured = evaluator.metrics(forward)
        return replace(measured, values=measured.values | evaluator.general_loss(forward))
    finally:
        comms.close()


def run_tasks(models: tuple[str, ...], tasks: list[str], *, micro_batch_rows: int, as_json: bool) -> None:
    """Print what lm-eval measures of each model: public benchmarks by name, or tasks of one's own by their YAML file."""
    for model in models:
        results = measure_tasks(model, tasks, micro_batch_rows=micro_batch_rows)
        print(json.dumps({"model": model, "tasks": results}) if as_json else f"{model}:\n{_table(results)}")


def measure_tasks(model: str, tasks: list[str], *, micro_batch_rows: int) -> dict[str, dict[str, float]]:
    """By task and metric what lm-eval measures of a run (as it would be exported), an export or a hub model.

    Raises ConfigError where lm-eval is missing or does not know a task, DataError where the data of one is out of reach.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--tasks: needs {error.name}, which is not installed; pip install 'sft-dist[lm-eval]'"
        ) from None
    manager = TaskManager()
    for task in tasks:
        if task not in manager.all_tasks and not Path(task).is_file():
            close = difflib.get_close_matches(task, manager.all_tasks, n=1)
            remedy = f"did you mean {close[0]}?" if close else "`lm-eval ls tasks` lists them"
            raise ConfigError(f"--tasks: {task!r} is neither a task that lm-eval knows nor a YAML file; {remedy}")
    with tempfile.TemporaryDirectory() as folder:
        if _is_run(model):
            export(Path(model), Path(folder) / "export")
            model = str(Path(folder) / "export")
        loaded, tokenizer, _ = _open(model)
        made = HFLM(
            pretrained=loaded.to(_device()),
            tokenizer=AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False),
            batch_size=micro_batch_rows,
        )
        try:
            found = lm_eval.simple_evaluate(model=made, tasks=tasks, task_manager=manager, log_samples=False)
        except OSError as error:
            raise DataError(
                f"--tasks: {str(error).splitlines()[0]}; most tasks read their data from the Hugging Face hub: make it reachable, or "
                "name a task of files that are here"
            ) from None
    return {task: _numbers(values) for task, values in found["results"].items()}


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """What lm-eval says of a task, without what is no number.

    >>> _numbers({"alias": "x", "acc,none": 0.5, "acc_stderr,none": 0.1, "exact_match,strict": 0.25, "f1_stderr,none": "N/A"})
    {'acc': 0.5, 'acc_stderr': 0.1, 'exact_match,strict': 0.25}
    """
    numbers = {name: value for name, value in values.items() if "," in name and isinstance(value, int | float)}
    return {name.removesuffix(",none"): float(value) for name, value in numbers.items()}


def _table(results: dict[str, dict[str, float]]) -> str:
    """A line for each metric of each task.

    >>> print(_table({"arc": {"acc": 0.5, "acc_stderr": 0.125}, "squad": {"f1,strict": 0.25}}))
      arc    acc        0.5000 ± 0.1250
      squad  f1,strict  0.2500
    """
    rows = []
    for task, numbers in results.items():
        for name, value in numbers.items():
            kind, comma, variant = name.partition(",")
            if kind.endswith("_stderr"):
                continue
            error = numbers.get(f"{kind}_stderr{comma}{variant}")
            rows.append((task, name, f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")))
    widths = [max((len(row[place]) for row in rows), default=0) for place in (0, 1)]
    return "\n".join(f"  {task:{widths[0]}}  {name:{widths[1]}}  {value}" for task, name, value in rows)


def verify_run(run_dir: Path) -> proof.Certificate:
    """What can be proved of a run; see `sft_dist.verify`. Raises CheckpointError when no checkpoint is whole."""
    folder = run_dir / "checkpoints"
    found = masters(folder, lambda path: ())
    if found is None:
        raise CheckpointError(f"{run_dir}: no checkpoint there yet; train first, or name another run folder")
    path, state = found
    config = read(path / "run.yaml")
    shards, mixture = rows_of(config)
    order = order_of(config, shards, mixture)
    checks = [
        *proof.checkpoints(folder),
        *proof.fed(
            state,
            shards,
            order,
            config.train.seed,
            mixture.names if mixture else ("rows",),
            BLOCK if mixture and len(mixture.names) > 1 else None,
        ),
    ]
    checks += [
        proof.Check("past", None, f"rows {left.begin:,} to {left.end - 1:,} of another stream: {left.ledger.text}")
        for left in state.past
    ]
    out, about = run_dir / "export", None
    if (out / ABOUT).is_file():
        about = json.loads((out / ABOUT).read_text())
        dtype = getattr(torch, json.loads((out / "config.json").read_text())["dtype"])
        checks.append(proof.export(out, about["step"], dtype, folder))
    checks += [proof.Check("by hand", True, note) for note in state.notes]
    verdicts = [json.loads(file.read_text())["reason"] for file in sorted((run_dir / "verdicts").glob("*.json"))]
    told = ", ".join(f"{verdicts.count(reason)} {reason}" for reason in sorted(set(verdicts)))
    checks.append(proof.Check("lives", True, f"{told or 'no verdict'} (one that was killed leaves none)"))
    return proof.Certificate(f"{run_dir} at step {state.step}", tuple(checks))


def list_checkpoints(run_dir: Path, *, is_read: bool) -> tuple[str, bool]:
    """A table for a person, oldest first; and whether all of them are whole."""
    rows = []
    for path in list_folders(run_dir / "checkpoints"):
        try:
            manifest = read_manifest(path)
            state, damage = read_state(path, manifest), verify(path) if is_read else None
        except CheckpointError as error:
            rows.append((path, None, None, str(error)))
        else:
            rows.append((path, manifest, state, damage))
    if not rows:
        raise CheckpointError(f"{run_dir}: no checkpoint there; train first, or name another run folder")
    scores = [state.score_here for _, _, state, _ in rows if state and state.score_here is not None]
    lines = [f"{'step':>10}{'size':>12}  {'written at':22}{'validation':>11}  {'age':>8}  whole?"]
    for path, manifest, state, damage in rows:
        if manifest is None:
            lines.append(f"{int(path.name[5:]):>10}{'':51}  NO: {damage}")
            continue
        size = sum(entry["bytes"] for entry in manifest["files"].values())
        layout = f"ZeRO {manifest['zero_stage']} x {manifest['world_size']}"
        score = state.score_here
        told = "" if score is None else f"{abs(score):.4f}" + "*" * (score == min(scores))
        whole = f"NO: {damage}" if damage else "yes, every byte read" if is_read else "yes, by its manifest"
        lines.append(
            f"{state.step:>10}{_size(size):>12}  {layout:22}{told:>11}  {_age(manifest['saved_at']):>8}  {whole}"
        )
    is_whole = not any(damage for *_, damage in rows)
    return "\n".join([*lines, "* best validation" if scores else ""]).rstrip(), is_whole


def _size(num_bytes: int) -> str:
    """Bytes for a person.

    >>> _size(12_345_678)
    '12.3 MB'
    """
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _age(saved_at: float) -> str:
    """Seconds, minutes, hours or days since then."""
    seconds = max(0.0, time.time() - saved_at)
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def export_run(run_dir: Path, out: Path, dtype: str | None) -> None:
    """Export, and say what can be done with the result."""
    step = export(run_dir, out, getattr(torch, dtype) if dtype else None)
    print(
        f"exported step {step} to {out}: loaded again with plain transformers, weights and logits equal\n"
        f'  AutoModelForCausalLM.from_pretrained("{out}")   ·   sft-dist eval {out}   ·   sft-dist chat {out} --prompt "…"'
    )


def answer_prompt(model: str, prompt: str, max_new_tokens: int) -> str:
    """The model's greedy answer to one prompt, through its own chat template."""
    loaded, folder, _ = _open(model)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenizer.chat_template is None:
        raise ConfigError(f"{model}: its tokenizer has no chat template; export it from a run, or add one")
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(_device())
    length = asked["input_ids"].shape[1]
    context = getattr(loaded.config, "max_position_embeddings", None) or length + max_new_tokens
    if length >= context:
        raise ConfigError(f"--prompt: {length} tokens do not leave room in a context of {context}; shorten it")
    ends = Tokenizer.load(folder).end_ids if _is_run(model) else loaded.generation_config.eos_token_id
    with torch.no_grad():
        made = loaded.to(_device()).generate(
            **asked,
            max_new_tokens=min(max_new_tokens, context - length),
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=ends,
        )
    return tokenizer.decode(made[0, length:], skip_special_tokens=True).strip()
