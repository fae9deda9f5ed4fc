"""Tables with an in-backward optimizer of ours, which torchrec fuses as it does torch's."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
from torchrec.distributed.types import ShardingPlan
from torchrec.optim import keyed
from torchrec.optim.optimizers import in_backward_optimizer_filter

from recap_fast import FusedCombinedOptimizer, fuse
from tests.support.optimizers import FUSED, TORCH
from tests.support.processes import device, run
from tests.support.sharded_models import local_parts
from tests.support.table_reference import table
from tests.support.table_training import BATCH, Tables, global_batch

NAMES = ("sgd", "adagrad")


def train(algorithm, ours):
    """The losses of a training that is set up as torchrec's DLRM sets its own up."""
    model = Tables([table("a", "user", "item"), table("b", "last_item")])
    weights = {name: value.clone() for name, value in model.ebc.state_dict().items()}
    kind = (FUSED if ours else TORCH)[algorithm]
    _apply_optimizer_in_backward(kind, model.ebc.parameters(), {"lr": 0.05})
    ranks, rank = dist.get_world_size(), dist.get_rank()
    sharder = EmbeddingBagCollectionSharder()
    layouts = {name: row_wise(compute_kernel="fused") for name in ("a", "b")}
    plan = construct_module_sharding_plan(
        model.ebc,
        layouts,
        sharder,
        local_size=ranks,
        world_size=ranks,
        device_type=device().type,
    )
    model = DistributedModelParallel(
        model, device=device(), plan=ShardingPlan({"ebc": plan}), sharders=[sharder]
    )
    state = model.state_dict()
    for name, weight in weights.items():  # on the CPU, torchrec draws new ones
        for part, place in local_parts(state[f"ebc.{name}"]):
            part.copy_(weight[place])

    dense_optimizer = keyed.KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(model.named_parameters())),
        lambda params: TORCH[algorithm](params, lr=0.05),
    )
    optimizer = keyed.CombinedOptimizer([model.fused_optimizer, dense_optimizer])
    if ours:
        fuse(optimizer)
        assert type(optimizer) is FusedCombinedOptimizer
    losses = []
    begin, end = BATCH * rank // ranks, BATCH * (rank + 1) // ranks
    for step in range(5):
        optimizer.zero_grad()
        pooled, factor = model(global_batch(step, begin, end).to(device()))
        loss = (factor * pooled.values()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_all():
    return [[train(algorithm, ours) for ours in (True, False)] for algorithm in NAMES]


def test_they_train_on_fbgemms_kernels_as_with_torchs_classes():
    for ours, theirs in run(1, train_all)[0]:
        assert ours == pytest.approx(theirs, rel=1e-5)
        assert len(set(theirs)) == len(theirs)
