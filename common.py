"""What the training scripts and eval_all.py share: errors, data, flags, PGD, the margin loss, checkpoints and the Run.

Images are float in [0, 1], (B, C, H, W), everywhere outside the model, so eps is always in pixel units (8/255, 0.031).
A script calls, in this order: training_parser, load_data, build_model, Run, and then its own loop over run.epochs() and
run.batches().
"""

import argparse
import csv
import ctypes
import io
import json
import math
import os
import platform
import re
import shlex
import signal
import sys
import threading
import time
import weakref
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import models

try:
    import fcntl
except ImportError:  # not a POSIX system: two runs in one folder go unnoticed there
    fcntl = None

# ---------------------------------------------------------------------------------------------------------- errors


STOPS = {signal.SIGINT, signal.SIGTERM}
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


class UserError(Exception):
    """Something the user can mend: told in one line on stderr, exit code 2."""


class Interrupted(Exception):
    """A signal stopped the run after a whole batch: told in one line on stderr, exit code 128 + signal."""

    def __init__(self, signal_number: int, told: str):
        super().__init__(told)
        self.code = 128 + signal_number


def cli(main: Callable[[], None]) -> None:
    """Run a script's main(); faults that a user can mend become one line and exit code 2, Ctrl-C 130, SIGTERM 143."""
    keep_freed_memory()
    handlers = {number: signal.getsignal(number) for number in STOPS}
    try:
        main()
        leave_ranks()
    except UserError as error:
        sys.exit(_complain(f"error: {error}", 2))
    except OSError as error:
        sys.exit(_complain(f"error: {error.filename or 'input/output'}: {error.strerror or error}", 2))
    except torch.OutOfMemoryError as error:
        remedy = "a smaller --batch-size or, in training, the same one in parts with --accumulate 2"
        sys.exit(_complain(f"error: the GPU's memory is too small ({str(error)[:80]}...): try {remedy}", 2))
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        sys.exit(_complain(f"error: a process that reads images was killed ({str(error)[:60]}): --resume goes on", 2))
    except Interrupted as stop:
        sys.exit(_complain(stop, stop.code))
    except KeyboardInterrupt:
        sys.exit(_complain("interrupted (the same command goes on, a training script's with --resume)", 130))
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)


def keep_freed_memory() -> None:
    """Tell glibc to keep what tensors free for the next ones, and not to ask the kernel for cleared pages each time.

    Every large activation otherwise faults in all its pages anew. What that saves, bench.py measures.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # no other C library has it
        if mallopt:
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, -1)


def _complain(message: object, code: int) -> int:
    print(f"{Path(sys.argv[0]).name}: {' '.join(str(message).split())}", file=sys.stderr)
    return code


# ----------------------------------------------------------------------------------------------------------- ranks
# Under torchrun every process, a rank, trains on its part of each batch. All draw the same random numbers for the
# whole batch, each takes its own of them, and gradients are averaged: so the number of ranks changes nothing but the
# statistics of batch norm, and these too are those of the whole batch with --sync-bn.


def many_ranks() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank_and_count() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if many_ranks() else (0, 1)


def join_ranks(device: str) -> None:
    """Under torchrun: meet the other ranks. The first one speaks for all."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not many_ranks():
        if torch.device(device).type == "cuda":
            torch.cuda.set_device(device)
        # Imported after it, as by an optimizer, this module's functions would keep the group beyond leave_ranks.
        import_module("torch.distributed.nn.functional")
        dist.init_process_group("nccl" if torch.device(device).type == "cuda" else "gloo")
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")


@contextmanager
def first_rank_first() -> Iterator[None]:
    """The other ranks wait until the first one is through, and has left on the disk what all of them need."""
    rank, _ = rank_and_count()
    if rank:
        dist.barrier()
    yield
    if many_ranks() and not rank:
        dist.barrier()


def leave_ranks() -> None:
    """Wait for the first rank, which writes the results, and end the group's threads.

    A thread that still holds its last exchange of tensors while Python shuts down aborts the process.
    """
    if many_ranks():
        dist.barrier()
        dist.destroy_process_group()


def my_rows(whole: Tensor) -> Tensor:
    """This rank's part of what belongs to a whole batch."""
    rank, count = rank_and_count()
    return whole.chunk(count)[rank]


def draw(fill: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Random numbers in the shape of x, this rank's images: fill is asked once for the whole batch over all ranks."""
    return my_rows(fill(x.new_empty(rank_and_count()[1] * len(x), *x.shape[1:])))


def _sum_over_ranks(tensor: Tensor) -> Tensor:
    if many_ranks():
        dist.all_reduce(tensor)
    return tensor


def average(tensors: Sequence[Tensor]) -> None:
    """Put the mean over all ranks in the place of each tensor."""
    if many_ranks():
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))


# ------------------------------------------------------------------------------------------------------------ data

STREAMED = ("tiny-imagenet", "imagenet")  # too large to be held in memory
KNOWN = ("digits", "mnist", "cifar10", "cifar100", *STREAMED)
CLASSES = {"digits": 10, "mnist": 10, "cifar10": 10, "cifar100": 100}
TORCHVISION = {"mnist": "MNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}
MOST_CLASSES = 100_000  # a label beyond is taken for a fault in the file
SPLIT_SEED = 0  # the held-out images, the digits test split and a --limit subset are the same for every --seed


class ImageFiles:
    """RGB images in files, read when they are asked for: to index it gives uint8 (B, 3, H, W), as its tensor would.

    `train_view` and `test_view` are torchvision transforms from a PIL image to a uint8 tensor (3, H, W). `workers`
    processes read at once, None for one a core.
    """

    workers: int | None = None

    def __init__(self, files: list[str], size: int, train_view: Callable, test_view: Callable):
        self.files = np.array([os.fsencode(file) for file in files])  # workers share it: a list would be copied
        self.size, self.train_view, self.test_view = size, train_view, test_view

    def __len__(self) -> int:
        return len(self.files)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self), 3, self.size, self.size

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        rows = torch.arange(len(self))[rows]
        images = torch.empty(len(rows), *self.shape[1:], dtype=torch.uint8)
        for some, batch in zip(torch.arange(len(rows)).split(100), self.read(rows.split(100)), strict=True):
            images[some] = batch
        return images

    def subset(self, rows: np.ndarray) -> "ImageFiles":
        return ImageFiles([os.fsdecode(file) for file in self.files[rows]], self.size, self.train_view, self.test_view)

    def read(self, batches: Sequence[Tensor], draws: Sequence[Tensor] | None = None) -> Iterator[Tensor]:
        """The images of each batch of rows (B,), read ahead by the workers.

        `draws`, a random number for each row, ask for the training view: it follows from the number alone, not from
        the worker or the order. Raises UserError naming an image that cannot be read.
        """
        draws = draws or [torch.full_like(rows, -1) for rows in batches]
        keys = [list(zip(rows.tolist(), draw.tolist(), strict=True)) for rows, draw in zip(batches, draws, strict=True)]
        workers = min(cores(), len(keys)) if self.workers is None else self.workers
        pin = torch.cuda.is_available()
        loader = DataLoader(
            _Views(self),
            batch_sampler=keys,
            num_workers=workers,
            collate_fn=_stack_or_fault,
            worker_init_fn=_leave_the_group,
            pin_memory=pin,
            generator=torch.Generator(),  # of its own: the run's generator goes on after a resume as if without it
        )
        with _hold_signals():
            batches_of_images = iter(loader)
        for images in batches_of_images:
            if isinstance(images, str):
                raise UserError(images)
            yield images


class _Views(Dataset):
    """What a worker does with a key (row, draw): one image, or a line that says what is wrong with its file."""

    def __init__(self, images: ImageFiles):
        self.images = images

    def __getitem__(self, key: tuple[int, int]) -> Tensor | str:
        row, draw = key
        path = os.fsdecode(self.images.files[row])
        try:
            image = _torchvision().datasets.folder.pil_loader(path)
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(max(draw, 0))
                image = (self.images.test_view if draw < 0 else self.images.train_view)(image)
        except Exception as error:  # Pillow raises nearly anything on a damaged file
            return f"{path}: not a readable image ({error})"
        if tuple(image.shape) != self.images.shape[1:]:
            return f"{path}: an image {tuple(image.shape)}, where {self.images.shape[1:]} is needed"
        return image


