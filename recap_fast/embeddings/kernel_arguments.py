"""The arguments of FBGEMM's table-batched kernels for a configured table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from fbgemm_gpu.config import FeatureGateName
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from fbgemm_gpu.tbe.config.optimizer_config import (
    CounterBasedRegularizationDefinition,
    CounterWeightDecayMode,
    CowClipDefinition,
    EmainplaceModeDefinition,
    EnsembleModeDefinition,
    GlobalWeightDecayDefinition,
    LearningRateMode,
    StepMode,
    TailIdThreshold,
    UserEnabledConfigDefinition,
)
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, DataType

from recap_fast.config import EmbeddingCounterConfig, EmbeddingOptimizerConfig
from recap_fast.embeddings.algorithms import algorithm_named, on_cpu
from recap_fast.schedules.compute import compute_lr

# FBGEMM's names where they are not ours.
_RENAMED = {"beta_1": "beta1", "beta_2": "beta2"}
_STEP_MODES = {"use_iter": StepMode.USE_ITER, "none": StepMode.NONE}
_EMA_FIELDS = ("step_ema", "step_start", "step_ema_coef")
_ENSEMBLE_FIELDS = (*_EMA_FIELDS, "step_swap", "step_mode")


@dataclass(frozen=True)
class TableKernel:
    """How FBGEMM trains a table. Tables that are equal in this may share a table-batched module.

    Attributes:
        arguments: Keyword arguments of `SplitTableBatchedEmbeddingBagsCodegen`, hashable ones.
        schedule: The table's schedule, as text; empty without one.
        several_backwards: What becomes of several backward passes before a step.
    """

    arguments: tuple[tuple[str, Any], ...]
    schedule: str
    several_backwards: str


def table_kernel(
    emb_optimizer_config: EmbeddingOptimizerConfig,
    table: BaseEmbeddingConfig,
    device: torch.device,
) -> TableKernel:
    """Returns how FBGEMM is to train a table.

    Raises:
        ValueError: The device lacks or ignores something that is configured; the message names it.
    """
    config = emb_optimizer_config.for_table(table.name)
    algorithm, _ = config.algorithm
    _check_algorithm(algorithm, table.name, device)
    if device.type == "cpu":
        _check_honoured_on_cpu(config, table)
    arguments = kernel_arguments(config)
    arguments["learning_rate"] = _first_rate(config, table.name)
    rate = config.learning_rate
    schedule = "" if rate is None else rate.model_dump_json(exclude_none=True)
    several = config.several_backwards or "update"
    return TableKernel(tuple(sorted(arguments.items())), schedule, several)


def kernel_arguments(config: EmbeddingOptimizerConfig) -> dict[str, Any]:
    """Returns optimizer and hyperparameters under FBGEMM's names; what is not given is left out.

    Args:
        config: What holds for one table (`EmbeddingOptimizerConfig.for_table`).

    Raises:
        ValueError: This release of FBGEMM does not have the algorithm.
    """
    algorithm, section = config.algorithm
    given = section.model_dump(exclude_none=True)
    arguments: dict[str, Any] = {"optimizer": algorithm_named(algorithm).optimizer}
    if algorithm == "ema_rowwise_adagrad":
        mode = {name: given.pop(name) for name in _EMA_FIELDS}
        arguments["emainplace_mode"] = EmainplaceModeDefinition(**mode)
    if algorithm == "ensemble_rowwise_adagrad":
        mode = {name: given.pop(name) for name in _ENSEMBLE_FIELDS}
        mode["step_mode"] = _STEP_MODES[mode["step_mode"]]
        arguments["ensemble_mode"] = EnsembleModeDefinition(**mode)
    if given.pop("rowwise_bias_correction", False):
        arguments["extra_optimizer_config"] = UserEnabledConfigDefinition(
            use_rowwise_bias_correction=True
        )
    if "weight_decay_mode" in given:
        # First of these, and so compared before what only one of the modes has.
        arguments["weight_decay_mode"] = WeightDecayMode[given.pop("weight_decay_mode").upper()]
    if "counter" in given:
        arguments["counter_based_regularization"] = _counter_definition(given.pop("counter"))
    if "cowclip" in given:
        mode = given.pop("cowclip")
        name = mode["counter_weight_decay_mode"].upper()
        mode["counter_weight_decay_mode"] = CounterWeightDecayMode[name]
        arguments["cowclip_regularization"] = CowClipDefinition(**mode)
    if "decouple_global" in given:
        mode = given.pop("decouple_global")
        arguments["global_weight_decay"] = GlobalWeightDecayDefinition(**mode)
    arguments |= {_RENAMED.get(name, name): value for name, value in given.items()}
    if config.gradient_clipping is not None:
        arguments |= {"gradient_clipping": True, "max_gradient": config.gradient_clipping}
    if config.stochastic_rounding is not None:
        arguments["stochastic_rounding"] = config.stochastic_rounding
    return arguments


def _counter_definition(mode: dict[str, Any]) -> CounterBasedRegularizationDefinition:
    """Returns FBGEMM's form of a section `counter`."""
    threshold = TailIdThreshold(
        mode.pop("tail_id_threshold"), mode.pop("tail_id_threshold_is_ratio")
    )
    decay = CounterWeightDecayMode[mode.pop("counter_weight_decay_mode").upper()]
    rate = LearningRateMode[mode.pop("learning_rate_mode").upper()]
    return CounterBasedRegularizationDefinition(
        **mode,
        counter_weight_decay_mode=decay,
        learning_rate_mode=rate,
        tail_id_threshold=threshold,
    )


