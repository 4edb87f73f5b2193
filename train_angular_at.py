"""Angular-AT: PGD-AT on a hypersphere with two angular regularizers.

Paper: Fakorede et al., "Improving Adversarial Robustness with Hypersphere Embedding and Angular-Based Regularizations",
ICASSP 2023:

    minimize CE(s * cos(theta(x*)), y) + alpha * l_wfc + beta * l_sep                               (Eq. 8)
    l_wfc = theta_y(x*)^2, the squared angle between the adversarial feature and its class weight   (Eq. 6)
    l_sep = 1/K sum_i max over j != i of <W~_i, W~_j>, the cosine of each class's nearest other     (Eq. 7)

x* is by PGD on CE(s * cos). s = 15, m = 0 (Sec. 5). Examples are crafted in eval mode and trained on in train mode.
The angles are measured between z and W_k, whatever the head: --head mhe and linear give the same two regularizers on
another cross-entropy, which is our extension.

    python train_angular_at.py                                 # on the bundled digits
    python train_angular_at.py --dataset mnist --alpha 0       # the ablation without l_wfc (Table 4)
    python train_angular_at.py --dataset cifar10               # WRN-34-10 with the paper's settings

The paper on CIFAR-10, WRN-34-10, natural / PGD-20 / AutoAttack: 86.52 / 64.01 / 52.69 (PGD-AT 86.28 / 55.96 / 51.80).
"""

import common
import models

METHOD = {"linear": "angular_at_linear", "he": "angular_at", "mhe": "angular_at_mhe"}
MARGIN = {"linear": 0.0, "he": 0.0, "mhe": 0.0}  # Sec. 5
OVERRIDES = {"cifar10": dict(weight_decay=5e-4, eps="0.031", step_size="0.007", source="Angular-AT, Sec. 5")}


def wfc(cos, y):
    """l_wfc (Eq. 6): the batch mean of theta_y^2, in radians, for cos (B, K). Its gradient is finite at +-1."""
    return models.arccos(cos.gather(1, y[:, None])).square().mean()


def separation(weight):
    """l_sep (Eq. 7): the mean over the classes of the largest cosine to another class, for weights (K, d)."""
    return models.nearest_cosine(weight).mean()


def parse_args(argv=None):
    parser = common.training_parser(__doc__, argv, OVERRIDES)
    common.add_head_flags(parser, argv, MARGIN, "Angular-AT, Sec. 5")
    parser.add_argument("--alpha", type=common.number(float, 0), default=0.55, help="of l_wfc (default: 0.55; Sec. 5)")
    parser.add_argument("--beta", type=common.number(float, 0), default=0.48, help="of l_sep (default: 0.48; Sec. 5)")
    args = parser.parse_args(argv)
    return common.finish_args(args, METHOD[args.head])


def main(argv=None):
    args = parse_args(argv)
    data = common.load_data(args.dataset, args.data_dir, args.limit)
    head = dict(head=args.head, fn=args.fn, wn=args.wn, scale=args.scale, margin=args.margin)
    model = common.build_model(args, data, **head)
    run = common.Run(args, model, data)

    def attack_loss(logits, y):
        return common.margin_ce(logits, y, args.scale)

    for _ in run.epochs():
        for x, y in run.batches():
            eps, step_size = run.warmup(args.eps), run.warmup(args.step_size)
            x_adv = common.pgd(model, x, y, loss=attack_loss, eps=eps, step_size=step_size, steps=args.steps)
            logits, z = model(x_adv, with_features=True)
            cos = models.cosine(z, model.fc.weight)  # an HE head's logits; measured so for every head
            loss = common.margin_ce(logits, y, args.scale, args.margin)
            loss = loss + args.alpha * wfc(cos, y) + args.beta * separation(model.fc.weight)
            run.step(loss, logits, y)
        run.finish_epoch()


if __name__ == "__main__":
    common.cli(main)
