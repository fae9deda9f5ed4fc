"""Configuration from YAML files."""

from __future__ import annotations

import contextlib
import getpass
import os
import string
from collections.abc import Sequence
from typing import Any, Final

import yaml
from pydantic import ValidationError

from recap_fast.config.convert import read_optimizer_config
from recap_fast.config.dense import OptimizerConfig, RecapOptimizerConfig
from recap_fast.config.yaml_text import Document, shorten

_MOST_BYTES: Final = 4 << 20
_MOST_ERRORS: Final = 10
_MOST_SECTIONS: Final = 20
_LONGEST_LINE: Final = 500  # characters of an error


def load_optimizer_config(
    path: str | os.PathLike[str], section: str = "optimizer"
) -> RecapOptimizerConfig | OptimizerConfig:
    """Reads the optimizer's section of a YAML file.

    `${VAR}` is first replaced from the environment. A section with `multi_task_learning_rates` or
    `single_task_learning_rate` is a `RecapOptimizerConfig`, any other an `OptimizerConfig`.

    Args:
        path: The YAML file, in UTF-8: at most 4 MiB, of 100,000 values with aliases written out,
            in at most 50 others.
        section: The top-level key that holds the configuration.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not YAML, has no such section, or the section is not valid; the message
            names file, line and section.
    """
    try:
        document = Document(_substitute_environment(_read(path)), os.fspath(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {_shorten_lines(str(error))}") from error
    except RecursionError:
        raise ValueError(f"{path} is not valid YAML: it is nested too deeply") from None

    def at(*place: Any) -> str:
        return f"{path}, line {document.line(place)}"

    sections = document.value
    if not isinstance(sections, dict):
        raise ValueError(f"{at()}: it must be a mapping with a section {section!r}")
    if section not in sections:
        present = [shorten(repr(name)) for name in list(sections)[:_MOST_SECTIONS]]
        more = len(sections) - len(present)
        raise ValueError(
            f"{at()}: it has no section {section!r}; sections present: "
            f"{', '.join(present) or 'none'}{f' and {more} more' if more else ''}"
        )
    content = sections[section]
    if not isinstance(content, dict):
        raise ValueError(
            f"{at(section)}: section {section!r} must be a mapping, found {type(content).__name__}"
        )
    try:
        return read_optimizer_config(content, f"section {section!r}")
    except ValueError as error:
        places = _places(error)
        first = at(section, *(places[0] if places else ()))
        raise ValueError(f"{first}: {_shorten_errors(str(error), len(places))}") from error


def _read(path: str | os.PathLike[str]) -> str:
    with open(path, "rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ValueError(f"{path} is no configuration: it has more than {_MOST_BYTES} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: it is not UTF-8: {error.reason} at byte {error.start}"
        ) from error


def _substitute_environment(text: str) -> str:
    """Replaces `${VAR}` from the environment; an unknown name stays as it is."""
    variables = dict(os.environ)
    with contextlib.suppress(KeyError, OSError):  # containers run under ids without a user name
        variables["USER"] = getpass.getuser()
    return string.Template(text).safe_substitute(variables)


def _places(error: ValueError) -> list[Sequence[Any]]:
    """Where in a section the errors are that pydantic found."""
    if not isinstance(error.__cause__, ValidationError):
        return []
    return [found["loc"] for found in error.__cause__.errors(include_url=False)]


def _shorten_errors(text: str, count: int) -> str:
    """Cuts what pydantic says, two or three lines for each error after a first line."""
    lines = text.splitlines()
    starts = [number for number, line in enumerate(lines) if number and line[:1] != " "]
    if count > _MOST_ERRORS and len(starts) > _MOST_ERRORS:
        lines = [*lines[: starts[_MOST_ERRORS]], f"and {count - _MOST_ERRORS} more errors"]
    return _shorten_lines("\n".join(lines))


def _shorten_lines(text: str) -> str:
    return "\n".join(shorten(line, _LONGEST_LINE) for line in text.splitlines())
