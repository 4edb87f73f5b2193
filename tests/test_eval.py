"""The evaluator: what counts as robust, what is caught, and what is written."""

import copy
import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import eval_all
import models

SETTINGS = dict(known="digits", norm="linf", eps=0.1, step_size=0.02, restarts=1, batch_size=16, seed=0, amp=False)


class Threshold(torch.nn.Module):
    """Predicts class 1 where the first pixel is above 0.5, else class 0; the margin is that pixel's distance to 0.5."""

    def forward(self, x):
        return torch.stack([0.5 - x[:, 0, 0, 0], x[:, 0, 0, 0] - 0.5], dim=1)


@pytest.fixture
def pixels():
    """Images whose robustness at eps 0.1 is known: wrong, right within the ball's reach, right beyond it."""
    x = torch.full((6, 1, 2, 2), 0.5)
    x[:, 0, 0, 0] = torch.tensor([0.3, 0.45, 0.56, 0.55, 0.8, 0.2])
    y = torch.tensor([1, 0, 0, 1, 1, 0])  # images 0 and 2 are misclassified clean
    return x, y


def test_robust_means_right_clean_and_right_under_attack(pixels):
    attacks = eval_all.named_attacks("pgd-20,fgsm,bim-20,mim-20,cw-inf,pgd-20-scaled,adaptive-pgd-20")
    outcome = eval_all.evaluate(Threshold(), attacks, *pixels, SETTINGS)
    assert outcome["attacks"]["clean"]["right"].tolist() == [False, True, False, True, True, True]
    for name in attacks:
        if name != "clean":
            assert outcome["attacks"][name]["right"].tolist() == [False, False, False, False, True, True], name


def test_every_attack_is_judged_by_the_evaluator_and_the_worst_case_is_image_by_image(pixels):
    def fools(image):
        def attack(model, x, y, *, eps):
            near = (x[:, 0, 0, 0] - image).abs() < 1e-6
            return torch.where(
                near[:, None, None, None], x + eps * torch.where(y == 1, -1.0, 1.0)[:, None, None, None], x
            )

        return attack

    outcome = eval_all.evaluate(
        Threshold(), {"clean": eval_all.clean, "a": fools(0.45), "b": fools(0.55)}, *pixels, SETTINGS
    )
    result = eval_all.report("toy", {}, outcome, SETTINGS)["attacks"]
    assert [result[name]["right"] for name in ("clean", "a", "b", "worst case")] == [4, 3, 3, 2]


@pytest.mark.parametrize("order", [torch.arange(400).sort().indices, torch.arange(400).view(200, 2).T.flatten()])
def test_a_batch_has_images_of_all_classes_in_whatever_order_they_come(order):
    """The feature attack draws its aims from its batch."""
    x, met = torch.tensor([0.2, 0.8]).repeat_interleave(200)[order].view(400, 1, 1, 1), []
    y = (x > 0.5).long().flatten()

    def spies(model, x, y, *, eps):
        met.append(y.tolist())
        return x + torch.where(y == 1, -eps, eps)[:, None, None, None] * (x < 0.5)

    settings = SETTINGS | {"batch_size": 20, "eps": 0.31}
    outcome = eval_all.evaluate(Threshold(), {"clean": eval_all.clean, "spies": spies}, x, y, settings)
    assert [len(batch) for batch in met] == [20] * 20 and all(set(batch) == {0, 1} for batch in met)
    assert torch.equal(outcome["attacks"]["spies"]["right"], y == 1)


@pytest.mark.parametrize("offense, complaint", [
    (lambda x: (x + 0.11).clamp(0, 1), "left the ball"),
    (lambda x: x + 0.1, "left [0, 1]"),
    (lambda x: x - 0.1, "left [0, 1]"),
    (lambda x: x * math.nan, "left the ball"),
])  # fmt: skip
def test_an_attack_that_cheats_is_caught(offense, complaint):
    x, y = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1), torch.tensor([0, 0, 1])
    cheat = {"clean": eval_all.clean, "cheat": lambda model, x, y, *, eps: offense(x)}
    with pytest.raises(common.UserError, match="cheat") as caught:
        eval_all.evaluate(Threshold(), cheat, x, y, SETTINGS)
    assert complaint in str(caught.value)


def test_the_nearest_image_may_leave_the_ball_and_not_the_range(monkeypatch):
    x, y = torch.tensor([0.5, 0.9]).view(2, 1, 1, 1), torch.tensor([0, 1])
    for move, complaint in ((lambda x: x - 0.4, ""), (lambda x: x - 0.6, "left [0, 1]")):
        nearest = lambda model, x, y, *, eps, move=move: move(x)  # noqa: E731
        monkeypatch.setattr(eval_all, "NEAREST", (nearest,))
        attacks = {"clean": eval_all.clean, "nearest": nearest}
        if not complaint:
            assert eval_all.evaluate(Threshold(), attacks, x, y, SETTINGS)["attacks"]["nearest"]["right"].sum() > 0
            continue
        with pytest.raises(common.UserError, match="nearest") as caught:
            eval_all.evaluate(Threshold(), attacks, x, y, SETTINGS)
        assert complaint in str(caught.value)


