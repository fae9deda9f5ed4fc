"""The CUDA engine without a GPU: its sources executed on the CPU, and facts of its machine code.

What runs on a GPU is tested with the optimizers. ``tests/csrc/cuda/README.md`` says what each proves.
"""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from csrc.cuda import check_ptx

needs_nvcc = pytest.mark.skipif(
    check_ptx.find_nvcc() is None, reason="no nvcc: machine code cannot be inspected"
)
needs_cmake = pytest.mark.skipif(
    not (shutil.which("cmake") and shutil.which("ninja")), reason="no cmake and ninja"
)


@needs_cmake
def test_the_engine_on_an_emulated_machine(tmp_path):
    source = check_ptx.ROOT / "tests" / "csrc" / "cuda"
    configure = ["cmake", "-S", source, "-B", tmp_path, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
    for command in (configure, ["cmake", "--build", tmp_path], [tmp_path / "test_cuda_engine"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@needs_nvcc
@pytest.mark.parametrize("architecture", check_ptx.ARCHITECTURES)
def test_registers_suffice(architecture):
    kernels = check_ptx.read_ptxas(architecture)
    assert sorted(kernel.parameter for kernel in kernels) == [4096, 32760]
    for kernel in kernels:
        assert kernel.registers <= check_ptx.MAX_REGISTERS
        assert (kernel.stack, kernel.spills) == (0, 0)


@pytest.fixture(scope="module")
def ptx() -> str:
    return check_ptx.read_ptx(check_ptx.ARCHITECTURES[0])


@needs_nvcc
def test_the_parameter_fits_a_launch(ptx):
    assert sorted(check_ptx.parameter_sizes(ptx)) == [4096, 32760]
    assert max(check_ptx.parameter_sizes(ptx)) <= check_ptx.MAX_PARAMETER


@needs_nvcc
def test_aligned_tensors_are_accessed_16_bytes_at_a_time(ptx):
    kernels = len(check_ptx.parameter_sizes(ptx))
    assert len(check_ptx.instructions(ptx, r"ld\.global\.cg\.v4")) == kernels * check_ptx.LOADS
    assert len(check_ptx.instructions(ptx, r"st\.global\.cg\.v4")) == kernels * check_ptx.STORES


@needs_nvcc
def test_memory_is_never_local_or_of_unknown_space(ptx):
    assert not check_ptx.instructions(ptx, r"(ld|st)\.(?!global|param)")
    assert ".local" not in ptx


@needs_nvcc
def test_only_the_source_asks_for_fma():
    marked = check_ptx.read_ptx(check_ptx.ARCHITECTURES[0], mark_fma=True)
    # An asm statement spans lines of its own, so the mark follows on the same line.
    found = check_ptx.instructions(marked, r"(fma|mad)\.(rn\.)?f")
    assert len(found) > 500
    assert all(check_ptx.is_asked_for(instruction) for instruction in found)


@needs_nvcc
def test_every_operation_rounds_correctly(ptx):
    """Without `.rn`, the assembler may join a product and a sum; `.approx` and `.ftz` change bits."""
    arithmetic = check_ptx.instructions(ptx, r"(add|sub|mul|div|sqrt|fma|mad)\.\S*f(32|64)")
    assert len(arithmetic) > 1000
    for instruction in arithmetic:
        assert re.search(r"\w+\.rn\.f(32|64)\s", instruction), instruction
