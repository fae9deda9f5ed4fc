"""Optimizers and learning rates of embedding tables: those of FBGEMM's table-batched kernels.

Every hyperparameter here is one that FBGEMM's CUDA kernel of that algorithm honours; defaults are
FBGEMM's. What the CPU lacks is refused when the tables are made, where device and dtype are known.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from recap_fast.config.base import BaseConfig, Flag, Fraction, NonNegative, Positive, Share
from recap_fast.config.rates import LearningRate
from recap_fast.config.rowwise_adagrad import (
    EmbeddingEmaRowwiseAdagradConfig,
    EmbeddingEnsembleRowwiseAdagradConfig,
    EmbeddingRowwiseAdagradConfig,
)


class EmbeddingSgdConfig(BaseConfig):
    """SGD; it takes nothing but a learning rate."""


class EmbeddingAdagradConfig(BaseConfig):
    """Adagrad with one accumulator per element.

    Attributes:
        eps: Added to the denominator.
    """

    eps: NonNegative = 1e-8


# Not derived from one another, as pydantic would take one for a field of the other.
class _Adam(BaseConfig):
    beta_1: Fraction = 0.9
    beta_2: Fraction = 0.999
    eps: NonNegative = 1e-8
    weight_decay: NonNegative = 0.0


class EmbeddingPartialRowwiseAdamConfig(_Adam):
    """Adam with one second moment per row, and decoupled weight decay.

    Attributes:
        beta_1, beta_2: Decay of the first and the second moment.
        eps: Added to the denominator.
        weight_decay: Strength of the decay; only rows that get a gradient decay.
    """


class EmbeddingAdamConfig(_Adam):
    """Adam with decoupled weight decay; moments of rows without a gradient stay as they are.

    Attributes:
        beta_1, beta_2, eps, weight_decay: As in `EmbeddingPartialRowwiseAdamConfig`.
        rowwise_bias_correction: Correct the bias by the number of updates of each row, not by the
            number of forward passes.
    """

    rowwise_bias_correction: Flag = False


class EmbeddingLambConfig(_Adam):
    """LAMB: Adam's step, scaled by the ratio of a row's norm to that of its step.

    Full or with one second moment per row. The decay is part of the step that is scaled.

    Attributes:
        beta_1, beta_2, eps, weight_decay: As in `EmbeddingPartialRowwiseAdamConfig`.
    """


class EmbeddingRowwiseRmspropArConfig(BaseConfig):
    """RMSProp with one average of squared gradients per row, and a decay of rows that get one.

    A row that is updated is first multiplied by `1 - lr * ar_alpha * passes`, with the number of
    forward passes since its last update, or 1 at its first; the step is
    `lr * gradient / (sqrt(average) + eps)`. FBGEMM has it from release 1.9 on.

    Attributes:
        eps: Added to the denominator.
        ar_alpha: Strength of the decay; 0 is none.
        ema_beta: Decay of the average of the mean squared gradient of the row.
        min_shrinkage: The least that a row is multiplied by, 0 to 1.
    """

    eps: NonNegative = 1e-8
    ar_alpha: NonNegative = 0.0
    ema_beta: Fraction = 0.99
    min_shrinkage: Share = 0.1


class EmbeddingLarsSgdConfig(BaseConfig):
    """SGD whose step is scaled by the ratio of a row's norm to that of its gradient.

    Attributes:
        momentum: Momentum of the scaled step.
        weight_decay: Added to the gradient, in proportion to the weight.
        eta: Trust coefficient: the factor of the norms' ratio.
    """

    momentum: NonNegative = 0.9
    weight_decay: NonNegative = 0.0
    eta: NonNegative = 0.001


EmbeddingSection = (
    EmbeddingSgdConfig
    | EmbeddingAdagradConfig
    | EmbeddingRowwiseAdagradConfig
    | EmbeddingEmaRowwiseAdagradConfig
    | EmbeddingEnsembleRowwiseAdagradConfig
    | EmbeddingRowwiseRmspropArConfig
    | EmbeddingAdamConfig
    | EmbeddingPartialRowwiseAdamConfig
    | EmbeddingLambConfig
    | EmbeddingLarsSgdConfig
)

_ALGORITHMS = (
    "sgd",
    "adagrad",
    "rowwise_adagrad",
    "ema_rowwise_adagrad",
    "ensemble_rowwise_adagrad",
    "rowwise_rmsprop_ar",
    "adam",
    "partial_rowwise_adam",
    "lamb",
    "partial_rowwise_lamb",
    "lars_sgd",
)


class TableOptimizerConfig(BaseConfig):
    """What is different about one embedding table; what is not given is as for the others.

    Attributes:
        learning_rate: The schedule.
        gradient_clipping: Gradients with respect to the table's pooled output are clamped, element
            by element, to this magnitude.
        stochastic_rounding: Whether updates of float16 tables are rounded up or down at random; by
            default where the device can, which the CPU cannot.
        several_backwards: What becomes of a fused table in several backward passes before a step,
            or if it is looked up several times. "update", the default: FBGEMM updates it at each,
            which is not what torch's optimizers do. "accumulate": gradients are held until
            `optimizer.step()`, which makes one update of their sum, as torch's do, and
            `optimizer.zero_grad()` drops them. "refuse": the second one is an error.
        sgd, ...: The algorithm, at most one of them; its hyperparameters replace all others. Not
            every device or release of FBGEMM has every algorithm; that is checked when the tables
            are made.
    """

    at_most_one_of = (_ALGORITHMS,)

    learning_rate: LearningRate | None = None
    gradient_clipping: Positive | None = None
    stochastic_rounding: Flag | None = None
    several_backwards: Literal["update", "accumulate", "refuse"] | None = None
    sgd: EmbeddingSgdConfig | None = None
    adagrad: EmbeddingAdagradConfig | None = None
    rowwise_adagrad: EmbeddingRowwiseAdagradConfig | None = None
    ema_rowwise_adagrad: EmbeddingEmaRowwiseAdagradConfig | None = None
    ensemble_rowwise_adagrad: EmbeddingEnsembleRowwiseAdagradConfig | None = None
    rowwise_rmsprop_ar: EmbeddingRowwiseRmspropArConfig | None = None
    adam: EmbeddingAdamConfig | None = None
    partial_rowwise_adam: EmbeddingPartialRowwiseAdamConfig | None = None
    lamb: EmbeddingLambConfig | None = None
    partial_rowwise_lamb: EmbeddingLambConfig | None = None
    lars_sgd: EmbeddingLarsSgdConfig | None = None


class EmbeddingOptimizerConfig(TableOptimizerConfig):
    """The optimizer of the embedding tables.

    Attributes:
        learning_rate: The schedule of the tables.
        init_learning_rate: The rate with which the tables are made, before a schedule sets it.
        tables: By table name, what is different for some of them; a name is that of an
            `EmbeddingBagConfig`, in whichever collection.
        gradient_clipping, stochastic_rounding, several_backwards, sgd, ...: As in
            `TableOptimizerConfig`; no algorithm means sgd.
    """

    init_learning_rate: NonNegative | None = None
    tables: dict[Annotated[str, Field(min_length=1)], TableOptimizerConfig] = Field(
        default_factory=dict
    )

    @property
    def algorithm_is_default(self) -> bool:
        """Whether no algorithm was chosen."""
        return not self._given(_ALGORITHMS)

    @property
    def algorithm(self) -> tuple[str, EmbeddingSection]:
        """The name of the chosen algorithm and its section; sgd if none was chosen."""
        for name in self._given(_ALGORITHMS):
            return name, getattr(self, name)
        return "sgd", EmbeddingSgdConfig()

    @property
    def table_learning_rates(self) -> dict[str, LearningRate]:
        """The schedules of the tables that have their own."""
        return {
            name: table.learning_rate
            for name, table in self.tables.items()
            if table.learning_rate is not None
        }

    def for_table(self, name: str) -> EmbeddingOptimizerConfig:
        """Returns what holds for a table: no `tables`, and what is different in their place."""
        own = self.tables.get(name, TableOptimizerConfig())
        changes = {
            field: value
            for field in TableOptimizerConfig.model_fields
            if (value := getattr(own, field)) is not None
        }
        if own._given(_ALGORITHMS):  # or two of them would be set
            changes = {**dict.fromkeys(_ALGORITHMS), **changes}
        return self.model_copy(update={**changes, "tables": {}})
