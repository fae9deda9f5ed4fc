"""Builds the extension: finds torch and the CUDA toolkit, and hands the rest to CMakeLists.txt."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()

# The oldest torch that has what the extension uses, and the newest that the tests were run with:
# docs/compatibility.md tells how they went.
OLDEST_TORCH = (2, 11)
NEWEST_TESTED_TORCH = (2, 15)


def _check_release(version: str) -> None:
    """Refuses a torch that is too old; warns of one that is newer than those tested."""
    release = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    oldest, newest = (".".join(map(str, each)) for each in (OLDEST_TORCH, NEWEST_TESTED_TORCH))
    if release < OLDEST_TORCH:
        sys.exit(f"recap_fast needs torch {oldest} or newer; this is torch {version}")
    if release > NEWEST_TESTED_TORCH:
        warnings.warn(
            f"recap_fast was tested with torch {oldest} to {newest}, not with torch {version}: "
            "run its tests before you rely on it",
            stacklevel=2,
        )


def _import_torch():
    try:
        import torch
    except ImportError:
        sys.exit(
            "recap_fast is built against the torch that it will run with, and there is none here: "
            "install torch, then `pip install --no-build-isolation .`"
        )
    return torch


def _record_torch(package: Path, version: str) -> None:
    """Readable without loading the extension, which a mismatch of torch would crash."""
    (package / "_torch_version.py").write_text(f'TORCH_VERSION = "{version}"\n')


class CMakeBuild(build_ext):
    """Runs CMake with ninja; the only extension is recap_fast._C."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        torch = _import_torch()
        _check_release(torch.__version__)
        from torch.utils import cpp_extension

        output = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        # In no temporary folder, which pip would remove: the next build takes what has not changed,
        # and so do the tests of the native code (tests/support/native_build.py).
        python = f"{platform.machine()}-{sys.implementation.cache_tag}"
        build = ROOT / "build" / f"{python}-torch{torch.__version__}"
        arguments = {
            "CMAKE_BUILD_TYPE": os.environ.get("RECAP_BUILD_TYPE", "Release"),
            "RECAP_CUDA": os.environ.get("RECAP_CUDA", "AUTO"),
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(output),
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja"),
            "PYBIND11_FINDPYTHON": "ON",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "RECAP_TORCH_INCLUDE_DIRS": ";".join(cpp_extension.include_paths()),
            "RECAP_TORCH_LIBRARY_DIR": cpp_extension.library_paths()[0],
            "RECAP_TORCH_CXX11_ABI": int(torch._C._GLIBCXX_USE_CXX11_ABI),
            "RECAP_TORCH_CUDA": torch.version.cuda or "",
        }
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        configure += [f"-D{key}={value}" for key, value in arguments.items() if value is not None]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))  # a toolchain, for instance
        made_before = build.exists()
        done = subprocess.run(configure, check=not made_before)
        if done.returncode != 0:  # perhaps since another cmake has made it, or elsewhere
            shutil.rmtree(build)
            subprocess.run(configure, check=True)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)
        _record_torch(output, torch.__version__)

    def copy_extensions_to_source(self) -> None:
        """For an editable install and ``build_ext --inplace``: the record goes where they go."""
        super().copy_extensions_to_source()
        _record_torch(ROOT / "recap_fast", _import_torch().__version__)


setup(ext_modules=[Extension("recap_fast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
