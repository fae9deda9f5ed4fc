"""What the package loads, and says where torchrec or FBGEMM is missing or does not fit torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from recap_fast.torchrec_releases import PAIRS, REQUIREMENTS, how_to_install
from tests.support.native_build import ROOT

# In a fork for each of its arguments, executes it and prints what an import of each module and name
# says; then the exit status. torch itself is imported once.
_ALL = """
import importlib, os, sys
import torch, recap_fast
assert not [name for name in sys.modules if name.startswith(("recap_fast.", "torchrec"))]
for broken in sys.argv[1:]:
    if os.fork() == 0:
        exec(broken)
        break
    print(os.wait()[1], end="\\1", flush=True)
else:
    sys.exit()
for name in (
    "build", "scheduler", "reference", "embeddings", "keyed", "checkpoint", "keyed.fused"
):
    try:
        importlib.import_module(f"recap_fast.{name}")
    except ImportError as error:
        print(name, error, end="\\0", flush=True)
for name in ("build_optimizer", "FusedCombinedOptimizer", "RecapLRShim"):
    try:
        getattr(recap_fast, name)
    except ImportError as error:
        print(name, error, end="\\0", flush=True)
"""

# How a build for another torch fails.
_LIBRARY = "Could not load this library: fbgemm_gpu_tbe_index_select.so"

_NEITHER = """
sys.modules["torchrec"] = sys.modules["fbgemm_gpu"] = None
optimizer = recap_fast.fuse(torch.optim.Adam([torch.ones(2, requires_grad=True)]))
assert isinstance(optimizer, recap_fast.optim.FusedAdam)
"""

_BROKEN = {
    "no torchrec": ('sys.modules["torchrec"] = None', "ModuleNotFoundError"),
    "no FBGEMM": ('sys.modules["fbgemm_gpu"] = None', "ModuleNotFoundError"),
    "another torch's FBGEMM": ('sys.path.insert(0, "{folder}")', f"OSError: {_LIBRARY}"),
    "an operator it lacks": ('sys.path.insert(0, "{folder}")', "AttributeError: no operator"),
}


@pytest.fixture(scope="module")
def messages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Of each of the ways, and the exit status."""
    programs = []
    for broken, found in _BROKEN.values():
        kind, _, text = found.partition(": ")
        folder = tmp_path_factory.mktemp("broken")
        if text:
            (folder / "fbgemm_gpu").mkdir()
            (folder / "fbgemm_gpu" / "__init__.py").write_text(f"raise {kind}({text!r})")
        programs.append(broken.format(folder=folder))
    programs.append(_NEITHER)
    result = subprocess.run(
        [sys.executable, "-c", _ALL, *programs],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    print(result.stderr)
    said = result.stdout.split("\1")[:-1]
    return {how: each.split("\0") for how, each in zip([*_BROKEN, "neither"], said, strict=True)}


@pytest.mark.parametrize("how", _BROKEN)
def test_without_torchrec_the_error_says_how_to_install_it(
    how: str, messages: dict[str, list[str]]
) -> None:
    kind, _, text = _BROKEN[how][1].partition(": ")
    *said, status = messages[how]
    assert len(said) == 10 and status == "0"
    for message in said:
        assert "need torchrec and FBGEMM" in message
        assert f"({kind}" in message and text in message
        assert message.count(how_to_install()) == 1


def test_modules_are_loaded_when_first_used() -> None:
    program = """
import sys
import recap_fast
names = {"checkpoint", "config", "embeddings", "keyed", "optim", "reference"}
assert names <= set(dir(recap_fast))
assert not {"torch", "torchrec"} & set(sys.modules)
assert not [name for name in sys.modules if name.startswith("recap_fast.")]
assert recap_fast.optim.FusedAdam
assert "torchrec" not in sys.modules
assert recap_fast.reference.build_optimizer and recap_fast.config.OptimizerConfig
assert recap_fast.checkpoint.save and recap_fast.keyed.CombinedOptimizer
assert recap_fast.embeddings.fuse_embeddings
assert not hasattr(recap_fast, "optimizers")
"""
    pytest.importorskip("torchrec")
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_optim_and_fuse_work_without_them(messages: dict[str, list[str]]) -> None:
    assert messages["neither"][-1] == "0"


@pytest.mark.parametrize("release", PAIRS)
@pytest.mark.parametrize("end", [".0", ".1+cu128", ".0a0+git1234567"])
def test_the_commands_are_those_of_the_torch_that_runs(release: str, end: str) -> None:
    torchrec, fbgemm = PAIRS[release]
    text = how_to_install(release + end)
    assert f"pip install torchrec=={torchrec} fbgemm-gpu=={fbgemm}\n" in text
    assert f"pip install {' '.join(REQUIREMENTS)}\n" in text
    assert text.endswith(f"pip install --no-deps torchrec=={torchrec} fbgemm-gpu-cpu=={fbgemm}")
    assert text.count("--no-deps") == 1


@pytest.mark.parametrize("version", ["2.11.0", "2.130.0", "3.0.0"])
def test_a_torch_without_a_pair_is_told_which_have_one(version: str) -> None:
    text = how_to_install(version)
    assert f"No releases of them are known to belong to torch {version}" in text
    assert "install a torch 2.13 or 2.14" in text
    assert text.count("--no-deps") == len(PAIRS)


def test_the_torch_of_the_tests_has_a_pair() -> None:
    pytest.importorskip("torchrec")
    assert "No releases" not in how_to_install(torch.__version__)
