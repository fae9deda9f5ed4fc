"""Plain values: what JSON can hold and give back as it was."""

from __future__ import annotations

from typing import Any

import torch

_SCALARS = (type(None), bool, int, float, str)
# Python's own parser of JSON takes some 1,000 levels, and 4,300 digits.
_MOST_LEVELS = 100
_MOST_BITS = 13_000


def check_plain(value: Any, name: str, levels: int = _MOST_LEVELS) -> None:
    """Raises unless JSON gives `value` back as it is.

    Args:
        value: None, a bool, int, float, str, or lists and dicts with str keys of such.
        name: what errors call it.
        levels: how deep lists and dicts may be nested.

    Raises:
        TypeError: It is something else.
        ValueError: It is nested too deeply, or an int is too large.
    """
    if type(value) is int and value.bit_length() > _MOST_BITS:
        raise ValueError(f"{name} is an int of {value.bit_length()} bits: more than {_MOST_BITS}")
    if type(value) in _SCALARS:
        return
    if levels == 0 and type(value) in (list, dict):
        raise ValueError(f"{name[:80]}... is nested in more than {_MOST_LEVELS} lists and dicts")
    if type(value) is list:
        for index, item in enumerate(value):
            check_plain(item, f"{name}[{index}]", levels - 1)
        return
    if type(value) is not dict:
        raise TypeError(
            f"{name} is a {type(value).__name__}: a checkpoint holds None, bool, int, float, str, "
            "and lists and dicts of these"
        )
    for key, item in value.items():
        if type(key) is not str:
            raise TypeError(f"{name} has the key {key!r}: the keys of a dict must be str")
        check_plain(item, f"{name}[{key!r}]", levels - 1)


def option_to_plain(value: Any, name: str) -> Any:
    """Returns an option of a param group as a plain value: a tuple as a list, a tensor as a number.

    Raises:
        TypeError: it is something else; the message says `name`.
    """
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, tuple):
        return [option_to_plain(item, name) for item in value]
    check_plain(value, name)
    return value