def _first_rate(config: EmbeddingOptimizerConfig, name: str) -> float:
    if config.init_learning_rate is not None:
        return config.init_learning_rate
    if config.learning_rate is not None:
        return compute_lr(config.learning_rate, 0)
    raise ValueError(
        f"emb_optimizer_config has no rate for the table {name}: set learning_rate or "
        "init_learning_rate"
    )


def _check_algorithm(algorithm: str, name: str, device: torch.device) -> None:
    if device.type == "cpu" and not algorithm_named(algorithm).on_cpu:
        raise ValueError(
            f"emb_optimizer_config chooses {algorithm} for the table {name}: FBGEMM has no "
            f"{algorithm} on the CPU, only {', '.join(on_cpu())}"
        )
    gate = FeatureGateName.TBE_ENSEMBLE_ROWWISE_ADAGRAD
    if algorithm == "ensemble_rowwise_adagrad" and not gate.is_enabled():
        raise ValueError(
            f"emb_optimizer_config chooses {algorithm} for the table {name}, which FBGEMM has only "
            f"where the environment variable FBGEMM_{gate.name} is 1"
        )


def _check_honoured_on_cpu(config: EmbeddingOptimizerConfig, table: BaseEmbeddingConfig) -> None:
    """Raises if FBGEMM's CPU kernels would ignore something that is configured."""
    algorithm, section = config.algorithm
    on_cpu = f"for the table {table.name}, but FBGEMM ignores it on the CPU"
    max_norm = getattr(section, "max_norm", None)
    if max_norm is not None:
        raise ValueError(
            f"emb_optimizer_config: {algorithm}.max_norm is {max_norm} {on_cpu}: leave it out"
        )
    mode = getattr(section, "weight_decay_mode", None)
    if mode == "decouple_global":
        raise ValueError(
            f"emb_optimizer_config: {algorithm}.weight_decay_mode is {mode} for the table "
            f"{table.name}, which FBGEMM does not have on the CPU, only l2, decouple, counter and "
            "cowclip"
        )
    counter = getattr(section, "counter", None)
    if mode == "counter" and counter is not None:
        _check_counter_on_cpu(counter, table.name)
    # Row-wise Adagrad has a second CPU kernel, for float32 tables of one feature, without decay.
    decays = table.data_type != DataType.FP32 or len(table.feature_names) > 1
    decays |= mode in ("counter", "cowclip")  # a kernel of their own
    weight_decay = getattr(section, "weight_decay", 0)
    if weight_decay > 0 and not decays:
        raise ValueError(
            f"emb_optimizer_config: {algorithm}.weight_decay is {weight_decay} {on_cpu}, "
            "except for float16 tables and tables of several features: set it to 0"
        )
    if config.stochastic_rounding:
        raise ValueError(
            f"emb_optimizer_config: stochastic_rounding is true {on_cpu}, where float16 tables "
            "round to nearest: leave it out"
        )


def _check_counter_on_cpu(counter: EmbeddingCounterConfig, table: str) -> None:
    """Raises if updates depend on the greatest counter, for which FBGEMM looks on CUDA only."""
    name = "learning_rate_mode"
    if counter.tail_id_threshold_is_ratio:
        name = "tail_id_threshold_is_ratio"
    if counter.reads_max_counter:
        raise ValueError(
            f"emb_optimizer_config: rowwise_adagrad.counter.{name} is {getattr(counter, name)} "
            f"for the table {table}, but on the CPU FBGEMM never looks for the greatest counter, "
            "which this needs: choose the learning_rate_mode equal or counter_sgd, and no ratio"
        )
