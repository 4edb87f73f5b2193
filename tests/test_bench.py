"""bench.py runs, its reference attacks as ours does, and its count of operations is right. No time is asserted."""

import json
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import bench
import common


def test_every_section_runs_and_is_written(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SCRIPTS", {name: bench.SCRIPTS[name] for name in ("PGD-AT", "PGD-AT+HE", "WeightPen")})
    monkeypatch.setattr(bench, "STEPS", 1)
    flags = ("--arch", "small_cnn", "--size", "8", "--batch-size", "8", "--rounds", "1", "--out", tmp_path / "b.json")
    code, out, err = cli("bench", *flags)
    assert code == 0, err
    results = json.loads((tmp_path / "b.json").read_text())
    assert set(bench.SECTIONS) <= set(results) and all(name in out for name in bench.SECTIONS)
    rows = {row["what"]: row for row in results["training"]}
    for base in ("PGD-AT", "reference"):
        ratio = rows["PGD-AT+HE"]["img/s"] / rows[base]["img/s"]
        assert rows["PGD-AT+HE"][f"x {base}"] == pytest.approx(ratio, rel=0.02)  # of one round
    assert rows["PGD-AT"]["GFLOP/img"] > 5 * rows["WeightPen"]["GFLOP/img"] > 0
    assert all(math.isfinite(row["img/s"]) and row["img/s"] > 0 for row in rows.values())
    pgd = next(row for row in results["attacks"] if row["what"] == "pgd-20")
    assert pgd["x reference"] > 0 and pgd["amp x reference"] > 0
    assert pgd["GFLOP/img"] > 15 * results["attacks"][0]["GFLOP/img"] > 0  # PGD-20 over FGSM
    assert results["setting"]["arch"] == "small_cnn" and results["peak GiB"] > 0


def test_an_unknown_section_is_one_line(refused):
    assert "choose from training" in refused("bench", "--only", "everything")
    for section in ("training", "attacks"):
        assert "unknown arch 'foo'" in refused("bench", "--arch", "foo", "--only", section, "--batch-size", "2")


@pytest.mark.parametrize("batch_size", [2, 64, 1300, 5000])
def test_an_epoch_has_as_many_steps_as_are_timed(tmp_path, batch_size):
    data, _, _ = bench.random_data(tmp_path, SimpleNamespace(batch_size=batch_size, size=8))
    assert len(common.load_data(str(data), "data").y_train) // batch_size == bench.STEPS


def test_the_references_attack_is_ours(small_model):
    x = torch.rand(6, 1, 8, 8)
    y, start = torch.arange(6), (x + 0.05).clamp(0, 1)
    theirs = bench.reference_pgd(small_model, x, y, 0.1, 0.03, 5, start)
    ours = common.pgd(small_model, x, y, loss=F.cross_entropy, eps=0.1, step_size=0.03, steps=5, start=start)
    assert torch.allclose(theirs, ours, atol=1e-6) and not torch.equal(theirs, start)
    assert any(p.grad is not None for p in small_model.parameters())  # the waste that it stands for


def test_operations_are_counted_forward_and_backward():
    conv, x = torch.nn.Conv2d(3, 5, 3, bias=False), torch.rand(2, 3, 8, 8)
    forward = 2 * 2 * 5 * 6 * 6 * 3 * 3 * 3  # multiply and add, images, channels, pixels, kernel
    with bench.CountFlops() as counter:
        out = conv(x)
    assert counter.total == forward
    with bench.CountFlops() as counter:
        out.sum().backward()
    assert counter.total == forward  # to the weights
    x.requires_grad_()
    conv.requires_grad_(False)
    with bench.CountFlops() as counter:
        torch.autograd.grad(conv(x).sum(), x)
    assert counter.total == 2 * forward  # to the images alone


def test_a_pgd_10_step_is_the_work_of_23_forward_passes(tmp_path, monkeypatch):
    parser = dict(arch="resnet18", batch_size=4, size=8, device="cpu")
    args = type("Args", (), parser)()
    monkeypatch.setattr(bench, "STEPS", 1)
    data, _, _ = bench.random_data(tmp_path, args)
    with bench.CountFlops() as counter:
        bench.reference_model("resnet18", 8, "cpu").eval()(torch.rand(1, 3, 8, 8))
    assert bench.gigaflops(args, data, "PGD-AT") * 1e9 / counter.total == pytest.approx(23, rel=0.02)


def test_transforms_give_a_crop_of_the_image():
    x = np.full((1, 8, 8, 3), 200, np.uint8)
    image, label = bench.Transformed(x, np.array([3]))[0]
    assert (
        label == 3
        and image.shape == (3, 8, 8)
        and all(v in (0.0, pytest.approx(200 / 255)) for v in image.unique().tolist())
    )


def test_the_reference_runs_where_the_c_library_is_as_it_comes():
    assert bench.apart(os.getpid) != os.getpid()
