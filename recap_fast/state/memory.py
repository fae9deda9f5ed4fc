"""Where in memory new optimizer state goes, so that a step on the CPU reads it fast."""

from __future__ import annotations

import itertools
import mmap
import sys
import threading
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from recap_fast._C import StateBlock

_SMALL = 64 * 1024  # bytes, up to which states share a block
_FIRST_BLOCK = 4 * 1024  # bytes; each block is twice as large as the one before
_LAST_BLOCK = 1024 * 1024
_MOST_ADOPTED = 16 * 1024 * 1024  # bytes
_OWN_REFERENCES = 3  # at most, to a tensor: of its dict, a variable and the call that counts them
_CACHE_LINE = 64
_PAGE = 4096
_HUGE_PAGE = 2 * 1024 * 1024

Shares = Mapping[Tensor, tuple[float, float]]

_Blocks = dict[int | str, tuple["StateBlock", int]]
"""The last of each kind, and where its free room begins."""


def _native() -> Any:
    """The extension; None where it is not built, for then nothing steps natively."""
    try:
        from recap_fast._native import native  # late: the reference runs without it
    except ImportError:
        return None
    return native


def _large_block(size: int) -> mmap.mmap:
    """Zeroed memory, of which the system is asked to make huge pages.

    A page of 4 KB for every 1,024 floats is slower to walk through. What the system does not grant,
    it does not: the memory is the same.
    """
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = _address(block)
    first = -(-address // _HUGE_PAGE) * _HUGE_PAGE - address
    end = (address + size) // _HUGE_PAGE * _HUGE_PAGE - address
    if hasattr(mmap, "MADV_HUGEPAGE") and first < end:
        block.madvise(mmap.MADV_HUGEPAGE, first, end - first)
    return block


def _address(block: mmap.mmap) -> int:
    return torch.frombuffer(block, dtype=torch.uint8).data_ptr()


def _dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """Its own strides; if it has gaps in memory, those torch would choose."""
    if tensor.is_contiguous():
        return tensor.stride()
    return torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format).stride()


def _is_plain(tensor: object) -> TypeGuard[Tensor]:
    return (
        isinstance(tensor, Tensor)
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and tensor.numel() > 0
    )


class _BlocksOfThread(threading.local):
    """For what many optimizers place, one after the other."""

    def __init__(self) -> None:
        self.blocks: _Blocks = {}


_blocks_of_thread = _BlocksOfThread()


