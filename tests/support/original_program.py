"""A small stand-in for the recap recommender's training program: what it asks of its optimizer.

The program gets a module with `build_optimizer`, hands it a model and the configuration object that
it read from YAML, and runs the training loop. `original` is such a module: torchrec's combined
optimizer of one `torch.optim.Adam` per task and one for the backbone, in plain lines.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import yaml
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torchrec.optim import keyed

from recap_fast.schedules.compute import compute_lr
from tests.support.models import Ranker

TASKS = ("recap.engagement.is_favorited", "recap.engagement.is_replied")
STEPS = 40
FORM = """
optimizer:
  adam: {beta_1: 0.95, beta_2: 0.999, epsilon: 1.0e-07}
  multi_task_learning_rates:
    backbone_learning_rate:
      constant: null
      linear_ramp_to_constant: {learning_rate: 0.01, num_ramp_steps: 10}
      linear_ramp_to_cosine: null
      piecewise_constant: null
    tower_learning_rates:
      recap.engagement.is_favorited:
        constant: null
        linear_ramp_to_constant: {learning_rate: 0.008, num_ramp_steps: 20}
        linear_ramp_to_cosine: null
        piecewise_constant: null
      recap.engagement.is_replied:
        constant: 0.003
        linear_ramp_to_constant: null
        linear_ramp_to_cosine: null
        piecewise_constant: null
"""


class Shim(LRScheduler):
    """A scheduler whose state is all of its attributes, as torch's own are."""

    def __init__(self, optimizer: Any, lr_dict: dict[str, Any], emb_learning_rate: Any) -> None:
        self.optimizer = optimizer
        self.lr_dict = lr_dict
        self.group_names = list(lr_dict)
        self.emb_learning_rate = emb_learning_rate
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        rates = [*self.lr_dict.values(), *[self.emb_learning_rate] * bool(self.emb_learning_rate)]
        return [compute_lr(rate, self.last_epoch) for rate in rates]


def _build_optimizer(model: nn.Module, config: Any, emb_config: None = None) -> tuple[Any, Any]:
    assert emb_config is None
    rates = config.multi_task_learning_rates
    lr_dict = {**rates.tower_learning_rates, "backbone": rates.backbone_learning_rate}
    groups: dict[str, dict[str, nn.Parameter]] = {name: {} for name in lr_dict}
    for name, param in model.named_parameters():
        (group,) = [t for t in TASKS if f".{t.replace('.', '__')}." in name] or ["backbone"]
        groups[group][name] = param

    def adam(params: Any) -> torch.optim.Adam:
        betas = (config.adam.beta_1, config.adam.beta_2)
        return torch.optim.Adam(params, lr=24601.0, betas=betas, eps=config.adam.epsilon)

    wrapped = [keyed.KeyedOptimizerWrapper(params, adam) for params in groups.values()]
    optimizer = keyed.CombinedOptimizer(wrapped)
    return optimizer, Shim(optimizer, lr_dict, None)


original = SimpleNamespace(build_optimizer=_build_optimizer)


class ModelAndLoss(nn.Module):
    """The ranker as the program holds it: below `model`, so that towers are deep in the names."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Ranker(TASKS)
        self.loss_fn = nn.BCEWithLogitsLoss()

    def forward(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        inputs, labels = batch
        return self.loss_fn(self.model(inputs), labels)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """16 examples of 20 features, and a label per task."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(16, 20, generator=generator)
    return inputs, (torch.rand(16, len(TASKS), generator=generator) < 0.3).float()


def read(config_class: type[Any]) -> Any:
    """Returns the program's configuration, with `optimizer` of the given class."""
    fields = yaml.safe_load(FORM)
    return SimpleNamespace(optimizer=config_class(**fields["optimizer"]))


def run(
    optimizer_mod: Any, config_class: type[Any], init_state: bool
) -> tuple[list[float], nn.Module, Any, Any]:
    """Trains as the program does; returns losses, model, optimizer and scheduler.

    Args:
        optimizer_mod: Has `build_optimizer`.
        config_class: Of `optimizer:` in the YAML.
        init_state: Whether the loop makes the optimizer's state first, as the original's does to
            load checkpoints into it.
    """
    config = read(config_class)
    torch.manual_seed(0)
    model = ModelAndLoss()
    optimizer, scheduler = optimizer_mod.build_optimizer(model, config.optimizer, None)
    if init_state and hasattr(optimizer, "init_state"):
        optimizer.init_state()
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(batch(step))
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses, model, optimizer, scheduler
