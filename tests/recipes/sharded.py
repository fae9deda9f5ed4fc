"""A small ranker under torchrec's model parallel, as the recipes for torchrec have it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.distributed.model_parallel import DistributedModelParallel, get_default_sharders
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from tests.support.models import Ranker, features, tables


@dataclass
class Batch(Pipelineable):
    """Ids and labels, as torchrec's train pipelines want them."""

    ids: KeyedJaggedTensor
    labels: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        return Batch(self.ids.to(device), self.labels.to(device))

    def record_stream(self, stream: torch.Stream) -> None:
        self.ids.record_stream(stream)
        self.labels.record_stream(stream)

    def pin_memory(self) -> Batch:
        return Batch(self.ids.pin_memory(), self.labels.pin_memory())


class ShardedRanker(nn.Module):
    """Tables, a backbone, and a tower for each of two tasks; returns the loss, and what to show."""

    def __init__(self) -> None:
        super().__init__()
        self.ebc = EmbeddingBagCollection(tables(), device=torch.device("meta"))
        self.ranker = Ranker()

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = self.ranker(self.ebc(batch.ids).values())
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)
        return loss, loss.detach()


@contextmanager
def one_process() -> Iterator[None]:
    """A process group of this process alone, on one thread: two would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
        torch.set_num_threads(threads)


def make_ranker() -> nn.Module:
    """A sharded `ShardedRanker`, whose tables train with Adagrad in the backward pass."""
    return shard(ShardedRanker(), torch.device("cpu"))


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """The same of a `ShardedRanker` that is not sharded yet."""
    _apply_optimizer_in_backward(torch.optim.Adagrad, model.ebc.parameters(), {"lr": 0.1})
    fused = ParameterConstraints(
        sharding_types=[ShardingType.TABLE_WISE.value], compute_kernels=["fused"]
    )
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=1, compute_device="cpu"),
        constraints={table.name: fused for table in tables()},
    )
    plan = planner.collective_plan(model, get_default_sharders(), dist.GroupMember.WORLD)
    model = DistributedModelParallel(model, device=device, plan=plan)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(0.3 * torch.randn(param.shape, generator=generator))
    return model


def make_batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    ids = features(step)
    labels = torch.randint(0, 2, (ids.stride(), 2), generator=generator)
    return Batch(ids, labels.float())


def save(path: Path, model: nn.Module, optimizer: Any, *schedulers: Any) -> None:
    """Writes a checkpoint with `torch.distributed.checkpoint`."""
    dcp.save(_state(model, optimizer, schedulers), checkpoint_id=path)


def load(path: Path, model: nn.Module, optimizer: Any, *schedulers: Any) -> None:
    """Loads one in place, as all of it is: the optimizer must have its state already."""
    state = _state(model, optimizer, schedulers)
    dcp.load(state, checkpoint_id=path)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for index, scheduler in enumerate(schedulers):
        scheduler.load_state_dict(state["schedulers"][str(index)])
        # Which torchrec's optimizers do not save, and a scheduler sets at its next step only.
        for group, rate in zip(
            scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True
        ):
            group["lr"] = rate


def _state(model: nn.Module, optimizer: Any, schedulers: Any) -> dict[str, Any]:
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedulers": {
            str(index): scheduler.state_dict() for index, scheduler in enumerate(schedulers)
        },
    }
