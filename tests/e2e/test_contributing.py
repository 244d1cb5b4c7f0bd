"""CONTRIBUTING.md, executed; and each of its checks sees a fault that is planted for it."""

from __future__ import annotations

import re
import shutil
import subprocess

import yaml

from tests.e2e.commands import ROOT, run

# Shown, and why they are not run here.
ELSEWHERE = {
    "git clone": "this is the clone",
    "make": "by .ci/run, all of them",
    "source": "changes a shell; the tests run in that environment already",
    "pre-commit install": "it would change the hooks of this clone",
}
FAULTS = {
    "sft_dist/unused.py": "import os\n",  # ruff
    "sft_dist/spaced.py": "x  =  1\n",  # ruff format
    "launch/mistyped.py": 'rows: int = "many"\n',  # mypy
    "job.sbatch": "#!/bin/bash\ncd $1\n",  # shellcheck
    "README.md": "# Teh readme\n",  # codespell
    "run.yaml": "a: [1\n",
    "zero.json": '{"stage": }\n',
    "other.toml": "a = \n",
}


def test_the_commands_of_the_page():
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.DOTALL)
    lines = [line.partition("   #")[0].rstrip() for block in blocks for line in block.splitlines()]
    [first_test] = [line for line in lines if line and not line.startswith(tuple(ELSEWHERE))]
    assert " passed" in run(f"{first_test} -p no:cacheprovider -o addopts= -q", ROOT)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {line.split()[1] for line in lines if line.startswith("make ")} <= targets


def test_each_check_sees_a_planted_fault_and_changes_nothing(tmp_path):
    for name in (".pre-commit-config.yaml", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name, text in FAULTS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for arguments in (["init", "--quiet"], ["add", "."]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    told = run("pre-commit run --all-files", tmp_path, code=1)
    [repository] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    names = [hook["name"] for hook in repository["hooks"]]
    assert re.findall(r"^(.+?)\.{3,}.*Failed$", told, flags=re.MULTILINE) == names
    assert len(names) == len(FAULTS)
    assert {name: (tmp_path / name).read_text() for name in FAULTS} == FAULTS
