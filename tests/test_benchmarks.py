"""benchmarks/*.sh with a python that trains nothing: what is made, skipped, and made anew."""

import fcntl
import shutil
import subprocess
from pathlib import Path

import pytest

STUB = """#!/usr/bin/env bash
echo "$@" >>calls
[[ "$*" != *"$FAILING"* ]] || exit 1
while [ "$1" != --out ]; do shift; done
mkdir -p "$2"
for file in eval.json verdicts.npz features.png curves.png; do echo new >"$2/$file"; done
"""


@pytest.fixture
def benchmarks(tmp_path):
    """run(*arguments, SEEDS=...) -> the finished digits.sh in a folder with results of two rows, seeds 0 and 2."""
    shutil.copytree(Path(__file__).parent.parent / "benchmarks", tmp_path / "benchmarks", ignore=lambda *_: ["results"])
    (tmp_path / "figures").mkdir()
    (tmp_path / "stub").write_text(STUB)
    (tmp_path / "stub").chmod(0o755)
    for row in ("pgd-he-steps1-s0", "pgd-he-steps1-s2", "pgd-he-steps2-s0"):
        folder = tmp_path / "benchmarks/results/digits" / row
        folder.mkdir(parents=True)
        (folder / "eval.json").write_text("old")

    def run(*arguments, script="digits", **environment):
        environment = {"PATH": "/usr/bin:/bin", "PYTHON": "./stub", "FAILING": "nothing", **environment}
        command = ["bash", f"benchmarks/{script}.sh", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    run.folder = tmp_path
    return run


def results(benchmarks):
    found = (benchmarks.folder / "benchmarks/results/digits").glob("*/eval.json")
    return {path.parent.name: path.read_text().strip() for path in found}


def test_redo_makes_the_seeds_anew_that_a_row_has(benchmarks):
    assert benchmarks("--redo", "pgd-he-steps1").returncode == 0
    assert results(benchmarks) == {"pgd-he-steps1-s0": "new", "pgd-he-steps1-s2": "new", "pgd-he-steps2-s0": "old"}
    assert benchmarks("--redo", "pgd-he-steps2", "pgd-he-steps3", SEEDS="1").returncode == 0
    assert results(benchmarks)["pgd-he-steps2-s1"] == results(benchmarks)["pgd-he-steps3-s1"] == "new"
    assert results(benchmarks)["pgd-he-steps2-s0"] == "old"
    assert benchmarks("--redo", "pgd-he-steps4").returncode == 0 and "pgd-he-steps4-s0" in results(benchmarks)


def test_what_is_done_is_not_done_again(benchmarks):
    assert benchmarks("pgd-he-steps3", SEEDS="0").returncode == 0
    calls = (benchmarks.folder / "calls").read_text()
    assert "train_pgd_he.py --head he --steps 3" in calls and "eval_all.py runs/digits/pgd-he-steps3-s0" in calls
    assert benchmarks("pgd-he-steps3", "pgd-he-steps1", SEEDS="0").returncode == 0  # steps1 is of another machine
    assert (benchmarks.folder / "calls").read_text() == calls and results(benchmarks)["pgd-he-steps1-s0"] == "old"


@pytest.mark.parametrize("arguments, complaint", [
    (["--redo"], "needs the names"), (["--redo", "pgd-he-steps1", "nothing"], "no row nothing"), (["x"], "no row x"),
])  # fmt: skip
def test_names_that_are_no_rows_delete_nothing(benchmarks, arguments, complaint):
    before = results(benchmarks)
    finished = benchmarks(*arguments)
    assert finished.returncode == 2 and complaint in finished.stderr and results(benchmarks) == before


def test_redo_of_a_row_that_another_process_is_at_deletes_nothing(benchmarks):
    before = results(benchmarks)
    lock = benchmarks.folder / "runs/digits/pgd-he-steps1-s2.lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        finished = benchmarks("--redo", "pgd-he-steps2", "pgd-he-steps1")
    assert finished.returncode == 2 and "another process is at pgd-he-steps1-s2" in finished.stderr
    assert results(benchmarks) == before


def test_a_row_that_fails_keeps_no_other_from_being_made(benchmarks):
    finished = benchmarks("--redo", "pgd-he-steps1", "pgd-he-steps2", FAILING="--steps 1 ")
    assert finished.returncode == 1 and results(benchmarks) == {"pgd-he-steps2-s0": "new"}


def test_transfers_are_made_once_and_again_when_one_of_their_networks_was(benchmarks):
    rows = ["pgd", "trades-he", "weightpen", "dsphere"]
    made = benchmarks.folder / "benchmarks/results/mnist-transfer"
    assert benchmarks(*rows[:3], script="mnist", SEEDS="0").returncode == 0 and not made.exists()
    assert benchmarks(*rows, script="mnist", SEEDS="0").returncode == 0
    files = [made / f"{row}-s0/transfer/eval.json" for row in rows]
    for file in files:
        file.write_text("old")
    assert benchmarks(*rows, script="mnist", SEEDS="0").returncode == 0
    assert {file.read_text() for file in files} == {"old"}
    assert benchmarks("--redo", "dsphere", "pgd-mhe", script="mnist").returncode == 0
    assert {file.read_text() for file in files} == {"new\n"}


def test_redo_makes_what_was_attacked_in_float32_anew_too(benchmarks):
    assert benchmarks("pgd-he", script="mnist", SEEDS="0").returncode == 0
    (folder,) = (benchmarks.folder / "benchmarks/results/mnist-float32").iterdir()
    (folder / "float32/eval.json").write_text("old")
    assert folder.name == "pgd-he-s0" and benchmarks("--redo", "pgd-he", script="mnist").returncode == 0
    assert (folder / "float32/eval.json").read_text() == "new\n"
