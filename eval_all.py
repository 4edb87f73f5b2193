"""Every attack against any checkpoint: a table, and the worst case over all attacks, image by image.

    python eval_all.py runs/angular_at-digits-s0                           # a run folder (its best.pt) or a .pt file
    python eval_all.py runs/A --attacks autoattack,pgd-40@0.01 --num-images 1000
    python eval_all.py runs/A runs/B --source runs/C --attacks paper       # several models; transfer from C
    python eval_all.py wrn.pt --arch wrn-34-10 --head he --dataset cifar10 # a published TRADES / MART / HE file
    python eval_all.py my_file.py:make_model --dataset cifar10             # any nn.Module on [0, 1] images
    torchrun --nproc_per_node=8 eval_all.py runs/A --attacks autoattack    # the ranks share the batches

In a notebook, for any nn.Module that maps images in [0, 1] to logits:
    x_adv = ATTACKS["pgd-20"](model, x, y, eps=8 / 255)
    result = evaluate(model, x, y, attacks="quick,autoattack", eps=8 / 255)

An attack is a function (model, x, y, *, eps, norm, steps, step_size, **_) -> x_adv. x and x_adv are (B, C, H, W) in
[0, 1], y is (B,), eps and step_size are in pixel units, norm is "linf" or "l2"; steps and step_size come only if its
line in ATTACKS sets `steps`: `"mine-20": Attack(mine, steps=20)`. The model is in eval mode and frozen. Attacks only
propose images; `attack_batch` decides: an image is robust if it is classified correctly in float32, clean and attacked.
"""

import argparse
import csv
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import math
import re
import sys
import tempfile
import time
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import CodeType, ModuleType

import common
import models

import numpy as np
import torch
import torch.nn.functional as F
from pyautoattack import checks
from pyautoattack.autoattack import AutoAttack
from scipy.stats import binomtest
from torch import Tensor, nn
from tqdm import tqdm

# ------------------------------------------------------------------------------------------ attacks in the ball

cross_entropy = partial(F.cross_entropy, reduction="none")  # of each image, (B,)


def training_loss(model: nn.Module, factor: float = 1.0, with_margin: bool = False) -> Callable[..., Tensor]:
    """CE(factor * s * (logits - m * onehot(y)), y) of each image (HE, Eq. 6), s and m the numbers model.scale and
    model.margin: without them, 1 and 0."""
    scale, margin = (getattr(model, name, None) for name in ("scale", "margin"))
    scale = scale if isinstance(scale, int | float) else 1.0
    margin = margin if with_margin and isinstance(margin, int | float) else 0.0
    return partial(common.margin_ce, scale=factor * scale, margin=margin, reduction="none")


def cw_margin(logits: Tensor, y: Tensor) -> Tensor:
    """max over j != y of Z_j, minus Z_y, (B,): positive where the image is misclassified (HE, Sec. B.2)."""
    true = logits.gather(1, y[:, None]).squeeze(1)
    return logits.scatter(1, y[:, None], -math.inf).amax(1) - true


def fgsm(model, x, y, *, eps, norm="linf", loss=cross_entropy, **_):
    """Goodfellow et al. 2015 (HE, Eq. 17): one step of eps along the sign of the gradient."""
    return common.pgd(model, x, y, loss=loss, eps=eps, step_size=eps, steps=1, start=x, norm=norm)


def pgd(model, x, y, *, loss=cross_entropy, start=None, clean_start=False, early_stop=True, **budget):
    """Madry et al. 2018, CE on model(x). On an HE model these are raw cosines: a flat softmax, and a weak attack."""
    early_stop = early_stop and getattr(model, "may_stop", True)
    return common.pgd(model, x, y, loss=loss, start=x if clean_start else start, early_stop=early_stop, **budget)


bim = partial(pgd, clean_start=True)  # Kurakin et al. 2017 (HE, Eq. 18): from the image itself
mim = partial(pgd, clean_start=True, momentum=1.0)  # Dong et al. 2018 (HE, Eq. 19 and 20): L1-normalized gradients
cw_inf = partial(pgd, loss=cw_margin)  # Carlini & Wagner 2017 in the ball: PGD on the margin (Angular-AT, Sec. 5)


def pgd_scaled(model, x, y, *, factor=1.0, with_margin=False, **budget):
    """PGD on CE(factor * s * model(x), y), s the scale that the model was trained with (1 for a linear head)."""
    return pgd(model, x, y, loss=training_loss(model, factor, with_margin), **budget)


adaptive_pgd = partial(pgd_scaled, with_margin=True)  # on the training loss (HE, Sec. 4.1, 'Adaptive attacks')


def pgd_fn(model, x, y, **budget):
    """PGD on CE(W z~, y), z~ the normalized input of model.fc: FN in the attack only (HE, Eq. 12, 13, Table 7)."""
    kept, weight = {}, model.fc.weight  # z of the forward pass that gave the logits
    hook = model.fc.register_forward_pre_hook(lambda fc, inputs: kept.update(z=inputs[0].to(weight.dtype)))
    try:
        return pgd(model, x, y, loss=lambda _, y: cross_entropy(F.linear(F.normalize(kept["z"]), weight), y), **budget)
    finally:
        hook.remove()


def mta(model, x, y, **budget):
    """Multi-target attack (WeightPen, Sec. 4): PGD towards each wrong class, likeliest first, until one succeeds. On an
    MMC model it minimizes the MMC loss of the target, which is minus the target's logit."""
    mmc = isinstance(getattr(model, "fc", None), models.MMCHead)
    towards = (lambda z, t: z.gather(1, t[:, None]).squeeze(1)) if mmc else (lambda z, t: -cross_entropy(z, t))
    targets = model(x).scatter(1, y[:, None], -math.inf).argsort(1, descending=True)[:, :-1]  # without y
    x_adv, remaining = x.clone(), torch.arange(len(x), device=x.device)
    for target in targets.T:
        if not len(remaining):
            break
        tried = common.pgd(model, x[remaining], target[remaining], loss=towards, **budget)  # the target is its y
        wrong = common.fooled(model(tried), y[remaining])
        x_adv[remaining[wrong]] = tried[wrong]
        remaining = remaining[~wrong]
    return x_adv


def feature(model, x, y, *, eps, step_size, steps, images=100, **_):
    """Feature attack (Lin et al. 2019): from a random start towards the features, in cosine, of another class. Up to
    `images` random images of the batch are tried. If it has one class only, away from the image's own features."""
    z, x_adv, remaining = model.features(x), x.clone(), torch.arange(len(x), device=x.device)
    for _attempt in range(images):
        others = y != y[remaining, None]
        aim = (torch.rand(others.shape, device=x.device) * others).argmax(1)
        z_aim, sign = z[torch.where(others.any(1), aim, remaining)], torch.where(others.any(1), 1, -1)
        now = common.random_start(x[remaining], eps, "linf")
        for _ in range(steps):
            now.requires_grad_()
            similarity = sign * F.cosine_similarity(model.features(now), z_aim)
            (grad,) = torch.autograd.grad(similarity.sum(), now)
            now = now.detach() + step_size * common.steepest(grad, "linf")
            now = common.project(now, x[remaining], eps, "linf")
        x_adv[remaining] = now
        remaining = remaining[~common.fooled(model(now), y[remaining])]
        if not len(remaining):
            break
    return x_adv


# --------------------------------------------------------------------------------------- minimal-distance attacks


def deepfool(model, x, y, *, norm="linf", steps, overshoot=0.02, candidates=10, **_):
    """Moosavi-Dezfooli et al. 2016: steps to the nearest linearized boundary with one of the likeliest classes, until
    the class changes. The overshoot stretches all steps together. WeightPen, Sec. 4, has 50 steps, HE 100."""
    x_adv, path, active = x.clone(), torch.zeros_like(x), torch.arange(len(x), device=x.device)  # path: all steps
    others = model(x).scatter(1, y[:, None], -math.inf).argsort(1, descending=True)[:, :-1][:, : candidates - 1]
    for _ in range(steps):
        now = x_adv[active].requires_grad_()
        logits = model(now)
        gaps = logits.gather(1, y[active, None]) - logits.gather(1, others[active])  # to each boundary, in logits
        lengths, directions = [], []
        for gap in gaps.T:
            (w,) = torch.autograd.grad(-gap.sum(), now, retain_graph=True)
            dual = w.abs().sum((1, 2, 3)) if norm == "linf" else common.norms(w, "l2").flatten()  # norm of w
            lengths.append(gap.detach().abs() / dual.clamp(min=1e-12) + 1e-5)  # to cross it, not to approach it
            directions.append(common.steepest(w, norm))
        lengths, directions = torch.stack(lengths), torch.stack(directions)  # (classes, B), (classes, B, C, H, W)
        nearest, rows = lengths.argmin(0), torch.arange(len(active), device=x.device)
        step = lengths[nearest, rows].view(-1, 1, 1, 1) * directions[nearest, rows]
        keep = ~common.fooled(logits, y[active])
        active, step = active[keep], step[keep]
        if not len(active):
            break
        path[active] += step
        x_adv[active] = (x[active] + (1 + overshoot) * path[active]).clamp(0, 1)
    return x_adv


