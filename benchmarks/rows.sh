# What mnist.sh, cifar10.sh and digits.sh share. They set `dataset`, `rows` (one per line: NAME KIND SCRIPT FLAGS) and a
# function `evaluations ROW KIND`. Each row is trained and evaluated; eval.json and verdicts.npz, or analysis.json, are
# kept in benchmarks/results/DATASET/NAME-sSEED. Finished work is skipped, interrupted work continues. --redo repeats all
# seeds of a row that have results or a network (or seed 0), and deletes old results when the new network is there. The
# same command continues it.
#
# Several processes may run at once, on a CPU one per core: each takes the next row that no other works on. Environment:
#     SEEDS="0 1"  RUNS=runs/DATASET, for checkpoints  DATA=data, for the dataset's file  PYTHON=python
set -euo pipefail
CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # processes that share the cores would wait for each other's threads
python=${PYTHON:-python} runs=${RUNS:-runs/$dataset} data=${DATA:-data} seeds=${SEEDS:-0 1}
results=benchmarks/results/$dataset
for seed in $seeds; do
    [[ $seed =~ ^(0|[1-9][0-9]*)$ ]] || { echo "SEEDS: $seed is not a seed" >&2; exit 2; }
done
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
    mkdir -p "$out"
    "$python" "$1" "$(network "$2")" --data-dir "$data" --out "$out" "${@:4}" >"$out/log"
    mkdir -p "$to"
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
    local mark=$runs/$1.redo
    flock -n 9 || { echo "another process works on $1" >&2; return; }
    echo "$1; log: $runs/$1.log"
    if [ -d "$results/$1" ] && [ ! -d "$runs/$1" ] && [ ! -e "$mark" ]; then
        echo "skipped: its results come from another machine; --redo makes them again"
        return
    fi
    train "$1" "${@:3}"
    if [ -s "$mark" ]; then
        rm -rf "$results/$1"
        : >"$mark"
    fi
    evaluations "$1" "$2"
    rm -f "$mark"
}

begin_again() { # row; file descriptor 9 is the row's lock
    flock -n 9 || { echo "another process works on $1" >&2; return 1; }
    rm -rf {"$runs/evaluations","$runs"}/"$1"
    echo "old results" >"$runs/$1.redo" # emptied when they are deleted, removed when the row is done
}

redo() { # names of rows; an earlier --redo of a row that was stopped is continued
    local row seed known all began failed=0
    [ $# -gt 0 ] || { echo "--redo needs the names of rows" >&2; exit 2; }
    check_names "$@"
    mkdir -p "$results" "$runs"
    for row in "$@"; do
        known=$(ls "$results" "$runs" | sed -n "s/\.redo$//; s/^${row//./\\.}-s\([0-9]*\)$/\1/p" | sort -nu)
        all=${SEEDS:-${known:-0}}
        began=$(for seed in $all; do [ ! -e "$runs/$row-s$seed.redo" ] || echo "$seed"; done)
        if [ -z "$began" ]; then
            for seed in $all; do
                (begin_again "$row-s$seed") 9>"$runs/$row-s$seed.lock" && began+=" $seed" || failed=1
            done
        fi
        set +e # not `||`, which would switch `set -e` off inside
        (set -e; seeds=$began; do_rows "$row")
        [ $? = 0 ] || failed=1
        set -e
    done
    return $failed
}

check_names() { # of rows
    local name
    for name in "$@"; do
        awk -v name="$name" 'name && $1 == name { found = 1 } END { exit !found }' <<<"$rows" ||
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

start() { # do_rows in a process group of its own: TERM and Ctrl-C end all of it, and no other row begins
    set -m
    do_rows "$@" &
    trap 'kill -- -$!' INT TERM HUP
    wait $!
    trap - INT TERM HUP
}
