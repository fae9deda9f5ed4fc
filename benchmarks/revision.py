"""Builds the recap_fast of another revision, beside the work tree's."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch


class CannotBuild(RuntimeError):
    """There is no such revision, or it does not build; the message says which."""


def _git(repository: Path, *arguments: str) -> bytes:
    done = subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True)
    if done.returncode != 0:
        raise CannotBuild(f"git {' '.join(arguments)}: {done.stderr.decode().strip()}")
    return done.stdout


def commit_of(repository: Path, revision: str) -> str:
    """The full hash of a branch, a tag or anything else that git calls a revision.

    Raises:
        CannotBuild: git knows no such revision.
    """
    return _git(repository, "rev-parse", "--verify", f"{revision}^{{commit}}").decode().strip()


def export(repository: Path, commit: str, folder: Path) -> None:
    """Writes the files of `commit` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    archive = _git(repository, "archive", commit)
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)


def build(repository: Path, commit: str, builds: Path) -> Path:
    """Compiles `commit` for this Python and torch, without network.

    Args:
        repository: a git work tree.
        commit: the full hash.
        builds: where builds are kept; one that is there is used again.

    Returns:
        The folder that holds the package recap_fast.

    Raises:
        CannotBuild: it does not build.
    """
    kept = builds / f"{commit[:12]}-{sys.implementation.cache_tag}-torch{torch.__version__}"
    if kept.exists():
        return kept
    builds.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=builds) as temporary:
        source, target = Path(temporary) / "source", Path(temporary) / "target"
        export(repository, commit, source)
        command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps"]
        command += ["--no-build-isolation", "--target", str(target), str(source)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            raise CannotBuild(f"{commit[:12]} does not build:\n{done.stdout}")
        os.replace(target, kept)
    return kept
