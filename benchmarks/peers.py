"""Our attacks beside those of foolbox and torchattacks, and of the authors of RayS, on the same images.

    pip install foolbox torchattacks
    python benchmarks/peers.py runs/pgd_he-mnist-s0 --num-images 500
    PYTHONPATH=../RayS python benchmarks/peers.py runs/cnn-mnist-s0 --eps 0.1 --l2 1.5 --only rays    # their repository

Both sides have equal settings. One rule judges them: an image counts as correct if what they return is outside the
ball, or is classified correctly, cut to [0, 1]. Random starts and searches differ, so a few verdicts may. Packages that
are not installed are left out. Not a test: nothing here passes or fails.
"""

import argparse
import contextlib
import importlib
import io
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import eval_all


def foolbox_peers(model: nn.Module, eps: float, l2: float) -> dict[str, Callable]:
    """By the name of our attack: (x, y) -> images (B, C, H, W)."""
    import foolbox

    net, attacks = foolbox.PyTorchModel(model, bounds=(0, 1)), foolbox.attacks

    def peer(attack, radius):  # of an attack by distance the unclipped image is the nearest one
        return lambda x, y: attack(net, x, y, epsilons=radius)[0]

    return {
        "pgd-40": peer(attacks.LinfPGD(rel_stepsize=1 / 30, steps=40), eps),
        "deepfool": peer(attacks.LinfDeepFoolAttack(steps=50, candidates=10, overshoot=0.02), eps),
        "deepfool, l2": peer(attacks.L2DeepFoolAttack(steps=50, candidates=10, overshoot=0.02), l2),
        "cw-l2-200": peer(attacks.L2CarliniWagnerAttack(binary_search_steps=9, steps=200, stepsize=0.01), l2),
    }


def torchattacks_peers(model: nn.Module, eps: float, l2: float) -> dict[str, Callable]:
    import torchattacks

    return {
        "fgsm": torchattacks.FGSM(model, eps=eps),
        "pgd-40": torchattacks.PGD(model, eps=eps, alpha=eps / 30, steps=40),
        "mim-20": torchattacks.MIFGSM(model, eps=eps, alpha=eps / 10, steps=20, decay=1.0),
        "square": torchattacks.Square(model, eps=eps, n_queries=1000, seed=0),
        "spsa-10": torchattacks.SPSA(model, eps=eps, delta=0.001, lr=0.01, nb_iter=10, nb_sample=128),
    }


def rays_peers(model: nn.Module, eps: float, l2: float) -> dict[str, Callable]:
    sys.modules["pgbar"] = SimpleNamespace(progress_bar=lambda *_: None)  # theirs needs a terminal
    attack = importlib.import_module("RayS").RayS(model, epsilon=eps)
    model.predict_label = lambda x: model(x).argmax(1)
    if not torch.cuda.is_available():
        Tensor.cuda = lambda self: self  # they move everything there

    @torch.no_grad()
    def rays(x: Tensor, y: Tensor) -> Tensor:
        with contextlib.redirect_stdout(io.StringIO()):
            return attack(x, y, query_limit=2000)[0]

    return {"rays": rays}


PEERS = {"torchattacks": torchattacks_peers, "foolbox": foolbox_peers, "RayS": rays_peers}


def our_attacks(eps: float, l2: float) -> dict[str, Callable]:
    """By name: (model, x, y) -> images (B, C, H, W), with the settings of the peers."""

    def ours(function: Callable, norm: str = "linf", **settings) -> Callable:
        def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            with common.frozen_eval(model):
                budget = dict(eps=l2 if norm == "l2" else eps, norm=norm)
                return function(eval_all.Observed(model, x), x, y, **budget, **settings).detach()

        return attack

    return {
        "fgsm": ours(eval_all.fgsm),
        "pgd-40": ours(eval_all.pgd, steps=40, step_size=eps / 30),
        "mim-20": ours(eval_all.mim, steps=20, step_size=eps / 10),
        "deepfool": ours(eval_all.deepfool, steps=50),
        "deepfool, l2": ours(eval_all.deepfool, "l2", steps=50),
        "cw-l2-200": ours(eval_all.cw_l2, "l2", steps=200),
        "square": ours(eval_all.autoattack, parts=["square"], queries=1000),
        "spsa-10": ours(eval_all.spsa, steps=10, step_size=0.01),
        "rays": ours(eval_all.rays, queries=2000),
    }


