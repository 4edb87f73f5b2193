#!/usr/bin/env bash
# The table of CIFAR-10 (JPEG copy) in RESULTS.md: DATA/cifar10_jpeg.npz, whose images were compressed by JPEG. Four
# hours per seed on two cores, measured with bfloat16 attacks on the rows of kind `at`.
#
#     benchmarks/cifar10.sh                   # every row, seeds 0 and 1
#     benchmarks/cifar10.sh --redo pgd-he     # reproduce this row
#     DATASET=cifar10 benchmarks/cifar10.sh   # on CIFAR-10 itself, which is downloaded
dataset=${DATASET:-cifar10_jpeg}
source "$(dirname "$0")/rows.sh"

hour="--arch wrn-10-2 --epochs 10 --schedule cyclic --lr 0.1 --weight-decay 5e-4 --eps 0.031 --step-size 0.007"
rows="
pgd                at       train_pgd_he.py --head linear $hour
pgd-he             at       train_pgd_he.py $hour
angular            at       train_angular_at.py $hour
trades-he          at       train_trades_he.py $hour
weightpen          masked   train_weightpen.py --arch small_cnn --lr 1e-3 --schedule multistep --epochs 60
dsphere            nat-1000 train_dsphere.py --arch dsphere_mnist --epochs 30
"

evaluations() { # row, kind
    evaluate "$1" fast --num-images 2000 --attacks fgsm,pgd-20,adaptive-pgd-20,mim-20,cw-inf,pgd-100
    case $2 in
    at) evaluate "$1" strong --num-images 1000 --attacks autoattack --audit ;;
    nat-*) evaluate "$1" strong --num-images "${2#nat-}" --attacks square,autoattack --audit ;;
    masked) # its gradients vanish, and AutoAttack is slow on images that PGD does not fool
        evaluate "$1" strong --num-images 1000 --attacks square --audit
        evaluate "$1" autoattack --num-images 250 --attacks autoattack
        ;;
    esac
    [ "$2" = at ] || analyze "$1" angles --angles
    case $1 in # one network per method
    pgd-s0 | pgd-he-s0) analyze "$1" gradients --num-images 500 --gradients ;;
    esac
}

start "$@"
