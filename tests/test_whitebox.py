"""Auto-PGD, FAB, DeepFool, C&W, MTA and the feature attack where the answer is known."""

import itertools
import math
from functools import partial

import pytest
import torch

import common
import eval_all
import models

DOUBLE = torch.float64
NEAREST = {
    "fab-t linf": (partial(eval_all.fab_targeted, norm="linf"), "linf"),
    "fab-t l2": (partial(eval_all.fab_targeted, norm="l2"), "l2"),
    "deepfool linf": (partial(eval_all.deepfool, norm="linf"), "linf"),
    "deepfool l2": (partial(eval_all.deepfool, norm="l2"), "l2"),
    "cw-l2": (eval_all.cw_l2, "l2"),
}


def far_from_the_box(linear_model):
    """A model of three classes on 30 pixels whose boundaries are nearer than the box, images, labels."""
    generator = torch.Generator().manual_seed(0)
    model = linear_model(torch.randn(3, 30, dtype=DOUBLE, generator=generator))
    x = 0.5 + 0.1 * (torch.rand(12, 1, 5, 6, dtype=DOUBLE, generator=generator) - 0.5)
    return model, x, model(x).argmax(1)


def least_distance(model, x, y, norm):
    """The nearest of the hyperplanes between y and the other classes, (B,)."""
    logits = model(x).detach()
    difference = model.weight.detach()[None] - model.weight.detach()[y][:, None]
    dual = difference.abs().sum(2) if norm == "linf" else difference.norm(dim=2)
    gap = logits.gather(1, y[:, None]) - logits
    return (gap / dual).scatter(1, y[:, None], math.inf).amin(1)


@pytest.mark.parametrize("name", NEAREST)
def test_the_nearest_image_of_a_linear_model_is_found(linear_model, name):
    attack, norm = NEAREST[name]
    model, x, y = far_from_the_box(linear_model)
    x_adv = attack(model, x, y, eps=0.0)
    found, least = common.lengths(x_adv - x, norm).flatten(), least_distance(model, x, y, norm)
    assert (model(x_adv).argmax(1) != y).all() and (found >= least * (1 - 1e-9)).all()
    assert (found / least).max() < 1.0201


@pytest.mark.parametrize("name", ["fab-t linf", "fab-t l2", "cw-l2"])
def test_the_nearest_image_of_a_two_layer_model_is_found(name):
    """Two pixels, so that a grid over the square tells the least distance."""
    attack, norm = NEAREST[name]
    torch.manual_seed(5)
    layers = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).to(DOUBLE)
    layers[0].weight.data *= 3
    model = torch.nn.Sequential(torch.nn.Flatten(), layers)
    grid = torch.cartesian_prod(*[torch.linspace(0, 1, 1001, dtype=DOUBLE)] * 2)
    layers[2].bias.data[0] -= (layers(grid) @ torch.tensor([1.0, -1.0], dtype=DOUBLE)).median()  # half the square each
    x = torch.tensor([[0.3, 0.2], [0.7, 0.75], [0.15, 0.85], [0.9, 0.3]], dtype=DOUBLE).view(4, 1, 1, 2)
    y, labels = model(x).argmax(1), layers(grid).argmax(1)
    delta = [grid[labels != label] - image.flatten() for image, label in zip(x, y, strict=True)]
    least = torch.stack([d.norm(p=math.inf if norm == "linf" else 2, dim=1).min() for d in delta])
    found = common.lengths(attack(model, x, y, eps=0.0) - x, norm).flatten()
    assert ((found - least).abs() < 0.02 * least + 1.5e-3).all(), (found, least)


