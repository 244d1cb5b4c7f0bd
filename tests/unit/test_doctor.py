"""`sft-dist doctor`: what works is said to work, and each planted failure is seen, with what to do about it."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import urllib.error
from collections import namedtuple
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement

from launch import doctor, submit
from launch.doctor import Check
from tests.unit.prepared_runs import sft_dist


@pytest.fixture
def quick(monkeypatch):
    """No process that imports for half a minute, and no network."""
    monkeypatch.setattr(doctor, "imports", lambda: Check("imports", True, "said to work", "", True))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def told(*arguments, code=0):
    result = sft_dist("doctor", *arguments)
    assert result.exit_code == code, result.output
    return result.stdout


def test_this_machine_is_fit(quick, tmp_path):
    was_initialized = torch.distributed.is_initialized()
    text = told("--run-dir", tmp_path / "runs" / "deep")
    for words in (
        "  ok  Python ",
        f"  ok  torch           {metadata.version('torch')} (tested with >=",
        "other packages  ",
        "6 DeepSpeed files, 10 presets, batch scripts",
        "fit: all that is necessary works",
        f"GB free in {tmp_path}, one file is written at about",
    ):
        assert words in text
    assert not list(tmp_path.iterdir()), "nothing is left there"
    about = json.loads(told("--run-dir", tmp_path, "--json"))
    assert about["is_fit"]
    assert {check["name"] for check in about["checks"]} >= {
        "torch",
        "imports",
        "disk",
        "hub",
        "[parquet]",
        "SLURM",
        "compiler",
    }
    assert torch.distributed.is_initialized() == was_initialized, "no process group is started"


def by_name(checks):
    return {check.name: check for check in checks}


def test_a_package_that_is_missing_or_too_old_is_told_with_its_command(quick, monkeypatch):
    real = metadata.version

    def version(name):
        if name == "deepspeed":
            raise metadata.PackageNotFoundError(name)
        return {"transformers": "4.40.0", "rensa": "9.0"}.get(name) or real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    text = told(code=2)
    assert "  NO  deepspeed       not installed\n" in text
    assert "→ pip install 'deepspeed<0.20,>=0.19'" in text
    assert "  NO  transformers    4.40.0, tested with >=5.17, <6" in text
    assert "  NO  rensa           9.0, tested with" in text, "not only the large ones"
    assert text.rstrip().endswith("not fit: deepspeed, transformers, rensa; see → above")


def test_a_pre_release_of_the_right_range_is_right():
    assert doctor.package(Requirement("torch>=2.11,<3")).works
    name = SimpleNamespace(
        name="torch", specifier=Requirement(f"torch=={metadata.version('torch').partition('+')[0]}").specifier
    )
    assert doctor.package(name).works, "a local build, as +cpu, is the same release"


def test_a_python_that_is_too_old(monkeypatch):
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.9.1")
    check = by_name(doctor.software())["Python"]
    assert (check.works, check.is_needed, check.remedy) == (False, True, "a Python >=3.11 and a new environment")


def test_a_program_that_is_not_installed(monkeypatch):
    def nothing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "metadata", nothing)
    [check] = doctor.software()
    assert (check.found, check.works) == ("not installed, only found on the path", False)
    assert list(doctor.extras()) == []


@pytest.mark.parametrize(
    ("done", "found"),
    [
        (subprocess.CompletedProcess([], 1, "", "Traceback\nImportError: libcudart.so.13: cannot open"), "ImportError: libcudart.so.13: cannot open"),
        (subprocess.CompletedProcess([], -11, "", ""), "ended with -11"),
        (subprocess.TimeoutExpired([], 120), "no end within 120 s"),
    ],
)  # fmt: skip
def test_packages_that_do_not_go_together(monkeypatch, done, found):
    def run(*_, **__):
        if isinstance(done, Exception):
            raise done
        return done

    monkeypatch.setattr(doctor.subprocess, "run", run)
    check = doctor.imports()
    assert (check.works, check.is_needed, check.found) == (False, True, found)
    assert check.remedy


def test_extras_for_who_works_on_it_are_not_told():
    assert not {"[lint]", "[test]", "[docs]", "[bench]"} & by_name(doctor.extras()).keys()


def test_an_extra_that_is_missing_is_not_needed(monkeypatch):
    real = metadata.version

    def version(name):
        if name == "pyarrow":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    check = by_name(doctor.extras())["[parquet]"]
    assert check == Check("[parquet]", False, "pyarrow not installed", "pip install 'sft-dist[parquet]'")
    assert doctor.fit([check])


def test_files_that_did_not_come_along(monkeypatch):
    monkeypatch.setattr(submit, "render", lambda *_: (_ for _ in ()).throw(FileNotFoundError("no train.sbatch")))
    check = doctor.own_files()
    assert (check.works, check.found, check.remedy) == (False, "no train.sbatch", "install it anew")


# ---- GPUs ----


def cuda(monkeypatch, *, count=2, bf16=True, nccl=True):
    about = SimpleNamespace(name="NVIDIA H100", total_memory=80 << 30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: about)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(torch.cuda, "nccl", SimpleNamespace(version=lambda: (2, 27, 3)), raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def test_gpus_as_they_should_be(monkeypatch):
    cuda(monkeypatch)
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="580.65\n580.65\n"))
    found = by_name(doctor.gpus())
    assert found["GPU 1"].found == "NVIDIA H100, 80 GiB, compute capability 9.0"
    assert found["driver"].found == "580.65, torch is built for CUDA 13.0"
    assert (found["bf16"].works, found["NCCL"].found) == (True, "2.27.3")


def test_gpus_that_lack_something(monkeypatch):
    cuda(monkeypatch, bf16=False, nccl=False)
    monkeypatch.setattr(
        doctor.subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError("nvidia-smi"))
    )
    found = by_name(doctor.gpus())
    assert "no answer from nvidia-smi" in found["driver"].found
    assert (found["bf16"].works, found["bf16"].is_needed, found["bf16"].remedy) == (
        False,
        False,
        "train.precision: fp16, or fp32",
    )
    assert (found["NCCL"].works, found["NCCL"].is_needed) == (False, True)


def test_a_gpu_that_torch_does_not_see_and_no_gpu_at_all(monkeypatch):
    cuda(monkeypatch, count=0)
    monkeypatch.setattr(doctor, "_has_driver", lambda: True)
    [check] = doctor.gpus()
    assert "finds no GPU" in check.found
    assert not doctor.fit([check])
    monkeypatch.setattr(doctor, "_has_driver", lambda: False)
    found = by_name(doctor.gpus())
    assert (found["GPUs"].works, found["GPUs"].is_needed, found["gloo"].works) == (False, False, True)


# ---- disk, compiler, cluster, network ----

Usage = namedtuple("Usage", "total used free")


def test_no_room_and_small_shared_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, 64 << 20))
    found = by_name(doctor.disk(tmp_path))
    assert found["disk"].found == f"0.07 GB free in {tmp_path}"
    assert not doctor.fit(list(found.values()))
    assert (found["shared memory"].works, found["shared memory"].is_needed) == (False, False)
    assert "--shm-size" in found["shared memory"].remedy


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    def denied(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", denied)
    found = by_name(doctor.disk(tmp_path))["disk"]
    assert (found.works, found.is_needed) == (False, True)
    assert found.found == f"nothing can be written in {tmp_path} (Permission denied)"


def test_a_compiler_or_none(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    check = doctor.compiler()
    assert (check.works, check.is_needed) == (False, False)
    assert "a C++ compiler and ninja not found: train.compile needs the compiler" in check.found
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    assert doctor.compiler().found == "/bin/g++, ninja, nvcc"


def test_a_cluster_or_none(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "squeue" else f"/bin/{name}")
    [check] = doctor.slurm()
    assert (check.works, check.is_needed, check.found) == (
        False,
        False,
        "squeue not found: needed for sft-dist submit only",
    )
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    done = SimpleNamespace(stdout="slurm 24.05.2\n", stderr="", returncode=0)
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: done)
    assert next(doctor.slurm()).found == "slurm 24.05.2"
    done = SimpleNamespace(stdout="", stderr="sinfo: error: Unknown host\nsinfo: fatal: no source\n", returncode=1)
    [check] = doctor.slurm()
    assert (check.works, check.is_needed) == (False, False)
    assert check.found == "its clients are there, and know of no cluster (sinfo: error: Unknown host)", "on one line"
    monkeypatch.setattr(
        doctor.subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(subprocess.TimeoutExpired([], 20))
    )
    assert next(doctor.slurm()).found == "its clients are there, sinfo gives no answer"


def test_the_hub_is_asked_only_where_it_may_be(monkeypatch):
    def away(request, timeout):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(doctor.urllib.request, "urlopen", away)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert doctor.hub().works
    assert "not asked: HF_HUB_OFFLINE is set" in doctor.hub().found
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert (doctor.hub().works, doctor.hub().is_needed) == (False, False)
    assert "cannot be reached (no route)" in doctor.hub().found
    asked = []
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    monkeypatch.setattr(
        doctor.urllib.request, "urlopen", lambda request, timeout: asked.append(request.full_url) or io.BytesIO()
    )
    monkeypatch.setattr(doctor, "_has_token", lambda: False)
    assert "https://mirror.example can be reached, not logged in" in doctor.hub().found
    assert asked == ["https://mirror.example"]

    def angry(request, timeout):
        raise urllib.error.HTTPError(request.full_url, 405, "no HEAD here", {}, None)

    monkeypatch.setattr(doctor.urllib.request, "urlopen", angry)
    assert doctor.hub().works, "an answer is an answer"


def test_a_token_is_seen_and_not_shown(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(doctor.urllib.request, "urlopen", lambda request, timeout: io.BytesIO())
    assert doctor.hub().found.endswith("can be reached, logged in")
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert not doctor._has_token()
