"""The evaluator: what counts as robust, what is caught, what is kept, and the command line."""

import csv
import importlib
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import common
import eval_all
import models
from eval_all import ATTACKS, Attack, evaluate

import numpy as np
import pytest
import torch
from test_attacks import Net, images
from test_audit import GOLDEN, Gradient, digits
from torch import nn

ROOT = Path(eval_all.__file__).parent


class Threshold(nn.Module):
    """Predicts class 1 where the first pixel is above 0.5, else class 0; the margin is that pixel's distance to 0.5."""

    def forward(self, x):
        return torch.stack([0.5 - x[:, 0, 0, 0], x[:, 0, 0, 0] - 0.5], dim=1)


@pytest.fixture
def pixels():
    """Images 0 and 2 are misclassified; of the others 1 and 3 are within 0.1 of the boundary, 4 and 5 are not."""
    x = torch.full((6, 1, 2, 2), 0.5)
    x[:, 0, 0, 0] = torch.tensor([0.3, 0.45, 0.56, 0.55, 0.8, 0.2])
    return x, torch.tensor([1, 0, 0, 1, 1, 0])


def test_robust_means_correct_clean_and_correct_under_attack(pixels):
    names = "fgsm bim-20 mim-20 pgd-20 pgd-20-scaled adaptive-pgd-20 cw-inf mta-100 deepfool".split()
    verdicts = evaluate(Threshold(), *pixels, ",".join(names), eps=0.1)["verdicts"]
    assert verdicts["clean"].tolist() == [False, True, False, True, True, True]
    assert verdicts["clean_prediction"].tolist() == [0, 0, 1, 1, 1, 0]
    for name in names:
        assert verdicts[name].tolist() == [False, False, False, False, True, True], name


def test_the_worst_case_is_image_by_image_and_over_the_evaluations_own_ball(pixels):
    attacks = {
        "a": Attack(lambda model, x, y, **_: x + 0.08 * (x < 0.5)),  # fools image 1
        "b": Attack(lambda model, x, y, **_: x - 0.08 * (x > 0.5)),  # fools image 3
        "fgsm-l2": ATTACKS["fgsm-l2"],
    }
    rows = evaluate(Threshold(), *pixels, attacks, eps=0.1, dataset="digits")["attacks"]
    correct = {"clean": 4, "a": 3, "b": 3, "fgsm-l2": 0, "worst case": 2}
    assert {name: row["correct"] for name, row in rows.items()} == correct
    assert (rows["fgsm-l2"]["norm"], rows["fgsm-l2"]["eps"]) == ("l2", 0.5)


def test_a_nearest_image_outside_the_ball_is_no_success_and_its_distance_is_kept(pixels):
    rows = evaluate(Threshold(), *pixels, "deepfool,cw-l2-100", eps=0.1, dataset="digits")["attacks"]
    assert rows["deepfool"]["correct"] == 2 and rows["deepfool"]["median_distance"] == pytest.approx(0.3, rel=0.03)
    assert (rows["cw-l2-100"]["norm"], rows["cw-l2-100"]["correct"], rows["worst case"]["correct"]) == ("l2", 0, 2)


def in_place(x):
    x += 0.15
    return x.clamp_(0, 1)


CHEATS = {
    "ball": lambda x: (x + 0.11).clamp(0, 1),
    "above 1": lambda x: x + 0.1,
    "below 0": lambda x: x - 0.1,
    "in place": in_place,
    "other shape": lambda x: x[..., :1],
}


@pytest.mark.parametrize("name", CHEATS)
def test_an_attack_that_cheats_is_an_error_that_names_it(name):
    x, y = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1).repeat(1, 1, 2, 2), torch.tensor([0, 0, 1])
    with pytest.raises(RuntimeError, match=f"attack {name} (left|returned)"):
        evaluate(Threshold(), x, y, {name: Attack(lambda model, x, y, **_: CHEATS[name](x))}, eps=0.1)


