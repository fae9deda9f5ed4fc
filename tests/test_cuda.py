"""The CUDA engine without a GPU: its sources executed on the CPU, and facts of its machine code.

``csrc/cuda/README.md`` says what each proves.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.native_build import (
    BUILD,
    build,
    build_extension,
    build_sanitized,
    check_ptx,
    needs_compiler,
    needs_nvcc,
    run_ctest,
    run_tests_with,
)


@needs_compiler
@pytest.mark.parametrize(
    "build",
    [
        pytest.param(build, id="plain"),
        # As `make sanitize`: to compile it takes minutes.
        pytest.param(build_sanitized, id="under sanitizers", marks=pytest.mark.long),
    ],
)
def test_the_engine_on_an_emulated_machine(build: Callable[[str], Path]) -> None:
    run_ctest(build("test_cuda_engine"), "cuda/test_cuda_engine")


# What depends on the engine; the rest would only repeat what the CPU engine has shown. That the
# bits of all updates are right, test_cuda_engine has shown in C++: these look at what binds them.
EMULATED_TESTS = (
    "test_amp.py",
    "test_amp_refused.py",
    "test_clear_grads.py",
    "test_clipping.py",
    "test_combined.py",
    "test_device_values.py",
    "test_edge_values.py",
    "test_errors.py",
    "test_interface.py",
    "test_interop.py",
    "test_stepper.py",
    "test_user_entries.py",
)
# Every update again, through Python.
EMULATED_BITS = ("test_bits.py", "test_oracle.py")


@needs_compiler
@pytest.mark.parametrize(
    "names",
    [
        pytest.param(EMULATED_TESTS, id="what binds them"),
        pytest.param(EMULATED_BITS, id="bits", marks=pytest.mark.long),
    ],
)
def test_the_optimizers_with_an_emulated_engine(names: tuple[str, ...]) -> None:
    """The same tests as for the CPU engine, in a process where CPU tensors are a CUDA device's."""
    files = [f"tests/optim/{name}" for name in names]
    run_tests_with(build_extension("emulated"), "-m", "not cpu_engine", *files, OMP_NUM_THREADS="1")


# nvcc has two compilers to PTX, one for the older and one for the newer architectures.
OLDEST_AND_NEWEST = (check_ptx.ARCHITECTURES[0], check_ptx.ARCHITECTURES[-1])


def _newest_by_default(architectures: Iterable[str]) -> list[Any]:
    newest = check_ptx.ARCHITECTURES[-1]
    return [
        each if each == newest else pytest.param(each, marks=pytest.mark.long)
        for each in architectures
    ]


class Compiled:
    """What tests look at, compiled side by side: nvcc takes some 20 seconds for each.

    Args:
        architectures: those of the tests that run.
    """

    def __init__(self, architectures: Iterable[str]) -> None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            self._compiled = {
                (kernel, architecture): pool.submit(
                    check_ptx.compile_for, kernel, architecture, BUILD
                )
                for kernel in check_ptx.KERNELS
                for architecture in architectures
            }

    def reports(self, kernel: str, architecture: str) -> list[check_ptx.Report]:
        return self._compiled[kernel, architecture].result()[0]

    def ptx(self, kernel: str, architecture: str) -> str:
        return self._compiled[kernel, architecture].result()[1]


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Compiled:
    runs = [getattr(item, "callspec", None) for item in request.session.items]
    wanted = {run.params.get("architecture") for run in runs if run}
    return Compiled([each for each in check_ptx.ARCHITECTURES if each in wanted])


@pytest.fixture(params=check_ptx.KERNELS)
def kernel(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=_newest_by_default(check_ptx.ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def ptx(compiled: Compiled, kernel: str, architecture: str) -> str:
    return compiled.ptx(kernel, architecture)


@needs_nvcc
def test_registers_suffice(compiled: Compiled, kernel: str, architecture: str) -> None:
    reports = compiled.reports(kernel, architecture)
    assert sorted(report.parameter for report in reports) == [4096, 32760]
    for report in reports:
        assert report.registers <= check_ptx.MAX_REGISTERS
        assert (report.stack, report.spills) == (0, 0)


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
def test_a_ticket_is_taken_by_a_release(kernel: str, ptx: str) -> None:
    """What a block has read before stays before; and the last one writes behind a fence."""
    tickets = check_ptx.tickets(ptx)
    has_tickets = kernel == "update_tiles_by_device_values"
    assert bool(tickets) == has_tickets
    assert all("atom.add.release.gpu.global.u32" in ticket for ticket in tickets)
    sizes = len(check_ptx.parameter_sizes(ptx))
    assert len(check_ptx.fences(ptx)) == (sizes if has_tickets else 0)


@needs_nvcc
@pytest.mark.long
@pytest.mark.skipif(check_ptx.find_cuobjdump() is None, reason="no cuobjdump")
@pytest.mark.parametrize("architecture", ["90"])
def test_nothing_is_thrown_out_of_the_cache_before_the_update(
    kernel: str, architecture: str
) -> None:
    """PTX does not tell it: ptxas makes it a part of fences. The last block has one, at the end."""
    for code in check_ptx.machine_code(kernel, architecture):
        names = [instruction.split()[0] for instruction in code]
        throws = [i for i, name in enumerate(names) if name.startswith("CCTL.IVALL")]
        tickets = [i for i, name in enumerate(names) if name.startswith("ATOMG")]
        assert len(throws) <= 1
        assert bool(tickets) == bool(throws) == (kernel == "update_tiles_by_device_values")
        assert all(ticket < throw for ticket in tickets for throw in throws)
        assert not [name for name in names if name.startswith(("STL", "LDL"))]


@needs_nvcc
@pytest.mark.long
@pytest.mark.parametrize("architecture", OLDEST_AND_NEWEST)
def test_only_the_source_asks_for_fma(kernel: str, architecture: str) -> None:
    found = check_ptx.fmas(check_ptx.read_marked_ptx(kernel, architecture))
    assert len(found) > 500
    assert all(check_ptx.is_asked_for(instruction) for instruction in found)


@needs_nvcc
def test_every_operation_rounds_correctly(ptx: str) -> None:
    found = check_ptx.arithmetic(ptx)
    assert len(found) > 1000
    assert [line for line in found if not check_ptx.rounds_correctly(line)] == []


@needs_nvcc
@pytest.mark.long
def test_contraction_would_be_noticed() -> None:
    """By both tests above, of which only one is long; without the flag, nvcc contracts."""
    flags = [flag for flag in check_ptx.FLAGS if flag != "--fmad=false"]
    newest = check_ptx.ARCHITECTURES[-1]
    ptx = check_ptx.read_marked_ptx("update_tiles_by_device_values", newest, flags)
    assert not all(check_ptx.is_asked_for(instruction) for instruction in check_ptx.fmas(ptx))
    assert not all(check_ptx.rounds_correctly(line) for line in check_ptx.arithmetic(ptx))
