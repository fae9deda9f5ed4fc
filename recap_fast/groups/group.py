"""A group of dense parameters, and what groups are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from recap_fast.config import LearningRate

# What the original calls the groups that are no task's.
BACKBONE = "backbone"
SINGLE_TASK = "single_task"
ALL_PARAMS = "ALL_PARAMS"


@dataclass(frozen=True)
class DenseGroup:
    """The parameters that share one dense optimizer and one learning rate.

    Attributes:
        name: Unique among the groups; the task's name for a tower.
        role: What the group is. The name does not tell: a task may be called "backbone".
        params: By name, as in `model.named_parameters()`, and in that order; never empty.
        learning_rate: The group's schedule.
        algorithm: Of `torch_classes.TORCH_CLASSES`, or a `groups.unfused_tables.TableAlgorithm`.
        hyperparameters: Arguments of that class.
        formats: How parameters and states are stored: further arguments of our own classes.
    """

    name: str
    role: Literal["tower", "backbone", "dense_embeddings", "all"]
    params: dict[str, nn.Parameter]
    learning_rate: LearningRate
    algorithm: str = "sgd"
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    formats: Mapping[str, Any] = field(default_factory=dict)


def sanitize(task: str) -> str:
    """Returns the name of the modules that belong to a task; module names have no dots."""
    return task.replace(".", "__")
