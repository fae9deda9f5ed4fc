"""NVIDIA's compute-sanitizer finds nothing in the kernels."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
_PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
_LIMIT_SECONDS = 120
_OPTIONS = {
    "memcheck": ["--report-api-errors", "no"],  # torch's own start has some that it expects
    "racecheck": [],
    "initcheck": [],
    "synccheck": [],
}

_tool = shutil.which("compute-sanitizer") or shutil.which(
    "compute-sanitizer", path=os.pathsep.join(_PLACES)
)


def complaints(output: str) -> list[str]:
    """The sanitizer's reports that speak of this package, from all that it printed.

    A report is a block of lines that begin with `=========`, up to one with nothing else; its first
    lines name the kernel, the last ones the host's stack.
    """
    lines = [
        line.removeprefix("=========").strip()
        for line in output.split("\n")
        if line.startswith("=========")
    ]
    reports = "\n".join(lines).split("\n\n")
    return [text for text in reports if re.search(r"update_tiles|recap_fast/_C", text)]


@pytest.fixture(scope="module")
def outputs() -> Iterator[dict[str, Future[str]]]:
    """What each check prints; side by side, as all of them mostly wait for the start of torch."""
    with ThreadPoolExecutor(len(_OPTIONS)) as pool:
        yield {check: pool.submit(_output, check) for check in _OPTIONS}


def _output(check: str) -> str:
    command = [str(_tool), "--tool", check, *_OPTIONS[check], sys.executable]
    done = subprocess.run(
        [*command, "-m", "tests.gpu.sanitized_steps"],
        cwd=ROOT,
        # Every tensor an allocation of its own, so that an access beyond it is one.
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_LIMIT_SECONDS,
    )
    return done.stdout


@pytest.mark.skipif(_tool is None, reason="there is no compute-sanitizer")
@pytest.mark.parametrize("check", _OPTIONS)
def test_nothing_is_found(check: str, outputs: dict[str, Future[str]]) -> None:
    output = outputs[check].result()
    if "Device not supported" in output:
        pytest.skip("compute-sanitizer does not support this device")
    assert "COMPUTE-SANITIZER" in output and "all steps taken" in output, output
    assert complaints(output) == [], output
