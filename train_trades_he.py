"""TRADES, plain, with hypersphere embedding (HE) and with modified HE (m-HE).

Paper: Pang et al., "Boosting Adversarial Training with Hypersphere Embedding", NeurIPS 2020, row TRADES of Table 1:

    x* = argmax of KL(softmax(s * f(x)) || softmax(s * f(x'))) over the eps ball,  by PGD           (Eq. 3)
    minimize CE(s * (f(x) - m * onehot(y)), y) + beta * KL(softmax(s * f(x)) || softmax(s * f(x*)))

f = cos(theta) for --head he (Eq. 5), -theta for mhe (Sec. 3.5), W z + b for linear (s 1, m 0: Zhang et al. 2019).
The margin m is in the cross-entropy only. Examples are crafted in eval mode and trained on in train mode.

PGD starts from x + 0.001 * normal noise, as in Zhang et al.: the KL has no gradient at x itself. Where Table 1 writes
CE(f(x*), f(x)), the authors' code, as this one, has the KL. Not as in that code: it overwrites W by W / ||W|| in each
pass, this differentiates through the normalization (Eq. 4).

    python train_trades_he.py                                  # HE on the bundled digits
    python train_trades_he.py --dataset mnist --head linear    # plain TRADES
    python train_trades_he.py --dataset cifar10 --head mhe     # WRN-34-10 with the paper's settings

The paper on CIFAR-10, WRN-34-10, clean / PGD-20: TRADES 84.62 / 56.48, +HE 84.88 / 62.02, +m-HE 84.30 / 61.83.
"""

import common

import torch
import torch.nn.functional as F

METHOD = {"linear": "trades", "he": "trades_he", "mhe": "trades_mhe"}
MARGIN = {"linear": 0.0, "he": 0.2, "mhe": 0.1}  # Sec. 4 and Appendix C.5


def kl(logits, logits_adv, scale):
    """KL(softmax(s * logits) || softmax(s * logits_adv)) of logits (B, K), mean over the batch."""
    log_p, log_q = F.log_softmax(scale * logits, dim=1), F.log_softmax(scale * logits_adv, dim=1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def parse_args(argv=None):
    parser = common.training_parser(__doc__, argv)
    common.add_head_flags(parser, argv, MARGIN, "HE, Sec. 4 and C.5")
    parser.add_argument(
        "--beta", type=common.number(float, 0), default=6.0, help="weight of the KL (default: 6; Sec. 4)"
    )
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
            with common.frozen_eval(model), torch.no_grad():
                natural = model(x)

            def attack_loss(logits, y, natural=natural):
                return kl(natural, logits, args.scale)

            start = x + 0.001 * torch.randn_like(x)
            eps, step_size = run.warmup(args.eps), run.warmup(args.step_size)
            x_adv = common.pgd(
                model, x, y, loss=attack_loss, eps=eps, step_size=step_size, steps=args.steps, start=start
            )
            logits, logits_adv = model(x), model(x_adv)
            loss = common.margin_ce(logits, y, args.scale, args.margin) + args.beta * kl(logits, logits_adv, args.scale)
            run.step(loss, logits_adv, y)
        run.finish_epoch()


if __name__ == "__main__":
    common.cli(main)
