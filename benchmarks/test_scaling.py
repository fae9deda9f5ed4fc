"""Whether training on several processes is timed, and sends what the formulas say."""

from __future__ import annotations

import pytest

from benchmarks import scaling
from benchmarks.scaling import DIM, FEATURES, RATINGS, SHARDINGS

pytestmark = pytest.mark.long


def test_every_number_of_processes_is_timed_and_counted() -> None:
    results = scaling.measure((1, 2), repeats=1, steps=2)
    timed = {(e["processes"], e["sharding"], e["dense"]) for e in results["throughput"]}
    counted = {(2, "table_wise", "fsdp"), *((2, sharding, "ddp") for sharding in SHARDINGS)}
    assert timed == {(1, "table_wise", "-"), *counted}
    for entry in results["throughput"]:
        (speed,), (step,), (optimizer,) = (
            entry[name] for name in ("ratings_per_second", "step_ms", "optimizer_ms")
        )
        assert speed == pytest.approx(RATINGS / step * 1e3, rel=1e-3)
        assert 0 < optimizer < step
    assert {(e["processes"], e["sharding"], e["dense"]) for e in results["traffic"]} == counted
    assert scaling.throughput_table(results).count("\n") == 2 + 3
    for entry in results["traffic"]:
        ids, _ = scaling.tables_by_formula(
            *(entry["sharding"], 2, RATINGS // 2, FEATURES),
            *(entry["number_of_ids"] / (RATINGS // 2) / FEATURES, DIM),
        )
        assert entry["ids"] == pytest.approx(ids, rel=0.05)  # ids of a batch are drawn
        for name, sent, formula in scaling.compared(entry):
            if entry["dense"] == "ddp" and name != "ids":
                assert sent == pytest.approx(formula)
