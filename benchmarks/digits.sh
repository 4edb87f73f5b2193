#!/usr/bin/env bash
# The grid and the curve of RESULTS.md on scikit-learn's digits: scale and margin of TRADES+HE (HE, Table 9), steps of
# the attack in training (HE, Fig. 2). About a minute per row.
#
#     benchmarks/digits.sh
#     benchmarks/digits.sh --redo pgd-he-steps3     # reproduce this row
dataset=digits
source "$(dirname "$0")/rows.sh"

rows=$(
    for scale in 1 5 10 15 20; do
        for margin in 0 0.1 0.2 0.3 0.4; do
            echo "trades-he-scale$scale-margin$margin all train_trades_he.py --eps-warmup 3 --scale $scale --margin $margin"
        done
    done
    for steps in 1 2 3 4 5 6 7; do
        for head in linear he; do
            echo "pgd-$head-steps$steps all train_pgd_he.py --eps-warmup 3 --head $head --steps $steps --step-size 0.25/$steps"
        done
    done
)

evaluations() { # row, kind
    evaluate "$1" . --attacks fgsm,pgd-20,adaptive-pgd-20,apgd-t
}

start "$@"
