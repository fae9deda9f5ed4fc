"""`python -m recap_fast`: what it prints, and that it finds what is wrong."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import recap_fast
from recap_fast import diagnostics, optim
from recap_fast.diagnostics import bits, speed
from recap_fast.diagnostics.main import main

pytestmark = pytest.mark.cpu_engine

ROOT = Path(__file__).parents[2]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "ratios", functools.partial(speed.ratios, seconds=0.0))


@pytest.mark.usefixtures("short")
def test_it_prints_versions_build_checks_and_speed(capsys: pytest.CaptureFixture[str]) -> None:
    info, threads = recap_fast.build_info(), torch.get_num_threads()
    assert main([]) == 0
    now = recap_fast.build_info()
    assert now == info | {"ways": now["ways"]} and torch.get_num_threads() == threads
    text, errors = capsys.readouterr()
    assert errors == ""
    for name, value in {
        "Python": sys.version.split()[0],
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda or "none",
        "engines": ", ".join(info["engines"]),
        "for torch": info["torch_built_against"],
    }.items():
        assert re.search(rf"^  {name} +{re.escape(value)}$", text, re.MULTILINE)
    assert re.search(r"^  CPU +\S.*, \d+ cores$", text, re.MULTILINE)
    # With 1 and 2 threads, but for what all are compared with.
    for instructions in info["instruction_sets"]:
        count = 1 if instructions == "baseline" else 2
        assert len(re.findall(rf"^  ok +CPU engine, {instructions}, ", text, re.MULTILINE)) == count
    assert re.search(r"^  ok +CPU engine against torch.optim", text, re.MULTILINE)
    number = r"\d+(\.\d+)?(e\+\d+)?"
    ratio = rf"{number} ms, torch {number} ms: {number} times as fast \({number} to {number}\)"
    assert len(re.findall(ratio, text)) >= 2 * len({1, threads})
    assert "\n  Long tensors: " in text
    assert "\n  Short tensors: " in text
    for work, (streams, prefetch, narrow) in now["ways"].items():
        way = f"in {streams} parts at once, {prefetch} blocks ahead{', narrow' if narrow else ''}"
        assert f"{way} ({work})" in text
    assert "\nMissing\n  " in text


# --- what is wrong -------------------------------------------------------------------------------


def plant(
    monkeypatch: pytest.MonkeyPatch, cls: type, fault: Callable[[torch.Tensor], None]
) -> None:
    """Has `fault` called with the first float32 parameter of an optimizer after each step."""
    step = cls.step

    def faulty(self: torch.optim.Optimizer) -> None:
        step(self)
        params = [param for group in self.param_groups for param in group["params"]]
        fault(next(param.detach() for param in params if param.dtype == torch.float32))

    monkeypatch.setattr(cls, "step", faulty)


def off_by_one_bit(param: torch.Tensor) -> None:
    first = param.view(-1)[:1]
    first.copy_(torch.nextafter(first, torch.full_like(first, float("inf"))))


def on_two_threads(param: torch.Tensor) -> None:
    if torch.get_num_threads() == 2:
        off_by_one_bit(param)


def on_the_fastest_instructions(param: torch.Tensor) -> None:
    info = recap_fast.build_info()
    if info["instruction_set"] == info["instruction_sets"][-1]:
        off_by_one_bit(param)


@pytest.mark.usefixtures("short")
def test_a_difference_of_one_bit_is_exit_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(monkeypatch, optim.FusedSGD, on_two_threads)
    assert main([]) == 1
    text = capsys.readouterr().out
    failed = re.findall(r"^  FAILED +(.*)\n +(.*)", text, re.MULTILINE)
    assert len(failed) == len(recap_fast.build_info()["instruction_sets"])
    for what, problem in failed:
        assert what.startswith("CPU engine, ") and "2 threads" in what
        assert problem == "SGD: 1 of 1 elements differ in the parameter, float32 of shape (1,)"
    assert "\nMissing\n" in text  # the rest is said all the same


def problems() -> dict[str, str]:
    return {check.what: check.problem for check in bits.checks() if check.problem}


@pytest.mark.skipif(
    len(recap_fast.build_info()["instruction_sets"]) < 2, reason="one instruction set only"
)
def test_a_difference_between_instruction_sets_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, optim.FusedRowwiseAdagrad, on_the_fastest_instructions)
    name = recap_fast.build_info()["instruction_sets"][-1]
    assert [what.partition(":")[0] for what in problems()] == [
        f"CPU engine, {name}, 1 thread",
        f"CPU engine, {name}, 2 threads",
    ]


def test_a_state_that_differs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    step = optim.FusedAdagrad.step

    def faulty(self: torch.optim.Optimizer) -> None:
        step(self)
        if torch.get_num_threads() == 2:
            off_by_one_bit(self.state[self.param_groups[1]["params"][0]]["sum"])

    monkeypatch.setattr(optim.FusedAdagrad, "step", faulty)
    (problem,) = set(problems().values())
    assert problem == "Adagrad: 1 of 7 elements differ in the sum, float32 of shape (7,)"


def test_a_wrong_rate_differs_from_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """By 1e-5 of it, on all engines alike."""
    step = optim.FusedAdamW.step

    def faulty(self: torch.optim.Optimizer) -> None:
        for group in self.param_groups:
            group["lr"] *= 1 + 1e-5
        step(self)

    monkeypatch.setattr(optim.FusedAdamW, "step", faulty)
    ((what, problem),) = problems().items()
    assert what.startswith("CPU engine against torch.optim")
    assert problem.startswith("AdamW: off by ") and "in the parameter" in problem


def test_numbers_that_are_none_differ_from_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, optim.FusedAdam, lambda param: param.fill_(float("nan")))
    ((what, problem),) = problems().items()
    assert what.startswith("CPU engine against torch.optim")
    assert problem.startswith("Adam: off by nan")


@pytest.mark.parametrize("at_first", [True, False])
def test_a_step_that_fails_is_a_failed_check(
    monkeypatch: pytest.MonkeyPatch, at_first: bool
) -> None:
    def fail(param: torch.Tensor) -> None:
        if at_first or torch.get_num_threads() == 2:
            raise RuntimeError("no kernel")

    plant(monkeypatch, optim.FusedSGD, fail)
    assert set(problems().values()) == {"RuntimeError: no kernel"}


# --- what does not load --------------------------------------------------------------------------


def forget(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Has modules loaded anew, for the time of a test."""
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delitem(vars(recap_fast), "build_info", raising=False)


