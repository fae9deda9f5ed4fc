"""The three files of MovieLens-100K: from a folder, or from the cache, which is filled if need be.

The data set (Harper and Konstan, https://doi.org/10.1145/2827872) ships inside the wheel of
recbole 1.2.1 as tab-separated text. The wheel is opened as a zip archive, never imported.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Final

from .errors import DemoError

REQUIREMENT: Final = "recbole==1.2.1"
WHEEL_FOLDER: Final = "recbole/dataset_example/ml-100k"
WHEEL_SHA256: Final = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
SHA256: Final = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
}


def read(directory: Path | None = None) -> dict[str, bytes]:
    """Returns what the files hold, by name, as their sha256 says.

    Args:
        directory: where they are; None means the user's cache. What is missing or damaged there is
            downloaded again. What cannot be kept there is downloaded each time, with a note.

    Raises:
        DemoError: a file is missing, is not what its name says, or cannot be downloaded.
    """
    if directory is not None:
        return {name: _read(directory / name) for name in SHA256}
    cached = cache_dir()
    if any(os.path.lexists(cached / name) for name in SHA256):
        try:
            return {name: _read(cached / name) for name in SHA256}
        except DemoError as error:
            _note(f"{str(error).partition(';')[0]}: downloading the data set again")
    contents = _download()
    try:
        _keep(cached, contents)
    except OSError as error:
        _note(f"cannot keep the data set in {cached}, for the next time: {error}")
    return contents


def cache_dir() -> Path:
    """The user's cache folder for the files: `$XDG_CACHE_HOME` or `~/.cache`, then our own.

    Raises:
        DemoError: The user has no home.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        # The XDG specification says to ignore a relative path.
        base = base if base.is_absolute() else Path.home() / ".cache"
    except RuntimeError as error:
        raise DemoError(
            f"no place for the data set: set XDG_CACHE_HOME, or HOME ({error})"
        ) from error
    return base / "recap_fast" / "ml-100k"


def _read(path: Path) -> bytes:
    remedy = f"; take it from the wheel of {REQUIREMENT} ({WHEEL_FOLDER}/{path.name})"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DemoError(f"cannot read {path}: {error.strerror}{remedy}") from error
    if hashlib.sha256(content).hexdigest() != SHA256[path.name]:
        raise DemoError(
            f"{path} is not the file of MovieLens-100K, its {len(content)} bytes have another"
            f" sha256{remedy}"
        )
    return content


def _keep(target: Path, contents: dict[str, bytes]) -> None:
    """Puts files into a folder, where others may read them; each appears whole."""
    for folder in (target.parent, target):
        if not folder.exists():
            folder.mkdir(parents=True)
            folder.chmod(0o755)
    for name, content in contents.items():
        new = target / f".{name}-{os.getpid()}"
        try:
            new.write_bytes(content)
            new.chmod(0o644)
            os.replace(new, target / name)
        except OSError:
            with contextlib.suppress(OSError):
                new.unlink()
            raise


def _download() -> dict[str, bytes]:
    try:
        with tempfile.TemporaryDirectory(prefix="recap_fast-") as scratch:
            wheel = _download_wheel(Path(scratch))
            sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
            if sha256 != WHEEL_SHA256:
                raise DemoError(
                    f"the wheel of {REQUIREMENT} that pip downloaded has the sha256 {sha256}, not"
                    f" {WHEEL_SHA256}: check which package index pip uses (`pip config list`)"
                )
            with zipfile.ZipFile(wheel) as archive:
                return {name: archive.read(f"{WHEEL_FOLDER}/{name}") for name in SHA256}
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise DemoError(f"cannot unpack MovieLens-100K: {error}") from error


def _download_wheel(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--retries=2", f"--dest={scratch}", REQUIREMENT]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(scratch.glob("*.whl"))
    if result.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    said = [line for line in (result.stderr + result.stdout).splitlines() if line.strip()]
    errors = [line for line in said if line.startswith("ERROR")] or said
    raise DemoError(
        f"cannot download MovieLens-100K: `pip download --no-deps {REQUIREMENT}` failed"
        f" ({errors[-1].strip() if errors else 'no output'}).\n"
        "Connect to a package index and run again, or take the files "
        f"{', '.join(SHA256)} from that wheel ({WHEEL_FOLDER}/) on another machine"
        " and pass their folder with --data."
    )


def _note(text: str) -> None:
    print(f"movielens: {text}", file=sys.stderr)
