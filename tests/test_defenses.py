"""Models that would give a wrong figure without a word, or that would stop an evaluation."""

import csv
import json
from dataclasses import replace
from functools import partial

import common
import eval_all
from eval_all import ATTACKS, evaluate

import pytest
import torch
from test_audit import ZERO, Gradient, Masked, digits
from torch import nn


@pytest.fixture(scope="module")
def natural():
    return digits(n=60)


def few(names):
    """Attacks with few queries."""
    fewer = {"square": 100, "zoo": 400, "rays": 60, "autoattack": 100}
    attacks = {name: eval_all.find_attack(name) for name in names.split()}
    cut = {name: partial(attacks[name].run, queries=queries) for name, queries in fewer.items() if name in attacks}
    return {name: replace(attack, run=cut.get(name, attack.run)) for name, attack in attacks.items()}


def correct(result):
    return {name: row["correct"] for name, row in result["attacks"].items()}


def failing(result):
    return {check["check"] for check in result.get("audit", result["checks"]) if not check["passed"]}


def noisy(before=lambda: None, size=0.3):
    """x + noise, drawn after `before`."""
    return lambda x: before() or x + size * torch.randn_like(x[:1])


@pytest.mark.parametrize("names", ["pgd-5 spsa-3 nes-3 zoo mta-3", "square apgd-ce apgd-t", "noise rays fab cw-inf-5"])
def test_a_seed_that_the_model_sets_is_not_that_of_the_attack(natural, names):
    """The same function has the same figures: noise that is fixed, and noise drawn anew after the same seed."""
    model, x, y = natural
    torch.manual_seed(0)
    fixed = 0.1 * torch.randn_like(x[:1])
    models = Masked(model, lambda x: x + fixed), Masked(model, noisy(lambda: torch.manual_seed(0) and None, 0.1))
    first, second = (evaluate(net.eval(), x, y, few(names), eps=0.1) for net in models)
    for name in names.split():
        assert first["verdicts"][name].tolist() == second["verdicts"][name].tolist(), name
        assert first["attacks"][name]["queries"] == second["attacks"][name]["queries"], name
    assert not failing(first) and not failing(second)


def test_a_random_model_stays_random_and_its_figures_are_marked_wherever_they_are(natural, cli, tmp_path):
    model, x, y = natural
    folder = tmp_path / "out"
    result = evaluate(Masked(model, noisy()), x, y, "quick", eps=0.0, folder=folder)
    assert failing(result) == {"same image, same logits"}
    verdicts = {tuple(result["verdicts"][name]) for name in ("clean", "noise", "fgsm", "pgd-20")}
    assert len(verdicts) > 1  # eps is 0: each attack is one more draw
    kept = json.loads((folder / "eval.json").read_text())
    rows = [*kept["attacks"].values(), *csv.DictReader(open(folder / "eval.csv"))]
    assert all(row["remark"].startswith("RANDOM") for row in rows) and kept["model"].endswith("RANDOM")
    (tmp_path / "mine.py").write_text(
        "import torch\nclass Net(torch.nn.Linear):\n    def forward(self, x):\n"
        "        return super().forward(x.flatten(1) + torch.rand_like(x.flatten(1)))\ndef make(): return Net(64, 10)\n"
    )
    flags = ["mine.py:make", "--dataset", "digits", "--num-images", "30"]
    code, text, _ = cli("eval_all", "mine.py:make", *flags, "--attacks", "noise", "--out", "two")
    assert code == 0 and text.count("RANDOM") > 8 and "RANDOM" in (tmp_path / "two" / "paired.csv").read_text()
    assert cli("analyze", *flags, "--curves", "--out", "curves")[0] == 0
    assert [*json.loads((tmp_path / "curves" / "analysis.json").read_text())["models"]] == ["mine-make RANDOM"]


