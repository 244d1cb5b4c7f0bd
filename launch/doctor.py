"""Is this machine fit? What works, what does not, and what to do about it; nothing is trained, and no process group is made."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from launch.settle import find_compiler
from sft_dist import __version__
from sft_dist.gpus import GIB

_OWN = "sft-dist"
_NOT_FOR_USERS = {"test", "bench", "docs", "dev", "data", "lint"}  # extras
_IMPORT_SECONDS = 120.0  # a busy machine takes 20 for DeepSpeed
_HUB_SECONDS = 4.0
_SAMPLE_BYTES = 64 << 20
_LEAST_BYTES = 1 << 30  # of disk: a run's log and a small model's checkpoints
_LEAST_SHARED_BYTES = 256 << 20  # NCCL's buffers between the GPUs of a node; containers often have 64 MiB


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at: what was found, and where it does not work what to do.

    `is_needed`: without it nothing can be trained here; else something is lacking that not everybody wants.
    """

    name: str
    works: bool
    found: str
    remedy: str = ""
    is_needed: bool = False


def examine(run_dir: Path) -> list[Check]:
    """Look at everything; `run_dir`: where runs are to be written."""
    checks = [*software(), own_files(), imports()]
    if all(check.works for check in checks if check.name in ("torch", "imports")):
        checks += gpus()
    return [*checks, compiler(), *disk(run_dir), *slurm(), hub(), *extras()]


def fit(checks: list[Check]) -> bool:
    """Whether all that is necessary works."""
    return all(check.works for check in checks if check.is_needed)


def table(checks: list[Check]) -> str:
    """For a person: a line a check, and a line with the remedy below what does not work."""
    width = max(len(check.name) for check in checks) + 2
    lines = [f"sft-dist {__version__} on {socket.gethostname()}", ""]
    for check in checks:
        mark = "ok" if check.works else "NO" if check.is_needed else "-"
        lines.append(f"  {mark:4}{check.name:{width}}{check.found}")
        if check.remedy:
            lines.append(f"  {'':4}{'':{width}}→ {check.remedy}")
    wrong = [check.name for check in checks if check.is_needed and not check.works]
    lines += [
        "",
        f"not fit: {', '.join(wrong)}; see → above"
        if wrong
        else "fit: all that is necessary works (-: lacking, and not everybody needs it)",
    ]
    return "\n".join(lines)


def as_json(checks: list[Check]) -> dict[str, Any]:
    """For programs."""
    return {"version": __version__, "is_fit": fit(checks), "checks": [asdict(check) for check in checks]}


# ---- software ----


def software() -> Iterator[Check]:
    """Python and every package that is required, against the ranges that were tested."""
    try:
        about, required = metadata.metadata(_OWN), metadata.requires(_OWN) or []
    except metadata.PackageNotFoundError:
        yield Check(
            "sft-dist",
            False,
            "not installed, only found on the path",
            "pip install -e . in its folder, or its wheel",
            True,
        )
        return
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    wanted, have = SpecifierSet(about["Requires-Python"] or ""), platform.python_version()
    is_right = wanted.contains(have, prereleases=True)
    yield Check("Python", is_right, have, "" if is_right else f"a Python {wanted} and a new environment", True)
    others, right = 0, 0
    for requirement in sorted(map(Requirement, required), key=lambda one: (one.name not in _FIRST, one.name)):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        check = package(requirement)
        if check.works and requirement.name not in _FIRST:
            others, right = others + 1, right + 1
        else:
            yield check
    yield Check("other packages", right == others, f"{right} as required")


_FIRST = ("torch", "deepspeed", "transformers", "tokenizers")


def package(requirement: Any) -> Check:
    """One required package."""
    name, tested = requirement.name, ", ".join(sorted(map(str, requirement.specifier), reverse=True))
    asked = f"pip install '{name}{requirement.specifier}'"
    try:
        have = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, False, "not installed", asked, True)
    if not requirement.specifier.contains(have, prereleases=True):
        return Check(name, False, f"{have}, tested with {tested}", asked, True)
    return Check(name, True, f"{have} (tested with {tested})", "", True)


