"""benchmarks/report.py: statistics against independent computations, and RESULTS.md from the committed evaluations."""

import importlib.util
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(report)
Z = 1.959964


def test_results_md_is_what_the_report_writes(tmp_path):
    report.main(tmp_path)
    text = (ROOT / "RESULTS.md").read_text()
    assert (tmp_path / "RESULTS.md").read_text() == text
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    linked = set(re.findall(r"\]\(figures/([\w-]+\.png)\)", text))
    assert len(drawn) == 7 and drawn <= linked and all((ROOT / "figures" / name).is_file() for name in linked)


@pytest.mark.parametrize("correct, n", [(0, 10), (3, 10), (87, 100), (250, 250)])
def test_wilson_interval_inverts_the_score_test(correct, n):
    """Its ends are the p with (correct / n - p)^2 = z^2 p (1 - p) / n."""
    p, z = correct / n, Z**2 / n
    low, high = np.sort(np.roots([1 + z, -2 * p - z, p**2]).real)
    estimate = report.accuracy(correct, n)
    assert estimate[1:3] == pytest.approx((100 * low, 100 * high), abs=1e-4)


def first(count, n=100):
    return np.arange(n) < count


@pytest.mark.parametrize("gained, lost", [(10, 3), (12, 3), (3, 12), (4, 4), (0, 0)])
def test_paired_difference_and_mcnemar(gained, lost):
    a, b = first(gained), first(gained + lost) & ~first(gained)
    estimate, p = report.paired_difference(a, b)
    heads = [sum(coins) for coins in itertools.product((0, 1), repeat=gained + lost)]  # all outcomes of a fair coin
    extreme = [abs(2 * own - gained - lost) >= abs(gained - lost) for own in heads]
    assert p == pytest.approx(np.mean(extreme))
    cells, counts = np.array([1, -1, 0]), np.array([gained + 0.5, lost + 0.5, 101 - gained - lost])  # n + 2 images
    mean = np.average(cells, weights=counts)
    spread = Z * np.sqrt(np.average((cells - mean) ** 2, weights=counts) / 102)
    assert estimate == pytest.approx((gained - lost, 100 * (mean - spread), 100 * (mean + spread), 100), abs=1e-4)


def write(folder, verdicts, index=None, key="correct", **facts):
    """An evaluation as eval_all.py writes it; verdicts (N,) bool by attack."""
    folder.mkdir(parents=True)
    rows = {name: {key: int(v.sum()), "n": len(v), "norm": "linf", "eps": 0.3} for name, v in verdicts.items()}
    if "cw-l2" in rows:
        rows["cw-l2"]["norm"] = "l2"
    result = {"dataset": "mnist", "norm": "linf", "eps": 0.3, "attacks": rows, **facts}
    (folder / "eval.json").write_text(json.dumps(result))
    index = np.arange(len(verdicts["clean"])) if index is None else index
    np.savez(folder / "verdicts.npz", index=index, label=index % 10, **verdicts)


@pytest.mark.parametrize("a, b, mark, points, verdict", [
    ([90, 80], [50, 60], "**", "+30.00", "more"),
    ([50, 60], [90, 80], "**", "-30.00", "less"),
    ([90], [50], "*", "+40.00", "more"),
    ([90, 70], [50, 80], "", "+15.00", "no difference shown"),  # seed 1 is the other way round
    ([90, 70], [80, 60], "", "+10.00", "no difference shown"),  # seed 1 of a is below seed 0 of b
    ([90, 64], [50, 60], "", "+22.00", "no difference shown"),  # p of seed 1 is 0.125
])  # fmt: skip
def test_models_differ_if_every_seed_says_so_and_the_seeds_do_not_overlap(tmp_path, a, b, mark, points, verdict):
    for name, counts in (("a", a), ("b", b)):
        for seed, count in enumerate(counts):
            write(tmp_path / f"mnist/{name}-s{seed}", {"clean": first(count)})
    results = report.Results(tmp_path)
    own = report.difference(results, "mnist/a", "mnist/b", "clean")
    assert re.fullmatch(re.escape(mark + points) + r" ± \d+\.\d\d" + re.escape(mark), own["points"])
    assert f"({verdict}: p " in own["sentence"]
    if len(a) == 2:
        assert report.difference(results, "mnist/a-s1", "mnist/a-s0", "clean")["seeds"] == "1 over 0"


