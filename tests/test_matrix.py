"""The tool that tests other releases: what it would run, what it reads, the page that it writes."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.native_build import ROOT
from tools.matrix import page, pairs, results
from tools.matrix.__main__ import PAGE, RESULTS, main
from tools.matrix.commands import Places, commands
from tools.matrix.pairs import Pair
from tools.matrix.results import Result

HERE = "{}.{}".format(*sys.version_info)


def _pair(**changes: str | None) -> Pair:
    pair = Pair("2.14.1", "1.9.2", "1.9.0", "python3.12", "3.12")
    return dataclasses.replace(pair, **changes)


def _result(**changes: object) -> Result:
    result = Result(
        python="3.12.1",
        torch="2.14.1",
        torchrec="1.9.2",
        fbgemm="1.9.0",
        tests=[],
        outcome="tested",
        commit="abcdef123",
        date="2026-01-01",
        machine="a processor, 2 cores",
        passed=1234,
    )
    return dataclasses.replace(result, **changes)


# --- pairs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2.15.0", ("2.15.0", None, None)),
        ("2.14.1/1.9.2/1.9.0", ("2.14.1", "1.9.2", "1.9.0")),
        (f"2.13.0/1.8.0/1.8.0@{sys.executable}", ("2.13.0", "1.8.0", "1.8.0")),
    ],
)
def test_a_pair_is_read(text: str, expected: tuple[str | None, ...]) -> None:
    pair = pairs.parse(text)
    assert (pair.torch, pair.torchrec, pair.fbgemm) == expected
    assert (pair.python, pair.python_release) == (sys.executable, HERE)


@pytest.mark.parametrize("text", ["", "2.14.1/1.9.2", "2.14.1/1.9.2/1.9.0/1", "torch 2.14.1"])
def test_what_is_no_pair_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=rf"{re.escape(repr(text))} is not TORCH\[/TORCHREC/"):
        pairs.parse(text)


def test_an_interpreter_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(pairs.NoSuchPython, match=rf"interpreter {tmp_path}/python: "):
        pairs.parse(f"2.15.0@{tmp_path}/python")
    with pytest.raises(pairs.NoSuchPython, match="interpreter false: "):
        pairs.parse("2.15.0@false")


# --- what is run ---------------------------------------------------------------------------------


def _commands(pair: Pair, folder: Path, *tests: str) -> list[tuple[str, str]]:
    made = commands(pair, Places(folder), Path("/repository"), "c0ffee", tests, "OFF")
    return [
        (each.step, " ".join([*(f"{k}={v}" for k, v in each.variables.items()), *each.words]))
        for each in made
    ]


def test_a_fresh_pair_is_installed_built_and_tested(tmp_path: Path) -> None:
    made = _commands(_pair(), tmp_path, "tests/optim")
    order = list(dict.fromkeys(step for step, _ in made))
    assert order == ["sources", "environment", "install", "build", "test"]
    said = [words.replace(str(tmp_path), "F") for _, words in made]
    assert "git -C F/sources checkout --quiet --force --detach c0ffee" in said
    assert "python3.12 -m venv F/environment" in said
    pip = "F/environment/bin/python -m pip install --quiet --disable-pip-version-check"
    assert f"{pip} torch==2.14.1" in said
    assert f"{pip} --no-deps torchrec==1.9.2 fbgemm-gpu-cpu==1.9.0" in said
    assert (
        f"RECAP_CUDA=OFF {pip} torch==2.14.1 --no-build-isolation -e F/sources[demo,test]" in said
    )
    assert said[-1].endswith("-o junit_family=xunit1 --junitxml=F/report.xml tests/optim")


def test_without_torchrec_nothing_of_it_is_installed() -> None:
    made = _commands(_pair(torchrec=None, fbgemm=None), Path("/nowhere"))
    assert not [words for _, words in made if "torchrec" in words or "fbgemm" in words]


def test_what_is_there_is_used_again(tmp_path: Path) -> None:
    places = Places(tmp_path)
    places.sources.mkdir()
    places.python.parent.mkdir(parents=True)
    places.python.touch()
    places.built.write_text("c0ffee")
    steps = [step for step, _ in _commands(_pair(), tmp_path)]
    assert "environment" not in steps and "build" not in steps
    assert steps.count("sources") == 2
    places.built.write_text("another commit")
    assert "build" in [step for step, _ in _commands(_pair(), tmp_path)]


def test_pairs_have_folders_of_their_own() -> None:
    every = [_pair(), _pair(python_release="3.11"), _pair(torch="2.15.0"), _pair(fbgemm="1.9.1")]
    assert len({pair.name for pair in every}) == len(every)


def test_a_dry_run_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page_before = PAGE.read_bytes()
    some = ["--tests", "tests/optim", "--tests", "tests/test_native.py"]
    every = ["2.15.0", "2.13.0/1.8.0/1.8.0"]
    assert main(["--dry-run", "--cache", str(tmp_path), *some, *every]) == 0
    said = capsys.readouterr().out
    for torch in ("2.15.0", "2.13.0"):
        assert f"pip install --quiet --disable-pip-version-check torch=={torch}\n" in said
    assert said.count(" tests/optim tests/test_native.py\n") == 2
    assert not list(tmp_path.iterdir())
    assert PAGE.read_bytes() == page_before


# --- what is read --------------------------------------------------------------------------------

_TESTS = {
    "test_some.py": """\
