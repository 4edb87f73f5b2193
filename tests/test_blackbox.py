"""The black-box attacks on a linear model, where the least perturbation that fools is known."""

import math
from functools import partial

import pytest
import torch
from conftest import Linear

import common
import eval_all
import models
from eval_all import cw_margin, directional_slopes, estimate_gradient, nes, random_sign, rays, spsa, square, zoo

LINF = {  # an attack, its queries an image, and options that keep the tests short
    "square": (square, 400, {"queries": 400}),
    "spsa": (spsa, 24 * 65, {"steps": 24, "step_size": 0.01, "q": 32}),
    "nes": (nes, 24 * 65, {"steps": 24, "step_size": 0.01, "q": 32}),
    "zoo": (zoo, 901, {"queries": 901, "coordinates": 50}),
    "rays": (rays, 1500, {"queries": 1500}),
}
EACH = pytest.mark.parametrize("name", LINF)


class Counted(Linear):
    """Keeps each image that was asked for, in order."""

    def __init__(self, weight):
        super().__init__(weight)
        self.asked = 0
        self.register_forward_hook(lambda _, images, logits: setattr(self, "asked", self.asked + len(images[0])))


def two_classes(shape=(1, 6, 6), batch=8, p=1):
    """A two-class model, images x that it gets right, y, and their least distance to the boundary.

    Far from 0 and 1 that is margin / ||w||_1 in Linf (p = 1), margin / ||w||_2 in L2 (p = 2), w the rows' difference.
    """
    torch.manual_seed(0)
    w = torch.randn(math.prod(shape)).sign() * (0.5 + torch.rand(math.prod(shape)))
    w *= -w.sum().sign()  # an all-white image is of the other class, or RayS has no direction to begin with
    distance = 0.05 if p == 1 else 0.3
    x = torch.empty(batch, *shape).uniform_(0.4, 0.6).flatten(1)
    x += (distance * w.norm(p) - x @ w)[:, None] * w / w.square().sum()
    assert 0.2 < x.min() and x.max() < 0.8
    return Counted(torch.stack([w / 2, -w / 2])), x.view(-1, *shape), torch.zeros(batch, dtype=torch.long), distance


def right(model, x, y):
    with torch.no_grad():
        return cw_margin(model(x), y) < 0


def assert_in_ball(x_adv, x, eps):
    assert x_adv.shape == x.shape and (x_adv - x).abs().max() <= eps + 1e-6
    assert 0 <= x_adv.min() and x_adv.max() <= 1


@EACH
@pytest.mark.parametrize("shape", [(1, 6, 6), (3, 4, 5)])
def test_fools_where_eps_is_enough(name, shape):
    attack, _, options = LINF[name]
    model, x, y, distance = two_classes(shape)
    assert right(model, x, y).all()
    torch.manual_seed(0)
    x_adv = attack(model, x, y, eps=1.3 * distance, **options)
    assert_in_ball(x_adv, x, 1.3 * distance)
    assert not right(model, x_adv, y).any()


@EACH
def test_a_robust_image_gets_the_whole_budget_and_no_more(name):
    """Square leaves out what would change nothing, so its count is less; the others spend every query."""
    attack, queries, options = LINF[name]
    model, x, y, distance = two_classes()
    eps = 0.97 * distance
    x_adv = attack(model, x, y, eps=eps, **options)
    assert_in_ball(x_adv, x, eps)
    asked = model.asked
    assert right(model, x_adv, y).all()
    if name == "square":
        assert 0.2 * queries * len(x) < asked < queries * len(x)
    else:
        assert asked == queries * len(x)


@pytest.mark.parametrize("queries", [1, 2, 3, 100, 101, 102, 257])
def test_zoo_spends_any_budget(queries):
    """Every second query is a pair, so an even budget leaves one over."""
    model, x, y, distance = two_classes()
    zoo(model, x, y, eps=0.5 * distance, queries=queries, coordinates=20)
    assert queries - 1 <= model.asked / len(x) <= queries


