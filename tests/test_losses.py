"""Each loss against its formula, written out entry by entry in float64, with its gradient."""

import argparse
import math

import pytest
import torch

import common
import models
import train_abcl
import train_alp_he
import train_angular_at
import train_fast_he
import train_mart
import train_mmc
import train_trades_he
import train_weightpen

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


def test_wfc_is_the_mean_squared_angle(batch):
    z, weight, y = batch
    expected = sum(math.acos(row[label]) ** 2 for row, label in zip(cosines(z, weight), y.tolist(), strict=True)) / B
    assert train_angular_at.wfc(models.cosine(z, weight), y).item() == pytest.approx(expected, rel=1e-12)
    cos = models.cosine(z, weight).requires_grad_()
    assert torch.autograd.gradcheck(lambda cos: train_angular_at.wfc(cos, y), cos)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [1.0, -1.0, 1.0 + 1e-6, -1.0 - 1e-6, 1.0 - 1e-7])
def test_wfc_and_its_gradient_are_finite_at_plus_and_minus_one(dtype, value):
    cos = torch.full((2, 3), value, dtype=dtype, requires_grad=True)
    loss = train_angular_at.wfc(cos, torch.tensor([0, 2]))
    (grad,) = torch.autograd.grad(loss, cos)
    assert loss.isfinite() and grad.isfinite().all()
    assert loss.item() == pytest.approx(0.0 if value > 0 else math.pi**2, abs=1e-2)


def test_separation_is_the_mean_over_classes_of_the_nearest_other(batch):
    _, weight, _ = batch
    gram = cosines(weight, weight)
    expected = sum(max(gram[i][j] for j in range(K) if j != i) for i in range(K)) / K
    assert train_angular_at.separation(weight).item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(train_angular_at.separation, weight.clone().requires_grad_())


def test_separation_of_a_simplex_is_its_optimum():
    simplex = torch.eye(K, dtype=torch.float64) - 1 / K
    assert train_angular_at.separation(simplex).item() == pytest.approx(-1 / (K - 1), rel=1e-12)


def test_trades_kl_is_its_formula_with_gradients_of_both_arguments(batch):
    z, weight, _ = batch
    clean, adversarial = models.cosine(z, weight), models.cosine(z.flip(0), weight)
    expected = 0.0
    for a, b in zip(clean.tolist(), adversarial.tolist(), strict=True):
        p, q = softmax([15 * value for value in a]), softmax([15 * value for value in b])
        expected += sum(pk * math.log(pk / qk) for pk, qk in zip(p, q, strict=True)) / B
    assert train_trades_he.kl(clean, adversarial, 15.0).item() == pytest.approx(expected, rel=1e-12)
    inputs = (clean.requires_grad_(), adversarial.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: train_trades_he.kl(a, b, 15.0), inputs)
    assert train_trades_he.kl(clean, clean, 15.0).item() == 0.0


def test_alp_is_its_formula_and_at_lambda_0_is_clean_ce_plus_pgd_at(batch):
    z, weight, y = batch
    clean, adversarial = models.cosine(z, weight), models.cosine(z.flip(0), weight)
    parts = [formula_margin_ce(logits.tolist(), y, 15.0, 0.2) for logits in (clean, adversarial)]
    gap = [
        (a - b) ** 2
        for row, other in zip(clean.tolist(), adversarial.tolist(), strict=True)
        for a, b in zip(row, other, strict=True)
    ]
    distance = sum(gap) / (B * K)
    for alpha, pairing in ((0.5, 0.5), (0.3, 0.0)):
        args = argparse.Namespace(scale=15.0, margin=0.2, alpha=alpha, pairing=pairing)
        expected = alpha * parts[0] + (1 - alpha) * parts[1] + pairing * distance
        assert train_alp_he.alp(clean, adversarial, y, args).item() == pytest.approx(expected, rel=1e-12)
    args = argparse.Namespace(scale=15.0, margin=0.2, alpha=0.5, pairing=0.5)
    inputs = (clean.requires_grad_(), adversarial.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: train_alp_he.alp(a, b, y, args), inputs)


def test_mart_is_eq_11(batch):
    z, weight, y = batch
    clean, adversarial = 3 * models.cosine(z, weight), 3 * models.cosine(z.flip(0), weight)
    expected = 0.0
    for a, b, label in zip(clean.tolist(), adversarial.tolist(), y.tolist(), strict=True):
        p, q = softmax(a), softmax(b)
        expected -= math.log(q[label]) + math.log(1 - max(q[k] for k in range(K) if k != label))
        expected += 6 * sum(p[k] * math.log(p[k] / q[k]) for k in range(K)) * (1 - p[label])
    assert train_mart.mart_loss(clean, adversarial, y, 6.0).item() == pytest.approx(expected / B, rel=1e-12)
    inputs = (clean.requires_grad_(), adversarial.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: train_mart.mart_loss(a, b, y, 6.0), inputs)


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
def test_the_simplex_penalty_is_its_formula_and_vanishes_on_the_simplex(batch, norm):
    _, weight, _ = batch
    s = 0.3
    rows = [[float(a @ b) - s**2 / (1 - K) for b in weight.unbind()] for a in weight.unbind()]
    for i in range(K):
        rows[i][i] = float(weight[i] @ weight[i]) - s**2
    gap = torch.tensor(rows, dtype=torch.float64)
    expected = gap.square().sum().sqrt() if norm == "frobenius" else torch.linalg.eigvalsh(gap).abs().max()
    assert train_weightpen.simplex_penalty(weight, s, norm).item() == pytest.approx(expected.item(), rel=1e-12)
    assert train_weightpen.simplex_penalty(s * simplex(K, D), s, norm).item() < 1e-12
    penalty = lambda w: train_weightpen.simplex_penalty(w, s, norm)  # noqa: E731
    assert torch.autograd.gradcheck(penalty, weight.clone().requires_grad_())


def test_driving_the_penalty_to_zero_gives_the_simplex_angles():
    torch.manual_seed(0)
    weight = torch.randn(10, 200, requires_grad=True)
    optimizer = torch.optim.Adam([weight], 0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    for _ in range(1500):
        optimizer.zero_grad()
        penalty = train_weightpen.simplex_penalty(weight, 1.0, "frobenius")
        penalty.backward()
        optimizer.step()
        schedule.step()
    gram = models.cosine(weight, weight)[~torch.eye(10, dtype=torch.bool)]
    degrees = gram.detach().acos().rad2deg()
    assert penalty.item() < 0.01
    assert degrees.min().item() == pytest.approx(math.degrees(math.acos(-1 / 9)), abs=0.3)
    assert degrees.max().item() == pytest.approx(math.degrees(math.acos(-1 / 9)), abs=0.3)


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


def test_abcls_two_terms_are_their_formulas(batch):
    z, weight, y = batch
    cos, gram = cosines(z, weight), cosines(weight, weight)
    intra = sum((1 - row[label]) ** 2 for row, label in zip(cos, y.tolist(), strict=True)) / B
    nearest = [max(gram[i][j] for j in range(K) if j != i) for i in range(K)]
    inter = sum(max(value + 1 / (K - 1), 0) ** 2 for value in nearest) / K
    assert train_abcl.intra_class(models.cosine(z, weight), y).item() == pytest.approx(intra, rel=1e-12)
    assert train_abcl.inter_class(weight).item() == pytest.approx(inter, rel=1e-12)
    assert train_abcl.inter_class(simplex(K, D)).item() < 1e-24
    assert torch.autograd.gradcheck(train_abcl.inter_class, weight.clone().requires_grad_())
