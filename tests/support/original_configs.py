"""Configuration classes in the shape of the recap recommender's own, written for pydantic 1 and 2.

They have its fields, defaults and strictness: unknown fields are refused, texts that spell numbers
are coerced, alternatives are fields of one class that are None by default.
"""

import warnings  # no postponed annotations: pydantic 1 cannot resolve those of local classes
from typing import Any, NamedTuple

import pydantic

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Pythons that pydantic 1 was not made for
    import pydantic.v1 as pydantic_1


class OriginalConfigs(NamedTuple):
    """The classes that a program of the original hands over, by what they configure."""

    learning_rate: type[Any]
    recap_optimizer: type[Any]
    optimizer: type[Any]
    embedding_optimizer: type[Any]


def _classes(base: type[Any], field: Any, positive: Any) -> OriginalConfigs:
    class Piecewise(base):
        learning_rate_boundaries: list[int] | None = None
        learning_rate_values: list[float] | None = None

    class RampToConstant(base):
        learning_rate: float
        num_ramp_steps: positive = field(description="steps of the ramp")

    class RampToCosine(base):
        learning_rate: float
        final_learning_rate: float
        num_ramp_steps: positive = field(description="steps of the ramp")
        final_num_steps: positive = field(description="last step of the decay")

    class Rate(base):
        constant: float | None = None
        linear_ramp_to_cosine: RampToCosine | None = None
        linear_ramp_to_constant: RampToConstant | None = None
        piecewise_constant: Piecewise | None = None

    class Adam(base):
        lr: float
        betas: tuple[float, float] = [0.9, 0.999]
        eps: float = 1e-7

    class Sgd(base):
        lr: float
        momentum: float = 0.0

    class Adagrad(base):
        lr: float
        eps: float = 0

    class Optimizer(base):
        learning_rate: Rate | None = None
        adam: Adam | None = None
        sgd: Sgd | None = None
        adagrad: Adagrad | None = None

    class RecapAdam(base):
        beta_1: float = 0.9
        beta_2: float = 0.999
        epsilon: float = 1e-7

    class MultiTaskRates(base):
        tower_learning_rates: dict[str, Rate] = field(description="by task")
        backbone_learning_rate: Rate | None = None

    class RecapOptimizer(base):
        multi_task_learning_rates: MultiTaskRates | None = None
        single_task_learning_rate: Rate | None = None
        adam: RecapAdam

    class EmbeddingOptimizer(base):
        learning_rate: Rate | None = None
        init_learning_rate: float = field(description="before a schedule sets it")

    return OriginalConfigs(Rate, RecapOptimizer, Optimizer, EmbeddingOptimizer)


class _Base1(pydantic_1.BaseModel):
    class Config:
        extra = "forbid"


class _Base2(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")


CLASSES = {
    "pydantic 1": _classes(_Base1, pydantic_1.Field, pydantic_1.PositiveInt),
    "pydantic 2": _classes(_Base2, pydantic.Field, pydantic.PositiveInt),
}
