"""Whether growth is measured for every size, and drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import growth, pictures
from benchmarks.growth import Dimension
from benchmarks.plan import LARGE_PEERS
from benchmarks.workloads import Workload


@pytest.mark.parametrize("dimension", growth.DIMENSIONS, ids=lambda dimension: dimension.name)
def test_the_sizes_are_those_of_the_workloads(dimension: Dimension) -> None:
    for size in dimension.sizes:
        workload = Workload("", "", dimension.make(size))
        counts = {
            "elements": workload.elements,
            "tensors": workload.tensors,
            "groups": len(workload.groups),
        }
        assert counts[dimension.name] == size
        if dimension.name == "groups":
            assert workload.tensors == 1000
            assert all(workload.groups)


def test_every_size_is_measured_and_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(growth, "_LARGE_ELEMENTS", 300)
    dimension = Dimension("elements", "elements", lambda count: (((count,),),), (3, 30, 300))
    (curves,) = growth.measure(0.0, [dimension])
    assert curves["sizes"] == [3, 30, 300]
    assert all(time > 0 for time in curves["microseconds"]["recap_fast"])
    for name, times in curves["microseconds"].items():
        assert [time is None for time in times] == [False, False, name not in LARGE_PEERS]

    (path,) = pictures.draw_growth([curves], "machine", tmp_path / "new")
    assert path == tmp_path / "new" / "machine-growth-elements.png"
    assert path.read_bytes().startswith(b"\x89PNG")
