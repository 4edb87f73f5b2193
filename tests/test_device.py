"""Without a GPU: no script and no attack mixes devices, and a training step never waits for the device."""

import importlib
from pathlib import Path

import common
import eval_all

import pytest
import torch
from emulated import Emulated, emulate
from test_attacks import short

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("train_*.py"))


@pytest.mark.parametrize(
    "command", [*SCRIPTS, "train_abcl --adversarial", "train_dsphere --train fgsm", "train_pgd_he --ema 0.9"]
)
def test_a_script_trains_on_a_device_and_waits_for_nothing_in_its_steps(monkeypatch, tmp_path, command):
    script, *flags = command.split()
    emulate(monkeypatch, common)
    flags += "--limit 132 --batch-size 16 --steps 2 --epochs 1 --no-amp --no-compile".split()
    batches, waits = common.Run.batches, []

    def counted(run):
        for batch in batches(run):
            before = Emulated.waits
            yield batch
            waits.append(Emulated.waits - before)

    monkeypatch.setattr(common.Run, "batches", counted)
    with Emulated():
        importlib.import_module(script).main([*flags, "--out", str(tmp_path / "run")])
    assert waits and not any(waits) and Emulated.waits > 0  # the losses of the epoch are read at its end


@pytest.mark.parametrize("name", eval_all.ATTACKS)
def test_an_attack_runs_on_a_device(monkeypatch, small_model, name):
    emulate(monkeypatch, common)
    attack = short(name)
    with Emulated():
        model = small_model.to("meta")
        x, y = torch.rand(3, 1, 8, 8).to("meta"), torch.tensor([1, 2, 3], device="meta")
        rows = eval_all.evaluate(model, x, y, {name: attack} if name != "clean" else {}, eps=0.1, norm=attack.norms[0])[
            "attacks"
        ]
        assert rows[name]["n"] == 3