def judge(model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor, norm: str, eps: float) -> tuple[Tensor, float]:
    """Whether each image is correct, or outside the ball (B,), and the median distance of misclassified ones."""
    distance = (x_adv - x).flatten(1).norm(dim=1, p=2 if norm == "l2" else torch.inf)
    wrong = eval_all.predict(model, x_adv.clamp(0, 1)) != y
    return ~(wrong & (distance <= eps * (1 + 1e-4))), float(distance[wrong].median()) if wrong.any() else float("nan")


def compare(model: nn.Module, x: Tensor, y: Tensor, args: argparse.Namespace) -> Iterator[str]:
    """A line for each pair of attacks."""
    heads = f"{'ours %':>8} {'theirs %':>8} {'same':>11} {'median distance':>17} {'seconds':>15}"
    yield f"{'attack':14} {'peer':14} {heads}"
    ours = {name: own for name, own in our_attacks(args.eps, args.l2).items() if args.only in (None, name)}
    for package, make in PEERS.items():
        try:
            peers = make(model, args.eps, args.l2)
        except ImportError as error:
            yield f"{package}: left out ({error})"
            continue
        for name in sorted(ours.keys() & peers.keys()):
            norm = "l2" if "l2" in name else "linf"
            results, seconds = [], []
            for attack in (lambda x, y, own=ours[name]: own(model, x, y), peers[name]):
                torch.manual_seed(0)
                start, parts = time.perf_counter(), zip(x.split(250), y.split(250), strict=True)
                x_adv = torch.cat([attack(images, labels).detach() for images, labels in parts])
                seconds.append(time.perf_counter() - start)
                results.append(judge(model, x_adv, x, y, norm, args.l2 if norm == "l2" else args.eps))
            (mine, near), (theirs, their_near) = results
            same = f"{int((mine == theirs).sum())} of {len(y)}"
            robust = [100 * float(own.float().mean()) for own in (mine, theirs)]
            yield (
                f"{name:14} {package:14} {robust[0]:8.1f} {robust[1]:8.1f} {same:>11} "
                f"{near:8.3f} {their_near:8.3f} {seconds[0]:7.1f} {seconds[1]:7.1f}"
            )


def main() -> None:
    parser = common.Parser(__doc__)
    parser.add_argument("checkpoint", help="a run folder or a .pt file")
    parser.add_argument("--data-dir", help="(default: as in training)")
    parser.add_argument("--num-images", type=common.number(int, 1), default=500)
    parser.add_argument("--eps", type=common.number(float, 0, 1), default=0.3, help="Linf (default: 0.3)")
    parser.add_argument("--l2", type=common.number(float, 0), default=1.5, help="L2 (default: 1.5)")
    parser.add_argument("--only", choices=our_attacks(0.3, 1.5), help="one attack")
    args = parser.parse_args()
    model, meta = common.load_checkpoint(args.checkpoint)
    data = common.load_data(meta["args"]["dataset"], args.data_dir or meta["args"]["data_dir"])
    rows = torch.randperm(len(data.y_test), generator=torch.Generator().manual_seed(0))[: args.num_images]
    x, y = common.images_at(data.x_test, rows, torch.device("cpu")), data.y_test[rows]
    clean = eval_all.predict(model, x) == y
    accuracy = 100 * float(clean.float().mean())
    print(f"{args.checkpoint}: clean {accuracy:.1f} %, n = {len(y)}; eps {args.eps}, L2 {args.l2}")
    for line in compare(model, x, y, args):
        print(line, flush=True)


if __name__ == "__main__":
    common.cli(main)
