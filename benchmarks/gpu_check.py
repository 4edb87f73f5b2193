"""The first ten minutes on a GPU: is it right, what waits, how fast is it.

    python benchmarks/gpu_check.py                  # resnet18 and wrn-34-10, PGD-10 training, batch 128
    python benchmarks/gpu_check.py resnet18

It prints, each with the value to expect: the environment; gradient signs against the CPU's, in TF32 and bfloat16,
compiled and not; calls that wait for the GPU in a training step (0); images/s of PGD-10 training, compiled and not, of
FastAT and of PGD in evaluation, with peak memory; and whether torchrun works on all GPUs. Without a GPU the batches are
small: that checks the script only.
"""

import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common
import eval_all
import models
import train_fast_he

import torch
from torch import Tensor, nn

CUDA = torch.cuda.is_available()
DEVICE, BATCH = ("cuda", 128) if CUDA else ("cpu", 4)
BUDGET = dict(eps=8 / 255, step_size=2 / 255)


def loss(logits: Tensor, y: Tensor) -> Tensor:
    return common.margin_ce(logits, y, scale=15.0)


def network(arch: str, device: str = DEVICE, amp: bool = False, compiled: bool = False) -> nn.Module:
    torch.compiler.reset()
    torch.manual_seed(0)
    model = models.build_model(arch, 10, 3, head="he", scale=15.0).to(device, memory_format=torch.channels_last)
    model.amp = amp
    if compiled:
        model.compile()
    return model.train()


def images(count: int, device: str = DEVICE) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.rand(count, 3, 32, 32).to(device), (torch.arange(count) % 10).to(device)


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    with common.frozen_eval(model):
        return torch.autograd.grad(loss(model(x), y), x)[0].cpu()


def seconds(function: Callable[[], object]) -> float:
    """Of a call: after two calls, the mean over at least a second."""
    for _ in range(2):
        function()
    if CUDA:
        torch.cuda.synchronize()
    calls, start, finished = 0, time.perf_counter(), 0.0
    while finished < (1 if CUDA else 0.01):
        function()
        calls += 1
        if CUDA:
            torch.cuda.synchronize()
        finished = time.perf_counter() - start
    return finished / calls


def check_environment() -> None:
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.device_count()} GPU(s)")
    print(f"{common.hardware(DEVICE)}, bfloat16: {common.supports_bf16(DEVICE)}")
    try:
        torch.compile(lambda x: (2 * x).relu())(torch.ones(9, device=DEVICE))
        print("torch.compile works")
    except Exception as error:  # each part of the compiler has exceptions of its own
        print(f"torch.compile FAILS: {' '.join(str(error).split())[:200]}")


def check_numerics() -> None:
    """Signs of the input's gradient that differ from those of exact float32."""
    eval_all.allow_tf32(False)
    exact = gradient(network("wrn-10-2"), *images(BATCH)).sign()
    cpu = gradient(network("wrn-10-2", "cpu"), *images(BATCH, "cpu")).sign()
    print(f"signs that differ: CPU {100 * (cpu != exact).float().mean():.3f} % (under 0.1)")
    for name, tf32, amp, compiled in (("TF32", 1, 0, 0), ("bfloat16", 0, 1, 0), ("bfloat16, compiled", 0, 1, 1)):
        eval_all.allow_tf32(bool(tf32))
        other = gradient(network("wrn-10-2", amp=bool(amp), compiled=bool(compiled)), *images(BATCH)).sign()
        print(
            f"signs that differ: {name} {100 * (other != exact).float().mean():.3f} % (TF32 under 1, bfloat16 under 10)"
        )


def check_waits() -> None:
    if not CUDA:
        return
    model, (x, y) = network("resnet18", amp=True), images(BATCH)
    common.pgd(model, x, y, loss=loss, steps=2, **BUDGET)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        loss(model(common.pgd(model, x, y, loss=loss, steps=10, **BUDGET)), y).backward()
        torch.cuda.set_sync_debug_mode("default")
    waits = sum("called a synchronizing" in str(warning.message) for warning in told)
    print(f"calls that wait for the GPU in a training step: {waits} (0)")


def check_speed(arch: str) -> None:
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    x, y = images(BATCH)

    def training(compiled: bool, fast: bool = False) -> None:
        model = network(arch, amp=common.supports_bf16(DEVICE), compiled=compiled)
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4, fused=CUDA or None)

        def step() -> None:
            if fast:
                x_adv = train_fast_he.fast_step(model, x, y, 15.0, 8 / 255, 10 / 255)
            else:
                x_adv = common.pgd(model, x, y, loss=loss, steps=10 if CUDA else 1, **BUDGET)
            optimizer.zero_grad(set_to_none=True)
            loss(model(x_adv), y).backward()
            optimizer.step()

        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        took = seconds(step)
        peak = torch.cuda.max_memory_allocated() / 2**30 if CUDA else 0
        name = f"{arch}, {'FastAT' if fast else 'PGD-10'}{', compiled' if compiled else ''}"
        print(f"{name}: {BATCH / took:.0f} img/s, {1000 * took:.0f} ms a step, peak {peak:.1f} GiB", flush=True)

    for compiled, fast in ((False, False), (True, False), (True, True)) if CUDA else ((False, False), (False, True)):
        training(compiled, fast)
    model, (x, y) = network(arch).eval(), images(500 if CUDA else 4)
    for name, tf32 in (("exact float32", False), ("TF32", True)):
        eval_all.allow_tf32(tf32)
        took = seconds(lambda: common.pgd(model, x, y, loss=loss, steps=2, **BUDGET)) / 2
        print(f"{arch}, evaluation in {name}: {len(x) / took:.0f} images a second and step of PGD", flush=True)


def check_ranks() -> None:
    """One epoch of a small run on every GPU there is."""
    ranks = max(1, torch.cuda.device_count())
    with tempfile.TemporaryDirectory() as out:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={ranks}",
            str(ROOT / "train_pgd_he.py"),
        ]
        flags = ["--epochs", "1", "--batch-size", str(32 * ranks), "--device", DEVICE, "--out", out]
        done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=300)
    print(f"torchrun on {ranks} process(es): " + ("works" if not done.returncode else f"FAILS\n{done.stderr[-2000:]}"))


def main() -> None:
    check_environment()
    check_numerics()
    check_waits()
    for arch in sys.argv[1:] or ("resnet18", "wrn-34-10"):
        check_speed(arch)
    check_ranks()


if __name__ == "__main__":
    main()
