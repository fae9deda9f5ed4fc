"""What recap_fast runs with, in names and values."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path

import torch

FBGEMM_PACKAGES = ("fbgemm-gpu", "fbgemm-gpu-cpu")
"""The names under which FBGEMM is installed."""


def version(package: str) -> str | None:
    """Of an installed package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The model of the CPU."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:
        cpuinfo = ""
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return model.group(1).strip() if model else platform.processor() or platform.machine()


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_nvidia_driver() -> bool:
    """Whether this machine has the driver of an NVIDIA GPU, whatever torch knows of it."""
    return Path("/proc/driver/nvidia/version").exists()


def gpus() -> list[str]:
    """Those that torch can use."""
    if not torch.cuda.is_available():
        return []
    return [
        "{} (compute capability {}.{})".format(
            torch.cuda.get_device_name(number), *torch.cuda.get_device_capability(number)
        )
        for number in range(torch.cuda.device_count())
    ]


def versions() -> dict[str, str]:
    """Releases of Python and of packages, the CUDA of torch, CPU and GPUs."""
    found = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "torchrec": version("torchrec") or "not installed",
    }
    fbgemm = {name: version(name) for name in FBGEMM_PACKAGES}
    found |= {name: release for name, release in fbgemm.items() if release}
    if not any(fbgemm.values()):
        found["fbgemm-gpu"] = "not installed"
    found["CUDA of torch"] = torch.version.cuda or "none"
    found["CPU"] = f"{processor()}, {cores()} cores"
    found["GPU"] = "; ".join(gpus()) or "none"
    return found
