"""What all configuration classes share: strict numbers, frozen fields, groups of alternatives."""

from __future__ import annotations

import numbers
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _number(value: Any) -> Any:
    """Returns the number that a text spells, or that is numpy's; any other value as it is.

    YAML 1.1 reads 1e-3 as a text, since it wants 1.0e-3, and quotes are easily left around a value
    from the environment. Numbers of steps are easily computed by numpy.
    """
    if isinstance(value, numbers.Real) and not isinstance(value, (bool, int, float)):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"expected a number, found the text {value!r}") from None


def _whole_number(value: Any) -> Any:
    """Returns an int for a float without a fraction, such as YAML's 5.0e+3, and for such a text."""
    value = _number(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _dtype_name(value: Any) -> Any:
    """Returns the name of a `torch.dtype`, without importing torch; any other value as it is."""
    is_dtype = (type(value).__module__, type(value).__name__) == ("torch", "dtype")
    return str(value).removeprefix("torch.") if is_dtype else value


# Strict: no booleans, no fraction where a whole number belongs. A whole number is a float.
NonNegative = Annotated[
    float, Field(strict=True, ge=0, allow_inf_nan=False), BeforeValidator(_number)
]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False), BeforeValidator(_number)]
PositiveOrInfinite = Annotated[float, Field(strict=True, gt=0), BeforeValidator(_number)]
Share = Annotated[float, Field(strict=True, ge=0, le=1), BeforeValidator(_number)]
Fraction = Annotated[float, Field(strict=True, ge=0, lt=1), BeforeValidator(_number)]
Whole = Annotated[int, Field(strict=True), BeforeValidator(_whole_number)]
Step = Annotated[int, Field(strict=True, ge=0), BeforeValidator(_whole_number)]
NumSteps = Annotated[int, Field(strict=True, ge=1), BeforeValidator(_whole_number)]
Flag = Annotated[bool, Field(strict=True)]
Seed = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63), BeforeValidator(_whole_number)]
StateDtype = Annotated[
    Literal["float32", "bfloat16", "float16", "8bit"], BeforeValidator(_dtype_name)
]

# Two spellings of one idea: torch's names and those of the recap recommender.
_BETAS = ("beta_1", "beta_2")
_SPELLINGS = {"eps": "epsilon", "epsilon": "eps"}


class BaseConfig(BaseModel):
    """What all configuration classes share.

    Instances are frozen, unknown fields are refused, and a known field given as None counts as not
    given. Where a class has `betas`, `beta_1` and `beta_2` are taken too, and the other way round;
    so are `eps` and `epsilon`. A number may be a text that spells it, or one of numpy's.

    A subclass names its groups of alternatives in `exactly_one_of` and `at_most_one_of`; breaking
    such a rule is a `pydantic.ValidationError` that names all fields of the group.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    exactly_one_of: ClassVar[tuple[tuple[str, ...], ...]] = ()
    at_most_one_of: ClassVar[tuple[tuple[str, ...], ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _read(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = {*cls.model_fields}
        known |= {other for other, own in _SPELLINGS.items() if own in known}
        if known & {"betas", *_BETAS}:
            known |= {"betas", *_BETAS}
        # Of a name that is not known, the error is to say so.
        return cls._respell(
            {name: value for name, value in data.items() if value is not None or name not in known}
        )

    @classmethod
    def _respell(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Returns the fields under the names that this class has for them."""
        fields = cls.model_fields
        for other, own in _SPELLINGS.items():
            if own in fields and other not in fields and other in given:
                if own in given:
                    raise ValueError(f"{own} and {other} are the same: set one of them")
                given[own] = given.pop(other)
        single = [name for name in _BETAS if name in given]
        if "betas" in given and single:
            raise ValueError(f"betas and {single[0]} are the same: set one of them")
        if "betas" in given and "beta_1" in fields:
            betas = given["betas"]
            if not isinstance(betas, (list, tuple)) or len(betas) != 2:
                raise ValueError(f"betas must be two numbers, beta_1 and beta_2; found {betas!r}")
            del given["betas"]
            given |= dict(zip(_BETAS, betas, strict=True))
        elif single and "betas" in fields:
            defaults = dict(zip(_BETAS, fields["betas"].default, strict=True))
            given["betas"] = tuple(given.pop(name, defaults[name]) for name in _BETAS)
        return given

    @model_validator(mode="after")
    def _check_one_of(self) -> BaseConfig:
        for names in self.exactly_one_of:
            given = self._given(names)
            if not given:
                raise ValueError(
                    f"set exactly one of {', '.join(names)}; found none (null counts as not set)"
                )
            if len(given) > 1:
                raise ValueError(
                    f"set exactly one of {', '.join(names)}; found {' and '.join(given)}"
                )
        for names in self.at_most_one_of:
            given = self._given(names)
            if len(given) > 1:
                raise ValueError(
                    f"set at most one of {', '.join(names)}; found {' and '.join(given)}"
                )
        return self

    def _given(self, names: tuple[str, ...]) -> list[str]:
        return [name for name in names if getattr(self, name) is not None]

    def pretty_print(self) -> str:
        """Returns the configuration as YAML, in field order, for logs and files."""
        # Sorting would reorder the towers, and with them the optimizer's param groups.
        return yaml.safe_dump(self.model_dump(), sort_keys=False)
