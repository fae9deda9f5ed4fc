"""The benchmarks of CUDA devices, as far as they run without one: everything but the timing."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import activity, card, clocks, gpu_page, peers, plan, report, workloads
from benchmarks.builders import Unavailable
from benchmarks.interleave import Quartiles, interleave
from benchmarks.measurement import Measurement
from benchmarks.peers import Peer
from benchmarks.targets import GPU_OURS, percent_of_copy
from benchmarks.workloads import Workload

H100 = {
    "card": "NVIDIA H100 80GB HBM3",
    "capability": "9.0",
    "multiprocessors": 132,
    "card_memory_gb": 85,
    "l2_bytes": 50 * 2**20,
    "cuda": "13.0",
}


# --- plan ----------------------------------------------------------------------------------------


def test_copies_are_together_larger_than_the_cache() -> None:
    for case in plan.gpu_cases(plan.GPU_NAMES, tuple(peers.ALGORITHMS), H100["l2_bytes"]):
        if case.caches == ("cold",):
            size = peers.working_set(workloads.by_name(case.workload), case.algorithm)
            assert case.copies * size >= 2 * H100["l2_bytes"]
        else:
            assert case.caches == ("warm",) and case.copies == 1


def test_a_workload_has_the_cache_states_that_make_sense() -> None:
    cases = plan.gpu_cases(plan.GPU_NAMES, ("adam",), H100["l2_bytes"])
    seen = [(case.workload, *case.caches) for case in cases]
    assert seen == [
        ("ranker-36M", "cold"),
        *(("mixed-sizes", cache) for cache in ("cold", "warm")),
        ("one-50M-tensor", "cold"),
        *(("many-groups", cache) for cache in ("cold", "warm")),
        *(("scalars", "warm"), ("many-groups-of-scalars", "warm")),
    ]
    assert dict(zip(seen, cases, strict=True))["ranker-36M", "cold"].copies == 1


def test_slow_peers_have_no_rotating_copies() -> None:
    large, small = plan.gpu_cases(("ranker-36M", "many-groups"), ("adam",), H100["l2_bytes"])[:2]
    assert (large.copies, small.copies) == (1, 16)
    assert large.peers == peers.GPU_PEERS
    slow = {"torch per group", "torch for-loop", "torch foreach"}
    assert set(large.peers) - set(small.peers) == slow


def test_the_working_set_of_adam() -> None:
    assert peers.working_set(workloads.ONE_50M_TENSOR, "adam") == 4 * 4 * 50_000_000


# --- peers ---------------------------------------------------------------------------------------

_TINY = Workload("tiny", "two groups", (((3, 2), (5,)), ((1,),)))
_EAGER = (GPU_OURS, "torch per group", "torch for-loop", "torch foreach", "torch fused")


@pytest.mark.parametrize("algorithm", ["adam", "adagrad", "sgd"])
@pytest.mark.parametrize("name", _EAGER)
def test_a_peer_steps_every_tensor_as_the_reference(name: str, algorithm: str) -> None:
    initial = peers.initial_values(_TINY)
    peer, reference = (
        peers.build_and_step(each, initial, algorithm) for each in (name, "torch for-loop")
    )
    before = [tensor for group in initial.params for tensor in group]
    for mine, other, old in zip(peer.params, reference.params, before, strict=True):
        assert not torch.equal(mine.detach(), old)
        torch.testing.assert_close(mine, other)
    assert [group["lr"] for group in peer.param_groups] == [1e-4, 1e-4 * 1.5]


@pytest.mark.parametrize(("algorithm", "streams"), [("adam", 7), ("adagrad", 5), ("sgd", 3)])
def test_the_copy_moves_the_bytes_of_a_step(algorithm: str, streams: int) -> None:
    workload = Workload("even", "", (((1000,),),))
    peer = peers.build("copy", peers.initial_values(workload), algorithm)
    source = peer.step.__closure__[0].cell_contents
    assert 2 * source.numel() == streams * 1000
    assert torch.equal(peer.step(), source)


def test_every_peer_is_described() -> None:
    assert peers.DESCRIPTIONS.keys() == peers.BUILDERS.keys()
    assert set(peers.SLOW_PEERS) <= peers.BUILDERS.keys()
    assert set(peers.PEERS + peers.CLIPPING_PEERS + peers.GPU_PEERS) == peers.BUILDERS.keys()


def test_a_peer_that_refuses_to_step_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("not on this device\nand more")

    initial = peers.initial_values(_TINY)
    builders = {**peers.BUILDERS, "torch fused": refuse, GPU_OURS: refuse}
    monkeypatch.setattr(peers, "BUILDERS", builders)
    with pytest.raises(Unavailable, match=r"^not on this device$"):
        peers.build_and_step("torch fused", initial, "adam")
    with pytest.raises(RuntimeError, match="and more"):
        peers.build_and_step(GPU_OURS, initial, "adam")


def test_a_peer_without_its_package_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(*_: Any) -> Any:
        raise ModuleNotFoundError("No module named 'torchrec'")

    initial = peers.initial_values(_TINY)
    builders = {**peers.BUILDERS, "recap_fast": lacks, GPU_OURS: lacks}
    monkeypatch.setattr(peers, "BUILDERS", builders)
    with pytest.raises(Unavailable, match=r"needs torchrec and pydantic \(.*torchrec"):
        peers.build_and_step("recap_fast", initial, "adam")
    with pytest.raises(ModuleNotFoundError):
        peers.build_and_step(GPU_OURS, initial, "adam")


def test_a_graph_of_torchs_adagrad_is_unavailable() -> None:
    initial = peers.initial_values(_TINY)
    with pytest.raises(Unavailable, match="Adagrad"):
        peers.build("torch fused, graph replay", initial, "adagrad")


# --- activity ------------------------------------------------------------------------------------


def _event(category: str, name: str) -> dict[str, str]:
    return {"ph": "X", "cat": category, "name": name}


_MARKER_EVENT = _event("kernel", "at::cuda::(anonymous namespace)::spin_kernel(long)")


def test_kernels_copies_and_sets_are_counted() -> None:
    step = "void recap::cuda::(anonymous namespace)::update_tiles<4096>(...)"
    events = [
        _MARKER_EVENT,
        _event("cpu_op", "aten::add"),
        _event("cuda_runtime", "cudaLaunchKernel"),
        _event("gpu_user_annotation", "Optimizer.step#FusedAdam.step"),
        _event("kernel", step),
        _event("kernel", step),
        _event("kernel", "other"),
        _event("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)"),
        _event("gpu_memset", "Memset (Device)"),
        _MARKER_EVENT,
        {"ph": "M", "name": "process_name"},
    ]
    found = activity.read({"traceEvents": events})
    assert found == activity.Activity(Counter({step: 2, "other": 1}), copies=1, sets=1)
    assert found.launches == 3


@pytest.mark.parametrize("markers", [0, 1])
def test_a_trace_without_both_markers_proves_nothing(markers: int) -> None:
    with pytest.raises(activity.NothingSeen):
        activity.read({"traceEvents": [_MARKER_EVENT] * markers})


# --- card ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "nvidia-h100"),
        ("NVIDIA H200", "nvidia-h200"),
        ("NVIDIA A100-SXM4-40GB", "nvidia-a100-sxm4"),
        ("NVIDIA H100 PCIe", "nvidia-h100-pcie"),
        ("NVIDIA GeForce RTX 4090", "nvidia-geforce-rtx-4090"),
    ],
)
def test_results_are_named_after_the_card(name: str, expected: str) -> None:
    assert card.file_name(name) == expected


def test_the_state_of_the_card_is_read() -> None:
    state = card.read_state("580.159.04, 1980, 2619, 41, 312.20\n")
    assert (state["driver"], state["sm_mhz"], state["watts"]) == ("580.159.04", "1980", "312.20")
    assert card.read_state("No devices were found\n") == {}


def test_nothing_is_measured_without_a_device(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert report.main(["--gpu"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


# --- timing --------------------------------------------------------------------------------------


class _HostEvent:
    """A stand-in for `torch.cuda.Event` that looks at the clock of the host."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _HostEvent) -> float:
        return (end.time - self.time) * 1e3


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", _HostEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(card, "describe", lambda: dict(H100))
    monkeypatch.setattr(card, "state", lambda: {})


