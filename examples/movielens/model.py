"""The demo's ranker: embeddings, a MaskNet backbone, one tower per task; and its schedules.

The shape is that of the recap ranking model: parallel MaskNet blocks (Wang et al.,
https://arxiv.org/abs/2102.07619) whose joined outputs pass one wide layer, then an MLP per task.
Every parameter of a task has `.{task}.` in its name, with `__` for `.`.

Normalisation is by layer, not by batch: a rating's logits do not depend on the rest of the batch,
so it does not matter how a batch is split over processes.

The activation is SiLU, not ReLU: at a kink, rounding errors decide between two gradients, and any
two optimizers that round differently would soon part ways, however correct both are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import nn
from torch.nn.functional import silu
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, PoolingType

from recap_fast.config import (
    EmbeddingOptimizerConfig,
    EmbeddingRowwiseAdagradConfig,
    LearningRate,
    LinearRampToConstant,
    LinearRampToCosine,
    MultiTaskLearningRates,
    PiecewiseConstant,
    RecapAdamConfig,
    RecapOptimizerConfig,
)

from .data import DENSE_FEATURES, SPARSE_FEATURES, TASKS, Batch

MOVIELENS_TABLE_SIZES: Final[Mapping[str, int]] = {
    "user": 943,
    "item": 1682,
    "occupation": 21,
    "gender": 2,
    "age_bucket": 7,
    "genre": 19,
}


class MaskBlock(nn.Module):
    """One MaskNet block: the input, scaled by a mask computed from that same input, then a layer.

    Maps `[B, in_features]` to `[B, out_features]`.
    """

    def __init__(self, in_features: int, mask_features: int, out_features: int) -> None:
        super().__init__()
        self.mask = nn.Sequential(
            nn.Linear(in_features, mask_features),
            nn.SiLU(),
            nn.Linear(mask_features, in_features),
        )
        self.hidden = nn.Linear(in_features, out_features)
        self.norm = nn.LayerNorm(out_features)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return silu(self.norm(self.hidden(inputs * self.mask(inputs))))


class MaskNet(nn.Module):
    """Parallel mask blocks, joined by one wide layer: `[B, in_features]` to `[B, out_features]`."""

    def __init__(
        self, in_features: int, num_blocks: int, block_features: int, out_features: int
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            MaskBlock(in_features, block_features, block_features) for _ in range(num_blocks)
        )
        self.output = nn.Linear(num_blocks * block_features, out_features)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        joined = torch.cat([block(inputs) for block in self.blocks], dim=1)
        return silu(self.output(joined))


def _tower(in_features: int, hidden_features: tuple[int, ...]) -> nn.Sequential:
    """An MLP with layer normalisation and one output, the logit."""
    layers: list[nn.Module] = []
    for features in hidden_features:
        layers += [
            nn.Linear(in_features, features, bias=False),
            nn.LayerNorm(features, elementwise_affine=False),
            nn.SiLU(),
        ]
        in_features = features
    return nn.Sequential(*layers, nn.Linear(in_features, 1))


class MultiTaskRanker(nn.Module):
    """Maps a `Batch` of `B` ratings to logits, float32 `[B, len(TASKS)]`."""

    def __init__(
        self,
        table_sizes: Mapping[str, int],
        embedding_dim: int,
        num_blocks: int,
        block_features: int,
        backbone_features: int,
        tower_features: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.embeddings = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=feature,
                    embedding_dim=embedding_dim,
                    num_embeddings=table_sizes[feature],
                    feature_names=[feature],
                    pooling=PoolingType.MEAN,
                )
                for feature in SPARSE_FEATURES
            ]
        )
        embedded = embedding_dim * len(SPARSE_FEATURES)
        self.embedding_norm = nn.LayerNorm(embedded)
        self.backbone = MaskNet(
            embedded + len(DENSE_FEATURES), num_blocks, block_features, backbone_features
        )
        self.towers = nn.ModuleDict(
            {task.replace(".", "__"): _tower(backbone_features, tower_features) for task in TASKS}
        )

    def forward(self, batch: Batch) -> torch.Tensor:
        pooled = self.embeddings(batch.sparse)
        # By name: tables that are sharded over processes come in the order of the processes.
        embedded = torch.cat([pooled[feature] for feature in SPARSE_FEATURES], dim=1)
        shared = self.backbone(torch.cat([self.embedding_norm(embedded), batch.dense], dim=1))
        return torch.cat([tower(shared) for tower in self.towers.values()], dim=1)


def build_model(
    seed: int,
    *,
    table_sizes: Mapping[str, int] = MOVIELENS_TABLE_SIZES,
    embedding_dim: int = 32,
    num_blocks: int = 4,
    block_features: int = 256,
    backbone_features: int = 1024,
    tower_features: tuple[int, ...] = (256, 128),
) -> MultiTaskRanker:
    """A ranker with freshly drawn weights; torch's global random state is left as it was.

    Its embeddings are an ordinary `EmbeddingBagCollection`; `recap_fast.embeddings.fuse_embeddings`
    moves them to FBGEMM.

    Args:
        seed: equal seeds give equal weights, bit for bit.
        table_sizes: rows of the table of each sparse feature (`Dataset.table_sizes`).
        embedding_dim: columns of every table, a multiple of 4.
        num_blocks: parallel mask blocks in the backbone.
        block_features: width of each block, of its mask too.
        backbone_features: width of the backbone's output.
        tower_features: widths of the hidden layers of each tower.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MultiTaskRanker(
            table_sizes,
            embedding_dim,
            num_blocks,
            block_features,
            backbone_features,
            tower_features,
        )


def optimizer_configs(total_steps: int) -> tuple[RecapOptimizerConfig, EmbeddingOptimizerConfig]:
    """Adam for towers and backbone, row-wise Adagrad for the tables, for `total_steps` >= 1 steps.

    Each of the four kinds of schedule drives at least one group.
    """
    ramp = max(1, total_steps // 10)
    half, late = max(1, total_steps // 2), max(2, total_steps * 4 // 5)
    liked, loved, disliked = TASKS
    tower_learning_rates = {
        liked: LearningRate(
            linear_ramp_to_constant=LinearRampToConstant(
                learning_rate=3e-4, num_ramp_steps=2 * ramp
            )
        ),
        loved: LearningRate(
            linear_ramp_to_cosine=LinearRampToCosine(
                learning_rate=1e-3,
                final_learning_rate=2e-5,
                num_ramp_steps=ramp,
                final_num_steps=max(ramp + 1, total_steps),
            )
        ),
        disliked: LearningRate(
            piecewise_constant=PiecewiseConstant(
                learning_rate_boundaries=[half, late], learning_rate_values=[5e-4, 1e-4, 2e-5]
            )
        ),
    }
    backbone_learning_rate = LearningRate(
        linear_ramp_to_cosine=LinearRampToCosine(
            learning_rate=2e-4,
            final_learning_rate=1e-5,
            num_ramp_steps=3 * ramp,
            final_num_steps=max(3 * ramp + 1, total_steps),
        )
    )
    dense = RecapOptimizerConfig(
        multi_task_learning_rates=MultiTaskLearningRates(
            tower_learning_rates=tower_learning_rates,
            backbone_learning_rate=backbone_learning_rate,
        ),
        adam=RecapAdamConfig(),
    )
    embeddings = EmbeddingOptimizerConfig(
        learning_rate=LearningRate(constant=0.02), rowwise_adagrad=EmbeddingRowwiseAdagradConfig()
    )
    return dense, embeddings
