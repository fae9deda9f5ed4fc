"""The arithmetic of the report: ratios by round, verdicts, the page."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import machine, page, report
from benchmarks.interleave import Quartiles, Timings, interleave
from benchmarks.peers import Peer
from benchmarks.plan import Measurement
from benchmarks.targets import TARGETS


def _measurement(**changes: Any) -> Measurement:
    values: dict[str, Any] = {
        "workload": "A",
        "description": "recap-like",
        "groups": 12,
        "tensors": 128,
        "elements": 36_008_619,
        "algorithm": "adam",
        "threads": 1,
        "cache": "cold",
        "bytes": 28 * 36_008_619,
        "timings": Timings(
            {
                "recap_fast": [90.0, 100.0, 180.0],
                "torch fused": [100.0, 100.0, 200.0],
                "reference": [None, 800.0, None],
            }
        ),
        "skipped": {"DeepSpeed": "not installed"},
    }
    return Measurement(**(values | changes))


_FACTS: dict[str, Any] = {
    "processor": "AMD EPYC 7R13 Processor",
    "cores": 2,
    "caches": {"L2": "512K"},
    "memory_gb": 8,
    "transparent_huge_pages": "madvise",
    "system": "Linux x86_64",
    "python": "3.11.7",
    "torch": "2.13.0",
    "torch_instruction_set": "AVX2",
    "instruction_set": "avx2",
    "busy": 0.0,
    "date": "2026-01-01",
}


def test_ratios_are_taken_within_rounds() -> None:
    # The third round was twice as slow for both; the ratio of the medians would be 1.
    timings = Timings({"a": [1.0, 3.0, 8.0], "b": [2.0, 3.0, 16.0]})
    assert timings.ratio("a", "b") == Quartiles(0.5, 0.5, 0.75)


def test_ratios_leave_out_rounds_that_a_peer_sat_out() -> None:
    timings = _measurement().timings
    assert timings.ratio("reference", "recap_fast") == Quartiles(8.0, 8.0, 8.0)
    assert timings.time("reference").median == 800.0


def _counting_peer(calls: list[str], name: str) -> Peer:
    return Peer(lambda: calls.append(name), [], [])


@pytest.mark.parametrize("cache", ["cold", "warm"])
def test_slow_peers_take_part_in_every_fourth_round(cache: Any) -> None:
    calls: list[str] = []
    peers = {name: _counting_peer(calls, name) for name in ("fast", "slow")}
    timings = interleave(
        peers, cache=cache, budget_seconds=0, slow=["slow"], min_rounds=8, max_rounds=9
    )
    taken = [t is not None for t in timings.microseconds["slow"]]
    assert taken == [True, False, False, False] * 2
    assert all(t is not None for t in timings.microseconds["fast"])
    assert calls.count("fast") == 2 + 8 * (1 if cache == "cold" else 2)


def test_a_cold_round_renews_gradients_and_both_set_learning_rates() -> None:
    import torch

    param = torch.nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    group = {"lr": 0.5}
    peer = Peer(lambda: None, [group], [param])
    grad, rate = param.grad, group["lr"]
    interleave({"a": peer}, cache="warm", budget_seconds=0, min_rounds=1)
    assert param.grad is grad
    interleave({"a": peer}, cache="cold", budget_seconds=0, min_rounds=1)
    assert param.grad is not grad
    assert param.grad.data_ptr() == grad.data_ptr()
    assert group["lr"] == rate and group["lr"] is not rate


def _target(text: str) -> Any:
    (found,) = [target for target in TARGETS if target.text == text]
    return found


def test_verdicts() -> None:
    target = _target("A, Adam: time over torch fused")
    figure = target.measured([_measurement()], threads=1)
    assert figure.median == 0.9
    assert target.met(figure, threads=1)
    assert target.met(figure, threads=2)
    assert not target.met(Quartiles(0.8, 0.91, 1.0), threads=2)
    assert target.measured([_measurement()], threads=2) is None

    speed_up = _target("A, cold: speed-up over reference")
    assert speed_up.met(speed_up.measured([_measurement()], threads=1), threads=1)
    assert not speed_up.met(Quartiles(6.0, 6.9, 9.0), threads=1)


def test_a_peer_that_did_not_run_is_not_measured() -> None:
    (target, *_) = [t for t in TARGETS if "DeepSpeed" in t.text]
    measurement = _measurement(workload="D")
    assert target.measured([measurement], threads=1) is None


def test_results_survive_being_written_and_read() -> None:
    results = {"machine": _FACTS, "measurements": [_measurement().to_json()]}
    read = json.loads(report._to_text(results))
    assert read == results
    assert Measurement.from_json(read["measurements"][0]) == _measurement()


def test_the_page_shows_losing_rows() -> None:
    lost = _measurement(
        threads=2,
        timings=Timings({"recap_fast": [120.0], "torch fused": [100.0], "ceiling": [110.0]}),
    )
    results = {"machine": _FACTS, "measurements": [_measurement().to_json(), lost.to_json()]}
    text = page.render(results, ["../benchmarks/results/x-growth-elements.png"])
    assert "| A, Adam: time over torch fused | ≤ 0.97 / ≤ 0.9 | 0.90 (0.90 to 0.95) met | " in text
    assert "1.20 (1.20 to 1.20) **not met**; the ceiling 1.10 |" in text
    assert "| reference | 800 µs · 8.00x | - |" in text
    assert "DeepSpeed: not installed." in text
    assert "![x-growth-elements](../benchmarks/results/x-growth-elements.png)" in text


def test_machine_names() -> None:
    assert machine.name(_FACTS) == "amd-epyc-7r13-2core-avx2"
    intel = _FACTS | {"processor": "Intel(R) Xeon(R) CPU E5-2680 v4 @ 2.40GHz", "cores": 8}
    assert machine.name(intel) == "intel-xeon-e5-2680-v4-8core-avx2"
    assert machine.describe()["cores"] >= 1
