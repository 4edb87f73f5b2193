"""PGD and the table of attacks: closed forms on linear models, the ball, the range, and what an attack leaves alone."""

import inspect
import re
import sys
import types
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import common
import eval_all
import models

DOUBLE = torch.float64


def two_class_problem(linear_model, n=5):
    generator = torch.Generator().manual_seed(0)
    model = linear_model(torch.randn(2, 16, dtype=DOUBLE, generator=generator))
    x = torch.rand(n, 1, 4, 4, dtype=DOUBLE, generator=generator)
    return model, x, torch.arange(n) % 2


def closed_form(model, x, y, eps):
    """On a linear two-class model the optimum is x - eps * sign(w_y - w_j), cut to [0, 1] pixel by pixel."""
    difference = model.weight[y] - model.weight[1 - y]
    return (x - eps * difference.sign().view_as(x)).clamp(0, 1).detach()


@pytest.mark.parametrize("eps", [0.0, 0.05, 0.3, 1.0])
def test_pgd_reaches_the_optimum_of_a_linear_model(linear_model, eps):
    model, x, y = two_class_problem(linear_model)
    x_adv = common.pgd(model, x, y, loss=eval_all.ce, eps=eps, step_size=max(eps / 4, 1e-3), steps=12)
    torch.testing.assert_close(x_adv, closed_form(model, x, y, eps))


@pytest.mark.parametrize("name", ["fgsm", "bim-20", "mim-20", "pgd-20", "pgd-20-scaled", "adaptive-pgd-20", "cw-inf"])
def test_every_linf_attack_reaches_the_optimum_of_a_linear_model(linear_model, name):
    model, x, _ = two_class_problem(linear_model, n=60)
    y = model(x).argmax(1)
    robust = model(closed_form(model, x, y, 0.1)).argmax(1) == y  # an attack leaves the others once they are fooled
    x, y = x[robust], y[robust]
    options = {} if name == "fgsm" else {"step_size": 0.02}
    x_adv = eval_all.find_attack(name)(model, x, y, eps=0.1, **options)
    assert len(x) > 10
    torch.testing.assert_close(x_adv, closed_form(model, x, y, 0.1))


def short(name):
    """The attack with a budget for a test."""
    attack, few = eval_all.find_attack(name), {"square": 30, "zoo": 300, "rays": 40}
    if name in few:
        return partial(attack, queries=few[name])
    if name == "cw-l2":
        return partial(attack, steps=20, searches=2)
    if name == "feature":
        return partial(attack, steps=3, images=2)
    return partial(attack, steps=min(eval_all.steps_of(attack), 5)) if eval_all.steps_of(attack) else attack


@pytest.mark.parametrize("name", [name for name in eval_all.ATTACKS if "auto" not in name and "500" not in name])
def test_attacks_stay_in_the_ball_and_the_range_and_keep_the_model(small_model, name):
    x, y = torch.rand(6, 1, 8, 8), torch.arange(6)
    x[0], x[1] = 0.0, 1.0
    small_model.train()
    before = {key: value.clone() for key, value in small_model.state_dict().items()}
    attack = short(name)
    options = {"step_size": 0.03} if eval_all.takes(attack, "step_size") else {}
    with common.attack_mode(small_model):
        x_adv = attack(small_model, x, y, eps=0.1, **options)
    if eval_all.function_of(eval_all.ATTACKS[name]) in eval_all.NEAREST:
        eval_all.check_range(name, x_adv)
    else:
        eval_all.check_ball(name, x_adv, x, 0.1, "linf")
    assert x_adv.shape == x.shape and not x_adv.requires_grad
    assert small_model.training and all(p.requires_grad and p.grad is None for p in small_model.parameters())
    assert all(torch.equal(before[key], value) for key, value in small_model.state_dict().items())


def test_the_loss_rises_with_eps_and_with_steps_on_a_linear_model(linear_model):
    model, x, y = two_class_problem(linear_model)

    def reached(eps, steps):
        x_adv = common.pgd(model, x, y, loss=eval_all.ce, eps=eps, step_size=0.02, steps=steps, start=x)
        return F.cross_entropy(model(x_adv), y).item()

    by_eps = [reached(eps, 20) for eps in (0.0, 0.05, 0.1, 0.2)]
    by_steps = [reached(0.2, steps) for steps in (1, 2, 5, 10)]
    assert by_eps == sorted(by_eps) and by_eps[0] < by_eps[-1]
    assert by_steps == sorted(by_steps) and by_steps[0] < by_steps[-1]


