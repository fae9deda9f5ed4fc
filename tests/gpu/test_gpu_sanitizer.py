"""NVIDIA's compute-sanitizer finds nothing in the kernels."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
_PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
_LIMIT_SECONDS = 240
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


@pytest.mark.skipif(_tool is None, reason="there is no compute-sanitizer")
@pytest.mark.parametrize("check", _OPTIONS)
def test_nothing_is_found(check: str) -> None:
    command = [_tool, "--tool", check, *_OPTIONS[check], sys.executable]
    command += ["-m", "tests.gpu.sanitized_steps"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        # Every tensor an allocation of its own, so that an access beyond it is one.
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_LIMIT_SECONDS,
    )
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer does not support this device")
    assert "COMPUTE-SANITIZER" in done.stdout and "all steps taken" in done.stdout, done.stdout
    assert complaints(done.stdout) == [], done.stdout
