"""How 16-bit parameters and states are stored, slow and obvious: what native steps are held to.

Random bits and rounding are those that ``csrc/numerics/rounding.h`` defines, in numpy's unsigned
integers; the update between them is torch's own, in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import pytest
import torch
from torch import Tensor, nn

from tests.support.optimizers import FUSED, for_loop, numbers

np = pytest.importorskip("numpy")

SHORT = (torch.bfloat16, torch.float16)
STORED = (torch.float32, *SHORT)
# The options that say what becomes of parameters, by a name for them.
PARAM_OPTIONS: Mapping[str, dict[str, Any]] = {
    "nearest": {},
    "master": {"master_weights": True},
    "stochastic": {"stochastic_rounding": True},
}
# An update with each number of states that are rounded, and with and without step counts. A step
# takes no parameter of `numbers` across zero, where float32 is exact to no place of 16 bits.
UPDATES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "adam": ("adam", {}),
    "amsgrad": ("adam", {"amsgrad": True}),
    "adagrad": ("adagrad", {"initial_accumulator_value": 0.5}),
    "sgd": ("sgd", {}),
    "momentum": ("sgd", {"momentum": 0.9}),
    "lion": ("lion", {"weight_decay": 0.1}),
    "rmsprop": ("rmsprop", {"lr": 0.005}),
}
# In the order in which they draw chances.
_STATES = {
    "adam": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "adagrad": ("sum",),
    "sgd": ("momentum_buffer",),
    "lion": ("exp_avg",),
    "rmsprop": ("square_avg", "momentum_buffer", "grad_avg"),
}
RESTS = {torch.bfloat16: "param_remainder", torch.float16: "master_param"}

Words: TypeAlias = Any  # an array of uint32


# --- random bits ---------------------------------------------------------------------------------

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ELEMENTS_OF_DRAW = 16
_MULTIPLIER = 747796405


def _mixed_bits(bits: Any) -> Any:
    """The output function of SplitMix64, of uint64."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def _hash_of(name: str) -> Any:
    """FNV-1a (Fowler, Noll, Vo)."""
    found = 0xCBF29CE484222325
    for byte in name.encode():
        found = (found ^ byte) * 0x100000001B3 % 2**64
    return np.uint64(found)


class Chances(NamedTuple):
    """Random bits for each element of a parameter and of its states, as words of 32 bits."""

    states: tuple[Words, Words, Words]
    param: Words


