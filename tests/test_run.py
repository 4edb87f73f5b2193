"""The Run: same seed same bits, stops and resume, schedules, what is written, wrong input."""

import csv
import importlib
import json
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import common
import models
import train_pgd_he

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("train_*.py"))
FEW = "--limit 196 --batch-size 32 --steps 1 --eps-warmup 1 --arch wrn-10-1".split()  # three batches an epoch


def state(out, file="last.pt"):
    """What a run has come to, without its times."""
    content = common.read_file(out / file)
    rows = [{key: row[key] for key in row if key not in ("images_per_s", "seconds")} for row in content["history"]]
    parts = {name: content.get(name, {}) for name in ("model", "trained", "criterion")}
    return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.items()}, rows


def assert_same(one, other):
    for file in ("last.pt", "best.pt"):
        (a, history), (b, other_history) = state(one, file), state(other, file)
        assert history == other_history and all(torch.equal(a[key], b[key]) for key in a | b)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of three epochs, with batch norm: its running statistics count too."""
    out = tmp_path_factory.mktemp("runs") / "run"
    train_pgd_he.main([*FEW, "--epochs", "3", "--out", str(out)])
    return out


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


@pytest.mark.parametrize("command, number, code", [
    ("train_pgd_he", signal.SIGINT, 130), ("train_free_he --replays 2", signal.SIGTERM, 143),
    ("train_dsphere --arch dsphere_mnist --train fgsm --loss annealing", signal.SIGTERM, 143),
    ("train_abcl --adversarial", signal.SIGTERM, 143),
    ("train_pgd_he --ema 0.9 --optimizer adamw", signal.SIGTERM, 143),
])  # fmt: skip
def test_a_run_stopped_in_mid_epoch_resumes_as_if_uninterrupted(cli, tmp_path, monkeypatch, command, number, code):
    """In the second of three batches. A second signal ends the run at once, and costs the epoch."""
    script, *flags = command.split()
    flags, batches = [*FEW, *flags, "--epochs", "2", "--out"], common.Run.batches
    assert cli(script, *flags, tmp_path / "whole")[0] == 0

    def interrupted(run):
        for i, batch in enumerate(batches(run)):
            for _ in range(signals if (run.epoch, i) == (2, run.replays) else 0):
                os.kill(os.getpid(), number)
            yield batch

    monkeypatch.setattr(common.Run, "batches", interrupted)
    signals = 2
    stopped, _, err = cli(script, *flags, tmp_path / "part")
    assert stopped == 130 and err.splitlines()[-1].startswith("interrupted; ")
    signals = 1
    stopped, out, err = cli(script, *flags, tmp_path / "part", "--resume")
    assert stopped == code and "resumed after epoch 1 and 0 batches" in out
    assert f"stopped in epoch 2 after 2 batches; continue with: python {script}.py" in err and "--resume" in err
    signals = 0
    torch.manual_seed(123)  # what was drawn before plays no part
    stopped, out, _ = cli(script, *flags, tmp_path / "part", "--resume")
    assert stopped == 0 and "resumed after epoch 1 and 2 batches" in out
    assert_same(tmp_path / "whole", tmp_path / "part")


def test_a_killed_process_loses_an_epoch_at_most_and_sets_the_spin_count_in_time(cli, finished, tmp_path):
    flags = [*FEW, "--epochs", "3", "--out", str(tmp_path / "run")]
    environment = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with open(tmp_path / "stderr", "w") as err:
        command = [sys.executable, "-u", str(ROOT / "train_pgd_he.py"), *flags]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=err, text=True)
    try:
        next(line for line in process.stdout if line.startswith("epoch 1 "))
    finally:
        process.kill()
        process.communicate()
    assert cli("train_pgd_he", *flags, "--resume")[0] == 0
    assert_same(finished, tmp_path / "run")
    assert [row["epoch"] for row in csv.DictReader(open(tmp_path / "run" / "log.csv"))] == ["1", "2", "3"]
    assert "GOMP_SPINCOUNT = '5000'" in (tmp_path / "stderr").read_text()


def test_a_full_disk_is_one_line_and_leaves_a_run_that_can_be_resumed(cli, tmp_path, monkeypatch):
    """best.pt is already of the second epoch then, the best one, and last.pt still of the first."""
    flags, write, written = [*FEW, "--epochs", "3", "--out", tmp_path / "run"], Path.write_bytes, []
    held_out = {1: (50.0, 10.0, 20.0), 2: (60.0, 20.0, 20.0), 3: (60.0, 15.0, 20.0)}
    monkeypatch.setattr(common.Run, "_held_out", lambda run: held_out[run.epoch])

    def full(path, content):
        written.extend([path.name] * (".pt" in path.name))
        if len(written) == 4:
            write(path, bytes(content)[:1000])
            raise OSError(28, "No space left on device")
        return write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        code, _, err = cli("train_pgd_he", *flags)
    assert code == 2 and err.splitlines()[-1].startswith("train_pgd_he.py: error: [Errno 28] No space left on device")
    assert common.read_file(tmp_path / "run" / "last.pt")["epoch"] == 1
    assert cli("train_pgd_he", *flags, "--resume")[0] == 0
    assert [common.read_file(tmp_path / "run" / name)["epoch"] for name in ("best.pt", "last.pt")] == [2, 3]


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


def test_resume_refuses_by_name_what_has_changed(finished, refused, monkeypatch):
    flags = [*FEW, "--out", finished, "--resume", "--epochs"]
    assert "already holds a run" in refused("train_pgd_he", *FEW, "--out", finished)
    for flag, value in (("--eps", "0.2"), ("--margin", "0.1"), ("--seed", "3"), ("--batch-size", "16")):
        assert f"{flag} was" in refused("train_pgd_he", *flags, "3", flag, value)
    assert "--epochs was 3, now 2" in refused("train_pgd_he", *flags, "2")
    assert "--method was pgd_he" in refused("train_trades_he", *flags, "3")
    monkeypatch.setattr(common.Data, "statistics", lambda data: {"mean": [0.5], "std": [0.3]})
    assert re.search("mean of the network was .* now .0.5. .*other images", refused("train_pgd_he", *flags, "3"))


def test_resume_with_more_epochs_continues_and_with_none_left_changes_nothing(cli, refused, copy):
    flags = [*FEW, "--epochs", 4, "--out", copy, "--resume"]
    for before in (3, 4):
        code, out, _ = cli("train_pgd_he", *flags)
        assert code == 0 and f"resumed after epoch {before} and 0 batches, of 4" in out and "python eval_all.py" in out
        assert [row["epoch"] for row in state(copy)[1]] == [1, 2, 3, 4]
    content = common.read_file(copy / "last.pt")
    common.save(content | {"format": "angular-defenses-1", "rng": {}}, copy / "last.pt")
    assert "can only be evaluated" in refused("train_pgd_he", *flags)
    model, meta = common.load_checkpoint(copy / "last.pt")
    assert "rng" not in meta and torch.equal(model.fc.weight, content["model"]["fc.weight"])


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("payload-ran"),))


def test_a_file_that_is_no_checkpoint_is_a_user_error(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = common.read_file(finished / "best.pt")
    (tmp_path / "cut").write_bytes((finished / "best.pt").read_bytes()[:5000])
    (tmp_path / "empty").write_bytes(b"")
    torch.save([1, 2, 3], "list")
    torch.save(good | {"model": Payload()}, "code")
    torch.save(good["model"], "bare")
    torch.save(good | {"model_options": good["model_options"] | {"arch": "wrn-16-1"}}, "other")
    torch.save(good | {"model_options": good["model_options"] | {"arch": "../vgg"}}, "unknown")
    torch.save(good | {"model_options": good["model_options"] | {"gate": True}}, "newer")
    torch.save({"format": good["format"]}, "entries")
    for file, complaint in (
        ("cut", "damaged, or not a dict"), ("empty", "damaged"), ("list", "damaged"), ("code", "damaged"),
        ("bare", "a state dict needs --arch"), ("other", "not the weights"), ("newer", "no option 'gate'"),
        ("unknown", r"unknown arch '\.\./vgg'"), ("entries", "not the weights"), ("nowhere", "no such checkpoint"),
    ):  # fmt: skip
        with pytest.raises(common.UserError, match=f"^{file}: .*{complaint}"):
            common.load_checkpoint(file)
    assert not Path("payload-ran").exists()


@pytest.mark.parametrize("broken", ["loss", "gradient", "weight"])
def test_a_nonfinite_loss_gradient_or_weight_names_its_epoch_and_is_not_saved(refused, monkeypatch, copy, broken):
    before, step = (copy / "last.pt").read_bytes(), common.Run.step

    def break_the_last(run, loss, logits, y):
        last = run.iteration == 11
        if last and broken != "weight":
            loss = loss * torch.nan if broken == "loss" else loss + (logits * 0).sqrt().sum()  # d sqrt(0) is infinite
        step(run, loss, logits, y)
        if last and broken == "weight":
            run.model.fc.weight.data[0, 0] = torch.inf

    monkeypatch.setattr(common.Run, "step", break_the_last)
    assert "not finite in epoch 4" in refused("train_pgd_he", *FEW, "--epochs", 4, "--out", copy, "--resume")
    assert (copy / "last.pt").read_bytes() == before


def train(out, *flags, criterion=None, optimizer=None):
    """PGD-AT as a user's own script, with a loss and an optimizer of its own."""
    args = train_pgd_he.parse_args([*FEW, "--out", str(out), *flags])
    data = common.load_data(args.dataset, limit=args.limit)
    model = common.build_model(args, data, head="he", scale=args.scale)
    run = common.Run(args, model, data, criterion)
    if optimizer:
        run.optimizer = optimizer(model, criterion)
    for _ in run.epochs():
        for x, y in run.batches():
            logits, z = model(x, with_features=True)
            loss = common.margin_ce(logits, y, args.scale)
            run.step(loss if criterion is None else loss + criterion(z, y), logits, y)
        run.finish_epoch()
    return run