@pytest.mark.parametrize("norm, eps", [("l2", 0.5), ("l2", 3.0), ("linf", 8 / 255)])
def test_rounding_on_large_images_does_not_leave_the_ball(norm, eps):
    torch.manual_seed(0)
    x, y = 0.25 + 0.5 * torch.rand(1, 3, 224, 224), torch.tensor([0])
    x[0, 0, 0, 0] = 0.3
    edge = common.project(x + torch.randn_like(x), x, eps, norm)
    assert evaluate(Threshold(), x, y, {"edge": Attack(lambda *_, **__: edge)}, norm=norm, eps=eps)
    with pytest.raises(RuntimeError, match="beyond left"):
        evaluate(Threshold(), x, y, {"beyond": Attack(lambda *_, **__: x + 1.0001 * (edge - x))}, norm=norm, eps=eps)


def test_logits_and_images_that_are_not_finite_are_counted(pixels):
    class Breaks(Threshold):
        def forward(self, x):
            return super().forward(x) / (x[:, :1, 0, 0] < 0.75)  # infinite for image 4

    nan = Attack(lambda model, x, y, **_: torch.where(x[:, :1, :1, :1] < 0.3, math.nan, x))  # image 5
    rows = evaluate(Breaks(), *pixels, {"nan": nan}, eps=0.1)["attacks"]
    assert (rows["clean"]["correct"], rows["clean"]["nonfinite"]) == (3, 1)
    assert (rows["nan"]["correct"], rows["nan"]["nonfinite"]) == (3, 1)  # an attack that failed on image 5


def test_a_nan_gradient_of_one_image_changes_no_attack_on_the_others():
    model, breaking = Net(), nn.Sequential()
    breaking.forward = lambda x: model(Gradient.apply(x, torch.where(x[:, :1, :1, :1] > 0.8, math.nan, 1.0)))
    x, y = images(8, model)
    x[:, 0, 0, 0] = torch.where(torch.arange(8) == 3, 1.0, 0.5)
    y = model(x).argmax(1)
    names = "fgsm mim-20 pgd-20 cw-inf mta-5 deepfool-5 cw-l2-5 apgd-t autoattack".split()
    good, bad = (evaluate(net, x, y, ",".join(names), eps=0.16, norm="l2") for net in (model, breaking))
    for name in names:
        assert bad["attacks"][name]["nonfinite"] == 1 and good["attacks"][name]["nonfinite"] == 0, name
        assert "1 image(s), 3" in bad["attacks"][name]["remark"], name
        others = [np.delete(result["verdicts"][name], 3).tolist() for result in (good, bad)]
        assert others[0] == others[1], name
    assert 0 < good["attacks"]["apgd-t"]["correct"] < 8
    assert bad["verdicts"]["apgd-t"][3] and not bad["verdicts"]["autoattack"][3]  # Square needs no gradient


@pytest.mark.parametrize("correct, n, low, high", [  # Newcombe 1998, Table I, method 3
    (81, 263, 25.53, 36.62), (15, 148, 6.24, 16.05), (0, 20, 0.0, 16.11), (1, 29, 0.61, 17.18), (20, 20, 83.89, 100),
])  # fmt: skip
def test_intervals_are_the_published_wilson_intervals(correct, n, low, high):
    row = eval_all.accuracy(torch.arange(n) < correct)
    assert (row["correct"], row["n"], row["accuracy"]) == (correct, n, 100 * correct / n)
    assert (row["low"], row["high"]) == pytest.approx((low, high), abs=0.006)


def test_random_numbers_follow_from_seed_and_name_and_restarts_repeat_random_starts_only(pixels):
    drawn = []
    fixed = Attack(lambda model, x, y, **_: drawn.append(torch.rand(1).item()) or x)
    for seed in (0, 1):
        spies = {"random": replace(fixed, random_start=True), "fixed": fixed}
        evaluate(Threshold(), *pixels, spies, eps=0.1, restarts=3, seed=seed)
    assert len(drawn) == len(set(drawn)) == 2 * (3 + 1)
    torch.manual_seed(99)  # what ran before, and other attacks, change nothing
    evaluate(Threshold(), *pixels, {"fixed": fixed}, eps=0.1, seed=1)
    assert drawn[-1] == drawn[-2]


