"""What the configuration of embedding tables means for the groups of dense parameters.

Tables that are not fused train with plain SGD, in groups of their own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from recap_fast.config import EmbeddingOptimizerConfig, LearningRate
from recap_fast.names import TABLES, check_table_names, is_table, some, table_name, tables_in

if TYPE_CHECKING:
    from recap_fast.grouping import DenseGroup

# What the original calls their group.
DENSE_EMBEDDINGS = "dense_ebc"

_OPTIONS = ("gradient_clipping", "stochastic_rounding")
_HOW_TO_FUSE = (
    "(recap_fast.embeddings.fuse_embeddings; for torchrec's model parallel set_table_optimizers, "
    "and another sharding than data-parallel)"
)


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


def check_tables_used(
    emb_optimizer_config: EmbeddingOptimizerConfig, groups: Iterable[DenseGroup]
) -> None:
    """Raises if a table has options beside its rate, but is trained as a dense parameter is."""
    for group in groups:
        if group.role == "dense_embeddings":
            continue
        for name in filter(is_table, group.params):
            not_fused = (
                f"but {name!r} is not fused, and belongs to the group {group.name!r}, whose "
                "optimizer trains it"
            )
            if table_name(name) in emb_optimizer_config.tables:
                raise ValueError(
                    f"emb_optimizer_config.tables has options for {table_name(name)!r}, "
                    f"{not_fused}: leave them out, or fuse it first {_HOW_TO_FUSE}"
                )
            for option in _chosen(emb_optimizer_config):
                raise ValueError(
                    f"emb_optimizer_config chooses {option} for all tables, {not_fused}: fuse it "
                    f"first {_HOW_TO_FUSE}, or choose {option} in emb_optimizer_config.tables, for "
                    "those that are fused"
                )


def _chosen(config: EmbeddingOptimizerConfig) -> list[str]:
    """Names what a configuration wants of kernels, beside the rate; the default is nothing."""
    algorithm = [] if config.algorithm_is_default else [config.algorithm[0]]
    return algorithm + [name for name in _OPTIONS if getattr(config, name)]


def split_by_schedule(
    tables: dict[str, nn.Parameter], emb_optimizer_config: EmbeddingOptimizerConfig | None
) -> list[tuple[str, dict[str, nn.Parameter], LearningRate]]:
    """Sorts unfused tables by their schedules.

    Args:
        tables: The weights, by the name of the parameter; may be empty.
        emb_optimizer_config: The configuration of all tables.

    Returns:
        Name, tables and schedule of each group: "dense_ebc" for the common schedule, and
        "dense_ebc.<first table>" for another, in the order of the tables.

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
    for algorithm in dict.fromkeys(config.algorithm[0] for config in configs.values()):
        if algorithm != "sgd":
            _refuse(algorithm, [n for n, c in configs.items() if c.algorithm[0] == algorithm])
    for field in _OPTIONS:
        chosen = [name for name, config in configs.items() if getattr(config, field)]
        if chosen:
            _refuse(field, chosen)

    groups: list[tuple[str, dict[str, nn.Parameter], LearningRate]] = []
    for name, param in tables.items():
        rate = configs[name].learning_rate
        for _, params, other in groups:
            if rate == other:
                params[name] = param
                break
        else:
            is_common = rate == emb_optimizer_config.learning_rate
            suffix = "" if is_common else f".{table_name(name)}"
            groups.append((DENSE_EMBEDDINGS + suffix, {name: param}, rate))
    return groups


def _refuse(what: str, names: Iterable[str]) -> None:
    raise ValueError(
        f"emb_optimizer_config chooses {what}, but {some(names)} are not fused, and such tables "
        f"train with plain sgd only; choose that, or fuse them first {_HOW_TO_FUSE}"
    )
