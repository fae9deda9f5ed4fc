"""`groups`: other algorithms, rates and decays for some parameters, by group or by pattern."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from recap_fast import build, reference
from recap_fast.config import (
    LearningRate,
    OptimizerConfig,
    RecapOptimizerConfig,
    as_optimizer_config,
)
from recap_fast.embeddings import fuse_embeddings
from recap_fast.groups.assign import group_parameters
from recap_fast.groups.group import DenseGroup
from recap_fast.optim import FusedAdam, FusedAdamW, FusedSGD
from recap_fast.schedules.compute import compute_lr
from tests.support.models import (
    EMBEDDING_RATE,
    LIKED,
    REPLIED,
    EmbeddingRanker,
    Ranker,
    features,
    multi_task_config,
)

BUILDERS = {"native": build.build_optimizer, "reference": reference.build_optimizer}
RAMP = {"linear_ramp_to_constant": {"learning_rate": 0.5, "num_ramp_steps": 4}}
TOWERS = {LIKED: RAMP, REPLIED: {"constant": 0.25}}


def recap(groups: dict[str, Any], **fields: Any) -> RecapOptimizerConfig:
    rates = {"tower_learning_rates": TOWERS, "backbone_learning_rate": {"constant": 0.125}}
    algorithm = fields or {"adam": {"weight_decay": 0.5}}
    return as_optimizer_config({"multi_task_learning_rates": rates, "groups": groups, **algorithm})


def generic(groups: dict[str, Any], **fields: Any) -> OptimizerConfig:
    return as_optimizer_config({"sgd": {"lr": 0.5}, "groups": groups, **fields})


def group(groups: list[DenseGroup], name: str) -> DenseGroup:
    (found,) = (each for each in groups if each.name == name)
    return found


def names(groups: list[DenseGroup]) -> dict[str, list[str]]:
    return {each.name: list(each.params) for each in groups}


LIKED_TOWER = ["_towers.ml__liked.weight", "_affine.ml__liked.weight"]
REPLIED_TOWER = ["_towers.ml__replied.weight", "_affine.ml__replied.weight"]


# Which parameters


def test_a_pattern_splits_every_group_that_it_is_found_in() -> None:
    config = recap({"no_decay": {"pattern": r"bias$", "weight_decay_multiplier": 0}})
    assert names(group_parameters(Ranker(), config)) == {
        LIKED: LIKED_TOWER,
        f"{LIKED}.no_decay": [name.replace("weight", "bias") for name in LIKED_TOWER],
        REPLIED: REPLIED_TOWER,
        f"{REPLIED}.no_decay": [name.replace("weight", "bias") for name in REPLIED_TOWER],
        "backbone": ["_backbone.0.weight"],
        "backbone.no_decay": ["_backbone.0.bias"],
    }


def test_the_first_pattern_takes_a_parameter() -> None:
    config = recap({"a": {"pattern": "_towers"}, "b": {"pattern": "_towers.*bias|_affine"}})
    found = names(group_parameters(Ranker(), config))
    assert found[f"{LIKED}.a"] == ["_towers.ml__liked.weight", "_towers.ml__liked.bias"]
    assert found[f"{LIKED}.b"] == ["_affine.ml__liked.weight", "_affine.ml__liked.bias"]
    assert list(found) == [
        f"{LIKED}.a", f"{LIKED}.b", f"{REPLIED}.a", f"{REPLIED}.b", "backbone"
    ]  # fmt: skip


def test_patterns_see_names_without_wrappers() -> None:
    model = nn.DataParallel(Ranker())
    config = recap({"first": {"pattern": r"^_backbone\.0\."}})
    assert names(group_parameters(model, config))["backbone.first"] == [
        "module._backbone.0.weight",
        "module._backbone.0.bias",
    ]


def test_a_group_of_a_task_that_is_called_like_a_split_one() -> None:
    model = Ranker(("a", "a.b"))
    rates = {"tower_learning_rates": {"a": RAMP, "a.b": RAMP}, "backbone_learning_rate": RAMP}
    config = {"adam": {}, "multi_task_learning_rates": rates, "groups": {"b": {"pattern": "bias"}}}
    assert [each.name for each in group_parameters(model, config)] == [
        "a", "a.b_", "a.b", "a.b.b", "backbone", "backbone.b"
    ]  # fmt: skip


def test_one_group_of_everything_is_split_too() -> None:
    model = Ranker()
    config = generic({"biases": {"pattern": "bias", "lr_multiplier": 2}, "ALL_PARAMS": {}})
    groups = group_parameters(model, config)
    assert [each.name for each in groups] == ["ALL_PARAMS", "ALL_PARAMS.biases"]
    assert groups[1].learning_rate == LearningRate(constant=1.0)
    single = {"adam": {}, "single_task_learning_rate": RAMP, "groups": {"b": {"pattern": "bias"}}}
    assert [each.name for each in group_parameters(model, single)] == [
        "single_task", "single_task.b"
    ]  # fmt: skip


@pytest.mark.parametrize("fuse", [False, True])
def test_tables_of_their_own_are_left_alone(fuse: bool) -> None:
    model = EmbeddingRanker()
    if fuse:
        fuse_embeddings(model, EMBEDDING_RATE)
    config = recap({"weights": {"pattern": "weight$", "lr_multiplier": 2}})
    optimizer, scheduler = build.build_optimizer(model, config, EMBEDDING_RATE)
    assert scheduler.group_names[-1] == ("backbone.weights" if fuse else "dense_ebc")
    assert optimizer.param_groups[-1]["lr"] == 0


def test_without_entries_nothing_is_different() -> None:
    groups = group_parameters(Ranker(), multi_task_config())
    assert {each.algorithm for each in groups} == {"adam"}
    assert [each.name for each in groups] == [LIKED, REPLIED, "backbone"]


# Options


def test_options_of_a_group_by_its_name() -> None:
    config = recap(
        {
            LIKED: {"sgd": {"momentum": 0.5, "weight_decay": 0.25}, "lr_multiplier": 0.5},
            "backbone": {"weight_decay_multiplier": 2},
        }
    )
    groups = group_parameters(Ranker(), config)
    liked, replied, backbone = groups
    assert liked.algorithm == "sgd"
    assert liked.hyperparameters["momentum"] == 0.5
    assert liked.hyperparameters["weight_decay"] == 0.25
    assert compute_lr(liked.learning_rate, 4) == 0.25
    assert (replied.algorithm, replied.hyperparameters["weight_decay"]) == ("adam", 0.5)
    assert (backbone.algorithm, backbone.hyperparameters["weight_decay"]) == ("adam", 1.0)
    assert backbone.learning_rate == LearningRate(constant=0.125)


ENTRIES: dict[str, tuple[dict[str, Any], tuple[str, float, float]]] = {
    "neither has an algorithm: both multiply": (
        {
            LIKED: {"lr_multiplier": 0.5, "weight_decay_multiplier": 0.5},
            "x": {"pattern": "bias", "lr_multiplier": 4, "weight_decay_multiplier": 8},
        },
        ("adam", 1.0, 2.0),
    ),
    "the group's algorithm: both multiply": (
        {
            LIKED: {"adamw": {"weight_decay": 0.25}, "weight_decay_multiplier": 0.5},
            "x": {"pattern": "bias", "weight_decay_multiplier": 8},
        },
        ("adamw", 0.5, 1.0),
    ),
    "the pattern's algorithm: it alone multiplies the decay": (
        {
            LIKED: {"sgd": {}, "lr_multiplier": 0.5, "weight_decay_multiplier": 0},
            "x": {"pattern": "bias", "adamw": {}, "weight_decay_multiplier": 2},
        },
        ("adamw", 0.25, 0.02),
    ),
    "the order of entries by name and by pattern does not matter": (
        {
            "x": {"pattern": "bias", "lr_multiplier": 4},
            LIKED: {"lr_multiplier": 0.5},
        },
        ("adam", 1.0, 0.5),
    ),
    "a multiplier of 0": (
        {"x": {"pattern": "bias", "lr_multiplier": 0, "weight_decay_multiplier": 0}},
        ("adam", 0.0, 0.0),
    ),
}


@pytest.mark.parametrize(("entries", "expected"), ENTRIES.values(), ids=ENTRIES)
def test_which_entry_wins(entries: dict[str, Any], expected: tuple[str, float, float]) -> None:
    split = group(group_parameters(Ranker(), recap(entries)), f"{LIKED}.x")
    rate = compute_lr(split.learning_rate, 100)  # after the ramp, which ends at 0.5
    assert (split.algorithm, rate, split.hyperparameters["weight_decay"]) == expected


def test_a_generic_algorithm_brings_its_own_rate_unless_there_is_a_schedule() -> None:
    entries = {
        "ALL_PARAMS": {"lr_multiplier": 0.5},
        "x": {"pattern": "bias", "adam": {"lr": 0.125}, "lr_multiplier": 2},
    }
    rates = [each.learning_rate.constant for each in group_parameters(Ranker(), generic(entries))]
    assert rates == [0.25, 0.25]
    config = generic(entries, learning_rate={"constant": 1.0})
    rates = [each.learning_rate.constant for each in group_parameters(Ranker(), config)]
    assert rates == [0.5, 1.0]


SCHEDULES = [
    {"constant": 0.3},
    {"piecewise_constant": {"learning_rate_boundaries": [2], "learning_rate_values": [0.3, 0.7]}},
    RAMP,
    {
        "linear_ramp_to_cosine": {
            "learning_rate": 0.3,
            "final_learning_rate": 0.01,
            "num_ramp_steps": 2,
            "final_num_steps": 6,
        }
    },
]


@pytest.mark.parametrize("factor", [0, 0.1, 1, 3])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: next(iter(schedule)))
def test_a_multiplied_schedule_is_the_schedule_multiplied(
    schedule: dict[str, Any], factor: float
) -> None:
    rate = LearningRate.model_validate(schedule)
    for step in range(9):
        expected = factor * compute_lr(rate, step)
        # The factor is applied before the formula instead of after it: some roundings apart.
        assert compute_lr(rate.times(factor), step) == pytest.approx(expected, rel=1e-14, abs=0)


# Training

MIXED = recap(
    {
        "backbone": {"adagrad": {"eps": 1e-8, "weight_decay": 0.125}},
        LIKED: {"adamw": {"weight_decay": 0.5}, "lr_multiplier": 0.5},
        "biases": {"pattern": r"bias$", "weight_decay_multiplier": 0.0, "lr_multiplier": 2.0},
        "gains": {"pattern": r"^_affine\..*weight", "sgd": {"momentum": 0.5}, "lr_multiplier": 0.1},
    }
)


def by_hand(model: nn.Module) -> list[tuple[torch.optim.Optimizer, Callable[[int], float]]]:
    """What `MIXED` says, group by group, in torch's own words."""
    named = dict(model.named_parameters())

    def ramp(step: int) -> float:
        return min(0.5, 0.5 / 4 * step)

    adamw = {"lr": 0.0, "betas": (0.9, 0.999), "eps": 1e-7}
    return [
        (torch.optim.AdamW([named["_towers.ml__liked.weight"]], weight_decay=0.5, **adamw),
         lambda step: 0.5 * ramp(step)),
        (torch.optim.AdamW([named["_towers.ml__liked.bias"], named["_affine.ml__liked.bias"]],
                           weight_decay=0.0, **adamw),
         ramp),
        (torch.optim.SGD([named["_affine.ml__liked.weight"]], lr=0.0, momentum=0.5),
         lambda step: 0.05 * ramp(step)),
        (torch.optim.Adam([named["_towers.ml__replied.weight"]], weight_decay=0.5, **adamw),
         lambda step: 0.25),
        (torch.optim.Adam([named["_towers.ml__replied.bias"], named["_affine.ml__replied.bias"]],
                          **adamw),
         lambda step: 0.5),
        (torch.optim.SGD([named["_affine.ml__replied.weight"]], lr=0.0, momentum=0.5),
         lambda step: 0.025),
        (torch.optim.Adagrad([named["_backbone.0.weight"]], lr=0.0, eps=1e-8, weight_decay=0.125),
         lambda step: 0.125),
        (torch.optim.Adagrad([named["_backbone.0.bias"]], lr=0.0, eps=1e-8),
         lambda step: 0.25),
    ]  # fmt: skip


