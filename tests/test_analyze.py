"""Corruptions, geodesic inference and its adaptive attack, curves, gradients and features, on small cases."""

import argparse
import json
import math

import analyze
import common
import eval_all
import masking
import models

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn


def make_args(shape=(3, 32, 32), num_classes=10, **changed):
    """What the command line gives to every analysis; the test images are of this shape."""
    x, y, rows = torch.zeros(1, *shape), torch.zeros(1, dtype=torch.long), torch.arange(1)
    data = common.Data("toy", None, x, y, x, y, rows, rows, num_classes, "memory")
    values = {"eps": 0.1, "norm": "linf", "batch_size": 7, "seed": 0, "device": "cpu", "num_images": None}
    return argparse.Namespace(**values | {"ball": "toy, Linf eps 0.1", "data": data, "geodesic_p": 1.0} | changed)


class Plane(models.Classifier):
    """z is the first two pixels; class k has the weight e_k, so angles are those in the plane."""

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


class ReadsGreen(nn.Module):
    """Predicts the class in the green channel, correctly up to severity 3, which is in the red channel."""

    def forward(self, x):
        code = (x[:, :2, 0, 0] * 255).round().long()
        return nn.functional.one_hot((code[:, 1] + (code[:, 0] > 3).long()) % 10, 10).float()


@pytest.fixture
def cifar_c(tmp_path):
    """Six images at five severities: their red says the severity, their green the label."""
    x, labels = np.zeros((30, 32, 32, 3), np.uint8), np.tile(np.array([3, 1, 4, 1, 5, 9], np.uint8), 5)
    x[..., 0], x[..., 1] = (1 + np.arange(30) // 6)[:, None, None], labels[:, None, None]
    for name, array in {"fog": x, "gaussian_blur": np.zeros_like(x), "labels": labels}.items():
        np.save(tmp_path / f"{name}.npy", array)
    return tmp_path


def test_mca_is_the_mean_over_corruptions_and_severities_without_the_extra_ones(cifar_c):
    result = analyze.corruption_accuracy(ReadsGreen(), make_args(corruptions=cifar_c))
    assert result["accuracy"] == {"fog": [100, 100, 100, 0, 0], "gaussian_blur": [0] * 5}
    assert [result[key] for key in ("n", "mCA", "low", "high")] == pytest.approx([6, 60, 60, 60])
    # Two images get labels that they never show: these have 0 of 5 copies correct, the others 3 of 5.
    np.save(cifar_c / "labels.npy", np.tile(np.array([3, 1, 4, 1, 2, 2], np.uint8), 5))
    result = analyze.corruption_accuracy(ReadsGreen(), make_args(corruptions=cifar_c))
    half_width = 1.96 * np.std([60, 60, 60, 60, 0, 0]) / math.sqrt(6)
    assert (result["mCA"], result["high"] - result["mCA"]) == pytest.approx((40, half_width))
    (cifar_c / "fog.npy").unlink()
    with pytest.raises(common.UserError, match="needed: NAME"):
        analyze.corruption_accuracy(ReadsGreen(), make_args(corruptions=cifar_c))


def test_imagenet_c_has_the_sorted_wnids_as_classes_and_refuses_what_does_not_fit(tmp_path):
    for severity in range(1, 6):
        for label, wnid in enumerate(("n02", "n10")):
            folder = tmp_path / "fog" / str(severity) / wnid
            folder.mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (24, 24), (40 * severity, 120 * label, 0)).save(folder / f"{i}.JPEG", quality=95)
    args = make_args((3, 24, 24), 2, corruptions=tmp_path)
    for name, severity, files, y in analyze.corruption_sets(tmp_path, args.data):
        x = 255 * common.images_at(files, torch.tensor([3, 0]), "cpu").mean((2, 3))
        assert name == "fog" and y.tolist() == [0, 0, 1, 1]
        assert torch.allclose(x[:, 0], torch.tensor(40.0 * severity), atol=4) and x[0, 1] > 100 > x[1, 1]
    with pytest.raises(common.UserError, match="2 classes, but the model has 10"):
        next(analyze.corruption_sets(tmp_path, make_args((3, 24, 24)).data))


