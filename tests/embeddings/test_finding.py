"""`find_fused_optimizer`, and kernels that are not as the configuration says."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim import keyed

from recap_fast import build_optimizer, reference
from recap_fast.embeddings import find_fused_optimizer, fuse_embeddings
from recap_fast.embeddings.algorithms import TABLE_ALGORITHMS
from recap_fast.embeddings.check_kernels import check_built_kernels
from tests.support.models import multi_task_config
from tests.support.tables import TABLES, config_of, kernel_optimizer, ranker

SGD = config_of()


def test_finds_the_fused_optimizer_through_wrappers() -> None:
    model = fuse_embeddings(ranker(), SGD)
    expected = model.fused_optimizer
    assert find_fused_optimizer(model) is expected
    assert find_fused_optimizer(torch.compile(model)) is expected
    assert find_fused_optimizer(nn.DataParallel(model)) is expected
    assert find_fused_optimizer(torch.compile(nn.DataParallel(model))) is expected


def test_an_empty_fused_optimizer_counts_as_none() -> None:
    model = ranker()
    assert find_fused_optimizer(model) is None
    model.fused_optimizer = keyed.CombinedOptimizer([])
    assert find_fused_optimizer(model) is None
    model.fused_optimizer = keyed.KeyedOptimizer({}, {}, [])
    assert find_fused_optimizer(model) is None


def test_a_fused_optimizer_without_tables_on_this_rank_counts() -> None:
    model = ranker()
    model.fused_optimizer = keyed.CombinedOptimizer([("ebc", keyed.CombinedOptimizer([]))])
    assert find_fused_optimizer(model) is model.fused_optimizer


def test_fused_optimizers_of_parts_are_found() -> None:
    inner = fuse_embeddings(ranker(), SGD)
    expected = [f"0.{name}" for name in inner.fused_optimizer.params]
    assert list(find_fused_optimizer(nn.Sequential(inner, nn.Sigmoid())).params) == expected


def of_another_model(model: nn.Module) -> nn.Module:
    other = nn.Module()
    other.other = EmbeddingBagCollection(
        [EmbeddingBagConfig(name="t", num_embeddings=3, embedding_dim=4, feature_names=["f"])]
    )
    model.fused_optimizer = fuse_embeddings(other, SGD).fused_optimizer
    return model


CHANGED: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "cast": (nn.Module.double, "the fused table t_user is of torch.float64 now"),
    "another optimizer": (of_another_model, f"fused_optimizer has no {TABLES[0]}"),
}


@pytest.mark.parametrize(("change", "message"), CHANGED.values(), ids=CHANGED)
def test_tables_that_the_optimizer_does_not_have_are_refused(
    change: Callable[[nn.Module], nn.Module], message: str
) -> None:
    model = change(fuse_embeddings(ranker(), config_of(adagrad={})))
    with pytest.raises(ValueError, match=re.escape(message)):
        find_fused_optimizer(model)


def test_compiling_a_part_of_a_fused_model_changes_nothing() -> None:
    model = nn.ModuleDict({"ranker": ranker(), "last": nn.Linear(2, 1)})
    fuse_embeddings(model, SGD)
    model["ranker"] = torch.compile(model["ranker"])
    assert find_fused_optimizer(model) is model.fused_optimizer


def test_something_else_called_fused_optimizer_is_refused() -> None:
    model = ranker()
    model.fused_optimizer = math.inf
    with pytest.raises(TypeError, match=r"must be a torchrec.*found float"):
        find_fused_optimizer(model)


# Kernels and configuration

MADE = config_of(
    adagrad={"eps": 1e-3},
    gradient_clipping=2.0,
    tables={"t_item": {"ema_rowwise_adagrad": {"step_ema": 7}}},
)
SAME: dict[str, dict[str, Any]] = {
    "the same": MADE.model_dump(exclude_none=True),
    "only rates": {"tables": {"t_item": {"learning_rate": {"constant": 0.5}}}},
}
OTHER: dict[str, tuple[dict[str, Any], str]] = {
    "algorithm": (
        {"rowwise_adagrad": {}},
        "optimizer=exact_row_wise_adagrad for the table t_user, but it was made with exact_adagrad",
    ),
    "hyperparameter": (
        {"adagrad": {}},
        "eps=1e-08 for the table t_user, but it was made with 0.001",
    ),
    "clipping": (
        {"gradient_clipping": 1.0},
        "max_gradient=1.0 for the table t_user, but it was made with 2.0",
    ),
    "of one table": (
        {"tables": {"t_item": {"ema_rowwise_adagrad": {}}}},
        "step_ema=10, step_start=0, step_ema_coef=0.6) for the table t_item, but it was made with",
    ),
}


@pytest.mark.parametrize("build", [build_optimizer, reference.build_optimizer])
@pytest.mark.parametrize("options", SAME.values(), ids=SAME)
def test_the_configuration_that_tables_were_made_with_is_fine(
    options: dict[str, Any], build: Callable[..., Any]
) -> None:
    model = fuse_embeddings(ranker(), MADE)
    build(model, multi_task_config(), config_of(**options))


@pytest.mark.parametrize("build", [build_optimizer, reference.build_optimizer])
@pytest.mark.parametrize(("options", "message"), OTHER.values(), ids=OTHER)
def test_another_configuration_is_refused(
    options: dict[str, Any], message: str, build: Callable[..., Any]
) -> None:
    model = fuse_embeddings(ranker(), MADE)
    with pytest.raises(ValueError, match=re.escape(message)):
        build(model, multi_task_config(), config_of(**options))


COUNTER = {"weight_decay_mode": "counter", "counter": {"learning_rate_mode": "counter_sgd"}}
# What a kernel has beyond its algorithm, and what it should have without.
ADDED: dict[str, tuple[dict[str, Any], str]] = {
    "clipping": ({"adagrad": {}, "gradient_clipping": 2.0}, "gradient_clipping=False"),
    "rounding": ({"adagrad": {}, "stochastic_rounding": False}, "stochastic_rounding=True"),
    "max_norm": ({"rowwise_adagrad": {"max_norm": 2.0}}, "max_norm=0.0"),
    "counter without decay": ({"rowwise_adagrad": COUNTER}, "weight_decay_mode=0"),
    "rowwise_bias_correction": (
        {"adam": {"rowwise_bias_correction": True}},
        "UserEnabledConfigDefinition(use_rowwise_bias_correction=False",
    ),
}


@pytest.mark.parametrize(("options", "message"), ADDED.values(), ids=ADDED)
def test_what_a_kernel_has_beyond_the_configuration_is_refused(
    options: dict[str, Any], message: str
) -> None:
    fused = kernel_optimizer(**options)
    check_built_kernels(nn.Module(), fused, config_of(**options))
    algorithm, *_ = options
    with pytest.raises(ValueError, match=re.escape(message) + r".* for the table t, but it was"):
        check_built_kernels(nn.Module(), fused, config_of(**{algorithm: {}}))
    # No algorithm is chosen: it is the kernel's maker who chose all of that.
    check_built_kernels(nn.Module(), fused, config_of())


@pytest.mark.parametrize("algorithm", TABLE_ALGORITHMS)
def test_a_kernel_of_an_algorithm_alone_is_fine(algorithm: str) -> None:
    fused = kernel_optimizer(**{algorithm: {}})
    check_built_kernels(nn.Module(), fused, config_of(**{algorithm: {}}))
