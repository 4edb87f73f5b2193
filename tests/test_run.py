"""The Run: same seed same bits, kill -9 and --resume, the schedules, the warm-up, what is written."""

import argparse
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import models
import train_pgd_he

ROOT = Path(__file__).resolve().parent.parent
QUICK = ("--epochs", "3", "--limit", "300", "--steps", "2", "--batch-size", "32", "--eps-warmup", "1")


def start(out, *flags, script="train_pgd_he.py"):
    command = [sys.executable, "-u", str(ROOT / script), *QUICK, *map(str, flags), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(*arguments, **options):
    process = start(*arguments, **options)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


def weights(out):
    return common.read_file(out / "last.pt")["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def log_rows(out):
    with open(out / "log.csv") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """An uninterrupted run; WRN with batch norm, so that running statistics count too."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    finish(out, "--arch", "wrn-10-1")
    return out


def test_the_same_seed_gives_the_same_bits_in_a_fresh_process(whole_run, tmp_path):
    finish(tmp_path / "again", "--arch", "wrn-10-1")
    assert same(weights(whole_run), weights(tmp_path / "again"))
    finish(tmp_path / "other", "--arch", "wrn-10-1", "--seed", "1")
    assert not same(weights(whole_run), weights(tmp_path / "other"))


def test_a_run_killed_by_sigkill_and_resumed_equals_an_uninterrupted_one(whole_run, tmp_path):
    out = tmp_path / "killed"
    process = start(out, "--arch", "wrn-10-1")
    for line in process.stdout:
        if line.startswith("epoch   1/3"):
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    assert process.returncode == -signal.SIGKILL
    output = finish(out, "--arch", "wrn-10-1", "--resume")
    assert "resumed after epoch" in output
    assert same(weights(whole_run), weights(out))
    assert same(common.read_file(whole_run / "best.pt")["model"], common.read_file(out / "best.pt")["model"])
    assert [row["epoch"] for row in log_rows(out)] == ["1", "2", "3"]
    timed = ("images_per_s", "seconds")
    drop = lambda rows: [{key: row[key] for key in row if key not in timed} for row in rows]  # noqa: E731
    assert drop(log_rows(out)) == drop(log_rows(whole_run))


def test_a_finished_run_holds_all_its_files_and_the_best_epoch(whole_run):
    assert {path.name for path in whole_run.iterdir()} == {"args.json", "log.csv", "curves.png", "last.pt", "best.pt"}
    rows, best = log_rows(whole_run), common.read_file(whole_run / "best.pt")
    top = max(float(row["val_robust"]) for row in rows)
    assert best["metrics"]["val_robust"] == pytest.approx(top)
    assert best["epoch"] == next(int(row["epoch"]) for row in rows if float(row["val_robust"]) == pytest.approx(top))
    arguments = json.loads((whole_run / "args.json").read_text())
    assert (arguments["method"], arguments["arch"], arguments["epochs"]) == ("pgd_he", "wrn-10-1", 3)
    assert (whole_run / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_checkpoint_needs_nothing_but_itself(whole_run):
    model, meta = common.load_checkpoint(whole_run)
    assert not model.training and not model.amp and (model.scale, model.margin) == (15.0, 0.2)
    assert (meta["dataset"]["name"], meta["dataset"]["shape"], meta["dataset"]["images"]) == (
        "digits",
        (1, 8, 8),
        (200, 100),
    )
    assert meta["method"] == "pgd_he" and "torch" in meta["versions"] and "optimizer" not in meta
    images = common.to_float(common.load_data("digits").x_val)
    assert model(images).argmax(1).float().std() > 0


def test_a_second_run_into_the_same_folder_is_refused(whole_run, refused):
    before = (whole_run / "last.pt").read_bytes()
    line = refused("train_pgd_he", "--out", whole_run)
    assert "already holds a run" in line and "--resume" in line and (whole_run / "last.pt").read_bytes() == before


@pytest.mark.parametrize(
    "flag, value", [("--eps", "0.2"), ("--margin", "0.1"), ("--seed", "3"), ("--batch-size", "16")]
)
def test_resume_with_a_changed_flag_is_refused_and_names_it(whole_run, refused, flag, value):
    flags = [*QUICK, "--arch", "wrn-10-1", flag, value, "--out", whole_run, "--resume"]
    assert f"{flag} was" in refused("train_pgd_he", *flags)


def test_resume_of_another_method_or_a_broken_file_is_refused(whole_run, refused, tmp_path):
    flags = [*QUICK, "--arch", "wrn-10-1", "--resume", "--out"]
    assert "--method was pgd_he" in refused("train_trades_he", *flags, whole_run)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "last.pt").write_bytes((whole_run / "last.pt").read_bytes()[:1000])
    assert "truncated" in refused("train_pgd_he", *flags, tmp_path / "broken")


def test_resume_with_fewer_epochs_is_refused(whole_run, refused):
    before = (whole_run / "args.json").read_bytes()
    flags = [*QUICK, "--arch", "wrn-10-1", "--epochs", "2", "--out", whole_run, "--resume"]
    assert "--epochs was 3, now 2" in refused("train_pgd_he", *flags)
    assert (whole_run / "args.json").read_bytes() == before


def test_a_network_that_no_evaluation_could_read_is_refused_before_the_training(monkeypatch, refused, tmp_path):
    build = common.build_model

    def with_a_temperature(*arguments, **options):
        model = build(*arguments, **options)
        model.temperature = torch.nn.Parameter(torch.tensor(15.0))
        return model

    monkeypatch.setattr(common, "build_model", with_a_temperature)
    told = refused("train_pgd_he", *QUICK, "--out", tmp_path / "run")
    assert "temperature of the model is not as build_model makes it" in told and not (tmp_path / "run").exists()


def test_the_header_says_what_eps_gets_to_and_which_classes_have_no_image(cli, make_npz, tmp_path):
    path = make_npz(y_train=np.arange(140) % 3 * 4, y_test=np.arange(20) % 3 * 4)
    flags = ["--dataset", path, "--arch", "small_cnn", "--epochs", "2", "--steps", "1", "--batch-size", "20"]
    flags += ["--eps", "0.1", "--eps-warmup", "8", "--step-size", "0.25"]
    code, out, _ = cli("train_pgd_he", *flags, "--out", tmp_path / "run")
    assert code == 0 and "held-out images of 9 classes, 6 without a training image; " in out
    assert "eps rises over 8 epochs, so in these it gets to 0.025 alone" in out
    assert "step size 0.25 is over twice eps" in out
    code, out, _ = cli("train_pgd_he", *QUICK, "--epochs", "1", "--out", tmp_path / "usual")
    assert code == 0 and not any(word in out for word in ("classes", "eps rises", "twice eps"))


def test_resume_with_more_epochs_goes_on_and_with_none_left_changes_nothing(cli, tmp_path):
    flags = ["--limit", "200", "--steps", "1", "--batch-size", "50", "--out", tmp_path / "run"]
    assert cli("train_pgd_he", *flags, "--epochs", 1)[0] == 0
    code, out, _ = cli("train_pgd_he", *flags, "--epochs", 2, "--resume")
    assert code == 0 and "resumed after epoch 1 of 2" in out
    assert [row["epoch"] for row in log_rows(tmp_path / "run")] == ["1", "2"]
    before = weights(tmp_path / "run")
    assert cli("train_pgd_he", *flags, "--epochs", 2, "--resume")[0] == 0
    assert same(before, weights(tmp_path / "run"))


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_epoch(refused, tmp_path):
    line = refused(
        "train_pgd_he", *QUICK, "--optimizer", "sgd", "--lr", "1e9", "--head", "linear", "--out", tmp_path / "r"
    )
    assert "epoch 1" in line and "loss" in line
    assert not (tmp_path / "r" / "last.pt").exists()


def test_schedules():
    multistep, cyclic, cosine = (common.SCHEDULES[name] for name in ("multistep", "cyclic", "cosine"))
    assert [multistep(epoch / 100) for epoch in (0, 74, 75, 89, 90, 99)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert [cyclic(done) for done in (0, 0.25, 0.5, 0.75)] == [0, 0.5, 1, 0.5]
    assert [cosine(done) for done in (0, 0.5)] == pytest.approx([1, 0.5]) and cosine(0.999) < 1e-4
    gentle, thirds, late, half = (common.SCHEDULES[name] for name in ("gentle", "thirds", "late", "half"))
    assert [half(done) for done in (0.49, 0.5, 0.74, 0.75)] == pytest.approx([1, 0.1, 0.1, 0.01])
    assert [gentle(epoch / 400) for epoch in (0, 59, 60, 119, 120)] == pytest.approx([1, 1, 0.9, 0.9, 0.81])
    assert [thirds(done) for done in (0.33, 0.34, 0.66, 0.67)] == pytest.approx([1, 0.1, 0.1, 0.01])
    assert [late(k / 64) for k in (33, 34, 53, 54)] == pytest.approx([1, 0.1, 0.1, 0.01])


@pytest.mark.parametrize("command, steps", [("train_pgd_he", 2), ("train_free_he --replays 3", 6)])
@pytest.mark.parametrize("schedule", common.SCHEDULES)
def test_the_schedule_reaches_the_optimizer_step_by_step(cli, tmp_path, schedule, command, steps):
    """The rate of each epoch's last step, of two batches an epoch."""
    flags = ["--limit", "164", "--batch-size", "32", "--steps", "1", "--lr", "0.001", "--epochs", "4"]
    assert cli(*command.split(), *flags, "--schedule", schedule, "--out", tmp_path / "run")[0] == 0
    expected = [0.001 * common.SCHEDULES[schedule]((epoch * steps - 1) / (4 * steps)) for epoch in (1, 2, 3, 4)]
    assert [float(row["lr"]) for row in log_rows(tmp_path / "run")] == pytest.approx(expected, rel=1e-4, abs=1e-12)


def test_the_optimizer_has_the_papers_momentum_and_the_flags_rate_and_decay():
    for optimizer, own in (("sgd", {"momentum": 0.9}), ("adam", {"betas": (0.9, 0.999)})):
        flags = argparse.Namespace(optimizer=optimizer, lr=0.3, weight_decay=0.07)
        (group,) = common.make_optimizer(torch.nn.Linear(2, 2), flags).param_groups
        expected = own | {"lr": 0.3, "weight_decay": 0.07}
        assert {key: group[key] for key in expected} == expected


@pytest.mark.parametrize("command, best", [
    ("train_weightpen", 1), ("train_abcl", 1), ("train_mmc", 1), ("train_dsphere", 1), ("train_pgd_he", 2),
    ("train_abcl --adversarial", 2), ("train_mmc --adversarial", 2), ("train_dsphere --train fgsm", 2),
])  # fmt: skip
def test_best_pt_is_the_most_robust_epoch_or_of_natural_training_the_most_accurate(
    cli, tmp_path, monkeypatch, command, best
):
    held_out = iter([(90.0, 10.0), (80.0, 50.0), (80.0, 50.0)])  # the last is no better than the one before
    monkeypatch.setattr(common.Run, "_held_out", lambda run: next(held_out))
    few = ["--limit", "132", "--batch-size", "32", "--steps", "1", "--epochs", "3", "--out", tmp_path / "run"]
    assert cli(*command.split(), *few)[0] == 0
    assert common.read_file(tmp_path / "run" / "best.pt")["epoch"] == best


def test_the_log_has_shares_of_the_images_in_percent(cli, tmp_path, monkeypatch):
    """Of a network that takes every image for class 3."""
    forward = models.Classifier.forward

    def biased(model, x, with_features=False):
        return forward(model, x) + 100 * F.one_hot(torch.tensor(3), 10)

    monkeypatch.setattr(models.Classifier, "forward", biased)
    flags = ["--head", "linear", "--limit", "164", "--batch-size", "64", "--epochs", "1", "--steps", "1"]
    assert cli("train_pgd_he", *flags, "--lr", "1e-9", "--out", tmp_path / "run")[0] == 0
    (row,), data = log_rows(tmp_path / "run"), common.load_data("digits", limit=164)
    of_class_3 = [100 * (y == 3).float().mean().item() for y in (data.y_train, data.y_val, data.y_val)]
    told = [float(row[key]) for key in ("train_accuracy", "val_clean", "val_robust")]
    assert told == pytest.approx(of_class_3, abs=0.01) and min(told) > 2
    assert float(row["loss"]) == pytest.approx(100 - of_class_3[0], abs=3)  # its logits are apart by 100


def test_eps_warms_up_linearly(cli, tmp_path, monkeypatch):
    seen = []
    original = common.pgd

    def record(*args, **settings):
        seen.append((settings["eps"], settings["step_size"]))
        return original(*args, **settings)

    monkeypatch.setattr(common, "pgd", record)
    flags = ["--limit", "228", "--batch-size", "32", "--steps", "1", "--epochs", "2", "--eps-warmup", "2"]
    assert cli("train_pgd_he", *flags, "--eps", "0.2", "--step-size", "0.05", "--out", tmp_path / "run")[0] == 0
    training, held_out = seen[:4] + seen[8:12], seen[4:8] + seen[12:]  # 4 batches of each in each of 2 epochs
    assert [eps for eps, _ in training] == pytest.approx([0.2 * step / 8 for step in range(1, 9)])
    assert [step_size for _, step_size in training] == pytest.approx([0.05 * step / 8 for step in range(1, 9)])
    assert held_out == [(0.2, 0.05)] * 8


@pytest.mark.parametrize("step_size, held_out", [(0.125, 0.025), (0.02, 0.02)])
def test_held_out_accuracy_is_under_steps_shorter_than_the_ball(cli, tmp_path, monkeypatch, step_size, held_out):
    seen, original = [], common.pgd
    monkeypatch.setattr(common, "pgd", lambda *args, **settings: seen.append(settings) or original(*args, **settings))
    flags = ["--limit", "132", "--batch-size", "32", "--epochs", "1", "--steps", 10, "--out", tmp_path / "run"]
    assert cli("train_fast_he", *flags, "--eps", 0.1, "--step-size", step_size)[0] == 0
    assert [settings["step_size"] for settings in seen] == pytest.approx([held_out] * 4)  # FastAT itself calls no pgd


@pytest.mark.parametrize("script, modes", [
    ("train_pgd_he", [False] * 3 + [True]), ("train_angular_at", [False] * 3 + [True]),
    ("train_alp_he", [False] * 3 + [True] * 2), ("train_mart", [False] * 3 + [True] * 2),
    ("train_trades_he", [False] * 4 + [True] * 2), ("train_fast_he", [True] * 2),
])  # fmt: skip
def test_examples_are_crafted_in_eval_mode_and_trained_on_in_train_mode(cli, tmp_path, monkeypatch, script, modes):
    """Natural logits of TRADES in eval mode too; FastAT's one step in train mode, as its authors do."""
    seen, original = [], models.Classifier.forward

    def record(self, x, with_features=False):
        trains = torch.is_grad_enabled() and next(self.parameters()).requires_grad
        assert self.training or not trains, "weights were trained in eval mode"
        seen.append(self.training)
        return original(self, x, with_features)

    monkeypatch.setattr(models.Classifier, "forward", record)
    flags = ["--limit", "132", "--batch-size", "32", "--steps", "3", "--epochs", "1", "--arch", "wrn-10-1"]
    assert cli(script, *flags, "--out", tmp_path / "run")[0] == 0
    assert seen[: len(modes)] == modes


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
def test_a_compiled_model_trains_to_the_same_loss_and_its_checkpoint_loads(tmp_path):
    finish(tmp_path / "compiled", "--arch", "wrn-10-1", "--no-amp", "--epochs", "1", "--compile")
    finish(tmp_path / "eager", "--arch", "wrn-10-1", "--no-amp", "--epochs", "1")
    compiled, eager = (float(log_rows(tmp_path / name)[0]["loss"]) for name in ("compiled", "eager"))
    assert compiled == pytest.approx(eager, rel=1e-2)
    assert weights(tmp_path / "compiled").keys() == weights(tmp_path / "eager").keys()
    common.load_checkpoint(tmp_path / "compiled")


def test_resume_with_more_epochs_takes_its_first_step_at_the_longer_runs_rate(cli, tmp_path):
    flags = ["--limit", "132", "--batch-size", "32", "--steps", "1", "--lr", "0.001", "--out", tmp_path / "run"]
    assert cli("train_pgd_he", *flags, "--schedule", "cosine", "--epochs", "2")[0] == 0
    assert cli("train_pgd_he", *flags, "--schedule", "cosine", "--epochs", "8", "--resume")[0] == 0
    rates = [float(row["lr"]) for row in log_rows(tmp_path / "run")]
    cosine = common.SCHEDULES["cosine"]
    expected = [0.001 * cosine(done) for done in (0, 1 / 2, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8, 7 / 8)]
    assert rates == pytest.approx(expected, rel=1e-4)


def test_resume_on_other_data_under_the_same_name_is_refused(cli, refused, make_npz, tmp_path):
    flags = [
        "--dataset",
        make_npz(),
        "--arch",
        "small_cnn",
        "--batch-size",
        "20",
        "--steps",
        "1",
        "--out",
        tmp_path / "run",
    ]
    assert cli("train_pgd_he", *flags, "--epochs", "1")[0] == 0
    make_npz(train=160)
    assert "other data" in refused("train_pgd_he", *flags, "--epochs", "2", "--resume")


def test_resume_rewrites_a_log_that_a_kill_left_behind(cli, tmp_path):
    flags = ["--limit", "132", "--batch-size", "32", "--steps", "1", "--epochs", "1", "--out", tmp_path / "run"]
    assert cli("train_pgd_he", *flags)[0] == 0
    for name in ("log.csv", "curves.png"):
        (tmp_path / "run" / name).unlink()
    assert cli("train_pgd_he", *flags, "--resume")[0] == 0
    assert len(log_rows(tmp_path / "run")) == 1 and (tmp_path / "run" / "curves.png").exists()


@pytest.mark.parametrize(
    "content", [{"format": common.FORMAT}, {"format": common.FORMAT, "args": {}}, {"format": "other"}]
)
def test_resume_of_an_incomplete_checkpoint_is_one_line(refused, tmp_path, content):
    (tmp_path / "run").mkdir()
    torch.save(content, tmp_path / "run" / "last.pt")
    assert "last.pt" in refused("train_pgd_he", "--resume", "--out", tmp_path / "run")


@pytest.fixture
def run_on(make_npz, tmp_path):
    """run_on("cifar10_toy", shape) -> a Run on a small file of that name, with the parsed arguments of PGD-AT."""

    def make(name, shape):
        argv = ["--dataset", str(make_npz(name, shape=shape)), "--arch", "wrn-10-1", "--batch-size", "10"]
        args = train_pgd_he.parse_args([*argv, "--out", str(tmp_path / "run")])
        data = common.load_data(args.dataset)
        return common.Run(args, common.build_model(args, data), data)

    return make


@pytest.mark.parametrize("name, shape, augmented", [
    ("cifar10_toy", (32, 32, 3), True), ("cifar100_toy", (32, 32, 3), True), ("mnist_toy", (28, 28), False),
    ("toy", (8, 8), False), ("tiny-imagenet_toy", (8, 8, 3), True),
])  # fmt: skip
def test_an_epoch_visits_each_image_once_and_augments_cifar_and_imagenet_alone(run_on, name, shape, augmented):
    run = run_on(name, shape)
    batches = list(run.batches())
    x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    originals = common.to_float(run.data.x_train)
    assert len(x) == 40 and torch.equal(y.bincount(), run.data.y_train.bincount())
    found = {image.numpy().tobytes() for image in x} & {image.numpy().tobytes() for image in originals}
    assert len(found) == 40 if not augmented else len(found) < 10
    again = torch.cat([y for _, y in run.batches()])
    assert not torch.equal(y, run.data.y_train) and not torch.equal(y, again)  # in an order of its own


def test_an_image_is_padded_by_4_pixels_before_it_is_cropped(run_on):
    assert run_on("cifar10_toy", (32, 32, 3)).x_train.shape == (40, 3, 40, 40)


def test_held_out_pgd_is_on_scaled_logits_from_a_random_start_in_float32(run_on, monkeypatch):
    run, seen = run_on("toy", (8, 8)), []
    run.model.amp = run.args.amp = True
    run.model.scale = 15.0
    before = {key: value.clone() for key, value in run.model.state_dict().items()}

    def record(model, x, y, *, loss, start, **budget):
        assert not model.amp and 0 < (start - x).abs().max() <= budget["eps"]
        seen.append(loss(logits, target).item())
        return x

    logits, target = torch.linspace(-1, 1, 10)[None], torch.tensor([3])
    monkeypatch.setattr(common, "pgd", record)
    run._held_out()
    assert seen == pytest.approx([F.cross_entropy(15 * logits, target).item()] * 10)
    assert run.model.amp and run.model.training and same(before, run.model.state_dict())  # batch norm's statistics too


def test_a_held_out_image_that_is_wrong_clean_is_not_robust(run_on, monkeypatch):
    """Of class 3, and told as such under attack alone."""
    run = run_on("toy", (8, 8))
    monkeypatch.setattr(common, "pgd", lambda model, x, y, **settings: torch.ones_like(x))
    run.y_val = torch.full((len(run.y_val),), 3)

    def knows(model, x, with_features=False):
        attacked = (x == 1).flatten(1).all(1, keepdim=True)
        return torch.where(attacked, F.one_hot(torch.tensor(3), 10), F.one_hot(torch.tensor(4), 10)).float()

    monkeypatch.setattr(models.Classifier, "forward", knows)
    assert run._held_out() == (0, 0)


def test_trades_starts_beside_the_image_and_compares_with_natural_logits_in_eval_mode(cli, tmp_path, monkeypatch):
    seen, modes = [], []
    pgd, forward = common.pgd, models.Classifier.forward

    def record_start(model, x, y, **settings):
        seen.append((settings.get("start", x) - x).std().item())
        return pgd(model, x, y, **settings)

    def record_mode(self, x, with_features=False):
        modes.append(self.training)
        return forward(self, x, with_features)

    monkeypatch.setattr(common, "pgd", record_start)
    monkeypatch.setattr(models.Classifier, "forward", record_mode)
    flags = ["--limit", "132", "--batch-size", "32", "--steps", "2", "--epochs", "1"]
    assert cli("train_trades_he", *flags, "--out", tmp_path / "run")[0] == 0
    assert seen[0] == pytest.approx(0.001, rel=0.1)
    assert modes[:5] == [False, False, False, True, True]  # natural logits, two steps, then x and x_adv


@pytest.mark.parametrize("warmup", (0, 1))
def test_free_replays_each_batch_and_takes_both_gradients_from_one_backward_pass(cli, tmp_path, monkeypatch, warmup):
    """delta_{t+1} = clip(delta_t + step * sign(grad)) in ball and range, of the very loss that updates the weights.

    Ball and step grow with every replay where the first epoch, of six, is a warm-up.
    """
    passes, stepped, images = [], [], []
    forward, step, batches = models.Classifier.forward, common.Run.step, common.Run.batches

    def record(self, x, with_features=False):
        if self.training:
            passes.append(x)
        return forward(self, x, with_features)

    def record_step(self, loss, logits, y):
        step(self, loss, logits, y)
        stepped.append((passes[-1].detach(), passes[-1].grad.clone()))

    def record_batches(self):
        for x, y in batches(self):
            images.append(x)
            yield x, y

    monkeypatch.setattr(models.Classifier, "forward", record)
    monkeypatch.setattr(common.Run, "step", record_step)
    monkeypatch.setattr(common.Run, "batches", record_batches)
    flags = ["--limit", "164", "--batch-size", "32", "--epochs", "1", "--eps-warmup", warmup, "--eps", "0.1"]
    flags += ["--step-size", "0.04", "--replays", "3", "--no-amp", "--out", tmp_path / "run"]
    assert cli("train_free_he", *flags)[0] == 0
    assert len(passes) == len(stepped) == 6 and len(log_rows(tmp_path / "run")) == 1
    assert torch.equal(images[0], images[2]) and not torch.equal(images[2], images[3])
    delta = torch.zeros(32, 1, 8, 8)
    for i, (x, (x_adv, grad)) in enumerate(zip(images, stepped, strict=True)):  # over the change of batch as well
        torch.testing.assert_close(x_adv, (x + delta).clamp(0, 1))
        grown = (i + 1) / 6 if warmup else 1
        eps, step_size = 0.1 * grown, 0.04 * grown
        delta = ((x + delta + step_size * grad.sign()).clamp(x - eps, x + eps).clamp(0, 1)) - x


def test_free_resumed_equals_free_uninterrupted(tmp_path):
    flags = ["--replays", "2"]
    finish(tmp_path / "whole", *flags, script="train_free_he.py")
    process = start(tmp_path / "killed", *flags, script="train_free_he.py")
    for line in process.stdout:
        if line.startswith("epoch   2/3"):
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    finish(tmp_path / "killed", *flags, "--resume", script="train_free_he.py")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
