"""Configuration from objects that are not ours: mappings, dataclasses, pydantic models.

The recap recommender has pydantic classes of its own, with the same fields; other programs keep
theirs in dataclasses, OmegaConf or plain dicts.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, RootModel, ValidationError

from recap_fast.config.base import BaseConfig
from recap_fast.config.dense import OptimizerConfig, RecapOptimizerConfig
from recap_fast.config.embeddings import EmbeddingOptimizerConfig
from recap_fast.config.rates import LearningRate

_Config = TypeVar("_Config", bound=BaseConfig)
_SECTION = "optimizer"  # what the section of dense parameters is called in a whole configuration
_RECAP_FIELDS = ("multi_task_learning_rates", "single_task_learning_rate")


def as_optimizer_config(
    config: Any, name: str = "optimizer_config"
) -> RecapOptimizerConfig | OptimizerConfig:
    """Returns a configuration of dense parameters, checked.

    Args:
        config: One of ours, which is returned as it is. Else a mapping, a dataclass or a pydantic
            model (1 or 2; whatever has `model_dump()` or `dict()`) with the same fields, nested in
            any mixture. With a field `multi_task_learning_rates` or `single_task_learning_rate`,
            even one that is None, it is read as a `RecapOptimizerConfig`, else as an
            `OptimizerConfig`. A field that is None counts as not given, known or not.
        name: What errors call it.

    Raises:
        TypeError: It is something else.
        ValueError: A field is unknown, missing or of a wrong value.
    """
    if isinstance(config, (RecapOptimizerConfig, OptimizerConfig)):
        return config
    fields = _fields_of(config, name, "a RecapOptimizerConfig, an OptimizerConfig")
    source = f"{name} ({kind_of(config)})"
    if fields.get(_SECTION) is not None:
        inside = f"config[{_SECTION!r}]" if hasattr(config, "keys") else f"config.{_SECTION}"
        raise ValueError(f"{source} has a section {_SECTION!r}: pass the section, {inside}")
    return _without_unknown_nulls(read_optimizer_config, fields, source)


def as_embedding_config(
    config: Any, name: str = "emb_optimizer_config"
) -> EmbeddingOptimizerConfig | None:
    """Returns a configuration of embedding tables, checked; None for None.

    Arguments and errors are those of `as_optimizer_config`.
    """
    return None if config is None else _read_as(EmbeddingOptimizerConfig, config, name)


def as_given_embedding_config(config: Any) -> EmbeddingOptimizerConfig:
    """As `as_embedding_config` where there must be one: None is a TypeError too."""
    return _read_as(EmbeddingOptimizerConfig, config, "emb_optimizer_config")


def as_learning_rate(config: Any, name: str = "learning_rate") -> LearningRate:
    """Returns a schedule, checked. Arguments and errors are those of `as_optimizer_config`."""
    return _read_as(LearningRate, config, name)


def read_optimizer_config(
    fields: Mapping[str, Any], source: str
) -> RecapOptimizerConfig | OptimizerConfig:
    """Returns the configuration of these fields; `source` is where errors say they are from.

    Raises:
        ValueError: A field is unknown, missing or of a wrong value.
    """
    if any(field in fields for field in _RECAP_FIELDS):
        has = f"has {' or '.join(_RECAP_FIELDS)}"
        return _validate(RecapOptimizerConfig, fields, source, f" as it {has}")
    has = f"has neither {' nor '.join(_RECAP_FIELDS)}"
    return _validate(OptimizerConfig, fields, source, f" as it {has}")


def _read_as(config_class: type[_Config], config: Any, name: str) -> _Config:
    if isinstance(config, config_class):
        return config
    fields = _fields_of(config, name, f"a recap_fast.config.{config_class.__name__}")

    def read(fields: Mapping[str, Any], source: str) -> _Config:
        return _validate(config_class, fields, source)

    return _without_unknown_nulls(read, fields, f"{name} ({kind_of(config)})")


def _validate(
    config_class: type[_Config], fields: Mapping[str, Any], source: str, why: str = ""
) -> _Config:
    try:
        return config_class.model_validate(fields)
    except ValidationError as error:
        raise ValueError(f"{source}, read as {config_class.__name__}{why}: {error}") from error


def _without_unknown_nulls(
    read: Callable[[Mapping[str, Any], str], _Config], fields: dict[str, Any], source: str
) -> _Config:
    """Reads fields; takes those out that are unknown to our classes, but None."""
    try:
        return read(fields, source)
    except ValueError as error:
        cause = error.__cause__
        if not isinstance(cause, ValidationError):
            raise
        unknown = [
            found["loc"]
            for found in cause.errors()
            if found["type"] == "extra_forbidden" and found["input"] is None
        ]
        if not unknown:
            raise
    for *path, last in unknown:
        owner: Any = fields
        for key in path:
            owner = owner[key]
        del owner[last]
    return read(fields, source)


def _fields_of(config: Any, name: str, expected: str) -> dict[str, Any]:
    fields = None if isinstance(config, type) else _plain(config)
    if not isinstance(fields, dict):
        raise TypeError(
            f"{name} must be {expected}, or a mapping, dataclass or pydantic model with the same "
            f"fields; found {'the class ' * isinstance(config, type)}{kind_of(config)}"
        )
    return fields


def _plain(value: Any) -> Any:
    """Returns a value as dicts and lists of plain values."""
    if isinstance(value, type):
        return value
    if dataclasses.is_dataclass(value):
        declared = dataclasses.fields(value)
        return {field.name: _plain(getattr(value, field.name)) for field in declared}
    if isinstance(value, Mapping) or (hasattr(value, "keys") and hasattr(value, "__getitem__")):
        return {key: _plain(value[key]) for key in value.keys()}  # noqa: SIM118
    if isinstance(value, BaseModel) and not _dumps_in_its_own_way(type(value)):
        # `model_dump` would leave out what a field's declared class lacks and the value's own has.
        names = [*type(value).model_fields, *(value.model_extra or ())]
        fields = {name: _plain(getattr(value, name)) for name in names}
        return fields["root"] if isinstance(value, RootModel) else fields
    for method in ("model_dump", "dict"):
        if callable(getattr(value, method, None)):
            return _plain(getattr(value, method)())
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_plain(item) for item in value]
    return value


def _dumps_in_its_own_way(model: type[BaseModel]) -> bool:
    decorated = bool(model.__pydantic_decorators__.model_serializers)
    return decorated or model.model_dump is not BaseModel.model_dump


def kind_of(value: Any) -> str:
    """Returns the class of a value with its module, but for those that Python has built in."""
    kind = value if isinstance(value, type) else type(value)
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return module + kind.__qualname__
