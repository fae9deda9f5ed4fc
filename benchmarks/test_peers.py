"""Whether the peers do what they are timed for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import ceiling, peers, workloads
from benchmarks.builders import MAX_NORM
from benchmarks.workloads import Workload

_SMALL = Workload("small", "", (((3, 5), (7,)), ((1,),), ((40_000,), (2, 2, 2))))

_HERE = [*(name for name in peers.PEERS if name != "ceiling"), "torch per group", "apex"]


def _build(name: str, algorithm: str) -> peers.Peer:
    try:
        return peers.build(name, peers.initial_values(_SMALL), algorithm)
    except peers.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("algorithm", peers.ALGORITHMS)
@pytest.mark.parametrize("name", _HERE)
def test_every_peer_takes_the_step_of_the_for_loop(name: str, algorithm: str) -> None:
    peer, oracle = _build(name, algorithm), _build("torch for-loop", algorithm)
    for _ in range(3):
        for stepped in (peer, oracle):
            stepped.renew_gradients()
            stepped.set_learning_rates()
            stepped.step()
    for param, expected in zip(peer.params, oracle.params, strict=True):
        torch.testing.assert_close(param, expected, rtol=1e-6, atol=1e-7)
    rates = [group["lr"] for group in peer.param_groups]
    assert rates == pytest.approx([1e-4, 1e-4 * 4 / 3, 1e-4 * 5 / 3])


@pytest.mark.parametrize("algorithm", peers.ALGORITHMS)
@pytest.mark.parametrize("name", peers.CLIPPING_PEERS)
def test_peers_that_clip_do_so_to_the_same_norm(name: str, algorithm: str) -> None:
    peer, oracle = _build(name, algorithm), _build("torch for-loop", algorithm)
    for _ in range(3):
        peer.renew_gradients()
        oracle.renew_gradients()
        originals = [param.grad for param in oracle.params]
        for param in oracle.params:
            param.grad = param.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(oracle.params, MAX_NORM, foreach=False)
        assert norm > MAX_NORM
        peer.step()
        oracle.step()
        for param, original in zip(oracle.params, originals, strict=True):
            param.grad = original
    for param, expected in zip(peer.params, oracle.params, strict=True):
        torch.testing.assert_close(param, expected, rtol=1e-6, atol=1e-6)


def test_peers_share_no_memory() -> None:
    initial = peers.initial_values(_SMALL)
    names = [name for name in peers.PEERS if name != "DeepSpeed"]  # made like the others
    tensors = [tensor for group in initial for pair in group for tensor in pair]
    for peer in (peers.build(name, initial, "adam") for name in names):
        tensors += peer.params
        tensors += [param.grad for param in peer.params]
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)


def test_overwritten_gradients_are_put_back() -> None:
    originals = [torch.ones(3), torch.ones(2)]
    params = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in originals]

    def step() -> None:
        for param in params:
            param.grad.mul_(1e-3)

    peer = peers.Peer(step, [], params, originals)
    for param, original in zip(params, originals, strict=True):
        param.grad = original.clone()
    for renew in (peer.restore_gradients, peer.renew_gradients):
        peer.step()
        renew()
        assert all(bool((param.grad == 1).all()) for param in params)


@pytest.mark.parametrize(
    ("error", "name", "reason"),
    [
        (RuntimeError("not on this device\nand more"), "torch fused", "^not on this device$"),
        (RuntimeError("not on this device"), "recap_fast, one optimizer", None),
        (ImportError("No module named 'torchrec'"), "recap_fast", "needs torchrec .*'torchrec'"),
        (ImportError("No module named 'numpy'"), "recap_fast, one optimizer", None),
    ],
)
def test_a_peer_that_cannot_step_is_unavailable_but_ours_never_fails_unseen(
    error: Exception, name: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(peers, "BUILDERS", {name: refuse})
    with pytest.raises(peers.Unavailable if reason else type(error), match=reason):
        peers.build_and_step(name, peers.initial_values(_SMALL), "adam")


def test_every_peer_is_described_and_takes_part() -> None:
    assert peers.DESCRIPTIONS.keys() == peers.BUILDERS.keys()
    assert set(peers.SLOW_PEERS) <= peers.BUILDERS.keys()
    listed = peers.PEERS + peers.CLIPPING_PEERS + peers.CLEARING_PEERS + peers.GPU_PEERS
    assert set(listed) == peers.BUILDERS.keys()
    with pytest.raises(peers.Unavailable, match="Adagrad"):  # whatever the device
        peers.build("torch fused, graph replay", peers.initial_values(_SMALL), "adagrad")


@pytest.mark.parametrize("states", [0, 1, 2])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_ceiling_reads_and_writes_every_element(states: int, threads: int) -> None:
    # Of a size that rate * gradient changes even a one.
    grads = [torch.full((size,), 1e6) for size in (1, 70_001, 40_000)]
    params = [torch.ones_like(grad) for grad in grads]
    of_states = [[torch.ones_like(grad) for grad in grads] for _ in range(states)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ceiling.make_step(params, grads, of_states)()
    except ceiling.CannotCompile as reason:
        pytest.skip(str(reason))
    finally:
        torch.set_num_threads(before)
    for tensors in (params, *of_states):
        for tensor in tensors:
            torch.testing.assert_close(tensor, torch.full_like(tensor, 1.001))
    assert all(bool((grad == 1e6).all()) for grad in grads)


@pytest.mark.parametrize(
    ("workload", "groups", "tensors", "elements"),
    [
        (workloads.RANKER_36M, 12, 128, 36_008_619),
        (workloads.MIXED_SIZES, 12, 480, None),
        (workloads.ONE_50M_TENSOR, 1, 1, 50_000_000),
        (workloads.MANY_GROUPS, 100, 400, 409_600),
        (workloads.SCALARS, 12, 480, 480),
        (workloads.MANY_GROUPS_OF_SCALARS, 100, 400, 400),
        (workloads.RANKER_48M, 11, 104, None),
    ],
    ids=lambda value: value.name if isinstance(value, Workload) else None,
)
def test_the_workloads_have_their_sizes(
    workload: Workload, groups: int, tensors: int, elements: int | None
) -> None:
    assert len(workload.groups) == groups
    assert workload.tensors == tensors
    assert elements is None or workload.elements == elements


def test_the_larger_ranker_is_of_48_million_elements() -> None:
    assert workloads.RANKER_48M.elements == pytest.approx(48.1e6, rel=1e-3)


def test_bytes_of_an_element() -> None:
    one = Workload("one", "", (((1,),),))
    assert [peers.bytes_per_step(one, a) for a in peers.ALGORITHMS] == [28, 20, 12]
    assert [peers.working_set(one, a) for a in peers.ALGORITHMS] == [16, 12, 8]
