"""All kinds of state come back bit by bit, and training goes on as it would have."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torchrec.optim import keyed
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.warmup import WarmupOptimizer, WarmupPolicy, WarmupStage

from recap_fast.checkpoint import load, save
from recap_fast.keyed import CombinedOptimizer
from recap_fast.keyed.fused import FusedCombinedOptimizer
from recap_fast.optim import FusedAdam, FusedAdamW, FusedSGD
from tests.checkpoint.small_training_state import (
    Small,
    Training,
    built,
    random_gradients,
    small,
    with_tables,
)
from tests.support.processes import device, run


def plain(kind: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[[int], Training]:
    def make(seed: int) -> Training:
        model = Small(seed)
        options_here = {
            name: value.clone() if isinstance(value, torch.Tensor) else value
            for name, value in {"lr": 0.1, **options}.items()
        }
        return Training(model, kind(model.parameters(), **options_here))

    return make


def _in_bfloat16(seed: int, kind: Callable[[Any], torch.optim.Optimizer]) -> Training:
    model = Small(seed).bfloat16()
    return Training(model, kind(model.named_parameters()))


def frozen(seed: int) -> Training:
    model = Small(seed)
    model.first.weight.requires_grad_(False)
    return built(model)


def frozen_in_the_optimizer(seed: int) -> Training:
    model = Small(seed)
    model.first.weight.requires_grad_(False)
    return Training(model, torch.optim.Adam(model.parameters(), lr=0.1))


def without_some_gradients(seed: int) -> Training:
    """One layer gets its first gradient in step 4, another none after step 2."""

    def backward(model: nn.Module, step: int) -> None:
        random_gradients(model, step)
        if step < 4:
            model.first.weight.grad = None
        if step >= 2:
            model.last.bias.grad = None

    training = small(seed)
    training.backward = backward
    return training


def bfloat16(seed: int) -> Training:
    return built(Small(seed).bfloat16())


def tied(seed: int) -> Training:
    """One parameter in two places."""
    model = Small(seed)
    model.again = nn.ModuleDict({"first": model.first})
    return built(model)


class Odd(nn.Module):
    """Parameters of 0 dimensions, without elements, and that are not contiguous."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.scalar = nn.Parameter(torch.randn((), generator=generator))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.transposed = nn.Parameter(torch.randn(3, 5, generator=generator).t())
        self.register_buffer("seen", torch.tensor(seed))


def dampened(seed: int) -> Training:
    """Its momentum is None before the first step."""
    training = _combined(seed, lambda p: FusedSGD(p, lr=0.1, momentum=0.9, dampening=0.5))
    training.optimizer.init_state(count_step=False)
    return training


def _combined(seed: int, kind: Callable[[Any], torch.optim.Optimizer], *wrap: Any) -> Training:
    """An optimizer for each layer, in torchrec's wrappers, the innermost first."""
    model = Small(seed)
    parts = []
    for name, layer in model.named_children():
        params = {f"{name}.{each}": param for each, param in layer.named_parameters()}
        part = keyed.KeyedOptimizerWrapper(params, kind)
        for wrapper in wrap:
            part = wrapper(part)
        parts.append(part)
    # Two of them wrapped would both have torchrec's pretended parameter, were it not for the keys.
    kind_of_all = CombinedOptimizer if wrap else FusedCombinedOptimizer
    return Training(model, kind_of_all([(str(index), part) for index, part in enumerate(parts)]))


def warmed_up(seed: int) -> Training:
    stages = [WarmupStage(WarmupPolicy.LINEAR, max_iters=4, value=0.1)]
    return _combined(
        seed,
        lambda p: FusedAdam(p, lr=0.1),
        lambda part: GradientClippingOptimizer(part, GradientClipping.NORM, max_gradient=0.5),
        lambda part: WarmupOptimizer(part, stages, lr=0.1),
    )


def tables_without_scheduler(seed: int) -> Training:
    """Nothing but the checkpoint tells the kernels what rate the saved training had."""
    rate = {"constant": 0.1 * (seed + 1)}
    training = with_tables(seed, rowwise_adagrad={}, learning_rate=rate)
    training.scheduler = None
    return training


def scheduled(seed: int) -> Training:
    training = plain(torch.optim.SGD, momentum=0.9)(seed)
    training.scheduler = StepLR(training.optimizer, step_size=2, gamma=0.5)
    return training


