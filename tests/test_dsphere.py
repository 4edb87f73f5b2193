"""D-SphereNet: its layers against an unfolded float64 reference, its losses, its inference statistics, its theory."""

import math

import common
import models
import train_dsphere

import numpy as np
import pytest
import torch
import torch.nn.functional as F


def reference(cos, norm, correlation):
    """g as section 4.1 writes it, from the cosine and the norm of each patch."""
    theta, k = torch.acos(cos.clamp(-1, 1)), models.SIGMOID_K
    if correlation == "linear":
        return 1 - 2 * theta / math.pi
    if correlation == "sigmoid":
        e = math.exp(-math.pi / (2 * k))
        ratio = torch.exp(theta / k - math.pi / (2 * k))
        return (1 + e) / (1 - e) * (1 - ratio) / (1 + ratio)
    if correlation == "quadratic":
        return (1 - (1 - cos) ** 2).clamp(min=-1)
    return norm.clamp(max=1) * cos if correlation == "truncated" else cos


def unfolded(x, weight, correlation, manifold, stride, padding):
    """The layer by unfolding: every patch as a vector, normalized by its own norm, against every normalized kernel."""
    order = 2 if manifold == "sphere" else 1
    patches = F.unfold(x, weight.shape[2:], padding=padding, stride=stride)
    norm = patches.norm(p=order, dim=1, keepdim=True)
    kernels = weight.flatten(1) / weight.flatten(1).norm(p=order, dim=1, keepdim=True)
    out = reference(kernels @ (patches / norm), norm, correlation)
    side = (x.shape[2] + 2 * padding - weight.shape[2]) // stride + 1
    return out.view(len(x), len(weight), side, side)


