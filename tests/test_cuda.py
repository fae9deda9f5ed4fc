"""The CUDA engine without a GPU: its sources executed on the CPU, and facts of its machine code.

``tests/csrc/cuda/README.md`` says what each proves. The emulated build stays in
``build/csrc-cuda``, so that only the first run waits for it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "tests" / "csrc" / "cuda"
BUILD = ROOT / "build" / "csrc-cuda"

sys.path.insert(0, str(SOURCES))
import check_ptx  # noqa: E402

needs_nvcc = pytest.mark.skipif(
    check_ptx.find_nvcc() is None, reason="no nvcc: machine code cannot be inspected"
)
needs_compiler = pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which(os.environ.get("CXX", "c++")) is None,
    reason="needs cmake and a C++ compiler",
)


@needs_compiler
def test_the_engine_on_an_emulated_machine() -> None:
    configure = ["cmake", "-S", str(SOURCES), "-B", str(BUILD), "-DCMAKE_BUILD_TYPE=Release"]
    build = ["cmake", "--build", str(BUILD), "--parallel", str(os.cpu_count())]
    for command in (configure, build, [str(BUILD / "test_cuda_engine")]):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"


@needs_nvcc
@pytest.mark.parametrize("architecture", check_ptx.ARCHITECTURES)
def test_registers_suffice(architecture: str) -> None:
    kernels = check_ptx.read_ptxas(architecture)
    assert sorted(kernel.parameter for kernel in kernels) == [4096, 32760]
    for kernel in kernels:
        assert kernel.registers <= check_ptx.MAX_REGISTERS
        assert (kernel.stack, kernel.spills) == (0, 0)


@pytest.fixture(scope="module")
def ptx() -> str:
    return check_ptx.read_ptx(check_ptx.ARCHITECTURES[0])


@needs_nvcc
def test_the_parameter_fits_a_launch(ptx: str) -> None:
    assert sorted(check_ptx.parameter_sizes(ptx)) == [4096, 32760]
    assert max(check_ptx.parameter_sizes(ptx)) <= check_ptx.MAX_PARAMETER


@needs_nvcc
def test_aligned_tensors_are_accessed_16_bytes_at_a_time(ptx: str) -> None:
    kernels = len(check_ptx.parameter_sizes(ptx))
    assert len(check_ptx.instructions(ptx, r"ld\.global\.cg\.v4")) == kernels * check_ptx.LOADS
    assert len(check_ptx.instructions(ptx, r"st\.global\.cg\.v4")) == kernels * check_ptx.STORES


@needs_nvcc
def test_memory_is_never_local_or_of_unknown_space(ptx: str) -> None:
    assert not check_ptx.instructions(ptx, r"(ld|st)\.(?!global|param)")
    assert ".local" not in ptx


@needs_nvcc
def test_only_the_source_asks_for_fma() -> None:
    marked = check_ptx.read_ptx(check_ptx.ARCHITECTURES[0], mark_fma=True)
    found = check_ptx.instructions(marked, r"(fma|mad)\.(rn\.)?f")
    assert len(found) > 500
    assert all(check_ptx.is_asked_for(instruction) for instruction in found)


@needs_nvcc
def test_every_operation_rounds_correctly(ptx: str) -> None:
    """Without `.rn`, the assembler may contract; `.approx` and `.ftz` change bits."""
    arithmetic = check_ptx.instructions(ptx, r"(add|sub|mul|div|sqrt|fma|mad)\.\S*f(32|64)")
    assert len(arithmetic) > 1000
    for instruction in arithmetic:
        assert re.search(r"\w+\.rn\.f(32|64)\s", instruction), instruction