class Centers(torch.nn.Module):
    """A loss with a parameter and a buffer."""

    def __init__(self, classes=10):
        super().__init__()
        self.centers = torch.nn.Parameter(torch.zeros(classes, 64))
        self.register_buffer("calls", torch.tensor(0.0))

    def forward(self, z, y):
        self.calls += 1
        return (z - self.centers[y]).square().mean()


def adagrad(model, criterion):
    return torch.optim.Adagrad([{"params": model.parameters(), "lr": 0.02}, {"params": criterion.parameters()}], lr=0.5)


@pytest.mark.parametrize("optimizer", [None, adagrad])
def test_a_loss_with_parameters_and_an_own_optimizer_are_trained_saved_and_resumed(tmp_path, optimizer):
    """The schedule scales the rate of each group, and the log has that of the first. Evaluation needs neither."""
    own, flags = dict(optimizer=optimizer), ["--schedule", "constant", "--epochs"]
    whole = train(tmp_path / "whole", *flags, "2", criterion=Centers(), **own)
    train(tmp_path / "part", *flags, "1", criterion=Centers(), **own)
    part = train(tmp_path / "part", *flags, "2", "--resume", criterion=Centers(), **own)
    assert_same(tmp_path / "whole", tmp_path / "part")
    assert part.criterion.calls == whole.criterion.calls == 6 and (whole.criterion.centers != 0).any(1).all()
    rates = [0.02, 0.5] if optimizer else [2e-3]
    assert [group["lr"] for group in part.optimizer.param_groups] == rates and part.history[-1]["lr"] == rates[0]
    common.load_checkpoint(tmp_path / "part")
    train(tmp_path / "late", "--schedule", "multistep", "--epochs", "1", criterion=Centers(), **own)
    train(tmp_path / "late", "--schedule", "multistep", "--epochs", "2", "--resume", criterion=Centers(), **own)
    logged = [row["lr"] for row in state(tmp_path / "late")[1]]  # after 2 of 3 steps, and after 5 of 6
    assert logged == pytest.approx([rates[0], 0.1 * rates[0]])


