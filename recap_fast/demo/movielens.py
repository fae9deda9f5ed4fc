"""MovieLens-100K: find or download its three files, check them, read them.

The data set (Harper and Konstan, https://doi.org/10.1145/2827872) ships inside the wheel of
recbole 1.2.1 as tab-separated text. The wheel is opened as a zip archive, never imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from recap_fast.demo.errors import DemoError

REQUIREMENT: Final = "recbole==1.2.1"
WHEEL_FOLDER: Final = "recbole/dataset_example/ml-100k"
NUM_ROWS: Final = {"ml-100k.inter": 100_000, "ml-100k.user": 943, "ml-100k.item": 1_682}


@dataclass(frozen=True)
class Ratings:
    """Ratings with the features of their users and items; ids are indices from 0.

    Attributes:
        user, item, rating, timestamp: one entry per rating, int64; rating is 1 to 5, timestamp in
            seconds since 1970, UTC.
        age, gender, occupation: one entry per user, int64; age in years.
        year: release year of each item, float64, NaN where unknown.
        genres: whether each item has each genre, bool, `[items, genres]`.
    """

    user: np.ndarray
    item: np.ndarray
    rating: np.ndarray
    timestamp: np.ndarray
    age: np.ndarray
    gender: np.ndarray
    occupation: np.ndarray
    year: np.ndarray
    genres: np.ndarray


def cache_dir() -> Path:
    """The user's cache folder for the files: `$XDG_CACHE_HOME` or `~/.cache`, then our own."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification says to ignore a relative path.
    return (base if base.is_absolute() else Path.home() / ".cache") / "recap_fast" / "ml-100k"


def read(directory: Path | None = None) -> Ratings:
    """Reads the three files from `directory`, or from the cache, which is filled if need be.

    Raises:
        DemoError: a file is missing, is not what its name says, or cannot be downloaded.
    """
    if directory is not None:
        return _parse(directory)
    cached = cache_dir()
    if not all((cached / name).is_file() for name in NUM_ROWS):
        _download(cached)
    return _parse(cached)


def _download(target: Path) -> None:
    """Puts the three files into `target`; each appears there whole and checked, or not at all."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="download-", dir=target) as name:
            scratch = Path(name)
            with zipfile.ZipFile(_download_wheel(scratch)) as wheel:
                for file in NUM_ROWS:
                    (scratch / file).write_bytes(wheel.read(f"{WHEEL_FOLDER}/{file}"))
            _parse(scratch)
            for file in NUM_ROWS:
                os.replace(scratch / file, target / file)
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise DemoError(f"cannot put MovieLens-100K into {target}: {error}") from error


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
        f"{', '.join(NUM_ROWS)} from that wheel ({WHEEL_FOLDER}/) on another machine"
        " and pass their folder with --data."
    )


def _parse(directory: Path) -> Ratings:
    users = _read_table(directory / "ml-100k.user", ["user_id", "age", "gender", "occupation"])
    items = _read_table(directory / "ml-100k.item", ["item_id", "release_year", "class"])
    events = _read_table(directory / "ml-100k.inter", ["user_id", "item_id", "rating", "timestamp"])
    genres = [text.split(" ") for text in items["class"]]
    genre_index = _vocabulary(genre for names in genres for genre in names)
    has_genre = np.zeros((len(genres), len(genre_index)), dtype=bool)
    for row, names in enumerate(genres):
        has_genre[row, [genre_index[name] for name in names]] = True
    user_index = {name: row for row, name in enumerate(users["user_id"])}
    item_index = {name: row for row, name in enumerate(items["item_id"])}
    gender_index = _vocabulary(users["gender"])
    occupation_index = _vocabulary(users["occupation"])
    try:
        return Ratings(
            user=np.array([user_index[name] for name in events["user_id"]]),
            item=np.array([item_index[name] for name in events["item_id"]]),
            rating=np.array([int(value) for value in events["rating"]]),
            timestamp=np.array([int(value) for value in events["timestamp"]]),
            age=np.array([int(value) for value in users["age"]]),
            gender=np.array([gender_index[name] for name in users["gender"]]),
            occupation=np.array([occupation_index[name] for name in users["occupation"]]),
            # Two items have words in place of a year.
            year=np.array([float(y) if y.isdigit() else np.nan for y in items["release_year"]]),
            genres=has_genre,
        )
    except (KeyError, ValueError) as error:
        raise DemoError(f"the files in {directory} do not fit together: {error!r}") from error


def _read_table(path: Path, columns: list[str]) -> dict[str, list[str]]:
    """The named columns of one of the three files; the header gives them as `name:type`."""
    remedy = f"; take it from the wheel of {REQUIREMENT} ({WHEEL_FOLDER}/{path.name})"
    try:
        lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DemoError(f"cannot read {path}: {error}{remedy}") from error
    header = [field.split(":")[0] for field in lines[0].split("\t")]
    missing = [name for name in columns if name not in header]
    if missing:
        raise DemoError(f"{path} has no column {', '.join(missing)}{remedy}")
    rows = [line.split("\t") for line in lines[1:]]
    if len(rows) != NUM_ROWS[path.name]:
        expected = NUM_ROWS[path.name]
        raise DemoError(f"{path} has {len(rows)} rows, expected {expected}{remedy}")
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise DemoError(
                f"{path}, line {number}: {len(row)} fields, expected {len(header)}{remedy}"
            )
    return {name: [row[header.index(name)] for row in rows] for name in columns}


def _vocabulary(names: Iterable[str]) -> dict[str, int]:
    return {name: index for index, name in enumerate(sorted(set(names)))}
