"""A model of fused tables beside the same one unfused, for tests of what a user does to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recap_fast.config import EmbeddingOptimizerConfig
from recap_fast.embeddings import fuse_embeddings
from tests.support.table_reference import table

ROWS = 6
# The first has two features, the last another width. They share an FBGEMM module.
TABLES = (table("a", "x", "y"), table("b", "z"), table("c", "w", dim=4))
FEATURES = ("x", "y", "z", "w")
# All that there is on the CPU.
ALGORITHMS: dict[str, dict[str, Any]] = {
    "sgd": {"sgd": {}},
    "adagrad": {"adagrad": {}},
    "rowwise_adagrad": {"rowwise_adagrad": {}},
    "counter": {
        "rowwise_adagrad": {
            "weight_decay": 0.01,
            "weight_decay_mode": "counter",
            "counter": {"counter_weight_decay_mode": "adagradw"},
        }
    },
    "cowclip": {
        "rowwise_adagrad": {
            "weight_decay_mode": "cowclip",
            "cowclip": {"weight_norm_coefficient": 0.5, "lower_bound": 0.1},
        }
    },
    "ema": {"ema_rowwise_adagrad": {"step_ema": 2, "step_ema_coef": 0.5}},
}


class Towers(nn.Module):
    """Tables, and a dense parameter that their outputs are added to."""

    def __init__(
        self, configs: Sequence[EmbeddingBagConfig] = TABLES, is_weighted: bool = False
    ) -> None:
        super().__init__()
        self.ebc = EmbeddingBagCollection(list(configs), is_weighted=is_weighted)
        self.bias = nn.Parameter(torch.zeros(1))
        for index, bag in enumerate(self.ebc.embedding_bags.values()):
            nn.init.uniform_(bag.weight, -1, 1, generator=torch.Generator().manual_seed(index))

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        return self.ebc(features).values() + self.bias


def fused(config: EmbeddingOptimizerConfig, **options: Any) -> nn.Module:
    return fuse_embeddings(Towers(**options), config)


def batch(
    seed: int, size: int = 4, is_weighted: bool = False, learns_weights: bool = False
) -> KeyedJaggedTensor:
    """Bags of 0 to 3 ids, some of them twice."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (len(FEATURES) * size,), generator=generator)
    count = int(lengths.sum())
    weights = torch.rand(count, generator=generator) + 0.5 if is_weighted else None
    return KeyedJaggedTensor(
        keys=list(FEATURES),
        values=torch.randint(0, ROWS, (count,), generator=generator),
        lengths=lengths,
        weights=None if weights is None else weights.requires_grad_(learns_weights),
    )


def loss_of(model: nn.Module, features: KeyedJaggedTensor, seed: int) -> torch.Tensor:
    """One whose gradient is known, and depends on the output."""
    output = model(features)
    factors = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed))
    return (output * factors + 0.1 * output.square()).sum()


def weight(model: nn.Module, name: str) -> nn.Parameter:
    return model.ebc.embedding_bags[name].weight


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: bag.weight.detach().clone() for name, bag in model.ebc.embedding_bags.items()}


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """All state of fused tables but the count of forward passes, by name."""
    return {
        f"{name} {entry}": value.clone()
        for name, entries in model.fused_optimizer.state_dict()["state"].items()
        for entry, value in entries.items()
        if entry != "step"
    }


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def assert_one_memory(model: nn.Module) -> None:
    """What the model shows, what its optimizer shows and what FBGEMM trains are the same."""
    of_optimizer = {
        name.split(".")[-2]: param.data_ptr()
        for name, param in model.fused_optimizer.params.items()
    }
    of_kernels = {
        name: value.data_ptr()
        for kernel in model.ebc._kernels
        for name, value in zip(kernel.table_names, kernel.split_embedding_weights(), strict=True)
    }
    shown = {name: bag.weight.data_ptr() for name, bag in model.ebc.embedding_bags.items()}
    assert of_optimizer == of_kernels == shown
