"""One way to train, in a process of its own, on the weights and rows that it is given (see train_step.py).

python benchmarks/contestants.py NAME TASK.json BEGAN    BEGAN: `time.monotonic()` at the start of the process; prints JSON

NAME: zero0 … zero3, compiled, bare: this trainer, the same at ZeRO 1 with `train.compile`, its head and kernel without DeepSpeed
      plain, fsdp2:        the loop that everybody writes, and the same under FSDP2 on one rank
      trainer, trl:        the Hugging Face Trainer and TRL's SFTTrainer, by a Python that has them
      peak:                how fast this device multiplies matrices

All do the same: summed loss of the targets over the targets of the step, gradient clipped to 1, fused AdamW without decay,
a constant learning rate. In bf16 each keeps fp32 weights in the way that is its own: this trainer and `bare` as masters
of bf16 weights, FSDP2 by its policy, the others by autocast.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memory import begin_peak, peak_mib
from torch.nn import functional as F

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Tokens, targets and positions of a micro-batch, [rows, length] each, on the CPU."""


@dataclass
class Task:
    """What all contestants are given."""

    rows: str  # .npz of tokens, targets and positions, [steps x accumulation x micro_batch, length] each
    model: str  # a folder with weights
    tokenizer: str
    device: str
    precision: str
    micro_batch_rows: int
    accumulation: int
    learning_rate: float
    trl_attention: str | None = None  # as transformers calls it; None: the fastest of the wheels there are, or sdpa

    def steps(self) -> Iterator[list[Rows]]:
        """The micro-batches of each optimizer step."""
        with np.load(self.rows) as file:
            parts = [torch.from_numpy(file[name]) for name in ("tokens", "targets", "positions")]
        micro_batches = list(zip(*(part.split(self.micro_batch_rows) for part in parts), strict=True))
        for at in range(0, len(micro_batches), self.accumulation):
            yield micro_batches[at : at + self.accumulation]

    def load(self, attention: str = "sdpa") -> Any:
        """The model as transformers opens it, in fp32 on the device, ready to learn."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32, attn_implementation=attention)
        return model.to(self.device).train()


class Marks:
    """Clock, loss and memory after each step; what happens before the first one is start-up."""

    def __init__(self, task: Task, began: float) -> None:
        self.on_gpu, self.began = task.device == "cuda", began
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.losses: list[float] = []
        self.resident_mib = 0.0

    def begin(self) -> None:
        """All is built: from here on memory counts."""
        self.resident_mib = begin_peak()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def step(self, loss: float) -> None:
        """A step is done, on the device too."""
        if self.on_gpu:
            torch.cuda.synchronize()
        self.wall.append(time.monotonic())
        self.cpu.append(time.process_time())
        self.losses.append(loss)

    def report(self) -> dict[str, Any]:
        """What was measured; of the steps after the first, the time from one end to the next."""
        return {
            "losses": self.losses,
            "wall_seconds": np.diff(self.wall).tolist(),
            "cpu_seconds": np.diff(self.cpu).tolist(),
            "peak_mib": torch.cuda.max_memory_allocated() / 2**20 if self.on_gpu else peak_mib(),
            "resident_mib": self.resident_mib,
            "first_step_seconds": self.wall[0] - self.began,
        }


# ---- this trainer ----


def zero(task: Task, marks: Marks, stage: int, *, is_compiled: bool = False) -> dict[str, Any]:
    """A step as `sft_dist.trainer` makes one: agree, learn, account; after the proofs of a run's start."""
    from sft_dist import account
    from sft_dist.batch import derive_batch
    from sft_dist.comms import Comms
    from sft_dist.engine import Engine
    from sft_dist.model import build, model_config
    from sft_dist.schema import ModelConfig, TrainConfig
    from sft_dist.topology import Topology
    from sft_dist.zero import zero_config

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", DS_ACCELERATOR=task.device)
    comms = Comms(Topology(), torch.device("cuda:0" if task.device == "cuda" else "cpu"))
    rows, micro = task.micro_batch_rows * task.accumulation, task.micro_batch_rows
    about = {"precision": task.precision, "learning_rate": task.learning_rate, "max_steps": 1, "compile": is_compiled}
    config = TrainConfig(global_batch_rows=rows, micro_batch_rows=micro, **about)
    wanted = ModelConfig(name_or_path=task.model)
    made = model_config(wanted, vocab_size=0, seq_len=0, eos_id=0)
    model = build(wanted, made, seed=0, gradient_checkpointing=False)
    zero_file, batch = zero_config(f"ds_configs/zero{stage}.json"), derive_batch(config, 1, 1.0)
    engine = Engine(model, zero_file, config, batch, Topology(), comms.device)
    kernel = _proved(task, engine.use_kernel, engine.logits, made.vocab_size)
    engine.head.check(engine.scores, engine.logits, made.vocab_size, is_16_bit=task.precision == "bf16")
    marks.begin()
    for micro_batches in (list(map(_as_loaded, step)) for step in task.steps()):
        (targets,) = comms.sum([sum(micro_batch.num_targets for micro_batch in micro_batches)])
        applied = engine.learn(micro_batches, denominator=targets, learning_rate=task.learning_rate)
        assert applied is not None
        assert applied.is_applied
        account.exchange(applied, comms)
        marks.step(applied.loss_sum / targets)
    comms.close()
    return {"attention": kernel, "versions": ("deepspeed",)}


