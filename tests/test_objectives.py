"""What each script minimizes in its first step and what its attack maximizes: the paper's formula in float64."""

import copy
from types import SimpleNamespace

import common
import models

import pytest
import torch
import torch.nn.functional as F


class Stop(Exception):
    pass


@pytest.fixture
def first_step(cli, monkeypatch, tmp_path):
    """first_step("train_pgd_he", "--head", "mhe") -> the batch x, y; `given`, the images of each forward pass in train
    mode; `crafting`, the number of passes in eval mode, all of them before; the loss and its gradient; the network, in
    float64; the settings of the attack, None where there was none."""

    def call(script, *flags):
        seen = SimpleNamespace(given=[], crafting=0, attack=None)
        batches, forward, pgd = common.Run.batches, models.Classifier.forward, common.pgd

        def record_batch(run):
            for seen.x, seen.y in batches(run):
                yield seen.x, seen.y

        def record_pass(model, x, with_features=False):
            if model.training:
                seen.given.append(x.detach().double())
            else:
                assert not seen.given
                seen.crafting += 1
            return forward(model, x, with_features)

        def record_attack(model, x, y, **settings):
            seen.attack = settings
            return pgd(model, x, y, **settings)

        def stop(run, loss, logits, y):
            seen.loss, seen.grad = loss.item(), gradient(loss, run.model)
            seen.net = copy.deepcopy(run.model).double()
            raise Stop

        with monkeypatch.context() as patch:
            patch.setattr(common.Run, "batches", record_batch)
            patch.setattr(common.Run, "step", stop)
            patch.setattr(models.Classifier, "forward", record_pass)
            patch.setattr(common, "pgd", record_attack)
            few = [*"--limit 132 --batch-size 32 --epochs 3 --eps-warmup 3 --out".split(), tmp_path / "run"]
            with pytest.raises(Stop):
                cli(script, *few, "--device", "cpu", "--no-amp", *flags)
        return seen

    return call


def gradient(loss, net):
    """Of all parameters, in one vector."""
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(net.parameters()))])


def ce(scores, y, s=1.0, m=0.0):
    """CE(s * (scores - m * onehot(y)), y)."""
    scores = s * (scores - m * F.one_hot(y, scores.shape[1]))
    return (scores.logsumexp(1) - scores[range(len(y)), y]).mean()


def kl(scores, others):
    p = scores.softmax(1)
    return (p * (p / others.softmax(1)).log()).sum(1).mean()


def linear(net, x):
    return net.features(x) @ net.fc.weight.T + net.fc.bias


def cos(net, x):
    z, weight = net.features(x), net.fc.weight
    return (z / z.norm(dim=1, keepdim=True)) @ (weight / weight.norm(dim=1, keepdim=True)).T


def minus_theta(net, x):
    return -cos(net, x).acos()


def adversarial(f, s, m):
    return lambda net, y, *given: ce(f(net, given[-1]), y, s, m)


def trades(f, s, m):
    return lambda net, y, x, x_adv: ce(f(net, x), y, s, m) + 6 * kl(s * f(net, x), s * f(net, x_adv))


def alp(f, s, m, distance=lambda gap: gap.square().sum(1).sqrt().mean()):
    def objective(net, y, x, x_adv):
        pairing = distance(f(net, x) - f(net, x_adv))
        return 0.5 * ce(f(net, x), y, s, m) + 0.5 * ce(f(net, x_adv), y, s, m) + 0.5 * pairing

    return objective


def mart(net, y, x, x_adv):
    p, q = linear(net, x).softmax(1), linear(net, x_adv).softmax(1)
    every = range(len(y))
    runner_up = q.scatter(1, y[:, None], 0).amax(1)
    each = -q[every, y].log() - (1 - runner_up).log() + 6 * (p * (p / q).log()).sum(1) * (1 - p[every, y])
    return each.mean()


def angular(net, y, x_adv):
    weight = F.normalize(net.fc.weight)
    nearest = (weight @ weight.T - 2 * torch.eye(len(weight))).amax(1)
    theta = cos(net, x_adv)[range(len(y)), y].acos()
    return ce(cos(net, x_adv), y, 15) + 0.55 * theta.square().mean() + 0.48 * nearest.mean()


def weightpen(norm):
    def objective(net, y, x):
        sigma = torch.full((10, 10), 0.1**2 / (1 - 10)).double().fill_diagonal_(0.1**2)
        return ce(linear(net, x), y) + 100 * norm(net.fc.weight @ net.fc.weight.T - sigma)

    return objective


def abcl(net, y, x):
    weight = F.normalize(net.fc.weight)
    nearest = (weight @ weight.T - 2 * torch.eye(len(weight))).amax(1)
    to_own = (F.normalize(net.features(x)) * weight[y].detach()).sum(1)  # L_I moves the features alone
    inter = (nearest + 1 / 9).clamp(min=0).square().mean()
    return ce(cos(net, x), y, 5, 0.2) + 512 * (1 - to_own).mean() + 64 * inter


def ht_sce(net, y, x):
    """The features of the network are normalized before the linear layer to z."""
    high = F.normalize(net.embed(net.normalize(x)))
    z, linear = F.normalize(high @ net.project[1].weight.T + net.project[1].bias), F.normalize(net.fc.weight)
    return ce(z @ linear.T, y, 5, 0.2)


def mmc(net, y, x):
    return (net.features(x) - net.fc.centers[y]).square().sum(1).mean() / 2


def overlap(net):
    """The orthogonality of D-SphereNet, over all layers."""
    kernels = [F.normalize(p.flatten(1)) for p in net.parameters() if p.ndim > 1]
    return sum((kernel @ kernel.T - torch.eye(len(kernel))).square().sum() for kernel in kernels)