def test_resume_refuses_another_criterion_or_optimizer(tmp_path):
    train(tmp_path, "--epochs", "1", criterion=Centers())
    groups = lambda model, criterion: torch.optim.Adam([{"params": [p]} for p in model.parameters()])  # noqa: E731
    rmsprop = lambda model, criterion: torch.optim.RMSprop([*model.parameters(), *criterion.parameters()])  # noqa: E731
    for criterion, optimizer, complaint in (
        (None, None, "is of another Module"), (Centers(3), None, "is of another Centers"),
        (Centers(), groups, "is of another Adam"), (Centers(), rmsprop, "the optimizer was Adam, now RMSprop"),
    ):  # fmt: skip
        with pytest.raises(common.UserError, match=f"--resume: .*{complaint}"):
            train(tmp_path, "--epochs", "2", "--resume", criterion=criterion, optimizer=optimizer)


def test_the_average_of_the_weights_is_held_out_saved_and_evaluated(tmp_path, monkeypatch):
    weights, average, held_out, step = [], None, common.Run._held_out, common.Run.step

    def record(run, *batch):
        step(run, *batch)
        weights.append(run.model.fc.weight.detach().clone())

    monkeypatch.setattr(common.Run, "step", record)
    seen = []
    monkeypatch.setattr(common.Run, "_held_out", lambda run: seen.append(held_out(run)) or seen[-1])
    run = train(tmp_path, "--ema", "0.8", "--epochs", "2")
    for weight in weights:
        average = weight if average is None else 0.8 * average + 0.2 * weight
    for content in (common.read_file(tmp_path / name) for name in ("best.pt", "last.pt")):
        assert content["trained"].keys() == content["model"].keys()
    torch.testing.assert_close(content["model"]["fc.weight"], average)
    assert torch.equal(content["trained"]["fc.weight"], weights[-1]) and not torch.equal(average, weights[-1])
    running = [content[part]["bn1.running_mean"] for part in ("model", "trained")]
    assert not torch.equal(*running) and torch.equal(run.average.module.bn1.running_mean, running[0])
    model, _ = common.load_checkpoint(tmp_path / "last.pt")
    x = common.images_at(run.data.x_train, run.data.val, "cpu")
    clean = 100 * (model(x).argmax(1) == run.data.y_train[run.data.val]).float().mean().item()
    assert clean == pytest.approx(seen[-1][0]) == run.history[-1]["val_clean"]


