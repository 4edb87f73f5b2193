"""--report fills a text in from eval.json and verdicts.npz: figures, intervals, worst case, McNemar's test."""

import importlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes

import eval_all

REPORT = """# Title
```table clean, pgd-20, square, worst case, audit
One | toy/one | 90.1, -, 0.5-0.6, 50
Two | toy/two
Never run | toy/three | 1, 2
```
```table clean
Never run | toy/three
```
It stands {toy/one on pgd-20}, {toy/one on pgd-20 + square},
{toy/one vs
toy/two on pgd-20}, {toy/one vs toy/one on clean}.
They are {toy/one - toy/two on pgd-20} apart.
Its audit {toy/one on audit}; {toy/one on angles}.
Seed 1 stands {toy/one-s1 on pgd-20}.
```compare clean, pgd-20, square
One over two | toy/one vs toy/two | -, 25, -
Both seeds | toy/one vs toy/also | -, 25, -
One seed over the other | toy/one-s1 vs toy/one-s0
Never run | toy/three vs toy/two
```
```dots figures/dots.png clean, pgd-20
One | toy/one
Two | toy/two
```
```lines figures/lines.png pgd-20; steps
Both | toy/step* | 1,2
```
```grid figures/grid.png clean; margin
s = 1 | toy/step* | 1,2
s = 2 | toy/step* | 2,1
```
```curves figures/curves.png eps
One | toy/one
```
```gradients figures/gradients.png by layer
One | toy/one
```
Their ratios are {toy/one on gradients}.
{runs of toy/ by toys.sh
--redo}
"""


def write_evaluation(folder, rights, index=None, **facts):
    """What eval_all.py leaves for one model whose verdicts are `rights` {attack: (N,)}."""
    folder.mkdir(parents=True)
    rows = {
        name: eval_all.accuracy_of(torch.from_numpy(right)) | {"norm": "linf", "eps": 0.3, "seconds": 60.0}
        for name, right in rights.items()
    }
    rows["worst case"] = eval_all.accuracy_of(torch.from_numpy(np.all(list(rights.values()), axis=0)))
    result = {
        "dataset": "toy",
        "norm": "linf",
        "eps": 0.3,
        "hardware": "abacus",
        "attacks": rows,
        "weights": "cd",
        **facts,
    }
    (folder / "eval.json").write_text(json.dumps(result))
    index = np.arange(len(rights["clean"])) if index is None else index
    np.savez(folder / "verdicts.npz", index=index, label=index % 10, **rights)


def first(count, of):
    return np.arange(of) < count


def verdicts(right):
    return eval_all.Verdicts(np.arange(len(right)), np.arange(len(right)) % 10, right)


@pytest.fixture
def results(tmp_path):
    """toy/one twice, with a second evaluation on some of the images, and toy/two."""
    for seed, right in ((0, 60), (1, 70)):
        rights = {"clean": first(95, 100), "pgd-20": first(right, 100)}
        facts = {
            "training_seconds": 600,
            "training_hardware": "slide rule",
            "args": {"arch": "net", "epochs": 3},
            "epoch": 2,
        }
        write_evaluation(tmp_path / "results" / f"toy/one-s{seed}" / "fast", rights, **facts)
        few = np.array([10, 40, 65, 99])
        audit = [{"check": c, "figures": "", "passed": seed == 0 or c != "c"} for c in "abc"]
        found = {"angles": {"smallest": 90.0 + seed, "largest": 100.0, "within": 5.0}}
        ratios = {"mean": [1.6, 1.9], "median": [1.5 + seed, 1.2], "low": [1.0, 1.0], "high": [2.5, 2.0]}
        found["gradients"] = {"layers": ["conv", "fc"], "n": 50 + seed, **ratios}
        if seed:
            found["curves"] = {
                "n": 100,
                "norm": "linf",
                "eps": 0.3,
                "axes": {"eps": {"at": [0, 1], "right": {"a": [95, 9], "b": [95, 6]}}},
            }
        rights = {"clean": few < 95, "square": np.array([True, False, True, False])}
        folder = tmp_path / "results" / f"toy/one-s{seed}" / "strong"
        write_evaluation(folder, rights, few, audit=audit, analyses=found)
    write_evaluation(tmp_path / "results" / "toy/two-s0", {"clean": first(95, 100), "pgd-20": first(40, 100)})
    for seed in (0, 1):
        write_evaluation(tmp_path / "results" / f"toy/also-s{seed}", {"clean": first(9, 100), "pgd-20": first(9, 100)})
    write_evaluation(tmp_path / "results" / "other/net-s0", {"clean": first(95, 100)}, eps=0.1)
    for steps in (1, 2):
        rights = {"clean": first(90 + steps, 100), "pgd-20": first(50 + steps, 100)}
        write_evaluation(tmp_path / "results" / f"toy/step{steps}-s0", rights)
    (tmp_path / "results" / "report.md").write_text(REPORT)
    return tmp_path / "results"


