"""FastAT (fast adversarial training), plain, with hypersphere embedding (HE) and with modified HE (m-HE).

Paper: Pang et al., "Boosting Adversarial Training with Hypersphere Embedding", NeurIPS 2020, Sec. 4 and Table 3, on the
method of Wong et al. 2020: one step from a random start, and a cyclic learning rate.

    x' = x + uniform(-eps, eps);  x* = clip(x' + step_size * sign(gradient of CE(s * f(x'), y)), x - eps, x + eps)
    minimize CE(s * (f(x*) - m * onehot(y)), y)                                                     (Eq. 6)

f = cos(theta) for --head he (Eq. 5), -theta for mhe (Sec. 3.5), W z + b for linear (s 1, m 0). The step is longer than
the radius: 10/255 for 8/255. Both passes are in train mode, as in the code of Wong et al.

    python train_fast_he.py                                    # HE on the bundled digits
    python train_fast_he.py --dataset mnist --head linear      # plain FastAT
    python train_fast_he.py --dataset cifar10 --head mhe       # PreActResNet-18, 30 epochs

The paper on CIFAR-10, clean / PGD-50: FastAT 83.80 / 46.40, +HE 82.58 / 52.55, +m-HE 83.14 / 53.49.
"""

import common

import torch

METHOD = {"linear": "fast", "he": "fast_he", "mhe": "fast_mhe"}
MARGIN = {"linear": 0.0, "he": 0.2, "mhe": 0.1}  # Sec. 4 and Appendix C.5
CIFAR = dict(
    arch="preactresnet18", epochs=30, lr=0.2, weight_decay=5e-4, schedule="cyclic", eps="8/255", step_size="10/255"
)
OVERRIDES = {
    "digits": dict(epochs=60, step_size="0.125", schedule="cyclic"),
    "mnist": dict(epochs=10, lr=5e-3, step_size="0.375", schedule="cyclic"),
    "cifar10": CIFAR | dict(source="HE, Table 3; FastAT's code"),
    "cifar100": CIFAR | dict(source="HE, Table 3; FastAT's code"),
    "imagenet": dict(epochs=30, schedule="cyclic", step_size="5/255"),
    None: CIFAR | dict(source="as for CIFAR-10"),
}


def fast_step(model, x, y, scale, eps, step_size):
    """One sign step from a uniform point of the ball, cut back to the ball and to [0, 1] (Wong et al. 2020, Alg. 3)."""
    start = common.random_start(x, eps, "linf").requires_grad_()
    with common.frozen_eval(model, keep_mode=True):
        (grad,) = torch.autograd.grad(common.margin_ce(model(start), y, scale), start)
    return (start + step_size * grad.sign()).clamp(x - eps, x + eps).clamp(0, 1).detach()


def parse_args(argv=None):
    parser = common.training_parser(__doc__, argv, OVERRIDES)
    common.add_head_flags(parser, argv, MARGIN, "HE, Sec. 4 and C.5")
    args = parser.parse_args(argv)
    return common.finish_args(args, METHOD[args.head])


def main(argv=None):
    args = parse_args(argv)
    data = common.load_data(args.dataset, args.data_dir, args.limit)
    head = dict(head=args.head, fn=args.fn, wn=args.wn, scale=args.scale, margin=args.margin)
    model = common.build_model(args, data, **head)
    run = common.Run(args, model, data)

    for _ in run.epochs():
        for x, y in run.batches():
            x_adv = fast_step(model, x, y, args.scale, run.warmup(args.eps), run.warmup(args.step_size))
            logits = model(x_adv)
            run.step(common.margin_ce(logits, y, args.scale, args.margin), logits, y)
        run.finish_epoch()


if __name__ == "__main__":
    common.cli(main)
