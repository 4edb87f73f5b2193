"""PGD-AT, plain, with hypersphere embedding (HE) and with modified HE (m-HE).

Paper: Pang et al., "Boosting Adversarial Training with Hypersphere Embedding", NeurIPS 2020, row PGD-AT of Table 1:

    x* = argmax of CE(s * f(x'), y) over the eps ball,  by PGD                                      (Eq. 3)
    minimize CE(s * (f(x*) - m * onehot(y)), y)                                                     (Eq. 6)

f = cos(theta) for --head he (Eq. 5), -theta for mhe (Sec. 3.5), W z + b for linear (s 1, m 0: Madry et al. 2018).
The margin m is in the training loss only. Examples are crafted in eval mode and trained on in train mode.

Not as in the authors' code: it starts PGD from x + 0.001 * normal noise, this from a uniform point of the ball (their
Sec. B.2); it overwrites W by W / ||W|| in each pass, this differentiates through the normalization (Eq. 4).

    python train_pgd_he.py                                     # HE on the bundled digits
    python train_pgd_he.py --dataset mnist --head linear       # plain PGD-AT
    python train_pgd_he.py --dataset cifar10 --head mhe        # WRN-34-10 with the paper's settings
    python train_pgd_he.py --dataset cifar10 --head linear --eps 0 --steps 1    # natural training (Table 7)

The paper says s = 15, the authors' README trains PGD + HE with --scale 10. Its results of AutoAttack and RayS (Table 6)
are of networks with --weight-decay 5e-4. Without FN or WN (--no-fn, --no-wn) Eq. 12 has no s: give --scale 1.

The paper on CIFAR-10, WRN-34-10, clean / PGD-20: PGD-AT 86.75 / 53.97, +HE 86.19 / 59.36, +m-HE 86.25 / 59.90.
"""

import common

METHOD = {"linear": "pgd", "he": "pgd_he", "mhe": "pgd_mhe"}
MARGIN = {"linear": 0.0, "he": 0.2, "mhe": 0.1}  # Sec. 4 and Appendix C.5


def parse_args(argv=None):
    parser = common.training_parser(__doc__, argv)
    common.add_head_flags(parser, argv, MARGIN, "HE, Sec. 4 and C.5")
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
            logits = model(x_adv)
            loss = common.margin_ce(logits, y, args.scale, args.margin)
            run.step(loss, logits, y)
        run.finish_epoch()


if __name__ == "__main__":
    common.cli(main)
