"""Nothing that a checkpoint contains is run, wherever a pickle is put."""

from __future__ import annotations

import io
import pickle
import random
import struct
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from recap_fast.checkpoint import CheckpointError, dcp_metadata, load
from recap_fast.checkpoint.errors import Damaged
from tests.checkpoint.forging import (
    DATA,
    METADATA,
    Bomb,
    change_manifest,
    change_metadata,
    content_of,
    replace,
    two_checkpoints,
)
from tests.checkpoint.small_training_state import small

WEIGHT = "model.first.weight"
WRITTEN_BEFORE = Path(__file__).parent / "written_before"


def text_pickle(bomb: Bomb) -> bytes:
    """Of protocol 0, by names that are written out."""
    return b"cos\nsystem\n(S'touch " + str(bomb.marker).encode() + b"'\ntR."


def text_pickle_inst(bomb: Bomb) -> bytes:
    return b"(S'touch " + str(bomb.marker).encode() + b"'\nios\nsystem\n."


def of_eval(bomb: Bomb) -> bytes:
    code = f"__import__('os').system(\"touch '{bomb.marker}'\")".encode()
    return (
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93X"
        + struct.pack("<I", len(code))
        + code
        + b"\x85R."
    )


# Of each: what takes the place of the metadata.
PICKLES: dict[str, Callable[[Bomb], bytes]] = {
    **{f"protocol {number}": lambda bomb, n=number: pickle.dumps(bomb, n) for number in range(6)},
    "protocol 0 by hand": text_pickle,
    "an instance": text_pickle_inst,
    "eval": of_eval,
    "after the metadata": lambda bomb: pickle.dumps([Metadata({}), bomb]),
}


def set_field(**fields: Any) -> Callable[[Metadata, Bomb], Any]:
    def change(metadata: Metadata, bomb: Bomb) -> None:
        for name, make in fields.items():
            setattr(metadata, name, make(metadata, bomb))

    return change


def in_tensor(name: str) -> Callable[[Metadata, Bomb], None]:
    def change(metadata: Metadata, bomb: Bomb) -> None:
        setattr(metadata.state_dict_metadata[WEIGHT], name, bomb)

    return change


def as_key(metadata: Metadata, bomb: Bomb) -> None:
    metadata.state_dict_metadata[bomb] = metadata.state_dict_metadata[WEIGHT]


def in_storage(metadata: Metadata, bomb: Bomb) -> None:
    next(iter(metadata.storage_data.values())).relative_path = bomb


FIELDS: dict[str, Callable[[Metadata, Bomb], Any]] = {
    "planner_data": set_field(planner_data=lambda m, bomb: {"a": bomb}),
    "storage_data": set_field(storage_data=lambda m, bomb: bomb),
    "storage_meta": set_field(storage_meta=lambda m, bomb: bomb),
    "checkpoint_id": lambda m, bomb: setattr(m.storage_meta, "checkpoint_id", bomb),
    "version": set_field(version=lambda m, bomb: bomb),
    "an unknown field": set_field(more=lambda m, bomb: bomb),
    "tensor": lambda m, bomb: m.state_dict_metadata.update({WEIGHT: bomb}),
    "chunks": in_tensor("chunks"),
    "size": in_tensor("size"),
    "properties": in_tensor("properties"),
    "key": as_key,
    "relative_path": in_storage,
}


def check_passed_over(directory: Path, marker: Path, first: dict[str, Any], said: str) -> None:
    own = small(seed=1)
    with pytest.warns(UserWarning, match=said) as warned:
        assert load(directory, *own.all).extra == "first"
    assert len(warned) == 1
    assert own.contents() == first
    assert not marker.exists()


def explode(data: bytes, marker: Path) -> None:
    """Shows that a pickle does run what it names, if it is let to."""
    pickle.loads(data)
    assert marker.exists()
    marker.unlink()


