#!/usr/bin/env bash
# The table of CIFAR-10 (JPEG copy) in RESULTS.md: DATA/cifar10_jpeg.npz, whose images went through JPEG. An hour and a
# half a seed on two cores.
#
#     benchmarks/cifar10.sh                   # every row, seeds 0 and 1
#     benchmarks/cifar10.sh --redo pgd-he     # this row, anew
#     DATASET=cifar10 benchmarks/cifar10.sh   # on CIFAR-10 itself, which is downloaded
dataset=${DATASET:-cifar10_jpeg}
source "$(dirname "$0")/rows.sh"

short="--arch wrn-10-2 --limit 20000 --epochs 10 --batch-size 128 --schedule cyclic --lr 0.1"
rows="
pgd                at    train_pgd_he.py --head linear $short
pgd-he             at    train_pgd_he.py $short
trades-he          at    train_trades_he.py $short
angular            at    train_angular_at.py $short
weightpen          nat   train_weightpen.py --arch small_cnn --limit 20000 --lr 1e-3 --schedule multistep --epochs 15
dsphere            nat   train_dsphere.py --arch dsphere_mnist --limit 20000 --epochs 10
"

evaluations() { # row, kind
    case $2 in
    at)
        evaluate "$1" "$1/fast" --amp --n 2000 --attacks fgsm,pgd-20,adaptive-pgd-20,mim-20,cw-inf,pgd-100
        evaluate "$1" "$1/strong" --amp --n 500 --attacks autoattack --audit
        ;;
    nat)
        evaluate "$1" "$1/fast" --n 2000 --attacks fgsm,pgd-20,adaptive-pgd-20,mim-20,cw-inf,pgd-100
        evaluate "$1" "$1/strong" --n 500 --attacks square,autoattack --audit --analyze angles
        ;;
    esac
}

do_rows "$@"
