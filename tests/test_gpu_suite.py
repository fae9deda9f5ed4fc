"""The GPU suite and its session where there is no GPU: what is collected, skipped and said."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.test_gpu_sanitizer import complaints
from tests.support.native_build import ROOT, build_extension, needs_compiler

SESSION = ROOT / "benchmarks" / "gpu_session.sh"

# What a machine with a GPU may lack.
_HIDE = """\
import sys


class Hidden:
    def find_spec(self, name, *_):
        if name in ("torchrec", "fbgemm_gpu", "pydantic", "yaml", "hypothesis", "numpy", "xdist"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Hidden())
"""

needs_no_device = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.fixture
def without_packages(tmp_path: Path) -> dict[str, str]:
    """The environment of a Python that fails to import what may be missing."""
    (tmp_path / "sitecustomize.py").write_text(_HIDE)
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    no_plugins = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # pytest finds theirs by itself
    return os.environ | no_plugins | {"PYTHONPATH": os.pathsep.join(paths)}


def _run(environment: dict[str, str], *command: str) -> tuple[int, list[str]]:
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout.rstrip().split("\n")


@pytest.mark.long  # the session below runs these tests without the packages, too
def test_no_file_of_the_suite_fails_for_a_missing_package(without_packages: dict[str, str]) -> None:
    options = ["-q", "--collect-only", "-o", "addopts=", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, "tests/gpu", "tests/optim"]
    status, lines = _run(without_packages, *command)
    assert status == 0, "\n".join(lines)
    collected = {line.split("::")[0] for line in lines if "::" in line}
    assert {"tests/gpu/test_gpu_bits.py", "tests/optim/test_amp.py"} <= collected
    for package in ("torchrec", "hypothesis"):
        assert any(re.match(rf"\d+ skipped: could not import '{package}'", x) for x in lines), lines


@needs_no_device
def test_what_is_skipped_is_listed_before_the_closing_line() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    tests = ["tests/gpu/test_gpu_errors.py", "tests/optim/test_stepper.py"]
    status, lines = _run(dict(os.environ), *command, *tests)
    assert status == 0, "\n".join(lines)
    assert re.match(r"GPU suite: \d+ skipped: this machine has no CUDA device", lines[-2])
    assert re.match(r"\d+ passed, \d+ skipped.* in ", lines[-1])


def test_reports_of_the_sanitizer_are_told_apart() -> None:
    output = """\
========= COMPUTE-SANITIZER
all steps taken
========= Invalid __global__ read of size 4 bytes
=========     at void at::native::elementwise_kernel<128>()+0x40
=========
========= Invalid __global__ write of size 2 bytes
=========     at void recap::cuda::update_tiles<4096>(Arguments)+0x90
=========     by thread (0,0,0) in block (7,0,0)
=========
========= ERROR SUMMARY: 2 errors
"""
    (found,) = complaints(output)
    assert found.startswith("Invalid __global__ write of size 2 bytes")


# --- the session ---------------------------------------------------------------------------------

# Answers for a CUDA device and for the folder of tools; runs all else.
_PYTHON = """\
#!/bin/sh
case "$*" in
    *get_device_capability*) echo 9.0 ;;
    *get_device_name*) echo a device ;;
    *get_path*) echo {tools} ;;
    *) exec {python} "$@" ;;
esac
"""

# In the place of a build copies one that is finished.
_CMAKE = """\
#!/bin/sh
for argument; do
    case $argument in
        -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=*)
            mkdir -p "${{argument#*=}}" && cp {extension} "${{argument#*=}}/" ;;
    esac
done
"""


@needs_no_device
@needs_compiler
def test_a_session_goes_on_behind_a_part_that_fails(
    without_packages: dict[str, str], tmp_path: Path
) -> None:
    """The tests are skipped, and measuring fails, for want of a device."""
    extension = build_extension("emulated")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, script in (
        ("python", _PYTHON.format(python=sys.executable, tools=tools)),
        ("cmake", _CMAKE.format(extension=extension)),
    ):
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    out = tmp_path / "out"
    command = ["bash", str(SESSION), "--out", str(out), "--python", str(tools / "python")]
    status, lines = _run(without_packages, *command, "--wheels", str(tmp_path))
    assert status == 1, "\n".join(lines)
    said = dict(re.findall(r"^([\w-]+): (ok|FAILED)", "\n".join(lines), re.MULTILINE))
    parts = ("wheels", "build", "tests-gpu", "measure", "tests-step", "sanitizer")
    assert said == {part: "FAILED" if part in ("wheels", "measure") else "ok" for part in parts}
    assert (out / "summary.txt").read_text().rstrip().split("\n") == lines
    for package in ("torchrec", "hypothesis"):
        assert any(f"skipped: could not import '{package}'" in line for line in lines), lines
    assert "no CUDA device" in (out / "measure.log").read_text()


def test_a_session_without_a_device_says_so(tmp_path: Path) -> None:
    command = ["bash", str(SESSION), "--out", str(tmp_path / "out"), "--python", sys.executable]
    status, lines = _run({"CUDA_VISIBLE_DEVICES": ""}, *command)
    assert status == 2
    assert "no CUDA device" in lines[0]
    assert not (tmp_path / "out").exists()


def test_the_options_of_a_session() -> None:
    status, lines = _run(dict(os.environ), "bash", str(SESSION), "--help")
    assert status == 0 and any("--seconds N" in line for line in lines)
    status, lines = _run(dict(os.environ), "bash", str(SESSION), "--wrong")
    assert status == 1 and "unknown argument --wrong" in lines[0]