def test_drop_fooled_leaves_misclassified_images_where_they_are(linear_model):
    model, x, _ = two_class_problem(linear_model)
    wrong = 1 - model(x).argmax(1)
    x_adv = common.pgd(model, x, wrong, loss=eval_all.ce, eps=0.1, step_size=0.02, steps=5, start=x, drop_fooled=True)
    assert torch.equal(x_adv, x)
    one_right = wrong.clone()
    one_right[2] = 1 - wrong[2]
    x_adv = common.pgd(
        model, x, one_right, loss=eval_all.ce, eps=0.1, step_size=0.02, steps=5, start=x, drop_fooled=True
    )
    assert [bool((a != b).any()) for a, b in zip(x_adv, x, strict=True)] == [False, False, True, False, False]


def test_an_attack_that_drops_fooled_images_fools_no_fewer(small_model):
    x = torch.rand(64, 1, 8, 8)
    y = small_model(x).argmax(1)
    settings = dict(loss=eval_all.ce, eps=0.2, step_size=0.02, steps=10, start=x)
    fooled = [
        (small_model(common.pgd(small_model, x, y, drop_fooled=drop, **settings)).argmax(1) != y).sum().item()
        for drop in (False, True)
    ]
    assert 0 < fooled[0] <= fooled[1]


@pytest.mark.parametrize("size", [1e-36, 1e-20, 1e-12, 1.0, 1e30])
def test_a_step_has_its_length_however_small_the_gradient(size):
    """Cross-entropy's is e^-60 where a network is that sure, and float32 still holds it, but not its square."""
    direction = torch.tensor([3.0, 0, -4, 0]).view(1, 1, 2, 2)
    torch.testing.assert_close(common.steepest(size * direction, "l2"), direction / 5)
    torch.testing.assert_close(common.steepest(size * direction, "linf"), direction.sign())
    for norm in ("l2", "linf"):
        assert not common.steepest(0 * direction, norm).any()


def test_a_random_start_is_uniform_in_the_ball():
    """In L2 the share of the volume within its radius, (r / eps)^d, is uniform; in Linf every pixel is."""
    torch.manual_seed(0)
    x = torch.full((4000, 1, 2, 3), 0.5, dtype=DOUBLE)
    for norm in ("linf", "l2"):
        delta = (common.random_start(x, 0.2, norm) - x).flatten(1)
        shares = delta.norm(dim=1).div(0.2) ** 6 if norm == "l2" else (delta / 0.4 + 0.5).flatten()
        assert (shares.sort().values - torch.linspace(0, 1, len(shares), dtype=DOUBLE)).abs().max() < 0.03
        assert delta.mean(0).abs().max() < 0.01