@EACH
def test_a_fooled_image_is_asked_no_more(name):
    """A batch of one robust image and many that every start fools costs little more than the robust one alone."""
    attack, queries, options = LINF[name]
    model, x, y, _ = two_classes(batch=9)
    w = (model.weight[0] - model.weight[1]).view_as(x[0])
    x[1:] -= 0.06 * w.sign()  # beyond the boundary by 0.01 in Linf
    eps = 0.005  # so that these stay beyond whatever is done to them, and the first stays right
    x_adv, asked = attack(model, x, y, eps=eps, **options), model.asked
    least = 40 if name == "rays" else 1  # it searches for a radius within eps
    assert right(model, x_adv, y).tolist() == [True] + 8 * [False]
    assert asked <= queries + least * 8


def test_the_clip_to_the_range_binds():
    """Images at 0 and 1, where half of each pixel's room is cut off."""
    torch.manual_seed(1)
    x, y = torch.randint(0, 2, (4, 3, 8, 8)).float(), torch.zeros(4, dtype=torch.long)
    model = Counted(torch.randn(5, 192))
    y = model(x).argmax(1)
    for attack, _, options in LINF.values():
        assert_in_ball(attack(model, x, y, eps=0.01, **options), x, 0.01)


@EACH
def test_same_seed_same_bits(name):
    attack, _, options = LINF[name]
    options = options | ({"queries": 101} if name == "zoo" else {})  # later it is in the same corner for every seed
    model, x, y, distance = two_classes()
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        runs.append(attack(model, x, y, eps=0.9 * distance, **options))
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2]) == (name == "rays")  # it draws nothing


def test_square_l2():
    model, x, y, distance = two_classes(batch=6, shape=(3, 10, 10), p=2)
    for eps, fools in ((6 * distance, True), (0.97 * distance, False)):
        torch.manual_seed(0)
        x_adv = square(model, x, y, eps=eps, norm="l2", queries=800)
        norms = (x_adv - x).flatten(1).norm(dim=1)
        assert norms.max() <= eps + 1e-6 and 0 <= x_adv.min() and x_adv.max() <= 1
        assert norms.min() > 0.99 * eps  # it gives nothing away
        assert (not right(model, x_adv, y).any()) if fools else right(model, x_adv, y).all()


def test_square_l2_raises_the_margin_query_by_query():
    model, x, y, distance = two_classes(batch=6, shape=(3, 10, 10), p=2)
    margins = []
    for queries in (1, 30, 800):
        torch.manual_seed(0)
        margins.append(cw_margin(model(square(model, x, y, eps=distance, norm="l2", queries=queries)), y).mean())
    assert margins[0] + 0.5 < margins[1] and margins[1] + 0.5 < margins[2]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 224, 224)])
def test_square_on_other_shapes(norm, shape):
    torch.manual_seed(0)
    model, x = Counted(torch.randn(2, math.prod(shape))), torch.rand(2, *shape)
    y = model(x).argmax(1)
    eps = 1e-6 if norm == "linf" else 1e-5
    assert square(model, x, y, eps=eps, norm=norm, queries=30).shape == x.shape


@pytest.mark.parametrize("draw", [lambda u: random_sign(u.shape, u), torch.Tensor.normal_], ids=["spsa", "nes"])
def test_the_estimated_gradient_is_the_gradient_on_average(draw):
    torch.manual_seed(0)
    w, x, y = torch.randn(3, 12, dtype=torch.float64), torch.rand(2, 1, 3, 4, dtype=torch.float64), torch.tensor([0, 2])

    def model(x):
        return torch.tanh(x.flatten(1) @ w.T)

    x.requires_grad_()
    (true,) = torch.autograd.grad(cw_margin(model(x), y).sum(), x)
    with torch.no_grad():
        found = estimate_gradient(model, x.detach(), y, draw, q=100_000, sigma=1e-3)
    assert (found - true).abs().max() < 0.02 * true.abs().max()  # 1 / sqrt(q) times ||grad|| is 0.8 % of it


