"""What a module of recap_fast loads: not what it has no need of, and none that loads it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.support.native_build import ROOT

_REFUSE = """
import sys

class Refuse:
    def find_spec(name, path=None, target=None):
        assert name not in {unwanted}, f"{{name}} is loaded"

sys.meta_path.insert(0, Refuse)
"""


def _run_without(unwanted: set[str], program: str) -> str:
    """What a program prints, in a process where an attempt to load certain modules is an error."""
    return subprocess.run(
        [sys.executable, "-c", _REFUSE.format(unwanted=unwanted) + program],
        check=True,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout


def test_the_optimizers_step_without_torchrec() -> None:
    program = """
import torch
import recap_fast
from recap_fast.optim import FusedAdam
param = torch.nn.Parameter(torch.ones(3))
param.grad = torch.ones(3)
FusedAdam([param], lr=0.5).step()
print(round(param[0].item(), 3), recap_fast.build_info()["engines"][0])
"""
    assert _run_without({"torchrec", "fbgemm_gpu"}, program).split() == ["0.5", "cpu"]


def test_keyed_and_reference_load_no_extension() -> None:
    pytest.importorskip("torchrec")
    program = "import recap_fast.keyed, recap_fast.reference"
    _run_without({"recap_fast._C", "recap_fast._native"}, program)


# --- circles -------------------------------------------------------------------------------------


def _at_module_level(nodes: Iterable[ast.AST]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports that run when the module is loaded, or would if types were checked."""
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from _at_module_level(ast.iter_child_nodes(node))


def _imported(module: str, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """The names that may be modules, but for the packages that `module` is in."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    assert node.level == 0 and node.module, f"{module} has a relative import"
    if not f"{module}.".startswith(f"{node.module}."):
        yield node.module
    yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _import_graph(root: Path) -> dict[str, set[str]]:
    """For each module of the package in `root`, those of the package that it imports."""
    files = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {
        module: {
            name
            for node in _at_module_level(ast.parse(path.read_text()).body)
            for name in _imported(module, node)
            if name in files and name != module
        }
        for module, path in files.items()
    }


def _circle(root: Path) -> list[str] | None:
    """Modules of which each imports the next, and the last is the first; None if there are none."""
    try:
        TopologicalSorter(_import_graph(root)).prepare()
    except CycleError as error:
        return error.args[1][::-1]
    return None


def test_no_modules_import_each_other() -> None:
    """Imports for type checking count: who reads one file should not have to read the other."""
    circle = _circle(ROOT / "recap_fast")
    assert circle is None, f"these import each other: {' -> '.join(circle)}"


def test_a_circle_is_found(tmp_path: Path) -> None:
    package = tmp_path / "package"
    (package / "inner").mkdir(parents=True)
    for name, text in {
        "__init__": "from package.first import name",  # what is in it may import from below
        "first": "try:\n    from package.inner import second\nexcept ImportError: pass",
        "inner/__init__": "",
        "inner/second": "if TYPE_CHECKING:\n    from package.third import name",
        "third": "def later():\n    import package.first",
    }.items():
        (package / f"{name}.py").write_text(text)
    assert _circle(package) is None
    (package / "third.py").write_text("import package.first")
    circle = _circle(package)
    assert circle is not None and circle[0] == circle[-1]
    assert set(circle) == {"package.first", "package.inner.second", "package.third"}
