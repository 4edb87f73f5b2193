"""benchmarks/report.py: verdicts on differences, and RESULTS.md from the committed evaluations."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(report)


def test_results_md_is_what_the_report_writes(tmp_path):
    report.main(tmp_path)
    text = (ROOT / "RESULTS.md").read_text()
    assert (tmp_path / "RESULTS.md").read_text() == text
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    linked = set(re.findall(r"\]\(figures/([\w-]+\.png)\)", text))
    assert len(drawn) == 7 and drawn <= linked and all((ROOT / "figures" / name).is_file() for name in linked)


def first(count, n=100):
    return np.arange(n) < count


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
