"""The workloads and peers as a pytest-benchmark suite, a table for each workload and algorithm:

    pytest benchmarks --benchmark-enable --benchmark-only [-k "E and adam"]

OMP_NUM_THREADS sets the number of threads. Without --benchmark-enable each case takes one step on a
smaller workload, as a smoke test. pytest-benchmark times one case after another, so a drift of the
machine shows as a difference between peers; `benchmarks.report` interleaves them.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from benchmarks import peers, workloads
from benchmarks.workloads import Workload

_EVICT = torch.zeros(96 * 2**20 // 4)

# A and C take seconds a step with the slow peers, which the report measures.
_PEERS = {
    "A": ("recap_fast", "reference", "torch fused", "DeepSpeed", "ceiling"),
    "C": ("recap_fast", "torch fused", "DeepSpeed", "ceiling"),
}
_CASES = [
    pytest.param(workload, algorithm, peer, id=f"{workload}-{algorithm}-{peer.replace(' ', '_')}")
    for workload in ("A", "B", "C", "D", "E", "F")
    for algorithm in peers.ALGORITHMS
    for peer in _PEERS.get(workload, peers.PEERS)
]


def _smaller(workload: Workload) -> Workload:
    """At most 64 elements in a tensor and 4 tensors in a group."""
    groups = tuple(
        tuple((min(math.prod(shape), 64),) for shape in group[:4]) for group in workload.groups
    )
    return Workload(workload.name, workload.description, groups)


@pytest.mark.parametrize(("workload_name", "algorithm", "peer_name"), _CASES)
def test_cold_step(benchmark: Any, workload_name: str, algorithm: str, peer_name: str) -> None:
    benchmark.group = f"{workload_name}, {algorithm}, cold"
    workload = workloads.by_name(workload_name)
    if not benchmark.enabled:
        workload = _smaller(workload)
    try:
        peer = peers.build(peer_name, peers.initial_values(workload), algorithm)
    except peers.Unavailable as reason:
        pytest.skip(str(reason))
    before = peer.params[0].detach().clone()
    peer.step()

    def cool() -> None:
        peer.renew_gradients()
        peer.set_learning_rates()
        if benchmark.enabled:
            _EVICT.add_(1.0)

    rounds = 5 if workload.elements > 10**7 else 15
    benchmark.pedantic(peer.step, setup=cool, rounds=rounds, iterations=1)
    benchmark.extra_info["megabytes per step"] = peers.bytes_per_step(workload, algorithm) / 1e6
    if peer_name != "ceiling":  # it writes, but next to nothing
        assert not torch.equal(peer.params[0], before)
