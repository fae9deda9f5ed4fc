"""The recipes for programs on torchrec: DLRM, generative-recommenders and TorchEasyRec."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torchrec", reason="needs torchrec")

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torchrec.distributed.train_pipeline import TrainPipelineBase
from torchrec.optim import keyed
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.optimizers import in_backward_optimizer_filter

from tests.recipes import sharded
from tests.recipes.comparing import Training, compare
from tests.recipes.page import Recipe
from tests.recipes.regression import params_of


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    with sharded.one_process():
        yield


def _dense(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(in_backward_optimizer_filter(model.named_parameters()))


def _rate(step: int) -> float:
    return 1 / (1 + step)


def test_dlrm(tmp_path: Path) -> None:
    recipe = Recipe("torchrec's DLRM")

    def train(side: str, first: int, last: int, load: Path | None, save: Path | None) -> Training:
        model = sharded.make_ranker()
        optimizer = recipe.run(0, side, {"model": model})["optimizer"]
        parts = (model, optimizer, LambdaLR(optimizer, _rate))
        if load:
            sharded.load(load, *parts)
        pipeline = TrainPipelineBase(model, optimizer, torch.device("cpu"))
        batches = iter([sharded.make_batch(step) for step in range(first, last)])
        losses = []
        for _ in range(first, last):
            losses.append(pipeline.progress(batches).item())
            parts[-1].step()
        if save:
            sharded.save(save, *parts)
        return Training(losses, params_of(model))

    compare(train, tmp_path)


def _make_optimizer_and_shard(
    model: nn.Module, device: torch.device, world_size: int
) -> tuple[nn.Module, keyed.CombinedOptimizer]:
    """As the program does it: the tables' optimizer stays with the model, and state is made."""
    assert world_size == 1
    sharded_model = sharded.shard(model, device)
    dense = keyed.KeyedOptimizerWrapper(
        _dense(sharded_model), lambda params: torch.optim.Adam(params, lr=1e-2, betas=(0.95, 0.999))
    )
    optimizer = keyed.CombinedOptimizer([("dense", dense)])
    optimizer.init_state(set(sharded_model.sparse_grad_parameter_names()))
    return sharded_model, optimizer


def test_generative_recommenders(tmp_path: Path) -> None:
    recipe = Recipe("generative-recommenders")

    def train(side: str, first: int, last: int, load: Path | None, save: Path | None) -> Training:
        names: dict[str, Any] = {
            "make_optimizer_and_shard": _make_optimizer_and_shard,
            "model": sharded.ShardedRanker(),
            "device": torch.device("cpu"),
            "world_size": 1,
        }
        recipe.run(0, side, names)
        model, optimizer = names["model"], names["optimizer"]
        both = keyed.CombinedOptimizer([("tables", model.fused_optimizer), ("", optimizer)])
        if load:
            sharded.load(load, model, both)
        losses = []
        for step in range(first, last):
            optimizer.zero_grad()
            loss, _ = model(sharded.make_batch(step))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        if save:
            sharded.save(save, model, both)
        return Training(losses, params_of(model))

    compare(train, tmp_path)


class _WrappedOptimizer(keyed.OptimizerWrapper):
    """In the shape of `TZRecOptimizer`: accumulates gradients, and scales losses."""

    def __init__(
        self,
        optimizer: keyed.KeyedOptimizer,
        grad_scaler: torch.amp.GradScaler | None,
        gradient_accumulation_steps: int,
    ) -> None:
        super().__init__(optimizer)
        self._grad_scaler = grad_scaler
        self._every = gradient_accumulation_steps
        self._calls = 0

    def zero_grad(self, set_to_none: bool = False) -> None:
        if self._calls % self._every == 0:
            self._optimizer.zero_grad(set_to_none=set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        self._calls += 1
        if self._calls % self._every:
            return
        if self._grad_scaler is None:
            self._optimizer.step(closure=closure)
        else:
            self._grad_scaler.step(self._optimizer)
            self._grad_scaler.update()


@pytest.mark.filterwarnings("ignore:Detected call of")  # of schedulers while gradients accumulate
@pytest.mark.parametrize(("clipped", "scaled"), [(True, False), (False, True)])
def test_torch_easy_rec(clipped: bool, scaled: bool, tmp_path: Path) -> None:
    recipe = Recipe("TorchEasyRec")

    def train(side: str, first: int, last: int, load: Path | None, save: Path | None) -> Training:
        model = sharded.make_ranker()
        others = _dense(model)
        parts = [("_towers", torch.optim.SGD, {"momentum": 0.9, "fused": False})]
        parts.append(("_affine", torch.optim.Adadelta, {}))  # which stays torch's
        wrappers = []
        for name, kind, options in parts:
            params = {key: others.pop(key) for key in list(others) if name in key}
            wrappers.append(_wrapper(params, kind, options))
        wrappers.append(_wrapper(others, torch.optim.AdamW, {"fused": True}))
        combined = keyed.CombinedOptimizer([model.fused_optimizer, *wrappers])
        clipping = GradientClippingOptimizer(
            optimizer=combined, clipping=GradientClipping.NORM, max_gradient=0.1
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if scaled else None
        names = {
            "TZRecOptimizer": _WrappedOptimizer,
            "combined_optimizer": clipping if clipped else combined,
            "grad_scaler": scaler,
            "train_config": SimpleNamespace(gradient_accumulation_steps=2),
        }
        optimizer = recipe.run(0, side, names)["optimizer"]
        schedulers = [LambdaLR(part, _rate) for part in (model.fused_optimizer, *wrappers)]
        if load:
            combined.init_state()  # the program takes a step for that
            sharded.load(load, model, optimizer, *schedulers)
        losses = []
        for step in range(first, last):
            optimizer.zero_grad()
            loss, _ = model(sharded.make_batch(step))
            (loss if scaler is None else scaler.scale(loss)).backward()
            optimizer.step()
            for scheduler in schedulers:
                scheduler.step()
            if side == "torch":  # torchrec's tables hear of a rate one step late, ours at once
                model.fused_optimizer.step()
            losses.append(loss.item())
        if save:
            sharded.save(save, model, optimizer, *schedulers)
        return Training(losses, params_of(model))

    compare(train, tmp_path)


def _wrapper(
    params: dict[str, nn.Parameter], kind: type[torch.optim.Optimizer], options: dict[str, Any]
) -> keyed.KeyedOptimizerWrapper:
    return keyed.KeyedOptimizerWrapper(params, lambda given: kind(given, lr=0.01, **options))
