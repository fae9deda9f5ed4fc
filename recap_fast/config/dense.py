"""Optimizer and learning rates of the dense parameters."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from recap_fast.config.base import BaseConfig, Fraction, NonNegative
from recap_fast.config.rates import LearningRate

# One group for the whole model


class AdamConfig(BaseConfig):
    """Adam with torch's argument names."""

    lr: NonNegative
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: NonNegative = 1e-7


class SgdConfig(BaseConfig):
    """SGD with torch's argument names."""

    lr: NonNegative
    momentum: NonNegative = 0.0


class AdagradConfig(BaseConfig):
    """Adagrad with torch's argument names.

    The default `eps` of zero is the original's: an element whose gradients have all been zero then
    becomes NaN (0 / 0). Set it unless every element gets a gradient.
    """

    lr: NonNegative
    eps: NonNegative = 0.0


class OptimizerConfig(BaseConfig):
    """One algorithm and one learning rate for all parameters.

    Attributes:
        learning_rate: The schedule. Without it, the `lr` of the chosen section is used as a
            constant; with it, that `lr` has no effect.
        adam, sgd, adagrad: The algorithm: exactly one of them.
    """

    exactly_one_of = (("adam", "sgd", "adagrad"),)

    learning_rate: LearningRate | None = None
    adam: AdamConfig | None = None
    sgd: SgdConfig | None = None
    adagrad: AdagradConfig | None = None

    @property
    def algorithm(self) -> tuple[str, AdamConfig | SgdConfig | AdagradConfig]:
        """The name of the chosen algorithm and its section."""
        (name,) = self._given(("adam", "sgd", "adagrad"))
        return name, getattr(self, name)


# A group per task


class RecapAdamConfig(BaseConfig):
    """Adam for the dense groups."""

    beta_1: Fraction = 0.9
    beta_2: Fraction = 0.999
    epsilon: NonNegative = 1e-7


class RecapAdagradConfig(BaseConfig):
    """Adagrad for the dense groups."""

    epsilon: NonNegative = 1e-10
    initial_accumulator_value: NonNegative = 0.0


class RecapSgdConfig(BaseConfig):
    """SGD for the dense groups."""

    momentum: NonNegative = 0.0
    nesterov: Annotated[bool, Field(strict=True)] = False

    @model_validator(mode="after")
    def _check_nesterov(self) -> RecapSgdConfig:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum greater than 0")
        return self


class MultiTaskLearningRates(BaseConfig):
    """A learning rate per task tower, and one for what the towers share.

    Attributes:
        tower_learning_rates: By task name, at least one; their order is that of the param groups.
        backbone_learning_rate: For every dense parameter outside the towers.
    """

    tower_learning_rates: Annotated[
        dict[Annotated[str, Field(min_length=1)], LearningRate], Field(min_length=1)
    ]
    backbone_learning_rate: LearningRate | None = None


class RecapOptimizerConfig(BaseConfig):
    """The optimizer of a multi-task ranking model.

    Attributes:
        multi_task_learning_rates: A param group per task tower and one for the backbone.
        single_task_learning_rate: Instead of the above: a single group.
        adam, adagrad, sgd: The algorithm of all dense groups: exactly one of them.
    """

    exactly_one_of = (
        ("multi_task_learning_rates", "single_task_learning_rate"),
        ("adam", "adagrad", "sgd"),
    )

    multi_task_learning_rates: MultiTaskLearningRates | None = None
    single_task_learning_rate: LearningRate | None = None
    adam: RecapAdamConfig | None = None
    adagrad: RecapAdagradConfig | None = None
    sgd: RecapSgdConfig | None = None

    @property
    def algorithm(self) -> tuple[str, RecapAdamConfig | RecapAdagradConfig | RecapSgdConfig]:
        """The name of the chosen algorithm and its section."""
        (name,) = self._given(("adam", "adagrad", "sgd"))
        return name, getattr(self, name)
