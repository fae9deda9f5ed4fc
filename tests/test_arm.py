"""The core on Arm: compiled for aarch64, and its C++ tests run by qemu."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.support.native_build import BUILD, SOURCES, build_in, instructions_in, run

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        shutil.which("aarch64-linux-gnu-g++") is None or shutil.which("qemu-aarch64") is None,
        reason="needs g++-aarch64-linux-gnu and qemu-user",
    ),
]


@pytest.fixture(scope="module", name="folder")
def _folder() -> Path:
    folder = BUILD.with_name("aarch64")
    toolchain = f"-DCMAKE_TOOLCHAIN_FILE={SOURCES / 'aarch64.cmake'}"
    build_in(folder, SOURCES, [toolchain, "-G", "Ninja"], ["all"])
    return folder


def test_the_core_gives_the_same_bits(folder: Path) -> None:
    """One of the tests has a digest of what x86-64 gives."""
    run("ctest", "--test-dir", str(folder), "--output-on-failure", "--no-tests=error", "-j2")


@pytest.fixture(scope="module", name="functions")
def _functions(folder: Path) -> dict[str, list[str]]:
    (kernels,) = folder.rglob("recap_kernels_baseline.dir/**/kernels.cpp.o")
    return instructions_in(str(kernels), "aarch64-linux-gnu-objdump")


@pytest.mark.parametrize(("dtype", "lanes"), [("float", "4s"), ("double", "2d")])
@pytest.mark.parametrize(
    ("algorithm", "needed"),
    [
        ("Adam<false, false>", {"fsqrt", "fdiv", "fmla"}),
        ("Adam<true, true>", {"fsqrt", "fdiv", "fmla"}),
        ("Adagrad<false>", {"fsqrt", "fdiv", "fmla"}),
        ("Rmsprop<true, true>", {"fsqrt", "fdiv", "fmla"}),
        ("Lion", {"fmla"}),
        ("Sgd<false, false, false>", {"fmla"}),
        ("Sgd<true, true, true>", {"fmla"}),
    ],
)
def test_loops_are_vectorized(
    functions: dict[str, list[str]], dtype: str, lanes: str, algorithm: str, needed: set[str]
) -> None:
    packed = {
        instruction.split()[0]
        for name, instructions in functions.items()
        if f"<recap::{algorithm}, {dtype}>" in name
        for instruction in instructions
        if re.search(rf"\bv\d+\.{lanes}\b", instruction)
    }
    assert packed >= needed


@pytest.mark.parametrize("storage", ["Float16", "BFloat16"])
def test_16_bits_are_converted_in_vectors(functions: dict[str, list[str]], storage: str) -> None:
    instructions = [
        instruction
        for name, instructions in functions.items()
        if f"recap::{storage}" in name
        for instruction in instructions
    ]
    packed = {each.split()[0] for each in instructions if re.search(r"\bv\d+\.4[sh]\b", each)}
    needed = {"Float16": {"fcvtl", "fcvtn"}, "BFloat16": {"shll", "ushr", "fcmeq"}}
    assert packed >= needed[storage]
