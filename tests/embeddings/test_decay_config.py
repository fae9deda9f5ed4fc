"""Which sections and fields of row-wise Adagrad's weight decay go together."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from recap_fast.config import EmbeddingOptimizerConfig, EmbeddingRowwiseAdagradConfig


def counter(**options: Any) -> dict[str, Any]:
    return {"weight_decay_mode": "counter", "counter": options}


def cowclip(**options: Any) -> dict[str, Any]:
    return {"weight_decay_mode": "cowclip", "cowclip": options}


ACCEPTED: dict[str, dict[str, Any]] = {
    "counter": counter(),
    "rare rows": counter(learning_rate_mode="tail_id_lr_increase", max_counter_update_freq=1),
    "capped": counter(counter_weight_decay_mode="adagradw", counter_halflife=-2, adjustment_ub=0.5),
    "cowclip": cowclip(lower_bound=0.5),
    "cowclip and null": {**cowclip(lower_bound=0.5), "counter": None, "max_norm": None},
    "decouple_global": {
        "weight_decay": 0.5,
        "max_norm": 1.0,
        "weight_decay_mode": "decouple_global",
        "decouple_global": {},
    },
}


@pytest.mark.parametrize("fields", ACCEPTED.values(), ids=ACCEPTED)
def test_accepted_and_the_same_from_its_yaml(fields: dict[str, Any]) -> None:
    section = EmbeddingRowwiseAdagradConfig.model_validate(fields)
    assert EmbeddingRowwiseAdagradConfig.model_validate(section.model_dump()) == section


MODES = ("counter", "cowclip", "decouple_global")
WRONG: list[tuple[dict[str, Any], str]] = [
    *(({"weight_decay_mode": mode}, f"{mode} needs the section {mode}") for mode in MODES),
    (
        {"counter": {}},
        "the section counter needs the weight_decay_mode counter; found None",
    ),
    (
        {"weight_decay_mode": "l2", "cowclip": {"lower_bound": 1.0}},
        "the section cowclip needs the weight_decay_mode cowclip; found l2",
    ),
    (
        {**counter(), "decouple_global": {}},
        "the section decouple_global needs the weight_decay_mode decouple_global; found counter",
    ),
    (
        {"weight_decay": 0.5},
        "weight_decay needs a weight_decay_mode: l2, decouple, counter, cowclip or decouple_global",
    ),
    ({**counter(), "max_norm": 1.0}, "max_norm is 1.0, which FBGEMM ignores in the .* counter"),
    (
        {**cowclip(lower_bound=1.0), "max_norm": 1.0},
        "max_norm is 1.0, which FBGEMM ignores in the weight_decay_mode cowclip",
    ),
    (
        {**counter(), "weight_decay": 0.5},
        "weight_decay needs a counter_weight_decay_mode other than none in the section counter",
    ),
    (
        {**cowclip(lower_bound=1.0), "weight_decay": 0.5},
        "weight_decay needs a counter_weight_decay_mode other than none in the section cowclip",
    ),
    (
        counter(counter_weight_decay_mode="decouple"),
        "decouple needs a counter_halflife of at least 1; found -1",
    ),
    (
        counter(counter_weight_decay_mode="l2", counter_halflife=0),
        "l2 needs a counter_halflife of at least 1; found 0",
    ),
    (counter(counter_halflife=-2), "counter_halflife -2 needs the .* adagradw"),
    (counter(counter_halflife=-3), "counter_halflife\n  Input should be greater than or equal"),
    (counter(counter_halflife=True), "counter_halflife\n  Input should be a valid integer"),
    (counter(adjustment_iter="one"), "expected a number, found the text 'one'"),
    (counter(adjustment_ub=0.0), "adjustment_ub\n  Input should be greater than 0"),
    (
        counter(counter_weight_decay_mode="adagradw", learning_rate_mode="counter_sgd"),
        "learning_rate_mode counter_sgd has no effect with the .* adagradw and .* -1",
    ),
    (counter(tail_id_threshold=2.0), "tail_id_threshold is 2.0, which has no effect without"),
    (counter(tail_id_threshold_is_ratio=True), "tail_id_threshold_is_ratio is True, which has no"),
    (counter(adjustment_ub=2.0), "adjustment_ub is 2.0, which has no effect without"),
    (counter(counter_halflife=5), "counter_halflife is 5, which has no effect without"),
    (counter(adjustment_iter=5), "adjustment_iter is 5, which has no effect without"),
    (
        counter(learning_rate_mode="counter_sgd", max_counter_update_freq=5),
        "max_counter_update_freq is 5, which has no effect without",
    ),
    (counter(grad_sum_decay=0), "grad_sum_decay\n  Extra inputs"),
    (cowclip(), "weight_norm_coefficient and lower_bound are both 0"),
    (
        cowclip(lower_bound=1.0, counter_weight_decay_mode="adagradw"),
        "counter_weight_decay_mode\n  Input should be 'none', 'l2' or 'decouple'",
    ),
    (
        {"weight_decay_mode": "decouple_global", "decouple_global": {"lower_bound": 1.5}},
        "decouple_global.lower_bound\n  Input should be less than or equal to 1",
    ),
]


@pytest.mark.parametrize(("fields", "message"), WRONG, ids=[message for _, message in WRONG])
def test_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EmbeddingRowwiseAdagradConfig.model_validate(fields)


@pytest.mark.parametrize("algorithm", ["ema_rowwise_adagrad", "ensemble_rowwise_adagrad"])
@pytest.mark.parametrize("mode", MODES)
def test_averages_have_no_such_mode(algorithm: str, mode: str) -> None:
    """FBGEMM would ignore counter and cowclip there, and refuse decouple_global."""
    section = {"weight_decay_mode": mode, mode: {}}
    with pytest.raises(ValidationError) as error:
        EmbeddingOptimizerConfig.model_validate({algorithm: section})
    text = str(error.value)
    assert f"{algorithm}.weight_decay_mode\n  Input should be 'l2' or 'decouple'" in text
    assert f"{algorithm}.{mode}\n  Extra inputs" in text
