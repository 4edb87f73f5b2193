"""FreeAT (free adversarial training), plain, with hypersphere embedding (HE) and with modified HE (m-HE).

Paper: Pang et al., "Boosting Adversarial Training with Hypersphere Embedding", NeurIPS 2020, Sec. 4 and Table 3, on the
method of Shafahi et al. 2019. Each batch is replayed m times, and each backward pass serves twice:

    minimize CE(s * (f(x + delta) - m * onehot(y)), y)  over the weights                            (Eq. 6)
    delta <- clip(delta + step_size * sign(gradient of that loss in x + delta), -eps, eps), x + delta cut to [0, 1]

f = cos(theta) for --head he (Eq. 5), -theta for mhe (Sec. 3.5), W z + b for linear (s 1, m 0). delta persists from
batch to batch: the next images start where the last ones were left. Attack and training share one pass in train mode.

Not as in Shafahi et al.: delta starts from zero in each epoch, so that a resumed run equals an uninterrupted one.

    python train_free_he.py                                    # HE on the bundled digits
    python train_free_he.py --dataset mnist --head linear      # plain FreeAT
    python train_free_he.py --dataset cifar10 --head mhe       # PreActResNet-18, 10 epochs of 8 replays
    python train_free_he.py --dataset imagenet --arch wide_resnet50_2  # images in data/imagenet/train and /val

The paper, clean / PGD-50: CIFAR-10, FreeAT 77.21 / 46.14, +HE 76.85 / 50.98, +m-HE 77.59 / 51.85; ImageNet, ResNet-50,
FreeAT 60.28 / 31.39, +HE 61.83 / 39.85. (The step on ImageNet is the paper's 1/255; its code has 4/255.)
"""

import common

import torch

METHOD = {"linear": "free", "he": "free_he", "mhe": "free_mhe"}
MARGIN = {"linear": 0.0, "he": 0.2, "mhe": 0.1}  # Sec. 4 and Appendix C.5
CIFAR = dict(
    arch="preactresnet18", epochs=10, lr=0.04, weight_decay=5e-4, schedule="cyclic", eps="8/255", step_size="8/255"
)
OVERRIDES = {
    "digits": dict(epochs=12, step_size="0.1"),
    "mnist": dict(epochs=4, step_size="0.3"),
    "cifar10": CIFAR | dict(source="HE, Table 3; FastAT's code"),
    "cifar100": CIFAR | dict(source="HE, Table 3; FastAT's code"),
    "imagenet": dict(epochs=23, source="HE, Sec. 4: 90 epochs, which its code counts as 23 of 4 replays"),
    None: CIFAR | dict(source="as for CIFAR-10"),
}


def parse_args(argv=None):
    parser = common.training_parser(__doc__, argv, OVERRIDES)
    common.add_head_flags(parser, argv, MARGIN, "HE, Sec. 4 and C.5")
    replays, source = (4, "HE, Sec. 4") if parser.known == "imagenet" else (8, "FastAT's code")
    text = f"m (default: {replays}; {source})"
    parser.add_argument("--replays", type=common.number(int, 1), default=replays, help=text)
    args = parser.parse_args(argv)
    return common.finish_args(args, METHOD[args.head])


def main(argv=None):
    args = parse_args(argv)
    data = common.load_data(args.dataset, args.data_dir, args.limit)
    head = dict(head=args.head, fn=args.fn, wn=args.wn, scale=args.scale, margin=args.margin)
    model = common.build_model(args, data, **head)
    run = common.Run(args, model, data, replays=args.replays)

    for _ in run.epochs():
        for x, y in run.batches():
            delta = run.carry.get("delta", torch.zeros_like(x))  # from the batch before: the epoch begins with 0
            eps, step_size = run.warmup(args.eps), run.warmup(args.step_size)
            x_adv = (x + delta).clamp(0, 1).requires_grad_()
            logits = model(x_adv)
            run.step(common.margin_ce(logits, y, args.scale, args.margin), logits, y)
            run.carry["delta"] = (delta + step_size * x_adv.grad.sign()).clamp(-eps, eps).clamp(-x, 1 - x)
        run.finish_epoch()


if __name__ == "__main__":
    common.cli(main)