@pytest.mark.parametrize(
    ("microseconds", "copies", "steps"),
    [(10, 1, 200), (1_000, 1, 3), (100_000, 1, 1), (10, 16, 192), (1_000, 16, 16)],
)
def test_a_batch_goes_through_all_copies(microseconds: float, copies: int, steps: int) -> None:
    assert clocks.batch_size(microseconds, copies) == steps


def _peer(step: Any) -> Peer:
    return Peer(step, [{"lr": 0.1}], [])


def test_copies_are_stepped_in_turn(no_device: None) -> None:
    order: list[int] = []
    copies = [_peer(lambda i=i: order.append(i)) for i in range(3)]
    clocks.batch_microseconds(copies, 6)
    assert order == [0, 1, 2, 0, 1, 2]


def test_times_are_those_of_one_step(no_device: None) -> None:
    step, host = interleave(
        {"fast": [_peer(lambda: None)], "slow": [_peer(lambda: time.sleep(0.002))]},
        clocks.device_clock,
        seconds=0,
        slow=("slow",),
        least_rounds=5,
    )
    assert [t is None for t in step.microseconds["slow"]] == [False, *[True] * 3, False]
    assert len(host.microseconds["fast"]) == 5
    for timings in (step, host):
        assert timings.time("slow").median > 2_000
        assert timings.time("fast").median < 1_000


