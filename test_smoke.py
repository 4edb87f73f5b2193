"""Every script in every variant and every attack, end to end on a few digits, as a user runs them: under two minutes.

python -m pytest test_smoke.py
"""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

import eval_all

ROOT = Path(__file__).resolve().parent
FEW = ["--dataset", "digits", "--limit", "300", "--epochs", "1", "--steps", "2", "--batch-size", "40"]
VARIANTS = {
    "pgd": ["train_pgd_he.py", "--head", "linear"],
    "pgd_he": ["train_pgd_he.py"],
    "pgd_mhe": ["train_pgd_he.py", "--head", "mhe"],
    "pgd_fn": ["train_pgd_he.py", "--no-wn"],
    "pgd_wn": ["train_pgd_he.py", "--no-fn"],
    "trades": ["train_trades_he.py", "--head", "linear"],
    "trades_he": ["train_trades_he.py"],
    "trades_mhe": ["train_trades_he.py", "--head", "mhe"],
    "alp": ["train_alp_he.py", "--head", "linear"],
    "alp_he": ["train_alp_he.py"],
    "alp_mhe": ["train_alp_he.py", "--head", "mhe"],
    "free": ["train_free_he.py", "--head", "linear"],
    "free_he": ["train_free_he.py"],
    "free_mhe": ["train_free_he.py", "--head", "mhe"],
    "fast": ["train_fast_he.py", "--head", "linear"],
    "fast_he": ["train_fast_he.py"],
    "fast_mhe": ["train_fast_he.py", "--head", "mhe"],
    "mart": ["train_mart.py"],
    "weightpen": ["train_weightpen.py"],
    "weightpen_prelu": ["train_weightpen.py", "--activation", "prelu", "--penalty-norm", "spectral"],
    "mmc": ["train_mmc.py"],
    "mmc_at": ["train_mmc.py", "--adversarial"],
    "abcl": ["train_abcl.py"],
    "abcl_sce": ["train_abcl.py", "--base", "sce"],
    "abcl_ht_sce": ["train_abcl.py", "--base", "ht-sce", "--adversarial"],
    "angular_at": ["train_angular_at.py"],
    "angular_at_mhe": ["train_angular_at.py", "--head", "mhe"],
    "angular_at_linear": ["train_angular_at.py", "--head", "linear"],
    "resnet18": ["train_pgd_he.py", "--arch", "resnet18", "--limit", "140"],
    "preactresnet18": ["train_pgd_he.py", "--arch", "preactresnet18", "--limit", "140", "--schedule", "cyclic"],
    "wrn": ["train_angular_at.py", "--arch", "wrn-10-1", "--no-amp", "--schedule", "cosine"],
}


def run(*command):
    result = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_and_writes_its_run(runs, name):
    script, *flags = VARIANTS[name]
    output = run(script, *FEW, *flags, "--out", runs / name)
    assert f"evaluate it with\npython eval_all.py {runs / name}" in output
    with open(runs / name / "log.csv") as file:
        (row,) = csv.DictReader(file)
    assert float(row["loss"]) > 0 and 0 <= float(row["val_robust"]) <= float(row["val_clean"]) <= 100
    assert all((runs / name / file).exists() for file in ("best.pt", "last.pt", "args.json", "curves.png"))


def test_every_attack_on_several_checkpoints_at_once(runs):
    names = ["pgd", "pgd_he", "pgd_mhe", "trades_he", "angular_at", "wrn"]  # trained by the tests above
    attacks = [name for name in eval_all.ATTACKS if name != "autoattack-official"]
    flags = ["--attacks", ",".join(attacks), "--n", "10", "--out", runs / "eval"]
    output = run("eval_all.py", *[runs / name for name in names], *flags)
    results = json.loads((runs / "eval" / "eval.json").read_text())
    assert [result["model"] for result in results] == names and all(name in output for name in names)
    for result in results:
        rows = result["attacks"]
        assert set(rows) == {*attacks, "worst case"}
        worst = rows["worst case"]["accuracy"]
        assert all(worst <= row["accuracy"] <= rows["clean"]["accuracy"] for row in rows.values())
