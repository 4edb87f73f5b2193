"""Figures and tables about trained models, besides the attacks of eval_all.py.

    python analyze.py runs/A --curves --gradients --features --angles --examples
    python analyze.py runs/A runs/B --curves --corruptions data/CIFAR-10-C

Attacked images are those of PGD-20 on the training loss. Test images are kept in memory: ImageNet needs --num-images.
"""

import copy
import json
import math
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import common
import eval_all
import models

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import quantile_test
from sklearn.manifold import TSNE
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor, nn

ANALYSES = {
    "curves": "accuracy against eps, steps and restarts, under PGD on the cross-entropy and on the margin",
    "gradients": "gradient norms of the weights, attacked / clean, by layer, of images and of batches (HE, Fig. 3)",
    "features": "2,000 features, clean and attacked, in the plane: t-SNE, or z itself if it has two dimensions",
    "angles": "degrees between class weights, and between features and the weights of their classes (ABCL, App. B)",
    "examples": "clean images, attacked images and perturbations",
    "corruptions": "accuracy on CIFAR-10-C, CIFAR-100-C or ImageNet-C, as published, in DIR",
    "geodesic": "D-SphereNet's rejection by the angle (Sec. 4.3), under PGD-40 and under an attack that evades it",
}
CURVES = {"PGD on the cross-entropy": "pgd-{}-scaled", "PGD on the margin": "cw-inf-{}"}
NOT_IN_MCA = {"gaussian_blur", "saturate", "spatter", "speckle_noise"}  # the published sets' extra corruptions
GEODESIC = {  # the rates of geodesic inference, and what they mean
    "accuracy": "accuracy on clean images if none is rejected",
    "accepted accuracy": "accuracy on the clean images that are not rejected",
    "accepted accuracy attacked": "accuracy on the attacked images that are not rejected",
    "rejected clean": "share of the clean images that are rejected",
    "rejected adversarial": "share of the adversarial images that are rejected: correct clean, misclassified attacked",
    "broken": "share of all attacked images that are misclassified and accepted",
    "p": "factor of the thresholds of the angle",
    "auroc": "how well the angle tells adversarial images from clean ones: 1 perfectly, 0.5 by chance",
}


@torch.no_grad()
def batched(function: Callable[[Tensor], Tensor], x: Tensor, args: Namespace) -> Tensor:
    return torch.cat([function(images) for images in x.split(args.batch_size)])


def attacked(attack: Callable, net: nn.Module, x: Tensor, y: Tensor, args: Namespace, restart: int = 0) -> Tensor:
    torch.manual_seed(args.seed + restart)
    batches = zip(x.split(args.batch_size), y.split(args.batch_size), strict=True)
    return torch.cat([attack(net, images, labels) for images, labels in batches])


def print_table(title: str, columns: list[str], rows: dict[str, list[str]]) -> None:
    print(f"\n{title}")
    widths = [max(map(len, cells)) for cells in zip(columns, *rows.values(), strict=True)]
    for label, cells in {"": columns, **rows}.items():
        aligned = [f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)]
        print(f"{label:<{max(map(len, rows))}}", *aligned, sep="   ")


def robustness_curves(net: nn.Module, x: Tensor, y: Tensor, args: Namespace) -> dict:
    """n, and for eps, steps and restarts (Carlini et al. 2019) the values `at` and counts `correct` {attack: [...]}."""
    clean = batched(partial(eval_all.predict, net), x, args) == y

    def robust(name: str, eps: float = args.eps, steps: int = 20, restarts: int = 1) -> np.ndarray:
        attack = eval_all.find_attack(CURVES[name].format(steps))
        step_size = eval_all.Settings(eps, args.norm, args.data.known).step_size_for(attack)
        attack = partial(attack, eps=eps, norm=args.norm, step_size=step_size)
        x_adv = attacked(attack, net, x, y, args, restarts - 1)
        return (clean & (batched(partial(eval_all.predict, net), x_adv, args) == y)).cpu().numpy()

    eps = [factor * args.eps for factor in (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2)]
    axes, result = {"eps": eps, "steps": [1, 2, 5, 10, 20, 50, 100], "restarts": [1, 2, 3, 4, 5]}, {"n": len(y)}
    for axis, at in axes.items():
        correct = np.array([[robust(name, **{axis: value}) for name in CURVES] for value in at])
        correct = np.logical_and.accumulate(correct) if axis == "restarts" else correct
        result[axis] = {"at": at, "correct": dict(zip(CURVES, correct.sum(2).T.tolist(), strict=True))}
    return result


