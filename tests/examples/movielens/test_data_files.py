from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import zipfile
from pathlib import Path

import pytest

from examples.movielens import data_files
from examples.movielens.errors import DemoError

CONTENTS = {
    "ml-100k.inter": b"of the ratings\n",
    "ml-100k.user": b"of the users\n",
    "ml-100k.item": b"of the items \xc3\xa9\n",
}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Expects CONTENTS, and a cache under tmp_path."""
    expected = {name: sha256(content) for name, content in CONTENTS.items()}
    monkeypatch.setattr(data_files, "SHA256", expected)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def cached(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "recap_fast" / "ml-100k"


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """Makes `pip download` produce a wheel with CONTENTS; gets the commands that it ran."""
    wheel = tmp_path / "recbole-1.2.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in CONTENTS.items():
            archive.writestr(f"recbole/dataset_example/ml-100k/{name}", content)
    monkeypatch.setattr(data_files, "WHEEL_SHA256", sha256(wheel.read_bytes()))
    commands = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        destination = next(word for word in command if word.startswith("--dest="))[7:]
        (Path(destination) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "WARNING: something harmless")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def write_files(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, content in CONTENTS.items():
        (folder / name).write_bytes(content)
    return folder


def test_files_in_a_folder(tmp_path: Path) -> None:
    assert data_files.read(write_files(tmp_path / "data")) == CONTENTS


@pytest.mark.parametrize("name", CONTENTS)
def test_a_wrong_file_in_a_folder_is_named(tmp_path: Path, name: str) -> None:
    folder = write_files(tmp_path / "data")
    (folder / name).write_bytes(CONTENTS[name].replace(b"of", b"if"))
    said = rf"{folder / name} is not the file of .* another sha256; take it from .*ml-100k/{name}"
    with pytest.raises(DemoError, match=said):
        data_files.read(folder)
    (folder / name).unlink()
    with pytest.raises(DemoError, match=f"cannot read {folder / name}: No such file"):
        data_files.read(folder)
    assert not (folder / name).exists(), "a folder of the user's is not written to"


def test_downloads_once_into_the_cache(
    cached: Path, downloads: list[list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    assert data_files.read() == data_files.read() == CONTENTS
    assert len(downloads) == 1
    assert {"--no-deps", "recbole==1.2.1"} <= set(downloads[0])
    assert {path.name: path.read_bytes() for path in cached.iterdir()} == CONTENTS
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("how", ["changed", "cut", "missing", "a link to nothing", "a folder"])
def test_a_damaged_cache_heals(
    cached: Path, downloads: list[list[str]], capfd: pytest.CaptureFixture[str], how: str
) -> None:
    file = write_files(cached) / "ml-100k.user"
    content = file.read_bytes()
    file.unlink()
    if how == "a link to nothing":
        file.symlink_to(cached / "nothing")
    elif how == "a folder":
        file.mkdir()
    elif how != "missing":
        file.write_bytes(content[:-1] if how == "cut" else content[::-1])
    assert data_files.read() == CONTENTS
    assert f"{file}" in capfd.readouterr().err
    if how != "a folder":  # which is not removed
        assert data_files.read() == CONTENTS
        assert len(downloads) == 1 and capfd.readouterr().err == ""


def test_others_may_read_the_cache(cached: Path, downloads: list[list[str]]) -> None:
    before = os.umask(0o077)
    try:
        data_files.read()
    finally:
        os.umask(before)
    for path in (cached, cached.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o755
    for name in CONTENTS:
        assert stat.S_IMODE((cached / name).stat().st_mode) == 0o644


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_another_user_reads_the_cache(downloads: list[list[str]], tmp_path: Path) -> None:
    """And downloads by itself, where it cannot: of root's home, for one."""
    data_files.read()
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(0o755)
    for mode, count in ((0o755, 1), (0o700, 2)):
        (tmp_path / "cache").chmod(mode)
        os.seteuid(65534)
        try:
            assert data_files.read() == CONTENTS
        finally:
            os.seteuid(0)
        assert len(downloads) == count


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, downloads: list[list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").write_text("a file in the way")
    assert data_files.read() == CONTENTS
    assert f"cannot keep the data set in {tmp_path / 'cache'}" in capfd.readouterr().err


def test_another_wheel_is_refused(
    cached: Path, downloads: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_files, "WHEEL_SHA256", sha256(b"another"))
    with pytest.raises(
        DemoError, match=f"has the sha256 .*, not {sha256(b'another')}: check which"
    ):
        data_files.read()
    assert not cached.exists()


def test_a_wheel_that_is_none(
    downloads: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "recbole-1.2.1-py3-none-any.whl").write_bytes(b"no archive")
    monkeypatch.setattr(data_files, "WHEEL_SHA256", sha256(b"no archive"))
    with pytest.raises(DemoError, match="cannot unpack MovieLens-100K: File is not a zip file"):
        data_files.read()


def test_offline_says_what_was_tried_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "WARNING: Retrying\nERROR: No matching distribution found for recbole==1.2.1\n"
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", said)
    )
    with pytest.raises(DemoError) as caught:
        data_files.read()
    message = str(caught.value)
    assert "pip download --no-deps recbole==1.2.1" in message
    assert "No matching distribution found" in message and "Retrying" not in message
    assert "--data" in message and "ml-100k.inter" in message


def test_a_relative_cache_home_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/folder")
    assert data_files.cache_dir() == Path.home() / ".cache" / "recap_fast" / "ml-100k"


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(DemoError, match="no place for the data set: set XDG_CACHE_HOME, or HOME"):
        data_files.read()
