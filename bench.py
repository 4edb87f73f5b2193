"""Speed of training, attacks and layers, as ratios measured in one run.

    python bench.py                                             # everything: resnet18, 32 x 32 pixels
    python bench.py --arch wrn-16-4 --only training switches    # these sections

    training    each method's own script, with PGD-10, over the reference
    switches    PGD-AT+HE with one optimization switched off, over everything on
    attacks     PGD-20 over the reference, in float32 and with --amp

The reference is PGD-10 training, or PGD-20, as in the papers' public code: float32, NCHW, a DataLoader with two workers
and torchvision's transforms, an attack whose backward pass also computes the gradients of the weights. Images are
random: only speed is measured. In each round everything is measured once, in turns; a ratio is the median over the
rounds. The tables are printed and written to bench.json. Nothing else should run on the machine.
"""

import argparse
import importlib
import io
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from unittest import mock

import common
import eval_all
import models

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

STEPS = 48 if torch.cuda.is_available() else 4  # of training in a measurement, which takes a second at least
METHODS = {  # script and flags
    "PGD-AT": "train_pgd_he --head linear",
    "PGD-AT+HE": "train_pgd_he --head he",
    "PGD-AT+m-HE": "train_pgd_he --head mhe",
    "Angular-AT": "train_angular_at",
    "TRADES+HE": "train_trades_he --head he",
    "ALP+HE": "train_alp_he --head he",
    "MART": "train_mart",
    "FastAT+HE": "train_fast_he --head he",
}


def random_data(folder: Path, batch_size: int, size: int) -> common.Data:
    """Random images, named as CIFAR-10 so that they are cropped and flipped: STEPS batches and 100 held-out images."""
    rng, count = np.random.default_rng(0), STEPS * batch_size + 100
    x, y = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8), rng.integers(0, 10, count)
    np.savez(folder / "cifar10_random.npz", x_train=x, y_train=y, x_test=x[:20], y_test=y[:20])
    return common.load_data(str(folder / "cifar10_random.npz"))


def compare(measures: dict[str, Callable[[], float]], rounds: int, *bases: str) -> list[dict]:
    """Speeds, measured in turns: a row for each, with its median, and the median of its ratio to each base's speed."""
    turns = [{name: measure() for name, measure in measures.items()} for _ in range(rounds)]
    rows = []
    for name in measures:
        rows.append({"what": name, "img/s": statistics.median(turn[name] for turn in turns)})
        rows[-1] |= {f"x {base}": statistics.median(turn[name] / turn[base] for turn in turns) for base in bases}
    return rows


def calls_per_s(step: Callable[[], Tensor]) -> float:
    """After a first call that warms up: of one more, on a GPU of as many as take a second."""
    step().sum().item()  # which waits for a GPU
    calls, start = 0, time.perf_counter()
    while not calls or (torch.cuda.is_available() and time.perf_counter() - start < 1):
        step().sum().item()
        calls += 1
    return calls / (time.perf_counter() - start)


def matrix_rate(device: str) -> float:
    """FLOP/s of a product of two matrices of 4096 x 4096, in bfloat16 where it is native."""
    a = torch.rand(4096, 4096, device=device, dtype=torch.bfloat16 if common.supports_bf16(device) else torch.float32)
    return 2 * 4096**3 * calls_per_s(lambda: (a @ a)[:1])


