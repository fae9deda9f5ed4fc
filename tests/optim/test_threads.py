"""Other threads beside a step: they drop its gradients, step too, or are threads of the step."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from recap_fast import fuse
from recap_fast.optim import FusedAdam, FusedSGD
from recap_fast.optim.stepper import Stepper
from tests.support.optimizers import FUSED, bits, parameters

LARGE = 1_500_000  # elements, of which a step gives up the GIL


def _params(count: int, elements: int) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.zeros(elements)) for _ in range(count)]
    for param in params:
        param.grad = torch.ones(elements)
    return params


@pytest.mark.cpu_engine
@pytest.mark.parametrize("elements", [1000, LARGE])
def test_gradients_dropped_within_a_step_are_still_read(elements: int) -> None:
    params = _params(4, elements)
    optimizer = FusedSGD(params, lr=1.0)
    for param in params:
        param.grad.zero_()
    optimizer.step()
    for param in params:
        param.grad = torch.ones(elements)

    def drop(sums: list[float]) -> float:
        """In the place of a sum over processes: where a step lets others run Python."""
        optimizer.zero_grad()
        for param in params:
            param.data = param.data.clone()
        others.extend(torch.full((elements,), 777.0) for _ in range(8))
        return sum(sums)

    others: list[torch.Tensor] = []
    before = [param.data for param in params]  # what the step was to update
    optimizer._stepper._plan.set_clipping(float("inf"), [0] * 4, 1, drop)
    optimizer.step()
    assert all((memory == -1).all() for memory in before)
    assert all((other == 777).all() for other in others)
    assert all((param == 0).all() for param in params)  # replaced before it was updated


@pytest.mark.cpu_engine
def test_another_thread_may_drop_gradients() -> None:
    params = _params(4, LARGE)
    optimizer = FusedSGD(params, lr=1.0)
    for round_ in range(1, 6):
        for param in params:
            param.grad = torch.ones(LARGE)
        thread = threading.Thread(target=optimizer.step)
        thread.start()
        for param in params:
            param.grad = None
        others = [torch.full((LARGE,), 777.0) for _ in range(4)]
        thread.join()
        for param in params:
            values = param.detach().unique()
            assert len(values) == 1 and -round_ <= values.item() <= 0
        assert all((other == 777).all() for other in others)


@pytest.mark.parametrize("elements", [100, LARGE])
def test_threads_that_step_the_same_optimizer_take_turns(elements: int) -> None:
    params = _params(2, elements)
    optimizer = FusedAdam(params, lr=0.1)
    threads = [threading.Thread(target=optimizer.step) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = _params(2, elements)
    expected = FusedAdam(alone, lr=0.1)
    for _ in range(8):
        expected.step()
    assert [optimizer.state[param]["step"].item() for param in params] == [8, 8]
    for param, other in zip(params, alone, strict=True):
        assert torch.equal(bits(param), bits(other))


def _at_once(step: Callable[[], object], threads: int) -> None:
    started = threading.Barrier(threads)

    def run() -> None:
        started.wait()
        step()

    running = [threading.Thread(target=run) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


def test_threads_that_take_the_first_step_share_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    build, built = Stepper._build, []

    def slowly(self: Stepper, *args: object) -> object:
        time.sleep(0.02)
        built.append(build(self, *args))
        return built[-1]

    monkeypatch.setattr(Stepper, "_build", slowly)
    params = _params(2, 100)
    _at_once(FusedSGD(params, lr=1.0).step, 4)
    assert len(built) == 1
    assert all((param == -4).all() for param in params)


@pytest.mark.parametrize("elements", [100, LARGE // 4])
def test_threads_may_step_different_optimizers(elements: int) -> None:
    torch.set_num_threads(2)
    params = [_params(2, elements) for _ in range(3)]
    tables = [nn.Parameter(torch.zeros(elements // 50, 50)) for _ in range(3)]
    for table in tables:
        nn.functional.embedding(torch.arange(len(table)), table, sparse=True).sum().backward()
    optimizers = [FusedAdam([*own, table]) for own, table in zip(params, tables, strict=True)]
    waiting = iter(optimizers[:2])

    def step() -> None:
        optimizer = next(waiting)
        for _ in range(5):
            optimizer.step()

    _at_once(step, 2)
    for _ in range(5):
        optimizers[2].step()
    for own, table in zip(params[:2], tables[:2], strict=True):
        assert all(torch.equal(bits(p), bits(params[2][0])) for p in own)
        assert torch.equal(bits(table), bits(tables[2]))


def _adam(steps: int) -> FusedAdam:
    optimizer = FusedAdam(_params(2, 100), lr=0.1)
    for _ in range(steps):
        optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("when", "begun"), [("_build", False), ("_build", True), ("_new_states", False)]
)
def test_a_state_dict_loaded_as_a_plan_is_built_is_stepped(
    monkeypatch: pytest.MonkeyPatch, when: str, begun: bool
) -> None:
    """As another thread might: between the reading of the states and the step."""
    saved = _adam(3).state_dict()
    optimizer, expected = _adam(begun), _adam(begun)
    original, loads = getattr(Stepper, when), iter(range(4))

    def interrupted(self: Stepper, *args: object) -> object:
        made = original(self, *args)
        if next(loads, None) is not None:
            optimizer.load_state_dict(saved)
        return made

    monkeypatch.setattr(Stepper, when, interrupted)
    if begun:  # or there would be nothing to build
        optimizer.load_state_dict(saved)
    optimizer.step()
    monkeypatch.undo()
    expected.load_state_dict(saved)
    expected.step()
    for own, other in zip(optimizer.state, expected.state, strict=True):
        assert optimizer.state[own]["step"].item() == 4
        assert torch.equal(bits(own), bits(other))


def test_a_step_ends_though_state_dicts_are_loaded_all_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    optimizer = _adam(1)
    params, saved = list(optimizer.state), optimizer.state_dict()
    before = [param.detach().clone() for param in params]
    build = Stepper._build

    def interrupted(self: Stepper, *args: object) -> object:
        built = build(self, *args)
        optimizer.load_state_dict(saved)
        return built

    monkeypatch.setattr(Stepper, "_build", interrupted)
    optimizer.load_state_dict(saved)
    with pytest.raises(RuntimeError, match="changed while they were being stepped"):
        optimizer.step()
    assert all(map(torch.equal, params, before))


def test_another_thread_may_load_state_dicts() -> None:
    optimizer, donor = _adam(1), _adam(1)
    steps, failed = 300, []

    def load() -> None:
        while thread.is_alive():
            optimizer.load_state_dict(donor.state_dict())

    def step() -> None:
        try:
            for _ in range(steps):
                optimizer.step()
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=step)
    thread.start()
    load()
    thread.join()
    assert not failed
    for param in optimizer.state:  # about `lr` in each step
        assert ((param < 0) & (param > -0.11 * (steps + 1))).all()


def test_threads_take_turns_in_what_is_left_to_torch() -> None:
    params = _params(2, 100)
    sparse = nn.Parameter(torch.zeros(4, 3))
    sparse.grad = torch.ones(4, 3).to_sparse()
    groups = [{"params": params}, {"params": [sparse]}]
    optimizer = fuse(torch.optim.SGD(groups, lr=1.0, foreach=False))
    _at_once(lambda: [optimizer.step() for _ in range(20)], 4)
    assert all((param == -80).all() for param in (*params, sparse))


@pytest.fixture
def unhurried() -> Iterator[None]:
    """No thread gets its turn in Python unless another gives it up."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    yield
    sys.setswitchinterval(before)


