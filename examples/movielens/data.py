"""What the model sees: features, labels of the engagement tasks, the split by time, batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torchrec import KeyedJaggedTensor

from . import movielens
from .movielens import Ratings
from .share import WHOLE, Share

TASKS: Final[Mapping[str, Callable[[np.ndarray], np.ndarray]]] = {
    "recap.engagement.is_liked": lambda rating: rating >= 4,
    "recap.engagement.is_loved": lambda rating: rating == 5,
    "recap.engagement.is_disliked": lambda rating: rating <= 2,
}
"""The tasks, and which ratings are their positives."""

DENSE_FEATURES: Final = (
    "user_age",
    "release_year",
    "hour_sin",
    "hour_cos",
    "weekday_sin",
    "weekday_cos",
    "user_past_ratings",
    "user_past_mean",
    "item_past_ratings",
    "item_past_mean",
)
SPARSE_FEATURES: Final = ("user", "item", "occupation", "gender", "age_bucket", "genre")

_AGE_BUCKETS: Final = (18, 25, 35, 45, 50, 56)
# A mean over few past ratings is drawn towards the middle of the scale, as if by five more of them.
_PRIOR_MEAN: Final = 3.5
_PRIOR_COUNT: Final = 5


@dataclass(frozen=True)
class Batch:
    """`B` ratings.

    Attributes:
        dense: float32 `[B, len(DENSE_FEATURES)]`.
        sparse: ids of `SPARSE_FEATURES`; one per rating, but any number of genres.
        labels: float32 `[B, len(TASKS)]`, 0 or 1, columns in the order of `TASKS`.
    """

    dense: torch.Tensor
    sparse: KeyedJaggedTensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(self.dense.to(device), self.sparse.to(device), self.labels.to(device))


class Dataset:
    """Ratings in the order of time, the last ones held out as the test split.

    Features of a rating use only what was known before it: counts and means run over ratings with
    an earlier timestamp. Normalisation takes its mean and deviation from the training split.

    Attributes:
        table_sizes: rows of the embedding table of each sparse feature.
        num_train, num_test: ratings in each split.
    """

    def __init__(self, ratings: Ratings, train_fraction: float = 0.9) -> None:
        """Computes all features.

        Args:
            ratings: in any order.
            train_fraction: part of the ratings to train on, between 0 and 1. Ratings that share
                the timestamp of the first test rating go to the test split too.

        Raises:
            ValueError: `train_fraction` is out of range, or the training split would be empty.
        """
        if not 0.0 < train_fraction < 1.0:
            raise ValueError(f"train_fraction={train_fraction} must be between 0 and 1")
        order = np.argsort(ratings.timestamp, kind="stable")
        user, item, rating, timestamp = (
            column[order]
            for column in (ratings.user, ratings.item, ratings.rating, ratings.timestamp)
        )
        cut = int(len(rating) * train_fraction)
        self.num_train = int(np.searchsorted(timestamp, timestamp[cut])) if cut else 0
        self.num_test = len(rating) - self.num_train
        if self.num_train == 0:
            raise ValueError(
                f"train_fraction={train_fraction} of {len(rating)} ratings leaves none to train on"
            )

        dense = _dense_features(ratings, user, item, rating, timestamp)
        mean, std = dense[: self.num_train].mean(axis=0), dense[: self.num_train].std(axis=0)
        dense = (dense - mean) / np.where(std > 0, std, 1.0)
        age_bucket = np.searchsorted(_AGE_BUCKETS, ratings.age, side="right")
        single = {
            "user": user,
            "item": item,
            "occupation": ratings.occupation[user],
            "gender": ratings.gender[user],
            "age_bucket": age_bucket[user],
        }
        self.table_sizes = {
            "user": len(ratings.age),
            "item": len(ratings.year),
            "occupation": int(ratings.occupation.max()) + 1,
            "gender": int(ratings.gender.max()) + 1,
            "age_bucket": len(_AGE_BUCKETS) + 1,
            "genre": ratings.genres.shape[1],
        }
        self._dense = torch.from_numpy(dense.astype(np.float32))
        self._single_ids = torch.from_numpy(np.stack(list(single.values())).astype(np.int64))
        self._has_genre = torch.from_numpy(ratings.genres)
        labels = np.stack([positive(rating) for positive in TASKS.values()], axis=1)
        self._labels = torch.from_numpy(labels.astype(np.float32))

    def batches(
        self, batch_size: int, seed: int, *, share: Share = WHOLE, start: int = 0
    ) -> Iterator[Batch]:
        """Endless batches of the training split, reshuffled at each pass; a remainder is left out.

        A batch depends on its number, `batch_size` and `seed` only, so that a training that was
        interrupted goes on with the batches that it would have seen.

        Args:
            batch_size: ratings per batch, of all processes together.
            seed: of the order.
            share: which part of each batch to give.
            start: number of the first batch to give, from 0.

        Raises:
            ValueError: `batch_size` is not within 1 and the size of the training split, or cannot
                be divided evenly.
        """
        if not 1 <= batch_size <= self.num_train:
            raise ValueError(
                f"batch_size={batch_size} must be within 1 and {self.num_train},"
                " the number of training ratings"
            )
        share.check(batch_size)
        rows = self._shuffled_rows(batch_size, torch.Generator().manual_seed(seed))
        return (self._batch(share.of(part)) for part in islice(rows, start, None))

    def _shuffled_rows(self, batch_size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
        while True:
            order = torch.randperm(self.num_train, generator=generator)
            yield from order[: self.num_train // batch_size * batch_size].split(batch_size)

    def test_batches(self, batch_size: int, share: Share = WHOLE) -> Iterator[Batch]:
        """The test split once, in the order of time; the last batch may be smaller.

        Of a split that cannot be divided evenly, the last share repeats the last rating.
        """
        rows = share.of(torch.arange(self.num_train, self.num_train + self.num_test))
        return (self._batch(part) for part in rows.split(batch_size))

    def _batch(self, rows: torch.Tensor) -> Batch:
        single = self._single_ids[:, rows]
        has_genre = self._has_genre[single[SPARSE_FEATURES.index("item")]]
        one_each = torch.ones(single.numel(), dtype=torch.int64)
        return Batch(
            dense=self._dense[rows],
            sparse=KeyedJaggedTensor(
                keys=list(SPARSE_FEATURES),
                values=torch.cat([single.flatten(), has_genre.nonzero()[:, 1]]),
                lengths=torch.cat([one_each, has_genre.sum(dim=1)]),
            ),
            labels=self._labels[rows],
        )


def load(directory: Path | str | None = None) -> Dataset:
    """MovieLens-100K from `directory`, or from the user's cache, downloaded on first use.

    Raises:
        DemoError: a file is missing, wrong, or cannot be downloaded.
    """
    return Dataset(movielens.read(None if directory is None else Path(directory)))


def synthetic(rows: int, seed: int) -> Dataset:
    """A made-up data set of the same schema: `rows` ratings of 60 users for 80 items.

    The rating follows from a hidden quality of the user and of the item, so it can be learned.
    """
    num_users, num_items, num_occupations, num_genres = 60, 80, 5, 6
    random = np.random.default_rng(seed)
    user, item = random.integers(num_users, size=rows), random.integers(num_items, size=rows)
    user_quality, item_quality = random.normal(size=num_users), random.normal(size=num_items)
    score = 3.0 + user_quality[user] + item_quality[item] + 0.3 * random.normal(size=rows)
    year = random.integers(1930, 1999, size=num_items).astype(np.float64)
    year[0] = np.nan
    return Dataset(
        Ratings(
            user=user,
            item=item,
            rating=np.clip(np.rint(score), 1, 5).astype(np.int64),
            timestamp=875_000_000 + np.cumsum(random.integers(0, 120, size=rows)),
            age=random.integers(7, 74, size=num_users),
            gender=np.arange(num_users) % 2,
            occupation=np.arange(num_users) % num_occupations,
            year=year,
            genres=np.eye(num_genres, dtype=bool)[random.integers(num_genres, size=num_items)]
            | (random.random((num_items, num_genres)) < 0.2),
        )
    )


def _dense_features(
    ratings: Ratings,
    user: np.ndarray,
    item: np.ndarray,
    rating: np.ndarray,
    timestamp: np.ndarray,
) -> np.ndarray:
    """`DENSE_FEATURES` before normalisation, float64 `[ratings, features]`."""
    year = ratings.year[item]
    hour = timestamp / 3600 % 24 * (2 * np.pi / 24)
    weekday = timestamp // 86_400 % 7 * (2 * np.pi / 7)
    user_count, user_sum = _past(user, timestamp, rating)
    item_count, item_sum = _past(item, timestamp, rating)
    columns = {
        "user_age": ratings.age[user],
        "release_year": np.where(np.isnan(year), np.nanmean(ratings.year), year),
        "hour_sin": np.sin(hour),
        "hour_cos": np.cos(hour),
        "weekday_sin": np.sin(weekday),
        "weekday_cos": np.cos(weekday),
        "user_past_ratings": np.log1p(user_count),
        "user_past_mean": _shrunk_mean(user_count, user_sum),
        "item_past_ratings": np.log1p(item_count),
        "item_past_mean": _shrunk_mean(item_count, item_sum),
    }
    return np.stack([columns[name] for name in DENSE_FEATURES], axis=1).astype(np.float64)


def _past(
    key: np.ndarray, timestamp: np.ndarray, value: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Count and sum of `value` over the rows with the same key and an earlier timestamp."""
    order = np.lexsort((timestamp, key))
    key, timestamp = key[order], timestamp[order]
    sum_before = np.concatenate([[0], np.cumsum(value[order])])
    new_key = np.concatenate([[True], key[1:] != key[:-1]])
    new_time = new_key | np.concatenate([[True], timestamp[1:] != timestamp[:-1]])
    position = np.arange(len(key))
    # For each row, where its key begins and where its run of equal timestamps begins.
    key_start = np.maximum.accumulate(np.where(new_key, position, 0))
    time_start = np.maximum.accumulate(np.where(new_time, position, 0))
    count, total = np.empty_like(position), np.empty_like(sum_before[:-1])
    count[order] = time_start - key_start
    total[order] = sum_before[time_start] - sum_before[key_start]
    return count, total


def _shrunk_mean(count: np.ndarray, total: np.ndarray) -> np.ndarray:
    return (total + _PRIOR_COUNT * _PRIOR_MEAN) / (count + _PRIOR_COUNT)
