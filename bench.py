"""Speed, as ratios measured in one run: what is compared takes turns, so that both meet the same machine.

    python bench.py                              # all of it: resnet18 on 32 pixels, batch 128 (on a CPU 32)
    python bench.py --arch wrn-16-4 --only training,switches
    python bench.py --only attacks,layers --rounds 5

    training    a PGD-10 training step of each method and head, by its own script's main()
    switches    PGD-AT+HE with each optimization switched off by itself
    attacks     each attack on images that it does not fool, which is the most that it costs
    layers      the layers of D-SphereNet against the plain convolution

The reference, the 1 in every ratio of the first two, is a PGD-10 training step as the papers' public code has it:
float32, NCHW, images from a DataLoader with two workers and torchvision transforms, an attack whose backward pass also
computes the gradients of the weights, the loss fetched in every step. For attacks it is PGD-20 so written, timed right
after ours. Images and labels are random: speed alone is measured. GFLOP are counted (torch.utils.flop_counter) and set
against the rate of a large matrix product in bfloat16, or in float32 where the device has no bfloat16 units. Peak
memory is, on a CPU, the process's up to then. Prints tables and writes bench.json. The machine should have nothing else
to do.
"""

import argparse
import contextlib
import importlib
import io
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import flop_registry

import common
import eval_all
import models

STEPS = 4  # of training, timed at once
SCRIPTS = {  # what a PGD-10 step is compared over: script and flags
    "PGD-AT": ("train_pgd_he", ["--head", "linear"]),
    "PGD-AT+HE": ("train_pgd_he", ["--head", "he"]),
    "PGD-AT+m-HE": ("train_pgd_he", ["--head", "mhe"]),
    "Angular-AT": ("train_angular_at", []),
    "TRADES": ("train_trades_he", ["--head", "linear"]),
    "TRADES+HE": ("train_trades_he", ["--head", "he"]),
    "ALP+HE": ("train_alp_he", ["--head", "he"]),
    "MART": ("train_mart", []),
    "MMC, adversarial": ("train_mmc", ["--adversarial"]),
    "ABCL, adversarial": ("train_abcl", ["--adversarial"]),
    "FastAT+HE": ("train_fast_he", ["--head", "he"]),
    "FreeAT+HE": ("train_free_he", ["--head", "he", "--replays", "2"]),
    "WeightPen": ("train_weightpen", ["--activation", "relu"]),  # which every network has
}
BASE = "PGD-AT+HE"
ATTACKS = ("fgsm", "pgd-20", "mim-20", "cw-inf", "apgd-ce-20", "mta-2", "fab-t-2", "deepfool-5", "square", "spsa-1")
QUERIES = 100  # of Square here


@contextlib.contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """What attack_mode does, but for the parameters: their gradients are computed, as in the papers' code."""
    was_training = model.training
    model.eval()
    yield
    model.train(was_training)


