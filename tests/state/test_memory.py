"""Where new state goes: separate, laid out like its parameter, and as ordinary as it can be."""

from __future__ import annotations

import copy
import io
import itertools
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from recap_fast.optim import FusedAdagrad, FusedAdam
from recap_fast.state.memory import StateMemory, shares_of

SHAPES = [(), (1,), (7,), (3, 5), (0, 4), (129, 128), (2, 3, 4, 5)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def _extent(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()


def _gaps(states: list[Tensor]) -> list[int]:
    return [b.data_ptr() - a.data_ptr() for a, b in itertools.pairwise(states)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_states_are_like_their_parameters_and_share_no_memory(dtype: torch.dtype) -> None:
    memory = StateMemory()
    params = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in SHAPES]
    params.append(nn.Parameter(torch.ones(8, 6, dtype=dtype).t()))
    params.append(nn.Parameter(torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last)))
    states = [memory.full_like(param, i, i) for param in params for i in range(3)]
    for state, param in zip(states, [param for param in params for _ in range(3)], strict=True):
        assert (state.shape, state.dtype) == (param.shape, param.dtype)
        assert state.stride() == param.stride()
        assert not state.requires_grad
        assert not state._is_view()
    for index, state in enumerate(states):
        assert (state == index % 3).all()
    extents = sorted(_extent(tensor) for tensor in [*states, *params] if tensor.numel())
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(extents))
    for begin, end in map(_extent, states):  # in no more cache lines than it needs
        assert begin % 64 == 0 or begin // 64 == (end - 1) // 64


def test_a_parameter_with_gaps_gets_dense_state() -> None:
    param = nn.Parameter(torch.ones(4, 6)[:, ::2])
    state = StateMemory().empty_like(param, 0)
    assert (state.shape, state.is_contiguous()) == ((4, 3), True)


def test_small_states_and_step_counts_are_packed() -> None:
    memory = StateMemory()
    states = [memory.empty_like(torch.ones(3), 0) for _ in range(7)]
    begins = [state.data_ptr() for state in states[2:]]  # the first have a block of their own
    assert begins == [begins[0] + 16 * i for i in range(5)]
    counts = [memory.step_count(7, torch.float32) for _ in range(7)]
    assert [count.item() for count in counts] == [7] * 7
    assert all((count.dtype, count.shape) == (torch.float32, ()) for count in counts)
    begins = [count.data_ptr() for count in counts[2:]]
    assert begins == [begins[0] + 4 * i for i in range(5)]


def test_states_fill_blocks_that_grow() -> None:
    memory = StateMemory()
    states = [memory.full_like(torch.empty(1000), i, 0) for i in range(600)]
    gaps = _gaps(states)
    assert sum(gap != 4032 for gap in gaps) < 12  # 1,000 floats, rounded up to cache lines
    extents = sorted(map(_extent, states))
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(extents))
    assert all((state == i).all() for i, state in enumerate(states))


@pytest.mark.parametrize("loads", [False, True])
def test_optimizers_made_one_after_the_other_fill_the_same_blocks(loads: bool) -> None:
    optimizers = [FusedAdagrad([nn.Parameter(torch.ones(3))]) for _ in range(50)]
    if loads:
        for optimizer in optimizers:
            optimizer.load_state_dict(optimizer.state_dict())
    of_each = [optimizer.state[optimizer.param_groups[0]["params"][0]] for optimizer in optimizers]
    # But where a block was full.
    assert _gaps([state["sum"] for state in of_each]).count(16) >= 45
    assert _gaps([state["step"] for state in of_each]).count(4) >= 45


@pytest.mark.parametrize("elements", [3, 16_384, 16_385, 1_000_000])
def test_each_state_owns_a_storage_of_its_size(elements: int) -> None:
    memory = StateMemory()
    param = torch.ones(elements)
    states = [memory.full_like(param, index, index % 3) for index in range(6)]
    for state in states:
        assert state.untyped_storage().nbytes() == param.numel() * 4
        assert state.storage_offset() == 0
        # Memory that is shared with others must neither move nor be given back alone.
        for size in (0, 8 * elements):
            with pytest.raises(RuntimeError, match="not resizable"):
                state.untyped_storage().resize_(size)
    for index, state in enumerate(states):
        assert state.shape == (elements,)
        assert (state == index).all()


