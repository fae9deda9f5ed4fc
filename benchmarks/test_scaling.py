"""Whether training on several processes is timed."""

from __future__ import annotations

import pytest

from benchmarks import scaling

pytestmark = pytest.mark.long


def test_every_number_of_processes_is_timed() -> None:
    timed = scaling.measure((1, 2), repeats=1, steps=2)
    cases = [(entry["processes"], entry["dense"]) for entry in timed]
    assert cases == [(1, "-"), (2, "ddp"), (2, "fsdp")]
    for entry in timed:
        (speed,), (step,), (optimizer,) = (
            entry[name] for name in ("ratings_per_second", "step_ms", "optimizer_ms")
        )
        assert speed == pytest.approx(scaling.RATINGS / step * 1e3, rel=1e-3)
        assert 0 < optimizer < step
    assert scaling.throughput_table({"throughput": timed}).count("\n") == 2 + 3
