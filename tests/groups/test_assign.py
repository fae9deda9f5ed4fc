"""Which parameters land in which group, under any wrapper, and what is refused."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
import torch.distributed
from torch import nn

from recap_fast.config import (
    EmbeddingOptimizerConfig,
    OptimizerConfig,
    RecapAdamConfig,
    RecapOptimizerConfig,
    SgdConfig,
)
from recap_fast.groups.assign import group_parameters
from recap_fast.groups.group import DenseGroup, sanitize
from tests.support.models import (
    EMBEDDING_RATE,
    LIKED,
    REPLIED,
    EmbeddingRanker,
    Ranker,
    constant,
    multi_task_config,
)

SINGLE_TASK = RecapOptimizerConfig(single_task_learning_rate=constant(0.1), adam=RecapAdamConfig())
GENERIC = OptimizerConfig(sgd=SgdConfig(lr=0.25))

TOWERS = {
    task: [
        f"{place}.{sanitize(task)}.{kind}"
        for place in ("_towers", "_affine")
        for kind in ("weight", "bias")
    ]
    for task in (LIKED, REPLIED)
}
BACKBONE = ["_backbone.0.weight", "_backbone.0.bias"]
TABLES = ["ebc.embedding_bags.t_user.weight", "ebc.embedding_bags.t_item.weight"]


def names(groups: Sequence[DenseGroup]) -> list[tuple[str, str, list[str]]]:
    return [(group.name, group.role, list(group.params)) for group in groups]


def under(prefix: str, params: Sequence[str]) -> list[str]:
    return [prefix + name for name in params]


class Tree(nn.Module):
    """A model with a parameter at each of the given paths."""

    def __init__(self, *paths: str) -> None:
        super().__init__()
        for path in paths:
            self.put(path, nn.Parameter(torch.ones(2)))

    def put(self, path: str, param: nn.Parameter) -> None:
        *modules, name = path.split(".")
        parent: nn.Module = self
        for module in modules:
            if module not in dict(parent.named_children()):
                parent.add_module(module, nn.Module())
            parent = parent.get_submodule(module)
        parent.register_parameter(name, param)

    def forward(self) -> torch.Tensor:
        return torch.stack(list(self.parameters())).sum()


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("store") / "file"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


# Multi-task


def test_towers_in_the_order_of_the_configuration_then_backbone_then_tables() -> None:
    groups = group_parameters(
        EmbeddingRanker(), multi_task_config((REPLIED, LIKED)), EMBEDDING_RATE
    )
    assert names(groups) == [
        (REPLIED, "tower", under("ranker.", TOWERS[REPLIED])),
        (LIKED, "tower", under("ranker.", TOWERS[LIKED])),
        ("backbone", "backbone", under("ranker.", BACKBONE)),
        ("dense_ebc", "dense_embeddings", TABLES),
    ]


def test_groups_hold_the_models_own_parameters_and_rates() -> None:
    model, config = EmbeddingRanker(), multi_task_config()
    groups = group_parameters(model, config, EMBEDDING_RATE)
    named = dict(model.named_parameters())
    in_groups = {name: param for group in groups for name, param in group.params.items()}
    assert in_groups.keys() == named.keys()
    assert all(in_groups[name] is param for name, param in named.items())
    rates = config.multi_task_learning_rates
    assert [group.learning_rate for group in groups] == [
        *rates.tower_learning_rates.values(),
        rates.backbone_learning_rate,
        EMBEDDING_RATE.learning_rate,
    ]


def test_model_of_towers_only() -> None:
    model = Tree("towers.a.weight", "towers.b.weight")
    groups = group_parameters(model, multi_task_config(("a", "b"), backbone=False))
    assert [group.name for group in groups] == ["a", "b"]


def test_embedding_tables_of_a_tower_belong_to_the_tower() -> None:
    model = Tree("towers.a.ebc.embedding_bags.t.weight", "x.weight")
    groups = group_parameters(model, multi_task_config(("a",)))
    assert names(groups) == [
        ("a", "tower", ["towers.a.ebc.embedding_bags.t.weight"]),
        ("backbone", "backbone", ["x.weight"]),
    ]


def test_frozen_parameters_stay_in_their_groups() -> None:
    model = Ranker()
    model._backbone.requires_grad_(False)
    groups = group_parameters(model, multi_task_config())
    assert names(groups)[-1] == ("backbone", "backbone", BACKBONE)


def test_a_task_is_a_whole_path_segment_with_something_below() -> None:
    # The last three look like the task "a", but are not below a module of that name.
    model = Tree("towers.a.weight", "towers.aa.weight", "towers.b_a.weight", "heads.a")
    groups = group_parameters(model, multi_task_config(("a",)))
    assert names(groups) == [
        ("a", "tower", ["towers.a.weight"]),
        ("backbone", "backbone", ["towers.aa.weight", "towers.b_a.weight", "heads.a"]),
    ]


@pytest.mark.parametrize("task", ["backbone", "dense_ebc"])
def test_task_named_like_another_group_is_an_ordinary_tower(task: str) -> None:
    model = Tree(f"towers.{task}.weight", "x.weight", "ebc.embedding_bags.t.weight")
    groups = group_parameters(model, multi_task_config((task,)), EMBEDDING_RATE)
    assert [(group.role, list(group.params)) for group in groups] == [
        ("tower", [f"towers.{task}.weight"]),
        ("backbone", ["x.weight"]),
        ("dense_embeddings", ["ebc.embedding_bags.t.weight"]),
    ]
    expected = [task, "backbone", "dense_ebc"]
    expected[expected.index(task, 1)] += "_"
    assert [group.name for group in groups] == expected


# Wrappers


def data_parallel(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


WRAPPERS: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "ddp": (data_parallel, "module."),
    "compile": (torch.compile, "_orig_mod."),
    "compiled ddp": (lambda model: torch.compile(data_parallel(model)), "_orig_mod.module."),
    "compile in ddp": (lambda model: data_parallel(torch.compile(model)), "module._orig_mod."),
    "average": (torch.optim.swa_utils.AveragedModel, "module."),
}


@pytest.mark.parametrize(("wrap", "prefix"), WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.usefixtures("process_group")
def test_wrappers_change_the_names_and_nothing_else(
    wrap: Callable[[nn.Module], nn.Module], prefix: str
) -> None:
    def model() -> nn.Module:
        # "a" sits at the top level, where the original finds it in a wrapped model only; "module"
        # and "_orig_mod" must not match what the wrapper adds.
        return Tree("a.weight", "towers.module.weight", "x.weight", "ebc.embedding_bags.t.weight")

    config = multi_task_config(("a", "module"))
    plain = names(group_parameters(model(), config, EMBEDDING_RATE))
    wrapped = names(group_parameters(wrap(model()), config, EMBEDDING_RATE))
    assert plain == [
        ("a", "tower", ["a.weight"]),
        ("module", "tower", ["towers.module.weight"]),
        ("backbone", "backbone", ["x.weight"]),
        ("dense_ebc", "dense_embeddings", ["ebc.embedding_bags.t.weight"]),
    ]
    assert wrapped == [(name, role, under(prefix, params)) for name, role, params in plain]


def test_compiled_tower_inside_a_model() -> None:
    model = Ranker()
    tower = sanitize(LIKED)
    model._towers[tower] = torch.compile(model._towers[tower])
    groups = group_parameters(model, multi_task_config())
    assert list(groups[0].params)[:2] == [
        f"_towers.{tower}._orig_mod.weight",
        f"_towers.{tower}._orig_mod.bias",
    ]


# Everything in one group


@pytest.mark.parametrize(
    ("config", "name", "rate"), [(SINGLE_TASK, "single_task", 0.1), (GENERIC, "ALL_PARAMS", 0.25)]
)
def test_one_group_of_everything_with_unfused_tables(
    config: RecapOptimizerConfig | OptimizerConfig, name: str, rate: float
) -> None:
    model = EmbeddingRanker()
    groups = group_parameters(model, config)
    assert names(groups) == [(name, "all", [name for name, _ in model.named_parameters()])]
    assert groups[0].learning_rate == constant(rate)


def test_schedule_of_a_generic_configuration_wins_over_its_lr() -> None:
    config = OptimizerConfig(learning_rate=constant(0.5), sgd=SgdConfig(lr=0.25))
    assert group_parameters(Ranker(), config)[0].learning_rate == constant(0.5)


# Parameters that are updated during the backward pass


def test_fused_tables_are_in_no_group_whether_listed_as_parameters_or_not() -> None:
    model = EmbeddingRanker()
    fused = {name: param.detach() for name, param in model.named_parameters() if "ebc" in name}
    groups = group_parameters(model, multi_task_config(), EMBEDDING_RATE, fused)
    assert [group.name for group in groups] == [LIKED, REPLIED, "backbone"]


@pytest.mark.usefixtures("process_group")
def test_fused_tables_are_recognised_by_name_under_a_wrapper() -> None:
    model = EmbeddingRanker()
    fused = {name: param.detach() for name, param in model.named_parameters() if "ebc" in name}
    wrapped = torch.compile(data_parallel(model))
    groups = group_parameters(wrapped, multi_task_config(), EMBEDDING_RATE, fused)
    assert [group.name for group in groups] == [LIKED, REPLIED, "backbone"]


def test_fused_tables_are_recognised_by_identity() -> None:
    model = EmbeddingRanker()
    fused = {"another.name": model.ebc.embedding_bags["t_user"].weight}
    groups = group_parameters(model, multi_task_config(), EMBEDDING_RATE, fused)
    assert names(groups)[-1] == ("dense_ebc", "dense_embeddings", TABLES[1:])


def test_parameters_with_an_in_backward_optimizer_are_in_no_group(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Ranker()
    model._backbone[0].weight._in_backward_optimizers = [object()]
    with caplog.at_level(logging.WARNING, logger="recap_fast"):
        groups = group_parameters(model, multi_task_config())
    assert "'_backbone.0.weight' are updated in the backward pass by optimizers of" in caplog.text
    assert names(groups)[-1] == ("backbone", "backbone", BACKBONE[1:])


def test_rank_without_a_shard_may_have_an_embedding_rate_or_not() -> None:
    for emb_config in (None, EMBEDDING_RATE):
        groups = group_parameters(Ranker(), multi_task_config(), emb_config, fused_params={})
        assert [group.name for group in groups] == [LIKED, REPLIED, "backbone"]


def sharded_elsewhere() -> EmbeddingRanker:
    """As on a process of torchrec's model parallel that has no shard."""
    model = EmbeddingRanker()
    for bag in model.ebc.embedding_bags.values():
        bag.weight = nn.Parameter(torch.empty(0))
        bag.weight._in_backward_optimizers = [object()]
    return model


