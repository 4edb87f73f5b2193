"""Speed, as ratios measured in one run: what is compared takes turns, so that both meet the same machine.

    python bench.py                # the layers of D-SphereNet against the plain convolution of the same shape

Prints a table and writes bench.json. The machine should have nothing else to do.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import common
import models


def seconds(step: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    step()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def ratios(steps: dict[str, Callable[[], object]], base: str, device: str, rounds: int) -> dict[str, float]:
    """The median over `rounds` of each step's time over that of `base` in the same round, the steps taking turns."""
    for step in steps.values():
        step()
    times = [{name: seconds(step, device) for name, step in steps.items()} for _ in range(rounds)]
    return {name: statistics.median(turn[name] / turn[base] for turn in times) for name in steps}


def layer_step(layer: torch.nn.Module, x: torch.Tensor, amp: bool, backward: bool) -> Callable[[], None]:
    def step() -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp), torch.set_grad_enabled(backward):
            out = layer(x)
        if backward:
            out.sum().backward()

    return step


def bench_layers(device: str, rounds: int) -> list[dict]:
    """A 3x3 convolution of 64 to 128 channels on 28 pixels, batch 64, channels_last, by correlation."""
    x = torch.rand(64, 64, 28, 28, device=device).contiguous(memory_format=torch.channels_last)
    layers = {"plain": torch.nn.Conv2d(64, 128, 3, padding=1, bias=False)} | {
        name: models.SphereConv2d(64, 128, 3, padding=1, correlation=name, manifold="sphere")
        for name in models.CORRELATIONS
    }
    rows = []
    for amp in (False, True):
        for backward in (False, True):
            x_now = x.clone().requires_grad_(backward)
            placed = {n: layer.to(device, memory_format=torch.channels_last) for n, layer in layers.items()}
            steps = {name: layer_step(layer, x_now, amp, backward) for name, layer in placed.items()}
            what = f"{'bfloat16' if amp else 'float32'}, {'forward and backward' if backward else 'forward'}"
            rows.append({"what": what} | ratios(steps, "plain", device, rounds))
    return rows


def print_table(rows: list[dict]) -> None:
    columns = [key for key in rows[0] if key != "what"]
    print(f"{'':<32}" + "".join(f"{column:>11}" for column in columns))
    for row in rows:
        print(f"{row['what']:<32}" + "".join(f"{row[column]:11.2f}" for column in columns))


def main(argv: list[str] | None = None) -> None:
    parser = common.Parser(__doc__)
    parser.add_argument("--rounds", type=common.number(int, 1), default=15, help="(default: 15)")
    parser.add_argument("--device", type=common.device_flag, default=common.default_device())
    parser.add_argument("--out", default="bench.json", help="(default: bench.json)")
    args: argparse.Namespace = parser.parse_args(argv)
    rows = bench_layers(args.device, args.rounds)
    print("time over that of the plain convolution, median of the rounds")
    print_table(rows)
    setting = {"device": args.device, "threads": torch.get_num_threads(), "torch": str(torch.__version__)}
    text = json.dumps({**setting, "layers": rows}, indent=2)
    common.write_atomically(Path(args.out), lambda file: file.write(text), "w")


if __name__ == "__main__":
    common.cli(main)