def plot_curves(results: dict[str, dict], args: Namespace) -> None:
    """Accuracy with its 95 % band: of one model a line for each attack, of several a line for each model."""
    (model, first), *others = results.items()
    eps, n = f"eps {args.eps:.4g}", first["n"]
    labels = {"eps": "eps, 20 steps", "steps": f"steps, {eps}", "restarts": f"restarts of 20 steps, {eps}"}
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for (axis, label), panel in zip(labels.items(), figure.subplots(1, 3, sharey=True), strict=True):
        at, lines = first[axis]["at"], first[axis]["correct"]
        if others:
            lines = {name: np.min([*own[axis]["correct"].values()], 0) for name, own in results.items()}
        for (name, counts), marker in zip(lines.items(), 9 * "os^Dv", strict=False):
            rows = [eval_all.accuracy(torch.arange(n) < count) for count in counts]
            accuracy, low, high = ([row[key] for row in rows] for key in ("accuracy", "low", "high"))
            (line,) = panel.plot(at, accuracy, marker=marker, markersize=4, label=name)
            panel.fill_between(at, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        panel.set(xlabel=label, ylim=(0, 101), xscale="log" if axis == "steps" else "linear")
        panel.grid(alpha=0.3)
    figure.supylabel("accuracy (%), 95 % band", fontsize=10)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    who = "the stronger of PGD on the cross-entropy and on the margin" if others else model
    figure.suptitle(f"{who}: {args.ball}, n = {n:,}", fontsize=9)
    figure.savefig(args.out / "curves.png", dpi=150)


def gradient_norms(net: nn.Module, x: Tensor, y: Tensor, size: int = 1) -> tuple[list[str], Tensor]:
    """||grad of the training loss|| of batches of `size`, by weight of two or more axes: names, (batches, layers)."""
    loss, norms = eval_all.training_loss(net, with_margin=True), []
    weights = {name: p for name, p in net.named_parameters() if p.ndim > 1 and p.requires_grad}
    for images, labels in zip(x.split(size), y.split(size), strict=True):
        grads = torch.autograd.grad(loss(net(images), labels).mean(), list(weights.values()), allow_unused=True)
        used = {name: grad.norm() for name, grad in zip(weights, grads, strict=True) if grad is not None}
        norms.append(torch.stack(list(used.values())))
    return [name.removesuffix(".weight") for name in used], torch.stack(norms)


def gradient_norm_ratio(net: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> dict:
    """||grad_w L(x*)|| / ||grad_w L(x)|| by layer w (HE, Fig. 3): `batch`, the mean of batches of 128 in train mode; of
    100 single images in eval mode, without `left_out` ones that have none, `mean`, `median`, its 95 % interval."""
    training = copy.deepcopy(net).train(len(y) > 1)  # its batch statistics change
    whole, few = max(len(y) // 128 * 128, 128), torch.linspace(0, len(y) - 1, min(100, len(y))).round().long()
    norms = [gradient_norms(training, images[:whole], y[:whole], 128)[1] for images in (x_adv, x)]
    batch = (norms[0] / norms[1]).nanmean(0)
    layers, clean = gradient_norms(net, x[few], y[few])
    ratio = gradient_norms(net, x_adv[few], y[few])[1] / clean
    ratio = ratio[(clean.isfinite() & ratio.isfinite()).all(1)]
    if not len(ratio):
        raise common.UserError("--gradients: on no clean image has the loss a finite gradient other than 0")
    intervals = [quantile_test(column, p=0.5).confidence_interval(0.95) for column in ratio.T.cpu().numpy()]
    low, high = ([None if math.isnan(end) else float(end) for end in ends] for ends in zip(*intervals, strict=True))
    centers = {"batch": batch.tolist(), "mean": ratio.mean(0).tolist(), "median": ratio.quantile(0.5, 0).tolist()}
    return {"layers": layers, **centers, "low": low, "high": high, "n": len(ratio), "left_out": len(few) - len(ratio)}


def plot_gradients(results: dict[str, dict], args: Namespace) -> None:
    """By layer, the first on top: the median ratio with its interval, the mean, and that of batches (HE, Fig. 3)."""
    layers = list(dict.fromkeys(layer for own in results.values() for layer in own["layers"]))
    figure = Figure(figsize=(6, 1.8 + 0.3 * len(layers)), layout="constrained")
    axis = figure.subplots()
    for i, (name, own) in enumerate(results.items()):
        batch, mean, median, low, high = (np.array(own[k], float) for k in ("batch", "mean", "median", "low", "high"))
        places = np.array([layers.index(layer) for layer in own["layers"]]) + (i + 0.5) / (2 * len(results)) - 0.25
        bars = {"xerr": [median - low, high - median], "capsize": 2, "linewidth": 1, "markersize": 4}
        axis.errorbar(median, places, fmt="D", color=f"C{i}", label=f"{name}, n = {own['n']}", **bars)
        axis.plot(mean, places, "o", color=f"C{i}", markerfacecolor="none", markersize=4)
        axis.plot(batch, places, "x", color=f"C{i}", markersize=4)
    axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set(xscale="log", yticks=range(len(layers)), yticklabels=layers, ylim=(len(layers) - 0.5, -0.5))
    axis.set_xlabel("attacked / clean; filled: median, 95 % interval;\nhollow: mean; cross: of batches", fontsize=8)
    axis.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    figure.suptitle(f"gradients of the training loss: {args.ball}, PGD-20", fontsize=9)
    figure.savefig(args.out / "gradients.png", dpi=150)


def angles(net: nn.Module, x: Tensor, y: Tensor, args: Namespace) -> dict:
    """In degrees: the `smallest` and `largest` angle between two class weights (MMC: centers), and the mean one
    `within` a class, between the feature of a clean image and the weight of its class (ABCL, App. B)."""
    weight = (net.fc.centers if hasattr(net.fc, "centers") else net.fc.weight).detach()
    between = models.arccos(models.cosine(weight, weight))[~torch.eye(len(weight), dtype=torch.bool, device=x.device)]
    within = models.arccos(models.cosine(batched(net.features, x, args), weight).gather(1, y[:, None])).mean()
    found = {"smallest": between.min(), "largest": between.max(), "within": within}
    return {name: math.degrees(angle) for name, angle in found.items()}


def feature_map(model: eval_all.Model, x: Tensor, x_adv: Tensor, y: Tensor, args: Namespace) -> dict:
    """Draws features, clean and attacked, of ten classes at most: one t-SNE of both (ABCL, App. D), or z if d = 2."""
    z = batched(model.net.features, torch.cat([x, x_adv]), args).cpu().numpy()
    method, label = "z" if z.shape[1] == 2 else "t-SNE", y.cpu().numpy()
    if method == "t-SNE":
        z = TSNE(perplexity=min(30, len(z) / 4), init="pca", random_state=args.seed % 2**32).fit_transform(z)
    clean, moved = np.split(z.astype(float).round(3), 2)
    correct = (batched(partial(eval_all.predict, model.net), x_adv, args) == y).cpu().numpy()
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    right.scatter(*clean.T, s=6, color="0.85", linewidths=0)
    for k, color in zip(np.unique(label), "C0 C1 C2 C3 C4 C5 C6 black C8 C9".split(), strict=False):  # C7 is gray
        left.scatter(*clean[label == k].T, s=10, color=color, linewidths=0, label=k)
        right.scatter(*moved[(label == k) & correct].T, s=10, color=color, linewidths=0)
        right.scatter(*moved[(label == k) & ~correct].T, s=14, color=color, marker="x", linewidths=0.8)
    left.set_xlabel(f"{method}, clean")
    right.set_xlabel(f"{method}, attacked (x: misclassified, gray: clean)")
    figure.legend(loc="outside right center", title="true class", fontsize=8, markerscale=2)
    figure.suptitle(f"{model.name}: {args.ball}, PGD-20, n = {len(y):,}", fontsize=9)
    figure.savefig(args.out / f"features-{model.name}.png", dpi=150)
    shown = {"label": label, "correct_attacked": correct, "clean": clean, "attacked": moved}
    return {"method": method} | {key: value.tolist() for key, value in shown.items()}


def examples(model: eval_all.Model, x: Tensor, x_adv: Tensor, y: Tensor, args: Namespace) -> dict:
    """Draws eight images, those first that the attack fools, and perturbations; returns rows, labels, predictions."""
    clean, moved = (batched(partial(eval_all.predict, model.net), images, args) for images in (x, x_adv))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(common.SPLIT_SEED)).to(y.device)
    fooled = ((clean == y) & (moved != y))[order]
    rows = torch.cat([order[fooled], order[~fooled]])[:8]
    shown = {"label": y, "clean": clean, "attacked": moved}
    shown = {"row": rows.tolist()} | {key: value[rows].tolist() for key, value in shown.items()}
    delta, widest = (x_adv - x)[rows], max(float((x_adv - x)[rows].abs().max()), 1e-6)
    parts = {"clean": x[rows], "attacked": x_adv[rows], f"perturbation\n(± {widest:.3g})": delta / (2 * widest) + 0.5}
    figure = Figure(figsize=(1.1 * len(rows) + 0.4, 4.2), layout="constrained")
    for (name, images), panels in zip(parts.items(), figure.subplots(3, len(rows), squeeze=False), strict=True):
        panels[0].set_ylabel(name)
        for i, (image, axis) in enumerate(zip(images.clamp(0, 1).cpu(), panels, strict=True)):
            axis.imshow(image.permute(1, 2, 0).numpy(), cmap="gray" if name in shown else "RdBu_r", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[], title=f"label {shown['label'][i]}" if name == "clean" else "")
            axis.set_xlabel(f"predicted {shown[name][i]}" if name in shown else "")
    figure.suptitle(f"{model.name}: {args.ball}, PGD-20, n = {len(y):,}", fontsize=9)
    figure.savefig(args.out / f"examples-{model.name}.png", dpi=150)
    return shown


def corruption_sets(folder: Path, data: common.Data) -> Iterator[tuple[str, int, Tensor | common.ImageFiles, Tensor]]:
    """(corruption, severity, images, labels) of CIFAR-10-C or ImageNet-C in `folder`, as published. Raises UserError.
    CIFAR-10-C: NAME.npy has all images at severity 1, then at 2, up to 5. ImageNet-C: NAME/SEVERITY/WNID/*.JPEG."""
    _, channels, height, width = data.x_test.shape
    for path in sorted(set(folder.glob("*.npy")) - {folder / "labels.npy"}):
        try:
            x, y = (np.load(file, mmap_mode="r") for file in (path, folder / "labels.npy"))
        except Exception as error:  # numpy raises nearly anything on a damaged file
            raise common.UserError(f"{path}, or labels.npy beside it: not a readable .npy ({error})") from None
        if x.dtype != np.uint8 or x.shape[1:] != (height, width, channels) or not len(x) or len(x) % 5:
            raise common.UserError(f"{path}: {x.dtype} {x.shape}; needed: uint8 (5 N, {height}, {width}, {channels})")
        if y.shape != x.shape[:1] or y.dtype.kind not in "iu" or not 0 <= y.min() <= y.max() < data.num_classes:
            raise common.UserError(f"{folder / 'labels.npy'}: needed: {len(x)} integers below {data.num_classes}")
        for i, (images, labels) in enumerate(zip(np.split(x, 5), np.split(y, 5), strict=True)):
            yield path.stem, i + 1, torch.tensor(images).permute(0, 3, 1, 2), torch.tensor(labels.astype(np.int64))
    for path in sorted(folder.glob("*/[1-5]")):
        listing = common.torchvision.datasets.ImageFolder(path)
        if len(listing.classes) != data.num_classes:
            raise common.UserError(f"{path}: {len(listing.classes)} classes, but the model has {data.num_classes}")
        files, labels = zip(*listing.samples, strict=True)
        yield path.parent.name, int(path.name), common.ImageFiles(files, height, [], []), torch.tensor(labels)


def corruption_accuracy(net: nn.Module, args: Namespace) -> dict:
    """`accuracy` {corruption: [% at severity 1 to 5]} and `mCA`, their mean (HE, Table 5), without NOT_IN_MCA; its 95 %
    interval is from the spread over the n images: corrupted copies of one image are not independent."""
    correct = {}
    for name, _, x, y in corruption_sets(args.corruptions, args.data):
        order = np.random.default_rng(common.SPLIT_SEED).permutation(len(y))  # files may be sorted by class
        batches = torch.from_numpy(np.sort(order[: args.num_images])).split(args.batch_size)
        predicted = [eval_all.predict(net, common.images_at(x, rows, args.device)).cpu() for rows in batches]
        correct.setdefault(name, []).append((torch.cat(predicted) == y[torch.cat(batches)]).double())
    counted = [copy for name, copies in correct.items() if name not in NOT_IN_MCA for copy in copies]
    if not counted or any(len(copies) != 5 for copies in correct.values()):
        raise common.UserError(f"{args.corruptions}: needed: NAME.npy (CIFAR-10-C), NAME/1 to 5 (ImageNet-C)")
    share = torch.stack(counted).mean(0)
    mca, half_width = 100 * float(share.mean()), 196 * float(share.std(correction=0)) / math.sqrt(len(share))
    accuracy = {name: [100 * float(copy.mean()) for copy in copies] for name, copies in correct.items()}
    return {"n": len(share), "accuracy": accuracy, "mCA": mca, "low": mca - half_width, "high": mca + half_width}


def print_corruptions(results: dict[str, dict], args: Namespace) -> None:
    rows, first = {}, next(iter(results.values()))
    for name in first["accuracy"]:
        cells = [("{:7.2f}" * 5).format(*own["accuracy"][name]) for own in results.values()]
        rows[name + " *" * (name in NOT_IN_MCA)] = cells
    rows["mCA"] = ["{mCA:.2f} ({low:.2f} - {high:.2f})".format(**own) for own in results.values()]
    about = f"n = {first['n']:,}; mCA: mean of all but those with *, with its 95 % interval"
    print_table(f"{args.corruptions}: accuracy (%) at severity 1 to 5, {about}", [*results], rows)


def geodesic_pgd(net, x, y, *, thresholds: Tensor, eps: float, step_size: float, steps: int, restarts=10) -> Tensor:
    """An adaptive attack on geodesic inference, ours: Linf PGD on the cosine to the nearest wrong class until that is
    predicted and accepted, thresholds (K,) in radians. Farther than eps / 3 features are often 0, with no gradient."""
    adversarial, left = x.clone(), torch.arange(len(x), device=x.device)
    with common.frozen_eval(net):
        for _ in range(restarts):
            images, labels = x[left], y[left]
            x_adv = common.random_start(images, eps / 3, "linf")
            for size in torch.linspace(step_size, 0, steps + 1)[:-1].tolist():
                x_now = x_adv.clone().requires_grad_()
                logits, z = net(x_now, with_features=True)
                cos, wrong = models.cosine(z, net.fc.weight).scatter(1, labels[:, None], -1.0).max(1)
                (grad,) = torch.autograd.grad(cos.sum(), x_now)
                done = common.fooled(logits, labels) & (models.arccos(cos) < thresholds[wrong] - 1e-4)
                x_adv = common.project(x_adv + size * grad.sign() * ~done[:, None, None, None], images, eps, "linf")
            adversarial[left] = x_adv
            left = left[~done]
    return adversarial


def geodesic(model: eval_all.Model, x: Tensor, y: Tensor, args: Namespace) -> dict:
    """D-SphereNet, Sec. 4.3: an input predicted k is rejected if its angle to W_k is above p * (mu_k + sd_k); the rates
    of each attack. --geodesic-p 0: p maximizes the share of rejected adversarial minus clean held-out images."""
    net, (mean, std) = model.net, (torch.tensor(model.meta["geodesic"][key]) for key in ("mean", "std"))
    thresholds, p = (mean + std).clamp(min=1e-6).to(args.device), args.geodesic_p
    budget = dict(eps=args.eps, step_size=2.5 * args.eps / 40, steps=40)
    pgd_40 = partial(common.pgd, loss=eval_all.cross_entropy, **budget)

    @torch.no_grad()
    def infer(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = batched(net.features, images, args)
        logits = net.fc(z)
        predicted = logits.argmax(1)
        angle = models.arccos(models.cosine(z, net.fc.weight)).gather(1, predicted[:, None]).squeeze(1)
        return (predicted == labels) & logits.isfinite().all(1), angle, angle / thresholds[predicted]  # rejected: > p

    if not p:
        data = common.load_data(*(vars(args).get(k) or model.meta["args"][k] for k in ("dataset", "data_dir", "limit")))
        held_out, labels = common.images_at(data.x_train, data.val, args.device), data.y_train[data.val].to(args.device)
        correct, _, clean = infer(held_out, labels)
        correct_adv, _, moved = infer(attacked(pgd_40, net, held_out, labels, args), labels)
        ratios = torch.cat([moved[correct & ~correct_adv], clean]).cpu()
        rejected_clean, rejected, at = roc_curve(np.arange(len(ratios)) < len(ratios) - len(clean), ratios)
        p = float(at[1:][(rejected - rejected_clean)[1:].argmax()]) * (1 - 1e-6)  # an image at this ratio is rejected

    def rate(flags: Tensor) -> dict | None:
        row = eval_all.accuracy(flags) if len(flags) else None
        return row and {"count": row["correct"], "percent": row["accuracy"]} | {k: row[k] for k in ("n", "low", "high")}

    attacks = {"pgd-40": pgd_40, "geodesic-pgd-40x10": partial(geodesic_pgd, thresholds=p * thresholds, **budget)}
    result, (correct, angle, ratio) = {}, infer(x, y)
    for name, attack in attacks.items():
        correct_adv, angle_adv, ratio_adv = infer(attacked(attack, net, x, y, args), y)
        fooled, rejected, rejected_adv = correct & ~correct_adv, ratio > p, ratio_adv > p
        flags = [correct, correct[~rejected], correct_adv[~rejected_adv], rejected, rejected_adv[fooled]]
        rates = [rate(own) for own in (*flags, ~correct_adv & ~rejected_adv)]
        scores = torch.cat([angle_adv[fooled], angle]).cpu()
        auroc = roc_auc_score(np.arange(len(scores)) < int(fooled.sum()), scores) if fooled.any() else None
        result[name] = dict(zip(GEODESIC, (*rates, p, auroc), strict=True))
    return result


def print_geodesic(results: dict[str, dict], args: Namespace) -> None:
    def cell(value: dict | float | None) -> str:
        if isinstance(value, dict):
            return "{percent:.2f} % ({low:.2f} - {high:.2f}), n = {n}".format(**value)
        return "no such image" if value is None else f"{value:.3f}"

    for attack in ("pgd-40", "geodesic-pgd-40x10"):
        rows = {key: [cell(own[attack][key]) for own in results.values()] for key in GEODESIC}
        print_table(f"geodesic inference under {attack}: {args.ball}; 95 % intervals", [*results], rows)
    print("\n" + "\n".join(f"{key}: {meaning}" for key, meaning in GEODESIC.items()))


def analyze(model: eval_all.Model, x: Tensor, y: Tensor, args: Namespace) -> dict[str, dict]:
    """{analysis: result} of those that were asked for."""
    net, budget = model.net, {"eps": args.eps, "norm": args.norm, "step_size": 2.5 * args.eps / 20, "steps": 20}
    pgd_20 = partial(common.pgd, loss=eval_all.training_loss(net), **budget)

    def craft(count: int) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.linspace(0, len(y) - 1, min(count, len(y))).round().long()  # a test set may be sorted by class
        return x[rows], attacked(pgd_20, net, x[rows], y[rows], args), y[rows]

    analyses = {
        "corruptions": lambda: corruption_accuracy(net, args),
        "angles": lambda: angles(net, x, y, args),
        "features": lambda: feature_map(model, *craft(2000), args),
        "examples": lambda: examples(model, *craft(2000), args),
        "gradients": lambda: gradient_norm_ratio(net, *craft(512)),
        "geodesic": lambda: geodesic(model, x, y, args),
        "curves": lambda: robustness_curves(net, x, y, args),
    }
    return {name: run() for name, run in analyses.items() if getattr(args, name)}


def checked(model: eval_all.Model, x: Tensor, y: Tensor, args: Namespace) -> eval_all.Model:
    """The model, with what every figure of it must carry in its name. Raises UserError if it cannot be analyzed."""
    for name, need in (("features", "features"), ("angles", "features"), ("angles", "fc")):
        if getattr(args, name) and not hasattr(model.net, need):
            raise common.UserError(f"--{name} needs a model with {need}, and {model.name} has none")
    if args.geodesic and "geodesic" not in model.meta:
        raise common.UserError(f"--geodesic needs a checkpoint of train_dsphere.py, which {model.name} is not")
    with common.frozen_eval(model.net):
        checks = eval_all.check_model(model.net, x[:32], y[:32], eval_all.Settings(args.eps, args.norm))
    failed = {check.check for check in checks if not check.passed}
    attacks = any(getattr(args, name) for name in ANALYSES if name not in ("angles", "corruptions"))
    masked = attacks and not eval_all.has_gradient(model.net, x[:1])
    if masked or "images are left as they are" in failed:
        raise common.UserError(f"{model.name} {'has no gradients' if masked else 'changes its images in place'}")
    return model._replace(name=" ".join([model.name, *(m for name, m in eval_all.MARKS.items() if name in failed)]))


def main(argv: list[str] | None = None) -> None:
    parser = eval_all.shared_parser(__doc__)
    for name, text in ANALYSES.items():
        kind = {"metavar": "DIR", "type": Path} if name == "corruptions" else {"action": "store_true"}
        parser.add_argument(f"--{name}", help=text, **kind)
    parser.add_argument("--geodesic-p", type=common.number(float, 0), default=1.0, help="0: chosen on held-out images")
    args = parser.parse_args(argv, Namespace(source=[]))
    if not any(getattr(args, name) for name in ANALYSES):
        parser.error(f"give at least one of --{', --'.join(ANALYSES)}")
    if args.geodesic and args.norm != "linf":
        parser.error("--geodesic: its adaptive attack is for the Linf ball only")
    eval_all.allow_tf32(False)
    found, _, args.data, rows = eval_all.load_models_and_data(args)
    x, y = common.images_at(args.data.x_test, rows, args.device), args.data.y_test[rows].to(args.device)
    eval_all.check_inputs(x, y, {}, settings := eval_all.Settings(args.eps, args.norm, args.data.known))
    args.eps = settings.eps
    found = [checked(model, x, y, args) for model in found]
    args.ball = f"{args.data.name}, {args.norm.capitalize()} eps {args.eps:.4g}"
    args.out = eval_all.output_folder(args, found, "analysis")
    results = {model.name: analyze(model, x, y, args) for model in found}
    if args.angles:
        columns = ["nearest class weights", "farthest class weights", "features to own weight"]
        rows = {name: [f"{angle:.1f}" for angle in own["angles"].values()] for name, own in results.items()}
        print_table(f"angles in degrees: {args.data.name}", columns, rows)
    shows = {"corruptions": print_corruptions, "geodesic": print_geodesic, "curves": plot_curves}
    for name, show in (shows | {"gradients": plot_gradients}).items():
        if getattr(args, name):
            show({model: own[name] for model, own in results.items()}, args)
    about = {"data": args.data.name, "norm": args.norm, "eps": args.eps, "n": len(y), "models": results}
    about |= {"hardware": common.hardware(args.device), "command": " ".join(["python", *sys.argv])}
    common.write_file(json.dumps(about, indent=2).encode(), args.out / "analysis.json")
    print("\nwritten:", *sorted(args.out.iterdir()), sep="\n  ")


if __name__ == "__main__":
    common.cli(main)
