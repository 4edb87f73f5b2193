"""Write RESULTS.md and its figures from the template RESULTS.md.j2 and the evaluations in results/.

    python benchmarks/report.py

A model is DATASET/NAME for all its seeds, DATASET/NAME-sSEED for one; all evaluations in results/DATASET/NAME-sSEED
count, each attack on the most images it was run on. The attack `A + B` is the worst case over both, image by image.

Accuracies are in %, intervals are 95 %: Wilson (1927) for an accuracy, Agresti & Min (2005) for the difference of two
networks on the same images. Over several seeds we give the mean, and the interval from the lowest end of any seed to
the highest. A difference is bold if its p (see Difference) is below 0.05; claims are judged after Holm's correction.
"""

import json
import sys
from collections import ChainMap, Counter
from functools import partial
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import jinja2
import numpy as np
from matplotlib.figure import Figure
from scipy.stats import binomtest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval_all
from common import UserError, cli

ROOT = Path(__file__).resolve().parent.parent
SETTING = ("dataset", "norm", "eps", "step_size", "restarts")  # must be equal for accuracies that stand side by side
TITLES = {"mnist": "MNIST", "cifar10_jpeg": "CIFAR-10 (JPEG copy)", "linf": "Linf", "l2": "L2"}


def read_evaluation(path: Path) -> dict:
    """An eval.json, and as "verdicts" for each attack an int8 array by index in the test set: 1 if the prediction is
    still correct, 0 if not, -1 if the image was not attacked. Of an analysis.json only the "analyses"."""
    try:
        text = path.read_text()
        result = json.loads(text.replace('"right":', '"correct":'))  # so files were written up to commit 868eb2a
        if path.name == "analysis.json":
            return {"n": result["n"], "attacks": {}, "analyses": next(iter(result["models"].values()))}
        with np.load(path.with_name("verdicts.npz")) as arrays:
            result |= {"n": len(arrays["index"]), "verdicts": {}}
            for attack in result["attacks"].keys() - {"worst case"}:
                verdict = result["verdicts"][attack] = np.full(50_000, -1, dtype=np.int8)  # no test set is larger
                verdict[arrays["index"]] = arrays[attack]
                result["attacks"][attack]["own"] = '"right":' in text
                if result["attacks"][attack]["correct"] != (verdict == 1).sum():
                    raise ValueError(f"verdicts.npz contradicts it on {attack}")
    except Exception as error:  # whatever a damaged file leads to; the message must name the file
        raise UserError(f"{path}: not the evaluation of one model: {error!r}") from error
    return result


class Network:
    """All evaluations of one network. Of an attack or analysis that was made twice, the one on more images counts."""

    def __init__(self, name: str, evaluations: list[dict]) -> None:
        for key in (*SETTING, "weights"):
            if len({own[key] for own in evaluations if own.get(key) is not None}) > 1:
                raise UserError(f"the evaluations of {name} differ in {key}")
        self.name, self.facts = name, ChainMap(*reversed(evaluations))
        evaluations = sorted(evaluations, key=lambda own: own["n"], reverse=True)
        merged = lambda key: dict(ChainMap(*(own.get(key) or {} for own in evaluations)))  # noqa: E731
        self.attacks, self.verdicts, self.analyses = map(merged, ("attacks", "verdicts", "analyses"))

    def under(self, attack: str) -> np.ndarray:
        """The verdicts under an attack, or under all of `A + B`."""
        names = attack.split(" + ")
        if missing := set(names) - self.verdicts.keys():
            raise UserError(f"there is no evaluation of {self.name} under {', '.join(sorted(missing))}")
        return np.min([self.verdicts[name] for name in names], axis=0)


