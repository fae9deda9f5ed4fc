"""How `recap_fast.reference` stores parameters and states: the formats of native steps, slowly.

A step widens everything to float32, has torch's class step that, and rounds it back. Random bits
and codes are those of ``csrc/numerics/rounding.h`` and ``codes.h``, in torch's 64-bit integers.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from recap_fast import torch_classes
from recap_fast.closure import evaluate
from recap_fast.state.codes import (
    ELEMENTS_OF_SCALE,
    NEVER_NEGATIVE,
    decoded,
    scale_name,
    scales_of,
)
from recap_fast.state.formats import (
    SEED,
    STATE_DTYPES,
    StateDtype,
    format_options,
    has_formats,
    is_rounded_by_chance,
    rest_name,
    state_dtype_of,
)
from recap_fast.state.loading import in_own_formats, take_formats
from recap_fast.state.memory import StateMemory
from recap_fast.state.new import counts_steps, new_state
from recap_fast.torch_classes import TORCH_CLASSES

_WORD: Final = 0xFFFFFFFF
_SHORT: Final = (torch.bfloat16, torch.float16)


# --- random bits ----------------------------------------------------------------------------------


def _signed(value: int) -> int:
    """A number of 64 bits as torch has it."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


_GOLDEN: Final = _signed(0x9E3779B97F4A7C15)
_ELEMENTS_OF_DRAW: Final = 16
_MULTIPLIER: Final = 747796405


def _right(bits: Tensor, count: int) -> Tensor:
    """Shifted, with zeros coming in."""
    shifted: Tensor = (bits >> count) & (2 ** (64 - count) - 1)
    return shifted


def _mixed(bits: Tensor) -> Tensor:
    """The output function of SplitMix64 (Steele et al., 2014)."""
    bits = (bits ^ _right(bits, 30)) * _signed(0xBF58476D1CE4E5B9)
    bits = (bits ^ _right(bits, 27)) * _signed(0x94D049BB133111EB)
    return bits ^ _right(bits, 31)


def _hash(name: str) -> int:
    """FNV-1a (Fowler, Noll, Vo)."""
    found = 0xCBF29CE484222325
    for byte in name.encode():
        found = (found ^ byte) * 0x100000001B3 % 2**64
    return _signed(found)


class RandomBits(NamedTuple):
    """32 for each element, of which the upper ones count: int64 of one dimension."""

    states: tuple[Tensor, Tensor, Tensor]
    param: Tensor


