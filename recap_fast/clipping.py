"""The global norm of gradients, which may be sharded over processes, and clipping by it."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# As torch.nn.utils.clip_grad_norm_ adds it to the norm.
_EPSILON = 1e-6


def check_max_norm(max_norm: float) -> float:
    """Returns ``max_norm``; raises ValueError unless it is a positive number, infinity included."""
    if isinstance(max_norm, bool) or not isinstance(max_norm, (int, float)) or not max_norm > 0:
        raise ValueError(
            f"clip_grad_norm must be None or a number greater than 0, found {max_norm!r}; math.inf "
            "clips nothing, but skips steps whose gradient norm is not finite"
        )
    return float(max_norm)


def check_norm_is_global(model: nn.Module) -> None:
    """Raises ValueError if a gradient is a shard that does not say so: of an unfused table.

    torchrec's sharded modules hand out the shards of tables that it has not fused as plain tensors;
    taken for replicas, they would give every process another norm.
    """
    for path, module in model.named_modules():
        for table, sharding in (getattr(module, "module_sharding_plan", None) or {}).items():
            if sharding.compute_kernel == "dense" and sharding.sharding_type != "data_parallel":
                raise ValueError(
                    f"clip_grad_norm: {path}.embedding_bags.{table}.weight is sharded "
                    f"{sharding.sharding_type} and not fused, so that its gradient's norm is not "
                    "known to all processes; fuse it (compute_kernel fused) or make it "
                    "data_parallel"
                )


class NormParts:
    """Sorts parameters by the processes that share them, to sum squares of gradients over these.

    What is replicated, as every plain tensor is under DDP, counts once; each process adds the
    squares of its own shard of a DTensor.

    All processes must agree on the parameters, since `total` has them wait for each other, but not
    on which of these have a gradient.

    Args:
        params: those whose gradients make up the norm.
        names: what errors call them; else by their shape.

    Attributes:
        part_of_param: the number of each parameter's part.
        count: the number of parts, at least 1.
        is_local: whether no part is sharded.

    Raises:
        ValueError: a parameter is a DTensor of pending sums (`Partial`).
    """

    def __init__(self, params: Sequence[Tensor], names: Sequence[str] | None = None) -> None:
        numbers: dict[Any, int] = {}
        self._groups: list[list[dist.ProcessGroup]] = []
        self._devices: list[str] = []
        self.part_of_param: list[int] = []
        for index, param in enumerate(params):
            key, groups, device = _sharding(
                param, names[index] if names else f"of shape {tuple(param.shape)}"
            )
            if key not in numbers:
                numbers[key] = len(numbers)
                self._groups.append(groups)
                self._devices.append(device)
            self.part_of_param.append(numbers[key])
        self.count = max(1, len(numbers))
        self.is_local = not any(self._groups)

    def total(self, sums: Sequence[Any]) -> Any:
        """Adds up the sums of squares of all parts over the processes that share each.

        Every process must call it as often as the others.

        Args:
            sums: one per part, of this process: floats, or float64 tensors of shape ().

        Returns:
            The same kind of number, equal on every process.
        """
        total: Any = 0.0
        for number, own in enumerate(sums):
            groups = self._groups[number] if self._groups else []
            if not groups:
                total = total + own
                continue
            is_tensor = isinstance(own, Tensor)
            device = self._devices[number]
            shared = torch.as_tensor(own, dtype=torch.float64, device=device).clone()
            for group in groups:
                dist.all_reduce(shared, group=group)
            total = total + (shared if is_tensor else shared.item())
        return total


def _is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    # Who has one has imported its module, which takes half a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _sharding(param: Tensor, name: str) -> tuple[Any, list[dist.ProcessGroup], str]:
    """What tells parts apart, the groups to sum over, and the device to do it on."""
    if not _is_dtensor(param):
        return None, [], "cpu"
    mesh = param.device_mesh
    dims = []
    for dim, placement in enumerate(param.placements):
        if placement.is_partial():
            raise ValueError(
                f"clip_grad_norm: parameter {name} is a DTensor of pending sums (Partial), each "
                "process with a part of every element; redistribute it"
            )
        if not placement.is_replicate():
            dims.append(dim)
    if not dims:
        return None, [], "cpu"
    return (mesh, tuple(dims)), [mesh.get_group(dim) for dim in dims], mesh.device_type


def clip_grad_norm_(params: Sequence[Tensor], max_norm: float) -> float:
    """Scales gradients, in place, so that their global norm is at most ``max_norm``.

    As `torch.nn.utils.clip_grad_norm_` with the 2-norm, also over DTensors and plain tensors
    together. A norm that is not finite is returned, and the gradients are left alone.

    Returns:
        The norm before clipping, over all processes that share a parameter.
    """
    parts = NormParts(params)
    sums = [0.0] * parts.count
    gradients = []
    for part, param in zip(parts.part_of_param, params, strict=True):
        if param.grad is not None:
            gradients.append(_local(param, param.grad))
            sums[part] += float(gradients[-1].detach().double().square().sum())
    norm = math.sqrt(parts.total(sums))
    factor = max_norm / (norm + _EPSILON)
    if math.isfinite(norm) and factor < 1:
        for gradient in gradients:
            gradient.detach().mul_(factor)
    return norm


def _local(param: Tensor, gradient: Tensor) -> Tensor:
    if _is_dtensor(param) and _is_dtensor(gradient):
        if gradient.placements != param.placements:
            gradient = param.grad = gradient.redistribute(param.device_mesh, param.placements)
        return gradient.to_local()
    return gradient


def clip_on_device(
    norm: Tensor, max_norm: float, grad_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Folds clipping into what `torch.amp.GradScaler` hands to an optimizer, without waiting.

    Args:
        norm: float64, shape (): the global norm of the gradients as they are, that is, scaled; not
            finite if the step must be skipped.
        max_norm: what it shall be at most when they are unscaled.
        grad_scale: as from the scaler; None means 1.

    Returns:
        The scale to divide gradients by, and what is not 0 if the step must be skipped; float32, on
        the device of ``norm``.
    """
    scale = norm.new_ones(()) if grad_scale is None else grad_scale.to(norm).reshape(())
    finite = norm.isfinite()
    factor = (max_norm / (norm / scale + _EPSILON)).clamp(max=1.0)
    return torch.where(finite, scale / factor, 1.0).float(), (~finite).float()
