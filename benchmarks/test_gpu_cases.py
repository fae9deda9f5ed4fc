"""The benchmarks of CUDA devices, as far as they run without one: everything but the timing."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import activity, card, clocks, peers, plan, report, workloads
from benchmarks.interleave import interleave
from benchmarks.peers import Peer
from benchmarks.targets import GPU_OURS
from benchmarks.workloads import Workload

_H100 = {
    "card": "NVIDIA H100 80GB HBM3",
    "capability": "9.0",
    "multiprocessors": 132,
    "card_memory_gb": 85,
    "l2_bytes": 50 * 2**20,
    "cuda": "13.0",
}


def test_cold_copies_are_together_larger_than_the_cache() -> None:
    cases = plan.gpu_cases(plan.GPU_NAMES, tuple(peers.ALGORITHMS), _H100["l2_bytes"])
    for case in cases:
        if case.caches == ("cold",):
            size = peers.working_set(workloads.by_name(case.workload), case.algorithm)
            assert case.copies * size >= 2 * _H100["l2_bytes"]
        else:
            assert case.caches == ("warm",) and case.copies == 1
        slow = {"torch per group", "torch for-loop", "torch foreach"}
        assert set(peers.GPU_PEERS) - set(case.peers) == (slow if case.copies > 1 else set())
    # Large steps are cold anyway, and those of scalars always warm.
    assert [(case.workload, *case.caches) for case in cases if case.algorithm == "adam"] == [
        ("ranker-36M", "cold"),
        *(("mixed-sizes", cache) for cache in ("cold", "warm")),
        ("one-50M-tensor", "cold"),
        *(("many-groups", cache) for cache in ("cold", "warm")),
        *(("scalars", "warm"), ("many-groups-of-scalars", "warm")),
    ]


@pytest.mark.parametrize(("algorithm", "streams"), [("adam", 7), ("adagrad", 5), ("sgd", 3)])
def test_the_copy_moves_the_bytes_of_a_step(algorithm: str, streams: int) -> None:
    workload = Workload("even", "", (((1000,),),))
    peer = peers.build("copy", peers.initial_values(workload), algorithm)
    source = peer.step.__closure__[0].cell_contents
    assert 2 * source.numel() == streams * 1000
    assert torch.equal(peer.step(), source)


# --- activity and card ---------------------------------------------------------------------------


def _event(category: str, name: str) -> dict[str, str]:
    return {"ph": "X", "cat": category, "name": name}


_MARKER = _event("kernel", "at::cuda::(anonymous namespace)::spin_kernel(long)")


def test_kernels_copies_and_sets_are_counted() -> None:
    step = "void recap::cuda::(anonymous namespace)::update_tiles<4096>(...)"
    events = [
        _MARKER,
        _event("cpu_op", "aten::add"),
        _event("cuda_runtime", "cudaLaunchKernel"),
        _event("gpu_user_annotation", "Optimizer.step#FusedAdam.step"),
        *[_event("kernel", step)] * 2,
        _event("kernel", "other"),
        _event("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)"),
        _event("gpu_memset", "Memset (Device)"),
        _MARKER,
        {"ph": "M", "name": "process_name"},
    ]
    found = activity.read({"traceEvents": events})
    assert found == activity.Activity(Counter({step: 2, "other": 1}), copies=1, sets=1)
    assert found.launches == 3


@pytest.mark.parametrize("markers", [0, 1])
def test_a_trace_without_both_markers_proves_nothing(markers: int) -> None:
    with pytest.raises(activity.NothingSeen):
        activity.read({"traceEvents": [_MARKER] * markers})


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
    monkeypatch.setattr(card, "describe", lambda: dict(_H100))
    monkeypatch.setattr(card, "state", lambda: {})


@pytest.mark.parametrize(
    ("microseconds", "copies", "steps"),
    [(10, 1, 200), (1_000, 1, 3), (100_000, 1, 1), (10, 16, 192), (1_000, 16, 16)],
)
def test_a_batch_goes_through_all_copies(
    no_device: None, microseconds: float, copies: int, steps: int
) -> None:
    assert clocks.batch_size(microseconds, copies) == steps
    order: list[int] = []
    stepped = [Peer(lambda i=i: order.append(i), [], []) for i in range(copies)]
    clocks.batch_microseconds(stepped, steps)
    assert order == [*range(copies)] * (steps // copies)


def test_times_are_those_of_one_step(no_device: None) -> None:
    steps = {"fast": lambda: None, "slow": lambda: time.sleep(0.002)}
    built = {name: [Peer(step, [{"lr": 0.1}], [])] for name, step in steps.items()}
    for timings in interleave(
        *(built, clocks.device_clock), seconds=0, slow=("slow",), least_rounds=5
    ):
        assert [t is None for t in timings.microseconds["slow"]] == [False, *[True] * 3, False]
        assert len(timings.microseconds["fast"]) == 5
        assert timings.time("slow").median > 2_000
        assert timings.time("fast").median < 1_000


# --- a run ---------------------------------------------------------------------------------------


@pytest.fixture
def run(no_device: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs on the CPU, over three tensors in the place of every workload."""

    def small(name: str) -> Workload:
        return Workload(name, f"tiny {name}", (((3, 2), (5,)), ((1,),)))

    seen = activity.Activity(Counter({"update_tiles": 1}), 0, 0)
    monkeypatch.setattr(activity, "of", lambda step: seen)
    monkeypatch.setattr(workloads, "by_name", small)
    monkeypatch.setattr(clocks, "copy_gigabytes_per_second", lambda device: 3000.04)
    eager = tuple(name for name in peers.GPU_PEERS if not name.endswith("graph replay"))
    monkeypatch.setattr(plan, "GPU_PEERS", eager)
    monkeypatch.setattr(report, "GPU_PEERS", eager)

    def start(*options: str) -> dict[str, Any]:
        options = ("--out", str(tmp_path), "--seconds", "1", *options)
        return report.run_on_gpu(report._arguments([*options]), "cpu")

    return start