def test_a_new_option_of_build_model_leaves_older_runs_as_they_are(finished, cli, refused, copy, monkeypatch):
    """Only options that differ from their default are stored; a run resumes if the new option is at its default."""
    stored = common.read_file(copy / "last.pt")["model_options"]
    assert {"arch", "num_classes", "head", "scale"} <= stored.keys() and not {"fn", "feature_dim"} & stored.keys()
    build, flags = models.build_model, [*FEW, "--epochs", "4", "--out", copy, "--resume"]

    def extended(*args, gate=False, **options):
        model = build(*args, **options)
        model.options["gate"] = gate
        return model

    monkeypatch.setattr(models, "build_model", extended)
    monkeypatch.setattr(models, "DEFAULTS", models.DEFAULTS | {"gate": False})
    assert cli("train_pgd_he", *flags)[0] == 0 and "gate" not in common.read_file(copy / "last.pt")["model_options"]
    common.load_checkpoint(finished)
    monkeypatch.setattr(models, "build_model", lambda *args, **options: extended(*args, **{"gate": True} | options))
    assert "gate of the network was False, now True" in refused("train_pgd_he", *flags)


def test_a_gpu_that_torch_cannot_use_is_one_warning(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for gpu, lines in ((tmp_path / "none", 0), (tmp_path, 1)):
        monkeypatch.setattr(common, "NVIDIA", gpu)
        assert common.device_flag("auto") == "cpu" and capsys.readouterr().err.count("\n") == lines
        assert train_pgd_he.parse_args(["--device", "cpu"]).device == "cpu" and not capsys.readouterr().err


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
    flags = "--limit 164 --batch-size 32 --steps 1 --lr 0.001 --epochs 4 --schedule cosine --eps-warmup 2 --eps 0.2"
    assert cli(*command.split(), *flags.split(), "--out", tmp_path / "run")[0] == 0
    expected = [0.001 * common.SCHEDULES["cosine"]((epoch * steps - 1) / (4 * steps)) for epoch in (1, 2, 3, 4)]
    assert [row["lr"] for row in state(tmp_path / "run")[1]] == pytest.approx(expected)
    assert seen[::2] == pytest.approx([min(0.2, 0.2 * step / (2 * steps)) for step in range(1, 4 * steps + 1)])


@pytest.mark.parametrize("command, best", [
    ("train_weightpen", 1), ("train_mmc", 1), ("train_dsphere", 1), ("train_pgd_he", 2),
    ("train_abcl --adversarial", 2), ("train_dsphere --train fgsm", 2),
])  # fmt: skip
def test_best_pt_is_the_most_robust_epoch_or_the_most_accurate(cli, tmp_path, monkeypatch, command, best):
    held_out = iter([(90.0, 10.0, 20.0), (80.0, 50.0, 20.0), (80.0, 50.0, 20.0)])  # the last is no better
    monkeypatch.setattr(common.Run, "_held_out", lambda run: next(held_out))
    flags = ["--limit", "132", "--batch-size", "32", "--steps", "1", "--epochs", "3", "--out", tmp_path / "run"]
    assert cli(*command.split(), *flags)[0] == 0
    assert common.read_file(tmp_path / "run" / "best.pt")["epoch"] == best


def test_the_log_has_percentages_of_the_images_and_one_class_for_all_is_warned_of(cli, tmp_path, monkeypatch):
    """Of a network that predicts class 3 for every image."""
    forward = models.Classifier.forward
    biased = lambda model, x: forward(model, x) + 100 * F.one_hot(torch.tensor(3), 10)  # noqa: E731
    monkeypatch.setattr(models.Classifier, "forward", biased)
    flags = "--head linear --limit 164 --batch-size 64 --epochs 1 --steps 1 --lr 1e-9".split()
    code, out, err = cli("train_pgd_he", *flags, "--out", tmp_path / "run")
    (row,), data = state(tmp_path / "run")[1], common.load_data("digits", limit=164)
    of_class_3 = [100 * (data.y_train[rows] == 3).float().mean().item() for rows in (data.train, data.val, data.val)]
    logged = [row[key] for key in ("train_accuracy", "val_clean", "val_robust")]
    assert logged == pytest.approx(of_class_3, abs=0.01) and min(logged) > 2
    assert row["loss"] == pytest.approx(100 - of_class_3[0], abs=3)  # its logits are apart by 100
    assert code == 0 and "epoch 1 lr 1e-09 loss" in out and "are one class" in err


@pytest.fixture
def run_on(make_npz, tmp_path):
    """run_on("cifar10_toy", shape) -> a Run on a small file of that name, with the arguments of PGD-AT."""

    def make(name, shape, *flags):
        argv = ["--dataset", str(make_npz(name, shape=shape)), "--arch", "wrn-10-1", "--batch-size", "10", *flags]
        args = train_pgd_he.parse_args([*argv, "--out", str(tmp_path / "run")])
        data = common.load_data(args.dataset)
        run = common.Run(args, common.build_model(args, data, scale=15.0), data)
        run.epoch = 1
        return run

    return make


@pytest.mark.parametrize("name, shape, flags, augmented", [
    ("cifar10_toy", (32, 32, 3), [], True), ("toy", (8, 8), [], False), ("tiny-imagenet_toy", (8, 8, 3), [], True),
    ("cifar10_toy", (32, 32, 3), ["--no-augment"], False), ("toy", (8, 12), ["--augment"], True),
])  # fmt: skip
def test_an_epoch_visits_each_image_once_and_augments_cifar_and_imagenet_only(run_on, name, shape, flags, augmented):
    run = run_on(name, shape, *flags)
    x, y = (torch.cat(parts) for parts in zip(*run.batches(), strict=True))
    originals = common.to_float(run.data.x_train[run.data.train])
    assert len(x) == 40 and torch.equal(y.bincount(), run.data.y_train[run.data.train].bincount())
    found = {image.numpy().tobytes() for image in x} & {image.numpy().tobytes() for image in originals}
    assert len(found) < 10 if augmented else len(found) == 40
    same_x, _ = (torch.cat(parts) for parts in zip(*run.batches(), strict=True))
    run.epoch = 2
    other_x, _ = (torch.cat(parts) for parts in zip(*run.batches(), strict=True))
    assert torch.equal(x, same_x) and not torch.equal(x, other_x)


def test_the_memory_of_a_freed_tensor_is_used_again():
    faults = [(torch.ones(2**25), resource.getrusage(0).ru_minflt)[1] for _ in range(9)]  # of 32,768 pages
    assert torch.tensor(faults).diff().min() < 1000 or platform.libc_ver()[0] != "glibc"


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


def test_a_compiled_model_trains_to_the_same_loss_and_its_checkpoint_loads(cli, tmp_path, monkeypatch):
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_(module, backend="aot_eager"))
    losses = []
    for flag in ("--compile", "--no-compile"):
        flags = [*FEW, "--arch", "small_cnn", "--no-amp", "--epochs", "1", "--out", tmp_path / flag, flag]
        assert cli("train_pgd_he", *flags)[0] == 0
        losses.append(state(tmp_path / flag)[1][0]["loss"])
        common.load_checkpoint(tmp_path / flag)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


