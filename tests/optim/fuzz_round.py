"""A round of the fuzz: an optimizer of ours and one of torch's, through the same random operations.

Torch's has float64 copies of our parameters, of the same memory layout, and starts each step from
the values that ours starts from. So a step is held to the rounding of one step, see
`tests.support.rounding`, and all else to equality: values, keys, strides, step counts, gradients
and param groups after every operation.

    python -m tests.optim.fuzz_round SEED [ROUNDS]

repeats the round of a seed, and with ROUNDS goes on from there.
"""

from __future__ import annotations

import sys
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from recap_fast._native import use_instruction_set
from tests.optim.fuzz_draws import draw_flat_parameters, draw_options, draw_parameter
from tests.optim.fuzz_operations import OPERATIONS, WEIGHTS
from tests.support.optimizers import FUSED, for_loop
from tests.support.rounding import assert_rounded, decays_apart, double, magnitudes

Values = dict[str, Tensor]


def in_double(value: Any) -> Any:
    """A learning rate for torch's: of a float32 tensor it would make a float32 step size."""
    return double(value) if isinstance(value, Tensor) else value


def copy_in_double(param: nn.Parameter) -> nn.Parameter:
    """With the same strides."""
    copy = torch.empty_strided(param.shape, param.stride(), dtype=torch.float64)
    return nn.Parameter(copy.copy_(param.detach()))


def holds_exactly(truth: Tensor, tensor: Tensor) -> bool:
    """Whether `truth`, of float64, has the bits of `tensor` in float64, or is NaN as it is."""
    mine, other = tensor.data.double(), truth.data
    if mine.shape != other.shape:
        return False
    same = mine.view(torch.int64) == other.view(torch.int64)
    return bool(same.all()) or bool((same | (mine.isnan() & other.isnan())).all())


