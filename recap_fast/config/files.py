"""Configuration from YAML files."""

from __future__ import annotations

import contextlib
import getpass
import itertools
import math
import os
import string
from pathlib import Path

import yaml

from recap_fast.config.convert import read_optimizer_config
from recap_fast.config.dense import OptimizerConfig, RecapOptimizerConfig

# More than any configuration has; aliases of aliases make billions of nodes of a few lines.
_MAX_NODES = 100_000


class _Loader(yaml.SafeLoader):
    """A SafeLoader that refuses a key given twice, of which YAML would silently keep the last.

    It also refuses aliases that would make more than `_MAX_NODES` nodes, or one that contains
    itself.
    """

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _expanded_size(node, {}) > _MAX_NODES:
            raise yaml.MarkedYAMLError(
                problem=f"its aliases stand for more than {_MAX_NODES} nodes",
                problem_mark=node.start_mark,
            )
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return node


def _expanded_size(node: yaml.Node, sizes: dict[int, float]) -> float:
    """Returns how many nodes there are once every alias is written out; infinity: no end."""
    if id(node) in sizes:
        return sizes[id(node)]
    sizes[id(node)] = math.inf  # as long as it is being counted, it is inside itself
    children = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        children = itertools.chain.from_iterable(node.value)
    sizes[id(node)] = 1 + sum(_expanded_size(child, sizes) for child in children)
    return sizes[id(node)]


def _substitute_environment(text: str) -> str:
    """Replaces `${VAR}` from the environment; an unknown name stays as it is."""
    variables = dict(os.environ)
    with contextlib.suppress(KeyError, OSError):  # containers run under ids without a user name
        variables["USER"] = getpass.getuser()
    return string.Template(text).safe_substitute(variables)


def load_optimizer_config(
    path: str | os.PathLike[str], section: str = "optimizer"
) -> RecapOptimizerConfig | OptimizerConfig:
    """Reads the optimizer's section of a YAML file.

    `${VAR}` is first replaced from the environment. A section with `multi_task_learning_rates` or
    `single_task_learning_rate` is a `RecapOptimizerConfig`, any other an `OptimizerConfig`.

    Args:
        path: The YAML file.
        section: The top-level key that holds the configuration.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not YAML, has no such section, or the section is not valid; the message
            names file and section.
    """
    text = _substitute_environment(Path(path).read_text(encoding="utf-8"))
    try:
        document = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path} must be a mapping with a section {section!r}")
    if section not in document:
        present = ", ".join(map(repr, document)) or "none"
        raise ValueError(f"{path} has no section {section!r}; sections present: {present}")
    content = document[section]
    if not isinstance(content, dict):
        raise ValueError(
            f"section {section!r} of {path} must be a mapping, found {type(content).__name__}"
        )

    return read_optimizer_config(content, f"section {section!r} of {path}")