def cores() -> int:
    """The cores that this process may use, of its machine's: its share, where several ranks run there."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, allowed // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


@contextmanager
def _hold_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait, here and in processes that are begun meanwhile."""
    if not hasattr(signal, "pthread_sigmask"):  # not a POSIX system
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_the_group(worker: int) -> None:
    """A signal to the run's group of processes must not kill a worker while the run finishes its batch."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
        while held := signal.sigpending() & STOPS:  # the group's, from before this process left it
            signal.sigwait(held)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


def _stack_or_fault(images: list[Tensor | str]) -> Tensor | str:
    return next((fault for fault in images if isinstance(fault, str)), None) or torch.stack(images)


@dataclass
class Data:
    """A dataset: uint8 images (N, C, H, W) and int64 labels (N,). `val` is held out of the training images."""

    name: str  # what results are reported under: a known name, or the stem of the file
    known: str | None  # the known dataset whose defaults apply, if any
    x_train: Tensor | ImageFiles
    y_train: Tensor
    x_val: Tensor | ImageFiles
    y_val: Tensor
    x_test: Tensor | ImageFiles
    y_test: Tensor
    num_classes: int
    source: str  # where it was read from

    @property
    def in_channels(self) -> int:
        return self.x_test.shape[1]

    @property
    def image_size(self) -> int:
        return self.x_test.shape[2]

    def statistics(self) -> dict[str, list[float]]:
        """mean and std per channel of the training images, in [0, 1], for the model's first layer.

        Images in files are not all read for that: they get the figures in common use for ImageNet.
        """
        if isinstance(self.x_train, ImageFiles):
            return {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
        counts = [torch.bincount(self.x_train[:, c].flatten(), minlength=256).double() for c in range(self.in_channels)]
        values = torch.arange(256).double() / 255
        means = [float(n @ values / n.sum()) for n in counts]
        variances = [float(n @ (values - mean) ** 2 / n.sum()) for n, mean in zip(counts, means, strict=True)]
        return {"mean": means, "std": [max(math.sqrt(variance), 1 / 255) for variance in variances]}


def known_dataset(name: str) -> str | None:
    """The known dataset that a name or a file's stem begins with: cifar10 for cifar10_jpeg.npz."""
    stem = Path(name).name.removesuffix(".npz")
    return max((known for known in KNOWN if stem.startswith(known)), key=len, default=None)


def _torchvision() -> ModuleType:
    try:
        models.import_torchvision()
        import torchvision.transforms.v2

        return torchvision
    except ImportError:
        raise UserError("this dataset needs torchvision: pip install torchvision, or give a FILE.npz") from None


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """x_train, y_train, x_test, y_test of an .npz, checked. Raises UserError naming the file, the array, the fault."""
    keys = ("x_train", "y_train", "x_test", "y_test")
    try:
        with np.load(path, allow_pickle=False) as file:
            if missing := [key for key in keys if key not in getattr(file, "files", ())]:
                raise UserError(f"{path}: no array {', '.join(missing)}; it needs {', '.join(keys)}")
            arrays = {key: file[key] for key in keys}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UserError:
        raise
    except Exception as error:  # numpy and zipfile raise nearly anything on a damaged file
        raise UserError(f"{path}: not a readable .npz of plain arrays ({error})") from None
    for split in ("train", "test"):
        _check_split(path, split, arrays[f"x_{split}"], arrays[f"y_{split}"])
    if arrays["x_train"].shape[1:] != arrays["x_test"].shape[1:]:
        shapes = " and ".join(str(arrays[key].shape[1:]) for key in ("x_train", "x_test"))
        raise UserError(f"{path}: images of x_train and x_test differ in shape: {shapes}")
    return arrays


def _check_split(path: Path, split: str, x: np.ndarray, y: np.ndarray) -> None:
    if x.dtype != np.uint8:
        raise UserError(f"{path}: x_{split} has dtype {x.dtype}; it must be uint8, values 0 to 255")
    if not np.issubdtype(y.dtype, np.integer):
        raise UserError(f"{path}: y_{split} has dtype {y.dtype}; labels must be integers")
    if x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] not in (1, 3)) or x.shape[1] != x.shape[2]:
        raise UserError(f"{path}: x_{split} has shape {x.shape}; it must be square, (N, H, W) or (N, H, W, 1 or 3)")
    if y.shape != x.shape[:1] or not x.size:
        raise UserError(
            f"{path}: x_{split} {x.shape} and y_{split} {y.shape}: one label an image, at least one of each"
        )
    for label in (y.min(), y.max()):
        if not 0 <= label < MOST_CLASSES:
            raise UserError(f"{path}: y_{split} holds the label {label}; labels count from 0 to {MOST_CLASSES - 1}")


def digits_arrays() -> dict[str, np.ndarray]:
    """scikit-learn's 1,797 real handwritten digits, 8x8, 0..16 scaled to 0..255; a fifth of them is the test split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(digits.target))
    x = np.round(digits.images[order] * (255 / 16)).astype(np.uint8)
    y, n_test = digits.target[order], len(order) // 5
    return {"x_train": x[n_test:], "y_train": y[n_test:], "x_test": x[:n_test], "y_test": y[:n_test]}


def torchvision_arrays(name: str, data_dir: Path) -> dict[str, np.ndarray]:
    """A dataset of torchvision's, downloaded into data_dir where it is not there yet."""
    dataset = getattr(_torchvision().datasets, TORCHVISION[name])
    arrays = {}
    for split in ("train", "test"):
        try:
            part = dataset(data_dir, train=split == "train", download=True)
        except Exception as error:  # a network, a server and half-written files each fail in their own way
            address = dataset.mirrors[0] if hasattr(dataset, "mirrors") else dataset.url
            raise UserError(
                f"dataset {name} could not be read from {data_dir} or downloaded from {address} ({error}): connect to "
                f"the network, or put {name}.npz or torchvision's whole files there, or pass --dataset FILE.npz"
            ) from None
        arrays[f"x_{split}"], arrays[f"y_{split}"] = np.asarray(part.data), np.asarray(part.targets)
    return arrays


def image_folder(folder: Path) -> tuple[list[tuple[str, int]], list[str]]:
    """torchvision's listing of FOLDER/CLASS/...: pairs of a file and its class, and the classes' names, sorted."""
    try:
        found = _torchvision().datasets.ImageFolder(folder)
        return found.samples, found.classes
    except FileNotFoundError as error:
        raise UserError(f"{folder}: not a folder of one folder of images for each class ({error})") from None


def tiny_imagenet_files(root: Path) -> dict[str, ImageFiles | np.ndarray]:
    """Tiny-ImageNet as published: train/WNID/images/*.JPEG and, as test images, val/ with its val_annotations.txt."""
    train, classes = image_folder(root / "train")
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    test, annotations = [], root / "val" / "val_annotations.txt"
    for number, line in enumerate(annotations.read_text().splitlines(), 1):
        name, wnid, *_ = [*line.split("\t"), ""]
        if wnid not in label_of:
            raise UserError(f"{annotations}, line {number}: {line[:60]!r} names no class that train/ has")
        test.append((str(annotations.parent / "images" / name), label_of[wnid]))
    v2 = _torchvision().transforms.v2
    shift = [v2.RandomCrop(64, padding=4), v2.RandomHorizontalFlip()]
    return _files_and_labels(train, test, 64, shift, [])


def imagenet_files(root: Path) -> dict[str, ImageFiles | np.ndarray]:
    """ImageNet as torchvision unpacks it: train/WNID/*.JPEG and, as test images, val/WNID/*.JPEG; 224 pixels."""
    (train, classes), (test, test_classes) = image_folder(root / "train"), image_folder(root / "val")
    if classes != test_classes:
        odd = sorted(set(classes) ^ set(test_classes))
        raise UserError(f"{root}: train/ and val/ differ in their classes, {odd[0]} and {len(odd) - 1} others")
    v2 = _torchvision().transforms.v2
    crop = [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()]
    return _files_and_labels(train, test, 224, crop, [v2.Resize(256), v2.CenterCrop(224)])


