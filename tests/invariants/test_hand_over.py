"""A run handed over: what its export holds, that it is the run, and that the run can be had again."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import resource
import shlex
import shutil

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from sft_dist.config import load
from sft_dist.data.build import prepare
from sft_dist.data.view import visible
from sft_dist.verify import reproduced
from tests.e2e.commands import forked
from tests.invariants import runs
from tests.workers import RankError, run_workers


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A run of six steps, in `run`, and its export beside its checkpoints, in shards."""
    folder = tmp_path_factory.mktemp("given")
    path = runs.run_file(folder)
    values = yaml.safe_load(path.read_text())
    values["prepare"]["sources"][0]["license"] = "cc-by-4.0"
    path.write_text(yaml.safe_dump(values))
    prepare(load(path).prepare)
    run_workers(runs.run, 1, path, ("train.max_steps=6", "evaluate.samples=3", "evaluate.max_new_tokens=5"))
    options = ("--max-shard-size", "30KB", "--license", "apache-2.0")
    assert "exported step 6" in typed("export", folder / "run", folder / "run" / "export", *options)
    return folder


def typed(*arguments, folder="/", code=0, before=None):
    """`sft-dist` with these arguments, in that folder."""
    return forked(shlex.join(["sft-dist", *map(str, arguments)]), folder, code=code, before=before)


