"""Tables that are fused, unfused, data-parallel and sharded train alike, by each algorithm."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torchrec.modules.embedding_configs import PoolingType

import recap_fast
import recap_fast.reference
from recap_fast.build import _by_rows as by_rows
from recap_fast.config import EmbeddingOptimizerConfig
from recap_fast.embeddings import plan
from recap_fast.embeddings.algorithms import on_cpu
from recap_fast.optim import FusedSGD
from recap_fast.reference import LazyAdamW, RowwiseAdagrad
from tests.support.processes import run
from tests.support.table_reference import ReferenceTable, random_gradients, table
from tests.support.table_training import (
    BATCH,
    DENSE,
    Tables,
    global_batch,
    model_names,
    train,
    train_all_sharded,
    train_alone,
    whole_tables,
)

STEPS = range(5)
# Of two features each: on the CPU, FBGEMM has no decay for others.
CONFIGS = [
    table("a", "user", "item", rows=8),  # some for each of four processes
    table("b", "item", "last_item", dim=16, rows=13),
    table("c", "user", "last_item", pooling=PoolingType.MEAN),
]
PIECES = {"learning_rate_boundaries": [2], "learning_rate_values": [0.5, 0.25]}
RATES = [0.5, 0.5, 0.25, 0.25, 0.25]
RATE = {"learning_rate": {"piecewise_constant": PIECES}}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "default": {},
    "sgd": {"sgd": {}},
    "adagrad": {"adagrad": {}},
    "adagrad eps": {"adagrad": {"eps": 0.5}},
    "rowwise_adagrad": {"rowwise_adagrad": {}},
    "rowwise_adagrad l2": {
        "rowwise_adagrad": {"eps": 0.5, "weight_decay": 0.125, "weight_decay_mode": "l2"}
    },
    "rowwise_adagrad decouple": {
        "rowwise_adagrad": {"weight_decay": 0.125, "weight_decay_mode": "decouple"}
    },
    "adam": {"adam": {}},
    "adam decay": {"adam": {"beta_1": 0.5, "beta_2": 0.75, "eps": 0.5, "weight_decay": 0.125}},
    "each its own": {
        "rowwise_adagrad": {},
        "tables": {"b": {"adagrad": {"eps": 0.5}}, "c": {"sgd": {}}},
    },
    "each its own, adam": {"rowwise_adagrad": {}, "tables": {"b": {"adam": {}}}},
}
FUSED = [name for name in ALGORITHMS if "adam" not in name]
assert "adam" not in on_cpu()

LAYOUTS = {
    "data_parallel": dict.fromkeys("abc", "data_parallel"),
    "sharded": {"a": "row_wise", "b": "table_wise", "c": "table_wise on the other"},
    "partly data_parallel": {"a": "data_parallel", "b": "row_wise", "c": "table_wise"},
}
CASES = {
    f"{name}, {layout}": (CONFIGS, {**RATE, **options}, LAYOUTS[layout])
    for name, options in ALGORITHMS.items()
    for layout in LAYOUTS
    if name in FUSED or layout == "data_parallel"
}


def oracle(options: dict[str, Any], batch: int) -> dict[str, ReferenceTable]:
    """All tables after training, in float64."""
    config = EmbeddingOptimizerConfig(**RATE, **options)
    starts = Tables(CONFIGS).ebc.embedding_bags
    found = {each.name: ReferenceTable(each, starts[each.name].weight, config) for each in CONFIGS}
    for step, rate in zip(STEPS, RATES, strict=True):
        gradients = random_gradients(CONFIGS, batch, step)
        for name, reference in found.items():
            reference.forward()
            reference.update(global_batch(step, batch=batch), gradients[name], rate)
    return found


def assert_as_expected(
    found: dict[str, torch.Tensor], options: dict[str, Any], batch: int = BATCH
) -> None:
    """Five steps of some twenty roundings of 2^-24, of values as great as the greatest one.

    Those of a gradient of the first step count as much in Adagrad, which divides by it.
    """
    expected = oracle(options, batch)
    assert found.keys() == expected.keys()
    for name, reference in expected.items():
        atol = 6e-6 * float(reference.weight.abs().max())
        torch.testing.assert_close(found[name].double(), reference.weight, rtol=0, atol=atol)
        start = Tables(CONFIGS).ebc.embedding_bags[name].weight
        assert (reference.weight - start).abs().max() > 0.1
        # Some rows have no gradient, and stay as they are.
        if name == "b":
            assert torch.equal(found[name][6:], start[6:])


def train_unfused(options: dict[str, Any], build: Callable[..., Any]) -> Tables:
    model = Tables(CONFIGS)
    train(model, CONFIGS, EmbeddingOptimizerConfig(**RATE, **options), STEPS, build)
    return model


def weights(model: Tables) -> dict[str, torch.Tensor]:
    return {name: bag.weight.detach() for name, bag in model.ebc.embedding_bags.items()}


@pytest.mark.parametrize("name", FUSED)
def test_fused(name: str) -> None:
    config = EmbeddingOptimizerConfig(**RATE, **ALGORITHMS[name])
    assert_as_expected(train_alone(CONFIGS, config, STEPS), ALGORITHMS[name])


@pytest.mark.parametrize("builder", [recap_fast, recap_fast.reference], ids=["fast", "reference"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_unfused(name: str, builder: Any) -> None:
    model = train_unfused(ALGORITHMS[name], builder.build_optimizer)
    assert_as_expected(weights(model), ALGORITHMS[name])


class InTower(Tables):
    """The tables below the module of the task."""

    def __init__(self) -> None:
        super().__init__(CONFIGS)
        self.liked = torch.nn.ModuleDict({"ebc": self.ebc, "factor": torch.nn.Linear(1, 1)})
        del self.ebc

    def forward(self, features: Any) -> Any:
        return self.liked["ebc"](features), 1.0


class SparseTables(torch.nn.Module):
    """The same tables as torch's, whose gradients are sparse."""

    def __init__(self) -> None:
        super().__init__()
        starts = Tables(CONFIGS)
        self.liked = starts.liked
        self.ebc = torch.nn.ModuleDict({"embedding_bags": torch.nn.ModuleDict()})
        for name, bag in starts.ebc.embedding_bags.items():
            mode = "mean" if name == "c" else "sum"
            weight = bag.weight.detach().clone()
            self.ebc["embedding_bags"][name] = torch.nn.EmbeddingBag.from_pretrained(
                weight, freeze=False, mode=mode, sparse=True
            )

    def forward(self, features: Any) -> Any:
        pooled = {}
        for config, names in zip(CONFIGS, model_names(CONFIGS), strict=True):
            bag = self.ebc["embedding_bags"][config.name]
            for feature, name in zip(config.feature_names, names, strict=True):
                jagged = features[feature]
                pooled[name] = bag(jagged.values(), jagged.offsets()[:-1])
        return pooled, self.liked["factor"]


