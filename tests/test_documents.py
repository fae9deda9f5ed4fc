"""Whether the figures that are shown are those of a committed run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("torchrec")

from benchmarks import documents


def _source(text: str) -> Path:
    """The results that a document says its figures are from."""
    (name,) = set(re.findall(r"benchmarks/results/[\w-]+\.json", text))
    return documents.ROOT / name


def test_the_readme_shows_the_results() -> None:
    readme = documents.README.read_text()
    assert documents.readme_of(_source(readme), readme) == readme


def test_the_page_shows_the_results() -> None:
    page = documents.PAGE.read_text()
    assert documents.page_of(_source(page)) == page


def test_the_pictures_are_there() -> None:
    for picture in re.findall(r"!\[.*\]\((.+)\)", documents.PAGE.read_text()):
        assert (documents.PAGE.parent / picture).is_file()
