"""White-box attacks where the answer is known: closed forms on linear models, and losses written out."""

import math

import common
import eval_all
import models

import pytest
import torch
import torch.nn.functional as F
from test_audit import digits
from torch import nn

DOUBLE, NORMS = torch.float64, ["linf", "l2"]


class Linear(nn.Module):
    """Logits W x, so that each boundary is a hyperplane at a known distance."""

    def __init__(self, classes, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(classes, 30, generator=generator, dtype=DOUBLE).to(dtype))

    def forward(self, x):
        return x.flatten(1) @ self.weight.T


def linear_problem(classes, dtype=torch.float32):
    """(model, x, y): images near gray, all correct, whose nearest boundary is nearer than 0 and 1."""
    model = Linear(classes, dtype)
    x = 0.5 + 0.1 * (torch.rand(12, 1, 5, 6, generator=torch.Generator().manual_seed(1)).to(dtype) - 0.5)
    return model, x, model(x).argmax(1)


def boundary_distances(model, x, y, norm):
    """From each image to the nearest hyperplane between y and another class, (B,)."""
    logits, weight = model(x).detach(), model.weight.detach()
    difference = weight[None] - weight[y][:, None]
    dual = difference.abs().sum(2) if norm == "linf" else difference.norm(dim=2)
    gaps = logits.gather(1, y[:, None]) - logits
    return (gaps / dual).scatter(1, y[:, None], math.inf).amin(1)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", "fgsm bim-20 mim-20 pgd-50 pgd-50-scaled adaptive-pgd-50 cw-inf-50".split())
def test_the_attack_reaches_the_optimum_of_a_linear_two_class_model(name, norm):
    torch.manual_seed(0)
    model, x, y = linear_problem(2, DOUBLE)
    eps = 0.9 * boundary_distances(model, x, y, norm).min().item()  # nothing is fooled, so nothing stops early
    x_adv = eval_all.find_attack(name)(model, x, y, eps=eps, norm=norm)
    away = (model.weight[1 - y] - model.weight[y]).detach().view_as(x)
    optimum = x + eps * (away.sign() if norm == "linf" else away / common.norms(away, "l2"))
    rise = [eval_all.cw_margin(model(to), y) - eval_all.cw_margin(model(x), y) for to in (x_adv, optimum)]
    torch.testing.assert_close(*rise, rtol=1e-9 if norm == "linf" else 0.03, atol=0)  # in L2 it is approached


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", "mta-50 apgd-t fab-t deepfool".split())
def test_the_attack_fools_exactly_the_images_whose_boundary_is_in_reach(name, norm):
    model, x, y = linear_problem(4)
    distances = boundary_distances(model, x, y, norm)
    ordered = distances.sort().values
    widest = ordered.diff()[2:-2].argmax() + 2  # eps in the widest gap, with some images on either side
    eps = float(ordered[widest : widest + 2].mean())
    result = eval_all.evaluate(model, x, y, name, eps=eps, norm=norm)
    assert result["verdicts"][name].tolist() == (distances > eps).tolist()


@pytest.mark.parametrize("name, norm", [("deepfool", "linf"), ("deepfool", "l2"), ("cw-l2", "l2")])
def test_the_nearest_misclassified_image_of_a_linear_model_is_found(name, norm):
    model, x, y = linear_problem(3, DOUBLE)
    x_adv = eval_all.ATTACKS[name](model, x, y, eps=0, norm=norm)
    found = common.norms(x_adv - x, norm).flatten() / boundary_distances(model, x, y, norm)
    assert (model(x_adv).argmax(1) != y).all() and 1 - 1e-9 <= found.min() and found.max() < 1.0205


@pytest.mark.parametrize("norm", NORMS)
def test_deepfool_crosses_the_boundary_where_the_pixel_range_clips_its_steps(norm):
    """A third of the pixels cannot move: each step falls short by a third, and would only approach the boundary."""
    model, x, _ = linear_problem(2)
    away = (model.weight[1] - model.weight[0]).detach().view_as(x[0]).sign()  # from class 0
    clipped = torch.arange(30).view_as(away) % 3 == 0
    x = torch.where(clipped, (1 + away) / 2, x - 0.4 * away)
    y = torch.zeros(len(x), dtype=torch.long)
    assert (model(x).argmax(1) == y).all()
    x_adv = eval_all.ATTACKS["deepfool"](model, x, y, eps=0, norm=norm)
    assert common.fooled(model(x_adv), y).all()


