"""Where data is read from, how it is split, cropped and flipped, and what is refused."""

import struct
import urllib.error

import numpy as np
import pytest
import torch

import common


def test_digits_are_real_complete_and_split_without_overlap():
    from sklearn.datasets import load_digits

    data = common.load_data("digits")
    assert (len(data.y_train), len(data.y_val), len(data.y_test)) == (1338, 100, 359)
    assert data.x_train.dtype == torch.uint8 and data.x_train.shape[1:] == (1, 8, 8) and data.num_classes == 10
    parts = torch.cat([data.x_train, data.x_val, data.x_test]).flatten(1).double()
    raw = np.sort(np.round(load_digits().data * 255 / 16).sum(1))
    assert np.array_equal(np.sort(parts.sum(1).numpy()), raw)


def test_the_split_is_the_same_each_time_and_limit_is_a_subset(make_npz):
    path = str(make_npz(train=300))
    first, again, fewer = common.load_data(path), common.load_data(path), common.load_data(path, limit=150)
    assert torch.equal(first.x_train, again.x_train) and torch.equal(first.x_val, again.x_val)
    assert (len(fewer.y_train), len(fewer.y_val), len(fewer.y_test)) == (50, 100, 20)
    images = {image.numpy().tobytes() for image in torch.cat([first.x_train, first.x_val])}
    assert len(images) == 300 and {image.numpy().tobytes() for image in fewer.x_train} <= images


def test_two_percent_is_held_out_of_a_large_set(make_npz):
    data = common.load_data(str(make_npz(train=10_000, shape=(4, 4))))
    assert (len(data.y_val), len(data.y_train)) == (200, 9_800)


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (8, 8, 3)])
def test_gray_and_color_arrays_become_nchw(make_npz, shape):
    path = make_npz(shape=shape)
    data = common.load_data(str(path))
    assert data.x_test.shape == (20, 3 if shape[2:] == (3,) else 1, 8, 8)
    raw = np.load(path)["x_test"].reshape(20, 8, 8, -1)
    assert np.array_equal(data.x_test.permute(0, 2, 3, 1).numpy(), raw)


def test_a_name_is_looked_up_in_the_data_dir_first(make_npz, tmp_path):
    make_npz("digits")
    make_npz("cifar100_small", shape=(8, 8, 3))
    assert len(common.load_data("digits", str(tmp_path)).y_test) == 20
    data = common.load_data("cifar100_small", str(tmp_path))
    assert (data.name, data.known, data.num_classes) == ("cifar100_small", "cifar100", 100)


def test_a_file_takes_the_defaults_of_the_dataset_its_stem_begins_with():
    names = ["x/cifar10_jpeg.npz", "cifar100-mine.npz", "mnist", "mnist.npz", "toy.npz", "my_cifar10.npz"]
    assert [common.known_dataset(name) for name in names] == ["cifar10", "cifar100", "mnist", "mnist", None, None]


def test_statistics_are_mean_and_std_of_the_training_images(make_npz):
    data = common.load_data(str(make_npz(shape=(8, 8, 3))))
    pixels = data.x_train.double().div(255).transpose(0, 1).flatten(1)
    statistics = data.statistics()
    assert statistics["mean"] == pytest.approx(pixels.mean(1).tolist(), rel=1e-9)
    assert statistics["std"] == pytest.approx(pixels.std(1, correction=0).tolist(), rel=1e-9)


def test_crop_and_flip_is_one_of_the_162_views_of_each_image():
    torch.manual_seed(0)
    x = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    padded = torch.nn.functional.pad(x, [4] * 4)
    rows = torch.tensor([4, 0, 3] * 40)
    out = common.crop_and_flip(padded, rows, 8)
    seen = set()
    for row, image in zip(rows.tolist(), out, strict=True):
        views = {
            (top, left, flip): padded[row, :, top : top + 8, left : left + 8].flip(2 if flip else ())
            for top in range(9)
            for left in range(9)
            for flip in (False, True)
        }
        matches = [key for key, view in views.items() if torch.equal(view, image)]
        assert matches
        seen.add(matches[0])
    assert len(seen) > 50 and {flip for _, _, flip in seen} == {False, True}


def test_a_crop_reaches_every_place():
    torch.manual_seed(0)
    one = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    crops = common.crop_and_flip(one, torch.zeros(4000, dtype=torch.long), 8)
    corners = {int(crop.min()) for crop in crops}  # the left upper one, or after a flip the right upper one
    assert corners == {16 * top + left for top in range(9) for left in range(9)}


def test_pixels_are_shares_of_255():
    pixels = common.to_float(torch.tensor([0, 51, 255], dtype=torch.uint8))
    assert pixels.dtype == torch.float32 and pixels.tolist() == pytest.approx([0, 0.2, 1], rel=1e-7)


def test_torchvisions_own_files_are_read_through_the_tolerant_import(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for prefix, n in (("train", 130), ("t10k", 10)):
        images, labels = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8), (np.arange(n) % 10).astype(np.uint8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, n, 28, 28) + images.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, n) + labels.tobytes())
    data = common.load_data("mnist", str(tmp_path))
    assert np.array_equal(data.x_test[:, 0].numpy(), images) and data.y_test.tolist() == labels.tolist()
    assert data.source.startswith("torchvision")


@pytest.mark.parametrize(
    "name, address", [("mnist", "http"), ("cifar10", "cs.toronto.edu"), ("cifar100", "cs.toronto.edu")]
)
def test_a_download_without_a_network_names_dataset_address_and_remedy(refused, monkeypatch, name, address):
    def no_network(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    line = refused("train_pgd_he", "--dataset", name)
    assert all(word in line for word in (name, address, "--dataset FILE.npz", "network", f"{name}.npz"))


UINT8 = np.uint8
BROKEN = {
    "no array y_test": dict(y_test=None),
    "no array x_train, y_train": dict(x_train=None, y_train=None),
    "x_train has dtype float64": dict(x_train=np.zeros((140, 8, 8))),
    "y_train has dtype float64": dict(y_train=np.zeros(140)),
    "one label an image": dict(y_train=np.zeros(139, int)),
    "at least one": dict(x_test=np.zeros((0, 8, 8), UINT8), y_test=np.zeros(0, int)),
    "must be square": dict(x_train=np.zeros((140, 8, 9), UINT8)),
    "x_train has shape (140, 3, 8, 8)": dict(x_train=np.zeros((140, 3, 8, 8), UINT8)),
    "differ in shape": dict(x_test=np.zeros((20, 9, 9), UINT8)),
    "labels count from 0": dict(y_test=np.full(20, -1)),
    "not a readable .npz": dict(y_test=np.array([{"a": 1}] * 20, dtype=object)),
}


@pytest.mark.parametrize("complaint", BROKEN)
def test_a_broken_npz_is_refused_with_file_array_and_fault(make_npz, refused, complaint):
    line = refused("train_pgd_he", "--dataset", make_npz(**BROKEN[complaint]))
    assert complaint in line and "toy.npz" in line


def test_labels_beyond_a_known_datasets_classes_are_refused(make_npz, refused):
    line = refused("train_pgd_he", "--dataset", make_npz("mnist_mine", y_train=np.arange(140) % 11))
    assert "label 10" in line and "mnist has 10 classes" in line


@pytest.mark.parametrize("content", [b"", b"no zip", "half"])
def test_an_unreadable_npz_is_refused(make_npz, refused, content):
    path = make_npz()
    path.write_bytes(path.read_bytes()[:2000] if content == "half" else content)
    assert "not a readable .npz" in refused("train_pgd_he", "--dataset", path)