def answered(topology, export, samples):
    """What plain transformers, asked as the card says, and `sft-dist chat` answer to the prompts of these samples."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from launch.chat import Decoding, answer_prompt

    tokenizer, model = AutoTokenizer.from_pretrained(export), AutoModelForCausalLM.from_pretrained(export)
    plain = []
    for sample in samples:
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": sample["prompt"]}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        ids = model.generate(**asked, max_new_tokens=5)[0, asked["input_ids"].shape[1] :]
        plain.append(tokenizer.decode(ids, skip_special_tokens=True).strip())
    return plain, [answer_prompt(str(export), sample["prompt"], Decoding(5)) for sample in samples]


def test_the_export_answers_as_the_trainer_did(given):
    lines = runs.curve(given / "run")
    [samples] = [line["samples"] for line in lines if line["step"] == 6 and "samples" in line]
    assert len(samples) == 3
    [(plain, chat)] = run_workers(answered, 1, given / "run" / "export", samples)
    assert plain == chat == [sample["answer"].strip() for sample in samples]


def test_whoever_may_read_the_card_may_read_the_weights(given):
    assert len({path.stat().st_mode for path in (given / "run" / "export").iterdir()}) == 1


def test_the_card_tells_what_the_run_knows(given):
    card = ModelCard.load(given / "run" / "export" / "README.md")
    measured = runs.measured(given / "run", 6)
    assert (card.data.license, card.data.pipeline_tag, card.data.library_name) == (
        "apache-2.0",
        "text-generation",
        "transformers",
    )
    assert card.data.base_model is None
    assert {f"validation_{result.metric_type}": result.metric_value for result in card.data.eval_results} == measured
    funnel = json.loads((given / "shards" / "prepare.json").read_text())["funnel"]
    for line in (
        f"| read | {funnel['read']} |", f"| train | {funnel['train']} |", "| steps | 6 |", "| rows | 48, 8 a step |",
        f"| `{given / 'messages'}` | cc-by-4.0 |", "DeepSpeed ZeRO stage 2, 1 process", "vllm serve ./export",
        "It was trained on single questions", "sft-dist train reproduce.yaml --nproc 1",
    ):  # fmt: skip
        assert line in card.text, line
    assert "not stated" not in card.text


def test_a_licence_that_is_stated_later_is_told_and_an_unknown_one_said(given, tmp_path):
    run = shutil.copytree(given / "run", tmp_path / "run", ignore=shutil.ignore_patterns("export"))
    values = yaml.safe_load((run / "run.yaml").read_text())
    values["prepare"]["sources"][0]["license"] = None
    values["model"]["license"] = "My Own Licence"
    (run / "run.yaml").write_text(yaml.safe_dump(values))
    shutil.rmtree(run / "verdicts")  # as of a run that was stopped there
    typed("export", run, tmp_path / "out")
    recipe = yaml.safe_load((tmp_path / "out" / "reproduce.yaml").read_text())
    state = json.loads((run / "checkpoints" / "step-00000006" / "state.json").read_text())
    assert recipe["budget"] == {"max_tokens": state["tokens"]}, "so that the new one stops there too"
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.license_name) == ("other", "My Own Licence")
    assert "| not stated |" in card.text
    assert "`license:` beside a source in the run file" in card.text


def test_verify_sees_a_shard_that_is_damaged_missing_or_elsewhere(given, tmp_path):
    export = given / "run" / "export"
    shards = sorted(export.glob("*.safetensors"))
    assert len(shards) > 2
    assert "weights are the fp32 masters of step 6, in float32" in typed("verify", given / "run")
    kept = shutil.copytree(export, tmp_path / "kept")

    def wrong(words):
        assert words in typed("verify", given / "run", code=3)
        shutil.rmtree(export)
        shutil.copytree(kept, export)

    shards[0].unlink()
    wrong("its weights cannot be read (No such file or directory")
    shards[0].write_bytes(shards[0].read_bytes()[:-7])
    wrong("its weights cannot be read (Error while deserializing header: ")
    content = bytearray(shards[1].read_bytes())
    content[-1] ^= 64
    shards[1].write_bytes(content)
    wrong("1 weights are not the masters of step 6")
    index = export / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(shards[1].name, shards[2].name))
    wrong("is not where the index says")
    assert "VERIFIED" in typed("verify", given / "run")


def again(topology, folder):
    """Train reproduce.yaml of that folder, there."""
    os.chdir(folder)
    return runs.run(topology, "reproduce.yaml")


def test_the_run_is_had_again_bit_for_bit_in_another_folder(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(given / "run" / "export" / "reproduce.yaml", "reproduce.yaml")
    prepare(load("reproduce.yaml").prepare)
    run_workers(again, 1, tmp_path)
    first, second = (
        runs.tensors(run / "checkpoints" / "step-00000006") for run in (given / "run", tmp_path / "reproduced")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert runs.numbers(tmp_path / "reproduced") == runs.numbers(given / "run")
    said = typed("verify", "reproduced", folder=tmp_path)
    assert "weights of step 6 are the same as then, to the bit" in said
    wanted = load("reproduce.yaml").reproduces
    for change, is_right, words in (
        ({}, False, "the weights of step 6 are others, though all that should matter is the same"),
        ({"world_size": 4}, None, "others, trained with 1 process in place of 4"),
        ({"environment": {"versions": "torch 1"}}, None, "in place of torch 1"),
        ({"caveats": ["a lever was pulled"]}, None, "others, trained with a lever was pulled"),
        ({"step": 7}, None, "step 7 was exported then, and is not reached or not kept here"),
        ({"ledger": "1 rows 0"}, False, "and then 1 rows 0"),
    ):
        checks = list(
            reproduced(wanted.model_copy(update={"weights": "0", **change}), tmp_path / "reproduced" / "checkpoints")
        )
        assert [check for check in checks if check.is_right is is_right and words in check.text], (words, checks)


def test_another_run_is_refused_before_it_begins(given, tmp_path):
    values = yaml.safe_load((given / "run" / "export" / "reproduce.yaml").read_text())
    values["prepare"]["out"] = str(given / "shards")

    def refused(pattern, *keys, value):
        changed = json.loads(json.dumps(values))
        place = changed
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        (tmp_path / "reproduce.yaml").write_text(yaml.safe_dump(changed))
        with pytest.raises(RankError, match=pattern):
            run_workers(again, 1, tmp_path)

    refused(r"reproduces\.identity: data was 'x' and is '[0-9a-f]+' here", "reproduces", "identity", "data", value="x")
    refused(
        r"reproduces\.sources: .*messages is not the file", "reproduces", "sources", str(given / "messages"), value="x"
    )
    refused(r"zero: ds_configs/zero2\.json does not say what it said", "reproduces", "zero", value={})


def small_disk():
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def infinite():
    from sft_dist import export

    read = export.read_run

    def planted(*arguments, **more):
        found = read(*arguments, **more)
        next(found.model.parameters()).data[0] = torch.tensor(1e6).to(found.model.dtype)
        return found

    export.read_run = planted


def test_what_cannot_be_written_leaves_nothing(given, tmp_path):
    said = typed("export", given / "run", tmp_path / "out", code=3, before=small_disk)
    assert "out: cannot be written (" in said
    assert "nothing is left of it. Make room, or choose another folder" in said
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".out.partial" / "old").mkdir(parents=True)  # of one that was killed
    assert "exported step 6" in typed("export", given / "run", tmp_path / "out", "--dtype", "float16")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "old").exists()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"
    said = typed("export", given / "run", tmp_path / "half", "--dtype", "float16", code=2, before=infinite)
    assert "transformer.wte.weight has weights that float16 cannot hold; take bfloat16 or float32" in said


def test_wishes_that_mean_nothing_are_told(given, tmp_path):
    for options, words in (
        (("--max-shard-size", "5"), "--max-shard-size: '5' is no size; write for example 5GB or 500MB"),
        (("--max-shard-size", "0GB"), "'0GB' is no size"),
        (("--private",), "--private is about the repository of --push-to"),
        (("--push-to", "me"), "--push-to me: not of the form ORG/NAME"),
    ):
        assert words in typed("export", given / "run", tmp_path / "out", *options, code=2)


def talked(topology, export):
    """A conversation through the functions behind the prompt: what was said piece by piece, and what `generate` makes alone."""
    from launch.chat import Chat, Decoding, obey

    out = []
    for decoding in (Decoding(24), Decoding(24, temperature=1.5, top_p=0.95, seed=7)):
        pieces, chat = [], Chat(str(export), decoding)
        answer, _ = chat.ask("win a prize", pieces.append)
        asked = torch.tensor([chat._ids(chat.history[:1])])
        torch.manual_seed(7)
        made = chat.model.generate(input_ids=asked, max_new_tokens=24, **decoding.options())[0, asked.shape[1] :]
        out.append((pieces, answer, chat.tokenizer.decode(made, skip_special_tokens=True).strip()))
    told = []
    for command in ("/undo", "/reset", "/sytem x", "/x", "/system be kind", "/help", "/system"):
        told.append(obey(chat, command))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        from launch.chat import answer_lines

        answer_lines(str(export), ["win a prize\n", "lunch\n"], Decoding(24))
    return out, told, said.getvalue()


def test_an_answer_in_pieces_is_the_answer_and_lines_are_answered_alone(given):
    [(made, told, lines)] = run_workers(talked, 1, given / "run" / "export")
    for pieces, answer, whole in made:
        assert answer == whole
        said, shown = (re.sub("[\ufffd\u2400-\u241f]", "?", text) for text in ("".join(pieces), visible(whole)))
        assert said == shown  # but for bytes that are no text, which this tokenizer tells only at their end
    assert len(made[1][0]) > 5
    assert told[:2] == ["(0 questions are left)", "(forgotten)"]
    assert told[2] == "(/sytem is no command; did you mean /system?)"
    assert told[3] == "(/x is no command; /help lists them)"
    assert told[4].startswith("(the model's template has no place for a system message (this model was trained without")
    assert "/undo" in told[5]
    assert told[6] == "(nothing is said before)"
    assert lines.splitlines()[0] == visible(made[0][1]).replace("\\", "\\\\").replace("\n", "\\n")
    assert len(lines.splitlines()) == 2
