"""Row-wise Adagrad's weight decay by counter, with CowClip, and of all rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    SplitTableBatchedEmbeddingBagsCodegen,
)

from recap_fast.embeddings import fuse_embeddings, set_table_optimizers
from recap_fast.embeddings.kernel_arguments import kernel_arguments, table_kernel
from tests.embeddings.test_honoured import KINDS, differ, trained
from tests.embeddings.test_updates import COLLECTIONS, SHARED, assert_as_expected, in_half
from tests.embeddings.test_updates import train as train_pooled
from tests.support.table_reference import table
from tests.support.table_training import (
    Tables,
)
from tests.support.tables import Pooled, config_of, fqn

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def decay(mode: str, strength: float = 0.125, /, **options: Any) -> dict[str, Any]:
    """A section of this mode."""
    return {"weight_decay": strength, "weight_decay_mode": mode, mode: options}


def by_counter(mode: str, halflife: int, /, **options: Any) -> dict[str, Any]:
    return decay("counter", counter_weight_decay_mode=mode, counter_halflife=halflife, **options)


SGD_OF_COUNTER = {"learning_rate_mode": "counter_sgd"}
MODES: dict[str, dict[str, Any]] = {
    "counter": decay("counter", 0.0),
    "counter decouple": by_counter("decouple", 2),
    "counter l2": by_counter("l2", 3),
    "counter late": by_counter("decouple", 2, adjustment_iter=2),
    "counter eps": {**by_counter("l2", 1), "eps": 0.5},
    "counter_sgd": decay("counter", 0.0, **SGD_OF_COUNTER),
    "counter_sgd of some": by_counter(
        "decouple", 2, tail_id_threshold=1.25, adjustment_ub=0.5, **SGD_OF_COUNTER
    ),
    "counter_sgd of 1": decay("counter", 0.0, counter_halflife=0, **SGD_OF_COUNTER),
    "counter_sgd late": decay("counter", 0.0, adjustment_iter=2, **SGD_OF_COUNTER),
    "adagradw": by_counter("adagradw", -1),
    "adagradw late": by_counter("adagradw", -1, adjustment_iter=2),
    "adagradw capped": by_counter("adagradw", -2, adjustment_ub=0.75),
    "adagradw plain": by_counter("adagradw", 0),
    "adagradw counter_sgd": by_counter("adagradw", 2, **SGD_OF_COUNTER),
    "cowclip": decay("cowclip", 0.0, weight_norm_coefficient=0.25),
    "cowclip bound": decay("cowclip", 0.0, lower_bound=0.5, counter_halflife=0),
    "cowclip decouple": decay(
        "cowclip", counter_weight_decay_mode="decouple", weight_norm_coefficient=0.125
    ),
    "cowclip l2": decay(
        "cowclip",
        counter_weight_decay_mode="l2",
        counter_halflife=2,
        weight_norm_coefficient=0.125,
        lower_bound=0.25,
    ),
}


# Updates


@pytest.mark.parametrize(
    "configs", [*COLLECTIONS.values(), SHARED], ids=[*COLLECTIONS, "several features"]
)
@pytest.mark.parametrize("section", MODES.values(), ids=MODES)
def test_updates(section: dict[str, Any], configs: list) -> None:
    model, expected, start = train_pooled(configs, config_of(rowwise_adagrad=section))
    # Five steps of some twenty float32 operations each, powers and roots among them.
    assert_as_expected(model, expected, rtol=6e-6)
    state = model.fused_optimizer.state_dict()["state"]
    for reference, weight in zip(expected, start, strict=True):
        assert (reference.weight - weight).abs().max() > 0.1
        found = state[fqn(reference.config.name)]
        assert list(found) == ["sum", "prev_iter", "row_counter", "step"]
        assert torch.equal(found["prev_iter"].double(), reference.prev_iter)
        torch.testing.assert_close(
            found["row_counter"].double(), reference.row_counter, rtol=1e-6, atol=0
        )
        assert found["step"].item() == reference.passes == 5
    assert max(reference.max_gap for reference in expected) > 1


@pytest.mark.parametrize("section", MODES.values(), ids=MODES)
def test_updates_of_float16_tables(section: dict[str, Any]) -> None:
    configs = in_half(COLLECTIONS["mixed"])
    model, expected, _ = train_pooled(configs, config_of(rowwise_adagrad=section))
    # As in `test_updates.py`: at two steps, neighbours 2^-10 apart.
    # With l2 an eighth of that is in each gradient, and twice as much in its square.
    is_l2 = section[section["weight_decay_mode"]].get("counter_weight_decay_mode") == "l2"
    assert_as_expected(model, expected, rtol=2**-9, sum_rtol=2**-12 if is_l2 else 2e-6)


@pytest.mark.parametrize("name", ["counter l2", "adagradw", "cowclip l2"])
def test_updates_clipped_and_weighted(name: str) -> None:
    optimizer = config_of(rowwise_adagrad=MODES[name], gradient_clipping=0.5)
    model, expected, _ = train_pooled(COLLECTIONS["sum"], optimizer, is_weighted=True)
    assert_as_expected(model, expected, rtol=6e-6)


BASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "counter_weight_decay_mode": (by_counter("decouple", 2), {"counter_weight_decay_mode": "l2"}),
    "counter_halflife": (by_counter("decouple", 2), {"counter_halflife": 3}),
    "adjustment_iter": (by_counter("decouple", 2), {"adjustment_iter": 1}),
    "learning_rate_mode": (by_counter("decouple", 2), SGD_OF_COUNTER),
    "adjustment_ub": (decay("counter", 0.0, **SGD_OF_COUNTER), {"adjustment_ub": 0.5}),
    "tail_id_threshold": (decay("counter", 0.0, **SGD_OF_COUNTER), {"tail_id_threshold": 1.0}),
    "cowclip mode": (MODES["cowclip decouple"], {"counter_weight_decay_mode": "l2"}),
    "cowclip halflife": (MODES["cowclip"], {"counter_halflife": 1}),
    "weight_norm_coefficient": (MODES["cowclip"], {"weight_norm_coefficient": 0.125}),
    "lower_bound": (MODES["cowclip"], {"lower_bound": 4.0}),
}


@pytest.mark.parametrize("tables", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(("base", "change"), BASES.values(), ids=BASES)
def test_a_field_has_an_effect(base: dict[str, Any], change: dict[str, Any], tables: list) -> None:
    changed = {**base, base["weight_decay_mode"]: {**base[base["weight_decay_mode"]], **change}}
    first, second = (config_of(rowwise_adagrad=section) for section in (base, changed))
    assert differ(trained(first, tables), trained(second, tables))
    for of_one in tables:
        table_kernel(second, of_one, CPU)


# Refused on the CPU

NEED_MAX_COUNTER: dict[str, dict[str, Any]] = {
    "learning_rate_mode is tail_id_lr_increase": {"learning_rate_mode": "tail_id_lr_increase"},
    "learning_rate_mode is tail_id_lr_decrease": {"learning_rate_mode": "tail_id_lr_decrease"},
    "tail_id_threshold_is_ratio is True": {
        "tail_id_threshold_is_ratio": True,
        "tail_id_threshold": 0.5,
        **SGD_OF_COUNTER,
    },
}


@pytest.mark.parametrize(("what", "options"), NEED_MAX_COUNTER.items())
def test_on_cpu_there_is_no_greatest_counter(what: str, options: dict[str, Any]) -> None:
    section = decay("counter", 0.0, max_counter_update_freq=1, **options)
    config = config_of(rowwise_adagrad=section)
    model = Pooled(table("a", "user"))
    message = rf"rowwise_adagrad\.counter\.{what} for the table a, but on the CPU FBGEMM never"
    with pytest.raises(ValueError, match=message):
        fuse_embeddings(model, config)
    table_kernel(config, table("a", "user"), CUDA)
    with pytest.raises(ValueError, match="the table a depend on the greatest counter of a kernel"):
        set_table_optimizers(Tables([table("a", "user")]), config, CUDA)
    # What is refused: updates as if no row had ever been counted.
    arguments = {**kernel_arguments(config), "learning_rate": 0.5}
    specs = [(6, 8, EmbeddingLocation.HOST, ComputeDevice.CPU)]
    kernel = SplitTableBatchedEmbeddingBagsCodegen(specs, device=CPU, **arguments)
    for _ in range(3):
        kernel(torch.tensor([1, 2]), torch.tensor([0, 1, 2])).sum().backward()
    assert kernel.split_optimizer_states()[0][2].max() == 3
    assert kernel.max_counter.item() == 1


@pytest.mark.parametrize("strength", [0.0, 0.125])
def test_on_cpu_there_is_no_global_decay(strength: float) -> None:
    config = config_of(rowwise_adagrad=decay("decouple_global", strength))
    message = (
        "weight_decay_mode is decouple_global for the table a, which FBGEMM does not have on the "
        "CPU, only l2, decouple, counter and cowclip"
    )
    with pytest.raises(ValueError, match=message):
        fuse_embeddings(Pooled(table("a", "user")), config)
    if strength:
        with pytest.raises(RuntimeError, match="gwd"):
            trained(config, [table("a", "user")])
