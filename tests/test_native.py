"""The extension module is loaded only under the torch release it was built against."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from recap_fast import _C, _native, build_info
from recap_fast._native import use_instruction_set
from recap_fast.optim import FusedSGD
from tests.support.native_build import ROOT


@pytest.fixture(autouse=True)
def _fastest_instruction_set_afterwards() -> Iterator[None]:
    yield
    use_instruction_set(None)


def _built_against(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    module = types.ModuleType("recap_fast._torch_version") if version else None
    if module:
        module.TORCH_VERSION = version
    # None makes the import fail, as if the file were not there.
    monkeypatch.setitem(sys.modules, "recap_fast._torch_version", module)


def test_the_build_says_what_it_contains() -> None:
    info = build_info()
    assert info["engines"][0] == "cpu" and set(info["engines"]) <= {"cpu", "cuda"}
    assert info["instruction_sets"][0] == "baseline"
    assert set(info["instruction_sets"]) <= {"baseline", "avx2", "avx512"}
    assert info["torch_running"] == torch.__version__
    assert info["torch_built_against"].split(".")[:2] == torch.__version__.split(".")[:2]


@pytest.mark.skipif(shutil.which("readelf") is None, reason="there is no readelf")
def test_the_extension_is_linked_by_no_path() -> None:
    """Neither one of the machine that has built it nor the current folder is searched for torch."""
    found = subprocess.run(
        ["readelf", "--dynamic", "--wide", _C.__file__], check=True, capture_output=True, text=True
    ).stdout
    assert "Shared library: [libtorch_python.so]" in found
    assert not re.search(r"R(UN)?PATH", found)


def test_the_fastest_instruction_set_is_in_use() -> None:
    info = build_info()
    assert info["instruction_set"] == info["instruction_sets"][-1]


def test_every_instruction_set_can_be_chosen() -> None:
    sets = build_info()["instruction_sets"]
    for name in sets:
        use_instruction_set(name)
        assert build_info()["instruction_set"] == name
    use_instruction_set(None)
    assert build_info()["instruction_set"] == sets[-1]


def test_an_instruction_set_that_is_not_there_is_named() -> None:
    before = build_info()["instruction_set"]
    with pytest.raises(ValueError, match=r"'altivec' is not available.*baseline"):
        use_instruction_set("altivec")
    assert build_info()["instruction_set"] == before


# --- how long tensors are updated ----------------------------------------------------------------


@pytest.fixture
def read_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., dict[str, Any]]]:
    """Has variables of the environment read, as when the module is loaded; what it then says."""

    def read(**variables: str) -> dict[str, Any]:
        with monkeypatch.context() as context:
            for name, value in variables.items():
                context.setenv(name, value)
            return importlib.reload(_native).build_info()

    yield read
    importlib.reload(_native)


def _step_long_tensors(steps: int) -> None:
    param = torch.nn.Parameter(torch.ones(20, 40_000, dtype=torch.float64))
    param.grad = torch.ones_like(param)
    optimizer = FusedSGD([param], lr=0.1)
    for _ in range(steps):
        optimizer.step()


def test_the_environment_fixes_how_long_tensors_are_updated(
    read_environment: Callable[..., dict[str, Any]],
) -> None:
    info = read_environment(
        RECAP_FAST_STREAMS="3", RECAP_FAST_PREFETCH="0", RECAP_FAST_PREFETCH_LEVEL="2"
    )
    assert (info["streams"], info["prefetch"], info["ways"]) == (3, 0, {})
    assert info["prefetch_level"] == 2
    _step_long_tensors(40)
    assert build_info()["ways"] == {}  # nothing was measured


def test_without_it_the_fastest_way_is_found_and_stays(
    read_environment: Callable[..., dict[str, Any]],
) -> None:
    info = read_environment(RECAP_FAST_STREAMS="auto", RECAP_FAST_PREFETCH="auto")
    assert (info["streams"], info["prefetch"], info["ways"]) == ("auto", "auto", {})
    _step_long_tensors(40)
    (found,) = build_info()["ways"].items()
    assert found[0] == "float64, 2 arrays of 4 MiB or more"
    streams, prefetch, narrow = found[1]
    assert streams in (1, 2, 4) and prefetch in (0, 8)
    assert not (narrow and prefetch)
    _step_long_tensors(40)
    assert build_info()["ways"] == dict([found])


@pytest.mark.parametrize(
    ("name", "value", "numbers"),
    [
        ("RECAP_FAST_PREFETCH", "33", "0 to 32"),
        ("RECAP_FAST_PREFETCH", "-1", "0 to 32"),
        ("RECAP_FAST_PREFETCH", "1.5", "0 to 32"),
        ("RECAP_FAST_PREFETCH_LEVEL", "3", "1 to 2"),
        ("RECAP_FAST_STREAMS", "0", "1 to 8"),
        ("RECAP_FAST_STREAMS", "two", "1 to 8"),
    ],
)
def test_what_the_environment_cannot_fix_is_named(
    name: str, value: str, numbers: str, read_environment: Callable[..., dict[str, Any]]
) -> None:
    message = f"{name} in the environment is '{value}'; it must be auto, or a number from {numbers}"
    with pytest.raises(ValueError, match=message):
        read_environment(**{name: value})


# --- which torch it runs with --------------------------------------------------------------------


def test_another_release_of_torch_is_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    _built_against(monkeypatch, "2.9.1+cu126")
    with pytest.raises(ImportError, match=r"built against torch 2\.9\.1.*pip install") as error:
        _native._load()
    assert torch.__version__ in str(error.value)


def test_another_patch_release_or_variant_of_torch_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    release = ".".join(torch.__version__.split(".")[:2])
    _built_against(monkeypatch, f"{release}.99+cu999")
    assert _native._load() is _native.native


def test_a_package_that_is_not_built_is_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    _built_against(monkeypatch, None)
    with pytest.raises(ImportError, match=r"not built.*pip install"):
        _native._load()


# --- what type checkers read of it ---------------------------------------------------------------

Described = dict[str, list[str] | None]  # arguments, if it is known which


def _in_stub(nodes: list[ast.stmt]) -> Described:
    """What a part of `_C.pyi` describes, by name; a property has no arguments."""
    found: Described = {}
    for node in nodes:
        if isinstance(node, ast.ClassDef):
            own = _in_stub(node.body)
            found |= {node.name: None} | {f"{node.name}.{name}": own[name] for name in own}
        elif isinstance(node, ast.FunctionDef):
            is_property = any(ast.unparse(each) == "property" for each in node.decorator_list)
            found[node.name] = None if is_property else [arg.arg for arg in node.args.args]
        elif isinstance(node, ast.AnnAssign):
            found[ast.unparse(node.target)] = None
    return found


def _in_module(owner: object) -> Described:
    """The same of the module itself, whose functions say in their documentation what they take."""
    found: Described = {}
    for name, value in vars(owner).items():
        if name != "__init__" and name.startswith("_"):
            continue
        called = re.match(rf"{name}\((.*)\) -> ", getattr(value, "__doc__", None) or "")
        found[name] = called and re.findall(r"(\w+): ", called[1])
        if isinstance(value, type):
            own = _in_module(value)
            found |= {f"{name}.{member}": own[member] for member in own}
    return found


def test_the_stub_describes_the_extension() -> None:
    stub = _in_stub(ast.parse((ROOT / "recap_fast/_C.pyi").read_text()).body)
    module = _in_module(_C)
    assert stub.keys() == module.keys()
    assert {name: stub[name] for name in module if module[name] is not None} == {
        name: arguments for name, arguments in module.items() if arguments is not None
    }
    assert module["use_instruction_set"] == ["name"]