def test_eot_votes_over_draws_and_averages_logits_and_gradients(natural):
    model, x, y = natural
    net = Masked(model, lambda x: x + 0.3 * torch.randn_like(x)).eval()
    once, voted = (evaluate(net, x, y, "quick", eps=0.0, eot=n) for n in (1, 25))
    with torch.no_grad():
        draws = torch.stack([net(x).argmax(1) == y for _ in range(400)]).float()
    assert voted["attacks"]["clean"]["share"] == pytest.approx(100 * draws.mean().item(), abs=3)
    assert voted["attacks"]["clean"]["correct"] == pytest.approx((draws.mean(0) > 0.5).sum().item(), abs=3)
    lost = [r["attacks"]["clean"]["correct"] - r["attacks"]["worst case"]["correct"] for r in (once, voted)]
    assert lost[1] < lost[0] / 2 and not failing(voted) and "single draws" in voted["attacks"]["fgsm"]["remark"]
    assert voted["attacks"]["pgd-20"]["queries"] == 25 * 20
    factors, z = iter([1.0, 2.0, 3.0]), x.clone().requires_grad_()
    random = eval_all.Observed(Masked(model, lambda x: Gradient.apply(x, next(factors))), x, eot=3)
    grad, expected = (torch.autograd.grad(net(z).square().sum(), z)[0] for net in (random, model))
    torch.testing.assert_close(grad, 2 * expected, rtol=1e-3, atol=1e-3)  # the mean of 1, 2 and 3
    said = evaluate(net, x, y, few("autoattack"), eps=0.1, eot=2)["attacks"]["autoattack"]
    assert 0 < said["queries"] < 2 * 2 * 120 and "randomized" not in said["remark"]  # APGD-CE and APGD-DLR, no Square


@pytest.mark.parametrize("batch_size", [250, 16, 1])
def test_logits_that_depend_on_the_batch_are_marked_at_any_batch_size(natural, batch_size):
    """Also where batch norm cannot take a single image."""
    model, x, y = natural
    net = Masked(model, after=nn.BatchNorm1d(10, affine=False, track_running_stats=False)).eval()
    result = evaluate(net, x[:20], y[:20], "pgd-5", eps=0.1, batch_size=batch_size, audit=batch_size > 1)
    assert "same logits in other batches" in failing(result) and "same image, same logits" not in failing(result)
    assert result["mark"] == result["attacks"]["worst case"]["remark"] == "BATCH-DEPENDENT"


@pytest.mark.parametrize("norm, eps", [("linf", 8), ("linf", 1.01), ("l2", 128), ("l2", 8.01)])
def test_a_radius_that_is_not_in_pixel_units_is_refused(natural, refused, norm, eps):
    model, x, y = natural
    with pytest.raises(common.UserError, match="8/255"):
        evaluate(model, x, y, "fgsm", norm=norm, eps=eps)
    he = [eval_all.Path(__file__).parent / "golden/he.pt", "--norm", norm, "--eps", str(eps), "--num-images", "5"]
    assert "8/255" in refused("eval_all", *he) and "8/255" in refused("analyze", *he, "--curves")


def looks_inside(x):
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(z.square().sum(), z)
    return x + 0 * grad


@pytest.mark.parametrize("mask, message", [
    ({"after": lambda logits: logits.softmax(1)}, "probability distribution"), ({"before": looks_inside}, "dynamic"),
])  # fmt: skip
def test_what_autoattack_finds_in_a_model_is_said_without_autoattack(natural, capsys, mask, message):
    model, x, y = natural
    result = evaluate(Masked(model, **mask).eval(), x, y, "fgsm", eps=0.1)
    assert "AutoAttack's checks of the model" in failing(result) and message in capsys.readouterr().out


def test_what_autoattack_finds_on_the_way_is_in_its_row(natural):
    model, x, y = natural
    remark = evaluate(Masked(model, **ZERO).eval(), x, y, few("autoattack"), eps=0.1)["attacks"]["autoattack"]["remark"]
    assert "points with zero gradient" in remark and "Square Attack has decreased" in remark


