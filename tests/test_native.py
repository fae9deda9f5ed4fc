"""The extension module is loaded only under the torch release it was built against."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator

import pytest
import torch

from recap_fast import _C, _native, build_info
from recap_fast._native import use_instruction_set
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
