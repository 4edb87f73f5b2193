"""The Run: same seed same bits, kills and signals, resume, schedules, what is written, wrong input."""

import csv
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import common
import models
import train_pgd_he

import numpy as np
import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("train_*.py"))
QUICK = ("--limit", "292", "--steps", "2", "--batch-size", "32", "--eps-warmup", "1")  # 6 batches an epoch


def start(script, out, *flags, **environment):
    """A training script in a process of its own."""
    command = [sys.executable, "-u", ROOT / f"{script}.py", *QUICK, *flags, "--out", out]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    pipe = subprocess.PIPE
    return subprocess.Popen(list(map(str, command)), env=environment, stdout=pipe, stderr=pipe, text=True)


def state(out, file="last.pt"):
    """What a run has come to, without its times."""
    content = common.read_file(out / file)
    rows = [{key: row[key] for key in row if key not in ("images_per_s", "seconds")} for row in content["history"]]
    return content["model"], rows


def assert_same(a, b):
    assert all(torch.equal(a[0][key], b[0][key]) for key in a[0] | b[0]) and a[1] == b[1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_stopped_in_mid_epoch_and_resumed_equals_an_uninterrupted_one(cli, tmp_path, monkeypatch, script):
    """By a signal that comes in the second of three batches of the second epoch."""
    flags, batches = ["--limit", "196", "--batch-size", "32", "--steps", "1", "--epochs", "2"], common.Run.batches
    flags += ["--train", "fgsm", "--loss", "annealing"] if script == "train_dsphere" else ["--arch", "small_cnn"]
    flags += ["--replays", "2"] if script == "train_free_he" else []
    assert cli(script, *flags, "--out", tmp_path / "whole")[0] == 0

    def interrupted(run):
        for number, batch in enumerate(batches(run)):
            if run.epoch == 2 and number == run.replays:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "batches", interrupted)
        code, _, err = cli(script, *flags, "--out", tmp_path / "part")
    assert code == 143 and "stopped in epoch 2 after 2 batches; continue with: python" in err and "--resume" in err
    torch.manual_seed(123)  # what was drawn before plays no part
    code, out, _ = cli(script, *flags, "--out", tmp_path / "part", "--resume")
    assert code == 0 and "resumed after epoch 1 and 2 batches" in out
    for file in ("last.pt", "best.pt"):
        assert_same(state(tmp_path / "whole", file), state(tmp_path / "part", file))


def test_kills_at_any_instant_cost_an_epoch_at_most(tmp_path):
    flags = ("--arch", "wrn-10-1", "--epochs", "4")  # batch norm: running statistics count too
    process = start("train_pgd_he", tmp_path / "whole", *flags)
    assert process.wait() == 0
    for instant in (0, 0.2):  # seconds after the first epoch that a process finishes
        process = start("train_pgd_he", tmp_path / "killed", *flags, "--resume")
        for line in process.stdout:
            if line.startswith("epoch"):
                time.sleep(instant)
                break
        process.kill()
        process.wait()
    process = start("train_pgd_he", tmp_path / "killed", *flags, "--resume")
    assert process.wait() == 0
    for file in ("last.pt", "best.pt"):
        assert_same(state(tmp_path / "whole", file), state(tmp_path / "killed", file))
    rows = list(csv.DictReader(open(tmp_path / "killed" / "log.csv")))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_batch_and_says_how_to_go_on_and_a_second_one_ends_at_once(tmp_path, number, code):
    process = start("train_pgd_he", tmp_path / "run", "--epochs", "1000")
    while not process.stdout.readline().startswith("epoch 1 "):
        pass
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    last = err.strip().splitlines()[-1]
    assert process.returncode == code and "stopped in epoch" in last and last.endswith("--resume")
    process = start("train_pgd_he", tmp_path / "slow", "--epochs", "1", "--steps", "1000000")  # a batch takes hours
    while "writing to" not in process.stdout.readline():
        pass
    time.sleep(2)
    for _ in range(2):
        process.send_signal(number)
        time.sleep(0.5)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.strip().splitlines()[-1].startswith("interrupted")


