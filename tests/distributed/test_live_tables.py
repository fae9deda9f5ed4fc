"""Tables under torchrec's model parallel, and what a user does to them after they were sharded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torchrec.modules.embedding_configs import PoolingType

from recap_fast import build_optimizer, checkpoint
from recap_fast.embeddings import fuse_embeddings, set_table_optimizers
from tests.support.processes import device, run
from tests.support.table_reference import random_gradients, table
from tests.support.table_training import (
    BATCH,
    DENSE,
    Tables,
    global_batch,
    model_names,
    shard,
    table_parts,
    whole_tables,
)
from tests.support.tables import config_of

CONFIGS = (
    table("a", "user", "last_item"),
    table("b", "item"),
    table("c", "user", dim=16, pooling=PoolingType.MEAN),
)
SHARDINGS = {"a": "row_wise", "b": "table_wise", "c": "column_wise"}
ON_ONE = {"a": "row_wise", "b": "table_wise on the other", "c": "table_wise on the other"}
NEW = 3.0


class Training:
    """The same steps on a sharded model, or whole on one process.

    Args:
        mode: the configuration's `several_backwards`.
        is_sharded: whether over all processes.
    """

    def __init__(self, is_sharded: bool, mode: str = "update", **options: Any) -> None:
        config = config_of(adagrad={}, several_backwards=mode)
        if is_sharded:
            model = set_table_optimizers(Tables(CONFIGS), config, device())
            rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
            self.model = shard(model, SHARDINGS if ranks > 1 else ON_ONE)
        else:
            self.model = fuse_embeddings(Tables(CONFIGS), config)
            rank, ranks = 0, 1
        self.is_sharded = is_sharded
        self.share = slice(BATCH * rank // ranks, BATCH * (rank + 1) // ranks)
        self.ranks = ranks
        self.optimizer, self.scheduler = build_optimizer(self.model, DENSE, config, **options)

    def loss(self, step: int) -> torch.Tensor:
        features = global_batch(step, self.share.start, self.share.stop).to(device())
        pooled, factor = self.model(features)
        flat = random_gradients(CONFIGS, BATCH, step).values()
        names = [name for of_table in model_names(CONFIGS) for name in of_table]
        loss = sum(
            (pooled[name] * gradient[self.share].to(device())).sum()
            for name, gradient in zip(names, (g for own in flat for g in own), strict=True)
        )
        return loss * factor * self.ranks  # gradients are averaged over the processes

    def step(self, *seeds: int, scaler: Any = None) -> None:
        for seed in seeds:
            loss = self.loss(seed)
            (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
            scaler.update()
        self.optimizer.zero_grad()

    def weight(self, name: str) -> nn.Parameter:
        found = [p for n, p in self.model.named_parameters() if n.endswith(f"{name}.weight")]
        assert len(found) == 1
        return found[0]

    def collection(self) -> nn.Module:
        return self.model.module.ebc if self.is_sharded else self.model.ebc

    def tables(self) -> dict[str, Any]:
        return {"parts": table_parts(self.model)}


def rates(training: Training) -> None:
    for step, rate in enumerate((0.5, 0.125, 0.03125)):
        for group in training.optimizer.param_groups[1:]:
            group["lr"] = 8.0
        loss = training.loss(step)
        for group in training.optimizer.param_groups[1:]:
            group["lr"] = torch.tensor(rate)
        loss.backward()
        training.optimizer.step()


def freezing(training: Training) -> None:
    training.step(0)
    for name in "ac":
        training.weight(name).requires_grad_(False)
    training.step(1)
    training.weight("a").requires_grad_(True)
    training.step(2)
    training.collection().requires_grad_(False)
    training.step(3)
    training.collection().requires_grad_(True)
    training.step(4)


def assign_data(training: Training) -> None:
    training.step(0)
    for name in "abc":
        weight = training.weight(name)
        weight.data = torch.full_like(weight.data, NEW)
    training.step(1)


def assign_state(training: Training) -> None:
    training.step(0)
    collection = training.collection()
    state = {}
    for name, value in collection.state_dict().items():
        if training.is_sharded:
            for local in value.local_shards():
                local.tensor.fill_(NEW)
        state[name] = value if training.is_sharded else torch.full_like(value, NEW)
    collection.load_state_dict(state, assign=True)
    training.step(1)


def new_parameters(training: Training) -> None:
    training.step(0)
    for bag in training.collection().embedding_bags.values():
        bag.weight = nn.Parameter(torch.full_like(bag.weight.data, NEW))
    shown = training.tables()["parts"]  # before any forward pass
    assert all((part == NEW).all() for own in shown.values() for _, part in own)
    training.step(1)


def there_and_back(training: Training) -> None:
    training.step(0)
    training.model.double().float()
    training.step(1)
    training.weight("a").data.mul_(0.5)
    training.step(2)


def evaluation(training: Training) -> None:
    training.step(0)
    training.model.eval()
    with torch.inference_mode():
        training.loss(0)
    training.model.train()
    training.step(1)


def accumulation(training: Training) -> None:
    training.step(0, 1)
    (training.loss(2) + training.loss(3)).backward()
    training.loss(4).backward()
    training.optimizer.step()
    training.optimizer.zero_grad()
    training.loss(5).backward()
    training.optimizer.zero_grad()
    training.step(6)


def scaled(training: Training) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    training.step(0, 1, scaler=scaler)
    training.step(2, scaler=scaler)


CASES: dict[str, tuple[Callable[[Training], None], dict[str, Any]]] = {
    each.__name__: (each, options)
    for each, options in (
        (rates, {}),
        (freezing, {}),
        (assign_data, {}),
        (assign_state, {}),
        (new_parameters, {}),
        (there_and_back, {}),
        (evaluation, {}),
        (accumulation, {"mode": "accumulate"}),
        (scaled, {"mode": "accumulate"}),
    )
}
CASES["frozen and held"] = (freezing, {"mode": "accumulate"})
CASES["scaled by the step"] = (
    scaled,
    {"mode": "accumulate", "step_supports_amp_scaling": True},
)


def refusals() -> list[str]:
    """What is said of each of these, which cannot be followed.

    An error leaves collectives half done, so on one process.
    """
    said = []
    for change in (
        lambda training: training.model.double(),
        lambda training: setattr(training.weight("a"), "data", torch.zeros(7, 8)),
    ):
        training = Training(is_sharded=True)
        change(training)
        said += [complaint(training.loss, 0), complaint(training.model.state_dict)]
    training = Training(is_sharded=True, mode="refuse")
    training.step(0)
    return [*said, complaint(training.step, 1, 2)]


def complaint(act: Callable[..., Any], *args: Any) -> str:
    try:
        act(*args)
    except RuntimeError as error:
        return str(error)
    return "nothing"


def train_all(folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    sharded = {}
    for name, (act, options) in CASES.items():
        training = Training(is_sharded=True, **options)
        act(training)
        sharded[name] = training.tables()
        memory = {each.data_ptr() for each in weights_of_kernels(training)}
        shown = {p.data_ptr() for n, p in training.model.named_parameters() if "bags" in n}
        assert shown <= {*memory, 0}
    training = Training(is_sharded=True)
    training.weight("b").data = torch.full_like(training.weight("b").data, NEW)
    checkpoint.save(folder, 1, training.model, training.optimizer, training.scheduler)
    other = Training(is_sharded=True)
    checkpoint.load(folder, other.model, other.optimizer, other.scheduler)
    return sharded, other.tables()


def weights_of_kernels(training: Training) -> list[torch.Tensor]:
    return [
        each
        for leaf in training.optimizer.fused_leaves
        for each in leaf._emb_module.split_embedding_weights()
    ]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run(2, train_all, str(tmp_path_factory.mktemp("checkpoints")))


@pytest.mark.parametrize("case", CASES)
def test_sharded_tables_do_as_whole_ones(case: str, results: Any) -> None:
    act, options = CASES[case]
    whole = Training(is_sharded=False, **options)
    act(whole)
    expected = whole_tables(CONFIGS, [whole.tables()])
    found = whole_tables(CONFIGS, [sharded[case] for sharded, _ in results])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_followed_is_refused_by_name() -> None:
    (said,) = run(1, refusals)
    assert len(said) == 5
    assert all("of torch.float64 now, but FBGEMM has it of torch.float" in s for s in said[:2])
    assert all("table a is of shape (7, 8) now" in s for s in said[2:4])
    assert "which several_backwards refuses" in said[4]


def test_a_checkpoint_has_what_was_set_since_the_last_forward(results: Any) -> None:
    found = whole_tables(CONFIGS, [loaded for _, loaded in results])
    assert (found["b"] == NEW).all()
