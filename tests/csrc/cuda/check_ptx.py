"""What nvcc says of the CUDA kernels, on a machine without a GPU.

Run by itself it prints a table: ``python tests/csrc/cuda/check_ptx.py [80 90 ...]``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SOURCES = {
    "update_tiles": ROOT / "csrc" / "cuda" / "host_values_kernel.cu",
    "update_tiles_by_device_values": ROOT / "csrc" / "cuda" / "device_values_kernel.cu",
}
KERNELS = tuple(SOURCES)
# The flags that decide about results; CMakeLists.txt builds with the same.
FLAGS = ["-std=c++17", "-O3", "--fmad=false"]


def _shipped() -> tuple[str, ...]:
    """The architectures that are built for by default, oldest first."""
    text = (ROOT / "csrc" / "cuda" / "architectures.cmake").read_text()
    listed = re.search(r"set\(RECAP_CUDA_ARCHITECTURES ([^)]+)\)", text)
    return tuple(item.removesuffix("-real") for item in listed[1].split())


ARCHITECTURES = _shipped()

MAX_REGISTERS = 80  # 3 blocks of 256 threads per multiprocessor
MAX_PARAMETER = 32_764  # bytes, what a launch takes from CUDA 12.1 on
# States of each of the 17 updates, in the order of csrc/algorithms/updates.h. An element reads
# them, the parameter and the gradient, and writes all but the last, in each of 4 dtypes. For slots
# with a format there is one body more, which has as many states as there can be, and the rest of a
# parameter.
STATES = (2, 2, 3, 3, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 3)
LOADS = sum(4 * (2 + states) for states in STATES) + 3 + max(STATES)
# And the zeros of gradients that are cleared, with a format and without.
STORES = sum(4 * (1 + states) for states in STATES) + 2 + max(STATES) + 2

# Included before the kernel, it marks every fma that the source asks for, and no other.
_MARK = "// asked for"
_MARKED_FMA = f"""
__device__ __forceinline__ float marked_fma(float a, float b, float c) {{
  float d;
  asm("fma.rn.f32 %0, %1, %2, %3; {_MARK}" : "=f"(d) : "f"(a), "f"(b), "f"(c));
  return d;
}}
__device__ __forceinline__ double marked_fma(double a, double b, double c) {{
  double d;
  asm("fma.rn.f64 %0, %1, %2, %3; {_MARK}" : "=d"(d) : "d"(a), "d"(b), "d"(c));
  return d;
}}
#define __fmaf_rn marked_fma
#define __fma_rn marked_fma
"""


def _find(tool: str) -> str | None:
    return shutil.which(tool) or shutil.which(tool, path="/usr/local/cuda/bin")


def find_nvcc() -> str | None:
    return _find("nvcc")


def find_cuobjdump() -> str | None:
    """It is in the toolkit; nvcc of a package may come without it (nvidia-cuda-cuobjdump)."""
    return _find("cuobjdump")


def _run(source: Path, *arguments: str | Path, flags: Sequence[str] = FLAGS) -> str:
    command = [str(find_nvcc()), *flags, *map(str, arguments), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


@dataclass
class Report:
    """What ptxas reports of a kernel for one size of parameter; sizes in bytes."""

    parameter: int
    registers: int
    stack: int
    spills: int


def compile_for(
    kernel: str, architecture: str, kept: Path | None = None
) -> tuple[list[Report], str]:
    """ptxas's reports for ``sm_<architecture>``, and the PTX that it assembles.

    Args:
        kernel, architecture: one of `KERNELS`; one of `ARCHITECTURES`.
        kept: a folder where a build may have kept that PTX, which takes half of the time.
    """
    with tempfile.TemporaryDirectory() as folder:
        ptx = kept and _kept_ptx(kernel, architecture, kept)
        if ptx is None:
            ptx = Path(folder) / "kernel.ptx"
            _run(SOURCES[kernel], f"-arch=compute_{architecture}", "-ptx", "-o", ptx)
        options = [f"-arch=sm_{architecture}", "-cubin", "-Xptxas=-v"]
        output = _run(ptx, *options, "-o", Path(folder) / "kernel.cubin")
        return _reports(kernel, output), ptx.read_text()


def _kept_ptx(kernel: str, architecture: str, folder: Path) -> Path | None:
    """None if there is none, or it is for another architecture or of other sources."""
    ptx = folder / f"{SOURCES[kernel].stem}.ptx"
    sources = [ROOT / "CMakeLists.txt", *(ROOT / "csrc").rglob("*.*")]
    if not ptx.exists() or ptx.stat().st_mtime < max(each.stat().st_mtime for each in sources):
        return None
    return ptx if f".target sm_{architecture}\n" in ptx.read_text() else None


def _reports(kernel: str, output: str) -> list[Report]:
    reports = []
    for report in output.split("Compiling entry function")[1:]:
        # The size of the parameter is the kernel's template argument.
        numbers = [
            re.search(pattern, report)
            for pattern in (
                rf"{kernel}ILi(\d+)E",
                r"Used (\d+) registers",
                r"(\d+) bytes stack frame",
                r"(\d+) bytes spill stores",
            )
        ]
        reports.append(Report(*(int(number.group(1)) for number in numbers)))
    return reports


def read_marked_ptx(kernel: str, architecture: str, flags: Sequence[str] = FLAGS) -> str:
    """PTX in which `is_asked_for` tells where the source has an fma."""
    with tempfile.TemporaryDirectory() as folder:
        marks = Path(folder) / "marks.h"
        marks.write_text(_MARKED_FMA)
        ptx = Path(folder) / "kernel.ptx"
        options = [f"-arch=compute_{architecture}", "-ptx", "-o", ptx, "-include", marks]
        _run(SOURCES[kernel], *options, flags=flags)
        return ptx.read_text()


def machine_code(kernel: str, architecture: str) -> list[list[str]]:
    """The instructions of a kernel for each size of parameter, as ptxas has ordered them."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        _run(SOURCES[kernel], f"-arch=sm_{architecture}", "-cubin", "-o", cubin)
        command = [str(find_cuobjdump()), "-sass", str(cubin)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = text.split("Function :")[1:]
    instruction = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d\s+)?([A-Z][\w.]+[^;]*)")
    return [instruction.findall(function) for function in functions]


