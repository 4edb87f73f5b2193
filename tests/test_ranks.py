"""Several processes: two ranks train to what one does, evaluate to the same bytes, and the first alone writes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common

ROOT = Path(__file__).resolve().parent.parent
EXACT = ("--optimizer", "sgd", "--lr", "0.01", "--no-amp", "--eps-warmup", "0", "--batch-size", "32")


def run(script, *flags, ranks=1, **environment):
    """The script's finished process, alone or under torchrun, which is free to choose its port."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "--"] if ranks > 1 else []
    command = [sys.executable, *launcher, ROOT / script, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)


def train(out, *flags, script="train_pgd_he.py", ranks=1):
    done = run(script, *EXACT, *flags, "--out", out, ranks=ranks)
    assert done.returncode == 0, done.stderr
    return common.read_file(out / "last.pt"), done.stdout


def farthest(one, two):
    """The largest difference between two checkpoints' weights."""
    assert one["model"].keys() == two["model"].keys()
    return max(float((one["model"][key].double() - two["model"][key].double()).abs().max()) for key in one["model"])


@pytest.fixture
def color(make_npz):
    """Images that are augmented."""
    return make_npz("cifar10_toy", train=164, shape=(12, 12, 3))


@pytest.mark.parametrize("script, steps", [("train_pgd_he.py", 3), ("train_trades_he.py", 3), ("train_fast_he.py", 1)])
def test_two_ranks_train_to_the_weights_of_one(tmp_path, color, script, steps):
    flags = ("--dataset", color, "--arch", "small_cnn", "--epochs", "2", "--steps", steps)
    one, _ = train(tmp_path / "one", *flags, script=script)
    two, told = train(tmp_path / "two", *flags, script=script, ranks=2)
    assert farthest(one, two) < 1e-3  # a gradient of about 0 has either sign, and the attack turns on signs
    for a, b in zip(one["history"], two["history"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert (a["val_clean"], a["train_accuracy"]) == pytest.approx((b["val_clean"], b["train_accuracy"]), abs=2)
    assert "2 ranks" in told and told.count("epoch   2/2") == 1


def test_batch_norm_over_all_ranks_is_that_of_one(tmp_path, color):
    flags = ("--dataset", color, "--arch", "wrn-10-1", "--epochs", "1", "--steps", "1")
    one, _ = train(tmp_path / "one", *flags)
    two, _ = train(tmp_path / "two", *flags, "--sync-bn", ranks=2)
    alone, _ = train(tmp_path / "alone", *flags, ranks=2)
    assert farthest(one, two) < 1e-4 < 1e-3 < farthest(one, alone)


def test_the_parts_of_a_batch_add_up_to_it(tmp_path):
    flags = ("--dataset", "digits", "--limit", "164", "--arch", "small_cnn", "--epochs", "2", "--steps", "2")
    whole, _ = train(tmp_path / "whole", *flags)
    parts, _ = train(tmp_path / "parts", *flags, "--accumulate", "4")
    assert farthest(whole, parts) < 1e-4
    assert parts["scheduler"]["last_epoch"] == whole["scheduler"]["last_epoch"] == 4
    assert parts["history"][1]["loss"] == pytest.approx(whole["history"][1]["loss"], rel=1e-4)


def test_two_ranks_resume_where_they_stopped(tmp_path):
    flags = ("--dataset", "digits", "--limit", "164", "--arch", "small_cnn", "--steps", "2", "--schedule", "constant")
    whole, _ = train(tmp_path / "whole", *flags, "--epochs", "2", ranks=2)
    train(tmp_path / "halves", *flags, "--epochs", "1", ranks=2)
    halves, told = train(tmp_path / "halves", *flags, "--epochs", "2", "--resume", ranks=2)
    assert "resumed after epoch 1 of 2" in told and farthest(whole, halves) == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_rank_has_begun_is_counted_once(rank):
    """The running loss, right predictions and images are summed over the ranks; the steps that went well are not."""
    run = SimpleNamespace(args=SimpleNamespace(device="cpu"), rank=rank, lr=0.1)
    begun = {"totals": torch.tensor([5.0, 3, 8, 2]), "batches": 2, "steps": 2, "seconds": 1.0, "lr": 0.1, "carry": {}}
    assert common.Run._start_figures(run, begun) == 2
    assert run.totals.tolist() == [[5, 3, 8, 2], [0, 0, 0, 2]][rank]


def test_a_replayed_batch_and_an_uneven_one_are_refused(refused, monkeypatch):
    assert "--accumulate" in refused("train_free_he", "--limit", "164", "--accumulate", "2")
    assert "no multiple of 3" in refused("train_pgd_he", "--limit", "164", "--accumulate", "3")
    told = refused("train_pgd_he", "--arch", "resnet18", "--batch-size", "2", "--accumulate", "2", "--limit", "164")
    assert "leaves one image to a part" in told
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert "no multiple of 6" in refused("train_pgd_he", "--limit", "164")


def test_every_rank_draws_its_part_of_one_draw(monkeypatch):
    torch.manual_seed(0)
    x = torch.zeros(4, 1, 3, 3)
    whole = common.random_start(x, 0.5, "linf")
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(common, "rank_and_count", lambda rank=rank: (rank, 2))
        torch.manual_seed(0)
        parts.append(common.random_start(x[:2], 0.5, "linf"))
    assert torch.equal(whole, torch.cat(parts))


def test_two_ranks_evaluate_to_the_bytes_of_one(tmp_path):
    train(tmp_path / "run", "--dataset", "digits", "--limit", "164", "--epochs", "1", "--steps", "1")
    names = "fgsm,bim-20,mim-20,pgd-20,square,deepfool"
    flags = (tmp_path / "run", "--attacks", names, "--n", "60", "--batch-size", "8", "--restarts", "2", "--audit")
    tables = []
    for ranks in (1, 2):
        out = tmp_path / f"by{ranks}"
        done = run("eval_all.py", *flags, "--source", tmp_path / "run", "--out", out, ranks=ranks)
        assert done.returncode == 0, done.stderr
        result = json.loads((out / "eval.json").read_text())
        for row in result["attacks"].values():
            row.pop("seconds", None)
        tables.append((result["attacks"], result["audit"], done.stdout.count("worst case over all attacks")))
    assert tables[0] == tables[1] and tables[0][2] == 1
    assert (tmp_path / "by1" / "verdicts.npz").read_bytes() == (tmp_path / "by2" / "verdicts.npz").read_bytes()
    assert np.load(tmp_path / "by2" / "verdicts.npz")["square"].dtype == bool


def test_the_group_ends_before_python_does(tmp_path):
    """Its threads would otherwise abort the process now and then."""
    script = tmp_path / "script.py"
    script.write_text("""
import sys, weakref
import torch
import common
common.join_ranks("cpu")
torch.optim.SGD([torch.zeros(1, requires_grad=True)])  # imports much of torch
group = weakref.ref(torch.distributed.group.WORLD)
assert group() is not None
common.leave_ranks()
sys.exit(group() is not None)
""")
    done = run(script, ranks=2, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr


def test_no_graph_of_the_attack_outlives_it(small_model):
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4)
    x_adv = common.pgd(small_model, x, y, loss=torch.nn.functional.cross_entropy, eps=0.1, step_size=0.05, steps=2)
    assert x_adv.grad_fn is None and not x_adv.requires_grad and x.grad is None
    assert all(p.grad is None and p.requires_grad for p in small_model.parameters())