def test_a_report_says_what_the_verdicts_say(cli, results, tmp_path):
    code, _, err = cli("eval_all", "--report", results, "--out", tmp_path / "R.md")
    assert code == 0 and "toy/three, left out" in err, err
    text = (tmp_path / "R.md").read_text()
    low, high = eval_all.wilson(60, 100)[0], eval_all.wilson(70, 100)[1]
    # On images 10, 40, 65 and 99 all attacks: the first alone stands for seed 0, the first and third for seed 1.
    worst = f"37.50 ± {max(37.5 - eval_all.wilson(1, 4)[0], eval_all.wilson(2, 4)[1] - 37.5):.2f}"
    clean, pgd = f"95.00 ± {95 - eval_all.wilson(95, 100)[0]:.2f}", f"65.00 ± {max(65 - low, high - 65):.2f}"
    square = f"50.00 ± {50 - eval_all.wilson(2, 4)[0]:.2f} <sub>0.5-0.6</sub>"
    row = f"| One `one` | 2 | {clean} <sub>90.1</sub> | {pgd} | {square} | {worst} <sub>50</sub> | fails 0 and 1 of 3 |"
    assert row in text, text
    two = f"40.00 ± {eval_all.wilson(40, 100)[1] - 40:.2f}"
    assert f"| Two `two` | 1 | {clean} | {two} |  | {two} | not made |" in text and "Never run" not in text
    assert f"It stands 65.00 ({low:.2f} - {high:.2f}), 37.50 (" in text
    assert f"Seed 1 stands 70.00 ({eval_all.wilson(70, 100)[0]:.2f} - {high:.2f})." in text
    assert "60.00 against 40.00 (more: p < 0.001; n = 100, seed 0), " in text
    assert "95.00 against 95.00 (no difference shown: p 1, 1; n = 100, seeds 0, 1)" in text
    assert "audit fails 0 and 1 of 3; class weights 90.5 to 100.0 degrees apart, features 5.0 off" in text
    assert "| `toys.sh --redo one` | 0, 1 | net | 3, all | 2, 2 | 10.0 | 4.0 | slide rule; abacus |" in text
    none, some = reach(0, ends(0, 0, 100)), reach(20, ends(20, 0, 100))
    assert f"| One over two | 0 | +0.00 ± {none} | *+20.00 ± {some}* <sub>25</sub> |  |" in text
    clean, pgd = reach(86, ends(86, 0, 100)), reach(56, ends(51, 0, 100), ends(61, 0, 100))
    assert f"| Both seeds | 0, 1 | **+86.00 ± {clean}** | **+56.00 ± {pgd}** <sub>25</sub> |  |" in text
    one = f"+0.00 ± {none} | *+10.00 ± {reach(10, ends(10, 0, 100))}* | +0.00 ± {reach(0, ends(0, 0, 4))}"
    assert f"| One seed over the other | 1 over 0 | {one} |" in text
    assert f"They are *+20.00 ± {some}* apart." in text
    assert "Their ratios are 1.20 to 1.50 (means 1.60 to 1.90; n = 50)." in text
    assert "worst case<br>n = 4 / 100 |" in text and "*No row of this table has been evaluated yet.*" in text
    for about, name in (
        ("clean, pgd-20", "dots"),
        ("pgd-20; steps", "lines"),
        ("clean; margin", "grid"),
        ("eps", "curves"),
        ("by layer", "gradients"),
    ):
        assert f"![{about}](figures/{name}.png)" in text and (tmp_path / f"figures/{name}.png").stat().st_size > 5000
    cli("eval_all", "--report", results, "--out", tmp_path / "again.md")
    assert (tmp_path / "again.md").read_text() == text