def test_queries_are_those_of_an_image_that_was_attacked_and_training_takes_all_epochs(pixels):
    outcome = eval_all.evaluate(
        Threshold(), {"clean": eval_all.clean, "pgd-3": eval_all.find_attack("pgd-3")}, *pixels, SETTINGS
    )
    attacked = int(outcome["attacks"]["clean"]["right"].sum())
    attack = outcome["attacks"]["pgd-3"] | {"passes": 6 * attacked}
    assert 0 < attacked < len(pixels[1]) and eval_all.row(attack)["queries"] == 6
    meta = {"args": {"epochs": 10}, "history": [{"seconds": 2.0}, {"seconds": 4.0}]}  # stopped after two
    assert eval_all.report("one", meta, outcome, SETTINGS)["training_seconds"] == 30


def test_logits_that_are_not_finite_are_a_fault_and_count_as_wrong(pixels, capsys):
    class Breaks(Threshold):
        def forward(self, x):
            return super().forward(x) / (x[:, :1, 0, 0] < 0.75)  # inf and nan above 0.75

    outcome = eval_all.evaluate(Breaks(), {"clean": eval_all.clean}, *pixels, SETTINGS)
    result = eval_all.report("toy", {}, outcome, SETTINGS | {"dataset": "toy"})
    eval_all.print_report(result)
    assert result["attacks"]["clean"]["right"] == 3 and result["attacks"]["clean"]["not_finite"] == 1
    assert "FAULT: logits that are not finite on 1 images" in capsys.readouterr().out


def test_a_random_model_is_warned_of_and_its_clean_figure_is_that_of_clean_prediction(capsys):
    class Random(torch.nn.Module):
        def forward(self, x):
            return torch.randn(len(x), 2)

    x, y = torch.rand(64, 1, 2, 2), torch.zeros(64, dtype=torch.long)
    outcome = eval_all.evaluate(Random(), eval_all.named_attacks("noise"), x, y, SETTINGS)
    assert torch.equal(outcome["attacks"]["clean"]["right"], outcome["prediction"] == y)
    assert "the model is random" in capsys.readouterr().err
    eval_all.evaluate(Threshold(), eval_all.named_attacks("noise"), x, y, SETTINGS)
    assert "random" not in capsys.readouterr().err


@pytest.mark.parametrize("at_once, attack, complaint", [
    (16, lambda model, x, y, *, eps: (x + eps).numpy(), "attack mine failed: AttributeError: "),
    (16, lambda model, x, y, *, eps: x[:1], r"attack mine failed: it returned \(1, 1, 2, 2\) for images \(16, "),
    (16, lambda model, x, y, *, eps: [][0], "attack mine failed: IndexError: .*test_eval.py, line "),
    (16, lambda model, x, y, *, eps, step_size: x, "attack mine has a step size, but no steps: partial"),
    (2, eval_all.clean, "the model failed: ValueError: 2 images at once, not 16"),
])  # fmt: skip
def test_what_a_users_code_raises_is_one_line(at_once, attack, complaint):
    class Particular(Threshold):
        def forward(self, x):
            if len(x) > at_once:
                raise ValueError(f"{at_once} images at once, not {len(x)}")
            return super().forward(x)

    attacks, x = {"clean": eval_all.clean, "mine": attack}, torch.rand(32, 1, 2, 2)
    y = (x[:, 0, 0, 0] > 0.5).long()
    with pytest.raises(common.UserError, match=f"^{complaint}"):
        eval_all.evaluate(Particular(), attacks, x, y, SETTINGS)


def test_a_step_size_may_stand_in_the_line_of_an_attack(pixels):
    def mine(model, x, y, *, eps, step_size):
        return x + step_size

    attacks = {"clean": eval_all.clean, "mine": partial(mine, step_size=0.08)}
    assert eval_all.budget("mine", attacks["mine"], SETTINGS) == {"eps": 0.1}
    right = eval_all.evaluate(Threshold(), attacks, *pixels, SETTINGS)["attacks"]["mine"]["right"]
    assert right.tolist() == [False, False, False, True, True, True]


def test_restarts_only_ever_lower_the_accuracy(small_model):
    x = torch.rand(48, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    y, counts = small_model(x).argmax(1), []
    for restarts in (1, 2, 8):
        settings = SETTINGS | {"restarts": restarts}
        outcome = eval_all.evaluate(small_model, eval_all.named_attacks("noise"), x, y, settings)
        counts.append(int(outcome["attacks"]["noise"]["right"].sum()))
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]


def test_a_verdict_does_not_depend_on_the_other_attacks(small_model):
    x = torch.rand(32, 1, 8, 8)
    y = small_model(x).argmax(1)
    alone = eval_all.evaluate(small_model, eval_all.named_attacks("pgd-3"), x, y, SETTINGS)
    among = eval_all.evaluate(small_model, eval_all.named_attacks("noise,cw-inf,pgd-3"), x, y, SETTINGS)
    assert torch.equal(alone["attacks"]["pgd-3"]["right"], among["attacks"]["pgd-3"]["right"])


@pytest.mark.parametrize("right, n, low, high", [  # Newcombe 1998, Table I, method 3
    (81, 263, 25.53, 36.62), (15, 148, 6.24, 16.05), (0, 20, 0.0, 16.11), (1, 29, 0.61, 17.18),
])  # fmt: skip
def test_wilson_intervals_are_the_published_ones(right, n, low, high):
    assert eval_all.wilson(right, n) == pytest.approx((low, high), abs=0.006)
    mirrored = eval_all.wilson(n - right, n)
    assert mirrored == pytest.approx((100 - high, 100 - low), abs=0.006)


