"""What is said in several files about installing and checking is said alike."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

from sft_dist import __version__

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
# Their packages are not among what the tests ran with.
UNTESTED_EXTRAS = {"lm-eval", "bench"}


def read(name: str) -> str:
    return (ROOT / name).read_text()


def one_line(script: str) -> str:
    """Commands with their continuation lines joined.

    >>> one_line("a \\\\\\n    && b")
    'a && b'
    """
    return " ".join(script.replace("\\\n", " ").split())


def canonical(requirement: str) -> str:
    return re.split(r"[\[<>=~!; @]", requirement)[0].lower().replace("_", "-")


def test_both_images_are_made_alike():
    docker, apptainer = read("Dockerfile"), read("apptainer.def")
    assert (
        re.search(r"^FROM (\S+)$", docker, re.MULTILINE)[1] == re.search(r"^From: (\S+)$", apptainer, re.MULTILINE)[1]
    )
    steps = [one_line(step) for step in re.findall(r"^RUN ((?:.*\\\n)*.*)$", docker, re.MULTILINE)]
    assert len(steps) == 2
    assert all(step in one_line(apptainer) for step in steps)
    copied = {name for line in re.findall(r"^COPY (.*) \S+$", docker, re.MULTILINE) for name in line.split()}
    assert copied == set(re.findall(r"^    (\S+) /opt/sft-dist/source/\S+$", apptainer, re.MULTILINE))
    assert copied == set(re.findall(r"^!(\S+)$", read(".dockerignore"), re.MULTILINE))
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {*wheel["packages"], *wheel["force-include"]} <= copied
    assert docker.count("-c constraints.txt") == 2


def test_the_version_is_one():
    assert yaml.safe_load(read("CITATION.cff"))["version"] == __version__
    assert set(re.findall(r"sft_dist-([\d.]+)-py3", read("docs/install.md"))) == {__version__}
    released = re.findall(r"^## \[([\d.]+)\] - \d{4}-\d\d-\d\d$", read("CHANGELOG.md"), re.MULTILINE)
    assert released[:1] == [__version__] or f"To be {__version__}" in read("CHANGELOG.md")


def test_every_package_that_the_tests_use_is_pinned():
    pins = dict(line.split("==") for line in read("constraints.txt").splitlines() if line and line[0] != "#")
    asked = list(PROJECT["project"]["dependencies"])
    asked += [one for name, ones in EXTRAS.items() if name not in UNTESTED_EXTRAS for one in ones]
    names = {canonical(one) for one in asked} - {"sft-dist"}
    assert names <= {canonical(name) for name in pins}


def test_every_extra_is_told():
    table = read("docs/install.md").split("| extra |")[1].split("\n\n")[0]
    told = {name for line in table.splitlines() for name in re.findall(r"`([\w-]+)`", line.split("|")[1])}
    assert told == set(EXTRAS)


def test_ci_and_make_run_the_hooks_and_nothing_beside_them():
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", read("Makefile"), re.MULTILINE)[1]
    assert re.fullmatch(r'\t@PATH="\$\(abspath \$\(BIN\)\):\$\$PATH" pre-commit run --all-files\b.*\n', recipe)
    assert re.search(r"^test: .*\blint\b", read("Makefile"), re.MULTILINE)
    assert re.search(r"^make test\b", read(".ci/run"), re.MULTILINE)
    [job] = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]
    for repository in yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]:
        assert repository["repo"] == "local"  # what `make` installed, at the releases of constraints.txt
        assert {hook["language"] for hook in repository["hooks"]} == {"system"}
