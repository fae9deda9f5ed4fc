"""Learning rates against tables worked out by hand and against slow formulas."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recap_fast.config import (
    LearningRate,
    LinearRampToConstant,
    LinearRampToCosine,
    PiecewiseConstant,
)
from recap_fast.schedules.compute import compute_lr

FAR = 10**12

CONSTANT = LearningRate(constant=0.3)
PIECEWISE = LearningRate(
    piecewise_constant=PiecewiseConstant(
        learning_rate_boundaries=[10, 20], learning_rate_values=[1.0, 0.5, 0.25]
    )
)
RAMP = LearningRate(
    linear_ramp_to_constant=LinearRampToConstant(learning_rate=0.8, num_ramp_steps=4)
)
# Six steps of cosine, 30 degrees each, between 1.0 and 0.2: 0.6 + 0.4 cos.
COSINE = LearningRate(
    linear_ramp_to_cosine=LinearRampToCosine(
        learning_rate=1.0, final_learning_rate=0.2, num_ramp_steps=4, final_num_steps=10
    )
)
COS_30 = math.sqrt(3) / 2


@pytest.mark.parametrize(
    ("config", "table"),
    [
        (CONSTANT, {0: 0.3, 1: 0.3, FAR: 0.3}),
        (PIECEWISE, {0: 1.0, 9: 1.0, 10: 0.5, 19: 0.5, 20: 0.25, FAR: 0.25}),
        (RAMP, {0: 0.0, 1: 0.2, 2: 0.4, 3: 0.6, 4: 0.8, 5: 0.8, FAR: 0.8}),
        (
            COSINE,
            {
                0: 0.0,
                1: 0.25,
                2: 0.5,
                3: 0.75,
                4: 1.0,
                5: 0.6 + 0.4 * COS_30,
                6: 0.8,
                7: 0.6,
                8: 0.4,
                9: 0.6 - 0.4 * COS_30,
                10: 0.2,
                11: 0.2,
                FAR: 0.2,
            },
        ),
    ],
    ids=["constant", "piecewise_constant", "linear_ramp_to_constant", "linear_ramp_to_cosine"],
)
def test_table(config: LearningRate, table: dict[int, float]) -> None:
    rates = {step: compute_lr(config, step) for step in table}
    assert rates == pytest.approx(table, rel=1e-14)
    assert {type(rate) for rate in rates.values()} == {float}


@pytest.mark.parametrize("config", [CONSTANT, PIECEWISE, RAMP, COSINE])
@pytest.mark.parametrize("step", [-1, 1.0, "1", None])
def test_a_step_is_a_whole_number(config: LearningRate, step: object) -> None:
    with pytest.raises(ValueError, match="step must be an int, 0 or greater"):
        compute_lr(config, step)


rates = st.floats(1e-9, 1e3)
num_steps = st.integers(1, 10_000)
steps = st.integers(0, 30_000)


@given(st.sets(st.integers(0, 50)), st.data())
def test_piecewise_counts_the_boundaries_that_were_reached(
    boundaries: set[int], data: st.DataObject
) -> None:
    size = len(boundaries) + 1
    values = data.draw(st.lists(rates, min_size=size, max_size=size))
    config = LearningRate(
        piecewise_constant=PiecewiseConstant(
            learning_rate_boundaries=sorted(boundaries), learning_rate_values=values
        )
    )
    for step in range(60):
        reached = sum(1 for boundary in boundaries if boundary <= step)
        assert compute_lr(config, step) == values[reached]


@given(rates, num_steps, steps)
def test_ramp_to_constant_is_exact_to_rounding(rate: float, ramp: int, step: int) -> None:
    config = LearningRate(
        linear_ramp_to_constant=LinearRampToConstant(learning_rate=rate, num_ramp_steps=ramp)
    )
    expected = Fraction(rate) * min(step, ramp) / ramp
    assert compute_lr(config, step) == pytest.approx(float(expected), rel=4e-16, abs=0)
    assert compute_lr(config, step) <= rate


@given(rates, rates, num_steps, num_steps, steps)
def test_ramp_to_cosine(rate: float, final: float, ramp: int, length: int, step: int) -> None:
    config = LearningRate(
        linear_ramp_to_cosine=LinearRampToCosine(
            learning_rate=rate,
            final_learning_rate=final,
            num_ramp_steps=ramp,
            final_num_steps=ramp + length,
        )
    )
    top = max(rate, final)
    # The cosine as a squared half angle, its argument held at the ends.
    progress = min(max((step - ramp) / length, 0.0), 1.0)
    share = math.cos(math.pi / 2 * progress) ** 2
    expected = rate * step / ramp if step < ramp else share * rate + (1 - share) * final
    here = compute_lr(config, step)
    assert here == pytest.approx(expected, rel=0, abs=1e-14 * top)

    # Continuous: no step changes the rate by more than the steepest slope of ramp and cosine.
    steepest = max(rate / ramp, abs(rate - final) * math.pi / (2 * length))
    assert abs(compute_lr(config, step + 1) - here) <= steepest + 1e-14 * top
    lowest = 0 if step < ramp else min(rate, final) - 1e-15 * top
    assert max(lowest, 0) <= here <= top * (1 + 1e-15)
    if step > ramp + length:
        assert here == final
