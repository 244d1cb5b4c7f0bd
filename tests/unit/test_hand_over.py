"""What an export says of its run: the run file that gives it again, and the numbers on its card."""

from __future__ import annotations

import json
from types import SimpleNamespace

import yaml

from sft_dist import reproduce
from sft_dist.card import _measured
from sft_dist.schema import RunConfig


def test_the_run_that_is_made_again_writes_into_nobodys_charts(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "read_manifest", lambda path: {"world_size": 1, "identity": {}})
    config = RunConfig.model_validate({
        "run_dir": "runs/x",
        "mixture": [{"shards": "a", "weight": 1}],
        "model": {"name_or_path": "gpt2"},
        "train": {"global_batch_rows": 8, "epochs": 1},
        "logging": {"wandb": {"project": "ours"}, "mlflow": {"experiment": "e", "tracking_uri": "http://inside:5000"}},
    })  # fmt: skip
    state = SimpleNamespace(step=1, tokens=5, ledger=SimpleNamespace(text="1 rows 0"))
    text = reproduce.recipe(tmp_path, tmp_path, config, state, "w", [])
    again = RunConfig.model_validate(yaml.safe_load(text))
    assert (again.logging.wandb, again.logging.mlflow) == (None, None)
    assert "inside" not in text


def test_a_damaged_verdict_says_nothing_and_stops_no_export(tmp_path):
    folder = tmp_path / "verdicts"
    folder.mkdir()
    (folder / "a.json").write_text('{"rea')
    (folder / "b.json").write_text("[]")
    assert not reproduce._is_over(tmp_path, 3)
    (folder / "c.json").write_text(json.dumps({"reason": "completed", "step": 3}))
    assert reproduce._is_over(tmp_path, 3)
    assert not reproduce._is_over(tmp_path, 2)


def test_fields_of_another_version_do_not_reach_the_card(tmp_path):
    line = {"step": 3, "validation_loss": 2.5, "validation_remark": "good", "general_curve": [1], "loss": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert _measured(tmp_path, 3) == {"loss": 2.5}
