"""The outcome of two runs: figures, a table for the terminal, and `results.json`."""

from __future__ import annotations

import json
import math
import platform
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .sharding import whole_state
from .train import Run


@dataclass(frozen=True)
class Difference:
    """How far two models' parameters are apart.

    Attributes:
        of_all: the distance between all parameters, as one vector, over the second one's length.
        absolute: the largest difference of any element.
        absolute_in: name of the parameter where that is.
        relative: the largest difference of any element over its tensor's largest magnitude in the
            second model (over 1 for a tensor of zeros).
        relative_in: name of the parameter where that is.
    """

    of_all: float
    absolute: float
    absolute_in: str
    relative: float
    relative_in: str


@dataclass(frozen=True)
class Comparison:
    """Two runs in figures; the first is compared with the second.

    Attributes:
        names: of the two runs.
        auc: per task, of both runs.
        milliseconds: median duration of `optimizer.step()` of both runs.
        speedup: first quartile, median and third quartile, over the steps, of the second run's
            duration over the first one's.
        difference: between the trained models.
    """

    names: tuple[str, str]
    auc: dict[str, tuple[float, float]]
    milliseconds: tuple[float, float]
    speedup: tuple[float, float, float]
    difference: Difference


def compare(runs: dict[str, Run]) -> Comparison:
    """Compares the first of two runs with the second; every process that took part must do it.

    Raises:
        ValueError: there are not exactly two runs.
    """
    if len(runs) != 2:
        raise ValueError(f"a comparison takes two runs, got {len(runs)}: {', '.join(runs)}")
    (first_name, first), (second_name, second) = runs.items()
    ratios = np.divide(second.step_seconds, first.step_seconds)
    return Comparison(
        names=(first_name, second_name),
        auc={task: (first.auc[task], second.auc[task]) for task in first.auc},
        milliseconds=(
            statistics.median(first.step_seconds) * 1e3,
            statistics.median(second.step_seconds) * 1e3,
        ),
        speedup=tuple(float(q) for q in np.quantile(ratios, [0.25, 0.5, 0.75])),
        difference=parameter_difference(first.model, second.model),
    )


def parameter_difference(first: nn.Module, second: nn.Module) -> Difference:
    """How far parameters of the same name are apart, computed in float64.

    Every process that holds a part of the models must call it.

    Raises:
        ValueError: the models do not have parameters of the same names.
    """
    ours, theirs = whole_state(first), whole_state(second)
    if ours.keys() != theirs.keys():
        only_one = sorted(ours.keys() ^ theirs.keys())
        raise ValueError(f"only one of the models has the parameters {', '.join(only_one)}")
    absolute, relative = {}, {}
    squared_distance = squared_length = 0.0
    for name, parameter in ours.items():
        expected = theirs[name].detach().double()
        apart = parameter.detach().double() - expected
        squared_distance += float(apart.square().sum())
        squared_length += float(expected.square().sum())
        absolute[name] = float(apart.abs().max())
        largest = float(expected.abs().max())
        relative[name] = absolute[name] / (largest or 1.0)
    of_all = math.sqrt(squared_distance / (squared_length or 1.0))
    absolute_in, relative_in = max(absolute, key=absolute.get), max(relative, key=relative.get)
    return Difference(
        of_all, absolute[absolute_in], absolute_in, relative[relative_in], relative_in
    )


def table(comparison: Comparison) -> str:
    """The comparison as aligned text, one line per figure."""
    low, middle, high = comparison.speedup
    difference = comparison.difference
    rows = [("", *comparison.names, "difference")]
    for task, (ours, theirs) in comparison.auc.items():
        rows.append((f"AUC {task}", f"{ours:.5f}", f"{theirs:.5f}", _scientific(ours - theirs)))
    rows.append(
        (
            "optimizer, ms per step (median)",
            *(f"{value:.2f}" for value in comparison.milliseconds),
            f"{middle:.1f} times as fast (quartiles {low:.1f} to {high:.1f})",
        )
    )
    rows.append(("parameters, relative to their length", "", "", _scientific(difference.of_all)))
    rows.append(("largest difference of an element", "", "", _scientific(difference.absolute)))
    rows.append(("... over its tensor's largest value", "", "", _scientific(difference.relative)))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        f"{name:<{widths[0]}}  {ours:>{widths[1]}}  {theirs:>{widths[2]}}  {note}".rstrip()
        for name, ours, theirs, note in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _scientific(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def write_results(
    path: Path, comparison: Comparison, runs: dict[str, Run], settings: dict[str, object]
) -> None:
    """Writes figures, settings, machine and every step's losses, rates and durations as JSON."""
    results = {
        "settings": settings,
        "machine": {
            "system": platform.platform(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        },
        "comparison": asdict(comparison),
        "runs": {
            name: {
                "losses": run.losses,
                "learning_rates": run.learning_rates,
                "step_seconds": run.step_seconds,
            }
            for name, run in runs.items()
        },
    }
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