@pytest.fixture
def run_folder(make_npz, tmp_path):
    """folder(name) -> a run directory with an untrained model for toy.npz, whose arrays are 8x8 gray images."""
    path = make_npz()

    def folder(name, head="he"):
        torch.manual_seed(0)
        model = models.build_model("wrn-10-1", 10, 1, image_size=8, head=head, scale=15.0 if head == "he" else 1.0)
        content = {
            "format": common.FORMAT,
            "model": model.state_dict(),
            "model_options": model.options,
            "method": name,
            "args": {"dataset": str(path), "data_dir": "data"},
        }
        (tmp_path / name).mkdir()
        torch.save(content, tmp_path / name / "best.pt")
        return tmp_path / name

    return folder


def test_one_checkpoint_gives_table_json_csv_verdicts_and_plot(cli, run_folder):
    run = run_folder("run")
    code, out, _ = cli("eval_all", run, "--attacks", "fgsm,pgd-3", "--n", "15")
    assert code == 0 and "worst case" in out and "written to" in out
    result = json.loads((run / "eval" / "eval.json").read_text())
    assert list(result["attacks"]) == ["clean", "fgsm", "pgd-3", "worst case"]
    assert (
        result["eps"] == 8 / 255
        and result["attacks"]["clean"]["n"] == 15
        and result["command"].startswith("python eval_all")
    )
    with open(run / "eval" / "eval.csv") as file:
        rows = list(csv.DictReader(file))
    verdicts = np.load(run / "eval" / "verdicts.npz")
    assert set(verdicts) == {"index", "label", "clean_prediction", "clean", "fgsm", "pgd-3"}
    for row in rows[:3]:
        assert int(row["right"]) == verdicts[row["attack"]].sum() == result["attacks"][row["attack"]]["right"]
    assert np.array_equal(verdicts["clean"], verdicts["label"] == verdicts["clean_prediction"])
    assert int(rows[3]["right"]) == np.logical_and(verdicts["fgsm"], verdicts["pgd-3"]).sum()
    assert (run / "eval" / "eval.png").read_bytes().startswith(b"\x89PNG")
    assert len(set(verdicts["index"])) == 15 and np.array_equal(
        verdicts["label"], (np.arange(20) % 10)[verdicts["index"]]
    )


def test_several_checkpoints_give_one_comparison(cli, run_folder, tmp_path):
    runs = [run_folder("first"), run_folder("second", head="linear")]
    code, out, _ = cli("eval_all", *runs, "--attacks", "fgsm", "--out", tmp_path / "both")
    assert code == 0
    table = out[out.rindex("toy, n = 20 test images") :]
    assert table.index("worst case") < table.index("clean") < table.index("first") < table.index("second")
    assert [result["model"] for result in json.loads((tmp_path / "both" / "eval.json").read_text())] == [
        "first",
        "second",
    ]
    for name in ("first", "second"):
        assert {p.name for p in (tmp_path / "both" / name).iterdir()} == {
            "eval.json",
            "eval.csv",
            "eval.png",
            "verdicts.npz",
        }


def test_the_same_call_gives_the_same_verdicts(small_model):
    x = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    y, attacks = small_model(x).argmax(1), eval_all.named_attacks("noise,pgd-1")
    outcomes = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(outcomes) + 100)  # what ran before must not matter
        outcome = eval_all.evaluate(small_model, attacks, x, y, SETTINGS | {"seed": seed, "eps": 0.05})
        outcomes.append({name: attack["right"] for name, attack in outcome["attacks"].items()})
    assert all(torch.equal(outcomes[0][name], outcomes[1][name]) for name in attacks)
    assert any(not torch.equal(outcomes[0][name], outcomes[2][name]) for name in attacks)


def test_a_users_own_model_and_a_models_with_the_same_name(cli, run_folder, make_npz, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\ndef make_model():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
    )
    run = run_folder("run")
    model = f"{tmp_path / 'mine.py'}:make_model"
    code, out, _ = cli("eval_all", run, run, "--model", model, "--attacks", "fgsm", "--out", tmp_path / "out")
    assert code == 0 and all(name in out for name in ("1-run", "2-run", "3-mine:make_model"))
    alone = cli("eval_all", "--model", model, "--dataset", make_npz(), "--attacks", "pgd-2-scaled")
    assert alone[0] == 0 and (tmp_path / "eval" / "eval.json").exists()


def test_a_foreign_wide_resnet_is_evaluated_with_the_scale_of_its_head(cli, make_npz, tmp_path):
    make_npz("cifar10", shape=(32, 32, 3))
    for head, flags, standardized in (
        ("he", [], True), ("linear", [], False),  # as in HE's code, and in that of TRADES and MART
        ("he", ["--no-normalize"], False), ("linear", ["--normalize"], True),
    ):  # fmt: skip
        torch.save(models.build_model("wrn-10-1", 10, head=head).state_dict(), tmp_path / f"{head}.pt")
        arguments = ["--dataset", "cifar10", "--data-dir", tmp_path, "--arch", "wrn-10-1", "--head", head, *flags]
        code, _, err = cli("eval_all", tmp_path / f"{head}.pt", *arguments, "--attacks", "adaptive-pgd-2")
        assert code == 0, err
        options = json.loads((tmp_path / f"eval-{head}" / "eval.json").read_text())["model_options"]
        expected = {"he": (15.0, 0.2), "linear": (1.0, 0.0)}[head]
        assert (options["scale"], options["margin"]) == expected and ("mean" in options) == standardized