def test_a_batch_has_images_of_all_classes_in_whatever_order_they_come():
    """The feature attack draws its aims from its batch."""
    x, met = torch.tensor([0.2, 0.8]).repeat_interleave(200).view(400, 1, 1, 1), []
    spy = Attack(lambda model, x, y, **_: met.append(y.tolist()) or x)
    evaluate(Threshold(), x, (x > 0.5).long().flatten(), {"spy": spy}, eps=0.1, batch_size=20)
    assert [len(batch) for batch in met] == [20] * 20 and all(set(batch) == {0, 1} for batch in met)


class Failing:
    """PGD-3 that fails at its k-th batch, and counts the batches that it is called with."""

    __slots__ = ("at", "calls")  # not part of the attack's identity, as attributes are

    def __init__(self, at=None):
        self.at, self.calls = at, 0

    def __call__(self, *batch, **budget):
        self.calls += 1
        if self.calls == self.at:
            raise ValueError("out of luck")
        return eval_all.pgd(*batch, **budget)


def test_an_interrupted_evaluation_attacks_only_the_missing_batches(tmp_path):
    model, x, y = digits("he", 40)
    first, second, whole = Failing(at=3), Failing(), Failing()
    settings = dict(eps=0.1, batch_size=8)

    def run(failing, folder):
        attacks = {"fgsm": ATTACKS["fgsm"], "mine": Attack(failing, steps=3)}
        return evaluate(model, x, y, attacks, folder=folder, **settings)

    with pytest.raises(ValueError, match="out of luck") as caught:
        run(first, tmp_path / "a")
    assert "attack mine" in caught.value.__notes__[0]
    resumed, uninterrupted = run(second, tmp_path / "a"), run(whole, tmp_path / "b")
    assert second.calls == whole.calls - 2 == 3
    assert np.array_equal(resumed["verdicts"]["mine"], uninterrupted["verdicts"]["mine"])
    assert resumed["attacks"]["mine"]["queries"] == uninterrupted["attacks"]["mine"]["queries"]
    lines = {line["attack"]: line["accuracy"] for line in csv.DictReader(open(tmp_path / "a" / "eval.csv"))}
    assert lines == {name: f"{row['accuracy']:.6g}" for name, row in resumed["attacks"].items()}


def test_results_add_up_and_those_of_other_settings_are_kept_apart(tmp_path):
    model, x, y = digits("he", 40)
    counting = Failing()
    mine = {"mine": Attack(counting, steps=3)}
    first = evaluate(model, x, y, mine, eps=0.05, folder=tmp_path, index=torch.arange(100, 140))
    both = evaluate(model, x, y, mine | {"fgsm": ATTACKS["fgsm"]}, eps=0.05, folder=tmp_path)
    assert list(both["attacks"]) == ["clean", "mine", "fgsm", "worst case"]
    assert both["attacks"]["mine"] == first["attacks"]["mine"]
    kept = json.loads((tmp_path / "eval.json").read_text())
    assert kept["attacks"] == both["attacks"] and (kept["eps"], kept["norm"]) == (0.05, "linf")
    with np.load(tmp_path / "verdicts.npz") as verdicts:
        assert list(verdicts["index"]) == list(range(100, 140)) and verdicts["label"].tolist() == y.tolist()
        worst = np.logical_and(verdicts["mine"], verdicts["fgsm"])
    assert kept["attacks"]["worst case"]["correct"] == worst.sum() and worst.dtype == bool
    other = evaluate(model, x, y, "fgsm", eps=0.1, folder=tmp_path)
    assert list(other["attacks"]) == ["clean", "fgsm", "worst case"]
    assert json.loads((tmp_path / "eval.json").read_text())["eps"] == 0.1
    assert evaluate(model, x, y, mine, eps=0.05, folder=tmp_path)["attacks"] == both["attacks"] and counting.calls == 1


