"""benchmarks/report.py: verdicts on claims, and RESULTS.md from the committed evaluations."""

import json
import re
from pathlib import Path

import report

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


def test_results_md_is_what_the_report_writes(tmp_path):
    report.main(tmp_path)
    text = (ROOT / "RESULTS.md").read_text()
    assert (tmp_path / "RESULTS.md").read_text() == text
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    linked = set(re.findall(r"\]\(figures/([\w-]+\.png)\)", text))
    assert len(drawn) == 2 and drawn <= linked and all((ROOT / "figures" / name).is_file() for name in linked)
    in_readme = re.findall(r"[\d.]+ ± [\d.]+", (ROOT / "README.md").read_text())
    assert len(in_readme) > 40 and all(figure in text for figure in in_readme)


def first(count, n=100):
    return np.arange(n) < count


def write(folder, verdicts, index=None):
    """An evaluation as eval_all.py writes it; verdicts (N,) bool by attack."""
    folder.mkdir(parents=True)
    norms = {name: "l2" if name == "cw-l2" else "linf" for name in verdicts}
    rows = {name: {"correct": int(v.sum()), "norm": norms[name], "eps": 0.3} for name, v in verdicts.items()}
    (folder / "eval.json").write_text(json.dumps({"dataset": "mnist", "norm": "linf", "eps": 0.3, "attacks": rows}))
    index = np.arange(len(verdicts["clean"])) if index is None else index
    np.savez(folder / "verdicts.npz", index=index, label=index % 10, **verdicts)


@pytest.mark.parametrize("a, b, points", [
    ([90, 80], [50, 60], "**+30.00"), ([50, 60], [90, 80], "**-30.00"), ([90], [50], "**+40.00"),
    ([90, 70], [50, 80], "+15.00"),  # seed 1 is the other way round
    ([90, 70], [80, 60], "+10.00"),  # seed 1 of a is below seed 0 of b
    ([90, 64], [50, 60], "+22.00"),  # p of seed 1 is 0.125
])  # fmt: skip
def test_models_differ_if_every_seed_says_so_and_the_seeds_do_not_overlap(tmp_path, a, b, points):
    for name, counts in (("a", a), ("b", b)):
        for seed, count in enumerate(counts):
            write(tmp_path / f"mnist/{name}-s{seed}", {"clean": first(count)})
    results = report.Results(tmp_path)
    own = str(report.difference(results, "mnist/a", "mnist/b", "clean"))
    assert re.fullmatch(re.escape(points) + r" ± \d+\.\d\d(\*\*)?", own) and own.count("**") in (0, 2)
    assert len(a) == 1 or report.difference(results, "mnist/a-s1", "mnist/a-s0", "clean").seeds == ["1 over 0"]


def test_holm_and_the_verdicts():
    assert report.holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    difference = [report.verdict(value, 4.0, p, False) for value, p in ((2, 0.01), (1, 0.01), (-1, 0.01), (9, 0.06))]
    assert difference == ["reproduced", "smaller", "refuted", "not reproduced"]
    assert report.verdict(-3, -4.0, 0.01, False) == "reproduced"
    accuracy = [report.verdict(value, 80.0, p, True) for value, p in ((79, 0.3), (90, 0), (40, 0), (39, 0))]
    assert accuracy == ["not reproduced", "reproduced", "smaller", "refuted"]


def test_claims_of_a_difference_and_of_an_accuracy(tmp_path):
    """Model a keeps 90 of 100 images under PGD but 20 under Square, which both are in its worst case."""
    write(tmp_path / "mnist/a-s0", {"clean": first(95), "pgd-20": first(90), "square": first(20)})
    write(tmp_path / "mnist/b-s0", {"clean": first(95), "pgd-20": first(60), "square": first(60)})
    rows = [("A", "+50", "mnist/a", "mnist/b", "pgd-20", 50.0, "w"), ("B", "90", "mnist/a", None, "square", 90.0, "")]
    rows += [("C", "+1", "mnist/a", "mnist/b", "clean", 1.0, "the interval is 0 ± 2")]
    text = report.claims(report.Results(tmp_path), rows).splitlines()
    assert re.fullmatch(r"\| A \| \+50 \| \+30.00 ± \S+ \(n = 100, 1 seed\) \| reproduced \| w \| `a`, `b` \|", text[2])
    assert text[3].startswith("| B | 90 | 20.00 ± ") and "| refuted |" in text[3]
    assert text[-2] == "3 claims: 1 reproduced, 1 refuted, 1 not reproduced."
    assert text[-1].startswith("1 of those") and text[-1].endswith(": 2, after Holm's correction 2.")
    same = report.difference(report.Results(tmp_path), *2 * ["mnist/a"], "square over pgd-20")
    assert same.points.value == -70 and same.p < 1e-9


def test_worst_case_and_common_images(tmp_path):
    """The second evaluation is on 4 of 100 images. `cw-l2` is in another ball, so it is not in the worst case."""
    write(tmp_path / "mnist/a-s0/fast", {"clean": first(95), "pgd-20": first(60)})
    few = np.array([10, 40, 65, 99])
    write(tmp_path / "mnist/a-s0/strong", {"clean": few < 95, "square": few % 2 == 0, "cw-l2": few < 0}, few)
    results = report.Results(tmp_path)
    assert report.accuracy_under(results["mnist/a-s0"], "pgd-20 + square")[::3] == (50.0, 4)  # 10 and 40 of 4
    row = report.table(results, ["clean", "worst case"], [("A", "mnist/a", 99.1)]).splitlines()[-1]
    assert re.fullmatch(r"\| A `a` \| 0 \| 95\.00 ± \S+ <sub>99\.10</sub> \| 60\.00 ± \S+ \|", row)  # not square
    row = report.table(results, ["square", "worst case"], [("A", "mnist/a")]).splitlines()[-1]
    assert [cell.split(" ")[1] for cell in row.split("|")[3:5]] == ["50.00", "50.00"]
    write(tmp_path / "mnist/a-s1", {"clean": first(95)})
    with pytest.raises(report.UserError, match="no evaluation of mnist/a-s1 under square"):
        report.table(report.Results(tmp_path), ["square"], [("A", "mnist/a")])
