"""Where data is read from, how it is split and augmented, and what is refused."""

import itertools
import os
import signal
import struct

import common

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits


def test_digits_are_complete_and_split_without_overlap():
    data, digits = common.load_data("digits"), load_digits().data
    assert (len(data.train), len(data.val), len(data.y_test), data.num_classes) == (1338, 100, 359, 10)
    assert data.x_train.dtype == torch.uint8 and data.x_train.shape[1:] == (1, 8, 8)
    assert sorted(torch.cat([data.train, data.val]).tolist()) == list(range(1438))
    assert sorted(torch.cat([data.x_train, data.x_test]).sum((1, 2, 3))) == sorted(np.round(digits * 255 / 16).sum(1))


def test_the_split_is_the_same_each_time_and_limit_keeps_a_subset(make_npz):
    path = str(make_npz(train=300))
    first, again, fewer = common.load_data(path), common.load_data(path), common.load_data(path, limit=150)
    assert torch.equal(first.train, again.train) and torch.equal(first.val, fewer.val)
    assert (len(first.train), len(fewer.train), len(fewer.val)) == (200, 50, 100)
    assert set(fewer.train.tolist()) <= set(first.train.tolist())
    assert len(common.load_data(str(make_npz(train=10_000, shape=(4, 4)))).val) == 200  # 2 %


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (8, 8, 3)])
def test_arrays_become_nchw_and_statistics_are_those_of_the_training_images(make_npz, shape):
    path = make_npz(shape=shape)
    data, raw = common.load_data(str(path)), np.load(path)
    channels_last = data.x_test.permute(0, 2, 3, 1).numpy()
    assert np.array_equal(channels_last, raw["x_test"].reshape(20, 8, 8, -1)) and data.image_size == 8
    pixels = raw["x_train"].reshape(140, 64, -1)[data.train] / 255
    for name, statistic in data.statistics().items():
        assert statistic == pytest.approx(getattr(pixels, name)((0, 1)).tolist())
    images = torch.from_numpy(raw["x_test"][[3, 1]]).view(2, 8, 8, -1).permute(0, 3, 1, 2).double() / 255
    for x in (data.x_test, data.x_test.float() / 255):  # bytes, or floats in [0, 1]
        torch.testing.assert_close(common.images_at(x, torch.tensor([3, 1]), "cpu"), images.float())


def test_a_file_in_the_data_dir_comes_first_and_takes_the_defaults_of_the_name_it_begins_with(make_npz, tmp_path):
    make_npz("digits")
    make_npz("cifar100_small", shape=(8, 8, 3))
    assert len(common.load_data("digits", str(tmp_path)).y_test) == 20
    data = common.load_data("cifar100_small", str(tmp_path))
    assert (data.name, data.known, data.num_classes) == ("cifar100_small", "cifar100", 10)  # those of the labels
    names = ["x/cifar10_jpeg.npz", "cifar100-mine.npz", "mnist.npz", "toy.npz", "my_cifar10.npz"]
    assert [common.known_dataset(name) for name in names] == ["cifar10", "cifar100", "mnist", None, None]


def test_torchvisions_own_files_are_read(tmp_path):
    raw, rng = tmp_path / "MNIST" / "raw", np.random.default_rng(0)
    raw.mkdir(parents=True)
    for prefix, n in (("train", 130), ("t10k", 10)):
        images, labels = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8), (np.arange(n) % 10).astype(np.uint8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, n, 28, 28) + images.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, n) + labels.tobytes())
    data = common.load_data("mnist", str(tmp_path))
    assert np.array_equal(data.x_test[:, 0].numpy(), images) and data.y_test.tolist() == labels.tolist()


BROKEN = {
    "y_test is not a file": dict(y_test=None),
    "x_train is float64": dict(x_train=np.full((140, 8, 8), 255.0)),
    "x_test is float32": dict(x_test=np.full((20, 8, 8), np.nan, np.float32)),
    "x_train is int64": dict(x_train=np.zeros((140, 8, 8), int)),
    "labels float64": dict(y_train=np.zeros(140)),
    "labels int64 (139,)": dict(y_train=np.zeros(139, int)),
    "x_test has shape (0, 8, 8)": dict(x_test=np.zeros((0, 8, 8), np.uint8), y_test=np.zeros(0, int)),
    "x_train has shape (140, 64)": dict(x_train=np.zeros((140, 64), np.uint8)),
    "x_test has shape (20, 8, 8, 4)": dict(x_test=np.zeros((20, 8, 8, 4), np.uint8)),
    "training images (1, 8, 9), test images (1, 8, 8)": dict(x_train=np.zeros((140, 8, 9), np.uint8)),
    "x_train is not a file": dict(x_train=None),
    "one integer from 0": dict(y_test=np.full(20, -1)),
    "allow_pickle=False": dict(y_test=np.array([{"a": 1}] * 20, dtype=object)),
}


