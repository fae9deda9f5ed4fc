"""What the configuration of embedding tables means for the groups of dense parameters.

Tables that are not fused train as configured too, in groups of their own, where FBGEMM's arithmetic
can be had with a gradient of the whole table.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch
from torch import nn

from recap_fast.config import (
    EmbeddingAdagradConfig,
    EmbeddingAdamConfig,
    EmbeddingOptimizerConfig,
    EmbeddingRowwiseAdagradConfig,
    LearningRate,
)
from recap_fast.names import TABLES, check_table_names, some, table_name, tables_in

# What the original calls their group.
DENSE_EMBEDDINGS: Final = "dense_ebc"

_COMMON_OPTIONS: Final = ("gradient_clipping", "stochastic_rounding")
_HOW_TO_FUSE: Final = (
    "(recap_fast.embeddings.fuse_embeddings; for torchrec's model parallel set_table_optimizers, "
    "and another sharding than data-parallel)"
)

TableAlgorithm = Literal["sgd", "adagrad", "rowwise_adagrad", "lazy_adamw"]


@dataclass(frozen=True)
class TableGroup:
    """Unfused tables that share a schedule and an algorithm.

    Attributes:
        name: "dense_ebc" for what holds for all tables, else "dense_ebc.<first table>".
        params: The weights, by the name of the parameter.
        learning_rate: The schedule.
        algorithm: One of `recap_fast.assembly.OptimizerClasses`.
        hyperparameters: Arguments of that class.
    """

    name: str
    params: dict[str, nn.Parameter]
    learning_rate: LearningRate
    algorithm: TableAlgorithm
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)


def check_embedding_config(
    emb_optimizer_config: EmbeddingOptimizerConfig,
    names: Collection[str],
    fused_params: Mapping[str, torch.Tensor] | None,
) -> None:
    """Raises if a table that is configured does not exist, or one that exists has no rate."""
    fused = fused_params or {}
    check_table_names(emb_optimizer_config, [*tables_in(names), *map(table_name, fused)])
    tables = dict.fromkeys([*fused, *(name for name in names if TABLES in name)])
    own_rates = emb_optimizer_config.table_learning_rates
    without = [name for name in tables if table_name(name) not in own_rates]
    if emb_optimizer_config.learning_rate is None and (without or not tables):
        raise ValueError(
            "emb_optimizer_config has no learning_rate: set it"
            + (f", since {some(without)} have none of their own" if own_rates else "")
        )


def is_configured(emb_optimizer_config: EmbeddingOptimizerConfig, table: str) -> bool:
    """Returns whether the configuration says more of a table than the common rate.

    Then it decides how the table trains, whatever module the table is in.
    """
    if table in emb_optimizer_config.tables:
        return True
    chosen = any(getattr(emb_optimizer_config, name) for name in _COMMON_OPTIONS)
    return chosen or not emb_optimizer_config.algorithm_is_default


def lacks(config: EmbeddingOptimizerConfig, dtype: torch.dtype) -> str:
    """Returns what an optimizer of dense parameters lacks to train a table; empty: nothing.

    Args:
        config: What holds for the table (`EmbeddingOptimizerConfig.for_table`).
        dtype: Of the table.
    """
    algorithm, section = config.algorithm
    if algorithm not in ("sgd", "adagrad", "rowwise_adagrad", "adam"):
        return algorithm
    for name in _COMMON_OPTIONS:
        if getattr(config, name):
            return name
    if algorithm in ("adagrad", "adam") and dtype not in (torch.float32, torch.float64):
        # State would have the dtype of the table, and FBGEMM's is float32.
        return f"{algorithm} for a table of {str(dtype).removeprefix('torch.')}"
    if isinstance(section, EmbeddingAdagradConfig) and section.eps == 0:
        return "adagrad.eps of 0, by which rows without a gradient would become NaN"
    if isinstance(section, EmbeddingRowwiseAdagradConfig):
        if section.max_norm is not None:
            return "rowwise_adagrad.max_norm"
        if section.weight_decay_mode not in (None, "l2", "decouple"):
            return f"rowwise_adagrad.weight_decay_mode {section.weight_decay_mode}"
    if isinstance(section, EmbeddingAdamConfig) and section.rowwise_bias_correction:
        return "adam.rowwise_bias_correction"
    return ""


def table_groups(
    tables: dict[str, nn.Parameter], emb_optimizer_config: EmbeddingOptimizerConfig | None
) -> list[TableGroup]:
    """Sorts unfused tables by schedule, algorithm and hyperparameters.

    Args:
        tables: The weights, by the name of the parameter; may be empty.
        emb_optimizer_config: The configuration of all tables.

    Returns:
        The groups, in the order of the tables.

    Raises:
        ValueError: There is no configuration, or it chooses what such tables do not have.
    """
    if not tables:
        return []
    if emb_optimizer_config is None:
        raise ValueError(
            f"the embedding tables {some(tables)} have no learning rate: pass "
            "emb_optimizer_config with a learning_rate"
        )
    configs = {name: emb_optimizer_config.for_table(table_name(name)) for name in tables}
    lacking: dict[str, list[str]] = {}
    for name, config in configs.items():
        lacking.setdefault(lacks(config, tables[name].dtype), []).append(name)
    for what, names in lacking.items():
        if what:
            raise ValueError(
                f"emb_optimizer_config chooses {what}, but {some(names)} are not fused, and such "
                "tables have sgd, adagrad, rowwise_adagrad (with l2 or decouple) and adam only, "
                f"without {' and '.join(_COMMON_OPTIONS)}; choose one of these, or fuse them first "
                f"{_HOW_TO_FUSE}"
            )

    common = (emb_optimizer_config.learning_rate, *_optimizer(emb_optimizer_config))
    groups: list[TableGroup] = []
    for name, param in tables.items():
        rate = configs[name].learning_rate
        assert rate is not None, "check_embedding_config has seen to it"
        algorithm, hyperparameters = _optimizer(configs[name])
        for group in groups:
            if (rate, algorithm, hyperparameters) == (
                group.learning_rate,
                group.algorithm,
                group.hyperparameters,
            ):
                group.params[name] = param
                break
        else:
            is_common = (rate, algorithm, hyperparameters) == common
            suffix = "" if is_common else f".{table_name(name)}"
            groups.append(
                TableGroup(
                    DENSE_EMBEDDINGS + suffix, {name: param}, rate, algorithm, hyperparameters
                )
            )
    return groups


def _optimizer(config: EmbeddingOptimizerConfig) -> tuple[TableAlgorithm, dict[str, Any]]:
    """Returns the algorithm of a table, and its arguments, by which it trains as on FBGEMM."""
    _, section = config.algorithm
    if isinstance(section, EmbeddingAdagradConfig):
        return "adagrad", {"eps": section.eps}
    if isinstance(section, EmbeddingRowwiseAdagradConfig):
        return "rowwise_adagrad", {
            "eps": section.eps,
            "weight_decay": section.weight_decay,
            "decoupled_weight_decay": section.weight_decay_mode == "decouple",
        }
    if isinstance(section, EmbeddingAdamConfig):
        return "lazy_adamw", {
            "betas": (section.beta_1, section.beta_2),
            "eps": section.eps,
            "weight_decay": section.weight_decay,
        }
    return "sgd", {}