def _files_and_labels(
    train: list[tuple[str, int]], test: list[tuple[str, int]], size: int, train_view: list, test_view: list
) -> dict[str, ImageFiles | np.ndarray]:
    v2 = _torchvision().transforms.v2
    views = [v2.Compose([*view, v2.PILToTensor()]) for view in (train_view, test_view)]
    arrays = {}
    for split, samples in (("train", train), ("test", test)):
        if not samples:
            raise UserError(f"no {split} images were found")
        files, labels = zip(*samples, strict=True)
        arrays[f"x_{split}"], arrays[f"y_{split}"] = ImageFiles(files, size, *views), np.array(labels)
    return arrays


def load_data(dataset: str, data_dir: str = "data", limit: int | None = None) -> Data:
    """Read a dataset: a FILE.npz, DATA_DIR/NAME.npz, the built-in digits, torchvision's NAME, or the folder of images
    DATA_DIR/imagenet or DATA_DIR/tiny-imagenet-200.

    2 % of the training images, at least 100, are held out by a fixed seed; `limit` keeps that many training images
    before the split. Raises UserError for an unknown name, an unreadable file, or labels beyond the name's classes.
    """
    named = Path(data_dir) / f"{dataset}.npz"
    if dataset.endswith(".npz") or named.exists():
        path = Path(dataset) if dataset.endswith(".npz") else named
        arrays, source = read_npz(path), str(path)
    elif dataset == "digits":
        arrays, source = digits_arrays(), "scikit-learn"
    elif dataset in TORCHVISION:
        with first_rank_first():
            arrays, source = torchvision_arrays(dataset, Path(data_dir)), f"torchvision, {data_dir}"
    elif dataset in STREAMED:
        read, folder = {
            "imagenet": (imagenet_files, "imagenet"),
            "tiny-imagenet": (tiny_imagenet_files, "tiny-imagenet-200"),
        }[dataset]
        source = str(Path(data_dir) / folder)
        arrays = read(Path(source))
    elif dataset in ("cifar10-c", "imagenet-c"):
        raise UserError(
            f"{dataset} has test images alone: eval_all.py ... --corruptions DIR reads them from their folder"
        )
    else:
        raise UserError(f"unknown dataset {dataset!r}: choose {', '.join(KNOWN)} or a FILE.npz (no {named} either)")
    return _split(arrays, dataset, source, limit)


def _split(arrays: dict[str, np.ndarray], dataset: str, source: str, limit: int | None) -> Data:
    known = known_dataset(dataset)
    num_classes = CLASSES.get(known, int(max(arrays["y_train"].max(), arrays["y_test"].max())) + 1)
    for key in ("y_train", "y_test"):
        if arrays[key].max() >= num_classes:
            raise UserError(
                f"{source}: {key} holds the label {arrays[key].max()}, but {known} has {num_classes} classes"
            )
    if num_classes < 2:
        raise UserError(f"{source}: one class only, nothing to classify")
    order = np.random.default_rng(SPLIT_SEED).permutation(len(arrays["y_train"]))[:limit]
    held_out = max(100, len(order) // 50)
    if len(order) <= held_out:
        raise UserError(f"{len(order)} training images are too few: {held_out} are held out to pick best.pt")
    splits = {}
    for split, rows in (("val", order[:held_out]), ("train", order[held_out:]), ("test", slice(None))):
        kind = "test" if split == "test" else "train"
        splits[f"x_{split}"] = _images(arrays[f"x_{kind}"], rows)
        splits[f"y_{split}"] = torch.from_numpy(arrays[f"y_{kind}"][rows].astype(np.int64))
    return Data(Path(dataset).name.removesuffix(".npz"), known, **splits, num_classes=num_classes, source=source)


def _images(x: np.ndarray | ImageFiles, rows: np.ndarray | slice) -> Tensor | ImageFiles:
    if isinstance(x, ImageFiles):
        return x.subset(rows)
    x = torch.from_numpy(np.ascontiguousarray(x[rows]))
    return x.unsqueeze(1) if x.ndim == 3 else x.permute(0, 3, 1, 2).contiguous()


def to_float(x: Tensor) -> Tensor:
    """uint8 images (B, C, H, W) -> float32 in [0, 1]."""
    return x.float() / 255


def crop_and_flip(padded: Tensor, rows: Tensor, size: int) -> Tensor:
    """A random crop of `size` pixels and a random horizontal flip of images `rows` (B,) of `padded`, in one gather."""
    device, slack = padded.device, padded.shape[2] - size
    top, left, flip = draw(Tensor.uniform_, torch.empty(len(rows), 3, device=device)).T[:, :, None]
    ys = (top * (slack + 1)).long() + torch.arange(size, device=device)
    xs = (left * (slack + 1)).long() + torch.arange(size, device=device)
    xs = torch.where(flip < 0.5, xs.flip(1), xs)
    channels = torch.arange(padded.shape[1], device=device)
    return padded[rows[:, None, None, None], channels[:, None, None], ys[:, None, :, None], xs[:, None, None, :]]


# ----------------------------------------------------------------------------------------------------------- flags

_SMALL = dict(arch="small_cnn", optimizer="adam", weight_decay=0.0, schedule="multistep", steps=10)
_LARGE = dict(epochs=100, batch_size=128, optimizer="sgd", schedule="multistep", steps=10, eps_warmup=0.0)

# What adversarial training uses on each dataset, and where that is written; a script overrides where its paper differs.
TRAINING_DEFAULTS = {
    "digits": _SMALL
    | dict(epochs=30, batch_size=64, lr=2e-3, eps="0.1", step_size="0.025", eps_warmup=3.0, source="ours"),
    "mnist": _SMALL
    | dict(epochs=6, batch_size=128, lr=1e-3, eps="0.3", step_size="0.075", eps_warmup=1.0, source="ours"),
    "cifar10": _LARGE
    | dict(arch="wrn-34-10", lr=0.1, weight_decay=2e-4, eps="8/255", step_size="2/255")
    | dict(source="HE, Sec. 4, and its code"),
    "cifar100": _LARGE
    | dict(arch="resnet18", lr=0.01, weight_decay=3.5e-3, eps="0.031", step_size="0.007", source="Angular-AT, Sec. 5"),
    "tiny-imagenet": _LARGE
    | dict(arch="resnet18", lr=0.01, weight_decay=3.5e-3, eps="0.031", step_size="0.007", source="Angular-AT, Sec. 5"),
    "imagenet": _LARGE
    | dict(arch="resnet50", epochs=90, batch_size=256, lr=0.1, weight_decay=1e-4, schedule="thirds")
    | dict(eps="4/255", step_size="1/255", source="HE, Sec. 4, and its code for ImageNet"),
    None: _LARGE | dict(arch="resnet18", lr=0.1, weight_decay=5e-4, eps="8/255", step_size="2/255", source="ours"),
}


def number(kind: type, low: float, high: float = 1e9) -> Callable[[str], float]:
    """An argparse type: an int, or a float or fraction such as 8/255, within [low, high]."""

    def parse(text: str) -> float:
        numerator, slash, denominator = text.partition("/")
        try:
            value = int(text) if kind is int else float(numerator) / (float(denominator) if slash else 1)
        except (ValueError, ZeroDivisionError):
            what = "a whole number" if kind is int else "a number or a fraction such as 8/255"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is out of range: between {low:g} and {high:g}")
        return value

    return parse


def device_flag(text: str) -> str:
    """An argparse type: cpu, or a CUDA device that this machine has; of several ranks there each has its own."""
    rank, own = os.environ.get("LOCAL_RANK"), int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1
    if rank and text == "cuda":
        text = f"cuda:{rank}"
    try:
        if torch.device(text).type not in ("cpu", "cuda"):
            raise RuntimeError("cpu, cuda or cuda:N")
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not to be had here ({str(error).splitlines()[0]})") from None
    if own and text not in ("cpu", f"cuda:{rank}"):
        raise argparse.ArgumentTypeError(f"{text!r} would be that of every rank: say cuda, and each takes its own")
    return text


def default_device() -> str:
    """CUDA where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def computes_bf16(device: str) -> bool:
    """Whether the device multiplies bfloat16 natively; elsewhere it would be slower than float32."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def hardware(device: str) -> str:
    """What a figure was measured on: the GPU's name, or the processor's and the number of threads."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        name = None
    threads = torch.get_num_threads()
    return f"{name[1] if name else platform.processor() or 'CPU'}, {threads} thread{'s' * (threads > 1)}"


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and which shows a script's whole docstring."""

    def __init__(self, doc: str):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message}\n")

    def peek(self, argv: list[str] | None, flag: str, default: str) -> str:
        """The value of a flag on which the defaults of others depend, before the real parse."""
        early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        early.add_argument(flag, nargs="?", dest="value", default=default)
        return early.parse_known_args(argv)[0].value or default


