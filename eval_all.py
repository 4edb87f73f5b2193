"""Every attack against any checkpoint: a table, and the worst case over all attacks, image by image.

    python eval_all.py runs/angular_at-digits-s0                      # a run directory (its best.pt) or a .pt file
    python eval_all.py runs/A runs/B --attacks paper --n 1000         # several: one table and one plot
    python eval_all.py runs/A runs/B --source runs/A runs/B           # transfer, from each to each
    python eval_all.py runs/A --attacks pgd-40@0.01,mim-100 --restarts 5
    python eval_all.py wrn.pt --arch wrn-34-10 --head he --dataset cifar10     # a published TRADES / MART / HE file
    python eval_all.py --model my_file.py:make_model --dataset cifar10         # any nn.Module on [0, 1] images

What is in this file, in its order; eps is in pixel units, -N a number of steps, any number will do, and * knows both
norms, Linf and (--norm l2) L2:

    in the ball              clean, noise*; NAME@0.01 sets a step size
      fgsm*, bim-N*, mim-N*  one step, many steps, many steps with momentum, from the image itself; fgsm-l2: in L2
      pgd-N*                 random start, CE on the logits as the model gives them, as in the papers' own code
      pgd-N-scaled*          the same on scale * logits, the logits that an HE model was trained with
      pgd-N-fn*              the same on W z / ||z||: feature normalization in the attack alone
      adaptive-pgd-N*        the same on the training cross-entropy, with its scale and margin
      cw-inf*, cw-inf-N*     the margin loss of Carlini & Wagner under PGD, 20 steps if not said otherwise
      mta-N*, feature        PGD towards each wrong class, towards the features of images of other classes
      apgd-ce*, apgd-t*      Auto-PGD on the cross-entropy, on the targeted DLR loss
    the nearest image        fab-t*, deepfool*, cw-l2: counted if it lies within eps, with the median distance
    black box                square*, spsa-N, nes-N, zoo, rays, with the queries that an image took
    NAME from SOURCE         with --source: fgsm, mim-20 and pgd-20 crafted on another model
    autoattack*              apgd-ce, apgd-t, fab-t and square; autoattack-official is the authors' package
    evaluator, audit         what counts, what goes on after an interruption; when not to believe a figure
    --corruptions [DIR]      CIFAR-10-C, ImageNet-C, or our approximation of them
    --geodesic               D-SphereNet's rejection by the angle, and an attack that evades it
    --analyze NAMES          curves, gradients, features, examples: figures; angles of the class weights
    --report DIR             a text with its tables filled in from many evaluations

The evaluator decides what counts, not the attack: an adversarial image must lie in the ball and in [0, 1], and the
model must misclassify it in float32. An image that is misclassified clean is not robust under any attack.
OUT receives eval.json, eval.csv, eval.png and verdicts.npz (per image: index, label, clean_prediction, and a bool for
each attack: still right); with several models each has its own folder in OUT, beside the comparison.
"""

import argparse
import csv
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import re
import shlex
import statistics
import sys
import sysconfig
import time
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial, reduce
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

import common
import models

# ------------------------------------------------------------------------------------------- white box, in the ball
# (model, x, y, *, eps, **options) -> x_adv; x and x_adv are (B, C, H, W) in [0, 1]. The evaluator has put the model in
# eval mode, frozen its parameters and seeded the generator. An image leaves the batch once it is fooled.

NORMS = {"linf": "Linf", "l2": "L2"}
TOLERANCE = 1e-6  # of a pixel value, in float32
NEWTON_STEPS = 15
Attack = Callable[..., Tensor]
Loss = Callable[..., Tensor]


def outermost(eps: float) -> float:
    """The distance from an image to which float32 may take what lies in its eps ball."""
    return eps + TOLERANCE * max(1.0, 10 * eps)