def forward_flop(args: argparse.Namespace, data: common.Data) -> int:
    """FLOP of a forward pass of one image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        common.build_model(args, data)(torch.rand(1, *data.x_train.shape[1:]))
    return counter.get_total_flops()


def nchw() -> mock._patch:
    """A context, or a decorator, in which the models keep the default memory format."""
    return mock.patch.object(torch, "channels_last", torch.contiguous_format)


def reference_loader(data: common.Data, batches: int, batch_size: int) -> DataLoader:
    """Images one by one through torchvision's transforms, as the papers' code reads CIFAR-10."""
    transforms = models.import_torchvision().transforms
    augment = [transforms.RandomCrop(data.image_size, padding=4), transforms.RandomHorizontalFlip()]
    view, to_pil = transforms.Compose([*augment, transforms.ToTensor()]), transforms.ToPILImage()
    rows = torch.arange(batches * batch_size) % len(data.x_train)
    images = [(to_pil(data.x_train[row]), data.y_train[row]) for row in rows]

    def collate(batch: list) -> tuple[Tensor, Tensor]:  # in the worker
        return torch.stack([view(image) for image, _ in batch]), torch.stack([label for _, label in batch])

    return DataLoader(images, batch_size, shuffle=True, num_workers=2, collate_fn=collate)


def reference_pgd(model: nn.Module, x: Tensor, y: Tensor, eps: float, step_size: float, steps: int) -> Tensor:
    """Linf PGD by backward(): every step also computes the gradients of the weights."""
    x_adv = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
    for _ in range(steps):
        x_adv.requires_grad_()
        model.zero_grad()
        F.cross_entropy(model(x_adv), y).backward()
        x_adv = x_adv.detach() + step_size * x_adv.grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - eps), x + eps).clamp(0, 1)
    return x_adv


@nchw()
def train_reference(args: argparse.Namespace, data: common.Data) -> float:
    """Images/s of the reference's training, after a first step that warms up."""
    model = common.build_model(args, data).to(args.device)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    for step, (x, y) in enumerate(reference_loader(data, STEPS + 1, args.batch_size)):
        x, y = x.to(args.device), y.to(args.device)
        model.eval()
        x_adv = reference_pgd(model, x, y, 8 / 255, 2 / 255, 10)
        model.train()
        loss = F.cross_entropy(model(x_adv), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()  # their code prints it
        if step == 0:
            start = time.perf_counter()
    return STEPS * args.batch_size / (time.perf_counter() - start)


def train(args: argparse.Namespace, data: common.Data, method: str, flags: str = "", context=nullcontext) -> float:
    """Images/s in the second of two epochs of the method's own script; the first one warms up."""
    script, *own = f"{METHODS[method]} {flags}".split()
    torch.compiler.reset()  # or the limit of compiled variants is reached after some methods
    shared = f"--arch {args.arch} --batch-size {args.batch_size} --device {args.device} --steps 10"
    shared += " --epochs 2 --lr 0.01 --schedule constant"
    with tempfile.TemporaryDirectory() as out:
        with context(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            argv = ["--dataset", data.source, "--out", out, *shared.split(), *own]
            importlib.import_module(script).main(argv)
        return common.read_file(Path(out) / "last.pt")["history"][-1]["images_per_s"]


def bench_training(args: argparse.Namespace, data: common.Data) -> list[dict]:
    """Each method over the reference, and over our own plain PGD-AT."""
    ours = {method: partial(train, args, data, method) for method in METHODS}
    rows = compare({"reference": partial(train_reference, args, data)} | ours, args.rounds, "reference", "PGD-AT")
    share = 23 * forward_flop(args, data) * rows[1]["img/s"] / matrix_rate(args.device)  # 10 x (1 + 1) + 1 + 2 passes
    print(f"PGD-AT computes at {100 * share:.0f} % of the measured rate of matrix products")
    return rows


def unfrozen() -> mock._patch:
    """A context in which no parameter can be frozen."""
    return mock.patch.object(nn.Parameter, "requires_grad_", lambda parameter, requires_grad=True: parameter)


SWITCHES = {  # the flag, or the context, that switches it off
    "bfloat16": ("--no-amp",),
    "channels_last": ("", nchw),
    "parameters frozen in the attack": ("", unfrozen),
    "torch.compile": ("--no-compile",),
}


def bench_switches(args: argparse.Namespace, data: common.Data) -> list[dict]:
    """PGD-AT+HE with one optimization less, and the reference, which has none, over everything on."""
    used = {"bfloat16": common.supports_bf16(args.device), "torch.compile": args.device.startswith("cuda")}
    switches = {"everything": ()} | {f"without {name}": off for name, off in SWITCHES.items() if used.get(name, True)}
    measures = {name: partial(train, args, data, "PGD-AT+HE", *off) for name, off in switches.items()}
    return compare(measures | {"reference": partial(train_reference, args, data)}, args.rounds, "everything")


def bench_attacks(args: argparse.Namespace, data: common.Data) -> list[dict]:
    """PGD-20 over the reference, on images that it does not fool: the slowest case."""
    eval_all.allow_tf32(False)
    x = common.images_at(data.x_train, torch.arange(args.batch_size), args.device)
    model, plain = (common.build_model(args, data).to(args.device).eval() for _ in range(2))
    model.to(memory_format=torch.channels_last)

    def pgd_20(amp: bool) -> float:
        observed = eval_all.Observed(model, x, amp).eval()
        y = eval_all.predict(observed, x)  # in the precision of the attack, or a near tie could fool the model
        return len(x) * calls_per_s(lambda: eval_all.ATTACKS["pgd-20"](observed, x, y, eps=1e-6))

    @nchw()
    def reference() -> float:
        y = eval_all.predict(plain, x)
        return len(x) * calls_per_s(lambda: reference_pgd(plain, x, y, 1e-6, 1e-7, 20))

    measures = {"reference": reference, "float32": partial(pgd_20, False), "with --amp": partial(pgd_20, True)}
    return compare(measures, args.rounds, "reference")


SECTIONS = {"training": bench_training, "switches": bench_switches, "attacks": bench_attacks}


def print_table(title: str, rows: list[dict]) -> None:
    print(f"\n{title:<40}" + "".join(f"{column:>14}" for column in [*rows[0]][1:]))
    for what, *cells in (row.values() for row in rows):
        print(f"{what:<40}" + "".join(f"{cell:14.2f}" for cell in cells))


def main(argv: list[str] | None = None) -> None:
    parser, number = common.Parser(__doc__), common.number
    flag, batch_size = parser.add_argument, 128 if torch.cuda.is_available() else 32
    flag("--arch", default="resnet18", help="(default: resnet18)")
    flag("--batch-size", type=number(int, 2), default=batch_size, help="(default: 128; without a GPU 32)")
    flag("--size", type=number(int, 8, 512), default=32, help="pixels of a side (default: 32)")
    flag("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="(default: all)")
    flag("--rounds", type=number(int, 1), default=3, help="(default: 3)")
    flag("--device", type=common.device_flag, default="auto", help="(default: cuda if there is a GPU)")
    flag("--out", type=Path, default="bench.json", help="(default: bench.json)")
    args = parser.parse_args(argv, argparse.Namespace(seed=0))
    args.out.parent.mkdir(parents=True, exist_ok=True)  # before the work
    results = {"setting": vars(args) | {"hardware": common.hardware(args.device), "torch": torch.__version__}}
    with tempfile.TemporaryDirectory() as folder:
        data = random_data(Path(folder), args.batch_size, args.size)
        for name in [name for name in SECTIONS if name in args.only]:  # in this order: attacks switch TF32 off
            results[name] = SECTIONS[name](args, data)
            print_table(name, results[name])
    host, cuda = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, args.device.startswith("cuda")
    results["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30 if cuda else host
    tf32 = "TF32 in training, exact float32 in attacks" if cuda else "exact float32 where not bfloat16"
    print(f"\npeak memory: {results['peak GiB']:.1f} GiB; {tf32}")
    common.write_file(json.dumps(results, indent=2, default=str).encode(), args.out)


if __name__ == "__main__":
    common.cli(main)
