"""Trainings so small that a checkpoint takes milliseconds, and all that they consist of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from recap_fast import build_optimizer
from recap_fast.config import OptimizerConfig
from recap_fast.embeddings import fuse_embeddings
from tests.support.models import EmbeddingRanker, features, multi_task_config
from tests.support.processes import device
from tests.support.tables import config_of


class Small(nn.Module):
    """Two layers, and buffers of two dtypes."""

    def __init__(self, seed: int = 0, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(3, width)
        self.norm = nn.BatchNorm1d(width)
        self.last = nn.Linear(width, 1)


def random_gradients(model: nn.Module, step: int) -> None:
    """Gives each trainable parameter the gradient of a step."""
    generator = torch.Generator().manual_seed(step)
    for param in model.parameters():
        if param.requires_grad:
            param.grad = torch.randn(param.shape, generator=generator).to(param)


def gradients_of_features(model: nn.Module, step: int) -> None:
    """A backward pass of a model with tables."""
    model(features(step)).square().sum().backward()


@dataclass
class Training:
    """A model with what trains it."""

    model: nn.Module
    optimizer: Any
    scheduler: Any = None
    backward: Callable[[nn.Module, int], None] = random_gradients
    step: int = field(default=0)

    def train(self, steps: int) -> Training:
        for _ in range(steps):
            self.backward(self.model, self.step)
            self.optimizer.step()
            # Not after the scheduler: it would pass the rates on to the tables' kernels.
            self.optimizer.zero_grad()
            if self.scheduler is not None:
                self.scheduler.step()
            self.step += 1
        return self

    @property
    def all(self) -> tuple[nn.Module, Any, Any]:
        """What `save` and `load` take."""
        return self.model, self.optimizer, self.scheduler

    def contents(self) -> dict[str, Any]:
        """All that training has changed, to be compared bit by bit with ``==``."""
        names = {id(param): name for name, param in self.model.named_parameters()}
        names |= {id(p): name for name, p in getattr(self.optimizer, "params", {}).items()}
        found = {f"model.{name}": bits(value) for name, value in self.model.state_dict().items()}
        for param, state in self.optimizer.state.items():
            for name, value in state.items():
                found[f"state.{names[id(param)]}.{name}"] = bits(value)
        for index, group in enumerate(self.optimizer.param_groups):
            for name, value in group.items():
                if name != "params":
                    found[f"group.{index}.{name}"] = bits(value)
        if self.scheduler is not None:
            found["scheduler"] = self.scheduler.state_dict()
        return found


def bits(value: Any) -> Any:
    """A tensor as dtype, shape and bytes; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    flat = value.detach().contiguous().reshape(-1)
    return value.dtype, tuple(value.shape), flat.view(torch.uint8).cpu().numpy().tobytes()


def built(model: nn.Module, **algorithm: Any) -> Training:
    """With a rate that ramps up; Adam unless `algorithm` says otherwise."""
    ramp = {"linear_ramp_to_constant": {"learning_rate": 0.1, "num_ramp_steps": 7}}
    config = OptimizerConfig.model_validate(
        {"learning_rate": ramp, **(algorithm or {"adam": {"lr": 0.1}})}
    )
    return Training(model, *build_optimizer(model, config))


def small(seed: int = 0, width: int = 4, **algorithm: Any) -> Training:
    """A `Small`, `built`; on the GPU of a rank that has one."""
    return built(Small(seed, width).to(device()), **algorithm)


def with_tables(seed: int = 0, fused: bool = True, **options: Any) -> Training:
    """An `EmbeddingRanker`; options of its tables go to the configuration."""
    torch.manual_seed(seed)
    config = config_of(**(options or {"rowwise_adagrad": {}}))
    model = fuse_embeddings(EmbeddingRanker(), config) if fused else EmbeddingRanker()
    built = build_optimizer(model, multi_task_config(), config)
    return Training(model, *built, backward=gradients_of_features)
