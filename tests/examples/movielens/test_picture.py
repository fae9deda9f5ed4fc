from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from examples.movielens import picture
from examples.movielens.train import EMBEDDINGS, Run


def make_run(steps: int) -> Run:
    losses = [1.0 / (1 + step) for step in range(steps)]
    rates = [1e-3 * step for step in range(steps)]
    return Run(
        model=None,
        optimizer=None,
        scheduler=None,
        losses={"a.liked": losses, "a.loved": losses},
        learning_rates={
            "a.liked": rates,
            "a.loved": rates,
            "backbone": rates,
            EMBEDDINGS: [0.1] * steps,
        },
        step_seconds=[0.1] * steps,
    )


@pytest.mark.parametrize("steps", [1, 2, 100])
def test_draws_all_losses_and_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, path: (figures.append(figure), save(figure, path))
    )
    path = tmp_path / "demo.png"
    picture.draw(path, {"recap_fast": make_run(steps), "reference": make_run(steps)}, "Title")

    assert path.read_bytes().startswith(b"\x89PNG")
    *loss_axes, rate_axes = figures[0].axes
    assert [axes.get_title() for axes in loss_axes] == ["Loss of a.liked", "Loss of a.loved"]
    for axes in loss_axes:
        assert [text.get_text() for text in axes.get_legend().get_texts()] == [
            "reference",
            "recap_fast",
        ]
    rates = {line.get_label(): line.get_ydata() for line in rate_axes.get_lines()}
    assert list(rates) == ["a.liked", "a.loved", "backbone", "fused embeddings"]
    assert np.isnan(rates["backbone"][0])  # a rate of 0 has no place on a logarithmic axis
    assert rates["backbone"][1:].tolist() == [1e-3 * step for step in range(1, steps)]


def test_moving_mean_looks_back_only() -> None:
    values = [4.0, 2.0, 6.0, 1.0]
    assert picture._moving_mean(values, 1).tolist() == values
    assert picture._moving_mean(values, 2).tolist() == [4.0, 3.0, 4.0, 3.5]
    assert picture._moving_mean(values, 10).tolist() == [4.0, 3.0, 4.0, 3.25]
