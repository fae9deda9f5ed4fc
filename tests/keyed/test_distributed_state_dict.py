"""`torch.distributed.checkpoint.state_dict` on combined optimizers: to and from torch's."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torchrec.optim import keyed
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.warmup import WarmupOptimizer, WarmupStage

import recap_fast
from recap_fast import reference
from recap_fast.config import EmbeddingOptimizerConfig, OptimizerConfig
from recap_fast.embeddings import fuse_embeddings
from recap_fast.groups.assign import group_parameters
from recap_fast.keyed import CombinedOptimizer
from recap_fast.keyed.fused import FusedCombinedOptimizer
from recap_fast.optim import FusedAdam
from tests.support.models import EmbeddingRanker, Ranker, constant, features, multi_task_config

KINDS = ["fused", "reference", "torch"]
directions = pytest.mark.parametrize(
    ("source", "target"),
    [(a, b) for a in KINDS for b in KINDS if (a, b) != ("torch", "torch")],
    ids=lambda kind: kind,
)
ours = pytest.mark.parametrize("kind", KINDS[:2])
options = pytest.mark.parametrize(
    "options",
    [
        {},
        {"flatten_optimizer_state_dict": True},
        {"full_state_dict": True},
        {"full_state_dict": True, "cpu_offload": True},
        {"cpu_offload": True, "flatten_optimizer_state_dict": True},
    ],
    ids=lambda options: ", ".join(options) or "none",
)


def _one_of_torch(model: nn.Module) -> torch.optim.Optimizer:
    """An Adam of torch with the same groups."""
    config = multi_task_config()
    groups = group_parameters(model, config, None, None)
    adam = config.adam
    return torch.optim.Adam(
        [{"params": list(group.params.values())} for group in groups],
        lr=0.01,
        betas=(adam.beta_1, adam.beta_2),
        eps=adam.epsilon,
    )


class Run:
    """A model with an optimizer of one of the kinds."""

    def __init__(self, kind: str, steps: int = 0, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = Ranker()
        if kind == "torch":
            self.optimizer: Any = _one_of_torch(self.model)
        else:
            build = recap_fast.build_optimizer if kind == "fused" else reference.build_optimizer
            # Of torch's schedulers, which is in all groups or in none.
            self.optimizer, _ = build(self.model, multi_task_config())
            for group in self.optimizer.param_groups:
                group["lr"] = 0.01
                del group["initial_lr"]
        self.steps(range(steps))

    def backward(self, seed: int) -> None:
        self.optimizer.zero_grad()
        inputs = torch.randn(4, 20, generator=torch.Generator().manual_seed(seed))
        self.model(inputs).square().sum().backward()

    def steps(self, seeds: range) -> None:
        for seed in seeds:
            self.backward(seed)
            self.optimizer.step()

    def state(self) -> dict[str, dict[str, Tensor]]:
        state = self.optimizer.state
        return {name: dict(state[param]) for name, param in self.model.named_parameters()}


@directions
@options
@pytest.mark.parametrize("before", ["fresh", "used"])
def test_a_round_trip_goes_on_alike(
    source: str, target: str, options: dict[str, bool], before: str
) -> None:
    whole = Run(source, steps=3)
    whole.optimizer.param_groups[1]["lr"] = 0.0625
    arguments = StateDictOptions(**options)
    saved = copy.deepcopy(get_optimizer_state_dict(whole.model, whole.optimizer, options=arguments))
    resumed = Run(target, steps=2 if before == "used" else 0, seed=9)
    resumed.model.load_state_dict(whole.model.state_dict())
    groups = list(resumed.optimizer.param_groups)
    set_optimizer_state_dict(resumed.model, resumed.optimizer, saved, options=arguments)
    assert [group["lr"] for group in resumed.optimizer.param_groups] == [
        group["lr"] for group in whole.optimizer.param_groups
    ]
    if target != "torch":  # in place, as schedulers and wrappers want it
        now = resumed.optimizer.param_groups
        assert all(a is b for a, b in zip(groups, now, strict=True))
        assert all(type(group["betas"]) is tuple for group in now)
    for run in (whole, resumed):
        run.steps(range(3, 6))
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, msg=name)
    assert resumed.state()["_backbone.0.weight"]["step"] == 6


@pytest.mark.parametrize("build", [recap_fast.build_optimizer, reference.build_optimizer])
@pytest.mark.parametrize("grouped", [False, True])
def test_a_torch_state_dict_is_refused_and_loads_as_the_message_says(
    build: Callable[..., Any], grouped: bool
) -> None:
    """Of one group for all parameters, or of our groups in the reverse order."""

    def torchs(model: nn.Module) -> torch.optim.Adam:
        towers = list(model.children())[::-1]
        groups = [{"params": list(each.parameters())} for each in towers]
        return torch.optim.Adam(groups if grouped else model.parameters(), lr=0.01)

    whole = Run("torch")
    whole.optimizer = torchs(whole.model)
    whole.steps(range(3))
    saved = copy.deepcopy(whole.optimizer.state_dict())

    model = Ranker()
    model.load_state_dict(whole.model.state_dict())
    optimizer, _ = build(model, multi_task_config())
    with pytest.raises(ValueError, match=r"of a torch\.optim optimizer: its keys are numbers"):
        optimizer.load_state_dict(saved)
    assert not optimizer.state_dict()["state"]

    that_optimizer = torchs(model)
    that_optimizer.load_state_dict(saved)
    named = get_optimizer_state_dict(model, that_optimizer)
    set_optimizer_state_dict(model, optimizer, named)
    for name, entries in whole.state().items():
        found = optimizer.state_dict()["state"][name]
        for key, value in entries.items():
            assert torch.equal(torch.as_tensor(found[key]), torch.as_tensor(value)), (name, key)


@ours
@pytest.mark.parametrize("flat", [False, True])
def test_it_is_what_torchs_optimizer_gives(kind: str, flat: bool) -> None:
    arguments = StateDictOptions(flatten_optimizer_state_dict=flat)
    mine, torchs = (
        get_optimizer_state_dict(run.model, run.optimizer, options=arguments)
        for run in (Run(kind, steps=2), Run("torch", steps=2))
    )
    if flat:
        assert mine.keys() == torchs.keys()
        return
    assert mine["state"].keys() == torchs["state"].keys()
    for group, other in zip(mine["param_groups"], torchs["param_groups"], strict=True):
        assert group.keys() == other.keys() and group["params"] == other["params"]
    for name, entries in torchs["state"].items():
        for key, value in entries.items():
            torch.testing.assert_close(mine["state"][name][key], value, msg=f"{key} of {name}")


@ours
def test_getting_a_state_takes_no_step(kind: str) -> None:
    """Where torch's helper would: with weight decay on the device, counts, a warm-up and hooks."""
    run = Run(kind)
    calls: list[Any] = []
    run.optimizer.register_step_pre_hook(lambda *_: calls.append("step"))
    saved = get_optimizer_state_dict(run.model, run.optimizer)
    assert calls == [] and all(param.grad is None for param in run.model.parameters())
    assert saved["state"].keys() == dict(run.model.named_parameters()).keys()
    assert all(not value.any() for state in saved["state"].values() for value in state.values())
    plain = Run(kind, steps=3)
    run.steps(range(3))
    for name, value in plain.model.state_dict().items():
        assert torch.equal(run.model.state_dict()[name], value), name


