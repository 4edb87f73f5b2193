# What mnist.sh, cifar10.sh and digits.sh share. They set `dataset`, `rows` (a line each: NAME KIND SCRIPT FLAGS) and a
# function `evaluations ROW KIND`. Each row is trained, evaluated, and its eval.json and verdicts.npz kept in
# benchmarks/results/DATASET/NAME-sSEED, or in DATASET-float32 where an attack was repeated in float32. What is done is
# skipped, what was interrupted goes on. With --redo the rows named are made anew, of each seed that has results, or of
# seed 0: their networks and results are deleted first.
#
# Every process takes the next row that no other one is at: on a CPU start one a core. From the environment:
#     SEEDS="0 1", of --redo too  RUNS=runs/DATASET, for checkpoints  DATA=data, for the dataset's file  PYTHON=python
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # processes that share the cores would wait for each other's threads
python=${PYTHON:-python} runs=${RUNS:-runs/$dataset} data=${DATA:-data} seeds=${SEEDS:-0 1}
results=benchmarks/results/$dataset
command -v flock >/dev/null || { echo "flock is needed (util-linux)" >&2; exit 2; }

evaluate() { # row, where to in the results, flags of eval_all.py
    local out=$runs/evaluations/$2
    [ -e "$results/$2/eval.json" ] && return
    mkdir -p "$out" "$results/$2"
    "$python" eval_all.py "$runs/$1" --data-dir "$data" --out "$out" "${@:3}" >"$out/log"
    cp "$out/verdicts.npz" "$results/$2"
    cp "$out/eval.json" "$results/$2/partial"
    mv "$results/$2/partial" "$results/$2/eval.json" # last, and at once: it says that all is there
}

train() { # row, script and flags
    local made=$runs/$1/made_by
    [ -e "$made" ] && [ "$(cat "$made")" != "${*:2}" ] && { echo "$runs/$1 was made by: $(cat "$made")" >&2; return 2; }
    [ -e "$made" ] && return
    "$python" "${@:2}" --dataset "$dataset" --data-dir "$data" --out "$runs/$1" --resume >"$runs/$1.log"
    echo "${*:2}" >"$made"
}

do_row() { # row, kind, script and flags
    flock -n 9 || return 0 # another process is at it
    echo "$1"
    [ -d "$results/$1" ] && [ ! -d "$runs/$1" ] && return # of another machine
    train "$1" "${@:3}"
    evaluations "$1" "$2"
}

redo() { # names of rows: away with what there is of them, and again
    local row seed failed=0
    local -A made=() # the seeds of each row
    [ $# -gt 0 ] || { echo "--redo needs the names of rows" >&2; exit 2; }
    check_names "$@"
    mkdir -p "$runs"
    for row in "$@"; do
        made[$row]=${SEEDS:-$(compgen -G "$results/$row-s[0-9]*" | sed 's/.*-s//' | sort -n || true)}
        made[$row]=${made[$row]:-0}
        for seed in ${made[$row]}; do # before anything is deleted
            flock -n "$runs/$row-s$seed.lock" true || { echo "another process is at $row-s$seed" >&2; exit 2; }
        done
    done
    for row in "$@"; do
        for seed in ${made[$row]}; do
            rm -rf {"$results","$results-float32","$runs/evaluations","$runs"}/"$row-s$seed"
        done
        set +e # not `||`, under which no failure within would count
        (set -e; seeds=${made[$row]}; do_rows "$row")
        [ $? = 0 ] || failed=1
        set -e
    done
    seeds=$(printf '%s\n' "${made[@]}" | tr ' ' '\n' | sort -nu)
    return $failed
}

check_names() { # of rows
    local name
    for name in "$@"; do
        grep -q "^$name " <<<"$rows" || { echo "no row $name" >&2; exit 2; }
    done
}

do_rows() { # --redo, names of rows; none means all
    local failed=0
    [ "${1:-}" != --redo ] || { redo "${@:2}"; return; }
    check_names "$@"
    mkdir -p "$runs"
    for seed in $seeds; do
        while read -r -u 8 name kind command; do
            [ -n "$name" ] && { [ $# = 0 ] || [[ " $* " == *" $name "* ]]; } || continue
            read -ra words <<<"$command"
            set +e # a row that fails must not keep the next ones from being made
            (set -e; do_row "$name-s$seed" "$kind" "${words[@]}" --seed "$seed") 9>"$runs/$name-s$seed.lock"
            [ $? = 0 ] || failed=1
            set -e
        done 8<<<"$rows"
    done
    return $failed
}
