"""The margin loss entry by entry in float64, MMC's centers, FastAT's step, losses at the edges of arccos and log."""

import math

import common
import models
import train_angular_at
import train_fast_he
import train_mart

import pytest
import torch

B, K, D = 6, 5, 7


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    z, weight = (torch.randn(n, D, dtype=torch.float64, generator=generator) for n in (B, K))
    return z.requires_grad_(), weight, torch.randint(0, K, (B,), generator=generator)


@pytest.mark.parametrize("scale, margin", [(1.0, 0.0), (15.0, 0.2), (4.0, 0.5)])
@pytest.mark.parametrize("angular", [False, True])
def test_margin_ce_is_eq_6_on_cosines_and_on_minus_theta_with_its_gradient(batch, angular, scale, margin):
    z, weight, y = batch
    head = models.HEHead(D, K, fn=True, wn=True, angular=angular).double()
    head.weight.data = weight
    logits = head(z)
    each = common.margin_ce(logits, y, scale, margin, reduction="none")
    (grad,) = torch.autograd.grad(each.mean(), logits, retain_graph=True)
    for i, label in enumerate(y.tolist()):
        scores = [float(z[i].detach() @ w / (z[i].detach().norm() * w.norm())) for w in weight]
        scores = [-math.acos(cos) for cos in scores] if angular else scores
        exps = [math.exp(scale * (score - margin * (k == label))) for k, score in enumerate(scores)]
        p = [e / sum(exps) for e in exps]
        assert each[i].item() == pytest.approx(-math.log(p[label]), rel=1e-10)
        expected = [scale * (p[k] - (k == label)) / B for k in range(K)]  # d/d logit_k
        assert grad[i].tolist() == pytest.approx(expected, rel=1e-10, abs=1e-13)
    assert common.margin_ce(logits, y, scale, margin).item() == pytest.approx(each.mean().item())
    assert torch.autograd.gradcheck(lambda z: common.margin_ce(head(z), y, scale, margin), z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [1.0, -1.0, 1.0 + 1e-6, -1.0 - 1e-6, 1.0 - 1e-7])
def test_wfc_and_its_gradient_are_finite_at_plus_and_minus_one(dtype, value):
    cos = torch.full((2, 3), value, dtype=dtype, requires_grad=True)
    loss = train_angular_at.wfc(cos, torch.tensor([0, 2]))
    (grad,) = torch.autograd.grad(loss, cos)
    assert loss.isfinite() and grad.isfinite().all()
    assert loss.item() == pytest.approx(0.0 if value > 0 else math.pi**2, abs=1e-2)


def test_mart_stays_finite_where_a_wrong_class_takes_all():
    logits = torch.tensor([[0.0, 200.0, -200.0]], requires_grad=True)
    loss = train_mart.mart_loss(logits, logits, torch.tensor([0]), 6.0)
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite() and grad.isfinite().all()


def test_the_fast_step_is_one_sign_step_from_a_random_point_cut_to_ball_and_range(linear_model):
    torch.manual_seed(0)
    weight = torch.randn(2, 6)
    x, y = torch.rand(50, 1, 2, 3), torch.zeros(50, dtype=torch.long)
    optimum = (x - 0.1 * (weight[0] - weight[1]).sign().view(1, 1, 2, 3)).clamp(0, 1)
    far, near = (train_fast_he.fast_step(linear_model(weight), x, y, 1.0, 0.1, step) for step in (0.3, 0.05))
    torch.testing.assert_close(far, optimum)  # a step of 3 eps crosses the ball from any start
    assert (near - x).abs().max() <= 0.1 + 1e-6 and near.min() >= 0 and near.max() <= 1
    assert not torch.allclose(near, optimum)


@pytest.mark.parametrize("k, d", [(2, 1), (2, 5), (10, 9), (10, 256), (100, 256)])
def test_max_mahalanobis_centers_have_one_length_and_one_angle(k, d):
    centers = models.max_mahalanobis_centers(k, d, norm=10.0).double()
    expected = torch.full((k, k), -100 / (k - 1), dtype=torch.float64).fill_diagonal_(100)
    assert centers.shape == (k, d) and torch.allclose(centers @ centers.T, expected, atol=1e-3)
    with pytest.raises(ValueError, match=f"at least {k} feature dimensions"):
        models.max_mahalanobis_centers(k + 1, k - 1, norm=10.0)


def test_mmc_logits_are_minus_half_the_squared_distances(batch):
    z, _, _ = batch
    head = models.MMCHead(D, K, center_norm=10.0).double()
    distances = torch.stack([(z - center).square().sum(1) for center in head.centers], 1)
    torch.testing.assert_close(head(z), -distances / 2)