def test_geodesic_inference_rejects_angles_above_mean_plus_deviation_of_the_predicted_class(monkeypatch, capsys):
    """Thresholds of 20 and 11.5 degrees. The third image is wrong clean; attacked, only the first is accepted."""
    x, y, x_adv = at_angle(10.0, 30.0, 60.0, 85.0), torch.tensor([0, 0, 0, 1]), at_angle(79.0, 50.0, 60.0, 75.0)
    statistics = {"mean": [math.radians(15), 0.1], "std": [math.radians(5), 0.1]}
    model = eval_all.Model("plane", Plane(), {"geodesic": statistics})
    monkeypatch.setattr(analyze, "attacked", lambda *_: x_adv)
    rates = analyze.geodesic(model, x, y, make_args())["pgd-40"]
    assert rates.pop("p") == 1 and rates.pop("auroc") == 6 / 8  # 11 and 40 degrees against 10, 30, 30 and 5
    assert [(rate["count"], rate["n"]) for rate in rates.values()] == [(3, 4), (2, 2), (0, 1), (2, 4), (1, 2), (1, 4)]
    monkeypatch.setattr(analyze, "attacked", lambda *_: x)
    untouched = analyze.geodesic(model, x, y, make_args())
    assert untouched["pgd-40"]["auroc"] is untouched["pgd-40"]["rejected adversarial"] is None
    analyze.print_geodesic({"A": untouched}, make_args())
    assert capsys.readouterr().out.count("no such image") == 4


def test_the_factor_of_the_geodesic_thresholds_is_chosen_on_held_out_images(monkeypatch):
    """Clean ones are at 0.5 to 1.5 times the threshold of 20 degrees, adversarial ones at 1.75 and 3.5 times 11.5."""
    held_out, y, far = at_angle(10.0, 15.0, 20.0, 30.0), torch.zeros(4, dtype=torch.long), math.degrees(0.2)
    moved = at_angle(90 - 1.75 * far, 90 - 3.5 * far, 20.0, 30.0)
    monkeypatch.setattr(analyze, "attacked", lambda attack, net, x, y, args: moved if len(x) == 4 else x)
    meta = {"args": {"dataset": "toy.npz", "data_dir": "data", "limit": 6000}}
    meta["geodesic"] = {"mean": [math.radians(15), 0.1], "std": [math.radians(5), 0.1]}
    model = eval_all.Model("plane", Plane(), meta)
    args, rows = make_args(geodesic_p=0), torch.arange(4)
    data = common.Data("toy", None, held_out, y, held_out, y, rows, rows, 2, "memory")  # that of the training
    monkeypatch.setattr(common, "load_data", lambda *call: data if call == ("toy.npz", "data", 6000) else None)
    rates = analyze.geodesic(model, at_angle(34.0, 36.0), y[:2], args)["pgd-40"]
    assert rates["p"] == pytest.approx(1.75, rel=1e-3) and rates["rejected clean"]["count"] == 1  # 35 degrees


