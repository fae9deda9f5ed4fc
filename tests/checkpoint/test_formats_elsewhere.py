"""A checkpoint loads into an optimizer that stores parameters and states in another format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recap_fast import build_optimizer, reference
from recap_fast.checkpoint import CheckpointMismatchError, load, save
from recap_fast.config import OptimizerConfig
from tests.checkpoint.small_training_state import Small, Training

FORMATS: dict[str, dict[str, Any]] = {
    "none": {},
    "short states": {"state_dtype": "bfloat16"},
    "long states": {"state_dtype": "float32"},
    "master": {"master_weights": True, "rounding_seed": 4},
    "by chance": {"stochastic_rounding": True, "state_dtype": "float16"},
}
# Of one parameter each, by its name.
ALGORITHMS: dict[str, tuple[str, dict[str, Any]]] = {
    "first.weight": ("adam", {"amsgrad": True}),
    "first.bias": ("adagrad", {"eps": 1e-8}),
    "norm.weight": ("sgd", {}),
    "norm.bias": ("sgd", {"momentum": 0.9}),
    "last.weight": ("lion", {}),
    "last.bias": ("rmsprop", {}),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _training(seed: int, dtype: torch.dtype, formats: str) -> Training:
    """A parameter for each algorithm; of the reference without formats, or in some."""
    own = FORMATS.get(formats, {})
    groups = {
        name: {"pattern": f"^{name}$", algorithm: {"lr": 0.1, **options, **own}}
        for name, (algorithm, options) in ALGORITHMS.items()
    }
    config = OptimizerConfig.model_validate({"adam": {"lr": 0.1}, "groups": groups})
    model = Small(seed).to(dtype)
    build = reference.build_optimizer if formats == "reference" else build_optimizer
    return Training(model, *build(model, config))


def _states(training: Training) -> dict[str, dict[str, Tensor]]:
    state = training.optimizer.state
    return {
        name: {key: value.clone() for key, value in state.get(param, {}).items()}
        for name, param in training.model.named_parameters()
    }


def _check(source: Training, target: Training, made: Training) -> None:
    """The states of `target` are those of `source`, in the formats that `made` has them in."""
    saved, loaded, fresh = (_states(each) for each in (source, target, made))
    values = dict(source.model.named_parameters())
    for name, param in target.model.named_parameters():
        assert torch.equal(param, values[name])
        if not loaded[name]:  # as before the first step: it has nothing that was saved
            assert fresh[name].keys() <= {"step", "param_remainder", "master_param"}
            assert not saved[name].keys() & fresh[name].keys()
            continue
        assert loaded[name].keys() == fresh[name].keys()
        for key, value in loaded[name].items():
            assert value.dtype == fresh[name][key].dtype
            if key in saved[name]:
                assert torch.equal(value, saved[name][key].to(value.dtype)), key
            elif key == "master_param":
                assert torch.equal(value, param.float())
            else:
                assert key in ("step", "param_remainder") and not value.any()


@pytest.mark.parametrize("source", [*FORMATS, "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_format_loads_into_every_other(
    tmp_path: Path, dtype: torch.dtype, source: str
) -> None:
    saved = _training(0, dtype, source).train(2)
    save(tmp_path, 2, *saved.all)
    for number, formats in enumerate((*FORMATS, "reference")):
        steps = (number + len(source)) % 2  # state is made, or is there already
        own = _training(1, dtype, formats).train(steps)
        load(tmp_path, *own.all)
        _check(saved, own, _training(1, dtype, formats).train(1))
        own.train(2)


def test_a_saved_seed_counts(tmp_path: Path) -> None:
    saved = _training(0, torch.bfloat16, "master").train(1)
    save(tmp_path, 1, *saved.all)
    for formats, seed in (("by chance", 4), ("none", None)):
        own = _training(1, torch.bfloat16, formats)
        load(tmp_path, *own.all)
        assert {group.get("rounding_seed") for group in own.optimizer.param_groups} == {seed}


def _wide(seed: int, **section: Any) -> Training:
    torch.manual_seed(seed)
    model = nn.Linear(100, 50)
    return Training(model, *build_optimizer(model, {"adam": {"lr": 0.1, **section}}))


def _train_wide(training: Training, seed: int) -> None:
    for param in training.model.parameters():
        param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(seed))
    training.optimizer.step()


def test_codes_are_saved_as_they_are_and_training_goes_on_with_the_same_bits(
    tmp_path: Path,
) -> None:
    saved, resumed = _wide(0, state_dtype="8bit"), _wide(1, state_dtype="8bit")
    _train_wide(saved, 1)
    save(tmp_path, 1, *saved.all)
    load(tmp_path, *resumed.all)
    for training in (saved, resumed):
        _train_wide(training, 2)
    assert saved.optimizer.state[saved.model.weight]["exp_avg"].dtype == torch.uint8
    for one, other in zip(saved.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    first, second = _states(saved), _states(resumed)
    for name, state in first.items():
        assert all(torch.equal(value, second[name][key]) for key, value in state.items())


@pytest.mark.parametrize(("before", "after"), [("8bit", "bfloat16"), (None, "8bit")])
def test_a_checkpoint_file_does_not_convert_codes(
    tmp_path: Path, before: str | None, after: str
) -> None:
    """Its tensors are loaded into those in use; `load_state_dict` converts."""
    saved, own = _wide(0, state_dtype=before), _wide(1, state_dtype=after)
    for training in (saved, own):
        _train_wide(training, 1)
    save(tmp_path, 1, *saved.all)
    unchanged = [param.clone() for param in own.model.parameters()]
    with pytest.raises(CheckpointMismatchError, match=r"'exp_avg' of 'weight' was .*uint8"):
        load(tmp_path, *own.all)
    assert all(torch.equal(a, b) for a, b in zip(unchanged, own.model.parameters(), strict=True))