def test_other_weights_images_labels_or_code_are_attacked_again(tmp_path, monkeypatch):
    counting = Failing()

    def attacked(model, x, y):
        before = counting.calls
        evaluate(model, x, y, {"mine": Attack(counting, steps=1)}, eps=0.1, folder=tmp_path / "out")
        return counting.calls > before

    model, x, y = digits("he", 4)
    assert attacked(model, x, y) and not attacked(model, x, y)
    assert attacked(model, x.flip(0), y.flip(0)) and attacked(model, x, torch.tensor([*y[:3], 0]))
    model.options["scale"] = 1.0  # changes no weight, but the losses of attacks
    assert attacked(model, x, y)
    model.fc.weight.data += 1e-6
    assert attacked(model, x, y)
    monkeypatch.syspath_prepend(tmp_path)
    file = write(tmp_path / "users_net.py", "import torch", "class Net(torch.nn.Flatten):", "    pass")
    net, y = importlib.import_module("users_net").Net(), x.flatten(1).argmax(1)
    assert attacked(net, x, y) and not attacked(net, x, y)
    file.write_text(file.read_text() + "# changed\n")
    assert attacked(net, x, y)


def test_an_attacks_identity_is_that_of_its_functions_and_their_settings():
    """Also of functions among its keywords, whose addresses differ from process to process."""

    def attack(scale, loss=common.margin_ce):
        return Attack(partial(eval_all.pgd, loss=partial(loss, scale=scale, reduction="none")), steps=5)

    assert attack(10.0).identity() == attack(10.0).identity() != attack(2.0).identity()
    assert attack(10.0).identity() != attack(10.0, eval_all.cw_margin).identity()

    def moved(k):
        return Attack(lambda model, x, y, eps, **_: (x + k * eps).clamp(0, 1))

    def recursive(k):
        def run(model, x, y, **budget):
            return run(model, x, y, **budget) if k else x

        return Attack(run)

    assert moved(0).identity() == moved(0).identity() != moved(1).identity()
    assert recursive(0).identity() == recursive(0).identity() != recursive(1).identity()


@pytest.mark.parametrize("message, changed", [
    ("float64", dict(x=torch.rand(4, 1, 2, 2).double())), ("up to 255", dict(x=torch.full((4, 1, 2, 2), 255.0))),
    ("labels torch.int32", dict(y=torch.zeros(4, dtype=torch.int32))), ("each of 4", dict(y=torch.zeros(3).long())),
    ("up to 2", dict(x=torch.tensor([0.1, 0.2, 0.3, 2.0]).view(4, 1, 1, 1))), ("from 0", dict(y=torch.arange(4) - 1)),
    ("name of a result", dict(attacks={"label": ATTACKS["fgsm"]})), ("name", dict(attacks={"clean": ATTACKS["fgsm"]})),
    ("no folder", dict(save_adversarial=True)),
])  # fmt: skip
def test_what_a_notebook_gives_wrongly_is_refused(message, changed):
    given = dict(x=torch.rand(4, 1, 2, 2), y=torch.zeros(4).long(), attacks="clean", eps=0.1) | changed
    with pytest.raises(common.UserError, match=message):
        evaluate(Threshold(), **given)


def test_any_module_in_a_notebook_and_nothing_of_it_changes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)).train()
    model[1].bias.requires_grad_(False)
    x, before = torch.rand(30, 3, 8, 8), {key: value.clone() for key, value in model.state_dict().items()}
    y = model.eval()(x).argmax(1)
    model.train()
    x_adv = ATTACKS["pgd-20"](model, x, y, eps=0.1)
    torch.backends.cudnn.allow_tf32 = True
    rows = evaluate(model, x, y, attacks="quick,apgd-t,autoattack", eps=0.1)["attacks"]
    assert (x_adv - x).abs().max() <= 0.1 + 1e-6
    assert rows["worst case"]["correct"] <= rows["autoattack"]["correct"] <= 30 and not torch.backends.cudnn.allow_tf32
    assert model.training and [p.requires_grad for p in model.parameters()] == [True, False, True, True, True, True]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert evaluate(model, (255 * x).byte(), y, attacks="clean")["attacks"]["clean"]["n"] == 30