def cw_l2(model, x, y, *, steps=1000, lr=0.01, searches=9, **_):
    """Carlini & Wagner 2017, L2: Adam on ||x' - x||^2 + c * max(-margin, 0) over w, x' = (1 + tanh(w)) / 2. c grows
    tenfold from 0.001 until x' is misclassified, then by bisection; a search ends if the batch's loss stops falling."""
    c, low, high = (x.new_full((len(x),), value) for value in (1e-3, 0.0, math.inf))
    x_adv, nearest = x.clone(), x.new_full((len(x),), math.inf)
    for _ in range(searches):
        w = torch.atanh((2 * x - 1) * (1 - 1e-6)).requires_grad_()
        adam, success, last = torch.optim.Adam([w], lr), torch.zeros_like(c, dtype=torch.bool), math.inf
        for step in range(steps):
            now = (1 + w.tanh()) / 2
            logits = model(now)
            distance = (now - x).square().sum((1, 2, 3))
            loss = (distance + c * (-cw_margin(logits, y)).clamp(min=0)).sum()
            (grad,) = torch.autograd.grad(loss, w)
            w.grad = grad.nan_to_num(0, 0, 0)
            wrong = common.fooled(logits, y)
            closer, success = wrong & (distance < nearest), success | wrong
            x_adv[closer], nearest[closer] = now.detach()[closer], distance.detach()[closer]
            adam.step()
            if step % max(steps // 10, 1) == 0:
                if loss.item() > 0.9999 * last:
                    break
                last = loss.item()
        high, low = torch.where(success, high.minimum(c), high), torch.where(success, low, low.maximum(c))
        c = torch.where(high.isfinite(), (low + high) / 2, 10 * c)
    return x_adv


# ----------------------------------------------------------------------------------------------- black-box attacks

PROBES = 256  # images per forward pass of the gradient estimates, if the batch is smaller than half of it


def directional_slopes(model, x, y, directions, sigma):
    """The margin's slope along n directions (n, B, C, H, W), (n, B): 2 n queries, rounding error about 1e-6 / sigma."""
    step = sigma * directions
    probes = torch.stack([x + step, x - step]).flatten(0, 2)
    margin = cw_margin(model(probes), y.repeat(2 * len(directions))).view(2, *directions.shape[:2])
    return ((margin[0] - margin[1]) / (2 * sigma)).nan_to_num(0, 0, 0)


@torch.no_grad()
def spsa(
    model, x, y, *, eps, step_size, steps, draw=lambda u: u.random_(0, 2).mul_(2).sub_(1), q=128, sigma=0.001, **_
):
    """Uesato et al. 2018: BIM by a gradient estimated along directions of +-1 (HE, B.2), 2 q + 1 queries a step."""
    x_adv, active = x.clone(), torch.arange(len(x), device=x.device)
    for _ in range(steps):
        active = active[~common.fooled(model(x_adv[active]), y[active])]
        if not len(active):
            break
        x_now, grad = x_adv[active], torch.zeros_like(x_adv[active])
        for part in torch.arange(q).split(max(PROBES // (2 * len(x_now)), 1)):
            u = draw(x.new_empty(len(part), *x_now.shape))
            grad += torch.einsum("nb,nbchw->bchw", directional_slopes(model, x_now, y[active], u, sigma), u) / q
        x_adv[active] = common.project(x_now + step_size * grad.sign(), x[active], eps, "linf")
    return x_adv


nes = partial(spsa, draw=Tensor.normal_)  # Ilyas et al. 2018, as in HE, Sec. B.2: Gaussian directions


@torch.no_grad()
def zoo(model, x, y, *, eps, queries=20_000, coordinates=128, sigma=1e-4, **_):
    """ZOO (Chen et al. 2017; sigma and queries of HE, Sec. B.2): Adam on `coordinates` random pixels at a time, by
    central differences; on the margin, without HE's L2 distance (Eq. 21). Its rate, eps / 3, is their 0.01 at 8/255."""
    size, rate, decay1, decay2 = x[0].numel(), eps / 3, 0.9, 0.999
    low, high = (x - eps).clamp(min=0).flatten(1), (x + eps).clamp(max=1).flatten(1)
    flat, active = x.flatten(1).clone(), torch.arange(len(x), device=x.device)
    moment1, moment2, count = (torch.zeros_like(flat) for _ in range(3))
    while queries:
        active = active[~common.fooled(model(flat[active].view(-1, *x.shape[1:])), y[active])]
        x_now = flat[active].view(-1, *x.shape[1:])
        n = min(coordinates, size, (queries - 1) // 2)
        queries -= 1 + 2 * n
        if not n or not len(active):
            break
        places = torch.rand(len(active), size, device=x.device).topk(n).indices
        slopes = []
        for part in places.T.split(max(PROBES // (2 * len(x_now)), 1)):
            u = x.new_zeros(*part.shape, size).scatter_(2, part[:, :, None], 1).view(*part.shape, *x.shape[1:])
            slopes.append(directional_slopes(model, x_now, y[active], u, sigma))
        slope, at = torch.cat(slopes).T, (active[:, None], places)
        count[at] += 1
        moment1[at] = decay1 * moment1[at] + (1 - decay1) * slope
        moment2[at] = decay2 * moment2[at] + (1 - decay2) * slope.square()
        mean, square_mean = moment1[at] / (1 - decay1 ** count[at]), moment2[at] / (1 - decay2 ** count[at])
        flat[at] = (flat[at] + rate * mean / (square_mean.sqrt() + 1e-8)).clamp(low[at], high[at])
    return flat.view_as(x)


@torch.no_grad()
def rays(model, x, y, *, eps, queries=10_000, **_):
    """RayS (Chen & Gu 2020): the sign vector along which the boundary is nearest in Linf, from labels alone. Blocks of
    signs are flipped: all, halves, ..., pixels; a flip that fools at the best radius gets its own by bisection."""
    size = x[0].numel()
    place, tolerance = torch.arange(size, device=x.device), 1e-3 / math.sqrt(size)
    x_adv, active = x.clone(), torch.arange(len(x), device=x.device)
    signs = ray = torch.ones_like(x).flatten(1)  # of the best direction, and of the one that is searched now
    best = high = torch.ones_like(ray[:, 0])  # radii: at 1 every image is in a corner of [0, 1]
    low, fresh = torch.zeros_like(best), torch.ones_like(active, dtype=torch.bool)
    start, length = torch.zeros_like(active), torch.full_like(active, size)  # of the next block to flip
    for _ in range(queries):
        radius = torch.where(fresh, best, (low + high) / 2)
        x_new = (x + (radius[:, None] * ray).view_as(x)).clamp(0, 1)
        wrong = common.fooled(model(x_new), y)
        low, high = torch.where(wrong, low, radius), torch.where(wrong, radius, high)
        fresh = high - low <= tolerance  # also where the flip failed at the best radius: low = high = best
        nearer = fresh & (high < best)
        signs, best = torch.where(nearer[:, None], ray, signs), torch.where(nearer, high, best)
        block = (place >= start[:, None]) & (place < (start + length)[:, None])
        ray = torch.where(fresh[:, None], torch.where(block, -signs, signs), ray)
        low, high = torch.where(fresh, 0, low), torch.where(fresh, best, high)
        start = torch.where(fresh, start + length, start)
        start, length = torch.where(start < size, start, 0), torch.where(start < size, length, (length + 1) // 2)
        done = wrong & (radius <= eps)
        if done.any():
            x_adv[active[done]] = x_new[done]
            state = (active, x, y, signs, ray, best, low, high, fresh, start, length)
            active, x, y, signs, ray, best, low, high, fresh, start, length = (each[~done] for each in state)
            if not len(active):
                break
    x_adv[active] = (x + eps * signs.view_as(x)).clamp(0, 1)
    return x_adv


# --------------------------------------------------------------------------------------- transfer and AutoAttack


def transferred(model, x, y, *, source, attack, **budget):
    """`attack` on the training loss of another model, `source` (HE, App. C.4), without early stop: it must transfer."""
    observed = Observed(source, x, eot=model.eot)
    x_adv = attack(observed, x, y, loss=training_loss(source), early_stop=False, **budget)
    model.nonfinite, model.said = model.nonfinite | observed.nonfinite, model.said | observed.said
    return x_adv


STANDARD, RAND = ("apgd-ce", "apgd-t", "fab-t", "square"), ("apgd-ce", "apgd-dlr")


def autoattack(model, x, y, *, eps, norm="linf", parts=STANDARD, queries=5000, fab_steps=100, **_):
    """AutoAttack (Croce & Hein 2020), standard version, or some of its parts, by the authors' package; with --eot its
    version `rand`, on the mean logits. The DLR loss needs 3 classes, APGD-T's 4: with fewer the part is left out."""
    model = model if isinstance(model, Observed) else Observed(model, x)
    classes, parts = model(x[:1]).shape[1], RAND if parts == STANDARD and model.eot > 1 else parts
    fit = [part for part in parts if {"apgd-t": 4, "apgd-dlr": 3}.get(part, 0) <= classes]
    if not fit:
        raise common.UserError(f"{parts[0]} needs more classes for its DLR loss: the model has {classes}")
    if len(fit) < len(parts):
        model.said.add(f"autoattack without {', '.join({*parts} - {*fit})}: more than {classes} classes are needed")
    adversary = AutoAttack(model, norm=norm.capitalize(), eps=eps, seed=torch.initial_seed() % 2**31, device=x.device)
    adversary.attacks_to_run, adversary.version = fit, "rand" if model.eot > 1 else "standard"
    adversary.square.n_queries, adversary.fab.n_iter = queries, fab_steps
    adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = min(9, classes - 1)
    with autoattack_checks(model.said):
        return adversary.run_standard_evaluation(x.contiguous(), y, batch_size=len(x))[0]


@contextmanager
def autoattack_checks(said: set[str]) -> Iterator[logging.Logger]:
    """`said` receives what pyautoattack's checks log: the first sentence without its figures, which vary by batch."""
    logger, trace = logging.getLogger("auto-attack"), sys.gettrace()

    def keep(record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            text = re.sub(r" (of )?\d[\d.]*%?", "", record.getMessage())
            said.add(f"AutoAttack: {re.split(r'[!.] ', text)[0]}")

    usual, logger.filters = logger.filters, [keep]
    checks.funcs.update(dict.fromkeys(checks.funcs, 0))  # or one dynamic model is found in all later ones
    try:
        yield logger
    finally:
        logger.filters = usual
        sys.settrace(trace)  # a check switches tracing off; debuggers and coverage need it


# -------------------------------------------------------------------------------------------- the table of attacks


@dataclass(frozen=True)
class Attack:
    """An attack and its settings; call it as `attack(model, x, y, eps=8 / 255)`."""

    run: Callable[..., Tensor]
    steps: int | None = None  # `pgd-40` replaces it
    step_size: float | None = None  # `pgd-40@0.01` replaces it; None: the dataset's
    norms: tuple[str, ...] = ("linf", "l2")
    random_start: bool = False  # what restarts repeat
    restarts: int | None = None  # `pgd-40@0.01x5` replaces it; None: --restarts
    minimal: bool = False  # looks for the nearest adversarial image, which may lie outside the ball
    bfloat16: bool = False  # what --amp may run in bfloat16; the others need exact logits to know when to stop
    needs: str = "gradients"  # of the model; also "features" (x -> (B, d)), "fc" (linear), "four classes"; "": nothing

    @torch.inference_mode(mode=False)  # gradients, also where the caller switched them off
    def __call__(self, model, x, y, *, eps: float, norm: str | None = None, step_size: float | None = None) -> Tensor:
        """x_adv (B, C, H, W) for x in [0, 1] and y (B,); eps and step_size in pixel units, norm linf or l2."""
        norm = norm or self.norms[0]
        if norm not in self.norms:
            raise common.UserError(f"this attack is defined in {self.norms[0].capitalize()} only")
        budget = {"eps": eps, "norm": norm}
        if self.steps:
            budget |= {"steps": self.steps, "step_size": step_size or Settings(eps, norm).step_size_for(self)}
        observed = model if isinstance(model, Observed) else Observed(model, x)
        with common.frozen_eval(model):
            x_adv = self.run(observed, x, y, **budget).detach()
        for text in observed.said if observed is not model else ():
            warnings.warn(text, stacklevel=3)
        return x_adv

    def lacking(self, model: nn.Module, image: Tensor) -> str:
        """What the attack needs and the model does not have, or ""."""
        if self.needs and not has_gradient(model, image):
            return "gradients (not square, rays, spsa, nes, zoo)"
        fits = {"": True, "gradients": True, "four classes": model(image).shape[1] >= 4}
        fits["fc"] = isinstance(getattr(model, "fc", None), nn.Linear)
        with suppress(Exception):
            fits["features"] = model.features(image).ndim == 2
        return "" if fits.get(self.needs) else self.needs

    def identity(self) -> str:
        """Of the settings and the code: another attack of the same name must not take over the results of this one."""
        return fingerprint(replace(self, run=None), code_parts(self.run))


def code_parts(value: object, depth: int = 8) -> list:
    """What tells a function or object from another: code, defaults, closure, attributes, tensors. No addresses."""
    if isinstance(value, Tensor | nn.Module):
        return [fingerprint(*([value] if isinstance(value, Tensor) else state_of(value)))]
    value = [value.co_code, value.co_names, value.co_consts] if isinstance(value, CodeType) else value
    value = [*value.items()] if isinstance(value, dict) else value
    if isinstance(value, list | tuple):
        return [code_parts(each, depth - 1) for each in value if depth > 0]
    if isinstance(value, ModuleType | type) or not hasattr(value, "__dict__"):
        return [re.sub(r" at 0x\w+", "", repr(value))]
    names = "func args keywords __func__ __self__ __defaults__ __kwdefaults__ __code__ __dict__".split()
    cells = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
    inside = [getattr(value, name, None) for name in names] + [vars(type(value)).get("__call__"), *cells]
    return code_parts(inside, depth - 1)


ATTACKS = {
    "clean": Attack(lambda model, x, y, **_: x, needs=""),
    "noise": Attack(lambda model, x, y, eps, norm, **_: common.random_start(x, eps, norm), random_start=True, needs=""),
    "fgsm": Attack(fgsm, bfloat16=True),
    "fgsm-l2": Attack(fgsm, norms=("l2",), bfloat16=True),
    "bim-20": Attack(bim, steps=20, bfloat16=True),
    "mim-20": Attack(mim, steps=20, bfloat16=True),
    "pgd-20": Attack(pgd, steps=20, random_start=True, bfloat16=True),
    "pgd-20-scaled": Attack(pgd_scaled, steps=20, random_start=True, bfloat16=True),
    "pgd-20-fn": Attack(pgd_fn, steps=20, random_start=True, needs="fc", bfloat16=True),
    "adaptive-pgd-20": Attack(adaptive_pgd, steps=20, random_start=True, bfloat16=True),
    "cw-inf": Attack(cw_inf, steps=20, random_start=True, bfloat16=True),
    "mta-100": Attack(mta, steps=100, random_start=True),
    "feature": Attack(feature, steps=50, norms=("linf",), random_start=True, needs="features"),
    "apgd-ce": Attack(partial(autoattack, parts=["apgd-ce"]), random_start=True),
    "apgd-t": Attack(partial(autoattack, parts=["apgd-t"]), random_start=True, needs="four classes"),
    "fab-t": Attack(partial(autoattack, parts=["fab-t"])),
    "fab": Attack(partial(autoattack, parts=["fab"], fab_steps=20)),
    "square": Attack(partial(autoattack, parts=["square"]), needs=""),
    "autoattack": Attack(autoattack),
    "deepfool": Attack(deepfool, steps=50, minimal=True),
    "cw-l2": Attack(cw_l2, steps=1000, norms=("l2",), minimal=True),
    "spsa-80": Attack(spsa, steps=80, step_size=0.01, norms=("linf",), needs=""),
    "nes-80": Attack(nes, steps=80, step_size=0.01, norms=("linf",), needs=""),
    "zoo": Attack(zoo, norms=("linf",), needs=""),
    "rays": Attack(rays, norms=("linf",), needs=""),
}
PRESETS = {
    "quick": "noise fgsm pgd-20 pgd-20-scaled cw-inf",
    "he": "fgsm mim-20 pgd-20 pgd-500 deepfool-100 cw-inf feature-100 fab adaptive-pgd-20 adaptive-pgd-500 "
    "autoattack rays zoo spsa-20 spsa-50 spsa-80 nes-20 nes-50 nes-80",  # Tables 2, 6 and 8, and Sec. 4.1
    "he-fast": "pgd-50@2/255x10",  # Table 3: FreeAT and FastAT on CIFAR-10, as in the authors' code
    "he-imagenet": "pgd-10 pgd-50",  # Table 4
    "angular_at": "pgd-20 pgd-500 cw-inf autoattack spsa-80",  # Tables 1 and 5
    "dsphere": "fgsm pgd-100@0.01",  # Tables 1 and 2
    "weightpen": "pgd-20@0.0031 pgd-100@0.0031 deepfool cw-l2 mta-100@0.0031",  # Table 5, CIFAR-10
    "weightpen-mnist": "pgd-40@0.01 pgd-200@0.01 deepfool cw-l2 mta-200@0.01",  # Table 4
    "abcl": "bim-20 fgsm-l2",  # Appendix
    "all": " ".join(ATTACKS),
}
PAPER = {"angular": "angular_at", "dsphere": "dsphere", "cnn": "dsphere", "abcl": "abcl", "mart": "weightpen"}
PAPER |= {"weightpen": "weightpen", "mmc": "weightpen", ("weightpen", "mnist"): "weightpen-mnist"}  # else "he"
PAPER |= {("he", "imagenet"): "he-imagenet", ("fast", "cifar10"): "he-fast", ("free", "cifar10"): "he-fast"}
PRESET_EPS = {(preset, dataset): 8 / 255 for preset in ("dsphere", "weightpen") for dataset in ("cifar10", "cifar100")}
PRESET_EPS |= {("he-fast", "cifar10"): 8 / 255}
DEFAULTS = {  # Linf eps and step size, L2 eps, of the papers' evaluations; those of digits are ours
    "digits": (0.1, 0.01, 0.5),
    "mnist": (0.3, 0.01, 3.0),
    **dict.fromkeys(("cifar10", "cifar100", "tiny-imagenet"), (0.031, 0.003, 1.0)),
    "imagenet": (4 / 255, 1 / 255, 1.0),
    None: (8 / 255, 2 / 255, 1.0),
}
Model = namedtuple("Model", "name net meta")  # meta: what the checkpoint says of the net


@dataclass
class Settings:
    """What all attacks of an evaluation share."""

    eps: float | None = None  # None: the dataset's
    norm: str = "linf"
    dataset: str | None = None  # a key of DEFAULTS
    step_size: float | None = None
    restarts: int = 1
    batch_size: int = 250
    seed: int = 0
    amp: bool = False
    eot: int = 1  # draws of a random model
    exact: bool = False  # no TF32 in crafting either

    def __post_init__(self):
        if self.eps is None:
            self.eps = DEFAULTS[self.dataset][0 if self.norm == "linf" else 2]

    def ball(self, attack: Attack) -> tuple[str, float]:
        """Norm and eps of the attack. In a Linf evaluation an attack for L2 only has the dataset's L2 eps."""
        only_l2 = self.norm == "linf" and attack.norms == ("l2",)
        return ("l2", DEFAULTS[self.dataset][2]) if only_l2 else (self.norm, self.eps)

    def step_size_for(self, attack: Attack) -> float | None:
        """The first of: the attack's own; that of --step-size; in Linf the dataset's, if it can cross the ball in so
        many steps and is at most eps / 2, as a longer one only jumps between corners; 2.5 eps / steps."""
        if not attack.steps or attack.minimal:
            return None
        (norm, eps), usual = self.ball(attack), DEFAULTS[self.dataset][1]
        fits = norm == "linf" and 1.9 * eps / attack.steps < usual <= eps / 2  # 1.9: the papers' 20 steps of 0.003 fit
        return attack.step_size or self.step_size or (usual if fits else 2.5 * eps / attack.steps)


def find_attack(name: str) -> Attack:
    """One of ATTACKS, with another number of steps (pgd-40), step size (pgd-40@0.01) or restarts (pgd-40@0.01x5)."""
    plain, step_size, restarts = re.fullmatch(r"(.*?)(?:@(.*?))?(?:x(\d+))?", name).groups()
    steps, without = re.search(r"-([1-9]\d*)", plain), re.sub(r"-[1-9]\d*", "", plain, count=1)
    alike = {re.sub(r"-\d+", "", known): attack for known, attack in ATTACKS.items() if attack.steps}
    attack = ATTACKS.get(plain) or (alike.get(without) if steps else None)
    if not attack:
        raise common.UserError(f"unknown attack {name!r}: choose from {', '.join([*PRESETS, 'paper', *ATTACKS])}")
    if restarts and not attack.random_start:
        raise common.UserError(f"attack {name!r}: {plain} has no random start to repeat")
    if step_size is not None and (not attack.steps or attack.minimal):
        raise common.UserError(f"attack {name!r}: {plain} takes no step size")
    attack = replace(attack, steps=int(steps[1])) if steps and attack.steps else attack
    attack = replace(attack, restarts=common.number(int, 1)(restarts)) if restarts else attack
    return attack if step_size is None else replace(attack, step_size=common.number(float, 1e-6)(step_size))


def paper_preset(model: Model, dataset: str | None) -> str:
    """The preset of the paper in which the checkpoint's method is evaluated on this dataset."""
    method = model.meta.get("method", "").split("_")[0]
    paper = PAPER.get((method, dataset)) or PAPER.get(method, "he")
    return PAPER.get((paper, dataset), paper)


def preset_eps(text: str, targets: list[Model], dataset: str | None) -> float | None:
    """The Linf eps that the papers of the presets in --attacks have on this dataset, if it is not that of DEFAULTS."""
    names = set(map(str.strip, text.split(",")))
    papers = {paper_preset(model, dataset) for model in targets} if "paper" in names else set()
    found = {PRESET_EPS.get((name, dataset)) for name in names & PRESETS.keys() - {"quick", "all"} | papers}
    if len(found) > 1:
        raise common.UserError("the papers of these presets have different eps (8/255 or the dataset's): give --eps")
    return found.pop() if found else None


def select_attacks(text: str, targets: list[Model], settings: Settings, image: Tensor) -> dict[str, Attack]:
    """The attacks of --attacks after clean. One that does not fit is skipped in a preset, and an error if named."""
    attacks = {"clean": ATTACKS["clean"]}
    presets = PRESETS | {"paper": " ".join(PRESETS[paper_preset(model, settings.dataset)] for model in targets)}
    for part in map(str.strip, text.split(",")):
        for name in presets.get(part, part).split() or [part]:
            attack = find_attack(name)
            lacking = [(model.name, attack.lacking(Observed(model.net, image), image)) for model in targets]
            reason = next((f"{name} needs {what}, which {model} lacks" for model, what in lacking if what), None)
            if settings.ball(attack)[0] not in attack.norms:
                reason = f"{name} is defined in Linf only"
            if not reason:
                attacks[name] = attack
            elif part in presets:
                print(f"skipped: {reason}")
            else:
                raise common.UserError(reason)
    return attacks


def transfer_attacks(sources: list[Model]) -> dict[str, Attack]:
    """FGSM, MIM-20 and PGD-20 from each source."""
    attacks = {}
    for (source, net, _), name in itertools.product(sources, ("fgsm", "mim-20", "pgd-20")):
        run = partial(transferred, source=net, attack=ATTACKS[name].run)
        attacks[f"{name} from {source}"] = replace(ATTACKS[name], run=run, needs="")
    return attacks


# --------------------------------------------------------------------------------------------------- the evaluator

RESERVED = {"index", "label", "clean_prediction", "worst case", "file", "path"}  # no names of attacks
TOLERANCE = 1e-6  # of a pixel value, in float32


class Observed(nn.Module):
    """A model as an attack on images x (B, C, H, W) sees it. A pass gets a copy of its images, which the model may
    change, and draws from a generator of the model's own: a seed set in `forward` would reset the attack's numbers.
    Logits are means of `eot` draws. A gradient that is not finite becomes 0 and marks its image in `nonfinite` (B,)."""

    def __init__(self, model: nn.Module, x: Tensor, amp: bool = False, eot: int = 1):
        super().__init__()
        self.model, self.x, self.amp, self.eot = getattr(model, "_orig_mod", model), x, amp, eot  # not compiled
        self.may_stop = not amp and eot == 1  # False: one misclassified pass does not prove the verdict, so PGD goes on
        self.queries, self.nonfinite, self.said = 0, torch.zeros(len(x), dtype=torch.bool, device=x.device), set()
        self.__dict__ |= {name: getattr(model, name) for name in ("fc", "scale", "margin") if hasattr(model, name)}
        self.__dict__ |= {"features": partial(self.forward, call=model.features)} if hasattr(model, "features") else {}
        cuda = [torch.cuda.default_generators[x.device.index]] if x.is_cuda else []
        self.generators, seed = [torch.default_generator, *cuda], torch.initial_seed() + 1
        self.states = [torch.Generator(g.device).manual_seed(seed).get_state() for g in self.generators]

    def forward(self, x: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        return torch.stack([self.draw(x, call or self.model) for _ in range(self.eot)]).mean(0)

    def draw(self, x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        """One pass through the model, or through its features."""
        self.queries += len(x)
        given, x, devices = x.detach(), x.clone(), [generator.device for generator in self.generators[1:]]
        if x.requires_grad:
            x.register_hook(partial(self.replace_nonfinite, given))
        with torch.random.fork_rng(devices), torch.autocast(x.device.type, torch.bfloat16, enabled=self.amp):
            for generator, state in zip(self.generators, self.states, strict=True):
                generator.set_state(state)
            try:
                logits = call(x)
            except ValueError:  # batch norm by the statistics of a batch fails on a single image
                if len(x) > 1:
                    raise
                logits = call(x.repeat(2, 1, 1, 1))[:1]
            self.states = [generator.get_state() for generator in self.generators]
        return logits.float()

    def replace_nonfinite(self, given: Tensor, grad: Tensor) -> Tensor:
        finite = grad.flatten(1).isfinite().all(1)
        if finite.all():
            return grad
        distance = torch.cdist(given[~finite].flatten(1), self.x.flatten(1), p=math.inf)  # `given` may be a part of x
        self.nonfinite |= (distance == distance.amin(1, keepdim=True)).any(0)
        return torch.where(finite[:, None, None, None], grad, 0)

    @torch.no_grad()
    def votes(self, x: Tensor) -> Tensor:
        """The predicted classes of each draw in float32, (eot, B); -1, never correct, where a logit is not finite."""
        self.amp = False
        logits = torch.stack([self.draw(x, self.model) for _ in range(self.eot)])
        return torch.where(logits.isfinite().all(2), logits.argmax(2), -1)


def predict(model: nn.Module, x: Tensor, eot: int = 1) -> Tensor:
    """The predicted classes (B,) of most draws in float32; -1, never correct, where a logit is not finite."""
    return Observed(model, x, eot=eot).votes(x).mode(0).values


def has_gradient(model: nn.Module, image: Tensor) -> bool:
    """Whether a gradient, be it 0, flows from the logits to the image."""
    image = image.repeat(2, 1, 1, 1).requires_grad_()  # two, for batch norm by the statistics of a batch
    with common.frozen_eval(model), suppress(RuntimeError):  # no derivative, or numpy()
        logits = (model.model if isinstance(model, Observed) else model)(image.clone())
        return logits.requires_grad and torch.autograd.grad(logits.sum(), image, allow_unused=True)[0] is not None
    return False


def attack_batch(name: str, attack: Attack, model: nn.Module, x: Tensor, y: Tensor, settings: Settings) -> dict:
    """One attack on a batch: `x_adv` (B, C, H, W), `queries`, `seconds`, what was `said`, and the verdicts (B,):
    `prediction` of most draws, `correct` within the ball, `share` of draws that are, `nonfinite`, `distance` or inf."""
    (norm, eps), start = settings.ball(attack), time.perf_counter()
    observed = Observed(model, x, settings.amp and attack.bfloat16, settings.eot)
    allow_tf32(bool(attack.needs) and not settings.exact)  # finite differences need exact logits
    try:
        x_adv = attack(observed, x.clone(), y.clone(), eps=eps, norm=norm, step_size=settings.step_size_for(attack))
    except Exception as error:
        error.add_note(f"in attack {name}")
        raise
    allow_tf32(False)
    if x_adv.shape != x.shape:
        raise RuntimeError(f"attack {name} returned {tuple(x_adv.shape)} for images {tuple(x.shape)}")
    broken = ~x_adv.flatten(1).isfinite().all(1)
    x_adv = torch.where(broken[:, None, None, None], x, x_adv)  # counts as a failed attack
    distance, low, high = common.norms(x_adv - x, norm).flatten(), float(x_adv.min()), float(x_adv.max())
    inside = distance <= eps + TOLERANCE * max(1.0, 10 * eps)
    if not (attack.minimal or inside.all()) or low < -TOLERANCE or high > 1 + TOLERANCE:
        reach = f"distance {float(distance.max()):.6g}, pixels {low:.6g} to {high:.6g}"
        raise RuntimeError(f"attack {name} left the {norm.capitalize()} ball of eps {eps:.6g} or [0, 1]: {reach}")
    queries, votes = observed.queries, observed.votes(x_adv)
    prediction = votes.mode(0).values
    verdicts = {"prediction": prediction, "distance": torch.where(prediction == y, math.inf, distance)}
    verdicts |= {"correct": (prediction == y) | ~inside, "share": ((votes == y) | ~inside).float().mean(0)}
    verdicts |= {"nonfinite": observed.nonfinite | broken | (prediction < 0)}
    verdicts = {key: value.cpu() for key, value in verdicts.items()}
    about = {"queries": queries, "seconds": time.perf_counter() - start, "said": sorted(observed.said)}
    return verdicts | about | {"x_adv": torch.where(inside[:, None, None, None], x_adv, x).clamp(0, 1)}


def run_attack(name, attack: Attack, model, x: Tensor, y, correct, settings: Settings, parts: Path, keep=False) -> dict:
    """attack_batch's verdicts on all N images, with `keep` also x_adv. Attacked are those `correct` so far (N,), in
    shuffled batches with all classes. Each is saved in a file: so ranks exchange results and stopped runs continue."""
    rank, count = common.rank_and_count()
    result = {"correct": correct.clone(), "prediction": y.cpu().clone(), "distance": torch.full(y.shape, math.inf)}
    result |= {"nonfinite": torch.zeros_like(correct), "share": correct.float(), "queries": 0, "seconds": 0, "said": []}
    result |= {"x_adv": common.images_at(x, torch.arange(len(y)), "cpu")} if keep else {}
    stem = ("x_adv-" if keep else "") + file_stem(name, attack)  # without the images a batch is attacked again
    for restart in range((attack.restarts or settings.restarts) if attack.random_start else 1):
        remaining = result["correct"].nonzero().flatten()
        order = torch.randperm(len(remaining), generator=torch.Generator().manual_seed(settings.seed))
        batches = remaining[order].split(settings.batch_size) if len(remaining) else ()
        files, robust = [parts / f"{stem}.{restart}.{i}.pt" for i in range(len(batches))], len(remaining)
        with tqdm(total=robust, desc=name, unit="img", leave=False, disable=True if rank else None) as bar:
            for i, rows in enumerate(batches):
                if i % count == rank and not files[i].exists():
                    torch.manual_seed(int(fingerprint(settings.seed, name, restart, i), 16))
                    images, labels = common.images_at(x, rows, y.device), y[rows.to(y.device)]
                    outcome = attack_batch(name, attack, model, images, labels, settings)
                    common.save({key: outcome[key] for key in outcome if keep or key != "x_adv"}, files[i])
                    robust -= int((~outcome["correct"]).sum())
                bar.update(len(rows))
                bar.set_postfix_str(f"{robust} robust", refresh=False)
        common.barrier()
        for rows, file in zip(batches, files, strict=True):
            outcome = common.read_file(file)
            for each in ("correct", "prediction", "x_adv")[: 3 if keep else 2]:
                result[each][rows] = outcome[each]
            for each in ("distance", "share"):
                result[each][rows] = result[each][rows].minimum(outcome[each])
            result["nonfinite"][rows] |= outcome["nonfinite"]
            for total in ("queries", "seconds", "said"):
                result[total] += outcome[total]
    return result


def file_stem(name: str, attack: Attack) -> str:
    """What the files of an attack with these settings begin with."""
    return re.sub(r"[^a-zA-Z0-9@.-]+", "_", name)[:80] + f"-{fingerprint(name, attack.identity())}"


def fingerprint(*items: object) -> str:
    """Of tensors, and of the repr of anything else."""
    digest = hashlib.sha256()
    for item in items:
        is_tensor = isinstance(item, Tensor)
        digest.update(item.detach().cpu().flatten().view(torch.uint8).numpy() if is_tensor else repr(item).encode())
    return digest.hexdigest()[:12]


def state_of(model: nn.Module) -> list:
    """Weights, options, plain attributes and the code of all modules: what differs may give other verdicts."""
    own = {getattr(sys.modules.get(type(module).__module__), "__file__", None) for module in model.modules()}
    files = {common.__file__, models.__file__, __file__, *filter(None, own), *getattr(model, "source_files", ())}
    plain = [{k: v for k, v in vars(m).items() if isinstance(v, int | float | str)} for m in model.modules()]
    plain = [{k: v for k, v in each.items() if k != "training"} for each in plain]  # attacks see eval mode
    code = [Path(file).read_bytes() for file in sorted(files)]
    return [*model.state_dict().values(), getattr(model, "options", model), plain, code]


def accuracy(correct: Tensor | np.ndarray) -> dict:
    """Count, n, and the accuracy in % with its 95 % Wilson interval, of bool (N,)."""
    k, n = int(correct.sum()), len(correct)
    low, high = binomtest(k, n).proportion_ci(0.95, "wilson")
    return {"correct": k, "n": n, "accuracy": 100 * k / n, "low": 100 * float(low), "high": 100 * float(high)}


def add_result(result: dict, name: str, attack: Attack, outcome: dict, attacked: int, settings: Settings) -> None:
    """Add an attack's row and verdicts to the results, and the worst case after all rows."""
    rows, verdicts, (norm, eps) = result["attacks"], result["verdicts"], settings.ball(attack)
    median = float(outcome["distance"].sort().values[attacked // 2])  # the others are inf and sort last
    share, named = 100 * float(outcome["share"].mean()), verdicts["index"][outcome["nonfinite"].numpy()].tolist()
    remarks = {
        result["mark"]: result["mark"],
        f"single draws {share:.2f} %": settings.eot > 1,
        f"{norm.capitalize()} eps {eps:g}, not in the worst case": norm != settings.norm,
        f"median distance {median:.4g}": attack.minimal and math.isfinite(median),
        f"NOT FINITE: gradients or logits of {len(named)} image(s), {str(named[:5])[1:-1]}": named,
        **dict.fromkeys(sorted(set(outcome["said"])), True),
    }
    row = accuracy(outcome["correct"]) | {"norm": norm, "eps": eps, "step_size": settings.step_size_for(attack)}
    row |= {"queries": outcome["queries"] / max(attacked, 1), "seconds": outcome["seconds"], "share": share}
    row |= {"nonfinite": len(named), "median_distance": median if math.isfinite(median) else None}
    row |= {"identity": attack.identity(), "remark": "; ".join(text for text, said in remarks.items() if said)}
    rows[name], verdicts[name] = row, outcome["correct"].numpy()
    if name == "clean":
        verdicts["clean_prediction"] = outcome["prediction"].numpy()
    rows.pop("worst case", None)
    same = [verdicts[other] for other, row in rows.items() if row["norm"] == settings.norm]
    rows["worst case"] = accuracy(np.all(same, 0)) | {"remark": result["mark"]}
    print(f"{row['accuracy']:8.2f} % {row['seconds']:9.1f} s  {name}", flush=True)


def check_inputs(x: Tensor, y: Tensor, attacks: dict[str, Attack], settings: Settings) -> None:
    """Raises UserError for what evaluate() cannot take."""
    widest = 1.0 if settings.norm == "linf" else math.sqrt(x[0].numel())
    if x.dtype != torch.uint8 and (x.dtype != torch.float32 or not 0 <= x.min() <= x.max() <= 1):
        raise common.UserError(f"images {x.dtype} up to {float(x.max()):g}; needed: uint8 or float32 tensor in [0, 1]")
    if y.dtype != torch.int64 or y.shape != x.shape[:1] or not len(y) or y.min() < 0:
        raise common.UserError(f"labels {y.dtype} {tuple(y.shape)}; needed: int64 from 0 for each of {len(x)} images")
    if not 0 <= settings.eps <= widest:
        raise common.UserError(f"eps {settings.eps:g} is not from 0 to {widest:.4g}: use pixel units, such as 8/255")
    if attacks.keys() & RESERVED or attacks.get("clean", ATTACKS["clean"]) != ATTACKS["clean"]:
        raise common.UserError(f"an attack has the name of a result: {', '.join(attacks)}")


@torch.inference_mode(mode=False)  # gradients, also where the caller switched them off
def evaluate(
    model, x, y, attacks="quick", *, audit=False, folder=None, index=None, about=None, save_adversarial=False, **options
) -> dict:
    """Run attacks on a model, any nn.Module from images in [0, 1] to logits (B, K), on the device of y (N,).
    x is (N, C, H, W), uint8 or float in [0, 1]; `attacks` as in --attacks or {name: Attack}; options as in Settings.
    Returns settings, `about`, `attacks` {name: row} with the worst case over all in the ball, `verdicts` {name: (N,)},
    `checks` and `audit`. `folder` receives it all, with `index` (N,), the images' numbers in their test set, and with
    save_adversarial x_adv. A second call continues and adds."""
    settings = Settings(**options)
    check_inputs(x, y, {} if isinstance(attacks, str) else attacks, settings)
    if save_adversarial and not folder:
        raise common.UserError("save_adversarial: no folder to save into")
    allow_tf32(False)
    temporary = tempfile.TemporaryDirectory()  # is deleted with this variable
    folder, weights = Path(folder or temporary.name), fingerprint(*model.state_dict().values())
    few = torch.linspace(0, len(y) - 1, min(200, len(y))).round().long()  # a test set may be sorted by class
    sample = common.images_at(x, few, y.device), y[few.to(y.device)]
    torch.manual_seed(settings.seed)
    with common.frozen_eval(model):
        if isinstance(attacks, str):
            attacks = select_attacks(attacks, [Model("the model", model, {})], settings, sample[0][:1])
        seen = [predict(model, sample[0]) for _ in range(2)]  # may differ where weights and code do not
    key = fingerprint(*state_of(model), x, y, settings, seen[0] if torch.equal(*seen) else None)
    own = folder / f"settings-{key}"  # results of other models and settings have folders of their own
    own.mkdir(parents=True, exist_ok=True)
    index = np.arange(len(y)) if index is None else np.asarray(index)
    result = {"attacks": {}, "verdicts": {"index": index, "label": y.cpu().numpy()}}
    if (own / "eval.json").exists():  # of an earlier call
        try:
            with np.load(own / "verdicts.npz") as verdicts:
                result = json.loads((own / "eval.json").read_text()) | {"verdicts": dict(verdicts)}
        except Exception as error:  # whatever a damaged file leads to
            raise common.UserError(f"{own}: damaged ({error!r}); delete it") from error
    result |= asdict(settings) | (about or {}) | {"weights": weights}
    with common.frozen_eval(model):
        result["checks"] = result.get("checks") or [c._asdict() for c in check_model(model, *sample, settings)]
        result["mark"] = " ".join(MARKS.get(c["check"], "") for c in result["checks"] if not c["passed"]).strip()
        result["model"] = f"{(about or {}).get('model', 'the model')} {result['mark']}".strip()
        print_checks(result["model"], result["checks"], failed_only=True)
        for name, attack in {"clean": ATTACKS["clean"], **attacks}.items():
            kept, keep = own / f"x_adv-{file_stem(name, attack)}.npz", save_adversarial and name != "clean"
            known = result["attacks"].get(name, {}).get("identity") == attack.identity()
            if not known or (keep and not kept.exists()):
                correct = torch.from_numpy(result["verdicts"].get("clean", np.ones(len(y), dtype=bool)))
                outcome = run_attack(name, attack, model, x, y, correct, settings, own, keep)
                add_result(result, name, attack, outcome, int(correct.sum()), settings)
                if keep:
                    write_arrays(kept, x_test=outcome["x_adv"], y_test=y.cpu(), index=index)
                write_results(result, own)
        if audit and "audit" not in result:
            result["audit"] = result["checks"] + [c._asdict() for c in run_audit(model, *sample, settings, own)]
    write_results(result, own, folder)
    return result


# ------------------------------------------------------------------------------------------------------- the audit

ALL, ON_CE = "all figures", "the attacks on the cross-entropy: fgsm, bim, mim, pgd, apgd-ce"
GRADIENTS = "all attacks that use gradients, and so the worst case: add square, spsa, nes, zoo or rays"
# A check fails if the condition `fails` holds; then the figures `questions` are in doubt. MARKS are with every figure.
Check = namedtuple("Check", "check passed figures fails questions")
MARKS = {"same image, same logits": "RANDOM", "same logits in other batches": "BATCH-DEPENDENT"}


def mcnemar_p(more: Tensor, fewer: Tensor) -> float:
    """Exact and one-sided: the probability, were two attacks equally strong, of so many more correct (N,) under one."""
    gained, lost = int((more & ~fewer).sum()), int((fewer & ~more).sum())
    return float(binomtest(gained, gained + lost, alternative="greater").pvalue) if gained + lost else 1.0


def check_model(model: nn.Module, x: Tensor, y: Tensor, settings: Settings) -> list[Check]:
    """The checks without attacks, on x (B, C, H, W) and y (B,): in every evaluation."""
    observed, voted = Observed(model, x), Observed(model, x, eot=settings.eot)
    part, handed = x[: max(3, min(32, settings.batch_size))], x[:1].repeat(2, 1, 1, 1)
    said, logits, gradients = set(), [], []
    with torch.no_grad():
        model(handed)
        first, again, reverse = observed(part), observed(part), observed(part.flip(0)).flip(0)
        alone = torch.cat([*(observed(image) for image in part[:3].split(1)), first[3:]])
    largest = first.nan_to_num(0, 0, 0).abs().max().clamp(min=1e-30)  # an infinite logit may stay as it is
    changes = [float((other - first).nan_to_num(0).abs().max() / largest) for other in (again, reverse, alone)]
    random, batch, moved = changes[0], max(changes[1:]), float((handed - x[:1]).abs().max())
    steady, limit = random < 1e-4 or settings.eot > 1, max(1e-4, 3 * random)
    flows = has_gradient(observed, x[:1])
    for images, labels in zip(x.split(settings.batch_size), y.split(settings.batch_size), strict=True):
        images = images.clone().requires_grad_(flows)
        logits.append(voted(images))
        loss = training_loss(model)(logits[-1], labels).sum()
        gradients += torch.autograd.grad(loss, images) if flows else [torch.zeros_like(images)]
    logits = torch.cat(logits).detach()
    with autoattack_checks(said) as logger:
        checks.check_dynamic(observed, x[:1], logger=logger)
        checks.check_range_output(lambda _: logits, x, logger=logger)
    k = int((logits.argmax(1) == y).sum())
    p = float(binomtest(k, len(y), 1 / logits.shape[1], alternative="greater").pvalue)
    zero = 100 * float((torch.cat(gradients).flatten(1).abs().amax(1) == 0).float().mean())  # or not finite
    return [
        Check("clean accuracy is above chance", p < 0.01, f"{k} of {len(y)}", "binomial p >= 0.01", ALL),
        Check("same image, same logits", steady, f"change {random:.1e}", "> 1e-4 without --eot", ALL),
        Check("same logits in other batches", batch < limit, f"change {batch:.1e}", f"> {limit:.0e}: batch norm?", ALL),
        Check("images are left as they are", not moved, f"changed by {moved:.2g}", "> 0", "none: a pass gets a copy"),
        Check("AutoAttack's checks of the model", not said, "; ".join(said) or "none fires", "one fires", ALL),
        Check("gradients reach the images", zero <= 1, f"{zero:.1f} % have none", "> 1 %", GRADIENTS),
    ]


def run_audit(model: nn.Module, x: Tensor, y: Tensor, settings: Settings, parts: Path) -> list[Check]:
    """The checks by attacks on x (B, C, H, W) and y (B,); none if no gradient reaches the images. PGD is on s * logits,
    the logits that the model was trained with."""
    if not has_gradient(model, x[:1]):
        return []
    wide = 0.5 if settings.norm == "linf" else 0.5 * math.sqrt(x[0].numel())  # holds gray for every image
    torch.manual_seed(settings.seed)
    apgd = "apgd-t" if Observed(model, x)(x).shape[1] >= 4 else "apgd-ce"
    pgd_20, pgd_100 = Attack(pgd_scaled, steps=20), Attack(pgd_scaled, steps=100)
    square, scales = Attack(partial(autoattack, parts=["square"], queries=1000)), (1e-4, 0.01, 100, 1e4)
    attacks = {f"logits x {f:g}": Attack(partial(pgd_scaled, factor=f), steps=20) for f in scales}
    attacks |= {"noise": ATTACKS["noise"], "FGSM": Attack(partial(fgsm, loss=training_loss(model))), "PGD-100": pgd_100}
    attacks |= {"CW": ATTACKS["cw-inf"], apgd: ATTACKS[apgd], "Square, 1,000 queries": square}
    tried = [(name, attack, settings.eps) for name, attack in attacks.items()]
    tried += [(f"PGD-20 at {factor} x eps", pgd_20, factor * settings.eps) for factor in (0.5, 1, 1.5, 2)]
    predicted = torch.cat([predict(model, part, settings.eot) for part in x.split(settings.batch_size)])
    clean, correct = predicted.eq(y).cpu(), {}
    for name, attack, eps in [*tried, ("PGD-100, no bound", pgd_100, wide)]:
        ball = replace(settings, eps=eps, restarts=1, step_size=None)
        correct[name] = run_attack(f"audit: {name}", attack, model, x, y, clean, ball, parts)["correct"]
    correct["PGD, CW and APGD"] = correct["PGD-100"] & correct["CW"] & correct[apgd]
    percent = {name: 100 * float(each.float().mean()) for name, each in correct.items()}

    def compare(name: str, strong: str, weak: str, questions: str, level: float = 0.01) -> Check:
        p = mcnemar_p(correct[strong], correct[weak])
        figures = f"{strong} {percent[strong]:.1f} %, {weak} {percent[weak]:.1f} %, p {p:.2g}"
        return Check(name, p >= level, figures, f"McNemar's p < {level:.2g}", questions)

    radii = [name for name in correct if "x eps" in name]
    pgd_20, scaled = radii[1], min((name for name in correct if "logits" in name), key=percent.get)
    smaller, larger = min(itertools.pairwise(radii), key=lambda pair: mcnemar_p(correct[pair[1]], correct[pair[0]]))
    excess, robust = round(percent["PGD-100"] - percent[apgd], 3), percent["PGD-100, no bound"]
    figures = f"PGD-100 {percent['PGD-100']:.1f} %, {apgd} {percent[apgd]:.1f} %"
    return [
        compare("more steps are not weaker", "PGD-100", pgd_20, GRADIENTS),
        compare("FGSM is not weaker than noise", "FGSM", "noise", GRADIENTS),
        compare("gradients are not weaker than queries", "PGD, CW and APGD", "Square, 1,000 queries", GRADIENTS),
        compare("no other scale of the logits is stronger", pgd_20, scaled, ON_CE, 0.01 / 4),
        compare("accuracy does not rise with eps", larger, smaller, GRADIENTS, 0.01 / 3),
        Check("nothing is robust without a bound", robust <= 5, f"PGD-100 {robust:.1f} %", "> 5 %", GRADIENTS),
        Check(f"PGD is near {apgd}", abs(excess) <= 6, figures, "> 6 points", ON_CE if excess > 0 else apgd),
    ]


# -------------------------------------------------------------------------------------------------- loading models


def user_model(text: str) -> nn.Module:
    """The module that FILE.py:FUNCTION returns. Its imports look in the file's own folder first."""
    path, _, function = text.rpartition(":")
    if not path.endswith(".py"):
        raise common.UserError(f"{text}: name a function that returns the model, FILE.py:FUNCTION")
    folder, file = Path(path).resolve().parent, str(Path(path).resolve())
    names = {entry.stem for entry in folder.iterdir() if entry.suffix == ".py" or (entry / "__init__.py").exists()}
    hidden = {}  # modules from elsewhere with the name of one in the folder, such as our models.py
    for name, known in list(sys.modules.items()):
        top, place = name.partition(".")[0], Path(str(getattr(known, "__file__", None)))
        if top in names - sys.stdlib_module_names and folder / top not in (place.with_suffix(""), *place.parents):
            hidden[name] = sys.modules.pop(name)
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location(f"user_{Path(path).stem}", file)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        model = getattr(module, function, lambda: None)
        model = model if isinstance(model, nn.Module) else model()
        places = [Path(str(getattr(known, "__file__", None))) for known in sys.modules.values()]
    finally:
        sys.modules.update(hidden)
    if not isinstance(model, nn.Module):
        raise common.UserError(f"{text}: {path} has no function {function} that returns an nn.Module")
    own = [p for p in places if folder in p.parents and p.suffix == ".py" and "site-packages" not in p.parts]
    model.source_files = [str(p) for p in own if Path(sys.base_prefix) not in p.parents]
    return model


PUBLISHED = (  # names in the files of MART, FastAT and others, and here: replaced in turn, until the name is known
    (r"^((module|model|_orig_mod)\.)+", ""),
    (r"^linear\.", "fc."),
    (r"^layer(\d)\.", lambda match: f"layers.{int(match[1]) - 1}."),  # resnet18
    (r"^bn\.", "bn1."),
    (r"^layers\.(\d)\.", lambda match: f"block{int(match[1]) + 1}.layer."),  # preactresnet18
    (r"shortcut\.0\.", "convShortcut."),
)


def load_published(path: str | Path, device: str = "cpu", **options: object) -> tuple[models.Classifier, dict]:
    """The model of a bare state dict, or its entry state_dict, model, net or model_state_dict, in eval mode, and meta;
    options as in models.build_model. Names may be PUBLISHED ones. Raises common.UserError if they do not fit."""
    content = common.read_file(Path(path))
    if content.get("format") in common.FORMATS:
        return common.load_checkpoint(path, device)
    entries = [content.get(key) for key in ("state_dict", "model", "net", "model_state_dict")]
    state, renamed = next((entry for entry in entries if isinstance(entry, dict)), content), {}
    try:
        classes = (len(value) for name, value in state.items() if re.search(r"\b(fc|linear)\.weight$", name))
        model = models.build_model(**{"num_classes": next(classes, None)} | options)
        names, layers = model.state_dict().keys(), {name for name, _ in model.named_children()} - {"normalize"}
        unused, wrong = [], []
        for key, value in state.items():
            forms = [key]
            for published, ours in PUBLISHED:
                forms.append(forms[-1] if forms[-1] in names else re.sub(published, ours, forms[-1]))
            if forms[-1] in renamed:
                raise ValueError(f"{key} is there twice")
            renamed[forms[-1]] = value
            if forms[-1] not in names:
                (wrong if any(form.partition(".")[0] in layers for form in forms) else unused).append(key)
        missing, _ = model.load_state_dict(renamed, strict=False)
        wrong += [name for name in missing if not name.endswith("num_batches_tracked")]
        if wrong:
            raise ValueError(f"missing or unexpected: {', '.join(wrong)}")
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise common.UserError(f"{path}: not the weights of {options.get('arch')} ({str(error)[:200]})") from None
    if unused:  # the mean and std of the images?
        print(f"warning: {path}: not used: {', '.join(unused)[:200]}; see --normalize", file=sys.stderr)
    return model.to(device, memory_format=torch.channels_last).eval(), {"model_options": model.options}


def published_options(args: argparse.Namespace) -> dict:
    """build_model's arguments for a bare state dict, from the flags."""
    if not args.dataset:
        raise common.UserError("--arch is for a bare state dict, which also needs --dataset")
    data = common.load_data(args.dataset, args.data_dir or "data")
    scale, margin = {"linear": (1.0, 0.0), "he": (15.0, 0.2), "mhe": (15.0, 0.1)}[args.head]
    options = {"arch": args.arch, "head": args.head, "in_channels": data.in_channels, "image_size": data.image_size}
    own = {"scale": args.scale, "margin": args.margin}
    options |= {"scale": scale, "margin": margin} | {key: value for key, value in own.items() if value is not None}
    published_he = data.known == "cifar10" and args.head != "linear"  # they normalize in the network
    if args.normalize or (published_he and args.normalize is None):
        options |= {"mean": [0.4914, 0.4822, 0.4465], "std": [0.2471, 0.2435, 0.2616]}
    return options


def load_models(texts: list[str], args: argparse.Namespace) -> list[Model]:
    """Run folders, checkpoints, bare state dicts (with --arch) and FILE.py:FUNCTION, in eval mode on the device."""
    bare = texts and args.arch
    found, load = [], partial(load_published, **published_options(args)) if bare else common.load_checkpoint
    for text in texts:
        if re.search(r"\.py(:|$)", text):
            name, net, meta = Path(text.replace(".py:", "-")).name, user_model(text), {"checkpoint": text}
        else:
            file = common.checkpoint_file(text)
            net, meta = load(file, args.device)
            folder, meta["checkpoint"] = file.resolve().parent.name, str(file)
            name = {"best.pt": folder, "last.pt": f"{folder}-last"}.get(file.name, file.stem)
        if name in [model.name for model in found]:
            name = f"{len(found) + 1}-{name}"
        found.append(Model(name, net.to(args.device).eval(), meta))
    return found


def check_fit(model: Model, data: common.Data, device: str) -> None:
    """Raises UserError if the model was built for other images or classes, or does not return logits (B, K)."""
    built = model.net.options if isinstance(model.net, models.Classifier) else {}
    for key, value in {"in_channels": data.in_channels, "image_size": data.image_size}.items():
        if built.get(key, value) != value:
            raise common.UserError(f"{model.name} was built for {key} {built[key]}, but {data.name} has {value}")
    logits = model.net(common.images_at(data.x_test, torch.arange(min(2, len(data.y_test))), device))
    kind = type(logits).__name__ + " (return its .logits)" * hasattr(logits, "logits")
    got = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, Tensor) else kind
    if not got.startswith("torch.float32 (") or logits.ndim != 2 or logits.shape[1] < data.num_classes:
        needed = f"float32 logits (B, K), K at least {data.num_classes} as the labels of {data.name} go so far"
        raise common.UserError(f"{model.name} returned {got} for two images; needed: {needed}")


def allow_tf32(on: bool) -> None:
    """TF32 in convolutions on CUDA, torch's own default; else exact float32, also where a user's model is not."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = on, False  # shapes change as images fall out


# ---------------------------------------------------------------------------------------------------------- output


def write_arrays(path: Path, **arrays: np.ndarray | Tensor) -> None:
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    common.write_file(content.getbuffer(), path)


def csv_text(rows: list[dict]) -> bytes:
    """A line of keys and a line for each row, numbers with six significant digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*rows[0]])
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return text.getvalue().encode()


def write_results(result: dict, *folders: Path) -> None:
    """verdicts.npz (per image), eval.csv (a row per attack) and eval.json (everything else)."""
    columns = {"attack": None} | dict.fromkeys(result["attacks"]["clean"])
    table = csv_text([columns | {"attack": name} | row for name, row in result["attacks"].items()])
    text = json.dumps({key: value for key, value in result.items() if key != "verdicts"}, indent=2)
    for folder in folders:  # all ranks write the same, under a temporary name first
        write_arrays(folder / "verdicts.npz", **result["verdicts"])
        common.write_file(table, folder / "eval.csv")
        common.write_file(text.encode(), folder / "eval.json")  # last: it says that the others are there


def print_table(results: list[dict]) -> None:
    """Attacks by models: accuracy in % with its 95 % interval; for one model also the costs."""
    first, column = results[0], max(23, *(len(result["model"]) for result in results))
    n, ball = first["attacks"]["clean"]["n"], f"{first['norm'].capitalize()} eps {first['eps']:.4g}"
    print(f"\n{first['dataset']}, n = {n} test images, {ball}: accuracy in %, in brackets its 95 % interval")
    print("worst case: correct under every attack in this ball, image by image; queries: forward passes\n")
    names = [*dict.fromkeys(name for result in results for name in [*result["attacks"]][:-1]), "worst case"]
    width, costs = max(24, *map(len, names)), len(results) == 1
    heads = "".join(f"  {result['model']:>{column}}" for result in results)
    print(f"{'attack':<{width}}{heads}" + "   queries/image  seconds" * costs)
    for name in names:
        rows = [result["attacks"].get(name) for result in results]
        cells = [f"{row['accuracy']:.2f} ({row['low']:.2f} - {row['high']:.2f})" if row else "" for row in rows]
        line = f"{name:<{width}}" + "".join(f"  {cell:>{column}}" for cell in cells)
        if costs and name != "worst case":
            line += f"{rows[0]['queries']:>16.0f}{rows[0]['seconds']:>9.1f}"
        print("  ".join([line, *dict.fromkeys(row["remark"] for row in rows if row)]).rstrip())


def paired_difference(a: np.ndarray, b: np.ndarray) -> dict:
    """Accuracy of b minus that of a, both (N,) bool on the same images, in points, with the 95 % interval of Agresti &
    Min 2005 (Wald's, with half an image more in each of the four cells) and p of McNemar's exact two-sided test."""
    gained, lost, n = int((b & ~a).sum()), int((a & ~b).sum()), len(a)
    p = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    spread = 1.96 * math.sqrt(gained + lost + 1 - (gained - lost) ** 2 / (n + 2))
    low, high = (max(-100, min(100, 100 * (gained - lost + side * spread) / (n + 2))) for side in (-1, 1))
    return {"difference": 100 * (gained - lost) / n, "low": low, "high": high, "p": p}


def compare_models(results: list[dict]) -> list[dict]:
    """Prints and returns each model minus the first: paired differences for the attacks that both faced."""
    first, rows, width = results[0], [], max(len(name) for name in results[0]["attacks"])
    for other in results[1:]:
        shared = [name for name in first["attacks"] if name in other["attacks"] and name != "worst case"]
        sides = []
        for result in (first, other):
            verdicts = {name: result["verdicts"][name] for name in shared}
            inside = [verdicts[name] for name in shared if result["attacks"][name]["norm"] == result["norm"]]
            sides.append(verdicts | {"worst case": np.all(inside, 0)})
        about = {"model": other["model"], "minus": first["model"], "n": len(sides[0]["clean"])}
        print("\n{model} minus {minus}, the same {n} images: points (95 % interval), McNemar's exact p".format(**about))
        for name in sides[0]:
            row = {"attack": name} | paired_difference(sides[0][name], sides[1][name])
            print("{attack:<{w}}  {difference:+7.2f} ({low:+.2f} to {high:+.2f})  p {p:.2g}".format(w=width, **row))
            rows.append(about | row)
    print("worst case: over the attacks that both models faced; p is of one comparison, without correction for many")
    return rows


def print_checks(model: str, checks: list[dict], failed_only: bool = False) -> None:
    """Pass or FAIL for each check, with its figures, and what a failure calls into question."""
    shown = [check for check in checks if not (failed_only and check["passed"])]
    failed = sum(not check["passed"] for check in checks)
    if shown:
        print(f"\nchecks of {model}: {failed} of {len(checks)} FAIL" if failed else f"\naudit of {model}: passes")
    for check in shown:
        verdict, question = ("pass", "") if check["passed"] else ("FAIL", f"\n      in question: {check['questions']}")
        print(f"{verdict}  {check['check']:<40}  {check['figures']}; fails if {check['fails']}{question}")


# ---------------------------------------------------------------------------------------------------- command line


def shared_parser(doc: str) -> common.Parser:
    """The flags that eval_all.py and analyze.py share."""
    parser = common.Parser(doc)
    flag, number, on_off = parser.add_argument, common.number, argparse.BooleanOptionalAction
    flag("checkpoints", nargs="*", metavar="MODEL", help="a run folder, a .pt file, or FILE.py:FUNCTION")
    flag("--model", action="append", default=[], metavar="FILE.py:FUNCTION", help="the same as MODEL")
    flag("--dataset", metavar="NAME_OR_NPZ", help="(default: what the checkpoint was trained on)")
    flag("--data-dir", help="(default: as in training)")
    flag("--num-images", type=number(int, 1), metavar="N", help="test images, a fixed random choice (default: all)")
    flag("--norm", choices=("linf", "l2"), default="linf", help="of the ball (default: linf)")
    flag("--eps", type=number(float, 0), help="in pixel units (default: the papers': mnist 0.3, cifar 0.031)")
    flag("--batch-size", type=number(int, 1), help="(default: 250, on CUDA 500)")
    flag("--seed", type=number(int, 0, 2**31), default=0, help="(default: 0)")
    flag("--device", type=common.device_flag, default="auto", help="(default: cuda if there is a GPU)")
    flag("--out", help="(default: a folder beside the checkpoint; for several models, here)")
    flag("--arch", help="such as wrn-34-10; this and what follows is for a bare state dict")
    flag("--head", default="linear", choices=("linear", "he", "mhe"), help="(default: linear)")
    flag("--scale", type=number(float, 0), help="s of the training loss (default: 15, linear 1; HE's README has 10)")
    flag("--margin", type=number(float, 0), help="m of the training loss (default: he 0.2, mhe 0.1, linear 0)")
    flag("--normalize", action=on_off, help="CIFAR-10's mean and std in the network (default: on for he and mhe)")
    return parser


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser, number = shared_parser(__doc__), common.number
    flag = parser.add_argument
    flag("--attacks", default="quick", help=f"names, {', '.join(PRESETS)}, paper; with commas (default: quick)")
    flag("--source", nargs="+", default=[], metavar="MODEL", help="craft FGSM, MIM-20 and PGD-20 on these: transfer")
    flag("--audit", action=argparse.BooleanOptionalAction, help="(default: with the presets paper and all)")
    flag("--step-size", type=number(float, 1e-6), help="in pixel units (default: the papers', or 2.5 eps / N)")
    flag("--restarts", type=number(int, 1), default=1, help="of attacks with a random start (default: 1)")
    flag("--save-adversarial", action="store_true", help="keep the attacked images of each attack, as .npz")
    flag("--eot", type=number(int, 1), default=1, metavar="N", help="of a random model: average and vote over N draws")
    flag("--exact", action="store_true", help="craft in exact float32 on CUDA too (default: TF32 convolutions)")
    flag("--amp", action="store_true", help="craft in bfloat16, perhaps weaker; verdicts stay in float32")
    args = parser.parse_args(argv)
    named = {name.strip() for name in args.attacks.split(",")}
    args.audit = bool({"paper", "all"} & named) if args.audit is None else args.audit
    return args


def load_models_and_data(args: argparse.Namespace) -> tuple[list[Model], list[Model], common.Data, Tensor]:
    """The models, the sources of transfer attacks, the dataset, and the rows of its test images to use."""
    found, sources = load_models([*args.checkpoints, *args.model], args), load_models(args.source, args)
    if not found:
        raise common.UserError("name a run folder, a checkpoint, or FILE.py:FUNCTION")
    folders = {m.meta["args"]["dataset"]: m.meta["args"]["data_dir"] for m in found + sources if "args" in m.meta}
    if not args.dataset and len(folders) != 1:
        raise common.UserError(f"which dataset? ({', '.join(folders) or 'no model says which'}): give --dataset")
    args.batch_size = args.batch_size or (500 if args.device.startswith("cuda") else 250)
    dataset = args.dataset or next(iter(folders))
    data = common.load_data(dataset, args.data_dir or folders.get(dataset, "data"))
    for model in found + sources:
        check_fit(model, data, args.device)
    order = np.random.default_rng(common.SPLIT_SEED).permutation(len(data.y_test))  # files may be sorted by class
    return found, sources, data, torch.from_numpy(np.sort(order[: args.num_images]))


def output_folder(args: argparse.Namespace, found: list[Model], name: str) -> Path:
    """--out, or the folder `name` beside the checkpoint, or for several models here. It is made."""
    file = Path(found[0].meta["checkpoint"])
    folder = file.parent / (name if file.name == "best.pt" else f"{name}-{file.stem}")
    if args.out or len(found) > 1 or not file.exists():  # or FILE.py:FUNCTION
        folder = Path(args.out or name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.device = common.init_distributed(args.device)
    found, sources, data, index = load_models_and_data(args)
    x = data.x_test[index] if isinstance(data.x_test, Tensor) else torch.cat(list(data.x_test.read(index.split(16))))
    y, out, results = data.y_test[index].to(args.device), output_folder(args, found, "eval"), []
    options = {key: value for key, value in vars(args).items() if key in Settings.__dataclass_fields__}
    options |= {"dataset": data.known, "index": index, "audit": args.audit, "save_adversarial": args.save_adversarial}
    if args.eps is None and args.norm == "linf":
        options["eps"] = preset_eps(args.attacks, found, data.known)
    image, settings = common.images_at(x, torch.arange(1), args.device), Settings(norm=args.norm, dataset=data.known)
    attacks = select_attacks(args.attacks, found, settings, image) | transfer_attacks(sources)
    for model in found:
        print(f"{model.name}: {len(attacks)} attacks on {len(y)} images of {data.name}")
        about = {k: v for k, v in model.meta.items() if k in "checkpoint method epoch model_options args".split()}
        if history := model.meta.get("history"):
            seconds = model.meta["args"]["epochs"] * float(np.mean([row["seconds"] for row in history]))
            about |= {"training_seconds": seconds, "training_hardware": model.meta.get("hardware")}
        about |= {"model": model.name, "dataset": data.name, "torch": str(torch.__version__)}
        about |= {"hardware": common.hardware(args.device), "command": " ".join(["python", *sys.argv])}
        folder = out / model.name if len(found) > 1 else out
        results.append(evaluate(model.net, x, y, attacks, folder=folder, about=about, **options))
    print_table(results)
    if len(results) > 1:
        common.write_file(csv_text(compare_models(results)), out / "paired.csv")
    for result in results:
        print_checks(result["model"], result.get("audit", result["checks"]), failed_only="audit" not in result)
    print(f"\nwritten to {out}")


if __name__ == "__main__":
    common.cli(main)