def test_the_spin_count_is_set_before_torch_is_loaded():
    for script in SCRIPTS:
        imports = re.findall(r"^(?:import|from) (\w+)", (ROOT / f"{script}.py").read_text(), re.MULTILINE)
        assert "common" in imports and "torch" not in imports[: imports.index("common")], script
    environment = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE", "PYTHONPATH": str(ROOT)}
    for wanted, own in (("10000", {}), ("77", {"GOMP_SPINCOUNT": "77"})):  # the user's value wins
        command = [sys.executable, "-c", "import train_weightpen"]
        err = subprocess.run(command, env=environment | own, capture_output=True, text=True).stderr
        assert f"GOMP_SPINCOUNT = '{wanted}'" in err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of three epochs."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert start("train_pgd_he", out, "--epochs", "3", "--arch", "wrn-10-1").wait() == 0
    return out


def test_a_finished_run_holds_its_files_and_a_checkpoint_needs_nothing_but_itself(finished):
    assert {path.name for path in finished.iterdir()} == {"args.json", "log.csv", "last.pt", "best.pt"}
    rows, best = list(csv.DictReader(open(finished / "log.csv"))), common.read_file(finished / "best.pt")
    robust = [float(row["val_robust"]) for row in rows]
    assert best["epoch"] == 1 + max(range(3), key=lambda i: (robust[i], float(rows[i]["val_clean"])))
    assert json.loads((finished / "args.json").read_text())["method"] == "pgd_he"
    model, meta = common.load_checkpoint(finished)
    assert not model.training and not model.amp and (model.scale, model.margin) == (15.0, 0.2)
    assert (meta["method"], meta["args"]["dataset"], meta["epoch"]) == ("pgd_he", "digits", best["epoch"])
    assert {"history", "hardware", "model_options"} <= meta.keys() and "optimizer" not in meta
    data = common.load_data("digits")
    x = common.images_at(data.x_train, data.val, "cpu")
    clean = 100 * (model(x).argmax(1) == data.y_train[data.val]).float().mean().item()
    assert clean == pytest.approx(best["history"][-1]["val_clean"])


def test_resume_refuses_by_name_what_has_changed(finished, refused, make_npz, cli, tmp_path):
    flags = [*QUICK, "--arch", "wrn-10-1", "--out", finished]
    assert "already holds a run" in refused("train_pgd_he", *flags, "--epochs", "3")
    flags += ["--resume", "--epochs"]
    for flag, value in (("--eps", "0.2"), ("--margin", "0.1"), ("--seed", "3"), ("--batch-size", "16")):
        assert f"{flag} was" in refused("train_pgd_he", *flags, "3", flag, value)
    assert "--epochs was 3, now 2" in refused("train_pgd_he", *flags, "2")
    assert "--method was pgd_he" in refused("train_trades_he", *flags, "3")
    flags = [
        "--dataset",
        make_npz(),
        "--batch-size",
        "20",
        "--steps",
        "1",
        "--arch",
        "small_cnn",
        "--out",
        tmp_path / "r",
    ]
    assert cli("train_pgd_he", *flags, "--epochs", "1")[0] == 0
    make_npz(x_train=np.zeros((140, 8, 8), np.uint8))
    assert "other data" in refused("train_pgd_he", *flags, "--epochs", "2", "--resume")


def test_resume_with_more_epochs_continues_and_with_none_left_changes_nothing(cli, tmp_path):
    flags = [*QUICK, "--out", tmp_path / "run", "--epochs"]
    assert cli("train_pgd_he", *flags, 1)[0] == 0
    for _ in range(2):
        code, out, _ = cli("train_pgd_he", *flags, 2, "--resume")
        assert code == 0 and "resumed after epoch" in out and "python eval_all.py" in out
        assert [row["epoch"] for row in state(tmp_path / "run")[1]] == [1, 2]


