"""MovieLens-100K as arrays."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import data_files


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


def read(directory: Path | None = None) -> Ratings:
    """Reads the three files from `directory`, or from the cache, which is filled if need be.

    Raises:
        DemoError: a file is missing, is not what its name says, or cannot be downloaded.
    """
    contents = data_files.read(directory)
    users = _table(contents["ml-100k.user"])
    items = _table(contents["ml-100k.item"])
    events = _table(contents["ml-100k.inter"])
    genres = [text.split(" ") for text in items["class"]]
    genre_index = _vocabulary(genre for names in genres for genre in names)
    has_genre = np.zeros((len(genres), len(genre_index)), dtype=bool)
    for row, names in enumerate(genres):
        has_genre[row, [genre_index[name] for name in names]] = True
    user_index = {name: row for row, name in enumerate(users["user_id"])}
    item_index = {name: row for row, name in enumerate(items["item_id"])}
    gender_index = _vocabulary(users["gender"])
    occupation_index = _vocabulary(users["occupation"])
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


def _table(content: bytes) -> dict[str, list[str]]:
    """The columns of one of the three files; the header gives their names as `name:type`."""
    header, *rows = (line.split("\t") for line in content.decode().rstrip("\n").split("\n"))
    names = [field.split(":")[0] for field in header]
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))


def _vocabulary(names: Iterable[str]) -> dict[str, int]:
    return {name: index for index, name in enumerate(sorted(set(names)))}