CASES: dict[str, Callable[[int], Training]] = {
    "adam": small,
    "adagrad": lambda seed: small(seed, adagrad={"lr": 0.1, "eps": 1e-8}),
    "sgd": lambda seed: small(seed, sgd={"lr": 0.1}),
    "sgd with momentum": lambda seed: small(seed, sgd={"lr": 0.1, "momentum": 0.9}),
    "sgd with dampening": dampened,
    "rowwise adagrad tables": lambda seed: with_tables(seed, rowwise_adagrad={}),
    "adagrad tables": lambda seed: with_tables(seed, adagrad={}),
    "sgd tables": lambda seed: with_tables(seed, sgd={}),
    "tables that count": lambda seed: with_tables(seed, ema_rowwise_adagrad={}),
    "tables without scheduler": tables_without_scheduler,
    "frozen": frozen,
    "frozen in the optimizer": frozen_in_the_optimizer,
    "without some gradients": without_some_gradients,
    "bfloat16": bfloat16,
    "tied": tied,
    "odd shapes": lambda seed: built(Odd(seed)),
    "warm-up and clipping": warmed_up,
    "torch's adam": plain(torch.optim.Adam),
    "torch's adam with tensors": plain(torch.optim.Adam, lr=torch.tensor(0.1), foreach=False),
    "torch's amsgrad": plain(torch.optim.Adam, amsgrad=True, betas=(0.8, 0.9)),
    "torch's adamw": plain(torch.optim.AdamW, weight_decay=0.1),
    "torch's sgd": plain(torch.optim.SGD, momentum=0.9, nesterov=True),
    "torch's adagrad": plain(torch.optim.Adagrad, initial_accumulator_value=0.5),
    "our adam": plain(FusedAdam, amsgrad=True),
    "our adamw": plain(FusedAdamW, weight_decay=0.1),
    "a scheduler of torch's": scheduled,
    "short states": lambda seed: small(
        seed, adamw={"lr": 0.1, "state_dtype": "bfloat16", "rounding_seed": 2}
    ),
    "masters": lambda seed: built(
        Small(seed).bfloat16(), adam={"lr": 0.1, "state_dtype": "float32", "master_weights": True}
    ),
    "masters of float16": lambda seed: built(
        Small(seed).half(), lion={"lr": 0.1, "master_weights": True}
    ),
    "by chance": lambda seed: built(
        Small(seed).bfloat16(), sgd={"lr": 0.1, "momentum": 0.9, "stochastic_rounding": True}
    ),
    "parameters by chance": lambda seed: built(
        Small(seed).bfloat16(), sgd={"lr": 0.1, "stochastic_rounding": True, "rounding_seed": -1}
    ),
    "our adam with masters": lambda seed: _in_bfloat16(
        seed, lambda p: FusedAdam(p, lr=0.1, master_weights=True)
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("steps", [0, 3])
def test_it_comes_back(tmp_path: Path, name: str, steps: int) -> None:
    make = CASES[name]
    saved = make(0).train(steps)
    save(tmp_path, steps, *saved.all)
    contents = saved.contents()
    saved.train(3)
    for steps_before in (0, 5):
        own = make(1).train(steps_before)
        assert load(tmp_path, *own.all).step == steps
        assert own.contents() == contents
        own.step = steps
        assert own.train(3).contents() == saved.contents()


def test_options_become_the_saved_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved = plain(torch.optim.Adam, lr=0.03, eps=1e-3)(0).train(2)
    save(tmp_path, 2, *saved.all)
    own = plain(torch.optim.Adam, lr=torch.tensor(0.5), betas=(0.1, 0.2), foreach=False)(1)
    rate = own.optimizer.param_groups[0]["lr"]
    load(tmp_path, *own.all)
    (group,) = own.optimizer.param_groups
    assert (group["eps"], group["betas"], group["foreach"]) == (1e-3, (0.9, 0.999), False)
    assert group["lr"] is rate and rate.item() == pytest.approx(0.03, rel=1e-7)
    said = [record.getMessage() for record in caplog.records if record.name == "recap_fast"]
    assert [re.search(r"the option (\w+) of", each)[1] for each in said] == ["betas", "eps"]


def test_names_do_not_depend_on_torch_compile(tmp_path: Path) -> None:
    def compiled(seed: int) -> Training:
        model = torch.compile(Small(seed))
        return built(model)

    for number, (make, make_other) in enumerate([(compiled, small), (small, compiled)]):
        saved = make(0).train(2)
        save(tmp_path / str(number), 2, *saved.all)
        own = make_other(1)
        load(tmp_path / str(number), *own.all)
        assert _bare(own) == _bare(saved)


def _bare(training: Training) -> dict[str, Any]:
    found = training.contents()
    return {re.sub(r"\b(_orig_mod|module)\.", "", key): value for key, value in found.items()}


def _wrap_in_ddp(directory: str) -> tuple[bool, bool]:
    def parallel(seed: int) -> Training:
        return built(nn.parallel.DistributedDataParallel(Small(seed).to(device())))

    same = []
    for number, (make, make_other) in enumerate([(parallel, small), (small, parallel)]):
        saved = make(0).train(2)
        save(f"{directory}/{number}", 2, *saved.all)
        own = make_other(1 + dist.get_rank())
        load(f"{directory}/{number}", *own.all)
        same.append(_bare(own) == _bare(saved))
    return tuple(same)


def test_names_do_not_depend_on_ddp(tmp_path: Path, backend: str) -> None:
    assert run(2, _wrap_in_ddp, str(tmp_path), backend=backend) == [(True, True)] * 2
