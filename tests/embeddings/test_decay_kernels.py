"""Arguments, states and shards of kernels with row-wise Adagrad's modes of weight decay."""

from __future__ import annotations

import inspect
import re
from typing import Any

import fbgemm_gpu.split_embedding_codegen_lookup_invokers as invokers
import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    SplitTableBatchedEmbeddingBagsCodegen,
    WeightDecayMode,
)
from fbgemm_gpu.tbe.config.optimizer_config import (
    CounterBasedRegularizationDefinition,
    CowClipDefinition,
    GlobalWeightDecayDefinition,
    LearningRateMode,
    TailIdThreshold,
)

from recap_fast import build_optimizer
from recap_fast.config import (
    EmbeddingCounterConfig,
    EmbeddingCowclipConfig,
    EmbeddingGlobalDecayConfig,
    EmbeddingOptimizerConfig,
)
from recap_fast.embeddings import check_kernels, fuse_embeddings, set_table_optimizers
from recap_fast.embeddings.fused_optimizer import KernelOptimizer
from recap_fast.embeddings.kernel_arguments import kernel_arguments, table_kernel
from tests.embeddings.test_row_decay import MODES, by_counter, decay
from tests.embeddings.test_sharded_tables import CONFIGS, assert_equal_tables, train_halves_alone
from tests.support.models import features
from tests.support.processes import device, run
from tests.support.table_reference import table
from tests.support.table_training import (
    DENSE,
    Tables,
    shard,
    train_all_sharded,
    train_alone,
    whole_tables,
)
from tests.support.tables import TABLES, config_of, ranker

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


# On CUDA, by FBGEMM's sources


def test_sections_have_what_fbgemm_hands_to_the_kernel() -> None:
    source = inspect.getsource(invokers.lookup_rowwise_adagrad_with_counter)
    handed = set(re.findall(r"dict_optim_\w+\[.*optimizer_args\.(\w+)", source))
    names = {"is_tail_id_thresh_ratio": "tail_id_threshold_is_ratio"}
    names["weight_decay_mode"] = "counter_weight_decay_mode"
    ours = {*EmbeddingCounterConfig.model_fields, *EmbeddingCowclipConfig.model_fields}
    ours -= {"max_counter_update_freq"}  # for the module, not the kernel
    own = {"eps", "weight_decay", "regularization_mode"}
    # No kernel reads the last one; there is no max_norm.
    assert {names.get(name, name) for name in handed - own} == {*ours, "grad_sum_decay"}


def test_global_decay_has_what_fbgemm_reads() -> None:
    source = inspect.getsource(SplitTableBatchedEmbeddingBagsCodegen)
    read = set(re.findall(r"global_weight_decay\.(\w+)$", source, flags=re.MULTILINE))
    assert read == EmbeddingGlobalDecayConfig.model_fields.keys()


@pytest.mark.parametrize(
    ("section", "theirs"),
    [
        (EmbeddingCounterConfig, CounterBasedRegularizationDefinition()),
        (EmbeddingCowclipConfig, CowClipDefinition()),
        (EmbeddingGlobalDecayConfig, GlobalWeightDecayDefinition()),
    ],
    ids=["counter", "cowclip", "decouple_global"],
)
def test_defaults_are_those_of_fbgemm(section: Any, theirs: Any) -> None:
    expected = vars(theirs).copy()
    expected.pop("grad_sum_decay", None)
    if "tail_id_threshold" in expected:
        threshold = expected["tail_id_threshold"]
        expected["tail_id_threshold"] = threshold.val
        expected["tail_id_threshold_is_ratio"] = threshold.is_ratio
    names = {
        name: value.name.lower() if hasattr(value, "name") else value
        for name, value in expected.items()
    }
    assert {name: field.default for name, field in section.model_fields.items()} == names