@pytest.mark.parametrize("complaint", BROKEN)
def test_a_broken_npz_is_refused_with_file_and_fault(make_npz, refused, complaint):
    line = refused("train_pgd_he", "--dataset", make_npz(**BROKEN[complaint]))
    assert complaint in line and "toy.npz" in line


def test_what_cannot_be_read_is_refused(make_npz, refused, monkeypatch):
    path = make_npz("half")
    path.write_bytes(path.read_bytes()[:2000])
    assert "not an .npz of x_train" in refused("train_pgd_he", "--dataset", path)
    assert "missing.npz" in refused("train_pgd_he", "--dataset", "missing.npz")
    assert "unknown dataset 'nope'" in refused("train_pgd_he", "--dataset", "nope")
    assert "90 training images, 10 class(es)" in refused("train_pgd_he", "--limit", "90")
    one_class = make_npz("one", y_train=np.zeros(140, int), y_test=np.zeros(20, int))
    assert "140 training images, 1 class(es)" in refused("train_pgd_he", "--dataset", one_class)
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no route to host")))
    line = refused("train_pgd_he", "--dataset", "cifar10")
    assert "no route to host" in line and "put data/cifar10.npz there" in line


def test_crop_and_flip_is_one_of_the_162_views_of_each_image():
    torch.manual_seed(0)
    padded = torch.nn.functional.pad(torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8), [4] * 4)
    rows, views = torch.tensor([4, 0, 3] * 400), {}
    for row, top, left, flip in itertools.product((0, 3, 4), range(9), range(9), (False, True)):
        view = padded[row, :, top : top + 8, left : left + 8].flip(2 if flip else ())
        views[row, view.numpy().tobytes()] = top, left, flip
    images = common.crop_and_flip(padded, rows, padding=4)
    seen = {views[row, image.numpy().tobytes()] for row, image in zip(rows.tolist(), images, strict=True)}
    assert len(seen) > 150


