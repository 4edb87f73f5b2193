"""The audit passes an adversarially trained model and fails each fake that only looks robust."""

import itertools

import pytest
import torch
from torch import nn

import common
import eval_all
import train_pgd_he
import train_weightpen

SETTINGS = dict(known="digits", norm="linf", eps=0.1, step_size=None, restarts=1, batch_size=200, seed=0, amp=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One PGD-AT and one WeightPen model of the digits, and 100 test images."""
    folder = tmp_path_factory.mktemp("audit")
    train_pgd_he.main(["--head", "linear", "--epochs", "12", "--steps", "5", "--out", str(folder / "pgd")])
    train_weightpen.main(["--lr", "5e-3", "--out", str(folder / "weightpen")])
    data = common.load_data("digits")
    models = {name: common.load_checkpoint(folder / name)[0] for name in ("pgd", "weightpen")}
    return models, common.to_float(data.x_test[:100]), data.y_test[:100]


@pytest.fixture(scope="module")
def natural():
    """A small network that learned the digits without attacks, and 100 test images."""
    torch.manual_seed(0)
    data = common.load_data("digits")
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer, x = torch.optim.Adam(model.parameters(), 1e-2), common.to_float(data.x_train)
    for _ in range(150):
        loss = nn.functional.cross_entropy(model(x), data.y_train)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), common.to_float(data.x_test[:100]), data.y_test[:100]


class Fake(nn.Module):
    """The model behind something that hides its gradient."""

    def __init__(self, model, before=lambda x: x, after=lambda logits: logits):
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, x):
        return self.after(self.model(self.before(x)))


class Gradient(torch.autograd.Function):
    """x, its gradient times `factor`, a number or (B, 1, 1, 1)."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.factor * grad, None


def flipped(x):
    return Gradient.apply(x, -1.0)


def only_near_black(x):
    """Gradients as they are where half of the pixels are nearly black, as in the digits, and none elsewhere."""
    return Gradient.apply(x, (x.flatten(1).median(1).values < 0.06).float().view(-1, 1, 1, 1))


def tired():
    """A function that gives no gradient once it has been called 25 times."""
    calls = itertools.count()
    return lambda x: Gradient.apply(x, float(next(calls) < 25))


def failed(model, x, y, **settings):
    checks = eval_all.audit(model, x, y, SETTINGS | settings)
    return {check["check"]: check["figures"] for check in checks if not check["passed"]}


def test_an_adversarially_trained_model_passes(trained, capsys):
    models, x, y = trained
    checks = eval_all.audit(models["pgd"], x, y, SETTINGS)
    assert [check["check"] for check in checks if not check["passed"]] == [], checks
    eval_all.print_audit(checks)
    assert "audit: all checks pass" in capsys.readouterr().out and len(checks) == 10


@pytest.mark.parametrize("fake, eps, telling", [
    (lambda: dict(before=tired()), 0.1, {"more steps are not weaker"}),
    (lambda: dict(before=flipped), 0.6, {"FGSM is not weaker than noise"}),
    (lambda: dict(before=flipped), 0.1, {"gradients are not weaker than queries", "nothing stands without a bound"}),
    (lambda: dict(before=only_near_black), 0.1, {"accuracy falls with eps"}),
    (lambda: dict(before=lambda x: (8 * x).round() / 8), 0.1, {"gradients reach the images"}),
    (lambda: dict(after=lambda logits: 1e4 * logits), 0.1, {"gradients reach the images"}),
    (lambda: dict(after=lambda logits: 1e-4 * logits), 0.1, {"cross-entropy tells the classes apart"}),
    (lambda: dict(before=lambda x: x + 0.1 * torch.randn_like(x)), 0.1, {"the same image gives the same logits"}),
    (lambda: dict(after=lambda logits: 30 * logits), 0.1,
     {"no scale of the logits is a better one", "AutoAttack's APGD-T is near PGD"}),
])  # fmt: skip
def test_a_planted_fake_fails(natural, fake, eps, telling):
    model, x, y = natural
    assert not telling & failed(model, x, y, eps=eps).keys()
    found = failed(Fake(model, **fake()).eval(), x, y, eps=eps)
    assert telling <= found.keys(), found


def test_in_the_l2_ball_too_nothing_stands_without_a_bound(trained):
    """Which is half the diagonal of all images there are: within 0.5 many stand."""
    models, x, y = trained
    found = failed(models["pgd"], x, y, norm="l2", eps=0.25)
    assert not {"nothing stands without a bound", "accuracy falls with eps"} & found.keys(), found


def test_a_model_that_is_never_right_fails(natural):
    model, x, _ = natural
    found = failed(model, x, (model(x).argmax(1) + 1) % 10)
    assert list(found) == ["the model is right without an attack"]


def test_natural_weight_penalization_fails(trained):
    models, x, y = trained
    assert {"gradients reach the images", "nothing stands without a bound"} <= failed(models["weightpen"], x, y).keys()


def test_chance_is_mcnemars_exact_test():
    first = torch.tensor([True] * 9 + [False] + [True] * 20)
    second = torch.tensor([False] * 9 + [True] + [True] * 20)
    assert eval_all.chance(first, second) == pytest.approx(11 / 1024)  # nine or ten heads of ten
    assert eval_all.chance(second, first) == pytest.approx(1023 / 1024)
    assert eval_all.chance(first, first) == 1.0
    all_eight, none = torch.ones(8, dtype=torch.bool), torch.zeros(8, dtype=torch.bool)  # 1 / 256
    assert eval_all.stands_on_more(all_eight, none) and not eval_all.stands_on_more(all_eight, none, compared=4)
