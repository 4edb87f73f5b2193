"""Without a GPU: no script and no attack mixes devices, and a training step never waits for the device."""

import importlib
from pathlib import Path

import common
import eval_all

import pytest
import torch
from emulated import Emulated, emulate
from test_attacks import short
from torch._dynamo.testing import CompileCounter

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("train_*.py"))
VARIANTS = ["train_abcl --adversarial", "train_dsphere --train fgsm", "train_pgd_he --ema 0.9"]


@pytest.mark.parametrize("command", [*SCRIPTS, *VARIANTS])
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
    attack, x = short(name), torch.rand(3, 1, 8, 8)
    y = small_model(x).argmax(1)
    with Emulated():
        model, x, y = small_model.to("meta"), x.to("meta"), y.to("meta")
        attacks = {} if name == "clean" else {name: attack}
        rows = eval_all.evaluate(model, x, y, attacks, eps=0.1, norm=attack.norms[0])["attacks"]
        assert rows[name]["n"] == 3


def run(flags, out):
    flags = f"--limit 132 --batch-size 16 --steps 2 {flags}".split()
    importlib.import_module("train_pgd_he").main([*flags, "--out", str(out)])


def test_a_missing_compiler_is_one_line_and_the_run_goes_on(monkeypatch, tmp_path, capsys):
    def fail(*_, **__):
        raise RuntimeError("no C compiler\n  in a long text")

    monkeypatch.setattr(torch, "compile", fail)
    run("--epochs 1 --compile", tmp_path / "run")
    assert capsys.readouterr().err.startswith("warning: no torch.compile (no C compiler in a long text)\n")
    assert not common.read_file(tmp_path / "run" / "last.pt")["args"]["compile"]


@pytest.mark.parametrize("arch", ["small_cnn", "dsphere_cifar", "resnet18", "wrn-34-10"])
def test_large_networks_are_compiled_on_cuda(monkeypatch, arch):
    asked = []
    monkeypatch.setattr(common, "init_distributed", lambda device: "cuda")
    monkeypatch.setattr(common, "supports_bf16", lambda device: True)
    monkeypatch.setattr(torch, "compile", lambda function, disable: asked.append(not disable) or function)
    importlib.import_module("train_pgd_he").parse_args(["--arch", arch])
    assert asked == [arch in ("resnet18", "wrn-34-10")]


def test_the_held_out_pass_compiles_nothing(monkeypatch, tmp_path):
    counter, compiled = CompileCounter(), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model: compiled(model, backend=counter))
    torch._dynamo.reset()
    run("--epochs 2 --compile --arch wrn-10-1", tmp_path / "run")
    assert counter.frame_count == 2  # the attack and the training pass


def test_fast_at_computes_no_gradient_of_the_weights_in_its_attack(small_model):
    passes = []
    small_model.train()
    small_model.register_forward_hook(lambda net, *_: passes.append((net.training, net.fc.weight.requires_grad)))
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4)
    importlib.import_module("train_fast_he").fast_step(small_model, x, y, 15.0, 0.1, 0.1)
    assert passes == [(True, False)] and small_model.training and all(p.requires_grad for p in small_model.parameters())


def test_the_best_epoch_is_serialized_once(monkeypatch, tmp_path):
    saved, save = [], torch.save
    monkeypatch.setattr(torch, "save", lambda *args: saved.append(1) or save(*args))
    run("--epochs 1", tmp_path / "run")
    first, last = ((tmp_path / "run" / name).read_bytes() for name in ("best.pt", "last.pt"))
    assert len(saved) == 1 and first == last


@pytest.mark.parametrize("device, ranks, expected", [("cuda", 1, "cuda"), ("cuda", 2, "cuda:1"), ("cpu", 2, "cpu")])
def test_a_rank_has_its_own_device(monkeypatch, device, ranks, expected):
    joined, chosen = [], []
    for key, value in {"WORLD_SIZE": ranks, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(common.dist, "init_process_group", lambda **options: joined.append(options))
    monkeypatch.setattr(common.dist, "get_rank", lambda: 0)
    assert common.init_distributed(device) == expected
    assert chosen == {"cuda": [0], "cuda:1": [1], "cpu": []}[expected] and len(joined) == (ranks > 1)
    for options in joined:
        assert options["backend"] == ("nccl" if device == "cuda" else "gloo")
        assert options.get("device_id") == (torch.device("cuda:1") if device == "cuda" else None)
        assert 3600 <= options["timeout"].total_seconds() <= 24 * 3600
