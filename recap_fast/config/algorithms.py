"""Sections of the algorithms that train dense parameters.

Those of a whole model (`AdamConfig`, ...) have torch's names, those of the recap recommender
(`RecapAdamConfig`, ...) its own; each takes the other spelling too (see `BaseConfig`). Both have
all that the classes of `torch.optim` have, with the same meaning.
"""

from __future__ import annotations

from typing import Any, Final

from pydantic import model_validator

from recap_fast.config.base import BaseConfig, Flag, Fraction, NonNegative, Seed, StateDtype

__all__ = [
    "AdagradConfig",
    "AdamConfig",
    "AdamWConfig",
    "LionConfig",
    "RecapAdagradConfig",
    "RecapAdamConfig",
    "RecapAdamWConfig",
    "RecapLionConfig",
    "RecapRmspropConfig",
    "RecapSgdConfig",
    "RmspropConfig",
    "SgdConfig",
]


_FORMATS: Final = ("state_dtype", "master_weights", "stochastic_rounding", "rounding_seed")


class DenseSection(BaseConfig):
    """What every section has.

    Attributes:
        weight_decay: Added to the gradient, in proportion to the parameter (an L2 penalty).
        maximize: Ascend instead of descend.
        state_dtype: How moments and momenta are stored: `float32`, `bfloat16` or `float16`, or that
            `torch.dtype`, or `8bit`. None: as the parameter.
        master_weights: 16-bit parameters are updated in float32.
        stochastic_rounding: 16-bit parameters are rounded up or down by chance; not with
            `master_weights`.
        rounding_seed: Of these chances, and those of 16-bit states. This and the three above are
            those of `recap_fast.optim.FusedAdam`.
    """

    weight_decay: NonNegative = 0.0
    maximize: Flag = False
    state_dtype: StateDtype | None = None
    master_weights: Flag = False
    stochastic_rounding: Flag = False
    rounding_seed: Seed = 0

    @model_validator(mode="after")
    def _check_formats(self) -> DenseSection:
        if self.master_weights and self.stochastic_rounding:
            raise ValueError(
                "set at most one of master_weights, stochastic_rounding; a parameter with a master "
                "is rounded to nearest"
            )
        return self

    @property
    def formats(self) -> dict[str, Any]:
        """How parameters and states are stored, of what is not torch's way."""
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        given = {name: getattr(self, name) for name in _FORMATS}
        return {name: value for name, value in given.items() if value != defaults[name]}

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The fields, but for `lr` and `formats`, as arguments of the `torch.optim` class."""
        fields = self.model_dump(exclude={"lr", *_FORMATS})
        if "beta_1" in fields:
            fields["betas"] = (fields.pop("beta_1"), fields.pop("beta_2"))
        if "epsilon" in fields:
            fields["eps"] = fields.pop("epsilon")
        return fields


class _Sgd(DenseSection):
    momentum: NonNegative = 0.0
    dampening: NonNegative = 0.0
    nesterov: Flag = False

    @model_validator(mode="after")
    def _check_nesterov(self) -> _Sgd:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum greater than 0")
        if self.nesterov and self.dampening != 0:
            raise ValueError("nesterov needs a dampening of 0")
        return self


class _Rmsprop(DenseSection):
    alpha: Fraction = 0.99
    momentum: NonNegative = 0.0
    centered: Flag = False


# For all parameters alike


# Not derived from one another: pydantic would take AdamWConfig for a field of AdamConfig, and
# decay that was to be decoupled would be an L2 penalty.
class _Adam(DenseSection):
    lr: NonNegative
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: NonNegative = 1e-7
    amsgrad: Flag = False


class AdamConfig(_Adam):
    """Adam.

    Attributes:
        lr: The constant rate, where there is no schedule.
        betas: Decay of the averages of the gradient and of its square.
        eps: Added to the denominator.
        amsgrad: Divide by the greatest second moment so far.
    """


class AdamWConfig(_Adam):
    """Adam with decoupled weight decay: the parameter shrinks by `lr * weight_decay` of itself.

    Attributes:
        lr, betas, eps, amsgrad: As in `AdamConfig`.
        weight_decay: Its strength; the default is torch's.
    """

    weight_decay: NonNegative = 1e-2


class SgdConfig(_Sgd):
    """SGD.

    Attributes:
        lr: The constant rate, where there is no schedule.
        momentum: Decay of the momentum buffer; 0 keeps none.
        dampening: A gradient enters the buffer by 1 - dampening, the first one whole.
        nesterov: Look ahead by the momentum; needs one, and no dampening.
    """

    lr: NonNegative


class AdagradConfig(DenseSection):
    """Adagrad.

    The default `eps` of zero is the original's: an element whose gradients have all been zero then
    becomes NaN (0 / 0). Set it unless every element gets a gradient.

    Attributes:
        lr: The constant rate, where there is no schedule.
        lr_decay: The rate of step t is divided by 1 + (t - 1) * lr_decay.
        eps: Added to the denominator.
        initial_accumulator_value: What the sum of squared gradients starts from.
    """

    lr: NonNegative
    lr_decay: NonNegative = 0.0
    eps: NonNegative = 0.0
    initial_accumulator_value: NonNegative = 0.0


class RmspropConfig(_Rmsprop):
    """RMSprop, as `torch.optim.RMSprop`.

    Attributes:
        lr: The constant rate, where there is no schedule.
        alpha: Decay of the averages of the gradient and of its square.
        eps: Added to the denominator.
        momentum: Decay of the momentum buffer; 0 keeps none.
        centered: Divide by an estimate of the standard deviation.
    """

    lr: NonNegative
    eps: NonNegative = 1e-8


class LionConfig(DenseSection):
    """Lion (Chen et al., 2023), whose weight decay is decoupled as that of AdamW.

    Attributes:
        lr: The constant rate, where there is no schedule; three to ten times less than Adam's.
        betas: How much of the average is in the update, and how much it keeps of itself.
    """

    lr: NonNegative
    betas: tuple[Fraction, Fraction] = (0.9, 0.99)


class AlgorithmSections(BaseConfig):
    """The algorithms to choose from, for all parameters alike."""

    adam: AdamConfig | None = None
    adamw: AdamWConfig | None = None
    adagrad: AdagradConfig | None = None
    sgd: SgdConfig | None = None
    rmsprop: RmspropConfig | None = None
    lion: LionConfig | None = None


ALGORITHMS = tuple(AlgorithmSections.model_fields)


# For the groups of a multi-task ranker


class _RecapAdam(DenseSection):
    beta_1: Fraction = 0.9
    beta_2: Fraction = 0.999
    epsilon: NonNegative = 1e-7
    amsgrad: Flag = False


class RecapAdamConfig(_RecapAdam):
    """Adam for the dense groups.

    Attributes:
        beta_1, beta_2: Decay of the averages of the gradient and of its square.
        epsilon: Added to the denominator.
        amsgrad: Divide by the greatest second moment so far.
    """


class RecapAdamWConfig(_RecapAdam):
    """Adam with decoupled weight decay: the parameter shrinks by `lr * weight_decay` of itself.

    Attributes:
        beta_1, beta_2, epsilon, amsgrad: As in `RecapAdamConfig`.
        weight_decay: Its strength; the default is torch's.
    """

    weight_decay: NonNegative = 1e-2


class RecapAdagradConfig(DenseSection):
    """Adagrad for the dense groups.

    Attributes:
        epsilon: Added to the denominator.
        initial_accumulator_value: What the sum of squared gradients starts from.
        lr_decay: The rate of step t is divided by 1 + (t - 1) * lr_decay.
    """

    epsilon: NonNegative = 1e-10
    initial_accumulator_value: NonNegative = 0.0
    lr_decay: NonNegative = 0.0


class RecapSgdConfig(_Sgd):
    """SGD for the dense groups.

    Attributes:
        momentum: Decay of the momentum buffer; 0 keeps none.
        dampening: A gradient enters the buffer by 1 - dampening, the first one whole.
        nesterov: Look ahead by the momentum; needs one, and no dampening.
    """


class RecapRmspropConfig(_Rmsprop):
    """RMSprop for the dense groups.

    Attributes:
        epsilon: Added to the denominator.
        alpha, momentum, centered: As in `RmspropConfig`.
    """

    epsilon: NonNegative = 1e-8


class RecapLionConfig(DenseSection):
    """Lion for the dense groups.

    Attributes:
        beta_1, beta_2: How much of the average is in the update, and how much it keeps of itself.
    """

    beta_1: Fraction = 0.9
    beta_2: Fraction = 0.99


class RecapAlgorithmSections(BaseConfig):
    """The algorithms to choose from, for the dense groups."""

    adam: RecapAdamConfig | None = None
    adamw: RecapAdamWConfig | None = None
    adagrad: RecapAdagradConfig | None = None
    sgd: RecapSgdConfig | None = None
    rmsprop: RecapRmspropConfig | None = None
    lion: RecapLionConfig | None = None