def chances(seed: int, name: str, step: int, size: int) -> Chances:
    """Those of one parameter in one step.

    Args:
        seed: `rounding_seed`.
        name: of the parameter.
        step: its count with this step, so 1 in the first.
        size: elements.
    """
    with np.errstate(over="ignore"):
        of_name = _mixed_bits(np.array([seed % 2**64], np.uint64)) ^ _hash_of(name)
        key = _mixed_bits(of_name + _GOLDEN * np.uint64(step))
        index = np.arange(size, dtype=np.uint64)
        powers = np.array(
            [pow(_MULTIPLIER, lane + 1, 2**32) for lane in range(_ELEMENTS_OF_DRAW)], np.uint32
        )[index % np.uint64(_ELEMENTS_OF_DRAW)]
        words = []
        for number in range(2):
            place = np.uint64(2) * (index // np.uint64(_ELEMENTS_OF_DRAW) + np.uint64(1))
            drawn = _mixed_bits(key + _GOLDEN * (place + np.uint64(number)))
            for shift in (0, 32):
                word = (drawn >> np.uint64(shift)).astype(np.uint32)
                words.append(word * powers)
    first, second, param, third = words
    return Chances((first, second, third), param)


# --- rounding ------------------------------------------------------------------------------------


def stochastic(values: Tensor, dtype: torch.dtype, chance: Words) -> Tensor:
    """Rounds float32 values up where `chance` says so, in the order of their elements.

    Of its 32 bits, the upper 16 count.
    """
    chance = chance >> np.uint32(16)
    flat = values.detach().reshape(-1).numpy()
    bits = flat.view(np.uint32)
    if dtype == torch.bfloat16:
        stored = ((bits + np.where(np.isnan(flat), np.uint32(0), chance)) >> np.uint32(16)).astype(
            np.uint16
        )
    else:
        stored = _stochastic_half(flat, bits, chance)
    return torch.from_numpy(stored.view(np.int16)).view(dtype).reshape(values.shape)


def _stochastic_half(flat: Any, bits: Words, chance: Words) -> Any:
    """Of the 13 bits that fall off a normal number, and of 14 beyond 2^-24 of a subnormal one."""
    sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    is_normal = magnitude >= np.uint32(0x38800000)
    rebased = np.where(is_normal, magnitude, np.uint32(0x38800000)) - np.uint32(0x38000000)
    normal = (rebased + (chance >> np.uint32(3))) >> np.uint32(13)
    added = (chance >> np.uint32(2)).astype(np.float32) * np.float32(2.0**-38)
    small = np.where(is_normal, np.float32(0), np.abs(flat)) + added
    half = np.where(is_normal, normal, (small * np.float32(2.0**24)).astype(np.uint32))
    half = np.where(np.isnan(flat), np.uint32(0x7E00), np.minimum(half, np.uint32(0x7C00)))
    return (sign | half).astype(np.uint16)


# --- codes ---------------------------------------------------------------------------------------

EIGHT_BITS = "8bit"
_NEVER_NEGATIVE = ("exp_avg_sq", "max_exp_avg_sq", "sum", "square_avg")
BLOCK = 128


def numbers_of_codes(name: str) -> Any:
    """What codes of a state stand for if their scale is 1: floats of 4 bits of exponent."""
    mantissa = 4 if name in _NEVER_NEGATIVE else 3
    codes = np.arange(16 * 2**mantissa)
    values = np.ldexp(1 + (codes % 2**mantissa) / 2**mantissa, codes // 2**mantissa - 15)
    values[0] = 0
    return values if name in _NEVER_NEGATIVE else np.concatenate([values, -values])


def from_codes(name: str, codes: Tensor, scales: Tensor) -> Tensor:
    """float32, of the shape of ``codes``."""
    values = numbers_of_codes(name).astype(np.float32)[codes.reshape(-1).numpy()]
    of_elements = np.repeat(scales.numpy(), BLOCK)[: codes.numel()]
    return torch.from_numpy(values * of_elements).reshape(codes.shape)


def to_codes(name: str, values: Tensor, bits: Words) -> tuple[Tensor, Tensor]:
    """Codes and scales, rounded by 32 random bits for each element."""
    numbers = numbers_of_codes(name)
    is_signed = name not in _NEVER_NEGATIVE
    sizes = numbers[: len(numbers) // (1 + is_signed)]
    flat = values.detach().reshape(-1).numpy()
    padded = np.pad(np.abs(flat), (0, -flat.size % BLOCK)).reshape(-1, BLOCK)
    scales = padded.max(1) * np.float32(1 / np.float32(sizes[-1]))
    scales = np.maximum(scales, np.float32(2.0**-120))
    shares = flat * np.repeat(np.float32(1) / scales, BLOCK)[: flat.size]
    size = np.abs(shares).astype(np.float64)
    below = np.clip(np.searchsorted(sizes, size, side="right") - 1, 0, len(sizes) - 2)
    part = (size - sizes[below]) / (sizes[below + 1] - sizes[below])
    # As many of the bits count as a float has behind those of the code.
    used = 20 if is_signed else 19
    up = part + (bits >> np.uint32(32 - used)).astype(np.float64) * 2.0**-used >= 1
    codes = below + up
    if is_signed:
        codes = np.where(size < sizes[1], np.where(codes > 0, 0, codes), codes)
        codes = codes + 128 * np.signbit(shares)
    else:
        codes = np.where(size < sizes[1], size > 0, codes)
    stored = torch.from_numpy(codes.astype(np.uint8)).reshape(values.shape)
    return stored, torch.from_numpy(scales)


def master_of(param: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """The float32 that a parameter with a master stands for."""
    if param.dtype == torch.float16:
        return state["master_param"].clone()
    upper = param.detach().contiguous().view(torch.int16).to(torch.int32) << 16
    return (upper + state["param_remainder"].to(torch.int32)).view(torch.float32)


def places_apart(a: Tensor, b: Tensor) -> Tensor:
    """How many numbers of their 16-bit dtype are between two tensors of it, plus one; int32."""
    assert a.dtype == b.dtype and a.dtype in SHORT

    def rank(tensor: Tensor) -> Tensor:
        bits = tensor.detach().contiguous().view(torch.int16).to(torch.int32)
        return torch.where(bits >= 0, bits, -(bits & 0x7FFF))

    return (rank(a) - rank(b)).abs()


# --- a step --------------------------------------------------------------------------------------


class Formats(NamedTuple):
    """As a param group says it of a parameter."""

    param: torch.dtype
    grad: torch.dtype
    state: Any = None
    param_options: str = "nearest"

    @property
    def options(self) -> dict[str, Any]:
        own = {} if self.state is None else {"state_dtype": self.state}
        return {**own, **PARAM_OPTIONS[self.param_options]}

    @property
    def stored_state(self) -> Any:
        """A dtype, or `EIGHT_BITS`."""
        return self.state or self.param

    @property
    def has_master(self) -> bool:
        return self.param_options == "master" and self.param in SHORT

    @property
    def draws_for_param(self) -> bool:
        return self.param_options == "stochastic" and self.param in SHORT

    @property
    def draws_for_states(self) -> bool:
        is_asked_for = self.state is not None or self.has_master or self.draws_for_param
        return is_asked_for and self.stored_state in (*SHORT, EIGHT_BITS)


class Stored(NamedTuple):
    """A parameter and its state."""

    param: Tensor
    state: dict[str, Tensor]


def stored(optimizer: torch.optim.Optimizer, param: Tensor) -> Stored:
    """Copies of what there is."""
    state = {name: value.clone() for name, value in optimizer.state[param].items()}
    return Stored(param.detach().clone(), state)


def expected_step(
    algorithm: str,
    options: Mapping[str, Any],
    before: Stored,
    grad: Tensor,
    formats: Formats,
    *,
    name: str,
    step: int,
    seed: int = 0,
) -> Stored:
    """What a step stores: the update of torch's class in float32, rounded as `formats` say.

    Args:
        algorithm: one of `FUSED`.
        options: arguments of the class.
        before: what there was, contiguous; no state before the first step.
        grad: of any dtype.
        formats: of the parameter.
        name: of the parameter, by which chances are drawn.
        step: its count with this step.
        seed: `rounding_seed`.
    """
    names = [each for each in _STATES[algorithm] if each in before.state]
    wide = master_of(*before) if formats.has_master and before.state else before.param.float()
    param = nn.Parameter(wide)
    param.grad = grad.float()
    optimizer = for_loop(algorithm, [param], **options)
    if before.state:
        state = {each: _as_float(each, before.state) for each in names}
        if "step" in before.state:
            state["step"] = before.state["step"].clone()
        optimizer.state[param] = state
    optimizer.step()

    drawn = chances(seed, name, step, param.numel())
    after = {}
    for value, own, chance in _states_with_chances(algorithm, optimizer.state[param], drawn):
        is_drawn = formats.draws_for_states
        to = formats.stored_state
        if to == EIGHT_BITS:
            after[own], after[f"{own}_scale"] = to_codes(own, value, chance)
            continue
        after[own] = stochastic(value, to, chance) if is_drawn else value.to(to)
    result = param.detach()
    if formats.has_master and formats.param == torch.float16:
        after["master_param"] = result.clone()
    elif formats.has_master:
        bits = result.view(torch.int32)
        upper = (bits + 0x8000) >> 16
        after["param_remainder"] = (bits - (upper << 16)).to(torch.int16)
        return Stored(upper.to(torch.int16).view(torch.bfloat16), after)
    if formats.draws_for_param:
        return Stored(stochastic(result, formats.param, drawn.param), after)
    return Stored(result.to(formats.param), after)


def _as_float(name: str, state: Mapping[str, Tensor]) -> Tensor:
    if state[name].dtype == torch.uint8:
        return from_codes(name, state[name], state[f"{name}_scale"])
    return state[name].float()


def _states_with_chances(
    algorithm: str, state: Mapping[str, Tensor], drawn: Chances
) -> list[tuple[Tensor, str, Words]]:
    names = [name for name in _STATES[algorithm] if state.get(name) is not None]
    return [(state[name], name, drawn.states[index]) for index, name in enumerate(names)]


def numbers_apart(name: str, codes: Tensor) -> Tensor:
    """Codes in the order of their numbers, as int32."""
    wide = codes.to(torch.int32)
    return wide if name in _NEVER_NEGATIVE else torch.where(wide < 128, wide, 128 - wide)


def assert_stored(actual: Stored, expected: Stored, formats: Formats) -> None:
    """That a step stored what was expected, up to the rounding of float32.

    The native update differs from torch's in the last places of float32, at most 2^-20 of an
    element here, so that one of some 2^12 elements of bfloat16, and of 2^9 of float16, may be
    rounded to the next number instead.
    """
    assert {*actual.state} - {"step"} == {*expected.state}
    if formats.has_master:
        masters = [master_of(*each) for each in (actual, expected)]
        torch.testing.assert_close(*masters, rtol=1e-5, atol=1e-6)
    pairs = {"param": (actual.param, expected.param)}
    pairs |= {
        name: (actual.state[name], value)
        for name, value in expected.state.items()
        if name not in RESTS.values()
    }
    for what, (found, wanted) in pairs.items():
        assert found.dtype == wanted.dtype, what
        if found.dtype == torch.uint8:
            apart = (found.to(torch.int32) - wanted.to(torch.int32)).abs()
            assert int(apart.count_nonzero()) <= max(2, apart.numel() // 100), what
            apart = (numbers_apart(what, found) - numbers_apart(what, wanted)).abs()
            assert int(apart.max()) <= 1, what
            continue
        if found.dtype not in SHORT:
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6, msg=what)
            continue
        apart = places_apart(found, wanted)
        assert int(apart.max()) <= 1, what
        assert int(apart.count_nonzero()) <= max(2, apart.numel() // 100), what


# --- native optimizers ---------------------------------------------------------------------------


def parameter(shape: tuple[int, ...], seed: int, formats: Formats) -> nn.Parameter:
    """A parameter that takes gradients of the dtype that `formats` say."""
    param = nn.Parameter(numbers(shape, seed, formats.param))
    if formats.grad != formats.param:
        param.grad_dtype = formats.grad
    return param


def fused(
    update: str, params: Any, formats: Formats, **more: Any
) -> tuple[torch.optim.Optimizer, dict[str, Any]]:
    """A native optimizer and the arguments of torch's class for the same update."""
    algorithm, options = UPDATES[update]
    options = {"lr": 0.05, **options, **more}
    return FUSED[algorithm](params, **options, **formats.options), options
