"""`init_state` counts a step, as torchrec's own optimizers do, and does not where asked not to."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchrec.optim import keyed
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.warmup import WarmupOptimizer, WarmupStage

import recap_fast
from recap_fast import reference
from recap_fast.config import (
    EmbeddingOptimizerConfig,
    LearningRate,
    MultiTaskLearningRates,
    RecapOptimizerConfig,
)
from recap_fast.embeddings import fuse_embeddings
from recap_fast.groups.assign import group_parameters
from recap_fast.keyed import CombinedOptimizer, leaves
from recap_fast.keyed.fused import FusedCombinedOptimizer
from recap_fast.optim import FusedAdagrad, FusedAdam, FusedAdamW, FusedSGD
from recap_fast.scheduler import RecapLRShim
from tests.support.models import LIKED, REPLIED, EmbeddingRanker, Ranker, constant, features, ramp

both = pytest.mark.parametrize("kind", ["reference", "fused"])

FUSED = {
    torch.optim.Adam: FusedAdam,
    torch.optim.AdamW: FusedAdamW,
    torch.optim.Adagrad: FusedAdagrad,
    torch.optim.SGD: FusedSGD,
}
# What a step with gradients of zero does: count, decay weights, start a momentum buffer.
OPTIONS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adam": (torch.optim.Adam, {}),
    "adam amsgrad": (torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.1}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "adagrad": (torch.optim.Adagrad, {"initial_accumulator_value": 0.1, "lr_decay": 0.1}),
    "adagrad decay": (torch.optim.Adagrad, {"weight_decay": 0.1}),
    "sgd": (torch.optim.SGD, {"weight_decay": 0.1}),
    "sgd momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "sgd dampening": (torch.optim.SGD, {"momentum": 0.75, "dampening": 0.5, "weight_decay": 0.1}),
    "sgd nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "maximize": True}),
}


class Run:
    """Two optimizers of two parameters, as torchrec combines them or as we do."""

    def __init__(
        self,
        kind: str,
        algorithm: type[torch.optim.Optimizer] = torch.optim.Adam,
        wrap: Callable[[keyed.KeyedOptimizer], keyed.KeyedOptimizer] | None = None,
        **options: Any,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.params = [nn.Parameter(torch.randn(3, 2, generator=generator)) for _ in range(4)]
        make = functools.partial(FUSED[algorithm] if kind == "fused" else algorithm, lr=0.1)
        self.inner = [
            keyed.KeyedOptimizerWrapper(
                {f"{i}": self.params[i], f"{i + 1}": self.params[i + 1]},
                functools.partial(make, **options),
            )
            for i in (0, 2)
        ]
        combine = {
            "torchrec": keyed.CombinedOptimizer,
            "reference": CombinedOptimizer,
            "fused": FusedCombinedOptimizer,
        }[kind]
        combined = combine([("a", self.inner[0]), ("b", self.inner[1])])
        self.optimizer = combined if wrap is None else wrap(combined)

    def steps(self, count: int) -> None:
        for step in range(count):
            generator = torch.Generator().manual_seed(step)
            for param in self.params:
                param.grad = torch.randn(param.shape, generator=generator)
            self.optimizer.step()

    def assert_is_like(self, other: Run) -> None:
        for mine, theirs in zip(self.params, other.params, strict=True):
            torch.testing.assert_close(mine, theirs)
        state, expected = (run.optimizer.state_dict()["state"] for run in (self, other))
        assert state.keys() == expected.keys()
        for name, entries in expected.items():
            assert state[name].keys() == entries.keys()
            for key, value in entries.items():
                torch.testing.assert_close(state[name][key], value, msg=f"{key} of {name}")


@both
@pytest.mark.parametrize(("algorithm", "options"), OPTIONS.values(), ids=OPTIONS)
def test_it_does_what_torchrecs_does(
    kind: str, algorithm: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    ours, theirs = (Run(each, algorithm, **options) for each in (kind, "torchrec"))
    for run in (ours, theirs):
        run.params[3].requires_grad_(False)
        run.optimizer.init_state()
    ours.assert_is_like(theirs)
    for mine, other in zip(ours.params, theirs.params, strict=True):
        assert (mine.grad is None) == (other.grad is None)
        assert mine.grad is None or not mine.grad.any()
    for run in (ours, theirs):
        run.steps(3)
        run.optimizer.init_state()  # counts again
        run.steps(2)
    ours.assert_is_like(theirs)


WRAPPERS: dict[str, Callable[[keyed.KeyedOptimizer], keyed.KeyedOptimizer]] = {
    "clipping by norm": lambda part: GradientClippingOptimizer(
        part, GradientClipping.NORM, max_gradient=0.5
    ),
    "warm-up": lambda part: WarmupOptimizer(
        part, [WarmupStage(max_iters=10, value=0.0)], lr=0.1, param_name="warmup"
    ),
}


@both
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_as_torchrecs_in_the_same_wrapper(
    kind: str, wrap: Callable[[keyed.KeyedOptimizer], keyed.KeyedOptimizer]
) -> None:
    ours, theirs = (Run(each, wrap=wrap) for each in (kind, "torchrec"))
    for run in (ours, theirs):
        run.optimizer.init_state()
        run.steps(4)
    for mine, other in zip(ours.params, theirs.params, strict=True):
        torch.testing.assert_close(mine, other)
    counts = [
        run.optimizer._optimizer.state[run.params[0]]["step"].item() for run in (ours, theirs)
    ]
    assert counts == [5, 5]


@both
def test_clipping_a_norm_of_zero_changes_nothing(kind: str) -> None:
    clipped, plain = Run(kind), Run(kind)
    combine = FusedCombinedOptimizer if kind == "fused" else CombinedOptimizer
    clipped.optimizer = combine([("a", clipped.inner[0]), ("b", clipped.inner[1])], 100.0)
    for run in (clipped, plain):
        run.optimizer.init_state()
    assert clipped.optimizer.grad_norm == 0
    for run in (clipped, plain):
        run.steps(2)
    clipped.assert_is_like(plain)


@both
def test_without_counting_nothing_but_state_is_made(kind: str) -> None:
    run, plain = Run(kind, weight_decay=0.1), Run(kind, weight_decay=0.1)
    run.optimizer.init_state(count_step=False)
    assert all(param.grad is None for param in run.params)
    assert run.optimizer.state[run.params[0]]["step"].item() == 0
    for each in (run, plain):
        each.steps(3)
    run.assert_is_like(plain)


@both
def test_hooks_are_called(kind: str) -> None:
    run, calls = Run(kind), []
    run.optimizer.register_step_post_hook(lambda *_: calls.append("combined"))
    run.inner[1]._optimizer.register_step_pre_hook(lambda *_: calls.append("inside"))
    run.optimizer.init_state()
    assert calls == ["inside", "combined"]


@both
def test_sparse_names(kind: str) -> None:
    """As torchrec's, except in the native step, which has dense gradients only."""
    ours, theirs = Run(kind, torch.optim.Adagrad), Run("torchrec", torch.optim.Adagrad)
    for run in (ours, theirs):
        run.optimizer.init_state({"a.1"})
    assert theirs.params[1].grad.is_sparse and not theirs.params[0].grad.is_sparse
    assert [p.grad.is_sparse for p in ours.params] == [False, kind == "reference", False, False]
    ours.assert_is_like(theirs)


