"""The audit passes an adversarially trained model and fails each fake that only looks robust."""

import pytest
import torch

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


class Fake(torch.nn.Module):
    """The model behind something that hides its gradient."""

    def __init__(self, model, before=lambda x: x, after=lambda logits: logits):
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, x):
        return self.after(self.model(self.before(x)))


def failed(model, x, y):
    return {check["check"] for check in eval_all.audit(model, x, y, SETTINGS) if not check["passed"]}


def test_an_adversarially_trained_model_passes(trained, capsys):
    models, x, y = trained
    checks = eval_all.audit(models["pgd"], x, y, SETTINGS)
    assert [check["check"] for check in checks if not check["passed"]] == [], checks
    eval_all.print_audit(checks)
    assert "audit: all checks pass" in capsys.readouterr().out and len(checks) == 10


@pytest.mark.parametrize("name, fake, telling", [
    ("logits times 1e4", dict(after=lambda logits: 1e4 * logits), "gradients reach the images"),
    ("logits times 1e-4", dict(after=lambda logits: 1e-4 * logits), "cross-entropy tells the classes apart"),
    ("quantized", dict(before=lambda x: (8 * x).round() / 8), "gradients reach the images"),
    ("noisy", dict(before=lambda x: x + 0.1 * torch.randn_like(x)), "the same image gives the same logits"),
])  # fmt: skip
def test_a_planted_fake_fails(trained, name, fake, telling):
    models, x, y = trained
    assert telling in failed(Fake(models["pgd"], **fake).eval(), x, y)


def test_natural_weight_penalization_fails(trained):
    models, x, y = trained
    assert {"gradients reach the images", "nothing stands without a bound"} <= failed(models["weightpen"], x, y)


def test_chance_is_mcnemars_exact_test():
    first = torch.tensor([True] * 9 + [False] + [True] * 20)
    second = torch.tensor([False] * 9 + [True] + [True] * 20)
    assert eval_all.chance(first, second) == pytest.approx(11 / 1024)  # nine or ten heads of ten
    assert eval_all.chance(second, first) == pytest.approx(1023 / 1024)
    assert eval_all.chance(first, first) == 1.0
