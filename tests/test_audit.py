"""The audit passes an adversarially trained model and fails each model that only looks robust."""

from pathlib import Path

import common
import eval_all

import pytest
import torch
from torch import nn

GOLDEN = Path(__file__).parent / "golden"


def digits(name=None, n=200):
    """A network of tests/golden, adversarially trained, or else one trained here without attacks; test images."""
    data = common.load_data("digits")
    if name:
        model = common.load_checkpoint(GOLDEN / f"{name}.pt")[0]
    else:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        optimizer, x = torch.optim.Adam(model.parameters(), 1e-2), common.to_float(data.x_train)
        for _ in range(150):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), data.y_train).backward()
            optimizer.step()
    return model.eval(), common.to_float(data.x_test[:n]), data.y_test[:n]


@pytest.fixture(scope="module")
def natural():
    return digits()


def failed(model, x, y, **settings):
    """{check: row} of the checks that fail."""
    audit = eval_all.evaluate(model, x, y, "clean", audit=True, **{"dataset": "digits"} | settings)["audit"]
    assert len(audit) >= 10
    return {row["check"]: row for row in audit if not row["passed"]}


class Masked(nn.Module):
    """after(model(before(x)))."""

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


def only_near_black(x):
    """Gradients as they are where half of the pixels are nearly black, as in the digits, and none elsewhere."""
    return Gradient.apply(x, (x.flatten(1).median(1).values < 0.06).float().view(-1, 1, 1, 1))


FLIPPED, ZERO = {"before": lambda x: Gradient.apply(x, -1.0)}, {"before": lambda x: Gradient.apply(x, 0.0)}


@pytest.mark.parametrize("name", ["he", "linear"])
def test_an_adversarially_trained_model_passes(name):
    assert failed(*digits(name, 50)) == {}


@pytest.mark.parametrize("mask, eps, check, in_question", [
    (FLIPPED, 0.2, "FGSM is not weaker than noise", "gradients"),
    (FLIPPED, 0.1, "nothing is robust without a bound", "gradients"),
    (ZERO, 0.1, "gradients are not weaker than queries", "gradients"),
    (ZERO, 0.1, "gradients reach the images", "gradients"),
    ({"before": only_near_black}, 0.1, "accuracy does not rise with eps", "gradients"),
    ({"before": lambda x: x + 0.1 * torch.randn_like(x)}, 0.1, "same image, same logits", "all figures"),
    ({"after": lambda logits: 1000 * logits}, 0.1, "gradients reach the images", "gradients"),
    ({"after": lambda logits: 1e-4 * logits}, 0.1, "no other scale of the logits is stronger", "cross-entropy"),
    ({"after": lambda logits: 30 * logits}, 0.1, "no other scale of the logits is stronger", "cross-entropy"),
    ({"after": lambda logits: 30 * logits}, 0.1, "PGD is near apgd-t", "cross-entropy"),
])  # fmt: skip
def test_a_masked_model_fails_the_check_that_tells(natural, mask, eps, check, in_question):
    model, x, y = natural
    found = failed(Masked(model, **mask).eval(), x, y, eps=eps)
    assert check in found and in_question in found[check]["questions"], found


@pytest.mark.parametrize("ball", [{}, {"norm": "l2", "eps": 0.25}], ids=["linf", "l2"])
def test_without_a_mask_the_same_model_passes_and_if_it_is_never_correct_fails(natural, ball):
    model, x, y = natural
    assert failed(model, x, y, **ball) == {} and failed(model, x, (model(x).argmax(1) + 1) % 10, **ball)


def test_more_steps_that_are_weaker_fail(natural, monkeypatch):
    def stuck(name, attack, model, x, y, correct, *others, run=eval_all.run_attack):
        found = run(name, attack, model, x, y, correct, *others)
        return found | {"correct": correct} if name == "audit: PGD-100" else found

    monkeypatch.setattr(eval_all, "run_attack", stuck)
    assert "gradients" in failed(*natural)["more steps are not weaker"]["questions"]


def test_mcnemar_p_is_the_exact_one_sided_test():
    first = torch.tensor([True] * 9 + [False] + [True] * 20)
    second = torch.tensor([False] * 9 + [True] + [True] * 20)
    assert eval_all.mcnemar_p(first, second) == pytest.approx(11 / 1024)  # nine or ten heads of ten
    assert eval_all.mcnemar_p(second, first) == pytest.approx(1023 / 1024)