def training_parser(doc: str, argv: list[str] | None, overrides: dict[str, dict] | None = None) -> Parser:
    """The flags of every training script, with the defaults for the --dataset in argv.

    `overrides` maps a dataset to what the script sets otherwise than TRAINING_DEFAULTS, and `source` says where that is
    written; without a source it is ours. Its key None is for files of no known name and for images in folders.
    """
    parser, overrides = Parser(doc), overrides or {}
    known = parser.known = known_dataset(parser.peek(argv, "--dataset", "digits"))
    shared = TRAINING_DEFAULTS[known]
    overrides = overrides.get(None if known in STREAMED and known not in overrides else known, {})

    def add(flag: str, text: str, **options: object) -> None:
        """A flag whose default depends on the dataset: --help shows the value in force and where it is written."""
        key = flag[2:].replace("-", "_")
        block = overrides if key in overrides else shared
        default = block[key]
        source = block.get("source", "ours")
        parser.add_argument(flag, default=default, help=f"{text} (default: {default}; {source})", **options)

    flag, names = parser.add_argument, ", ".join(KNOWN)
    flag("--dataset", default="digits", metavar="NAME_OR_NPZ", help=f"{names}, or FILE.npz (default: digits)")
    flag("--data-dir", default="data", help="where datasets are looked for and downloaded to (default: data)")
    add("--arch", models.ARCHS)
    add("--epochs", "passes over the training images", type=number(int, 1))
    add("--batch-size", "images a step, over all ranks", type=number(int, 2))
    add("--optimizer", "sgd has momentum 0.9", choices=("sgd", "adam"))
    add("--lr", "peak learning rate", type=number(float, 0))
    shapes = "x0.1 at 75 and 90 %% (multistep), 50 and 75 (half), 53 and 84 (late), thirds; x0.9 every 15 (gentle)"
    add("--schedule", f"of the learning rate over the run: {shapes}", choices=tuple(SCHEDULES))
    add("--weight-decay", "L2 penalty on all parameters", type=number(float, 0))
    add("--eps", "Linf radius in pixel units", type=number(float, 0, 1))
    add("--step-size", "of the attack, in pixel units", type=number(float, 0, 1))
    add("--steps", "of the attack; of one-step methods on the held-out images alone", type=number(int, 1))
    add("--eps-warmup", "epochs over which eps and step size rise from 0", type=number(float, 0))
    flag(
        "--seed",
        type=number(int, 0, 2**63),
        default=0,
        help="of initialization, order, augmentation, attack (default: 0)",
    )
    flag("--out", help="where the run is written (default: runs/METHOD-DATASET-sSEED)")
    flag("--resume", action="store_true", help="go on from OUT/last.pt, if there is one")
    flag("--limit", type=number(int, 1), metavar="N", help="keep N training images, the held-out ones among them")
    flag("--workers", type=number(int, 0, 256), help="processes that read images from folders (default: one a core)")
    flag("--device", type=device_flag, default=default_device(), help="(default: %(default)s)")
    on_off = argparse.BooleanOptionalAction
    native = "on" if computes_bf16(default_device()) else "off"
    flag("--amp", action=on_off, help=f"bfloat16 backbone (default: where the device has it natively; here {native})")
    flag("--compile", action=on_off, help=f"torch.compile the model (default: on CUDA; here {default_device()})")
    text = "take each batch in N parts, for want of memory; their gradients are added up (default: 1)"
    flag("--accumulate", type=number(int, 1), default=1, metavar="N", help=text)
    flag("--sync-bn", action="store_true", help="batch norm over all ranks of torchrun, not over each rank's images")
    return parser


def add_head_flags(parser: Parser, argv: list[str] | None, margins: dict[str, float], source: str) -> None:
    """--head, --fn, --wn, --scale and --margin, their defaults by the head in argv; `margins` maps head to m."""
    head = parser.peek(argv, "--head", "he")
    scale = 1.0 if head == "linear" else 10.0 if parser.known == "imagenet" else 15.0  # HE, Sec. 4
    margin = margins.get(head, 0.0)
    on_off = argparse.BooleanOptionalAction
    flag = parser.add_argument_group("head").add_argument
    flag("--head", default="he", choices=("linear", "he", "mhe"), help="W z + b, cos(theta) or -theta (default: he)")
    flag("--fn", action=on_off, default=True, help="normalize the features z (default: on; linear has none)")
    flag("--wn", action=on_off, default=True, help="normalize the class weights W_k (default: on; linear has none)")
    source = "the plain method" if head == "linear" else source
    flag("--scale", type=number(float, 0), default=scale, help=f"s of the loss (default: {scale:g}; {source})")
    flag("--margin", type=number(float, 0), default=margin, help=f"m of the loss (default: {margin:g}; {source})")


def finish_args(args: argparse.Namespace, method: str) -> argparse.Namespace:
    """Fill the defaults that depend on other flags, name the run after its method, and meet the other ranks."""
    parts = args.accumulate * int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % parts:
        raise UserError(f"--batch-size {args.batch_size} is no multiple of {parts}, the ranks times --accumulate")
    if args.batch_size == parts:
        raise UserError(f"--batch-size {args.batch_size} leaves one image to a part, and batch norm needs two")
    args.method = method
    args.out = args.out or f"runs/{method}-{Path(args.dataset).name.removesuffix('.npz')}-s{args.seed}"
    args.amp = computes_bf16(args.device) if args.amp is None else args.amp
    args.compile = torch.device(args.device).type == "cuda" if args.compile is None else args.compile
    join_ranks(args.device)
    return args


# -------------------------------------------------------------------------------------------------- attack and loss


def margin_ce(logits: Tensor, y: Tensor, scale: float = 1.0, margin: float = 0.0, reduction: str = "mean") -> Tensor:
    """CE(s * (logits - m * onehot(y)), y), HE Eq. 6, for logits (B, K): cos(theta), -theta, or W z + b (s 1, m 0)."""
    onehot = F.one_hot(y, logits.shape[1]).to(logits.dtype)
    return F.cross_entropy(scale * (logits - margin * onehot), y, reduction=reduction)


