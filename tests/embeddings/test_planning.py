"""Plans for torchrec's model parallel by which tables train as they are configured."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from recap_fast.embeddings import plan, set_table_optimizers
from tests.support.processes import device, run
from tests.support.table_reference import table
from tests.support.table_training import (
    Tables,
    parts_of,
    table_parts,
    train,
    train_alone,
    whole_tables,
)
from tests.support.tables import config_of

STEPS = range(3)
GB = 1024**3
# The first is whole on no GPU of 6 GB, and with another of its size on no two.
WIDE = [table("a", "user", dim=512, rows=4_000_000), table("b", "item", rows=9)]
WIDE_MEANS = dataclasses.replace(WIDE[0], pooling=PoolingType.MEAN)
# Two tables of a few rows.
ROWS = (2, 7)
SMALL = [table(f"t{index}", f"f{index}", rows=rows, dim=64) for index, rows in enumerate(ROWS)]


class Model(nn.Module):
    """Collections of tables, without memory."""

    def __init__(self, *collections: list[EmbeddingBagConfig]) -> None:
        super().__init__()
        for index, configs in enumerate(collections):
            collection = EmbeddingBagCollection(configs, device=torch.device("meta"))
            self.add_module(f"ebc{index}", collection)


def gpus(count: int, gigabytes: int = 6) -> Topology:
    return Topology(world_size=count, compute_device="cuda", hbm_cap=gigabytes * GB, ddr_cap=GB)


def kinds(
    configs: list[EmbeddingBagConfig], topology: Topology | None, **options: Any
) -> dict[str, str]:
    """How each table of a collection is sharded."""
    constraints = options.pop("constraints", None)
    made = plan(
        Model(configs),
        config_of(**options),
        2 if topology is None else topology.world_size,
        "cpu" if topology is None else "cuda",
        topology=topology,
        constraints=constraints,
    )
    return {name: each.sharding_type for name, each in made.plan["ebc0"].items()}


def test_small_tables_are_fused_which_torchrec_makes_data_parallel() -> None:
    topology = Topology(world_size=4, compute_device="cpu")
    planner = EmbeddingShardingPlanner(topology=topology, debug=False)
    of_torchrec = planner.plan(Model(SMALL), [EmbeddingBagCollectionSharder()]).plan["ebc0"]
    assert "data_parallel" in {each.sharding_type for each in of_torchrec.values()}
    ours = plan(Model(SMALL), config_of(ema_rowwise_adagrad={}), 4, "cpu").plan["ebc0"]
    assert {each.sharding_type for each in ours.values()} == {"table_wise"}


@pytest.mark.parametrize(
    ("algorithm", "split"),
    [("sgd", True), ("adagrad", True), ("rowwise_adagrad", False), ("ema_rowwise_adagrad", False)],
)
def test_rows_are_split_only_where_nothing_is_kept_for_whole_rows(
    algorithm: str, split: bool
) -> None:
    """With means beside another table, so that there are no shards of rows to choose."""
    configs = [WIDE_MEANS, WIDE[1]]
    if split:
        found = kinds(configs, gpus(4), **{algorithm: {}})
        assert found["a"] in ("column_wise", "table_column_wise")
    else:
        with pytest.raises(ValueError, match="torchrec's planner found no plan"):
            kinds(configs, gpus(4), **{algorithm: {}})


def test_tables_of_sums_are_split_by_rows() -> None:
    found = kinds(WIDE, gpus(4), rowwise_adagrad={})
    assert found["a"] == "row_wise"


@pytest.mark.parametrize(
    ("options", "is_planned"), [({}, True), ({"gradient_clipping": 1.0}, False)]
)
def test_a_table_of_means_is_split_by_rows_if_it_is_alone(
    options: dict[str, Any], is_planned: bool
) -> None:
    """What is clipped would be divided by the length of the bag."""
    if is_planned:
        assert kinds([WIDE_MEANS], gpus(4), rowwise_adagrad={}, **options) == {"a": "row_wise"}
    else:
        with pytest.raises(ValueError, match="torchrec's planner found no plan"):
            kinds([WIDE_MEANS], gpus(4), rowwise_adagrad={}, **options)


@pytest.mark.parametrize("optimizers_are_set", [False, True])
def test_state_is_counted(optimizers_are_set: bool) -> None:
    """8 GB of weights are whole on a GPU, and not with as much for Adagrad's sums."""
    for algorithm, fits in (("sgd", True), ("adagrad", False)):
        config = config_of(**{algorithm: {}})
        model = Model(WIDE[:1])
        if optimizers_are_set:
            set_table_optimizers(model, config, "cuda")
        with nullcontext() if fits else pytest.raises(ValueError, match="found no plan"):
            plan(
                model,
                config,
                2,
                "cuda",
                topology=gpus(2, 16),
                constraints=constrain("a", "table_wise"),
            )


