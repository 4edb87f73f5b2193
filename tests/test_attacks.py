"""The table of attacks: what holds for every one of them, names and settings, and AutoAttack by pyautoattack 0.2."""

from dataclasses import replace
from functools import partial
from importlib.metadata import version

import common
import eval_all
from eval_all import ATTACKS, find_attack

import pytest
import torch
from pyautoattack.autoattack import AutoAttack
from torch import nn

AUTOATTACK = ["apgd-ce", "apgd-t", "fab-t", "square", "autoattack"]


class Net(nn.Module):
    """A small network for images (3, 6, 6), with features and a linear last layer."""

    def __init__(self, classes=5):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.fc = nn.Sequential(nn.Flatten(), nn.Linear(108, 12), nn.Tanh()), nn.Linear(12, classes)
        self.scale, self.margin = 3.0, 0.1

    def features(self, x):
        return self.body(x)

    def forward(self, x):
        return self.fc(self.features(x))


def images(n, model):
    """Images that the model classifies correctly, one of them black and one white where n allows it."""
    x = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    x[1:2], x[2:3] = 0.0, 1.0
    return x, model(x).argmax(1)


def short(name):
    """The attack with a budget for a test."""
    few = {"cw-l2": {"searches": 3}, "feature": {"images": 2}, "zoo": {"queries": 300}, "rays": {"queries": 60}}
    few |= {part: {"queries": 30} for part in AUTOATTACK}
    attack = ATTACKS[name]
    return replace(attack, run=partial(attack.run, **few.get(name, {})), steps=attack.steps and min(attack.steps, 8))


CASES = [(name, norm) for name, attack in ATTACKS.items() for norm in attack.norms]


@pytest.mark.filterwarnings("ignore:autoattack without apgd-t")
@pytest.mark.parametrize("classes, n", [(2, 1), (3, 4), (5, 6)])
@pytest.mark.parametrize("name, norm", CASES)
def test_every_attack_stays_in_the_ball_and_in_range_and_leaves_the_model_alone(name, norm, classes, n):
    model, eps = Net(classes).train(), 0.1 if norm == "linf" else 0.5
    model.fc.bias.requires_grad_(False)
    x, y = images(n, model)
    before = x.clone(), [p.clone() for p in model.parameters()]
    if name == "apgd-t" and classes < 4:
        with pytest.raises(common.UserError, match=f"apgd-t needs more classes.*the model has {classes}"):
            short(name)(model, x, y, eps=eps, norm=norm)
        return
    x_adv = short(name)(model, x, y, eps=eps, norm=norm)
    assert x_adv.shape == x.shape and x_adv.min() >= 0 and x_adv.max() <= 1 and not x_adv.requires_grad
    assert ATTACKS[name].minimal or (common.norms(x_adv - x, norm) <= eps * (1 + 1e-5)).all()
    assert torch.equal(x, before[0]) and all(map(torch.equal, model.parameters(), before[1]))
    assert model.training and all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, False]


def test_what_restarts_repeat_is_what_starts_at_random():
    model = Net()
    x, y = images(6, model)
    for name in ATTACKS.keys() - {"square", "autoattack", "spsa-80", "nes-80", "zoo", "rays", "cw-l2"}:
        attack, found = replace(ATTACKS[name], steps=ATTACKS[name].steps and 1), []
        for seed in (0, 1):
            torch.manual_seed(seed)
            found.append(attack(model, x, y, eps=0.2, step_size=0.05))
        assert torch.equal(*found) != attack.random_start, name


def test_a_name_sets_steps_and_step_size():
    assert find_attack("pgd-40").steps == 40 and find_attack("pgd-40").run is eval_all.pgd
    assert find_attack("pgd-3-scaled").run is eval_all.pgd_scaled and find_attack("pgd-7-fn").needs == "fc"
    assert find_attack("mta-7@2/255") == replace(ATTACKS["mta-100"], steps=7, step_size=2 / 255)


def step_size(name, **settings):
    return eval_all.Settings(**settings).step_size_for(find_attack(name))


