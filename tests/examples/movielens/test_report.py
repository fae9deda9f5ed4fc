from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from examples.movielens.report import compare, parameter_difference, table, write_results
from examples.movielens.train import Run


def make_run(weight: list[float], auc: float, step_seconds: list[float]) -> Run:
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([weight]))
        model.bias.fill_(0.5)
    return Run(
        model=model,
        optimizer=None,
        scheduler=None,
        losses={"task.one": [0.7, 0.6, 0.5]},
        learning_rates={"task.one": [0.0, 0.1, 0.2]},
        step_seconds=step_seconds,
        auc={"task.one": auc},
    )


@pytest.fixture
def runs() -> dict[str, Run]:
    return {
        "ours": make_run([1.0, 8.0], 0.75, [0.001, 0.002, 0.004]),
        "theirs": make_run([1.5, 8.0], 0.5, [0.004, 0.006, 0.040]),
    }


def test_comparison_has_medians_and_the_ratio_step_by_step(runs: dict[str, Run]) -> None:
    comparison = compare(runs)
    assert comparison.milliseconds == pytest.approx((2.0, 6.0))
    assert comparison.speedup == pytest.approx((3.5, 4.0, 7.0))  # of 4, 3, 10
    assert comparison.auc == {"task.one": (0.75, 0.5)}
    assert comparison.difference.absolute == 0.5
    assert comparison.difference.relative == 0.5 / 8.0


def test_a_comparison_takes_two(runs: dict[str, Run]) -> None:
    with pytest.raises(ValueError, match="takes two runs, got 1: ours"):
        compare({"ours": runs["ours"]})


def test_difference_names_the_parameter_and_is_relative_to_its_largest_value() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    with torch.no_grad():
        second.weight.copy_(torch.tensor([[100.0, -1000.0], [0.0, 1.0]]))
        first.weight.copy_(torch.tensor([[101.0, -1000.0], [0.0, 1.0]]))
        second.bias.copy_(torch.tensor([0.5, 0.25]))
        first.bias.copy_(torch.tensor([0.5, 0.0]))
    difference = parameter_difference(first, second)
    assert (difference.absolute, difference.absolute_in) == (1.0, "weight")
    assert (difference.relative, difference.relative_in) == (0.5, "bias")
    length = 100.0**2 + 1000.0**2 + 1.0 + 0.5**2 + 0.25**2
    assert difference.of_all == pytest.approx(((1.0 + 0.25**2) / length) ** 0.5, rel=1e-12)


def test_difference_of_equal_models_is_zero_even_for_zeros() -> None:
    model = nn.Linear(2, 2)
    nn.init.zeros_(model.bias)
    difference = parameter_difference(model, model)
    assert (difference.of_all, difference.absolute, difference.relative) == (0.0, 0.0, 0.0)


def test_difference_refuses_other_parameters() -> None:
    with pytest.raises(ValueError, match="only one of the models has the parameters bias"):
        parameter_difference(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))


def test_table_shows_all_figures_in_columns(runs: dict[str, Run]) -> None:
    lines = table(compare(runs)).splitlines()
    cells = {line.split("  ")[0]: line.split() for line in lines[2:]}
    assert lines[0].split() == ["ours", "theirs", "difference"]
    assert cells["AUC task.one"][-3:] == ["0.75000", "0.50000", "2.5e-01"]
    time = cells["optimizer, ms per step (median)"]
    assert " ".join(time[-10:]) == "2.00 6.00 4.0 times as fast (quartiles 3.5 to 7.0)"
    assert cells["largest difference of an element"][-1] == "5.0e-01"
    assert cells["... over its tensor's largest value"][-1] == "6.2e-02"
    assert lines[0].index("ours") + 4 == lines[2].index("0.75000") + 7  # aligned to the right


def test_results_can_be_read_back(runs: dict[str, Run], tmp_path: Path) -> None:
    write_results(tmp_path / "results.json", compare(runs), runs, {"steps": 3})
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["settings"] == {"steps": 3}
    assert results["machine"]["torch"] == torch.__version__
    assert results["comparison"]["auc"] == {"task.one": [0.75, 0.5]}
    assert results["comparison"]["difference"]["absolute_in"] == "weight"
    assert results["runs"]["theirs"]["step_seconds"] == [0.004, 0.006, 0.040]
    assert results["runs"]["ours"]["learning_rates"] == {"task.one": [0.0, 0.1, 0.2]}
