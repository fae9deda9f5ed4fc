"""Tensors of CUDA devices that need not exist, over memory of the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from torch import Tensor


class _Device(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int), ("number", ctypes.c_int))


class _Dtype(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _ManagedTensor(ctypes.Structure):
    """DLManagedTensor of dlpack.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int),
        ("dtype", _Dtype),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


_CUDA, _FLOAT = 2, 2  # of dlpack.h


def lend_to_cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """Takes a contiguous float32 tensor on the CPU for one on ``cuda:number``: the same memory.

    Any torch makes it out of DLPack's description, once it believes to have set up CUDA.
    """
    monkeypatch.setattr(torch.cuda, "_initialized", True)
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype = ctypes.py_object
    new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    alive = []

    def lend(tensor: Tensor, number: int = 0) -> Tensor:
        sizes = (ctypes.c_int64 * tensor.ndim)(*tensor.shape)
        strides = (ctypes.c_int64 * tensor.ndim)(*tensor.stride())
        described = _ManagedTensor(
            tensor.data_ptr(),
            _Device(_CUDA, number),
            tensor.ndim,
            _Dtype(_FLOAT, 32, 1),
            sizes,
            strides,
        )
        alive.extend([tensor, sizes, strides, described])
        capsule = new_capsule(ctypes.addressof(described), b"dltensor", None)
        return torch._C._from_dlpack(capsule)

    return lend
