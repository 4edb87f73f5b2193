"""ALP (adversarial logit pairing), plain, with hypersphere embedding (HE) and with modified HE (m-HE).

Paper: Pang et al., "Boosting Adversarial Training with Hypersphere Embedding", NeurIPS 2020, row ALP of Table 1:

    x* = argmax of CE(s * f(x'), y) over the eps ball,  by PGD                                      (Eq. 3)
    minimize alpha * CE_m(f(x), y) + (1 - alpha) * CE_m(f(x*), y) + lambda * distance(f(x), f(x*))

CE_m(f, y) = CE(s * (f - m * onehot(y)), y) (Eq. 6). The distance is ||f(x) - f(x*)||, the mean over the batch, as in
Table 1. --pairing-norm mse is the mean squared error, as in the authors' code: on cosines its gradient is far smaller
than that of the cross-entropy, so that hardly any pairing is left.

f = cos(theta) for --head he (Eq. 5), -theta for mhe (Sec. 3.5), W z + b for linear (s 1, m 0: Kannan et al. 2018).
The margin m is in the training loss only. Examples are crafted in eval mode and trained on in train mode.

The authors' README trains ALP + HE with s = 20 and m = 0.3; the paper has 15 and 0.2.
Not as in the authors' code: it starts PGD from x + 0.001 * normal noise, this from a uniform point of the ball (their
Sec. B.2); it overwrites W by W / ||W|| in each pass, this differentiates through the normalization (Eq. 4).

    python train_alp_he.py                                     # HE on the bundled digits
    python train_alp_he.py --dataset mnist --head linear       # plain ALP
    python train_alp_he.py --dataset cifar10 --head mhe        # WRN-34-10 with the paper's settings

The paper on CIFAR-10, WRN-34-10, clean / PGD-20: ALP 87.18 / 52.29, +HE 89.91 / 57.69, +m-HE 89.23 / 57.09.
"""

import common

import torch.nn.functional as F

METHOD = {"linear": "alp", "he": "alp_he", "mhe": "alp_mhe"}
MARGIN = {"linear": 0.0, "he": 0.2, "mhe": 0.1}  # Sec. 4 and Appendix C.5


def alp(logits, logits_adv, y, args):
    """The outer loss of ALP in Table 1 for logits (B, K) on the clean and on the adversarial images."""
    clean = common.margin_ce(logits, y, args.scale, args.margin)
    adversarial = common.margin_ce(logits_adv, y, args.scale, args.margin)
    distance = (logits - logits_adv).norm(dim=1).mean()
    if args.pairing_norm == "mse":
        distance = F.mse_loss(logits, logits_adv)
    return args.alpha * clean + (1 - args.alpha) * adversarial + args.pairing * distance


def parse_args(argv=None):
    parser = common.training_parser(__doc__, argv)
    common.add_head_flags(parser, argv, MARGIN, "HE, Sec. 4 and C.5")
    flag, number = parser.add_argument, common.number
    flag("--alpha", type=number(float, 0, 1), default=0.5, help="share of the clean images (default: 0.5; HE's code)")
    flag("--pairing", type=number(float, 0), default=0.5, help="lambda of the distance (default: 0.5; Sec. 4)")
    flag("--pairing-norm", choices=("l2", "mse"), default="l2", help="the distance (default: l2; Table 1)")
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
            logits, logits_adv = model(x), model(x_adv)
            run.step(alp(logits, logits_adv, y, args), logits_adv, y)
        run.finish_epoch()


if __name__ == "__main__":
    common.cli(main)
