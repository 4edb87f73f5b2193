"""What the training scripts and eval_all.py share: data, flags, PGD, the margin loss, checkpoints and the Run.
Images are float in [0, 1], (B, C, H, W), everywhere outside the model, so eps is always in pixel units (8/255, 0.031).
"""

import os

# Idle OpenMP threads must not spin for long, and ranks share the compiler's. Counts only before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", f"{-(-os.cpu_count() // int(os.getenv('LOCAL_WORLD_SIZE', 1)))}")

import argparse
import ctypes
import io
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from operator import itemgetter
from pathlib import Path

import models

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # imported later, by an optimizer, it would keep a destroyed group alive
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

torchvision = models.import_torchvision()

with suppress(AttributeError, TypeError, OSError):  # glibc: keep freed tensors' memory, as new pages are slow
    for option, value in ((-1, -1), (-4, 0)):  # M_TRIM_THRESHOLD, M_MMAP_MAX
        ctypes.CDLL(None).mallopt(option, value)


class UserError(argparse.ArgumentTypeError):
    """A mistake that the user can fix: one line on stderr, exit code 2."""


def cli(main: Callable[[], None]) -> None:
    """Run a script's main(). What the user can fix becomes one line and exit code 2; Ctrl-C gives exit code 130."""
    try:
        main()
        barrier()  # rank 0 may still be writing
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        message = str(error).rpartition("UserError: ")[2]  # one from a DataLoader worker begins with its traceback
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command continues (a training script's with --resume)", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()  # its threads could abort the process at exit


# ----------------------------------------------------------------------------------------------- ranks and seeds


def rank_and_count() -> tuple[int, int]:
    """This process's rank and the number of ranks: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def init_distributed(device: str) -> str:
    """Join the other ranks of torchrun, if there are any; returns this rank's device. Only rank 0 prints."""
    cuda, ranks = device.startswith("cuda"), int(os.environ.get("WORLD_SIZE", 1))
    device = f"cuda:{os.environ['LOCAL_RANK']}" if cuda and ranks > 1 else device
    if cuda:
        torch.cuda.set_device(torch.device(device).index or 0)
    if ranks > 1:
        options = {"backend": "nccl", "device_id": torch.device(device)} if cuda else {"backend": "gloo"}
        dist.init_process_group(**options, timeout=timedelta(hours=12))  # ranks of an evaluation may end hours apart
        sys.stdout = open(os.devnull, "w") if dist.get_rank() else sys.stdout
    return device


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def all_mean(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over the ranks."""
    if dist.is_initialized():
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor) / dist.get_world_size())


def derive_seed(*numbers: int) -> int:
    """A seed for torch from up to four numbers, such as (seed, epoch, batch, rank); trailing zeros change nothing."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


# ------------------------------------------------------------------------------------------------------------ data

FOLDERS = {"tiny-imagenet": "tiny-imagenet-200", "imagenet": "imagenet"}  # too large for memory: images in files
KNOWN = ("digits", "mnist", "cifar10", "cifar100", *FOLDERS)
AUGMENTED = ("cifar10", "cifar100", *FOLDERS)
SPLIT_SEED = 0  # the held-out images, the digits test split and a --limit subset are the same for every --seed


class ImageFiles(Dataset):
    """RGB images in files: item (row, seed) is uint8 (3, size, size), cropped by the seed; -1 is the test view."""

    def __init__(self, files: Sequence[str], size: int, train_view: list, test_view: list):
        v2 = torchvision.transforms.v2
        self.files, self.shape = np.array(files), (len(files), 3, size, size)  # an array: workers share its memory
        self.workers: int | None = None  # one per core
        self.views = [v2.Compose([*view, v2.PILToTensor()]) for view in (train_view, test_view)]

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        row, seed = key
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(max(seed, 0))
                return self.views[seed < 0](torchvision.datasets.folder.pil_loader(self.files[row]))
        except Exception as error:  # Pillow raises nearly anything on a damaged file
            raise UserError(f"{self.files[row]}: not a readable image ({error})") from None

    def read(self, batches: Sequence[Tensor], seed: int = -1) -> Iterator[Tensor]:
        """The uint8 images of each batch of rows (B,), read ahead. Raises UserError naming an unreadable image."""
        keys = [[(row, seed if seed < 0 else seed + row) for row in batch.tolist()] for batch in batches]
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = min(cores, len(keys)) if self.workers is None else self.workers
        pin, own = torch.cuda.is_available(), torch.Generator()  # the loader must not draw from the global generator
        return iter(DataLoader(self, batch_sampler=keys, num_workers=workers, pin_memory=pin, generator=own))


@dataclass
class Data:
    """A dataset: images (N, C, H, W), uint8 or float32 in [0, 1], and int64 labels (N,). `val` is not trained on."""

    name: str  # what results are reported under: a known name, or the stem of the file
    known: str | None  # the known dataset whose defaults apply, if any
    x_train: Tensor | ImageFiles
    y_train: Tensor
    x_test: Tensor | ImageFiles
    y_test: Tensor
    train: Tensor  # rows of x_train that are trained on
    val: Tensor  # rows of x_train that are held out
    num_classes: int
    source: str  # where it was read from

    def __post_init__(self) -> None:
        self.in_channels, height, width = self.x_test.shape[1:]
        self.image_size = height if height == width else (height, width)

    def statistics(self) -> dict[str, list[float]]:
        """mean and std per channel of the training images, in [0, 1]; for images in files those usual for ImageNet."""
        if isinstance(self.x_train, ImageFiles):
            return {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
        x = self.x_train[self.train[:10_000]].numpy()  # by numpy: the same on any number of threads
        largest = 255 if x.dtype == np.uint8 else 1
        mean, std = (f(x, (0, 2, 3), dtype=np.float64) / largest for f in (np.mean, np.std))
        return {"mean": mean.tolist(), "std": std.clip(1 / 255).tolist()}


def known_dataset(name: str) -> str | None:
    """The known dataset that a name or a file's stem begins with: cifar10 for cifar10_jpeg.npz."""
    stem = Path(name).stem
    return next((known for known in KNOWN if stem.startswith(known) and not stem[len(known) :][:1].isalnum()), None)


def read_npz(path: Path) -> list[np.ndarray]:
    """x_train, y_train, x_test, y_test of an .npz; the first two are empty if it has test images alone."""
    keys = ["x_train", "y_train", "x_test", "y_test"]
    try:
        with np.load(path, allow_pickle=False) as file:
            keys = keys if {*keys[:2]} & {*file} else keys[2:]
            arrays = [file[key] for key in keys]
    except Exception as error:  # numpy and zipfile raise nearly anything on a damaged file
        raise UserError(f"{path}: not an .npz of x_train, y_train, x_test, y_test ({error})") from None
    for key, x, y in zip(keys[::2], arrays[::2], arrays[1::2], strict=True):
        if not x.size or x.ndim not in (3, 4) or (x.ndim == 4 and not {x.shape[1], x.shape[3]} & {1, 3}):
            raise UserError(f"{path}: {key} has shape {x.shape}; needed: (N, H, W[, C]) or (N, C, H, W), C 1 or 3")
        if x.dtype != np.uint8 and not (x.dtype.kind == "f" and x.min() >= 0 and x.max() <= 1):
            raise UserError(f"{path}: {key} is {x.dtype}; needed: uint8 from 0 to 255, or floats from 0 to 1")
        if y.shape != x.shape[:1] or not np.issubdtype(y.dtype, np.integer) or not 0 <= y.min() <= y.max() < 10**5:
            raise UserError(f"{path}: labels {y.dtype} {y.shape}; needed: one integer from 0 per image of {x.shape}")
    return arrays if len(arrays) == 4 else [arrays[0][:0], arrays[1][:0], *arrays]


def folder_arrays(name: str, root: Path) -> list[ImageFiles | np.ndarray]:
    """ROOT/train/CLASS/... and, as test images, ROOT/val/CLASS/..., or Tiny-ImageNet's val/ with its annotations."""
    v2, flip, val = torchvision.transforms.v2, torchvision.transforms.v2.RandomHorizontalFlip(), root / "val"
    train = torchvision.datasets.ImageFolder(root / "train")
    if name == "tiny-imagenet":
        size, views = 64, ([v2.RandomCrop(64, padding=4), flip], [v2.CenterCrop(64)])
        lines = [line.split("\t") for line in (val / "val_annotations.txt").read_text().splitlines()]
        test = [(str(val / "images" / file), train.class_to_idx[wnid]) for file, wnid, *_ in lines]
    else:
        size, views = 224, ([v2.RandomResizedCrop(224), flip], [v2.Resize(256), v2.CenterCrop(224)])
        test = torchvision.datasets.ImageFolder(val)
        if odd := set(train.classes).symmetric_difference(test.classes):
            raise UserError(f"{root}: train/ and val/ differ in their classes: only one of them has {min(odd)!r}")
        test = test.samples
    (x_train, y_train), (x_test, y_test) = zip(*train.samples, strict=True), zip(*test, strict=True)
    return [ImageFiles(x_train, size, *views), np.array(y_train), ImageFiles(x_test, size, *views), np.array(y_test)]


def read_arrays(dataset: str, root: Path) -> tuple[list[ImageFiles | np.ndarray], str]:
    """x_train, y_train, x_test and y_test, images as in read_npz, and where they were read from."""
    path = Path(dataset) if dataset.endswith(".npz") else root / f"{dataset}.npz"
    if dataset.endswith(".npz") or path.exists():
        return read_npz(path), str(path)
    if dataset in FOLDERS:
        return folder_arrays(dataset, root / FOLDERS[dataset]), str(root / FOLDERS[dataset])
    if dataset == "digits":  # 1,797 real handwritten digits, 8x8, 0..16 scaled to 0..255; a fifth is the test split
        from sklearn.datasets import load_digits  # takes a second

        digits = load_digits()
        order = np.random.default_rng(SPLIT_SEED).permutation(len(digits.target))
        x, y = np.round(digits.images[order] * (255 / 16)).astype(np.uint8), digits.target[order]
        return [x[len(x) // 5 :], y[len(x) // 5 :], x[: len(x) // 5], y[: len(x) // 5]], "scikit-learn"
    if dataset not in KNOWN:
        raise UserError(f"unknown dataset {dataset!r}: choose {', '.join(KNOWN)} or a FILE.npz (no {path} either)")
    if rank_and_count()[0]:
        barrier()  # rank 0 downloads
    try:
        read = getattr(torchvision.datasets, dataset.upper())
        splits = [read(root, train=train, download=True) for train in (True, False)]
    except Exception as error:  # a network, a server and half-written files each fail in their own way
        raise UserError(f"{dataset} is not in {root}, and its download failed ({error}): put {path} there") from None
    if not rank_and_count()[0]:
        barrier()
    return [np.asarray(array) for split in splits for array in (split.data, split.targets)], f"torchvision, {root}"


def channels_first(x: np.ndarray) -> Tensor:
    """Images as in read_npz -> (N, C, H, W), uint8 or float32."""
    x = torch.from_numpy(x if x.dtype == np.uint8 else x.astype(np.float32))
    x = x[..., None] if x.ndim == 3 else x
    return x.movedim(3, 1).contiguous() if x.shape[3] in (1, 3) else x


def load_data(dataset: str, data_dir: str = "data", limit: int | None = None) -> Data:
    """A FILE.npz, DATA_DIR/NAME.npz, the built-in digits, torchvision's NAME, or DATA_DIR/imagenet/... 2 % of the
    training images, at least 100, are held out by a fixed seed; `limit` keeps that many before. Raises UserError."""
    (x_train, y_train, x_test, y_test), source = read_arrays(dataset, Path(data_dir))
    if isinstance(x_test, np.ndarray):
        x_train, x_test = channels_first(x_train), channels_first(x_test)
        if x_train.shape[1:] != x_test.shape[1:]:
            raise UserError(f"{source}: training images {(*x_train.shape[1:],)}, test images {(*x_test.shape[1:],)}")
    order = torch.from_numpy(np.random.default_rng(SPLIT_SEED).permutation(len(y_train))[:limit])
    held_out, name = max(100, len(order) // 50), Path(dataset).name.removesuffix(".npz")
    y_train, y_test = (torch.from_numpy(y.astype(np.int64)) for y in (y_train, y_test))
    arrays, split = (x_train, y_train, x_test, y_test), (order[held_out:], order[:held_out])
    num_classes = int(torch.cat([y_train, y_test]).max()) + 1
    return Data(name, known_dataset(dataset), *arrays, *split, num_classes, source)


def to_float(x: Tensor) -> Tensor:
    """uint8 images (B, C, H, W) -> float32 in [0, 1]; floats in [0, 1] are returned as they are."""
    return x if x.is_floating_point() else x.float() / 255


def images_at(x: Tensor | ImageFiles, rows: Tensor, device: str) -> Tensor:
    """float images (B, C, H, W) in [0, 1]: rows (B,) of x, a uint8 or float tensor or images in files (test view)."""
    x = torch.cat(list(x.read(rows.split(16)))) if isinstance(x, ImageFiles) else x[rows]
    return to_float(x.to(device))


def crop_and_flip(padded: Tensor, rows: Tensor, padding: int) -> Tensor:
    """A random crop to the size before padding and a random horizontal flip of images `rows` (B,), in one gather."""
    device, places = padded.device, 2 * padding + 1
    top, left, flip = torch.rand(3, len(rows), 1, device=device)
    ys = (top * places).long() + torch.arange(padded.shape[2] - 2 * padding, device=device)
    xs = (left * places).long() + torch.arange(padded.shape[3] - 2 * padding, device=device)
    xs = torch.where(flip < 0.5, xs.flip(1), xs)
    channels = torch.arange(padded.shape[1], device=device)
    return padded[rows[:, None, None, None], channels[:, None, None], ys[:, None, :, None], xs[:, None, None, :]]


# ----------------------------------------------------------------------------------------------------------- flags

NVIDIA = Path("/dev/nvidia0")  # is there if the machine has a GPU and its driver
_SMALL = dict(arch="small_cnn", optimizer="adam", weight_decay=0.0, schedule="multistep", steps=10)
_LARGE = dict(epochs=100, batch_size=128, optimizer="sgd", schedule="multistep", steps=10, eps_warmup=0.0)
_ANGULAR = dict(lr=0.01, weight_decay=3.5e-3, eps="0.031", step_size="0.007", source="Angular-AT, Sec. 5")
_HE = dict(lr=0.1, source="HE, Sec. 4, and its code")
_IMAGENET = dict(arch="resnet50", epochs=90, batch_size=256, weight_decay=1e-4, schedule="thirds")

# Adversarial training on each dataset, and where that is written (else: ours); a script overrides what differs.
TRAINING_DEFAULTS = {
    "digits": _SMALL | dict(epochs=30, batch_size=64, lr=2e-3, eps="0.1", step_size="0.025", eps_warmup=0.0),
    "mnist": _SMALL | dict(epochs=6, batch_size=128, lr=1e-3, eps="0.3", step_size="0.075", eps_warmup=1.0),
    "cifar10": _LARGE | _HE | dict(arch="wrn-34-10", weight_decay=2e-4, eps="8/255", step_size="2/255"),
    **dict.fromkeys(("cifar100", "tiny-imagenet"), _LARGE | _ANGULAR | dict(arch="resnet18")),
    "imagenet": _LARGE | _HE | _IMAGENET | dict(eps="4/255", step_size="1/255"),
    None: _LARGE | dict(arch="resnet18", lr=0.1, weight_decay=5e-4, eps="8/255", step_size="2/255"),
}


def number(kind: type, low: float, high: float = 1e9) -> Callable[[str], float]:
    """An argparse type: an int, or a float or fraction such as 8/255, within [low, high]."""

    def parse(text: str) -> float:
        numerator, _, denominator = text.partition("/")
        try:
            value = int(text) if kind is int else float(numerator) / float(denominator or 1)
        except (ValueError, ZeroDivisionError):
            value = math.nan
        if not low <= value <= high:
            raise UserError(f"{text!r} is not a number ({kind.__name__}) from {low:g} to {high:g}")
        return value

    return parse


def device_flag(text: str) -> str:
    """An argparse type: cpu, cuda or cuda:N, if this machine has it; auto: cuda if torch sees a GPU, else cpu."""
    if text == "auto":
        if NVIDIA.exists() and not torch.cuda.is_available() and os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"warning: {NVIDIA} exists, but torch sees no GPU: try a wheel for an older CUDA", file=sys.stderr)
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=text).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"{text!r} is not available ({str(error).splitlines()[0]})") from None
    return text


def supports_bf16(device: str) -> bool:
    """Whether the device multiplies bfloat16 natively; elsewhere it would be slower than float32."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def hardware(device: str) -> str:
    """What a figure was measured on: the GPU's name, or the processor's and the number of threads."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    name = info.read_text().partition("model name\t: ")[2].partition("\n")[0] if info.exists() else ""
    return f"{name or 'CPU'}, {torch.get_num_threads()} thread(s)"


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
    """The flags of every training script, with the defaults for the --dataset in argv. `overrides` maps a dataset to
    what the script sets differently from TRAINING_DEFAULTS, and its `source`; None is any other dataset."""
    parser, overrides = Parser(doc), overrides or {}
    known = parser.known = known_dataset(parser.peek(argv, "--dataset", "digits"))
    shared = TRAINING_DEFAULTS[known]
    overrides = overrides.get(None if known in FOLDERS and known not in overrides else known, {})

    def add(flag: str, text: str, **options: object) -> None:
        key = flag[2:].replace("-", "_")
        block = overrides if key in overrides else shared
        default, source = block[key], block.get("source", "ours")
        parser.add_argument(flag, default=default, help=f"{text} (default: {default}; {source})", **options)

    flag, names, on_off = parser.add_argument, ", ".join(KNOWN), argparse.BooleanOptionalAction
    flag("--dataset", default="digits", metavar="NAME_OR_NPZ", help=f"{names}, or FILE.npz (default: digits)")
    flag("--data-dir", default="data", help="where datasets are looked for and downloaded to (default: data)")
    add("--arch", models.ARCHS)
    add("--epochs", "passes over the training images", type=number(int, 1))
    add("--batch-size", "images per step, over all ranks", type=number(int, 2))
    add("--optimizer", "sgd has momentum 0.9", choices=tuple(OPTIMIZERS))
    add("--lr", "peak learning rate", type=number(float, 0))
    add("--schedule", "of the learning rate over the run, see common.SCHEDULES", choices=tuple(SCHEDULES))
    add("--weight-decay", "of all parameters", type=number(float, 0))
    add("--eps", "Linf radius in pixel units", type=number(float, 0, 1))
    add("--step-size", "of the attack, in pixel units", type=number(float, 0, 1))
    add("--steps", "of the attack; one-step methods use it on the held-out images only", type=number(int, 1))
    add("--eps-warmup", "epochs over which eps and step size rise from 0", type=number(float, 0))
    flag("--augment", action=on_off, default=known in AUGMENTED, help="crop and flip (default here: %(default)s)")
    flag("--ema", type=number(float, 0, 0.99999), metavar="DECAY", help="test and save averaged weights, such as 0.999")
    flag("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of all random numbers (default: 0)")
    flag("--out", help="where the run is written (default: runs/METHOD-DATASET-sSEED)")
    flag("--resume", action="store_true", help="continue from OUT/last.pt, if there is one")
    flag("--limit", type=number(int, 1), metavar="N", help="use N training images, including the held-out ones")
    flag("--workers", type=number(int, 0, 256), help="processes that read images from folders (default: one per core)")
    flag("--device", type=device_flag, default="auto", help="cpu, cuda or cuda:N (default: cuda if there is a GPU)")
    flag("--amp", action=on_off, help="bfloat16 backbone (default: on devices that have it natively)")
    flag("--compile", action=on_off, help="torch.compile the model (default: on CUDA, except for small networks)")
    flag("--sync-bn", action="store_true", help="batch norm over all ranks of torchrun (CUDA only)")
    return parser


def add_head_flags(parser: Parser, argv: list[str] | None, margins: dict[str, float], source: str) -> None:
    """--head, --fn, --wn, --scale and --margin, their defaults by the head in argv; `margins` maps head to m."""
    head = parser.peek(argv, "--head", "he")
    scale = 1.0 if head == "linear" else 10.0 if parser.known == "imagenet" else 15.0  # HE, Sec. 4
    margin = margins.get(head, 0.0)
    on_off, flag = argparse.BooleanOptionalAction, parser.add_argument_group("head").add_argument
    flag("--head", default="he", choices=("linear", "he", "mhe"), help="W z + b, cos(theta) or -theta (default: he)")
    flag("--fn", action=on_off, default=True, help="normalize the features z (default: on; linear has none)")
    flag("--wn", action=on_off, default=True, help="normalize the class weights W_k (default: on; linear has none)")
    source = "the plain method" if head == "linear" else source
    flag("--scale", type=number(float, 0), default=scale, help=f"s of the loss (default: {scale:g}; {source})")
    flag("--margin", type=number(float, 0), default=margin, help=f"m of the loss (default: {margin:g}; {source})")


def finish_args(args: argparse.Namespace, method: str) -> argparse.Namespace:
    """Fill the defaults that depend on other flags, name the run after its method, and join the other ranks."""
    torch.set_flush_denormal(True)  # denormal gradients of a fitted network slow CPUs; before torch starts its threads
    args.method, args.device = method, init_distributed(args.device)
    args.out = args.out or f"runs/{method}-{Path(args.dataset).name.removesuffix('.npz')}-s{args.seed}"
    args.amp = supports_bf16(args.device) if args.amp is None else args.amp
    small = args.arch.startswith(("small_cnn", "dsphere", "alexnet"))  # too short for a compiler to gain much
    args.compile = args.device.startswith("cuda") and not small if args.compile is None else args.compile
    try:
        torch.compile(lambda x: (2 * x).relu(), disable=not args.compile)(torch.ones(9, device=args.device))
    except Exception as error:  # it needs a C compiler; each part of it has exceptions of its own
        args.compile = False
        print(f"warning: no torch.compile ({' '.join(str(error).split())[:200]})", file=sys.stderr)
    if args.batch_size % (ranks := rank_and_count()[1]) or args.batch_size == ranks:
        raise UserError(f"--batch-size {args.batch_size} must be a multiple of {ranks} ranks, at least 2 images each")
    return args


# -------------------------------------------------------------------------------------------------- attack and loss


def margin_ce(logits: Tensor, y: Tensor, scale: float = 1.0, margin: float = 0.0, reduction: str = "mean") -> Tensor:
    """CE(s * (logits - m * onehot(y)), y), HE Eq. 6, for logits (B, K): cos(theta), -theta, or W z + b (s 1, m 0)."""
    onehot = F.one_hot(y, logits.shape[1]).to(logits.dtype)
    return F.cross_entropy(scale * (logits - margin * onehot), y, reduction=reduction)


@contextmanager
def frozen_eval(model: torch.nn.Module, keep_mode: bool = False) -> Iterator[None]:
    """Frozen parameters and, unless keep_mode, eval mode: an attack changes no batch statistic and computes no gradient
    of the weights (a compiled backward pass would, also of autograd.grad)."""
    kept = [(module, "training", module.training) for module in model.modules() if hasattr(module, "training")]
    kept += [(p, "requires_grad", p.requires_grad) for p in model.parameters()]
    if not keep_mode:
        with suppress(NotImplementedError):  # of an exported program, which has no modes
            model.eval()
    try:
        for p in model.parameters():
            p.requires_grad_(False)
        yield
    finally:
        for each, name, value in kept:
            setattr(each, name, value)


def norms(delta: Tensor, norm: str) -> Tensor:
    """||delta|| of each image, (B, 1, 1, 1), for delta (B, C, H, W); norm is linf or l2."""
    return torch.linalg.vector_norm(delta, math.inf if norm == "linf" else 2, dim=(1, 2, 3), keepdim=True)


def steepest(grad: Tensor, norm: str) -> Tensor:
    """The direction of length 1 in which a linear loss with this gradient rises most; nonfinite entries count as 0."""
    grad = grad.nan_to_num(nan=0, posinf=0, neginf=0)
    if norm == "linf":
        return grad.sign()
    grad = grad / norms(grad, "linf").clamp(min=torch.finfo(grad.dtype).tiny)  # or its squares could underflow
    return grad / norms(grad, norm).clamp(min=1e-12)


def project(x_adv: Tensor, x: Tensor, eps: float, norm: str) -> Tensor:
    """x_adv moved into the eps ball around x and into [0, 1]."""
    if norm == "linf":
        return x_adv.clamp(x - eps, x + eps).clamp(0, 1)
    delta = x_adv - x
    return (x + delta * (eps / norms(delta, norm).clamp(min=1e-12)).clamp(max=1)).clamp(0, 1)


def random_start(x: Tensor, eps: float, norm: str) -> Tensor:
    """A uniform point of the eps ball around each image, moved into [0, 1]."""
    if norm == "linf":
        return x.new_empty(x.shape).uniform_(-eps, eps).add_(x).clamp(0, 1)
    radius = eps * x.new_empty(len(x), 1, 1, 1).uniform_() ** (1 / x[0].numel())
    return (x + radius * steepest(x.new_empty(x.shape).normal_(), norm)).clamp(0, 1)


def fooled(logits: Tensor, y: Tensor) -> Tensor:
    """Misclassified by more than float32 rounding, (B,) bool, so that the batch size does not matter. NaN: False."""
    top, true = logits.float().amax(1), logits.float().gather(1, y[:, None]).squeeze(1)
    return top - true > 1e-5 * (top.abs() + true.abs())


def pgd(
    model, x, y, *, loss, eps: float, step_size: float, steps, norm="linf", start=None, momentum=0.0, early_stop=False
) -> Tensor:
    """Projected gradient ascent on loss(logits, y) in the Linf or L2 ball (Madry et al. 2018; HE, Eq. 18 to 20).
    x and x_adv are (B, C, H, W) in [0, 1], y (B,); eps and step_size in pixel units. loss gives (B,) or its mean. By
    default `start` is uniform in the ball; momentum > 0 is MIM's. The model is in eval mode and frozen meanwhile. With
    early_stop an image is moved no further once it is misclassified: fewer passes, and the best of all steps."""
    x_adv = random_start(x, eps, norm) if start is None else project(start.detach(), x, eps, norm)
    velocity = torch.zeros_like(x) if momentum else None
    active = torch.arange(len(x), device=x.device) if early_stop else slice(None)
    with frozen_eval(model):
        for _ in range(steps):
            x_now = x_adv[active].requires_grad_()
            logits = model(x_now)
            (grad,) = torch.autograd.grad(loss(logits, y[active]).sum(), x_now)
            x_now = x_now.detach()
            if early_stop:
                keep = ~fooled(logits, y[active])
                active, x_now, grad = active[keep], x_now[keep], grad[keep]
                if not len(active):
                    break
            if momentum:
                grad = grad / grad.abs().sum((1, 2, 3), keepdim=True).clamp(min=1e-12)
                grad = velocity[active] = momentum * velocity[active] + grad
            x_adv[active] = project(x_now + step_size * steepest(grad, norm), x[active], eps, norm)
    return x_adv


# ----------------------------------------------------------------------------------------------------- checkpoints

FORMATS = ("angular-defenses-1", "angular-defenses-2")  # both are read; runs are written in the last one


def write_file(content: bytes, path: Path) -> None:
    """Write under a temporary name, then rename: a full disk or a crash leaves the older file as it was."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def save(content: dict, *paths: Path) -> None:
    """torch.save, through write_file, to each path; numbers of numpy and paths as weights_only reads them."""
    plain = tree_map(lambda v: v.item() if isinstance(v, np.generic) else str(v) if isinstance(v, Path) else v, content)
    torch.save(plain, buffer := io.BytesIO())
    for path in paths:
        write_file(buffer.getbuffer(), path)


def checkpoint_file(path: str | Path) -> Path:
    """The file that a path means: itself, or best.pt (else last.pt) of a run's directory. Raises UserError."""
    path = Path(path)
    for file in (path / "best.pt", path / "last.pt") if path.is_dir() else (path,):
        if file.exists():
            return file
    raise UserError(f"{path}: no such checkpoint, or a directory without best.pt and last.pt")


def read_file(path: Path) -> dict:
    """What torch.load finds in a file, as data only: no code in it runs. Raises UserError for anything but a dict."""
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception:  # torch raises nearly anything on a damaged file, often with the advice to trust it
        raise UserError(f"{path}: damaged, or not a dict of tensors and plain data as of model.state_dict()") from None


def load_checkpoint(path: str | Path, device: str = "cpu") -> tuple[models.Classifier, dict]:
    """The model in a run's file or directory, in eval mode, and what else the file says. Raises UserError."""
    path = checkpoint_file(path)
    content = read_file(path)
    if content.get("format") not in FORMATS:
        raise UserError(f"{path}: not a checkpoint of this project; a state dict needs --arch, --head and --dataset")
    try:
        options = content["model_options"]
        if unknown := options.keys() - models.DEFAULTS.keys():
            raise UserError(f"{path}: models.build_model has no option {min(unknown)!r}: written by other code?")
        model = models.build_model(**options)
        model.load_state_dict(content["model"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"{path}: not the weights of a model here ({str(error)[:200]})") from None
    tensors = ("model", "trained", "criterion", "optimizer", "begun", "scheduler", "rng")
    meta = {key: value for key, value in content.items() if key not in tensors} | {"model_options": model.options}
    return model.to(device, memory_format=torch.channels_last).eval(), meta


# --------------------------------------------------------------------------------------------------------- the Run

SCHEDULES = {  # lr / --lr as a function of the fraction of the run that is done, in [0, 1)
    "multistep": lambda done: 0.1 ** ((done >= 0.75) + (done >= 0.9)),
    "cyclic": lambda done: 1 - abs(2 * done - 1),
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "gentle": lambda done: 0.9 ** int(done / 0.15),  # x0.9 every 60 of 400 epochs
    "thirds": lambda done: 0.1 ** ((done >= 1 / 3) + (done >= 2 / 3)),
    "half": lambda done: 0.1 ** ((done >= 1 / 2) + (done >= 3 / 4)),
    "late": lambda done: 0.1 ** ((done >= 34 / 64) + (done >= 54 / 64)),  # at 34 k and 54 k of 64 k iterations
    "constant": lambda done: 1.0,
}
OPTIMIZERS = {"sgd": partial(torch.optim.SGD, momentum=0.9), "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
RESUME_MAY_CHANGE = {"epochs", "iterations", "resume", "out", "data_dir", "workers", "device", "amp", "compile"}


def build_model(args: argparse.Namespace, data: Data, **options: object) -> models.Classifier:
    """models.build_model for this dataset, initialized from --seed. Raises UserError."""
    if not len(data.train) or data.num_classes < 2:
        found = f"{len(data.train) + len(data.val)} training images, {data.num_classes} class(es)"
        raise UserError(f"{data.source}: {found}; needed: 2 classes and over 100 images, as so many are held out")
    torch.manual_seed(args.seed)
    shape = dict(num_classes=data.num_classes, in_channels=data.in_channels, image_size=data.image_size)
    try:
        return models.build_model(args.arch, **(shape | data.statistics() | options))
    except ValueError as error:
        raise UserError(error) from None


class Run:
    """What every training loop needs around it: device, batches, optimizer, schedule, log, checkpoints, resume.
    `criterion` is a loss with parameters, trained and saved beside the model. With `replays` each batch comes that many
    times in a row (FreeAT). `natural`: no adversarial images are trained on, and best.pt is the epoch of the best clean
    held-out accuracy, else of PGD's. A script may set run.optimizer before epochs(). With --ema a checkpoint's model is
    the average. The random numbers of a batch follow from (seed, epoch, batch, rank): a resumed run ends bit for bit as
    an uninterrupted one (on a CPU). SIGTERM and Ctrl-C save the place in the epoch, with run.carry, the tensors that a
    script hands from batch to batch; SIGKILL, or a signal to one of several ranks, costs the epoch."""

    def __init__(self, args, model: models.Classifier, data: Data, criterion=None, replays=1, natural=False):
        self.args, self.data, self.out, self.replays, self.natural = args, data, Path(args.out), replays, natural
        self.rank, self.ranks = rank_and_count()
        self.steps_per_epoch = replays * (len(data.train) // args.batch_size)
        if not self.steps_per_epoch:
            raise UserError(f"--batch-size {args.batch_size} is more than the {len(data.train)} training images")
        torch.set_float32_matmul_precision("high")  # TF32 on CUDA
        torch.backends.cudnn.benchmark = True  # the shapes never change
        if args.sync_bn and args.device.startswith("cuda"):
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        elif args.sync_bn and not self.rank:
            print("warning: --sync-bn needs CUDA: each rank normalizes over its own images", file=sys.stderr)
        self.model = model.to(args.device, memory_format=torch.channels_last).train()
        self.criterion = (torch.nn.Module() if criterion is None else criterion).to(args.device).train()
        self.model.amp, self.evaluated, self.average = args.amp, self.model, None
        if args.ema:
            self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(args.ema), use_buffers=True)
            self.evaluated = self.average.module
        if args.compile:
            self.model.compile()
        parameters = [*dict.fromkeys([*model.parameters(), *self.criterion.parameters()])]  # it may hold the model
        options = dict(weight_decay=args.weight_decay, fused=args.device.startswith("cuda") or None)
        self.optimizer = OPTIMIZERS[args.optimizer](parameters, args.lr, **options)
        self.epoch, self.iteration, self.history, self.signal, self.begun, self.resumed = 0, 0, [], None, {}, {}
        self.selection_metric = itemgetter(*("val_clean", "val_robust") if natural else ("val_robust", "val_clean"))
        if held := [path for path in (self.out / "last.pt", self.out / "best.pt") if path.exists()]:
            self._resume(held[0])
        if not self.rank:
            self.out.mkdir(parents=True, exist_ok=True)
            write_file(json.dumps(vars(args), indent=2, default=str).encode(), self.out / "args.json")
        self.y = data.y_train.to(args.device)
        if isinstance(data.x_train, ImageFiles):
            data.x_train.workers = args.workers
        else:  # small images live on the device
            self.x = (F.pad(data.x_train, [4] * 4) if args.augment else data.x_train).to(args.device)
        counts = f"{len(data.train)} training and {len(data.val)} held-out images of {data.num_classes} classes"
        print(f"{args.method} on {data.name} ({data.source}): {counts}")
        print(f"{args.arch} on {args.device}, eps {args.eps:.4g}; writing to {self.out}")

    def _resume(self, last: Path) -> None:
        if not self.args.resume:
            raise UserError(f"{self.out} already holds a run: continue it with --resume, or choose another --out")
        content = read_file(last)
        if content.get("format") != FORMATS[-1] or (content["begun"] and self.ranks > 1):
            raise UserError(f"{last}: of another version, or of one process in mid-epoch; it can only be evaluated")
        for key, old in content["args"].items():
            new = getattr(self.args, key, None)
            if (key == "epochs" and new < old) or (key not in RESUME_MAY_CHANGE and new != old):
                raise UserError(f"--resume: --{key.replace('_', '-')} was {old}, now {new}; or choose another --out")
        old, new = models.DEFAULTS | content["model_options"], models.DEFAULTS | self.model.options
        for key in old | new:
            if old.get(key) != new.get(key):
                why = f" ({self.data.source} holds other images?)" * (key in ("mean", "std"))
                raise UserError(f"--resume: {key} of the network was {old.get(key)}, now {new.get(key)}{why}")
        self._load(self.model, content.get("trained", content["model"]))
        self._load(self.criterion, content.get("criterion", {}))
        self.epoch, self.history, self.begun = content["epoch"], content["history"], content["begun"]
        batches, self.resumed = self.begun.get("batches", 0), content
        self.iteration = self.epoch * self.steps_per_epoch + batches * self.replays
        if self.average:
            self._load(self.evaluated, content["model"])
            self.average.n_averaged += self.iteration > 0  # at 0, AveragedModel copies the weights of its first step
        print(f"resumed after epoch {self.epoch} and {batches} batches, of {self.args.epochs} epochs")

    def _load(self, target: torch.nn.Module | torch.optim.Optimizer, state: dict) -> None:
        try:
            target.load_state_dict(state)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"--resume: {self.out} is of another {type(target).__name__} ({error})") from None

    def _on_signal(self, number: int, frame: object) -> None:
        if self.signal:
            raise KeyboardInterrupt  # a second one ends the run at once
        self.signal = number

    def _stop_if_signalled(self, batches: int) -> None:
        """After a signal: write last.pt so that --resume continues after `batches` of this epoch, and exit."""
        if self.signal:
            self._check_finite()
            begun = {"batches": batches, "totals": self.totals, "carry": self.carry}
            begun["seconds"] = time.perf_counter() - self.started
            save(self._checkpoint() | {"epoch": self.epoch - 1, "begun": begun}, self.out / "last.pt")
            command = " ".join(["python", *sys.argv, *["--resume"][self.args.resume :]])
            print(f"stopped in epoch {self.epoch} after {batches} batches; continue with: {command}", file=sys.stderr)
            sys.exit(128 + self.signal)

    def epochs(self) -> Iterator[int]:
        """The epochs still to do, counted from 1."""
        if self.resumed:  # now, because the script may have set an optimizer of its own
            name, saved = type(self.optimizer).__name__, self.resumed["optimizer"]
            if (old := self.resumed.get("optimizer_class", name)) != name:
                raise UserError(f"--resume: the optimizer was {old}, now {name}")
            for group, before in zip(self.optimizer.param_groups, saved["param_groups"], strict=False):
                before |= {"initial_lr": group["lr"], "fused": group.get("fused")}  # older files have no initial_lr
            self._load(self.optimizer, saved)
            self.resumed = {}
        trained, own = {p for g in self.optimizer.param_groups for p in g["params"]}, {*self.criterion.parameters()}
        if not own <= trained <= {*own, *self.model.parameters()}:
            print("warning: the optimizer lacks parameters of the criterion, or has unsaved ones", file=sys.stderr)
        stops = (signal.SIGINT, signal.SIGTERM) if self.ranks == 1 else ()
        usual = {number: signal.signal(number, self._on_signal) for number in stops}
        try:
            while self.epoch < self.args.epochs:
                self.epoch += 1
                yield self.epoch
        finally:
            for number, handler in usual.items():
                signal.signal(number, handler)
        best = max(self.history, key=self.selection_metric)
        print(f"best epoch {best['epoch']}, held-out clean {best['val_clean']:.2f}, PGD {best['val_robust']:.2f} %")
        print(f"evaluate it with\npython eval_all.py {self.out}")

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """An epoch of shuffled x (B, C, H, W) in [0, 1] and y (B,), B this rank's part of --batch-size, never less."""
        args, data, device, begun = self.args, self.data, self.args.device, self.begun
        seed = derive_seed(args.seed, self.epoch)  # the order is the same on all ranks
        order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
        order = order[: len(order) // args.batch_size * args.batch_size].view(-1, args.batch_size)
        rows = data.train[order.chunk(self.ranks, 1)[self.rank]]
        done, self.begun = begun.get("batches", 0), {}
        self.totals = begun.get("totals", torch.zeros(3)).to(device)  # loss, correct, images
        self.carry = {key: value.to(device) for key, value in begun.get("carry", {}).items()}
        self.started = time.perf_counter() - begun.get("seconds", 0)
        streamed = isinstance(data.x_train, ImageFiles)
        images = data.x_train.read(rows[done:], seed if args.augment else -1) if streamed else None
        rows = rows.to(device)  # all at once: a copy for each batch would wait for the batch before
        bar = dict(desc=f"epoch {self.epoch}", total=len(rows), initial=done, leave=False)
        for batch in tqdm(range(done, len(rows)), **bar, disable=True if self.rank else None):
            self._stop_if_signalled(batch)
            torch.manual_seed(derive_seed(args.seed, self.epoch, batch + 1, self.rank))
            if streamed:
                x = next(images).to(device, non_blocking=True)
            else:
                x = crop_and_flip(self.x, rows[batch], padding=4) if args.augment else self.x[rows[batch]]
            for _ in range(self.replays):
                yield to_float(x), self.y[rows[batch]]
        self._stop_if_signalled(len(rows))

    @property
    def share_done(self) -> float:
        """The share of the run that is done, in [0, 1): what its schedule depends on."""
        return self.iteration / (self.steps_per_epoch * self.args.epochs)

    def warmup(self, value: float) -> float:
        """eps or step size in this step: it rises linearly to `value` over the first --eps-warmup epochs."""
        steps = self.args.eps_warmup * self.steps_per_epoch
        return value * min(1.0, (self.iteration + 1) / steps) if steps else value

    def step(self, loss: Tensor, logits: Tensor, y: Tensor) -> None:
        """Backward, optimizer, schedule; `logits` on the images trained on give the running accuracy."""
        for each in (self.model, self.criterion, self.optimizer):  # which may have parameters of neither
            each.zero_grad(set_to_none=True)
        loss.backward()
        groups = self.optimizer.param_groups
        all_mean([p.grad for group in groups for p in group["params"] if p.grad is not None])
        for group in groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * SCHEDULES[self.args.schedule](self.share_done)
        self.optimizer.step()
        if self.average:
            self.average.update_parameters(self.model)
        self.iteration += 1
        loss, correct = loss.detach(), (logits.detach().argmax(1) == y).sum()
        self.totals += torch.stack([loss * len(y), correct, torch.full_like(loss, len(y))])  # no host sync

    def _check_finite(self) -> None:
        """Raises UserError if a loss of this epoch, or a weight after its last step, is not finite."""
        tensors = [self.totals, *self.model.state_dict().values(), *self.criterion.parameters()]
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise UserError(f"loss or gradient not finite in epoch {self.epoch} (not saved): try a smaller --lr")

    def finish_epoch(self, **figures: float) -> None:
        """Held-out accuracy, a line, log.csv with the script's `figures`, best.pt, last.pt. UserError if NaN."""
        batch_norm = [b for net in (self.model, self.evaluated) for name, b in net.named_buffers() if "running" in name]
        all_mean([self.totals, *batch_norm, *(b for b in self.criterion.buffers() if b.is_floating_point())])
        self._check_finite()
        loss, correct, count = (self.totals * self.ranks).tolist()
        seconds = time.perf_counter() - self.started
        clean, robust, one_class = self._held_out()
        if not self.rank and one_class >= 95:
            advice = "try a smaller --lr, or a longer --eps-warmup"
            print(f"warning: {one_class:.3g} % of the held-out predictions are one class: {advice}", file=sys.stderr)
        row = {"epoch": self.epoch, "lr": self.optimizer.param_groups[0]["lr"], "loss": loss / count}
        row |= {"train_accuracy": 100 * correct / count, "val_clean": clean, "val_robust": robust}
        row |= figures | {"images_per_s": count / seconds, "seconds": seconds}
        best = all(self.selection_metric(row) > self.selection_metric(old) for old in self.history)
        self.history.append(row)
        lines = [",".join(self.history[0]), *(",".join(f"{v:.6g}" for v in row.values()) for row in self.history)]
        if not self.rank:  # best.pt before last.pt: a run killed in between repeats the epoch
            write_file("\n".join([*lines, ""]).encode(), self.out / "log.csv")
            save(self._checkpoint(), *(self.out / name for name in ["best.pt"] * best + ["last.pt"]))
        print(" ".join(f"{key} {value:.4g}" for key, value in row.items()) + " *" * best, flush=True)

    def _held_out(self) -> tuple[float, float, float]:
        """In %: clean accuracy, that under PGD at the training eps, and the share of the commonest prediction."""
        args, data, model = self.args, self.data, self.evaluated
        counts = torch.zeros(2 + data.num_classes, device=args.device)
        attack = dict(eps=args.eps, step_size=min(args.step_size, 2.5 * args.eps / args.steps), steps=args.steps)
        rows = data.val[self.rank :: self.ranks].split(args.batch_size // self.ranks)
        images = data.x_train.read(rows) if isinstance(data.x_train, ImageFiles) else (data.x_train[r] for r in rows)
        torch.manual_seed(derive_seed(args.seed, 0, 0, self.rank))
        model.amp = False  # in bfloat16 a saturated activation has no gradient, and the attack is weaker
        for batch, x in zip(rows, images, strict=True):
            x, y = to_float(x.to(args.device)), data.y_train[batch].to(args.device)
            with torch.compiler.set_stance("force_eager"):  # or four more variants of the model would be compiled
                x_adv = pgd(model, x, y, loss=lambda z, y: margin_ce(z, y, model.scale), **attack)
                with frozen_eval(model), torch.no_grad():
                    predicted, attacked = (model(images).argmax(1) for images in (x, x_adv))
            correct = torch.stack([predicted == y, (predicted == y) & (attacked == y)], 1)
            counts += torch.cat([correct, F.one_hot(predicted, data.num_classes)], 1).sum(0)
        model.amp = args.amp
        all_mean([counts])
        clean, robust, *classes = (100 * counts * self.ranks / len(data.val)).tolist()
        return clean, robust, max(classes)

    def _checkpoint(self) -> dict:
        options = {key: value for key, value in self.model.options.items() if value != models.DEFAULTS.get(key)}
        facts = {"model_options": options, "method": self.args.method, "args": vars(self.args), "natural": self.natural}
        facts |= {"epoch": self.epoch, "history": self.history, "hardware": hardware(self.args.device)}
        state = {"model": self.evaluated.state_dict(), "criterion": self.criterion.state_dict()}
        state |= {"trained": self.model.state_dict()} if self.average else {}
        state |= {"optimizer": self.optimizer.state_dict(), "optimizer_class": type(self.optimizer).__name__}
        return {"format": FORMATS[-1], "torch": str(torch.__version__), "begun": {}} | facts | state
