"""Whether the benchmark of sparse gradients measures at all, and what is written of it."""

from __future__ import annotations

from benchmarks import sparse


def test_it_measures_every_algorithm() -> None:
    measurements = []
    for algorithm in sparse.ALGORITHMS:
        measurements += sparse.measure(algorithm, 5000, [1], 0.0)
    assert [(each["algorithm"], each["cache"]) for each in measurements] == [
        (algorithm, cache) for algorithm in sparse.ALGORITHMS for cache in ("warm", "cold")
    ]
    rows = sparse.table(measurements).splitlines()[2:]
    assert len(rows) == len(measurements) and all("µs" in row for row in rows)
