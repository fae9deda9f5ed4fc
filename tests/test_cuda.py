"""The CUDA engine without a GPU: its sources executed on the CPU, and facts of its machine code.

``csrc/cuda/README.md`` says what each proves. The emulated build stays in
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
@pytest.mark.parametrize("kernel", check_ptx.KERNELS)
@pytest.mark.parametrize("architecture", check_ptx.ARCHITECTURES)
def test_registers_suffice(kernel: str, architecture: str) -> None:
    reports = check_ptx.read_ptxas(kernel, architecture)
    assert sorted(report.parameter for report in reports) == [4096, 32760]
    for report in reports:
        assert report.registers <= check_ptx.MAX_REGISTERS
        assert (report.stack, report.spills) == (0, 0)


@pytest.fixture(scope="module", params=check_ptx.KERNELS)
def kernel(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def ptx(kernel: str) -> str:
    return check_ptx.read_ptx(kernel, check_ptx.ARCHITECTURES[0])


@needs_nvcc
def test_the_parameter_fits_a_launch(ptx: str) -> None:
    assert sorted(check_ptx.parameter_sizes(ptx)) == [4096, 32760]
    assert max(check_ptx.parameter_sizes(ptx)) <= check_ptx.MAX_PARAMETER


@needs_nvcc
def test_aligned_tensors_are_accessed_16_bytes_at_a_time(ptx: str) -> None:
    sizes = len(check_ptx.parameter_sizes(ptx))
    assert len(check_ptx.instructions(ptx, r"ld\.global\.cg\.v4")) == sizes * check_ptx.LOADS
    assert len(check_ptx.instructions(ptx, r"st\.global\.cg\.v4")) == sizes * check_ptx.STORES


@needs_nvcc
def test_memory_is_never_local_or_of_unknown_space(kernel: str, ptx: str) -> None:
    shared = "|shared" if kernel == "update_tiles_by_device_values" else ""
    assert not check_ptx.instructions(ptx, rf"(ld|st)\.(?!global|param{shared})")
    assert ".local" not in ptx


@needs_nvcc
def test_what_a_step_changes_is_read_past_the_first_level_cache(ptx: str) -> None:
    """A load that may be cached, or be taken for one of constants, could give an old count."""
    assert not check_ptx.instructions(ptx, r"ld\.global\.nc")


@needs_nvcc
def test_only_the_source_asks_for_fma(kernel: str) -> None:
    marked = check_ptx.read_ptx(kernel, check_ptx.ARCHITECTURES[0], mark_fma=True)
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
