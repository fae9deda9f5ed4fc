"""A checkpoint of something else is refused before anything is changed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torchrec.optim.keyed import KeyedOptimizerWrapper

from recap_fast import FusedCombinedOptimizer, build_optimizer
from recap_fast.checkpoint import CheckpointMismatchError, load, save
from recap_fast.optim import FusedAdamW
from tests.checkpoint.small_training_state import Small, Training, built, small, with_tables
from tests.support.models import Ranker, multi_task_config


def with_layer() -> Training:
    model = Small(1)
    model.other = nn.Linear(2, 1)
    return built(model)


def without_layer() -> Training:
    model = Small(1)
    del model.last
    return built(model)


def without_buffers() -> Training:
    model = Small(1)
    model.norm = nn.BatchNorm1d(4, track_running_stats=False)
    return built(model)


def plain(kind: type[torch.optim.Optimizer], seed: int = 1, **options: Any) -> Training:
    model = Small(seed)
    return Training(model, kind(model.parameters(), lr=0.1, **options))


def of_weights() -> Training:
    """Its optimizer has no biases."""
    model = Small(1)
    return Training(model, torch.optim.Adam([model.first.weight, model.last.weight], lr=0.1))


def adam(**options: Any) -> Callable[[], Training]:
    return lambda: plain(torch.optim.Adam, **options)


def groups(*epsilons: float) -> Training:
    """A param group for each layer, or one for all."""
    model = Small(1)
    layers = [model.first, model.norm, model.last][: len(epsilons)]
    parts = [
        {"params": layer.parameters(), "eps": eps}
        for layer, eps in zip(layers, epsilons, strict=True)
    ]
    return Training(model, torch.optim.Adam(parts if len(parts) > 1 else model.parameters()))


def ranker(tasks: bool) -> Training:
    torch.manual_seed(1)
    model = Ranker()
    return Training(model, *build_optimizer(model, multi_task_config())) if tasks else built(model)


def adamw_of_tables() -> Training:
    """Its tables decay without being looked up."""
    training = with_tables(1, fused=False, adam={})
    tables = training.optimizer.optimizers[-1][1]
    other = KeyedOptimizerWrapper(tables.params, lambda params: FusedAdamW(params, lr=0.1))
    parts = [part for _, part in training.optimizer.optimizers[:-1]]
    optimizer = FusedCombinedOptimizer([*parts, other])
    return Training(training.model, optimizer, backward=training.backward)


def with_scheduler() -> Training:
    training = plain(torch.optim.Adam)
    training.scheduler = StepLR(training.optimizer, 1)
    return training


def sgd(**options: Any) -> Callable[[], Training]:
    return lambda: small(1, sgd={"lr": 0.1, **options})


ADAM = "Adam with exp_avg, exp_avg_sq, step"
AMSGRAD = "Adam with exp_avg, exp_avg_sq, max_exp_avg_sq, step"
T_USER = "'ebc.embedding_bags.t_user.weight'"
# What is saved, what it is loaded into, and what the error says.
CASES: dict[str, tuple[Callable[[], Training], Callable[[], Training], str]] = {
    "new parameters": (small, with_layer, "it lacks 'other.weight', 'other.bias'; nothing"),
    "lost parameters": (small, without_layer, "only it has 'last.weight', 'last.bias'; nothing"),
    "lost buffers": (
        small,
        without_buffers,
        "only it has 'norm.running_mean', 'norm.running_var', 'norm.num_batches_tracked'; nothing",
    ),
    "both": (
        without_layer,
        with_layer,
        "it lacks 'last.weight', 'last.bias', 'other.weight', 'other.bias'; nothing",
    ),
    "another shape": (
        small,
        lambda: small(1, width=5),
        "'first.weight' was (4, 3) float32, but here is (5, 3) float32, "
        "'first.bias' was (4,) float32, but here is (5,) float32, ",
    ),
    "another dtype": (
        small,
        lambda: built(Small(1).double()),
        "'first.weight' was (4, 3) float32, but here is (4, 3) float64, ",
    ),
    "adam, sgd": (
        small,
        sgd(),
        f"'first.weight' was trained by {ADAM}, but here is by SGD with no state, 'first.bias' was",
    ),
    "sgd, adagrad": (
        sgd(),
        lambda: small(1, adagrad={"lr": 0.1}),
        "'first.weight' was trained by SGD with no state, but here is by Adagrad with step, sum, ",
    ),
    "momentum, none": (
        sgd(momentum=0.9),
        sgd(),
        "'first.weight' was trained by SGD with momentum_buffer, but here is by SGD with no state",
    ),
    "adam, adamw": (
        adam(),
        lambda: plain(torch.optim.AdamW),
        f"'first.weight' was trained by {ADAM}, but here is by AdamW with exp_avg, exp_avg_sq, st",
    ),
    "no amsgrad, amsgrad": (
        adam(),
        adam(amsgrad=True),
        f"'first.weight' was trained by {ADAM}, but here is by {AMSGRAD}, ",
    ),
    "amsgrad, none": (
        adam(amsgrad=True),
        adam(),
        f"'first.weight' was trained by {AMSGRAD}, but here is by {ADAM}, ",
    ),
    "fewer in the optimizer": (
        adam(),
        of_weights,
        "only it has 'first.bias' in its optimizer, 'norm.weight' in its optimizer, "
        "'norm.bias' in its optimizer, 'last.bias' in its optimizer; nothing",
    ),
    "more in the optimizer": (
        of_weights,
        adam(),
        "it lacks 'first.bias' in its optimizer, 'norm.weight' in its optimizer, ",
    ),
    "one group of several": (
        lambda: groups(1e-8, 1e-7, 1e-8),
        lambda: groups(1e-8),
        "has eps=1e-08 for 'last.bias' and eps=1e-07 for 'norm.bias', which are in one param "
        "group here; nothing was changed",
    ),
    "tables by row, by element": (
        with_tables,
        lambda: with_tables(1, adagrad={}),
        f"{T_USER} was trained by exact_row_wise_adagrad with sum, but here is by exact_adagrad",
    ),
    "tables with state, without": (
        with_tables,
        lambda: with_tables(1, sgd={}),
        f"{T_USER} was trained by exact_row_wise_adagrad with sum, but here is by SGD with no sta",
    ),
    "unfused tables by row, fused by element": (
        lambda: with_tables(fused=False),
        lambda: with_tables(1, adagrad={}),
        f"{T_USER} was trained by FusedRowwiseAdagrad with step, sum, but here is by exact_adagrad",
    ),
    "fused tables, unfused without state": (
        with_tables,
        lambda: with_tables(1, fused=False, sgd={}),
        f"{T_USER} was trained by exact_row_wise_adagrad with sum, but here is by SGD with no sta",
    ),
    "lazy Adam, AdamW": (
        lambda: with_tables(fused=False, adam={}),
        adamw_of_tables,
        f"{T_USER} was trained by lazy AdamW with exp_avg, exp_avg_sq, step, but here is by AdamW",
    ),
    "scheduler, none": (
        with_scheduler,
        adam(),
        "was written with StepLR, but is to be loaded with no scheduler: pass to load what was",
    ),
    "none, scheduler": (
        adam(),
        with_scheduler,
        "was written with no scheduler, but is to be loaded with StepLR: ",
    ),
    "groups of tasks, of all": (
        lambda: ranker(tasks=True),
        lambda: ranker(tasks=False),
        "has rates for the groups ml.liked, ml.replied, backbone, but here they are ALL_PARAMS; "
        "nothing was changed",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_changed(tmp_path: Path, name: str) -> None:
    make_saved, make_own, said = CASES[name]
    path = save(tmp_path, 3, *make_saved().train(3).all)
    for steps in (0, 2):
        own, undisturbed = (make_own().train(steps) for _ in range(2))
        before = own.contents()
        with pytest.raises(CheckpointMismatchError, match=re.escape(said)) as raised:
            load(tmp_path, *own.all)
        assert str(path) in str(raised.value) and "nothing was changed" in str(raised.value)
        assert own.contents() == before
        assert own.train(1).contents() == undisturbed.train(1).contents()


@pytest.mark.parametrize("steps", [0, 1])
def test_state_that_does_not_fit(tmp_path: Path, steps: int) -> None:
    saved = plain(torch.optim.Adam).train(1)
    state = saved.optimizer.state
    state[saved.model.first.weight]["exp_avg"] = torch.zeros(4, 3, dtype=torch.float64)
    del state[saved.model.last.bias]["exp_avg_sq"]
    save(tmp_path, 1, *saved.all)
    own = plain(torch.optim.Adam).train(steps)
    before = own.contents()
    said = (
        "it lacks 'exp_avg_sq' of 'last.bias'; 'exp_avg' of 'first.weight' was (4, 3) float64, "
        "but here is (4, 3) float32; nothing was changed"
    )
    with pytest.raises(CheckpointMismatchError, match=re.escape(said)):
        load(tmp_path, *own.all)
    assert own.contents() == before


def test_five_are_named(tmp_path: Path) -> None:
    save(tmp_path, 0, *small().all)
    model = Small(1)
    model.others = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(8))
    said = ", ".join(f"'others.{index}.weight'" for index in range(5)) + " and 3 more; nothing"
    with pytest.raises(CheckpointMismatchError, match=re.escape(said)):
        load(tmp_path, *built(model).all)


def test_an_optimizer_whose_state_is_unknown(tmp_path: Path) -> None:
    training = plain(torch.optim.Adadelta).train(2)
    save(tmp_path, 2, *training.all)
    new = plain(torch.optim.Adadelta, seed=2)
    before = new.contents()
    with pytest.raises((TypeError, CheckpointMismatchError)) as raised:
        load(tmp_path, *new.all)
    assert new.contents() == before
    assert "Adadelta" in str(raised.value)
    trained = plain(torch.optim.Adadelta, seed=2).train(1)
    load(tmp_path, *trained.all)
    assert trained.contents() == training.contents()
