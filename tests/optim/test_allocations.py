"""What a steady-state step allocates: nothing, however large the model."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torchrec")

_FOLDER = Path(__file__).parent
_COMPILER = os.environ.get("CC", "cc")

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or shutil.which(_COMPILER) is None,
    reason="needs glibc and a C compiler",
)


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """Calls of malloc and its like in one step, by number of threads and case of allocations.py."""
    library = tmp_path_factory.mktemp("allocations") / "count_allocations.so"
    source = str(_FOLDER / "count_allocations.c")
    subprocess.run([_COMPILER, "-O1", "-shared", "-fPIC", source, "-o", str(library)], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "tests.optim.allocations"],
        cwd=_FOLDER.parent.parent,
        env=os.environ | {"LD_PRELOAD": str(library)},
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("threads", ["1", "2"])
def test_a_step_allocates_nothing(counts: dict[str, dict[str, int]], threads: str) -> None:
    assert counts[threads].pop("torch") > 0  # or nothing is counted
    assert set(counts[threads].values()) == {0}, counts
