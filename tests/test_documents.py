"""Whether the figures that are shown are those of a committed run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("torchrec")

from benchmarks import documents, pictures
from recap_fast.torchrec_releases import PAIRS, REQUIREMENTS

DOCUMENTS = [
    documents.README,
    documents.ROOT / "CONTRIBUTING.md",
    *sorted((documents.ROOT / "docs").glob("*.md")),
]


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


def test_the_picture_of_a_step_shows_the_results() -> None:
    results = json.loads(_source(documents.README.read_text()).read_text())
    assert pictures.describe(results).encode() in documents.BARS.read_bytes()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_a_document_links_to_is_there(document: Path) -> None:
    """Files, pictures among them, and headings of Markdown files."""
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        name, _, heading = target.partition("#")
        file = document.parent / name if name else document
        assert file.exists(), f"{document.name} links to {target}"
        if heading:
            assert heading in _anchors(file), f"{document.name} links to {target}"


def _anchors(file: Path) -> set[str]:
    """Those that are made of headings: in lower case, without punctuation, with `-` for spaces."""
    headings = re.findall(r"^#+ (.+)$", file.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_shows_its_picture() -> None:
    picture = documents.BARS.relative_to(documents.ROOT)
    assert f"]({picture})" in documents.README.read_text()


def test_the_commands_of_make_are_there() -> None:
    """Every `make TARGET` of a document."""
    makefile = (documents.ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    for document in DOCUMENTS:
        text = document.read_text()
        named = set(re.findall(r"(?:^ {4}|`)make ([a-z-]+)", text, flags=re.MULTILINE))
        assert named <= targets, f"{document.name} has make {named - targets}"
    assert {"demo", "test"} <= targets


def test_releases_that_belong_together_are_the_same_everywhere() -> None:
    """README, Makefile, requirements and the package name the same pairs of torchrec and FBGEMM."""
    line = r"torch (\d+\.\d+)[: ].*torchrec==(\S+) +fbgemm-gpu-cpu==(\S+)"
    readme = r"--no-deps torchrec==(\S+) +fbgemm-gpu-cpu==(\S+) +# for torch (\S+)"
    pairs = {release: tuple(pair) for release, pair in PAIRS.items()}
    shown = re.findall(readme, documents.README.read_text())
    assert {release: (torchrec, fbgemm) for torchrec, fbgemm, release in shown} == pairs
    requirements = (documents.ROOT / "requirements/torchrec-cpu.txt").read_text()
    found = {release: tuple(pair) for release, *pair in re.findall(line, requirements)}
    assert found == pairs
    listed = [text for text in requirements.splitlines() if not text.startswith("#")]
    assert tuple(listed) == REQUIREMENTS
    makefile = (documents.ROOT / "Makefile").read_text()
    for release, *pair in re.findall(line, makefile):
        assert pairs[release] == tuple(pair)
    variable = r"^(?:TORCH|TORCHREC|FBGEMM) +\?= .*==(\S+)$"
    release, *default = re.findall(variable, makefile, re.MULTILINE)
    assert pairs[release.rpartition(".")[0]] == tuple(default)
    (default_with_gpu,) = re.findall(
        r"torch (\S+), that is\n`pip install torchrec==(\S+) fbgemm-gpu==(\S+)`",
        documents.README.read_text(),
    )
    release, *pair = default_with_gpu
    assert pairs[release] == tuple(pair)
