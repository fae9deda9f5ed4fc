"""One rule for what a parameter is called without what wrappers add to its name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from recap_fast.names import bare_names


class Wrapper(nn.Module):
    """Such as DeepSpeed's, which is no class of torch's."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class Model(nn.Module):
    """Has modules of its own that are called like those of wrappers."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)
        self.tower = Wrapper(nn.Linear(2, 2))


OWN = ["module.weight", "module.bias", "tower.module.weight", "tower.module.bias"]
WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "none": lambda model: model,
    "DataParallel": nn.DataParallel,
    "another's": Wrapper,
    "another's in DataParallel": lambda model: nn.DataParallel(Wrapper(model)),
    "compiled": torch.compile,
    "compiled in another's": lambda model: Wrapper(torch.compile(model)),
    "checkpointed": checkpoint_wrapper,
    "all of them": lambda model: nn.DataParallel(
        checkpoint_wrapper(Wrapper(checkpoint_wrapper(torch.compile(model))))
    ),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_outer_wrappers_add_nothing(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = wrap(Model())
    bare = bare_names(model)
    assert [bare(name) for name, _ in model.named_parameters()] == OWN


@pytest.mark.parametrize("wrap", [nn.DataParallel, checkpoint_wrapper])
def test_nor_do_inner_ones(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = Model()
    model.tower.module = wrap(model.tower.module)
    bare = bare_names(model)
    assert [bare(name) for name, _ in model.named_parameters()] == OWN


def test_a_module_with_weights_of_its_own_is_no_wrapper() -> None:
    model = Wrapper(nn.Linear(2, 2))
    model.temperature = nn.Parameter(torch.ones(()))
    bare = bare_names(model)
    names = [name for name, _ in model.named_parameters()]
    assert [bare(name) for name in names] == names