def imports() -> Check:
    """Whether the heavy packages can be imported, in a process of their own: a crash there is an answer."""
    code = "import torch, transformers, deepspeed"
    environment = {**os.environ} if _has_driver() else {"DS_ACCELERATOR": "cpu", **os.environ}
    began = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=_IMPORT_SECONDS, env=environment
        )
    except subprocess.TimeoutExpired:
        return Check(
            "imports",
            False,
            f"no end within {_IMPORT_SECONDS:.0f} s",
            "is the disk of the Python environment overloaded?",
            True,
        )
    if done.returncode == 0:
        return Check(
            "imports", True, f"torch, transformers and deepspeed in {time.monotonic() - began:.0f} s", "", True
        )
    said = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
    return Check(
        "imports",
        False,
        said[:160],
        f"python -c '{code}' shows all of it; usually packages of different builds were mixed",
        True,
    )


def extras() -> Iterator[Check]:
    """What can be installed besides."""
    try:
        about, required = metadata.metadata(_OWN), metadata.requires(_OWN) or []
    except metadata.PackageNotFoundError:
        return
    from packaging.requirements import Requirement

    for extra in sorted(set(about.get_all("Provides-Extra") or ()) - _NOT_FOR_USERS):
        of_it = [one for one in map(Requirement, required) if one.marker and one.marker.evaluate({"extra": extra})]
        of_it = [one for one in of_it if one.marker and not one.marker.evaluate({"extra": ""})]
        missing = [one.name for one in of_it if not package(one).works]
        what = ", ".join(sorted(one.name for one in of_it))
        yield Check(
            f"[{extra}]",
            not missing,
            f"{what}" + (" not installed" if missing else ""),
            f"pip install 'sft-dist[{extra}]'" if missing else "",
        )


# ---- GPUs ----


def own_files() -> Check:
    """What comes with the program and is no Python: DeepSpeed files, batch scripts, presets."""
    from launch.init import presets
    from launch.submit import render
    from sft_dist.zero import shipped

    try:
        script = render("train.sbatch", [], {})
    except OSError as error:
        script, missing = "", str(error)
    else:
        missing = "" if shipped() and presets() else "no ds_configs or no presets"
    found = f"{len(shipped())} DeepSpeed files, {len(presets())} presets, batch scripts"
    return Check(
        "own files", bool(script) and not missing, missing or found, "install it anew" if missing else "", True
    )


def _has_driver() -> bool:
    return Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi") is not None


def gpus() -> Iterator[Check]:
    """GPUs, their driver, what they compute in, and how they would talk."""
    import torch

    if not torch.cuda.is_available():
        if _has_driver():
            yield Check(
                "GPUs",
                False,
                f"an NVIDIA driver is there, and torch {torch.__version__} finds no GPU",
                "pip install a torch for your CUDA (pytorch.org), and see what nvidia-smi says",
                True,
            )
            return
        yield Check(
            "GPUs",
            False,
            "none: prepare, plan, submit, export work; training is for tiny models (sft-dist init --preset tiny)",
        )
        yield Check(
            "gloo",
            torch.distributed.is_available() and torch.distributed.is_gloo_available(),
            "ranks on the CPU talk by it",
            "",
            True,
        )
        return
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        yield Check(
            f"GPU {number}",
            True,
            f"{about.name}, {about.total_memory / GIB:.0f} GiB, compute capability {about.major}.{about.minor}",
        )
    yield Check("driver", True, f"{_driver()}, torch is built for CUDA {torch.version.cuda or torch.version.hip}")
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    yield Check(
        "bf16",
        has_bf16,
        "supported" if has_bf16 else "not by this GPU",
        "" if has_bf16 else "train.precision: fp16, or fp32",
    )
    has_nccl = torch.distributed.is_nccl_available()
    version = ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else "not in this torch"
    yield Check(
        "NCCL",
        has_nccl,
        version,
        "" if has_nccl else "pip install torch from pytorch.org: its builds for Linux have it",
        True,
    )


