"""Two ranks under torchrun, without `--` before the script: they train together, and rank 0 alone writes."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import common

import pytest
import torch
from torch.distributed import run as torchrun

ROOT = Path(__file__).resolve().parent.parent
QUICK = ("--dataset", "digits", "--limit", "164", "--arch", "wrn-10-1", "--batch-size", "32", "--steps", "2")


def run(script, *flags):
    """A script's finished process under torchrun, which chooses its port."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)


def train(out, *flags):
    done = run("train_pgd_he.py", *QUICK, *flags, "--out", out)
    assert done.returncode == 0, done.stderr
    return common.read_file(out / "last.pt"), done


def test_two_ranks_train_and_resume_bit_for_bit(tmp_path):
    flags = ("--schedule", "constant", "--sync-bn", "--epochs")
    whole, done = train(tmp_path / "whole", *flags, 2)
    assert done.stdout.count("epoch   2/2") == 1 and done.stderr.count("--sync-bn needs CUDA") == 1
    train(tmp_path / "halves", *flags, 1)
    halves, done = train(tmp_path / "halves", *flags, 2, "--resume")
    assert "resumed after epoch 1" in done.stdout
    assert all(torch.equal(whole["model"][key], halves["model"][key]) for key in whole["model"])


SUM = """
import torch, common, models, train_pgd_he
def main():
    args = train_pgd_he.parse_args({flags})
    data = common.load_data(args.dataset, limit=args.limit)
    run = common.Run(args, common.build_model(args, data), data)
    for _ in run.epochs():
        batches = list(run.batches())
        for x, y in batches:
            run.model.zero_grad()
            logits = run.model.eval()(x)  # without batch statistics the mean over two halves is that of the whole
            run.step(common.margin_ce(logits, y, 15, 0.2), logits, y)
        run.finish_epoch()
common.cli(main)
"""


def test_gradients_are_averaged_so_that_two_ranks_take_the_steps_of_one(tmp_path):
    script = tmp_path / "script.py"
    weights = []
    for ranks in (1, 2):
        flags = [
            *QUICK,
            "--epochs",
            "1",
            "--no-amp",
            "--optimizer",
            "sgd",
            "--lr",
            "0.1",
            "--out",
            tmp_path / str(ranks),
        ]
        script.write_text(SUM.format(flags=list(map(str, flags))))
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = run(script) if ranks == 2 else subprocess.run([sys.executable, script], env=environment)
        assert done.returncode == 0
        weights.append(common.read_file(tmp_path / str(ranks) / "last.pt"))
    one, two = (content["model"] for content in weights)
    assert all(torch.allclose(one[key].double(), two[key].double(), atol=1e-5) for key in one)
    assert weights[0]["history"][0]["loss"] == pytest.approx(weights[1]["history"][0]["loss"], rel=1e-4)


def test_the_group_ends_before_python_does(tmp_path):
    """Its threads would otherwise abort the process now and then."""
    script = tmp_path / "script.py"
    script.write_text("""
import sys, weakref
import common
import torch
def main():
    common.init_distributed("cpu")
    torch.optim.SGD([torch.zeros(1, requires_grad=True)])  # imports much of torch
    globals()["group"] = weakref.ref(torch.distributed.group.WORLD)
    assert group() is not None
common.cli(main)
sys.exit(group() is not None)
""")
    done = run(script)
    assert done.returncode == 0, done.stderr


def test_an_uneven_batch_is_refused():
    done = run("train_pgd_he.py", "--limit", "164", "--batch-size", "33")
    assert (
        done.returncode
        and "train_pgd_he.py: error: --batch-size 33: needed is a multiple of the 2 ranks" in done.stderr
    )


@pytest.mark.parametrize("script", sorted(path.stem for path in ROOT.glob("train_*.py")))
def test_torchrun_takes_no_flag_of_ours_for_its_own(script, monkeypatch):
    """It reads the whole command line, and abbreviations too, before it hands the script's part on."""
    parsers = []
    monkeypatch.setattr(common.Parser, "parse_args", lambda self, argv: parsers.append(self) or sys.exit(0))
    with pytest.raises(SystemExit):
        importlib.import_module(script).parse_args([])
    for action in parsers[0]._actions:
        for flag in action.option_strings:
            args = torchrun.get_args_parser().parse_args(["--nproc_per_node=2", f"{script}.py", flag, "1"])
            assert args.training_script_args == [flag, "1"]
