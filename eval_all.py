"""Every attack against any checkpoint: a table, and the worst case over all attacks, image by image.

    python eval_all.py runs/angular_at-digits-s0                      # a run directory (its best.pt) or a .pt file
    python eval_all.py runs/A runs/B --attacks paper --n 1000         # several: one table and one plot
    python eval_all.py runs/A --attacks pgd-40,mim-100 --step-size 0.01 --restarts 5
    python eval_all.py wrn.pt --arch wrn-34-10 --head he --dataset cifar10     # a published TRADES / MART / HE file
    python eval_all.py --model my_file.py:make_model --dataset cifar10         # any nn.Module on [0, 1] images

Attacks, in the order of this file (all Linf, eps in pixel units; -N is a number of steps, any number will do):

    clean, noise             no attack; uniform noise in the ball
    fgsm, bim-N, mim-N       one step, many steps, many steps with momentum, from the image itself
    pgd-N                    random start, CE on the logits as the model gives them, as in the papers' own code
    pgd-N-scaled             the same on scale * logits, the logits that an HE model was trained with
    adaptive-pgd-N           the same on the training cross-entropy, with its scale and margin
    cw-inf, cw-inf-N         the margin loss of Carlini & Wagner under PGD, 20 steps if not said otherwise
    autoattack-official      the autoattack package, where it is installed

The evaluator decides what counts, not the attack: an adversarial image must lie in the ball and in [0, 1], and the
model must misclassify it in float32. An image that is misclassified clean is not robust under any attack.
OUT receives eval.json, eval.csv, eval.png and verdicts.npz (per image: index, label, clean_prediction, and a bool for
each attack: still right); with several models each has its own folder in OUT, beside the comparison.
"""

import argparse
import csv
import importlib.util
import json
import math
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import models

# ---------------------------------------------------------------------------------------------------------- attacks
# (model, x, y, *, eps, **options) -> x_adv; x and x_adv are (B, C, H, W) in [0, 1]. Those with steps get a step_size.

