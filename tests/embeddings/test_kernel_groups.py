"""Which tables share a kernel; rates, states and counts of the kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torchrec.modules.embedding_configs import DataType, PoolingType

from recap_fast.embeddings import fuse_embeddings
from tests.support.models import features
from tests.support.table_reference import table
from tests.support.tables import TABLES, Pooled, config_of, fqn, ranker

SGD = config_of()
MEAN = PoolingType.MEAN
HALF = DataType.FP16

# Which tables share a kernel

FOUR = [table(name, feature) for name, feature in zip("abcd", "aabb", strict=True)]
OTHER_RATE = {"learning_rate": {"constant": 0.25}}
GROUPS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "all alike": ({}, ["abcd"]),
    "named, but alike": (
        {"a": {"sgd": {}}, "b": {"learning_rate": {"constant": 0.5}}},
        ["abcd"],
    ),
    "an algorithm": ({"b": {"adagrad": {}}, "c": {"adagrad": {}}}, ["ad", "bc"]),
    "a hyperparameter": ({"b": {"adagrad": {}}, "c": {"adagrad": {"eps": 1e-3}}}, ["ad", "b", "c"]),
    "a schedule": ({"a": OTHER_RATE, "d": OTHER_RATE}, ["ad", "bc"]),
    "schedules that start alike": (
        {
            "a": {
                "learning_rate": {
                    "piecewise_constant": {
                        "learning_rate_boundaries": [3],
                        "learning_rate_values": [0.5, 0.25],
                    }
                }
            }
        },
        ["a", "bcd"],
    ),
    "clipping": ({"d": {"gradient_clipping": 1.0}}, ["abc", "d"]),
}


@pytest.mark.parametrize(("own", "expected"), GROUPS.values(), ids=GROUPS)
def test_tables_that_agree_share_a_param_group(own: dict[str, Any], expected: list[str]) -> None:
    model = fuse_embeddings(Pooled(*FOUR), config_of(tables=own))
    params = {id(param): name for name, param in model.fused_optimizer.params.items()}
    groups = [
        [params[id(p)] for p in group["params"]] for group in model.fused_optimizer.param_groups
    ]
    assert groups == [[fqn(name) for name in group] for group in expected]
    assert len(model.inner["ebc"]._kernels) == len(expected)


def test_pooling_and_dtype_take_kernels_of_their_own() -> None:
    configs = [
        table("a", "x", pooling=MEAN),
        table("b", "x", data_type=HALF),
        table("c", "x"),
        table("d", "x", pooling=MEAN),
    ]
    groups = fuse_embeddings(Pooled(*configs), SGD).fused_optimizer.param_groups
    assert [len(group["params"]) for group in groups] == [2, 1, 1]


def test_every_table_has_its_own_algorithm_rate_and_state() -> None:
    own = {
        "b": {"adagrad": {}},
        "c": {"rowwise_adagrad": {}, **OTHER_RATE},
        "d": {"ema_rowwise_adagrad": {}},
    }
    model = fuse_embeddings(Pooled(*FOUR), config_of(tables=own))
    state = model.fused_optimizer.state_dict()["state"]
    shapes = {
        name: {key: tuple(value.shape) for key, value in state[fqn(name)].items()}
        for name in "abcd"
    }
    assert shapes == {
        "a": {},
        "b": {"sum": (6, 8)},
        "c": {"sum": (6,)},
        "d": {"sum": (6,), "step": (1,)},
    }
    assert [group["lr"] for group in model.fused_optimizer.param_groups] == [0.5, 0.5, 0.25, 0.5]


# Rates to start with


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {
                "learning_rate": {
                    "linear_ramp_to_constant": {"learning_rate": 0.8, "num_ramp_steps": 4}
                }
            },
            0,
        ),
        ({"init_learning_rate": 0.25}, 0.25),
        ({"learning_rate": None, "init_learning_rate": 0.25}, 0.25),
        ({}, 0.5),
    ],
)
def test_rate_to_start_with(options: dict[str, Any], expected: float) -> None:
    unfused, fused = ranker(), fuse_embeddings(ranker(), config_of(**options))
    assert [group["lr"] for group in fused.fused_optimizer.param_groups] == [expected]
    for model in (unfused, fused):
        model(features()).sum().backward()
    weight = unfused.get_parameter(TABLES[1])
    torch.testing.assert_close(
        fused.get_parameter(TABLES[1]).detach(), weight.detach() - expected * weight.grad
    )


# Loading state


def test_loaded_state_trains_on() -> None:
    """With "step", FBGEMM's count of forward passes."""
    config = config_of(ema_rowwise_adagrad={"step_ema": 3})
    straight, resumed = (fuse_embeddings(ranker(), config) for _ in range(2))

    def step(model: nn.Module, number: int) -> None:
        model(features(number)).sum().backward()

    for number in range(2):
        step(straight, number)
    resumed(features())  # so that it is at another pass, and has another iter_cpu
    resumed.load_state_dict(straight.state_dict())
    resumed.fused_optimizer.load_state_dict(straight.fused_optimizer.state_dict())
    for number in range(2, 5):
        step(straight, number)
        step(resumed, number)
    for name in TABLES:
        assert torch.equal(resumed.get_parameter(name), straight.get_parameter(name))
        (expected, found) = (
            model.fused_optimizer.state_dict()["state"][name] for model in (straight, resumed)
        )
        assert found["step"].tolist() == expected["step"].tolist() == [5]
        assert torch.equal(found["sum"], expected["sum"])


def test_the_count_of_forward_passes_can_be_set() -> None:
    config = config_of(ema_rowwise_adagrad={"step_ema": 5, "step_ema_coef": 1.0})
    model = fuse_embeddings(ranker(), config)
    model.fused_optimizer.set_optimizer_step(3)
    for passes in (4, 5):
        before = model.get_parameter(TABLES[1]).detach().clone()
        model(features())
        after = model.get_parameter(TABLES[1]).detach()
        assert torch.equal(after[:, 4:], before[:, :4] if passes == 5 else before[:, 4:])