def ranker() -> Ranker:
    torch.manual_seed(0)
    return Ranker().double()


def batch(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, 20, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("build_optimizer", BUILDERS.values(), ids=BUILDERS)
def test_training_is_torchs(build_optimizer: Callable[..., Any]) -> None:
    ours, theirs = ranker(), ranker()
    optimizer, scheduler = build_optimizer(ours, MIXED)
    optimizers = by_hand(theirs)
    for step in range(8):
        for each, rate in optimizers:
            each.param_groups[0]["lr"] = rate(step)
            each.zero_grad()
        optimizer.zero_grad()
        for model in (ours, theirs):
            model(batch(step)).square().mean().backward()
        optimizer.step()
        scheduler.step()
        for each, _ in optimizers:
            each.step()
    for (name, param), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        # float64: the order of roundings only.
        torch.testing.assert_close(param, expected, rtol=1e-9, atol=1e-12, msg=name)
    assert len(scheduler.group_names) == len(optimizer.param_groups) == len(optimizers)


def test_groups_of_several_algorithms_step_natively() -> None:
    optimizer, _ = build.build_optimizer(ranker(), MIXED)
    kinds = {type(part._optimizer) for _, part in optimizer.optimizers}
    assert {FusedAdam, FusedAdamW, FusedSGD} < kinds
    assert not optimizer._others


@pytest.mark.parametrize("loaded", BUILDERS.values(), ids=BUILDERS)
@pytest.mark.parametrize("saved", BUILDERS.values(), ids=BUILDERS)
def test_a_checkpoint_names_the_groups_and_resumes(
    saved: Callable[..., Any], loaded: Callable[..., Any]
) -> None:
    def train(model: nn.Module, optimizer: Any, scheduler: Any, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            model(batch(step)).square().mean().backward()
            optimizer.step()
            scheduler.step()

    model = ranker()
    optimizer, scheduler = saved(model, MIXED)
    train(model, optimizer, scheduler, range(3))
    states = optimizer.state_dict(), scheduler.state_dict()
    assert states[1]["group_names"] == [each.name for each in group_parameters(model, MIXED)]

    resumed = ranker()
    resumed.load_state_dict(model.state_dict())
    other_optimizer, other_scheduler = loaded(resumed, MIXED)
    other_optimizer.load_state_dict(states[0])
    other_scheduler.load_state_dict(states[1])
    train(model, optimizer, scheduler, range(3, 6))
    train(resumed, other_optimizer, other_scheduler, range(3, 6))
    for param, expected in zip(resumed.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(param, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("build_optimizer", BUILDERS.values(), ids=BUILDERS)
def test_each_group_is_logged_with_its_algorithm(
    build_optimizer: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="recap_fast"):
        build_optimizer(ranker(), MIXED)
    assert f"{LIKED}.gains: 1 tensors, 1 elements, sgd" in caplog.messages
    assert "backbone.biases: 1 tensors, 8 elements, adagrad" in caplog.messages


# Clipping


@pytest.mark.parametrize("build_optimizer", BUILDERS.values(), ids=BUILDERS)
def test_clipping_is_configured_and_overridden(build_optimizer: Callable[..., Any]) -> None:
    config = recap({}, adam={}, clip_grad_norm=0.5)
    assert build_optimizer(ranker(), config)[0].clip_grad_norm == 0.5
    assert build_optimizer(ranker(), config, clip_grad_norm=2.0)[0].clip_grad_norm == 2.0
    assert build_optimizer(ranker(), recap({}))[0].clip_grad_norm is None
    config = generic({}, clip_grad_norm=float("inf"))
    assert build_optimizer(ranker(), config)[0].clip_grad_norm == float("inf")


def test_configured_clipping_clips() -> None:
    config = generic({"b": {"pattern": "bias"}}, clip_grad_norm=1e-3)
    model = ranker()
    before = [param.detach().clone() for param in model.parameters()]
    optimizer, _ = build.build_optimizer(model, config)
    model(batch(0)).square().mean().backward()
    optimizer.step()
    moved = [now - old for now, old in zip(model.parameters(), before, strict=True)]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(each) for each in moved]))
    torch.testing.assert_close(norm.item(), 0.5e-3, rtol=1e-4, atol=0)  # lr times the norm


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), True])
def test_a_norm_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="clip_grad_norm"):
        recap({}, adam={}, clip_grad_norm=value)