Attack = Callable[..., Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


def ce(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each image, (B,)."""
    return F.cross_entropy(logits, y, reduction="none")


def training_ce(model: nn.Module, margin: float) -> Loss:
    """The cross-entropy of each image that the model was trained with (HE, Eq. 6), for a given margin."""
    return partial(common.margin_ce, scale=getattr(model, "scale", 1.0), margin=margin, reduction="none")


def cw_margin(logits: Tensor, y: Tensor) -> Tensor:
    """max over j != y of Z_j, minus Z_y, (B,): positive where the image is misclassified (HE, Sec. B.2)."""
    true = logits.gather(1, y[:, None]).squeeze(1)
    return logits.scatter(1, y[:, None], -math.inf).amax(1) - true


def clean(model: nn.Module, x: Tensor, y: Tensor, *, eps: float) -> Tensor:
    return x


def noise(model: nn.Module, x: Tensor, y: Tensor, *, eps: float) -> Tensor:
    """Uniform in the ball: what no attack may be weaker than."""
    return (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)


def fgsm(model: nn.Module, x: Tensor, y: Tensor, *, eps: float) -> Tensor:
    """Goodfellow et al. 2015 (HE, Eq. 17): one step of eps along the sign of the gradient."""
    return common.pgd(model, x, y, loss=ce, eps=eps, step_size=eps, steps=1, start=x)


def bim(model: nn.Module, x: Tensor, y: Tensor, **budget: float) -> Tensor:
    """Kurakin et al. 2017 (HE, Eq. 18): PGD from the image itself."""
    return common.pgd(model, x, y, loss=ce, start=x, drop_fooled=True, **budget)


def mim(model: nn.Module, x: Tensor, y: Tensor, **budget: float) -> Tensor:
    """Dong et al. 2018 (HE, Eq. 19 and 20): BIM with momentum 1 on the L1-normalized gradient."""
    return common.pgd(model, x, y, loss=ce, start=x, momentum=1.0, drop_fooled=True, **budget)


def pgd(model: nn.Module, x: Tensor, y: Tensor, **budget: float) -> Tensor:
    """Madry et al. 2018, CE on model(x). On an HE model these are the raw cosines, which makes it a weak attack."""
    return common.pgd(model, x, y, loss=ce, drop_fooled=True, **budget)


def pgd_scaled(model: nn.Module, x: Tensor, y: Tensor, **budget: float) -> Tensor:
    """PGD on CE(s * model(x), y), s the scale that the model was trained with (1 for a linear head)."""
    return common.pgd(model, x, y, loss=training_ce(model, 0.0), drop_fooled=True, **budget)


def adaptive_pgd(model: nn.Module, x: Tensor, y: Tensor, **budget: float) -> Tensor:
    """PGD on the training cross-entropy with its scale and margin (HE, Sec. 4.1, 'Adaptive attacks')."""
    loss = training_ce(model, getattr(model, "margin", 0.0))
    return common.pgd(model, x, y, loss=loss, drop_fooled=True, **budget)


def cw_inf(model: nn.Module, x: Tensor, y: Tensor, **budget: float) -> Tensor:
    """PGD on the margin of the logits (Carlini & Wagner 2017 under Linf; Angular-AT, Sec. 5)."""
    return common.pgd(model, x, y, loss=cw_margin, drop_fooled=True, **budget)


def autoattack_official(model: nn.Module, x: Tensor, y: Tensor, *, eps: float) -> Tensor:
    """The standard AutoAttack of Croce & Hein 2020, by the authors' package; its targets are at most K - 1 classes."""
    from autoattack import AutoAttack

    seed, device = torch.initial_seed(), str(x.device)
    adversary = AutoAttack(model, norm="Linf", eps=eps, version="standard", seed=seed, device=device, verbose=False)
    targets = min(9, predict_logits(model, x[:1]).shape[1] - 1)
    if targets < 3:
        raise common.UserError("its DLR loss needs at least 4 classes")
    adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = targets
    return adversary.run_standard_evaluation(x, y, bs=len(x))


ATTACKS: dict[str, Attack] = {
    "clean": clean,
    "noise": noise,
    "fgsm": fgsm,
    "bim-20": partial(bim, steps=20),
    "mim-20": partial(mim, steps=20),
    "pgd-20": partial(pgd, steps=20),
    "pgd-100": partial(pgd, steps=100),
    "pgd-500": partial(pgd, steps=500),
    "pgd-20-scaled": partial(pgd_scaled, steps=20),
    "adaptive-pgd-20": partial(adaptive_pgd, steps=20),
    "adaptive-pgd-500": partial(adaptive_pgd, steps=500),
    "cw-inf": partial(cw_inf, steps=20),
    "autoattack-official": autoattack_official,
}
START_AT_RANDOM = (noise, pgd, pgd_scaled, adaptive_pgd, cw_inf)  # --restarts runs these again
PRESETS = {
    "quick": ["clean", "noise", "fgsm", "pgd-20", "pgd-20-scaled", "cw-inf"],
    "paper": ["clean", "fgsm", "mim-20", "pgd-20", "pgd-500", "cw-inf", "adaptive-pgd-20", "adaptive-pgd-500"],
    "all": list(ATTACKS),
}
THREAT = {  # (eps, step size) of the papers' evaluations; digits is ours
    "digits": (0.1, 0.01),
    "mnist": (0.3, 0.01),
    "cifar10": (0.031, 0.003),
    "cifar100": (0.031, 0.003),
    "tiny-imagenet": (0.031, 0.003),
    "imagenet": (4 / 255, 1 / 255),
    None: (8 / 255, 2 / 255),
}
GET_AUTOATTACK = "autoattack-official needs a package: pip install git+https://github.com/fra31/auto-attack"


def steps_of(attack: Attack) -> int | None:
    return getattr(attack, "keywords", {}).get("steps")


def step_size(known: str | None, eps: float, steps: int) -> float:
    """The papers' step size where it can cross the ball in `steps`, else 2.5 * eps / steps (Madry et al. 2018)."""
    papers = THREAT[known][1]
    return papers if papers * steps > 1.9 * eps else 2.5 * eps / steps


def find_attack(name: str) -> Attack:
    """ATTACKS[name]; a name that differs from one of them only in its number of steps gives that attack."""
    if name == "autoattack-official" and importlib.util.find_spec("autoattack") is None:
        raise common.UserError(GET_AUTOATTACK)
    if name in ATTACKS:
        return ATTACKS[name]
    steps = re.search(r"-([1-9]\d{0,5})(?=-|$)", name)
    for other, attack in ATTACKS.items():
        if steps and steps_of(attack) and re.sub(r"-\d+", "", other) == name.replace(steps[0], "", 1):
            return partial(attack.func, steps=int(steps[1]))
    raise common.UserError(f"unknown attack {name!r}: choose from {', '.join(ATTACKS)} or {', '.join(PRESETS)}")


def named_attacks(text: str) -> dict[str, Attack]:
    """The attacks of --attacks: names and presets, separated by commas; clean comes first in any case."""
    names = ["clean"]
    for part in text.split(","):
        names += PRESETS.get(part.strip(), [part.strip()])
        if part.strip() == "all" and importlib.util.find_spec("autoattack") is None:
            names.remove("autoattack-official")
            print(f"left out: {GET_AUTOATTACK}")
    return {name: find_attack(name) for name in dict.fromkeys(names)}


# -------------------------------------------------------------------------------------------------------- evaluator


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a proportion right / n, in % (Wilson 1927)."""
    z, p = 1.959964, right / n
    center, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (center - spread) / (1 + z * z / n), (center + spread) / (1 + z * z / n)
    return 100 * max(low, 0.0), 100 * min(high, 1.0)


@torch.no_grad()
def predict_logits(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def predict(model: nn.Module, x: Tensor) -> Tensor:
    """The predicted classes (B,), in float32; -1, which is never right, where a logit is not finite."""
    logits = predict_logits(model, x)
    return torch.where(logits.isfinite().all(1), logits.argmax(1), -1)


def check_ball(name: str, x_adv: Tensor, x: Tensor, eps: float) -> None:
    """An image outside the ball or the range would make a figure worthless: raises UserError."""
    tolerance = 1e-6
    distance = float((x_adv - x).abs().max())
    if not distance <= eps + tolerance:
        raise common.UserError(f"attack {name} left the ball: distance {distance:.6g}, eps {eps:.6g}")
    if float(x_adv.min()) < -tolerance or float(x_adv.max()) > 1 + tolerance:
        raise common.UserError(f"attack {name} left [0, 1]: {float(x_adv.min()):.6g} to {float(x_adv.max()):.6g}")


def survivors(
    model: nn.Module, name: str, attack: Attack, x: Tensor, y: Tensor, right: Tensor, settings: dict
) -> tuple[Tensor, int]:
    """Which images, among those that are `right` (N,) clean, stay so under the attack; and how many faults it met."""
    torch.manual_seed(settings["seed"])  # so that no attack depends on which others ran before it
    budget = {"eps": settings["eps"]}
    if steps := steps_of(attack):
        chosen = settings["step_size"]
        budget["step_size"] = step_size(settings["known"], settings["eps"], steps) if chosen is None else chosen
    restarts = settings["restarts"] if getattr(attack, "func", attack) in START_AT_RANDOM else 1
    right, faults = right.clone(), 0
    for _ in range(restarts):
        standing = right.nonzero().flatten()
        for first in range(0, len(standing), settings["batch_size"]):
            rows = standing[first : first + settings["batch_size"]]
            try:
                x_adv = attack(model, x[rows], y[rows], **budget)
            except (common.UserError, RuntimeError) as error:
                raise common.UserError(f"attack {name} failed: {error}") from error
            check_ball(name, x_adv, x[rows], settings["eps"])
            prediction = predict(model, x_adv)
            right[rows] = prediction == y[rows]
            faults += int((prediction < 0).sum())
    return right, faults


def evaluate(model: nn.Module, attacks: dict[str, Attack], x: Tensor, y: Tensor, settings: dict) -> dict:
    """Run the attacks on images x (N, C, H, W) in [0, 1] with labels y (N,).

    settings: known (dataset), eps, step_size (None: by attack), restarts, batch_size, seed. Returns `prediction` (N,),
    `right` {attack: bool (N,)}, `seconds` and `faults` {attack: count of images whose logits were not finite}.
    """
    model.eval()
    prediction = torch.cat([predict(model, part) for part in x.split(settings["batch_size"])])
    right, seconds, faults = {}, {}, {}
    for name, attack in attacks.items():
        start = time.perf_counter()
        right[name], faults[name] = survivors(model, name, attack, x, y, prediction == y, settings)
        seconds[name] = time.perf_counter() - start
        print(f"  {name:<20} {100 * right[name].float().mean():6.2f} %  {seconds[name]:8.1f} s", file=sys.stderr)
    faults["clean"] += int((prediction < 0).sum())
    return {"prediction": prediction, "right": right, "seconds": seconds, "faults": faults}


# ----------------------------------------------------------------------------------------------------------- models


@contextmanager
def imports_from(folder: Path) -> Iterator[None]:
    """Imports look in `folder` first, and find its own models.py or common.py rather than ours."""
    ours = {name: sys.modules.pop(name, None) for name in ("models", "common")}
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.modules.update({name: module for name, module in ours.items() if module})


def user_model(text: str) -> tuple[nn.Module, str]:
    """The module that FILE.py:FUNCTION makes, and its name."""
    path, _, function = text.rpartition(":")
    if not path:
        raise common.UserError(f"--model {text}: give FILE.py:FUNCTION")
    if not Path(path).is_file() or not path.endswith(".py"):
        raise common.UserError(f"--model {text}: there is no Python file {path}")
    spec = importlib.util.spec_from_file_location(f"user_{Path(path).stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        with imports_from(Path(path).resolve().parent):
            spec.loader.exec_module(module)
            model = getattr(module, function)()
    except (Exception, SystemExit) as error:
        raise common.UserError(f"--model {text}: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise common.UserError(f"--model {text}: returned a {type(model).__name__}, not an nn.Module")
    return model, f"{Path(path).stem}:{function}"


def foreign_options(args: argparse.Namespace) -> dict:
    """build_model's arguments for a bare state dict, from the flags; {} where they do not say enough.

    The published HE models standardize their input by CIFAR-10's statistics inside the network, TRADES and MART do not.
    """
    if not (args.arch and args.dataset):
        return {}
    data = common.load_data(args.dataset, args.data_dir or "data")
    linear = args.head == "linear"
    margin = {"linear": 0.0, "he": 0.2, "mhe": 0.1}[args.head]
    normalize = (data.known == "cifar10" and not linear) if args.normalize is None else args.normalize
    statistics = {"mean": [0.4914, 0.4822, 0.4465], "std": [0.2471, 0.2435, 0.2616]} if normalize else {}
    return statistics | {
        "arch": args.arch,
        "head": args.head,
        "num_classes": data.num_classes,
        "in_channels": data.in_channels,
        "image_size": data.image_size,
        "scale": (1.0 if linear else 15.0) if args.scale is None else args.scale,
        "margin": margin if args.margin is None else args.margin,
    }


def model_name(path: Path) -> str:
    """A run's directory names its checkpoints; a file on its own is named by its stem."""
    folder = path.resolve().parent.name
    return {"best.pt": folder, "last.pt": f"{folder}-last"}.get(path.name, path.stem)


def load_models(args: argparse.Namespace) -> list[tuple[str, nn.Module, dict]]:
    """(name, model, meta) for each checkpoint and --model, names made distinct."""
    found, foreign = [], foreign_options(args)
    for path in args.checkpoints:
        file = common.checkpoint_file(path)
        model, meta = common.load_checkpoint(file, args.device, **foreign)
        found.append((model_name(file), model, meta | {"checkpoint": str(file)}))
    if args.arch and not any("args" not in meta for _, _, meta in found):
        raise common.UserError("--arch is for a bare state dict; these checkpoints say themselves what they are")
    for text in args.model:
        model, name = user_model(text)
        found.append((name, model.to(args.device).eval(), {"checkpoint": text}))
    if not found:
        raise common.UserError("name a checkpoint, a run directory, or --model FILE.py:FUNCTION")
    names = [name for name, _, _ in found]
    if len(set(names)) < len(names):
        found = [(f"{i + 1}-{name}", model, meta) for i, (name, model, meta) in enumerate(found)]
    return found


def load_test_set(args: argparse.Namespace, found: list[tuple[str, nn.Module, dict]]) -> common.Data:
    """The one dataset that all models are tested on, and the check that each of them fits it."""
    trained_on = {meta["args"]["dataset"]: meta["args"]["data_dir"] for _, _, meta in found if "args" in meta}
    if not args.dataset and len(trained_on) != 1:
        names = ", ".join(trained_on) or "none of the models says which"
        raise common.UserError(f"which dataset? ({names}): give --dataset")
    dataset = args.dataset or next(iter(trained_on))
    folder = trained_on.get(dataset) or next(iter(trained_on.values()), "data")
    data = common.load_data(dataset, args.data_dir or folder)
    for name, model, _ in found:
        check_fit(name, model, data, args.device)
    return data


def check_fit(name: str, model: nn.Module, data: common.Data, device: str) -> None:
    """Raises UserError where the model was built for other images or classes, or does not return logits (B, K)."""
    shape, classes = tuple(data.x_test.shape[1:]), data.num_classes
    if isinstance(model, models.Classifier):
        built = model.options
        wants = (built["in_channels"], built["image_size"], built["image_size"])
        if wants != shape or built["num_classes"] < classes:
            raise common.UserError(
                f"{name} ({built['arch']}) takes images {wants} in {built['num_classes']} classes, "
                f"but {data.name} has {shape} in {classes}"
            )
    try:
        logits = predict_logits(model, common.to_float(data.x_test[:2]).to(device))
    except Exception as error:
        raise common.UserError(f"{name} fails on images {shape}: {type(error).__name__}: {error}") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < classes:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise common.UserError(f"{name} must return logits (B, {classes}); for 2 images it returned {got}")
    if logits.dtype not in (torch.float32, torch.float64):
        raise common.UserError(f"{name} returns logits in {logits.dtype}, whose ties hide errors; return float32")


# ---------------------------------------------------------------------------------------------------------- reports


def report(name: str, meta: dict, outcome: dict, settings: dict) -> dict:
    """What eval.json says of one model."""
    right = {attack: verdict.cpu().numpy() for attack, verdict in outcome["right"].items()}
    right["worst case"] = np.logical_and.reduce(list(right.values()))
    rows = {}
    for attack, verdict in right.items():
        low, high = wilson(int(verdict.sum()), len(verdict))
        rows[attack] = {
            "right": int(verdict.sum()),
            "n": len(verdict),
            "accuracy": 100 * float(verdict.mean()),
            "low": low,
            "high": high,
            "seconds": outcome["seconds"].get(attack),
            "not_finite": outcome["faults"].get(attack, 0),
        }
    kept = {key: meta[key] for key in ("checkpoint", "method", "epoch", "model_options", "args") if key in meta}
    return {"model": name, **settings, **kept, "attacks": rows}


def interval(row: dict) -> str:
    return f"{row['low']:.2f} - {row['high']:.2f}"


def heading(result: dict) -> str:
    n = result["attacks"]["clean"]["n"]
    return f"{result['dataset']}, n = {n} test images, Linf eps {result['eps']:.4g}; in brackets the 95 % interval"


def print_report(result: dict) -> None:
    rows = result["attacks"]
    worst = rows["worst case"]
    print(f"\n{result['model']} on {heading(result)}")
    print(f"worst case over all attacks {worst['accuracy']:.2f} % ({interval(worst)})")
    print(f"\n{'attack':<20} {'accuracy':>9} {'95 % interval':>16} {'right/n':>12} {'seconds':>9}")
    for attack, row in rows.items():
        share = f"{row['right']}/{row['n']}"
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.1f}"
        print(f"{attack:<20} {row['accuracy']:9.2f} {interval(row):>16} {share:>12} {seconds:>9}")
        if row["not_finite"]:
            print(f"FAULT: logits that are not finite on {row['not_finite']} images under {attack}; counted as wrong")


def print_comparison(results: list[dict]) -> None:
    """Models by attacks, the worst case first."""
    width = max(len(result["model"]) for result in results)
    columns = ["worst case", *(attack for attack in results[0]["attacks"] if attack != "worst case")]
    print(f"\n{heading(results[0])}")
    print(" " * width + "".join(f" {attack:>23}" for attack in columns))
    for result in results:
        rows = [result["attacks"][attack] for attack in columns]
        cells = [f"{row['accuracy']:.2f} ({interval(row)})" for row in rows]
        print(f"{result['model']:<{width}}" + "".join(f" {cell:>23}" for cell in cells))


def write_results(out: Path, results: list[dict]) -> None:
    """eval.json, eval.csv and eval.png for one model or for a comparison."""
    text = json.dumps(results[0] if len(results) == 1 else results, indent=2)
    common.write_atomically(out / "eval.json", lambda file: file.write(text), "w")
    fields = ["model", "attack", "right", "n", "accuracy", "low", "high", "seconds", "not_finite"]
    rows = [{"model": r["model"], "attack": attack, **row} for r in results for attack, row in r["attacks"].items()]

    def write_csv(file: object) -> None:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)

    common.write_atomically(out / "eval.csv", write_csv, "w")
    plot_results(results, out / "eval.png")


