"""What all configuration classes share: strict numbers, frozen fields, groups of alternatives."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _refuse_text(value: Any) -> Any:
    """Explains why a value that looks like a number in YAML may be text."""
    if isinstance(value, str):
        raise ValueError(
            f"expected a number, found the text {value!r}. Remove quotes if there are any; in "
            "scientific notation YAML 1.1 wants a decimal point and a signed exponent: write "
            "1.0e-3, not 1e-3"
        )
    return value


# Strict: no booleans, no text, no fraction where a whole number belongs. A whole number is a float.
NonNegative = Annotated[
    float, Field(strict=True, ge=0, allow_inf_nan=False), BeforeValidator(_refuse_text)
]
Positive = Annotated[
    float, Field(strict=True, gt=0, allow_inf_nan=False), BeforeValidator(_refuse_text)
]
Share = Annotated[float, Field(strict=True, ge=0, le=1), BeforeValidator(_refuse_text)]
Fraction = Annotated[float, Field(strict=True, ge=0, lt=1), BeforeValidator(_refuse_text)]
Whole = Annotated[int, Field(strict=True), BeforeValidator(_refuse_text)]
Step = Annotated[int, Field(strict=True, ge=0), BeforeValidator(_refuse_text)]
NumSteps = Annotated[int, Field(strict=True, ge=1), BeforeValidator(_refuse_text)]


class BaseConfig(BaseModel):
    """What all configuration classes share.

    Instances are frozen, unknown fields are refused, and a known field given as None counts as not
    given. A subclass names its groups of alternatives in `exactly_one_of` and `at_most_one_of`;
    breaking such a rule is a `pydantic.ValidationError` that names all fields of the group.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    exactly_one_of: ClassVar[tuple[tuple[str, ...], ...]] = ()
    at_most_one_of: ClassVar[tuple[tuple[str, ...], ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {
            name: value
            for name, value in data.items()
            if value is not None or name not in cls.model_fields
        }

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
