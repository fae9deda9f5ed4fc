"""What times a step: the host's clock for a CPU, events on the device for a GPU.

A clock takes the copies of a peer, which it may step to get ready, and returns what takes one
sample: the microseconds of a step and, on a GPU, those of the host's part of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final, Literal

import torch

from benchmarks.peers import Peer

Cache = Literal["cold", "warm"]
Clock = Callable[[Sequence[Peer]], Callable[[], tuple[float, ...]]]

_EVICT_BYTES: Final = 96 * 2**20
_WARMING_STEPS: Final = 2
_BATCH_MICROSECONDS: Final = 3_000
_MOST_STEPS: Final = 200
_HOST_STEPS: Final = 3  # per sample; the median of them counts


def _microseconds(peer: Peer) -> float:
    begin = time.perf_counter_ns()
    peer.step()
    return (time.perf_counter_ns() - begin) / 1e3


class HostClock:
    """Times one step on a CPU, cold or warm.

    Cold: gradients are new tensor objects and 96 MB of other memory were touched since the last
    step. Warm: the two steps before were the peer's too; one leaves some of the caches to the peer
    before it. The learning rates were set anew either way.
    """

    def __init__(self, cache: Cache) -> None:
        self._other_memory = torch.zeros(_EVICT_BYTES // 4) if cache == "cold" else None

    def prepare(self, peer: Peer) -> None:
        """Everything between two steps."""
        if self._other_memory is not None:
            peer.renew_gradients()
            peer.set_learning_rates()
            self._other_memory.add_(1.0)  # as a backward pass would touch
        else:
            for _ in range(_WARMING_STEPS):
                peer.restore_gradients()
                peer.step()
            peer.restore_gradients()
            peer.set_learning_rates()

    def time_step(self, peer: Peer) -> float:
        self.prepare(peer)
        return _microseconds(peer)

    def __call__(self, copies: Sequence[Peer]) -> Callable[[], tuple[float, ...]]:
        (peer,) = copies
        return lambda: (self.time_step(peer),)


def batch_microseconds(copies: Sequence[Peer], steps: int) -> float:
    """The time of one step, over `steps` of them that go through the copies in turn.

    By events before and after the batch: the time in which a device that does nothing else gets
    steps done, whether it or the host is the slower.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for number in range(steps):
        copies[number % len(copies)].step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / steps


def _host_microseconds(peer: Peer) -> float:
    """The time that one call of `step` takes while the device has nothing to do.

    As after a backward pass: gradients are new tensor objects, and all learning rates were set.
    """
    peer.renew_gradients()
    peer.set_learning_rates()
    torch.cuda.synchronize()
    return _microseconds(peer)


def batch_size(microseconds: float, copies: int) -> int:
    """How many steps of that time make a batch: whole turns through the copies."""
    steps = min(_MOST_STEPS, _BATCH_MICROSECONDS / microseconds)
    return max(1, round(steps / copies)) * copies


def device_clock(copies: Sequence[Peer]) -> Callable[[], tuple[float, ...]]:
    """Times a batch of steps on a GPU, then the host's part of single ones.

    How cold the caches are is up to the number of copies.
    """
    batch_microseconds(copies, len(copies))
    size = batch_size(batch_microseconds(copies, len(copies)), len(copies))

    def sample() -> tuple[float, float]:
        step = batch_microseconds(copies, size)
        of_host = [_host_microseconds(copies[i % len(copies)]) for i in range(_HOST_STEPS)]
        return step, sorted(of_host)[_HOST_STEPS // 2]

    return sample


def copy_gigabytes_per_second(device: torch.device | str, bytes_moved: int = 2**32) -> float:
    """Of one large copy on the device, counting bytes read and bytes written; the best of ten."""
    source = torch.randn(bytes_moved // 8, device=device)
    target = torch.empty_like(source)
    copy = Peer(lambda: target.copy_(source), [], [])
    batch_microseconds([copy], 3)
    best = min(batch_microseconds([copy], 1) for _ in range(10))
    return bytes_moved / best / 1e3
