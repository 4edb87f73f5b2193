"""Black-box attacks on a linear model, where the least perturbation that fools is known, and transfer attacks."""

import math
from functools import partial

import eval_all
from eval_all import cw_margin, directional_slopes

import pytest
import torch
from torch import nn

BUDGETS = {  # queries of a robust image, and the attack with this budget
    "square": (1000, partial(eval_all.autoattack, parts=["square"], queries=1000)),
    "spsa": (24 * 65, partial(eval_all.spsa, steps=24, step_size=0.01, q=32)),
    "nes": (24 * 65, partial(eval_all.nes, steps=24, step_size=0.01, q=32)),
    "zoo": (901, partial(eval_all.zoo, queries=901, coordinates=50)),
    "rays": (1500, partial(eval_all.rays, queries=1500)),
}
EACH = pytest.mark.parametrize("name", BUDGETS)
DISTANCE = 0.05  # in Linf, of every image to the boundary


class Counting(nn.Module):
    """Two classes by the sign of w x; counts the images that it sees."""

    def __init__(self, w):
        super().__init__()
        self.w, self.queries = w, 0

    def forward(self, x):
        self.queries += len(x)
        margin = x.flatten(1) @ self.w
        return torch.stack([margin / 2, -margin / 2], 1)


def two_classes(shape=(1, 6, 6), batch=8):
    """(model, x, y): images far from 0 and 1 and DISTANCE from the boundary."""
    torch.manual_seed(0)
    w = torch.randn(math.prod(shape)).sign() * (0.5 + torch.rand(math.prod(shape)))
    w *= -w.sum().sign()  # an all-white image is of the other class: RayS begins there
    x = torch.empty(batch, *shape).uniform_(0.4, 0.6).flatten(1)
    x += (DISTANCE * w.abs().sum() - x @ w)[:, None] * w / w.square().sum()
    return Counting(w), x.view(-1, *shape), torch.zeros(batch, dtype=torch.long)


@EACH
@pytest.mark.parametrize("shape", [(1, 6, 6), (3, 5, 5)])
def test_fools_where_eps_is_enough(name, shape):
    model, x, y = two_classes(shape)
    eps = (2.5 if name == "square" else 1.3) * DISTANCE  # squares of one sign fit this model badly
    x_adv = BUDGETS[name][1](model, x, y, eps=eps)
    assert (model(x_adv).argmax(1) != y).all() and (x_adv - x).abs().max() <= eps + 1e-6


@EACH
def test_a_robust_image_stays_robust_and_costs_the_budget_and_no_more(name):
    queries, attack = BUDGETS[name]
    model, x, y = two_classes()
    x_adv = attack(model, x, y, eps=0.97 * DISTANCE)
    checks = 13 * len(x) if name == "square" else 0  # those of pyautoattack
    assert 0.9 * queries * len(x) <= model.queries <= queries * len(x) + checks
    assert (model(x_adv).argmax(1) == y).all() and (x_adv - x).abs().max() <= 0.97 * DISTANCE + 1e-6


@EACH
def test_a_misclassified_image_costs_no_more_queries(name):
    """Of nine images the first is robust, and the others are misclassified whatever is done to them."""
    queries, attack = BUDGETS[name]
    model, x, y = two_classes(batch=9)
    x[1:] -= (DISTANCE + 0.01) * model.w.view_as(x[0]).sign()
    x_adv, asked = attack(model, x, y, eps=0.005), model.queries
    assert (model(x_adv).argmax(1) == y).tolist() == [True] + 8 * [False]
    assert asked <= queries + 40 * 8  # RayS searches for a radius within eps


@pytest.mark.parametrize("name", ["spsa", "nes"])
def test_the_step_is_along_an_estimate_that_converges_to_the_gradient(name, monkeypatch):
    parts = []

    def spy(model, x, y, directions, sigma):
        slopes = directional_slopes(model, x, y, directions, sigma)
        parts.append(torch.einsum("nb,nbchw->bchw", slopes, directions))
        return slopes

    monkeypatch.setattr(eval_all, "directional_slopes", spy)
    torch.manual_seed(0)
    w, x = torch.randn(3, 12, dtype=torch.float64), torch.rand(2, 1, 3, 4, dtype=torch.float64)

    def model(x):
        return torch.tanh(x.flatten(1) @ w.T)

    x.requires_grad_()
    (true,) = torch.autograd.grad(cw_margin(model(x), model(x).argmax(1)).sum(), x)
    x, y, errors = x.detach(), model(x).argmax(1), []
    for q in (1000, 100_000):
        parts.clear()
        x_adv = getattr(eval_all, name)(model, x, y, eps=0.1, step_size=0.01, steps=1, q=q)
        estimate = sum(parts) / q
        torch.testing.assert_close(x_adv, (x + 0.01 * estimate.sign()).clamp(0, 1))
        errors.append((estimate - true).norm())
    assert errors[1] < 0.02 * true.norm() and errors[1] < errors[0] / 4  # it falls as 1 / sqrt(q)


def test_a_transfer_attack_is_crafted_on_the_source_to_its_last_step_and_asks_the_target_nothing():
    first, second = torch.zeros(2, 16)
    first[[0, 15]] = second[[1, 14]] = torch.tensor([-1.0, 1.0])  # class 1 where one pixel is brighter than another
    source, target = Counting(first), Counting(second)
    x, y = torch.full((4, 1, 4, 4), 0.5), torch.ones(4, dtype=torch.long)
    x[:, 0, 0, :2] = 0.52
    attacks = eval_all.transfer_attacks([eval_all.Model("other", source, {})])
    for name, attack in attacks.items():
        x_adv = attack(target, x, y, eps=0.1)
        torch.testing.assert_close(x_adv[:, 0, 0, 0], torch.full((4,), 0.42), msg=name)  # though it fooled long before
        assert name.startswith("pgd") or ((x_adv - x).abs() > 1e-6).sum() == 8  # a random start moves other pixels too
    assert target.queries == 0 and source.queries == 4 * (1 + 20 + 20)