# --- a run, and its page -------------------------------------------------------------------------


@pytest.fixture
def small_run(
    no_device: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, dict[str, Any], str]:
    """A whole run on the CPU, over three tensors in the place of every workload."""

    def small(name: str) -> Workload:
        return Workload(name, f"tiny {name}", _TINY.groups)

    seen = activity.Activity(Counter({"update_tiles": 1}), 0, 0)
    monkeypatch.setattr(activity, "of", lambda step: seen)
    monkeypatch.setattr(workloads, "by_name", small)
    monkeypatch.setattr(clocks, "copy_gigabytes_per_second", lambda device: 3000.04)
    monkeypatch.setattr(report, "_free", lambda: None)
    graphs = {"recap_fast, graph replay", "torch fused, graph replay"}
    eager = tuple(name for name in peers.GPU_PEERS if name not in graphs)
    monkeypatch.setattr(plan, "GPU_PEERS", eager)
    monkeypatch.setattr(report, "GPU_PEERS", eager)
    arguments = report._arguments(
        [
            "--out",
            str(tmp_path),
            "--seconds",
            "1",
            "--only",
            "ranker-36M,one-50M-tensor",
            "--algorithms",
            "adam,sgd",
        ]
    )
    results = report.run_on_gpu(arguments, "cpu")
    text = (tmp_path / "nvidia-h100.json").read_text()
    assert json.loads(text) == results
    return len(text.split("\n")), results, (tmp_path / "nvidia-h100.md").read_text()


def test_a_run_measures_every_case(small_run: tuple[int, dict[str, Any], str]) -> None:
    _, results, _ = small_run
    assert results["failed"] == {}
    assert results["copy_gb_per_s"] == 3000.0
    seen = [(m["workload"], m["algorithm"], m["cache"]) for m in results["measurements"]]
    assert seen == [
        (w, a, "warm") for a in ("adam", "sgd") for w in ("ranker-36M", "one-50M-tensor")
    ]
    first = results["measurements"][0]
    assert first["bytes"] == 28 * 12 and first["elements"] == 12
    for which in ("microseconds", "host_microseconds"):
        assert set(_EAGER) | {"copy"} <= first[which].keys()
    assert "apex" in first["skipped"]
    assert results["activity"]["ranker-36M"][GPU_OURS] == [1, 0, 0]


