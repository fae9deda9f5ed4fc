"""Builds ``tests/csrc``, once for all test files that need it.

The build stays in ``build/csrc``, so that only the first run waits for it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "tests" / "csrc"
BUILD = ROOT / "build" / "csrc"

needs_compiler = pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which(os.environ.get("CXX", "c++")) is None,
    reason="needs cmake and a C++ compiler",
)


def run(*command: str) -> str:
    """Returns what the command writes; fails the test with it if the command fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"
    return done.stdout


def _configure() -> list[str]:
    import pybind11
    import torch
    from torch.utils import cpp_extension

    variables = {
        "CMAKE_BUILD_TYPE": "Release",
        "PYBIND11_FINDPYTHON": "ON",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "RECAP_TORCH_INCLUDE_DIRS": ";".join(cpp_extension.include_paths()),
        "RECAP_TORCH_LIBRARY_DIR": cpp_extension.library_paths()[0],
        "RECAP_TORCH_CXX11_ABI": int(torch._C._GLIBCXX_USE_CXX11_ABI),
    }
    options = [f"-D{name}={value}" for name, value in variables.items()]
    return ["cmake", "-S", str(SOURCES), "-B", str(BUILD), *options]


def build(*targets: str) -> Path:
    """Builds the targets, or all, and returns the folder; other processes wait their turn."""
    BUILD.parent.mkdir(exist_ok=True)
    with open(f"{BUILD}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        configure = _configure()
        if subprocess.run(configure, capture_output=True).returncode != 0:
            shutil.rmtree(BUILD, ignore_errors=True)  # made by another cmake, or elsewhere
            run(*configure)
        wanted = ["--target", *targets] if targets else []
        run("cmake", "--build", str(BUILD), "--parallel", str(os.cpu_count()), *wanted)
    return BUILD


def run_ctest(name: str) -> None:
    """Runs one test of a finished build, by its exact name."""
    options = ["--output-on-failure", "--no-tests=error", "-R", f"^{name}$"]
    run("ctest", "--test-dir", str(BUILD), *options)
