"""The combined optimizer on several processes: torch's state-dict helpers, and `init_state`."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torchrec.optim import keyed

import recap_fast
from recap_fast import reference
from recap_fast.groups.assign import group_parameters
from recap_fast.scheduler import RecapLRShim
from tests.support.models import Ranker, multi_task_config
from tests.support.processes import device, mesh, run

BUILDS = {"fused": recap_fast.build_optimizer, "reference": reference.build_optimizer}


def build_torchrecs(model, config):
    """torchrec's own combination of torch's optimizers, with the same groups."""
    groups = group_parameters(model, config, None, None)
    adam = config.adam
    make = functools.partial(
        torch.optim.Adam, lr=1.0, betas=(adam.beta_1, adam.beta_2), eps=adam.epsilon
    )
    optimizer = keyed.CombinedOptimizer(
        [keyed.KeyedOptimizerWrapper(group.params, make) for group in groups]
    )
    return optimizer, RecapLRShim(optimizer, {group.name: group.learning_rate for group in groups})


def backward(model, seed):
    inputs = torch.randn(8, 20, generator=torch.Generator().manual_seed(seed))
    loss = model(inputs.to(device())).square().mean()
    loss.backward()
    return loss.detach()


def make_model(seed=0):
    torch.manual_seed(seed)
    return Ranker().to(device())


def losses_under_ddp(build, rank):
    """Of the recap recommender's training loop; every process has other examples."""
    model = DistributedDataParallel(make_model())
    optimizer, scheduler = build(model, multi_task_config())
    optimizer.init_state()
    losses = []
    for step in range(40):
        optimizer.zero_grad()
        losses.append(backward(model, 2 * step + rank))
        optimizer.step()
        scheduler.step()
    return torch.stack(losses)


def compare_losses():
    rank = torch.distributed.get_rank()
    expected = losses_under_ddp(build_torchrecs, rank)
    for build in BUILDS.values():
        assert (losses_under_ddp(build, rank) - expected).abs().max() <= 1e-5


def sharded(kind, seed):
    model = make_model(seed)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh())
    fully_shard(model, mesh=mesh())
    return model, *BUILDS[kind](model, multi_task_config())


def round_trips(options):
    """Between sharded models, through state dicts of shards or of whole tensors."""
    for source, target in (("fused", "reference"), ("reference", "fused"), ("fused", "fused")):
        whole, resumed = sharded(source, 0), sharded(target, 9)
        for step in range(3):
            backward(whole[0], step)
            whole[1].step()
            whole[1].zero_grad()
        arguments = StateDictOptions(**options)
        saved = copy.deepcopy(get_optimizer_state_dict(*whole[:2], options=arguments))
        if options.get("broadcast_from_rank0") and torch.distributed.get_rank() != 0:
            saved = {}
        resumed[0].load_state_dict(whole[0].state_dict())
        set_optimizer_state_dict(*resumed[:2], saved, options=arguments)
        for model, optimizer, _ in (whole, resumed):
            for step in range(3, 6):
                backward(model, step)
                optimizer.step()
                optimizer.zero_grad()
        for first, second in zip(whole[0].parameters(), resumed[0].parameters(), strict=True):
            torch.testing.assert_close(first.to_local(), second.to_local())


def test_the_original_loop_on_two_processes_has_the_losses_of_torchrecs_optimizer(backend):
    run(2, compare_losses, backend=backend)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"full_state_dict": True, "cpu_offload": True, "broadcast_from_rank0": True},
        {"flatten_optimizer_state_dict": True},
    ],
    ids=["shards", "whole, from the first rank", "flattened"],
)
def test_state_of_sharded_parameters_goes_through_torchs_helpers(backend, options):
    run(2, round_trips, options, backend=backend)