def test_runs_of_the_old_format_are_read_but_not_resumed(cli, refused, tmp_path):
    flags = [*QUICK, "--epochs", "1", "--out", tmp_path / "run"]
    assert cli("train_pgd_he", *flags)[0] == 0
    model, _ = common.load_checkpoint(tmp_path / "run")
    content = common.read_file(tmp_path / "run" / "last.pt")
    common.save(content | {"format": "angular-defenses-1", "rng": {}}, tmp_path / "run" / "last.pt")
    assert "can be evaluated, but not resumed" in refused("train_pgd_he", *flags, "--resume")
    again, meta = common.load_checkpoint(tmp_path / "run" / "last.pt")
    assert "rng" not in meta and torch.equal(again.fc.weight, model.fc.weight)


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("payload-ran"),))


def test_a_file_that_is_no_checkpoint_is_a_user_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = models.build_model("wrn-10-1", 10, head="he")
    good = {"format": common.FORMATS[-1], "model": model.state_dict(), "model_options": model.options}
    torch.save(good, "good.pt")
    whole, options = Path("good.pt").read_bytes(), model.options
    for content in (whole[:5000], b"", b"not a checkpoint", b"\x89PNG" + bytes(100)):
        Path("broken.pt").write_bytes(content)
        with pytest.raises(common.UserError, match=r"broken\.pt: damaged"):
            common.load_checkpoint("broken.pt")
    for content, complaint in (
        ([1, 2, 3], "damaged, or not a dict"),
        (good | {"model": Payload()}, "damaged, or not a dict"),
        (model.state_dict(), "a bare state dict; say what it is"),
        (good | {"model_options": options | {"arch": "wrn-16-1"}}, "not the weights of wrn-16-1"),
        (good | {"model_options": options | {"arch": "../vgg"}}, r"unknown arch '\.\./vgg'"),
        ({"format": good["format"]}, "broken.pt: not the weights"),
    ):
        torch.save(content, "broken.pt")
        with pytest.raises(common.UserError, match=complaint):
            common.load_checkpoint("broken.pt")
    with pytest.raises(common.UserError, match="no such checkpoint"):
        common.load_checkpoint("nowhere.pt")
    assert not Path("payload-ran").exists()


def test_a_full_disk_is_one_line_and_keeps_the_old_checkpoint(cli, tmp_path, monkeypatch):
    flags = [*QUICK, "--out", tmp_path / "run", "--epochs"]
    assert cli("train_pgd_he", *flags, 1)[0] == 0
    before, write = (tmp_path / "run" / "last.pt").read_bytes(), Path.write_bytes

    def full(path, content):
        if "last.pt" in path.name:
            write(path, bytes(content)[:1000])
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    code, _, err = cli("train_pgd_he", *flags, 2, "--resume")
    assert code == 2 and err.count("\n") == 1 and "No space left on device" in err
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


@pytest.mark.parametrize("broken", ["loss", "gradient", "weight"])
def test_a_nonfinite_loss_gradient_or_weight_names_its_epoch_and_is_not_saved(
    cli, refused, monkeypatch, tmp_path, broken
):
    flags = [*QUICK, "--out", tmp_path / "run", "--schedule", "constant", "--epochs"]
    assert cli("train_pgd_he", *flags, 1)[0] == 0
    before, step = (tmp_path / "run" / "last.pt").read_bytes(), common.Run.step

    def break_the_last(run, loss, logits, y):
        last = run.iteration == 11
        if last and broken != "weight":
            loss = loss * torch.nan if broken == "loss" else loss + (logits * 0).sqrt().sum()  # d sqrt(0) is infinite
        step(run, loss, logits, y)
        if last and broken == "weight":
            run.model.fc.weight.data[0, 0] = torch.inf

    monkeypatch.setattr(common.Run, "step", break_the_last)
    assert "not finite in epoch 2" in refused("train_pgd_he", *flags, 2, "--resume")
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


