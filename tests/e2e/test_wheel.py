"""The wheel as a stranger has it: in an environment of its own, in another folder, with no clone to fall back on.

That environment borrows torch and the other requirements from this one, so that it takes seconds; `make` installs them for real.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.e2e.commands import ROOT, run
from tests.unit.prepared_runs import records, run_file

HELP = """
import click, launch.cli, sft_dist
from importlib.metadata import version
for name, command in launch.cli.main.commands.items():
    print(f"{name}:", command.get_short_help_str(200), sep="\\t")
    command.get_help(click.Context(command))
print("found in", launch.cli.__file__, sft_dist.__file__, sep="\\t")
print("version", sft_dist.__version__, version("sft-dist"), sep="\\t")
"""


def build(folder: Path, out: Path, *targets: str) -> None:
    """What `python -m build` makes, by the same backend, without an environment of its own to download it into."""
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out), *targets]
    made = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr


def digests(wheel: Path) -> dict[str, str]:
    """Name → digest of each file of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: hashlib.blake2b(archive.read(name)).hexdigest() for name in archive.namelist()}


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """A folder with the wheel and the source distribution."""
    out = tmp_path_factory.mktemp("dist")
    build(ROOT, out)
    return out


@pytest.fixture(scope="module")
def wheel(dist):
    [found] = dist.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def environment(tmp_path_factory, wheel):
    """What a command sees in a fresh environment in which nothing but the wheel is installed."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    install = ["install", "--quiet", "--no-index", "--no-deps", "--ignore-installed", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", python, *install], check=True)
    [packages] = folder.glob("lib/*/site-packages")
    # Of a folder that a .pth file names no .pth file is read: the clone that is installed there does not come along.
    (packages / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    bare = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return {**bare, "PATH": f"{folder / 'bin'}:/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def tracked() -> set[str]:
    """The files of the project as git has them, committed or about to be."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    return {path for path in listed if path and (ROOT / path).is_file()}


def test_a_wheel_holds_the_packages_and_what_they_read_and_no_more(wheel):
    moved = {"ds_configs": "sft_dist/ds_configs", "slurm": "sft_dist/slurm", "examples/presets": "sft_dist/presets"}
    wanted = {path for path in tracked() if path.split("/")[0] in ("sft_dist", "launch")}
    wanted |= {
        path.replace(own, to, 1) for path in tracked() for own, to in moved.items() if path.startswith(f"{own}/")
    }
    found = {name for name in digests(wheel) if ".dist-info/" not in name}
    assert found == wanted
    assert {"sft_dist/py.typed", "sft_dist/data/inspect.html.jinja", "sft_dist/ds_configs/zero2.json"} <= found
    assert {"launch/py.typed", "sft_dist/slurm/train.sbatch", "sft_dist/slurm/prepare.sbatch"} <= found


def test_a_source_distribution_holds_all_that_the_tests_need_and_makes_the_same_wheel(dist, wheel, tmp_path):
    [archive] = dist.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    [unpacked] = tmp_path.iterdir()
    files = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    assert files - {"PKG-INFO"} == tracked()
    build(unpacked, tmp_path / "again", "-t", "wheel")
    [again] = (tmp_path / "again").glob("*.whl")
    assert digests(again) == digests(wheel)


def test_every_command_has_its_help_and_the_version_is_one(environment, tmp_path):
    """In one process: each would import the same."""
    from launch.cli import main
    from sft_dist import __version__

    (tmp_path / "help.py").write_text(HELP)
    lines = [line.split("\t") for line in run("python help.py", tmp_path, environment=environment).splitlines()]
    *commands, (_, *places), (_, *versions) = lines
    assert [name for name, _ in commands] == [f"{name}:" for name in main.commands]
    assert all(told for _, told in commands)
    home = Path(environment["PATH"].split(":")[0]).parent
    assert all(Path(place).is_relative_to(home) for place in places), places
    assert versions == [__version__, __version__]
    assert run("sft-dist --version", tmp_path, environment=environment) == f"sft-dist, version {__version__}\n"
    assert "Traceback" not in run("python -m launch.train --help", tmp_path, environment=environment)
    [whose] = re.findall(r"^python -c .*$", (ROOT / "docs" / "install.md").read_text(), flags=re.MULTILINE)
    assert run(whose, tmp_path, environment=environment) == "['sft-dist']\n"
    refused = run("python -m launch.train run.yaml --nope", tmp_path, code=2, environment=environment)
    assert "unrecognized arguments: --nope" in refused
    assert "Traceback" not in refused


def test_a_run_in_another_folder_finds_what_is_shipped(environment, tmp_path):
    """DeepSpeed's files, the batch scripts and the page's template are in the wheel."""
    file = run_file(tmp_path, tmp_path / "out", records(tmp_path / "sms"), train__epochs=None, train__max_steps=2)
    zero = "zero=ds_configs/zero1.json"
    assert "prepared" in run(f"sft-dist prepare {file} {zero}", tmp_path, environment=environment)
    run(f"sft-dist inspect {tmp_path / 'out'} --html page.html", tmp_path, environment=environment)
    assert "<html" in (tmp_path / "page.html").read_text()
    told = run(f"sft-dist train {file} {zero} --nproc 1", tmp_path, environment=environment)
    assert "completed: 2 of 2 steps" in told
    assert "ZeRO stage 1" in told
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert max(json.loads(line)["step"] for line in lines) == 2
    script = run(f"sft-dist submit {file} {zero} --gpus-per-node 0 --dry-run", tmp_path, environment=environment)
    assert f'export PATH={environment["PATH"].split(":")[0]}:"$PATH"' in script
    assert "(not submitted)" in script
    array = run(f"sft-dist submit prepare {file} --tasks 2 --dry-run", tmp_path, environment=environment)
    assert "#SBATCH --array=1-2" in array


def test_a_file_that_is_not_shipped_is_told_with_those_that_are(environment, tmp_path):
    file = run_file(tmp_path, tmp_path / "out", records(tmp_path / "sms"))
    told = run(f"sft-dist train {file} zero=ds_configs/zero9.json", tmp_path, code=2, environment=environment)
    assert "no such DeepSpeed file; did you mean ds_configs/zero" in told