def test_amp_crafts_in_bfloat16_and_the_verdict_is_float32():
    model, x, y = digits("he", 40)
    inside = []
    model.register_forward_hook(lambda *_: inside.append(torch.is_autocast_enabled("cpu")))
    few = {name: eval_all.find_attack(name) for name in ("rays", "zoo", "spsa-3", "cw-inf-10", "pgd-10")}
    for name in ("rays", "zoo"):
        few[name] = replace(few[name], run=partial(few[name].run, queries=300))
    exact = evaluate(model, x, y, few, eps=0.1)["attacks"]
    assert not any(inside)
    inside.clear()
    rows = evaluate(model, x, y, few, eps=0.1, amp=True)["attacks"]
    assert any(inside) and not inside[-1] and rows["clean"] == exact["clean"] | {"seconds": rows["clean"]["seconds"]}
    assert all(abs(rows[name]["correct"] - exact[name]["correct"]) <= 1 for name in few), rows


def figures(folder):
    """{attack: correct} and the verdicts of a folder."""
    with np.load(folder / "verdicts.npz") as verdicts:
        rows = json.loads((folder / "eval.json").read_text())["attacks"]
        return {name: row["correct"] for name, row in rows.items()}, {key: verdicts[key].tolist() for key in verdicts}


def test_several_models_give_one_table_also_with_different_attacks(cli, tmp_path):
    he, linear, out = GOLDEN / "he.pt", GOLDEN / "linear.pt", tmp_path / "out"
    flags = ["--num-images", "30", "--out", out]
    code, text, err = cli("eval_all", he, linear, he, "--attacks", "fgsm", *flags)
    folders = {path.name for path in out.iterdir() if (path / "eval.json").exists()}
    assert code == 0 and len(folders) == 3 and {"he", "linear"} < folders, err
    assert "n = 30 test images" in text and all(name in text for name in folders)
    (tmp_path / "copy.pt").write_bytes(he.read_bytes())
    call = ["--source", he, "--attacks", "bim-3", *flags]
    code, text, err = cli("eval_all", linear, tmp_path / "copy.pt", *call)  # only one of them has FGSM
    assert code == 0, err
    assert all(f"\n{name} " in text for name in ("clean", "fgsm", "bim-3", "pgd-20 from he", "worst case"))
    correct, verdicts = figures(out / "linear")
    transferred = {f"{name} from he" for name in ("fgsm", "mim-20", "pgd-20")}
    assert set(correct) == {"clean", "fgsm", "bim-3", "worst case"} | transferred
    assert verdicts["index"] == sorted(np.random.default_rng(0).permutation(359)[:30])
    assert correct["worst case"] <= min(correct.values())


@pytest.mark.parametrize("b, c, n, p", [(12, 2, 50, 0.0129), (0, 0, 20, 1.0), (1, 7, 8, 0.0703)])
def test_a_paired_difference_is_that_of_agresti_and_min(b, c, n, p):
    """b images are correct under the first model only, c under the second only; p is a sum of binomial terms."""
    first, second = (np.arange(n) < b), (np.arange(n) >= n - c)
    row = eval_all.paired_difference(first, second)
    assert row["difference"] == 100 * (c - b) / n and row["p"] == pytest.approx(p, abs=1e-4)
    b, c, total = b + 0.5, c + 0.5, n + 2
    spread = 1.959964 * math.sqrt(b + c - (c - b) ** 2 / total) / total
    ends = [100 * ((c - b) / total + side * spread) for side in (-1, 1)]
    assert (row["low"], row["high"]) == pytest.approx(np.clip(ends, -100, 100), abs=1e-3)


