"""Two ranks under torchrun, without `--` before the script: they train together, and rank 0 alone writes."""

import importlib
import os
import subprocess
import sys
import weakref
from pathlib import Path

import common
import train_pgd_he

import pytest
import torch
from torch.distributed import run as torchrun

ROOT = Path(__file__).resolve().parent.parent
QUICK = "--limit 164 --arch wrn-10-1 --batch-size 32 --steps 1 --no-amp --schedule constant --epochs".split()


class Scale(torch.nn.Module):
    """A loss with a parameter, and a buffer that differs from rank to rank."""

    def __init__(self):
        super().__init__()
        self.s = torch.nn.Parameter(torch.tensor(15.0))
        self.register_buffer("mean", torch.tensor(0.0))

    def forward(self, logits, y):
        self.mean += logits.detach().mean()
        return common.margin_ce(logits, y, self.s, 0.2)


def train_without_batch_statistics(out):
    """An epoch in eval mode, so that the mean over two halves of a batch is that of the whole."""
    args = train_pgd_he.parse_args([*QUICK, "1", *"--optimizer sgd --lr 0.1 --ema 0.5 --out".split(), str(out)])
    data, criterion = common.load_data(args.dataset, limit=args.limit), Scale()
    run = common.Run(args, common.build_model(args, data), data, criterion)
    for _ in run.epochs():
        for x, y in list(run.batches()):
            logits = run.model.eval()(x)
            run.step(criterion(logits, y), logits, y)
        run.finish_epoch()


def on_each_rank():
    """What torchrun starts: this file, with an empty directory."""
    out = Path(sys.argv[1])
    train_without_batch_statistics(out / "two ranks")
    groups.append(weakref.ref(torch.distributed.group.WORLD))
    common.init_distributed = lambda device: device  # done: a process can join only once
    finish_epoch = common.Run.finish_epoch

    def finish_and_compare(run):
        """All ranks have the same batch statistics, trained and averaged."""
        finish_epoch(run)
        for net in (run.model, run.evaluated):
            mean = [net.bn1.running_mean.clone()]
            common.all_mean(mean)
            assert torch.equal(mean[0], net.bn1.running_mean)

    common.Run.finish_epoch = finish_and_compare
    for name, *flags in (("whole", "2"), ("part", "1"), ("part", "2", "--resume")):
        train_pgd_he.main([*QUICK, *flags, "--ema", "0.5", "--sync-bn", "--out", str(out / name)])
        common.barrier()  # rank 0 may still be writing, as at the end of a process
    with pytest.raises(common.UserError, match="of one process in mid-epoch"):
        train_pgd_he.main([*QUICK, "2", "--resume", "--out", str(out / "stopped")])
    common.barrier()  # torchrun ends the other rank when one has failed
    train_pgd_he.main(["--batch-size", "33"])


def test_two_ranks_take_the_steps_of_one_and_resume_bit_for_bit(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__, tmp_path]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    (tmp_path / "stopped").mkdir()
    common.save({"format": common.FORMATS[-1], "begun": {"batches": 1}}, tmp_path / "stopped" / "last.pt")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "test_ranks.py: error: --batch-size 33" in done.stderr
    assert "exitcode  : 2 " in done.stderr and "exitcode  : 9 " not in done.stderr, done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("epoch ")] == list("11212")
    assert done.stderr.count("--sync-bn needs CUDA") == 3 and done.stdout.count("resumed after epoch 1") == 1
    train_without_batch_statistics(tmp_path / "one rank")
    runs = ("one rank", "two ranks", "whole", "part")
    one, two, whole, part = (common.read_file(tmp_path / run / "last.pt") for run in runs)
    for state in ("model", "trained"):
        assert all(torch.equal(value, part[state][key]) for key, value in whole[state].items())
    for state in ("model", "trained", "criterion"):
        assert all(torch.allclose(value, two[state][key], atol=1e-5) for key, value in one[state].items()), state
    assert one["criterion"]["s"] != 15 and one["criterion"]["mean"] != 0
    for key in ("loss", "train_accuracy", "val_clean"):
        assert one["history"][0][key] == pytest.approx(two["history"][0][key], rel=1e-4), key


def test_torchrun_takes_no_flag_of_ours_for_its_own(monkeypatch):
    """It reads the whole command line, and abbreviations too, before it hands the script's part on."""
    parsers = []
    monkeypatch.setattr(common.Parser, "parse_args", lambda self, argv: parsers.append(self) or sys.exit(0))
    for script in sorted(path.stem for path in ROOT.glob("train_*.py")):
        with pytest.raises(SystemExit):
            importlib.import_module(script).parse_args([])
    for flag in {flag for parser in parsers for action in parser._actions for flag in action.option_strings}:
        args = torchrun.get_args_parser().parse_args(["--nproc_per_node=2", "script.py", flag, "1"])
        assert args.training_script_args == [flag, "1"]


if __name__ == "__main__":
    groups = []
    try:
        common.cli(on_each_rank)
    except SystemExit as stop:
        sys.exit(9 if groups[0]() else stop.code)  # the group's threads could abort the process at exit
