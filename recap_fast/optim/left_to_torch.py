"""Param groups of a fused optimizer that torch's own step updates, since the native one cannot."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from recap_fast._native import native
from recap_fast.state.formats import STATE_DTYPES, has_formats

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Group = dict[str, Any]


def why_not_native(group: Mapping[str, Any]) -> str | None:
    """What the native step would refuse of a param group, in a few words; None if it is nothing.

    What can be told without building a plan, of options and of parameters that are trained.
    """
    if group.get("differentiable"):
        return "differentiable=True"
    for param in group["params"]:
        is_trained = param.requires_grad or param.grad is not None
        if is_trained and (reason := _refused("parameters", param)) is not None:
            return reason
    if group.get("capturable") and any(not param.is_cuda for param in group["params"]):
        return "capturable=True, but not on CUDA devices"
    return None


def why_gradients_not_native(group: Mapping[str, Any]) -> str | None:
    """The same of the gradients that there are."""
    for param in group["params"]:
        grad = param.grad
        if grad is None:
            continue
        if grad.layout == torch.sparse_coo:
            reason = _sparse_refused(group, param, grad)
        else:
            reason = _refused("gradients", grad)
        if reason is not None:
            return reason
        if grad.dtype != param.dtype and not _are_widened(param, grad):
            return f"{_short(grad.dtype)} gradients of {_short(param.dtype)} parameters"
    return None


def _are_widened(param: Tensor, grad: Tensor) -> bool:
    """Whether the native step takes a gradient of another dtype: both in float32."""
    return {param.dtype, grad.dtype} <= {*STATE_DTYPES}


def why_formats_not_native(group: Mapping[str, Any]) -> str | None:
    """What the native step refuses of a param group that asks for other formats than torch's."""
    if (reason := why_not_native(group)) is not None:
        return reason
    grads = (param.grad for param in group["params"])
    is_any_sparse = any(grad is not None and grad.layout == torch.sparse_coo for grad in grads)
    return "sparse gradients" if is_any_sparse else None


def _sparse_refused(group: Mapping[str, Any], param: Tensor, grad: Tensor) -> str | None:
    """What the native step would refuse of a sparse gradient."""
    if is_traceable_wrapper_subclass(param):
        return f"sparse gradients of {type(param).__name__} parameters"
    if param.device.type != "cpu":
        return f"sparse gradients on {param.device.type}"
    if grad.sparse_dim() != 1 and grad._nnz() > 0:
        return f"sparse gradients of {grad.sparse_dim()} dimensions"
    if not param.is_contiguous():
        return "sparse gradients of parameters that are not contiguous"
    options = [] if group.get("lazy") else ["momentum", "weight_decay", "amsgrad"]
    used = [option for option in options if group.get(option)]
    return f"sparse gradients with {used[0]}" if used else None


def is_native_only(group: Mapping[str, Any]) -> bool:
    """Whether a param group asks for what torch's step knows nothing of."""
    return bool(group.get("lazy")) or has_formats(group)


def _refused(what: str, tensor: Tensor) -> str | None:
    dtensor = sys.modules.get("torch.distributed.tensor")
    is_dtensor = dtensor is not None and isinstance(tensor, dtensor.DTensor)
    if is_traceable_wrapper_subclass(tensor) and not is_dtensor:
        return f"{type(tensor).__name__} {what}"
    if tensor.layout != torch.strided:
        return f"sparse {what}"
    if tensor.dtype not in _DTYPES:
        return f"{_short(tensor.dtype)} {what}"
    kind = tensor.device.type
    if kind != "cpu" and not (kind == "cuda" and native.has_cuda_engine):
        return f"{what} on {kind}, for which this build has no engine"
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class LeftToTorch:
    """Which param groups of one optimizer are left to torch.

    A group is either native or torch's, as a whole: torch's functions take a group at a time. It is
    looked at again whenever a plan is built, since options and tensors may change. But a parameter
    for whose sake a native step was refused stays with torch: an embedding with sparse gradients
    goes on having them.
    """

    def __init__(self) -> None:
        self._reasons: dict[Tensor, str] = {}
        self._said: set[tuple[int, str]] = set()

    def reason(self, group: Group) -> str | None:
        """Why a group is left to torch; None if it is native, or if torch has no such step."""
        if is_native_only(group):
            return None
        for param in group["params"]:
            if param in self._reasons:
                return self._reasons[param]
        if (reason := why_not_native(group)) is not None:
            return reason
        reason = why_gradients_not_native(group)
        return None if reason is None else self.take(group, reason)

    def take(self, group: Group, refused: Exception | str) -> str:
        """Leaves a group to torch for good; returns the reason."""
        for param in group["params"]:
            self._reasons.setdefault(param, str(refused))
        return str(refused)

    def take_back(self, groups: Sequence[Group]) -> None:
        """Undoes `take`."""
        for group in groups:
            for param in group["params"]:
                self._reasons.pop(param, None)

    def forget_others(self, groups: Sequence[Group]) -> None:
        """Keeps no parameter that has left the optimizer alive."""
        present = {id(param) for group in groups for param in group["params"]}
        self._reasons = {param: why for param, why in self._reasons.items() if id(param) in present}

    def is_news(self, index: int, reason: str) -> bool:
        """Whether nobody has asked this before of the group at that position, for that reason."""
        is_news = (index, reason) not in self._said
        self._said.add((index, reason))
        return is_news