def apart(function: Callable, *arguments: object) -> object:
    """function(*arguments) in a fresh process, whose C library was never told to keep freed memory."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


SWITCHES = {  # what is switched off, and the flag or the patch that does it
    "bfloat16": ["--no-amp"],
    "channels_last": lambda: mock.patch.object(torch, "channels_last", torch.contiguous_format),
    "parameters frozen in the attack": lambda: mock.patch.object(common, "attack_mode", eval_mode),
    "freed memory kept": apart,
    "torch.compile": ["--no-compile"],
}


# ---------------------------------------------------------------------------------------------------- the reference


class Transformed(Dataset):
    """Images (N, H, W, 3) one by one through torchvision's transforms, as the papers' code reads CIFAR."""

    def __init__(self, x: np.ndarray, y: np.ndarray):
        transforms = models.import_torchvision().transforms
        size = x.shape[1]
        steps = [transforms.RandomCrop(size, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        self.x, self.y, self.view = x, y, transforms.Compose([transforms.ToPILImage(), *steps])

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        return self.view(self.x[row]), int(self.y[row])


def reference_pgd(
    model: torch.nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    eps: float,
    step_size: float,
    steps: int,
    start: torch.Tensor | None = None,
) -> torch.Tensor:
    """PGD with backward(): every step also fills the gradients of the weights."""
    x_adv = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1) if start is None else start.clone()
    for _ in range(steps):
        x_adv.requires_grad_()
        model.zero_grad()
        F.cross_entropy(model(x_adv), y).backward()
        x_adv = x_adv.detach() + step_size * x_adv.grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - eps), x + eps).clamp(0, 1)
    return x_adv.detach()


def reference_model(arch: str, size: int, device: str) -> torch.nn.Module:
    torch.manual_seed(0)
    try:
        model = models.build_model(arch, 10, 3, image_size=size, mean=[0.5] * 3, std=[0.25] * 3)
    except ValueError as error:
        raise common.UserError(error) from None
    with mock.patch.object(torch, "channels_last", torch.contiguous_format):
        return model.to(device)


def reference_training(args: argparse.Namespace, x: np.ndarray, y: np.ndarray) -> float:
    """Images/s of the reference's PGD-10 training steps, without the first one."""
    model = reference_model(args.arch, x.shape[1], args.device)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    rows = np.arange((STEPS + 1) * args.batch_size) % len(x)
    loader = DataLoader(
        Transformed(x[rows], y[rows]), args.batch_size, shuffle=True, num_workers=2, multiprocessing_context="fork"
    )
    with mock.patch.object(torch, "channels_last", torch.contiguous_format):
        start = 0.0
        for step, (images, labels) in enumerate(loader):
            images, labels = images.to(args.device), labels.to(args.device)
            model.eval()
            x_adv = reference_pgd(model, images, labels, 8 / 255, 2 / 255, 10)
            model.train()
            loss = F.cross_entropy(model(x_adv), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
            if not step:
                start = time.perf_counter()
        return STEPS * args.batch_size / (time.perf_counter() - start)


# --------------------------------------------------------------------------------------------------------- training


def run_script(args: argparse.Namespace, data: Path, method: str, flags: list[str]) -> dict:
    """The last row of the script's log.csv: two epochs of STEPS steps, of which the first one warms up."""
    script, own = SCRIPTS[method]
    steps = [] if script in ("train_fast_he", "train_weightpen") else ["--steps", "10"]
    with tempfile.TemporaryDirectory() as out:
        argv = ["--dataset", data, "--arch", args.arch, "--batch-size", args.batch_size, "--epochs", 2, "--out", out]
        argv += ["--device", args.device, "--schedule", "constant", "--lr", "0.01", *own, *steps, *flags]
        quiet, training_alone = io.StringIO(), mock.patch.object(common.Run, "_held_out", lambda run: (0.0, 0.0))
        stops_at_once = mock.patch.object(common.Run, "_listen", lambda run: None)  # there is nothing to go on with
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet), training_alone, stops_at_once:
            importlib.import_module(script).main([str(word) for word in argv])
        return common.read_file(Path(out) / "last.pt")["history"][-1]