def test_predictions_that_never_change_are_warned_of(cli, make_npz):
    path = make_npz(train=292, x_train=np.zeros((292, 8, 8), np.uint8))
    flags = ["--dataset", path, "--arch", "small_cnn", *QUICK, "--epochs", "1", "--lr", "0"]
    code, _, err = cli("train_weightpen", *flags)
    assert code == 0 and "that of one class for all" in err


def test_schedules():
    expected = {
        "multistep": {0.74: 1, 0.75: 0.1, 0.89: 0.1, 0.9: 0.01},
        "cyclic": {0: 0, 0.25: 0.5, 0.5: 1, 0.75: 0.5},
        "cosine": {0: 1, 0.5: 0.5, 0.9999: 0},
        "gentle": {59 / 400: 1, 60 / 400: 0.9, 120 / 400: 0.81},
        "thirds": {0.33: 1, 0.34: 0.1, 0.66: 0.1, 0.67: 0.01},
        "half": {0.49: 1, 0.5: 0.1, 0.74: 0.1, 0.75: 0.01},
        "late": {33 / 64: 1, 34 / 64: 0.1, 53 / 64: 0.1, 54 / 64: 0.01},
        "constant": {0: 1, 0.99: 1},
    }
    for name, schedule in common.SCHEDULES.items():
        assert {done: schedule(done) for done in expected[name]} == pytest.approx(expected[name], abs=1e-6)


@pytest.mark.parametrize("command, steps", [("train_pgd_he", 2), ("train_free_he --replays 3", 6)])
def test_rate_eps_and_step_size_change_step_by_step(cli, tmp_path, monkeypatch, command, steps):
    """Two batches an epoch. The log has the rate of each epoch's last step."""
    seen, warmup = [], common.Run.warmup
    monkeypatch.setattr(common.Run, "warmup", lambda run, value: seen.append(warmup(run, value)) or seen[-1])
    flags = ["--limit", "164", "--batch-size", "32", "--steps", "1", "--lr", "0.001", "--epochs", "4"]
    flags += ["--schedule", "cosine", "--eps-warmup", "2", "--eps", "0.2", "--out", tmp_path / "run"]
    assert cli(*command.split(), *flags)[0] == 0
    expected = [0.001 * common.SCHEDULES["cosine"]((epoch * steps - 1) / (4 * steps)) for epoch in (1, 2, 3, 4)]
    assert [row["lr"] for row in state(tmp_path / "run")[1]] == pytest.approx(expected)
    assert seen[::2] == pytest.approx([min(0.2, 0.2 * step / (2 * steps)) for step in range(1, 4 * steps + 1)])


@pytest.mark.parametrize("command, best", [
    ("train_weightpen", 1), ("train_mmc", 1), ("train_dsphere", 1), ("train_pgd_he", 2),
    ("train_abcl --adversarial", 2), ("train_dsphere --train fgsm", 2),
])  # fmt: skip
def test_best_pt_is_the_most_robust_epoch_or_of_natural_training_the_most_accurate(
    cli, tmp_path, monkeypatch, command, best
):
    held_out = iter([(90.0, 10.0), (80.0, 50.0), (80.0, 50.0)])  # the last is no better than the one before
    monkeypatch.setattr(common.Run, "_held_out", lambda run: next(held_out))
    assert cli(*command.split(), *QUICK, "--steps", "1", "--epochs", "3", "--out", tmp_path / "run")[0] == 0
    assert common.read_file(tmp_path / "run" / "best.pt")["epoch"] == best


