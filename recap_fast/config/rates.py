"""Learning-rate schedules."""

from __future__ import annotations

from itertools import pairwise

from pydantic import model_validator

from recap_fast.config.base import BaseConfig, NonNegative, NumSteps, Step


class PiecewiseConstant(BaseConfig):
    """Constant rates between step boundaries.

    Attributes:
        learning_rate_boundaries: Strictly increasing steps; a step equal to a boundary belongs to
            the interval that starts there.
        learning_rate_values: One rate per interval: one more than there are boundaries.
    """

    learning_rate_boundaries: list[Step]
    learning_rate_values: list[NonNegative]

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

    learning_rate: NonNegative
    num_ramp_steps: NumSteps


class LinearRampToCosine(BaseConfig):
    """A linear ramp from zero, half a cosine down (or up) to the final rate, then that rate.

    Attributes:
        learning_rate: The rate at the end of the ramp.
        final_learning_rate: The rate at `final_num_steps` and from then on.
        num_ramp_steps: Length of the ramp in steps, at least 1.
        final_num_steps: The step, counted from the start, at which the cosine ends.
    """

    learning_rate: NonNegative
    final_learning_rate: NonNegative
    num_ramp_steps: NumSteps
    final_num_steps: NumSteps

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

    constant: NonNegative | None = None
    piecewise_constant: PiecewiseConstant | None = None
    linear_ramp_to_constant: LinearRampToConstant | None = None
    linear_ramp_to_cosine: LinearRampToCosine | None = None

    def times(self, factor: float) -> LearningRate:
        """Returns the schedule whose rate at every step is `factor` times the rate of this one."""
        if factor == 1:
            return self
        (kind,) = self._given(self.exactly_one_of[0])
        schedule = getattr(self, kind)
        if kind == "constant":
            return LearningRate(constant=factor * schedule)
        if kind == "piecewise_constant":
            scaled = {
                "learning_rate_values": [factor * rate for rate in schedule.learning_rate_values]
            }
        else:
            names = {
                "learning_rate",
                "final_learning_rate",
            } & schedule.__class__.model_fields.keys()
            scaled = {name: factor * getattr(schedule, name) for name in names}
        return LearningRate.model_validate({kind: {**schedule.model_dump(), **scaled}})