GLOBAL = decay("decouple_global", start_iter=3, lower_bound=0.25)
RATIO = decay(
    "counter",
    0.0,
    learning_rate_mode="tail_id_lr_decrease",
    tail_id_threshold=0.5,
    tail_id_threshold_is_ratio=True,
    max_counter_update_freq=7,
)
ON_CUDA: dict[str, tuple[dict[str, Any], list[str]]] = {
    **{
        name: (section, ["sum", "prev_iter", "row_counter", "step"])
        for name, section in MODES.items()
    },
    "ratio": (RATIO, ["sum", "prev_iter", "row_counter", "step", "max_counter"]),
    "decouple_global": (GLOBAL, ["sum", "prev_iter", "step"]),
    "l2": ({"weight_decay": 0.5, "weight_decay_mode": "l2"}, ["sum"]),
}


@pytest.mark.parametrize(("section", "states"), ON_CUDA.values(), ids=ON_CUDA)
def test_on_cuda_there_are_these_states(section: dict[str, Any], states: list[str]) -> None:
    """On the meta device, where FBGEMM makes a kernel all the same."""
    kernel = table_kernel(config_of(rowwise_adagrad=section), table("a", "user"), CUDA)
    specs = [(6, 8, EmbeddingLocation.DEVICE, ComputeDevice.CUDA)]
    module = SplitTableBatchedEmbeddingBagsCodegen(
        specs, device=torch.device("meta"), **dict(kernel.arguments)
    )
    state = KernelOptimizer(["t.weight"], module).state_dict()["state"]["t.weight"]
    assert list(state) == states
    shapes = {"step": (1,), "max_counter": (1,)}
    assert all(value.shape == shapes.get(name, (6,)) for name, value in state.items())
    (theirs,) = module.get_optimizer_state()
    assert theirs.keys() - {"iter"} == set(states) - {"step", "max_counter"}


def test_arguments_on_cuda() -> None:
    arguments = kernel_arguments(config_of(rowwise_adagrad=GLOBAL))
    assert arguments["weight_decay_mode"] == WeightDecayMode.DECOUPLE_GLOBAL
    assert arguments["global_weight_decay"] == GlobalWeightDecayDefinition(3, 0.25)
    arguments = kernel_arguments(config_of(rowwise_adagrad=RATIO))
    assert arguments["weight_decay_mode"] == WeightDecayMode.COUNTER
    found = arguments["counter_based_regularization"]
    assert found.learning_rate_mode == LearningRateMode.TAIL_ID_LR_DECREASE
    assert found.tail_id_threshold == TailIdThreshold(0.5, True)
    assert found.max_counter_update_freq == 7


# State, and what was built


@pytest.mark.parametrize("name", ["counter decouple", "adagradw late", "cowclip l2"])
def test_loaded_state_trains_on(name: str) -> None:
    config = config_of(rowwise_adagrad=MODES[name])
    straight, resumed = (fuse_embeddings(ranker(), config) for _ in range(2))
    for number in range(3):
        straight(features(number)).sum().backward()
    resumed(features(7)).sum().backward()
    resumed.load_state_dict(straight.state_dict())
    resumed.fused_optimizer.load_state_dict(straight.fused_optimizer.state_dict())
    for number in range(3, 6):
        for model in (straight, resumed):
            model(features(number)).sum().backward()
    for table_name in TABLES:
        assert torch.equal(resumed.get_parameter(table_name), straight.get_parameter(table_name))


