"""Copies on a node's own disk of what every rank reads: the shards, and the Python environment.

python -m launch.stage /local/scratch [--environment] RUN.yaml [KEY=VALUE...]     once a node, before its ranks start
python -m launch.stage /local/scratch --where                                     the `bin` of the environment's copy
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from sft_dist.config import load
from sft_dist.data.shards import Shards
from sft_dist.errors import DataError, SftDistError
from sft_dist.topology import node_name


def copy_of(folder: Path, stage: Path | None) -> Path:
    """Where a node's own copy of prepared shards is; `folder` itself where there is none."""
    copy = stage / _name(folder, _manifests(folder)) if stage else folder
    return copy if copy.is_dir() else folder


def shards(folder: Path, stage: Path) -> Path:
    """Copy prepared shards, once; each file of the copy has the digest of its manifest. Raises DataError."""

    def check(copy: Path) -> None:
        for manifest in _manifests(copy):
            Shards.open(manifest.parent, verify=True)

    return _copy(folder, stage / _name(folder, _manifests(folder)), check)


def environment(stage: Path, prefix: Path = Path(sys.prefix)) -> Path:
    """Copy the Python environment, once; its files are what their packages' RECORDs say. Returns its `bin` folder.

    The interpreter that it is made of, and what is installed as editable, stay where they are. Raises DataError.
    """
    if not (prefix / "pyvenv.cfg").exists() and not (prefix / "conda-meta").exists():
        raise DataError(
            f"{prefix}: no environment of its own that could be copied; make one, with `python -m venv` or conda"
        )
    return _copy(prefix, where(stage, prefix).parent, _check_records) / "bin"


def where(stage: Path, prefix: Path = Path(sys.prefix)) -> Path:
    """The `bin` folder of the environment's copy, whether it has been made or not."""
    return stage / _name(prefix, _records(prefix)) / "bin"


def _manifests(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/manifest.json"))


def _name(folder: Path, stands_for: Sequence[Path]) -> str:
    digest = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=8)
    for path in stands_for:
        digest.update(path.read_bytes())
    return f"sft-dist-{folder.name}-{digest.hexdigest()}"


def _copy(folder: Path, copy: Path, check: Callable[[Path], None]) -> Path:
    """`copy` appears whole, checked, in one rename; who comes second takes what is there."""
    if copy.is_dir():
        return copy
    copy.parent.mkdir(parents=True, exist_ok=True)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    if size > (free := shutil.disk_usage(copy.parent).free):
        raise DataError(
            f"{copy.parent}: {free / 1e9:,.2f} GB are free, and a copy of {folder} takes {size / 1e9:,.2f} GB; make room, "
            "or name another folder"
        )
    for path in copy.parent.glob(f".{copy.name}-*.partial"):  # what one that was killed left
        if not Path(f"/proc/{path.name.split('-')[-1].split('.')[0]}").exists():
            shutil.rmtree(path, ignore_errors=True)
    staged = copy.with_name(f".{copy.name}-{os.getpid()}.partial")
    try:
        shutil.copytree(folder, staged, symlinks=True)
        check(staged)
        os.sync()  # tens of thousands of small files: one by one it would take minutes
        os.rename(staged, copy)
    except OSError as error:
        if not copy.is_dir():
            raise DataError(
                f"{staged}: {error.strerror or error}; the folder it was to be copied to has to take it"
            ) from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return copy


def _records(prefix: Path) -> list[Path]:
    return sorted(prefix.glob("lib/python*/site-packages/*.dist-info/RECORD"))


def _check_records(prefix: Path) -> None:
    """Compare the files of an environment with what their packages say of them; raises DataError with the first that differs."""
    for record in _records(prefix):
        for path, algorithm, expected in _recorded(record):
            made = base64.urlsafe_b64encode(hashlib.new(algorithm, path.read_bytes()).digest()).rstrip(b"=").decode()
            if made != expected:
                raise DataError(
                    f"{path}: not what {record.parent.name} recorded when it was installed; install that package again, "
                    "or do without the copy of the environment"
                )


def _recorded(record: Path) -> Iterator[tuple[Path, str, str]]:
    """(file, algorithm, digest) of each file of a package that has a digest and is there."""
    with record.open(newline="") as file:
        for name, digest, _ in csv.reader(file):
            path = record.parents[1] / name
            if digest and path.is_file() and not path.is_symlink():
                algorithm, _, value = digest.partition("=")
                yield path, algorithm, value


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the copies, or with --where print the folder of programs. What cannot be copied is told, and used where it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", type=Path)
    parser.add_argument("--environment", action="store_true")
    parser.add_argument("--where", action="store_true")
    parser.add_argument("run_file", nargs="?", metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_intermixed_args(arguments)
    if options.run_file is None and not options.where:
        parser.error("which run file?")
    if options.where:
        print(where(options.stage))
        return 0
    try:
        for folder in load(options.run_file, options.overrides).shards_dirs:
            shards(Path(folder), options.stage)
        if options.environment:
            environment(options.stage)
    except (SftDistError, OSError) as error:
        print(f"sft-dist: {node_name()}: warning: no copy: {error}. Read from where it is", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