def test_presets_and_duplicates():
    assert list(eval_all.named_attacks("fgsm,clean,fgsm")) == ["clean", "fgsm"]
    quick = ["clean", "noise", "fgsm", "pgd-20", "pgd-20-scaled", "cw-inf"]
    assert list(eval_all.named_attacks("quick,pgd-40")) == [*quick, "pgd-40"]


def test_the_audit_comes_with_the_presets_paper_and_all():
    asked = {name: eval_all.parse_args(["x", "--attacks", name]).audit for name in ("quick", "pgd-20,paper", "all")}
    assert asked == {"quick": False, "pgd-20,paper": True, "all": True}
    assert not eval_all.parse_args(["x", "--attacks", "all", "--no-audit"]).audit


@pytest.mark.parametrize("known, linf, l2", [
    ("digits", 0.1, 0.5), ("mnist", 0.3, 3.0), ("cifar10", 0.031, 1.0), ("cifar100", 0.031, 1.0),
    ("tiny-imagenet", 0.031, 1.0), ("imagenet", 4 / 255, 1.0), (None, 8 / 255, 1.0),
])  # fmt: skip
def test_the_ball_is_the_papers_unless_eps_says_otherwise(known, linf, l2):
    data = types.SimpleNamespace(name="d", known=known)
    for flags, eps in (([], linf), (["--norm", "l2"], l2), (["--eps", "0.2"], 0.2)):
        assert eval_all.evaluation_settings(eval_all.parse_args(["x", *flags]), data, [])["eps"] == eps


def test_n_images_are_drawn_from_all(cli, run_folder):
    run = run_folder("run")
    assert cli("eval_all", run, "--attacks", "clean", "--n", "5")[0] == 0
    index = np.load(run / "eval" / "verdicts.npz")["index"]
    assert index.tolist() == sorted(np.random.default_rng(0).permutation(20)[:5]) != list(range(5))


def test_a_preset_in_the_l2_ball_does_without_what_knows_linf_alone(cli, run_folder, capsys):
    chosen = eval_all.named_attacks("all", norm="l2")
    assert {"pgd-20", "square", "autoattack", "cw-l2", "deepfool"} <= chosen.keys()
    assert not {"feature", "rays", "zoo", "spsa-20", "nes-20"} & chosen.keys()
    assert "left out: attack rays knows the Linf ball alone" in capsys.readouterr().out
    code, _, err = cli("eval_all", run_folder("run"), "--attacks", "quick,rays", "--norm", "l2")
    assert code == 2 and "rays knows the Linf ball alone" in err  # asked for by name


def test_an_attack_with_a_ball_of_its_own_is_marked_so_in_the_comparison(cli, run_folder, tmp_path):
    runs = [run_folder("first"), run_folder("second", head="linear")]
    code, out, _ = cli("eval_all", *runs, "--attacks", "fgsm-l2,fgsm", "--out", tmp_path / "both")
    assert code == 0 and "fgsm-l2 (L2 1)" in out[out.rindex("toy, n = 20") :]


def test_best_pt_comes_before_last_pt_and_last_pt_serves_where_there_is_no_best(run_folder):
    run = run_folder("run")
    (run / "last.pt").write_bytes((run / "best.pt").read_bytes())
    assert common.checkpoint_file(run).name == "best.pt"
    (run / "best.pt").unlink()
    assert common.checkpoint_file(run).name == "last.pt" and eval_all.model_name(run / "last.pt") == "run-last"


def test_what_restarts_repeat_is_what_starts_at_random(small_model):
    """The images that an attack asks about, with one seed and with another."""
    x = torch.rand(4, 1, 8, 8)
    y, asked = small_model(x).argmax(1), []
    small_model.register_forward_pre_hook(lambda model, inputs: asked.append(inputs[0].detach().clone()))
    at_random = "noise pgd-1 pgd-1-scaled pgd-1-fn adaptive-pgd-1 cw-inf-1 mta-1 feature-1 apgd-ce-1 apgd-t-1".split()
    for name in (*at_random, "fgsm", "bim-1", "mim-1", "deepfool-1", "fab-t-1", "cw-l2-1"):
        attack, met = eval_all.find_attack(name), []
        for seed in (0, 1):
            asked.clear()
            torch.manual_seed(seed)
            met.append([attack(small_model, x, y, **eval_all.budget(name, attack, SETTINGS)), *asked])
        assert all(map(torch.equal, *met)) == (name not in at_random), name
        assert (eval_all.function_of(attack) in eval_all.START_AT_RANDOM) == (name in at_random), name


def test_deterministic_attacks_are_not_restarted_and_random_ones_are(small_model):
    calls = []

    def counting(name):
        def attack(model, x, y, **budget):
            calls.append(name)
            return x

        return attack

    x = torch.rand(4, 1, 8, 8)
    y, settings = small_model(x).argmax(1), SETTINGS | {"restarts": 3}
    original = eval_all.START_AT_RANDOM
    attacks = {"clean": eval_all.clean, "fixed": counting("fixed"), "random": counting("random")}
    try:
        eval_all.START_AT_RANDOM = (*original, attacks["random"])
        eval_all.evaluate(small_model, attacks, x, y, settings)
    finally:
        eval_all.START_AT_RANDOM = original
    assert calls == ["fixed", "random", "random", "random"]


def test_a_model_that_cannot_be_differentiated_is_one_line(cli, make_npz, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "class Blind(torch.nn.Linear):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x.detach().flatten(1)).detach()\n"
        "make = lambda: Blind(64, 10)\n"
    )
    model = f"{tmp_path / 'mine.py'}:make"
    code, _, err = cli("eval_all", "--model", model, "--dataset", make_npz(), "--attacks", "fgsm")
    assert code == 2 and "Traceback" not in err
    assert "attack fgsm failed" in err.splitlines()[-1]


