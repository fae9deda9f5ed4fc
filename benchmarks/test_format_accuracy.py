"""What formats cost in accuracy, on less than the committed run."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torchrec")
pytest.importorskip("torchmetrics")

from benchmarks import format_accuracy
from examples.movielens import data


def test_every_format_is_trained_on_the_same_batches() -> None:
    found = format_accuracy.movielens(data.synthetic(2000, 0), steps=2, seeds=2, batch_size=64)
    assert found["share_with_codes"] > 0.9
    counts = {state: len(aucs) for state, aucs in found["auc"].items()}
    assert counts == {"float32": 2, "bfloat16": 2, "float16": 1, "8bit": 2}
    first = [found["auc"][state][0] for state in ("float32", "bfloat16")]
    assert first[0] == pytest.approx(first[1], abs=0.01)


def test_an_average_that_is_rounded_to_nearest_stands_still() -> None:
    off = format_accuracy.second_moment(2000, elements=4096)
    assert off.pop("bfloat16, to nearest") > 0.1
    assert all(abs(each) < 0.005 for each in off.values())


def test_weights_move_as_in_float32_but_for_torch_in_bfloat16() -> None:
    at = format_accuracy.small_steps()
    assert at["bfloat16, torch.optim.Adam"] == 1.0
    assert at["bfloat16, master_weights"] == pytest.approx(at["float32"], abs=1e-6)
    assert at["bfloat16, stochastic_rounding"] == pytest.approx(at["float32"], abs=2e-4)


@pytest.mark.parametrize("name", ["ours", "dynamic", "linear"])
def test_the_error_of_a_map_is_a_share_of_an_update(name: str) -> None:
    narrow, wide = (format_accuracy.update_error(name, 128, sigma, 120) for sigma in (0.5, 1.5))
    assert 0.01 < narrow < wide
    assert narrow < 0.2


def test_the_page_and_the_picture_show_results(tmp_path: Path) -> None:
    aucs = {
        state: [dict.fromkeys(data.TASKS, 0.75 + 0.001 * i)]
        for i, state in enumerate(format_accuracy.STATES)
    }
    results = {
        "movielens": {"steps": 7, "auc": aucs, "share_with_codes": 0.99},
        "second_moment": {"8bit": 0.004},
        "small_steps": {"float32": 0.99},
        "maps": [
            [name, block, sigma, 0.1]
            for name in ("ours", "dynamic", "linear")
            for block in (128, 256)
            for sigma in (0.5, 1.5)
        ],
    }
    page = format_accuracy.page_with(format_accuracy.PAGE.read_text(), results, "results.json")
    assert format_accuracy.page_with(page, results, "results.json") == page
    assert "0.7530 (+0.0030)" in page and "+0.40 %" in page
    pytest.importorskip("matplotlib")
    format_accuracy.draw(results, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000