def test_tables_of_other_processes_are_in_no_group_and_need_no_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, logger="recap_fast"):
        groups = group_parameters(sharded_elsewhere(), multi_task_config(), EMBEDDING_RATE, {})
    assert [group.name for group in groups] == [LIKED, REPLIED, "backbone"]
    assert not caplog.records


def test_a_missing_embedding_rate_is_refused_on_every_process() -> None:
    with pytest.raises(ValueError, match=f"a fused optimizer .of '{TABLES[0]}'.*no learning rate"):
        group_parameters(sharded_elsewhere(), multi_task_config(), None, {})


# Tables with their own options


def embedding_config(**options: object) -> EmbeddingOptimizerConfig:
    return EmbeddingOptimizerConfig.model_validate({"learning_rate": {"constant": 0.1}, **options})


def own_rate(rate: float) -> dict[str, object]:
    return {"learning_rate": {"constant": rate}}


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        ({"t_item": {"sgd": {}}}, [("dense_ebc", TABLES, 0.1)]),
        ({"t_item": own_rate(0.1)}, [("dense_ebc", TABLES, 0.1)]),
        (
            {"t_item": own_rate(0.2)},
            [("dense_ebc", TABLES[:1], 0.1), ("dense_ebc.t_item", TABLES[1:], 0.2)],
        ),
        (
            {"t_user": own_rate(0.2)},
            [("dense_ebc.t_user", TABLES[:1], 0.2), ("dense_ebc", TABLES[1:], 0.1)],
        ),
        (
            {"t_user": own_rate(0.2), "t_item": own_rate(0.2)},
            [("dense_ebc.t_user", TABLES, 0.2)],
        ),
    ],
)
def test_unfused_tables_have_a_group_for_each_schedule(
    tables: dict[str, object], expected: list[tuple[str, list[str], float]]
) -> None:
    groups = group_parameters(
        EmbeddingRanker(), multi_task_config(), embedding_config(tables=tables)
    )
    assert [(group.name, list(group.params), group.learning_rate) for group in groups[3:]] == [
        (name, params, constant(rate)) for name, params, rate in expected
    ]
    assert all(group.role == "dense_embeddings" for group in groups[3:])


