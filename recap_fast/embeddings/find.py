"""Finds the fused optimizer of a model, wrapped or not."""

from __future__ import annotations

from torch import nn
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.optim import keyed
from torchrec.optim.fused import FusedOptimizerModule

from recap_fast.names import WRAPPER_SEGMENTS


def find_fused_optimizer(model: nn.Module) -> keyed.KeyedOptimizer | None:
    """Returns the `fused_optimizer` of a model or of what it wraps; None if there is none.

    It may have no parameters, on a rank of torchrec's model parallel that holds no table. One that
    combines no optimizers at all counts as none, as in the original.

    Raises:
        TypeError: If `fused_optimizer` is not a `KeyedOptimizer`.
        ValueError: If the model has fused tables that its `fused_optimizer` does not have.
    """
    owner: nn.Module | None = model
    while owner is not None and getattr(owner, "fused_optimizer", None) is None:
        owner = _wrapped_module(owner)
    if owner is None:
        for path, module in model.named_modules():
            if isinstance(module, FusedOptimizerModule):
                raise ValueError(
                    f"{path or 'the model'} is a {type(module).__name__}, but the model has no "
                    "fused_optimizer through which to set its learning rate: set it, or use "
                    "recap_fast.embeddings.fuse_embeddings on the outermost unwrapped model"
                )
        return None

    optimizer = owner.fused_optimizer
    if not isinstance(optimizer, keyed.KeyedOptimizer):
        raise TypeError(
            "model.fused_optimizer must be a torchrec.optim.keyed.KeyedOptimizer, "
            f"found {type(optimizer).__name__}"
        )
    if isinstance(optimizer, keyed.CombinedOptimizer):
        is_empty = not optimizer.optimizers
    else:
        is_empty = not optimizer.params
    if is_empty:
        return None
    _check_all_tables_listed(owner, optimizer)
    return optimizer


def _check_all_tables_listed(owner: nn.Module, optimizer: keyed.KeyedOptimizer) -> None:
    """Raises if a fused collection has a table that is not the one in the optimizer.

    Otherwise it would be taken for an unfused one, or its weights would stand still.
    """
    for path, collection in owner.named_modules():
        if not isinstance(collection, FusedEmbeddingBagCollection):
            continue
        bare = [part for part in path.split(".") if part not in WRAPPER_SEGMENTS]
        for name, bag in collection.embedding_bags.items():
            fqn = ".".join([*bare, "embedding_bags", name, "weight"])
            listed = optimizer.params.get(fqn)
            if listed is None:
                raise ValueError(
                    f"model.fused_optimizer has no {fqn}, which is a fused table: make it with "
                    "recap_fast.embeddings.fuse_embeddings"
                )
            if listed.data_ptr() != bag.weight.data_ptr():
                raise ValueError(
                    f"{fqn} is not the table that FBGEMM trains: was the model copied, moved or "
                    "cast after its embeddings were fused? Do that first, then fuse"
                )


def _wrapped_module(module: nn.Module) -> nn.Module | None:
    """Returns what a wrapper (DDP, torch.compile, model parallel) wraps; None for other modules."""
    children = dict(module.named_children())
    if len(children) == 1:
        ((name, child),) = children.items()
        if name == "module" or name in WRAPPER_SEGMENTS:
            return child
    return None