# Wrong input: one line on stderr, exit code 2.
def test_a_bad_flag_is_one_line(refused):
    bad = {
        "argument --eps: '8/0' is not a number (float) from 0 to 1": ["--eps", "8/0"],
        "argument --eps: '8' is not a number (float) from 0 to 1": ["--eps", "8"],
        "argument --steps: '2.5' is not a number (int)": ["--steps", "2.5"],
        "argument --device: 'tpu' is not available": ["--device", "tpu"],
        "--batch-size 5000": ["--batch-size", "5000"],
        "argument --head: invalid choice: 'cosine'": ["--head", "cosine"],
        "head he alone": ["--head", "mhe", "--no-fn"],
        "Not a directory": ["--out", __file__ + "/run"],
    }
    for complaint, flags in bad.items():
        line = refused("train_pgd_he", *flags)
        assert complaint in line and line.startswith("train_pgd_he.py: error: ")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_scripts_defaults_begin_a_run_on_every_dataset(make_npz, monkeypatch, script):
    Begun = type("Begun", (Exception,), {})

    def begin(self, args, model, data, **options):
        assert args.epochs and model.options["arch"] == args.arch
        raise Begun

    monkeypatch.setattr(common.Run, "__init__", begin)
    for name, shape in (("mnist", (28, 28)), ("cifar10", (32, 32, 3)), ("mine", (32, 32, 3))):
        with torch.device("meta"), pytest.raises(Begun):  # no memory and no time for its weights
            importlib.import_module(script).main(["--dataset", str(make_npz(name, shape=shape))])


