"""The commands that make an environment, install into it, build there and test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from tools.matrix.pairs import Pair

StepName = Literal["environment", "install", "sources", "build", "test"]

_PIP: Final = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")


@dataclass(frozen=True)
class Places:
    """Where the parts of one pair lie, below the cache folder."""

    folder: Path

    @property
    def environment(self) -> Path:
        return self.folder / "environment"

    @property
    def python(self) -> Path:
        return self.environment / "bin" / "python"

    @property
    def sources(self) -> Path:
        """A clone, so that what is built for one torch does not meet another."""
        return self.folder / "sources"

    @property
    def built(self) -> Path:
        """Says of which commit the build is."""
        return self.folder / "built"

    @property
    def report(self) -> Path:
        """What pytest found, in JUnit's format."""
        return self.folder / "report.xml"

    def log(self, step: StepName) -> Path:
        return self.folder / f"{step}.log"


@dataclass(frozen=True)
class Command:
    """Attributes: the step it belongs to; its words; what it adds to the variables."""

    step: StepName
    words: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)


def commands(
    pair: Pair, places: Places, repository: Path, commit: str, tests: Sequence[str], cuda: str
) -> list[Command]:
    """All that is done for a pair, in order; what is there already is used again.

    Args:
        pair: what to install.
        places: where.
        repository: the git repository that has the commit.
        commit: what to build and test.
        tests: paths for pytest; none for all tests.
        cuda: `RECAP_CUDA` of the build: ON, OFF or AUTO.
    """
    python, sources = str(places.python), str(places.sources)
    torch = f"torch=={pair.torch}"  # named in every installation, lest one replaces it
    requirements = ["-r", f"{sources}/requirements/build.txt"]
    found: list[Command] = []

    def add(step: StepName, *words: str, **variables: str) -> None:
        found.append(Command(step, words, variables))

    if not places.sources.exists():
        add("sources", "git", "init", "--quiet", sources)
    add("sources", "git", "-C", sources, "fetch", "--quiet", str(repository), commit)
    add("sources", "git", "-C", sources, "checkout", "--quiet", "--force", "--detach", commit)
    if not places.python.exists():
        add("environment", pair.python, "-m", "venv", str(places.environment))
    add("install", python, *_PIP, torch)
    if pair.torchrec:
        requirements += ["-r", f"{sources}/requirements/torchrec-cpu.txt"]
    add("install", python, *_PIP, torch, *requirements)
    if pair.torchrec:
        theirs = [f"torchrec=={pair.torchrec}", f"fbgemm-gpu-cpu=={pair.fbgemm}"]
        add("install", python, *_PIP, "--no-deps", *theirs)
    if not _is_built(places, commit):
        words = (torch, "--no-build-isolation", "-e", f"{sources}[demo,test]")
        add("build", python, *_PIP, *words, RECAP_CUDA=cuda)
    options = ("-q", "-p", "no:cacheprovider", "-o", "junit_family=xunit1")
    options += (f"--junitxml={places.report}",)
    add("test", python, "-m", "pytest", *options, *tests)
    return found


def _is_built(places: Places, commit: str) -> bool:
    return places.built.exists() and places.built.read_text() == commit