def test_several_models_are_compared_image_by_image_on_the_attacks_that_both_faced(cli, tmp_path, pixels):
    he, linear, out = GOLDEN / "he.pt", GOLDEN / "linear.pt", tmp_path / "out"
    name = "linear-" + 30 * "x"
    (tmp_path / f"{name}.pt").write_bytes(linear.read_bytes())
    flags = [he, tmp_path / f"{name}.pt", "--num-images", "60", "--out", out, "--source", tmp_path / f"{name}.pt"]
    code, text, err = cli("eval_all", *flags, "--attacks", "pgd-5,fgsm-l2")
    assert code == 0, err
    rows = {row["attack"]: row for row in csv.DictReader(open(out / "paired.csv"))}
    (first, _), (second, _) = (figures(out / "he"), figures(out / name))
    assert rows.keys() == first.keys() and "fgsm-l2" in rows and f"mim-20 from {name}" in rows
    for attack, row in rows.items():
        assert (row["model"], row["minus"], row["n"]) == (name, "he", "60")
        assert float(row["difference"]) == pytest.approx(100 * (second[attack] - first[attack]) / 60, abs=1e-3), attack
    table = text.partition("attack  ")[2].partition("\n\n")[0].splitlines()
    assert len({line.index(")") for line in table[1:]}) == 1 and f"{name} minus he, the same 60 images" in text
    verdicts = {"clean": [1, 1, 1, 1], "fgsm": [1, 1, 1, 0], "own": [0, 0, 1, 1], "fgsm-l2": [0, 0, 0, 0]}
    verdicts = {name: np.array(each, bool) for name, each in verdicts.items()}
    rows = {name: {"norm": "l2" if "l2" in name else "linf"} for name in verdicts}
    a, b = ({"model": m, "norm": "linf", "attacks": dict(rows), "verdicts": dict(verdicts)} for m in "AB")
    b["verdicts"] |= {"clean": ~verdicts["fgsm"], "fgsm": ~verdicts["fgsm"]}
    del b["attacks"]["own"], b["verdicts"]["own"]  # only one of them faced it
    found = {row["attack"]: row["difference"] for row in eval_all.compare_models([a, b])}
    assert found == {"clean": -75, "fgsm": -50, "fgsm-l2": 0, "worst case": -50}


def test_attacked_images_are_kept_and_are_a_dataset_for_other_models(cli, tmp_path):
    """Of an earlier evaluation too, which is then made again; a restart changes only what is still correct."""
    he, attacks, out = GOLDEN / "he.pt", "fgsm,noise,bim-20,deepfool", tmp_path / "out"
    flags = ["--num-images", "40", "--eps", "0.1", "--restarts", "3", "--batch-size", "16", "--out", out]
    assert cli("eval_all", he, "--attacks", attacks, *flags)[0] == 0
    before = figures(out)
    assert cli("eval_all", he, "--attacks", attacks, *flags, "--save-adversarial")[0] == 0 and figures(out) == before
    model, data = common.load_checkpoint(he)[0], common.load_data("digits")
    x, y = common.images_at(data.x_test, torch.tensor(before[1]["index"]), "cpu"), before[1]["label"]
    for name in attacks.split(","):
        (file,) = out.glob(f"settings-*/x_adv-{name}-*.npz")
        with np.load(file) as kept:
            x_adv, moved = torch.from_numpy(kept["x_test"]), before[1]["clean"]
            assert kept["x_test"].dtype == np.float32 and kept["y_test"].tolist() == y
            assert kept["index"].tolist() == before[1]["index"]
        assert (x_adv - x).abs().max() <= 0.1 + 1e-6  # DeepFool's images outside the ball are not kept
        assert name == "deepfool" or ((x_adv != x).flatten(1).any(1).tolist()) == moved
        assert (model(x_adv).argmax(1) == torch.tensor(y)).tolist() == before[1][name], name
        code, _, err = cli("eval_all", he, "--dataset", file, "--attacks", "clean", "--out", tmp_path / "again" / name)
        assert code == 0, err
        assert figures(tmp_path / "again" / name)[1]["clean"] == before[1][name]