@pytest.mark.parametrize("dataset, eps, steps, expected", [
    ("cifar10", 0.031, 20, 0.003), ("cifar10", 0.031, 500, 0.003), ("mnist", 0.3, 100, 0.01), ("digits", 0.1, 20, 0.01),
    ("imagenet", 4 / 255, 20, 1 / 255), ("mnist", 0.02, 100, 0.01),  # the papers', where it fits the ball
    ("mnist", 0.3, 20, 0.0375), ("cifar10", 0.5, 20, 0.0625), ("cifar10", 0.031, 10, 0.00775),  # would not cross it
    ("mnist", 0.01, 20, 0.00125), ("cifar10", 0.3 / 255, 100, 0.0075 / 255),  # would jump between corners
])  # fmt: skip
def test_the_step_size_is_the_papers_where_it_fits_the_ball_else_it_follows_from_eps(dataset, eps, steps, expected):
    assert step_size(f"pgd-{steps}", dataset=dataset, eps=eps) == pytest.approx(expected)
    assert step_size(f"pgd-{steps}", dataset=dataset, eps=eps, norm="l2") == pytest.approx(2.5 * eps / steps)
    assert step_size(f"pgd-{steps}", dataset=dataset, eps=eps, step_size=0.02) == 0.02  # --step-size
    assert step_size(f"pgd-{steps}@0.005", dataset=dataset, eps=eps, step_size=0.02) == 0.005  # the name decides
    assert step_size("spsa-20", dataset=dataset, eps=eps) == 0.01


def test_an_attack_called_directly_and_in_an_evaluation():
    spy = replace(ATTACKS["pgd-20"], run=lambda model, x, y, **budget: seen.append(budget) or x)
    model, seen = Net(), []
    x, y = images(4, model)
    spy(model, x, y, eps=0.2)
    eval_all.evaluate(model, x, y, {"spy": spy}, eps=0.1, dataset="digits")
    assert [(budget["eps"], budget["step_size"]) for budget in seen] == [(0.2, 0.025), (0.1, 0.01)]
    assert (common.norms(ATTACKS["fgsm-l2"](model, x, y, eps=0.1) - x, "l2") <= 0.1 + 1e-6).all()
    with pytest.raises(common.UserError, match="Linf only"):
        ATTACKS["rays"](model, x, y, eps=0.1, norm="l2")


def selected(text, *methods, net=None, norm="linf", dataset="mnist"):
    targets = [eval_all.Model(method, net or Net(), {"method": method}) for method in methods or [""]]
    settings = eval_all.Settings(norm=norm, dataset=dataset)
    return list(eval_all.select_attacks(text, targets, settings, torch.rand(1, 3, 6, 6)))


def test_names_and_presets_make_one_list_that_begins_with_clean():
    assert selected("fgsm, clean,fgsm") == ["clean", "fgsm"]
    assert selected("quick, pgd-40") == ["clean", *eval_all.PRESETS["quick"].split(), "pgd-40"]
    assert all(selected(preset)[0] == "clean" for preset in eval_all.PRESETS)
    assert set(selected("all")) == set(ATTACKS)


@pytest.mark.parametrize("method, dataset, some", [
    ("pgd_he", "mnist", "fgsm mim-20 pgd-500 deepfool-100 feature-100 fab rays spsa-80 zoo"),
    ("pgd_he", "imagenet", "pgd-10 pgd-50"), ("free_he", "imagenet", "pgd-10 pgd-50"),
    ("fast_mhe", "cifar10", "pgd-50@2/255x10"), ("free", "cifar10", "pgd-50@2/255x10"), ("fast", "mnist", "pgd-20 fab"),
    ("angular_at", "cifar10", "pgd-20 pgd-500 cw-inf autoattack spsa-80"),
    ("dsphere_cosine_wm_pgd", "mnist", "fgsm pgd-100@0.01"), ("cnn", "cifar10", "fgsm pgd-100@0.01"),
    ("weightpen", "mnist", "pgd-40@0.01 pgd-200@0.01 mta-200@0.01 cw-l2"),
    ("mmc_at", "cifar10", "pgd-20@0.0031 pgd-100@0.0031 mta-100@0.0031"),
    ("abcl", "cifar10", "bim-20 fgsm-l2"), ("", None, "autoattack"),
])  # fmt: skip
def test_paper_is_what_the_methods_own_paper_reports(method, dataset, some):
    assert set(some.split()) <= set(selected("paper", method, dataset=dataset))
    assert "pgd-100@0.01" in selected("paper", method, "cnn", dataset=dataset)  # several models


@pytest.mark.parametrize("text, methods, dataset, eps", [
    ("paper", ["pgd_he"], "cifar10", None), ("paper", ["cnn"], "cifar10", 8 / 255), ("paper", ["cnn"], "mnist", None),
    ("paper", ["fast"], "cifar10", 8 / 255), ("paper, square", ["weightpen", "mart"], "cifar10", 8 / 255),
    ("weightpen", ["pgd"], "cifar10", 8 / 255), ("quick,pgd-7", ["cnn"], "cifar10", None),
])  # fmt: skip
def test_a_presets_eps_is_that_of_its_paper(text, methods, dataset, eps):
    targets = [eval_all.Model(method, None, {"method": method}) for method in methods]
    assert eval_all.preset_eps(text, targets, dataset) == eps
    with pytest.raises(common.UserError, match="different eps"):
        eval_all.preset_eps("paper,he", [eval_all.Model("cnn", None, {"method": "cnn"})], "cifar10")