@pytest.mark.cpu_engine
@pytest.mark.usefixtures("unhurried")
@pytest.mark.parametrize("elements", [1000, LARGE])
def test_a_long_step_lets_other_threads_run(elements: int) -> None:
    params = _params(4, elements)
    optimizer = FusedSGD(params, lr=1.0)
    optimizer.step()
    begin, ran = threading.Semaphore(0), []

    def run() -> None:
        for _ in range(50):
            begin.acquire()
            ran.append(True)

    other = threading.Thread(target=run)
    other.start()
    seen = []
    for _ in range(50):  # a thread may wake up too late for one
        before = len(ran)
        begin.release()
        optimizer.step()
        seen.append(len(ran) > before)
    other.join()
    assert any(seen) is (elements == LARGE)


@pytest.mark.cpu_engine
def test_another_thread_may_drop_sparse_gradients() -> None:
    rows, lookups = 20_000, 10_000  # a table whose step gives up the GIL
    table = nn.Parameter(torch.zeros(rows, 64))
    optimizer = FusedSGD([table], lr=1.0)
    indices = torch.arange(lookups) % (lookups // 2)
    begin, dropped = threading.Semaphore(0), threading.Semaphore(0)

    def drop() -> None:
        for _ in range(8):
            begin.acquire()
            table.grad = None
            dropped.release()

    thread = threading.Thread(target=drop)
    thread.start()
    taken = 0
    for _ in range(8):
        # No Python object may own it: torch gives up the GIL as it drops such, in mid-assignment.
        nn.functional.embedding(indices, table, sparse=True).sum().backward()
        begin.release()
        before = table[0, 0].item()
        optimizer.step()
        dropped.acquire()  # nor may a backward pass add to what is being dropped
        taken += table[0, 0].item() != before
    thread.join()
    assert (table[: lookups // 2] == -2.0 * taken).all()  # each step whole or not at all
    assert not table[lookups // 2 :].any()


@pytest.mark.cpu_engine
def test_a_step_within_a_step_is_refused() -> None:
    params = parameters(2)
    optimizer = FusedSGD(params, lr=1.0)
    optimizer.step()
    before = [param.detach().clone() for param in params]

    def again(sums: list[float]) -> float:
        optimizer.step()
        return sum(sums)

    optimizer._stepper._plan.set_clipping(1.0, [0, 0], 1, again)
    with pytest.raises(RuntimeError, match="within a step"):
        optimizer.step()
    assert all(map(torch.equal, params, before))


@pytest.fixture
def flushing() -> Iterator[None]:
    yield
    torch.set_flush_denormal(False)


def _denormal_steps(algorithm: str, threads: int, flush: bool) -> list[torch.Tensor]:
    denormal = torch.full((100_000,), 100, dtype=torch.int32).view(torch.float32)
    torch.set_num_threads(threads)
    params = [nn.Parameter(torch.zeros(100_000)) for _ in range(4)]
    options = {"eps": 1e-38} if algorithm.startswith("ada") else {}
    optimizer = FUSED[algorithm](params, lr=1.0, **options)
    torch.set_flush_denormal(flush)
    for param in params:
        param.grad = denormal
    optimizer.step()
    torch.set_flush_denormal(False)
    return [param.detach() for param in params]


@pytest.mark.cpu_engine
@pytest.mark.usefixtures("flushing")
@pytest.mark.parametrize("algorithm", FUSED)
def test_all_threads_flush_denormals_as_the_calling_one_does(algorithm: str) -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush denormals")
    torch.set_flush_denormal(False)
    _denormal_steps(algorithm, 4, False)  # the pool's threads are there, and do not flush
    for flush in (True, False):
        one, four = (_denormal_steps(algorithm, threads, flush) for threads in (1, 4))
        for alone, together in zip(one, four, strict=True):
            assert torch.equal(bits(alone), bits(together))
        if algorithm == "sgd":
            assert all(bool(param.any()) is not flush for param in four)


@pytest.mark.cpu_engine
@pytest.mark.usefixtures("flushing")
def test_the_threads_flush_afterwards_as_before() -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush denormals")
    torch.set_flush_denormal(False)
    denormal = torch.full((400_000,), 100, dtype=torch.int32).view(torch.float32)

    def half() -> torch.Tensor:  # on all threads; none where a thread flushes
        return (denormal * 0.5).view(torch.int32).unique()

    torch.set_num_threads(4)
    before = half()
    _denormal_steps("sgd", 4, True)
    torch.set_num_threads(4)
    assert torch.equal(half(), before)


def test_gradients_are_held_no_longer_than_the_step() -> None:
    params = _params(2, LARGE)
    optimizer = FusedSGD(params)

    def references() -> list[int]:
        storages = [param.grad.untyped_storage() for param in params]
        return [torch._C._storage_Use_Count(storage._cdata) for storage in storages]

    before = references()
    optimizer.step()
    optimizer.step()
    assert references() == before