@directions
def test_a_parameter_without_a_gradient(source: str, target: str) -> None:
    """torch's own optimizers need strict=False then; ours has made its state."""
    whole, resumed = Run(source), Run(target)
    whole.backward(0)
    whole.model._backbone[0].bias.grad = None
    whole.optimizer.step()
    arguments = StateDictOptions(strict=source != "torch")
    saved = copy.deepcopy(get_optimizer_state_dict(whole.model, whole.optimizer))
    resumed.model.load_state_dict(whole.model.state_dict())
    set_optimizer_state_dict(resumed.model, resumed.optimizer, saved, options=arguments)
    for run in (whole, resumed):
        run.steps(range(1, 4))
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, msg=name)


@ours
def test_model_and_optimizer_through_files(kind: str, tmp_path: Path) -> None:
    """Of a compiled model, whose names torch's helpers have without the wrapper's."""
    whole, resumed = Run(kind, steps=3), Run(kind, seed=9)
    for run in (whole, resumed):
        run.model = torch.compile(run.model, backend="eager")
        build = recap_fast.build_optimizer if kind == "fused" else reference.build_optimizer
        run.optimizer, run.scheduler = build(run.model, multi_task_config())
    whole.steps(range(3))
    model, optimizer = get_state_dict(whole.model, whole.optimizer)
    assert not any("_orig_mod" in name for name in optimizer["state"])
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=tmp_path)
    model, optimizer = get_state_dict(resumed.model, resumed.optimizer)
    loaded = {"model": model, "optimizer": optimizer}
    dcp.load(loaded, checkpoint_id=tmp_path)
    set_state_dict(
        resumed.model,
        resumed.optimizer,
        model_state_dict=loaded["model"],
        optim_state_dict=loaded["optimizer"],
    )
    for run in (whole, resumed):
        run.steps(range(3, 6))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