@contextmanager
def attack_mode(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode and frozen parameters: an attack moves no batch statistic and computes no weight gradient."""
    was_training, trained = model.training, [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        model.train(was_training)
        for p in trained:
            p.requires_grad_(True)


def rounding(logits: Tensor) -> Tensor:
    """How far two logits of an image may be apart, (B,), and still count as equal: a small part of what the likeliest
    classes differ by. An offset that all share is no distance, nor is a class that a huge negative logit masks."""
    k = logits.shape[1]
    top = logits.topk(min(4, k // 2 + 1), 1).values
    first = top[:, :1]
    top = torch.where(top < first - 1e3 * (1 + first.abs()), first, top)  # masked
    return 1e-4 * (top[:, 0] - top[:, -1]) + 1e-6 * top.abs().amax(1)


@torch.no_grad()
def fooled(model: torch.nn.Module, x: Tensor, logits: Tensor, y: Tensor) -> Tensor:
    """Which images x are misclassified by more than rounding can be, (B,) bool, for their logits (B, K).

    What a bfloat16 pass takes for misclassified is confirmed in float32.
    """
    top, true = logits.amax(1), logits.gather(1, y[:, None]).squeeze(1)
    wrong = top - true > rounding(logits)
    if getattr(model, "amp", False) and wrong.any():
        model.amp, rows = False, wrong.nonzero().flatten()
        wrong[rows] = fooled(model, x[rows], model(x[rows]), y[rows])
        model.amp = True
    return wrong


def check_finite(grad: Tensor) -> None:
    """An image without a gradient cannot move, and would count as robust: raises UserError."""
    if not grad.isfinite().all():
        raise UserError("the gradient on the images is not finite, so a gradient attack proves nothing")


def lengths(delta: Tensor, norm: str) -> Tensor:
    """||delta|| of each image, (B, 1, 1, 1): norm linf or l2."""
    return torch.linalg.vector_norm(delta, math.inf if norm == "linf" else 2, dim=(1, 2, 3), keepdim=True)


def steepest(grad: Tensor, norm: str) -> Tensor:
    """The direction of length 1 in which a linear loss with this gradient rises most."""
    if norm == "linf":
        return grad.sign()
    grad = grad / lengths(grad, "linf").clamp(min=torch.finfo(grad.dtype).tiny)  # its squares may be below any float
    return grad / lengths(grad, norm).clamp(min=1e-12)


def project(x_adv: Tensor, x: Tensor, eps: float, norm: str) -> Tensor:
    """x_adv moved into the eps ball around x and into [0, 1]."""
    if norm == "linf":
        return x_adv.clamp(x - eps, x + eps).clamp(0, 1)
    delta = x_adv - x
    return (x + delta * (eps / lengths(delta, norm).clamp(min=1e-12)).clamp(max=1)).clamp(0, 1)


def random_start(x: Tensor, eps: float, norm: str) -> Tensor:
    """A uniform point of the eps ball around each image, moved into [0, 1]."""
    if norm == "linf":
        return draw(lambda delta: delta.uniform_(-eps, eps), x).add_(x).clamp(0, 1)
    radius = eps * draw(Tensor.uniform_, x[:, :1, :1, :1]) ** (1 / x[0].numel())
    return (x + radius * steepest(draw(Tensor.normal_, x), norm)).clamp(0, 1)


def pgd(
    model: torch.nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    loss: Callable[[Tensor, Tensor], Tensor],
    eps: float,
    step_size: float,
    steps: int,
    norm: str = "linf",
    start: Tensor | None = None,
    momentum: float = 0.0,
    drop_fooled: bool = False,
) -> Tensor:
    """Projected gradient ascent on loss(logits, y) in the Linf or L2 ball (Madry et al. 2018; HE, Eq. 18 to 20).

    x is (B, C, H, W) in [0, 1], eps and step_size are in pixel units; x_adv is returned, in the ball and in [0, 1].
    loss gives (B,) or its mean: the direction of the gradient is the same. `start` is by default uniform in the ball,
    and momentum > 0 is MIM's, on the L1-normalized gradient. Meanwhile the model is in eval mode and frozen.

    With drop_fooled an image is moved no further once it is misclassified, which saves its passes and makes the attack
    the best of its steps, not the last. Raises UserError if a gradient is not finite, unless the caller is training.
    """
    x_adv = random_start(x, eps, norm) if start is None else project(start.detach(), x, eps, norm)
    velocity = torch.zeros_like(x) if momentum else None
    active = torch.arange(len(x), device=x.device) if drop_fooled else slice(None)
    evaluated = not model.training  # in training the loss tells, and nothing may wait for the device
    with attack_mode(model):
        for _ in range(steps):
            x_now = x_adv[active].requires_grad_()
            logits = model(x_now)
            (grad,) = torch.autograd.grad(loss(logits, y[active]).sum(), x_now)
            x_now = x_now.detach()
            if evaluated:
                check_finite(grad)
            if drop_fooled:
                still = ~fooled(model, x_now, logits, y[active])
                active, x_now, grad = active[still], x_now[still], grad[still]
                if not len(active):
                    break
            if momentum:
                grad = grad / grad.abs().sum((1, 2, 3), keepdim=True).clamp(min=1e-12)
                grad = velocity[active] = momentum * velocity[active] + grad
            x_adv[active] = project(x_now + step_size * steepest(grad, norm), x[active], eps, norm)
    return x_adv


# ----------------------------------------------------------------------------------------------------- checkpoints

FORMAT = "angular-defenses-1"


def write_atomically(path: Path, write: Callable[[object], None], mode: str = "wb") -> None:
    """Write to a temporary name, flush to the disk, rename: a reader sees the old file or the new one, never a part.

    Raises UserError where the disk is full, say; what was there before is as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, mode, newline="" if mode == "w" else None) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        kept = "the file that was there before is as it was" if path.exists() else "nothing was there before"
        raise UserError(f"{path} could not be written ({error.strerror or error}); {kept}") from error


def lock(folder: Path) -> int:
    """Hold the folder, until the descriptor is closed or the process ends. Raises UserError where another one does."""
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        raise UserError(f"another process is writing into {folder}: wait for it, or choose another --out") from None
    return held


def save(content: dict, path: Path) -> None:
    """torch.save, atomically; it is made up in memory first, as torch.save tells no full disk from other faults."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def checkpoint_file(path: str | Path) -> Path:
    """The file that a path means: itself, or best.pt (else last.pt) of a run's directory. Raises UserError."""
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("best.pt", "last.pt") if (path / name).exists()]
        if not found:
            raise UserError(f"{path}: a directory without best.pt or last.pt")
        return found[0]
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint or run directory")
    return path


