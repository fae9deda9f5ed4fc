"""Whether steps of parameters that FSDP2 shards are timed, and their memory is looked at."""

from __future__ import annotations

import pytest

from benchmarks import sharded_params
from benchmarks.interleave import Timings

pytestmark = pytest.mark.long


def test_every_way_is_timed_on_dtensors_and_on_plain_tensors() -> None:
    measured = list(sharded_params.measure(0, (1, 2), steps=20))
    assert [each["processes"] for each in measured] == [1, 2]
    for each in measured:
        timings = Timings(each["microseconds"])
        for way in ("recap_fast", "torch foreach", "torch fused"):
            assert each["growth"][way][0] == 20
            assert timings.time(way).median > 0 and timings.time(f"{way}, plain").median > 0
    page = sharded_params.section(measured)
    assert page.count("| 1 process, ") == page.count("| 2 processes, ") == 3
