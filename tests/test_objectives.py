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
    mode; the loss and its gradient; the network, in float64; the settings of the attack, None where there was none."""

    def call(script, *flags):
        seen = SimpleNamespace(given=[], attack=None)
        batches, forward, pgd = common.Run.batches, models.Classifier.forward, common.pgd

        def record_batch(run):
            for seen.x, seen.y in batches(run):
                yield seen.x, seen.y

        def record_pass(model, x, with_features=False):
            if model.training:
                seen.given.append(x.detach().double())
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
            few = ["--limit", "132", "--batch-size", "32", "--epochs", "3", "--out", tmp_path / "run"]
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


def trades(f, s, m):
    return lambda net, y, x, x_adv: ce(f(net, x), y, s, m) + 6 * kl(s * f(net, x), s * f(net, x_adv))


def alp(f, s, m):
    def objective(net, y, x, x_adv):
        clean, adversarial = f(net, x), f(net, x_adv)
        pairing = (clean - adversarial).square().mean()
        return 0.5 * ce(clean, y, s, m) + 0.5 * ce(adversarial, y, s, m) + 0.5 * pairing

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
    intra = (1 - to_own).square().mean()
    inter = (nearest + 1 / 9).clamp(min=0).square().mean()
    return ce(cos(net, x), y, 5, 0.2) + 512 * intra + 64 * inter


def mmc(net, y, x):
    return (net.features(x) - net.fc.centers[y]).square().sum(1).mean() / 2


def overlap(net):
    """The orthogonality of D-SphereNet, over all layers."""
    kernels = [F.normalize(p.flatten(1)) for p in net.parameters() if p.ndim > 1]
    return sum((kernel @ kernel.T - torch.eye(len(kernel))).square().sum() for kernel in kernels)


def w_softmax(net, y, x):
    return ce(net.features(x).norm(dim=1, keepdim=True) * cos(net, x), y) + 1e-4 * overlap(net)


def weight_multiplier(net, y, x):
    return ce(net.fc.multiplier.abs() * cos(net, x), y) + 0.01 * net.fc.multiplier.abs() + 1e-4 * overlap(net)


def annealing(net, y, x):
    lengths = net.features(x).norm(dim=1, keepdim=True)
    return (ce(cos(net, x), y) + 10 * ce(lengths * cos(net, x), y)) / 11 + 1e-4 * overlap(net)


OBJECTIVES = {
    "train_pgd_he --head linear": lambda net, y, x_adv: ce(linear(net, x_adv), y),
    "train_pgd_he": lambda net, y, x_adv: ce(cos(net, x_adv), y, 15, 0.2),
    "train_pgd_he --head mhe": lambda net, y, x_adv: ce(minus_theta(net, x_adv), y, 15, 0.1),
    "train_trades_he --head linear": trades(linear, 1, 0),
    "train_trades_he": trades(cos, 15, 0.2),
    "train_trades_he --head mhe": trades(minus_theta, 15, 0.1),
    "train_alp_he --head linear": alp(linear, 1, 0),
    "train_alp_he": alp(cos, 15, 0.2),
    "train_fast_he": lambda net, y, start, x_adv: ce(cos(net, x_adv), y, 15, 0.2),
    "train_free_he": lambda net, y, x_adv: ce(cos(net, x_adv), y, 15, 0.2),
    "train_angular_at": angular,
    "train_mart": mart,
    "train_weightpen": weightpen(lambda gap: gap.square().sum().sqrt()),
    "train_weightpen --penalty-norm spectral": weightpen(lambda gap: torch.linalg.svdvals(gap)[0]),
    "train_abcl": abcl,
    "train_mmc": mmc,
    "train_mmc --adversarial": mmc,
    "train_dsphere": w_softmax,
    "train_dsphere --loss wm": weight_multiplier,
    "train_dsphere --loss annealing": annealing,
    "train_dsphere --train fgsm": w_softmax,
    "train_dsphere --train pgd": w_softmax,
}
NATURAL = (
    "train_weightpen",
    "train_weightpen --penalty-norm spectral",
    "train_abcl",
    "train_mmc",
    "train_dsphere",
    "train_dsphere --loss wm",
)
NATURAL += ("train_dsphere --loss annealing",)


@pytest.mark.parametrize("command", OBJECTIVES)
def test_the_first_step_is_the_papers_objective(first_step, command):
    script, *flags = command.split()
    seen = first_step(script, *flags)
    *clean, last = seen.given
    objective = OBJECTIVES[command](seen.net, seen.y, *seen.given)
    assert seen.loss == pytest.approx(objective.item(), rel=1e-4)
    grad = gradient(objective, seen.net)
    assert (seen.grad - grad).norm() < 1e-3 * grad.norm()
    assert script == "train_fast_he" or all(torch.equal(x, seen.x.double()) for x in clean)
    farthest = (last - seen.x).abs().max().item()
    if command in NATURAL or script == "train_free_he":  # FreeAT begins with delta = 0
        assert farthest == 0 and seen.attack is None
    else:  # a step an epoch, three epochs of warm-up
        assert 0 < farthest <= 0.1 / 3 + 1e-6 and 0 <= last.min() and last.max() <= 1


ATTACKS = {
    "train_pgd_he --head linear": lambda net, y, x, x_adv: ce(linear(net, x_adv), y),
    "train_pgd_he": lambda net, y, x, x_adv: ce(cos(net, x_adv), y, 15),
    "train_pgd_he --head mhe": lambda net, y, x, x_adv: ce(minus_theta(net, x_adv), y, 15),
    "train_trades_he": lambda net, y, x, x_adv: kl(15 * cos(net, x), 15 * cos(net, x_adv)),
    "train_alp_he": lambda net, y, x, x_adv: ce(cos(net, x_adv), y, 15),
    "train_angular_at": lambda net, y, x, x_adv: ce(cos(net, x_adv), y, 15),
    "train_mart": lambda net, y, x, x_adv: ce(linear(net, x_adv), y),
    "train_abcl --adversarial": lambda net, y, x, x_adv: ce(cos(net, x_adv), y, 5),
    "train_mmc --adversarial": lambda net, y, x, x_adv: mmc(net, y, x_adv),
    "train_dsphere --train pgd": lambda net, y, x, x_adv: ce(net(x_adv), y),
    "train_dsphere --train fgsm": lambda net, y, x, x_adv: ce(net(x_adv), y),
}


@pytest.mark.parametrize("command", ATTACKS)
def test_the_attack_is_on_the_papers_loss_without_its_margin(first_step, command):
    """In the first of three steps of warm-up: eps is 0.1 / 3, the step size 0.025 / 3."""
    script, *flags = command.split()
    seen = first_step(script, *flags)
    x, x_adv = seen.x.double(), seen.given[-1]
    loss = seen.attack["loss"](seen.net(x_adv), seen.y)
    assert loss.item() == pytest.approx(ATTACKS[command](seen.net, seen.y, x, x_adv).item(), rel=1e-4)
    fgsm = "fgsm" in command
    assert seen.attack["eps"] == pytest.approx(0.1 / 3)
    assert seen.attack["step_size"] == pytest.approx(0.1 / 3 if fgsm else 0.025 / 3)
    assert seen.attack["steps"] == (1 if fgsm else 10)
    start = seen.attack.get("start")  # by default uniform in the ball
    if script == "train_trades_he":
        assert 0 < (start - seen.x).abs().max() < 0.01
    else:
        assert torch.equal(start, seen.x) if fgsm else start is None
