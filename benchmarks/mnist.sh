#!/usr/bin/env bash
# The MNIST tables of RESULTS.md.
#
#     benchmarks/mnist.sh                     # every row, seeds 0 and 1
#     benchmarks/mnist.sh pgd-he trades-he    # these rows
#     benchmarks/mnist.sh --redo pgd-he       # reproduce this row
dataset=mnist
source "$(dirname "$0")/rows.sh"

short="--limit 20000 --epochs 6"
robust="$short --eps-warmup 2"
rows="
pgd                   at+wp  train_pgd_he.py --head linear $robust
pgd-he                at     train_pgd_he.py $robust
angular               at     train_angular_at.py $robust
trades                at     train_trades_he.py --head linear $robust
trades-he             at     train_trades_he.py $robust
pgd-mhe               he     train_pgd_he.py --head mhe $robust
trades-mhe            he     train_trades_he.py --head mhe $robust
pgd-fn                he     train_pgd_he.py --no-wn --margin 0 $robust
pgd-wn                he     train_pgd_he.py --no-fn --margin 0 $robust
pgd-fn-wn             he     train_pgd_he.py --margin 0 $robust
pgd-s15               he     train_pgd_he.py --head linear --scale 15 $robust
pgd-fn-s1             he     train_pgd_he.py --no-wn --margin 0 --scale 1 $robust
pgd-wn-s1             he     train_pgd_he.py --no-fn --margin 0 --scale 1 $robust
pgd-fn-wn-s1          he     train_pgd_he.py --margin 0 --scale 1 $robust
alp-he-mse            he     train_alp_he.py --pairing-norm mse $robust
angular-none          at     train_angular_at.py --alpha 0 --beta 0 $robust
angular-wfc           at     train_angular_at.py --beta 0 $robust
angular-sep           at     train_angular_at.py --alpha 0 $robust
weightpen             wp     train_weightpen.py --lr 1e-3 --schedule multistep --epochs 8
weightpen-relu        wp     train_weightpen.py --lr 1e-3 --schedule multistep --epochs 8 --activation relu
mmc                   wp     train_mmc.py
abcl                  abcl   train_abcl.py
abcl-cosface          abcl   train_abcl.py --k1 0 --k2 0
abcl-sce              abcl   train_abcl.py --base sce --k1 0 --k2 0
abcl-ht-sce           abcl   train_abcl.py --base ht-sce --k1 0 --k2 0
abcl-on-sce           abcl   train_abcl.py --base sce
abcl-on-ht-sce        abcl   train_abcl.py --base ht-sce
cnn                   nat    train_dsphere.py --correlation inner $short
dsphere               nat    train_dsphere.py $short
dsphere-wm            nat    train_dsphere.py --loss wm $short
dsphere-wm-quad       nat    train_dsphere.py --loss wm --correlation quadratic $short
dsphere-anneal        nat    train_dsphere.py --loss annealing $short
dsphere-wm-trunc      nat    train_dsphere.py --loss wm --correlation truncated $short
bfloat16              speed  train_pgd_he.py --limit 8000 --epochs 8 --eps-warmup 3 --amp
float32               speed  train_pgd_he.py --limit 8000 --epochs 8 --eps-warmup 3 --no-amp
cnn-plane             plane  train_dsphere.py --correlation inner --feature-dim 2 $short
dsphere-plane         plane  train_dsphere.py --loss wm --feature-dim 2 $short
mart                  he+wp  train_mart.py $robust
mmc-at                he     train_mmc.py --adversarial $robust
alp                   he     train_alp_he.py --head linear $robust
alp-he                he     train_alp_he.py $robust
alp-mhe               he     train_alp_he.py --head mhe $robust
fast                  he     train_fast_he.py --head linear $short
fast-he               he     train_fast_he.py $short
fast-mhe              he     train_fast_he.py --head mhe $short
free                  he     train_free_he.py --head linear --limit 20000
free-he               he     train_free_he.py --limit 20000
free-mhe              he     train_free_he.py --head mhe --limit 20000
cnn-fgsm              sphere train_dsphere.py --correlation inner --train fgsm $short
cnn-fgsm-short        sphere train_dsphere.py --correlation inner --train fgsm --limit 20000 --epochs 2 --eps-warmup 2 --schedule constant
dsphere-fgsm          sphere train_dsphere.py --train fgsm $short
dsphere-wm-fgsm       sphere train_dsphere.py --loss wm --train fgsm $short
dsphere-wm-quad-fgsm  sphere train_dsphere.py --loss wm --correlation quadratic --train fgsm $short
dsphere-anneal-fgsm   sphere train_dsphere.py --loss annealing --train fgsm $short
dsphere-wm-trunc-fgsm sphere train_dsphere.py --loss wm --correlation truncated --train fgsm $short
cnn-pgd               sphere train_dsphere.py --correlation inner --train pgd --schedule cosine $short
dsphere-pgd           sphere train_dsphere.py --train pgd --schedule cosine $short
dsphere-wm-pgd        sphere train_dsphere.py --loss wm --train pgd --schedule cosine $short
dsphere-wm-quad-pgd   sphere train_dsphere.py --loss wm --correlation quadratic --train pgd --schedule cosine $short
dsphere-anneal-pgd    sphere train_dsphere.py --loss annealing --train pgd --schedule cosine $short
dsphere-wm-trunc-pgd  sphere train_dsphere.py --loss wm --correlation truncated --train pgd --schedule cosine $short
"

