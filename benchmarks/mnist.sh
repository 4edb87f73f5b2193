#!/usr/bin/env bash
# The MNIST tables of RESULTS.md. On one core a row takes 30 to 60 minutes per seed, those named *-paper 90 to 240.
#
#     benchmarks/mnist.sh                     # every row, seeds 0 and 1
#     benchmarks/mnist.sh pgd-he trades-he    # these rows
#     benchmarks/mnist.sh --redo pgd-he       # reproduce this row
dataset=mnist
source "$(dirname "$0")/rows.sh"

short="--limit 20000 --epochs 6"
robust="$short --eps-warmup 2"
rows="
pgd                    at+wp  train_pgd_he.py --head linear $robust
pgd-he                 at     train_pgd_he.py $robust
angular                at     train_angular_at.py $robust
trades                 at     train_trades_he.py --head linear $robust
trades-he              at     train_trades_he.py $robust
pgd-mhe                he     train_pgd_he.py --head mhe $robust
trades-mhe             he     train_trades_he.py --head mhe $robust
pgd-fn                 he     train_pgd_he.py --no-wn --margin 0 $robust
pgd-wn                 he     train_pgd_he.py --no-fn --margin 0 $robust
pgd-fn-wn              he     train_pgd_he.py --margin 0 $robust
pgd-scale15            he     train_pgd_he.py --head linear --scale 15 $robust
pgd-fn-scale1          he     train_pgd_he.py --no-wn --margin 0 --scale 1 $robust
pgd-wn-scale1          he     train_pgd_he.py --no-fn --margin 0 --scale 1 $robust
pgd-fn-wn-scale1       he     train_pgd_he.py --margin 0 --scale 1 $robust
angular-none           at     train_angular_at.py --alpha 0 --beta 0 $robust
angular-wfc            at     train_angular_at.py --beta 0 $robust
angular-sep            at     train_angular_at.py --alpha 0 $robust
alp                    he     train_alp_he.py --head linear $robust
alp-he                 he     train_alp_he.py $robust
alp-mhe                he     train_alp_he.py --head mhe $robust
alp-he-mse             he     train_alp_he.py --pairing-norm mse $robust
fast                   he     train_fast_he.py --head linear $short
fast-he                he     train_fast_he.py $short
fast-mhe               he     train_fast_he.py --head mhe $short
free                   he     train_free_he.py --head linear --limit 20000
free-he                he     train_free_he.py --limit 20000
free-mhe               he     train_free_he.py --head mhe --limit 20000
mart                   he+wp  train_mart.py $robust
mmc-at                 he     train_mmc.py --adversarial $robust
abcl                   abcl   train_abcl.py
abcl-cosface           abcl   train_abcl.py --k1 0 --k2 0
abcl-sce               abcl   train_abcl.py --base sce --k1 0 --k2 0
abcl-ht-sce            abcl   train_abcl.py --base ht-sce --k1 0 --k2 0
abcl-on-sce            abcl   train_abcl.py --base sce
abcl-on-ht-sce         abcl   train_abcl.py --base ht-sce
cnn-paper              sphere train_dsphere.py --correlation inner --no-amp --steps 1
dsphere-paper          sphere train_dsphere.py --no-amp --compile --steps 1
dsphere-wm-paper       sphere train_dsphere.py --loss wm --no-amp --compile
dsphere-wm-quad-paper  sphere train_dsphere.py --loss wm --correlation quadratic --no-amp --compile
dsphere-anneal-paper   sphere train_dsphere.py --loss annealing --compile --steps 1
dsphere-wm-trunc-paper sphere train_dsphere.py --loss wm --correlation truncated --compile --steps 1
cnn-fgsm-paper         sphere train_dsphere.py --correlation inner --train fgsm
dsphere-fgsm-paper     sphere train_dsphere.py --train fgsm --compile
cnn-pgd                sphere train_dsphere.py --correlation inner --train pgd --schedule cosine $short
dsphere-pgd            sphere train_dsphere.py --train pgd --schedule cosine $short
weightpen-paper        table4 train_weightpen.py --steps 1
weightpen-26-paper     table4 train_weightpen.py --steps 1 --epochs 26 --no-amp
weightpen-relu-paper   table4 train_weightpen.py --activation relu --steps 1
mmc-paper              table4 train_mmc.py --feature-dim 0 --lr 0.01 --schedule constant --epochs 400 --steps 1
weightpen              wp     train_weightpen.py --batch-size 128 --lr 1e-3 --schedule multistep --epochs 8
weightpen-relu         wp     train_weightpen.py --batch-size 128 --lr 1e-3 --schedule multistep --epochs 8 --activation relu
mmc                    wp     train_mmc.py
"
# NAME-paper has the paper's network, optimizer and length. PGD-10 on the held-out images would take a third of the time
# of natural training: --steps 1.