import pytest

def test_passes(): pass

def test_fails(): assert False

@pytest.fixture
def broken():
    yield
    raise ValueError

def test_fails_twice(broken): assert False

def test_is_skipped(): pytest.skip("here")
""",
    "test_needs_torchrec.py": "import torchrec_of_nobody.optim\n",
    "test_is_told_what_to_install.py": """\
try:
    import torchrec_of_nobody
except ImportError as error:
    raise ImportError("install torchrec_of_nobody") from error
""",
    "test_is_broken.py": "import another_of_nobody\n",
}


def test_a_report_is_counted(tmp_path: Path) -> None:
    for name, text in _TESTS.items():
        (tmp_path / name).write_text(text)
    # What the tests' own conftest does, with a package that is missing everywhere.
    ours = (ROOT / "tests" / "conftest.py").read_text()
    (tmp_path / "conftest.py").write_text(ours.replace('"torchrec"', '"torchrec_of_nobody"'))
    report = tmp_path / "report.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-o",
        "junit_family=xunit1",
        f"--junitxml={report}",
        "-c",
        "/dev/null",
    ]
    options = ["--rootdir", str(tmp_path), "--continue-on-collection-errors", "."]
    done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True)
    assert "2 skipped: could not import 'torchrec_of_nobody'" in done.stdout, done.stdout
    found = results.read_report(report)
    assert (found["passed"], found["skipped"], found["left_out"]) == (1, 1, 2), done.stdout
    named = ["test_is_broken", "test_some::test_fails", "test_some::test_fails_twice"]
    assert sorted(found["failed"]) == named


def test_results_survive_being_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    assert results.read(path) == []
    every = [_result(), _result(torchrec=None, fbgemm=None, failed=["a::b"], left_out=3)]
    results.write(path, every)
    assert results.read(path) == every
    assert len(path.read_text().splitlines()) == 2 + len(every)


def test_a_new_result_takes_the_place_of_its_own_pair_only() -> None:
    old, other = _result(passed=1), _result(torch="2.15.0", torchrec=None, fbgemm=None)
    new = _result(passed=2)
    assert results.merge([old, other], new) == [other, new]


def test_some_tests_do_not_take_the_place_of_all() -> None:
    every, some = _result(passed=9), _result(passed=1, tests=["tests/optim"])
    again = _result(passed=2, tests=["tests/optim"])
    assert results.merge([every], some) == [every, some]
    assert results.merge([every, some], again) == [every, again]
    assert results.merge([every, again], every) == [every]


def test_the_newest_torch_comes_first() -> None:
    found: list[Result] = []
    for release in ("2.9.1", "2.15.0", "2.13.0+cpu", "2.14.1"):
        found = results.merge(found, _result(torch=release))
    assert [each.torch for each in found] == ["2.15.0", "2.14.1", "2.13.0+cpu", "2.9.1"]


# --- the page ------------------------------------------------------------------------------------


def test_the_page_shows_what_ran() -> None:
    rows = [
        _result(torch="2.15.0", torchrec=None, fbgemm=None, left_out=28, tests=["tests/optim"]),
        _result(skipped=44),
    ]
    text = page.render(rows, "x.json")
    assert "from `x.json`" in text and "- Run on" not in text
    alone, whole = (line for line in text.splitlines() if line.startswith("| 2.1"))
    assert alone == (
        "| 2.15.0 | - | 3.12.1 | `tests/optim` | 1234 | 0 | 0 | 28 | abcdef123 | 2026-01-01 |"
    )
    assert whole == (
        "| 2.14.1 | 1.9.2 / 1.9.0 | 3.12.1 | all | 1234 | 0 | 44 | 0 | abcdef123 | 2026-01-01 |"
    )
    assert text.count("* a processor, 2 cores\n") == 1
    assert "No test failed." in text


def test_the_page_shows_what_failed() -> None:
    rows = [
        _result(failed=["tests.test_a::test_one"]),
        _result(torch="2.16.0", outcome="build failed", passed=0, machine=""),
    ]
    text = page.render(rows, "x.json")
    assert "1 failure with torch 2.14.1, torchrec 1.9.2, Python 3.12.1 (all):" in text
    assert "* `tests.test_a::test_one`" in text
    assert "| 2.16.0 | 1.9.2 / 1.9.0 | 3.12.1 | all | **build failed** | - | - |" in text


def test_the_committed_page_shows_the_committed_results() -> None:
    source = RESULTS.relative_to(ROOT)
    assert PAGE.read_text() == page.render(results.read(RESULTS), str(source))


def test_what_setup_calls_tested_was_tested() -> None:
    (newest,) = re.findall(r"^NEWEST_TESTED_TORCH = \((\d+), (\d+)\)", _setup(), re.MULTILINE)
    (oldest,) = re.findall(r"^OLDEST_TORCH = \((\d+), (\d+)\)", _setup(), re.MULTILINE)
    tested = {tuple(each.torch.split(".")[:2]) for each in results.read(RESULTS) if each.passed > 0}
    assert {newest, oldest} <= tested


def _setup() -> str:
    return (ROOT / "setup.py").read_text()