evaluations() { # row, kind
    local fast=fgsm,pgd-20,adaptive-pgd-20,mim-20,cw-inf strong=square,autoattack
    [[ $2 == he* ]] || fast+=,pgd-100@0.01 # half of the time, and no column of HE's table
    [[ $2 != at* && $2 != he* ]] || strong=autoattack
    case $2 in
    sphere) # their networks take four times as long as small_cnn; small batches stay in the caches
        evaluate "$1" fast --attacks fgsm
        evaluate "$1" pgd --num-images 2000 --attacks pgd-100@0.01
        evaluate "$1" strong --num-images 1000 --batch-size 100 --attacks autoattack
        evaluate "$1" audit --attacks clean --audit
        ;;
    speed) evaluate "$1" fast --attacks pgd-20,cw-inf ;;
    plane) evaluate "$1" fast --num-images 2000 --attacks fgsm ;;
    *)
        evaluate "$1" fast --attacks $fast
        evaluate "$1" strong --num-images 1000 --attacks $strong
        evaluate "$1" audit --attacks clean --audit
        [[ $2 == at* || $2 == he* ]] || analyze "$1" angles --angles
        ;;
    esac
    [[ $1 == *-s0 || ( $2 != at* && $2 != he* ) ]] || return 0
    case $2 in # what their papers also report; on an adversarially trained network it takes ten minutes more
    *wp)
        evaluate "$1" table4 --num-images 1000 --attacks pgd-40@0.01,pgd-200@0.01,deepfool
        evaluate "$1" table4-slow --num-images 100 --attacks mta-200@0.01,cw-l2
        ;;
    abcl) evaluate "$1" appendix --attacks bim-20,fgsm-l2 ;;
    esac
    case $1 in
    cnn-s[0-9]*) evaluate "$1" table7 --attacks pgd-1@0.075,pgd-1-fn@0.075,pgd-2@0.075,pgd-2-fn@0.075 ;;
    # one network per method
    pgd-s0 | pgd-he-s0 | angular-s0 | weightpen-s0 | mmc-s0) analyze "$1" curves --num-images 500 --curves ;;
    esac
}

do_rows "$@"

# From each of four networks to each, once all of them exist. If one of them was trained again, so are these results.
transfer() { # seed
    flock -n 9 || return 0
    local row sources=("pgd-s$1" "trades-he-s$1" "weightpen-s$1" "dsphere-s$1")
    for row in "${sources[@]}"; do
        [ -e "$runs/$row/made_by" ] || return 0 # another process works on it, and comes here later
    done
    for row in "${sources[@]}"; do
        [ "$results-transfer/$row/transfer/eval.json" -nt "$runs/$row/made_by" ] || rm -rf "$results-transfer"/*-s"$1"
    done
    for row in "${sources[@]}"; do
        results=$results-transfer evaluate "$row" transfer --num-images 1000 --attacks clean --source "${sources[@]/#/$runs/}"
    done
}

pictures() { # of the first seed's networks; the positions of the features, a thousand each, are not kept
    flock -n 9 || return 0
    local row out
    for row in weightpen weightpen-relu abcl abcl-cosface abcl-sce cnn-plane dsphere-plane; do
        [ "$runs/$row-s0/made_by" -nt "figures/features-$row.png" ] || continue
        out=$runs/pictures/$row
        mkdir -p "$out"
        "$python" analyze.py "$runs/$row-s0" --data-dir "$data" --out "$out" --num-images 1000 --features >"$out/log"
        cp "$out"/features*.png "figures/features-$row.png"
    done
    out=$runs/evaluations/pgd-he-s0/curves/curves.png
    [ ! -e "$out" ] || cp "$out" figures/curves.png
}

for seed in $seeds; do
    (transfer "$seed") 9>"$runs/transfer-s$seed.lock"
done
(pictures) 9>"$runs/pictures.lock"
