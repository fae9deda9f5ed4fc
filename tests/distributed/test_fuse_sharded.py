"""`fuse` of an optimizer whose parameters FSDP2 shards: the same training as without."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from recap_fast import fuse, unfuse
from recap_fast.optim import FusedOptimizer
from tests.support.optimizers import TORCH
from tests.support.processes import device, mesh, run

OPTIONS = {"adamw": {}, "adagrad": {}, "sgd": {"momentum": 0.9}}


def train(algorithm, fuses):
    """The parameters after six steps, of which two, in the middle, may be native."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(device())
    fully_shard(model, mesh=mesh())
    optimizer = TORCH[algorithm](model.parameters(), lr=0.05, **OPTIONS[algorithm])
    for step in range(6):
        if fuses and step == 2:
            fuse(optimizer)
            assert isinstance(optimizer, FusedOptimizer)
        if fuses and step == 4:
            groups = optimizer._stepper._built.groups
            assert [len(native) for native in groups] == [1]  # none is torch's
            unfuse(optimizer)
        optimizer.zero_grad()
        inputs = torch.randn(16, 5, generator=torch.Generator().manual_seed(step)).to(device())
        model(inputs).square().mean().backward()
        optimizer.step()
    return [param.full_tensor().detach().cpu() for param in model.parameters()]


def train_all():
    return {name: [train(name, fuses) for fuses in (True, False)] for name in OPTIONS}


def test_training_goes_on_as_before(backend):
    for outcomes in run(2, train_all, backend=backend):
        for ours, theirs in outcomes.values():
            for mine, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
