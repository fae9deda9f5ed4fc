"""Whether every format is measured, counts the bytes it has, and is shown."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from benchmarks import state_formats
from benchmarks.builders import Unavailable
from benchmarks.state_formats import ALGORITHMS, FORMATS, OWN, TORCH, Format
from recap_fast.optim import FusedAdam

_ELEMENTS = 20_000

_TORCHAO = ["torchao AdamW8bit", "torchao _AdamW, bfloat16"]

_SCALE = 2 * 4 / 128

# Moved by a step of Adam, and of an algorithm with one state.
_MOVED = {
    OWN: (28, 20),
    "bfloat16 states": (20, 16),
    "bfloat16 states, bfloat16 gradients": (18, 14),
    "bfloat16, master_weights": (18, 14),
    "bfloat16, stochastic_rounding": (14, 10),
    # And a scale of 4 bytes for 128 elements, read and written.
    "8-bit states": (16 + 2 * _SCALE, 14 + _SCALE),
    "bfloat16, master_weights, 8-bit states": (14 + 2 * _SCALE, 12 + _SCALE),
    "float16 states": (20, 16),
    TORCH: (28, 20),
    "torch fused, bfloat16": (14, 10),
}

needs_grad_dtype = pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has gradients of one dtype only"
)


@pytest.fixture
def no_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)


def _torchao_with(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    module = ModuleType("torchao.optim")
    module.AdamW8bit = make  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchao.optim", module)


def _build(form: Format, elements: int = _ELEMENTS) -> tuple[Any, Any]:
    return state_formats._build(form, "Adam", torch.ones(elements), torch.ones(elements))


@needs_grad_dtype
@pytest.mark.usefixtures("no_torchao")
def test_every_format_is_measured_and_shown() -> None:
    measured = list(state_formats.measure([1], 0.0, _ELEMENTS))
    cases = [(each["algorithm"], each["threads"]) for each in measured]
    assert cases == [(algorithm, 1) for algorithm in ALGORITHMS]
    for each in measured:
        moved = {name: size["moved"] for name, size in each["bytes"].items()}
        expected = {n: both[each["algorithm"] != "Adam"] for n, both in _MOVED.items()}
        assert moved == pytest.approx(expected, abs=0.002)
        read = {name: size["moved"] - 2 * size["kept"] for name, size in each["bytes"].items()}
        grads = {name: FORMATS[name].grad.itemsize for name in _MOVED}
        assert read == pytest.approx(grads, abs=0.002)
        assert list(each["microseconds"]) == list(_MOVED)
        assert list(each["skipped"]) == _TORCHAO
    text = state_formats.section(measured)
    for name in _MOVED:
        assert text.count(f"\n| {name} | ") == len(ALGORITHMS)
    assert text.count(f"\n{', '.join(_TORCHAO)}: torchao is not installed (") == 1
    assert text.count(f"\n{', '.join(_TORCHAO)}: torchao has no Adagrad.\n") == 1


def test_figures_are_of_a_row_over_the_two_it_is_compared_with() -> None:
    own = {"moved": 28.0, "kept": 12.0, "first_step": 8.0, "loading": None}
    short = {"moved": 20.0, "kept": 8.0, "first_step": 4.0, "loading": 0.0}
    times = {OWN: [6000.0, 4000.0], "bfloat16 states": [5000.0, 4000.0], TORCH: [8000.0, 8000.0]}
    sizes = {OWN: own, "bfloat16 states": short, TORCH: own}
    measured = {
        "algorithm": "Adam",
        "threads": 1,
        "bytes": sizes,
        "skipped": {},
        "microseconds": times,
    }
    lines = state_formats.section([measured]).splitlines()
    assert (
        "| bfloat16 states | 20.0 | 1.40x | 8.00 | 4.00 | 0.00 "
        "| 4.50 ms | 1.10x (1.05 to 1.15) | 1.80x (1.70 to 1.90) |"
    ) in lines
    (torch_row,) = (line for line in lines if line.startswith(f"| {TORCH} |"))
    assert "| 8.00 | - | 8.00 ms | 0.62x (0.56 to 0.69) |" in torch_row  # a row that loses
    del times[TORCH], sizes[TORCH]  # a torch without it
    assert "| 1.10x (1.05 to 1.15) | - |" in state_formats.section([measured])


def test_the_peaks_are_those_of_making_and_of_loading() -> None:
    _, size = _build(FORMATS["bfloat16 states"], 5_000_000)
    if size.first_step is None:
        pytest.skip("this system does not tell")
    assert size.first_step == pytest.approx(4, abs=0.5)
    assert size.loading == pytest.approx(0, abs=0.5)


def test_a_tensor_of_tensors_is_as_large_as_these() -> None:
    short = torch.zeros(8, dtype=torch.bfloat16)
    assert state_formats._bytes(TwoTensor(short, short.clone())) == 32


def test_torchao_steps_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    _torchao_with(monkeypatch, torch.optim.AdamW)
    peer, size = _build(FORMATS["torchao AdamW8bit"])
    assert size.moved == pytest.approx(28, abs=0.002)
    assert peer.param_groups[0]["weight_decay"] == 0
    with pytest.raises(Unavailable, match="this torchao has no _AdamW"):
        _build(FORMATS["torchao _AdamW, bfloat16"])


def test_of_what_others_refuse_the_first_line_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refuses(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            raise RuntimeError("no compiler\nand much more")

    _torchao_with(monkeypatch, Refuses)
    with pytest.raises(Unavailable, match=r"^no compiler$"):
        _build(FORMATS["torchao AdamW8bit"])
    monkeypatch.setattr(FusedAdam, "step", Refuses.step)
    with pytest.raises(RuntimeError, match="and much more"):
        _build(FORMATS[OWN])
