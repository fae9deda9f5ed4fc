"""The metadata that torch.distributed.checkpoint writes beside tensors: where each of them lies.

DCP reads it with pickle, which runs what it names. Here it is parsed, compared with the manifest
and made anew, so that DCP is given nothing that comes from the file but numbers and names.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from recap_fast.checkpoint import files
from recap_fast.checkpoint.errors import Damaged
from recap_fast.checkpoint.inert_pickle import Inert, Refused, parse

T = TypeVar("T")

NAME: Final = ".metadata"

_METADATA = "torch.distributed.checkpoint.metadata."
_DTYPES: Final = {
    f"torch.{name}": dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)
}
_MOST_DIMS: Final = 64  # torch's operators take no more

# All that the releases 2.11 to 2.15 of torch write, on Python 3.10 to 3.14.
_KNOWN: Final = frozenset(
    {
        *(
            f"{_METADATA}{name}"
            for name in (
                "Metadata",
                "TensorStorageMetadata",
                "TensorProperties",
                "ChunkStorageMetadata",
                "MetadataIndex",
                "StorageMeta",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        "torch.Size",
        "torch.serialization._get_layout",
        "pathlib.PosixPath",
        "pathlib._local.PosixPath",
        *_DTYPES,
    }
)


def read(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Any]],
    own_files: Mapping[str, Mapping[str, Any]],
) -> Metadata:
    """Returns the metadata of a checkpoint, for DCP.

    Args:
        folder: of the checkpoint.
        tensors, own_files: as the manifest has them.

    Raises:
        Damaged: It is not what was written, or does not fit the manifest.
    """
    data = files.read(folder / NAME, own_files[NAME]["size"])
    if hashlib.sha256(data).hexdigest() != own_files[NAME]["sha256"]:
        raise Damaged(f"{NAME} is not what was written: its sha256 is another")
    try:
        found = _Metadata(parse(data, _KNOWN), own_files, len(data))
        if found.shapes() != {name: dict(each) for name, each in tensors.items()}:
            raise Refused("it has other tensors than the manifest")
        return found.for_dcp()
    except Refused as refused:
        raise Damaged(f"{NAME} is not what was written: {refused}") from refused


class _Metadata:
    """A parsed `Metadata`.

    Args:
        root: what was parsed.
        files: their sizes.
        most: how many chunks there may be.
    """

    def __init__(self, root: Any, files: Mapping[str, Mapping[str, Any]], most: int) -> None:
        fields = _fields(root, f"{_METADATA}Metadata")
        self._files = files
        self._left = most
        self._places = {
            key: place for key, place in self._storage(_get(fields, "storage_data", dict))
        }
        self._tensors: dict[str, TensorStorageMetadata] = {
            _checked(name, str): self._tensor(name, each)
            for name, each in _get(fields, "state_dict_metadata", dict).items()
        }

    def shapes(self) -> dict[str, dict[str, Any]]:
        """Of the tensors, as a manifest has them."""
        return {
            name: {
                "shape": list(each.size),
                "dtype": str(each.properties.dtype).removeprefix("torch."),
            }
            for name, each in self._tensors.items()
        }

    def for_dcp(self) -> Metadata:
        storage = {
            MetadataIndex(name, offsets, index): _StorageInfo(*place)
            for (name, offsets), (index, place) in self._places.items()
        }
        return Metadata({**self._tensors}, storage_data=storage, storage_meta=StorageMeta())

    def _tensor(self, name: str, value: Any) -> TensorStorageMetadata:
        fields = _fields(value, f"{_METADATA}TensorStorageMetadata")
        size = _size(fields.get("size"))
        chunks = []
        for chunk in _get(fields, "chunks", list):
            self._left -= 1
            if self._left < 0:  # a list may be there many times, for the price of one
                raise Refused("it has more chunks than it has bytes")
            parts = _fields(chunk, f"{_METADATA}ChunkStorageMetadata")
            offsets, sizes = _size(parts.get("offsets")), _size(parts.get("sizes"))
            if not len(offsets) == len(sizes) == len(size) or any(
                first + count > end for first, count, end in zip(offsets, sizes, size, strict=True)
            ):
                raise Refused(f"a chunk of {name!r} lies outside of it")
            if (name, offsets) not in self._places:
                raise Refused(f"a chunk of {name!r} is nowhere")
            chunks.append(ChunkStorageMetadata(offsets, sizes))
        if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(size):
            raise Refused(f"its chunks of {name!r} are not the whole of it")
        return TensorStorageMetadata(
            TensorProperties(_dtype(fields.get("properties"))), size, chunks
        )

    def _storage(
        self, storage: dict[Any, Any]
    ) -> Iterator[tuple[tuple[str, torch.Size], tuple[int, tuple[str, int, int]]]]:
        for key, value in storage.items():
            index = _fields(key, f"{_METADATA}MetadataIndex")
            info = _fields(value, "torch.distributed.checkpoint.filesystem._StorageInfo")
            file = _get(info, "relative_path", str)
            offset, length = _natural(info.get("offset")), _natural(info.get("length"))
            if file not in self._files or file == NAME:
                raise Refused(f"it has tensors in {file[:80]!r}, which is no file of the manifest")
            if offset + length > self._files[file]["size"]:
                raise Refused(f"it has a tensor beyond the end of {file}")
            if info.get("transform_descriptors"):
                raise Refused("it has tensors under transforms, which are not made here")
            place = (file, offset, length)
            name = (_get(index, "fqn", str), _size(index.get("offset")))
            yield name, (_natural(index.get("index", 0) or 0), place)


def _fields(value: Any, name: str) -> dict[Any, Any]:
    """The fields of a dataclass."""
    if type(value) is not Inert or value.name != name or value.arguments != ():
        what = value.name if type(value) is Inert else type(value).__name__
        raise Refused(f"it has {what} for {name}")
    return _checked(value.state, dict)


def _get(fields: dict[Any, Any], name: str, kind: type[T]) -> T:
    return _checked(fields.get(name), kind)


def _checked(value: Any, kind: type[T]) -> T:
    if type(value) is not kind:
        raise Refused(f"it has {type(value).__name__} for {kind.__name__}")
    return value


def _natural(value: Any) -> int:
    number = _checked(value, int)
    if not 0 <= number < 2**63:
        raise Refused(f"it has a number out of range: {'-' * (number < 0)}{abs(number):#x}"[:80])
    return number


def _size(value: Any) -> torch.Size:
    arguments = value.arguments or () if type(value) is Inert else ()
    if type(value) is not Inert or value.name != "torch.Size" or len(arguments) != 1:
        raise Refused("it has something else for torch.Size")
    items = _checked(arguments[0], tuple)
    if len(items) > _MOST_DIMS:
        raise Refused(f"it has a tensor of {len(items)} dimensions")
    return torch.Size([_natural(item) for item in items])


def _dtype(properties: Any) -> torch.dtype:
    """Of `TensorProperties`, the only one that a strided tensor of a checkpoint has."""
    if type(properties) is not Inert or properties.name != f"{_METADATA}TensorProperties":
        raise Refused("it has something else for TensorProperties")
    dtype = next(iter(_checked(properties.state, tuple)), None)
    if type(dtype) is not Inert or dtype.name not in _DTYPES:
        raise Refused("it has something else for a dtype")
    return _DTYPES[dtype.name]
