# What mnist.sh, cifar10.sh and digits.sh share. They set `dataset`, `rows` (a line each: NAME KIND SCRIPT FLAGS) and a
# function `evaluations ROW KIND`. Each row is trained, evaluated, and its eval.json and verdicts.npz kept in
# benchmarks/results/DATASET/NAME-sSEED. What is done is skipped, what was interrupted goes on.
#
# Every process takes the next row that no other one is at: on a CPU start one a core. From the environment:
#     SEEDS="0 1"  RUNS=runs/DATASET, for checkpoints  DATA=data, for the dataset's file  PYTHON=python
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # processes that share the cores would wait for each other's threads
python=${PYTHON:-python} runs=${RUNS:-runs/$dataset} data=${DATA:-data} seeds=${SEEDS:-0 1}

evaluate() { # row, where to in benchmarks/results/DATASET, flags of eval_all.py
    local kept=benchmarks/results/$dataset/$2 out=$runs/evaluations/$2
    [ -e "$kept/eval.json" ] && return
    mkdir -p "$out"
    "$python" eval_all.py "$runs/$1" --data-dir "$data" --out "$out" "${@:3}" >"$out/log"
    mkdir -p "$kept"
    cp "$out/verdicts.npz" "$out/eval.json" "$kept"
}

train() { # row, script and flags
    [ -e "$runs/$1/trained" ] && return
    "$python" "${@:2}" --dataset "$dataset" --data-dir "$data" --out "$runs/$1" --resume >"$runs/$1.log"
    touch "$runs/$1/trained"
}

do_rows() { # names of rows; none means all
    mkdir -p "$runs"
    for seed in $seeds; do
        while read -r name kind command; do
            [ -n "$name" ] && { [ $# = 0 ] || [[ " $* " == *" $name "* ]]; } || continue
            (
                flock -n 9 || exit 0 # another process is at it
                echo "$name-s$seed"
                read -ra words <<<"$command"
                train "$name-s$seed" "${words[@]}" --seed "$seed"
                evaluations "$name-s$seed" "$kind"
            ) 9>"$runs/$name-s$seed.lock"
        done <<<"$rows"
    done
}
