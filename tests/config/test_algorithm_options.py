"""Every option of the algorithms' sections: it reaches the optimizer and means what torch means."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from recap_fast import build, reference
from recap_fast.config import (
    EmbeddingOptimizerConfig,
    OptimizerConfig,
    RecapOptimizerConfig,
    as_optimizer_config,
)

BUILDERS = {"native": build.build_optimizer, "reference": reference.build_optimizer}
TORCH = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "lion": reference.Lion,
}
# A section as the recap recommender spells it, and torch's arguments.
SECTIONS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("adam", {}, {"eps": 1e-7}),
    (
        "adam",
        {"beta_1": 0.8, "beta_2": 0.95, "epsilon": 1e-4, "weight_decay": 0.1},
        {"betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.1},
    ),
    (
        "adam",
        {"betas": [0.8, 0.95], "eps": 1e-4, "amsgrad": True, "maximize": True},
        {"betas": (0.8, 0.95), "eps": 1e-4, "amsgrad": True, "maximize": True},
    ),
    ("adamw", {}, {"eps": 1e-7, "weight_decay": 0.01}),
    (
        "adamw",
        {"weight_decay": 0.5, "amsgrad": True, "beta_1": 0.5},
        {"weight_decay": 0.5, "amsgrad": True, "betas": (0.5, 0.999), "eps": 1e-7},
    ),
    ("adagrad", {"epsilon": 1e-10}, {}),
    (
        "adagrad",
        {"eps": 1e-5, "lr_decay": 0.5, "weight_decay": 0.1, "initial_accumulator_value": 0.25},
        {"eps": 1e-5, "lr_decay": 0.5, "weight_decay": 0.1, "initial_accumulator_value": 0.25},
    ),
    ("adagrad", {"eps": 1e-10, "maximize": True}, {"maximize": True}),
    ("rmsprop", {}, {}),
    (
        "rmsprop",
        {"alpha": 0.75, "epsilon": 1e-4, "momentum": 0.5, "centered": True, "weight_decay": 0.1},
        {"alpha": 0.75, "eps": 1e-4, "momentum": 0.5, "centered": True, "weight_decay": 0.1},
    ),
    ("lion", {}, {}),
    (
        "lion",
        {"beta_1": 0.5, "beta_2": 0.75, "weight_decay": 0.1, "maximize": True},
        {"betas": (0.5, 0.75), "weight_decay": 0.1, "maximize": True},
    ),
    ("sgd", {}, {}),
    *[
        ("sgd", options, options)
        for options in (
            {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
            {"momentum": 0.9, "nesterov": True, "maximize": True},
        )
    ],
]
CONFIGS = {
    "recap": lambda name, section: {
        name: section, "single_task_learning_rate": {"constant": 0.1}
    },
    "generic": lambda name, section: {name: {"lr": 0.1, **section}},
}  # fmt: skip


@pytest.mark.parametrize("build_optimizer", BUILDERS.values(), ids=BUILDERS)
@pytest.mark.parametrize("form", CONFIGS)
@pytest.mark.parametrize(("name", "section", "arguments"), SECTIONS)
def test_an_option_is_torchs(
    name: str,
    section: dict[str, Any],
    arguments: dict[str, Any],
    form: str,
    build_optimizer: Callable[..., Any],
) -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Linear(3, 2).double() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    optimizer, scheduler = build_optimizer(ours, CONFIGS[form](name, section))
    expected = TORCH[name](theirs.parameters(), lr=0.1, **arguments)
    for key, value in expected.param_groups[0].items():
        if key not in ("params", "foreach", "fused"):
            assert optimizer.param_groups[0][key] == value, key
    for step in range(4):
        inputs = torch.randn(5, 3, dtype=torch.float64, generator=torch.manual_seed(step))
        for model, each in ((ours, optimizer), (theirs, expected)):
            each.zero_grad()
            model(inputs).square().mean().backward()
            each.step()
        scheduler.step()
    for param, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        # float64: the order of roundings only.
        torch.testing.assert_close(param, other, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("config_class", [RecapOptimizerConfig, OptimizerConfig])
@pytest.mark.parametrize("name", TORCH)
def test_sections_have_all_that_torchs_classes_have(config_class: type, name: str) -> None:
    execution = {"self", "params", "lr", "foreach", "fused", "capturable", "differentiable"}
    # adamw is the section for it.
    expected = inspect.signature(TORCH[name]).parameters.keys() - execution
    expected -= {"decoupled_weight_decay"}
    form = "recap" if config_class is RecapOptimizerConfig else "generic"
    _, section = as_optimizer_config(CONFIGS[form](name, {})).algorithm
    assert section.hyperparameters.keys() == expected


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"betas": [0.9, 0.99], "beta_1": 0.5}, "betas and beta_1 are the same: set one of them"),
        ({"eps": 1.0, "epsilon": 1.0}, "eps(ilon)? and eps(ilon)? are the same: set one of them"),
        ({"betas": [0.9]}, "betas"),
        ({"betas": 0.9}, "betas"),
        ({"beta_2": 1.0}, "beta"),
        ({"amsgrad": 1}, "amsgrad"),
        ({"weight_decay": -1}, "weight_decay"),
        ({"nesterov": True}, "nesterov\n  Extra inputs"),
    ],
)
@pytest.mark.parametrize("form", CONFIGS)
def test_wrong_options_are_refused_by_name(
    form: str, section: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        as_optimizer_config(CONFIGS[form]("adam", section))


def test_nesterov_without_dampening() -> None:
    section = {"momentum": 0.9, "nesterov": True, "dampening": 0.1}
    with pytest.raises(ValueError, match="nesterov needs a dampening of 0"):
        as_optimizer_config(CONFIGS["recap"]("sgd", section))


def test_tables_have_both_spellings_too() -> None:
    config = EmbeddingOptimizerConfig.model_validate(
        {"adam": {"betas": [0.5, 0.75], "epsilon": 1e-3}, "tables": {"t": {"adagrad": {"eps": 1}}}}
    )
    assert (config.adam.beta_1, config.adam.beta_2, config.adam.eps) == (0.5, 0.75, 1e-3)
