"""Faults, injected: kills at any instant, signals, full disks, hostile files, broken losses, two runs in one folder."""

import itertools
import math
import multiprocessing
import os
import pickle
import random
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import common
import models
import train_free_he
import train_pgd_he
from test_smoke import VARIANTS

FEW = ("--limit", "292", "--batch-size", "32", "--steps", "2", "--eps-warmup", "1")
SCRIPTS = sorted({script.removesuffix(".py") for script, *_ in VARIANTS.values()})


@pytest.fixture(scope="module")
def spawn():
    """spawn(function, *arguments) -> a new process, forked from a fresh one that has torch and the scripts loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*SCRIPTS, __name__])

    def start(function, *arguments):
        process = context.Process(target=function, args=arguments)
        process.start()
        return process

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        here = Path(__file__).parent
        patch.setenv("PYTHONPATH", f"{here.parent}{os.pathsep}{here}")  # where it finds the scripts and this file
        yield start


def quietly(main, argv):
    """A script's main() with nothing on the terminal."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        main(list(map(str, argv)))


def dies_writing(main, argv, instant, name):
    """Killed at the first last.pt or best.pt: as its bytes are written, before it gets its name, or right after."""
    fsync, replace = os.fsync, os.replace

    def deadly_fsync(file):
        if instant == "bytes" and name in os.readlink(f"/proc/self/fd/{file}"):
            os.truncate(file, 1000)
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(file)

    def deadly_replace(source, target):
        if instant == "before" and target.name == name:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if instant == "after" and target.name == name:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync, os.replace = deadly_fsync, deadly_replace
    quietly(main, argv)