def test_a_common_rate_is_not_needed_if_every_table_has_its_own() -> None:
    tables = {"t_user": own_rate(0.1), "t_item": own_rate(0.2)}
    config = EmbeddingOptimizerConfig.model_validate({"tables": tables})
    groups = group_parameters(EmbeddingRanker(), multi_task_config(), config)
    assert [group.name for group in groups[3:]] == ["dense_ebc.t_user", "dense_ebc.t_item"]


ALGORITHMS = {
    "sgd": ({"sgd": {}}, "sgd", {}),
    "adagrad": ({"adagrad": {}}, "adagrad", {"eps": 1e-8}),
    "rowwise_adagrad": (
        {"rowwise_adagrad": {"eps": 0.5, "weight_decay": 0.1, "weight_decay_mode": "decouple"}},
        "rowwise_adagrad",
        {"eps": 0.5, "weight_decay": 0.1, "decoupled_weight_decay": True},
    ),
    "l2": (
        {"rowwise_adagrad": {"weight_decay": 0.1, "weight_decay_mode": "l2"}},
        "rowwise_adagrad",
        {"eps": 1e-8, "weight_decay": 0.1, "decoupled_weight_decay": False},
    ),
    "adam": (
        {"adam": {"beta_1": 0.8, "weight_decay": 0.1}},
        "lazy_adamw",
        {"betas": (0.8, 0.999), "eps": 1e-8, "weight_decay": 0.1},
    ),
}


