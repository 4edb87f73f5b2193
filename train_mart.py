"""MART, the baseline that the weight penalization paper compares with.

Paper: Wang et al., "Improving Adversarial Robustness Requires Revisiting Misclassified Examples", ICLR 2020, Eq. 11:

    x* = argmax of CE(f(x'), y) over the eps ball,  by PGD
    minimize BCE(p(x*), y) + beta * KL(p(x) || p(x*)) * (1 - p_y(x))
    BCE(p, y) = -log p_y - log(1 - max over k != y of p_k)

p = softmax(W z + b). Misclassified images, with a small p_y(x), weigh most in the KL. Examples are crafted in eval mode
and trained on in train mode.

Not as in the authors' code: it starts PGD from x + 0.001 * normal noise, this from a uniform point of the ball; it adds
1e-4 and 1e-12 inside its logarithms, this takes them of sums that cannot vanish; its rate falls at epochs 75 and 90,
this one's at 68 and 81 of 90.

    python train_mart.py                                       # on the bundled digits
    python train_mart.py --dataset cifar10                     # WRN-34-10, 90 epochs

The weight penalization paper (Table 2) quotes 84.17 clean / 58.56 under PGD-20 on CIFAR-10, WRN-34-10.
"""

import common

import torch.nn.functional as F

OVERRIDES = {
    "cifar10": dict(
        epochs=90, weight_decay=7e-4, eps="0.031", step_size="0.007", source="MART, train_wideresnet.py; schedule ours"
    ),
}


def mart_loss(logits, logits_adv, y, beta):
    """Eq. 11 for logits (B, K) on the clean and on the adversarial images."""
    log_p, log_p_adv, label = F.log_softmax(logits, dim=1), F.log_softmax(logits_adv, dim=1), y[:, None]
    runner_up = log_p_adv.scatter(1, label, -float("inf")).argmax(1, keepdim=True)
    log_others = log_p_adv.scatter(1, runner_up, -float("inf")).logsumexp(1)  # log(1 - p_runner_up)
    boosted = -log_p_adv.gather(1, label).squeeze(1) - log_others
    kl = F.kl_div(log_p_adv, log_p, reduction="none", log_target=True).sum(1)
    doubt = 1 - log_p.gather(1, label).squeeze(1).exp()
    return (boosted + beta * kl * doubt).mean()


def parse_args(argv=None):
    parser = common.training_parser(__doc__, argv, OVERRIDES)
    parser.add_argument("--beta", type=common.number(float, 0), default=6.0, help="of the KL (default: 6; MART)")
    return common.finish_args(parser.parse_args(argv), "mart")


def main(argv=None):
    args = parse_args(argv)
    data = common.load_data(args.dataset, args.data_dir, args.limit)
    model = common.build_model(args, data, head="linear")
    run = common.Run(args, model, data)

    for _ in run.epochs():
        for x, y in run.batches():
            eps, step_size = run.warmup(args.eps), run.warmup(args.step_size)
            x_adv = common.pgd(model, x, y, loss=common.margin_ce, eps=eps, step_size=step_size, steps=args.steps)
            logits, logits_adv = model(x), model(x_adv)
            run.step(mart_loss(logits, logits_adv, y, args.beta), logits_adv, y)
        run.finish_epoch()


if __name__ == "__main__":
    common.cli(main)