def test_a_users_model_may_view_its_images_and_have_its_own_models_package(cli, make_npz, tmp_path):
    home = tmp_path / "published"
    (home / "models").mkdir(parents=True)
    (home / "models" / "__init__.py").write_text("")
    (home / "models" / "net.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv, self.fc = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4 * 36, 10)\n"
        "    def forward(self, x):\n"
        "        x.view(x.size(0), -1)\n"
        "        h = self.conv(x)\n"
        "        return self.fc(h.view(h.size(0), -1))\n"
    )
    (home / "theirs.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from models.net import Net\n"
        "@dataclass\n"
        "class Settings:\n"
        "    depth: int = 3\n"
        "make = Net\n"
    )
    before = sys.path.copy()
    code, _, err = cli("eval_all", "--model", f"{home / 'theirs.py'}:make", "--dataset", make_npz(shape=(8, 8, 3)))
    assert code == 0, err
    assert sys.path == before and sys.modules["models"] is models and sys.modules["common"] is common


def test_each_of_two_users_files_finds_its_own_modules(tmp_path):
    for folder, fill in (("one", 1), ("two", 2)):
        (tmp_path / folder / "models").mkdir(parents=True)
        (tmp_path / folder / "models" / "net.py").write_text(f"from utils import fill\nwidth = {fill}\n")
        (tmp_path / folder / "utils.py").write_text(f"fill = {fill}\n")
        (tmp_path / folder / "mine.py").write_text(
            "import torch, utils\n"
            "from models.net import fill, width\n"
            "def make():\n"
            "    assert utils.fill == fill == width\n"
            "    return torch.nn.Linear(width, fill)\n"
        )
    made = [eval_all.user_model(f"{tmp_path / folder / 'mine.py'}:make") for folder in ("one", "two", "one")]
    assert [model.in_features for model, _, _ in made] == [1, 2, 1]
    assert {str(tmp_path / "two" / file) for file in ("mine.py", "utils.py", "models/net.py")} <= made[1][2].keys()
    assert sys.modules["models"] is models


class Wavering(torch.nn.Module):
    """Its logits hang on torch's generator."""

    def forward(self, x):
        return torch.randn(len(x), 10, device=x.device) + 0 * x.sum()


def test_a_random_model_is_asked_once_which_images_are_attacked(tmp_path):
    """What is attacked must be the same images to whoever goes on with an evaluation, and to every rank."""
    x, y = torch.rand(60, 1, 4, 4), torch.arange(60) % 10
    attacks, path = eval_all.named_attacks("noise"), tmp_path / "unfinished.pt"

    def run(**options):
        return eval_all.evaluate(Wavering(), attacks, x, y, SETTINGS, **options)["prediction"]

    torch.manual_seed(1)
    first = run(journal=eval_all.Journal(path, "it"))
    torch.manual_seed(2)
    assert torch.equal(run(), first)  # --seed alone decides
    journal = eval_all.Journal(path, "it")
    journal.pieces = {"prediction": {"prediction": y.clone()}}
    assert torch.equal(run(journal=journal), y)


def test_a_scale_that_is_no_number_is_the_models_own_affair():
    model = torch.nn.Linear(2, 2)
    assert (eval_all.trained_with(model, "scale"), eval_all.trained_with(model, "margin")) == (1.0, 0.0)
    for own in (torch.nn.Parameter(torch.tensor(30.0)), torch.nn.Linear(2, 2)):
        model.scale = own
        assert eval_all.trained_with(model, "scale") == 1.0
        del model.scale
    model.scale, model.margin = 15, 0.2
    assert (eval_all.trained_with(model, "scale"), eval_all.trained_with(model, "margin")) == (15, 0.2)


@pytest.mark.parametrize("eps", [0.5, 3.0])
def test_large_images_on_the_edge_of_an_l2_ball_are_inside_it(eps):
    torch.manual_seed(0)
    x = 0.25 + 0.5 * torch.rand(4, 3, 224, 224)
    x_adv = common.project(x + torch.randn_like(x), x, eps, "l2")
    eval_all.check_ball("pgd", x_adv, x, eps, "l2")
    with pytest.raises(common.UserError, match="left the ball"):
        eval_all.check_ball("pgd", x + 1.0001 * (x_adv - x), x, eps, "l2")


@pytest.mark.parametrize("total, count", [(10, 3), (3, 10), (1, 1), (10_000, 200)])
def test_rows_are_spread_over_all_of_a_test_set(total, count):
    rows = eval_all.spread(total, count)
    assert rows[0] == 0 and rows[-1] == (total - 1 if count > 1 else 0) and len(rows.unique()) == min(total, count)
    assert len(rows) < 2 or rows.diff().max() - rows.diff().min() <= 1


