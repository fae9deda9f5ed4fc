from __future__ import annotations

import pytest
import torch

from examples.movielens import data
from examples.movielens.share import WHOLE, Share


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("count", [1, 2, 12, 13])
def test_shares_are_equally_long_and_begin_with_everything(count: int, processes: int) -> None:
    rows = torch.arange(100, 100 + count)
    parts = [Share(rank, processes).of(rows) for rank in range(processes)]
    assert len({len(part) for part in parts}) == 1 and len(parts[0]) >= 1
    joined = torch.cat(parts)
    assert torch.equal(joined[:count], rows)
    assert (joined[count:] == rows[-1]).all()
    assert len(joined) < count + processes


def test_shares_of_a_batch_are_the_batch() -> None:
    dataset = data.synthetic(300, seed=0)
    (whole,) = (next(dataset.batches(12, seed=5)),)
    parts = [next(dataset.batches(12, seed=5, share=Share(rank, 3))) for rank in range(3)]
    assert torch.equal(torch.cat([part.dense for part in parts]), whole.dense)
    assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
    for feature in data.SPARSE_FEATURES:
        bags = [bag.tolist() for part in parts for bag in part.sparse[feature].to_dense()]
        assert bags == [bag.tolist() for bag in whole.sparse[feature].to_dense()]


def test_batches_begin_anywhere() -> None:
    dataset = data.synthetic(300, seed=0)  # 22 batches of 12 in each pass
    numbered = dict(zip(range(50), dataset.batches(12, seed=5), strict=False))
    for start in (0, 1, 21, 22, 23, 45):
        first = next(dataset.batches(12, seed=5, start=start))
        assert torch.equal(first.dense, numbered[start].dense)
        assert torch.equal(first.sparse.values(), numbered[start].sparse.values())


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_shares_of_the_test_split_begin_with_all_of_it(processes: int) -> None:
    dataset = data.synthetic(300, seed=0)
    labels = torch.cat(
        [
            batch.labels
            for rank in range(processes)
            for batch in dataset.test_batches(8, Share(rank, processes))
        ]
    )
    whole = torch.cat([batch.labels for batch in dataset.test_batches(1000)])
    assert len(whole) == dataset.num_test
    assert torch.equal(labels[: len(whole)], whole)


def test_refuses_a_batch_that_does_not_divide() -> None:
    WHOLE.check(7)
    Share(0, 2).check(8)
    dataset = data.synthetic(300, seed=0)
    with pytest.raises(ValueError, match="batch_size=10 is not a multiple of the 4 processes"):
        dataset.batches(10, seed=0, share=Share(1, 4))
