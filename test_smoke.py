"""Every training script in every variant, and every attack once, end to end on a few digits, as a user runs them:
under two minutes on two idle cores, without a GPU.

python -m pytest test_smoke.py
"""

import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import eval_all

import pytest

ROOT = Path(__file__).resolve().parent
FEW = ["--dataset", "digits", "--limit", "164", "--epochs", "1", "--steps", "1", "--batch-size", "32"]
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
    "free": ["train_free_he.py", "--head", "linear", "--replays", "2"],
    "free_he": ["train_free_he.py", "--replays", "2"],
    "free_mhe": ["train_free_he.py", "--head", "mhe", "--replays", "2"],
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
    "cnn": ["train_dsphere.py", "--correlation", "inner"],
    "dsphere_cosine": ["train_dsphere.py"],
    "dsphere_linear_wm": ["train_dsphere.py", "--correlation", "linear", "--loss", "wm"],
    "dsphere_sigmoid": ["train_dsphere.py", "--correlation", "sigmoid", "--train", "fgsm"],
    "dsphere_quadratic": ["train_dsphere.py", "--correlation", "quadratic", "--loss", "annealing"],
    "dsphere_truncated": ["train_dsphere.py", "--correlation", "truncated", "--train", "pgd"],
    "dsphere_simplex": ["train_dsphere.py", "--manifold", "simplex", "--loss", "wm"],
    "angular_at": ["train_angular_at.py"],
    "angular_at_mhe": ["train_angular_at.py", "--head", "mhe"],
    "angular_at_linear": ["train_angular_at.py", "--head", "linear"],
    "resnet18": ["train_pgd_he.py", "--arch", "resnet18"],
    "preactresnet18": ["train_pgd_he.py", "--arch", "preactresnet18", "--schedule", "cyclic"],
    "wrn": ["train_angular_at.py", "--arch", "wrn-10-1", "--no-amp", "--schedule", "cosine"],
}


def start(*command):
    """Run a script to its end in a process of its own: as several run at once, on one thread, and on no GPU."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def trained(runs):
    """Every variant's finished process, by name; as many at once as there are cores."""

    def train(name):
        script, *flags = VARIANTS[name]
        return start(script, *FEW, *flags, "--out", runs / name)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(VARIANTS, pool.map(train, VARIANTS), strict=True))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_and_writes_its_run(runs, trained, name):
    assert trained[name].returncode == 0, trained[name].stderr
    assert f"evaluate it with\npython eval_all.py {runs / name}" in trained[name].stdout
    with open(runs / name / "log.csv") as file:
        (row,) = csv.DictReader(file)
    assert float(row["loss"]) > 0 and 0 <= float(row["val_robust"]) <= float(row["val_clean"]) <= 100
    assert all((runs / name / file).exists() for file in ("best.pt", "last.pt", "args.json"))


def test_every_attack_once_on_several_models_at_once(runs, trained):
    """Fewer steps where the name sets them. At this eps the searches, of up to 20,000 queries, end early."""
    fewer = {"cw-l2": "cw-l2-20", "feature": "feature-5", "mta-100": "mta-5", "spsa-80": "spsa-5", "nes-80": "nes-5"}
    attacks, names = [fewer.get(name, name) for name in eval_all.ATTACKS], ["pgd_fn", "linear"]
    flags = ["--attacks", ",".join(attacks), "--num-images", "4", "--eps", "0.3", "--out", runs / "eval"]
    result = start("eval_all.py", runs / "pgd_fn", ROOT / "tests" / "golden" / "linear.pt", *flags)
    assert result.returncode == 0, result.stderr
    for name in names:
        rows = json.loads((runs / "eval" / name / "eval.json").read_text())["attacks"]
        assert set(rows) == {*attacks, "worst case"} and name in result.stdout
        worst, clean = rows["worst case"]["correct"], rows["clean"]["correct"]
        assert all(worst <= row["correct"] <= clean for row in rows.values() if row.get("norm") != "l2")
    assert clean > 2 > worst  # there was something to attack
