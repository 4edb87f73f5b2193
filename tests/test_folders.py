"""Datasets of image files, in small folders made here: layout, labels, augmentation, workers, faults, whole runs."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import train_free_he

WNIDS = ["n01", "n02", "n03"]
COLORS = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]


def save_image(path, label, size, rng):
    """An image whose class is its color."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.clip(np.array(COLORS[label]) + rng.integers(-25, 26, (*size, 3)), 0, 255)
    Image.fromarray(pixels.astype(np.uint8)).save(path, quality=95)


@pytest.fixture
def imagenet(tmp_path):
    """DATA_DIR with imagenet/train/WNID and val/WNID: three classes, images of several shapes, one of them gray."""
    rng, root = np.random.default_rng(0), tmp_path / "imagenet"
    for label, wnid in enumerate(WNIDS):
        for i in range(46):
            save_image(root / "train" / wnid / f"{wnid}_{i}.JPEG", label, (70 + i, 90), rng)
        for i in range(2):
            save_image(root / "val" / wnid / f"val_{label}_{i}.JPEG", label, (300, 280 + i), rng)
    Image.new("L", (50, 60), 128).save(root / "train" / "n01" / "n01_0.JPEG")
    return tmp_path


@pytest.fixture
def tiny(tmp_path):
    """DATA_DIR with tiny-imagenet-200 as published, in three classes; val's file names tell nothing of the class."""
    rng, root = np.random.default_rng(0), tmp_path / "tiny-imagenet-200"
    (root / "test" / "images").mkdir(parents=True)
    for label, wnid in enumerate(WNIDS):
        for i in range(46):
            save_image(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", label, (64, 64), rng)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("n01_0.JPEG\t0\t0\t62\t62\n")
    lines = []
    for i in range(7):
        save_image(root / "val" / "images" / f"val_{i}.JPEG", (2 * i) % 3, (64, 64), rng)
        lines.append(f"val_{i}.JPEG\t{WNIDS[(2 * i) % 3]}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("\n".join(WNIDS))
    return tmp_path


def color_of(x):
    """The class that each image's color says, (B,)."""
    return x.float().mean((2, 3)).argmax(1)


def test_tiny_imagenet_takes_its_test_labels_from_the_annotations(tiny):
    data = common.load_data("tiny-imagenet", str(tiny))
    assert (data.known, data.num_classes, data.image_size, data.in_channels) == ("tiny-imagenet", 3, 64, 3)
    assert (len(data.x_train), len(data.x_val), len(data.x_test)) == (38, 100, 7)
    assert data.y_test.tolist() == [0, 2, 1, 0, 2, 1, 0]
    for split in ("train", "val", "test"):
        x, y = getattr(data, f"x_{split}")[:], getattr(data, f"y_{split}")
        assert x.dtype == torch.uint8 and x.shape == (len(y), 3, 64, 64) and torch.equal(color_of(x), y)
    with Image.open(tiny / "tiny-imagenet-200" / "val" / "images" / "val_3.JPEG") as image:
        assert np.array_equal(data.x_test[3:4][0].permute(1, 2, 0).numpy(), np.asarray(image))
    train, val = set(data.x_train.files), set(data.x_val.files)
    assert len(train | val) == 138 and not train & val


def test_imagenet_is_cropped_to_224_and_gray_images_become_color(imagenet):
    data = common.load_data("imagenet", str(imagenet))
    assert (data.num_classes, data.image_size, len(data.y_test)) == (3, 224, 6)
    assert torch.equal(color_of(data.x_test[:]), data.y_test) and data.y_test.tolist() == [0, 0, 1, 1, 2, 2]
    files = [*data.x_train.files, *data.x_val.files]
    assert sum(file.endswith(b"n01_0.JPEG") for file in files) == 1
    draws = [torch.arange(5)]
    data.x_train.workers = 0
    assert next(data.x_train.read([torch.arange(5)], draws)).shape == (5, 3, 224, 224)


def test_a_training_view_of_tiny_imagenet_is_one_of_the_162_crops_and_flips(tiny):
    x = common.load_data("tiny-imagenet", str(tiny)).x_train
    x.workers = 0
    views, (seen,) = {}, x.read([torch.zeros(200, dtype=torch.long)], [torch.arange(200)])
    padded = torch.nn.functional.pad(x[:1][0], [4] * 4)
    for top, left in itertools.product(range(9), range(9)):
        crop = padded[:, top : top + 64, left : left + 64]
        views |= {crop.numpy().tobytes(): (top, left, False), crop.flip(2).numpy().tobytes(): (top, left, True)}
    tops, lefts, flips = zip(*(views[view.numpy().tobytes()] for view in seen), strict=True)
    assert set(tops) == set(lefts) == set(range(9)) and set(flips) == {False, True}


def test_imagenet_is_tested_on_the_middle_and_trained_on_flips_too(imagenet):
    root = imagenet / "imagenet"
    pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "val" / "n01" / "val_0_0.JPEG", format="PNG")
    for path in (root / "train").rglob("*.JPEG"):  # bright on the left
        Image.fromarray(np.repeat(np.arange(255, 7, -4, dtype=np.uint8)[None], 62, 0)).save(path)
    data = common.load_data("imagenet", str(imagenet))
    assert np.array_equal(data.x_test[:1][0].permute(1, 2, 0).numpy(), pixels[16:240, 16:240])
    data.x_train.workers = 0
    (views,) = data.x_train.read([torch.zeros(20, dtype=torch.long)], [torch.arange(20)])
    brighter = views[..., :112].float().mean((1, 2, 3)) > views[..., 112:].float().mean((1, 2, 3))
    assert 0 < brighter.sum() < 20


def test_the_training_view_follows_from_its_draw_alone_and_leaves_the_generator_as_it_was(tiny):
    x = common.load_data("tiny-imagenet", str(tiny)).x_train
    rows = [torch.tensor([0, 1, 2]), torch.tensor([3, 0])]
    draws = [torch.tensor([5, 6, 7]), torch.tensor([8, 5])]
    state = torch.get_rng_state()
    x.workers = 0
    alone = list(x.read(rows, draws))
    torch.set_rng_state(state)
    x.workers = 2
    shared = list(x.read(rows, draws))
    after = torch.get_rng_state()
    assert torch.equal(state, after)
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))
    assert torch.equal(alone[0][0], alone[1][1])
    (other,) = x.read(rows[:1], [torch.tensor([15, 16, 17])])
    assert not torch.equal(other, alone[0])


