#!/usr/bin/env bash
# The runs whose results are kept in benchmarks/results. See README.md beside this file.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-.venv/bin/python}
out=${OUT:-benchmarks/results}
what=${1:-decode}
shift || true

bench() { "$python" -m ep_runtime.bench low-latency --out "$out" "$@"; }

decode() { bench --experts 256,32 --no-parts --plot "$@"; }
large() { bench --label large --experts 256 --tokens 512,1024 --no-parts --plot "$@"; }
hook() { bench --label hook --experts 256 --modes split,hook --no-parts --peers none "$@"; }
fp8() {
    bench --label fp8combine --experts 256 --combine-formats fp8 --no-parts --peers none "$@"
}
skew() {
    local status=0
    for kind in zipf one-rank half-empty; do
        bench --skew "$kind" --experts 256 --no-parts --peers none "$@" || status=1
    done
    return "$status"
}
all() {
    local status=0
    for run in decode large hook fp8 skew; do
        "$run" "$@" || status=1
    done
    return "$status"
}

case $what in
decode | large | hook | fp8 | skew | all) "$what" "$@" ;;
*)
    echo "usage: benchmarks/low_latency.sh decode|large|hook|fp8|skew|all [options]" >&2
    exit 2
    ;;
esac