def random_bits(seed: int, name: str, step: int, size: int) -> RandomBits:
    """Those of one parameter in one step.

    Args:
        seed: ``rounding_seed``.
        name: of the parameter.
        step: its count with this step, so 1 in the first.
        size: elements, in the order in which they lie in memory.
    """
    of_name = _mixed(torch.tensor([_signed(seed)])) ^ _hash(name)
    key = _mixed(of_name + _signed(_GOLDEN * step))
    index = torch.arange(size)
    powers = torch.tensor([pow(_MULTIPLIER, lane + 1, 2**32) for lane in range(_ELEMENTS_OF_DRAW)])
    words = []
    for number in range(2):
        place = 2 * (index // _ELEMENTS_OF_DRAW + 1) + number
        drawn = _mixed(key + _GOLDEN * place)
        for word in (drawn & _WORD, _right(drawn, 32)):
            words.append((word * powers[index % _ELEMENTS_OF_DRAW]) & _WORD)
    first, second, param, third = words
    return RandomBits((first, second, third), param)


# --- rounding -------------------------------------------------------------------------------------


def rounded(values: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """Rounds float32 up or down by chance, to bfloat16 or float16.

    Args:
        values: contiguous.
        dtype: to round to; float32 is kept.
        random: as `random_bits` has them.
    """
    if dtype == torch.float32:
        return values
    flat = values.reshape(-1)
    chance = random >> 16
    bits = flat.view(torch.int32).long() & _WORD
    if dtype == torch.bfloat16:
        stored = (bits + torch.where(flat.isnan(), 0, chance)) >> 16
    else:
        stored = _half_bits(flat, bits, chance)
    short = torch.where(stored >= 2**15, stored - 2**16, stored).to(torch.int16)
    return short.view(dtype).view(values.shape)


def _half_bits(flat: Tensor, bits: Tensor, chance: Tensor) -> Tensor:
    sign, magnitude = (bits >> 16) & 0x8000, bits & 0x7FFFFFFF
    is_normal = magnitude >= 0x38800000
    normal = (magnitude - 0x38000000 + (chance >> 3)) >> 13
    small = torch.where(is_normal, 0.0, flat.abs()) + (chance >> 2).float() * 2.0**-38
    half = torch.where(is_normal, normal, (small * 2.0**24).long()).clamp(max=0x7C00)
    return sign | torch.where(flat.isnan(), 0x7E00, half)


def to_codes(name: str, values: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    """Returns codes and scales of the state ``name``, rounded by chance.

    Args:
        name: of the state.
        values: float32, contiguous.
        random: as `random_bits` has them.
    """
    flat = values.reshape(-1)
    scales = scales_of(name, flat)
    inverse = scales.reciprocal().repeat_interleave(ELEMENTS_OF_SCALE)[: flat.numel()]
    bits = (flat * inverse).view(torch.int32).long() & _WORD
    if name in NEVER_NEGATIVE:
        code = ((bits + (random >> 13)) >> 19) - 1792
        code = code.clamp(max=255).maximum((bits != 0).long())
    else:
        code = (((bits & 0x7FFFFFFF) + (random >> 12)) >> 20) - 896
        code = code.clamp(0, 127) | (bits >> 24 & 128)
    code = torch.where(inverse.isnan(), 0, code)
    return code.to(torch.uint8).view(values.shape), scales


def _widened_param(param: Tensor, rest: Tensor | None) -> Tensor:
    """The float32 that a parameter stands for; ``rest`` is what its master has more."""
    wide = param.float()
    if rest is None:
        return wide
    if param.dtype == torch.float16:
        return torch.where(rest.half() == param, rest, wide)
    distance = rest.to(torch.int32)
    # Of a parameter that somebody has set to zero, the distance is from what it was before.
    distance = torch.where((wide == 0) & (distance < 0), 0, distance)
    return (wide.view(torch.int32) + distance).view(torch.float32)


def _parts(value: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 as bfloat16 and the distance from it; ties away from zero."""
    bits = torch.where(value.isnan(), torch.nan, value).view(torch.int32).long() & _WORD
    upper, lower = ((bits + 0x8000) & _WORD) >> 16, bits & 0xFFFF
    as_short = [torch.where(x >= 2**15, x - 2**16, x).to(torch.int16) for x in (upper, lower)]
    return as_short[0].view(torch.bfloat16), as_short[1]


# --- optimizers -----------------------------------------------------------------------------------


class StoredInFormats(Optimizer):
    """Mixed into a class of torch: its arguments, and those of formats.

    Args:
        args, kwargs: of torch's class.
        state_dtype, master_weights, stochastic_rounding, rounding_seed: as in
            `recap_fast.optim.FusedAdam`; also keys of a param group.

    Raises:
        TypeError, ValueError: of torch's class, or as of the native one.
    """

    def __init__(
        self,
        *args: Any,
        state_dtype: StateDtype | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.names: dict[Tensor, str] = {}
        """Of parameters, for their chances."""
        options = format_options(state_dtype, master_weights, stochastic_rounding, rounding_seed)
        take_formats(self, options)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As that of the native class."""
        with in_own_formats(self):
            super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient.

        Args:
            closure: evaluated once, with gradients enabled, before the update.

        Returns:
            What ``closure`` returned, or None.
        """
        loss = None if closure is None else evaluate(closure)
        plain = []
        for number, group in enumerate(self.param_groups):
            formatted = [param for param in group["params"] if _has_format(group, param)]
            if not formatted:
                plain.append(group)
                continue
            others = [param for param in group["params"] if not _has_format(group, param)]
            plain.append({**group, "params": others})
            for place, param in enumerate(group["params"]):
                if _has_format(group, param) and param.grad is not None:
                    name = self.names.get(param) or f"{place} of param group {number}"
                    names = group.get("param_names", ())
                    self._step_one(group, param, names[place] if place < len(names) else name)
        _step_groups(self, plain, self.state)
        return loss

    def _step_one(self, group: Mapping[str, Any], param: Tensor, name: str) -> None:
        state = self.state[param]
        fresh = new_state(self, group, param, StateMemory())
        for key, value in fresh.items():
            state.setdefault(key, value)
        rest = rest_name(group, param)
        wide = nn.Parameter(_widened_param(param.detach(), state[rest] if rest else None))
        assert param.grad is not None
        wide.grad = param.grad.float()
        added = {rest, "step"} if not counts_steps(self) else {rest}
        values = {
            key: _as_float(state, key)
            for key in state
            if key not in added and not key.endswith("_scale")
        }
        _step_groups(self, [{**group, "params": [wide]}], defaultdict(dict, {wide: values}))
        if "step" in state and not counts_steps(self):
            state["step"] += 1
        self._store(group, param, wide.detach(), values, name)

    def _store(
        self,
        group: Mapping[str, Any],
        param: Tensor,
        wide: Tensor,
        values: Mapping[str, Any],
        name: str,
    ) -> None:
        state = self.state[param]
        names = [key for key in values if key != "step"]
        draws = is_rounded_by_chance(group, param, bool(names))
        step = int(state["step"]) if draws else 0
        random = random_bits(group.get("rounding_seed", 0), name, step, param.numel())
        rest = rest_name(group, param)
        order = _order_in_memory(param)
        if rest is None and group.get("stochastic_rounding"):
            wide = wide.permute(order).contiguous()
            param.permute(order).copy_(rounded(wide, param.dtype, random.param))
        elif rest is not None and param.dtype == torch.bfloat16:
            upper, state[rest][...] = _parts(wide.contiguous())
            param.copy_(upper)
        else:
            if rest is not None:
                state[rest].copy_(wide)
            param.copy_(wide)
        is_asked_for = has_formats(group)
        dtype = state_dtype_of(group, param)
        for place, key in enumerate(names):
            value = values[key].permute(order).contiguous()
            if dtype == torch.uint8:
                codes, scales = to_codes(key, value, random.states[place])
                state[key].copy_(codes)
                state[scale_name(key)].copy_(scales)
            elif is_asked_for and draws and dtype in _SHORT:
                state[key].permute(order).copy_(rounded(value, dtype, random.states[place]))
            else:
                state[key].copy_(values[key])


def _has_format(group: Mapping[str, Any], param: Tensor) -> bool:
    if param.dtype not in STATE_DTYPES:
        return False
    is_asked_for = param.dtype in _SHORT and (
        group.get("master_weights") or group.get("stochastic_rounding")
    )
    is_other = param.grad is not None and param.grad.dtype != param.dtype
    return bool(is_asked_for or is_other or group.get("state_dtype") is not None)


def _order_in_memory(param: Tensor) -> list[int]:
    """Its dimensions, in the order in which its elements are counted."""
    strides = torch.empty_like(param, device="meta", memory_format=torch.preserve_format).stride()
    return sorted(range(param.dim()), key=lambda dim: -strides[dim])


def _as_float(state: Mapping[str, Any], key: str) -> Any:
    value = state[key]
    if not isinstance(value, Tensor) or key == "step":
        return value
    if value.dtype == torch.uint8:
        return decoded(key, value, state[scale_name(key)])
    return value.float()


def _step_groups(optimizer: Any, groups: list[Any], state: Any) -> None:
    """Has torch's class step some groups, without the hooks, which are for the whole step."""
    kind = next(each for each in type(optimizer).__mro__ if not issubclass(each, StoredInFormats))
    inner: Any = kind.__new__(kind)
    no_hooks: dict[str, Any] = {
        key: OrderedDict() for key in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    }
    inner.__dict__.update({**vars(optimizer), **no_hooks, "param_groups": groups, "state": state})
    if any(group["params"] for group in groups):
        inner.step()


class Adam(StoredInFormats, torch.optim.Adam):
    """`torch.optim.Adam` with formats."""


class AdamW(StoredInFormats, torch.optim.AdamW):
    """`torch.optim.AdamW` with formats."""


class Adagrad(StoredInFormats, torch.optim.Adagrad):
    """`torch.optim.Adagrad` with formats."""


class SGD(StoredInFormats, torch.optim.SGD):
    """`torch.optim.SGD` with formats."""


class RMSprop(StoredInFormats, torch.optim.RMSprop):
    """`torch.optim.RMSprop` with formats."""


class Lion(StoredInFormats, torch_classes.Lion):
    """`recap_fast.reference.Lion` with formats."""


_IN_FORMATS: Final[Mapping[str, type[StoredInFormats]]] = {
    "adam": Adam,
    "adamw": AdamW,
    "adagrad": Adagrad,
    "sgd": SGD,
    "rmsprop": RMSprop,
    "lion": Lion,
}


def maker(algorithm: str) -> Callable[..., Optimizer]:
    """What makes an optimizer of an algorithm: torch's class, unless formats are asked for."""

    def make(params: Any, **arguments: Any) -> Optimizer:
        is_asked_for = has_formats(arguments) or arguments.get(SEED)
        kind = _IN_FORMATS[algorithm] if is_asked_for else TORCH_CLASSES[algorithm]
        return kind(params, **arguments)

    return make


def name_parameters(params: Mapping[str, Tensor], optimizer: Optimizer) -> None:
    """Has chances follow from names, as those of a native step do.

    Args:
        params: by their names.
        optimizer: whose parameters they are.
    """
    if isinstance(optimizer, StoredInFormats):
        optimizer.names = {param: name for name, param in params.items()}
