"""Wrong input, each answered by one line and exit code 2, through the same path that a user takes."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import eval_all
import models
import train_abcl
import train_angular_at
import train_dsphere
import train_fast_he
import train_free_he
import train_mart
import train_mmc
import train_pgd_he
import train_trades_he
import train_weightpen

ROOT = Path(__file__).resolve().parent.parent
WITH_HEADS = ("train_pgd_he", "train_trades_he", "train_angular_at", "train_alp_he", "train_free_he", "train_fast_he")
SCRIPTS = (*WITH_HEADS, "train_mart", "train_mmc", "train_weightpen", "train_abcl", "train_dsphere")

BAD_FLAGS = {
    "unknown dataset 'nope'": ["--dataset", "nope"],
    "eval_all.py ... --corruptions DIR reads them": ["--dataset", "cifar10-c"],
    "missing.npz: no such file": ["--dataset", "missing.npz"],
    "argument --eps: 'abc' is not a number or a fraction": ["--eps", "abc"],
    "argument --eps: '8/' is not a number": ["--eps", "8/"],
    "argument --eps: '8/0' is not a number": ["--eps", "8/0"],
    "argument --eps: 8 is out of range": ["--eps", "8"],
    "argument --eps: -0.1 is out of range": ["--eps=-0.1"],
    "argument --eps: nan is out of range": ["--eps", "nan"],
    "argument --lr: inf is out of range": ["--lr", "inf"],
    "argument --lr: 1e999 is out of range": ["--lr", "1e999"],
    "argument --steps: '2.5' is not a whole number": ["--steps", "2.5"],
    "argument --epochs: 0 is out of range": ["--epochs", "0"],
    "is out of range: between 1 and 1e+09": ["--epochs", "1" + "0" * 400],
    "argument --device: 'tpu' is not to be had": ["--device", "tpu"],
    "argument --device: 'meta' is not to be had": ["--device", "meta"],
    "unrecognized arguments: --epss": ["--epss", "0.1"],
    "unknown arch 'vgg'": ["--arch", "vgg"],
    "depth of wrn-D-W": ["--arch", "wrn-12-1"],
    "--batch-size 5000": ["--batch-size", "5000"],
    "90 training images are too few": ["--limit", "90"],
    "expected one argument": ["--dataset"],
}


@pytest.mark.parametrize("complaint", BAD_FLAGS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_bad_flag_is_one_line(refused, script, complaint):
    line = refused(script, *BAD_FLAGS[complaint])
    assert complaint in line and line.startswith(f"{script}.py: error: ")


@pytest.mark.parametrize("script", WITH_HEADS)
def test_a_head_without_meaning_is_one_line(refused, script):
    assert "argument --head: invalid choice: 'cosine'" in refused(script, "--head", "cosine")
    assert "head he alone" in refused(script, "--head", "mhe", "--no-fn")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("name, shape", [
    ("digits", (8, 8)), ("mnist", (28, 28)), ("cifar10", (32, 32, 3)), ("cifar100", (32, 32, 3)), ("mine", (32, 32, 3)),
])  # fmt: skip
def test_every_scripts_defaults_begin_a_run_on_every_dataset(make_npz, monkeypatch, tmp_path, script, name, shape):
    class Begun(Exception):
        pass

    def begin(self, args, model, data, **options):
        assert args.epochs and model.options["arch"] == args.arch
        raise Begun

    monkeypatch.setattr(common.Run, "__init__", begin)
    with pytest.raises(Begun):
        importlib.import_module(script).main(["--dataset", str(make_npz(name, shape=shape)), "--out", str(tmp_path)])


def test_out_that_cannot_be_made_is_one_line(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file/run: Not a directory" in refused("train_pgd_he", "--out", tmp_path / "file" / "run")


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of an untrained small model on 3x32x32 images, as a Run writes it."""
    model = models.build_model("wrn-10-1", 10, head="he")
    content = {
        "format": common.FORMAT,
        "model": model.state_dict(),
        "model_options": model.options,
        "args": {"dataset": "digits", "data_dir": "data"},
    }
    torch.save(content, tmp_path / "good.pt")
    return tmp_path / "good.pt"


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("payload-ran"),))


