"""The margin loss entry by entry in float64, and what each other loss does at its optimum and at its limits.

test_objectives.py has each script's whole loss against its formula.
"""

import math

import common
import models
import train_abcl
import train_angular_at
import train_fast_he
import train_mart
import train_mmc
import train_weightpen

import pytest
import torch

B, K, D = 6, 5, 7


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(B, D, dtype=torch.float64, generator=generator)
    weight = torch.randn(K, D, dtype=torch.float64, generator=generator)
    y = torch.randint(0, K, (B,), generator=generator)
    return z, weight, y


def cosines(z, weight):
    return [[float(a @ b / (a.norm() * b.norm())) for b in weight] for a in z]


def softmax(row):
    total = sum(math.exp(value) for value in row)
    return [math.exp(value) / total for value in row]


def formula_margin_ce(logits, y, s, m):
    total = 0.0
    for row, label in zip(logits, y.tolist(), strict=True):
        shifted = [s * (value - (m if k == label else 0.0)) for k, value in enumerate(row)]
        total -= math.log(softmax(shifted)[label])
    return total / len(logits)


@pytest.mark.parametrize("scale, margin", [(1.0, 0.0), (15.0, 0.2), (4.0, 0.5)])
def test_margin_ce_is_eq_6_with_its_gradient(batch, scale, margin):
    z, weight, y = batch
    cos = models.cosine(z, weight).requires_grad_()
    loss = common.margin_ce(cos, y, scale, margin)
    assert loss.item() == pytest.approx(formula_margin_ce(cos.tolist(), y, scale, margin), rel=1e-12)
    (grad,) = torch.autograd.grad(loss, cos)
    for i, row in enumerate(cos.tolist()):  # d/d cos_k = s * (softmax_k - onehot_k) / B
        p = softmax([scale * (value - (margin if k == y[i] else 0.0)) for k, value in enumerate(row)])
        expected = [scale * (p[k] - float(k == y[i])) / B for k in range(K)]
        assert grad[i].tolist() == pytest.approx(expected, rel=1e-10, abs=1e-13)


def test_margin_ce_without_reduction_is_each_images_own(batch):
    z, weight, y = batch
    cos = models.cosine(z, weight)
    each = common.margin_ce(cos, y, 15.0, 0.2, reduction="none")
    assert each.tolist() == pytest.approx(
        [formula_margin_ce([row], y[i : i + 1], 15.0, 0.2) for i, row in enumerate(cos.tolist())]
    )


