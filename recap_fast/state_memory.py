"""Where in memory new optimizer state goes, so that a step on the CPU reads it fast."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable

import torch
from torch import Tensor

_SMALL = 64 * 1024  # bytes, up to which states share a block
_BLOCK = 1024 * 1024  # bytes
_CACHE_LINE = 64
_PAGE = 4096
_HUGE_PAGE = 2 * 1024 * 1024


@functools.cache
def _madvise() -> Callable[..., int] | None:
    """The system's call, or None where it has no huge pages to be advised of."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    call = ctypes.CDLL(None).madvise
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return call


def _ask_for_huge_pages(block: Tensor) -> None:
    """Before the first write: a page of 4 KB for every 1,024 floats is slower to walk through.

    What the system does not grant, it does not: the memory is the same.
    """
    first = -(-block.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    end = (block.data_ptr() + block.numel()) // _HUGE_PAGE * _HUGE_PAGE
    madvise = _madvise()
    if madvise is not None and first < end:
        madvise(first, end - first, mmap.MADV_HUGEPAGE)


def _is_plain(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and tensor.numel() > 0
    )


class StateMemory:
    """Allocates state tensors that are laid out like their parameters.

    On the CPU, small states of one name lie one after the other in shared blocks, where allocations
    of their own would spread them over pages and cache lines that hold nothing else. Larger ones
    have storage of their own, and begin at another offset into a page than the parameter and its
    other states: addresses that agree in their last 12 bits compete for the same few places in the
    first-level cache. Of these, the system is asked for huge pages, as far as they fill whole ones.
    """

    def __init__(self) -> None:
        self._blocks: dict[tuple[int, torch.dtype], tuple[Tensor, int]] = {}

    def empty_like(self, param: Tensor, index: int) -> Tensor:
        """Returns an uninitialised tensor of the shape, dtype, device and strides of ``param``.

        Args:
            param: a dense one; if it has gaps in memory, the strides are those torch would choose.
            index: which of the parameter's states it is.
        """
        if not _is_plain(param):
            return torch.empty_like(param, memory_format=torch.preserve_format)
        bytes_needed = param.numel() * param.element_size()
        if bytes_needed <= _SMALL:
            block, begin = self._room(index, param.dtype, bytes_needed)
        else:
            block = torch.empty(bytes_needed + _PAGE, dtype=torch.uint8)
            _ask_for_huge_pages(block)
            wanted = (param.data_ptr() + (index + 1) * _PAGE // 4) % _PAGE
            begin = (wanted - block.data_ptr()) % _PAGE // _CACHE_LINE * _CACHE_LINE
        strides = torch.empty_like(
            param, device="meta", memory_format=torch.preserve_format
        ).stride()
        storage, offset = block.untyped_storage(), begin // param.element_size()
        with torch.no_grad():
            return torch.empty(0, dtype=param.dtype).set_(storage, offset, param.shape, strides)

    def _room(self, index: int, dtype: torch.dtype, size: int) -> tuple[Tensor, int]:
        """A block with room for `size` bytes, and where in it they begin."""
        block, used = self._blocks.get((index, dtype), (None, 0))
        if block is None or used + size > block.numel():
            block, used = torch.empty(_BLOCK, dtype=torch.uint8), 0
        end = used + -(-size // _CACHE_LINE) * _CACHE_LINE
        self._blocks[index, dtype] = block, end
        return block, used

    def full_like(self, param: Tensor, value: float, index: int) -> Tensor:
        """As `empty_like`, filled with ``value``."""
        return self.empty_like(param, index).fill_(value)

    def adopt(self, state: dict[str, Tensor]) -> None:
        """Replaces the plain CPU tensors of a parameter's state by copies in here."""
        names = [name for name, value in state.items() if _is_plain(value)]
        for index, name in enumerate(names):
            state[name] = self.empty_like(state[name], index).copy_(state[name])