def test_max_counter_is_loaded() -> None:
    """On the CPU, where FBGEMM has it too, but never changes it."""
    arguments = {**kernel_arguments(config_of(rowwise_adagrad=RATIO)), "learning_rate": 0.5}
    specs = [(6, 8, EmbeddingLocation.HOST, ComputeDevice.CPU)]
    kernels = [
        SplitTableBatchedEmbeddingBagsCodegen(specs, device=CPU, **arguments) for _ in range(2)
    ]
    kernels[0].max_counter.fill_(5.0)
    first, second = (KernelOptimizer(["t.weight"], kernel) for kernel in kernels)
    second.load_state_dict(first.state_dict())
    assert kernels[1].max_counter.item() == 5.0


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "mode": ({"weight_decay": 0.125, "weight_decay_mode": "l2"}, "weight_decay_mode=1"),
    "field": (by_counter("decouple", 3), "counter_based_regularization=.*counter_halflife=3"),
    "cowclip": (MODES["cowclip"], "weight_decay_mode=4"),
    "global": (GLOBAL, "weight_decay_mode=5"),
}


@pytest.mark.parametrize(("section", "message"), WRONG.values(), ids=WRONG)
def test_other_kernels_than_configured_are_noticed(section: dict[str, Any], message: str) -> None:
    configs = [table("a", "user", "item")]
    first = config_of(rowwise_adagrad=MODES["counter decouple"])
    model = fuse_embeddings(Tables(configs), first)
    build_optimizer(model, DENSE, first)
    with pytest.raises(ValueError, match=f"asks for {message}.* for the table a, but it was made"):
        build_optimizer(model, DENSE, config_of(rowwise_adagrad=section))


@pytest.mark.parametrize("section", [*MODES.values(), RATIO], ids=[*MODES, "ratio"])
def test_kernels_as_configured_pass(section: dict[str, Any]) -> None:
    config = config_of(rowwise_adagrad=section)
    arguments = {**kernel_arguments(config), "learning_rate": 0.5}
    specs = [(6, 8, EmbeddingLocation.HOST, ComputeDevice.CPU)]
    kernel = SplitTableBatchedEmbeddingBagsCodegen(specs, device=CPU, **arguments)
    for name, value in kernel_arguments(config).items():
        assert check_kernels._argument(kernel, name) == value


# Sharded

KEPT = ("counter decouple", "adagradw late", "cowclip l2")
CASES = {
    f"{name} {kind}": (
        CONFIGS,
        {"learning_rate": {"constant": 0.5}, "rowwise_adagrad": MODES[name]},
        dict.fromkeys("ab", kind),
    )
    for name in KEPT
    for kind in ("table_wise", "row_wise", "column_wise")
}


@pytest.fixture(scope="module")
def results(table_backend: str) -> dict[str, list[dict[str, Any]]]:
    first, second = run(2, train_all_sharded, CASES, range(5), backend=table_backend)
    return {name: [first[name], second[name]] for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_sharded_training_is_that_of_one_process(
    name: str, results: dict[str, list[dict[str, Any]]], table_backend: str
) -> None:
    """Bit for bit on gloo; column-wise, like one whose tables are the halves."""
    _, options, _ = CASES[name]
    optimizer = EmbeddingOptimizerConfig(**options)
    found = whole_tables(CONFIGS, results[name])
    if "column_wise" in name:
        expected = train_halves_alone(optimizer)
    else:
        expected = train_alone(CONFIGS, optimizer, range(5))
    assert_equal_tables(found, expected, table_backend)


def sharded_states(names: list[str]) -> dict[str, set[str]]:
    """On every process: what torchrec calls the states of table a."""
    found = {}
    for name in names:
        optimizer = config_of(rowwise_adagrad=MODES[name])
        model = set_table_optimizers(Tables(CONFIGS), optimizer, device())
        sharded = shard(model, dict.fromkeys("ab", "row_wise"))
        state = sharded.fused_optimizer.state_dict()["state"]["ebc.embedding_bags.a.weight"]
        found[name] = {key.removeprefix("a.") for key in state}
    return found


def test_sharded_states_are_shown(table_backend: str) -> None:
    for found in run(2, sharded_states, list(KEPT), backend=table_backend):
        own = {"momentum1", "prev_iter", "row_counter"}
        assert found == {name: own | ({"iter"} if "adagradw" in name else set()) for name in KEPT}
