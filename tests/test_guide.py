"""The guide's lines on configuration, run as they are written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from recap_fast import build_optimizer
from tests.models import Ranker

GUIDE = Path(__file__).parent.parent / "docs" / "guide.md"
CONFIGURATION = GUIDE.read_text().partition("## Configuration")[2].partition("\n## Groups")[0]
EXAMPLES = re.findall(r"```python\n(.*?)```", CONFIGURATION, re.DOTALL)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 2


@pytest.mark.parametrize("code", EXAMPLES)
def test_examples_of_configurations_run(code: str) -> None:
    names = {"build_optimizer": build_optimizer, "model": Ranker()}
    exec(code, names)
    optimizer, scheduler = names["optimizer"], names["scheduler"]
    assert len(optimizer.param_groups) == len(scheduler.group_names)
    assert {"ml.liked", "ml.replied", "backbone"} <= set(scheduler.group_names)


def test_the_yaml_of_the_guide_loads(tmp_path: Path) -> None:
    from recap_fast import load_optimizer_config

    (text,) = re.findall(r"```yaml\n(.*?)```", CONFIGURATION, re.DOTALL)
    path = tmp_path / "config.yaml"
    path.write_text(text)
    config = load_optimizer_config(path)
    assert list(config.multi_task_learning_rates.tower_learning_rates) == [
        "recap.engagement.is_favorited",
        "recap.engagement.is_replied",
    ]