def test_a_run_on_image_files_is_the_same_with_any_workers_and_resumes_bit_for_bit(cli, tiny):
    flags = ["--dataset", "tiny-imagenet", "--data-dir", tiny, "--arch", "small_cnn", "--batch-size", "8"]
    flags += ["--steps", "1", "--lr", "0.01", "--schedule", "constant"]
    for name, more in (("whole", ["--epochs", "2", "--workers", "2"]), ("part", ["--epochs", "1", "--workers", "0"])):
        code, _, err = cli("train_pgd_he", *flags, *more, "--out", tiny / name)
        assert code == 0, err
    assert cli("train_pgd_he", *flags, "--epochs", "2", "--out", tiny / "part", "--resume")[0] == 0
    whole, part = (common.read_file(tiny / name / "last.pt")["model"] for name in ("whole", "part"))
    assert all(torch.equal(whole[key], part[key]) for key in whole)

    code, _, err = cli("eval_all", tiny / "whole", "--attacks", "fgsm,pgd-2")
    assert code == 0, err
    result = json.loads((tiny / "whole" / "eval" / "eval.json").read_text())
    assert result["dataset"] == "tiny-imagenet" and result["attacks"]["clean"]["n"] == 7 and result["eps"] == 0.031


def test_a_signal_to_all_processes_of_a_run_spares_the_workers_until_the_batch_is_done(tiny):
    """As `timeout` or a batch system sends it."""
    script, out = Path(common.__file__).with_name("train_pgd_he.py"), tiny / "run"
    flags = ["--dataset", "tiny-imagenet", "--data-dir", tiny, "--arch", "small_cnn", "--batch-size", "8", "--out", out]
    command = [sys.executable, script, *flags, "--steps", "1", "--epochs", "500", "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (out / "log.csv").exists() and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    told = process.communicate(timeout=60)[1].splitlines()[-1]
    assert process.returncode == 143 and "stopped by SIGTERM in epoch" in told, told


def test_free_at_on_imagenet_with_its_settings(cli, imagenet):
    args = train_free_he.parse_args(["--dataset", "imagenet"])
    assert (args.arch, args.epochs, args.replays, args.batch_size, args.lr) == ("resnet50", 23, 4, 256, 0.1)
    assert (args.eps, args.step_size, args.scale, args.margin) == (4 / 255, 1 / 255, 10.0, 0.2)
    assert (args.weight_decay, args.schedule) == (1e-4, "thirds")
    flags = ["--dataset", "imagenet", "--data-dir", imagenet, "--batch-size", "4", "--limit", "106", "--steps", "1"]
    code, out, err = cli("train_free_he", *flags, "--epochs", "1", "--replays", "2", "--out", imagenet / "run")
    assert code == 0, err
    assert "resnet50" in out and np.isfinite(common.read_file(imagenet / "run" / "last.pt")["metrics"]["loss"])


def test_faults_in_the_folders_are_named(refused, tiny, imagenet):
    flags = ["--steps", "1", "--batch-size", "8", "--arch", "small_cnn"]

    def message(dataset):
        return refused("train_pgd_he", "--dataset", dataset, "--data-dir", tiny, *flags)

    broken = tiny / "tiny-imagenet-200" / "train" / "n02" / "images" / "n02_7.JPEG"
    broken.write_bytes(broken.read_bytes()[:200])
    assert str(broken) in message("tiny-imagenet")
    annotations = tiny / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    annotations.write_text("val_0.JPEG\tn01\nval_1.JPEG\tn99\n")
    assert "line 2" in message("tiny-imagenet") and "n99" in message("tiny-imagenet")
    annotations.unlink()
    assert "val_annotations.txt" in message("tiny-imagenet")
    (imagenet / "imagenet" / "val" / "n03").rename(imagenet / "imagenet" / "val" / "n04")
    assert "differ in their classes" in message("imagenet")
    (imagenet / "imagenet" / "train").rename(imagenet / "imagenet" / "elsewhere")
    assert str(imagenet / "imagenet" / "train") in message("imagenet")
