"""docs/wikitext.md: its two run files are one recipe, its figure is drawn from its numbers, and the page tells those."""

from __future__ import annotations

import json
import re

import yaml

from sft_dist.config import load
from tests.e2e.commands import ROOT, clone, run

PAGE = (ROOT / "docs" / "wikitext.md").read_text()
MEASURED = json.loads((ROOT / "docs" / "figures" / "wikitext.json").read_text())


def lines(name: str) -> list[tuple[str, str]]:
    """(key and value, what is said of them) of a run file's lines."""
    text = (ROOT / "examples" / "wikitext" / name).read_text()
    return [(line.split("  #")[0].rstrip(), line) for line in text.splitlines() if line and not line.startswith("#")]


def test_the_large_run_differs_from_the_small_one_in_what_it_marks():
    small = {line for line, _ in lines("run.yaml")}
    for line, whole in lines("gpt2.yaml"):
        assert ("# differs" in whole) == (line not in small), whole
    config = load(ROOT / "examples" / "wikitext" / "gpt2.yaml")
    assert config.train.learning_rate == 2e-5
    assert (config.train.global_batch_rows, config.train.max_grad_norm, config.train.precision) == (3840, 1.0, "bf16")
    assert config.train.gradient_checkpointing
    assert config.evaluate.early_stopping is not None


def test_the_figure_is_drawn_from_the_numbers(tmp_path):
    figure = f"--json {ROOT}/docs/figures/wikitext.json --figure {tmp_path}/figure.svg"
    run(f"python {ROOT}/examples/wikitext/figure.py {figure}", tmp_path)
    assert (tmp_path / "figure.svg").read_text().count("<path") > 20
    small = load(ROOT / "examples" / "wikitext" / "run.yaml").model_dump(mode="json")
    for measured, rows in zip(MEASURED["runs"], (3840, 7680), strict=True):
        now = small["train"] | {"global_batch_rows": rows}  # which may have keys that were not there then
        assert measured["train"] == {key: now[key] for key in measured["train"]}
        assert measured["model"] == small["model"]["config"]


def test_the_numbers_of_the_page_are_those_measured():
    told = []
    for measured in MEASURED["runs"]:
        best, at = min((loss, step) for step, loss in measured["validation_loss"])
        steps, loss = measured["loss"][-1]
        first = measured["validation_loss"][0][1]
        cells = (f"{measured['train']['global_batch_rows']:,}", str(steps), f"{first:.2f}", f"{best:.2f} at step {at}")
        told.append((*cells, f"{loss:.2f}", measured["verdict"]))
    rows = re.findall(r"^\| ([\d,]+) \| (\d+) \| (\S+) \| (\S+ at step \d+) \| (\S+) \| (\w+) \|$", PAGE, flags=re.M)
    assert rows == told
    at_ten = [dict(measured["validation_loss"])[10] for measured in MEASURED["runs"]]
    assert f"{at_ten[1]:.2f} against {at_ten[0]:.2f} at step 10" in PAGE
    texts = json.loads((ROOT / "docs" / "figures" / "wikitext-eval.json").read_text())
    own, whole, learned = (
        MEASURED["runs"][0]["validation_loss"][-1][1],
        *(texts[f"validation_loss/{name}"] for name in ("valid", "head")),
    )
    assert f"{own:.2f} on them, {whole:.2f} on all" in PAGE
    assert f"{learned:.2f} on the" in PAGE


def test_wikitext_of_the_hub_becomes_articles(tmp_path):
    """A folder stands for the hub: a line of text a record, its end of line kept in some releases and not in others."""
    folder = clone(tmp_path) / "hub"
    article = ["", " = {0} = \n", "\n", " The {0} is a small animal of the woods .\n", " It eats {0} leaves ."]
    files = []
    for split in ("train", "validation", "test"):
        texts = [line.format(f"{split} {n}") for n in range(3) for line in article]
        (folder / split).mkdir(parents=True)
        (folder / split / "0.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        files.append({"split": split, "path": f"{split}/0.jsonl"})
    head = yaml.safe_dump({"configs": [{"config_name": "tiny", "data_files": files}]})
    (folder / "README.md").write_text(f"---\n{head}---\n")
    run("python examples/wikitext/fetch.py tiny data --dataset hub", folder.parent)
    made = (folder.parent / "data" / "train.txt").read_text().splitlines()
    assert made[:5] == [
        "",
        " = train 0 = ",
        "",
        " The train 0 is a small animal of the woods .",
        " It eats train 0 leaves .",
    ]
    said = run(
        "sft-dist prepare examples/wikitext/run.yaml prepare.sources='[{path: data/train.txt, schema: text}]' "
        "prepare.validation_sources='[{path: data/test.txt}]' prepare.tokenizer=examples/tokenizers/gpt2 "
        "prepare.curate.near_validation=null",
        folder.parent,
    )
    assert "6 read → 3 train, 3 validation" in said
