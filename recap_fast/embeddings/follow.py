"""Has the kernels that torchrec made follow the model, as those of `fuse_embeddings` do."""

from __future__ import annotations

import weakref
from typing import Any, cast

from torch import Tensor, nn
from torchrec.distributed.composable.table_batched_embedding_slice import (
    TableBatchedEmbeddingSlice,
)
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.types import ShardedModule
from torchrec.modules.fused_embedding_modules import (
    FusedEmbeddingBagCollection,
    FusedEmbeddingCollection,
)
from torchrec.optim import keyed

from recap_fast.embeddings.live import LiveKernel
from recap_fast.embeddings.live_step import follow_kernel
from recap_fast.embeddings.shown import ShownTable, ShownTables
from recap_fast.groups.fused_memory import memory_range
from recap_fast.keyed import leaves

_COLLECTIONS = {
    FusedEmbeddingBagCollection: "embedding_bags",
    FusedEmbeddingCollection: "embeddings",
    ShardedEmbeddingBagCollection: "embedding_bags",
    ShardedEmbeddingCollection: "embeddings",
}


def follow_tables(model: nn.Module, optimizer: keyed.KeyedOptimizer) -> None:
    """Has every kernel follow its param group, and the parameters that show its tables.

    Args:
        model: The model, wrapped or not.
        optimizer: Its fused optimizer.

    Raises:
        ValueError: A parameter shows what its kernel cannot follow; the message names the table.
    """
    kernels = [kernel for kernel in map(follow_kernel, leaves(optimizer)) if kernel is not None]
    unknown = [kernel for kernel in kernels if kernel.shown is None]
    if unknown:
        for module in model.modules():
            for kind, name in _COLLECTIONS.items():
                if isinstance(module, kind):
                    _show(module, getattr(module, name, None), unknown)
    try:
        for kernel in kernels:
            kernel.look()
    except RuntimeError as error:
        raise ValueError(str(error)) from None


def _show(collection: nn.Module, holders: Any, kernels: list[LiveKernel]) -> None:
    """Tells kernels which parameters of a collection show their tables."""
    if not isinstance(holders, nn.ModuleDict):
        return
    ranges = {
        name: memory_range(param.detach().as_subclass(Tensor))
        for name, holder in holders.items()
        if (param := holder._parameters.get("weight")) is not None
    }
    mine = []
    for kernel in kernels:
        places: dict[str, list[int]] = {}
        for place, weight in enumerate(kernel.split_embedding_weights()):
            begin, end = memory_range(weight) or (0, 0)
            for name, found in ranges.items():
                if found is not None and found[0] <= begin < end <= found[1]:
                    places.setdefault(name, []).append(place)
        found_places = sorted(place for own in places.values() for place in own)
        if found_places != list(range(len(kernel.embedding_specs))):
            continue  # of another collection
        tables = {
            name: ShownTable(name, _as_leaf(holders[name]), own) for name, own in places.items()
        }
        kernel.shown = ShownTables(holders, tables)
        kernel.joins_backward = isinstance(collection, ShardedModule)
        mine.append(weakref.ref(kernel))

    def look(*_: Any) -> None:
        for reference in mine:
            if (kernel := reference()) is not None:
                kernel.look()

    if mine:
        # What torchrec shows in a state dict is the memory of kernels.
        collection.register_state_dict_pre_hook(look)


def _as_leaf(holder: nn.Module) -> nn.Parameter:
    """The parameter of a table, as one that can be frozen and replaced like others.

    Those of torchrec's model parallel are slices of a larger one (torchrec 1.8 and 1.9), which
    torch refuses to freeze.
    """
    param: Any = holder._parameters["weight"]
    if type(param) is not TableBatchedEmbeddingSlice:
        return cast(nn.Parameter, param)
    leaf = nn.Parameter(param.detach().as_subclass(Tensor))
    if hasattr(param, "_in_backward_optimizers"):  # by which torchrec knows that it is fused
        marked: Any = leaf
        marked._in_backward_optimizers = param._in_backward_optimizers
    holder._parameters["weight"] = leaf
    return leaf