FORMS = {
    "script": lambda net, x: torch.jit.script(net),
    "trace": lambda net, x: torch.jit.trace(net, x[:3]),
    "frozen": lambda net, x: torch.jit.freeze(torch.jit.script(net)),
    "compiled": lambda net, x: torch.compile(net, backend="aot_eager"),
    "exported": lambda net, x: torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("n")},)).module(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_model_in_another_form_has_the_same_figures(natural, form):
    model, x, y = natural
    expected, result = (evaluate(net, x, y, "quick,fab", eps=0.1) for net in (model, FORMS[form](model, x)))
    assert correct(result) == correct(expected)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_caller_without_gradients_loses_no_attack(natural, context):
    model, x, y = natural
    expected = evaluate(model, x, y, "quick", eps=0.1)["attacks"]["worst case"]["correct"]
    with context():
        assert evaluate(model, x, y, "quick", eps=0.1)["attacks"]["worst case"]["correct"] == expected < 50
        assert (model(ATTACKS["fgsm"](model, x.clone(), y, eps=0.1)).argmax(1) == y).sum() < 50


def without_gradients(x):
    with torch.inference_mode():
        return x * 1


BLOCKED = {"inference mode": without_gradients, "numpy": lambda x: torch.from_numpy(x.detach().numpy().copy())}
OWN = torch.ones(1, requires_grad=True)
BLOCKED["a gradient of its own"] = lambda x: x.detach() * OWN


@pytest.mark.parametrize("name", BLOCKED)
def test_without_gradients_presets_leave_attacks_out_and_a_name_says_why(natural, capsys, name):
    model, x, y = natural
    net = Masked(model, BLOCKED[name]).eval()
    result = evaluate(net, x, y, "quick", eps=0.1, audit=True)
    assert [*result["attacks"]] == ["clean", "noise", "worst case"] and len(result["audit"]) == len(result["checks"])
    assert failing(result) == {"gradients reach the images"} and "skipped: pgd-20 needs" in capsys.readouterr().out
    with pytest.raises(common.UserError, match="pgd-20 needs gradients"):
        evaluate(net, x, y, "pgd-20", eps=0.1)
    assert evaluate(net, x, y, few("square"), eps=0.2)["attacks"]["square"]["correct"] < 50


def test_a_model_that_changes_its_images_is_named_and_has_the_figures_of_a_copy(natural, capsys):
    model, x, y = natural
    kept = x.clone()
    changes, copies = Masked(model, lambda x: x.sub_(0.1)), Masked(model, lambda x: x - 0.1)
    first, second = (evaluate(net.eval(), x, y, few("pgd-5 zoo square"), eps=0.1) for net in (changes, copies))
    assert correct(first) == correct(second) and torch.equal(x, kept) and not failing(second)
    assert failing(first) == {"images are left as they are"} and "changed by 0.1" in capsys.readouterr().out


def test_what_tells_models_and_attacks_apart_is_more_than_weights_and_source(natural, tmp_path):
    """A plain attribute of a model; what an attack holds: attributes, defaults, tensors, networks."""
    model, x, y = natural

    class Scaled(Masked):
        def forward(self, x):
            return self.factor * super().forward(x)

    correct = []
    for factor in (1e4, 1.0):
        net = Scaled(model)
        net.factor = factor
        correct.append(evaluate(net, x, y, "pgd-20", eps=0.1, folder=tmp_path)["attacks"]["pgd-20"]["correct"])
    assert correct[0] > correct[1] + 10

    class Step:
        def __init__(self, size):
            self.size = size

        def __call__(self, model, x, y, *, eps, **_):
            return x

    attacks = [Step(1), Step(2), (lambda model, x, y, k=1, **_: x), (lambda model, x, y, k=2, **_: x)]
    attacks += [partial(eval_all.pgd, delta=torch.arange(2000.0) + k) for k in (0, 1)]
    attacks += [partial(eval_all.transferred, source=net, attack=eval_all.pgd) for net in (model, digits("he", 1)[0])]
    identities = [eval_all.Attack(attack).identity() for attack in attacks]
    assert len({*identities}) == len(attacks)
    assert identities == [eval_all.Attack(attack).identity() for attack in attacks]


def test_logits_that_are_never_finite_are_no_randomness_and_a_sources_gradients_are_told(natural):
    model, x, y = natural
    for value in (-torch.inf, torch.nan):
        masked = Masked(model, after=lambda z, value=value: torch.cat([z, torch.full_like(z[:, :1], value)], 1))
        assert evaluate(masked, x, y, "clean")["mark"] == ""
    source = Masked(model, lambda x: Gradient.apply(x, torch.nan))
    rows = evaluate(model, x, y, eval_all.transfer_attacks([eval_all.Model("s", source, {})]), eps=0.1)["attacks"]
    assert all("NOT FINITE" in rows[f"{name} from s"]["remark"] for name in ("fgsm", "pgd-20"))


def test_crafting_may_use_tf32_and_verdicts_and_finite_differences_may_not(natural, monkeypatch):
    model, x, y = natural
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen = {True: set(), False: set()}
    net = Masked(model, lambda x: seen[x.requires_grad].add(torch.backends.cudnn.allow_tf32) or x)
    for names, exact, expected in (("pgd-3", False, {True, False}), ("pgd-3", True, {False}), ("spsa-2", False, None)):
        evaluate(net, x, y, names, eps=0.1, exact=exact)
        assert (seen[True] - {None} == expected) if expected else seen[False] == {False}
        seen[True].clear(), seen[False].clear()