def strides(tensor: Tensor) -> list[int]:
    """Those that mean something."""
    return [s for s, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


class Round:
    """Draws everything from `seed`; `run` raises AssertionError where ours is not torch's."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.draw = Random(seed)
        self.algorithm = self.draw.choice(list(FUSED))
        self.history: list[str] = []
        self.has_moved = False  # whether a parameter has got other strides
        groups = [self.draw_group() for _ in range(self.draw.choice([1, 1, 1, 2, 2, 3, 4]))]
        defaults = draw_options(self.draw, self.algorithm)
        theirs = [self.group_in_double(group) for group in groups]
        in_double_defaults = {key: in_double(value) for key, value in defaults.items()}
        self.history.append(f"{self.algorithm} {defaults}")
        self.ours: Any = FUSED[self.algorithm](groups, **defaults)
        self.theirs: Any = for_loop(self.algorithm, theirs, **in_double_defaults)

    def draw_group(self) -> dict[str, Any]:
        count = self.draw.choice([1, 1, 1, 1, 2, 3])
        if self.draw.random() < 0.2:
            params = draw_flat_parameters(self.draw, count)
        else:
            params = [draw_parameter(self.draw) for _ in range(count)]
        # The group's options and the constructor's are valid each, and need not be together.
        options = draw_options(self.draw, self.algorithm) if self.draw.random() < 0.6 else {}
        described = [(str(p.dtype), tuple(p.shape), p.stride()) for p in params]
        self.history.append(f"group {described} {options}")
        return {"params": params, **options}

    @staticmethod
    def group_in_double(group: dict[str, Any]) -> dict[str, Any]:
        options = {key: in_double(value) for key, value in group.items() if key != "params"}
        return {"params": [copy_in_double(param) for param in group["params"]], **options}

    @property
    def groups(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        return list(zip(self.ours.param_groups, self.theirs.param_groups, strict=True))

    @property
    def pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        return [
            pair
            for mine, other in self.groups
            for pair in zip(mine["params"], other["params"], strict=True)
        ]

    def run(self) -> None:
        threads = torch.get_num_threads()
        try:
            self.check()
            for _ in range(self.draw.randint(1, 6)):
                self._do(self.draw.choices(list(OPERATIONS), WEIGHTS)[0])
            self._do("step")
        except Exception as error:
            steps = "\n  ".join(self.history)
            raise AssertionError(
                f"round {self.seed}: {error}\n  {steps}\n"
                f"To repeat it: python -m tests.optim.fuzz_round {self.seed}"
            ) from error
        finally:
            torch.set_num_threads(threads)
            use_instruction_set(None)

    def _do(self, name: str) -> None:
        self.history.append(name)
        OPERATIONS[name](self)
        self.check()

    # --- what holds between steps ----------------------------------------------------------------

    def check(self) -> None:
        """All is equal: torch's float64 holds every value of ours exactly."""
        for mine, other in self.groups:
            assert mine.keys() == other.keys()
            for key in mine.keys() - {"params", "foreach", "fused"}:
                assert mine[key] == other[key], f"option {key}: {mine[key]}, torch's {other[key]}"
        assert len(self.ours.state) == len(self.theirs.state), "another number of states"
        for index, (param, truth) in enumerate(self.pairs):
            name = f"parameter {index}"
            assert strides(param) == strides(truth), f"strides of {name}"
            assert holds_exactly(truth, param), f"{name} is not what it was"
            assert param.requires_grad == truth.requires_grad
            assert (param.grad is None) == (truth.grad is None), f"gradient of {name}"
            if param.grad is not None:
                assert holds_exactly(truth.grad, param.grad), f"gradient of {name}"
            assert (param in self.ours.state) == (truth in self.theirs.state), f"state of {name}"
            if param in self.ours.state:
                self._check_state(name, param, truth)

    def _check_state(self, name: str, param: nn.Parameter, truth: nn.Parameter) -> None:
        state, true_state = self.ours.state[param], self.theirs.state[truth]
        assert list(state) == list(true_state), f"keys of the state of {name}: {list(state)}"
        for key, value in state.items():
            true_value, where = true_state[key], f"{key} of {name}"
            if key == "step":
                assert value.dtype == true_value.dtype and value.shape == (), where
                assert value.item() == true_value.item(), f"{where}: {value}, torch's {true_value}"
                continue
            assert value.dtype == param.dtype and value.shape == true_value.shape, where
            # Where a parameter was moved, ours follows its strides. Torch's momentum buffer has
            # those that the first update happened to have.
            if not self.has_moved and key != "momentum_buffer":
                assert strides(value) == strides(true_value), where
            assert holds_exactly(true_value, value), f"{where} is not what it was"

    # --- a step ----------------------------------------------------------------------------------

    def values(self) -> list[Values]:
        """Copies of all parameters and states, in float64."""
        return [
            {
                "param": double(truth),
                **{key: value.clone() for key, value in self.theirs.state.get(truth, {}).items()},
            }
            for _, truth in self.pairs
        ]

    def step(self, take_ours: Any, take_theirs: Any) -> None:
        """A step of both, or an error of both, after which nothing has changed."""
        before = self.values()
        had_state = {truth for _, truth in self.pairs if truth in self.theirs.state}
        refused = None
        try:
            take_theirs()
        except Exception as error:
            refused = error
        try:
            take_ours()
        except Exception as error:
            if refused is None:
                raise AssertionError(f"refused what torch takes: {error!r}") from error
            # Torch has stepped the groups before the one that it refuses. Ours has not.
            for (_, truth), values in zip(self.pairs, before, strict=True):
                truth.data.copy_(values.pop("param"))
                self.theirs.state.pop(truth, None)
                if truth in had_state:
                    self.theirs.state[truth] = values
            return
        assert refused is None, f"took what torch refuses: {refused!r}"
        of_params = [group for _, group in self.groups for _ in group["params"]]
        for index, (param, truth) in enumerate(self.pairs):
            if truth.grad is not None:
                self._check_step(
                    f"parameter {index}", param, truth, of_params[index], before[index]
                )
                self._start_from_ours(param, truth)

    def _check_step(
        self,
        name: str,
        param: nn.Parameter,
        truth: nn.Parameter,
        group: dict[str, Any],
        before: Values,
    ) -> None:
        state, true_state = self.ours.state.get(param, {}), self.theirs.state.get(truth, {})
        assert list(state) == list(true_state), f"keys of the state of {name}: {list(state)}"
        start = {"sum": self.theirs.defaults.get("initial_accumulator_value", 0.0)}
        for key, value in true_state.items():
            of_sgd = self.algorithm == "sgd" and key == "momentum_buffer"
            if key not in before and not of_sgd:
                before[key] = torch.full_like(value, start.get(key, 0.0))
        before["grad"] = truth.grad
        sizes, update = magnitudes(self.algorithm, group, before, {"param": truth, **true_state})
        for key, value in true_state.items():
            where = f"{key} of {name}"
            if key in sizes:
                assert_rounded(where, state[key], value, sizes[key], 0.0)
            else:  # the step count, or what an option no longer asks for
                assert holds_exactly(double(value), state[key]), where
        decays = decays_apart(self.algorithm, group)
        again = before["param"].abs() if decays else 0.0
        assert_rounded(name, param.data, truth.data, update, again)

    def _start_from_ours(self, param: nn.Parameter, truth: nn.Parameter) -> None:
        truth.data.copy_(param.data)
        true_state = self.theirs.state.get(truth, {})
        for key, value in self.ours.state.get(param, {}).items():
            if key != "step":
                true_state[key].copy_(value)


def main() -> None:
    first, rounds = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1
    torch.set_num_threads(1)
    failures = 0
    for seed in range(first, first + rounds):
        try:
            Round(seed).run()
        except AssertionError as error:
            failures += 1
            print(error, flush=True)
    print(f"{rounds} rounds, {failures} failures")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