def test_planning_leaves_the_model_as_it_was() -> None:
    model = Tables(WIDE[1:])
    weight = model.ebc.embedding_bags["b"].weight
    before = dict(vars(weight))
    plan(model, config_of(adagrad={}), 2, "cpu")
    assert vars(weight) == before


def test_constraints_are_those_of_torchrec() -> None:
    by_columns = ParameterConstraints(sharding_types=["column_wise"], min_partition=256)
    found = kinds(WIDE, gpus(2, 40), rowwise_adagrad={}, constraints={"a": by_columns})
    assert found["a"] == "column_wise"


def test_tables_of_one_name_in_two_collections() -> None:
    """The means are alone in the first collection, but not in the second."""
    model = Model([WIDE_MEANS], [dataclasses.replace(WIDE_MEANS, num_embeddings=9), WIDE[1]])
    made = plan(model, config_of(rowwise_adagrad={}), 4, "cuda", topology=gpus(4))
    found = {path: each["a"].sharding_type for path, each in made.plan.items()}
    assert found["ebc0"] == "row_wise"
    assert found["ebc1"] in ("table_wise", "data_parallel")


def constrain(name: str, *sharding_types: str) -> dict[str, ParameterConstraints]:
    return {name: ParameterConstraints(sharding_types=list(sharding_types))}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"ema_rowwise_adagrad": {}, "constraints": constrain("a", "column_wise")},
            "chooses ema_rowwise_adagrad for the table a, which is sharded column_wise",
        ),
        (
            {"lamb": {}, "constraints": constrain("b", "data_parallel")},
            "chooses lamb for the table b, which is sharded data_parallel",
        ),
        ({"constraints": constrain("x")}, "constraints: there is no table 'x'; there are 'a', 'b'"),
        ({"tables": {"x": {"sgd": {}}}}, "the model has no table 'x'; there are 'a', 'b'"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kinds(WIDE, None, **options)


def test_means_beside_others_are_refused() -> None:
    with pytest.raises(ValueError, match="the table a, of mean pooling, is sharded row_wise, but"):
        constraints = {**constrain("a", "row_wise"), **constrain("b", "table_wise")}
        kinds([WIDE_MEANS, WIDE[1]], gpus(4), constraints=constraints)


def test_a_topology_of_others_is_refused() -> None:
    with pytest.raises(ValueError, match="topology has 4 processes on cuda, but world_size is 2"):
        plan(Model(WIDE), config_of(), 2, "cpu", topology=gpus(4))


# On two processes


CONFIGS = [
    table("a", "user"),
    table("b", "item", rows=9, dim=16),
    table("c", "last_item", pooling=PoolingType.MEAN),
    table("d", "user", "item"),
]
OPTIONS = {
    "rowwise_adagrad": {"eps": 0.5},
    "tables": {"b": {"adagrad": {"eps": 0.5}}, "d": {"gradient_clipping": 0.5}},
}


def train_as_planned() -> dict[str, Any]:
    """On every process: what `table_parts` shows after training, and where the tables are."""
    config = config_of(**OPTIONS)
    model = Tables(CONFIGS)
    whole = {name: weight.clone() for name, weight in model.state_dict().items()}
    set_table_optimizers(model, config, device())
    made = plan(model, config, dist.get_world_size(), device())
    sharded = DistributedModelParallel(model, device=device(), plan=made)
    for name, value in sharded.state_dict().items():
        for place, part in parts_of(value):
            part.copy_(whole[name][place])
    train(sharded, CONFIGS, config, STEPS)
    places = {name: tuple(each.ranks) for name, each in made.plan["ebc"].items()}
    try:
        plan(Model(WIDE), config_of(rowwise_adagrad={}), 2, "cuda", topology=gpus(2, 2))
    except ValueError as error:
        return {"parts": table_parts(sharded), "places": places, "error": str(error)}
    raise AssertionError("a plan for tables that are too large")


def test_training_is_that_of_one_process(table_backend: str) -> None:
    """And every process has the same plan, or the same error."""
    results = run(2, train_as_planned, backend=table_backend)
    assert results[0]["places"] == results[1]["places"]
    assert {rank for ranks in results[0]["places"].values() for rank in ranks} == {0, 1}
    assert results[0]["error"] == results[1]["error"]
    assert "torchrec's planner found no plan" in results[0]["error"]
    found = whole_tables(CONFIGS, results)
    expected = train_alone(CONFIGS, config_of(**OPTIONS), STEPS)
    # DDP averages what one process adds up; sums and roots of a GPU are other roundings of values
    # below 16.
    atol = 128 * 2**-21 if table_backend == "nccl" else 8 * 2**-22
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=atol)