@pytest.mark.parametrize("name", PICKLES)
def test_in_place_of_the_metadata(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "marker"
    data = PICKLES[name](Bomb(marker))
    explode(data, marker)
    first, path = two_checkpoints(tmp_path / "checkpoints")
    replace(path, METADATA, data)
    check_passed_over(
        path.parent, marker, first, r"\.metadata is not what was written: it (has|names) "
    )


@pytest.mark.parametrize("name", FIELDS)
def test_inside_the_metadata(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "marker"
    first, path = two_checkpoints(tmp_path / "checkpoints")
    change_metadata(path, lambda metadata: FIELDS[name](metadata, Bomb(marker)))
    explode((path / METADATA).read_bytes(), marker)
    said = r"\.metadata is not what was written: it names 'posix\.system', which is not of a"
    check_passed_over(path.parent, marker, first, said)


def test_in_the_metadata_of_one_process(tmp_path: Path) -> None:
    """Which DCP reads where that of all is missing or wrong."""
    marker = tmp_path / "marker"
    first, path = two_checkpoints(tmp_path / "checkpoints")
    replace(path, METADATA, b"")
    (path / f"__0{METADATA}").write_bytes(pickle.dumps(Bomb(marker)))
    check_passed_over(path.parent, marker, first, r"\.metadata is not what was written: it is no p")


def as_bytes(metadata: Metadata) -> None:
    """Says of a tensor that it is a pickle: DCP would load it as such."""
    metadata.state_dict_metadata[WEIGHT] = BytesStorageMetadata()
    (index,) = (each for each in metadata.storage_data if each.fqn == WEIGHT)
    metadata.storage_data[MetadataIndex(WEIGHT)] = metadata.storage_data.pop(index)


def test_in_place_of_a_tensor_that_is_said_to_be_none(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    first, path = two_checkpoints(tmp_path / "checkpoints")
    change_metadata(path, as_bytes)
    put_in_place_of_weight(path, saved(Bomb(marker)))
    tree = {"model": {"first.weight": torch.zeros(4, 3)}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(tree, storage_reader=dcp.FileSystemReader(path))
    assert marker.exists(), "DCP alone runs it"
    marker.unlink()
    check_passed_over(path.parent, marker, first, "it names .*BytesStorageMetadata")


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def scripted(_: Bomb) -> bytes:
    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(Module(), torch.zeros(1)), buffer)
    return buffer.getvalue()


def archived(bomb: Bomb) -> bytes:
    """As torch saved before its release 0.2."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = pickle.dumps(bomb, 2)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


TENSORS: dict[str, Callable[[Bomb], bytes]] = {
    "saved": saved,
    "saved beside a tensor": lambda bomb: saved([torch.zeros(4, 3), bomb]),
    "saved as before": lambda bomb: saved(bomb, _use_new_zipfile_serialization=False),
    "a pickle": lambda bomb: pickle.dumps(bomb, 2),
    "an archive": archived,
    "a script": scripted,
}


def put_in_place_of_weight(path: Path, data: bytes) -> None:
    """Appends it to the file of data, and has the metadata say that the weight is there."""
    before = (path / DATA).read_bytes()
    replace(path, DATA, before + data)

    def change(metadata: Metadata) -> None:
        for index, info in metadata.storage_data.items():
            if index.fqn == WEIGHT:
                info.offset, info.length = len(before), len(data)

    change_metadata(path, change)


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*torch.jit.*")
def test_in_place_of_a_tensor(tmp_path: Path, name: str) -> None:
    """It is found when tensors are read, after state was made: an error says so."""
    marker = tmp_path / "marker"
    _, path = two_checkpoints(tmp_path / "checkpoints")
    put_in_place_of_weight(path, TENSORS[name](Bomb(marker)))
    with pytest.raises(CheckpointError, match=rf"could not read {path}: .* may now be p") as raised:
        load(path.parent, *small(seed=1).all)
    assert "weights_only" not in str(raised.value)  # torch advises to have it run
    assert not marker.exists()


def move(to: str) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = to

    return change


def change_weight(**fields: Any) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        for name, value in fields.items():
            setattr(metadata.state_dict_metadata[WEIGHT], name, value)

    return change


def change_place(**fields: Any) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        for name, value in fields.items():
            setattr(next(iter(metadata.storage_data.values())), name, value)

    return change


def without(field: str) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        del getattr(metadata, field)[next(iter(getattr(metadata, field)))]

    return change


def chunk(offset: list[int], size: list[int]) -> dict[str, Any]:
    parts = dcp.metadata.ChunkStorageMetadata(torch.Size(offset), torch.Size(size))
    return {"chunks": [parts]}


MISFITS: dict[str, tuple[Callable[[Metadata], Any], str]] = {
    "a file above": (move("../step-00000001/__0_0.distcp"), "which is no file of the manifest"),
    "a file elsewhere": (move("/etc/passwd"), "which is no file of the manifest"),
    "itself": (move(METADATA), "which is no file of the manifest"),
    "the manifest": (move("manifest.json"), "which is no file of the manifest"),
    "beyond the end": (change_place(length=2**40), "beyond the end of"),
    "before the start": (change_place(offset=-1), "a number out of range"),
    "a huge number": (change_place(offset=2**70), "a number out of range"),
    "a place of text": (change_place(offset="0"), "it has str for int"),
    "transforms": (change_place(transform_descriptors=["zstd"]), "under transforms"),
    "another shape": (change_weight(size=torch.Size([3, 4])), "lies outside of it"),
    "another dtype": (
        change_weight(properties=dcp.metadata.TensorProperties(dtype=torch.float64)),
        "other tensors than the manifest",
    ),
    "no dtype": (change_weight(properties=None), "something else for TensorProperties"),
    "no chunks": (change_weight(chunks=[]), "are not the whole of it"),
    "a part": (change_weight(**chunk([0, 0], [2, 3])), "are not the whole of it"),
    "a chunk outside": (change_weight(**chunk([1, 0], [4, 3])), "lies outside of it"),
    "a chunk nowhere": (change_weight(**chunk([2, 0], [2, 3])), "is nowhere"),
    "no place": (without("storage_data"), "is nowhere"),
    "a tensor less": (without("state_dict_metadata"), "other tensors than the manifest"),
    "many dimensions": (change_weight(size=torch.Size([1] * 100)), "of 100 dimensions"),
    "another object": (lambda metadata: [1], "it has list for"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_metadata_that_does_not_fit(tmp_path: Path, name: str) -> None:
    first, path = two_checkpoints(tmp_path / "checkpoints")
    change, said = MISFITS[name]
    change_metadata(path, change)
    check_passed_over(path.parent, tmp_path / "marker", first, said)


def test_chunks_that_are_there_many_times(tmp_path: Path) -> None:
    """A few bytes for each list, which is walked at each place."""
    first, path = two_checkpoints(tmp_path / "checkpoints")

    def change(metadata: Metadata) -> None:
        weight = metadata.state_dict_metadata[WEIGHT]
        weight.chunks = weight.chunks * 20_000
        metadata.state_dict_metadata |= {f"x{number}": weight for number in range(5_000)}

    change_metadata(path, change)
    check_passed_over(
        path.parent, tmp_path / "marker", first, "more chunks than it has bytes|whole"
    )


def test_random_changes(tmp_path: Path) -> None:
    """No byte of the metadata makes it anything but damaged, or another that fits."""
    _, path = two_checkpoints(tmp_path)
    content, data = content_of(path), (path / METADATA).read_bytes()
    draw = random.Random(0)
    damaged = 0
    for _ in range(400):
        changed = bytearray(data)
        for _ in range(draw.randrange(1, 4)):
            place = draw.randrange(len(changed))
            if draw.random() < 0.5:
                changed[place] = draw.randrange(256)
            else:
                changed[place : place + draw.randrange(8)] = draw.randbytes(draw.randrange(8))
        replace(path, METADATA, bytes(changed))
        try:
            dcp_metadata.read(path, content["tensors"], content_of(path)["files"])
        except Damaged:
            damaged += 1
    assert damaged > 200


def test_one_that_was_written_before_loads() -> None:
    """By the release before the metadata was parsed here, and so without a key."""
    own = small(seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load(WRITTEN_BEFORE, *own.all)
    assert (loaded.step, loaded.extra) == (3, {"epoch": 1, "note": "of format 1"})
    assert own.scheduler.last_epoch == 3
    # What DCP reads, with a pickle that is ours.
    tree = {
        "model": {name: torch.zeros_like(each) for name, each in own.model.state_dict().items()},
        "optimizer": {
            name: {key: torch.zeros_like(value) for key, value in own.optimizer.state[p].items()}
            for name, p in own.model.named_parameters()
        },
    }
    dcp.load(tree, storage_reader=dcp.FileSystemReader(loaded.path))
    for name, value in own.model.state_dict().items():
        assert torch.equal(value, tree["model"][name]), name
    for name, param in own.model.named_parameters():
        for key, value in own.optimizer.state[param].items():
            assert torch.equal(value, tree["optimizer"][name][key]), (name, key)


def test_one_of_a_later_torch_loads(tmp_path: Path) -> None:
    """torch 2.15 adds the strides of a tensor to its properties."""

    _, path = two_checkpoints(tmp_path)
    data = (path / METADATA).read_bytes()
    # NEWFALSE and TUPLE end the state of the first tensor's properties, before MEMOIZE and BUILD.
    longer = data.replace(b"\x89t\x94b", b"\x89K\x03K\x01\x86t\x94b", 1)
    assert longer != data
    replace(path, METADATA, longer)
    assert load(tmp_path, *small(seed=1).all).extra == "second"


def test_a_data_file_that_is_not_in_the_manifest(tmp_path: Path) -> None:
    first, path = two_checkpoints(tmp_path / "checkpoints")
    change_manifest(path, lambda content: content["files"].pop(DATA))
    check_passed_over(path.parent, tmp_path / "marker", first, "which is no file of the manifest")
