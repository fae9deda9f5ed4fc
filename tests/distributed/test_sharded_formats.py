"""Formats of parameters and states that are DTensors: shards have the bits of the whole."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from recap_fast.checkpoint import load, save
from recap_fast.optim import FusedAdam, FusedSGD
from tests.support.processes import mesh, run

FORMATS = {
    "short states": (torch.float32, {"state_dtype": torch.bfloat16}),
    "remainder": (torch.bfloat16, {"master_weights": True}),
    "master": (torch.float16, {"master_weights": True, "state_dtype": torch.float32}),
    "by chance": (torch.bfloat16, {"stochastic_rounding": True}),
}


def make_model(dtype, seed, sharded):
    """Layers that two processes cannot share evenly; of the last, one gets nothing."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 67), nn.Linear(67, 3), nn.Linear(3, 1)).to(dtype)
    if sharded:
        for layer in model:
            fully_shard(layer, mesh=mesh())
    return model


def make(kind, formats, seed=0, sharded=False):
    dtype, options = FORMATS[formats]
    model = make_model(dtype, seed, sharded)
    more = {"momentum": 0.9} if kind is FusedSGD else {"amsgrad": True}
    return model, kind(model.named_parameters(), lr=0.02, **more, **options)


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            if isinstance(param, DTensor):
                grad = distribute_tensor(grad, param.device_mesh, param.placements)
            param.grad = grad
        optimizer.step()


def whole(value):
    if not isinstance(value, DTensor):
        return value
    if value.dtype == torch.int16:  # which no backend gathers
        return value.to(torch.int32).full_tensor().to(torch.int16)
    return value.full_tensor()


def contents(model, optimizer):
    found = {}
    for name, param in model.named_parameters():
        found[name] = whole(param.detach())
        for key, value in optimizer.state[param].items():
            found[f"{name}.{key}"] = whole(value)
    return found


def assert_same(these, those):
    assert these.keys() == those.keys()
    for name, value in these.items():
        assert value.dtype == those[name].dtype, name
        assert torch.equal(value, those[name]), name


def compare_steps():
    for kind in (FusedAdam, FusedSGD):
        for formats in FORMATS:
            runs = [make(kind, formats, sharded=sharded) for sharded in (True, False)]
            for model, optimizer in runs:
                train(model, optimizer, 3)
            assert_same(*(contents(*each) for each in runs))


def test_shards_have_the_bits_of_the_whole():
    run(2, compare_steps, backend="gloo")


def move_checkpoints(directory):
    for formats in FORMATS:
        for sharded in (True, False):
            saved = make(FusedAdam, formats, sharded=sharded)
            train(*saved, 2)
            path = f"{directory}/{formats} {sharded}"
            save(path, 2, *saved)
            own = make(FusedAdam, formats, seed=1, sharded=not sharded)
            load(path, *own)
            assert_same(contents(*own), contents(*saved))
            for each in (saved, own):
                train(*each, 2, start=2)
            assert_same(contents(*own), contents(*saved))


def test_checkpoints_move_them_to_other_shards(tmp_path):
    run(2, move_checkpoints, str(tmp_path), backend="gloo")


def load_into_others():
    """State dicts of one process, between formats of its shards."""
    for dtype in (torch.bfloat16, torch.float16):
        models = [make_model(dtype, 0, True) for _ in range(3)]
        masters = FusedAdam(models[0].parameters(), master_weights=True)
        nearest = FusedAdam(models[1].parameters())
        train(models[0], masters, 2)
        nearest.load_state_dict(copy.deepcopy(masters.state_dict()))
        again = FusedAdam(models[2].parameters(), master_weights=True)
        again.load_state_dict(copy.deepcopy(nearest.state_dict()))
        rest = "param_remainder" if dtype == torch.bfloat16 else "master_param"
        for first, second, third in zip(*(each.parameters() for each in models), strict=True):
            assert rest in masters.state[first] and rest not in nearest.state[second]
            moment = nearest.state[second]["exp_avg"]
            assert torch.equal(whole(moment), whole(masters.state[first]["exp_avg"]))
            made = again.state[third][rest]
            assert isinstance(made, DTensor) and made.placements == third.placements
        for model, optimizer in zip(models, (masters, nearest, again), strict=True):
            train(model, optimizer, 1)


@pytest.mark.parametrize("processes", [1, 2])
def test_formats_of_shards_are_made_and_left_out(processes):
    run(processes, load_into_others, backend="gloo")