def test_momentum_is_mims_recursion(linear_model):
    """HE, Eq. 19 and 20, written out."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
    ).double()
    model[1].weight.data *= 8  # so that the gradient turns on the way
    x, y = torch.rand(4, 1, 4, 4, dtype=DOUBLE), torch.tensor([0, 1, 2, 0])
    x_adv, g = x.clone(), torch.zeros_like(x)
    for _ in range(6):
        x_adv.requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y), x_adv)
        g = 1.0 * g + grad / grad.abs().sum((1, 2, 3), keepdim=True)
        x_adv = torch.min(torch.max(x_adv.detach() + 0.03 * g.sign(), x - 0.1), x + 0.1).clamp(0, 1)
    settings = dict(loss=eval_all.ce, eps=0.1, step_size=0.03, steps=6, start=x)
    torch.testing.assert_close(common.pgd(model, x, y, momentum=1.0, **settings), x_adv)
    assert not torch.equal(common.pgd(model, x, y, **settings), x_adv)


def test_the_scale_of_an_he_model_reaches_the_attacks_that_promise_it(small_model, monkeypatch):
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4)
    logits, seen = torch.linspace(-1, 1, 10).repeat(4, 1), []
    monkeypatch.setattr(common, "pgd", lambda model, x, y, *, loss, **_: seen.append(loss(logits, y)))
    for name in ("pgd-20", "pgd-20-scaled", "adaptive-pgd-20"):
        eval_all.find_attack(name)(small_model, x, y, eps=0.1, step_size=0.01)
    expected = [
        F.cross_entropy(logits, y, reduction="none"),
        F.cross_entropy(15 * logits, y, reduction="none"),
        F.cross_entropy(15 * (logits - 0.2 * F.one_hot(y, 10)), y, reduction="none"),
    ]
    torch.testing.assert_close(seen, expected)


def test_a_transferred_attack_is_on_the_loss_that_its_source_was_trained_with(small_model):
    seen = []
    attack = eval_all.transferred(
        None, None, None, source=small_model, attack=lambda model, x, y, *, loss: seen.append((model, loss))
    )
    logits, y = torch.linspace(-1, 1, 10).repeat(4, 1), torch.arange(4)
    ((model, loss),) = seen
    assert attack is None and model is small_model
    torch.testing.assert_close(loss(logits, y), F.cross_entropy(15 * logits, y, reduction="none"))


def test_bim_and_mim_start_at_the_image_and_mim_has_momentum_1(small_model, monkeypatch):
    x, y, seen = torch.rand(2, 1, 8, 8), torch.tensor([0, 1]), {}
    for name, budget in (("fgsm", {}), ("bim-20", {"step_size": 0.01}), ("mim-20", {"step_size": 0.01})):
        monkeypatch.setattr(common, "pgd", lambda *_, name=name, **settings: seen.update({name: settings}))
        eval_all.find_attack(name)(small_model, x, y, eps=0.1, **budget)
    assert all(settings["start"] is x for settings in seen.values())
    assert [settings.get("momentum", 0) for settings in seen.values()] == [0, 0, 1]


def defaults(attack):
    return {name: p.default for name, p in inspect.signature(attack).parameters.items() if p.default is not p.empty}


def test_autoattack_is_its_four_attacks_with_the_published_budgets(small_model, monkeypatch):
    """Croce & Hein 2020: each on what still stands, here two of the images that the one before it saw."""
    budgets = {
        "apgd": {"steps": 100, "loss": eval_all.ce, "target": None},
        "apgd_targeted": {"steps": 100, "targets": 9},
        "fab_targeted": {"steps": 100, "targets": 9},
        "square": {"queries": 5000},
    }
    x, met = torch.rand(8, 1, 8, 8), []
    for name, budget in budgets.items():
        assert defaults(getattr(eval_all, name)) == budget | {"norm": "linf"}

        def beats_two(model, x, y, *, eps, norm, name=name):
            met.append((name, eps, norm, len(x)))
            return torch.where(torch.arange(len(x))[:, None, None, None] < 2, 1 - x, x)

        monkeypatch.setattr(eval_all, name, beats_two)
    monkeypatch.setattr(eval_all, "predict_logits", lambda model, x: x)
    monkeypatch.setattr(common, "fooled", lambda model, x, logits, y: (x != images[y]).flatten(1).any(1))
    images = x
    x_adv = eval_all.autoattack(small_model, x, torch.arange(8), eps=99.0, norm="l2")
    assert met == [(name, 99.0, "l2", left) for name, left in zip(budgets, (8, 6, 4, 2), strict=True)]
    assert torch.equal(x_adv, 1 - x)


def test_the_number_in_an_attacks_name_is_its_steps():
    numbers = {name: re.search(r"-(\d+)(?=-|$)", name) for name in eval_all.ATTACKS}
    expected = {name: int(number[1]) for name, number in numbers.items() if number}
    expected |= {"cw-inf": 20, "feature": 50, "apgd-ce": 100, "apgd-t": 100, "fab-t": 100, "deepfool": 50}
    expected |= {"cw-l2": 1000}
    assert {name: eval_all.steps_of(eval_all.ATTACKS[name]) for name in expected} == expected


def test_the_other_budgets_are_those_of_the_readme():
    assert defaults(eval_all.estimated_bim).items() >= {"q": 128, "sigma": 0.001}.items()
    assert defaults(eval_all.rays) == {"queries": 10_000} and defaults(eval_all.feature)["images"] == 100
    assert defaults(eval_all.zoo).items() >= {"queries": 20_000, "sigma": 1e-4}.items()
    assert defaults(eval_all.deepfool).items() >= {"overshoot": 0.02, "candidates": 10}.items()
    assert defaults(eval_all.cw_l2).items() >= {"lr": 0.01, "searches": 9}.items()


def test_cw_margin_is_positive_exactly_where_the_image_is_misclassified():
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0]])
    assert eval_all.cw_margin(logits, torch.tensor([0, 2])).tolist() == [-1.0, 1.0]


def test_attack_names_with_other_numbers_of_steps():
    assert eval_all.find_attack("pgd-40").keywords == {"steps": 40}
    assert eval_all.find_attack("adaptive-pgd-7").func is eval_all.adaptive_pgd
    assert eval_all.find_attack("pgd-3-scaled").func is eval_all.pgd_scaled
    assert eval_all.find_attack("cw-inf-100").keywords == {"steps": 100}
    for wrong in ("pgd", "pgd-0", "pgd-x", "fgsm-20", "20-pgd", "pgd-20-", "pgd-5-5", ""):
        with pytest.raises(common.UserError, match="unknown attack"):
            eval_all.find_attack(wrong)


def test_dropping_with_momentum_moves_each_image_as_if_it_were_alone(linear_model):
    model, x, y = two_class_problem(linear_model, n=12)
    settings = dict(loss=eval_all.ce, eps=0.3, step_size=0.02, steps=12, momentum=1.0, drop_fooled=True)
    together = common.pgd(model, x, y, start=x, **settings)
    alone = [common.pgd(model, x[i : i + 1], y[i : i + 1], start=x[i : i + 1], **settings) for i in range(len(x))]
    torch.testing.assert_close(together, torch.cat(alone))
    assert 0 < sum(bool((a == b).all()) for a, b in zip(together, x, strict=True)) < len(x)


def test_an_attack_with_fn_is_on_the_normalized_features_and_the_model_decides():
    """HE, Eq. 12: one step along the sign of the gradient of CE(W z~, y), until W z + b is wrong."""
    torch.manual_seed(0)
    model = models.build_model("wrn-10-1", 10, 1, image_size=8, head="linear").double().eval()
    x = torch.rand(6, 1, 8, 8, dtype=DOUBLE)
    model.fc.bias.data[0] = 10.0  # all images are of class 0, whatever W z~ says
    x.requires_grad_()
    z, y = model.features(x), torch.zeros(6, dtype=torch.long)
    loss = F.cross_entropy(z / z.norm(dim=1, keepdim=True) @ model.fc.weight.T, y, reduction="sum")
    (grad,) = torch.autograd.grad(loss, x)
    x = x.detach()
    budget = dict(eps=0.1, step_size=0.02, steps=1, start=x)
    with common.attack_mode(model):
        x_adv = eval_all.pgd_fn(model, x, y, **budget)
        assert torch.equal(eval_all.pgd_fn(model, x, y + 1, **budget), x)  # is wrong from the start
        assert not torch.equal(x_adv, eval_all.pgd(model, x, y, **budget))
    torch.testing.assert_close(x_adv, (x + 0.02 * grad.sign()).clamp(0, 1))
    assert not model.fc._forward_pre_hooks


def test_an_image_is_dropped_only_when_fooled_by_more_than_rounding(linear_model):
    model = linear_model(torch.tensor([[1.0, 0.0], [1.0, 1e-6]], dtype=DOUBLE))
    x, y = torch.tensor([1.0, 0.5], dtype=DOUBLE).view(1, 1, 1, 2), torch.tensor([0])
    assert model(x).argmax(1) != y
    x_adv = common.pgd(model, x, y, loss=eval_all.ce, eps=0.2, step_size=0.1, steps=3, start=x, drop_fooled=True)
    assert x_adv.flatten()[1].item() == pytest.approx(0.7)  # pushed on, though wrong by 5e-7 from the start


def test_what_bfloat16_alone_takes_for_misclassified_still_stands():
    class Rough(torch.nn.Module):
        amp = True

        def forward(self, x):
            return F.one_hot(torch.full((len(x),), int(self.amp)), 2).float()

    model, x, y = Rough(), torch.rand(3, 1, 2, 2), torch.zeros(3, dtype=torch.long)
    assert not common.fooled(model, x, model(x), y).any() and model.amp
    assert common.fooled(model, x, model(x), 1 - y).tolist() == [False] * 3  # right in bfloat16: not asked further


def test_an_offset_of_all_logits_does_not_hide_what_is_fooled():
    logits = torch.tensor([[0.0, 0.5, -1.0], [0.5, 0.0, -1.0]])
    for offset in (0.0, -1e5):
        assert common.fooled(None, None, logits + offset, torch.tensor([0, 0])).tolist() == [True, False]


@pytest.mark.parametrize("name", ["apgd-t", "fab-t", "mta-20", "deepfool", "rays", "autoattack"])
@pytest.mark.parametrize("left, ruled_out", [(5, 2), (3, 7), (2, 8)])
@pytest.mark.parametrize("masked", [-1e6, -1e9])
def test_a_masked_class_does_not_hide_what_is_fooled(linear_model, name, left, ruled_out, masked):
    """Classes that a model rules out by a huge negative logit change no verdict, in any attack."""
    torch.manual_seed(0)
    x, plain = torch.rand(12, 1, 4, 4), linear_model(torch.randn(left, 16))
    y = plain(x).argmax(1)

    class Masked(torch.nn.Module):
        def forward(self, x):
            return torch.cat([plain(x), torch.full((len(x), ruled_out), masked)], 1)

    settings = dict(known="digits", norm="linf", eps=0.05, step_size=None, restarts=1, batch_size=12, seed=0, amp=False)
    attack = eval_all.find_attack(name)
    rights = [
        eval_all.attack_batch(name, attack, model, x, y, torch.arange(12), settings, 0)["right"]
        for model in (plain, Masked())
    ]
    assert 0 < int(rights[0].sum()) < 12 and torch.equal(*rights)


@pytest.mark.parametrize(
    "name", ["fgsm", "pgd-2", "mta-2", "feature-2", "apgd-ce-2", "apgd-t-2", "fab-t-2", "deepfool-2", "cw-l2-2"]
)
def test_a_gradient_that_is_not_finite_stops_the_attack(small_model, name):
    class Breaks(torch.nn.Module):
        def features(self, x):
            return small_model.features(x) + 0 * (x - x).sum((1, 2, 3)).sqrt()[:, None]

        def forward(self, x):
            return small_model.fc(self.features(x))

    x, settings = torch.rand(4, 1, 8, 8), dict(known="digits", norm="linf", eps=0.01, step_size=None)
    y, attack = torch.tensor([0, 1, 2, 3]), eval_all.find_attack(name)
    small_model.fc.weight.data[:4] = torch.nn.functional.normalize(small_model.features(x)).detach()  # all are right
    breaks = Breaks().eval()
    assert breaks(x).isfinite().all() and (breaks(x).argmax(1) == y).all()
    with pytest.raises(common.UserError, match="not finite"):
        attack(breaks, x, y, **eval_all.budget(name, attack, settings))


@pytest.mark.parametrize("known, eps, steps, expected", [
    ("cifar10", 0.031, 20, 0.003), ("cifar10", 0.031, 500, 0.003), ("mnist", 0.3, 100, 0.01), ("digits", 0.1, 20, 0.01),
    ("mnist", 0.3, 20, 0.0375), ("cifar10", 0.5, 20, 0.0625), ("cifar10", 0.031, 10, 0.00775),
    ("imagenet", 4 / 255, 20, 1 / 255), ("mnist", 0.02, 100, 0.01), ("mnist", 0.01, 20, 0.00125),
    ("cifar10", 0.3 / 255, 100, 0.0075 / 255),
])  # fmt: skip
def test_the_default_step_is_the_papers_where_it_fits_the_ball(known, eps, steps, expected):
    settings = {"known": known, "eps": eps, "norm": "linf", "step_size": None}
    name = f"pgd-{steps}"
    assert eval_all.budget(name, eval_all.find_attack(name), settings)["step_size"] == pytest.approx(expected)


@pytest.mark.parametrize("name, eps, expected", [
    ("feature", 0.031, 1 / 255), ("feature", 0.3, 0.015), ("spsa-20", 0.031, 0.01), ("nes-20", 0.3, 0.0375),
])  # fmt: skip
def test_attacks_with_a_step_of_their_own_cross_a_wide_ball_too(name, eps, expected):
    settings, attack = {"known": "mnist", "eps": eps, "norm": "linf", "step_size": None}, eval_all.find_attack(name)
    assert eval_all.budget(name, attack, settings)["step_size"] == pytest.approx(expected)
    assert eval_all.budget(name, attack, settings | {"step_size": 0.02})["step_size"] == 0.02
    named = eval_all.find_attack(f"{name}@0.005")
    assert eval_all.budget(name, named, settings | {"step_size": 0.02}).get("step_size", 0.005) == 0.005


def test_autoattack_official_is_seeded_and_bounded_by_the_number_of_classes(monkeypatch):
    made = []

    class AutoAttack:
        def __init__(self, model, **settings):
            self.settings = settings
            self.apgd_targeted, self.fab = types.SimpleNamespace(), types.SimpleNamespace()
            made.append(self)

        def run_standard_evaluation(self, x, y, bs):
            return x

    monkeypatch.setitem(sys.modules, "autoattack", types.SimpleNamespace(AutoAttack=AutoAttack))
    x, y = torch.rand(2, 1, 2, 2), torch.tensor([0, 1])
    for classes in (5, 100):
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, classes))
        torch.manual_seed(11)
        assert eval_all.autoattack_official(model, x, y, eps=0.1) is x
    settings = {"norm": "Linf", "eps": 0.1, "version": "standard", "seed": 11, "device": "cpu", "verbose": False}
    assert [adversary.settings for adversary in made] == [settings, settings]
    assert [adversary.fab.n_target_classes for adversary in made] == [4, 9]
    with pytest.raises(common.UserError, match="4 classes"):
        eval_all.autoattack_official(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)), x, y, eps=0.1)
