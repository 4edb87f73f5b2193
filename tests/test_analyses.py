"""Corruptions and their published files, geodesic inference and its adaptive attack, the analyses, on small cases."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import common
import eval_all
import models
from eval_all import (
    CORRUPTIONS,
    approximate_corruption,
    auroc,
    corrupt,
    corruption_accuracy,
    feature_map,
    geodesic_inference,
    geodesic_pgd,
    geodesic_thresholds,
    gradient_norm_ratio,
    plot_corruptions,
    plot_examples,
    plot_feature_map,
    plot_gradient_norm_ratio,
    plot_robustness_curves,
    predicted_angle,
    published_corruptions,
    robustness_curves,
)

SETTINGS = {"seed": 0, "batch_size": 7, "device": "cpu", "n": None}
SHAPES = [(1, 8), (1, 28), (3, 32), (3, 40)]


def scenes(count, channels, size):
    """Images with structure at every scale, values within [0.02, 0.95]."""
    torch.manual_seed(1)
    sides = (3, 7, size)
    rough = [torch.rand(count, channels, side, side) for side in sides]
    return sum(nn.functional.interpolate(part, size, mode="bicubic") for part in rough).div(3).clamp(0.02, 0.95)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize(("channels", "size"), SHAPES)
def test_each_severity_is_farther_from_the_clean_image(name, channels, size):
    x, distances = scenes(16, channels, size), []
    for severity in range(1, 6):
        torch.manual_seed(0)
        corrupted = corrupt(x, name, severity)
        assert corrupted.shape == x.shape and corrupted.dtype == x.dtype
        assert corrupted.isfinite().all() and corrupted.min() >= 0 and corrupted.max() <= 1
        torch.manual_seed(0)
        assert torch.equal(corrupted, corrupt(x, name, severity))
        distances.append(float((corrupted - x).square().mean()))
    assert distances[0] > 1e-6 and all(a < b for a, b in pairwise(distances)), distances


def test_blurs_spread_a_point_over_their_shape_and_keep_its_sum():
    x = torch.zeros(2, 1, 41, 41)
    x[:, :, 20, 20] = 1
    across = torch.arange(41.0) - 20
    radius = torch.hypot(across[:, None], across[None])
    for name, reach in (("defocus blur", 0.075 * 41), ("motion blur", 0.35 * 41 / 2)):
        torch.manual_seed(0)
        spread = corrupt(x, name, 5)
        assert torch.allclose(spread.sum((1, 2, 3)), torch.ones(2), atol=1e-5)
        assert (spread[:, :, radius > reach + 1] == 0).all() and (spread[:, :, radius > reach - 1] > 0).any()
    lines = (spread[:, 0] > 0).sum((1, 2))
    assert (lines < 4 * (2 * reach + 2)).all() and not torch.equal(spread[0], spread[1])


def test_pixelate_is_the_mean_of_disjoint_cells():
    x = scenes(2, 3, 8)
    means = nn.functional.avg_pool2d(x, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.allclose(corrupt(x, "pixelate", 3), means, atol=1e-6)
    assert corrupt(x, "pixelate", 1)[0, 0].unique().numel() == 36  # 6 x 6 cells of 8 x 8 pixels


def test_noise_has_the_strength_it_is_named_by():
    torch.manual_seed(0)
    x = torch.full((40, 3, 32, 32), 0.5)
    assert corrupt(x, "gaussian noise", 1).std() == pytest.approx(0.05, rel=0.02)
    assert corrupt(x, "shot noise", 1).std() == pytest.approx(math.sqrt(0.5 / 80), rel=0.02)
    impulse = corrupt(x, "impulse noise", 5)
    assert (impulse == 0).float().mean() == pytest.approx(0.1, rel=0.05)
    assert (impulse == 1).float().mean() == pytest.approx(0.1, rel=0.05)


# ------------------------------------------------------------------------------------------------- published files


@pytest.fixture
def cifar_c(tmp_path):
    """Six images at five severities: their red says the severity, their green the label."""
    x = np.zeros((30, 32, 32, 3), np.uint8)
    labels = np.tile(np.array([3, 1, 4, 1, 5, 9], np.uint8), 5)
    x[..., 0], x[..., 1] = (1 + np.arange(30) // 6)[:, None, None], labels[:, None, None]
    np.save(tmp_path / "fog.npy", x)
    np.save(tmp_path / "gaussian_blur.npy", np.zeros_like(x))
    np.save(tmp_path / "labels.npy", labels)
    return tmp_path


class ReadsGreen(nn.Module):
    """Predicts the class in the green channel, rightly up to severity 3, the red channel."""

    def forward(self, x):
        code = (x[:, :2, 0, 0] * 255).round().long()
        return nn.functional.one_hot((code[:, 1] + (code[:, 0] > 3).long()) % 10, 10).float()


def test_cifar_c_gives_each_severity_its_images_and_labels(cifar_c):
    sources = published_corruptions(cifar_c, (3, 32, 32), 10)
    assert list(sources) == ["fog", "gaussian blur"]
    for severity in range(1, 6):
        x, y = sources["fog"](severity)
        assert x.shape == (6, 3, 32, 32) and x.dtype == torch.uint8 and (x[:, 0] == severity).all()
        assert y.tolist() == [3, 1, 4, 1, 5, 9] and torch.equal(x[:, 1, 0, 0].long(), y)


def test_mca_is_the_mean_over_corruptions_and_severities_without_the_extra_ones(cifar_c):
    sources = published_corruptions(cifar_c, (3, 32, 32), 10)
    result = corruption_accuracy(ReadsGreen(), sources, SETTINGS)
    assert result["accuracy"] == {"fog": [100, 100, 100, 0, 0], "gaussian blur": [0] * 5}
    assert (result["n"], result["mCA"]) == (6, pytest.approx(60))
    assert corruption_accuracy(ReadsGreen(), sources, SETTINGS | {"n": 4})["n"] == 4
    for extra in ("gaussian blur", "saturate", "spatter", "speckle noise"):
        with pytest.raises(common.UserError, match=f"mCA leaves out {extra}, and there is no other"):
            corruption_accuracy(ReadsGreen(), {extra: sources["gaussian blur"]}, SETTINGS)


def test_the_interval_of_mca_comes_from_the_images():
    """Of two corruptions four images stand both, both, none and one."""
    y = torch.zeros(4, dtype=torch.long)

    def images(*red):
        return lambda severity: (torch.tensor(red, dtype=torch.uint8).view(4, 1, 1, 1) * torch.ones(1, 3, 1, 1), y)

    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
    model[1].weight.data, model[1].bias.data = torch.tensor([[0.0, 0, 0], [1, 0, 0]]), torch.tensor([0.5, 0.0])
    sources = {"fog": images(0, 0, 255, 0), "snow": images(0, 0, 255, 255)}
    result = corruption_accuracy(model, sources, SETTINGS)
    reach = 1.96 * np.std([100, 100, 0, 50]) / math.sqrt(4)
    assert (result["mCA"], result["low"], result["high"]) == pytest.approx((62.5, 62.5 - reach, 62.5 + reach))


@pytest.mark.parametrize(
    ("name", "array", "fault"),
    [
        ("fog", np.zeros((30, 32, 32, 3), np.float32), "float32"),
        ("fog", np.zeros((29, 32, 32, 3), np.uint8), "29"),
        ("fog", np.zeros((30, 28, 28, 3), np.uint8), "28"),
        ("fog", None, "not a readable .npy"),
        ("labels", np.zeros(29, np.uint8), "29"),
        ("labels", np.zeros(30), "float64"),
        ("labels", np.full(30, 10), "10 classes"),
    ],
)
def test_a_bad_file_of_cifar_c_is_named_with_its_fault(cifar_c, name, array, fault):
    path = cifar_c / f"{name}.npy"
    if array is None:
        path.write_bytes(path.read_bytes()[:1000])
    else:
        np.save(path, array)
    with pytest.raises(common.UserError, match=fault) as error:
        published_corruptions(cifar_c, (3, 32, 32), 10)["fog"](1)
    assert str(error.value).startswith(f"{path}: ")


@pytest.fixture
def imagenet_c(tmp_path):
    """fog/SEVERITY/WNID with two images of each of two classes; red is the severity, green the class."""
    for severity in range(1, 6):
        for label, wnid in enumerate(("n02", "n10")):
            folder = tmp_path / "fog" / str(severity) / wnid
            folder.mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (24, 24), (40 * severity, 120 * label, 0)).save(folder / f"{i}.JPEG", quality=95)
    return tmp_path


def test_imagenet_c_has_the_sorted_wnids_as_classes(imagenet_c):
    sources = published_corruptions(imagenet_c, (3, 24, 24), 2)
    for severity in (1, 5):
        x, y = sources["fog"](severity)
        x = x[torch.tensor([3, 0, 1, 2])].float().mean((2, 3))
        assert y.tolist() == [0, 0, 1, 1] and torch.allclose(x[:, 0], torch.tensor(40.0 * severity), atol=4)
        assert ((x[:, 1] > 60).long() == y[[3, 0, 1, 2]]).all()


def test_corruptions_of_unlike_numbers_of_images_are_refused(imagenet_c):
    (imagenet_c / "fog" / "3" / "n02" / "0.JPEG").unlink()
    with pytest.raises(common.UserError, match="fog, severity 3: 3 images, where the first has 4"):
        corruption_accuracy(ReadsGreen(), published_corruptions(imagenet_c, (3, 24, 24), 2), SETTINGS | {"n": 2})


def test_a_bad_folder_of_imagenet_c_is_named_with_its_fault(imagenet_c, tmp_path):
    fog = imagenet_c / "fog" / "1"
    with pytest.raises(common.UserError, match=f"{fog}: 2 classes, but the model has 1000"):
        published_corruptions(imagenet_c, (3, 24, 24), 1000)["fog"](1)
    with pytest.raises(common.UserError, match=r"0.JPEG: an image \(3, 24, 24\)"):
        published_corruptions(imagenet_c, (3, 224, 224), 2)["fog"](1)
    (fog / "n02" / "0.JPEG").write_bytes(b"no image")
    with pytest.raises(common.UserError, match=f"{fog}/n02/0.JPEG: not a readable image"):
        published_corruptions(imagenet_c, (3, 24, 24), 2)["fog"](1)
    with pytest.raises(common.UserError, match=f"{imagenet_c}/nothing: neither"):
        published_corruptions(imagenet_c / "nothing", (3, 24, 24), 2)


# ----------------------------------------------------------------------------------------------- geodesic inference


def test_auroc_counts_ties_half():
    """Of the nine pairs 2 > 1, 3 > 1, 3 > 2 and, of the tied ones, (1, 1), (2, 2), (3, 3) count: 3 + 1.5 of 9."""
    assert auroc(np.array([1.0, 2, 3]), np.array([1.0, 2, 3])) == pytest.approx(0.5)
    assert auroc(np.array([2.0, 2, 5]), np.array([1.0, 2])) == pytest.approx((1 + 0.5 + 1 + 0.5 + 1 + 1) / 6)
    assert auroc(np.array([3.0, 4]), np.array([1.0, 2, 2])) == 1
    assert auroc(np.array([0.0]), np.array([1.0, 2])) == 0


class Plane(models.Classifier):
    """z is the first two pixels; class k has the weight e_k, so that angles are those in the plane."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2, bias=False)
        self.fc.weight.data = torch.eye(2)

    def features(self, x):
        return x.flatten(1)[:, :2]