@both
def test_a_rate_that_a_schedule_has_set_stays(kind: str) -> None:
    run = Run(kind)
    scheduler = RecapLRShim(run.optimizer, {"a": ramp(0.5, 4), "b": constant(0.25)}, last_epoch=0)
    rates = [group["lr"] for group in run.optimizer.param_groups]
    run.optimizer.init_state()
    assert [group["lr"] for group in run.optimizer.param_groups] == rates == [0.125, 0.25]
    assert scheduler.last_epoch == 1


@both
def test_fused_tables_keep_weights_gradients_and_rate(kind: str) -> None:
    torch.manual_seed(0)
    embeddings = EmbeddingOptimizerConfig(learning_rate=constant(0.125), rowwise_adagrad={})
    model = fuse_embeddings(EmbeddingRanker(), embeddings)
    build = recap_fast.build_optimizer if kind == "fused" else reference.build_optimizer
    optimizer, _ = build(model, _config(), embeddings)
    (leaf,) = (leaf for leaf in leaves(optimizer) if hasattr(leaf, "_emb_module"))
    before = [weight.clone() for weight in leaf.params.values()]
    optimizer.init_state()
    for weight, value in zip(leaf.params.values(), before, strict=True):
        assert torch.equal(weight, value) and weight.grad is None
    assert leaf._emb_module.get_learning_rate() == 0.125
    assert not any(value.any() for state in leaf.state.values() for value in state.values())


