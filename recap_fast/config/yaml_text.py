"""YAML as plain values, with the place of each; bounded, and with one kind of error."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Final

import yaml
from yaml.reader import ReaderError

# More than any configuration has. Aliases of aliases make billions of nodes of a few lines.
_MOST_NODES: Final = 100_000
_MOST_LEVELS: Final = 50
_MOST_DIGITS: Final = 300


class Document:
    """A text of YAML.

    Args:
        text: of one document.
        name: what errors call it.

    Attributes:
        value: what it stands for, of plain values; None if it is empty.

    Raises:
        yaml.YAMLError: It is not YAML, or one value is not what its tag says; the message names the
            line.
    """

    def __init__(self, text: str, name: str) -> None:
        try:
            loader = _Loader(text)
        except ReaderError as error:  # knows the position only
            line = text.count("\n", 0, error.position) + 1
            said = f"{name}, line {line}: unacceptable character {error.character:#06x}"
            raise yaml.YAMLError(said) from error
        loader.name = name
        try:
            self._root = loader.get_single_node()
            self.value: Any = None
            if self._root is not None:
                self.value = loader.construct_document(self._root)
        finally:
            loader.dispose()

    def line(self, path: Sequence[Any]) -> int:
        """Returns in which line something is, from 1.

        Args:
            path: keys and indices that lead there; those that lead nowhere are left out.
        """
        node, line = self._root, self._root.start_mark.line + 1 if self._root else 1
        for part in path:
            found = _child(node, part)
            if found is None:
                break
            node, line = found
        return line


class _Loader(yaml.SafeLoader):
    """A SafeLoader that refuses a key given twice, of which YAML would silently keep the last.

    It also refuses nodes in more than `_MOST_LEVELS` others, numbers of more than `_MOST_DIGITS`,
    and aliases that would make more than `_MOST_NODES` nodes, or one that contains itself.
    """

    _level = _count = 0

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _expanded_size(node, {}) > _MOST_NODES:
            raise _error(node, f"its aliases stand for more than {_MOST_NODES} nodes")
        return node

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._level += 1
        self._count += 1
        problem = ""
        if self._level > _MOST_LEVELS:
            problem = f"it is nested in more than {_MOST_LEVELS} others"
        elif self._count > _MOST_NODES:
            problem = f"there are more than {_MOST_NODES} nodes before it"
        if problem:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
        node = super().compose_node(parent, index)
        self._level -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise _error(key, f"the key {shorten(repr(key.value))} is given twice")
            seen.add(key.value)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        kind = node.tag.rpartition(":")[2]
        if kind in ("int", "float") and len(node.value) > _MOST_DIGITS:
            raise _error(node, f"it is a number of more than {_MOST_DIGITS} digits")
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except Exception as error:  # such as a KeyError for `!!bool x`
            said = f"{shorten(repr(node.value))} is no {kind}"
            # What Python says of a date is worth to be passed on.
            why = f": {error}" if isinstance(error, ValueError) and kind == "timestamp" else ""
            raise _error(node, said + why) from error


def shorten(text: str, most: int = 80) -> str:
    """Returns a text, cut to a length that does not fill a screen."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _error(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _expanded_size(node: yaml.Node, sizes: dict[int, float]) -> float:
    """Returns how many nodes there are once every alias is written out; infinity: no end."""
    if id(node) in sizes:
        return sizes[id(node)]
    sizes[id(node)] = math.inf  # as long as it is being counted, it is inside itself
    children: Any = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        children = itertools.chain.from_iterable(node.value)
    sizes[id(node)] = 1 + sum(_expanded_size(child, sizes) for child in children)
    return sizes[id(node)]


def _child(node: yaml.Node | None, part: Any) -> tuple[yaml.Node, int] | None:
    """What a key or an index leads to, and in which line; None if it is not there."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value == str(part):
                return value, key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        return node.value[part], node.value[part].start_mark.line + 1
    return None