def test_the_curve_of_a_network_is_that_of_the_stronger_attack(results, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(eval_all, "plot_band", lambda axis, *told: drawn.append(told) or axis.plot([0], label="one"))
    eval_all.draw_curves(tmp_path / "a.png", "eps", [["One", "toy/one"]], eval_all.read_evaluations([results]))
    assert drawn == [([0, 1], [eval_all.accuracy_from(95, 100), eval_all.accuracy_from(6, 100)], "o-", "One")]


def test_the_figures_draw_each_rows_own_accuracies_and_intervals(results, tmp_path, monkeypatch):
    found, drawn = eval_all.read_evaluations([results]), {}
    of = lambda count: eval_all.accuracy_from(count, 100)  # noqa: E731

    def recorded(name):
        original = getattr(Axes, name)

        def record(axis, *told, **style):
            drawn.setdefault(name, []).append((told, style))
            return original(axis, *told, **style)

        return record

    for name in ("errorbar", "imshow", "fill_between", "plot", "set"):
        monkeypatch.setattr(Axes, name, recorded(name))
    eval_all.draw_dots(tmp_path / "a.png", "clean, pgd-20", [["Two", "toy/two"], ["First", "toy/step1"]], found)
    for (told, style), counts in zip(drawn["errorbar"], ([95, 91], [40, 51]), strict=True):  # an attack at a time
        assert told[0].tolist() == counts
        reach = [[abs(of(count)[end] - count) for count in counts] for end in ("low", "high")]
        np.testing.assert_allclose(style["xerr"], reach)
    del drawn["errorbar"]
    eval_all.draw_gradients(tmp_path / "d.png", "", [["One", "toy/one"], ["Again", "toy/one-s1"]], found)
    networks = ("One", -0.125, 1.5), ("Again", 0.125, 2.5)
    for (told, style), (label, place, median) in zip(drawn["errorbar"], networks, strict=True):
        assert style["label"] == label and told[0].tolist() == [median, 1.2] and told[1].tolist() == [place, 1 + place]
        np.testing.assert_allclose(style["xerr"], [[median - 1, 0.2], [2.5 - median, 0.8]])
    axis = {key: value for _, told in drawn["set"][-2:] for key, value in told.items()}
    assert list(axis["yticks"]) == [0, 1] and axis["yticklabels"] == ["conv", "fc"] and axis["ylim"] == (1.5, -0.5)
    assert axis["xscale"] == "linear" and axis["xlabel"].endswith("PGD-20, toy, Linf eps 0.3, n = 50 / 51")
    eval_all.draw_grid(tmp_path / "b.png", "pgd-20; steps", [["Steps", "toy/step*", "1,2"]], found)
    assert drawn["imshow"][0][0][0].tolist() == [[51, 52]]
    eval_all.draw_lines(tmp_path / "c.png", "pgd-20; steps", [["Steps", "toy/step*", "1,2"]], found)
    ((at, lows, highs),) = [told for told, _ in drawn["fill_between"]]
    (at_too, accuracies, _), *_ = [told for told, _ in drawn["plot"]]
    assert list(at) == list(at_too) == [1, 2] and list(accuracies) == [51, 52]
    assert list(lows) == [of(51)["low"], of(52)["low"]] and list(highs) == [of(51)["high"], of(52)["high"]]


def test_a_difference_is_one_that_mcnemars_test_finds_and_that_seeds_do_not_turn():
    """12 images gained and 3 lost: p = 2 * P(at least 12 of 15 heads) = 0.035; 10 and 3: 0.092."""
    none = "no difference shown"
    for gained, p, verdict, turned in ((10, "0.092", none, none), (12, "0.035", "more", "less")):
        found = {"a": {0: eval_all.Evaluated()}, "b": {0: eval_all.Evaluated()}}
        b = np.arange(100) >= gained
        for name, right in (("a", np.arange(100) < 97), ("b", b)):
            found[name][0].facts["dataset"] = "toy"
            found[name][0].verdicts["pgd"] = verdicts(right)
        assert f"({verdict}: p {p}; n = 100" in eval_all.in_words(eval_all.compare(found, "a", "b", "pgd"))
        assert f"({turned}: p {p}; n = 100" in eval_all.in_words(eval_all.compare(found, "b", "a", "pgd"))
    for name, right in (("a", first(70, 100)), ("b", first(50, 100))):  # seed 1 of a is below seed 0 of b
        found[name][1] = eval_all.Evaluated()
        found[name][1].facts["dataset"] = "toy"
        found[name][1].verdicts["pgd"] = verdicts(right)
    for pair in ("ab", "ba"):
        assert f"{none}: p 0.035, < 0.001" in eval_all.in_words(eval_all.compare(found, *pair, "pgd"))


def ends(gained, lost, n):
    """The 95 % interval of a paired difference, in points: half a pair more in each cell (Agresti & Min)."""
    center = (gained - lost) / (n + 2)
    spread = 1.959964 * math.sqrt(((gained + lost + 1) / (n + 2) - center**2) / (n + 2))
    return 100 * (center - spread), 100 * (center + spread)


def reach(points, *intervals):
    return f"{max(abs(end - points) for interval in intervals for end in interval):.2f}"


def test_the_interval_of_a_paired_difference():
    a, b = torch.arange(100) < 80, torch.arange(100) >= 30  # 30 gained, 20 lost
    result = eval_all.paired(a, b)
    assert (result["ours"], result["theirs"], result["n"]) == (80, 70, 100)
    assert (result["low"], result["high"]) == pytest.approx(ends(30, 20, 100))
    same = eval_all.paired(a, a)
    assert same["low"] == -same["high"] < 0 and same["p"] == 1


def test_a_comparison_beside_its_models_is_passed_over(results):
    before = eval_all.read_evaluations([results]).keys()
    (results / "eval.json").write_text('[{"model": "one"}, {"model": "two"}]')
    assert eval_all.read_evaluations([results]).keys() == before


def test_the_worst_case_is_over_all_attacks_that_every_seed_faced(results):
    """With a column or without; but not over those in another ball, or on fewer images than the columns share."""
    seeds = eval_all.read_evaluations([results])["toy/one"]
    assert eval_all.all_in_the_ball(seeds, ["clean", "worst case"]) == "clean + pgd-20"
    assert eval_all.all_in_the_ball(seeds, ["clean", "square"]).split(" + ") == ["clean", "pgd-20", "square"]
    write_evaluation(results / "toy/one-s0/more", {"clean": first(95, 100), "mim-20": first(5, 100)})
    assert "mim-20" not in eval_all.all_in_the_ball(eval_all.read_evaluations([results])["toy/one"], ["clean"])
    for model in seeds.values():
        model.rows["pgd-20"]["eps"] = 0.1
    assert eval_all.all_in_the_ball(seeds, ["clean"]) == "clean" and not eval_all.all_in_the_ball(seeds, ["pgd-20"])


def test_an_attack_counts_on_the_most_images_it_was_made_on(results):
    """Wherever that evaluation lies; over seeds the least number of images is told."""
    for place in ("toy/two-s0/before", "toy/two-s0/later", "toy/two-s1"):
        write_evaluation(results / place, {"clean": first(5, 10)})
    seeds = eval_all.read_evaluations([results])["toy/two"]
    assert [len(seeds[seed].under("clean").right) for seed in (0, 1)] == [100, 10]
    assert [seeds[seed].rows["clean"]["n"] for seed in (0, 1)] == [100, 10]
    assert eval_all.over_seeds(seeds, "clean")["n"] == 10


def test_an_analysis_counts_on_the_most_images_it_was_made_of(tmp_path):
    for folder, n, within in (
        ("a-few", 10, 1.0),
        ("b-all", 100, 2.0),
        ("c-some", 50, 3.0),
    ):  # in the order they are read
        degrees = {"smallest": 90.0, "largest": 90.0, "within": within}
        write_evaluation(tmp_path / "net-s0" / folder, {"clean": first(9, n)}, analyses={"angles": degrees})
    write_evaluation(tmp_path / "net-s0" / "d", {"clean": first(9, 200)})  # without one
    network = eval_all.read_evaluations([tmp_path])["net"][0]
    assert network.facts["analyses"]["angles"]["within"] == 2.0 and network.rows["clean"]["n"] == 200


def test_a_seed_that_lacks_an_attack_is_left_out(results):
    (results / "toy/one-s1/strong/eval.json").unlink()
    seeds = eval_all.complete(eval_all.read_evaluations([results])["toy/one"], ["clean", "pgd-20", "square"])
    assert list(seeds) == [0]


def relabel(folder, what="label"):
    """As if the test set had been in another order."""
    arrays = dict(np.load(folder / "verdicts.npz"))
    np.savez(folder / "verdicts.npz", **arrays | {what: arrays[what][::-1]})


def repeat(folder):
    """The first image twice."""
    arrays = dict(np.load(folder / "verdicts.npz"))
    arrays["index"][1] = arrays["index"][0]
    np.savez(folder / "verdicts.npz", **arrays)


def flip(path):
    """A bit of the last array."""
    content = bytearray(path.read_bytes())
    place = content.rindex(b"NUMPY")
    content[place + 130] ^= 1
    path.write_bytes(content)


def rewrite(folder, **facts):
    (folder / "eval.json").write_text(json.dumps(json.loads((folder / "eval.json").read_text()) | facts))


def two_curves(path):
    """Of 100 images and of 200."""
    facts = json.loads((path / "toy/one-s1/strong/eval.json").read_text())["analyses"]
    facts["curves"]["n"] = 200
    rewrite(path / "toy/two-s0", analyses=facts)
    says("```curves a.png eps\na | toy/one\nb | toy/two\n```")(path)


def gradients(**ratios):
    """Of toy/two, and that the report asks for them."""

    def write(path):
        rewrite(path / "toy/two-s0", analyses={"gradients": ratios or None})
        says("{toy/two on gradients}")(path)

    return write


def other_layers(path):
    """Of a network of one layer beside one of two."""
    gradients(layers=["fc"], mean=[1.5], median=[1.5], low=[1.0], high=[2.0], n=50)(path)
    says("```gradients a.png\na | toy/one\nb | toy/two\n```")(path)


def other_ball(path):
    """Of two networks whose examples are from other balls."""
    analyses = json.loads((path / "toy/one-s0/strong/eval.json").read_text())["analyses"]
    rewrite(path / "other/net-s0", analyses=analyses)
    says("```gradients a.png\na | toy/one\nb | other/net\n```")(path)


def says(text):
    return lambda path: (path / "report.md").write_text(text)


@pytest.mark.parametrize("break_it, complaint", [
    (lambda path: (path / "report.md").unlink(), "there is no"),
    (says("{toy/one on magic}"), "no evaluation of toy/one under magic"),
    (says("{toy/one vs toy/none on clean}"), "no seed of both"),
    (says("```grid a.png clean; m\na | toy/no | 1\n```"), "evaluation of toy/no"),
    (says("```dots clean, pgd-20\na | toy/one\n```"), "'clean,' is no FILE.png"),
    (says("```lines a.png clean\na | toy/step* | 1,2\n```"), "lines a.png clean: its head is no FILE.png ATTACK; AXIS"),
    (says("```grid a.png clean; m\na | toy/step* | 1,2\nb | toy/step* | 1\n```"), "not all as many values"),
    (says("```table clean + pgd-20\na | toy/one\n```"), "report.md: table clean + pgd-20: unknown attack"),
    (says("```table clean\na | toy/one | 1, 2\n```"), "more figures of the paper"),
    (says("{toy/one vs other/net on clean}"), "put side by side"),
    (lambda path: relabel(path / "toy/two-s0"), "differ in their labels"),
    (says("```grid a.png clean; x\nOne | * | other/net,toy/one\n```"), "put side by side"),
    (says("```compare clean, magic\nOne | toy/one vs toy/two\n```"), "unknown attack 'magic'"),
    (says("```table clean\nOne | toy/one\nAnother | other/net\n```"), "put side by side"),
    (says("```table magic\na | toy/one\n```"), "unknown attack 'magic'"),
    (says("```table clean\n\n\na | toy/one\n\na\n```"), "table clean: "),
    (says("```table clean\n```"), "no LABEL | NAME | FIGURES"),
    (says("```compare clean\nOne | toy/one vs toy/two | 1, 2\n```"), "more figures of the paper"),
    (says("```compare worst case\nOne | toy/one vs toy/two\n```"), "unknown attack 'worst case'"),
    (says("```dots a.png audit\na | toy/one\n```"), "unknown attack 'audit'"),
    (says("```lines a.png clean; x\n```"), "no LABEL | NAME | FIGURES"),
    (says("```dots a.png clean\na | toy/no\n```"), "dots a.png clean: "),
    (says("```lines a.png clean; x\na | toy/one\n```"), "lines a.png clean; x: "),
    (says("```curves a.png eps\na | toy/two\n```"), "of toy/two there are no curves"),
    (says("```curves a.png time\na | toy/one\n```"), "no curve of toy/one by time"),
    (says("```gradients a.png\na | toy/two\n```"), "of toy/two there are no gradients"),
    (says("{toy/two on gradients}"), "of toy/two there are no gradients"),
    (gradients(), "the gradients of toy/two lack a figure of a layer: evaluate it anew"),
    (gradients(layers=["fc"], mean=[1.5], median=[1.5], n=50), "lack a figure of a layer"),
    (gradients(layers=["fc"], mean=[1.5], median=[1.5], low=[1.0], high=[2.0, 2.0], n=50), "lack a figure of a layer"),
    (other_layers, "networks of other layers are put side by side"),
    (other_ball, "put side by side"),
    (two_curves, "n = 100 and of toy, Linf, n = 200 are put side by side"),
    (lambda path: write_evaluation(path / "toy/two-s0/l2", {"clean": first(9, 10)}, norm="l2"), "its norm is not that"),
    (lambda path: write_evaluation(path / "toy/two-s0/x", {"clean": first(9, 10)}, weights="ab"), "its weights is not"),
    (lambda path: rewrite(path / "toy/two-s0", step_size=0.001), "restarts None and with dataset toy"),
    (lambda path: write_evaluation(path / "toy/two-s0/x", {"clean": first(9, 10)}, restarts=5), "its restarts is not"),
    (lambda path: (path / "toy/two-s0/eval.json").write_text("{"), "not the evaluation of one model"),
    (lambda path: (path / "toy/two-s0/verdicts.npz").write_bytes(b"PK"), "not the evaluation of one model"),
    (lambda path: rewrite(path / "toy/two-s0", norm=None), "not the evaluation of one model"),
    (lambda path: rewrite(path / "toy/two-s0", attacks={"clean": "95 %"}), "not the evaluation of one model"),
    (lambda path: rewrite(path / "toy/two-s0", attacks={"clean": {"accuracy": 95}}), "not the evaluation of one model"),
    (lambda path: rewrite(path / "toy/two-s0", attacks=None), "not the evaluation of one model"),
    (lambda path: rewrite(path / "toy/two-s0", attacks={"clean": {"n": "100"}}), "not the evaluation of one model"),
    (lambda path: relabel(path / "toy/two-s0", "index"), "not the evaluation of one model"),
    (lambda path: repeat(path / "toy/two-s0"), "not the evaluation of one model"),
    (lambda path: flip(path / "toy/two-s0/verdicts.npz"), "not the evaluation of one model"),
    (says("```compare clean\nOne | toy/one\n```"), "no NAME vs OTHER"),
    (lambda path: (path / "toy/two-s0").rename(path / "toy/two"), "is in no folder NAME-sSEED"),
])  # fmt: skip
def test_a_report_that_cannot_be_made_is_one_line(cli, results, tmp_path, break_it, complaint):
    (tmp_path / "RESULTS.md").write_text("as it was")
    break_it(results)
    code, _, err = cli("eval_all", "--report", results)
    assert code == 2 and complaint in err.splitlines()[-1] and "Traceback" not in err, err
    assert (tmp_path / "RESULTS.md").read_text() == "as it was"
    assert "no eval.json" in cli("eval_all", "--report", tmp_path / "nowhere")[2]


def test_the_committed_results_regenerate(cli, tmp_path):
    """RESULTS.md is what --report makes of benchmarks/results, byte for byte."""
    top = Path(__file__).parent.parent
    code, _, err = cli("eval_all", "--report", top / "benchmarks" / "results", "--out", tmp_path / "RESULTS.md")
    assert code == 0, err
    assert (tmp_path / "RESULTS.md").read_text() == (top / "RESULTS.md").read_text()


def test_every_row_of_the_results_can_be_made_anew():
    """What report.md names is a row of the script that trains it."""
    benchmarks = Path(__file__).parent.parent / "benchmarks"
    named = set(
        re.findall(
            r"(?<!results/)(?<!runs}/)\b(mnist|cifar10_jpeg)(?:-float32|-transfer)?/([\w.-]+)",
            (benchmarks / "results" / "report.md").read_text(),
        )
    )
    assert len(named) > 20
    for dataset, name in named:
        script = (benchmarks / f"{dataset.removesuffix('_jpeg')}.sh").read_text()
        row = re.sub(r"-s\d+$", "", name)
        assert re.search(rf'^(rows=")?{re.escape(row)} ', script, re.MULTILINE), name


def rows_of(script):
    """What a script of benchmarks/ trains its rows with: {row: words}."""
    text = script.read_text()
    for _ in range(2):  # a variable may hold another
        for name, value in re.findall(r'^(\w+)="([^"\n]*)"', text, re.MULTILINE):
            text = text.replace(f"${name} ", f"{value} ").replace(f"${name}\n", f"{value}\n")
    rows = re.search(r'^rows="\n(.*?)^"', text, re.MULTILINE | re.DOTALL)[1]
    return {row: words for row, _, *words in map(str.split, rows.splitlines())}


@pytest.mark.parametrize("dataset", ["mnist", "cifar10_jpeg"])
def test_the_committed_results_are_of_the_flags_in_the_scripts(dataset):
    """Each network's arguments are those that its row has today, or has by default."""
    benchmarks = Path(__file__).parent.parent / "benchmarks"
    rows = rows_of(benchmarks / f"{dataset.removesuffix('_jpeg')}.sh")
    paths = sorted((benchmarks / "results").glob(f"{dataset}*/*-s*/f[al]*/eval.json"))  # fast, float32
    assert len(paths) > 5
    for path in paths:
        row, _, seed = path.parent.parent.name.rpartition("-s")
        script, *flags = rows[row]
        method = importlib.import_module(script.removesuffix(".py"))
        wanted = vars(method.parse_args([*flags, "--dataset", dataset, "--seed", seed]))
        made = json.loads(path.read_text())["args"]
        places = {"out", "resume", "data_dir"}
        assert {key: made[key] for key in wanted if key in made and key not in places} == {
            key: value for key, value in wanted.items() if key in made and key not in places
        }, path


def test_the_readmes_table_is_that_of_the_results():
    top = Path(__file__).parent.parent
    rows = [line for line in (top / "README.md").read_text().splitlines() if re.match(r"\|.*±", line)]
    assert len(rows) > 3 and set(rows) <= set((top / "RESULTS.md").read_text().splitlines())