class Results(dict[str, dict[int, Network]]):
    """The networks of each DATASET/NAME and DATASET/NAME-sSEED, by seed."""

    def __init__(self, folder: Path) -> None:
        evaluations = {}
        for path in sorted(set(folder.glob("*/*-s[0-9]*/**/*.json")) - set(folder.glob("**/settings-*/*"))):
            evaluations.setdefault("/".join(path.relative_to(folder).parts[:2]), []).append(read_evaluation(path))
        for model, own in evaluations.items():
            name, _, seed = model.rpartition("-s")
            if name in evaluations or not seed.isdecimal():
                raise UserError(f"{model}: its name is not NAME-sSEED, or {name} is a row too")
            self[model] = {int(seed): Network(model, own)}
            self.setdefault(name, {}).update(self[model])

    def __missing__(self, model: str) -> dict[int, Network]:
        raise UserError(f"there is no evaluation of {model}")

    def rows(self, models: list[str], attacks: list[str]) -> list[dict[int, Network]]:
        """The seeds of each model. An attack that one seed of a model has, all seeds of it must have."""
        rows = [self[model] for model in models]
        for seeds in rows:
            made = {attack for attack in attacks for network in seeds.values() if attack in network.verdicts}
            for network in seeds.values():
                if missing := made - network.verdicts.keys():
                    raise UserError(f"there is no evaluation of {network.name} under {', '.join(sorted(missing))}")
        settings = {tuple(network.facts.get(key) for key in SETTING) for seeds in rows for network in seeds.values()}
        if len(settings) > 1:
            raise UserError(f"{', '.join(models)} are not comparable, {', '.join(SETTING)} are {settings}")
        return rows

    def analyses(self, model: str, name: str) -> list[dict]:
        """What an analysis measured, for each seed that has it."""
        found = [network.analyses[name] for network in self[model].values() if name in network.analyses]
        if not found:
            raise UserError(f"there is no evaluation of {model} with {name}")
        return found


class Estimate(NamedTuple):
    """An accuracy in % or a difference in points, its 95 % interval and the number of images."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.2f} ± {max(self.high - self.value, self.value - self.low):.2f}"  # the longer side


def over_seeds(estimates: list[Estimate]) -> Estimate:
    value, low, high, n = zip(*estimates, strict=True)
    return Estimate(fmean(value), min(low), max(high), min(n))


def accuracy(correct: np.ndarray) -> Estimate:
    own = eval_all.accuracy(correct)
    return Estimate(own["accuracy"], own["low"], own["high"], own["n"])


def accuracy_under(seeds: dict[int, Network], attack: str, columns: tuple[str, ...] = ()) -> Estimate:
    """Accuracy over the seeds. The worst case is over all attacks in the ball, in `columns` or not, that every seed
    faced on all images which those in `columns` share."""
    if attack == "worst case":
        faced = []
        for network in seeds.values():
            ball = {key: network.facts[key] for key in ("norm", "eps")}  # cw-l2, for example, has its own
            inside = {name for name in network.verdicts if ball.items() <= network.attacks[name].items()}
            shared = network.under(" + ".join(inside & set(columns))) >= 0
            faced.append({name for name in inside if (network.verdicts[name][shared] >= 0).all()})
        attack = " + ".join(set.intersection(*faced))
    runs = [network.under(attack) for network in seeds.values()]
    return over_seeds([accuracy(run[run >= 0] == 1) for run in runs])


class Difference(NamedTuple):
    """In points, over `seeds`. p is the largest of McNemar's tests, but 1 if the seeds of two networks overlap, or if
    those of one network under two attacks disagree in sign."""

    points: Estimate
    p: float
    seeds: list[str]

    def __str__(self) -> str:
        text = str(self.points).replace("-0.00", "0.00")
        text = text if text.startswith("-") else f"+{text}"
        return f"**{text}**" if self.p < 0.05 else text


def difference(results: Results, a: str, b: str, attack: str) -> Difference:
    """Accuracy of a minus that of b under `attack`, or under both of "X over Y", for the seeds that both have, or, if
    they share none, for each seed of a and each of b."""
    attacks = (attack.split(" over ") * 2)[:2]
    ours, theirs = results.rows([a, b], " + ".join(attacks).split(" + "))
    pairs = {str(seed): (ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())}
    pairs = pairs or {f"{s} over {t}": (ours[s], theirs[t]) for s in ours for t in theirs}
    runs = [np.stack([net.under(own) for net, own in zip(pair, attacks, strict=True)]) for pair in pairs.values()]
    runs = [pair[:, (pair >= 0).all(axis=0)] == 1 for pair in runs]  # on the images that both have
    x, y = ([100 * int(pair[i].sum()) / pair.shape[1] for pair in runs] for i in (0, 1))
    tests = [eval_all.paired_difference(second, first) for first, second in runs]
    differences = [Estimate(t["difference"], t["low"], t["high"], r.shape[1]) for t, r in zip(tests, runs, strict=True)]
    total = over_seeds(differences)._replace(value=fmean(x) - fmean(y))
    apart = min(x) > max(y) or max(x) < min(y) or (a == b and len({own.value > 0 for own in differences}) == 1)
    return Difference(total, max(test["p"] for test in tests) if apart else 1.0, [*pairs])


def holm(p: list[float]) -> list[float]:
    """The values of p, adjusted for their number (Holm 1979)."""
    order = np.argsort(p)
    adjusted = np.maximum.accumulate((len(p) - np.arange(len(p))) * np.array(p)[order]).clip(max=1)
    return adjusted[np.argsort(order)].tolist()


def verdict(value: float, figure: float, p: float, is_accuracy: bool) -> str:
    """Of our value beside the paper's figure. p tests a difference against 0, an accuracy against the figure."""
    half = abs(value) >= abs(figure) / 2
    if is_accuracy and value >= figure:
        return "reproduced"
    if p >= 0.05:
        return "not reproduced"
    if is_accuracy:
        return "smaller" if half else "refuted"
    return "refuted" if value * (figure or 1) < 0 else "reproduced" if half else "smaller"