def at_angle(*degrees):
    """Images whose z has these angles to e_0."""
    angle = torch.tensor(degrees) * math.pi / 180
    return torch.stack([angle.cos(), angle.sin()], 1).view(-1, 1, 1, 2)


def test_an_input_is_rejected_where_its_angle_exceeds_mean_plus_deviation_of_the_class_predicted():
    model = Plane()
    thresholds = geodesic_thresholds({"mean": [math.radians(15), 0.1], "std": [math.radians(5), 0.1]}, "cpu")
    assert thresholds.tolist() == pytest.approx([math.radians(20), 0.2])
    prediction, angle = predicted_angle(model, at_angle(10.0, 30.0, 60.0))
    assert prediction.tolist() == [0, 0, 1] and angle.tolist() == pytest.approx(
        [math.radians(10), math.radians(30), math.radians(30)], abs=1e-5
    )
    x, x_adv = at_angle(10.0, 30.0, 60.0, 85.0), at_angle(79.0, 50.0, 60.0, 75.0)
    y = torch.tensor([0, 0, 0, 1])  # the third is wrong clean; attacked, only the first is accepted
    result = geodesic_inference(model, x, x_adv, y, thresholds, batch_size=3)
    share = {key: (row["count"], row["n"]) for key, row in result.items() if isinstance(row, dict)}
    assert share == {
        "accuracy": (3, 4),
        "accepted_accuracy": (2, 2),
        "accepted_accuracy_attacked": (0, 1),
        "rejected_clean": (2, 4),
        "rejected_adversarial": (1, 2),
        "broken": (1, 4),
    }
    assert result["auroc"] == pytest.approx((2 + 4) / 8)  # 11 and 40 degrees against 10, 30, 30 and 5