def broken(kind, good):
    """A file that is no good checkpoint, and what must be said of it."""
    content, path = common.read_file(good), good.with_name("broken.pt")
    if kind == "truncated":
        path.write_bytes(good.read_bytes()[:5000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "png":
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    elif kind == "list":
        torch.save([1, 2, 3], path)
    elif kind == "pickle":
        torch.save({"format": common.FORMAT, "model": Payload()}, path)
    elif kind == "foreign":
        torch.save({"epoch": 3, "weights": "none"}, path)
    elif kind == "wrong arch":
        torch.save(content | {"model_options": content["model_options"] | {"arch": "wrn-16-1"}}, path)
    elif kind == "unknown arch":
        torch.save(content | {"model_options": content["model_options"] | {"arch": "../vgg"}}, path)
    elif kind == "no options":
        torch.save({"format": common.FORMAT, "args": content["args"]}, path)
    elif kind == "no args":
        torch.save(content | {"args": []}, path)
    return path


FAULTS = {
    "truncated": "truncated, damaged, or no checkpoint",
    "empty": "truncated, damaged, or no checkpoint",
    "text": "truncated, damaged, or no checkpoint",
    "png": "truncated, damaged, or no checkpoint",
    "pickle": "holds Python objects, not tensors alone",
    "list": "holds a list",
    "foreign": "neither a checkpoint of this project nor a plain state dict",
    "wrong arch": "do not fit arch wrn-16-1",
    "unknown arch": "unknown arch '../vgg'",
    "no options": "do not fit",
    "no args": "does not say what it was trained on",
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_file_that_is_no_good_checkpoint_is_one_line(refused, checkpoint, tmp_path, kind):
    path = broken(kind, checkpoint)
    line = refused("eval_all", path)
    assert FAULTS[kind] in line and str(path) in line
    assert not (tmp_path / "payload-ran").exists()


@pytest.mark.parametrize("arguments, complaint", [
    ([], "name a checkpoint"),
    (["none.pt"], "none.pt: no such checkpoint"),
    (["GOOD", "--attacks", "pgd-20,magic"], "unknown attack 'magic'"),
    (["GOOD", "--dataset", "nope"], "unknown dataset 'nope'"),
    (["GOOD", "--dataset", "digits"], "takes images (3, 32, 32) in 10 classes, but digits has (1, 8, 8) in 10"),
    (["GOOD", "--n", "0"], "argument --n: 0 is out of range"),
    (["--model", "nowhere.py:make"], "there is no Python file nowhere.py"),
    (["--model", "no_colon.py"], "FILE.py:FUNCTION"),
    (["--model", "user.py:absent"], "AttributeError"),
    (["--model", "user.py:raises"], "ZeroDivisionError"),
    (["--model", "user.py:number"], "returned a int, not an nn.Module"),
    (["--model", "user.py:identity", "--dataset", "digits"], "must return logits (B, 10)"),
    (["--model", "user.py:convolution", "--dataset", "digits"], "fails on images (1, 8, 8)"),
    (["--model", "user.py:identity"], "which dataset?"),
    (["--model", "user.py:votes", "--dataset", "digits"], "returns logits in torch.int64"),
    (["--model", "user.py:halves", "--dataset", "digits"], "returns logits in torch.bfloat16"),
])  # fmt: skip
def test_eval_all_answers_bad_input_in_one_line(refused, checkpoint, tmp_path, arguments, complaint):
    (tmp_path / "user.py").write_text(
        "import torch\n"
        "raises = lambda: 1 / 0\n"
        "number = lambda: 3\n"
        "identity = torch.nn.Identity\n"
        "convolution = lambda: torch.nn.Conv2d(3, 10, 3)\n"
        "class Cast(torch.nn.Module):\n"
        "    def __init__(self, dtype):\n"
        "        super().__init__()\n"
        "        self.dtype = dtype\n"
        "    def forward(self, x):\n"
        "        return x.flatten(1)[:, :10].to(self.dtype)\n"
        "votes = lambda: Cast(torch.int64)\n"
        "halves = lambda: Cast(torch.bfloat16)\n"
    )
    assert complaint in refused("eval_all", *[checkpoint if word == "GOOD" else word for word in arguments])


def test_a_bare_state_dict_asks_what_it_is_and_a_wrong_answer_is_one_line(refused, make_npz, tmp_path):
    make_npz("cifar10", shape=(32, 32, 3))
    torch.save(models.build_model("wrn-10-1", 10).state_dict(), tmp_path / "bare.pt")
    assert "--arch, --head and --dataset" in refused("eval_all", tmp_path / "bare.pt")
    flags = ["--dataset", "cifar10", "--data-dir", tmp_path, "--arch"]
    assert "do not fit arch wrn-16-1" in refused("eval_all", tmp_path / "bare.pt", *flags, "wrn-16-1")
    assert "do not fit arch wrn-10-1" in refused("eval_all", tmp_path / "bare.pt", *flags, "wrn-10-1", "--head", "he")


def test_models_of_different_datasets_are_not_compared(refused, checkpoint, tmp_path):
    content = common.read_file(checkpoint)
    torch.save(content | {"args": {"dataset": "cifar10", "data_dir": "data"}}, tmp_path / "other.pt")
    assert "which dataset? (digits, cifar10)" in refused("eval_all", checkpoint, tmp_path / "other.pt")


def test_autoattack_official_without_the_package_says_how_to_get_it(refused, checkpoint, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "autoattack" else find(name))
    assert "pip install git+https://github.com/fra31/auto-attack" in refused(
        "eval_all", checkpoint, "--attacks", "autoattack-official"
    )


def test_the_shell_sees_exit_code_2_and_one_line():
    command = [sys.executable, str(ROOT / "train_angular_at.py"), "--dataset", "nope"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "unknown dataset" in result.stderr


@pytest.mark.parametrize(
    "dataset, source", [("digits", "ours"), ("cifar10", "HE, Sec. 4, and its code"), ("mine.npz", "ours")]
)
def test_help_shows_the_defaults_in_force_and_their_source(cli, dataset, source):
    code, out, _ = cli("train_pgd_he", "--dataset", dataset, "--head", "mhe", "--help")
    expected = vars(train_pgd_he.parse_args(["--dataset", dataset, "--head", "mhe"]))
    assert code == 0
    text = " ".join(out.split())
    for flag in ("arch", "epochs", "lr", "weight_decay", "steps"):
        usage = text.index(f" --{flag.replace('_', '-')} {flag.upper()} ", text.index("options:"))
        assert f"(default: {expected[flag]}; {source})" in text[usage : usage + 320]
    assert "(default: 0.1; HE, Sec. 4 and C.5)" in text


def test_eval_alls_help_names_every_attack(cli):
    code, out, _ = cli("eval_all", "--help")
    named = [name if name.endswith("-l2") else re.sub(r"\d+", "N", name) for name in eval_all.ATTACKS]
    assert code == 0 and [name for name in named if name not in out] == []


def test_a_folder_for_results_that_cannot_be_made_is_found_before_the_attacks_run(
    refused, checkpoint, make_npz, tmp_path
):
    make_npz("cifar10", shape=(32, 32, 3))
    flags = ["--dataset", "cifar10", "--data-dir", tmp_path, "--out"]
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "x"):
        assert str(out) in refused("eval_all", checkpoint, *flags, out)


def test_arch_for_a_checkpoint_that_says_what_it_is_is_refused(refused, checkpoint, make_npz, tmp_path):
    make_npz("cifar10", shape=(32, 32, 3))
    flags = ["--dataset", "cifar10", "--data-dir", tmp_path, "--arch", "wrn-10-1"]
    assert "--arch is for a bare state dict" in refused("eval_all", checkpoint, *flags)


def test_control_c_is_one_line_and_130(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        common.cli(interrupted)
    assert stop.value.code == 130 and capsys.readouterr().err.count("\n") == 1


def test_the_papers_defaults():
    def defaults(script, *argv):
        return vars(script.parse_args(list(argv)))

    shared = dict(
        epochs=100, batch_size=128, optimizer="sgd", schedule="multistep", steps=10, eps_warmup=0.0, scale=15.0
    )
    he = shared | dict(arch="wrn-34-10", lr=0.1, weight_decay=2e-4, eps=8 / 255, step_size=2 / 255, margin=0.2)
    angular = shared | dict(arch="wrn-34-10", lr=0.1, weight_decay=5e-4, eps=0.031, step_size=0.007, margin=0.0)
    angular |= dict(alpha=0.55, beta=0.48)
    cifar100 = angular | dict(arch="resnet18", lr=0.01, weight_decay=3.5e-3)
    fast = dict(arch="preactresnet18", epochs=30, lr=0.2, weight_decay=5e-4, eps=8 / 255, step_size=10 / 255)
    free = dict(arch="preactresnet18", epochs=10, lr=0.04, weight_decay=5e-4, eps=8 / 255, replays=8, scale=15.0)
    imagenet = dict(arch="resnet50", epochs=23, lr=0.1, batch_size=256, eps=4 / 255, step_size=1 / 255, replays=4)
    mart = shared | dict(epochs=90, arch="wrn-34-10", weight_decay=7e-4, eps=0.031, step_size=0.007, beta=6.0)
    del mart["scale"]
    weightpen = dict(epochs=400, optimizer="adam", lr=0.01, alpha=100.0, s=0.1, activation="tanh")
    large, small = weightpen | dict(arch="wrn-34-10", schedule="gentle"), dict(arch="small_cnn", schedule="constant")
    dsphere = dict(optimizer="adam", lr=1e-3, weight_decay=0.0, batch_size=128, correlation="cosine", loss="wsoftmax")
    dsphere_mnist = dict(arch="dsphere_mnist", epochs=66, schedule="thirds", eps=0.3, step_size=0.075, steps=10)
    dsphere_cifar = dict(arch="dsphere_cifar", epochs=168, schedule="late", eps=8 / 255, step_size=2 / 255, steps=7)
    abcl = dict(arch="alexnet", k1=512.0, k2=64.0, feature_dim=10)
    for expected, got in (
        (fast | dict(schedule="cyclic", margin=0.2), defaults(train_fast_he, "--dataset", "cifar10")),
        (fast | dict(margin=0.1), defaults(train_fast_he, "--dataset", "cifar100", "--head", "mhe")),
        (free | dict(margin=0.2), defaults(train_free_he, "--dataset", "cifar10")),
        (imagenet | dict(scale=10.0, margin=0.2), defaults(train_free_he, "--dataset", "imagenet")),
        (dict(scale=10.0, margin=0.1), defaults(train_trades_he, "--dataset", "imagenet", "--head", "mhe")),
        (dict(scale=1.0, arch="resnet50"), defaults(train_pgd_he, "--dataset", "imagenet", "--head", "linear")),
        (dict(scale=10.0, arch="resnet50", eps=4 / 255), defaults(train_fast_he, "--dataset", "imagenet")),
        (mart, defaults(train_mart, "--dataset", "cifar10")),
        (dict(epochs=200, batch_size=50, lr=0.01, center_norm=10.0), defaults(train_mmc, "--dataset", "cifar10")),
        (he, defaults(train_pgd_he, "--dataset", "cifar10")),
        (he | dict(beta=6.0), defaults(train_trades_he, "--dataset", "x/cifar10_jpeg.npz")),
        (he | dict(margin=0.1, head="mhe"), defaults(train_pgd_he, "--dataset", "cifar10", "--head", "mhe")),
        (he | dict(margin=0.0, scale=1.0), defaults(train_pgd_he, "--dataset=cifar10", "--head=linear")),
        (angular, defaults(train_angular_at, "--dataset", "cifar10")),
        (cifar100, defaults(train_angular_at, "--dataset", "cifar100")),
        (large, defaults(train_weightpen, "--dataset", "cifar10")),
        (large, defaults(train_weightpen, "--dataset", "cifar100")),
        (weightpen | small, defaults(train_weightpen, "--dataset", "mnist")),
        (dsphere | dsphere_mnist, defaults(train_dsphere, "--dataset", "mnist")),
        (dsphere | dsphere_cifar, defaults(train_dsphere, "--dataset", "cifar10")),
        (abcl | dict(scale=5.0, margin=0.2), defaults(train_abcl, "--dataset", "mnist")),
        (abcl | dict(scale=5.0, margin=0.0), defaults(train_abcl, "--dataset", "cifar10", "--base", "ht-sce")),
        (abcl | dict(scale=1.0, margin=0.0), defaults(train_abcl, "--dataset", "cifar10", "--base=sce")),
    ):
        assert {key: got[key] for key in expected} == expected


def test_hostile_npz_does_not_run_code(make_npz, refused, tmp_path):
    path = make_npz(y_train=np.array([Payload()] * 140, dtype=object))
    assert "not a readable .npz" in refused("train_pgd_he", "--dataset", path)
    assert not (tmp_path / "payload-ran").exists()