def test_the_log_has_percentages_of_the_images(cli, tmp_path, monkeypatch):
    """Of a network that predicts class 3 for every image."""
    forward = models.Classifier.forward
    biased = lambda model, x: forward(model, x) + 100 * F.one_hot(torch.tensor(3), 10)  # noqa: E731
    monkeypatch.setattr(models.Classifier, "forward", biased)
    flags = ["--head", "linear", "--limit", "164", "--batch-size", "64", "--epochs", "1", "--steps", "1"]
    assert cli("train_pgd_he", *flags, "--lr", "1e-9", "--out", tmp_path / "run")[0] == 0
    (row,), data = state(tmp_path / "run")[1], common.load_data("digits", limit=164)
    of_class_3 = [100 * (data.y_train[rows] == 3).float().mean().item() for rows in (data.train, data.val, data.val)]
    logged = [row[key] for key in ("train_accuracy", "val_clean", "val_robust")]
    assert logged == pytest.approx(of_class_3, abs=0.01) and min(logged) > 2
    assert row["loss"] == pytest.approx(100 - of_class_3[0], abs=3)  # its logits are apart by 100


@pytest.fixture
def run_on(make_npz, tmp_path):
    """run_on("cifar10_toy", shape) -> a Run on a small file of that name, with the arguments of PGD-AT."""

    def make(name, shape):
        argv = ["--dataset", str(make_npz(name, shape=shape)), "--arch", "wrn-10-1", "--batch-size", "10"]
        args = train_pgd_he.parse_args([*argv, "--out", str(tmp_path / "run")])
        data = common.load_data(args.dataset)
        run = common.Run(args, common.build_model(args, data, scale=15.0), data)
        run.epoch = 1
        return run

    return make


@pytest.mark.parametrize("name, shape, augmented", [
    ("cifar10_toy", (32, 32, 3), True), ("mnist_toy", (28, 28), False), ("toy", (8, 8), False),
    ("tiny-imagenet_toy", (8, 8, 3), True),
])  # fmt: skip
def test_an_epoch_visits_each_image_once_and_augments_cifar_and_imagenet_only(run_on, name, shape, augmented):
    run = run_on(name, shape)
    x, y = (torch.cat(parts) for parts in zip(*run.batches(), strict=True))
    originals = common.to_float(run.data.x_train[run.data.train])
    assert len(x) == 40 and torch.equal(y.bincount(), run.data.y_train[run.data.train].bincount())
    found = {image.numpy().tobytes() for image in x} & {image.numpy().tobytes() for image in originals}
    assert len(found) < 10 if augmented else len(found) == 40
    same_x, _ = (torch.cat(parts) for parts in zip(*run.batches(), strict=True))
    run.epoch = 2
    other_x, _ = (torch.cat(parts) for parts in zip(*run.batches(), strict=True))
    assert torch.equal(x, same_x) and not torch.equal(x, other_x)


@pytest.mark.parametrize("step_size, expected", [(0.125, 0.025), (0.02, 0.02)])
def test_held_out_pgd_is_on_scaled_logits_in_float32_and_changes_nothing(run_on, monkeypatch, step_size, expected):
    run, seen, pgd = run_on("toy", (8, 8)), [], common.pgd
    run.model.amp, run.args.amp, run.args.eps, run.args.step_size, run.args.steps = True, True, 0.1, step_size, 10
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    logits, target = torch.linspace(-1, 1, 10)[None], torch.tensor([3])

    def record(model, x, y, *, loss, **budget):
        assert not model.amp and budget == {"eps": 0.1, "step_size": pytest.approx(expected), "steps": 10}
        seen.append(loss(logits, target).item())
        return pgd(model, x, y, loss=loss, **budget)

    monkeypatch.setattr(common, "pgd", record)
    first = run._held_out()
    torch.manual_seed(5)
    assert run._held_out() == first  # its random starts depend on the run's seed alone
    assert seen == pytest.approx([F.cross_entropy(15 * logits, target).item()] * 20)
    after = run.model.state_dict()
    assert run.model.amp and run.model.training and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("script, modes", [
    ("train_pgd_he", [False] * 3 + [True]), ("train_angular_at", [False] * 3 + [True]),
    ("train_alp_he", [False] * 3 + [True] * 2), ("train_mart", [False] * 3 + [True] * 2),
    ("train_trades_he", [False] * 4 + [True] * 2), ("train_fast_he", [True] * 2),
])  # fmt: skip
def test_examples_are_crafted_in_eval_mode_and_trained_on_in_train_mode(cli, tmp_path, monkeypatch, script, modes):
    """Natural logits of TRADES in eval mode too; FastAT's one step in train mode, as its authors do."""
    seen, forward = [], models.Classifier.forward

    def record(self, x, with_features=False):
        seen.append(self.training)
        return forward(self, x, with_features)

    monkeypatch.setattr(models.Classifier, "forward", record)
    flags = ["--limit", "132", "--batch-size", "32", "--steps", "3", "--epochs", "1", "--arch", "wrn-10-1"]
    assert cli(script, *flags, "--out", tmp_path / "run")[0] == 0
    assert seen[: len(modes)] == modes