def test_geodesic_inference_with_nothing_fooled_has_no_auroc():
    x, y = at_angle(10.0, 85.0), torch.tensor([0, 1])
    result = geodesic_inference(Plane(), x, x, y, torch.zeros(2), 2)
    assert result["auroc"] is result["rejected_adversarial"] is result["accepted_accuracy"] is None


@pytest.fixture
def sphere():
    """An untrained D-SphereNet on 8x8 images, random images and their own predictions as labels."""
    torch.manual_seed(0)
    model = models.build_model("dsphere_mnist", 10, 1, image_size=8, head="sphere", correlation="cosine").eval()
    x = torch.rand(24, 1, 8, 8)
    return model, x, model(x).argmax(1)


def test_a_geodesic_figure_of_no_images_says_so(capsys):
    eval_all.print_geodesic({"pgd-40": {"auroc": None, "accuracy": eval_all.proportion(torch.tensor([True]))}})
    told = capsys.readouterr().out
    assert "no such image" in told and "None" not in told and "100.00 %" in told


def test_geodesic_pgd_stays_in_the_ball_and_evades_the_rejection(sphere):
    model, x, y = sphere
    eps, budget = 0.1, {"step_size": 0.01, "steps": 40}
    thresholds = torch.full((10,), float(predicted_angle(model, x)[1].quantile(0.5)))
    torch.manual_seed(0)
    x_adv = geodesic_pgd(model, x, y, thresholds=thresholds, eps=eps, **budget)
    assert (x_adv - x).abs().max() <= eps + 1e-6 and x_adv.min() >= 0 and x_adv.max() <= 1
    prediction, angle = predicted_angle(model, x_adv)
    adaptive = (prediction != y) & (angle <= thresholds[prediction])
    stopping = geodesic_pgd(model, x, y, thresholds=torch.full((10,), math.pi), eps=eps, **budget)
    prediction, angle = predicted_angle(model, stopping)
    blind = (prediction != y) & (angle <= thresholds[prediction])
    assert adaptive.sum() > blind.sum() and adaptive.sum() >= 6, (adaptive.sum(), blind.sum())
    assert all(p.requires_grad for p in model.parameters()) and x.grad is None