def test_what_a_model_of_the_user_cannot_serve_is_left_out_or_refused_before_the_work(cli, make_npz, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n\n\ndef make():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
    )
    model = ["--model", f"{tmp_path / 'mine.py'}:make", "--dataset", make_npz(shape=(8, 8)), "--out", tmp_path / "out"]
    unfit = dict.fromkeys((eval_all.feature, eval_all.pgd_fn), "it lacks something")
    assert {"feature", "pgd-20-fn"} == {*eval_all.named_attacks("all")} - {*eval_all.named_attacks("all", unfit=unfit)}
    assert "feature" not in eval_all.named_attacks("paper", ("pgd_he", ""), "mnist", unfit=unfit)
    assert "feature" in eval_all.named_attacks("feature,quick", unfit=unfit)
    for flags, complaint in (
        (["--attacks", "pgd-3-fn"], "needs a model with a linear last layer fc, and mine:make has none"),
        (["--attacks", "feature"], "needs a model with features(x)"),
        (["--attacks", "fgsm", "--analyze", "features"], "needs a model with features"),
        (["--attacks", "fgsm", "--analyze", "angles"], "needs a model with features"),
    ):
        code, _, err = cli("eval_all", *model, *flags)
        assert code == 2 and complaint in err.splitlines()[-1] and not (tmp_path / "out").exists(), err