def bare(task: Task, marks: Marks) -> dict[str, Any]:
    """The same head and kernel in a plain loop: what DeepSpeed costs is the difference."""
    from sft_dist import kernels
    from sft_dist.attention import packed_logits
    from sft_dist.head import Head, scores_at, targets_at

    model = task.load()
    head, masters = Head(model), _masters(model, task.precision)

    def use(name: str) -> None:
        kernels.use(model, name)
        head.wants_documents = kernels.knows_documents(name)

    def logits(*rows: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return packed_logits(model, *(part.to(task.device) for part in rows))

    def loss_of(rows: Rows, count: int) -> torch.Tensor:
        known = _as_loaded(rows)
        tokens, targets, positions = (part.to(task.device) for part in rows)
        about = {"grad_scale": 1 / count, "num_documents": known.num_documents}
        return scores_at(model, tokens, positions, *targets_at(tokens, targets, known.num_targets), **about).loss

    def to_weights() -> None:
        with torch.no_grad():
            torch._foreach_copy_(list(model.parameters()), masters)

    kernel = _proved(task, use, logits, model.config.vocab_size)
    _loop(task, marks, masters, loss_of, after_step=to_weights if task.precision == "bf16" else lambda: None)
    return {"attention": kernel}


def _as_loaded(rows: Rows) -> Any:
    """As the loader gives them, with the counts that it knows."""
    from sft_dist.data.loader import MicroBatch

    tokens, targets, positions = rows
    counts = int(targets[:, 1:].sum()), int((positions == 0).sum())
    return MicroBatch(tokens, targets, positions, torch.empty(0), np.arange(len(tokens)), 0, *counts)


def _proved(task: Task, use: Callable[[str], None], logits: Callable[..., Any], vocab_size: int) -> str:
    """The attention kernel that a run of this trainer would choose, put to use."""
    from sft_dist.attention import choose
    from sft_dist.kernels import candidates

    is_16_bit = task.precision == "bf16"
    names = candidates(task.device, is_16_bit=is_16_bit)
    return choose(names, use, logits, vocab_size, is_16_bit=is_16_bit)[0]


def _masters(model: torch.nn.Module, precision: str) -> list[torch.Tensor]:
    """fp32 weights for the optimizer; a bf16 model hands its gradients on to them, where they are added up in fp32."""
    if precision == "fp32":
        return list(model.parameters())
    masters = [parameter.detach().clone() for parameter in model.parameters()]
    model.to(torch.bfloat16)

    def hand_on(parameter: torch.Tensor, master: torch.Tensor) -> None:
        master.grad = parameter.grad.float() if master.grad is None else master.grad.add_(parameter.grad)
        parameter.grad = None

    for parameter, master in zip(model.parameters(), masters, strict=True):
        parameter.register_post_accumulate_grad_hook(lambda p, of=master: hand_on(p, of))
    return masters


# ---- plain loops ----


def plain(task: Task, marks: Marks, *, is_sharded: bool = False) -> dict[str, Any]:
    """The loop that everybody writes, at its best: labels are shifted, not logits, and no logits outlive their micro-batch."""
    model = task.load()
    if is_sharded:
        _fully_shard(model, task)

    def loss_of(rows: Rows, count: int) -> torch.Tensor:
        tokens, targets, positions = (part.to(task.device) for part in rows)
        labels = F.pad(tokens.masked_fill(~targets, -100)[:, 1:], (0, 1), value=-100).flatten()
        is_cast = task.precision == "bf16" and not is_sharded
        with torch.autocast(task.device, torch.bfloat16) if is_cast else nullcontext():
            logits = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), labels, reduction="sum")

    before = model.set_requires_gradient_sync if is_sharded else lambda is_last: None
    _loop(task, marks, list(model.parameters()), loss_of, before_micro_batch=before)
    return {"attention": "sdpa"}