# What is refused


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            {"ml.likd": {"lr_multiplier": 2}},
            "groups: there is no group 'ml.likd' of dense parameters; did you mean 'ml.liked'? "
            "Give the entry a pattern",
        ),
        ({"bone": {}}, "did you mean 'backbone'? Give the entry a pattern"),
        ({"xyz": {}}, "'backbone'. Give the entry a pattern to choose parameters by their names"),
        (
            {"x": {"pattern": "batch_norm"}},
            "the pattern 'batch_norm' of 'x' is left without a parameter; there are '_towers.",
        ),
        (
            {"x": {"pattern": "bias"}, "y": {"pattern": "_backbone.*bias"}},
            "of 'y' is left without a parameter; '_backbone.0.bias' went to the entry 'x', which",
        ),
    ],
)
def test_an_entry_for_nothing_is_refused(groups: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        group_parameters(Ranker(), recap(groups))


@pytest.mark.parametrize("fuse", [False, True])
def test_a_pattern_of_tables_is_refused(fuse: bool) -> None:
    model = EmbeddingRanker()
    if fuse:
        fuse_embeddings(model, EMBEDDING_RATE)
    config = recap({"x": {"pattern": "embedding_bags"}})
    message = "only matches 'ebc.embedding_bags.t_user.weight', .* emb_optimizer_config configures"
    with pytest.raises(ValueError, match=message):
        build.build_optimizer(model, config, EMBEDDING_RATE)
    with pytest.raises(ValueError, match="there is no group 'dense_ebc' of dense parameters"):
        build.build_optimizer(model, recap({"dense_ebc": {}}), EMBEDDING_RATE)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"pattern": "("}, "'(' is not a regular expression"),
        ({"pattern": ""}, "at least 1 character"),
        (
            {"adam": {}, "sgd": {}},
            "set at most one of adam, adamw, adagrad, sgd, rmsprop, lion; found adam and",
        ),
        ({"lr_multiplier": -1}, "lr_multiplier"),
        ({"weight_decay_multiplier": float("inf")}, "weight_decay_multiplier"),
        ({"lr": 0.5}, "lr\n  Extra inputs"),
    ],
)
def test_a_wrong_entry_is_refused(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        recap({"x": entry})
    assert isinstance(error.value.__cause__, ValidationError)
    assert "groups.x" in str(error.value)


def test_features_reach_the_model() -> None:
    """The split groups of a model with tables train them all."""
    model = EmbeddingRanker()
    config = recap({"biases": {"pattern": "bias"}})
    optimizer, scheduler = build.build_optimizer(model, config, EMBEDDING_RATE)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    for step in range(3):
        optimizer.zero_grad()
        model(features(step)).square().mean().backward()
        optimizer.step()
        scheduler.step()
    assert not [
        name for name, param in model.named_parameters() if torch.equal(param, before[name])
    ]
