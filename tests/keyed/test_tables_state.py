"""The state of a table in a state dict goes to one that is fused, and back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import recap_fast
import recap_fast.reference
from recap_fast.config import EmbeddingOptimizerConfig
from recap_fast.embeddings import fuse_embeddings
from recap_fast.embeddings.fused_optimizer import KernelOptimizer
from recap_fast.keyed.load import as_tables_have_it
from tests.support.table_reference import table
from tests.support.table_training import DENSE, Tables, train
from tests.support.tables import kernel_optimizer

CONFIGS = [table("a", "user", "item"), table("b", "item", "last_item", dim=16, rows=9)]
ALGORITHMS: dict[str, dict[str, Any]] = {
    "sgd": {"sgd": {}},
    "adagrad": {"adagrad": {"eps": 0.5}},
    "rowwise_adagrad": {"rowwise_adagrad": {"eps": 0.5}},
    "decay": {"rowwise_adagrad": {"weight_decay": 0.125, "weight_decay_mode": "l2"}},
}
BUILDERS = {"fast": recap_fast.build_optimizer, "reference": recap_fast.reference.build_optimizer}


def model(config: EmbeddingOptimizerConfig, fused: bool) -> Tables:
    return fuse_embeddings(Tables(CONFIGS), config) if fused else Tables(CONFIGS)


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("to_fused", [True, False])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_training_goes_on(name: str, to_fused: bool, builder: str) -> None:
    """Saved in one, it goes on in the other as it would have where it was."""
    config = EmbeddingOptimizerConfig(learning_rate={"constant": 0.5}, **ALGORITHMS[name])
    build = BUILDERS[builder]
    first, then = model(config, not to_fused), model(config, to_fused)
    optimizer = train(first, CONFIGS, config, range(3), build)
    saved = copy.deepcopy(optimizer.state_dict())
    then.load_state_dict(first.state_dict())

    def build_and_load(*args: Any) -> Any:
        optimizer, scheduler = build(*args)
        optimizer.load_state_dict(saved)
        return optimizer, scheduler

    found = train(then, CONFIGS, config, range(3, 6), build_and_load)
    expected = model(config, not to_fused)
    train(expected, CONFIGS, config, range(6), build)
    for key, weight in expected.state_dict().items():
        # Three steps of some twenty roundings of 2^-24 of values below 16.
        torch.testing.assert_close(then.state_dict()[key], weight, rtol=0, atol=6e-6 * 16)
    if name != "sgd":
        assert all(found.state_dict()["state"].values())


def test_the_counts_of_fused_adam_and_of_lazy_adam() -> None:
    """On CUDA only, so that the state alone is looked at."""
    kernel: KernelOptimizer = kernel_optimizer(adam={})
    fqn = "ebc.embedding_bags.t.weight"
    theirs = {fqn: kernel.state_dict()["state"]["t.weight"]}
    assert theirs[fqn]["step"].shape == (1,)
    config = EmbeddingOptimizerConfig(learning_rate={"constant": 0.5}, adam={})
    small = Tables([table("t", "user")])
    optimizer, _ = recap_fast.build_optimizer(small, DENSE, config)
    optimizer.init_state(count_step=False)
    ours = {fqn: dict(optimizer.state_dict()["state"][fqn])}
    assert ours[fqn]["step"].shape == ()
    assert theirs[fqn].keys() == ours[fqn].keys()
    assert as_tables_have_it(theirs, ours)[fqn]["step"].shape == ()
    saved = {fqn: {**ours[fqn], "step": torch.tensor(7.0)}}
    found = as_tables_have_it(saved, theirs)[fqn]["step"]
    assert found.shape == (1,) and found.item() == 7


def test_nothing_else_is_made_to_fit() -> None:
    saved = {"tower.weight": {"sum": torch.ones(2)}, "embedding_bags.t.weight": {"x": 1}}
    here = {
        "tower.weight": {"sum": torch.ones(2), "step": torch.tensor(0.0)},
        "embedding_bags.t.weight": {"sum": torch.ones(2), "step": torch.tensor(0.0)},
    }
    assert as_tables_have_it(saved, here) == saved
