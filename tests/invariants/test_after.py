"""What is done with a finished run, and what cannot be done with it, said in one line each."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from launch.chat import Decoding
from sft_dist.config import load
from sft_dist.data.build import prepare
from tests.invariants import runs
from tests.workers import RankError, run_workers


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    path = runs.run_file(folder)
    prepare(load(path).prepare)
    run_workers(runs.run, 1, path, ("train.max_steps=2", "train.precision=bf16"))
    run_workers(call, 1, "export_run", folder / "run", folder / "export", None)
    return folder


def call(topology, name, *arguments, **more):
    """A function of what is done with a finished run, in a process of its own."""
    from launch import chat, hand_over, measure

    module = next(module for module in (measure, hand_over, chat) if hasattr(module, name))
    return getattr(module, name)(*arguments, **more)


def refused(pattern, *arguments, **more):
    with pytest.raises(RankError, match=pattern):
        run_workers(call, 1, *arguments, **more)


def test_an_export_keeps_the_precision_and_knows_where_it_is_from(finished):
    export = finished / "export"
    assert json.loads((export / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((export / "sft_dist.json").read_text())["step"] == 2
    assert {"model.safetensors", "config.json", "tokenizer.json", "generation_config.json"} <= {
        p.name for p in export.iterdir()
    }
    assert "Spam or ham?" in (export / "tokenizer_config.json").read_text() + "".join(
        path.read_text() for path in export.glob("*.jinja")
    )


def test_a_run_and_its_export_measure_the_same(finished):
    of_run, of_export = (
        run_workers(call, 1, "measure_model", str(finished / name), None, micro_batch_rows=4)[0]
        for name in ("run", "export")
    )
    assert of_run == of_export
    assert of_run.values["validation_loss"] == pytest.approx(
        runs.measured(finished / "run", 2)["validation_loss"], rel=1e-5
    )


def test_a_llama_in_bf16_is_exported_as_it_was_trained(tmp_path):
    """Its rotary tables stay fp32 in training and in what transformers loads: rounding them would show."""
    path = runs.run_file(tmp_path)
    prepare(load(path).prepare)
    llama = (
        "model={config: {model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, "
        "num_attention_heads: 2, num_key_value_heads: 1}}"
    )
    run_workers(runs.run, 2, path, (llama, "train.max_steps=3", "train.precision=bf16", "zero=ds_configs/zero3.json"))
    run_workers(call, 1, "export_run", tmp_path / "run", tmp_path / "export", None)
    measured = run_workers(call, 1, "measure_model", str(tmp_path / "export"), None, micro_batch_rows=4)[0]
    assert measured.values["validation_loss"] == pytest.approx(
        runs.measured(tmp_path / "run", 3)["validation_loss"], rel=1e-4
    )


def test_an_answer_is_one_of_few_words(finished):
    answer = run_workers(call, 1, "answer_prompt", str(finished / "export"), "win a prize", Decoding(3))[0]
    assert isinstance(answer, str)
    refused(r"--prompt: \d+ tokens do not leave room in a context of 128; shorten it", "answer_prompt",
            str(finished / "run"), "win " * 200, Decoding(3))  # fmt: skip


def test_what_cannot_be_measured_or_asked_is_said(finished, tmp_path):
    export = finished / "export"
    refused(
        "nowhere: neither a run folder nor a model .* Name a run_dir",
        "measure_model",
        "nowhere",
        None,
        micro_batch_rows=1,
    )
    moved = Path(shutil.copytree(export, tmp_path / "moved"))
    (moved / "sft_dist.json").unlink()
    refused(
        "no shards are known for it; name prepared ones with --shards",
        "measure_model",
        str(moved),
        None,
        micro_batch_rows=1,
    )
    (moved / "sft_dist.json").write_text(json.dumps({"shards": "elsewhere"}))
    refused(
        "its shards are not in /.*elsewhere; start from the folder",
        "measure_model",
        str(moved),
        None,
        micro_batch_rows=1,
    )
    bare = Path(shutil.copytree(finished / "shards", tmp_path / "bare"))
    shutil.rmtree(bare / "validation")
    refused(
        "has no validation split; set prepare.validation_fraction",
        "measure_model",
        str(export),
        str(bare),
        micro_batch_rows=1,
    )
    tokenizer = json.loads((moved / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (moved / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused("its tokenizer [0-9a-f]{12} is not the one the shards were cut with", "measure_model", str(moved),
            str(finished / "shards"), micro_batch_rows=1)  # fmt: skip
    about = json.loads((moved / "tokenizer_config.json").read_text())
    about.pop("chat_template", None)
    (moved / "tokenizer_config.json").write_text(json.dumps(about))
    for path in moved.glob("*.jinja"):
        path.unlink()
    refused("its tokenizer has no chat template; export it from a run", "answer_prompt", str(moved), "hi", Decoding(3))


def test_an_export_never_overwrites_and_needs_a_checkpoint(finished, tmp_path):
    refused(
        re.escape(f"{finished / 'export'}: already exists and is kept"),
        "export_run",
        finished / "run",
        finished / "export",
        None,
    )
    refused("no checkpoint there yet; train first", "export_run", tmp_path, tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


def differing(topology, run_dir, out):
    """An export whose tool chain gives other weights back."""
    import torch
    from transformers import GPT2LMHeadModel

    from sft_dist.export import export

    save = GPT2LMHeadModel.save_pretrained

    def careless(model, folder):
        with torch.no_grad():
            model.transformer.wpe.weight[0, 0] += 1
        save(model, folder)
        with torch.no_grad():
            model.transformer.wpe.weight[0, 0] -= 1

    GPT2LMHeadModel.save_pretrained = careless
    export(run_dir, out)


def test_an_export_that_reads_back_otherwise_is_not_published(finished, tmp_path):
    with pytest.raises(
        RankError, match=r"weights read back differ \(\['transformer\.wpe\.weight'\]\); the export is not published"
    ):
        run_workers(differing, 1, finished / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


class StandIn:
    """What is used of lm-eval: it remembers what it was given, and measures one thing of the model itself."""

    def __init__(self, fails=False):
        self.fails, self.given = fails, {}

    def install(self):
        import sys
        from types import ModuleType

        names = ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface", "lm_eval.tasks")
        modules = {name: ModuleType(name) for name in names}
        modules["lm_eval"].simple_evaluate = self.simple_evaluate
        modules["lm_eval.models.huggingface"].HFLM = self.wrap
        modules["lm_eval.tasks"].TaskManager = lambda: self
        sys.modules.update(modules)

    all_tasks = ("arc_easy", "hellaswag")

    def wrap(self, **given):
        self.given = given
        return self

    def simple_evaluate(self, *, model, tasks, task_manager, log_samples):
        assert (model, task_manager, log_samples) == (self, self, False)
        if self.fails:
            raise ConnectionError("no way to the hub\nat all")
        weights = self.given["pretrained"].state_dict()["transformer.wte.weight"]
        ids = self.given["tokenizer"].encode("win a prize", add_special_tokens=False)
        about = {
            "alias": "x",
            "weight,none": float(weights.double().sum()),
            "weight_stderr,none": "N/A",
            "ids,strict": len(ids),
        }
        return {"results": dict.fromkeys(tasks, about)}


def with_stand_in(topology, name, *arguments, fails=False, **more):
    """A function where lm-eval is the stand-in; what it returns and prints."""
    import contextlib
    import io

    StandIn(fails).install()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        return call(topology, name, *arguments, **more), said.getvalue()


def without_lm_eval(topology, *arguments, **more):
    import sys

    sys.modules["lm_eval"] = None
    call(topology, "measure_tasks", *arguments, **more)


def test_public_benchmarks_are_run_on_a_run_as_on_its_export(finished, tmp_path):
    task = tmp_path / "own.yaml"
    task.write_text("task: own\n")
    models = tuple(str(finished / name) for name in ("run", "export"))
    tasks = ["hellaswag", str(task)]
    [[_, said]] = run_workers(with_stand_in, 1, "run_tasks", models, tasks, micro_batch_rows=4, as_json=True)
    of_run, of_export = (json.loads(line) for line in said.splitlines())
    assert (of_run["model"], of_export["model"]) == models
    assert of_run["tasks"] == of_export["tasks"]
    assert list(of_run["tasks"]) == tasks
    assert set(of_run["tasks"]["hellaswag"]) == {"weight", "ids,strict"}
    [[_, text]] = run_workers(
        with_stand_in, 1, "run_tasks", models[1:], ["hellaswag"], micro_batch_rows=4, as_json=False
    )
    weight = of_run["tasks"]["hellaswag"]["weight"]
    assert text.splitlines()[:2] == [f"{models[1]}:", f"  hellaswag  weight      {weight:.4f}"]
    assert not [path for path in finished.iterdir() if path.name.startswith(".")], "nothing is left of the export"


def test_what_lm_eval_cannot_do_is_said(finished):
    arguments = {"micro_batch_rows": 1}
    for function, tasks, more, message in (
        (
            without_lm_eval,
            ["hellaswag"],
            {},
            r"--tasks: needs lm_eval, which is not installed; pip install 'sft-dist\[lm-eval\]'",
        ),
        (
            with_stand_in,
            ["hellasag"],
            {},
            "'hellasag' is neither a task that lm-eval knows nor a YAML file; did you mean hellaswag",
        ),
        (with_stand_in, ["?"], {}, "'\\?' is neither a task .* `lm-eval ls tasks` lists them"),
        (with_stand_in, ["arc_easy"], {"fails": True}, "--tasks: no way to the hub; most tasks read their data from"),
    ):
        name = ("measure_tasks",) if function is with_stand_in else ()
        with pytest.raises(RankError, match=message):
            run_workers(function, 1, *name, str(finished / "export"), tasks, **arguments, **more)