def test_a_state_outlives_all_others_and_may_be_shared_alone() -> None:
    memory = StateMemory()
    states = [memory.full_like(torch.ones(5), index, 0) for index in range(3)]
    states[1].share_memory_()
    states[1].fill_(7)
    assert [state.is_shared() for state in states] == [False, True, False]
    assert [state[0].item() for state in states] == [0, 7, 2]
    last = states[2]
    del memory, states
    churn = [torch.full((5,), float(i)) for i in range(1000)]
    assert last.tolist() == [2] * 5
    assert len(churn) == 1000


def test_memory_is_zero_before_it_is_filled() -> None:
    for elements in (3, 1000, 100_000):
        dirty = [torch.full((elements,), 3.0) for _ in range(20)]
        del dirty
        state = StateMemory().empty_like(torch.empty(elements), 0)
        assert not state.any()


def test_states_begin_at_offsets_of_their_own() -> None:
    memory = StateMemory()
    param = torch.empty(100_000)
    large = [memory.empty_like(param, index) for index in range(3)]
    assert len({tensor.data_ptr() % 4096 // 64 for tensor in [param, *large]}) == 4
    for _ in range(20):  # of a page each, they stay at the offset of their block
        small = [memory.empty_like(torch.empty(1024), index) for index in range(3)]
    assert len({tensor.data_ptr() % 4096 for tensor in small}) == 3


def _is_advised_of_huge_pages(address: int) -> bool:
    """Of the mapping that the address is in, as Linux shows it."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError(f"no mapping holds {address:#x}")


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="the system has no transparent huge pages",
)
def test_large_states_are_to_be_in_huge_pages() -> None:
    huge, small = 2 * 1024 * 1024, torch.empty(100_000)
    state = StateMemory().full_like(torch.empty(4 * huge), 0.5, 0)
    begin, end = _extent(state)
    for page in range(-(-begin // huge) * huge, end // huge * huge, huge):
        assert _is_advised_of_huge_pages(page)
    assert (state == 0.5).all()
    assert not _is_advised_of_huge_pages(StateMemory().full_like(small, 0.5, 0).data_ptr())


def test_a_subclass_or_another_device_gets_torchs_memory() -> None:
    param = torch.empty(3, device="meta")
    assert StateMemory().empty_like(param, 0).device.type == "meta"


@pytest.mark.parametrize("cls", [FusedAdam, FusedAdagrad])
def test_optimizers_are_copied_saved_and_loaded(cls: type[torch.optim.Optimizer]) -> None:
    params = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(200, 200))]
    for param in params:
        param.grad = torch.full_like(param, 0.5)
    optimizer = cls(params)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    loaded = cls(twins)
    saved = torch.load(file, weights_only=True)
    loaded.load_state_dict(saved)
    copied = copy.deepcopy(optimizer)
    for param, *others in zip(params, twins, copied.param_groups[0]["params"], strict=True):
        for other in others:
            other.grad = param.grad.clone()
    for each in (optimizer, loaded, copied):
        each.step()
    for param, twin, other in zip(params, twins, copied.param_groups[0]["params"], strict=True):
        assert torch.equal(param, twin)
        assert torch.equal(param, other)
    steps = [state["step"].item() for state in saved["state"].values()]
    assert steps == [1, 1]  # what was loaded is the caller's, and stays so


def test_shares_follow_each_other_by_bytes() -> None:
    params = [torch.zeros(6), torch.zeros(3, dtype=torch.float64), torch.zeros(0), torch.zeros(12)]
    shares = shares_of(params)
    assert [shares.get(param) for param in params] == [(0, 0.25), (0.25, 0.5), None, (0.5, 1)]
    assert shares_of([]) == {} and shares_of([torch.zeros(0)]) == {}


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_large_state_that_threads_touch_is_filled(value: float) -> None:
    params = [torch.ones(100_000), torch.ones(300, 700, dtype=torch.float64), torch.ones(5)]
    memory = StateMemory(shares=shares_of(params))
    for param in params:
        for index in range(2):
            state = memory.full_like(param, value, index)
            assert state.eq(value).all() and state.shape == param.shape
