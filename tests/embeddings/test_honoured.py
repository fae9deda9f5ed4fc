"""What is configured is what FBGEMM does: on the CPU by experiment, on CUDA by its sources."""

from __future__ import annotations

import inspect
import re
from typing import Any

import fbgemm_gpu.split_embedding_codegen_lookup_invokers as invokers
import pytest
import torch
from fbgemm_gpu.config import FeatureGateName
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import nn
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from recap_fast.config import EmbeddingOptimizerConfig, TableOptimizerConfig
from recap_fast.embeddings import fuse_embeddings
from recap_fast.embeddings.algorithms import TABLE_ALGORITHMS, on_cpu
from recap_fast.embeddings.collection import FusedTableCollection
from recap_fast.embeddings.kernel_arguments import (
    TableKernel,
    kernel_arguments,
    table_kernel,
)
from tests.support.models import features
from tests.support.table_reference import loss_with_gradients, random_gradients, table
from tests.support.tables import config_of, kernel_optimizer

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


# On the CPU


def trained(
    config: EmbeddingOptimizerConfig, tables: list[EmbeddingBagConfig]
) -> list[torch.Tensor]:
    """Tables after three steps, whatever we would say about their configuration."""
    collection = EmbeddingBagCollection(tables)
    for index, bag in enumerate(collection.embedding_bags.values()):
        nn.init.uniform_(bag.weight, -2, 2, generator=torch.Generator().manual_seed(index))
    arguments = {**kernel_arguments(config), "learning_rate": 0.5}
    kernel = TableKernel(tuple(arguments.items()), "", "update")
    fused = FusedTableCollection(collection, {config.name: kernel for config in tables}, CPU)
    for step in range(3):
        batch = features(step)
        gradients = random_gradients(tables, batch.stride(), step)
        loss_with_gradients(fused(batch), gradients).backward()
    return [bag.weight.detach().clone() for bag in fused.embedding_bags.values()]


def differ(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))


DECAYS = {
    "l2": {"weight_decay": 0.5, "weight_decay_mode": "l2"},
    "decouple": {"weight_decay": 0.5, "weight_decay_mode": "decouple"},
}
ROWWISE = {"eps": {"eps": 0.5}, "max_norm": {"max_norm": 0.5}, **DECAYS}
HYPERPARAMETERS: dict[str, dict[str, dict[str, Any]]] = {
    "sgd": {},
    "adagrad": {"eps": {"eps": 0.5}},
    "rowwise_adagrad": ROWWISE,
    "ema_rowwise_adagrad": {
        **ROWWISE,
        "step_ema": {"step_ema": 1},
        "step_start": {"step_start": 3},
        "step_ema_coef": {"step_ema_coef": 0.25},
    },
}
HAS_RMSPROP = "rowwise_rmsprop_ar" in TABLE_ALGORITHMS  # FBGEMM 1.9
if HAS_RMSPROP:
    HYPERPARAMETERS["rowwise_rmsprop_ar"] = {
        "eps": {"eps": 0.5},
        "ema_beta": {"ema_beta": 0.5},
        "ar_alpha": {"ar_alpha": 0.5},
        "min_shrinkage": {"ar_alpha": 4.0, "min_shrinkage": 0.75},
    }
COMMON: dict[str, dict[str, Any]] = {
    "clipping": {"gradient_clipping": 0.25},
    "stochastic_rounding": {"stochastic_rounding": True},
    "no stochastic_rounding": {"stochastic_rounding": False},
}
CASES = [
    (algorithm, {}, options) for algorithm in HYPERPARAMETERS for options in COMMON.values()
] + [
    (algorithm, section, {})
    for algorithm, sections in HYPERPARAMETERS.items()
    for section in sections.values()
]
KINDS = {
    "float32": [table("a", "user"), table("b", "item")],
    "float32, several features": [table("a", "user", "item"), table("b", "item", "last_item")],
    "float16": [
        table("a", "user", data_type=DataType.FP16),
        table("b", "item", "last_item", data_type=DataType.FP16),
    ],
}