def test_a_compiled_model_trains_to_the_same_loss_and_its_checkpoint_loads(cli, tmp_path, monkeypatch):
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_(module, backend="aot_eager"))
    losses = []
    for flag in ("--compile", "--no-compile"):
        flags = [*QUICK, "--arch", "small_cnn", "--no-amp", "--epochs", "1", "--out", tmp_path / flag, flag]
        assert cli("train_pgd_he", *flags)[0] == 0
        losses.append(state(tmp_path / flag)[1][0]["loss"])
        common.load_checkpoint(tmp_path / flag)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


# Wrong input: one line on stderr, exit code 2.

BAD_FLAGS = {
    "argument --eps: 'abc' is not a number": ["--eps", "abc"],
    "argument --eps: '8/0' is not a number": ["--eps", "8/0"],
    "from 0 to 1": ["--eps", "8"],
    "argument --eps: 'nan'": ["--eps", "nan"],
    "argument --lr: '1e999'": ["--lr", "1e999"],
    "argument --steps: '2.5' is not a number (int)": ["--steps", "2.5"],
    "argument --device: 'tpu' is not available": ["--device", "tpu"],
    "argument --device: 'meta' is not available": ["--device", "meta"],
    "argument --device: 'cuda:99' is not available": ["--device", "cuda:99"],
    "unrecognized arguments: --epss": ["--epss", "0.1"],
    "unknown arch 'vgg'": ["--arch", "vgg"],
    "depth of wrn-D-W": ["--arch", "wrn-12-1"],
    "--batch-size 5000": ["--batch-size", "5000"],
    "expected one argument": ["--dataset"],
    "argument --head: invalid choice: 'cosine'": ["--head", "cosine"],
    "head he alone": ["--head", "mhe", "--no-fn"],
}


@pytest.mark.parametrize("complaint", BAD_FLAGS)
def test_a_bad_flag_is_one_line(refused, complaint):
    line = refused("train_pgd_he", *BAD_FLAGS[complaint])
    assert complaint in line and line.startswith("train_pgd_he.py: error: ")


def test_other_errors_are_one_line_too(refused, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file" / "run") in refused("train_pgd_he", "--out", tmp_path / "file" / "run")
    for error, code, words in (
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "out of memory"),
        (KeyboardInterrupt(), 130, "--resume"),
    ):
        with pytest.raises(SystemExit) as stop:
            common.cli(lambda error=error: (_ for _ in ()).throw(error))
        err = capsys.readouterr().err
        assert stop.value.code == code and err.count("\n") == 1 and words in err


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("name, shape", [("mnist", (28, 28)), ("cifar10", (32, 32, 3)), ("mine", (32, 32, 3))])
def test_every_scripts_defaults_begin_a_run_on_every_dataset(make_npz, monkeypatch, tmp_path, script, name, shape):
    class Begun(Exception):
        pass

    def begin(self, args, model, data, **options):
        assert args.epochs and model.options["arch"] == args.arch
        raise Begun

    def build(*arguments, **options):
        with torch.device("meta"):  # no memory and no time for its weights
            return make(*arguments, **options)

    make = models.build_model
    monkeypatch.setattr(models, "build_model", build)
    monkeypatch.setattr(common.Run, "__init__", begin)
    with pytest.raises(Begun):
        importlib.import_module(script).main(["--dataset", str(make_npz(name, shape=shape)), "--out", str(tmp_path)])