def fab_by_hand(x, steps, norm):
    """The points of Croce & Hein 2020b, Alg. 1, where the boundary is u * v = 1 / 4, for one image x = (u, v)."""

    visited, now = [], x
    for _ in range(steps):
        u, v = now.tolist()
        w, gap = torch.tensor([[v, u]], dtype=DOUBLE), 0.25 - u * v  # u * v is linearized at the current point
        gap_x = gap + float(w[0] @ (now - x))
        deltas = [
            eval_all.step_to_plane(point[None], math.copysign(1, rise) * w, torch.tensor([abs(rise)]), norm)[0]
            for point, rise in ((now, gap), (x, gap_x))
        ]
        near, far = (float(torch.linalg.vector_norm(delta, math.inf if norm == "linf" else 2)) for delta in deltas)
        alpha = min(near / (near + far), 0.1)
        now = ((1 - alpha) * (now + 1.05 * deltas[0]) + alpha * (x + 1.05 * deltas[1])).clamp(0, 1)
        visited.append(now)
        if now[0] * now[1] > 0.25:
            now = 0.1 * x + 0.9 * now
    return torch.stack(visited)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fab_visits_the_points_of_its_algorithm(norm):
    visited = []

    def model(x):
        if not x.requires_grad:  # where it stepped to
            visited.append(x.flatten(1).clone())
        return torch.stack([torch.full_like(x[:, 0, 0, 0], 0.25), x.flatten(1).prod(1)], 1)

    x = torch.tensor([[0.2, 0.3], [0.05, 0.9], [0.6, 0.1]], dtype=DOUBLE)
    y, target = torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.long)
    eval_all.fab(model, x.view(3, 1, 1, 2), y, target, eps=0.0, norm=norm, steps=6)
    for i in range(3):
        torch.testing.assert_close(torch.stack(visited)[:, i], fab_by_hand(x[i], 6, norm), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_shortest_step_to_a_plane_inside_the_box(norm):
    torch.manual_seed(0)
    x, w = torch.rand(40, 12, dtype=DOUBLE), torch.randn(40, 12, dtype=DOUBLE)
    w[0, :3] = 0
    most = (w.abs() * torch.where(w > 0, 1 - x, x)).sum(1)
    rise = most * torch.linspace(0, 1.2, 40, dtype=DOUBLE)
    d = eval_all.step_to_plane(x, w, rise, norm)
    assert ((x + d) >= -1e-12).all() and ((x + d) <= 1 + 1e-12).all()
    torch.testing.assert_close((w * d).sum(1), torch.minimum(rise, most))
    speed = torch.ones_like(w) if norm == "linf" else w.abs()
    low, high = torch.zeros(40, 1, dtype=DOUBLE), torch.full((40, 1), 1e4, dtype=DOUBLE)
    room = torch.where(w > 0, 1 - x, x)
    for _ in range(200):  # the same by bisection
        middle = (low + high) / 2
        enough = (w.abs() * torch.minimum(middle * speed, room)).sum(1, keepdim=True) >= rise[:, None]
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    torch.testing.assert_close(d, torch.minimum(high * speed, room) * w.sign(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "attack", [eval_all.apgd, eval_all.apgd_targeted, partial(eval_all.mta, step_size=0.02, steps=20)]
)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_bounded_attacks_fool_exactly_the_images_whose_boundary_is_in_reach(linear_model, attack, norm):
    model, x, y = far_from_the_box(linear_model)
    least = least_distance(model, x, y, norm)
    ordered = least.sort().values
    widest = ordered.diff()[2:-2].argmax() + 2  # eps in the widest gap, some images on either side
    eps = float(ordered[widest : widest + 2].mean())
    x_adv = attack(model, x, y, eps=eps, norm=norm)
    assert torch.equal(model(x_adv).argmax(1) == y, least > eps)
    assert (common.lengths(x_adv - x, norm) <= eps * (1 + 1e-9)).all()


def test_targeted_dlr_is_its_formula_and_knows_no_scale():
    logits = torch.tensor([[4.0, 1.0, 3.0, 2.5, 0.0]], dtype=DOUBLE)
    y, target = torch.tensor([0]), torch.tensor([1])
    assert eval_all.targeted_dlr(logits, y, target).item() == pytest.approx((1 - 4) / (4 - (2.5 + 1) / 2))
    assert eval_all.targeted_dlr(1e3 * logits, y, target).item() == pytest.approx(-3 / 2.25)
    assert eval_all.targeted_dlr(logits[:, :3], y, target).item() == pytest.approx(-3)


def test_auto_pgd_halves_where_the_loss_does_not_rise_and_takes_the_best_up_again():
    ones = torch.ones(3)
    state = {
        "rises": torch.tensor([17.0, 16.0, 20.0]), "halved": torch.tensor([False, False, False]),
        "best_value": torch.tensor([2.0, 2.0, 2.0]), "checked": torch.tensor([1.0, 1.0, 2.0]),
        "step": ones.view(3, 1, 1, 1), "now": torch.zeros(3, 1, 1, 1), "grad": torch.zeros(3, 1, 1, 1),
        "best": ones.view(3, 1, 1, 1), "best_grad": ones.view(3, 1, 1, 1),
    }  # fmt: skip
    eval_all._halve_steps(state, 22)
    assert state["step"].flatten().tolist() == [1.0, 0.5, 0.5] and state["now"].flatten().tolist() == [0.0, 1.0, 1.0]
    assert state["halved"].tolist() == [False, True, True] and state["rises"].sum() == 0


def test_auto_pgd_counts_the_steps_that_raised_the_loss(small_model, monkeypatch):
    """Before its first check 22 of 100 steps can have; the random start is none."""
    losses, counted = [], []

    def loss(logits, y):
        losses.append(eval_all.ce(logits, y))
        return losses[-1]

    def check(state, interval):
        counted.append((state["rises"].clone(), interval))

    monkeypatch.setattr(eval_all, "_halve_steps", check)
    torch.manual_seed(0)
    x = torch.rand(8, 1, 8, 8)
    with common.attack_mode(small_model):
        eval_all.apgd(small_model, x, small_model(x).argmax(1), eps=1e-4, loss=loss)
    values = torch.stack(losses[:23]).detach()
    assert counted[0][1] == 22 and torch.equal(counted[0][0], (values[1:] > values[:-1]).sum(0).float())


def auto_pgd_by_hand(x, start, eps):
    """Algorithm 1 of Croce & Hein 2020 on sin(40 x) for one pixel and 100 steps: all points that it visits."""

    def clip(point):
        return min(max(point, x - eps, 0.0), x + eps, 1.0)

    def uphill(point):
        return point + step * math.copysign(1.0, math.cos(40 * point))

    checks = [0, 22, 41, 57, 70, 80, 87, 93, 99]  # p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06)
    visited, best, step, halved, best_at_check = [start], start, 2 * eps, True, -math.inf
    now = before = start
    for k in range(1, 101):
        weight = 0.75 if k > 1 else 1.0
        aim = clip(uphill(now))
        before, now = now, clip(now + weight * (aim - now) + (1 - weight) * (now - before))
        visited.append(now)
        best = max(best, now, key=lambda point: math.sin(40 * point))
        if k in checks:
            last = checks[checks.index(k) - 1]
            values = [math.sin(40 * point) for point in visited[last:]]
            rises = sum(later > earlier for earlier, later in itertools.pairwise(values))
            stuck = not halved and math.sin(40 * best) == best_at_check
            halved, best_at_check = rises <= 0.75 * (k - last) or stuck, math.sin(40 * best)
            if halved:
                step, now = step / 2, best
    return visited


def test_auto_pgd_visits_the_points_of_its_algorithm():
    visited = []

    def model(x):
        visited.append(x.detach().flatten().clone())
        return torch.cat([torch.full_like(x.flatten(1), 9.0), (40 * x.flatten(1)).sin()], 1)  # never fooled

    torch.manual_seed(0)
    x, y = torch.rand(20, 1, 1, 1, dtype=DOUBLE), torch.zeros(20, dtype=torch.long)
    x_adv = eval_all.apgd(model, x, y, eps=0.3, loss=lambda logits, y: logits[:, 1])
    for i, points in enumerate(torch.stack(visited).T):
        by_hand = auto_pgd_by_hand(x[i].item(), points[0].item(), 0.3)
        assert points.tolist() == pytest.approx(by_hand, abs=1e-9)
        assert x_adv[i].item() == pytest.approx(max(by_hand, key=lambda point: math.sin(40 * point)), abs=1e-9)


def test_auto_pgd_does_no_worse_than_pgd_on_a_network(small_model):
    torch.manual_seed(0)
    x = torch.rand(64, 1, 8, 8)
    y = small_model(x).argmax(1)
    weak = common.pgd(small_model, x, y, loss=eval_all.ce, eps=0.01, step_size=0.0025, steps=10, drop_fooled=True)
    with common.attack_mode(small_model):
        strong = eval_all.apgd_targeted(small_model, x, y, eps=0.01)
    right = [(small_model(x_adv).argmax(1) == y).sum().item() for x_adv in (weak, strong)]
    assert right[1] <= right[0] and right[1] < 64


def test_the_feature_attack_moves_features_towards_another_class():
    torch.manual_seed(0)
    model = models.build_model("small_cnn", 10, 1, image_size=8, head="linear").eval()
    model.fc.weight.data.zero_()
    model.fc.bias.data[0] = 1.0  # never fooled, so that every image is pulled to the end
    x, y = torch.rand(6, 1, 8, 8), torch.zeros(6, dtype=torch.long)
    y[3:] = 1
    model.fc.bias.data[1] = 1.0
    with common.attack_mode(model):
        x_adv = eval_all.feature(model, x, y, eps=0.2, step_size=0.02, steps=30, images=1)
        z, z_adv = model.features(x), model.features(x_adv)
    similar = torch.nn.functional.cosine_similarity
    before = torch.stack([similar(z[i : i + 1], z[y != y[i]]).max() for i in range(6)])
    after = torch.stack([similar(z_adv[i : i + 1], z[y != y[i]]).max() for i in range(6)])
    assert (after > before).all() and (x_adv - x).abs().max() <= 0.2 + 1e-6
    with common.attack_mode(model):  # one class alone
        x_adv = eval_all.feature(model, x, torch.zeros_like(y), eps=0.2, step_size=0.02, steps=30, images=1)
        noise = common.random_start(x, 0.2, "linf")
        assert (similar(model.features(x_adv), z) < similar(model.features(noise), z)).all()
