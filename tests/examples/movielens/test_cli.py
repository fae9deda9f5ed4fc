from __future__ import annotations

import importlib
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from examples.movielens import cli
from recap_fast.torchrec_releases import how_to_install
from tests.support.processes import in_own_process

ROOT = Path(__file__).parents[3]


def test_help_names_every_option_and_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for option in ("--steps", "--batch-size", "--seed", "--nproc", "--threads", "--data", "--out"):
        assert option in text
    assert "MovieLens-100K" in text and "(default: 300)" in text
    assert "(default: None)" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "argument --steps: '0' is not a whole number >= 1"),
        (["--steps", "many"], "argument --steps: 'many' is not a whole number >= 1"),
        (["--batch-size", "0"], "argument --batch-size: '0' is not a whole number >= 1"),
        (["--seed", "-1"], "argument --seed: '-1' is not a whole number >= 0"),
        (["--steps", "9" * 5000], f"argument --steps: '{'9' * 40}...' is not a whole number"),
        (["--steps", str(10**9)], f"'{10**9}' is not a whole number from 1 to 10000000"),
        (["--seed", str(2**64)], f"'{2**64}' is not a whole number from 0 to {2**63 - 1}"),
        (["--batch-size", str(2**70)], f"argument --batch-size: '{2**70}' is not a whole number"),
        (["--threads", "0.5"], "argument --threads: '0.5' is not a whole number >= 1"),
        (["--nproc", "0"], "argument --nproc: '0' is not a whole number >= 1"),
        (["--stepz", "1"], "unrecognized arguments: --stepz 1"),
    ],
)
def test_refuses_wrong_options(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    *_, error = capsys.readouterr().err.splitlines()  # after the usage
    assert message in error and len(error) < 200


@pytest.mark.parametrize("module", ["torchrec", "fbgemm_gpu", "matplotlib", "tqdm"])
def test_a_missing_package_is_one_message(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert cli.main([]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"movielens: the demo needs {module}, which cannot be imported")
    of_pair = module in ("torchrec", "fbgemm_gpu")
    assert (how_to_install() if of_pair else "Run `pip install recap-fast[demo]`") in err


@pytest.mark.parametrize("kind", ["OSError", "RuntimeError", "AttributeError"])
def test_a_package_for_another_torch_is_one_message(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "fbgemm_gpu.py").write_text(f"raise {kind}('Could not load this library: x.so')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fbgemm_gpu", raising=False)
    assert cli.main([]) == 1
    err = capsys.readouterr().err
    assert "needs fbgemm_gpu, which cannot be imported (Could not load this library: x.so)" in err
    assert how_to_install() in err


@pytest.fixture
def synthetic_data(monkeypatch: pytest.MonkeyPatch) -> None:
    from examples.movielens import data

    monkeypatch.setattr(data, "load", lambda directory: data.synthetic(400, seed=0))


@pytest.mark.usefixtures("synthetic_data")
def test_demo_prints_a_table_and_writes_its_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "folder"
    arguments = ["--steps", "2", "--batch-size", "16", "--seed", "4", "--out", str(out)]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    for task in ("is_liked", "is_loved", "is_disliked"):
        assert f"AUC recap.engagement.{task}" in text
    assert "optimizer, ms per step" in text and "largest difference of an element" in text
    assert f"Wrote {out / 'demo.png'} and {out / 'results.json'}." in text
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((out / "results.json").read_text())
    assert results["settings"] == {"steps": 2, "batch_size": 16, "seed": 4}
    assert list(results["runs"]) == ["recap_fast", "reference"]
    # A wrong learning rate would be off by 1e-4 or more.
    assert results["comparison"]["difference"]["absolute"] < 1e-6


def main_by_forks(arguments: list[str], output: str) -> int:
    """In a process of its own: what all processes print goes to the file `output`."""
    from examples.movielens import data
    from tests.examples.movielens.test_launch import fork_instead

    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), sys.stdout.fileno())
    data.load = lambda directory: data.synthetic(400, seed=0)
    fork_instead()
    status = cli.main(arguments)
    sys.stdout.flush()
    return status


