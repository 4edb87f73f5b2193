# What mnist.sh, cifar10.sh and digits.sh share. They set `dataset`, `rows` (one per line: NAME KIND SCRIPT FLAGS) and a
# function `evaluations ROW KIND`. Each row is trained and evaluated; eval.json and verdicts.npz, or analysis.json, are
# kept in benchmarks/results/DATASET/NAME-sSEED. Finished work is skipped, interrupted work continues. --redo first
# deletes the networks and results of the rows it names: of each seed that has results, or of seed 0.
#
# Several processes may run at once, on a CPU one per core: each takes the next row that no other works on. Environment:
#     SEEDS="0 1"  RUNS=runs/DATASET, for checkpoints  DATA=data, for the dataset's file  PYTHON=python
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # processes that share the cores would wait for each other's threads
python=${PYTHON:-python} runs=${RUNS:-runs/$dataset} data=${DATA:-data} seeds=${SEEDS:-0 1}
results=benchmarks/results/$dataset
for needed in flock "$python"; do
    command -v "$needed" >/dev/null || { echo "$needed is needed" >&2; exit 2; }
done

evaluate() { # row, name of the evaluation, flags of eval_all.py
    measure eval_all.py "$@"
}

analyze() { # row, name of the analysis, flags of analyze.py
    measure analyze.py "$@"
}

network() { # row
    [[ $1 != *-paper-* ]] && echo "$runs/$1" || echo "$runs/$1/last.pt" # as the paper's length is the claim's
}

measure() { # script, row, name, flags
    local out=$runs/evaluations/$2/$3 to=$results/$2/$3 file=eval.json
    [ "$1" = eval_all.py ] || file=analysis.json
    [ -e "$to/$file" ] && return
    mkdir -p "$out" "$to"
    "$python" "$1" "$(network "$2")" --data-dir "$data" --out "$out" "${@:4}" >"$out/log"
    [ "$1" != eval_all.py ] || cp "$out/verdicts.npz" "$to"
    cp "$out/$file" "$to/partial"
    mv "$to/partial" "$to/$file" # last, because this file marks the evaluation as complete
}

train() { # row, script and flags
    local made=$runs/$1/made_by
    [ -e "$made" ] && [ "$(cat "$made")" != "${*:2}" ] && { echo "$runs/$1 was made by: $(cat "$made")" >&2; return 2; }
    [ -e "$made" ] && return
    "$python" "${@:2}" --dataset "$dataset" --data-dir "$data" --out "$runs/$1" --resume >"$runs/$1.log"
    echo "${*:2}" >"$made"
}

do_row() { # row, kind, script and flags; file descriptor 9 is the row's lock
    flock -n 9 || { [ -z "${redoing:-}" ] || echo "another process works on $1" >&2; return "${redoing:-0}"; }
    echo "$1"
    [ -z "${redoing:-}" ] || rm -rf {"$results","$runs/evaluations","$runs"}/"$1"
    if [ -d "$results/$1" ] && [ ! -d "$runs/$1" ]; then
        echo "skipped: its results come from another machine"
        return
    fi
    train "$1" "${@:3}"
    evaluations "$1" "$2"
}

redo() { # names of rows
    local row failed=0
    [ $# -gt 0 ] || { echo "--redo needs the names of rows" >&2; exit 2; }
    check_names "$@"
    for row in "$@"; do
        local made=${SEEDS:-$(ls "$results" | sed -n "s/^${row//./\\.}-s\([0-9]*\)$/\1/p" | sort -n)}
        set +e # not `||`, which would switch `set -e` off inside
        (set -e; seeds=${made:-0} redoing=1; do_rows "$row")
        [ $? = 0 ] || failed=1
        set -e
    done
    return $failed
}

check_names() { # of rows
    local name
    for name in "$@"; do
        awk -v name="$name" '$1 == name { found = 1 } END { exit !found }' <<<"$rows" ||
            { echo "no row $name" >&2; exit 2; }
    done
}

do_rows() { # --redo, names of rows; without names all rows
    local failed=0
    [ "${1:-}" != --redo ] || { redo "${@:2}"; return; }
    check_names "$@"
    mkdir -p "$runs"
    for seed in $seeds; do
        while read -r -u 8 name kind command; do
            [ -n "$name" ] && { [ $# = 0 ] || [[ " $* " == *" $name "* ]]; } || continue
            read -ra words <<<"$command"
            set +e # the rows after one that fails are still done
            (set -e; do_row "$name-s$seed" "$kind" "${words[@]}" --seed "$seed") 9>"$runs/$name-s$seed.lock"
            [ $? = 0 ] || failed=1
            set -e
        done 8<<<"$rows"
    done
    return $failed
}
