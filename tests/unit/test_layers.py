"""The layers of the architecture: a module imports only from rows above its own, function bodies included."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = [
    "errors phases goodput data.records garbage glossary step_trace",
    "files gpus chart scaling",
    "schema topology identity long_rows",
    "batch reference",
    "zero",
    "config",
    "data.token_files data.origins data.order schedule limits spikes ledger watchdog usage",
    "state",
    "retention",
    "data.sources",
    "data.read data.curate data.template data.tokenise data.pack data.shards data.repeats data.select data.scratch",
    "data.work data.mixture",
    "data.merge",
    "data.build data.loader data.view comms loss metrics attention kernels layout stragglers optimizer adapter",
    "head layers",
    "console model engine store foreign flops answers labels document_losses tensorboard_sink services wandb_sink mlflow_sink",
    "memory fp8",
    "depth run_record",
    "report manifest",
    "checkpoint reproduce",
    "card",
    "account rollback votes evaluate export hub verify preflight health plan",
    "trainer step_profile",
]
ROW_OF = {name: number for number, row in enumerate(ROWS) for name in row.split()}
STAGES = {
    f"data.{name}"
    for name in ["read", "curate", "template", "tokenise", "pack", "shards", "repeats", "select", "scratch"]
}
TORCH_FREE = {
    "errors",
    "files",
    "schema",
    "reference",
    "batch",
    "zero",
    "config",
    "spikes",
    "topology",
    "schedule",
    "limits",
    "ledger",
    "identity",
    "watchdog",
    "state",
    "retention",
    "step_trace",
    "garbage",
    "scaling",
} | {name for name in ROW_OF if name.startswith("data.") and name != "data.loader"}
# module -> the only modules that may import it
OWNERS = {
    "deepspeed": {"engine"},
    "torch.distributed": {"comms"},
    "torch.utils.tensorboard": {"tensorboard_sink"},
    "tensorboard": {"tensorboard_sink"},
    "peft": {"adapter"},
    "bitsandbytes": {"adapter"},
    "torchao": {"fp8"},
    "wandb": {"wandb_sink"},
    "mlflow": {"mlflow_sink"},
    "rich": {"console", "data.view"},
    "plotext": {"console"},
    "os.environ": {"topology"},
    "gigatoken": {"data.tokenise"},
    "ftfy": {"data.curate"},
    "rensa": {"data.repeats"},
    "xxhash": {"files", "data.shards"},
}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, and `os.environ` where it is read."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv"):
            found.add("os.environ")
    return found


def violations(name: str, found: set[str]) -> list[str]:
    """What a library module of that name may not import, of what it does import."""
    bad = []
    own = {module.removeprefix("sft_dist.") for module in found if module.startswith("sft_dist.")}
    for other in own & ROW_OF.keys():
        if ROW_OF[other] >= ROW_OF[name]:
            bad.append(f"{name} imports {other}, which is not above it")
        if name in STAGES and other in STAGES:
            bad.append(f"stage {name} imports stage {other}")
    if name == "trainer" and any(other.startswith("data.") for other in own):
        bad.append("trainer imports a data module")
    if any(module.split(".")[0] == "launch" for module in found):
        bad.append(f"{name} imports launch")
    if name in TORCH_FREE and any(module.split(".")[0] in ("torch", "transformers") for module in found):
        bad.append(f"{name} imports torch")
    for module, owners in OWNERS.items():
        used = any(other == module or other.startswith(f"{module}.") for other in found)
        if used and name not in owners:
            bad.append(f"{name} uses {module}, which belongs to {sorted(owners)}")
    return bad


MODULES = {
    path.relative_to(ROOT / "sft_dist").with_suffix("").as_posix().replace("/", "."): path
    for path in (ROOT / "sft_dist").rglob("*.py")
    if path.name != "__init__.py"
}


def test_every_module_has_a_row():
    assert set(MODULES) == set(ROW_OF)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_module_keeps_to_its_layer(name):
    assert violations(name, imports(MODULES[name])) == []


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("data.pack", {"sft_dist.data.shards"}),
        ("loss", {"sft_dist.engine"}),
        ("trainer", {"sft_dist.data.loader"}),
        ("config", {"torch"}),
        ("data.build", {"transformers.AutoTokenizer"}),
        ("engine", {"torch.distributed"}),
        ("model", {"deepspeed"}),
        ("limits", {"os.environ"}),
        ("export", {"launch.train"}),
    ],
)
def test_a_planted_violation_is_seen(name, found):
    assert violations(name, found)


def test_function_bodies_are_read(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("def f():\n    import torch.distributed as d\n    return d, os.environ\n")
    assert imports(file) == {"torch.distributed", "os.environ"}


def test_the_core_can_be_read_in_an_afternoon():
    core = [
        "trainer",
        "engine",
        "data.order",
        "data.loader",
        "loss",
        "checkpoint",
        "layout",
        "store",
        "ledger",
        "state",
    ]
    assert sum(len(MODULES[name].read_text().splitlines()) for name in core) <= 1800
