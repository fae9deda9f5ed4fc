"""How parameters and states are stored, as sections of a configuration say it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from recap_fast import build_optimizer, load_optimizer_config
from recap_fast.config import AdamConfig, OptimizerConfig, as_optimizer_config

ALGORITHMS = ["adam", "adamw", "adagrad", "sgd", "rmsprop", "lion"]
FORMS: dict[str, Callable[[str, dict[str, Any]], dict[str, Any]]] = {
    "recap": lambda name, section: {name: section, "single_task_learning_rate": {"constant": 0.1}},
    "generic": lambda name, section: {name: {"lr": 0.1, **section}},
}
FIELDS = ("state_dtype", "master_weights", "stochastic_rounding", "rounding_seed")
forms = pytest.mark.parametrize("form", FORMS)


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)).bfloat16()


def _formats(group: dict[str, Any]) -> dict[str, Any]:
    return {field: group[field] for field in FIELDS if field in group}


@pytest.mark.cpu_engine
@forms
@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("given", ["bfloat16", torch.bfloat16])
def test_the_optimizer_has_what_its_section_says(name: str, form: str, given: Any) -> None:
    section = {"state_dtype": given, "master_weights": True, "rounding_seed": 3}
    model = _model()
    optimizer, _ = build_optimizer(model, FORMS[form](name, section))
    (group,) = optimizer.param_groups
    assert _formats(group) == {**section, "state_dtype": torch.bfloat16}
    model(torch.ones(2, 3, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    for param in model.parameters():
        assert optimizer.state[param]["param_remainder"].dtype == torch.int16
    optimizer, _ = build_optimizer(model, FORMS[form](name, {"stochastic_rounding": True}))
    assert _formats(optimizer.param_groups[0]) == {"stochastic_rounding": True, "rounding_seed": 0}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_without_them_groups_are_as_before(name: str) -> None:
    nothing = {"state_dtype": None, "master_weights": False, "rounding_seed": 0}
    for section in ({}, nothing):
        optimizer, _ = build_optimizer(_model(), FORMS["recap"](name, section))
        assert not _formats(optimizer.param_groups[0])


def test_entries_of_groups_have_their_own() -> None:
    config = {
        "adam": {"lr": 0.1, "state_dtype": "float32"},
        "groups": {
            "biases": {"pattern": "bias", "sgd": {"lr": 0.1, "stochastic_rounding": True}},
            "last": {"pattern": r"^1\.", "lr_multiplier": 2},
        },
    }
    optimizer, scheduler = build_optimizer(_model(), config)
    found = dict(zip(scheduler.group_names, map(_formats, optimizer.param_groups), strict=True))
    common = {"state_dtype": torch.float32, "rounding_seed": 0}
    assert found == {
        "ALL_PARAMS": common,
        "ALL_PARAMS.biases": {"stochastic_rounding": True, "rounding_seed": 0},
        "ALL_PARAMS.last": common,
    }


def test_a_file_says_it_by_names(tmp_path: Any) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "optimizer:\n  adamw: {lr: 1e-3, state_dtype: float16, rounding_seed: 1.0e+3}\n"
    )
    _, section = load_optimizer_config(path).algorithm
    assert section.formats == {"state_dtype": "float16", "rounding_seed": 1000}


def test_it_is_written_as_it_is_read() -> None:
    config = OptimizerConfig(adam=AdamConfig(lr=1, state_dtype=torch.float16, master_weights=True))
    assert "state_dtype: float16" in config.pretty_print()
    assert as_optimizer_config(config.model_dump()) == config


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"state_dtype": "float64"},
            "state_dtype\n  Input should be 'float32', 'bfloat16', 'float16'",
        ),
        (
            {"state_dtype": torch.int8},
            "state_dtype\n  Input should be 'float32', 'bfloat16', 'float16'",
        ),
        ({"state_dtype": "torch.float32"}, "state_dtype\n"),
        ({"master_weights": 1}, "master_weights\n"),
        ({"stochastic_rounding": "yes"}, "stochastic_rounding\n"),
        ({"rounding_seed": 0.5}, "rounding_seed\n"),
        ({"rounding_seed": True}, "rounding_seed\n"),
        ({"rounding_seed": 2**63}, "rounding_seed\n"),
        (
            {"master_weights": True, "stochastic_rounding": True},
            "set at most one of master_weights, stochastic_rounding",
        ),
    ],
)
@forms
@pytest.mark.parametrize("name", ALGORITHMS)
def test_wrong_values_are_refused_by_name(
    name: str, form: str, section: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        as_optimizer_config(FORMS[form](name, section))


@forms
def test_parameters_that_cannot_have_them_are_refused_by_group(form: str) -> None:
    config = FORMS[form]("adam", {"state_dtype": "bfloat16"})
    with pytest.raises(ValueError, match=r"group '\w+': state_dtype=torch\.bfloat16: .*float64"):
        build_optimizer(_model().double(), config)