@pytest.mark.parametrize("shape", [(8, 12), (8, 12, 3), (3, 8, 12)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_floats_in_any_layout_and_size_and_test_images_alone(make_npz, shape, dtype):
    x, (height, width) = np.random.default_rng(0).random((20, *shape)).astype(dtype), (8, 12)
    data = common.load_data(str(make_npz(x_test=x, x_train=None, y_train=None)))
    first = shape[0] == 3
    expected = x if first else x.reshape(20, height, width, -1).transpose(0, 3, 1, 2)
    images = common.images_at(data.x_test, torch.arange(20), "cpu")
    assert images.dtype == torch.float32 and np.array_equal(images.numpy(), expected.astype(np.float32))
    assert (data.in_channels, data.image_size, len(data.train), data.num_classes) == (len(images[0]), (8, 12), 0, 10)
    train = np.random.default_rng(1).random((140, *shape)).astype(dtype)
    data = common.load_data(str(make_npz(x_test=x, x_train=train)))
    pixels = (train if first else train.reshape(140, height, width, -1).transpose(0, 3, 1, 2))[data.train]
    assert data.statistics()["mean"] == pytest.approx(pixels.astype(float).mean((0, 2, 3)).tolist(), rel=1e-5)


# Images in files: three classes, each of one color.
COLORS = {"n01": (200, 30, 30), "n02": (30, 200, 30), "n03": (30, 30, 200)}


def save_image(path, wnid, size, rng):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.array(COLORS[wnid]) + rng.integers(-25, 26, (*size, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path, quality=95)


@pytest.fixture
def folders(tmp_path):
    """DATA_DIR with imagenet and tiny-imagenet-200, as published."""
    rng, imagenet, tiny = np.random.default_rng(0), tmp_path / "imagenet", tmp_path / "tiny-imagenet-200"
    for number, wnid in enumerate(COLORS):
        for i in range(46):
            save_image(imagenet / "train" / wnid / f"{i}.JPEG", wnid, (70 + i, 90), rng)
            save_image(tiny / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", wnid, (64, 64), rng)
        save_image(imagenet / "val" / wnid / "0.JPEG", wnid, (300, 280), rng)
        save_image(tiny / "val" / "images" / f"val_{2 - number}.JPEG", wnid, (64, 64), rng)
    lines = [f"val_{2 - number}.JPEG\t{wnid}\t0\t32\t44\t62\n" for number, wnid in enumerate(COLORS)]
    (tiny / "val" / "val_annotations.txt").write_text("".join(lines))
    Image.new("L", (50, 60), 128).save(imagenet / "train" / "n01" / "0.JPEG")  # a gray one becomes color
    return tmp_path


@pytest.mark.parametrize("name, size", [("imagenet", 224), ("tiny-imagenet", 64)])
def test_image_folders_give_images_with_their_labels(folders, name, size):
    data = common.load_data(name, str(folders))
    assert (data.known, data.num_classes, data.image_size, len(data.train), len(data.val)) == (name, 3, size, 38, 100)
    data.x_train.workers = data.x_test.workers = 0
    x = common.images_at(data.x_test, torch.arange(3), "cpu")
    assert x.shape == (3, 3, size, size) and torch.equal(x.mean((2, 3)).argmax(1), data.y_test)
    image = Image.open(data.x_test.files[0])
    if name == "imagenet":  # 280 wide, 300 high: the shorter side becomes 256
        image = image.resize((256, 274), Image.BILINEAR).crop((16, 25, 240, 249))
    assert np.array_equal((255 * x[0]).round().byte().permute(1, 2, 0).numpy(), np.asarray(image))
    (x,) = data.x_train.read([data.train], seed=1)
    colored = x.float().std(1).mean((1, 2)) > 20  # all but one
    assert x.dtype == torch.uint8 and colored.sum() >= 37
    assert torch.equal(x.float().mean((2, 3)).argmax(1)[colored], data.y_train[data.train][colored])


def test_training_views_follow_from_the_seed_alone_so_that_a_run_resumes_bit_for_bit(cli, folders, monkeypatch):
    """In mid-epoch, with any number of workers; the caller's random numbers are left alone."""
    x = common.load_data("tiny-imagenet", str(folders)).x_train
    rows, state, views = [torch.tensor([0, 1, 2]), torch.tensor([3, 0])], torch.get_rng_state(), []
    for x.workers, seed in ((0, 5), (1, 5), (0, 6)):
        views.append(torch.cat(list(x.read(rows, seed))))
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])
    assert torch.equal(views[0][0], views[0][4]) and torch.equal(state, torch.get_rng_state())
    flags = ["--dataset", "tiny-imagenet", "--data-dir", folders, "--lr", "0.01", "--schedule", "constant"]
    flags += "--arch wrn-10-1 --batch-size 16 --steps 1 --replays 2 --workers 0 --epochs".split()
    assert cli("train_free_he", *flags, 2, "--workers", 1, "--out", folders / "whole")[0] == 0
    step = common.Run.step

    def stop_in_the_second_epoch(run, *batch):
        step(run, *batch)
        if run.iteration == 5:  # the first of two batches, each twice
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(common.Run, "step", stop_in_the_second_epoch)
    for code, *more in ((143,), (0, "--resume")):
        assert cli("train_free_he", *flags, 2, *more, "--out", folders / "part")[0] == code
    whole, part = (common.read_file(folders / name / "last.pt")["model"] for name in ("whole", "part"))
    assert all(torch.equal(whole[key], part[key]) for key in whole)


def test_unreadable_images_and_faults_of_the_folders_are_named(refused, folders):
    imagenet, tiny = folders / "imagenet", folders / "tiny-imagenet-200"
    flags = ["--data-dir", folders, "--steps", "1", "--batch-size", "8", "--arch", "small_cnn", "--dataset"]
    broken = tiny / "train" / "n02" / "images" / "n02_7.JPEG"
    broken.write_bytes(broken.read_bytes()[:200])
    for workers in (0, 1):
        line = refused("train_pgd_he", *flags, "tiny-imagenet", "--workers", workers)
        assert f"error: {broken}: not a readable image" in line
    (tiny / "val" / "val_annotations.txt").unlink()
    assert "val_annotations.txt" in refused("train_pgd_he", *flags, "tiny-imagenet")
    (imagenet / "val" / "n03").rename(imagenet / "val" / "n04")
    assert "differ in their classes" in refused("train_pgd_he", *flags, "imagenet")
    (imagenet / "train").rename(imagenet / "elsewhere")
    assert str(imagenet / "train") in refused("train_pgd_he", *flags, "imagenet")
