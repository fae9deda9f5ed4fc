"""Finds the fused optimizer of a model, wrapped or not."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from torch import nn
from torchrec.modules.fused_embedding_modules import (
    EmbeddingFusedOptimizer,
    FusedEmbeddingBagCollection,
    FusedEmbeddingCollection,
)
from torchrec.optim import keyed
from torchrec.optim.fused import FusedOptimizerModule

from recap_fast.config.convert import kind_of
from recap_fast.embeddings.follow import follow_tables
from recap_fast.groups.fused_memory import memory_of, memory_range
from recap_fast.keyed import leaves
from recap_fast.names import bare_names, table_name, wrapped_module

# Under which torchrec's collections have their tables, pooled and not.
_HOLDERS = ("embedding_bags", "embeddings")


def find_fused_optimizer(model: nn.Module) -> keyed.KeyedOptimizer | None:
    """Returns the `fused_optimizer` of a model or of what it wraps; None if there is none.

    Any `KeyedOptimizer` is taken, under whatever names it has its tables. If the model has none,
    but modules inside it have, it is a `CombinedOptimizer` of these, under the paths of the
    modules, as torchrec's model parallel makes it.

    It may have no parameters, on a rank of torchrec's model parallel that holds no table. One that
    combines no optimizers at all counts as none, as in the original.

    From now on, FBGEMM's kernels follow the rates in its param groups, and the parameters of the
    model that show their tables.

    Raises:
        TypeError: If `fused_optimizer` is not a `KeyedOptimizer`.
        ValueError: If the model has fused tables that its `fused_optimizer` does not have.
    """
    owner: nn.Module | None = model
    while owner is not None and getattr(owner, "fused_optimizer", None) is None:
        wrapped = wrapped_module(owner)
        owner = None if wrapped is None else wrapped[1]
    optimizer = _optimizer_of_parts(model) if owner is None else _optimizer_of(owner)
    if isinstance(optimizer, keyed.CombinedOptimizer):
        is_empty = not optimizer.optimizers
    else:
        is_empty = not optimizer.params
    if is_empty:
        return None
    follow_tables(model, optimizer)
    _check_all_tables_listed(model, optimizer)
    return optimizer


def _optimizer_of(module: nn.Module) -> keyed.KeyedOptimizer:
    optimizer = module.fused_optimizer
    if inspect.ismethod(optimizer):  # in torchrec's unsharded collections it is one
        optimizer = optimizer()
    if not isinstance(optimizer, keyed.KeyedOptimizer):
        raise TypeError(
            "model.fused_optimizer must be a torchrec.optim.keyed.KeyedOptimizer, "
            f"found {kind_of(optimizer)}"
        )
    _list_tables_without_state(module, optimizer)
    return optimizer


def _list_tables_without_state(module: nn.Module, optimizer: keyed.KeyedOptimizer) -> None:
    """Adds the tables that torchrec forgets to the optimizers of its unsharded fused collections.

    These list a table by its state (torchrec 1.8 and 1.9), so that SGD, which keeps none, seems to
    have no table. Its rate is that of its kernel all the same.
    """
    for leaf in leaves(optimizer):
        if not isinstance(leaf, EmbeddingFusedOptimizer) or leaf.params:
            continue
        weights = {memory_range(each): each for each in leaf._emb_module.split_embedding_weights()}
        weights.pop(None, None)
        for collection in _fused_collections(module):
            for name, param in collection.named_parameters():
                weight = weights.pop(memory_range(param), None)
                if weight is not None:
                    leaf.params[f"{table_name(name)}.weight"] = weight
                    leaf.param_groups[0]["params"].append(weight)


def _fused_collections(module: nn.Module) -> Iterator[nn.Module]:
    for each in module.modules():
        if isinstance(each, (FusedEmbeddingBagCollection, FusedEmbeddingCollection)):
            yield each


def _optimizer_of_parts(model: nn.Module) -> keyed.CombinedOptimizer:
    bare = bare_names(model)
    optimizers = []
    for path, module in _modules_with_optimizer(model):
        optimizer = _optimizer_of(module)
        optimizers.append((_key(bare(path), module, optimizer), optimizer))
    return keyed.CombinedOptimizer(optimizers)


def _modules_with_optimizer(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that have a fused optimizer, by path."""
    for name, child in module.named_children():
        own = f"{path}.{name}" if path else name
        found = getattr(child, "fused_optimizer", None)
        if isinstance(found, keyed.KeyedOptimizer) or isinstance(child, FusedOptimizerModule):
            yield own, child
        else:
            yield from _modules_with_optimizer(child, own)


def _key(path: str, module: nn.Module, optimizer: keyed.KeyedOptimizer) -> str:
    """Returns what to put before an optimizer's names of its tables, to make FQNs of them.

    torchrec's unsharded collections call them "<table>.weight" there.
    """
    named = dict(module.named_parameters())
    for holder in _HOLDERS:
        if optimizer.params and all(f"{holder}.{name}" in named for name in optimizer.params):
            return f"{path}.{holder}"
    return path


def _check_all_tables_listed(model: nn.Module, optimizer: keyed.KeyedOptimizer) -> None:
    """Raises if a fused collection has a table that is not the one in the optimizer.

    Otherwise it would be taken for an unfused one, or its weights would stand still.
    """
    params = optimizer.params
    is_listed = memory_of(params.values())
    bare = bare_names(model)
    for path, collection in model.named_modules():
        if not isinstance(collection, (FusedEmbeddingBagCollection, FusedEmbeddingCollection)):
            continue
        for name, param in collection.named_parameters():
            if param.is_meta or param.numel() == 0 or is_listed(param):
                continue
            fqn = bare(f"{path}.{name}".strip("."))
            if table_name(name) in map(table_name, params):
                raise ValueError(
                    f"{fqn} is not the table that FBGEMM trains: was the model copied, moved or "
                    "cast after its embeddings were fused? Do that first, then fuse"
                )
            raise ValueError(
                f"model.fused_optimizer has no {fqn}, which is a fused table: have it combine the "
                "fused_optimizer of all fused modules (torchrec.optim.keyed.CombinedOptimizer), or "
                "delete it, and they are found"
            )
