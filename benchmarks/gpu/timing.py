"""Times peers on a CUDA device in turn, so that a drift of its clocks hits all of them alike.

One round times a batch of steps of each peer, in an order drawn anew, by events before and after
it: the time in which a device that does nothing else gets steps done, whether it or the host is the
slower. In the same round the host's part is timed alone: how long a call of `step` takes.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from benchmarks.interleave import Timings
from benchmarks.peers import Peer

_BATCH_MICROSECONDS: Final = 3_000
_MOST_STEPS: Final = 200
_SLOW_STRIDE: Final = 4
_HOST_STEPS: Final = 3  # per round; the median of them counts


def batch_microseconds(copies: Sequence[Peer], steps: int) -> float:
    """The time of one step, over `steps` of them that go through the copies in turn."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for number in range(steps):
        copies[number % len(copies)].step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / steps


def host_microseconds(peer: Peer) -> float:
    """The time that one call of `step` takes while the device has nothing to do.

    As after a backward pass: gradients are new tensor objects, and all learning rates were set.
    """
    peer.renew_gradients()
    peer.set_learning_rates()
    torch.cuda.synchronize()
    begin = time.perf_counter_ns()
    peer.step()
    return (time.perf_counter_ns() - begin) / 1e3


def batch_size(microseconds: float, copies: int) -> int:
    """How many steps of that time make a batch: whole turns through the copies."""
    steps = min(_MOST_STEPS, _BATCH_MICROSECONDS / microseconds)
    return max(1, round(steps / copies)) * copies


@dataclass(frozen=True)
class Times:
    """Of a batch, per step, and of the host's part of a step."""

    step: Timings
    host: Timings


def interleave(
    peers: Mapping[str, Sequence[Peer]],
    *,
    end: float,
    slow: Collection[str] = (),
    min_rounds: int = 3,
    max_rounds: int = 100,
) -> Times:
    """Times steps of `peers` in turn.

    Args:
        peers: what to time, by name: the copies of each.
        end: rounds begin until then, on the clock of `time.monotonic`.
        slow: peers that take part in every fourth round only, to leave time for the others.
        min_rounds, max_rounds: how many rounds there are whatever the time.
    """
    order = random.Random(0)
    names = list(peers)
    sizes = {}
    for name, copies in peers.items():
        batch_microseconds(copies, len(copies))
        sizes[name] = batch_size(batch_microseconds(copies, len(copies)), len(copies))
    step: dict[str, list[float | None]] = {name: [] for name in names}
    host: dict[str, list[float | None]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(max_rounds):
            if number >= min_rounds and time.monotonic() >= end:
                break
            order.shuffle(names)
            for name in names:
                if name in slow and number % _SLOW_STRIDE != 0:
                    step[name].append(None)
                    host[name].append(None)
                    continue
                copies = peers[name]
                step[name].append(batch_microseconds(copies, sizes[name]))
                times = [host_microseconds(copies[i % len(copies)]) for i in range(_HOST_STEPS)]
                host[name].append(sorted(times)[_HOST_STEPS // 2])
    finally:
        if collecting:
            gc.enable()
    return Times(Timings(step), Timings(host))


def copy_gigabytes_per_second(device: torch.device | str, bytes_moved: int = 2**32) -> float:
    """Of one large copy on the device, counting bytes read and bytes written; the best of ten."""
    source = torch.randn(bytes_moved // 8, device=device)
    target = torch.empty_like(source)
    copy = Peer(lambda: target.copy_(source), [], [])
    batch_microseconds([copy], 3)
    best = min(batch_microseconds([copy], 1) for _ in range(10))
    return bytes_moved / best / 1e3