def read_file(path: Path) -> dict:
    """What torch.load finds in a file, as data only: no code in it runs. Raises UserError for anything but a dict."""
    try:
        if zipfile.is_zipfile(path) and (flipped := zipfile.ZipFile(path).testzip()):  # torch.load checks no checksum
            raise ValueError(f"checksum of {flipped}")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly anything on a damaged file
        told = str(error).rpartition("WeightsUnpickler error: ")[2]  # before it torch gives dangerous advice
        if re.search(r"unsupported global", str(error), re.IGNORECASE):
            raise UserError(f"{path}: holds Python objects, not tensors alone: save model.state_dict()") from None
        reason = told.strip().split("\n")[0][:120] or type(error).__name__
        raise UserError(f"{path}: truncated, damaged, or no checkpoint at all ({reason})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    return content


def load_checkpoint(path: str | Path, device: str = "cpu", **foreign: object) -> tuple[models.Classifier, dict]:
    """The model in a file or run directory, in eval mode, and all that the file says besides its tensors.

    A bare state dict with the names of the published TRADES / MART / HE WideResNets is read too (a `module.` prefix and
    their unused `sub_block1` are dropped); `foreign` then holds build_model's arguments. Raises UserError.
    """
    path = checkpoint_file(path)
    content = read_file(path)
    if content.get("format") == FORMAT:
        state, options = content.get("model"), content.get("model_options")
        meta = {key: content[key] for key in content if key not in ("model", "optimizer", "scheduler", "rng")}
        trained = meta.get("args")
        if not isinstance(trained, dict) or not all(isinstance(trained.get(k), str) for k in ("dataset", "data_dir")):
            raise UserError(f"{path}: a checkpoint that does not say what it was trained on")
    else:
        state = {key.removeprefix("module."): value for key, value in content.items() if isinstance(key, str)}
        state = {key: value for key, value in state.items() if not key.startswith("sub_block1.")}
        if not state or not all(isinstance(value, Tensor) for value in state.values()):
            raise UserError(f"{path}: neither a checkpoint of this project nor a plain state dict")
        if not foreign:
            raise UserError(f"{path}: a bare state dict; say what it is with --arch, --head and --dataset")
        options, meta = foreign, {"format": "state dict", "model_options": foreign}
    try:
        json.dumps([options, *(meta.get(key) for key in ("method", "epoch", "args"))])  # plain, as reports repeat them
        check_sizes(options, state, path.stat().st_size)
        with torch.device("meta"):  # takes no memory, whatever sizes the file claims
            models.build_model(**options).load_state_dict(state, assign=True)
        model = models.build_model(**options)
        model.load_state_dict(state)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        arch = options.get("arch") if isinstance(options, dict) else None
        raise UserError(f"{path}: its weights do not fit arch {arch}: {_first_mismatch(error)}") from None
    return model.to(device, memory_format=torch.channels_last).eval(), meta


def check_sizes(options: dict, state: dict[str, Tensor], file_size: int) -> None:
    """Raises ValueError where build_model would take time or memory for sizes that the file's tensors do not have."""
    if sum(tensor.numel() * tensor.element_size() for tensor in state.values()) > file_size:
        raise ValueError("its tensors claim more bytes than the file has")
    widest = max(max(tensor.shape, default=1) for tensor in state.values())
    limits = {"num_classes": widest, "feature_dim": widest, "in_channels": widest, "image_size": 4096}
    for key, limit in limits.items():
        size = options.get(key)
        if size is not None and not (isinstance(size, int) and 1 <= size <= limit):
            raise ValueError(f"{key} {size!r}: must be a whole number from 1 to {limit} with such weights")


def _first_mismatch(error: Exception) -> str:
    """The first telling line of load_state_dict's report, which names every parameter."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[1] if len(lines) > 1 else lines[0])[:200]


# --------------------------------------------------------------------------------------------------------- the Run

SCHEDULES = {  # lr / --lr as a function of the share of the run that is done, in [0, 1)
    "multistep": lambda done: 0.1 ** ((done >= 0.75) + (done >= 0.9)),
    "cyclic": lambda done: 1 - abs(2 * done - 1),
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "gentle": lambda done: 0.9 ** int(done / 0.15),  # x0.9 every 60 of 400 epochs
    "thirds": lambda done: 0.1 ** ((done >= 1 / 3) + (done >= 2 / 3)),
    "half": lambda done: 0.1 ** ((done >= 1 / 2) + (done >= 3 / 4)),
    "late": lambda done: 0.1 ** ((done >= 34 / 64) + (done >= 54 / 64)),  # at 34 k and 54 k of 64 k iterations
    "constant": lambda done: 1.0,
}
# between a run and its --resume
MAY_CHANGE = ("epochs", "iterations", "resume", "out", "data_dir", "workers", "device", "amp", "compile")


def build_model(args: argparse.Namespace, data: Data, **options: object) -> models.Classifier:
    """models.build_model for this dataset, freshly seeded: from here on every draw follows from --seed."""
    torch.manual_seed(args.seed)
    shape = dict(num_classes=data.num_classes, in_channels=data.in_channels, image_size=data.image_size)
    try:
        return models.build_model(args.arch, **(shape | data.statistics() | options))
    except ValueError as error:
        raise UserError(error) from None


def check_readable(model: models.Classifier) -> None:
    """Raises UserError where no checkpoint of the model could be read: it has more, or less, than build_model makes."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        made = {key: value.shape for key, value in models.build_model(**model.options).state_dict().items()}
    has = {key: value.shape for key, value in model.state_dict().items()}
    if odd := sorted(key for key in made.keys() | has.keys() if made.get(key) != has.get(key)):
        told = f"{odd[0]} of the model is not as build_model makes it, so no evaluation could read its checkpoints"
        raise UserError(f"{told}: have it made in models.py")


class Run:
    """What every training loop needs around it: device, batches, optimizer, schedule, log, checkpoints, resume.

    run.model is the model on the device; with `replays` each batch comes that many times in a row (FreeAT); `natural`
    says that the loss sees no adversarial images. args.out receives args.json, log.csv, curves.png, last.pt and
    best.pt: the epoch of the best held-out PGD accuracy or, in natural training, of the best clean accuracy. On a CPU a
    resumed run ends bit for bit where an uninterrupted one does.

    SIGTERM and Ctrl-C let the batch finish and write last.pt in mid-epoch, with `carry`: what a script hands on from
    batch to batch within an epoch. SIGKILL, and any signal to one of several ranks, costs the epoch.

    Under torchrun each rank sees its part of every batch, `step` averages the gradients over the ranks (once a step, of
    the dozen passes that an attack takes: to hide it behind the backward pass would gain nothing), and the first rank
    alone writes.
    """

    def __init__(
        self, args: argparse.Namespace, model: models.Classifier, data: Data, replays: int = 1, natural: bool = False
    ):
        self.args, self.data, self.out, self.replays = args, data, Path(args.out), replays
        self.rank, self.ranks = rank_and_count()
        self.trained_on = "clean" if natural else "robust"  # what the running accuracy is
        self.part = 0  # of the batch, with --accumulate
        self.augment = data.known in ("cifar10", "cifar100", *STREAMED) and isinstance(data.x_train, Tensor)
        self.carry, self.begun = {}, None  # begun: the epoch in which the run was stopped
        self.signal, self.handlers = None, {}  # the signal that came, and what it would meet without this run
        if replays > 1 and args.accumulate > 1:
            raise UserError("--accumulate: a replayed batch is trained on whole")
        if args.batch_size > len(data.y_train):
            left = f"{len(data.y_train)} training images of {data.name}"
            raise UserError(f"--batch-size {args.batch_size} is more than the {left} that are left")
        torch.set_float32_matmul_precision("high")  # TF32 on CUDA
        self.model = model.to(args.device, memory_format=torch.channels_last).train()
        self.model.amp = args.amp
        if args.sync_bn:
            models.synchronize_batch_norm(self.model)
        if args.compile:
            torch.compiler.reset()  # all models of a process share one count of variants, past which they run in eager
            torch._dynamo.config.recompile_limit = 32  # training, attack and held-out batches of several sizes
            self.model.compile()
        check_readable(model)
        self.optimizer = make_optimizer(model, args)
        self.steps_an_epoch = replays * (len(data.y_train) // args.batch_size)
        self.epoch, self.history, self.lr, self.plotted = 0, [], args.lr, time.monotonic()
        self._open()
        total, schedule = self.steps_an_epoch * args.epochs, SCHEDULES[args.schedule]
        done = self.epoch * self.steps_an_epoch + (self.begun["steps"] // args.accumulate if self.begun else 0)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: schedule(step / total), last_epoch=done - 1
        )
        self._to_device()

    def _listen(self) -> None:
        """From here on a signal lets the batch finish; a second one ends the process at once."""
        if self.ranks == 1 and threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.signal(number, self._note) for number in STOPS}

    def _note(self, number: int, frame: object) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def _listen_no_more(self) -> None:
        while self.handlers:
            signal.signal(*self.handlers.popitem())

    def _open(self) -> None:
        """Make the run's directory, or take up the run that is in it, and say what is about to happen."""
        args, data, last = self.args, self.data, self.out / "last.pt"
        if last.exists() and not args.resume:
            raise UserError(f"{self.out} already holds a run: go on with --resume, or choose another --out")
        self.out.mkdir(parents=True, exist_ok=True)
        if fcntl and not self.rank:
            weakref.finalize(self, os.close, lock(self.out))
        if last.exists():
            self._resume(last)
        settings = json.dumps(vars(args), indent=2)
        self._write("args.json", lambda file: file.write(settings))
        millions = sum(p.numel() for p in self.model.parameters()) / 1e6
        print(
            f"{args.method} on {data.name} ({data.source}); {args.arch}, {millions:.2f} M parameters, on {args.device}"
        )
        print(
            f"{len(data.y_train)} training and {len(data.y_val)} held-out images{self._gaps()}; "
            f"{'cropped and flipped; ' * (self.augment or isinstance(data.x_train, ImageFiles))}"
            f"Linf eps {args.eps:.4g}; bfloat16 {'on' if args.amp else 'off'}; "
            f"{f'{self.ranks} ranks; ' * (self.ranks > 1)}writing to {self.out}"
        )
        if self.trained_on == "robust" and args.eps_warmup > args.epochs:
            reached = args.eps * args.epochs / args.eps_warmup
            print(f"eps rises over {args.eps_warmup:g} epochs, so in these it gets to {reached:.3g} alone")
        if self.trained_on == "robust" and args.step_size > 2 * args.eps:
            print(f"step size {args.step_size:.3g} is over twice eps: PGD goes from corner to corner of the ball")

    def _gaps(self) -> str:
        """What the header says of labels that no training image has, but for which there is a class."""
        empty = self.data.num_classes - len(self.data.y_train.unique())
        return f" of {self.data.num_classes} classes, {empty} without a training image" if empty else ""

    def _write(self, name: str, write: Callable[[object], None]) -> None:
        """A text file, by the first rank."""
        if not self.rank:
            write_atomically(self.out / name, write, "w")

    def _resume(self, last: Path) -> None:
        content = read_file(last)
        if content.get("format") != FORMAT:
            raise UserError(f"{last}: not a checkpoint of this project; nothing was resumed")
        try:
            for key, old in content["args"].items():
                new = getattr(self.args, key, None)
                fewer = key == "epochs" and new < old
                if fewer or (key not in MAY_CHANGE and new != old):
                    flag = "--" + key.replace("_", "-")
                    raise UserError(f"--resume: {flag} was {old}, now {new}; keep it, or choose another --out")
            if (content["dataset"], content["model_options"]) != (self._dataset(), self.model.options):
                raise UserError(f"--resume: {self.data.source} holds other data than when {self.out} was begun")
            if content["args"]["amp"] != self.args.amp:
                print(f"bfloat16 was {'on' if content['args']['amp'] else 'off'}: the bits will differ from then on")
            self.model.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
            self.epoch, self.history, self.begun = content["epoch"], content["history"], content.get("begun")
            torch.set_rng_state(content["rng"]["cpu"])
            if self.device_type == "cuda" and "cuda" in content["rng"]:
                torch.cuda.set_rng_state(content["rng"]["cuda"], self.args.device)
            if self.history:
                self._write_log()
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(f"{last}: incomplete, nothing was resumed ({_first_mismatch(error)})") from None
        within = f" and {self.begun['batches']} batches" if self.begun else ""
        print(f"resumed after epoch {self.epoch}{within} of {self.args.epochs}")

    def _dataset(self) -> dict:
        """What a checkpoint says of its data; mean and std of the images are among the model's options."""
        data = self.data
        shape, counts = tuple(data.x_test.shape[1:]), (len(data.y_train), len(data.y_val))
        return {"name": data.name, "known": data.known, "classes": data.num_classes, "shape": shape, "images": counts}

    @property
    def device_type(self) -> str:
        return torch.device(self.args.device).type

    def _to_device(self) -> None:
        """Small images live on the device as uint8; if cropped and flipped, batch by batch, they are padded once."""
        data, device = self.data, self.args.device
        self.y_train, self.y_val = data.y_train.to(device), data.y_val.to(device)
        self.x_train, self.x_val = data.x_train, data.x_val
        for images in (data.x_train, data.x_val):
            if isinstance(images, ImageFiles):
                images.workers = self.args.workers
        if isinstance(data.x_train, Tensor):
            self.x_train = (F.pad(data.x_train, [4] * 4) if self.augment else data.x_train).to(device)
            self.x_val = data.x_val.to(device)

    def _order(self, size: int, begun: dict | None) -> tuple[Sequence[Tensor], Sequence[Tensor] | None, Tensor]:
        """The epoch's batches of rows, a random number for each row of images in files, and the generator's state
        before them: in an epoch that was stopped they are drawn from it once more, and the generator goes on after."""
        now = torch.get_rng_state()
        before = begun["before"] if begun else now
        torch.set_rng_state(before)
        images = self.steps_an_epoch // self.replays * self.args.batch_size
        order, draws = torch.randperm(len(self.y_train))[:images], None
        if isinstance(self.x_train, ImageFiles):
            draws = [torch.randint(2**62, rows.shape) for rows in order.split(size)]
        else:
            order = order.to(self.args.device)  # at once: a copy for each batch would wait for the batch before
        if begun:
            torch.set_rng_state(now)
        return order.split(size), draws, before

    def _training_images(self, order: Sequence[Tensor], draws: Sequence[Tensor] | None) -> Iterator[Tensor]:
        """This rank's uint8 images of each batch of rows, augmented: gathered on the device, or read from files."""
        if draws is not None:
            mine = [my_rows(rows) for rows in order], [my_rows(draw) for draw in draws]
            yield from self.x_train.read(*mine)
            return
        for rows in order:
            rows = my_rows(rows)
            yield crop_and_flip(self.x_train, rows, self.data.image_size) if self.augment else self.x_train[rows]

    def epochs(self) -> Iterator[int]:
        """The epochs still to do, counted from 1."""
        self._listen()
        try:
            while self.epoch < self.args.epochs:
                self.epoch += 1
                yield self.epoch
        finally:
            self._listen_no_more()
        if not self.history:
            return
        best = max(self.history, key=self._merit)
        clean, robust = (f"{best[key]:.2f} %" for key in ("val_clean", "val_robust"))
        held_out = f"of {len(self.y_val)} held-out images clean {clean}, PGD-{self.args.steps} {robust}"
        print(f"best epoch {best['epoch']}: {held_out}; evaluate it with")
        print(f"python eval_all.py {self.out}")

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """An epoch of shuffled x (B, C, H, W) in [0, 1] and y (B,) on the device; a last, smaller batch is dropped.

        B is --batch-size, or what this rank and this part of --accumulate have of it. Raises Interrupted.
        """
        size, begun, self.begun = self.args.batch_size // self.args.accumulate, self.begun, None
        order, draws, before = self._order(size, begun)
        done = self._start_figures(begun)
        label, hidden = f"epoch {self.epoch}/{self.args.epochs}", True if self.rank else None
        total = len(order) * size * self.replays
        with tqdm(total=total, desc=label, unit="img", leave=False, disable=hidden, mininterval=0.3) as self.bar:
            self.bar.update(done * size * self.replays)
            self._stop_if_told(done, before)
            images = self._training_images(order[done:], draws and draws[done:])
            for rows, x in zip(order[done:], images, strict=True):
                x = to_float(x.to(self.args.device, non_blocking=True))
                y = self.y_train[my_rows(rows).to(self.args.device, non_blocking=True)]
                for _ in range(self.replays):
                    yield x, y
                    self._show(size)
                done += 1
                self._stop_if_told(done, before)

    def _start_figures(self, begun: dict | None) -> int:
        """The epoch's running figures, from 0 or from where it was stopped; returns the batches that are done.

        totals: loss, right predictions, images, and the steps before the first whose loss or gradient is not finite.
        """
        device = self.args.device
        begun = begun or {"batches": 0, "steps": 0, "seconds": 0.0, "lr": self.lr, "carry": {}}
        self.totals = begun.get("totals", torch.zeros(4)).to(device)
        self.totals[:3] *= not self.rank  # what one rank has begun it alone takes over; they are summed in the end
        self.predicted = begun.get("predicted", torch.tensor([math.inf, -math.inf])).to(device)  # lowest, highest class
        self.carry = {key: value.to(device) for key, value in begun["carry"].items()}
        self.steps, self.lr, self.looked = begun["steps"], begun["lr"], time.monotonic()
        self.started = time.perf_counter() - begun["seconds"]
        return begun["batches"]

    def _stop_if_told(self, done: int, before: Tensor) -> None:
        """After a signal, between two batches: write last.pt so that --resume goes on with the next one."""
        if not self.signal or self.part:
            return
        self._figures(weights=True)
        begun = {"batches": done, "before": before, "totals": self.totals, "predicted": self.predicted}
        begun |= {"carry": self.carry, "steps": self.steps, "lr": self.lr}
        begun["seconds"] = time.perf_counter() - self.started
        save(self._content() | {"epoch": self.epoch - 1, "begun": begun}, self.out / "last.pt")
        name, command = signal.Signals(self.signal).name, shlex.join(["python", *sys.argv])
        resume = "" if "--resume" in sys.argv else " --resume"
        told = f"stopped by {name} in epoch {self.epoch} after {done} batches; go on with: {command}{resume}"
        self._listen_no_more()
        raise Interrupted(self.signal, told)

    def _show(self, images: int) -> None:
        """Advance the progress bar; its figures are fetched from the device a few times a second, no more."""
        self.bar.update(images)
        if time.monotonic() - self.looked > 0.3:
            self.looked = time.monotonic()
            loss, right, count = self._figures()
            figures = f"loss {loss / count:.3f}, {self.trained_on} {100 * right / count:.1f} %"
            self.bar.set_postfix_str(figures, refresh=False)

    def _figures(self, weights: bool = False) -> list[float]:
        """Loss, right and count so far, summed. Raises UserError where a loss, a gradient or a weight is no number."""
        *figures, finite = self.totals.tolist()
        if weights and not torch.nn.utils.get_total_norm(self.model.parameters()).isfinite():
            finite = min(finite, self.steps - 1)  # the last step, whose own loss was finite
        if finite < self.steps:
            last = self.out / "last.pt"
            kept = f"{last} holds what was saved before" if last.exists() else "nothing was saved yet"
            batch = 1 + int(finite) // (self.replays * self.args.accumulate)
            where = f"epoch {self.epoch}, batch {batch}"
            raise UserError(f"the loss or its gradient is not finite in {where}: {kept}; try a smaller --lr")
        return figures

    def warm(self, radius: float) -> float:
        """eps or step size in this step: it rises linearly to `radius` over the first --eps-warmup epochs."""
        steps = self.args.eps_warmup * self.steps_an_epoch
        return radius * min(1.0, (self.iteration + 1) / steps) if steps else radius

    @property
    def iteration(self) -> int:
        """Optimizer steps taken so far, over all epochs."""
        return self.scheduler.last_epoch

    def step(self, loss: Tensor, logits: Tensor, y: Tensor) -> None:
        """Backward, optimizer, schedule; `logits` on the images trained on give the running accuracy."""
        if not self.part:
            self.optimizer.zero_grad(set_to_none=True)
        (loss / self.args.accumulate).backward()
        self.part = (self.part + 1) % self.args.accumulate
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        if not self.part:
            average(grads)
        self._count(loss.detach(), logits.detach().argmax(1), y, grads)
        if self.part:
            return
        self.optimizer.step()
        (self.lr,) = self.scheduler.get_last_lr()
        self.scheduler.step()

    def _count(self, loss: Tensor, prediction: Tensor, y: Tensor, grads: list[Tensor]) -> None:
        """Add a step to the running figures, which stay on the device: nothing waits for them."""
        finite = (loss + torch.nn.utils.get_total_norm(grads)).isfinite() & (self.totals[3] == self.steps)
        right, count = (prediction == y).sum(), torch.full_like(loss, len(y))
        self.totals += torch.stack([loss * len(y), right.to(loss.dtype), count, finite.to(loss.dtype)])
        low, high = self.predicted
        self.predicted = torch.stack([torch.minimum(low, prediction.min()), torch.maximum(high, prediction.max())])
        self.steps += 1

    def _warn_of_a_dead_loss(self) -> None:
        low, high = self.predicted.tolist()
        if low == high:
            told = f"warning: every prediction of epoch {self.epoch} was class {low:.0f}: nothing is being learned"
            print(f"{told}; try a smaller --lr, or a longer --eps-warmup", file=sys.stderr)

    def finish_epoch(self) -> None:
        """Held-out accuracy, a line, log.csv, best.pt and last.pt. Raises UserError where a loss was no number."""
        self._figures(weights=True)
        self._warn_of_a_dead_loss()
        average([buffer for buffer in self.model.buffers() if buffer.is_floating_point()])  # of batch norm
        loss, right, count, _ = _sum_over_ranks(self.totals).tolist()
        seconds = time.perf_counter() - self.started
        clean, robust = self._held_out()
        row = {
            "epoch": self.epoch,
            "lr": self.lr,  # of the epoch's last step
            "loss": loss / count,
            "train_accuracy": 100 * right / count,  # on the images that the loss saw, while it was learning
            "val_clean": clean,
            "val_robust": robust,
            "images_per_s": count / seconds,
            "seconds": seconds,
        }
        is_best = all(self._merit(row) > self._merit(old) for old in self.history)
        self.history.append(row)
        self._save(is_best)
        print(
            f"epoch {self.epoch:3d}/{self.args.epochs}  loss {row['loss']:.4f}"
            f"  train {self.trained_on} {row['train_accuracy']:.2f}"
            f"  held-out clean {clean:.2f}  PGD-{self.args.steps} {robust:.2f}{'*' if is_best else ' '}"
            f"  lr {row['lr']:.2g}  {row['images_per_s']:.0f} img/s",
            flush=True,
        )

    def _merit(self, row: dict) -> tuple[float, float]:
        """What best.pt is the best in. PGD on a naturally trained network measures luck, or how well it masks."""
        merit = row["val_robust"], row["val_clean"]
        return merit[::-1] if self.trained_on == "clean" else merit

    def _held_out(self) -> tuple[float, float]:
        """Clean and PGD accuracy in %, in float32 (on CUDA in TF32), on the held-out images, with the training attack's
        eps and steps."""

        def loss(logits: Tensor, y: Tensor) -> Tensor:
            return margin_ce(logits, y, self.model.scale)

        args, right = self.args, torch.zeros(2, device=self.args.device)
        step_size = min(args.step_size, 2.5 * args.eps / args.steps)  # one-step methods train with a longer one
        batches = torch.arange(len(self.y_val)).split(args.batch_size)
        mine = [rows for whole in batches if len(rows := whole[self.rank :: self.ranks])]
        images = self.x_val.read(mine) if isinstance(self.x_val, ImageFiles) else (self.x_val[rows] for rows in mine)
        for rows in batches:
            noise = torch.empty(len(rows), *self.x_val.shape[1:], device=args.device).uniform_(-args.eps, args.eps)
            rows, noise = (whole[self.rank :: self.ranks] for whole in (rows, noise))
            if not len(rows):
                continue
            x, y = to_float(next(images).to(args.device)), self.y_val[rows]
            self.model.amp = False  # in bfloat16 a saturated activation loses its gradient, and the attack its strength
            budget = {"eps": args.eps, "step_size": step_size, "steps": args.steps, "start": x + noise}
            x_adv = pgd(self.model, x, y, loss=loss, **budget)
            with attack_mode(self.model), torch.no_grad():
                clean = self.model(x).argmax(1) == y
                right += torch.stack([clean, clean & (self.model(x_adv).argmax(1) == y)]).sum(1)
            self.model.amp = args.amp
        clean, robust = _sum_over_ranks(right).tolist()
        return 100 * clean / len(self.y_val), 100 * robust / len(self.y_val)

    def _content(self) -> dict:
        """What a checkpoint holds."""
        content = {
            "format": FORMAT,
            "model": self.model.state_dict(),
            "model_options": self.model.options,
            "dataset": self._dataset(),
            "method": self.args.method,
            "args": vars(self.args),
            "epoch": self.epoch,
            "metrics": self.history[-1] if self.history else {},
            "history": self.history,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": {"cpu": torch.get_rng_state()},
            "versions": {"torch": str(torch.__version__), "numpy": np.__version__},
            "hardware": hardware(self.args.device),
        }
        if self.device_type == "cuda":
            content["rng"]["cuda"] = torch.cuda.get_rng_state(self.args.device)
        return content

    def _save(self, is_best: bool) -> None:
        """best.pt before last.pt, then the log: a run killed in between does this epoch anew and writes the same."""
        if not self.rank:
            content = self._content()
            for name in ("best.pt", "last.pt") if is_best else ("last.pt",):
                save(content, self.out / name)
        self._write_log()

    def annotate(self, key: str, measure: Callable[[models.Classifier], object]) -> None:
        """After training: write measure(model), plain data, into last.pt and best.pt, each with its own weights."""
        for path in () if self.rank else (self.out / "best.pt", self.out / "last.pt"):
            content = read_file(path)
            self.model.load_state_dict(content["model"])
            self.model.amp = False
            with attack_mode(self.model), torch.no_grad():
                content[key] = measure(self.model)
            self.model.amp = self.args.amp
            save(content, path)

    def _write_log(self) -> None:
        """log.csv whole, from the checkpoint's history; curves.png at most twice a minute, and at the end."""

        def write(file: object) -> None:
            writer = csv.DictWriter(file, self.history[0])
            writer.writeheader()
            writer.writerows({key: f"{value:.6g}" for key, value in row.items()} for row in self.history)

        self._write("log.csv", write)
        if not self.rank and (self.epoch == self.args.epochs or time.monotonic() - self.plotted > 30):
            self.plotted = time.monotonic()
            plot_curves(self.history, f"training, {self.trained_on}", self.args.steps, self.out / "curves.png")


def make_optimizer(model: torch.nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    if args.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), args.lr, weight_decay=args.weight_decay)
    return torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)


def plot_curves(history: list[dict], training: str, steps: int, path: Path) -> None:
    """Loss and accuracies against the epoch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    epochs = [row["epoch"] for row in history]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.plot(epochs, [row["loss"] for row in history], color="black", marker=".")
    left.set(xlabel="epoch", ylabel="training loss")
    for key, label in (
        ("val_clean", "held-out, clean"),
        ("val_robust", f"held-out, PGD-{steps}"),
        ("train_accuracy", training),
    ):
        right.plot(epochs, [row[key] for row in history], label=label, marker=".")
    right.set(xlabel="epoch", ylabel="accuracy (%)", ylim=(0, 101))
    right.legend(loc="lower right")
    write_atomically(path, lambda file: figure.savefig(file, dpi=150, format="png"))
    plt.close(figure)