@pytest.mark.parametrize("tables", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(("algorithm", "section", "common"), CASES, ids=str)
def test_on_cpu_a_hyperparameter_has_an_effect_or_is_refused(
    algorithm: str,
    section: dict[str, Any],
    common: dict[str, Any],
    tables: list[EmbeddingBagConfig],
) -> None:
    base = {"step_ema": 2} if algorithm == "ema_rowwise_adagrad" else {}
    config = config_of(**{algorithm: {**base, **section}}, **common)
    has_effect = differ(trained(config, tables), trained(config_of(**{algorithm: base}), tables))
    if common.get("stochastic_rounding") is False:  # what the CPU does anyway
        assert not has_effect
        table_kernel(config, tables[0], CPU)
        return
    for of_one in tables:
        if has_effect:
            table_kernel(config, of_one, CPU)
            continue
        (field,) = section.keys() - {"weight_decay_mode"} or common.keys()
        pattern = rf"{field} is .* for the table {of_one.name}, but FBGEMM ignores it on the CPU"
        with pytest.raises(ValueError, match=pattern):
            table_kernel(config, of_one, CPU)


def fbgemm_accepts_on_cpu(optimizer: EmbOptimType) -> bool:
    try:
        SplitTableBatchedEmbeddingBagsCodegen(
            [(1, 4, EmbeddingLocation.HOST, ComputeDevice.CPU)], optimizer=optimizer
        )
    except AssertionError as error:
        assert "CPU mode" in str(error) or "ComputeDevice.CUDA" in str(error)
        return False
    return True


def test_fbgemm_has_what_we_have() -> None:
    """It may have more: what a newer release adds is refused as an unknown field of the section."""
    source = inspect.getsource(SplitTableBatchedEmbeddingBagsCodegen.__init__)
    listed = re.findall(r"^ +OptimType\.([A-Z_]+),$", source, flags=re.MULTILINE)
    deprecated = {EmbOptimType.SGD, EmbOptimType.ROWWISE_ADAGRAD}  # which FBGEMM refuses
    theirs = {EmbOptimType[name] for name in listed} - deprecated
    assert {each.optimizer for each in TABLE_ALGORITHMS.values()} <= theirs
    accepted = {
        name for name, each in TABLE_ALGORITHMS.items() if fbgemm_accepts_on_cpu(each.optimizer)
    }
    assert accepted == set(on_cpu())
    assert hasattr(EmbOptimType, "ROWWISE_RMSPROP_AR") == HAS_RMSPROP
    assert TABLE_ALGORITHMS.keys() | {"rowwise_rmsprop_ar"} == {
        name
        for name in TableOptimizerConfig.model_fields
        if name
        not in ("learning_rate", "gradient_clipping", "stochastic_rounding", "several_backwards")
    }


@pytest.mark.skipif(HAS_RMSPROP, reason="FBGEMM has rowwise_rmsprop_ar")
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_an_algorithm_of_a_newer_fbgemm_is_refused(device: torch.device) -> None:
    message = r"chooses rowwise_rmsprop_ar, which FBGEMM has from release 1\.9 on; this is 1\."
    with pytest.raises(ValueError, match=message):
        table_kernel(config_of(rowwise_rmsprop_ar={}), table("a", "user"), device)


def switch_ensembles(monkeypatch: pytest.MonkeyPatch, on: bool) -> None:
    """FBGEMM reads the environment once."""
    monkeypatch.setattr(FeatureGateName, "is_enabled", lambda self: on)


@pytest.mark.parametrize("algorithm", [name for name in TABLE_ALGORITHMS if name not in on_cpu()])
def test_on_cpu_other_algorithms_are_refused(
    algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    switch_ensembles(monkeypatch, on=True)
    model = nn.ModuleDict({"ebc": EmbeddingBagCollection([table("a", "user")])})
    message = (
        f"chooses {algorithm} for the table a: FBGEMM has no {algorithm} on the CPU, only sgd, "
        "adagrad, rowwise_adagrad, ema_rowwise_adagrad"
    )
    with pytest.raises(ValueError, match=message):
        fuse_embeddings(model, config_of(**{algorithm: {}}))
    table_kernel(config_of(**{algorithm: {}}), table("a", "user"), CUDA)


# On CUDA

LOOKUPS = {
    "sgd": "sgd",
    "adagrad": "adagrad",
    "rowwise_adagrad": "rowwise_adagrad",
    "ema_rowwise_adagrad": "rowwise_adagrad",
    "ensemble_rowwise_adagrad": "rowwise_adagrad",
    "adam": "adam",
    "partial_rowwise_adam": "partial_rowwise_adam",
    "lamb": "lamb",
    "partial_rowwise_lamb": "partial_rowwise_lamb",
    "lars_sgd": "lars_sgd",
}
if HAS_RMSPROP:
    LOOKUPS["rowwise_rmsprop_ar"] = "rowwise_rmsprop_ar"


@pytest.mark.parametrize(("algorithm", "lookup"), LOOKUPS.items())
def test_a_section_has_what_fbgemm_hands_to_the_kernel(algorithm: str, lookup: str) -> None:
    """And nothing else: what is not handed over is ignored."""
    source = inspect.getsource(getattr(invokers, f"lookup_{lookup}"))
    handed = set(re.findall(r"dict_optim_\w+\[.*optimizer_args\.(\w+)", source))
    if algorithm == "ema_rowwise_adagrad":
        handed |= mode_keys(SplitTableBatchedEmbeddingBagsCodegen.ema_inplace)
    if algorithm == "ensemble_rowwise_adagrad":
        handed |= mode_keys(SplitTableBatchedEmbeddingBagsCodegen.ensemble_and_swap)
    ours = {"beta_1": "beta1", "beta_2": "beta2"}
    ours["rowwise_bias_correction"] = "use_rowwise_bias_correction"
    _, section = config_of(**{algorithm: {}}).algorithm
    # For another kernel or for the module: see test_row_decay.py.
    elsewhere = {"counter", "cowclip", "decouple_global"}
    assert {ours.get(name, name) for name in type(section).model_fields} - elsewhere == handed


def mode_keys(function: Any) -> set[str]:
    return set(re.findall(r"_mode\[\"(\w+)\"\]", inspect.getsource(function)))


@pytest.mark.parametrize("lookup", sorted(set(LOOKUPS.values())))
def test_clipping_and_rounding_are_handed_to_every_kernel(lookup: str) -> None:
    source = inspect.getsource(getattr(invokers, f"lookup_{lookup}"))
    handed = set(re.findall(r"dict_aux_\w+\[.*optimizer_args\.(\w+)", source))
    assert handed == {"gradient_clipping", "max_gradient", "stochastic_rounding"}


ARGUMENTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (
        {"adam": {"beta_1": 0.8, "beta_2": 0.95, "eps": 1e-6, "weight_decay": 0.1}},
        {"beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.1},
    ),
    (
        {
            "rowwise_adagrad": {
                "eps": 1e-6,
                "weight_decay": 0.1,
                "weight_decay_mode": "l2",
                "max_norm": 2.0,
            }
        },
        {"eps": 1e-6, "weight_decay": 0.1, "weight_decay_mode": 1, "max_norm": 2.0},
    ),
    (
        {"lars_sgd": {"momentum": 0.5, "weight_decay": 0.1, "eta": 0.01}},
        {"momentum": 0.5, "weight_decay": 0.1, "eta": 0.01},
    ),
    (
        {"sgd": {}, "gradient_clipping": 0.5, "stochastic_rounding": False},
        {"gradient_clipping": True, "max_gradient": 0.5, "stochastic_rounding": False},
    ),
]


@pytest.mark.parametrize(("options", "expected"), ARGUMENTS)
def test_arguments_on_cuda(options: dict[str, Any], expected: dict[str, Any]) -> None:
    (algorithm, *_) = options
    kernel = table_kernel(config_of(**options), table("a", "user"), CUDA)
    fixed = {"optimizer": TABLE_ALGORITHMS[algorithm].optimizer, "learning_rate": 0.5}
    assert dict(kernel.arguments) == {**expected, **fixed}
    accepted = inspect.signature(SplitTableBatchedEmbeddingBagsCodegen.__init__).parameters
    assert dict(kernel.arguments).keys() <= accepted.keys()


def test_modes_on_cuda() -> None:
    adam = kernel_arguments(config_of(adam={"rowwise_bias_correction": True}))
    assert adam["extra_optimizer_config"].use_rowwise_bias_correction
    ema = kernel_arguments(config_of(ema_rowwise_adagrad={"step_ema": 7, "step_start": 3}))
    mode = ema["emainplace_mode"]
    assert (mode.step_ema, mode.step_start, mode.step_ema_coef) == (7, 3, 0.6)
    options = {"step_ema": 5, "step_swap": 9, "step_ema_coef": 0.5, "step_mode": "none"}
    ensemble = kernel_arguments(config_of(ensemble_rowwise_adagrad=options))
    mode = ensemble["ensemble_mode"]
    assert (mode.step_ema, mode.step_swap, mode.step_start) == (5, 9, 0)
    assert (mode.step_ema_coef, mode.step_mode.name) == (0.5, "NONE")


STATES = {
    "sgd": {},
    "adagrad": {"sum": (6, 8)},
    "rowwise_adagrad": {"sum": (6,)},  # more of them in test_row_decay.py
    "ema_rowwise_adagrad": {"sum": (6,), "step": (1,)},
    "ensemble_rowwise_adagrad": {"sum": (6,), "ema": (6, 8), "step": (1,)},
    "adam": {"exp_avg": (6, 8), "exp_avg_sq": (6, 8), "step": (1,)},
    "partial_rowwise_adam": {"exp_avg": (6, 8), "exp_avg_sq": (6,), "step": (1,)},
    "lamb": {"exp_avg": (6, 8), "exp_avg_sq": (6, 8), "step": (1,)},
    "partial_rowwise_lamb": {"exp_avg": (6, 8), "exp_avg_sq": (6,), "step": (1,)},
    "lars_sgd": {"momentum_buffer": (6, 8)},
    "rowwise_rmsprop_ar": {"square_avg": (6,), "prev_iter": (6,), "step": (1,)},
}


@pytest.mark.parametrize("algorithm", TABLE_ALGORITHMS)
def test_states_have_names_that_say_what_they_are(algorithm: str) -> None:
    optimizer = kernel_optimizer(**{algorithm: {}})
    state = optimizer.state_dict()["state"]["t.weight"]
    assert {name: tuple(value.shape) for name, value in state.items()} == STATES[algorithm]
    if algorithm == "lars_sgd":
        return  # FBGEMM has no names for it
    for theirs in optimizer._emb_module.get_optimizer_state():
        names = {name: name for name in theirs} | {"sparse_ema": "ema", "iter": "step"}
        if algorithm == "rowwise_rmsprop_ar":
            names["sum"] = "square_avg"  # which it is
        for name, value in theirs.items():
            assert state[names[name]].shape == value.shape


def test_rowwise_bias_correction_has_a_state() -> None:
    optimizer = kernel_optimizer(adam={"rowwise_bias_correction": True})
    state = optimizer.state_dict()["state"]["t.weight"]
    assert list(state) == ["exp_avg", "exp_avg_sq", "row_counter", "step"]


def test_an_ensemble_needs_fbgemms_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    switch_ensembles(monkeypatch, on=False)
    config = config_of(ensemble_rowwise_adagrad={})
    with pytest.raises(ValueError, match="variable FBGEMM_TBE_ENSEMBLE_ROWWISE_ADAGRAD is 1"):
        table_kernel(config, table("a", "user"), CUDA)
