"""What an installation puts where, with a CMake that only pretends to build."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch

from tests.native_build import ROOT

EXTENSION = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
RECORD = "_torch_version.py"

_CMAKE = """\
#!/bin/sh
for argument; do
    case $argument in
        -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=*)
            mkdir -p "${argument#*=}" && echo built >"${argument#*=}/%s" ;;
    esac
done
"""


def install(checkout: Path, tools: Path, *command: str) -> None:
    tools.mkdir()
    (tools / "cmake").write_text(_CMAKE % EXTENSION)
    (tools / "cmake").chmod(0o755)
    done = subprocess.run(
        [sys.executable, *command],
        cwd=checkout,
        env=os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The sources of the package, not built."""
    pytest.importorskip("pybind11")
    copy = tmp_path / "checkout"
    unbuilt = shutil.ignore_patterns("*.so", RECORD, "__pycache__")
    shutil.copytree(ROOT / "recap_fast", copy / "recap_fast", ignore=unbuilt)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


def _assert_built(read: Callable[[str], str], names: list[str]) -> None:
    assert {f"recap_fast/{EXTENSION}", f"recap_fast/{RECORD}"} <= set(names)
    assert read(f"recap_fast/{EXTENSION}") == "built\n"
    assert read(f"recap_fast/{RECORD}") == f'TORCH_VERSION = "{torch.__version__}"\n'


_WHEEL = "import setuptools.build_meta as backend; backend.build_wheel('dist')"
_EDITABLE = "import setuptools.build_meta as backend; backend.build_editable('dist')"


@pytest.mark.parametrize(
    "command", [("setup.py", "build_ext", "--inplace"), ("-c", _EDITABLE)], ids=["inplace", "-e"]
)
def test_the_sources_get_the_extension_and_its_torch(
    command: tuple[str, ...], checkout: Path, tmp_path: Path
) -> None:
    (checkout / "dist").mkdir()
    install(checkout, tmp_path / "tools", *command)
    names = [str(path.relative_to(checkout)) for path in checkout.glob("recap_fast/*")]
    _assert_built(lambda name: (checkout / name).read_text(), names)


def test_a_wheel_has_the_extension_and_its_torch(checkout: Path, tmp_path: Path) -> None:
    (checkout / "dist").mkdir()
    install(checkout, tmp_path / "tools", "-c", _WHEEL)
    (wheel,) = checkout.glob("dist/*.whl")
    with ZipFile(wheel) as archive:
        _assert_built(lambda name: archive.read(name).decode(), archive.namelist())
    assert not (checkout / "recap_fast" / RECORD).exists()
