"""Embedding tables on FBGEMM's kernels, which update them during the backward pass.

`fuse_embeddings` replaces the `EmbeddingBagCollection`s of a model by torchrec's
`FusedEmbeddingBagCollection`s. What follows from an update during the backward pass:

* the tables' gradients are never stored: clipping, accumulation over several backward passes and
  `zero_grad` do not reach them;
* a `GradScaler` scales the loss, and with it the update of the tables;
* DDP does not reduce the tables' gradients: to train across processes, shard the unfused model
  with torchrec's `DistributedModelParallel`, which has a `fused_optimizer` of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from recap_fast.config import EmbeddingOptimizerConfig
from recap_fast.grouping import WRAPPER_SEGMENTS
from recap_fast.schedules import compute_lr

try:
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
    from torchrec.modules.embedding_modules import EmbeddingBagCollection
    from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
    from torchrec.optim import RowWiseAdagrad, keyed
    from torchrec.optim.fused import FusedOptimizerModule
except ImportError as error:
    raise ImportError(
        f"recap_fast.build_optimizer and recap_fast.embeddings need torchrec and FBGEMM ({error}): "
        "run `pip install torchrec`, or, without a GPU, `pip install fbgemm-gpu-cpu` and "
        "`pip install --no-deps torchrec`. recap_fast.optim works without them"
    ) from error

# How torchrec's FusedEmbeddingBagCollection names the algorithms of FBGEMM that it offers
# (torchrec/modules/fused_embedding_modules.py, convert_optimizer_type_and_kwargs).
_OPTIMIZER_TYPES = {
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rowwise_adagrad": RowWiseAdagrad,
    "adam": torch.optim.Adam,
}
# What FBGEMM accepts on the CPU, its EMA variant of row-wise Adagrad aside
# (fbgemm_gpu/split_table_batched_embeddings_ops_training.py, "is not supported in CPU mode").
_ON_CPU = ("sgd", "adagrad", "rowwise_adagrad")

# FBGEMM's names where they are not ours.
_RENAMED = {"beta_1": "beta1", "beta_2": "beta2"}
_WEIGHT_DECAY_MODES = {"l2": WeightDecayMode.L2, "decouple": WeightDecayMode.DECOUPLE}


def fuse_embeddings(
    model: nn.Module,
    emb_optimizer_config: EmbeddingOptimizerConfig,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Replaces the `EmbeddingBagCollection`s of a model, in place, by fused ones.

    Weights are copied, names of parameters stay, outputs are equal to float tolerance. Afterwards
    `model.fused_optimizer` is a `keyed.CombinedOptimizer` of all tables by FQN
    ("<path>.embedding_bags.<table>.weight"), where `build_optimizer` finds it. Subclasses of
    `EmbeddingBagCollection` and tables outside such a collection stay as they are.

    Do this when the model is on its device and has its dtype, before it is wrapped: the kernels'
    tables do not follow `model.to(...)`. torchrec's fused modules support neither `copy.deepcopy`
    nor pickling; `state_dict` works.

    Args:
        model: The model, not wrapped; its tables are float32, trainable, of a width that is a
            multiple of 4, and used nowhere else.
        emb_optimizer_config: The algorithm, and the rate to start with: `init_learning_rate`, or
            else what `learning_rate` gives for step 0. FBGEMM has sgd, adagrad and rowwise_adagrad
            on the CPU; torchrec's module offers adam on CUDA besides.
        device: Where the tables go; by default where they are.

    Returns:
        The model.

    Raises:
        ValueError: Something cannot be honoured; the message names it, and nothing was changed.
    """
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)) or any(
        name in WRAPPER_SEGMENTS for name, _ in model.named_children()
    ):
        raise ValueError(
            f"the model is wrapped in {type(model).__name__}: fuse its embeddings before that"
        )
    if hasattr(model, "fused_optimizer"):
        raise ValueError("the model has a fused_optimizer already: fuse its embeddings only once")
    collections = {
        path: module
        for path, module in model.named_modules()
        if type(module) is EmbeddingBagCollection
    }
    if not collections:
        raise ValueError("the model has no EmbeddingBagCollection to fuse")
    if "" in collections:
        raise ValueError(
            "the model is itself an EmbeddingBagCollection, which cannot be replaced in place: put "
            "it into a module"
        )
    tables = {
        f"{path}.embedding_bags.{name}.weight": bag.weight
        for path, collection in collections.items()
        for name, bag in collection.embedding_bags.items()
    }
    for name, table in tables.items():
        _check_table(name, table)
    _check_sole_names(model, tables)
    for path, collection in collections.items():
        _check_pooling_order(path, collection)
    device = torch.device(device) if device is not None else _common_device(tables)
    optimizer_type, optimizer_kwargs = _optimizer_arguments(emb_optimizer_config, device)

    fused = {
        path: _fused_copy(collection, optimizer_type, optimizer_kwargs, device)
        for path, collection in collections.items()
    }
    for path, collection in fused.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, collection)
    model.fused_optimizer = keyed.CombinedOptimizer(
        [
            (f"{path}.embedding_bags", collection.fused_optimizer())
            for path, collection in fused.items()
        ]
    )
    return model


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


def _check_table(name: str, table: nn.Parameter) -> None:
    if table.dtype != torch.float32:
        raise ValueError(
            f"{name} is {table.dtype}: torchrec's FusedEmbeddingBagCollection makes float32 tables "
            "only; set its data_type to FP32, or leave the collection unfused"
        )
    if table.shape[1] % 4 != 0:
        raise ValueError(
            f"{name} has the width {table.shape[1]}: FBGEMM needs an embedding_dim that is a "
            "multiple of 4"
        )
    if not table.requires_grad:
        raise ValueError(
            f"{name} is frozen (requires_grad=False), but a fused table always trains: leave the "
            "collection unfused"
        )
    if table.is_meta:
        raise ValueError(f"{name} is on the meta device, without weights: initialise it first")
    if getattr(table, "_in_backward_optimizers", None):
        raise ValueError(
            f"{name} is already updated by another optimizer in the backward pass "
            "(apply_optimizer_in_backward): choose one of the two"
        )


