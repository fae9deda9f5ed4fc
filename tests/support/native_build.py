"""Builds ``tests/csrc``, once for all test files that need it.

The builds stay in ``build/``, so that only the first run waits for them; without sanitizers, where
the extension itself is built (see setup.py), of which they take what they have in common.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "tests" / "csrc"
PYTHON = f"{platform.machine()}-{sys.implementation.cache_tag}"
BUILD = ROOT / "build" / f"{PYTHON}-torch{torch.__version__}"
# Those of `make sanitize`, by their sanitizers.
SANITIZED = {
    "address,undefined": ROOT / "build" / "sanitize",
    "thread": ROOT / "build" / "sanitize-thread",
}

sys.path.insert(0, str(SOURCES / "cuda"))
import check_ptx  # noqa: E402

needs_compiler = pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which(os.environ.get("CXX", "c++")) is None,
    reason="needs cmake and a C++ compiler",
)

needs_nvcc = pytest.mark.skipif(
    check_ptx.find_nvcc() is None, reason="no nvcc: machine code cannot be inspected"
)


def run(*command: str, **options: Any) -> str:
    """Returns what the command writes; fails the test with it if the command fails."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"
    return done.stdout


def _with_extension() -> list[str]:
    import pybind11
    from torch.utils import cpp_extension

    variables = {
        "PYBIND11_FINDPYTHON": "ON",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "RECAP_TORCH_INCLUDE_DIRS": ";".join(cpp_extension.include_paths()),
        "RECAP_TORCH_LIBRARY_DIR": cpp_extension.library_paths()[0],
        "RECAP_TORCH_CXX11_ABI": int(torch._C._GLIBCXX_USE_CXX11_ABI),
    }
    return [f"-D{name}={value}" for name, value in variables.items()]


def _cmake_of(folder: Path) -> str:
    """The one that has made a folder: another would build it anew."""
    cache = folder / "CMakeCache.txt"
    text = cache.read_text() if cache.exists() else ""
    found = re.search(r"^CMAKE_COMMAND:INTERNAL=(.*)$", text, re.MULTILINE)
    return found[1] if found and Path(found[1]).exists() else "cmake"


def build_in(folder: Path, source: Path, options: list[str], targets: Sequence[str]) -> None:
    """Configures `folder` and builds targets there; other processes wait their turn."""
    folder.parent.mkdir(exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cmake = _cmake_of(folder)
        configure = [cmake, "-S", str(source), "-B", str(folder), *options]
        if subprocess.run(configure, capture_output=True).returncode != 0:
            shutil.rmtree(folder, ignore_errors=True)  # made by another cmake, or elsewhere
            run(*configure)
        jobs = str(os.cpu_count())
        run(cmake, "--build", str(folder), "--parallel", jobs, "--target", *targets)


def build(*targets: str, sanitizers: str = "") -> Path:
    """Builds the targets and returns the folder."""
    if sanitizers:
        folder = SANITIZED[sanitizers]
        options = [f"-DRECAP_SANITIZE={sanitizers}", *_with_extension()]
        build_in(folder, SOURCES, options, targets)
        return folder
    options = ["-DRECAP_BUILD_TESTS=ON", *_with_extension()]
    if not (BUILD / "CMakeCache.txt").exists():  # the installed extension was not built here
        options += ["-G", "Ninja", "-DRECAP_CUDA=OFF"]
    build_in(BUILD, ROOT, options, targets)
    return BUILD


def build_extension(name: str, sanitizers: str = "") -> Path:
    """Builds one of ``tests/csrc/bindings`` and returns its path."""
    folder = build(name, sanitizers=sanitizers)
    (extension,) = folder.rglob(f"bindings/{name}/_C*.so")
    return extension


def run_tests_with(extension: Path, *arguments: str, **environment: str) -> str:
    """Runs pytest in the root with another build of the extension; returns what it writes."""
    variables = {"RECAP_FAST_TEST_EXTENSION": str(extension), **environment}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return run(*command, cwd=ROOT, env=os.environ | variables)


def instructions_in(objects: str, objdump: str = "objdump", *options: str) -> dict[str, list[str]]:
    """The instructions of each function, with their operands."""
    functions: dict[str, list[str]] = defaultdict(list)
    name = ""
    for line in run(objdump, "-dC", "--no-show-raw-insn", *options, objects).splitlines():
        if header := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            name = header[1]
        elif "\t" in line:
            functions[name].append(line.split("\t", 1)[1])
    return functions


def _has_sanitizers() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        compiler = os.environ.get("CXX", "c++")
        options = ["-fsanitize=address,undefined", "-x", "c++", "-", "-o", f"{folder}/nothing"]
        command = [compiler, *options]
        done = subprocess.run(command, input="int main() {}", text=True, capture_output=True)
    return done.returncode == 0


def build_sanitized(*targets: str) -> Path:
    """As `build`, with the sanitizers of addresses and of undefined behaviour."""
    if not _has_sanitizers():
        pytest.skip("the C++ compiler has no sanitizers: is libasan or libubsan missing?")
    return build(*targets, sanitizers="address,undefined")


def run_ctest(folder: Path, name: str) -> None:
    """Runs one test of a finished build, by its exact name."""
    options = ["--output-on-failure", "--no-tests=error", "-R", f"^{name}$"]
    run("ctest", "--test-dir", str(folder), *options)
