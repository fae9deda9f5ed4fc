"""The assembled optimizer and scheduler: both builders, both families of configurations."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed
from torch import nn
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.optim import RowWiseAdagrad, keyed
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from recap_fast import build, reference
from recap_fast.config import (
    AdagradConfig,
    AdamConfig,
    EmbeddingOptimizerConfig,
    EmbeddingRowwiseAdagradConfig,
    LearningRate,
    LinearRampToCosine,
    MultiTaskLearningRates,
    OptimizerConfig,
    RecapAdagradConfig,
    RecapAdamConfig,
    RecapOptimizerConfig,
    RecapSgdConfig,
    SgdConfig,
)
from recap_fast.embeddings import fuse_embeddings
from recap_fast.keyed.fused import CombinedOptimizer, FusedCombinedOptimizer
from recap_fast.optim import FusedAdagrad, FusedAdam, FusedSGD
from recap_fast.scheduler import RecapLRShim
from tests.support.models import (
    EMBEDDING_RATE,
    LIKED,
    REPLIED,
    EmbeddingRanker,
    constant,
    features,
    multi_task_config,
    ramp,
    tables,
)

Builder = Callable[..., tuple[keyed.CombinedOptimizer, RecapLRShim]]
BUILDERS = {"fused": build.build_optimizer, "reference": reference.build_optimizer}
CLASSES = {
    "fused": {"adam": FusedAdam, "adagrad": FusedAdagrad, "sgd": FusedSGD},
    "reference": {
        "adam": torch.optim.Adam,
        "adagrad": torch.optim.Adagrad,
        "sgd": torch.optim.SGD,
    },
}
TABLES = ["ebc.embedding_bags.t_user.weight", "ebc.embedding_bags.t_item.weight"]


@pytest.fixture(params=BUILDERS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def build_optimizer(kind: str) -> Builder:
    return BUILDERS[kind]


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("store") / "file"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def embedding_ranker(seed: int = 0) -> EmbeddingRanker:
    torch.manual_seed(seed)
    return EmbeddingRanker()


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    return model(features(step)).square().mean()


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: RecapLRShim, steps: int
) -> list[list[float]]:
    """Returns the rate of every param group at each step."""
    rates = []
    for step in range(steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        scheduler.step()
    return rates


def linear(rate: float, steps: int, step: int) -> float:
    """What `ramp(rate, steps)` is at `step`."""
    return rate * min(step, steps) / steps


# Groups and rates


def test_groups_are_in_order_and_follow_their_schedules(build_optimizer: Builder) -> None:
    model = embedding_ranker()
    optimizer, scheduler = build_optimizer(
        model, multi_task_config((REPLIED, LIKED)), EMBEDDING_RATE
    )
    assert scheduler.group_names == [REPLIED, LIKED, "backbone", "dense_ebc"]
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 4, 2, 2]
    towers = model.ranker._towers
    assert optimizer.param_groups[0]["params"][0] is towers["ml__replied"].weight
    assert optimizer.param_groups[1]["params"][0] is towers["ml__liked"].weight
    for step, rates in enumerate(train(model, optimizer, scheduler, steps=6)):
        assert rates == pytest.approx(
            [
                linear(0.01, 3, step),
                linear(0.02, 4, step),
                linear(0.005, 2, step),
                linear(0.1, 4, step),
            ],
            rel=1e-12,
        )


def test_fused_embeddings_come_last_and_follow_the_embedding_rate(
    build_optimizer: Builder,
) -> None:
    model = fuse_embeddings(embedding_ranker(), EMBEDDING_RATE)
    optimizer, scheduler = build_optimizer(model, multi_task_config(), EMBEDDING_RATE)
    assert scheduler.group_names == [LIKED, REPLIED, "backbone"]
    assert optimizer.optimizers[-1][1] is model.fused_optimizer
    for step, rates in enumerate(train(model, optimizer, scheduler, steps=6)):
        assert len(rates) == 4
        assert rates[-1] == pytest.approx(linear(0.1, 4, step))


def test_the_tables_are_updated_with_the_rate_of_the_step(build_optimizer: Builder) -> None:
    rate = LearningRate(
        linear_ramp_to_cosine=LinearRampToCosine(
            learning_rate=0.5, final_learning_rate=0.1, num_ramp_steps=2, final_num_steps=4
        )
    )
    cosine = 0.1 + 0.4 * (1 + math.cos(math.pi / 2)) / 2
    # The rate to start with is another: nothing may be updated by it.
    config = EmbeddingOptimizerConfig(learning_rate=rate, init_learning_rate=7.0)
    model = fuse_embeddings(embedding_ranker(), config)
    optimizer, scheduler = build_optimizer(model, multi_task_config(), config)
    for step, expected in enumerate([0.0, 0.25, 0.5, cosine, 0.1, 0.1]):
        unfused = embedding_ranker()
        unfused.load_state_dict(model.state_dict())
        loss_of(unfused, step).backward()
        optimizer.zero_grad()
        loss_of(model, step).backward()
        for name in TABLES:
            before = unfused.get_parameter(name)
            torch.testing.assert_close(
                model.get_parameter(name).detach(), before.detach() - expected * before.grad
            )
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("task", ["backbone", "dense_ebc"])
def test_task_named_like_another_group_has_its_own_rate_and_algorithm(
    kind: str, build_optimizer: Builder, task: str
) -> None:
    model = EmbeddingRanker(tasks=(task,))
    config = RecapOptimizerConfig(
        multi_task_learning_rates=MultiTaskLearningRates(
            tower_learning_rates={task: constant(0.1)}, backbone_learning_rate=constant(0.2)
        ),
        adam=RecapAdamConfig(),
    )
    optimizer, _ = build_optimizer(
        model, config, EmbeddingOptimizerConfig(learning_rate=constant(0.3))
    )
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2, 0.3]
    classes = CLASSES[kind]
    assert [type(part._optimizer) for _, part in optimizer.optimizers] == [
        classes["adam"],
        classes["adam"],
        classes["sgd"],
    ]
    assert next(iter(optimizer.optimizers[0][1].params)) == f"ranker._towers.{task}.weight"


def test_the_sentinel_is_not_where_other_schedulers_begin(build_optimizer: Builder) -> None:
    assert build.DEFAULT_LR == 24601.0
    optimizer, _ = build_optimizer(EmbeddingRanker(), multi_task_config(), EMBEDDING_RATE)
    assert [group["initial_lr"] for group in optimizer.param_groups] == [
        group["lr"] for group in optimizer.param_groups
    ]


# Algorithms

DENSE_ALGORITHMS = {
    "adam": (
        RecapAdamConfig(beta_1=0.8, beta_2=0.95, epsilon=1e-5),
        {"betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0, "amsgrad": False},
    ),
    "adagrad": (
        RecapAdagradConfig(epsilon=1e-5, initial_accumulator_value=0.25),
        {"eps": 1e-5, "initial_accumulator_value": 0.25, "lr_decay": 0},
    ),
    "sgd": (
        RecapSgdConfig(momentum=0.5, nesterov=True),
        {"momentum": 0.5, "nesterov": True, "dampening": 0},
    ),
}


@pytest.mark.parametrize("algorithm", DENSE_ALGORITHMS)
def test_algorithm_of_the_dense_groups(kind: str, build_optimizer: Builder, algorithm: str) -> None:
    section, expected = DENSE_ALGORITHMS[algorithm]
    optimizer, _ = build_optimizer(
        EmbeddingRanker(), multi_task_config(**{algorithm: section}), EMBEDDING_RATE
    )
    *dense, embeddings = [part._optimizer for _, part in optimizer.optimizers]
    for part in dense:
        assert type(part) is CLASSES[kind][algorithm]
        assert {name: part.param_groups[0][name] for name in expected} == expected
    assert type(embeddings) is CLASSES[kind]["sgd"]
    assert embeddings.param_groups[0]["momentum"] == 0
    assert not embeddings.param_groups[0]["nesterov"]


GENERIC_ALGORITHMS = {
    "adam": (AdamConfig(lr=0.5, betas=(0.8, 0.95), eps=1e-5), {"betas": (0.8, 0.95), "eps": 1e-5}),
    "adagrad": (AdagradConfig(lr=0.5, eps=1e-5), {"eps": 1e-5, "initial_accumulator_value": 0}),
    "sgd": (SgdConfig(lr=0.5, momentum=0.25), {"momentum": 0.25, "nesterov": False}),
}


@pytest.mark.parametrize("algorithm", GENERIC_ALGORITHMS)
def test_generic_configuration_reads_its_own_section(
    kind: str, build_optimizer: Builder, algorithm: str
) -> None:
    section, expected = GENERIC_ALGORITHMS[algorithm]
    model = EmbeddingRanker()
    optimizer, scheduler = build_optimizer(model, OptimizerConfig(**{algorithm: section}))
    ((_, part),) = optimizer.optimizers
    assert type(part._optimizer) is CLASSES[kind][algorithm]
    (group,) = optimizer.param_groups
    assert {name: group[name] for name in expected} == expected
    assert group["params"] == list(model.parameters())
    assert train(model, optimizer, scheduler, steps=2) == [[0.5], [0.5]]


def test_generic_schedule_and_single_task_schedule(build_optimizer: Builder) -> None:
    generic = OptimizerConfig(learning_rate=ramp(0.5, 2), sgd=SgdConfig(lr=9.0))
    single = RecapOptimizerConfig(single_task_learning_rate=ramp(0.5, 2), sgd=RecapSgdConfig())
    for config in (generic, single):
        model = embedding_ranker()
        assert train(model, *build_optimizer(model, config), steps=4) == [
            [0.0],
            [0.25],
            [0.5],
            [0.5],
        ]


# Trajectories and checkpoints


def test_reference_is_a_torch_optimizer_per_group() -> None:
    found, expected = embedding_ranker(), embedding_ranker()
    optimizer, scheduler = reference.build_optimizer(found, multi_task_config(), EMBEDDING_RATE)
    assert type(optimizer) is CombinedOptimizer
    train(found, optimizer, scheduler, steps=5)

    ranker = expected.ranker
    towers = [
        [*ranker._towers[name].parameters(), *ranker._affine[name].parameters()]
        for name in ("ml__liked", "ml__replied")
    ]
    adam = torch.optim.Adam(
        [{"params": params} for params in (*towers, ranker._backbone.parameters())], eps=1e-7
    )
    sgd = torch.optim.SGD(expected.ebc.parameters())
    for step in range(5):
        for group, schedule in zip(
            adam.param_groups, [(0.01, 3), (0.02, 4), (0.005, 2)], strict=True
        ):
            group["lr"] = linear(*schedule, step)
        sgd.param_groups[0]["lr"] = linear(0.1, 4, step)
        expected.zero_grad()
        loss_of(expected, step).backward()
        adam.step()
        sgd.step()
    for name, param in expected.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), param)


@pytest.mark.parametrize("fuse", [False, True], ids=["dense tables", "fused tables"])
@pytest.mark.parametrize("algorithm", DENSE_ALGORITHMS)
def test_both_builders_give_the_same_trajectory_and_checkpoint(algorithm: str, fuse: bool) -> None:
    section, _ = DENSE_ALGORITHMS[algorithm]
    config = multi_task_config(**{algorithm: section})
    runs = []
    for builder in BUILDERS.values():
        model = embedding_ranker()
        if fuse:
            fuse_embeddings(model, EMBEDDING_RATE)
        optimizer, scheduler = builder(model, config, EMBEDDING_RATE)
        rates = train(model, optimizer, scheduler, steps=8)
        runs.append((model, optimizer, rates))
    (fused, optimizer, rates), (expected, expected_optimizer, expected_rates) = runs
    assert isinstance(optimizer, FusedCombinedOptimizer)
    assert rates == expected_rates
    torch.testing.assert_close(fused.state_dict(), expected.state_dict(), rtol=1e-6, atol=1e-7)
    state, expected_state = (part.state_dict()["state"] for part in (optimizer, expected_optimizer))
    # The order within a state is torch's business: it is looked up by name.
    assert list(state) == list(expected_state)
    assert {name: set(fields) for name, fields in state.items()} == {
        name: set(fields) for name, fields in expected_state.items()
    }
    assert set(state) >= {name for name, _ in fused.ranker.named_parameters("ranker")} | (
        set(TABLES) if fuse else set()
    )


@pytest.mark.parametrize("by_step", [None, False, True])
def test_under_a_scaler_both_builders_train_alike(by_step: bool | None) -> None:
    """Tables are dense here: those that are fused learn from the scaled loss."""
    runs = []
    for name, builder in BUILDERS.items():
        options = {} if name == "reference" else {"step_supports_amp_scaling": by_step}
        model = embedding_ranker()
        optimizer, scheduler = builder(model, multi_task_config(), EMBEDDING_RATE, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        scales = []
        for step in range(8):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            if step == 4:
                model.ranker._backbone[0].weight.grad[0, 0] = math.inf
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            scales.append(scaler.get_scale())
        grads = {key: param.grad for key, param in model.named_parameters()}
        runs.append((optimizer, model.state_dict(), grads, scales))
    (optimizer, weights, grads, scales), (_, expected, expected_grads, expected_scales) = runs
    assert optimizer._step_supports_amp_scaling is bool(by_step)
    assert scales == expected_scales
    # The last gradients are of models that differ by the rounding of seven steps.
    torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unscale_grads", [False, True])
def test_gradients_stay_scaled_if_asked_to(unscale_grads: bool) -> None:
    model = embedding_ranker()
    optimizer, _ = build.build_optimizer(
        model,
        multi_task_config(),
        EMBEDDING_RATE,
        step_supports_amp_scaling=True,
        unscale_grads=unscale_grads,
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(loss_of(model, 0)).backward()
    before = {name: param.grad.clone() for name, param in model.named_parameters()}
    scaler.step(optimizer)
    for name, param in model.named_parameters():
        assert torch.equal(param.grad * (2.0**10 if unscale_grads else 1.0), before[name]), name


# Wrappers


WRAPPERS: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "ddp": (nn.parallel.DistributedDataParallel, "module."),
    "compile": (torch.compile, "_orig_mod."),
}


@pytest.mark.parametrize(("wrap", "prefix"), WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.usefixtures("process_group")
def test_wrapped_models(
    build_optimizer: Builder, wrap: Callable[[nn.Module], nn.Module], prefix: str
) -> None:
    model = fuse_embeddings(embedding_ranker(), EMBEDDING_RATE)
    optimizer, scheduler = build_optimizer(wrap(model), multi_task_config(), EMBEDDING_RATE)
    assert scheduler.group_names == [LIKED, REPLIED, "backbone"]
    dense = [f"{prefix}ranker.{name}" for name, _ in model.ranker.named_parameters()]
    assert sorted(optimizer.params) == sorted([*dense, *TABLES])
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[-1]["lr"] == pytest.approx(0.1)


def sharded(model: nn.Module, sharding: str) -> DistributedModelParallel:
    sharders = [EmbeddingBagCollectionSharder()]
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=1, compute_device="cpu"),
        constraints={
            table.name: ParameterConstraints(sharding_types=[sharding]) for table in tables()
        },
    )
    plan = planner.collective_plan(model, sharders, torch.distributed.group.WORLD)
    return DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)


ROWWISE = EmbeddingOptimizerConfig(
    learning_rate=constant(0.25), rowwise_adagrad=EmbeddingRowwiseAdagradConfig()
)


@pytest.mark.usefixtures("process_group")
def test_model_parallel_with_sharded_tables(build_optimizer: Builder) -> None:
    model = embedding_ranker()
    apply_optimizer_in_backward(RowWiseAdagrad, model.ebc.parameters(), {"lr": 9.0})
    parallel = sharded(model, "table_wise")
    optimizer, scheduler = build_optimizer(parallel, multi_task_config(), ROWWISE)
    assert scheduler.group_names == [LIKED, REPLIED, "backbone"]
    assert set(optimizer.params) == {name for name, _ in parallel.named_parameters()}
    assert set(TABLES) <= set(optimizer.params)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0, 0.0, 0.25]
    before = {
        name: value.clone() for name, value in parallel.state_dict().items() if "rank" in name
    }
    train(parallel, optimizer, scheduler, steps=2)
    after = parallel.state_dict()
    assert all(not torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.usefixtures("process_group")
def test_model_parallel_with_replicated_tables(build_optimizer: Builder) -> None:
    # They are dense: torchrec's fused optimizer is there, but has no parameters.
    parallel = sharded(embedding_ranker(), "data_parallel")
    optimizer, scheduler = build_optimizer(parallel, multi_task_config(), EMBEDDING_RATE)
    assert scheduler.group_names == [LIKED, REPLIED, "backbone", "dense_ebc"]
    assert list(optimizer.optimizers[3][1].params) == TABLES
    assert len(optimizer.param_groups) == 4


# Messages


def test_one_line_per_group_is_logged(
    build_optimizer: Builder, caplog: pytest.LogCaptureFixture
) -> None:
    model = fuse_embeddings(embedding_ranker(), EMBEDDING_RATE)
    with caplog.at_level(logging.INFO, logger="recap_fast"):
        build_optimizer(model, multi_task_config(), EMBEDDING_RATE)
    assert [record.getMessage() for record in caplog.records] == [
        "ml.liked: 4 tensors, 11 elements, adam",
        "ml.replied: 4 tensors, 11 elements, adam",
        "backbone: 2 tensors, 168 elements, adam",
        "fused embeddings: 2 tensors, 96 elements, updated in the backward pass",
    ]


def test_a_model_is_needed_and_not_its_parameters(build_optimizer: Builder) -> None:
    model = embedding_ranker()
    for other in (model.parameters(), list(model.parameters()), type(model), None):
        with pytest.raises(TypeError, match=r"model must be an nn\.Module, with all parameters"):
            build_optimizer(other, multi_task_config())


def test_fused_tables_without_a_rate_are_refused(build_optimizer: Builder) -> None:
    model = fuse_embeddings(embedding_ranker(), EMBEDDING_RATE)
    with pytest.raises(ValueError, match=f"fused optimizer .of '{TABLES[0]}'.*no learning rate"):
        build_optimizer(model, multi_task_config())


def test_embedding_rate_for_tables_of_another_group_is_refused(build_optimizer: Builder) -> None:
    config = OptimizerConfig(sgd=SgdConfig(lr=0.1))
    with pytest.raises(ValueError, match="emb_optimizer_config is given, but nothing uses it"):
        build_optimizer(embedding_ranker(), config, EMBEDDING_RATE)