def test_geodesic_pgd_finds_what_is_misclassified_and_accepted_in_the_plane():
    """From 40 degrees the ball of 0.5 reaches class 1 within 20 degrees of its weight, the ball of 0.1 only class 1."""
    x, y = at_angle(40.0), torch.tensor([0])
    thresholds = torch.full((2,), math.radians(20))
    for eps, reached in ((0.1, False), (0.5, True)):
        x_adv = geodesic_pgd(Plane(), x, y, thresholds=thresholds, eps=eps, step_size=eps / 5, steps=40)
        prediction, angle = predicted_angle(Plane(), x_adv)
        assert prediction.tolist() == [1] and bool(angle[0] <= thresholds[1]) == reached


# --------------------------------------------------------------------------------------------------------- analyses


def test_gradient_norm_ratio_is_that_of_a_direct_computation():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    x, x_adv, y = torch.rand(4, 1, 2, 3), torch.rand(4, 1, 2, 3), torch.tensor([0, 2, 1, 0])

    def norms(image, label):
        """By hand: the gradient of a linear layer on one image is the outer product of its error and its input."""
        v = image.flatten()
        h = torch.tanh(model[1](v))
        error = model[3](h).softmax(0) - nn.functional.one_hot(label, 3)
        hidden_error = (model[3].weight.T @ error) * (1 - h**2)
        return torch.stack([hidden_error.norm() * v.norm(), error.norm() * h.norm()])

    with torch.no_grad():
        ratios = torch.stack([norms(b, label) / norms(a, label) for a, b, label in zip(x, x_adv, y, strict=True)])
    result = gradient_norm_ratio(model, x, x_adv, y)
    assert result["layers"] == ["1", "3"] and (result["n"], result["left_out"]) == (4, 0)
    assert result["mean"] == pytest.approx(ratios.mean(0).tolist(), rel=1e-4)
    assert result["median"] == pytest.approx(ratios.median(0).values.tolist(), rel=1e-4)
    assert result["low"] == pytest.approx(ratios.amin(0).tolist(), rel=1e-4)  # of four, the interval is all of them
    assert result["high"] == pytest.approx(ratios.amax(0).tolist(), rel=1e-4)


