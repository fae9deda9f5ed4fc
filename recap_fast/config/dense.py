"""Optimizer and learning rates of the dense parameters."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from recap_fast.config.algorithms import (
    ALGORITHMS,
    AlgorithmSections,
    DenseSection,
    RecapAlgorithmSections,
)
from recap_fast.config.base import BaseConfig, PositiveOrInfinite
from recap_fast.config.groups import GroupConfig, RecapGroupConfig
from recap_fast.config.rates import LearningRate

_Name = Annotated[str, Field(min_length=1)]


class OptimizerConfig(AlgorithmSections):
    """One algorithm and one learning rate for all parameters.

    Attributes:
        learning_rate: The schedule. Without it, the `lr` of the chosen section is used as a
            constant; with it, that `lr` has no effect.
        adam, adamw, ...: The algorithm: exactly one of `AlgorithmSections`.
        groups: What is different about some parameters, by the name of the entry; see
            `GroupOptions`. Without `learning_rate`, an entry with an algorithm has the `lr` of that
            section, which only its own `lr_multiplier` multiplies.
        clip_grad_norm: The greatest global norm of the gradients of all dense groups; the argument
            of `build_optimizer` overrides it. Infinity clips nothing, but skips steps whose norm is
            not finite.
    """

    exactly_one_of = (ALGORITHMS,)

    learning_rate: LearningRate | None = None
    groups: dict[_Name, GroupConfig] = Field(default_factory=dict)
    clip_grad_norm: PositiveOrInfinite | None = None

    @property
    def algorithm(self) -> tuple[str, DenseSection]:
        """The name of the chosen algorithm and its section."""
        (name,) = self._given(ALGORITHMS)
        return name, getattr(self, name)


class MultiTaskLearningRates(BaseConfig):
    """A learning rate per task tower, and one for what the towers share.

    Attributes:
        tower_learning_rates: By task name; their order is that of the param groups.
        backbone_learning_rate: For every dense parameter outside the towers.
    """

    tower_learning_rates: dict[_Name, LearningRate]
    backbone_learning_rate: LearningRate | None = None


class RecapOptimizerConfig(RecapAlgorithmSections):
    """The optimizer of a multi-task ranking model.

    Attributes:
        multi_task_learning_rates: A param group per task tower and one for the backbone.
        single_task_learning_rate: Instead of the above: a single group.
        adam, adamw, ...: The algorithm of all dense groups: exactly one of
            `RecapAlgorithmSections`.
        groups: What is different about some parameters, by the name of the entry; see
            `GroupOptions`.
        clip_grad_norm: The greatest global norm of the gradients of all dense groups; the argument
            of `build_optimizer` overrides it. Infinity clips nothing, but skips steps whose norm is
            not finite.
    """

    exactly_one_of = (
        ("multi_task_learning_rates", "single_task_learning_rate"),
        ALGORITHMS,
    )

    multi_task_learning_rates: MultiTaskLearningRates | None = None
    single_task_learning_rate: LearningRate | None = None
    groups: dict[_Name, RecapGroupConfig] = Field(default_factory=dict)
    clip_grad_norm: PositiveOrInfinite | None = None

    @property
    def algorithm(self) -> tuple[str, DenseSection]:
        """The name of the chosen algorithm and its section."""
        (name,) = self._given(ALGORITHMS)
        return name, getattr(self, name)