evaluations() { # row, kind
    local fast=fgsm,pgd-20,adaptive-pgd-20,mim-20,cw-inf strong=square,autoattack
    [[ $2 == he* ]] || fast+=,pgd-100@0.01 # half of the time, and no column of HE's table
    [[ $2 == wp ]] || strong=autoattack
    case $2 in
    abcl) # BIM in Linf and FGSM in L2 are the attacks of its Appendix D
        evaluate "$1" fast --attacks fgsm,fgsm-l2
        evaluate "$1" iterated --num-images 2000 --attacks bim-20,pgd-20
        evaluate "$1" strong --num-images 1000 --attacks square,autoattack
        evaluate "$1" audit --attacks clean --audit
        analyze "$1" angles --angles
        ;;
    sphere) # these networks take four times as long as small_cnn; small batches stay in the caches
        evaluate "$1" fast --attacks noise,fgsm
        evaluate "$1" iterated --num-images 2000 --attacks pgd-20,pgd-100@0.01
        evaluate "$1" strong --num-images 1000 --batch-size 100 --attacks square,autoattack
        evaluate "$1" audit --attacks clean --audit
        [[ $1 == cnn* ]] || analyze "$1" geodesic --num-images 1000 --geodesic
        [[ $1 != cnn-paper-* ]] || # HE's Table 7
            evaluate "$1" table7 --attacks pgd-1@0.075,pgd-1-fn@0.075,pgd-2@0.075,pgd-2-fn@0.075,cw-inf-2@0.075
        ;;
    table4)
        evaluate "$1" fast --num-images 2000 --attacks pgd-20
        evaluate "$1" strong --num-images 1000 --attacks square,autoattack
        evaluate "$1" audit --attacks clean --audit
        analyze "$1" angles --angles
        ;;
    *)
        evaluate "$1" fast --attacks $fast
        evaluate "$1" strong --num-images 1000 --attacks $strong
        evaluate "$1" audit --attacks clean --audit
        [[ $2 == at* || $2 == he* ]] || analyze "$1" angles --angles
        ;;
    esac
    [[ $1 == *-s0 || $2 == wp || $2 == table4 ]] || return 0
    case $2 in # the attacks of WeightPen's Table 4; on an adversarially trained network they take ten minutes more
    *wp | table4)
        evaluate "$1" table4 --num-images 1000 --attacks pgd-40@0.01,pgd-200@0.01,deepfool
        evaluate "$1" table4-slow --num-images 100 --attacks mta-200@0.01,cw-l2
        ;;
    esac
    case $1 in
    pgd-s0 | pgd-scale15-s0 | pgd-he-s0 | angular-s0 | weightpen-s0 | weightpen-paper-s0 | mmc-s0)
        analyze "$1" curves --num-images 500 --curves
        ;;
    esac
}

pictures() { # of the first seed's networks; the positions of the features, a thousand each, are not kept
    flock -n 9 || return 0
    local row out
    for row in weightpen-paper weightpen-relu-paper abcl abcl-cosface; do
        [ "$runs/$row-s0/made_by" -nt "figures/features-$row.png" ] || continue
        out=$runs/pictures/$row
        mkdir -p "$out"
        "$python" analyze.py "$(network "$row-s0")" --data-dir "$data" --out "$out" --num-images 1000 --features >"$out/log"
        cp "$out"/features*.png "figures/features-$row.png"
    done
}

start "$@"
(pictures) 9>"$runs/pictures.lock"
