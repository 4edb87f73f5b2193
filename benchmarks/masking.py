"""How networks hide their gradients: accuracy under FGSM and under noise, and where gradients and features vanish.

    python benchmarks/masking.py runs/dsphere-mnist-s0/last.pt runs/cnn-mnist-s0/last.pt --eps 0.3

FGSM leaves a pixel without a gradient as it is: where these are many, random signs in their place make it stronger.
Gradients are of the training loss without its margin; an image that is misclassified clean counts as wrong throughout.
Prints a Markdown table, a column for each network: benchmarks/by_hand.md has parts of ours. Nothing passes or fails.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import eval_all


def input_gradient(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """d CE(s * logits, y) / d x, (B, C, H, W)."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(eval_all.training_loss(net)(net(x), y).sum(), x)[0]


def measure(net: nn.Module, x: Tensor, y: Tensor, eps: float) -> dict[str, Tensor]:
    """Per image (B,): shares, and in the last two rows numbers."""
    clean = eval_all.predict(net, x) == y
    correct = lambda images: (clean & (eval_all.predict(net, images) == y)).float()  # noqa: E731
    vanish = lambda images: (net.features(images) == 0).all(1).float()  # noqa: E731
    pgd = partial(common.pgd, net, x, y, loss=eval_all.training_loss(net), eps=eps)
    random = torch.rand_like(x) * 2 - 1
    noise = (x + eps * random).clamp(0, 1)
    from_noise = pgd(step_size=eps, steps=1, start=noise)
    pgd_40 = pgd(step_size=2.5 * eps / 40, steps=40)
    inputs = []  # of the last activation, where the network has one of its own
    hook = net.activation.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    gradient = input_gradient(net, x, y)
    hook.remove()
    filled = torch.where(gradient == 0, random.sign(), gradient.sign())
    with torch.no_grad():
        last = inputs[0] if inputs else net.features(x)
        return {
            "clean": clean.float(),
            "FGSM": correct((x + eps * gradient.sign()).clamp(0, 1)),
            "FGSM, random signs where the gradient is 0": correct((x + eps * filled).clamp(0, 1)),
            "random signs": correct((x + eps * random.sign()).clamp(0, 1)),
            "uniform noise": correct(noise),
            "FGSM from that noise": correct(from_noise),
            "PGD-40": correct(pgd_40),
            "pixels without a gradient": (gradient == 0).float().mean((1, 2, 3)),
            "images without a gradient": (gradient == 0).flatten(1).all(1).float(),
            "images whose features are all 0": vanish(x),
            "the same, under the noise": vanish(noise),
            "the same, under PGD-40": vanish(pgd_40),
            "median of the largest gradient of a pixel": gradient.abs().amax((1, 2, 3)),
            "median magnitude of the last activation's input": last.flatten(1).abs().median(1).values,
        }


def main() -> None:
    parser = common.Parser(__doc__)
    parser.add_argument("checkpoints", nargs="+", help="run folders or .pt files")
    parser.add_argument("--data-dir", help="(default: as in training)")
    parser.add_argument("--num-images", type=common.number(int, 1), default=1000)
    parser.add_argument("--eps", type=common.number(float, 0, 1), default=0.3, help="Linf (default: 0.3)")
    args = parser.parse_args()
    heads, columns = [], []
    for checkpoint in args.checkpoints:
        net, meta = common.load_checkpoint(checkpoint)
        data = common.load_data(meta["args"]["dataset"], args.data_dir or meta["args"]["data_dir"])
        rows = torch.randperm(len(data.y_test), generator=torch.Generator().manual_seed(0))[: args.num_images]
        torch.manual_seed(0)
        parts = [(common.images_at(data.x_test, part, "cpu"), data.y_test[part]) for part in rows.split(500)]
        parts = [measure(net, x, y, args.eps) for x, y in parts]
        own = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        heads.append(f"{checkpoint}, n = {len(rows):,}")
        columns.append({k: f"{v.median():.2g}" if "median" in k else f"{100 * v.mean():.1f}" for k, v in own.items()})
    print(f"eps {args.eps}; % except in the last two rows\n")
    print(f"| | {' | '.join(heads)} |\n|{' --- |' * (len(columns) + 1)}")
    for name in columns[0]:
        print(f"| {name} | {' | '.join(column[name] for column in columns)} |")


if __name__ == "__main__":
    common.cli(main)
