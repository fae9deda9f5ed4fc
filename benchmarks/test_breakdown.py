"""Whether the parts of a step make up the whole."""

from __future__ import annotations

import pytest

from benchmarks import breakdown
from benchmarks.workloads import Workload


def test_the_parts_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breakdown, "_ROUNDS", 3)
    workload = Workload("small", "", (((3, 5), (7,)), ((1,),)))
    parts = breakdown.parts(workload)
    whole = parts.pop("optimizer.step()")
    assert whole > 0
    assert sum(parts.values()) == pytest.approx(whole)
