"""An exception at any line of a step leaves it taken whole or not at all.

A signal is handled between two instructions of Python, so that KeyboardInterrupt may come anywhere.
Each scene is stepped once undisturbed; then as often as it has lines, with an exception at another
one every time. The long tests have more scenes, and raise at every instruction, too.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recap_fast
from recap_fast.optim import FusedAdagrad, FusedAdam, FusedSGD
from recap_fast.optim import stepper as stepper_module
from tests.support.optimizers import combine, combined, numbers, parameters, wrapped

PACKAGE = str(Path(recap_fast.__file__).parent)
STEPPER = stepper_module.__file__


class Interrupted(BaseException):
    """As little an Exception as KeyboardInterrupt is."""


class Tracer:
    """Notes the lines that run, or the instructions of ``stepper.py``, and raises at one of them.

    Attributes:
        places: where each was, in order.
    """

    def __init__(self, raise_at: int | None = None, instructions: bool = False) -> None:
        self.places: list[tuple[str, int]] = []
        self._raise_at, self._instructions = raise_at, instructions

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "call":
            name = frame.f_code.co_filename
            if not (name == STEPPER if self._instructions else name.startswith(PACKAGE)):
                return None
            frame.f_trace_opcodes = self._instructions
        if event == ("opcode" if self._instructions else "line"):
            where = frame.f_lasti if self._instructions else frame.f_lineno
            if len(self.places) == self._raise_at:
                sys.settrace(None)
                raise Interrupted(f"{frame.f_code.co_filename}:{frame.f_lineno}")
            self.places.append((frame.f_code.co_filename + frame.f_code.co_name, where))
        return self._trace

    def run(self, function: Callable[[], Any]) -> None:
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            function()
        finally:
            sys.settrace(before)


def _first_times(places: Sequence[tuple[str, int]]) -> list[int]:
    """For each place, when it ran for the first time."""
    first: dict[tuple[str, int], int] = {}
    for time, place in enumerate(places):
        first.setdefault(place, time)
    return sorted(first.values())


class Scene:
    """An optimizer before the step that is interrupted, and its parameters."""

    def __init__(self, optimizer: Any, params: Sequence[nn.Parameter], scale: float = 1.0) -> None:
        self.optimizer, self.params, self._scale = optimizer, params, scale

    def set_grads(self, seed: int) -> None:
        for index, param in enumerate(self.params):
            if param.requires_grad:
                param.grad = _gradient(tuple(param.shape), param.dtype, 100 * seed + index).clone()
                if self._scale != 1:
                    param.grad *= self._scale

    def step(self, seed: int) -> None:
        self.set_grads(seed)
        self.optimizer.step()

    def contents(self) -> dict[str, bytes]:
        """Every parameter and state, bit by bit."""
        found = {}
        for index, param in enumerate(self.params):
            found[f"parameter {index}"] = param.detach().numpy().tobytes()
        states = getattr(self.optimizer, "_native", None) or [self.optimizer]
        states = [*states, *getattr(self.optimizer, "also", ())]
        for number, optimizer in enumerate(states):
            for index, param in enumerate(self.params):
                for key, value in optimizer.state.get(param, {}).items():
                    if isinstance(value, Tensor):
                        found[f"{key} {index} in {number}"] = value.numpy().tobytes()
        return found


@functools.cache
def _gradient(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return numbers(shape, seed, dtype.to_real()).to(dtype)


# --- what is interrupted -------------------------------------------------------------------------


def _first(make: Callable[..., Any], count: int = 3, **options: Any) -> Callable[[], Scene]:
    def scene() -> Scene:
        params = parameters(count)
        return Scene(make(params, lr=0.1, **options), params)

    return scene


def _later() -> Scene:
    scene = _first(FusedAdam)()
    scene.step(7)
    return scene


def _rate_changed() -> Scene:
    scene = _later()
    scene.optimizer.param_groups[0]["lr"] = torch.tensor(0.2)
    return scene


def _after_add_param_group() -> Scene:
    params = parameters(4)
    optimizer = FusedAdam(params[:2], lr=0.1)
    scene = Scene(optimizer, params)
    scene.step(7)
    optimizer.add_param_group({"params": params[2:], "lr": 0.3})
    return scene


def _new_gradients() -> Scene:
    params = parameters(4)
    for param in params[2:]:
        param.requires_grad_(False)
        param.grad = None
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, dampening=0.5)
    optimizer.state[params[3]]["note"] = "mine"
    scene = Scene(optimizer, params)
    scene.step(7)
    for param in params[2:]:
        param.requires_grad_(True)
    return scene


def _hooks() -> Scene:
    scene = _first(FusedAdam)()
    scene.optimizer.register_step_pre_hook(lambda *_: None)
    scene.optimizer.register_step_post_hook(lambda *_: None)
    return scene


def _scaled() -> Scene:
    params = parameters(3)
    optimizer = FusedAdam(params, lr=0.1, step_supports_amp_scaling=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    return Scene(optimizer, params, scale=4.0)


def _combined() -> Scene:
    params = parameters(4)
    optimizer = combined(params)
    optimizer._native[0].register_step_post_hook(lambda *_: None)
    return Scene(optimizer, params)


def _combined_after_add_param_group() -> Scene:
    params = parameters(5)
    optimizer = combined(params[:4])
    scene = Scene(optimizer, params)
    scene.step(7)
    optimizer.add_param_group({"params": params[4:], "lr": 0.3})
    return scene


def _combined_with_torchs() -> Scene:
    """An optimizer of torch beside the native ones."""
    from torchrec.optim import keyed

    params = parameters(3)
    theirs = torch.optim.Adam([params[2]], lr=0.1)
    other = keyed.KeyedOptimizerWrapper({"2": params[2]}, lambda _: theirs)
    optimizer = combine([("a", wrapped({"0": params[0], "1": params[1]})), ("b", other)])
    optimizer.also = [theirs]
    return Scene(optimizer, params)


def _moved_to_another() -> Scene:
    """A parameter whose state is left behind in the optimizer that it has left."""
    params = parameters(3)
    others = {"3": parameters(1, seed=9)[0]}
    optimizer = combine(
        [("a", wrapped(dict(zip("012", params, strict=True)))), ("b", wrapped(others))]
    )
    scene = Scene(optimizer, params)
    scene.step(7)
    first, second = optimizer._native
    del first.param_groups[0]["params"][1]
    second.param_groups[0]["params"].append(params[1])
    return scene


def _left_to_torch() -> Scene:
    """A group of complex parameters, which torch steps, beside native ones."""
    params = parameters(2)
    params.append(nn.Parameter(torch.tensor([1 + 2j, 3 - 1j])))
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = recap_fast.fuse(torch.optim.Adam(groups, lr=0.1, foreach=False))
    return Scene(optimizer, params)


def _left_to_torch_later() -> Scene:
    scene = _left_to_torch()
    scene.step(7)
    return scene


SCENES: dict[str, Callable[[], Scene]] = {
    "one_parameter": _first(FusedAdagrad, 1),
    "first_adam": _first(FusedAdam, amsgrad=True),
    "first_adagrad": _first(FusedAdagrad),
    "first_sgd": _first(FusedSGD, momentum=0.9, dampening=0.5),
    "later": _later,
    "rate_changed": _rate_changed,
    "after_add_param_group": _after_add_param_group,
    "new_gradients": _new_gradients,
    "hooks": _hooks,
    "clipped": _first(FusedAdam, clip_grad_norm=0.5),
    "scaled": _scaled,
    "left_to_torch": _left_to_torch,
    "left_to_torch_later": _left_to_torch_later,
    "combined": _combined,
    "combined_after_add_param_group": _combined_after_add_param_group,
    "combined_with_torchs": _combined_with_torchs,
    "moved_to_another": _moved_to_another,
}
QUICK = ["first_sgd", "later", "new_gradients", "scaled", "left_to_torch", "combined_with_torchs"]
LONG = pytest.mark.long
OF_TORCHREC = {name for name in SCENES if "combined" in name or name == "moved_to_another"}


def _sweep(make: Callable[[], Scene], instructions: bool, every_time: bool) -> set[bool]:
    """Interrupts a step everywhere; returns whether it was taken, or was not, or was either."""
    scene = make()
    before = scene.contents()
    tracer = Tracer(instructions=instructions)
    scene.set_grads(1)
    tracer.run(scene.optimizer.step)
    taken = scene.contents()
    scene.step(2)
    at_last = scene.contents()
    assert before != taken != at_last

    times = range(len(tracer.places)) if every_time else _first_times(tracer.places)
    assert len(times) > 10
    outcomes = set()
    for time in times:
        scene = make()
        scene.set_grads(1)
        with pytest.raises(Interrupted) as interrupted:
            Tracer(time, instructions).run(scene.optimizer.step)
        found = scene.contents()
        assert found in (before, taken), f"half a step: {interrupted.value}"
        if found == before:
            scene.step(1)
        scene.step(2)
        assert scene.contents() == at_last, f"goes on otherwise: {interrupted.value}"
        outcomes.add(found == taken)
    return outcomes


@pytest.mark.parametrize(
    ("name", "instructions", "every_time"),
    [
        pytest.param("one_parameter", False, True, id="one_parameter-each_time"),
        *(pytest.param(name, False, False, id=name) for name in QUICK),
        *(pytest.param(n, False, True, id=f"{n}-each_time", marks=LONG) for n in SCENES),
        *(pytest.param(n, True, True, id=f"{n}-instructions", marks=LONG) for n in SCENES),
    ],
)
def test_a_step_is_taken_whole_or_not_at_all(
    name: str, instructions: bool, every_time: bool
) -> None:
    if name in OF_TORCHREC:
        pytest.importorskip("torchrec")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert _sweep(SCENES[name], instructions, every_time) == {True, False}


# --- real signals --------------------------------------------------------------------------------


@pytest.fixture
def interrupts() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where a shell has started pytest in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_a_signal_during_what_is_stepped_together_waits_for_the_whole_step() -> None:
    params = parameters(2)
    optimizer = FusedAdam(params, lr=0.1)
    optimizer.step()
    after = []

    def other() -> None:
        signal.raise_signal(signal.SIGINT)
        after.append([param.detach().clone() for param in params])  # went on

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        optimizer._stepper.step(None, None, others=[other])
        sum(range(10))  # a signal is handled between instructions
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(after) == 1
    assert not any(map(torch.equal, params, after[0]))
    assert [optimizer.state[param]["step"].item() for param in params] == [2, 2]


def test_a_signal_that_waited_is_told_of_once() -> None:
    """An event loop hears of it by its file, when it arrives."""
    received, reader_and_writer = [], os.pipe()
    for end in reader_and_writer:
        os.set_blocking(end, False)
    reader, writer = reader_and_writer
    before = signal.signal(signal.SIGUSR1, lambda *_: received.append(1))
    wakeup = signal.set_wakeup_fd(writer)
    try:
        optimizer = FusedAdam(parameters(2), lr=0.1)
        optimizer.step()
        signal.raise_signal(signal.SIGUSR1)
        optimizer._stepper.step(None, None, others=[lambda: signal.raise_signal(signal.SIGUSR1)])
        sum(range(10))
        assert signal.set_wakeup_fd(writer) == writer
        assert os.read(reader, 100) == bytes([signal.SIGUSR1] * 2)
        assert received == [1, 1]
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGUSR1, before)
        for end in reader_and_writer:
            os.close(end)


def test_what_fails_together_with_a_step_leaves_it_untaken() -> None:
    def other() -> None:
        raise ArithmeticError("not mine")

    params = parameters(2)
    optimizer = FusedAdam(params, lr=0.1)
    optimizer.step()
    scene = Scene(optimizer, params)
    before = scene.contents()
    with pytest.raises(ArithmeticError, match="not mine"):
        optimizer._stepper.step(None, None, others=[other])
    assert scene.contents() == before
    optimizer.step()
    assert [optimizer.state[param]["step"].item() for param in params] == [2, 2]
