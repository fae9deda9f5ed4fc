"""What an installation puts where, with a CMake that only pretends to build."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import setuptools
import torch

from tests.support.native_build import ROOT

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
    shutil.copytree(ROOT / "examples", copy / "examples", ignore=unbuilt)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


def _assert_built(read: Callable[[str], str], names: list[str]) -> None:
    files = (EXTENSION, RECORD, "py.typed", "_C.pyi")  # the last two are for type checkers
    assert {f"recap_fast/{name}" for name in files} <= set(names)
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
        tops = {re.sub(r"[-/].*", "", name) for name in archive.namelist()}
    assert tops == {"recap_fast"}  # and no examples
    assert not (checkout / "recap_fast" / RECORD).exists()


# --- which torch it takes ------------------------------------------------------------------------


@pytest.fixture
def setup_file(monkeypatch: pytest.MonkeyPatch) -> Any:
    """setup.py as a module that sets nothing up."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("setup_file", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("version", ["2.11.0", "2.13.1+cpu", "2.15.0a0+git1234", torch.__version__])
def test_a_torch_that_was_tested_is_taken(version: str, setup_file: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        setup_file._check_release(version)


@pytest.mark.parametrize("version", ["2.16.0", "2.16.0.dev20270101+cu130", "3.0.0"])
def test_a_newer_torch_is_taken_with_a_warning(version: str, setup_file: Any) -> None:
    message = rf"tested with torch 2\.11 to 2\.15, not with torch {re.escape(version)}: run its"
    with pytest.warns(UserWarning, match=message):
        setup_file._check_release(version)


@pytest.mark.parametrize("version", ["2.10.1", "2.9.0+cpu", "1.13.1"])
def test_an_older_torch_is_refused(version: str, setup_file: Any) -> None:
    with pytest.raises(
        SystemExit, match=r"needs torch 2\.11 or newer; this is " + re.escape(f"torch {version}")
    ):
        setup_file._check_release(version)


def test_no_file_refuses_a_newer_torch(setup_file: Any) -> None:
    oldest = ".".join(map(str, setup_file.OLDEST_TORCH))
    wanted = re.findall(r'"torch([ <>=!~].*?)"', (ROOT / "pyproject.toml").read_text())
    assert wanted == [f">={oldest}"] * 2
