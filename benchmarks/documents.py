"""Writes what shows a results file: `docs/performance.md`, the README's figures and picture."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, Final

from benchmarks import gpu_page, headline, page, pictures, sparse

ROOT: Final = Path(__file__).parent.parent
RESULTS: Final = ROOT / "benchmarks" / "results"
PAGE: Final = ROOT / "docs" / "performance.md"
README: Final = ROOT / "README.md"
BARS: Final = ROOT / "docs" / "time-per-step.png"


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _committed() -> dict[Path, dict[str, Any]]:
    return {file: _read(file) for file in sorted(RESULTS.glob("*.json"))}


def page_of(path: Path) -> str:
    """The page for the results in `path`; of a GPU or a CPU."""
    results = _read(path)
    if "card" in results["machine"]:
        return gpu_page.render(results, path.name)
    of_all = (_committed() | {path: results}).values()
    with_sparse = [each for each in of_all if "sparse" in each]
    figures = page.render(results, os.path.relpath(path, ROOT))
    return f"{figures}\n{sparse.section(with_sparse)}" if with_sparse else figures


def readme_of(path: Path, readme: str) -> str:
    """The README with its figures taken from the results in `path`.

    What is lost on other machines, it tells too.
    """
    others = [
        each
        for file, each in _committed().items()
        if file.name != path.name and "measurements" in each and "card" not in each["machine"]
    ]
    block = headline.render(_read(path), os.path.relpath(path, ROOT), others)
    return headline.replace(readme, block)


def write(path: Path) -> None:
    """Writes everything for the results in `path`.

    Results of a whole run on a CPU are in `benchmarks/results/`; for others the page goes beside
    them, and the README stays as it is.
    """
    results = _read(path)
    whole = path.parent.resolve() == RESULTS.resolve() and "card" not in results["machine"]
    written = [PAGE if whole else path.with_suffix(".md")]
    written[0].write_text(page_of(path))
    if whole:
        README.write_text(readme_of(path, README.read_text()))
        written.append(README)
        try:
            written.append(pictures.draw_steps(results, BARS))
        except ImportError as error:
            print(f"no picture: {error}", file=sys.stderr)
    print(*(f"wrote {file}" for file in written), sep="\n", file=sys.stderr)