def test_the_interval_of_a_ratio_leaves_its_extremes_out():
    """Of twelve values it reaches from the third to the tenth: of 12 coins 3 to 9 fall heads up in 96 %."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 3))
    x, x_adv, y = torch.rand(12, 1, 2, 3), torch.rand(12, 1, 2, 3), torch.arange(12) % 3
    norms = [eval_all.gradient_norms(model, images, y)[1] for images in (x, x_adv)]
    ordered = (norms[1] / norms[0]).flatten().sort().values
    result = gradient_norm_ratio(model, x, x_adv, y)
    assert result["low"] == [ordered[2].item()] and result["high"] == [ordered[9].item()]


def test_few_values_are_all_in_their_medians_interval():
    assert [eval_all.median_interval(n) for n in range(1, 6)] == [(0, n - 1) for n in range(1, 6)]


@pytest.mark.parametrize("n", [6, 7, 10, 57, 99, 100, 500])
def test_the_interval_of_a_median_covers_it(n):
    """The median is above k of the n values as often as k of n coins fall heads up."""
    first, last = eval_all.median_interval(n)
    covered = [sum(math.comb(n, k) for k in range(first + i, last + 2 - i)) / 2**n for i in (1, 2)]
    assert first + last == n - 1 and covered[0] >= 0.95 > covered[1]  # the narrowest


def test_images_without_a_clean_gradient_have_no_ratio(linear_model):
    model = linear_model(torch.tensor([[1e4], [0.0]]))
    x, y = torch.tensor([0.5, 0.0001]).view(2, 1, 1, 1), torch.tensor([0, 0])
    result = gradient_norm_ratio(model, x, x, y)
    assert (result["n"], result["left_out"], result["mean"]) == (1, 1, [1.0])


@pytest.mark.parametrize("clean, attacked", [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_images_whose_gradients_are_not_finite_have_no_ratio(monkeypatch, clean, attacked):
    norms = iter([torch.tensor([[clean], [2.0]]), torch.tensor([[attacked], [3.0]])])
    monkeypatch.setattr(eval_all, "gradient_norms", lambda *_: (["fc"], next(norms)))
    result = gradient_norm_ratio(nn.Flatten(), None, None, None)
    figures = [result[key] for key in ("mean", "median", "low", "high")]
    assert (result["n"], result["left_out"], figures) == (1, 1, [[1.5]] * 4)
    norms = iter([torch.tensor([[clean]]), torch.tensor([[attacked]])])
    with pytest.raises(common.UserError, match="no clean image"):
        gradient_norm_ratio(nn.Flatten(), None, None, None)


def test_curves_of_a_linear_model_are_its_margins(linear_model, tmp_path):
    """Logits (v, -v) of pixels 0.5 + v: an image is right while v > eps."""
    model = linear_model(torch.tensor([[1.0], [-1.0]]))
    x, y = torch.tensor([0.51, 0.62, 0.67, 0.9]).view(4, 1, 1, 1), torch.zeros(4, dtype=torch.long)
    shifted = nn.Sequential(models.Normalize([0.5], [1.0]), model)
    settings = {"known": "digits", "eps": 0.1, "norm": "linf", "batch_size": 3, "seed": 0, "amp": False}
    result = robustness_curves(shifted, x, y, settings)
    assert result["axes"]["eps"]["at"][:2] == [0, 0.025]
    for right in result["axes"]["eps"]["right"].values():
        assert right == [4, 3, 3, 3, 3, 2, 2, 1]
    plot_robustness_curves(result, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_the_curves_take_their_steps_and_add_up_their_restarts(linear_model, monkeypatch):
    """With an attack that fools one image more each time."""
    calls = []

    def fools_one(model, name, attack, x, y, alive, settings, journal):
        calls.append((name, eval_all.steps_of(attack), settings["seed"]))
        return {"right": alive.index_fill(0, alive.nonzero()[0], False)}

    monkeypatch.setattr(eval_all, "run_attack", fools_one)
    monkeypatch.setattr(eval_all, "CURVE_RESTARTS", (1, 2, 3))
    model = linear_model(torch.tensor([[1.0], [-1.0]]))
    settings = SETTINGS | {"known": "digits", "norm": "linf", "eps": 0.1, "seed": 7}
    result = robustness_curves(model, torch.rand(4, 1, 1, 1), torch.zeros(4, dtype=torch.long), settings)
    for name, right in result["axes"]["restarts"]["right"].items():
        mine = [(steps, seed) for attack, steps, seed in calls if attack == name]
        rest = [(steps, 7) for steps in eval_all.CURVE_STEPS] + [(20, 7), (20, 8), (20, 9)]
        assert mine[-len(rest) :] == rest and set(mine[: -len(rest)]) == {(20, 7)}  # before them, those by eps
        assert right == [3, 2, 1]


def mean_ce(model, x, y, scale=1.0):
    return nn.functional.cross_entropy(scale * model(x), y)


def test_geodesic_inference_is_of_the_images_and_of_what_pgd_made_of_them(sphere, monkeypatch):
    (model, x, y), seen = sphere, []
    monkeypatch.setattr(eval_all, "geodesic_thresholds", lambda *_: torch.full((10,), 1.5))
    monkeypatch.setattr(eval_all, "geodesic_inference", lambda *told: seen.append(told[1:4]))
    eval_all.geodesic(model, {"geodesic": None}, x, y, SETTINGS | {"eps": 0.1})
    assert len(seen) == 2
    for clean, attacked, labels in seen:
        assert torch.equal(clean, x) and torch.equal(labels, y) and 0.09 < (attacked - x).abs().max() <= 0.1 + 1e-6
    assert mean_ce(model, seen[0][1], y) > mean_ce(model, x, y) + 0.01  # an untrained network; PGD goes upwards


def test_analyses_are_of_the_images_and_of_what_pgd_made_of_them(small_model, monkeypatch, tmp_path):
    x, seen = torch.rand(12, 1, 8, 8), []
    y = small_model(x).argmax(1)
    for draw in ("plot_gradient_norm_ratio", "plot_feature_map"):
        monkeypatch.setattr(eval_all, draw, lambda *_: None)
    monkeypatch.setattr(eval_all, "gradient_norm_ratio", lambda *told: seen.append(told[1:4]))
    monkeypatch.setattr(eval_all, "feature_map", lambda *told: seen.append(told[1:4]))
    monkeypatch.setattr(eval_all, "plot_examples", lambda *told: seen.append(told[1:4]) or {"row": torch.arange(2)})
    settings = SETTINGS | {"eps": 0.1, "norm": "linf", "batch_size": 5}
    eval_all.analyze(["gradients", "features", "examples"], small_model, x, y, settings, tmp_path)
    assert len(seen) == 3
    for clean, attacked, labels in seen:
        assert torch.equal(clean, x) and torch.equal(labels, y) and 0.09 < (attacked - x).abs().max() <= 0.1 + 1e-6
        assert mean_ce(small_model, attacked, y, 15) > 2 * mean_ce(small_model, x, y, 15)


def test_gradient_norms_are_of_the_training_loss_with_its_margin(small_model):
    x, y = torch.rand(3, 1, 8, 8), torch.tensor([0, 4, 9])
    layers, norms = eval_all.gradient_norms(small_model, x, y)
    for image, label, own in zip(x.split(1), y.split(1), norms, strict=True):
        loss = common.margin_ce(small_model(image), label, 15.0, 0.2)
        (grad,) = torch.autograd.grad(loss, small_model.fc.weight)
        assert own[layers.index("fc")].item() == pytest.approx(grad.norm().item(), rel=1e-4)


def test_every_analysis_draws_its_plot(small_model, tmp_path):
    torch.manual_seed(0)
    x, y = torch.rand(40, 1, 8, 8), torch.arange(40) % 10
    x_adv = (x + 0.1 * torch.randn_like(x).sign()).clamp(0, 1)
    maps = [feature_map(small_model, x, x_adv, y, seed=0) for _ in range(2)]
    assert maps[0] == maps[1] and len(maps[0]["clean"]) == len(maps[0]["attacked"]) == 40
    plot_feature_map(maps[0], tmp_path / "map.png")
    shown = plot_examples(small_model, x, x_adv, y, tmp_path / "examples.png", count=5)
    assert len(set(shown["row"])) == 5 and shown["label"] == y[shown["row"]].tolist()
    assert shown["attacked"] == small_model(x_adv[shown["row"]]).argmax(1).tolist()
    plot_gradient_norm_ratio(gradient_norm_ratio(small_model, x[:3], x_adv[:3], y[:3]), tmp_path / "ratio.png")
    sources = {"jpeg": lambda severity: approximate_corruption(x, y, "jpeg", severity)}
    plot_corruptions(corruption_accuracy(small_model, sources, SETTINGS), tmp_path / "corruptions.png")
    for name in ("map", "examples", "ratio", "corruptions"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.size[0] > 500 and len(image.convert("RGB").getcolors(1 << 24)) > 20


def test_examples_are_first_those_that_are_fooled_wherever_they_stand(tmp_path):
    """Of images sorted by class, the last ten are fooled."""
    x, y = at_angle(*[10.0] * 40), torch.zeros(40, dtype=torch.long)
    x_adv = torch.cat([x[:30], at_angle(*[80.0] * 10)])
    shown = plot_examples(Plane(), x, x_adv, y, tmp_path / "examples.png", count=14)
    assert sorted(shown["row"][:10]) == list(range(30, 40)) and shown["attacked"] == [1] * 10 + [0] * 4
    assert shown["row"][:10] != sorted(shown["row"][:10]) and max(shown["row"][10:]) > 10
    assert plot_examples(Plane(), x, x_adv, y, tmp_path / "examples.png", count=3)["row"] == shown["row"][:3]


def test_features_of_two_dimensions_are_shown_as_they_are():
    x, y = at_angle(10.0, 80.0), torch.tensor([0, 1])
    result = feature_map(Plane(), x, x.flip(0), y, seed=0)
    assert result["method"] == "z" and result["right_attacked"] == [False, False]
    assert np.allclose(result["clean"], x.flatten(1), atol=1e-3) and result["attacked"] == result["clean"][::-1]


def test_angles_are_between_class_weights_and_of_features_to_their_own():
    model = Plane()
    model.fc.weight.data = at_angle(0.0, 70.0).view(2, 2) * 3  # their lengths do not matter
    found = eval_all.angles(model, at_angle(10.0, 30.0), torch.tensor([0, 1]))
    assert found == pytest.approx({"smallest": 70.0, "largest": 70.0, "within": 25.0}, abs=1e-3)


def test_the_command_line_writes_the_figures_and_refuses_what_it_cannot_do(cli, refused, tmp_path):
    flags = ["--epochs", "1", "--limit", "164", "--batch-size", "32", "--out", tmp_path / "run"]
    assert cli("train_dsphere", *flags)[0] == 0
    asked = ["--corruptions", "--geodesic", "--analyze", "gradients,features,angles,examples"]
    code, out, err = cli("eval_all", tmp_path / "run", "--n", "60", "--attacks", "fgsm", *asked)
    assert code == 0, err
    assert "degrees apart" in out and "our approximation" in out and "geodesic inference under geodesic-pgd-40" in out
    folder = tmp_path / "run" / "eval"
    result = json.loads((folder / "eval.json").read_text())
    assert set(result["corruptions"]["accuracy"]) == set(CORRUPTIONS)
    for name in ("corruptions", "gradients", "features", "examples"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "choose from curves" in refused("eval_all", tmp_path / "run", "--analyze", "everything")
    flags = ["--epochs", "1", "--limit", "164", "--steps", "1", "--out", tmp_path / "pgd"]
    assert cli("train_pgd_he", *flags)[0] == 0
    assert "neither NAME.npy" in refused("eval_all", tmp_path / "run", "--corruptions", tmp_path / "nowhere")
    assert "train_dsphere.py writes them" in refused("eval_all", tmp_path / "pgd", "--attacks", "fgsm", "--geodesic")
    assert "rays knows the Linf ball alone" in refused(
        "eval_all", tmp_path / "pgd", "--attacks", "rays", "--norm", "l2"
    )
