"""Sorts a model's parameters into the param groups of its optimizer.

The rules are those of the recap recommender: one group per task tower, one for the backbone, one
for embedding tables that are not fused. What it lets pass in silence is an error here: the groups
that a configuration has rates for and those that the model has must be the same.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from recap_fast.config import (
    EmbeddingOptimizerConfig,
    LearningRate,
    MultiTaskLearningRates,
    OptimizerConfig,
    RecapOptimizerConfig,
    as_embedding_config,
    as_optimizer_config,
)
from recap_fast.groups.fused_memory import memory_of, memory_range
from recap_fast.groups.group import ALL_PARAMS, BACKBONE, SINGLE_TASK, DenseGroup, sanitize
from recap_fast.groups.options import apply_group_options
from recap_fast.groups.unfused_tables import (
    DENSE_EMBEDDINGS,
    check_embedding_config,
    is_configured,
    table_groups,
)
from recap_fast.names import (
    TABLES,
    bare_names,
    is_table,
    some,
    table_name,
    unused_name,
)

logger = logging.getLogger("recap_fast")

_Parameters = dict[str, nn.Parameter]
# Those that a parameter is in, from the outermost on, but for wrappers; by its name.
_Modules = Mapping[str, list[str]]


def group_parameters(
    model: nn.Module,
    optimizer_config: RecapOptimizerConfig | OptimizerConfig,
    emb_optimizer_config: EmbeddingOptimizerConfig | None = None,
    fused_params: Mapping[str, torch.Tensor] | None = None,
) -> list[DenseGroup]:
    """Sorts the parameters that dense optimizers update into groups.

    With `multi_task_learning_rates`, in this order:

    * one group per task, in the order of the configuration: the parameters below any module called
      `sanitize(task)`, embedding tables included;
    * the backbone: all others, except
    * the dense embeddings: the others with "embedding_bags" in their name, in a group of their own
      for each schedule and algorithm.

    With `single_task_learning_rate`, and with an `OptimizerConfig`, one group of everything,
    unfused embedding tables included.

    A table of which `emb_optimizer_config` says more than the common rate is in a group of dense
    embeddings wherever it is in the model.

    Where the configuration's `groups` has patterns, the parameters that one of them matches are in
    a group of their own, after the one that they would be in (see `config.GroupOptions`).

    Names count without what wrappers add to them ("module.", "_orig_mod." and the like), so a tower
    at the top level of a model is found, wrapped or not; the original finds it in a wrapped model
    only. Frozen parameters stay in their groups, as in the original. Parameters that are updated
    during the backward pass are in no group. A parameter with two names is in its group once, under
    the first; a warning names both.

    Args:
        model: The model, wrapped or not (DDP, torch.compile, torchrec's model parallel).
        optimizer_config: Algorithms and learning rates of the dense groups; or what
            `config.as_optimizer_config` takes.
        emb_optimizer_config: The learning rates of embedding tables, fused or dense; or what
            `config.as_embedding_config` takes.
        fused_params: What the model's fused optimizer updates, by name without wrappers; empty on a
            rank that holds no shard. None: there is no fused optimizer.

    Raises:
        TypeError: A configuration is of a class that cannot be read.
        ValueError: Model and configuration do not fit; the message names parameters and fields.
    """
    optimizer_config = as_optimizer_config(optimizer_config)
    emb_optimizer_config = as_embedding_config(emb_optimizer_config)
    bare = bare_names(model)
    dense, updated_in_backward = _split(model, bare, fused_params or {})
    paths = {name: bare(name) for name in (*dense, *updated_in_backward)}
    trains_in_backward = bool(fused_params or updated_in_backward)
    if not trains_in_backward and not any(param.requires_grad for param in dense.values()):
        found = f"frozen ones only: {some(dense)}" if dense else "no parameters at all"
        raise ValueError(f"the model has no trainable parameter; found {found}")
    if fused_params is not None and emb_optimizer_config is None:
        # On a rank without a shard, torchrec lists the tables as updated in backward all the same.
        fused = fused_params or [name for name in updated_in_backward if TABLES in name]
        if fused:
            raise ValueError(
                f"the model has a fused optimizer (of {some(fused)}) but no learning rate for it: "
                "pass emb_optimizer_config with a learning_rate"
            )
    if emb_optimizer_config is not None:
        check_embedding_config(emb_optimizer_config, [*dense, *updated_in_backward], fused_params)

    if isinstance(optimizer_config, OptimizerConfig):
        section: Any
        _, section = optimizer_config.algorithm
        rate = optimizer_config.learning_rate or LearningRate(constant=section.lr)
        groups = _groups_of_all(ALL_PARAMS, dense, rate, emb_optimizer_config)
    elif optimizer_config.single_task_learning_rate is not None:
        rate = optimizer_config.single_task_learning_rate
        groups = _groups_of_all(SINGLE_TASK, dense, rate, emb_optimizer_config)
    else:
        rates = optimizer_config.multi_task_learning_rates
        assert rates is not None, "a configuration has exactly one of the two"
        modules = {name: path.split(".")[:-1] for name, path in paths.items()}
        _check_towers(rates, dense, updated_in_backward, modules)
        groups = _multi_task_groups(dense, rates, emb_optimizer_config, modules)

    dense_embeddings = any(group.role == "dense_embeddings" for group in groups)
    if emb_optimizer_config is not None and fused_params is None and not dense_embeddings:
        if any(TABLES in name for name in dense):
            raise ValueError(
                "emb_optimizer_config is given, but nothing uses it: the model has no fused "
                "optimizer and no group of dense embeddings, only "
                f"{', '.join(group.name for group in groups)}. Leave it out, or fuse the tables "
                "first (recap_fast.embeddings.fuse_embeddings)"
            )
        logger.warning("emb_optimizer_config has no effect: the model has no tables")
    return apply_group_options(
        groups,
        optimizer_config,
        {name: paths[name] for name in dense},
        [paths[name] for name in updated_in_backward],
    )


def _split(
    model: nn.Module, bare: Callable[[str], str], fused_params: Mapping[str, torch.Tensor]
) -> tuple[_Parameters, _Parameters]:
    """Returns the parameters of dense optimizers and those that are updated during backward.

    A parameter with several names is there under each of them.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    # A fused table may be listed as a parameter that is a view of what the optimizer updates.
    shares_memory = memory_of(fused_params.values())
    fused_ids = {id(tensor) for tensor in fused_params.values()}
    for name, param in named.items():
        # A name alone proves nothing: an optimizer may call a table "<table>.weight".
        by_name = TABLES in name or memory_range(param) is None
        if shares_memory(param) or (by_name and {name, bare(name)} & fused_params.keys()):
            fused_ids.add(id(param))
    own_ids = {id(p) for p in named.values() if getattr(p, "_in_backward_optimizers", None)}
    unscheduled = [
        name
        for name, param in named.items()
        if id(param) in own_ids - fused_ids and param.numel() > 0  # not a shard of another rank
    ]
    if unscheduled:
        logger.warning(
            "%s are updated in the backward pass by optimizers of their own, at rates that no "
            "schedule sets",
            some(unscheduled),
        )
    dense: dict[str, nn.Parameter] = {}
    updated_in_backward: dict[str, nn.Parameter] = {}
    for name, param in named.items():
        is_dense = id(param) not in fused_ids | own_ids
        (dense if is_dense else updated_in_backward)[name] = param
    return dense, updated_in_backward


def _check_towers(
    rates: MultiTaskLearningRates,
    dense: _Parameters,
    updated_in_backward: _Parameters,
    modules: _Modules,
) -> None:
    """Raises if a task has no parameters, or shares its module name with another task."""
    module_names = dict.fromkeys(module for name in dense for module in modules[name])
    tasks: dict[str, str] = {}
    for task in rates.tower_learning_rates:
        tower = sanitize(task)
        if tower in tasks:
            raise ValueError(
                f"tower_learning_rates: the tasks {tasks[tower]!r} and {task!r} have the same "
                f"module name, {tower!r}; rename one of them"
            )
        tasks[tower] = task
        if tower in module_names:
            continue
        fused = [name for name in updated_in_backward if tower in modules[name]]
        if fused:
            raise ValueError(
                f"tower_learning_rates: all parameters of the task {task!r} are updated during the "
                f"backward pass ({some(fused)}); they have no learning rate here, remove it"
            )
        close = difflib.get_close_matches(tower, module_names, n=1)
        hint = f"did you mean {some(close)}?" if close else f"there are {some(module_names, 20)}"
        raise ValueError(
            f"tower_learning_rates: no parameter is in a module called {tower!r} (task {task!r}); "
            + hint
        )


def _multi_task_groups(
    dense: _Parameters,
    rates: MultiTaskLearningRates,
    emb_optimizer_config: EmbeddingOptimizerConfig | None,
    modules: _Modules,
) -> list[DenseGroup]:
    towers = rates.tower_learning_rates
    backbone_name = unused_name(BACKBONE, towers)
    embeddings_name = unused_name(DENSE_EMBEDDINGS, towers)
    group_of: dict[str, str] = {}
    tables = _configured(dense, emb_optimizer_config)
    for name in dense:
        if name in tables:
            group_of[name] = embeddings_name
            continue
        tasks = [task for task in towers if sanitize(task) in modules[name]]
        if len(tasks) > 1:
            raise ValueError(f"the parameter {name!r} matches several tasks: {some(tasks)}")
        rest = embeddings_name if TABLES in name else backbone_name
        group_of[name] = tasks[0] if tasks else rest
    members = _members(dense, group_of)

    empty = [task for task in towers if task not in members]
    if empty:
        configured = [name for name in tables if sanitize(empty[0]) in modules[name]]
        why = "those of another group, under an earlier name"
        if configured:
            why = f"tables that emb_optimizer_config configures ({some(configured)})"
        raise ValueError(
            f"tower_learning_rates: all parameters of the task {empty[0]!r} are {why}; remove its "
            "rate"
        )
    groups = [DenseGroup(task, "tower", members[task], rate) for task, rate in towers.items()]
    backbone = members.get(backbone_name)
    if backbone and rates.backbone_learning_rate is None:
        raise ValueError(
            f"backbone_learning_rate is not set, but {some(backbone)} are in no tower of "
            f"tower_learning_rates ({some(towers, 20)})"
        )
    if rates.backbone_learning_rate is not None:
        if not backbone:
            raise ValueError(
                "backbone_learning_rate is set, but the model has no backbone: every parameter is "
                "in a tower or an embedding table"
            )
        groups.append(DenseGroup(backbone_name, "backbone", backbone, rates.backbone_learning_rate))
    return groups + _table_groups(members.get(embeddings_name, {}), emb_optimizer_config, towers)


def _groups_of_all(
    name: str,
    dense: _Parameters,
    rate: LearningRate,
    emb_optimizer_config: EmbeddingOptimizerConfig | None,
) -> list[DenseGroup]:
    embeddings_name = unused_name(DENSE_EMBEDDINGS, [name])
    tables = _configured(dense, emb_optimizer_config)
    group_of = {each: embeddings_name if each in tables else name for each in dense}
    members = _members(dense, group_of)
    if name not in members:
        raise ValueError(
            f"the group {name!r} has a learning rate but no parameters: all of the model's are "
            "updated during the backward pass"
            + (" or tables that emb_optimizer_config configures" if tables else "")
        )
    return [
        DenseGroup(name, "all", members[name], rate),
        *_table_groups(members.get(embeddings_name, {}), emb_optimizer_config, [name]),
    ]


def _configured(
    dense: _Parameters, emb_optimizer_config: EmbeddingOptimizerConfig | None
) -> set[str]:
    """The names of unfused tables that train as `emb_optimizer_config` says, wherever they are."""
    if emb_optimizer_config is None:
        return set()
    tables = filter(is_table, dense)
    return {name for name in tables if is_configured(emb_optimizer_config, table_name(name))}


def _table_groups(
    tables: _Parameters,
    emb_optimizer_config: EmbeddingOptimizerConfig | None,
    taken: Iterable[str],
) -> list[DenseGroup]:
    return [
        DenseGroup(
            unused_name(group.name, taken),
            "dense_embeddings",
            group.params,
            group.learning_rate,
            group.algorithm,
            group.hyperparameters,
        )
        for group in table_groups(tables, emb_optimizer_config)
    ]


def _members(dense: _Parameters, group_of: Mapping[str, str]) -> dict[str, _Parameters]:
    """Returns the parameters of each group, every one of them once, under its first name."""
    members: dict[str, _Parameters] = {}
    first_names: dict[int, str] = {}
    for name, param in dense.items():
        group = group_of[name]
        first = first_names.setdefault(id(param), name)
        if first == name:
            members.setdefault(group, {})[name] = param
        else:
            other = f", not {group!r}," if group != group_of[first] else ""
            logger.warning(
                "%r and %r are the same parameter; the group %r%s has it under the first name",
                first,
                name,
                group_of[first],
                other,
            )
    return members
