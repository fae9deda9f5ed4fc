"""Small models in the shape of a multi-task ranker, and configurations for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recap_fast.config import (
    EmbeddingOptimizerConfig,
    LearningRate,
    LinearRampToConstant,
    MultiTaskLearningRates,
    RecapAdamConfig,
    RecapOptimizerConfig,
)

LIKED, REPLIED = "ml.liked", "ml.replied"


def constant(rate: float) -> LearningRate:
    return LearningRate(constant=rate)


def ramp(rate: float, steps: int) -> LearningRate:
    return LearningRate(
        linear_ramp_to_constant=LinearRampToConstant(learning_rate=rate, num_ramp_steps=steps)
    )


def tables() -> list[EmbeddingBagConfig]:
    """A table of users, and one that the features "item" and "last_item" share."""
    return [
        EmbeddingBagConfig(
            name="t_user", num_embeddings=6, embedding_dim=4, feature_names=["user"]
        ),
        EmbeddingBagConfig(
            name="t_item", num_embeddings=9, embedding_dim=8, feature_names=["item", "last_item"]
        ),
    ]


class Ranker(nn.Module):
    """Backbone and towers: `_backbone`, `_towers.<sanitized task>`, `_affine.<sanitized task>`."""

    def __init__(self, tasks: Sequence[str] = (LIKED, REPLIED), width: int = 20) -> None:
        super().__init__()
        names = [task.replace(".", "__") for task in tasks]
        self._backbone = nn.Sequential(nn.Linear(width, 8), nn.ReLU())
        self._towers = nn.ModuleDict({name: nn.Linear(8, 1) for name in names})
        self._affine = nn.ModuleDict({name: nn.Linear(1, 1) for name in names})

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self._backbone(inputs)
        logits = [self._affine[name](tower(hidden)) for name, tower in self._towers.items()]
        return torch.cat(logits, dim=1)


class EmbeddingRanker(nn.Module):
    """A `Ranker` over the two tables of `tables()`."""

    def __init__(self, tasks: Sequence[str] = (LIKED, REPLIED)) -> None:
        super().__init__()
        self.ebc = EmbeddingBagCollection(tables())
        self.ranker = Ranker(tasks, width=20)

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        return self.ranker(self.ebc(features).values())


def features(seed: int = 0, weighted: bool = False) -> KeyedJaggedTensor:
    """Bags of 0 to 3 ids, some of them twice in one bag, for 5 examples."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (15,), generator=generator)
    total = int(lengths.sum())
    return KeyedJaggedTensor.from_lengths_sync(
        keys=["user", "item", "last_item"],
        values=torch.randint(0, 6, (total,), generator=generator),
        lengths=lengths,
        weights=torch.rand(total, generator=generator) if weighted else None,
    )


def multi_task_config(
    tasks: Sequence[str] = (LIKED, REPLIED), backbone: bool = True, **algorithm: object
) -> RecapOptimizerConfig:
    """Another ramp for each task and the backbone; Adam unless `algorithm` says otherwise."""
    return RecapOptimizerConfig(
        multi_task_learning_rates=MultiTaskLearningRates(
            tower_learning_rates={
                task: ramp(0.01 * (index + 1), 3 + index) for index, task in enumerate(tasks)
            },
            backbone_learning_rate=ramp(0.005, 2) if backbone else None,
        ),
        **(algorithm or {"adam": RecapAdamConfig()}),
    )


EMBEDDING_RATE = EmbeddingOptimizerConfig(learning_rate=ramp(0.1, 4))