def test_two_ranks_give_the_verdicts_of_one_process(tmp_path):
    flags = "--attacks noise,pgd-5,mta-3 --eps 0.2 --num-images 24 --batch-size 4 --restarts 2 --device cpu".split()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master-port=29533"]
    for start, folder in (([sys.executable], "one"), (torchrun, "two")):
        command = [*start, "eval_all.py", GOLDEN / "he.pt", *flags, "--out", tmp_path / folder]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert figures(tmp_path / "one") == figures(tmp_path / "two")
    assert done.stdout.count("worst case:") == 1


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def test_users_files_find_their_own_modules_also_where_their_names_are_ours(cli, tmp_path):
    for folder, width in (("one", 3), ("two", 5)):
        write(tmp_path / folder / "models" / "__init__.py")
        write(tmp_path / folder / "models" / "net.py", "from utils import width")
        write(tmp_path / folder / "utils.py", f"width = {width}")
        write(tmp_path / folder / "mine.py", "import torch, utils", "from models.net import width", "def make():",
              "    sizes = 64, 10 + utils.width + width",
              "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(*sizes))")  # fmt: skip
    texts = [f"{tmp_path / folder / 'mine.py'}:make" for folder in ("one", "two")]
    assert [eval_all.user_model(text)[1].out_features for text in [*texts, texts[0]]] == [16, 20, 16]
    (tmp_path / "one" / "torch").mkdir()  # no module: torch stays what it is
    found = eval_all.user_model(texts[0])
    assert {Path(file).name for file in found.source_files} >= {"mine.py", "utils.py", "net.py"}
    assert isinstance(found, torch.nn.Module) and sys.modules["torch"] is torch
    assert sys.modules["models"] is models and sys.modules["common"] is common
    flags = ["--dataset", "digits", "--attacks", "fgsm", "--num-images", "5"]
    code, text, err = cli("eval_all", texts[0], "--model", texts[1], *flags)
    assert code == 0 and text.count("mine-make") >= 2, err


USERS_FILE = """
from types import SimpleNamespace
from torch import Tensor, nn
class Net(nn.Module):
    def __init__(self, wrap=lambda logits: logits, classes=10, hook=lambda net, inputs: None):
        super().__init__()
        self.fc, self.wrap = nn.Linear(64, classes), wrap
        self.register_forward_pre_hook(hook)
    def forward(self, x):
        return self.wrap(self.fc(x.flatten(1)))
def few(): return Net(classes=9)
def double(): return Net(Tensor.double)
def pair(): return Net(lambda logits: (logits, logits))
def output(): return Net(lambda logits: SimpleNamespace(logits=logits))
def flat(): return Net(Tensor.flatten)
def number(): return 3
def strict(): return Net(hook=lambda net, inputs: [None][((255 * inputs[0] + 0.1) % 1 > 0.2).any()])
few_made = few()
"""


