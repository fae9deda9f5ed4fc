"""Algorithm, hyperparameters and schedule of each group of dense parameters.

They are common to all groups, but for what the configuration's `groups` says of some: of a group by
its name, or of parameters by a pattern, which then become a group of their own.
`recap_fast.config.GroupOptions` has the rules.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from recap_fast.config import (
    GroupOptions,
    LearningRate,
    OptimizerConfig,
    RecapOptimizerConfig,
)
from recap_fast.names import some, unused_name

if TYPE_CHECKING:
    from recap_fast.groups.group import DenseGroup

_FIELD = "optimizer_config.groups"


def apply_group_options(
    groups: Sequence[DenseGroup],
    optimizer_config: RecapOptimizerConfig | OptimizerConfig,
    fqns: Mapping[str, str],
    updated_in_backward: Iterable[str] = (),
) -> list[DenseGroup]:
    """Splits groups where a pattern says so, and gives each its options.

    Groups of dense embeddings stay as they are.

    Args:
        groups: All groups of the model, with the schedules of the configuration.
        optimizer_config: The common algorithm, and what is different for some.
        fqns: What a pattern is searched for in: names without wrappers, by the names in `groups`.
        updated_in_backward: FQNs of the other parameters, for errors.

    Returns:
        The groups in their order; what was split off one follows it, in the order of the entries.
        A group of which nothing is left is not there.

    Raises:
        ValueError: An entry is for no group or matches no parameter; the message names it.
    """
    dense = [group for group in groups if group.role != "dense_embeddings"]
    entries = optimizer_config.groups
    patterns = {key: re.compile(entry.pattern) for key, entry in entries.items() if entry.pattern}
    _check_names([key for key in entries if key not in patterns], [group.name for group in dense])

    taken_by = {
        name: next((key for key, pattern in patterns.items() if pattern.search(fqns[name])), "")
        for group in dense
        for name in group.params
    }
    for key, pattern in patterns.items():
        if key not in taken_by.values():
            tables = [name for group in groups if group not in dense for name in group.params]
            others = [fqns.get(name, name) for name in (*tables, *updated_in_backward)]
            _raise_unmatched(
                key, pattern, {fqns[name]: by for name, by in taken_by.items()}, others
            )

    names = {group.name for group in groups}
    result = []
    for group in groups:
        if group.role == "dense_embeddings":
            result.append(group)
            continue
        for key in ("", *patterns):
            params = {name: param for name, param in group.params.items() if taken_by[name] == key}
            if not params:
                continue
            name = unused_name(f"{group.name}.{key}", names) if key else group.name
            names.add(name)
            own = [entries.get(group.name) if group.name not in patterns else None]
            own.append(entries[key] if key else None)
            options = _options([each for each in own if each], optimizer_config, group)
            result.append(dataclasses.replace(group, name=name, params=params, **options))
    return result


def _options(
    entries: Sequence[GroupOptions],
    config: RecapOptimizerConfig | OptimizerConfig,
    group: DenseGroup,
) -> dict[str, Any]:
    """Returns what the last of the entries has, or else the one before it, or all groups."""
    section: Any  # its `lr` only in an OptimizerConfig
    algorithm, section = config.algorithm
    has_own = False
    for entry in entries:
        has_own = entry.algorithm is not None
        algorithm, section = entry.algorithm or (algorithm, section)
    deciding = entries[-1:] if has_own else entries

    hyperparameters = section.hyperparameters
    hyperparameters["weight_decay"] *= math.prod(e.weight_decay_multiplier for e in deciding)
    rate = group.learning_rate
    if isinstance(config, OptimizerConfig) and config.learning_rate is None:
        rate = LearningRate(constant=section.lr)
        entries = deciding
    return {
        "algorithm": algorithm,
        "hyperparameters": hyperparameters,
        "formats": section.formats,
        "learning_rate": rate.times(math.prod(entry.lr_multiplier for entry in entries)),
    }


def _check_names(keys: Iterable[str], groups: Sequence[str]) -> None:
    for key in keys:
        if key in groups:
            continue
        close = difflib.get_close_matches(key, groups, n=1)
        hint = f"did you mean {some(close)}?" if close else f"there are {some(groups, 20)}."
        raise ValueError(
            f"{_FIELD}: there is no group {key!r} of dense parameters; {hint} Give the entry a "
            "pattern to choose parameters by their names"
        )


def _raise_unmatched(
    key: str, pattern: re.Pattern[str], taken_by: Mapping[str, str], others: Sequence[str]
) -> None:
    matches = [fqn for fqn in taken_by if pattern.search(fqn)]
    elsewhere = [fqn for fqn in others if pattern.search(fqn)]
    if matches:
        found = f"{some(matches)} went to the entry {taken_by[matches[0]]!r}, which comes first"
    elif elsewhere:
        found = f"it only matches {some(elsewhere)}, which emb_optimizer_config configures"
    else:
        found = f"there are {some(taken_by, 20)}"
    raise ValueError(
        f"{_FIELD}: the pattern {pattern.pattern!r} of {key!r} is left without a parameter; {found}"
    )
