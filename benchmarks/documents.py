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


def _read(path: Path) -> tuple[dict[str, Any], str]:
    """The results, and what links call their file."""
    return json.loads(path.read_text()), os.path.relpath(path, ROOT)


def page_of(path: Path) -> str:
    """The page for the results in `path`; of a GPU or a CPU."""
    results, source = _read(path)
    if "card" in results["machine"]:
        return gpu_page.render(results, path.name)
    files = dict.fromkeys([*sorted(RESULTS.glob("*.json")), path])
    with_sparse = [each for each in (_read(file)[0] for file in files) if "sparse" in each]
    figures = page.render(results, source)
    return f"{figures}\n{sparse.section(with_sparse)}" if with_sparse else figures


def readme_of(path: Path, readme: str) -> str:
    """The README with its figures taken from the results in `path`.

    What is lost on other machines, it tells too.
    """
    others = [
        each
        for other in sorted(RESULTS.glob("*.json"))
        if other.name != path.name
        and "measurements" in (each := _read(other)[0])
        and "card" not in each["machine"]
    ]
    return headline.replace(readme, headline.render(*_read(path), others))


def write(path: Path) -> None:
    """Writes everything for the results in `path`.

    Results of a whole run on a CPU are in `benchmarks/results/`; for others the page goes beside
    them, and the README stays as it is.
    """
    whole = path.parent.resolve() == RESULTS.resolve() and "card" not in _read(path)[0]["machine"]
    page_path = PAGE if whole else path.with_suffix(".md")
    written = [page_path]
    page_path.write_text(page_of(path))
    if whole:
        README.write_text(readme_of(path, README.read_text()))
        written.append(README)
        try:
            written.append(pictures.draw_steps(_read(path)[0], BARS))
        except ImportError as error:
            print(f"no picture: {error}", file=sys.stderr)
    for file in written:
        print(f"wrote {file}", file=sys.stderr)