def ce(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each image, (B,)."""
    return F.cross_entropy(logits, y, reduction="none")


def trained_with(model: nn.Module, constant: str) -> float:
    """The `scale` s or `margin` m of the model's training loss, which its logits do not hold: 1 and 0 where the model
    does not give it as a number (a layer called scale, or one that is learned, has done its work in forward)."""
    value = getattr(model, constant, None)
    return value if isinstance(value, int | float) else {"scale": 1.0, "margin": 0.0}[constant]


def training_ce(model: nn.Module, margin: float) -> Loss:
    """The cross-entropy of each image that the model was trained with (HE, Eq. 6), for a given margin."""
    return partial(common.margin_ce, scale=trained_with(model, "scale"), margin=margin, reduction="none")


def cw_margin(logits: Tensor, y: Tensor) -> Tensor:
    """max over j != y of Z_j, minus Z_y, (B,): positive where the image is misclassified (HE, Sec. B.2)."""
    true = logits.gather(1, y[:, None]).squeeze(1)
    return logits.scatter(1, y[:, None], -math.inf).amax(1) - true


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """The targeted difference of logits ratio, (B,) (Croce & Hein 2020, Eq. 6): no scale of the logits changes it.

    It needs the four largest logits; with fewer classes it is the difference alone.
    """
    rise = logits.gather(1, target[:, None]).squeeze(1) - logits.gather(1, y[:, None]).squeeze(1)
    if logits.shape[1] < 4:
        return rise
    first, _, third, fourth = logits.topk(4).values.unbind(1)
    return rise / (first - (third + fourth) / 2 + 1e-12)


def clean(model: nn.Module, x: Tensor, y: Tensor, *, eps: float) -> Tensor:
    return x


def noise(model: nn.Module, x: Tensor, y: Tensor, *, eps: float, norm: str = "linf") -> Tensor:
    """Uniform in the ball: what no attack may be weaker than."""
    return common.random_start(x, eps, norm)


def fgsm(model: nn.Module, x: Tensor, y: Tensor, *, eps: float, norm: str = "linf", loss: Loss = ce) -> Tensor:
    """Goodfellow et al. 2015 (HE, Eq. 17): one step of eps along the sign of the gradient."""
    return common.pgd(model, x, y, loss=loss, eps=eps, step_size=eps, steps=1, start=x, norm=norm)


def bim(model: nn.Module, x: Tensor, y: Tensor, **budget: float) -> Tensor:
    """Kurakin et al. 2017 (HE, Eq. 18): PGD from the image itself."""
    return pgd(model, x, y, start=x, **budget)


def mim(
    model: nn.Module, x: Tensor, y: Tensor, *, loss: Loss = ce, drop_fooled: bool = True, **budget: float
) -> Tensor:
    """Dong et al. 2018 (HE, Eq. 19 and 20): BIM with momentum 1 on the L1-normalized gradient."""
    return common.pgd(model, x, y, loss=loss, start=x, momentum=1.0, drop_fooled=drop_fooled, **budget)


def pgd(
    model: nn.Module, x: Tensor, y: Tensor, *, loss: Loss = ce, drop_fooled: bool = True, **budget: float
) -> Tensor:
    """Madry et al. 2018, CE on model(x). On an HE model these are the raw cosines, which makes it a weak attack."""
    return common.pgd(model, x, y, loss=loss, drop_fooled=drop_fooled, **budget)


def pgd_scaled(model: nn.Module, x: Tensor, y: Tensor, **budget: float) -> Tensor:
    """PGD on CE(s * model(x), y), s the scale that the model was trained with (1 for a linear head)."""
    return pgd(model, x, y, loss=training_ce(model, 0.0), **budget)


def pgd_fn(model: nn.Module, x: Tensor, y: Tensor, **budget: float) -> Tensor:
    """PGD on CE(W z~, y), z~ the normalized input of the model's last layer fc, for a model that was trained without
    (HE, Eq. 12 and 13, Table 7)."""
    z = None

    def note(fc: nn.Linear, inputs: tuple[Tensor]) -> None:
        nonlocal z
        (z,) = inputs

    def fn_ce(logits: Tensor, y: Tensor) -> Tensor:
        return ce(F.linear(F.normalize(z), model.fc.weight), y)

    noting = model.fc.register_forward_pre_hook(note)
    try:
        return pgd(model, x, y, loss=fn_ce, **budget)
    finally:
        noting.remove()


def adaptive_pgd(model: nn.Module, x: Tensor, y: Tensor, **budget: float) -> Tensor:
    """PGD on the training cross-entropy with its scale and margin (HE, Sec. 4.1, 'Adaptive attacks')."""
    return pgd(model, x, y, loss=training_ce(model, trained_with(model, "margin")), **budget)


def cw_inf(model: nn.Module, x: Tensor, y: Tensor, **budget: float) -> Tensor:
    """PGD on the margin of the logits (Carlini & Wagner 2017 under Linf; Angular-AT, Sec. 5)."""
    return pgd(model, x, y, loss=cw_margin, **budget)


def by_target(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, norm: str, targets: float, attack: Callable[..., Tensor]
) -> Tensor:
    """attack(x, y, target) towards each of the likeliest wrong classes in turn, on the images that still stand.

    Of several misclassified results the nearest to x is returned; where there is none, x.
    """
    ranking = predict_logits(model, x).scatter(1, y[:, None], -math.inf).argsort(1, descending=True)
    x_adv, nearest = x.clone(), x.new_full((len(x),), math.inf)
    for target in ranking[:, : min(targets, ranking.shape[1] - 1)].T:  # all of them where targets is infinite
        rows = (nearest > outermost(eps)).nonzero().flatten()
        if not len(rows):
            break
        tried = attack(x[rows], y[rows], target[rows])
        distance = common.lengths(tried - x[rows], norm).flatten()
        closer = (distance < nearest[rows]) & common.fooled(model, tried, predict_logits(model, tried), y[rows])
        x_adv[rows[closer]], nearest[rows[closer]] = tried[closer], distance[closer]
    return x_adv


def mta(model: nn.Module, x: Tensor, y: Tensor, *, eps: float, norm: str = "linf", **budget: float) -> Tensor:
    """The multi-target attack of WeightPen, Sec. 4: a targeted PGD for each class, the worst counts."""

    def towards(x: Tensor, y: Tensor, target: Tensor) -> Tensor:
        return common.pgd(model, x, y, loss=lambda logits, _: -ce(logits, target), eps=eps, norm=norm, **budget)

    return by_target(model, x, y, eps, norm, math.inf, towards)


def feature(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int = 50,
    images: int = 100,
) -> Tensor:
    """The feature attack (Lin et al. 2019): from a random start towards the features, in cosine, of another class.

    `images` of other classes, drawn from the batch, are tried in turn on each image that still stands; where the batch
    has none, the image is driven away from its own features.
    """
    with torch.no_grad():
        z = model.features(x)
    x_adv, standing = x.clone(), torch.arange(len(x), device=x.device)
    for _ in range(images):
        others = y != y[standing, None]
        aim = (torch.rand(others.shape, device=x.device) * others).argmax(1)
        towards = others.any(1)
        z_aim, sign = z[torch.where(towards, aim, standing)], torch.where(towards, 1, -1)
        now = common.random_start(x[standing], eps, "linf")
        for _ in range(steps):
            now.requires_grad_()
            similarity = sign * F.cosine_similarity(model.features(now), z_aim)
            (grad,) = torch.autograd.grad(similarity.sum(), now)
            common.check_finite(grad)
            now = common.project(now.detach() + step_size * grad.sign(), x[standing], eps, "linf")
        x_adv[standing] = now
        standing = standing[~common.fooled(model, now, predict_logits(model, now), y[standing])]
        if not len(standing):
            break
    return x_adv


def apgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: str = "linf",
    loss: Loss = ce,
    target: Tensor | None = None,
    steps: int = 100,
) -> Tensor:
    """Auto-PGD (Croce & Hein 2020, Alg. 1): PGD with momentum, whose step halves where the loss no longer rises.

    Each image is checked after 22 % of the steps, and then at intervals that shrink by 3 % to 6 %. Its step is halved,
    and its best point taken up again, where under 3/4 of the steps since the last check raised the loss, or where
    neither step nor best loss changed. loss takes logits, y and, if there is one, `target` (B,).
    """
    t = 2 * torch.rand_like(x) - 1 if norm == "linf" else torch.randn_like(x)
    now = (x + eps * t / common.lengths(t, norm)).clamp(0, 1)
    bottom = x.new_full((len(x),), -math.inf)
    labels = torch.stack([y] if target is None else [y, target], 1)
    s = {"row": torch.arange(len(x), device=x.device), "x": x, "labels": labels, "now": now, "before": now, "best": now}
    s |= {"best_grad": now, "step": torch.full_like(x[:, :1, :1, :1], 2 * eps), "halved": torch.ones_like(y).bool()}
    s |= {"best_value": bottom, "checked": bottom, "value": -bottom, "rises": torch.zeros_like(bottom)}  # none at first
    x_adv, since, interval = now.clone(), 0, max(int(0.22 * steps), 1)
    for i in range(steps + 1):
        now = s["now"].detach().requires_grad_()
        logits = model(now)
        value = loss(logits, *s["labels"].T)
        (grad,) = torch.autograd.grad(value.sum(), now)
        common.check_finite(grad)
        now, value = now.detach(), value.detach()
        better = value > s["best_value"]
        s |= {"grad": grad, "rises": s["rises"] + (value > s["value"]), "value": value, "now": now}
        for best, current in (("best", now), ("best_grad", grad), ("best_value", value)):
            s[best] = torch.where(better.view(-1, *[1] * (current.ndim - 1)), current, s[best])
        beaten = common.fooled(model, now, logits, s["labels"][:, 0])
        x_adv[s["row"]] = torch.where(beaten[:, None, None, None], now, s["best"])
        s = {key: tensor[~beaten] for key, tensor in s.items()}
        if i == steps or not len(s["row"]):
            break
        if i and (since := since + 1) == interval:
            _halve_steps(s, interval)
            since, interval = 0, max(interval - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
        aim = common.project(s["now"] + s["step"] * common.steepest(s["grad"], norm), s["x"], eps, norm)
        a = 0.75 if i else 1.0
        ahead = s["now"] + a * (aim - s["now"]) + (1 - a) * (s["now"] - s["before"])
        s["before"], s["now"] = s["now"], common.project(ahead, s["x"], eps, norm)
    return x_adv


def _halve_steps(s: dict[str, Tensor], interval: int) -> None:
    """Auto-PGD's check of the images in state `s`, `interval` steps after the last one."""
    halve = (s["rises"] <= 0.75 * interval) | (~s["halved"] & (s["best_value"] <= s["checked"]))
    where = halve[:, None, None, None]
    s["step"] = torch.where(where, s["step"] / 2, s["step"])
    s["now"], s["grad"] = torch.where(where, s["best"], s["now"]), torch.where(where, s["best_grad"], s["grad"])
    s |= {"halved": halve, "checked": s["best_value"], "rises": torch.zeros_like(s["rises"])}


def apgd_targeted(
    model: nn.Module, x: Tensor, y: Tensor, *, eps: float, norm: str = "linf", steps: int = 100, targets: int = 9
) -> Tensor:
    """APGD-T of AutoAttack: Auto-PGD on the targeted DLR loss, for each of the likeliest wrong classes."""

    def towards(x: Tensor, y: Tensor, target: Tensor) -> Tensor:
        return apgd(model, x, y, eps=eps, norm=norm, loss=targeted_dlr, target=target, steps=steps)

    return by_target(model, x, y, eps, norm, targets, towards)


# --------------------------------------------------------------------------------------- white box, minimal distance
# These look for the nearest misclassified image, which may lie outside the ball: the evaluator measures how far.


def step_to_plane(x: Tensor, w: Tensor, rise: Tensor, norm: str) -> Tensor:
    """The shortest d with <w, d> = rise and x + d in [0, 1], for x and w (B, D) and rise (B,) >= 0.

    Where the box ends first, d goes as far as it can. Every coordinate moves up w at speed 1 (Linf) or |w_i| (L2) until
    it meets the box, so that the rise is concave and piecewise linear in the time; Newton's steps from 0 find the time
    from below.
    """
    room = torch.where(w > 0, 1 - x, x)
    speed, w_abs = (torch.ones_like(w) if norm == "linf" else w.abs()), w.abs()
    time = torch.zeros_like(rise)
    for _ in range(NEWTON_STEPS):
        reach = time[:, None] * speed
        moving = reach < room
        gained = (w_abs * torch.where(moving, reach, room)).sum(1)
        slope = (w_abs * speed * moving).sum(1)
        if not ((rise - gained > 1e-7 * rise) & (slope > 0)).any():
            break
        time = time + torch.where(slope > 0, (rise - gained) / slope.clamp(min=1e-30), 0.0)
    return torch.minimum(time[:, None] * speed, room) * w.sign()


def fab(model: nn.Module, x: Tensor, y: Tensor, target: Tensor, *, eps: float, norm: str, steps: int = 100) -> Tensor:
    """The targeted Fast Adaptive Boundary attack (Croce & Hein 2020b): x_adv, the nearest to x that it met, or x.

    Each step goes to the linearized boundary between y and target, from the current point and, with weight alpha up to
    0.1, from x itself, 5 % beyond; a misclassified point is kept and drawn back by 10 %. An image is done with eps.
    """
    x_adv, nearest = x.clone(), x.new_full((len(x),), math.inf)
    row, now = torch.arange(len(x), device=x.device), x.clone()
    for _ in range(steps):
        near, far = now.requires_grad_(), x[row]
        logits = model(near)
        rise = logits.gather(1, target[row, None]).squeeze(1) - logits.gather(1, y[row, None]).squeeze(1)
        (w,) = torch.autograd.grad(rise.sum(), near)
        common.check_finite(w)
        near, w = near.detach(), w.flatten(1)
        gap = -rise.detach()  # to the boundary, along w; negative beyond it
        gap_far = gap + (w * (near - far).flatten(1)).sum(1)
        step_near, step_far = (
            (step_to_plane(point.flatten(1), w * side.sign()[:, None], side.abs(), norm)).view_as(near)
            for point, side in ((near, gap), (far, gap_far))
        )
        lengths = [common.lengths(step, norm).clamp(min=1e-8) for step in (step_near, step_far)]
        alpha = (lengths[0] / (lengths[0] + lengths[1])).clamp(max=0.1)
        now = ((1 - alpha) * (near + 1.05 * step_near) + alpha * (far + 1.05 * step_far)).clamp(0, 1)
        distance = common.lengths(now - far, norm).flatten()
        logits = predict_logits(model, now)
        wrong = logits.argmax(1) != y[row]
        within = wrong & (distance <= eps)
        within[within.clone()] = common.fooled(model, now[within], logits[within], y[row[within]])
        wrong &= within | (distance > eps)
        closer = wrong & (distance < nearest[row])
        x_adv[row[closer]], nearest[row[closer]] = now[closer], distance[closer]
        now = torch.where(wrong[:, None, None, None], far + 0.9 * (now - far), now)
        row, now = row[~within], now[~within]
        if not len(row):
            break
    return x_adv


def fab_targeted(
    model: nn.Module, x: Tensor, y: Tensor, *, eps: float, norm: str = "linf", steps: int = 100, targets: int = 9
) -> Tensor:
    """FAB-T of AutoAttack: towards each of the likeliest wrong classes, on the images not yet fooled within eps."""
    return by_target(model, x, y, eps, norm, targets, partial(fab, model, eps=eps, norm=norm, steps=steps))


def deepfool(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: str = "linf",
    steps: int = 50,
    overshoot: float = 0.02,
    candidates: int = 10,
) -> Tensor:
    """Moosavi-Dezfooli et al. 2016: to the nearest of the linearized boundaries with the likeliest classes, again and
    again until the class changes; the overshoot stretches all steps together. WeightPen, Sec. 4: 50 steps, 0.02;
    HE: 100 steps."""
    x_adv, path, row = x.clone(), torch.zeros_like(x), torch.arange(len(x), device=x.device)
    others = predict_logits(model, x).scatter(1, y[:, None], -math.inf).argsort(1, descending=True)
    others = others[:, : min(candidates, others.shape[1]) - 1]
    for _ in range(steps):
        now = x_adv[row].requires_grad_()
        logits = model(now)
        rises = logits.gather(1, others[row]) - logits.gather(1, y[row, None])
        standing = ~common.fooled(model, now, logits, y[row])
        beyond = 2 * common.rounding(logits.detach())  # what counts as fooled, twice over
        planes = []
        for rise in rises.T:
            (w,) = torch.autograd.grad(rise.sum(), now, retain_graph=True)
            common.check_finite(w)
            dual = w.abs().sum((1, 2, 3)) if norm == "linf" else common.lengths(w, "l2").flatten()
            gap = rise.detach().abs()
            gap = gap + (beyond - overshoot * gap).clamp(min=0)  # where the overshoot does not reach that far
            planes.append((gap, dual.clamp(min=1e-12), w))
        gap, dual, w = (torch.stack(parts) for parts in zip(*planes, strict=True))
        nearest, every = (gap / dual).argmin(0), torch.arange(len(row), device=x.device)
        length = (gap / dual)[nearest, every][:, None, None, None]
        step = length * common.steepest(w[nearest, every], norm)
        row, step = row[standing], step[standing]
        if not len(row):
            break
        path[row] += step
        x_adv[row] = (x[row] + (1 + overshoot) * path[row]).clamp(0, 1)
    return x_adv


def cw_l2(
    model: nn.Module, x: Tensor, y: Tensor, *, eps: float, steps: int = 1000, lr: float = 0.01, searches: int = 9
) -> Tensor:
    """Carlini & Wagner 2017, L2: Adam on ||x' - x||^2 + c * max(margin, 0) over w, x' = (1 + tanh(w)) / 2.

    c starts at 0.001 and is searched for each image: ten times larger until it is fooled, then by bisection. The
    nearest misclassified image is returned, else x. Every tenth of the steps the search ends if nothing improved.
    """
    c, low, high = (x.new_full((len(x),), value) for value in (1e-3, 0.0, math.inf))
    x_adv, nearest = x.clone(), x.new_full((len(x),), math.inf)
    for _ in range(searches):
        w = torch.atanh((2 * x - 1) * (1 - 1e-6)).requires_grad_()
        adam, met, last = torch.optim.Adam([w], lr), torch.zeros_like(c, dtype=torch.bool), math.inf
        for step in range(steps):
            now = (1 + w.tanh()) / 2
            logits = model(now)
            distance = (now - x).square().sum((1, 2, 3))
            loss = (distance + c * (-cw_margin(logits, y)).clamp(min=0)).sum()
            (w.grad,) = torch.autograd.grad(loss, w)
            common.check_finite(w.grad)
            wrong = common.fooled(model, now, logits, y)
            closer, met = wrong & (distance.detach() < nearest), met | wrong
            x_adv[closer], nearest[closer] = now.detach()[closer], distance.detach()[closer]
            adam.step()
            if step % max(steps // 10, 1) == 0:
                if loss.item() > 0.9999 * last:
                    break
                last = loss.item()
        high, low = torch.where(met, torch.minimum(high, c), high), torch.where(met, low, torch.maximum(low, c))
        c = torch.where(high.isfinite(), (low + high) / 2, 10 * c)
    return x_adv


# -------------------------------------------------------------------------------------------------- black-box attacks
# Only logits, or only labels, are asked for. A query is one forward pass of one image; `queries` is the most that any
# image gets, and those that are fooled get no more.


def random_sign(shape: tuple[int, ...], x: Tensor) -> Tensor:
    return torch.randint(0, 2, shape, device=x.device, dtype=x.dtype).mul_(2).sub_(1)


SQUARE_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of p, in iterations out of 10,000


def square_side(x: Tensor, p: float, least: int = 1) -> int:
    """The side of a window that covers the share p of an image."""
    height, width = x.shape[2:]
    return min(max(round(math.sqrt(p * height * width)), least), height, width)


def random_window(x: Tensor, side: int) -> Tensor:
    """A square of side x side pixels at random in each image: (B, 1, H, W), True inside."""
    height, width = x.shape[2:]
    top = torch.randint(height - side + 1, (len(x), 1, 1, 1), device=x.device)
    left = torch.randint(width - side + 1, (len(x), 1, 1, 1), device=x.device)
    row, column = torch.arange(height, device=x.device)[:, None], torch.arange(width, device=x.device)
    return (row >= top) & (row < top + side) & (column >= left) & (column < left + side)


def stripes(x: Tensor, eps: float) -> Tensor:
    """Where Square starts under Linf: every column of every channel at +eps or -eps."""
    return (x + eps * random_sign((*x.shape[:2], 1, x.shape[3]), x)).clamp(0, 1)


def recolor_window(x: Tensor, x_best: Tensor, p: float, eps: float) -> Tensor:
    """Square's Linf proposal: one window at +eps or -eps, each channel by itself.

    x_best lies at such corners of the ball everywhere, so to add +-2 eps and to clip would do the same.
    """
    corner = (x + eps * random_sign((*x.shape[:2], 1, 1), x)).clamp(0, 1)
    return torch.where(random_window(x, square_side(x, p)), corner, x_best)


def bump(height: int, width: int, x: Tensor) -> Tensor:
    """(height, width), of norm 1: nested rectangles about the center, the k-th one adding 1 / k^2."""
    heap = 1 / torch.arange(1, max(height, width) // 2 + 2, device=x.device, dtype=x.dtype).square()
    heap = heap.flip(0).cumsum(0).flip(0)
    row = (torch.arange(height, device=x.device) - height // 2).abs()
    column = (torch.arange(width, device=x.device) - width // 2).abs()
    return F.normalize(heap[torch.maximum(row[:, None], column)], dim=(0, 1))


def bump_pair(side: int, x: Tensor) -> Tensor:
    """Square's eta, (side, side), of norm 1: a bump up beside a bump down."""
    pair = torch.cat([bump(side // 2, side, x), -bump(side - side // 2, side, x)])
    return F.normalize(pair, dim=(0, 1))


def random_bumps(grid: tuple[int, int], side: int, x: Tensor) -> Tensor:
    """Pairs of bumps of random sign, upright or on their side (alike in all channels): (B, C, *grid, side, side)."""
    pair, signs = bump_pair(side, x), random_sign((*x.shape[:2], *grid, 1, 1), x)
    return signs * torch.where(torch.rand(len(x), 1, *grid, 1, 1, device=x.device) < 0.5, pair, pair.T)


def onto_sphere(x: Tensor, delta: Tensor, eps: float) -> Tensor:
    return (x + eps * F.normalize(delta, dim=(1, 2, 3))).clamp(0, 1)


def bump_grid(x: Tensor, eps: float) -> Tensor:
    """Where Square starts under L2: 5 x 5 pairs of bumps, in the middle of the image."""
    height, width = x.shape[2:]
    side = max(min(height, width) // 5, 1)
    tall, wide = height - height % side, width - width % side
    tiles = random_bumps((tall // side, wide // side), side, x).transpose(3, 4).reshape(*x.shape[:2], tall, wide)
    top, left = (height - tall) // 2, (width - wide) // 2
    return onto_sphere(x, F.pad(tiles, (left, width - wide - left, top, height - tall - top)), eps)


def move_bumps(x: Tensor, x_best: Tensor, p: float, eps: float) -> Tensor:
    """Square's L2 proposal: a window is emptied, and its norm, with what eps leaves over, goes to bumps in another."""
    side = square_side(x, p, least=3)
    side = min(side + 1 - side % 2, *x.shape[2:])  # odd
    delta = x_best - x
    here, there = random_window(x, side), random_window(x, side)
    freed = (delta * (here | there)).square().sum((2, 3), keepdim=True)
    unused = (eps**2 - delta.square().sum((1, 2, 3), keepdim=True)).clamp(min=0)
    old = delta[here.expand_as(delta)].view(*x.shape[:2], side, side)
    new = F.normalize(old, dim=(2, 3)) + random_bumps((1, 1), side, x)[:, :, 0, 0]
    new = F.normalize(new, dim=(2, 3)) * (freed + unused / x.shape[1]).sqrt()
    return onto_sphere(x, delta.masked_fill(there, 0).masked_scatter(here, new), eps)


@torch.no_grad()
def square(model: nn.Module, x: Tensor, y: Tensor, *, eps: float, norm: str = "linf", queries: int = 5000) -> Tensor:
    """Square (Andriushchenko et al. 2020), Linf or L2, with AutoAttack's 5,000 queries and p (Croce & Hein 2020).

    Random search on the margin of the logits: a window is changed, and stays so where that raises the margin. It
    covers the share p of the image, halved as the search goes on, all halvings within the queries (AutoAttack's
    package keeps to the schedule of 10,000). Each image has its own windows. A proposal that changes nothing (a window
    that has that sign already) counts as an iteration, but its query is not made.
    """
    start, propose = {"linf": (stripes, recolor_window), "l2": (bump_grid, move_bumps)}[norm]
    x_adv, active = x.clone(), torch.arange(len(x), device=x.device)
    x_best, best = x, torch.full_like(x[:, 0, 0, 0], -math.inf)
    for i in range(queries):
        halvings = sum(10_000 * (i - 1) // queries > when for when in SQUARE_HALVINGS)
        x_new = propose(x, x_best, 0.8 / 2**halvings, eps) if i else start(x, eps)
        changed = (x_new != x_best).flatten(1).any(1).nonzero().flatten()
        if not len(changed):
            continue
        x_asked, y_asked = x_new[changed], y[changed]
        logits = model(x_asked)
        margin = cw_margin(logits, y_asked)
        better = margin > best[changed]
        best[changed] = torch.where(better, margin, best[changed])
        x_best = x_best.index_copy(0, changed[better], x_asked[better])
        wrong = common.fooled(model, x_asked, logits, y_asked)
        if wrong.any():
            done = changed[wrong]
            x_adv[active[done]] = x_asked[wrong]
            keep = torch.ones_like(active, dtype=torch.bool).index_fill(0, done, False)
            active, x, y, x_best, best = (state[keep] for state in (active, x, y, x_best, best))
            if not len(active):
                break
    x_adv[active] = x_best
    return x_adv


PROBES = 256  # images in a forward pass of the gradient estimates, or twice the batch where that is more


def directional_slopes(model: nn.Module, x: Tensor, y: Tensor, directions: Tensor, sigma: float) -> Tensor:
    """The margin's slope along each of n directions (n, B, C, H, W), (n, B), by central differences of step sigma.

    Two queries a direction. Float32 logits near 10 are rounded by about 1e-6, so a slope is off by about 1e-6 / sigma:
    0.001 at sigma 0.001, 0.01 at ZOO's 1e-4, where slopes of single pixels are no larger. bfloat16 would leave nothing.
    """
    step = sigma * directions
    probes = torch.stack([x + step, x - step]).flatten(0, 2)
    margin = cw_margin(model(probes), y.repeat(2 * len(directions))).view(2, *directions.shape[:2])
    slopes = (margin[0] - margin[1]) / (2 * sigma)
    if not slopes.isfinite().all():
        raise common.UserError("the logits near the images are not finite, so an estimated gradient proves nothing")
    return slopes


def estimate_gradient(
    model: nn.Module, x: Tensor, y: Tensor, draw: Callable[[Tensor], Tensor], q: int, sigma: float
) -> Tensor:
    """The gradient of the margin, (B, C, H, W), from q random directions and their opposites: 2 q queries (HE, Eq. 23).

    draw(u) fills a tensor with directions whose covariance is the identity, so the mean is right to O(sigma^2).
    """
    grad = torch.zeros_like(x)
    for part in torch.arange(q).split(max(PROBES // (2 * len(x)), 1)):
        directions = draw(x.new_empty(len(part), *x.shape))
        grad += torch.einsum("nb,nbchw->bchw", directional_slopes(model, x, y, directions, sigma), directions)
    return grad / q


@torch.no_grad()
def estimated_bim(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    draw: Callable[[Tensor], Tensor],
    eps: float,
    step_size: float,
    steps: int = 80,
    q: int = 128,
    sigma: float = 0.001,
) -> Tensor:
    """BIM on the margin of the logits by an estimated gradient (HE, Sec. B.2): steps * (2 q + 1) queries.

    The papers give two updates: Adam (Uesato et al. 2018) and the projected sign step of HE, Eq. 18, for both attacks.
    Ours is the second, which Table 8 of HE reports; the learning rate 0.01 and the 80 steps of Angular-AT are its step
    size, where that crosses the ball, and its steps. As in Eq. 23, q counts pairs: 128 of them are 256 queries, and
    one more sees if it is fooled.
    """
    x_adv, active = x.clone(), torch.arange(len(x), device=x.device)
    for _ in range(steps):
        logits = model(x_adv[active])
        active = active[~common.fooled(model, x_adv[active], logits, y[active])]
        if not len(active):
            break
        x_now = x_adv[active]
        grad = estimate_gradient(model, x_now, y[active], draw, q, sigma)
        x_adv[active] = common.project(x_now + step_size * grad.sign(), x[active], eps, "linf")
    return x_adv


def spsa(model: nn.Module, x: Tensor, y: Tensor, **options: float) -> Tensor:
    """Uesato et al. 2018, as in HE, Sec. B.2: `estimated_bim` along Rademacher directions, every pixel +1 or -1."""
    return estimated_bim(model, x, y, draw=lambda u: random_sign(u.shape, u), **options)


def nes(model: nn.Module, x: Tensor, y: Tensor, **options: float) -> Tensor:
    """Ilyas et al. 2018, as in HE, Sec. B.2: `estimated_bim` along Gaussian directions."""
    return estimated_bim(model, x, y, draw=Tensor.normal_, **options)


def coordinate_slopes(model: nn.Module, x: Tensor, y: Tensor, places: Tensor, sigma: float) -> Tensor:
    """The margin's slope at n pixels of each image, (B, n), for `places` (B, n) among its C * H * W: 2 n queries."""
    slopes = []
    for part in places.T.split(max(PROBES // (2 * len(x)), 1)):
        directions = x.new_zeros(*part.shape, x[0].numel()).scatter_(2, part[:, :, None], 1)
        slopes.append(directional_slopes(model, x, y, directions.view(*part.shape, *x.shape[1:]), sigma))
    return torch.cat(slopes).T


@torch.no_grad()
def zoo(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    queries: int = 20_000,
    coordinates: int = 128,
    sigma: float = 1e-4,
) -> Tensor:
    """ZOO (Chen et al. 2017; sigma and queries of HE, Sec. B.2): Adam on single pixels by central differences.

    HE's Eq. 21 also weighs the L2 distance; in a Linf ball its hinge alone is maximized, clipped to the ball, which HE
    gives as the Linf form of C&W. (The hinge is the margin: where it would be 0 the image is done.) As in the authors'
    code, `coordinates` random pixels are estimated at the same image and stepped together, HE's one at a time; each
    keeps its own moments and count. Adam's rate is eps / 3: their 0.01 at 8/255, where the three steps that 20,000
    queries pay for at each pixel of CIFAR-10 cross from the image to the edge of the ball.
    """
    size, rate, decay1, decay2 = x[0].numel(), eps / 3, 0.9, 0.999
    low, high = (x - eps).clamp(min=0).flatten(1), (x + eps).clamp(max=1).flatten(1)
    flat, active = x.flatten(1).clone(), torch.arange(len(x), device=x.device)
    moment1, moment2, count = torch.zeros_like(flat), torch.zeros_like(flat), torch.zeros_like(flat)
    while queries:
        x_now = flat[active].view(-1, *x.shape[1:])
        still = ~common.fooled(model, x_now, model(x_now), y[active])
        active, x_now = active[still], x_now[still]
        n = min(coordinates, size, (queries - 1) // 2)
        queries -= 1 + 2 * n
        if not n or not len(active):
            break
        places = torch.rand(len(active), size, device=x.device).topk(n).indices
        slope = coordinate_slopes(model, x_now, y[active], places, sigma)
        at = active[:, None], places
        count[at] += 1
        moment1[at] = decay1 * moment1[at] + (1 - decay1) * slope
        moment2[at] = decay2 * moment2[at] + (1 - decay2) * slope.square()
        mean, square_mean = moment1[at] / (1 - decay1 ** count[at]), moment2[at] / (1 - decay2 ** count[at])
        flat[at] = (flat[at] + rate * mean / (square_mean.sqrt() + 1e-8)).clamp(low[at], high[at])
    return flat.view_as(x)


@torch.no_grad()
def rays(model: nn.Module, x: Tensor, y: Tensor, *, eps: float, queries: int = 10_000) -> Tensor:
    """RayS (Chen & Gu 2020): the sign vector along which the boundary is nearest in Linf, from labels alone.

    The signs of one block of pixels after the other are flipped: the whole image, halves, quarters, down to pixels. A
    flip is asked at the best radius so far, and only if the image is fooled there its own radius is searched by
    bisection (to 1e-3 in L2). An image is done once fooled within eps. Each query moves every image on by one step of
    its own search, so that all of them share each forward pass.
    """
    size = x[0].numel()
    place, tolerance = torch.arange(size, device=x.device), 1e-3 / math.sqrt(size)
    x_adv, active = x.clone(), torch.arange(len(x), device=x.device)
    signs = ray = torch.ones_like(x).flatten(1)  # of the best direction, and of the one that is being searched
    best = high = torch.ones_like(ray[:, 0])  # radii: at 1 every image is in a corner of [0, 1]
    low, fresh = torch.zeros_like(best), torch.ones_like(active, dtype=torch.bool)
    start, length = torch.zeros_like(active), torch.full_like(active, size)  # of the next block to flip
    for _ in range(queries):
        radius = torch.where(fresh, best, (low + high) / 2)
        x_new = (x + (radius[:, None] * ray).view_as(x)).clamp(0, 1)
        wrong = common.fooled(model, x_new, model(x_new), y)
        low, high = torch.where(wrong, low, radius), torch.where(wrong, radius, high)
        fresh = high - low <= tolerance  # also where it was not fooled at the best radius: low = high = best
        nearer = fresh & (high < best)
        signs, best = torch.where(nearer[:, None], ray, signs), torch.where(nearer, high, best)
        block = (place >= start[:, None]) & (place < (start + length)[:, None])
        ray = torch.where(fresh[:, None], torch.where(block, -signs, signs), ray)
        low, high = torch.where(fresh, 0, low), torch.where(fresh, best, high)
        start = torch.where(fresh, start + length, start)
        length = torch.where(start < size, length, (length + 1) // 2)
        start = torch.where(start < size, start, 0)
        done = wrong & (radius <= eps)
        if done.any():
            x_adv[active[done]] = x_new[done]
            state = (active, x, y, signs, ray, best, low, high, fresh, start, length)
            active, x, y, signs, ray, best, low, high, fresh, start, length = (each[~done] for each in state)
            if not len(active):
                break
    x_adv[active] = (x + eps * signs.view_as(x)).clamp(0, 1)
    return x_adv


# --------------------------------------------------------------------------------------------------------- transfer

FROM = " from "  # a name such as "pgd-20 from SOURCE"


def transferred(
    model: nn.Module, x: Tensor, y: Tensor, *, source: nn.Module, attack: Attack, **budget: float
) -> Tensor:
    """`attack` on another model, `source`, on the cross-entropy that it was trained with (HE, App. C.4).

    `model` is not asked, and the attack goes on to its last step: what fools the source at once may not transfer yet.
    """
    return attack(source, x, y, loss=training_ce(source, 0.0), **budget)


def transfer_attacks(sources: list[tuple[str, nn.Module, dict]]) -> dict[str, Attack]:
    """FGSM, MIM-20 and PGD-20 from each source, given its name and its model."""
    attacks = {}
    for name, source, _ in sources:
        crafted = partial(transferred, source=source)
        attacks[f"fgsm{FROM}{name}"] = partial(crafted, attack=fgsm)
        attacks[f"mim-20{FROM}{name}"] = partial(crafted, attack=partial(mim, drop_fooled=False), steps=20)
        attacks[f"pgd-20{FROM}{name}"] = partial(crafted, attack=partial(pgd, drop_fooled=False), steps=20)
    return attacks


# ------------------------------------------------------------------------------------------------------- autoattack


def autoattack(model: nn.Module, x: Tensor, y: Tensor, *, eps: float, norm: str = "linf") -> Tensor:
    """The standard AutoAttack of Croce & Hein 2020: APGD-CE, APGD-T, FAB-T and Square, with its order and budgets, each
    on the images that still stand."""
    x_adv, standing = x.clone(), torch.arange(len(x), device=x.device)
    for attack in (apgd, apgd_targeted, fab_targeted, square):
        tried = attack(model, x[standing], y[standing], eps=eps, norm=norm)
        inside = common.lengths(tried - x[standing], norm).flatten() <= outermost(eps)
        beaten = inside & common.fooled(model, tried, predict_logits(model, tried), y[standing])
        x_adv[standing[beaten]], standing = tried[beaten], standing[~beaten]
        if not len(standing):
            break
    return x_adv


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
    "fgsm-l2": partial(fgsm, norm="l2"),
    "bim-20": partial(bim, steps=20),
    "mim-20": partial(mim, steps=20),
    "pgd-20": partial(pgd, steps=20),
    "pgd-100": partial(pgd, steps=100),
    "pgd-500": partial(pgd, steps=500),
    "pgd-20-scaled": partial(pgd_scaled, steps=20),
    "pgd-20-fn": partial(pgd_fn, steps=20),
    "adaptive-pgd-20": partial(adaptive_pgd, steps=20),
    "adaptive-pgd-500": partial(adaptive_pgd, steps=500),
    "cw-inf": partial(cw_inf, steps=20),
    "mta-100": partial(mta, steps=100),
    "feature": partial(feature, steps=50),
    "apgd-ce": partial(apgd, steps=100),
    "apgd-t": partial(apgd_targeted, steps=100),
    "fab-t": partial(fab_targeted, steps=100),
    "deepfool": partial(deepfool, steps=50),
    "cw-l2": partial(cw_l2, steps=1000),
    "square": square,
    "spsa-20": partial(spsa, steps=20),
    "spsa-80": partial(spsa, steps=80),
    "nes-20": partial(nes, steps=20),
    "nes-80": partial(nes, steps=80),
    "zoo": zoo,
    "rays": rays,
    "autoattack": autoattack,
    "autoattack-official": autoattack_official,
}
# What --restarts repeats.
START_AT_RANDOM = (noise, pgd, pgd_scaled, pgd_fn, adaptive_pgd, cw_inf, mta, feature, apgd, apgd_targeted)
BLACK_BOX = (square, spsa, nes, zoo, rays)
NEAREST = (fab_targeted, deepfool, cw_l2)  # their result may lie outside the ball, and then counts as no success
IN_BFLOAT16 = (
    fgsm,
    bim,
    mim,
    pgd,
    pgd_scaled,
    pgd_fn,
    adaptive_pgd,
    cw_inf,
    mta,
    feature,
    apgd,
    apgd_targeted,
    square,
    autoattack,
)
PRESETS = {
    "quick": ["clean", "noise", "fgsm", "pgd-20", "pgd-20-scaled", "cw-inf"],
    "all": list(ATTACKS),
}
HE = (  # Tables 2, 3, 6 and 8, and the adaptive attacks of Sec. 4.1
    "fgsm mim-20 pgd-20 pgd-50 pgd-500 deepfool-100 cw-inf feature fab-t adaptive-pgd-20 adaptive-pgd-500 autoattack "
    "rays zoo spsa-20 spsa-50 spsa-80 nes-20 nes-50 nes-80"
)
WEIGHTPEN_SMALL = "pgd-40@0.01 pgd-200@0.01 deepfool cw-l2 mta-200@0.01"  # Table 4, MNIST
WEIGHTPEN = "pgd-20@0.0031 pgd-100@0.0031 deepfool cw-l2 mta-100@0.0031"  # Table 5
PAPER = {  # what the paper of a method reports, by how the method's name begins; "" is any other model
    "angular_at": "pgd-20 pgd-500 cw-inf autoattack spsa-80",
    "dsphere": "fgsm pgd-100",
    "cnn": "fgsm pgd-100",
    "abcl": "bim-20 fgsm-l2",
    "weightpen": WEIGHTPEN,
    "mart": WEIGHTPEN,
    "mmc": WEIGHTPEN,
    "": HE,
}
THREAT = {  # Linf eps and step size, L2 eps, of the papers' evaluations; digits is ours
    "digits": (0.1, 0.01, 0.5),
    "mnist": (0.3, 0.01, 3.0),
    "cifar10": (0.031, 0.003, 1.0),
    "cifar100": (0.031, 0.003, 1.0),
    "tiny-imagenet": (0.031, 0.003, 1.0),
    "imagenet": (4 / 255, 1 / 255, 1.0),
    None: (8 / 255, 2 / 255, 1.0),
}
OWN_STEP = {feature: 1 / 255, spsa: 0.01, nes: 0.01}  # not the dataset's
GET_AUTOATTACK = "autoattack-official needs a package: pip install git+https://github.com/fra31/auto-attack"


def function_of(attack: Attack) -> Callable[..., Tensor]:
    return getattr(attack, "func", attack)


def steps_of(attack: Attack) -> int | None:
    return getattr(attack, "keywords", {}).get("steps")


def takes(attack: Attack, option: str) -> bool:
    """Whether the attack has this option without a value of its own for it; `**budget` takes all that PGD does,
    `**options` the step size."""
    parameters = inspect.signature(function_of(attack)).parameters
    if option in parameters:
        return option == "norm" or parameters[option].default is inspect.Parameter.empty
    return "budget" in parameters or (option == "step_size" and "options" in parameters)


def missing_of(attack: Attack) -> set[str]:
    """The parameters that the attack has no value for yet."""
    parameters = inspect.signature(attack).parameters.values()
    return {p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD}


def knows_l2(attack: Attack) -> bool:
    return takes(attack, "norm") or function_of(attack) in (clean, cw_l2)


def default_step_size(papers: float, eps: float, steps: int, norm: str) -> float:
    """The papers' step size where it can cross the ball in `steps` and is no more than half of eps, beyond which PGD
    goes from corner to corner; else 2.5 * eps / steps (Madry et al. 2018)."""
    fits = norm == "linf" and 1.9 * eps / steps < papers <= eps / 2
    return papers if fits else 2.5 * eps / steps


def find_attack(name: str) -> Attack:
    """The attack of that name: one of ATTACKS, perhaps with another number of steps, and with `@0.01` a step size."""
    plain, at, step_size = name.partition("@")
    if plain == "autoattack-official" and importlib.util.find_spec("autoattack") is None:
        raise common.UserError(GET_AUTOATTACK)
    attack = ATTACKS.get(plain)
    steps = re.search(r"-([1-9]\d{0,5})(?=-|$)", plain)
    for other, one in ATTACKS.items():
        if not attack and steps and steps_of(one) and re.sub(r"-\d+", "", other) == plain.replace(steps[0], "", 1):
            attack = partial(one.func, steps=int(steps[1]))
    if not attack:
        names = ", ".join([*PRESETS, "paper", *ATTACKS])
        raise common.UserError(f"unknown attack {name!r}: choose from {names}")
    if not at:
        return attack
    if not takes(attack, "step_size"):
        raise common.UserError(f"attack {name!r}: {plain} has no step size")
    try:
        return partial(attack, step_size=common.number(float, 0)(step_size))
    except argparse.ArgumentTypeError as error:
        raise common.UserError(f"attack {name!r}: {error}") from None


def paper_attacks(method: str, known: str | None) -> list[str]:
    """What the paper of `method` reports, with its step sizes; PAPER's first entry that the name begins with."""
    text = next(PAPER[prefix] for prefix in PAPER if method.startswith(prefix))
    return (WEIGHTPEN_SMALL if text is WEIGHTPEN and known in ("digits", "mnist") else text).split()


def why_left_out(name: str, unfit: dict[Callable, str], norm: str) -> str | None:
    """What keeps a preset from an attack: a package, a model that it does not fit, the norm."""
    if name == "autoattack-official" and importlib.util.find_spec("autoattack") is None:
        return GET_AUTOATTACK
    attack = find_attack(name)
    if function_of(attack) in unfit:
        return unfit[function_of(attack)]
    return None if norm == "linf" or knows_l2(attack) else f"attack {name} knows the Linf ball alone"


def named_attacks(
    text: str,
    methods: tuple[str, ...] = ("",),
    known: str | None = None,
    unfit: dict[Callable, str] | None = None,
    norm: str = "linf",
) -> dict[str, Attack]:
    """The attacks of --attacks: names and presets, separated by commas; clean comes first in any case.

    `paper` is what the papers of `methods` report on the dataset `known`, all of it for each of them. A preset does
    without attacks that do not know `norm`, and without those that are `unfit_attacks`.
    """
    names = ["clean"]
    presets = PRESETS | {"paper": [name for method in methods for name in paper_attacks(method, known)]}
    for part in map(str.strip, text.split(",")):
        for name in presets.get(part, [part]):
            why = part in presets and why_left_out(name, unfit or {}, norm)
            if why:
                print(f"left out: {why}")
            else:
                names.append(name)
    return {name: find_attack(name) for name in dict.fromkeys(names)}


# -------------------------------------------------------------------------------------------------------- evaluator


Z95 = 1.959964  # the normal distribution's 97.5 % point


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a proportion right / n, in % (Wilson 1927)."""
    z, p = Z95, right / n
    center, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (center - spread) / (1 + z * z / n), (center + spread) / (1 + z * z / n)
    return 100 * max(low, 0.0), 100 * min(high, 1.0)


def floats(images: Tensor | common.ImageFiles, rows: Tensor, device: torch.device | str) -> Tensor:
    """These rows (B,) of the images as a model takes them, (B, C, H, W) in [0, 1] on the device. A test set stays in
    uint8 on the CPU, where all of ImageNet's fits."""
    x = images[rows.cpu()].to(device)
    return common.to_float(x) if x.dtype == torch.uint8 else x


def in_batches(images: Tensor, size: int, device: torch.device | str) -> Iterator[Tensor]:
    for rows in torch.arange(len(images)).split(size):
        yield floats(images, rows, device)


@torch.no_grad()
def predict_logits(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def predict(model: nn.Module, x: Tensor) -> Tensor:
    """The predicted classes (B,), in float32; -1, which is never right, where a logit is not finite."""
    logits = predict_logits(model, x)
    return torch.where(logits.isfinite().all(1), logits.argmax(1), -1)


def predictions(model: nn.Module, images: Tensor | common.ImageFiles, size: int, device: torch.device | str) -> Tensor:
    return torch.cat([predict(model, part) for part in in_batches(images, size, device)])


def check_ball(name: str, x_adv: Tensor, x: Tensor, eps: float, norm: str) -> None:
    """An image outside the ball or the range would make a figure worthless: raises UserError."""
    distance = float(common.lengths(x_adv - x, norm).max())
    if not distance <= outermost(eps):
        raise common.UserError(f"attack {name} left the ball: distance {distance:.6g}, eps {eps:.6g}")
    check_range(name, x_adv)


def check_range(name: str, x_adv: Tensor) -> None:
    low, high = float(x_adv.min()), float(x_adv.max())
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):
        raise common.UserError(f"attack {name} left [0, 1]: {low:.6g} to {high:.6g}")


def digest(nets: list[nn.Module], *tensors: Tensor) -> "hashlib._Hash":
    """Of the weights of these networks, and of tensors, on any device and of any dtype."""
    found = hashlib.sha256()
    weights = [value for net in nets for value in net.state_dict().values() if isinstance(value, Tensor)]
    for tensor in (*weights, *tensors):
        found.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    return found


def is_own(module: ModuleType) -> bool:
    """Whether it is read from a file of no installed package: ours, or a user's."""
    file = str(getattr(module, "__file__", None))
    installed = (sysconfig.get_path("stdlib"), "site-packages", "dist-packages")
    return os.path.isfile(file) and not any(place in file for place in installed)


def code_in_use() -> dict[str, str]:
    """A digest of the file of each module that is imported and `is_own`."""
    files = {module.__file__ for module in list(sys.modules.values()) if is_own(module)}
    return {file: hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files}


OUR_CODE = code_in_use()  # as it runs: a file may be edited while the attacks are at work


def identity(found: "Found", x: Tensor, y: Tensor, settings: dict) -> str:
    """A digest of all that verdicts depend on, apart from the list of attacks: the models' weights, what they were
    built with, or the function that makes a user's own, images, settings, and the code of models and attacks."""
    one, code = digest([model for _, model, _ in found], x, y), {}
    for _, model, meta in found:
        code |= meta.get("code", {})
        made_by = meta["checkpoint"].rpartition(":")[2] if "code" in meta else json.dumps(model.options)
        one.update(made_by.encode())
    one.update(json.dumps(sorted((code | OUR_CODE).items())).encode())
    one.update(json.dumps({k: v for k, v in settings.items() if k != "command"}).encode())
    return one.hexdigest()


class Ranks:
    """The processes of torchrun, which share the batches of an attack: whoever is free takes the next one.

    Every rank asks for the same pieces of work in the same order, so a count tells them apart in torchrun's store.
    """

    def __init__(self, store: dist.Store | None = None, rank: int = 0):
        self.store, self.rank, self.asked = store, rank, 0

    def give(self, key: str, piece: object) -> None:
        buffer = io.BytesIO()
        torch.save(piece, buffer)
        self.store.set(key, buffer.getvalue())

    def take(self, key: str) -> object:
        return torch.load(io.BytesIO(self.store.get(key)), map_location="cpu", weights_only=True)

    def from_first(self, piece: object) -> object:
        """What the first rank calls this with."""
        self.asked += 1
        if self.store and not self.rank:
            self.give(f"{self.asked}", piece)
        return self.take(f"{self.asked}") if self.rank else piece

    def share(self, tasks: dict[str, Callable[[], dict]]) -> Iterator[tuple[str, dict]]:
        """(key, piece) of each task: those that this rank makes, as it makes them, then those of the others."""
        self.asked += 1
        others = []
        for key, make in tasks.items():
            place = f"{self.asked}/{key}"
            if self.store and self.store.add(f"{place}/takers", 1) > 1:
                others.append(key)
                continue
            piece = make()
            if self.store:
                self.give(place, piece)
            yield key, piece
        for key in others:
            yield key, self.take(f"{self.asked}/{key}")


def meet_ranks() -> Ranks:
    """Under torchrun all of its processes, else this one alone."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return Ranks()
    store, rank, _ = next(rendezvous("env://"))
    store.set_timeout(timedelta(days=30))  # for the longest attack
    return Ranks(store, rank)


class Journal:
    """The finished pieces of an evaluation, on disk, so that an interrupted one goes on where it stopped.

    `identity` stands for all that the pieces depend on: those of another evaluation are not taken up. The first of
    several ranks alone reads and writes.
    """

    def __init__(self, path: Path | None = None, identity: str = "", ranks: Ranks | None = None):
        self.ranks, self.pieces, self.written = ranks or Ranks(), {}, time.monotonic()
        self.path, self.identity = None if self.ranks.rank else path, identity
        if self.path and path.exists():
            content = common.read_file(path)
            if content.get("identity") == identity:
                self.pieces = content["pieces"]
                print(f"going on with {len(self.pieces)} finished batches of {path}", file=sys.stderr)
            else:
                print(f"{path} is of other models, settings or code: beginning anew", file=sys.stderr)
        self.pieces = self.ranks.from_first(self.pieces)

    def gather(self, tasks: dict[str, Callable[[], dict]]) -> list[dict]:
        """The pieces of these tasks, in their order: made now where they are not there yet."""
        missing = {key: make for key, make in tasks.items() if key not in self.pieces}
        for key, piece in self.ranks.share(missing):
            self.pieces[key] = piece
            if time.monotonic() - self.written > 2:
                self.write()
        return [self.pieces[key] for key in tasks]

    def write(self) -> None:
        if self.path:
            content = {"identity": self.identity, "pieces": self.pieces}
            common.save(content, self.path)
            self.written = time.monotonic()

    def close(self) -> None:
        if self.path:
            self.path.unlink(missing_ok=True)


@contextmanager
def crafting(model: nn.Module, attack: Attack, amp: bool) -> Iterator[list[int]]:
    """Frozen parameters, bfloat16 where it is wanted and the attack bears it; gives the passes counted meanwhile. What
    `common.fooled` confirms in float32 is not the attack's to pay for."""
    passes, ours = [0], isinstance(model, models.Classifier)
    in_bfloat16 = ours and amp and function_of(attack) in IN_BFLOAT16

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not in_bfloat16 or module.amp:
            passes[0] += len(inputs[0])

    hook = model.register_forward_hook(count)
    if ours:
        model.amp = in_bfloat16
    try:
        with common.attack_mode(model):
            yield passes
    finally:
        hook.remove()
        if ours:
            model.amp = False


@contextmanager
def blamed_on(what: str) -> Iterator[None]:
    """Whatever a user's model or attack may raise becomes one line that begins with `what`."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # cli knows the remedy
    except (common.UserError, RuntimeError) as error:
        raise common.UserError(f"{what}: {error}") from error
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}, line {place.lineno}"
        raise common.UserError(f"{what}: {type(error).__name__}: {error} ({where})") from error


def threat(attack: Attack, settings: dict) -> dict:
    """The norm and eps of the attack: those of the evaluation, except that C&W-L2 and fgsm-l2 have their own."""
    own = function_of(attack) is cw_l2 or "norm" in getattr(attack, "keywords", {})
    if own and settings["norm"] != "l2":
        return {"norm": "l2", "eps": THREAT[settings["known"]][2]}
    return {"norm": settings["norm"], "eps": settings["eps"]}


def budget(name: str, attack: Attack, settings: dict) -> dict:
    """What the attack is called with: eps and, where it takes them, norm and step_size."""
    within = threat(attack, settings)
    options, steps = {"eps": within["eps"]}, steps_of(attack)
    if takes(attack, "norm"):
        options["norm"] = within["norm"]
    elif within["norm"] != "linf" and not knows_l2(attack):
        raise common.UserError(f"attack {name} knows the Linf ball alone")
    if not steps and "step_size" in missing_of(attack):
        raise common.UserError(f"attack {name} has a step size, but no steps: partial(FUNCTION, steps=20) in ATTACKS")
    if steps and takes(attack, "step_size"):
        papers = OWN_STEP.get(function_of(attack), THREAT[settings["known"]][1])
        chosen = attack.keywords.get("step_size", settings["step_size"])  # the name's own, or the flag's
        if chosen is None:
            chosen = default_step_size(papers, within["eps"], steps, within["norm"])
        if within["norm"] == "linf" and chosen > 1:
            raise common.UserError(f"attack {name}: a step size of {chosen:g} on images in [0, 1]; 8/255 is one")
        options["step_size"] = chosen
    return options


def attack_batch(
    name: str, attack: Attack, model: nn.Module, x: Tensor, y: Tensor, rows: Tensor, settings: dict, seed: int
) -> dict:
    """One attack on a batch of `rows`, judged: `right` and `distance` (B,) to the misclassified image, `passes`,
    `faults`."""
    within, start, x, y = threat(attack, settings), time.perf_counter(), floats(x, rows, y.device), y[rows]
    options = budget(name, attack, settings)
    torch.manual_seed(seed)
    with blamed_on(f"attack {name} failed"), crafting(model, attack, settings["amp"]) as passes:
        x_adv = attack(model, x, y, **options).detach()
        if x_adv.shape != x.shape:
            raise common.UserError(f"it returned {tuple(x_adv.shape)} for images {tuple(x.shape)}")
    distance = common.lengths(x_adv - x, within["norm"]).flatten()
    if function_of(attack) in NEAREST:
        check_range(name, x_adv)
    else:
        check_ball(name, x_adv, x, **within)
    with blamed_on("the model failed"):
        prediction = predict(model, x_adv)
    return {
        "right": ((prediction == y) | (distance > outermost(within["eps"]))).cpu(),
        "distance": torch.where(prediction == y, math.inf, distance).cpu(),
        "passes": passes[0],
        "faults": int((prediction < 0).sum()),
        "seconds": time.perf_counter() - start,
    }


def run_attack(
    model: nn.Module, name: str, attack: Attack, x: Tensor, y: Tensor, right: Tensor, settings: dict, journal: Journal
) -> dict:
    """The attack on those images that are `right` (N,) clean, with its restarts, batch by batch."""
    outcome = {
        "right": right.clone(),
        "attacked": right,
        "distance": torch.full(right.shape, math.inf),
        **threat(attack, settings),
    }
    outcome |= {"passes": 0, "faults": 0, "seconds": 0.0}
    for restart in range(settings["restarts"] if function_of(attack) in START_AT_RANDOM else 1):
        standing = outcome["right"].nonzero().flatten()
        mixed = torch.randperm(len(standing), generator=torch.Generator().manual_seed(settings["seed"]))
        # A batch is of all classes, in whatever order they come.
        batches = standing[mixed.to(standing.device)].split(settings["batch_size"]) if len(standing) else ()
        tasks = {}
        for batch, rows in enumerate(batches):
            key = f"{name}/{restart}/mixed {batch}"
            seed = zlib.crc32(f"{settings['seed']}/{key}".encode())  # whatever ran before
            tasks[key] = partial(attack_batch, name, attack, model, x, y, rows, settings, seed)
        for rows, piece in zip(batches, journal.gather(tasks), strict=True):
            outcome["right"][rows] = piece["right"].to(right.device)
            outcome["distance"][rows.cpu()] = torch.minimum(outcome["distance"][rows.cpu()], piece["distance"])
            for total in ("passes", "faults", "seconds"):
                outcome[total] += piece[total]
    journal.write()
    return outcome


def settled_prediction(
    model: nn.Module, images: Tensor | common.ImageFiles, device: torch.device, settings: dict, journal: Journal
) -> Tensor:
    """`predictions`, seeded and made once: every rank, and whoever goes on later, must attack the same images."""

    def predict_all() -> dict:
        torch.manual_seed(settings["seed"])
        return {"prediction": predictions(model, images, settings["batch_size"], device).cpu()}

    with blamed_on("the model failed"):
        (piece,) = journal.gather({"prediction": predict_all})
    return piece["prediction"].to(device)


def evaluate(
    model: nn.Module, attacks: dict[str, Attack], x: Tensor, y: Tensor, settings: dict, journal: Journal | None = None
) -> dict:
    """Run the attacks on images x (N, C, H, W), uint8 or in [0, 1], with labels y (N,) on the model's device.

    settings: known (dataset), norm, eps, step_size (None: by attack), restarts, batch_size, seed, amp. Returns
    `prediction` (N,), in float32, and `attacks`, for each of them `attacked` (N,), right clean, `right` (N,) under it,
    `distance` (N,) to the misclassified image (inf: none), norm, eps, passes, faults (logits not finite) and seconds.
    """
    model.eval()
    journal = journal or Journal()
    prediction = settled_prediction(model, x, y.device, settings, journal)
    outcomes = {}
    for name, attack in attacks.items():
        outcomes[name] = run_attack(model, name, attack, x, y, prediction == y, settings, journal)
        if attack is clean:
            unsteady = int((outcomes[name]["right"] != (prediction == y)).sum())  # asked again, in other batches
            outcomes[name]["right"] = prediction == y
            if unsteady > max(1, 0.01 * len(y)) and not journal.ranks.rank:
                told = f"{unsteady} images that it classified right it gets wrong when asked again"
                print(f"warning: the model is random, or an image's batch matters to it: {told}", file=sys.stderr)
        accuracy, seconds = 100 * outcomes[name]["right"].float().mean(), outcomes[name]["seconds"]
        if not journal.ranks.rank:
            print(f"  {name:<20} {accuracy:6.2f} %  {seconds:8.1f} s", file=sys.stderr)
    outcomes["clean"]["faults"] += int((prediction < 0).sum())
    return {"prediction": prediction, "attacks": outcomes}


# ------------------------------------------------------------------------------------------------------------ audit
# When a robustness figure should not be believed (Athalye et al. 2018; Carlini et al. 2019). A difference between two
# attacks on the same images counts where McNemar's exact one-sided test gives p < 0.01, divided by the number of
# comparisons in the check.

AUDIT_IMAGES = 200


def spread(total: int, count: int) -> Tensor:
    """`count` of so many rows, or all, at even distances: a test set may be ordered class by class."""
    return torch.linspace(0, total - 1, min(count, total)).round().long()


def chance(more: Tensor, fewer: Tensor) -> float:
    """The probability, were two attacks equally strong, that so many more images stand (N,) under the first."""
    gained, lost = int((more & ~fewer).sum()), int((fewer & ~more).sum())
    return sum(math.comb(gained + lost, k) for k in range(gained, gained + lost + 1)) / 2 ** (gained + lost)


def stands_on_more(more: Tensor, fewer: Tensor, compared: int = 1) -> bool:
    return chance(more, fewer) < 0.01 / compared


def rescaled_pgd(model: nn.Module, x: Tensor, y: Tensor, *, factor: float, **budget: float) -> Tensor:
    """PGD on CE(factor * s * model(x), y)."""
    scale = factor * trained_with(model, "scale")
    return common.pgd(model, x, y, loss=lambda logits, y: ce(scale * logits, y), drop_fooled=True, **budget)


def input_gradients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The gradient of the training cross-entropy in each image, (B, C, H, W), in float32."""
    x = x.clone().requires_grad_()
    with common.attack_mode(model):
        (grad,) = torch.autograd.grad(training_ce(model, 0.0)(model(x), y).sum(), x)
    return grad


def audit(model: nn.Module, x: Tensor, y: Tensor, settings: dict, ranks: Ranks | None = None) -> list[dict]:
    """The checks, on some of the images (N, C, H, W): what each compares, its figures in words, and whether it passes.

    The attacks are on s * logits, the logits that the model was trained with, and in the norm of the evaluation.
    """
    rows = spread(len(y), AUDIT_IMAGES)
    x, y = floats(x, rows, y.device), y[rows]
    settings = settings | {"restarts": 1, "step_size": None}
    clean_right = settled_prediction(model, x, y.device, settings, Journal(ranks=ranks)) == y
    if not clean_right.any():
        return [{"check": "the model is right without an attack", "figures": "on no image", "passed": False}]
    eps, checks = settings["eps"], []

    def run(attack: Attack, eps: float = eps) -> Tensor:
        journal = Journal(ranks=ranks)
        return run_attack(model, "audit", attack, x, y, clean_right, settings | {"eps": eps}, journal)["right"]

    def percent(right: Tensor) -> str:
        return f"{100 * right.float().mean():.1f} %"

    def check(name: str, figures: str, passed: bool) -> None:
        checks.append({"check": name, "figures": figures, "passed": bool(passed)})

    def not_weaker(name: str, strong: tuple[str, Tensor], weak: tuple[str, Tensor], compared: int = 1) -> None:
        figures = f"{strong[0]} {percent(strong[1])}, {weak[0]} {percent(weak[1])}"
        check(name, figures, not stands_on_more(strong[1], weak[1], compared))

    logits = torch.cat([predict_logits(model, part) for part in x.split(settings["batch_size"])])
    again = torch.cat([predict_logits(model, part) for part in x.split(settings["batch_size"])])
    unlike = float((again - logits).abs().max() / logits.abs().max().clamp(min=1e-30))
    check("the same image gives the same logits", f"they differ by {unlike:.1e}, 1e-4 allowed", unlike < 1e-4)
    classes, sure = logits.shape[1], float((trained_with(model, "scale") * logits).softmax(1).amax(1).mean())
    figures = f"mean largest probability {sure:.3f}, chance {1 / classes:.3f}"
    check("cross-entropy tells the classes apart", figures, sure > 1.05 / classes)
    grads = torch.cat([input_gradients(model, a, b) for a, b in zip(x.split(50), y.split(50), strict=True)])
    lost = float((grads.flatten(1).abs().amax(1) == 0).float().mean())
    check("gradients reach the images", f"{100 * lost:.1f} % of the images have none, 1 % allowed", lost <= 0.01)

    pgd_20, pgd_100 = run(partial(pgd_scaled, steps=20)), run(partial(pgd_scaled, steps=100))
    targeted = run(apgd_targeted)
    white = pgd_100 & run(partial(cw_inf, steps=20)) & targeted
    not_weaker("more steps are not weaker", ("PGD-100", pgd_100), ("PGD-20", pgd_20))
    not_weaker(
        "FGSM is not weaker than noise",
        ("FGSM", run(partial(fgsm, loss=training_ce(model, 0.0)))),
        ("noise", run(noise)),
    )
    black = run(partial(square, queries=1000))
    not_weaker("gradients are not weaker than queries", ("PGD, CW, APGD-T", white), ("Square, 1,000 queries,", black))
    factors = {f"{factor:g}": run(partial(rescaled_pgd, factor=factor, steps=20)) for factor in (1e-4, 0.01, 100, 1e4)}
    best = min(factors, key=lambda factor: int(factors[factor].sum()))
    scaled = f"times {best}", factors[best]
    not_weaker("no scale of the logits is a better one", ("PGD-20", pgd_20), scaled, len(factors))
    radii = [0.5 * eps, eps, 1.5 * eps, 2 * eps]
    falls = [run(partial(pgd_scaled, steps=20), radius) for radius in radii]
    figures = ", ".join(f"{percent(right)} at {radius:.3g}" for radius, right in zip(radii, falls, strict=True))
    rises = any(stands_on_more(larger, smaller, 3) for smaller, larger in itertools.pairwise(falls))
    check("accuracy falls with eps", f"PGD-20 {figures}", not rises)
    wide = 0.5 if settings["norm"] == "linf" else 0.5 * math.sqrt(x[0].numel())
    unbounded = run(partial(pgd_scaled, steps=100), wide)
    check(
        "nothing stands without a bound", f"PGD-100 {percent(unbounded)}, 5 % allowed", unbounded.float().mean() <= 0.05
    )
    excess = 100 * float(pgd_100.float().mean() - targeted.float().mean())
    figures = f"PGD-100 {percent(pgd_100)}, APGD-T {percent(targeted)}, 6 points allowed"
    check("AutoAttack's APGD-T is near PGD", figures, abs(excess) <= 6)
    return checks


def print_audit(checks: list[dict]) -> None:
    if not checks:
        return
    failed = sum(not check["passed"] for check in checks)
    verdict = f"{failed} of {len(checks)} checks FAIL: do not believe these figures" if failed else "all checks pass"
    print(f"\naudit: {verdict}")
    for check in checks:
        print(f"{'pass' if check['passed'] else 'FAIL':<5} {check['check']:<40} {check['figures']}")


# ------------------------------------------------------------------------------------------------------ corruptions
# Our approximation, not the published -C sets: nine families of Hendrycks & Dietterich 2019 (HE, Sec. 4.3) on any
# images. (x, strength) -> x; x is (B, C, H, W) in [0, 1], C is 1 or 3; lengths are shares of the image's height, so
# that a severity looks alike at 8 and at 224 pixels. Random draws are torch's; `corrupt` clamps what leaves [0, 1].


def gaussian_noise(x: Tensor, sigma: float) -> Tensor:
    return x + sigma * torch.randn_like(x)


def shot_noise(x: Tensor, photons: float) -> Tensor:
    """Counts of light: a value of 1 stands for so many photons on average."""
    return torch.poisson(x * photons) / photons


def impulse_noise(x: Tensor, share: float) -> Tensor:
    """Salt and pepper on that share of all values."""
    draw = torch.rand_like(x)
    return torch.where(draw < share, (draw < share / 2).to(x.dtype), x)


def kernel_grid(x: Tensor, reach: float) -> tuple[Tensor, Tensor]:
    """Offsets across and down, (k, k) each, in pixels, of a kernel that reaches so far from its center."""
    line = torch.arange(-math.ceil(reach), math.ceil(reach) + 1, device=x.device, dtype=x.dtype)
    return torch.meshgrid(line, line, indexing="xy")


def blur(x: Tensor, distance: Tensor) -> Tensor:
    """Averages over a shape whose edge fades out within a pixel, given each offset's `distance` to it, (B, k, k)."""
    kernel = (1 - distance).clamp(min=0)
    kernel = (kernel / kernel.sum((1, 2), keepdim=True)).repeat_interleave(x.shape[1], 0)
    padded = F.pad(x, [distance.shape[2] // 2] * 4, mode="replicate").flatten(0, 1)[None]
    return F.conv2d(padded, kernel[:, None], groups=len(kernel)).view(x.shape)


def defocus_blur(x: Tensor, radius: float) -> Tensor:
    """The average over a disk."""
    pixels = radius * x.shape[2]
    distance = (torch.hypot(*kernel_grid(x, pixels)) - pixels).clamp(min=0)
    return blur(x, distance.expand(len(x), -1, -1))


def motion_blur(x: Tensor, length: float) -> Tensor:
    """The average along a line, in a direction of each image's own."""
    half = length * x.shape[2] / 2
    across, down = kernel_grid(x, half)
    angle = math.pi * torch.rand(len(x), 1, 1, device=x.device, dtype=x.dtype)
    along, aside = across * angle.cos() + down * angle.sin(), down * angle.cos() - across * angle.sin()
    return blur(x, torch.hypot((along.abs() - half).clamp(min=0), aside))


def brightness(x: Tensor, rise: float) -> Tensor:
    return x + rise


def contrast(x: Tensor, share: float) -> Tensor:
    """What is left of each channel's distance to its mean."""
    return torch.lerp(x.mean((2, 3), keepdim=True), x, share)


def cell_means(side: int, share: float, like: Tensor) -> Tensor:
    """The matrix (side, side) that puts the mean of its cell in place of each pixel."""
    cell = torch.arange(side, device=like.device) * max(1, round(share * side)) // side
    same = (cell[:, None] == cell).to(like.dtype)
    return same / same.sum(1)


def pixelate(x: Tensor, share: float) -> Tensor:
    """Cells of one color, that share of the pixels of a side in number; no pixel is in two, which would blur."""
    return cell_means(x.shape[2], share, x) @ x @ cell_means(x.shape[3], share, x)


def jpeg(x: Tensor, quality: float) -> Tensor:
    """Written and read by Pillow, in memory, one by one: it knows no batches."""
    from PIL import Image

    read = []
    for image in (255 * x).round().byte().permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(image.squeeze()).save(file, "JPEG", quality=quality)
        read.append(np.asarray(Image.open(file)).reshape(image.shape))
    return common.to_float(torch.from_numpy(np.stack(read)).permute(0, 3, 1, 2).to(x.device))


CORRUPTIONS: dict[str, tuple[Callable[[Tensor, float], Tensor], tuple[float, ...]]] = {  # severities 1 to 5
    "gaussian noise": (gaussian_noise, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "shot noise": (shot_noise, (80, 40, 20, 10, 5)),
    "impulse noise": (impulse_noise, (0.02, 0.04, 0.08, 0.14, 0.2)),
    "defocus blur": (defocus_blur, (0.015, 0.025, 0.04, 0.055, 0.075)),
    "motion blur": (motion_blur, (0.08, 0.13, 0.19, 0.26, 0.35)),
    "brightness": (brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (contrast, (0.7, 0.5, 0.35, 0.2, 0.1)),
    "pixelate": (pixelate, (0.75, 0.6, 0.5, 0.4, 0.3)),
    "jpeg": (jpeg, (60, 30, 18, 10, 6)),
}
NOT_IN_MCA = {"gaussian blur", "saturate", "spatter", "speckle noise"}  # the published sets' extra corruptions

Source = Callable[[int], tuple[Tensor | common.ImageFiles, Tensor]]  # severity -> images, uint8 or [0, 1], and labels


def corrupt(x: Tensor, name: str, severity: int) -> Tensor:
    """Images (B, C, H, W) in [0, 1] under one of CORRUPTIONS at severity 1 to 5."""
    function, strengths = CORRUPTIONS[name]
    return function(x, strengths[severity - 1]).clamp(0, 1)


def approximate_corruption(x: Tensor, y: Tensor, name: str, severity: int) -> tuple[Tensor, Tensor]:
    return torch.cat([corrupt(part, name, severity) for part in x.split(250)]), y


def read_npy(path: Path) -> np.ndarray:
    """The array of an .npy file, left on the disk until it is sliced. Raises UserError."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise common.UserError(f"{path}: no such file") from None
    except Exception as error:  # numpy raises nearly anything on a damaged file
        raise common.UserError(f"{path}: not a readable .npy of a plain array ({error})") from None


def cifar_c(path: Path, shape: tuple[int, int, int], num_classes: int, severity: int) -> tuple[Tensor, Tensor]:
    """CIFAR-10-C or -100-C as published (Hendrycks & Dietterich 2019): uint8 images (N, C, H, W), labels (N,).

    NAME.npy holds the same N images at severity 1, then at 2, to 5, and labels.npy beside it their labels. `shape` is
    the model's (C, H, W). Raises UserError naming the file and its fault.
    """
    beside = path.with_name("labels.npy")
    x, y = read_npy(path), read_npy(beside)
    channels, height, width = shape
    if x.dtype != np.uint8 or x.shape[1:] != (height, width, channels) or not len(x) or len(x) % 5:
        raise common.UserError(f"{path}: {x.dtype} {x.shape}; it must be uint8 (5 N, {height}, {width}, {channels})")
    if y.shape != x.shape[:1] or not np.issubdtype(y.dtype, np.integer):
        raise common.UserError(f"{beside}: {y.dtype} {y.shape}; it must be integers, one for each of {len(x)} images")
    if not 0 <= y.min() <= y.max() < num_classes:
        raise common.UserError(f"{beside}: labels {y.min()} to {y.max()}, but there are {num_classes} classes")
    rows = slice((severity - 1) * len(x) // 5, severity * len(x) // 5)
    return torch.from_numpy(np.array(x[rows])).permute(0, 3, 1, 2), torch.from_numpy(y[rows].astype(np.int64))


def pixels(image: object) -> Tensor:
    """A PIL image as it is, uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def imagenet_c(
    folder: Path, shape: tuple[int, int, int], num_classes: int, severity: int
) -> tuple[common.ImageFiles, Tensor]:
    """ImageNet-C or Tiny-ImageNet-C as published: FOLDER/SEVERITY/WNID/*.JPEG; the classes are the sorted WNIDs.

    `shape` is the model's (C, H, W), which the files have already. Raises UserError naming the file and its fault.
    """
    samples, wnids = common.image_folder(folder / str(severity))
    if len(wnids) != num_classes:
        raise common.UserError(f"{folder / str(severity)}: {len(wnids)} classes, but the model has {num_classes}")
    files, labels = zip(*samples, strict=True)
    images = common.ImageFiles(files, shape[1], pixels, pixels)
    found = tuple(images[:1].shape[1:])
    if found != shape:
        raise common.UserError(f"{files[0]}: an image {found}; the model takes {shape}")
    return images, torch.tensor(labels)


def corruption_files(folder: Path) -> tuple[Callable[..., tuple[Tensor, Tensor]], list[Path]]:
    """The corruptions in FOLDER and what reads them: CIFAR-10-C's NAME.npy or ImageNet-C's NAME/SEVERITY/WNID/... ."""
    arrays = [path for path in folder.glob("*.npy") if path.stem != "labels"]
    found = arrays or [path.parent for path in folder.glob("*/1")]
    if not found:
        raise common.UserError(f"{folder}: neither NAME.npy (CIFAR-10-C) nor NAME/1 to 5 (ImageNet-C) is in it")
    return cifar_c if arrays else imagenet_c, sorted(found)


def published_corruptions(folder: Path, shape: tuple[int, int, int], num_classes: int) -> dict[str, Source]:
    """Each corruption in FOLDER, for images of this shape and so many classes."""
    read, paths = corruption_files(folder)
    return {path.stem.replace("_", " "): partial(read, path, shape, num_classes) for path in paths}


def subset(total: int, n: int | None) -> Tensor:
    """n of so many rows, in order: files may be sorted by class, so they are drawn, the same for every seed."""
    return torch.from_numpy(np.sort(np.random.default_rng(common.SPLIT_SEED).permutation(total)[:n]))


def right_on(model: nn.Module, images: Tensor | common.ImageFiles, y: Tensor, settings: dict) -> Tensor:
    """Whether the prediction is right on each of settings["n"] images, bool (N,) on the CPU."""
    right = []
    for rows in subset(len(y), settings["n"]).split(settings["batch_size"]):
        prediction = predict(model, floats(images, rows, settings["device"])).cpu()
        right.append(prediction == y[rows].cpu())
    return torch.cat(right)


def corruption_accuracy(model: nn.Module, sources: dict[str, Source], settings: dict) -> dict:
    """`accuracy` {corruption: [% at severity 1 to 5]} and mCA, their mean (HE, Table 5), with its interval.

    settings: n (images of each, None: all), batch_size, seed, device. The interval comes from the spread, over the
    images, of the share of corruptions that each stands: the cells are no independent samples. Raises UserError where
    no corruption counts, or where they are not all of as many images.
    """
    model.eval()
    right, total = {}, None
    if not sources.keys() - NOT_IN_MCA:
        raise common.UserError(f"mCA leaves out {', '.join(sources)}, and there is no other corruption")
    for name, source in sources.items():
        right[name] = []
        for severity in range(1, 6):
            torch.manual_seed(settings["seed"])  # the same draws at every severity
            images, y = source(severity)
            total = total or len(y)
            if len(y) != total:
                raise common.UserError(f"{name}, severity {severity}: {len(y)} images, where the first has {total}")
            right[name].append(right_on(model, images, y, settings))
    counted = [cell for name, cells in right.items() if name not in NOT_IN_MCA for cell in cells]
    share = 100 * torch.stack(counted).double().mean(0)
    mca, error = float(share.mean()), 1.96 * float(share.std(correction=0)) / math.sqrt(len(share))
    accuracy = {name: [100 * float(cell.double().mean()) for cell in cells] for name, cells in right.items()}
    return {"n": len(share), "accuracy": accuracy, "mCA": mca, "low": mca - error, "high": mca + error}


def print_corruptions(result: dict, title: str) -> None:
    print(f"\n{title}: accuracy (%) at severity 1 to 5, n = {result['n']} images")
    for name, row in result["accuracy"].items():
        mean = f"{np.mean(row):7.2f}" + (" *" if name in NOT_IN_MCA else "")
        print(f"{name:<18}" + "".join(f"{value:7.2f}" for value in row) + f"   mean {mean}")
    if NOT_IN_MCA & set(result["accuracy"]):
        print("* not in mCA")
    print(f"mCA {result['mCA']:.2f} ({result['low']:.2f} - {result['high']:.2f})")


def plot_corruptions(result: dict, path: Path) -> None:
    """Accuracy by corruption and severity, and its mean, as a heatmap."""
    plt = pyplot()
    names, rows = list(result["accuracy"]), np.array(list(result["accuracy"].values()))
    cells = np.concatenate([rows, rows.mean(1, keepdims=True)], 1)
    figure, axis = plt.subplots(figsize=(4.6, 0.9 + 0.27 * len(names)), layout="constrained")
    image = axis.imshow(cells, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    for (i, j), value in np.ndenumerate(cells):
        color = "black" if value > 60 else "white"
        axis.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=8, color=color)
    axis.axvline(4.5, color="white", linewidth=3)
    axis.set(xticks=range(6), xticklabels=[*range(1, 6), "mean"], yticks=range(len(names)), yticklabels=names)
    axis.set_xlabel(f"severity; mCA {result['mCA']:.1f} %, n = {result['n']}")
    axis.tick_params(length=0)
    figure.colorbar(image, label="accuracy (%)")
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ----------------------------------------------------------------------------------------------- geodesic inference


def geodesic_thresholds(statistics: dict[str, list[float]], device: str, p: float = 1.0) -> Tensor:
    """p * (mu_k + sd_k) in radians, (K,), from the checkpoint's statistics of class k (D-SphereNet, Sec. 4.3)."""
    return p * (torch.tensor(statistics["mean"]) + torch.tensor(statistics["std"])).to(device)


@torch.no_grad()
def predicted_angle(model: models.Classifier, x: Tensor) -> tuple[Tensor, Tensor]:
    """The predicted class, -1 where a logit is not finite, and the angle of z to its weight in radians, (B,) each."""
    logits, z = model(x, with_features=True)
    prediction = logits.argmax(1)
    cos = models.cosine(z, model.fc.weight).gather(1, prediction[:, None]).squeeze(1)
    return torch.where(logits.isfinite().all(1), prediction, -1), models.arccos(cos)


def geodesic_pgd(
    model: models.Classifier, x: Tensor, y: Tensor, *, thresholds: Tensor, eps: float, step_size: float, steps: int
) -> Tensor:
    """An adaptive attack on geodesic inference, ours after Carlini & Wagner 2017b: PGD that also evades the rejection.

    Ascends the margin while an image is classified right, and the cosine to the wrong class predicted while that angle
    is above its threshold; there is no weight between the two to tune. An image that has both stays as it is.
    """
    x_adv, active = common.random_start(x, eps, "linf"), torch.arange(len(x), device=x.device)
    with common.attack_mode(model):
        for _ in range(steps):
            x_now = x_adv[active].requires_grad_()
            logits, z = model(x_now, with_features=True)
            margin = cw_margin(logits, y[active])
            wrong = logits.scatter(1, y[active, None], -math.inf).argmax(1)
            cos = models.cosine(z, model.fc.weight).gather(1, wrong[:, None]).squeeze(1)
            fooled = margin > common.rounding(logits)  # a thinner one: push on
            (grad,) = torch.autograd.grad(torch.where(fooled, cos, margin).sum(), x_now)
            still = ~(fooled & (models.arccos(cos) < thresholds[wrong] - 1e-4))
            active, x_now, grad = active[still], x_now[still], grad[still]
            if not len(active):
                break
            x_adv[active] = common.project(x_now.detach() + step_size * grad.sign(), x[active], eps, "linf")
    return x_adv


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """The chance that a positive's score is above a negative's, ties counted half (Mann & Whitney 1947)."""
    _, place, counts = np.unique(np.concatenate([positive, negative]), return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2)[place[: len(positive)]]
    return float((ranks.mean() - (len(positive) + 1) / 2) / len(negative))


def proportion(flags: Tensor) -> dict | None:
    """Count, n, % and its 95 % interval of bool (N,); None where N is 0."""
    count, n = int(flags.sum()), len(flags)
    if not n:
        return None
    low, high = wilson(count, n)
    return {"count": count, "n": n, "percent": 100 * count / n, "low": low, "high": high}


def geodesic_inference(
    model: models.Classifier, x: Tensor, x_adv: Tensor, y: Tensor, thresholds: Tensor, batch_size: int
) -> dict:
    """D-SphereNet, Sec. 4.3: an input predicted k is rejected where its angle to W_k is above the threshold of k.

    Adversarial are the images of x_adv that are misclassified and were right clean: on them the rejection rate is
    taken and, against all clean ones, the AUROC of the angle. `broken`: misclassified and accepted, of all of x_adv.
    """

    def infer(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = [predicted_angle(model, part) for part in images.split(batch_size)]
        prediction, angle = (torch.cat(part) for part in zip(*parts, strict=True))
        return prediction == y, angle, angle > thresholds[prediction]

    (right, angle, rejected), (right_adv, angle_adv, rejected_adv) = infer(x), infer(x_adv)
    fooled = right & ~right_adv
    scores = [angle_adv[fooled].cpu().numpy(), angle.cpu().numpy()]
    return {
        "accuracy": proportion(right),
        "accepted_accuracy": proportion(right[~rejected]),
        "accepted_accuracy_attacked": proportion(right_adv[~rejected_adv]),
        "rejected_clean": proportion(rejected),
        "rejected_adversarial": proportion(rejected_adv[fooled]),
        "broken": proportion(~right_adv & ~rejected_adv),
        "auroc": auroc(*scores) if fooled.any() else None,
    }


# --------------------------------------------------------------------------------------------------------- analyses


def pyplot() -> ModuleType:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot_band(axis: object, at: list[float], rows: list[dict], style: str, label: str) -> None:
    """Accuracies (of each row `accuracy`, `low` and `high`, in %) against what is varied, the interval shaded."""
    accuracy, low, high = ([row[key] for row in rows] for key in ("accuracy", "low", "high"))
    (line,) = axis.plot(at, accuracy, style, markersize=4, label=label)
    axis.fill_between(at, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


CURVES: dict[str, Attack] = {"PGD on CE": pgd_scaled, "PGD on the margin": cw_inf}
CURVE_EPS = (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2)  # times eps
CURVE_STEPS = (1, 2, 5, 10, 20, 50, 100)
CURVE_RESTARTS = (1, 2, 3, 4, 5)
CURVE_ATTACK = 20  # steps, where they do not vary


def robustness_curves(model: nn.Module, x: Tensor, y: Tensor, settings: dict) -> dict:
    """Accuracy against eps and restarts under PGD-20, and against the number of steps (Carlini et al. 2019).

    settings are evaluate's. Returns n, norm, eps, `attack_steps`, and `axes`: for each its values `at` and the counts
    `right` {attack: [...]}. Restarts add up: each one attacks what the ones before it left standing.
    """
    model.eval()
    clean = predictions(model, x, settings["batch_size"], y.device) == y
    base = settings | {"restarts": 1, "step_size": None}

    def right(name: str, alive: Tensor = clean, steps: int = CURVE_ATTACK, **changed: float) -> Tensor:
        attack = partial(CURVES[name], steps=steps)
        return run_attack(model, name, attack, x, y, alive, base | changed, Journal())["right"]

    widest = 1 if settings["norm"] == "linf" else math.inf
    eps = [factor * settings["eps"] for factor in CURVE_EPS if factor * settings["eps"] <= widest]
    curves = {axis: {} for axis in ("eps", "steps", "restarts")}
    for name in CURVES:
        curves["eps"][name] = [int((right(name, eps=e) if e else clean).sum()) for e in eps]
        curves["steps"][name] = [int(right(name, steps=n).sum()) for n in CURVE_STEPS]
        alive, curves["restarts"][name] = clean, []
        for restart in CURVE_RESTARTS:
            alive = right(name, alive, seed=settings["seed"] + restart - 1)
            curves["restarts"][name].append(int(alive.sum()))
    values = {"eps": eps, "steps": list(CURVE_STEPS), "restarts": list(CURVE_RESTARTS)}
    axes = {axis: {"at": values[axis], "right": curves[axis]} for axis in curves}
    return {"n": len(y), "norm": settings["norm"], "eps": settings["eps"], "attack_steps": CURVE_ATTACK, "axes": axes}


def plot_robustness_curves(result: dict, path: Path) -> None:
    """The three curves of robustness_curves side by side, with their 95 % bands."""
    plt = pyplot()
    n, eps, steps = result["n"], result["eps"], result["attack_steps"]
    labels = {
        "eps": f"{NORMS[result['norm']]} eps, {steps} steps",
        "steps": f"steps, eps {eps:.3g}",
        "restarts": f"restarts of {steps} steps",
    }
    figure, panels = plt.subplots(1, 3, figsize=(9, 2.9), sharey=True, layout="constrained")
    for panel, (axis, curve) in zip(panels, result["axes"].items(), strict=True):
        for (name, right), style in zip(curve["right"].items(), ("o-", "s--"), strict=True):
            plot_band(panel, curve["at"], [accuracy_from(count, n) for count in right], style, name)
        panel.set(xlabel=labels[axis], ylim=(0, 101))
        panel.grid(alpha=0.3)
    panels[0].axvline(eps, color="black", linewidth=0.8, linestyle=":")
    panels[0].set_ylabel(f"accuracy (%), n = {n}")
    panels[0].legend(fontsize=8)
    panels[1].set_xscale("log")
    panels[1].set_xticks(result["axes"]["steps"]["at"], result["axes"]["steps"]["at"])
    panels[1].minorticks_off()
    panels[2].set_xticks(result["axes"]["restarts"]["at"])
    figure.savefig(path, dpi=150)
    plt.close(figure)


def gradient_norms(model: nn.Module, x: Tensor, y: Tensor) -> tuple[list[str], Tensor]:
    """||grad of the training loss||, for each image alone, by each weight of two or more axes: names, (B, layers)."""
    loss = training_ce(model, trained_with(model, "margin"))
    weights = {name: p for name, p in model.named_parameters() if p.ndim > 1 and p.requires_grad}
    norms = []
    for image, label in zip(x.split(1), y.split(1), strict=True):  # a batch would hold a copy of all weights an image
        grads = torch.autograd.grad(loss(model(image), label).sum(), list(weights.values()), allow_unused=True)
        used = {name: grad.norm() for name, grad in zip(weights, grads, strict=True) if grad is not None}
        norms.append(torch.stack(list(used.values())))
    return [name.removesuffix(".weight") for name in used], torch.stack(norms)


def gradient_norm_ratio(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> dict:
    """E(||grad_w L(x*)|| / ||grad_w L(x)||) over the images, by layer w, L the training loss (HE, Fig. 3).

    Returns `layers`, and for each `mean`, the paper's figure, and `median`, which no single image can move, with `low`
    and `high`, the ends of its 95 % interval: two of the ordered ratios; n, and `left_out`: images that have no ratio,
    as their clean gradient is 0 in float32, or one of the two is not finite.
    """
    model.eval()
    layers, clean = gradient_norms(model, x, y)
    _, adversarial = gradient_norms(model, x_adv, y)
    ratio = adversarial / clean
    defined = (clean.isfinite() & ratio.isfinite()).all(1)
    ratio = ratio[defined]
    if not len(ratio):
        raise common.UserError("on no clean image has the loss a finite gradient other than 0, so no ratio to it")
    first, last = median_interval(len(ratio))
    ordered = ratio.sort(0).values
    figures = {"mean": ratio.mean(0), "median": ratio.median(0).values, "low": ordered[first], "high": ordered[last]}
    figures = {name: by_layer.tolist() for name, by_layer in figures.items()}
    return {"layers": layers, **figures, "n": len(ratio), "left_out": int((~defined).sum())}


def median_interval(n: int) -> tuple[int, int]:
    """Which two of n ordered values, counted from 0, enclose the median of their distribution with a probability of at
    least 95 %; of fewer than 6 the outer ones, which do so less often."""
    # 2^n times the probability that at most k of the values are below the median
    tails = itertools.accumulate(math.comb(n, k) for k in range(n // 2))
    first = max(0, sum(40 * tail <= 2**n for tail in tails) - 1)
    return first, n - 1 - first


def plot_medians(axis: object, result: dict, style: str, label: str, offset: float = 0.0) -> None:
    """The median ratio by layer and its interval, a line a layer."""
    median, low, high = (np.array(result[key]) for key in ("median", "low", "high"))
    reach = {"xerr": [median - low, high - median], "capsize": 2, "linewidth": 1, "markersize": 4}
    axis.errorbar(median, np.arange(len(median)) + offset, fmt=style, label=label, **reach)


def ratio_axis(axis: object, ratios: list[dict], about: str = "") -> None:
    """The layers from the first, on top, to the last, and what is drawn of them."""
    layers = ratios[0]["layers"]
    wide = max(max(own["mean"]) for own in ratios) > 20 * min(min(own["median"]) for own in ratios)
    axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set(yticks=range(len(layers)), yticklabels=layers, ylim=(len(layers) - 0.5, -0.5))
    axis.set(xscale="log" if wide else "linear", xlabel=f"gradient norm, adversarial / clean{about}")
    axis.grid(axis="x", alpha=0.3)


def plot_gradient_norm_ratio(result: dict, path: Path) -> None:
    """Mean and median ratio by layer, from the first to the last."""
    plt = pyplot()
    places = range(len(result["layers"]))
    figure, axis = plt.subplots(figsize=(5, 0.9 + 0.24 * len(places)), layout="constrained")
    axis.plot(result["mean"], places, "o", label="mean")
    plot_medians(axis, result, "D", "median, 95 % interval")
    ratio_axis(axis, [result])
    figure.legend(title=f"n = {result['n']}", title_fontsize=8, fontsize=8, loc="outside upper center", ncols=2)
    figure.savefig(path, dpi=150)
    plt.close(figure)


@torch.no_grad()
def has_features(model: nn.Module, image: Tensor) -> bool:
    """Whether model.features(x) gives a vector for an image (1, C, H, W); torchvision's VGG calls feature maps so."""
    try:
        return model.features(image).ndim == 2
    except Exception:  # there is none, or it is something else
        return False


def class_weights(model: nn.Module) -> Tensor | None:
    """The weights (K, d) of the last layer, MMC's centers, or None."""
    fc = getattr(model, "fc", None)
    return getattr(fc, "centers", getattr(fc, "weight", None))


@torch.no_grad()
def feature_map(model: models.Classifier, x: Tensor, x_adv: Tensor, y: Tensor, seed: int) -> dict:
    """Features z of clean and attacked images in the plane: by one t-SNE of both (ABCL, App. D), or z itself if d = 2.

    Returns `label`, whether it is `right_attacked`, the positions `clean` and `attacked`, (N, 2), and the `method`.
    """
    from sklearn.manifold import TSNE

    model.eval()
    z = torch.cat([model.features(part) for part in torch.cat([x, x_adv]).split(250)]).cpu().numpy()
    method = "z" if z.shape[1] == 2 else "t-SNE"
    if method == "t-SNE":
        z = TSNE(perplexity=min(30, len(z) / 4), init="pca", random_state=seed % 2**32).fit_transform(z)
    clean, attacked = (part.tolist() for part in np.split(z.astype(float).round(3), 2))
    right = predictions(model, x_adv, 250, y.device) == y
    places = {"clean": clean, "attacked": attacked, "method": method}
    return {"label": y.tolist(), "right_attacked": right.tolist(), **places}


def plot_feature_map(result: dict, path: Path) -> None:
    """Clean and attacked features in two panels of one map, colored by true class; of ten classes at most."""
    plt = pyplot()
    label, right = np.array(result["label"]), np.array(result["right_attacked"])
    clean, attacked = np.array(result["clean"]), np.array(result["attacked"])
    figure, (left, other) = plt.subplots(1, 2, figsize=(8, 4), sharex=True, sharey=True, layout="constrained")
    other.scatter(*clean.T, s=6, color="0.85", linewidths=0)
    for k, name in enumerate(np.unique(label)[:10]):
        color, own = f"C{k}", label == name
        left.scatter(*clean[own].T, s=10, color=color, linewidths=0, label=str(name))
        other.scatter(*attacked[own & right].T, s=10, color=color, linewidths=0)
        other.scatter(*attacked[own & ~right].T, s=14, color=color, marker="x", linewidths=0.8)
    first, second = ("$z_1$", "$z_2$") if result["method"] == "z" else ("t-SNE 1", "t-SNE 2")
    left.set_ylabel(second)
    left.set_xlabel(f"{first}; clean images", fontsize=9)
    other.set_xlabel(f"{first}; attacked images (x misclassified, gray: clean)", fontsize=9)
    if result["method"] == "t-SNE":  # whose coordinates mean nothing
        left.set(xticks=[], yticks=[])
    figure.legend(loc="outside right center", title="class", fontsize=8, markerscale=2)
    figure.savefig(path, dpi=150)
    plt.close(figure)


@torch.no_grad()
def angles(model: models.Classifier, x: Tensor, y: Tensor) -> dict:
    """In degrees: the `smallest` and `largest` angle between two class weights, and the mean one `within` a class,
    between the feature of a clean image and the weight of its class (ABCL, App. B)."""
    weight = class_weights(model)
    gram = models.cosine(weight, weight)
    between = torch.rad2deg(models.arccos(gram[~torch.eye(len(gram), dtype=torch.bool, device=gram.device)]))
    z = torch.cat([model.features(part) for part in in_batches(x, 250, y.device)])
    within = torch.rad2deg(models.arccos(models.cosine(z, weight).gather(1, y[:, None])))
    return {"smallest": float(between.min()), "largest": float(between.max()), "within": float(within.mean())}


def describe_angles(degrees: dict[str, float]) -> str:
    return "class weights {smallest:.1f} to {largest:.1f} degrees apart, features {within:.1f} off".format(**degrees)


def plot_examples(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, path: Path, count: int = 8) -> dict:
    """Clean image, attacked image and perturbation, amplified to fill the range: in Linf, that is -eps to eps.

    Shown are `count` images, always the same choice of them, those first that the attack fools. Returns `row` (in x),
    `label`, and the predictions `clean` and `attacked` of each.
    """
    plt = pyplot()
    model.eval()
    clean, attacked = (predictions(model, images, 250, y.device) for images in (x, x_adv))
    fooled = (clean == y) & (attacked != y)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(common.SPLIT_SEED)).to(y.device)
    rows = order[(~fooled[order]).to(torch.uint8).argsort(stable=True)][:count]
    shown = {"row": rows, "label": y[rows], "clean": clean[rows], "attacked": attacked[rows]}
    shown = {key: value.tolist() for key, value in shown.items()}
    reach = max(float((x_adv - x)[rows].abs().max()), 1e-6)
    images = [x[rows], x_adv[rows], (x_adv - x)[rows] / (2 * reach) + 0.5]
    names = ["clean", "attacked", f"perturbation\n(± {reach:.3g})"]
    figure, grid = plt.subplots(3, len(rows), figsize=(1.1 * len(rows) + 0.4, 3.9), squeeze=False, layout="constrained")
    for axes, part, name in zip(grid, images, names, strict=True):
        cmap = "gray" if name in ("clean", "attacked") else "RdBu_r"
        for axis, image in zip(axes, part.permute(0, 2, 3, 1).clamp(0, 1).cpu().numpy(), strict=True):
            axis.imshow(image, cmap=cmap, vmin=0, vmax=1)  # the map is for gray images alone
            axis.set(xticks=[], yticks=[])
        axes[0].set_ylabel(name, fontsize=9)
    for i, (label, before, after) in enumerate(zip(shown["label"], shown["clean"], shown["attacked"], strict=True)):
        grid[0, i].set_title(f"label {label}", fontsize=9)
        grid[0, i].set_xlabel(f"predicted {before}", fontsize=8, color="black" if before == label else "firebrick")
        grid[1, i].set_xlabel(f"predicted {after}", fontsize=8, color="black" if after == label else "firebrick")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return shown


ANALYSES = ("curves", "gradients", "features", "angles", "examples")


def analyze(names: list[str], model: nn.Module, x: Tensor, y: Tensor, settings: dict, folder: Path) -> dict:
    """The analyses called `names`; each gives its data, and FOLDER/NAME.png but for the angles. Features, gradients and
    examples are of at most 2,000 images, under PGD-20 on the training loss."""
    torch.manual_seed(settings["seed"])
    budget = {"eps": settings["eps"], "norm": settings["norm"], "step_size": 2.5 * settings["eps"] / 20, "steps": 20}
    found = {}
    if "curves" in names:
        found["curves"] = robustness_curves(model, x, y, settings)
        plot_robustness_curves(found["curves"], folder / "curves.png")
    if "angles" in names:
        found["angles"] = angles(model, x, y)
        print(describe_angles(found["angles"]))
    if not set(names) - {"curves", "angles"}:
        return found
    rows = spread(len(y), 2000)
    x, y = floats(x, rows, y.device), y[rows]
    parts = zip(x.split(settings["batch_size"]), y.split(settings["batch_size"]), strict=True)
    x_adv = torch.cat([common.pgd(model, a, b, loss=training_ce(model, 0.0), **budget) for a, b in parts])
    if "gradients" in names:
        few = spread(len(y), 100)
        found["gradients"] = gradient_norm_ratio(model, x[few], x_adv[few], y[few])
        plot_gradient_norm_ratio(found["gradients"], folder / "gradients.png")
    if "features" in names:
        found["features"] = feature_map(model, x, x_adv, y, settings["seed"])
        plot_feature_map(found["features"], folder / "features.png")
    if "examples" in names:
        shown = plot_examples(model, x, x_adv, y, folder / "examples.png")
        found["examples"] = shown | {"row": rows[shown["row"]].tolist()}
    return found


def corruptions(folder: str, model: nn.Module, x: Tensor, y: Tensor, settings: dict, out: Path) -> dict:
    """Accuracy on the published set in `folder`, or, where that is empty, on our own approximation of it."""
    if folder:
        classes = predict_logits(model, floats(x, torch.tensor([0]), y.device)).shape[1]
        sources, title = published_corruptions(Path(folder), tuple(x.shape[1:]), classes), folder
    else:
        x = floats(x, torch.arange(len(y)), y.device)
        sources = {name: partial(approximate_corruption, x, y, name) for name in CORRUPTIONS}
        title = "our approximation, not the published -C set"
    result = corruption_accuracy(model, sources, settings)
    print_corruptions(result, title)
    plot_corruptions(result, out / "corruptions.png")
    return result | {"source": title}


def geodesic(model: nn.Module, meta: dict, x: Tensor, y: Tensor, settings: dict) -> dict:
    """Geodesic inference under PGD-40 on the cross-entropy and under the attack that also evades the rejection."""
    thresholds = geodesic_thresholds(meta["geodesic"], settings["device"])
    budget = {"eps": settings["eps"], "step_size": 2.5 * settings["eps"] / 40, "steps": 40}
    attacks = {
        "pgd-40": partial(common.pgd, loss=ce, **budget),
        "geodesic-pgd-40": partial(geodesic_pgd, thresholds=thresholds, **budget),
    }
    results, size, x = {}, settings["batch_size"], floats(x, torch.arange(len(y)), y.device)
    for name, attack in attacks.items():
        torch.manual_seed(settings["seed"])
        x_adv = torch.cat([attack(model, a, b) for a, b in zip(x.split(size), y.split(size), strict=True)])
        results[name] = geodesic_inference(model, x, x_adv, y, thresholds, size)
    return results


def print_geodesic(results: dict) -> None:
    for name, figures in results.items():
        print(f"\ngeodesic inference under {name}")
        for key, value in figures.items():
            if isinstance(value, dict):
                value = f"{value['percent']:.2f} % ({interval(value)}), n = {value['n']}"
            elif value is None:
                value = "no such image"
            print(f"  {key.replace('_', ' '):<28} {value}")


# ----------------------------------------------------------------------------------------------------------- models


@contextmanager
def imports_from(folder: Path) -> Iterator[None]:
    """Imports look in `folder` first, and find its own models.py or utils.py, not ours and not another user's."""
    here = {path.stem for path in folder.iterdir() if path.is_dir() or path.suffix == ".py"}
    named_so = [name for name in list(sys.modules) if name.partition(".")[0] in here and is_own(sys.modules[name])]
    before, path, ours = {name: sys.modules.pop(name) for name in named_so}, sys.path.copy(), Path(__file__).resolve()
    # Our models.py would win over a folder models without an __init__.py, wherever that stands.
    sys.path[:] = [str(folder), *(place for place in path if Path(place).resolve() != ours.parent)]
    try:
        yield
    finally:
        added = [place for place in sys.path if place not in (*path, str(folder))]  # by the file, for its imports
        sys.path[:] = path + added
        sys.modules.update(before)


def user_model(text: str) -> tuple[nn.Module, str, dict[str, str]]:
    """The module that FILE.py:FUNCTION makes, its name, and the code in use then."""
    path, _, function = text.rpartition(":")
    if not Path(path).is_file() or not path.endswith(".py"):
        raise common.UserError(f"--model {text}: there is no Python file {path}")
    spec = importlib.util.spec_from_file_location(f"user_{Path(path).stem}", path)
    try:
        with imports_from(Path(path).resolve().parent):
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            model, code = getattr(module, function)(), code_in_use()
    except (Exception, SystemExit) as error:
        raise common.UserError(f"--model {text}: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise common.UserError(f"--model {text}: returned a {type(model).__name__}, not an nn.Module")
    return model, f"{Path(path).stem}:{function}", code


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


Found = list[tuple[str, nn.Module, dict]]  # name, model and what its checkpoint says


def load_models(texts: list[str], foreign: dict, device: str) -> Found:
    """Checkpoints, run directories and FILE.py:FUNCTION, in eval mode; `foreign` is for bare state dicts."""
    found = []
    for text in texts:
        if ".py:" in text:
            model, name, code = user_model(text)
            found.append((name, model.to(device).eval(), {"checkpoint": text, "code": code}))
        else:
            file = common.checkpoint_file(text)
            model, meta = common.load_checkpoint(file, device, **foreign)
            found.append((model_name(file), model, meta | {"checkpoint": str(file)}))
    names = [name for name, _, _ in found]
    if len(set(names)) < len(names):
        found = [(f"{i + 1}-{name}", model, meta) for i, (name, model, meta) in enumerate(found)]
    return found


def targets_and_sources(args: argparse.Namespace) -> tuple[Found, Found]:
    if misnamed := [text for text in args.model if ".py:" not in text]:
        raise common.UserError(f"--model {misnamed[0]}: give FILE.py:FUNCTION")
    foreign = foreign_options(args)
    found = load_models([*args.checkpoints, *args.model], foreign, args.device)
    sources = load_models(args.source, foreign, args.device)
    if not found:
        raise common.UserError("name a checkpoint, a run directory, or --model FILE.py:FUNCTION")
    if args.arch and all("args" in meta or ".py:" in meta["checkpoint"] for _, _, meta in found + sources):
        raise common.UserError("--arch is for a bare state dict; these checkpoints say themselves what they are")
    return found, sources


def find_test_set(args: argparse.Namespace, found: Found) -> tuple[str, str]:
    """The one dataset that all models are tested on, and the folder to look for it in."""
    trained_on = {meta["args"]["dataset"]: meta["args"]["data_dir"] for _, _, meta in found if "args" in meta}
    if not args.dataset and len(trained_on) != 1:
        names = ", ".join(trained_on) or "none of the models says which"
        raise common.UserError(f"which dataset? ({names}): give --dataset")
    dataset = args.dataset or next(iter(trained_on))
    folder = trained_on.get(dataset) or next(iter(trained_on.values()), "data")
    return dataset, args.data_dir or folder


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
    if logits.dtype != torch.float32:  # half precision has ties that hide errors; attacks reckon in float32
        raise common.UserError(f"{name} returns logits in {logits.dtype}; return float32")


# ---------------------------------------------------------------------------------------------------------- reports


def accuracy_from(right: int, n: int) -> dict:
    """right, n, accuracy and its 95 % interval, in %."""
    low, high = wilson(right, n)
    return {"right": right, "n": n, "accuracy": 100 * right / n, "low": low, "high": high}


def accuracy_of(right: Tensor) -> dict:
    """The same for verdicts (N,)."""
    return accuracy_from(int(right.sum()), len(right))


def row(outcome: dict) -> dict:
    """What eval.json says of one attack: queries are forward passes an image that was right clean, median_distance is
    over these images, None where most were not fooled."""
    attacked = outcome["attacked"].cpu()
    distance = sorted(outcome["distance"][attacked].tolist()) or [math.inf]
    median = distance[len(distance) // 2]
    return accuracy_of(outcome["right"]) | {
        "norm": outcome["norm"],
        "eps": outcome["eps"],
        "seconds": outcome["seconds"],
        "not_finite": outcome["faults"],
        "queries": outcome["passes"] / max(int(attacked.sum()), 1),
        "median_distance": median if math.isfinite(median) else None,
    }


def report(name: str, meta: dict, outcome: dict, settings: dict) -> dict:
    """What eval.json says of one model."""
    rows = {name: row(attack) for name, attack in outcome["attacks"].items()}
    same = [attack["right"] for attack in outcome["attacks"].values() if attack["norm"] == settings["norm"]]
    rows["worst case"] = accuracy_of(torch.stack(same).all(0))
    kept = {key: meta[key] for key in ("checkpoint", "method", "epoch", "model_options", "args") if key in meta}
    if meta.get("history"):  # a run stopped in its first epoch has none
        seconds = meta["args"]["epochs"] * statistics.fmean(row["seconds"] for row in meta["history"])
        kept |= {"training_seconds": seconds, "training_hardware": meta.get("hardware")}
    return {"model": name, **settings, **kept, "attacks": rows}


def interval(row: dict) -> str:
    return f"{row['low']:.2f} - {row['high']:.2f}"


def heading(result: dict) -> str:
    n, ball = result["attacks"]["clean"]["n"], f"{NORMS[result['norm']]} eps {result['eps']:.4g}"
    return f"{result['dataset']}, n = {n} test images, {ball}; in brackets the 95 % interval"


def remark(name: str, row: dict, result: dict) -> str:
    """What the columns do not say: queries of a black-box attack, distances, a norm and eps of its own."""
    if name == "worst case" or FROM in name:
        return ""
    attack, remarks = function_of(find_attack(name)), []
    if row["norm"] != result["norm"]:
        remarks.append(f"{row['norm']}, eps {row['eps']:g}: not in the worst case")
    if attack in BLACK_BOX:
        remarks.append(f"{row['queries']:.0f} queries an image")
    if attack in NEAREST and attack is not fab_targeted and row["median_distance"] is not None:  # FAB stops at eps
        remarks.append(f"median distance {row['median_distance']:.4g}")
    return "; ".join(remarks)


def print_report(result: dict) -> None:
    rows = result["attacks"]
    worst = rows["worst case"]
    print(f"\n{result['model']} on {heading(result)}")
    print(f"worst case over all attacks {worst['accuracy']:.2f} % ({interval(worst)})")
    print(f"\n{'attack':<20} {'accuracy':>9} {'95 % interval':>16} {'right/n':>12} {'seconds':>9}  remarks")
    for attack, row in rows.items():
        share = f"{row['right']}/{row['n']}"
        seconds = f"{row['seconds']:.1f}" if "seconds" in row else ""
        line = f"{attack:<20} {row['accuracy']:9.2f} {interval(row):>16} {share:>12} {seconds:>9}"
        print(f"{line}  {remark(attack, row, result)}".rstrip())
        if row.get("not_finite"):
            print(f"FAULT: logits that are not finite on {row['not_finite']} images under {attack}; counted as wrong")


def label_of(attack: str, result: dict) -> str:
    """The attack's name, and its ball where that is not the evaluation's."""
    row = {"norm": result["norm"]} | result["attacks"][attack]
    return attack if row["norm"] == result["norm"] else f"{attack} ({NORMS[row['norm']]} {row['eps']:g})"


def print_comparison(results: list[dict]) -> None:
    """Models by attacks, the worst case first."""
    width = max(len(result["model"]) for result in results)
    columns = ["worst case", *(name for name in results[0]["attacks"] if name != "worst case" and FROM not in name)]
    print(f"\n{heading(results[0])}")
    print(" " * width + "".join(f" {label_of(attack, results[0]):>23}" for attack in columns))
    for result in results:
        rows = [result["attacks"][attack] for attack in columns]
        cells = [f"{row['accuracy']:.2f} ({interval(row)})" for row in rows]
        print(f"{result['model']:<{width}}" + "".join(f" {cell:>23}" for cell in cells))


def write_results(out: Path, results: list[dict]) -> None:
    """eval.json, eval.csv and eval.png for one model or for a comparison."""
    text = json.dumps(results[0] if len(results) == 1 else results, indent=2)
    common.write_atomically(out / "eval.json", lambda file: file.write(text), "w")
    fields = ["model", "attack", *results[0]["attacks"]["clean"]]
    rows = [{"model": r["model"], "attack": attack, **row} for r in results for attack, row in r["attacks"].items()]

    def write_csv(file: object) -> None:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)

    common.write_atomically(out / "eval.csv", write_csv, "w")
    plot_results(results, out / "eval.png")


def write_verdicts(out: Path, index: Tensor, y: Tensor, outcome: dict) -> None:
    verdicts = {name: attack["right"] for name, attack in outcome["attacks"].items()}
    arrays = {"index": index, "label": y, "clean_prediction": outcome["prediction"], **verdicts}
    arrays = {key: value.cpu().numpy() for key, value in arrays.items()}
    common.write_atomically(out / "verdicts.npz", lambda file: np.savez_compressed(file, **arrays))


def transfer_matrices(results: list[dict]) -> dict[str, dict[str, list[dict]]]:
    """{attack: {source: the row of each target}}, from the rows of the attacks that were crafted on a source."""
    matrices: dict[str, dict[str, list[dict]]] = {}
    for result in results:
        for name, row in result["attacks"].items():
            if FROM in name:
                attack, source = name.split(FROM, 1)
                matrices.setdefault(attack, {}).setdefault(source, []).append(row)
    return matrices


def print_transfer(results: list[dict]) -> None:
    """For each attack the accuracy of every target (column) on what was crafted on every source (row)."""
    targets = [result["model"] for result in results]
    for attack, rows in transfer_matrices(results).items():
        width = max(len(source) for source in rows)
        print(f"\n{attack} from the source (row) on the target (column); {heading(results[0])}")
        print(" " * width + "".join(f" {target:>23}" for target in targets))
        for source, cells in rows.items():
            cells = [f"{cell['accuracy']:.2f} ({interval(cell)})" for cell in cells]
            print(f"{source:<{width}}" + "".join(f" {cell:>23}" for cell in cells))


def plot_transfer(results: list[dict], path: Path) -> None:
    """The matrices of print_transfer as heatmaps side by side; framed where source and target have one name."""
    plt = pyplot()
    matrices, targets = transfer_matrices(results), [result["model"] for result in results]
    sources = list(next(iter(matrices.values())))
    size = (1.6 + len(matrices) * (0.5 + 0.75 * len(targets)), 1.9 + 0.45 * len(sources))
    figure, panels = plt.subplots(1, len(matrices), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for panel, (attack, rows) in zip(panels[0], matrices.items(), strict=True):
        cells = np.array([[cell["accuracy"] for cell in row] for row in rows.values()])
        image = panel.imshow(cells, vmin=0, vmax=100, cmap="viridis", aspect="auto")
        for (i, j), value in np.ndenumerate(cells):
            color = "black" if value > 60 else "white"
            white_box = dict(boxstyle="square", edgecolor=color, facecolor="none")
            frame = white_box if sources[i] == targets[j] else None
            panel.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=8, color=color, bbox=frame)
        panel.set(xticks=range(len(targets)), yticks=range(len(sources)), yticklabels=sources)
        panel.set_xticks(range(len(targets)), targets, rotation=40, ha="right")
        panel.set_xlabel(f"{attack}: target")
        panel.tick_params(length=0)
    panels[0, 0].set_ylabel("source")
    figure.colorbar(image, ax=list(panels[0]), label=f"accuracy (%), n = {results[0]['attacks']['clean']['n']}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_results(results: list[dict], path: Path) -> None:
    """Accuracy with its interval by attack, one bar a model."""
    plt = pyplot()
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
    labels = [label_of(attack, results[0]) for attack in attacks]
    axis.set(yticks=range(len(attacks)), yticklabels=labels, xlim=(0, 110), ylim=(len(attacks) - 0.5, -0.5))
    first, counts = results[0], {row["n"] for result in results for row in result["attacks"].values()}
    n = f"n = {counts.pop()}, " if len(counts) == 1 else ""
    axis.set_xlabel(
        f"accuracy (%), 95 % interval; {first['dataset']}, {n}{NORMS[first['norm']]} eps {first['eps']:.3g}"
    )
    if len(results) > 1:
        figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ------------------------------------------------------------------------------------------ report of many evaluations
# --report DIR fills in the text DIR/report.md from the eval.json and verdicts.npz of all models in DIR. The folder of a
# model is NAME-sSEED; all evaluations in it count, each attack on the most images it was made on. The text may say
#
#     {NAME on ATTACK}                 accuracy and interval; ATTACK + ATTACK is the worst case over both; NAME-sSEED
#                                      is one network
#     {NAME vs OTHER on ATTACK}        both, and whether McNemar's test tells them apart, image by image
#     {NAME - OTHER on ATTACK}         their difference in points: bold if it is one, in italics if of one seed
#     {NAME on audit}, {NAME on angles}
#     {NAME on gradients}              the least and the largest median over the layers, and mean; of the first seed
#     {runs of PREFIX by COMMAND}      how each model whose NAME begins so was made; COMMAND makes it anew
#     ```table ATTACK, ATTACK, ...     then a line a row: label | NAME | the paper's figures, in the columns' order
#     ```compare ATTACK, ATTACK, ...   then a line a row: label | NAME vs OTHER | the paper's differences; NAME-sSEED vs
#                                      OTHER-sSEED for two networks
#     ```dots FILE.png ATTACK, ...     rows of a table as a figure, a line a row
#     ```lines FILE.png ATTACK; AXIS   then a line a row: label | NAME, with * for the value | the values, along AXIS
#     ```grid FILE.png ATTACK; AXIS    the same rows as a grid of cells
#     ```curves FILE.png eps           rows label | NAME: by eps, steps or restarts what --analyze curves found
#     ```gradients FILE.png ABOUT      the same rows: what --analyze gradients found, by layer, of the first seed
#
# In the heads of blocks an ATTACK is one, no `A + B`. A column of a table may also be `audit`, or `worst case`: on the
# images that its columns share, over all attacks in the ball of the evaluation that every seed faced there, with a
# column or without. Of several seeds the mean is given, and the interval from the lowest end of theirs to the highest.

WORST, AUDIT, NOT_SHOWN = "worst case", "audit", "no difference shown"
BALL, FLAGS = ("dataset", "norm", "eps"), ("step_size", "restarts")  # what an attack's name does not say of it
TITLES = {"mnist": "MNIST", "cifar10": "CIFAR-10", "cifar10_jpeg": "CIFAR-10 (JPEG copy)"}


class Verdicts(NamedTuple):
    """Of test images by ascending index, each (N,): the index, the label, and whether the model is still right."""

    index: np.ndarray
    label: np.ndarray
    right: np.ndarray

    def fits(self, n: int) -> bool:
        whole = all(values.shape == (n,) for values in self) and self.right.dtype == bool
        return whole and bool((np.diff(self.index) > 0).all())

    def at(self, index: np.ndarray) -> "Verdicts":
        place = np.searchsorted(self.index, index)
        return Verdicts(index, self.label[place], self.right[place])


def on_common_images(verdicts: list[Verdicts]) -> list[Verdicts]:
    """Each of them on the images that all of them have. Raises ValueError where these are not the same images."""
    index = reduce(np.intersect1d, (own.index for own in verdicts))
    shared = [own.at(index) for own in verdicts]
    if any((own.label != shared[0].label).any() for own in shared):
        raise ValueError("evaluations whose test images differ in their labels are put side by side: another order?")
    return shared


class Evaluated:
    """A trained model and its evaluations: `facts` of eval.json, and for each attack its row and its verdicts."""

    def __init__(self) -> None:
        self.facts: dict = {"audit": [], "analyses": {}, "seconds": 0.0}
        self.rows: dict[str, dict] = {}
        self.verdicts: dict[str, Verdicts] = {}
        self.analyzed: dict[str, int] = {}  # images

    def take_in(self, path: Path) -> None:
        """What the eval.json of one model says, with the verdicts.npz beside it; of what was done twice, the larger."""
        try:
            result = json.loads(path.read_text())
            if None in (result["dataset"], result["norm"], result["eps"]):
                raise ValueError("it names no ball")
            with np.load(path.with_name("verdicts.npz"), allow_pickle=False) as arrays:
                images = arrays["index"], arrays["label"]
                found = {name: Verdicts(*images, arrays[name]) for name in result["attacks"] if name != WORST}
            if any(not own.fits(result["attacks"][name]["n"]) for name, own in found.items()):
                raise ValueError("its verdicts are no bool for each of n images, in ascending order")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
            raise common.UserError(f"{path}: not the evaluation of one model ({error})") from None
        for fact in (*BALL, *FLAGS, "weights"):
            told = result.get(fact)
            if fact == "weights" and told is None:  # as in the first evaluations of a benchmark
                continue
            if told != self.facts.setdefault(fact, told):
                raise common.UserError(f"{path}: its {fact} is not that of the same model's other evaluations")
        rows, seconds = result["attacks"], sum(row.get("seconds", 0.0) for row in result["attacks"].values())
        analyses, n = result.get("analyses") or {}, len(images[0])
        larger = {name: analysis for name, analysis in analyses.items() if n > self.analyzed.get(name, 0)}
        self.analyzed |= dict.fromkeys(larger, n)
        analyses = self.facts["analyses"] | larger
        self.facts |= result | {"seconds": self.facts["seconds"] + seconds, "analyses": analyses}
        for name, verdicts in found.items():
            if name not in self.rows or rows[name]["n"] > self.rows[name]["n"]:
                self.rows[name], self.verdicts[name] = rows[name], verdicts

    def under(self, attacks: str) -> Verdicts | None:
        """The verdicts of an attack or, `A + B`, the worst case over several; None where one was not made."""
        names = attacks.split(" + ")
        if not self.verdicts.keys() >= set(names):
            return None
        shared = on_common_images([self.verdicts[name] for name in names])
        return shared[0]._replace(right=np.all([own.right for own in shared], axis=0))

    def in_the_ball(self, attack: str) -> bool:
        row = self.rows.get(attack, {})
        return (row.get("norm"), row.get("eps")) == (self.facts["norm"], self.facts["eps"])


Seeds = dict[int, Evaluated]
Evaluations = dict[str, Seeds]  # by NAME


def read_evaluations(folders: list[Path]) -> Evaluations:
    """All models NAME-sSEED below these folders."""
    found: Evaluations = {}
    for folder in folders:
        for path in sorted(folder.rglob("eval.json")):
            if path.read_bytes().startswith(b"["):  # a comparison of models, each of which has its own
                continue
            inside = [parent for parent in path.parents if folder in parent.parents]
            home = next((parent for parent in inside if re.search(r"-s\d+$", parent.name)), None)
            if home is None:
                raise common.UserError(f"{path}: is in no folder NAME-sSEED of {folder}")
            name, _, seed = home.relative_to(folder).as_posix().rpartition("-s")
            found.setdefault(name, {}).setdefault(int(seed), Evaluated()).take_in(path)
    if not found:
        raise common.UserError(f"--report: there is no eval.json in {', '.join(map(str, folders))}")
    return found


def complete(seeds: Seeds, columns: list[str]) -> Seeds:
    """The seeds that were attacked in every way of `columns` that any of them was."""
    made = {column for column in columns for model in seeds.values() if column in model.rows}
    return {seed: model for seed, model in seeds.items() if made and made <= model.rows.keys()}


def check_same_ball(models: Iterable[Evaluated]) -> None:
    """What stands beside each other was attacked on one dataset, in one ball and with the same flags: raises
    ValueError."""
    ways = {", ".join(f"{fact} {model.facts.get(fact)}" for fact in (*BALL, *FLAGS)) for model in models}
    if len(ways) > 1:
        raise ValueError(f"evaluations with {' and with '.join(sorted(ways))} are put side by side")


def in_setting(dataset: str, ball: dict) -> str:
    """The dataset's title and the ball, a row's or a network's `norm` and `eps`."""
    return f"{TITLES.get(dataset, dataset)}, {NORMS[ball['norm']]} eps {ball['eps']:.3g}"


def over_seeds(seeds: Seeds, attack: str) -> dict | None:
    """accuracy, its low and high end in %, n, and the `setting` in words; None where not all seeds were attacked so."""
    check_same_ball(seeds.values())
    verdicts = [model.under(attack) for model in seeds.values()]
    if not verdicts or None in verdicts:
        return None
    rows = [accuracy_of(torch.from_numpy(own.right)) for own in verdicts]
    first = next(iter(seeds.values()))
    ball = first.rows.get(attack, first.facts)  # cw-l2 and fgsm-l2 have their own
    return {
        "accuracy": statistics.fmean(row["accuracy"] for row in rows),
        "low": min(row["low"] for row in rows),
        "high": max(row["high"] for row in rows),
        "n": min(row["n"] for row in rows),
        "setting": in_setting(first.facts["dataset"], ball),
    }


def audit_verdict(seeds: Seeds) -> str:
    audits = [model.facts["audit"] for model in seeds.values() if model.facts["audit"]]
    failed = [sum(not check["passed"] for check in checks) for checks in audits]
    if not audits:
        return "not made"
    of = f" ({len(audits)} of {len(seeds)} seeds)" * (len(audits) < len(seeds))
    return (f"fails {' and '.join(map(str, failed))} of {len(audits[0])}" if any(failed) else "passes") + of


def all_in_the_ball(seeds: Seeds, columns: list[str]) -> str:
    """`A + B`: the attacks in the ball that every seed faced on all images which those of the columns share."""

    def faced(model: Evaluated) -> set[str]:
        named = [model.verdicts[column] for column in columns if model.in_the_ball(column)]
        if not named:
            return set()
        shared = on_common_images(named)[0].index
        inside = filter(model.in_the_ball, model.verdicts)
        return {attack for attack in inside if np.isin(shared, model.verdicts[attack].index).all()}

    return " + ".join(sorted(set.intersection(*map(faced, seeds.values()))))


def table_row(seeds: Seeds, columns: list[str]) -> list[str | dict | None]:
    """Of each column the figures over the seeds; of the audit its words."""
    worst = all_in_the_ball(seeds, columns)
    return [
        audit_verdict(seeds) if column == AUDIT else over_seeds(seeds, worst if column == WORST else column)
        for column in columns
    ]


def reach(value: float, row: dict) -> float:
    """The longer arm of the interval around a value."""
    return max(row["high"] - value, value - row["low"])


def cell(ours: str | dict | None, paper: str) -> str:
    if isinstance(ours, dict):
        ours = f"{ours['accuracy']:.2f} ± {reach(ours['accuracy'], ours):.2f}"
    return f"{ours or ''} {f'<sub>{paper}</sub>' if paper not in ('', '-') else ''}".strip()


def as_table(heads: list[str], lines: list[list[str]]) -> str:
    if not lines:
        return "*No row of this table has been evaluated yet.*"
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *lines))


def columns_of(about: str, *others: str) -> list[str]:
    """The names in the head of a block, separated by commas: attacks or one of `others`, or it raises UserError."""
    columns = re.split(r",\s*", about)
    for column in columns:
        if column not in (*others, *ATTACKS) and FROM not in column:
            find_attack(column)
    return columns


def figures_of(paper: list[str], columns: list[str]) -> list[str]:
    """The paper's figures for the columns, as the rest of a row gives them, empty where it gives none."""
    figures = re.split(r",\s*", paper[0]) if paper else []
    if len(figures) > len(columns):
        raise ValueError(f"{paper[0]} are more figures of the paper than columns")
    return figures + [""] * (len(columns) - len(figures))


def draw_table(about: str, rows: list[list[str]], found: Evaluations) -> str:
    """A table in Markdown: rows are label, NAME and the paper's figures, - where it has none."""
    columns, lines, counts = columns_of(about, WORST, AUDIT), [], {}
    check_same_ball(model for _, name, *_ in rows for model in found.get(name, {}).values())
    for label, name, *paper in rows:
        seeds = complete(found.get(name, {}), columns)
        if not seeds:
            print(f"--report: no evaluation of {name}, left out", file=sys.stderr)
            continue
        ours = table_row(seeds, columns)
        for column, figures in zip(columns, ours, strict=True):
            counts.setdefault(column, set()).update({figures["n"]} if isinstance(figures, dict) else ())
        cells = map(cell, ours, figures_of(paper, columns))
        lines.append([f"{label} `{Path(name).name}`", str(len(seeds)), *cells])
    sizes = {column: " / ".join(f"{n:,}" for n in sorted(counts[column])) for column in columns if counts.get(column)}
    heads = [f"{column}<br>n = {sizes[column]}" if column in sizes else column for column in columns]
    return as_table(["", "seeds", *heads], lines)


def known_rows(columns: list[str], rows: list[list[str]], found: Evaluations) -> list[tuple[str, list[dict]]]:
    """The labels and figures of those rows of a table that have one in each column."""
    check_same_ball(model for _, name, *_ in rows for model in found.get(name, {}).values())
    known = []
    for label, name, *_ in rows:
        seeds = complete(found.get(name, {}), columns)
        figures = table_row(seeds, columns) if seeds else [None]
        if None in figures:
            print(f"--report: no evaluation of {name} under all of {', '.join(columns)}, left out", file=sys.stderr)
        else:
            known.append((label, figures))
    if not known:
        raise ValueError("no row has been evaluated so")
    return known


def draw_dots(path: Path, about: str, rows: list[list[str]], found: Evaluations) -> None:
    """The accuracies of a table's rows with their intervals, a line a row, a marker an attack."""
    plt = pyplot()
    columns = columns_of(about, WORST)
    labels, lines = zip(*known_rows(columns, rows, found), strict=True)
    setting = lines[0][0]["setting"]
    figure, axis = plt.subplots(figsize=(7, 1.1 + 0.36 * len(lines)), layout="constrained")
    for i, (column, marker) in enumerate(zip(columns, itertools.cycle("osD^v"), strict=False)):
        own = [line[i] for line in lines]
        accuracy = np.array([row["accuracy"] for row in own])
        error = np.abs([[row["low"] for row in own], [row["high"] for row in own]] - accuracy)
        place = np.arange(len(lines)) + 0.6 * ((i + 0.5) / len(columns) - 0.5)  # intervals do not hide each other
        style = {"fmt": marker, "markersize": 4, "linewidth": 1, "capsize": 2}
        elsewhere = f"; {own[0]['setting']}" * (own[0]["setting"] != setting)  # cw-l2 and fgsm-l2 have their own ball
        axis.errorbar(accuracy, place, xerr=error, label=f"{column}, n = {sizes(own)}{elsewhere}", **style)
    least = min(row["low"] for line in lines for row in line)
    axis.set(yticks=range(len(lines)), yticklabels=labels, ylim=(len(lines) - 0.5, -0.5))
    axis.set_xlim(10 * (least // 10) - 1, 101)  # gaps of a point or two are to be seen
    axis.set_xlabel(f"accuracy (%); {setting}")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def series(pattern: str, values: str, attack: str, found: Evaluations) -> list[dict]:
    """The figures under one attack of the NAMEs that a pattern with * stands for, one for each of the values."""
    names = [pattern.replace("*", value) for value in values.split(",")]
    check_same_ball(model for name in names for model in found.get(name, {}).values())
    figures = [over_seeds(complete(found.get(name, {}), [attack]), attack) for name in names]
    if missing := [name for name, row in zip(names, figures, strict=True) if row is None]:
        raise ValueError(f"there is no evaluation of {', '.join(missing)} under {attack}")
    return figures


def attack_and_axis(about: str) -> tuple[str, str]:
    attack, semicolon, axis_name = about.partition("; ")
    if not semicolon:
        raise ValueError("its head is no FILE.png ATTACK; AXIS")
    return attack, axis_name


def sizes(rows: Iterable[dict]) -> str:
    return " / ".join(f"{n:,}" for n in sorted({row["n"] for row in rows}))


def axis_label(attack: str, rows: list[dict]) -> str:
    return f"accuracy under {attack} (%)\n{rows[0]['setting']}, n = {sizes(rows)}"


def draw_lines(path: Path, about: str, rows: list[list[str]], found: Evaluations) -> None:
    """Accuracy with its interval against what is varied, a line a row."""
    plt = pyplot()
    attack, axis_name = attack_and_axis(about)
    figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
    drawn = []
    for (label, pattern, values), marker in zip(rows, itertools.cycle("os^Dv"), strict=False):
        figures, at = series(pattern, values, attack, found), [float(value) for value in values.split(",")]
        plot_band(axis, at, figures, f"{marker}-", label)
        drawn += figures
    axis.set(xlabel=axis_name, ylabel=axis_label(attack, drawn), xticks=at)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def draw_curves(path: Path, varied: str, rows: list[list[str]], found: Evaluations) -> None:
    """Accuracy when eps (or steps, or restarts) is varied, under the stronger of the attacks of --analyze curves: a
    line a row, of its first seed that has them."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
    settings = set()
    for (label, name, *_), marker in zip(rows, itertools.cycle("os^Dv"), strict=False):
        facts = first_with(found, name, "curves").facts
        curves = facts["analyses"]["curves"]
        if varied not in curves["axes"]:
            raise ValueError(f"there is no curve of {name} by {varied}")
        curve, n, dataset = curves["axes"][varied], curves["n"], facts["dataset"]
        ball = NORMS[curves["norm"]] + f" eps {curves['eps']:.3g}" * (varied != "eps")
        settings.add(f"{TITLES.get(dataset, dataset)}, {ball}, n = {n:,}")
        accuracies = [accuracy_from(right, n) for right in np.min(list(curve["right"].values()), axis=0)]
        plot_band(axis, curve["at"], accuracies, f"{marker}-", label)
    if len(settings) > 1:
        raise ValueError(f"curves of {' and of '.join(sorted(settings))} are put side by side")
    axis.set(xlabel=varied, ylabel=f"accuracy (%)\n{settings.pop()}", ylim=(0, 101))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def ratios_of(model: Evaluated, name: str) -> dict:
    """What --analyze gradients found of a network of NAME. Raises ValueError where that is not whole."""
    ratios = model.facts["analyses"]["gradients"]
    try:
        lists = [ratios[key] for key in ("layers", "mean", "median", "low", "high")]
        whole = len({len(own) for own in lists}) == 1 and len(lists[0]) > 0 and isinstance(ratios["n"], int)
    except (KeyError, TypeError):  # of an earlier version, say
        whole = False
    if not whole:
        raise ValueError(f"the gradients of {name} lack a figure of a layer: evaluate it anew")
    return ratios


def draw_gradients(path: Path, about: str, rows: list[list[str]], found: Evaluations) -> None:
    """The medians of --analyze gradients by layer, a marker a row, of its first seed that has them."""
    plt = pyplot()
    names = [name for _, name, *_ in rows]
    models = [first_with(found, name, "gradients") for name in names]
    check_same_ball(models)
    ratios = [ratios_of(model, name) for model, name in zip(models, names, strict=True)]
    if any(own["layers"] != ratios[0]["layers"] for own in ratios):
        raise ValueError("networks of other layers are put side by side")
    setting = in_setting(models[0].facts["dataset"], models[0].facts)
    figure, axis = plt.subplots(figsize=(7, 1.2 + 0.28 * len(ratios[0]["layers"])), layout="constrained")
    for i, ((label, *_), own, style) in enumerate(zip(rows, ratios, itertools.cycle("osD^v"), strict=False)):
        plot_medians(axis, own, style, label, 0.5 * ((i + 0.5) / len(rows) - 0.5))
    ratio_axis(axis, ratios, f": median, 95 % interval\nPGD-20, {setting}, n = {sizes(ratios)}")
    figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def draw_grid(path: Path, about: str, rows: list[list[str]], found: Evaluations) -> None:
    """Accuracies as colored cells: a line a row, a column a value."""
    plt = pyplot()
    attack, axis_name = attack_and_axis(about)
    figures = [series(pattern, values, attack, found) for _, pattern, values in rows]
    if len({len(line) for line in figures}) > 1:
        raise ValueError("its rows have not all as many values")
    cells = np.array([[row["accuracy"] for row in line] for line in figures])
    size = (1.7 + 0.9 * cells.shape[1], max(3, 1.2 + 0.5 * len(cells)))
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    image = axis.imshow(cells, cmap="viridis", aspect="auto")
    for (i, j), value in np.ndenumerate(cells):
        color = "white" if value < (cells.min() + cells.max()) / 2 else "black"
        text = f"{value:.1f}\n± {reach(value, figures[i][j]):.1f}"
        axis.text(j, i, text, ha="center", va="center", fontsize=8, color=color)
    axis.set_xticks(range(cells.shape[1]), rows[0][2].split(","))
    axis.set_yticks(range(len(rows)), [label for label, *_ in rows])
    axis.set_xlabel(axis_name)
    figure.colorbar(image, ax=axis, label=axis_label(attack, [*itertools.chain(*figures)]))
    figure.savefig(path, dpi=200)
    plt.close(figure)


def seeds_of(found: Evaluations, name: str) -> Seeds:
    """All that NAME has; of NAME-sSEED this one."""
    base, _, seed = name.rpartition("-s")
    one = found.get(base, {}).get(int(seed)) if seed.isdigit() else None
    return {int(seed): one} if one else found.get(name, {})


def first_with(found: Evaluations, name: str, analysis: str) -> Evaluated:
    """The network of NAME's first seed that --analyze ANALYSIS was asked of. Raises ValueError."""
    models = [model for model in seeds_of(found, name).values() if analysis in model.facts["analyses"]]
    if not models:
        raise ValueError(f"of {name} there are no {analysis}")
    return models[0]


def one_figure(found: Evaluations, name: str, attack: str) -> str:
    seeds = seeds_of(found, name)
    if attack == AUDIT and seeds:
        return audit_verdict(seeds)
    measured = [angles for model in seeds.values() if (angles := model.facts["analyses"].get("angles"))]
    if attack == "angles" and measured:
        return describe_angles({key: statistics.fmean(one[key] for one in measured) for key in measured[0]})
    if attack == "gradients":
        ratios = ratios_of(first_with(found, name, attack), name)
        median, mean = (f"{min(ratios[key]):.2f} to {max(ratios[key]):.2f}" for key in ("median", "mean"))
        return f"{median} (means {mean}; n = {ratios['n']})"
    if row := over_seeds(complete(seeds, attack.split(" + ")), attack):
        return f"{row['accuracy']:.2f} ({interval(row)})"
    raise common.UserError(f"report.md: there is no evaluation of {name} under {attack}")


def matched(found: Evaluations, name: str, other: str) -> dict[str, tuple[Evaluated, Evaluated]]:
    """The models of both for each seed that both have; of NAME-sSEED and OTHER-sSEED these two."""
    ours, theirs = seeds_of(found, name), seeds_of(found, other)
    if name not in found and other not in found:
        return {f"{a} over {b}": (ours[a], theirs[b]) for a in ours for b in theirs}
    return {str(seed): (ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())}


def paired(a: Tensor, b: Tensor) -> dict:
    """Two models' verdicts on the same images, (N,): both accuracies and n, the 95 % interval of their difference in
    points (Agresti & Min 2005: Wald's, with half an image more in each cell), and McNemar's p, exact and two-sided."""
    gained, lost, n = int((a & ~b).sum()) + 0.5, int((b & ~a).sum()) + 0.5, len(a) + 2
    spread = Z95 * math.sqrt(gained + lost - (gained - lost) ** 2 / n)
    return {
        "ours": accuracy_of(a)["accuracy"],
        "theirs": accuracy_of(b)["accuracy"],
        "n": len(a),
        "low": 100 * (gained - lost - spread) / n,
        "high": 100 * (gained - lost + spread) / n,
        "p": min(1.0, 2 * min(chance(a, b), chance(b, a))),
    }


def compare(found: Evaluations, name: str, other: str, attack: str) -> dict | None:
    """What `paired` says of each of the `seeds`, `p` a list: over them the means of the accuracies, the least n, the
    hull of the intervals, and the `verdict`: more or less where the test finds a difference for every seed, and the
    worst seed of the one is better than the best of the other. None where no seed of both has verdicts."""
    pairs = {}
    for seed, pair in matched(found, name, other).items():
        both = [model.under(attack) for model in pair]
        if None not in both:
            check_same_ball(pair)
            pairs[seed] = paired(*(torch.from_numpy(own.right) for own in on_common_images(both)))
    if not pairs:
        return None
    each = {key: [pair[key] for pair in pairs.values()] for key in ("ours", "theirs", "n", "low", "high", "p")}
    ours, theirs = each["ours"], each["theirs"]
    apart = "more" if min(ours) > max(theirs) else "less" if max(ours) < min(theirs) else NOT_SHOWN
    verdict = apart if max(each["p"]) < 0.05 else NOT_SHOWN
    ends = {"low": min(each["low"]), "high": max(each["high"]), "n": min(each["n"])}
    means = {"ours": statistics.fmean(ours), "theirs": statistics.fmean(theirs)}
    return means | ends | {"seeds": list(pairs), "p": each["p"], "verdict": verdict}


def in_words(result: dict) -> str:
    """What `compare` found: both accuracies, the verdict, and what it rests on."""
    told = ", ".join("< 0.001" if p < 0.001 else f"{p:.2g}" for p in result["p"])
    seeds = f"seed{'s' * (len(result['seeds']) > 1)} {', '.join(result['seeds'])}"
    figures = f"{result['ours']:.2f} against {result['theirs']:.2f}"
    return f"{figures} ({result['verdict']}: p {told}; n = {result['n']:,}, {seeds})"


def in_points(result: dict) -> str:
    """The difference and the reach of its interval, bold where the verdict calls it one, in italics if of one seed."""
    points = result["ours"] - result["theirs"]
    mark = "*" * min(2, len(result["seeds"])) if result["verdict"] != NOT_SHOWN else ""
    return f"{mark}{round(points, 2) + 0.0:+.2f} ± {reach(points, result):.2f}{mark}"  # no -0.00


def draw_comparisons(about: str, rows: list[list[str]], found: Evaluations) -> str:
    """A table of differences, empty where there is none to make."""
    columns, lines = columns_of(about), []
    for label, names, *paper in rows:
        name, vs, other = names.partition(" vs ")
        if not vs:
            raise ValueError(f"{names!r} is no NAME vs OTHER")
        results = [compare(found, name, other, column) for column in columns]
        cells = map(cell, [result and in_points(result) for result in results], figures_of(paper, columns))
        if seeds := dict.fromkeys(", ".join(result["seeds"]) for result in results if result):
            lines.append([label, " / ".join(seeds), *cells])
        else:
            print(f"--report: no evaluation of {names}, left out", file=sys.stderr)
    return as_table(["", "seeds", *columns], lines)


def runs_table(found: Evaluations, prefix: str, command: str) -> str:
    """How each model whose NAME begins so was trained, the minutes that it and its attacks took (the mean over seeds),
    where, and what makes it anew."""
    heads = ["made anew by", "seeds", "network", "epochs, images", "attacked: epoch", "training", "attacks", "hardware"]
    lines = []
    for name, seeds in found.items():
        if not name.startswith(prefix):
            continue
        facts = [model.facts for model in seeds.values()]
        args, times = facts[0].get("args", {}), ("training_seconds", "seconds")
        minutes = [f"{statistics.fmean(fact.get(key, math.nan) for fact in facts) / 60:.1f}" for key in times]
        size = f"{args.get('epochs', '?')}, {args.get('limit') or 'all'}"
        places = dict.fromkeys(str(fact.get(key)) for fact in facts for key in ("training_hardware", "hardware"))
        best = ", ".join(str(fact.get("epoch", "?")) for fact in facts)
        made = [f"`{command} {Path(name).name}`", ", ".join(map(str, seeds)), args.get("arch", "?"), size, best]
        lines.append([*made, *minutes, "; ".join(places)])
    return as_table(heads, lines)


DRAW = {"dots": draw_dots, "lines": draw_lines, "grid": draw_grid, "curves": draw_curves, "gradients": draw_gradients}


def fill_in(text: str, found: Evaluations, out: Path) -> str:
    """report.md with its figures; pictures are drawn beside `out`."""

    def block(match: re.Match) -> str:
        kind, first, *lines = match[1], *match[2].strip().splitlines()
        rows = [[part.strip() for part in line.split("|")] for line in lines]
        name, _, about = first.partition(" ")
        try:
            if not rows or not all(2 <= len(row) <= 3 for row in rows):
                raise ValueError("its rows are no LABEL | NAME | FIGURES")
            if kind in ("table", "compare"):
                return {"table": draw_table, "compare": draw_comparisons}[kind](first, rows, found)
            if not name.endswith(".png"):
                raise ValueError(f"{name!r} is no FILE.png")
            (out.parent / name).parent.mkdir(parents=True, exist_ok=True)
            DRAW[kind](out.parent / name, about, rows, found)
        except (ValueError, IndexError, OSError, common.UserError) as error:
            raise common.UserError(f"report.md: {kind} {first}: {error}") from None
        return f"![{about}]({name})"

    def figure(match: re.Match) -> str:
        name, relation, other, attack = *match.groups()[:3], " ".join(match[4].split())
        try:
            if not other:
                return one_figure(found, name, attack)
            if result := compare(found, name, other, attack):
                return in_words(result) if relation == "vs" else in_points(result)
            raise ValueError("no seed of both has verdicts")
        except ValueError as error:
            raise common.UserError(f"report.md: {match[0]}: {error}") from None

    def runs(match: re.Match) -> str:
        return runs_table(found, match[1], " ".join(match[2].split()))

    kinds = "|".join(("table", "compare", *DRAW))
    text = re.sub(rf"^```({kinds}) (.*?)^```$", block, text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"\{(\S+)(?:\s+(vs|-)\s+(\S+))?\s+on\s+([^}]+)\}", figure, text)
    return re.sub(r"\{runs of (\S+)\s+by\s+([^}]+)\}", runs, text)


def write_report(folders: list[Path], out: Path) -> None:
    """The texts of these folders, filled in and joined, into `out`."""
    found, texts = read_evaluations(folders), [folder / "report.md" for folder in folders]
    if missing := [str(path) for path in texts if not path.is_file()]:
        raise common.UserError(f"--report: there is no {', '.join(missing)}")
    text = "\n".join(fill_in(path.read_text(), found, out) for path in texts)
    common.write_atomically(out, lambda file: file.write(text), "w")
    print(f"written to {out}")


# ------------------------------------------------------------------------------------------------------------- main


def analyses(text: str) -> list[str]:
    """An argparse type: names of ANALYSES, separated by commas."""
    if unknown := set(text.split(",")) - set(ANALYSES):
        raise argparse.ArgumentTypeError(f"unknown {', '.join(sorted(unknown))}; choose from {', '.join(ANALYSES)}")
    return text.split(",")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = common.Parser(__doc__)
    flag, number = parser.add_argument, common.number
    flag("checkpoints", nargs="*", metavar="CHECKPOINT_OR_RUN_DIR")
    flag(
        "--model", action="append", default=[], metavar="FILE.py:FUNCTION", help="a function that returns an nn.Module"
    )
    text = f"names, or {', '.join(PRESETS)}, paper, separated by commas; pgd-40@0.01: a step size (default: quick)"
    flag("--attacks", default="quick", help=text)
    text = "models to craft FGSM, MIM-20 and PGD-20 on as well; those attacked need not be among them"
    flag("--source", nargs="+", default=[], metavar="CHECKPOINT", help=text)
    flag("--dataset", metavar="NAME_OR_NPZ", help="(default: what the checkpoint was trained on)")
    flag("--data-dir", help="(default: as in training)")
    on_off = argparse.BooleanOptionalAction
    flag("--audit", action=on_off, help="check whether the figures can be believed (default: with paper and all)")
    text = "accuracy on CIFAR-10-C or ImageNet-C in DIR as published; without DIR on our approximation"
    flag("--corruptions", nargs="?", const="", metavar="DIR", help=text)
    flag("--geodesic", action="store_true", help="rejection by the angle, for a D-SphereNet checkpoint")
    flag("--analyze", type=analyses, metavar="NAMES", help=f"figures, separated by commas: {', '.join(ANALYSES)}")
    flag("--n", type=number(int, 1), help="test images, a seeded choice (default: all)")
    flag("--norm", choices=NORMS, default="linf", help="of the ball (default: linf)")
    flag("--eps", type=number(float, 0), help="(default: the papers': mnist 0.3, cifar 0.031; L2: mnist 3, cifar 1)")
    flag("--step-size", type=number(float, 0), help="(default: the papers' where it crosses the ball in N steps)")
    flag("--restarts", type=number(int, 1), default=1, help="of the attacks that start at random (default: 1)")
    flag("--batch-size", type=number(int, 1), default=250, help="(default: 250)")
    flag("--seed", type=number(int, 0, 2**63), default=0, help="(default: 0)")
    flag(
        "--amp",
        action="store_true",
        help="craft in bfloat16, judge in float32: faster, but saturated activations then lose their gradient",
    )
    flag("--device", type=common.device_flag, default=common.default_device(), help="(default: %(default)s)")
    text = "fill in DIR/report.md from the evaluations in DIR, folders NAME-sSEED, and write it to --out (RESULTS.md)"
    flag("--report", nargs="+", metavar="DIR", help=text)
    flag(
        "--out",
        help="(default: beside the checkpoint eval, or eval-NAME if it is no best.pt; of several models ./eval)",
    )
    group = parser.add_argument_group("for a bare state dict")
    flag = group.add_argument
    flag("--arch", help="such as wrn-34-10")
    flag("--head", default="linear", choices=("linear", "he", "mhe"), help="(default: linear)")
    flag("--scale", type=number(float, 0), help="s of the training loss (default: 15, for linear 1)")
    flag("--margin", type=number(float, 0), help="m of the training loss (default: he 0.2, mhe 0.1, linear 0)")
    flag("--normalize", action=on_off, help="CIFAR-10 mean and std in the network (default: on for he and mhe)")
    args = parser.parse_args(argv)
    if args.audit is None:
        args.audit = bool({"paper", "all"} & set(args.attacks.split(",")))
    return args


def output_folder(args: argparse.Namespace, count: int) -> Path:
    if args.out:
        return Path(args.out)
    if count > 1 or not args.checkpoints:
        return Path("eval")
    file = common.checkpoint_file(args.checkpoints[0])
    return file.parent / ("eval" if file.name == "best.pt" else f"eval-{file.stem}")


def evaluation_settings(args: argparse.Namespace, data: common.Data, argv: list[str]) -> dict:
    """What evaluate() asks for, and what eval.json says of how its figures came about."""
    papers_eps = THREAT[data.known][0 if args.norm == "linf" else 2]
    return {
        "dataset": data.name,
        "known": data.known,
        "norm": args.norm,
        "eps": papers_eps if args.eps is None else args.eps,
        "step_size": args.step_size,
        "restarts": args.restarts,
        "batch_size": args.batch_size,
        "seed": args.seed,
        "amp": args.amp,
        "device": args.device,
        "torch": str(torch.__version__),
        "command": shlex.join(["python", "eval_all.py", *argv]),
    }


def unfit_attacks(found: Found, image: Tensor) -> dict[Callable, str]:
    """The attacks' functions that one of the models lacks something for, and what; `image` is (1, C, H, W)."""
    unfit = {}
    for name, model, _ in found:
        if not has_features(model, image):
            unfit[feature] = f"the attack feature needs a model with features(x) of (B, d), and {name} has none"
        if not isinstance(getattr(model, "fc", None), nn.Linear):
            unfit[pgd_fn] = f"an attack with FN needs a model with a linear last layer fc, and {name} has none"
    return unfit


def exact_float32() -> None:
    """No TF32 on CUDA in a verdict, neither by default nor where a user's model switched it on."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def refuse_what_cannot_be(
    args: argparse.Namespace,
    attacks: dict[str, Attack],
    unfit: dict[Callable, str],
    found: Found,
    image: Tensor,
    settings: dict,
) -> None:
    """Raises UserError before the work rather than after it; `image` is (1, C, H, W)."""
    for name, attack in attacks.items():
        budget(name, attack, settings)
        if function_of(attack) in unfit:
            raise common.UserError(unfit[function_of(attack)])
    if args.corruptions:
        corruption_files(Path(args.corruptions))
    if args.geodesic and args.norm != "linf":
        raise common.UserError("--geodesic: its adaptive attack knows the Linf ball alone")
    for name, model, meta in found:
        if args.geodesic and "geodesic" not in meta:
            raise common.UserError(f"--geodesic: {name} holds no angles; train_dsphere.py writes them")
        wanted = [f"--analyze {analysis}" for analysis in ("features", "angles") if analysis in (args.analyze or ())]
        if wanted and not has_features(model, image):
            raise common.UserError(f"{wanted[0]} needs a model with features(x) of (B, d), and {name} has none")
        if "--analyze angles" in wanted and class_weights(model) is None:
            raise common.UserError(f"--analyze angles needs a model with fc.weight, and {name} has none")
        if "gradients" in (args.analyze or ()) and not any(p.requires_grad for p in model.parameters()):
            raise common.UserError(f"--analyze gradients: all weights of {name} are frozen")


def look_closer(
    args: argparse.Namespace, model: nn.Module, meta: dict, x: Tensor, y: Tensor, settings: dict, folder: Path
) -> dict:
    """What was asked for besides attacks: corruptions, geodesic inference, analyses."""
    found = {}
    if args.corruptions is not None:
        with blamed_on("--corruptions"):
            found["corruptions"] = corruptions(args.corruptions, model, x, y, settings | {"n": args.n}, folder)
    if args.geodesic:
        found["geodesic"] = geodesic(model, meta, x, y, settings)
        print_geodesic(found["geodesic"])
    if args.analyze:
        with blamed_on("--analyze"):
            found["analyses"] = analyze(args.analyze, model, x, y, settings, folder)
    return found


def conclude(results: list[dict], out: Path) -> None:
    """The comparison of several models, and the transfer between them."""
    if len(results) > 1:
        write_results(out, results)
        print_comparison(results)
    if transfer_matrices(results):
        print_transfer(results)
        plot_transfer(results, out / "transfer.png")
    print(f"\nwritten to {out}")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    if args.report:
        return write_report([Path(folder) for folder in args.report], Path(args.out or "RESULTS.md"))
    ranks = meet_ranks()
    first = not ranks.rank
    if not first:
        sys.stdout = open(os.devnull, "w")
        ranks.from_first(None)  # it has read the data, which may have been a download
    found, sources = targets_and_sources(args)
    exact_float32()
    dataset, folder = find_test_set(args, found + sources)
    data = common.load_data(dataset, folder)
    image = common.to_float(data.x_test[:1]).to(args.device)
    methods = tuple(meta.get("method", "") for _, _, meta in found)
    unfit = unfit_attacks(found, image)
    attacks = named_attacks(args.attacks, methods, data.known, unfit, args.norm) | transfer_attacks(sources)
    for name, model, _ in found + sources:
        check_fit(name, model, data, args.device)
    settings = evaluation_settings(args, data, argv)
    refuse_what_cannot_be(args, attacks, unfit, found, image, settings)
    # Files may be ordered class by class, so a subset is drawn at random, the same for every model and every seed.
    order = np.random.default_rng(common.SPLIT_SEED).permutation(len(data.y_test))
    index = torch.from_numpy(np.sort(order[: args.n]))
    x, y = data.x_test[index], data.y_test[index].to(args.device)
    out, results = output_folder(args, len(found)), []
    folders = [out / name.replace(":", "-") if len(found) > 1 else out for name, _, _ in found]
    for folder in folders:  # before the work, so that no result is lost for want of a place
        folder.mkdir(parents=True, exist_ok=True)
    if first:
        ranks.from_first(None)
    for (name, model, meta), folder in zip(found, folders, strict=True):
        if first:
            print(f"{name}: {len(attacks)} attacks on {len(y)} images", file=sys.stderr)
        journal = Journal(folder / "unfinished.pt", identity([(name, model, meta), *sources], x, y, settings), ranks)
        outcome = evaluate(model, attacks, x, y, settings, journal)
        made_on = {"weights": digest([model]).hexdigest()[:16], "hardware": common.hardware(args.device)}
        results.append(made_on | report(name, meta, outcome, settings))
        if first:
            write_verdicts(folder, index, y, outcome)
            write_results(folder, results[-1:])  # before what may yet fail
        if args.audit:
            with blamed_on("the audit failed"):
                results[-1]["audit"] = audit(model, x, y, settings, ranks)
        if first:
            results[-1] |= look_closer(args, model, meta, x, y, settings, folder)
            write_results(folder, results[-1:])
            journal.close()
            print_report(results[-1])
            print_audit(results[-1].get("audit", []))
    if first:
        conclude(results, out)


if __name__ == "__main__":
    common.cli(main)