@pytest.mark.parametrize(
    ("options", "algorithm", "hyperparameters"), ALGORITHMS.values(), ids=ALGORITHMS
)
def test_unfused_tables_train_by_the_algorithm_that_is_chosen(
    options: dict[str, object], algorithm: str, hyperparameters: dict[str, object]
) -> None:
    """For all, or for one."""
    config = embedding_config(**options)
    (group,) = group_parameters(EmbeddingRanker(), multi_task_config(), config)[3:]
    assert (group.name, list(group.params)) == ("dense_ebc", TABLES)
    assert (group.algorithm, group.hyperparameters) == (algorithm, hyperparameters)
    config = embedding_config(rowwise_adagrad={"eps": 1}, tables={"t_item": options})
    first, second = group_parameters(EmbeddingRanker(), multi_task_config(), config)[3:]
    assert (first.name, list(first.params)) == ("dense_ebc", TABLES[:1])
    assert (first.algorithm, first.hyperparameters["eps"]) == ("rowwise_adagrad", 1)
    assert (second.name, list(second.params)) == ("dense_ebc.t_item", TABLES[1:])
    assert (second.algorithm, second.hyperparameters) == (algorithm, hyperparameters)


@pytest.mark.parametrize("config", [SINGLE_TASK, GENERIC], ids=["single task", "generic"])
@pytest.mark.parametrize(
    "options", [{"rowwise_adagrad": {}}, {"sgd": {}}, {"tables": {"t_item": own_rate(0.1)}}]
)
def test_a_table_that_is_configured_is_in_no_group_of_everything(
    options: dict[str, object], config: RecapOptimizerConfig | OptimizerConfig
) -> None:
    """One table is fused and has the options, and the other one has them too."""
    model = EmbeddingRanker()
    fused = {TABLES[0]: model.ebc.embedding_bags["t_user"].weight}
    everything, tables = group_parameters(model, config, embedding_config(**options), fused)
    assert everything.role == "all" and TABLES[1] not in everything.params
    assert (tables.name, list(tables.params)) == ("dense_ebc", TABLES[1:])
    assert tables.learning_rate == constant(0.1)


