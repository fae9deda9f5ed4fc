"""Tables under torchrec's model parallel, on two processes, train like those of one process."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType

from recap_fast import build_optimizer
from recap_fast.config import EmbeddingOptimizerConfig
from recap_fast.embeddings import fuse_embeddings, set_table_optimizers
from recap_fast.embeddings.algorithms import TABLE_ALGORITHMS
from tests.support.processes import device, run
from tests.support.table_reference import random_gradients, table
from tests.support.table_training import (
    DENSE,
    Tables,
    global_batch,
    shard,
    table_parts,
    train,
    train_all_sharded,
    train_alone,
    whole_tables,
)
from tests.support.tables import config_of

STEPS = range(5)
CONFIGS = [table("a", "user"), table("b", "item", "last_item", dim=16, rows=9)]
MEAN = [dataclasses.replace(config, pooling=PoolingType.MEAN) for config in CONFIGS]
# On CUDA, FBGEMM would round float16 tables at random.
TO_NEAREST = {"stochastic_rounding": False}
HALF = [dataclasses.replace(config, data_type=DataType.FP16) for config in CONFIGS]

ALGORITHMS: dict[str, dict[str, Any]] = {
    "sgd": {"sgd": {}},
    "adagrad": {"adagrad": {"eps": 0.5}},
    "rowwise_adagrad": {"rowwise_adagrad": {"eps": 0.5}},
    "ema_rowwise_adagrad": {"ema_rowwise_adagrad": {"step_ema": 2, "eps": 0.5}},
    "clipped": {"adagrad": {"eps": 0.5}, "gradient_clipping": 0.5},
}
if "rowwise_rmsprop_ar" in TABLE_ALGORITHMS:  # FBGEMM 1.9
    ALGORITHMS["rmsprop"] = {"rowwise_rmsprop_ar": {"eps": 0.5, "ar_alpha": 0.25}}


SIX = [
    table("a", "user"),
    table("b", "item", rows=9),
    table("c", "last_item", "user"),
    table("d", "item", dim=16),
    table("e", "user", "last_item"),
    table("f", "last_item", pooling=PoolingType.MEAN),
]


def rate(first: float, then: float) -> dict[str, Any]:
    pieces = {"learning_rate_boundaries": [2], "learning_rate_values": [first, then]}
    return {"learning_rate": {"piecewise_constant": pieces}}


MIXED: dict[str, Any] = {
    **rate(0.5, 0.25),
    "tables": {
        "b": {"adagrad": {"eps": 0.5}},
        "c": {"rowwise_adagrad": {"eps": 0.5}, **rate(0.5, 1.0)},
        "d": {"adagrad": {"eps": 0.5}, **rate(0.125, 2.0)},
        "e": {"ema_rowwise_adagrad": {"step_ema": 2}},
        "f": {"gradient_clipping": 0.5},
    },
}
PLACES = {
    "a": "table_wise",
    "b": "row_wise",
    "c": "table_wise on the other",
    "d": "column_wise",
    "e": "row_wise",
    "f": "table_wise",
}
# Data-parallel are a, c and d: with the rate of all, twice, and another.
PARTLY_DENSE = {
    **rate(0.5, 0.25),
    "tables": {"b": {"adagrad": {"eps": 0.5}}, "d": rate(0.5, 2.0)},
}
PARTLY_DENSE_PLACES = {**PLACES, **dict.fromkeys("acd", "data_parallel")}
# "c" and "d" start like the others.
TWO_RATES = {**rate(0.5, 0.25), "tables": {"c": rate(0.5, 1.0), "d": rate(0.5, 1.0)}}

KINDS = ("table_wise", "row_wise", "column_wise")
DECAY = {"rowwise_adagrad": {"weight_decay": 0.125, "weight_decay_mode": "l2"}}
AVERAGES_OF_B = {"tables": {"b": ALGORITHMS["ema_rowwise_adagrad"]}}
FIXED = {"learning_rate": {"constant": 0.5}}

# Tables, options and shardings.
CASES: dict[str, tuple[list[EmbeddingBagConfig], dict[str, Any], dict[str, str]]] = {
    **{
        f"{algorithm} {kind}": (CONFIGS, {**FIXED, **options}, dict.fromkeys("ab", kind))
        for algorithm, options in ALGORITHMS.items()
        for kind in KINDS
    },
    **{
        f"mean {kind}": (MEAN, {**FIXED, "adagrad": {"eps": 0.5}}, dict.fromkeys("ab", kind))
        for kind in KINDS
    },
    "half table_wise": (HALF, {**FIXED, **TO_NEAREST, **DECAY}, dict.fromkeys("ab", "table_wise")),
    "half row_wise": (HALF, {**FIXED, **TO_NEAREST, **DECAY}, dict.fromkeys("ab", "row_wise")),
    "half column_wise": (
        HALF,
        {**FIXED, **TO_NEAREST, "adagrad": {}},
        dict.fromkeys("ab", "column_wise"),
    ),
    "averages of b": (CONFIGS, {**FIXED, **AVERAGES_OF_B}, dict.fromkeys("ab", "column_wise")),
    "mixed": (SIX, MIXED, PLACES),
    "partly dense": (SIX, PARTLY_DENSE, PARTLY_DENSE_PLACES),
    "two rates": (SIX[:5], TWO_RATES, dict.fromkeys("abcde", "row_wise")),
    "dense adagrad": (
        CONFIGS,
        {**FIXED, "tables": {"a": {"adagrad": {"eps": 0.5}}}},
        {"a": "data_parallel", "b": "table_wise"},
    ),
    "dense clipping": (
        CONFIGS,
        {**FIXED, "tables": {"a": {"gradient_clipping": 1.0}}},
        {"a": "data_parallel", "b": "table_wise"},
    ),
}


@pytest.fixture(scope="module")
def results(table_backend: str) -> dict[str, list[dict[str, Any]]]:
    """Of all cases, by rank: one after the other, since processes take longer than training."""
    first, second = run(2, train_all_sharded, CASES, STEPS, backend=table_backend)
    return {name: [first[name], second[name]] for name in CASES}


def assert_trained_alike(
    name: str, results: dict[str, list[dict[str, Any]]], backend: str, atol: float = 0.0
) -> None:
    """Bit for bit on gloo, if each row adds up the same gradients in the same order."""
    configs, options, _ = CASES[name]
    found = whole_tables(configs, results[name])
    expected = train_alone(configs, EmbeddingOptimizerConfig(**options), STEPS)
    assert_equal_tables(found, expected, backend, atol)


def assert_equal_tables(
    found: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    backend: str,
    atol: float = 0.0,
) -> None:
    """With what was trained on the CPU; bit for bit on gloo, unless there is an `atol`.

    A GPU may add up the gradients of a row in another order, and rounds other products and roots:
    in five steps that is some hundred roundings of values below 16, each by at most 2^-21. So a
    float16 value may be rounded to its other neighbour, in one step and then another; below 16,
    neighbours are 2^-7 apart. A gradient or rate that is wrong is off by more than both.
    """
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        by_gpu = 2 * 2**-7 if weight.dtype == torch.float16 else 128 * 2**-21
        bound = max(atol, by_gpu) if backend == "nccl" else atol
        torch.testing.assert_close(found[name], weight.float(), rtol=0, atol=bound)


@pytest.mark.parametrize(
    "name",
    [
        *(f"{algorithm} {kind}" for algorithm in ALGORITHMS for kind in ("table_wise", "row_wise")),
        "sgd column_wise",
        "adagrad column_wise",
        "clipped column_wise",
        "half table_wise",
        "half row_wise",
        "half column_wise",
        "mean table_wise",
        "mean column_wise",
        "mixed",
        "two rates",
    ],
)
def test_training_is_that_of_one_process(
    name: str, results: dict[str, list[dict[str, Any]]], table_backend: str
) -> None:
    assert_trained_alike(name, results, table_backend)


def test_row_wise_mean_pooling(
    results: dict[str, list[dict[str, Any]]], table_backend: str
) -> None:
    """torchrec divides the pooled output, and not the kernel.

    That is a rounding for each gradient, of which a step adds up to ten, and steps of at most 0.5
    move weights of up to 8.
    """
    assert_trained_alike("mean row_wise", results, table_backend, atol=8 * 2**-22)


def test_column_wise_each_shard_has_an_accumulator_of_its_own(
    results: dict[str, list[dict[str, Any]]], table_backend: str
) -> None:
    _, options, _ = CASES["rowwise_adagrad column_wise"]
    optimizer = EmbeddingOptimizerConfig(**options)
    found = whole_tables(CONFIGS, results["rowwise_adagrad column_wise"])
    assert_equal_tables(found, train_halves_alone(optimizer), table_backend)
    whole_rows = train_alone(CONFIGS, optimizer, STEPS)["a"]
    assert not torch.allclose(found["a"], whole_rows, rtol=0, atol=0.01)


def train_halves_alone(optimizer: EmbeddingOptimizerConfig) -> dict[str, torch.Tensor]:
    """Returns the tables after training in one process, as if each half of the columns were one."""
    starts = Tables(CONFIGS).ebc.embedding_bags
    expected = {}
    for config in CONFIGS:
        halves = []
        width = config.embedding_dim // 2
        half = dataclasses.replace(config, embedding_dim=width)
        for part in (slice(width), slice(width, None)):
            alone = train_alone(
                [half],
                optimizer,
                STEPS,
                starts={config.name: starts[config.name].weight.detach()[:, part]},
                gradients=functools.partial(columns_of_gradients, config.name, part),
            )
            halves.append(alone[config.name])
        expected[config.name] = torch.cat(halves, dim=1)
    return expected


def columns_of_gradients(
    name: str, part: slice, _: Any, batch: int, step: int
) -> dict[str, list[torch.Tensor]]:
    return {name: [grad[:, part] for grad in random_gradients(CONFIGS, batch, step)[name]]}


@pytest.mark.parametrize("name", ["ema_rowwise_adagrad column_wise", "averages of b"])
def test_column_wise_averages_are_refused(
    name: str, results: dict[str, list[dict[str, Any]]]
) -> None:
    table_name = "b" if name == "averages of b" else "a"
    for result in results[name]:
        assert (
            f"chooses ema_rowwise_adagrad for the table {table_name}, which is sharded column_wise"
            in result["error"]
        )


def test_every_process_has_the_rates_of_its_tables(
    results: dict[str, list[dict[str, Any]]],
) -> None:
    first, second = (sorted(result["rates"]) for result in results["mixed"])
    # The dense group; b and e, c, and half of d; or a and f, b and e, and half of d.
    assert first == [0.0, 0.25, 0.25, 1.0, 2.0]
    assert second == [0.0, 0.25, 0.25, 0.25, 0.25, 2.0]


def test_tables_that_agree_share_a_kernel_on_each_process(
    results: dict[str, list[dict[str, Any]]],
) -> None:
    assert [result["fused"] for result in results["two rates"]] == [2, 2]


def test_data_parallel_tables_are_dense_embeddings(
    results: dict[str, list[dict[str, Any]]], table_backend: str
) -> None:
    """Trained once, by plain SGD; the others stay fused."""
    # DDP averages what one process adds up: roundings of values up to 8.
    assert_trained_alike("partly dense", results, table_backend, atol=8 * 2**-22)
    # The factor, a and c, d; then b and e, and f on one process only.
    assert [result["rates"][:3] for result in results["partly dense"]] == [[0.0, 0.25, 2.0]] * 2
    assert [result["fused"] for result in results["partly dense"]] == [2, 3]


def test_a_data_parallel_table_may_have_an_algorithm_of_its_own(
    results: dict[str, list[dict[str, Any]]], table_backend: str
) -> None:
    """More of them in test_unfused_tables.py."""
    assert_trained_alike("dense adagrad", results, table_backend, atol=8 * 2**-22)


def test_data_parallel_tables_with_other_options_are_refused(
    results: dict[str, list[dict[str, Any]]],
) -> None:
    for result in results["dense clipping"]:
        message = result["error"].replace("_dmp_wrapped_module.", "")
        table = "ebc.embedding_bags.a.weight"
        assert f"chooses gradient_clipping, but '{table}' are not fused" in message


def without_set_table_optimizers() -> str:
    """What is said if the tables were sharded without their optimizers."""
    sharded = shard(Tables(CONFIGS), dict.fromkeys("ab", "row_wise and fused"))
    with pytest.raises(ValueError) as error:
        build_optimizer(sharded, DENSE, config_of(adagrad={}))
    return str(error.value)


def test_forgotten_optimizers_are_noticed(table_backend: str) -> None:
    for message in run(2, without_set_table_optimizers, backend=table_backend):
        assert "optimizer=exact_adagrad for the table a, but it was made with exact_sgd" in message


def two(first: PoolingType, second: PoolingType, *features: str) -> list[EmbeddingBagConfig]:
    return [table("a", "user", pooling=first), table("b", *features, rows=9, pooling=second)]


MEAN_POOLING, SUM = PoolingType.MEAN, PoolingType.SUM
# Tables, shardings, and whether torchrec pools them as they should be.
POOLED: dict[str, tuple[list[EmbeddingBagConfig], dict[str, str], bool]] = {
    **{
        f"mean row_wise beside {pooling.value} {kind}": (
            two(MEAN_POOLING, pooling, "item"),
            {"a": "row_wise", "b": kind},
            kind == "row_wise",
        )
        for pooling in (MEAN_POOLING, SUM)
        for kind in ("row_wise", "table_wise", "column_wise", "data_parallel")
    },
    "sum row_wise beside mean table_wise": (
        two(SUM, MEAN_POOLING, "item"),
        {"a": "row_wise", "b": "table_wise"},
        True,
    ),
    "mean and sum of a feature": (
        two(MEAN_POOLING, SUM, "user"),
        dict.fromkeys("ab", "row_wise"),
        False,
    ),
    "means of a feature": (
        two(MEAN_POOLING, MEAN_POOLING, "user"),
        dict.fromkeys("ab", "row_wise"),
        True,
    ),
}


def pool_and_build() -> dict[str, tuple[bool, str]]:
    """On every process: whether sharded tables give what whole ones do, and what is refused."""
    found = {}
    for name, (configs, kinds, _) in POOLED.items():
        model = Tables(configs)
        half = global_batch(0, 0, 3)
        expected = model(half)[0].to_dict()
        sharded = shard(set_table_optimizers(model, config_of(), device()), kinds)
        pooled = sharded(half.to(device()))[0]
        is_right = all(
            torch.allclose(pooled[key].cpu(), value, atol=1e-3) for key, value in expected.items()
        )
        try:
            build_optimizer(sharded, DENSE, config_of())
            found[name] = is_right, ""
        except ValueError as error:
            found[name] = is_right, str(error)
    return found


def test_what_torchrec_pools_wrongly_is_refused(table_backend: str) -> None:
    for found in run(2, pool_and_build, backend=table_backend):
        for name, (is_right, refusal) in found.items():
            assert is_right == POOLED[name][2], name
            assert is_right == (not refusal), name
        assert found["mean row_wise beside SUM table_wise"][1].startswith(
            "the table a, of mean pooling, is sharded row_wise, but the table b table_wise:"
        )
        assert (
            "as is the table b of sums, of the same feature user"
            in (found["mean and sum of a feature"][1])
        )


def trained_from_pass(passes: int) -> dict[str, torch.Tensor]:
    """On every process: tables whose kernels start as if they had counted forward passes."""
    optimizer = config_of(ema_rowwise_adagrad={"step_ema": 3})
    sharded = shard(
        set_table_optimizers(Tables(CONFIGS), optimizer, device()),
        {"a": "row_wise", "b": "table_wise"},
    )
    sharded.fused_optimizer.set_optimizer_step(passes)
    train(sharded, CONFIGS, optimizer, STEPS)
    return {"parts": table_parts(sharded)}


def test_the_count_of_forward_passes_can_be_set(table_backend: str) -> None:
    found = whole_tables(CONFIGS, run(2, trained_from_pass, 1, backend=table_backend))
    optimizer = config_of(ema_rowwise_adagrad={"step_ema": 3})
    model = fuse_embeddings(Tables(CONFIGS), optimizer)
    model.fused_optimizer.set_optimizer_step(1)
    train(model, CONFIGS, optimizer, STEPS)
    alone = {name: bag.weight.detach() for name, bag in model.ebc.embedding_bags.items()}
    assert_equal_tables(found, alone, table_backend)
    from_pass_0 = train_alone(CONFIGS, optimizer, STEPS)["a"]
    assert not torch.allclose(found["a"], from_pass_0, rtol=0, atol=0.01)


# Plans


@pytest.mark.parametrize(
    "algorithm",
    [name for name in TABLE_ALGORITHMS if name not in ("lars_sgd", "ensemble_rowwise_adagrad")],
)
def test_the_planner_takes_annotated_tables(algorithm: str) -> None:
    """On CUDA, where there are all algorithms."""
    model = set_table_optimizers(Tables(CONFIGS), config_of(**{algorithm: {}}), "cuda")
    constraints = {
        "a": ParameterConstraints(sharding_types=["table_wise"]),
        "b": ParameterConstraints(sharding_types=["column_wise"]),
    }
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=2, compute_device="cpu"), constraints=constraints
    )
    plan = planner.plan(model, [EmbeddingBagCollectionSharder()]).plan["ebc"]
    kinds = {name: (table.sharding_type, table.compute_kernel) for name, table in plan.items()}
    assert kinds == {"a": ("table_wise", "fused"), "b": ("column_wise", "fused")}


def test_meta_tables_can_be_annotated() -> None:
    model = set_table_optimizers(Tables(CONFIGS).to("meta"), config_of(adagrad={}), "cpu")
    (arguments,) = model.ebc.embedding_bags["a"].weight._optimizer_kwargs
    assert arguments["optimizer"] == TABLE_ALGORITHMS["adagrad"].optimizer


def test_setting_optimizers_again_replaces_them() -> None:
    model = set_table_optimizers(Tables(CONFIGS), config_of(adagrad={}), "cpu")
    set_table_optimizers(model, config_of(), "cpu")
    (arguments,) = model.ebc.embedding_bags["a"].weight._optimizer_kwargs
    assert arguments["optimizer"] == TABLE_ALGORITHMS["sgd"].optimizer


def test_lars_is_refused() -> None:
    with pytest.raises(ValueError, match="chooses lars_sgd for the table a, of which torchrec's"):
        set_table_optimizers(Tables(CONFIGS), config_of(lars_sgd={}), "cuda")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adam": {}}, "chooses adam for the table a: FBGEMM has no adam on the CPU"),
        ({"tables": {"x": {"sgd": {}}}}, "the model has no table 'x'; there are 'a', 'b'"),
    ],
)
def test_refused_and_nothing_changed(options: dict[str, Any], message: str) -> None:
    model = Tables(CONFIGS)
    with pytest.raises(ValueError, match=message):
        set_table_optimizers(model, config_of(**options), "cpu")
    for bag in model.ebc.embedding_bags.values():
        assert not hasattr(bag.weight, "_optimizer_kwargs")


def test_fused_tables_are_not_sharded() -> None:
    model = fuse_embeddings(Tables(CONFIGS), config_of())
    with pytest.raises(ValueError, match="has a fused_optimizer already"):
        set_table_optimizers(model, config_of(), "cpu")
