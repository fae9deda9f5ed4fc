from __future__ import annotations

import numpy as np
import pytest

from examples.movielens import data_files, movielens

FILES = {
    "ml-100k.inter": (
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        "7\t20\t5\t300\n9\t10\t1\t100\n7\t10\t3\t200\n"
    ),
    "ml-100k.user": (
        "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
        "7\t24\tM\twriter\t85711\n9\t53\tF\tartist\t94043\n"
    ),
    "ml-100k.item": (
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        "10\tSeven \x1c Samurai\t1954\tDrama Action\n20\tunkonwn\tunkonwn\tunknown\n"
    ),
}


def test_reads_the_three_files(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {name: text.encode() for name, text in FILES.items()}
    monkeypatch.setattr(data_files, "read", lambda directory: contents)
    ratings = movielens.read()
    assert ratings.user.tolist() == [0, 1, 0]
    assert ratings.item.tolist() == [1, 0, 0]
    assert ratings.rating.tolist() == [5, 1, 3]
    assert ratings.timestamp.tolist() == [300, 100, 200]
    assert ratings.age.tolist() == [24, 53]
    assert ratings.gender.tolist() == [1, 0]  # F, M
    assert ratings.occupation.tolist() == [1, 0]  # artist, writer
    assert ratings.year[0] == 1954 and np.isnan(ratings.year[1])
    # Action, Drama, unknown
    assert ratings.genres.tolist() == [[True, True, False], [False, False, True]]