def test_geodesic_pgd_stays_in_the_ball_and_evades_the_rejection():
    """From 40 degrees the ball of 0.5 reaches an angle of 20 to W_1, the ball of 0.1 only class 1. If W_0 is -e_0, the
    margin rises with z_0, yet the attack must lower it. z is 0 where the other pixels change by eps / 2 or more."""
    y, model, thresholds = torch.tensor([0]), Plane(), torch.full((2,), math.radians(20))
    for w, degrees, eps, accepted in ((1.0, 40.0, 0.1, False), (1.0, 40.0, 0.5, True), (-1.0, 45.0, 0.4, True)):
        x, model.fc.weight.data[0, 0] = torch.cat([at_angle(degrees), torch.full((1, 1, 1, 18), 0.5)], 3), w
        model.features = lambda v, x=x, r=eps / 2: v.flatten(1)[:, :2] * ((v - x)[..., 2:].abs() < r).all()
        x_adv = analyze.geodesic_pgd(model, x, y, thresholds=thresholds, eps=eps, step_size=eps / 5, steps=40)
        assert (x_adv - x).abs().max() <= eps + 1e-6 and x_adv.min() >= 0 and x_adv.max() <= 1
        z = model.features(x_adv)[0]
        assert z[1] > z[0] and (math.atan2(z[0], z[1]) <= thresholds[1]) == accepted


def test_curves_fall_with_eps_and_add_up_their_restarts(linear_model, monkeypatch):
    """Logits (v, -v) of pixels 0.5 + v: an image is correct while v > eps. Then restart i fools image i alone."""
    model = nn.Sequential(models.Normalize([0.5], [1.0]), linear_model(torch.tensor([[1.0], [-1.0]])))
    x, y = torch.tensor([0.51, 0.62, 0.67, 0.9]).view(4, 1, 1, 1), torch.zeros(4, dtype=torch.long)
    result = analyze.robustness_curves(model, x, y, make_args())
    assert list(result["eps"]["correct"].values()) == [[4, 3, 3, 3, 3, 2, 2, 1]] * 2
    steps = []

    def fools_one(attack, net, x, y, args, restart):
        steps.append(attack.func.steps)
        return torch.where(torch.arange(len(x)).view(-1, 1, 1, 1) == restart, 1 - x, x)

    monkeypatch.setattr(analyze, "attacked", fools_one)
    result = analyze.robustness_curves(model, torch.ones(8, 1, 1, 1), torch.zeros(8, dtype=torch.long), make_args())
    assert list(result["restarts"]["correct"].values()) == [[7, 6, 5, 4, 3]] * 2
    assert list(result["steps"]["correct"].values()) == [[7] * 7] * 2 and steps[16:30:2] == result["steps"]["at"]


