"""The workloads and peers as a pytest-benchmark suite, a table for each workload and algorithm:

    make bench-suite [SUITE='-k "scalars and adam"']

OMP_NUM_THREADS sets the number of threads. Without --benchmark-enable each case takes one step on a
smaller workload, as a smoke test. pytest-benchmark times one case after another, so a drift of the
machine shows as a difference between peers; `benchmarks.report` interleaves them.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch

from benchmarks import peers, workloads
from benchmarks.plan import LARGE_PEERS
from benchmarks.workloads import Workload

_EVICT = torch.zeros(96 * 2**20 // 4)

# These take long with the other peers, which the report measures.
_PEERS = {
    "ranker-36M": ("recap_fast", "reference", "torch fused", "DeepSpeed", "ceiling"),
    "one-50M-tensor": LARGE_PEERS,
    "ranker-48M": ("recap_fast", "reference", "torch fused", "DeepSpeed", "ceiling"),
}
_CASES = [
    pytest.param(
        *(workload, algorithm, cache, peer),
        id=f"{workload}-{algorithm}-{cache}-{peer.replace(' ', '_')}",
    )
    for workload in workloads.NAMES
    for algorithm in peers.ALGORITHMS
    for cache in ("cold", "warm")
    for peer in _PEERS.get(workload, peers.PEERS)
]


def _smaller(workload: Workload) -> Workload:
    """At most 64 elements in a tensor and 4 tensors in a group."""
    groups = tuple(
        tuple((min(math.prod(shape), 64),) for shape in group[:4]) for group in workload.groups
    )
    return Workload(workload.name, workload.description, groups)


@functools.cache
def _workload(name: str) -> Workload:
    return workloads.by_name(name)


@pytest.mark.parametrize(("workload_name", "algorithm", "cache", "peer_name"), _CASES)
def test_step(
    benchmark: Any, workload_name: str, algorithm: str, cache: str, peer_name: str
) -> None:
    benchmark.group = f"{workload_name}, {algorithm}, {cache}"
    try:
        workload = _workload(workload_name)
    except ImportError as reason:
        pytest.skip(f"the demo needs a package that is not installed: {reason}")
    if not benchmark.enabled:
        workload = _smaller(workload)
    try:
        peer = peers.build(peer_name, peers.initial_values(workload), algorithm)
    except peers.Unavailable as reason:
        pytest.skip(str(reason))
    before = peer.params[0].detach().clone()
    peer.step()

    def set_up() -> None:
        if cache == "cold":
            peer.renew_gradients()
            if benchmark.enabled:
                _EVICT.add_(1.0)
        else:
            peer.restore_gradients()
        peer.set_learning_rates()

    rounds = 5 if workload.elements > 10**7 else 15
    warm_up = 1 if cache == "warm" else 0
    benchmark.pedantic(peer.step, setup=set_up, rounds=rounds, warmup_rounds=warm_up)
    benchmark.extra_info["megabytes per step"] = peers.bytes_per_step(workload, algorithm) / 1e6
    if peer_name != "ceiling":  # it writes, but next to nothing
        assert not torch.equal(peer.params[0], before)
