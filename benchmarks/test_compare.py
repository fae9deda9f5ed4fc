"""Whether a comparison steps what it says: two folders, in turn, on equal tensors."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import recap_fast
from benchmarks import compare, revision
from benchmarks.interleave import Timings
from benchmarks.side import Side, SideFailed
from benchmarks.workloads import Workload

_SMALL = Workload("small", "", (((3, 5), (7,)), ((1,),)))
_PACKAGE = Path(recap_fast.__file__).parent

# Appended to the optimizers of a copy: its Adam learns twice as fast.
_TWICE = """
class FusedAdam(FusedAdam):
    def __init__(self, params, lr, **options):
        super().__init__(params, 2 * lr, **options)
"""


def _copy(factory: pytest.TempPathFactory, name: str) -> Path:
    folder = factory.mktemp(name)
    shutil.copytree(_PACKAGE, folder / "recap_fast")
    return folder


@pytest.fixture(scope="module")
def same(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _copy(tmp_path_factory, "same")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = _copy(tmp_path_factory, "other")
    with (folder / "recap_fast" / "optim" / "__init__.py").open("a") as file:
        file.write(_TWICE)
    return folder


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As revisions were that have `FusedCombinedOptimizer` in a module of `optim` alone."""
    folder = _copy(tmp_path_factory, "older")
    init = folder / "recap_fast" / "__init__.py"
    exported = '    "FusedCombinedOptimizer": "recap_fast.keyed.fused",\n'
    assert exported in init.read_text()
    init.write_text(init.read_text().replace(exported, ""))
    moved = "from recap_fast.keyed.fused import FusedCombinedOptimizer as FusedCombinedOptimizer\n"
    (folder / "recap_fast" / "optim" / "combined.py").write_text(moved)
    return folder


def _compare(base: Path, tree: Path, processes: int = 1) -> list[compare.Comparison]:
    return list(
        compare.compare(
            base, tree, [_SMALL], threads=[1], processes=processes, seconds=0, least_rounds=2
        )
    )


def test_equal_sides_have_the_same_bits(older: Path, same: Path) -> None:
    comparisons = _compare(older, same, processes=2)
    assert [c.label for c in comparisons] == [
        "small, adam, 1 thread, cold",
        "small, adam, 1 thread, warm",
    ]
    assert all(c.difference == 0 for c in comparisons)
    assert all(c.timings.time(side).median > 0 for c in comparisons for side in ("base", "tree"))


def test_a_difference_is_told(same: Path, other: Path) -> None:
    assert all(c.difference > 1e-5 for c in _compare(same, other))


def test_a_side_says_what_went_wrong(tmp_path: Path, same: Path) -> None:
    with Side(tmp_path, 1) as side, pytest.raises(SideFailed, match=f"not from {tmp_path}"):
        side.load(_SMALL.groups, "adam")
    with Side(same, 1) as side, pytest.raises(SideFailed, match="KeyError: 'lion'"):
        side.load(_SMALL.groups, "lion")


def test_the_table() -> None:
    timings = Timings({"base": [19.0, 20.0, 40.0], "tree": [9.5, 10.0, 12.0]})
    text = compare.render([compare.Comparison("scalars, adam", timings, 1e-7)], "v1")
    assert "| scalars, adam | 20.0 µs | 10.0 µs | 0.50 (0.40 to 0.50) | differ by 1.0e-07 |" in text


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A git repository whose file says `old` in the first commit and `new` in the second."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    folder = tmp_path / "repository"
    folder.mkdir()
    git = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    for text in ("old", "new"):
        (folder / "file").write_text(text)
        subprocess.run([*git, "add", "file"], check=True)
        subprocess.run([*git, "commit", "-q", "-m", text], check=True)
    return folder


def test_a_revision_is_exported(repository: Path, tmp_path: Path) -> None:
    (repository / "file").write_text("changed and not committed")
    commit = revision.commit_of(repository, "HEAD~1")
    revision.export(repository, commit, tmp_path / "exported")
    assert (tmp_path / "exported" / "file").read_text() == "old"


def test_what_cannot_be_built_is_an_error(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(revision.CannotBuild, match="no-such-branch"):
        revision.commit_of(repository, "no-such-branch")
    commit = revision.commit_of(repository, "HEAD")
    with pytest.raises(revision.CannotBuild, match="does not build"):
        revision.build(repository, commit, tmp_path / "builds")
    assert not list((tmp_path / "builds").iterdir())