class CountFlops(TorchDispatchMode):
    """`total` floating point operations of convolutions and matrix products, forward and backward."""

    total = 0

    def __torch_dispatch__(
        self, function: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        out = function(*args, **(kwargs or {}))
        if count := flop_registry.get(function.overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def gigaflops(args: argparse.Namespace, data: Path, method: str) -> float:
    """GFLOP of a training step, for each of its images."""
    with CountFlops() as counter:
        run_script(args, data, method, ["--no-compile"])
    images = 2 * STEPS * args.batch_size * (2 if "Free" in method else 1)
    return counter.total / images / 1e9


def matrix_rate(device: str) -> float:
    """GFLOP/s of the product of two large matrices, the best of ten."""
    side = 8192 if torch.device(device).type == "cuda" else 2048
    dtype = torch.bfloat16 if common.computes_bf16(device) else torch.float32
    a = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / min(seconds(lambda: a @ a, device) for _ in range(10)) / 1e9


def peak_memory(device: str) -> float:
    """GiB, since the last call on CUDA, since the process began on a CPU."""
    if torch.device(device).type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def random_data(folder: Path, args: argparse.Namespace) -> tuple[Path, np.ndarray, np.ndarray]:
    """An .npz of random images named as CIFAR-10, so that they are augmented; what will be held out comes on top."""
    rng, count = np.random.default_rng(0), STEPS * args.batch_size
    count += max(100, count // 48)
    x, y = rng.integers(0, 256, (count, args.size, args.size, 3), dtype=np.uint8), rng.integers(0, 10, count)
    path = folder / "cifar10_random.npz"
    np.savez(path, x_train=x, y_train=y, x_test=x[:20], y_test=y[:20])
    return path, x, y


def bench_training(args: argparse.Namespace) -> list[dict]:
    """Each method's images/s, its ratio to the reference and to plain PGD-AT, GFLOP an image, share of the rate."""
    with tempfile.TemporaryDirectory() as folder:
        data, x, y = random_data(Path(folder), args)
        turns, memory = [], {}
        for _ in range(args.rounds):
            turn = {"reference": apart(reference_training, args, x, y)}
            for method in SCRIPTS:
                peak_memory(args.device)
                turn[method] = run_script(args, data, method, [])["images_per_s"]
                memory[method] = peak_memory(args.device)
            turns.append(turn)
        cost, rate = {method: gigaflops(args, data, method) for method in SCRIPTS}, matrix_rate(args.device)
    rows = [{"what": "reference", "img/s": median(turns, "reference"), "x reference": 1.0}]
    for method in SCRIPTS:
        speed = median(turns, method)
        rows.append({"what": method, "img/s": speed, "x reference": median(turns, method, "reference")})
        rows[-1] |= {"x PGD-AT": median(turns, method, "PGD-AT"), "GFLOP/img": cost[method]}
        rows[-1] |= {"% of matrix rate": 100 * speed * cost[method] / rate, "peak GiB": memory[method]}
    return rows


def bench_switches(args: argparse.Namespace) -> list[dict]:
    """PGD-AT+HE with everything, and with one optimization less: how much of the speed is left."""
    with tempfile.TemporaryDirectory() as folder:
        data, x, y = random_data(Path(folder), args)
        switches = {name: off for name, off in SWITCHES.items() if name != "torch.compile" or "cuda" in args.device}
        turns = []
        for _ in range(args.rounds):
            turn = {
                "reference": apart(reference_training, args, x, y),
                "all": run_script(args, data, BASE, [])["images_per_s"],
            }
            for name, switch in switches.items():
                flags = switch if isinstance(switch, list) else []
                if switch is apart:
                    row = apart(run_script, args, data, BASE, [])
                else:
                    with contextlib.nullcontext() if flags else switch():
                        row = run_script(args, data, BASE, flags)
                turn[name] = row["images_per_s"]
            turns.append(turn)
    rows = [{"what": f"{BASE}, everything on", "img/s": median(turns, "all"), "of all": 1.0}]
    rows += [
        {"what": f"without {name}", "img/s": median(turns, name), "of all": median(turns, name, "all")}
        for name in switches
    ]
    return [
        *rows,
        {"what": "reference", "img/s": median(turns, "reference"), "of all": median(turns, "reference", "all")},
    ]


def median(turns: list[dict[str, float]], name: str, base: str | None = None) -> float:
    """Over the rounds, of the figure, or of its ratio to `base`'s in the same round."""
    return statistics.median(turn[name] / (turn[base] if base else 1.0) for turn in turns)


# ------------------------------------------------------------------------------------------------ attacks and layers


def seconds(step: Callable[[], object], device: str) -> float:
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def take_turns(steps: dict[str, Callable[[], object]], device: str, rounds: int) -> list[dict[str, float]]:
    """1 / seconds of each step in each round, after a first one that is not counted."""
    for step in steps.values():
        step()
    return [{name: 1 / seconds(step, device) for name, step in steps.items()} for _ in range(rounds)]


def reference_evaluation(args: argparse.Namespace, x: torch.Tensor, y: torch.Tensor) -> float:
    """Calls a second of the reference's PGD-20, after a first one that is not counted."""
    eval_all.exact_float32()
    model = reference_model(args.arch, args.size, args.device).eval()
    with mock.patch.object(torch, "channels_last", torch.contiguous_format):
        x, y = x.to(args.device), y.to(args.device)
        (turn,) = take_turns({"it": lambda: reference_pgd(model, x, y, 1e-6, 1e-7, 20)}, args.device, 1)
    return turn["it"]


def bench_attacks(args: argparse.Namespace) -> list[dict]:
    """Each attack of eval_all in float32, its default, and with --amp; all images stand to the end, at eps 1e-6."""
    eval_all.exact_float32()
    torch.manual_seed(0)
    x = torch.rand(args.batch_size, 3, args.size, args.size, device=args.device)
    model = reference_model(args.arch, args.size, args.device).eval().to(memory_format=torch.channels_last)
    y, rows, rate = eval_all.predict(model, x), [], matrix_rate(args.device)
    settings = {"known": None, "norm": "linf", "eps": 1e-6, "step_size": None}

    def attack(name: str, amp: bool) -> None:
        one = eval_all.find_attack(name)
        limit = {"queries": QUERIES} if name == "square" else {}
        with eval_all.crafting(model, one, amp):
            one(model, x, y, **eval_all.budget(name, one, settings), **limit)

    for name in ATTACKS:
        steps = {"float32": lambda name=name: attack(name, False), "amp": lambda name=name: attack(name, True)}
        turns = take_turns(steps, args.device, args.rounds)
        with CountFlops() as counter:
            attack(name, False)
        what, cost = f"{name}, {QUERIES} queries" if name == "square" else name, counter.total / len(x) / 1e9
        rows.append(
            {"what": what, "img/s": len(x) * median(turns, "float32"), "x amp": median(turns, "amp", "float32")}
        )
        share = 100 * len(x) * median(turns, "amp") * cost / rate
        rows[-1] |= {"GFLOP/img": cost, "amp % of matrix rate": share}
        if name == "pgd-20":
            turns = [turn | {"reference": apart(reference_evaluation, args, x.cpu(), y.cpu())} for turn in turns]
            ours = {"x reference": median(turns, "float32", "reference")}
            rows[-1] |= ours | {"amp x reference": median(turns, "amp", "reference")}
    return rows


def layer_step(layer: torch.nn.Module, x: torch.Tensor, amp: bool, backward: bool) -> Callable[[], None]:
    def step() -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp), torch.set_grad_enabled(backward):
            out = layer(x)
        if backward:
            out.sum().backward()

    return step


def bench_layers(args: argparse.Namespace) -> list[dict]:
    """Time over the plain convolution's, by correlation: 3x3, 64 to 128 channels, 28 pixels, batch 64."""
    eval_all.exact_float32()
    x = torch.rand(64, 64, 28, 28, device=args.device).contiguous(memory_format=torch.channels_last)
    layers = {"plain": torch.nn.Conv2d(64, 128, 3, padding=1, bias=False)} | {
        name: models.SphereConv2d(64, 128, 3, padding=1, correlation=name, manifold="sphere")
        for name in models.CORRELATIONS
    }
    layers = {name: layer.to(args.device, memory_format=torch.channels_last) for name, layer in layers.items()}
    rows = []
    for amp in (False, True):
        for backward in (False, True):
            x_now = x.clone().requires_grad_(backward)
            steps = {name: layer_step(layer, x_now, amp, backward) for name, layer in layers.items()}
            turns = take_turns(steps, args.device, args.rounds)
            what = f"{'bfloat16' if amp else 'float32'}, {'forward and backward' if backward else 'forward'}"
            rows.append({"what": what} | {name: median(turns, "plain", name) for name in models.CORRELATIONS})
    return rows


SECTIONS = {"training": bench_training, "switches": bench_switches, "attacks": bench_attacks, "layers": bench_layers}


def print_table(title: str, rows: list[dict]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "what"))
    print(f"\n{title:<36}" + "".join(f"{column:>18}" for column in columns))
    for row in rows:
        cells = [f"{row[column]:18.2f}" if column in row else " " * 18 for column in columns]
        print(f"{row['what']:<36}" + "".join(cells))


def sections(text: str) -> list[str]:
    """An argparse type: names of SECTIONS, separated by commas."""
    if unknown := set(text.split(",")) - set(SECTIONS):
        raise argparse.ArgumentTypeError(f"unknown {', '.join(sorted(unknown))}; choose from {', '.join(SECTIONS)}")
    return text.split(",")


def main(argv: list[str] | None = None) -> None:
    parser = common.Parser(__doc__)
    flag, number = parser.add_argument, common.number
    cuda = torch.cuda.is_available()
    flag("--arch", default="resnet18", help="(default: resnet18)")
    flag("--batch-size", type=number(int, 2), default=128 if cuda else 32, help="(default: 128; on a CPU 32)")
    flag("--size", type=number(int, 8, 512), default=32, help="pixels of a side (default: 32)")
    flag("--only", type=sections, default=list(SECTIONS), help=f"separated by commas: {', '.join(SECTIONS)}")
    flag("--rounds", type=number(int, 1), default=3, help="(default: 3)")
    flag("--device", type=common.device_flag, default=common.default_device(), help="(default: %(default)s)")
    flag("--out", default="bench.json", help="(default: bench.json)")
    args = parser.parse_args(argv)
    setting = vars(args) | {"threads": torch.get_num_threads(), "torch": str(torch.__version__)}
    setting["hardware"] = common.hardware(args.device)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)  # before the work
    results = {}
    for name in args.only:
        results[name] = SECTIONS[name](args)
        print_table(name, results[name])
    text = json.dumps({"setting": setting, **results, "peak GiB": peak_memory(args.device)}, indent=2)
    common.write_atomically(Path(args.out), lambda file: file.write(text), "w")


if __name__ == "__main__":
    common.cli(main)