def claims(results: Results, rows: list[tuple]) -> str:
    """A line a claim: (claim, the paper's words, model, other model, attack, the paper's figure, a clause why). The
    figure is a difference in points, 0 for one of unknown size; without another model (none) an accuracy, and ours is
    the worst case on the images of the attack."""
    measured = []
    for _, _, model, other, attack, figure, _ in rows:
        if other is None:
            seeds = results.rows([model], [attack])[0]
            own = [accuracy_under({seed: network}, "worst case", (attack,)) for seed, network in seeds.items()]
            p = max(binomtest(round(one.value * one.n / 100), one.n, figure / 100).pvalue for one in own)
            measured.append(Difference(over_seeds(own), p, [*map(str, seeds)]))
        else:
            measured.append(difference(results, model, other, attack))
    before = [own.p for own in measured]
    after, words, undecided = holm(before), Counter(), 0
    lines = ["| claim (MNIST unless named) | the paper | ours | verdict | why | rows |", "|" + " --- |" * 6]
    for (claim, paper, model, other, _, figure, why), own, p in zip(rows, measured, after, strict=True):
        word = verdict(own.points.value, figure, p, other is None)
        words[word] += 1
        undecided += word == "not reproduced" and figure != 0 and own.points.low <= figure <= own.points.high
        text = str(own.points) if other is None else str(own).strip("*")
        about = f"n = {own.points.n:,}, {len(own.seeds)} seed{'s' * (len(own.seeds) > 1)}"
        lines.append(f"| {claim} | {paper} | {text} ({about}) | {word} | {why} | {row_names(model, other)} |")
    tally = ", ".join(f"{count} {word}" for word, count in words.most_common())
    significant = [sum(p < 0.05 for p in own) for own in (before, after)]
    tests = "p < 0.05: {}, after Holm's correction {}.".format(*significant)
    unclear = f"{undecided} of those not reproduced have an interval that includes the paper's figure."
    return "\n".join([*lines, "", f"{len(rows)} claims: {tally}.\n{unclear} {tests}"])


def audit(results: Results, model: str) -> str:
    """How many checks of the audit failed, for each seed."""
    audits = [network.facts.get("audit") for network in results[model].values()]
    if not all(audits):
        return "not made"
    failed = [sum(not check["passed"] for check in checks) for checks in audits]
    return f"fails {' and '.join(map(str, failed))} of {len(audits[0])}" if any(failed) else "passes"


def markdown(heads: list[str], rows: list[list[str]], paper: list[list[float | None]], form: str) -> str:
    """A table with the columns label, seeds and `heads`; in those the paper's figures in small type."""
    lines = [["", "seeds", *heads], ["---"] * (len(heads) + 2)]
    for row, figures in zip(rows, paper, strict=True):
        small = ["" if figure is None else f" <sub>{figure:{form}}</sub>" for figure in figures]
        lines.append([(cell + figure).strip() for cell, figure in zip_longest(row, ["", "", *small], fillvalue="")])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def row_names(*models: str | None) -> str:
    return ", ".join(dict.fromkeys(f"`{Path(model).name}`" for model in models if model))


def images(estimates: list[Estimate]) -> str:
    return f"n = {' / '.join(f'{n:,}' for n in sorted({estimate.n for estimate in estimates}))}"


def table(results: Results, columns: list[str], rows: list[tuple]) -> str:
    """Accuracies. Rows are label, model, and the paper's figure for each column, none where it has none."""
    found = results.rows([model for _, model, *_ in rows], columns)
    lines, estimates = [], {column: [] for column in columns}
    for (label, model, *_), seeds in zip(rows, found, strict=True):
        own = any(network.attacks.get("autoattack", {}).get("own") for network in seeds.values())
        lines.append([f"{label} {row_names(model)}{' †' * own}", ", ".join(map(str, seeds))])
        for column in columns:
            text = audit(results, model) if column == "audit" else ""
            if column == "worst case" or all(column in network.verdicts for network in seeds.values()):
                estimates[column].append(accuracy_under(seeds, column, columns))
                text = str(estimates[column][-1])
            lines[-1].append(text)
    if unknown := [column for column in columns if not estimates[column] and column != "audit"]:
        raise UserError(f"no model of this table was evaluated under {', '.join(unknown)}")
    heads = [f"{column}<br>{images(own)}" if own else column for column, own in estimates.items()]
    return markdown(heads, lines, [paper for _, _, *paper in rows], ".2f")


