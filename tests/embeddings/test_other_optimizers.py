"""Fused optimizers that recap_fast did not make: torchrec's own collections, plain keyed ones."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.optim import keyed
from torchrec.optim.fused import FusedOptimizer
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from recap_fast import build, checkpoint, reference
from recap_fast.config import EmbeddingOptimizerConfig
from recap_fast.embeddings import find_fused_optimizer
from recap_fast.schedules.compute import compute_lr
from tests.support.models import Ranker, multi_task_config, ramp

BUILDERS = {"native": build.build_optimizer, "reference": reference.build_optimizer}
EMBEDDINGS = EmbeddingOptimizerConfig(learning_rate=ramp(0.5, 3))


@pytest.fixture(params=BUILDERS)
def build_optimizer(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return BUILDERS[request.param]


def table(name: str, width: int, **options: Any) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(
        name=name, num_embeddings=7, embedding_dim=width, feature_names=[f"f_{name}"], **options
    )


def fused_collection(*configs: EmbeddingBagConfig) -> FusedEmbeddingBagCollection:
    return FusedEmbeddingBagCollection(
        list(configs),
        optimizer_type=torch.optim.Adagrad,
        optimizer_kwargs={"lr": 0.01, "eps": 1e-8},
    )


class Model(nn.Module):
    """A ranker over torchrec's own fused collections of the tables t0 and t1."""

    def __init__(self, collections: int = 1) -> None:
        super().__init__()
        configs = [table("t0", 8), table("t1", 12)]
        if collections == 1:
            self.ebc = fused_collection(*configs)
        else:
            self.ebc, self.ebc_2 = map(fused_collection, configs)
        self.ranker = Ranker(width=20)

    def collections(self) -> list[FusedEmbeddingBagCollection]:
        return [self.ebc, *([self.ebc_2] if hasattr(self, "ebc_2") else [])]

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        pooled = [collection(features).values() for collection in self.collections()]
        return self.ranker(torch.cat(pooled, dim=1))


class Hidden(Model):
    """The same, whose tables no module shows as parameters."""

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        for name, param in super().named_parameters(*args, **kwargs):
            if "embedding_bags" not in name:
                yield name, param


def with_its_optimizer(model: Model) -> Model:
    model.fused_optimizer = model.ebc.fused_optimizer()
    return model


def with_all_optimizers(model: Model) -> Model:
    model.fused_optimizer = keyed.CombinedOptimizer(
        [(f"c{index}", each.fused_optimizer()) for index, each in enumerate(model.collections())]
    )
    return model


MODELS: dict[str, tuple[Callable[[], Model], list[str]]] = {
    "its own": (lambda: with_its_optimizer(Model()), ["t0.weight", "t1.weight"]),
    "of several": (lambda: with_all_optimizers(Model(2)), ["c0.t0.weight", "c1.t1.weight"]),
    "hidden": (lambda: with_its_optimizer(Hidden()), ["t0.weight", "t1.weight"]),
    "found": (
        Model,
        ["ebc.embedding_bags.t0.weight", "ebc.embedding_bags.t1.weight"],
    ),
    "several found": (
        lambda: Model(2),
        ["ebc.embedding_bags.t0.weight", "ebc_2.embedding_bags.t1.weight"],
    ),
}


def make(name: str) -> Model:
    torch.manual_seed(0)
    return MODELS[name][0]()


def features(seed: int) -> KeyedJaggedTensor:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (10,), generator=generator)
    values = torch.randint(0, 7, (int(lengths.sum()),), generator=generator)
    return KeyedJaggedTensor.from_lengths_sync(["f_t0", "f_t1"], values, lengths)


