"""The picture: the loss of every task and the learning rate of every group over the steps."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .train import EMBEDDINGS, Run

# Okabe and Ito's colours, told apart by colour-blind readers too.
_COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
_INK: Final = "#333333"


def draw(path: Path, runs: dict[str, Run], title: str) -> None:
    """Draws the first run over the other ones, which had the same tasks and groups, as a PNG."""
    (name, first), *others = runs.items()
    steps = np.arange(1, len(first.step_seconds) + 1)
    window = max(1, len(steps) // 20)
    colour_of = dict(zip(first.learning_rates, cycle(_COLOURS), strict=False))

    figure = Figure(figsize=(12, 8), dpi=150, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.1)
    figure.suptitle(title, fontsize=13, fontweight="bold", color=_INK)
    grid = figure.add_gridspec(2, len(first.losses))

    for column, task in enumerate(first.losses):
        axes = figure.add_subplot(grid[0, column])
        axes.plot(steps, first.losses[task], color=colour_of[task], alpha=0.2, linewidth=0.8)
        for other_name, other in others:
            smooth = _moving_mean(other.losses[task], window)
            axes.plot(steps, smooth, color="#BBBBBB", linewidth=6, label=other_name)
        smooth = _moving_mean(first.losses[task], window)
        axes.plot(steps, smooth, color=colour_of[task], linewidth=1.8, label=name)
        axes.legend(frameon=False, fontsize=9, loc="upper right")
        _finish(axes, f"Loss of {task}", f"step (mean of last {window}; faint: every step)")
    figure.axes[0].set_ylabel("binary cross-entropy, nats")

    axes = figure.add_subplot(grid[1, :])
    for group, rates in first.learning_rates.items():
        # A ramp begins at 0, which a logarithmic axis cannot show.
        positive = np.where(np.array(rates) > 0.0, rates, np.nan)
        label = "fused embeddings" if group == EMBEDDINGS else group
        style = {"color": colour_of[group], "linewidth": 2, "drawstyle": "steps-mid"}
        axes.plot(steps, positive, label=label, **style)
    axes.set_yscale("log")
    axes.set_ylabel("learning rate")
    _finish(axes, "Learning rate of every group", "step")
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(first.learning_rates),
        frameon=False,
        fontsize=9,
    )
    figure.savefig(path)


def _moving_mean(values: list[float], window: int) -> np.ndarray:
    """The mean of each value and up to `window - 1` values before it."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(total))
    begin = np.maximum(end - window, 0)
    return (total[end] - total[begin]) / (end - begin)


def _finish(axes: Axes, title: str, xlabel: str) -> None:
    axes.set_title(title, fontsize=10, color=_INK)
    axes.set_xlabel(xlabel, fontsize=9)
    axes.margins(x=0.01)
    axes.grid(True, color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