# --- the original's training loop ----------------------------------------------------------------


def _config() -> RecapOptimizerConfig:
    rates = {LIKED: ramp(0.01, 10), REPLIED: constant(0.02)}
    return RecapOptimizerConfig(
        adam={"beta_1": 0.95, "beta_2": 0.999, "epsilon": 1e-7},
        multi_task_learning_rates=MultiTaskLearningRates(
            tower_learning_rates=rates,
            backbone_learning_rate=LearningRate(
                piecewise_constant={
                    "learning_rate_boundaries": [20],
                    "learning_rate_values": [0.01, 0.002],
                }
            ),
        ),
    )


def _torchrecs(model: nn.Module, config: RecapOptimizerConfig) -> tuple[Any, RecapLRShim]:
    """The same groups under torchrec's own combination of torch's optimizers."""
    groups = group_parameters(model, config, None, None)
    adam = functools.partial(torch.optim.Adam, lr=1.0, betas=(0.95, 0.999), eps=1e-7)
    optimizer = keyed.CombinedOptimizer(
        [keyed.KeyedOptimizerWrapper(group.params, adam) for group in groups]
    )
    return optimizer, RecapLRShim(optimizer, {group.name: group.learning_rate for group in groups})


def _losses(build: Callable[..., tuple[Any, Any]], init_state: bool = True) -> Tensor:
    torch.manual_seed(0)
    model = Ranker()
    optimizer, scheduler = build(model, _config())
    if init_state:
        optimizer.init_state()
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(40):
        inputs = torch.randn(32, 20, generator=generator)
        labels = (torch.rand(32, 2, generator=generator) < 0.3).float()
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(model(inputs), labels)
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("build", [recap_fast.build_optimizer, reference.build_optimizer])
def test_the_originals_loop_has_the_losses_of_torchrecs_optimizer(
    build: Callable[..., tuple[Any, Any]],
) -> None:
    expected = _losses(_torchrecs)
    assert (_losses(build) - expected).abs().max() <= 1e-5
    # And it is the step that init_state counts which makes the difference.
    assert (_losses(build, init_state=False) - expected).abs().max() > 1e-4


def test_tables_and_towers_train_alike_after_init_state() -> None:
    embeddings = EmbeddingOptimizerConfig(learning_rate=constant(0.125), rowwise_adagrad={})
    results = []
    for build in (recap_fast.build_optimizer, reference.build_optimizer):
        torch.manual_seed(0)
        model = fuse_embeddings(EmbeddingRanker(), embeddings)
        optimizer, scheduler = build(model, _config(), embeddings)
        optimizer.init_state()
        for step in range(3):
            optimizer.zero_grad()
            model(features(step)).square().sum().backward()
            optimizer.step()
            scheduler.step()
        results.append({name: value.clone() for name, value in model.state_dict().items()})
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], msg=name)