def sphere(objective):
    """The mean over the images given, clean and adversarial, and the orthogonality."""
    return lambda net, y, *given: sum(objective(net, y, x) for x in given) / len(given) + 1e-4 * overlap(net)


def w_softmax(net, y, x):
    return ce(net.features(x).norm(dim=1, keepdim=True) * cos(net, x), y)


def weight_multiplier(net, y, x):
    return ce(net.fc.multiplier.abs() * cos(net, x), y) + 0.01 * net.fc.multiplier.abs()


def annealing(net, y, x):
    lengths = net.features(x).norm(dim=1, keepdim=True)
    return (ce(cos(net, x), y) + 10 * ce(lengths * cos(net, x), y)) / 11


def on(f, s):
    """The loss of an attack, without the margin."""
    return lambda net, y, x, x_adv: ce(f(net, x_adv), y, s)


def on_kl(f, s):
    return lambda net, y, x, x_adv: kl(s * f(net, x), s * f(net, x_adv))


# The objective, and what the attack maximizes, if there is one.
OBJECTIVES = {
    "train_pgd_he --head linear": (adversarial(linear, 1, 0), on(linear, 1)),
    "train_pgd_he": (adversarial(cos, 15, 0.2), on(cos, 15)),
    "train_pgd_he --head mhe": (adversarial(minus_theta, 15, 0.1), on(minus_theta, 15)),
    "train_trades_he --head linear": (trades(linear, 1, 0), on_kl(linear, 1)),
    "train_trades_he": (trades(cos, 15, 0.2), on_kl(cos, 15)),
    "train_trades_he --head mhe": (trades(minus_theta, 15, 0.1), on_kl(minus_theta, 15)),
    "train_alp_he --head linear": (alp(linear, 1, 0), on(linear, 1)),
    "train_alp_he": (alp(cos, 15, 0.2), on(cos, 15)),
    "train_alp_he --pairing-norm mse": (alp(cos, 15, 0.2, lambda gap: gap.square().mean()), on(cos, 15)),
    "train_fast_he": (adversarial(cos, 15, 0.2), None),
    "train_free_he": (adversarial(cos, 15, 0.2), None),
    "train_angular_at": (angular, on(cos, 15)),
    "train_mart": (mart, on(linear, 1)),
    "train_weightpen": (weightpen(lambda gap: gap.square().sum().sqrt()), None),
    "train_weightpen --penalty-norm spectral": (weightpen(lambda gap: torch.linalg.svdvals(gap)[0]), None),
    "train_abcl": (abcl, None),
    "train_abcl --adversarial": (abcl, on(cos, 5)),
    "train_abcl --base ht-sce --k1 0 --k2 0": (ht_sce, None),
    "train_mmc": (mmc, None),
    "train_mmc --adversarial": (mmc, lambda net, y, x, x_adv: mmc(net, y, x_adv)),
    "train_dsphere": (sphere(w_softmax), None),
    "train_dsphere --loss wm": (sphere(weight_multiplier), None),
    "train_dsphere --loss annealing": (sphere(annealing), None),
    "train_dsphere --train fgsm": (sphere(w_softmax), on(torch.nn.Module.__call__, 1)),
    "train_dsphere --train pgd --loss wm": (sphere(weight_multiplier), on(torch.nn.Module.__call__, 1)),
    "train_dsphere --train pgd --mix 0": (sphere(w_softmax), on(torch.nn.Module.__call__, 1)),
    "train_mmc --feature-dim 0": (mmc, None),
}


@pytest.mark.parametrize("command", OBJECTIVES)
def test_the_first_step_is_the_papers_objective_on_the_papers_attack(first_step, command):
    """In the first of three steps of warm-up: eps is 0.1 / 3, the step size 0.025 / 3. Examples are crafted in eval
    mode and trained on in train mode; FastAT's one step is in train mode too, as its authors do."""
    script, *flags = command.split()
    seen, (objective, attacked) = first_step(script, *flags), OBJECTIVES[command]
    x, (*clean, last) = seen.x.double(), seen.given
    value = objective(seen.net, seen.y, *seen.given)
    assert seen.loss == pytest.approx(value.item(), rel=1e-4)
    grad = gradient(value, seen.net)
    assert (seen.grad - grad).norm() < 1e-3 * grad.norm()
    if attacked is None:
        assert seen.attack is None and seen.crafting == 0
    else:
        assert all(torch.equal(images, x) for images in clean)
        loss = seen.attack["loss"](seen.net(last), seen.y)
        assert loss.item() == pytest.approx(attacked(seen.net, seen.y, x, last).item(), rel=1e-3)
        fgsm, start = "fgsm" in command, seen.attack.get("start")  # by default uniform in the ball
        step_size, steps = (0.1 / 3, 1) if fgsm else (0.025 / 3, 10)
        assert (seen.attack["eps"], seen.attack["step_size"]) == pytest.approx((0.1 / 3, step_size))
        assert seen.attack["steps"] == steps and seen.crafting == steps + (script == "train_trades_he")
        if script == "train_trades_he":  # the natural logits too are of eval mode
            assert 0 < (start - seen.x).abs().max() < 0.01
        else:
            assert torch.equal(start, seen.x) if fgsm else start is None
    if attacked or script == "train_fast_he":
        assert 0 < (last - x).abs().max() <= 0.1 / 3 + 1e-6 and 0 <= last.min() and last.max() <= 1
    else:  # FreeAT begins with delta = 0
        assert torch.equal(last, x)