def test_mta_on_an_mmc_model_ascends_the_targets_logit(monkeypatch):
    """Which is minus its MMC loss; on others the cross-entropy of the target falls."""
    logits, target, losses = torch.randn(2, 3), torch.tensor([1, 0]), []
    monkeypatch.setattr(common, "pgd", lambda model, x, y, *, loss, **_: losses.append(loss(logits, target)) or x)
    x = torch.rand(2, 1, 8, 8)
    for head in ("mmc", "linear"):
        model = models.build_model("small_cnn", 3, 1, image_size=8, head=head).eval()
        eval_all.ATTACKS["mta-100"](model, x, model(x).argmax(1), eps=0.1)
    each = logits.gather(1, target[:, None]).squeeze(1)
    assert torch.equal(losses[0], each)
    torch.testing.assert_close(losses[-1], each - logits.logsumexp(1))


# The losses that the variants of PGD ascend, on an HE model: its logits are cosines, s = 15, m = 0.2.
def margin(logits, y):
    others = logits.masked_fill(F.one_hot(y, logits.shape[1]).bool(), -math.inf)
    return others.max(1).values - logits[torch.arange(len(y)), y]


LOSSES = {
    "pgd": F.cross_entropy,
    "pgd_scaled": lambda cos, y: F.cross_entropy(15 * cos, y),
    "adaptive_pgd": lambda cos, y: F.cross_entropy(15 * (cos - 0.2 * F.one_hot(y, 10)), y),
    "cw_inf": lambda cos, y: margin(cos, y).mean(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_follows_the_gradient_of_the_loss_that_the_attack_names(name):
    model, x, y = digits("he", 6)
    model, x = model.double(), x.double().requires_grad_()
    (grad,) = torch.autograd.grad(LOSSES[name](model(x), y), x)
    budget = dict(eps=0.1, norm="l2", step_size=0.05, steps=1)
    x_adv = getattr(eval_all, name)(model, x.detach(), y, start=x.detach(), **budget)
    expected = (x + 0.05 * grad / grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).clamp(0, 1).detach()
    torch.testing.assert_close(x_adv, expected)


def test_pgd_fn_attacks_the_normalized_features_and_the_model_decides():
    """HE, Eq. 12: the gradient of CE(W z~, y), until the model itself, W z + b, is wrong."""
    model, x, _ = digits("linear", 6)
    model, x = model.double(), x.double().requires_grad_()
    model.fc.bias.data[0] = 1000.0  # the model says class 0 whatever W z~ says
    z, y = model.features(x), torch.zeros(6, dtype=torch.long)
    loss = F.cross_entropy(z / z.norm(dim=1, keepdim=True) @ model.fc.weight.T, y, reduction="sum")
    (grad,) = torch.autograd.grad(loss, x)
    x, budget = x.detach(), dict(eps=0.1, step_size=0.02, steps=1, start=x.detach())
    torch.testing.assert_close(eval_all.pgd_fn(model, x, y, **budget), (x + 0.02 * grad.sign()).clamp(0, 1))
    assert torch.equal(eval_all.pgd_fn(model, x, y + 1, **budget), x)  # misclassified from the start
    assert not model.fc._forward_pre_hooks


def test_mim_is_its_recursion():
    """HE, Eq. 19 and 20, written out."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    model[1].weight.data *= 8  # so that the gradient turns on the way
    x, y = torch.rand(4, 1, 4, 4, dtype=DOUBLE), torch.tensor([0, 1, 2, 0])
    x_adv, g = x.clone(), torch.zeros_like(x)
    for _ in range(6):
        x_adv.requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y), x_adv)
        g = g + grad / grad.abs().sum((1, 2, 3), keepdim=True)
        x_adv = (x_adv.detach() + 0.03 * g.sign()).clamp(x - 0.1, x + 0.1).clamp(0, 1)
    budget = dict(eps=0.1, step_size=0.03, steps=6, early_stop=False)
    torch.testing.assert_close(eval_all.mim(model, x, y, **budget), x_adv)


def test_the_feature_attack_moves_features_towards_another_class_or_away():
    model, x, y = digits("he", 6)
    x = torch.stack([x[0], x[y != y[0]][0]])
    model.fc.weight.data[:] = 0  # all logits are equal, so that nothing is ever fooled
    z, budget = model.features(x).detach(), dict(eps=0.2, step_size=0.02, steps=30, images=1)
    towards = eval_all.feature(model, x, torch.tensor([0, 1]), **budget)
    away = eval_all.feature(model, x, torch.tensor([0, 0]), **budget)  # no other class in the batch
    before, after = (F.cosine_similarity(each, z.flip(0)) for each in (z, model.features(towards)))
    moved, noise = (F.cosine_similarity(model.features(to), z) for to in (away, common.random_start(x, 0.2, "linf")))
    assert (after > before + 0.05).all() and (moved < noise - 0.05).all()