def _loop(
    task: Task,
    marks: Marks,
    parameters: list[torch.Tensor],
    loss_of: Callable[[Rows, int], torch.Tensor],  # of a micro-batch and the targets of its step: the summed loss
    before_micro_batch: Callable[[bool], None] = lambda is_last: None,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    adam = torch.optim.AdamW(parameters, lr=task.learning_rate, weight_decay=0.0, fused=True)
    marks.begin()
    for step in task.steps():
        count, total = sum(int(targets[:, 1:].sum()) for _, targets, _ in step), torch.zeros((), device=task.device)
        for number, rows in enumerate(step, 1):
            before_micro_batch(number == len(step))
            loss = loss_of(rows, count) / count
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        adam.zero_grad()
        after_step()
        marks.step(total.item())


def _fully_shard(model: Any, task: Task) -> None:
    """FSDP2 as its documentation shows: every block, then the whole."""
    import torch.distributed as dist
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    backend = "cpu:gloo,cuda:nccl" if task.device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    mesh = dist.init_device_mesh(task.device, (1,))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if task.precision == "bf16" else MixedPrecisionPolicy()
    blocks = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)


# ---- libraries ----


def _arguments(task: Task, folder: str) -> dict[str, Any]:
    """What the Trainer and TRL are told, so that they do the same as the others and nothing beside it."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": task.micro_batch_rows,
        "gradient_accumulation_steps": task.accumulation,
        "num_train_epochs": 1,
        "learning_rate": task.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "bf16": task.precision == "bf16",
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "use_cpu": task.device == "cpu",
        "dataloader_pin_memory": task.device == "cuda",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _marked(trainer: type, marks: Marks, accumulation: int) -> tuple[type, Any]:
    """A trainer that keeps the losses of its micro-batches, and the callback that marks its steps."""
    from transformers import TrainerCallback

    losses: list[torch.Tensor] = []

    class Marked(trainer):  # type: ignore[misc]
        def training_step(self, *args: Any, **more: Any) -> torch.Tensor:
            losses.append(super().training_step(*args, **more).detach())
            return losses[-1]

    class Mark(TrainerCallback):
        def on_train_begin(self, *args: Any, **more: Any) -> None:
            marks.begin()

        def on_step_end(self, *args: Any, **more: Any) -> None:
            marks.step(torch.stack(losses[-accumulation:]).sum().item())

    return Marked, Mark()


def _documents(task: Task) -> Iterator[dict[str, Any]]:
    """Every row as the libraries take it: ids, labels (-100 where nothing is learned), positions, lengths of documents."""
    for tokens, targets, positions in (rows for step in task.steps() for rows in step):
        labels = tokens.masked_fill(~targets, -100)
        labels[:, 0] = -100
        for row in range(len(tokens)):
            begins = (positions[row] == 0).nonzero().flatten().tolist()
            lengths = np.diff([*begins, positions.shape[1]]).tolist()
            yield {
                "input_ids": tokens[row], "labels": labels[row], "position_ids": positions[row], "seq_lengths": lengths
            }  # fmt: skip


def trainer(task: Task, marks: Marks) -> dict[str, Any]:
    """The Hugging Face Trainer on the same rows, positions included; no mask, no cache, so documents stay apart."""
    from transformers import Trainer, TrainingArguments

    marked, mark = _marked(Trainer, marks, task.accumulation)
    names = ("input_ids", "labels", "position_ids")

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {name: torch.stack([row[name] for row in rows]) for name in names}

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(**_arguments(task, folder), remove_unused_columns=False)
        dataset = list(_documents(task))
        made = marked(task.load(), arguments, data_collator=collate, train_dataset=dataset, callbacks=[mark])
        made.train()
    return {"attention": "sdpa", "versions": ("accelerate",)}


def trl(task: Task, marks: Marks) -> dict[str, Any]:
    """SFTTrainer as packing leaves it: padding-free micro-batches of the same rows, already tokenised and packed."""
    import importlib.util

    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    wheels = {"flash_attention_3": "flash_attn_interface", "flash_attention_2": "flash_attn"}
    there = [name for name, wheel in wheels.items() if importlib.util.find_spec(wheel)]
    fastest = there[0] if there and task.device == "cuda" and task.precision == "bf16" else "sdpa"
    attention = task.trl_attention or fastest
    marked, mark = _marked(SFTTrainer, marks, task.accumulation)
    names = ("input_ids", "labels", "seq_lengths")
    rows = [{name: np.asarray(row[name]).tolist() for name in names} for row in _documents(task)]
    with tempfile.TemporaryDirectory() as folder:
        about = {"max_length": len(rows[0]["input_ids"]), "packing": True}
        arguments = SFTConfig(**_arguments(task, folder), **about, dataset_kwargs={"skip_prepare_dataset": True})
        marked(
            model=task.load(attention),
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(task.tokenizer),
            callbacks=[mark],
        ).train()
    return {"attention": attention, "versions": ("accelerate", "trl", "datasets")}


# ---- the yardstick ----


def peak(task: Task) -> dict[str, Any]:
    """FLOPs a second of a large matrix product in the precision of the task, the best of several."""
    dtype = torch.bfloat16 if task.precision == "bf16" else torch.float32
    size, times = (8192, 20) if task.device == "cuda" else (2048, 1)
    left, right, out = (torch.randn(size, size, device=task.device).to(dtype) for _ in range(3))
    best = float("inf")
    for _ in range(8):
        began = time.perf_counter()
        for _ in range(times):
            torch.mm(left, right, out=out)
        if task.device == "cuda":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - began) / times)
    return {"flops_per_second": 2 * size**3 / best, "size": size}


def main() -> None:
    """Run the one that is named, and print what was measured."""
    name, task, began = sys.argv[1], Task(**json.loads(Path(sys.argv[2]).read_text())), float(sys.argv[3])
    if name == "peak":
        report = peak(task)
    else:
        ways: dict[str, Callable[..., dict[str, Any]]] = {
            **{f"zero{stage}": partial(zero, stage=stage) for stage in range(4)},
            "compiled": partial(zero, stage=1, is_compiled=True),
            "bare": bare,
            "plain": plain,
            "fsdp2": partial(plain, is_sharded=True),
            "trainer": trainer,
            "trl": trl,
        }
        marks = Marks(task, began)
        told = ways[name](task, marks)
        versions = {of: version(of) for of in ("torch", "transformers", *told.get("versions", ()))}
        report = {**marks.report(), **told, "versions": versions, "threads": torch.get_num_threads()}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
