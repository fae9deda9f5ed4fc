"""Whether the benchmark of sparse gradients measures at all, and what is written of it."""

from __future__ import annotations

import pytest

from benchmarks import sparse


def test_every_algorithm_is_measured_and_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "ROWS", 5000)
    measurements = list(sparse.measure([1], 0.0))
    facts = dict.fromkeys(
        ("processor", "cores", "instruction_set", "torch", "revision", "date", "busy"), "x"
    )
    text = sparse.section([{"machine": facts, "sparse": measurements}])
    cases = [("Adagrad", "500"), *((algorithm, "5,000") for algorithm in sparse.ALGORITHMS)]
    for algorithm, rows in cases:
        for cache in ("cold", "warm"):
            assert text.count(f"\n| {algorithm}, {rows} rows, 1 thread, {cache} | ") == 1
    fixed = {"recap_fast": [2.0, 4.0], "torch": [8.0, 8.0]}
    text = sparse.section(
        [{"machine": facts, "sparse": [measurements[0] | {"microseconds": fixed}]}]
    )
    assert "| 3.00 µs | 8.00 µs | 3.00x (2.50 to 3.50) |" in text
