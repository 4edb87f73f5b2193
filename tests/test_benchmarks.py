"""benchmarks/*.sh with a stub for python: their commands are valid; what is done, skipped and deleted."""

import argparse
import fcntl
import importlib
import shutil
import subprocess
from pathlib import Path

import common
import eval_all

import pytest

STUB = """#!/usr/bin/env bash
echo "$@" >>calls && [[ "$*" != *"$FAILING"* ]] || exit 1
[[ "$*" != *"$SLOW"* ]] || sleep 30
while [ "$1" != --out ]; do shift; done
mkdir -p "$2" figures
for file in eval.json verdicts.npz analysis.json features.png curves.png; do echo new >"$2/$file"; done
"""
ROWS = ["pgd-he-steps1-s0", "pgd-he-steps1-s2", "pgd-he-steps2-s0"]
OLD = dict.fromkeys(ROWS, "old")


@pytest.fixture
def benchmarks(tmp_path):
    """run(*arguments, script="digits", SEEDS=...) -> (exit code, stderr, results of digits), where OLD exist."""
    shutil.copytree(Path(__file__).parent.parent / "benchmarks", tmp_path / "benchmarks", ignore=lambda *_: ["results"])
    (tmp_path / "stub").write_text(STUB)
    (tmp_path / "stub").chmod(0o755)
    for folder in (tmp_path / "benchmarks/results/digits" / row for row in ROWS):
        folder.mkdir(parents=True)
        (folder / "eval.json").write_text("old")

    def run(*arguments, script="digits", limit="60", **environment):
        environment = {"PATH": "/usr/bin:/bin", "PYTHON": "./stub", "FAILING": "?!", "SLOW": "?!", **environment}
        command = ["timeout", "--foreground", limit, "bash", f"benchmarks/{script}.sh", *arguments]
        finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        files = tmp_path.glob("benchmarks/results/digits/*/eval.json")
        return finished.returncode, finished.stderr, {path.parent.name: path.read_text().strip() for path in files}

    return run


@pytest.mark.parametrize("script", ["mnist", "cifar10", "digits"])
def test_the_scripts_accept_the_flags_of_all_rows(benchmarks, tmp_path, monkeypatch, script):
    Parsed = type("Parsed", (Exception,), {})

    def parse(parser, argv, namespace=None):
        raise Parsed(argparse.ArgumentParser.parse_args(parser, argv, namespace))

    monkeypatch.setattr(common.Parser, "parse_args", parse)
    assert benchmarks(script=script, SEEDS="0")[0] == 0
    for name, *argv in map(str.split, (tmp_path / "calls").read_text().splitlines()):
        with pytest.raises(Parsed) as parsed:
            importlib.import_module(name.removesuffix(".py")).main(argv)
        assert name.startswith("train") or ("-paper-s0" in argv[0]) == argv[0].endswith("/last.pt")
        if name == "eval_all.py":
            assert all(eval_all.find_attack(attack) for attack in parsed.value.args[0].attacks.split(","))


def test_redo_repeats_a_rows_seeds_and_continues_and_a_row_that_fails_stops_no_other(benchmarks, tmp_path):
    redo = ("--redo", "pgd-he-steps1", "pgd-he-steps2")
    assert benchmarks(*redo, FAILING="--steps 1 ") == (1, "", OLD | {ROWS[2]: "new"})  # no new network: results stay
    assert benchmarks(*redo, SLOW="eval_all", limit="4") == (124, "", {ROWS[1]: "old", ROWS[2]: "new"})
    (tmp_path / "calls").unlink()
    assert benchmarks(*redo[:2]) == (0, "", dict.fromkeys(ROWS, "new"))
    assert (tmp_path / "calls").read_text().count("train_") == 1  # of the seed that TERM kept from beginning


def test_redo_stops_at_a_row_that_another_process_works_on_or_that_does_not_exist(benchmarks, tmp_path):
    (tmp_path / "runs/digits").mkdir(parents=True)
    with (tmp_path / "runs/digits/pgd-he-steps1-s2.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code, message, results = benchmarks("--redo", "pgd-he-steps1")
    assert (code, message, results) == (1, "another process works on pgd-he-steps1-s2\n", OLD | {ROWS[0]: "new"})
    for name in ("pgd-he", "pgd.he.steps1", ""):
        assert benchmarks("--redo", name)[:2] == (2, f"no row {name}\n")