@ours
@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_momentum_and_no_state(kind: str, dampening: float) -> None:
    config = {"sgd": {"lr": 0.01, "momentum": 0.9}} if dampening == 0 else {"sgd": {"lr": 0.01}}
    build = recap_fast.build_optimizer if kind == "fused" else reference.build_optimizer
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        model = Ranker()
        results.append((model, build(model, OptimizerConfig.model_validate(config))[0]))
    for model, optimizer in results[:1]:
        model(torch.ones(2, 20)).sum().backward()
        optimizer.step()
    saved = copy.deepcopy(get_optimizer_state_dict(*results[0]))
    results[1][0].load_state_dict(results[0][0].state_dict())
    set_optimizer_state_dict(*results[1], saved)
    for model, optimizer in results:
        optimizer.zero_grad()
        model(torch.ones(2, 20)).sum().backward()
        optimizer.step()
    for mine, other in zip(results[0][0].parameters(), results[1][0].parameters(), strict=True):
        assert torch.equal(mine, other)


@ours
def test_through_torchrecs_wrapper(kind: str) -> None:
    """Clipping around the whole: it passes state dicts on."""
    runs = [Run(kind, steps=2), Run(kind, seed=9)]
    for run in runs:
        run.optimizer = GradientClippingOptimizer(run.optimizer, GradientClipping.NORM, 0.5)
    whole, resumed = runs
    saved = copy.deepcopy(get_optimizer_state_dict(whole.model, whole.optimizer))
    resumed.model.load_state_dict(whole.model.state_dict())
    set_optimizer_state_dict(resumed.model, resumed.optimizer, saved)
    for run in runs:
        run.steps(range(2, 5))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


@ours
def test_a_group_without_parameters(kind: str) -> None:
    def make() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = nn.Linear(2, 2)
        adam = FusedAdam if kind == "fused" else torch.optim.Adam
        params = dict(model.named_parameters())
        part = keyed.KeyedOptimizerWrapper(
            params,
            lambda p: adam([{"params": p, "weight_decay": 0.1}, {"params": []}], lr=0.1),
        )
        make = FusedCombinedOptimizer if kind == "fused" else CombinedOptimizer
        return model, make([part])

    whole, resumed = make(), make()
    whole[0](torch.ones(1, 2)).sum().backward()
    whole[1].step()
    whole[1].param_groups[1]["lr"] = 0.75
    saved = copy.deepcopy(get_optimizer_state_dict(*whole))
    set_optimizer_state_dict(*resumed, saved)
    assert [group["lr"] for group in resumed[1].param_groups] == [0.1, 0.75]
    assert resumed[1].param_groups[0].keys() == whole[1].param_groups[0].keys()