def test_two_processes_give_the_table_of_one(tmp_path: Path) -> None:
    results = {}
    for nproc in ("1", "2"):
        out, printed = tmp_path / nproc, tmp_path / "printed"
        arguments = ["--steps", "5", "--batch-size", "16", "--nproc", nproc, "--out", str(out)]
        assert in_own_process(main_by_forks, arguments, str(printed)) == 0
        assert printed.read_text().count("AUC recap.engagement.is_liked") == 1
        printed.unlink()
        assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
        results[nproc] = json.loads((out / "results.json").read_text())
    assert results["2"]["settings"] == {**results["1"]["settings"], "nproc": 2}
    for name, run in results["2"]["runs"].items():
        expected = results["1"]["runs"][name]
        assert run["learning_rates"] == expected["learning_rates"]
        for task, losses in expected["losses"].items():
            # float32 rounding, of sums in another order
            assert run["losses"][task] == pytest.approx(losses, rel=1e-5)
    for task, aucs in results["1"]["comparison"]["auc"].items():
        # 40 test ratings: one pair of them in another order is more than 2e-3
        assert results["2"]["comparison"]["auc"][task] == pytest.approx(aucs, abs=1e-3)


@pytest.mark.usefixtures("synthetic_data")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nproc=3"], "--batch-size 512 is not a multiple of --nproc 3: the processes divide"),
        (["--nproc=4096"], "--nproc 4096 is too many: this machine has"),
        (["--threads=100000"], "--threads 100000 is too many: on the"),
        (["--nproc=2", "--threads=100000"], "each of 2 processes may have at most"),
    ],
)
def test_demo_refuses_more_than_a_machine_can_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert cli.main([*options, "--out", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("synthetic_data")
def test_demo_refuses_a_batch_that_is_too_large(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["--batch-size", "4096", "--out", str(tmp_path)]) == 1
    assert "--batch-size 4096 is more than" in capsys.readouterr().err


@pytest.mark.usefixtures("synthetic_data")
def test_the_largest_seed_trains(tmp_path: Path) -> None:
    arguments = ["--steps", "1", "--batch-size", "16", "--seed", str(2**63 - 1)]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 0


def test_demo_refuses_an_output_folder_that_is_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("in the way")
    assert cli.main(["--out", str(tmp_path / "out")]) == 1
    assert "cannot write to the folder" in capsys.readouterr().err


def test_demo_names_what_is_wrong_with_the_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("movielens: cannot read") and "ml-100k.inter" in err


def test_runs_as_a_module() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "examples.movielens", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0
    assert result.stdout.startswith("usage: python -m examples.movielens")


TRAIN_THE_COPY = """
import sys
from ranker import cli, data, train_distributed
if __name__ == "__main__":
    data.load = lambda directory: data.synthetic(400, seed=0)
    assert cli.main(sys.argv[1:]) == 0
    assert not any(name.startswith("examples") for name in sys.modules)
"""


def copy_the_folder(folder: Path) -> list[str]:
    """With a program that trains; returns the options for it."""
    shutil.copytree(Path(cli.__file__).parent, folder / "ranker")
    (folder / "train.py").write_text(TRAIN_THE_COPY)
    return ["--steps=1", "--batch-size=16", "--nproc=2", f"--out={folder / 'out'}"]


def train_the_copy(folder: str, options: list[str]) -> None:
    """In a process of its own, which imports the copy only."""
    from tests.examples.movielens.test_launch import fork_instead

    for name in list(sys.modules):
        if name.startswith(("examples", "tests")):
            del sys.modules[name]
    sys.path.insert(0, folder)
    fork_instead(importlib.import_module("ranker.launch"))
    sys.argv = ["train.py", *options]
    runpy.run_path(f"{folder}/train.py", run_name="__main__")


def test_a_copy_of_the_folder_works_under_another_name(tmp_path: Path) -> None:
    options = copy_the_folder(tmp_path)
    in_own_process(train_the_copy, str(tmp_path), options)
    assert (tmp_path / "out" / "results.json").exists()


@pytest.mark.long
def test_spawned_processes_of_a_copy_import_it_too(tmp_path: Path) -> None:
    options = copy_the_folder(tmp_path)
    subprocess.run(
        [sys.executable, "train.py", *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    assert (tmp_path / "out" / "results.json").exists()
