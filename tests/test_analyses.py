"""Corruptions, geodesic inference and the analyses."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import common
import eval_all
import models


@pytest.mark.parametrize("name", eval_all.CORRUPTIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_corruption_grows_with_its_severity_and_is_seeded(name, channels):
    torch.manual_seed(0)
    x = torch.nn.functional.interpolate(torch.rand(6, channels, 7, 7), 28, mode="bicubic").clamp(0, 1)
    distances = []
    for severity in range(1, 6):
        torch.manual_seed(1)
        changed = eval_all.corrupt(x, name, severity)
        torch.manual_seed(1)
        assert torch.equal(changed, eval_all.corrupt(x, name, severity))
        assert changed.shape == x.shape and changed.min() >= 0 and changed.max() <= 1
        distances.append((changed - x).square().mean().item())
    assert distances[0] > 0 and distances == sorted(distances)


class Brightness(torch.nn.Module):
    """Class 1 where the image is bright."""

    def forward(self, x):
        return torch.stack([0.5 - x.mean((1, 2, 3)), x.mean((1, 2, 3)) - 0.5], 1)


SETTINGS = dict(n=None, batch_size=3, seed=0, device="cpu")


def test_cifar_c_files_are_read_severity_by_severity(tmp_path):
    x = np.zeros((20, 4, 4, 3), np.uint8)
    x[[1, 5, 6, 12, 19]] = 255  # bright: one of severity 1, two of 2, none of 3, one of 4, one of 5
    np.save(tmp_path / "fog.npy", x)
    np.save(tmp_path / "labels.npy", np.tile([0, 1, 0, 0], 5))
    sources = eval_all.published_corruptions(tmp_path, (3, 4, 4), 2)
    images, labels = sources["fog"](2)
    assert images.shape == (4, 3, 4, 4) and images.float().mean((1, 2, 3)).tolist() == [0, 255, 255, 0]
    assert labels.tolist() == [0, 1, 0, 0]
    result = eval_all.corruption_accuracy(Brightness(), sources, SETTINGS)
    assert result["accuracy"] == {"fog": [100.0, 75.0, 75.0, 50.0, 50.0]} and result["mCA"] == pytest.approx(70.0)


@pytest.mark.parametrize("fault, told", [
    (dict(labels=np.arange(19)), "labels.npy"), (dict(labels=np.full(20, 7)), "7"),
    (dict(fog=np.zeros((20, 4, 4), np.uint8)), "fog.npy"), (dict(fog=np.zeros((20, 4, 4, 3))), "float64"),
])  # fmt: skip
def test_faults_in_cifar_c_files_are_named(tmp_path, fault, told):
    arrays = {"fog": np.zeros((20, 4, 4, 3), np.uint8), "labels": np.zeros(20, int)} | fault
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    with pytest.raises(common.UserError, match=told):
        eval_all.published_corruptions(tmp_path, (3, 4, 4), 2)["fog"](1)


def test_imagenet_c_folders_are_read(tmp_path):
    for severity in range(1, 6):
        for label, wnid in enumerate(("n01", "n02")):
            folder = tmp_path / "frost" / str(severity) / wnid
            folder.mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (8, 8), (250 * (label if severity < 3 else 0),) * 3).save(folder / f"{i}.JPEG")
    sources = eval_all.published_corruptions(tmp_path, (3, 8, 8), 2)
    result = eval_all.corruption_accuracy(Brightness(), sources, SETTINGS)
    assert result["accuracy"] == {"frost": [100.0, 100.0, 50.0, 50.0, 50.0]}
    with pytest.raises(common.UserError, match="2 classes, but the model has 5"):
        eval_all.published_corruptions(tmp_path, (3, 8, 8), 5)["frost"](1)
    with pytest.raises(common.UserError, match="neither"):
        eval_all.published_corruptions(tmp_path / "frost", (3, 8, 8), 2)


def test_auroc_counts_ties_half():
    assert eval_all.auroc(np.array([3.0, 2.0]), np.array([1.0, 2.0])) == pytest.approx((1 + 1 + 1 + 0.5) / 4)
    assert eval_all.auroc(np.array([1.0]), np.array([2.0, 3.0])) == 0.0


@pytest.fixture
def sphere():
    """A random D-SphereNet on 8x8 images, images, its own predictions, and thresholds that reject about a third."""
    torch.manual_seed(0)
    options = dict(head="sphere", correlation="cosine", mean=[0.4], std=[0.3])
    model = models.build_model("dsphere_mnist", 4, 1, image_size=8, **options).eval()
    x = torch.rand(60, 1, 8, 8)
    prediction, angle = eval_all.predicted_angle(model, x)
    thresholds = torch.full((4,), float(angle.quantile(0.66)))
    return model, x, prediction, angle, thresholds


def test_geodesic_inference_rejects_by_the_angle_to_the_predicted_class(sphere):
    model, x, prediction, angle, thresholds = sphere
    y = prediction.clone()
    y[:10] = (y[:10] + 1) % 4  # ten are misclassified
    result = eval_all.geodesic_inference(model, x, x, y, thresholds, 16)
    accepted = angle <= thresholds[0]
    assert result["accuracy"]["count"] == 50 and result["rejected_clean"]["count"] == int((~accepted).sum())
    assert result["accepted_accuracy"]["count"] == int(accepted[10:].sum())
    assert result["accepted_accuracy"]["n"] == int(accepted.sum())
    assert result["broken"]["count"] == int(accepted[:10].sum()) and result["auroc"] is None
    statistics = {"mean": [1.0, 1.1], "std": [0.1, 0.2]}
    assert torch.allclose(eval_all.geodesic_thresholds(statistics, "cpu"), torch.tensor([1.1, 1.3]))


def test_the_adaptive_attack_breaks_more_and_what_it_breaks_is_accepted(sphere):
    model, x, y, _, thresholds = sphere
    budget = dict(eps=0.1, step_size=0.01, steps=20)
    torch.manual_seed(0)
    plain = common.pgd(model, x, y, loss=eval_all.cw_margin, **budget)
    adaptive = eval_all.geodesic_pgd(model, x, y, thresholds=thresholds, **budget)
    eval_all.check_ball("geodesic", adaptive, x, 0.1, "linf")
    broken = [eval_all.geodesic_inference(model, x, a, y, thresholds, 60)["broken"]["count"] for a in (plain, adaptive)]
    prediction, angle = eval_all.predicted_angle(model, adaptive)
    assert ((prediction != y) & (angle < thresholds[prediction])).sum() == broken[1] >= broken[0] > 0


def test_the_gradient_norm_ratio_is_that_of_each_layer():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    x, x_adv, y = torch.rand(3, 1, 2, 2), torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 2])
    result = eval_all.gradient_norm_ratio(model, x, x_adv, y)
    ratios = []
    for clean, adversarial, label in zip(x, x_adv, y, strict=True):
        norms = []
        for image in (clean, adversarial):
            model.zero_grad()
            torch.nn.functional.cross_entropy(model(image[None]), label[None]).backward()
            norms.append([model[1].weight.grad.norm().item(), model[3].weight.grad.norm().item()])
        ratios.append(np.array(norms[1]) / np.array(norms[0]))
    assert result["layers"] == ["1", "3"] and result["n"] == 3
    assert result["mean"] == pytest.approx(np.mean(ratios, 0).tolist(), rel=1e-5)


def test_curves_fall_with_eps_and_with_restarts(small_model):
    torch.manual_seed(0)
    x = torch.rand(40, 1, 8, 8)
    y = small_model(x).argmax(1)
    settings = dict(known="digits", norm="linf", eps=0.01, batch_size=40, seed=0, amp=False)
    curves = eval_all.robustness_curves(small_model, x, y, settings, steps=5)["axes"]
    for right in curves["eps"]["right"].values():
        assert right[0] == 40 and right == sorted(right, reverse=True) and right[-1] < 40
    for right in curves["restarts"]["right"].values():
        assert right == sorted(right, reverse=True)


def test_the_command_line_writes_the_figures_and_refuses_what_it_cannot_do(cli, refused, tmp_path):
    flags = ["--epochs", "1", "--limit", "164", "--batch-size", "32", "--out", tmp_path / "run"]
    assert cli("train_dsphere", *flags)[0] == 0
    asked = ["--corruptions", "--geodesic", "--analyze", "gradients,features,examples"]
    code, out, err = cli("eval_all", tmp_path / "run", "--n", "60", "--attacks", "fgsm", *asked)
    assert code == 0, err
    assert "our approximation" in out and "geodesic inference under geodesic-pgd-40" in out
    folder = tmp_path / "run" / "eval"
    result = json.loads((folder / "eval.json").read_text())
    assert set(result["corruptions"]["accuracy"]) == set(eval_all.CORRUPTIONS)
    for name in ("corruptions", "gradients", "features", "examples"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "choose from curves" in refused("eval_all", tmp_path / "run", "--analyze", "everything")
    flags = ["--epochs", "1", "--limit", "164", "--steps", "1", "--out", tmp_path / "pgd"]
    assert cli("train_pgd_he", *flags)[0] == 0
    assert "train_dsphere.py writes them" in refused("eval_all", tmp_path / "pgd", "--attacks", "fgsm", "--geodesic")
    assert "rays knows the Linf ball alone" in refused(
        "eval_all", tmp_path / "pgd", "--attacks", "rays", "--norm", "l2"
    )