def weights(out):
    return common.read_file(Path(out) / "last.pt")["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_twenty_kills_cost_nothing(spawn, tmp_path):
    """Every third one hits a checkpoint as it is written; the others come within two epochs of a start."""
    flags, out = (*FEW, "--epochs", "20", "--arch", "wrn-10-1"), tmp_path / "killed"
    argv = [*flags, "--out", out, "--resume"]

    def start(argv, folder):
        (folder / "args.json").unlink(missing_ok=True)
        process = spawn(quietly, train_pgd_he.main, argv)
        while not (folder / "args.json").exists():  # it is written as the training begins
            time.sleep(0.002)
        return process, time.monotonic()

    whole, began = start([*flags, "--out", tmp_path / "whole"], tmp_path / "whole")
    whole.join()
    epoch, rng, reached = (time.monotonic() - began) / 20, random.Random(0), set()
    writes = itertools.cycle(itertools.product(("bytes", "before", "after"), ("last.pt", "best.pt")))
    for kill in range(20):
        if kill % 3 == 2:
            process = spawn(dies_writing, train_pgd_he.main, argv, *next(writes))
        else:
            process, _ = start(argv, out)
            process.join(rng.uniform(0, 2 * epoch))
            process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, kill
        if (out / "last.pt").exists():
            reached.add(common.read_file(out / "last.pt")["epoch"])
    last = spawn(quietly, train_pgd_he.main, argv)
    last.join()
    assert last.exitcode == 0 and len(reached) > 3, reached
    assert same(weights(tmp_path / "whole"), weights(out)) and not list(out.glob("*.tmp"))
    rows = [(tmp_path / name / "log.csv").read_text().splitlines() for name in ("whole", "killed")]
    assert [row.split(",")[:6] for row in rows[0]] == [row.split(",")[:6] for row in rows[1]]
    assert [row.split(",")[0] for row in rows[1]] == ["epoch", *map(str, range(1, 21))]


@pytest.fixture
def signalled(monkeypatch):
    """signalled(number, step) -> in the next run, this process is sent that signal in that step."""
    original = common.Run.step

    def arm(number, at):
        steps = itertools.count(1)

        def step(run, *arguments):
            if next(steps) == at:
                os.kill(os.getpid(), number)
            original(run, *arguments)

        monkeypatch.setattr(common.Run, "step", step)

    yield arm
    monkeypatch.setattr(common.Run, "step", original)


@pytest.mark.parametrize("script, flags, number, code, step, told", [
    ("train_pgd_he", ["--arch", "wrn-10-1"], signal.SIGTERM, 143, 3, "stopped by SIGTERM in epoch 1 after 3 batches"),
    ("train_pgd_he", ["--accumulate", "2"], signal.SIGINT, 130, 9, "stopped by SIGINT in epoch 1 after 10 batches"),
    ("train_pgd_he", [], signal.SIGTERM, 143, 6, "in epoch 1 after 6 batches"),  # the last batch of the epoch
    ("train_free_he", ["--replays", "2"], signal.SIGTERM, 143, 15, "in epoch 2 after 2 batches"),
    ("train_abcl", [], signal.SIGTERM, 143, 8, "in epoch 2 after 2 batches"),
])  # fmt: skip
def test_a_signal_stops_between_two_batches_and_nothing_is_lost(
    cli, make_npz, tmp_path, signalled, script, flags, number, code, step, told
):
    data = make_npz("cifar10_toy", train=292, shape=(12, 12, 3)) if script != "train_abcl" else "digits"
    flags = ["--dataset", data, "--arch", "small_cnn", *FEW, "--epochs", "2", "--no-amp", *flags]
    assert cli(script, *flags, "--out", tmp_path / "whole")[0] == 0
    signalled(number, step)
    stopped, _, err = cli(script, *flags, "--out", tmp_path / "stopped")
    assert (stopped, err.count("\n")) == (code, 1) and told in err and err.endswith("--resume\n"), err
    signalled(number, 0)
    done, out, err = cli(script, *flags, "--out", tmp_path / "stopped", "--resume")
    assert done == 0 and "batches of 2" in out, err
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "stopped"))
    history = [common.read_file(tmp_path / name / "last.pt")["history"] for name in ("whole", "stopped")]
    for rows in zip(*history, strict=True):
        rows = [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")} for row in rows]
        assert rows[0] == rows[1]


def test_a_finished_run_leaves_its_folder_and_the_signals_to_the_next(tmp_path):
    """As in a notebook, where a process trains more than once and nothing goes through the shell."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    flags = [*FEW, "--schedule", "constant", "--out", str(tmp_path / "run")]
    train_pgd_he.main([*flags, "--epochs", "1"])
    train_pgd_he.main([*flags, "--epochs", "2", "--resume"])
    assert common.read_file(tmp_path / "run" / "last.pt")["epoch"] == 2
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_full_disk_leaves_the_last_good_checkpoint(cli, refused, tmp_path):
    flags = (*FEW, "--schedule", "constant", "--out", tmp_path / "run")
    assert cli("train_pgd_he", *flags, "--epochs", "1")[0] == 0
    before = (tmp_path / "run" / "last.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        told = refused("train_pgd_he", *flags, "--epochs", "2", "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ".pt could not be written" in told and "is as it was" in told
    assert (tmp_path / "run" / "last.pt").read_bytes() == before and not list((tmp_path / "run").glob("*.tmp"))
    assert cli("train_pgd_he", *flags, "--epochs", "2", "--resume")[0] == 0


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_code_in_a_checkpoint_does_not_run(refused, tmp_path):
    trace = tmp_path / "it-ran"
    pickle.loads(pickle.dumps(Payload(trace)))
    assert trace.exists()
    trace.unlink()
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"model": Payload(trace)}))
    torch.save({"format": common.FORMAT, "model": Payload(trace)}, tmp_path / "torch.pt")
    for name in ("plain.pt", "torch.pt"):
        assert name in refused("eval_all", tmp_path / name, "--dataset", "digits")
    assert not trace.exists()


@pytest.mark.parametrize("options", [
    {"num_classes": 10**9}, {"image_size": 10**7}, {"arch": "wrn-994-99"}, {"feature_dim": 10**9}, {"in_channels": -1},
    {"arch": "../../etc"}, {"arch": ["small_cnn"]}, {"head": "mmc", "num_classes": 10**5}, {"num_classes": "10"},
    {"mean": [0.1] * 10**6}, {"surprise": 1},
])  # fmt: skip
def test_sizes_that_a_file_claims_are_checked_before_anything_is_built(refused, tmp_path, options):
    model = models.build_model("small_cnn", 10, 1, image_size=8)
    content = {"format": common.FORMAT, "model": model.state_dict(), "model_options": model.options | options}
    torch.save(content | {"args": {"dataset": "digits", "data_dir": "data"}}, tmp_path / "hostile.pt")
    began, peak = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "hostile.pt: its weights do not fit" in refused("eval_all", tmp_path / "hostile.pt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < peak + 500_000  # KiB; wrn-994-99 takes hundreds of GiB
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("seed", range(12))
def test_a_flipped_or_cut_checkpoint_is_one_line(cli, tmp_path, seed):
    """Where the flipped bit is in what nobody reads, such as a record's padding, the model is the same."""
    rng = random.Random(seed)
    model = models.build_model("small_cnn", 10, 1, image_size=8)
    content = {"format": common.FORMAT, "model": model.state_dict(), "model_options": model.options}
    torch.save(content | {"args": {"dataset": "digits", "data_dir": "data"}}, tmp_path / "file.pt")
    data = bytearray((tmp_path / "file.pt").read_bytes())
    if seed % 2:
        del data[rng.randrange(len(data)) :]
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    (tmp_path / "file.pt").write_bytes(data)
    code, _, err = cli("eval_all", tmp_path / "file.pt", "--attacks", "clean", "--n", "2")
    if code == 0:
        assert seed % 2 == 0 and same(common.load_checkpoint(tmp_path / "file.pt")[0].state_dict(), model.state_dict())
    else:
        assert code == 2 and "file.pt" in err and err.count("\n") == 1, err


def test_tensors_that_claim_more_than_the_file_has_and_odd_fields_are_one_line(refused, tmp_path):
    model = models.build_model("small_cnn", 10, 1, image_size=8)
    content = {"format": common.FORMAT, "model": model.state_dict(), "model_options": model.options}
    content["args"] = {"dataset": "digits", "data_dir": "data"}
    huge = {key: torch.zeros(()).expand(value.shape) for key, value in content["model"].items()}
    torch.save(content | {"model": huge}, tmp_path / "huge.pt")
    assert "claim more bytes than the file has" in refused("eval_all", tmp_path / "huge.pt")
    for key in ("epoch", "method"):
        torch.save(content | {key: torch.zeros(3)}, tmp_path / "odd.pt")
        assert "odd.pt" in refused("eval_all", tmp_path / "odd.pt")


@pytest.mark.parametrize("broken", ["loss", "gradient", "weight"])
def test_a_broken_loss_or_gradient_names_its_batch_and_keeps_the_last_checkpoint(
    cli, refused, monkeypatch, tmp_path, broken
):
    flags = (*FEW, "--out", tmp_path / "run", "--schedule", "constant")
    assert cli("train_pgd_he", *flags, "--epochs", "1")[0] == 0
    before, calls, original = (tmp_path / "run" / "last.pt").read_bytes(), itertools.count(1), common.Run.step

    def step(run, loss, logits, y):
        now = next(calls)
        if now == 4 and broken != "weight":
            loss = loss * math.nan if broken == "loss" else loss + (logits * 0).sqrt().sum()  # d sqrt(0) is infinite
        original(run, loss, logits, y)
        if now == 6 and broken == "weight":  # as an overflow in the epoch's last step would
            run.model.fc.weight.data[0, 0] = math.inf

    monkeypatch.setattr(common.Run, "step", step)
    told = refused("train_pgd_he", *flags, "--epochs", "2", "--resume")
    assert (
        f"not finite in epoch 2, batch {6 if broken == 'weight' else 4}" in told
        and "last.pt holds what was saved" in told
    )
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


def test_predictions_that_never_change_are_warned_of(cli, make_npz):
    black = np.zeros((292, 8, 8), np.uint8)
    path = make_npz(train=292, x_train=black)
    code, _, err = cli("train_weightpen", "--dataset", path, "--arch", "small_cnn", *FEW, "--epochs", "1", "--lr", "0")
    assert code == 0 and "warning: every prediction of epoch 1 was class" in err


def test_a_gpu_that_is_too_small_is_one_line(refused, monkeypatch):
    def raises(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(common, "pgd", raises)
    told = refused("train_pgd_he", *FEW, "--epochs", "1")
    assert "--batch-size" in told and "--accumulate" in told


def hold(folder):
    common.lock(folder)
    (folder / "held").touch()
    time.sleep(60)


def test_two_runs_in_one_folder_are_refused_and_a_crash_leaves_no_lock(spawn, cli, refused, tmp_path):
    (tmp_path / "run").mkdir()
    holder = spawn(hold, tmp_path / "run")
    while not (tmp_path / "run" / "held").exists():
        time.sleep(0.02)
    flags = (*FEW, "--epochs", "1", "--out", tmp_path / "run")
    assert "another process is writing into" in refused("train_pgd_he", *flags)
    holder.kill()
    holder.join()
    assert cli("train_pgd_he", *flags)[0] == 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_same_seed_gives_the_same_bits_in_fresh_processes(spawn, tmp_path, script):
    flags = ("--limit", "164", "--batch-size", "32", "--steps", "1", "--epochs", "1", "--seed", "3")
    flags += ("--replays", "2") if script == "train_free_he" else ()
    main = __import__(script).main
    runs = [spawn(quietly, main, [*flags, "--out", tmp_path / name]) for name in ("one", "two")]
    for run in runs:
        run.join()
        assert run.exitcode == 0
    assert same(weights(tmp_path / "one"), weights(tmp_path / "two"))


WRONG = ("-1", "0", "nan", "inf", "x", "1e300", "8/0", "", "🙂", "99999999999999999999")
TRAIN = {
    "--epochs": ("1",), "--batch-size": ("2", "32"), "--lr": ("0", "0.01", "1e6"), "--eps": ("0", "8/255", "1"),
    "--step-size": ("0", "0.1"), "--steps": ("1", "2"), "--weight-decay": ("0", "0.1"), "--seed": ("7",),
    "--schedule": ("cyclic", "cosine"), "--optimizer": ("sgd", "adam"), "--head": ("he", "mhe", "linear"),
    "--scale": ("1", "15"), "--margin": ("0", "0.3"), "--arch": ("small_cnn", "wrn-10-1"), "--accumulate": ("1", "2"),
    "--limit": ("1", "120", "164"), "--dataset": ("digits", "nowhere.npz"), "--eps-warmup": ("0", "0.5"),
}  # fmt: skip
EVAL = {
    "--attacks": ("clean", "fgsm,pgd-2@0.1", "square@1", "pgd-0", ",", "deepfool-2,mta-1"), "--n": ("1", "7"),
    "--norm": ("l2", "linf"), "--eps": ("0", "0.1", "8/255"), "--step-size": ("0", "0.1"), "--restarts": ("1", "2"),
    "--batch-size": ("1", "5"), "--seed": ("3",), "--dataset": ("digits", "cifar10"), "--arch": ("wrn-10-1",),
}  # fmt: skip


def command_lines(flags):
    """Up to six flags, most with a value that may be right, some with one that is wrong."""
    pairs = [st.tuples(st.just(flag), st.sampled_from((*good * 3, *WRONG))) for flag, good in flags.items()]
    return st.lists(st.one_of(pairs), max_size=6, unique_by=lambda pair: pair[0])


PROPERTY = settings(
    max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def answered(code, out, err):
    """Exit code 0, or 2 with one line on stderr; never a traceback."""
    lines = [line for line in err.splitlines() if "warning:" not in line]
    assert "Traceback" not in err and (code == 0 or (code == 2 and len(lines) == 1)), (code, err)
    assert code != 0 or "nan" not in out, out


@pytest.mark.parametrize("script", ["train_pgd_he", "train_trades_he"])
@given(data=st.data())
@PROPERTY
def test_any_flags_are_obeyed_or_refused_in_one_line(cli, tmp_path_factory, script, data):
    pairs = data.draw(command_lines(TRAIN))
    small = [(flag, value) for flag, value in zip(FEW[::2], FEW[1::2], strict=True) if flag not in dict(pairs)]
    argv = [f"{flag}={value}" for flag, value in [("--epochs", "1"), *small, *pairs]]
    answered(*cli(script, *argv, "--out", tmp_path_factory.mktemp("any") / "run"))


@pytest.fixture(scope="module")
def digits_checkpoint(tmp_path_factory):
    model = models.build_model("small_cnn", 10, 1, image_size=8, head="he", scale=15.0)
    content = {"format": common.FORMAT, "model": model.state_dict(), "model_options": model.options}
    path = tmp_path_factory.mktemp("eval") / "model.pt"
    torch.save(content | {"args": {"dataset": "digits", "data_dir": "data"}}, path)
    return path


@given(pairs=command_lines(EVAL))
@PROPERTY
def test_any_flags_of_eval_all_are_obeyed_or_refused_in_one_line(cli, digits_checkpoint, pairs):
    small = [(flag, value) for flag, value in (("--n", "5"), ("--attacks", "fgsm")) if flag not in dict(pairs)]
    code, out, err = cli("eval_all", digits_checkpoint, *[f"{flag}={value}" for flag, value in [*small, *pairs]])
    told = "\n".join(line for line in err.splitlines() if line[:2] != "  " and " attacks on " not in line)
    answered(code, out, told)


def test_free_at_hands_its_perturbation_on_within_an_epoch_alone(cli, tmp_path, monkeypatch):
    deltas = []
    original = common.Run._start_figures

    def start(run, begun):
        deltas.append(dict(run.carry))
        return original(run, begun)

    monkeypatch.setattr(common.Run, "_start_figures", start)
    flags = (*FEW, "--epochs", "2", "--replays", "2", "--out", tmp_path / "run")
    assert cli("train_free_he", *flags)[0] == 0
    assert not deltas[0] and "delta" in deltas[1] and train_free_he.METHOD  # there, and then begun anew with {}