class Tied(nn.Module):
    """One weight under two names, and a bias that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(3, 3, bias=False) for _ in range(2))
        self.second.weight = self.first.weight
        self.last = nn.Linear(3, 1)
        self.last.bias.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.second(self.first(inputs)))


@ours
@pytest.mark.parametrize("flat", [False, True])
def test_tied_and_frozen_parameters(kind: str, flat: bool) -> None:
    build = recap_fast.build_optimizer if kind == "fused" else reference.build_optimizer
    config = OptimizerConfig.model_validate({"adam": {"lr": 0.1}})
    arguments = StateDictOptions(flatten_optimizer_state_dict=flat)
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = Tied()
        runs.append((model, build(model, config)[0]))

    def step(model: nn.Module, optimizer: Any) -> None:
        optimizer.zero_grad()
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()

    step(*runs[0])
    saved = copy.deepcopy(get_optimizer_state_dict(*runs[0], options=arguments))
    runs[1][0].load_state_dict(runs[0][0].state_dict())
    set_optimizer_state_dict(*runs[1], saved, options=arguments)
    for run in runs:
        step(*run)
    for mine, other in zip(*(model.parameters() for model, _ in runs), strict=True):
        assert torch.equal(mine, other)


def _with_tables(kind: str) -> tuple[nn.Module, Any]:
    embeddings = EmbeddingOptimizerConfig(learning_rate=constant(0.1), rowwise_adagrad={})
    model = fuse_embeddings(EmbeddingRanker(), embeddings)
    build = recap_fast.build_optimizer if kind == "fused" else reference.build_optimizer
    optimizer, _ = build(model, multi_task_config(), embeddings)
    model(features()).sum().backward()
    optimizer.step()
    return model, optimizer


def _with_warm_up(kind: str) -> tuple[nn.Module, Any]:
    model = nn.Linear(2, 2)
    adam = FusedAdam if kind == "fused" else torch.optim.Adam
    part = keyed.KeyedOptimizerWrapper(
        dict(model.named_parameters()), functools.partial(adam, lr=0.1)
    )
    warm = WarmupOptimizer(part, [WarmupStage(max_iters=10, value=0.0)])
    optimizer = (FusedCombinedOptimizer if kind == "fused" else CombinedOptimizer)([warm])
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return model, optimizer


@ours
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_with_tables, r"but ebc\.embedding_bags\.t_user\.weight is a fused table"),
        (_with_warm_up, "but __warmup is in no param group"),
    ],
)
def test_what_torchs_helpers_cannot_hold_is_refused_by_name(
    kind: str, make: Callable[[str], tuple[nn.Module, Any]], message: str
) -> None:
    model, optimizer = make(kind)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        get_optimizer_state_dict(model, optimizer)
    with pytest.raises(ValueError, match=message):
        set_optimizer_state_dict(model, optimizer, {"state": {}, "param_groups": []})
    optimizer.load_state_dict(before)  # its own format has everything


@ours
def test_a_state_of_another_model_is_refused(kind: str) -> None:
    saved = copy.deepcopy(get_optimizer_state_dict(*vars(Run(kind, steps=1)).values()))
    saved["state"]["_backbone.0.weight"]["exp_avg"] = torch.zeros(3, 3)
    run = Run(kind, steps=1)
    before = copy.deepcopy(run.optimizer.state_dict())
    with pytest.raises(ValueError, match=r"'exp_avg' of '_backbone.0.weight' has shape \(3, 3\)"):
        set_optimizer_state_dict(run.model, run.optimizer, saved)
    for name, entries in before["state"].items():
        for key, value in entries.items():
            assert torch.equal(run.optimizer.state_dict()["state"][name][key], value)


@ours
def test_its_own_state_dict_stays_torchrecs(kind: str) -> None:
    run = Run(kind, steps=1)
    get_optimizer_state_dict(run.model, run.optimizer)
    assert [*run.optimizer.state_dict()] == ["state"]
    assert set(run.optimizer.state_dict()["state"]) == {n for n, _ in run.model.named_parameters()}
    run.optimizer.save_param_groups(True)
    saved = copy.deepcopy(run.optimizer.state_dict())
    assert [*saved] == ["state", "param_groups"]
    assert saved["param_groups"][0]["params"] == sorted(saved["param_groups"][0]["params"])
    run.optimizer.load_state_dict(saved)