def compare(results: Results, attacks: list[str], rows: list[tuple]) -> str:
    """Differences in points. Rows are label, two models, and the paper's difference for each attack."""
    lines, points = [], {attack: [] for attack in attacks}
    for label, a, b, *_ in rows:
        cells = [difference(results, a, b, attack) for attack in attacks]
        for attack, cell in zip(attacks, cells, strict=True):
            points[attack].append(cell.points)
        seeds = " / ".join(dict.fromkeys(", ".join(cell.seeds) for cell in cells))
        lines.append([f"{label} {row_names(a, b)}", seeds, *map(str, cells)])
    heads = [f"{attack}<br>{images(own)}" for attack, own in points.items()]
    return markdown(heads, lines, [paper for _, _, _, *paper in rows], "+.2f")


def setting(results: Results, models: list[str]) -> str:
    facts = next(iter(results.rows(models, [])[0].values())).facts
    return f"{TITLES.get(facts['dataset'], facts['dataset'])}, {TITLES[facts['norm']]} eps {facts['eps']:.3g}"


def plot(at: list[float], series: dict[str, list[Estimate]], xlabel: str, ylabel: str) -> Figure:
    """Each series has an estimate for each of `at`."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    for i, (name, estimates) in enumerate(series.items()):
        value, low, high = np.array(estimates)[:, :3].T
        style = {"label": name, "marker": "osD^vP"[i], "markersize": 4, "linewidth": 1, "capsize": 2}
        beside = 0.005 * (i - (len(series) - 1) / 2) * max(at)  # intervals must not hide each other
        axis.errorbar(np.array(at) + beside, value, yerr=[value - low, high - value], **style)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    return figure


def sweep(results: Results, out: Path, name: str, attack: str, x: str, values: list, rows: list) -> str:
    """A figure: accuracy against what is varied. Rows are label and model, with * for the value."""
    models = [model.replace("*", str(value)) for _, model in rows for value in values]
    flat = [accuracy_under(seeds, attack) for seeds in results.rows(models, [attack])]
    series = {label: flat[i * len(values) :][: len(values)] for i, (label, _) in enumerate(rows)}
    about = f"{setting(results, models)}, {images(flat)}, seeds {' and '.join(map(str, results[models[0]]))}"
    plot(values, series, x, f"accuracy under {attack.upper()} (%)\n{about}").savefig(out / name, dpi=200)
    return f"![{attack}; {x}](figures/{name})"


def curves(results: Results, out: Path, name: str, rows: list[tuple]) -> str:
    """Accuracy by eps under the stronger of the attacks of the analysis. Rows are label and model, its first seed."""
    series = {}
    for label, model in rows:
        found = results.analyses(model, "curves")[0]
        curve = found.get("axes", found)["eps"]  # "axes" in older files
        counts = np.min([*curve["correct"].values()], axis=0)
        series[label] = [accuracy(np.arange(found["n"]) < count) for count in counts]
    about, eps = setting(results, [model for _, model in rows]).split(" eps ")
    ylabel = f"accuracy (%), seed 0\n{about}, {images([own[0] for own in series.values()])}"
    xlabel = "eps (dashed: that of the tables)\nthe stronger of PGD-20 on the cross-entropy and on the logit margin"
    figure = plot(curve["at"], series, xlabel, ylabel)
    figure.axes[0].axvline(float(eps), color="black", linestyle="--", linewidth=1)
    figure.savefig(out / name, dpi=200)
    return f"![accuracy by eps](figures/{name})"


def main(out: Path = ROOT) -> None:
    """Write out/RESULTS.md and out/figures/."""
    results, figures = Results(ROOT / "benchmarks" / "results"), out / "figures"
    figures.mkdir(exist_ok=True)
    names = {f.__name__: partial(f, results) for f in (claims, difference, table, compare)}
    names |= {f.__name__: partial(f, results, figures) for f in (sweep, curves)}
    loader = jinja2.FileSystemLoader(ROOT / "benchmarks")
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    template = environment.get_template("RESULTS.md.j2")
    (out / "RESULTS.md").write_text(template.render(names, results=results, accuracy_under=accuracy_under, mean=fmean))


if __name__ == "__main__":
    cli(main)
