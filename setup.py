"""Builds the extension: finds torch and the CUDA toolkit, and hands the rest to CMakeLists.txt."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


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
        from torch.utils import cpp_extension

        output = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
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
        }
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        configure += [f"-D{key}={value}" for key, value in arguments.items() if value is not None]
        subprocess.run(configure, check=True)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)
        _record_torch(output, torch.__version__)

    def copy_extensions_to_source(self) -> None:
        """For an editable install and ``build_ext --inplace``: the record goes where they go."""
        super().copy_extensions_to_source()
        _record_torch(ROOT / "recap_fast", _import_torch().__version__)


setup(ext_modules=[Extension("recap_fast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
