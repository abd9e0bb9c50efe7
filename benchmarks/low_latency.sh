#!/usr/bin/env bash
# The runs whose results are kept in benchmarks/results. See README.md beside this file.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-.venv/bin/python}
out=${OUT:-benchmarks/results}
what=${1:-decode}
shift || true

bench() { "$python" -m ep_runtime.bench low-latency --out "$out" "$@"; }

decode() { bench --plot "$@"; }
large() { bench --label large --tokens 256,512,1024 --plot "$@"; }
split() { bench --label split --modes split,hook --peers none "$@"; }
skew() {
    local status=0
    for kind in zipf one-rank half-empty; do
        bench --skew "$kind" --experts 256 "$@" || status=1
    done
    return "$status"
}
all() {
    local status=0
    for run in decode large split skew; do
        "$run" "$@" || status=1
    done
    return "$status"
}

case $what in
decode | large | split | skew | all) "$what" "$@" ;;
*)
    echo "usage: benchmarks/low_latency.sh decode|large|split|skew|all [options]" >&2
    exit 2
    ;;
esac