@pytest.mark.parametrize("flags, message", [
    (["mine.py:few", "--dataset", "digits"], "(2, 9).*at least 10"), (["mine.py", "--dataset", "digits"], ":FUNCTION"),
    (["mine.py:double", "--dataset", "digits"], "float64"), (["mine.py:few_made", "--dataset", "digits"], "(2, 9)"),
    (["mine.py:pair", "--dataset", "digits"], "tuple"), (["mine.py:flat", "--dataset", "digits"], "(20,)"),
    (["mine.py:output", "--dataset", "digits"], "its .logits"), (["bare.pt", "--arch", "small_cnn"], "--dataset"),
    (["bare.pt", "--arch", "small_cnn", "--dataset", "digits", "--normalize"], "mean"),
    (["mine.py:number", "--dataset", "digits"], "nn.Module"), (["mine.py:absent", "--dataset", "digits"], "absent"),
    (["nowhere.py:make", "--dataset", "digits"], "nowhere.py"), (["nowhere.pt"], "nowhere.pt"),
    (["mine.py:Net"], "--dataset"), ([], "name a run"), (["bare.pt", "--dataset", "digits"], "--arch"),
    (["he.pt", "--dataset", "color.npz"], "he"), (["he.pt", "--attacks", "pgd"], "unknown attack 'pgd'"),
    (["he.pt", "--attacks", "square@1"], "no step size"), (["he.pt", "--attacks", "rays", "--norm", "l2"], "Linf only"),
    (["he.pt", "--eps", "-1"], "--eps"), (["he.pt", "--num-images", "0"], "--num-images"),
])  # fmt: skip
def test_what_a_user_can_mend_is_one_line(cli, make_npz, tmp_path, flags, message):
    write(tmp_path / "mine.py", USERS_FILE)
    (tmp_path / "he.pt").write_bytes((GOLDEN / "he.pt").read_bytes())
    torch.save(digits("he", 1)[0].state_dict(), tmp_path / "bare.pt")
    make_npz("color", shape=(8, 8, 3))
    code, _, err = cli("eval_all", *flags)
    assert code == 2 and err.count("\n") == 1 and "Traceback" not in err, err
    assert all(part in err for part in message.split(".*")), err


def test_a_users_network_of_torchvision_on_images_that_are_not_square(cli, make_npz, tmp_path):
    """Its file imports torchvision, whose C++ operators may not load; the images are test images alone."""
    write(tmp_path / "mine.py", "import torchvision", "def make():", "    return torchvision.models.resnet18()")
    x = np.random.default_rng(0).random((6, 32, 48, 3), np.float32)
    path = make_npz("cifar10_binary", x_train=None, y_train=None, x_test=x, y_test=np.arange(6) % 2)
    command = [sys.executable, ROOT / "eval_all.py", "mine.py:make", "--dataset", path, "--attacks", "fgsm"]
    done = subprocess.run([*command, "--device", "cpu"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cifar10_binary, n = 6 test images, Linf eps 0.031" in done.stdout


def test_an_error_in_the_users_model_keeps_its_traceback_and_names_the_attack(cli, tmp_path):
    write(tmp_path / "mine.py", USERS_FILE)
    with pytest.raises(IndexError) as caught:  # of pixels that are no multiples of 1 / 255
        cli("eval_all", "mine.py:strict", "--dataset", "digits", "--attacks", "pgd-2")
    assert "attack pgd-2" in caught.value.__notes__[0]


@pytest.mark.parametrize("head, flags, expected", [
    ("he", [], (15.0, 0.2, True)), ("linear", [], (1.0, 0.0, False)),  # as in HE's code, and in that of TRADES and MART
    ("he", ["--no-normalize", "--scale", "10"], (10.0, 0.2, False)),
])  # fmt: skip
def test_a_bare_state_dict_has_the_scale_of_its_head(cli, make_npz, tmp_path, head, flags, expected):
    make_npz("cifar10", shape=(32, 32, 3))
    torch.save(models.build_model("wrn-10-1", 10, head=head).state_dict(), tmp_path / "net.pt")
    described = ["--dataset", "cifar10", "--data-dir", tmp_path, "--arch", "wrn-10-1", "--head", head, *flags]
    code, _, err = cli("eval_all", tmp_path / "net.pt", *described, *"--attacks adaptive-pgd-2 --num-images 4".split())
    assert code == 0, err
    options = json.loads((tmp_path / "eval-net" / "eval.json").read_text())["model_options"]
    assert (options["scale"], options["margin"], options["mean"] is not None) == expected


def test_the_audit_comes_with_the_presets_paper_and_all():
    asked = {names: eval_all.parse_args(["x", "--attacks", names]).audit for names in ("quick", "pgd-20, paper", "all")}
    assert asked == {"quick": False, "pgd-20, paper": True, "all": True}