def built_for(version: str) -> ModuleType:
    module = ModuleType("recap_fast._torch_version")
    module.TORCH_VERSION = version
    return module


@pytest.mark.parametrize(
    ("record", "extension", "said"),
    [
        (None, True, "is not built. If you have installed it, run Python in another folder"),
        (built_for("2.9.1+cu126"), True, "was built against torch 2.9.1+cu126, but torch "),
        (built_for(torch.__version__), None, "_C"),
    ],
    ids=["not built", "for another torch", "extension missing"],
)
def test_an_extension_that_does_not_load_is_one_message(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    record: ModuleType | None,
    extension: bool | None,
    said: str,
) -> None:
    forget(monkeypatch, "recap_fast._native")
    monkeypatch.setitem(sys.modules, "recap_fast._torch_version", record)
    if extension is None:
        monkeypatch.delattr(recap_fast, "_C", raising=False)
        monkeypatch.setitem(sys.modules, "recap_fast._C", None)
    assert main([]) == 1
    text, errors = capsys.readouterr()
    assert re.search(rf"^  torch +{re.escape(torch.__version__)}$", text, re.MULTILINE)
    assert errors.startswith("recap-fast: ") and said in errors and errors.count("\n") == 1


def test_a_torch_that_does_not_load_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forget(monkeypatch, "recap_fast.diagnostics.versions")
    monkeypatch.delattr(diagnostics, "versions", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main([]) == 1
    assert "torch cannot be imported (" in capsys.readouterr().err


WITHOUT_TORCHREC = """
import functools, sys

class Refuse:
    def find_spec(name, path=None, target=None):
        if name in ("torchrec", "fbgemm_gpu"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse)
from recap_fast.diagnostics import speed
from recap_fast.diagnostics.main import main
speed.ratios = functools.partial(speed.ratios, seconds=0.0)
sys.exit(main([]))
"""


def test_it_works_without_torchrec() -> None:
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCHREC],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stdout.splitlines() if "torchrec is not installed" in line]
    assert "fbgemm_gpu is not installed" in line and "install " in line


# --- the command line ----------------------------------------------------------------------------


def test_demo_says_where_the_demo_is() -> None:
    """In a process of its own, as `python -m recap_fast`; it need not even have torch."""
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "recap_fast", "demo"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and result.stdout == ""
    *imports, line = result.stderr.splitlines()
    assert line.startswith("recap-fast: the demo is in examples/movielens of the sources")
    assert not any(text.endswith("| torch") for text in imports)


def test_other_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench"])
    assert caught.value.code == 2
    assert "invalid choice: 'bench'" in capsys.readouterr().err


def test_an_interrupt_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bits, "checks", interrupted)
    assert main([]) == 130
    assert capsys.readouterr().err == "recap-fast: interrupted\n"