def test_a_run_measures_every_case_and_the_page_shows_it(run: Any, tmp_path: Path) -> None:
    results = run("--only", "ranker-36M,one-50M-tensor", "--algorithms", "adam,sgd")
    path, page = tmp_path / "nvidia-h100.json", tmp_path / "nvidia-h100.md"
    assert json.loads(path.read_text()) == results
    assert results["failed"] == {}
    assert results["copy_gb_per_s"] == 3000.0
    seen = [(m["workload"], m["algorithm"], m["cache"]) for m in results["measurements"]]
    assert seen == [
        (w, a, "warm") for a in ("adam", "sgd") for w in ("ranker-36M", "one-50M-tensor")
    ]
    first = results["measurements"][0]
    assert first["bytes"] == 28 * 12 and first["elements"] == 12
    timed = {GPU_OURS, "torch per group", "torch for-loop", "torch foreach", "torch fused", "copy"}
    for which in ("microseconds", "host_microseconds"):
        assert timed <= first[which].keys()
    assert "apex" in first["skipped"]
    assert results["activity"]["ranker-36M"][GPU_OURS] == [1, 0, 0]

    text = page.read_text()
    assert "# Performance on NVIDIA H100 80GB HBM3" in text
    assert "3,000.0 GB/s" in text and "1 and 0 met" in text
    assert text.count("### ") == 2 and "### one-50M-tensor: tiny one-50M-tensor" in text
    assert text.count("| recap_fast, one optimizer |") == 4
    for algorithm in ("Adam", "SGD"):
        assert f"**{algorithm}, warm**" in text
    page.unlink()
    assert report.main(["--documents-from", str(path)]) == 0
    assert page.read_text() == text


def test_a_failure_is_named_and_the_rest_goes_on(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(report, "measure", fail)
    results = run("--only", "scalars", "--algorithms", "adam")
    assert results["failed"] == {"scalars adam warm": "RuntimeError: out of memory"}
    assert results["activity"]["scalars"][GPU_OURS] == [1, 0, 0]
    assert "**scalars adam warm failed**" in (tmp_path / "nvidia-h100.md").read_text()
