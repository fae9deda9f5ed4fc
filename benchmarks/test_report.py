"""The arithmetic of the report: ratios by round, verdicts, pages, the README's figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    breakdown,
    documents,
    gpu_page,
    headline,
    machine,
    page,
    pictures,
    report,
    sparse,
    state_formats,
)
from benchmarks.clocks import HostClock
from benchmarks.growth import DIMENSIONS
from benchmarks.interleave import Quartiles, Timings, interleave
from benchmarks.measurement import Measurement
from benchmarks.peers import Peer
from benchmarks.plan import CASES, FORMAT_SECONDS, GROWTH_SECONDS, SPARSE_SECONDS
from benchmarks.targets import GPU_OURS, TARGETS, percent_of_copy


def _measurement(times: dict[str, list[float | None]] | None = None, **changes: Any) -> Measurement:
    values: dict[str, Any] = {
        "workload": "ranker-36M",
        "description": "recap-like",
        "groups": 12,
        "tensors": 128,
        "elements": 36_008_619,
        "algorithm": "adam",
        "threads": 1,
        "cache": "cold",
        "bytes": 28 * 36_008_619,
        "timings": Timings(
            times
            or {
                "recap_fast": [90.0, 100.0, 180.0],
                "torch fused": [100.0, 100.0, 200.0],
                "reference": [None, 800.0, None],
            }
        ),
        "peak_memory_mb": {"recap_fast": 563.2, "torch fused": 563.1},
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
    "revision": "0123abc",
    "date": "2026-01-01",
}

_CURVES: dict[str, Any] = {
    "name": "groups",
    "axis": "groups of 1,000 tensors",
    "sizes": [1, 1000],
    "microseconds": {"recap_fast": [10.0, 2000.0], "reference": [80.0, None]},
}


def _results(*measurements: Measurement, **more: Any) -> dict[str, Any]:
    return {"machine": _FACTS, "measurements": [m.to_json() for m in measurements]} | more


# --- timing --------------------------------------------------------------------------------------


def test_ratios_are_taken_within_rounds_in_which_both_ran() -> None:
    # The third round was twice as slow for both; the ratio of the medians would be 1.
    timings = Timings({"a": [1.0, 3.0, 8.0], "b": [2.0, 3.0, 16.0]})
    assert timings.ratio("a", "b") == Quartiles(0.5, 0.5, 0.75)
    timings = _measurement().timings
    assert timings.ratio("reference", "recap_fast") == Quartiles(8.0, 8.0, 8.0)
    assert timings.time("reference").median == 800.0


@pytest.mark.parametrize("cache", ["cold", "warm"])
def test_slow_peers_take_part_in_every_fourth_round(cache: Any) -> None:
    calls: list[str] = []
    peers = {name: [Peer(lambda n=name: calls.append(n), [], [])] for name in ("fast", "slow")}
    (timings,) = interleave(
        peers, HostClock(cache), seconds=0, slow=["slow"], least_rounds=8, most_rounds=9
    )
    taken = [t is not None for t in timings.microseconds["slow"]]
    assert taken == [True, False, False, False] * 2
    assert all(t is not None for t in timings.microseconds["fast"])
    assert calls.count("fast") == 8 * (1 if cache == "cold" else 3)


def test_a_cold_round_renews_gradients_and_both_set_learning_rates() -> None:
    param = torch.nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    group = {"lr": 0.5}
    peer = Peer(lambda: None, [group], [param])
    grad, rate = param.grad, group["lr"]
    interleave({"a": [peer]}, HostClock("warm"), seconds=0, least_rounds=1)
    assert param.grad is grad
    interleave({"a": [peer]}, HostClock("cold"), seconds=0, least_rounds=1)
    assert param.grad is not grad
    assert param.grad.data_ptr() == grad.data_ptr()
    assert group["lr"] == rate and group["lr"] is not rate


# --- targets and pages ---------------------------------------------------------------------------


def _target(text: str) -> Any:
    (found,) = [target for target in TARGETS if target.text == text]
    return found


def test_verdicts() -> None:
    target = _target("ranker-36M, Adam, cold: time over torch fused")
    figure = target.measured([_measurement()], threads=1)
    assert figure.median == 0.9
    assert target.met(figure, threads=1)
    assert target.met(figure, threads=2)
    assert not target.met(Quartiles(0.8, 0.91, 1.0), threads=2)
    assert target.measured([_measurement()], threads=2) is None

    speed_up = _target("ranker-36M, Adam, cold: speed-up over reference")
    assert speed_up.met(speed_up.measured([_measurement()], threads=1), threads=1)
    assert not speed_up.met(Quartiles(6.0, 6.9, 9.0), threads=1)
    did_not_run = _target("many-groups, Adam, cold: speed-up over DeepSpeed")
    assert did_not_run.measured([_measurement(workload="many-groups")], threads=1) is None


def test_results_survive_being_written_and_read() -> None:
    results = _results(_measurement(), _measurement(), growth=[_CURVES])
    text = report.to_text(results)
    assert json.loads(text) == results
    assert Measurement.from_json(json.loads(text)["measurements"][0]) == _measurement()
    assert max(map(len, text.splitlines())) > 200  # one line for each measurement


def test_the_page_shows_losing_rows_and_peak_memory() -> None:
    times = {"recap_fast": [120.0], "torch fused": [100.0], "ceiling": [110.0]}
    text = page.render(_results(_measurement(), _measurement(times, threads=2)), "x.json")
    first = "| ranker-36M, Adam, cold: time over torch fused | ≤ 0.97 / ≤ 0.9 |"
    assert f"{first} 0.90 (0.90 to 0.95) met | " in text
    assert "1.20 (1.20 to 1.20) **not met**; the ceiling 1.10 |" in text
    assert "DeepSpeed: not installed." in text
    assert "| 1 thread, cold | 2 threads, cold | peak memory |" in text
    assert "| recap_fast | 100 µs · 1.00x | 120 µs · 1.00x | 563 MB |" in text
    assert "| reference | 800 µs · 8.00x | - | - |" in text
    small = _measurement(elements=999_999)
    assert "| peak memory |" not in page.render(_results(small), "x.json")


def test_a_limit_with_the_checks() -> None:
    target = _target("many-groups, Adam, cold: speed-up over torch fused")
    times = {"recap_fast": [50.0], "torch fused": [100.0], "ceiling": [20.0]}
    lost = _measurement(times, workload="many-groups")
    assert target.of_ceiling_and_checks([lost], threads=1) is None
    twin = _measurement({"recap_fast": [5.0]}, workload="many-groups-of-scalars")
    assert target.of_ceiling_and_checks([lost, twin], threads=1).median == 4.0
    text = page.render(_results(lost, twin), "x.json")
    assert "**not met**; the ceiling 5.00x; with the checks 4.00x |" in text


def test_the_page_shows_what_a_group_costs_and_growth() -> None:
    name = "many-groups-of-scalars"
    parts = {breakdown._WHOLE: 40.0, "- checks": 30.0}
    single = {breakdown._WHOLE: 20.1, "- checks": 10.2}
    many = {"workload": name, "groups": 100, "microseconds": parts}
    one = {"workload": f"{name} in one group", "groups": 1, "microseconds": single}
    text = page.render(_results(breakdown=[many, one], growth=[_CURVES]), "x.json")
    assert "| optimizer.step() | 40.0 | 20.1 | 201 |" in text
    assert "61 ns are left" in text
    assert "| - checks | 30.0 | 10.2 | 200 |" in text
    assert "### Groups\n\nMicroseconds by number of groups of 1,000 tensors:" in text
    assert "| groups | 1 | 1,000 |" in text
    assert "| reference | 80.0 | - |" in text


def test_the_page_of_a_gpu_says_what_is_reached_and_what_is_not() -> None:
    times = {GPU_OURS: 400.0, "copy": 380.0, "torch per group": 4400.0, "torch fused": 400.0}
    m = _measurement(
        {name: [time] for name, time in times.items()},
        host=Timings({name: [25.0] for name in times}),
        bytes=10**9,
    )
    assert percent_of_copy(m, "torch per group").median == pytest.approx(95 / 11)
    card = {"card": "H", "multiprocessors": 132, "card_memory_gb": 85, "l2_bytes": 0, "cuda": "13"}
    more = {"state": {}, "copy_gb_per_s": None, "activity": {"ranker-36M": {GPU_OURS: [2, 0, 0]}}}
    text = gpu_page.render(_results(m, machine=_FACTS | card, **more), "x.json")
    lines = {line.split("|")[1].strip(): line for line in text.split("\n") if line[:2] == "| "}
    for row, expected in {
        "ranker-36M, Adam: speed over that of a copy": "95.0 % (95.0 to 95.0) met",
        "one-50M-tensor, Adam: speed over that of a copy": "not measured",
        "ranker-36M, Adam: speed-up over torch per group": "11.0x (11.0 to 11.0) met",
        "ranker-36M, Adam: speed-up over torch fused": "1.00x (1.00 to 1.00) **not met**",
        "ranker-36M, Adam: launches and copies of a step": "2 and 0 **not met**",
        "ranker-36M, Adam: host time of a step": "25.0 µs (25.0 to 25.0) **not met**",
        GPU_OURS: "| 1.00x | 2,500 | 95 % | 25.0 | 2 | 0 |",
    }.items():
        assert expected in lines[row]
    assert "DeepSpeed: not installed." in text


# --- the README ----------------------------------------------------------------------------------


def _recap(threads: int) -> Measurement:
    return _measurement(workload="ranker-48M", elements=48_100_000, threads=threads)


def _listed(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("* ")]


def test_the_headline_figures() -> None:
    text = headline.render(_results(_recap(2), _recap(1)), "x.json")
    assert (
        "| the ranker of the-algorithm-ml, 48.1 M elements | 0.1 / 0.1 | "
        "0.8 / 0.8 (8.00x / 8.00x) | 0.1 / 0.1 (1.11x / 1.11x) | - |"
    ) in text
    assert "Milliseconds of one `optimizer.step()`, Adam, with 1 / 2 threads (medians)" in text
    assert "[x.json](x.json)" in text
    assert "| torch, an optimizer per group |" in text
    assert "*torch, an optimizer per group*" in text and 'the row "reference" in' in text
    assert "was slower" not in text and "a single `torch.optim.Adam`" not in text

    times = {"recap_fast": [2000.0], "torch for-loop": [5000.0], "reference": [9000.0]}
    some = [_measurement(times, workload="mixed-sizes", threads=threads) for threads in (1, 2)]
    text = headline.render(_results(_recap(1), *some), "x.json")
    assert "a single `torch.optim.Adam` over all groups" in text
    assert _listed(text) == [
        "* 480 tensors of 64 to 4,096 elements in 12 groups: 5.00 / 5.00 (2.50x / 2.50x)"
    ]


def test_the_headline_tells_what_is_lost_on_any_machine() -> None:
    times = {"recap_fast": [2000.0], "torch fused": [1992.0], "reference": [9000.0]}
    lost = _measurement(times, workload="one-50M-tensor", algorithm="sgd", threads=2)
    facts = _FACTS | {"processor": "another processor"}
    other = _results(lost, _measurement(times), machine=facts)  # the second is not shown
    text = headline.render(_results(_recap(1)), "x.json", [other])
    assert "recap_fast was slower in these cases, each at the revision named:" in text
    assert _listed(text) == [
        "* one tensor of 50 M elements, SGD, 2 threads, another processor with avx2 at 0123abc: "
        "2.00 ms against 1.99 ms of torch `fused=True` (0.996x)"
    ]


def test_the_picture_of_a_step_says_what_it_shows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = _results(_recap(1), _recap(2))
    said = pictures.describe(results)
    assert said == (
        "the ranker of the-algorithm-ml, 48.1 M elements: "
        "torch, an optimizer per group 0.8 ms, 8.00x, torch fused=True 0.1 ms, 1.11x, "
        "recap_fast 0.1 ms"
    )
    path = pictures.draw_steps(results, tmp_path / "steps.png")
    assert said.encode() in path.read_bytes()


def test_the_headline_block_is_replaced() -> None:
    block = headline.render(_results(_recap(1)), "x.json")
    readme = f"before\n{block}\nafter\n"
    other = block.replace("8.00x", "9.00x")
    assert headline.replace(readme, other) == f"before\n{other}\nafter\n"
    for wrong in ("none", readme * 2):
        with pytest.raises(ValueError, match=r"README\.md must hold one block"):
            headline.replace(wrong, block)


def test_documents_of_a_run_that_is_not_whole_lie_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_text(report.to_text(_results(_recap(1), growth=[_CURVES])))
    readme = documents.README.read_bytes()
    documents.write(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["machine.json", "machine.md"]
    assert "### Groups" in (tmp_path / "machine.md").read_text()
    assert documents.README.read_bytes() == readme


def test_a_whole_run_leaves_time_for_the_rest_of_twelve_minutes() -> None:
    seconds = sum(case.seconds * len(case.caches) * 2 for case in CASES)
    seconds += GROWTH_SECONDS * sum(len(d.sizes) for d in DIMENSIONS)
    seconds += SPARSE_SECONDS * (2 + 2 * 2 * len(sparse.ALGORITHMS))
    seconds += FORMAT_SECONDS * 2 * len(state_formats.ALGORITHMS)
    assert seconds < 350


def test_machine_names() -> None:
    assert machine.name(_FACTS) == "amd-epyc-7r13-2core-avx2"
    intel = _FACTS | {"processor": "Intel(R) Xeon(R) CPU E5-2680 v4 @ 2.40GHz", "cores": 8}
    assert machine.name(intel) == "intel-xeon-e5-2680-v4-8core-avx2"
    assert machine.describe()["cores"] >= 1
