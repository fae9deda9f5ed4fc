"""The guide's lines on configuration and embeddings, run as they are written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recap_fast import build_optimizer
from tests.support.models import Ranker, multi_task_config
from tests.support.processes import device, run

GUIDE = Path(__file__).parent.parent / "docs" / "guide.md"
EMBEDDINGS = GUIDE.read_text().partition("## Embeddings")[2].partition("\n## ")[0]
FUSED, SHARDED = re.findall(r"```python\n(.*?)```", EMBEDDINGS, re.DOTALL)
CONFIGURATION = GUIDE.read_text().partition("## Configuration")[2].partition("\n## Groups")[0]
EXAMPLES = re.findall(r"```python\n(.*?)```", CONFIGURATION, re.DOTALL)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 2


@pytest.mark.parametrize("code", EXAMPLES)
def test_examples_of_configurations_run(code: str) -> None:
    names = {"build_optimizer": build_optimizer, "model": Ranker()}
    exec(code, names)
    optimizer, scheduler = names["optimizer"], names["scheduler"]
    assert len(optimizer.param_groups) == len(scheduler.group_names)
    assert {"ml.liked", "ml.replied", "backbone"} <= set(scheduler.group_names)


def test_the_yaml_of_the_guide_loads(tmp_path: Path) -> None:
    from recap_fast import load_optimizer_config

    (text,) = re.findall(r"```yaml\n(.*?)```", CONFIGURATION, re.DOTALL)
    path = tmp_path / "config.yaml"
    path.write_text(text)
    config = load_optimizer_config(path)
    assert list(config.multi_task_learning_rates.tower_learning_rates) == [
        "recap.engagement.is_favorited",
        "recap.engagement.is_replied",
    ]


class Model(nn.Module):
    """A `Ranker` over the tables that the guide names, and one more."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = EmbeddingBagCollection(
            [
                EmbeddingBagConfig(
                    name=name, num_embeddings=6, embedding_dim=8, feature_names=[name]
                )
                for name in ("user", "author", "item")
            ]
        )
        self.ranker = Ranker(width=24)

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        return self.ranker(self.embeddings(features).values())


def run_and_train(*blocks: str) -> set[float]:
    """Runs blocks of the section on embeddings; the rates of all groups after a step."""
    names = {
        "build_optimizer": build_optimizer,
        "model": Model(),
        "config": multi_task_config(),
        "device": device(),
    }
    for code in blocks:
        exec(code, names)
    model, optimizer = names["model"], names["optimizer"]
    features = KeyedJaggedTensor(
        ["user", "author", "item"], torch.arange(6), lengths=torch.ones(6, dtype=torch.long)
    )
    model(features.to(device())).sum().backward()
    optimizer.step()
    names["scheduler"].step()
    return {group["lr"] for group in optimizer.param_groups}


RATES = {0.02, 0.05 / 1000}  # of the tables; those of towers and backbone are others


def test_tables_are_fused_as_in_the_guide() -> None:
    assert run_and_train(FUSED) >= RATES


def shard_as_in_the_guide() -> set[float]:
    """On every process; what is fused first in the guide is not here."""
    return run_and_train(FUSED.partition("model = fuse_embeddings")[0], SHARDED)


def test_tables_are_sharded_as_in_the_guide(table_backend: str) -> None:
    assert set().union(*run(2, shard_as_in_the_guide, backend=table_backend)) >= RATES
