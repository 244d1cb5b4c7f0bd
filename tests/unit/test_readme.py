"""The README's tree is the real tree."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
LISTED_FOLDERS = ("launch", "sft_dist", "ds_configs", "slurm", "examples")
DATA = ("data", "tokenizers")


def listed() -> dict[str, str]:
    """path -> what the README says of it."""
    block = (ROOT / "README.md").read_text().split("a test holds that:\n\n```\n")[1].split("```")[0]
    return {line.split()[0]: line.partition(" ")[2].strip() for line in block.splitlines()}


def tracked() -> set[str]:
    """The project's files, as git has them (committed or about to be)."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    return set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n"))


def test_every_file_has_its_line_and_every_line_its_file():
    files = {path for path in tracked() if path.split("/")[0] in LISTED_FOLDERS and (ROOT / path).is_file()}
    files = {
        path
        for path in files
        if not path.endswith(("__init__.py", "py.typed")) and not set(path.split("/")) & set(DATA)
    }
    files |= {path for path in tracked() if path.startswith("sft_dist/data/") and not path.endswith("__init__.py")}
    named = {path for path in listed() if path.split("/")[0] in LISTED_FOLDERS}
    assert named == files
    assert all((ROOT / path).exists() for path in listed())
    assert all(listed().values())