@pytest.mark.parametrize("builder", [recap_fast, recap_fast.reference], ids=["fast", "reference"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_sparse_gradients(name: str, builder: Any) -> None:
    model = SparseTables()
    config = EmbeddingOptimizerConfig(**RATE, **ALGORITHMS[name])
    train(model, CONFIGS, config, STEPS, builder.build_optimizer)
    bags = model.ebc["embedding_bags"]
    assert all(bag.weight.grad is None or bag.weight.grad.is_sparse for bag in bags.values())
    assert_as_expected({name: bag.weight.detach() for name, bag in bags.items()}, ALGORITHMS[name])


SINGLE_TASK = {"single_task_learning_rate": {"constant": 0.0}, "adam": {}}


@pytest.mark.parametrize("model", [InTower, lambda: Tables(CONFIGS)], ids=["tower", "single task"])
@pytest.mark.parametrize("name", ["sgd", "rowwise_adagrad", "adam decay", "each its own"])
def test_a_table_with_options_trains_by_them_wherever_it_is(
    name: str, model: Callable[[], Tables]
) -> None:
    """In a tower, and in a model of a single task, whose rate is zero."""
    made = model()
    in_tower = isinstance(made, InTower)

    def build(model: Any, config: Any, tables: Any) -> Any:
        return recap_fast.build_optimizer(model, config if in_tower else SINGLE_TASK, tables)

    train(made, CONFIGS, EmbeddingOptimizerConfig(**RATE, **ALGORITHMS[name]), STEPS, build)
    bags = (made.liked["ebc"] if in_tower else made.ebc).embedding_bags
    found = {name: bag.weight.detach() for name, bag in bags.items()}
    assert_as_expected(found, ALGORITHMS[name])


@pytest.fixture(scope="module")
def results(table_backend: str) -> list[dict[str, Any]]:
    return run(2, train_all_sharded, CASES, STEPS, backend=table_backend)


@pytest.fixture(scope="module")
def results_of_four(table_backend: str) -> list[dict[str, Any]]:
    return run(4, train_all_sharded, CASES, STEPS, 8, backend=table_backend)


def check_sharded(case: str, results: list[dict[str, Any]], batch: int = BATCH) -> None:
    name = case.rpartition(", ")[0]
    found = whole_tables(CONFIGS, [result[case] for result in results])
    assert_as_expected(found, ALGORITHMS[name], batch)


@pytest.mark.parametrize("case", CASES)
def test_two_processes(case: str, results: list[dict[str, Any]]) -> None:
    check_sharded(case, results)


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_four_processes(case: str, results_of_four: list[dict[str, Any]]) -> None:
    check_sharded(case, results_of_four, 8)


# The optimizers of tables in pure torch


@pytest.mark.parametrize("kind", [RowwiseAdagrad, LazyAdamW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_sparse_gradients_are_like_dense_ones(
    kind: type[torch.optim.Optimizer], dtype: torch.dtype
) -> None:
    """Rows in any order, some twice; and only the sparse ones tell that a row of zeros has been
    looked up, so that it decays."""
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    sparse, dense = (torch.nn.Parameter(weight.clone()) for _ in range(2))
    decay = {"weight_decay": 0.125}
    if kind is RowwiseAdagrad:
        decay["decoupled_weight_decay"] = True
    optimizers = [kind([param], lr=0.5, **decay) for param in (sparse, dense)]
    for step in range(3):
        values = torch.randn(4, 4, generator=torch.Generator().manual_seed(step)).to(dtype)
        rows = torch.tensor([[4, 1, 0, 4]])
        sparse.grad = torch.sparse_coo_tensor(rows, values, (6, 4))
        # In float32, as the sparse one is added up.
        summed = torch.zeros(6, 4, dtype=torch.promote_types(dtype, torch.float32))
        dense.grad = summed.index_add(0, rows[0], values.to(summed.dtype)).to(dtype)
        for optimizer in optimizers:
            optimizer.step()
    # Of float16, the dense sum is rounded; each step moves a weight by up to 1.
    atol = 3 * 2**-9 if dtype == torch.float16 else 0.0
    torch.testing.assert_close(sparse, dense, rtol=0, atol=atol)
    assert torch.equal(sparse[[2, 3, 5]], weight[[2, 3, 5]])
    assert not torch.equal(sparse[[0, 1, 4]], weight[[0, 1, 4]])
    sparse.grad = torch.sparse_coo_tensor([[5]], torch.zeros(1, 4, dtype=dtype), (6, 4))
    optimizers[0].step()
    torch.testing.assert_close(sparse[5], weight[5] * (1 - 0.5 * 0.125), rtol=2**-10, atol=0)


def test_lazy_adam_is_torchs_where_all_rows_have_a_gradient() -> None:
    ours, theirs = (torch.nn.Parameter(torch.ones(3, 4)) for _ in range(2))
    options = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 0.1, "weight_decay": 0.5}
    optimizers = [LazyAdamW([ours], **options), torch.optim.AdamW([theirs], **options)]
    for step in range(4):
        ours.grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs)
    # Each loads what the other saved.
    for one, other in (optimizers, optimizers[::-1]):
        one.load_state_dict(copy.deepcopy(other.state_dict()))


# Plans


def test_a_plan_may_have_data_parallel_tables_where_they_train_as_configured() -> None:
    small = [table("t0", "f0", rows=2, dim=64), table("t1", "f1", rows=7, dim=64)]

    def kinds(**options: Any) -> set[str]:
        config = EmbeddingOptimizerConfig(**RATE, **options)
        made = plan(Tables(small), config, 4, "cpu").plan["ebc"]
        return {each.sharding_type for each in made.values()}

    assert kinds(adagrad={}) == {"data_parallel"}
    assert kinds() == {"table_wise"}  # in a tower, such a table would train as the tower does
    assert kinds(ema_rowwise_adagrad={}) == {"table_wise"}
    assert kinds(adagrad={}, gradient_clipping=1.0) == {"table_wise"}
    assert kinds(tables={"t0": {"sgd": {}}, "t1": {"adagrad": {}}}) == {"data_parallel"}
    # FBGEMM has none of these on the CPU.
    assert kinds(adam={}) == {"data_parallel"}
    with pytest.raises(ValueError, match="chooses lamb for the table t0: FBGEMM has no lamb on"):
        kinds(lamb={})


# Devices for which the native call has no whole rows


@pytest.mark.parametrize(
    ("options", "kind"), [({"rowwise_adagrad": {}}, RowwiseAdagrad), ({"adam": {}}, LazyAdamW)]
)
def test_tables_that_are_not_on_the_cpu_step_in_torch(
    options: dict[str, Any], kind: type[torch.optim.Optimizer]
) -> None:
    """As on a GPU; for one of them here, the meta device."""
    model = Tables(CONFIGS).to("meta")
    config = EmbeddingOptimizerConfig(**RATE, **options)
    optimizer, scheduler = recap_fast.build_optimizer(model, DENSE, config)
    assert type(optimizer.leaves[-1]) is kind
    assert scheduler.group_names == ["liked", "dense_ebc"]
    native = functools.partial(FusedSGD, capturable=True)
    with pytest.raises(ValueError, match="chooses rowwise_adagrad or adam for tables on a GPU"):
        by_rows(native, kind, list(model.ebc.parameters()))