@pytest.mark.parametrize("options", [{}, {"stochastic_rounding": False}])
def test_a_table_with_the_common_rate_alone_stays_in_the_group_of_everything(
    options: dict[str, object],
) -> None:
    model = EmbeddingRanker()
    fused = {TABLES[0]: model.ebc.embedding_bags["t_user"].weight}
    (group,) = group_parameters(model, SINGLE_TASK, embedding_config(**options), fused)
    assert TABLES[1] in group.params


def test_a_table_of_a_tower_is_in_its_group_unless_it_is_configured() -> None:
    table = "towers.a.ebc.embedding_bags.t.weight"
    model = Tree("towers.a.weight", table, "x.weight", "ebc.embedding_bags.u.weight")
    groups = group_parameters(model, multi_task_config(("a",)), embedding_config())
    assert names(groups) == [
        ("a", "tower", ["towers.a.weight", table]),
        ("backbone", "backbone", ["x.weight"]),
        ("dense_ebc", "dense_embeddings", ["ebc.embedding_bags.u.weight"]),
    ]
    config = embedding_config(tables={"t": {"adagrad": {}, **own_rate(0.2)}})
    groups = group_parameters(model, multi_task_config(("a",)), config)
    assert names(groups) == [
        ("a", "tower", ["towers.a.weight"]),
        ("backbone", "backbone", ["x.weight"]),
        ("dense_ebc.t", "dense_embeddings", [table]),
        ("dense_ebc", "dense_embeddings", ["ebc.embedding_bags.u.weight"]),
    ]
    assert (groups[2].algorithm, groups[2].learning_rate) == ("adagrad", constant(0.2))


# Shared parameters


def tied(first: str, second: str) -> Tree:
    model = Tree("towers.a.weight", "x.weight", first)
    model.put(second, model.get_parameter(first))
    return model


def test_shared_parameter_goes_in_once_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="recap_fast"):
        groups = group_parameters(tied("y.weight", "z.weight"), multi_task_config(("a",)))
    assert names(groups)[-1] == ("backbone", "backbone", ["x.weight", "y.weight"])
    assert "'y.weight' and 'z.weight' are the same parameter" in caplog.text


