from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest

from recap_fast.demo import movielens
from recap_fast.demo.errors import DemoError

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


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Expects the rows of FILES, and a cache under tmp_path."""
    rows = {name: text.count("\n") - 1 for name, text in FILES.items()}
    monkeypatch.setattr(movielens, "NUM_ROWS", rows)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_files(directory: Path, **replaced: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in FILES.items():
        (directory / name).write_text(replaced.get(name.split(".")[1], text), encoding="utf-8")
    return directory


def fake_pip(monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> list[list[str]]:
    """Makes `pip download` produce a wheel with these files; returns the commands that it ran."""
    commands = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        destination = next(word for word in command if word.startswith("--dest="))[7:]
        with zipfile.ZipFile(Path(destination) / "recbole-1.2.1-py3-none-any.whl", "w") as wheel:
            for name, text in files.items():
                wheel.writestr(f"recbole/dataset_example/ml-100k/{name}", text)
        return subprocess.CompletedProcess(command, 0, "", "WARNING: something harmless")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_reads_the_three_files(tmp_path: Path) -> None:
    ratings = movielens.read(write_files(tmp_path))
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


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("inter", FILES["ml-100k.inter"] + "7\t20\t5\t400\n", "ml-100k.inter has 4 rows, expected"),
        ("user", "", "ml-100k.user has no column user_id, age, gender, occupation"),
        (
            "item",
            FILES["ml-100k.item"].replace("class", "kind"),
            "ml-100k.item has no column class",
        ),
        ("user", FILES["ml-100k.user"].replace("\t94043", ""), "ml-100k.user, line 3: 4 fields"),
        ("inter", FILES["ml-100k.inter"].replace("9\t10", "8\t10"), "do not fit together: .*'8'"),
        ("inter", FILES["ml-100k.inter"].replace("\t5\t", "\tfive\t"), "do not fit .*'five'"),
    ],
)
def test_refuses_a_wrong_file_by_name(tmp_path: Path, kind: str, text: str, message: str) -> None:
    with pytest.raises(DemoError, match=message):
        movielens.read(write_files(tmp_path, **{kind: text}))


def test_refuses_a_missing_file_by_name(tmp_path: Path) -> None:
    (write_files(tmp_path) / "ml-100k.user").unlink()
    with pytest.raises(DemoError, match=r"cannot read .*ml-100k\.user"):
        movielens.read(tmp_path)


def test_downloads_once_into_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    commands = fake_pip(monkeypatch, FILES)
    first, second = movielens.read(), movielens.read()
    assert len(commands) == 1
    assert {"--no-deps", "recbole==1.2.1"} <= set(commands[0])
    cached = tmp_path / "cache" / "recap_fast" / "ml-100k"
    assert sorted(path.name for path in cached.iterdir()) == sorted(FILES)
    assert first.rating.tolist() == second.rating.tolist() == [5, 1, 3]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "files",
    [
        {**FILES, "ml-100k.user": "user_id:token\n"},
        {name: FILES[name] for name in ("ml-100k.inter", "ml-100k.user")},
    ],
    ids=["wrong file", "missing file"],
)
def test_a_bad_download_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str]
) -> None:
    fake_pip(monkeypatch, files)
    with pytest.raises(DemoError, match=r"ml-100k\.(user|item)"):
        movielens.read()
    assert list((tmp_path / "cache" / "recap_fast" / "ml-100k").iterdir()) == []


def test_offline_says_what_was_tried_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "WARNING: Retrying\nERROR: No matching distribution found for recbole==1.2.1\n"
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", said)
    )
    with pytest.raises(DemoError) as caught:
        movielens.read()
    message = str(caught.value)
    assert "pip download --no-deps recbole==1.2.1" in message
    assert "No matching distribution found" in message and "Retrying" not in message
    assert "--data" in message and "ml-100k.inter" in message


def test_an_unwritable_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in the way")
    with pytest.raises(DemoError, match=r"cannot put MovieLens-100K into .*cache"):
        movielens.read()


def test_a_relative_cache_home_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/folder")
    assert movielens.cache_dir() == Path.home() / ".cache" / "recap_fast" / "ml-100k"