def write_verdicts(out: Path, index: Tensor, y: Tensor, outcome: dict) -> None:
    arrays = {"index": index, "label": y, "clean_prediction": outcome["prediction"], **outcome["right"]}
    arrays = {key: value.cpu().numpy() for key, value in arrays.items()}
    common.write_atomically(out / "verdicts.npz", lambda file: np.savez_compressed(file, **arrays))


def plot_results(results: list[dict], path: Path) -> None:
    """Accuracy with its interval by attack, one bar a model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    attacks = list(results[0]["attacks"])
    height = 0.8 / len(results)
    figure, axis = plt.subplots(figsize=(7, 1 + 0.32 * len(attacks) * max(1, len(results) / 2)), layout="constrained")
    for i, result in enumerate(results):
        rows = list(result["attacks"].values())
        accuracy = np.array([row["accuracy"] for row in rows])
        error = np.abs([[row["low"] for row in rows], [row["high"] for row in rows]] - accuracy)
        places = np.arange(len(attacks)) + (i - (len(results) - 1) / 2) * height
        axis.barh(places, accuracy, height * 0.9, xerr=error, label=result["model"], error_kw={"linewidth": 0.8})
        for place, value, high in zip(places, accuracy, error[1], strict=True):
            axis.text(value + high + 1, place, f"{value:.1f}", va="center", fontsize=8)
    axis.set(yticks=range(len(attacks)), yticklabels=attacks, xlim=(0, 110), ylim=(len(attacks) - 0.5, -0.5))
    first = results[0]
    n = first["attacks"]["clean"]["n"]
    axis.set_xlabel(f"accuracy (%), 95 % interval; {first['dataset']}, n = {n}, Linf eps {first['eps']:.3g}")
    if len(results) > 1:
        figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------------------- main


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = common.Parser(__doc__)
    flag, number = parser.add_argument, common.number
    flag("checkpoints", nargs="*", metavar="CHECKPOINT_OR_RUN_DIR")
    flag(
        "--model", action="append", default=[], metavar="FILE.py:FUNCTION", help="a function that returns an nn.Module"
    )
    flag("--attacks", default="quick", help=f"names, or {', '.join(PRESETS)}, separated by commas (default: quick)")
    flag("--dataset", metavar="NAME_OR_NPZ", help="(default: what the checkpoint was trained on)")
    flag("--data-dir", help="(default: as in training)")
    flag("--n", type=number(int, 1), help="test images, a seeded choice (default: all)")
    flag(
        "--eps",
        type=number(float, 0, 1),
        help="(default: the papers': mnist 0.3, cifar and tiny 0.031, imagenet 4/255)",
    )
    flag("--step-size", type=number(float, 0, 1), help="(default: the papers' where it crosses the ball in N steps)")
    flag("--restarts", type=number(int, 1), default=1, help="of the attacks that start at random (default: 1)")
    flag("--batch-size", type=number(int, 1), default=250, help="(default: 250)")
    flag("--seed", type=number(int, 0, 2**63), default=0, help="(default: 0)")
    flag("--device", type=common.device_flag, default=common.default_device(), help="(default: %(default)s)")
    flag("--out", help="(default: an eval folder beside the checkpoint; for several models ./eval)")
    group = parser.add_argument_group("for a bare state dict")
    flag = group.add_argument
    flag("--arch", help="such as wrn-34-10")
    flag("--head", default="linear", choices=("linear", "he", "mhe"), help="(default: linear)")
    flag("--scale", type=number(float, 0), help="s of the training loss (default: 15, for linear 1)")
    flag("--margin", type=number(float, 0), help="m of the training loss (default: he 0.2, mhe 0.1, linear 0)")
    on_off = argparse.BooleanOptionalAction
    flag("--normalize", action=on_off, help="CIFAR-10 mean and std in the network (default: on for he and mhe)")
    return parser.parse_args(argv)


def output_folder(args: argparse.Namespace, count: int) -> Path:
    if args.out:
        return Path(args.out)
    if count > 1 or not args.checkpoints:
        return Path("eval")
    return common.checkpoint_file(args.checkpoints[0]).parent / "eval"


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    attacks = named_attacks(args.attacks)
    found = load_models(args)
    # Verdicts are in float32: no TF32 on CUDA, neither by default nor where a user's model switched it on.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    data = load_test_set(args, found)
    settings = {
        "dataset": data.name,
        "known": data.known,
        "eps": THREAT[data.known][0] if args.eps is None else args.eps,
        "step_size": args.step_size,
        "restarts": args.restarts,
        "batch_size": args.batch_size,
        "seed": args.seed,
        "device": args.device,
        "torch": str(torch.__version__),
        "command": shlex.join(["python", "eval_all.py", *(sys.argv[1:] if argv is None else argv)]),
    }
    # Files may be ordered class by class, so a subset is drawn at random, the same for every model and every seed.
    order = np.random.default_rng(common.SPLIT_SEED).permutation(len(data.y_test))
    index = torch.from_numpy(np.sort(order[: args.n]))
    x, y = common.to_float(data.x_test[index]).to(args.device), data.y_test[index].to(args.device)
    out, results = output_folder(args, len(found)), []
    folders = [out / name.replace(":", "-") if len(found) > 1 else out for name, _, _ in found]
    for folder in folders:  # before the work, so that no result is lost for want of a place
        folder.mkdir(parents=True, exist_ok=True)
    for (name, model, meta), folder in zip(found, folders, strict=True):
        print(f"{name}: {len(attacks)} attacks on {len(y)} images", file=sys.stderr)
        outcome = evaluate(model, attacks, x, y, settings)
        results.append(report(name, meta, outcome, settings))
        write_verdicts(folder, index, y, outcome)
        write_results(folder, results[-1:])
        print_report(results[-1])
    if len(results) > 1:
        write_results(out, results)
        print_comparison(results)
    print(f"\nwritten to {out}")


if __name__ == "__main__":
    common.cli(main)