def test_parameter_shared_by_two_groups_is_in_the_first_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As in the original, which sees the first name only."""
    with caplog.at_level(logging.WARNING, logger="recap_fast"):
        groups = group_parameters(tied("towers.a.other", "y.weight"), multi_task_config(("a",)))
    assert names(groups) == [
        ("a", "tower", ["towers.a.weight", "towers.a.other"]),
        ("backbone", "backbone", ["x.weight"]),
    ]
    assert "'towers.a.other' and 'y.weight' are the same parameter" in caplog.text
    assert "the group 'a', not 'backbone', has it" in caplog.text


def test_tower_of_parameters_of_another_tower_is_refused() -> None:
    model = tied("towers.a.weight", "towers.b.weight")
    with pytest.raises(ValueError, match="all parameters of the task 'b' are those of another"):
        group_parameters(model, multi_task_config(("a", "b")))


def test_embedding_rate_without_tables_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="recap_fast"):
        groups = group_parameters(Ranker(), multi_task_config(), EMBEDDING_RATE)
    assert [group.name for group in groups] == [LIKED, REPLIED, "backbone"]
    assert "emb_optimizer_config has no effect: the model has no tables" in caplog.text


def test_parameter_shared_by_two_groups_is_fine_in_one_group_of_everything() -> None:
    groups = group_parameters(tied("towers.a.other", "y.weight"), SINGLE_TASK)
    assert list(groups[0].params) == ["towers.a.weight", "towers.a.other", "x.weight"]


# What is refused


ERRORS = {
    "mistyped task": (
        Ranker(),
        multi_task_config(("ml.likd", REPLIED)),
        None,
        "'ml__likd' (task 'ml.likd'); did you mean 'ml__liked'?",
    ),
    "unknown task": (
        Tree("tower.weight", "x.weight"),
        multi_task_config(("zzz",)),
        None,
        "in a module called 'zzz' (task 'zzz'); there are 'tower', 'x'",
    ),
    "parameter of two tasks": (
        Tree("a.b.weight", "b.weight"),
        multi_task_config(("a", "b"), backbone=False),
        None,
        "'a.b.weight' matches several tasks: 'a', 'b'",
    ),
    "tasks with the same module": (
        Tree("a__b.weight"),
        multi_task_config(("a.b", "a__b")),
        None,
        "'a.b' and 'a__b' have the same module name, 'a__b'",
    ),
    "backbone without a rate": (
        Ranker(),
        multi_task_config(backbone=False),
        None,
        "backbone_learning_rate is not set, but '_backbone.0.weight', '_backbone.0.bias' are",
    ),
    "tower without a rate": (
        Ranker(),
        multi_task_config((LIKED,), backbone=False),
        None,
        "'_affine.ml__replied.weight' and 1 more are in no tower of tower_learning_rates",
    ),
    "rate without a backbone": (
        Tree("towers.a.weight"),
        multi_task_config(("a",)),
        None,
        "backbone_learning_rate is set, but the model has no backbone",
    ),
    "tables without a configuration": (
        EmbeddingRanker(),
        multi_task_config(),
        None,
        f"the embedding tables '{TABLES[0]}', '{TABLES[1]}' have no learning rate",
    ),
    "tables without a rate": (
        EmbeddingRanker(),
        multi_task_config(),
        EmbeddingOptimizerConfig(init_learning_rate=0.1),
        "emb_optimizer_config has no learning_rate",
    ),
    "tables with an algorithm of fused ones": (
        EmbeddingRanker(),
        multi_task_config(),
        embedding_config(lamb={}),
        f"chooses lamb, but '{TABLES[0]}', '{TABLES[1]}' are not fused",
    ),
    "a table with an algorithm of fused ones": (
        EmbeddingRanker(),
        multi_task_config(),
        embedding_config(tables={"t_item": {"ema_rowwise_adagrad": {}}}),
        f"chooses ema_rowwise_adagrad, but '{TABLES[1]}' are not fused",
    ),
    "rows without a gradient": (
        EmbeddingRanker(),
        multi_task_config(),
        embedding_config(adagrad={"eps": 0}),
        "chooses adagrad.eps of 0, by which rows without a gradient would become NaN, but",
    ),
    "a norm of rows": (
        EmbeddingRanker(),
        multi_task_config(),
        embedding_config(rowwise_adagrad={"max_norm": 1}),
        f"chooses rowwise_adagrad.max_norm, but '{TABLES[0]}'",
    ),
    "decay by counters": (
        EmbeddingRanker(),
        multi_task_config(),
        embedding_config(rowwise_adagrad={"weight_decay_mode": "counter", "counter": {}}),
        f"chooses rowwise_adagrad.weight_decay_mode counter, but '{TABLES[0]}'",
    ),
    "counts of rows": (
        EmbeddingRanker(),
        multi_task_config(),
        embedding_config(adam={"rowwise_bias_correction": True}),
        f"chooses adam.rowwise_bias_correction, but '{TABLES[0]}'",
    ),
    "state of 16 bits": (
        EmbeddingRanker().half(),
        multi_task_config(),
        embedding_config(adagrad={}),
        f"chooses adagrad for a table of float16, but '{TABLES[0]}'",
    ),
    "moments of 16 bits": (
        EmbeddingRanker().half(),
        multi_task_config(),
        embedding_config(adam={}),
        f"chooses adam for a table of float16, but '{TABLES[0]}'",
    ),
    "clipped tables": (
        EmbeddingRanker(),
        multi_task_config(),
        embedding_config(gradient_clipping=1.0),
        f"chooses gradient_clipping, but '{TABLES[0]}', '{TABLES[1]}' are not fused",
    ),
    "a table that does not exist": (
        EmbeddingRanker(),
        multi_task_config(),
        embedding_config(tables={"t_itme": own_rate(0.2)}),
        "emb_optimizer_config.tables: the model has no table 't_itme'; did you mean 't_item'?",
    ),
    "one table without a rate": (
        EmbeddingRanker(),
        multi_task_config(),
        EmbeddingOptimizerConfig.model_validate({"tables": {"t_item": own_rate(0.2)}}),
        f"no learning_rate: set it, since '{TABLES[0]}' have none of their own",
    ),
    "a tower of tables": (
        Tree("towers.a.ebc.embedding_bags.t.weight", "x.weight", "ebc.embedding_bags.u.weight"),
        multi_task_config(("a",)),
        embedding_config(tables={"t": own_rate(0.2)}),
        "all parameters of the task 'a' are tables that emb_optimizer_config configures "
        "('towers.a.ebc.embedding_bags.t.weight'); remove its rate",
    ),
    "a single task of tables": (
        Tree("ebc.embedding_bags.t.weight"),
        SINGLE_TASK,
        embedding_config(adagrad={}),
        "'single_task' has a learning rate but no parameters: all of the model's are updated "
        "during the backward pass or tables that emb_optimizer_config configures",
    ),
    "embedding rate for one group of everything": (
        EmbeddingRanker(),
        SINGLE_TASK,
        EMBEDDING_RATE,
        "nothing uses it: the model has no fused optimizer and no group of dense embeddings, "
        "only single_task",
    ),
    "model without parameters": (
        nn.ReLU(),
        GENERIC,
        None,
        "no trainable parameter; found no parameters at all",
    ),
    "frozen model": (
        nn.Linear(2, 1).requires_grad_(False),
        GENERIC,
        None,
        "no trainable parameter; found frozen ones only: 'weight', 'bias'",
    ),
}


@pytest.mark.parametrize(
    ("model", "config", "emb_config", "message"), ERRORS.values(), ids=ERRORS.keys()
)
def test_refused(
    model: nn.Module,
    config: RecapOptimizerConfig | OptimizerConfig,
    emb_config: EmbeddingOptimizerConfig | None,
    message: str,
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        group_parameters(model, config, emb_config)


def test_fused_optimizer_without_a_rate_is_refused() -> None:
    model = EmbeddingRanker()
    fused = {name: param for name, param in model.named_parameters() if "ebc" in name}
    with pytest.raises(ValueError, match=f"a fused optimizer .of '{TABLES[0]}'.*no learning rate"):
        group_parameters(model, multi_task_config(), None, fused)


def test_tower_of_fused_tables_only_is_refused() -> None:
    model = Tree("towers.a.embedding_bags.t.weight", "x.weight")
    fused = {"towers.a.embedding_bags.t.weight": torch.ones(2)}
    with pytest.raises(ValueError, match=r"task 'a' are updated during.*'towers.a.embedding_bags"):
        group_parameters(model, multi_task_config(("a",)), EMBEDDING_RATE, fused)


def test_single_group_without_dense_parameters_is_refused() -> None:
    model = Tree("ebc.embedding_bags.t.weight")
    fused = {"ebc.embedding_bags.t.weight": torch.ones(2)}
    with pytest.raises(ValueError, match="'ALL_PARAMS' has a learning rate but no parameters"):
        group_parameters(model, GENERIC, EMBEDDING_RATE, fused)


def test_configuration_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match=r"optimizer_config must be a Recap.* found list"):
        group_parameters(Ranker(), [0.1])