def test_gradient_norm_ratio_is_that_of_a_direct_computation():
    """The gradient of a linear layer on one image is the outer product of its error and its input."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    x, x_adv, y = torch.rand(12, 1, 2, 3), torch.rand(12, 1, 2, 3), torch.arange(12) % 3

    def norms(image, label):
        h = torch.tanh(model[1](image.flatten()))
        error = model[3](h).softmax(0) - nn.functional.one_hot(label, 3)
        hidden_error = (model[3].weight.T @ error) * (1 - h**2)
        return torch.stack([hidden_error.norm() * image.norm(), error.norm() * h.norm()])

    with torch.no_grad():
        ratios = torch.stack([norms(b, k) / norms(a, k) for a, b, k in zip(x, x_adv, y, strict=True)])
    result, ordered = analyze.gradient_norm_ratio(model, x, x_adv, y), ratios.sort(0).values
    assert result["layers"] == ["1", "3"] and (result["n"], result["left_out"]) == (12, 0)
    assert result["mean"] == pytest.approx(ratios.mean(0).tolist(), rel=1e-4)
    norms = [analyze.gradient_norms(model, images, y, 12)[1] for images in (x_adv, x)]  # of the mean over the batch
    assert result["batch"] == pytest.approx((norms[0] / norms[1])[0].tolist(), rel=1e-4)
    weight = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), model[3].weight)[0]
    assert norms[1][0, 1] == pytest.approx(weight.norm().item(), rel=1e-4)
    assert result["median"] == pytest.approx(ratios.quantile(0.5, 0).tolist(), rel=1e-4)
    # Of 12 coins 3 to 9 fall heads up in 96 %: the interval reaches from the third value to the tenth.
    assert result["low"] == pytest.approx(ordered[2].tolist(), rel=1e-4)
    assert result["high"] == pytest.approx(ordered[9].tolist(), rel=1e-4)
    few = analyze.gradient_norm_ratio(model, x[:5], x_adv[:5], y[:5])
    assert few["low"] == few["high"] == [None, None]
    x[0] = math.nan
    assert analyze.gradient_norm_ratio(model, x, x_adv, y)["left_out"] == 1


def test_angles_features_and_examples_of_the_plane(tmp_path):
    model, x, args = eval_all.Model("plane", Plane(), {}), at_angle(10.0, 30.0), make_args(out=tmp_path)
    found = analyze.feature_map(model, x, x.flip(0), torch.tensor([0, 0]), args)
    assert found["method"] == "z" and np.allclose(found["clean"], x.flatten(1), atol=1e-3)
    assert found["attacked"] == found["clean"][::-1] and found["correct_attacked"] == [True, True]
    many, moved = at_angle(*[10.0] * 40), at_angle(*[10.0] * 35, *[80.0] * 5)
    shown = analyze.examples(model, many, moved, torch.zeros(40, dtype=torch.long), args)
    assert sorted(shown["row"][:5]) == list(range(35, 40)) and shown["attacked"] == [1] * 5 + [0] * 3
    model.net.fc.weight.data = at_angle(0.0, 70.0).view(2, 2) * 3  # their norms do not matter
    found = analyze.angles(model.net, x, torch.tensor([0, 1]), args)
    assert found == pytest.approx({"smallest": 70.0, "largest": 70.0, "within": 25.0}, abs=1e-3)


def test_the_command_writes_the_files_that_it_lists_and_refuses_what_it_cannot_do(cli, refused, tmp_path):
    short = ["--dataset", "digits", "--epochs", "1", "--limit", "164", "--batch-size", "32"]
    assert cli("train_pgd_he", *short, "--steps", "1", "--out", tmp_path / "pgd")[0] == 0
    assert cli("train_dsphere", *short, "--out", tmp_path / "sphere")[0] == 0
    flags = ["--gradients", "--features", "--angles", "--examples", "--curves", "--num-images", "8", "--device", "cpu"]
    code, out, err = cli("analyze", tmp_path / "pgd", tmp_path / "sphere", *flags)
    assert code == 0, err
    listed = {tmp_path / line.strip() for line in out.partition("written:")[2].splitlines() if line}
    assert listed == set((tmp_path / "analysis").iterdir()) and len(listed) == 7
    result = json.loads((tmp_path / "analysis" / "analysis.json").read_text())
    assert (result["data"], result["n"], [*result["models"]]) == ("digits", 8, ["pgd", "sphere"])
    out = cli("analyze", tmp_path / "sphere", "--geodesic", "--num-images", "8", "--device", "cpu")[1]
    assert "broken: share" in out and "sphere/analysis/analysis.json" in out
    assert "give at least one of --curves" in refused("analyze", tmp_path / "pgd")
    assert "needs a checkpoint of train_dsphere.py" in refused("analyze", tmp_path / "pgd", "--geodesic")
    assert "Linf ball only" in refused("analyze", tmp_path / "sphere", "--geodesic", "--norm", "l2")
    (tmp_path / "plain.py").write_text("from torch.nn import *\nnet = lambda: Sequential(Flatten(), Linear(64, 10))\n")
    plain = ["plain.py:net", "--dataset", "digits", "--angles"]
    assert "--angles needs a model with features" in refused("analyze", *plain)


def test_masking_finds_features_that_are_dead(small_model):
    for bias, share in ((0.0, 0.0), (-100.0, 1.0)):
        small_model.bn1.bias.data.fill_(bias)
        own = masking.measure(small_model, torch.rand(6, 1, 8, 8), torch.arange(6), eps=0.1)
        dead = [own[name].mean().item() for name in own if name.startswith(("pixels", "images", "the same, under PGD"))]
        assert dead == 4 * [share]