def test_help_shows_the_defaults_in_force_and_their_source(cli):
    code, out, _ = cli("train_pgd_he", "--dataset", "cifar10", "--head", "mhe", "--help")
    text = " ".join(out.split())
    assert code == 0 and "(default: wrn-34-10; HE, Sec. 4, and its code)" in text
    assert "(default: 0.1; HE, Sec. 4 and C.5)" in text


HE = dict(epochs=100, optimizer="sgd", schedule="multistep", arch="wrn-34-10", lr=0.1, weight_decay=2e-4, steps=10)
HE |= dict(eps=8 / 255, step_size=2 / 255, scale=15.0, margin=0.2)
ANGULAR = dict(eps=0.031, step_size=0.007, margin=0.0, alpha=0.55, beta=0.48)
PAPERS = {
    "train_pgd_he --dataset cifar10": HE,
    "train_pgd_he --dataset cifar10 --head mhe": HE | dict(margin=0.1),
    "train_pgd_he --dataset cifar10 --head linear": HE | dict(margin=0.0, scale=1.0),
    "train_trades_he --dataset x/cifar10_jpeg.npz": HE | dict(beta=6.0),
    "train_trades_he --dataset imagenet --head mhe": dict(scale=10.0, margin=0.1, arch="resnet50", eps=4 / 255),
    "train_fast_he --dataset cifar10": dict(arch="preactresnet18", epochs=30, lr=0.2, step_size=10 / 255, margin=0.2),
    "train_free_he --dataset cifar10": dict(arch="preactresnet18", epochs=10, lr=0.04, replays=8, schedule="cyclic"),
    "train_free_he --dataset imagenet": dict(epochs=23, batch_size=256, step_size=1 / 255, replays=4, scale=10.0),
    "train_mart --dataset cifar10": dict(epochs=90, weight_decay=7e-4, eps=0.031, step_size=0.007, beta=6.0),
    "train_mmc --dataset cifar10": dict(arch="resnet32", epochs=200, batch_size=50, lr=0.01, center_norm=10.0),
    "train_angular_at --dataset cifar10": ANGULAR | dict(arch="wrn-34-10", lr=0.1, weight_decay=5e-4),
    "train_angular_at --dataset cifar100": ANGULAR | dict(arch="resnet18", lr=0.01, weight_decay=3.5e-3),
    "train_weightpen --dataset cifar10": dict(epochs=400, optimizer="adam", lr=0.01, alpha=100.0, weight_norm=0.1),
    "train_weightpen --dataset mnist": dict(arch="small_cnn", schedule="constant", activation="tanh"),
    "train_dsphere --dataset mnist": dict(epochs=66, schedule="thirds", eps=0.3, step_size=0.075, correlation="cosine"),
    "train_dsphere --dataset cifar10": dict(arch="dsphere_cifar", epochs=168, schedule="late", steps=7, lr=1e-3),
    "train_abcl --dataset mnist": dict(arch="alexnet", k1=512.0, k2=64.0, feature_dim=10, scale=5.0, margin=0.2),
    "train_abcl --dataset cifar10 --base=sce": dict(scale=1.0, margin=0.0),
}


@pytest.mark.parametrize("command", PAPERS)
def test_the_papers_defaults(command):
    script, *flags = command.split()
    args = vars(importlib.import_module(script).parse_args(flags))
    assert {key: args[key] for key in PAPERS[command]} == PAPERS[command]