def _driver() -> str:
    """The driver's version, as NVIDIA's tool tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "version unknown (no answer from nvidia-smi)"
    return done.stdout.split("\n")[0].strip() or "version unknown"


def compiler() -> Check:
    """What train.compile calls, and what builds packages that come as source, such as flash attention."""
    found = find_compiler()
    missing = [name for name, there in (("a C++ compiler", found), ("ninja", shutil.which("ninja"))) if not there]
    if missing:
        return Check(
            "compiler",
            False,
            f"{' and '.join(missing)} not found: train.compile needs the compiler, and flash-attn from source both; nothing else here does",
            "apt install g++ ninja-build, or your system's packages of these names",
        )
    return Check("compiler", True, f"{found}, ninja" + (", nvcc" if shutil.which("nvcc") else ""))


# ---- disk, cluster, network ----


def disk(run_dir: Path) -> Iterator[Check]:
    """Room and speed where runs are written; shared memory."""
    above = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(above).free
    if free < _LEAST_BYTES:
        yield Check(
            "disk",
            False,
            f"{free / 1e9:,.2f} GB free in {above}",
            "make room, or put run_dir elsewhere (sft-dist doctor --run-dir FOLDER)",
            True,
        )
    else:
        yield _written(above, free)
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        is_enough = free >= _LEAST_SHARED_BYTES
        yield Check(
            "shared memory",
            is_enough,
            f"{free / (1 << 20):,.0f} MiB free in {shared}",
            "" if is_enough else "several GPUs of a node talk through it: docker run --shm-size=8g, or --ipc=host",
        )


def _written(folder: Path, free: int) -> Check:
    """Whether a file can be written there, and how fast."""
    content, began = os.urandom(1 << 20), time.monotonic()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            for _ in range(_SAMPLE_BYTES // len(content)):
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return Check(
            "disk",
            False,
            f"nothing can be written in {folder} ({error.strerror})",
            "choose a run_dir that is yours: sft-dist doctor --run-dir FOLDER",
            True,
        )
    speed = _SAMPLE_BYTES / (time.monotonic() - began)
    return Check(
        "disk",
        True,
        f"{free / 1e9:,.0f} GB free in {folder}, one file is written at about {speed / 1e6:,.0f} MB/s",
        "",
        True,
    )


def slurm() -> Iterator[Check]:
    """The clients that `sft-dist submit` calls."""
    missing = [name for name in ("sbatch", "squeue", "scancel", "scontrol") if shutil.which(name) is None]
    if missing:
        yield Check(
            "SLURM",
            False,
            f"{', '.join(missing)} not found: needed for sft-dist submit only",
            "on a cluster: its login node has them, maybe after module load slurm",
        )
        return
    try:
        done = subprocess.run(["sinfo", "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        found = "its clients are there, sinfo gives no answer"
    else:
        found = (done.stdout.strip() or done.stderr.strip() or "no answer").splitlines()[0]
        if done.returncode:
            yield Check(
                "SLURM",
                False,
                f"its clients are there, and know of no cluster ({found})",
                "on a login node, or with SLURM_CONF naming the cluster's slurm.conf; needed for sft-dist submit only",
            )
            return
    yield Check("SLURM", True, found)


def hub() -> Check:
    """Whether the Hugging Face hub can be reached; nothing is downloaded."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return Check(
            "hub",
            True,
            "not asked: HF_HUB_OFFLINE is set, so models and tokenizers come from the cache or from folders",
        )
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=_HUB_SECONDS):
            pass
    except (OSError, ValueError) as error:  # URLError and timeouts are OSErrors
        if not isinstance(error, urllib.error.HTTPError):
            why = getattr(error, "reason", error)
            return Check(
                "hub",
                False,
                f"{endpoint} cannot be reached ({why})",
                "name models, tokenizers and data by local folders, and set HF_HUB_OFFLINE=1 so that nothing waits for it",
            )
    login = "logged in" if _has_token() else "not logged in: hf auth login, for models that ask for it"
    return Check("hub", True, f"{endpoint} can be reached, {login}")


def _has_token() -> bool:
    if find_spec("huggingface_hub") is None:
        return False
    from huggingface_hub import get_token

    return bool(get_token())


def run(run_dir: Path, say: Callable[[str], None], *, is_json: bool) -> int:
    """Examine, say it, and return the exit code: 0 where all that is necessary works, 2 where not."""
    import json

    checks = examine(run_dir)
    say(json.dumps(as_json(checks), indent=2) if is_json else table(checks))
    return 0 if fit(checks) else 2
