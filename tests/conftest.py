"""Fixtures: the scripts called as a user calls them, in this process, and small models and data."""

import importlib
import sys

import common
import models

import numpy as np
import pytest
import torch

torch.set_num_threads(1)  # on networks this small two threads are slower than one


@pytest.fixture(autouse=True)
def no_gpu_that_torch_cannot_use(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "NVIDIA", tmp_path / "none")


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """cli("train_pgd_he", "--eps", "0.1") -> (exit code, stdout, stderr), run from an empty directory."""
    monkeypatch.chdir(tmp_path)

    def call(script, *argv):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, argv)])
        try:
            common.cli(importlib.import_module(script).main)
            code = 0
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def refused(cli):
    """Asserts that a call ends with exit code 2 and one line on stderr, and returns that line."""

    def call(script, *argv):
        code, _, err = cli(script, *argv)
        assert code == 2, (code, err)
        assert err.count("\n") == 1 and "Traceback" not in err, err
        return err

    return call


@pytest.fixture
def make_npz(tmp_path):
    """make_npz("name", key=array, ...) -> a good small .npz, with the given arrays put in or (None) left out."""

    def make(name="toy", train=140, test=20, shape=(8, 8), **changed):
        rng = np.random.default_rng(0)
        arrays = {
            "x_train": rng.integers(0, 256, (train, *shape), dtype=np.uint8),
            "y_train": np.arange(train) % 10,
            "x_test": rng.integers(0, 256, (test, *shape), dtype=np.uint8),
            "y_test": np.arange(test) % 10,
        }
        arrays = {key: value for key, value in (arrays | changed).items() if value is not None}
        np.savez(tmp_path / f"{name}.npz", **arrays)
        return tmp_path / f"{name}.npz"

    return make


@pytest.fixture
def small_model():
    """An untrained HE network on 8x8 gray images, with batch norm, scale 15 and margin 0.2, in eval mode."""
    torch.manual_seed(0)
    return models.build_model("wrn-10-1", 10, 1, image_size=8, head="he", scale=15.0, margin=0.2).eval()


@pytest.fixture
def linear_model():
    """linear_model(weight) -> logits W x on flattened images: the optimal Linf perturbation is known."""

    def make(weight):
        layer = torch.nn.Linear(*reversed(weight.shape), bias=False)
        layer.weight.data = weight
        return torch.nn.Sequential(torch.nn.Flatten(), layer)

    return make
