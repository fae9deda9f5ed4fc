"""Tables that the user replaces, moves or copies after they were fused."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from recap_fast import build_optimizer, checkpoint, reference
from tests.support.live_tables import (
    ALGORITHMS,
    assert_one_memory,
    assert_same,
    batch,
    fused,
    loss_of,
    state_of,
    weight,
    weights,
)
from tests.support.tables import config_of

CONFIG = config_of(rowwise_adagrad={})
DENSE = {"sgd": {"lr": 0.1}}
NEW = torch.full((6, 8), 2.0)
TABLE = "ebc.embedding_bags.b.weight"


def load(model: nn.Module, **options: Any) -> None:
    name = TABLE.removeprefix("ebc.")
    model.ebc.load_state_dict({**model.ebc.state_dict(), name: NEW.clone()}, **options)


def load_and_swap(model: nn.Module) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        load(model)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def assign_data(model: nn.Module) -> None:
    weight(model, "b").data = NEW.clone()


def assign_transposed(model: nn.Module) -> None:
    weight(model, "b").data = NEW.t().clone().t()


def new_parameter(model: nn.Module) -> None:
    model.ebc.embedding_bags["b"].weight = nn.Parameter(NEW.clone())


def new_holder(model: nn.Module) -> None:
    model.ebc.embedding_bags["b"] = nn.Module()
    model.ebc.embedding_bags["b"].register_parameter("weight", nn.Parameter(NEW.clone()))


def there_and_back(model: nn.Module) -> None:
    model.double().float()
    weight(model, "b").data.copy_(NEW)


def to_empty(model: nn.Module) -> None:
    state = {**model.state_dict(), TABLE: NEW}
    model.to_empty(device="cpu").load_state_dict(state)


def in_inference_mode(model: nn.Module) -> None:
    with torch.inference_mode():
        weight(model, "b").data = NEW.clone()
        model(batch(0))


FOLLOWED = {
    each.__name__: each
    for each in (
        *(load, load_and_swap, assign_data, assign_transposed, new_parameter, new_holder),
        *(there_and_back, to_empty, in_inference_mode),
    )
} | {"assign=True": lambda model: load(model, assign=True)}


@pytest.mark.parametrize("change", FOLLOWED.values(), ids=FOLLOWED)
@pytest.mark.parametrize("build", [build_optimizer, reference.build_optimizer])
def test_new_values_are_trained_shown_and_saved(
    change: Callable[[nn.Module], Any], build: Callable[..., Any]
) -> None:
    """As in a model that has had them copied into its tables, which no one could overlook."""
    changed, expected = fused(CONFIG), fused(CONFIG)
    for model in (changed, expected):
        optimizer, _ = build(model, DENSE, CONFIG)
        for step in range(4):
            if step == 2 and model is changed:
                change(model)
                assert torch.equal(model.state_dict()[TABLE], NEW)
            elif step == 2:
                with torch.no_grad():
                    weight(model, "b").copy_(NEW)
            loss_of(model, batch(step), step).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(weights(changed), weights(expected))
    assert_same(state_of(changed), state_of(expected))
    assert_one_memory(changed)


@pytest.mark.parametrize("change", [assign_data, lambda model: weight(model, "b").copy_(NEW)])
def test_values_that_are_set_between_forward_and_backward_are_those_that_train(
    change: Callable[[nn.Module], Any],
) -> None:
    model = fused(config_of(sgd={}))
    build_optimizer(model, DENSE, config_of(sgd={}))
    loss = loss_of(model, batch(0), 0)
    before = weights(model)["b"]
    with torch.no_grad():
        change(model)
    loss.backward()
    expected = fused(config_of(sgd={}))
    build_optimizer(expected, DENSE, config_of(sgd={}))
    loss_of(expected, batch(0), 0).backward()
    step = weights(expected)["b"] - before
    torch.testing.assert_close(weights(model)["b"], NEW + step)


def test_a_checkpoint_has_what_was_set_since_the_last_forward(tmp_path) -> None:
    model = fused(CONFIG)
    optimizer, scheduler = build_optimizer(model, DENSE, CONFIG)
    load(model, assign=True)
    checkpoint.save(tmp_path, 1, model, optimizer, scheduler)
    other = fused(CONFIG)
    optimizer, scheduler = build_optimizer(other, DENSE, CONFIG)
    weight(other, "b").data = torch.zeros(6, 8)
    checkpoint.load(tmp_path, other, optimizer, scheduler)
    assert_same(weights(other), weights(model))
    other(batch(0))
    assert_same(weights(other), weights(model))
    assert_one_memory(other)


def take_the_weight_away(model: nn.Module) -> None:
    del model.ebc.embedding_bags["b"].weight


def reparametrize(model: nn.Module) -> None:
    parametrize.register_parametrization(model.ebc.embedding_bags["b"], "weight", nn.Identity())


def share(model: nn.Module) -> None:
    weight(model, "b").data = weight(model, "a").data


def tables_of_kernels(model: nn.Module) -> list[torch.Tensor]:
    return [each for kernel in model.ebc._kernels for each in kernel.split_embedding_weights()]


REFUSED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "double": (nn.Module.double, "of torch.float64 now, but FBGEMM has it of torch.float32"),
    "half": (nn.Module.half, "of torch.float16 now, but FBGEMM has it of torch.float32"),
    "meta": (lambda model: model.to_empty(device="meta"), "on meta now, but FBGEMM has it on cpu"),
    "shape": (
        lambda model: setattr(weight(model, "b"), "data", torch.zeros(7, 8)),
        "of shape (7, 8) now, but FBGEMM has it of shape (6, 8)",
    ),
    "deleted": (take_the_weight_away, "b has no parameter `weight` any longer"),
    "parametrized": (reparametrize, "b has no parameter `weight` any longer"),
    "shared": (share, "b shows memory of another fused table"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_followed_is_refused(
    change: Callable[[nn.Module], Any], message: str
) -> None:
    model = fused(CONFIG)
    build_optimizer(model, DENSE, CONFIG)
    before = [each.clone() for each in tables_of_kernels(model)]
    change(model)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        model(batch(0))
    with torch.inference_mode(), pytest.raises(RuntimeError, match=re.escape(message)):
        model(batch(0))
    assert all(map(torch.equal, before, tables_of_kernels(model)))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_copies_train_on_their_own(algorithm: str) -> None:
    config = config_of(**ALGORITHMS[algorithm])
    model = fused(config)
    optimizer, scheduler = build_optimizer(model, DENSE, config)

    def train(model: nn.Module, optimizer: Any, scheduler: Any, step: int) -> None:
        loss_of(model, batch(step), step).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()

    train(model, optimizer, scheduler, 0)
    weight(model, "b").data = NEW.clone()  # and nothing has looked since
    copied = copy.deepcopy([model, optimizer, scheduler])
    alone = copy.deepcopy(model)
    before = weights(model)
    for step in (1, 2, 3):
        train(*copied, step)
    assert_same(weights(model), before)
    assert_same(weights(alone), before)
    second = [alone, *build_optimizer(alone, DENSE, config)]
    for step in (1, 2, 3):
        train(model, optimizer, scheduler, step)
        train(*second, step)
    for other in (copied[0], alone):
        assert_same(weights(other), weights(model))
        assert_same(state_of(other), state_of(model))
        assert_one_memory(other)
    assert copied[1].optimizers[-1][1] is copied[0].fused_optimizer
    copied[1].param_groups[-1]["lr"] = 0.0
    still = weights(copied[0])
    loss_of(copied[0], batch(9), 9).backward()
    # But for what an average moves.
    assert algorithm == "ema" or weights(copied[0])["a"].equal(still["a"])


@pytest.mark.parametrize("options", [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.5)}])
def test_averaged_models(options: dict[str, Any]) -> None:
    """`AveragedModel` makes a copy, and moves it towards the model in place."""
    model = fused(CONFIG)
    optimizer, _ = build_optimizer(model, DENSE, CONFIG)
    averaged = AveragedModel(model, **options)
    expected = None
    for step in range(3):
        loss_of(model, batch(step), step).backward()
        optimizer.step()
        optimizer.zero_grad()
        averaged.update_parameters(model)
        share = 0.5 if options else 1 / (step + 1)
        now = weights(model)
        if expected is not None:
            now = {name: expected[name].lerp(value, share) for name, value in now.items()}
        expected = now
    torch.testing.assert_close(weights(averaged.module), expected)
    assert_one_memory(averaged.module)
    with torch.no_grad():
        rows = averaged(batch(7))
        model.load_state_dict(averaged.module.state_dict())
        torch.testing.assert_close(rows, model(batch(7)))


def test_tables_are_freed_with_their_model() -> None:
    """Without the garbage collector, which would wait while tables are large."""
    model = fused(CONFIG)
    optimizer, scheduler = build_optimizer(model, DENSE, CONFIG)
    loss_of(model, batch(0), 0).backward()
    optimizer.step()
    kernels = [weakref.ref(kernel) for kernel in model.ebc._kernels]
    gc.collect()
    gc.disable()
    try:
        del model, optimizer, scheduler
        assert [kernel() for kernel in kernels] == [None] * len(kernels)
    finally:
        gc.enable()


def test_a_parameter_that_comes_back_has_its_values() -> None:
    """As after an evaluation with other weights."""
    model = fused(CONFIG)
    before, old = weights(model), weight(model, "b")
    model.ebc.embedding_bags["b"].weight = nn.Parameter(torch.zeros_like(old))
    with torch.no_grad():
        evaluated = model(batch(0)).clone()
    assert not evaluated[:, 16:24].any()  # those of b
    model.ebc.embedding_bags["b"].weight = old
    with torch.no_grad():
        model(batch(0))
    assert_same(weights(model), before)
    assert_one_memory(model)


def test_a_functional_call_leaves_the_tables_as_they_are() -> None:
    model = fused(CONFIG)
    before = weights(model)
    other = nn.Parameter(NEW.clone())
    with torch.no_grad():
        torch.func.functional_call(model, {TABLE: other}, (batch(0),))
    loss_of(model, batch(0), 0).backward()
    model.fused_optimizer.step()
    assert torch.equal(other, NEW)
    expected = fused(CONFIG)
    loss_of(expected, batch(0), 0).backward()
    assert_same(weights(model), weights(expected))
    assert not torch.equal(weights(model)["b"], before["b"])


@pytest.mark.parametrize("build", [build_optimizer, reference.build_optimizer])
def test_a_gradient_of_the_weights_themselves_is_refused(build: Callable[..., Any]) -> None:
    """No step would use it."""
    model = fused(CONFIG)
    optimizer, _ = build(model, DENSE, CONFIG)
    loss_of(model, batch(0), 0).backward()
    weight(model, "b").square().sum().backward()
    before = model.bias.detach().clone()
    with pytest.raises(RuntimeError, match="the fused table b has a gradient that no step uses"):
        optimizer.step()
    assert torch.equal(model.bias, before)
    optimizer.zero_grad()
    assert weight(model, "b").grad is None
    loss_of(model, batch(0), 0).backward()
    optimizer.step()
    assert not torch.equal(model.bias, before)
