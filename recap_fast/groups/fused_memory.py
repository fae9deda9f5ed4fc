"""Which tensors show the memory of fused tables."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


def memory_of(tensors: Iterable[Any]) -> Callable[[Any], bool]:
    """Returns what tells whether a tensor shares memory with one of these.

    A fused table is shown as several tensors: the tables of a kernel are views of one, which is a
    parameter of FBGEMM's module, and torchrec's modules have views of them for parameters. Sharded
    tensors, and such without memory, share none.
    """
    ranges: dict[torch.device, list[tuple[int, int]]] = {}
    for tensor in tensors:
        if found := memory_range(tensor):
            ranges.setdefault(tensor.device, []).append(found)
    starts, ends = {}, {}
    for device, own in ranges.items():
        own.sort()
        starts[device] = [start for start, _ in own]
        ends[device] = list(itertools.accumulate((end for _, end in own), max))

    def shares(tensor: Any) -> bool:
        found = memory_range(tensor)
        if found is None or tensor.device not in starts:
            return False
        before = bisect.bisect_left(starts[tensor.device], found[1])
        return before > 0 and ends[tensor.device][before - 1] > found[0]

    return shares


def memory_range(tensor: Any) -> tuple[int, int] | None:
    """Returns the first address of a tensor and the one after its last; None if it has none."""
    if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.layout != torch.strided:
        return None
    if tensor.is_meta or tensor.numel() == 0:
        return None
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    elements = sum((size - 1) * stride for size, stride in steps) + 1
    return tensor.data_ptr(), tensor.data_ptr() + elements * tensor.element_size()
