"""Models with embedding tables, and configurations of them."""

from __future__ import annotations

from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from recap_fast.config import EmbeddingOptimizerConfig
from recap_fast.embeddings.fused_optimizer import KernelOptimizer
from recap_fast.embeddings.kernel_arguments import kernel_arguments
from tests.support.models import EmbeddingRanker

# Those of an `EmbeddingRanker`.
TABLES = ["ebc.embedding_bags.t_user.weight", "ebc.embedding_bags.t_item.weight"]


def config_of(**options: Any) -> EmbeddingOptimizerConfig:
    """A configuration, with a rate of 0.5 unless there is another."""
    return EmbeddingOptimizerConfig.model_validate({"learning_rate": {"constant": 0.5}, **options})


def ranker(seed: int = 0) -> EmbeddingRanker:
    torch.manual_seed(seed)
    return EmbeddingRanker()


class Pooled(nn.Module):
    """A collection of its own tables below another module, without the rest of a model."""

    def __init__(self, *configs: EmbeddingBagConfig, is_weighted: bool = False) -> None:
        super().__init__()
        collection = EmbeddingBagCollection(list(configs), is_weighted=is_weighted)
        self.inner = nn.ModuleDict({"ebc": collection})
        for index, bag in enumerate(collection.embedding_bags.values()):
            generator = torch.Generator().manual_seed(index)
            nn.init.uniform_(bag.weight, -2, 2, generator=generator)


def fqn(table: str) -> str:
    """The name of a table of `Pooled`."""
    return f"inner.ebc.embedding_bags.{table}.weight"


def set_rate(model: nn.Module, rate: float) -> None:
    """Hands a rate to the kernels of fused tables."""
    for group in model.fused_optimizer.param_groups:
        group["lr"] = rate
    model.fused_optimizer.step()


def kernel_optimizer(**options: Any) -> KernelOptimizer:
    """For CUDA, but on the meta device, where FBGEMM makes it all the same."""
    arguments = kernel_arguments(config_of(**options))
    specs = [(6, 8, EmbeddingLocation.DEVICE, ComputeDevice.CUDA)]
    kernel = SplitTableBatchedEmbeddingBagsCodegen(specs, device=torch.device("meta"), **arguments)
    return KernelOptimizer(["t.weight"], kernel)
