"""The same bits for any number of threads, groups, cut into tensors and instruction set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import pytest

pytest.importorskip("hypothesis")

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from recap_fast import build_info
from recap_fast._native import use_instruction_set
from tests.support.optimizers import DTYPES, FUSED, UPDATES, combine, numbers, same_bits, wrapped

# Around the widths of vectors (1 to 32 elements), the 16-bit block (512) and the tile (8192).
SIZES = [1, 7, 33, 511, 513, 8192, 8193, 20_001]
STEPS = 3


@pytest.fixture(params=["avx2", "avx512"])
def instruction_set(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name not in build_info()["instruction_sets"]:
        pytest.skip(f"this processor or build does not have {name}")
    return name


def _special(dtype: torch.dtype) -> Tensor:
    """Zeros, the smallest and the largest numbers, infinities and NaN of either sign."""
    finfo = torch.finfo(dtype)
    smallest = finfo.smallest_normal * finfo.eps
    magnitudes = [0.0, smallest, 3 * smallest, finfo.tiny, 1e-3, 1.0, finfo.max, finfo.max / 2]
    values = torch.tensor([*magnitudes, float("inf"), float("nan")], dtype=torch.float64)
    return torch.cat([values, -values]).to(dtype)


@cache  # drawing them takes longer than all steps
def _values(dtype: torch.dtype, seed: int, special: bool) -> list[Tensor]:
    out = [numbers((size,), seed + size, dtype) for size in SIZES]
    if special:  # every special value beside every other, of a parameter and of a gradient
        values = _special(dtype)
        out.append(values.repeat(len(values)) if seed else values.repeat_interleave(len(values)))
    return out


def _assert_all_same(expected: Sequence[Tensor], actual: Sequence[Tensor], what: str) -> None:
    assert len(expected) == len(actual)
    for index, (a, b) in enumerate(zip(expected, actual, strict=True)):
        assert same_bits(a, b), f"tensor {index} ({a.dtype}, {tuple(a.shape)}) depends on {what}"


def _everything(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> list[Tensor]:
    """The parameters and all of their states."""
    states = [value for param in params for value in optimizer.state.get(param, {}).values()]
    return [*(param.detach() for param in params), *states]


def _run(update: str, dtype: torch.dtype, special: bool = False) -> list[Tensor]:
    algorithm, options = UPDATES[update]
    params = [nn.Parameter(values.clone()) for values in _values(dtype, 0, special)]
    optimizer = FUSED[algorithm](params, lr=0.1, **options)
    for step in range(STEPS):
        for param, grad in zip(params, _values(dtype, 1 + step, special), strict=True):
            param.grad = grad
        optimizer.step()
    return _everything(optimizer, params)


@cache
def _baseline(update: str, dtype: torch.dtype, special: bool = False) -> list[Tensor]:
    """What any instruction set must give."""
    use_instruction_set("baseline")
    return _run(update, dtype, special)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("update", UPDATES)
def test_bits_do_not_depend_on_the_instruction_set(
    update: str, dtype: torch.dtype, instruction_set: str
) -> None:
    expected = _baseline(update, dtype)
    use_instruction_set(instruction_set)
    assert build_info()["instruction_set"] == instruction_set
    _assert_all_same(expected, _run(update, dtype), "the instruction set")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("update", UPDATES)
def test_special_values_do_not_depend_on_the_instruction_set(
    update: str, dtype: torch.dtype, instruction_set: str
) -> None:
    """All but the sign and payload of NaN, which IEEE 754 leaves open."""
    expected = _baseline(update, dtype, special=True)
    use_instruction_set(instruction_set)
    for a, b in zip(expected, _run(update, dtype, special=True), strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        assert same_bits(a[~a.isnan()], b[~b.isnan()])


# --- threads -------------------------------------------------------------------------------------


def _mixed_optimizer(scale: int) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
    """Every update in every dtype, in one combined optimizer; some parameters without gradient."""
    params: list[nn.Parameter] = []
    parts = []
    for number, (name, (algorithm, options)) in enumerate(UPDATES.items()):
        own = {
            str(index): nn.Parameter(numbers((scale * (index + 1) + number,), number, dtype))
            for index, dtype in enumerate(DTYPES)
        }
        params += own.values()
        parts.append((name, wrapped(own, algorithm, lr=0.1, **options)))
    return combine(parts), params


def _run_mixed(scale: int) -> list[Tensor]:
    optimizer, params = _mixed_optimizer(scale)
    for step in range(STEPS):
        for index, param in enumerate(params):
            skipped = (index + step) % 5 == 0
            grad = numbers(param.shape, 100 * step + index, param.dtype)
            param.grad = None if skipped else grad
        optimizer.step()
    return _everything(optimizer, params)


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("scale", [3, 9_001])
def test_bits_do_not_depend_on_the_number_of_threads(scale: int, threads: int) -> None:
    # The large one has 6 MB of parameters: 128 KiB for each thread are enough to wake it.
    torch.set_num_threads(1)
    expected = _run_mixed(scale)
    torch.set_num_threads(threads)
    _assert_all_same(expected, _run_mixed(scale), "the number of threads")


def test_one_large_tensor_is_the_same_for_two_threads() -> None:
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        param = nn.Parameter(numbers((1_000_003,), 0, torch.float32))
        param.grad = numbers((1_000_003,), 1, torch.float32)
        optimizer = FUSED["adam"]([param], lr=0.1)
        optimizer.step()
        results.append(_everything(optimizer, [param]))
    _assert_all_same(results[0], results[1], "the number of threads")


# --- groups and tensors --------------------------------------------------------------------------

COUNT = 12


def _fresh() -> list[nn.Parameter]:
    return [nn.Parameter(numbers((37 * i + 1,), i, DTYPES[i % len(DTYPES)])) for i in range(COUNT)]


def _grads(params: Sequence[Tensor], step: int) -> None:
    for index, param in enumerate(params):
        missing = (index * 7 + step) % 5 == 0
        param.grad = None if missing else numbers(param.shape, 50 * step + index, param.dtype)


def _parts(
    group_of: Sequence[int], params: list[nn.Parameter]
) -> Iterator[dict[str, nn.Parameter]]:
    """The parameters of each group, by their position."""
    for group in sorted(set(group_of)):
        yield {str(i): param for i, param in enumerate(params) if group_of[i] == group}


@pytest.mark.parametrize("update", UPDATES)
@given(group_of=st.lists(st.integers(0, 3), min_size=COUNT, max_size=COUNT), separate=st.booleans())
@settings(
    max_examples=15,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
)
def test_bits_do_not_depend_on_the_split_into_groups(
    update: str, group_of: list[int], separate: bool
) -> None:
    """One optimizer with one group, with random groups, or one optimizer for each group."""
    algorithm, options = UPDATES[update]
    expected, actual = _fresh(), _fresh()
    one = FUSED[algorithm](expected, lr=0.1, **options)
    split: torch.optim.Optimizer
    if separate:
        split = combine(
            [
                (str(group), wrapped(part, algorithm, lr=0.1, **options))
                for group, part in enumerate(_parts(group_of, actual))
            ]
        )
    else:
        groups = [{"params": list(part.values())} for part in _parts(group_of, actual)]
        split = FUSED[algorithm](groups, lr=0.1, **options)
    for step in range(STEPS):
        _grads(expected, step)
        _grads(actual, step)
        one.step()
        split.step()
    _assert_all_same(_everything(one, expected), _everything(split, actual), "the groups")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("update", UPDATES)
def test_bits_do_not_depend_on_how_elements_are_cut_into_tensors(
    update: str, dtype: torch.dtype, device: torch.device
) -> None:
    algorithm, options = UPDATES[update]
    size, cuts = 9_000, [1, 16, 700, 8_192]
    whole = nn.Parameter(numbers((size,), 0, dtype, device))
    # Views into one storage, so that most of them start where no vector load is aligned.
    pieces = [nn.Parameter(piece) for piece in whole.detach().clone().tensor_split(cuts)]
    optimizers = [
        FUSED[algorithm]([whole], lr=0.1, **options),
        FUSED[algorithm](pieces, lr=0.1, **options),
    ]
    for step in range(STEPS):
        whole.grad = numbers((size,), 1 + step, dtype, device)
        for piece, grad in zip(pieces, whole.grad.tensor_split(cuts), strict=True):
            piece.grad = grad
        for optimizer in optimizers:
            optimizer.step()
    assert same_bits(whole, torch.cat([piece.detach() for piece in pieces]))
    for key, value in optimizers[0].state.get(whole, {}).items():
        if key != "step":
            assert same_bits(value, torch.cat([optimizers[1].state[p][key] for p in pieces])), key