def _check_sole_names(model: nn.Module, tables: Mapping[str, nn.Parameter]) -> None:
    """Raises if a table is known by another name too: in another collection, or tied to a layer."""
    fqn_by_id = {id(table): name for name, table in tables.items()}
    for name, param in model.named_parameters(remove_duplicate=False):
        fqn = fqn_by_id.get(id(param), name)
        if fqn != name:
            raise ValueError(
                f"{fqn} and {name} are the same table: a fused table cannot be shared; leave the "
                "collection unfused"
            )


def _check_pooling_order(path: str, collection: EmbeddingBagCollection) -> None:
    """Raises if tables of one pooling type are not listed next to each other.

    torchrec's FusedEmbeddingBagCollection concatenates its outputs by pooling type, but labels them
    in the order of the tables.
    """
    seen: list[str] = []
    for config in collection.embedding_bag_configs():
        pooling = config.pooling.value
        if pooling in seen[:-1]:
            raise ValueError(
                f"{path}: table {config.name} with {pooling} pooling comes after tables with "
                f"{seen[-1]} pooling, and others with {pooling} before them; torchrec's "
                "FusedEmbeddingBagCollection would mix up their outputs: list the tables of each "
                "pooling type together, or put them into collections of their own"
            )
        if pooling not in seen:
            seen.append(pooling)


def _common_device(tables: Mapping[str, nn.Parameter]) -> torch.device:
    names: dict[torch.device, str] = {}
    for name, table in tables.items():
        names.setdefault(table.device, name)
    if len(names) > 1:
        found = ", ".join(f"{name} on {device}" for device, name in names.items())
        raise ValueError(f"the tables are on several devices ({found}): choose one with `device`")
    return next(iter(names))


def _optimizer_arguments(
    emb_optimizer_config: EmbeddingOptimizerConfig, device: torch.device
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Returns optimizer class and keyword arguments as FusedEmbeddingBagCollection takes them."""
    algorithm, section = emb_optimizer_config.algorithm
    if device.type == "cpu" and algorithm not in _ON_CPU:
        raise ValueError(
            f"emb_optimizer_config: FBGEMM has no {algorithm} on the CPU, only {', '.join(_ON_CPU)}"
        )
    if algorithm not in _OPTIMIZER_TYPES:
        raise ValueError(
            f"emb_optimizer_config: torchrec's FusedEmbeddingBagCollection has no {algorithm}, "
            f"only {', '.join(_OPTIMIZER_TYPES)}; torchrec's DistributedModelParallel has it"
        )
    kwargs = {
        _RENAMED.get(name, name): value
        for name, value in section.model_dump(exclude_none=True).items()
    }
    if device.type == "cpu" and kwargs.get("weight_decay"):
        raise ValueError(
            f"emb_optimizer_config: {algorithm}.weight_decay is {kwargs['weight_decay']}, but "
            "FBGEMM ignores it on the CPU: set it to 0"
        )
    if "weight_decay_mode" in kwargs:
        kwargs["weight_decay_mode"] = _WEIGHT_DECAY_MODES[kwargs["weight_decay_mode"]]

    kwargs["lr"] = emb_optimizer_config.init_learning_rate
    if kwargs["lr"] is None:
        if emb_optimizer_config.learning_rate is None:
            raise ValueError("emb_optimizer_config: set learning_rate or init_learning_rate")
        kwargs["lr"] = compute_lr(emb_optimizer_config.learning_rate, 0)
    return _OPTIMIZER_TYPES[algorithm], kwargs


def _fused_copy(
    collection: EmbeddingBagCollection,
    optimizer_type: type[torch.optim.Optimizer],
    optimizer_kwargs: dict[str, Any],
    device: torch.device,
) -> FusedEmbeddingBagCollection:
    # The constructor draws weights at random; the user's random numbers must not depend on that.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        fused = FusedEmbeddingBagCollection(
            collection.embedding_bag_configs(),
            optimizer_type=optimizer_type,
            optimizer_kwargs=optimizer_kwargs,
            is_weighted=collection.is_weighted(),
            device=device,
        )
    with torch.no_grad():
        for name, bag in collection.embedding_bags.items():
            fused.embedding_bags[name].weight.copy_(bag.weight)
    _list_tables_without_state(fused)
    return fused.train(collection.training)


def _list_tables_without_state(collection: FusedEmbeddingBagCollection) -> None:
    """Adds to the collection's optimizers the tables that torchrec leaves out: those with SGD.

    As in torchrec's model parallel, which lists them with an empty state.
    """
    tables_of_kernel: dict[Any, list[str]] = {}
    for config in collection.embedding_bag_configs():
        tables_of_kernel.setdefault((config.pooling, config.data_type), []).append(config.name)
    optimizers = [optimizer for _, optimizer in collection.fused_optimizer().optimizers]
    for optimizer, names in zip(optimizers, tables_of_kernel.values(), strict=True):
        for name in names:
            if f"{name}.weight" not in optimizer.params:
                weight = collection.embedding_bags[name].weight.detach()
                optimizer.params[f"{name}.weight"] = weight
                optimizer.state[weight] = {}
                optimizer.param_groups[0]["params"].append(weight)


from recap_fast.embeddings.sharded import set_table_optimizers  # noqa: E402
