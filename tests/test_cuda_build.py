"""Whether CMake builds the CUDA engine, for what, and what the result needs to be imported."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from recap_fast._native import native
from tests.support.native_build import (
    ROOT,
    build_extension,
    check_ptx,
    needs_compiler,
    needs_nvcc,
    run,
    run_tests_with,
)

pytestmark = needs_compiler

CMAKE_FILES = ROOT / "csrc" / "cuda"


def _call(file: str, call: str, folder: Path) -> str:
    """What a function of ours, written in CMake, puts into `found`, in <>."""
    script = folder / "script.cmake"
    script.write_text(f'include({CMAKE_FILES / file})\n{call}\nmessage("<${{found}}>")')
    return run("cmake", "-P", str(script))


# --- TORCH_CUDA_ARCH_LIST ------------------------------------------------------------------------


def _read(listed: str, folder: Path) -> str:
    call = f'read_torch_architectures("{listed}" found)'
    return _call("architectures.cmake", call, folder)


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("9.0", "90-real"),
        ("9.0+PTX", "90"),
        ("8.0;9.0a+PTX", "80-real;90a"),
        ("7.5 8.0,10.0f  12.0+PTX", "75-real;80-real;100f-real;120"),
    ],
)
def test_architectures_in_torchs_notation(listed: str, expected: str, tmp_path: Path) -> None:
    assert _read(listed, tmp_path).strip() == f"<{expected}>"


@pytest.mark.parametrize("listed", ["Hopper", "90", "9.0;nine", "9.0+ptx"])
def test_an_architecture_that_is_none_is_named(listed: str, tmp_path: Path) -> None:
    wrong = listed.split(";")[-1]
    with pytest.raises(AssertionError, match=rf"TORCH_CUDA_ARCH_LIST: '{re.escape(wrong)}' is not"):
        _read(listed, tmp_path)


# --- the toolkit's release -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nvcc", "of_torch", "expected"),
    [
        ("13.0", "13.0", ""),
        ("12.8", "12.6", ""),  # one runtime serves a major release
        ("13.1", "", ""),  # a CPU build of torch
        ("12.6", "12.6", "/x/nvcc is 12.6; it takes 12.8 or newer"),
        (
            "13.0",
            "12.8",
            "/x/nvcc is of CUDA 13.0, but torch is built for CUDA 12.8; set CUDACXX to an nvcc of "
            "CUDA 12, or install a torch for CUDA 13",
        ),
        (
            "12.9",
            "13.0",
            "/x/nvcc is of CUDA 12.9, but torch is built for CUDA 13.0; set CUDACXX to an nvcc of "
            "CUDA 13, or install a torch for CUDA 12",
        ),
    ],
)
def test_a_toolkit_must_be_of_torchs_major_release(
    nvcc: str, of_torch: str, expected: str, tmp_path: Path
) -> None:
    call = f'check_toolkit(/x/nvcc "{nvcc}" "{of_torch}" found)'
    assert _call("toolkit.cmake", call, tmp_path).strip() == f"<{expected}>"


@pytest.fixture(scope="module")
def with_nvcc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to configure again and again, as users do: CMake asks nvcc what it is once."""
    return tmp_path_factory.mktemp("with_nvcc")


@needs_nvcc
def test_the_engine_is_not_built_for_another_cuda_than_torchs(with_nvcc: Path) -> None:
    path, other = _path_with_nvcc(), "-DRECAP_TORCH_CUDA=9.2"
    done = _configure(with_nvcc, "AUTO", other, PATH=path)
    assert done.returncode == 0, done.stdout
    assert "CMake Warning" in done.stdout
    assert "recap_fast engines: cpu; not cuda: " in done.stdout
    assert "but torch is built for CUDA 9.2; set CUDACXX to an nvcc of CUDA 9" in done.stdout
    done = _configure(with_nvcc, "ON", other, PATH=path)
    assert done.returncode != 0
    assert "RECAP_CUDA is ON, but " in done.stdout


# --- with and without nvcc -----------------------------------------------------------------------


