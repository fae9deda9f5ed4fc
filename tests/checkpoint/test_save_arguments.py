"""The `extra` of a checkpoint, and arguments of `save` that are refused before it writes."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest

from recap_fast.checkpoint import load, save
from tests.checkpoint.small_training_state import small


def names(directory: str | Path) -> list[str]:
    return sorted(name for name in os.listdir(directory) if name != ".lock")


@pytest.mark.parametrize(
    "extra",
    [
        None,
        True,
        2**80,
        -0.1,
        math.inf,
        5e-324,
        "ü\n\ud800\0",
        [],
        {},
        {"b": [1, 1.0, None, {"": False}], "a": {"step": 3}},
    ],
)
def test_extra_comes_back(tmp_path: Path, extra: Any) -> None:
    training = small()
    save(tmp_path, 1, *training.all, extra=extra)
    found = load(tmp_path, *training.all).extra
    assert repr(found) == repr(extra)  # which tells 1 from 1.0, and finds the order of keys


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ((1, 2), "extra is a tuple"),
        ({"best": [{}, {"set": {1}}]}, r"extra\['best'\]\[1\]\['set'\] is a set"),
        ({1: 2}, "extra has the key 1: the keys of a dict must be str"),
        ({"path": Path("x")}, r"extra\['path'\] is a PosixPath"),
    ],
)
def test_extra_must_be_plain(tmp_path: Path, extra: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        save(tmp_path / "new", 1, *small().all, extra=extra)
    assert names(tmp_path) == []


def nested(levels: int) -> Any:
    value: Any = 1
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    return value


def test_extra_may_be_nested_to_a_bound(tmp_path: Path) -> None:
    training = small()
    extra = [nested(99), 10**3900]
    save(tmp_path, 1, *training.all, extra=extra)
    assert load(tmp_path, *training.all).extra == extra
    for too_much, said in (
        (nested(101), r"extra\['a'\]\[0\].* is nested in more than 100 lists and dicts"),
        ([10**4300], r"extra\[0\] is an int of 14285 bits: more than 13000"),
    ):
        with pytest.raises(ValueError, match=said):
            save(tmp_path, 2, *training.all, extra=too_much)
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        ({"step": -1}, ValueError, "step=-1 must be 0 or more"),
        ({"step": 1.0}, TypeError, r"step must be an int, found 1\.0"),
        ({"step": True}, TypeError, "step must be an int, found True"),
        ({"keep": 0}, ValueError, "keep=0 must be 1 or more"),
        ({"keep": None}, TypeError, "keep must be an int, found None"),
    ],
)
def test_refused_arguments(
    tmp_path: Path, arguments: dict[str, Any], kind: type[Exception], said: str
) -> None:
    training = small()
    given = dict(zip(("model", "optimizer", "scheduler"), training.all, strict=True))
    with pytest.raises(kind, match=said):
        save(tmp_path / "new", **{"step": 1, **given, **arguments})
    assert names(tmp_path) == []


def test_an_optimizer_of_another_model_is_refused(tmp_path: Path) -> None:
    model, (_, optimizer, scheduler) = small().model, small().all
    said = r"parameter 0 of param group 0 of the optimizer, of shape \(4, 3\), is not a parameter"
    with pytest.raises(ValueError, match=said):
        save(tmp_path / "new", 1, model, optimizer, scheduler)
    assert names(tmp_path) == []


def test_a_scheduler_with_more_than_plain_state_is_refused(tmp_path: Path) -> None:
    class Scheduler:
        def state_dict(self) -> dict[str, Any]:
            return {"best": small().model.last.weight}

    training = small()
    with pytest.raises(TypeError, match=r"scheduler\['state'\]\['best'\] is a Parameter"):
        save(tmp_path / "new", 1, training.model, training.optimizer, Scheduler())
    assert names(tmp_path) == []