def test_worst_case_and_common_images(tmp_path):
    """The second evaluation is on 4 of 100 images. `cw-l2` is in another ball, so it is not in the worst case."""
    write(tmp_path / "mnist/a-s0/fast", {"clean": first(95), "pgd-20": first(60)})
    few = np.array([10, 40, 65, 99])
    write(tmp_path / "mnist/a-s0/strong", {"clean": few < 95, "square": few % 2 == 0, "cw-l2": few < 0}, few)
    results = report.Results(tmp_path)
    assert report.acc(results, "mnist/a", "clean").startswith("95.00 (")
    assert report.acc(results, "mnist/a-s0", "pgd-20 + square").startswith("50.00 (")  # 10 and 40 of 4
    row = report.table(results, ["clean", "worst case"], [("A", "mnist/a", 99.1)]).splitlines()[-1]
    assert re.fullmatch(r"\| A `a` \| 1 \| 95\.00 ± \S+ <sub>99\.10</sub> \| 60\.00 ± \S+ \|", row)  # not square
    row = report.table(results, ["square", "worst case"], [("A", "mnist/a")]).splitlines()[-1]
    assert [cell.split(" ")[1] for cell in row.split("|")[3:5]] == ["50.00", "50.00"]


def test_old_and_new_files_give_the_same_figures(tmp_path, monkeypatch):
    """Old ones have `right`, and analyses in eval.json; new ones have `correct`, and analyses in analysis.json."""
    drawn, texts = [], []
    monkeypatch.setattr(report, "plot", lambda at, series, *labels: drawn.append(series["A"]) or report.Figure())
    counts = {"PGD on CE": [90, 20], "PGD on the margin": [90, 30]}
    old = {"curves": {"n": 100, "axes": {"eps": {"at": [0.0, 0.3], "right": counts}}}}
    write(tmp_path / "old/mnist/a-s0", {"clean": first(90)}, key="right", analyses=old)
    write(tmp_path / "new/mnist/a-s0", {"clean": first(90)})
    new = {"n": 100, "models": {"a-s0": {"curves": {"n": 100, "eps": {"at": [0.0, 0.3], "correct": counts}}}}}
    (tmp_path / "new/mnist/a-s0/analysis.json").write_text(json.dumps(new))
    for results in (report.Results(tmp_path / "old"), report.Results(tmp_path / "new")):
        texts.append(report.acc(results, "mnist/a", "clean"))
        report.curves(results, tmp_path, "eps.png", [("A", "mnist/a")])
    assert texts[0] == texts[1] and drawn[0] == drawn[1] == [report.accuracy(90, 100), report.accuracy(20, 100)]


def test_errors_name_what_is_wrong(tmp_path):
    write(tmp_path / "mnist/a-s0", {"clean": first(90)})
    write(tmp_path / "mnist/b-s0", {"clean": first(90)}, eps=0.1)
    results = report.Results(tmp_path)
    for call, message in [
        (lambda: report.acc(results, "mnist/c", "clean"), "no evaluation of mnist/c"),
        (lambda: report.acc(results, "mnist/a", "magic"), "no evaluation of mnist/a-s0 under magic"),
        (lambda: report.table(results, ["clean", "magic"], [("A", "mnist/a")]), "under magic"),
        (lambda: report.difference(results, "mnist/a", "mnist/b", "clean"), "mnist/a, mnist/b are not comparable"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    (tmp_path / "mnist/a-s0/eval.json").write_text("{")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "mnist/a-s0/eval.json"))):
        report.Results(tmp_path)