def _configure(
    folder: Path, cuda: str, *options: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = ["cmake", "-S", str(ROOT), "-B", str(folder), f"-DRECAP_CUDA={cuda}", *options]
    variables = {key: value for key, value in os.environ.items() if key != "TORCH_CUDA_ARCH_LIST"}
    return subprocess.run(
        command,
        env=variables | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_without_nvcc_the_engine_is_left_out_unless_it_is_asked_for(tmp_path: Path) -> None:
    missing = str(tmp_path / "nvcc")
    done = _configure(tmp_path / "build", "AUTO", CUDACXX=missing)
    assert done.returncode == 0, done.stdout
    assert "recap_fast engines: cpu; not cuda: there is no nvcc; set CUDACXX" in done.stdout
    done = _configure(tmp_path / "build", "ON", CUDACXX=missing)
    assert done.returncode != 0
    assert "RECAP_CUDA is ON, but there is no nvcc" in done.stdout


@needs_nvcc
def test_with_nvcc_the_engine_is_built_for_all_architectures(with_nvcc: Path) -> None:
    done = _configure(with_nvcc, "AUTO", "-DRECAP_TORCH_CUDA=", PATH=_path_with_nvcc())
    assert done.returncode == 0, done.stdout
    engines = re.search(r"recap_fast engines: cpu; cuda \(nvcc [\d.]+, (.*)\)", done.stdout)
    assert engines, done.stdout
    listed = engines[1].split(";")
    assert [each.removesuffix("-real") for each in listed] == list(check_ptx.ARCHITECTURES)
    assert [each for each in listed if not each.endswith("-real")] == listed[-1:]  # it has PTX too
    for command in _commands_of_kernels(with_nvcc):
        assert set(check_ptx.FLAGS) <= set(command.split())


@needs_nvcc
def test_with_nvcc_the_engine_is_built_for_the_architectures_asked_for(with_nvcc: Path) -> None:
    chosen = {"TORCH_CUDA_ARCH_LIST": "8.0;9.0+PTX"}
    torchs = "-DRECAP_TORCH_CUDA="
    done = _configure(with_nvcc, "AUTO", torchs, PATH=_path_with_nvcc(), **chosen)
    assert re.search(r"; cuda \(nvcc [\d.]+, 80-real;90\)$", done.stdout, re.MULTILINE), done.stdout
    for command in _commands_of_kernels(with_nvcc):
        code = re.findall(r"code=\[?((?:sm|compute)_[\w,]+)", command)
        assert sorted(code) == ["compute_90,sm_90", "sm_80"]


@needs_nvcc
def test_profilers_find_the_lines_where_they_are_asked_for(with_nvcc: Path) -> None:
    """They make the code of each architecture much larger."""
    for build_type, expected in (("RelWithDebInfo", True), ("Release", False)):
        options = (f"-DCMAKE_BUILD_TYPE={build_type}", "-DRECAP_TORCH_CUDA=")
        done = _configure(with_nvcc, "AUTO", *options, PATH=_path_with_nvcc())
        assert done.returncode == 0, done.stdout
        for command in _commands_of_kernels(with_nvcc):
            words = command.split()
            assert ("-lineinfo" in words) == expected
            assert {"-O3", "-DNDEBUG", *check_ptx.FLAGS} <= set(words)


def _commands_of_kernels(folder: Path) -> list[str]:
    commands = json.loads((folder / "compile_commands.json").read_text())
    kernels = [one["command"] for one in commands if one["file"].endswith(".cu")]
    assert len(kernels) == 2
    return kernels


def _path_with_nvcc() -> str:
    folder = str(Path(str(check_ptx.find_nvcc())).parent)
    return os.pathsep.join([os.environ["PATH"], folder])


# --- without the engine --------------------------------------------------------------------------


def test_a_build_without_the_engine() -> None:
    files = ("optim/test_without_cuda_engine.py", "optim/test_errors.py", "test_native.py")
    extension = build_extension("without_cuda")
    written = run_tests_with(extension, *(f"tests/{name}" for name in files))
    assert "this build has the CUDA engine" not in written, written


# --- what was built ------------------------------------------------------------------------------


@pytest.mark.skipif(
    not native.has_cuda_engine, reason="this build of recap_fast has no cuda engine"
)
@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_neither_the_driver_nor_the_toolkit_is_needed_to_import() -> None:
    """The CUDA runtime is linked in, and opens the driver when it is first asked for a device."""
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "-d", native.__file__))
    assert "libc10.so" in needed
    assert not [name for name in needed if re.match(r"libcud|libnv", name)], needed