def test_slopes_are_central_differences():
    """Off by O(sigma^2), not by O(sigma): a tenth of sigma leaves a hundredth of the error."""
    x = torch.rand(2, 1, 2, 2, dtype=torch.float64)
    directions = torch.eye(4, dtype=torch.float64).view(4, 1, 1, 2, 2).expand(4, 2, 1, 2, 2)
    y = torch.tensor([1, 1])

    def model(x):
        cube = x.flatten(1).pow(3).sum(1)
        return torch.stack([cube, 0 * cube], 1)

    errors = [directional_slopes(model, x, y, directions, s).T - 3 * x.flatten(1).square() for s in (1e-2, 1e-3)]
    assert errors[0].abs().max() < 2e-4
    assert torch.allclose(errors[0], 100 * errors[1], rtol=1e-4)


@pytest.mark.parametrize("name", ["spsa", "nes", "zoo"])
def test_logits_that_are_not_finite_are_a_fault(name):
    attack, _, options = LINF[name]
    _, x, y, distance = two_classes()
    with pytest.raises(common.UserError, match="not finite"):
        attack(Counted(torch.full((2, 36), math.nan)), x, y, eps=distance, **options)


def test_rays_finds_the_nearest_boundary_of_a_model_of_labels():
    """The labels of a linear model at a large scale and at a tiny one are the same, and so is what RayS does."""
    model, x, y, distance = two_classes()
    found = []
    for scale in (1e-3, 1.0, 1e3):
        found.append(rays(Counted(scale * model.weight.detach()), x, y, eps=1.02 * distance, queries=3000))
        assert not right(model, found[-1], y).any()
    assert torch.allclose(found[0], found[1], atol=1e-4) and torch.allclose(found[1], found[2], atol=1e-4)


def test_rays_asks_once_about_a_flip_that_does_not_help():
    """13 queries for the radius of the first direction, the best: 1 and, to 1e-3 / sqrt(16), 12 halvings."""
    x, asked = torch.full((1, 1, 4, 4), 0.5, dtype=torch.float64), []

    def model(images):
        asked.append((images - x).flatten())
        rise = (images - x).sum((1, 2, 3)) - 16 * 0.1
        return torch.stack([torch.zeros_like(rise), rise], 1)

    rays(model, x, torch.tensor([0]), eps=0.0, queries=40)
    radii, signs = torch.stack([delta.abs().max() for delta in asked]), torch.stack(asked).sign()
    assert (signs[:13] == 1).all() and (signs[13:] != signs[12:-1]).any(1).all()
    assert radii[:2].tolist() == [0.5, 0.5]  # radii 1 and 1/2, cut to the box
    assert (radii[13:] == radii[13]).all() and 0.1 <= radii[13] <= 0.1 + 2.5e-4


@pytest.mark.parametrize(
    "name, expected",
    [(name, {False}) for name in ("spsa-2", "nes-2", "zoo", "fab-t-2", "deepfool-2", "cw-l2-2")]
    + [("pgd-2", {True, False})],
)
def test_differences_are_not_taken_in_bfloat16(small_model, name, expected):
    x, seen = torch.rand(4, 1, 8, 8), set()
    y = small_model(x).argmax(1)
    small_model.register_forward_hook(lambda model, *_: seen.add(model.amp))
    settings = dict(known="digits", norm="linf", eps=0.02, step_size=0.01, restarts=1, batch_size=4, amp=True)
    attack = partial(eval_all.find_attack(name), **({"queries": 300} if name == "zoo" else {}))
    outcome = eval_all.attack_batch(name, attack, small_model, x, y, torch.arange(len(y)), settings, seed=0)
    assert seen == expected and not small_model.amp and outcome["passes"] > 0


def test_what_is_confirmed_in_float32_is_no_query(small_model, monkeypatch):
    """In bfloat16 a network here misclassifies everything, in float32 nothing."""
    x, y, asked = torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.long), {True: 0, False: 0}

    def forward(model, x):
        asked[model.amp] += len(x)
        return torch.eye(10)[int(model.amp)].repeat(len(x), 1)

    monkeypatch.setattr(models.Classifier, "forward", forward)
    settings = dict(known="digits", norm="linf", eps=0.02, step_size=0.01, restarts=1, batch_size=4, amp=True)
    attack = partial(square, queries=30)
    outcome = eval_all.attack_batch("square", attack, small_model, x, y, torch.arange(len(y)), settings, seed=0)
    assert outcome["passes"] == asked[True] == asked[False] - 4 <= 4 * 30  # the verdict is in float32 too