@pytest.mark.parametrize("correlation", models.CORRELATIONS)
@pytest.mark.parametrize("manifold", ["sphere", "simplex"])
def test_the_layers_are_the_unfolded_correlation_gradients_included(correlation, manifold):
    torch.manual_seed(0)
    kind = {"correlation": correlation, "manifold": manifold}
    for stride, padding in ((1, 0), (1, 1), (2, 0), (2, 1)):
        layer = models.SphereConv2d(3, 5, 3, stride, padding, **kind).double()
        x = (0.4 * torch.randn(2, 3, 7, 7, dtype=torch.float64)).requires_grad_()
        expected = unfolded(x, layer.weight, correlation, manifold, stride, padding)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
        upstream = torch.randn_like(expected)
        ours = torch.autograd.grad(layer(x), (x, layer.weight), upstream)
        theirs = torch.autograd.grad(expected, (x, layer.weight), upstream)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    layer = models.SphereLinear(27, 5, **kind).double()  # as a kernel as large as its input
    x = torch.randn(6, 3, 3, 3).double() * torch.tensor([0.05, 0.1, 0.2, 0.5, 2, 9]).double().view(6, 1, 1, 1)
    expected = unfolded(x, layer.weight.view(5, 3, 3, 3), correlation, manifold, 1, 0)
    torch.testing.assert_close(layer(x.flatten(1)), expected.flatten(1), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("correlation", models.CORRELATIONS)
@pytest.mark.parametrize("manifold", ["sphere", "simplex"])
def test_a_zero_patch_has_a_finite_value_and_gradient_and_outputs_are_bounded(correlation, manifold):
    torch.manual_seed(0)
    layer = models.SphereConv2d(2, 4, 3, padding=1, correlation=correlation, manifold=manifold)
    x = torch.zeros(3, 2, 8, 8)
    x[1], x[2, :, 2:5, 2:5] = 100 * torch.randn(2, 8, 8), 5 * layer.weight[0].detach()
    x.requires_grad_()
    out = layer(x)
    grads = torch.autograd.grad(out.square().sum() + out.sum(), (x, layer.weight))
    assert out.isfinite().all() and all(grad.isfinite().all() for grad in grads)
    assert out.abs().max() <= 1 + 1e-6 and out[0].abs().max() < 1e-6
    assert manifold == "simplex" or out[2, 0, 3, 3] > 0.999  # the patch that is the kernel


def test_the_networks_have_the_published_layers():
    mnist = models.build_model("dsphere_mnist", 10, 1, image_size=28, head="sphere", correlation="cosine")
    widths = [(1, 32), (32, 32), (32, 64), (64, 64), (64, 128), (128, 128)]
    shapes = [(c_out, c_in, 3, 3) for c_in, c_out in widths] + [(256, 128 * 9), (10, 256)]
    assert [tuple(p.shape) for p in mnist.parameters()] == shapes
    cifar = models.build_model("dsphere_cifar", 10, 3, head="linear")
    convolutions = [m for m in cifar.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [64] * 3 + [128] * 3 + [256] * 3 and cifar.feature_dim == 512
    x = torch.rand(2, 1, 28, 28)
    assert mnist.features(x).min() == 0 and mnist.conv[:2](x).min() == 0  # after their ReLU


def test_the_multiplier_moves_at_a_rate_of_its_own_and_is_logged(cli, tmp_path):
    flags = "--loss wm --limit 164 --batch-size 32 --steps 1 --schedule constant --multiplier-lr 0.5 --epochs".split()
    for epochs, *more in ((1,), (2, "--resume")):
        assert cli("train_dsphere", *flags, epochs, *more, "--out", tmp_path)[0] == 0
    history = common.read_file(tmp_path / "last.pt")["history"]
    found = [10.0, *(row["multiplier"] for row in history)]
    assert abs(np.diff(found)).min() > 0.1 and history[-1]["lr"] == 2e-3 / 2  # of the other weights


def test_the_curvature_of_the_quadratic_correlation(cli, refused, tmp_path):
    x, layer = torch.rand(5, 8), models.SphereLinear(8, 3, correlation="quadratic@0.5", manifold="sphere")
    cos = models.cosine(x, layer.weight)
    torch.testing.assert_close(layer(x), 1 - 0.5 * (1 - cos) ** 2)
    flags = "--correlation quadratic --quadratic-a 0.5 --limit 132 --epochs 1 --steps 1 --batch-size 32 --out".split()
    assert cli("train_dsphere", *flags, tmp_path)[0] == 0
    assert common.load_checkpoint(tmp_path)[0].fc.correlation == "quadratic@0.5"
    assert "--quadratic-a is of" in refused("train_dsphere", "--quadratic-a", "2")


def test_annealing_is_eq_8_and_its_weight_falls_to_a_floor():
    torch.manual_seed(0)
    z, g = torch.rand(6, 4, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    y, logits = torch.tensor([0, 1, 2, 0, 1, 2]), z.norm(dim=1, keepdim=True) * g
    for share, weight in ((0, 10.0), (100 / 30_000, 5.0), (9_900 / 30_000, 0.1), (1.0, 0.1)):
        expected = (F.cross_entropy(g, y) + weight * F.cross_entropy(logits, y)) / (1 + weight)
        assert train_dsphere.annealed_ce(logits, z, y, share).item() == pytest.approx(expected.item(), rel=1e-9)


def test_orthogonality_is_zero_on_orthogonal_kernels_alone():
    kind = {"correlation": "cosine", "manifold": "sphere"}
    model = torch.nn.Sequential(models.SphereConv2d(2, 6, 3, **kind), models.SphereLinear(9, 5, **kind))
    assert train_dsphere.orthogonality(model).item() > 0.1
    for layer in model:
        torch.nn.init.orthogonal_(layer.weight, gain=3.0)
    assert train_dsphere.orthogonality(model).item() < 1e-9


def test_geodesic_statistics_are_stored_with_the_weights_they_belong_to(cli, make_npz, tmp_path):
    """Of the training images alone, class by class; nothing is accepted as a class without images."""
    path = make_npz(y_train=np.arange(140) % 9, y_test=np.arange(20) % 10)
    flags = f"--dataset {path} --arch dsphere_mnist --batch-size 20 --epochs 2 --lr 1e-3 --steps 1".split()
    assert cli("train_dsphere", *flags, "--out", tmp_path / "run")[0] == 0
    data = common.load_data(str(path))
    x, y = common.images_at(data.x_train, data.train, "cpu"), data.y_train[data.train]
    for file in ("best.pt", "last.pt"):
        model, meta = common.load_checkpoint(tmp_path / "run" / file)
        theta = models.arccos(models.cosine(model.features(x), model.fc.weight)).detach()
        mine = [theta[y == k, k] if (y == k).sum() > 1 else torch.zeros(2) for k in range(10)]
        assert meta["geodesic"]["mean"] == pytest.approx([angles.mean().item() for angles in mine], abs=1e-4)
        assert meta["geodesic"]["std"] == pytest.approx([angles.std().item() for angles in mine], abs=1e-4)


def test_iterations_become_whole_epochs_and_annealing_goes_by_the_share_that_is_done(cli, tmp_path, monkeypatch):
    """Two steps an epoch; a resumed run goes on counting."""
    seen, annealed_ce = [], train_dsphere.annealed_ce
    record = lambda logits, z, y, share: seen.append(share) or annealed_ce(logits, z, y, share)  # noqa: E731
    monkeypatch.setattr(train_dsphere, "annealed_ce", record)
    flags = ["--limit", "180", "--batch-size", "40", "--steps", "1", "--loss", "annealing", "--out", tmp_path / "run"]
    for iterations, epochs in ((3, 2), (5, 3)):
        assert cli("train_dsphere", *flags, "--iterations", iterations, "--resume")[0] == 0
        assert common.read_file(tmp_path / "run" / "last.pt")["epoch"] == epochs
    assert seen == pytest.approx([0, 1 / 4, 2 / 4, 3 / 4, 4 / 6, 5 / 6])