HE = dict(epochs=100, optimizer="sgd", schedule="multistep", arch="wrn-34-10", lr=0.1, weight_decay=2e-4, steps=10)
HE |= dict(eps=8 / 255, step_size=2 / 255, scale=15.0, margin=0.2)
ANGULAR = dict(eps=0.031, step_size=0.007, margin=0.0, alpha=0.55, beta=0.48)
PAPERS = {
    "train_pgd_he --dataset cifar10": HE,
    "train_pgd_he --dataset cifar10 --head mhe": HE | dict(margin=0.1),
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
    "train_weightpen --dataset mnist": dict(arch="small_cnn", schedule="constant", batch_size=1024, activation="tanh"),
    "train_dsphere --dataset mnist": dict(epochs=66, schedule="thirds", eps=0.3, step_size=0.075, correlation="cosine"),
    "train_dsphere --dataset cifar10": dict(arch="dsphere_cifar", epochs=168, schedule="late", steps=7, lr=1e-3),
    "train_abcl --dataset mnist": dict(arch="alexnet", k1=512.0, k2=64.0, feature_dim=10, scale=5.0, margin=0.2),
}


@pytest.mark.parametrize("command", PAPERS)
def test_the_papers_defaults(command):
    script, *flags = command.split()
    args = vars(importlib.import_module(script).parse_args(flags))
    assert {key: args[key] for key in PAPERS[command]} == PAPERS[command]
