"""All that a training consists of at some moment, whatever processes it is spread over."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torchrec.distributed.types import ShardedTensor

from recap_fast.embeddings.fused_optimizer import counts_forward_passes
from recap_fast.keyed import CombinedOptimizer, leaves
from tests.support.sharded_models import local_parts

# What torchrec calls the one state of both kinds of Adagrad.
_STATE_NAMES = {"momentum1": "sum", "momentum_1": "sum"}
_WRAPPERS = ("_dmp_wrapped_module", "module")


@dataclass
class Snapshot:
    """A training at some moment, as one process or, assembled, all of them see it.

    Attributes:
        values: whole tensors of the model and of the optimizer's state, by name; as one process
            sees them, their shape and what it has of them, with its place.
        rates: by parameter, of the param group and of the kernel that updates it.
        step_counts: what counts steps, by parameter.
    """

    values: dict[str, Any] = field(default_factory=dict)
    rates: dict[str, Any] = field(default_factory=dict)
    step_counts: dict[str, int] = field(default_factory=dict)


def take(model: nn.Module, optimizer: CombinedOptimizer) -> Snapshot:
    """Returns what this process sees now; all processes call it."""
    found = Snapshot()
    for name, value in model.state_dict().items():
        found.values[name] = _parts(value)
    names = {param: bare(name) for name, param in optimizer.params.items()}
    for leaf in leaves(optimizer):
        kernel = getattr(leaf, "_emb_module", None)
        for group in leaf.param_groups:
            # Kernels have a float32, and all of them agree on it.
            rate = float(torch.tensor(group["lr"]))
            in_use = rate if kernel is None else kernel.get_learning_rate()
            for param in group["params"]:
                found.rates[names[param]] = (rate, in_use)
                if kernel is not None and counts_forward_passes(kernel):
                    found.step_counts[names[param]] = int(kernel.iter_cpu)
    for name, entries in optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            key = key.rpartition(".")[2]
            if key not in ("step", "iter"):
                found.values[f"{bare(name)}: {_STATE_NAMES.get(key, key)}"] = _parts(value)
            elif not is_table(name):
                found.step_counts[bare(name)] = int(value)
    return found


def bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def is_table(name: str) -> bool:
    return "embedding_bags" in name


def _parts(value: torch.Tensor) -> tuple[tuple[int, ...], list[tuple[torch.Tensor, Any]]]:
    if isinstance(value, DTensor):
        layout = value.shape, value.device_mesh, value.placements
        sizes, begins = compute_local_shape_and_global_offset(*layout)
        place = tuple(slice(begin, begin + size) for begin, size in zip(begins, sizes, strict=True))
        return tuple(value.shape), [(value.to_local().to("cpu", copy=True), place)]
    shape = tuple(value.size() if isinstance(value, ShardedTensor) else value.shape)
    return shape, [(part.to("cpu", copy=True), place) for part, place in local_parts(value)]


def assemble(ranks: list[Snapshot]) -> Snapshot:
    """Returns what all processes see together, who agree on what several of them have."""
    whole = Snapshot()
    for own in ranks:
        for name, (shape, parts) in own.values.items():
            value = whole.values.setdefault(name, torch.full(shape, torch.nan))
            for part, place in parts:
                there = value[place]
                assert there.isnan().all() or torch.equal(there, part), name
                there.copy_(part)
        for name, value in own.rates.items():
            assert whole.rates.setdefault(name, value) == value, name
        for name, value in own.step_counts.items():
            assert whole.step_counts.setdefault(name, value) == value, name
    assert not any(value.isnan().any() for value in whole.values.values())
    return whole


def assemble_moments(ranks: list[list[Snapshot]]) -> list[Snapshot]:
    """Returns what all processes see together at each moment."""
    return [assemble(list(moment)) for moment in zip(*ranks, strict=True)]
