"""Whether the workers measure at all; the arithmetic is tested in tests/test_scaling.py."""

from __future__ import annotations

import multiprocessing
import time

import pytest

from benchmarks.scaling.__main__ import measure
from benchmarks.scaling.neighbours import watch

pytestmark = pytest.mark.long


def test_every_number_of_processes_is_timed_and_counted() -> None:
    results = measure((1, 2), repeats=1, steps=2)
    timed = {(entry["processes"], entry["dense"]) for entry in results["throughput"]}
    assert timed == {(1, "-"), (2, "ddp"), (2, "fsdp")}
    for entry in results["throughput"]:
        (speed,), (step,), (optimizer,) = (
            entry[name] for name in ("ratings_per_second", "step_ms", "optimizer_ms")
        )
        assert speed == pytest.approx(512 / step * 1e3, rel=1e-3)
        assert 0 < optimizer < step
    assert {entry["sharding"] for entry in results["traffic"]} == {
        "table_wise",
        "row_wise",
        "column_wise",
    }
    assert all(entry["ids"] > 0 and entry["floats"] > 0 for entry in results["traffic"])


def _work(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_own_processes_are_no_neighbours_and_others_are() -> None:
    def own() -> None:
        child = multiprocessing.get_context("fork").Process(target=_work, args=(1.0,))
        child.start()
        child.join()

    _, alone = watch(own)
    if alone is None:
        pytest.skip("this system does not tell")
    other = multiprocessing.get_context("fork").Process(target=_work, args=(1.5,))
    other.start()
    _, disturbed = watch(lambda: time.sleep(1))
    other.join()
    assert disturbed - alone > 0.3
