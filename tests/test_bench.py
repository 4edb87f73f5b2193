"""bench.py: each section runs, and what it compares is what it says. No time is asserted."""

import json
import math

import bench
import common

import pytest
import torch
import torch.nn.functional as F


@pytest.fixture
def sections(cli, tmp_path, monkeypatch):
    """sections("training", ...) -> the tables of bench.json, {section: {what: row}}, on a tiny network."""
    monkeypatch.setattr(bench, "STEPS", 1)
    monkeypatch.setattr(bench, "METHODS", {name: bench.METHODS[name] for name in ("PGD-AT", "PGD-AT+HE")})

    def run(*names):
        code, out, err = cli("bench", *"--arch wrn-10-1 --size 8 --batch-size 32 --rounds 1 --only".split(), *names)
        assert code == 0 and ("training" in names) == ("PGD-AT computes at" in out), err
        results = json.loads((tmp_path / "bench.json").read_text())
        tables = {name: {row.pop("what"): row for row in results[name]} for name in names}
        assert all(name in out for name in names) and results["peak GiB"] > 0
        assert all(0 < x < math.inf for rows in tables.values() for row in rows.values() for x in row.values())
        return tables

    return run


def test_training_switches_and_attacks_and_the_flop_of_a_forward_pass(sections, tmp_path):
    tables = sections("training", "switches", "attacks")
    he, plain = tables["training"]["PGD-AT+HE"], tables["training"]["PGD-AT"]
    assert he["x PGD-AT"] == pytest.approx(he["img/s"] / plain["img/s"]) and plain["x PGD-AT"] == 1
    switches = {"everything", "without channels_last", "without parameters frozen in the attack", "reference"}
    assert switches <= tables["switches"].keys() and tables["training"].keys() == {"reference", *bench.METHODS}
    assert tables["attacks"].keys() == {"reference", "float32", "with --amp"}
    flop = bench.forward_flop(bench.argparse.Namespace(arch="small_cnn", seed=0), bench.random_data(tmp_path, 2, 8))
    weights = bench.models.build_model("small_cnn", 10, image_size=8).state_dict().values()
    assert 2 * sum(w.numel() for w in weights if w.ndim == 2) < flop < 1e9 and bench.matrix_rate("cpu") > 1e8


def test_the_reference_attack_is_ours_and_also_computes_weight_gradients(small_model):
    x, y, adversarial = torch.rand(6, 1, 8, 8), torch.arange(6), []
    budget = {"eps": 0.1, "step_size": 0.03, "steps": 5}
    for pgd in (bench.reference_pgd, lambda *batch, **budget: common.pgd(*batch, loss=F.cross_entropy, **budget)):
        torch.manual_seed(0)
        adversarial.append(pgd(small_model, x, y, **budget))
    assert torch.allclose(*adversarial, atol=1e-6) and not torch.allclose(adversarial[0], x)
    assert all(p.grad is not None for p in small_model.parameters())
