from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timezone
from itertools import islice

import numpy as np
import pytest
import torch

from examples.movielens import data, data_files, movielens
from examples.movielens.data import DENSE_FEATURES, SPARSE_FEATURES, TASKS, Batch, Dataset
from examples.movielens.movielens import Ratings


def make_ratings(num: int = 200, seed: int = 0) -> Ratings:
    """Ratings out of order, with many equal timestamps."""
    random = np.random.default_rng(seed)
    return Ratings(
        user=random.integers(5, size=num),
        item=random.integers(4, size=num),
        rating=random.integers(1, 6, size=num),
        timestamp=880_000_000 + 10_007 * random.integers(60, size=num),
        age=np.array([17, 18, 34, 55, 56]),
        gender=np.array([0, 1, 0, 1, 0]),
        occupation=np.array([2, 1, 0, 1, 2]),
        year=np.array([1990.0, np.nan, 1950.0, 1970.0]),
        genres=np.array([[1, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 1]], dtype=bool),
    )


def whole(dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense features and labels of all ratings in the order of time."""
    train = dataset._batch(torch.arange(dataset.num_train))
    (test,) = dataset.test_batches(dataset.num_test)
    return torch.cat([train.dense, test.dense]), torch.cat([train.labels, test.labels])


def equal(first: Batch, second: Batch) -> bool:
    return (
        torch.equal(first.dense, second.dense)
        and torch.equal(first.labels, second.labels)
        and torch.equal(first.sparse.values(), second.sparse.values())
        and torch.equal(first.sparse.lengths(), second.sparse.lengths())
    )


@pytest.mark.parametrize("key_name", ["user", "item"])
def test_past_features_count_earlier_ratings_only(key_name: str) -> None:
    ratings = make_ratings()
    key = getattr(ratings, key_name)
    count, total = data._past(key, ratings.timestamp, ratings.rating)
    for row in range(len(key)):
        earlier = (key == key[row]) & (ratings.timestamp < ratings.timestamp[row])
        assert count[row] == earlier.sum()
        assert total[row] == ratings.rating[earlier].sum()


def test_later_ratings_change_nothing_before_them() -> None:
    ratings = make_ratings()
    late = ratings.timestamp >= np.quantile(ratings.timestamp, 0.9)
    changed = replace(ratings, rating=np.where(late, 6 - ratings.rating, ratings.rating))
    before, after = Dataset(ratings, 0.8), Dataset(changed, 0.8)
    num_early = int((~late).sum())
    assert before.num_train < num_early  # so that a part of the test split is covered too
    assert torch.equal(whole(before)[0][:num_early], whole(after)[0][:num_early])
    assert not torch.equal(whole(before)[1], whole(after)[1])


def test_dense_features_are_what_their_names_say() -> None:
    ratings = make_ratings()
    order = np.argsort(ratings.timestamp, kind="stable")
    user, item = ratings.user[order], ratings.item[order]
    features = data._dense_features(
        ratings, user, item, ratings.rating[order], ratings.timestamp[order]
    )
    column = {name: features[:, index] for index, name in enumerate(DENSE_FEATURES)}
    for row in (0, 77, 150):
        time = datetime.fromtimestamp(int(ratings.timestamp[order][row]), tz=timezone.utc)
        hour = 2 * np.pi * (time.hour + time.minute / 60 + time.second / 3600) / 24
        weekday = 2 * np.pi * (time.weekday() - 3) / 7  # 1970 began on a Thursday
        assert column["hour_sin"][row] == pytest.approx(np.sin(hour))
        assert column["hour_cos"][row] == pytest.approx(np.cos(hour))
        assert column["weekday_sin"][row] == pytest.approx(np.sin(weekday), abs=1e-9)
        assert column["weekday_cos"][row] == pytest.approx(np.cos(weekday))
    assert column["user_age"].tolist() == ratings.age[user].tolist()
    unknown = item == 1
    assert column["release_year"][~unknown].tolist() == ratings.year[item[~unknown]].tolist()
    assert column["release_year"][unknown] == pytest.approx((1990 + 1950 + 1970) / 3)
    assert column["item_past_ratings"][0] == 0 and column["item_past_mean"][0] == 3.5


def test_normalisation_uses_the_training_split() -> None:
    dataset = Dataset(make_ratings(), 0.7)
    train = whole(dataset)[0][: dataset.num_train].double()
    assert train.mean(dim=0).tolist() == pytest.approx([0.0] * len(DENSE_FEATURES), abs=1e-6)
    assert train.std(dim=0, unbiased=False).tolist() == pytest.approx([1.0] * len(DENSE_FEATURES))


def test_split_is_by_time_and_never_within_a_timestamp() -> None:
    ratings = make_ratings()
    dataset = Dataset(ratings, 0.9)
    timestamp = np.sort(ratings.timestamp)
    assert dataset.num_train + dataset.num_test == len(timestamp)
    assert timestamp[dataset.num_train - 1] < timestamp[dataset.num_train]
    assert timestamp[dataset.num_train] == timestamp[180]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_split_refuses_a_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(ValueError, match="train_fraction="):
        Dataset(make_ratings(), fraction)


def test_split_refuses_to_train_on_nothing() -> None:
    with pytest.raises(ValueError, match="leaves none to train on"):
        Dataset(make_ratings(), 0.001)


def test_batch_holds_ids_genres_and_labels_of_its_rows() -> None:
    ratings = make_ratings()
    dataset = Dataset(ratings)
    order = np.argsort(ratings.timestamp, kind="stable")
    rows = [3, 150, 0]
    batch = dataset._batch(torch.tensor(rows))
    ids = {name: tensor.to_dense() for name, tensor in batch.sparse.to_dict().items()}
    assert list(ids) == list(SPARSE_FEATURES)
    assert batch.dense.dtype == batch.labels.dtype == torch.float32
    bucket = {17: 0, 18: 1, 34: 2, 55: 5, 56: 6}
    for position, row in enumerate(order[rows]):
        user, item, rating = ratings.user[row], ratings.item[row], ratings.rating[row]
        expected = {
            "user": [user],
            "item": [item],
            "occupation": [ratings.occupation[user]],
            "gender": [ratings.gender[user]],
            "age_bucket": [bucket[int(ratings.age[user])]],
            "genre": np.flatnonzero(ratings.genres[item]).tolist(),
        }
        assert {name: ids[name][position].tolist() for name in ids} == expected
        assert batch.labels[position].tolist() == [rating >= 4, rating == 5, rating <= 2]


def test_ids_fit_their_tables() -> None:
    dataset = data.synthetic(500, seed=0)
    assert list(dataset.table_sizes) == list(SPARSE_FEATURES)
    for batch in islice(dataset.batches(100, seed=0), 4):
        for name, ids in batch.sparse.to_dict().items():
            assert ids.values().min() >= 0 and ids.values().max() < dataset.table_sizes[name]


def test_batches_follow_the_seed_and_cover_the_split_at_each_pass() -> None:
    dataset = data.synthetic(300, seed=0)
    size = dataset.num_train // 3
    first, again, other = (list(islice(dataset.batches(size, seed), 6)) for seed in (5, 5, 6))
    assert all(map(equal, first, again))
    assert not equal(first[0], other[0])
    assert not equal(first[0], first[3])  # reshuffled
    times = torch.cat([batch.dense for batch in first[:3]])
    assert len(times) == 3 * size > dataset.num_train - 3
    assert len(first[0].dense) == size


def test_test_batches_are_the_rest_in_order() -> None:
    dataset = data.synthetic(300, seed=0)
    sizes = [len(batch.labels) for batch in dataset.test_batches(20)]
    assert sum(sizes) == dataset.num_test and set(sizes[:-1]) == {20}


@pytest.mark.parametrize("batch_size", [0, -1, 271])
def test_batches_refuse_an_impossible_size(batch_size: int) -> None:
    dataset = data.synthetic(300, seed=0)
    assert dataset.num_train <= 270
    with pytest.raises(ValueError, match=f"batch_size={batch_size} must be within 1 and"):
        dataset.batches(batch_size, seed=0)


def test_synthetic_follows_its_seed_and_has_both_labels_of_every_task() -> None:
    first, again, other = (data.synthetic(400, seed) for seed in (1, 1, 2))
    assert torch.equal(whole(first)[0], whole(again)[0])
    assert not torch.equal(whole(first)[1], whole(other)[1])
    positives = whole(first)[1].mean(dim=0)
    assert len(positives) == len(TASKS) and (positives > 0.02).all() and (positives < 0.98).all()


def test_the_real_data_set() -> None:
    if not all((data_files.cache_dir() / name).is_file() for name in data_files.SHA256):
        pytest.skip("MovieLens-100K is not in the cache; `make demo` downloads it")
    ratings = movielens.read()
    # Figures of the README that comes with MovieLens-100K.
    assert len(ratings.rating) == 100_000
    assert len(set(ratings.user)) == len(ratings.age) == 943
    assert len(set(ratings.item)) == len(ratings.year) == 1682
    assert np.bincount(ratings.rating).tolist() == [0, 6110, 11370, 27145, 34174, 21201]
    assert ratings.genres.shape[1] == 19 and ratings.occupation.max() == 20
    assert ratings.gender.tolist().count(0) == 273