class StateMemory:
    """Allocates state tensors that are laid out like their parameters.

    On the CPU, small states of one name lie one after the other in blocks, where allocations of
    their own would spread them over pages and cache lines that hold nothing else; step counts too.
    Larger ones, and those blocks, begin at other offsets into a page than a parameter's other
    states: addresses that agree in their last 12 bits compete for the same few places in the
    first-level cache. For large states, the system is asked for huge pages, as far as they fill
    whole ones. Where memory has several nodes, a page of theirs is at that of the thread that steps
    it, if ``shares`` says which: that of who writes to it first.

    Each tensor has a storage of its own, of just its size, so that saving or sharing it concerns no
    other. Such a storage cannot be resized. A block is freed with the last tensor in it; its memory
    is zeroed first, so that nothing else of the process is ever in a state.

    Without the extension, states are where torch puts them.

    Args:
        goes_on: where this thread last did so. A model may have an optimizer for each param group,
            which places its state by itself; a step over all of them reads blocks that are full,
            and few. The last of each kind, of at most 1 MB, is kept for the next optimizer.
        shares: for each parameter, which part of a step it has a part in, see `shares_of`.
    """

    def __init__(self, *, goes_on: bool = False, shares: Shares | None = None) -> None:
        self._shares: Shares = shares or {}
        self._native = _native()
        self._blocks: _Blocks = _blocks_of_thread.blocks if goes_on else {}
        self._adopted = 0  # bytes

    def empty_like(self, param: Tensor, index: int, dtype: torch.dtype | None = None) -> Tensor:
        """Returns a tensor of the shape, device and strides of ``param``, to be filled.

        Args:
            param: a dense one; if it has gaps in memory, the strides are those torch would choose.
            index: which of the parameter's states it is.
            dtype: None: that of ``param``.
        """
        return self._allocated_like(param, index, dtype)[0]

    def _allocated_like(
        self, param: Tensor, index: int, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, bool]:
        """And whether it is fresh memory, of zeros, of which no page is there yet."""
        dtype = dtype or param.dtype
        if not _is_plain(param) or self._native is None:
            like = torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format)
            return like, False
        size = param.numel() * dtype.itemsize
        begin_in_page = (index + 1) * _PAGE // 4
        if size <= _SMALL:
            alignment = _CACHE_LINE if size > 32 else 32 if size > 16 else 16
            block, begin = self._room(index, size, alignment, begin_in_page)
            return block.tensor(begin, param.shape, _dense_strides(param), dtype), False
        own = _large_block(size + _PAGE)
        wanted = (param.data_ptr() + begin_in_page) % _PAGE
        begin = (wanted - _address(own)) % _PAGE // _CACHE_LINE * _CACHE_LINE
        state = torch.frombuffer(own, dtype=dtype, count=param.numel(), offset=begin)
        return state.as_strided_(param.shape, _dense_strides(param)), True

    def full_like(
        self, param: Tensor, value: float, index: int, dtype: torch.dtype | None = None
    ) -> Tensor:
        """As `empty_like`, filled with ``value``."""
        state, is_fresh = self._allocated_like(param, index, dtype)
        touched = is_fresh and self._touch(param, state)
        return state if touched and value == 0 else state.fill_(value)

    def _touch(self, param: Tensor, state: Tensor) -> bool:
        """Has the pages of fresh memory be where ``param`` is stepped; whether that is known.

        By writing to each: a page that is read first is another one, which all share until then,
        and huge ones do not survive that.
        """
        share = self._shares.get(param)
        if share is None or self._native is None:
            return False
        self._native.touch_pages(state, *share)
        return True

    def step_count(self, count: float, dtype: torch.dtype) -> Tensor:
        """Returns a step count: a 0-dim tensor on the CPU."""
        if self._native is None:
            return torch.full((), count, dtype=dtype, device="cpu")
        block, begin = self._room("step", dtype.itemsize, dtype.itemsize)
        return block.tensor(begin, (), (), dtype).fill_(count)

    def _room(
        self, kind: int | str, size: int, alignment: int, begin: int = 0
    ) -> tuple[StateBlock, int]:
        """A block for tensors of a kind with room for `size` bytes, and where in it they are.

        The first tensor of a block is `begin` bytes into a page.
        """
        block, end = self._blocks.get(kind, (None, 0))
        if block is None:  # many optimizers have but one parameter
            block = self._native.StateBlock(size + alignment)
        used = end + -(block.address + end) % alignment
        if used + size > block.size:
            grown = min(max(2 * block.size, _FIRST_BLOCK), _LAST_BLOCK)
            block = self._native.StateBlock(max(grown, size) + _PAGE)
            used = (begin - block.address) % _PAGE
        self._blocks[kind] = block, used + size
        return block, used

    def adopt(self, param: Tensor, state: dict[str, Any]) -> None:
        """Replaces small plain CPU tensors in ``state``, that of ``param``, by copies in here.

        Small ones up to some megabytes in all: whoever loads a state still holds it, and large
        copies would need the memory twice; see `adopt_large`. The step count of a parameter on the
        CPU becomes a copy, wherever it was.
        """
        on_cpu = param.device.type == "cpu"
        for index, name in enumerate(_plain_names(state)):
            value = state[name]
            size = value.numel() * value.element_size()
            if size <= _SMALL and self._adopted + size <= _MOST_ADOPTED:
                self._adopted += size
                state[name] = self.empty_like(value, index).copy_(value)
        step = state.get("step")
        if on_cpu and isinstance(step, Tensor) and step.numel() == 1:
            state["step"] = self.step_count(step.item(), step.dtype)

    def adopt_large(self, param: Tensor, state: dict[str, Any]) -> None:
        """Replaces large plain CPU tensors in ``state``, that of ``param``, by copies in here.

        Those that nobody else holds, one after the other: the memory of one is free again before
        the next is copied.
        """
        for index, name in enumerate(_plain_names(state)):
            value = state[name]
            size = value.numel() * value.element_size()
            if size > _SMALL and sys.getrefcount(value) <= _OWN_REFERENCES:
                copy, is_fresh = self._allocated_like(value, index)
                if is_fresh:
                    self._touch(param, copy)
                state[name] = copy.copy_(value)


def shares_of(params: Iterable[Tensor]) -> Shares:
    """Which part of a step each parameter has a part in: a step shares bytes out among threads.

    Args:
        params: in the order of the step.

    Returns:
        By parameter, where its part begins and ends, from 0 to 1; those on the CPU alone.
    """
    sizes = {p: p.numel() * p.element_size() for p in params if _is_plain(p)}
    ends = list(itertools.accumulate(sizes.values()))
    return {
        param: ((end - size) / ends[-1], end / ends[-1])
        for (param, size), end in zip(sizes.items(), ends, strict=True)
    }


def _plain_names(state: dict[str, Any]) -> list[str]:
    return [name for name, value in state.items() if name != "step" and _is_plain(value)]