def instructions(ptx: str, pattern: str) -> list[str]:
    """The lines of instructions that begin with a match of `pattern`."""
    begins = re.compile(rf"\s*(?:@!?%p\d+\s+)?(?:{pattern})")
    return [line for line in ptx.splitlines() if begins.match(line)]


def tickets(ptx: str) -> list[str]:
    """The additions by which blocks take tickets."""
    return instructions(ptx, r"atom\.")


def fences(ptx: str) -> list[str]:
    return instructions(ptx, r"(membar\.gl|fence\.sc\.gpu);")


def is_asked_for(instruction: str) -> bool:
    return _MARK in instruction


def fmas(ptx: str) -> list[str]:
    return instructions(ptx, r"(fma|mad)\.(rn\.)?f")


def arithmetic(ptx: str) -> list[str]:
    return instructions(ptx, r"(add|sub|mul|div|sqrt|fma|mad)\.\S*f(32|64)")


def rounds_correctly(instruction: str) -> bool:
    """Without `.rn`, the assembler may contract; `.approx` and `.ftz` change bits."""
    return re.search(r"\w+\.rn\.f(32|64)\s", instruction) is not None


def parameter_sizes(ptx: str) -> list[int]:
    """Bytes of the kernel's parameter, of each size there is."""
    return [int(size) for size in re.findall(r"\.param [^\n]*_param_0\[(\d+)\]", ptx)]


def main() -> None:
    for kernel in KERNELS:
        for architecture in sys.argv[1:] or ARCHITECTURES:
            for report in compile_for(kernel, architecture)[0]:
                print(f"{kernel}, sm_{architecture}: {report}")


if __name__ == "__main__":
    main()