def test_the_page_shows_it(small_run: tuple[int, dict[str, Any], str]) -> None:
    _, results, text = small_run
    assert text == gpu_page.render(results, "nvidia-h100.json")
    assert "# Performance on NVIDIA H100 80GB HBM3" in text
    assert "3,000.0 GB/s" in text and "### one-50M-tensor: tiny one-50M-tensor" in text
    assert "1 launch, 0 met" in text
    assert text.count("| recap_fast, one optimizer |") == 4
    for algorithm in ("Adam", "SGD"):
        assert f"**{algorithm}, warm**" in text


def test_the_page_can_be_written_again(
    small_run: tuple[int, dict[str, Any], str], tmp_path: Path
) -> None:
    page = tmp_path / "nvidia-h100.md"
    page.unlink()
    assert report.main(["--documents-from", str(tmp_path / "nvidia-h100.json")]) == 0
    assert page.read_text() == small_run[2]


def test_a_failure_is_named_and_the_rest_goes_on(
    no_device: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(report, "_free", lambda: None)
    monkeypatch.setattr(clocks, "copy_gigabytes_per_second", lambda device: 1.0)
    monkeypatch.setattr(report, "measure", fail)
    monkeypatch.setattr(report, "count", lambda name, device: {GPU_OURS: [2, 1, 0]})
    results = report.run_on_gpu(
        SimpleNamespace(out=tmp_path, seconds=1.0, only=("scalars",), algorithms=("adam",)), "cpu"
    )
    assert results["failed"] == {"scalars adam warm": "RuntimeError: out of memory"}
    assert results["activity"] == {"scalars": {GPU_OURS: [2, 1, 0]}}
    assert "**scalars adam warm failed**" in (tmp_path / "nvidia-h100.md").read_text()


def _results(ours: float, copy: float) -> dict[str, Any]:
    names = {GPU_OURS: ours, "copy": copy, "torch per group": 11 * ours, "torch fused": ours}
    m = {
        **{
            "workload": "ranker-36M",
            "description": "",
            "groups": 12,
            "tensors": 128,
            "elements": 1,
        },
        **{"algorithm": "adam", "threads": 1, "cache": "cold", "bytes": 10**9},
        **{"skipped": {"apex": "not installed"}},
        "microseconds": {name: [time] * 3 for name, time in names.items()},
        "host_microseconds": {name: [25.0] * 3 for name in names},
    }
    facts = {**H100, "processor": "x", "python": "3.12", "torch": "2.11.0", "date": "2026-01-02"}
    common = {"machine": facts, "state": {}, "copy_gb_per_s": None, "failed": {}}
    return {**common, "measurements": [m], "activity": {"ranker-36M": {GPU_OURS: [2, 0, 0]}}}


def test_what_is_reached_is_said_and_what_is_not() -> None:
    text = gpu_page.render(_results(ours=400.0, copy=380.0), "x.json")
    lines = {line.split("|")[1].strip(): line for line in text.split("\n") if line[:2] == "| "}
    assert "95.0 % (95.0 to 95.0) met" in lines["ranker-36M, Adam: speed over that of a copy"]
    assert "not measured" in lines["one-50M-tensor, Adam: speed over that of a copy"]
    assert "11.0x (11.0 to 11.0) met" in lines["ranker-36M, Adam: speed-up over torch per group"]
    assert (
        "1.00x (1.00 to 1.00) **not met**" in lines["ranker-36M, Adam: speed-up over torch fused"]
    )
    assert "**not met**" in lines["ranker-36M, Adam: launches and copies of a step"]
    assert "25.0 µs (25.0 to 25.0) **not met**" in lines["ranker-36M, Adam: host time of a step"]
    assert "2,500" in lines[GPU_OURS] and "apex: not installed." in text


def test_percent_of_copy() -> None:
    timings = Measurement.from_json(_results(400.0, copy=200.0)["measurements"][0]).timings
    assert percent_of_copy(timings, GPU_OURS) == Quartiles(50.0, 50.0, 50.0)
    assert math.isclose(percent_of_copy(timings, "torch per group").median, 50 / 11)