def train(model: Model, optimizer: Any, scheduler: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = model(features(step)).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


class ByHand:
    """torchrec's `CombinedOptimizer` of torch's Adam for each group, and its schedules by hand."""

    def __init__(self, model: Model) -> None:
        config = multi_task_config()
        rates = config.multi_task_learning_rates
        dense = {
            name: param
            for name, param in nn.Module.named_parameters(model)
            if "embedding_bags" not in name
        }
        parts, self._rates = [], []
        for task, rate in rates.tower_learning_rates.items():
            parts.append({n: p for n, p in dense.items() if task.replace(".", "__") in n})
            self._rates.append(rate)
        parts.append({n: p for n, p in dense.items() if "_backbone" in n})
        self._rates.append(rates.backbone_learning_rate)
        fused = find_fused_optimizer(model)
        self.optimizer = keyed.CombinedOptimizer(
            [
                *[
                    keyed.KeyedOptimizerWrapper(
                        part, lambda params: torch.optim.Adam(params, lr=0.0, eps=1e-7)
                    )
                    for part in parts
                ],
                fused,
            ]
        )
        self._rates += [EMBEDDINGS.learning_rate] * len(fused.param_groups)
        self._step = 0
        self._set()

    def step(self) -> None:
        self._step += 1
        self._set()

    def _set(self) -> None:
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = compute_lr(rate, self._step)
        self.optimizer.optimizers[-1][1].step()  # hands the rate to the kernels


@pytest.mark.parametrize("name", MODELS)
def test_training_is_that_of_torchrecs_combined_optimizer(
    name: str, build_optimizer: Callable[..., Any]
) -> None:
    ours, theirs = make(name), make(name)
    optimizer, scheduler = build_optimizer(ours, multi_task_config(), EMBEDDINGS)
    by_hand = ByHand(theirs)
    losses = train(ours, optimizer, scheduler, range(8))
    expected = train(theirs, by_hand.optimizer, by_hand, range(8))
    # float32, Adam: some roundings apart in each of 8 steps.
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-7)
    tables = zip(optimizer.params.items(), by_hand.optimizer.params.items(), strict=True)
    for (key, table), (expected_key, expected_table) in tables:
        assert key == expected_key
        torch.testing.assert_close(table, expected_table, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_state_dict_keys_are_unique_and_load_back(
    name: str, build_optimizer: Callable[..., Any]
) -> None:
    model = make(name)
    optimizer, scheduler = build_optimizer(model, multi_task_config(), EMBEDDINGS)
    train(model, optimizer, scheduler, range(3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
    dense = [name for name, _ in model.named_parameters() if "embedding_bags" not in name]
    assert list(saved[1]["state"]) == [*sorted(dense, key=dense_order), *MODELS[name][1]]

    torch.manual_seed(1)
    other = MODELS[name][0]()
    other_optimizer, other_scheduler = build_optimizer(other, multi_task_config(), EMBEDDINGS)
    with torch.no_grad():
        other.load_state_dict(saved[0])
    other_optimizer.load_state_dict(saved[1])
    other_scheduler.load_state_dict(saved[2])
    resumed = train(other, other_optimizer, other_scheduler, range(3, 6))
    assert resumed == train(model, optimizer, scheduler, range(3, 6))


def dense_order(name: str) -> int:
    return [part in name for part in ("ml__liked", "ml__replied", "_backbone")].index(True)


def test_the_tables_follow_their_schedule(build_optimizer: Callable[..., Any]) -> None:
    model = make("several found")
    embeddings = {"learning_rate": {"constant": 0.5}, "tables": {"t1": {"learning_rate": None}}}
    embeddings["tables"]["t1"]["learning_rate"] = {"constant": 0.25}
    optimizer, _ = build_optimizer(model, multi_task_config(), embeddings)
    assert [group["lr"] for group in optimizer.param_groups[-2:]] == [0.5, 0.25]
    kernels = [collection._emb_modules[0]._emb_module for collection in model.collections()]
    assert [kernel.get_learning_rate() for kernel in kernels] == [0.5, 0.25]


def test_a_table_of_another_name_is_refused(build_optimizer: Callable[..., Any]) -> None:
    config = EmbeddingOptimizerConfig.model_validate(
        {"learning_rate": {"constant": 0.5}, "tables": {"t2": {"learning_rate": {"constant": 1}}}}
    )
    with pytest.raises(ValueError, match="the model has no table 't2'; there are 't0', 't1'"):
        build_optimizer(make("its own"), multi_task_config(), config)


def test_kernels_that_can_be_read_are_checked(build_optimizer: Callable[..., Any]) -> None:
    config = EmbeddingOptimizerConfig.model_validate({"learning_rate": {"constant": 1}, "sgd": {}})
    with pytest.raises(ValueError, match="optimizer=exact_sgd for the table t0, but it was made"):
        build_optimizer(make("its own"), multi_task_config(), config)


# torchrec lists an unsharded table by its state, of which SGD keeps none


class SgdModel(Model):
    """The same with collections that train by SGD."""

    def __init__(self, collections: int = 1) -> None:
        super().__init__(collections)
        for name, old in list(self.named_children()):
            if isinstance(old, FusedEmbeddingBagCollection):
                configs = old.embedding_bag_configs()
                new = FusedEmbeddingBagCollection(configs, torch.optim.SGD, {"lr": 0.01})
                new.load_state_dict(old.state_dict())
                setattr(self, name, new)


SGD_MODELS: dict[str, Callable[[], Model]] = {
    "found": SgdModel,
    "several found": lambda: SgdModel(2),
    "its own": lambda: with_its_optimizer(SgdModel()),
    "of several": lambda: with_all_optimizers(SgdModel(2)),
}


@pytest.mark.parametrize("name", SGD_MODELS)
def test_tables_without_state_train_as_by_sgd(
    name: str, build_optimizer: Callable[..., Any]
) -> None:
    torch.manual_seed(0)
    model = SGD_MODELS[name]()
    twin = copy.deepcopy(model.ranker)
    tables = {
        table_name: param.detach().clone().requires_grad_()
        for collection in model.collections()
        for table_name, param in collection.named_parameters()
    }
    optimizer, scheduler = build_optimizer(model, multi_task_config(), EMBEDDINGS)
    assert list(optimizer.params)[-2:] == MODELS[name][1]

    def pool(features: JaggedTensor, weight: torch.Tensor) -> torch.Tensor:
        bags = features.values().split(features.lengths().tolist())
        return torch.stack([weight[ids].sum(0) for ids in bags])

    for step in range(4):
        batch = features(step)
        pooled = [
            pool(batch[f"f_{each}"], tables[f"embedding_bags.{each}.weight"])
            for each in ("t0", "t1")
        ]
        twin.load_state_dict(model.ranker.state_dict())
        grads = torch.autograd.grad(
            twin(torch.cat(pooled, dim=1)).square().mean(), list(tables.values())
        )
        with torch.no_grad():
            for param, grad in zip(tables.values(), grads, strict=True):
                param -= compute_lr(EMBEDDINGS.learning_rate, step) * grad
        train(model, optimizer, scheduler, range(step, step + 1))
    for collection in model.collections():
        for table_name, param in collection.named_parameters():
            torch.testing.assert_close(param, tables[table_name], rtol=1e-5, atol=1e-6)
    saved = copy.deepcopy(optimizer.state_dict())
    assert not any("t0" in key for key in saved["state"])  # as in torchrec's own
    optimizer.load_state_dict(saved)


def test_tables_without_state_have_rates_and_kernels_of_their_own(
    build_optimizer: Callable[..., Any],
) -> None:
    quarter = {"learning_rate": {"constant": 0.25}}
    rates = {"learning_rate": {"constant": 0.5}, "tables": {"t1": quarter}}
    optimizer, _ = build_optimizer(SgdModel(2), multi_task_config(), rates)
    assert [group["lr"] for group in optimizer.param_groups[-2:]] == [0.5, 0.25]
    with pytest.raises(ValueError, match="optimizer=exact_adagrad for the table t0, but it was"):
        build_optimizer(SgdModel(), multi_task_config(), {**rates, "tables": {}, "adagrad": {}})
    with pytest.raises(ValueError, match="the tables t0 and t1 share a param group"):
        one = SgdModel()
        config = [table("t0", 8), table("t1", 8)]
        one.ebc = FusedEmbeddingBagCollection(config, torch.optim.SGD, {"lr": 0.01})
        build_optimizer(one, multi_task_config(), rates)


def test_a_name_that_a_dense_parameter_has_too(build_optimizer: Callable[..., Any]) -> None:
    """torchrec calls a table "t0.weight", whatever module it is in."""
    model = make("its own")
    model.t0 = nn.Linear(8, 7)  # of the shape of the table
    optimizer, scheduler = build_optimizer(model, multi_task_config(), EMBEDDINGS)
    assert scheduler.group_names[-1] == "backbone"
    names = list(optimizer.params)
    assert names[-4:] == ["t0.weight", "t0.bias", "fused_optimizer.t0.weight",
                          "fused_optimizer.t1.weight"]  # fmt: skip
    assert optimizer.params["t0.weight"] is model.t0.weight
    train(model, optimizer, scheduler, range(2))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


# Optimizers of classes that are not torchrec's fused ones


class Unfused(nn.Module):
    """A ranker over plain tables, whose owner trains them with an optimizer of his own."""

    def __init__(self, factories: list[Callable[..., torch.optim.Optimizer]]) -> None:
        super().__init__()
        self.tables = nn.ModuleDict(
            {name: nn.EmbeddingBag(7, 10, mode="sum") for name in ("t0", "t1")}
        )
        self.ranker = Ranker(width=20)
        named = [{f"tables.{n}.weight": each.weight} for n, each in self.tables.items()]
        self.fused_optimizer = keyed.CombinedOptimizer(
            [
                keyed.KeyedOptimizerWrapper(params, factory)
                for params, factory in zip(named, factories, strict=True)
            ]
        )

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        pooled = [
            each(features[f"f_{name}"].values(), features[f"f_{name}"].offsets()[:-1])
            for name, each in self.tables.items()
        ]
        return self.ranker(torch.cat(pooled, dim=1))


FACTORIES = [
    lambda params: torch.optim.Adagrad(params, lr=0.0),
    lambda params: torch.optim.SGD(params, lr=0.0, momentum=0.5),
]


def test_a_combined_optimizer_of_plain_keyed_optimizers(
    build_optimizer: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    ours = Unfused(FACTORIES)
    torch.manual_seed(0)
    theirs = Unfused(FACTORIES)
    config = EmbeddingOptimizerConfig.model_validate(
        {
            "learning_rate": {"constant": 0.25},
            "tables": {"t1": {"learning_rate": {"constant": 0.5}}},
        }
    )
    with caplog.at_level(logging.INFO, logger="recap_fast"):
        optimizer, scheduler = build_optimizer(ours, multi_task_config(), config)
    assert len([m for m in caplog.messages if "not of a kernel that can be read" in m]) == 1
    assert [group["lr"] for group in optimizer.param_groups[-2:]] == [0.25, 0.5]

    plain, plain_scheduler = reference.build_optimizer(theirs.ranker, multi_task_config())
    for group, rate in zip(theirs.fused_optimizer.param_groups, (0.25, 0.5), strict=True):
        group["lr"] = rate
    for step in range(6):
        for model, parts in ((ours, [optimizer]), (theirs, [plain, theirs.fused_optimizer])):
            for part in parts:
                part.zero_grad()
            model(features(step)).square().mean().backward()
            for part in parts:
                part.step()
        scheduler.step()
        plain_scheduler.step()
    for (name, param), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(param, expected, rtol=1e-5, atol=1e-7, msg=name)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


class OwnFused(FusedOptimizer):
    """A fused optimizer of a class that nobody here knows, with two param groups."""

    def __init__(self, tables: dict[str, torch.Tensor]) -> None:
        groups = [{"params": [param], "lr": 1.0} for param in tables.values()]
        super().__init__(tables, {param: {} for param in tables.values()}, groups)
        self.rates: list[list[float]] = []

    def step(self, closure: Any = None) -> None:
        self.rates.append([group["lr"] for group in self.param_groups])

    def zero_grad(self, set_to_none: bool = False) -> None:
        pass


def test_two_fused_groups_of_an_unknown_class(build_optimizer: Callable[..., Any]) -> None:
    model = Ranker()
    model.fused_optimizer = OwnFused({"a": torch.ones(3, 2), "b": torch.ones(4, 2)})
    config = {
        "learning_rate": {"constant": 0.5},
        "tables": {"b": {"learning_rate": {"constant": 1}}},
    }
    optimizer, _ = build_optimizer(model, multi_task_config(), config)
    assert [group["lr"] for group in optimizer.param_groups[-2:]] == [0.5, 1.0]
    assert model.fused_optimizer.rates[-1] == [0.5, 1.0]


def test_parts_that_save_their_param_groups(build_optimizer: Callable[..., Any]) -> None:
    """torchrec combines only optimizers that agree in whether they do."""
    model = make("its own")
    model.fused_optimizer.save_param_groups(True)
    optimizer, _ = build_optimizer(model, multi_task_config(), EMBEDDINGS)
    assert len(optimizer.state_dict()["param_groups"]) == 4


# Checkpoints of a directory


@pytest.mark.parametrize("name", ["its own", "hidden", "several found"])
def test_checkpoints(name: str, tmp_path: Any) -> None:
    build_optimizer = BUILDERS["native"]
    model = make(name)
    parts = build_optimizer(model, multi_task_config(), EMBEDDINGS)
    train(model, *parts, range(3))
    checkpoint.save(tmp_path, 3, model, *parts)
    torch.manual_seed(1)
    other = MODELS[name][0]()
    other_parts = build_optimizer(other, multi_task_config(), EMBEDDINGS)
    assert checkpoint.load(tmp_path, other, *other_parts).step == 3
    assert train(other, *other_parts, range(3, 6)) == train(model, *parts, range(3, 6))