def test_restarts_in_a_name_are_of_that_attack_alone():
    """Beside --restarts, which are of the others."""
    counts = {"pgd-2@2/255x4": 4, "pgd-2@0.01": 3, "noisex2": 2, "pgd-2x5": 5, "pgd-2-scaledx1": 1}
    calls = []

    def counting(attack):
        return replace(attack, run=lambda model, x, y, **_: calls.append(1) or x)

    model = Net()
    x, _ = images(3, model)
    for name, expected in counts.items():
        attack = eval_all.find_attack(name)
        assert attack.step_size == {"pgd-2@2/255x4": 2 / 255, "pgd-2@0.01": 0.01}.get(name)
        eval_all.evaluate(model, x, model(x).argmax(1), {name: counting(attack)}, eps=0.1, restarts=3)
        assert len(calls) == expected
        calls.clear()
    with pytest.raises(common.UserError, match="no random start"):
        eval_all.find_attack("deepfool-50x2")


def test_fab_is_the_untargeted_one_with_20_iterations(monkeypatch):
    seen, model = [], Net()
    note = lambda fab, x, y: seen.append((fab.targeted, fab.n_iter)) or x  # noqa: E731
    monkeypatch.setattr("pyautoattack.fab_base.FABAttack.perturb", note)
    for name in ("fab", "fab-t"):
        ATTACKS[name](model, *images(3, model), eps=0.1)
    assert seen == [(False, 20), (True, 100)]


def test_a_preset_skips_what_does_not_fit_and_a_name_is_an_error(capsys):
    plain, maps = nn.Sequential(nn.Flatten(), nn.Linear(108, 5)), Net()
    maps.body, maps.fc = nn.Conv2d(3, 2, 3), nn.Sequential(nn.Flatten(), nn.Linear(32, 5))  # as in torchvision's VGG
    for net in (plain, maps):
        assert set(ATTACKS) - set(selected("all", net=net)) == {"feature", "pgd-20-fn"}
    assert not {"feature", "rays", "zoo", "spsa-80", "nes-80"} & set(selected("all", norm="l2"))
    out = capsys.readouterr().out
    assert "skipped: pgd-20-fn needs" in out and "skipped: rays is defined in Linf only" in out
    for text, options, message in (
        ("pgd-3-fn", {"net": plain}, "pgd-3-fn needs .*fc"),
        ("quick,feature", {"net": plain}, "feature needs .*features"),
        ("rays", {"norm": "l2"}, "rays is defined in Linf only"),
    ):
        with pytest.raises(common.UserError, match=message):
            selected(text, **options)


@pytest.mark.parametrize("norm, eps", [("linf", 0.04), ("l2", 0.3)])
@pytest.mark.parametrize("name", AUTOATTACK)
def test_autoattack_and_its_parts_are_those_of_the_package(name, norm, eps):
    """With ten classes the package's own numbers of targets stay: the same images, bit for bit, and passes."""
    assert (0, 2) <= tuple(map(int, version("pyautoattack").split(".")[:2])) < (0, 3)
    model = Net(10).eval()
    x, y = images(20, model)
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    official = AutoAttack(model, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, seed=7)
    official.attacks_to_run = [name] if name != "autoattack" else official.attacks_to_run
    official.square.n_queries = 200
    expected, predicted = official.run_standard_evaluation(x, y, batch_size=len(x))
    asked = len(passes)
    torch.manual_seed(7)
    x_adv = replace(ATTACKS[name], run=partial(ATTACKS[name].run, queries=200))(model, x, y, eps=eps, norm=norm)
    assert torch.equal(x_adv, expected) and 0 < (predicted != y).sum() < len(x)
    assert len(passes) - asked == asked + 1  # to count the classes


def test_autoattack_with_three_classes_runs_its_other_parts_and_says_so():
    model = Net(3)
    x, y = images(6, model)
    with pytest.warns(UserWarning, match="autoattack without apgd-t: more than 3 classes"):
        x_adv = short("autoattack")(model, x, y, eps=0.2)
    assert (model(x_adv).argmax(1) != y).any()
