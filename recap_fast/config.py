"""Configuration of optimizers and learning rates, checked when it is built.

Field names and defaults are those of the recap recommender's own `optimizer:` section, so that its
YAML loads unchanged. What is new here: adagrad and sgd for the dense groups, and a choice of
algorithm for the embeddings. This module imports neither torch, torchrec nor FBGEMM.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import string
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator


def _refuse_text(value: Any) -> Any:
    """Explains why a value that looks like a number in YAML may be text."""
    if isinstance(value, str):
        raise ValueError(
            f"expected a number, found the text {value!r}. Remove quotes if there are any; in "
            "scientific notation YAML 1.1 wants a decimal point and a signed exponent: write "
            "1.0e-3, not 1e-3"
        )
    return value


# Strict: no booleans, no text, no fraction where a whole number belongs. A whole number is a float.
_NonNegative = Annotated[
    float, Field(strict=True, ge=0, allow_inf_nan=False), BeforeValidator(_refuse_text)
]
_Fraction = Annotated[float, Field(strict=True, ge=0, lt=1), BeforeValidator(_refuse_text)]
_Step = Annotated[int, Field(strict=True, ge=0), BeforeValidator(_refuse_text)]
_NumSteps = Annotated[int, Field(strict=True, ge=1), BeforeValidator(_refuse_text)]


class BaseConfig(BaseModel):
    """What all configuration classes share.

    Instances are frozen, unknown fields are refused, and a known field given as None counts as not
    given. A subclass names its groups of alternatives in `exactly_one_of` and `at_most_one_of`;
    breaking such a rule is a `pydantic.ValidationError` that names all fields of the group.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    exactly_one_of: ClassVar[tuple[tuple[str, ...], ...]] = ()
    at_most_one_of: ClassVar[tuple[tuple[str, ...], ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {
            name: value
            for name, value in data.items()
            if value is not None or name not in cls.model_fields
        }

    @model_validator(mode="after")
    def _check_one_of(self) -> BaseConfig:
        for names in self.exactly_one_of:
            given = self._given(names)
            if not given:
                raise ValueError(
                    f"set exactly one of {', '.join(names)}; found none (null counts as not set)"
                )
            if len(given) > 1:
                raise ValueError(
                    f"set exactly one of {', '.join(names)}; found {' and '.join(given)}"
                )
        for names in self.at_most_one_of:
            given = self._given(names)
            if len(given) > 1:
                raise ValueError(
                    f"set at most one of {', '.join(names)}; found {' and '.join(given)}"
                )
        return self

    def _given(self, names: tuple[str, ...]) -> list[str]:
        return [name for name in names if getattr(self, name) is not None]

    def pretty_print(self) -> str:
        """Returns the configuration as YAML, in field order, for logs and files."""
        # Sorting would reorder the towers, and with them the optimizer's param groups.
        return yaml.safe_dump(self.model_dump(), sort_keys=False)


# Learning rates


class PiecewiseConstant(BaseConfig):
    """Constant rates between step boundaries.

    Attributes:
        learning_rate_boundaries: Strictly increasing steps; a step equal to a boundary belongs to
            the interval that starts there.
        learning_rate_values: One rate per interval: one more than there are boundaries.
    """

    learning_rate_boundaries: list[_Step]
    learning_rate_values: list[_NonNegative]

    @model_validator(mode="after")
    def _check_intervals(self) -> PiecewiseConstant:
        boundaries, values = self.learning_rate_boundaries, self.learning_rate_values
        for left, right in pairwise(boundaries):
            if left >= right:
                raise ValueError(
                    "learning_rate_boundaries must be strictly increasing; "
                    f"found {right} after {left}"
                )
        if len(values) != len(boundaries) + 1:
            raise ValueError(
                "learning_rate_values must have one value more than learning_rate_boundaries; "
                f"found {len(values)} values for {len(boundaries)} boundaries"
            )
        return self


class LinearRampToConstant(BaseConfig):
    """A linear ramp from zero, then a constant rate.

    Attributes:
        learning_rate: The rate at the end of the ramp and from then on.
        num_ramp_steps: Length of the ramp in steps, at least 1.
    """

    learning_rate: _NonNegative
    num_ramp_steps: _NumSteps


class LinearRampToCosine(BaseConfig):
    """A linear ramp from zero, half a cosine down (or up) to the final rate, then that rate.

    Attributes:
        learning_rate: The rate at the end of the ramp.
        final_learning_rate: The rate at `final_num_steps` and from then on.
        num_ramp_steps: Length of the ramp in steps, at least 1.
        final_num_steps: The step, counted from the start, at which the cosine ends.
    """

    learning_rate: _NonNegative
    final_learning_rate: _NonNegative
    num_ramp_steps: _NumSteps
    final_num_steps: _NumSteps

    @model_validator(mode="after")
    def _check_steps(self) -> LinearRampToCosine:
        if self.final_num_steps <= self.num_ramp_steps:
            raise ValueError(
                f"final_num_steps ({self.final_num_steps}) must be greater than num_ramp_steps "
                f"({self.num_ramp_steps}): it counts from the start and includes the ramp"
            )
        return self


class LearningRate(BaseConfig):
    """The schedule of one group: exactly one of the four fields."""

    exactly_one_of = (
        ("constant", "piecewise_constant", "linear_ramp_to_constant", "linear_ramp_to_cosine"),
    )

    constant: _NonNegative | None = None
    piecewise_constant: PiecewiseConstant | None = None
    linear_ramp_to_constant: LinearRampToConstant | None = None
    linear_ramp_to_cosine: LinearRampToCosine | None = None


# One group for the whole model


class AdamConfig(BaseConfig):
    """Adam with torch's argument names."""

    lr: _NonNegative
    betas: tuple[_Fraction, _Fraction] = (0.9, 0.999)
    eps: _NonNegative = 1e-7


class SgdConfig(BaseConfig):
    """SGD with torch's argument names."""

    lr: _NonNegative
    momentum: _NonNegative = 0.0


class AdagradConfig(BaseConfig):
    """Adagrad with torch's argument names.

    The default `eps` of zero is the original's: an element whose gradients have all been zero then
    becomes NaN (0 / 0). Set it unless every element gets a gradient.
    """

    lr: _NonNegative
    eps: _NonNegative = 0.0


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

    beta_1: _Fraction = 0.9
    beta_2: _Fraction = 0.999
    epsilon: _NonNegative = 1e-7


class RecapAdagradConfig(BaseConfig):
    """Adagrad for the dense groups."""

    epsilon: _NonNegative = 1e-10
    initial_accumulator_value: _NonNegative = 0.0


class RecapSgdConfig(BaseConfig):
    """SGD for the dense groups."""

    momentum: _NonNegative = 0.0
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


# Embeddings: hyperparameters and defaults of FBGEMM's table-batched optimizers


class EmbeddingSgdConfig(BaseConfig):
    """SGD; FBGEMM's takes nothing but a learning rate."""


class EmbeddingRowwiseAdagradConfig(BaseConfig):
    """Adagrad with one accumulator per table row.

    Attributes:
        eps: Added to the denominator.
        weight_decay: Strength of the decay; needs `weight_decay_mode`, else FBGEMM would ignore it.
        weight_decay_mode: `l2` adds the decay to the gradient, `decouple` to the update.
    """

    eps: _NonNegative = 1e-8
    weight_decay: _NonNegative = 0.0
    weight_decay_mode: Literal["l2", "decouple"] | None = None

    @model_validator(mode="after")
    def _check_weight_decay(self) -> EmbeddingRowwiseAdagradConfig:
        if self.weight_decay > 0 and self.weight_decay_mode is None:
            raise ValueError("weight_decay needs a weight_decay_mode: l2 or decouple")
        return self


class EmbeddingAdagradConfig(BaseConfig):
    """Adagrad with one accumulator per element."""

    eps: _NonNegative = 1e-8


class EmbeddingAdamConfig(BaseConfig):
    """Adam or LAMB, full or partially row-wise (one second moment per row); decoupled decay."""

    beta_1: _Fraction = 0.9
    beta_2: _Fraction = 0.999
    eps: _NonNegative = 1e-8
    weight_decay: _NonNegative = 0.0


class EmbeddingLarsSgdConfig(BaseConfig):
    """SGD whose step is scaled by the ratio of a row's norm to that of its gradient.

    Attributes:
        momentum: Momentum of the scaled step.
        weight_decay: Added to the gradient, in proportion to the weight.
        eta: Trust coefficient: the factor of the norms' ratio.
    """

    momentum: _NonNegative = 0.9
    weight_decay: _NonNegative = 0.0
    eta: _NonNegative = 0.001


EmbeddingSection = (
    EmbeddingSgdConfig
    | EmbeddingRowwiseAdagradConfig
    | EmbeddingAdagradConfig
    | EmbeddingAdamConfig
    | EmbeddingLarsSgdConfig
)


class EmbeddingOptimizerConfig(BaseConfig):
    """The optimizer of the embedding tables.

    Attributes:
        learning_rate: The schedule of the tables.
        init_learning_rate: The rate with which the tables are made, before a schedule sets it.
        sgd, ...: The algorithm, at most one of them; none means sgd. Not every device has every
            algorithm; that is checked when the tables are made.
    """

    at_most_one_of = (
        (
            "sgd",
            "rowwise_adagrad",
            "adagrad",
            "adam",
            "partial_rowwise_adam",
            "lamb",
            "partial_rowwise_lamb",
            "lars_sgd",
        ),
    )

    learning_rate: LearningRate | None = None
    init_learning_rate: _NonNegative | None = None
    sgd: EmbeddingSgdConfig | None = None
    rowwise_adagrad: EmbeddingRowwiseAdagradConfig | None = None
    adagrad: EmbeddingAdagradConfig | None = None
    adam: EmbeddingAdamConfig | None = None
    partial_rowwise_adam: EmbeddingAdamConfig | None = None
    lamb: EmbeddingAdamConfig | None = None
    partial_rowwise_lamb: EmbeddingAdamConfig | None = None
    lars_sgd: EmbeddingLarsSgdConfig | None = None

    @property
    def algorithm(self) -> tuple[str, EmbeddingSection]:
        """The name of the chosen algorithm and its section; sgd if none was chosen."""
        (algorithms,) = self.at_most_one_of
        for name in self._given(algorithms):
            return name, getattr(self, name)
        return "sgd", EmbeddingSgdConfig()


# Files


class _Loader(yaml.SafeLoader):
    """A SafeLoader that refuses a key given twice, of which YAML would silently keep the last."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return node


def _substitute_environment(text: str) -> str:
    """Replaces `${VAR}` from the environment; an unknown name stays as it is."""
    variables = dict(os.environ)
    with contextlib.suppress(KeyError, OSError):  # containers run under ids without a user name
        variables["USER"] = getpass.getuser()
    return string.Template(text).safe_substitute(variables)


def load_optimizer_config(
    path: str | os.PathLike[str], section: str = "optimizer"
) -> RecapOptimizerConfig | OptimizerConfig:
    """Reads the optimizer's section of a YAML file.

    `${VAR}` is first replaced from the environment. A section with `multi_task_learning_rates` or
    `single_task_learning_rate` is a `RecapOptimizerConfig`, any other an `OptimizerConfig`.

    Args:
        path: The YAML file.
        section: The top-level key that holds the configuration.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not YAML, has no such section, or the section is not valid; the message
            names file and section.
    """
    text = _substitute_environment(Path(path).read_text(encoding="utf-8"))
    try:
        document = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path} must be a mapping with a section {section!r}")
    if section not in document:
        present = ", ".join(map(repr, document)) or "none"
        raise ValueError(f"{path} has no section {section!r}; sections present: {present}")
    content = document[section]
    if not isinstance(content, dict):
        raise ValueError(
            f"section {section!r} of {path} must be a mapping, found {type(content).__name__}"
        )

    is_recap = "multi_task_learning_rates" in content or "single_task_learning_rate" in content
    config_class = RecapOptimizerConfig if is_recap else OptimizerConfig
    try:
        return config_class.model_validate(content)
    except ValidationError as error:
        reason = (
            "it has multi_task_learning_rates or single_task_learning_rate"
            if is_recap
            else "it has neither multi_task_learning_rates nor single_task_learning_rate"
        )
        raise ValueError(
            f"section {section!r} of {path}, read as {config_class.__name__} as {reason}: {error}"
        ) from error
