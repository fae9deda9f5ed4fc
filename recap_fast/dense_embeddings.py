"""Embedding tables that are not fused: they train with plain SGD, in dense groups."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from recap_fast.config import EmbeddingOptimizerConfig, LearningRate
from recap_fast.names import some, table_name

# What the original calls their group.
DENSE_EMBEDDINGS = "dense_ebc"


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
    for field in ("gradient_clipping", "stochastic_rounding"):
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
        "train with plain sgd only; choose that, or fuse them first "
        "(recap_fast.embeddings.fuse_embeddings; for torchrec's model parallel "
        "set_table_optimizers, and another sharding than data-parallel)"
    )