def test_modified_he_is_margin_ce_of_minus_theta(batch):
    z, weight, y = batch
    head = models.HEHead(D, K, fn=True, wn=True, angular=True).double()
    head.weight.data = weight.clone()
    minus_theta = [[-math.acos(value) for value in row] for row in cosines(z, weight)]
    torch.testing.assert_close(head(z), torch.tensor(minus_theta, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    loss = common.margin_ce(head(z), y, 15.0, 0.1)
    assert loss.item() == pytest.approx(formula_margin_ce(minus_theta, y, 15.0, 0.1), rel=1e-12)
    assert torch.autograd.gradcheck(lambda z: common.margin_ce(head(z), y, 15.0, 0.1), z.clone().requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [1.0, -1.0, 1.0 + 1e-6, -1.0 - 1e-6, 1.0 - 1e-7])
def test_wfc_and_its_gradient_are_finite_at_plus_and_minus_one(dtype, value):
    cos = torch.full((2, 3), value, dtype=dtype, requires_grad=True)
    loss = train_angular_at.wfc(cos, torch.tensor([0, 2]))
    (grad,) = torch.autograd.grad(loss, cos)
    assert loss.isfinite() and grad.isfinite().all()
    assert loss.item() == pytest.approx(0.0 if value > 0 else math.pi**2, abs=1e-2)


def test_separation_and_inter_class_are_at_their_optimum_on_a_simplex(batch):
    _, weight, _ = batch
    assert train_angular_at.separation(simplex(K, D)).item() == pytest.approx(-1 / (K - 1), rel=1e-12)
    assert train_angular_at.separation(weight) > -1 / (K - 1)
    assert train_abcl.inter_class(simplex(K, D)).item() < 1e-24 < train_abcl.inter_class(weight).item()


def test_mart_stays_finite_where_a_wrong_class_takes_all():
    logits = torch.tensor([[0.0, 200.0, -200.0]], requires_grad=True)
    loss = train_mart.mart_loss(logits, logits, torch.tensor([0]), 6.0)
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite() and grad.isfinite().all()


def test_the_fast_step_is_one_sign_step_from_a_random_point_cut_to_ball_and_range():
    torch.manual_seed(0)
    weight = torch.randn(2, 6)
    x, y = torch.rand(50, 1, 2, 3), torch.zeros(50, dtype=torch.long)
    x_adv = train_fast_he.fast_step(lambda x: x.flatten(1) @ weight.T, x, y, 1.0, 0.1, 0.3)
    optimum = (x - 0.1 * (weight[0] - weight[1]).sign().view(1, 1, 2, 3)).clamp(0, 1)
    torch.testing.assert_close(x_adv, optimum)  # a step of 3 eps crosses the ball from any start
    x_adv = train_fast_he.fast_step(lambda x: x.flatten(1) @ weight.T, x, y, 1.0, 0.1, 0.05)
    assert (x_adv - x).abs().max() <= 0.1 + 1e-6 and x_adv.min() >= 0 and x_adv.max() <= 1
    assert not torch.allclose(x_adv, optimum)


def simplex(k, d):
    """K unit vectors in d dimensions with pairwise cosines -1 / (K - 1), rotated at random."""
    centered = torch.eye(k, dtype=torch.float64) - 1 / k
    rotation = torch.linalg.qr(torch.randn(d, k, dtype=torch.float64, generator=torch.Generator().manual_seed(2))).Q
    return torch.nn.functional.normalize(centered) @ rotation.T


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_the_simplex_penalty_vanishes_on_the_simplex_alone(batch, norm):
    assert train_weightpen.simplex_penalty(0.3 * simplex(K, D), 0.3, norm).item() < 1e-12
    assert train_weightpen.simplex_penalty(0.31 * simplex(K, D), 0.3, norm).item() > 1e-3
    assert train_weightpen.simplex_penalty(batch[1], 0.3, norm).item() > 1


@pytest.mark.parametrize("k, d", [(2, 1), (2, 5), (10, 9), (10, 256), (100, 256)])
def test_max_mahalanobis_centers_have_one_length_and_one_angle(k, d):
    centers = models.max_mahalanobis_centers(k, d, norm=10.0).double()
    gram = centers @ centers.T
    assert centers.shape == (k, d) and torch.allclose(gram.diagonal(), torch.tensor(100.0).double(), atol=1e-3)
    off = gram[~torch.eye(k, dtype=torch.bool)]
    assert torch.allclose(off, torch.tensor(-100 / (k - 1)).double(), atol=1e-3)


def test_more_centers_than_fit_are_refused():
    with pytest.raises(ValueError, match="at least 9 feature dimensions"):
        models.build_model("small_cnn", 10, 1, image_size=28, head="mmc", feature_dim=8)


def test_mmc_is_half_the_squared_distance_and_predicts_the_nearest_center(batch):
    z, _, y = batch
    head = models.MMCHead(D, K, center_norm=10.0).double()
    distances = [[float(((a - center) ** 2).sum()) for center in head.centers.double()] for a in z]
    logits = head(z)
    expected = sum(row[label] for row, label in zip(distances, y.tolist(), strict=True)) / (2 * B)
    assert train_mmc.mmc_loss(logits, y).item() == pytest.approx(expected, rel=1e-9)
    assert logits.argmax(1).tolist() == [row.index(min(row)) for row in distances]
    assert torch.autograd.gradcheck(lambda z: train_mmc.mmc_loss(head(z), y), z.clone().requires_grad_())
