"""Tables under torchrec's model parallel, on two processes, train like those of one process."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType

from recap_fast import build_optimizer
from recap_fast.config import EmbeddingOptimizerConfig
from recap_fast.embeddings import set_table_optimizers
from recap_fast.embeddings.kernels import OPTIMIZERS
from tests.distributed.processes import run
from tests.embeddings.examples import config_of
from tests.embeddings.reference import random_gradients, table
from tests.embeddings.training import (
    DENSE,
    Tables,
    shard,
    train_alone,
    train_sharded,
    whole_tables,
)

STEPS = range(5)
CONFIGS = [table("a", "user"), table("b", "item", "last_item", dim=16, rows=9)]
MEAN = [dataclasses.replace(config, pooling=PoolingType.MEAN) for config in CONFIGS]
HALF = [dataclasses.replace(config, data_type=DataType.FP16) for config in CONFIGS]

ALGORITHMS: dict[str, dict[str, Any]] = {
    "sgd": {"sgd": {}},
    "adagrad": {"adagrad": {"eps": 0.5}},
    "rowwise_adagrad": {"rowwise_adagrad": {"eps": 0.5}},
    "ema_rowwise_adagrad": {"ema_rowwise_adagrad": {"step_ema": 2, "eps": 0.5}},
    "clipped": {"adagrad": {"eps": 0.5}, "gradient_clipping": 0.5},
}


def train(
    configs: list[EmbeddingBagConfig], optimizer: EmbeddingOptimizerConfig, **shardings: str
) -> list[dict[str, Any]]:
    return run(2, train_sharded, configs, optimizer, shardings, STEPS)


def assert_equal_tables(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float = 0.0
) -> None:
    """Bit for bit, since each row adds up the same gradients in the same order."""
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight.float(), rtol=0, atol=atol)


@pytest.mark.parametrize("kind", ["table_wise", "row_wise"])
@pytest.mark.parametrize("options", ALGORITHMS.values(), ids=ALGORITHMS)
def test_training_is_that_of_one_process(options: dict[str, Any], kind: str) -> None:
    optimizer = config_of(**options)
    found = whole_tables(CONFIGS, train(CONFIGS, optimizer, a=kind, b=kind))
    assert_equal_tables(found, train_alone(CONFIGS, optimizer, STEPS))


@pytest.mark.parametrize("algorithm", ["sgd", "adagrad"])
def test_column_wise_training_is_that_of_one_process(algorithm: str) -> None:
    optimizer = config_of(**ALGORITHMS[algorithm])
    results = train(CONFIGS, optimizer, a="column_wise", b="column_wise")
    assert_equal_tables(whole_tables(CONFIGS, results), train_alone(CONFIGS, optimizer, STEPS))


def test_column_wise_each_shard_has_an_accumulator_of_its_own() -> None:
    """As if each half of the columns were a table."""
    optimizer = config_of(**ALGORITHMS["rowwise_adagrad"])
    found = whole_tables(CONFIGS, train(CONFIGS, optimizer, a="column_wise", b="column_wise"))
    starts = Tables(CONFIGS).ebc.embedding_bags
    expected = {}
    for config in CONFIGS:
        width = config.embedding_dim // 2
        halves = []
        for part in (slice(width), slice(width, None)):
            half = dataclasses.replace(config, embedding_dim=width)
            start = starts[config.name].weight.detach()[:, part]

            def gradients(
                _: Any, batch: int, step: int, part: slice = part, name: str = config.name
            ) -> dict[str, list[torch.Tensor]]:
                whole = random_gradients(CONFIGS, batch, step)[name]
                return {name: [gradient[:, part] for gradient in whole]}

            alone = train_alone(
                [half], optimizer, STEPS, starts={config.name: start}, gradients=gradients
            )
            halves.append(alone[config.name])
        expected[config.name] = torch.cat(halves, dim=1)
    assert_equal_tables(found, expected)
    alone = train_alone(CONFIGS, optimizer, STEPS)
    assert not torch.equal(found["a"], alone["a"])


def test_column_wise_averages_are_refused() -> None:
    optimizer = config_of(tables={"b": ALGORITHMS["ema_rowwise_adagrad"]})
    for result in train(CONFIGS, optimizer, a="column_wise", b="column_wise"):
        assert (
            "ema_rowwise_adagrad for the table b, which is sharded column_wise" in result["error"]
        )


@pytest.mark.parametrize("kind", ["table_wise", "row_wise", "column_wise"])
def test_mean_pooling(kind: str) -> None:
    optimizer = config_of(**ALGORITHMS["adagrad"])
    found = whole_tables(MEAN, train(MEAN, optimizer, a=kind, b=kind))
    # Row-wise, torchrec divides the pooled output in place of the kernel: a rounding per gradient,
    # of which a step adds up to ten, and a step of at most 0.5 moves weights of up to 8.
    tolerance = 8 * 2**-22 if kind == "row_wise" else 0.0
    assert_equal_tables(found, train_alone(MEAN, optimizer, STEPS), tolerance)


@pytest.mark.parametrize("kind", ["table_wise", "row_wise", "column_wise"])
def test_float16_tables(kind: str) -> None:
    decay = {"weight_decay": 0.125, "weight_decay_mode": "l2"}
    options = {"adagrad": {}} if kind == "column_wise" else {"rowwise_adagrad": decay}
    found = whole_tables(HALF, train(HALF, config_of(**options), a=kind, b=kind))
    assert_equal_tables(found, train_alone(HALF, config_of(**options), STEPS))


# Tables that differ


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


def test_mixed_tables_with_their_own_algorithms_rates_and_shardings() -> None:
    optimizer = config_of(**MIXED)
    results = train(SIX, optimizer, **PLACES)
    assert_equal_tables(whole_tables(SIX, results), train_alone(SIX, optimizer, STEPS))
    # The dense group, then b, e, c and half of d; or a, b, e, f and half of d. In some order.
    assert sorted(results[0]["rates"]) == [0.0, 0.25, 0.25, 1.0, 2.0]
    assert sorted(results[1]["rates"]) == [0.0, 0.25, 0.25, 0.25, 0.25, 2.0]


def test_tables_that_agree_share_a_kernel_on_each_process() -> None:
    own = {"c": rate(0.5, 1.0), "d": rate(0.5, 1.0)}  # starts like the others
    results = train(
        SIX[:5], config_of(**rate(0.5, 0.25), tables=own), **dict.fromkeys("abcde", "row_wise")
    )
    assert [result["fused"] for result in results] == [2, 2]


def test_data_parallel_tables_are_dense_embeddings() -> None:
    """Trained once, by plain SGD; the others stay fused."""
    own = {"b": {"adagrad": {"eps": 0.5}}, "d": rate(0.5, 2.0)}
    optimizer = config_of(**rate(0.5, 0.25), tables=own)
    places = {**PLACES, "a": "data_parallel", "d": "data_parallel", "c": "data_parallel"}
    results = train(SIX, optimizer, **places)
    # DDP averages gradients that the one process adds up: roundings of values up to 8.
    expected = train_alone(SIX, optimizer, STEPS)
    assert_equal_tables(whole_tables(SIX, results), expected, atol=8 * 2**-22)
    # The dense group, those of a and c, and of d; b, e; and f on one process only.
    assert [result["rates"][:3] for result in results] == [[0.0, 0.25, 2.0]] * 2
    assert [result["fused"] for result in results] == [2, 3]


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"adagrad": {}}, "chooses adagrad, but 'ebc.embedding_bags.a.weight' are not fused"),
        (
            {"gradient_clipping": 1.0},
            "chooses gradient_clipping, but 'ebc.embedding_bags.a.weight'",
        ),
    ],
)
def test_data_parallel_tables_with_other_options_are_refused(
    own: dict[str, Any], message: str
) -> None:
    optimizer = config_of(tables={"a": own})
    for result in train(CONFIGS, optimizer, a="data_parallel", b="table_wise"):
        assert message in result["error"].replace("_dmp_wrapped_module.", "")


def without_set_table_optimizers() -> str:
    """What is said if the tables were sharded without their optimizers."""
    sharded = shard(Tables(CONFIGS), dict.fromkeys("ab", "row_wise and fused"))
    with pytest.raises(ValueError) as error:
        build_optimizer(sharded, DENSE, config_of(adagrad={}))
    return str(error.value)


def test_forgotten_optimizers_are_noticed() -> None:
    for message in run(2, without_set_table_optimizers):
        assert "optimizer=exact_adagrad for the table a, but it was made with exact_sgd" in message


# Plans


@pytest.mark.parametrize("algorithm", OPTIMIZERS.keys() - {"lars_sgd", "ensemble_rowwise_adagrad"})
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
    assert arguments["optimizer"] == OPTIMIZERS["adagrad"]


def test_setting_optimizers_again_replaces_them() -> None:
    model = set_table_optimizers(Tables(CONFIGS), config_of(adagrad={}), "cpu")
    set_table_optimizers(model, config_of(), "cpu")
    (arguments,) = model.ebc.embedding_bags["a"].weight._optimizer_kwargs
    assert arguments["optimizer"] == OPTIMIZERS["sgd"]
