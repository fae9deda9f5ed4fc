"""What the content of a manifest looks like: types, ranges, and what refers to what."""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from recap_fast.checkpoint import dcp_metadata

_FILE_NAME: Final = re.compile(r"\.metadata|__\d+_\d+\.distcp")  # as DCP calls them
_DTYPES: Final = frozenset(
    name for name, value in vars(torch).items() if isinstance(value, torch.dtype)
)


class Malformed(Exception):
    """A manifest is not as this module says; says where."""


def check(content: Any) -> None:
    """Checks the content of a manifest, of plain values from JSON.

    Raises:
        Malformed: It lacks something, or has something else than it should.
    """
    try:
        _Content.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part)[:80] for part in first["loc"]) or "its content"
        raise Malformed(f"{place}: {first['msg'][:200]}") from None


def _is_file_name(name: str) -> str:
    if not _FILE_NAME.fullmatch(name):
        raise ValueError("is not the name of a file of a checkpoint")
    return name


def _is_dtype(name: str) -> str:
    if name not in _DTYPES:
        raise ValueError("is not the name of a dtype of torch")
    return name


_Natural = Annotated[int, Field(ge=0, lt=2**63)]
_Positive = Annotated[int, Field(ge=1, lt=2**63)]


class _Strict(BaseModel):
    """No text for a number, no bool for an int. What a later release may add is not read."""

    model_config = ConfigDict(strict=True, extra="ignore")


class _Exact(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _File(_Exact):
    size: _Natural
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Tensor(_Exact):
    shape: list[_Natural]
    dtype: Annotated[str, AfterValidator(_is_dtype)]


class _Value(_Exact):
    value: Any


class _Group(_Strict):
    params: list[str]
    algorithm: str
    state: list[str] | None
    options: dict[str, Any]
    is_fused: bool


class _Optimizer(_Exact):
    groups: list[_Group]
    entries: dict[str, dict[str, Literal["tensor"] | _Value]]
    column_shards: dict[str, list[Annotated[list[_Natural], Field(min_length=4, max_length=4)]]]
    forward_passes: dict[str, _Natural]


class _Scheduler(_Exact):
    # `class` is no name that Python lets a field have.
    class_: str = Field(alias="class")
    state: Any

    @model_validator(mode="after")
    def _check_own(self) -> _Scheduler:
        if self.class_ == "RecapLRShim":
            _ShimState.model_validate(self.state)
        return self


class _ShimState(_Strict):
    group_names: list[str]
    last_epoch: _Natural


class _Content(_Strict):
    step: Annotated[int, Field(ge=0)]
    processes: _Positive
    files: dict[Annotated[str, AfterValidator(_is_file_name)], _File]
    tensors: dict[str, _Tensor]
    optimizer: _Optimizer
    scheduler: _Scheduler | None
    extra: Any

    @model_validator(mode="after")
    def _check_references(self) -> _Content:
        if dcp_metadata.NAME not in self.files:
            raise ValueError(f"files lacks {dcp_metadata.NAME}")
        for param, entries in self.optimizer.entries.items():
            for name, entry in entries.items():
                if entry == "tensor" and f"optimizer.{param}.{name}" not in self.tensors:
                    raise ValueError(f"tensors lacks {name!r} of {param!r}"[:200])
        return self
