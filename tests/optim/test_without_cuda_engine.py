"""What a build without the CUDA engine says to those who have a CUDA device."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from recap_fast import build_info
from recap_fast.optim import FusedAdam
from tests.optim.helpers import FUSED, parameters

pytestmark = pytest.mark.skipif(
    "cuda" in build_info()["engines"],
    reason="this build has the CUDA engine; tests/test_cuda_build.py runs these in one without",
)


# --- a tensor of a CUDA device that need not exist -----------------------------------------------


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


@pytest.fixture
def as_if_on_cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tensor], Tensor]:
    """Takes a contiguous float32 tensor on the CPU for one on ``cuda:0``: the same memory.

    Any torch makes it out of DLPack's description, once it believes to have set up CUDA.
    """
    monkeypatch.setattr(torch.cuda, "_initialized", True)
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype = ctypes.py_object
    new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    alive = []

    def move(tensor: Tensor) -> Tensor:
        sizes = (ctypes.c_int64 * tensor.ndim)(*tensor.shape)
        strides = (ctypes.c_int64 * tensor.ndim)(*tensor.stride())
        described = _ManagedTensor(
            tensor.data_ptr(),
            _Device(_CUDA, 0),
            tensor.ndim,
            _Dtype(_FLOAT, 32, 1),
            sizes,
            strides,
        )
        alive.extend([tensor, sizes, strides, described])
        capsule = new_capsule(ctypes.addressof(described), b"dltensor", None)
        return torch._C._from_dlpack(capsule)

    return move


# --- what is said --------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["adam", "sgd"])
def test_a_cuda_tensor_is_refused_by_name(
    algorithm: str, as_if_on_cuda: Callable[[Tensor], Tensor]
) -> None:
    good, memory = parameters(2)
    moved = nn.Parameter(as_if_on_cuda(memory.detach()))
    moved.grad = as_if_on_cuda(memory.grad)
    assert moved.device == moved.grad.device == torch.device("cuda", 0)
    optimizer = FUSED[algorithm]([("good", good), ("moved", moved)], lr=0.1)
    before = good.detach().clone(), memory.detach().clone()
    for _ in range(2):
        with pytest.raises(
            RuntimeError,
            match=r"parameter moved is on cuda:0; this build of recap_fast steps tensors on the "
            r"CPU only, having been built without a CUDA toolkit: move the model, or use recap_fas",
        ):
            optimizer.step()
        assert torch.equal(good, before[0]) and torch.equal(memory, before[1])
        assert not optimizer.state


def test_a_state_on_a_cuda_device_is_refused_by_name(
    as_if_on_cuda: Callable[[Tensor], Tensor],
) -> None:
    params = parameters(2)
    optimizer = FusedAdam([("first", params[0]), ("second", params[1])])
    optimizer.step()
    state = optimizer.state[params[1]]
    state["exp_avg"] = as_if_on_cuda(state["exp_avg"].clone())
    before = [param.detach().clone() for param in params]
    with pytest.raises(RuntimeError, match=r"'exp_avg' of parameter second is .* on cuda:0"):
        optimizer.step()
    for param, old in zip(params, before, strict=True):
        assert torch.equal(param, old)
    assert [optimizer.state[param]["step"].item() for param in params] == [1, 1]


def test_capturable_is_refused() -> None:
    with pytest.raises(ValueError, match=r"capturable=True: .*no CUDA engine; leave it False, or"):
        FusedAdam(parameters(1), capturable=True)