def test_feature_maps_are_no_features_and_logits_are_float32(cli, make_npz, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Vgg(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.features, self.fc = nn.Conv2d(1, 2, 3), nn.Sequential(nn.Flatten(), nn.Linear(72, 10))\n"
        "        self.unused = nn.Linear(2, 2)\n"
        "    def forward(self, x):\n"
        "        return self.fc(self.features(x))\n"
        "class Double(Vgg):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x).double()\n"
        "class Vectors(Vgg):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.features = nn.Sequential(self.features, nn.Flatten())\n"
    )
    data = ["--dataset", make_npz(shape=(8, 8)), "--out", tmp_path / "out"]
    for name, flags, complaint in (
        ("Vgg", ["--attacks", "feature"], "needs a model with features(x) of (B, d)"),
        ("Vgg", ["--analyze", "features"], "needs a model with features(x) of (B, d)"),
        ("Vectors", ["--analyze", "angles"], "needs a model with fc.weight"),
        ("Double", [], "Double returns logits in torch.float64; return float32"),
    ):
        code, _, err = cli("eval_all", "--model", f"{tmp_path / 'mine.py'}:{name}", *data, *flags)
        assert code == 2 and complaint in err.splitlines()[-1] and not (tmp_path / "out").exists(), err
    looks = ["--attacks", "fgsm", "--analyze", "gradients,features", "--seed", 2**40]  # a layer has no gradient
    code, _, err = cli("eval_all", "--model", f"{tmp_path / 'mine.py'}:Vectors", *data, *looks)
    assert code == 0 and (tmp_path / "out" / "features.png").exists(), err


def one(model):
    return [("model", model, {"checkpoint": "model.pt"})]


def test_a_killed_evaluation_goes_on_where_it_stopped(small_model, tmp_path):
    x = torch.rand(48, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    y, asked = small_model(x).argmax(1), []
    hook = small_model.register_forward_hook(lambda module, inputs, output: asked.append(len(inputs[0])))
    attacks = eval_all.named_attacks("pgd-3,square")
    attacks["square"] = partial(eval_all.square, queries=30)
    identity = eval_all.identity(one(small_model), x, y, SETTINGS)

    def dies(*_, **__):
        raise KeyboardInterrupt

    whole = eval_all.evaluate(small_model, attacks, x, y, SETTINGS)
    path = tmp_path / "unfinished.pt"
    with pytest.raises(KeyboardInterrupt):
        eval_all.evaluate(small_model, attacks | {"square": dies}, x, y, SETTINGS, eval_all.Journal(path, identity))
    asked.clear()
    rest = eval_all.evaluate(small_model, attacks, x, y, SETTINGS, eval_all.Journal(path, identity))
    resumed = sum(asked)
    asked.clear()
    other = eval_all.Journal(path, eval_all.identity(one(small_model), x, y, SETTINGS | {"eps": 0.2}))
    eval_all.evaluate(small_model, attacks, x, y, SETTINGS, other)
    assert resumed < sum(asked)
    for name in attacks:
        for key in ("right", "distance"):
            assert torch.equal(whole["attacks"][name][key], rest["attacks"][name][key])
        assert whole["attacks"][name]["passes"] == rest["attacks"][name]["passes"]
    hook.remove()


def test_a_nearest_image_outside_the_ball_is_no_success_and_its_distance_is_told(pixels):
    outcome = eval_all.evaluate(Threshold(), eval_all.named_attacks("deepfool,cw-l2"), *pixels, SETTINGS)
    result = eval_all.report("toy", {}, outcome, SETTINGS)["attacks"]
    assert outcome["attacks"]["deepfool"]["right"].tolist() == [False, False, False, False, True, True]
    assert result["deepfool"]["median_distance"] == pytest.approx(0.3, rel=0.03)  # 0.05, 0.05, 0.3, 0.3: the upper one
    assert result["cw-l2"]["norm"] == "l2" and result["cw-l2"]["eps"] == 0.5
    assert result["worst case"]["right"] == result["deepfool"]["right"] != result["cw-l2"]["right"]


def test_an_attack_of_the_linf_ball_is_refused_under_l2(small_model):
    x = torch.rand(2, 1, 8, 8)
    with pytest.raises(common.UserError, match="rays knows the Linf ball alone"):
        eval_all.evaluate(
            small_model, eval_all.named_attacks("rays"), x, small_model(x).argmax(1), SETTINGS | {"norm": "l2"}
        )


def test_what_was_found_is_kept_where_the_audit_cannot_go_on(cli, run_folder, monkeypatch):
    def fails(*_):
        raise common.UserError("attack audit failed")

    run = run_folder("run")
    monkeypatch.setattr(eval_all, "audit", fails)
    code, _, err = cli("eval_all", run, "--attacks", "fgsm", "--audit")
    assert code == 2 and "audit failed" in err
    assert json.loads((run / "eval" / "eval.json").read_text())["attacks"]["fgsm"]["n"] == 20


def test_the_identity_of_an_evaluation_is_its_model_images_and_settings(small_model, tmp_path):
    x, y = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    first = eval_all.identity(one(small_model), x, y, SETTINGS | {"command": "one"})
    assert first == eval_all.identity(one(small_model), x, y, SETTINGS | {"command": "another"})
    assert first != eval_all.identity(one(small_model), x, y, SETTINGS | {"eps": 0.2})
    assert first != eval_all.identity(one(small_model), x.flip(0), y, SETTINGS)
    small_model.options["scale"] = 1.0  # changes no weight, but what an attack is told
    assert first != eval_all.identity(one(small_model), x, y, SETTINGS)
    small_model.options["scale"] = 15.0
    assert first != eval_all.identity(one(small_model.bfloat16()), x, y, SETTINGS)


def test_the_identity_of_an_evaluation_is_its_code_ours_and_the_users(tmp_path, monkeypatch):
    """Each file that the model was made from, as it was then, and each of ours."""
    x, y = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    sources = {
        "helper_of_net.py": "scale = 1\n",
        "models.py": "import torch\nNet = torch.nn.Flatten\n",
        "net.py": "from models import Net\ndef make():\n    import helper_of_net\n    return Net()\n",
    }
    for name, text in sources.items():
        (tmp_path / name).write_text(text)

    def identity(function):
        for module in ("helper_of_net", "user_net"):
            sys.modules.pop(module, None)
        model, _, code = eval_all.user_model(f"{tmp_path}/net.py:{function}")
        found = [("m", model, {"checkpoint": f"{tmp_path}/net.py:{function}", "code": code})]
        before = eval_all.identity(found, x, y, SETTINGS)
        (tmp_path / "net.py").touch()
        assert eval_all.identity(found, x, y, SETTINGS) == before
        return before

    digests = {identity("make"), identity("Net")}
    for name, text in sources.items():
        (tmp_path / name).write_text(text + "# edited\n")
        digests.add(identity("make"))
    ours = next(file for file in eval_all.OUR_CODE if file.endswith("eval_all.py"))
    monkeypatch.setitem(eval_all.OUR_CODE, ours, "edited")
    digests.add(identity("make"))
    assert len(digests) == 6
    assert {"eval_all.py", "common.py", "models.py"} <= {Path(file).name for file in eval_all.OUR_CODE}
    assert not {json.__file__, torch.__file__} & eval_all.code_in_use().keys()


def test_a_journal_of_another_identity_is_not_taken_up_and_that_is_said(small_model, tmp_path, capsys):
    x, path = torch.rand(16, 1, 8, 8), tmp_path / "unfinished.pt"
    y, attacks = small_model(x).argmax(1), eval_all.named_attacks("fgsm")
    eval_all.evaluate(small_model, attacks, x, y, SETTINGS, eval_all.Journal(path, "before"))
    assert eval_all.Journal(path, "before").pieces and not eval_all.Journal(path, "after").pieces
    assert "of other models, settings or code: beginning anew" in capsys.readouterr().err


def test_a_transferred_attack_is_crafted_on_the_source_to_its_last_step(linear_model):
    weight = torch.zeros(2, 2, 16)  # the source looks at the first pixel, the target at the second
    weight[0, 1, 0] = weight[1, 1, 1] = 1.0
    source, target = (linear_model(w) for w in weight)
    source.scale = 3.0
    x, y = torch.full((4, 1, 4, 4), 0.5), torch.ones(4, dtype=torch.long)
    for name, attack in eval_all.transfer_attacks([("other", source, {})]).items():
        options = eval_all.budget(name, attack, SETTINGS)
        x_adv = attack(target, x, y, **options)
        moved = (x_adv - x).abs() > 1e-6
        assert torch.allclose(x_adv[:, 0, 0, 0], torch.tensor(0.4)), name  # all of eps, though it fools at once
        assert name.startswith("pgd-20") or moved.sum() == 4, name  # a random start moves the other pixels too
        assert name.endswith(" from other") and ("step_size" in options) != name.startswith("fgsm")


def test_every_source_against_every_target_gives_a_table_and_a_heatmap(cli, run_folder, tmp_path):
    runs = [run_folder("first"), run_folder("second", head="linear")]
    flags = ["--attacks", "fgsm", "--eps", "0.05", "--out", tmp_path / "out"]
    code, out, err = cli("eval_all", *runs, "--source", *runs, *flags)
    assert code == 0, err
    results = json.loads((tmp_path / "out" / "eval.json").read_text())
    names = {f"{attack} from {source}" for attack in ("fgsm", "mim-20", "pgd-20") for source in ("first", "second")}
    assert all(set(result["attacks"]) == names | {"clean", "fgsm", "worst case"} for result in results)
    assert np.load(tmp_path / "out" / "first" / "verdicts.npz")["pgd-20 from second"].dtype == bool
    matrices = eval_all.transfer_matrices(results)
    assert list(matrices) == ["fgsm", "mim-20", "pgd-20"] and list(matrices["fgsm"]) == ["first", "second"]
    own = results[1]["attacks"]["fgsm"]["right"]  # scale 1: the transferred FGSM of a model on itself is its FGSM
    assert [row["right"] for row in matrices["fgsm"]["second"]][1] == own
    assert (tmp_path / "out" / "transfer.png").read_bytes().startswith(b"\x89PNG")
    assert "pgd-20 from the source (row) on the target (column)" in out


def test_the_sources_weights_are_part_of_an_evaluations_identity(small_model):
    x, y, digests, source = torch.rand(2, 1, 8, 8), torch.tensor([0, 1]), set(), copy.deepcopy(small_model)
    for _ in range(2):
        digests.add(eval_all.identity(one(small_model) + one(source), x, y, SETTINGS))
        source.fc.weight.data += 1
    assert len(digests) == 2


def test_a_name_may_set_its_step_size():
    attack = eval_all.find_attack("pgd-40@0.01")
    assert eval_all.budget("pgd-40@0.01", attack, SETTINGS | {"step_size": None})["step_size"] == 0.01
    assert eval_all.budget("pgd-40@0.01", attack, SETTINGS | {"step_size": 0.3})["step_size"] == 0.01
    assert eval_all.find_attack("mta-7@2/255").keywords == {"steps": 7, "step_size": 2 / 255}
    for wrong, complaint in (("pgd-40@x", "not a number"), ("pgd-40@-2", "out of range"), ("square@1", "no step size")):
        with pytest.raises(common.UserError, match=complaint):
            eval_all.find_attack(wrong)
    wide = eval_all.find_attack("pgd-5@2")
    assert eval_all.budget("pgd-5@2", wide, SETTINGS | {"norm": "l2", "eps": 3.0})["step_size"] == 2
    with pytest.raises(common.UserError, match="attack pgd-5@2: a step size of 2 on images in"):
        eval_all.budget("pgd-5@2", wide, SETTINGS)


@pytest.mark.parametrize("method, known, some", [
    ("pgd_he", "mnist", {"fgsm", "mim-20", "pgd-500", "deepfool-100", "feature", "fab-t", "rays", "spsa-80", "zoo"}),
    ("angular_at", "cifar10", {"pgd-20", "pgd-500", "cw-inf", "autoattack", "spsa-80"}),
    ("dsphere_cosine_wm_pgd", "mnist", {"fgsm", "pgd-100"}),
    ("cnn", "mnist", {"fgsm", "pgd-100"}),
    ("weightpen", "mnist", {"pgd-40@0.01", "pgd-200@0.01", "mta-200@0.01", "cw-l2"}),
    ("mmc_at", "cifar10", {"pgd-20@0.0031", "pgd-100@0.0031", "mta-100@0.0031"}),
    ("abcl", "cifar10", {"bim-20", "fgsm-l2"}),
    ("", None, {"autoattack"}),
])  # fmt: skip
def test_paper_is_what_the_methods_own_paper_reports(method, known, some):
    attacks = eval_all.named_attacks("paper", (method,), known)
    assert some <= set(attacks) and next(iter(attacks)) == "clean"
    for name, attack in attacks.items():
        eval_all.budget(name, attack, SETTINGS | {"known": known})


def test_fgsm_l2_has_a_ball_of_its_own(pixels):
    outcome = eval_all.evaluate(Threshold(), eval_all.named_attacks("fgsm-l2"), *pixels, SETTINGS)
    assert (outcome["attacks"]["fgsm-l2"]["norm"], outcome["attacks"]["fgsm-l2"]["eps"]) == ("l2", 0.5)
    assert not outcome["attacks"]["fgsm-l2"]["right"].any()  # 0.3 is the farthest boundary
    result = eval_all.report("toy", {}, outcome, SETTINGS | {"dataset": "toy"})
    assert result["attacks"]["worst case"]["right"] == result["attacks"]["clean"]["right"]


def test_an_evaluation_killed_by_sigkill_gives_the_same_table_and_repeats_nothing_finished(run_folder, tmp_path):
    run, root = run_folder("run"), Path(eval_all.__file__).parent
    attacks = "fgsm,pgd-20,spsa-80,square"

    def command(out):
        flags = ["--attacks", attacks, "--batch-size", "4", "--eps", "0.001", "--out", out]
        return [sys.executable, root / "eval_all.py", run, *flags]

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    start = partial(subprocess.Popen, cwd=root, env=environment, stderr=subprocess.PIPE, text=True)
    killed = start(command(tmp_path / "killed"))
    for line in killed.stderr:
        if "pgd-20" in line:  # finished; spsa-80 has begun
            time.sleep(0.2)
            killed.kill()
            break
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL and (tmp_path / "killed" / "unfinished.pt").exists()
    again = start(command(tmp_path / "killed"))
    told = again.communicate()[1]
    assert again.returncode == 0 and "going on with" in told, told
    assert start(command(tmp_path / "whole")).wait() == 0

    def table(out):
        rows = json.loads((tmp_path / out / "eval.json").read_text())["attacks"]
        return {name: {k: v for k, v in row.items() if k != "seconds"} for name, row in rows.items()}

    assert table("killed") == table("whole")
    verdicts = [np.load(tmp_path / out / "verdicts.npz") for out in ("killed", "whole")]
    assert all(np.array_equal(verdicts[0][key], verdicts[1][key]) for key in verdicts[1])
    assert not (tmp_path / "killed" / "unfinished.pt").exists()
    right = table("whole")["clean"]["right"]
    assert int(told.split("going on with ")[1].split()[0]) >= 3 * math.ceil(right / 4)  # clean, fgsm and pgd-20
