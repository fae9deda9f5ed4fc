"""What a run on a CPU measures, as a pytest-benchmark suite: a table for each workload, algorithm
and state of the caches:

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

from benchmarks import peers, plan, workloads
from benchmarks.clocks import Cache, HostClock
from benchmarks.workloads import Workload

_CASES = [
    pytest.param(
        *(case, cache, peer),
        id=f"{case.workload}-{case.algorithm}-{cache}-{peer.replace(' ', '_')}",
    )
    for case in plan.CASES
    for cache in case.caches
    for peer in case.peers
]
_workload = functools.cache(workloads.by_name)
_clock = functools.cache(HostClock)


def _smaller(workload: Workload) -> Workload:
    """At most 64 elements in a tensor and 4 tensors in a group."""
    groups = tuple(
        tuple((min(math.prod(shape), 64),) for shape in group[:4]) for group in workload.groups
    )
    return Workload(workload.name, workload.description, groups)


@pytest.mark.parametrize(("case", "cache", "peer_name"), _CASES)
def test_step(benchmark: Any, case: plan.Case, cache: Cache, peer_name: str) -> None:
    benchmark.group = f"{case.workload}, {case.algorithm}, {cache}"
    try:
        workload = _workload(case.workload)
    except ImportError as reason:
        pytest.skip(f"the demo needs a package that is not installed: {reason}")
    if not benchmark.enabled:
        workload = _smaller(workload)
    try:
        peer = peers.build_and_step(peer_name, peers.initial_values(workload), case.algorithm)
    except peers.Unavailable as reason:
        pytest.skip(str(reason))
    before = peer.params[0].detach().clone()
    prepare = functools.partial(_clock(cache).prepare, peer)
    rounds = 5 if workload.elements > 10**7 else 15
    benchmark.pedantic(peer.step, setup=prepare, rounds=rounds)
    moved = peers.bytes_per_step(workload, case.algorithm)
    benchmark.extra_info["megabytes per step"] = moved / 1e6
    if peer_name != "ceiling":  # it writes, but next to nothing
        assert not torch.equal(peer.params[0], before)
