"""Runs the C++ tests of the core, and looks at the instructions in what was built."""

from __future__ import annotations

import platform
import re
import shutil
from pathlib import Path

import pytest

from tests.support.native_build import (
    SOURCES,
    build,
    instructions_in,
    needs_compiler,
    run,
    run_ctest,
)

TESTS = sorted(
    str(path.relative_to(SOURCES).with_suffix(""))
    for folder in ("numerics", "algorithms", "plan", "cpu")
    for path in (SOURCES / folder).glob("test_*.cpp")
)

pytestmark = needs_compiler
needs_x86_objects = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64")
    or shutil.which("objdump") is None
    or shutil.which("nm") is None,
    reason="needs x86-64, objdump and nm",
)


@pytest.fixture(scope="module", name="build")
def _build() -> Path:
    return build(*(Path(name).name for name in TESTS))


@pytest.mark.parametrize("name", TESTS)
def test_core(build: Path, name: str) -> None:
    run_ctest(build, name)


def _kernels(build: Path, instruction_set: str, source: str = "kernels") -> str:
    (found,) = build.rglob(f"recap_kernels_{instruction_set}.dir/**/{source}.cpp.o")
    return str(found)


of_each_source = pytest.mark.parametrize("source", ["kernels", "row_kernels"])


def _instructions(kernels: str) -> dict[str, list[str]]:
    return instructions_in(kernels, "objdump", "-M", "att")


@needs_x86_objects
@of_each_source
@pytest.mark.parametrize("instruction_set", ["baseline", "avx2", "avx512"])
def test_no_function_of_a_kernels_object_can_replace_another(
    build: Path, instruction_set: str, source: str
) -> None:
    """A weak copy compiled for AVX-512 could be the one that the linker keeps for everybody."""
    kernels = _kernels(build, instruction_set, source)
    symbols = run("nm", "-C", "--defined-only", kernels).splitlines()
    exported = [symbol for symbol in symbols if symbol.split()[1] not in "tTrRdDbB"]
    assert exported == []
    visible = [symbol.split(maxsplit=2)[2] for symbol in symbols if symbol.split()[1].isupper()]
    assert visible == [f"recap::cpu::{source}_{instruction_set}"]


@needs_x86_objects
@of_each_source
@pytest.mark.parametrize("instruction_set", ["avx2", "avx512"])
def test_vector_kernels_call_no_scalar_math(build: Path, instruction_set: str, source: str) -> None:
    kernels = _kernels(build, instruction_set, source)
    undefined = run("nm", "-C", "--undefined-only", kernels).split()
    assert not {"fma", "fmaf", "sqrt", "sqrtf"} & set(undefined)


@needs_x86_objects
@pytest.mark.parametrize(("instruction_set", "register"), [("avx2", "%ymm"), ("avx512", "%zmm")])
@pytest.mark.parametrize(("dtype", "suffix"), [("float", "ps"), ("double", "pd")])
@pytest.mark.parametrize(
    ("algorithm", "needed"),
    [
        ("Adam<false, false>", {"vsqrt", "vdiv", "vfmadd"}),
        ("Adam<true, true>", {"vsqrt", "vdiv", "vfmadd"}),
        ("Adagrad<false>", {"vsqrt", "vdiv", "vfmadd"}),
        ("Sgd<false, false, false>", {"vfmadd"}),
        ("Sgd<true, true, true>", {"vfmadd"}),
    ],
)
def test_loops_are_vectorized(
    build: Path,
    instruction_set: str,
    register: str,
    dtype: str,
    suffix: str,
    algorithm: str,
    needed: set[str],
) -> None:
    """The 16-bit types run the loop for float, between loops that convert."""
    functions = _instructions(_kernels(build, instruction_set))
    packed = {
        match[1]
        for name, instructions in functions.items()
        if f"<recap::{algorithm}, {dtype}>" in name
        for instruction in instructions
        if register in instruction
        and (match := re.match(rf"(vsqrt|vdiv|vfmadd)\d*{suffix}\b", instruction))
    }
    assert packed == needed


@needs_x86_objects
@pytest.mark.parametrize(("instruction_set", "register"), [("avx2", "%ymm"), ("avx512", "%zmm")])
@pytest.mark.parametrize("dtype", ["float", "double"])
def test_squares_are_summed_in_vectors(
    build: Path, instruction_set: str, register: str, dtype: str
) -> None:
    functions = _instructions(_kernels(build, instruction_set))
    (name,) = (name for name in functions if f"sum_of_squares<{dtype}>" in name)
    assert {"vmulpd", "vaddpd"} <= {i.split()[0] for i in functions[name] if register in i}
    assert any(i.startswith("vcvtps2pd") for i in functions[name]) == (dtype == "float")


@needs_x86_objects
@pytest.mark.parametrize(("instruction_set", "register"), [("avx2", "%ymm"), ("avx512", "%zmm")])
@pytest.mark.parametrize(("dtype", "suffix"), [("float", "ps"), ("double", "pd")])
def test_rows_are_updated_in_vectors(
    build: Path, instruction_set: str, register: str, dtype: str, suffix: str
) -> None:
    functions = _instructions(_kernels(build, instruction_set, "row_kernels"))
    (name,) = (n for n in functions if f"rowwise_adagrad<false, {dtype}, {dtype}>" in n)
    packed = {i.split()[0] for i in functions[name] if register in i}
    assert {f"vmul{suffix}", f"vadd{suffix}"} <= packed
    assert any(i.startswith("vfmadd") and i.endswith(suffix) for i in packed)


@needs_x86_objects
@pytest.mark.parametrize("instruction_set", ["avx2", "avx512"])
def test_float16_is_converted_by_the_processor(build: Path, instruction_set: str) -> None:
    mnemonics = {
        instruction.split()[0]
        for name, instructions in _instructions(_kernels(build, instruction_set)).items()
        if "recap::Float16" in name
        for instruction in instructions
    }
    assert {"vcvtph2ps", "vcvtps2ph"} <= mnemonics


@needs_x86_objects
@of_each_source
def test_the_baseline_runs_on_any_x86_64(build: Path, source: str) -> None:
    for name, instructions in _instructions(_kernels(build, "baseline", source)).items():
        newer = [i for i in instructions if i.startswith("v") or "%ymm" in i or "%zmm" in i]
        assert newer == [], name
