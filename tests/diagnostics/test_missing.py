"""What `python -m recap_fast` says of what is not there."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from recap_fast.diagnostics import missing
from recap_fast.torchrec_releases import PAIRS

CPU_ONLY = {"engines": ["cpu"]}
WITH_CUDA = {"engines": ["cpu", "cuda"]}


class Machine:
    """What the module asks of the machine, as a test wants it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self.cuda(None, gpu=False, driver=False)
        self.torch("2.13.0")
        self.installed(torchrec="1.8.0", **{"fbgemm-gpu-cpu": "1.8.0"})
        for module in ("torchrec", "fbgemm_gpu"):
            self.module(module, ModuleType(module))

    def cuda(self, release: str | None, *, gpu: bool, driver: bool = True) -> None:
        self._patch.setattr(torch.version, "cuda", release)
        self._patch.setattr(missing, "gpus", lambda: ["NVIDIA H200"] * gpu)
        self._patch.setattr(missing, "has_nvidia_driver", lambda: driver)

    def torch(self, release: str) -> None:
        self._patch.setattr(torch, "__version__", release)

    def installed(self, **packages: str) -> None:
        self._patch.setattr(missing, "version", packages.get)

    def module(self, name: str, module: ModuleType | None) -> None:
        self._patch.setitem(sys.modules, name, module)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_nothing_is_missing(machine: Machine) -> None:
    assert list(missing.missing(CPU_ONLY)) == []
    machine.installed(torchrec="1.8.0", **{"fbgemm-gpu": "1.8.0+cu130"})
    machine.cuda("13.0", gpu=True)
    assert list(missing.missing(WITH_CUDA)) == []


@pytest.mark.parametrize(
    ("release", "gpu", "info", "said"),
    [
        (
            "13.0",
            True,
            CPU_ONLY,
            "CUDA engine: not built, though there is a GPU: install nvcc",
        ),
        (None, False, CPU_ONLY, "CUDA: there is an NVIDIA GPU, but this torch is for CPUs only"),
        ("12.8", False, WITH_CUDA, "GPU: the CUDA engine is built, but torch finds no GPU"),
    ],
)
def test_what_a_gpu_lacks(
    machine: Machine, release: str | None, gpu: bool, info: dict, said: str
) -> None:
    machine.cuda(release, gpu=gpu)
    (line,) = missing.missing(info)
    assert line.startswith(said)
    if gpu:
        assert "of CUDA 13," in line and "RECAP_CUDA=ON pip install" in line


def test_an_engine_that_this_torch_cannot_run(machine: Machine) -> None:
    machine.cuda(None, gpu=False, driver=False)
    (line,) = missing.missing(WITH_CUDA)
    assert line.startswith("GPU: the CUDA engine is built, but this torch is for CPUs")


@pytest.mark.parametrize("release", PAIRS)
@pytest.mark.parametrize("gpu", [False, True])
def test_torchrec_and_fbgemm_that_belong_to_the_torch(
    machine: Machine, release: str, gpu: bool
) -> None:
    machine.torch(f"{release}.0+cu130")
    machine.cuda("13.0" if gpu else None, gpu=gpu, driver=gpu)
    machine.installed()
    machine.module("torchrec", None)
    machine.module("fbgemm_gpu", None)
    (line,) = missing.missing(WITH_CUDA if gpu else CPU_ONLY)
    assert line.startswith("torchrec is not installed and fbgemm_gpu is not installed; build_opti")
    torchrec, fbgemm = PAIRS[release]
    name = "fbgemm-gpu" if gpu else "fbgemm-gpu-cpu"
    assert f"torchrec=={torchrec} {name}=={fbgemm}`" in line


def test_a_torch_that_they_do_not_know(machine: Machine) -> None:
    machine.torch("2.12.1")
    machine.module("torchrec", None)
    machine.installed()
    (line,) = missing.missing(CPU_ONLY)
    assert "none is known for torch 2.12: install torch 2.13 or 2.14, then recap_fast" in line


def test_fbgemm_for_another_torch(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "fbgemm_gpu.py").write_text("raise OSError('undefined\\nsymbol: x')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fbgemm_gpu")
    (line,) = missing.missing(CPU_ONLY)
    assert line.startswith("fbgemm_gpu cannot be imported (undefined symbol: x); build_optimizer")
    assert "\n" not in line


def test_releases_that_were_not_tested_together(machine: Machine) -> None:
    machine.installed(torchrec="1.9.2", **{"fbgemm-gpu-cpu": "1.8.0"})
    (line,) = missing.missing(CPU_ONLY)
    assert line.startswith("torchrec 1.9.2 and FBGEMM 1.8.0 are not the releases that were tested")


def test_fbgemm_for_cpus_beside_a_gpu(machine: Machine) -> None:
    machine.cuda("13.0", gpu=True)
    fbgemm = ModuleType("fbgemm_gpu")
    fbgemm.__variant__ = "cpu"
    machine.module("fbgemm_gpu", fbgemm)
    (line,) = missing.missing(WITH_CUDA)
    assert line.startswith("FBGEMM is the build for CPUs") and "fbgemm-gpu==1.8.0`" in line


@pytest.mark.parametrize(("package", "module"), [("pydantic", "pydantic"), ("PyYAML", "yaml")])
def test_a_dependency(machine: Machine, package: str, module: str) -> None:
    machine.module(module, None)
    (line,) = missing.missing(CPU_ONLY)
    assert line.startswith(f"{package} is not installed;") and f"`pip install '{package}>=" in line
